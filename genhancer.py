"""GenHancer: a denoiser that sees the image only through CLIP's [CLS] teaches CLIP to see more.

    image ──► CLIP image tower v_θ ──► [CLS] ──► projectors h_ω ──► condition ─┐
      │                                                                        ▼
      └─────► frozen tokenizer ──► x̃ ──► noise or masks hide most of it ──► denoiser g_φ ──► loss

The loss is the denoiser's: Eq. (3) for the continuous one, Eq. (4) for the discrete one, both in
paradigms.py. What differs between the two stages is only who learns from it:

    stage 1   φ and ω; θ frozen. The denoiser learns to draw, the projectors to bridge CLIP's
              feature space and the denoiser's (the G2 of Eq. 5, which must never become CLIP's
              business). Alg. 1, lines 1-8.
    stage 2   θ through LoRA; φ, ω frozen ("only") or along for the ride ("all"). Alg. 1, lines
              9-17.

Theorem 1 says why this teaches: with the target x̃ fixed, a lower reconstruction loss is a higher
mutual information between x̃ and h(v(x)), and once φ and ω have converged the only way to get more
is to put more of the image into [CLS].

Conventions: images enter as float RGB in [0, 1] and are normalised twice *here*, for CLIP with its
own mean and std, for the tokenizer to [-1, 1]. Both see the same crop.

Letters: B images, H W height and width, d width of CLIP's global token, P number of patch tokens
and p their width, T condition tokens.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import ClipInfo, encode_visual
from lora import inject_lora
from paradigms import Continuous, Discrete


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


# ------------------------------------------------------------------------------------------------
# The module
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
        self.visual = clip.visual
        self.paradigm = paradigm
        self.original: nn.Module | None = None  # v_θ0, kept from `start_stage2` on

        with torch.no_grad():  # ask the tower how wide it is rather than parse its configuration
            device = next(self.visual.parameters()).device
            probe = torch.zeros(1, 3, info.image_size, info.image_size, device=device)
            token, patches = encode_visual(self.visual, probe, local=True)
        d, (self.patch_tokens, p) = token.shape[-1], patches.shape[1:]
        vector_dim, context_dim = paradigm.vector_dim, paradigm.context_dim
        self.project_vector = Projector(d, vector_dim) if vector_dim else None
        self.project_context = Projector(d, context_dim)
        self.project_local = Projector(p, context_dim) if local_ratio else None
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
        pool: bool = False,
    ) -> None:
        """Plug LoRA into v_θ and train it (Alg. 1, lines 10 and 16).

        Args:
            trains: "only" freezes φ and ω, "all" trains them along (Fig. S4).
            tuning: "lora", or "direct" for Fig. S2's full fine-tuning of the image tower.
            pool: adapters on the MLP of SigLIP's attention pool as well.
        """
        if trains not in ("only", "all"):
            raise ValueError(f"stage 2 trains {trains!r}: expected 'only' or 'all'")
        if tuning not in ("lora", "direct"):
            raise ValueError(f"tuning {tuning!r}: expected 'lora' or 'direct'")
        self.requires_grad_(False)
        self.original = copy.deepcopy(self.visual).eval()  # v_θ0 of Eq. (5), the yardstick of drift
        if tuning == "lora":
            skip = ("attn_pool.q", "attn_pool.kv", "attn_pool.proj") if pool else ("attn_pool",)
            inject_lora(self.visual, rank, alpha, dropout, bias, skip)  # Alg. 1, line 10
        else:
            self.visual.requires_grad_(True)
        if trains == "all":
            self._train_condition_and_denoiser()

    def _train_condition_and_denoiser(self) -> None:
        for module in (
            self.paradigm.denoiser if self.paradigm.denoiser_learns else None,
            self.project_vector,
            self.project_context,
            self.project_local,
        ):
            if module is not None:
                module.requires_grad_(True)

    def train(self, mode: bool = True) -> "GenHancer":
        """Frozen parts stay in eval mode: no dropout, no surprises."""
        super().train(mode)
        for frozen in (self.paradigm.tokenizer, self.original):
            if frozen is not None:
                frozen.eval()
        if not any(p.requires_grad for p in self.visual.parameters()):
            self.visual.eval()
        return self

    # -- the forward pass ------------------------------------------------------------------------
    def draw(self, generators: list[torch.Generator], shared: torch.Generator) -> dict[str, Tensor]:
        """All randomness of a batch by name, drawn on the CPU.

        Drawn outside `forward`, so that it can be a pure function of (seed, step, image). One
        generator per image: an image gets the same noise, t or mask whichever rank or micro-batch
        it lands in, and a resumed run needs no generator states. `shared` decides what all images
        have in common; pieces of one batch must each be given it in the same state.
        """
        draws = self.paradigm.draw(generators, shared)
        if self.local_ratio:
            orders = [torch.randperm(self.patch_tokens, generator=g) for g in generators]
            draws["local_order"] = torch.stack(orders)  # (B, P)
        return draws

    @torch.no_grad()
    def frozen(self, images: Tensor) -> dict[str, Tensor]:
        """Everything about images that training cannot change, so that it can be computed once.

        Returns: what the paradigm's tokenizer makes of them, and "original", the features of v_θ0
        (B, d).
        """
        tower = self.original if self.original is not None else self.visual
        return {
            **self.paradigm.frozen(images),
            "original": encode_visual(tower, self.normalise(images))[0],
        }

    def normalise(self, images: Tensor) -> Tensor:
        """[0, 1] → CLIP's own mean and standard deviation."""
        return (images - self.mean) / self.std

    def condition(
        self, images: Tensor, local_order: Tensor | None = None, features: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """h_ω ∘ v_θ(x) (Alg. 1, line 5; Alg. 2, line 5).

        Args: images (B, 3, H, W) in [0, 1]; local_order (B, P), needed with local tokens;
            features (B, d): use these instead of running a frozen tower again.
        Returns: context (B, T, context_dim), vector (B, vector_dim) or None where the denoiser
            takes none, the global token (B, d).
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
        vector = None if self.project_vector is None else self.project_vector(features)
        return context, vector, features

    def forward(
        self,
        images: Tensor,
        draws: dict[str, Tensor] | None = None,
        frozen: dict[str, Tensor] | None = None,
        measure_drift: bool = False,
    ) -> dict[str, Tensor]:
        """The training loss of a batch (Alg. 1, lines 3-7 and 12-16; Alg. 2, lines 3-6 and 11-14).

        Args:
            images: (B, 3, H, W) in [0, 1].
            draws: the batch's randomness; drawn from PyTorch's global generator if None.
            frozen: what `frozen(images)` returned earlier, to save computing it again.
            measure_drift: report 1 − cos to the original features also where λ is 0.
        Returns: "loss" (scalar, to minimise), "per_image" reconstruction losses (B,), the t or mask
            ratio "where" each was taken (B,), "accuracy" (B,) of a discrete denoiser, and "drift"
            (B,) where measured.
        """
        if draws is None:
            seeds = torch.randint(2**62, (len(images) + 1,)).tolist()
            shared, *own = [torch.Generator().manual_seed(s) for s in seeds]
            draws = {k: v.to(images.device) for k, v in self.draw(own, shared).items()}
        tower_learns = any(p.requires_grad for p in self.visual.parameters())

        with torch.no_grad():  # Alg. 1, line 3 and Alg. 2, line 3: x̃, without gradient
            tokenized = frozen or self.paradigm.frozen(images)

        # A frozen tower's features may be reused; with local tokens it must run for its patches.
        reuse = frozen["original"] if frozen and not tower_learns and not self.local_ratio else None
        context, vector, features = self.condition(images, draws.get("local_order"), reuse)
        result = self.paradigm.losses(tokenized, draws, context, vector)  # Eq. (3) or Eq. (4)
        result["loss"] = result["per_image"].mean()
        result["per_image"] = result["per_image"].detach()
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
    def reconstruct(self, images: Tensor, seed: int = 0) -> dict[str, Tensor]:
        """Rows of pictures (B, 3, H, W) in [0, 1] by label: the originals, and what the paradigm
        makes of them."""
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(images))]
        draws = self.draw(generators, torch.Generator().manual_seed(seed))
        draws = {k: v.to(images.device) for k, v in draws.items()}
        context, vector, _ = self.condition(images, draws.get("local_order"))
        rows = self.paradigm.reconstruct(images, draws, context, vector)
        return {"original": images, **rows}

    def architecture(self) -> dict:
        """What a checkpoint must agree on before its tensors can be used here."""
        return {
            "clip": self.info.open_clip_config(),
            **self.paradigm.architecture(),
            "local_ratio": self.local_ratio,
        }
