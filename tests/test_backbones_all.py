"""backbones.py beyond the paper's six: every architecture that open_clip knows, by name."""

import copy
import dataclasses
import json

import open_clip
import pytest
import torch
from conftest import ROOT, TINY_CLIP, TINY_DENOISER, TINY_VAE
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import load_file, save_file

from evaluation.encoder import Encoder
from flow_denoiser import FlowDenoiser
from genhancer import GenHancer
from lora import lora_layers
from paradigms import Continuous
from pretrained import backbones
from pretrained.autoencoders import VAE
from pretrained.backbones import ClipInfo, build_clip, describe_clip, encode_visual, load_clip

# No ViT, so nothing to make the condition of: convolutions, and Swin's shrinking maps.
NO_VIT = ("RN", "convnext", "swin", "MobileCLIP-S", "MobileCLIP2-S")
# CLIPs whose text tower is one of transformers' models.
HUB_TEXTS = [
    name for name in open_clip.list_models()
    if "hf_model_name" in open_clip.get_model_config(name)["text_cfg"]
]  # fmt: skip
ARCHITECTURE = ClipInfo("", {}, (0.0,) * 3, (1.0,) * 3)
IMAGENET = (0.485, 0.456, 0.406)
HALF, OPENAI = (0.5, 0.5, 0.5), (0.48145466, 0.4578275, 0.40821073)
NOTHING, EVERYTHING = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def visual_of(name):
    """(info, a holder of the image tower at its full shape but two blocks deep); on the device of
    the context."""
    config = open_clip.get_model_config(name)
    config["text_cfg"] = {"width": 8, "heads": 1, "layers": 1, "vocab_size": 4}
    info = dataclasses.replace(ARCHITECTURE, name=name, model_cfg=config)
    if isinstance(config["vision_cfg"].get("layers"), int):
        config["vision_cfg"]["layers"] = 2
    clip = build_clip(info).eval()
    trunk = getattr(clip.visual, "trunk", None)
    if hasattr(trunk, "blocks"):
        trunk.blocks = trunk.blocks[:2]
    return info, clip


def genhancer_of(info, clip):
    """Around a VAE that leaves the resolution as it is, so that every image size fits."""
    vae = VAE(dataclasses.replace(TINY_VAE, channel_multipliers=(1,)))
    return GenHancer(clip, info, Continuous(vae, FlowDenoiser(TINY_DENOISER), info.image_size))


