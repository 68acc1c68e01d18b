"""genhancer.py: who learns, what the loss may depend on, the two normalisations, loading CLIPs."""

import json

import open_clip
import pytest
import timm
import torch
from conftest import TINY_CLIP
from safetensors.torch import save_file

from lora import lora_layers
from pretrained import backbones


def images(n=4):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


BOTH = pytest.mark.parametrize("denoiser", ["flow", "perceiver"])


def draws(model, n=4, first=0):
    own = [torch.Generator().manual_seed(first + i) for i in range(n)]
    return model.draw(own, torch.Generator().manual_seed(99))


def parts(denoiser):
    """What stage 1 trains."""
    names = ["denoiser", "project_context"] + ["project_vector"] * (denoiser == "flow")
    return {f"paradigms.{denoiser}.{name}" for name in names}


def part_of(name):
    """ "visual", or a part of a paradigm."""
    return name.split(".")[0] if name.startswith("visual") else ".".join(name.split(".")[:3])


def grads(model):
    return {
        name
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }


# -- who learns ----------------------------------------------------------------------------------
@BOTH
def test_stage1_gradients(make_genhancer, denoiser):
    """Alg. 1, line 7 and Alg. 2, line 6: only φ and ω, nothing in CLIP or the tokenizer."""
    model = make_genhancer(denoiser)
    model.start_stage1()
    model.train()
    model(images(), draws(model))["loss"].backward()
    touched = grads(model)
    assert {part_of(n) for n in touched} == parts(denoiser)
    assert not model.visual.training and not model.paradigm.tokenizer.training


@BOTH
@pytest.mark.parametrize("tuning", ["lora", "direct"])
@pytest.mark.parametrize("trains", ["only", "all"])
def test_stage2_gradients(make_genhancer, trains, tuning, denoiser):
    """Alg. 1, line 16 and Alg. 2, line 14: θ, and φ and ω only if asked."""
    model = make_genhancer(denoiser)
    model.start_stage2(trains, tuning, rank=4)
    for _, layer in lora_layers(model.visual):
        for adapter in layer.adapters.values():
            torch.nn.init.normal_(adapter.B, std=0.05)
    model.train()
    model(images(), draws(model))["loss"].backward()
    touched = {part_of(n) for n in grads(model)}
    assert touched == {"visual"} | (parts(denoiser) if trains == "all" else set())
    inside = {n for n in grads(model) if n.startswith("visual.")}
    if tuning == "lora":
        assert all(n.endswith((".A", ".B", "bias")) for n in inside)
        assert all(p.grad is None for p in model.original.parameters())
    else:
        assert {"visual.conv1.weight", "visual.class_embedding", "visual.proj"} <= inside


@BOTH
def test_no_local_token_leaks(make_genhancer, denoiser):
    """With ratio 0 the patch tokens reach the loss through [CLS] alone.

    The last block's patch outputs feed nothing but themselves: replacing them after the last block
    must leave the loss bit-equal, while replacing the class token there must change it.
    """
    model = make_genhancer(denoiser)
    model.start_stage2(rank=4)
    model.eval()
    before = model(images(), draws(model))["per_image"]

    def overwrite(rows):
        def hook(module, args, output):
            output = output.clone()
            output[:, rows] = torch.randn_like(output[:, rows])
            return output

        return hook

    last = model.visual.transformer.resblocks[-1]
    handle = last.register_forward_hook(overwrite(slice(1, None)))
    assert torch.equal(model(images(), draws(model))["per_image"], before)
    handle.remove()
    handle = last.register_forward_hook(overwrite(slice(0, 1)))
    assert not torch.allclose(model(images(), draws(model))["per_image"], before)
    handle.remove()


@pytest.mark.parametrize("ratio, tokens", [(0, 1), (10, 1 + 2), (50, 1 + 8), (100, 1 + 16)])
def test_local_ratio_counts_tokens(make_genhancer, ratio, tokens):
    model = make_genhancer(local_ratio=ratio)
    features, patches = model.encode(images())
    context, vector = model.paradigm.condition(
        features, model.choose_local(patches, draws(model).get("local_order"))
    )
    assert context.shape == (4, tokens, 20) and vector.shape == (4, 12)


def test_a_local_ratio_of_no_token_is_refused(make_genhancer):
    with pytest.raises(ValueError, match="local token ratio 3: of 16 patch tokens that is none"):
        make_genhancer(local_ratio=3)


@BOTH
def test_local_tokens_are_drawn_per_image_and_matter(make_genhancer, denoiser):
    model = make_genhancer(denoiser, local_ratio=50)
    d = draws(model)
    assert not torch.equal(d["local_order"][0], d["local_order"][1])
    assert sorted(d["local_order"][0].tolist()) == list(range(16))
    before = model(images(), d)["per_image"]
    handle = model.visual.transformer.resblocks[-1].register_forward_hook(
        lambda m, a, out: torch.cat([out[:, :1], torch.randn_like(out[:, 1:])], 1)
    )
    assert not torch.allclose(model(images(), d)["per_image"], before)
    handle.remove()


