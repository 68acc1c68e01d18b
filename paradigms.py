"""The two paradigms: what is hidden from the denoiser, and what it must give back (Fig. 3 b, c).

                  Continuous (Alg. 1)                     Discrete (Alg. 2)
    tokenize      a VAE latent x̃_1                        VQ-GAN indices s
    hide          mix it with noise, at time t            mask most of them
    losses        Eq. (3): the velocity to the latent     Eq. (4): the masked indices

Eq. (1) is Eq. (3) without a condition; Eq. (4) is the masked form of Eq. (2).

What stands before the [CLS] token, and who learns when, is the same for both: genhancer.py.

Letters: B images, H W height and width; d width of CLIP's global token, p width of its patch
tokens, T condition tokens; of the VAE C h w latent channels, height and width; of the VQ-GAN N
tokens, M of them masked, K codes of width E.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import flow_denoiser as flow
import perceiver_denoiser as perceiver
from pretrained.autoencoders import VAE, VQGAN


# ------------------------------------------------------------------------------------------------
# What they share
# ------------------------------------------------------------------------------------------------
class Projector(nn.Sequential):
    """h_ω, from CLIP's feature space to the denoiser's: where stage 1 puts the gap between the two
    (Sec. 4.3). The LayerNorm takes away CLIP's arbitrary scale, the layers learn the rest."""

    def __init__(self, d_in: int, d_out: int):
        layers = nn.Linear(d_in, d_out), nn.GELU(), nn.Linear(d_out, d_out)
        super().__init__(nn.LayerNorm(d_in), *layers)


