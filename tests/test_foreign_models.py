"""What strangers' model files may do here: hold numbers and sizes. They run no program, open no
other file, and a false size or number is a line."""

import json
import os
import shutil
import subprocess
import sys

import open_clip
import pytest
import torch
from conftest import ROOT, TINY_CLIP
from safetensors.torch import load_file, save_file

import export_hf
from evaluation.encoder import Encoder, find_tokenizer, load_encoders
from pretrained import backbones
from pretrained.backbones import ClipInfo, check_model_cfg, load_clip

CANARY = "import os; open(os.environ['CANARY'], 'w').close()\n"
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that is there if any of the code below was run."""
    monkeypatch.setenv("CANARY", str(tmp_path / "it-ran"))
    yield
    assert not (tmp_path / "it-ran").exists()


def model_folder(folder, about=None, **text):
    """An open_clip folder; `text`: what else its text_cfg says."""
    folder.mkdir(exist_ok=True)
    cfg = about or {**TINY_CLIP, "text_cfg": {**TINY_CLIP["text_cfg"], **text}}
    config = {"model_cfg": cfg, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**TINY_CLIP).state_dict(), folder / "open_clip_model.safetensors")
    return folder


def tokenizer_with_code(folder):
    """A tokenizer that is a Python file beside its configuration."""
    folder.mkdir()
    classes = {"AutoTokenizer": ["evil.Evil", None]}
    config = {"auto_map": classes, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": classes}))
    (folder / "evil.py").write_text(CANARY + "class Evil:\n    pass\n")
    return folder


# -- tokenizers ----------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
def test_a_tokenizers_own_python_is_refused_by_name(tmp_path, monkeypatch, canary, layout):
    """As an evaluation loads it, in both layouts, and as the converter does in both directions."""
    monkeypatch.chdir(tmp_path)
    tokenizer_with_code(tmp_path / "evil")
    text = {"hf_tokenizer_name": "evil", "tokenizer_kwargs": {"trust_remote_code": True}}
    folder = model_folder(tmp_path / "model", **text)
    if layout == "transformers":
        clean = model_folder(tmp_path / "clean")
        export_hf.export(clean, tmp_path / "hf")
        config = json.loads((tmp_path / "hf" / "config.json").read_text())
        config["open_clip_config"] = json.loads((folder / "open_clip_config.json").read_text())
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
        folder = tmp_path / "hf"
    with pytest.raises(ValueError, match="tokenizer_kwargs.trust_remote_code"):
        load_encoders([str(folder)])
    convert = export_hf.export if layout == "open_clip" else export_hf.restore
    with pytest.raises(ValueError, match="tokenizer_kwargs.trust_remote_code"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_transformers_is_told_not_to_ask_whether_code_may_run(tmp_path, monkeypatch, canary):
    """Without the setting it would ask on the terminal, and somebody would say yes."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    tokenizer_with_code(tmp_path / "evil")
    folder = model_folder(tmp_path / "model", hf_tokenizer_name="evil")
    with pytest.raises(ValueError, match="tokenizer evil could not be loaded"):
        load_encoders([str(folder)])


def test_a_description_made_by_hand_is_held_to_the_same(canary):
    text = {"hf_tokenizer_name": "evil", "tokenizer_kwargs": {"use_fast": False}}
    info = ClipInfo("x", {"text_cfg": text}, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match="tokenizer_kwargs.use_fast is not allowed"):
        find_tokenizer(info)


def test_a_text_towers_own_python_stays_unread(tmp_path, monkeypatch, canary):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    tokenizer_with_code(tmp_path / "evil")
    clip = backbones.build_clip(
        ClipInfo("x", {**TINY_CLIP, "text_cfg": {"hf_model_name": "evil"}}, (0.5,) * 3, (0.5,) * 3)
    )
    assert isinstance(clip.text, backbones.CarriedText)


# -- what a description may say ------------------------------------------------------------------
WRONG = [
    ({"text_cfg": {"tokenizer_kwargs": {"cache_dir": "x"}}}, "tokenizer_kwargs.cache_dir"),
    ({"text_cfg": {"tokenizer_kwargs": ["clean"]}}, "tokenizer_kwargs"),
    ({"text_cfg": {"hf_tokenizer_name": "/home/me/tokenizer"}}, "hf_tokenizer_name"),
    ({"text_cfg": {"hf_tokenizer_name": "x'); evil('"}}, "hf_tokenizer_name"),
    ({"text_cfg": {"hf_model_name": "../up"}}, "hf_model_name"),
    ({"text_cfg": {"norm_kwargs": {"device": "cuda"}}}, "norm_kwargs.device"),
    ({"text_cfg": {"layers": 10**12}}, "text_cfg.layers"),
    ({"text_cfg": 5}, "text_cfg"),
    ({"vision_cfg": {"timm_model_name": "local-dir:/home"}}, "vision_cfg.timm_model_name"),
    ({"vision_cfg": {"timm_model_name": "hf-hub:a/b"}}, "vision_cfg.timm_model_name"),
    ({"vision_cfg": {"timm_model_pretrained": True}}, "timm_model_pretrained"),
    ({"vision_cfg": {"act_kwargs": {"inplace": True}}}, "act_kwargs.inplace"),
    ({"vision_cfg": {"layers": [3, 4, 10**9, 3]}}, "vision_cfg.layers"),
    ({"vision_cfg": {"width": float("nan")}}, "vision_cfg.width"),
    ({"embed_dim": 10**15}, "embed_dim"),
    ({"text_cfg": {"heads": True}}, "text_cfg.heads: expected a number"),
]  # fmt: skip


