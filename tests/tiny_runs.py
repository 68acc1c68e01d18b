"""train.py at tiny size, for tests: the flags, two ways to start it, and what it left behind."""

import contextlib
import io
import json
import shlex
import socket
import subprocess
import sys

import numpy as np
import torch
from conftest import ROOT
from safetensors.torch import load_file

import train as training
from training import checkpoints as ckpt
from util.cli import run_command

COMMON = shlex.split(
    "--toy_images 48 --width 32 --heads 2 --batch 16 --micro_batch 16 --warmup 2 --stage1_steps 6 "
    "--stage2_steps 4 --log_every 3 --save_every 2 --sample_every 100 --lora_rank 4"
)
TINY = [*COMMON, *shlex.split("--rope_axes 4,6,6 --vector_dim 12 --context_dim 20")]
PERCEIVER = [*COMMON, *shlex.split("--denoiser perceiver --layers 2")]
TIMES = {
    "images_per_s",
    "memory_gb",
}  # the only fields of a metrics line that may differ between equal runs


def without_lora(flags, extra):
    """LoRA's rank is refused where there is no LoRA."""
    place = flags.index("--lora_rank") if "direct" in extra else len(flags)
    return [*flags[:place], *flags[place + 2 :]]


def train(runs, name, *extra, tiny=TINY):
    return subprocess.run(
        [
            sys.executable,
            str(ROOT / "train.py"),
            "--runs",
            str(runs),
            "--name",
            name,
            *without_lora(tiny, extra),
            *map(str, extra),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def train_here(runs, name, *extra, tiny=TINY):
    """The same in this process: spares a second start of PyTorch where nothing is killed."""
    out, argv = io.StringIO(), sys.argv
    sys.argv = ["train.py", "--runs", str(runs), "--name", name, *without_lora(tiny, extra)]
    sys.argv += map(str, extra)
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            run_command(lambda: training.main(training.command_line()))
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
    return subprocess.CompletedProcess(sys.argv, code, out.getvalue(), out.getvalue())


def free_port():
    """For processes that will meet there."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def parts_in(run, stage):
    """What a stage's checkpoint holds: "visual", and parts of paradigms."""
    names = tensors(run, stage)
    return {
        n.split(".")[0] if n.startswith("visual") else ".".join(n.split(".")[:3]) for n in names
    }


def tensors(run, stage, what="trained"):
    """Of a stage's newest checkpoint: what was trained, or AdamW's "moments"."""
    return load_file(ckpt.checkpoints_in(run / f"stage{stage}")[-1] / f"{what}.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def assert_another_run(changed, base):
    """Two metrics lines of the same stage and step: finite, and not the same training."""
    assert np.isfinite(changed["loss"]) and changed["stage"] == base["stage"] == 2
    assert changed["step"] == base["step"]
    what = ("loss", "drift", "gradient_norm")
    assert [changed[k] for k in what] != [base[k] for k in what]
