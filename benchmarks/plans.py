"""What the six full-size presets need, with either denoiser, as one table.

    python benchmarks/plans.py                       8 GPUs, 16 images per GPU and pass → plans.md

The figures are those of `python train.py --plan`; nothing is run and no GPU is needed.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plan import make_plan  # noqa: E402
from settings import PRESETS, Settings, preset_of  # noqa: E402


def row(preset: str, denoiser: str, gpus: int, more: dict) -> dict:
    """Figures of one preset; memory in GB per GPU."""
    given = {"preset": preset, "denoiser": denoiser, **more}
    settings = Settings(**{**preset_of(given), **given})
    start = time.time()
    plan = make_plan(settings, gpus, "cuda")
    memory = {n: sum(stage.memory.values()) / 1e9 for n, stage in plan.stages.items()}
    moments = plan.stages[1].memory["moments of AdamW"] / 1e9
    return {
        "preset": preset,
        "denoiser": "FLUX.1" if more.get("flux") else denoiser,
        "micro_batch": settings.micro_batch,
        "tokens": plan.tokens,
        "patch_tokens": plan.patch_tokens,
        "trainable_m": {n: stage.trainable / 1e6 for n, stage in plan.stages.items()},
        "gflop_per_image": {n: stage.flops / 1e9 for n, stage in plan.stages.items()},
        "memory_gb": memory,
        "stage1_zero_gb": memory[1] - moments * (1 - 1 / gpus),
        "seconds": round(time.time() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=8)
    args = parser.parse_args()
    wanted = [(p, d, {}) for d in ("flow", "perceiver") for p in PRESETS if p != "toy"]
    # Table 7's two rows: two images per GPU and pass, light denoiser and published FLUX.
    for flux in ({}, {"flux": "flux1-dev.safetensors"}):
        wanted.append(("openai-l14-224", "flow", {"micro_batch": 2, **flux}))
    rows = [row(preset, denoiser, args.gpus, more) for preset, denoiser, more in wanted]
    about = {
        "command": f"python benchmarks/plans.py --gpus {args.gpus}",
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "rows": rows,
    }
    lines = [
        f"`{about['command']}`, {about['date']}, torch {about['torch']}. GB per GPU, counted, not "
        f"measured; {args.gpus} GPUs, bf16 autocast.",
        "",
        "| preset | denoiser | images a pass | trainable, M: stage 1 / 2 | GFLOP an image | stage "
        "1, GB | with `--zero` | stage 2, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        trainable, flops, memory = r["trainable_m"], r["gflop_per_image"], r["memory_gb"]
        lines.append(
            f"| {r['preset']} | {r['denoiser']} | {r['micro_batch']} | {trainable[1]:.1f} / "
            f"{trainable[2]:.2f} | {flops[1]:,.0f} / {flops[2]:,.0f} | {memory[1]:.1f} | "
            f"{r['stage1_zero_gb']:.1f} | {memory[2]:.1f} |"
        )
    (ROOT / "benchmarks" / "plans.json").write_text(json.dumps(about, indent=1))
    (ROOT / "benchmarks" / "plans.md").write_text("\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
