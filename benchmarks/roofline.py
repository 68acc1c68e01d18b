"""How fast can a training step be at best? Every kernel of it, counted on fake tensors.

    python benchmarks/roofline.py            openai-l14-224, flow, H200 and H100 → roofline.md

A kernel reads and writes memory and computes, and takes at least the longer of the two:

    time = max(bytes / bandwidth, operations / peak) + a moment to begin

Nothing is run and no GPU needed: the model of a full-size run takes an eager step on tensors that
have no memory (training/fakes.py), and each operation that PyTorch would start says what it reads,
writes and computes. An option is a flag of the run, so each row is the count of other code, not of
a guess. What no flag changes from Python (kernels joined by the compiler) is counted by rule.

Assumed, and no more than that:
    a product reaches 70 % of the peak, a memory-bound kernel 85 % of the bandwidth (PEAK_REACHED,
    BANDWIDTH_REACHED); a kernel begins in 2 µs. float32 products are TF32's, as start_process and
    cuDNN's default allow.
    A convolution wants channels last: an image in the other layout is turned before it and back
    after it. GroupNorm reads twice and keeps the layout it finds. Autocast, attention and dropout
    do as on a GPU.
    compile: a chain of kernels between two products reads what it needs once, and writes once what
    others read. In the blocks of tower and denoiser alone; what the compiler would compute twice
    rather than keep is not in it.
    AdamW reads four numbers and writes three (fused), or goes over them in nine passes; clipping
    reads once for the norm, and reads and writes once more.
Not counted: data, transfers between GPUs (also where AdamW's work is shared out), waiting for the
host.
"""

import itertools
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from report import facts, headline, parser, publish, table
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from settings import Settings
from training import fakes, plan, speed
from training.fakes import Watch, without_memory
from training.process import Process
from util.cli import run_command

BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12}  # bytes a second, of the SXM cards
PEAK = {"bf16": 989e12, "tf32": 494.5e12, "fp32": 67e12}  # operations a second, dense, of both
PEAK_REACHED, BANDWIDTH_REACHED, BEGIN = 0.70, 0.85, 2e-6
PARTS = (
    "tokenizer",
    "CLIP",
    "denoiser: products",
    "denoiser: the rest",
    "projectors and losses",
    "AdamW and clipping",
)
# What allocates without a kernel, and what only looks at a tensor another way.
SILENT = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh"}


@dataclass(frozen=True)
class Way:
    """Options of a run, and of what is counted by rule."""

    name: str
    tokenizer_dtype: str = "fp32"
    channels_last: bool = False
    frozen_dtype: str = "fp32"
    fused: bool = False
    compile: bool = False
    pure_bf16: bool = False
    """all weights in bf16, norms computed in it: as ZeRO-2 recipes do"""
    ranks: int = 1
    """among which AdamW's work is shared out"""


WAYS = (
    Way("no option"),
    Way("tokenizer channels last", channels_last=True),
    Way("tokenizer bf16, channels last", "bf16", True),
    Way("frozen parts in bf16", frozen_dtype="bf16"),
    Way("AdamW fused", fused=True),
    Way("compiled blocks", compile=True),
    Way("defaults", channels_last=True, frozen_dtype="bf16", fused=True),
    Way("all together", "bf16", True, "bf16", True, True),
    Way("all together, `--shard` among 8", "bf16", True, "bf16", True, True, ranks=8),
    Way("official recipe: pure bf16, ZeRO-2 of 8", "bf16", pure_bf16=True, fused=True, ranks=8),
)


@dataclass
class Kernel:
    """One start of a kernel."""

    name: str
    part: str
    reads: dict[int, int]
    """bytes, by the number of the storage"""
    writes: dict[int, int]
    flops: float = 0.0
    kind: str = ""
    """of a product: bf16, tf32 or fp32"""
    extra: int = 0
    """bytes that are read or written once more"""

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values()) + self.extra

    def seconds(self, bandwidth: float) -> float:
        """At the shares of both roofs that kernels are assumed to reach."""
        memory = self.bytes / (bandwidth * BANDWIDTH_REACHED)
        compute = self.flops / (PEAK[self.kind] * PEAK_REACHED) if self.flops else 0.0
        return max(memory, compute) + BEGIN


