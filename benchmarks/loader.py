"""How many pictures per second does one core make ready, before and now?

    python benchmarks/loader.py                 → loader.json and .md, some minutes
    python benchmarks/loader.py --photos DIR    from photographs of your own

Two data sets are made of the photographs (of generated pictures where there are none): tar shards
of 256 × 256 px, as img2dataset makes them, and a folder of files of 640 px. Both ways read them in
the same order, by the same loader, in one process on one thread, in turns; what counts is the CPU's
time, so that a busy neighbour takes nothing away. The files are in the page cache.

"Before" is what data.py did until its pictures were bytes: Pillow decodes and resizes, every item
is a float and carries its name, every read opens its file.
"""

import io
import statistics
import tarfile
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from report import ROOT, facts, headline, parser, publish, table

import data
from training.shards import ShardIndex
from util.cli import run_command

SIZE, BATCH = 224, 16
PHOTOS = ROOT.parent / "shared" / "data" / "photos"
WAYS = {"before": "before", "now": "now", "pillow": "now, decoded by Pillow"}
TARGETS = {"256 px, shards": 1200, "640 px, folder": 300}


# ------------------------------------------------------------------------------------------------
# The old way
# ------------------------------------------------------------------------------------------------
class Before(torch.utils.data.Dataset):
    """Items as `data.Pictures` made them, in the words of its old code."""

    def __init__(self, source: data.Source, seed: int = 0):
        self.source, self.seed = source, seed

    def __len__(self) -> int:
        return len(self.source)

    def place(self, index: int) -> tuple[Path, int, int]:
        """File, offset and size (−1: to the end) of a picture."""
        if isinstance(self.source, data.FileList):
            return Path(self.source.files[index]), 0, -1
        shard, offset = self.source.shard[index], int(self.source.offset[index])
        return self.source.shards[shard], offset, int(self.source.size[index])

    def name(self, index: int) -> str:
        path, offset, size = self.place(index)
        if size < 0:
            return str(path)
        with open(path, "rb") as file:
            file.seek(offset - 512)
            return f"{path}/" + file.read(100).split(b"\0")[0].decode(errors="replace")

    def __getitem__(self, key: data.Key) -> dict:
        index, epoch = key
        path, offset, size = self.place(index)
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(size)
        image = data.load_rgb(io.BytesIO(content))
        rng = np.random.default_rng([self.seed, epoch, index])
        left, top, w, h = data.crop_box(image.size, 0.9, rng)
        box = (left, top, left + w, top + h)
        pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))
        pixels = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        return {"image": pixels.float() / 255, "name": self.name(index), "unreadable": []}


# ------------------------------------------------------------------------------------------------
# Pictures to read
# ------------------------------------------------------------------------------------------------
def photographs(folder: Path) -> list[Image.Image]:
    """Those of a folder; without it, generated ones that cost a decoder about as much."""
    if folder.is_dir():
        return [data.load_rgb(Path(file)) for file in data.find_images(folder)]
    rng = np.random.default_rng(0)
    found = []
    for _ in range(64):
        shape = (640, 480) if rng.random() < 0.7 else (480, 640)
        coarse = Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8))
        smooth = np.asarray(coarse.resize(shape, Image.Resampling.BICUBIC), np.int16)
        grain = rng.normal(0, 6, smooth.shape)
        found.append(Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)))
    return found


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=90)
    return buffer.getvalue()


def write_sets(photos: list[Image.Image], here: Path) -> dict[str, data.Source]:
    """Each photograph once in a folder, its longer side 640 px; its middle, 256 × 256 px, in two
    shards."""
    (here / "folder").mkdir()
    tars = [tarfile.open(here / f"{i:05d}.tar", "w") for i in (0, 1)]  # noqa: SIM115
    for i, photo in enumerate(photos):
        width, height = photo.size
        large = photo.resize((width * 640 // max(photo.size), height * 640 // max(photo.size)))
        (here / "folder" / f"{i:05d}.jpg").write_bytes(jpeg(large))
        left, top, side = (width - min(photo.size)) // 2, (height - min(photo.size)) // 2, 256
        box = (left, top, left + min(photo.size), top + min(photo.size))
        content = jpeg(photo.resize((side, side), Image.Resampling.LANCZOS, box=box))
        member = tarfile.TarInfo(f"{i:09d}.jpg")
        member.size = len(content)
        tars[i % 2].addfile(member, io.BytesIO(content))
    for tar in tars:
        tar.close()
    folder = data.FileList(data.find_images(here / "folder"))
    return {"256 px, shards": ShardIndex(here), "640 px, folder": folder}


# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------
def per_second(dataset: torch.utils.data.Dataset, batches: int, start_step: int) -> float:
    """Pictures per second of CPU time, through the order, the reading and the stacking."""
    order = data.MicroBatches(len(dataset), data.Share(BATCH, BATCH), 0, start_step)
    start = time.process_time()
    for _ in islice(data.batches(dataset, order), batches):
        pass
    return batches * BATCH / (time.process_time() - start)


def measure(source: data.Source, rounds: int, batches: int) -> dict[str, list[float]]:
    """way → pictures per second, of every round. The ways take turns."""
    ours = data.Pictures(source, SIZE)
    sets = {"before": Before(source), "now": ours, "pillow": ours}
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    by_torchvision = data.decode_jpeg
    for number in range(-1, rounds):  # one round to warm up
        for way, dataset in sets.items():
            data.decode_jpeg = None if way == "pillow" else by_torchvision
            speed = per_second(dataset, batches, max(0, number) * batches)
            if number >= 0:
                found[way].append(speed)
    data.decode_jpeg = by_torchvision
    return found


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--photos", type=Path, default=PHOTOS)
    flags.add_argument("--rounds", type=int, default=15)
    flags.add_argument("--batches", type=int, default=20, help="of 16 pictures, a round")
    args = flags.parse_args()
    torch.set_num_threads(1)
    photos = photographs(args.photos)
    kind = "photographs" if args.photos.is_dir() else "generated pictures"
    with tempfile.TemporaryDirectory() as here:
        sets = write_sets(photos, Path(here))
        speeds = {name: measure(s, args.rounds, args.batches) for name, s in sets.items()}
    rows, summary = [], {}
    for name, found in speeds.items():
        for way, title in WAYS.items():
            gain = statistics.median(
                b / a for a, b in zip(found["before"], found[way], strict=True)
            )
            middle, best = statistics.median(found[way]), max(found[way])
            summary[f"{name}: {title}"] = {"median": middle, "best": best, "ratio": gain}
            aim = f"≥ {TARGETS[name]}" if way == "now" else ""
            rows.append([name, title, f"{middle:.0f}", f"{best:.0f}", f"{gain:.2f}", aim])
    command, about = "python benchmarks/loader.py", facts()
    what = f"{len(photos)} {kind} → {SIZE} px, batches of {BATCH}, one thread, CPU time"
    lines = [f"{headline(command, about, what, f'n = {args.rounds} interleaved rounds')}.", ""]
    head = ["", "", "pictures/s, median", "best", "ratio (median of pairs)", "aim"]
    lines += table(head, rows)
    measured = {"rounds": args.rounds, "summary": summary, "pictures_per_second": speeds}
    publish("loader", lines, {"command": command, **about, **measured})


if __name__ == "__main__":
    run_command(main)
