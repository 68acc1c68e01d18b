"""GenHancer: a denoiser that sees the image only through CLIP's [CLS] teaches CLIP to see more.

    image ──► CLIP image tower v_θ ──► [CLS] ──► projectors h_ω ──► condition ─┐
      │                                                                        ▼
      └─────► frozen tokenizer ──► x̃ ──► noise or masks hide most of it ──► denoiser g_φ ──► loss

Algorithm 1 (continuous) and Algorithm 2 (discrete) are both in this file, and `GenHancer.forward`
goes through them in the order of their lines. What they share is written once (Key Point #3: the
condition, the stages, LoRA); where they differ, a *paradigm* answers:

                  Continuous (Alg. 1)                     Discrete (Alg. 2)
    tokenize      a VAE latent x̃_1                        VQ-GAN indices s
    hide          mix it with noise, at time t            mask most of them
    losses        Eq. (3): the velocity to the latent     Eq. (4): the masked indices

Of the equations in front of these, Eq. (1) is Eq. (3) without a condition, and Eq. (2), which
predicts indices one after the other, is replaced by its masked form, Eq. (4).

The two stages differ only in who learns from the loss:

    stage 1   φ and ω; θ frozen. The denoiser learns to draw, the projectors to bridge CLIP's
              feature space and the denoiser's (the G2 of Eq. 5, which must never become CLIP's
              business). Alg. 1, lines 1-8; Alg. 2, lines 1-7.
    stage 2   θ through LoRA; φ, ω frozen ("only") or trained along ("all"). Alg. 1, lines 9-17;
              Alg. 2, lines 8-15.

Theorem 1 says why this teaches: with the target x̃ fixed, a lower reconstruction loss is a higher
mutual information between x̃ and h(v(x)), and once φ and ω have converged the only way to get more
is to put more of the image into [CLS].

Conventions: images enter as float RGB in [0, 1] and are normalised twice *here*, for CLIP with its
own mean and std, for the tokenizer to [-1, 1]. Both see the same crop. t = 1 is data.

Letters: B images, H W height and width; d width of CLIP's global token, P number of patch tokens
and p their width, T condition tokens; of the VAE C h w latent channels, height and width; of the
VQ-GAN N tokens, M of them masked, K codes.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flow_denoiser as flow
import perceiver_denoiser as perceiver
from lora import Adapter, inject_lora
from pretrained.autoencoders import VAE, VQGAN
from pretrained.backbones import ClipInfo, encode_visual


# ------------------------------------------------------------------------------------------------
# The two paradigms: what is hidden from the denoiser, and what it must give back
# ------------------------------------------------------------------------------------------------
class Paradigm(nn.Module):
    """A frozen tokenizer and a denoiser. A denoiser that arrives without gradients, as FLUX's
    published weights do, stays as it is for good: stage 1 then trains the projectors alone."""

    def __init__(self, tokenizer: VAE | VQGAN, denoiser: nn.Module):
        super().__init__()
        self.tokenizer, self.denoiser = tokenizer, denoiser
        self.denoiser_learns = any(p.requires_grad for p in denoiser.parameters())

    def own_precision(self, run: Callable, x: Tensor):
        """A part of the tokenizer on x, in its weights' precision, outside autocast.

        A VAE's activations grow large enough to hurt in bf16, and a VQ-GAN's rounding to codes
        would be another one: in bf16 are only tokenizers that were brought to it on purpose.
        """
        dtype = next(self.tokenizer.parameters(), x).dtype  # one of rules alone has no weights
        with torch.autocast(x.device.type, enabled=False):
            return run(x.to(dtype) if x.is_floating_point() else x)


class Continuous(Paradigm):
    """Rectified flow on VAE latents (Fig. 3 b).

    Args:
        vae, denoiser: must agree on the latent channels.
        image_size: H = W.
        times: distribution and scale s of t (Eq. 6, Tab. 4).
        sample_posterior: draw latents from the posterior (as the official code) or take its mean.
    Raises: ValueError where the parts do not fit together.
    """

    level = "t"  # how little is hidden; losses are logged along it

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


class Discrete(Paradigm):
    """A masked Perceiver on VQ-GAN indices (Fig. 3 c).

    Args:
        vqgan, denoiser: must agree on the codebook and on the grid.
        image_size: H = W.
        mask_range: the mask ratio is uniform between the two (Sec. 5.1); equal: fixed (Tab. S1).
    Raises: ValueError where the parts do not fit together.
    """

    level = "mask_ratio"
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


# ------------------------------------------------------------------------------------------------
# The condition
# ------------------------------------------------------------------------------------------------
class Projector(nn.Sequential):
    """h_ω, from CLIP's feature space to the denoiser's: where stage 1 puts the gap between the two
    (Sec. 4.3). The LayerNorm takes away CLIP's arbitrary scale, the layers learn the rest."""

    def __init__(self, d_in: int, d_out: int):
        layers = nn.Linear(d_in, d_out), nn.GELU(), nn.Linear(d_out, d_out)
        super().__init__(nn.LayerNorm(d_in), *layers)


