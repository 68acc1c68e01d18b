"""Train GenHancer: stage 1, then stage 2.

    python train.py                             both stages on the toy world, CPU, minutes
    python train.py --denoiser perceiver        the same with the discrete denoiser
    python train.py --stage 1 --data PHOTOS     a folder (or list) of pictures, toy models
    torchrun --nproc_per_node 8 train.py --stage 1 --preset openai-l14-224 \\
        --data DIR --vae ae.safetensors         the full size, one node of eight GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d \\
        --rdzv_endpoint HOST:29400 train.py …   two nodes

Run any of them again and it goes on from its newest checkpoint; on the CPU the result is bit-equal
to a run that was never stopped, since all randomness of a step is a function of (seed, step).

This file is the loop of Algorithm 1 and Algorithm 2 over the data set, and nothing else: what
happens to a batch is in genhancer.py, every number has its reason in settings.py, and what stands
around a loop (processes, assembly, stages, checkpoints, log) is in training/.

Order: the command line → one step → the loop → the same in memory → the command.
"""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from settings import Settings, run_directory
from training.preflight import check_run, finished, jobs_of, preflight, stages_of
from util.cli import parse_settings, printable, run_command

# ------------------------------------------------------------------------------------------------
# The command line. A mistake is answered at once: only then are PyTorch and open_clip imported,
# which takes seconds.
# ------------------------------------------------------------------------------------------------
# What people type, and what it is called here.
HINTS = {
    "zero": "--shard shares weights, gradients and moments out among the ranks",
    "fsdp": "--shard",
    "vae_fp32": "--tokenizer_dtype fp32 (the default), or bf16",
    "lr": "the stages have rates of their own: --stage1_lr and --stage2_lr",
    "learning_rate": "the stages have rates of their own: --stage1_lr and --stage2_lr",
    "steps": "the stages have steps of their own: --stage1_steps and --stage2_steps",
    "max_steps": "the stages have steps of their own: --stage1_steps and --stage2_steps",
    "epochs": "there are steps, not epochs: --stage1_steps and --stage2_steps, of --batch images",
    "batch_size": "--batch is the global batch, --micro_batch what one GPU takes at once",
    "output": "everything goes to --runs DIR/--name NAME",
    "out": "everything goes to --runs DIR/--name NAME",
    "output_dir": "everything goes to --runs DIR/--name NAME",
    "resume": "the same command again goes on from the newest checkpoint",
    "device": "a GPU is used where there is one; CUDA_VISIBLE_DEVICES= (empty) hides it",
    "gpu": "torchrun --nproc_per_node N train.py … takes N GPUs",
    "model": "the CLIP to enhance is --clip, a whole set of defaults --preset",
    "bf16": "--precision bf16",
    "fp16": "--precision bf16: it needs no loss scaling",
    "lora_r": "--lora_rank",
    "no_cache": "--cache '' is none, --cache memory in memory, --cache DIR a folder",
}


def command_line() -> Settings:
    """Raises: ValueError or OSError for whatever can be refused without looking into weights."""
    summary, examples = __doc__.split("\n\n")[:2]
    decides = ("preset", "denoiser")
    settings = parse_settings(Settings, summary, examples, decides=decides, hints=HINTS)
    if not settings.plan:
        preflight(settings, int(os.environ.get("WORLD_SIZE", 1)))
    return settings


def start() -> None:
    """Ends the process for a mistake, and for a run that is finished. (Of many processes the main
    one decides that, and must first be able to tell the others.)"""
    settings = command_line()
    if not settings.plan and "RANK" not in os.environ and (line := finished(settings)):
        print(printable(line))
        raise SystemExit(0)


if __name__ == "__main__":
    run_command(start, imports_follow=True)

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from data import as_floats
from genhancer import GenHancer, on_device
from training import assemble, runlog
from training import checkpoints as ckpt
from training.assemble import seed_of
from training.enhanced import write_enhanced
from training.feature_cache import which
from training.lock import sole_writer
from training.process import (
    Process,
    accumulating,
    agreed,
    clear_gradients,
    ending_well,
    start_process,
    union_over_ranks,
)
from training.sharding import whole
from training.speed import check_switches
from training.stages import Stage, begin, begin_or_resume, finish_writing, overdue, save


