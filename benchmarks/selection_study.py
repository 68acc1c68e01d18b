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

from pathlib import Path

import numpy as np
from report import CPU, ROOT, facts, headline, parser, publish, table
from tqdm import tqdm

from evaluation.encoder import Encoder
from evaluation.scoring import score
from lora import inject_lora
from pretrained.backbones import load_clip
from toy.benchmark import TEMPLATE, pairs
from toy.world import TOY_DIR
from training.checkpoints import restore
from training.preflight import checkpoints_in
from util.cli import run_command

POOL = 400  # pairs per pattern
CHECKPOINTS = 25  # of every run: S
RULES = ("last", "validation", "test")
HEAD = [
    "pairs in the test set",
    "rule",
    "reported on the test set",
    "the same checkpoint on unseen pairs",
    "inflation, points [95 % of draws]",
]


def verdicts_of(run: Path, items: list, bar: tqdm) -> np.ndarray:
    """Right or wrong for every checkpoint of stage 2, bool (S, K)."""
    clip, info = load_clip(str(TOY_DIR / "clip.safetensors"))
    clip.requires_grad_(False)  # what trains is what a checkpoint holds: the adapters alone
    inject_lora(clip.visual)
    found = []
    for checkpoint in checkpoints_in(run / "stage2"):
        restore(clip, checkpoint)
        encoder = Encoder(checkpoint.name, clip, info, CPU)
        found.append(score(encoder, items, TEMPLATE)["text-to-image"])
        bar.update()
    return np.stack(found)


def simulate(verdicts: np.ndarray, per_pattern: int, draws: int) -> dict[str, dict]:
    """Apply the rules to many test sets. verdicts (R, S, K), K = 9 patterns of POOL pairs each."""
    rng = np.random.default_rng(0)
    runs, steps, count = verdicts.shape
    by_pattern = np.arange(count).reshape(-1, POOL)  # (9, POOL)
    sums: dict[str, list] = {rule: [] for rule in RULES}
    for draw in range(draws):
        shuffled = rng.permuted(by_pattern, axis=1)
        test = shuffled[:, :per_pattern].ravel()
        validation = shuffled[:, per_pattern : 2 * per_pattern].ravel()
        fresh = shuffled[:, 2 * per_pattern :].ravel()
        scores = verdicts[draw % runs]  # (S, K)
        on_test = 100 * scores[:, test].mean(1)  # (S,)
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
    flags = parser(__doc__)
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--runs", default=str(ROOT / "runs"))
    flags.add_argument("--draws", type=int, default=4000)
    args = flags.parse_args()
    items = pairs(False, POOL, seed=77)
    folders = [Path(args.runs) / f"drift0.02-seed{s}" for s in range(1, args.seeds + 1)]
    for folder in folders:
        if len(checkpoints_in(folder / "stage2")) < CHECKPOINTS:
            raise ValueError(
                f"{folder} lacks its {CHECKPOINTS} checkpoints: run benchmarks/drift_study.py first"
            )
    with tqdm(total=CHECKPOINTS * len(folders), unit="checkpoint") as bar:
        verdicts = np.stack([verdicts_of(folder, items, bar) for folder in folders])  # (R, S, K)
    command = f"python benchmarks/selection_study.py --seeds {args.seeds}"
    about = {"command": command, **facts(), "score_per_step": (100 * verdicts.mean(2)).tolist()}
    details = f"seeds 1 to {args.seeds}", f"{CHECKPOINTS} checkpoints each", f"{args.draws} draws"
    cells = []
    for per_pattern in (15, 100):
        count = 9 * per_pattern
        result = about[f"pairs_{count}"] = simulate(verdicts, per_pattern, args.draws)
        for rule, r in result.items():
            low, high = r["inflation_quantiles"]
            inflation = f"{r['inflation']:+.2f} [{low:+.1f}, {high:+.1f}]"
            cells.append([count, rule, f"{r['reported']:.1f}", f"{r['true']:.1f}", inflation])
    first = headline(command, about, *details) + ". Percent of pairs."
    publish("selection_study", [first, "", *table(HEAD, cells)], about)


if __name__ == "__main__":
    run_command(main)
