"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder ``step_00001000`` with

    trained.safetensors   every parameter that trains, and nothing else (the frozen parts are given)
    optimizer.pt          AdamW's state; a torch file, so only ever read with weights_only=True
    state.json            step, architecture, fingerprints of the frozen parts, settings, log window

No generator states: the randomness of a step is a pure function of (seed, step), see `draw` in
genhancer.py and `MicroBatches` in data.py.

The folder is written under a temporary name, flushed to the disk and then renamed. A rename either
happened or did not; whoever pulls the plug finds the previous checkpoint whole. This module imports
nothing of this project.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file's content, or leave the old one: never half of each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + f".tmp{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """safetensors, written under a temporary name and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + f".tmp{os.getpid()}")
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=metadata
    )
    os.replace(temporary, path)


def fingerprint(module: torch.nn.Module) -> str:
    """A short hash of all tensors: tells whether a frozen part is still the one trained with."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def save_checkpoint(
    folder: Path, step: int, trained: dict[str, Tensor], optimizer: dict, state: dict, keep: int
) -> Path:
    """Write ``folder/step_XXXXXXXX`` and drop all but the newest `keep`."""
    target = folder / f"step_{step:08d}"
    temporary = folder / f"tmp_{target.name}_{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_tensors(trained, temporary / "trained.safetensors")
    torch.save(optimizer, temporary / "optimizer.pt")
    (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
    for file in temporary.iterdir():  # on the disk before the rename makes it visible
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)
    for old in checkpoints_in(folder)[:-keep]:
        shutil.rmtree(old)
    for leftover in folder.glob("tmp_*"):  # of runs that were killed while writing
        shutil.rmtree(leftover, ignore_errors=True)
    return target


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step_*") if (p / "state.json").is_file())


def read_state(checkpoint: Path) -> dict:
    """The JSON of a checkpoint. Raises: ValueError where it is not one."""
    try:
        return json.loads((checkpoint / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {checkpoint}: state.json cannot be read ({error})") from None


def read_trained(checkpoint: Path) -> dict[str, Tensor]:
    """The trained tensors of a checkpoint. Raises: ValueError where the file is damaged."""
    try:
        return load_file(checkpoint / "trained.safetensors")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"checkpoint {checkpoint}: trained.safetensors is damaged ({error}); delete this "
            "folder to "
            "go on from the one before"
        ) from None


def read_optimizer(checkpoint: Path) -> dict:
    """AdamW's state, never unpickled beyond tensors and plain values."""
    try:
        return torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged or hostile files
        raise ValueError(
            f"checkpoint {checkpoint}: optimizer.pt cannot be read ({type(error).__name__}); "
            "delete this "
            "folder to go on from the one before"
        ) from None


def put(module: torch.nn.Module, tensors: dict[str, Tensor], names: set[str], what: str) -> None:
    """Copy exactly the parameters `names` into module.

    Raises: ValueError naming the first that is missing, left over or of another shape.
    """
    own = dict(module.named_parameters())
    for name in sorted(names | tensors.keys()):
        here = own.get(name) if name in names else None
        there = tensors.get(name)
        if here is None or there is None or here.shape != there.shape:
            raise ValueError(
                f"{what}: {name} is {'absent' if there is None else tuple(there.shape)} in the "
                "checkpoint "
                f"and {'absent' if here is None else tuple(here.shape)} in this model"
            )
    with torch.no_grad():
        for name in names:
            own[name].copy_(tensors[name])


def first_difference(old: dict, new: dict, path: str = "") -> str | None:
    """The first key at which two nested dicts differ, as "path: old → new"; None where they
    agree."""
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        where = f"{path}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            inner = first_difference(a, b, where + ".")
            if inner:
                return inner
        elif json.loads(json.dumps(a)) != json.loads(json.dumps(b)):
            return f"{where}: {a} → {b}"
    return None