# ------------------------------------------------------------------------------------------------
# Counting
# ------------------------------------------------------------------------------------------------
class Kernels(Watch):
    """Writes down every kernel, and to which part of the model it belongs: a backward kernel to
    that of its forward one."""

    def __init__(self, tensors, channels_last: bool):
        self.numbers, self.fresh = {}, itertools.count()
        super().__init__(tensors)
        self.kernels: list[Kernel] = []
        self.part, self.owners, self.channels_last = "projectors and losses", {}, channels_last

    def hold(self, tensor: torch.Tensor) -> None:
        """A storage's own number may be given again once it is gone; ours is not."""
        key = tensor.untyped_storage()._cdata
        if key not in self.numbers:
            self.numbers[key] = next(self.fresh)
        super().hold(tensor)

    def let_go(self, key: int) -> None:
        del self.numbers[key]
        super().let_go(key)

    def number(self, tensor: torch.Tensor) -> int:
        self.hold(tensor)
        return self.numbers[tensor.untyped_storage()._cdata]

    def own(self, tensor: torch.Tensor, part: str) -> None:
        """All nodes of autograd behind `tensor` that nobody owns yet are of `part`."""
        waiting = [tensor.grad_fn] if tensor.grad_fn else []
        while waiting:
            node = waiting.pop()
            if node is None or node._sequence_nr() in self.owners:
                continue
            self.owners[node._sequence_nr()] = part
            waiting += [before for before, _ in node.next_functions]

    def present_part(self) -> str:
        node = torch._C._current_autograd_node()
        return self.part if node is None else self.owners.get(node._sequence_nr(), self.part)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        reads = {self.number(t): size_of(t) for t in given}
        result = super().__torch_dispatch__(func, types, args, kwargs)
        made = [t for t in tree_iter(result) if isinstance(t, torch.Tensor)]
        changed = [a for a, info in zip(args, func._schema.arguments, strict=False)
                   if info.alias_info is not None and info.alias_info.is_write
                   and isinstance(a, torch.Tensor)]  # fmt: skip
        name = func._overloadpacket.__name__
        writes = {self.number(t): size_of(t) for t in (*changed, *made)}
        looks = not changed and all(number in reads for number in writes)
        if looks or name in SILENT:
            return result
        if changed and name in ("copy_", "zero_", "fill_"):  # the old content is not asked for
            reads.pop(self.number(changed[0]), None)
        kernel = Kernel(name, self.present_part(), reads, writes)
        if formula := flop_registry.get(func._overloadpacket):
            kernel.flops = formula(*args, **kwargs, out_val=result)
            kernel.kind = "bf16"
            if given[0].dtype == torch.float32:
                own = torch.backends.cuda.matmul.allow_tf32 or "convolution" in name
                kernel.kind = "tf32" if own else "fp32"
            if "convolution" in name and not self.channels_last and given[0].ndim == 4:
                kernel.extra = 2 * (size_of(given[0]) + sum(writes.values()))  # turned, both ways
        if "group_norm" in name:
            kernel.extra = size_of(given[0])  # once for the moments, once for the norm
        self.kernels.append(kernel)
        return result


def size_of(tensor: torch.Tensor) -> int:
    """Bytes that a kernel touches: what is expanded is one number."""
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride else 1
    return count * tensor.element_size()


def watch_parts(model, kernels: Kernels) -> None:
    """Tell `kernels` which part is at work."""
    towers = [model.visual] + ([model.original] if model.original is not None else [])
    for part, modules in (("CLIP", towers), ("denoiser", [model.paradigm.denoiser])):
        for module in modules:
            usual = module.forward

            def forward(*args, usual=usual, part=part, **kwargs):
                for given in (*args, *kwargs.values()):
                    kernels.own(given, kernels.part)
                with kernels.during(part):
                    result = usual(*args, **kwargs)
                kernels.own(result, part)
                return result

            module.forward = forward
    tokenize = model.paradigm.tokenize

    def tokenized(images):
        with kernels.during("tokenizer"):
            return tokenize(images)

    model.paradigm.tokenize = tokenized


