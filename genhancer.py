"""GenHancer: a denoiser that sees the image only through CLIP's [CLS] teaches CLIP to see more.

    image ──► CLIP image tower v_θ ──► [CLS] ──► projectors h_ω ──► condition ─┐
      │                                                                        ▼
      └─────► frozen VAE ──► latent x̃_1 ──► mixed with noise ──► x̃_t ──► denoiser g_φ ──► loss

The loss is the denoiser's (Eq. 3). What differs between the two stages is only who learns from it:

    stage 1 (Alg. 1, lines 1-8)    φ and ω; θ frozen. The denoiser learns to draw, the projectors to
                                   bridge CLIP's feature space and the denoiser's (the G2 of Eq. 5,
                                   which must never become CLIP's business).
    stage 2 (Alg. 1, lines 9-17)   θ through LoRA; φ, ω frozen ("only") or along for the ride
    ("all").

Theorem 1 says why this teaches: with the target x̃ fixed, a lower reconstruction loss is a higher
mutual information between x̃ and h(v(x)), and once φ and ω have converged the only way to get more
is to put more of the image into [CLS].

Conventions: images enter as float RGB in [0, 1] and are normalised twice *here*, for CLIP with its
own mean and std, for the VAE to [-1, 1]. Both see the same crop.

Letters: B images, H W height and width, d width of CLIP's global token, P number of patch tokens
and p their width, T condition tokens, C h w latent channels, height and width.
"""

import copy
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoders import VAE
from backbones import ClipInfo, encode_visual
from flow_denoiser import FlowDenoiser, euler_sample, flow_matching_loss, sample_timesteps
from lora import inject_lora


# ------------------------------------------------------------------------------------------------
# Condition
# ------------------------------------------------------------------------------------------------
class Projector(nn.Sequential):
    """h_ω: LayerNorm → Linear → GELU → Linear, from CLIP's feature space to the denoiser's.

    This small network is where stage 1 puts the gap between the two spaces (Sec. 4.3): the
    LayerNorm takes away CLIP's arbitrary scale, the two layers learn the rest.
    """

    def __init__(self, d_in: int, d_out: int):
        super().__init__(
            nn.LayerNorm(d_in), nn.Linear(d_in, d_out), nn.GELU(), nn.Linear(d_out, d_out)
        )


@dataclass
class Draws:
    """All randomness of one batch, so that it can be a pure function of (seed, step, sample).

    Drawn by `GenHancer.draw`, one generator per image: an image gets the same noise and the same t
    whichever rank or micro-batch it lands in, and a resumed run needs no generator states at all.
    """

    t: Tensor  # (B,)
    noise: Tensor  # (B, C, h, w)
    posterior: Tensor  # (B, C, h, w): the VAE's own sampling noise
    local_order: Tensor | None  # (B, P): a permutation of the patch tokens per image

    def to(self, device: torch.device) -> "Draws":
        move = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if v is not None}
        return Draws(**{"local_order": None, **move})