# -- architectures -------------------------------------------------------------------------------
def test_every_vit_of_open_clip_gets_adapters_that_learn_and_others_one_clear_line():
    """By name, on the meta device: built, looked through, given adapters (`start_stage2`), and a
    gradient from the global token to every number that trains."""
    refused, shapes, seen = set(), {}, {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        tower = json.dumps([config["embed_dim"], config["vision_cfg"]])
        same = seen.setdefault(tower, name)
        if same != name:  # but for the activation or the text tower
            refused |= {name} if same in refused else set()
            shapes |= {name: shapes[same]} if same in shapes else {}
            continue
        with torch.device("meta"):
            info, clip = visual_of(name)
            try:
                model = genhancer_of(info, clip)
            except ValueError as error:
                assert "is no ViT: it has neither patch tokens nor" in str(error), name
                refused.add(name)
                continue
            model.start_stage2()
            model.train()
            images = torch.zeros(1, 3, info.image_size, info.image_size)
            token, patches = encode_visual(model.visual, images, local=True)
            assert len(list(lora_layers(model.visual))) >= 4, name
            token.sum().backward()
        trained = {n: p for n, p in model.visual.named_parameters() if p.requires_grad}
        without = [n for n, p in trained.items() if p.grad is None]
        assert not without, f"{name}: no gradient reaches {without[:3]}"
        assert token.shape == (1, info.model_cfg["embed_dim"]), name
        assert patches.shape[1] == model.patch_tokens
        shapes[name] = patches.shape[1]
    assert refused == {n for n in open_clip.list_models() if n.startswith(NO_VIT)}
    assert len(shapes) + len(refused) == len(open_clip.list_models()) and len(refused) < 35
    some = {
        "ViT-SO400M-14-SigLIP2-378": 27**2,
        "ViT-B-16-SigLIP2-512": 32**2,
        "ViT-L-14-CLIPA-336": 24**2,
        "PE-Core-L-14-336": 24**2,
        "EVA02-L-14-336": 24**2,
        "MobileCLIP-B": 14**2,
        "coca_ViT-L-14": 16**2,
        "ViTamin-L-384": 24**2,
    }
    assert {n: shapes[n] for n in some} == some


# The smallest of each kind of tower: class token, mean, CoCa's pool; timm's class token, two
# pools with and without a class token beside them, mean.
KINDS = ["ViT-S-32-alt", "ViT-L-14-CLIPA", "coca_ViT-B-32", "MobileCLIP-B", "ViT-B-32-SigLIP2-256"]
KINDS += ["PE-Core-T-16-384", "ViTamin-S", "vit_medium_patch16_gap_256"]


@pytest.mark.parametrize("name", KINDS)
def test_the_global_token_is_open_clips_own_with_and_without_patch_tokens(name):
    info, clip = visual_of(name)
    images = torch.rand(2, 3, info.image_size, info.image_size)
    with torch.no_grad():
        own = clip.visual(images)
        own = own[0] if isinstance(own, tuple) else own
        token, patches = encode_visual(clip.visual, images, local=True)
        assert torch.equal(token, own) and torch.equal(encode_visual(clip.visual, images)[0], own)
        assert encode_visual(clip.visual, images)[1] is None
        # A patch token is of its place: the last one sees a change in its corner most.
        changed = images.clone()
        changed[:, :, -32:, -32:] = 0
        moved = (encode_visual(clip.visual, changed, local=True)[1] - patches).abs().mean((0, 2))
    last = patches.shape[1] - 1
    assert int(moved.argmax()) >= 0.8 * last, "tokens keep the order of the image"
    assert moved[-1] > 2 * moved[: last // 2].mean()


@pytest.mark.parametrize("name", ["MobileCLIP-B", "ViTamin-S"])
def test_in_training_a_towers_own_batch_statistics_and_dropping_of_paths_stay_off(name):
    """Only the adapters' dropout is random: without it, training computes what eval does."""
    info, clip = visual_of(name)
    kinds = {type(m).__name__ for m in clip.visual.modules()}
    assert "DropPath" in kinds or any("BatchNorm" in kind for kind in kinds), kinds
    model = genhancer_of(info, clip)
    model.start_stage2(dropout=0.0)
    images = torch.rand(1, 3, info.image_size, info.image_size)
    expected = model.eval().encode(images)[0]
    buffers = copy.deepcopy(dict(model.visual.named_buffers()))
    assert torch.equal(model.train().encode(images)[0], expected)
    assert all(torch.equal(b, buffers[n]) for n, b in model.visual.named_buffers())
    adapters = [a for _, layer in lora_layers(model.visual) for a in layer.adapters.values()]
    assert adapters and all(adapter.dropout.training for adapter in adapters)


# -- preprocessing -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "model, mean, std, resize, interpolation",
    [
        ("ViT-L-14-CLIPA-336:datacomp1b", IMAGENET, (0.229, 0.224, 0.225), "squash", "bilinear"),
        ("MobileCLIP-B:datacompdr", NOTHING, EVERYTHING, "shortest", "bilinear"),
        ("PE-Core-L-14-336:meta", HALF, HALF, "squash", "bilinear"),
        ("ViT-SO400M-16-SigLIP2-512:webli", HALF, HALF, "squash", "bicubic"),
        ("ViT-B-16-SigLIP2:webli", HALF, HALF, "squash", "bicubic"),
    ],
)
def test_a_models_preprocessing_is_kept(model, mean, std, resize, interpolation):
    info, _ = describe_clip(model)
    assert (info.mean, info.std) == (mean, std)
    assert (info.resize_mode, info.interpolation) == (resize, interpolation)
    written = info.open_clip_config()["preprocess_cfg"]
    assert written.get("interpolation", "bicubic") == interpolation
    again = ClipInfo.from_config("x", json.loads(json.dumps(info.open_clip_config())))
    assert dataclasses.replace(again, name=info.name) == info


def test_twenty_one_published_weights_resize_bilinearly_and_all_are_known_to_do_so():
    bilinear = []
    for name, tag in open_clip.list_pretrained():
        try:
            info, _ = describe_clip(f"{name}:{tag}")
        except ValueError:  # the other activation's name
            continue
        known = open_clip.get_pretrained_cfg(name, tag)
        assert info.interpolation == known["interpolation"], (name, tag)
        assert info.resize_mode == known["resize_mode"] and info.mean == tuple(known["mean"])
        bilinear += [name] if info.interpolation == "bilinear" else []
    assert len(bilinear) == 21 and {n.split("-")[0] for n in bilinear} == {
        "ViT", "MobileCLIP", "MobileCLIP2", "PE"
    }  # fmt: skip


def test_weights_from_a_file_are_preprocessed_as_all_published_ones_of_that_architecture(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"")
    found = {}
    for name in ("PE-Core-B-16", "ViT-B-16-SigLIP2", "ViT-L-14", "ViT-H-14", "ViT-S-16"):
        info, _ = describe_clip(f"{name}:{tmp_path / 'w.safetensors'}")
        found[name] = info.mean, info.resize_mode, info.interpolation
    assert found == {
        "PE-Core-B-16": (HALF, "squash", "bilinear"),
        "ViT-B-16-SigLIP2": (HALF, "squash", "bicubic"),
        "ViT-L-14": (OPENAI, "shortest", "bicubic"),  # one of its weights has another mean
        "ViT-H-14": (OPENAI, "shortest", "bicubic"),  # and here another way to resize
        "ViT-S-16": (OPENAI, "shortest", "bicubic"),  # nobody published any
    }


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pictures_are_judged_with_the_models_own_interpolation(interpolation):
    info = ClipInfo("tiny", TINY_CLIP, HALF, HALF, "shortest", interpolation, ("a", "word"))
    picture = torch.randint(0, 256, (90, 70, 3), dtype=torch.uint8).numpy()
    how = {"is_train": False, "mean": HALF, "std": HALF, "resize_mode": "shortest"}
    both = {
        kind: image_transform(32, interpolation=kind, **how)(Image.fromarray(picture))
        for kind in ("bicubic", "bilinear")
    }
    assert not torch.equal(both["bicubic"], both["bilinear"])
    ours = Encoder("tiny", open_clip.CLIP(**TINY_CLIP), info)._stacked([picture])[0]
    assert torch.equal(ours, both[interpolation])


def test_an_enhanced_folder_of_a_bilinear_model_is_loaded_as_such_by_open_clip(tmp_path):
    info = ClipInfo("tiny", TINY_CLIP, HALF, HALF, "squash", "bilinear")
    clip = open_clip.CLIP(**TINY_CLIP)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(info.open_clip_config()))
    save_file(clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    loaded, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    known = open_clip.get_model_preprocess_cfg(loaded)
    assert (known["interpolation"], known["resize_mode"]) == ("bilinear", "squash")
    assert load_clip(str(tmp_path))[1].interpolation == "bilinear"


@pytest.mark.parametrize("run", ["flow", "perceiver"])
def test_runs_from_before_interpolation_was_written_still_agree(run):
    state = json.loads(next((ROOT / "toy" / "runs" / run).glob("stage2/*/state.json")).read_text())
    info, _ = describe_clip(str(ROOT / "toy" / "clip.safetensors"))
    assert info.open_clip_config() == state["architecture"]["clip"]
    assert info.interpolation == "bicubic"


# -- text towers of transformers -----------------------------------------------------------------
def test_roberta_is_not_refused_with_its_own_name_as_remedy():
    info, weights = describe_clip("roberta-ViT-B-32:laion2b_s12b_b32k")
    assert info.model_cfg["quick_gelu"] and weights is None, "as open_clip builds it"
    with pytest.raises(ValueError, match="use ViT-B-32-quickgelu:openai"):
        describe_clip("ViT-B-32:openai")
    for name, tag in open_clip.list_pretrained():
        try:
            describe_clip(f"{name}:{tag}")
        except ValueError as error:
            assert f"use {name}:" not in str(error), "a remedy that is the complaint"


@pytest.fixture
def roberta(monkeypatch, tmp_path):
    """A tiny CLIP whose text tower is on the hub, and a weights file of it."""
    text = {"hf_model_name": "absent/roberta", "hf_tokenizer_name": "absent/roberta"}
    config = {**TINY_CLIP, "text_cfg": text}
    monkeypatch.setattr(open_clip, "list_models", lambda: ["Tiny-roberta"])
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: copy.deepcopy(config))
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: [])
    visual = open_clip.CLIP(**TINY_CLIP).visual.state_dict()
    state = {f"visual.{k}": v for k, v in visual.items()} | {"logit_scale": torch.tensor(2.0)}
    state |= {"text.transformer.layer.0.weight": torch.rand(5, 4), "text.proj.bias": torch.rand(3)}
    save_file(state, tmp_path / "w.safetensors")
    return state, tmp_path


