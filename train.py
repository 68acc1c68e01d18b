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

The order of this file: set-up → the loop → stage 2's way to stage 1. Settings are in settings.py,
model and data are put together in assemble.py, what a run leaves behind is in runlog.py.
"""

import contextlib
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoints as ckpt
from assemble import build_data, build_model, seed_of, start_stage2
from cli import parse_settings, run_command, speaker
from data import MicroBatches, batches
from genhancer import GenHancer
from runlog import (
    Place,
    Window,
    draw_samples,
    memory_gb,
    trim_metrics,
    write_config,
    write_enhanced,
)
from settings import PRESETS, Settings, check, preset_of, relevant, run_directory

# How gloo and NCCL speak of a peer that is gone.
LOST_PEER = re.compile(r"(?i)connection (closed|reset|refused)|nccl|timed ?out|timeout")


# ------------------------------------------------------------------------------------------------
# Set-up
# ------------------------------------------------------------------------------------------------
def set_up(settings: Settings) -> Place:
    """Device, precision and, under torchrun, the process group (nccl on GPUs, gloo on CPUs)."""
    # torchrun tells each process who it is through the environment; alone, we are rank 0 of 1.
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    )
    if cuda:
        torch.cuda.set_device(device)
        # What autocast leaves in float32 may use TF32: its rounding is far below the noise of a
        # stochastic gradient.
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        # With a few dozen tokens the fused CPU kernel costs more than it saves, and PyTorch's
        # separate inference path for attention rounds differently: frozen and trained tower must
        # agree.
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.mha.set_fastpath_enabled(False)
    if "RANK" in os.environ and not dist.is_initialized():
        # After a restart torchrun's store still holds the addresses of the dead: a prefix of its
        # own for each attempt keeps the living from calling them.
        store, _, _ = next(dist.rendezvous("env://", rank, ranks))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt{attempt}", store)
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=store, rank=rank, world_size=ranks
        )
    # bf16 keeps float32's range, so no loss scaling is needed. CPUs without bf16 units emulate it,
    # a hundred times slower than float32 where we measured: "auto" never picks it there.
    bf16 = settings.precision == "bf16" or (
        settings.precision == "auto" and cuda and torch.cuda.is_bf16_supported()
    )
    return Place(rank, ranks, device, bf16)


# ------------------------------------------------------------------------------------------------
# One stage
# ------------------------------------------------------------------------------------------------
def learning_rate(settings: Settings, peak: float, step: int, steps: int) -> float:
    """Constant is the paper; the toy's few steps profit from warm-up and decay."""
    warm = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    decay = 0.5 * (1 + math.cos(math.pi * step / steps)) if settings.schedule == "cosine" else 1.0
    return peak * warm * decay


def parameter_groups(model: GenHancer, settings: Settings, stage: int) -> list[dict]:
    """Trainable parameters with their peak learning rates.

    End to end, the fresh denoiser and projectors need the learning rate that stage 1 would have
    given them; the tower keeps stage 2's.
    """
    tower = [p for n, p in model.named_parameters() if p.requires_grad and n.startswith("visual.")]
    rest = [
        p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("visual.")
    ]
    peak = settings.stage1_lr if stage == 1 or settings.end_to_end else settings.stage2_lr
    groups = [{"params": tower, "peak": settings.stage2_lr}, {"params": rest, "peak": peak}]
    return [g for g in groups if g["params"]]


def make_optimizer(groups: list[dict], settings: Settings, place: Place) -> torch.optim.Optimizer:
    """AdamW (App. B; betas, eps and weight decay are the official code's).

    With --zero every rank keeps the two moments of its share of the parameters only, updates that
    share and sends it to the others (ZeRO, stage 1). Same numbers; of the full size's 10.5 GB of
    moments, each of eight GPUs holds 1.3.
    """
    how = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": settings.weight_decay}
    how["fused"] = place.device.type == "cuda"  # without a temporary as large as the weights
    if settings.zero and place.ranks > 1:
        # Here and not above: this import alone takes half a second.
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=0.0, **how)
    return torch.optim.AdamW(groups, lr=0.0, **how)


