"""Segments, extents and metadata over the network: what mount, CLI and library share."""
