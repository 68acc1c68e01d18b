"""Two processes under torchrun on the CPU (gloo) do what one process does."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_train import PERCEIVER, TINY, equal, metrics, tensors, train


def torchrun(ranks, runs, name, *extra, tiny=TINY):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(ranks),
        str(ROOT / "train.py"),
        "--runs",
        str(runs),
        "--name",
        name,
        *tiny,
        *map(str, extra),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.parametrize(
    "denoiser, accumulation", [(TINY, 1), (TINY, 2), (PERCEIVER, 1), (PERCEIVER, 2)]
)
def test_two_processes_equal_one(tmp_path, denoiser, accumulation):
    """Same images, same noise, same loss at step 1; same weights up to the rounding of sums."""
    tiny = [*denoiser, "--stage1_steps", "5", "--log_every", "1", "--save_every", "5"]
    micro = ["--micro_batch", str(8 // accumulation), "--stage", "1"]
    torchrun(2, tmp_path, "two", *micro, tiny=tiny)
    assert train(tmp_path, "one", "--stage", "1", tiny=tiny).returncode == 0
    two, one = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    assert len(two) == len(one) == 5
    assert abs(two[0]["loss"] - one[0]["loss"]) <= 1e-5
    assert abs(two[0]["gradient_norm"] - one[0]["gradient_norm"]) <= 1e-4 * one[0]["gradient_norm"]
    for key, value in tensors(tmp_path / "one", 1).items():
        assert torch.allclose(tensors(tmp_path / "two", 1)[key], value, atol=1e-4), key


def test_ranks_hold_equal_weights_and_see_disjoint_images(tmp_path):
    """Each rank writes down its weights' hash and its images after 5 steps."""
    script = tmp_path / "spy.py"
    script.write_text(f"""
import json, os, sys
sys.path.insert(0, {str(ROOT)!r})
import checkpoints, train, data
seen = []
original = data.batches
def spy(*args):
    for batch in original(*args):
        seen.extend(batch["position"])
        yield batch
train.batches = spy
run_stage = train.run_stage
def after(stage, model, *args):
    run_stage(stage, model, *args)
    rank = os.environ["RANK"]
    open({str(tmp_path)!r} + f"/rank{{rank}}.json", "w").write(
        json.dumps({{"hash": checkpoints.fingerprint(model), "seen": seen[:40]}}))
train.run_stage = after
train.main(train.command_line())
""")
    tiny = [*TINY, "--stage1_steps", "5", "--stage", "1", "--micro_batch", "4"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
        "--runs",
        str(tmp_path),
        "--name",
        "spy",
        *tiny,
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1)]
    assert ranks[0]["hash"] == ranks[1]["hash"]
    assert not set(ranks[0]["seen"]) & set(ranks[1]["seen"])
    assert sorted(ranks[0]["seen"] + ranks[1]["seen"]) == list(range(80)), (
        "five global batches of 16"
    )


@pytest.mark.parametrize("tiny", [TINY, PERCEIVER])
def test_two_processes_resume_bit_equal(tmp_path, tiny):
    micro = ["--micro_batch", "8"]
    torchrun(2, tmp_path, "straight", *micro, tiny=tiny)
    torchrun(2, tmp_path, "stopped", *micro, tiny=tiny)
    run = tmp_path / "stopped"
    shutil.rmtree(run / "stage2" / "step_00000004")
    torchrun(2, tmp_path, "stopped", *micro, tiny=tiny)
    assert equal(tensors(run, 2), tensors(tmp_path / "straight", 2))
    assert metrics(run) == metrics(tmp_path / "straight")
