"""Registry: a name, a Keras configuration or an object in, one callable out, and back into Keras' configuration.

Only what a registry lists is ever looked up. A configuration that names anything else (another module, a lambda, an
unknown class) is refused by name; nothing is imported, evaluated or called on its behalf.
"""

import difflib
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_CONFIG_KEYS = frozenset({"module", "class_name", "config", "registered_name", "build_config", "shared_object_id"})


# Containers inside each other in a configuration; Keras' own have 6 at most. Deeper ones cannot even be shown.
_DEEPEST = 32


def check_depth(configuration: Any, argument: str) -> None:
    """Raises ValueError for a configuration that holds itself or nests deeper than any that means something."""
    level = [configuration]
    for _ in range(_DEEPEST):
        entries = (e for node in level for e in (node.values() if isinstance(node, Mapping) else node))
        level = list({id(e): e for e in entries if isinstance(e, Mapping | list | tuple)}.values())
        if not level:
            return
    raise ValueError(f"{argument} must be a configuration of at most {_DEEPEST} levels; got a deeper one")


# Names that a message suggests, at most.
_LIKELY = 4


def closest(name: str, valid: Iterable[str]) -> str:
    """The valid names most like `name`, for the end of an error message; all of them where none is like it."""
    by_lower = {candidate.lower(): candidate for candidate in valid}
    likely = [candidate for candidate in by_lower if len(name) > 1 and candidate.startswith(name.lower())]
    likely += difflib.get_close_matches(name.lower(), by_lower, n=_LIKELY, cutoff=0.5)
    likely = list(dict.fromkeys(likely))[:_LIKELY]
    if likely:
        return f"closest valid names: {', '.join(repr(by_lower[name]) for name in likely)}"
    return f"valid names: {', '.join(repr(candidate) for candidate in sorted(by_lower.values()))}"


class _Short(reprlib.Repr):
    """Long texts by their length alone: a configuration may hold the code of a function."""

    def repr_str(self, x: str, level: int) -> str:
        return repr(x) if len(x) <= 80 else f"<text of {len(x)} characters>"

    def repr_bytes(self, x: bytes, level: int) -> str:
        return f"<{len(x)} bytes>"


_SHORT = _Short()
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = 8
_SHORT.maxother = 200


def shown(value: Any) -> str:
    """A value that came from outside, short enough for a message: of an array its dtype and shape."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array {value.dtype}{list(value.shape)}"
    return _SHORT.repr(value)


def named(error: Exception, what: str) -> Exception:
    """An error that says first where it came up: a TypeError as that, any other as a ValueError.

    Not of the error's own class, which may be made of something else than a message, as JAX's errors of tracers are.
    """
    return (TypeError if isinstance(error, TypeError) else ValueError)(f"{what}: {error}")


class Registry:
    """The built-in callables of one kind, under Keras' names.

    A class in the registry is configured by keyword arguments that are the keys of Keras' configuration, and offers
    `get_config(window_axes: tuple[int, ...]) -> dict`, where `window_axes` are the axes of the parameter that an
    `axis="window"` or `fan="window"` stands for.
    """

    def __init__(self, kind: str, module: str, names: Mapping[Callable[..., Any], tuple[str, ...]]):
        """Makes a registry.

        Args:
            kind: what the messages call an entry, such as "constraint".
            module: the public Keras module of the entries, such as "keras.constraints".
            names: each class or function, with its names; the first one is the one that a configuration carries.
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
            A callable, or None for None. Any callable that is not a class comes back as it is.

        Raises:
            ValueError: an unknown name, or a configuration that this registry does not hold or cannot make.
            TypeError: anything else that is not callable.
        """
        argument = argument or self.kind
        if isinstance(identifier, str):
            return self._make(identifier, {}, argument, identifier)
        if isinstance(identifier, Mapping):
            return self._from_config(identifier, argument)
        if isinstance(identifier, type):
            return _call(identifier, {}, f"{argument}: cannot make a {self.kind} from the class {identifier.__name__}")
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
            window_axes: the axes of the parameter that "window" stands for, `(0, 1)` for a 2D depthwise kernel.

        Raises:
            ValueError: Keras has no word for `entry`, since it is not in this registry.
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
                f"{argument or self.kind}: {entry!r} has no Keras configuration; only the built-in ones have: "
                f"{', '.join(repr(name) for name in self._first_names.values())}"
            ) from None

    def _from_config(self, identifier: Mapping[Any, Any], argument: str) -> Callable[..., Any]:
        check_depth(identifier, argument)
        unknown = sorted(repr(key) for key in identifier if key not in _CONFIG_KEYS)
        if unknown or "class_name" not in identifier:
            raise ValueError(
                f"{argument}: a configuration has the keys 'class_name' and 'config' (and 'module', "
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
                f"a {self.kind} lies in {self.module!r}"
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
            return _call(entry, config, f"{argument}: cannot make a {self.kind} from {shown(identifier)}")
        if config:
            raise ValueError(f"{argument}: {self.kind} {name!r} takes no configuration; got {shown(config)}")
        return entry


def _call(cls: type, config: dict[str, Any], message: str) -> Callable[..., Any]:
    """`cls(**config)`, its argument errors prefixed with what was being made."""
    try:
        made = cls(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{message}: {error}") from error
    if not callable(made):
        raise TypeError(f"{message}: its instances are not callable")
    return made
