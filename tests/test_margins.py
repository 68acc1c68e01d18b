"""Margin and bias: against a scorer written out in exact fractions, the bootstrap against cases
whose answer is known, tables, JSON and the picture."""

import json
import random
import re
import shlex
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file
from test_wrong_input import command

import eval_mmvp
from evaluation import report, scoring
from evaluation.encoder import Encoder
from evaluation.margins import margin_picture, margin_rows, match_line, measured, medians
from pretrained.backbones import load_clip
from toy import benchmark
from toy.world import TOY_DIR

sys.path.insert(0, str(ROOT / "benchmarks"))
import side_by_side
import toy_seeds

TOY = TOY_DIR / "clip.safetensors"
SHARES = ["official", "group match", "image-to-text", "group", "one image wins both"]
MEDIANS = ["half margin", "bias"]


# -- the split -----------------------------------------------------------------------------------
def by_hand(s):
    """One pair, s[text][picture], written out."""
    s11, s12, s21, s22 = (Fraction(v) for v in (s[0][0], s[0][1], s[1][0], s[1][1]))
    winner1 = 1 if s11 > s12 else 2 if s12 > s11 else None  # the picture that text 1 prefers
    winner2 = 1 if s21 > s22 else 2 if s22 > s21 else None
    by_image = s11 > s21 and s22 > s12  # each picture prefers its own text
    right = winner1 == 1 and winner2 == 2
    return {
        "margin": s11 + s22 - s12 - s21,
        "bias": ((s11 - s12) + (s21 - s22)) / 2,
        "official": right,
        "group match": s11 + s22 > s12 + s21,
        "image-to-text": by_image,
        "group": right and by_image,
        "one image wins both": winner1 is not None and winner1 == winner2,
    }


def random_pairs(count=1000):
    """Half of them small whole numbers, so that ties of every kind are frequent; half cosines."""
    rng = random.Random(0)
    draws = (lambda: float(rng.randint(0, 2)), lambda: rng.uniform(-0.4, 0.4))
    found = [[[draws[k % 2]() for _ in range(2)] for _ in range(2)] for k in range(count)]
    return torch.tensor(found, dtype=torch.float32)


def test_a_thousand_pairs_equal_a_scorer_written_out():
    pairs = random_pairs()
    split, (shares, sizes) = scoring.margin_and_bias(pairs), measured(pairs)
    assert list(shares) == SHARES and list(sizes) == MEDIANS
    seen = {name: set() for name in SHARES}
    for k, pair in enumerate(pairs.tolist()):
        expected = by_hand(pair)
        assert Fraction(split["margin"][k]) == expected["margin"], "exact, not nearly"
        assert Fraction(split["bias"][k]) == expected["bias"]
        assert Fraction(sizes["half margin"][k]) == expected["margin"] / 2
        assert Fraction(sizes["bias"][k]) == abs(expected["bias"])
        for name in SHARES:
            assert bool(shares[name][k]) == expected[name], (name, pair)
            seen[name].add(expected[name])
        for name in ("group match", "one image wins both"):
            assert bool(split[name][k]) == expected[name]
    assert all(values == {True, False} for values in seen.values())


def test_right_is_half_the_margin_above_the_bias():
    """The identity, where rounding could break it too: a tie beside a large difference."""
    edge = torch.tensor([[[0.3, 0.3], [0.1, 0.9]], [[0.3, 0.3 - 2**-26], [-0.9, 0.9]]])
    assert edge[1, 0, 0] > edge[1, 0, 1], "else the second pair is a tie as well"
    for pairs in (random_pairs(), edge):
        split = scoring.margin_and_bias(pairs)
        right = scoring.verdicts(pairs)["text-to-image"]
        assert np.array_equal(right, split["margin"] / 2 > np.abs(split["bias"]))
        smaller = split["margin"] / 2 - np.abs(split["bias"])
        assert np.allclose(smaller, scoring.margins(pairs)["text-to-image"], atol=1e-7)
        assert not np.any(right & ~split["group match"]), "right implies group match"
        assert not np.any(right & split["one image wins both"])
    assert right.tolist() == [False, True]


def test_who_is_who_changes_the_sign_of_the_bias_alone():
    pairs = random_pairs()
    split, swapped = (scoring.margin_and_bias(p) for p in (pairs, pairs.flip(1, 2)))
    assert np.array_equal(split["margin"], swapped["margin"])
    assert np.array_equal(split["bias"], -swapped["bias"])
    to_first = torch.zeros(1, 2, 2)
    to_first[:, :, 0] = 0.2  # picture 1 is closer to every text
    assert scoring.margin_and_bias(to_first)["bias"][0] == pytest.approx(0.2)


