"""Two committed results of toy_seeds.py in one table: continuous and discrete denoiser.

    python benchmarks/side_by_side.py                toy_seeds and perceiver → side_by_side.md

Nothing is measured here; both were scored on the same pairs and scenes.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from toy_seeds import spread  # noqa: E402


def rows(result: dict) -> dict[str, tuple[int, float, np.ndarray]]:
    """label → (n, before, after per seed)."""
    found = {}
    for side in ("unmentioned", "mentioned"):
        for row in result[side]["rows"]:
            if side == "unmentioned" or row["pattern"] == "Average":
                label = row["pattern"] if row["pattern"] != "Average" else f"**{side}**"
                found[label] = row["n"], row["before"], np.array(row["after"])
    zero_shot = result["subject_zero_shot"]
    found["**subject zero-shot**"] = (
        zero_shot["n"],
        zero_shot["before"],
        np.array(zero_shot["after"]),
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--continuous", default="toy_seeds")
    parser.add_argument("--discrete", default="perceiver")
    args = parser.parse_args()
    results = [
        json.loads((HERE / f"{name}.json").read_text()) for name in (args.continuous, args.discrete)
    ]
    left, right = (rows(result) for result in results)
    lines = [
        "Percent right; mean ± standard deviation over seeds "
        f"{', '.join(map(str, results[0]['seeds']))} (continuous) and "
        f"{', '.join(map(str, results[1]['seeds']))} (discrete). From "
        f"[{args.continuous}](benchmarks/{args.continuous}.md) and "
        f"[{args.discrete}](benchmarks/{args.discrete}.md).",
        "",
        "| | n | before | continuous: after | change | discrete: after | change |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, (n, before, after) in left.items():
        other = right[label][2]
        assert right[label][:2] == (n, before), f"{label}: not scored on the same footing"
        lines.append(
            f"| {label} | {n} | {before:.1f} | {spread(after)} | {spread(after - before, '+')} | "
            f"{spread(other)} | {spread(other - before, '+')} |"
        )
    cosines = [np.mean(result["cosine_to_original"]) for result in results]
    lines.append(f"| cosine to the original | | 1 | {cosines[0]:.3f} | | {cosines[1]:.3f} | |")
    text = "\n".join([*lines, ""])
    (HERE / "side_by_side.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
