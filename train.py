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
around a loop (processes, assembly, checkpoints, log) is in training/.

Order: the loop → what each step needs → begin or resume a stage → the command.
"""

import contextlib
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from data import MicroBatches, Share, batches
from genhancer import GenHancer
from settings import Settings, check, preset_of, relevant, run_directory
from training import assemble, runlog
from training import checkpoints as ckpt
from training.assemble import seed_of
from training.process import (
    Process,
    ending_well,
    in_parallel,
    start_process,
    union_over_ranks,
    wait_for_all,
)
from util.cli import parse_settings, run_command
from util.files import fingerprint


@dataclass
class Stage:
    """A stage under way: what `begin_or_resume` prepares and the loop moves forward."""

    number: int
    folder: Path
    """of its checkpoints"""
    groups: list[dict]
    """what trains, with the peak of its learning rate"""
    optimizer: torch.optim.Optimizer
    agreed: dict
    """architecture, fingerprints and settings: what every later start must agree on"""
    window: runlog.Window
    """sums for the next line of metrics.jsonl"""
    done: int = 0
    """steps so far"""
    unreadable: set[str] = field(default_factory=set)
    """pictures that no rank could read, so far"""
    unsaid: set[str] = field(default_factory=set)
    """those among them that this rank has not yet told the others"""


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------
def run_stage(
    number: int, model: GenHancer, dataset, settings: Settings, process: Process, run: Path
) -> None:
    """Train one stage to its last step, from its newest checkpoint if there is one.

    The two stages share every line; they differ in who requires a gradient.
    """
    share = Share(settings.batch, settings.micro(process.ranks), process.rank, process.ranks)
    order = MicroBatches(len(dataset), share, seed_of("order", settings.seed, number))
    stage = begin_or_resume(number, model, len(dataset), settings, process, run)
    order.start_step = stage.done
    steps, wrapped = settings.steps(number), in_parallel(model, process)
    learning = [p for group in stage.groups for p in group["params"]]
    stream, first, started = batches(dataset, order, settings.workers), stage.done, time.time()
    style = {"desc": f"stage {number}", "unit": "step", "dynamic_ncols": True}
    bar = tqdm(total=steps, initial=first, disable=not process.is_main, **style)

    for step in range(first, steps):  # Alg. 1, lines 2 and 11; Alg. 2, lines 2 and 10
        stage.done = step + 1
        # The drift needs a second look through the original tower, so it is measured on logged
        # steps only (always, if it is part of the loss).
        logging = stage.done % settings.log_every == 0 or stage.done == steps
        saving = stage.done % settings.save_every == 0 or stage.done == steps
        set_learning_rates(stage, settings)

        # One global batch in as many pieces as memory asks for: gradients add up over them.
        loss, names = 0.0, []
        for piece in range(order.accumulation):
            batch = next(stream)
            images, draws, cached = on_device(batch, model, settings, stage, process)
            torch.manual_seed(seed_of("dropout", settings.seed, number, step, piece, process.rank))
            # The ranks exchange gradients once a step, on its last piece.
            last = piece == order.accumulation - 1
            alone = contextlib.nullcontext() if process.ranks == 1 or last else wrapped.no_sync()
            with alone:
                with torch.autocast(process.device.type, torch.bfloat16, process.autocast):
                    result = wrapped(images, draws, cached, logging)
                (result["loss"] / order.accumulation).backward()
            stage.window.add(result, process)
            loss += float(result["loss"].detach()) / order.accumulation
            names += batch["name"]
            stage.unsaid.update(*batch["unreadable"])

        # After the exchange all ranks hold the same gradient, hence the same norm and the same
        # verdict: either all go on or all stop.
        norm = float(torch.nn.utils.clip_grad_norm_(learning, settings.clip_grad))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ValueError(not_finite(stage, loss, norm, names))
        stage.optimizer.step()  # Alg. 1, lines 7 and 16; Alg. 2, lines 6 and 14
        stage.optimizer.zero_grad(set_to_none=True)
        stage.window.add_gradient_norm(norm)

        speed = (stage.done - first) * settings.batch / (time.time() - started)
        bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{speed:.0f}", refresh=False)
        bar.update()
        if logging or saving:
            agree_on_unreadable(stage, len(dataset), process, bar)
        if logging:
            write_line(stage, model, settings, process, speed)
        if process.is_main and (stage.done % settings.sample_every == 0 or stage.done == steps):
            picture = run / "samples" / f"stage{number}_step{stage.done:06d}.png"
            runlog.draw_samples(model, dataset, picture, process.device)
        # The line is written before the checkpoint: a kill between the two leaves a line too many,
        # which the next start removes (`trim_metrics`), never one too few.
        if saving:
            save(stage, model, settings, process)
    bar.close()


# ------------------------------------------------------------------------------------------------
# What each step needs
# ------------------------------------------------------------------------------------------------
def on_device(
    batch: dict, model: GenHancer, settings: Settings, stage: Stage, process: Process
) -> tuple[torch.Tensor, dict, dict | None]:
    """Images (B, 3, H, W), their randomness, and what was computed of them before the run.

    Noise, t and masks belong to the image, the number of masked tokens to the step: however many
    ranks and pieces there are. What is left to chance is LoRA's dropout.
    """

    def move(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: v.to(process.device, non_blocking=True) for k, v in tensors.items()}

    seeds = [seed_of("image", settings.seed, stage.number, p) for p in batch["position"]]
    common = seed_of("masked count", settings.seed, stage.number, stage.done - 1)
    own = [torch.Generator().manual_seed(seed) for seed in seeds]
    draws = model.draw(own, torch.Generator().manual_seed(common))
    images = batch["image"].to(process.device, non_blocking=True)
    return images, move(draws), move(batch["cached"]) if "cached" in batch else None


def set_learning_rates(stage: Stage, settings: Settings) -> None:
    """Constant is the paper; the toy's few steps profit from warm-up and decay."""
    step, steps = stage.done - 1, settings.steps(stage.number)
    warm = min(1.0, stage.done / settings.warmup) if settings.warmup else 1.0
    decay = 0.5 * (1 + math.cos(math.pi * step / steps)) if settings.schedule == "cosine" else 1.0
    for group in stage.optimizer.param_groups:
        group["lr"] = group["peak"] * warm * decay


