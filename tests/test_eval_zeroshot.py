"""eval_zeroshot.py: classification, retrieval, drift and probe, against loops written out."""

import json
import shlex
import shutil

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file
from test_wrong_input import command

import eval_zeroshot as ez
from evaluation.encoder import Encoder
from evaluation.scoring import mcnemar, ridge_probe
from pretrained.backbones import ClipInfo, build_clip, load_clip
from toy import benchmark
from toy.world import TOY_DIR

TOY = TOY_DIR / "clip.safetensors"
CPU = torch.device("cpu")
SHARED = ROOT.parent / "shared" / "data"


def run(*arguments):
    words = [str(a).replace("{", "{{").replace("}", "}}") for a in arguments]
    return command(shlex.join(["eval_zeroshot.py", *words]), {})


def result_in(out):
    """The figures of the only report in a folder."""
    [file] = out.rglob("zeroshot*.json")
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Toy scenes in one folder per subject, with captions.json."""
    folder = tmp_path_factory.mktemp("classes")
    benchmark.write_classes(folder, count=160)
    return folder


@pytest.fixture(scope="module")
def captions(classes):
    """Sixty of them, with a second caption each."""
    entries = json.loads((classes / "captions.json").read_text())[:60]
    for entry in entries:
        entry["captions"].append(f"a photo of {entry['file'].split('/')[0]}")
    (classes / "sixty.json").write_text(json.dumps(entries))
    return classes / "sixty.json"


@pytest.fixture(scope="module")
def enhanced(tmp_path_factory):
    """The toy CLIP, its image tower shaken: something to compare with."""
    folder = tmp_path_factory.mktemp("run") / "enhanced"
    folder.mkdir()
    clip, info = load_clip(str(TOY))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in clip.visual.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(info.open_clip_config()))
    return folder


# -- arithmetic ----------------------------------------------------------------------------------
def by_hand(images, texts, owner, k):
    """Recall written out, ties counting against."""
    image, text = [], []
    for t in range(len(texts)):
        own = float(texts[t] @ images[owner[t]])
        rivals = sum(
            float(texts[t] @ images[i]) >= own for i in range(len(images)) if i != owner[t]
        )
        image.append(rivals < k)
    for i in range(len(images)):
        own = max(float(texts[t] @ images[i]) for t in range(len(texts)) if owner[t] == i)
        rivals = sum(float(texts[t] @ images[i]) >= own for t in range(len(texts)) if owner[t] != i)
        text.append(rivals < k)
    return image, text


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block", [7, 1024])
def test_recall_against_a_loop(seed, block, monkeypatch):
    monkeypatch.setattr(ez, "BLOCK", block)
    torch.manual_seed(seed)
    images = F.normalize(torch.randn(20, 6), dim=-1).double()
    owner = np.repeat(np.arange(20), np.random.default_rng(seed).integers(1, 6, 20))
    texts = F.normalize(images[owner] + 0.8 * torch.randn(len(owner), 6), dim=-1).double()
    texts[3] = texts[0]  # a tie between two captions
    hits = ez.retrieval_hits(images, texts, owner)
    for k in (1, 5, 10):
        image, text = by_hand(images, texts, owner, k)
        assert hits[f"image@{k}"].tolist() == image and hits[f"text@{k}"].tolist() == text
    assert 0 < hits["image@1"].mean() < 1


class Perfect:
    """An encoder that knows each class by its name: pictures are names here."""

    name = "perfect"

    def texts(self, texts):
        return torch.eye(26)[[ord(text[0]) - 97 for text in texts]]

    images = texts


def test_classes_of_one_name_are_told_as_an_argmax_would(monkeypatch):
    """ImageNet has two missiles. One text cannot tell them apart: it means the first of them; a tie
    of other names counts against."""
    monkeypatch.setattr(ez, "in_turn", lambda encoders, title: encoders)
    names = ["cat", "missile", "dog", "missile", "sunglasses", "sunglasses", "bus"]
    shown = ez.Classes("Seven", names, np.arange(7), names)
    hits = ez.classify([Perfect()], shown, ["{}"])["perfect"]
    assert hits["Seven top-1"].tolist() == [True, True, True, False, True, False, True]
    assert hits["Seven top-5"].all()
    alike = ez.Classes("Two", ["cat", "car"], np.arange(2), ["cat", "car"])
    assert not ez.classify([Perfect()], alike, ["{}"])["perfect"]["Two top-1"].any()


def test_a_folder_of_classes_has_a_name_wherever_one_stands(classes, monkeypatch):
    monkeypatch.chdir(classes)
    assert ez.read_classes(".", "data").title == classes.name


def test_a_constant_encoder_retrieves_nothing():
    hits = ez.retrieval_hits(torch.ones(30, 4), torch.ones(60, 4), np.repeat(np.arange(30), 2))
    assert all(not verdict.any() for verdict in hits.values())


def test_rows_are_a_paired_comparison():
    rng = np.random.default_rng(0)
    a, b = rng.random(500) < 0.7, rng.random(500) < 0.6
    row = ez.compare({"a": {"t": a}, "b": {"t": b}})[0]
    won, lost, p = mcnemar(a, b)
    m = row["models"]["b"]
    assert (m["won"], m["lost"], m["p"]) == (won, lost, p)
    low, high = m["change_interval"]
    assert low < m["change"] < high and m["change"] == pytest.approx(100 * (b.mean() - a.mean()))
    text = ez.table3([row])
    assert "Tab. 3" in text and f"{won}/{lost}" in text


def test_the_probe_is_ridge_regression():
    torch.manual_seed(0)
    x, labels = torch.randn(60, 5).double(), torch.randint(0, 3, (60,))
    x[:, 0] += labels
    test = torch.randn(9, 5).double()
    centered = x - x.mean(0)
    y = F.one_hot(labels, 3).double()
    stacked = torch.cat([centered, 0.1 * torch.eye(5).double()])  # √0.01: ridge as augmented rows
    target = torch.cat([y - y.mean(0), torch.zeros(5, 3).double()])
    weights = torch.linalg.lstsq(stacked, target).solution
    expected = ((test - x.mean(0)) @ weights + y.mean(0)).argmax(1)
    assert torch.equal(ridge_probe(x, labels, test), expected)


# -- the command ---------------------------------------------------------------------------------
def test_both_sides_in_one_call(classes, captions, enhanced, tmp_path):
    flags = ["--classify", classes, "--captions", captions, "--probe", "--layers"]
    code, out = run("--model", TOY, "--model", enhanced, *flags, "--out", tmp_path)
    assert code == 0, out
    found = result_in(tmp_path)
    tasks = [row["task"] for row in found["rows"]]
    assert tasks[:3] == [f"{classes.name} {t}" for t in ("top-1", "top-5", "linear probe")]
    assert tasks[3:] == [f"sixty {way}@{k}" for way in ("image", "text") for k in (1, 5, 10)]
    top1 = found["rows"][0]["models"]
    assert top1["toy/clip"]["percent"] > 90, "the toy CLIP knows its subjects"
    changed = next(m for name, m in top1.items() if name != "toy/clip")
    assert changed["lost"] > 0 and changed["change_interval"][0] < changed["change"]
    moved = next(iter(found["drift"].values()))
    assert 0 < moved["features"] < 1 and len(moved["layers"]) == 4
    assert moved["layers"][0] > moved["layers"][-1], "the shaking adds up over layers"

    encoder = Encoder("x", *load_clip(str(TOY)), CPU)
    read = ez.read_captions(str(captions), "")
    assert len(read.texts) == 2 * len(read.pictures) > 80
    images, texts = encoder.images(read.pictures[:20]), encoder.texts(read.texts[:40])
    image, text = by_hand(images.double(), texts.double(), read.owner[:40], 1)
    hits = ez.retrieval_hits(images, texts, read.owner[:40])
    assert hits["image@1"].tolist() == image and hits["text@1"].tolist() == text


def other_model(folder, embed_dim=None, **vision):
    """The toy CLIP's kin with random weights; a key of `vision` that is None is left out."""
    about = load_clip(str(TOY))[1].open_clip_config()
    tower = {**about["model_cfg"]["vision_cfg"], **vision}
    about["model_cfg"]["vision_cfg"] = {k: v for k, v in tower.items() if v is not None}
    about["model_cfg"]["embed_dim"] = embed_dim or about["model_cfg"]["embed_dim"]
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    clip = build_clip(ClipInfo.from_config("x", about))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_models_of_other_widths_have_no_cosine(classes, tmp_path):
    narrow = other_model(tmp_path / "narrow", embed_dim=24)
    flags = ["--model", TOY, "--model", narrow, "--classify", classes, "--cache", "none"]
    code, out = run(*flags, "--out", tmp_path / "out")
    assert code == 0 and "mean cosine" not in out, out
    assert next(iter(result_in(tmp_path / "out")["drift"].values())) == {"features": None}
    code, out = run(*flags, "--model", tmp_path / "narrow2", "--out", tmp_path / "x")
    assert code == 2  # no such model
    shutil.copytree(narrow, tmp_path / "again")
    code, out = run(*flags, "--model", tmp_path / "again", "--out", tmp_path / "three")
    assert code == 0 and "–" in next(line for line in out.splitlines() if "cosine" in line), out


