"""Every error message has one form: the argument, what was expected; what came; what to do."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    path for folder in ("depthwise_jax", "workloads", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)


def messages(module: Path) -> Iterator[tuple[int, str]]:
    """The literal text of each exception that a module makes, with its line; {} stands for what is filled in."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Call) and re.search(r"(Error|Exit)$", ast.unparse(node.func)):
            yield node.lineno, "".join(text(argument) for argument in node.args)


def text(node: ast.expr) -> str:
    """The text of a string, an f-string or a sum of them."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text(node.left) + text(node.right)
    return "{}"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_messages_have_one_form(module: Path) -> None:
    for line, message in messages(module):
        assert not re.search(r"[^;] got\b|\bfound\b", message), f"{line}: {message!r}: write `must be ...; got ...`"
        assert not message.endswith("."), f"{line}: {message!r}: a message does not end in a full stop"
        assert not re.search(r"\bis no \w|\bare none\b|\bof which\b|\bso that\b", message), f"{line}: {message!r}"


def test_every_module_with_errors_is_read() -> None:
    assert sum(len(list(messages(module))) for module in MODULES) > 150