def agree_on_unreadable(stage: Stage, pictures: int, process: Process, bar: tqdm) -> None:
    """The ranks tell each other what they could not read, and come to one verdict.

    Raises: ValueError where that is more than 5 % of all pictures.
    """
    for file in sorted(union_over_ranks(stage.unsaid, process) - stage.unreadable):
        stage.unreadable.add(file)
        if process.is_main:
            bar.write(f"unreadable, replaced by the next: {file}")
    stage.unsaid = set()
    if len(stage.unreadable) > max(1, 0.05 * pictures):
        raise ValueError(
            f"{len(stage.unreadable)} of {pictures} images cannot be read, more than 5 %: the data "
            f"is not sound; one of them is {min(stage.unreadable)}"
        )


def not_finite(stage: Stage, loss: float, norm: float, names: list[str]) -> str:
    """Why the run ends, and what it goes on from."""
    good = ckpt.checkpoints_in(stage.folder)
    return (
        f"stage {stage.number}, step {stage.done - 1}: loss {loss} and gradient norm {norm} are "
        f"not finite; images: {', '.join(names[:8])}…; last good checkpoint: "
        f"{good[-1] if good else 'none'}; try a lower learning rate"
    )


def write_line(
    stage: Stage, model: GenHancer, settings: Settings, process: Process, speed: float
) -> None:
    """A line of metrics.jsonl, and a new window."""
    steps = (stage.done - 1) % settings.log_every + 1
    codes = getattr(model.paradigm.tokenizer.config, "codes", None)  # K; None: continuous
    line = {
        "stage": stage.number,
        "step": stage.done,
        "images": stage.done * settings.batch,
        **stage.window.line(steps, codes),
        "lr": stage.optimizer.param_groups[0]["lr"],
        "images_per_s": round(speed, 1),
        "memory_gb": round(runlog.memory_gb(process.device), 2),
        "unreadable": len(stage.unreadable),
    }
    stage.window = runlog.Window(model.paradigm.level)
    if process.is_main:
        runlog.append_metrics(stage.folder.parent / "metrics.jsonl", line)


def save(stage: Stage, model: GenHancer, settings: Settings, process: Process) -> None:
    """A checkpoint, written by the main process while the others wait."""
    if hasattr(stage.optimizer, "consolidate_state_dict"):  # ZeRO: collect the shares of all ranks
        stage.optimizer.consolidate_state_dict(to=0)
    if process.is_main:
        traces = {"window": stage.window.state(), "unreadable": sorted(stage.unreadable)}
        state, trained = {**stage.agreed, **traces}, ckpt.trainable(model)
        moments = stage.optimizer.state_dict()  # AdamW's two per number
        ckpt.save_checkpoint(stage.folder, stage.done, trained, moments, state, settings.keep)
    wait_for_all(process)


# ------------------------------------------------------------------------------------------------
# Begin or resume a stage
# ------------------------------------------------------------------------------------------------
def begin_or_resume(
    number: int, model: GenHancer, pictures: int, settings: Settings, process: Process, run: Path
) -> Stage:
    """Everything at the point from which the loop goes on.

    Raises: ValueError where a checkpoint is there that these settings could not have written.
    """
    folder = run / f"stage{number}"
    torch.manual_seed(seed_of("LoRA", settings.seed, number))  # A matrices, alike on every rank
    fingerprints = enter(number, model, settings, run)
    model.train()
    groups = assemble.parameter_groups(model, settings, number)  # who learns, and how fast
    agreed = {
        "stage": number,
        "architecture": model.architecture(),
        "fingerprints": fingerprints,
        "settings": {**relevant(settings, number), "images": pictures},
    }
    optimizer = assemble.make_optimizer(groups, settings, process)
    window = runlog.Window(model.paradigm.level)
    stage = Stage(number, folder, groups, optimizer, agreed, window)
    if found := ckpt.checkpoints_in(folder):
        resume(stage, model, found[-1])
    if process.is_main:  # nothing was refused: only now is anything written
        runlog.write_config(settings, process, run)
        runlog.trim_metrics(run / "metrics.jsonl", number, stage.done)
        steps, count = settings.steps(number), sum(p.numel() for g in groups for p in g["params"])
        print(
            f"stage {number}: {count / 1e6:.2f} M trainable parameters, step {stage.done} of "
            f"{steps}, {steps * settings.batch:,} images to see"
        )
    return stage