def test_chance_is_as_the_tables_say():
    generator = torch.Generator().manual_seed(0)
    shares, _ = measured(torch.randn(40_000, 2, 2, generator=generator))
    expected = [25, 50, 25, 50 / 3, 50]
    assert np.allclose([100 * shares[name].mean() for name in SHARES], expected, atol=1)
    said = "right 25, group match 50, image-to-text 25, group 17, one image wins both texts 50"
    assert said in report.MARGINS
    constant, _ = measured(torch.ones(5, 2, 2))
    assert not any(hits.any() for hits in constant.values()), "all ties"


def test_anything_but_pairs_is_refused():
    with pytest.raises(ValueError, match=re.escape("not (3, 4, 1)")):
        scoring.margin_and_bias(torch.zeros(3, 4, 1))


# -- the bootstrap -------------------------------------------------------------------------------
def test_the_bootstrap_where_the_answer_is_known():
    rng = np.random.default_rng(1)
    before = rng.normal(size=200)
    low, high = scoring.bootstrap_interval(before, before + 0.25)
    assert (low, high) == pytest.approx((0.25, 0.25)), "a shift of every pair has no spread"
    assert scoring.bootstrap_interval(before, before) == (0.0, 0.0)
    # Two items, four equally likely samples: medians 0, 1, 1, 2.
    assert scoring.bootstrap_interval(np.zeros(2), np.array([0.0, 2.0])) == (0.0, 2.0)


def test_the_bootstrap_equals_a_plain_loop():
    rng, other = np.random.default_rng(2), random.Random(2)
    before, after = rng.normal(size=60), rng.normal(0.3, 1.5, size=60)
    changes = []
    for _ in range(4000):
        drawn = [other.randrange(60) for _ in range(60)]
        changes.append(np.median(after[drawn]) - np.median(before[drawn]))
    found = scoring.bootstrap_interval(before, after)
    assert np.allclose(found, np.percentile(changes, [2.5, 97.5]), atol=0.06)
    assert found == scoring.bootstrap_interval(before, after), "the seed is fixed"
    assert found != scoring.bootstrap_interval(before, after, seed=1)


def test_the_interval_covers_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(3), 0
    for _ in range(300):
        before = rng.normal(size=80)
        low, high = scoring.bootstrap_interval(before, before + rng.normal(0.2, 0.5, 80), draws=400)
        covered += low <= 0.2 <= high
    assert 0.9 < covered / 300 <= 0.995


# -- rows and tables -----------------------------------------------------------------------------
def two_models(count=90, scale=1.0):
    generator = torch.Generator().manual_seed(4)
    before = scale * torch.randn(count, 2, 2, generator=generator)
    return {"a": before, "b" * 200: before + scale * torch.eye(2)}


def test_rows_hold_every_measure_by_pattern_and_in_all():
    models = two_models()
    patterns = ["Text", "Color", "State"] * 30
    rows = margin_rows(patterns, models)
    assert [row["pattern"] for row in rows] == ["State", "Color", "Text", "Average"]
    assert [row["n"] for row in rows] == [30, 30, 30, 90]
    for row in rows:
        mask = torch.tensor([row["pattern"] in (p, "Average") for p in patterns])
        (_, first), (_, other) = row["models"].items()
        assert list(first) == list(other) == SHARES + MEDIANS
        hits, sizes = zip(*(measured(s[mask]) for s in models.values()), strict=True)
        for name in SHARES:
            assert other[name]["percent"] == pytest.approx(100 * hits[1][name].mean())
            won, lost, p = scoring.mcnemar(hits[0][name], hits[1][name])
            assert [other[name][key] for key in ("won", "lost", "p")] == [won, lost, p]
        for name in MEDIANS:
            values = [np.median(size[name]) for size in sizes]
            assert (first[name]["median"], other[name]["median"]) == pytest.approx(values)
            assert other[name]["change"] == pytest.approx(values[1] - values[0])
            interval = scoring.bootstrap_interval(sizes[0][name], sizes[1][name])
            assert other[name]["change_interval"] == list(interval)
    # Adding the same to both right cosines moves m/2 by that, and no bias.
    average = rows[-1]["models"]["b" * 200]
    assert average["half margin"]["change"] == pytest.approx(1)
    assert average["bias"]["change"] == pytest.approx(0, abs=1e-6)
    assert list(medians({"a": np.ones(3)})["a"]) == ["median"]


