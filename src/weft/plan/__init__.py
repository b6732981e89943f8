"""Which structure for which layer, under a budget."""
