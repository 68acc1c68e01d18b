"""export_hf.py: transformers loads what it writes, and every bit comes back."""

import json
import logging
import os
import re
import shutil
import stat
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
    finally:
        logging.disable(logging.NOTSET)
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


def test_what_pools_in_another_way_is_refused(tmp_path):
    """All names and shapes would fit, and every feature would be another."""
    changes = [(TINY_CLIP, "text_cfg", {"pool_type": "eos"})]  # MetaCLIP 2's worldwide models
    changes += [(c, "text_cfg", {"no_causal_mask": c is TINY_CLIP}) for c in (TINY_CLIP, SIGLIP)]
    for i, (usual, part, more) in enumerate(changes):
        write_folder(tmp_path / f"{i}", {**usual, part: usual[part] | more}, PREPROCESS)
        with pytest.raises(ValueError, match="pools or masks its tokens in another way"):
            export_hf.export(tmp_path / f"{i}", tmp_path / "hf")


def test_open_clip_loads_what_came_back(tmp_path):
    model = write_folder(tmp_path / "in", TINY_CLIP, PREPROCESS)
    export_hf.export(tmp_path / "in", tmp_path / "hf")
    export_hf.restore(tmp_path / "hf", tmp_path / "back")
    again, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'back'}")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.encode_image(images), again.eval().encode_image(images))


@pytest.mark.parametrize("activation, eps", [("quick_gelu", 1e-5), ("gelu", 1e-2)])
def test_a_folder_that_transformers_wrote(tmp_path, activation, eps):
    """Weights released in transformers' layout, sharded or pickled, without our notes inside."""
    torch.manual_seed(0)
    tower = {"intermediate_size": 96, "num_attention_heads": 2, "hidden_act": activation}
    tower |= {"num_hidden_layers": 2, "projection_dim": 24, "layer_norm_eps": eps}
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
    assert "CLIP's own" in line and "vocab.json" in files
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
    for about, reason in (
        ({"model_cfg": SIGLIP}, "take that of timm/ViT-B-16-SigLIP"),
        ({"model_cfg": TINY_CLIP}, "unknown; not CLIP's"),
        ({"model_cfg": TINY_CLIP, "words": ["fish"]}, "whole words"),
    ):
        files, line = export_hf.tokenizer_files(about)
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


# -- the card ------------------------------------------------------------------------------------
OURS = """---
library_name: open_clip
tags: [clip, genhancer]
license: mit
---
# CLIP enhanced by GenHancer

Base: `toy`.

## With open_clip

```python
import open_clip

# "." is the folder of this file
model, preprocess = open_clip.create_model_from_pretrained("local-dir:.")
```

In transformers' layout: `python export_hf.py`, from open_clip's.

## How it was made

| stage | loss |
|---|---|
| 2 | 0.5 |

Licence: that of the base.
"""
CLIP_WORDS = {  # a text tower of CLIP's own tokens, as narrow as can be
    **TINY_CLIP,
    "text_cfg": {**TINY_CLIP["text_cfg"], "vocab_size": 49408},
}


def execute(folder, monkeypatch):
    """All Python of a card, in the folder where it lies."""
    monkeypatch.chdir(folder)
    card, space = (folder / "README.md").read_text(), {}
    blocks = re.findall(r"^```python\n(.*?)^```$", card, re.S | re.M)
    assert len(blocks) == 1
    exec(blocks[0], space)
    return space["model"], card


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_card_of_each_layout(tmp_path, monkeypatch, kind):
    """Loading lines that work where the card lies, and of the old card what is still true."""
    source = tmp_path / "secret" / "my-run" / "enhanced"
    model = write_folder(
        source, *((CLIP_WORDS, PREPROCESS) if kind == "clip" else (SIGLIP, SQUASH))
    )
    (source / "README.md").write_text(OURS)
    export_hf.export(source, tmp_path / "hf")
    export_hf.restore(tmp_path / "hf", tmp_path / "back")
    export_hf.export(tmp_path / "back", tmp_path / "again")

    theirs, there = execute(tmp_path / "hf", monkeypatch)
    assert type(theirs).__name__ == ("CLIPModel" if kind == "clip" else "SiglipModel")
    mine, back = execute(tmp_path / "back", monkeypatch)
    assert torch.equal(mine.state_dict()["logit_scale"], model.state_dict()["logit_scale"])
    tokenizer = "CLIP's own" if kind == "clip" else "take that of timm/ViT-B-16-SigLIP"
    for card, library, name in ((there, "transformers", "my-run"), (back, "open_clip", "hf")):
        head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.S).groups()
        lines = head.splitlines()
        assert lines == [f"library_name: {library}", "tags: [clip, genhancer]", "license: mit"]
        assert body.startswith(f"# {name}, converted for {library}\n")
        assert "secret" not in card and tokenizer in card
        for kept in ("# CLIP enhanced", "Base: `toy`", "| stage | loss |\n|---|---|\n| 2 | 0.5 |"):
            assert body.count(kept) == 1
        assert body.endswith("Licence: that of the base.\n")
    assert "import open_clip" not in there and "export_hf.py" not in there
    assert "import transformers" not in back and "AutoModel" not in back
    again = (tmp_path / "again" / "README.md").read_text()
    assert again.replace("# back,", "# my-run,") == there, "nothing piles up"