def test_group_match_is_a_line_of_the_summary():
    row = margin_rows(["Text"] * 90, two_models())[-1]
    lines = {
        "text-to-image": "group match",
        "text-to-image, doubts applied": "group match, doubts applied",
        "unmentioned": "group match, unmentioned",
    }
    for label, line in lines.items():
        [(name, found)] = match_line(label, row).items()
        assert name == line
        assert found["models"]["a"] == row["models"]["a"]["group match"]
    assert f"| {line} " in report.summary("T", {line: found})


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_tables_of_margins_fit_into_a_terminal(scale):
    """Cosines as small as a model's, and as large as no model has them."""
    models = two_models(900, scale)
    rows = margin_rows(["Structural Character", "Camera Perspective"] * 450, models)
    for other in models:
        text = report.margin_tables("a benchmark's name, 900 pairs " * 4, rows, other)
        assert max(map(len, text.splitlines())) <= 100
        first, second = text.split("by pattern")
        assert "| group match, % " in first and "cosine × 100 " in first
        assert ("joined/left" in first) == ("→" in second) == (other != "a")
        for table in (first, second):
            lines = [line for line in table.splitlines() if line.startswith("|")]
            assert len({len(line) for line in lines}) == 1, "columns line up"
    median = rows[-1]["models"]["b" * 200]["half margin"]["median"]
    assert f"{100 * median:.2f} " in first, "printed times 100"


# -- the picture ---------------------------------------------------------------------------------
def colours(path, left, right):
    """How many pixels of a part of the panels are blue (right) and orange (wrong)."""
    pixels = np.asarray(Image.open(path)).astype(int)[66:408, left:right]
    warm = pixels[..., 0] - pixels[..., 2]
    return int((warm < -60).sum()), int((warm > 60).sum())


def test_the_picture_shows_before_at_the_left_and_after_at_the_right(tmp_path):
    wrong = torch.tensor([[0.1, 0.3], [0.2, 0.1]]).expand(20, 2, 2)
    right = torch.tensor([[0.3, 0.1], [0.1, 0.3]]).expand(20, 2, 2)
    path = tmp_path / "deep" / "margins.png"
    assert margin_picture({"x" * 200: wrong, "after": right}, "T", path) == [path]
    assert Image.open(path).size == (900, 500)
    (blue0, orange0), (blue1, orange1) = colours(path, 64, 436), colours(path, 514, 886)
    assert blue0 == orange1 == 0 and blue1 > 20 and orange0 > 20
    once = path.read_bytes()
    margin_picture({"x" * 200: wrong, "after": right}, "T", path)
    assert path.read_bytes() == once
    margin_picture({"x" * 200: wrong, "after": 0.9 * right}, "T", path)
    assert path.read_bytes() != once, "other data, another picture"
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_point_stands_where_its_pair_is(tmp_path):
    """One pair with bias to picture 1: right of the middle; the other way round, left of it."""
    biased = torch.tensor([[[0.3, 0.1], [0.25, 0.1]]])
    for pair, (empty, full) in ((biased, ((64, 240), (260, 436))),
                                (biased.flip(1, 2), ((260, 436), (64, 240)))):  # fmt: skip
        path = tmp_path / "one.png"
        margin_picture({"a": pair, "b": pair}, "T", path)
        assert colours(path, *empty) == (0, 0) and colours(path, *full)[1] > 5


def test_a_constant_encoder_has_a_picture_too(tmp_path):
    nothing = torch.ones(3, 2, 2)
    [path] = margin_picture({"a": nothing, "b": nothing}, "T", tmp_path / "none.png")
    assert Image.open(path).size == (900, 500)


# -- the commands --------------------------------------------------------------------------------
def shaken(seed, strength=0.1):
    """The toy CLIP, its image tower shaken."""
    clip, info = load_clip(str(TOY))
    torch.manual_seed(seed)
    with torch.no_grad():
        clip.visual.proj.add_(strength * torch.randn_like(clip.visual.proj))
    return Encoder(f"shaken{seed}", clip, info, torch.device("cpu"))


