"""From settings to a model, its data and optimiser: who is built from what, and from which seed.

The parts know nothing of settings and of each other; this file knows both. On every rank it builds
the same, so that a run can start without sending weights around.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from data import CachedPictures, FileList, Pictures, as_floats, find_images
from evaluation.reconstruction import kept, psnr
from flow_denoiser import FlowDenoiser, FlowDenoiserConfig
from genhancer import GenHancer
from paradigms import Continuous, Discrete, Paradigm
from perceiver_denoiser import PerceiverDenoiser, PerceiverDenoiserConfig
from presets import TOY_DIR
from pretrained.autoencoders import VAE, VQGAN, VQGANConfig, load_vae, load_vqgan
from pretrained.backbones import ClipInfo, describe_clip, load_clip
from pretrained.flux import load_flux
from settings import Settings, parts, settings_of_run, stage1_runs
from toy.world import IMAGE_SIZE as TOY_SIZE
from toy.world import ToyScenes
from training import checkpoints as ckpt
from training import feature_cache, speed
from training.preflight import newest_in, read_state, require_same, verify
from training.process import Process, start_process, union_over_ranks, wait_for_slowest
from training.shards import ShardIndex, is_shard_pattern
from util.files import fingerprint

PURPOSES = (
    "denoiser",  # the denoiser's and projectors' first weights
    "toy scenes",
    "LoRA",  # its A matrices, by stage
    "dropout",  # LoRA's, by stage, step, piece and rank
    "order",  # of the images, by stage
    "masked count",  # M, common to all images of a step: by stage and step
    "image",  # noise, t and mask of one image: by stage and position
)


def seed_of(purpose: str, *numbers: int) -> int:
    """A 62-bit seed that mixes all numbers well: near seeds give unrelated streams.

    All randomness of a run but the crops (data.py: seed, epoch, picture) comes from here, so a
    stream belongs to one purpose and to no other.
    The count of numbers goes in with them, because NumPy pads with zeros: without it, (7, 1) and
    (7, 1, 0) would be one seed. Raises: ValueError for a purpose that is not in `PURPOSES`.
    """
    words = (PURPOSES.index(purpose), len(numbers), *numbers)
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 2)


def build_model(
    settings: Settings, process: Process | None = None
) -> tuple[torch.nn.Module, GenHancer]:
    """CLIP and the module around it. Initialised alike on every rank: same seed, same order.

    The text tower is needed only when the result is written, and stays on the CPU.
    """
    process = process or start_process(settings.precision)
    clip, info = load_clip(settings.clip)
    tokenizers = [
        load_vae(part.vae) if part.denoiser == "flow" else load_vqgan(part.vqgan)
        for part in parts(settings)
    ]
    # Whatever loading drew from the global generator, the denoiser starts from this seed.
    torch.manual_seed(seed_of("denoiser", settings.seed))
    half = torch.bfloat16 if process.autocast else torch.float32
    paradigms = [
        paradigm_of(part, info, tokenizer, load_flux(part.flux, half) if part.flux else None)
        for part, tokenizer in zip(parts(settings), tokenizers, strict=True)
    ]
    model = join(settings, clip, info, paradigms).to(process.device)
    speed.tune_tokenizer(model, settings, process)
    return clip, model


def paradigm_of(
    settings: Settings, info: ClipInfo, tokenizer: VAE | VQGAN, denoiser: FlowDenoiser | None = None
) -> Paradigm:
    """One denoiser's settings as its paradigm; with a fresh denoiser where none is given."""
    if settings.denoiser == "flow":  # FLUX's VAE and a small FLUX-like transformer (Fig. 3 b)
        return Continuous(
            tokenizer,
            denoiser or FlowDenoiser(flow_config(settings, tokenizer.config.latent_channels)),
            info.image_size,
            times=(settings.time_distribution, settings.time_scale),
            sample_posterior=settings.posterior,
        )
    return Discrete(  # a VQ-GAN and a small Perceiver (Fig. 3 c)
        tokenizer,
        PerceiverDenoiser(perceiver_config(settings, info.image_size, tokenizer.config)),
        info.image_size,
        mask_range=(settings.mask_from, settings.mask_to),
    )


def join(
    settings: Settings, clip: torch.nn.Module, info: ClipInfo, paradigms: list[Paradigm]
) -> GenHancer:
    """The loaded parts as one module."""
    return GenHancer(
        clip,
        info,
        paradigms,
        loss_weights=settings.weights(),
        local_ratio=settings.local_ratio,
        drift_weight=settings.drift_weight,
    )


