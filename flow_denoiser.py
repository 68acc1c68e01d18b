r"""The continuous denoiser: rectified flow on VAE latents, conditioned on CLIP (Fig. 3 b, Alg. 1).

The idea. Draw noise :math:`x_0`, take the data latent :math:`x_1`, and stand somewhere on the
straight line between them. A network that sees only that mixture, the time and a *condition* must
say which way the data lies. Everything the mixture has lost must come from the condition; here the
condition is nothing but CLIP's [CLS] token, so whatever would help the drawing and is missing from
[CLS] turns into gradient for CLIP's image tower.

Time runs as in the paper, everywhere in this project: **t = 0 is noise, t = 1 is data**,

    Eq. (1)   x_t = t x_1 + (1 − t) x_0,   x_0 ~ N(0, I),   target velocity  x_1 − x_0.

FLUX (and the authors' code) run time the other way, t' = 1 − t with target x_0 − x_1. It is the
same model: feed 1 − t to its time embedding and flip the sign of its output. ``flux_time=True``
does exactly that, and is what loading published FLUX weights needs. The scaled logit-normal below
is symmetric about 1/2, so nothing else changes.

Architecture: FLUX.1's transformer with fewer blocks. m double-stream blocks (MM-DiT: image and
condition tokens keep separate weights and meet in one attention), then 2m single-stream blocks
(Single-DiT: one concatenated sequence, attention and MLP in parallel); m = 2 by default (Sec. 5.1).
Module and state-dict names are FLUX's, so that its published weights fit at depth 19 + 38.

    CLIP [CLS] ─ projectors ─┬─ "vector"  (B, 768):      + time embedding → modulates every block
                             └─ "context" (B, T, 4096):  token(s) seen by joint attention

Letters: B batch, C latent channels, h w latent height and width, N = (h/2)·(w/2) image tokens,
T context tokens (1, or more with local tokens), D width, A heads, E = D/A width of a head.
This module imports nothing of this project: copy it freely.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


# ------------------------------------------------------------------------------------------------
# When: timestep samplers and their densities (Sec. 4.3, Tab. 4, Fig. S1)
# ------------------------------------------------------------------------------------------------
def sample_timesteps(
    count: int,
    distribution: str = "logit-normal",
    scale: float = 1.0,
    generator: torch.Generator | None = None,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Draw `count` times in [0, 1].

    "logit-normal" is the paper's scaled logit-normal; its `scale` s is Tab. 4's: small s stays near
    t = 1/2, where the paper has the velocity hardest to guess, large s piles up at both ends.
    "uniform" is rectified flow's own choice and Tab. 4's first row.

    Raises: ValueError for an unknown distribution or a scale that is not positive.
    """
    _check_distribution(distribution, scale)
    if distribution == "uniform":
        return torch.rand(count, generator=generator, device=device)
    epsilon = torch.randn(count, generator=generator, device=device)
    return torch.sigmoid(scale * epsilon)  # Eq. (6), Eq. (S1); Alg. 1, line 6


def timestep_density(t: Tensor, distribution: str = "logit-normal", scale: float = 1.0) -> Tensor:
    """The density that `sample_timesteps` draws from, at times t strictly inside (0, 1); any shape.

    With u = logit(t)/s standard normal, the change of variables gives φ(u) · du/dt, and
    du/dt = 1 / (s · t · (1 − t)). Raises: ValueError as `sample_timesteps`, and for other times.
    """
    _check_distribution(distribution, scale)
    if not ((t > 0) & (t < 1)).all():
        raise ValueError("timestep density: it is defined strictly between 0 and 1")
    if distribution == "uniform":
        return torch.ones_like(t)
    u = torch.logit(t) / scale
    normal = torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
    return normal / (scale * t * (1 - t))  # Fig. S1


def _check_distribution(distribution: str, scale: float) -> None:
    if distribution not in ("logit-normal", "uniform"):
        raise ValueError(f"timestep distribution {distribution!r}: 'logit-normal' or 'uniform'")
    if not scale > 0:
        raise ValueError(f"timestep scale {scale}: must be positive")


