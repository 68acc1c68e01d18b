"""Tar shards, read at random: a small index of where each picture lies, made once and kept.

CC3M comes from img2dataset as some 330 tar files with jpg/txt/json triplets. The usual way is to
stream them front to back with a shuffle buffer. That is fast on object stores, and it costs what
this project promises: a true shuffle over the whole data set, the same work on every rank, and a
resume that sees exactly the pictures not yet seen. A tar file, however, is nothing but 512-byte
headers and plain bytes between them: whoever knows (shard, offset, size) can read any picture with
one seek. So the headers are walked once and the three numbers kept, 16 bytes a picture (48 MB for
all of CC3M); after that a folder of shards is as good as a folder of files.

Real shards are not tidy, and none of this may stop a run: members come in any order, captions or
whole samples are missing, a download was cut, a shard is empty. Nor are all of them honest: a
header may claim any size, and is not believed. What could not be used is reported in
`ShardIndex.problems`.

This module imports nothing of this project: copy it freely.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import resource
import stat
import tarfile
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
LAYOUT = 3  # of the index file; raise it when the content changes
LARGEST = 1 << 29  # bytes of a picture: 120 million pixels, uncompressed
HEADERS = 1 << 20  # bytes of all that may stand before one member: its name, and what pax adds
MOST = 1_000_000  # shards that a pattern may name; the largest public sets have 230 000
# Shards that a process keeps open: no more than half of what it may open (1024 on most systems).
LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
HANDLES = min(512, LIMIT // 2) if LIMIT > 0 else 512  # below 0: without limit


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

    Raises: FileNotFoundError naming the pattern, or the part of it, that no file matches;
        ValueError as `expand_braces`.
    """
    text = str(source)
    if os.path.isdir(text):
        return sorted(Path(text).glob("*.tar"))  # its name may hold a brace
    found: list[Path] = []
    for pattern in expand_braces(text):
        matches = sorted(glob.glob(pattern))
        if not matches:
            raise FileNotFoundError(f"data: no tar shard {shown(pattern)}")
        found += [Path(match) for match in matches]
    return sorted(set(found))


def expand_braces(text: str) -> list[str]:
    """``a{0..2}b`` → a0b, a1b, a2b, and ``{x,y}`` → x, y; leading zeros are kept, several braces
    multiply. A shell does this only to what is not quoted.

    Raises: ValueError for braces that count down, or stand for more than MOST shards.
    """
    match = re.search(r"\{([^{}]*)\}", text)
    if not match:
        return [text]
    inner, many = match.group(1), f"data: {shown(text):.200} stands for more than {MOST:,} shards"
    if text.count("{") > 50:
        raise ValueError(many)
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
        first, last = numbers.groups()
        width = len(first) if len(first) == len(last) or first.startswith("0") else 0
        if len(last) > 18 or len(first) > 18 or int(last) - int(first) >= MOST:
            raise ValueError(many)
        if int(last) < int(first):
            raise ValueError(f"data: {{{inner}}} counts down: write {{{last}..{first}}}")
        choices = [str(i).zfill(width) for i in range(int(first), int(last) + 1)]
    else:
        choices = inner.split(",")
    before, rests = text[: match.start()], expand_braces(text[match.end() :])
    if len(choices) * len(rests) > MOST:
        raise ValueError(many)
    return [before + choice + rest for choice in choices for rest in rests]


def shown(text: object) -> str:
    """A name as it can be printed: what moves a terminal's cursor or is no Unicode, escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


# ------------------------------------------------------------------------------------------------
# Where the pictures lie
# ------------------------------------------------------------------------------------------------
class Headers:
    """A tar file as tarfile may read it: no more than HEADERS bytes from one member to the next. (A
    long name or a pax header may claim 2⁶² bytes, or bring three gigabytes, and would be read into
    memory whole. Members themselves are only skipped.)"""

    def __init__(self, file: BinaryIO):
        self.file, self.left = file, HEADERS
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Raises: tarfile.ReadError for more than may be read."""
        self.left -= size
        if size < 0 or self.left < 0:
            raise tarfile.ReadError(f"a header of more than {HEADERS >> 20} MB")
        return self.file.read(size)


