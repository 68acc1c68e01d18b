"""A stage under way: who learns, where it goes on, and what must agree for that.

Stage 1 and stage 2 are the same loop (train.py) on the same model. What makes the difference is
prepared here: which parameters learn, at which rate, from which weights. And whatever a checkpoint
was trained against (the frozen CLIP, the tokenizer, in stage 2 the denoiser) is known by its
fingerprint, so that no run goes on with other parts than it began with.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from data import MicroBatches, Share, batches
from genhancer import GenHancer
from settings import Settings, relevant, run_directory
from training import assemble, runlog
from training import checkpoints as ckpt
from training.assemble import seed_of
from training.preflight import other_run, read_state, require_same
from training.process import Process


@dataclass
class Stage:
    """What `begin` prepares and the loop moves forward."""

    number: int
    model: GenHancer
    learner: nn.Module
    """the model, or the model under DDP"""
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
        share = shared_out(self.settings, self.process)
        seed = seed_of("order", self.settings.seed, self.number)
        order = MicroBatches(len(dataset), share, seed, start_step=self.done)
        stream = batches(dataset, order, self.settings.workers)
        while True:
            yield list(islice(stream, order.accumulation))


def shared_out(settings: Settings, process: Process) -> Share:
    """This process's part of every global batch."""
    micro = settings.micro(process.ranks)
    return Share(settings.batch, micro, process.rank, process.ranks)


def begin(number: int, model: GenHancer, settings: Settings, process: Process) -> Stage:
    """A stage at step 0, of a model that is ready for it."""
    torch.manual_seed(seed_of("LoRA", settings.seed, number))  # A matrices, alike on every rank
    if number == 1:
        model.start_stage1()
    else:
        assemble.start_stage2(model, settings)
    model.train()
    groups = assemble.parameter_groups(model, settings, number)  # who learns, and how fast
    optimizer = assemble.make_optimizer(groups, settings, process)
    window = runlog.Window(model.paradigm.level)
    return Stage(number, model, model, settings, process, optimizer, window)


def begin_or_resume(
    number: int, model: GenHancer, pictures: int, settings: Settings, process: Process
) -> Stage:
    """A stage of a run, at the step from which the loop goes on.

    Raises: ValueError where a checkpoint is there that these settings could not have written.
    """
    run = run_directory(settings)
    if number == 2 and not settings.end_to_end:
        take_over_stage1(model, Path(settings.stage1_from or run))
    fingerprints = assemble.fingerprints_of(model, number)
    stage = begin(number, model, settings, process)
    stage.agreed = {
        "stage": number,
        "architecture": model.architecture(),
        "fingerprints": fingerprints,
        "settings": {**relevant(settings, number), "images": pictures},
    }
    if found := ckpt.checkpoints_in(stage.folder):
        resume(stage, found[-1])
    if process.is_main:  # nothing was refused: only now is anything written
        if number == 2 and stage.done < settings.steps(number):
            # The card says that the enhanced model is this run's: from here on it is an older one.
            (run / "enhanced" / "README.md").unlink(missing_ok=True)
        if stage.done == 0:
            runlog.write_config(settings, number, process, run)
        runlog.trim_metrics(run / "metrics.jsonl", number, stage.done)
        steps, count = settings.steps(number), sum(p.numel() for p in stage.learning)
        print(
            f"stage {number}: {count / 1e6:.2f} M trainable parameters, step {stage.done} of "
            f"{steps}, {steps * settings.batch:,} images to see"
        )
    return stage


def take_over_stage1(model: GenHancer, run: Path) -> None:
    """Projectors and denoiser as the newest stage 1 of `run` left them. (That there is one was seen
    before anything was loaded.) Raises: ValueError where it does not fit, and why."""
    newest = ckpt.checkpoints_in(run / "stage1")[-1]
    # The tower that stage 1 looked through must be the very one that stage 2 adapts: same shape,
    # same weights. A denoiser that learnt to read other features would teach nonsense.
    mine = {"architecture": model.architecture()}
    mine["fingerprints"] = assemble.fingerprints_of(model, 1)
    message = f"stage 1 in {newest} differs from this run in its {{what}}: {{difference}}"
    require_same(read_state(newest), mine, message)
    model.start_stage1()
    ckpt.restore(model, newest)


def resume(stage: Stage, checkpoint: Path) -> None:
    """Weights, moments, and what had been seen since the last line. There are no generator states
    to restore, and the data's position follows from the step."""
    state = read_state(checkpoint)
    agreed = {what: stage.agreed[what] for what in ("architecture", "fingerprints", "settings")}
    require_same(state, agreed, other_run(stage.folder))
    ckpt.restore(stage.model, checkpoint)
    stage.optimizer.load_state_dict(ckpt.read_optimizer(checkpoint))  # the moments
    stage.done, stage.unreadable = state["step"], set(state["unreadable"])
    stage.window = runlog.Window(stage.model.paradigm.level, state["window"])
