"""Resolves a name, a Keras configuration or an object into one callable, and back into Keras' configuration.

Only the entries of a registry are ever looked up. A configuration that names anything else (another module, a lambda,
an unknown class) is refused by name; nothing is imported, evaluated or called for it.
"""

import difflib
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from depthwise_jax._core.dtypes import is_array

_CONFIG_KEYS = frozenset({"module", "class_name", "config", "registered_name", "build_config", "shared_object_id"})


# Nested containers in a configuration; Keras' own have at most 6. Deeper ones cannot even be shown.
_DEEPEST = 32


def check_depth(configuration: Any, argument: str) -> None:
    """Raises ValueError for a configuration that contains itself or nests deeper than any valid one."""
    level = [configuration]
    for _ in range(_DEEPEST):
        entries = (e for node in level for e in (node.values() if isinstance(node, Mapping) else node))
        level = list({id(e): e for e in entries if isinstance(e, Mapping | list | tuple)}.values())
        if not level:
            return
    raise ValueError(f"{argument} must be a configuration of at most {_DEEPEST} levels; got a deeper one")


# The most names that a message suggests.
_LIKELY = 4


def closest(name: str, valid: Iterable[str]) -> str:
    """The valid names most similar to `name`, for the end of an error message; all of them if none is similar."""
    by_lower = {candidate.lower(): candidate for candidate in valid}
    likely = [candidate for candidate in by_lower if len(name) > 1 and candidate.startswith(name.lower())]
    likely += difflib.get_close_matches(name.lower(), by_lower, n=_LIKELY, cutoff=0.5)
    likely = list(dict.fromkeys(likely))[:_LIKELY]
    if likely:
        return f"closest valid names: {', '.join(repr(by_lower[name]) for name in likely)}"
    return f"valid names: {', '.join(repr(candidate) for candidate in sorted(by_lower.values()))}"


class _Short(reprlib.Repr):
    """Shows only the length of long texts: a configuration may hold the code of a function."""

    def repr_str(self, x: str, level: int) -> str:
        return repr(x) if len(x) <= 80 else f"<text of {len(x)} characters>"

    def repr_bytes(self, x: bytes, level: int) -> str:
        return f"<{len(x)} bytes>"


_SHORT = _Short()
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = 8
_SHORT.maxother = 200


def shown(value: Any) -> str:
    """A value from outside, shortened for a message: an array by its dtype and shape."""
    if is_array(value):
        return f"an array {value.dtype}{list(value.shape)}"
    return _SHORT.repr(value)


def named(error: Exception, what: str) -> Exception:
    """An error that says first where it came up: a TypeError as that, any other as a ValueError.

    Not of the error's own class, which may be made of something else than a message, as JAX's errors of tracers are.
    """
    return (TypeError if isinstance(error, TypeError) else ValueError)(f"{what}: {error}")


