"""Internal basics: the geometry of a convolution, dtypes, sharding, names, error hints."""
