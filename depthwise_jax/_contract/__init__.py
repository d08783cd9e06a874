"""Internal: the layers' arguments and their meaning, shared by Linen and NNX."""
