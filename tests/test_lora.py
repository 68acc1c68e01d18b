"""lora.py on open_clip's ViT and on a timm trunk: identity, merging, what trains, counts."""

import open_clip
import pytest
import timm
import torch
from torch import nn

import lora

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
    wrong = TOWERS[kind]()
    lora.inject_lora(wrong, rank=2)
    with pytest.raises(ValueError, match="do not fit"):
        lora.load_lora_state_dict(wrong, lora.lora_state_dict(tower))


def test_cross_attention_goes_through_each_input():
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    adapted = lora.LoRAAttention(attention, 4, 4.0, 0.0).eval()
    q, kv = torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    expected = attention(q, kv, kv, need_weights=False)[0]
    assert torch.allclose(adapted(q, kv, kv)[0], expected, atol=1e-6)


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
    "kwargs, message", [({"rank": 0}, "rank"), ({"bias": "all"}, "bias policy")]
)
def test_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        lora.inject_lora(make_clip().visual, **kwargs)


def test_twice_or_nothing_is_refused():
    tower = make_clip().visual
    lora.inject_lora(tower, rank=2)
    with pytest.raises(ValueError, match="already"):
        lora.inject_lora(tower, rank=2)
    with pytest.raises(ValueError, match="nothing|no Linear"):
        lora.inject_lora(nn.Sequential(nn.ReLU()), rank=2)
