"""The algorithms: pure functions on tensors that know neither structures nor networks."""
