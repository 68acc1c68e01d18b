"""A stage under way: who learns, where it goes on, and what must agree for that.

Stage 1 and stage 2 are the same loop (train.py) on the same model. What makes the difference is
prepared here: which parameters learn, at which rate, from which weights. And whatever a checkpoint
was trained against (the frozen CLIP, the tokenizer, in stage 2 the denoiser) is known by its
fingerprint, so that no run goes on with other parts than it began with.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from data import MicroBatches, Share, batches
from genhancer import GenHancer
from settings import Settings, relevant, run_directory, stage1_runs
from training import assemble, feature_cache, runlog, speed
from training import checkpoints as ckpt
from training.assemble import seed_of
from training.preflight import newest_in, newest_sound, other_run, read_state, require_same, verify
from training.process import Process, agreed, in_parallel, union_over_ranks
from training.sharding import shared_out
from util.files import sweep

PATIENCE = 30  # seconds; a network drive may be late


@dataclass
class Stage:
    """What `begin` prepares and the loop moves forward."""

    number: int
    model: GenHancer
    learner: nn.Module
    """the model, or the model under DDP; under FSDP the model itself is shared out"""
    settings: Settings
    process: Process
    optimizer: torch.optim.Optimizer
    window: runlog.Window
    """sums for the next line of metrics.jsonl"""
    agreed: dict = field(default_factory=dict)
    """architecture, fingerprints and settings: what every later start must agree on"""
    board: object = None
    """TensorBoard's writer, if asked for"""
    done: int = 0
    """steps so far"""
    writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    writing: Future | None = None
    """the checkpoint under way"""
    saved_at: float = field(default_factory=time.time)
    """when the last one was begun"""
    lines: int = 0
    """of metrics.jsonl that this stage has written"""
    unreadable: set[str] = field(default_factory=set)
    """pictures that no rank could read, so far"""
    unsaid: set[str] = field(default_factory=set)
    """those among them that this rank has not yet told the others"""

    @property
    def learning(self) -> list[nn.Parameter]:
        """Every parameter that this stage trains."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def folder(self) -> Path:
        """Of its checkpoints."""
        return run_directory(self.settings) / f"stage{self.number}"

    def global_batches(self, dataset) -> Iterator[list[dict]]:
        """From the present step on: this rank's pieces of one global batch after the other."""
        share = share_of_batch(self.settings, self.process)
        seed = seed_of("order", self.settings.seed, self.number)
        order = MicroBatches(len(dataset), share, seed, start_step=self.done)
        draws = Draws(self.model.dice(), self.settings.seed, self.number, self.settings.batch)
        if not self.model.must_look:  # a cache may hold all that this stage asks for
            dataset = getattr(dataset, "features_alone", dataset)
        stream = batches(dataset, order, self.settings.workers, draws)
        while True:
            yield list(islice(stream, order.accumulation))


@dataclass(frozen=True)
class Draws:
    """Puts a batch's randomness beside its images, in the worker process that reads them.

    Noise, t and masks belong to the image, the number of masked tokens to the step: however many
    ranks, pieces and workers there are. What is left to chance is LoRA's dropout.
    """

    dice: Callable
    seed: int
    stage: int
    global_batch: int

    def __call__(self, batch: dict) -> dict:
        positions = batch["position"]
        own = [seed_of("image", self.seed, self.stage, position) for position in positions]
        step = positions[0] // self.global_batch
        common = seed_of("masked count", self.seed, self.stage, step)
        generators = [torch.Generator().manual_seed(seed) for seed in (*own, common)]
        return {**batch, "draws": self.dice(generators[:-1], generators[-1])}


def share_of_batch(settings: Settings, process: Process) -> Share:
    """This process's part of every global batch."""
    micro = settings.micro(process.ranks)
    return Share(settings.batch, micro, process.rank, process.ranks)


