"""The contestants: a layer's maps by this package, XLA, Flax, Keras, PyTorch, TensorFlow and ONNX Runtime.

A contestant makes a Task from a layer, a direction and a dtype. Layouts are converted and programs compiled before any
time is taken; the work that a library must do on each call (a pass for a padding that it lacks, a wait) is included.

For JAX a chain (chains.py) is one compiled program, for PyTorch a Python loop that keeps one result at a time, and for
TensorFlow and ONNX Runtime CHAIN calls in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import chains, environment
from benchmarks.chains import CHAIN, COPIES, PAIRS, TINY
from benchmarks.optional import library
from benchmarks.timing import finished
from benchmarks.work import Array, Operands, pads
from depthwise_jax import depthwise_conv, explain
from depthwise_jax.lowering import Implementation
from workloads.workload import Workload


class UnsupportedError(Exception):
    """The peer does not compute such a call, or is not timed on it; the message says why."""


class MissingError(Exception):
    """The peer is not installed."""


@dataclass(frozen=True)
class Task:
    """A call to time.

    Attributes:
        run: makes it once and returns its finished result.
        read: converts the result from the library's layout to (*batch, *spatial, channels), or (*window, C, M).
    """

    run: Callable[[], Any]
    read: Callable[[Any], Array]


Contestant = Callable[[Workload, Operands, str, str, bool], Task]
# x, w, b or None, whether relu follows
Forward = Callable[[Any, Any, Any, bool], Any]


def _ours(implementation: Implementation | None) -> Callable[[Workload], Forward]:
    def make(case: Workload) -> Forward:
        conv = case.conv(implementation)
        return lambda x, w, b, relu: conv(x, w, b, activation="relu" if relu else None)

    return make


def _finished(y: Any, b: Any, relu: bool) -> Any:
    y = y if b is None else y + b
    return jax.nn.relu(y) if relu else y


def _lax(case: Workload) -> Forward:
    oracle, spatial = case.resolved, "DHW"[3 - case.resolved.rank :]
    layouts = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")

    def conv(x: Any, w: Any, b: Any, relu: bool) -> Any:
        kernel = w.reshape(*oracle.window, 1, oracle.channels * oracle.multiplier)
        y = lax.conv_general_dilated(
            x,
            kernel,
            oracle.strides,
            pads(case),
            rhs_dilation=oracle.dilation,
            dimension_numbers=layouts,
            feature_group_count=oracle.channels,
        )
        return _finished(y, b, relu)

    return conv


def _flax(case: Workload) -> Forward:
    oracle = case.resolved
    features = oracle.channels * oracle.multiplier

    def conv(x: Any, w: Any, b: Any, relu: bool) -> Any:
        x = jnp.moveaxis(x, oracle.channel_axis, -1)  # it supports only channels last
        layer = nn.Conv(
            features,
            oracle.window,
            oracle.strides,
            pads(case),
            kernel_dilation=oracle.dilation,
            feature_group_count=oracle.channels,
            use_bias=b is not None,
            dtype=x.dtype,
        )
        params = {"kernel": w.reshape(*oracle.window, 1, features)} | ({} if b is None else {"bias": b})
        y: Any = layer.apply({"params": params}, x)
        return jnp.moveaxis(jax.nn.relu(y) if relu else y, -1, oracle.channel_axis)

    return conv


def _keras(case: Workload) -> Forward:
    keras = _required("keras")
    if keras.backend.backend() != "jax":
        raise MissingError(f"Keras runs on {keras.backend.backend()}: set KERAS_BACKEND=jax")
    strides = case.resolved.strides[0]

    def conv(x: Any, w: Any, b: Any, relu: bool) -> Any:
        x = keras.ops.pad(x, [(0, 0), *pads(case), (0, 0)])
        y = keras.ops.depthwise_conv(x, w, strides=strides, padding="valid", data_format="channels_last")
        y = y if b is None else keras.ops.add(y, b)
        return keras.ops.relu(y) if relu else y

    return conv


# Implementations of a convolution that JAX traces, by name; "ours" is the choice of depthwise_conv.
CONVOLUTIONS: dict[str, Callable[[Workload], Forward]] = {
    "ours": _ours(None),
    "native": _ours("native"),
    "taps": _ours("taps"),
    "conv": _ours("conv"),
    "lax": _lax,
    "flax": _flax,
    "keras": _keras,
}


def map_in_jax(conv: Forward, case: Workload, direction: str, dtype: str) -> tuple[Callable[..., Any], Sequence[str]]:
    """A map of a convolution, and the names of its operands."""
    x, w = (jax.ShapeDtypeStruct(shape, dtype) for shape in (case.x, case.kernel))
    maps: dict[str, tuple[Callable[..., Any], Sequence[str]]] = {
        "forward": (lambda x, w: conv(x, w, None, False), "xw"),
        "bias_relu": (lambda x, w, b: conv(x, w, b, True), "xwb"),
        "dx": (lambda g, w: jax.linear_transpose(lambda x: conv(x, w, None, False), x)(g)[0], "gw"),
        "dw": (lambda x, g: jax.linear_transpose(lambda w: conv(x, w, None, False), w)(g)[0], "xg"),
    }
    return maps[direction]


def _in_jax(name: str, implementation: Implementation | None = "conv") -> Contestant:
    """A contestant from CONVOLUTIONS; `implementation` is as for explain()."""

    def contestant(case: Workload, operands: Operands, direction: str, dtype: str, chained: bool) -> Task:
        function, names = map_in_jax(CONVOLUTIONS[name](case), case, direction, dtype)
        arguments = [jnp.asarray(operands[name], dtype) for name in names]
        if not chained:
            return Task(chains.single(function, *arguments), np.asarray)
        x, w = (jax.ShapeDtypeStruct(shape, dtype) for shape in (case.x, case.kernel))
        choice = explain(x, w, **case.geometry, implementation=implementation)
        lowering = {"dx": choice.input_grad, "dw": choice.kernel_grad}.get(direction, choice.forward).lowering
        return Task(chains.chain(function, direction, *arguments, looped=lowering == "taps"), np.asarray)

    return contestant


def latency(implementation: Implementation | None) -> dict[str, Callable[[], Any]]:
    """The smallest useful call, forward on (1, 7, 7, 64) with a window of 3, in chains of CHAIN and of 8 * CHAIN."""
    x, w = jnp.ones((1, 7, 7, 64)), jnp.ones((3, 3, 64, 1))

    def conv(x: Any, w: Any) -> Any:
        return depthwise_conv(x, w, padding="same", implementation=implementation)

    lengths = {"short": CHAIN, "long": 8 * CHAIN}
    return {name: finished(chains.unrolled(conv, length), x, w) for name, length in lengths.items()}


def _required(name: str) -> Any:
    module = library(name)
    if module is None:
        raise MissingError(f"{name} is not installed")
    return module


def _two(values: Any, filling: Any) -> tuple[Any, Any]:
    """The values of two spatial axes; one axis becomes the second of two."""
    values = tuple(values)
    if len(values) > 2:
        raise UnsupportedError("three spatial axes")
    return (filling,) * (2 - len(values)) + values  # pyright: ignore[reportReturnType]


def _images(array: Array) -> Array:
    """(N, H, W, C) of an x or y of one or two spatial axes."""
    return array.reshape(array.shape[0], *_two(array.shape[1:-1], 1), array.shape[-1])


def _filters(w: Array) -> Array:
    """(H, W, C, M) of a kernel of one or two window axes."""
    return w.reshape(*_two(w.shape[:-2], 1), *w.shape[-2:])


class TorchMaps:
    """The maps of a layer of one or two spatial axes in PyTorch, of x (N, C, H, W) and kernels (C*M, 1, h, w).

    PyTorch pads equally on both sides. Without strides the surplus outputs are sliced off, which moves no data; the
    gradients read an input that is padded beforehand, as the forward pass would have saved it.

    Args:
        torch: the library.
        case: the layer.

    Raises:
        UnsupportedError: PyTorch lacks such a call.
    """

    def __init__(self, torch: Any, case: Workload) -> None:
        resolved = case.resolved
        self._torch, self._channels = torch, resolved.channels
        self._strides, self._dilation = _two(resolved.strides, 1), _two(resolved.dilation, 1)
        self._padding, out = _two(pads(case), (0, 0)), _two(resolved.out, 1)
        self._symmetric = tuple(max(pair) for pair in self._padding)
        self._uneven = any(low != high for low, high in self._padding)
        if self._uneven and self._strides != (1, 1):
            raise UnsupportedError("strides and a padding that differs between the sides")
        begins = [amount - low for amount, (low, _) in zip(self._symmetric, self._padding, strict=True)]
        self._out = tuple(slice(begin, begin + n) for begin, n in zip(begins, out, strict=True))
        spatial = zip(self._padding, _two(resolved.spatial, 1), strict=True)
        self._inside = tuple(slice(low, low + n) for (low, _), n in spatial)

    def saved(self, x: Any, layout: Any) -> Any:
        """The gradients' input, in a memory format."""
        if not self._uneven:
            return x
        (top, bottom), (left, right) = self._padding
        padded = self._torch.nn.functional.pad(x, (left, right, top, bottom))
        return padded.contiguous(memory_format=layout)

    def forward(self, x: Any, w: Any, bias: Any = None) -> Any:
        """y."""
        conv = self._torch.nn.functional.conv2d
        y = conv(x, w, bias, self._strides, self._symmetric, self._dilation, self._channels)
        return y[:, :, self._out[0], self._out[1]] if self._uneven else y

    def dx(self, g: Any, w: Any, saved: Any) -> Any:
        """The gradient of x."""
        dx = self._gradient(g, w, saved, 0)
        return dx[:, :, self._inside[0], self._inside[1]] if self._uneven else dx

    def dw(self, saved: Any, g: Any, w: Any) -> Any:
        """The gradient of the kernel."""
        return self._gradient(g, w, saved, 1)

    def _gradient(self, g: Any, w: Any, saved: Any, which: int) -> Any:
        padding = (0, 0) if self._uneven else self._symmetric
        asked = [which == 0, which == 1, False]
        backward = self._torch.ops.aten.convolution_backward
        return backward(
            g, saved, w, None, self._strides, padding, self._dilation, False, [0, 0], self._channels, asked
        )[which]