def flow_config(settings: Settings, latent_channels: int) -> FlowDenoiserConfig:
    """The shape of the continuous denoiser that these settings ask for."""
    return FlowDenoiserConfig(
        latent_channels=latent_channels,
        width=settings.width,
        heads=settings.heads,
        axes=settings.axes(),
        double_blocks=settings.blocks,
        single_blocks=2 * settings.blocks,
        vector_dim=settings.vector_dim,
        context_dim=settings.context_dim,
        guidance=settings.guidance,
        initialisation=settings.initialisation,
    )


def perceiver_config(
    settings: Settings, image_size: int, vqgan: VQGANConfig
) -> PerceiverDenoiserConfig:
    """The shape of the discrete denoiser that these settings ask for."""
    return PerceiverDenoiserConfig(
        codes=vqgan.codes,
        code_width=vqgan.code_width,
        side=image_size // vqgan.downsampling,
        width=settings.width,
        heads=settings.heads,
        layers=settings.layers,
        learnt_latents=settings.learnt_latents,
    )


def load_run(run: str | Path, stage: int = 2) -> tuple[torch.nn.Module, GenHancer]:
    """CLIP and the module around it as the newest checkpoint of a stage left them, in eval mode.

    After stage 2 they share one adapted tower; what it was before is `model.original`.

    Raises: FileNotFoundError where `run` is none, or has no checkpoint of that stage; ValueError
        for a stage that is neither 1 nor 2, or stage 1 of a run end to end.
    """
    run, settings = Path(run), settings_of_run(run)
    if stage not in (1, 2) or (stage == 1 and settings.end_to_end):
        raise ValueError(f"run {run}: stage {stage!r}; there is {'2' if stage == 1 else '1 or 2'}")
    clip, model = build_model(settings)
    if not settings.end_to_end:
        for name, folder in zip(model.paradigms, stage1_runs(settings), strict=True):
            # A moved run's config names folders where it was written.
            own = run / name if len(model.paradigms) > 1 else run
            here = own if not settings.stage1_from or stage == 1 else folder
            model.start_stage1(name)
            put_back(model, here, 1, (name,))
    if stage == 2:  # its own file holds the adapters alone
        start_stage2(model, settings)
        put_back(model, run, 2)
    return clip, model.eval()


def put_back(model: GenHancer, run: Path, stage: int, names: tuple[str, ...] = ()) -> None:
    """What learns, as the newest checkpoint of a run's stage left it.

    Raises: FileNotFoundError where there is none; ValueError for one that was trained beside other
        parts: another CLIP, tokenizer or stage 1 would load, and be wrong.
    """
    found = newest_in(run / f"stage{stage}")
    if not found:
        raise FileNotFoundError(f"run {run}: no checkpoint in {run / f'stage{stage}'}")
    verify(found)
    mine = {"fingerprints": fingerprints_of(model, stage, *names)}
    message = f"{found} was trained beside other parts ({{what}}: {{difference}})"
    require_same(read_state(found), mine, message)
    ckpt.restore(model, found)


def fingerprints_of(model: GenHancer, stage: int, *names: str) -> dict[str, str]:
    """Of what does not learn in a stage, of all paradigms or those named. A checkpoint holds only
    what trains; these say what it was trained against."""
    # In stage 2 the adapters are no part of what was given; `original` is the tower without them.
    found = {"clip": model.visual if model.original is None else model.original}
    for name in names or model.paradigms:
        paradigm = model.paradigms[name]
        found[f"{name}.tokenizer"] = paradigm.tokenizer
        if stage == 2 or not paradigm.denoiser_learns:
            found[f"{name}.denoiser"] = paradigm.denoiser
        if stage == 2:  # what stage 1 handed over
            found |= {f"{name}.{key}": module for key, module in paradigm.projectors.items()}
    # FLUX.1's are bf16 where the device computes in it, else float32: one file, one fingerprint.
    given = {f"{n}.denoiser" for n, p in model.paradigms.items() if not p.denoiser_learns}
    return {n: fingerprint(p, torch.bfloat16 if n in given else None) for n, p in found.items()}


def start_stage2(model: GenHancer, settings: Settings) -> None:
    """Who learns in stage 2, and how."""
    model.start_stage2(
        "all" if settings.end_to_end else settings.stage2_trains,
        settings.tuning,
        settings.lora_pool,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
        bias=settings.lora_bias,
    )


def parameter_groups(model: GenHancer, settings: Settings, stage: int) -> list[dict]:
    """Trainable parameters with their peak learning rates.

    End to end, the fresh denoiser and projectors need the learning rate that stage 1 would have
    given them; the tower keeps stage 2's.
    """
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    tower = [p for n, p in learning.items() if n.startswith("visual.")]
    rest = [p for n, p in learning.items() if not n.startswith("visual.")]
    peak = settings.stage1_lr if stage == 1 or settings.end_to_end else settings.stage2_lr
    groups = [{"params": tower, "peak": settings.stage2_lr}, {"params": rest, "peak": peak}]
    return [group for group in groups if group["params"]]