def test_towers_with_other_layers_are_refused_before_the_work(classes, tmp_path):
    flags = ["--model", TOY, "--classify", classes, "--cache", "none", "--layers"]
    short = other_model(tmp_path / "short", layers=2)
    code, out = run(*flags, "--model", short, "--out", tmp_path / "out")
    assert code == 2 and "short has 2 layers of width" in out, out
    sizes = {"layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "head_width": 8}
    code, out = run(*flags, "--out", tmp_path / "out")
    assert code == 2 and "--layers compares models" in out, out
    convolutional = other_model(tmp_path / "resnet", **sizes)
    code, out = run(*flags, "--model", convolutional, "--out", tmp_path / "out")
    assert code == 2 and "resnet's image tower is no ViT: leave --layers out" in out, out
    assert not (tmp_path / "out").exists()


def test_layers_are_means_over_tokens():
    encoder = Encoder("x", *load_clip(str(TOY)), CPU)
    pictures = [pixels for _, pixels in benchmark.held_out_scenes()[:5]]
    found = encoder.layers(pictures, batch=2)
    seen, last = [], encoder.clip.visual.transformer.resblocks[-1]
    hook = last.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for picture in pictures:  # one at a time: the axis of length 1 is the picture's
        encoder.images([picture])
    hook.remove()
    alone = torch.stack([tokens.squeeze().mean(0) for tokens in seen])
    assert {layer.shape for layer in found} == {alone.shape}
    assert torch.allclose(found[-1], alone, atol=1e-5)


def test_a_second_call_is_answered_from_the_cache(classes, tmp_path):
    flags = ["--model", TOY, "--classify", classes, "--cache", tmp_path / "f", "--out", tmp_path]
    assert run(*flags)[0] == 0
    first = result_in(tmp_path)["rows"]
    files = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "f").iterdir()}
    assert len(files) == 2 and run(*flags)[0] == 0
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "f").iterdir()} == files
    assert result_in(tmp_path)["rows"] == first


