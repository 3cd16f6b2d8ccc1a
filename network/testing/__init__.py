"""A network in one process: in-memory streams with injected faults, seeded entropy."""
