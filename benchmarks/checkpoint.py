"""What does a checkpoint of a shared-out model cost, and does anybody else's moments fit into it?

    python benchmarks/checkpoint.py             → checkpoint.json and .md, two minutes
    python benchmarks/checkpoint.py --gb 0.01   a small one, for a test

Two processes share a model out (FSDP2, as ``--shard``) whose AdamW holds 1 GB of moments. Each
round writes its checkpoint, and then as many bytes as a plain file flushed to the disk, which no
way of saving can beat. Then 1, 2 and 4 processes read it, sharing it out or not.
"""

import argparse
import json
import multiprocessing
import os
import resource
import socket
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from report import facts, headline, parser, publish, table
from torch import nn

from training import checkpoints as ckpt
from training.process import Process
from training.sharding import shared_out, whole
from util.cli import run_command

WIDTH, ROUNDS = 1024, 5


def model_of(gigabytes: float) -> nn.Sequential:
    """Blocks whose moments are that large, in float32."""
    block = 2 * 4 * (4 * WIDTH * WIDTH)
    count = max(1, round(gigabytes * 1e9 / block))
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, 4 * WIDTH, bias=False) for _ in range(count)))


def ready(gigabytes: float, process: Process, shard: bool) -> tuple[nn.Module, torch.optim.AdamW]:
    """The model as a stage has it, and its optimiser, not yet used."""
    model = model_of(gigabytes)
    if shard:
        shared_out(model, process, list(model))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def memory() -> float:
    """Peak of this process, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def write(gigabytes: float, process: Process, folder: Path) -> dict:
    """Seconds per round of the checkpoint and of its plain bytes, and the memory it took."""
    model, optimizer = ready(gigabytes, process, shard=True)
    for parameter in model.parameters():
        parameter.grad = 0.1 * parameter.detach()
    optimizer.step()
    optimizer.zero_grad()
    tensors = {"trained": ckpt.trainable(model), "moments": ckpt.moments(model, optimizer)}
    before, found = memory(), {"checkpoint": [], "bytes": []}
    for step in range(ROUNDS):
        dist.barrier()
        start = time.perf_counter()
        ckpt.save_checkpoint(folder, step + 1, tensors, {}, 1, writes=process.is_main)
        dist.barrier()
        found["checkpoint"].append(time.perf_counter() - start)
        if process.is_main:
            found["bytes"].append(plain_bytes(folder))
        dist.barrier()
    return {**found, "more_memory_gb": memory() - before, "sum": checksum(model, optimizer)}


def plain_bytes(folder: Path) -> float:
    """Seconds to write as many bytes as the newest checkpoint has, in pieces of 16 MB."""
    [newest] = ckpt.checkpoints_in(folder)
    size, piece = sum(f.stat().st_size for f in newest.iterdir()), os.urandom(1 << 24)
    start, file = time.perf_counter(), folder / "plain"
    with open(file, "wb") as out:
        for at in range(0, size, len(piece)):
            out.write(piece[: size - at])
        out.flush()
        os.fsync(out.fileno())
    seconds = time.perf_counter() - start
    file.unlink()
    return seconds


def read(gigabytes: float, process: Process, folder: Path, shard: bool) -> dict:
    """Seconds to restore, and what was restored as one number."""
    model, optimizer = ready(gigabytes, process, shard)
    [newest] = ckpt.checkpoints_in(folder)
    start = time.perf_counter()
    ckpt.restore(model, newest)
    ckpt.restore_moments(model, optimizer, newest)
    return {"seconds": time.perf_counter() - start, "sum": checksum(model, optimizer)}


def checksum(model: nn.Module, optimizer: torch.optim.AdamW) -> float:
    """Of all weights and moments, weighted by place so that no two could be exchanged."""
    total = torch.zeros((), dtype=torch.float64)
    for tensors in (ckpt.trainable(model), ckpt.moments(model, optimizer)):
        for number, tensor in enumerate(tensors.values(), 1):
            full = whole(tensor).flatten()
            places = torch.arange(len(full), dtype=torch.float64) if full.ndim else 1.0
            total += number * (full.double() * places).sum()
    return float(total)


def rank_of(rank: int, ranks: int, job: tuple, out) -> None:
    """One process of a job: (function, gigabytes, folder, more, where they meet)."""
    torch.set_num_threads(1)
    function, gigabytes, folder, more, port = job
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    result = function(gigabytes, Process(rank, ranks), folder, *more)
    if rank == 0:
        out.put(result)
    dist.destroy_process_group()


def run(ranks: int, function, gigabytes: float, folder: Path, *more) -> dict:
    """`function` on so many processes; what rank 0 found. Raises: ValueError where one failed."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = function, gigabytes, folder, more, free.getsockname()[1]
    each = [context.Process(target=rank_of, args=(r, ranks, job, out)) for r in range(ranks)]
    for process in each:
        process.start()
    while out.empty() and all(p.exitcode in (None, 0) for p in each):
        time.sleep(0.05)
    if any(p.exitcode for p in each):
        raise ValueError(f"a process of {ranks} failed; its own words are above")
    result = out.get()
    for process in each:
        process.join()
    return result


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written = run(2, write, args.gb, Path(folder))
        reads = {
            f"{ranks}{' shared out' if shard else ''}": run(
                ranks, read, args.gb, Path(folder), shard
            )
            for ranks, shard in ((1, False), (2, True), (4, True), (2, False))
        }
    for label, found in reads.items():
        if found["sum"] != written["sum"]:
            raise ValueError(f"read by {label}: other numbers than were written")
    ratios = [a / b for a, b in zip(written["checkpoint"], written["bytes"], strict=True)]
    figures = {
        "seconds": statistics.median(written["checkpoint"]),
        "of_its_bytes": statistics.median(ratios),
        "more_memory_gb": written["more_memory_gb"],
    }
    details = f"{args.gb} GB of moments and half as much of weights, 2 processes, n = {ROUNDS}"
    read_by = [
        [f"read by {by}", f"{r['seconds']:.2f} s", "same numbers"] for by, r in reads.items()
    ]
    rows = [
        ["a checkpoint, all processes waiting", f"{figures['seconds']:.2f} s", "≤ 5 s"],
        ["… as a multiple of its bytes alone", f"{figures['of_its_bytes']:.2f}", "≤ 2"],
        ["… more memory in the process that writes", f"{figures['more_memory_gb']:.2f} GB", "≤ 1"],
        *read_by,
    ]
    about = {"command": "python benchmarks/checkpoint.py", **facts(), "figures": figures}
    about |= {"rounds": {k: written[k] for k in ("checkpoint", "bytes")}, "reads": reads}
    lines = [headline(about["command"], about, details) + ".", "", *table(["", "", "aim"], rows)]
    if args.gb >= 1:
        publish("checkpoint", lines, about)
    else:
        print("\n".join(lines), json.dumps(figures))


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--gb", type=float, default=1.0, help="gigabytes of moments")
    arguments = flags.parse_args()
    run_command(lambda: main(arguments))
