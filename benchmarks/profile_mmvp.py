"""Where does the time of eval_mmvp.py go? A folder of MMVP-VLM's size, ViT-L/14, this machine.

    python benchmarks/profile_mmvp.py              270 images → profile_mmvp.md

The weights are random (time does not depend on them) and the pictures are noise of 224 px, as jpg.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval_mmvp as ev  # noqa: E402
from backbones import build_clip, describe_clip  # noqa: E402
from judge import Judge  # noqa: E402
from pairsets import read_pair_set  # noqa: E402
from scoring import MMVP_PATTERNS  # noqa: E402


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=270)
    parser.add_argument("--clip", default="ViT-L-14-quickgelu:openai")
    args = parser.parse_args()
    info, _ = describe_clip(args.clip)
    torch.manual_seed(0)
    judge = Judge(args.clip, build_clip(info), info, torch.device("cpu"))
    spent = {"image tower": 0.0, "text tower": 0.0}

    def timed(name: str, encode):
        def run(*inputs, **options):
            start = time.perf_counter()
            try:
                return encode(*inputs, **options)
            finally:
                spent[name] += time.perf_counter() - start

        return run

    judge.clip.encode_image = timed("image tower", judge.clip.encode_image)
    judge.clip.encode_text = timed("text tower", judge.clip.encode_text)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), args.images)
        start = time.perf_counter()
        pairs = read_pair_set(folder)
        ev.evaluate([judge], pairs, [pairs.template], "", Path(folder) / "out")
        total = time.perf_counter() - start
    share = sum(spent.values()) / total
    about = {
        "command": f"python benchmarks/profile_mmvp.py --images {args.images}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "torch": torch.__version__,
        "seconds": total,
        **spent,
        "share_of_towers": share,
    }
    line = (
        f"`{about['command']}`, {args.clip} with random weights, {about['date']}, "
        f"{about['machine']}, torch {about['torch']}: of {total:.1f} s, {spent['image tower']:.1f} "
        f"in the image tower and {spent['text tower']:.1f} in the text tower, {100 * share:.1f} % "
        "together."
    )
    (ROOT / "benchmarks" / "profile_mmvp.json").write_text(json.dumps(about, indent=1))
    (ROOT / "benchmarks" / "profile_mmvp.md").write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
