"""training/blend.py: the dial after training, and what it refuses; benchmarks/strength.py."""

import json
import re
import shutil
import subprocess
import sys

import open_clip
import pytest
import torch
from conftest import ROOT, TINY_CLIP
from safetensors.torch import load_file, save_file
from test_enhanced import execute
from test_wrong_input import command
from tiny_runs import equal, train_here

from evaluation.encoder import load_encoders
from evaluation.scoring import score
from pretrained.backbones import load_clip
from toy import benchmark
from toy.world import TOY_DIR
from training.blend import CARD, CONFIG, FILES, MARK, WEIGHTS, blend, check_weights
from util import files

sys.path.insert(0, str(ROOT / "benchmarks"))
import strength  # noqa: E402
import toy_seeds  # noqa: E402

TOY = TOY_DIR / "clip.safetensors"
BLEND = "training/blend.py "


@pytest.fixture(scope="module")
def world(straight, tmp_path_factory):
    """A run with adapters, one without, and all that can be wrong with a model."""
    here = tmp_path_factory.mktemp("world")
    runs = here / "runs"
    shutil.copytree(straight, runs / "lora")
    flags = ("--stage", 2, "--stage1_from", straight, "--tuning", "direct", "--seed", 0)
    done = train_here(runs, "direct", *flags)
    assert done.returncode == 0, done.stdout
    original, _ = load_clip(str(TOY))
    for name in ("twin", "shaken", "deaf"):  # the toy's CLIP elsewhere, and others of its kind
        state = {k: v.clone() for k, v in original.state_dict().items()}
        if name != "twin":
            state["visual.proj" if name == "shaken" else "text_projection"] += 0.1
        save_file(state, here / f"{name}.safetensors")
        shutil.copy(TOY.with_suffix(".json"), here / f"{name}.json")
    for name in ("twin", "shaken"):  # runs that began there
        run = runs / f"from_{name}"
        shutil.copytree(runs / "lora" / "enhanced", run / "enhanced")
        about = json.loads((runs / "lora" / "config.json").read_text())
        for stage in about["stages"].values():
            stage["settings"]["clip"] = str(here / f"{name}.safetensors")
        (run / "config.json").write_text(json.dumps(about))
    spoil(here, runs / "lora" / "enhanced")
    (here / "file").write_text("a file where a folder should be")
    (here / "empty").mkdir()
    (here / "begun").mkdir()
    shutil.copy(runs / "lora" / "config.json", here / "begun")
    return {"here": here, "runs": runs, "toy": TOY_DIR, "lora": runs / "lora"}


def spoil(here, good):
    """Copies of an enhanced model outside of any run, each with one thing wrong, but "alone"."""
    state = load_file(good / WEIGHTS)
    first = next(iter(state))
    wrong = {
        "alone": state,
        "bare": {k: v for k, v in state.items() if k != first},
        "more": {**state, "visual.more": torch.zeros(1)},
        "wide": {**state, "visual.proj": torch.zeros(1, 64)},  # would broadcast
        "nan": {**state, "visual.proj": torch.full_like(state["visual.proj"], torch.nan)},
        "other": open_clip.CLIP(**TINY_CLIP).state_dict(),
    }
    for name, tensors in wrong.items():
        shutil.copytree(good, here / name)
        save_file(tensors, here / name / WEIGHTS)
    about = json.loads((good / CONFIG).read_text())
    (here / "other" / CONFIG).write_text(json.dumps({**about, "model_cfg": TINY_CLIP}))
    for name in ("cut", "weightless", "garbled"):
        shutil.copytree(good, here / name)
    (here / "garbled" / CONFIG).write_text("{")
    (here / "cut" / WEIGHTS).write_bytes((good / WEIGHTS).read_bytes()[:5000])
    (here / "weightless" / WEIGHTS).unlink()


def mix(world, tmp_path, line):
    """Blend by the command. Returns: the tensors written."""
    code, text = command(f"{BLEND}{line} --out {tmp_path / 'out'}", world)
    assert code == 0, text
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*FILES}
    return load_file(tmp_path / "out" / WEIGHTS)


