"""Two committed results of toy_seeds.py in one table: continuous and discrete denoiser.

    python benchmarks/side_by_side.py                toy_seeds and perceiver → side_by_side.md

Nothing is measured here; both were scored on the same pairs and scenes.
"""

import json

import numpy as np
from report import HERE, parser, publish, spread, table

from util.cli import run_command

HEAD = ["", "n", "before", "continuous: after", "change", "discrete: after", "change"]


def read(name: str) -> dict:
    """Every figure of one result. Raises: FileNotFoundError where there is none."""
    file = HERE / f"{name}.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: toy_seeds.py --name {name} writes it")
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
    flags = parser(__doc__)
    flags.add_argument("--continuous", default="toy_seeds")
    flags.add_argument("--discrete", default="perceiver")
    args = flags.parse_args()
    names = args.continuous, args.discrete
    results = [read(name) for name in names]
    seeds = [", ".join(map(str, result["seeds"])) for result in results]
    sources = [f"[{name}](../benchmarks/{name}.md)" for name in names]
    first = (
        f"Percent right; mean ± standard deviation over seeds {seeds[0]} (continuous) and "
        f"{seeds[1]} (discrete). From {sources[0]} and {sources[1]}."
    )
    left, right = (rows(result) for result in results)
    if left.keys() != right.keys():
        odd = ", ".join(sorted(left.keys() ^ right.keys()))
        raise ValueError(f"only one of {names[0]} and {names[1]} has {odd}: run toy_seeds.py")
    cells = []
    for label, (n, before, after) in left.items():
        if right[label][:2] != (n, before):
            raise ValueError(f"{names[0]} and {names[1]}: {label} was scored on different pairs")
        line = [label, n, f"{before:.1f}"]
        for percent in (after, right[label][2]):
            line += [spread(percent), spread(percent - before, "+")]
        cells.append(line)
    cosines = [f"{np.mean(result['cosine_to_original']):.3f}" for result in results]
    cells.append(["cosine to the original", "", 1, cosines[0], "", cosines[1], ""])
    publish("side_by_side", [first, "", *table(HEAD, cells)])


if __name__ == "__main__":
    run_command(main)
