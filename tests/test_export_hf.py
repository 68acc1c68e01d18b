"""export_hf.py: transformers loads what it writes, and every bit comes back."""

import json
import shutil
import sys

import numpy as np
import open_clip
import pytest
import torch
from conftest import ROOT, SIGLIP, TINY_CLIP
from PIL import Image
from safetensors.torch import load_file, save_file

import export_hf

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("small_siglip")

PREPROCESS = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "resize_mode": "shortest"}
SQUASH = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
# Every kind at a size of its own, so that no width can be mistaken for another.
CLIP_QUICK = {**TINY_CLIP, "quick_gelu": True}
CLIP_H = {  # 80 wide heads in the H/14 are what head_width is for
    "embed_dim": 24,
    "vision_cfg": {"image_size": 42, "patch_size": 14, "width": 40, "layers": 3, "head_width": 20},
    "text_cfg": {"context_length": 9, "vocab_size": 60, "width": 32, "heads": 2, "layers": 1},
}


def write_folder(folder, model_cfg, preprocess):
    """A random open_clip model as a local-dir folder; weights all alive (no zeros or ones)."""
    torch.manual_seed(0)
    build = open_clip.CustomTextCLIP if model_cfg.get("custom_text") else open_clip.CLIP
    model = build(**{k: v for k, v in model_cfg.items() if k != "custom_text"}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return model


def run(monkeypatch, capsys, *args):
    """The command, in this process: exit code and what it printed."""
    monkeypatch.setattr(sys, "argv", ["export_hf.py", *map(str, args)])
    code = 0
    try:
        export_hf.main()
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr()


@pytest.mark.parametrize(
    "model_cfg, preprocess",
    [(TINY_CLIP, PREPROCESS), (CLIP_QUICK, PREPROCESS), (CLIP_H, PREPROCESS), (SIGLIP, SQUASH)],
    ids=["clip", "quickgelu", "head_width", "siglip"],
)
def test_transformers_loads_it_and_sees_the_same(tmp_path, model_cfg, preprocess):
    model = write_folder(tmp_path / "in", model_cfg, preprocess)
    export_hf.export(tmp_path / "in", tmp_path / "hf")
    siglip = "timm_model_name" in model_cfg["vision_cfg"]
    kind = transformers.SiglipModel if siglip else transformers.CLIPModel
    theirs, report = kind.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not report["mismatched_keys"]

    side = model_cfg["vision_cfg"]["image_size"]
    images = torch.randn(3, 3, side, side)
    text = torch.randint(1, 50, (4, model_cfg["text_cfg"]["context_length"]))
    text[:, 5] = model_cfg["text_cfg"]["vocab_size"] - 1  # CLIP pools here
    with torch.no_grad():
        out = theirs.eval()(input_ids=text, pixel_values=images, attention_mask=None)
        mine = model.encode_image(images, normalize=True), model.encode_text(text, normalize=True)
        logits = model.logit_scale.exp() * mine[0] @ mine[1].T
        if siglip:
            logits = logits + model.logit_bias
    assert torch.allclose(out.image_embeds, mine[0], atol=1e-5)
    assert torch.allclose(out.text_embeds, mine[1], atol=1e-5)
    assert torch.allclose(out.logits_per_image, logits, rtol=1e-4, atol=1e-4)
    # As a vision tower of LLaVA: the last hidden states.
    tower = transformers.SiglipVisionModel if siglip else transformers.CLIPVisionModel
    vision = tower.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        states = vision(images, output_hidden_states=True).hidden_states
    assert len(states) == 1 + vision.config.num_hidden_layers

    export_hf.restore(tmp_path / "hf", tmp_path / "back")
    before = load_file(tmp_path / "in" / "open_clip_model.safetensors")
    after = load_file(tmp_path / "back" / "open_clip_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before), "bit-equal"
    configs = [(tmp_path / d / "open_clip_config.json").read_text() for d in ("in", "back")]
    assert json.loads(configs[0]) == json.loads(configs[1])


def test_open_clip_loads_what_came_back(tmp_path):
    model = write_folder(tmp_path / "in", TINY_CLIP, PREPROCESS)
    export_hf.export(tmp_path / "in", tmp_path / "hf")
    export_hf.restore(tmp_path / "hf", tmp_path / "back")
    again, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'back'}")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.encode_image(images), again.eval().encode_image(images))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_a_folder_that_transformers_wrote(tmp_path, activation):
    """Weights released in transformers' layout, sharded or pickled, without our notes inside."""
    torch.manual_seed(0)
    tower = {"intermediate_size": 96, "num_attention_heads": 2, "hidden_act": activation}
    tower |= {"num_hidden_layers": 2, "projection_dim": 24}
    vision = dict(hidden_size=48, image_size=32, patch_size=8, **tower)
    text = {"hidden_size": 32, "vocab_size": 60, "max_position_embeddings": 16, "eos_token_id": 59}
    text |= {"bos_token_id": 58, "pad_token_id": 59}
    config = transformers.CLIPConfig(
        vision_config=vision, text_config={**tower, **text}, projection_dim=24
    )
    theirs = transformers.CLIPModel(config).eval()
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    shutil.copytree(tmp_path / "one", tmp_path / "pickled")
    state = load_file(tmp_path / "pickled" / "model.safetensors")
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]  # of older versions
    torch.save(state, tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    images = torch.randn(2, 3, 32, 32)
    tokens = torch.randint(1, 50, (2, 16))
    tokens[:, 7] = 59
    with torch.no_grad():
        out = theirs(input_ids=tokens, pixel_values=images)
    for name in ("one", "many", "pickled"):
        export_hf.restore(tmp_path / name, tmp_path / "oc" / name)
        path = f"local-dir:{tmp_path / 'oc' / name}"
        mine = open_clip.create_model_from_pretrained(path, return_transform=False).eval()
        with torch.no_grad():
            image = mine.encode_image(images, normalize=True)
            words = mine.encode_text(tokens, normalize=True)
        assert torch.allclose(image, out.image_embeds, atol=1e-5)
        assert torch.allclose(words, out.text_embeds, atol=1e-5)


def test_full_size_siglip_is_found_by_its_shape():
    text = {"max_position_embeddings": 64, "hidden_size": 1152, "vocab_size": 32000}
    vision = {"hidden_size": 1152, "image_size": 384, "patch_size": 14, "num_hidden_layers": 27}
    config = {"model_type": "siglip", "vision_config": vision, "text_config": text}
    about = export_hf.open_clip_config(config, ROOT)
    assert about["model_cfg"] == open_clip.get_model_config("ViT-SO400M-14-SigLIP-384")
    assert about["preprocess_cfg"] == {**SQUASH, "mean": [0.5] * 3}


FULL = ["ViT-L-14-quickgelu", "ViT-H-14-quickgelu", "ViT-SO400M-14-SigLIP"]


@pytest.mark.parametrize("name", FULL)
def test_full_size_names_and_shapes(name):
    """On the meta device: every tensor of the published models has its place in transformers."""
    about = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": PREPROCESS}
    model = export_hf.build_empty(about, ROOT)
    state = export_hf.convert(model.state_dict(), export_hf.rules_for(model), export=True)
    config = export_hf.transformers_config(model, about, state)
    config.pop(export_hf.OURS)
    siglip = config["model_type"] == "siglip"
    with torch.device("meta"):
        theirs = (
            transformers.SiglipModel(transformers.SiglipConfig(**config))
            if siglip
            else transformers.CLIPModel(transformers.CLIPConfig(**config))
        )
    expected = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    assert {k: tuple(v.shape) for k, v in state.items()} == expected
    derived = export_hf.open_clip_config(config, ROOT)
    again = export_hf.build_empty(derived, ROOT).state_dict()
    assert {k: v.shape for k, v in again.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def test_the_tokenizer_is_clips(tmp_path):
    text_cfg = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    about = {"model_cfg": {**TINY_CLIP, "text_cfg": text_cfg}}
    files, line = export_hf.tokenizer_files(about)
    assert "vocab.json" in line
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text, encoding="utf-8")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    mine = open_clip.SimpleTokenizer()
    for sentence in (
        "a photo of a dog",
        "Two CATS, three naïve dogs & 12 keys!",
        "it's a colour: «ünïcode»",
    ):
        wanted = mine(sentence)[0]
        got = theirs(sentence, padding="max_length", max_length=77)["input_ids"]
        end = wanted.argmax()
        assert got[: end + 1] == wanted[: end + 1].tolist()
    for model_cfg, reason in ((SIGLIP, "sentencepiece"), (TINY_CLIP, "60")):
        files, line = export_hf.tokenizer_files({"model_cfg": model_cfg})
        assert not files and reason in line


@pytest.mark.parametrize("model_cfg, preprocess", [(CLIP_H, PREPROCESS), (SIGLIP, SQUASH)])
def test_the_preprocessor_is_the_same(tmp_path, model_cfg, preprocess):
    about = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
    config = export_hf.preprocessor_config(about)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    kind = getattr(transformers, config["image_processor_type"])
    rows, columns = np.mgrid[:90, :70]
    waves = [127 + 100 * np.sin(rows / 9 + columns / k) for k in (7, 11, 17)]
    image = Image.fromarray(np.stack(waves, -1).astype(np.uint8))
    theirs = kind.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]
    mine = open_clip.image_transform(
        model_cfg["vision_cfg"]["image_size"],
        is_train=False,
        mean=preprocess["mean"],
        std=preprocess["std"],
        resize_mode=preprocess["resize_mode"],
        interpolation="bicubic",
    )(image)
    assert theirs.shape == mine.shape and (theirs - mine).abs().max() < 0.05


def test_the_command_line_and_its_mistakes(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path / "in", TINY_CLIP, PREPROCESS)
    code, said = run(monkeypatch, capsys, "--model", tmp_path / "in", "--out", tmp_path / "hf")
    assert code == 0 and "tensors, CLIPModel" in said.out
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "in", broken)
    file = broken / "open_clip_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "in", other)
    config = json.loads((other / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["layers"] = 3
    (other / "open_clip_config.json").write_text(json.dumps(config))
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "config.json").write_text('{"model_type": "bert"}')
    for source, target, words in (
        (tmp_path / "missing", tmp_path / "x", "no folder"),
        (tmp_path / "empty", tmp_path / "x", "no model folder"),
        (tmp_path / "in", tmp_path / "in", "give another folder"),
        (broken, tmp_path / "x", "not a whole safetensors file"),
        (other, tmp_path / "x", 'Missing key(s) in state_dict: "visual.transformer.resblocks.2'),
        (bert, tmp_path / "x", "no vision_config"),
    ):
        code, said = run(monkeypatch, capsys, "--model", source, "--out", target)
        assert code == 2 and words in said.err, (source, said.err)
        assert len(said.err.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists(), "nothing is left of what failed"
