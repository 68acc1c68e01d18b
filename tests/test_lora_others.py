"""lora.py on models of others: torchvision's, timm's, transformers', and PyTorch's own.

Adapted, they must be what they were at step 0, learn through every adapter, and come back whole.
"""

import copy

import open_clip
import pytest
import timm
import torch
import torchvision
from torch import nn

import lora

IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32).sin()
TOKENS = torch.linspace(-1, 1, 2 * 6 * 32).view(2, 6, 32).cos()
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2}
HF_VISION = {**SMALL, "image_size": 32, "patch_size": 8}
SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "num_classes": 5}


@pytest.fixture(autouse=True)
def _as_pytorch_comes():
    """With its fast path for attention, which this project's runs and other tests turn off."""
    torch.backends.mha.set_fastpath_enabled(True)
    yield
    torch.backends.mha.set_fastpath_enabled(False)


def hf(kind, head="", **config):
    """A model of transformers, such as CLIPVision or CLIP."""
    transformers = pytest.importorskip("transformers")
    made = getattr(transformers, f"{kind}Config")(**(config or HF_VISION))
    return getattr(transformers, f"{kind}Model{head}")(made)


def torchvision_vit():
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64, "num_classes": 5}
    model = torchvision.models.VisionTransformer(image_size=32, patch_size=8, **sizes)
    nn.init.normal_(model.heads.head.weight)  # zero in a fresh one
    return model


def torchvision_swin():
    """It never calls qkv and proj: it hands their weights to a function."""
    return torchvision.models.SwinTransformer(
        patch_size=[4, 4], window_size=[4, 4], stochastic_depth_prob=0.0, **SWIN
    )


def timm_vit():
    return timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5
    )


def timm_swin():
    return timm.models.SwinTransformer(
        img_size=32, patch_size=4, window_size=4, drop_path_rate=0.0, **SWIN
    )


def timm_beit():
    """Reads qkv.weight to add a bias of its own."""
    return timm.models.Beit(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5
    )


def clip_resnet():
    """Its attention pool hands the weights of four Linears to a function. BatchNorm without a
    memory, so that two calls can be compared."""
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).visual
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    return model


def encoder_layer(**settings):
    return nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, **settings)


def encoder(norm_first=False):
    layer = encoder_layer(batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)


# model → how to make it, names of its layers in one block, what it gets
OTHERS = {
    "torchvision ViT": (torchvision_vit, "self_attention mlp.0 mlp.3", IMAGES),
    "torchvision Swin": (torchvision_swin, "attn.qkv attn.proj mlp.0 mlp.3", IMAGES),
    "timm ViT": (timm_vit, "attn.qkv attn.proj mlp.fc1 mlp.fc2", IMAGES),
    "timm Swin": (timm_swin, "attn.qkv attn.proj mlp.fc1 mlp.fc2", IMAGES),
    "timm BEiT": (timm_beit, "attn.qkv attn.proj mlp.fc1 mlp.fc2", IMAGES),
    "CLIP ResNet": (clip_resnet, "q_proj k_proj v_proj c_proj", IMAGES),
    "transformers CLIP": (
        lambda: hf("CLIPVision"), "q_proj k_proj v_proj out_proj fc1 fc2", IMAGES
    ),
    "transformers CLIP, projected": (
        lambda: hf("CLIPVision", "WithProjection"), "q_proj visual_projection", IMAGES
    ),
    "transformers SigLIP": (lambda: hf("SiglipVision"), "q_proj head.attention", IMAGES),
    "TransformerEncoder": (encoder, "self_attn linear1 linear2", TOKENS),
    "TransformerEncoder, norm first": (
        lambda: encoder(norm_first=True), "self_attn linear1 linear2", TOKENS
    ),
    "TransformerEncoderLayer": (encoder_layer, "self_attn linear1 linear2", TOKENS),
}  # fmt: skip
# Bit-equal at step 0, in both modes, with and without gradients. The others meet PyTorch's native
# attention (under no_grad), or one that orders its axes in another way: equal to 1e-5.
EXACT = {name for name in OTHERS if "timm" in name or "Swin" in name or "CLIP" in name}


def build(name, seed=0):
    torch.manual_seed(seed)
    return OTHERS[name][0]()


def output(model, x):
    """A tensor, whatever the model wraps it in."""
    y = model(x)
    if isinstance(y, torch.Tensor):
        return y
    return y.image_embeds if "image_embeds" in y else y.pooler_output