def scan_shard(path: str | Path) -> tuple[list[int], list[int], str]:
    """Offsets and sizes of a shard's pictures, in the order of the file, and what was wrong ("" if
    nothing was).

    A sample is what shares a key, the name up to its first dot; its first picture counts, and
    7.seg.png beside 7.jpg or 7.txt is another view of it, which does not. Where all names of a key
    have more dots (IMG.2020.jpg, IMG.2021.jpg), the key goes up to the last. Of a cut shard, all
    pictures before the cut are kept.
    """
    found, plain, problem, large = {}, set(), "", 0
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):  # to open a pipe is to wait for whoever writes to it
            return [], [], f"{shown(path)} is no file"
        with open(path, "rb") as file, tarfile.open(fileobj=Headers(file), mode="r:") as tar:
            place = -1
            for member in tar:
                tar.members.clear()  # tarfile remembers every header; a shard has 30 000
                tar.fileobj.left = HEADERS
                if tar.offset <= place:  # a size below 0: tarfile would come here again and again
                    raise tarfile.ReadError("a member of negative size")
                place, (folder, _, name) = tar.offset, member.name.rpartition("/")
                if not member.isfile() or name.startswith("."):
                    continue  # macOS packs a hidden "._a.jpg" beside every a.jpg
                key, suffix = os.path.splitext(name)
                if "." not in key:
                    plain.add((folder, key))
                if suffix.lower() not in SUFFIXES:
                    continue
                if member.offset_data + member.size > about.st_size:
                    problem = "is cut off in the middle of a picture"
                elif member.size > LARGEST:
                    large += 1
                else:
                    found.setdefault((folder, key), (member.offset_data, member.size))
        if not problem and not ends_well(path):
            problem = "has no end mark, so it was probably cut off"
    except Exception as error:  # of a file that was made to hurt, anything
        why = shown(error) or type(error).__name__
        problem = problem or f"cannot be read to its end ({why})"
    kept = [
        place
        for (folder, key), place in found.items()
        if "." not in key or (folder, key.partition(".")[0]) not in plain
    ]
    offsets, sizes = [offset for offset, _ in kept], [size for _, size in kept]
    if problem:
        problem = f"{shown(path)} {problem}; {len(offsets)} pictures before that are used"
    elif not offsets:
        problem = f"{shown(path)} holds no pictures ({', '.join(sorted(SUFFIXES))})"
    if large:
        skipped = f"{large} pictures of more than {LARGEST >> 20} MB are skipped"
        problem = f"{problem or shown(path)}; {skipped}"
    return offsets, sizes, problem


