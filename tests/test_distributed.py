"""Training in several processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.two_processes import run_together
from tests.support.compiling import QUICK_FLAGS

ROOT = Path(__file__).resolve().parent.parent


def test_two_processes_train_as_one_does() -> None:
    environment = {**os.environ, "XLA_FLAGS": QUICK_FLAGS}
    done = subprocess.run(
        [sys.executable, "-m", "examples.two_processes", "--steps", "3", "--seconds", "400"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from step 0 to 3 on 4 devices" in done.stdout
    difference = re.search(r"largest difference of the parameters after 3 steps: (\S+)", done.stdout)
    assert difference, done.stdout
    assert float(difference[1]) <= 1e-5


def test_a_process_that_fails_ends_the_others() -> None:
    start = time.monotonic()
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run_together([[sys.executable, "-c", code] for code in ("import time; time.sleep(60)", "exit(3)")], 50)
    assert caught.value.returncode == 3
    assert time.monotonic() - start < 40


def test_processes_that_take_too_long_are_ended() -> None:
    start = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        run_together([[sys.executable, "-c", "import time; time.sleep(60)"]] * 2, 0.5)
    assert time.monotonic() - start < 40