# -- the loss ------------------------------------------------------------------------------------
@BOTH
def test_normalises_twice(make_genhancer, denoiser):
    """CLIP gets its own mean and std, the VAE gets [-1, 1], of one and the same picture."""
    model = make_genhancer(denoiser)
    seen = {}
    model.visual.register_forward_pre_hook(lambda m, args: seen.update(clip=args[0]))
    model.paradigm.tokenizer.encoder.register_forward_pre_hook(
        lambda m, args: seen.update(tokenizer=args[0])
    )
    x = images()
    model(x, draws(model))
    mean = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
    assert torch.allclose(seen["clip"], (x - mean) / 0.25) and torch.allclose(
        seen["tokenizer"], x * 2 - 1
    )


@BOTH
def test_what_was_computed_before_changes_nothing(make_genhancer, denoiser):
    model = make_genhancer(denoiser)
    cached = model.precompute(images())
    model.start_stage1()
    assert torch.equal(
        model(images(), draws(model))["loss"], model(images(), draws(model), cached)["loss"]
    )
    model.start_stage2(rank=2)
    model.eval()
    a = model(images(), draws(model), measure_drift=True)
    b = model(images(), draws(model), cached, measure_drift=True)
    assert torch.equal(a["loss"], b["loss"]) and torch.equal(a["drift"], b["drift"])


@BOTH
def test_condition_matters(make_genhancer, denoiser):
    model = make_genhancer(denoiser)
    cached = model.precompute(images())
    other = {**cached, "original": cached["original"].flip(0)}
    model.start_stage1()
    assert not torch.allclose(
        model(images(), draws(model), cached)["per_image"],
        model(images(), draws(model), other)["per_image"],
    )


@BOTH
def test_draws_belong_to_the_image_not_to_the_batch(make_genhancer, denoiser):
    """The loss of an image is the same alone and in a batch: what makes ranks exchangeable."""
    model = make_genhancer(denoiser, local_ratio=25)
    whole = model(images(), draws(model))["per_image"]
    alone = model(images()[2:3], draws(model, 1, first=2))["per_image"]
    assert torch.allclose(whole[2:3], alone, atol=1e-5)


@BOTH
def test_drift_term(make_genhancer, denoiser):
    """Eq. (5): zero at step 0, weighted into the loss by λ, logged as 1 − cos."""
    model = make_genhancer(denoiser, drift_weight=3.0)
    model.start_stage2(rank=4)
    model.eval()
    start = model(images(), draws(model))
    assert start["drift"].abs().max() <= 1e-6
    assert float(start["loss"].detach()) == pytest.approx(
        float(start["per_image"].mean()), abs=1e-5
    )
    for _, layer in lora_layers(model.visual):
        for adapter in layer.adapters.values():
            torch.nn.init.normal_(adapter.B, std=0.2)
    moved = model(images(), draws(model))
    original, (features, _) = model.original_features(images()), model.encode(images())
    by_hand = 1 - torch.nn.functional.cosine_similarity(features, original, dim=-1)
    assert torch.allclose(moved["drift"], by_hand.detach(), atol=1e-6) and by_hand.min() > 1e-4
    expected = moved["per_image"].mean() + 3.0 * by_hand.mean()
    assert float(moved["loss"].detach()) == pytest.approx(float(expected.detach()), abs=1e-5)


def test_mean_instead_of_posterior_sample(make_genhancer):
    model = make_genhancer(sample_posterior=False)
    d = draws(model)
    before = model(images(), d)["loss"]
    d["posterior"] = d["posterior"] + 100
    assert torch.equal(model(images(), d)["loss"], before)
    sampling = make_genhancer()
    assert not torch.equal(sampling(images(), d)["loss"], before)


@BOTH
def test_stage1_learns(make_genhancer, denoiser):
    model = make_genhancer(denoiser)
    model.start_stage1()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(60):
        loss = model(images(), draws(model))["loss"]
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0], (losses[0], losses[-1])


@BOTH
@pytest.mark.parametrize("wrong, words", [
    (torch.rand(3, 32, 32), r"expected floats \('B', 3, 32, 32\), got torch.float32 \(3, 32, 32\)"),
    (torch.rand(2, 3, 30, 32), "expected floats"),
    (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "got torch.uint8"),
    (torch.rand(2, 3, 32, 32) * 2 - 1, "expected values in \\[0, 1\\]"),
    (torch.rand(2, 3, 32, 32) * 255, "expected values in \\[0, 1\\]"),
])  # fmt: skip
def test_images_that_are_none_are_refused_in_words(make_genhancer, denoiser, wrong, words):
    with pytest.raises(ValueError, match=words):
        make_genhancer(denoiser)(wrong)