def test_changed_weights_are_encoded_anew(tmp_path):
    """An encoder that is kept while its model trains on."""
    encoder = Encoder("x", *load_clip(str(TOY)), CPU, tmp_path)
    pictures = [pixels for _, pixels in benchmark.held_out_scenes()[:3]]
    before = encoder.images(pictures)
    assert torch.equal(encoder.images(pictures), before) and len(list(tmp_path.iterdir())) == 1
    encoder.clip.visual.proj.grad = torch.randn_like(encoder.clip.visual.proj)
    torch.optim.AdamW([encoder.clip.visual.proj], lr=0.5, fused=True).step()
    assert not torch.allclose(encoder.images(pictures), before, atol=1e-2)


def test_class_directions_are_means_over_prompts():
    encoder = Encoder("x", *load_clip(str(TOY)), CPU)
    templates = ["a photo of {}", "{}"]
    found = ez.class_texts(encoder, ["bird", "key"], templates)
    for i, name in enumerate(("bird", "key")):
        each = encoder.texts([t.format(name) for t in templates])
        assert torch.allclose(found[i], F.normalize(each.mean(0), dim=0), atol=1e-6)
    assert len(ez.prompts("imagenet80")) == 80 and len(ez.prompts("imagenet7")) == 7
    assert callable(ez.prompts("imagenet80")[0])


