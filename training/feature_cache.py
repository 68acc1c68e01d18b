"""What the frozen networks make of every picture, computed once and kept on the disk (--cache DIR).

100 000 steps of 256 see each picture of CC3M 8.5 times. Each time the same frozen tokenizer and, in
stage 1, the same frozen image tower would say the same of it: at full size a third of a flow step.
Here it is written down once, and from then on stage 1 reads 52 kB a picture instead of decoding,
cropping and encoding one. What is given up are new crops: every epoch sees those of the first. (At
`--crop_min 0.9` they differ by a few pixels.) The numbers are those that `--cache memory` would
hold, bit by bit, so a run may go from one to the other.

    DIR/about.json              whose features these are: weights, crops, pictures, types
    DIR/features-00000.npy      records of some thousand pictures, in the order of the data set
    DIR/features-00000.json     which pictures among them could not be read, if any

A record holds all of one picture, so that a picture in a random order costs one contiguous read:

    mean, log_variance          of the VAE's posterior, C × h × w each; the second is left out under
                                --no-posterior, which never looks at it
    or: indices                 of the VQ-GAN, N
    original                    CLIP's global token, d, as it was before stage 2
    crc32                       of the bytes before, so that a damaged disk is noticed

`numpy.load(file)` reads them. Images are not kept: stage 1 does not look at them,
and the tower of stage 2, which does, gets them from the data set with the crop of the first epoch.

**Whole or absent.** A file is written under another name, flushed and renamed. Which files are
there is all that a start needs to know: one that was killed is finished by the next. Every file is
made by one rank alone, so that no two machines ever write into one page of a shared disk.

**Damage** is found by the checksums: in a cache of up to a few gigabytes at the start, which makes
the file again, in a larger one when the record is read, which ends the run and removes the file.
"""

import contextlib
import io
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from hashlib import sha256
from itertools import islice
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from data import as_floats, batches
from genhancer import GenHancer
from settings import Settings
from training.preflight import UNREAD, require_same
from training.process import Process, agreed, union_over_ranks, wait_for_slowest
from util.files import created, fingerprint, replacing, sweep, write_atomically
from util.sealed import seal, unseal

LAYOUT = 3  # of files and records; raise it when they change
# Pictures per file: few enough to lose little in a kill and to deal out evenly, many enough that
# CC3M's are some hundred files.
SMALLEST, LARGEST, FILES = 256, 8192, 64
OPEN = 256  # files that a process keeps open; most systems allow it 1024
MANY_NAMES, WHOLE = 300_000, 64  # names and pictures that tell a data set from another
READ_AT_START = 4_000_000_000  # bytes that a start may read to find damage
PATIENCE = 30.0  # seconds until what one machine wrote must be seen by another


# ------------------------------------------------------------------------------------------------
# Records
# ------------------------------------------------------------------------------------------------
def as_stored(found: dict[str, Tensor], dtype: str) -> dict[str, np.ndarray]:
    """What `GenHancer.precompute` found, in the types of a record.

    Args: dtype: of what are floats, "fp16" or "fp32"; whole numbers become int32.
    Raises: ValueError for a number that is beyond the type.
    """
    stored = {}
    for name, tensor in found.items():
        kind = {"fp16": torch.float16, "fp32": torch.float32}[dtype]
        kind = kind if tensor.is_floating_point() else torch.int32
        stored[name] = tensor.to(kind).cpu().numpy()
        lost = not np.isfinite(stored[name]).all()
        if lost or (kind is torch.int32 and int(tensor.max()) >= 2**31):
            raise ValueError(f"--cache: {name} holds numbers that {kind} cannot: {dtype} is no use")
    return stored


