"""The contract of the layers, written once for Linen and NNX: their arguments and what these mean. Internal."""