def disturb(tower):
    """Adapters as after training: B is no longer zero, biases have moved."""
    with torch.no_grad():
        for _, layer in lora.lora_layers(tower):
            for adapter in layer.adapters.values():
                nn.init.normal_(adapter.B, std=0.1)
            for bias in layer.biases().values():
                bias += 0.1 * torch.randn_like(bias)


def distance(a, b):
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("name", OTHERS)
def test_step_zero_is_the_model_that_was_given(name):
    plain, model = build(name), build(name)
    layers = lora.inject_lora(model, rank=2, dropout=0.0)
    for part in OTHERS[name][1].split():
        assert any(f".{layer}".endswith(f".{part}") for layer in layers), part
    for layer_name, layer in lora.lora_layers(model):
        assert ("qkv" in layer_name) == (list(layer.adapters) == ["q", "k", "v"]), "three for a qkv"
    for training in (True, False):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                before = output(plain.train(training), OTHERS[name][2])
                after = output(model.train(training), OTHERS[name][2])
            if name in EXACT:
                assert torch.equal(before, after), (training, grad)
            assert distance(before, after) <= 1e-5, (training, grad)


@pytest.mark.parametrize("name", OTHERS)
def test_every_adapter_learns_and_every_mode_agrees(name):
    """Train mode without dropout, eval mode with and without gradients: one and the same function,
    also where PyTorch reads the weights and never calls the layers."""
    model, x = build(name), OTHERS[name][2]
    before = output(model.eval(), x)
    lora.inject_lora(model, rank=2, dropout=0.0)
    disturb(model)
    y = output(model, x)
    (y * torch.linspace(0.5, 1.5, y.numel()).view_as(y)).sum().backward()
    for parameter_name, p in model.named_parameters():
        if ".adapters." in parameter_name:
            assert p.grad is not None and p.grad.abs().sum() > 0, parameter_name
    assert distance(before, y) > 1e-2
    with torch.no_grad():
        assert distance(output(model, x), y) <= 2e-5
        if name != "CLIP ResNet":  # in train mode, BatchNorm is another function
            assert distance(output(model.train(), x), y) <= 2e-5


@pytest.mark.parametrize("name", OTHERS)
def test_unload_gives_the_model_back(name):
    model, x = build(name).eval(), OTHERS[name][2]
    given = {k: v.clone() for k, v in model.state_dict().items()}
    types = {n: type(m) for n, m in model.named_modules()}
    first = output(model, x)
    lora.inject_lora(model, rank=2)
    disturb(model)
    adapted = output(model, x)
    other = build(name).eval()
    lora.inject_lora(other, rank=2)
    lora.load_lora_state_dict(other, lora.lora_state_dict(model))
    assert torch.equal(output(other, x), adapted)
    lora.scale_lora(other, 0)
    assert distance(output(other, x), first) <= 1e-5
    half = copy.deepcopy(model)
    lora.scale_lora(half, 0.5)
    merged = lora.merged_state_dict(model)
    lora.unload_lora(model)
    state = model.state_dict()
    assert {n: type(m) for n, m in model.named_modules()} == types
    assert list(state) == list(given) == list(merged)
    assert all(torch.equal(state[k], merged[k]) and state[k].shape == given[k].shape for k in state)
    assert distance(output(model, x), adapted) <= 2e-5
    middle = build(name).eval()
    middle.load_state_dict({k: (given[k] + state[k]) / 2 for k in given})
    assert distance(output(half, x), output(middle, x)) <= 2e-5, "half the strength"