def make_optimizer(groups: list[dict], settings: Settings) -> torch.optim.AdamW:
    """AdamW (App. B; betas, eps and weight decay are the official code's).

    Fused: one kernel for all that happens to a number, without a temporary as large as the weights.
    """
    how = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": settings.weight_decay}
    return torch.optim.AdamW(groups, lr=0.0, fused=True, **how)


def find_data(settings: Settings, process: Process) -> Dataset:
    """The pictures, listed and not yet read. Raises: ValueError for toy scenes that CLIP cannot
    look at, and for a cache that would be too large."""
    size = describe_clip(settings.clip)[0].image_size
    if settings.data:
        how = settings.crop_min, settings.seed, settings.crop_white
        pictures = Pictures(picture_source(settings, process), size, *how)
    elif size == TOY_SIZE:
        pictures = ToyScenes(settings.toy_images, seed=seed_of("toy scenes", settings.seed))
    else:
        raise ValueError(
            f"toy scenes have {TOY_SIZE} px, {settings.clip} looks at {size}: give --data"
        )
    # 50 000 toy scenes with their features are about 2 GB: beyond that memory is the wrong place.
    if settings.cache == "memory" and len(pictures) * size**2 > 50_000 * TOY_SIZE**2:
        raise ValueError(
            f"--cache memory would hold {len(pictures)} images of {size} px: give a folder, "
            "--cache DIR, or '' for none"
        )
    if settings.cache != "memory" and Path(settings.cache).is_file():
        raise ValueError(f"--cache {settings.cache} is a file: give a folder")
    return pictures


def picture_source(settings: Settings, process: Process) -> FileList | ShardIndex:
    """Where the pictures of --data lie. Raises: ValueError where the ranks see different ones."""

    def bar(shards):
        return tqdm(shards, "reading shard headers", unit="shard", disable=not process.is_main)

    if is_shard_pattern(settings.data):
        # The first scan of CC3M reads 9 million headers: worth all cores of the node. The ranks
        # share it through the index files, be they on one disk or on each node's own.
        workers = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        source = ShardIndex(settings.data, progress=bar, workers=workers)
        for problem in source.problems if process.is_main else ():
            print(f"data: {problem}", file=sys.stderr)
    else:
        source = FileList(find_images(settings.data))
    wait_for_slowest(process, "pictures are listed")
    if len(counts := union_over_ranks({str(len(source))}, process)) > 1:
        raise ValueError(
            f"--data {settings.data} is not the same for all ranks: they find "
            f"{' and '.join(sorted(counts))} pictures. Give every node a whole copy"
        )
    return source


def warn_of_toy_tokenizer(
    settings: Settings, model: GenHancer, pictures: Dataset, process: Process
) -> None:
    """The toy's tokenizers were trained on its scenes. Of photographs they keep blobs of colour,
    and a denoiser can draw nothing better."""
    for part in parts(settings):
        file = Path(part.vae if part.denoiser == "flow" else part.vqgan)
        if settings.data and file.resolve().parent == TOY_DIR and process.is_main:
            say_what_is_kept(model.paradigms[part.denoiser], file, pictures, process)


def say_what_is_kept(paradigm: Paradigm, file: Path, pictures: Dataset, process: Process) -> None:
    """Of toy scenes and of these pictures."""
    found = []
    for source in (ToyScenes(16, seed=0), pictures):
        items = [source[(i, 0)]["image"] for i in range(min(16, len(source)))]
        images = as_floats(torch.stack(items)).to(process.device)
        with torch.no_grad():
            found.append(psnr(images, kept(paradigm, images)))
    print(
        f"note: {file.name} was made for the toy's scenes, of which it keeps {found[0]:.1f} dB "
        f"(PSNR); of these pictures {found[1]:.1f}. The denoiser can draw nothing better: for "
        "photographs take --preset openai-b32-224 or larger",
        file=sys.stderr,
    )


def hold(pictures: Dataset, model: GenHancer, settings: Settings, process: Process) -> Dataset:
    """The training set together with everything that the frozen parts make of it, computed once
    (--cache): in memory or on the disk, with the same numbers; or the pictures alone.

    Raises: ValueError as `disk_cache` does.
    """
    if not settings.cache:
        return pictures
    model.eval()
    if settings.cache != "memory":
        return feature_cache.disk_cache(pictures, model, settings, process)

    def encode(images):
        found = model.precompute(as_floats(images.to(process.device)))
        return feature_cache.as_used(feature_cache.as_stored(found, settings.cache_dtype))

    def bar(chunks):
        what = "encoding pictures once"
        return tqdm(chunks, what, unit="chunk", leave=False, disable=not process.is_main)

    chunk = feature_cache.images_at_once(model.info.image_size)
    return CachedPictures(pictures, encode, bar, chunk)
