"""Train GenHancer: stage 1, then stage 2.

    python train.py                                        both stages on the toy world, CPU, minutes
    python train.py --stage 1 --data PHOTOS                a folder (or list) of pictures, toy models
    torchrun --nproc_per_node 8 train.py --stage 1 --preset openai-l14-224 --data DIR --vae ae.safetensors
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29400 train.py …

Run any of them again and it goes on from its newest checkpoint; on the CPU the result is bit-equal
to a run that was never stopped, since all randomness of a step is a function of (seed, step).

The order of this file: settings → set-up → model and data → the loop → what a run leaves behind.
"""

import contextlib
import json
import math
import os
import platform
import resource
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoints as ckpt
from autoencoders import load_vae
from cli import parse_settings, run_command, setting
from data import FrozenCache, ImageFiles, MicroBatches, batches
from flow_denoiser import FlowDenoiser, FlowDenoiserConfig
from genhancer import GenHancer, load_clip
from lora import lora_state_dict, merged_state_dict
from pictures import sample_grid
from toyworld import TOY_DIR, ToyScenes

T_BINS = 10  # the loss is logged per tenth of t: one mean hides that its ends behave differently


# ------------------------------------------------------------------------------------------------
# Settings (METHOD: Sec. 5.1, App. B). Every field is a flag; --help prints this list.
# ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Settings:
    preset: str = setting("toy", "named set of defaults; flags given by hand win")
    stage: str = setting("both", "which stage to run; 2 starts from stage 1 of the same run", ("1", "2", "both"))
    name: str = setting("", "run name, default: the preset's; everything goes to RUNS/NAME")
    runs: str = setting("runs", "folder of all runs")
    stage1_from: str = setting("", "another run directory whose stage 1 to start stage 2 from (for ablations)")
    # what is looked at
    data: str = setting("", "folder or list of images; empty: the toy world's own scenes")
    toy_images: int = setting(16384, "number of toy scenes, where --data is empty")
    crop_min: float = setting(0.9, "smallest area of the random crop, as a share of the picture")
    cache: bool = setting(False, "hold images and frozen features in memory (small data sets only)")
    workers: int = setting(4, "processes that decode images, per rank")
    # the frozen parts
    clip: str = setting("ViT-L-14-quickgelu:openai", "CLIP: NAME:TAG of open_clip, FILE.safetensors or FOLDER")
    vae: str = setting("", "VAE weights, FLUX.1's ae.safetensors for the full size")
    posterior: bool = setting(True, "sample the VAE posterior (official code); --no-posterior takes its mean")
    vae_fp32: bool = setting(True, "run the VAE in float32 even under bf16")
    # condition (Key Point #1)
    local_ratio: float = setting(0.0, "percent of patch tokens beside [CLS] in the condition (Fig. 5)")
    # denoiser (Key Point #2.3; Tab. 5)
    blocks: int = setting(2, "m: m MM-DiT and 2m Single-DiT blocks (Tab. 5)")
    width: int = setting(3072, "width D of the denoiser")
    heads: int = setting(24, "attention heads")
    rope_axes: str = setting("16,56,56", "RoPE widths of (unused, row, column); their sum is D / heads")
    vector_dim: int = setting(768, "width of the vector condition")
    context_dim: int = setting(4096, "width of the context condition")
    guidance: bool = setting(True, "FLUX.1-dev's guidance embedding (a learnt bias here)")
    initialisation: str = setting("pytorch", "start of the denoiser's weights", ("pytorch", "adaln-zero"))
    # timesteps (Key Point #2.2; Tab. 4)
    time_distribution: str = setting("logit-normal", "distribution of t", ("logit-normal", "uniform"))
    time_scale: float = setting(1.0, "scale s of Eq. (6)")
    # stage 1 and 2 (Key Point #2.1)
    stage1_steps: int = setting(100_000, "steps of stage 1")
    stage1_lr: float = setting(1e-4, "learning rate of stage 1")
    stage2_steps: int = setting(5_000, "steps of stage 2 (Fig. 1 i: 100 to 10 000)")
    stage2_lr: float = setting(1e-5, "learning rate of stage 2")
    stage2_trains: str = setting("only", "'only' the image tower, or 'all': denoiser and projectors too (Fig. S4)",
                                 ("only", "all"))
    end_to_end: bool = setting(False, "no stage 1: a fresh denoiser and the tower learn together (Fig. 6)")
    tuning: str = setting("lora", "how the tower learns (Fig. S2)", ("lora", "direct"))
    lora_rank: int = setting(16, "LoRA rank r")
    lora_alpha: float = setting(16.0, "LoRA α; the update is scaled by α / r")
    lora_dropout: float = setting(0.1, "dropout on the adapters' input")
    lora_bias: str = setting("lora_only", "train the biases of adapted layers, or none", ("lora_only", "none"))
    drift_weight: float = setting(0.0, "λ of the drift term D(v, v0) = 1 − cos in Eq. (5); 0 is the paper")
    # optimiser
    batch: int = setting(256, "global batch, over all ranks and accumulation steps")
    micro_batch: int = setting(16, "images per rank and forward pass; accumulation follows from it")
    schedule: str = setting("constant", "learning rate over a stage", ("constant", "cosine"))
    warmup: int = setting(0, "steps of linear warm-up")
    weight_decay: float = setting(0.01, "AdamW's weight decay")
    clip_grad: float = setting(1.0, "largest gradient norm")
    precision: str = setting("auto", "autocast; auto: bf16 on GPUs that have it, float32 on the CPU",
                             ("auto", "fp32", "bf16"))
    seed: int = setting(0, "seed of everything")
    # leaving traces
    log_every: int = setting(50, "steps per line of metrics.jsonl")
    sample_every: int = setting(5_000, "steps between sample grids")
    save_every: int = setting(1_000, "steps between checkpoints")
    keep: int = setting(2, "checkpoints to keep per stage")


