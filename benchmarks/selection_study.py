"""How much does picking the best of many checkpoints on the test set inflate its score?

    python benchmarks/selection_study.py        the runs of drift_study.py with λ = 0.02

Stage 2 leaves 25 checkpoints (the official runs leave two dozen and name no rule). Three rules:

    last          the last step; decided before the run
    validation    the best on a validation set of pairs; the rule, too, is decided before the run
    test          the best on the test set itself

Every checkpoint is scored on a large pool of toy pairs. Then 4000 times: draw a test set and a
validation set of MMVP-VLM's size (15 pairs per pattern, 135 pairs) from the pool, apply each rule,
and look at the chosen checkpoint's score on the test set and on the rest of the pool, which no rule
has seen. Their difference is what the rule adds that is not there. The same is done at 900 pairs.

Letters: S checkpoints, R seeds, K pairs of the pool.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoints as ckpt  # noqa: E402
import eval_mmvp as ev  # noqa: E402
import toyworld  # noqa: E402
from backbones import load_clip  # noqa: E402
from judge import Judge  # noqa: E402
from lora import inject_lora  # noqa: E402

POOL = 400  # pairs per pattern
RULES = ("last", "validation", "test")


def verdicts_of(run: Path, items: list, bar: tqdm) -> np.ndarray:
    """Right or wrong for every checkpoint of stage 2, bool (S, K)."""
    clip, info = load_clip(str(toyworld.TOY_DIR / "clip.safetensors"))
    inject_lora(clip.visual)
    found = []
    for checkpoint in ckpt.checkpoints_in(run / "stage2"):
        trained = {
            name.removeprefix("visual."): t for name, t in ckpt.read_trained(checkpoint).items()
        }
        ckpt.put(clip.visual, trained, set(trained), str(checkpoint))
        judge = Judge(checkpoint.name, clip, info, torch.device("cpu"))
        found.append(ev.score(judge, items, ev.TOY_TEMPLATE)["text-to-image"])
        bar.update()
    return np.stack(found)


def simulate(verdicts: np.ndarray, per_pattern: int, draws: int) -> dict[str, dict]:
    """Apply the rules to many test sets. verdicts (R, S, K), K = 9 patterns of POOL pairs each."""
    rng = np.random.default_rng(0)
    runs, steps, pairs = verdicts.shape
    by_pattern = np.arange(pairs).reshape(-1, POOL)
    sums: dict[str, list] = {rule: [] for rule in RULES}
    for draw in range(draws):
        shuffled = rng.permuted(by_pattern, axis=1)
        test = shuffled[:, :per_pattern].ravel()
        validation = shuffled[:, per_pattern : 2 * per_pattern].ravel()
        fresh = shuffled[:, 2 * per_pattern :].ravel()
        scores = verdicts[draw % runs]  # (S, K)
        on_test = 100 * scores[:, test].mean(1)
        chosen = {
            "last": steps - 1,
            "validation": int(scores[:, validation].mean(1).argmax()),
            "test": int(on_test.argmax()),
        }
        for rule, step in chosen.items():
            sums[rule].append((on_test[step], 100 * scores[step, fresh].mean()))
    return {
        rule: {
            "reported": float(np.mean([a for a, _ in values])),
            "true": float(np.mean([b for _, b in values])),
            "inflation": float(np.mean([a - b for a, b in values])),
            "inflation_quantiles": np.quantile([a - b for a, b in values], (0.025, 0.975)).tolist(),
        }
        for rule, values in sums.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", default=str(ROOT / "runs"))
    parser.add_argument("--draws", type=int, default=4000)
    args = parser.parse_args()
    items = ev.toy_items(False, POOL, seed=77)
    folders = [Path(args.runs) / f"drift0.02-seed{s}" for s in range(1, args.seeds + 1)]
    missing = next((f for f in folders if len(ckpt.checkpoints_in(f / "stage2")) < 25), None)
    if missing:
        sys.exit(f"{missing} lacks its 25 checkpoints: run benchmarks/drift_study.py first")
    with tqdm(total=25 * len(folders), unit="checkpoint") as bar:
        verdicts = np.stack([verdicts_of(folder, items, bar) for folder in folders])  # (R, S, K)
    about = {
        "command": f"python benchmarks/selection_study.py --seeds {args.seeds}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "torch": torch.__version__,
        "score_per_step": (100 * verdicts.mean(2)).tolist(),
    }
    lines = [
        f"`{about['command']}`, seeds 1 to {args.seeds}, 25 checkpoints each, {args.draws} draws, "
        f"{about['date']}, {about['machine']}, torch {about['torch']}. Percent of pairs.",
        "",
        "| pairs in the test set | rule | reported on the test set | the same checkpoint on unseen "
        "pairs | inflation, points [95 % of draws] |",
        "|---|---|---|---|---|",
    ]
    for per_pattern in (15, 100):
        result = about[f"pairs_{9 * per_pattern}"] = simulate(verdicts, per_pattern, args.draws)
        for rule, r in result.items():
            low, high = r["inflation_quantiles"]
            lines.append(
                f"| {9 * per_pattern} | {rule} | {r['reported']:.1f} | {r['true']:.1f} | "
                f"{r['inflation']:+.2f} [{low:+.1f}, {high:+.1f}] |"
            )
    (ROOT / "benchmarks" / "selection_study.json").write_text(json.dumps(about, indent=1))
    (ROOT / "benchmarks" / "selection_study.md").write_text("\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
