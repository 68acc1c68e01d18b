"""Every setting of a run, each with the sentence that explains it.

A field is a flag of train.py and its help is ``--help``. The defaults are the paper's full size
(Sec. 5.1, App. B); a preset replaces some, and a flag given by hand wins over both. What the paper
leaves open (both projectors, guidance, LoRA's biases, the crop) follows the official code.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from cli import setting

TOY_DIR = Path(__file__).resolve().parent / "toy"


# ------------------------------------------------------------------------------------------------
# The settings
# ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Settings:
    """One run, grouped by topic."""

    preset: str = setting("toy", "named set of defaults; flags given by hand win")
    stage: str = setting(
        "both", "which stage to run; 2 starts from stage 1 of the same run", ("1", "2", "both")
    )
    name: str = setting(
        "", "run name, default: preset (and denoiser); everything goes to RUNS/NAME"
    )
    runs: str = setting("runs", "folder of all runs")
    stage1_from: str = setting(
        "", "another run directory whose stage 1 to start stage 2 from (for ablations)"
    )
    # what is looked at
    data: str = setting(
        "",
        "folder or list of images, or tar shards (a folder of them, 'DIR/*.tar', "
        "'DIR/{00000..00331}.tar'); empty: the toy world's own scenes",
    )
    toy_images: int = setting(16384, "number of toy scenes, where --data is empty")
    crop_min: float = setting(0.9, "smallest area of the random crop, as a share of the picture")
    crop_white: bool = setting(
        False,
        "cut off white letterbox bars, as img2dataset's border resizing leaves them: the denoiser "
        "would learn to draw bars, and CLIP to name the aspect ratio",
    )
    cache: bool = setting(False, "hold images and frozen features in memory (small data sets only)")
    workers: int = setting(4, "processes that decode images, per rank")
    # the generation paradigm (Key Point #3; Tab. 6)
    denoiser: str = setting(
        "flow",
        "continuous: 'flow' on VAE latents; discrete: masked 'perceiver' on VQ-GAN indices",
        ("flow", "perceiver"),
    )
    # the frozen parts
    clip: str = setting(
        "ViT-L-14-quickgelu:openai", "CLIP: NAME:TAG of open_clip, FILE.safetensors or FOLDER"
    )
    vae: str = setting("", "VAE weights, FLUX.1's ae.safetensors for the full size")
    flux: str = setting(
        "",
        "FLUX.1's published transformer as a frozen denoiser (19 + 38 blocks, Tab. 7): stage 1 "
        "trains the projectors alone",
    )
    vqgan: str = setting("", "VQ-GAN weights, taming's f16 for the full size (safetensors or ckpt)")
    posterior: bool = setting(
        True, "sample the VAE posterior (official code); --no-posterior takes its mean"
    )
    vae_fp32: bool = setting(True, "run the VAE or VQ-GAN in float32 even under bf16")
    # condition (Key Point #1)
    local_ratio: float = setting(
        0.0, "percent of patch tokens beside [CLS] in the condition (Fig. 5)"
    )
    # denoiser (Key Point #2.3; Tab. 5). Width, heads and RoPE axes are FLUX.1's, only depth
    # differs: so the row "pretrained FLUX" of Tab. 7 is this network at depth 19 + 38.
    blocks: int = setting(2, "m: m MM-DiT and 2m Single-DiT blocks (Tab. 5)")
    layers: int = setting(6, "Perceiver layers: 2, 4, 6 or 8 in Tab. 5")
    learnt_latents: int = setting(
        0, "Perceiver latents: 0 is one per masked token, more is that many learnt ones"
    )
    width: int = setting(3072, "width D of the denoiser")
    heads: int = setting(24, "attention heads")
    rope_axes: str = setting(
        "16,56,56", "RoPE widths of (unused, row, column); their sum is D / heads"
    )
    vector_dim: int = setting(768, "width of the vector condition")
    context_dim: int = setting(4096, "width of the context condition")
    guidance: bool = setting(True, "FLUX.1-dev's guidance embedding (a learnt bias here)")
    initialisation: str = setting(
        "pytorch", "start of the denoiser's weights", ("pytorch", "adaln-zero")
    )
    # timesteps (Key Point #2.2; Tab. 4): 31.9 with s = 1, 21.5 with uniform, on OpenAI's L/14
    time_distribution: str = setting(
        "logit-normal", "distribution of t", ("logit-normal", "uniform")
    )
    time_scale: float = setting(1.0, "scale s of Eq. (6)")
    # masks (Tab. S1): 28.9 with 50-90 % and with 70 %, 25.9 with 90 %, on OpenAI's L/14
    mask_from: float = setting(0.5, "smallest mask ratio")
    mask_to: float = setting(0.9, "largest mask ratio; the same as the smallest: a fixed one")
    # stage 1 and 2 (Key Point #2.1). 100 000 steps of 256 images are 8.5 epochs of CC3M.
    stage1_steps: int = setting(100_000, "steps of stage 1")
    stage1_lr: float = setting(1e-4, "learning rate of stage 1")
    stage2_steps: int = setting(5_000, "steps of stage 2 (Fig. 1 i: 100 to 10 000)")
    stage2_lr: float = setting(1e-5, "learning rate of stage 2")
    stage2_trains: str = setting(
        "only",
        "'only' the image tower, or 'all': denoiser and projectors too (Fig. S4)",
        ("only", "all"),
    )
    end_to_end: bool = setting(
        False, "no stage 1: a fresh denoiser and the tower learn together (Fig. 6)"
    )
    tuning: str = setting("lora", "how the tower learns (Fig. S2)", ("lora", "direct"))
    lora_rank: int = setting(16, "LoRA rank r")
    lora_alpha: float = setting(16.0, "LoRA α; the update is scaled by α / r")
    lora_dropout: float = setting(0.1, "dropout on the adapters' input")
    lora_bias: str = setting(
        "lora_only", "train the biases of adapted layers, or none", ("lora_only", "none")
    )
    lora_pool: bool = setting(
        False,
        "adapters on the MLP of SigLIP's attention pool too (8.87 M parameters instead of 8.70)",
    )
    drift_weight: float = setting(
        0.0, "λ of the drift term D(v, v0) = 1 − cos in Eq. (5); 0 is the paper"
    )
    # optimiser (App. B: 8 GPUs × 16 images × 2 accumulation steps = 256)
    batch: int = setting(256, "global batch, over all ranks and accumulation steps")
    micro_batch: int = setting(16, "images per rank and forward pass; accumulation follows from it")
    schedule: str = setting("constant", "learning rate over a stage", ("constant", "cosine"))
    warmup: int = setting(0, "steps of linear warm-up")
    weight_decay: float = setting(0.01, "AdamW's weight decay")
    clip_grad: float = setting(1.0, "largest gradient norm")
    zero: bool = setting(
        False, "share AdamW's moments out among the ranks (ZeRO stage 1); the same numbers"
    )
    precision: str = setting(
        "auto",
        "autocast; auto: bf16 on GPUs that have it, float32 on the CPU",
        ("auto", "fp32", "bf16"),
    )
    seed: int = setting(0, "seed of everything")
    # before the run
    plan: bool = setting(
        False, "print parameters, memory and FLOPs of the run instead of starting it"
    )
    gpus: int = setting(8, "GPUs that --plan counts with (under torchrun: as many as it starts)")
    # leaving traces. Which checkpoint counts is decided before the run: the last. Picking the best
    # of many on the benchmark would report the luck of the draw.
    log_every: int = setting(50, "steps per line of metrics.jsonl")
    sample_every: int = setting(5_000, "steps between sample grids")
    save_every: int = setting(1_000, "steps between checkpoints")
    keep: int = setting(2, "checkpoints to keep per stage")


# The toy: the same code at a size that two CPU cores train in minutes. Where it leaves the paper's
# settings, the reason is its few steps (hundreds, not 100 000 + 5 000): small batches for more
# steps, higher rates with a cosine to end quietly, AdaLN-zero for a quick start, and a light drift
# term (λ of Eq. 5) for what the paper's 100 times smaller rate does at full size: staying near the
# original.
TOY = {
    "clip": str(TOY_DIR / "clip.safetensors"),
    "vae": str(TOY_DIR / "vae.safetensors"),
    "toy_images": 12_288,
    "cache": True,
    "workers": 0,
    "crop_min": 1.0,
    # one MM-DiT and two Single-DiT blocks, 192 wide: 3 M parameters on 16 tokens
    "blocks": 1,
    "width": 192,
    "heads": 6,
    "rope_axes": "8,12,12",
    "vector_dim": 64,
    "context_dim": 64,
    "guidance": False,
    "initialisation": "adaln-zero",
    "batch": 64,
    "micro_batch": 64,
    "schedule": "cosine",
    "warmup": 50,
    "stage1_steps": 1400,
    "stage1_lr": 2e-3,
    "stage2_steps": 400,
    "stage2_lr": 7e-4,
    "drift_weight": 0.02,
    "log_every": 20,
    "sample_every": 700,
    "save_every": 100,
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
# What a preset means with the discrete denoiser.
PERCEIVER = {"width": 1024, "heads": 16}
# Its toy: 64 tokens where the flow's has 16, so it is narrower (1.3 M parameters) and takes smaller
# batches. A nat of cross-entropy weighs more than a unit of squared error, and so must the drift.
PERCEIVER_TOY = {
    "vqgan": str(TOY_DIR / "vqgan.safetensors"),
    "width": 128,
    "heads": 4,
    "layers": 4,
    "batch": 16,
    "micro_batch": 16,
    "stage1_steps": 3000,
    "stage1_lr": 1.5e-3,
    "stage2_steps": 900,
    "stage2_lr": 9e-4,
    "drift_weight": 0.1,
}
# Settings that only one of the two denoisers knows.
ONLY = {
    "flow": "vae flux posterior blocks rope_axes vector_dim context_dim guidance initialisation "
    "time_distribution time_scale",
    "perceiver": "vqgan layers learnt_latents mask_from mask_to",
}


def preset_of(given: dict) -> dict:
    """The defaults that flags given by hand stand on: a preset, as its denoiser needs it."""
    name, denoiser = given.get("preset", "toy"), given.get("denoiser", "flow")
    chosen = {"preset": name, **PRESETS[name]}
    if denoiser == "perceiver":
        chosen |= PERCEIVER | (PERCEIVER_TOY if name == "toy" else {})
    return chosen


# A resumed run may differ in these. They change no number of it, but for `micro_batch`, which
# changes the rounding of sums and may have to shrink after running out of memory. What `clip`,
# `vae` and `data` hold is compared by fingerprint and by count.
FREE = set(
    "preset stage name runs stage1_from data clip vae vqgan flux workers micro_batch zero plan "
    "gpus log_every sample_every save_every keep".split()
)


def check(settings: Settings) -> None:
    """Numbers that would otherwise fail late, or silently do nothing. Raises: ValueError."""
    for name in (
        "batch micro_batch stage1_steps stage2_steps log_every sample_every save_every keep "
        "toy_images blocks layers lora_rank gpus"
    ).split():
        if getattr(settings, name) < 1:
            raise ValueError(f"--{name} {getattr(settings, name)}: must be at least 1")
    if settings.end_to_end and settings.stage == "1":
        raise ValueError("--end_to_end has no stage 1: drop --stage 1")
    if settings.learnt_latents < 0:
        raise ValueError(f"--learnt_latents {settings.learnt_latents}: 0, or how many")
    other = "perceiver" if settings.denoiser == "flow" else "flow"
    usual = Settings(**preset_of({"preset": settings.preset, "denoiser": settings.denoiser}))
    for name in ONLY[other].split():
        if getattr(settings, name) != getattr(usual, name):
            raise ValueError(
                f"--{name} is of the {other} denoiser and would do nothing here: drop it, or add "
                f"--denoiser {other}"
            )

    for (
        name
    ) in "blocks width heads rope_axes vector_dim context_dim guidance initialisation".split():
        if settings.flux and getattr(settings, name) != getattr(usual, name):
            raise ValueError(
                f"--{name} would do nothing beside --flux, whose file decides: drop it"
            )


def relevant(settings: Settings, stage: int) -> dict:
    """The settings that decide the numbers of a stage."""
    other = "stage2_" if stage == 1 else "stage1_"
    only_stage2 = ("lora_", "tuning", "drift_weight", "end_to_end") if stage == 1 else ()
    unused = set(ONLY["perceiver" if settings.denoiser == "flow" else "flow"].split())
    free = FREE | unused | ({f"stage{stage}_steps"} if settings.schedule == "constant" else set())
    return {
        k: v
        for k, v in asdict(settings).items()
        if k not in free and not k.startswith((other, *only_stage2))
    }


def run_directory(settings: Settings) -> Path:
    suffix = "" if settings.denoiser == "flow" else f"-{settings.denoiser}"
    return Path(settings.runs) / (settings.name or settings.preset + suffix)
