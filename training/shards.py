"""Tar shards, read at random: a small index of where each picture lies, made once and kept.

CC3M comes from img2dataset as some 330 tar files with jpg/txt/json triplets. The usual way is to
stream them front to back with a shuffle buffer. That is fast on object stores, and it costs what
this project promises: a true shuffle over the whole data set, the same work on every rank, and a
resume that sees exactly the pictures not yet seen. A tar file, however, is nothing but 512-byte
headers and plain bytes between them: whoever knows (shard, offset, size) can read any picture with
one seek. So the headers are walked once and the three numbers kept, 16 bytes a picture (48 MB for
all of CC3M); after that a folder of shards is as good as a folder of files.

Real shards are not tidy, and none of this may stop a run: members come in any order, captions or
whole samples are missing, a download was cut, a shard is empty. What could not be used is reported
in `ShardIndex.problems`.

This module imports nothing of this project: copy it freely.
"""

import glob
import hashlib
import json
import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
LAYOUT = 1  # of the index file; raise it when the content changes


# ------------------------------------------------------------------------------------------------
# Which shards
# ------------------------------------------------------------------------------------------------
def is_shard_pattern(source: str | Path) -> bool:
    """Whether `source` names tar shards: FILE.tar, a glob or brace pattern of them, or a folder
    with at least one directly inside."""
    text = str(source)
    return text.endswith(".tar") or any(Path(text).glob("*.tar"))


def find_shards(source: str | Path) -> list[Path]:
    """Tar files of a folder or pattern, sorted: ``DIR``, ``DIR/*.tar``,
    ``DIR/{00000..00331}.tar``, ``DIR/{a,b}/0*.tar``.

    Raises: FileNotFoundError naming the pattern, or the part of it, that no file matches.
    """
    text = str(source)
    if os.path.isdir(text):
        text = os.path.join(glob.escape(text), "*.tar")
    found: list[Path] = []
    for pattern in expand_braces(text):
        matches = sorted(glob.glob(pattern))
        if not matches:
            raise FileNotFoundError(f"data: no tar shard {pattern}")
        found += [Path(match) for match in matches]
    return sorted(set(found))


def expand_braces(text: str) -> list[str]:
    """``a{0..2}b`` → a0b, a1b, a2b, and ``{x,y}`` → x, y; leading zeros are kept, several braces
    multiply. A shell does this only to what is not quoted."""
    match = re.search(r"\{([^{}]*)\}", text)
    if not match:
        return [text]
    inner = match.group(1)
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
        first, last = numbers.groups()
        width = len(first) if len(first) == len(last) or first.startswith("0") else 0
        choices = [str(i).zfill(width) for i in range(int(first), int(last) + 1)]
    else:
        choices = inner.split(",")
    before, after = text[: match.start()], text[match.end() :]
    return [before + choice + rest for choice in choices for rest in expand_braces(after)]


# ------------------------------------------------------------------------------------------------
# Where the pictures lie
# ------------------------------------------------------------------------------------------------
def scan_shard(path: str | Path) -> tuple[list[int], list[int], str]:
    """Offsets and sizes of a shard's pictures, in the order of the file, and what was wrong ("" if
    nothing was).

    A sample is what shares a key (the name up to its first dot); its first picture counts. Of a cut
    shard, all pictures before the cut are kept.
    """
    offsets, sizes, keys, problem = [], [], set(), ""
    try:
        length = os.path.getsize(path)
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members.clear()  # tarfile remembers every header; a shard has 30 000
                folder, _, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                if not member.isfile() or "." + suffix.lower() not in SUFFIXES:
                    continue
                if member.offset_data + member.size > length:
                    problem = "is cut off in the middle of a picture"
                elif (folder, key) not in keys:
                    keys.add((folder, key))
                    offsets.append(member.offset_data)
                    sizes.append(member.size)
        if not problem and not ends_well(path):
            problem = "has no end mark, so it was probably cut off"
    except (tarfile.TarError, EOFError, OSError) as error:
        problem = problem or f"cannot be read to its end ({error})"
    if problem:
        problem = f"{path} {problem}; {len(offsets)} pictures before that are used"
    elif not offsets:
        problem = f"{path} holds no pictures ({', '.join(sorted(SUFFIXES))})"
    return offsets, sizes, problem


