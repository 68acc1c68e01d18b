"""The toy result with its spread: stages 1 + 2 from several seeds, one benchmark, pooled
statistics.

    python benchmarks/toy_seeds.py                                   seeds 1 to 5 of the toy preset
    python benchmarks/toy_seeds.py --name perceiver --flags="--denoiser perceiver"
    python benchmarks/toy_seeds.py --name end_to_end --seeds 1 --flags="--end_to_end"
    python benchmarks/toy_seeds.py --name lambda0 --seeds 2 \\
        --flags="--drift_weight 0 --stage1_from runs/toy_seeds-seed{seed}"

Trains with train.py's own command line (so what is measured is what a user gets), scores every seed
on the same pairs (toy benchmark 0), and writes benchmarks/NAME.json and NAME.md. Runs that exist
are not trained again. The preset's settings were chosen with training seed 0 and toy benchmark 1:
seeds start at 1 here, and benchmark 0 was looked at only afterwards.

Pooling: the same pairs are scored for every seed, so pooled verdicts are not independent. Beside
the exact McNemar test on pooled counts stands a sign-flip test that treats each *pair* as one unit,
its net change summed over seeds: valid whatever the correlation between seeds.

Letters: R seeds, K pairs.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval_mmvp as ev  # noqa: E402
import toyworld  # noqa: E402
from backbones import load_clip  # noqa: E402
from scoring import mcnemar  # noqa: E402


def train(seed: int, args) -> Path:
    """One run by train.py (or the finished one); its folder."""
    run = Path(args.runs) / f"{args.name}-seed{seed}"
    command = [sys.executable, "train.py", "--runs", args.runs, "--name", run.name]
    command += ["--seed", str(seed), *shlex.split(args.flags.format(seed=seed))]
    if not (run / "enhanced" / "README.md").is_file():  # the last file that a run writes
        subprocess.run(command, cwd=ROOT, check=True)
    return run


def sign_flip(net: np.ndarray, draws: int = 100_000) -> float:
    """Two-sided p of the sum of `net` (one number a pair) under random signs."""
    net = net[net != 0].astype(np.float32)
    rng, extreme, chunk = np.random.default_rng(0), 0, 1000
    for _ in range(draws // chunk):
        signs = rng.integers(0, 2, (chunk, len(net)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ net) >= abs(net.sum())).sum())
    return (extreme + 1) / (draws + 1)


def spread(values: np.ndarray, sign: str = "") -> str:
    """mean ± standard deviation over seeds; one seed has no deviation."""
    deviation = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.1f}{deviation}"


def each(values: np.ndarray) -> str:
    return " ".join(f"{v:+.1f}" for v in values)


def measure_side(
    original: ev.Judge, enhanced: list[ev.Judge], mentioned: bool
) -> tuple[dict, list]:
    """Before and after on one half of the benchmark. Returns figures and lines of Markdown."""
    side = "mentioned" if mentioned else "unmentioned"
    items = ev.toy_items(mentioned, 100, seed=0)
    patterns = np.array([item.category for item in items])

    def verdicts(judge):
        return ev.score(judge, items, ev.TOY_TEMPLATE)["text-to-image"]

    before = verdicts(original)  # (K,)
    after = np.stack([verdicts(judge) for judge in enhanced])  # (R, K)
    won, lost, p = mcnemar(np.tile(before, len(after)), after.ravel())
    flip = sign_flip((after.astype(int) - before.astype(int)).sum(0))
    figures = {"won": won, "lost": lost, "mcnemar_pooled_p": p, "sign_flip_p": flip, "rows": []}
    lines = [f"**Toy benchmark, {side} subjects**", ""]
    lines += [
        "| pattern | n | before | after | change | change per seed |",
        "|---|---|---|---|---|---|",
    ]
    for pattern in [*toyworld.PATTERNS, "Average"]:
        mask = np.array([pattern in (q, "Average") for q in patterns])
        b, a = 100 * before[mask].mean(), 100 * after[:, mask].mean(1)  # a: (R,)
        figures["rows"].append(
            {"pattern": pattern, "n": int(mask.sum()), "before": b, "after": a.tolist()}
        )
        lines.append(
            f"| {pattern} | {mask.sum()} | {b:.1f} | {spread(a)} | {spread(a - b, '+')} | "
            f"{each(a - b)} |"
        )
    tests = f"exact McNemar p = {p:.2g}; sign-flip over pairs p = {flip:.2g}."
    lines += ["", f"Pooled over seeds: {won} pairs won, {lost} lost, {tests}", ""]
    return figures, lines


def measure_retention(original: ev.Judge, enhanced: list[ev.Judge]) -> tuple[dict, list]:
    """What it cost: subject zero-shot, probe, cosine. Returns figures and lines of Markdown."""
    held_out = toyworld.ToyScenes(ev.PROBE_TRAIN + ev.PROBE_TEST, seed=31_415_926)
    scenes = [held_out.scene(i) for i in range(len(held_out))]
    first, *others = [ev.toy_retention(judge, scenes) for judge in [original, *enhanced]]
    before = 100 * first["zero_shot"].mean()
    after = np.array([100 * o["zero_shot"].mean() for o in others])  # (R,)
    cosine = torch.nn.functional.cosine_similarity
    cosines = [float(cosine(first["features"], o["features"]).mean()) for o in others]
    probes = [100 * float(np.mean(list(o["probe"].values()))) for o in [first, *others]]
    figures = {
        "subject_zero_shot": {"n": len(scenes), "before": before, "after": after.tolist()},
        "cosine_to_original": cosines,
        "probe_unmentioned": probes,
    }
    lines = [
        f"| retention, n = {len(scenes)} scenes | before | after | change | change per seed |",
        "|---|---|---|---|---|",
        f"| subject zero-shot | {before:.1f} | {spread(after)} | {spread(after - before, '+')} | "
        f"{each(after - before)} |",
        f"| linear probe, unmentioned | {probes[0]:.1f} | {spread(np.array(probes[1:]))} | "
        f"{spread(np.array(probes[1:]) - probes[0], '+')} | "
        f"{each(np.array(probes[1:]) - probes[0])} |",
        "",
        f"Mean cosine to the original feature: {np.mean(cosines):.3f}.",
        "",
    ]
    return figures, lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--first_seed", type=int, default=1)
    parser.add_argument("--name", default="toy_seeds")
    parser.add_argument("--flags", default="", help="more flags of train.py; {seed} is filled in")
    parser.add_argument("--runs", default=str(ROOT / "runs"))
    args = parser.parse_args()
    seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    runs = [train(seed, args) for seed in seeds]

    device = torch.device("cpu")
    original = ev.Judge("original", *load_clip(str(toyworld.TOY_DIR / "clip.safetensors")), device)
    enhanced = [ev.Judge(run.name, *load_clip(str(run / "enhanced")), device) for run in runs]
    command = f"python benchmarks/toy_seeds.py --name {args.name} --seeds {args.seeds}"
    command += f' --flags="{args.flags}"' if args.flags else ""
    result = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "torch": torch.__version__,
        "seeds": seeds,
    }
    lines = [
        f"`{command}`, seeds {seeds[0]} to {seeds[-1]}, {result['date']}, {result['machine']}, "
        "torch "
        f"{result['torch']}. Percent of pairs; mean ± standard deviation over seeds.",
        "",
    ]
    for side, mentioned in (("unmentioned", False), ("mentioned", True)):
        result[side], more = measure_side(original, enhanced, mentioned)
        lines += more
    retention, more = measure_retention(original, enhanced)
    result |= retention
    lines += more
    (ROOT / "benchmarks" / f"{args.name}.json").write_text(json.dumps(result, indent=1))
    (ROOT / "benchmarks" / f"{args.name}.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
