"""backbones.py: the six presets at full shape, every spelling, and activations that are known."""

import open_clip
import pytest
import torch
from conftest import TINY_CLIP
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from evaluation.encoder import find_tokenizer
from lora import inject_lora, lora_layers
from presets import BACKBONES
from pretrained import backbones
from pretrained.backbones import describe_clip, load_clip
from settings import Settings, notes_of
from training.plan import fill, one_batch, skeleton

OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
# OpenAI's smallest and the paper's six. Preset: denoiser tokens, patch tokens, width of the global
# token, LoRA parameters of the blocks (M), mean and std, resize mode, quickgelu
PRESETS = {
    "openai-b32-224": (196, 49, 512, 2.65, OPENAI, "shortest", True),
    "openai-l14-224": (196, 256, 768, 7.08, OPENAI, "shortest", True),
    "openai-l14-336": (441, 576, 768, 7.08, OPENAI, "shortest", True),
    "metaclip-l14-224": (196, 256, 768, 7.08, OPENAI, "shortest", True),
    "metaclip-h14-224": (196, 256, 1024, 11.80, OPENAI, "shortest", True),
    "siglip-so400m-224": (196, 256, 1152, 8.70, HALF, "squash", False),
    "siglip-so400m-384": (576, 729, 1152, 8.70, HALF, "squash", False),
}


def test_every_preset_is_in_the_table():
    assert set(BACKBONES) == set(PRESETS)
    assert set(notes_of("preset")["choices"]) == {"toy", *PRESETS}


@pytest.mark.parametrize("denoiser", ["flow", "perceiver"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_at_full_shape(name, denoiser):
    """Built with fake weights: tokens, widths, LoRA's parameters, and one forward pass."""
    tokens, patches, width, lora, (mean, std), resize, quick = PRESETS[name]
    settings = Settings.of(name, denoiser=denoiser)
    info, weights = describe_clip(settings.clip)
    assert weights is None and (info.mean, info.std, info.resize_mode) == (mean, std, resize)
    assert info.model_cfg.get("quick_gelu", False) == quick
    _, model = skeleton(settings)
    side = info.image_size
    with FakeTensorMode():
        fill(model, "cpu")
        images, draws = one_batch(model, 1, "cpu")
        token, local = backbones.encode_visual(model.visual, images, local=True)
        assert token.shape == (1, width) and local.shape[:2] == (1, patches)
        assert model.patch_tokens == patches and model.paradigm.tokens == tokens
        if denoiser == "flow":
            assert model.paradigm.latent_shape == (16, side // 8, side // 8)
        assert model(images, draws)["loss"].shape == ()
    inject_lora(model.visual, bias="none")
    trained = sum(p.numel() for p in model.visual.parameters() if p.requires_grad)
    towers = {"b32": 768, "l14": 1024, "h14": 1280, "00m": 0}
    projection = 16 * (towers[name.split("-")[1][-3:]] + width)
    blocks = trained - (0 if "siglip" in name else projection)
    assert blocks / 1e6 == pytest.approx(lora, abs=0.005)


def test_siglips_pool_by_choice():
    """8.70 M in the blocks; 8.87 M with the pool's MLP."""
    with torch.device("meta"):
        info, _ = describe_clip("ViT-SO400M-14-SigLIP:webli")
        tower = backbones.build_clip(info).visual
    skip = ("attn_pool.q", "attn_pool.kv", "attn_pool.proj")
    names = inject_lora(tower, bias="none", skip=skip)
    assert [n for n in names if "attn_pool" in n] == [
        "trunk.attn_pool.mlp.fc1",
        "trunk.attn_pool.mlp.fc2",
    ]
    count = sum(p.numel() for p in tower.parameters() if p.requires_grad)
    assert count / 1e6 == pytest.approx(8.87, abs=0.005)
    assert len([n for n, _ in lora_layers(tower)]) == 27 * 4 + 2


# -- spellings -----------------------------------------------------------------------------------
@pytest.fixture
def named(monkeypatch):
    """A tiny architecture that open_clip knows by name, plain and with QuickGELU."""
    configs = {"Tiny": TINY_CLIP, "Tiny-quickgelu": {**TINY_CLIP, "quick_gelu": True}}
    monkeypatch.setattr(open_clip, "list_models", lambda: list(configs))
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: configs[name])
    tags = {"quick": {"quick_gelu": True, "mean": HALF[0], "std": HALF[1]}, "plain": {"url": "x"}}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: tags.get(tag, {}))
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: list(tags))
    return configs


