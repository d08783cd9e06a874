"""Export: one artefact for several platforms with a symbolic batch, written, read back and run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

from depthwise_jax import DepthwiseConv2D, SeparableConv2D, separable_conv
from depthwise_jax.interop import accelerate
from depthwise_jax.lowering import Implementation
from depthwise_jax.optim import constraints_of, project
from tests.support import maps
from tests.support.assertions import assert_close
from tests.support.cases import CORE, Case
from tests.support.compiling import QUICK_FLAGS
from tests.support.oracle import Oracle, widest

PLATFORMS = ("cpu", "cuda", "tpu")


def reloaded(f: Any, *args: Any, vjp_order: int = 0, platforms: tuple[str, ...] = PLATFORMS) -> export.Exported:
    exported = export.export(jax.jit(f), platforms=platforms)(*args)
    assert exported.platforms == platforms
    return export.deserialize(exported.serialize(vjp_order=vjp_order))


def symbolic_batch(case: Case) -> tuple[Any, Any]:
    (batch,) = export.symbolic_shape("n")
    return jax.ShapeDtypeStruct((batch, *case.x[1:]), jnp.float32), jax.ShapeDtypeStruct(case.kernel, jnp.float32)


@pytest.mark.parametrize("case", CORE, ids=str)
def test_symbolic_batch_on_three_platforms(case: Case, plain: str) -> None:
    f = reloaded(case.conv(plain), *symbolic_batch(case))
    for batch in (1, 3):
        one = Case(f"{case.name}-{batch}", (batch, *case.x[1:]), case.kernel, case.geometry)
        x, w, _ = one.operands()
        assert_close(f.call(x, w), one.oracle.conv(x, w), 1e-5)


@pytest.mark.parametrize(
    "platforms", [("tpu", "cpu", "cuda"), ("cuda", "tpu", "cpu"), ("cpu", "rocm"), ("cpu",)], ids="-".join
)
def test_each_platform_gets_its_own_lowering(platforms: tuple[str, ...]) -> None:
    # A rule shared by two platforms is indexed wrongly in an artefact for several, depending on their order.
    case = CORE[1]
    x, w, g = case.operands()
    f = reloaded(maps.value_and_gradients(case.conv()), x, w, g, platforms=platforms)
    y, dx, dw = f.call(x, w, g)
    assert_close(y, case.oracle.conv(x, w), 1e-5)
    assert_close(dx, case.oracle.input_grad(g, w), 1e-5)
    assert_close(dw, case.oracle.kernel_grad(x, g), 1e-5)


@pytest.mark.parametrize("case", [CORE[1], CORE[3]], ids=str)
def test_gradients_with_a_symbolic_batch(case: Case, plain: str) -> None:
    x, w = symbolic_batch(case)
    f = reloaded(jax.grad(lambda x, w: (case.conv(plain)(x, w) ** 2).sum() / 2, (0, 1)), x, w)
    x, w, _ = case.operands()
    y = case.oracle.conv(x, w)
    dx, dw = f.call(x, w)
    assert_close(dx, case.oracle.input_grad(y, w), 1e-5)
    assert_close(dw, case.oracle.kernel_grad(x, y), 1e-5)


def test_the_artefact_is_differentiable(plain: str) -> None:
    case = CORE[1]
    x, w, g = case.operands()
    f = reloaded(case.conv(plain), *symbolic_batch(case), vjp_order=1)
    dx, dw = maps.gradients(f.call)(x, w, g)
    assert_close(dx, case.oracle.input_grad(g, w), 1e-5)
    assert_close(dw, case.oracle.kernel_grad(x, g), 1e-5)


def test_symbolic_batch_with_bias_and_vmap(plain: str) -> None:
    case = Case("export-vmap", (2, 5, 4, 3), (3, 3, 3, 2), {"padding": "same"})
    x, w, b = case.draw((3, *case.x), 0), case.draw((3, *case.kernel), 1), case.draw((6,), 2)
    (batch,) = export.symbolic_shape("n")
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, batch, *case.x[1:]), w.shape, b.shape)]
    f = reloaded(jax.vmap(case.conv(plain, activation="relu"), (0, 0, None)), *shapes)
    exact = [np.maximum(case.oracle.add_bias(case.oracle.conv(a, k), b), 0) for a, k in zip(x, w, strict=True)]
    assert_close(f.call(x, w, b), np.stack(exact), 1e-5)


@pytest.mark.parametrize("padding", ["valid", "same", "causal", 1])
def test_a_symbolic_length(padding: Any) -> None:
    # The lowering that is chosen for a size that is not known.
    n, length = export.symbolic_shape("n, l", constraints=["l >= 3"])
    kernel = (3, 2, 2)
    case = Case("export-length", (2, 7, 2), kernel, {"padding": padding})
    f = reloaded(
        case.conv(), jax.ShapeDtypeStruct((n, length, 2), jnp.float32), jax.ShapeDtypeStruct(kernel, jnp.float32)
    )
    for size in (3, 7):
        one = Case(f"export-length-{size}", (2, size, 2), kernel, case.geometry)
        x, w, _ = one.operands()
        assert_close(f.call(x, w), one.oracle.conv(x, w), 1e-5)


def test_separable_on_three_platforms(plain: Implementation) -> None:
    case = CORE[1]
    x, w = symbolic_batch(case)
    p = case.draw((1, 1, 6, 4), 20)
    f = reloaded(lambda x, w, p: separable_conv(x, w, p, **case.geometry, implementation=plain), x, w, p)
    x, w, _ = case.operands()
    assert_close(f.call(x, w, p), case.oracle.conv(x, w) @ widest(p)[0, 0], 1e-5)


def test_nothing_in_the_artefact_needs_this_package() -> None:
    case = CORE[1]
    exported = export.export(jax.jit(case.conv()), platforms=PLATFORMS)(*case.operands()[:2])
    assert "custom_call" not in exported.mlir_module()


# What serves the artefact: a process in which this package cannot be imported, nor flax.
SERVER = """
import sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("depthwise_jax", "flax"):
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Absent())
try:
    import depthwise_jax
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("depthwise_jax can be imported")

