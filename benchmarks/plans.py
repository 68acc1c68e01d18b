"""What the six full-size presets need, with either denoiser, as one table.

    python benchmarks/plans.py                       8 GPUs, 16 images per GPU and pass → plans.md

The figures are those of `python train.py --plan`; nothing is run and no GPU is needed.
"""

import time

from report import facts, headline, parser, publish, table

from settings import BACKBONES, Settings
from training.plan import make_plan
from util.cli import run_command

HEAD = [
    "preset",
    "denoiser",
    "images a pass",
    "trainable, M: stage 1 / 2",
    "GFLOP an image",
    "stage 1, GB",
    "with `--zero`",
    "stage 2, GB",
]


FOR_ONE_GPU = ("openai-b32-224",)


def measure(preset: str, denoiser: str, gpus: int, more: dict) -> dict:
    """Figures of one preset; memory in GB per GPU. `more`: settings beside the preset's."""
    given = {"preset": preset, "denoiser": denoiser, **more}
    settings = Settings(**given)
    gpus = 1 if preset in FOR_ONE_GPU else gpus
    start = time.time()
    plan = make_plan(settings, gpus, "cuda")
    memory = {n: sum(stage.memory.values()) / 1e9 for n, stage in plan.stages.items()}
    moments = plan.stages[1].memory["moments of AdamW"] / 1e9
    return {
        "preset": preset + " (one GPU)" * (preset in FOR_ONE_GPU),
        "denoiser": "FLUX.1" if more.get("flux") else denoiser,
        "micro_batch": settings.micro(gpus),
        "tokens": plan.tokens,
        "patch_tokens": plan.patch_tokens,
        "trainable_m": {n: stage.trainable / 1e6 for n, stage in plan.stages.items()},
        "gflop_per_image": {n: stage.flops / 1e9 for n, stage in plan.stages.items()},
        "memory_gb": memory,
        "stage1_zero_gb": memory[1] - moments * (1 - 1 / gpus),
        "seconds": round(time.time() - start, 1),
    }


def cells(row: dict) -> list[str]:
    """One line of the table."""
    trainable, flops, memory = row["trainable_m"], row["gflop_per_image"], row["memory_gb"]
    return [
        row["preset"],
        row["denoiser"],
        row["micro_batch"],
        f"{trainable[1]:.1f} / {trainable[2]:.2f}",
        f"{flops[1]:,.0f} / {flops[2]:,.0f}",
        f"{memory[1]:.1f}",
        f"{row['stage1_zero_gb']:.1f}",
        f"{memory[2]:.1f}",
    ]


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--gpus", type=int, default=8)
    args = flags.parse_args()
    wanted = [(preset, d, {}) for d in ("flow", "perceiver") for preset in BACKBONES]
    # Table 7's two rows: two images per GPU and pass, light denoiser and published FLUX.
    for flux in ({}, {"flux": "flux1-dev.safetensors"}):
        wanted.append(("openai-l14-224", "flow", {"micro_batch": 2, **flux}))
    rows = [measure(preset, denoiser, args.gpus, more) for preset, denoiser, more in wanted]
    command, about = f"python benchmarks/plans.py --gpus {args.gpus}", facts()
    del about["machine"]  # a count is the same on every machine
    first = (
        f"{headline(command, about)}. GB per GPU, counted, not measured; {args.gpus} GPUs, bf16 "
        "autocast."
    )
    lines = [first, "", *table(HEAD, map(cells, rows))]
    publish("plans", lines, {"command": command, **about, "rows": rows})


if __name__ == "__main__":
    run_command(main)
