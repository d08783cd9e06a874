"""What everything else rests on: the geometry of a convolution, dtypes, sharding, names, error hints. Internal."""
