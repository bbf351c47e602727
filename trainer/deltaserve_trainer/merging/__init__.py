"""Several adapters into one: the formulas, and the form of an adapter in which they are sums."""
