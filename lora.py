r"""LoRA from scratch: low-rank adapters for CLIP's image tower (Sec. 4.3, App. B, Fig. S2).

Stage 2 must change what CLIP sees without wrecking what it knows. The paper therefore does not
train the weights W themselves but a low-rank correction beside them,

    y = W x + b + (α / r) · B A · dropout(x),      A: (r, in), B: (out, r),

with r = α = 16 and dropout 0.1. A starts random and B at zero, so that at step 0 the model is
exactly the one we were given; every step then moves it within a small subspace.

What image towers demand of an implementation, and where naive ones fail:

* open_clip's attention is ``nn.MultiheadAttention``: q, k and v share one packed matrix, and the
  functional that runs it reads ``out_proj.weight`` directly. Wrapping ``out_proj`` alone does
  nothing, silently. ``LoRAAttention`` therefore runs the attention itself, with an adapter each for
  q, k, v and out.
* Folding B A into W before the product (``nn.utils.parametrize``) is neat, but the dropout on the
  adapter's *input* is lost. The adapters here see the input.
* Some owners never call their layers and read ``layer.weight`` instead: the pool of CLIP's ResNets,
  torchvision's Swin, BEiT, and ``nn.TransformerEncoderLayer`` in eval mode. What they read here is
  W + (α / r) B A, so their adapters work and learn; only these lose the dropout.
* ``visual.proj`` is a bare Parameter used as ``x @ proj``. ``LoRAProjection`` takes its place and
  answers to ``@``.
* timm towers (SigLIP) fuse q, k and v into one Linear: it gets three adapters as well.

Life of an adapted model: ``inject_lora`` → train what requires a gradient → save
``lora_state_dict`` alone, or ``merge_lora`` (and ``unmerge_lora``), or ``unload_lora``, which
leaves the original modules with the original state-dict keys and shapes. ``scale_lora`` sets how
much of what was learnt applies: 0 is the model we were given, 1 the trained one.

Letters: B batch, L tokens queried and S tokens looked at, D width, r rank. This module imports
nothing of this project.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Choice = str | Iterable[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class LoRASettings:
    """The paper's adapters. Raises: ValueError for a value that makes none."""

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.1
    bias: str = "lora_only"
    """"lora_only" also trains the biases of adapted layers (the official setting), "none" not."""

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"LoRA: rank {self.rank!r} must be a whole number, at least 1")
        if not (0 < self.alpha < math.inf and 0 <= self.dropout < 1):
            values = f"alpha {self.alpha}, dropout {self.dropout}"
            raise ValueError(f"LoRA: {values}: expected a positive alpha, a dropout in [0, 1)")
        if self.bias not in ("lora_only", "none"):
            raise ValueError(f"LoRA: bias policy {self.bias!r}, expected 'lora_only' or 'none'")


