"""Table 3's layout on the toy world: classification, probe, retrieval and drift, before and after.

    python benchmarks/retention.py        runs of toy_seeds.py and drift_study.py → retention.md

What a user would type is `python -m toy.benchmark classes FOLDER`, then `python eval_zeroshot.py
--classify FOLDER --captions FOLDER/captions.json --probe --layers --model … --model …`; this is the
same code.
"""

import tempfile
from pathlib import Path

from report import CPU, ROOT, facts, headline, is_finished, parser, publish

from eval_zeroshot import compare, drift, drift_text, read_captions, read_classes, table3, verdicts
from evaluation.encoder import load_encoders
from toy.benchmark import TEMPLATE, write_classes
from toy.world import TOY_DIR
from util.cli import run_command

RUNS = {  # seed 1 of each
    "flow, λ = 0.02": "drift0.02-seed1",
    "flow, λ = 0 (the paper)": "drift0-seed1",
    "perceiver, λ = 0.15": "perceiver-seed1",
    "perceiver, λ = 0 (the paper)": "perceiver_lambda0-seed1",
}


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--runs", default=str(ROOT / "runs"))
    args = flags.parse_args()
    runs = [Path(args.runs) / run for run in RUNS.values()]
    for run in runs:
        if not is_finished(run):
            raise ValueError(f"{run} is not there: run drift_study.py and toy_seeds.py first")
    models = [TOY_DIR / "clip.safetensors", *(run / "enhanced" for run in runs)]
    encoders = load_encoders([str(model) for model in models], CPU)
    for encoder, name in zip(encoders, ["original", *RUNS], strict=True):
        encoder.name = name
    with tempfile.TemporaryDirectory() as folder:
        write_classes(folder)
        classes = read_classes(folder, "")
        classes.title = "subject"
        captions = read_captions(f"{folder}/captions.json", "")
        found = verdicts(encoders, [classes], [captions], [TEMPLATE], with_probe=True)
        moved = drift(encoders, classes.pictures, per_layer=True)
    # One set of captions, whose name says nothing; recall@10 of so few pictures says little more.
    hits = {
        name: {
            task.removeprefix(f"{captions.title} "): right
            for task, right in tasks.items()
            if not task.endswith("@10")
        }
        for name, tasks in found.items()
    }
    rows = compare(hits)
    text = table3(rows) + "\n" + drift_text(moved, "original", len(classes.pictures))
    command, about = "python benchmarks/retention.py", facts()
    lines = [f"{headline(command, about)}.", "", text]
    publish("retention", lines, {"command": command, **about, "rows": rows, "drift": moved})


if __name__ == "__main__":
    run_command(main)
