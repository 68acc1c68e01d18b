r"""LoRA from scratch: low-rank adapters for CLIP's image tower (Sec. 4.3, App. B, Fig. S2).

Stage 2 must change what CLIP sees without wrecking what it knows. The paper therefore does not
train the weights W themselves but a low-rank correction beside them,

    y = W x + b + (α / r) · B A · dropout(x),      A: (r, in), B: (out, r),

with r = α = 16 and dropout 0.1. A starts random and B at zero, so that at step 0 the model is
exactly the one we were given; every step then moves it within a small subspace.

What a CLIP tower demands of an implementation, and where naive ones fail:

* open_clip's attention is ``nn.MultiheadAttention``: q, k and v share one packed matrix, and the
  functional that runs it reads ``out_proj.weight`` directly. Wrapping ``out_proj`` alone does
  nothing, silently. ``LoRAAttention`` therefore runs the attention itself, with an adapter each for
  q, k, v and out.
* Folding B A into W before the product (``nn.utils.parametrize``) is neat, but the dropout on the
  adapter's *input* is lost. The adapters here see the input.
* ``visual.proj`` is a bare Parameter used as ``x @ proj``. ``LoRAProjection`` takes its place and
  answers to ``@``.
* timm towers (SigLIP) fuse q, k and v into one Linear: it gets three adapters as well.

Life of an adapted model: ``inject_lora`` → train ``lora_state_dict``'s tensors → save those alone,
or ``merge_lora`` (and ``unmerge_lora``), or ``unload_lora``, which leaves the original modules with
the original state-dict keys and shapes.

Letters: B batch, L tokens, D width, r rank. This module imports nothing of this project.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Adapter(nn.Module):
    """One low-rank correction: x (…, d_in) → (α/r) · B A dropout(x), (…, d_out).

    Args:
        like: a tensor whose device and dtype the adapter takes (float32 if that is half precision:
            steps of 1e-5 vanish in bf16).
    """

    def __init__(
        self, d_in: int, d_out: int, rank: int, alpha: float, dropout: float, like: Tensor
    ):
        super().__init__()
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.A = nn.Parameter(torch.empty(rank, d_in, device=like.device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(d_out, rank, device=like.device, dtype=dtype))
        # Kaiming-uniform with a = √5, as nn.Linear starts and as the LoRA authors chose.
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(self.dropout(x), self.A), self.B) * self.scaling

    def delta(self) -> Tensor:
        """The correction as a matrix to add to W, (d_out, d_in)."""
        return self.scaling * (self.B @ self.A)


class LoRAWrapper(nn.Module):
    """A frozen `base` with `adapters`; the shared bookkeeping of merging.

    Subclasses say which slice of which base tensor each adapter corrects (`_targets`).
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self._before_merge: list[Tensor] | None = None

    @property
    def merged(self) -> bool:
        return self._before_merge is not None

    def _targets(self) -> Iterator[tuple[Tensor, Adapter]]:
        """Views into the base's tensors, each shaped like its adapter's delta()."""
        raise NotImplementedError

    def biases(self) -> dict[str, nn.Parameter]:
        """The base's bias parameters by name: what the "lora_only" policy trains."""
        return {name: p for name, p in self.base.named_parameters() if name.endswith("bias")}

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the adapters into the base. The old values are kept, so that unmerging is exact."""
        if not self.merged:
            self._before_merge = [weight.clone() for weight, _ in self._targets()]
            for weight, adapter in self._targets():
                weight += adapter.delta().to(weight.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.merged:
            for (weight, _), before in zip(self._targets(), self._before_merge, strict=True):
                weight.copy_(before)
            self._before_merge = None


class LoRALinear(LoRAWrapper):
    """nn.Linear plus adapters. `parts` = 3 treats a fused qkv as three layers, one adapter each."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float, parts: int = 1):
        super().__init__(base)
        for i in range(parts):
            name = "qkv"[i] if parts == 3 else "linear"
            self.adapters[name] = Adapter(
                base.in_features, base.out_features // parts, rank, alpha, dropout, base.weight
            )

    # open_clip asks `mlp.c_fc.weight.dtype` to find out the tower's precision.
    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def _targets(self):
        return zip(self.base.weight.chunk(len(self.adapters)), self.adapters.values(), strict=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.merged:
            return y
        parts = [adapter(x) for adapter in self.adapters.values()]
        return y + torch.cat(parts, dim=-1)  # (…, d_out)


class LoRAAttention(LoRAWrapper):
    """nn.MultiheadAttention plus adapters on q, k, v and out, with the same call signature.

    Covers what CLIP towers use: batch_first, equal widths, no bias_k, no attention dropout.

    Raises: ValueError for an attention that is built otherwise, or asked for its weights.
    """

    def __init__(self, base: nn.MultiheadAttention, rank: int, alpha: float, dropout: float):
        super().__init__(base)
        if (
            not base.batch_first
            or base.in_proj_weight is None
            or base.bias_k is not None
            or base.dropout
        ):
            raise ValueError(
                "LoRA: attention must be batch_first, with packed in_proj, no bias_k and no dropout"
            )
        for name in ("q", "k", "v", "out"):
            self.adapters[name] = Adapter(
                base.embed_dim, base.embed_dim, rank, alpha, dropout, base.in_proj_weight
            )

    def _targets(self):
        weights = (*self.base.in_proj_weight.chunk(3), self.base.out_proj.weight)
        return zip(weights, self.adapters.values(), strict=True)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask=None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """query, key, value (B, L, D) → ((B, L, D), None)."""
        if need_weights or key_padding_mask is not None or is_causal:
            raise ValueError(
                "LoRA: attention weights, padding masks and is_causal are not supported here"
            )
        base, on = self.base, not self.merged
        if query is key and key is value:
            # Self-attention: one packed product, bit-equal to PyTorch's own.
            packed = F.linear(query, base.in_proj_weight, base.in_proj_bias)  # (B, L, 3·D)
            q, k, v = packed.chunk(3, dim=-1)  # (B, L, D) each
        else:
            biases = base.in_proj_bias.chunk(3) if base.in_proj_bias is not None else (None,) * 3
            inputs = (query, key, value)
            q, k, v = (
                F.linear(x, w, b)
                for x, w, b in zip(inputs, base.in_proj_weight.chunk(3), biases, strict=True)
            )
        if on:
            q, k, v = (
                q + self.adapters["q"](query),
                k + self.adapters["k"](key),
                v + self.adapters["v"](value),
            )
        q, k, v = (
            rearrange(x, "b l (heads e) -> b heads l e", heads=base.num_heads) for x in (q, k, v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        mixed = rearrange(mixed, "b heads l e -> b l (heads e)")
        out = F.linear(mixed, base.out_proj.weight, base.out_proj.bias)  # (B, L, D)
        if on:
            out = out + self.adapters["out"](mixed)
        return out, None


class LoRAProjection(LoRAWrapper):
    """Stands in for a Parameter P (d_in, d_out) that its owner uses as ``x @ P``.

    A tensor that does not know its right-hand operand lets Python ask the operand instead:
    ``__rmatmul__`` is called, and the owner's code need not change.
    """

    def __init__(self, base: nn.Parameter, rank: int, alpha: float, dropout: float):
        super().__init__(nn.ParameterDict({"proj": base}))
        self.adapters["proj"] = Adapter(base.shape[0], base.shape[1], rank, alpha, dropout, base)

    def _targets(self):
        yield self.base["proj"].T, self.adapters["proj"]  # a view: merging writes through it

    def __rmatmul__(self, x: Tensor) -> Tensor:
        y = x @ self.base["proj"]
        return y if self.merged else y + self.adapters["proj"](x)


# ------------------------------------------------------------------------------------------------
# On a whole tower
# ------------------------------------------------------------------------------------------------
def inject_lora(
    tower: nn.Module,
    rank: int = 16,
    alpha: float = 16.0,
    dropout: float = 0.1,
    bias: str = "lora_only",
    skip: tuple[str, ...] = ("attn_pool",),
) -> list[str]:
    """Freeze `tower` and put adapters on all its attentions, Linears and its ``proj`` Parameter.

    Pass an *image* tower (`clip.visual`): the text tower must stay what it was.

    Args:
        bias: "lora_only" also trains the biases of wrapped layers (the official setting),
            "none" does not.
        skip: modules whose dotted name contains one of these keep their plain layers. SigLIP's
            attention pool is left out: 8.70 M parameters (r = 16) are those of the blocks alone.
            With the pool's MLP, which peft's rule of thumb ("all fc1 and fc2") would catch, it is
            8.87 M.
    Returns: names of the wrapped layers.
    Raises: ValueError for a bad rank, bias policy, a tower already adapted, or nothing to adapt.
    """
    if rank < 1:
        raise ValueError(f"LoRA: rank {rank} must be at least 1")
    if bias not in ("lora_only", "none"):
        raise ValueError(f"LoRA: bias policy {bias!r}, expected 'lora_only' or 'none'")
    if any(True for _ in lora_layers(tower)):
        raise ValueError("LoRA: this tower has adapters already; unload them first")
    tower.requires_grad_(False)
    names = list(_wrap(tower, "", skip, (rank, alpha, dropout)))
    if not names:
        raise ValueError("LoRA: found no Linear, MultiheadAttention or proj to adapt")
    if bias == "lora_only":
        for _, layer in lora_layers(tower):
            for parameter in layer.biases().values():
                parameter.requires_grad_(True)
    return names


def _wrap(parent: nn.Module, prefix: str, skip: tuple[str, ...], settings: tuple) -> Iterator[str]:
    """Replace adaptable children of `parent`, recursively; yields their names."""
    if isinstance(getattr(parent, "proj", None), nn.Parameter):
        parameter = parent.proj
        del parent.proj
        parent.proj = LoRAProjection(parameter, *settings).train(parent.training)
        yield prefix + "proj"
    for name, child in list(parent.named_children()):
        full = prefix + name
        if isinstance(child, LoRAWrapper) or any(part in full for part in skip):
            continue
        if isinstance(child, nn.MultiheadAttention):
            setattr(parent, name, LoRAAttention(child, *settings).train(child.training))
            yield full
        elif isinstance(child, nn.Linear):
            layer = LoRALinear(child, *settings, parts=3 if name == "qkv" else 1)
            setattr(parent, name, layer.train(child.training))
            yield full
        else:
            yield from _wrap(child, full + ".", skip, settings)


def lora_layers(tower: nn.Module) -> Iterator[tuple[str, LoRAWrapper]]:
    """(dotted name in the original tower, wrapper) of every adapted layer."""
    return ((name, m) for name, m in tower.named_modules() if isinstance(m, LoRAWrapper))


def _trained_tensors(tower: nn.Module) -> dict[str, nn.Parameter]:
    """Adapters, and the biases that train with them, under stable names of our own."""
    tensors = {}
    for name, layer in lora_layers(tower):
        for part, adapter in layer.adapters.items():
            tensors |= {f"{name}.{part}.A": adapter.A, f"{name}.{part}.B": adapter.B}
        tensors |= {f"{name}.{b}": p for b, p in layer.biases().items() if p.requires_grad}
    return tensors


def lora_state_dict(tower: nn.Module) -> dict[str, Tensor]:
    """The adapters alone (and biases, by policy): all that stage 2 has learnt about CLIP."""
    return {name: p.detach().clone() for name, p in _trained_tensors(tower).items()}


@torch.no_grad()
def load_lora_state_dict(tower: nn.Module, state: dict[str, Tensor]) -> None:
    """Put saved adapters into a tower that went through `inject_lora` with the same settings.

    Raises: ValueError naming the first tensor that is missing, left over or of another shape.
    """
    own = _trained_tensors(tower)
    for name in sorted(own.keys() | state.keys()):
        here, there = own.get(name), state.get(name)
        if here is None or there is None or here.shape != there.shape:
            raise ValueError(
                f"LoRA weights do not fit this tower: {name} is "
                f"{'absent' if here is None else tuple(here.shape)} here and "
                f"{'absent' if there is None else tuple(there.shape)} in the file"
            )
    for name, parameter in own.items():
        parameter.copy_(state[name])


def merge_lora(tower: nn.Module) -> None:
    """Fold all adapters into the weights: same function, no extra cost. Reversible."""
    for _, layer in lora_layers(tower):
        layer.merge()


def unmerge_lora(tower: nn.Module) -> None:
    """Undo `merge_lora` exactly."""
    for _, layer in lora_layers(tower):
        layer.unmerge()


def unload_lora(tower: nn.Module) -> None:
    """Merge for good and put the original modules back: original state-dict keys and shapes."""
    merge_lora(tower)
    for name, layer in list(lora_layers(tower)):
        parent_name, _, child = name.rpartition(".")
        parent = tower.get_submodule(parent_name)
        if isinstance(layer, LoRAProjection):
            delattr(parent, child)
            parent.register_parameter(child, layer.base["proj"])
        else:
            setattr(parent, child, layer.base)


def merged_state_dict(tower: nn.Module) -> dict[str, Tensor]:
    """What `unload_lora` would leave, without touching the tower: for checkpoints in
    mid-training."""
    was_merged = [layer.merged for _, layer in lora_layers(tower)]
    merge_lora(tower)
    names = {}
    for name in tower.state_dict():
        if ".adapters." not in name:
            # "attn.base.in_proj_weight" → "attn.in_proj_weight"; "proj.base.proj" → "proj"
            names[name] = name.replace("proj.base.proj", "proj").replace(".base.", ".")
    state = {names[k]: v.detach().clone() for k, v in tower.state_dict().items() if k in names}
    for (_, layer), merged in zip(lora_layers(tower), was_merged, strict=True):
        if not merged:
            layer.unmerge()
    return state