def test_eval_mmvp_prints_draws_and_keeps_margins(tmp_path):
    benchmark.write_pairs(benchmark.pairs(False, 3, seed=5), tmp_path / "pairs")
    run = tmp_path / "one" / "enhanced"
    run.mkdir(parents=True)
    one, (_, info) = shaken(0), load_clip(str(TOY))
    save_file(one.clip.state_dict(), run / "open_clip_model.safetensors")
    (run / "open_clip_config.json").write_text(json.dumps(info.open_clip_config()))
    (tmp_path / "doubts.json").write_text('{"leave_out": [1]}')
    words = ["--benchmark", tmp_path / "pairs", "--model", TOY, "--model", run, "--out", tmp_path,
             "--doubts", tmp_path / "doubts.json", "--cache", "none"]  # fmt: skip
    code, out = command(shlex.join(["eval_mmvp.py", *map(str, words)]), {})
    assert code == 0, out
    assert max(map(len, out.split("written to")[0].splitlines())) <= 100
    top = out.split("against A")[0]
    assert "| group match " in top and "| group match, doubts applied " in top
    assert out.count("; margins**") == 2 and " ".join(out.split()).count("margins by pattern") == 2
    [file] = tmp_path.rglob("pairs-vs-toy-clip.json")
    figures = json.loads(file.read_text())
    rows, plain = figures["text-to-image, margins"], figures["text-to-image"]
    assert [row["pattern"] for row in rows] == [row["pattern"] for row in plain]
    for row, official in zip(rows, plain, strict=True):
        for name, measures in row["models"].items():
            assert list(measures) == SHARES + MEDIANS
            assert measures["official"] == official["models"][name], "the same verdicts"
    assert (
        rows[-1]["models"]["one/enhanced"]["group"]
        == (figures["group"][-1]["models"]["one/enhanced"])
    )
    assert figures["text-to-image, doubts applied, margins"][-1]["n"] == 26
    assert "image-to-text, margins" not in figures, "one table for all four verdicts"
    pictures = [p.name for p in tmp_path.rglob("*-margins-*.png")]
    assert pictures == ["pairs-vs-toy-clip-margins-text-to-image.png"]


def test_both_sides_of_the_toy_have_margins(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "PROBE_TRAIN", 60)
    monkeypatch.setattr(benchmark, "PROBE_TEST", 30)
    encoders = [shaken(0, 0.0), shaken(1)]
    found = eval_mmvp.evaluate_toy(encoders, per_pattern=2)
    names = [encoder.name for encoder in encoders]
    figures = eval_mmvp.figures(found, names)
    keys = [key for key in figures if key.endswith(", margins")]
    assert keys == ["unmentioned, margins", "mentioned, margins"]
    top = eval_mmvp.text_of(found, names).split("against A")[0]
    assert "| group match, unmentioned " in top and "| group match, mentioned " in top
    files = [file.name for file in eval_mmvp.pictures(found, *names, tmp_path / "toy")]
    assert {"toy-margins-unmentioned.png", "toy-margins-mentioned.png"} <= set(files)


# -- the benchmarks over seeds -------------------------------------------------------------------
def test_toy_seeds_and_side_by_side_carry_group_match(monkeypatch):
    monkeypatch.setattr(toy_seeds, "pairs", lambda side, per, seed: benchmark.pairs(side, 3, seed))
    original, runs = shaken(0, 0.0), [shaken(1), shaken(2)]
    result = {"subject_zero_shot": {"n": 1, "before": 0.0, "after": [0.0, 0.0]}}
    for side in ("unmentioned", "mentioned"):
        result[side], lines = toy_seeds.measure_side(original, runs, side == "mentioned")
        assert any(line.startswith("| group match, % |") for line in lines)
        assert sum("cosine × 100" in line for line in lines) == 2
    items = benchmark.pairs(False, 3, seed=0)
    average = result["unmentioned"]["rows"][-1]
    for when, encoder in (("before", original), (0, runs[0]), (1, runs[1])):
        found = scoring.margin_and_bias(scoring.similarities(encoder, items, benchmark.TEMPLATE))
        expected = {
            "group match": 100 * found["group match"].mean(),
            "half margin": np.median(found["margin"]) / 2,
            "bias": np.median(np.abs(found["bias"])),
        }
        for name, value in expected.items():
            margins = average["margins"][name]
            kept = margins["before"] if when == "before" else margins["after"][when]
            assert kept == pytest.approx(value), name
    rows = side_by_side.rows(result)
    n, before, after = rows["group match, unmentioned"]
    match = average["margins"]["group match"]
    assert (n, before, after.tolist()) == (27, match["before"], match["after"])
    labels = list(rows)
    assert labels.index("group match, unmentioned") == labels.index("**unmentioned**") + 1
    for side in ("unmentioned", "mentioned"):  # a result from before there were margins
        for row in result[side]["rows"]:
            del row["margins"]
    assert not any("group match" in label for label in side_by_side.rows(result))
