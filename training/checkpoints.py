"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder ``step_00001000`` with

    trained.safetensors   every parameter that trains, and nothing else (all others are given)
    moments.safetensors   AdamW's state of each: NAME.step, NAME.exp_avg, NAME.exp_avg_sq
    state.json            step, architecture, settings, log window, fingerprints of what does not
                          train, hashes of both files and of itself (util/sealed.py)

No generator states: the randomness of a step is a pure function of (seed, step), see `draw` in
genhancer.py and `MicroBatches` in data.py. Tensors are whole and known by name, so any number of
ranks, sharing the model out or not, goes on from what any other number wrote.

The folder is written under a temporary name, flushed to the disk and then renamed. A rename either
happened or did not; whoever pulls the plug finds the previous checkpoint whole. What a disk damages
later is noticed by the hashes: the start that finds it says so, and takes the checkpoint before.
"""

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
from util.files import bytes_of, flush_folder, stream_tensors, unwritten
from util.sealed import seal

GO_BACK = "delete this folder to go on from the one before"
HALVES = torch.float16  # runs that are shipped hold their weights so; moments are always whole


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
    Raises: ValueError for weights that are not finite; OSError in one line where the disk is full,
        or the run's folder has gone.
    """
    target = folder / f"step_{step:08d}"
    temporary = folder / f"tmp_{target.name}"
    try:
        hashes = _write_tensors(tensors, temporary, writes)
        if not writes:
            return
        with open(temporary / "state.json", "w", encoding="utf-8") as file:
            file.write(seal({"step": step, **state, "keep": keep, "files": hashes}))
            file.flush()
            os.fsync(file.fileno())
        flush_folder(temporary)  # on the disk before the rename makes it visible
        shutil.rmtree(target, ignore_errors=True)
        os.rename(temporary, target)
        flush_folder(folder)
        drop_older(folder, keep)
    except OSError as error:
        size = sum(map(bytes_of, tensors.values()))
        raise unwritten(target, error, size) from None
    finally:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)


def drop_older(folder: Path, keep: int) -> None:
    """All checkpoints but the newest `keep`."""
    for old in checkpoints_in(folder)[:-keep]:
        # A folder that is half removed must not look like a checkpoint that is damaged.
        (old / "state.json").unlink()
        shutil.rmtree(old)


def _write_tensors(
    tensors: dict[str, dict[str, Tensor]], folder: Path, writes: bool
) -> dict[str, str]:
    """The files of tensors in a new folder. Returns: the hash of each, by its name.

    Raises: ValueError for numbers that are not finite: a step can overflow though loss and gradient
        were sound, and no checkpoint shall keep that.
    """
    if writes:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while writing
        # Not its parents: a run whose folder was removed under it shall notice.
        folder.parent.mkdir(exist_ok=True)
        folder.mkdir()
    hashes = {}
    for name, group in tensors.items():

        def checked(tensor: Tensor, name: str = name) -> Tensor:
            full = whole(tensor)
            if not torch.isfinite(full).all():
                raise ValueError(
                    f"what was trained is not finite any more ({name}): no checkpoint was written; "
                    "try a lower learning rate"
                )
            return full

        if not writes:
            stream_tensors(group, None, checked)
            continue
        with open(folder / f"{name}.safetensors", "wb") as file:
            hashes[f"{name}.safetensors"] = stream_tensors(group, file, checked)
            file.flush()
            os.fsync(file.fileno())
    return hashes


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

    Raises: ValueError naming the first that is missing, left over, of another shape or type, or not
        finite.
    """
    own = trainable(module)
    with opened(checkpoint, "trained") as file:
        if different := sorted(set(file.keys()) ^ own.keys()):
            side = "the checkpoint has no" if different[0] in own else "this model has no"
            raise ValueError(f"checkpoint {checkpoint}: {side} {different[0]}")
        for name, parameter in own.items():
            types = {parameter.dtype, HALVES}
            full = fitting(file, name, parameter.shape, types, checkpoint)
            parameter.copy_(share_of(full, parameter))


def restore_moments(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path
) -> None:
    """Give a fresh AdamW the moments of a checkpoint. Its count of steps goes to the parameter's
    device, where the fused kernel wants it. Raises: ValueError as `restore`."""
    with opened(checkpoint, "moments") as file:
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            count = fitting(file, f"{name}.step", torch.Size(), {torch.float32}, checkpoint)
            state = {"step": count.to(parameter.device)}
            for key in ("exp_avg", "exp_avg_sq"):
                how = parameter.shape, {parameter.dtype}, checkpoint
                state[key] = share_of(fitting(file, f"{name}.{key}", *how), parameter)
            optimizer.state[parameter] = state


def fitting(
    file: safe_open, name: str, shape: torch.Size, types: set[torch.dtype], checkpoint: Path
) -> Tensor:
    """A tensor of a file, if it has that shape, one of these types, and finite numbers."""
    tensor = file.get_tensor(name)
    problem = ""
    if tensor.shape != shape:
        problem = f"has the shape {tuple(tensor.shape)}, expected {tuple(shape)}"
    elif tensor.dtype not in types:
        problem = f"holds {tensor.dtype}, expected {' or '.join(sorted(map(str, types)))}"
    elif not torch.isfinite(tensor).all():
        problem = "holds numbers that are not finite"
    if problem:
        raise ValueError(f"checkpoint {checkpoint} does not fit this model: {name} {problem}")
    return tensor
