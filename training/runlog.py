"""What a run leaves behind while it lasts: metrics, sample grids, and what it was started with.

Everything is written so that a kill at any moment leaves it whole, and so that a resumed run leaves
exactly what an undisturbed one would have left.
"""

import errno
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import as_floats
from evaluation.reconstruction import reconstruct
from genhancer import GenHancer
from settings import Settings, of_stage
from training.process import Process
from training.sharding import collected
from util.files import unwritten, write_atomically
from util.pictures import sample_grid

# Settings that say where something is, not what: a resumed run may find it elsewhere.
PLACES = ("data", "clip", "vae", "vqgan", "flux", "stage1_from")
# The loss is logged per tenth of t or of the mask ratio: one mean hides that its ends differ.
BINS = 10


class Window:
    """What has been seen since the last line of metrics.jsonl. Saved with every checkpoint, so that
    a resumed run writes the same lines.

    Sums and counts, not means: they can be added over steps and ranks in any split. What this rank
    has seen stays on its device, where adding to it makes nobody wait, until `gather`.

    Args: model: its paradigms say what losses are binned by; state: `state()` of an earlier window,
        to go on from.
    """

    def __init__(self, model: GenHancer, process: Process, state: dict | None = None):
        self.paradigms, self.weights = dict(model.paradigms), model.loss_weights
        self.process = process
        shape = len(self.paradigms), 3, BINS
        state = state or {"per_bin": np.zeros(shape), "drift": np.zeros(2), "norm": np.zeros(2)}
        # Of each paradigm: sums of loss and of right guesses, and the count.
        self.per_bin = np.array(state["per_bin"])
        self.drift = np.array(state["drift"])  # its sum, and the count
        self.norm = np.array(state["norm"])  # of the gradient: its sum over steps, and their count
        self._clear()

    def _clear(self) -> None:
        how = {"dtype": torch.float64, "device": self.process.device}
        self._per_bin_here = torch.zeros(len(self.paradigms), 3, BINS, **how)
        self._drift_here = torch.zeros(2, **how)

    def state(self) -> dict:
        """As JSON has it; of what has been gathered."""
        return {name: getattr(self, name).tolist() for name in ("per_bin", "drift", "norm")}

    def add(self, result: dict) -> None:
        """Add one step: what `train_step` returned."""
        self.norm += (result["gradient_norm"], 1)
        for name, rows in zip(self.paradigms, self._per_bin_here, strict=True):
            bins = (result[f"{name}.level"] * BINS).long().clamp(0, BINS - 1)  # (B,)
            losses = result[f"{name}.per_image"].double()
            right = result.get(f"{name}.accuracy", torch.zeros_like(losses)).double()
            for row, values in zip(rows, (losses, right, torch.ones_like(losses)), strict=True):
                row.index_add_(0, bins, values)
        if "drift" in result:
            self._drift_here[0] += result["drift"].double().sum()
            self._drift_here[1] += len(result["drift"])

    def gather(self) -> None:
        """Add what all ranks have seen since the last time. All must ask."""
        together = torch.cat([self._per_bin_here.flatten(), self._drift_here])
        if self.process.ranks > 1:
            dist.all_reduce(together)
        seen = together.cpu().numpy()
        self.per_bin = self.per_bin + seen[:-2].reshape(self.per_bin.shape)
        self.drift = self.drift + seen[-2:]
        self._clear()

    def line(self) -> dict:
        """Means over the window. A bin nothing fell into is null.

        With a codebook of K entries, the accuracy on masked tokens stands beside the loss, and ln K
        beside both: what guessing uniformly would cost.
        """
        parts, line = {}, {"loss": 0.0}
        for (name, paradigm), sums in zip(self.paradigms.items(), self.per_bin, strict=True):
            loss, right, count = sums
            mean = loss.sum() / count.sum()
            line["loss"] += self.weights[name] * mean
            if len(self.paradigms) > 1:
                parts[f"loss_{name}"] = mean
            if codes := getattr(paradigm.tokenizer.config, "codes", None):  # K; None: continuous
                parts |= {"uniform_guess": math.log(codes), "accuracy": right.sum() / count.sum()}
                parts[f"accuracy_per_{paradigm.level}_bin"] = self._per_bin(right, count)
            parts[f"loss_per_{paradigm.level}_bin"] = self._per_bin(loss, count)
        line |= parts | {"gradient_norm": self.norm[0] / self.norm[1]}
        if self.drift[1]:
            line["drift"] = self.drift[0] / self.drift[1]
        return line

    @staticmethod
    def _per_bin(sums: np.ndarray, count: np.ndarray) -> list[float | None]:
        return [float(a / b) if b else None for a, b in zip(sums, count, strict=True)]


def draw_samples(model: GenHancer, dataset, path: Path, process: Process) -> None:
    """The sample grid, in the run's precision and on generators of its own: it changes nothing of
    the run, and cannot end it. All ranks look through a model that is shared out; one writes."""
    half, kind = process.autocast, process.device.type
    model.eval()
    try:
        items = [dataset[(i, 0)] for i in range(min(8, len(dataset)))]
        images = torch.stack([as_floats(item["image"]) for item in items])
        with (
            torch.random.fork_rng(),  # leave the global generator as the loop expects it
            collected(model),
            torch.autocast(kind, torch.bfloat16, enabled=half),
        ):
            drawn = [reconstruct(model, images.to(process.device), name=n) for n in model.paradigms]
        if process.is_main:
            rows = [row for rows in drawn for row in rows.values()]  # the originals once
            sample_grid({row.label: row.pictures for row in rows}, path)
    except (RuntimeError, OSError, ValueError) as error:  # too little memory, a full disk
        said = " ".join(str(error).split())[:200]
        print(f"no sample grid {path}: {type(error).__name__}: {said}", file=sys.stderr)
    finally:
        model.train()


