"""GenHancer: a denoiser that sees the image only through CLIP's [CLS] teaches CLIP to see more.

    image ──► CLIP image tower v_θ ──► [CLS] ──► projectors h_ω ──► condition ─┐
      │                                                                        ▼
      └─────► frozen tokenizer ──► x̃ ──► noise or masks hide most of it ──► denoiser g_φ ──► loss

`GenHancer.forward` goes through Algorithm 1 (continuous) and Algorithm 2 (discrete) in the order of
their lines. What they share is written once (Key Point #3: the condition, the stages, LoRA); where
they differ, a *paradigm* answers (paradigms.py): what it hides of an image, and the loss, Eq. (3)
or Eq. (4). Several paradigms may teach the same [CLS] token together.

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
and p their width.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import Adapter, inject_lora
from paradigms import Paradigm
from pretrained.backbones import ClipInfo, encode_visual


# ------------------------------------------------------------------------------------------------
# Algorithms 1 and 2
# ------------------------------------------------------------------------------------------------
class GenHancer(nn.Module):
    """CLIP image tower, projectors, denoiser and frozen tokenizer behind one ``forward(images)``.

    Several paradigms teach together: each with its own projectors and its own view of the same
    [CLS] token. The paper trains one at a time; the sum is this project's extension.

    Args:
        clip, info: a model of `load_clip`; only its image tower is touched.
        paradigms: one, or a list of different ones: tokenizers and denoisers.
        loss_weights: of their losses in the sum; None: 1 each.
        local_ratio: percent of patch tokens that join the context (Key Point #1; 0 is the method).
        drift_weight: λ of the drift term D(v_θ, v_θ0) = 1 − cos of Eq. (5); 0 is the paper.
    Raises: ValueError where the ratio is no percentage, or the weights do not fit the paradigms.
    """

    def __init__(
        self,
        clip: nn.Module,
        info: ClipInfo,
        paradigms: Paradigm | list[Paradigm],
        *,
        loss_weights: list[float] | None = None,
        local_ratio: float = 0.0,
        drift_weight: float = 0.0,
    ):
        super().__init__()
        if not 0 <= local_ratio <= 100:
            raise ValueError(f"local token ratio {local_ratio}: expected a percentage, 0 to 100")
        self.info, self.local_ratio, self.drift_weight = info, local_ratio, drift_weight
        several = [paradigms] if isinstance(paradigms, Paradigm) else list(paradigms)
        self.visual = clip.visual
        # By name, so that a checkpoint of one paradigm alone fits a model that has it among others.
        self.paradigms = nn.ModuleDict({paradigm.name: paradigm for paradigm in several})
        weights = [1.0] * len(several) if loss_weights is None else loss_weights
        if not len(self.paradigms) == len(several) == len(weights) > 0:
            names = ", ".join(paradigm.name for paradigm in several)
            raise ValueError(f"paradigms {names}, loss weights {weights}: one each, all different")
        self.loss_weights = dict(zip(self.paradigms, weights, strict=True))
        self.original: nn.Module | None = None  # v_θ0, kept from `start_stage2` on

        with torch.no_grad():  # ask the tower how wide it is rather than parse its configuration
            device = next(self.visual.parameters()).device
            probe = torch.zeros(1, 3, info.image_size, info.image_size, device=device)
            token, patches = encode_visual(self.visual, probe, local=True)
        d, (self.patch_tokens, p) = token.shape[-1], patches.shape[1:]
        if local_ratio and not round(local_ratio / 100 * self.patch_tokens):
            one = f"that is none; one is {100 / self.patch_tokens:.3g}"
            raise ValueError(
                f"local token ratio {local_ratio}: of {self.patch_tokens} patch tokens {one}"
            )
        for paradigm in several:
            paradigm.connect(d, p if local_ratio else None)
        self.register_buffer("mean", torch.tensor(info.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(info.std).view(3, 1, 1), persistent=False)
        # Nothing learns until a stage says so. (PyTorch picks matmul kernels by requires_grad, so
        # this also keeps features cached now bit-equal to those computed in a stage.)
        self.requires_grad_(False)
        self.tower_learns = False

    @property
    def paradigm(self) -> Paradigm:
        """The first one: where there is one alone, which is the method."""
        return next(iter(self.paradigms.values()))

    # -- who learns ------------------------------------------------------------------------------
    def start_stage1(self, *names: str) -> None:
        """Freeze θ; train φ and ω (Alg. 1, line 7; Alg. 2, line 6), of all paradigms or of those
        that are named."""
        self.tower_learns = False
        self.requires_grad_(False)
        self._train_condition_and_denoiser(*names)

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

    def _train_condition_and_denoiser(self, *names: str) -> None:
        for name in names or self.paradigms:
            paradigm = self.paradigms[name]
            learning = [*paradigm.projectors.values()]
            learning += [paradigm.denoiser] if paradigm.denoiser_learns else []
            for module in learning:
                module.requires_grad_(True)

    def train(self, mode: bool = True) -> "GenHancer":
        """Parts that do not learn stay in eval mode: no dropout, no surprises."""
        super().train(mode)
        for part in (*(p.tokenizer for p in self.paradigms.values()), self.original):
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
        Returns: "loss" (scalar, to minimise), "per_image" (B,), the weighted sum of the
            reconstruction losses; of each paradigm under its name, as "flow.…" (B,): its own
            "per_image", the t or mask ratio it was taken at, "level", and a discrete denoiser's
            "accuracy"; and "drift" (B,) where measured.
        """
        if images is not None or self.must_look or not cached:
            self.check_images(images, values=draws is None)  # a training loop knows its images
        if draws is None:
            draws = self.draw_from(torch.randint(2**62, (len(images) + 1,)).tolist(), images.device)
        # Alg. 1, line 3; Alg. 2, line 3: x̃ of the image, without gradient
        tokens = cached or self.tokenize(images)
        # Alg. 1, line 5; Alg. 2, line 5: v_θ(x), all that is known of the rest
        features, patches = self.encode(images, cached)
        chosen = self.choose_local(patches, draws.get("local_order"))
        result: dict[str, Tensor] = {}
        for name, paradigm in self.paradigms.items():
            with torch.no_grad():
                # Alg. 1, line 4 (at the t that line 6 has drawn); Alg. 2, line 4: most disappears
                task = paradigm.hide(tokens, draws)
            # Alg. 1, line 7; Alg. 2, line 6: Eq. (3) or Eq. (4). By Theorem 1, the lower it gets,
            # the more of x̃ is in the condition.
            found = paradigm.losses(task, *paradigm.condition(features, chosen))
            weighted = self.loss_weights[name] * found["per_image"]
            result["loss"] = result.get("loss", 0) + weighted.mean()
            result["per_image"] = result.get("per_image", 0) + weighted.detach()
            result |= {f"{name}.{key}": value.detach() for key, value in found.items()}
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

    def choose_local(self, patches: Tensor | None, local_order: Tensor | None) -> Tensor | None:
        """The share of the patch tokens (B, P, p) that joins the condition, (B, keep, p), taken in
        a random order (B, P); None where none does."""
        if not self.local_ratio:
            return None
        keep = round(self.local_ratio / 100 * self.patch_tokens)
        chosen = local_order[:, :keep, None].expand(-1, -1, patches.shape[-1])
        return patches.gather(1, chosen)  # (B, keep, p)

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
        every = [paradigm.draw for paradigm in self.paradigms.values()]
        return partial(draw_all, every, self.patch_tokens if self.local_ratio else 0)

    def draw_from(self, seeds: list[int], device: torch.device) -> dict[str, Tensor]:
        """`draw` for B images from B + 1 seeds, the first of which they share."""
        shared, *own = [torch.Generator().manual_seed(seed) for seed in seeds]
        return on_device(self.draw(own, shared), device)

    # -- what no training changes ----------------------------------------------------------------
    @torch.no_grad()
    def tokenize(self, images: Tensor) -> dict[str, Tensor]:
        """What the paradigms' tokenizers make of images (B, 3, H, W), by names of their own."""
        found: dict[str, Tensor] = {}
        for paradigm in self.paradigms.values():
            found |= paradigm.tokenize(images)
        return found

    @torch.no_grad()
    def precompute(self, images: Tensor) -> dict[str, Tensor]:
        """Everything about images that training cannot change, so that it can be computed once:
        what tokenizers make of them, and "original", the features of v_θ0 (B, d)."""
        self.check_images(images)
        return {**self.tokenize(images), "original": self.original_features(images)}

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

    def architecture(self, *names: str) -> dict:
        """What a checkpoint must agree on before its tensors can be used here; of the paradigms
        that are named, or of all."""
        about = {"clip": self.info.open_clip_config(), "local_ratio": self.local_ratio}
        for name in names or self.paradigms:
            parts = {"tokenizer": self.paradigms[name].tokenizer}
            parts["denoiser"] = self.paradigms[name].denoiser
            about[name] = {part: asdict(module.config) for part, module in parts.items()}
        return about


def draw_all(
    every: list[Callable], patch_tokens: int, generators: list[torch.Generator], shared
) -> dict[str, Tensor]:
    """What each paradigm draws and, of `patch_tokens` where local tokens join the condition, the
    order (B, P) in which they are taken. `shared`: a generator too."""
    draws: dict[str, Tensor] = {}
    for draw in every:
        draws |= draw(generators, shared)
    if patch_tokens:
        orders = [torch.randperm(patch_tokens, generator=g) for g in generators]
        draws["local_order"] = torch.stack(orders)  # (B, P)
    return draws


def on_device(draws: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Draws where they are needed. A count stays on the CPU: it decides a shape, and a GPU would
    have to be waited for."""
    return {k: v if v.ndim == 0 else v.to(device, non_blocking=True) for k, v in draws.items()}
