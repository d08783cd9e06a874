"""What tests, notebooks, examples and benchmarks share: networks, data, layers, and the reading of results.

Imports only depthwise_jax and other libraries.
"""