# -- PyTorch's own attention ---------------------------------------------------------------------
PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(6)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("masks", ["none", "padding", "causal", "both"])
def test_encoder_with_masks_in_and_out_of_the_fast_path(monkeypatch, masks, norm_first):
    """Against the same encoder with the adapters folded in, whose layers are PyTorch's."""
    calls, native = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *a: calls.append(1) or native(*a)
    )
    torch.manual_seed(0)
    model = encoder(norm_first=norm_first)
    lora.inject_lora(model, rank=2, dropout=0.0)
    disturb(model)
    plain = copy.deepcopy(model)
    lora.unload_lora(plain)
    given = {}
    if masks in ("padding", "both"):
        given["src_key_padding_mask"] = PADDING
    if masks in ("causal", "both"):
        given |= {"mask": CAUSAL, "is_causal": True}
    if masks == "both":
        given["src_key_padding_mask"] = torch.zeros(2, 6).masked_fill(PADDING, -torch.inf)
    valid = ~PADDING if "src_key_padding_mask" in given else torch.ones(2, 6, dtype=torch.bool)
    for training in (True, False):
        for grad in (True, False):
            calls.clear()
            with torch.set_grad_enabled(grad):
                ours = model.train(training)(TOKENS, **given)
                fast = len(calls)
                theirs = plain.train(training)(TOKENS, **given)
            assert fast == (0 if grad or training else 2), (
                "no_grad in eval mode takes the fast path"
            )
            assert distance(ours[valid], theirs[valid]) <= 1e-5, (training, grad)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_answers_as_the_one_it_replaces(batch_first, itself, bias):
    """Every argument of nn.MultiheadAttention: masks of each kind, weights, layouts, no batch."""
    torch.manual_seed(0)
    holder = nn.Sequential(nn.MultiheadAttention(16, 2, batch_first=batch_first, bias=bias)).eval()
    lora.inject_lora(holder, rank=2)
    disturb(holder)
    plain = copy.deepcopy(holder)
    lora.unload_lora(plain)
    q = torch.randn(2, 6, 16)
    kv = q if itself else torch.randn(2, 5, 16)
    s = kv.shape[1]
    padding = torch.zeros(2, s, dtype=torch.bool)
    padding[1, 3:] = True
    look_away = torch.rand(6, s) > 0.7
    look_away[:, 0] = False
    some = torch.randn(6, s)
    calls = [
        {},
        {"key_padding_mask": padding},
        {"attn_mask": look_away},
        {"attn_mask": some},
        {"attn_mask": some.expand(4, 6, s) * torch.arange(4.0).view(4, 1, 1)},
        {"attn_mask": look_away, "key_padding_mask": padding, "average_attn_weights": False},
        {"need_weights": False, "key_padding_mask": padding},
    ]
    if itself:
        calls.append({"attn_mask": CAUSAL, "is_causal": True, "need_weights": False})
    for given in calls:
        inputs = [x if batch_first else x.transpose(0, 1) for x in (q, kv)]
        one = (inputs[0],) * 3 if itself else (inputs[0], inputs[1], inputs[1])
        compare(holder[0](*one, **given), plain[0](*one, **given))
    lone = (q[0], q[0], q[0]) if itself else (q[0], kv[0], kv[0])
    heads = some.expand(2, 6, s) * torch.arange(2.0).view(2, 1, 1)
    for given in ({}, {"key_padding_mask": padding[1]}, {"attn_mask": heads}):
        compare(holder[0](*lone, **given), plain[0](*lone, **given))


def compare(ours, theirs):
    assert ours[0].shape == theirs[0].shape and distance(ours[0], theirs[0]) <= 1e-5
    assert (ours[1] is None) == (theirs[1] is None)
    if ours[1] is not None:
        assert ours[1].shape == theirs[1].shape and distance(ours[1], theirs[1]) <= 1e-5


def test_attention_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True))
    lora.inject_lora(model, rank=2, dropout=0.0)
    x = torch.randn(2, 6, 16)
    assert not torch.equal(model[0](x, x, x)[0], model[0](x, x, x)[0])
    model.eval()
    assert torch.equal(model[0](x, x, x)[0], model[0](x, x, x)[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_calls_that_pytorch_would_not_answer_either():
    model = nn.Sequential(nn.MultiheadAttention(16, 2, batch_first=True))
    lora.inject_lora(model, rank=2)
    x = torch.randn(2, 6, 16)
    with pytest.raises(ValueError, match="no is_causal without mask"):
        model[0](x, x, x, is_causal=True)
    nested = torch.nested.as_nested_tensor([x[0], x[1, :3]])
    with pytest.raises(ValueError, match="no nested tensors"):
        model[0](nested, nested, nested)


# -- refused in words ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings", [{"kdim": 8}, {"vdim": 8}, {"add_bias_kv": True}, {"add_zero_attn": True}]
)
def test_attentions_of_another_build_are_named_and_can_be_skipped(settings):
    def make():
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(16, 2, **settings)
        return nn.ModuleDict({"first": nn.Linear(16, 16), "odd": attention})

    model = make()
    names = list(model.state_dict())
    with pytest.raises(
        ValueError, match="kdim, vdim, bias_k or add_zero_attn: odd; name it in skip"
    ):
        lora.inject_lora(model, rank=2)
    assert list(model.state_dict()) == names, "a refusal changes nothing"
    assert all(p.requires_grad for p in model.parameters())
    assert lora.inject_lora(make(), rank=2, skip="odd") == ["first"]


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.MultiheadAttention(4, 2)])
def test_a_bare_layer_is_told_to_get_a_holder(layer):
    """Its caller holds the plain layer and would go on calling that."""
    with pytest.raises(ValueError, match=r"nn.Sequential\(layer\), and go on with tower\[0\]"):
        lora.inject_lora(layer, rank=2)
    tower = nn.Sequential(layer)
    assert lora.inject_lora(tower, rank=2) == ["0"]
    assert isinstance(tower[0], lora.LoRAWrapper) and tower[0].base is layer