TOY = {
    "clip": str(TOY_DIR / "clip.safetensors"), "vae": str(TOY_DIR / "vae.safetensors"), "cache": True, "workers": 0,
    "blocks": 1, "width": 192, "heads": 6, "rope_axes": "8,12,12", "vector_dim": 64, "context_dim": 64,
    "guidance": False, "initialisation": "adaln-zero", "crop_min": 1.0,
    "stage1_steps": 1000, "stage1_lr": 2e-3, "stage2_steps": 300, "stage2_lr": 1e-3,
    "batch": 128, "micro_batch": 128, "schedule": "cosine", "warmup": 50,
    "log_every": 20, "sample_every": 500, "save_every": 100,
}
PRESETS: dict[str, dict] = {
    "toy": TOY,
    "openai-l14-224": {"clip": "ViT-L-14-quickgelu:openai"},
    "openai-l14-336": {"clip": "ViT-L-14-336-quickgelu:openai"},
    "metaclip-l14-224": {"clip": "ViT-L-14-quickgelu:metaclip_fullcc"},
    "metaclip-h14-224": {"clip": "ViT-H-14-quickgelu:metaclip_fullcc"},
    "siglip-so400m-224": {"clip": "ViT-SO400M-14-SigLIP:webli"},
    "siglip-so400m-384": {"clip": "ViT-SO400M-14-SigLIP-384:webli"},
}
# Settings that change no number of a run: a resumed run may differ in them.
FREE = {"stage", "name", "runs", "data", "workers", "log_every", "sample_every", "save_every", "keep", "stage1_from",
        "cache", "preset", "clip", "vae"}  # what clip and vae hold is compared by fingerprint


# ------------------------------------------------------------------------------------------------
# Set-up
# ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Place:
    """Where this process runs."""

    rank: int
    ranks: int
    device: torch.device
    autocast: bool

    @property
    def chief(self) -> bool:
        return self.rank == 0


def set_up(settings: Settings) -> Place:
    """Device, precision and, under torchrun, the process group (nccl on GPUs, gloo on CPUs)."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        # With a few dozen tokens the fused CPU kernel costs more than it saves, and PyTorch's
        # separate inference path for attention rounds differently: frozen and trained tower must agree.
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.mha.set_fastpath_enabled(False)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and cuda and torch.cuda.is_bf16_supported())
    return Place(rank, ranks, device, bf16)


def seed_of(*numbers: int) -> int:
    """A 62-bit seed that mixes all numbers well: near seeds give unrelated streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 2)