# -- formats -------------------------------------------------------------------------------------
def test_four_formats_of_captions_are_one(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    texts = {"a.jpg": ["one, two", "three"], "b.jpg": ["four | five"]}
    (tmp_path / "own.json").write_text(
        json.dumps([{"file": k, "captions": v} for k, v in texts.items()])
    )
    coco = {
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 9, "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": i, "caption": c} for i, k in ((9, "b.jpg"), (7, "a.jpg")) for c in texts[k]
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    karpathy = [
        {"filename": k, "split": "test", "sentences": [{"raw": c} for c in v]}
        for k, v in texts.items()
    ]
    karpathy.append({"filename": "c.jpg", "split": "train", "sentences": [{"raw": "x"}]})
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": karpathy}))
    lines = ["image_name| comment_number| comment"]
    lines += [f"{k}| {n}| {c}" for k, v in texts.items() for n, c in enumerate(v)]
    (tmp_path / "results.csv").write_text("\n".join(lines))
    for name in ("own.json", "coco.json", "karpathy.json", "results.csv"):
        found = ez.read_captions(str(tmp_path / name), "")
        assert [p.name for p in found.pictures] == ["a.jpg", "b.jpg"], name
        assert found.texts == ["one, two", "three", "four | five"]
        assert found.owner.tolist() == [0, 0, 1]


def test_a_csv_that_lacks_a_bar(tmp_path):
    """As one line of the published results.csv does; a line without number and comment is named."""
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    table = tmp_path / "results.csv"
    lines = "image_name| comment_number| comment\na.jpg| 0| a dog\n"
    table.write_text(lines + "b.jpg| 4   A dog runs across the grass .\n")
    assert ez.read_captions(str(table), "").texts == ["a dog", "A dog runs across the grass ."]
    for wrong in ("b.jpg| a dog runs", "b.jpg| 4", "b.jpg", "b.jpg| four| a dog"):
        table.write_text(f"{lines}{wrong}\n")
        with pytest.raises(ValueError, match=r"image\|number\|comment; line 3 is none of it"):
            ez.read_captions(str(table), "")


def test_captions_without_a_head_with_empty_lines_and_of_one_file_twice(tmp_path):
    for name in ("image_1.jpg", "b.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    table = tmp_path / "no_head.csv"
    table.write_text("\nimage_1.jpg| 0| a dog\nb.jpg| 0| a cat\n\n")
    assert ez.read_captions(str(table), "").texts == ["a dog", "a cat"]
    twice = tmp_path / "twice.json"
    entries = [{"file": "b.jpg", "captions": ["a cat"]}, {"file": "b.jpg", "captions": ["a dog"]}]
    twice.write_text(json.dumps(entries))
    assert ez.read_captions(str(twice), "").texts == ["a cat", "a dog"]


# -- real photographs ----------------------------------------------------------------------------
@pytest.mark.skipif(not SHARED.is_dir(), reason="the photographs in ../shared/data are not here")
def test_real_photographs_end_to_end(tmp_path):
    """A CLIP with the real vocabulary and random weights: figures mean nothing, the path is whole.
    Recall by hand on 20 images equals the command's."""
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2,
                       "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2,
                     "layers": 1},
    }  # fmt: skip
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        torch.manual_seed(ord(name))
        clip = open_clip.CLIP(**config)
        save_file(clip.state_dict(), tmp_path / name / "open_clip_model.safetensors")
        about = {"mean": [0.5] * 3, "std": [0.5] * 3}
        text = json.dumps({"model_cfg": config, "preprocess_cfg": about})
        (tmp_path / name / "open_clip_config.json").write_text(text)
    entries = json.loads((SHARED / "captions.json").read_text())[:20]
    (tmp_path / "twenty.json").write_text(json.dumps(entries))
    for i, entry in enumerate(entries):
        (tmp_path / "classes" / f"kind_{i % 3}").mkdir(parents=True, exist_ok=True)
        shutil.copy(SHARED / entry["file"], tmp_path / "classes" / f"kind_{i % 3}")
    models = ["--model", tmp_path / "a", "--model", tmp_path / "b"]
    sets = ["--classify", tmp_path / "classes", "--captions", tmp_path / "twenty.json"]
    more = ["--captions", SHARED / "captions.json", "--images", SHARED]
    code, out = run(*models, *sets, *more, "--out", tmp_path / "out", "--cache", tmp_path / "f")
    assert code == 0, out
    rows = result_in(tmp_path / "out")["rows"]
    found = {row["task"]: row["models"] for row in rows}
    assert next(r["n"] for r in rows if r["task"] == "captions text@1") == 83
    encoder = Encoder("a", *load_clip(str(tmp_path / "a")), CPU)
    read = ez.read_captions(str(tmp_path / "twenty.json"), str(SHARED))
    images, texts = encoder.images(read.pictures).double(), encoder.texts(read.texts).double()
    for k in (1, 5, 10):
        image, text = by_hand(images, texts, read.owner, k)
        name = next(iter(found["twenty image@1"]))
        assert found[f"twenty image@{k}"][name]["percent"] == pytest.approx(100 * np.mean(image))
        assert found[f"twenty text@{k}"][name]["percent"] == pytest.approx(100 * np.mean(text))


