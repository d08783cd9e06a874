"""What Griffe, which reads source, cannot see: docstrings that are assigned, and the arguments of Linen's modules."""

import dataclasses
import importlib
import inspect
from typing import Any

import griffe


class RuntimeDocstrings(griffe.Extension):
    """Takes a class's `__doc__` where it is assigned, and a Linen module's fields, from the class itself."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        for module in pkg.modules.values():
            for cls in module.classes.values():
                if not cls.is_alias and not cls.name.startswith("_"):
                    _complete(cls, getattr(importlib.import_module(module.path), cls.name))


def _complete(cls: griffe.Class, runtime: type) -> None:
    if "__doc__" in cls.members:
        cls.docstring = griffe.Docstring(inspect.getdoc(runtime) or "", parent=cls)
        cls.del_member("__doc__")
    if dataclasses.is_dataclass(runtime):
        cls.set_member("__init__", griffe.Function("__init__", parent=cls, parameters=_parameters(cls, runtime)))


def _parameters(cls: griffe.Class, runtime: Any) -> griffe.Parameters:
    parameters = []
    for name, parameter in inspect.signature(runtime.__init__).parameters.items():
        if name == "parent":  # Flax's own
            continue
        attribute = cls.all_members.get(name)
        annotation = getattr(attribute, "annotation", None)
        default = None if parameter.default is parameter.empty else getattr(attribute, "value", repr(parameter.default))
        if isinstance(parameter.annotation, dataclasses.InitVar):
            annotation = parameter.annotation.type.__name__
        kind = getattr(griffe.ParameterKind, parameter.kind.name.lower())
        parameters.append(griffe.Parameter(name, annotation=annotation, kind=kind, default=default))
    return griffe.Parameters(*parameters)
