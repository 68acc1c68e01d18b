"""What one run of ablations.py is worth, as a record: benchmarks/evidence/ARM-SEED.json.

    python benchmarks/evidence.py --arm flow --seed 1

The record holds, for every strength of the change of weights up to the one where naming the subject
has lost half a point (and up to 1, as trained, in any case): which pairs were right (as bits, so
that any later test can be paired), how often the subject was named, and the cosine. Further, what
the run cost. Arms that ask for it are looked at along stage 2 too, or at what stage 1 draws.
"""

import json
import os
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from ablations import ARMS, RECORDS, STRENGTHS, WEAK, record_of, run_of
from ceiling import by_pattern, through
from condition import measure
from report import CPU, ROOT, facts, parser
from safetensors.torch import load_file
from strength import Questions, measure_strengths, questions
from torch import Tensor
from verdicts import LOST

from evaluation.encoder import load_encoders
from genhancer import GenHancer
from lora import merged_state_dict
from toy.benchmark import pairs
from toy.world import TOY_DIR, ToyScenes
from training import checkpoints as ckpt
from training.assemble import load_run
from training.preflight import checkpoints_in, read_state
from training.runlog import read_metrics
from util.cli import run_command
from util.files import write_atomically


def as_text(verdict: np.ndarray) -> str:
    """Bits as hexadecimal digits; `verdicts.as_bits` reads them."""
    return np.packbits(verdict).tobytes().hex()


def row(measured: dict) -> dict:
    """One model, in few bytes."""
    return {
        "unmentioned": as_text(measured["unmentioned"]),
        "mentioned": as_text(measured["mentioned"]),
        "subject": 100 * float(measured["subject"].mean()),
        "cosine": measured["cosine"],
    }


def kept_questions(runs: Path) -> Questions:
    """`questions`, drawn once and kept beside the runs: that takes as long as looking at four
    models."""
    sources = b"".join(
        (ROOT / "toy" / f"{name}.py").read_bytes() for name in ("world", "benchmark")
    )
    file = runs / f"questions-{sha256(sources).hexdigest()[:8]}.pt"
    if not file.is_file():
        runs.mkdir(parents=True, exist_ok=True)
        asked = questions()
        half = file.with_name(f"{file.name}.{os.getpid()}.tmp")  # another may draw them as well
        torch.save({**vars(asked), "subjects": torch.from_numpy(asked.subjects)}, half)
        half.replace(file)
    kept = torch.load(file, weights_only=True)
    return Questions(**{**kept, "subjects": kept["subjects"].numpy()})


def along_stage2(
    run: Path, steps: tuple[int, ...], original: dict[str, Tensor], asked: Questions
) -> list[dict]:
    """The tower as it was after so many steps of stage 2, from the run's checkpoints."""
    _, model = load_run(run)
    rest = {k: v for k, v in original.items() if not k.startswith("visual.")}
    found = []
    for step in steps:
        ckpt.restore(model, run / "stage2" / f"step_{step:08d}")
        tower = {f"visual.{k}": v for k, v in merged_state_dict(model.visual).items()}
        [measured] = measure_strengths(original, [{**rest, **tower}], [1.0], asked)
        found.append({"step": step, **row(measured)})
    return found


def drawings(model: GenHancer) -> dict:
    """How good stage 1's denoiser is: its loss on scenes that it has not seen, and how many pairs
    on mentioned subjects the original CLIP tells apart in what it draws from [CLS] alone."""
    images = ToyScenes(1024, seed=2_718_281).batch(1024)
    discrete = model.paradigm.name == "perceiver"
    hidden = (0.5, 0.7, 0.9) if discrete else (0.9, 0.7, 0.5, 0.3, 0.1)
    loss = np.mean([measure(model, images, h)["per_image true"] for h in hidden])
    [judge] = load_encoders([str(TOY_DIR / "clip.safetensors")], CPU)
    drawn, decibel = through(model, pairs(True, 30, seed=0))["drawn"]
    return {"loss": float(loss), "pairs": by_pattern(judge, drawn), "psnr": decibel}


def cost(run: Path, arm: str) -> dict:
    """Seconds of training by the log's own clock, and parameters that learnt, by stage."""
    found = {}
    for stage in (1, 2):
        speed = read_metrics(run, stage) if (run / f"stage{stage}").is_dir() else {}
        if speed.get("step"):
            images = speed["images"][-1]
            found[f"seconds{stage}"] = round(images / float(np.median(speed["images_per_s"])), 1)
        if checkpoints := checkpoints_in(run / f"stage{stage}"):
            tensors = load_file(checkpoints[-1] / "trained.safetensors")
            found[f"trained{stage}"] = sum(t.numel() for t in tensors.values())
            found[f"steps{stage}"] = read_state(checkpoints[-1])["step"]
    return found


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--arm", required=True, choices=["original", *ARMS])
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--runs", default=str(ROOT / "runs" / "evidence"))
    args = flags.parse_args()
    original = {k: v.float() for k, v in load_file(TOY_DIR / "clip.safetensors").items()}
    RECORDS.mkdir(exist_ok=True)
    asked = kept_questions(Path(args.runs))
    if args.arm == "original":
        [measured] = measure_strengths(original, [original], [0.0], asked)
        write_atomically(RECORDS / "original.json", json.dumps({**facts(), **row(measured)}))
        return
    arm, run = ARMS[args.arm], run_of(args.arm, args.seed, Path(args.runs))
    enhanced = load_file(run / "enhanced" / "open_clip_model.safetensors")
    before = json.loads((RECORDS / "original.json").read_text())["subject"]

    def too_much(row: dict) -> bool:
        """The subject has lost `LOST` points."""
        return before - 100 * row["subject"].mean() >= LOST

    def enough(row: dict) -> bool:
        """Both verdicts can be read: as trained, and at equal retention."""
        return row["strength"] >= 1 and too_much(row)

    points = measure_strengths(original, [enhanced], STRENGTHS, asked, enough)
    if too_much(points[0]):
        points = measure_strengths(original, [enhanced], WEAK, asked) + points
    found = {
        "arm": args.arm,
        "flags": arm.flags,
        "stage1_from": arm.stage1,
        "seed": args.seed,
        **facts(),
        "cost": cost(run, args.arm),
        "strengths": [{"strength": p["strength"], **row(p)} for p in points],
    }
    if arm.steps:
        found["steps"] = along_stage2(run, arm.steps, original, asked)
    if arm.drawings:
        found["drawings"] = drawings(load_run(run, stage=1)[1])
    write_atomically(record_of(args.arm, args.seed), json.dumps(found, indent=0))


if __name__ == "__main__":
    start = time.time()
    torch.set_num_threads(1)
    run_command(main)
    print(f"measured in {time.time() - start:.0f} s")
