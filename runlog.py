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
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import checkpoints as ckpt
from genhancer import GenHancer
from lora import lora_state_dict, merged_state_dict
from pictures import sample_grid
from settings import Settings, relevant

# The loss is logged per tenth of t or of the mask ratio: one mean hides that its ends differ.
BINS = 10


@dataclass(frozen=True)
class Place:
    """Where this process runs."""

    rank: int
    ranks: int
    device: torch.device
    autocast: bool

    @property
    def chief(self) -> bool:
        return self.rank == 0


class Window:
    """Sums of what is logged, since the last line of metrics.jsonl. Saved with every checkpoint, so
    that a resumed run writes the same lines."""

    def __init__(self, where: str, sums: list[float] | None = None):
        # Loss, right guesses and count per bin; drift and its count; gradient norm.
        self.where, self.sums = where, np.array(sums or [0.0] * (3 * BINS + 3))

    def add(self, result: dict, place: Place) -> None:
        """Add one micro-batch: per-image losses into their bin of t or of the mask ratio.

        Sums and counts, not means: they can be added over pieces and ranks in any split.
        """
        bins = (result["where"] * BINS).long().clamp(0, BINS - 1).cpu()
        per_image = result["per_image"].double().cpu()
        accuracy = result.get("accuracy", torch.zeros_like(per_image)).double().cpu()
        sums = torch.zeros(len(self.sums), dtype=torch.float64)
        for i, values in enumerate((per_image, accuracy, torch.ones_like(per_image))):
            sums[i * BINS : (i + 1) * BINS].index_add_(0, bins, values)
        if "drift" in result:
            sums[-3], sums[-2] = result["drift"].double().sum().cpu(), len(bins)
        if place.ranks > 1:
            sums = sums.to(place.device)
            dist.all_reduce(sums)
        self.sums += sums.cpu().numpy()

    def line(self, steps: int, codes: int | None = None) -> dict:
        """Means over the window, which was `steps` steps long. A bin nothing fell into is null.

        With a codebook of `codes` entries, the accuracy on masked tokens stands beside the loss,
        and ln K beside both: what guessing uniformly would cost.
        """
        loss, right, count = self.sums[: 3 * BINS].reshape(3, BINS)
        line = {"loss": loss.sum() / count.sum()}
        if codes:
            line |= {"uniform_guess": math.log(codes), "accuracy": right.sum() / count.sum()}
            line[f"accuracy_per_{self.where}_bin"] = self._per_bin(right, count)
        line[f"loss_per_{self.where}_bin"] = self._per_bin(loss, count)
        line["gradient_norm"] = self.sums[-1] / steps
        if self.sums[-2]:
            line["drift"] = self.sums[-3] / self.sums[-2]
        return line

    @staticmethod
    def _per_bin(sums: np.ndarray, count: np.ndarray) -> list[float | None]:
        return [float(a / b) if b else None for a, b in zip(sums, count, strict=True)]


def draw_samples(model: GenHancer, dataset, path: Path, place: Place) -> None:
    """The sample grid. Run on one rank, on its own generators: it changes nothing of the run."""
    images = torch.stack([dataset[(i, 0)]["image"] for i in range(min(8, len(dataset)))]).to(
        place.device
    )
    model.eval()
    with torch.random.fork_rng():  # leave the global generator as the loop expects it
        sample_grid(model.reconstruct(images), path)
    model.train()


def trim_metrics(path: Path, stage: int, step: int) -> None:
    """Drop a stage's lines after the checkpoint it goes on from: they will be written again."""
    if path.is_file():
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if line["stage"] != stage or line["step"] <= step]
        ckpt.write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))


def memory_gb(place: Place) -> float:
    """Peak memory: of the GPU where there is one, else of this process."""
    if place.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux


def write_config(settings: Settings, place: Place, run: Path) -> None:
    """All settings, versions and the git commit, so that a run can be told from another."""
    try:
        command, here = ["git", "rev-parse", "HEAD"], Path(__file__).parent
        git = subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        git = ""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    about = {
        "settings": asdict(settings),
        "versions": versions,
        "commit": git or None,
        "ranks": place.ranks,
        "device": str(place.device),
        "date": time.strftime("%Y-%m-%d"),
    }
    ckpt.write_atomically(run / "config.json", json.dumps(about, indent=1))


def write_enhanced(clip, model: GenHancer, settings: Settings, run: Path) -> None:
    """The result: a folder that `open_clip.create_model_from_pretrained('local-dir:…')` loads."""
    folder = run / "enhanced"
    # The text tower is copied as it was; the image tower has its adapters folded in, so that the
    # result has the original keys and shapes and needs none of this project's code.
    rest = {k: v for k, v in clip.state_dict().items() if not k.startswith("visual.")}
    tower = {f"visual.{k}": v for k, v in merged_state_dict(model.visual).items()}
    ckpt.save_tensors({**rest, **tower}, folder / "open_clip_model.safetensors")
    ckpt.write_atomically(
        folder / "open_clip_config.json", json.dumps(model.info.open_clip_config(), indent=1)
    )
    if settings.tuning == "lora":
        # In a folder of its own: open_clip takes any .safetensors beside its config for weights.
        ckpt.save_tensors(lora_state_dict(model.visual), folder / "lora" / "lora.safetensors")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {line["stage"]: line for line in lines}
    rows = [
        f"| {stage} | {line['step']} | {line['images']:,} | {line['loss']:.4f} | "
        f"{line.get('drift', 0):.4f} |"
        for stage, line in sorted(last.items())
    ]
    card = [
        "---",
        "library_name: open_clip",
        "pipeline_tag: zero-shot-image-classification",
        "tags: [clip, genhancer]",
        "---",
        "# CLIP enhanced by GenHancer",
        "",
        f"Base: `{settings.clip}`. The text tower is unchanged. Load with",
        f"`open_clip.create_model_from_pretrained('local-dir:{folder}')`; for transformers, "
        "`python export_hf.py`.",
        "",
        "| stage | steps | images seen | loss | drift 1 − cos |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "Benchmark figures: `python eval_mmvp.py` writes them beside this folder, in `eval/`.",
        "",
        "Settings that decide the numbers, stage 2 (those of stage 1 are in `config.json`):",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in relevant(settings, 2).items()),
        "",
        "Licence: these weights are derived from the base model's and stand under its licence "
        "(OpenAI's CLIP: MIT; MetaCLIP: CC-BY-NC 4.0; SigLIP: Apache 2.0; the toy: MIT). The "
        f"tokenizer ({settings.vae if settings.denoiser == 'flow' else settings.vqgan}) and the "
        "training images taught them, but none of their content is inside.",
        "",
    ]
    ckpt.write_atomically(folder / "README.md", "\n".join(card))