# ------------------------------------------------------------------------------------------------
# One step
# ------------------------------------------------------------------------------------------------
def train_step(stage: Stage, pieces: list[dict], measure_drift: bool = False) -> dict:
    """One step of Algorithm 1 or 2 on one global batch.

    Args:
        stage: moves on by this step.
        pieces: this rank's micro-batches; gradients add up over them.
        measure_drift: also where it is no part of the loss. It needs a second look through the
            original tower.
    Returns: "loss", "gradient_norm" before clipping and "lr", and what `GenHancer.forward` returns
        per image, (B,) each.
    Raises: ValueError where loss or gradient are not finite.
    """
    process, loss, found = stage.process, 0.0, []
    set_learning_rates(stage)
    for piece, batch in enumerate(pieces):
        images, draws, cached = inputs_of(batch, process.device)
        key = stage.number, stage.done, piece, process.rank
        torch.manual_seed(seed_of("dropout", stage.settings.seed, *key))
        with accumulating(stage.learner, last=piece == len(pieces) - 1):
            with torch.autocast(process.device.type, torch.bfloat16, process.autocast):
                result = stage.learner(images, draws, cached, measure_drift)
            (result["loss"] / len(pieces)).backward()
        loss = loss + result.pop("loss").detach() / len(pieces)
        found.append(result)
    # After the exchange all ranks hold the same gradient, hence the same norm and the same verdict:
    # either all go on or all stop. Here, once a step, the CPU waits for the GPU.
    norm = whole(torch.nn.utils.clip_grad_norm_(stage.learning, stage.settings.clip_grad))
    loss, norm = torch.stack([loss.double(), norm.double()]).tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise ValueError(not_finite(stage, loss, norm, [n for b in pieces for n in b["name"]]))
    stage.optimizer.step()  # Alg. 1, lines 7 and 16; Alg. 2, lines 6 and 14
    clear_gradients(stage.learner, stage.optimizer)
    stage.done += 1
    lr = stage.optimizer.param_groups[0]["lr"]
    per_image = {key: torch.cat([result[key] for result in found]) for key in found[0]}
    return {"loss": loss, "gradient_norm": norm, "lr": lr, **per_image}


def inputs_of(batch: dict, device: torch.device) -> tuple[torch.Tensor | None, dict, dict | None]:
    """Images (B, 3, H, W), their randomness, and what was computed of them before the run. (Where
    that is all that a stage asks for, no images were read.)"""
    images = batch.get("image")
    images = None if images is None else as_floats(images.to(device, non_blocking=True))
    cached = on_device(batch["cached"], device) if "cached" in batch else None
    return images, on_device(batch["draws"], device), cached


def set_learning_rates(stage: Stage) -> None:
    """Constant is the paper; the toy's few steps profit from warm-up and decay."""
    settings, steps = stage.settings, stage.settings.steps(stage.number)
    warm = min(1.0, (stage.done + 1) / settings.warmup) if settings.warmup else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * stage.done / steps))
    for group in stage.optimizer.param_groups:
        group["lr"] = group["peak"] * warm * (cosine if settings.schedule == "cosine" else 1.0)


def not_finite(stage: Stage, loss: float, norm: float, names: list[str]) -> str:
    """Why the run ends, and what it goes on from."""
    good = ckpt.checkpoints_in(stage.folder)
    return (
        f"stage {stage.number}, step {stage.done}: loss {loss} and gradient norm {norm} are "
        f"not finite; images: {', '.join(names[:8])}…; last good checkpoint: "
        f"{good[-1] if good else 'none'}; try a lower learning rate"
    )


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------
def run_stage(
    number: int, model: GenHancer, dataset: Dataset, settings: Settings, process: Process
) -> None:
    """Train one stage to its last step, from its newest checkpoint if there is one.

    The two stages share every line; they differ in who requires a gradient.
    """
    stage = begin_or_resume(number, model, dataset, settings, process)
    if settings.tensorboard and process.is_main:
        stage.board = runlog.open_board(stage.folder.parent, number, stage.done)
    steps, first, started = settings.steps(number), stage.done, time.time()
    style = {"desc": f"stage {number}", "unit": "step", "dynamic_ncols": True}
    bar = tqdm(total=steps, initial=first, disable=not process.is_main, **style)

    def due(step: int, every: int) -> bool:
        return step % every == 0 or step == steps

    def grid(again: bool = False) -> None:
        """A sample grid; `again`: unless it is there."""
        picture = stage.folder.parent / "samples" / f"stage{number}_step{stage.done:06d}.png"
        if again and agreed(picture.is_file(), process):
            return
        if process.is_main or settings.shard:
            runlog.draw_samples(model, dataset, picture, process)

    # A kill between a checkpoint and its grid would have lost the grid.
    if first and due(first, settings.sample_every):
        grid(again=True)
    try:
        # Alg. 1, lines 2 and 11; Alg. 2, lines 2 and 10
        for pieces in islice(stage.global_batches(dataset), max(0, steps - first)):
            logging = due(stage.done + 1, settings.log_every)
            metrics = train_step(stage, pieces, measure_drift=logging)
            stage.window.add(metrics)
            stage.unsaid.update(*(names for batch in pieces for names in batch["unreadable"]))

            speed = (stage.done - first) * settings.batch / (time.time() - started)
            loss = f"{metrics['loss']:.4f}"
            bar.set_postfix(loss=loss, images_per_s=f"{speed:.0f}", refresh=False)
            bar.update()
            saving = due(stage.done, settings.save_every)
            if logging:
                saving = saving or overdue(stage)
            if logging or saving:
                agree_on_unreadable(stage, len(dataset), bar)
            if logging:
                write_line(stage, metrics["lr"], speed)
            # The line is written before the checkpoint: a kill between the two leaves a line too
            # many, which the next start removes (`trim_metrics`), never one too few.
            if saving:
                save(stage)
            if due(stage.done, settings.sample_every):
                grid()
    finally:  # Ctrl-C, too: the lock is held until the last checkpoint is whole
        finish_writing(stage)
    bar.close()


