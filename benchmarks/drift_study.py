"""λ of Eq. (5) as a dial: what does staying near the original cost in benchmark points, and what
does it save in zero-shot accuracy?

    python benchmarks/drift_study.py               λ = 0 … 0.5, seeds 1 to 3 → drift_study.md, .png

Five values of λ, three seeds; all λ of a seed share one stage 1, so they differ in nothing but the
drift term. Trains what is missing with train.py's own command line. Every change is measured on the
same pairs and scenes as before; intervals resample pairs (or scenes), which are what a benchmark is
a sample of, with all seeds of a pair kept together. The spread over seeds stands beside them.

Letters: R seeds, K pairs.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval_mmvp as ev  # noqa: E402
import toyworld  # noqa: E402
from judge import Judge, load_judges  # noqa: E402

VALUES = ("0", "0.005", "0.02", "0.1", "0.5")


def train(value: str, seed: int, runs: str) -> Path:
    """The run of one λ and seed, trained if it is not there; stage 1 is shared."""
    shared, run = Path(runs) / f"study-seed{seed}", Path(runs) / f"drift{value}-seed{seed}"
    command = [sys.executable, "train.py", "--runs", runs, "--seed", str(seed)]
    if not (run / "enhanced" / "README.md").is_file():
        first = [*command, "--name", shared.name, "--stage", "1"]
        subprocess.run(first, cwd=ROOT, check=True)
        second = ["--name", run.name, "--stage", "2", "--stage1_from", str(shared)]
        second += ["--drift_weight", value, "--save_every", "16", "--keep", "25"]
        subprocess.run([*command, *second], cwd=ROOT, check=True)
    return run


def resampled(net: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean of `net` (one number a pair), by resampling pairs."""
    rng = np.random.default_rng(0)
    values, counts = np.unique(net, return_counts=True)  # few values: resample their counts
    means = rng.multinomial(len(net), counts / len(net), draws) @ values / len(net)
    return tuple(100 * np.quantile(means, (0.025, 0.975)))


def changes(judge: Judge, items: dict, scenes: list) -> dict[str, np.ndarray]:
    """Verdicts (bool) on both halves of the benchmark and on subjects; features of the scenes."""
    found = {
        side: ev.score(judge, group, ev.TOY_TEMPLATE)["text-to-image"]
        for side, group in items.items()
    }
    retention = ev.toy_retention(judge, scenes)
    return found | {"zero_shot": retention["zero_shot"], "features": retention["features"]}


def measure(runs: dict[str, list[Path]]) -> list[dict]:
    """One row per λ."""
    items = {
        "unmentioned": ev.toy_items(False, 100, seed=0),
        "mentioned": ev.toy_items(True, 100, seed=0),
    }
    held_out = toyworld.ToyScenes(ev.PROBE_TRAIN + ev.PROBE_TEST, seed=31_415_926)
    scenes = [held_out.scene(i) for i in range(len(held_out))]
    cpu = torch.device("cpu")
    [original] = load_judges([str(toyworld.TOY_DIR / "clip.safetensors")], cpu, None)
    before, rows = changes(original, items, scenes), []
    for value, folders in runs.items():
        judges = load_judges([str(folder / "enhanced") for folder in folders], cpu, None)
        after = [changes(judge, items, scenes) for judge in judges]
        row: dict = {"lambda": float(value), "seeds": len(folders)}
        for what in ("unmentioned", "mentioned", "zero_shot"):
            net = np.stack([a[what].astype(float) - before[what] for a in after])  # (R, K)
            row[what] = {
                "change_per_seed": (100 * net.mean(1)).tolist(),
                "change": 100 * net.mean(),
                "interval": resampled(net.mean(0)),
            }
        cosine = torch.nn.functional.cosine_similarity
        row["cosine"] = [float(cosine(before["features"], a["features"]).mean()) for a in after]
        rows.append(row)
    return rows


def curve(rows: list[dict], file: Path) -> None:
    """Benchmark gain (up) against the change of subject zero-shot (right), a cross of intervals per
    λ."""
    width, height, left, bottom = 640, 420, 70, 60
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    xs = [x for r in rows for x in r["zero_shot"]["interval"]] + [0]
    ys = [y for r in rows for y in r["unmentioned"]["interval"]] + [0]
    x0, x1, y0, y1 = min(xs) - 0.5, max(xs) + 0.5, min(ys) - 0.5, max(ys) + 0.5

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x0) / (x1 - x0) * (width - left - 100)
        return across, height - bottom - (y - y0) / (y1 - y0) * (height - bottom - 20)

    for x in range(int(np.ceil(x0)), int(x1) + 1, max(1, round((x1 - x0) / 8))):
        draw.line([at(x, y0), at(x, y1)], fill="#eee")
        draw.text((at(x, y0)[0] - 8, height - bottom + 6), f"{x:+d}", fill="black")
    for y in range(int(np.ceil(y0)), int(y1) + 1, max(1, round((y1 - y0) / 8))):
        draw.line([at(x0, y), at(x1, y)], fill="#eee")
        draw.text((left - 30, at(x0, y)[1] - 6), f"{y:+d}", fill="black")
    centers = [at(r["zero_shot"]["change"], r["unmentioned"]["change"]) for r in rows]
    draw.line(centers, fill="#9bc", width=2)
    for row, (x, y) in zip(rows, centers, strict=True):
        (a, b), (c, d) = row["zero_shot"]["interval"], row["unmentioned"]["interval"]
        gain, cost = row["unmentioned"]["change"], row["zero_shot"]["change"]
        draw.line([at(a, gain), at(b, gain)], fill="#246", width=2)
        draw.line([at(cost, c), at(cost, d)], fill="#246", width=2)
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill="#246")
        draw.text((x + 7, y + 4), f"lambda {row['lambda']:g}", fill="black")
    draw.text((left, height - 26), "change of subject zero-shot, points (right: nothing lost)",
              fill="black")  # fmt: skip
    draw.text((8, 4), "change on unmentioned pairs, points", fill="black")
    image.save(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", default=str(ROOT / "runs"))
    args = parser.parse_args()
    seeds = range(1, args.seeds + 1)
    runs = {v: [train(v, seed, args.runs) for seed in seeds] for v in VALUES}
    rows = measure(runs)
    about = {
        "command": f"python benchmarks/drift_study.py --seeds {args.seeds}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "torch": torch.__version__,
        "rows": rows,
    }
    lines = [
        f"`{about['command']}`, seeds 1 to {args.seeds}, {about['date']}, {about['machine']}, "
        f"torch {about['torch']}. Change in points [95 % interval over pairs or scenes] ± standard "
        "deviation over seeds; 900 unmentioned pairs, 900 mentioned, 4500 scenes.",
        "",
        "| λ | unmentioned | mentioned | subject zero-shot | cosine to the original |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = []
        for what in ("unmentioned", "mentioned", "zero_shot"):
            r = row[what]
            deviation = np.std(r["change_per_seed"], ddof=1) if args.seeds > 1 else 0.0
            low, high = r["interval"]
            cells.append(f"{r['change']:+.1f} [{low:+.1f}, {high:+.1f}] ± {deviation:.1f}")
        lines.append(f"| {row['lambda']:g} | {' | '.join(cells)} | {np.mean(row['cosine']):.3f} |")
    (ROOT / "benchmarks" / "drift_study.json").write_text(json.dumps(about, indent=1))
    (ROOT / "benchmarks" / "drift_study.md").write_text("\n".join([*lines, ""]))
    curve(rows, ROOT / "docs" / "drift_study.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
