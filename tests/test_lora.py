"""lora.py on open_clip's ViT and on a timm trunk: identity, merging, strength, what trains, counts.

Other people's models are in test_lora_others.py.
"""

import copy

import open_clip
import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora
from pretrained.backbones import ClipInfo, build_clip

CFG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1},
}


def make_clip():
    torch.manual_seed(0)
    return open_clip.CLIP(**CFG).eval()


class SiglipLike(nn.Module):
    """The part of open_clip's TimmModel that matters: a timm ViT under the name `trunk`."""

    def __init__(self):
        super().__init__()
        self.trunk = timm.models.vision_transformer.VisionTransformer(
            img_size=32,
            patch_size=8,
            embed_dim=32,
            depth=2,
            num_heads=2,
            num_classes=0,
            global_pool="map",
            class_token=False,
        )

    def forward(self, x):
        return self.trunk(x)


def make_siglip():
    torch.manual_seed(0)
    return SiglipLike().eval()


TOWERS = {"open_clip": lambda: make_clip().visual, "timm": make_siglip}
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32).sin()


def disturb(tower):
    """Adapters as after training: B is no longer zero."""
    for _, layer in lora.lora_layers(tower):
        for adapter in layer.adapters.values():
            nn.init.normal_(adapter.B, std=0.05)


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("grad", [True, False])
def test_step_zero_is_bit_equal(kind, grad):
    tower = TOWERS[kind]()
    with torch.set_grad_enabled(grad):
        before = tower(IMAGES)
        lora.inject_lora(tower, rank=4)
        assert torch.equal(before, tower(IMAGES))


@pytest.mark.parametrize("kind", TOWERS)
def test_merge_unmerge_unload(kind):
    tower = TOWERS[kind]()
    original = {k: v.clone() for k, v in tower.state_dict().items()}
    plain = tower(IMAGES)
    lora.inject_lora(tower, rank=4)
    disturb(tower)
    adapted = tower(IMAGES)
    assert torch.equal(adapted, tower(IMAGES))
    assert (adapted - plain).abs().max() > 1e-2
    snapshot = lora.merged_state_dict(tower)
    assert torch.equal(tower(IMAGES), adapted), "merged_state_dict must not touch the tower"
    lora.merge_lora(tower)
    assert (tower(IMAGES) - adapted).abs().max() <= 1e-5
    lora.unmerge_lora(tower)
    assert torch.equal(tower(IMAGES), adapted)
    lora.unload_lora(tower)
    assert (tower(IMAGES) - adapted).abs().max() <= 1e-5
    state = tower.state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in original.items()}
    assert list(state) == list(original)
    assert all(torch.equal(snapshot[k], state[k]) for k in state) and set(snapshot) == set(state)
    fresh = TOWERS[kind]()
    fresh.load_state_dict(state)  # strict
    for t in (fresh, tower):  # PyTorch picks its matmul kernel by requires_grad, even under no_grad
        t.requires_grad_(False)
    assert torch.equal(fresh(IMAGES), tower(IMAGES))


def test_every_attention_projection_matters():
    """The known trap: an adapter on out_proj that the functional never runs."""
    tower = make_clip().visual
    lora.inject_lora(tower, rank=4)
    plain = tower(IMAGES)
    attention = tower.transformer.resblocks[0].attn
    for name in ("q", "k", "v", "out"):
        adapter = attention.adapters[name]
        nn.init.normal_(adapter.B, std=0.2)
        assert not torch.allclose(tower(IMAGES), plain), name
        nn.init.zeros_(adapter.B)


@pytest.mark.parametrize("bias", ["lora_only", "none"])
def test_only_adapters_and_biases_train(bias):
    clip = make_clip()
    lora.inject_lora(clip.visual, rank=4, bias=bias)
    trains = {n for n, p in clip.visual.named_parameters() if p.requires_grad}
    adapters = {n for n in trains if ".adapters." in n}
    biases = trains - adapters
    assert adapters and all(n.endswith((".A", ".B")) for n in adapters)
    assert bool(biases) == (bias == "lora_only")
    assert all(n.endswith("bias") and ".base." in n for n in biases)
    assert not any("ln_" in n or "embedding" in n or "conv1" in n for n in trains)


def test_text_tower_is_untouched():
    clip = make_clip()
    before = {n: p.clone() for n, p in clip.named_parameters() if not n.startswith("visual.")}
    flags = {n: p.requires_grad for n, p in clip.named_parameters() if not n.startswith("visual.")}
    lora.inject_lora(clip.visual, rank=4)
    optimizer = torch.optim.AdamW([p for p in clip.visual.parameters() if p.requires_grad], lr=0.1)
    clip.encode_image(IMAGES).square().sum().backward()
    optimizer.step()
    after = {n: p for n, p in clip.named_parameters() if not n.startswith("visual.")}
    assert before.keys() == after.keys() and flags == {n: p.requires_grad for n, p in after.items()}
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert not any(isinstance(m, lora.LoRAWrapper) for m in clip.transformer.modules())


