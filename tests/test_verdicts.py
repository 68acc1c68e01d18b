"""The rule that judges the paper's claims, checked where the answer is known; and the document that
it makes, checked against the records."""

import json
import math
import re
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import ablations
import verdicts


# -- statistics ----------------------------------------------------------------------------------
def by_integration(t):
    """Two-sided p of Student's t with 4 degrees of freedom, by its density."""
    x = np.linspace(-abs(t), abs(t), 200_001)
    return 1 - np.trapezoid(3 / 8 * (1 + x * x / 4) ** -2.5, x)


@pytest.mark.parametrize("mean", [0.0, 0.3, 1.0, 4.0])
def test_t_interval(mean):
    values = np.array([-1.0, 0.5, 0.0, 1.0, -0.5]) + mean
    low, high, p = verdicts.t_interval(values)
    error = values.std(ddof=1) / math.sqrt(5)
    assert p == pytest.approx(by_integration(values.mean() / error), abs=1e-6)
    # At the ends of the interval, p is 5 %.
    for end in (low, high):
        assert by_integration((values.mean() - end) / error) == pytest.approx(0.05, abs=1e-6)


def test_five_seeds_or_none():
    with pytest.raises(ValueError, match="five"):
        verdicts.t_interval(np.ones(4))
    assert verdicts.t_interval(np.full(5, 2.0)) == (2.0, 2.0, 0.0)


def test_holm_by_hand():
    """Sorted 0.01, 0.02, 0.03 of four tests: × 4, × 3, × 2, and never less than the one before."""
    assert verdicts.holm([0.03, 0.01, None, 0.02], 4) == pytest.approx([0.06, 0.04, None, 0.06])
    assert verdicts.holm([0.9, 0.8], 12) == [1.0, 1.0]


@pytest.mark.parametrize(
    "rule, effect, interval, p, expected",
    [
        ("ahead", 3.0, (2.0, 4.0), 0.01, "holds"),
        ("ahead", 3.0, (-1.0, 7.0), 0.2, "undecided"),
        ("ahead", 0.2, (-0.5, 0.9), 1.0, "holds not"),
        ("ahead", -2.0, (-3.0, -1.0), 0.01, "holds not"),
        ("level", 0.2, (-1.0, 1.4), 1.0, "holds"),
        ("level", 3.0, (2.0, 4.0), 0.01, "holds not"),
        ("level", 1.0, (-1.0, 3.0), 0.3, "undecided"),
        ("no worse", 4.0, (3.0, 5.0), 0.01, "holds"),
        ("no worse", -0.5, (-1.2, 0.2), 0.3, "holds"),
        ("no worse", -3.0, (-4.0, -2.0), 0.01, "holds not"),
        ("no worse", -1.0, (-2.5, 0.5), 0.3, "undecided"),
    ],
)
def test_the_rule(rule, effect, interval, p, expected):
    assert verdicts.verdict(rule, effect, interval, p) == expected


# -- records -------------------------------------------------------------------------------------
def bits(right):
    """As evidence.py writes verdicts."""
    return np.packbits(right).tobytes().hex()


def forget():
    """What was read and judged."""
    for kept in (verdicts.record, verdicts.original, verdicts.judge):
        kept.cache_clear()


@pytest.fixture
def records(tmp_path, monkeypatch):
    """Made-up records: flow wins 9 pairs (1 point) a quarter of strength, and loses 0.2 points of
    subject accuracy with each."""
    monkeypatch.setattr(verdicts, "RECORDS", tmp_path)
    monkeypatch.setattr(verdicts, "record_of", lambda arm, seed: tmp_path / f"{arm}-{seed}.json")
    forget()

    def row(won, lost):
        right = np.arange(900) < 450 + won
        return {"unmentioned": bits(right), "mentioned": bits(right), "subject": 98 - lost,
                "cosine": 0.99}  # fmt: skip

    def write(arm, seed, pace):
        points = [{"strength": 0.25 * k, **row(round(9 * k * pace), 0.2 * k)} for k in range(1, 9)]
        record = {"strengths": points, "cost": {}}
        (tmp_path / f"{arm}-{seed}.json").write_text(json.dumps(record))

    (tmp_path / "original.json").write_text(json.dumps(row(0, 0)))
    yield write
    forget()


def test_bits_survive_the_record():
    right = np.random.default_rng(0).random(900) < 0.5
    assert np.array_equal(verdicts.as_bits(bits(right)), right.astype(float))


def test_equal_retention_is_read_between_two_strengths(records):
    """Half a point is lost at 2.5 quarters: half-way between 2 and 3, so 22.5 pairs are won."""
    records("flow", 1, pace=1)
    right, strength = verdicts.at_equal_retention("flow", 1)
    assert strength == pytest.approx(0.625) and right.sum() == pytest.approx(450 + 22.5)
    assert verdicts.at_equal_retention("original", 1)[1] == 0
    assert verdicts.point("flow", 1)["unmentioned"].sum() == 450 + 36


