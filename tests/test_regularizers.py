"""Regularizers against Keras and their formulas."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from depthwise_jax import regularizers
from workloads.keras_reference import keras

W = np.random.default_rng(0).normal(size=(3, 2, 4, 2)).astype(np.float32)
CONFIGS = [
    ("L1", {}),
    ("L1", {"l1": 0.3}),
    ("L2", {}),
    ("L2", {"l2": 0.2}),
    ("L1L2", {}),
    ("L1L2", {"l1": 0.1}),
    ("L1L2", {"l1": 0.1, "l2": 0.4}),
]


def make(name, config) -> Any:
    return regularizers.get({"class_name": name, "config": config})


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_penalties_are_keras_own(name, config):
    theirs = getattr(keras.regularizers, name)(**config)
    penalty = regularizers.penalty(make(name, config), jnp.asarray(W))
    np.testing.assert_allclose(penalty, theirs(W), rtol=1e-6)
    l1, l2 = config.get("l1", 0.01 * (name == "L1")), config.get("l2", 0.01 * (name == "L2"))
    np.testing.assert_allclose(penalty, l1 * np.abs(W).sum() + l2 * np.square(W).sum(), rtol=1e-6)


@pytest.mark.parametrize("mode", ["rows", "columns"])
def test_orthogonal_regularizer_is_the_mean_cosine_of_pairs(mode):
    matrix = W.reshape(6, 8)
    rows = matrix if mode == "rows" else matrix.T
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = [abs(rows[i] @ rows[j]) for i in range(len(rows)) for j in range(i)]
    ours = make("OrthogonalRegularizer", {"factor": 0.5, "mode": mode})(jnp.asarray(matrix))
    np.testing.assert_allclose(ours, 0.5 * np.mean(pairs), rtol=1e-6)
    np.testing.assert_allclose(
        ours, keras.regularizers.OrthogonalRegularizer(0.5, mode)(jnp.asarray(matrix)), rtol=1e-6
    )


def test_orthogonal_regularizer_takes_zero_rows_and_matrices_alone():
    orthogonal = regularizers.OrthogonalRegularizer()
    assert orthogonal(jnp.zeros((3, 4))) == keras.regularizers.OrthogonalRegularizer()(jnp.zeros((3, 4))) == 0
    with pytest.raises(ValueError, match=r"OrthogonalRegularizer takes a matrix; got an array of shape \(3, 3, 4, 1\)"):
        orthogonal(jnp.zeros((3, 3, 4, 1)))


@pytest.mark.parametrize("name", sorted(keras.src.regularizers.ALL_OBJECTS_DICT))
def test_every_name_of_keras(name):
    assert type(regularizers.get(name)).__name__ == type(keras.regularizers.get(name)).__name__


@pytest.mark.parametrize("name", ["l1_l2", "l1l2", "L1L2"])
def test_l1_l2_means_what_keras_documents(name):
    assert regularizers.get(name) == regularizers.L1L2(0.01, 0.01)
    # what Keras does: unknown, or no penalty at all
    if name == "l1_l2":
        with pytest.raises(ValueError, match="Could not interpret"):
            keras.regularizers.get(name)
    else:
        assert keras.regularizers.get(name)(W) == 0


def test_the_base_has_no_penalty():
    assert regularizers.penalty(regularizers.Regularizer(), jnp.asarray(W)) == 0


@pytest.mark.parametrize(("name", "config"), [*CONFIGS, ("OrthogonalRegularizer", {"factor": 0.2, "mode": "columns"})])
def test_configurations_go_through_keras_and_back(name, config):
    ours = make(name, config)
    theirs = keras.regularizers.deserialize(regularizers.serialize(ours))
    back: Any = regularizers.get(keras.regularizers.serialize(theirs))
    assert type(back) is type(ours)
    # Keras holds some of the factors in float32
    matrix = jnp.asarray(W.reshape(6, 8))
    np.testing.assert_allclose(back(matrix), ours(matrix), rtol=1e-6)


def test_the_penalty_of_narrow_floats_is_computed_in_float32():
    ones = jnp.full((512, 256), 1.0, jnp.float16)  # 131072 overflows float16
    penalty = regularizers.penalty(regularizers.L1(1.0), ones)
    assert penalty.dtype == jnp.float32
    assert penalty == 131072


def test_any_callable_is_a_regularizer_and_its_result_is_summed():
    regularizer = regularizers.get(lambda w: jnp.abs(w).sum(axis=(0, 1)))
    assert regularizer is not None
    np.testing.assert_allclose(regularizers.penalty(regularizer, jnp.asarray(W)), np.abs(W).sum(), rtol=1e-6)
    with pytest.raises(ValueError, match=r"reg: .*has no Keras configuration"):
        regularizers.serialize(regularizer, "reg")


@pytest.mark.parametrize("value", [-1, math.inf, math.nan, "0.1", None, True])
@pytest.mark.parametrize(
    ("name", "key"), [("L1", "l1"), ("L2", "l2"), ("L1L2", "l2"), ("OrthogonalRegularizer", "factor")]
)
def test_bad_factors(name, key, value):
    with pytest.raises(ValueError, match=f"reg: .*{key} must be a finite, non-negative number"):
        regularizers.get({"class_name": name, "config": {key: value}}, "reg")


@pytest.mark.parametrize(
    ("identifier", "error", "match"),
    [
        ("nope", ValueError, "reg: unknown regularizer 'nope'"),
        ("L3", ValueError, "reg: unknown regularizer 'L3'; closest valid names"),
        (0.01, TypeError, "reg must be"),
        ({"class_name": "Nope", "config": {}}, ValueError, "'Nope'"),
        ({"class_name": "OrthogonalRegularizer", "config": {"mode": "x"}}, ValueError, "mode must be"),
    ],
)
def test_bad_regularizers(identifier, error, match):
    with pytest.raises(error, match=match):
        regularizers.get(identifier, "reg")
