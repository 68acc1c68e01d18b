"""What a run will need, before the first GPU hour: ``python train.py --plan --preset …``.

Neither weights nor data nor a GPU are needed, and no formula that could be wrong: the very model of
the run is built from *fake* tensors, which have shape, dtype and device but no memory, and takes
one training step. Parameters are counted, and autograd is asked what it keeps for the backward
pass; a counter adds up the floating-point operations of every matrix product.

What is counted: weights, gradients, AdamW's moments, and what the backward pass needs (among it the
bf16 copies of weights that autocast makes). What is not: short-lived results within an operation
(the true peak of a toy step is 0.93 to 1.09 times the sum; tests/test_plan.py), the CUDA context
and NCCL's buffers (a GB or two together), and what the allocator loses to fragmentation.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from flow_denoiser import FlowDenoiser
from genhancer import GenHancer
from perceiver_denoiser import PerceiverDenoiser
from pretrained.autoencoders import FLUX_VAE, TAMING_VQGAN, VAE, VQGAN, published_config, registered
from pretrained.backbones import build_clip, describe_clip
from pretrained.flux import FLUX_TRANSFORMER
from settings import Settings
from training import assemble

CC3M = 3_000_000  # pictures of CC3M that can still be downloaded, about
H100 = 989e12  # its dense bf16 peak, FLOP/s


@dataclass
class StagePlan:
    """Figures of one stage; memory in bytes per GPU."""

    steps: int
    trainable: int
    memory: dict[str, int]
    flops: float
    """of one image, forward and backward"""

    @property
    def checkpoint(self) -> int:
        """Bytes on the disk: the trained numbers and AdamW's two moments of each, in float32."""
        return 3 * 4 * self.trainable


@dataclass
class Plan:
    settings: Settings
    ranks: int
    device: str
    parameters: dict[str, int]
    tokens: int
    patch_tokens: int
    width: int
    """of CLIP's global token"""
    enhanced: int
    """bytes of the enhanced model"""
    stages: dict[int, StagePlan] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------
# A model without memory
# ------------------------------------------------------------------------------------------------
def skeleton(settings: Settings, half: bool = False) -> tuple[torch.nn.Module, GenHancer]:
    """CLIP and GenHancer as `assemble.build_model` would make them, on the meta device.

    Args: half: published FLUX weights are read as bf16, where the device computes in it.
    Raises: ValueError as the model's parts do.
    """
    info, _ = describe_clip(settings.clip)
    with torch.device("meta"):
        clip = build_clip(info).eval()
        if settings.denoiser == "flow":
            vae = registered(settings.vae)
            tokenizer = vae or VAE(published_config(settings.vae, FLUX_VAE))
            config = FLUX_TRANSFORMER
            if not settings.flux:
                config = assemble.flow_config(settings, tokenizer.config.latent_channels)
            denoiser = FlowDenoiser(config)
        else:
            vqgan = registered(settings.vqgan)
            tokenizer = vqgan or VQGAN(published_config(settings.vqgan, TAMING_VQGAN))
            config = assemble.perceiver_config(settings, info.image_size, tokenizer.config)
            denoiser = PerceiverDenoiser(config)
        tokenizer.eval().requires_grad_(False).to("meta")  # a registered one brings its weights
        if settings.flux:  # as `load_flux` leaves it
            denoiser = denoiser.to(torch.bfloat16 if half else torch.float32).requires_grad_(False)
        return clip, assemble.join(settings, clip, info, tokenizer, denoiser)


@contextmanager
def flash_attention():
    """On a GPU, attention keeps q, k, v and its result, never the matrix of all pairs. A fake GPU
    cannot say that it has that kernel, so it is called by name."""
    usual = F.scaled_dot_product_attention

    def flash(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        result = torch.bfloat16 if torch.is_autocast_enabled("cuda") else q.dtype
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        return kernel(q, k, v, dropout_p, is_causal, False, scale=scale)[0].to(result)

    F.scaled_dot_product_attention = flash
    try:
        yield
    finally:
        F.scaled_dot_product_attention = usual


@contextmanager
def matrix_attention():
    """Attention as two products, which the counter counts, and which small CPU runs use."""
    flash = torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_flash_sdp(flash[0])
        torch.backends.mha.set_fastpath_enabled(flash[1])


@contextmanager
def autocast(device: str):
    """bf16 on the fake GPU. (torch.autocast asks for a real one, and does nothing without.)"""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, device == "cuda")
    torch.set_autocast_dtype(device, torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
        torch.clear_autocast_cache()


# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------
def saved_for_backward(
    model: GenHancer, images: torch.Tensor, draws: dict, cached: dict | None = None
) -> tuple[int, dict]:
    """Bytes that autograd keeps after a forward pass, beside the model's own tensors; and the
    result of the pass. Works alike on fake and on real tensors.

    Args: cached: what `model.precompute` gives, where known. Autograd keeps nothing of its making.
    """
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}  # holding the tensors keeps their storages' numbers unique

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model(images, draws, cached)
    sizes = [t.untyped_storage().nbytes() for key, t in kept.items() if key not in own]
    return sum(sizes), result


def bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def static_memory(model: GenHancer, ranks: int, shard: bool) -> dict[str, int]:
    """Weights, gradients and moments on one rank (AdamW keeps two numbers a parameter)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    moments = 2 * bytes_of(trainable)
    return {
        "frozen weights": bytes_of(frozen),
        "trainable weights": bytes_of(trainable),
        "gradients": bytes_of(trainable),
        "moments of AdamW": math.ceil(moments / ranks) if shard else moments,
    }


def start(model: GenHancer, settings: Settings, stage: int) -> None:
    """As train.py starts a stage."""
    if stage == 1:
        model.start_stage1()
    else:
        assemble.start_stage2(model, settings)
    model.train()


def one_batch(model: GenHancer, count: int, device: str) -> tuple[torch.Tensor, dict]:
    """Images and draws of `count` images; a discrete denoiser gets its mean number of masks."""
    side, paradigm = model.info.image_size, model.paradigm
    if hasattr(paradigm, "mask_range"):
        order = torch.arange(paradigm.tokens).expand(count, -1)
        masked = round(paradigm.tokens * sum(paradigm.mask_range) / 2)
        draws = {"order": order, "count": torch.tensor(masked)}
        if model.local_ratio:
            draws["local_order"] = torch.arange(model.patch_tokens).expand(count, -1)
    else:
        draws = model.draw([torch.Generator() for _ in range(count)], torch.Generator())
    draws = {k: v if k == "count" else v.to(device) for k, v in draws.items()}
    return torch.zeros(count, 3, side, side, device=device), draws


def fill(model: torch.nn.Module, device: str) -> None:
    """Within a FakeTensorMode: fake tensors on `device` in the place of meta ones."""
    model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))


class Flops(TorchDispatchMode):
    """Adds up the operations of matrix products, convolutions and attentions as they are called;
    PyTorch's own counter does the same and also says in which module, for three times the time."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def on_meta(model: GenHancer, run):
    """`run()` of a model on the meta device, which knows no autocast that could be left."""
    model.paradigm.own_precision = lambda part, x: part(x)
    try:
        return run()
    finally:
        del model.paradigm.own_precision


def flops_per_image(model: GenHancer) -> float:
    """Floating-point operations of one image, forward and backward, a product counted as two.
    `model` is on the meta device, which knows shapes; here they suffice."""
    images, draws = one_batch(model, 1, "meta")
    with matrix_attention(), Flops() as counter:
        on_meta(model, lambda: model(images, draws)["loss"].backward())
    model.zero_grad()
    return counter.total


