"""How the toy's frozen weights were made: ``python -m toy.pretrain``.

GenHancer starts from models that others pretrained. The toy world has no others, so this file
plays their part, once: a tiny CLIP (open_clip's own class) on captions with reporting bias, and a
tiny VAE and VQ-GAN (the classes of pretrained/autoencoders.py) on pictures alone. The results are
shipped in ``toy/`` together with ``PRETRAINING.json``, which says which command, seed and versions
made them, how long it took and what was measured. Nothing here is needed to use the project.

Letters: B batch, d width of the joint space; of the VQ-GAN: K codes, E their width, h w the grid of
tokens, R = B·h·w rows.
"""

import json
import platform
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from tqdm import trange

from evaluation.encoder import WordTokenizer, load_encoders
from evaluation.reconstruction import psnr
from evaluation.scoring import score
from pretrained.autoencoders import (
    VAE,
    VQGAN,
    AutoencoderConfig,
    VQGANConfig,
    config_to_text,
    load_vae,
    nearest_codes,
)
from toy import benchmark
from toy.world import IMAGE_SIZE, PATTERNS, TOY_DIR, ToyScenes, caption, vocabulary
from util.cli import parse_settings, run_command, setting
from util.files import save_tensors, write_atomically

# Toy scenes (64 px) become 8×8×32 latents, so 16 tokens after the denoiser's 2×2 patches: one per
# CLIP patch. Shift and scale come with the weights, in their JSON.
TOY_VAE = AutoencoderConfig(
    base_channels=8,
    channel_multipliers=(1, 2, 4, 8),
    blocks_per_level=1,
    latent_channels=32,
    groups=4,
)
# The same scenes become 8×8 = 64 tokens of 8×8 pixels.
TOY_VQGAN = VQGANConfig(
    base_channels=8,
    channel_multipliers=(1, 2, 4, 8),
    blocks_per_level=1,
    latent_channels=32,
    groups=4,
    attention_levels=(),
    codes=1024,
    code_width=32,
)


@dataclass(frozen=True)
class Settings:
    """One pretraining, every number of it."""

    only: str = setting("all", choices=("all", "clip", "vae", "vqgan"))
    """which weights to make"""
    out: str = setting(str(TOY_DIR))
    """where they go"""
    seed: int = setting(0, at_least=0, at_most=2**31)
    """seed of weights, scenes and captions"""
    threads: int = setting(0, at_least=0, at_most=1024)
    """CPU threads; 0: all"""
    scenes: int = setting(24_000, at_least=513, at_most=10_000_000)
    """different scenes; on the last 512 VAE and VQ-GAN are measured, not trained"""
    clip_steps: int = setting(2000, at_least=1, at_most=10**9)
    """steps of CLIP"""
    clip_batch: int = setting(192, at_least=1, at_most=100_000)
    """images per step of CLIP"""
    clip_lr: float = setting(1e-3, at_least=0, at_most=1)
    """peak learning rate of CLIP"""
    mention: float = setting(0.7, at_least=0, at_most=1)
    """probability that a mentionable attribute is mentioned"""
    vae_steps: int = setting(2800, at_least=1, at_most=10**9)
    """steps of the VAE"""
    vae_batch: int = setting(16, at_least=1, at_most=100_000)
    """images per step of the VAE"""
    vae_lr: float = setting(3e-3, at_least=0, at_most=1)
    """peak learning rate of the VAE"""
    kl_weight: float = setting(1e-4, at_least=0, at_most=1000)
    """weight of the VAE's KL term"""
    vqgan_steps: int = setting(4000, at_least=1, at_most=10**9)
    """steps of the VQ-GAN, which starts from the VAE"""
    vqgan_batch: int = setting(16, at_least=1, at_most=100_000)
    """images per step of the VQ-GAN"""
    vqgan_lr: float = setting(1e-3, at_least=0, at_most=1)
    """peak learning rate of the VQ-GAN"""
    pairs: int = setting(100, at_least=1, at_most=100_000)
    """validation pairs per pattern that measure CLIP"""
    codes: int = setting(TOY_VQGAN.codes, at_least=1, at_most=1_000_000)
    """K, size of the VQ-GAN's codebook"""
    commitment: float = setting(0.25, at_least=0, at_most=1000)
    """weight of the VQ-GAN's commitment term"""