def kernels_of_step(way: Way, stage: int, images: int) -> list[Kernel]:
    """Every kernel of one step, in order, on one GPU and without accumulation."""
    settings = Settings.of(
        "openai-l14-224", batch=images, micro_batch=images, stage=str(stage),
        tokenizer_dtype=way.tokenizer_dtype, frozen_dtype=way.frozen_dtype,
    )  # fmt: skip
    process = Process(device=torch.device("cuda"), autocast=True)
    _, model = plan.skeleton(settings)
    speed.tune_tokenizer(model, settings, process)
    plan.start(model, settings, stage)
    speed.lower_frozen(model, settings, process)
    if way.pure_bf16:
        model.to(torch.bfloat16)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with without_memory("cuda"):
        plan.fill(model, "cpu")
        batch, draws = plan.one_batch(model, images, "cpu")
        held = [*model.parameters(), *model.buffers(), batch, *draws.values()]
        kernels = Kernels(held, way.channels_last)
        watch_parts(model, kernels)
        with kernels:
            with torch.autocast("cpu", torch.bfloat16), norms_in_bf16(way.pure_bf16):
                loss = model(batch, draws)["loss"]
            kernels.own(loss, "projectors and losses")
            loss.backward()
    found = kernels.kernels
    if way.compile:
        found = joined(found)
    return found + optimizer(learning, way)


@contextmanager
def norms_in_bf16(yes: bool):
    """Without autocast nothing brings a norm to float32."""
    usual = fakes.AS_FLOAT32
    if yes:
        fakes.AS_FLOAT32 = set()
    yield
    fakes.AS_FLOAT32 = usual


def optimizer(learning: int, way: Way) -> list[Kernel]:
    """AdamW and clipping, by rule: passes over what learns, in bytes a number."""
    # nine foreach passes: decay p; m ← g; v; v ← g²; √v; / ; + ε; p ← m / …
    passes = [28] if way.fused else [8, 12, 8, 12, 8, 8, 8, 16]
    passes += [4, 8]  # clipping
    if way.pure_bf16:  # bf16 gradients; AdamW works on a float32 master copy, and writes a bf16 one
        passes = [28, 2, 4]
    share = learning // way.ranks
    return [Kernel("AdamW", "AdamW and clipping", {}, {}, extra=int(share * p)) for p in passes]


def joined(kernels: list[Kernel]) -> list[Kernel]:
    """Chains of kernels without a product become one, as a compiler joins them."""
    last = {}  # the last kernel that reads a storage
    for place, kernel in enumerate(kernels):
        last |= dict.fromkeys(kernel.reads, place)
    found, chain = [], []

    def close(end: int) -> None:
        if chain:
            reads, writes = {}, {}
            for kernel in chain:
                reads |= {n: s for n, s in kernel.reads.items() if n not in writes}
                writes |= kernel.writes
            # What nobody reads afterwards is never written; what nobody ever reads is a result.
            writes = {n: s for n, s in writes.items() if last.get(n, end) >= end}
            found.append(Kernel("chain", chain[0].part, reads, writes))
            chain.clear()

    for place, kernel in enumerate(kernels):
        fusible = kernel.part in ("CLIP", "denoiser") and not kernel.flops
        if not fusible or (chain and chain[0].part != kernel.part):
            close(place)
        if fusible:
            chain.append(kernel)
        else:
            found.append(kernel)
    close(len(kernels))
    return found


# ------------------------------------------------------------------------------------------------
# Adding up
# ------------------------------------------------------------------------------------------------
def shown(kernel: Kernel) -> str:
    """The line of the table that a kernel belongs to."""
    if kernel.part == "denoiser":
        return f"denoiser: {'products' if kernel.flops else 'the rest'}"
    return kernel.part


