"""Files that are whole or absent.

A process can die between any two bytes that it writes. So nothing is written in its place: the
content goes into a temporary file beside it, is flushed to the disk, and is then renamed. A rename
either happened or did not; whoever pulls the plug finds the old file or the new one, never half of
each.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file's content, or leave the old one."""
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
    """A safetensors file from tensors on any device, replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + f".tmp{os.getpid()}")
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # safetensors makes files that their owner alone can read. This one shall be like any other:
    # an empty file tells what the user's umask allows. (To ask for the umask itself one must set
    # it, for all threads of the process.)
    temporary.unlink(missing_ok=True)  # of a process of the same number that was killed
    temporary.touch()
    mode = stat.S_IMODE(temporary.stat().st_mode)
    save_file(on_cpu, temporary, metadata=metadata)
    os.chmod(temporary, mode)
    flush(temporary)
    os.replace(temporary, path)


# What a file calls the types of numbers that training makes.
TYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}


def stream_tensors(
    tensors: dict[str, Tensor], path: Path | None, whole: Callable[[Tensor], Tensor]
) -> None:
    """A safetensors file written one tensor after the other, each fetched as its turn comes: beside
    the model never more than one of them is in memory.

    The format allows it, because a tensor's place follows from the shapes before it: a length, a
    header of JSON, then plain numbers. Not atomic: `path` is a new file in a folder that is not yet
    what it will be.

    Args:
        path: None: fetch and write nothing, as the other ranks of a run do.
        whole: gives the tensor to write, of the same shape and type.
    Raises: KeyError for a type of numbers that is not in `TYPES`.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        about = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**about, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    with open(path or os.devnull, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            full = whole(tensor.detach())
            if path:
                file.write(full.cpu().reshape(-1).view(torch.uint8).numpy())


def flush(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def fingerprint(module: torch.nn.Module) -> str:
    """A short hash of all tensors of a module: tells whether it is still the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
