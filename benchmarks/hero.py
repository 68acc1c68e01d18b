"""The picture at the top of the README: what stage 2 has changed, seen through the denoiser's eyes.

    python benchmarks/hero.py                        the shipped run, toy/runs/flow → docs/hero.png
    python benchmarks/hero.py --run runs/toy         another finished run of the flow denoiser

Scenes that no run has trained on, from pairs that the toy benchmark counts as won (wrong before
stage 2, right after). Beside each: what the *same* denoiser, as stage 1 left it, draws from the
*same* noise when it is told the [CLS] token of CLIP before and after stage 2; and the similarities
that decide the pair. Of all pairs won in a pattern the one is shown whose drawings came nearest to
the scenes: the picture shows what the effect looks like, the tables say how often it happens.
"""

import argparse

import numpy as np
import torch
from report import ROOT, parser

from evaluation.encoder import Encoder
from evaluation.pairsets import Item
from evaluation.reconstruction import reconstruct
from evaluation.scoring import similarities, verdicts
from genhancer import GenHancer
from toy import benchmark
from toy.world import to_tensor
from training.assemble import load_run
from util.cli import run_command
from util.pictures import picture_table

COLUMNS = [
    "a scene it was not trained on",
    "drawn from [CLS] before stage 2",
    "drawn from [CLS] after stage 2",
    "which picture does CLIP find nearer to the words? (cosine)",
]


@torch.no_grad()
def drawings(model: GenHancer, item: Item) -> list[torch.Tensor]:
    """The pair's pictures, drawn before and drawn after: (2, 3, H, W) each, from the same noise."""
    images = torch.stack([to_tensor(pixels) for pixels in item.images])
    noise = model.draw_from([0, 1, 2], images.device)["noise"]
    before = reconstruct(model, images, condition=model.original_features(images), noise=noise)
    after = reconstruct(model, images, noise=noise)
    return [images, before["drawn"].pictures, after["drawn"].pictures]


def words(item: Item, similarities: list[np.ndarray], own: int) -> list[str]:
    """Lines beside one picture of a pair: its caption's similarity to it and to the other."""
    lines = [f"\u201c{benchmark.TEMPLATE.format(item.captions[own])}\u201d", ""]
    for when, similarity in zip(("before", "after"), similarities, strict=True):
        mine, other = similarity[own, own], similarity[own, 1 - own]
        verdict = "right" if mine > other else "wrong"
        lines.append(f"{when}:  this {mine:.3f},  the other {other:.3f}   {verdict}")
    return lines


def main(args: argparse.Namespace) -> None:
    original, _ = load_run(ROOT / args.run, stage=1)
    enhanced, model = load_run(ROOT / args.run, stage=2)
    about = model.info, torch.device("cpu")
    encoders = [Encoder("original", original, *about), Encoder("enhanced", enhanced, *about)]
    items = benchmark.pairs(mentioned=False)
    found = [similarities(encoder, items, benchmark.TEMPLATE) for encoder in encoders]
    before, after = (verdicts(cosines)["text-to-image"] for cosines in found)
    rows = []
    for pattern in args.patterns.split(","):
        won = [i for i in np.flatnonzero(~before & after) if items[i].category == pattern]
        if not won:
            raise ValueError(f"--patterns {pattern}: no pair of it was won")
        made = {i: drawings(model, items[i]) for i in won}
        # How much nearer to the scenes have the drawings come?
        gain = {i: float(((m[1] - m[0]) ** 2 - (m[2] - m[0]) ** 2).mean()) for i, m in made.items()}
        best = max(gain, key=gain.get)
        sims = [cosines[best].numpy() for cosines in found]  # (text, image) before and after
        for own in (0, 1):
            rows.append(([row[own] for row in made[best]], words(items[best], sims, own)))
    picture_table(COLUMNS, rows, ROOT / "docs" / "hero.png")
    print("written: docs/hero.png")


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--run", default="toy/runs/flow", help="a run of the flow denoiser")
    flags.add_argument("--patterns", default="Spatial,Presence", help="one pair of each")
    arguments = flags.parse_args()
    run_command(lambda: main(arguments))