def _torch(channels_last: bool) -> Contestant:
    def contestant(case: Workload, operands: Operands, direction: str, dtype: str, chained: bool) -> Task:
        torch = _required("torch")
        gpu = jax.default_backend() == "gpu"
        if gpu and not torch.cuda.is_available():
            raise MissingError("this PyTorch has no CUDA")
        layout = torch.channels_last if channels_last else torch.contiguous_format

        def tensor(array: Array) -> Any:
            result = torch.from_numpy(np.ascontiguousarray(array)).to(getattr(torch, dtype))
            return result.to("cuda" if gpu else "cpu").contiguous(memory_format=layout)

        oracle = case.resolved
        maps = TorchMaps(torch, case)
        x, g = (tensor(np.moveaxis(_images(operands[name]), -1, 1)) for name in ("x", "g"))
        window = _filters(operands["w"])
        w = tensor(np.moveaxis(window.reshape(*window.shape[:2], 1, -1), (2, 3), (1, 0)))
        b = torch.from_numpy(operands["b"]).to(w)
        saved = maps.saved(x, layout)
        functions: dict[str, Callable[[Any, Any], Any]] = {
            "forward": lambda w, g: maps.forward(x, w),
            "bias_relu": lambda w, g: torch.relu_(maps.forward(x, w, b)),
            "dx": lambda w, g: maps.dx(g, w, saved),
            "dw": lambda w, g: maps.dw(saved, g, w),
        }
        function = functions[direction]

        def element(array: Any) -> Any:
            return array.as_strided((1,), (1,))

        def run() -> Any:
            with torch.inference_mode():
                result = function(w, g)
                if gpu:
                    torch.cuda.synchronize()
            return result

        copies = [(saved.clone(), g.clone()) for _ in range(COPIES)] if direction == "dw" and chained else []

        def chain() -> Any:
            kernel = w
            result = None
            with torch.inference_mode():
                for i, j in PAIRS:
                    result = None  # its memory serves the next one
                    if direction == "dw":
                        result = maps.dw(copies[i][0], copies[j][1], w)
                    else:
                        result = function(kernel, g)
                        kernel = torch.add(w, element(result), alpha=TINY)
                if gpu:
                    torch.cuda.synchronize()
            return result

        def read(result: Any) -> Array:
            array = result.float().cpu().numpy()
            if direction == "dw":
                return np.moveaxis(array, (0, 1), (3, 2)).reshape(case.kernel)
            return np.moveaxis(array, 1, -1).reshape(case.x if direction == "dx" else oracle.y_shape)

        return Task(chain if chained else run, read)

    return contestant