def as_used(stored: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """What is stored, as training takes it: float32, and int64 for whole numbers."""
    kinds = {"f": torch.float32, "i": torch.int64}
    return {name: torch.from_numpy(v).to(kinds[v.dtype.kind]) for name, v in stored.items()}


def record_type(found: dict[str, Tensor], dtype: str) -> np.dtype:
    """The record of one picture, from what was found of a batch (B, …), on any device."""
    floats = {"fp16": "<f2", "fp32": "<f4"}[dtype]
    fields = [
        (name, floats if tensor.is_floating_point() else "<i4", tuple(tensor.shape[1:]))
        for name, tensor in found.items()
    ]
    return np.dtype([*fields, ("crc32", "<u4")])


def cache_bytes(found: dict[str, Tensor], pictures: int, dtype: str) -> int:
    """Bytes on the disk, of so many pictures. Args: as for `record_type`; meta tensors will do."""
    return pictures * record_type(found, dtype).itemsize


def records_of(found: dict[str, Tensor], dtype: str) -> np.ndarray:
    """The records (B,) of what was found of a batch."""
    stored = as_stored(found, dtype)
    records = np.empty(len(next(iter(stored.values()))), record_type(found, dtype))
    for name, values in stored.items():
        records[name] = values
    records["crc32"] = [checksum(records[i : i + 1]) for i in range(len(records))]
    return records


def header_of(record: np.dtype, count: int) -> bytes:
    """How a file of so many records begins: as any array that NumPy saves."""
    about = {"descr": record.descr, "fortran_order": False, "shape": (count,)}
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, about)
    return buffer.getvalue()


def checksum(record: np.ndarray) -> int:
    """Of one record (1,), without the checksum itself, which stands last."""
    return zlib.crc32(record.view(np.uint8)[:-4])


