"""Initializers: Keras' distributions in Flax's form, functions of (key, shape, dtype).

An initializer with an integer seed ignores the key and draws the same numbers as Keras on its JAX backend, bit for bit.
An initializer without a seed draws from the key, like Flax's initializers.

Keras' names and JAX's own initializers (`jax.nn.initializers.lecun_normal`, `he_normal`, ...) count all C channels of a
depthwise kernel `(*window, C, M)` in its fans, though each output reads only one. Their values are too small by a
factor of sqrt(C). For Flax's Conv, with its kernel `(*window, 1, C*M)`, they are right. Use
`LecunNormal(fan="window")`, `HeNormal(fan="window")` and the like. A layer warns about JAX's initializers once; Keras'
names ask for Keras' numbers.
"""

import functools
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from depthwise_jax._core.registry import Registry

__all__ = [
    "STFT",
    "Constant",
    "GlorotNormal",
    "GlorotUniform",
    "HeNormal",
    "HeUniform",
    "Identity",
    "LecunNormal",
    "LecunUniform",
    "Ones",
    "Orthogonal",
    "RandomNormal",
    "RandomUniform",
    "TruncatedNormal",
    "VarianceScaling",
    "Zeros",
    "get",
    "serialize",
]

Shape = tuple[int, ...]
Initializer = Callable[[Array, Shape, Any], Array]