def _in_turn(run: Callable[[], Any]) -> Callable[[], Any]:
    def chain() -> Any:
        for _ in range(CHAIN - 1):
            run()
        return run()

    return chain


def _tensorflow(case: Workload, operands: Operands, direction: str, dtype: str, chained: bool) -> Task:
    tf = _required("tensorflow")
    if dtype != "float32":
        raise UnsupportedError("timed in float32 only")
    if not tf.config.threading.get_intra_op_parallelism_threads():
        tf.config.threading.set_intra_op_parallelism_threads(environment.processors())
    oracle = case.resolved
    strides = _two(oracle.strides, 1)
    if strides[0] != strides[1] or set(oracle.dilation) != {1}:
        raise UnsupportedError("strides that differ, or dilation")
    x, g = (tf.constant(_images(operands[name])) for name in ("x", "g"))
    w, b = tf.constant(_filters(operands["w"])), tf.constant(operands["b"])
    padding = [(0, 0), *_two(pads(case), (0, 0)), (0, 0)]
    options = {
        "strides": (1, *strides, 1),
        "padding": "EXPLICIT",
        "explicit_paddings": [n for pair in padding for n in pair],
    }
    raw = tf.raw_ops
    functions: dict[str, Callable[[], Any]] = {
        "forward": lambda: raw.DepthwiseConv2dNative(input=x, filter=w, **options),
        "bias_relu": lambda: tf.nn.relu(tf.nn.bias_add(raw.DepthwiseConv2dNative(input=x, filter=w, **options), b)),
        "dx": lambda: raw.DepthwiseConv2dNativeBackpropInput(input_sizes=x.shape, filter=w, out_backprop=g, **options),
        "dw": lambda: raw.DepthwiseConv2dNativeBackpropFilter(input=x, filter_sizes=w.shape, out_backprop=g, **options),
    }
    shape = {"dx": case.x, "dw": case.kernel}.get(direction, oracle.y_shape)
    run = functions[direction]
    return Task(_in_turn(run) if chained else run, lambda y: y.numpy().reshape(shape))


