"""Does the denoiser listen? Reconstruction loss with the true and with another image's [CLS].

    python benchmarks/condition.py                          runs/toy-perceiver, after stage 1
    python benchmarks/condition.py --run runs/toy --name condition_flow

On toy scenes that no run has trained on, at fixed mask ratios (or times t). Writes
benchmarks/NAME.json and NAME.md.
"""

import math
from pathlib import Path

import torch
from report import ROOT, facts, headline, parser, publish, table

from genhancer import GenHancer
from settings import settings_of_run
from toy.world import ToyScenes
from training.assemble import load_run
from training.preflight import checkpoints_in, read_state
from util.cli import run_command


@torch.no_grad()
def measure(model: GenHancer, images: torch.Tensor, hidden: float) -> dict[str, float]:
    """Loss (and accuracy), true and shuffled.

    Args: images (scenes, 3, H, W); hidden: mask ratio, or 1 − t.
    """
    device, sums = model.mean.device, {}
    for start in range(0, len(images), 256):
        batch = images[start : start + 256].to(device)
        cached = model.precompute(batch)
        own = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        draws = model.draw(own, torch.Generator().manual_seed(start))
        if "count" in draws:
            draws["count"] = torch.tensor(round(hidden * model.paradigm.tokens))
        else:
            draws["t"] = torch.full((len(batch),), 1 - hidden)
        draws = {name: value.to(device) for name, value in draws.items()}
        of_another = cached["original"].roll(1, 0)
        for whose, features in (("true", cached["original"]), ("other", of_another)):
            result = model(batch, draws, {**cached, "original": features})
            for key in ("per_image", "accuracy"):
                found, where = result.get(f"{model.paradigm.name}.{key}"), f"{key} {whose}"
                if found is not None:
                    sums[where] = sums.get(where, 0.0) + float(found.sum())
    return {where: value / len(images) for where, value in sums.items()}


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--run", default="runs/toy-perceiver", help="a folder that train.py wrote")
    flags.add_argument("--name", default="condition")
    flags.add_argument("--scenes", type=int, default=1024)
    args = flags.parse_args()
    run = ROOT / args.run
    settings = settings_of_run(run)
    if len(settings.denoisers) > 1 or settings.local_ratio:
        raise ValueError(f"--run {args.run}: it has both denoisers, or is told more than [CLS]")
    _, model = load_run(run, stage=1)
    step = read_state(checkpoints_in(run / "stage1")[-1])["step"]
    world = ToyScenes(args.scenes, seed=2_718_281)
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
        **facts(),
    }
    command = f"python benchmarks/condition.py --run {args.run} --name {args.name}"
    details = f"after {step} steps of stage 1", f"{args.scenes} scenes not trained on"
    first = headline(command, about, *details) + "."
    head = ["masked" if discrete else "t", "loss, true [CLS]", "loss, another's"]
    if discrete:
        codes = model.paradigm.tokenizer.config.codes
        about |= {"uniform_guess": math.log(codes), "chance": 1 / codes}
        first += (
            f" Guessing uniformly costs ln {codes} = {math.log(codes):.2f} nats and is right in "
            f"{100 / codes:.1f} % of cases. (Above 90 %: beyond the ratios trained on.)"
        )
        head += ["accuracy, true", "another's"]
    cells = []
    for level, row in rows.items():
        losses = [f"{row[f'per_image {whose}']:.3f}" for whose in ("true", "other")]
        right = [f"{row[f'accuracy {w}']:.1%}" for w in ("true", "other")] if discrete else []
        cells.append([f"{level:.0%}" if discrete else f"{1 - level:.1f}", *losses, *right])
    publish(args.name, [first, "", *table(head, cells)], {**about, "rows": rows})


if __name__ == "__main__":
    run_command(main)