class Paradigm(nn.Module):
    """A frozen tokenizer, a denoiser, and the projectors h_ω that tell it what CLIP has seen.

    A denoiser that arrives without gradients, as FLUX's published weights do, stays as it is for
    good: stage 1 then trains the projectors alone.
    """

    name: str  # "flow" or "perceiver"
    level: str  # how little is hidden; losses are logged along it
    context_dim: int
    vector_dim: int | None  # None: the condition enters by attention alone

    def __init__(self, tokenizer: VAE | VQGAN, denoiser: nn.Module):
        super().__init__()
        self.tokenizer, self.denoiser = tokenizer, denoiser
        self.denoiser_learns = any(p.requires_grad for p in denoiser.parameters())

    def connect(self, d: int, p: int | None = None) -> None:
        """Fresh projectors from a global token (width d) and, if asked, patch tokens (p)."""
        self.project_vector = Projector(d, self.vector_dim) if self.vector_dim else None
        self.project_context = Projector(d, self.context_dim)
        self.project_local = Projector(p, self.context_dim) if p else None

    @property
    def projectors(self) -> dict[str, Projector]:
        """Those that there are, by name."""
        names = ("project_vector", "project_context", "project_local")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def condition(
        self, features: Tensor, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """h_ω (Alg. 1, line 5; Alg. 2, line 5).

        Args: features: global token (B, d); chosen: patch tokens that join it (B, keep, p).
        Returns: context (B, T, context_dim), vector (B, vector_dim) or None where the denoiser
            takes none.
        """
        context = self.project_context(features)[:, None]  # (B, 1, context_dim)
        if chosen is not None:  # Key Point #1: [CLS] + n % [LOCAL]
            context = torch.cat([context, self.project_local(chosen)], dim=1)  # (B, 1+keep, …)
        vector = None if self.project_vector is None else self.project_vector(features)
        return context, vector

    def own_precision(self, run: Callable, x: Tensor):
        """A part of the tokenizer on x, in its weights' precision, outside autocast.

        A VAE's activations grow large enough to hurt in bf16, and a VQ-GAN's rounding to codes
        would be another one: in bf16 are only tokenizers that were brought to it on purpose.
        """
        dtype = next(self.tokenizer.parameters(), x).dtype  # one of rules alone has no weights
        with torch.autocast(x.device.type, enabled=False):
            return run(x.to(dtype) if x.is_floating_point() else x)


# ------------------------------------------------------------------------------------------------
# Algorithm 1's side
# ------------------------------------------------------------------------------------------------
class Continuous(Paradigm):
    """Rectified flow on VAE latents (Fig. 3 b).

    Args:
        vae, denoiser: must agree on the latent channels.
        image_size: H = W.
        times: distribution and scale s of t (Eq. 6, Tab. 4).
        sample_posterior: draw latents from the posterior (as the official code) or take its mean.
    Raises: ValueError where the parts do not fit together.
    """

    name, level = "flow", "t"

    def __init__(
        self,
        vae: VAE,
        denoiser: flow.FlowDenoiser,
        image_size: int,
        *,
        times: tuple[str, float] = ("logit-normal", 1.0),
        sample_posterior: bool = True,
    ):
        super().__init__(vae, denoiser)
        channels, expected = vae.config.latent_channels, denoiser.config.latent_channels
        token = 2 * vae.config.downsampling  # side in pixels: the denoiser sees 2×2 latents at once
        if channels != expected:
            raise ValueError(
                f"the VAE has {channels} latent channels, the denoiser wants {expected}"
            )
        if image_size % token:
            raise ValueError(f"image size {image_size} is no multiple of a token's {token} pixels")
        # A wrong distribution is refused now, not at the first step.
        flow.sample_timesteps(1, *times, torch.Generator())
        self.times, self.sample_posterior = times, sample_posterior
        side = image_size // vae.config.downsampling
        self.latent_shape = (channels, side, side)  # C h w
        self.tokens = (image_size // token) ** 2  # N
        self.context_dim, self.vector_dim = denoiser.config.context_dim, denoiser.config.vector_dim
        self.draw = partial(draw_noise, times=times, shape=self.latent_shape)

    def tokenize(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) in [0, 1] → the posterior of x̃_1: "mean" and, where it is sampled,
        "log_variance" (B, C, h, w)."""
        # in [-1, 1]; Alg. 1, line 3
        mean, log_variance = self.own_precision(self.tokenizer.moments, images * 2 - 1)
        return {"mean": mean} | ({"log_variance": log_variance} if self.sample_posterior else {})

    def hide(self, tokens: dict[str, Tensor], draws: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the denoiser sees, "x_t" (B, C, h, w) and "t" (B,), and what it must give back,
        "velocity" (B, C, h, w)."""
        noise = draws["posterior"] if self.sample_posterior else None
        log_variance = tokens["log_variance"].float() if self.sample_posterior else None
        data = self.tokenizer.latents(tokens["mean"].float(), log_variance, noise)  # x̃_1
        x_t, velocity = flow.straight_path(data, draws["noise"], draws["t"])  # Alg. 1, line 4
        return {"x_t": x_t, "t": draws["t"], "velocity": velocity}

    def losses(self, task: dict[str, Tensor], context: Tensor, vector: Tensor) -> dict[str, Tensor]:
        """Eq. (3). Returns: "per_image" (B,) with its gradient, and t under "level" (B,)."""
        predicted = self.denoiser(task["x_t"], task["t"], context, vector)  # (B, C, h, w)
        per_image = flow.flow_matching_loss(predicted, task["velocity"])  # Eq. (3); Alg. 1, line 7
        return {"per_image": per_image, "level": task["t"]}


def draw_noise(
    generators: list[torch.Generator], shared: torch.Generator, times: tuple, shape: tuple
) -> dict[str, Tensor]:
    """t (B,), the noise x̃_0 and the VAE's own sampling noise (B, C, h, w) each."""
    t = [flow.sample_timesteps(1, *times, g) for g in generators]  # Alg. 1, line 6
    noise = [torch.randn(shape, generator=g) for g in generators]
    posterior = [torch.randn(shape, generator=g) for g in generators]
    return {"t": torch.cat(t), "noise": torch.stack(noise), "posterior": torch.stack(posterior)}


# ------------------------------------------------------------------------------------------------
# Algorithm 2's side
# ------------------------------------------------------------------------------------------------
class Discrete(Paradigm):
    """A masked Perceiver on VQ-GAN indices (Fig. 3 c).

    Args:
        vqgan, denoiser: must agree on the codebook and on the grid.
        image_size: H = W.
        mask_range: the mask ratio is uniform between the two (Sec. 5.1); equal: fixed (Tab. S1).
    Raises: ValueError where the parts do not fit together.
    """

    name, level = "perceiver", "mask_ratio"
    vector_dim = None  # the condition enters by attention only (Fig. 3 c)

    def __init__(
        self,
        vqgan: VQGAN,
        denoiser: perceiver.PerceiverDenoiser,
        image_size: int,
        *,
        mask_range: tuple[float, float] = (0.5, 0.9),
    ):
        super().__init__(vqgan, denoiser)
        perceiver.check_mask_range(*mask_range)
        v, d = vqgan.config, denoiser.config
        there, here = f"{v.codes} codes of width {v.code_width}", f"{d.codes} of {d.code_width}"
        grid = f"{d.side} × {d.side} tokens of {v.downsampling} px"
        if (v.codes, v.code_width) != (d.codes, d.code_width):
            raise ValueError(f"the VQ-GAN has {there}, the denoiser wants {here}")
        if image_size != d.side * v.downsampling:
            raise ValueError(f"images of {image_size} px are no grid of {grid}")
        self.mask_range, self.tokens, self.context_dim = mask_range, d.side**2, d.width
        self.draw = partial(draw_masks, tokens=self.tokens, mask_range=mask_range)

    def tokenize(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) in [0, 1] → "indices" s (B, N)."""
        # in [-1, 1]; Alg. 2, line 3
        return {"indices": self.own_precision(self.tokenizer.indices, images * 2 - 1)}

    def codes(self, indices: Tensor) -> Tensor:
        """x̃: the codebook rows of indices (B, N) → (B, N, E), brought to zero mean, unit variance.

        Published codebooks differ in scale by orders of magnitude. A Linear follows, so this
        changes where training starts and not what can be learnt.
        """
        book = self.tokenizer.codebook.float()
        return (book[indices] - book.mean()) / book.std()

    def hide(self, tokens: dict[str, Tensor], draws: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the denoiser sees, "codes" (B, N, E) at the "visible" positions (B, N − M), and what
        it must name, the "indices" (B, N) at the "masked" ones (B, M)."""
        indices, count = tokens["indices"], int(draws["count"])
        visible, masked = perceiver.split_positions(draws["order"], count)  # Alg. 2, line 4
        codes = self.codes(indices)  # x̃ (B, N, E)
        return {"codes": codes, "visible": visible, "masked": masked, "indices": indices}

    def losses(self, task: dict[str, Tensor], context: Tensor, vector: None) -> dict[str, Tensor]:
        """Eq. (4). Returns: "per_image" (B,) in nats with its gradient, the mask ratio under
        "level" (B,), and the "accuracy" on masked tokens (B,)."""
        masked = task["masked"]
        logits = self.denoiser(task["codes"], task["visible"], masked, context)  # (B, M, K)
        # Eq. (4); Alg. 2, line 6
        per_image, accuracy = perceiver.masked_cross_entropy(logits, task["indices"], masked)
        level = torch.full_like(per_image, masked.shape[1] / self.tokens).detach()
        return {"per_image": per_image, "level": level, "accuracy": accuracy}


def draw_masks(
    generators: list[torch.Generator], shared: torch.Generator, tokens: int, mask_range: tuple
) -> dict[str, Tensor]:
    """A permutation of the tokens per image (B, N), and one M () for the whole batch."""
    orders = [torch.randperm(tokens, generator=g) for g in generators]
    count = perceiver.draw_masked_count(tokens, *mask_range, shared)
    return {"order": torch.stack(orders), "count": torch.tensor(count)}