# -- mistakes ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    here = tmp_path_factory.mktemp("spoilt")
    for folder in ("empty", "one/a", "hollow/a", "hollow/b", "broken/a", "broken/b"):
        (here / folder).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(here / "one" / "a" / "x.png")
    Image.new("RGB", (8, 8)).save(here / "hollow" / "a" / "x.png")
    Image.new("RGB", (8, 8)).save(here / "broken" / "a" / "x.png")
    (here / "broken" / "b" / "y.png").write_bytes(b"no picture")
    shutil.copytree(here / "broken", here / "again" / "broken")
    for name, content in {
        "no.json": "nothing",
        "list.json": '[{"picture": "x.png"}]',
        "empty.json": "[]",
        "number.json": "7",
        "words.json": '[{"file": "x.png", "captions": [5]}]',
        "missing.json": '[{"file": "x.png", "captions": ["a"]}]',
        "coco.json": '{"images": [], "annotations": [{"image_id": 1, "caption": "a"}]}',
        "short.csv": "image|caption\nx.png|a\n",
    }.items():
        (here / name).write_text(content)
    return here


@pytest.mark.parametrize(
    "line, words",
    [
        ("", "nothing to do: give --classify"),
        ("--captions x --probe", "--probe needs --classify"),
        ("--classify {s}/nowhere", "no folder, and none of"),
        ("--classify {s}/empty", "needs a directory per class"),
        ("--classify {s}/one", "at least two; found 1"),
        ("--classify {s}/hollow", "class folder b has no pictures"),
        ("--classify {s}/broken", "y.png cannot be read"),
        ("--classify cifar100 --root {s}", "torchvision does not find it"),
        ("--classify imagenet --root {s}", "torchvision does not find it"),
        ("--classify {s}/broken --template bird", "with {} for the class"),
        ("--captions {s}/nowhere.json", "no such file"),
        ("--captions {s}/no.json", "is not JSON"),
        ("--captions {s}/list.json", "[0]: file is missing"),
        ("--captions {s}/empty.json", "none of the known formats"),
        ("--captions {s}/number.json", "none of the known formats"),
        ("--captions {s}/words.json", "[0].captions[0]: expected text, found number"),
        ("--captions {s}/coco.json", "annotations[0].image_id: no image has that id"),
        ("--captions {s}/short.csv", "none of the known formats"),
        ("--captions {s}/missing.json", "say where they are with --images"),
        ("--classify {s}/again/broken --classify {s}/broken", "have the same name"),
        ("--clasify x", "did you mean --classify?"),
        ("--classify {s}/broken --model ViT-X:openai", "not an open_clip model name"),
        ("--classify {s}/broken --model {s}/empty", "is missing"),
    ],
)
def test_one_line_and_exit_2(spoilt, line, words):
    line = line.replace("{s}", str(spoilt))
    model = [] if "--model" in line else ["--model", str(TOY)]
    code, out = run(*shlex.split(line), *model, "--runs", spoilt)
    said = [part for part in out.replace("\r", "\n").splitlines() if words in part]
    assert code == 2 and len(said) == 1 and "Traceback" not in out, out
    assert said[0].startswith("eval_zeroshot.py: ")
