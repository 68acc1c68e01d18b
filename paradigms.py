"""The two generation paradigms: what is hidden from the denoiser, and what it must give back.

    Continuous   (Alg. 1)  a VAE latent, mixed with noise      → the velocity towards the latent
    Discrete     (Alg. 2)  VQ-GAN indices, most of them masked → the masked indices

Key Point #3 says that everything else (condition, stages, LoRA) is common to both. So genhancer.py
holds what is common and asks a paradigm five questions:

    draw(generators, shared)  what is random about each image, and about the batch as a whole?
    frozen(images)            what can be computed once, since no training changes it?
    losses(…)                 how well is each image reconstructed, and how much of it was hidden?
    reconstruct(…)            what does that look like?
    architecture()            what must a checkpoint agree on?

Letters: B images, H W height and width; C h w latent channels, height and width; N tokens of the
VQ-GAN, M of them masked, K codes; T condition tokens.
"""

from collections.abc import Callable
from dataclasses import asdict

import torch
from einops import repeat
from torch import Tensor, nn

from autoencoders import VAE, VQGAN
from flow_denoiser import FlowDenoiser, euler_sample, flow_matching_loss, sample_timesteps
from perceiver_denoiser import (
    PerceiverDenoiser,
    check_mask_range,
    draw_masked_count,
    masked_cross_entropy,
    parallel_decode,
    split_positions,
)


class Paradigm(nn.Module):
    """A frozen tokenizer and a denoiser.

    Args: fp32: keep the tokenizer out of autocast. A VAE's activations grow large enough to hurt in
        bf16, and a VQ-GAN's rounding to codes would be another one.
    """

    # A pretrained denoiser stays as it is; only the projectors then learn in stage 1.
    denoiser_learns = True

    def __init__(self, tokenizer: VAE | VQGAN, denoiser: nn.Module, fp32: bool):
        super().__init__()
        self.tokenizer, self.denoiser, self.fp32 = tokenizer, denoiser, fp32

    def tokenize(self, encode: Callable, images: Tensor):
        """`encode` of images in [0, 1], which it gets in [-1, 1]."""
        if not self.fp32:
            return encode(images * 2 - 1)
        with torch.autocast(images.device.type, enabled=False):
            return encode(images * 2 - 1)

    def architecture(self) -> dict:
        """What a checkpoint must agree on before its tensors can be used here."""
        return {
            "tokenizer": asdict(self.tokenizer.config),
            "denoiser": asdict(self.denoiser.config),
        }


def to_pictures(decoded: Tensor) -> Tensor:
    """[-1, 1] → [0, 1]."""
    return (decoded.float() / 2 + 0.5).clamp(0, 1)


