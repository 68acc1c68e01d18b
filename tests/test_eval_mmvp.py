"""eval_mmvp.py: the rules of METHOD section 10, statistics against scipy, folders good and bad."""

import csv
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from scipy import stats

import eval_mmvp as ev
import scoring
import toyworld
from backbones import load_clip


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
        hit = bool(scoring.pair_hits(images, torch.eye(2)[None])[0])
        assert hit == by_hand(values)
        seen.add(hit)
    assert seen == {True, False}


def test_constant_encoder_scores_zero():
    one = F.normalize(torch.ones(50, 2, 8), dim=-1)
    assert scoring.pair_hits(one, F.normalize(torch.randn(50, 2, 8), dim=-1)).sum() == 0
    assert scoring.pair_hits(F.normalize(torch.randn(50, 2, 8), dim=-1), one).sum() == 0


def test_chance_is_a_quarter():
    features = F.normalize(torch.randn(10_000, 4, 64), dim=-1)
    assert 0.23 < scoring.pair_hits(features[:, :2], features[:, 2:]).mean() < 0.27


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
    text = scoring.markdown("T", rows)
    assert "+12.5" in text and len({len(line) for line in text.splitlines()[2:]}) == 1, (
        "columns line up"
    )


# -- folders -------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    toyworld.write_benchmark(toyworld.benchmark(False, 2, seed=5), tmp_path)
    return tmp_path


def rewrite(folder, change):
    """Apply `change` to the list of rows (header included) of Questions.csv."""
    with open(folder / "Questions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    with open(folder / "Questions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(change(rows))


def test_written_benchmark_reads_back_and_scores_the_same(folder):
    judge = ev.Judge(
        "toy", *load_clip(str(toyworld.TOY_DIR / "clip.safetensors")), torch.device("cpu")
    )
    pairs = toyworld.benchmark(False, 2, seed=5)
    back = ev.read_mmvp(folder)
    assert [(p.pattern, p.statements, p.ids) for p in back] == [
        (p.pattern, p.statements, p.ids) for p in pairs
    ]
    assert np.array_equal(ev.score(judge, back), ev.score(judge, pairs))


def test_row_order_does_not_matter(folder):
    expected = [(p.pattern, p.statements, p.ids) for p in ev.read_mmvp(folder)]

    def shuffle(rows):
        body = rows[1:]
        random.Random(0).shuffle(body)
        return [rows[0], *body]

    rewrite(folder, shuffle)
    assert [(p.pattern, p.statements, p.ids) for p in ev.read_mmvp(folder)] == expected


def test_commas_and_quotes_in_statements(folder):
    odd = 'a sign, white, that says "A, B" and nothing else'
    rewrite(folder, lambda rows: [[*r[:2], odd] if r[0] == "3" else r for r in rows])
    assert ev.read_mmvp(folder)[1].statements[0] == odd


@pytest.mark.parametrize("name", ev.IMAGE_FOLDERS)
def test_three_spellings_and_jpg(folder, name):
    old = folder / "MMVP_VLM_Images"
    for file in old.rglob("*.png"):
        Image.open(file).save(file.with_suffix(".jpg"))
        file.unlink()
    old.rename(folder / name)
    assert len(ev.read_mmvp(folder)) == 18


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
        ev.read_mmvp(folder)


# -- command -------------------------------------------------------------------------------------
def run(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "eval_mmvp.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_command_on_a_folder(folder, tmp_path):
    model = toyworld.TOY_DIR / "clip.safetensors"
    done = run("--benchmark", folder, "--model", model, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "MMVP-VLM, 18 pairs; one pair is 5.56 points" in done.stdout
    result = json.loads((tmp_path / "out" / "mmvp.json").read_text())
    assert result["mmvp"][-1]["n"] == 18


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--benchmark", "nowhere"), "Questions.csv is missing"),
        (("--model", "ViT-X:openai"), "not an open_clip model name"),
        (("--modle", "x"), "did you mean --model"),
        (("--pairs", "many"), "invalid int value"),
        (("--pairs", "0"), "at least 1"),
        (("--runs", "nowhere"), "no enhanced model"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


def test_a_broken_picture_is_named(folder):
    (folder / "MMVP_VLM_Images/Text/29.png").write_bytes(b"not a picture")
    done = run("--benchmark", folder, "--model", toyworld.TOY_DIR / "clip.safetensors")
    assert (
        done.returncode == 2
        and "29.png cannot be read" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_every_further_model_gets_its_own_picture_of_changed_pairs(tmp_path):
    """Two enhanced models beside the original: nobody's picture is overwritten."""
    pairs = toyworld.benchmark(True, 1, seed=3)
    before = np.zeros(len(pairs), dtype=bool)
    after = {"a/enhanced": ~before, "b/enhanced": before.copy()}
    after["b/enhanced"][0] = True
    ev.changed_pairs_pictures(pairs, {"original": before, **after}, tmp_path, "changed")
    assert {p.name for p in tmp_path.iterdir()} == {"changed.png", "changed_b_enhanced.png"}
    wide, narrow = (Image.open(p).width for p in sorted(tmp_path.iterdir()))
    assert wide > narrow, "nine pairs won against one; at most five are shown"
