"""A model that no rank holds whole: FSDP2, PyTorch's own engine (``--shard``).

Under DDP every rank keeps all weights, all gradients and AdamW's two moments of each: 16 bytes per
number that learns, 21 GB for the full size's denoiser before the first image. FSDP gives each rank
an equal share of every tensor. A block's weights are collected from all ranks when its turn comes,
forward and again backward, and let go after it; its gradient is added up where the shares are. The
price is traffic, two collections and one reduction per pass, hidden behind the work of the
neighbouring blocks where the links are fast.

A tensor that is shared out is a `DTensor`: it has the shape of the whole and the storage of a part.
Optimiser and clipping take them as they are. What must be whole, for a checkpoint or a picture, is
collected here, one tensor or one block at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from training.process import Process


def shared_out(model: nn.Module, process: Process, blocks: list[nn.Module], mesh=None) -> nn.Module:
    """`model` itself, of whose every learning weight a rank keeps its share from here on.

    What does not learn stays whole: it has neither gradient nor moments. With bf16 autocast the
    weights travel as bf16, which the products would make of them anyway; gradients are added up in
    float32.

    Args: blocks: collected one by one; mesh: the ranks, where they are not those of `process`.
    """
    # Here and not above: these imports alone take half a second.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = torch.bfloat16 if process.autocast else None
    policy = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
    frozen = {p for p in model.parameters() if not p.requires_grad}
    mesh = mesh or init_device_mesh(process.device.type, (process.ranks,))
    how = {"mesh": mesh, "mp_policy": policy, "ignored_params": frozen}
    for block in blocks:
        if any(p.requires_grad for p in block.parameters()):
            fully_shard(block, **how)
    return fully_shard(model, **how)  # what is in no block


@contextmanager
def collected(model: nn.Module) -> Iterator[None]:
    """To look through a model outside its own forward pass, all ranks together: what is in no block
    is collected here, a block's weights by itself as it is called."""
    if not hasattr(model, "unshard"):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor collected from all ranks, all of which must ask; one that is whole, as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def share_of(full: Tensor, like: Tensor) -> Tensor:
    """The reverse, by each rank alone: of a tensor that all have, its part, laid out as `like`."""
    full = full.to(like.device)
    if not hasattr(like, "placements"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
