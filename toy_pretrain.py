"""How the toy's frozen weights were made: ``python toyworld.py pretrain``.

GenHancer starts from models that others pretrained. The toy world has no others, so this file plays
their part, once: a tiny CLIP (open_clip's own class) on captions with reporting bias, and a tiny
VAE (the class of autoencoders.py) on pictures alone. The results are shipped in ``toy/`` together
with ``PRETRAINING.json``, which says which command, seed and versions made them, how long it took
and what was measured. Nothing here is needed to use the project.

Letters: B batch, d width of the joint space.
"""

import json
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import trange

import toyworld as toy
from autoencoders import TOY_VAE, VAE, config_to_text
from cli import parse_settings, run_command, setting


@dataclass(frozen=True)
class Settings:
    preset: str = setting("default", "named set of defaults")
    only: str = setting("all", "which weights to make", ("all", "clip", "vae"))
    out: str = setting(str(toy.TOY_DIR), "where they go")
    seed: int = setting(0, "seed of weights, scenes and captions")
    threads: int = setting(0, "CPU threads; 0: all")
    scenes: int = setting(24_000, "different scenes")
    clip_steps: int = setting(2000, "steps of CLIP")
    clip_batch: int = setting(192, "images per step of CLIP")
    clip_lr: float = setting(1e-3, "peak learning rate of CLIP")
    mention: float = setting(0.7, "probability that a mentionable attribute is mentioned")
    vae_steps: int = setting(2800, "steps of the VAE")
    vae_batch: int = setting(16, "images per step of the VAE")
    vae_lr: float = setting(3e-3, "peak learning rate of the VAE")
    kl_weight: float = setting(1e-4, "weight of the VAE's KL term")


MEAN, STD = 0.5, 0.25  # the toy CLIP's normalisation, the same for every channel


