"""Names, configurations and objects become callables; nothing outside a registry is looked up."""

import dataclasses
import re
import sys

import pytest

from depthwise_jax import DepthwiseConv2D
from depthwise_jax._core.registry import Registry, closest


@dataclasses.dataclass(frozen=True)
class Scale:
    factor: float = 2.0

    def __post_init__(self):
        if self.factor < 0:
            raise ValueError(f"factor must not be negative; got {self.factor}")

    def __call__(self, x):
        return self.factor * x

    def get_config(self, window_axes=()):
        return {"factor": self.factor, "axes": list(window_axes)}


def negate(x):
    return -x


REGISTRY = Registry("thing", "keras.things", {Scale: ("Scale", "scale"), negate: ("negate", "minus")})


@pytest.mark.parametrize(
    ("identifier", "expected"),
    [
        ("Scale", 6.0),
        ("scale", 6.0),
        ("minus", -3.0),
        ({"class_name": "Scale", "config": {"factor": 5.0}}, 15.0),
        ({"class_name": "Scale"}, 6.0),
        ({"module": "keras.things", "class_name": "scale", "config": {}, "registered_name": None}, 6.0),
        ({"module": "keras.things", "class_name": "Scale", "config": None, "registered_name": "Scale"}, 6.0),
        ({"class_name": "Scale", "config": {}, "shared_object_id": 4}, 6.0),
        ({"module": "builtins", "class_name": "function", "config": "negate", "registered_name": "function"}, -3.0),
        ({"module": "builtins", "class_name": "function", "config": "negate", "registered_name": "negate"}, -3.0),
        (Scale, 6.0),
        (Scale(7.0), 21.0),
        (lambda x: x + 1, 4.0),
    ],
)
def test_get(identifier, expected):
    thing = REGISTRY.get(identifier)
    assert thing is not None
    assert thing(3.0) == expected


def test_none_and_callables_come_back_as_they_are():
    def function(x):
        return x

    assert REGISTRY.get(None) is None
    assert REGISTRY.get(function) is function


@pytest.mark.parametrize(
    ("identifier", "parts"),
    [
        ("scael", ["my_argument", "thing", "'scael'", "'scale'"]),
        ("SCALE", ["'SCALE'", "'scale'"]),
        ("", ["my_argument", "negate", "scale"]),
        ("zzzzzz", ["'minus'", "'negate'", "'scale'"]),
        ("os.system", ["'os.system'"]),
        ({"class_name": "Nope", "config": {}}, ["my_argument", "'Nope'"]),
        ({"class_name": "__lambda__", "config": {"value": "lambda x: x"}}, ["'__lambda__'"]),
        ({"module": "builtins", "class_name": "function", "config": "eval", "registered_name": "function"}, ["'eval'"]),
        ({"module": "os", "class_name": "system", "config": {"command": "false"}}, ["my_argument", "'os'"]),
        ({"module": "somewhere", "class_name": "Scale", "config": {}}, ["'somewhere'", "keras.things"]),
        ({"class_name": "Scale", "config": {}, "registered_name": "mine>Scale"}, ["'mine>Scale'"]),
        ({"class_name": "Scale", "config": {"size": 1}}, ["my_argument", "Scale", "size"]),
        ({"class_name": "Scale", "config": {"factor": -1.0}}, ["my_argument", "factor must not be negative"]),
        ({"class_name": "Scale", "config": 3}, ["my_argument", "config", "3"]),
        ({"class_name": 3, "config": {}}, ["my_argument", "class_name", "3"]),
        ({"class_name": "negate", "config": {"a": 1}}, ["my_argument", "negate"]),
        ({"config": {}}, ["my_argument", "class_name"]),
        ({"class_name": "Scale", "config": {}, "evil": 1}, ["my_argument", "evil"]),
    ],
)
def test_what_is_unknown_is_refused_by_name(identifier, parts):
    every_part = "".join(f"(?=.*{re.escape(part)})" for part in parts)
    with pytest.raises(ValueError, match=every_part):
        REGISTRY.get(identifier, "my_argument")


@pytest.mark.parametrize("identifier", [3, 2.5, True, ["scale"], ("scale",), b"scale", object()])
def test_what_is_no_identifier_is_a_type_error(identifier):
    with pytest.raises(TypeError, match="my_argument must be"):
        REGISTRY.get(identifier, "my_argument")


def test_a_class_that_makes_no_callable_is_refused():
    with pytest.raises(TypeError, match=r"my_argument.*not callable"):
        REGISTRY.get(type("Plain", (), {}), "my_argument")
    with pytest.raises(ValueError, match=r"my_argument.*Needs"):
        REGISTRY.get(type("Needs", (), {"__init__": lambda self, size: None}), "my_argument")


def test_a_refused_module_is_not_imported():
    module = "antigravity"
    assert module not in sys.modules
    for config in (
        {"module": module, "class_name": "Scale", "config": {}},
        {"module": module, "class_name": "function", "config": "fly", "registered_name": "fly"},
    ):
        with pytest.raises(ValueError, match=module):
            REGISTRY.get(config)
    assert module not in sys.modules


def test_serialize():
    assert REGISTRY.serialize(None) is None
    assert REGISTRY.serialize(negate) == "negate"
    assert REGISTRY.serialize(Scale(3.0), window_axes=(0, 1)) == {
        "module": "keras.things",
        "class_name": "Scale",
        "config": {"factor": 3.0, "axes": [0, 1]},
        "registered_name": None,
    }


class Unhashable(list):
    def __call__(self, x):
        return x


@pytest.mark.parametrize("thing", [lambda x: x, Unhashable(), print])
def test_what_keras_has_no_word_for_is_not_serialized(thing):
    with pytest.raises(ValueError, match=r"my_argument.*has no Keras configuration.*'Scale'"):
        REGISTRY.serialize(thing, "my_argument")


def test_closest():
    assert closest("glorot_unifrom", ["zeros", "glorot_uniform", "glorot_normal"]).startswith(
        "closest valid names: 'glorot_uniform'"
    )
    assert closest("qqq", ["b", "a"]) == "valid names: 'a', 'b'"


def nested(depth, wrap):
    value = {}
    for _ in range(depth):
        value = wrap(value)
    return value


CYCLE: dict = {}
CYCLE["config"] = [CYCLE, CYCLE]


@pytest.mark.parametrize(
    "value",
    [nested(5000, lambda v: {"config": v}), nested(5000, lambda v: [v]), nested(40, lambda v: {"a": [v, v]}), CYCLE],
    ids=["dicts", "lists", "shared", "cycle"],
)
@pytest.mark.parametrize(
    "key", ["depthwise_initializer", "bias_regularizer", "depthwise_constraint", "dtype", "activation", "kernel_size"]
)
def test_a_configuration_too_deep_to_mean_something(key, value):
    for entry in (value, {"class_name": "Zeros", "config": {"seed": value}}):
        with pytest.raises(ValueError, match="at most 32 levels"):
            DepthwiseConv2D.from_config({**DepthwiseConv2D(3).get_config(), key: entry})


@pytest.mark.parametrize("config", [[], None, "float32", 3, {"name": 3}, {"name": []}])
@pytest.mark.parametrize("class_name", ["DTypePolicy", "Policy"])
def test_a_malformed_dtype_policy(class_name, config):
    policy = {"class_name": class_name, "config": config}
    with pytest.raises(ValueError, match="dtype must be one of Keras' policies"):
        DepthwiseConv2D.from_config({**DepthwiseConv2D(3).get_config(), "dtype": policy})