def test_an_arm_ahead_on_every_seed_is_ahead(records, monkeypatch):
    for seed in verdicts.SEEDS:
        records("flow", seed, pace=1 + 0.01 * seed)
        records("flow-uniform", seed, pace=0.2)
    claim = next(c for c in verdicts.CLAIMS if c.behind == ("flow-uniform",))
    monkeypatch.setattr(verdicts, "CLAIMS", (claim,))
    for equal in (False, True):
        [one] = verdicts.judge(equal)
        assert one["verdict"] == "holds" and one["effect"] > 1.5 and one["p"] < 1e-3
    records("flow-uniform", 3, pace=0.2)
    (verdicts.RECORDS / "flow-uniform-3.json").unlink()
    forget()
    assert verdicts.judge(False) == [None] and verdicts.said(None) == "not run yet"


def test_drawings_stand_in_the_order_of_the_length_of_stage_1(records, tmp_path):
    lengths = [100, 200, 400, 800, 1400, 2800]
    for steps in lengths:
        arm = "flow" if steps == 800 else f"flow-stage1-{steps}"
        records(arm, 1, pace=1)
        file = tmp_path / f"{arm}-1.json"
        drawn = {"drawings": {"loss": steps, "pairs": {"Average": 20.0}}}
        file.write_text(json.dumps(json.loads(file.read_text()) | drawn))
    lines = verdicts.details(12, verdicts.CLAIMS[11])
    rows = [line for line in lines if "20.0" in line]
    assert [float(row.split("|")[2]) for row in rows] == lengths


# -- the table of arms and the document ----------------------------------------------------------
def test_a_claim_in_a_notebook(records, capsys):
    """In words and as bars: what was run of it, and that the rest was not."""
    pytest.importorskip("matplotlib").use("Agg")
    import claim_figure

    for seed in verdicts.SEEDS:
        records("flow", seed, pace=1)
        records("flow-uniform", seed, pace=0.2)
    number = 1 + [c.behind for c in verdicts.CLAIMS].index(("flow-uniform",))
    claim_figure.tell(number)
    said = capsys.readouterr().out
    assert "as trained: holds +3.2" in said and "at equal retention: holds" in said
    assert re.search(r"flow-uniform +\+0.8 points, 5 seeds: .*--time_distribution uniform", said)
    assert re.search(r"flow-scale5 +not run yet", said)
    assert claim_figure.verdict_of(number) == ("holds", "holds")
    claim_figure.draw(number)
    axis = claim_figure.plt.gcf().axes[0]
    widths = {round(bar.get_width(), 1) for bar in axis.patches}
    assert {4.0, 0.8} <= widths and len(axis.patches) == 4
    assert len([t for t in axis.texts if t.get_text() == "not run yet"]) == 4
    claim_figure.plt.close("all")


def test_equal_retention_is_never_read_on_a_line_from_the_original():
    """Loss bends: of every record the weakest strength has lost less than what is read at."""
    before = json.loads((ablations.RECORDS / "original.json").read_text())["subject"]
    records = sorted(ablations.RECORDS.glob("*-[1-5].json"))
    assert len(records) >= 60
    for file in records:
        weakest = json.loads(file.read_text())["strengths"][0]
        assert before - weakest["subject"] < verdicts.LOST, file.name


def test_claims_name_arms_that_there_are():
    assert len(verdicts.CLAIMS) == 12
    for claim in verdicts.CLAIMS:
        named = {*claim.ahead, *claim.behind, *claim.shown} - {"original"}
        assert named <= ablations.ARMS.keys() and len(claim.ahead) == len(claim.behind)
    used = {a for c in verdicts.CLAIMS for a in (*c.ahead, *c.behind, *c.shown)}
    assert used >= ablations.ARMS.keys(), "no arm is run for nothing"


def test_every_arm_is_a_command_line_of_train():
    import shlex

    from settings import Settings
    from util.cli import parse_settings

    for name, arm in ablations.ARMS.items():
        parsed = parse_settings(
            Settings, "", "", shlex.split(arm.flags), decides=("preset", "denoiser")
        )
        assert parsed.preset == "toy", name
        assert set(filter(None, arm.stage1.split(","))) <= ablations.ARMS.keys()
        if arm.steps:
            assert all(step % parsed.save_every == 0 for step in arm.steps)
            assert parsed.stage2_steps / parsed.save_every <= parsed.keep


def test_evidence_is_what_the_script_makes():
    assert (ROOT / "docs" / "EVIDENCE.md").read_text(encoding="utf-8") == verdicts.document()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == verdicts.refreshed(readme) and "<!-- verdicts -->" in readme