def append_metrics(path: Path, line: dict, board=None) -> None:
    """One more line of metrics.jsonl, on the disk when this returns; its numbers on TensorBoard's
    `board` as well. Raises: OSError in one line where the disk is full, or the folder has gone."""
    data = (json.dumps(line) + "\n").encode()
    try:
        # Without a buffer: after half a line and an error, one would add the whole line at its end.
        with open(path, "ab", buffering=0) as file:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritten(path, error) from None
    if board:
        for name, value in line.items():
            if isinstance(value, int | float) and name not in ("stage", "step"):
                board.add_scalar(name, value, line["step"])
        board.flush()


def open_board(run: Path, stage: int, done: int):
    """TensorBoard's writer of a stage that goes on after `done` steps: later points are dropped, as
    `trim_metrics` drops lines."""
    from torch.utils.tensorboard import SummaryWriter  # an extra: only where it is asked for

    return SummaryWriter(run / "tensorboard" / f"stage{stage}", purge_step=done + 1)


def read_metrics(run: str | Path, stage: int | None = None) -> dict[str, list]:
    """metrics.jsonl as columns: ``read_metrics("runs/demo", stage=1)["loss"]``.

    Args: stage: its lines only.
    Returns: lists of equal length, in the order of the file; None where a line has no such entry.
    Raises: FileNotFoundError where `run` has none yet; ValueError where a line is damaged.
    """
    file = Path(run) / "metrics.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{run} has no metrics.jsonl: no run, or none that came so far")
    found, damaged = _lines(file)
    if damaged:
        raise ValueError(f"{file}: not every line is one of train.py's ({len(damaged)} are not)")
    lines = [line for line in found if stage in (None, line["stage"])]
    names = dict.fromkeys(name for line in lines for name in line)
    return {name: [line.get(name) for line in lines] for name in names}


def _lines(file: Path) -> tuple[list[dict], list[str]]:
    """The lines of metrics.jsonl, and those that are none. (One that was cut off at the end by a
    kill is neither: it is written again.)"""
    found, damaged = [], []
    text = file.read_text(encoding="utf-8", errors="replace")
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):  # a flipped bit may be a line's end to Python
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            content = None
        if _is_line(content):
            found.append(content)
        elif line.endswith("\n"):
            damaged.append(line)
    return found, damaged


def _is_line(content: object) -> bool:
    """Whether it is as `append_metrics` writes them: a stage, a step, and other numbers; lists of
    them where the name ends with _bin."""

    def number(value: object) -> bool:
        return value is None or isinstance(value, int | float)

    if not isinstance(content, dict) or None in (content.get("stage"), content.get("step")):
        return False
    return all(
        isinstance(value, list) and all(map(number, value))
        if name.endswith("_bin")
        else number(value)
        for name, value in content.items()
    )


def trim_metrics(path: Path, stage: int, step: int, written: dict[int, int]) -> None:
    """Drop a stage's lines after the checkpoint it goes on from: they will be written again.

    Lines that are damaged are put aside, beside the file, and said; so are lines that are missing.

    Args: written: how many lines of which stage there must be, up to that step.
    """
    found, damaged = _lines(path) if path.is_file() else ([], [])
    kept = [line for line in found if line["stage"] != stage or line["step"] <= step]
    if damaged:
        aside = path.with_name("metrics.damaged.jsonl")
        before = aside.read_text(encoding="utf-8", errors="replace") if aside.is_file() else ""
        write_atomically(aside, before + "".join(damaged))
        said = f"note: {path}: {len(damaged)} damaged line(s) were put aside, into {aside.name}"
        print(said, file=sys.stderr)
    for number, count in written.items():
        there = sum(line["stage"] == number for line in kept)
        if there < count:
            print(
                f"note: {path} has {there} of the {count} lines that stage {number} had written: "
                "the others were deleted or damaged",
                file=sys.stderr,
            )
    text = "".join(json.dumps(line) + "\n" for line in kept)
    if path.is_file() and text.encode() != path.read_bytes():
        write_atomically(path, text)


def memory_gb(device: torch.device) -> float:
    """Peak memory: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux


def commit() -> str:
    """The git commit of this code, "" where there is none."""
    try:
        command, here = ["git", "rev-parse", "HEAD"], Path(__file__).parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        return ""


def write_config(settings: Settings, stage: int, process: Process, run: Path) -> None:
    """A stage's settings as it was started with them, versions and the git commit, so that a run
    can be told from another. The other stage's stay as they are."""
    about = {
        "settings": of_stage(settings, stage),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit() or None,
        "ranks": process.ranks,
        "device": str(process.device),
        "date": time.strftime("%Y-%m-%d"),
    }
    file = run / "config.json"
    try:
        stages = json.loads(file.read_text()).get("stages", {}) if file.is_file() else {}
    except (ValueError, AttributeError, RecursionError):  # damaged: this stage's, at least
        stages = {}
    stages = dict(sorted({**stages, str(stage): about}.items()))
    # A run whose folder was removed since stage 1 shall notice, and not begin another.
    write_atomically(file, json.dumps({"stages": stages}, indent=1), parents=stage == 1)


def update_places(settings: Settings, stage: int, run: Path) -> None:
    """A stage that goes on may read the same weights and pictures from another place; whoever loads
    the run later must look for them there. All else stays as the stage was started."""
    file = run / "config.json"
    try:
        config = json.loads(file.read_text())
        recorded = config["stages"][str(stage)]["settings"]
        now = {name: getattr(settings, name) for name in PLACES if name in recorded}
        if now.items() <= recorded.items():
            return
        recorded |= now
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return  # damaged: `settings_of_run` will say so
    write_atomically(file, json.dumps(config, indent=1))
