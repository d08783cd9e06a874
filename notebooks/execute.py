"""Executes the notebooks, each in a new kernel; fails if a cell fails.

`make notebooks` also writes each one with its outputs beside its script; `make test-notebooks` leaves them as they are.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import jupytext
import nbclient
import nbformat
from traitlets.config import Config

HERE = Path(__file__).parent


def execute(script: Path, directory: str) -> nbformat.NotebookNode:
    """The notebook of a percent-format script with its outputs, in the same form at every run.

    Args:
        script: the script.
        directory: an empty directory for the kernel's files.
    """
    notebook = jupytext.read(script)
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    notebook.metadata = nbformat.from_dict(metadata)
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index}"
        cell.metadata = nbformat.NotebookNode()
    nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # else it depends on timing where they are split
        resources={"metadata": {"path": str(HERE)}},
        # Over TCP others on this machine could read along, and the kernel warns.
        config=Config({"KernelManager": {"transport": "ipc", "ip": f"{directory}/socket"}}),
    ).execute()
    notebook.metadata = nbformat.from_dict(metadata)  # without what the kernel told of itself
    return notebook


def main() -> None:
    """Executes the notebooks that the command line names, else all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the executed notebooks")
    parser.add_argument("names", nargs="*", help="such as 01_quickstart")
    arguments = parser.parse_args()
    scripts = [HERE / f"{name}.py" for name in arguments.names] or sorted(HERE.glob("[0-9][0-9]_*.py"))
    for script in scripts:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            os.environ["IPYTHONDIR"] = directory  # a kernel without this user's startup files
            os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # XLA warns of slow compilation where the machine is busy
            notebook = execute(script, directory)
        if arguments.write:
            nbformat.write(notebook, script.with_suffix(".ipynb"))
        print(f"{script.stem}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