@pytest.mark.parametrize("part, name", WRONG, ids=range(len(WRONG)))
def test_what_may_not_be_said_is_named(tmp_path, part, name):
    about = {**TINY_CLIP, **{k: {**TINY_CLIP[k], **v} if isinstance(v, dict) else v
                             for k, v in part.items()}}  # fmt: skip
    with pytest.raises(ValueError, match=name):
        load_clip(str(model_folder(tmp_path / "model", about)))
    # The converter is told sizes by the weights; what runs or fetches it refuses as well.
    if any(word in name for word in ("kwargs.", "_name", "layers", "pretrained")):
        with pytest.raises(ValueError, match=name):
            export_hf.export(tmp_path / "model", tmp_path / "out")


@pytest.mark.parametrize(
    "key, value",
    [("mean", [0.5, 0.5]), ("std", [0, 1, 1]), ("mean", [float("nan")] * 3), ("mean", "abc"),
     ("resize_mode", "x"), ("interpolation", 3)],
)  # fmt: skip
def test_preprocessing_is_checked_too(key, value):
    with pytest.raises(ValueError, match=f"preprocess_cfg.{key}"):
        ClipInfo.from_config("x", {"model_cfg": {}, "preprocess_cfg": {**PREPROCESS, key: value}})


def test_every_model_of_open_clip_may_be_described():
    for name in open_clip.list_models():
        check_model_cfg(open_clip.get_model_config(name))


def test_a_false_size_is_told_before_memory_is_asked_for(tmp_path, monkeypatch):
    """A width of 100 000 would take 480 GB a layer; the file's own tensors say 32."""
    vision = {**TINY_CLIP["vision_cfg"], "width": 96_000, "head_width": 1000}
    folder = model_folder(tmp_path / "model", {**TINY_CLIP, "vision_cfg": vision})
    with pytest.raises(ValueError, match="does not fit this architecture"):
        load_clip(str(folder))


@pytest.mark.parametrize(
    "config",
    ["[]", "[" * 100_000, '{"vision_config": 5}', '{"vision_config": {}}',
     '{"model_type": "clip", "vision_config": {"hidden_size": 0}, "text_config": {}}',
     '{"open_clip_config": 7, "vision_config": {}}',
     '{"model_type": "clip", "vision_config": {"num_hidden_layers": 1e12}, "text_config": {}}'],
    ids=range(7),
)  # fmt: skip
def test_a_transformers_config_of_another_shape_is_a_line(tmp_path, monkeypatch, capsys, config):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(config)
    with pytest.raises(ValueError):
        load_encoders([str(tmp_path / "hf")])
    monkeypatch.setattr("sys.argv", ["export_hf.py", "--model", str(tmp_path / "hf"), "--out", "x"])
    with pytest.raises(SystemExit) as stop:
        export_hf.main()
    assert stop.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


FITTED = [
    ("clip", {}, {"resize_mode": "shortest"}),
    ("clip", {"size": 32, "crop_size": 32, "do_center_crop": True}, {"resize_mode": "shortest"}),
    ("clip", {"size": {"shortest_edge": 32}, "resample": 2, "image_mean": [0.1, 0.2, 0.3]},
     {"resize_mode": "shortest", "interpolation": "bilinear", "mean": [0.1, 0.2, 0.3]}),
    ("clip", {"size": {"height": 32, "width": 32}, "do_center_crop": False},
     {"resize_mode": "squash"}),
    ("siglip", {"size": {"height": 32, "width": 32}}, {"resize_mode": "squash"}),
    ("clip", {"size": {"height": 32, "width": 32}, "crop_size": 32}, {"resize_mode": "squash"}),
    ("clip", {"size": None, "resample": None, "image_std": None}, {"resize_mode": "shortest"}),
    ("clip", {"do_normalize": False}, None),
    ("siglip", {"size": {"shortest_edge": 32}, "do_center_crop": True},
     {"resize_mode": "shortest"}),
    ("clip", {"size": {"shortest_edge": 40}}, None),  # and then 32 from its middle
    ("clip", {"crop_size": {"height": 32, "width": 24}}, None),
    ("clip", {"do_center_crop": False, "size": {"shortest_edge": 32}}, None),
    ("siglip", {"size": {"longest_edge": 32}}, None),
    ("clip", {"resample": 1}, None),
]  # fmt: skip