def ends_well(path: str | Path) -> bool:
    """Whether a tar ends as tars do, in a block of zeros. (Python's tarfile takes a file that stops
    within a header for complete.)"""
    with open(path, "rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - 512))
        return length % 512 == 0 and not any(file.read())


# ------------------------------------------------------------------------------------------------
# Index files: one for each shard while a scan lasts, one for all of them in the end
# ------------------------------------------------------------------------------------------------
def write_index(path: Path, found: dict) -> bool:
    """Arrays by name and "problems", a list of lines; whole or absent. Whether that was possible:
    data sets are often read-only."""
    # A name of its own: two nodes may write the same file at once, and their process numbers agree.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp.npz")
    problems = np.frombuffer(json.dumps(found["problems"]).encode(), dtype=np.uint8)
    try:
        np.savez(temporary, **{**found, "problems": problems})
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        return False
    return True


def read_index(path: Path, shards: int = 0) -> dict | None:
    """What `write_index` wrote; None where there is none, or one that is damaged or false.

    Args: shards: how many there are, for the index of all of them; 0: of one shard.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            # As np.savez does. What is compressed could be a gigabyte of nothing in a kilobyte.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.zip.infolist()):
                return None
            found = {name: file[name] for name in file.files}
        problems = json.loads(found.pop("problems").tobytes())
        found = {"offset": found["offset"], "size": found["size"]} | (
            {"shard": found["shard"]} if shards else {}
        )
        sound = {len(array) for array in found.values()} == {len(found["size"])}
        for name, array in found.items():
            whole = array.ndim == 1 and array.dtype.kind == "i"
            most = {"offset": 1 << 62, "size": LARGEST, "shard": shards - 1}[name]
            sound &= whole and (not len(array) or array.min() >= 0 and array.max() <= most)
        sound &= isinstance(problems, list) and all(isinstance(p, str) for p in problems)
        return {**found, "problems": [shown(p) for p in problems]} if sound else None
    except Exception:  # of a damaged zip, anything: a false length, an unknown compression, …
        return None


def scan_once(task: tuple[Path, list[Path], list[Path]]) -> dict | None:
    """What is in one shard: from what an earlier scan left, or by a scan that leaves it.

    Args: task: the shard, where its part of the index may lie, and where the whole index may.
    Returns: None where another process has meanwhile written the whole index.
    """
    shard, parts, wholes = task
    for part in parts:
        if found := read_index(part):
            return found
    if any(whole.is_file() for whole in wholes):
        return None
    offsets, sizes, problem = scan_shard(shard)
    found = {"offset": np.array(offsets, np.int64), "size": np.array(sizes, np.int32)}
    found["problems"] = [problem] if problem else []
    any(write_index(part, found) for part in parts)  # in the first folder that takes it
    return found


class ShardIndex:
    """All pictures of a set of tar shards, readable in any order.

    A scan leaves a small file per shard, and one for all when it is done. So a scan that was killed
    goes on where it was, and processes that scan the same shards at the same time share the work
    without knowing of one another: each takes the shards in an order of its own and skips what it
    finds done. No process waits for another, so no collective can run into its time-out.

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
        self._open: dict = {}  # number of the shard → its file; the oldest first
        folders = [Path(cache)] if cache else [self.shards[0].parent, temporary_folder()]
        # A shard that was downloaded again has another size or date, and is scanned anew.
        stamps = [stamp(shard) for shard in self.shards]
        wholes = [folder / f".pictures-{digest(stamps)}.npz" for folder in folders]
        found = self._known(wholes)
        if found is None:
            parts = [[f / f".pictures-{digest(s)}.part.npz" for f in folders] for s in stamps]
            found = self._scan(parts, wholes, progress, workers)
            any(write_index(whole, found) for whole in wholes)
            for part in sum(parts, []):
                with contextlib.suppress(OSError):
                    part.unlink()
        self.shard, self.offset, self.size = found["shard"], found["offset"], found["size"]
        self.problems: list[str] = found["problems"]
        if not len(self):
            raise ValueError(f"data: no pictures in {self.problems[0]}")

    def _known(self, wholes: list[Path]) -> dict | None:
        """What the first sound index says."""
        return next(filter(None, (read_index(file, len(self.shards)) for file in wholes)), None)

    def _scan(
        self, parts: list[list[Path]], wholes: list[Path], progress: Callable, workers: int
    ) -> dict:
        """What the whole index holds."""
        count = len(self.shards)
        absent = [whole for whole in wholes if not whole.exists()]  # the others are damaged
        order = np.random.default_rng().permutation(count)
        tasks = [(self.shards[i], parts[i], absent) for i in order]
        if workers > 1 and count > 1:
            with ProcessPoolExecutor(min(workers, count)) as pool:
                scans = list(progress(pool.map(scan_once, tasks)))
        else:
            scans = [scan_once(task) for task in progress(tasks)]
        if None in scans and (found := self._known(wholes)):
            return found
        scans = [scan or scan_once((*tasks[i][:2], [])) for i, scan in enumerate(scans)]
        scans = [scans[i] for i in np.argsort(order)]
        numbers, counts = np.arange(count, dtype=np.int32), [len(scan["size"]) for scan in scans]
        found = {
            name: np.concatenate([scan[name] for scan in scans]) for name in ("offset", "size")
        }
        problems = [problem for scan in scans for problem in scan["problems"]]
        return {"shard": np.repeat(numbers, counts), **found, "problems": problems}

    def __len__(self) -> int:
        return len(self.offset)

    def name(self, index: int) -> str:
        """``SHARD/MEMBER``, read back from the header (512 bytes before the data)."""
        shard = int(self.shard[index])
        header = self._bytes(shard, 100, int(self.offset[index]) - 512)
        member = header.split(bytes(1))[0].decode(errors="surrogateescape")
        return shown(f"{self.shards[shard]}/{member}")

    def read(self, index: int) -> bytes:
        """The bytes of one picture. Raises: OSError where the shard has shrunk or gone."""
        shard, size = int(self.shard[index]), int(self.size[index])
        data = self._bytes(shard, size, int(self.offset[index]))
        if len(data) != size:
            raise OSError(f"{self.shards[shard]} is shorter than when it was indexed")
        return data

    def _bytes(self, shard: int, count: int, offset: int) -> bytes:
        """`count` bytes of a shard. Its file stays open, for opening one costs a network disk more
        than the reading. It is read at a place, never moved to one: worker processes inherit open
        files, and a position would be common to all of them."""
        file = self._open.get(shard)
        if file is None:
            file = open(self.shards[shard], "rb", buffering=0)  # noqa: SIM115
            if len(self._open) >= HANDLES:
                # Only forgotten here: it closes when the last thread that reads in it is done.
                self._open.pop(next(iter(self._open)), None)
            self._open[shard] = file
        try:
            return os.pread(file.fileno(), count, offset)
        except OSError:  # a network disk that was away: the next picture opens it anew
            self._open.pop(shard, None)
            raise

    def __getstate__(self) -> dict:
        return {**vars(self), "_open": {}}  # for a worker that is spawned: open files stay here


def stamp(shard: Path) -> tuple[str, int, int]:
    """Name, size and date; of a link that leads nowhere, its name."""
    try:
        about = shard.stat()
    except OSError:
        return shard.name, -1, -1
    return shard.name, about.st_size, about.st_mtime_ns


def digest(stamps: Iterable) -> str:
    """Tells whether shards are what they were."""
    return hashlib.sha256(json.dumps([LAYOUT, stamps]).encode()).hexdigest()[:16]


def temporary_folder() -> Path:
    """A private folder for caches that cannot lie beside their data."""
    folder = Path(tempfile.gettempdir()) / f"genhancer-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():  # whoever made it could put an index of his into it
        return Path(tempfile.mkdtemp(prefix="genhancer-"))
    return folder
