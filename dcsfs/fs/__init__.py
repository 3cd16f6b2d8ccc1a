"""POSIX semantics over the uplink and the local log; knows nothing of pyfuse3."""
