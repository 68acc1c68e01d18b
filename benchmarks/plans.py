"""What the six full-size presets need, with either denoiser, as one table; and whether it is true.

    python benchmarks/plans.py                       8 GPUs, 16 images per GPU and pass → plans.md
    python benchmarks/plans.py --check               one full-size step on the CPU → plans_check.md

The figures are those of `python train.py --plan`; for the table nothing is run and no GPU needed.
`--check` holds them against the system's own: stage 2 of openai-l14-224 on two images, in float32,
with weights drawn at random. It wants 16 GB, a file of 2 GB and some minutes.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from report import ROOT, facts, headline, parser, publish, table
from safetensors.torch import save_file

import train
from presets import BACKBONES
from pretrained.autoencoders import VAE
from pretrained.backbones import build_clip, describe_clip
from settings import Settings
from training import assemble, plan, stages
from training.plan_report import INTERPRETER
from training.process import start_process
from util.cli import run_command

HEAD = [
    "preset",
    "denoiser",
    "images a pass",
    "trainable, M: stage 1 / 2",
    "GFLOP an image",
    "stage 1, GB",
    "with `--shard`",
    "stage 2, GB",
    "with `--shard`",
]
FOR_ONE_GPU = ("openai-b32-224",)


# ------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------
def measure(preset: str, denoiser: str, gpus: int, more: dict) -> dict:
    """Figures of one preset; memory in GB per GPU. `more`: settings beside the preset's."""
    settings = Settings(**{"preset": preset, "denoiser": denoiser, **more})
    gpus = 1 if preset in FOR_ONE_GPU else gpus
    start = time.time()
    found = plan.make_plan(settings, gpus, "cuda")
    shared = found if gpus == 1 else plan.make_plan(replace(settings, shard=True), gpus, "cuda")
    return {
        "preset": preset + " (one GPU)" * (preset in FOR_ONE_GPU),
        "denoiser": "FLUX.1" if more.get("flux") else denoiser,
        "micro_batch": settings.micro(gpus),
        "tokens": found.tokens,
        "patch_tokens": found.patch_tokens,
        "trainable_m": {n: stage.trainable / 1e6 for n, stage in found.stages.items()},
        "gflop_per_image": {n: stage.flops / 1e9 for n, stage in found.stages.items()},
        "memory_gb": {n: stage.peak / 1e9 for n, stage in found.stages.items()},
        "shard_gb": {n: stage.peak / 1e9 for n, stage in shared.stages.items()},
        "parts_gb": in_gb(found),
        "shard_parts_gb": in_gb(shared),
        "seconds": round(time.time() - start, 1),
    }


def in_gb(found: plan.Plan) -> dict:
    return {
        number: {name: round(size / 1e9, 3) for name, size in (stage.memory | stage.peaks).items()}
        for number, stage in found.stages.items()
    }


def cells(row: dict) -> list[str]:
    """One line of the table."""
    trainable, flops = row["trainable_m"], row["gflop_per_image"]
    alone = "one GPU" in row["preset"]
    return [
        row["preset"],
        row["denoiser"],
        row["micro_batch"],
        f"{trainable[1]:.1f} / {trainable[2]:.2f}",
        f"{flops[1]:,.0f} / {flops[2]:,.0f}",
        *(
            "–" if alone and kind == "shard_gb" else f"{row[kind][stage]:.1f}"
            for stage in (1, 2)
            for kind in ("memory_gb", "shard_gb")
        ),
    ]


def make_table(gpus: int) -> None:
    wanted = [(preset, d, {}) for d in ("flow", "perceiver") for preset in BACKBONES]
    # Table 7's two rows: two images per GPU and pass, light denoiser and published FLUX.
    for flux in ({}, {"flux": "flux1-dev.safetensors"}):
        wanted.append(("openai-l14-224", "flow", {"micro_batch": 2, **flux}))
    rows = []
    for preset, denoiser, more in wanted:
        rows.append(measure(preset, denoiser, gpus, more))
        print(f"{preset}, {rows[-1]['denoiser']}: {rows[-1]['seconds']} s", file=sys.stderr)
    command, about = f"python benchmarks/plans.py --gpus {gpus}", facts()
    del about["machine"]  # a count is the same on every machine
    first = (
        f"{headline(command, about)}. GB per GPU, the most at once in a step, counted, not "
        f"measured; {gpus} GPUs, bf16 autocast."
    )
    lines = [first, "", *table(HEAD, map(cells, rows))]
    publish("plans", lines, {"command": command, **about, "rows": rows})