# -- towers --------------------------------------------------------------------------------------
def test_global_token_is_the_unnormalised_projected_class_token():
    clip = open_clip.CLIP(**TINY_CLIP).eval()
    token, patches = backbones.encode_visual(clip.visual, images(), local=True)
    assert torch.equal(token, clip.encode_image(images(), normalize=False))
    assert patches.shape == (4, 16, 32) and not clip.visual.output_tokens
    assert not torch.allclose(token.norm(dim=-1), torch.ones(4))


def test_siglip_style_trunk():
    from open_clip.timm_model import TimmModel

    tower = TimmModel("vit_tiny_patch16_224", embed_dim=0, pool="map", proj="none").eval()
    assert isinstance(tower.trunk, timm.models.vision_transformer.VisionTransformer)
    x = torch.rand(2, 3, 224, 224)
    token, patches = backbones.encode_visual(tower, x, local=True)
    assert torch.allclose(token, backbones.encode_visual(tower, x)[0], atol=1e-5)
    assert patches.shape == (2, 196, 192) and token.shape == (2, 192)


def write_clip(path, config=TINY_CLIP):
    torch.manual_seed(0)
    clip = open_clip.CLIP(**config)
    save_file(clip.state_dict(), path)
    info = backbones.ClipInfo("x", config, (0.5,) * 3, (0.25,) * 3)
    path.with_suffix(".json").write_text(json.dumps(info.open_clip_config()))
    return clip.eval()


def test_load_clip_from_file_and_folder(tmp_path):
    clip = write_clip(tmp_path / "clip.safetensors")
    loaded, info = backbones.load_clip(str(tmp_path / "clip.safetensors"))
    assert (
        torch.equal(loaded.encode_image(images()), clip.encode_image(images()))
        and info.image_size == 32
    )
    folder = tmp_path / "enhanced"
    folder.mkdir()
    (tmp_path / "clip.safetensors").rename(folder / "open_clip_model.safetensors")
    (tmp_path / "clip.json").rename(folder / "open_clip_config.json")
    again, _ = backbones.load_clip(str(folder))
    theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    assert torch.equal(again.encode_image(images()), theirs.eval().encode_image(images()))


@pytest.mark.parametrize(
    "name, message",
    [
        ("ViT-L-99:openai", "not an open_clip model name"),
        ("ViT-B-32", "add the weights"),
        ("ViT-B-32:no_such_tag", "no weights 'no_such_tag'"),
        ("nowhere.safetensors", "is missing"),
    ],
)
def test_unknown_clips_are_named(name, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        backbones.load_clip(name)


def test_weights_of_another_architecture(tmp_path):
    write_clip(tmp_path / "clip.safetensors")
    other = {**TINY_CLIP, "embed_dim": 48}
    config = backbones.ClipInfo("x", other, (0.5,) * 3, (0.25,) * 3).open_clip_config()
    (tmp_path / "clip.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit.*size mismatch for text_projection"):
        backbones.load_clip(str(tmp_path / "clip.safetensors"))
    (tmp_path / "clip.json").write_text("{")
    with pytest.raises(ValueError, match="describes no model"):
        backbones.load_clip(str(tmp_path / "clip.safetensors"))


@pytest.mark.parametrize(
    "settings, message", [({"local_ratio": 101.0}, "percentage"), ({"local_ratio": -1}, "percent")]
)
def test_parts_that_do_not_fit(make_genhancer, settings, message):
    with pytest.raises(ValueError, match=message):
        make_genhancer(**settings)


@pytest.mark.parametrize("stage", [1, 2])
def test_dropout_acts_in_stage_2s_training_alone(make_genhancer, stage):
    """On the adapters' input (App. B); what else a tower knows of training mode stays off."""
    model = make_genhancer()
    model.start_stage1() if stage == 1 else model.start_stage2(dropout=0.5)
    with torch.no_grad():
        for name, parameter in model.visual.named_parameters():
            if name.endswith(".B"):
                parameter.normal_()
    for training in (True, False):
        model.train(training)
        once, again = (model.encode(images())[0] for _ in range(2))
        assert torch.equal(once, again) == (stage == 1 or not training)


def test_wrong_choices_are_refused(make_genhancer):
    with pytest.raises(ValueError, match="'only' or 'all'"):
        make_genhancer().start_stage2(trains="some")
    with pytest.raises(ValueError, match="'lora' or 'direct'"):
        make_genhancer().start_stage2(tuning="prefix")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vae_precision_under_autocast(make_genhancer, dtype):
    """The tokenizer computes in its weights' precision, whatever stands around it."""
    model, seen = make_genhancer(), []
    model.paradigm.tokenizer.to(dtype)
    model.paradigm.tokenizer.encoder.conv_out.register_forward_hook(
        lambda m, a, out: seen.append(out.dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(), draws(model))["loss"]
    assert seen == [dtype]
    assert torch.isfinite(loss) and loss.dtype == torch.float32
