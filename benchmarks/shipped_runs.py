"""The two trained runs that the notebooks look at: toy/runs/flow and toy/runs/perceiver.

    python benchmarks/shipped_runs.py      trains what is missing of toy_seeds.py's seed 1

Nobody should have to wait for a training before reading. So one run of the preset `toy` with each
denoiser, both stages, is part of the project. Seed 1: settings were chosen with seed 0. A shipped
run is what train.py leaves, cut down to what reading it needs: the last checkpoint of each stage
with weights in half precision and without the optimiser, metrics.jsonl, and config.json without the
paths of the machine.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from report import ROOT, is_finished, parser, train
from safetensors.torch import load_file

from settings import notes_of
from training.assemble import fingerprints_of, load_run
from training.preflight import checkpoints_in, read_state
from util.cli import run_command
from util.files import save_tensors, write_atomically
from util.sealed import hash_of, seal

PATHS = ("name", "runs", "clip", "vae", "vqgan")  # without them, the preset's own


def ship(run: Path, target: Path) -> None:
    """Cut a finished run down to `target`."""
    shutil.rmtree(target, ignore_errors=True)
    for stage in ("stage1", "stage2"):
        newest = checkpoints_in(run / stage)[-1]
        halves = {k: v.half() for k, v in load_file(newest / "trained.safetensors").items()}
        assert all(torch.isfinite(tensor).all() for tensor in halves.values())
        save_tensors(halves, target / stage / newest.name / "trained.safetensors")
        write_state(target / stage / newest.name, read_state(newest))
    stages = json.loads((run / "config.json").read_text())["stages"]
    for about in stages.values():
        for name in PATHS:
            assert notes_of(name)["free"], "a path is not what makes a run"
            about["settings"].pop(name, None)
    write_atomically(target / "config.json", json.dumps({"stages": stages}, indent=1))
    shutil.copy(run / "metrics.jsonl", target / "metrics.jsonl")
    # Halves are other numbers, with other fingerprints: stage 2 now stands on them.
    _, model = load_run(target, stage=1)
    state_file = next(target.glob("stage2/*/state.json"))
    state = read_state(state_file.parent)
    write_state(state_file.parent, {**state, "fingerprints": fingerprints_of(model, stage=2)})


def write_state(checkpoint: Path, state: dict) -> None:
    """state.json of a checkpoint that has its weights alone."""
    name = "trained.safetensors"
    files = {name: hash_of(checkpoint / name)}
    write_atomically(checkpoint / "state.json", seal({**state, "files": files}))


def main(args: argparse.Namespace) -> None:
    for denoiser, name in (("flow", "toy_seeds"), ("perceiver", "perceiver")):
        run = ROOT / "runs" / f"{name}-seed1"
        if not is_finished(run):
            train(run, ["--denoiser", denoiser, "--seed", "1"])
        ship(run, ROOT / "toy" / "runs" / denoiser)
        size = sum(f.stat().st_size for f in (ROOT / "toy" / "runs" / denoiser).rglob("*.*"))
        print(f"written: toy/runs/{denoiser}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    arguments = parser(__doc__).parse_args()
    run_command(lambda: main(arguments))