@pytest.mark.parametrize("kind", ["a.safetensors", "b.pt", "c.bin"])
def test_architecture_by_name_weights_by_file(tmp_path, named, capsys, kind):
    torch.manual_seed(0)
    clip = open_clip.CLIP(**named["Tiny-quickgelu"]).eval()
    file = tmp_path / kind
    if kind.endswith("safetensors"):
        save_file(clip.state_dict(), file)
    else:  # as training scripts leave it: nested, with DDP's prefix, in half precision
        state = {f"module.{k}": v.half() for k, v in clip.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": state}, file)
    loaded, info = load_clip(f"Tiny-quickgelu:{file}")
    images = torch.rand(2, 3, 32, 32)
    difference = (loaded.encode_image(images) - clip.encode_image(images)).abs().max()
    assert difference < (1e-6 if kind.endswith("safetensors") else 1e-2)
    assert next(loaded.parameters()).dtype == torch.float32
    assert info.model_cfg["quick_gelu"] and (info.mean, info.std) == OPENAI
    assert "built with QuickGELU, as Tiny-quickgelu says" in capsys.readouterr().err
    assert "quick_gelu" in str(info.open_clip_config()), "and so in every checkpoint"


def test_a_known_mismatch_of_activations_is_an_error(named):
    assert describe_clip("Tiny-quickgelu:quick")[0].mean == HALF[0]
    with pytest.raises(ValueError, match="trained with QuickGELU.*use Tiny-quickgelu:quick"):
        describe_clip("Tiny:quick")
    with pytest.raises(ValueError, match="trained with GELU.*use Tiny:plain"):
        describe_clip("Tiny-quickgelu:plain")


def test_the_classic_trap_is_closed():
    with pytest.raises(ValueError, match="use ViT-L-14-quickgelu:openai"):
        describe_clip("ViT-L-14:openai")


@pytest.mark.parametrize(
    "model, message",
    [
        ("Tinny:quick", "did you mean Tiny"),
        ("Tiny", "add the weights"),
        ("Tiny:nothing", "no weights 'nothing' of it, only quick, plain"),
        ("Tiny:missing.pt", "no weights file missing.pt"),
        ("missing.safetensors", "is missing"),
    ],
)
def test_what_is_not_known_is_named(named, model, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_clip(model)


def test_wrong_files_are_named(tmp_path, named):
    clip = open_clip.CLIP(**{**TINY_CLIP, "embed_dim": 12})
    save_file(clip.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"does not fit.*size mismatch for text_projection"):
        load_clip(f"Tiny:{tmp_path / 'other.safetensors'}")
    (tmp_path / "cut.safetensors").write_bytes(b"1234567890")
    (tmp_path / "bad.pt").write_bytes(b"no torch file")
    for name in ("cut.safetensors", "bad.pt"):
        with pytest.raises(ValueError, match="cannot be read as tensors alone"):
            load_clip(f"Tiny:{tmp_path / name}")


class Evil:
    def __reduce__(self):
        return (open, ("/tmp/owned", "w"))


def test_nothing_is_unpickled(tmp_path, named):
    torch.save({"state_dict": {"x": Evil()}}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="cannot be read as tensors alone"):
        load_clip(f"Tiny:{tmp_path / 'evil.pt'}")


def test_a_transformers_folder_is_pointed_to_the_converter(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="export_hf.py --model"):
        load_clip(str(tmp_path))


def test_siglips_tokenizer_is_an_extra_with_a_clear_message(monkeypatch):
    def refuse(*args, **kwargs):
        raise ImportError("No module named 'transformers'")

    monkeypatch.setattr(open_clip.tokenizer, "HFTokenizer", refuse)
    info, _ = describe_clip("ViT-SO400M-14-SigLIP:webli")
    with pytest.raises(ValueError, match="pip install transformers"):
        find_tokenizer(info)