# ------------------------------------------------------------------------------------------------
# The check
# ------------------------------------------------------------------------------------------------
def checked(folder: Path) -> Settings:
    """The run that is checked, on weights in `folder`."""
    given = {"clip": f"ViT-L-14-quickgelu:{folder}/clip.safetensors"}
    given |= {"vae": f"{folder}/vae.safetensors", "batch": 2, "micro_batch": 2, "stage": "2"}
    return Settings.of("openai-l14-224", **given)


def write_random_weights(folder: Path) -> None:
    """Files like the published ones."""
    clip = build_clip(describe_clip("ViT-L-14-quickgelu:openai")[0])
    save_file(dict(clip.state_dict()), folder / "clip.safetensors")
    save_file(dict(VAE().state_dict()), folder / "vae.safetensors")


def status(name: str) -> int:
    """A line of this process's memory, in bytes, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def one_step(folder: Path) -> None:
    """Two steps of stage 2; prints resident memory before any model, and its peak in the second,
    in bytes."""
    before = status("VmRSS")
    process, settings = start_process("fp32"), checked(folder)
    _, model = assemble.build_model(settings, process)
    stage = stages.begin(2, model, settings, process)
    images, draws = plan.one_batch(model, 2, "cpu")
    piece = {"image": images, "draws": draws, "name": ["a", "b"]}
    train.train_step(stage, [piece])
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    start = time.time()
    train.train_step(stage, [dict(piece)])
    print(before, status("VmHWM"), round(time.time() - start, 1))


def check() -> None:
    """Foretold and found."""
    with tempfile.TemporaryDirectory() as name:
        write_random_weights(Path(name))
        foretold = plan.make_plan(checked(Path(name)), 1, "cpu")
        command = [sys.executable, __file__, "--step", name]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise ValueError(f"the step failed: {done.stderr.strip().splitlines()[-1]}")
    before, peak, seconds = (float(word) for word in done.stdout.split()[-3:])
    parts = {**foretold.stages[2].memory, **foretold.stages[2].peaks, "text tower": foretold.text}
    total = foretold.stages[2].peak + foretold.text + INTERPRETER
    command, about = "python benchmarks/plans.py --check", facts()
    first = (
        f"{headline(command, about)}. Stage 2 of openai-l14-224, 2 images, float32 on the CPU, "
        f"random weights, one step of {seconds:.0f} s; n = 1, resident memory as Linux counts it."
    )
    rows = [
        ["weights, gradients, moments and the most at once", foretold.stages[2].peak, None],
        ["text tower", foretold.text, None],
        ["Python and PyTorch", INTERPRETER, before],
        ["together", total, peak],
    ]
    lines = [first, ""]
    text = [[n, f"{a / 1e9:.2f}", "" if b is None else f"{b / 1e9:.2f}"] for n, a, b in rows]
    lines += table(["GB", "foretold", "found"], text)
    lines += ["", f"Foretold ÷ found: {total / peak:.3f}."]
    figures = {"foretold": total, "peak": peak, "before": before, "parts": parts}
    publish("plans_check", lines, {"command": command, **about, **figures})


def main(args) -> None:
    if args.step:
        one_step(Path(args.step))
    elif args.check:
        check()
    else:
        make_table(args.gpus)


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--gpus", type=int, default=8)
    flags.add_argument("--check", action="store_true", help="one real step against the plan")
    flags.add_argument("--step", default="", help="(used by --check) a folder of weights")
    arguments = flags.parse_args()
    run_command(lambda: main(arguments))