# ------------------------------------------------------------------------------------------------
# The path: the straight line from noise to data, its velocity, the loss, and following it back
# ------------------------------------------------------------------------------------------------
def straight_path(data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (1): the point x_t on the line from noise to data, and the line's constant velocity.

    Args: data, noise (B, ...); t (B,). Returns: x_t and velocity, both shaped like data.
    """
    t = t.view(-1, *[1] * (data.ndim - 1))
    x_t = t * data + (1 - t) * noise  # Alg. 1, line 4
    velocity = data - noise
    return x_t, velocity


def flow_matching_loss(predicted: Tensor, velocity: Tensor) -> Tensor:
    """Eq. (3) per image: mean squared error of the velocity. Both (B, ...) → (B,).

    The paper writes a squared norm; the mean over elements differs by a constant factor and keeps
    losses comparable between resolutions. Not yet averaged over the batch, so that it can be logged
    per bin of t.
    """
    error = (predicted - velocity).float()
    return error.square().flatten(1).mean(1)  # Eq. (3); Alg. 1, line 7


@torch.no_grad()
def euler_sample(
    velocity_of: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    steps: int = 25,
    trajectory: bool = False,
) -> Tensor:
    """Follow the velocity from noise (t = 0) to data (t = 1) in equal Euler steps.

    Args:
        velocity_of: (x_t (B, ...), t (B,)) → velocity (B, ...); the denoiser with its condition
            filled in.
        noise: (B, ...).
        trajectory: keep every point on the way.
    Returns: the end, (B, ...), or all points from the noise on, (steps + 1, B, ...).
    Raises: ValueError for less than one step.
    """
    if steps < 1:
        raise ValueError(f"Euler: {steps} steps, expected at least 1")
    points = [noise]
    for step in range(steps):
        x = points[-1]
        t = torch.full((len(x),), step / steps, device=x.device, dtype=x.dtype)
        points.append(x + velocity_of(x, t) / steps)
    return torch.stack(points) if trajectory else points[-1]


# ------------------------------------------------------------------------------------------------
# Embeddings
# ------------------------------------------------------------------------------------------------
def time_embedding(t: Tensor, width: int = 256, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of 1000·t, cosines first. (B,) → (B, width).

    The factor 1000 puts times in [0, 1] on the scale that these frequencies were made for.
    """
    half = width // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float64) / half
    )
    angles = 1000.0 * t.double()[:, None] * frequencies  # (B, width/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(t.dtype)  # (B, width)


def rope_angles(positions: Tensor, axes: tuple[int, ...], theta: float) -> Tensor:
    """Rotary angles, one axis after the other. (N, len(axes)) integer positions → (N, E/2).

    Each axis owns a slice of the head: `axes` = (16, 56, 56) gives 8 pairs to the (unused) first
    id, 28 to the row, 28 to the column. Always float64 here: in bf16, position 40 times a small
    frequency would be off by more than the frequency itself.
    """
    parts = []
    for axis, width in enumerate(axes):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
        parts.append(positions[:, axis, None].double() * theta**-exponents)  # (N, width/2)
    return torch.cat(parts, dim=-1)  # (N, E/2)


def rope_axes(head_width: int) -> tuple[int, int, int]:
    """FLUX's proportions for another width of a head: 7/16 each for row and column, the rest is
    unused. All are even, because features turn in pairs. Raises: ValueError for an odd width."""
    if head_width % 2:
        raise ValueError(f"denoiser: RoPE turns pairs, so a head of width {head_width} has no axes")
    side = 2 * round(7 * head_width / 32)
    return head_width - 2 * side, side, side


@lru_cache(maxsize=64)
def rope_turns(sizes: tuple[int, ...], axes: tuple[int, ...], theta: float, like) -> Tensor:
    """e^(i·angle) of T context tokens at (0, 0, 0), then of image tokens at (0, row, column): made
    once, on the device that uses it, so that no step waits for a copy. `sizes` T, h, w; `like`
    device and dtype → (T+N, E/2)."""
    (context, *grid), (device, dtype) = sizes, like
    with torch.inference_mode(False):  # whoever comes first, all can train with it
        places = torch.cartesian_prod(*(torch.arange(n, device=device) for n in (1, *grid)))
        ids = torch.cat([places.new_zeros(context, 3), places])  # (T+N, 3)
        angles = rope_angles(ids, axes, theta)
        kind = torch.complex128 if dtype == torch.float64 else torch.complex64
        return torch.polar(torch.ones_like(angles), angles).to(kind)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn neighbouring pairs of features, each pair a complex number: one product, no copies.
    x (B, A, N, E), turns (N, E/2)."""
    full = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    pairs = torch.view_as_complex(full.unflatten(-1, (-1, 2)))  # (B, A, N, E/2)
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)  # (B, A, N, E)


class EmbeddingMLP(nn.Module):
    """Linear → SiLU → Linear: brings time, guidance and the vector to width D."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.in_layer = nn.Linear(d_in, d_out)
        self.out_layer = nn.Linear(d_out, d_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))  # (B, d_in) → (B, D)