class Registry:
    """The built-in callables of one kind, under Keras' names.

    The keyword arguments of a class in the registry are the keys of Keras' configuration. The class has a method
    `get_config(window_axes: tuple[int, ...]) -> dict`, where `window_axes` are the parameter's axes that
    `axis="window"` or `fan="window"` means.
    """

    def __init__(self, kind: str, module: str, names: Mapping[Callable[..., Any], tuple[str, ...]]):
        """Makes a registry.

        Args:
            kind: an entry's name in messages, such as "constraint".
            module: the public Keras module of the entries, such as "keras.constraints".
            names: each class or function with its names; the first one is its name in a configuration.
        """
        self.kind = kind
        self.module = module
        self._entries = {name: entry for entry, aliases in names.items() for name in aliases}
        self._first_names = {entry: aliases[0] for entry, aliases in names.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Every accepted name."""
        return tuple(self._entries)

    def get(self, identifier: Any, argument: str | None = None) -> Callable[..., Any] | None:
        """Resolves an argument's value.

        Args:
            identifier: None, a name, a Keras configuration `{"class_name": ..., "config": {...}}` (with or without
                `module` and `registered_name`), a class (it is instantiated without arguments) or any callable.
            argument: the argument's name in messages; the kind unless given.

        Returns:
            A callable, or None for None. A callable that is not a class is returned unchanged.

        Raises:
            ValueError: a name is unknown, or a configuration is not in this registry or invalid.
            TypeError: the identifier is anything else and not callable.
        """
        argument = argument or self.kind
        if isinstance(identifier, str):
            return self._make(identifier, {}, argument, identifier)
        if isinstance(identifier, Mapping):
            return self._from_config(identifier, argument)
        if isinstance(identifier, type):
            what = f"{argument}: cannot make the {self.kind} from the class {identifier.__name__}"
            return _call(identifier, {}, what)
        if identifier is None or callable(identifier):
            return identifier
        raise TypeError(
            f"{argument} must be None, a name, a configuration or a callable; got {shown(identifier)} "
            f"of type {type(identifier).__name__}"
        )

    def serialize(self, entry: Any, argument: str | None = None, window_axes: tuple[int, ...] = ()) -> Any:
        """Keras' configuration of a resolved entry: a dict for an object, its name for a function, None for None.

        Args:
            entry: what `get` returned.
            argument: the argument's name in messages; the kind unless given.
            window_axes: the axes of the parameter that "window" means, `(0, 1)` for a 2D depthwise kernel.

        Raises:
            ValueError: Keras has no name for `entry`, since it is not in this registry.
        """
        if entry is None:
            return None
        if type(entry) in self._first_names:
            return {
                "module": self.module,
                "class_name": self._first_names[type(entry)],
                "config": entry.get_config(window_axes),
                "registered_name": None,
            }
        try:
            return self._first_names[entry]
        except (KeyError, TypeError):  # TypeError: an unhashable callable
            raise ValueError(
                f"{argument or self.kind}: {entry!r} has no Keras configuration; only these have: "
                f"{', '.join(repr(name) for name in self._first_names.values())}"
            ) from None

    def _from_config(self, identifier: Mapping[Any, Any], argument: str) -> Callable[..., Any]:
        check_depth(identifier, argument)
        unknown = sorted(repr(key) for key in identifier if key not in _CONFIG_KEYS)
        if unknown or "class_name" not in identifier:
            raise ValueError(
                f"{argument}: a configuration must have the keys 'class_name' and 'config' (and may have 'module' and "
                f"'registered_name'); got {shown(dict(identifier))}"
            )
        module, name, config = (identifier.get(key) for key in ("module", "class_name", "config"))
        registered = identifier.get("registered_name")
        if name == "function" and module in (None, "builtins") and isinstance(config, str):
            module, name, config = None, config, {}  # how Keras writes a function
            registered = None if registered == "function" else registered
        if module not in (None, self.module):
            raise ValueError(
                f"{argument}: the configuration names the module {module!r}, which is never imported; "
                f"the module of a {self.kind} must be {self.module!r}"
            )
        if registered not in (None, name):
            raise ValueError(
                f"{argument}: the configuration names the registered object {registered!r}, which is not built in"
            )
        if not isinstance(name, str) or not isinstance(config, Mapping | None):
            raise ValueError(
                f"{argument}: 'class_name' must be a string and 'config' a dict; got {shown(name)} and {shown(config)}"
            )
        return self._make(name, dict(config or {}), argument, identifier)

    def _make(self, name: str, config: dict[str, Any], argument: str, identifier: Any) -> Callable[..., Any]:
        entry = self._entries.get(name)
        if entry is None:
            raise ValueError(f"{argument}: unknown {self.kind} {name!r}; {closest(name, self._entries)}")
        if isinstance(entry, type):
            return _call(entry, config, f"{argument}: cannot make the {self.kind} from {shown(identifier)}")
        if config:
            raise ValueError(f"{argument}: {self.kind} {name!r} takes no configuration; got {shown(config)}")
        return entry


def _call(cls: type, config: dict[str, Any], message: str) -> Callable[..., Any]:
    """`cls(**config)`, with a prefix for errors about its arguments."""
    try:
        made = cls(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{message}: {error}") from error
    if not callable(made):
        raise TypeError(f"{message}: its instances are not callable")
    return made