def images_at_once(size: int) -> int:
    """How many images of `size` pixels a side are encoded together: a power of two, as many pixels
    as 256 toy scenes have. It is the same for every cache, because the rounding depends on it."""
    return 2 ** int(np.log2(min(256, max(1, 256 * 64**2 // size**2))))


# ------------------------------------------------------------------------------------------------
# The data set
# ------------------------------------------------------------------------------------------------
class FeatureCache(Dataset):
    """Pictures with what is known of them: items of `pictures` with "cached", asked for by (index,
    epoch). The epoch makes no difference: the crop is that of the first.

    Args:
        pictures: the data set that the features are of.
        folder: of a cache; files that are missing are made by `fill`.
        record: the type of a record.
        at_once: images that are encoded together.
    """

    def __init__(self, pictures: Dataset, folder: Path, record: np.dtype, at_once: int):
        self.pictures, self.folder, self.record, self.at_once = pictures, folder, record, at_once
        steps = -(-len(pictures) // (FILES * SMALLEST))
        self.per_file = min(LARGEST, SMALLEST * steps)
        self.files = -(-len(pictures) // self.per_file)
        self.unreadable: dict[int, list[str]] = {}
        """by index: pictures that could not be read, for which this record's stands in"""
        self._open: dict[int, io.FileIO] = {}
        counts = {self.count(number) for number in (0, self.files - 1)}
        self._headers = {count: header_of(record, count) for count in counts}

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        index, _ = key
        item = self.pictures[(index, 0)]
        unreadable = item.get("unreadable", [])
        if len(unreadable) != len(self.unreadable.get(index, [])):
            # It could be read then and cannot now, as on a network disk that is away for a moment:
            # the features must be those of the picture that stands in for it.
            index = (index + len(unreadable)) % len(self)
            if index in self.unreadable:
                raise ValueError(
                    f"--cache {self.folder}: {self.unreadable[index][0]} could not be read when "
                    f"this was made, and can be now: delete {self.path(index // self.per_file)}"
                )
        return {**item, "cached": self.features(index)}

    def name(self, index: int) -> str:
        """What the log calls a picture."""
        name = getattr(self.pictures, "name", None)
        return name(index) if name else f"picture {index}"

    @property
    def features_alone(self) -> Dataset:
        """The same without images, which are not even decoded."""
        return _FeaturesAlone(self)

    def features(self, index: int) -> dict[str, Tensor]:
        """Of one picture, as `as_used` has them. Raises: ValueError where they are damaged."""
        number, place = divmod(index, self.per_file)
        size = self.record.itemsize
        read = self.read(number, size, len(self.header(number)) + place * size)
        record = np.frombuffer(bytearray(read), self.record) if len(read) == size else None
        if record is None or checksum(record) != record["crc32"][0]:
            with contextlib.suppress(OSError):
                self.path(number).unlink()
            raise ValueError(
                f"--cache {self.folder}: {self.path(number).name} was damaged and is removed: the "
                "same command makes it again"
            )
        return as_used({name: record[name][0] for name in self.record.names[:-1]})

    # -- files -----------------------------------------------------------------------------------
    def path(self, number: int) -> Path:
        return self.folder / f"features-{number:05d}.npy"

    def count(self, number: int) -> int:
        """Pictures in a file; the last one is shorter."""
        return min(self.per_file, len(self) - number * self.per_file)

    def header(self, number: int) -> bytes:
        return self._headers[self.count(number)]

    def bytes_of(self, number: int) -> int:
        return len(self.header(number)) + self.count(number) * self.record.itemsize

    def is_whole(self, number: int) -> bool:
        """Whether a file is there, with its beginning and its full length."""
        header = self.header(number)
        try:
            with open(self.path(number), "rb") as file:
                length = os.fstat(file.fileno()).st_size
                return length == self.bytes_of(number) and file.read(len(header)) == header
        except FileNotFoundError:
            return False

    def missing(self) -> list[int]:
        """The numbers of files that are not there, or not whole."""
        return [number for number in range(self.files) if not self.is_whole(number)]

    def remove_damaged(self) -> list[str]:
        """Remove the files that are not what was written, where so much can be read in a moment.
        Returns: their names."""
        there = [number for number in range(self.files) if self.path(number).is_file()]
        if sum(map(self.bytes_of, there)) > READ_AT_START:
            return []
        found = [number for number in there if not self.is_sound(number)]
        for number in found:
            self.path(number).unlink()
        return [self.path(number).name for number in found]

    def is_sound(self, number: int) -> bool:
        """Whether every record of a file, and the note beside it, is what was written."""
        noted = self.path(number).with_suffix(".json")
        try:
            if noted.is_file():
                unseal(noted.read_text(encoding="utf-8"))
        except ValueError:
            return False
        if not self.is_whole(number):
            return False
        records = np.frombuffer(
            self.path(number).read_bytes(), self.record, offset=len(self.header(number))
        )
        sums = [checksum(records[i : i + 1]) for i in range(len(records))]
        return bool((records["crc32"] == sums).all())

    def read(self, number: int, count: int, offset: int) -> bytes:
        """`count` bytes of a file, which stays open.

        Not by a memory map, though the system keeps what was read all the same. To a map the system
        answers in the belief that what lies around will be wanted too: of records in a random order
        it read nine times the bytes of this, and took four times as long. And at a place, never
        moving to one: worker processes inherit open files, with one position common to all.
        """
        if number not in self._open:
            if len(self._open) >= OPEN:
                del self._open[next(iter(self._open))]  # the one opened first; closes by itself
            self._open[number] = open(self.path(number), "rb", buffering=0)  # noqa: SIM115
        return os.pread(self._open[number].fileno(), count, offset)

    def __getstate__(self) -> dict:
        return {**vars(self), "_open": {}}  # a worker that is spawned opens the files itself

    def read_unreadable(self) -> None:
        """What the ranks that made the files noted beside them."""
        for number in range(self.files):
            with contextlib.suppress(FileNotFoundError):
                noted = self.path(number).with_suffix(".json")
                try:
                    about = unseal(noted.read_text(encoding="utf-8"))
                except ValueError:
                    raise ValueError(
                        f"--cache {self.folder}: {noted.name} is damaged: delete it and "
                        f"{self.path(number).name}, and the same command makes both again"
                    ) from None
                self.unreadable |= {int(index): names for index, names in about.items()}


class _FeaturesAlone(Dataset):
    """A `FeatureCache` for those who do not look at images."""

    def __init__(self, cache: FeatureCache):
        self.cache, self.name = cache, cache.name

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        index, _ = key
        unreadable = self.cache.unreadable.get(index, [])
        read = (index + len(unreadable)) % len(self.cache)  # data.py: the next one stands in
        features = self.cache.features(index)
        return {"index": read, "unreadable": unreadable, "cached": features}


# ------------------------------------------------------------------------------------------------
# Making it
# ------------------------------------------------------------------------------------------------
def disk_cache(
    pictures: Dataset, model: GenHancer, settings: Settings, process: Process
) -> FeatureCache:
    """The pictures with their features, of which this makes what is not there yet. All ranks must
    call it.

    Raises: ValueError where the folder holds features of other parts, is not the same for all
        ranks, or has too little space.
    """
    folder, size, dtype = Path(settings.cache), model.info.image_size, settings.cache_dtype
    with torch.no_grad():
        probe = model.precompute(torch.zeros(1, 3, size, size, device=process.device))
    cache = FeatureCache(pictures, folder, record_type(probe, dtype), images_at_once(size))
    claim(folder, whose(cache, model, settings), process)

    def encode(images: Tensor) -> np.ndarray:
        return records_of(model.precompute(as_floats(images.to(process.device))), dtype)

    fill(cache, encode, settings.workers, process)
    cache.read_unreadable()
    return cache


def whose(cache: FeatureCache, model: GenHancer, settings: Settings) -> dict:
    """Everything that decides the numbers of a cache, and where they lie in it."""
    parts = {"clip": (model.visual, model.info.open_clip_config())}
    for name, paradigm in model.paradigms.items():
        parts[f"{name}.tokenizer"] = paradigm.tokenizer, asdict(paradigm.tokenizer.config)
    crops = {name: getattr(settings, name) for name in ("crop_min", "crop_white", "seed")}
    types = {name: str(cache.record[name]) for name in cache.record.names}
    return {
        "layout": {"version": LAYOUT, "per_file": cache.per_file, "at_once": cache.at_once},
        **{k: {"weights": fingerprint(part), **about} for k, (part, about) in parts.items()},
        "pictures": {**which(cache), **crops},
        "records": types,
    }


def which(pictures: Dataset) -> dict:
    """Tells a data set from another: how many "images", a hash of their "names" (or of where they
    lie in tar shards), and as "samples" one each of a few whole pictures.

    Of very many names some are taken, spread over the list; all of CC3M's would take seconds.
    """
    pictures = getattr(pictures, "pictures", pictures)  # those that a cache is of
    source, digest = getattr(pictures, "source", None), sha256()
    if source is None:  # toy scenes follow from the seed
        return {"images": len(pictures), "names": type(pictures).__name__}
    if hasattr(source, "shards"):
        digest.update("\0".join(shard.name for shard in source.shards).encode("utf-8", "replace"))
        digest.update(np.ascontiguousarray(source.offset).tobytes())
    else:
        for index in range(0, len(source), 1 + len(source) // MANY_NAMES):
            name = Path(source.name(index)).name  # the folder may have moved
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    samples = {}
    for index in range(0, len(source), 1 + len(source) // WHOLE):
        try:
            samples[str(index)] = sha256(source.read(index)).hexdigest()[:16]
        except OSError:  # on a network disk it may be readable tomorrow
            samples[str(index)] = UNREAD
    return {"images": len(pictures), "names": digest.hexdigest()[:16], "samples": samples}


def claim(folder: Path, mine: dict, process: Process) -> None:
    """Make sure that the folder is this cache's, and the same for all ranks. Raises: ValueError."""
    problem = token = ""
    if process.is_main:
        try:
            token = claimed(folder, mine)
        except ValueError as error:
            problem = str(error)
        except OSError as error:
            problem = f"--cache {folder} cannot be written ({error.strerror}): give another folder"
    problem, token = agreed((problem, token), process)
    if problem:
        raise ValueError(problem)

    def seen() -> bool:
        with contextlib.suppress(OSError, ValueError):
            return unseal((folder / "about.json").read_text()).get("token") == token
        return False

    same_for_all(folder, seen, process)


def claimed(folder: Path, mine: dict) -> str:
    """The token of a folder that holds this cache, or shall from now on; drawn once for each, so
    that two folders of one name on two machines are told apart."""
    about = folder / "about.json"
    if not about.is_file():
        if any(folder.glob("features-*.npy")):
            raise ValueError(f"--cache {folder}: features without about.json: delete that folder")
        created(about, seal({"token": uuid4().hex, **mine}))  # unless another start just did
    try:
        theirs = unseal(about.read_text(encoding="utf-8"))
        token = theirs["token"]
    except (ValueError, KeyError):
        raise ValueError(
            f"--cache {folder}: about.json is damaged, or of an earlier version: delete that folder"
        ) from None
    message = (
        f"--cache {folder} holds features of other {{what}} ({{difference}}): give another folder, "
        "or delete that one"
    )
    require_same(theirs, mine, message)
    return token


def same_for_all(folder: Path, seen: Callable[[], bool], process: Process) -> None:
    """Every rank must see what another wrote, if not at once: network disks keep lists for a while.
    Raises: ValueError on all ranks where one does not."""
    end = time.monotonic() + PATIENCE
    while not (found := seen()) and process.ranks > 1 and time.monotonic() < end:
        time.sleep(0.5)
    if blind := union_over_ranks(set() if found else {process.rank}, process):
        raise ValueError(
            f"--cache {folder}: rank {min(blind)} does not see there what others wrote: give a "
            "folder that all machines share"
        )


def fill(
    cache: FeatureCache, encode: Callable[[Tensor], np.ndarray], workers: int, process: Process
) -> None:
    """Make the files that are missing, each on one rank.

    Args: encode: images (B, 3, H, W) → records (B,); workers: processes that decode images.
    Raises: ValueError where the disk is too small, or a rank does not see the others' files.
    """
    missing = []
    if process.is_main:
        sweep(cache.folder, "features-*", "about.json")  # the folder may hold more than ours
        for name in cache.remove_damaged():
            print(f"note: --cache: {name} was damaged and is made again", file=sys.stderr)
        missing = cache.missing()
    missing, free = agreed((missing, shutil.disk_usage(cache.folder).free), process)
    if not missing:
        return
    if (needed := sum(map(cache.bytes_of, missing))) > free:
        raise ValueError(
            f"--cache {cache.folder} needs {needed / 1e9:,.2f} GB more for {len(cache):,} pictures "
            f"of {cache.record.itemsize / 1e3:.1f} kB, and {free / 1e9:,.2f} GB are free: give a "
            "folder on a larger disk"
        )
    mine = missing[process.rank :: process.ranks]
    stream = batches(cache.pictures, list(chunks_of(cache, mine)), workers)
    # The main process counts its own share for all: with `unit_scale`, times the ranks.
    style = {"unit": "image", "unit_scale": process.ranks, "dynamic_ncols": True}
    style |= {"total": sum(map(cache.count, mine)), "disable": not process.is_main}
    with tqdm(desc="encoding pictures once", **style) as bar:
        for number in mine:
            write_file(cache, number, stream, encode, bar)
    wait_for_slowest(process, "features are on the disk")
    same_for_all(cache.folder, lambda: not cache.missing(), process)


def chunks_of(cache: FeatureCache, numbers: list[int]) -> Iterator[list]:
    """The pictures of some files in pieces that are encoded together, as `batches` asks for them:
    (position, (index, epoch)) each. No piece reaches into the next file."""
    for number in numbers:
        first = number * cache.per_file
        end = first + cache.count(number)
        for start in range(first, end, cache.at_once):
            yield [(i, (i, 0)) for i in range(start, min(start + cache.at_once, end))]


def write_file(
    cache: FeatureCache, number: int, stream: Iterator[dict], encode: Callable, bar: tqdm
) -> None:
    """One file, whole or not at all, from the next batches of a stream."""
    path, noted = cache.path(number), {}
    with replacing(path, cache.bytes_of(number)) as file:
        file.write(cache.header(number))
        for batch in islice(stream, -(-cache.count(number) // cache.at_once)):
            file.write(encode(batch["image"]).view(np.uint8))
            unread = zip(batch["position"], batch["unreadable"], strict=True)
            noted |= {str(index): names for index, names in unread if names}
            bar.update(len(batch["position"]))
        # The note first: where the records are, it is there too.
        path.with_suffix(".json").unlink(missing_ok=True)
        if noted:
            write_atomically(path.with_suffix(".json"), seal(noted))