# ------------------------------------------------------------------------------------------------
# Algorithms 1 and 2
# ------------------------------------------------------------------------------------------------
class GenHancer(nn.Module):
    """CLIP image tower, projectors, denoiser and frozen tokenizer behind one ``forward(images)``.

    Args:
        clip, info: a model of `load_clip`; only its image tower is touched.
        paradigm: tokenizer and denoiser; it says how wide the condition must be.
        local_ratio: percent of patch tokens that join the context (Key Point #1; 0 is the method).
        drift_weight: λ of the drift term D(v_θ, v_θ0) = 1 − cos of Eq. (5); 0 is the paper.
    Raises: ValueError where the ratio is no percentage.
    """

    def __init__(
        self,
        clip: nn.Module,
        info: ClipInfo,
        paradigm: Continuous | Discrete,
        *,
        local_ratio: float = 0.0,
        drift_weight: float = 0.0,
    ):
        super().__init__()
        if not 0 <= local_ratio <= 100:
            raise ValueError(f"local token ratio {local_ratio}: expected a percentage, 0 to 100")
        self.info, self.local_ratio, self.drift_weight = info, local_ratio, drift_weight
        self.visual, self.paradigm = clip.visual, paradigm
        self.original: nn.Module | None = None  # v_θ0, kept from `start_stage2` on

        with torch.no_grad():  # ask the tower how wide it is rather than parse its configuration
            device = next(self.visual.parameters()).device
            probe = torch.zeros(1, 3, info.image_size, info.image_size, device=device)
            token, patches = encode_visual(self.visual, probe, local=True)
        d, (self.patch_tokens, p) = token.shape[-1], patches.shape[1:]
        self.project_vector = Projector(d, paradigm.vector_dim) if paradigm.vector_dim else None
        self.project_context = Projector(d, paradigm.context_dim)
        self.project_local = Projector(p, paradigm.context_dim) if local_ratio else None
        self.register_buffer("mean", torch.tensor(info.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(info.std).view(3, 1, 1), persistent=False)
        # Nothing learns until a stage says so. (PyTorch picks matmul kernels by requires_grad, so
        # this also keeps features cached now bit-equal to those computed in a stage.)
        self.requires_grad_(False)
        self.tower_learns = False

    # -- who learns ------------------------------------------------------------------------------
    def start_stage1(self) -> None:
        """Freeze θ; train φ and ω (Alg. 1, line 7; Alg. 2, line 6)."""
        self.tower_learns = False
        self.requires_grad_(False)
        self._train_condition_and_denoiser()

    def start_stage2(
        self, trains: str = "only", tuning: str = "lora", pool: bool = False, **lora
    ) -> None:
        """Plug LoRA into v_θ and train it (Alg. 1, lines 10 and 16).

        Args:
            trains: "only" freezes φ and ω, "all" trains them along (Fig. S4).
            tuning: "lora", or "direct" for Fig. S2's full fine-tuning of the image tower.
            pool: adapters on the MLP of SigLIP's attention pool as well.
            lora: `rank`, `alpha`, `dropout` and `bias` of `inject_lora`.
        """
        if trains not in ("only", "all"):
            raise ValueError(f"stage 2 trains {trains!r}: expected 'only' or 'all'")
        if tuning not in ("lora", "direct"):
            raise ValueError(f"tuning {tuning!r}: expected 'lora' or 'direct'")
        self.tower_learns = True
        self.requires_grad_(False)
        self.original = copy.deepcopy(self.visual).eval()  # v_θ0 of Eq. (5), the yardstick of drift
        if tuning == "lora":
            skip = ("attn_pool.q", "attn_pool.kv", "attn_pool.proj") if pool else ("attn_pool",)
            inject_lora(self.visual, skip=skip, **lora)  # Alg. 1, line 10; Alg. 2, line 9
        else:
            self.visual.requires_grad_(True)
        if trains == "all":
            self._train_condition_and_denoiser()

    def _train_condition_and_denoiser(self) -> None:
        learning = [self.project_vector, self.project_context, self.project_local]
        learning += [self.paradigm.denoiser] if self.paradigm.denoiser_learns else []
        for module in learning:
            if module is not None:
                module.requires_grad_(True)

    def train(self, mode: bool = True) -> "GenHancer":
        """Parts that do not learn stay in eval mode: no dropout, no surprises."""
        super().train(mode)
        for part in (self.paradigm.tokenizer, self.original):
            if part is not None:
                part.eval()
        # Of a tower that learns, the adapters alone train: batch statistics (MobileCLIP's stem) and
        # stochastic depth (ViTamin) belong to its own pretraining.
        self.visual.eval()
        for module in self.visual.modules():
            if isinstance(module, Adapter) and self.tower_learns:
                module.train(mode)
        return self

    # -- one step --------------------------------------------------------------------------------
    def forward(
        self,
        images: Tensor | None,
        draws: dict[str, Tensor] | None = None,
        cached: dict[str, Tensor] | None = None,
        measure_drift: bool = False,
    ) -> dict[str, Tensor]:
        """The training loss of a batch. Stage 1 and stage 2 run the same lines: Alg. 1, lines 3-7
        are its lines 12-16, Alg. 2, lines 3-6 its lines 11-14.

        Args:
            images: (B, 3, H, W) in [0, 1]; None: `cached` and `draws` say all; see `must_look`.
            draws: the batch's randomness; drawn from PyTorch's global generator if None.
            cached: what `precompute(images)` returned earlier, to save computing it again.
            measure_drift: report 1 − cos to the original features also where λ is 0.
        Returns: "loss" (scalar, to minimise), "per_image" reconstruction losses (B,), the t or mask
            ratio each was taken at, "level" (B,), "accuracy" (B,) of a discrete denoiser, and
            "drift" (B,) where measured.
        """
        if images is not None or self.must_look or not cached:
            self.check_images(images, values=draws is None)  # a training loop knows its images
        if draws is None:
            draws = self.draw_from(torch.randint(2**62, (len(images) + 1,)).tolist(), images.device)
        with torch.no_grad():
            # Alg. 1, line 3; Alg. 2, line 3: x̃ of the image, without gradient
            tokens = cached or self.paradigm.tokenize(images)
            # Alg. 1, line 4 (at the t that line 6 has drawn); Alg. 2, line 4: most of it disappears
            task = self.paradigm.hide(tokens, draws)
        # Alg. 1, line 5; Alg. 2, line 5: h_ω ∘ v_θ(x), all that is known of the rest
        features, patches = self.encode(images, cached)
        context, vector = self.condition(features, patches, draws.get("local_order"))
        # Alg. 1, line 7; Alg. 2, line 6: Eq. (3) or Eq. (4). By Theorem 1, the lower it gets, the
        # more of x̃ is in the condition.
        result = self.paradigm.losses(task, context, vector)
        result["loss"] = result["per_image"].mean()
        result["per_image"] = result["per_image"].detach()
        if self.original is not None and (self.drift_weight or measure_drift):
            # D(v_θ, v_θ0) of Eq. (5), (B,): CLIP compares by angle, so its drift is an angle's.
            before = cached["original"] if cached else self.original_features(images)
            drift = 1 - F.cosine_similarity(features.float(), before.float(), dim=-1)
            result["drift"] = drift.detach()
            if self.drift_weight:
                result["loss"] = result["loss"] + self.drift_weight * drift.mean()  # Eq. (5)
        return result

    @property
    def must_look(self) -> bool:
        """Whether the condition needs the images themselves, whatever is known of them: patch
        tokens are not kept, and a tower that learns sees something else each time."""
        return self.tower_learns or self.local_ratio > 0

    def encode(self, images: Tensor, cached: dict | None = None) -> tuple[Tensor, Tensor | None]:
        """v_θ(x): the global token (B, d), and the patch tokens (B, P, p) where the condition takes
        them. A tower that does not learn gives the same token every time, so a cached one will do.
        """
        if cached and not self.must_look:
            return cached["original"], None
        return encode_visual(self.visual, self.normalise(images), local=self.local_ratio > 0)

    def condition(
        self, features: Tensor, patches: Tensor | None = None, local_order: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """h_ω (Alg. 1, line 5; Alg. 2, line 5).

        Args: features: global token (B, d); patches (B, P, p) and local_order (B, P): with local
            tokens only.
        Returns: context (B, T, context_dim), vector (B, vector_dim) or None where the denoiser
            takes none.
        """
        context = self.project_context(features)[:, None]  # (B, 1, context_dim)
        if self.local_ratio > 0:  # Key Point #1: [CLS] + n % [LOCAL]
            keep = round(self.local_ratio / 100 * self.patch_tokens)
            chosen = local_order[:, :keep, None].expand(-1, -1, patches.shape[-1])  # (B, keep, p)
            projected = self.project_local(patches.gather(1, chosen))  # (B, keep, context_dim)
            context = torch.cat([context, projected], dim=1)  # (B, 1+keep, context_dim)
        vector = None if self.project_vector is None else self.project_vector(features)
        return context, vector

    def normalise(self, images: Tensor) -> Tensor:
        """[0, 1] → CLIP's own mean and standard deviation."""
        return (images - self.mean) / self.std

    # -- randomness ------------------------------------------------------------------------------
    def draw(self, generators: list[torch.Generator], shared: torch.Generator) -> dict[str, Tensor]:
        """All randomness of a batch by name, drawn on the CPU.

        Drawn outside `forward`, so that it can be a pure function of (seed, step, image). One
        generator per image: an image gets the same noise, t or mask whichever rank or micro-batch
        it lands in, and a resumed run needs no generator states. `shared` decides what all images
        have in common; pieces of one batch must each be given it in the same state.
        """
        return self.dice()(generators, shared)

    def dice(self) -> Callable:
        """`draw` without the model, for processes that have none."""
        return partial(draw_all, self.paradigm.draw, self.patch_tokens if self.local_ratio else 0)

    def draw_from(self, seeds: list[int], device: torch.device) -> dict[str, Tensor]:
        """`draw` for B images from B + 1 seeds, the first of which they share."""
        shared, *own = [torch.Generator().manual_seed(seed) for seed in seeds]
        return on_device(self.draw(own, shared), device)

    # -- what no training changes ----------------------------------------------------------------
    @torch.no_grad()
    def precompute(self, images: Tensor) -> dict[str, Tensor]:
        """Everything about images that training cannot change, so that it can be computed once:
        what the tokenizer makes of them, and "original", the features of v_θ0 (B, d)."""
        self.check_images(images)
        return {**self.paradigm.tokenize(images), "original": self.original_features(images)}

    @torch.no_grad()
    def original_features(self, images: Tensor) -> Tensor:
        """v_θ0(x), (B, d): the tower as it was before stage 2."""
        tower = self.original if self.original is not None else self.visual
        return encode_visual(tower, self.normalise(images))[0]

    def check_images(self, images: Tensor, values: bool = False) -> None:
        """Raises: ValueError unless (B, 3, H, W), floating point, at CLIP's resolution; and unless
        in [0, 1], if asked for the values too (a GPU has to wait for them)."""
        expected = (3, self.info.image_size, self.info.image_size)
        if images is None:
            raise ValueError("images: None, where these must be looked at")
        if images.ndim != 4 or images.shape[1:] != expected or not images.is_floating_point():
            got = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"images: expected floats {('B', *expected)}, got {got}")
        low, high = (float(x) for x in images.aminmax()) if values else (0, 1)
        if not 0 <= low <= high <= 1:
            raise ValueError(f"images: expected values in [0, 1], got {low:.2f} to {high:.2f}")

    def architecture(self) -> dict:
        """What a checkpoint must agree on before its tensors can be used here."""
        return {
            "clip": self.info.open_clip_config(),
            "tokenizer": asdict(self.paradigm.tokenizer.config),
            "denoiser": asdict(self.paradigm.denoiser.config),
            "local_ratio": self.local_ratio,
        }


def draw_all(
    draw: Callable, patch_tokens: int, generators: list[torch.Generator], shared: torch.Generator
) -> dict[str, Tensor]:
    """What a paradigm draws and, of `patch_tokens` where local tokens join the condition, the order
    (B, P) in which they are taken."""
    draws = draw(generators, shared)
    if patch_tokens:
        orders = [torch.randperm(patch_tokens, generator=g) for g in generators]
        draws["local_order"] = torch.stack(orders)  # (B, P)
    return draws


def on_device(draws: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Draws where they are needed. A count stays on the CPU: it decides a shape, and a GPU would
    have to be waited for."""
    return {k: v if v.ndim == 0 else v.to(device, non_blocking=True) for k, v in draws.items()}