def ends_well(path: str | Path) -> bool:
    """Whether a tar ends as tars do, in a block of zeros. (Python's tarfile takes a file that stops
    within a header for complete.)"""
    with open(path, "rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - 512))
        return length % 512 == 0 and not any(file.read())


class ShardIndex:
    """All pictures of a set of tar shards, readable in any order.

    Args:
        source: what `find_shards` takes.
        cache: folder of the index file; by default beside the shards, or in the user's temporary
            folder where that cannot be written.
        progress: wraps the iterable of shards (a progress bar).
        workers: processes that scan.
    Raises: FileNotFoundError as `find_shards`; ValueError where not one picture is found.
    """

    def __init__(
        self,
        source: str | Path,
        cache: str | Path | None = None,
        progress: Callable[[Iterable], Iterable] = lambda shards: shards,
        workers: int = 1,
    ):
        self.shards = find_shards(source)
        # A shard that was downloaded again has another size or date, and the index is made anew.
        stamps = [(s.name, s.stat().st_size, s.stat().st_mtime_ns) for s in self.shards]
        digest = hashlib.sha256(json.dumps([LAYOUT, stamps]).encode()).hexdigest()[:16]
        folders = [Path(cache)] if cache else [self.shards[0].parent, temporary_folder()]
        names = [folder / f".pictures-{digest}.npz" for folder in folders]
        if not any(self._load(name) for name in names):
            self._scan(progress, workers)
            for name in names:
                if self._save(name):
                    break
        if not len(self):
            raise ValueError(f"data: no pictures in {self.problems[0]}")

    def _scan(self, progress: Callable, workers: int) -> None:
        if workers > 1 and len(self.shards) > 1:
            with ProcessPoolExecutor(min(workers, len(self.shards))) as pool:
                scans = list(progress(pool.map(scan_shard, self.shards)))
        else:
            scans = [scan_shard(shard) for shard in progress(self.shards)]
        counts = [len(offsets) for offsets, _, _ in scans]
        self.shard = np.repeat(np.arange(len(scans), dtype=np.int32), counts)
        self.offset = np.array([o for offsets, _, _ in scans for o in offsets], dtype=np.int64)
        self.size = np.array([s for _, sizes, _ in scans for s in sizes], dtype=np.int32)
        self.problems = [problem for _, _, problem in scans if problem]

    def _save(self, path: Path) -> bool:
        temporary = path.with_name(f"{path.name}.tmp{os.getpid()}.npz")
        problems = np.frombuffer(json.dumps(self.problems).encode(), dtype=np.uint8)
        try:
            arrays = {"shard": self.shard, "offset": self.offset, "size": self.size}
            np.savez(temporary, problems=problems, **arrays)
            os.replace(temporary, path)
        except OSError:  # a read-only data set: the next folder, or no cache at all
            return False
        return True

    def _load(self, path: Path) -> bool:
        try:
            with np.load(path, allow_pickle=False) as file:
                self.shard, self.offset, self.size = file["shard"], file["offset"], file["size"]
                self.problems = json.loads(file["problems"].tobytes())
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return False  # none yet, or damaged: scan again
        return True

    def __len__(self) -> int:
        return len(self.offset)

    def name(self, index: int) -> str:
        """``SHARD/MEMBER``, read back from the header (512 bytes before the data)."""
        shard = self.shards[self.shard[index]]
        with open(shard, "rb") as file:
            file.seek(int(self.offset[index]) - 512)
            member = file.read(100).split(b"\0")[0].decode(errors="replace")
        return f"{shard}/{member}"

    def read(self, index: int) -> bytes:
        """The bytes of one picture. Raises: OSError where the shard has shrunk or gone."""
        size = int(self.size[index])
        with open(self.shards[self.shard[index]], "rb") as file:
            file.seek(int(self.offset[index]))
            data = file.read(size)
        if len(data) != size:
            raise OSError(f"{self.shards[self.shard[index]]} is shorter than when it was indexed")
        return data


def temporary_folder() -> Path:
    """A private folder for caches that cannot lie beside their data."""
    folder = Path(tempfile.gettempdir()) / f"genhancer-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
