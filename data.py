"""Images in, batches out: the same global batch whatever the number of ranks.

GenHancer trains on pictures alone (Alg. 1: "image-only training dataset D without annotations"), so
a data set here is a folder, a list of files or tar shards (training/shards.py), and nothing else.

Three promises, because a run that cannot be repeated cannot be believed:

1. **The order is a pure function of (seed, position).** Position counts images since step 0; epoch
   e is a permutation made from (seed, e). Resuming is arithmetic: no state is saved, none can be
   lost.
2. **A global batch is the same set of images for any number of ranks and accumulation steps.**
   Ranks take disjoint slices of it. (In the official code every rank reads the same images.)
3. **An unreadable picture never changes the batch size.** The next readable one stands in for it,
   the name is reported, and more than 5 % of them end the run.

Conventions: images leave as uint8 RGB (3, size, size), a quarter of the bytes to send from worker
to process to GPU; `as_floats` makes [0, 1] of them there. The normalisations are the model's
business. This module imports nothing of this project.
"""

import io
import itertools
import math
import os
import stat
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, Sampler

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision means to give up its decoders; Pillow's pixels are the same
    decode_jpeg = None

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
# Told by content, whatever the suffix. Pillow reads forty formats more, among them EPS, for which
# it starts Ghostscript, and others whose decoders nobody has tried to break.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MOST_PIXELS = 120_000_000  # a phone makes 108 millions; Pillow holds four bytes of each, and copies
MOST_BYTES = 1 << 29  # of a file: what so many pixels take uncompressed
ORIENTATION = 0x0112  # the EXIF entry that says how the camera was held; 2 to 8: not upright
UPRIGHT = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
TURNS = {n: Image.Transpose[turn] for n, turn in enumerate(UPRIGHT.split(), start=2)}
Key = tuple[int, int]  # (index in the data set, epoch): what a sampler asks of a data set


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------
class Paths(Sequence):
    """Many paths below one folder, as one text and the place where each ends.

    A Python list of three million paths takes 1.4 GB, and every worker process copies it as soon as
    it counts references in it. This takes the text's bytes and 8 a path, and workers share them.

    Args: names: relative to `root`; an absolute one stays absolute.
    """

    def __init__(self, root: Path, names: Iterable[str]):
        self.root = "" if root == Path() else str(root)
        self._text, self._ends = bytearray(), array("q")
        for name in names:
            self._text += name.encode("utf-8", "surrogateescape")  # any name, UTF-8 or not
            self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]  # from the end, too; IndexError beyond it
        first = self._ends[index - 1] if index else 0
        name = self._text[first : self._ends[index]].decode("utf-8", "surrogateescape")
        return os.path.join(self.root, name)


