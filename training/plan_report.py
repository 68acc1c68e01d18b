"""What ``--plan`` says: the figures of a run, and the page of text that they become.

The figures are found in plan.py. Here is what each of them means, and nothing that computes one.

Memory has two homes. On a GPU lie weights, gradients, moments and whatever a step makes. On the
host (the machine's own memory, once per rank) lie Python, PyTorch, and CLIP's text tower, which no
step needs. A run on the CPU has one home for both.
"""

from dataclasses import dataclass, field

from settings import Settings

CC3M = 3_000_000  # pictures of CC3M that can still be downloaded, about
H100 = 989e12  # its dense bf16 peak, FLOP/s
# Python with all that train.py imports, before any model: resident memory on Linux, PyTorch 2.14
# without a GPU (benchmarks/plans.py --check measures it). With a GPU add CUDA's own libraries.
INTERPRETER = 0.8e9
GB = 1e9


@dataclass
class StagePlan:
    """Figures of one stage; memory in bytes per GPU (or per process on the CPU)."""

    steps: int
    trainable: int
    memory: dict[str, int]
    """what stays: weights, gradients, moments; and what the backward pass needs"""
    peaks: dict[str, int]
    """the most that is alive at once, by part of a step, with all that stays"""
    flops: float
    """of one image, forward and backward"""
    other: int | None = None
    """the peak with --shard, where it is not asked for; without, where it is; None: one rank"""

    @property
    def checkpoint(self) -> int:
        """Bytes on the disk: the trained numbers and AdamW's two moments of each, in float32."""
        return 3 * 4 * self.trainable

    @property
    def peak(self) -> int:
        """What a GPU must have, beside CUDA's own share."""
        return max(self.peaks.values())


@dataclass
class Plan:
    """Figures of a run."""

    settings: Settings
    ranks: int
    device: str
    """cuda or cpu"""
    half: bool
    """bf16 autocast"""
    parameters: dict[str, int]
    tokens: int
    patch_tokens: int
    width: int
    """of CLIP's global token"""
    enhanced: int
    """bytes of the enhanced model"""
    text: int
    """bytes of the text tower, which stays on the host"""
    cache: int = 0
    """bytes of an image in a cache on the disk; 0: it would save nothing"""
    spared: int = 0
    """FLOPs of an image that stage 1 then spares"""
    stages: dict[int, StagePlan] = field(default_factory=dict)

    def loading(self) -> int:
        """Bytes of all models on the host of one rank, before they move to its GPU: everything is
        read in float32."""
        return 4 * sum(self.parameters.values())

    def copied(self, stage: StagePlan) -> int:
        """Bytes on rank 0's host while a checkpoint is written behind training's back. A model that
        is shared out is written tensor by tensor, without a copy."""
        return 0 if self.settings.shard and self.ranks > 1 else stage.checkpoint


def report(plan: Plan) -> str:
    """The plan as a page of text."""
    s = plan.settings
    where = f"{plan.ranks} GPUs" if plan.device == "cuda" else "CPU"
    sharding = ", shared out (FSDP2)" if s.shard and plan.ranks > 1 else ""
    lines = [
        f"plan of preset {s.preset}: {s.clip}, denoiser {s.denoiser}; {where}, "
        f"{'bf16 autocast' if plan.half else 'float32'}{sharding}",
        f"  image {plan.tokens} tokens for the denoiser, {plan.patch_tokens} patches and a global "
        f"token of {plan.width} numbers from CLIP",
        "  parameters",
    ]
    lines += [f"    {name:32}{count / 1e6:12.2f} M" for name, count in plan.parameters.items()]
    for number, stage in plan.stages.items():
        lines += of_stage(plan, number, stage)
    lines.append(f"  enhanced model {plan.enhanced / GB:.3f} GB")
    if plan.cache:
        size = f"{plan.cache / 1e3:.1f} kB an image"
        # With --cache the figures above are already those of a stage 1 that is spared them.
        whole = plan.stages[1].flops + (plan.spared if s.cache else 0)
        lines.append(
            f"  --cache DIR would keep {size}, {plan.cache * CC3M / GB:.0f} GB for CC3M; stage 1 "
            f"then takes {(whole - plan.spared) / 1e9:,.1f} of {whole / 1e9:,.1f} GFLOP an image"
        )
    return "\n".join(lines)


def of_stage(plan: Plan, number: int, stage: StagePlan) -> list[str]:
    """The lines of one stage."""
    s, micro = plan.settings, plan.settings.micro(plan.ranks)
    seen = stage.steps * s.batch
    hours = seen * stage.flops / (0.4 * H100 * plan.ranks) / 3600
    arithmetic = f"; {hours:,.1f} hours at 40 % of an H100's peak (arithmetic, not measured)"
    lines = [
        f"  stage {number}: {stage.trainable / 1e6:.2f} M trainable",
        f"    {stage.steps:,} steps of {s.batch} images ({plan.ranks} × {micro} × "
        f"{s.batch // (plan.ranks * micro)} accumulated): {seen:,} images, "
        f"{seen / CC3M:.1f} epochs of CC3M",
        f"    {stage.flops / 1e9:,.1f} GFLOP an image" + arithmetic * (plan.device == "cuda"),
        f"    a checkpoint {stage.checkpoint / GB:.3f} GB, the newest {s.keep} are kept",
        "    memory on a GPU" if plan.device == "cuda" else "    memory of the process",
    ]
    lines += [row(name, size) for name, size in stage.memory.items()]
    lines += [row(f"most at once, {name}", size) for name, size in stage.peaks.items()]
    lines += [row("together", stage.peak)]
    if stage.other is not None:
        lines.append(row(f"together {'without' if s.shard else 'with'} --shard", stage.other))
    host = [row("text tower", plan.text), row("Python and PyTorch, about", INTERPRETER)]
    if plan.device == "cuda":
        lines.append("      (beside CUDA's and NCCL's own share, a GB or two: not counted)")
        lines.append("    memory on the host, per rank")
        host.append(row("at the start, before models move", plan.loading()))
        if copy := plan.copied(stage):
            host.append(row("rank 0, while a checkpoint is written", copy))
    else:
        host.append(row("with the process itself", stage.peak + plan.text + INTERPRETER))
    return lines + host


def row(name: str, size: float) -> str:
    return f"      {name:40}{size / GB:9.3f} GB"
