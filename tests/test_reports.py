"""What a person sees of an evaluation: widths, where results lie, pictures, similarities."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_wrong_input import command

import eval_mmvp
import eval_zeroshot
from evaluation import encoder as encoders
from evaluation import report, results, scoring
from evaluation.changed import changed_picture, cosine_lines, moved_most
from evaluation.encoder import load_encoders, name_models
from evaluation.pairsets import Item
from pretrained.backbones import load_clip
from toy import benchmark
from toy.world import TOY_DIR

TOY = TOY_DIR / "clip.safetensors"
LONG = "ViT-L-14-336-quickgelu-openai-and-what-else-a-run-may-be-called"


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    """Retention on a tenth of its scenes."""
    monkeypatch.setattr(benchmark, "PROBE_TRAIN", 300)
    monkeypatch.setattr(benchmark, "PROBE_TEST", 150)


@pytest.fixture
def runs(tmp_path):
    """Two runs, whose enhanced models are the toy CLIP shaken; one without; a set of pairs; classes
    with captions."""
    for number, name in enumerate(("one", LONG)):
        folder = tmp_path / "runs" / name / "enhanced"
        folder.mkdir(parents=True)
        clip, info = load_clip(str(TOY))
        torch.manual_seed(number)
        with torch.no_grad():
            clip.visual.proj.add_(0.1 * torch.randn_like(clip.visual.proj))
        save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
        (folder / "open_clip_config.json").write_text(json.dumps(info.open_clip_config()))
        settings = {"clip": "ViT-L-14-336-quickgelu:openai"}
        about = {"stages": {"2": {"settings": settings}}}
        (folder.parent / "config.json").write_text(json.dumps(about))
    (tmp_path / "runs" / "begun").mkdir()
    shutil.copy(tmp_path / "runs" / "one" / "config.json", tmp_path / "runs" / "begun")
    benchmark.write_pairs(benchmark.pairs(False, 3, seed=5), tmp_path / "pairs")
    benchmark.write_classes(tmp_path / "classes", count=60)
    return tmp_path / "runs"


def run(script, runs, *words):
    """A command on these runs. Returns: what it printed, and the files that it says it wrote."""
    words = [str(word).replace("{", "{{").replace("}", "}}") for word in words]
    line = shlex.join([script, "--runs", str(runs), *words])
    code, out = command(line, {})
    assert code == 0, out
    return out, files_named(out)


def files_named(out):
    """The files in the list at the end of what was printed."""
    found, folder = [], None
    for line in out.splitlines():
        if line.startswith("written to "):
            folder = line.removeprefix("written to ").removesuffix(":")
        elif folder and line.startswith("  "):
            found.append(f"{folder}/{line.strip()}")
    return found


def three(runs):
    models = (TOY, runs / "one", runs / LONG)
    return [word for model in models for word in ("--model", model)]


def everything_under(folder, *but):
    found = {str(p) for p in folder.rglob("*") if p.is_file()}
    return {p for p in found if not any(word in p for word in ("/enhanced/", "/features/", *but))}


COMMANDS = {
    "toy": ("eval_mmvp.py", ["--pairs", 3]),
    "mmvp": ("eval_mmvp.py", ["--benchmark", "{here}/pairs", "--template", "a photo of {}",
                              "--template", "{}"]),
    "zeroshot": ("eval_zeroshot.py", ["--classify", "{here}/classes", "--captions",
                                      "{here}/classes/captions.json", "--probe", "--layers"]),
}  # fmt: skip


def words_of(name, runs):
    script, words = COMMANDS[name]
    return script, [str(word).replace("{here}", str(runs.parent)) for word in words]


# -- what is printed -----------------------------------------------------------------------------
@pytest.mark.parametrize("name", COMMANDS)
def test_three_models_fit_into_a_terminal(runs, name):
    script, words = words_of(name, runs)
    out, files = run(script, runs, *three(runs), *words)
    tables = out.split("written to ")[0].splitlines()  # a path cannot be shortened
    assert max(map(len, tables)) <= 100, max(tables, key=len)
    assert tables[0].startswith("- A: toy/clip") and tables[2].startswith(f"- C: {LONG[:20]}")
    # the summary comes first: all models, every measure
    summary = out.split("against A")[0]
    assert "A before" in summary and "B after" in summary and "C after" in summary
    labels = {
        "toy": ["**unmentioned**", "**mentioned**", "**subject zero-shot**"],
        "mmvp": ["**text-to-image**", "**image-to-text**", "**group**"],
        "zeroshot": ["classes top-1", "captions image@1"],
    }[name]
    for label in [*labels, *(["cosine to the original"] if name != "mmvp" else [])]:
        assert f"| {label} " in summary, label
    assert "**B against A: " in out and "**C against A: " in out and "won/lost" in out
    paper = "ViT-L-14-336-quickgelu:openai (135 pairs)" in out
    assert paper == (name == "mmvp"), "Tab. 1's figures of the backbone that the runs started from"
    # what is written is about one pair of models, and as narrow
    for file in files:
        if file.endswith(".md"):
            text = Path(file).read_text(encoding="utf-8")
            assert max(map(len, text.splitlines())) <= 100
            assert "- B: " in text and "- C: " not in text
    wide, _ = run(script, runs, *three(runs), *words, "--wide")
    assert max(map(len, wide.splitlines())) > 130, "everything side by side"


def test_names_of_any_length_and_figures_of_any_size():
    """Names as open_clip has them, 50000 pictures, everything lost: still 100 columns."""
    names = ["ViT-L-14-336-quickgelu:openai", "x" * 300, "ViT-H-14-quickgelu:metaclip_fullcc"]
    n = 50_000
    hits = {name: np.full(n, i != 1) for i, name in enumerate(names)}
    for count in (1, 2, 3):
        some = {name: hits[name] for name in names[:count]}
        rows = eval_zeroshot.compare(
            {m: {"a long name of a set top-1": h} for m, h in some.items()}
        )
        moved = {name: {"features": 0.5, "layers": [0.5] * 40} for name in names[1:count]}
        text = eval_zeroshot.text_of(rows, moved, names[:count], n)
        tables = [line for line in text.splitlines() if "xxx" not in line or line[0] in "|-"]
        assert max(map(len, tables)) <= 100, max(tables, key=len)
        assert "a long name" in text and ("-100.0" in text) == (count > 1)


def test_four_models_take_two_tables():
    hits = {name: np.arange(8) < i for i, name in enumerate("abcd")}
    row = scoring.summarise(["Text"] * 8, hits)[-1]
    text = report.summary("T", {"all": row})
    assert text.count("**T**") == 2 and "B after" in text and "D after" in text


def test_tiny_p_values_are_short():
    shown = [report.p_value(p) for p in (1.0, 0.0123, 0.001, 4.2e-11, 0.0)]
    assert shown == ["1", "0.012", "0.001", "4e-11", "<1e-99"]


# -- the newest model ----------------------------------------------------------------------------
def test_the_newest_enhanced_model_is_named(runs):
    out, files = run("eval_mmvp.py", runs, "--pairs", 3)
    newest = runs / LONG / "enhanced"
    assert out.startswith(f"newest enhanced model: {newest}\n")
    assert f"- B: {report.shorten(f'{LONG}/enhanced', report.NAME)}\n" in out
    assert files and all(file.startswith(f"{runs}/{LONG}/eval/") for file in files)


def test_a_run_stands_for_its_enhanced_model(runs):
    named = name_models([str(TOY), str(runs / "one") + "/"])
    assert named == {"toy/clip": str(TOY), "one/enhanced": str(runs / "one" / "enhanced")}
    [encoder] = load_encoders([runs / "one"])
    assert encoder.name == "one/enhanced"
    for script, words in (words_of(name, runs) for name in ("toy", "zeroshot")):
        words = [word for word in words if word != "--layers"]  # which compares models
        line = [script, "--runs", runs, "--model", runs / "begun", *words]
        code, out = command(shlex.join(map(str, line)), {})
        assert code == 2 and len(out.splitlines()) == 1
        assert "no enhanced/ in this run" in out and "python train.py --name begun" in out
        line[-len(words) - 1] = runs / "one"
        twice = [*line, "--model", runs / "one" / "enhanced"]
        code, out = command(shlex.join(map(str, twice)), {})
        assert code == 2 and "named twice" in out


# -- where results lie ---------------------------------------------------------------------------
def test_results_lie_beside_the_model_that_they_are_about(runs):
    before = everything_under(runs)
    for name, stem in (("toy", "toy-3pairs"), ("mmvp", "pairs"),
                       ("zeroshot", "zeroshot-classes+captions")):  # fmt: skip
        script, words = words_of(name, runs)
        _, files = run(script, runs, *three(runs), *words)
        new = everything_under(runs) - before
        assert new == set(files), "exactly the files that were named"
        before |= new
        for folder in ("one", LONG):
            own = {f for f in files if f.startswith(f"{runs}/{folder}/eval/{stem}-vs-toy-clip")}
            assert {f"{runs}/{folder}/eval/{stem}-vs-toy-clip{e}" for e in (".md", ".json")} <= own
            figures = json.loads((runs / folder / "eval" / f"{stem}-vs-toy-clip.json").read_text())
            assert list(figures["evaluation"]["models"]) == ["toy/clip", f"{folder}/enhanced"]
    # a model that is no run's, alone: one report, no pictures
    _, files = run("eval_mmvp.py", runs, "--model", TOY, "--pairs", 3)
    assert files == [f"{runs}/eval/toy-clip/toy-3pairs.{e}" for e in ("json", "md")]


def test_no_evaluation_overwrites_another(runs, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "pairs", tmp_path / "elsewhere" / "pairs")
    pairs = ["--benchmark", tmp_path / "pairs"]
    classify = ["--classify", tmp_path / "classes"]
    one, both = ["--model", runs / "one"], ["--model", TOY, "--model", runs / "one"]
    evaluations = [
        ("eval_mmvp.py", [*both, "--pairs", 3]),
        ("eval_mmvp.py", [*both, "--pairs", 3, "--seed", 1]),
        ("eval_mmvp.py", [*one, "--pairs", 3]),
        ("eval_mmvp.py", [*both, *pairs]),
        ("eval_mmvp.py", [*both, *pairs, "--template", "a photo of one {}"]),
        ("eval_mmvp.py", [*both, "--benchmark", tmp_path / "elsewhere" / "pairs"]),
        ("eval_mmvp.py", ["--model", runs / LONG, *one, *pairs]),
        ("eval_zeroshot.py", [*both, *classify]),
        ("eval_zeroshot.py", [*both, *classify, "--probe"]),
        ("eval_zeroshot.py", ["--model", runs / LONG, *one, *classify]),
    ]
    named = [run(script, runs, *words, "--out", out)[1] for script, words in evaluations]
    every = [file for files in named for file in files]
    assert len(every) == len(set(every)) and everything_under(out) == set(every)
    assert all(file.startswith(f"{out}/one-enhanced/") for file in every), "the model's name"
    assert f"{out}/one-enhanced/pairs-vs-toy-clip-2.md" in every, "the same names, other prompts"
    for (script, words), files in zip(evaluations, named, strict=True):
        again = run(script, runs, *words, "--out", out)[1]
        assert again == files, "the same evaluation again replaces its files"
    assert everything_under(out) == set(every)


def test_a_picture_that_is_no_longer_true_goes(tmp_path):
    items = benchmark.pairs(False, 1)
    right = torch.eye(2).expand(9, 2, 2)
    path = tmp_path / "changed.png"
    assert changed_picture(items, 1 - right, right, "group", path) == [path] and path.is_file()
    assert changed_picture(items, right, right, "group", path) == [] and not path.exists()


def test_foreign_files_are_left_alone(tmp_path):
    (tmp_path / "toy.json").write_text("no JSON")
    (tmp_path / "toy-2.json").write_text('{"evaluation": {"seed": 1}}')
    assert results.place(tmp_path, "toy", {"seed": 0}).name == "toy-3"
    assert results.place(tmp_path, "toy", {"seed": 1}).name == "toy-2"


# -- which pairs are shown -----------------------------------------------------------------------
def test_the_pairs_that_moved_most_are_shown_one_per_pattern_first():
    kinds = ["Text", "Text", "Text", "Color", "Color", "State"]
    items = [Item(kind, (None, None), ("a", "b"), str(i)) for i, kind in enumerate(kinds)]
    moved = np.array([0.1, 0.3, 0.2, 0.4, 0.5, 0.9])
    everyone = np.ones(6, bool)
    # Text changed most often, then Color; in each the one that moved furthest; then the rest
    assert moved_most(items, moved, everyone, 6) == [1, 4, 5, 3, 2, 0]
    assert moved_most(items, moved, everyone, 2) == [1, 4]
    assert moved_most(items, moved, moved < 0.45, 9) == [1, 3, 2, 0], "only those that may be"
    alike = [Item("all", (None, None), ("a", "b"), str(i)) for i in range(6)]
    assert moved_most(alike, moved, everyone, 3) == [5, 4, 3], "no patterns: the furthest"


def test_changed_pairs_come_with_their_cosines(tmp_path, monkeypatch):
    """Pairs won and lost of an evaluation written out: those drawn, and what stands beside them."""
    shown = {}

    def keep(columns, rows, path, height):
        shown["lines"] = [lines for _, lines in rows]

    monkeypatch.setattr("evaluation.changed.picture_table", keep)
    items = benchmark.pairs(False, 1)  # a pair of each pattern
    before = torch.tensor([[0.5, 0.4], [0.4, 0.5]]).repeat(9, 1, 1)
    after = before.clone()
    before[3, 0, 0] = before[4, 0, 0] = 0.3  # 3 and 4 are wrong before, by as much
    after[4, 0, 0] = after[4, 1, 1] = 0.6  # but 4 gains more
    after[7, 1, 1] = 0.1  # 7 is lost
    changed_picture(items, before, after, "text-to-image", tmp_path / "x.png")
    assert [lines[0] for lines in shown["lines"]] == [
        f"won: Spatial {items[4].name}, margin -0.100 to +0.200",
        f"won: Quantity {items[3].name}, margin -0.100 to +0.100",
        f"lost: Text {items[7].name}, margin +0.100 to -0.300",
    ]
    assert shown["lines"][-1][-2:] == [
        "   before: its picture 0.500 > 0.400 the other",
        "   after: its picture 0.100 < 0.400 the other",
    ]


def test_cosines_are_read_by_text_by_picture_and_by_caption():
    pair = Item("Color", (None, None), ("red", "blue"), "1")
    cosine = torch.tensor([[0.4, 0.3], [0.2, 0.1]])  # rows are texts
    by_text = cosine_lines(pair, cosine, cosine, "text-to-image")
    assert by_text[1].strip() == "before: its picture 0.400 > 0.300 the other"
    by_picture = cosine_lines(pair, cosine, cosine, "image-to-text")
    assert by_picture[1].strip() == "before: its text 0.400 > 0.200 the other"
    assert by_picture[4].strip() == "before: its text 0.100 < 0.300 the other"
    one = Item("all", (None,), ("dog", "cat", "cow", "owl"), "1")
    padded = torch.tensor([[0.4], [0.1], [0.3], [0.2], [-torch.inf]])
    lines = cosine_lines(one, padded, padded + 0.1, "image-to-text")
    assert [line for line in lines if "“" in line] == [
        "right: “dog”", "wrong: “cow”", "wrong: “owl”"]  # fmt: skip
    assert lines[1].strip() == "before 0.400, after 0.500"


def test_pictures_are_no_wider_than_a_page(runs, tmp_path):
    _, files = run("eval_mmvp.py", runs, *three(runs), "--benchmark", tmp_path / "pairs")
    pictures = [file for file in files if file.endswith(".png")]
    assert pictures and all(Image.open(file).width <= 1000 for file in pictures)
    kinds = {re.search(r"-(changed|margins)-", file)[1] for file in pictures}
    assert kinds == {"changed", "margins"}


# -- from Python ---------------------------------------------------------------------------------
def test_similarities_before_and_after_in_a_cell(runs, monkeypatch):
    items = benchmark.pairs(mentioned=False, per_pattern=3)[:20]
    before, after = (
        scoring.similarities(encoder, items, benchmark.TEMPLATE)
        for encoder in load_encoders([TOY, runs / "one"], progress=False)
    )
    assert before.shape == after.shape == (20, 2, 2) and not torch.equal(before, after)
    for task, margin in scoring.margins(after).items():
        assert margin.shape == (20,)
        assert np.array_equal(margin > 0, scoring.verdicts(after)[task])


def test_margins_by_hand():
    s = torch.tensor([[[0.5, 0.4], [0.1, 0.3]], [[0.5, 0.5], [0.1, 0.6]]])
    found = scoring.margins(s)
    assert np.allclose(found["text-to-image"], [0.1, 0.0])
    assert np.allclose(found["image-to-text"], [-0.1, 0.1])
    assert np.allclose(found["group"], [-0.1, 0.0])
    assert scoring.verdicts(s)["text-to-image"].tolist() == [True, False], "a tie is wrong"
    single = torch.tensor([[[0.5], [0.4], [-torch.inf]], [[0.5], [0.1], [0.5]]])
    assert np.allclose(scoring.margins(single)["image-to-text"], [0.1, 0.0])


def test_one_argument_switches_all_bars_off(monkeypatch):
    seen = []

    def tqdm(iterable, *words, disable=False, **more):
        seen.append(disable)
        return iterable

    monkeypatch.setattr(encoders, "tqdm", tqdm)
    monkeypatch.setattr(benchmark, "PROBE_TRAIN", 400)  # more than three batches
    for progress, expected in ((False, {True}), (True, {True, None})):
        seen.clear()
        eval_mmvp.evaluate_toy(load_encoders([TOY], progress=progress), per_pattern=1)
        assert set(seen) == expected, "None: where a terminal is looking"


def test_braces_in_captions_and_prompts_are_only_braces():
    class Words:
        def images(self, pictures):
            return torch.zeros(len(pictures), 4)

        def texts(self, texts):
            self.said = texts
            return torch.zeros(len(texts), 4)

    encoder, item = Words(), Item("all", (None, None), ("a {0}", "{b}"), "1")
    scoring.score(encoder, [item], "one {}, {not} another")
    assert encoder.said == ["one a {0}, {not} another", "one {b}, {not} another"]


# -- before models are loaded --------------------------------------------------------------------
@pytest.mark.parametrize(
    "words, said",
    [
        (["eval_mmvp.py", "--benchmark", "{here}/pairs"], "1.png cannot be read"),
        (["eval_zeroshot.py", "--classify", "{here}/classes"], "x.png cannot be read"),
        (["eval_mmvp.py", "--benchmark", "{here}/whole", "--doubts", "{here}/no.json"], "no file"),
        (["eval_mmvp.py", "--out", "{here}/file/deeper"], "file is a file"),
        (["eval_mmvp.py", "--model", "ViT-X:openai"], "not an open_clip model name"),
    ],
)
def test_mistakes_are_found_before_weights_are_read(runs, monkeypatch, words, said):
    here = runs.parent
    shutil.copytree(here / "pairs", here / "whole")
    next((here / "pairs").rglob("1.png")).write_bytes(b"no picture")
    (next((here / "classes").glob("*/")) / "x.png").write_bytes(b"no picture")
    (here / "file").write_text("")

    def refuse(model):
        raise AssertionError("weights were read")

    monkeypatch.setattr(encoders, "load_clip", refuse)
    words = [word.replace("{here}", str(here)) for word in words]
    code, out = command(shlex.join([*words, "--model", str(TOY), "--runs", str(runs)]), {})
    assert code == 2 and len(out.splitlines()) == 1 and re.search(re.escape(said), out), out
    assert not (runs / "eval").exists(), "nothing was made"


def test_two_models_whose_folders_are_one_get_a_report_each(tmp_path):
    models = {"a": "x:a", "e/one-enhanced": "x:b", "e-one/enhanced": "x:c"}
    folders = results.folders_of(models, str(tmp_path), "runs")
    assert len(set(folders.values())) < len(folders), "else this test shows nothing"
    stems = [stem for _, stem, _ in results.reports(models, folders, "toy", {})]
    assert len(set(stems)) == len(stems)
    long = results.reports(
        {"a": "x:a", "字" * 90: "x:b"}, dict.fromkeys(["字" * 90], tmp_path), "集" * 90, {}
    )
    assert 100 < len(long[0][1].name.encode()) <= 120, "a file system counts bytes"