def build_model(settings: Settings, place: Place) -> tuple[torch.nn.Module, GenHancer]:
    """CLIP and the module around it. Initialised alike on every rank: same seed, same order."""
    if not settings.vae:
        raise ValueError("--vae is missing: give FLUX.1's ae.safetensors (its Apache-2.0 'schnell' repository has it)")
    try:
        axes = tuple(int(a) for a in settings.rope_axes.split(","))
    except ValueError:
        raise ValueError(f"--rope_axes {settings.rope_axes!r}: expected three numbers like 16,56,56") from None
    clip, info = load_clip(settings.clip)
    vae = load_vae(settings.vae)
    torch.manual_seed(seed_of(settings.seed, 1))
    denoiser = FlowDenoiser(FlowDenoiserConfig(
        latent_channels=vae.config.latent_channels, width=settings.width, heads=settings.heads, axes=axes,
        double_blocks=settings.blocks, single_blocks=2 * settings.blocks, vector_dim=settings.vector_dim,
        context_dim=settings.context_dim, guidance=settings.guidance, initialisation=settings.initialisation))
    model = GenHancer(clip, info, vae, denoiser, local_ratio=settings.local_ratio,
                      time_distribution=settings.time_distribution, time_scale=settings.time_scale,
                      drift_weight=settings.drift_weight, sample_posterior=settings.posterior)
    return clip.to(place.device), model.to(place.device)


def build_data(settings: Settings, model: GenHancer, place: Place):
    """The training set; with --cache, together with everything the frozen parts make of it."""
    if settings.data:
        dataset = ImageFiles(settings.data, model.info.image_size, settings.crop_min, settings.seed)
    elif settings.preset == "toy":
        dataset = ToyScenes(settings.toy_images, seed=seed_of(settings.seed, 2))
    else:
        raise ValueError(f"--data is missing: preset {settings.preset} needs a folder or a list of images")
    if not settings.cache:
        return dataset
    if len(dataset) * model.info.image_size**2 > 50_000 * 64**2:
        raise ValueError(f"--cache would hold {len(dataset)} images of {model.info.image_size} px: use --no-cache")

    def encode(images):
        return {k: v.float() for k, v in model.eval().frozen(images.to(place.device)).items()}

    return FrozenCache(dataset, encode, lambda chunks: tqdm(chunks, "frozen features", unit="chunk", leave=False,
                                                            disable=not place.chief))


# ------------------------------------------------------------------------------------------------
# One stage
# ------------------------------------------------------------------------------------------------
def learning_rate(settings: Settings, peak: float, step: int, steps: int) -> float:
    """Constant is the paper; the toy's few steps profit from warm-up and decay."""
    warm = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    return peak * warm * (0.5 * (1 + math.cos(math.pi * step / steps)) if settings.schedule == "cosine" else 1.0)


def parameter_groups(model: GenHancer, settings: Settings, stage: int) -> list[dict]:
    """Trainable parameters with their peak learning rates.

    End to end, the fresh denoiser and projectors need the learning rate that stage 1 would have
    given them; the tower keeps stage 2's.
    """
    tower = [p for n, p in model.named_parameters() if p.requires_grad and n.startswith("visual.")]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("visual.")]
    peak = settings.stage1_lr if stage == 1 or settings.end_to_end else settings.stage2_lr
    groups = [{"params": tower, "peak": settings.stage2_lr}, {"params": rest, "peak": peak}]
    return [g for g in groups if g["params"]]