MEAN, STD = 0.5, 0.25  # the toy CLIP's normalisation, the same for every channel


def clip_config(words: list[str]) -> dict:
    """A CLIP in miniature: 16 patches of 16×16 pixels, four layers, 1.1 M parameters.

    The joint space is narrow (64) on purpose: the text tower spans all of it, so what stage 2 adds
    has to be said in directions that text can read.
    """
    return {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "patch_size": 16,
            "width": 128,
            "layers": 4,
            "head_width": 32,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": len(words) + 3,  # and padding, start and end
            "width": 96,
            "heads": 3,
            "layers": 2,
        },
    }


def cosine(step: int, steps: int, peak: float) -> float:
    """100 steps of warm-up, then half a cosine to zero."""
    return peak * min(1.0, (step + 1) / 100) * 0.5 * (1 + np.cos(np.pi * step / steps))


def pretrain_clip(s: Settings, scenes: list, pixels: torch.Tensor) -> tuple[dict, dict]:
    """Contrastive pretraining with captions that never mention most of what they could.

    Returns: state dict, and the open_clip configuration that goes beside it.
    """
    torch.manual_seed(s.seed)
    words = vocabulary()
    config = clip_config(words)
    tokenizer = WordTokenizer(words, config["text_cfg"]["context_length"])
    clip = open_clip.CLIP(**config)
    matrices = [p for p in clip.parameters() if p.ndim >= 2]
    vectors = [p for p in clip.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}],
        betas=(0.9, 0.98),
    )
    contrast = open_clip.loss.ClipLoss()
    rng = np.random.default_rng([s.seed, 5])
    bar = trange(s.clip_steps, desc="CLIP")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, s.clip_steps, s.clip_lr)
        chosen = rng.integers(0, len(scenes), s.clip_batch)
        captions = [caption(scenes[i], rng, s.mention) for i in chosen]
        images = (pixels[chosen].float() / 255 - MEAN) / STD  # (B, 3, 64, 64)
        image_features = clip.encode_image(images, normalize=True)  # (B, d)
        text_features = clip.encode_text(tokenizer(captions), normalize=True)  # (B, d)
        loss = contrast(image_features, text_features, clip.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, np.log(100))  # CLIP's own bound
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    preprocess = {"mean": [MEAN] * 3, "std": [STD] * 3, "resize_mode": "shortest"}
    about = {"model_cfg": config, "preprocess_cfg": preprocess, "words": words}
    return clip.state_dict(), about


def draw_batch(pixels: torch.Tensor, count: int) -> torch.Tensor:
    """Random scenes, (B, 3, 64, 64) in [-1, 1]."""
    images = pixels[torch.randint(len(pixels), (count,))].float() / 127.5 - 1
    return images.contiguous(memory_format=torch.channels_last)  # the faster layout on a CPU


def foreground(images: torch.Tensor) -> torch.Tensor:
    """1 where a pixel differs from the picture's median colour, else 0. → (B, 1, 64, 64)."""
    median = images.flatten(2).median(dim=2).values[:, :, None, None]  # (B, 3, 1, 1)
    return ((images - median).abs().amax(1, keepdim=True) > 0.2).float()


