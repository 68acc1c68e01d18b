"""Files that are whole or absent.

A process can die between any two bytes that it writes. So nothing is written in its place: the
content goes into a temporary file beside it, is flushed to the disk, and is then renamed. A rename
either happened or did not; whoever pulls the plug finds the old file or the new one, never half of
each.
"""

import hashlib
import os
import stat
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
