"""Does the denoiser listen? Reconstruction loss with the true and with another image's [CLS].

    python benchmarks/condition.py                          runs/toy-perceiver, after stage 1
    python benchmarks/condition.py --run runs/toy --name condition_flow

On toy scenes that no run has trained on, at fixed mask ratios (or times t). Writes
benchmarks/NAME.json and NAME.md.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import assemble  # noqa: E402
import checkpoints as ckpt  # noqa: E402
import toyworld  # noqa: E402
import train  # noqa: E402
from settings import Settings  # noqa: E402


def load(run: Path):
    """The model of a run as its stage 1 left it, and the step."""
    settings = Settings(**json.loads((run / "config.json").read_text())["settings"])
    _, model = assemble.build_model(settings, train.set_up(settings))
    model.start_stage1()
    newest = ckpt.checkpoints_in(run / "stage1")[-1]
    ckpt.put(model, ckpt.read_trained(newest), set(train.trained(model)), str(newest))
    return model.eval(), settings, ckpt.read_state(newest)["step"]


@torch.no_grad()
def measure(model, images: torch.Tensor, hidden: float) -> dict[str, float]:
    """Loss (and accuracy), true and shuffled. `hidden`: mask ratio, or 1 − t."""
    sums = {}
    for start in range(0, len(images), 256):
        batch = images[start : start + 256]
        frozen = model.frozen(batch)
        own = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        draws = model.draw(own, torch.Generator().manual_seed(start))
        if "count" in draws:
            draws["count"] = torch.tensor(round(hidden * model.paradigm.tokens))
        else:
            draws["t"] = torch.full((len(batch),), 1 - hidden)
        for name, features in (
            ("true", frozen["original"]),
            ("other", frozen["original"].roll(1, 0)),
        ):
            result = model(batch, draws, {**frozen, "original": features})
            for key in ("per_image", "accuracy"):
                if key in result:
                    where = f"{key} {name}"
                    sums[where] = sums.get(where, 0.0) + float(result[key].sum())
    return {where: value / len(images) for where, value in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="runs/toy-perceiver", help="a folder that train.py wrote")
    parser.add_argument("--name", default="condition")
    parser.add_argument("--scenes", type=int, default=1024)
    args = parser.parse_args()
    model, settings, step = load(ROOT / args.run)
    world = toyworld.ToyScenes(args.scenes, seed=2_718_281)
    images = torch.stack([world[(i, 0)]["image"] for i in range(args.scenes)])
    discrete = settings.denoiser == "perceiver"
    levels = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0) if discrete else (0.1, 0.3, 0.5, 0.7, 0.9)
    rows = {level: measure(model, images, level) for level in levels}
    about = {
        "run": Path(args.run).name,
        "denoiser": settings.denoiser,
        "stage1_step": step,
        "seed": settings.seed,
        "scenes": args.scenes,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "torch": torch.__version__,
    }
    lines = [
        f"`python benchmarks/condition.py --run {args.run} --name {args.name}`, after {step} steps "
        f"of stage 1, {args.scenes} scenes not trained on, {about['date']}, {about['machine']}, "
        f"torch {about['torch']}."
    ]
    if discrete:
        codes = model.paradigm.tokenizer.config.codes
        about |= {"uniform_guess": math.log(codes), "chance": 1 / codes}
        lines[0] += (
            f" Guessing uniformly costs ln {codes} = {math.log(codes):.2f} nats and is right "
        )
        lines[0] += f"in {100 / codes:.1f} % of cases. (Above 90 %: beyond the ratios trained on.)"
        lines += [
            "",
            "| masked | loss, true [CLS] | loss, another's | accuracy, true | another's |",
        ]
        lines += ["|---|---|---|---|---|"]
    else:
        lines += ["", "| t | loss, true [CLS] | loss, another's |", "|---|---|---|"]
    for level, row in rows.items():
        cells = [f"{level:.0%}" if discrete else f"{1 - level:.1f}"]
        cells += [f"{row['per_image true']:.3f}", f"{row['per_image other']:.3f}"]
        if discrete:
            cells += [f"{row['accuracy true']:.1%}", f"{row['accuracy other']:.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join([*lines, ""])
    out = ROOT / "benchmarks"
    (out / f"{args.name}.json").write_text(json.dumps({**about, "rows": rows}, indent=1))
    (out / f"{args.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