def clip_config(vocab_size: int) -> dict:
    """A CLIP in miniature: 16 patches of 16×16 pixels, four layers, 1.1 M parameters.

    The joint space is narrow (64) on purpose: the text tower spans all of it, so what stage 2 adds
    has to be said in directions that text can read.
    """
    return {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": toy.IMAGE_SIZE,
            "patch_size": 16,
            "width": 128,
            "layers": 4,
            "head_width": 32,
        },
        "text_cfg": {
            "context_length": toy.ToyTokenizer.context_length,
            "vocab_size": vocab_size,
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
    tokenizer = toy.ToyTokenizer()
    config = clip_config(tokenizer.vocab_size)
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
        captions = [toy.caption(scenes[i], rng, s.mention) for i in chosen]
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
    return clip.state_dict(), {"model_cfg": config, "preprocess_cfg": preprocess}


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
        images = (
            train[torch.randint(len(train), (s.vae_batch,))].float() / 127.5 - 1
        )  # (B, 3, 64, 64)
        mean, log_variance = vae.moments(images.contiguous(memory_format=torch.channels_last))
        sample = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        error = vae.decoder(sample) - images
        # Subjects cover a tenth of a scene and colour is a small part of any squared error: left
        # alone, both are learnt last. So the foreground (what differs from the picture's median
        # colour) counts fivefold, and the part of the error that is not grey counts again.
        median = images.flatten(2).median(dim=2).values[:, :, None, None]  # (B, 3, 1, 1)
        weight = (
            1 + 4 * ((images - median).abs().amax(1, keepdim=True) > 0.2).float()
        )  # (B, 1, 64, 64)
        color = error - error.mean(1, keepdim=True)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        loss = (
            weight * (error.abs() + error.square() + 2 * color.square())
        ).mean() + s.kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    vae = vae.to(memory_format=torch.contiguous_format).eval()
    with torch.no_grad():
        images = held_out.float() / 127.5 - 1
        mean, log_variance = vae.moments(images)
        sample = mean + torch.exp(0.5 * log_variance) * torch.randn(mean.shape)
        mse = F.mse_loss(vae.decoder(mean), images).item()
    vae.config = replace(TOY_VAE, shift=float(sample.mean()), scale=float(1 / sample.std()))
    return vae, {
        "psnr_db": 10 * np.log10(4 / mse),
        "posterior_std": torch.exp(0.5 * log_variance).mean().item(),
    }


def main(arguments: list[str] | None = None) -> None:
    s = parse_settings(
        Settings,
        {"default": {}},
        "Make the toy world's frozen weights again from nothing.",
        "    python toyworld.py pretrain --out toy",
        arguments,
    )
    if s.threads:
        torch.set_num_threads(s.threads)
    # The fused kernel is slower than plain matrices for short sequences on a CPU.
    torch.backends.cuda.enable_flash_sdp(False)
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    record = out / "PRETRAINING.json"
    report = json.loads(record.read_text()) if record.is_file() else {}
    world = toy.ToyScenes(s.scenes, seed=1234 + s.seed)
    drawn = [world.scene(i) for i in trange(s.scenes, desc="scenes")]
    scenes = [scene for scene, _ in drawn]
    stacked = torch.from_numpy(np.stack([p for _, p in drawn]))  # uint8 (scenes, 64, 64, 3)
    pixels = stacked.permute(0, 3, 1, 2).contiguous()  # uint8 (scenes, 3, 64, 64)
    common = {
        "seed": s.seed,
        "scenes": s.scenes,
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if s.only in ("all", "clip"):
        start = time.time()
        state, config = pretrain_clip(s, scenes, pixels)
        save_file({k: v.half().contiguous() for k, v in state.items()}, out / "clip.safetensors")
        (out / "clip.json").write_text(json.dumps(config, indent=1))
        report["clip"] = {
            "command": command("clip", s),
            **common,
            "steps": s.clip_steps,
            "batch": s.clip_batch,
            "lr": s.clip_lr,
            "mention": s.mention,
            "minutes": round((time.time() - start) / 60, 1),
            **measure_clip(out),
        }
    if s.only in ("all", "vae"):
        start = time.time()
        vae, measured = pretrain_vae(s, pixels)
        save_file(
            {k: v.half().contiguous() for k, v in vae.state_dict().items()},
            out / "vae.safetensors",
            metadata={"autoencoder": config_to_text(vae.config)},
        )
        report["vae"] = {
            "command": command("vae", s),
            **common,
            "steps": s.vae_steps,
            "batch": s.vae_batch,
            "lr": s.vae_lr,
            "kl_weight": s.kl_weight,
            "minutes": round((time.time() - start) / 60, 1),
            **measured,
        }
    record.write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


def command(part: str, s: Settings) -> str:
    threads = f" --threads {s.threads}" if s.threads else ""
    return f"python toyworld.py pretrain --only {part} --seed {s.seed}{threads}"


def measure_clip(folder: Path) -> dict:
    """How blind it is: the toy benchmark's validation pairs (seed 1), from the file just
    written."""
    import eval_mmvp
    from backbones import load_clip

    judge = eval_mmvp.Judge(
        "toy", *load_clip(str(folder / "clip.safetensors")), torch.device("cpu")
    )
    figures = {}
    for side, mentioned in (("mentioned", True), ("unmentioned", False)):
        pairs = toy.benchmark(mentioned, 100, seed=1)
        hits = eval_mmvp.score(judge, pairs)
        patterns = np.array([p.pattern for p in pairs])
        figures[side] = {p: round(100 * float(hits[patterns == p].mean()), 1) for p in toy.PATTERNS}
        figures[side]["Average"] = round(100 * float(hits.mean()), 1)
    world = toy.ToyScenes(2000, seed=99)
    subject = eval_mmvp.subject_zero_shot(judge, [world.scene(i) for i in range(2000)])[0]
    return figures | {"subject_zero_shot": round(100 * float(subject.mean()), 1)}


if __name__ == "__main__":
    run_command(main)