def test_a_text_tower_from_the_hub_is_carried_where_it_cannot_be_built(roberta):
    state, folder = roberta
    clip, info = load_clip(f"Tiny-roberta:{folder / 'w.safetensors'}")
    assert isinstance(clip.text, backbones.CarriedText)
    kept = clip.state_dict()
    assert kept.keys() == state.keys() and all(torch.equal(kept[k], state[k]) for k in state)
    assert clip.encode_image(torch.rand(1, 3, 32, 32)).shape == (1, 24)
    with pytest.raises(ValueError, match="'text tower is transformers' absent/roberta'|fetch its"):
        clip.encode_text(torch.zeros(1, 4, dtype=torch.long))
    # The enhanced folder: written in full, and loaded again.
    (folder / "open_clip_config.json").write_text(json.dumps(info.open_clip_config()))
    save_file(kept, folder / "open_clip_model.safetensors")
    again, _ = load_clip(str(folder))
    assert all(torch.equal(again.state_dict()[k], state[k]) for k in state)
    assert load_file(folder / "open_clip_model.safetensors").keys() == state.keys()


def test_a_missing_tensor_of_the_image_tower_is_still_named(roberta):
    state, folder = roberta
    state.pop("visual.proj")
    save_file(state, folder / "w.safetensors")
    with pytest.raises(ValueError, match="does not fit.*visual.proj"):
        load_clip(f"Tiny-roberta:{folder / 'w.safetensors'}")


def test_all_hub_text_towers_can_be_described_for_training():
    assert {"roberta-ViT-B-32", "xlm-roberta-large-ViT-H-14", "nllb-clip-base"} < set(HUB_TEXTS)
    for name in HUB_TEXTS:
        info = dataclasses.replace(
            ARCHITECTURE, name=name, model_cfg=open_clip.get_model_config(name)
        )
        with torch.device("meta"):
            assert build_clip(info).visual is not None


# -- sizes ---------------------------------------------------------------------------------------
def test_images_are_squares_of_one_size():
    def size(vision):
        return dataclasses.replace(ARCHITECTURE, model_cfg={"vision_cfg": vision}).image_size

    assert size({}) == 224 and size({"image_size": 336}) == size({"image_size": [336, 336]}) == 336
    with pytest.raises(ValueError, match="336 × 224 pixels; here images are square"):
        size({"image_size": (336, 224)})