def test_the_tokenizer_that_the_card_speaks_of_is_there(tmp_path):
    write_folder(tmp_path / "in", CLIP_WORDS, PREPROCESS)
    export_hf.export(tmp_path / "in", tmp_path / "hf")
    export_hf.restore(tmp_path / "hf", tmp_path / "back")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    mine = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'back'}")
    text = "two cats, three keys"
    row = mine(text)[0]
    assert row.argmax() > 3 and theirs(text)["input_ids"] == row[: row.argmax() + 1].tolist()


def test_a_model_without_a_card_gets_one(tmp_path, monkeypatch):
    write_folder(tmp_path / "in", TINY_CLIP, PREPROCESS)
    export_hf.export(tmp_path / "in", tmp_path / "hf")
    _, card = execute(tmp_path / "hf", monkeypatch)
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: zero-shot")
    assert "# in, converted for transformers" in card and str(tmp_path) not in card


# -- spellings of --model ------------------------------------------------------------------------
@pytest.fixture
def published(monkeypatch, tmp_path):
    """Two small models that open_clip knows by name, and weights trained with QuickGELU that it
    would download. Returns: the model that the weights are of."""
    for name, quick in (("tiny", False), ("tiny-quickgelu", True)):
        config = {**TINY_CLIP, "quick_gelu": quick}
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
        known = {"quick_gelu": True, "mean": (0.1, 0.2, 0.3), "interpolation": "bilinear"}
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"quick": known})
    model = write_folder(tmp_path / "tiny", CLIP_QUICK, PREPROCESS)
    file = str(tmp_path / "tiny" / "open_clip_model.safetensors")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *a, **k: file)
    return model


def test_every_spelling_of_a_model(published, tmp_path, monkeypatch, capsys):
    """A folder, a run, FILE.safetensors, NAME:TAG and NAME:FILE of the same weights: all tensors
    alike, and the activation with them."""
    folder = tmp_path / "tiny"
    weights = folder / "open_clip_model.safetensors"
    shutil.copytree(folder, tmp_path / "runs" / "a" / "enhanced")
    (tmp_path / "runs" / "a" / "config.json").write_text('{"settings": {}}')
    shutil.copy(weights, tmp_path / "file.safetensors")
    shutil.copy(folder / "open_clip_config.json", tmp_path / "file.json")
    wrapped = {f"module.{k}": v.half() for k, v in published.state_dict().items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "file.pt")
    expected = None
    for number, spelling in enumerate(
        (
            folder,
            tmp_path / "runs" / "a",
            tmp_path / "file.safetensors",
            "tiny-quickgelu:quick",
            f"tiny-quickgelu:{weights}",
            f"tiny-quickgelu:{tmp_path / 'file.pt'}",
        )
    ):
        out = tmp_path / f"out{number}"
        code, said = run(monkeypatch, capsys, "--model", spelling, "--out", out)
        assert code == 0, said.err
        tensors = load_file(out / "model.safetensors")
        expected = expected or tensors
        rounded = 1e-3 if str(spelling).endswith(".pt") else 0.0
        assert tensors.keys() == expected.keys()
        assert all(torch.allclose(tensors[k], expected[k], rtol=rounded, atol=rounded)
                   for k in tensors)  # fmt: skip
        assert {t.dtype for t in tensors.values()} == {torch.float32}
        config = json.loads((out / "config.json").read_text())
        assert config["vision_config"]["hidden_act"] == "quick_gelu"
        assert ("no weights can tell" in said.out) == (number > 3)
        picture = json.loads((out / "preprocessor_config.json").read_text())
        if number == 3:  # what is known about published weights
            assert picture["image_mean"] == [0.1, 0.2, 0.3] and picture["resample"] == 2
            assert picture["image_std"] == list(open_clip.OPENAI_DATASET_STD)
        assert str(tmp_path) not in (out / "README.md").read_text()
    assert "# a, converted" in (tmp_path / "out1" / "README.md").read_text()
    assert "# tiny-quickgelu:quick, con" in (tmp_path / "out3" / "README.md").read_text()
    assert "# file.pt, converted" in (tmp_path / "out5" / "README.md").read_text()


def test_the_wrong_activation_is_refused(published, tmp_path, monkeypatch, capsys):
    """open_clip would warn and go on, and the features would be worse."""
    code, said = run(monkeypatch, capsys, "--model", "tiny:quick", "--out", tmp_path / "x")
    assert code == 2 and "use tiny-quickgelu:quick" in said.err and not (tmp_path / "x").exists()
    wanted = "ViT-L-14:openai"
    code, said = run(monkeypatch, capsys, "--model", wanted, "--out", tmp_path / "x")
    assert code == 2 and "use ViT-L-14-quickgelu:openai" in said.err


