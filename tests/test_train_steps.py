"""train_steps: the loop of train.py in memory, on the same step; metrics as columns."""

import pytest
import torch
from tiny_runs import COMMON, TINY, metrics, tensors, train_here

from settings import Settings
from toy.world import ToyScenes
from train import train_steps
from training.assemble import build_model, seed_of
from training.runlog import read_metrics, trim_metrics

SMALL = {"width": 32, "heads": 2, "batch": 16, "micro_batch": 16, "warmup": 2, "lora_rank": 4}
FLOW = {**SMALL, "rope_axes": "4,6,6", "vector_dim": 12, "context_dim": 20}
DISCRETE = {**SMALL, "denoiser": "perceiver", "layers": 2}


def test_it_is_the_same_training(straight):
    """Both stages in memory, with the settings of a run on the disk: its very weights."""
    settings = Settings.of("toy", **FLOW, stage1_steps=6, stage2_steps=4)
    _, model = build_model(settings)
    scenes = ToyScenes(48, seed=seed_of("toy scenes", 0))
    for stage, steps in ((1, 6), (2, 4)):
        found = list(train_steps(model, scenes, steps, stage, settings))
        own = {n: p for n, p in model.named_parameters() if p.requires_grad}
        theirs = tensors(straight, stage)
        assert own.keys() == theirs.keys()
        # (close: train.py caches what the frozen parts make of images, in other batches)
        assert all(torch.allclose(own[k], theirs[k], atol=1e-4) for k in own)
        lines = [line for line in metrics(straight) if line["stage"] == stage]
        mean = sum(m["loss"] for m in found[:3]) / 3
        assert abs(mean - lines[0]["loss"]) < 1e-3


@pytest.mark.parametrize("given", [FLOW, DISCRETE], ids=["flow", "perceiver"])
def test_what_each_step_says(given):
    settings = Settings.of("toy", **given)
    _, model = build_model(settings)
    name = settings.denoiser
    for stage in (1, 2):
        for metric in train_steps(model, ToyScenes(32, seed=1), 2, stage, settings):
            assert metric["loss"] > 0 and metric["gradient_norm"] > 0 and metric["lr"] > 0
            assert metric["per_image"].shape == metric[f"{name}.level"].shape == (16,)
            assert ("drift" in metric) == (stage == 2)
            assert (f"{name}.accuracy" in metric) == (given is DISCRETE)


def test_the_toys_settings_are_the_default():
    _, model = build_model(Settings.of("toy", denoiser="perceiver"))
    first = next(train_steps(model, ToyScenes(32, seed=1), 1))
    assert len(first["per_image"]) == 16 and abs(first["lr"] - 1.5e-3 / 50) < 1e-9


def test_columns(straight, tmp_path):
    columns = read_metrics(straight)
    assert columns["stage"] == [1, 1, 2, 2] and columns["step"] == [3, 6, 3, 4]
    assert columns["drift"][0] is None and columns["drift"][-1] > 0
    assert {len(column) for column in columns.values()} == {4}
    second = read_metrics(str(straight), stage=2)
    assert second["loss"] == columns["loss"][2:]
    with pytest.raises(FileNotFoundError, match="no metrics.jsonl"):
        read_metrics(tmp_path)


def test_a_flipped_line_end_is_damage(tmp_path, capsys):
    """To Python's splitlines a vertical tab ends a line, too. Whatever is put aside stays there."""
    (tmp_path / "config.json").write_text("{}")
    file, lines = tmp_path / "metrics.jsonl", [f'{{"stage": 1, "step": {n}}}' for n in range(4)]
    for first in ("\x0b", "\x85"):
        file.write_text(lines[0] + first + "\n".join(lines[1:]) + '\n{"stage": 1, "st')
        with pytest.raises(ValueError, match="not every line is one of train.py's .1 are not"):
            read_metrics(tmp_path)
        trim_metrics(file, 1, 2, {})
        assert read_metrics(tmp_path)["step"] == [2]
        assert "1 damaged line(s) were put aside" in capsys.readouterr().err
    aside = (tmp_path / "metrics.damaged.jsonl").read_text()
    assert aside == f"{lines[0]}\x0b{lines[1]}\n{lines[0]}\x85{lines[1]}\n"


def test_tensorboard_mirrors_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = train_here(tmp_path, "t", "--stage", "1", "--tensorboard")
    assert done.returncode == 0, done.stdout
    events = EventAccumulator(str(tmp_path / "t" / "tensorboard" / "stage1")).Reload()
    points = events.Scalars("loss")
    assert [point.step for point in points] == [3, 6]
    columns = read_metrics(tmp_path / "t")
    assert [p.value for p in points] == pytest.approx(columns["loss"])
    assert "lr" in events.Tags()["scalars"]


def test_tiny_flags_and_small_settings_agree():
    """This file's settings are those of the tiny runs that it compares with."""
    flags = dict(zip((n[2:] for n in TINY[::2]), TINY[1::2], strict=True))
    assert all(str(value) == flags[name] for name, value in FLOW.items())
    assert all(name in COMMON for name in ("--toy_images", "--stage1_steps"))
