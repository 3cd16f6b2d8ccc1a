"""What two peers must agree on, byte for byte, and the trio transport over it.

`dcsfs`, `satellite` and `node` import this package and never each other; this package imports
none of them. Modules below `network.runtime` are pure: no I/O, no clock, no randomness.
"""
