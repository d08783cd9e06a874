"""Docstrings: their examples run, their sections name the arguments that there are, and they read well as Markdown."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import depthwise_jax

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "depthwise_jax").rglob("*.py")
    if path.name != "__main__.py"
)
PAGES = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))


def documented(module: str) -> Iterator[tuple[str, Any, str]]:
    """The public functions, classes and methods that a module defines, with their docstrings."""
    for name, item in vars(importlib.import_module(module)).items():
        if name.startswith("_") or getattr(item, "__module__", None) != module:
            continue
        if inspect.isclass(item) or inspect.isfunction(item):
            yield f"{module}.{name}", item, inspect.getdoc(item) or ""
        if inspect.isclass(item):
            for member, value in vars(item).items():
                value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
                if inspect.isfunction(value) and not member.startswith("_"):
                    yield f"{module}.{name}.{member}", value, inspect.getdoc(value) or ""


def section(docstring: str, name: str) -> str:
    """The text of a section, not indented; "" if there is none."""
    found = re.search(rf"^{name}:\n((?: .*\n?|\n)+)", docstring, re.MULTILINE)
    return textwrap.dedent(found.group(1)) if found else ""


DOCUMENTED = [pytest.param(item, text, id=name) for module in MODULES for name, item, text in documented(module)]


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module: str) -> None:
    imported = importlib.import_module(module)
    own = {name: item for name, item in vars(imported).items() if getattr(item, "__module__", None) == module}
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(imported, globs=own):  # what else they use they import
        runner.run(test)
    assert runner.summarize().failed == 0


@pytest.mark.parametrize(
    "name",
    [
        "depthwise_jax.functional.depthwise_conv",
        "depthwise_jax.functional.separable_conv",
        "depthwise_jax.functional.depthwise_conv_transpose",
        "depthwise_jax.explanation.explain",
        "depthwise_jax.drop_in.conv_general_dilated",
        "depthwise_jax.linen.DepthwiseConv2D",
        "depthwise_jax.linen.SeparableConv2D",
        "depthwise_jax.linen.DepthwiseConv2DTranspose",
        "depthwise_jax.linen.regularization_loss",
        "depthwise_jax.nnx.DepthwiseConv2D",
        "depthwise_jax.optim.constraints_of",
        "depthwise_jax.optim.project",
        "depthwise_jax.constraints.MaxNorm",
        "depthwise_jax.interop.jaxpr.accelerate",
        "depthwise_jax.interop.flax.from_flax",
        "depthwise_jax.interop.torch.from_arrays",
    ],
)
def test_what_is_used_most_has_an_example(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    docstring = getattr(importlib.import_module(module), attribute).__doc__
    assert doctest.DocTestParser().get_examples(docstring)


@pytest.mark.parametrize(("item", "docstring"), DOCUMENTED)
def test_public_names_are_documented(item: Any, docstring: str) -> None:
    assert docstring, "no docstring"
    assert not docstring.startswith(f"{getattr(item, '__name__', '')}("), "a dataclass's own signature"


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_stand_in_the_source(module: str) -> None:
    # The docs site reads the source: it sees no docstring that is computed.
    imported = importlib.import_module(module)
    for node in ast.parse(inspect.getsource(imported)).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node) == inspect.getdoc(getattr(imported, node.name)), node.name


@pytest.mark.parametrize(("item", "docstring"), DOCUMENTED)
def test_sections_name_the_arguments(item: Any, docstring: str) -> None:
    signature = inspect.signature(item.__init__ if inspect.isclass(item) else item)  # NNX gives its classes another one
    parameters = [name for name in signature.parameters if name != "self"]
    for title in ("Args", "Attributes"):
        entries = re.findall(r"^([\w*][\w*, ]*):(?= |$)", section(docstring, title), re.MULTILINE)
        named = [name.strip().lstrip("*") for entry in entries for name in entry.split(",")]
        assert len(named) == len(set(named))
        if title == "Args":
            assert set(named) <= set(parameters)
            if named and not re.search("other arguments", docstring, re.IGNORECASE):
                assert set(parameters) - set(named) <= {"parent", "name"}


def test_the_package_s_names_have_a_page() -> None:
    for name, item in vars(depthwise_jax).items():
        if getattr(item, "__module__", "").startswith("depthwise_jax") and not name.startswith("_"):
            rank_2 = re.sub(r"\dD(?=$|Transpose)", "2D", name)  # stands for the layers over one and three axes
            module = item.__module__ if inspect.isclass(item) else r"depthwise_jax(\.\w+)?"
            assert re.search(rf"^::: {module}\.({name}|{rank_2})$", PAGES, re.MULTILINE), name


ON_PAGES = [
    pytest.param(text, id=name)
    for module in MODULES
    for name, text in [
        (module, importlib.import_module(module).__doc__ or ""),
        *((n, t) for n, _, t in documented(module)),
    ]
    if any(name.startswith(page) for page in re.findall(r"^::: ([\w.]+)$", PAGES, re.MULTILINE))
]


def test_what_stands_on_a_page_says_what_its_arguments_are() -> None:
    pages = re.findall(r"^::: ([\w.]+)$", PAGES, re.MULTILINE)
    not_shown = ("interop.keras.config", "interop.keras.hdf5", "interop.modules")
    missing = []
    for module in MODULES:
        if module.endswith(not_shown):
            continue
        for name, item, text in documented(module):
            if not any(name == page or name.startswith(f"{page}.") for page in pages):
                continue
            if inspect.isclass(item) and "__init__" not in vars(item):
                continue  # its base class documents them
            signature = inspect.signature(item.__init__ if inspect.isclass(item) else item)
            parameters = {*signature.parameters} - {"self", "cls"}
            if module.endswith(".activations") and parameters == {"x"}:
                continue  # the formula says it
            if parameters and not (section(text, "Args") or section(text, "Attributes")):
                missing.append(f"{name}({', '.join(parameters)})")
    assert not missing


@pytest.mark.parametrize("docstring", ON_PAGES)
def test_markdown_takes_no_formula_for_emphasis(docstring: str) -> None:
    text = re.sub(r"^ *>>>.*\n(?:(?! *\n).*\n?)*", "", docstring, flags=re.MULTILINE)  # examples, with what they print
    text = re.sub(r"`[^`]*`", "", text)
    text = re.sub(r"^( *)\*{1,2}\w+(?=[,:])|(?<=, )\*{1,2}\w+(?=[,:])", "", text, flags=re.MULTILINE)  # *args
    text = re.sub(r"^ *\* ", "", text, flags=re.MULTILINE)  # a list's bullets
    stars = [line for line in text.splitlines() if "*" in line or "~" in line]
    assert not stars, f"put formulas and shapes between backticks: {stars}"