# ------------------------------------------------------------------------------------------------
# Parts of a block
# ------------------------------------------------------------------------------------------------
class RMSNorm(nn.Module):
    """Divide by the root mean square (in float32, whatever comes in), then scale. Last axis."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.scale.to(x.dtype), 1e-6)


class QKNorm(nn.Module):
    """Separate RMSNorms for queries and keys: attention logits cannot blow up in low precision."""

    def __init__(self, head_width: int):
        super().__init__()
        self.query_norm = RMSNorm(head_width)
        self.key_norm = RMSNorm(head_width)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


class SelfAttention(nn.Module):
    """The projections of one stream; the attention itself is joint, so the block calls it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = QKNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return split_heads(self.qkv(x).chunk(3, dim=-1), self.heads, self.norm)  # 3 × (B, A, N, E)


def split_heads(qkv: Sequence[Tensor], heads: int, norm: QKNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Three of (B, N, D) → normalised q and k, and v, each (B, A, N, E)."""
    q, k, v = (rearrange(x, "b n (heads e) -> b heads n e", heads=heads) for x in qkv)
    return *norm(q, k), v


def attend(q: Tensor, k: Tensor, v: Tensor, rope: Tensor) -> Tensor:
    """Rotary softmax attention. q, k, v (B, A, N, E) → (B, N, D)."""
    out = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v)
    return rearrange(out, "b heads n e -> b n (heads e)")


class Modulation(nn.Module):
    """Adaptive LayerNorm: the condition vector sets shift, scale and gate of each sub-block."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.count = count
        self.lin = nn.Linear(width, count * width)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vector))[:, None, :].chunk(self.count, dim=-1)  # count × (B, 1, D)


def modulate(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) · LayerNorm(x) + shift; the norm has no parameters, the condition has them."""
    return (1 + scale) * norm(x) + shift


def plain_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


def mlp(width: int, hidden: int) -> nn.Sequential:
    gelu = nn.GELU(approximate="tanh")
    return nn.Sequential(nn.Linear(width, hidden), gelu, nn.Linear(hidden, width))


# ------------------------------------------------------------------------------------------------
# MM-DiT and Single-DiT (Sec. 4.4, Fig. 3 b)
# ------------------------------------------------------------------------------------------------
class DoubleStreamBlock(nn.Module):
    """MM-DiT: two sets of weights, one attention. Condition and image can thus speak their own
    language and still look at each other."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.img_mod, self.txt_mod = Modulation(width, 6), Modulation(width, 6)
        self.img_norm1, self.txt_norm1 = plain_norm(width), plain_norm(width)
        self.img_attn, self.txt_attn = SelfAttention(width, heads), SelfAttention(width, heads)
        self.img_norm2, self.txt_norm2 = plain_norm(width), plain_norm(width)
        self.img_mlp, self.txt_mlp = mlp(width, hidden), mlp(width, hidden)

    def forward(
        self, img: Tensor, txt: Tensor, vector: Tensor, rope: Tensor
    ) -> tuple[Tensor, Tensor]:
        """img (B, N, D), txt (B, T, D), vector (B, D) → img and txt, same shapes."""
        # Shift, scale and gate, once for the attention and once for the MLP: (B, 1, D) each.
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vector)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vector)

        # Apart until here; now one attention over all tokens of both streams.
        txt_normed = modulate(self.txt_norm1, txt, txt_shift1, txt_scale1)  # (B, T, D)
        img_normed = modulate(self.img_norm1, img, img_shift1, img_scale1)  # (B, N, D)
        txt_qkv = self.txt_attn.queries_keys_values(txt_normed)  # 3 × (B, A, T, E)
        img_qkv = self.img_attn.queries_keys_values(img_normed)  # 3 × (B, A, N, E)
        joint = [torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv, strict=True)]
        mixed = attend(*joint, rope)  # 3 × (B, A, T+N, E) → (B, T+N, D)
        txt_mixed, img_mixed = mixed.split([txt.shape[1], img.shape[1]], dim=1)

        img = img + img_gate1 * self.img_attn.proj(img_mixed)
        img = img + img_gate2 * self.img_mlp(modulate(self.img_norm2, img, img_shift2, img_scale2))
        txt = txt + txt_gate1 * self.txt_attn.proj(txt_mixed)
        txt = txt + txt_gate2 * self.txt_mlp(modulate(self.txt_norm2, txt, txt_shift2, txt_scale2))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Single-DiT: one sequence, attention and MLP side by side behind one fused Linear each way."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.heads, self.hidden = heads, int(width * mlp_ratio)
        self.modulation = Modulation(width, 3)
        self.pre_norm = plain_norm(width)
        # Fused: q, k, v and the MLP's first layer; then attention's and the MLP's last layer.
        self.linear1 = nn.Linear(width, 3 * width + self.hidden)
        self.norm = QKNorm(width // heads)
        self.linear2 = nn.Linear(width + self.hidden, width)

    def forward(self, x: Tensor, vector: Tensor, rope: Tensor) -> Tensor:
        """x (B, T+N, D), vector (B, D) → (B, T+N, D)."""
        shift, scale, gate = self.modulation(vector)  # (B, 1, D) each
        fused = self.linear1(modulate(self.pre_norm, x, shift, scale))  # (B, T+N, 3·D + hidden)
        *qkv, hidden = fused.split([*[x.shape[-1]] * 3, self.hidden], dim=-1)
        mixed = attend(*split_heads(qkv, self.heads, self.norm), rope)  # (B, T+N, D)
        both = torch.cat([mixed, F.gelu(hidden, approximate="tanh")], dim=-1)  # (…, D + hidden)
        return x + gate * self.linear2(both)  # (B, T+N, D)


class FinalLayer(nn.Module):
    """Modulated norm and projection back to patches. (B, N, D) → (B, N, 4·C)."""

    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.norm_final = plain_norm(width)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vector)[:, None, :].chunk(2, dim=-1)  # (B, 1, D) each
        return self.linear(modulate(self.norm_final, x, shift, scale))


