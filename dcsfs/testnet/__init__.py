"""A whole network on loopback for trying and testing: satellite and node processes of their own."""