def test_a_failed_download_is_one_line(published, tmp_path, monkeypatch, capfd):
    def no_network(*args, **kwargs):
        raise OSError("no route to host\nafter 5 tries")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", no_network)
    monkeypatch.setattr(logging.root, "handlers", [])  # as in a process of its own
    arguments = "--model", "tiny-quickgelu:quick", "--out", tmp_path / "x"
    code, said = run(monkeypatch, capfd, *arguments)
    assert code == 2 and "no route to host" in said.err
    assert len(said.err.strip().splitlines()) == 1


# -- the command ---------------------------------------------------------------------------------
def test_files_are_made_with_the_users_umask(tmp_path):
    write_folder(tmp_path / "in", CLIP_WORDS, PREPROCESS)
    before = os.umask(0o027)
    try:
        export_hf.export(tmp_path / "in", tmp_path / "hf")
        export_hf.restore(tmp_path / "hf", tmp_path / "back")
    finally:
        os.umask(before)
    files = [*(tmp_path / "hf").iterdir(), *(tmp_path / "back").iterdir()]
    assert len(files) == 10
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o640}


def test_the_command_line_and_its_mistakes(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path / "in", TINY_CLIP, PREPROCESS)
    code, said = run(monkeypatch, capsys, "--model", tmp_path / "in", "--out", tmp_path / "hf")
    assert code == 0 and "tensors, CLIPModel" in said.out
    (tmp_path / "empty").mkdir()
    for name in ("broken", "other", "strange"):
        shutil.copytree(tmp_path / "in", tmp_path / name)
    file = tmp_path / "broken" / "open_clip_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    for name, key, value in (("other", "layers", 3), ("strange", "no_such_layer", 3)):
        file = tmp_path / name / "open_clip_config.json"
        config = json.loads(file.read_text())
        config["model_cfg"]["vision_cfg"][key] = value
        file.write_text(json.dumps(config))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    shutil.copy(tmp_path / "in" / "open_clip_model.safetensors", tmp_path / "alone.safetensors")
    (tmp_path / "evil.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    for source, words in (
        (tmp_path / "missing", "no folder"),
        (tmp_path / "empty", "no model folder"),
        (tmp_path / "broken", "not a whole safetensors file"),
        (tmp_path / "other", 'Missing key(s) in state_dict: "visual.transformer.resblocks.2'),
        (tmp_path / "strange", "open_clip cannot build it"),
        (tmp_path / "bert", "no vision_config"),
        (tmp_path / "alone.safetensors", "alone.json is missing"),
        ("ViT-L-99:openai", ".safetensors or NAME:TAG"),
        ("ViT-B-32", "open_clip has no weights ''"),
        ("ViT-B-32:nothing", "only openai"),
        ("ViT-B-32:nowhere.pt", "nowhere.pt is missing"),
        (f"ViT-B-32:{tmp_path / 'evil.pt'}", "tensors alone"),
        ("RN50-quickgelu:openai", "neither a CLIP with a ViT nor a SigLIP"),
        ("coca_ViT-B-32:laion2b_s13b_b90k", "open_clip cannot build it"),
    ):
        code, said = run(monkeypatch, capsys, "--model", source, "--out", tmp_path / "x")
        assert code == 2 and words in said.err, (source, said.err)
        assert len(said.err.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists(), "nothing is left of what failed"
    code, said = run(monkeypatch, capsys, "--model", tmp_path / "in")
    assert code == 2 and said.err.count("\n") == 1 and "--out" in said.err


def test_nothing_is_written_over_the_model(tmp_path, monkeypatch, capsys):
    """--out may not be what is read, nor a folder around it: a run has a config.json of its own."""
    run_folder = tmp_path / "runs" / "a"
    write_folder(run_folder / "enhanced", TINY_CLIP, PREPROCESS)
    (run_folder / "config.json").write_text('{"settings": {}}')
    shutil.copy(run_folder / "enhanced" / "open_clip_model.safetensors", tmp_path / "b.safetensors")
    shutil.copy(run_folder / "enhanced" / "open_clip_config.json", tmp_path / "b.json")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for source, target in (
        (run_folder, run_folder),
        (run_folder / "enhanced", run_folder / "enhanced"),
        (run_folder / "enhanced", run_folder),
        (tmp_path / "b.safetensors", tmp_path),
        (f"ViT-B-32:{tmp_path / 'b.safetensors'}", tmp_path),
    ):
        code, said = run(monkeypatch, capsys, "--model", source, "--out", target)
        assert code == 2 and "give another folder" in said.err, (source, target)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    code, said = run(monkeypatch, capsys, "--model", run_folder, "--out", run_folder / "hf")
    assert code == 0, "beside it is fine"
