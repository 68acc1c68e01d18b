"""The discrete denoiser: a Perceiver that guesses masked VQ-GAN indices (Fig. 3 c, Alg. 2).

The idea. A VQ-GAN turns the image into a grid of N integers. Hide most of them; a small network
must name the hidden ones from the few that are left and a *condition*. Neighbours tell texture and
edges, but what stands where nothing is visible must come from the condition, and the condition is
nothing but CLIP's [CLS] token. What would help the guessing and is missing from [CLS] turns into
gradient for CLIP's image tower, exactly as with the continuous denoiser (Key Point #3).

    indices s (B, N) ──► codebook rows ──► Linear + position ─┬─ visible ──► conditioner ──► c
                                                              └─ masked: thrown away       │
    [CLS] ── projector ──► k (B, T, D) ──────────────────────────► conditioner             │
    mask token + position of each hidden cell = the latents q ──► 6 × Perceiver layer ◄────┘
                                                                  └─► logits over K codes

The authors never published this half. Theirs: a Perceiver of 6 layers, a VQ-GAN's codebook, mask
ratios from U(50 %, 90 %), the cross-attention of Alg. 2, line 5, the loss of Eq. (4). Our reading
of what they leave open ("what the latents are", where mask tokens enter, the residual, the start
token, width and heads) is in docs/DIFFERENCES.md, each with its reason.

Letters: B batch, N tokens of the grid, V visible and M masked ones (V + M = N), K codes, E width of
a code, D width, A heads, T condition tokens (1, or more with local tokens), L latents.
This module imports nothing of this project: copy it freely.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


# ------------------------------------------------------------------------------------------------
# Masking (Alg. 2, line 4)
# ------------------------------------------------------------------------------------------------
def check_mask_range(low: float, high: float) -> None:
    """Raises: ValueError unless 0 < low ≤ high ≤ 1. Equal ends are a fixed ratio (Tab. S1)."""
    if not 0 < low <= high <= 1:
        raise ValueError(f"mask ratio from {low} to {high}: expected 0 < from ≤ to ≤ 1")


def draw_masked_count(
    tokens: int, low: float = 0.5, high: float = 0.9, generator: torch.Generator | None = None
) -> int:
    """M = round(r·N) with r ~ U(low, high), at least 1: one number for a whole batch, because
    tensors must be rectangular and padding would waste what masking saved."""
    check_mask_range(low, high)
    ratio = low + (high - low) * torch.rand((), generator=generator).item()
    return max(1, round(ratio * tokens))


def split_positions(order: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A permutation of the N positions per image → visible (B, V) and masked (B, M = count) ones:
    a random subset and its complement, a partition by construction."""
    return order[:, count:], order[:, :count]


def take(x: Tensor, positions: Tensor) -> Tensor:
    """Rows of each image at its own positions. (B, N, …), (B, V) → (B, V, …)."""
    return x[torch.arange(len(x), device=x.device)[:, None], positions]


# ------------------------------------------------------------------------------------------------
# Parts
# ------------------------------------------------------------------------------------------------
def sincos_positions(side: int, width: int) -> Tensor:
    """2-D sine-cosine rows for a square grid, (side², width): half for the row, half for the
    column. Raises: ValueError where the width is no multiple of 4."""
    if width % 4:
        raise ValueError(f"Perceiver: width {width} must be a multiple of 4")
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # (side, D/4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D/2)
    rows = axis[:, None].expand(side, side, -1)
    columns = axis[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).float()  # (N, D)


class Attention(nn.Module):
    """Multi-head attention from one sequence to another. Both arrive normalised."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """queries (B, Q, D), context (B, C, D) → (B, Q, D)."""
        q = rearrange(self.q(queries), "b n (a e) -> b a n e", a=self.heads)
        k, v = rearrange(self.kv(context), "b n (two a e) -> two b a n e", two=2, a=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, A, Q, D/A)
        return self.out(rearrange(mixed, "b a n e -> b n (a e)"))


class Conditioner(nn.Module):
    """Alg. 2, line 5: the visible tokens look at themselves and at the condition. Here, and nowhere
    else, does CLIP enter."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_visible = nn.LayerNorm(width)
        self.norm_condition = nn.LayerNorm(width)
        self.attention = Attention(width, heads)

    def forward(self, visible: Tensor, condition: Tensor) -> Tensor:
        """visible (B, V, D), condition (B, T, D) → c (B, V, D)."""
        q = self.norm_visible(visible)  # Alg. 2, line 5: Q = x̃_unmask
        kv = torch.cat([q, self.norm_condition(condition)], dim=1)  # (B, V+T, D)
        return visible + self.attention(q, kv)  # Alg. 2, line 5: c