class _Configured:
    """A frozen dataclass whose fields are the keys of Keras' configuration, with Python's own numbers."""

    def __post_init__(self) -> None:
        for entry in fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, entry.name)
            if entry.name == "seed":
                _check_seed(value)
            elif isinstance(entry.default, int | float):
                _check_number(entry.name, value)
            if isinstance(value, np.generic):
                object.__setattr__(self, entry.name, value.item())

    def get_config(self, window_axes: tuple[int, ...] = ()) -> dict[str, Any]:
        """Keras' configuration, for a parameter whose window lies along `window_axes`."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Zeros(_Configured):
    """All 0."""

    def __call__(self, key: Array, shape: Shape, dtype: Any = jnp.float32) -> Array:
        return jnp.zeros(shape, dtype)


@dataclass(frozen=True)
class Ones(_Configured):
    """All 1."""

    def __call__(self, key: Array, shape: Shape, dtype: Any = jnp.float32) -> Array:
        return jnp.ones(shape, dtype)


@dataclass(frozen=True)
class Constant(_Configured):
    """All `value`.

    Args:
        value: a finite number; any other value raises ValueError.
    """

    value: float | int | bool = 0.0

    def __call__(self, key: Array, shape: Shape, dtype: Any = jnp.float32) -> Array:
        return jnp.full(shape, self.value, dtype)


@dataclass(frozen=True)
class Identity(_Configured):
    """`gain` times the identity matrix; any shape but a matrix's raises ValueError.

    Args:
        gain: a finite number; any other value raises ValueError.
    """

    gain: float = 1.0

    def __call__(self, key: Array, shape: Shape, dtype: Any = jnp.float32) -> Array:
        if len(shape) != 2:
            raise ValueError(f"Identity initializes matrices; got the shape {shape}")
        return self.gain * jnp.eye(*shape, dtype=dtype)


@dataclass(frozen=True)
class RandomNormal(_Configured):
    """Normal with `mean` and `stddev`.

    Args:
        mean, stddev: finite numbers; any other value raises ValueError.
        seed: None to draw from the key, or Keras' seed, an integer in `[0, 2**32)`.
    """

    mean: float = 0.0
    stddev: float = 0.05
    seed: int | None = None

    def __call__(self, key: Array, shape: Shape, dtype: Any = jnp.float32) -> Array:
        return jax.random.normal(_key(self.seed, key), shape, dtype) * self.stddev + self.mean


@dataclass(frozen=True)
class RandomUniform(_Configured):
    """Uniform in `[minval, maxval)`.

    Args:
        minval, maxval: finite numbers; any other value raises ValueError.
        seed: None to draw from the key, or Keras' seed, an integer in `[0, 2**32)`.
    """

    minval: float = -0.05
    maxval: float = 0.05
    seed: int | None = None

    def __call__(self, key: Array, shape: Shape, dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(_key(self.seed, key), shape, dtype, self.minval, self.maxval)


@dataclass(frozen=True)
class TruncatedNormal(_Configured):
    """Normal with `mean` and `stddev`, cut off at two standard deviations.

    Args:
        mean: a finite number; any other value raises ValueError.
        stddev: the standard deviation before the cut, a finite number; any other value raises ValueError.
        seed: None to draw from the key, or Keras' seed, an integer in `[0, 2**32)`.
    """

    mean: float = 0.0
    stddev: float = 0.05
    seed: int | None = None

    def __call__(self, key: Array, shape: Shape, dtype: Any = jnp.float32) -> Array:
        return jax.random.truncated_normal(_key(self.seed, key), -2.0, 2.0, shape, dtype) * self.stddev + self.mean


@dataclass(frozen=True)
class Orthogonal(_Configured):
    """`gain` times an orthogonal matrix of shape `(prod(shape[:-1]), shape[-1])`, reshaped (Saxe et al., 2014).

    For a depthwise kernel with depth_multiplier 1 this makes the whole kernel one unit vector, not each filter.

    Args:
        gain: a finite number; any other value raises ValueError.
        seed: None to draw from the key, or Keras' seed, an integer in `[0, 2**32)`.
    """

    gain: float = 1.0
    seed: int | None = None

    def __call__(self, key: Array, shape: Shape, dtype: Any = jnp.float32) -> Array:
        if len(shape) < 2:
            raise ValueError(f"Orthogonal initializes arrays of two axes or more; got the shape {shape}")
        return jax.nn.initializers.orthogonal(self.gain)(_key(self.seed, key), shape, dtype)


@dataclass(frozen=True)
class STFT(_Configured):
    """The kernel `(T, 1, F//2 + 1)` of a short-time Fourier transform: one side of the spectrum, windowed.

    Args:
        side: "real" or "imag", the part of the spectrum.
        window: a name of scipy.signal.windows, or None.
        scaling: "density" (divided by the window's 2-norm), "spectrum" (by its 1-norm) or None.
        periodic: whether the window is periodic rather than symmetric.

    Raises:
        ValueError: the side, scaling or window is none of these, or the shape has another form.
    """

    side: str = "real"
    window: str | None = "hann"
    scaling: str | None = "density"
    periodic: bool = False

    def __post_init__(self) -> None:
        if self.side not in ("real", "imag"):
            raise ValueError(f"side must be 'real' or 'imag'; got {self.side!r}")
        if self.scaling not in ("density", "spectrum", None):
            raise ValueError(f"scaling must be 'density', 'spectrum' or None; got {self.scaling!r}")
        if not isinstance(self.window, str | None):
            raise ValueError(f"window must be a name of scipy.signal.windows or None; got {self.window!r}")
        if self.window is not None:
            self._taper(1)

    def __call__(self, key: Array, shape: Shape, dtype: Any = jnp.float32) -> Array:
        if len(shape) != 3 or shape[1] != 1:
            raise ValueError(f"STFT initializes the shape (frame_length, 1, frequencies); got {shape}")
        length, _, frequencies = shape
        angle = -np.pi * np.arange(length)[:, None, None] * np.arange(frequencies) / (frequencies - 1)
        kernel = np.cos(angle) if self.side == "real" else np.sin(angle)
        if self.window is not None:
            taper = self._taper(length)
            norm = {"density": 2, "spectrum": 1, None: None}[self.scaling]
            kernel = kernel * taper[:, None, None] / (1 if norm is None else np.linalg.norm(taper, norm))
        return jnp.asarray(kernel, dtype)

    def _taper(self, length: int) -> np.ndarray:
        from scipy.signal import get_window  # here, because importing it takes longer than everything else

        return np.asarray(get_window(self.window, length, fftbins=self.periodic))


@dataclass(frozen=True, kw_only=True)
class _Fans(_Configured):
    """How a variance-scaling initializer counts a kernel's fan-in and fan-out.

    By default, as in Keras, fan_in = window*C and fan_out = window*M for a kernel (*window, C, M), though each output
    of a depthwise convolution reads only `window` inputs. `fan="window"` counts those: fan_in = window and
    fan_out = window*M. `input_axes` and `output_axes` name the axes whose sizes are multiplied.
    """

    input_axes: tuple[int, ...] | None = None
    output_axes: tuple[int, ...] | None = None
    fan: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("input_axes", "output_axes"):
            axes = getattr(self, name)
            if axes is not None:
                object.__setattr__(self, name, tuple(int(axis) for axis in axes))
        if self.fan not in (None, "window"):
            raise ValueError(f"fan must be None or 'window'; got {self.fan!r}")
        if self.fan and not (self.input_axes is None and self.output_axes is None):
            raise ValueError("input_axes and output_axes must be None with fan='window', which replaces them")

    def get_config(self, window_axes: tuple[int, ...] = ()) -> dict[str, Any]:
        config = super().get_config()
        if config.pop("fan"):
            config |= {"input_axes": window_axes, "output_axes": (*window_axes, len(window_axes) + 1)}
        axes = {name: list(config[name]) for name in ("input_axes", "output_axes") if config[name] is not None}
        return config | axes

    def fans(self, shape: Shape) -> tuple[int, int]:
        """(fan_in, fan_out) of a parameter of this shape."""
        if self.fan:
            if len(shape) < 3:
                raise ValueError(f"fan='window' needs a kernel of shape (*window, C, M); got the shape {shape}")
            window = math.prod(shape[:-2])
            return window, window * shape[-1]
        if self.input_axes is not None and self.output_axes is not None:
            return math.prod(shape[axis] for axis in self.input_axes), math.prod(
                shape[axis] for axis in self.output_axes
            )
        if len(shape) < 2:
            return math.prod(shape), math.prod(shape)
        window = math.prod(shape[:-2])
        return window * shape[-2], window * shape[-1]

    def _draw(self, key: Array, shape: Shape, dtype: Any, scale: float, mode: str, distribution: str) -> Array:
        fan_in, fan_out = self.fans(shape)
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]
        variance = scale / max(1.0, fan)
        if distribution == "truncated_normal":
            # The standard deviation of a standard normal cut off at -2 and 2.
            stddev = math.sqrt(variance) / 0.87962566103423978
            return jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype) * stddev
        if distribution == "untruncated_normal":
            return jax.random.normal(key, shape, dtype) * math.sqrt(variance)
        limit = math.sqrt(3.0 * variance)
        return jax.random.uniform(key, shape, dtype, -limit, limit)


_MODES = ("fan_in", "fan_out", "fan_avg")
_DISTRIBUTIONS = ("truncated_normal", "untruncated_normal", "uniform")


@dataclass(frozen=True)
class VarianceScaling(_Fans):
    """Mean 0 and variance `scale / fan`, where `mode` selects the fan and `distribution` the distribution.

    For a kernel `(*window, C, M)`, Keras' fans are `fan_in = prod(window)*C` and `fan_out = prod(window)*M`, though
    each output of a depthwise convolution reads only `prod(window)` numbers; `fan="window"` counts these. The Glorot,
    He and LeCun initializers take `fan`, `input_axes` and `output_axes` too.

    Args:
        scale: positive.
        mode: "fan_in", "fan_out" or "fan_avg", their mean.
        distribution: "truncated_normal" (or "normal"), "untruncated_normal" or "uniform".
        seed: None to draw from the key, or Keras' seed, an integer in `[0, 2**32)`.
        input_axes, output_axes: the axes whose sizes are multiplied for the fans, in place of Keras' axes.
        fan: "window" for `fan_in = prod(window)` and `fan_out = prod(window)*M`; None for Keras'.

    Raises:
        ValueError: an argument is none of these, or "window" is combined with axes.

    Examples:
        >>> import jax
        >>> HeNormal(fan="window").fans((3, 3, 64, 2))
        (9, 18)
        >>> HeNormal()(jax.random.key(0), (3, 3, 64, 2)).shape
        (3, 3, 64, 2)
    """

    scale: float = 1.0
    mode: str = "fan_in"
    distribution: str = "truncated_normal"
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale > 0:
            raise ValueError(f"scale must be positive; got {self.scale!r}")
        if self.mode not in _MODES:
            raise ValueError(f"mode must be one of {_MODES}; got {self.mode!r}")
        distribution = str(self.distribution).lower()
        object.__setattr__(self, "distribution", "truncated_normal" if distribution == "normal" else distribution)
        if self.distribution not in _DISTRIBUTIONS:
            raise ValueError(f"distribution must be one of {_DISTRIBUTIONS}; got {self.distribution!r}")

    def __call__(self, key: Array, shape: Shape, dtype: Any = jnp.float32) -> Array:
        return self._draw(_key(self.seed, key), shape, dtype, self.scale, self.mode, self.distribution)


@dataclass(frozen=True)
class _Named(_Fans):
    """A VarianceScaling with its own name."""

    _scaling: ClassVar[tuple[float, str, str]]

    seed: int | None = None

    def __call__(self, key: Array, shape: Shape, dtype: Any = jnp.float32) -> Array:
        return self._draw(_key(self.seed, key), shape, dtype, *self._scaling)


@dataclass(frozen=True)
class GlorotUniform(_Named):
    """Uniform in +-`sqrt(6 / (fan_in + fan_out))` (Glorot and Bengio, 2010).

    Args:
        input_axes, output_axes, fan: as in `VarianceScaling`.
        seed: None to draw from the key, or Keras' seed, an integer in `[0, 2**32)`.
    """

    _scaling = (1.0, "fan_avg", "uniform")


@dataclass(frozen=True)
class GlorotNormal(_Named):
    """Truncated normal with variance `2 / (fan_in + fan_out)` (Glorot and Bengio, 2010).

    Args:
        input_axes, output_axes, fan: as in `VarianceScaling`.
        seed: None to draw from the key, or Keras' seed, an integer in `[0, 2**32)`.
    """

    _scaling = (1.0, "fan_avg", "truncated_normal")


@dataclass(frozen=True)
class HeUniform(_Named):
    """Uniform in +-`sqrt(6 / fan_in)` (He et al., 2015).

    Args:
        input_axes, output_axes, fan: as in `VarianceScaling`.
        seed: None to draw from the key, or Keras' seed, an integer in `[0, 2**32)`.
    """

    _scaling = (2.0, "fan_in", "uniform")


@dataclass(frozen=True)
class HeNormal(_Named):
    """Truncated normal with variance `2 / fan_in` (He et al., 2015).

    Args:
        input_axes, output_axes, fan: as in `VarianceScaling`.
        seed: None to draw from the key, or Keras' seed, an integer in `[0, 2**32)`.
    """

    _scaling = (2.0, "fan_in", "truncated_normal")


@dataclass(frozen=True)
class LecunUniform(_Named):
    """Uniform in +-`sqrt(3 / fan_in)` (LeCun et al., 1998).

    Args:
        input_axes, output_axes, fan: as in `VarianceScaling`.
        seed: None to draw from the key, or Keras' seed, an integer in `[0, 2**32)`.
    """

    _scaling = (1.0, "fan_in", "uniform")


@dataclass(frozen=True)
class LecunNormal(_Named):
    """Truncated normal with variance `1 / fan_in` (LeCun et al., 1998).

    Args:
        input_axes, output_axes, fan: as in `VarianceScaling`.
        seed: None to draw from the key, or Keras' seed, an integer in `[0, 2**32)`.
    """

    _scaling = (1.0, "fan_in", "truncated_normal")


@dataclass(frozen=True)
class _Given:
    """An array as an initializer."""

    array: Any = field(compare=False)

    def __call__(self, key: Array, shape: Shape, dtype: Any = jnp.float32) -> Array:
        if tuple(self.array.shape) != tuple(shape):
            raise ValueError(f"expected an array of shape {tuple(shape)}; got one of shape {tuple(self.array.shape)}")
        return jnp.asarray(self.array, dtype)


# Keras also accepts the name of the abstract class "Initializer", which cannot initialize anything.
_REGISTRY = Registry(
    "initializer",
    "keras.initializers",
    {
        Zeros: ("Zeros", "zeros", "zero"),
        Ones: ("Ones", "ones", "one"),
        Constant: ("Constant", "constant"),
        Identity: ("Identity", "identity", "IdentityInitializer"),
        RandomNormal: ("RandomNormal", "random_normal", "normal"),
        RandomUniform: ("RandomUniform", "random_uniform", "uniform"),
        TruncatedNormal: ("TruncatedNormal", "truncated_normal"),
        VarianceScaling: ("VarianceScaling", "variance_scaling"),
        GlorotUniform: ("GlorotUniform", "glorot_uniform"),
        GlorotNormal: ("GlorotNormal", "glorot_normal"),
        HeUniform: ("HeUniform", "he_uniform"),
        HeNormal: ("HeNormal", "he_normal"),
        LecunUniform: ("LecunUniform", "lecun_uniform"),
        LecunNormal: ("LecunNormal", "lecun_normal"),
        Orthogonal: ("Orthogonal", "orthogonal", "OrthogonalInitializer"),
        STFT: ("STFT", "stft", "STFTInitializer"),
    },
)


def get(identifier: Any, argument: str = "initializer") -> Initializer | None:
    """Resolves an initializer.

    Args:
        identifier: None, one of Keras' names, Keras' configuration, a class, an array (the parameter's value, whose
            shape must be the parameter's) or any callable of (key, shape, dtype).
        argument: the argument's name in messages.

    Raises:
        ValueError: an unknown name or configuration.
        TypeError: the identifier is none of these, or a callable that does not take (key, shape, dtype).
    """
    if isinstance(identifier, np.ndarray | np.generic | Array):
        return _Given(identifier)
    initializer = _REGISTRY.get(identifier, argument)
    if initializer is not None and initializer is identifier:
        try:
            inspect.signature(initializer).bind("key", "shape", "dtype")
        except TypeError as error:
            raise TypeError(
                f"{argument} must take (key, shape, dtype), like Flax's initializers; {identifier!r}: {error}"
            ) from None
        except ValueError:  # no signature to check
            pass
    return initializer


def warn_of_fans(initializer: Any) -> None:
    """Warns once about a JAX or Flax initializer whose fan_in counts all channels of a depthwise kernel.

    Args:
        initializer: a layer's depthwise initializer.
    """
    code = getattr(initializer, "__code__", None)
    if code is None or getattr(initializer, "__qualname__", "") != "variance_scaling.<locals>.init":
        return
    if not str(initializer.__module__).startswith("jax."):
        return
    given = inspect.getclosurevars(initializer).nonlocals
    if given.get("mode") == "fan_in" and given.get("in_axis") == -2:
        _warn_of_fans_once()


@functools.cache
def _warn_of_fans_once() -> None:
    warnings.warn(
        "an initializer of jax.nn.initializers counts all C channels of a depthwise kernel (*window, C, M) in its "
        "fan_in, though each output reads one, so its values are sqrt(C) too small; use depthwise_jax.initializers, "
        "LecunNormal(fan='window') for lecun_normal and HeNormal(fan='window') for he_normal",
        stacklevel=2,
    )


def serialize(
    initializer: Initializer | None, argument: str = "initializer", window_axes: tuple[int, ...] = ()
) -> dict[str, Any] | None:
    """Keras' configuration of a resolved initializer, for a parameter whose window lies along `window_axes`.

    Args:
        initializer: what `get` returned.
        argument: the argument's name in messages.
        window_axes: the axes of the parameter that `fan="window"` counts.

    Raises:
        ValueError: it is not one of this module's.
    """
    return _REGISTRY.serialize(initializer, argument, window_axes)


def _key(seed: int | None, key: Array) -> Array:
    """Keras' key for a seed, for any default kind of key; without a seed, the given key."""
    if seed is None:
        return key
    return jax.random.wrap_key_data(jnp.array([seed, 0], jnp.uint32), impl="threefry2x32")


def _check_seed(seed: Any) -> None:
    if seed is None or (isinstance(seed, int | np.integer) and not isinstance(seed, bool) and 0 <= seed < 2**32):
        return
    raise ValueError(f"seed must be None or an integer in [0, 2**32); got {seed!r}")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, int | float | np.number | np.bool_) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number; got {value!r}")