def begin(
    number: int,
    model: GenHancer,
    settings: Settings,
    process: Process,
    checkpoint: Path | None = None,
) -> Stage:
    """A stage at step 0, of a model that is ready for it; or as a checkpoint left it."""
    torch.manual_seed(seed_of("LoRA", settings.seed, number))  # A matrices, alike on every rank
    if number == 1:
        model.start_stage1()
    else:
        assemble.start_stage2(model, settings)
    model.train()
    if checkpoint:
        ckpt.restore(model, checkpoint)
    speed.lower_frozen(model, settings, process)
    if settings.shard and process.ranks > 1:
        learner = shared_out(model, process, list(speed.blocks_of(model)))
    else:
        learner = in_parallel(model, process)
    if settings.compile:
        speed.compile_blocks(model)
    groups = assemble.parameter_groups(model, settings, number)  # who learns, and how fast
    optimizer = assemble.make_optimizer(groups, settings)
    window = runlog.Window(model, process)
    return Stage(number, model, learner, settings, process, optimizer, window)


def begin_or_resume(
    number: int, model: GenHancer, dataset: Dataset, settings: Settings, process: Process
) -> Stage:
    """A stage of a run, at the step from which the loop goes on.

    Raises: ValueError where a checkpoint is there that these settings could not have written.
    """
    run = run_directory(settings)
    if number == 2 and not settings.end_to_end:
        for name, own in zip(model.paradigms, stage1_runs(settings), strict=True):
            take_over_stage1(model, name, own, process)
    folder = run / f"stage{number}"
    mine = {
        "architecture": model.architecture(),
        "fingerprints": assemble.fingerprints_of(model, number),
        "settings": {**relevant(settings, number), **feature_cache.which(dataset)},
    }
    newest, damaged = newest_for_all(folder, process)
    if newest:
        require_same(read_state(newest), mine, other_run(folder))
    stage = begin(number, model, settings, process, newest)
    stage.agreed = {"stage": number, "steps": settings.steps(number), **mine}
    if newest:
        resume(stage, newest)
    if process.is_main:  # nothing was refused: only now is anything written
        clean(run, folder, newest, damaged)
        if number == 2 and stage.done < settings.steps(number):
            # The card says that the enhanced model is this run's: from here on it is an older one.
            (run / "enhanced" / "README.md").unlink(missing_ok=True)
        if stage.done == 0:
            runlog.write_config(settings, number, process, run)
        else:
            runlog.update_places(settings, number, run)
        written = {number: stage.lines}
        if number == 2 and (first := newest_in(run / "stage1")):
            written[1] = read_state(first)["lines"]
        runlog.trim_metrics(run / "metrics.jsonl", number, stage.done, written)
        steps, count = settings.steps(number), sum(p.numel() for p in stage.learning)
        print(
            f"stage {number}, {settings.denoiser}: {count / 1e6:.2f} M trainable parameters, "
            f"step {stage.done} of {steps}, {steps * settings.batch:,} images to see"
        )
    return stage


def clean(run: Path, folder: Path, newest: Path | None, damaged: list[str]) -> None:
    """Remove what killed starts have left half done in a run, and put aside the checkpoints of a
    stage that are `damaged`: they would count as its newest."""
    sweep(run, "**/*")
    for name in damaged:
        aside = folder / f"damaged_{name}"
        shutil.rmtree(aside, ignore_errors=True)
        (folder / name).rename(aside)
    for half in (*folder.glob("tmp_*"), *folder.glob("step_*")):
        if not (half.name.startswith("step_") and (half / "state.json").is_file()):
            shutil.rmtree(half, ignore_errors=True)
    if newest:  # as its own start would have gone on: this start's --keep may be another one
        ckpt.drop_older(folder, read_state(newest).get("keep", sys.maxsize))


def newest_for_all(folder: Path, process: Process) -> tuple[Path | None, list[str]]:
    """The newest sound checkpoint in a folder, and the names of those after it, which are not. The
    main process decides which it is: on a network drive the others may see an older list, on a disk
    of their own none at all.

    Raises: ValueError on all ranks where one of them does not see it, or none is sound.
    """
    name, damaged, refused = "", [], ""
    if process.is_main:
        try:
            found, problems = newest_sound(folder, verify)
            name = found.name if found else ""
            there = ckpt.checkpoints_in(folder)
            damaged = [c.name for c in there[there.index(found) + 1 :]] if found else []
            for problem in problems:
                print(f"note: {problem}; going on from {name} before it", file=sys.stderr)
        except ValueError as error:
            refused = str(error)
    name, damaged, refused = agreed((name, damaged, refused), process)
    if refused:
        raise ValueError(refused)
    newest = folder / name if name else None
    deadline = time.time() + PATIENCE
    while newest and not newest.is_dir() and time.time() < deadline:
        time.sleep(0.2)
    blind = {str(process.rank)} if newest and not newest.is_dir() else set()
    if blind := union_over_ranks(blind, process):
        raise ValueError(
            f"{newest} is there for rank 0 and not for rank {', '.join(sorted(blind))}: --runs "
            "must be a folder that all machines of the run share"
        )
    return newest, damaged


