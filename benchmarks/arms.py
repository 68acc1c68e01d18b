"""The committed results of toy_seeds.py, one row an arm: what was gained, and what it cost.

    python benchmarks/arms.py                 → arms.md

Nothing is measured here; every arm was scored on the same pairs and scenes.
"""

import argparse
import json

import numpy as np
from report import HERE, parser, publish, spread, table

from util.cli import run_command

ARMS = {  # name of the benchmark: what it is
    "toy_seeds": "flow: two stages, λ = 0.02 (preset `toy`)",
    "lambda0": "flow: two stages, λ = 0 (the paper)",
    "end_to_end": "flow: end to end, λ = 0.02",
    "end_to_end_lambda0": "flow: end to end, λ = 0",
    "flow_along": "flow: two stages, trained along, λ = 0.08, 1000 steps",
    "flow_along_scaled": "the same, change of weights × 1.25",
    "joint": "both at once, trained along, λ = 0.2 (preset `toy`)",
    "joint_scaled": "the same, change of weights × 1.25",
    "perceiver": "perceiver: two stages, λ = 0.15 (preset `toy`)",
    "perceiver_lambda0": "perceiver: two stages, λ = 0 (the paper), earlier VQ-GAN",
    "perceiver_learnt": "perceiver: 32 learnt latents, λ = 0.1, earlier VQ-GAN",
}
HEAD = ["what", "seeds", "unmentioned", "mentioned", "subject zero-shot", "cosine", "date"]


def row(name: str, what: str) -> list[str]:
    """Points of change after − before, over seeds."""
    result = json.loads((HERE / f"{name}.json").read_text())
    cells = []
    for side in ("unmentioned", "mentioned"):
        average = next(r for r in result[side]["rows"] if r["pattern"] == "Average")
        cells.append(spread(np.array(average["after"]) - average["before"], "+"))
    subject = result["subject_zero_shot"]
    cells.append(spread(np.array(subject["after"]) - subject["before"], "+"))
    cosine = f"{np.mean(result['cosine_to_original']):.3f}"
    seeds = ", ".join(map(str, result["seeds"]))
    return [f"[{what}](../benchmarks/{name}.md)", seeds, *cells, cosine, result["date"]]


def main(args: argparse.Namespace) -> None:
    publish("arms", table(HEAD, [row(name, what) for name, what in ARMS.items()]))


if __name__ == "__main__":
    arguments = parser(__doc__).parse_args()
    run_command(lambda: main(arguments))
