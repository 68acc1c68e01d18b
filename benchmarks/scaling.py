"""A thousand pictures or three million: does one cost the same, and a start a moment?

    python benchmarks/scaling.py              10³ … 3·10⁶ → scaling.json and .md, half an hour
    python benchmarks/scaling.py --largest 100000                             some minutes

Three million real pictures need not lie here for that. Shards: 83 small pictures in one tar file,
linked under as many names as there would be shards of 10⁴; scanning is replaced by saying that each
holds these pictures again and again, and all else (index file, open files, order, reading,
decoding) is what training does. Folder: empty files, 1000 to a folder; nothing is read of them.

Cost per picture is CPU time, one thread, the sizes taking turns, and every size decodes the very
same pictures; start and memory are those of a process of its own, beyond its imports.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from loader import jpeg, photographs
from PIL import Image
from report import facts, headline, parser, publish, table

import data
from training import shards
from util.cli import run_command

SIZES = [1_000, 10_000, 100_000, 1_000_000, 3_000_000]
PER_SHARD, PER_FOLDER, PICTURES, SIZE, BATCH = 10_000, 1_000, 83, 224, 16
PARTS = ("order", "read", "decode and crop", "name")  # all but the name are of every picture


# ------------------------------------------------------------------------------------------------
# Data sets of any size
# ------------------------------------------------------------------------------------------------
def write_tar(path: Path) -> None:
    """`PICTURES` noisy pictures of 256 × 256 px."""
    photos = (photographs(Path("nowhere")) * 2)[:PICTURES]
    with tarfile.open(path, "w") as tar:
        for i, photo in enumerate(photos):
            content = jpeg(photo.resize((256, 256), Image.Resampling.LANCZOS))
            member = tarfile.TarInfo(f"{i:09d}.jpg")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_shards(folder: Path, tar: Path, size: int) -> None:
    """As many links as `size` pictures need shards, and the index of them all."""
    folder.mkdir()
    count = -(-size // PER_SHARD)
    for i in range(count):
        os.link(tar, folder / f"{i:05d}.tar")
    offsets, sizes, _ = shards.scan_shard(tar)
    repeated = np.arange(min(size, PER_SHARD)) % PICTURES
    found = np.array(offsets)[repeated].tolist(), np.array(sizes)[repeated].tolist(), ""
    real, shards.scan_shard = shards.scan_shard, lambda path: found
    index = shards.ShardIndex(folder)
    shards.scan_shard = real
    assert len(index) == size, (len(index), size)


def write_files(folder: Path, size: int) -> None:
    """Empty files, as a shuffled download would leave them."""
    for first in range(0, size, PER_FOLDER):
        inner = folder / f"{first // PER_FOLDER:05d}"
        inner.mkdir(parents=True)
        for i in range(first, min(size, first + PER_FOLDER)):
            os.close(os.open(inner / f"{i * 7919 % 3_000_017:09d}.jpg", os.O_CREAT | os.O_WRONLY))


# ------------------------------------------------------------------------------------------------
# Cost of a picture
# ------------------------------------------------------------------------------------------------
def cost(index: shards.ShardIndex, pictures: data.Pictures, number: int) -> dict[str, float]:
    """Part → CPU seconds a picture, of one round over every picture of the tar file, ten times.

    The order of an epoch is drawn once an epoch: its cost is shared out over the epoch's pictures.
    """
    found, count = {}, 10 * PICTURES
    order = iter(data.MicroBatches(len(index), data.Share(BATCH, BATCH), number))
    start = time.process_time()
    next(order)
    drawn = time.process_time()
    steps = 2_000 // BATCH
    for _ in range(steps):
        next(order)
    stepping = (time.process_time() - drawn) / (steps * BATCH)
    found["order"] = (drawn - start) / len(index) + stepping
    rng = np.random.default_rng(number)  # places over the whole data set, the pictures in turn
    start = rng.integers(len(index) // PER_SHARD or 1, size=count) * PER_SHARD
    within = rng.integers(min(len(index), PER_SHARD) // PICTURES, size=count) * PICTURES
    keys = (start + within + np.arange(count) % PICTURES).tolist()

    def timed(work) -> float:
        began = time.process_time()
        for key in keys:
            work(key)
        return (time.process_time() - began) / count

    timed(index.read)  # the shards are open, the pages in memory
    found["read"], found["name"] = timed(index.read), timed(index.name)
    found["decode and crop"] = timed(lambda key: pictures[(key, 0)]) - found["read"]
    return found


def costs(folders: dict[int, Path], rounds: int) -> dict[int, list[dict]]:
    """Size → what each round found. The sizes take turns."""
    indices = {size: shards.ShardIndex(folder) for size, folder in folders.items()}
    pictures = {size: data.Pictures(index, SIZE) for size, index in indices.items()}
    found: dict[int, list[dict]] = {size: [] for size in folders}
    for number in range(-1, rounds):
        turn = list(folders) if number % 2 else list(folders)[::-1]
        for size in turn:
            measured = cost(indices[size], pictures[size], number + 1)
            if number >= 0:
                found[size].append(measured)
    return found


# ------------------------------------------------------------------------------------------------
# A start, in a process of its own
# ------------------------------------------------------------------------------------------------
def memory_mb() -> tuple[float, float]:
    """Of this process: now, and at its peak since the last time."""
    # In kB. (What getrusage calls the peak includes that of the parent, from before exec.)
    lines = Path("/proc/self/status").read_text().splitlines()
    now, peak = (int(line.split()[1]) / 1e3 for line in lines if line[:6] in ("VmRSS:", "VmHWM:"))
    Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak so far
    return min(now, peak), max(now, peak)


def start(kind: str, folder: Path) -> dict[str, float]:
    """List the pictures, and go on in the middle of the second epoch: seconds and memory beyond the
    imports until the first batch's keys are there (of shards, until it is read)."""
    data.interpolate(torch.zeros(1, 3, 8, 8), (4, 4))  # PyTorch has begun
    before, began = memory_mb()[0], time.perf_counter()
    if kind == "before":  # what `find_images` was
        every = (p for p in folder.rglob("*") if p.suffix.lower() in data.SUFFIXES and p.is_file())
        source = data.FileList(sorted(every))
    elif kind == "folder":
        source = data.FileList(data.find_images(folder))
    else:
        source = shards.ShardIndex(folder)
    listed = time.perf_counter() - began
    step = 3 * len(source) // (2 * BATCH)
    order = iter(data.MicroBatches(len(source), data.Share(BATCH, BATCH), 0, step))
    keys = [key for _, key in next(order)]
    if kind == "shards":
        pictures = data.Pictures(source, SIZE)
        torch.stack([pictures[key]["image"] for key in keys])
    found = {"listed": listed, "resumed": time.perf_counter() - began}
    held, peak = memory_mb()
    return {**found, "held_mb": held - before, "peak_mb": peak - before, "process_mb": peak}


