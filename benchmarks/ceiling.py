"""What gets through the tokenizer, and through the denoiser? The pair benchmark on pictures that
have gone through them, by pattern.

    python benchmarks/ceiling.py --run runs/toy --run runs/toy-perceiver

What a tokenizer drops no denoiser can draw. What a denoiser draws badly it may teach all the same
(docs/RESULTS.md). The judge is the original CLIP, and it judges *mentioned* subjects, on which it
sees every pattern well: where its verdict falls on the reconstructions, the detail is gone.
Drawings are given the [CLS] token of the original picture and nothing else, and come from stage 1
of the runs. Writes benchmarks/ceiling.json and ceiling.md.
"""

import numpy as np
import torch
from report import CPU, facts, headline, parser, publish, table

from evaluation.encoder import Encoder, load_encoders
from evaluation.pairsets import Item
from evaluation.reconstruction import psnr, reconstruct
from evaluation.scoring import score
from genhancer import GenHancer
from settings import settings_of_run
from toy.benchmark import TEMPLATE, pairs
from toy.world import PATTERNS, TOY_DIR, to_tensor
from training.assemble import load_run
from util.cli import run_command

CHUNK = 300  # pictures at once
TOKENIZERS = {"flow": "VAE", "perceiver": "VQ-GAN"}


def through(model: GenHancer, items: list[Item]) -> dict[str, tuple[list[Item], float]]:
    """The pairs as tokenizer and denoiser give them back: way → pairs, and their PSNR in dB."""
    pictures = torch.stack([to_tensor(image) for item in items for image in item.images])
    rows: dict[str, list[torch.Tensor]] = {"kept": [], "drawn": []}
    for start in range(0, len(pictures), CHUNK):
        found = reconstruct(model, pictures[start : start + CHUNK], seed=start)
        for way, shown in rows.items():
            shown.append(found[way].pictures)
    ways = {}
    for way, shown in rows.items():
        images = torch.cat(shown)
        pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()  # (2K, 64, 64, 3)
        changed = [
            Item(item.category, (pixels[2 * k], pixels[2 * k + 1]), item.captions, item.name)
            for k, item in enumerate(items)
        ]
        ways[way] = changed, psnr(images, pictures)
    return ways


def by_pattern(judge: Encoder, items: list[Item]) -> dict[str, float]:
    """Percent of pairs right, per pattern and on average."""
    hits = score(judge, items, TEMPLATE)["text-to-image"]
    names = np.array([item.category for item in items])
    found = {pattern: 100 * float(hits[names == pattern].mean()) for pattern in PATTERNS}
    return found | {"Average": 100 * float(hits.mean())}


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--run", action="append", help="a run of train.py; repeat")
    flags.add_argument("--pairs", type=int, default=100, help="per pattern and side")
    flags.add_argument("--name", default="ceiling")
    args = flags.parse_args()
    runs = args.run or ["runs/toy", "runs/toy-perceiver"]
    denoisers = [settings_of_run(run).denoiser for run in runs]
    if len(set(denoisers)) < len(runs) or not set(denoisers) <= TOKENIZERS.keys():
        raise ValueError(f"--run: expected one run of each of {', '.join(TOKENIZERS)}")
    [judge] = load_encoders([str(TOY_DIR / "clip.safetensors")], CPU)
    sides = {"mentioned": True, "unmentioned": False}
    asked = {side: pairs(told, args.pairs, seed=0) for side, told in sides.items()}
    found = {"original": {side: by_pattern(judge, items) for side, items in asked.items()}}
    for run, denoiser in zip(runs, denoisers, strict=True):
        _, model = load_run(run, stage=1)
        for side, items in asked.items():
            for way, (changed, decibel) in through(model, items).items():
                label = TOKENIZERS[denoiser] if way == "kept" else denoiser
                row = found.setdefault(label, {})
                row[side] = by_pattern(judge, changed) | {"psnr": decibel}

    command = "python benchmarks/ceiling.py" + "".join(f" --run {run}" for run in runs)
    lines = [f"{headline(command, facts(), f'{9 * args.pairs} pairs a side')}.", ""]
    for side in sides:
        head = [f"{side}, percent right by the original CLIP", *found]
        cells = [
            [pattern, *(f"{way[side][pattern]:.1f}" for way in found.values())]
            for pattern in [*PATTERNS, "Average"]
        ]
        decibels = [
            f"{way[side]['psnr']:.1f}" if "psnr" in way[side] else "" for way in found.values()
        ]
        lines += [*table(head, [*cells, ["PSNR, dB", *decibels]]), ""]
    publish(
        args.name, lines, {"command": command, **facts(), "runs": list(map(str, runs)), **found}
    )


if __name__ == "__main__":
    run_command(main)