def agree_on_unreadable(stage: Stage, pictures: int, bar: tqdm) -> None:
    """The ranks tell each other what they could not read, and come to one verdict.

    Raises: ValueError where that is more than 5 % of all pictures.
    """
    for file in sorted(union_over_ranks(stage.unsaid, stage.process) - stage.unreadable):
        stage.unreadable.add(file)
        if stage.process.is_main:
            bar.write(f"unreadable, replaced by the next: {printable(file)}")
    stage.unsaid = set()
    if len(stage.unreadable) > max(1, 0.05 * pictures):
        raise ValueError(
            f"{len(stage.unreadable)} of {pictures} images cannot be read, more than 5 %: the data "
            f"is not sound; one of them is {min(stage.unreadable)}"
        )


def write_line(stage: Stage, lr: float, speed: float) -> None:
    """A line of metrics.jsonl, and a new window."""
    stage.window.gather()
    line = {
        "stage": stage.number,
        "step": stage.done,
        "images": stage.done * stage.settings.batch,
        **stage.window.line(),
        "lr": lr,
        "images_per_s": round(speed, 1),
        "memory_gb": round(runlog.memory_gb(stage.process.device), 2),
        "unreadable": len(stage.unreadable),
    }
    stage.window = runlog.Window(stage.model, stage.process)
    stage.lines += 1
    if stage.process.is_main:
        runlog.append_metrics(stage.folder.parent / "metrics.jsonl", line, stage.board)


# ------------------------------------------------------------------------------------------------
# The same in memory
# ------------------------------------------------------------------------------------------------
def train_steps(
    model: GenHancer, data: Dataset, steps: int, stage: int = 1, settings: Settings | None = None
) -> Iterator[dict]:
    """The loop without its traces, no folder, no checkpoint: yields what `train_step` returns.

        losses = [m["loss"] for m in train_steps(model, ToyScenes(512, seed=1), steps=30)]

    Args:
        model: as it is; stage 2 goes on from what stage 1 made of it.
        data: items by (index, epoch), {"image": (3, H, W) in [0, 1] or uint8, "name": str}.
        steps: also where a cosine ends.
        settings: rates, batch, LoRA and seed; by default the toy's.
    """
    if settings is None:
        settings = Settings.of("toy", denoiser="+".join(sorted(model.paradigms)))
    settings = replace(settings, **{f"stage{stage}_steps": steps})
    underway = begin(stage, model, settings, Process(device=model.mean.device))
    for pieces in islice(underway.global_batches(data), steps):
        yield train_step(underway, pieces, measure_drift=stage == 2)


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------
def saved(settings: Settings) -> str:
    """What survives whatever happens now."""
    folder = run_directory(settings)
    return f"checkpoints so far are in {folder}; the same command goes on from the newest"


def main(settings: Settings) -> None:
    """Alg. 1 and 2: stage 1, then stage 2. A finished stage is recognised by its checkpoint."""
    if settings.plan:
        from training.plan import print_plan  # for this alone: it brings fake tensors along

        print_plan(settings, int(os.environ.get("WORLD_SIZE", settings.gpus)))
        return
    process = start_process(settings.precision)
    with ending_well(process, saved(settings)):
        if line := agreed(finished(settings), process):
            if process.is_main:
                print(printable(line))
            return
        with sole_writer(run_directory(settings), process):
            train(settings, process)


def train(settings: Settings, process: Process) -> None:
    """The stages that are asked for, and the enhanced model.

    What can be refused comes first: the pictures, then the models, then what they make of the
    pictures.
    """
    check_switches(settings, process)
    pictures = assemble.find_data(settings, process)  # no captions
    check_run(settings, which(pictures))
    _, model = assemble.build_model(settings, process)
    assemble.warn_of_toy_tokenizer(settings, model, pictures, process)
    dataset = assemble.hold(pictures, model, settings, process)
    del model  # each stage starts from a fresh one, and reads what the one before it left
    for job, number in jobs_of(settings):
        _, model = assemble.build_model(job, process)
        run_stage(number, model, dataset, job, process)
        del model  # with its gradients, moments and hooks
    if 2 in stages_of(settings) and process.is_main:
        run = run_directory(settings)
        write_enhanced(*assemble.load_run(run), settings, run)
        print(printable(f"enhanced model: {run / 'enhanced'}"))


if __name__ == "__main__":
    chosen = command_line()
    run_command(lambda: main(chosen), lambda: saved(chosen))