def _onnxruntime(case: Workload, operands: Operands, direction: str, dtype: str, chained: bool) -> Task:
    if direction not in ("forward", "bias_relu") or dtype != "float32":
        raise UnsupportedError("timed for forward passes in float32 only")
    onnx, runtime = _required("onnx"), _required("onnxruntime")
    oracle = case.resolved
    window = _filters(operands["w"])
    x = np.ascontiguousarray(np.moveaxis(_images(operands["x"]), -1, 1))
    filters = np.ascontiguousarray(np.moveaxis(window.reshape(*window.shape[:2], 1, -1), (2, 3), (1, 0)))
    shape = (x.shape[0], oracle.channels * oracle.multiplier, *_two(oracle.out, 1))
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    lows, highs = zip(*_two(pads(case), (0, 0)), strict=True)
    relu = direction == "bias_relu"
    attributes = {
        "group": oracle.channels,
        "kernel_shape": filters.shape[2:],
        "pads": [*lows, *highs],
        "strides": _two(oracle.strides, 1),
        "dilations": _two(oracle.dilation, 1),
    }
    nodes = [helper.make_node("Conv", ["x", "w", *(["b"] if relu else [])], ["c" if relu else "y"], **attributes)]
    constants = {"w": filters} | ({"b": operands["b"]} if relu else {})
    if relu:
        nodes.append(helper.make_node("Relu", ["c"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", floats, x.shape)],
        [helper.make_tensor_value_info("y", floats, shape)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = environment.processors()
    session = runtime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    y = np.empty(shape, np.float32)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", runtime.OrtValue.ortvalue_from_numpy(x))
    output = runtime.OrtValue.ortvalue_from_numpy(y)
    binding.bind_ortvalue_output("y", output)

    def run() -> Any:
        session.run_with_iobinding(binding)
        return output

    return Task(_in_turn(run) if chained else run, lambda y: np.moveaxis(y.numpy(), 1, -1).reshape(oracle.y_shape))


CONTESTANTS: dict[str, Contestant] = {
    "ours": _in_jax("ours", None),
    "native": _in_jax("native", "native"),
    "taps": _in_jax("taps", "taps"),
    "torch_channels_last": _torch(channels_last=True),
    "torch_contiguous": _torch(channels_last=False),
    "tensorflow": _tensorflow,
    "onnxruntime": _onnxruntime,
    "lax": _in_jax("lax"),
    "flax": _in_jax("flax"),
    "keras": _in_jax("keras"),
}
# The default contestants, on CPU and on GPU.
DEFAULT = {
    "cpu": tuple(name for name in CONTESTANTS if name not in ("native", "taps")),
    "gpu": ("ours", "taps", "lax", "torch_channels_last", "torch_contiguous"),
}