def test_training_moves_every_adapter():
    tower = make_clip().visual.train()
    lora.inject_lora(tower, rank=4, dropout=0.1)
    disturb(tower)  # with B = 0 the gradient of A is zero at step 0
    tower(IMAGES).square().sum().backward()
    for name, parameter in tower.named_parameters():
        if parameter.requires_grad and not name.endswith("in_proj_bias"):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_dropout_acts_on_the_adapter_only_in_training():
    tower = make_clip().visual
    lora.inject_lora(tower, rank=4, dropout=0.5)
    tower.train()
    assert torch.equal(tower(IMAGES), tower(IMAGES)), "with B = 0 dropout has nothing to act on"
    disturb(tower)
    assert not torch.equal(tower(IMAGES), tower(IMAGES))
    tower.eval()
    assert torch.equal(tower(IMAGES), tower(IMAGES))


@pytest.mark.parametrize("kind", TOWERS)
def test_save_and_load_the_adapters_alone(kind):
    tower, other = TOWERS[kind](), TOWERS[kind]()
    for t in (tower, other):
        lora.inject_lora(t, rank=4)
    disturb(tower)
    with torch.no_grad():
        for _, layer in lora.lora_layers(tower):
            for b in layer.biases().values():
                b += 0.1
    lora.load_lora_state_dict(other, lora.lora_state_dict(tower))
    assert torch.equal(tower(IMAGES), other(IMAGES))
    zeros = {name: torch.zeros_like(x) for name, x in lora.lora_state_dict(tower).items()}
    lora.load_lora_state_dict(other, zeros)
    lora.merge_lora(other)
    lora.load_lora_state_dict(other, lora.lora_state_dict(tower))  # into a merged tower
    lora.merge_lora(tower)
    assert torch.equal(tower(IMAGES), other(IMAGES))
    lora.unmerge_lora(tower)
    wrong = TOWERS[kind]()
    lora.inject_lora(wrong, rank=2)
    with pytest.raises(ValueError, match="do not fit"):
        lora.load_lora_state_dict(wrong, lora.lora_state_dict(tower))


def test_published_counts_vit_l_14():
    """App. B, r = 16: 7.08 M adapters + 28.7 k projection + 0.22 M biases."""
    config = open_clip.get_model_config("ViT-L-14")
    with torch.device("meta"):
        visual = open_clip.CLIP(**config).visual
        lora.inject_lora(visual, rank=16)
    named = [(n, p) for n, p in visual.named_parameters() if p.requires_grad]
    projection = sum(p.numel() for n, p in named if n.startswith("proj."))
    adapters = sum(p.numel() for n, p in named if ".adapters." in n) - projection
    biases = sum(p.numel() for n, p in named if ".adapters." not in n)
    assert adapters == 7_077_888 and projection == 28_672 and biases == 221_184


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"rank": 0}, "rank 0"),
        ({"rank": 2.5}, "whole number"),
        ({"alpha": 0}, "positive alpha"),
        ({"alpha": float("nan")}, "positive alpha"),
        ({"dropout": 1.0}, r"dropout 1.0.*\[0, 1\)"),
        ({"bias": "all"}, "bias policy"),
        ({"rnak": 4, "r": 2}, r"no setting \['r', 'rnak'\]; rank, alpha, dropout, bias exist"),
    ],
)
def test_bad_settings(kwargs, message):
    tower = make_clip().visual
    with pytest.raises(ValueError, match=message):
        lora.inject_lora(tower, **kwargs)
    assert all(p.requires_grad for p in tower.parameters()), "a refusal changes nothing"


def test_twice_or_nothing_is_refused():
    tower = make_clip().visual
    lora.inject_lora(tower, rank=2)
    with pytest.raises(ValueError, match="already"):
        lora.inject_lora(tower, rank=2)
    with pytest.raises(ValueError, match="nothing|no Linear"):
        lora.inject_lora(nn.Sequential(nn.ReLU()), rank=2)