def trained(model: GenHancer) -> dict[str, torch.Tensor]:
    """What this stage changes, by parameter name: all that a checkpoint must hold."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


class Window:
    """Sums of what is logged, since the last line of metrics.jsonl. Saved with every checkpoint, so
    that a resumed run writes the same lines."""

    def __init__(self, sums: list[float] | None = None):
        self.sums = np.array(sums or [0.0] * (2 * T_BINS + 3))  # loss and count per bin; drift, count; gradient

    def add(self, result: dict, place: Place) -> None:
        """Add one micro-batch: per-image losses into their bin of t."""
        bins = (result["t"] * T_BINS).long().clamp(0, T_BINS - 1).cpu()
        per_image = result["per_image"].double().cpu()
        sums = torch.zeros(len(self.sums), dtype=torch.float64)
        sums[:T_BINS].index_add_(0, bins, per_image)
        sums[T_BINS:2 * T_BINS].index_add_(0, bins, torch.ones_like(per_image))
        if "drift" in result:
            sums[-3], sums[-2] = result["drift"].double().sum().cpu(), len(bins)
        if place.ranks > 1:
            sums = sums.to(place.device)
            dist.all_reduce(sums)
        self.sums += sums.cpu().numpy()

    def line(self, steps: int) -> dict:
        loss, count = self.sums[:T_BINS], self.sums[T_BINS:2 * T_BINS]
        line = {"loss": loss.sum() / count.sum(),
                "loss_per_t_bin": [float(a / b) if b else None for a, b in zip(loss, count, strict=True)],
                "gradient_norm": self.sums[-1] / steps}
        if self.sums[-2]:
            line["drift"] = self.sums[-3] / self.sums[-2]
        return line


def run_stage(stage: int, model: GenHancer, dataset, settings: Settings, place: Place, run: Path) -> None:
    """Train one stage to its last step, from its newest checkpoint if there is one."""
    steps, folder = (settings.stage1_steps, settings.stage2_steps)[stage - 1], run / f"stage{stage}"
    torch.manual_seed(seed_of(settings.seed, 3, stage))  # LoRA's A matrices, alike on every rank
    frozen_parts = {"clip": ckpt.fingerprint(model.visual), "vae": ckpt.fingerprint(model.vae)}
    if stage == 1:
        model.start_stage1()
    else:
        if not settings.end_to_end:
            load_stage1(model, frozen_parts, Path(settings.stage1_from or run))
        model.start_stage2("all" if settings.end_to_end else settings.stage2_trains, settings.tuning,
                           settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.lora_bias)
    model.train()
    groups = parameter_groups(model, settings, stage)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=settings.weight_decay)

    # -- resume ----------------------------------------------------------------------------------
    about = {"stage": stage, "architecture": model.architecture(), "frozen": frozen_parts,
             "settings": relevant(settings, stage)}
    start, window = 0, Window()
    if found := ckpt.checkpoints_in(folder):
        state = ckpt.read_state(found[-1])
        for what in ("architecture", "frozen", "settings"):
            if difference := ckpt.first_difference(state[what], about[what]):
                raise ValueError(f"{folder} was trained with another {what} ({difference}); choose another --name, or "
                                 "delete that folder to start afresh")
        ckpt.put(model, ckpt.read_trained(found[-1]), set(trained(model)), str(found[-1]))
        optimizer.load_state_dict(ckpt.read_optimizer(found[-1]))
        start, window = state["step"], Window(state["window"])
    if place.chief:
        trim_metrics(run / "metrics.jsonl", stage, start)
        count = sum(p.numel() for g in groups for p in g["params"])
        print(f"stage {stage}: {count / 1e6:.2f} M trainable parameters, step {start} of {steps}, "
              f"{steps * settings.batch:,} images to see")

    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if place.ranks > 1 else model
    micro = min(settings.micro_batch, settings.batch // place.ranks) or 1
    sampler = MicroBatches(len(dataset), settings.batch, micro, place.rank, place.ranks, settings.seed, start)
    stream = batches(dataset, sampler, settings.workers)
    bar = tqdm(total=steps, initial=start, desc=f"stage {stage}", unit="step", disable=not place.chief,
               dynamic_ncols=True)
    clock, seen, bad, unread = time.time(), 0, 0, set()

    # -- the loop --------------------------------------------------------------------------------
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, group["peak"], step, steps)
        logging = (step + 1) % settings.log_every == 0 or step + 1 == steps
        total, names = 0.0, []
        for piece in range(sampler.accumulation):
            batch = next(stream)
            images = batch["image"].to(place.device, non_blocking=True)
            frozen = {k.removeprefix("frozen/"): v.to(place.device, non_blocking=True)
                      for k, v in batch.items() if k.startswith("frozen/")}
            generators = [torch.Generator().manual_seed(seed_of(settings.seed, stage, p)) for p in batch["position"]]
            draws = model.draw(generators).to(place.device)
            torch.manual_seed(seed_of(settings.seed, 4, stage, step, piece, place.rank))  # LoRA's dropout
            last = piece == sampler.accumulation - 1
            quiet = wrapped.no_sync() if place.ranks > 1 and not last else contextlib.nullcontext()
            with quiet:
                with torch.autocast(place.device.type, torch.bfloat16, enabled=place.autocast):
                    result = wrapped(images, draws, frozen or None, logging)
                (result["loss"] / sampler.accumulation).backward()
            window.add(result, place)
            total += float(result["loss"].detach()) / sampler.accumulation
            names += batch["name"]
            for file in {f for files in batch["unreadable"] for f in files}:
                bad += 1
                if file not in unread:
                    unread.add(file)
                    tqdm.write(f"unreadable, replaced by the next: {file}")
        norm = torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], settings.clip_grad)
        if not (math.isfinite(total) and math.isfinite(float(norm))):
            last_good = ckpt.checkpoints_in(folder)
            raise ValueError(f"stage {stage}, step {step}: loss {total} and gradient norm {float(norm)} are not finite; "
                             f"images: {', '.join(names[:8])}…; last good checkpoint: "
                             f"{last_good[-1] if last_good else 'none'}; try a lower learning rate")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        window.sums[-1] += float(norm)
        seen += settings.batch
        if bad > max(20, 0.05 * seen / place.ranks):
            raise ValueError(f"{bad} of {seen // place.ranks} images could not be read: more than 5 %, the data is not sound")

        # -- traces ------------------------------------------------------------------------------
        done = step + 1
        speed = seen / (time.time() - clock)
        bar.set_postfix(loss=f"{total:.4f}", images_per_s=f"{speed:.0f}", refresh=False)
        bar.update()
        if logging:
            line = {"stage": stage, "step": done, "images": done * settings.batch, **window.line(
                (done - 1) % settings.log_every + 1), "lr": optimizer.param_groups[0]["lr"],
                "images_per_s": round(speed, 1), "memory_gb": round(memory_gb(place), 2), "unreadable": bad}
            window = Window()
            if place.chief:
                with open(run / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
        if place.chief and (done % settings.sample_every == 0 or done == steps):
            draw_samples(model, dataset, run / "samples" / f"stage{stage}_step{done:06d}.png", place)
        if done % settings.save_every == 0 or done == steps:
            if place.chief:
                ckpt.save_checkpoint(folder, done, trained(model), optimizer.state_dict(),
                                     {**about, "images": done * settings.batch, "window": window.sums.tolist()},
                                     settings.keep)
            if place.ranks > 1:
                dist.barrier()
    bar.close()


def load_stage1(model: GenHancer, frozen_parts: dict, run: Path) -> None:
    """Start from the newest stage 1 of `run`. Raises: ValueError where it does not fit, and why."""
    found = ckpt.checkpoints_in(run / "stage1")
    if not found:
        raise ValueError(f"stage 2 needs stage 1, and {run / 'stage1'} holds no checkpoint: run --stage 1 first, or name "
                         "a run that has one with --stage1_from")
    state = ckpt.read_state(found[-1])
    for what, mine in (("architecture", model.architecture()), ("frozen", frozen_parts)):
        if difference := ckpt.first_difference(state[what], mine):
            raise ValueError(f"stage 1 in {found[-1]} is of another {what}: {difference}")
    model.start_stage1()
    ckpt.put(model, ckpt.read_trained(found[-1]), set(trained(model)), str(found[-1]))


def relevant(settings: Settings, stage: int) -> dict:
    """The settings that decide the numbers of a stage."""
    other = "stage2_" if stage == 1 else "stage1_"
    only_stage2 = ("lora_", "tuning", "drift_weight", "end_to_end") if stage == 1 else ()
    free = FREE | ({f"stage{stage}_steps"} if settings.schedule == "constant" else set())
    return {k: v for k, v in asdict(settings).items() if k not in free and not k.startswith((other, *only_stage2))}


# ------------------------------------------------------------------------------------------------
# What a run leaves behind
# ------------------------------------------------------------------------------------------------
def draw_samples(model: GenHancer, dataset, path: Path, place: Place) -> None:
    """The sample grid. Run on one rank, on its own generators: it changes nothing of the run."""
    images = torch.stack([dataset[(i, 0)]["image"] for i in range(min(8, len(dataset)))]).to(place.device)
    model.eval()
    with torch.random.fork_rng():
        sample_grid(images, *model.reconstruct(images), path)
    model.train()


def trim_metrics(path: Path, stage: int, step: int) -> None:
    """Drop lines after the checkpoint that a run goes on from: they will be written again."""
    if path.is_file():
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if line["stage"] < stage or (line["stage"] == stage and line["step"] <= step)]
        ckpt.write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))


def memory_gb(place: Place) -> float:
    """Peak memory: of the GPU where there is one, else of this process."""
    if place.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux


def write_config(settings: Settings, place: Place, run: Path) -> None:
    """All settings, versions and the git commit, so that a run can be told from another."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    about = {"settings": asdict(settings), "versions": versions, "commit": git.stdout.strip() or None,
             "ranks": place.ranks, "device": str(place.device), "date": time.strftime("%Y-%m-%d")}
    ckpt.write_atomically(run / "config.json", json.dumps(about, indent=1))