import numpy as np
from jax import export

directory = sys.argv[1]
with open(f"{directory}/model", "rb") as file:
    model = export.deserialize(file.read())
assert model.platforms == ("cpu", "cuda", "tpu"), model.platforms
images = np.load(f"{directory}/images.npy")
np.savez(f"{directory}/logits.npz", *(model.call(images[:batch]) for batch in (1, 3, len(images))))
"""


def test_a_trained_model_in_a_process_without_this_package(tmp_path: Path) -> None:
    model = nn.Sequential(
        [
            DepthwiseConv2D(3, depth_multiplier=4, activation="relu", depthwise_constraint="max_norm"),
            SeparableConv2D(6, 3, strides=2, padding="same", activation="gelu"),
            SeparableConv2D(3, (2, 3), padding="reflect", dilation_rate=2, depthwise_constraint="unit_norm"),
            lambda x: x.mean((-3, -2)),
        ]
    )
    rng = np.random.default_rng(0)
    images = rng.standard_normal((7, 10, 11, 2)).astype(np.float32)
    labels = rng.integers(3, size=7)
    params = model.init(jax.random.key(0), images)["params"]
    optimizer = optax.chain(optax.adam(0.05), project(constraints_of(model, images)))

    def logits(params: Any, images: Any) -> Any:
        return model.apply({"params": params}, images)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(logits(p, images), labels).mean()  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(10):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]

    (batch,) = export.symbolic_shape("n")
    exported = export.export(jax.jit(lambda x: logits(params, x)), platforms=PLATFORMS)(
        jax.ShapeDtypeStruct((batch, *images.shape[1:]), jnp.float32)
    )
    (tmp_path / "model").write_bytes(exported.serialize())
    np.save(tmp_path / "images.npy", images)
    environment = {**os.environ, "XLA_FLAGS": QUICK_FLAGS}
    # -I: neither this directory nor PYTHONPATH is searched.
    command = [sys.executable, "-I", "-c", SERVER, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    served = np.load(tmp_path / "logits.npz")
    for name, size in zip(served.files, (1, 3, 7), strict=True):
        assert_close(served[name], logits(params, images[:size]), 1e-5, f"batch {size}")


@pytest.mark.parametrize("drop_in", [False, True], ids=["layer", "accelerate"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [2, 3, 4])
def test_symbolic_height_and_width_with_same_and_strides(size: int, stride: int, drop_in: bool) -> None:
    b, h, w = export.symbolic_shape("b, h, w", constraints=["h >= 4", "w >= 4"])
    conv = nn.Conv(8, (size, size), strides=stride, feature_group_count=8)
    params = conv.init(jax.random.key(0), jnp.ones((1, 8, 8, 8)))
    layer = DepthwiseConv2D(size, strides=stride, padding="same")
    ours = jax.tree.map(lambda a: a.reshape(size, size, 8, 1) if a.ndim == 4 else a, params)
    f = (lambda x: accelerate(conv.apply)(params, x)) if drop_in else (lambda x: layer.apply(ours, x))
    exported = export.export(jax.jit(f))(jax.ShapeDtypeStruct((b, h, w, 8), jnp.float32))
    for height, width in ((4, 11), (12, 5)):
        x = np.random.default_rng(0).normal(size=(2, height, width, 8)).astype("f4")
        kernel = np.asarray(params["params"]["kernel"]).reshape(size, size, 8, 1)
        truth = Oracle(x.shape, kernel.shape, strides=stride, padding="same").conv(x, kernel)
        assert_close(exported.call(x), truth, 1e-5)


def test_a_compiled_program_loads_in_another_process(tmp_path: Path) -> None:
    start = (
        "import pickle, jax, jax.numpy as jnp, depthwise_jax\nfrom jax.experimental import serialize_executable as s\n"
    )
    save = """
def f(x, w):
    y, t = jax.vjp(lambda x, w: depthwise_jax.depthwise_conv(x, w, activation="relu"), x, w)
    return y, *t(y)
x, w = jnp.ones((1, 6, 3)), jnp.ones((2, 3, 1))
pickle.dump(s.serialize(jax.jit(f).lower(x, w).compile()), open("program", "wb"))
"""
    load = """
y, dx, dw = s.deserialize_and_load(*pickle.load(open("program", "rb")))(jnp.ones((1, 6, 3)), jnp.ones((2, 3, 1)))
assert (y == 2).all() and (dw == 10).all() and (dx[:, 1:-1] == 4).all()
"""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        "XLA_FLAGS": QUICK_FLAGS,
        # XLA cannot save a program that it has read from JAX's cache of compiled programs.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    for code in (save, load):
        done = subprocess.run(
            [sys.executable, "-c", start + code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
