"""One process of a run: which rank, which device, and how it begins and ends.

torchrun starts the same program once per GPU and tells each copy, through the environment, who it
is. Alone, a process is rank 0 of 1 and needs none of this. The main process (rank 0) is the one
that prints and writes; all the others only compute.

This module imports nothing of what stands above it, and knows neither models nor settings.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from util.cli import with_rank

PARENT_DIED = 1  # PR_SET_PDEATHSIG of Linux' prctl
# How gloo and NCCL speak of a peer that is gone.
LOST_PEER = re.compile(r"(?i)connection (closed|reset|refused)|nccl|timed ?out|timeout")


@dataclass(frozen=True)
class Process:
    """Where this process runs; by default alone, on the CPU, in float32."""

    rank: int = 0
    ranks: int = 1
    device: torch.device = torch.device("cpu")
    autocast: bool = False
    """bf16 where a loss of digits does no harm"""
    store: dist.Store | None = None
    """where the ranks leave word for one another; None where there is one only"""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_process(precision: str) -> Process:
    """Device, precision and, under torchrun, the process group (nccl on GPUs, gloo on CPUs).

    Args: precision: "auto", "fp32" or "bf16".
    """
    die_with_parent()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    store = None
    cuda, device = torch.cuda.is_available(), torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        # What autocast leaves in float32 may use TF32: its rounding is far below the noise of a
        # stochastic gradient.
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        # PyTorch's separate inference path for attention rounds differently: the tower must give
        # the same features whether it trains or not. (The fused kernel stays: forward and backward
        # it is the faster at every number of tokens, benchmarks/vs_libraries.md.)
        torch.backends.cuda.enable_flash_sdp(True)
        torch.backends.mha.set_fastpath_enabled(False)
    if "RANK" in os.environ and not dist.is_initialized():
        # After a restart torchrun's store still lists processes that are gone: with a prefix of its
        # own, an attempt sees only the processes of that attempt.
        store, _, _ = next(dist.rendezvous("env://", rank, ranks))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt{attempt}", store)
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    # bf16 keeps float32's range, so no loss scaling is needed. CPUs without bf16 units emulate it,
    # a hundred times slower than float32 where we measured: "auto" never picks it there.
    # (A GPU without them claims support by emulation, unless asked about its own.)
    supported = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = precision == "bf16" or (precision == "auto" and supported)
    return Process(rank, ranks, device, bf16, store)


def die_with_parent() -> None:
    """Under torchrun: have Linux kill this process when torchrun dies. Not by a signal that Python
    would have to handle: a rank may be waiting for another, in code that never asks Python. (A
    process that was started by hand must survive its shell.)"""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):  # no Linux
        ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def ending_well(process: Process, saved: str) -> Iterator[None]:
    """Around a run: a lost peer becomes one line that says what is `saved`, and the process group
    is left whatever happens."""
    goes_on = f"{saved}, and torchrun --max-restarts 3 would do that by itself"
    line = (
        "another process of this run has died (or torchrun was told to stop), so this one stops "
        f"too; {goes_on}"
    )
    if process.ranks > 1:
        say_on_sigterm(line)
    try:
        yield
    except RuntimeError as error:
        # What the survivors notice when a rank dies, if torchrun does not end them first. With
        # --max-restarts it starts all again, from the newest checkpoint.
        if not dist.is_initialized() or not LOST_PEER.search(str(error)):
            raise
        # A lost peer is the usual reason, and not the only one: PyTorch's own words say which.
        said = " ".join(str(error).split())
        raise ConnectionError(
            f"the processes of this run lost each other, as when one of them dies; {goes_on}. "
            f"What the connection says: {said}"
        ) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def say_on_sigterm(line: str) -> None:
    """SIGTERM is how torchrun ends the survivors. Say so, and go: a rank that cleaned up behind
    itself would wait for the dead one."""

    def stop(number, frame):
        print(f"{with_rank('train.py')}: {line}", file=sys.stderr, flush=True)
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, stop)


# ------------------------------------------------------------------------------------------------
# Many processes, one model
# ------------------------------------------------------------------------------------------------
def in_parallel(model: nn.Module, process: Process) -> nn.Module:
    """The model under DDP, which averages gradients over the ranks while backward runs; the model
    itself where there is only one. Who learns must be settled before."""
    if process.ranks == 1:
        return model
    # Parameters that do not train have no gradients to average, and buffers never change, so
    # neither is sent. (Newer PyTorch warns that the flag was renamed; the new name sends them once
    # more.)
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    # Gradients live in DDP's own buckets: one copy, not two. It takes over those that exist
    # already; were there none, those of the first accumulated piece would lie beside its buckets.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def accumulating(learner: nn.Module, last: bool):
    """Around a forward and backward pass. DDP exchanges gradients once a step, on its last piece;
    FSDP on every piece, so that a whole gradient never exists."""
    if last or not isinstance(learner, DistributedDataParallel):
        return nullcontext()
    return learner.no_sync()


def clear_gradients(learner: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """DDP's stay where they are, in its buckets, and are set to zero; all others are let go."""
    optimizer.zero_grad(set_to_none=not isinstance(learner, DistributedDataParallel))


# ------------------------------------------------------------------------------------------------
# What the processes tell each other
# ------------------------------------------------------------------------------------------------
def agreed(value, process: Process):
    """What the main process says, whatever the others think."""
    if process.ranks == 1:
        return value
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def union_over_ranks(items: set[str], process: Process) -> set[str]:
    """What any rank has."""
    if process.ranks == 1:
        return items
    gathered: list = [None] * process.ranks
    dist.all_gather_object(gathered, items)
    return set().union(*gathered)


def wait_for_slowest(process: Process, what: str) -> None:
    """No rank goes on before every rank is here, be it hours later.

    A collective of NCCL gives up after ten minutes. The store does not: every rank counts itself
    there once under `what`, and asks, twice a second, whether all have.
    """
    if process.ranks > 1:
        process.store.add(what, 1)
        while process.store.add(what, 0) < process.ranks:
            time.sleep(0.5)
