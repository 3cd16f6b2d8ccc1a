"""The pyfuse3 adapter: converts, guards, calls `dcsfs.fs`; knows no semantics."""