class Adapter(nn.Module):
    """One low-rank correction: x (…, d_in) → strength · (α/r) · B A dropout(x), (…, d_out).

    Args: like: a tensor whose device and dtype the adapter takes (float32 if that is half
        precision: steps of 1e-5 vanish in bf16).
    """

    def __init__(self, d_in: int, d_out: int, settings: LoRASettings, like: Tensor):
        super().__init__()
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        self.scaling, self.strength = settings.alpha / settings.rank, 1.0
        self.dropout = nn.Dropout(settings.dropout)
        self.A = nn.Parameter(torch.empty(settings.rank, d_in, device=like.device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(d_out, settings.rank, device=like.device, dtype=dtype))
        # Kaiming-uniform with a = √5, as nn.Linear starts and as the LoRA authors chose.
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def delta(self) -> Tensor:
        """The correction as a matrix to add to W, (d_out, d_in)."""
        return (self.scaling * self.strength) * (self.B @ self.A)


class LoRAWrapper(nn.Module):
    """A frozen `base` with `adapters`; the shared bookkeeping of merging and strength.

    Whatever else a tower asks of the layer (`in_features`, `num_heads`, …), the base answers, and
    with its Parameters as they now apply: those who read `weight` get W + (α/r) B A.

    Args:
        corrects: base parameter → names of the adapters that correct it, each a slice of its rows.
    """

    def __init__(self, base: nn.Module, corrects: dict[str, tuple[str, ...]]):
        super().__init__()
        self.base, self.corrects, self.strength = base, corrects, 1.0
        self.adapters = nn.ModuleDict()
        # Values before training of the biases that train: where strength 0 goes back to.
        self.given_biases: dict[str, Tensor] = {}
        self.merged, self._before_merge = False, {}

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(super().__getattr__("base"), name)
            return self.current(name) if isinstance(value, nn.Parameter) else value

    def biases(self) -> dict[str, nn.Parameter]:
        """The base's bias parameters by name: what the "lora_only" policy trains."""
        return {name: p for name, p in self.base.named_parameters() if name.endswith("bias")}

    def corrected(self, y: Tensor, x: Tensor, names: Iterable[str]) -> Tensor:
        """y + what these n adapters make of one x, side by side. x (…, d_in), y (…, n·d_out). They
        share a dropout mask, as where LoRA's authors adapt a packed matrix, so x is read once; and
        α/r scales the few numbers between A and B, not the many behind B."""
        if self.merged:
            return y
        adapters = [self.adapters[name] for name in names]
        first, a = adapters[0], torch.cat([adapter.A for adapter in adapters])  # (n·r, d_in)
        # A tower in half precision hands over halves and wants halves back; autocast sees to both.
        half = x.dtype != a.dtype and not torch.is_autocast_enabled(x.device.type)
        x = x.to(a.dtype) if half else x
        low = F.linear(first.dropout(x), a) * (first.scaling * first.strength)  # (…, n·r)
        more = F.linear(low, torch.block_diag(*[adapter.B for adapter in adapters]))  # (…, n·d_out)
        return y + (more.to(y.dtype) if half else more)

    def delta(self, name: str) -> Tensor:
        """ΔW of a base parameter, shaped like it."""
        return torch.cat([self.adapters[part].delta() for part in self.corrects[name]])

    def current(self, name: str) -> Tensor | None:
        """A base parameter as it now applies; gradients reach the adapters. Biases that train are
        b0 + strength · (b − b0), exactly so at strengths 0 and 1."""
        value = attrgetter(name)(self.base)  # None for a layer without bias
        if not self.merged and name in self.corrects:
            return value + self.delta(name).to(value.dtype)
        if not self.merged and name in self.given_biases and self.strength != 1:
            return torch.lerp(self.given_biases[name].to(value), value, self.strength)
        return value

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the adapters into the base. The old values are kept, so that unmerging is exact."""
        if not self.merged:
            folded = {name: self.current(name) for name in (*self.corrects, *self.given_biases)}
            self._before_merge = {n: self.base.get_parameter(n).clone() for n in folded}
            for name, value in folded.items():
                self.base.get_parameter(name).copy_(value)
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.merged:
            for name, value in self._before_merge.items():
                self.base.get_parameter(name).copy_(value)
            self.merged, self._before_merge = False, {}


class LoRALinear(LoRAWrapper):
    """nn.Linear plus adapters. `parts` = 3 treats a fused qkv as three layers, one adapter each.
    Raises: ValueError for weights that are integers, into which nothing can be folded."""

    def __init__(self, base: nn.Linear, settings: LoRASettings, parts: int = 1):
        names = tuple("qkv") if parts == 3 else ("linear",)
        super().__init__(base, {"weight": names})
        if not base.weight.is_floating_point():
            raise ValueError(f"LoRA: weights of type {base.weight.dtype} cannot be adapted")
        d_in, d_out = base.in_features, base.out_features // parts
        for name in names:
            self.adapters[name] = Adapter(d_in, d_out, settings, base.weight)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.current("bias")
        y = self.base(x) if bias is self.base.bias else F.linear(x, self.base.weight, bias)
        return self.corrected(y, x, self.adapters)


class LoRAAttention(LoRAWrapper):
    """nn.MultiheadAttention plus adapters on q, k, v and out, with the same call signature.

    Raises: ValueError for an attention with unequal widths (kdim, vdim), bias_k or add_zero_attn.
    """

    def __init__(self, base: nn.MultiheadAttention, settings: LoRASettings):
        super().__init__(base, {"in_proj_weight": tuple("qkv"), "out_proj.weight": ("out",)})
        if base.in_proj_weight is None or base.bias_k is not None or base.add_zero_attn:
            raise ValueError("LoRA: attention with kdim, vdim, bias_k or add_zero_attn")
        d = base.embed_dim
        for name in ("q", "k", "v", "out"):
            self.adapters[name] = Adapter(d, d, settings, base.in_proj_weight)

    @property
    def out_proj(self) -> SimpleNamespace:
        return SimpleNamespace(**{n: self.current(f"out_proj.{n}") for n in ("weight", "bias")})

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None,
        average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """query (B, L, D), key and value (B, S, D), or as `batch_first` has it → output like query,
        weights (B, L, S) or (B, heads, L, S) or None.

        Raises: ValueError for is_causal without the mask it is a hint about, and nested tensors.
        """
        if query.is_nested or (is_causal and attn_mask is None):
            raise ValueError("LoRA: attention takes no nested tensors, no is_causal without mask")
        base, bias, itself = self.base, self.current("in_proj_bias"), query is key and key is value
        whole, apart = "... l (heads e)", "... heads l e"
        if not base.batch_first and query.dim() == 3:
            whole, apart = "l b (heads e)", "b heads l e"
        if itself:  # one packed product, bit-equal to PyTorch's own
            packed = F.linear(query, base.in_proj_weight, bias)  # (B, L, 3·D)
            qkv = self.corrected(packed, query, "qkv").chunk(3, dim=-1)  # (B, L, D) each
        else:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            each = "qkv", (query, key, value), base.in_proj_weight.chunk(3), biases
            each = zip(*each, strict=True)
            qkv = (self.corrected(F.linear(x, w, b), x, name) for name, x, w, b in each)
        q, k, v = (rearrange(x, f"{whole} -> {apart}", heads=base.num_heads) for x in qkv)
        mask = self._one_mask(attn_mask, key_padding_mask, q)
        mixed = F.scaled_dot_product_attention(q, k, v, mask, base.dropout * self.training)
        mixed = rearrange(mixed, f"{apart} -> {whole}")  # (B, L, D)
        out = F.linear(mixed, base.out_proj.weight, self.current("out_proj.bias"))  # (B, L, D)
        out = self.corrected(out, mixed, ["out"])
        if not need_weights:
            return out, None
        scores = q @ k.mT * q.shape[-1] ** -0.5  # the function above keeps them to itself
        weights = (scores if mask is None else scores + mask).softmax(dim=-1)
        return out, weights.mean(dim=-3) if average_attn_weights else weights

    @staticmethod
    def _one_mask(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks of a call as one to add to the scores, (…, heads, L, S) or less.

        nn.MultiheadAttention and the function that mixes disagree: True means "do not look" to the
        one and "look" to the other. Adding −∞ leaves no doubt.
        """
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.reshape(*q.shape[:-1], -1)  # (B·heads, L, S) → (B, heads, L, S)
        if padding is not None:
            padding = padding[..., None, None, :]  # (B, S) → (B, 1, 1, S)
        masks = [mask for mask in (attn_mask, padding) if mask is not None]
        masks = [torch.where(m, -math.inf, 0.0) if m.dtype == torch.bool else m for m in masks]
        return sum(masks[1:], masks[0]).to(q.dtype) if masks else None


class LoRAProjection(LoRAWrapper):
    """Stands in for a Parameter P (d_in, d_out) that its owner uses as ``x @ P``. A tensor that
    does not know its right-hand operand lets Python ask the operand instead: ``__rmatmul__``."""

    def __init__(self, base: nn.Parameter, settings: LoRASettings):
        super().__init__(nn.ParameterDict({"proj": base}), {"proj": ("proj",)})
        self.adapters["proj"] = Adapter(base.shape[0], base.shape[1], settings, base)

    def delta(self, name: str) -> Tensor:
        return super().delta(name).T  # P stands the other way round than a Linear's W

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return self.corrected(x @ self.base["proj"], x, ["proj"])


def inject_lora(
    tower: nn.Module,
    *,
    targets: Choice = lambda name, layer: True,
    skip: Choice = ("attn_pool",),
    train: Choice = (),
    whole_clip: bool = False,
    **settings,
) -> list[str]:
    """Freeze `tower` and put adapters on its attentions, Linears and ``proj`` Parameters.

    Pass an *image* tower (`clip.visual`): the text tower must stay what it was.

    Args:
        targets, skip, train: modules, by dotted names ("blocks.0.attn.qkv") or whole parts of them
            ("attn", "blocks.0"), or by a function (name, module) → bool. `targets` get adapters; by
            default all. `skip` stay plain, with all they hold: SigLIP's attention pool, for 8.70 M
            parameters (r = 16) are the blocks' alone, and 8.87 M with the MLP of the pool, which
            peft's "all fc1 and fc2" would catch. `train` learn whole, such as a fresh head.
        whole_clip: adapt a model that holds a text tower as well.
        settings: `rank`, `alpha`, `dropout` and `bias` of `LoRASettings`.
    Returns: names of the adapted layers.
    Raises: ValueError for what cannot be adapted as asked; the tower is then as it was.
    """
    if unknown := settings.keys() - vars(LoRASettings()).keys():
        raise ValueError(f"LoRA: no setting {sorted(unknown)}; rank, alpha, dropout, bias exist")
    settings = LoRASettings(**settings)
    _check_tower(tower, whole_clip)
    names = [name for name, _ in (*tower.named_modules(), *tower.named_parameters())]
    wanted, skipped, whole = map(_chooser, (targets, skip, train), (names, None, names))
    learning = [name for name, module in tower.named_modules() if whole(name, module)]
    # All wrappers are built before the first is put in place: a refusal changes nothing.
    found = _adaptable(tower, "", lambda *module: skipped(*module) or whole(*module), set())
    adapted = [(o, n, _adapt(o, n, x, settings)) for o, n, x in found if wanted(n, x)]
    if not adapted:
        raise ValueError("LoRA: no Linear, MultiheadAttention or proj among targets, less skip")
    for inner in learning:
        if any(inner.startswith(f"{name}.") for _, name, _ in adapted):
            raise ValueError(f"LoRA: {inner} cannot train whole: it is part of an adapted layer")
    tower.requires_grad_(False)
    tower._learns_whole = learning
    for name in learning:
        tower.get_submodule(name).requires_grad_(True)
    for owner, name, wrapper in adapted:
        child = name.rpartition(".")[2]
        if isinstance(wrapper, LoRAProjection):
            delattr(owner, child)  # a Parameter's name does not take a module
        setattr(owner, child, wrapper)
        if settings.bias == "lora_only":
            for where, bias in wrapper.biases().items():
                wrapper.given_biases[where] = bias.detach().clone()
                bias.requires_grad_(True)
    return [name for _, name, _ in adapted]


def _check_tower(tower: nn.Module, whole_clip: bool) -> None:
    if isinstance(tower, (nn.Linear, nn.MultiheadAttention)):
        raise ValueError(
            f"LoRA: whoever holds this {type(tower).__name__} would go on with the plain one; pass "
            "the module that holds it, or tower = nn.Sequential(layer), and go on with tower[0]"
        )
    if any(True for _ in lora_layers(tower)):
        raise ValueError("LoRA: this tower has adapters already; unload them first")
    texts = ("encode_text", "get_text_features")  # open_clip's name and transformers'
    if not whole_clip and any(hasattr(m, name) for m in tower.modules() for name in texts):
        raise ValueError(
            "LoRA: this model holds a text tower, which must stay what it was; pass the image "
            "tower (clip.visual, model.vision_model), or say whole_clip=True"
        )


def _chooser(choice: Choice, names: list[str] | None) -> Callable[[str, nn.Module], bool]:
    """`choice` as a function. A part of none of the `names` is a typo, and refused."""
    if callable(choice):
        return choice
    parts = [choice] if isinstance(choice, str) else list(choice)
    for part in parts:
        if names is not None and not any(f".{part}." in f".{name}." for name in names):
            raise ValueError(f"LoRA: this tower has no module {part!r}")
    return lambda name, module: any(f".{part}." in f".{name}." for part in parts)


def _adaptable(owner: nn.Module, prefix: str, leave: Callable, seen: set) -> Iterator[tuple]:
    """(owner, dotted name, layer) of all that can get adapters, in the order of definition."""
    if owner in seen:  # a block that is used twice is adapted once
        return
    seen.add(owner)
    proj = owner._parameters.get("proj")
    if proj is not None and proj.dim() == 2 and not leave(prefix + "proj", proj):
        yield owner, prefix + "proj", proj
    for name, child in owner._modules.items():
        if child is None or leave(prefix + name, child):
            continue
        if not isinstance(child, (nn.Linear, nn.MultiheadAttention)):
            yield from _adaptable(child, prefix + name + ".", leave, seen)
            continue
        weight = next(child.parameters())
        if weight in seen:
            raise ValueError(f"LoRA: the weight of {prefix}{name} has two users; name it in skip")
        seen.add(weight)
        yield owner, prefix + name, child


def _adapt(owner: nn.Module, name: str, layer, settings: LoRASettings) -> LoRAWrapper:
    try:
        if isinstance(layer, nn.MultiheadAttention):
            return LoRAAttention(layer, settings).train(layer.training)
        if isinstance(layer, nn.Linear):
            fused = name.rpartition(".")[2] == "qkv" and layer.out_features % 3 == 0
            return LoRALinear(layer, settings, parts=3 if fused else 1).train(layer.training)
        return LoRAProjection(layer, settings).train(owner.training)
    except ValueError as error:
        raise ValueError(f"{error}: {name}; name it in skip") from None


def lora_layers(tower: nn.Module) -> Iterator[tuple[str, LoRAWrapper]]:
    """(dotted name in the original tower, wrapper) of every adapted layer."""
    return ((name, m) for name, m in tower.named_modules() if isinstance(m, LoRAWrapper))


def _learnt(tower: nn.Module) -> dict[str, Tensor]:
    """Adapters, and what trains with them, under stable names of our own."""
    tensors = {}
    for name, layer in lora_layers(tower):
        for part, adapter in layer.adapters.items():
            tensors |= {f"{name}.{part}.A": adapter.A, f"{name}.{part}.B": adapter.B}
        tensors |= {f"{name}.{b}": layer.base.get_parameter(b) for b in layer.given_biases}
    for prefix, module in tower.named_modules():
        for name in vars(module).get("_learns_whole", ()):
            for t, tensor in module.get_submodule(name).state_dict(keep_vars=True).items():
                tensors[f"{prefix}.{name}.{t}".lstrip(".")] = tensor
    return tensors


@contextmanager
def _unmerged(tower: nn.Module) -> Iterator[None]:
    """For a moment, adapters beside their weights; what was merged is then merged again."""
    merged = [layer for _, layer in lora_layers(tower) if layer.merged]
    for layer in merged:
        layer.unmerge()
    yield
    for layer in merged:
        layer.merge()


def lora_state_dict(tower: nn.Module) -> dict[str, Tensor]:
    """All that was learnt, at full strength: adapters, and by choice biases and whole layers."""
    with _unmerged(tower):
        return {name: p.detach().clone() for name, p in _learnt(tower).items()}


@torch.no_grad()
def load_lora_state_dict(tower: nn.Module, state: dict[str, Tensor]) -> None:
    """Put saved adapters into a tower that went through `inject_lora` with the same settings.

    Raises: ValueError naming the first tensor that is missing, left over or of another shape.
    """
    own = _learnt(tower)
    for name in sorted(own.keys() | state.keys()):
        here, there = (tuple(d[name].shape) if name in d else "absent" for d in (own, state))
        if here != there:
            raise ValueError(f"LoRA weights do not fit: {name} is {here} here, {there} in the file")
    with _unmerged(tower):
        for name, parameter in own.items():
            parameter.copy_(state[name])


def scale_lora(tower: nn.Module, strength: float) -> None:
    """Let `strength` times the learnt change apply: weights W + strength · ΔW, trained biases alike
    (not layers that `train` whole). 0 is the original function, 1 the trained one; not cumulative,
    merged or not. What merges takes the present strength; `lora_state_dict` is as at strength 1.

    Raises: ValueError for a strength that is no number, and for a tower without adapters.
    """
    layers = [layer for _, layer in lora_layers(tower)]
    if not layers:
        raise ValueError("LoRA: this tower has no adapters to scale; unload_lora is for good")
    if not (isinstance(strength, (int, float)) and math.isfinite(strength)):
        raise ValueError(f"LoRA: strength {strength} is no finite number")
    with _unmerged(tower):
        for layer in layers:
            for part in (layer, *layer.adapters.values()):
                part.strength = strength


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
        owner_name, _, child = name.rpartition(".")
        owner = tower.get_submodule(owner_name)
        original = layer.base["proj"] if isinstance(layer, LoRAProjection) else layer.base
        if isinstance(original, nn.Parameter):
            delattr(owner, child)
        setattr(owner, child, original)
    for module in tower.modules():
        vars(module).pop("_learns_whole", None)


def merged_state_dict(tower: nn.Module) -> dict[str, Tensor]:
    """What `unload_lora` would leave, without touching the tower, as for checkpoints."""
    twin = copy.deepcopy(tower)
    unload_lora(twin)
    return twin.state_dict()