def whole_clips():
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    both = {"text_config": {**SMALL, "vocab_size": 20, "max_position_embeddings": 8}}
    both |= {"vision_config": HF_VISION}
    return {
        "CLIP": lambda: open_clip.CLIP(**config),
        "CustomTextCLIP": lambda: open_clip.CustomTextCLIP(**config),
        "in a holder": lambda: nn.Sequential(open_clip.CLIP(**config)),
        "transformers CLIP": lambda: hf("CLIP", **both),
        "transformers SigLIP": lambda: hf("Siglip", **both),
    }


@pytest.mark.parametrize("name", ["CLIP", "CustomTextCLIP", "in a holder"])
def test_a_whole_clip_is_refused_unless_asked_for(name):
    model = whole_clips()[name]()
    with pytest.raises(ValueError, match=r"text tower.*pass the image tower \(clip.visual"):
        lora.inject_lora(model, rank=2)
    assert all(p.requires_grad for p in model.parameters())
    text = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 19]])
    clip = (model[0] if name == "in a holder" else model).eval()
    before = clip.encode_image(IMAGES), clip.encode_text(text)
    layers = lora.inject_lora(model, rank=2, whole_clip=True)
    assert len([n for n in layers if "visual." in n]) == len(layers) // 2 + 1, "blocks and proj"
    after = clip.encode_image(IMAGES), clip.encode_text(text)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    disturb(model)
    assert distance(clip.encode_text(text), before[1]) > 1e-2


@pytest.mark.parametrize("name", ["transformers CLIP", "transformers SigLIP"])
def test_a_whole_clip_of_transformers_is_refused_and_its_image_tower_is_not(name):
    model = whole_clips()[name]()
    with pytest.raises(ValueError, match="text tower.*model.vision_model"):
        lora.inject_lora(model, rank=2)
    flags = [p.requires_grad for p in model.text_model.parameters()]
    assert lora.inject_lora(model.vision_model, rank=2)
    assert flags == [p.requires_grad for p in model.text_model.parameters()]
    assert not any(isinstance(m, lora.LoRAWrapper) for m in model.text_model.modules())
    chosen = lora.inject_lora(whole_clips()[name](), rank=2, whole_clip=True, targets="text_model")
    assert chosen and all(n.startswith("text_model.") for n in chosen)


def test_weights_with_two_users_are_refused():
    """Two adapters on one weight would be folded into it twice."""
    shared, tied = nn.Linear(4, 4), nn.Linear(4, 4)
    tied.weight = shared.weight
    for second in (shared, tied):
        model = nn.Sequential(shared, nn.ReLU(), second)
        with pytest.raises(ValueError, match="weight of 2 has two users; name it in skip"):
            lora.inject_lora(model, rank=2)
        assert lora.inject_lora(model, rank=2, skip="2") == ["0"]


def test_a_block_that_is_used_twice_is_adapted_once():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model = nn.Sequential(block, block).eval()
    keys, x = list(model.state_dict()), torch.randn(3, 4)
    before = model(x)
    assert lora.inject_lora(model, rank=2) == ["0.0"]
    assert torch.equal(model(x), before)
    disturb(model)
    after = model(x)
    lora.unload_lora(model)
    assert distance(model(x), after) <= 1e-6 and list(model.state_dict()) == keys


def test_integer_weights_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="torch.int8 cannot be adapted: 0; name it in skip"):
        lora.inject_lora(model, rank=2)


def test_names_of_the_owners_own_are_not_mistaken_for_ours():
    """A model may itself say "base" and "adapters"."""
    torch.manual_seed(0)
    inner = nn.ModuleDict({"adapters": nn.Linear(4, 4), "proj": nn.Linear(4, 4)})
    model = nn.ModuleDict({"base": inner})
    names = list(model.state_dict())
    assert lora.inject_lora(model, rank=2) == ["base.adapters", "base.proj"]
    disturb(model)
    assert list(lora.merged_state_dict(model)) == names
    assert model["base"]["proj"].in_features == 4, "what is asked of the layer, the layer answers"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        model["base"]["proj"].nonsense  # noqa: B018