def write_enhanced(clip, model: GenHancer, settings: Settings, run: Path) -> None:
    """The result: a folder that `open_clip.create_model_from_pretrained('local-dir:…')` loads."""
    folder = run / "enhanced"
    rest = {k: v for k, v in clip.state_dict().items() if not k.startswith("visual.")}
    tower = {f"visual.{k}": v for k, v in merged_state_dict(model.visual).items()}
    ckpt.save_tensors({**rest, **tower}, folder / "open_clip_model.safetensors")
    ckpt.write_atomically(folder / "open_clip_config.json", json.dumps(model.info.open_clip_config(), indent=1))
    if settings.tuning == "lora":
        # In a folder of its own: open_clip takes any .safetensors beside its config for the weights.
        ckpt.save_tensors(lora_state_dict(model.visual), folder / "lora" / "lora.safetensors")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {line["stage"]: line for line in lines}
    rows = [f"| {stage} | {line['step']} | {line['images']:,} | {line['loss']:.4f} | {line.get('drift', 0):.4f} |"
            for stage, line in sorted(last.items())]
    card = ["# CLIP enhanced by GenHancer", "", f"Base: `{settings.clip}`. The text tower is unchanged. Load with",
            f"`open_clip.create_model_from_pretrained('local-dir:{folder}')`.", "",
            "| stage | steps | images seen | loss | drift 1 − cos |", "|---|---|---|---|---|", *rows, "",
            "Benchmark figures: `python eval_mmvp.py` writes them beside this folder, in `eval/`.",
            "The licence of the base weights applies to these weights as well.", ""]
    ckpt.write_atomically(folder / "README.md", "\n".join(card))