# ------------------------------------------------------------------------------------------------
# The denoiser g_φ
# ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class FlowDenoiserConfig:
    """Shape of the denoiser. The defaults are the paper's full size, 1.31 B parameters (Tab. 7)."""

    latent_channels: int = 16
    """C of the VAE; a token is a 2×2 patch, so 4·C numbers"""
    width: int = 3072
    """D"""
    heads: int = 24
    """A; the width of a head D/A must be the sum of `axes`"""
    mlp_ratio: float = 4.0
    """hidden width of the MLPs, in units of D"""
    double_blocks: int = 2
    """m MM-DiT blocks (Tab. 5: 1, 2, 3, 4)"""
    single_blocks: int = 4
    """Single-DiT blocks, 2m in the paper"""
    axes: tuple[int, ...] | None = None
    """RoPE widths of (unused, row, column); None: FLUX's proportions, (16, 56, 56) of 128"""
    theta: float = 10_000.0
    """RoPE base"""
    vector_dim: int = 768
    """width of the modulation vector"""
    context_dim: int = 4096
    """width of a context token"""
    guidance: bool = True
    """FLUX.1-dev's guidance embedding, fed 4.0 as in the official code: a learnt bias"""
    flux_time: bool = False
    """weights were trained with FLUX's direction of time (see the top of this file)"""
    initialisation: str = "pytorch"
    """"pytorch": defaults, as the official code; "adaln-zero": gates and output start at zero"""

    def __post_init__(self):
        if self.axes is None:
            object.__setattr__(self, "axes", rope_axes(self.width // max(1, self.heads)))

    @classmethod
    def small(cls, **changes) -> "FlowDenoiserConfig":
        """A shape for trials on a CPU: 0.7 M parameters. `changes`: fields by name."""
        size = {"latent_channels": 4, "width": 96, "heads": 3, "double_blocks": 1}
        size |= {"single_blocks": 2, "vector_dim": 64, "context_dim": 64, "guidance": False}
        return cls(**{**size, **changes})


class FlowDenoiser(nn.Module):
    """The velocity field g_φ(x_t, t, condition) of Eq. (3).

    Raises: ValueError where heads, width and RoPE axes do not fit together.
    """

    GUIDANCE = 4.0

    def __init__(self, config: FlowDenoiserConfig = FlowDenoiserConfig()):
        super().__init__()
        c = self.config = config
        if len(c.axes) != 3 or any(a % 2 or a < 0 for a in c.axes):
            raise ValueError(f"denoiser: RoPE axes {c.axes} must be three even numbers")
        if c.width != c.heads * (axes := sum(c.axes)):
            raise ValueError(f"denoiser: width {c.width} is not heads {c.heads} × RoPE axes {axes}")
        token = 4 * c.latent_channels
        self.img_in = nn.Linear(token, c.width)
        self.time_in = EmbeddingMLP(256, c.width)
        self.vector_in = EmbeddingMLP(c.vector_dim, c.width)
        self.guidance_in = EmbeddingMLP(256, c.width) if c.guidance else None
        self.txt_in = nn.Linear(c.context_dim, c.width)
        shape = c.width, c.heads, c.mlp_ratio
        double = [DoubleStreamBlock(*shape) for _ in range(c.double_blocks)]
        single = [SingleStreamBlock(*shape) for _ in range(c.single_blocks)]
        self.double_blocks, self.single_blocks = nn.ModuleList(double), nn.ModuleList(single)
        self.final_layer = FinalLayer(c.width, token)
        self._initialise()

    def _initialise(self) -> None:
        """PyTorch's defaults are the official code's choice. AdaLN-zero (DiT) makes every block the
        identity and the output zero at step 0: steadier, and offered beside it."""
        if (name := self.config.initialisation) == "adaln-zero":
            zeroed = [m.lin for m in self.modules() if isinstance(m, Modulation)]
            zeroed += [self.final_layer.adaLN_modulation[1], self.final_layer.linear]
            for tensor in (p for linear in zeroed for p in linear.parameters()):
                nn.init.zeros_(tensor)
        elif name != "pytorch":
            raise ValueError(f"initialisation {name!r}: expected 'pytorch' or 'adaln-zero'")

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor, vector: Tensor) -> Tensor:
        """Velocity at x_t.

        Args:
            x_t: noisy latents (B, C, h, w), h and w even.
            t: times (B,), 1 at the data.
            context: condition tokens (B, T, context_dim), all at position (0, 0, 0).
            vector: condition vector (B, vector_dim).
        Returns: velocity (B, C, h, w), pointing from noise to data.
        Raises: ValueError where one of them has another shape.
        """
        self._check(x_t, t, context, vector)
        c, h, w = self.config, x_t.shape[2] // 2, x_t.shape[3] // 2
        img = rearrange(x_t, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)  # (B, N, 4·C)
        img = self.img_in(img)  # (B, N, D)
        txt = self.txt_in(context)  # (B, T, D)

        clock = 1 - t if c.flux_time else t
        modulation = self.time_in(time_embedding(clock)) + self.vector_in(vector)  # (B, D)
        if self.guidance_in is not None:
            strength = torch.full_like(t, self.GUIDANCE)
            modulation = modulation + self.guidance_in(time_embedding(strength))  # (B, D)

        # Fake tensors (shapes without numbers) are of no use to the next caller, so not kept.
        turns_of = rope_turns if type(img) is Tensor else rope_turns.__wrapped__
        rope = turns_of((txt.shape[1], h, w), tuple(c.axes), c.theta, (img.device, img.dtype))
        for block in self.double_blocks:
            img, txt = block(img, txt, modulation, rope)
        x = torch.cat([txt, img], dim=1)  # (B, T+N, D)
        for block in self.single_blocks:
            x = block(x, modulation, rope)
        out = self.final_layer(x[:, txt.shape[1] :], modulation)  # (B, N, 4·C)
        out = rearrange(out, "b (h w) (c p q) -> b c (h p) (w q)", h=h, w=w, p=2, q=2)  # (B, C, …)
        return -out if c.flux_time else out

    def _check(self, x_t: Tensor, t: Tensor, context: Tensor, vector: Tensor) -> None:
        c, batch, even = self.config, len(x_t), "any even"  # a token is 2×2 latents
        expected = {"x_t": (batch, c.latent_channels, even, even), "t": (batch,)}
        expected |= {"context": (batch, "any", c.context_dim), "vector": (batch, c.vector_dim)}
        for (name, shape), x in zip(expected.items(), (x_t, t, context, vector), strict=True):
            sizes = zip(shape, x.shape, strict=False)
            if x.ndim != len(shape) or not all(
                want in (have, "any") or (want == even and have % 2 == 0) for want, have in sizes
            ):
                words = str(shape).replace("'", "")
                raise ValueError(f"{name}: expected {words}, got {tuple(x.shape)}")
