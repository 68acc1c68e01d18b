"""Table 3's layout on the toy world: classification, probe, retrieval and drift, before and after.

    python benchmarks/retention.py        runs of toy_seeds.py and drift_study.py → retention.md

What a user would type is `python toyworld.py classes FOLDER`, then `python eval_zeroshot.py
--classify FOLDER --captions FOLDER/captions.json --probe --layers --model … --model …`; this is the
same code.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval_zeroshot as ez  # noqa: E402
import toyworld  # noqa: E402
from judge import load_judges  # noqa: E402

RUNS = {  # seed 1 of each
    "flow, λ = 0.02": "drift0.02-seed1",
    "flow, λ = 0 (the paper)": "drift0-seed1",
    "perceiver, λ = 0.1": "perceiver-seed1",
    "perceiver, λ = 0 (the paper)": "perceiver_lambda0-seed1",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", default=str(ROOT / "runs"))
    args = parser.parse_args()
    models = [str(toyworld.TOY_DIR / "clip.safetensors")]
    models += [str(Path(args.runs) / run / "enhanced") for run in RUNS.values()]
    judges = load_judges(models, torch.device("cpu"), None)
    for judge, name in zip(judges, ["original", *RUNS], strict=True):
        judge.name = name
    with tempfile.TemporaryDirectory() as folder:
        toyworld.write_classes(folder)
        classes = ez.read_classes(folder, "")
        classes.title = "subject"
        captions = ez.read_captions(f"{folder}/captions.json", "")
        hits = ez.classify(judges, classes, [toyworld.PREFIX + " {}"])
        for name, tasks in ez.probe(judges, classes).items():
            hits[name] |= tasks
        for judge in judges:
            images, texts = judge.images(captions.pictures), judge.texts(captions.texts)
            found = ez.retrieval_hits(images, texts, captions.owner)
            hits[judge.name] |= {k: v for k, v in found.items() if k.endswith(("@1", "@5"))}
        rows, moved = ez.compare(hits), ez.drift(judges, classes.pictures, True)
        count = len(classes.pictures)
    text = ez.table3(rows) + "\n" + ez.drift_text(moved, "original", count)
    about = {
        "command": "python benchmarks/retention.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "torch": torch.__version__,
        "rows": rows,
        "drift": moved,
    }
    head = f"`{about['command']}`, {about['date']}, {about['machine']}, torch {about['torch']}.\n\n"
    (ROOT / "benchmarks" / "retention.json").write_text(json.dumps(about, indent=1))
    (ROOT / "benchmarks" / "retention.md").write_text(head + text)
    print(head + text)


if __name__ == "__main__":
    main()