def take_over_stage1(model: GenHancer, name: str, run: Path, process: Process) -> None:
    """A paradigm's projectors and denoiser as the newest stage 1 of `run` left them. (That there is
    one was seen before anything was loaded.) Raises: ValueError where it does not fit, and why."""
    newest, damaged = newest_for_all(run / "stage1", process)
    if damaged:  # an earlier one may be half a stage 1, and another stage 2 stands on the newest
        raise ValueError(
            f"stage 1 in {run / 'stage1'}: {damaged[-1]} is damaged: delete it and run --stage 1 "
            "again, which goes on from the one before"
        )
    # The tower that stage 1 looked through must be the very one that stage 2 adapts: same shape,
    # same weights. A denoiser that learnt to read other features would teach nonsense.
    mine = {"architecture": model.architecture(name)}
    mine["fingerprints"] = assemble.fingerprints_of(model, 1, name)
    message = f"stage 1 in {newest} differs from this run in its {{what}}: {{difference}}"
    require_same(read_state(newest), mine, message)
    model.start_stage1(name)
    ckpt.restore(model, newest)


def resume(stage: Stage, checkpoint: Path) -> None:
    """Moments, and what had been seen since the last line. (The weights are there since `begin`.)
    There are no generator states to restore, and the data's position follows from the step."""
    state = read_state(checkpoint)
    ckpt.restore_moments(stage.model, stage.optimizer, checkpoint)
    stage.done, stage.unreadable = state["step"], set(state["unreadable"])
    stage.lines = state["lines"]
    every, now = state["log_every"], stage.settings.log_every
    if every != now and stage.process.is_main:
        print(
            f"note: metrics.jsonl has a line every {every} steps up to step {stage.done}, and one "
            f"every {now} from there on",
            file=sys.stderr,
        )
    stage.window = runlog.Window(stage.model, stage.process, state["window"])


def save(stage: Stage) -> None:
    """A checkpoint of the stage as it is now, written while training goes on.

    What the writer gets is a copy on the CPU, so that the next step may change the original. A
    model that is shared out is too large for a copy on one machine: it is collected and written
    tensor by tensor while all ranks wait.
    """
    finish_writing(stage)
    stage.saved_at = time.time()
    stage.window.gather()
    tensors = {
        "trained": ckpt.trainable(stage.model),
        "moments": ckpt.moments(stage.model, stage.optimizer),
    }
    traces = {"window": stage.window.state(), "unreadable": sorted(stage.unreadable)}
    traces |= {"lines": stage.lines, "log_every": stage.settings.log_every}
    what = stage.folder, stage.done, tensors, {**stage.agreed, **traces}, stage.settings.keep
    if stage.learner is stage.model and stage.process.ranks > 1:  # shared out
        ckpt.save_checkpoint(*what, writes=stage.process.is_main)
    elif stage.process.is_main:
        for group in tensors.values():
            for name, tensor in group.items():
                group[name] = tensor.detach().to("cpu", copy=True)
        stage.writing = stage.writer.submit(ckpt.save_checkpoint, *what)


def overdue(stage: Stage) -> bool:
    """Whether --save_minutes have passed since the last checkpoint, by the main process's clock."""
    late = time.time() - stage.saved_at > 60 * stage.settings.save_minutes
    return agreed(late, stage.process)


def finish_writing(stage: Stage) -> None:
    """Wait for the checkpoint that is being written. Raises: OSError where it could not be."""
    if stage.writing:
        stage.writing.result()
        stage.writing = None