def check(settings: Settings) -> None:
    """Numbers that would otherwise fail late, or silently do nothing. Raises: ValueError."""
    for name in ("batch", "micro_batch", "stage1_steps", "stage2_steps", "log_every", "sample_every", "save_every",
                 "keep", "toy_images", "blocks", "lora_rank"):
        if getattr(settings, name) < 1:
            raise ValueError(f"--{name} {getattr(settings, name)}: must be at least 1")
    if settings.end_to_end and settings.stage == "1":
        raise ValueError("--end_to_end has no stage 1: drop --stage 1")


def run_directory(settings: Settings) -> Path:
    return Path(settings.runs) / (settings.name or settings.preset)


def main() -> None:
    global run
    settings = parse_settings(Settings, PRESETS, __doc__.split("\n\n")[0], __doc__.split("\n\n")[1])
    run = run_directory(settings)
    check(settings)
    place = set_up(settings)
    try:
        clip, model = build_model(settings, place)
        run.mkdir(parents=True, exist_ok=True)
        if place.chief:
            write_config(settings, place, run)
        dataset = build_data(settings, model, place)
        if settings.stage in ("1", "both") and not settings.end_to_end and not settings.stage1_from:
            run_stage(1, model, dataset, settings, place, run)
        if settings.stage in ("2", "both"):
            run_stage(2, model, dataset, settings, place, run)
            if place.chief:
                write_enhanced(clip, model, settings, run)
                print(f"enhanced model: {run / 'enhanced'}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run = Path("runs")
    run_command(main, lambda: f"checkpoints so far are in {run}; the same command goes on from there")
