"""The code of the README and of the documentation's pages runs as it stands, block after block."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
PAGES = [page for page in sorted((README.parent / "docs").glob("*.md")) if "```python" in page.read_text()]


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_every_python_block_runs(page: Path) -> None:
    names: dict[str, object] = {}
    text = page.read_text()
    for block in re.finditer(r"```python\n(.*?)```", text, flags=re.DOTALL):
        lines_before = "\n" * text.count("\n", 0, block.start(1))  # so that a traceback shows the right line
        exec(compile(lines_before + block[1], str(page), "exec"), names)


def test_the_pages_are_found() -> None:
    assert {"constraints.md", "sharding.md"} <= {page.name for page in PAGES}


def test_commands_are_targets_of_the_makefile() -> None:
    makefile = (README.parent / "Makefile").read_text()
    commands = re.findall(r"^make (\w+)", README.read_text(), flags=re.MULTILINE)
    assert {"demo", "test"} <= set(commands)
    for command in commands:
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE), command


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_code_fits_into_the_site_s_column(page: Path) -> None:
    blocks = re.findall(r"```.*?\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert not [line for block in blocks for line in block.splitlines() if len(line) > 84]
