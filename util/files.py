"""Files that are whole or absent.

A process can die between any two bytes that it writes. So nothing is written in its place: the
content goes into a temporary file beside it, is flushed to the disk, and is then renamed. A rename
either happened or did not; whoever pulls the plug finds the old file or the new one, never half of
each. (The rename itself is on the disk once the folder was flushed too.)

A write can fail as well: a full disk, a quota, a cable. Then the temporary file goes at once, the
old file stays, and the error says in one line which file it was and how much room it takes.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import torch
from torch import Tensor

ENDING = ".tmp"  # of what is not yet what it will be
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What a file calls the types of numbers.
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


# ------------------------------------------------------------------------------------------------
# Whole or absent
# ------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def replacing(path: Path, size: int = 0, parents: bool = True) -> Iterator[BinaryIO]:
    """An open file that becomes `path` when the block ends well, and vanishes when it does not.

    Args: size: bytes that will be written, for the line that a full disk is worth; parents: make
        folders that are missing.
    Raises: OSError in one line: which file, why, how much room it takes.
    """
    temporary = None
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        file, temporary = _begun(path)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        flush_folder(path.parent)
    except OSError as error:
        raise unwritten(path, error, size) from None
    finally:
        if temporary:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _begun(path: Path) -> tuple[BinaryIO, Path]:
    """A new file beside `path`, locked for as long as it is open: `sweep` leaves it alone."""
    while True:
        temporary = path.with_name(f"{path.name}.{uuid4().hex[:8]}{ENDING}")
        file = open(temporary, "xb")  # noqa: SIM115 (the caller closes it)
        with contextlib.suppress(OSError):  # a disk without locks is never swept
            fcntl.flock(file, fcntl.LOCK_SH)
        if temporary.exists():
            return file, temporary
        file.close()  # swept away in the moment before it was locked


def sweep(folder: Path, *names: str) -> None:
    """Remove what killed processes have left half written in a folder: files that were to become
    one of `names`, which may be patterns ("**/*": all, in folders below it too). What a living
    process is writing is locked, and stays."""
    for name in names:
        for leftover in folder.glob(f"{name}.{8 * '[0-9a-f]'}{ENDING}"):
            with contextlib.suppress(OSError), open(leftover, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()


def write_atomically(path: Path, content: str | bytes, parents: bool = True) -> None:
    """Replace a file's content, or leave the old one. Args and raises: as `replacing`."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path, len(data), parents) as file:
        file.write(data)


def created(path: Path, content: str) -> bool:
    """Make a new file, whole; False where there is one. Of two that try at once one succeeds, and
    nobody ever reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = None
    try:
        file, temporary = _begun(path)
        with file:
            file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())
            os.link(temporary, path)
        flush_folder(path.parent)
    except FileExistsError:
        return False
    except OSError:  # a disk without links: there it is only unlikely that two meet
        if path.exists():
            return False
        write_atomically(path, content)
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)
    return True


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file from tensors on any device, replaced as a whole.

    Raises: OSError as `replacing`; KeyError for a type of numbers that is not in `TYPES`.
    """
    with replacing(path, bytes_of(tensors)) as file:
        stream_tensors(tensors, file, metadata=metadata)


# ------------------------------------------------------------------------------------------------
# Tensors
# ------------------------------------------------------------------------------------------------
def bytes_of(tensors: dict[str, Tensor]) -> int:
    """What they take on the disk, but for the names."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def stream_tensors(
    tensors: dict[str, Tensor],
    file: BinaryIO | None,
    whole: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    metadata: dict[str, str] | None = None,
) -> str:
    """A safetensors file written one tensor after the other, each fetched as its turn comes: beside
    the model never more than one of them is in memory.

    The format allows it, because a tensor's place follows from the shapes before it: a length, a
    header of JSON, then plain numbers.

    Args:
        file: None: fetch and write nothing, as the other ranks of a run do.
        whole: gives the tensor to write, of the same shape and type.
        metadata: texts for the header.
    Returns: the SHA-256 of the bytes, "" where none were written.
    Raises: KeyError for a type of numbers that is not in `TYPES`.
    """
    header: dict = {"__metadata__": metadata} if metadata else {}
    end, digest = 0, hashlib.sha256()
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        about = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**about, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8

    def put(data) -> None:
        file.write(data)
        digest.update(data)

    if file:
        put(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        full = whole(tensor.detach())
        if file and full.numel():
            put(full.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest() if file else ""


def fingerprint(module: torch.nn.Module, dtype: torch.dtype | None = None) -> str:
    """A short hash of all tensors of a module: tells whether it is still the same.

    Args: dtype: what they are rounded to first, for a part that some devices read rounded.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        rounded = tensor.detach().to("cpu", dtype).contiguous()
        digest.update(rounded.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------
# The disk
# ------------------------------------------------------------------------------------------------
def flush_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk. Some file systems know no such thing."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def unwritten(path: Path, error: OSError, size: int = 0) -> OSError:
    """The error of a write as one line. Args: size: bytes that were to be written, 0: a few."""
    if error.errno is None:  # it says all that already
        return error
    line = f"{path} could not be written ({error.strerror})"
    there = next((p for p in (path, *path.absolute().parents) if p.is_dir()), None)
    if error.errno in FULL and there:
        needed = f"it takes {in_units(size)}" if size else "it takes some kB"
        line += f": {needed}, {in_units(shutil.disk_usage(there).free)} are free there"
    return type(error)(f"{line}; once that is mended, the same command can be run again")


def in_units(size: int) -> str:
    """Bytes for people."""
    for unit, power in (("GB", 9), ("MB", 6)):
        if size >= 10**power:
            return f"{size / 10**power:.1f} {unit}"
    return f"{size / 1000:.0f} kB"