def in_its_own_process(kind: str, folder: Path, rounds: int) -> dict[str, float]:
    """Medians over `rounds` processes."""
    command = [sys.executable, __file__, "--start", kind, str(folder)]
    found = []
    for _ in range(rounds):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{' '.join(command)}: {done.stderr[-500:]}")
        found.append(json.loads(done.stdout))
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


# ------------------------------------------------------------------------------------------------
# The report
# ------------------------------------------------------------------------------------------------
def cost_table(found: dict[int, list[dict]]) -> list[str]:
    """Microseconds a picture by part, and the whole against the smallest size."""

    def whole(one: dict) -> float:
        return sum(one[part] for part in PARTS[:3])

    rows, smallest = [], found[min(found)]
    for size, rounds in found.items():
        pairs = zip(rounds, smallest, strict=True)
        ratio = statistics.median(whole(a) / whole(b) for a, b in pairs)
        parts = [f"{1e6 * statistics.median(r[part] for r in rounds):.2f}" for part in PARTS]
        rows.append([f"{size:,}", *parts, f"{ratio:.3f}"])
    head = ["pictures", *(f"{part}, µs" for part in PARTS), "whole picture, against the smallest"]
    return table(head, rows)


def start_table(starts: dict[int, dict[str, dict]]) -> list[str]:
    rows = []
    for size, kinds in starts.items():
        for kind, m in kinds.items():
            seconds, held = [f"{m[k]:.2f}" for k in ("listed", "resumed")], f"{m['held_mb']:.0f}"
            memory = [held, f"{m['peak_mb']:.0f}", f"{m['process_mb']:.0f}"]
            rows.append([f"{size:,}", kind, *seconds, *memory])
    seconds, memory = ["listed, s", "resumed, s"], ["held, MB", "peak, MB", "peak with imports, MB"]
    return table(["pictures", "", *seconds, *memory], rows)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if args.start:
        kind, folder = args.start
        print(json.dumps(start(kind, Path(folder))))
        return
    sizes = [size for size in SIZES if size <= args.largest]
    with tempfile.TemporaryDirectory() as where:
        here, starts = Path(where), {}
        write_tar(here / "pictures.tar")
        folders = {size: here / f"shards-{size}" for size in sizes}
        for size, folder in folders.items():
            write_shards(folder, here / "pictures.tar", size)
        found = costs(folders, args.rounds)
        for size in sizes:
            files = here / f"files-{size}"
            write_files(files, size)
            starts[size] = {
                "shards": in_its_own_process("shards", folders[size], 3),
                "folder": in_its_own_process("folder", files, 3),
                "before": in_its_own_process("before", files, 1),
            }
    command, about = "python benchmarks/scaling.py", facts()
    lines = [f"{headline(command, about, f'n = {args.rounds} interleaved rounds')}.", ""]
    lines += ["CPU time of a picture of 256 px from shards; a name is looked up only on error:", ""]
    lines += [*cost_table(found), ""]
    lines += [
        "A start in the middle of the second epoch, beyond the imports, in a process of its own "
        "(medians of 3; of 1 for what listing a folder was before):",
        "",
    ]
    lines += start_table(starts)
    measured = {"rounds": args.rounds, "seconds_a_picture": found, "starts": starts}
    publish("scaling", lines, {"command": command, **about, **measured})


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--largest", type=int, default=SIZES[-1], help="number of pictures")
    flags.add_argument("--rounds", type=int, default=15)
    flags.add_argument("--start", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    chosen = flags.parse_args()
    run_command(lambda: main(chosen))
