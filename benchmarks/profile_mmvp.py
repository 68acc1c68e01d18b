"""Where does the time of eval_mmvp.py go? A folder of MMVP-VLM's size, ViT-L/14, this machine.

    python benchmarks/profile_mmvp.py              270 images → profile_mmvp.md

The weights are random (time does not depend on them) and the pictures are noise of 224 px, as jpg.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from report import CPU, facts, headline, parser, publish

from eval_mmvp import evaluate
from evaluation.encoder import Encoder
from evaluation.pairsets import read_pair_set
from evaluation.scoring import MMVP_PATTERNS
from pretrained.backbones import build_clip, describe_clip
from util.cli import run_command


def write_folder(folder: Path, images: int) -> None:
    """`images` pictures in MMVP-VLM's layout, spread over the nine patterns."""
    rng, rows = np.random.default_rng(0), ["Question ID,Type,Statement"]
    for i in range(images):
        pattern = MMVP_PATTERNS[i // 2 * 9 // (images // 2)]
        place = folder / "MMVP_VLM_Images" / pattern
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (224, 224, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"{i + 1}.jpg", quality=90)
        rows.append(f"{i + 1},{pattern},statement number {i + 1} about this picture")
    (folder / "Questions.csv").write_text("\n".join(rows) + "\n")


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--images", type=int, default=270)
    flags.add_argument("--clip", default="ViT-L-14-quickgelu:openai")
    args = flags.parse_args()
    if args.images < 2 or args.images % 2:
        raise ValueError(f"--images {args.images}: pictures come in pairs; give an even number")
    info, _ = describe_clip(args.clip)
    torch.manual_seed(0)
    encoder = Encoder(args.clip, build_clip(info), info, CPU)
    spent = {"image tower": 0.0, "text tower": 0.0}

    def timed(name: str, encode):
        def run(*inputs, **options):
            start = time.perf_counter()
            try:
                return encode(*inputs, **options)
            finally:
                spent[name] += time.perf_counter() - start

        return run

    encoder.clip.encode_image = timed("image tower", encoder.clip.encode_image)
    encoder.clip.encode_text = timed("text tower", encoder.clip.encode_text)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), args.images)
        start = time.perf_counter()
        pairs = read_pair_set(folder)
        evaluate([encoder], pairs, [pairs.template])
        total = time.perf_counter() - start
    share = sum(spent.values()) / total
    command, about = f"python benchmarks/profile_mmvp.py --images {args.images}", facts()
    line = (
        f"{headline(command, about, f'{args.clip} with random weights')}: of {total:.1f} s, "
        f"{spent['image tower']:.1f} in the image tower and {spent['text tower']:.1f} in the text "
        f"tower, {100 * share:.1f} % together."
    )
    measured = {"seconds": total, **spent, "share_of_towers": share}
    publish("profile_mmvp", [line], {"command": command, **about, **measured})


if __name__ == "__main__":
    run_command(main)