# -- strength ------------------------------------------------------------------------------------
def trained(kind, bias="lora_only"):
    """A tower after training as far as its tensors tell: adapters and biases have moved."""
    tower = TOWERS[kind]()
    given = {k: v.clone() for k, v in tower.state_dict().items()}
    lora.inject_lora(tower, rank=4, bias=bias)
    disturb(tower)
    with torch.no_grad():
        for _, layer in lora.lora_layers(tower):
            for b in layer.biases().values():
                b += 0.1 * torch.randn_like(b) if bias == "lora_only" else 0
    return tower, given, lora.merged_state_dict(tower)


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("bias", ["lora_only", "none"])
@pytest.mark.parametrize("strength", [0, 0.5, 1, 2, -1])
def test_strength_is_that_of_the_whole_change(kind, bias, strength):
    """The outputs are those of a plain tower with weights W + s·ΔW and biases b + s·Δb."""
    tower, given, full = trained(kind, bias)
    plain = TOWERS[kind]()
    plain.load_state_dict({k: given[k] + strength * (full[k] - given[k]) for k in given})
    expected = plain(IMAGES)
    learnt, weights = lora.lora_state_dict(tower), None
    lora.scale_lora(tower, 7)
    lora.scale_lora(tower, strength)  # absolute: what was set before is forgotten
    assert (tower(IMAGES) - expected).abs().max() <= 2e-5
    for merged in (False, True):
        if merged:
            lora.merge_lora(tower)
        assert (tower(IMAGES) - expected).abs().max() <= 2e-5
        weights = lora.merged_state_dict(tower)
        assert all(torch.allclose(weights[k], plain.state_dict()[k], atol=1e-5) for k in given)
        saved = lora.lora_state_dict(tower)
        assert saved.keys() == learnt.keys()
        assert all(torch.equal(saved[k], learnt[k]) for k in saved), "saved at full strength"
    lora.scale_lora(tower, 1)  # merged as it is
    assert all(torch.equal(full[k], x) for k, x in lora.merged_state_dict(tower).items())
    lora.scale_lora(tower, strength)
    lora.unload_lora(tower)
    assert all(torch.equal(weights[k], x) for k, x in tower.state_dict().items())


@pytest.mark.parametrize("kind", TOWERS)
def test_strength_zero_is_the_given_tower_and_one_the_trained_one_bit_by_bit(kind):
    before = TOWERS[kind]()(IMAGES)
    tower, given, _ = trained(kind)
    after = tower(IMAGES)
    lora.scale_lora(tower, 0)
    assert torch.equal(tower(IMAGES), before) and not torch.equal(after, before)
    assert all(torch.equal(given[k], x) for k, x in lora.merged_state_dict(tower).items())
    lora.scale_lora(tower, 1)
    assert torch.equal(tower(IMAGES), after)
    lora.scale_lora(tower, 0)
    lora.merge_lora(tower)
    assert torch.equal(tower(IMAGES), before)
    lora.unmerge_lora(tower)
    lora.scale_lora(tower, 1)
    assert torch.equal(tower(IMAGES), after)


def test_a_copied_tower_and_one_in_half_precision_scale_as_well():
    tower, _, full = trained("open_clip")
    lora.scale_lora(tower, 0.5)
    twin = copy.deepcopy(tower)
    assert torch.equal(twin(IMAGES), tower(IMAGES))
    lora.scale_lora(twin, 1)
    assert all(torch.equal(full[k], x) for k, x in lora.merged_state_dict(twin).items())
    half = tower.bfloat16()(IMAGES.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.isfinite(half).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_tower_in_half_precision_keeps_its_own_and_trains_adapters_in_float32(dtype):
    tower = make_clip().visual.to(dtype)
    before = tower(IMAGES.to(dtype))
    lora.inject_lora(tower, rank=4)
    assert torch.equal(before, tower(IMAGES.to(dtype)))
    disturb(tower)
    out = tower(IMAGES.to(dtype))
    assert out.dtype == dtype and not torch.equal(out, before)
    out.square().sum().backward()
    found = [p for n, p in tower.named_parameters() if ".adapters." in n]
    assert all(p.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in found)


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_refused(strength):
    tower, *_ = trained("open_clip")
    with pytest.raises(ValueError, match="no finite number"):
        lora.scale_lora(tower, strength)


def test_a_tower_without_adapters_has_no_strength():
    tower, *_ = trained("open_clip")
    lora.unload_lora(tower)
    with pytest.raises(ValueError, match="no adapters to scale"):
        lora.scale_lora(tower, 0.5)


# -- which layers --------------------------------------------------------------------------------
def test_targets_and_skip_choose_by_name_or_by_a_function():
    def names(**choice):
        return lora.inject_lora(make_clip().visual, rank=2, **choice)

    block = ["attn", "mlp.c_fc", "mlp.c_proj"]
    blocks = [f"transformer.resblocks.{i}.{name}" for i in (0, 1) for name in block]
    assert names() == ["proj", *blocks]
    assert names(targets="attn") == [blocks[0], blocks[3]]
    assert names(targets=("resblocks.1", "proj")) == ["proj", *blocks[3:]]
    assert names(targets=["transformer.resblocks.0.mlp.c_fc"]) == [blocks[1]]
    assert names(skip="mlp") == ["proj", blocks[0], blocks[3]]
    assert names(skip="proj") == blocks, "whole parts: c_proj is another name"
    assert names(targets="mlp", skip=lambda name, module: name.endswith("c_fc")) == blocks[2::3]
    linears = names(targets=lambda name, layer: isinstance(layer, nn.Linear))
    assert linears == [name for name in blocks if "mlp" in name]
    assert names(skip=lambda name, module: name[-11:] == "resblocks.0") == ["proj", *blocks[3:]]


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"targets": "atn"}, "no module 'atn'"),
        ({"targets": ("attn", "q_proj")}, "no module 'q_proj'"),
        ({"train": "head"}, "no module 'head'"),
        ({"targets": "ln_1"}, "no Linear"),
        ({"targets": "attn", "skip": "transformer"}, "no Linear"),
        ({"targets": "attn", "train": "out_proj"}, "attn.out_proj cannot train whole"),
    ],
)
def test_a_choice_that_cannot_be_meant_is_refused(choice, message):
    tower = make_clip().visual
    names = list(tower.state_dict())
    with pytest.raises(ValueError, match=message):
        lora.inject_lora(tower, rank=2, **choice)
    assert list(tower.state_dict()) == names and all(p.requires_grad for p in tower.parameters())


