"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder ``step_00001000`` with

    trained.safetensors   every parameter that trains, and nothing else (all others are given)
    optimizer.pt          AdamW's state; a torch file, so only ever read with weights_only=True
    state.json            step, architecture, settings, log window, and fingerprints of what does
                          not train

No generator states: the randomness of a step is a pure function of (seed, step), see `draw` in
genhancer.py and `MicroBatches` in data.py.

The folder is written under a temporary name, flushed to the disk and then renamed. A rename either
happened or did not; whoever pulls the plug finds the previous checkpoint whole.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from training.preflight import checkpoints_in
from util.files import flush, save_tensors

GO_BACK = "delete this folder to go on from the one before"


def trainable(module: torch.nn.Module) -> dict[str, Tensor]:
    """What the present stage changes, by parameter name: all that a checkpoint must hold."""
    return {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}


def save_checkpoint(
    folder: Path, step: int, trained: dict[str, Tensor], optimizer: dict, state: dict, keep: int
) -> Path:
    """Write ``folder/step_XXXXXXXX`` and drop all but the newest `keep`.

    Args: trained: what `trainable` gives; state: any JSON that the next start must know.
    """
    target = folder / f"step_{step:08d}"
    temporary = folder / f"tmp_{target.name}_{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_tensors(trained, temporary / "trained.safetensors")
    torch.save(optimizer, temporary / "optimizer.pt")
    (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
    for file in temporary.iterdir():  # on the disk before the rename makes it visible
        flush(file)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)
    for old in checkpoints_in(folder)[:-keep]:
        shutil.rmtree(old)
    for leftover in folder.glob("tmp_*"):  # of runs that were killed while writing
        shutil.rmtree(leftover, ignore_errors=True)
    return target


def read_trained(checkpoint: Path) -> dict[str, Tensor]:
    """The trained tensors of a checkpoint. Raises: ValueError where the file is damaged."""
    try:
        return load_file(checkpoint / "trained.safetensors")
    except (OSError, SafetensorError) as error:
        what = f"trained.safetensors is damaged ({error})"
        raise ValueError(f"checkpoint {checkpoint}: {what}; {GO_BACK}") from None


def read_optimizer(checkpoint: Path) -> dict:
    """AdamW's state, never unpickled beyond tensors and plain values."""
    try:
        return torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged or hostile files
        what = f"optimizer.pt cannot be read ({type(error).__name__})"
        raise ValueError(f"checkpoint {checkpoint}: {what}; {GO_BACK}") from None


def restore(module: torch.nn.Module, checkpoint: Path) -> None:
    """Put a checkpoint's tensors into the parameters of `module` that train, exactly those.

    Raises: ValueError naming the first that is missing, left over or of another shape.
    """
    tensors, own = read_trained(checkpoint), trainable(module)
    if different := sorted(tensors.keys() ^ own.keys()):
        side = "the checkpoint has no" if different[0] in own else "this model has no"
        raise ValueError(f"checkpoint {checkpoint}: {side} {different[0]}")
    try:  # not strict: what does not train is not in the checkpoint
        module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # it names what is of another shape
        first = " ".join(str(error).partition("\n")[2].split())[:300]
        raise ValueError(f"checkpoint {checkpoint} does not fit this model: {first}") from None