def find_images(source: str | Path) -> Paths:
    """All images under a folder (sorted, recursive), or those a text file lists, one path a line.

    Relative paths in a list are relative to the list. Of a long list, 100 000 paths spread over it
    are looked for; another that is missing is replaced and named, as any unreadable picture.

    Raises: FileNotFoundError or ValueError, naming what is missing or empty.
    """
    source = Path(source)
    if source.is_dir():
        files = Paths(source, _below(str(source)))
        if not files:
            kinds = ", ".join(sorted(SUFFIXES))
            raise ValueError(f"data: no images ({kinds}) anywhere under folder {source}")
        return files
    if not source.is_file():
        raise FileNotFoundError(f"data: no folder and no file {source}")
    if source.suffix.lower() in SUFFIXES:
        what = "give a folder, tar shards, or a text file that lists images"
        raise ValueError(f"data: {source} is one {source.suffix} file; {what}")
    with open(source, encoding="utf-8", errors="surrogateescape") as lines:  # names are any bytes
        files = Paths(source.parent, filter(None, map(str.strip, lines)))
    if any("\0" in name for name in itertools.islice(files, 1000)):
        raise ValueError(f"data: {source} is not a text file that lists images")
    if not files:
        raise ValueError(f"data: list {source} is empty")
    for index in range(0, len(files), 1 + len(files) // 100_000):
        if not os.path.isfile(files[index]):
            what = f"list {source} names {printable(files[index])}"
            raise FileNotFoundError(f"data: {what}, which does not exist")
    return files


def _below(folder: str, prefix: str = "") -> Iterator[str]:
    """The images under a folder, relative to it, in the order of their paths' parts. Folders behind
    a link are not entered (it may lead in circles), nor what may not be read."""
    names = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    names.append(entry.name + "\0")  # "\0" sorts first: "a/x" before "a.jpg"
                elif _is_image(entry):
                    names.append(entry.name)
    except PermissionError:
        return
    names.sort(reverse=True)
    while names:  # taken off the list, so that a folder of millions is not held twice
        name = names.pop()
        if name.endswith("\0"):
            yield from _below(os.path.join(folder, name[:-1]), f"{prefix}{name[:-1]}/")
        else:
            yield prefix + name


def _is_image(entry: os.DirEntry) -> bool:
    # Hidden files are none: macOS packs a "._a.jpg" beside every a.jpg, which holds no picture.
    named = entry.name[0] != "." and os.path.splitext(entry.name)[1].lower() in SUFFIXES
    return named and (entry.is_file(follow_symlinks=False) or os.path.isfile(entry))


class Source(Protocol):
    """Where encoded pictures come from: a `FileList`, or the index of tar shards."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def read(self, index: int) -> bytes: ...


class FileList:
    """Files by number."""

    def __init__(self, files: Sequence[str | Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return printable(str(self.files[index]))

    def read(self, index: int) -> bytes:
        """Raises: OSError, also for what is no file or too large to be a picture."""
        # Without waiting: a pipe would be opened when somebody writes to it, so perhaps never.
        with open(os.open(self.files[index], os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode) or about.st_size > MOST_BYTES:
                raise OSError(f"{self.name(index)} is no file of at most {MOST_BYTES >> 20} MB")
            return file.read()


def printable(name: str) -> str:
    """A name as it can be shown: what would move a terminal's cursor or is no Unicode, escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------
@contextmanager
def opened(file: str | Path | io.BytesIO) -> Iterator[Image.Image]:
    """A picture whose header alone was read: one of FORMATS, and of a size that can be held.

    Raises: whatever Pillow does for a damaged picture or none, and that is anything.
    """
    with Image.open(file, formats=FORMATS) as image:
        if not 0 < image.width * image.height <= MOST_PIXELS:
            raise ValueError(f"{image.width} × {image.height} pixels")
        yield image


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What makes a picture upright; None where it is, and where its EXIF does not say so well: a
    camera's notes may be damaged, and the picture is none the worse."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # Pillow raises TypeError, struct.error, SyntaxError, KeyError, …
        return None


def decode(encoded: bytes) -> torch.Tensor:
    """Bytes of any picture → upright RGB, uint8 (3, H, W).

    Nearly all pictures are plain JPEGs, and torchvision gives Pillow's very pixels in four fifths
    of the time: both stand on libjpeg-turbo. What needs more than decoding (turned by EXIF, CMYK,
    another format), and what torchvision refuses, is Pillow's. Raises: as `opened`.
    """
    with opened(io.BytesIO(encoded)) as image:
        plain = image.format == "JPEG" and image.mode in ("RGB", "L")
        if decode_jpeg and plain and turn_of(image) is None:
            try:
                # bytearray: PyTorch warns of memory that must not be written
                data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
                return decode_jpeg(data, mode=ImageReadMode.RGB)
            except RuntimeError:
                pass  # cut or damaged; Pillow says how, or reads it all the same
    return torch.from_numpy(np.array(load_rgb(io.BytesIO(encoded)))).permute(2, 0, 1)


def load_rgb(file: Path | io.BytesIO) -> Image.Image:
    """Upright RGB: palette, CMYK, grey, alpha and 16 bit converted. Raises: as `opened`."""
    with opened(file) as image:
        image.load()  # before its EXIF: what follows a PNG's pixels reads them, and hides a fault
        if (turn := turn_of(image)) is not None:
            image = image.transpose(turn)
        if image.mode.startswith("I"):  # 16-bit greyscale: convert("RGB") would clip at 255
            image = Image.fromarray(
                (np.asarray(image).astype(np.float32) / 257).clip(0, 255).astype(np.uint8)
            )
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def crop_white_bars(image: torch.Tensor) -> torch.Tensor:
    """Cut off the white bars of a letterboxed picture, uint8 (3, H, W); any other picture comes
    back as it is.

    img2dataset's usual recipe pads to a square. The bars carry no content, yet the denoiser would
    spend a third of its tokens on them and reward CLIP for knowing the aspect ratio. Bars are cut
    only in pairs of equal height (or width): something on white is not a letterbox.
    """
    # 224, not 255: JPEG rings around the edge of a bar.
    content = (image.numpy() < 224).any(axis=0)  # (H, W): not white
    cut = [slice(None), slice(None)]  # of rows, of columns
    for axis in (0, 1):
        lines = np.flatnonzero(content.any(axis=1 - axis))  # rows, then columns with any content
        if len(lines) == 0:
            return image
        before, after = int(lines[0]), content.shape[axis] - 1 - int(lines[-1])
        if min(before, after) >= 2 and abs(before - after) <= 3:
            cut[axis] = slice(before, content.shape[axis] - after)
    return image[:, cut[0], cut[1]]


def random_resized_crop(
    image: torch.Tensor, size: int, scale_min: float, rng: np.random.Generator
) -> torch.Tensor:
    """torchvision's RandomResizedCrop(size, scale=(scale_min, 1), bicubic), from a generator of
    ours: uint8 (3, H, W) → uint8 (3, size, size).

    Ten tries at a box with the drawn area and aspect ratio; else the largest box in the middle
    whose ratio is within [3/4, 4/3]. (With scale_min 0.9 no photograph of 3 : 2 ever fits, so it
    always loses the same two edges.) No flip: a mirrored "facing left" would teach the opposite.
    """
    left, top, w, h = crop_box((image.shape[2], image.shape[1]), scale_min, rng)
    box = image[None, :, top : top + h, left : left + w]
    # On bytes and with antialias this is Pillow's resampling, in a fifth of the time.
    return interpolate(box, (size, size), mode="bicubic", antialias=True)[0].contiguous()


def crop_box(
    picture: tuple[int, int], scale_min: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Left, top, width and height of the crop of a `picture` (width, height)."""
    width, height = picture
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        area = width * height * rng.uniform(scale_min, 1.0)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def as_floats(images: torch.Tensor) -> torch.Tensor:
    """uint8 in 0 … 255 → float32 in [0, 1], of any shape and on its device; floats as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


class Pictures(Dataset):
    """Pictures as {"image": uint8 (3, size, size), "index": int, "unreadable": [names]}.

    Indexed by (index, epoch): the crop is a pure function of (seed, epoch, index), so it does not
    matter which worker of which rank makes it. "index" is that of the picture which was read.

    Args: scale_min: smallest area of the crop, as a share of the picture; crop_white: cut off the
        white bars of letterboxed pictures.
    Raises: ValueError where not one image in a row of 20 can be read.
    """

    def __init__(
        self, source: Source, size: int, scale_min: float = 0.9, seed: int = 0, crop_white=False
    ):
        self.source, self.size, self.scale_min, self.seed = source, size, scale_min, seed
        self.crop_white = crop_white

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """What the log calls a picture."""
        return self.source.name(index)

    def __getitem__(self, key: Key) -> dict:
        index, epoch = key
        unreadable = []
        for attempt in range(min(20, len(self))):
            place = (index + attempt) % len(self)
            try:
                image = decode(self.source.read(place))
            except MemoryError:
                raise  # the machine's fault: with more memory, nothing would stand in for it
            except Exception as error:  # a hundred kinds: every decoder has its own
                unreadable.append(self.name(place))
                why = f"{type(error).__name__}: {error}"
                continue
            if self.crop_white:
                image = crop_white_bars(image)
            rng = np.random.default_rng([self.seed, epoch, place])
            image = random_resized_crop(image, self.size, self.scale_min, rng)
            return {"image": image, "index": place, "unreadable": unreadable}
        what = f"{len(unreadable)} images in a row cannot be read, from {unreadable[0]} on"
        raise ValueError(f"data: {what} (the last: {printable(why)})")


# ------------------------------------------------------------------------------------------------
# Order
# ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Share:
    """Which part of every global batch is this process's, and in pieces of what size."""

    global_batch: int
    micro_batch: int
    rank: int = 0
    ranks: int = 1


class MicroBatches(Sampler[list[tuple[int, Key]]]):
    """One rank's micro-batches, from `start_step` on, without end.

    Global batch s covers positions s·G … s·G + G − 1 of the endless stream of shuffled epochs. It
    is cut into G / micro pieces, dealt to the ranks in turn. Yields lists of (position, key).

    Raises: ValueError where the global batch does not divide evenly.
    """

    def __init__(self, length: int, share: Share, seed: int = 0, start_step: int = 0):
        if length < 1:
            raise ValueError("data: there are no pictures")
        together = share.micro_batch * share.ranks
        if share.global_batch % together:
            what = f"micro_batch {share.micro_batch} × {share.ranks} ranks"
            raise ValueError(f"global batch {share.global_batch} is no multiple of {what}")
        self.length, self.share, self.seed, self.start_step = length, share, seed, start_step
        self.accumulation = share.global_batch // together

    def __iter__(self) -> Iterator[list[tuple[int, Key]]]:
        share, epoch, order = self.share, -1, None
        step = self.start_step
        while True:
            for piece in range(self.accumulation):
                turn = piece * share.ranks + share.rank
                first = step * share.global_batch + turn * share.micro_batch
                batch = []
                for position in range(first, first + share.micro_batch):
                    if position // self.length != epoch:
                        epoch = position // self.length
                        order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
                    batch.append((position, (int(order[position % self.length]), epoch)))
                yield batch
            step += 1


class _Positioned(Dataset):
    """Passes (position, key) through to the data set and hands the position on."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, request: tuple[int, Key]) -> dict:
        position, key = request
        try:
            return {"unreadable": [], **self.dataset[key], "position": position}
        except (ValueError, OSError, MemoryError) as error:
            # Raised in a worker process it would reach the user as a traceback in a string.
            return {"failed": str(error) or "data: not enough memory to decode a picture"}


def collate(items: list[dict]) -> dict:
    """Stack tensors, also those one dictionary down; keep names, positions, … as lists."""
    failed = [item for item in items if "failed" in item]
    if failed:
        return failed[0]
    batch = {}
    for field, value in items[0].items():
        values = [item[field] for item in items]
        if isinstance(value, torch.Tensor):
            values = torch.stack(values)
        batch[field] = collate(values) if isinstance(value, dict) else values
    return batch


class Names(Sequence):
    """The names of a batch, looked up when somebody reads them, as a run that ends in an error."""

    def __init__(self, dataset: Dataset, indices: list[int]):
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> str:
        return self.dataset.name(self.indices[i])


def batches(
    dataset: Dataset, sampler: MicroBatches, workers: int = 0, finish: Callable = dict
) -> Iterator[dict]:
    """The endless stream of one rank's micro-batches; "name" is in all of them.

    Args: finish: batch → batch, called in the worker that has read it.
    Raises: ValueError where `dataset` did, also from within a worker process.
    """
    loader = DataLoader(
        _Positioned(dataset),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=partial(_collated, finish),
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )
    for batch in loader:
        if "failed" in batch:
            raise ValueError(batch["failed"])
        if "name" not in batch:
            batch["name"] = Names(dataset, batch["index"])
        yield batch


def _collated(finish: Callable, items: list[dict]) -> dict:
    batch = collate(items)
    return batch if "failed" in batch else finish(batch)


class CachedPictures(Dataset):
    """A data set held in memory together with what the networks that do not train make of it.

    Worth it where the same few thousand images are seen many times, as in the toy world: encoding
    an image costs more than a training step on it. Every image keeps the crop of its first epoch.

    Args: encode: images (B, 3, H, W) in [0, 1] → {name: (B, …)}; comes back under "cached";
        progress: wraps the iterable of chunks (a progress bar).
    """

    def __init__(self, dataset: Dataset, encode, progress=lambda chunks: chunks, chunk: int = 256):
        self.pictures = dataset
        self.names, images, parts = [], [], []
        self.unreadable: list[list[str]] = []
        for start in progress(range(0, len(dataset), chunk)):
            items = [dataset[(i, 0)] for i in range(start, min(start + chunk, len(dataset)))]
            floats = as_floats(torch.stack([item["image"] for item in items]))  # (chunk, 3, H, W)
            images.append((floats * 255).round().to(torch.uint8))
            parts.append({k: v.cpu() for k, v in encode(floats).items()})
            self.names += [x["name"] if "name" in x else dataset.name(x["index"]) for x in items]
            self.unreadable += [item.get("unreadable", []) for item in items]
        self.images = torch.cat(images)
        self.cached = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: Key) -> dict:
        index, _ = key
        return {
            "image": self.images[index],
            "name": self.names[index],
            "unreadable": self.unreadable[index],
            "cached": {k: v[index] for k, v in self.cached.items()},
        }