def picture_loss(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """What the VAE and the VQ-GAN minimise.

    Subjects cover a tenth of a scene and colour is a small part of any squared error: left alone,
    both are learnt last. So the foreground counts fivefold, and the part of the error that is not
    grey counts again.
    """
    error = reconstruction - images  # (B, 3, 64, 64)
    color = error - error.mean(1, keepdim=True)
    return (
        (1 + 4 * foreground(images)) * (error.abs() + error.square() + 2 * color.square())
    ).mean()


def descend(module, optimizer, loss: torch.Tensor, bar) -> None:
    """One step of a tokenizer."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)


def pretrain_vae(s: Settings, pixels: torch.Tensor) -> tuple[VAE, dict]:
    """Reconstruction with a light KL term; then the shift and scale that make latents unit-sized.

    Returns: the VAE, and what was measured on scenes it has not seen.
    """
    torch.manual_seed(s.seed)
    vae = VAE(TOY_VAE).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.98), weight_decay=1e-3)
    train, held_out = pixels[:-512], pixels[-512:]
    bar = trange(s.vae_steps, desc="VAE")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, s.vae_steps, s.vae_lr)
        images = draw_batch(train, s.vae_batch)  # (B, 3, 64, 64)
        mean, log_variance = vae.moments(images)
        sample = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        loss = picture_loss(vae.decoder(sample), images) + s.kl_weight * kl
        descend(vae, optimizer, loss, bar)
    vae = vae.to(memory_format=torch.contiguous_format).eval()
    with torch.no_grad():
        images = held_out.float() / 127.5 - 1
        mean, log_variance = vae.moments(images)
        sample = mean + torch.exp(0.5 * log_variance) * torch.randn(mean.shape)
        reconstruction = vae.decoder(mean)
    vae.config = replace(TOY_VAE, shift=float(sample.mean()), scale=float(1 / sample.std()))
    return vae, {
        "psnr_db": psnr(reconstruction / 2 + 0.5, images / 2 + 0.5),  # in [0, 1]
        "posterior_std": torch.exp(0.5 * log_variance).mean().item(),
    }


def vqgan_from_vae(vae: VAE, codes: int) -> VQGAN:
    """A VQ-GAN that starts as the VAE: its encoder up to the mean, its decoder, and 1×1
    convolutions that change nothing. Only the rounding to a codebook is left to learn."""
    config = replace(TOY_VQGAN, codes=codes)
    vqgan = VQGAN(config)
    state = vae.state_dict()
    for name in ("encoder.conv_out.weight", "encoder.conv_out.bias"):  # mean, then log-variance
        state[name] = state[name][: config.latent_channels]
    for convolution in ("quant_conv", "post_quant_conv"):
        state[f"{convolution}.weight"] = torch.eye(config.code_width)[:, :, None, None]
        state[f"{convolution}.bias"] = torch.zeros(config.code_width)
    state["quantize.embedding.weight"] = vqgan.codebook.detach()
    vqgan.load_state_dict(state)
    return vqgan


class MovingCodebook:
    """Every code follows the mean of the vectors that chose it (the exponential moving average of
    van den Oord et al.), and a code that nothing chooses restarts at a vector of the batch.

    Each vector counts by the foreground of its cell: most cells are background, and would else own
    most of the codebook.
    """

    def __init__(self, codebook: torch.Tensor, decay: float = 0.98):
        self.codebook, self.decay = codebook, decay
        self.counts = torch.zeros(len(codebook))  # (K,)
        self.sums = torch.zeros_like(codebook)  # (K, E)

    @torch.no_grad()
    def update(self, vectors: torch.Tensor, chosen: torch.Tensor, weight: torch.Tensor) -> None:
        """vectors (R, E), chosen codes (R,), weight (R,)."""
        counts = torch.zeros_like(self.counts).index_add_(0, chosen, weight)
        sums = torch.zeros_like(self.sums).index_add_(0, chosen, weight[:, None] * vectors)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        dead = self.counts < 0.02 * self.counts.mean()  # (K,)
        fresh = torch.multinomial(weight, len(dead), replacement=True)[dead]  # any vector, per code
        self.counts[dead] = self.counts.mean()
        self.sums[dead] = self.counts[dead, None] * vectors[fresh]
        self.codebook.copy_(self.sums / self.counts[:, None])


def pretrain_vqgan(s: Settings, pixels: torch.Tensor, vae: VAE) -> tuple[VQGAN, dict]:
    """Reconstruction through a codebook. Neither discriminator nor perceptual loss: in this world
    a squared error is sharp enough, so it is a VQ-GAN by architecture and a VQ-VAE by training.

    Returns: the VQ-GAN, and what was measured on scenes it has not seen.
    """
    torch.manual_seed(s.seed)
    vqgan = vqgan_from_vae(vae, s.codes).to(memory_format=torch.channels_last)
    vqgan.quantize.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in vqgan.parameters() if p.requires_grad], betas=(0.9, 0.98), weight_decay=1e-3
    )
    codebook = MovingCodebook(vqgan.codebook)
    train, held_out = pixels[:-512], pixels[-512:]
    bar = trange(s.vqgan_steps, desc="VQ-GAN")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, s.vqgan_steps, s.vqgan_lr)
        images = draw_batch(train, s.vqgan_batch)  # (B, 3, 64, 64)
        grid = vqgan.quant_conv(vqgan.encoder(images))  # (B, E, h, w)
        vectors = grid.permute(0, 2, 3, 1).flatten(0, 2)  # (R, E)
        weight = 0.1 + F.avg_pool2d(foreground(images), vqgan.config.downsampling).flatten()  # (R,)
        chosen = nearest_codes(vectors.detach(), vqgan.codebook)  # (R,)
        codebook.update(vectors.detach(), chosen, weight)
        codes = vqgan.codebook[chosen]  # (R, E)
        # Straight through: forward the code, backward as if it were the encoder's own vector.
        passed = vectors + (codes - vectors).detach()
        passed = passed.view(len(images), *grid.shape[2:], -1).permute(0, 3, 1, 2)  # (B, E, h, w)
        commitment = (weight[:, None] * (vectors - codes).square()).mean()
        reconstruction = vqgan.decoder(vqgan.post_quant_conv(passed))
        loss = picture_loss(reconstruction, images) + s.commitment * commitment
        descend(vqgan, optimizer, loss, bar)
    vqgan = vqgan.to(memory_format=torch.contiguous_format).eval()
    with torch.no_grad():
        images = held_out.float() / 127.5 - 1
        indices = vqgan.indices(images)  # (512, N)
        share = torch.bincount(indices.flatten(), minlength=s.codes) / indices.numel()  # (K,)
        return vqgan, {
            "psnr_db": psnr(vqgan.decode(indices) / 2 + 0.5, images / 2 + 0.5),
            "codes": s.codes,
            "perplexity": float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum())),
            "dead_codes": int((share == 0).sum()),
        }


def main(arguments: list[str] | None = None) -> None:
    summary, example = __doc__.split("\n\n")[0], "    python -m toy.pretrain --out toy"
    s = parse_settings(Settings, summary, example, arguments)
    if s.threads:
        torch.set_num_threads(s.threads)
    # The fused kernel is slower than plain matrices for short sequences on a CPU.
    torch.backends.cuda.enable_flash_sdp(False)
    out = Path(s.out)
    if s.only == "vqgan" and not (out / "vae.safetensors").is_file():
        raise ValueError(
            f"the VQ-GAN starts from {out / 'vae.safetensors'}: make it with --only vae"
        )
    out.mkdir(parents=True, exist_ok=True)
    world = ToyScenes(s.scenes, seed=1234 + s.seed)
    drawn = [world.scene(i) for i in trange(s.scenes, desc="scenes")]
    stacked = torch.from_numpy(np.stack([p for _, p in drawn]))  # uint8 (scenes, 64, 64, 3)
    pixels = stacked.permute(0, 3, 1, 2).contiguous()  # uint8 (scenes, 3, 64, 64)
    make = {
        "clip": lambda: make_clip(s, [scene for scene, _ in drawn], pixels, out),
        "vae": lambda: make_vae(s, pixels, out),
        "vqgan": lambda: make_vqgan(s, pixels, out),
    }
    record, report = out / "PRETRAINING.json", {}
    for part in make if s.only == "all" else [s.only]:
        start = time.time()
        measured = make[part]()
        # What is done is kept, also what another process has made meanwhile.
        report = json.loads(record.read_text()) if record.is_file() else {}
        report[part] = about(part, s, start) | measured
        write_atomically(record, json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


def make_clip(s: Settings, scenes: list, pixels: torch.Tensor, out: Path) -> dict:
    """Write clip.safetensors and clip.json; what was measured."""
    state, config = pretrain_clip(s, scenes, pixels)
    save_tensors({k: v.half() for k, v in state.items()}, out / "clip.safetensors")
    write_atomically(out / "clip.json", json.dumps(config, indent=1))
    return {"mention": s.mention, **measure_clip(out, s.pairs)}


def make_vae(s: Settings, pixels: torch.Tensor, out: Path) -> dict:
    """Write vae.safetensors; what was measured."""
    vae, measured = pretrain_vae(s, pixels)
    save_half(vae, vae.config, out / "vae.safetensors")
    return {"kl_weight": s.kl_weight, **measured}


def make_vqgan(s: Settings, pixels: torch.Tensor, out: Path) -> dict:
    """Write vqgan.safetensors; what was measured."""
    vqgan, measured = pretrain_vqgan(s, pixels, load_vae(out / "vae.safetensors"))
    save_half(vqgan, vqgan.config, out / "vqgan.safetensors")
    return {"commitment": s.commitment, **measured}


def save_half(module: torch.nn.Module, config: AutoencoderConfig, path: Path) -> None:
    """Weights in half precision, with their configuration in the header."""
    state = {k: v.half() for k, v in module.state_dict().items()}
    save_tensors(state, path, metadata={"autoencoder": config_to_text(config)})


def about(part: str, s: Settings, start: float) -> dict:
    """What PRETRAINING.json says of every part: the command that makes it again, and with what."""
    flags = {f.name: getattr(s, f.name) for f in fields(s) if getattr(s, f.name) != f.default}
    flags = {"only": part, "seed": s.seed} | {k: v for k, v in flags.items() if k != "only"}
    given = " ".join(f"--{k} {v}" for k, v in flags.items() if k != "out")
    return {
        "command": f"python -m toy.pretrain {given}",
        "seed": s.seed,
        "scenes": s.scenes,
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "steps": getattr(s, f"{part}_steps"),
        "batch": getattr(s, f"{part}_batch"),
        "lr": getattr(s, f"{part}_lr"),
        "minutes": round((time.time() - start) / 60, 1),
    }


def measure_clip(folder: Path, per_pattern: int) -> dict:
    """How blind it is: the toy benchmark's validation pairs (seed 1), from the file just
    written."""
    [encoder] = load_encoders([str(folder / "clip.safetensors")], torch.device("cpu"))
    figures = {}
    for side, mentioned in (("mentioned", True), ("unmentioned", False)):
        items = benchmark.pairs(mentioned, per_pattern, seed=1)
        hits = score(encoder, items, benchmark.TEMPLATE)["text-to-image"]
        patterns = np.array([item.category for item in items])
        figures[side] = {p: round(100 * float(hits[patterns == p].mean()), 1) for p in PATTERNS}
        figures[side]["Average"] = round(100 * float(hits.mean()), 1)
    subject = benchmark.retention(encoder, benchmark.held_out_scenes())["zero_shot"]
    return figures | {"subject_zero_shot": round(100 * float(subject.mean()), 1)}


if __name__ == "__main__":
    run_command(main)
