"""The toy result with its spread: stages 1 + 2 from several seeds, one benchmark, pooled
statistics.

    python benchmarks/toy_seeds.py --seeds 5
    python benchmarks/toy_seeds.py --seeds 3 --name end_to_end --flags "--end_to_end"

Trains with train.py's own command line (so what is measured is what a user gets), scores every seed
on the same pairs (toy benchmark 0, which no choice of settings has looked at), and writes
benchmarks/NAME.json and NAME.md. Runs that exist already are not trained again.

Pooling: the same pairs are scored for every seed, so pooled verdicts are not independent. Beside
the exact McNemar test on pooled counts stands a sign-flip test that treats each *pair* as one unit,
its net change summed over seeds: valid whatever the correlation between seeds.
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
    """One run by train.py; its folder."""
    name = f"{args.name}-seed{seed}"
    command = [
        sys.executable,
        "train.py",
        "--runs",
        args.runs,
        "--name",
        name,
        "--seed",
        str(seed),
        *shlex.split(args.flags),
    ]
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(args.threads)} if args.threads else {})}
    if args.eval_only:
        return Path(args.runs) / name
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return Path(args.runs) / name


def sign_flip(net: np.ndarray, draws: int = 100_000) -> float:
    """Two-sided p of the mean of `net` (one number a pair) under random signs."""
    net = net[net != 0].astype(np.float32)
    rng, extreme, chunk = np.random.default_rng(0), 0, 1000
    for _ in range(draws // chunk):
        signs = rng.integers(0, 2, (chunk, len(net)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ net) >= abs(net.sum())).sum())
    return (extreme + 1) / (draws + 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--name", default="toy_seeds")
    parser.add_argument("--flags", default="", help="further flags of train.py, in one string")
    parser.add_argument("--runs", default=str(ROOT / "runs"))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument(
        "--eval_only", action="store_true", help="the runs are there: only score them"
    )
    args = parser.parse_args()
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    runs = [train(seed, args) for seed in seeds]
    measure(args, seeds, runs)


def measure(args, seeds, runs: list[Path]) -> None:
    """Score original and enhanced models and write the tables."""
    device = torch.device("cpu")
    original = ev.Judge("original", *load_clip(str(toyworld.TOY_DIR / "clip.safetensors")), device)
    enhanced = [
        ev.Judge(f"seed {s}", *load_clip(str(r / "enhanced")), device)
        for s, r in zip(seeds, runs, strict=True)
    ]
    held_out = toyworld.ToyScenes(ev.PROBE_TRAIN + ev.PROBE_TEST, seed=31_415_926)
    scenes = [held_out.scene(i) for i in range(len(held_out))]
    result = {
        "command": f"python benchmarks/toy_seeds.py --seeds {len(runs)} --name {args.name}"
        + (f' --flags "{args.flags}"' if args.flags else ""),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "torch": torch.__version__,
        "seeds": list(seeds),
        "sides": {},
    }
    lines = [
        f"# {args.name}",
        "",
        f"`{result['command']}`, {result['date']}, {result['machine']}, "
        f"torch {result['torch']}. Percent correct; after is mean ± standard deviation over seeds.",
        "",
    ]
    for side, mentioned in (("unmentioned", False), ("mentioned", True)):
        pairs = toyworld.benchmark(mentioned, 100, seed=0)
        patterns = np.array([p.pattern for p in pairs])
        before = ev.score(original, pairs)
        after = np.stack([ev.score(judge, pairs) for judge in enhanced])  # (seeds, K)
        won, lost, p = mcnemar(np.tile(before, len(after)), after.ravel())
        net = (after.astype(int) - before.astype(int)).sum(0)  # per pair, over seeds
        rows = []
        for pattern in [*toyworld.PATTERNS, "Average"]:
            mask = np.array([pattern in (q, "Average") for q in patterns])
            b, a = 100 * before[mask].mean(), 100 * after[:, mask].mean(1)
            rows.append(
                {
                    "pattern": pattern,
                    "n": int(mask.sum()),
                    "before": b,
                    "after": a.tolist(),
                    "change_mean": float((a - b).mean()),
                    "change_std": float(np.std(a - b, ddof=1)),
                }
            )
        result["sides"][side] = {
            "rows": rows,
            "won": won,
            "lost": lost,
            "mcnemar_pooled_p": p,
            "sign_flip_p": sign_flip(net),
        }
        lines += [
            f"**{side} subjects**",
            "",
            "| pattern | n | before | after | change | change per seed |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            a = np.array(row["after"])
            each = " ".join(f"{x - row['before']:+.1f}" for x in a)
            lines.append(
                f"| {row['pattern']} | {row['n']} | {row['before']:.1f} | {a.mean():.1f} ± "
                f"{a.std(ddof=1):.1f} | {row['change_mean']:+.1f} ± {row['change_std']:.1f} | "
                f"{each} |"
            )
        lines += [
            "",
            f"Pooled over seeds: {won} pairs won, {lost} lost, exact McNemar p = {p:.2g}; "
            "sign-flip over "
            f"pairs p = {result['sides'][side]['sign_flip_p']:.2g}.",
            "",
        ]
    first = ev.toy_retention(original, scenes)
    zero = [ev.toy_retention(judge, scenes) for judge in enhanced]
    b, a = 100 * first["zero_shot"].mean(), np.array([100 * z["zero_shot"].mean() for z in zero])
    cosine = [
        float(torch.nn.functional.cosine_similarity(first["features"], z["features"]).mean())
        for z in zero
    ]
    probe = [100 * float(np.mean(list(z["probe"].values()))) for z in [first, *zero]]
    result["subject_zero_shot"] = {
        "n": len(scenes),
        "before": b,
        "after": a.tolist(),
        "change_mean": float((a - b).mean()),
        "change_std": float(np.std(a - b, ddof=1)),
    }
    result["cosine_to_original"], result["probe_unmentioned"] = cosine, probe
    lines += [
        f"**Retention** (n = {len(scenes)} scenes): subject zero-shot {b:.1f} → {a.mean():.1f} ± "
        f"{a.std(ddof=1):.1f} ({(a - b).mean():+.1f}; per seed "
        f"{' '.join(f'{x - b:+.1f}' for x in a)}); linear "
        f"probe of attributes on unmentioned subjects {probe[0]:.1f} → {np.mean(probe[1:]):.1f}; "
        "mean cosine to "
        f"the original feature {np.mean(cosine):.3f}.",
        "",
    ]
    (ROOT / "benchmarks" / f"{args.name}.json").write_text(json.dumps(result, indent=1))
    (ROOT / "benchmarks" / f"{args.name}.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
