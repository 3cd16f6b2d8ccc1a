"""Local durability: the write-back log, and the clean cache of ciphertext read from the network."""
