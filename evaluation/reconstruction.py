"""Looking through the denoiser's eyes: what does it make of an image, told only the condition?

Stage 2 changes numbers nobody can see. What the frozen denoiser draws from the [CLS] token before
and after it, from the same noise, shows what has got into that token. The rows:

    original     the image
    kept         through the tokenizer and back: the best that any denoiser could do
    drawn        from noise (continuous) or from no visible token (discrete), given the condition
    visible      discrete: the tokens that are not masked, the others grey
    completed    discrete: the masked tokens filled in, given the visible ones and the condition

Letters: B images, H W height and width, C h w of the VAE's latent, N tokens, d width of [CLS].
"""

from functools import partial
from typing import NamedTuple

import torch
from einops import repeat
from torch import Tensor

from flow_denoiser import euler_sample
from perceiver_denoiser import parallel_decode, split_positions


class Row(NamedTuple):
    """Pictures of one kind, and what they are."""

    pictures: Tensor
    """(B, 3, H, W) in [0, 1]"""
    label: str


@torch.no_grad()
def reconstruct(
    model, images: Tensor, seed: int = 0, *, name: str = "", condition: Tensor | None = None, **how
) -> dict[str, Row]:
    """Rows by the names above.

    Args:
        model: a GenHancer; images: (B, 3, H, W) in [0, 1].
        seed: of noise and masks.
        name: of the paradigm that draws, where the model has several; empty: the first.
        condition: global tokens (B, d) in the place of the images' own, e.g. those of other images
            or of another CLIP.
        how: `steps` of sampling (25 Euler steps, 8 of parallel decoding); continuous: `noise`
            (B, C, h, w) to start from; discrete: `ratio` of masked tokens (0.75).
    Raises: ValueError for images of another shape or range, or what the paradigm does not know.
    """
    model.check_images(images, values=True)
    draws = model.draw_from([seed, *range(seed, seed + len(images))], images.device)
    given = "[CLS]" if condition is None else "a [CLS] of your choice"
    given += f" and {model.local_ratio:g} % of the patch tokens" * bool(model.local_ratio)
    given += " alone" * (not model.local_ratio)
    paradigm = model.paradigms[name] if name else model.paradigm
    discrete = paradigm.name == "perceiver"
    draw = _discrete if discrete else _continuous
    known = {"steps", "ratio" if discrete else "noise"}
    if wrong := how.keys() - known:
        raise ValueError(f"reconstruct: this paradigm knows {sorted(known)}, not {sorted(wrong)}")
    # Weights that are kept in bf16 (FLUX's, and all frozen ones on a GPU) need it, as in training.
    parts = *model.visual.parameters(), *paradigm.denoiser.parameters()
    half = any(p.dtype == torch.bfloat16 for p in parts)
    half = half or torch.is_autocast_enabled(images.device.type)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
        features, patches = model.encode(images)
        chosen = model.choose_local(patches, draws.get("local_order"))
        told = paradigm.condition(features if condition is None else condition, chosen)
        rows = draw(paradigm, images, draws, (told, given), {"seed": seed, **how})
    return {"original": Row(images, "original"), **rows}


def kept(paradigm, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) through a paradigm's tokenizer and back."""
    tokens = paradigm.tokenize(images)
    return _decode(
        paradigm, tokens["indices"] if "indices" in tokens else _latent(paradigm, tokens)
    )


def psnr(images: Tensor, others: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures (B, 3, H, W) in [0, 1]: 20 is poor, 30 good."""
    return float(-10 * (images - others).square().mean().clamp(min=1e-10).log10())


def _latent(paradigm, moments: dict[str, Tensor]) -> Tensor:
    """The posterior's mean, as the denoiser sees latents."""
    return paradigm.tokenizer.latents(moments["mean"].float(), moments.get("log_variance"), None)


def _decode(paradigm, tokens: Tensor) -> Tensor:
    """The tokenizer's decoder, from [-1, 1] back to [0, 1]."""
    images = paradigm.own_precision(paradigm.tokenizer.decode, tokens)
    return (images.float() / 2 + 0.5).clamp(0, 1)


def _continuous(paradigm, images: Tensor, draws: dict, told: tuple, how: dict) -> dict[str, Row]:
    (context, vector), given = told
    noise = how.get("noise", draws["noise"])
    if noise.shape != draws["noise"].shape:
        expected = tuple(draws["noise"].shape)
        raise ValueError(f"noise: expected {expected}, got {tuple(noise.shape)}")
    velocity_of = partial(paradigm.denoiser, context=context, vector=vector)
    sample = euler_sample(velocity_of, noise, how.get("steps", 25))  # (B, C, h, w)
    best = "through the VAE and back: the best any denoiser could do"
    return {
        "kept": Row(kept(paradigm, images), best),
        "drawn": Row(_decode(paradigm, sample), f"drawn from noise, given {given}"),
    }


def _discrete(paradigm, images: Tensor, draws: dict, told: tuple, how: dict) -> dict[str, Row]:
    (context, _), given = told
    ratio = how.get("ratio", 0.75)
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio {ratio}: of the tokens that are masked, above 0, at most 1")
    indices = paradigm.tokenize(images)["indices"]  # (B, N)
    visible, _ = split_positions(draws["order"], round(ratio * paradigm.tokens))
    known = torch.zeros_like(indices, dtype=torch.bool).scatter_(1, visible, True)  # (B, N)

    def logits_of(indices: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        return paradigm.denoiser(paradigm.codes(indices), visible, masked, context)

    def fill(known: Tensor) -> Tensor:
        noise = torch.Generator().manual_seed(how["seed"])
        steps = how.get("steps", 8)
        return _decode(paradigm, parallel_decode(logits_of, indices, known, steps, generator=noise))

    side, f = paradigm.denoiser.config.side, paradigm.tokenizer.config.downsampling
    shown = repeat(known, "b (h w) -> b 1 (h p) (w q)", h=side, p=f, q=f)  # (B, 1, H, W)
    best, share = _decode(paradigm, indices), visible.shape[1] / paradigm.tokens
    return {
        "kept": Row(best, "through the VQ-GAN and back: the best any denoiser could do"),
        "visible": Row(torch.where(shown, best, 0.5), f"visible: {share:.0%} of the tokens"),
        "completed": Row(fill(known), f"completed, given the visible tokens and {given}"),
        "drawn": Row(fill(torch.zeros_like(known)), f"drawn from no token, given {given}"),
    }
