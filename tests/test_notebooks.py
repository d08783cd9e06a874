"""The notebooks that are kept with their outputs are those that their scripts make."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jupytext
import pytest

SCRIPTS = sorted((Path(__file__).parent.parent / "notebooks").glob("[0-9][0-9]_*.py"))
MEBIBYTE = 2**20
ABSOLUTE = re.compile(r"(?<![\w.:/<)\]])/[\w.-]+/|\b[A-Z]:\\")


def sources(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def texts(notebook: Any) -> list[str]:
    """What the cells printed, displayed and raised, but for the pictures."""
    found = []
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        found += [output.get("text", ""), *output.get("traceback", ())]
        found += [text for kind, text in output.get("data", {}).items() if kind != "image/png"]
    return found


def test_there_are_six() -> None:
    names = ["quickstart", "keras_parity", "constraints", "performance", "transformations", "sequences"]
    assert [script.stem for script in SCRIPTS] == [f"{i:02}_{name}" for i, name in enumerate(names, 1)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_executed_from_its_script(script: Path) -> None:
    path = script.with_suffix(".ipynb")
    assert path.stat().st_size < MEBIBYTE
    notebook: Any = jupytext.read(path)
    assert sources(notebook) == sources(jupytext.read(script)), "run `make notebooks`"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [text for text in texts(notebook) if ABSOLUTE.search(text)]


@pytest.mark.parametrize("text", ["in /home/a/b.py:3", "/tmp/x", "File(/usr/lib/y)", "C:\\x"])
def test_absolute_paths_are_seen(text: str) -> None:
    assert ABSOLUTE.search(text)


@pytest.mark.parametrize(
    "text", ["nats/step", "https://a.b/usr/c", "ours / theirs", "n/usr/", "<td>1</td></tr>", "f(x)/n/2"]
)
def test_other_slashes_are_not(text: str) -> None:
    assert not ABSOLUTE.search(text)
