"""λ of Eq. (5) as a dial: what does staying near the original cost in benchmark points, and what
does it save in zero-shot accuracy?

    pip install -r requirements-benchmarks.txt     matplotlib, for the curve
    python benchmarks/drift_study.py               λ = 0 … 0.5, seeds 1 to 3 → drift_study.md, and
                                                   docs/drift_study.png

Five values of λ, three seeds; all λ of a seed share one stage 1, so they differ in nothing but the
drift term. Trains what is missing with train.py's own command line; where toy_seeds.py has run,
stage 1 is its. Every change is measured on the same pairs and scenes as before; intervals resample
pairs (or scenes), which are what a benchmark is a sample of, with all seeds of a pair kept
together. The spread over seeds stands beside them.

Letters: R seeds, K pairs or scenes.
"""

import io
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from report import CPU, ROOT, facts, headline, is_finished, parser, publish, table, train

from evaluation.encoder import Encoder, load_encoders
from evaluation.scoring import score
from settings import Settings, relevant
from toy.benchmark import TEMPLATE, held_out_scenes, pairs, retention
from toy.world import TOY_DIR
from training.preflight import checkpoints_in, read_state
from util.cli import run_command
from util.files import write_atomically

try:  # an extra: nothing else here draws curves
    from matplotlib.figure import Figure
except ImportError:
    Figure = None

VALUES = ("0", "0.005", "0.02", "0.1", "0.5")
MEASURES = ("unmentioned", "mentioned", "zero_shot")
HEAD = ["λ", "unmentioned", "mentioned", "subject zero-shot", "cosine to the original"]


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------
def stage1_of(seed: int, runs: Path) -> Path:
    """A run that holds the toy preset's stage 1 of this seed, trained if there is none."""
    settings = Settings.of("toy", seed=seed)
    wanted, shared = relevant(settings, 1), runs / f"study-seed{seed}"
    for run in (runs / f"toy_seeds-seed{seed}", shared):
        found = checkpoints_in(run / "stage1")
        state = read_state(found[-1]) if found else {"step": 0}
        # A run of that name may have been given other flags: then it is not the same stage 1.
        if state["step"] == settings.stage1_steps and wanted.items() <= state["settings"].items():
            return run
    train(shared, ["--seed", str(seed), "--stage", "1"])
    return shared


def run_of(value: str, seed: int, runs: Path) -> Path:
    """The run of one λ and seed, trained if it is not there."""
    run = runs / f"drift{value}-seed{seed}"
    if not is_finished(run):
        flags = ["--seed", str(seed), "--stage", "2", "--stage1_from", str(stage1_of(seed, runs))]
        train(run, [*flags, "--drift_weight", value, "--save_every", "16", "--keep", "25"])
    return run


# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------
def resampled(net: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean of `net` (K,), by resampling pairs."""
    rng = np.random.default_rng(0)
    values, counts = np.unique(net, return_counts=True)  # few values: resample their counts
    means = rng.multinomial(len(net), counts / len(net), draws) @ values / len(net)
    return tuple(100 * np.quantile(means, (0.025, 0.975)))


def measure(runs: dict[str, list[Path]]) -> list[dict]:
    """One row per λ, from its runs."""
    sides = {"unmentioned": pairs(False, 100, seed=0), "mentioned": pairs(True, 100, seed=0)}
    scenes = held_out_scenes()

    def look(encoder: Encoder) -> dict:
        """Verdicts, bool (K,), on both halves of the benchmark and on subjects; features."""
        found = {s: score(encoder, items, TEMPLATE)["text-to-image"] for s, items in sides.items()}
        return found | retention(encoder, scenes)

    [original] = load_encoders([str(TOY_DIR / "clip.safetensors")], CPU)
    before, rows = look(original), []
    for value, folders in runs.items():
        encoders = load_encoders([str(folder / "enhanced") for folder in folders], CPU)
        after = [look(encoder) for encoder in encoders]
        row: dict = {"lambda": float(value), "seeds": len(folders)}
        for what in MEASURES:
            net = np.stack([a[what].astype(float) - before[what] for a in after])  # (R, K)
            row[what] = {
                "change_per_seed": (100 * net.mean(1)).tolist(),
                "change": 100 * net.mean(),
                "interval": resampled(net.mean(0)),
            }
        cosines = [F.cosine_similarity(before["features"], a["features"]).mean() for a in after]
        row["cosine"] = [float(cosine) for cosine in cosines]
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------
# Saying it
# ------------------------------------------------------------------------------------------------
def curve(rows: list[dict], file: Path) -> None:
    """Benchmark gain (up) against the change of subject zero-shot (right), a cross of intervals per
    λ."""
    # A Figure of its own draws with Agg: no screen is asked for.
    figure = Figure(figsize=(6.4, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    across, up = ([row[what] for row in rows] for what in ("zero_shot", "unmentioned"))
    x, y = ([m["change"] for m in side] for side in (across, up))
    axes.plot(x, y, color="#9bc", zorder=1)
    axes.hlines(y, *zip(*(m["interval"] for m in across), strict=True), color="#246")
    axes.vlines(x, *zip(*(m["interval"] for m in up), strict=True), color="#246")
    axes.plot(x, y, "o", color="#246")
    for row, *point in zip(rows, x, y, strict=True):
        axes.annotate(f"λ = {row['lambda']:g}", point, (7, -13), textcoords="offset points")
    axes.margins(x=0.14)  # room for the labels
    axes.axhline(0, color="#bbb", zorder=0)
    axes.axvline(0, color="#bbb", zorder=0)
    axes.grid(color="#eee")
    axes.set_axisbelow(True)
    axes.set_xlabel("change of subject zero-shot, points (right: nothing lost)")
    axes.set_ylabel("change on unmentioned pairs, points")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(file, content.getvalue())


def cells(row: dict) -> list[str]:
    """One line of the table."""
    line = [f"{row['lambda']:g}"]
    for what in MEASURES:
        change, (low, high) = row[what]["change"], row[what]["interval"]
        deviation = np.std(row[what]["change_per_seed"], ddof=1) if row["seeds"] > 1 else 0.0
        line.append(f"{change:+.1f} [{low:+.1f}, {high:+.1f}] ± {deviation:.1f}")
    return [*line, f"{np.mean(row['cosine']):.3f}"]


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--runs", default=str(ROOT / "runs"))
    args = flags.parse_args()
    if Figure is None:  # said before an hour of training, not after it
        raise ValueError("the curve needs matplotlib: pip install -r requirements-benchmarks.txt")
    seeds, folder = range(1, args.seeds + 1), Path(args.runs)
    rows = measure({value: [run_of(value, seed, folder) for seed in seeds] for value in VALUES})
    command, about = f"python benchmarks/drift_study.py --seeds {args.seeds}", facts()
    first = (
        f"{headline(command, about, f'seeds 1 to {args.seeds}')}. Change in points [95 % interval "
        "over pairs or scenes] ± standard deviation over seeds; 900 unmentioned pairs, 900 "
        "mentioned, 4500 scenes."
    )
    lines = [first, "", *table(HEAD, map(cells, rows))]
    publish("drift_study", lines, {"command": command, **about, "rows": rows})
    curve(rows, ROOT / "docs" / "drift_study.png")


if __name__ == "__main__":
    run_command(main)
