"""benchmarks/vs_libraries.py: it runs, and it refuses to time what does not do the same work."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.fixture
def vs_libraries(monkeypatch):
    for library in ("diffusers", "transformers", "peft"):
        pytest.importorskip(library)
    import vs_libraries

    yield vs_libraries
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.mha.set_fastpath_enabled(False)  # as conftest.py has it


def test_every_comparison_runs_and_its_losses_agree(vs_libraries):
    """At toy size and without compiling, from its command line."""
    command = [sys.executable, "benchmarks/vs_libraries.py", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if " s, " in line]
    assert sum("libraries" in line for line in lines) == 5 and len(lines) == 3 * 2 + 2 * 3


def test_a_step_that_does_other_work_is_refused(vs_libraries):
    """A part, and a whole step whose learning rate is another."""
    linear = torch.nn.Linear(2, 2)
    same, other = (
        vs_libraries.Part(linear, lambda x=x: linear(torch.full((2,), x)).square().sum())
        for x in (1.0, 1.01)
    )
    with pytest.raises(ValueError, match="parts: losses .* of ours"):
        vs_libraries.agree({vs_libraries.BASE: same, "ours": other}, (True, False), "parts")
    assert vs_libraries.agree({vs_libraries.BASE: same, "ours": same}, (True, False), "parts")

    ours = vs_libraries.OurStep(vs_libraries.QUICK, 1)
    theirs = vs_libraries.TheirStep(vs_libraries.QUICK, ours)
    theirs.optimizer.param_groups[0]["lr"] *= 3
    with pytest.raises(ValueError, match="steps: losses"):
        vs_libraries.agree({"ours": ours, vs_libraries.BASE: theirs}, (True, False), "steps")