# ------------------------------------------------------------------------------------------------
# Continuous
# ------------------------------------------------------------------------------------------------
class Continuous(Paradigm):
    """Rectified flow on VAE latents (Fig. 3 b).

    Args:
        vae, denoiser: must agree on the latent channels.
        image_size: H = W.
        time_distribution, time_scale: how t is drawn (Eq. 6, Tab. 4).
        sample_posterior: draw latents from the posterior (as the official code) or take its mean.
        denoiser_learns: False for pretrained FLUX weights.
    Raises: ValueError where the parts do not fit together.
    """

    where = "t"  # the axis along which losses are logged

    def __init__(
        self,
        vae: VAE,
        denoiser: FlowDenoiser,
        image_size: int,
        *,
        time_distribution: str = "logit-normal",
        time_scale: float = 1.0,
        sample_posterior: bool = True,
        fp32: bool = True,
        denoiser_learns: bool = True,
    ):
        super().__init__(vae, denoiser, fp32)
        self.denoiser_learns = denoiser_learns
        if vae.config.latent_channels != denoiser.config.latent_channels:
            raise ValueError(
                f"the VAE has {vae.config.latent_channels} latent channels, the denoiser expects "
                f"{denoiser.config.latent_channels}"
            )
        if image_size % (2 * vae.config.downsampling):
            raise ValueError(
                f"image size {image_size} is no multiple of {2 * vae.config.downsampling}, the "
                "side of a denoiser token in pixels"
            )
        # A wrong distribution is refused now, not at the first step.
        sample_timesteps(1, time_distribution, time_scale, torch.Generator())
        self.times = time_distribution, time_scale
        self.sample_posterior = sample_posterior
        side = image_size // vae.config.downsampling
        self.latent_shape = (vae.config.latent_channels, side, side)
        self.tokens = (side // 2) ** 2  # N: the denoiser sees 2×2 patches of latents
        self.context_dim, self.vector_dim = denoiser.config.context_dim, denoiser.config.vector_dim

    def draw(self, generators: list[torch.Generator], shared: torch.Generator) -> dict[str, Tensor]:
        """t (B,), noise and the VAE's own sampling noise (B, C, h, w) each."""
        t = [sample_timesteps(1, *self.times, g) for g in generators]  # Alg. 1, line 6
        noise = [torch.randn(self.latent_shape, generator=g) for g in generators]
        posterior = [torch.randn(self.latent_shape, generator=g) for g in generators]
        return {"t": torch.cat(t), "noise": torch.stack(noise), "posterior": torch.stack(posterior)}

    def frozen(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) in [0, 1] → posterior "mean" and "log_variance" (B, C, h, w)."""
        mean, log_variance = self.tokenize(self.tokenizer.moments, images)
        return {"mean": mean, "log_variance": log_variance}

    def losses(self, frozen: dict, draws: dict, context: Tensor, vector: Tensor) -> dict:
        """Eq. (3). Returns: "per_image" (B,) with its gradient, and t under "where" (B,)."""
        noise = draws["posterior"] if self.sample_posterior else None
        mean, log_variance = frozen["mean"].float(), frozen["log_variance"].float()
        latents = self.tokenizer.latents(mean, log_variance, noise)  # x̃_1 (B, C, h, w)

        def velocity_of(x_t: Tensor, t: Tensor) -> Tensor:
            return self.denoiser(x_t, t, context, vector)

        per_image = flow_matching_loss(velocity_of, latents, draws["noise"], draws["t"])  # Eq. (3)
        return {"per_image": per_image, "where": draws["t"]}

    def reconstruct(
        self, images: Tensor, draws: dict, context: Tensor, vector: Tensor, steps: int = 25
    ) -> dict[str, Tensor]:
        """Rows of pictures (B, 3, H, W) in [0, 1] by label."""
        sample = euler_sample(
            lambda x, t: self.denoiser(x, t, context, vector), draws["noise"], steps
        )
        kept = self.tokenizer.decode(self.tokenizer.encode(images * 2 - 1))
        return {
            "through the VAE and back: the best any denoiser could do": to_pictures(kept),
            "drawn from noise, given [CLS] alone": to_pictures(self.tokenizer.decode(sample)),
        }


# ------------------------------------------------------------------------------------------------
# Discrete
# ------------------------------------------------------------------------------------------------
class Discrete(Paradigm):
    """A masked Perceiver on VQ-GAN indices (Fig. 3 c).

    Args:
        vqgan, denoiser: must agree on the codebook and on the grid.
        image_size: H = W.
        mask_from, mask_to: the mask ratio is uniform between them (Sec. 5.1); equal: fixed
            (Tab. S1).
    Raises: ValueError where the parts do not fit together.
    """

    where = "mask_ratio"
    vector_dim = None  # the condition enters by attention only (Fig. 3 c)

    def __init__(
        self,
        vqgan: VQGAN,
        denoiser: PerceiverDenoiser,
        image_size: int,
        *,
        mask_from: float = 0.5,
        mask_to: float = 0.9,
        fp32: bool = True,
    ):
        super().__init__(vqgan, denoiser, fp32)
        check_mask_range(mask_from, mask_to)
        v, d = vqgan.config, denoiser.config
        if (v.codes, v.code_width) != (d.codes, d.code_width):
            raise ValueError(
                f"the VQ-GAN has {v.codes} codes of width {v.code_width}, the denoiser expects "
                f"{d.codes} of {d.code_width}"
            )
        if image_size != d.side * v.downsampling:
            raise ValueError(
                f"images of {image_size} px are no grid of {d.side} × {d.side} tokens of "
                f"{v.downsampling} px"
            )
        self.mask_range, self.tokens = (mask_from, mask_to), d.side**2
        self.context_dim = d.width

    def draw(self, generators: list[torch.Generator], shared: torch.Generator) -> dict[str, Tensor]:
        """A permutation of the tokens per image (B, N), and one M () for the whole batch."""
        orders = [torch.randperm(self.tokens, generator=g) for g in generators]
        count = draw_masked_count(self.tokens, *self.mask_range, shared)
        return {"order": torch.stack(orders), "count": torch.tensor(count)}

    def frozen(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) in [0, 1] → "indices" (B, N)."""
        return {"indices": self.tokenize(self.tokenizer.indices, images)}  # Alg. 2, line 3

    def codes(self, indices: Tensor) -> Tensor:
        """x̃: the codebook rows of indices (B, N) → (B, N, E), brought to zero mean, unit variance.

        Published codebooks differ in scale by orders of magnitude. A Linear follows, so this
        changes where training starts and not what can be learnt.
        """
        book = self.tokenizer.codebook.float()
        return (book[indices] - book.mean()) / book.std()

    def losses(self, frozen: dict, draws: dict, context: Tensor, vector: None = None) -> dict:
        """Eq. (4). Returns: "per_image" (B,) in nats with its gradient, the mask ratio under
        "where" (B,), and the "accuracy" on masked tokens (B,)."""
        indices, count = frozen["indices"], int(draws["count"])
        visible, masked = split_positions(draws["order"], count)  # Alg. 2, line 4
        logits = self.denoiser(self.codes(indices), visible, masked, context)  # (B, M, K)
        per_image, accuracy = masked_cross_entropy(logits, indices, masked)  # Alg. 2, line 6
        where = torch.full_like(per_image, count / self.tokens).detach()
        return {"per_image": per_image, "where": where, "accuracy": accuracy}

    def reconstruct(
        self,
        images: Tensor,
        draws: dict,
        context: Tensor,
        vector: None = None,
        steps: int = 8,
        ratio: float = 0.75,
    ) -> dict[str, Tensor]:
        """Rows of pictures (B, 3, H, W) in [0, 1] by label; `ratio` of the tokens are masked."""
        indices = self.frozen(images)["indices"]  # (B, N)
        side, f = self.denoiser.config.side, self.tokenizer.config.downsampling
        visible, _ = split_positions(draws["order"], round(ratio * self.tokens))
        known = torch.zeros_like(indices, dtype=torch.bool).scatter_(1, visible, True)  # (B, N)

        def fill(known: Tensor) -> Tensor:
            def logits_of(indices: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
                return self.denoiser(self.codes(indices), visible, masked, context)

            noise = torch.Generator().manual_seed(0)
            full = parallel_decode(logits_of, indices, known, steps, generator=noise)
            return to_pictures(self.tokenizer.decode(full))

        kept = to_pictures(self.tokenizer.decode(indices))
        shown = repeat(known, "b (h w) -> b 1 (h p) (w q)", h=side, p=f, q=f)  # (B, 1, H, W)
        return {
            "through the VQ-GAN and back: the best any denoiser could do": kept,
            f"visible: {1 - ratio:.0%} of the tokens": torch.where(shown, kept, 0.5),
            "completed, given the visible tokens and [CLS]": fill(known),
            "drawn from nothing but [CLS]": fill(torch.zeros_like(known)),
        }