def enter(number: int, model: GenHancer, settings: Settings, run: Path) -> dict[str, str]:
    """Say who learns in this stage; stage 2 first takes over what stage 1 has learnt.

    Returns: fingerprints of what does not learn. A checkpoint holds only what trains; these say
        what it was trained against.
    """
    paradigm = model.paradigm
    parts = {"clip": model.visual, "tokenizer": paradigm.tokenizer}
    if not paradigm.denoiser_learns:
        parts["denoiser"] = paradigm.denoiser
    fingerprints = {name: fingerprint(part) for name, part in parts.items()}
    if number == 1:
        model.start_stage1()
        return fingerprints
    if not settings.end_to_end:
        take_over_stage1(model, fingerprints, Path(settings.stage1_from or run))
    for name in ("project_vector", "project_context"):  # what stage 1 handed over
        if projector := getattr(model, name):
            fingerprints[name] = fingerprint(projector)
    fingerprints["denoiser"] = fingerprint(paradigm.denoiser)
    assemble.start_stage2(model, settings)
    return fingerprints


def take_over_stage1(model: GenHancer, fingerprints: dict[str, str], run: Path) -> None:
    """Projectors and denoiser as the newest stage 1 of `run` left them.

    Raises: ValueError where there is none, or where it does not fit, and why.
    """
    found = ckpt.checkpoints_in(run / "stage1")
    if not found:
        raise ValueError(
            f"stage 2 needs stage 1, and {run / 'stage1'} holds no checkpoint: run --stage 1 "
            "first, or name a run that has one with --stage1_from"
        )
    # The tower that stage 1 looked through must be the very one that stage 2 adapts: same shape,
    # same weights. A denoiser that learnt to read other features would teach nonsense.
    mine = {"architecture": model.architecture(), "fingerprints": fingerprints}
    message = f"stage 1 in {found[-1]} differs from this run in its {{what}}: {{difference}}"
    ckpt.require_same(ckpt.read_state(found[-1]), mine, message)
    model.start_stage1()
    ckpt.restore(model, found[-1])


def resume(stage: Stage, model: GenHancer, checkpoint: Path) -> None:
    """Weights, moments, and what had been seen since the last line. There are no generator states
    to restore, and the data's position follows from the step."""
    state = ckpt.read_state(checkpoint)
    agreed = {what: stage.agreed[what] for what in ("architecture", "fingerprints", "settings")}
    message = (
        f"{stage.folder} differs from this run in its {{what}} ({{difference}}); choose another "
        "--name, or delete that folder to start afresh"
    )
    ckpt.require_same(state, agreed, message)
    ckpt.restore(model, checkpoint)
    stage.optimizer.load_state_dict(ckpt.read_optimizer(checkpoint))  # the moments
    stage.done, stage.unreadable = state["step"], set(state["unreadable"])
    stage.window = runlog.Window(model.paradigm.level, state["window"])


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------
def command_line() -> Settings:
    summary, example = __doc__.split("\n\n")[:2]
    return parse_settings(Settings, summary, example, preset=preset_of)


def saved(settings: Settings) -> str:
    """What survives whatever happens now."""
    folder = run_directory(settings)
    return f"checkpoints so far are in {folder}; the same command goes on from the newest"


def main(settings: Settings) -> None:
    """Alg. 1 and 2: stage 1, then stage 2. A finished stage is recognised by its checkpoint."""
    run = run_directory(settings)
    check(settings)
    if settings.plan:
        from training.plan import print_plan  # for this alone: it brings fake tensors along

        print_plan(settings, int(os.environ.get("WORLD_SIZE", settings.gpus)))
        return
    process = start_process(settings.precision)
    with ending_well(process, saved(settings)):
        clip, model = assemble.build_model(settings, process)
        dataset = assemble.build_data(settings, model, process)  # pictures, no captions
        if settings.stage in ("1", "both") and not settings.end_to_end and not settings.stage1_from:
            run_stage(1, model, dataset, settings, process, run)
        if settings.stage in ("2", "both"):
            run_stage(2, model, dataset, settings, process, run)
            if process.is_main:
                runlog.write_enhanced(clip, model, settings, run)
                print(f"enhanced model: {run / 'enhanced'}")


if __name__ == "__main__":
    chosen = command_line()
    run_command(lambda: main(chosen), lambda: saved(chosen))
