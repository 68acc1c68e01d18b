"""What a run will need, before the first GPU hour: ``python train.py --plan --preset …``.

Neither weights nor data nor a GPU are needed, and no formula that could be wrong: the very model of
the run is built from *fake* tensors, which have shape, dtype and device but no memory, and takes
one step, shared out by PyTorch's own engine where ``--shard`` asks for it. A watcher stands beside
and sees every tensor come and go. So the figures are those of the code that will run:

    what stays       weights, gradients, AdamW's moments, of each what one rank holds
    what is kept     by autograd for the backward pass (without --shard among it the bf16 copies of
                     the weights that autocast makes)
    most at once     everything that is alive at the worst moment of the tokenizer's pass, of the
                     forward and of the backward pass: results on their way, a collected block's
                     weights, its gradient before it is shared out. The largest is what a GPU needs

Not counted: the CUDA context and NCCL's buffers (a GB or two together), the workspaces of cuDNN and
cuBLAS, and what the allocator loses to fragmentation. AdamW adds nothing: its fused kernel has no
temporaries. fakes.py makes the step and the watcher possible, plan_report.py says what was found.
"""

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from flow_denoiser import FlowDenoiser
from genhancer import GenHancer
from pretrained.autoencoders import FLUX_VAE, TAMING_VQGAN, VAE, VQGAN, published_config, registered
from pretrained.backbones import build_clip, describe_clip
from pretrained.flux import FLUX_TRANSFORMER
from settings import Settings, parts
from training import assemble, speed
from training.fakes import Watch, imagined_ranks, local, without_memory
from training.feature_cache import cache_bytes
from training.plan_report import Plan, StagePlan, report
from training.preflight import check_batch, jobs_of, stages_of
from training.process import Process
from training.sharding import shared_out

WORTH_SHARING = 50_000_000  # numbers that learn: 16 bytes each, 0.8 GB


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
        paradigms = []
        for part in parts(settings):
            if part.denoiser == "flow":
                vae = registered(part.vae)
                tokenizer = vae or VAE(published_config(part.vae, FLUX_VAE))
            else:
                vqgan = registered(part.vqgan)
                tokenizer = vqgan or VQGAN(published_config(part.vqgan, TAMING_VQGAN))
            tokenizer.eval().requires_grad_(False).to("meta")  # a registered one brings its weights
            flux = None
            if part.flux:  # as `load_flux` leaves it
                flux = FlowDenoiser(FLUX_TRANSFORMER).requires_grad_(False)
                flux = flux.to(torch.bfloat16 if half else torch.float32)
            paradigms.append(assemble.paradigm_of(part, info, tokenizer, flux))
        return clip, assemble.join(settings, clip, info, paradigms)


# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------
def bytes_of(tensors) -> int:
    """On this rank."""
    return sum(local(t).numel() * t.element_size() for t in tensors)


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
    kept.clear()  # the graph holds `pack`: what backward lets go must not stay here
    return sum(sizes), result


def static_memory(model: GenHancer) -> dict[str, int]:
    """Weights, gradients and moments on one rank (AdamW keeps two numbers a parameter)."""
    trainable = bytes_of(p for p in model.parameters() if p.requires_grad)
    frozen = bytes_of(p for p in model.parameters() if not p.requires_grad)
    return {
        "frozen weights": frozen,
        "trainable weights": trainable,
        "gradients": trainable,
        "moments of AdamW": 2 * trainable,
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
    side = model.info.image_size
    draws = {}
    for paradigm in model.paradigms.values():
        if hasattr(paradigm, "mask_range"):
            masked = round(paradigm.tokens * sum(paradigm.mask_range) / 2)
            order = torch.arange(paradigm.tokens).expand(count, -1)
            draws |= {"order": order, "count": torch.tensor(masked)}
        else:
            draws |= paradigm.draw([torch.Generator() for _ in range(count)], torch.Generator())
    if model.local_ratio:
        draws["local_order"] = torch.arange(model.patch_tokens).expand(count, -1)
    draws = {k: v if k == "count" else v.to(device) for k, v in draws.items()}
    return torch.zeros(count, 3, side, side, device=device), draws


def fill(model: torch.nn.Module, device: str) -> None:
    """Within a FakeTensorMode: fake tensors on `device` in the place of meta ones."""
    model._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device))