# ------------------------------------------------------------------------------------------------
# The module
# ------------------------------------------------------------------------------------------------
class GenHancer(nn.Module):
    """CLIP image tower, projectors, denoiser and frozen VAE behind one ``forward(images)``.

    Args:
        clip, info: a model of `load_clip`; only its image tower is touched.
        vae: a frozen VAE.
        denoiser: the continuous denoiser; its config says how wide the condition must be.
        local_ratio: percent of patch tokens that join the context (Key Point #1; 0 is the method).
        time_distribution, time_scale: how t is drawn (Eq. 6, Tab. 4).
        drift_weight: λ of the drift term D(v_θ, v_θ0) = 1 − cos of Eq. (5); 0 is the paper.
        vae_fp32: keep the VAE out of autocast; its activations grow large enough to hurt in bf16.
        sample_posterior: draw VAE latents from the posterior (as the official code) or take the
        mean.
    Raises: ValueError where the parts do not fit together.
    """

    def __init__(
        self,
        clip: nn.Module,
        info: ClipInfo,
        vae: VAE,
        denoiser: FlowDenoiser,
        *,
        local_ratio: float = 0.0,
        time_distribution: str = "logit-normal",
        time_scale: float = 1.0,
        drift_weight: float = 0.0,
        sample_posterior: bool = True,
        vae_fp32: bool = True,
    ):
        super().__init__()
        if not 0 <= local_ratio <= 100:
            raise ValueError(f"local token ratio {local_ratio}: expected a percentage, 0 to 100")
        if vae.config.latent_channels != denoiser.config.latent_channels:
            raise ValueError(
                f"the VAE has {vae.config.latent_channels} latent channels, the denoiser expects "
                f"{denoiser.config.latent_channels}"
            )
        if info.image_size % (2 * vae.config.downsampling):
            raise ValueError(
                f"image size {info.image_size} is no multiple of {2 * vae.config.downsampling}, "
                "the side of a denoiser token in pixels"
            )
        # A wrong distribution is refused now, not at the first step.
        sample_timesteps(1, time_distribution, time_scale, torch.Generator())
        self.info, self.local_ratio, self.drift_weight = info, local_ratio, drift_weight
        self.time_distribution, self.time_scale = time_distribution, time_scale
        self.sample_posterior, self.vae_fp32 = sample_posterior, vae_fp32
        self.visual = clip.visual
        self.vae = vae
        self.denoiser = denoiser
        self.original: nn.Module | None = None  # v_θ0, kept from `start_stage2` on
        side = info.image_size // vae.config.downsampling
        self.latent_shape = (vae.config.latent_channels, side, side)

        with torch.no_grad():  # ask the tower how wide it is rather than parse its configuration
            device = next(self.visual.parameters()).device
            probe = torch.zeros(1, 3, info.image_size, info.image_size, device=device)
            token, patches = encode_visual(self.visual, probe, local=True)
        d, (self.patch_tokens, p) = token.shape[-1], patches.shape[1:]
        c = denoiser.config
        self.project_vector = Projector(d, c.vector_dim)
        self.project_context = Projector(d, c.context_dim)
        self.project_local = Projector(p, c.context_dim) if local_ratio else None
        self.register_buffer("mean", torch.tensor(info.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(info.std).view(3, 1, 1), persistent=False)
        # Nothing learns until a stage says so. (PyTorch picks matmul kernels by requires_grad, so
        # this also keeps features cached now bit-equal to those computed in a stage.)
        self.requires_grad_(False)

    # -- who learns ------------------------------------------------------------------------------
    def start_stage1(self) -> None:
        """Freeze θ; train φ and ω (Alg. 1, line 7)."""
        self.requires_grad_(False)
        self._train_condition_and_denoiser()

    def start_stage2(
        self,
        trains: str = "only",
        tuning: str = "lora",
        rank: int = 16,
        alpha: float = 16.0,
        dropout: float = 0.1,
        bias: str = "lora_only",
    ) -> None:
        """Plug LoRA into v_θ and train it (Alg. 1, lines 10 and 16).

        Args:
            trains: "only" freezes φ and ω, "all" trains them along (Fig. S4).
            tuning: "lora", or "direct" for Fig. S2's full fine-tuning of the image tower.
        """
        if trains not in ("only", "all"):
            raise ValueError(f"stage 2 trains {trains!r}: expected 'only' or 'all'")
        if tuning not in ("lora", "direct"):
            raise ValueError(f"tuning {tuning!r}: expected 'lora' or 'direct'")
        self.requires_grad_(False)
        self.original = copy.deepcopy(self.visual).eval()  # v_θ0 of Eq. (5), the yardstick of drift
        if tuning == "lora":
            inject_lora(self.visual, rank, alpha, dropout, bias)  # Alg. 1, line 10
        else:
            self.visual.requires_grad_(True)
        if trains == "all":
            self._train_condition_and_denoiser()

    def _train_condition_and_denoiser(self) -> None:
        for module in (
            self.denoiser,
            self.project_vector,
            self.project_context,
            self.project_local,
        ):
            if module is not None:
                module.requires_grad_(True)

    def train(self, mode: bool = True) -> "GenHancer":
        """Frozen parts stay in eval mode: no dropout, no surprises."""
        super().train(mode)
        for frozen in (self.vae, self.original):
            if frozen is not None:
                frozen.eval()
        if not any(p.requires_grad for p in self.visual.parameters()):
            self.visual.eval()
        return self

    # -- the forward pass ------------------------------------------------------------------------
    def draw(self, generators: list[torch.Generator]) -> Draws:
        """Randomness for one batch, one generator per image, on the CPU."""

        def stack(make):
            return torch.stack([make(g) for g in generators])

        how = self.time_distribution, self.time_scale
        return Draws(
            t=torch.cat([sample_timesteps(1, *how, g) for g in generators]),
            noise=stack(lambda g: torch.randn(self.latent_shape, generator=g)),
            posterior=stack(lambda g: torch.randn(self.latent_shape, generator=g)),
            local_order=stack(lambda g: torch.randperm(self.patch_tokens, generator=g))
            if self.local_ratio
            else None,
        )

    @torch.no_grad()
    def frozen(self, images: Tensor) -> dict[str, Tensor]:
        """Everything about images that training cannot change, so that it can be computed once.

        Returns: "mean" and "log_variance" of the VAE posterior (B, C, h, w), and "original", the
        features of v_θ0 (B, d).
        """
        mean, log_variance = self._moments(images)
        tower = self.original if self.original is not None else self.visual
        return {
            "mean": mean,
            "log_variance": log_variance,
            "original": encode_visual(tower, self.normalise(images))[0],
        }

    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The VAE posterior of images in [0, 1], in float32 unless told otherwise."""
        if not self.vae_fp32:
            return self.vae.moments(images * 2 - 1)
        with torch.autocast(images.device.type, enabled=False):
            return self.vae.moments(images * 2 - 1)

    def normalise(self, images: Tensor) -> Tensor:
        """[0, 1] → CLIP's own mean and standard deviation."""
        return (images - self.mean) / self.std

    def condition(
        self, images: Tensor, local_order: Tensor | None = None, features: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h_ω ∘ v_θ(x) (Alg. 1, line 5).

        Args: images (B, 3, H, W) in [0, 1]; local_order (B, P), needed with local tokens;
            features (B, d): use these instead of running a frozen tower again.
        Returns: context (B, T, context_dim), vector (B, vector_dim), the global token (B, d).
        """
        patches = None
        if features is None:
            features, patches = encode_visual(
                self.visual, self.normalise(images), local=self.local_ratio > 0
            )
        context = self.project_context(features)[:, None]  # (B, 1, context_dim)
        if self.local_ratio > 0:  # Key Point #1: [CLS] + n % [LOCAL]
            keep = round(self.local_ratio / 100 * self.patch_tokens)
            chosen = local_order[:, :keep, None].expand(-1, -1, patches.shape[-1])  # (B, keep, p)
            projected = self.project_local(patches.gather(1, chosen))  # (B, keep, context_dim)
            context = torch.cat([context, projected], dim=1)  # (B, 1+keep, context_dim)
        return context, self.project_vector(features), features

    def forward(
        self,
        images: Tensor,
        draws: Draws | None = None,
        frozen: dict[str, Tensor] | None = None,
        measure_drift: bool = False,
    ) -> dict[str, Tensor]:
        """The training loss of a batch (Alg. 1, lines 3-7 and 12-16).

        Args:
            images: (B, 3, H, W) in [0, 1].
            draws: the batch's randomness; drawn from PyTorch's global generator if None.
            frozen: what `frozen(images)` returned earlier, to save computing it again.
            measure_drift: report 1 − cos to the original features also where λ is 0.
        Returns: "loss" (scalar, to minimise), "per_image" reconstruction losses (B,), "t" (B,), and
            "drift" (B,) where measured.
        """
        if draws is None:
            seeds = torch.randint(2**62, (len(images),)).tolist()
            draws = self.draw([torch.Generator().manual_seed(s) for s in seeds]).to(images.device)
        tower_learns = any(p.requires_grad for p in self.visual.parameters())

        with torch.no_grad():  # Alg. 1, line 3: x̃_1 = v_ae(x), without gradient
            moments = (frozen["mean"], frozen["log_variance"]) if frozen else self._moments(images)
            mean, log_variance = (m.float() for m in moments)
            noise = draws.posterior if self.sample_posterior else None
            latents = self.vae.latents(mean, log_variance, noise)  # (B, C, h, w)

        # A frozen tower's features may be reused; with local tokens it must run for its patches.
        reuse = frozen["original"] if frozen and not tower_learns and not self.local_ratio else None
        context, vector, features = self.condition(images, draws.local_order, reuse)

        def velocity_of(x_t: Tensor, t: Tensor) -> Tensor:
            return self.denoiser(x_t, t, context, vector)

        per_image = flow_matching_loss(velocity_of, latents, draws.noise, draws.t)  # Eq. (3)
        result = {"loss": per_image.mean(), "per_image": per_image.detach(), "t": draws.t}
        if self.original is not None and (self.drift_weight or measure_drift):
            if frozen:
                before = frozen["original"]
            else:
                with torch.no_grad():
                    before = encode_visual(self.original, self.normalise(images))[0]
            # D(v_θ, v_θ0) of Eq. (5), (B,): CLIP compares by angle, so its drift is an angle's.
            drift = 1 - F.cosine_similarity(features.float(), before.float(), dim=-1)
            result["drift"] = drift.detach()
            if self.drift_weight:
                result["loss"] = result["loss"] + self.drift_weight * drift.mean()  # Eq. (5)
        return result

    # -- looking at it ---------------------------------------------------------------------------
    @torch.no_grad()
    def reconstruct(self, images: Tensor, steps: int = 25, seed: int = 0) -> tuple[Tensor, Tensor]:
        """What the VAE keeps of images, and what the denoiser draws from noise and [CLS] alone.

        Returns: VAE reconstruction and sample, each (B, 3, H, W) in [0, 1].
        """
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(images))]
        draws = self.draw(generators).to(images.device)
        context, vector, _ = self.condition(images, draws.local_order)
        sample = euler_sample(lambda x, t: self.denoiser(x, t, context, vector), draws.noise, steps)
        kept = self.vae.decode(self.vae.encode(images * 2 - 1))
        return tuple((x.float() / 2 + 0.5).clamp(0, 1) for x in (kept, self.vae.decode(sample)))

    def architecture(self) -> dict:
        """What a checkpoint must agree on before its tensors can be used here."""
        return {
            "clip": self.info.open_clip_config(),
            "vae": asdict(self.vae.config),
            "denoiser": asdict(self.denoiser.config),
            "local_ratio": self.local_ratio,
        }
