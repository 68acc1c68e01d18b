"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder ``step_00001000`` with

    trained.safetensors   every parameter that trains, and nothing else (all others are given)
    moments.safetensors   AdamW's state of each: NAME.step, NAME.exp_avg, NAME.exp_avg_sq
    state.json            step, architecture, settings, log window, and fingerprints of what does
                          not train

No generator states: the randomness of a step is a pure function of (seed, step), see `draw` in
genhancer.py and `MicroBatches` in data.py. Tensors are whole and known by name, so any number of
ranks, sharing the model out or not, goes on from what any other number wrote.

The folder is written under a temporary name, flushed to the disk and then renamed. A rename either
happened or did not; whoever pulls the plug finds the previous checkpoint whole.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from training.preflight import checkpoints_in
from training.sharding import share_of, whole
from util.files import flush, stream_tensors

GO_BACK = "delete this folder to go on from the one before"


def trainable(module: torch.nn.Module) -> dict[str, Tensor]:
    """What the present stage changes, by parameter name: all that a checkpoint must hold."""
    return {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}


def moments(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by the names of the parameters it belongs to."""
    state = optimizer.state
    named = ((n, state[p]) for n, p in module.named_parameters() if p in state)
    return {f"{name}.{key}": value for name, own in named for key, value in own.items()}


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict,
    keep: int,
    writes: bool = True,
) -> None:
    """Write ``folder/step_XXXXXXXX`` and drop all but the newest `keep`.

    Args:
        tensors: by file, "trained" and "moments"; shared-out ones are collected from all ranks.
        state: any JSON that the next start must know.
        writes: False on all ranks but one: they only take part in the collecting.
    """
    target = folder / f"step_{step:08d}"
    temporary = folder / f"tmp_{target.name}_{os.getpid()}"
    if writes:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    for name, group in tensors.items():
        stream_tensors(group, temporary / f"{name}.safetensors" if writes else None, whole)
    if not writes:
        return
    (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
    for file in temporary.iterdir():  # on the disk before the rename makes it visible
        flush(file)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)
    for old in checkpoints_in(folder)[:-keep]:
        shutil.rmtree(old)
    for leftover in folder.glob("tmp_*"):  # of runs that were killed while writing
        shutil.rmtree(leftover, ignore_errors=True)


# ------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------
@contextmanager
def opened(checkpoint: Path, name: str) -> Iterator[safe_open]:
    """One of its files of tensors. Raises: ValueError where it is damaged, or lacks a tensor that
    is asked for."""
    file = checkpoint / f"{name}.safetensors"
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"checkpoint {checkpoint}: {file.name} is damaged ({error}); {GO_BACK}"
        ) from None


def restore(module: torch.nn.Module, checkpoint: Path) -> None:
    """Put a checkpoint's tensors into the parameters of `module` that train, exactly those.

    Raises: ValueError naming the first that is missing, left over or of another shape.
    """
    own = trainable(module)
    with opened(checkpoint, "trained") as file:
        if different := sorted(set(file.keys()) ^ own.keys()):
            side = "the checkpoint has no" if different[0] in own else "this model has no"
            raise ValueError(f"checkpoint {checkpoint}: {side} {different[0]}")
        for name, parameter in own.items():
            parameter.copy_(share_of(fitting(file, name, parameter, checkpoint), parameter))


def restore_moments(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path
) -> None:
    """Give a fresh AdamW the moments of a checkpoint. Its count of steps goes to the parameter's
    device, where the fused kernel wants it. Raises: ValueError as `restore`."""
    with opened(checkpoint, "moments") as file:
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            state = {"step": file.get_tensor(f"{name}.step").to(parameter.device)}
            for key in ("exp_avg", "exp_avg_sq"):
                full = fitting(file, f"{name}.{key}", parameter, checkpoint)
                state[key] = share_of(full, parameter)
            optimizer.state[parameter] = state


def fitting(file: safe_open, name: str, like: Tensor, checkpoint: Path) -> Tensor:
    """A tensor of a file, if it has the shape of `like`."""
    tensor = file.get_tensor(name)
    if tensor.shape != like.shape:
        raise ValueError(
            f"checkpoint {checkpoint} does not fit this model: {name} has the shape "
            f"{tuple(tensor.shape)}, expected {tuple(like.shape)}"
        )
    return tensor
