"""eval_mmvp.py: the rules of MMVP-VLM, statistics against scipy, folders good and bad."""

import csv
import json
import os
import random
import re
import shlex
import shutil
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from scipy import stats
from test_wrong_input import command

import eval_mmvp as ev
from evaluation import pairsets, report, scoring
from evaluation.encoder import Encoder, load_encoders
from pretrained.backbones import load_clip
from toy import benchmark
from toy.world import TOY_DIR


def pair_hits(images, texts):
    """MMVP's rule."""
    return scoring.verdicts(scoring.pair_similarities(images, texts))["text-to-image"]


# -- scoring -------------------------------------------------------------------------------------
def by_hand(similarity):
    """similarity[text][image], written out: each text must strictly prefer its own image."""
    text0 = similarity[0][0] > similarity[0][1]
    text1 = similarity[1][1] > similarity[1][0]
    return text0 and text1


def test_equals_a_by_hand_scorer_ties_included():
    rng = random.Random(0)
    seen = set()
    for _ in range(1000):
        # Small integers make ties frequent. Unit texts e0, e1 read the images' coordinates.
        values = [[rng.randint(0, 2) for _ in range(2)] for _ in range(2)]
        images = torch.tensor(values, dtype=torch.float32).T[None]  # (1, image, text coordinate)
        hit = bool(pair_hits(images, torch.eye(2)[None])[0])
        assert hit == by_hand(values)
        seen.add(hit)
    assert seen == {True, False}


def test_constant_encoder_scores_zero():
    one = F.normalize(torch.ones(50, 2, 8), dim=-1)
    assert pair_hits(one, F.normalize(torch.randn(50, 2, 8), dim=-1)).sum() == 0
    assert pair_hits(F.normalize(torch.randn(50, 2, 8), dim=-1), one).sum() == 0


def test_chance_is_a_quarter():
    features = F.normalize(torch.randn(10_000, 4, 64), dim=-1)
    assert 0.23 < pair_hits(features[:, :2], features[:, 2:]).mean() < 0.27