@pytest.mark.parametrize("kind, own, expected", FITTED)
def test_how_a_picture_is_made_to_fit_comes_along_or_is_refused(tmp_path, kind, own, expected):
    """No error would tell, features would only be worse."""
    if expected is None:
        with pytest.raises(ValueError, match="open_clip cannot make pictures of 32 px fit"):
            export_hf._preprocess(own, kind, 32, tmp_path)
        return
    found = export_hf._preprocess(own, kind, 32, tmp_path)
    assert found == {**export_hf.PREPROCESS[kind], **expected}
    about = {"model_cfg": {"vision_cfg": {"image_size": 32}}, "preprocess_cfg": found}
    assert export_hf._preprocess(export_hf.preprocessor_config(about), kind, 32, tmp_path) == found


def test_ways_that_transformers_has_not_are_refused_on_the_way_out():
    about = {"model_cfg": {"vision_cfg": {"image_size": 32}}}
    with pytest.raises(ValueError, match="as open_clip's 'longest' does"):
        export_hf.preprocessor_config(about | {"preprocess_cfg": {"resize_mode": "longest"}})


def test_a_full_disk_is_one_line_and_leaves_nothing_half(tmp_path):
    model = model_folder(tmp_path / "model")
    command = f"ulimit -f 64; exec {sys.executable} export_hf.py --model {model} --out {tmp_path}/x"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "model.safetensors could not be written" in done.stderr
    assert not list((tmp_path / "x").iterdir())


# -- weights -------------------------------------------------------------------------------------
def spoil(file, name, value):
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    tensors[name].view(-1)[0] = value
    save_file(tensors, file)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_that_are_not_finite_are_refused_by_file_and_tensor(tmp_path, value, dtype):
    file = model_folder(tmp_path / "model") / "open_clip_model.safetensors"
    save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file)
    load_clip(str(tmp_path / "model"))
    spoil(file, "visual.proj", value)
    with pytest.raises(ValueError, match="open_clip_model.safetensors: tensor visual.proj holds"):
        load_clip(str(tmp_path / "model"))


def test_so_are_those_of_a_transformers_folder(tmp_path):
    export_hf.export(model_folder(tmp_path / "model"), tmp_path / "hf")
    spoil(tmp_path / "hf" / "model.safetensors", "logit_scale", float("nan"))
    with pytest.raises(ValueError, match="tensor logit_scale holds"):
        load_encoders([str(tmp_path / "hf")])


@pytest.mark.parametrize(
    "content", [{1: torch.zeros(2)}, {"state_dict": [1, 2]}, [torch.zeros(1)], torch.zeros(1)]
)
def test_a_torch_file_of_another_shape_is_a_line(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="does not fit this architecture"):
        load_clip(f"ViT-B-32:{tmp_path / 'w.pt'}")


# -- features that were kept ---------------------------------------------------------------------
def test_one_changed_bit_of_kept_features_is_noticed(tmp_path, capsys):
    """Anywhere in the file: the features are those that were kept, or they are made again."""
    shutil.copy(ROOT / "toy" / "clip.safetensors", tmp_path / "clip.safetensors")
    shutil.copy(ROOT / "toy" / "clip.json", tmp_path / "clip.json")
    clip, info = load_clip(str(tmp_path / "clip.safetensors"))
    encoder = Encoder("a", clip, info, cache=tmp_path / "features")
    first = encoder.texts(["a photo of fish"])
    [file] = (tmp_path / "features").iterdir()
    content, said = file.read_bytes(), 0
    for bit in range(0, 8 * len(content), 8 * len(content) // 60):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        assert torch.equal(encoder.texts(["a photo of fish"]), first)
        said += capsys.readouterr().err.count(f"{file} is damaged: these features are made again")
        assert file.read_bytes() == content or said < 60
    assert said > 50


def test_a_cache_that_cannot_be_written_costs_a_line_and_no_result(tmp_path, capsys):
    clip, info = load_clip(str(ROOT / "toy" / "clip.safetensors"))
    (tmp_path / "features").write_text("a file where a folder should be")
    encoder = Encoder("a", clip, info, cache=tmp_path / "features" / "deeper")
    assert encoder.texts(["a photo of fish"]).shape == (1, 64)
    assert "could not be kept" in capsys.readouterr().err
    assert os.path.isfile(tmp_path / "features")
