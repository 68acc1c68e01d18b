"""What makes a run smaller or faster and leaves its mathematics alone.

The method's files are written for being read. What a large GPU wants besides, other precisions,
memory layouts and compiled kernels, is switched on from outside, here.

    --tokenizer_dtype bf16   half the bytes of the tokenizer's forward pass; rounds its latents
    --frozen_dtype           matrices that do not learn are kept as autocast would make them
    --compile                kernels of a block joined by the compiler
"""

from collections.abc import Iterator

import torch
from torch import nn

from genhancer import GenHancer
from settings import Settings
from training.process import Process

# Lists of blocks, by the names that they have in this project, in open_clip and in timm.
SEQUENCES = (nn.ModuleList, nn.Sequential)
BLOCK_LISTS = ("double_blocks", "single_blocks", "layers", "resblocks", "blocks")


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of the image tower and of the denoiser: where nearly all weights and work are."""
    for name, part in model.named_modules():
        if name.rpartition(".")[2] in BLOCK_LISTS and isinstance(part, SEQUENCES):
            yield from part


def check_switches(settings: Settings, process: Process) -> None:
    """Raises: ValueError where this machine, or the run's precision, cannot do what is asked."""
    if settings.frozen_dtype == "bf16" and not process.autocast:
        raise ValueError("--frozen_dtype bf16 needs a run in bf16: add --precision bf16")
    # A CPU's LayerNorm takes no float32 from a cache beside weights that travel as bf16.
    on_cpu, many = process.device.type == "cpu", process.ranks > 1
    if settings.shard and settings.cache and process.autocast and on_cpu and many:
        raise ValueError("--shard with --cache in bf16 needs GPUs: on CPUs add --precision fp32")
    if settings.compile:
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(2, device=process.device))
        except Exception as error:  # no C++ compiler, no Triton, …: many kinds
            said = next(line for line in str(error).splitlines() if line.strip())
            raise ValueError(
                f"--compile: PyTorch cannot compile on this machine ({said.strip()[:200]}): "
                "install what it names (a C++ compiler, for GPUs Triton), or drop the flag"
            ) from None


def tune_tokenizer(model: GenHancer, settings: Settings, process: Process) -> None:
    """Tokenizers in their precision, and in the layout that convolutions like: a whole step on a
    CPU is shorter by 4 to 8 % for it."""
    for paradigm in model.paradigms.values():
        if settings.tokenizer_dtype == "bf16":
            paradigm.tokenizer.to(torch.bfloat16)
        paradigm.tokenizer.to(memory_format=torch.channels_last)
    if process.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # one size of image: the search is paid for once


def lower_frozen(model: GenHancer, settings: Settings, process: Process) -> None:
    """Keep the matrices that do not learn in bf16.

    Autocast makes a bf16 copy of each such matrix at every pass, and in stage 2 autograd keeps it
    for the backward one. Kept as bf16 the weights take half the memory, the copies none, and the
    numbers are the same. Norms, embeddings and biases, which autocast leaves alone or which weigh
    nothing, stay in float32.

    The model cannot go back: what is written at the end is made from the checkpoint.
    """
    wanted = settings.frozen_dtype
    if wanted == "fp32" or not process.autocast or (wanted, process.device.type) == ("auto", "cpu"):
        return
    # Tokenizers have a precision of their own.
    tokenizers = {part for p in model.paradigms.values() for part in p.tokenizer.modules()}
    for module in model.modules():
        if module in tokenizers:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if is_matrix(module, name) and not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)


def is_matrix(module: nn.Module, name: str) -> bool:
    """Whether a parameter is one that autocast rounds to bf16 wherever it is used."""
    if isinstance(module, nn.MultiheadAttention):
        return name.endswith("_proj_weight")
    return isinstance(module, nn.Linear | nn.Conv2d) and name == "weight"


def compile_blocks(model: nn.Module) -> None:
    """Compile block by block: one compilation serves all blocks of a kind, and what stands between
    them stays plain Python. (The whole model in one was slower where we measured.) Names of
    parameters stay as they are."""
    for block in blocks_of(model):
        block.compile()
