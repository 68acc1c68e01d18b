"""Benchmarks that nobody runs every day still run: each once, at the smallest size."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

ALONE = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}


@pytest.mark.parametrize(
    "command, words",
    [
        ("checkpoint.py --gb 0.02", "read by 4 shared out"),
        ("gpu_step.py --quick", "as the official recipe"),
    ],
)
def test_a_small_run(command, words):
    """It ends well, prints its table and writes nothing."""
    before = {f.name: f.stat().st_mtime_ns for f in (ROOT / "benchmarks").iterdir()}
    script, *flags = command.split()
    call = [sys.executable, f"benchmarks/{script}", *flags]
    done = subprocess.run(call, capture_output=True, **ALONE)
    assert done.returncode == 0, done.stderr[-2000:]
    assert words in done.stdout
    after = {f.name: f.stat().st_mtime_ns for f in (ROOT / "benchmarks").iterdir()}
    assert {k: v for k, v in after.items() if k != "__pycache__"} == {
        k: v for k, v in before.items() if k != "__pycache__"
    }
