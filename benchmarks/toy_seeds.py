"""The toy result with its spread: stages 1 + 2 from several seeds, one benchmark, pooled
statistics.

    python benchmarks/toy_seeds.py                                   seeds 1 to 5 of the toy preset
    python benchmarks/toy_seeds.py --name perceiver --flags="--denoiser perceiver"
    python benchmarks/toy_seeds.py --name end_to_end --seeds 1 --flags="--end_to_end"
    python benchmarks/toy_seeds.py --name lambda0 --seeds 2 \\
        --flags="--drift_weight 0 --stage1_from runs/toy_seeds-seed{seed}"
    python benchmarks/toy_seeds.py --name NAME --strength 1.25   runs of before → NAME_scaled.md

Trains with train.py's own command line (so what is measured is what a user gets), scores every seed
on the same pairs (toy benchmark 0), and writes benchmarks/NAME.json and NAME.md. Runs that exist
are not trained again. The preset's settings were chosen with training seed 0 and toy benchmark 1:
seeds start at 1 here, and benchmark 0 was looked at only afterwards.

Pooling: the same pairs are scored for every seed, so pooled verdicts are not independent. Beside
the exact McNemar test on pooled counts stands a sign-flip test that treats each *pair* as one unit,
its net change summed over seeds: valid whatever the correlation between seeds.

Beside MMVP's verdicts stand group match, half the margin and the bias (evaluation/margins.py): did
a run see more, or does one picture win both texts less often? Every row of the JSON has them before
and after, seed by seed; medians are in cosine there and times 100 in the tables.

Letters: R seeds, K pairs.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from report import (
    CPU,
    ROOT,
    each,
    facts,
    headline,
    is_finished,
    parser,
    publish,
    spread,
    table,
    train,
)

from evaluation.encoder import Encoder, load_encoders
from evaluation.margins import measured
from evaluation.scoring import mcnemar, similarities
from toy.benchmark import TEMPLATE, held_out_scenes, pairs, retention
from toy.world import PATTERNS, TOY_DIR
from util.cli import run_command

COLUMNS = ["before", "after", "change", "change per seed"]
# Rows of the table of margins: key in the JSON → label. The first are percent, the last two cosine.
MARGINS = {
    "group match": "group match",
    "image-to-text": "image-to-text",
    "group": "group (Winoground)",
    "one image wins both": "one image wins both texts",
    "half margin": "median m/2, cosine × 100",
    "bias": "median bias, cosine × 100",
}
MEDIANS = ("half margin", "bias")


def compared(before: float, after: np.ndarray) -> list[str]:
    """The cells under `COLUMNS`. after: percent (R,)."""
    change = after - before
    return [f"{before:.1f}", spread(after), spread(change, "+"), each(change)]


def margin_figures(before: dict, after: list[dict], mask: np.ndarray) -> dict[str, dict]:
    """Measure → {"before", "after" (R)}: shares in percent, medians in cosine.

    Args: before, after: measure → one value a pair (K,), of `margins.measured`; mask: which pairs.
    """

    def figure(name: str, values: np.ndarray) -> float:
        chosen = values[mask]
        return float(np.median(chosen)) if name in MEDIANS else 100 * float(chosen.mean())

    return {
        name: {
            "before": figure(name, before[name]),
            "after": [figure(name, a[name]) for a in after],
        }
        for name in MARGINS
    }


def margin_lines(side: str, figures: dict[str, dict]) -> list[str]:
    """The table of `margin_figures` of all pairs of a side, as Markdown."""
    cells = []
    for name, label in MARGINS.items():
        scale = 100 if name in MEDIANS else 1
        b, a = scale * figures[name]["before"], scale * np.array(figures[name]["after"])
        cells.append([f"{label}, %" if scale == 1 else label, *compared(b, a)])
    return [f"**Margins, {side} subjects**", "", *table(["all pairs", *COLUMNS], cells), ""]


def sign_flip(net: np.ndarray, draws: int = 100_000) -> float:
    """Two-sided p of the sum of `net` (one number a pair) under random signs. Sums that are equal
    but for rounding, as of thirds, are ties, and ties count."""
    net = net[net != 0].astype(np.float32)
    least = abs(net.sum()) - 1e-5 * np.abs(net).sum()
    rng, extreme, chunk = np.random.default_rng(0), 0, 1000
    for _ in range(draws // chunk):
        signs = rng.integers(0, 2, (chunk, len(net)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ net) >= least).sum())
    return (extreme + 1) / (draws + 1)


def measure_side(
    original: Encoder, enhanced: list[Encoder], mentioned: bool
) -> tuple[dict, list[str]]:
    """Before and after on one half of the benchmark. Returns figures and lines of Markdown."""
    side = "mentioned" if mentioned else "unmentioned"
    items = pairs(mentioned, 100, seed=0)
    patterns = np.array([item.category for item in items])

    def pairs_of(encoder: Encoder) -> dict[str, np.ndarray]:
        shares, sizes = measured(similarities(encoder, items, TEMPLATE))
        return shares | sizes

    first, others = pairs_of(original), [pairs_of(encoder) for encoder in enhanced]
    before = first["official"]  # (K,)
    after = np.stack([other["official"] for other in others])  # (R, K)
    won, lost, p = mcnemar(np.tile(before, len(after)), after.ravel())
    flip = sign_flip((after.astype(int) - before.astype(int)).sum(0))
    figures = {"won": won, "lost": lost, "mcnemar_pooled_p": p, "sign_flip_p": flip, "rows": []}
    cells = []
    for pattern in [*PATTERNS, "Average"]:
        mask = np.array([pattern in (q, "Average") for q in patterns])
        n, b, a = int(mask.sum()), 100 * before[mask].mean(), 100 * after[:, mask].mean(1)
        row = {"pattern": pattern, "n": n, "before": b, "after": a.tolist()}
        figures["rows"].append(row | {"margins": margin_figures(first, others, mask)})
        cells.append([pattern, n, *compared(b, a)])
    lines = [f"**Toy benchmark, {side} subjects**", "", *table(["pattern", "n", *COLUMNS], cells)]
    tests = f"exact McNemar p = {p:.2g}; sign-flip over pairs p = {flip:.2g}."
    lines += ["", f"Pooled over seeds: {won} pairs won, {lost} lost, {tests}", ""]
    return figures, lines + margin_lines(side, figures["rows"][-1]["margins"])


def measure_retention(original: Encoder, enhanced: list[Encoder]) -> tuple[dict, list[str]]:
    """What it cost: subject zero-shot, probe, cosine. Returns figures and lines of Markdown."""
    scenes = held_out_scenes()
    first, *others = [retention(encoder, scenes) for encoder in [original, *enhanced]]
    before = 100 * first["zero_shot"].mean()
    after = np.array([100 * o["zero_shot"].mean() for o in others])  # (R,)
    cosines = [float(F.cosine_similarity(first["features"], o["features"]).mean()) for o in others]
    probes = [100 * float(np.mean(list(o["probe"].values()))) for o in [first, *others]]  # (1+R,)
    figures = {
        "subject_zero_shot": {"n": len(scenes), "before": before, "after": after.tolist()},
        "cosine_to_original": cosines,
        "probe_unmentioned": probes,
    }
    cells = [
        ["subject zero-shot", *compared(before, after)],
        ["linear probe, unmentioned", *compared(probes[0], np.array(probes[1:]))],
    ]
    lines = table([f"retention, n = {len(scenes)} scenes", *COLUMNS], cells)
    return figures, [*lines, "", f"Mean cosine to the original feature: {np.mean(cosines):.3f}."]


def scaled(run: Path, strength: float) -> Path:
    """The enhanced model of a run with its change of weights times `strength`, beside the run."""
    out = run.with_name(f"{run.name}-times{strength:g}")
    dial = ["--weights", f"{strength:g}", "--out", str(out)]
    command = [sys.executable, "-m", "training.blend", str(run), *dial]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise ValueError(f"run {run} could not be scaled; the line above says why")
    return out


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--seeds", type=int, default=5, help="how many")
    flags.add_argument("--first_seed", type=int, default=1)
    flags.add_argument("--name", default="toy_seeds")
    flags.add_argument("--flags", default="", help="more flags of train.py; {seed} is filled in")
    flags.add_argument("--strength", type=float, default=1.0, help="of the change of weights")
    flags.add_argument("--runs", default=str(ROOT / "runs"))
    args = flags.parse_args()
    seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    runs = [Path(args.runs) / f"{args.name}-seed{seed}" for seed in seeds]
    for run, seed in zip(runs, seeds, strict=True):
        if not is_finished(run):
            train(run, ["--seed", str(seed), *shlex.split(args.flags.format(seed=seed))])

    whole = args.strength == 1
    models = [run / "enhanced" if whole else scaled(run, args.strength) for run in runs]
    original, *enhanced = load_encoders([str(TOY_DIR / "clip.safetensors"), *map(str, models)], CPU)
    command = f"python benchmarks/toy_seeds.py --name {args.name} --seeds {args.seeds}"
    command += "" if whole else f" --strength {args.strength:g}"
    command += f" --first_seed {seeds[0]}" if seeds[0] != 1 else ""
    command += f' --flags="{args.flags}"' if args.flags else ""
    about = {"command": command, **facts(), "seeds": seeds}
    first = headline(command, about, f"seeds {seeds[0]} to {seeds[-1]}")
    lines = [f"{first}. Percent of pairs; mean ± standard deviation over seeds.", ""]
    for side, mentioned in (("unmentioned", False), ("mentioned", True)):
        about[side], more = measure_side(original, enhanced, mentioned)
        lines += more
    figures, more = measure_retention(original, enhanced)
    publish(args.name if whole else f"{args.name}_scaled", lines + more, about | figures)


if __name__ == "__main__":
    run_command(main)
