"""The types that checkers and editors see: the names that an argument takes, and the arguments that a class takes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import flax.linen
import pytest
from flax import nnx as flax_nnx

import depthwise_jax
from depthwise_jax import linen, nnx
from depthwise_jax._core.layout import DATA_FORMATS
from depthwise_jax._core.window import PADDINGS, TRANSPOSED_PADDINGS
from depthwise_jax.lowering import LOWERINGS

FUNCTIONS = [
    depthwise_jax.depthwise_conv,
    depthwise_jax.separable_conv,
    depthwise_jax.depthwise_conv_transpose,
    depthwise_jax.causal_conv1d,
    depthwise_jax.causal_conv1d_state,
    depthwise_jax.explain,
]
LAYERS = [
    item
    for module in (linen, nnx)
    for name, item in vars(module).items()
    if not name.startswith("_") and "Conv" in name
]


def names(annotation: Any) -> Iterator[str]:
    """The strings that an annotation allows; "str" where it allows any."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif annotation is str:
        yield "str"
    elif get_args(annotation) and not isinstance(get_origin(annotation), type):
        for part in get_args(annotation):
            yield from names(part)


@pytest.mark.parametrize("item", [*FUNCTIONS, *LAYERS], ids=lambda item: f"{item.__module__}.{item.__name__}")
def test_an_argument_takes_its_names_and_no_other_string(item: Callable[..., Any]) -> None:
    paddings = TRANSPOSED_PADDINGS if "transpose" in item.__name__.lower() else PADDINGS
    expected = {
        "padding": {*paddings, *map(str.upper, paddings)},
        "data_format": {*DATA_FORMATS},
        "implementation": {*LOWERINGS},
    }
    hints = get_type_hints(item)
    found = {name: {*names(hints[name])} for name in expected if name in hints}
    assert found == {name: expected[name] for name in found}
    assert "data_format" in found


@pytest.mark.parametrize("layer", LAYERS, ids=lambda item: f"{item.__module__}.{item.__name__}")
def test_a_layer_shows_its_arguments(layer: type) -> None:
    shown = list(inspect.signature(layer).parameters)
    taken = [field.name for field in dataclasses.fields(layer) if field.init]
    if issubclass(layer, flax.linen.Module):
        assert shown == taken
    else:
        assert shown == [*taken, "rngs"]
        assert "__init__" in vars(layer), "jedi reads the arguments of a class that is a dataclass itself"


def test_a_made_nnx_layer_shows_what_a_call_takes() -> None:
    layer = nnx.DepthwiseConv2D(2, 3, rngs=flax_nnx.Rngs(0))
    assert [*inspect.signature(layer).parameters] == ["x"]