def trained(model: GenHancer) -> dict[str, torch.Tensor]:
    """What this stage changes, by parameter name: all that a checkpoint must hold."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def run_stage(
    stage: int, model: GenHancer, dataset, settings: Settings, place: Place, run: Path
) -> None:
    """Train one stage to its last step, from its newest checkpoint if there is one.

    The two stages share every line of the loop; they differ in who requires a gradient.
    """
    steps, folder = (settings.stage1_steps, settings.stage2_steps)[stage - 1], run / f"stage{stage}"
    torch.manual_seed(seed_of("LoRA", settings.seed, stage))  # A matrices, alike on every rank
    # A checkpoint holds only what trains. These hashes say what it was trained against.
    frozen = {
        "clip": ckpt.fingerprint(model.visual),
        "tokenizer": ckpt.fingerprint(model.paradigm.tokenizer),
    }
    if not model.paradigm.denoiser_learns:
        frozen["denoiser"] = ckpt.fingerprint(model.paradigm.denoiser)
    if stage == 1:
        model.start_stage1()
    else:
        if not settings.end_to_end:
            load_stage1(model, frozen, Path(settings.stage1_from or run))
        for part in ("project_vector", "project_context"):  # what stage 1 handed over
            if module := getattr(model, part):
                frozen[part] = ckpt.fingerprint(module)
        frozen["denoiser"] = ckpt.fingerprint(model.paradigm.denoiser)
        start_stage2(model, settings)
    model.train()
    groups = parameter_groups(model, settings, stage)
    optimizer = make_optimizer(groups, settings, place)

    # -- resume ----------------------------------------------------------------------------------
    about = {
        "stage": stage,
        "architecture": model.architecture(),
        "frozen": frozen,
        "settings": {**relevant(settings, stage), "images": len(dataset)},
    }
    codes = getattr(model.paradigm.tokenizer.config, "codes", None)  # K; None: continuous
    start, window, bad = 0, Window(model.paradigm.where), set()
    if found := ckpt.checkpoints_in(folder):
        state = ckpt.read_state(found[-1])
        for what in ("architecture", "frozen", "settings"):
            if difference := ckpt.first_difference(state[what], about[what]):
                raise ValueError(
                    f"{folder} was trained with another {what} ({difference}); choose another "
                    "--name, or delete that folder to start afresh"
                )
        ckpt.put(model, ckpt.read_trained(found[-1]), set(trained(model)), str(found[-1]))
        optimizer.load_state_dict(ckpt.read_optimizer(found[-1]))
        start, window, bad = (
            state["step"],
            Window(model.paradigm.where, state["window"]),
            set(state["unreadable"]),
        )
    if place.chief:
        trim_metrics(run / "metrics.jsonl", stage, start)
        count = sum(p.numel() for g in groups for p in g["params"])
        print(
            f"stage {stage}: {count / 1e6:.2f} M trainable parameters, step {start} of {steps}, "
            f"{steps * settings.batch:,} images to see"
        )

    # DDP averages gradients over ranks while backward runs. Frozen parts have none to average, and
    # buffers never change, so neither is sent. (Newer PyTorch warns that the flag was renamed; the
    # new name sends them once more.) Gradients live in DDP's own buckets: one copy, not two.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    wrapped = (
        DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        if place.ranks > 1
        else model
    )
    micro = min(settings.micro_batch, settings.batch // place.ranks) or 1
    sampler = MicroBatches(
        len(dataset),
        settings.batch,
        micro,
        place.rank,
        place.ranks,
        seed_of("order", settings.seed, stage),
        start,
    )
    stream = batches(dataset, sampler, settings.workers)
    clock, seen, fresh = time.time(), 0, set()

    # -- the loop --------------------------------------------------------------------------------
    with tqdm(
        total=steps,
        initial=start,
        desc=f"stage {stage}",
        unit="step",
        disable=not place.chief,
        dynamic_ncols=True,
    ) as bar:
        for step in range(start, steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, group["peak"], step, steps)
            done = step + 1
            # The drift needs a second look through the original tower, so it is measured on logged
            # steps only (always, if it is part of the loss).
            logging = done % settings.log_every == 0 or done == steps
            total, names, unreadable = add_gradients(
                wrapped,
                model,
                stream,
                sampler.accumulation,
                settings,
                place,
                stage,
                step,
                logging,
                window,
            )
            # After the exchange all ranks hold the same gradient, hence the same norm and the same
            # verdict below: either all go on or all stop.
            norm = float(
                torch.nn.utils.clip_grad_norm_(
                    [p for g in groups for p in g["params"]], settings.clip_grad
                )
            )
            if not (math.isfinite(total) and math.isfinite(norm)):
                last_good = ckpt.checkpoints_in(folder)
                raise ValueError(
                    f"stage {stage}, step {step}: loss {total} and gradient norm {norm} are not "
                    f"finite; images: {', '.join(names[:8])}…; last good checkpoint: "
                    f"{last_good[-1] if last_good else 'none'}; try a lower learning rate"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            window.sums[-1] += norm
            seen += settings.batch
            fresh |= unreadable - bad
            saving = done % settings.save_every == 0 or done == steps
            if logging or saving:  # the ranks tell each other, and come to one verdict
                for file in sorted(everyones(fresh, place) - bad):
                    bar.write(f"unreadable, replaced by the next: {file}")
                    bad.add(file)
                fresh = set()
            if len(bad) > max(1, 0.05 * len(dataset)):
                raise ValueError(
                    f"{len(bad)} of {len(dataset)} images cannot be read, more than 5 %: the data "
                    f"is not sound; one of them is {min(bad)}"
                )

            # -- traces --------------------------------------------------------------------------
            speed = seen / (time.time() - clock)
            bar.set_postfix(loss=f"{total:.4f}", images_per_s=f"{speed:.0f}", refresh=False)
            bar.update()
            if logging:
                line = {
                    "stage": stage,
                    "step": done,
                    "images": done * settings.batch,
                    **window.line((done - 1) % settings.log_every + 1, codes),
                    "lr": optimizer.param_groups[0]["lr"],
                    "images_per_s": round(speed, 1),
                    "memory_gb": round(memory_gb(place), 2),
                    "unreadable": len(bad),
                }
                window = Window(model.paradigm.where)
                if place.chief:
                    with open(run / "metrics.jsonl", "a") as file:
                        file.write(json.dumps(line) + "\n")
            if place.chief and (done % settings.sample_every == 0 or done == steps):
                picture = run / "samples" / f"stage{stage}_step{done:06d}.png"
                draw_samples(model, dataset, picture, place)
            # The metrics line is written before the checkpoint: a kill between the two leaves a
            # line too many, which the next start removes (`trim_metrics`), never one too few.
            if saving:
                if hasattr(optimizer, "consolidate_state_dict"):  # ZeRO
                    optimizer.consolidate_state_dict(to=0)  # the shares of all ranks
                if place.chief:
                    traces = {"window": window.sums.tolist(), "unreadable": sorted(bad)}
                    state = optimizer.state_dict()
                    ckpt.save_checkpoint(
                        folder, done, trained(model), state, {**about, **traces}, settings.keep
                    )
                if place.ranks > 1:
                    dist.barrier()


def add_gradients(
    wrapped: torch.nn.Module,
    model: GenHancer,
    stream: Iterator[dict],
    accumulation: int,
    settings: Settings,
    place: Place,
    stage: int,
    step: int,
    logging: bool,
    window: Window,
) -> tuple[float, list[str], set[str]]:
    """One global batch, forward and backward, in `accumulation` pieces.

    Args: wrapped: the model, under DDP where there are several ranks; model: the same without.
    Returns: mean loss of this rank's share, names of its images, and the files it could not read.
    """
    total, names, unreadable = 0.0, [], set()
    for piece in range(accumulation):
        batch = next(stream)
        images = batch["image"].to(place.device, non_blocking=True)
        known = {
            k.removeprefix("frozen/"): v.to(place.device, non_blocking=True)
            for k, v in batch.items()
            if k.startswith("frozen/")
        }
        # Noise, t and masks belong to the image, the number of masked tokens to the step: however
        # many ranks and pieces there are. What is left to chance is LoRA's dropout.
        seeds = [seed_of("image", settings.seed, stage, p) for p in batch["position"]]
        seed = seed_of("masked count", settings.seed, stage, step)
        shared = torch.Generator().manual_seed(seed)
        draws = model.draw([torch.Generator().manual_seed(s) for s in seeds], shared)
        draws = {k: v.to(place.device, non_blocking=True) for k, v in draws.items()}
        torch.manual_seed(seed_of("dropout", settings.seed, stage, step, piece, place.rank))
        # Gradients are exchanged once a step, on its last piece; until then they only add up.
        last = piece == accumulation - 1
        quiet = wrapped.no_sync() if place.ranks > 1 and not last else contextlib.nullcontext()
        with quiet:
            with torch.autocast(place.device.type, torch.bfloat16, enabled=place.autocast):
                result = wrapped(images, draws, known or None, logging)
            (result["loss"] / accumulation).backward()
        window.add(result, place)
        total += float(result["loss"].detach()) / accumulation
        names += batch["name"]
        unreadable |= {file for files in batch["unreadable"] for file in files}
    return total, names, unreadable


def everyones(files: set[str], place: Place) -> set[str]:
    """The union over ranks."""
    if place.ranks == 1:
        return files
    gathered: list = [None] * place.ranks
    dist.all_gather_object(gathered, files)
    return set().union(*gathered)


def load_stage1(model: GenHancer, frozen: dict, run: Path) -> None:
    """Start from the newest stage 1 of `run`. Raises: ValueError where it does not fit, and why."""
    found = ckpt.checkpoints_in(run / "stage1")
    if not found:
        raise ValueError(
            f"stage 2 needs stage 1, and {run / 'stage1'} holds no checkpoint: run --stage 1 "
            "first, or name a run that has one with --stage1_from"
        )
    # The tower that stage 1 looked through must be the very one that stage 2 adapts: same shape,
    # same weights. A denoiser that learnt to read other features would teach nonsense.
    state = ckpt.read_state(found[-1])
    for what, mine in (("architecture", model.architecture()), ("frozen", frozen)):
        if difference := ckpt.first_difference(state[what], mine):
            raise ValueError(f"stage 1 in {found[-1]} is of another {what}: {difference}")
    model.start_stage1()
    ckpt.put(model, ckpt.read_trained(found[-1]), set(trained(model)), str(found[-1]))


def command_line() -> Settings:
    summary, example = __doc__.split("\n\n")[:2]
    return parse_settings(Settings, PRESETS, summary, example, preset_of=preset_of)


def main(settings: Settings) -> None:
    run = run_directory(settings)
    check(settings)
    if settings.plan:
        from plan import print_plan  # for this alone: it brings PyTorch's fake tensors along

        print_plan(settings, int(os.environ.get("WORLD_SIZE", settings.gpus)))
        return
    place = set_up(settings)
    if place.ranks > 1:
        on_sigterm(settings)
    try:
        clip, model = build_model(settings, place)
        run.mkdir(parents=True, exist_ok=True)
        if place.chief:
            write_config(settings, place, run)
        dataset = build_data(settings, model, place)
        # Alg. 1: stage 1, then stage 2. A finished stage is recognised by its checkpoint and
        # skipped.
        if settings.stage in ("1", "both") and not settings.end_to_end and not settings.stage1_from:
            run_stage(1, model, dataset, settings, place, run)
        if settings.stage in ("2", "both"):
            run_stage(2, model, dataset, settings, place, run)
            if place.chief:
                write_enhanced(clip, model, settings, run)
                print(f"enhanced model: {run / 'enhanced'}")
    except RuntimeError as error:
        # What the survivors notice when a rank dies, if torchrun does not end them first
        # (`on_sigterm`). With --max-restarts it starts all again, from the newest checkpoint.
        if not dist.is_initialized() or not LOST_PEER.search(str(error)):
            raise
        raise ConnectionError(farewell(settings)) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def farewell(settings: Settings) -> str:
    return (
        "another process of this run has died (or torchrun was told to stop), so this one stops "
        f"too; {saved(settings)}, and torchrun --max-restarts 3 would do that by itself"
    )


def on_sigterm(settings: Settings) -> None:
    """SIGTERM is how torchrun ends the survivors. Say so, and go: a rank that cleaned up behind
    itself would wait for the dead one."""

    def stop(number, frame):
        print(f"{speaker('train.py')}: {farewell(settings)}", file=sys.stderr, flush=True)
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, stop)


def saved(settings: Settings) -> str:
    """What survives whatever happens now."""
    where = run_directory(settings)
    return f"checkpoints so far are in {where}; the same command goes on from the newest"


if __name__ == "__main__":
    chosen = command_line()
    run_command(lambda: main(chosen), lambda: saved(chosen))
