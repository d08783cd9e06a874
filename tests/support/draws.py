"""How many random cases the tests draw."""

import os

# `make test-all` sets it: for as many as say something new, where `make test` draws as many as it has time for.
ALL = bool(os.environ.get("DEPTHWISE_JAX_TEST_ALL"))


def draws(quick: int, all_of_them: int) -> int:
    """The number of cases for `make test`, or that for `make test-all`."""
    return all_of_them if ALL else quick