def original_tensors():
    """θ0 as every run has it: its file holds float16, towers work in float32."""
    return load_clip(str(TOY))[0].state_dict()


def tensors_of(world, name):
    return load_file(world["runs"] / name / "enhanced" / WEIGHTS)


def same_bits(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k].view(torch.int32), b[k].view(torch.int32)) for k in a
    )


def furthest(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


# -- the arithmetic ------------------------------------------------------------------------------
@pytest.mark.parametrize("run", ["lora", "direct"])
def test_0_is_the_original_and_1_the_enhanced_model(world, tmp_path, run):
    original = original_tensors()
    enhanced = tensors_of(world, run)
    assert furthest(original, enhanced) > 1e-5, "the run has changed something"
    assert same_bits(mix(world, tmp_path, f"{{runs}}/{run} --weights 0"), original)
    assert same_bits(mix(world, tmp_path, f"{{runs}}/{run}/enhanced --weights 1"), enhanced)
    assert same_bits(mix(world, tmp_path, f"{{runs}}/{run}"), enhanced), "the default of one"


def test_half_and_twice(world, tmp_path):
    start, end = original_tensors(), tensors_of(world, "direct")
    for weight in (0.5, 2):
        found = mix(world, tmp_path, f"{{runs}}/direct --weights {weight}")
        assert furthest(found, {k: start[k] + weight * (end[k] - start[k]) for k in end}) < 1e-6
        assert furthest(found, end) > 1e-5 and furthest(found, start) > 1e-5


def test_the_default_of_two_is_their_mean_and_weights_add_up(world, tmp_path):
    start, a, b = original_tensors(), tensors_of(world, "lora"), tensors_of(world, "direct")
    found = mix(world, tmp_path, "{runs}/lora {runs}/direct")
    assert furthest(found, {k: (a[k] + b[k]) / 2 for k in a}) < 1e-6
    found = mix(world, tmp_path, "{runs}/lora {runs}/direct --weights 0.7,0.4")
    by_hand = {k: start[k] + 0.7 * (a[k] - start[k]) + 0.4 * (b[k] - start[k]) for k in a}
    assert furthest(found, by_hand) < 1e-6
    assert all(torch.equal(found[k], start[k]) for k in start if not k.startswith("visual."))


def test_the_type_of_the_enhanced_file_is_kept_and_no_bit_is_lost():
    torch.manual_seed(0)
    start = {"visual.x": torch.randn(999) * 10.0 ** torch.randint(-6, 2, (999,))}
    start["visual.x"][0] = -0.0
    before = start["visual.x"].clone()
    end = {"visual.x": torch.randn(999)}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        there = {k: v.to(dtype) for k, v in end.items()}
        whole = blend(start, [there], [1])["visual.x"]
        assert whole.dtype == dtype and torch.equal(whole, there["visual.x"])
        none = blend(start, [there], [0])["visual.x"]
        assert torch.equal(none, before.to(dtype)) and torch.signbit(none[0])
    # In float32 this step would be lost: 1 + 1e-8 is 1.
    one, near = {"visual.x": torch.ones(1).double()}, {"visual.x": torch.ones(1).double() + 1e-8}
    assert float(blend(one, [near], [2])["visual.x"] - 1) == pytest.approx(2e-8)
    assert same_bits(start, {"visual.x": before}), "what goes in stays as it is"


def test_what_the_arithmetic_refuses():
    a, wide = {"visual.x": torch.zeros(2)}, {"visual.x": torch.zeros(1)}
    with pytest.raises(ValueError, match="2 weights for 1 models"):
        blend(a, [a], [1, 1])
    with pytest.raises(ValueError, match=r"model 2 does not fit .* visual.x is \(1,\), there \(2,"):
        blend(a, [a, wide], [1, 1])
    with pytest.raises(ValueError, match="B does not fit .* visual.x is absent"):
        blend(a, [a, {}], [1, 1], names=["A", "B"])
    with pytest.raises(ValueError, match="not finite in the sum"):
        blend(a, [{"visual.x": torch.full((2,), 60_000.0).half()}], [2])
    for weight in (float("nan"), float("inf"), -0.1, 2.1):
        with pytest.raises(ValueError, match="must be a number from 0 to 2"):
            check_weights([weight], 1)


# -- what is written -----------------------------------------------------------------------------
def test_everybody_loads_it(world, tmp_path, monkeypatch):
    """open_clip, both judges and the export, and the judges say of it what they say of a model."""
    monkeypatch.setattr(benchmark, "PROBE_TRAIN", 60)
    monkeypatch.setattr(benchmark, "PROBE_TEST", 30)
    tensors, out = mix(world, tmp_path, "{runs}/lora {runs}/direct"), tmp_path / "out"
    clip, _ = open_clip.create_model_from_pretrained(f"local-dir:{out}")
    assert same_bits(clip.state_dict(), tensors)
    [encoder] = load_encoders([str(out)], progress=False)
    assert same_bits(encoder.clip.state_dict(), tensors) and encoder.info.words
    benchmark.write_classes(tmp_path / "classes", count=40)
    for line, words in (
        (f"eval_mmvp.py --model {{toy}}/clip.safetensors --model {out} --pairs 2", "Average"),
        (f"eval_zeroshot.py --model {out} --classify {tmp_path}/classes", "top-1"),
        (f"export_hf.py --model {out} --out {tmp_path}/hf", "CLIPModel"),
    ):
        own = f" --cache none --out {tmp_path}/results" if line.startswith("eval") else ""
        code, text = command(line + own, world)
        assert code == 0 and words in text, text
    assert "out, converted for transformers" in (tmp_path / "hf" / CARD).read_text()


def test_the_card_says_what_and_how_much_and_its_code_runs(world, tmp_path, monkeypatch):
    mix(world, tmp_path, "{runs}/lora {runs}/direct/enhanced --weights 0.25,1.5")
    card = (tmp_path / "out" / CARD).read_text()
    assert "| lora | 0.25 |\n| direct | 1.5 |" in card and "Base: `clip.safetensors`" in card
    assert "licence" in card and MARK in card
    assert str(ROOT) not in card and str(tmp_path.parent) not in card
    assert not re.search(r"(?<![\w.`/])/\w+/", card), "an absolute path"
    assert execute(tmp_path / "out", monkeypatch)["features"].shape == (1, 64)


def test_what_counts_is_what_the_original_holds_not_its_name(world, tmp_path):
    """One of two runs was trained beside a copy of the toy's CLIP, and a model lies in no run."""
    found = mix(world, tmp_path, "{runs}/direct {runs}/from_twin")
    assert same_bits(found, mix(world, tmp_path, "{runs}/direct {runs}/lora"))
    line = "{here}/alone --weights 0 --original {here}/twin.safetensors"
    assert same_bits(mix(world, tmp_path, line), original_tensors())


# -- wrong input ---------------------------------------------------------------------------------
TABLE = [
    ("{here}/nowhere", "nowhere is no folder: give a run"),
    ("{here}/file", "file is no folder"),
    ("{here}/empty", "holds no enhanced model"),
    ("{here}/begun", "writes at the end of stage 2"),
    ("{here}/weightless", "open_clip_model.safetensors is missing"),
    ("{lora} {here}/cut --original {toy}/clip.safetensors", "no whole safetensors file"),
    ("{lora} {here}/garbled --original {toy}/clip.safetensors", "describes no model"),
    ("{lora} {lora}/enhanced", "the same model is named twice"),
    ("{lora} --weights 0.5,0.5", "2 weights for 1 models"),
    ("{lora} {runs}/direct --weights 1", "1 weights for 2 models"),
    ("{lora} --weights half", "--weights 'half': give one number a model"),
    ("{lora} --weights nan", "weight nan: must be a number from 0 to 2"),
    ("{lora} --weights inf", "weight inf: must be a number from 0 to 2"),
    ("{lora} --weights 2.01", "weight 2.01: must be a number from 0 to 2"),
    ("{lora} --weights=-0.1", "weight -0.1: must be a number from 0 to 2"),
    ("{lora} --wieghts 1", "did you mean --weights?"),
    ("{here}/alone", "name that CLIP with --original"),
    ("{lora} --original {here}/gone.safetensors", "the original cannot be loaded"),
    ("{lora} --original {here}/deaf.safetensors", "text_projection is not the original's"),
    ("{lora} {runs}/from_shaken", "were made of different originals"),
    ("{lora} {here}/other --original {toy}/clip.safetensors", "another architecture than"),
    ("{here}/other --original {toy}/clip.safetensors", "architecture than the original"),
    ("{here}/bare --original {toy}/clip.safetensors", "does not fit the original"),
    ("{here}/more --original {toy}/clip.safetensors", "visual.more is (1,), there absent"),
    ("{here}/wide --original {toy}/clip.safetensors", "visual.proj is (1, 64)"),
    ("{here}/nan --original {toy}/clip.safetensors", "visual.proj is not finite"),
    ("{lora} --out {here}/file", "file is a file; give a folder"),
    ("{lora} --out {here}/file/deeper", "file is a file; give a folder"),
    ("{lora} --out {lora}", "or holds it: give a folder of its own"),
    ("{lora} --out {lora}/enhanced", "or holds it: give a folder of its own"),
    ("{lora} --out {here}", "or holds it: give a folder of its own"),
    ("{lora} --original {toy}/clip.safetensors --out {toy}", "or holds it"),
    ("{lora} --out {runs}/direct/enhanced", "holds something else than a blend"),
]


@pytest.mark.parametrize("line, words", TABLE, ids=range(len(TABLE)))
def test_one_line_exit_2_and_nothing_is_written(world, tmp_path, line, words):
    before = {f: f.stat().st_mtime_ns for f in world["here"].rglob("*")}
    out = "" if "--out" in line else f" --out {tmp_path}/out"
    code, text = command(BLEND + line + out, world)
    assert code == 2 and words in text, text
    said = text.strip().splitlines()
    assert len(said) == 1 and said[0].startswith(
        "blend.py: " if "wieg" not in line else "python -m"
    )
    assert {f: f.stat().st_mtime_ns for f in world["here"].rglob("*")} == before
    assert not list(tmp_path.iterdir())


def test_a_slip_is_answered_before_pytorch_is_loaded():
    code = (
        "import runpy, sys; sys.argv = ['blend.py', 'nowhere', '--out', 'x']\n"
        "try: runpy.run_module('training.blend', run_name='__main__')\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["2", "False"] and "nowhere is no folder" in done.stderr


@pytest.mark.parametrize("victim", FILES)
@pytest.mark.parametrize(
    "error, code, words",
    [(OSError("No space left"), 2, "No space left"), (KeyboardInterrupt(), 130, "is as it was")],
)
def test_a_write_that_fails_leaves_what_was_there(
    world, tmp_path, monkeypatch, victim, error, code, words
):
    """Whichever of the three files it is: never new weights beside the card of the old ones."""
    mix(world, tmp_path, "{lora} --weights 0.5")
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    for name in ("save_tensors", "write_atomically"):

        def write(*arguments, real=getattr(files, name)):
            real(*arguments)
            if victim in [getattr(a, "name", "") for a in arguments]:
                raise error

        monkeypatch.setattr(files, name, write)
    for out in ("out", "new"):
        got, text = command(f"{BLEND}{{lora}} --weights 1.5 --out {tmp_path}/{out}", world)
        assert got == code and words in text
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == before
    assert not (tmp_path / "new").exists()


# -- benchmarks/strength.py ----------------------------------------------------------------------
def test_strengths_are_measured_as_the_judges_do(world):
    """At 0 and 1 the verdicts are those of the models on the disk; n models at strength n are the
    sum of their changes."""
    asked = strength.questions(per_pattern=3, scenes=30)
    start, a, b = original_tensors(), tensors_of(world, "lora"), tensors_of(world, "direct")
    models = [str(TOY), str(world["runs"] / "direct")]
    rows = strength.measure_strengths(start, [b], [0, 1, 2], asked)
    assert [row["strength"] for row in rows] == [row["weight"] for row in rows] == [0, 1, 2]
    for row, encoder in zip(rows, load_encoders(models, progress=False), strict=False):
        for side, told in strength.SIDES.items():
            items = benchmark.pairs(told, 3, seed=0)
            expected = score(encoder, items, benchmark.TEMPLATE)["text-to-image"]
            assert row[side].dtype == bool and (row[side] == expected).all()
        assert row["subject"].shape == (30,) and row["subject"].mean() > 0.8
    cosines = [row["cosine"] for row in rows]
    assert cosines[0] == pytest.approx(1, abs=1e-6) and cosines[2] < cosines[1] < 1 - 1e-6
    [both] = strength.measure_strengths(start, [a, b], [2], asked)
    added = {k: a[k].double() + b[k].double() - start[k].double() for k in a}
    [summed] = strength.measure_strengths(start, [{k: added[k].float() for k in a}], [1], asked)
    assert both["weight"] == 1 and both["cosine"] == pytest.approx(summed["cosine"], abs=1e-6)


def test_the_report_of_strengths(world, monkeypatch):
    """Every run alone, then their average as far as the sum goes; nothing of the machine."""
    small, said = strength.questions(per_pattern=3, scenes=30), {}
    monkeypatch.setattr(strength, "questions", lambda: small)
    monkeypatch.setattr(strength, "STRENGTHS", (0.0, 1.0, 2.0))
    monkeypatch.setattr(strength, "publish", lambda name, lines, about: said.update(about=about))
    runs = [str(world["lora"]), str(world["runs"] / "direct" / "enhanced")]
    monkeypatch.setattr(sys, "argv", ["strength.py", "--run", runs[0], "--run", runs[1]])
    strength.main()
    rows = said["about"]["rows"]
    assert list(rows) == ["lora", "direct", "average of lora and direct"]
    assert [row["strength"] for row in rows["lora"]] == [0, 1, 2]
    both = rows["average of lora and direct"]
    assert [(row["strength"], row["weight"]) for row in both] == [(0, 0), (1, 0.5), (2, 1), (4, 2)]
    assert both[0]["unmentioned"]["change"] == 0 and both[0]["subject"]["hits"] > 24
    assert said["about"]["command"].endswith("--run runs/lora --run runs/direct")
    assert str(ROOT) not in json.dumps(said) and str(world["here"]) not in json.dumps(said)


def test_the_seeds_benchmark_scales_as_the_command_does(world, tmp_path):
    run = shutil.copytree(world["runs"] / "direct", tmp_path / "direct")
    out = toy_seeds.scaled(run, 1.5)
    start, _ = load_clip(str(TOY))
    expected = blend(start.state_dict(), [load_file(run / "enhanced" / WEIGHTS)], [1.5])
    assert out == tmp_path / "direct-times1.5" and equal(load_file(out / WEIGHTS), expected)
    with pytest.raises(ValueError, match="could not be scaled"):
        toy_seeds.scaled(run, 3.0)


def test_runs_that_differ_in_their_seed_are_one_curve():
    def curve(gain):
        found = [{m: {"change": gain * s} for m in strength.MEASURES} for s in (0, 1)]
        return [{"strength": s, "cosine": 1 - s / 50, **found[s]} for s in (0, 1)]

    rows = {"a-seed1": curve(2.0), "b-seed1": curve(9.0), "a-seed2": curve(4.0), "c": curve(1.0)}
    lines = strength.over_seeds(rows)
    assert lines[0] == "**a: each of the 2 seeds alone, mean change**" and len(lines) == 7
    assert lines[-2].startswith("| 1 | +3.0 ± 1.4 | +3.0 ± 1.4 |") and "0.980" in lines[-2]