def make_plan(settings: Settings, ranks: int, device: str) -> Plan:
    """All figures of a run on `ranks` devices ("cuda" or "cpu").

    Raises: ValueError where the settings do not make a model.
    """
    micro = settings.micro(ranks)
    stages = [s for s in (1, 2) if settings.stage in (str(s), "both")]
    if settings.end_to_end:
        stages = [2]
    clip, model = skeleton(settings, half=device == "cuda")
    text = "text tower (stays on the CPU)"
    projectors = [model.project_vector, model.project_context, model.project_local]
    parts = {
        "image tower": [clip.visual],
        text: [],
        "projectors": [p for p in projectors if p is not None],
        f"denoiser ({settings.denoiser})": [model.paradigm.denoiser],
        "tokenizer": [model.paradigm.tokenizer],
    }
    counts = {k: sum(p.numel() for m in v for p in m.parameters()) for k, v in parts.items()}
    whole = sum(p.numel() for p in clip.parameters())
    counts[text] = whole - counts["image tower"]
    plan = Plan(
        settings,
        ranks,
        device,
        counts,
        tokens=model.paradigm.tokens,
        patch_tokens=model.patch_tokens,
        width=model.project_context[0].normalized_shape[0],
        enhanced=4 * whole,
    )
    # First what needs shapes alone, on the meta device. Stage 1 comes first: stage 2 changes the
    # tower.
    for stage in stages:
        start(model, settings, stage)
        plan.stages[stage] = StagePlan(
            settings.steps(stage),
            trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
            memory=static_memory(model, ranks, settings.shard),
            flops=flops_per_image(model),
        )
    with torch.no_grad(), matrix_attention():
        images, _ = one_batch(model, micro, "meta")
        found = on_meta(model, lambda: model.precompute(images))
    # Then what needs dtypes and kernels too, on fake tensors; in the other order, since stage 1
    # looks at the tower's features only.
    attention = flash_attention if device == "cuda" else matrix_attention
    with FakeTensorMode(), attention(), autocast(device):
        fill(model, device)
        cached = {k: torch.zeros(v.shape, dtype=v.dtype, device=device) for k, v in found.items()}
        images, draws = one_batch(model, micro, device)
        for stage in reversed(stages):
            if stage == 1:
                model.start_stage1()
                model.train()
            kept, _ = saved_for_backward(model, images, draws, cached)
            plan.stages[stage].memory["kept for the backward pass"] = kept
    return plan


# ------------------------------------------------------------------------------------------------
# Saying it
# ------------------------------------------------------------------------------------------------
def report(plan: Plan) -> str:
    """The plan as a page of text."""
    s, gb = plan.settings, 1e9
    micro = s.micro(plan.ranks)
    devices = f"{plan.ranks} GPUs, bf16 autocast" if plan.device == "cuda" else "CPU, float32"
    sharding = ", ZeRO stage 1" if s.shard and plan.ranks > 1 else ""
    lines = [
        f"plan of preset {s.preset}: {s.clip}, denoiser {s.denoiser}; {devices}{sharding}",
        f"  image {plan.tokens} tokens for the denoiser, {plan.patch_tokens} patches and a global "
        f"token of {plan.width} numbers from CLIP",
        "  parameters",
    ]
    lines += [f"    {name:32}{count / 1e6:12.2f} M" for name, count in plan.parameters.items()]
    for number, stage in plan.stages.items():
        seen = stage.steps * s.batch
        total = sum(stage.memory.values())
        hours = seen * stage.flops / (0.4 * H100 * plan.ranks) / 3600
        lines += [
            f"  stage {number}: {stage.trainable / 1e6:.2f} M trainable",
            f"    {stage.steps:,} steps of {s.batch} images ({plan.ranks} × {micro} × "
            f"{s.batch // (plan.ranks * micro)} accumulated): {seen:,} images, "
            f"{seen / CC3M:.1f} epochs of CC3M",
            f"    {stage.flops / 1e9:,.1f} GFLOP an image"
            + (
                f"; {hours:,.1f} hours at 40 % of an H100's peak (arithmetic, not measured)"
                if plan.device == "cuda"
                else ""
            ),
            f"    a checkpoint {stage.checkpoint / gb:.3f} GB, the newest {s.keep} are kept",
            "    memory per " + ("GPU" if plan.device == "cuda" else "process"),
        ]
        lines += [f"      {name:30}{size / gb:9.3f} GB" for name, size in stage.memory.items()]
        lines.append(f"      {'together':30}{total / gb:9.3f} GB")
        if plan.device == "cuda" and plan.ranks > 1:
            moments, trained = stage.memory["moments of AdamW"], stage.memory["trainable weights"]
            other = total - moments + 2 * trained / (1 if s.shard else plan.ranks)
            lines.append(
                f"      {'without' if s.shard else 'with'} --shard{'':{19 if s.shard else 22}}"
                f"{other / gb:9.3f} GB"
            )
    lines.append(f"  enhanced model {plan.enhanced / gb:.3f} GB")
    return "\n".join(lines)


def print_plan(settings: Settings, ranks: int) -> None:
    """``--plan``. The toy runs on the CPU, everything else is meant for GPUs."""
    device = "cpu" if settings.preset == "toy" else "cuda"
    ranks = ranks if device == "cuda" else 1
    if settings.batch % ranks:
        raise ValueError(f"--batch {settings.batch} is no multiple of --gpus {ranks}")
    print(report(make_plan(settings, ranks, device)))