class PerceiverLayer(nn.Module):
    """Latents read the context, then one another, then an MLP works on each; norms first."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm_cross, self.norm_context = nn.LayerNorm(width), nn.LayerNorm(width)
        self.cross = Attention(width, heads)
        self.norm_self = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        """latents (B, L, D), context (B, V, D) → (B, L, D)."""
        latents = latents + self.cross(self.norm_cross(latents), self.norm_context(context))
        normed = self.norm_self(latents)
        latents = latents + self.self_attention(normed, normed)
        return latents + self.mlp(self.norm_mlp(latents))


# ------------------------------------------------------------------------------------------------
# The denoiser g_φ
# ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PerceiverDenoiserConfig:
    """Shape of the denoiser. The defaults are the full size on 224 px."""

    codes: int = 1024
    """K of the VQ-GAN"""
    code_width: int = 256
    """E of the VQ-GAN"""
    side: int = 14
    """the grid has side × side = N tokens: 14 at 224 px, 21 at 336, 24 at 384"""
    width: int = 1024
    """D; the condition is as wide"""
    heads: int = 16
    """A"""
    mlp_ratio: float = 4.0
    """hidden width of the MLPs, in units of D"""
    layers: int = 6
    """Perceiver layers (Tab. 5: 2, 4, 6, 8)"""
    learnt_latents: int = 0
    """0: one latent per masked token. L > 0: the other reading, L learnt latents, which the masked
    tokens read at the end"""

    @classmethod
    def small(cls, **changes) -> "PerceiverDenoiserConfig":
        """A shape for trials on a CPU: 64 tokens, 0.17 M parameters. `changes`: fields by name."""
        size = {"codes": 256, "code_width": 32, "side": 8, "width": 64, "heads": 4, "layers": 2}
        return cls(**{**size, **changes})


class PerceiverDenoiser(nn.Module):
    """g_φ(s_mask | s_unmask, c) of Eq. (4).

    Raises: ValueError where width and heads do not fit together.
    """

    def __init__(self, config: PerceiverDenoiserConfig = PerceiverDenoiserConfig()):
        super().__init__()
        c = self.config = config
        if c.width % c.heads:
            raise ValueError(f"Perceiver: width {c.width} is no multiple of {c.heads} heads")
        self.code_in = nn.Linear(c.code_width, c.width)
        self.position = nn.Parameter(sincos_positions(c.side, c.width))  # learnt from there on
        self.start_token = nn.Parameter(0.02 * torch.randn(c.width))
        self.mask_token = nn.Parameter(0.02 * torch.randn(c.width))
        self.conditioner = Conditioner(c.width, c.heads)
        self.layers = nn.ModuleList(
            PerceiverLayer(c.width, c.heads, c.mlp_ratio) for _ in range(c.layers)
        )
        if c.learnt_latents:
            self.latents = nn.Parameter(0.02 * torch.randn(c.learnt_latents, c.width))
            self.read_out = PerceiverLayer(c.width, c.heads, c.mlp_ratio)
        self.norm_out = nn.LayerNorm(c.width)
        self.head = nn.Linear(c.width, c.codes)
        # Nearly equal logits: an untrained denoiser guesses uniformly, at a loss of ln K.
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, codes: Tensor, visible: Tensor, masked: Tensor, condition: Tensor) -> Tensor:
        """Logits for the masked tokens.

        Args:
            codes: codebook rows x̃ of all tokens (B, N, E). Those of masked tokens are not read.
            visible, masked: positions (B, V) and (B, M); V may be 0.
            condition: projected [CLS] (plus local tokens in the ablation), (B, T, D).
        Returns: logits (B, M, K), in the order of `masked`.
        Raises: ValueError where codes or condition have another shape.
        """
        config = self.config
        grid, width = (config.side**2, config.code_width), config.width
        if codes.ndim != 3 or codes.shape[1:] != grid:
            raise ValueError(f"codes: expected (B, {grid[0]}, {grid[1]}), got {tuple(codes.shape)}")
        if condition.ndim != 3 or condition.shape[::2] != (len(codes), width):
            expected = f"({len(codes)}, T, {width})"
            raise ValueError(f"condition: expected {expected}, got {tuple(condition.shape)}")
        # F.embedding, not self.position[…]: the gradient of an index adds up in any order when a
        # CPU has several threads, and the same seed would give another run.
        seen = self.code_in(take(codes, visible)) + F.embedding(visible, self.position)  # (B, V, D)
        start = self.start_token.expand(len(codes), 1, -1)
        c = self.conditioner(torch.cat([start, seen], dim=1), condition)  # (B, 1+V, D)
        queries = self.mask_token + F.embedding(masked, self.position)  # (B, M, D)
        if config.learnt_latents:
            latents = self.latents.expand(len(codes), -1, -1)  # (B, L, D)
            for layer in self.layers:
                latents = layer(latents, c)
            queries = self.read_out(queries, latents)  # (B, M, D)
        else:
            for layer in self.layers:
                queries = layer(queries, c)
        return self.head(self.norm_out(queries))  # (B, M, K)


def masked_cross_entropy(logits: Tensor, indices: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (4) per image: mean cross-entropy over the masked tokens, and how many are guessed.

    Eq. (2) predicts one token after the other; here all masked ones are predicted at once from the
    visible. The paper's product is a sum of logarithms; the mean keeps losses at different ratios
    comparable. Uniform guessing costs ln K.

    Args: logits (B, M, K), row m for position masked[m]; indices (B, N) of all; masked (B, M).
    Returns: loss (B,) in nats, and the share of right guesses (B,).
    """
    labels = take(indices, masked)  # (B, M)
    each = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")  # (B, M)
    return each.mean(1), (logits.argmax(-1) == labels).float().mean(1)  # Eq. (4)


