"""Every setting of a run, each with the sentence that explains it.

A field is a flag of train.py and its help is ``--help``. The defaults written at the fields are the
paper's full size (Sec. 5.1, App. B); a preset replaces some, and what is given by hand wins over
both. What the paper leaves open (both projectors, guidance, LoRA's biases, the crop) follows the
official code. A line ``# -- title`` begins a group of ``--help all``.

These notes stand at a field where they apply, so that whoever adds a setting decides them there:

    first=True          shown by the short ``--help``
    at_least, at_most, above    bounds of a number
    only="flow"         one denoiser alone knows this setting; without it, it is refused
    stage=2             it decides numbers of that stage only
    free=True           a resumed run may differ in it, since it changes no number of the run.
                        (`micro_batch` changes the rounding of sums, but may have to shrink after
                        running out of memory; what `clip`, `vae` and `data` hold is compared by
                        fingerprint and by count.)
    compared=bool       a resumed run may differ in it as long as bool(value) stays: a cache in
                        memory and one on the disk give the same numbers, none gives others
    flux_decides=True   with --flux the weights file decides, so the flag would do nothing
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from presets import BACKBONES, overrides
from util.cli import check_bounds, nearest, setting


# ------------------------------------------------------------------------------------------------
# The settings
# ------------------------------------------------------------------------------------------------
@dataclass(frozen=True, init=False)
class Settings:
    """One run. What is not given comes from the preset, so that no combination is half of one.

    Raises: ValueError naming a setting that is unknown, out of bounds, or the other denoiser's.
    """

    # -- which run
    preset: str = setting("toy", choices=("toy", *BACKBONES), free=True, first=True)
    """named set of defaults; what is given by hand wins"""
    stage: str = setting("both", choices=("1", "2", "both"), free=True, first=True)
    """which stage to run; 2 starts from stage 1 of the same run"""
    name: str = setting("", free=True, first=True)
    """run name, empty: preset (and denoiser); everything goes to RUNS/NAME"""
    runs: str = setting("runs", free=True, first=True)
    """folder of all runs"""
    stage1_from: str = setting("", free=True)
    """another run's folder whose stage 1 to start stage 2 from (for ablations); of several
    denoisers their folders in order, A,B"""
    # -- what is looked at
    # One crop feeds CLIP and the tokenizer alike, at CLIP's resolution. Nearly all of the picture
    # is kept, and it is never mirrored: "facing left" must stay true.
    data: str = setting("", free=True, first=True)
    """folder or list of images, or tar shards (a folder of them, 'DIR/*.tar',
    'DIR/{00000..00331}.tar'); empty: the toy world's own scenes"""
    toy_images: int = setting(16384, at_least=1, at_most=100_000_000)
    """number of toy scenes, where --data is empty"""
    crop_min: float = setting(0.9, above=0, at_most=1)
    """smallest area of the random crop, as a share of the picture"""
    crop_white: bool = setting(False)
    """cut off white letterbox bars, as img2dataset's border resizing leaves them: the denoiser
    would learn to draw bars, and CLIP to name the aspect ratio"""
    # 100 000 steps of 256 see each picture of CC3M 8.5 times, and each time the frozen parts say
    # the same of it. What a cache gives up are new crops: every epoch sees those of the first.
    cache: str = setting("", compared=bool)
    """what frozen tokenizer and tower make of each picture is computed once and kept: in a folder
    (`--cache DIR`, a shared one where there are several machines), with the images in 'memory'
    (small data sets), or empty: nowhere"""
    # fp16 is eight times finer than the bf16 in which a GPU takes these numbers up.
    cache_dtype: str = setting("fp16", choices=("fp16", "fp32"))
    """numbers of the cache: 52 kB an image of 224 px in fp16, 103 in fp32"""
    workers: int = setting(4, at_least=0, at_most=1024, free=True)
    """processes that decode images, per rank"""
    # -- the generation paradigm (Key Point #3)
    # Tab. 6: 31.9 continuous, 28.9 discrete on OpenAI's L/14; the other way round on SigLIP at
    # 224 px, 42.2 and 45.2.
    denoiser: str = setting("flow", choices=("flow", "perceiver", "flow+perceiver"), first=True)
    """continuous: 'flow' on VAE latents; discrete: masked 'perceiver' on VQ-GAN indices; or both,
    each with a stage 1 of its own, teaching together in stage 2"""
    # A nat of cross-entropy pulls harder than a unit of squared error.
    loss_weights: str = setting("", stage=2)
    """weights of several denoisers' losses in the sum, like 1,0.2"""
    # -- what others trained
    clip: str = setting("ViT-L-14-quickgelu:openai", free=True, first=True)
    """CLIP: NAME:TAG of open_clip, FILE.safetensors or FOLDER"""
    vae: str = setting("", only="flow", free=True, first=True)
    """VAE weights, FLUX.1's ae.safetensors for the full size"""
    flux: str = setting("", only="flow", free=True)
    """FLUX.1's published transformer as a frozen denoiser (19 + 38 blocks, Tab. 7): stage 1 trains
    the projectors alone"""
    vqgan: str = setting("", only="perceiver", free=True, first=True)
    """VQ-GAN weights, taming's f16 for the full size (safetensors or ckpt)"""
    posterior: bool = setting(True, only="flow")
    """sample the VAE posterior (official code); --no-posterior takes its mean"""
    # A VAE's activations grow large enough to hurt in bf16, and a VQ-GAN's rounding to codes would
    # be another one (benchmarks/tokenizer_dtype.md).
    tokenizer_dtype: str = setting("fp32", choices=("fp32", "bf16"))
    """run the VAE or VQ-GAN in float32, or in bf16 at half the memory traffic"""
    # -- the condition (Key Point #1)
    # Patch tokens make the denoiser's task easy and leave [CLS] nothing to learn.
    local_ratio: float = setting(0.0, at_least=0, at_most=100)
    """percentage of patch tokens beside [CLS] in the condition (Fig. 5)"""
    # -- the denoiser (Key Point #2.3; Tab. 5)
    # Width, heads and RoPE axes are FLUX.1's, only depth differs: so the row "pretrained FLUX" of
    # Tab. 7 is this network at depth 19 + 38.
    blocks: int = setting(2, only="flow", at_least=1, at_most=100, flux_decides=True)
    """m: m MM-DiT and 2m Single-DiT blocks (Tab. 5)"""
    layers: int = setting(6, only="perceiver", at_least=1, at_most=100)
    """Perceiver layers: 2, 4, 6 or 8 in Tab. 5"""
    learnt_latents: int = setting(0, only="perceiver", at_least=0, at_most=65536)
    """Perceiver latents: 0 is one per masked token, more is that many learnt ones"""
    width: int = setting(3072, at_least=1, at_most=65536, flux_decides=True)
    """width D of the denoiser"""
    heads: int = setting(24, at_least=1, at_most=4096, flux_decides=True)
    """attention heads"""
    rope_axes: str = setting("", only="flow", flux_decides=True)
    """RoPE widths of (unused, row, column), like 16,56,56; their sum is D / heads; empty: FLUX's
    proportions at that width"""
    vector_dim: int = setting(768, only="flow", at_least=1, at_most=8192, flux_decides=True)
    """width of the vector condition"""
    context_dim: int = setting(4096, only="flow", at_least=1, at_most=8192, flux_decides=True)
    """width of the context condition"""
    guidance: bool = setting(True, only="flow", flux_decides=True)
    """FLUX.1-dev's guidance embedding (a learnt bias here)"""
    initialisation: str = setting(
        "pytorch", choices=("pytorch", "adaln-zero"), only="flow", flux_decides=True
    )
    """start of the denoiser's weights"""
    # -- timesteps (Key Point #2.2; Tab. 4)
    # 31.9 with s = 1, 21.5 with uniform, on OpenAI's L/14
    time_distribution: str = setting(
        "logit-normal", choices=("logit-normal", "uniform"), only="flow"
    )
    """distribution of t"""
    time_scale: float = setting(1.0, only="flow", above=0, at_most=1000)
    """scale s of Eq. (6)"""
    # -- masks (Tab. S1)
    # 28.9 with 50-90 % and with 70 %, 25.9 with 90 %, on OpenAI's L/14
    mask_from: float = setting(0.5, only="perceiver", above=0, at_most=1)
    """smallest mask ratio"""
    mask_to: float = setting(0.9, only="perceiver", above=0, at_most=1)
    """largest mask ratio; the same as the smallest: a fixed one"""
    # -- stage 1 and 2 (Key Point #2.1)
    # 100 000 and 5 000 steps are those of the supplement on Fig. 1; Sec. 5.1 and App. B say one
    # epoch each. 100 000 steps of 256 images are 8.5 epochs of CC3M. Stage 2's rate is a tenth, its
    # steps a twentieth: the tower should move, a little.
    stage1_steps: int = setting(100_000, stage=1, at_least=1, at_most=1_000_000_000, first=True)
    """steps of stage 1"""
    stage1_lr: float = setting(1e-4, stage=1, at_least=0, at_most=1)
    """learning rate of stage 1"""
    stage2_steps: int = setting(5_000, stage=2, at_least=1, at_most=1_000_000_000, first=True)
    """steps of stage 2 (Fig. 1 i: 100 to 10 000)"""
    stage2_lr: float = setting(1e-5, stage=2, at_least=0, at_most=1)
    """learning rate of stage 2"""
    stage2_trains: str = setting("only", choices=("only", "all"), stage=2)
    """'only' the image tower, or 'all': denoiser and projectors too (Fig. S4)"""
    end_to_end: bool = setting(False, stage=2)
    """no stage 1: a fresh denoiser and the tower learn together (Fig. 6)"""
    tuning: str = setting("lora", choices=("lora", "direct"), stage=2)
    """how the tower learns (Fig. S2)"""
    lora_rank: int = setting(16, stage=2, at_least=1, at_most=65536)
    """LoRA rank r"""
    lora_alpha: float = setting(16.0, stage=2, above=0, at_most=1_000_000)
    """LoRA α; the update is scaled by α / r"""
    lora_dropout: float = setting(0.1, stage=2, at_least=0, at_most=0.99)
    """dropout on the adapters' input"""
    lora_bias: str = setting("lora_only", choices=("lora_only", "none"), stage=2)
    """train the biases of adapted layers, or none"""
    lora_pool: bool = setting(False, stage=2)
    """adapters on the MLP of SigLIP's attention pool too (8.87 M parameters instead of 8.70)"""
    drift_weight: float = setting(0.0, stage=2, at_least=0, at_most=1_000_000)
    """λ of the drift term D(v, v0) = 1 − cos in Eq. (5); 0 is the paper"""
    # -- the optimiser (App. B)
    # 8 GPUs × 16 images × 2 accumulation steps = 256
    batch: int = setting(256, at_least=1, at_most=10_000_000, first=True)
    """global batch, over all ranks and accumulation steps"""
    micro_batch: int = setting(16, at_least=1, at_most=10_000_000, free=True, first=True)
    """images per rank and forward pass; accumulation follows from it"""
    schedule: str = setting("constant", choices=("constant", "cosine"))
    """learning rate over a stage"""
    warmup: int = setting(0, at_least=0, at_most=1_000_000_000)
    """steps of linear warm-up"""
    weight_decay: float = setting(0.01, at_least=0, at_most=10)
    """AdamW's weight decay"""
    clip_grad: float = setting(1.0, above=0, at_most=1_000_000_000)
    """largest gradient norm"""
    precision: str = setting("auto", choices=("auto", "fp32", "bf16"))
    """autocast; auto: bf16 on GPUs that have it, float32 on the CPU"""
    seed: int = setting(0, at_least=0, at_most=2**63 - 1, first=True)
    """seed of everything"""
    # -- memory and speed
    shard: bool = setting(False, free=True)
    """share weights, gradients and moments of what learns out among the ranks (FSDP2)"""
    frozen_dtype: str = setting("auto", choices=("auto", "fp32", "bf16"), free=True)
    """keep the matrices of frozen CLIP and denoiser as bf16, which autocast would make of them at
    each pass: the same numbers; auto: on a GPU under bf16"""
    compile: bool = setting(False, free=True)
    """compile the blocks of tower and denoiser: a minute at the start, then faster steps; another
    rounding"""
    # -- before the run
    plan: bool = setting(False, free=True, first=True)
    """print parameters, memory and FLOPs of the run instead of starting it"""
    gpus: int = setting(8, at_least=1, at_most=1_000_000, free=True)
    """GPUs that --plan counts with (under torchrun: as many as it starts)"""
    # -- traces
    # Which checkpoint counts is decided before the run: the last. Picking the best of many on the
    # benchmark would report the luck of the draw.
    log_every: int = setting(50, at_least=1, at_most=1_000_000_000, free=True)
    """steps per line of metrics.jsonl"""
    sample_every: int = setting(5_000, at_least=1, at_most=1_000_000_000, free=True)
    """steps between sample grids"""
    # A checkpoint of the full stage 1 is 16 GB, one of stage 2 less than a hundredth.
    save_every: int = setting(10_000, at_least=1, at_most=1_000_000_000, free=True)
    """steps between checkpoints"""
    save_minutes: float = setting(20.0, above=0, at_most=1_000_000, free=True)
    """minutes after which the next log line is followed by a checkpoint too"""
    keep: int = setting(2, at_least=1, at_most=1_000_000, free=True)
    """checkpoints to keep per stage"""
    tensorboard: bool = setting(False, free=True)
    """mirror metrics.jsonl into RUNS/NAME/tensorboard (pip install tensorboard)"""

    def __init__(self, preset: str = "toy", **given):
        if unknown := next((name for name in given if name not in names()), None):
            raise ValueError(f"no setting {unknown!r}{nearest(unknown, names())}")
        given = {"preset": preset, **given}
        for name, value in {**usual(preset, given.get("denoiser", "flow")), **given}.items():
            object.__setattr__(self, name, value)  # frozen for everybody else
        check(self)
        if len(given) < len(names()):  # by hand: not a whole run's settings, read back
            check_idle(self, given)
            check_heard(self, given)

    @classmethod
    def of(cls, preset: str = "toy", **changes) -> "Settings":
        """``Settings.of("toy", denoiser="perceiver", batch=8)``: a preset, and what differs."""
        return cls(preset, **changes)

    @property
    def denoisers(self) -> list[str]:
        """Those that teach in stage 2."""
        return self.denoiser.split("+")

    def weights(self) -> list[float]:
        """`loss_weights` as numbers, one a denoiser. Raises: ValueError where they are none."""
        given = self.loss_weights.split(",") if self.loss_weights else ["1"] * len(self.denoisers)
        try:
            found = [float(w) for w in given]
        except ValueError:
            found = []
        wrong = len(found) != len(self.denoisers) or not all(0 <= w <= 10**6 for w in found)
        if wrong or not any(found):
            count = len(self.denoisers)
            raise ValueError(
                f"--loss_weights {self.loss_weights!r}: expected {count} numbers from 0 to 10⁶, "
                f"not all 0, like {','.join(['1', '0.2'][:count])}, one for each of --denoiser "
                f"{self.denoiser}"
            )
        return found

    def steps(self, stage: int) -> int:
        """Optimiser steps of a stage."""
        return self.stage1_steps if stage == 1 else self.stage2_steps

    def micro(self, ranks: int) -> int:
        """Images per rank and forward pass: no more than a rank's share of the global batch."""
        return min(self.micro_batch, self.batch // ranks) or 1

    def axes(self) -> tuple[int, ...] | None:
        """`rope_axes` as numbers; None: the denoiser's own choice.
        Raises: ValueError where they are none."""
        try:
            return tuple(int(a) for a in self.rope_axes.split(",")) if self.rope_axes else None
        except ValueError:
            raise ValueError(
                f"--rope_axes {self.rope_axes!r}: expected three numbers like 16,56,56"
            ) from None


# ------------------------------------------------------------------------------------------------
# Presets
# ------------------------------------------------------------------------------------------------
def usual(preset: str, denoiser: str) -> dict:
    """Every setting of a preset with a denoiser: what a run has that gives nothing else."""
    chosen = {field.name: field.default for field in fields(Settings)}
    return chosen | {"preset": preset, "denoiser": denoiser} | overrides(preset, denoiser)


# ------------------------------------------------------------------------------------------------
# What they mean together
# ------------------------------------------------------------------------------------------------
def names() -> list[str]:
    """Of all settings."""
    return [field.name for field in fields(Settings)]


def notes_of(name: str) -> dict:
    """What stands at a field beside its default: choices, `only`, `stage`, `free`, …"""
    return Settings.__dataclass_fields__[name].metadata


def check(settings: Settings) -> None:
    """Settings that would fail late, or silently do nothing. Raises: ValueError naming the flag."""
    check_bounds(settings)
    if settings.name in (".", "..") or "/" in settings.name or "\\" in settings.name:
        raise ValueError(f"--name {settings.name}: a plain name, no path; the folder is --runs")
    if settings.end_to_end and settings.stage == "1":
        raise ValueError("--end_to_end has no stage 1: drop --stage 1")
    if settings.stage1_from and (settings.end_to_end or settings.stage == "1"):
        other = "--end_to_end" if settings.end_to_end else "--stage 1"
        raise ValueError(f"--stage1_from is where stage 2 starts from: drop it, or drop {other}")
    if settings.cache.lower() in ("none", "no", "off", "false", "on", "true", "disk"):
        raise ValueError(
            f"--cache {settings.cache}: give a folder (of that name: ./{settings.cache}), "
            "'memory', or '' for none"
        )
    usually, alone = usual(settings.preset, settings.denoiser), len(settings.denoisers) == 1
    for name in names():
        notes = notes_of(name)
        owner = notes.get("only", settings.denoisers[0])
        if getattr(settings, name) == usually[name]:
            continue
        if owner not in settings.denoisers:
            what = f"--{name} is of the {owner} denoiser and would do nothing here"
            raise ValueError(f"{what}: drop it, or add --denoiser {owner}")
        # A Perceiver beside it may still be told its width.
        if settings.flux and notes.get("flux_decides") and (alone or "only" in notes):
            raise ValueError(
                f"--{name} would do nothing beside --flux, whose file decides: drop it"
            )
    settings.weights()
    for part in parts(settings):
        check_shape(part)
    if settings.stage1_from:
        stage1_runs(settings)


def check_shape(settings: Settings) -> None:
    """Of the denoiser. It would say so itself, but only once CLIP and the tokenizer are loaded.
    Raises: ValueError naming the flag."""
    width, heads = settings.width, settings.heads
    if settings.denoiser == "perceiver":
        if settings.mask_from > settings.mask_to:
            raise ValueError(
                f"--mask_from {settings.mask_from} --mask_to {settings.mask_to}: a mask ratio goes "
                "from ≤ to"
            )
        if width % heads or width % 4:
            raise ValueError(f"--width {width} must be a multiple of 4 and of --heads {heads}")
    elif not settings.flux:
        axes = settings.axes()
        sums = sum(axes) if axes else width // heads
        even = len(axes) == 3 and not any(a % 2 or a < 0 for a in axes) if axes else sums % 2 == 0
        if not even:
            raise ValueError(f"--rope_axes {settings.rope_axes or sums}: give three even numbers")
        if width != heads * sums:
            what = f"the sum {sums} of --rope_axes" if axes else "an even number"
            raise ValueError(f"--width {width} must be heads {heads} × {what}")


def relevant(settings: Settings, stage: int) -> dict:
    """The settings that decide the numbers of a stage: what a checkpoint must agree on."""
    chosen = {}
    for name, value in of_stage(settings, stage).items():
        notes = notes_of(name)
        known = notes.get("only", settings.denoisers[0]) in settings.denoisers
        # With a constant rate a run may be prolonged; under a cosine, the length bends the curve.
        length = name == f"stage{stage}_steps" and settings.schedule == "constant"
        if known and not length and not notes.get("free"):
            chosen[name] = notes.get("compared", lambda whole: whole)(value)
    return chosen


def parts(settings: Settings) -> list[Settings]:
    """Every denoiser's own settings: those of its stage 1, and of its shape. One alone is the run
    itself. Of several, each has a run of its own, RUNS/NAME/DENOISER, with its own preset's numbers
    but for what was given by hand. (A value that repeats the joint preset's is not told from none
    given: each keeps its own.)"""
    if len(settings.denoisers) == 1:
        return [settings]
    usually, found = usual(settings.preset, settings.denoiser), []
    for name in settings.denoisers:
        # A setting of the other denoiser, or of stage 2, means nothing there.
        given = {
            key: value
            for key, value in asdict(settings).items()
            if value != usually[key]
            and notes_of(key).get("only", name) == name
            and notes_of(key).get("stage") != 2
            and not (name == "flow" and settings.flux and notes_of(key).get("flux_decides"))
        }
        where = {"runs": str(run_directory(settings)), "name": name, "stage": "both"}
        given |= {**where, "denoiser": name, "stage1_from": "", "plan": False}
        found.append(Settings(**{**usual(settings.preset, name), **given}))
    return found


def check_idle(settings: Settings, given: dict) -> None:
    """What is given by hand must do something. (A run that is read back may hold such a setting.)
    Raises: ValueError naming the flag."""
    usually, lora = usual(settings.preset, settings.denoiser), settings.tuning == "direct"
    scenes = settings.preset == "toy" and not settings.data
    idle = {
        "cache_dtype": (not settings.cache, "without --cache"),
        "loss_weights": (len(settings.denoisers) == 1, "with one denoiser"),
        "time_scale": (settings.time_distribution == "uniform", "with uniform times"),
        **{name: (lora, "with --tuning direct") for name in names() if name.startswith("lora_")},
        **dict.fromkeys(("crop_min", "crop_white"), (scenes, "without --data")),
    }
    for name, (useless, where) in idle.items():
        if useless and given.get(name, usually[name]) != usually[name]:
            raise ValueError(f"--{name} would do nothing {where}: drop it")


def check_heard(settings: Settings, given: dict) -> None:
    """What is given by hand goes to every denoiser that knows it, and `parts` tells it by its
    difference from the preset. Raises: ValueError for a value that is the preset's own, and yet not
    that of each denoiser alone."""
    usually = usual(settings.preset, settings.denoiser)
    decided = {"denoiser", "stage", "runs", "name", "stage1_from", "plan"}  # by `parts`
    for part in parts(settings):
        for name, value in given.items():
            known = notes_of(name).get("only", part.denoiser) == part.denoiser
            mine = notes_of(name).get("stage") != 2 and name not in decided
            if known and mine and value == usually[name] and getattr(part, name) != value:
                raise ValueError(
                    f"--{name} {value} is what the preset has for stage 2, and its "
                    f"{part.denoiser} alone has {getattr(part, name)}: drop it, or train "
                    f"--denoiser {part.denoiser} --stage 1 by itself and name it in --stage1_from"
                )


def stage1_runs(settings: Settings) -> list[Path]:
    """Where each denoiser's stage 1 lies or will lie. Raises: ValueError where --stage1_from names
    another number of runs."""
    if not settings.stage1_from:
        return [run_directory(part) for part in parts(settings)]
    several = len(settings.denoisers) > 1
    runs = settings.stage1_from.split(",") if several else [settings.stage1_from]
    if len(runs) != len(settings.denoisers):
        raise ValueError(
            f"--stage1_from {settings.stage1_from}: expected one run for each of --denoiser "
            f"{settings.denoiser}, with a comma between them"
        )
    return [Path(run.strip()) for run in runs]


def of_stage(settings: Settings, stage: int) -> dict:
    """All settings but those of the other stage. (End to end, the denoiser learns in stage 2 at the
    rate that stage 1 would have given it.)"""
    chosen = asdict(settings)
    for name in list(chosen):
        shared = name == "stage1_lr" and settings.end_to_end
        if notes_of(name).get("stage", stage) != stage and not shared:
            del chosen[name]
    return chosen


# ------------------------------------------------------------------------------------------------
# Where a run lies, and what it was started with
# ------------------------------------------------------------------------------------------------
def run_directory(settings: Settings) -> Path:
    """RUNS/NAME; by default a run is called after its preset and denoiser."""
    suffix = "" if settings.denoiser == "flow" else f"-{settings.denoiser}"
    return Path(settings.runs) / (settings.name or settings.preset + suffix)


def settings_of_run(run: str | Path) -> Settings:
    """What a run was started with: each stage's own settings, stage 2's where both know one.

    Raises: FileNotFoundError where `run` is none; ValueError where its config.json is of another
        version.
    """
    file, given = Path(run) / "config.json", {}
    if not file.is_file():
        raise FileNotFoundError(f"{run} is no run: it has no config.json")
    try:
        stages = json.loads(file.read_text())["stages"]
        for stage in sorted(stages):
            given |= stages[stage]["settings"]
        # One stage by itself is what the command was asked for, not what the run is.
        which = given.get("preset", "toy"), given.get("denoiser", "flow")
        whole = {**usual(*which), **given}
        return Settings(**{**whole, "stage": "both", "plan": False})
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is of another version of this project ({error})") from None