def test_layers_by_name_learn_whole():
    """A fresh head on a tower: it gets no adapter, it learns, and it is saved with them."""

    def make():
        torch.manual_seed(0)
        model = nn.Sequential()
        model.tower = make_clip().visual
        model.head = nn.Sequential(nn.BatchNorm1d(24), nn.Linear(24, 3))
        return model

    model, other = make(), make()
    for m in (model, other):
        assert "head" not in lora.inject_lora(m, rank=2, train="head")
    whole = {n for n, p in model.named_parameters() if p.requires_grad and ".adapters." not in n}
    assert {"head.0.weight", "head.1.weight", "head.1.bias"} < whole and all(
        "head" in n or "bias" in n for n in whole
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model.head[1].weight.clone()
    model(IMAGES).square().sum().backward()
    optimizer.step()
    head = model.head[1].weight.clone()
    assert not torch.equal(head, before)
    model.eval().requires_grad_(False)  # as before an evaluation: what is saved does not change
    state = lora.lora_state_dict(model)
    assert torch.equal(state["head.1.weight"], head) and "tower.proj.proj.A" in state
    lora.load_lora_state_dict(other, state)
    assert torch.equal(other.eval()(IMAGES), model(IMAGES)), "BatchNorm's averages go along"
    lora.scale_lora(model, 0)
    assert torch.equal(model(IMAGES), model.head(make_clip().visual(IMAGES))), "on the old tower"
    lora.unload_lora(model)
    assert list(model.state_dict()) == list(make().state_dict())
    assert lora.lora_state_dict(model) == {}


# -- what makes it quick -------------------------------------------------------------------------
def test_queries_keys_and_values_see_one_mask():
    """Three equal adapters make three equal corrections, also with dropout."""
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    tower = nn.Sequential(attention).train()
    lora.inject_lora(tower, rank=4, dropout=0.5)
    layer, x = tower[0], torch.randn(2, 5, 16)
    with torch.no_grad():
        for name in "qkv":
            layer.adapters[name].A.copy_(layer.adapters["q"].A)
            layer.adapters[name].B.copy_(layer.adapters["out"].A.T)
    q, k, v = layer.corrected(torch.zeros(2, 5, 48), x, "qkv").chunk(3, dim=-1)
    assert q.abs().max() > 0 and torch.allclose(q, k) and torch.allclose(q, v)


def test_a_tower_multiplies_each_weight_once():
    """Frozen or adapted: a product a token, as PyTorch's attention makes of images that come first,
    takes twice the time."""

    class Batched(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.bmm.default and args[1].stride(0) == 0:
                self.found += 1
            return func(*args, **(kwargs or {}))

    clip, found = build_clip(ClipInfo("tiny", CFG, (0.5,) * 3, (0.5,) * 3)), []
    clip.load_state_dict(make_clip().state_dict())
    tower = clip.eval().visual
    assert torch.allclose(tower(IMAGES), make_clip().visual(IMAGES), atol=1e-5)
    for prepare in (lambda: tower.requires_grad_(False), lambda: lora.inject_lora(tower, rank=4)):
        prepare()
        with Batched() as counter:
            tower(IMAGES)
        found.append(counter.found)
    assert found == [0, 0]
    with Batched() as counter:
        make_clip().visual.requires_grad_(False)(IMAGES)
    assert counter.found == 2, "the counter counts, one for each block of a tower as it comes"
