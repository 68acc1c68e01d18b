"""Benchmarks that nobody runs every day still run: each once, at the smallest size."""

import os
import subprocess
import sys

import numpy as np
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


def test_sums_that_tie_count_in_a_sign_flip_test_of_fractions(monkeypatch):
    """A claim of three arms differs by thirds, whose sums round: p is that of whole numbers."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from toy_seeds import sign_flip

    rng = np.random.default_rng(3)
    for pairs in (38, 113):
        whole = rng.integers(-5, 6, pairs) + (rng.random(pairs) < 0.15)
        assert sign_flip(whole / 3) == sign_flip(whole / 6) == sign_flip(whole)