def watched_step(model: GenHancer, settings: Settings, process: Process, shard: bool) -> dict:
    """One step of a stage, the second or a later one, when all that stays is there.

    Works alike on fake and on real tensors. Returns: fields of `StagePlan`; "flops" of all images.
    """
    micro = settings.micro(process.ranks)
    learning = [p for p in model.parameters() if p.requires_grad]
    images, draws = one_batch(model, micro, "cpu")
    moments = [torch.empty_like(local(p)) for p in learning for _ in range(2)]
    # DDP's gradients are there from the start, in its buckets; all others from the first of several
    # accumulated pieces on.
    gradients = []
    if settings.batch > micro * process.ranks or (process.ranks > 1 and not shard):
        for parameter in learning:
            parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    cached = None
    if settings.cache:  # a run makes it in float32, before frozen matrices are brought to bf16
        with torch.autocast("cpu", torch.bfloat16, process.autocast):
            found = model.precompute(images)
        cached = {k: v.float() if v.is_floating_point() else v for k, v in found.items()}
    held = *moments, *gradients, images, *draws.values()
    watch = Watch([*model.parameters(), *model.buffers(), *held, *(cached or {}).values()])
    tokenize = model.tokenize

    def watched(images: torch.Tensor) -> dict[str, torch.Tensor]:
        with watch.during("tokenizer"):
            return tokenize(images)

    model.tokenize = watched
    with watch:
        with torch.autocast("cpu", torch.bfloat16, process.autocast):
            kept, result = saved_for_backward(model, images, draws, cached)
        with watch.during("backward pass"):
            result["loss"].backward()
    del model.tokenize
    memory = {**static_memory(model), "kept for the backward pass": kept}
    count = sum(p.numel() for p in learning)
    return {"trainable": count, "memory": memory, "peaks": watch.peaks, "flops": watch.flops}


def rehearse(settings: Settings, ranks: int, device: str, stage: int) -> StagePlan:
    """A stage of the run on one of `ranks` devices, without any of them."""
    process = Process(0, ranks, torch.device(device), in_half(settings, device))
    _, model = skeleton(settings, process.autocast)
    benchmark = torch.backends.cudnn.benchmark
    speed.tune_tokenizer(model, settings, process)
    torch.backends.cudnn.benchmark = benchmark
    start(model, settings, stage)
    speed.lower_frozen(model, settings, process)
    shard = settings.shard and ranks > 1
    with imagined_ranks(ranks) if shard else nullcontext() as mesh, without_memory(device):
        fill(model, "cpu")
        if shard:
            on_cpu = replace(process, device=torch.device("cpu"))
            shared_out(model, on_cpu, list(speed.blocks_of(model)), mesh)
        found = watched_step(model, settings, process, shard)
    found["flops"] /= settings.micro(ranks)
    return StagePlan(settings.steps(stage), **found)


def in_half(settings: Settings, device: str) -> bool:
    """Whether the run computes under bf16 autocast, as `start_process` would decide on a GPU that
    has it."""
    return settings.precision == "bf16" or (settings.precision == "auto" and device == "cuda")


def make_plan(settings: Settings, ranks: int, device: str, other: bool = False) -> Plan:
    """All figures of a run on `ranks` devices ("cuda" or "cpu").

    Args: other: also what a GPU needs with --shard, if it is not asked for, and without, if it is,
        where enough learns to make a difference.
    Raises: ValueError where the settings do not make a model.
    """
    clip, model = skeleton(settings)
    text = "text tower (stays on the host)"
    taught = model.paradigms.values()
    groups = {
        "image tower": [clip.visual],
        text: [],
        "projectors": [projector for p in taught for projector in p.projectors.values()],
        **{f"denoiser ({p.name})": [p.denoiser] for p in taught},
        "tokenizer" + "s" * (len(taught) > 1): [p.tokenizer for p in taught],
    }
    counts = {k: sum(p.numel() for m in v for p in m.parameters()) for k, v in groups.items()}
    whole = sum(p.numel() for p in clip.parameters())
    counts[text] = whole - counts["image tower"]
    plan = Plan(
        settings,
        ranks,
        device,
        in_half(settings, device),
        counts,
        tokens=sum(p.tokens for p in taught),
        patch_tokens=model.patch_tokens,
        width=model.paradigm.project_context[0].normalized_shape[0],
        enhanced=4 * whole,
        text=4 * counts[text],
    )
    for stage in stages_of(settings):
        plan.stages[stage] = found = rehearse(settings, ranks, device, stage)
        if other and ranks > 1 and found.trainable > WORTH_SHARING:
            contrary = replace(settings, shard=not settings.shard)
            found.other = rehearse(contrary, ranks, device, stage).peak
    if 1 in plan.stages and not settings.local_ratio:
        plan.cache, plan.spared = of_the_cache(settings)
    return plan


def of_the_cache(settings: Settings) -> tuple[int, int]:
    """Of one image: the bytes that ``--cache DIR`` keeps, and the FLOPs that stage 1 spares."""
    _, model = skeleton(settings)
    with without_memory("cpu"), FlopCounterMode(display=False) as counter:
        fill(model, "cpu")
        images, _ = one_batch(model, 1, "cpu")
        found = model.precompute(images)
    return cache_bytes(found, 1, settings.cache_dtype), counter.get_total_flops()


def print_plan(settings: Settings, ranks: int) -> None:
    """``--plan``. The toy runs on the CPU, everything else is meant for GPUs."""
    device = "cpu" if settings.preset == "toy" else "cuda"
    ranks = ranks if device == "cuda" else 1
    if settings.batch % ranks:
        raise ValueError(f"--batch {settings.batch} is no multiple of --gpus {ranks}")
    # Several denoisers: each one's own stage 1, then the stage 2 that they share.
    jobs = [settings]
    if len(settings.denoisers) > 1:
        jobs = [replace(job, stage=str(number)) for job, number in jobs_of(settings)]
    for job in jobs:
        check_batch(job, ranks)
        print(report(make_plan(job, ranks, device, other=True)))