# ------------------------------------------------------------------------------------------------
# Looking at it: iterative parallel decoding (as MaskGIT)
# ------------------------------------------------------------------------------------------------
@torch.no_grad()
def parallel_decode(
    logits_of: Callable[[Tensor, Tensor, Tensor], Tensor],
    indices: Tensor,
    known: Tensor,
    steps: int = 8,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill in unknown tokens, the surest first: all are guessed at once, the surest guesses are
    kept, the others hidden again and guessed anew. How many stay hidden follows a quarter cosine.

    Args:
        logits_of: (indices (B, N), visible (B, V), masked (B, M)) → logits (B, M, K).
        indices: (B, N); only known ones are looked at.
        known: bool (B, N), equally many per image; all False draws from the condition alone.
        temperature: of the noise on confidence, fading to 0: lets unlikely but true details in.
        generator: on the CPU.
    Returns: completed indices (B, N). Raises: ValueError for less than one step.
    """
    if steps < 1:
        raise ValueError(f"parallel decoding: {steps} steps, expected at least 1")
    indices, known = indices.clone(), known.clone()
    start = int((~known[0]).sum())
    for step in range(1, steps + 1):
        masked_count = int((~known[0]).sum())
        if masked_count == 0:
            break
        order = known.int().argsort(dim=1, stable=True)  # unknown positions first
        visible, masked = split_positions(order, masked_count)
        log_p = F.log_softmax(logits_of(indices, visible, masked).float(), dim=-1)  # (B, M, K)
        # argmax(log p + Gumbel noise) is a draw from p.
        guess = (log_p + _gumbel(log_p, generator)).argmax(-1)  # (B, M)
        confidence = log_p.gather(2, guess[..., None])[..., 0]  # (B, M)
        fading = temperature * (1 - step / steps)
        confidence = confidence + fading * _gumbel(confidence, generator)
        hidden_after = math.floor(start * math.cos(0.5 * math.pi * step / steps))
        keep = max(1, masked_count - hidden_after) if step < steps else masked_count
        best = confidence.topk(keep, dim=1).indices  # (B, keep)
        kept = masked.gather(1, best)
        indices.scatter_(1, kept, guess.gather(1, best))
        known.scatter_(1, kept, torch.ones_like(kept, dtype=torch.bool))
    return indices


def _gumbel(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Gumbel noise shaped like a tensor; drawn on the CPU, so that every device draws the same."""
    uniform = torch.rand(like.shape, generator=generator).clamp(1e-9, 1 - 1e-7)
    return -torch.log(-torch.log(uniform)).to(like.device)


if __name__ == "__main__":  # the whole file in a dozen lines, on random numbers
    small = PerceiverDenoiserConfig.small()
    denoiser, tokens = PerceiverDenoiser(small), small.side**2
    indices = torch.randint(small.codes, (2, tokens))  # what a VQ-GAN would give
    codebook, condition = torch.randn(small.codes, small.code_width), torch.randn(2, 1, small.width)
    order = torch.stack([torch.randperm(tokens) for _ in indices])
    visible, masked = split_positions(order, draw_masked_count(tokens))
    logits = denoiser(codebook[indices], visible, masked, condition)
    loss, right = masked_cross_entropy(logits, indices, masked)
    print(f"{sum(p.numel() for p in denoiser.parameters()) / 1e6:.2f} M parameters")
    print(f"{masked.shape[1]} of {tokens} tokens masked; untrained, {right.mean():.1%} guessed")
    print(f"loss {loss.mean():.3f} nats; guessing uniformly costs {math.log(small.codes):.3f}")
