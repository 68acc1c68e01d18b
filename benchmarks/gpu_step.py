"""What does a full-size step cost on a GPU, and what does each option buy?

    python benchmarks/gpu_step.py               → gpu_step.json and .md; one GPU of 80 GB, minutes
                                                (without a GPU: the same table, "not run here")
    python benchmarks/gpu_step.py --quick       the same code at toy size, on whatever is there

A step of stage 1 and of stage 2 at 2, 16 and 32 images, on the very `train_step` of train.py, with
weights of the published shapes and random values (time does not depend on them) and random pictures
that are already in memory. Each row adds one option to the row "none", "all" takes all of them. One
model at a time fits, so the rows of a size run one after the other, and "none" once more at the end
shows what time alone did. Share of the peak: the floating-point operations that
``--plan`` counts, over the time, over the device's dense bf16 peak.

"As the official recipe" is what its choices cost on this code: bf16 autocast, the tokenizer in bf16
as well, nothing compiled, two pieces of each batch accumulated. Its own code is not run.
"""

import argparse
import statistics
import time

import torch
from report import facts, headline, parser, publish, table

from settings import Settings
from train import train_step
from training import speed
from training.plan import make_plan, skeleton
from training.process import Process
from training.stages import Draws, begin
from util.cli import run_command

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, FLOP/s
OPTIONS = {
    "none": {"frozen_dtype": "fp32"},
    "frozen matrices in bf16": {},
    "tokenizer in bf16, channels last": {"frozen_dtype": "fp32", "tokenizer_dtype": "bf16"},
    "compiled blocks": {"frozen_dtype": "fp32", "compile": True},
    "all": {"tokenizer_dtype": "bf16", "compile": True},
    "as the official recipe": {"frozen_dtype": "fp32", "tokenizer_dtype": "bf16", "pieces": 2},
}
ROUNDS, WARM = 9, 3


class Row:
    """A stage at step 0 with its options, and the batch that it sees again and again."""

    def __init__(self, stage: int, images: int, given: dict, process: Process, preset: str):
        given = dict(given)
        pieces = given.pop("pieces", 1)
        about = {"batch": images, "micro_batch": images // pieces, "crop_min": 1.0, "cache": ""}
        self.settings = Settings.of(preset, **about, **given)
        _, model = skeleton(self.settings)
        model.to_empty(device=process.device)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(0.5)
            for buffer in model.buffers():
                buffer.fill_(0.5)
        speed.tune_tokenizer(model, self.settings, process)
        self.stage = begin(stage, model, self.settings, process)
        draws = Draws(model.dice(), 0, stage, images)
        side, each = model.info.image_size, images // pieces
        self.pieces = [
            draws(
                {
                    "image": torch.randint(256, (each, 3, side, side), dtype=torch.uint8),
                    "position": list(range(p * each, (p + 1) * each)),
                    "name": [""] * each,
                }
            )
            for p in range(pieces)
        ]

    def step(self) -> float:
        """Milliseconds of one step."""
        wait()
        start = time.perf_counter()
        train_step(self.stage, self.pieces)
        wait()
        return 1000 * (time.perf_counter() - start)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(stage: int, images: int, process: Process, preset: str) -> dict[str, dict]:
    """Every option at one size: the median of its steps, and its peak of memory, GB. One model at a
    time is in memory, so the options run one after the other, and "none" again at the end."""
    found = {}
    for label, given in [*OPTIONS.items(), ("none, again", OPTIONS["none"])]:
        if process.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        row = Row(stage, images, given, process, preset)
        times = [row.step() for _ in range(WARM + ROUNDS)][WARM:]
        peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
        found[label] = {"ms": statistics.median(times), "all_ms": times, "peak_gb": peak}
        del row
    return found


def not_run(preset: str) -> None:
    """The table without its figures, for a machine that cannot give them."""
    head = ["stage", "images", "options", "ms a step, images/s, peak, share of peak"]
    rows = [[s, n, label, "not run here"] for s in (1, 2) for n in (2, 16, 32) for label in OPTIONS]
    about = {"command": "python benchmarks/gpu_step.py", **facts(), "device": None, "found": {}}
    line = headline(about["command"], about, f"{preset}, flow, bf16: no GPU")
    publish("gpu_step", [line + ".", "", *table(head, rows)], about)


def main(args: argparse.Namespace) -> None:
    cuda = torch.cuda.is_available()
    if not cuda and not args.quick:
        not_run(args.preset)
        return
    process = Process(device=torch.device("cuda" if cuda else "cpu"), autocast=True)
    preset, sizes = ("toy", (2,)) if args.quick else (args.preset, (2, 16, 32))
    name = torch.cuda.get_device_name() if cuda else "CPU"
    peak = next((p for known, p in PEAKS.items() if known in name), None)
    plan = make_plan(Settings.of(preset), 1, "cuda" if cuda else "cpu")
    rows, found = [], {}
    for stage in (1, 2):
        for images in sizes:
            each = measure(stage, images, process, preset)
            found[f"stage {stage}, {images} images"] = each
            for label, figures in each.items():
                flops = images * plan.stages[stage].flops / (figures["ms"] / 1000)
                rows.append(
                    [
                        stage,
                        images,
                        label,
                        f"{figures['ms']:.1f}",
                        f"{1000 * images / figures['ms']:.0f}",
                        f"{figures['peak_gb']:.1f}" if cuda else "",
                        f"{flops / peak:.0%}" if peak else "",
                    ]
                )
    about = {"command": "python benchmarks/gpu_step.py", **facts(), "device": name, "found": found}
    head = ["stage", "images", "options", "ms a step", "images/s", "peak, GB", "share of peak"]
    details = f"{preset}, flow, bf16 autocast, {name}, medians of n = {ROUNDS} steps"
    lines = [headline(about["command"], about, details) + ".", "", *table(head, rows)]
    if args.quick:
        print("\n".join(lines))
    else:
        publish("gpu_step", lines, about)


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--quick", action="store_true", help="toy size, nothing written")
    flags.add_argument("--preset", default="openai-l14-224", help="what is measured")
    arguments = flags.parse_args()
    run_command(lambda: main(arguments))