def figures(way: Way, stage: int, images: int) -> dict:
    """Kernels, gigabytes, TFLOP and milliseconds on each card, by part and together."""
    parts = {name: Counter() for name in (*PARTS, "together")}
    for kernel in kernels_of_step(way, stage, images):
        for name in (shown(kernel), "together"):
            part = parts[name]
            part["kernels"] += 1
            part["gb"] += kernel.bytes / 1e9
            part["tflop"] += kernel.flops / 1e12
            for card, bandwidth in BANDWIDTH.items():
                part[f"ms_{card}"] += 1e3 * kernel.seconds(bandwidth)
    total = parts["together"]
    used = {c: total["tflop"] * 1e12 / (total[f"ms_{c}"] / 1e3 * PEAK["bf16"]) for c in BANDWIDTH}
    rounded = {name: {k: round(v, 3) for k, v in part.items()} for name, part in parts.items()}
    about = {"way": way.name, "stage": stage, "images": images}
    return {**about, "share_of_peak": {c: round(v, 3) for c, v in used.items()}, "parts": rounded}


def ways_table(rows: list[dict], cards: tuple[str, ...]) -> list[str]:
    """A line per way: bytes and time of each part on the first card, then both cards together."""
    head = ["options", "kernels", *(f"{name}, ms" for name in PARTS), "GB: tokenizer", "GB"]
    head += [f"{card}, ms" for card in cards] + ["of the bf16 peak"]
    lines = []
    for row in rows:
        parts, total = row["parts"], row["parts"]["together"]
        cells = [row["way"], f"{total['kernels']:,.0f}"]
        cells += [f"{parts[name].get(f'ms_{cards[0]}', 0):.1f}" for name in PARTS]
        cells += [f"{parts['tokenizer'].get('gb', 0):.1f}", f"{total['gb']:.0f}"]
        cells += [f"{total[f'ms_{card}']:.0f}" for card in cards]
        lines.append([*cells, f"{row['share_of_peak'][cards[0]]:.0%}"])
    return table(head, lines)


def main(args) -> None:
    cards = tuple(BANDWIDTH)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True  # as start_process does on a GPU
    rows = [figures(way, 1, args.images) for way in WAYS]
    chosen = [way for way in WAYS if way.name in ("no option", "all together")]
    sizes = [
        figures(way, stage, images) for stage in (1, 2) for images in (2, 16, 32) for way in chosen
    ]
    torch.backends.cuda.matmul.allow_tf32 = allowed
    command, about = "python benchmarks/roofline.py", facts()
    del about["machine"]  # a count is the same on every machine
    first = (
        f"{headline(command, about)}. openai-l14-224, flow, one GPU; arithmetic on counted "
        f"kernels, not measured: products at {PEAK_REACHED:.0%} of the peak (989 TFLOP/s bf16), "
        f"the rest at {BANDWIDTH_REACHED:.0%} of the bandwidth (H200 4.8, H100 3.35 TB/s), "
        f"{BEGIN * 1e6:.0f} µs a kernel."
    )
    lines = [first, "", f"Stage 1, {args.images} images; parts on an {cards[0]}:", ""]
    lines += [*ways_table(rows, cards), "", "Both stages:", ""]
    text = []
    for row in sizes:
        total = row["parts"]["together"]
        cells = [row["stage"], row["images"], row["way"], f"{total['kernels']:,.0f}"]
        cells += [f"{total['gb']:.0f}", f"{total['tflop']:.1f}"]
        cells += [f"{total[f'ms_{card}']:.0f}" for card in cards]
        text.append([*cells, f"{row['share_of_peak'][cards[0]]:.0%}"])
    head = ["stage", "images", "options", "kernels", "GB", "TFLOP"]
    lines += table(head + [f"{card}, ms" for card in cards] + ["of the bf16 peak"], text)
    publish("roofline", lines, {"command": command, **about, "ways": rows, "sizes": sizes})


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--images", type=int, default=32, help="of the first table")
    arguments = flags.parse_args()
    run_command(lambda: main(arguments))
