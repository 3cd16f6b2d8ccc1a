"""The satellite: metadata, access, node selection and orders; never names, contents or keys."""
