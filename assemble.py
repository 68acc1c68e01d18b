"""From settings to a model and its data: who is built from what, and from which seed.

The parts know nothing of settings and of each other; this file knows both. On every rank it builds
the same, so that a run can start without sending weights around.
"""

import os
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from tqdm import tqdm

from autoencoders import VAE, VQGAN, VQGANConfig, load_vae, load_vqgan
from backbones import ClipInfo, load_clip
from data import FileList, FrozenCache, Pictures, find_images
from flow_denoiser import FlowDenoiser, FlowDenoiserConfig
from flux import load_flux
from genhancer import GenHancer
from paradigms import Continuous, Discrete
from perceiver_denoiser import PerceiverDenoiser, PerceiverDenoiserConfig
from runlog import Place
from settings import Settings
from shards import ShardIndex, is_shard_pattern
from toyworld import ToyScenes

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

    All randomness of a run comes from here, so a stream belongs to one purpose and to no other.
    The count of numbers goes in with them, because NumPy pads with zeros: without it, (7, 1) and
    (7, 1, 0) would be one seed. Raises: ValueError for a purpose that is not in `PURPOSES`.
    """
    words = (PURPOSES.index(purpose), len(numbers), *numbers)
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 2)


def build_model(settings: Settings, place: Place) -> tuple[torch.nn.Module, GenHancer]:
    """CLIP and the module around it. Initialised alike on every rank: same seed, same order.

    The text tower is needed only when the result is written, and stays on the CPU.
    """
    continuous = settings.denoiser == "flow"
    if continuous and not settings.vae:
        raise ValueError(
            "--vae is missing: give FLUX.1's ae.safetensors (its Apache-2.0 'schnell' repository "
            "has it)"
        )
    if not continuous and not settings.vqgan:
        raise ValueError(
            "--vqgan is missing: give a taming-transformers f16 VQ-GAN (K = 1024 or 16384), as "
            "safetensors or as the published ckpt"
        )
    clip, info = load_clip(settings.clip)
    tokenizer = load_vae(settings.vae) if continuous else load_vqgan(settings.vqgan)
    # Whatever loading drew from the global generator, the denoiser starts from this seed.
    torch.manual_seed(seed_of("denoiser", settings.seed))
    if settings.flux:
        denoiser = load_flux(settings.flux, torch.bfloat16 if place.autocast else torch.float32)
    elif continuous:
        denoiser = FlowDenoiser(flow_config(settings, tokenizer.config.latent_channels))
    else:
        denoiser = PerceiverDenoiser(perceiver_config(settings, info.image_size, tokenizer.config))
    return clip, join(settings, clip, info, tokenizer, denoiser).to(place.device)


def join(
    settings: Settings, clip: torch.nn.Module, info: ClipInfo, tokenizer: VAE | VQGAN, denoiser
) -> GenHancer:
    """The loaded parts as one module."""
    if settings.denoiser == "flow":  # FLUX's VAE and a small FLUX-like transformer (Fig. 3 b)
        paradigm = Continuous(
            tokenizer,
            denoiser,
            info.image_size,
            time_distribution=settings.time_distribution,
            time_scale=settings.time_scale,
            sample_posterior=settings.posterior,
            fp32=settings.vae_fp32,
            denoiser_learns=not settings.flux,
        )
    else:  # a VQ-GAN and a small Perceiver (Fig. 3 c)
        paradigm = Discrete(
            tokenizer,
            denoiser,
            info.image_size,
            mask_from=settings.mask_from,
            mask_to=settings.mask_to,
            fp32=settings.vae_fp32,
        )
    return GenHancer(
        clip, info, paradigm, local_ratio=settings.local_ratio, drift_weight=settings.drift_weight
    )


def flow_config(settings: Settings, latent_channels: int) -> FlowDenoiserConfig:
    """The shape of the continuous denoiser that these settings ask for."""
    try:
        axes = tuple(int(a) for a in settings.rope_axes.split(","))
    except ValueError:
        raise ValueError(
            f"--rope_axes {settings.rope_axes!r}: expected three numbers like 16,56,56"
        ) from None
    return FlowDenoiserConfig(
        latent_channels=latent_channels,
        width=settings.width,
        heads=settings.heads,
        axes=axes,
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


def start_stage2(model: GenHancer, settings: Settings) -> None:
    """Who learns in stage 2, and how."""
    model.start_stage2(
        "all" if settings.end_to_end else settings.stage2_trains,
        settings.tuning,
        settings.lora_rank,
        settings.lora_alpha,
        settings.lora_dropout,
        settings.lora_bias,
        settings.lora_pool,
    )


def picture_source(settings: Settings, place: Place) -> FileList | ShardIndex:
    """Where the pictures of --data lie."""
    if not is_shard_pattern(settings.data):
        return FileList(find_images(settings.data))

    def bar(shards):
        return tqdm(shards, "reading shard headers", unit="shard", disable=not place.chief)

    # The chief scans and leaves the index file; the others find it there.
    if place.ranks > 1 and not place.chief:
        dist.barrier()
    # The first scan of CC3M reads 9 million headers: worth all cores of the node.
    index = ShardIndex(settings.data, progress=bar, workers=os.cpu_count() or 1)
    if place.ranks > 1 and place.chief:
        dist.barrier()
    if place.chief:
        for problem in index.problems:
            print(f"data: {problem}", file=sys.stderr)
    return index


def build_data(settings: Settings, model: GenHancer, place: Place) -> Dataset:
    """The training set; with --cache, together with everything the frozen parts make of it."""
    if settings.data:
        dataset = Pictures(
            picture_source(settings, place),
            model.info.image_size,
            settings.crop_min,
            settings.seed,
            settings.crop_white,
        )
    elif settings.preset == "toy":
        dataset = ToyScenes(settings.toy_images, seed=seed_of("toy scenes", settings.seed))
    else:
        raise ValueError(
            f"--data is missing: preset {settings.preset} needs a folder of images, a list of "
            "them, or tar shards"
        )
    if not settings.cache:
        return dataset
    # 50 000 toy scenes with their features are about 2 GB: beyond that a cache is a mistake.
    if len(dataset) * model.info.image_size**2 > 50_000 * 64**2:
        raise ValueError(
            f"--cache would hold {len(dataset)} images of {model.info.image_size} px: use "
            "--no-cache"
        )

    def encode(images):
        frozen = model.eval().frozen(images.to(place.device))
        return {k: v.float() if v.is_floating_point() else v for k, v in frozen.items()}

    return FrozenCache(
        dataset,
        encode,
        lambda chunks: tqdm(
            chunks, "frozen features", unit="chunk", leave=False, disable=not place.chief
        ),
    )
