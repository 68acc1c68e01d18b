"""What a run leaves behind: metrics, sample grids, its configuration, and the enhanced CLIP.

Everything is written so that a kill at any moment leaves it whole, and so that a resumed run leaves
exactly what an undisturbed one would have left.
"""

import json
import math
import platform
import resource
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from genhancer import GenHancer
from lora import lora_state_dict, merged_state_dict
from settings import Settings, relevant
from training.process import Process
from util.files import save_tensors, write_atomically
from util.pictures import sample_grid

# The loss is logged per tenth of t or of the mask ratio: one mean hides that its ends differ.
BINS = 10


class Window:
    """What has been seen since the last line of metrics.jsonl. Saved with every checkpoint, so that
    a resumed run writes the same lines.

    Args: level: the name of what losses are binned by, "t" or "mask_ratio"; state: `state()` of an
        earlier window, to go on from.
    """

    def __init__(self, level: str, state: dict | None = None):
        state = state or {"per_bin": np.zeros((3, BINS)), "drift": np.zeros(2), "norm": 0.0}
        self.level, self.gradient_norm = level, state["norm"]
        self.per_bin = np.array(state["per_bin"])  # sums of loss and right guesses, and the count
        self.drift = np.array(state["drift"])  # its sum, and the count

    def state(self) -> dict:
        return {
            "per_bin": self.per_bin.tolist(),
            "drift": self.drift.tolist(),
            "norm": self.gradient_norm,
        }

    def add(self, result: dict, process: Process) -> None:
        """Add one micro-batch: what `GenHancer.forward` returned.

        Sums and counts, not means: they can be added over pieces and ranks in any split.
        """
        bins = (result["level"] * BINS).long().clamp(0, BINS - 1).cpu()  # (B,)
        losses = result["per_image"].double().cpu()
        right = result.get("accuracy", torch.zeros_like(losses)).double().cpu()
        per_bin = torch.zeros(3, BINS, dtype=torch.float64)
        for row, values in zip(per_bin, (losses, right, torch.ones_like(losses)), strict=True):
            row.index_add_(0, bins, values)
        drift = torch.zeros(2, dtype=torch.float64)
        if "drift" in result:
            drift[0], drift[1] = result["drift"].double().sum().cpu(), len(bins)
        if process.ranks > 1:
            together = torch.cat([per_bin.flatten(), drift]).to(process.device)
            dist.all_reduce(together)
            per_bin, drift = together[:-2].view(3, BINS), together[-2:]
        self.per_bin += per_bin.cpu().numpy()
        self.drift += drift.cpu().numpy()

    def add_gradient_norm(self, norm: float) -> None:
        """Add one step: the gradient's norm before clipping."""
        self.gradient_norm += norm

    def line(self, steps: int, codes: int | None = None) -> dict:
        """Means over the window, which was `steps` steps long. A bin nothing fell into is null.

        With a codebook of `codes` entries, the accuracy on masked tokens stands beside the loss,
        and ln K beside both: what guessing uniformly would cost.
        """
        loss, right, count = self.per_bin
        line = {"loss": loss.sum() / count.sum()}
        if codes:
            line |= {"uniform_guess": math.log(codes), "accuracy": right.sum() / count.sum()}
            line[f"accuracy_per_{self.level}_bin"] = self._per_bin(right, count)
        line[f"loss_per_{self.level}_bin"] = self._per_bin(loss, count)
        line["gradient_norm"] = self.gradient_norm / steps
        if self.drift[1]:
            line["drift"] = self.drift[0] / self.drift[1]
        return line

    @staticmethod
    def _per_bin(sums: np.ndarray, count: np.ndarray) -> list[float | None]:
        return [float(a / b) if b else None for a, b in zip(sums, count, strict=True)]


def draw_samples(model: GenHancer, dataset, path: Path, device: torch.device) -> None:
    """The sample grid. Run on one rank, on its own generators: it changes nothing of the run."""
    count = min(8, len(dataset))
    images = torch.stack([dataset[(i, 0)]["image"] for i in range(count)]).to(device)
    model.eval()
    with torch.random.fork_rng():  # leave the global generator as the loop expects it
        sample_grid(model.reconstruct(images), path)
    model.train()


def append_metrics(path: Path, line: dict) -> None:
    """One more line of metrics.jsonl."""
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def trim_metrics(path: Path, stage: int, step: int) -> None:
    """Drop a stage's lines after the checkpoint it goes on from: they will be written again."""
    if path.is_file():
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if line["stage"] != stage or line["step"] <= step]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))


def memory_gb(device: torch.device) -> float:
    """Peak memory: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux


def write_config(settings: Settings, process: Process, run: Path) -> None:
    """All settings, versions and the git commit, so that a run can be told from another."""
    try:
        command, here = ["git", "rev-parse", "HEAD"], Path(__file__).parent
        commit = subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    about = {
        "settings": asdict(settings),
        "versions": versions,
        "commit": commit or None,
        "ranks": process.ranks,
        "device": str(process.device),
        "date": time.strftime("%Y-%m-%d"),
    }
    write_atomically(run / "config.json", json.dumps(about, indent=1))


def write_enhanced(clip, model: GenHancer, settings: Settings, run: Path) -> None:
    """The result: a folder that `open_clip.create_model_from_pretrained('local-dir:…')` loads."""
    folder = run / "enhanced"
    # The text tower is copied as it was; the image tower has its adapters folded in, so that the
    # result has the original keys and shapes and needs none of this project's code.
    rest = {k: v for k, v in clip.state_dict().items() if not k.startswith("visual.")}
    tower = {f"visual.{k}": v for k, v in merged_state_dict(model.visual).items()}
    save_tensors({**rest, **tower}, folder / "open_clip_model.safetensors")
    write_atomically(
        folder / "open_clip_config.json", json.dumps(model.info.open_clip_config(), indent=1)
    )
    if settings.tuning == "lora":
        # In a folder of its own: open_clip takes any .safetensors beside its config for weights.
        save_tensors(lora_state_dict(model.visual), folder / "lora" / "lora.safetensors")
    write_atomically(folder / "README.md", model_card(settings, run))


def model_card(settings: Settings, run: Path) -> str:
    """What the enhanced model is, what it cost and what made it, as Markdown."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {line["stage"]: line for line in lines}
    rows = "\n".join(
        f"| {stage} | {line['step']} | {line['images']:,} | {line['loss']:.4f} | "
        f"{line.get('drift', 0):.4f} |"
        for stage, line in sorted(last.items())
    )
    chosen = "\n".join(f"| {name} | {value} |" for name, value in relevant(settings, 2).items())
    tokenizer = settings.vae if settings.denoiser == "flow" else settings.vqgan
    return f"""---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags: [clip, genhancer]
---
# CLIP enhanced by GenHancer

Base: `{settings.clip}`. The text tower is unchanged. Load with
`open_clip.create_model_from_pretrained('local-dir:{run / "enhanced"}')`; for transformers, \
`python export_hf.py`.

| stage | steps | images seen | loss | drift 1 − cos |
|---|---|---|---|---|
{rows}

Benchmark figures: `python eval_mmvp.py` writes them beside this folder, in `eval/`.

Settings that decide the numbers, stage 2 (those of stage 1 are in `config.json`):

| setting | value |
|---|---|
{chosen}

Licence: these weights are derived from the base model's and stand under its licence \
(OpenAI's CLIP: MIT; MetaCLIP: CC-BY-NC 4.0; SigLIP: Apache 2.0; the toy: MIT). The \
tokenizer ({tokenizer}) and the training images taught them, but none of their content is inside.
"""