# -- statistics ----------------------------------------------------------------------------------
@pytest.mark.parametrize("hits, n", [(0, 15), (15, 15), (3, 15), (43, 135), (600, 900), (1, 1)])
def test_wilson_equals_scipy(hits, n):
    reference = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert np.allclose(
        scoring.wilson_interval(hits, n), (reference.low, reference.high), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize(
    "won, lost", [(0, 0), (5, 0), (0, 7), (10, 10), (30, 12), (123, 61), (900, 700)]
)
def test_mcnemar_equals_scipy(won, lost):
    before = np.array([False] * won + [True] * lost + [True, False])
    after = np.array([True] * won + [False] * lost + [True, False])
    w, lo, p = scoring.mcnemar(before, after)
    assert (w, lo) == (won, lost)
    expected = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert abs(p - expected) <= 1e-12


def test_summary_counts_patterns_and_average():
    patterns = ["Text"] * 4 + ["Color"] * 4
    before, after = (
        np.array([1, 0, 0, 0, 1, 1, 0, 0], bool),
        np.array([1, 1, 1, 0, 1, 0, 0, 0], bool),
    )
    rows = scoring.summarise(patterns, {"a": before, "b": after})
    assert [r["pattern"] for r in rows] == ["Color", "Text", "Average"], "Tab. 1's order"
    average = rows[-1]["models"]
    assert average["a"]["percent"] == 37.5 and average["b"]["change"] == 12.5
    assert (average["b"]["won"], average["b"]["lost"]) == (2, 1)
    for text in (
        report.wide_table("T", "pattern", rows),
        report.pair_table("T", "pattern", rows, "b"),
    ):
        assert "+12.5" in text and "2/1" in text
        assert len({len(line) for line in text.splitlines()[2:]}) == 1, "columns line up"


def test_a_pattern_may_be_called_average():
    rows = scoring.summarise(
        ["Average", "Average", "Color", "Color"], {"a": np.array([1, 1, 0, 0])}
    )
    found = [(r["pattern"], r["models"]["a"]["percent"]) for r in rows]
    assert found == [("Color", 0.0), ("Average", 100.0), ("Average", 50.0)]


# -- folders -------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    benchmark.write_pairs(benchmark.pairs(False, 2, seed=5), tmp_path)
    return tmp_path


def rewrite(folder, change):
    """Apply `change` to the list of rows (header included) of Questions.csv."""
    with open(folder / "Questions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    with open(folder / "Questions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(change(rows))


def test_written_benchmark_reads_back_and_scores_the_same(folder):
    encoder = Encoder("toy", *load_clip(str(TOY_DIR / "clip.safetensors")), torch.device("cpu"))
    direct, back = benchmark.pairs(False, 2, seed=5), pairsets.read_mmvp(folder)
    assert [(i.category, i.captions, i.name) for i in back] == [
        (i.category, i.captions, i.name) for i in direct
    ]
    for task, verdict in scoring.score(encoder, back, benchmark.TEMPLATE).items():
        assert np.array_equal(verdict, scoring.score(encoder, direct, benchmark.TEMPLATE)[task])


def test_row_order_does_not_matter(folder):
    expected = [(i.category, i.captions, i.name) for i in pairsets.read_mmvp(folder)]

    def shuffle(rows):
        body = rows[1:]
        random.Random(0).shuffle(body)
        return [rows[0], *body]

    rewrite(folder, shuffle)
    assert [(i.category, i.captions, i.name) for i in pairsets.read_mmvp(folder)] == expected


def test_commas_and_quotes_in_statements(folder):
    odd = 'a sign, white, that says "A, B" and nothing else'
    rewrite(folder, lambda rows: [[*r[:2], odd] if r[0] == "3" else r for r in rows])
    assert pairsets.read_mmvp(folder)[1].captions[0] == odd


@pytest.mark.parametrize("name", pairsets.IMAGE_FOLDERS)
def test_three_spellings_and_jpg(folder, name):
    old = folder / "MMVP_VLM_Images"
    for file in old.rglob("*.png"):
        Image.open(file).save(file.with_suffix(".jpg"))
        file.unlink()
    old.rename(folder / name)
    assert len(pairsets.read_mmvp(folder)) == 18


BAD = {
    "missing id": (
        lambda f: rewrite(f, lambda rows: [r for r in rows if r[0] != "7"]),
        "lacks 1 of the ids.*7",
    ),
    "doubled id": (lambda f: rewrite(f, lambda rows: rows + [rows[4]]), "id 4 appears twice"),
    "missing picture": (
        lambda f: (f / "MMVP_VLM_Images/Text/29.png").unlink(),
        "picture 29.jpg is missing",
    ),
    "no number": (
        lambda f: rewrite(f, lambda rows: rows + [["x", "Text", "y"]]),
        "'x' is not a number",
    ),
    "no column": (lambda f: rewrite(f, lambda rows: [r[:2] for r in rows]), "no column Statement"),
    "empty statement": (
        lambda f: rewrite(f, lambda rows: [[*r[:2], ""] if r[0] == "2" else r for r in rows]),
        "id 2 has no Type or no Statement",
    ),
    "two types in a pair": (
        lambda f: rewrite(
            f, lambda rows: [[r[0], "Text", r[2]] if r[0] == "2" else r for r in rows]
        ),
        "ids 1 and 2 are a pair of two types",
    ),
    "no rows": (lambda f: rewrite(f, lambda rows: rows[:1]), "has no rows"),
    "no table": (lambda f: (f / "Questions.csv").unlink(), "Questions.csv is missing"),
    "no pictures": (
        lambda f: (f / "MMVP_VLM_Images").rename(f / "pictures"),
        "none of the image folders",
    ),
    "odd last id": (lambda f: rewrite(f, lambda rows: rows[:-1]), "lacks 1 of the ids 1 to 36: 36"),
    "id zero": (lambda f: rewrite(f, lambda rows: rows + [["0", "Text", "y"]]), "ids start at 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_named(folder, case):
    spoil, message = BAD[case]
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pairsets.read_mmvp(folder)


# -- command -------------------------------------------------------------------------------------
def run(*arguments):
    """The command, in this process."""
    words = [str(a).replace("{", "{{").replace("}", "}}") for a in arguments]
    code, out = command(shlex.join(["eval_mmvp.py", *words]), {})
    return subprocess.CompletedProcess(arguments, code, out, out)


def result_in(out):
    """The figures of the only report in a folder."""
    [file] = out.rglob("*.json")
    return json.loads(file.read_text())


TOY = TOY_DIR / "clip.safetensors"


@pytest.fixture
def enhanced(tmp_path_factory):
    """The toy CLIP with its image tower shaken, as an enhanced folder."""
    folder = tmp_path_factory.mktemp("run") / "enhanced"
    folder.mkdir()
    clip, info = load_clip(str(TOY))
    torch.manual_seed(0)
    with torch.no_grad():
        clip.visual.proj.add_(0.05 * torch.randn_like(clip.visual.proj))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(info.open_clip_config()))
    return folder


def test_command_on_a_folder(folder, enhanced, tmp_path):
    out = tmp_path / "out"
    done = run("--benchmark", folder, "--model", TOY, "--model", enhanced, "--out", out)
    name = f"{enhanced.parent.name}/enhanced"
    assert done.returncode == 0, done.stderr
    assert f"{folder.name}, 18 pairs, text-to-image;" in done.stdout
    assert "one is 5.56" in " ".join(done.stdout.split())
    assert "Within the noise" in done.stdout and "against toy/clip: won" in done.stdout
    result = result_in(out)
    assert result["text-to-image"][-1]["n"] == result["group"][-1]["n"] == 18
    changed = result["text-to-image, changed"][name]
    other = result["text-to-image"][-1]["models"][name]
    assert (len(changed["won"]), len(changed["lost"])) == (other["won"], other["lost"])


def test_two_prompts_show_their_spread(folder, tmp_path):
    flags = ["--template", "a photo of {}", "--template", "{}", "--out", tmp_path / "out"]
    done = run("--benchmark", folder, "--model", TOY, *flags)
    assert done.returncode == 0 and "spread, max − min" in done.stdout, done.stdout
    result = result_in(tmp_path / "out")
    averages = result["text-to-image, by prompt"]
    percent = result["text-to-image"][-1]["models"]["toy/clip"]["percent"]
    assert averages["a photo of {}"]["toy/clip"] == pytest.approx(percent) and len(averages) == 2


def test_doubts_are_off_by_default_and_print_both_figures(folder, tmp_path):
    file = tmp_path / "doubts.json"
    file.write_text(json.dumps({"leave_out": [1, 5], "swap": ["3-4"]}))
    items = pairsets.read_mmvp(folder)
    kept = pairsets.apply_doubts(items, file)
    assert [i.name for i in kept] == [i.name for i in items if i.name not in ("1-2", "5-6")]
    assert kept[0].captions == items[1].captions[::-1]
    done = run("--benchmark", folder, "--model", TOY, "--doubts", file, "--out", tmp_path / "out")
    said = " ".join(done.stdout.split())
    assert "18 pairs, text-to-image" in said and "2 left out and 1 swapped (" in said
    result = result_in(tmp_path / "out")
    assert result["text-to-image, doubts applied"][-1]["n"] == 16
    assert result["text-to-image"][-1]["n"] == 18
    file.write_text(json.dumps({"swap": [99]}))
    wrong = run("--benchmark", folder, "--model", TOY, "--doubts", file)
    assert wrong.returncode == 2 and "names 99, not in this benchmark" in wrong.stderr


def test_a_doubt_about_one_item_is_about_no_other(tmp_path):
    names = ("1", "2", "1-2", "3-4", "4-5", "cat-1", "cat-2")
    items = [pairsets.Item("all", ("a", "b"), ("x", "y"), name) for name in names]

    def left(*doubted):
        (tmp_path / "doubts.json").write_text(json.dumps({"leave_out": doubted}))
        return [i.name for i in pairsets.apply_doubts(items, tmp_path / "doubts.json")]

    assert left(1) == [n for n in names if n != "1"], "an exact name before the id of a pair"
    assert left("3", "cat-1") == ["1", "2", "1-2", "4-5", "cat-2"]
    for unknown in ("cat", 4):  # no pair of ids; an id of two pairs
        with pytest.raises(ValueError, match=f"names {unknown}, not in this benchmark"):
            left(unknown)


def test_the_papers_rows_stand_beside_known_backbones(tmp_path):
    for name, rows in ev.PAPER.items():
        for row in rows:
            *patterns, average = map(float, row.split())
            assert len(patterns) == 9
            assert abs(sum(patterns) / 9 - average) < 0.11, name
    about = {"stages": {"1": {"settings": {"clip": "ViT-L-14-quickgelu:openai"}}}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    text = ev.paper_table([str(TOY), str(tmp_path / "enhanced"), "ViT-SO400M-14-SigLIP:webli"])
    assert "31.9" in text and "45.2" not in text and "42.2" in text
    assert ev.paper_table([str(TOY)]) == ""


def test_features_are_kept_and_never_mistaken(folder, tmp_path):
    clip, info = load_clip(str(TOY))
    encoder = Encoder("a", clip, info, torch.device("cpu"), tmp_path / "features")
    pictures = [p for item in pairsets.read_mmvp(folder) for p in item.images]
    first = encoder.images(pictures)
    files = list((tmp_path / "features").iterdir())
    clip.encode_image = None  # from here on only the cache can answer
    assert torch.equal(encoder.images(pictures), first) and len(files) == 1
    before = pictures[0].stat()
    other = bytearray(pictures[0].read_bytes())
    other[-1] ^= 1
    pictures[0].write_bytes(other)
    os.utime(pictures[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(TypeError):  # of the same size and date, and another picture
        encoder.images(pictures)
    other[-1] ^= 1
    pictures[0].write_bytes(other)
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    again = [p for item in pairsets.read_mmvp(moved) for p in item.images]
    assert torch.equal(encoder.images(again), first), "the content counts, not where it lies"
    again, _ = load_clip(str(TOY))
    with torch.no_grad():
        again.visual.proj.mul_(-1)
    other = Encoder("b", again, info, torch.device("cpu"), tmp_path / "features").images(pictures)
    assert not torch.allclose(other, first), "other weights, other features"


def test_a_transformers_folder_is_a_model_too(folder, enhanced, tmp_path):
    import export_hf

    export_hf.export(enhanced, tmp_path / "hf")
    encoders = load_encoders([str(enhanced), str(tmp_path / "hf")], torch.device("cpu"), None)
    pictures = [p for item in pairsets.read_mmvp(folder) for p in item.images]
    one, two = (encoder.images(pictures) for encoder in encoders)
    assert torch.equal(one, two)


# -- other sets ----------------------------------------------------------------------------------
def test_winoground_scores_against_a_loop():
    """The three scores of 200 random items with ties, written out."""
    rng = random.Random(1)
    for _ in range(200):
        s = [[rng.randint(0, 2) for _ in range(2)] for _ in range(2)]  # s[text][image]
        images = torch.tensor(s, dtype=torch.float32).T[None]
        similarity = scoring.pair_similarities(images, torch.eye(2)[None])
        found = {k: bool(v[0]) for k, v in scoring.verdicts(similarity).items()}
        text_right = s[0][0] > s[1][0] and s[1][1] > s[0][1]  # each image prefers its own text
        image_right = s[0][0] > s[0][1] and s[1][1] > s[1][0]  # each text prefers its own image
        both = text_right and image_right
        assert found == {"image-to-text": text_right, "text-to-image": image_right, "group": both}


def write_json(folder, items, **more):
    (folder / "set.json").write_text(json.dumps({"items": items, **more}))
    return folder / "set.json"


def test_json_pairs_and_single_images(folder, tmp_path):
    items = [
        {"id": i.name, "category": i.category, "images": [str(p) for p in i.images],
         "captions": list(i.captions)}
        for i in pairsets.read_mmvp(folder)
    ]  # fmt: skip
    items.append(
        {"id": "one", "image": items[0]["images"][0], "captions": ["a bird", "a tree", "a key"]}
    )
    file = write_json(tmp_path, items, name="mine", template="a photo of {}")
    done = run("--benchmark", file, "--model", TOY, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout
    for title in ("18 pairs, text-to-image", "18 pairs, image-to-text", "18 pairs, group",
                  "1 single images, image-to-text"):  # fmt: skip
        assert f"mine, {title}" in done.stdout
    encoder = Encoder("toy", *load_clip(str(TOY)), torch.device("cpu"))
    same = scoring.score(encoder, pairsets.read_mmvp(folder), "a photo of {}")
    again = scoring.score(encoder, pairsets.read_json(file).items[:-1], "a photo of {}")
    assert all(np.array_equal(same[task], again[task]) for task in same)


PICTURE = {"image": "a.png", "captions": ["x", "y"]}


@pytest.mark.parametrize(
    "content, message",
    [
        ("not json", "is not JSON"),
        ("[]", "the file: expected object, found list"),
        ('{"items": []}', 'has no "items"'),
        ({"items": {"a": PICTURE}}, "items: expected list, found object"),
        ({"items": [PICTURE, "x"]}, "items[1]: expected object, found text"),
        (
            {"items": [{"image": 5, "captions": ["x", "y"]}]},
            "items[0].image: expected text, found number",
        ),
        ({"items": [PICTURE], "template": 5}, "template: expected text, found number"),
        ({"items": [PICTURE], "template": "a photo"}, "has no {} for a caption"),
        ({"items": [{**PICTURE, "id": 1}, {**PICTURE, "id": 1}]}, "its id appears twice"),
        ({"items": [{"image": "a.png", "captions": ["x"]}]}, "one image two or more"),
        ({"items": [{"images": ["a.png", "a.png"], "captions": list("xyz")}]}, "two captions"),
        ({"items": [{"images": ["a.png"] * 3, "captions": list("xyz")}]}, "not 3"),
        (
            {"items": [{"image": "a.png", "captions": "xy"}]},
            "items[0].captions: expected list, found text",
        ),
        ({"items": [{"image": "a.png", "captions": ["x", ""]}]}, "a caption is empty"),
        ({"items": [{"image": "b.png", "captions": ["x", "y"]}]}, "b.png is missing"),
    ],
)
def test_bad_json_sets_are_named(tmp_path, content, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    file = tmp_path / "set.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        pairsets.read_pair_set(file)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--benchmark", "nowhere"), "Questions.csv is missing"),
        (("--model", "ViT-X:openai"), "not an open_clip model name"),
        (("--modle", "x"), "did you mean --model"),
        (("--pairs", "many"), "invalid int value"),
        (("--pairs", "0"), "at least 1"),
        (("--runs", "nowhere"), "no enhanced model"),
        (("--model", TOY, "--model", TOY), "named twice"),
        (("--benchmark", "x", "--template", "a photo"), "put {} where the statement goes"),
        (("--template", "{}"), "not for the toy's"),
        (("--model", TOY, "--out", TOY), "is a file"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


def test_a_broken_picture_is_named(folder, tmp_path):
    (folder / "MMVP_VLM_Images/Text/29.png").write_bytes(b"not a picture")
    done = run("--benchmark", folder, "--model", TOY, "--runs", tmp_path)
    assert done.returncode == 2 and "29.png cannot be read" in done.stderr


def test_the_interval_of_a_change_covers_as_often_as_it_says():
    """Simulated: two models on the same 135 items, a true change of 5 points."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        won, lost = rng.multinomial(135, [0.12, 0.07, 0.81])[:2]
        low, high = scoring.paired_interval(int(won), int(lost), 135)
        covered += low <= 0.05 <= high
    assert 0.93 < covered / 2000 < 0.975
