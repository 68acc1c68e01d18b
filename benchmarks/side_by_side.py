"""Committed results of toy_seeds.py in one table: continuous, discrete, both denoisers at once, and
these with their change of weights scaled.

    python benchmarks/side_by_side.py   toy_seeds, perceiver, joint, joint_scaled → side_by_side.md

Nothing is measured here; all were scored on the same pairs and scenes.
"""

import json

import numpy as np
from report import HERE, parser, publish, spread, table

from util.cli import run_command

RESULTS = {
    "toy_seeds": "continuous",
    "perceiver": "discrete",
    "joint": "both at once",
    "joint_scaled": "both, × 1.25",
}


def read(name: str) -> dict:
    """Every figure of one result. Raises: FileNotFoundError where there is none."""
    file = HERE / f"{name}.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: toy_seeds.py writes it, see its examples")
    return json.loads(file.read_text())


def rows(result: dict) -> dict[str, tuple[int, float, np.ndarray]]:
    """label → (n, before, after per seed). Group match stands below the side that it belongs to; a
    result from before toy_seeds.py measured it has no such line."""
    found = {}
    for side in ("unmentioned", "mentioned"):
        for row in result[side]["rows"]:
            if side == "unmentioned" or row["pattern"] == "Average":
                label = row["pattern"] if row["pattern"] != "Average" else f"**{side}**"
                found[label] = row["n"], row["before"], np.array(row["after"])
                match = row.get("margins", {}).get("group match")
                if match and row["pattern"] == "Average":
                    label = f"group match, {side}"
                    found[label] = row["n"], match["before"], np.array(match["after"])
    row = result["subject_zero_shot"]
    found["**subject zero-shot**"] = row["n"], row["before"], np.array(row["after"])
    return found


def main() -> None:
    parser(__doc__).parse_args()
    results = {name: read(name) for name in RESULTS}
    seeds = {", ".join(map(str, result["seeds"])) for result in results.values()}
    if len(seeds) > 1:
        raise ValueError(f"results of different seeds: {' and '.join(sorted(seeds))}")
    sources = ", ".join(f"[{name}](../benchmarks/{name}.md)" for name in RESULTS)
    first = (
        "Percent right before; then points of change, mean ± standard deviation over seeds "
        f"{seeds.pop()}. From {sources}."
    )
    measured = {name: rows(result) for name, result in results.items()}
    cells = []
    for label, (n, before, _) in measured["toy_seeds"].items():
        line = [label, n, f"{before:.1f}"]
        for name, found in measured.items():
            if found.get(label, ())[:2] != (n, before):
                raise ValueError(f"{name}: {label} was not scored on the same: run toy_seeds.py")
            line.append(spread(found[label][2] - before, "+"))
        cells.append(line)
    cosines = [f"{np.mean(result['cosine_to_original']):.3f}" for result in results.values()]
    cells.append(["cosine to the original", "", 1, *cosines])
    publish("side_by_side", [first, "", *table(["", "n", "before", *RESULTS.values()], cells)])


if __name__ == "__main__":
    run_command(main)
