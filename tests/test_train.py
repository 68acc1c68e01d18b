"""train.py end to end at tiny size: what a run leaves behind, resumes bit-equal, ablations."""

import json
import math
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np
import open_clip
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tiny_runs import (
    PERCEIVER,
    TINY,
    assert_another_run,
    equal,
    metrics,
    parts_in,
    tensors,
    train,
    train_here,
)

from evaluation.encoder import find_tokenizer
from pretrained.autoencoders import load_vqgan
from pretrained.backbones import load_clip
from toy import world
from training import checkpoints as ckpt


def test_what_a_run_leaves_behind(straight):
    assert {p.name for p in straight.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "stage1",
        "stage2",
        "samples",
        "enhanced",
    }
    lines = metrics(straight)
    assert [(line["stage"], line["step"]) for line in lines] == [(1, 3), (1, 6), (2, 3), (2, 4)]
    assert {"images", "loss", "loss_per_t_bin", "lr", "gradient_norm"} <= lines[0].keys()
    assert (
        "drift" not in lines[0] and "drift" in lines[-1] and len(lines[0]["loss_per_t_bin"]) == 10
    )
    config = json.loads((straight / "config.json").read_text())
    assert (
        config["stages"]["1"]["settings"]["stage1_steps"] == 6
        and config["stages"]["2"]["versions"]["torch"] == torch.__version__
    )
    grid = Image.open(straight / "samples" / "stage1_step000006.png")
    assert np.asarray(grid).std() > 10
    names = [p.name for p in ckpt.checkpoints_in(straight / "stage1")]
    assert names == ["step_00000004", "step_00000006"], "the newest two are kept"


def test_checkpoints_hold_what_trains_and_nothing_else(straight):
    names = ("denoiser", "project_vector", "project_context")
    assert parts_in(straight, 1) == {f"paradigms.flow.{name}" for name in names}
    assert not any("tokenizer" in n for n in tensors(straight, 1))
    stage2 = tensors(straight, 2)
    assert all(n.startswith("visual.") and n.endswith((".A", ".B", "bias")) for n in stage2)


def test_enhanced_model_loads_everywhere(straight):
    folder = straight / "enhanced"
    ours, _ = load_clip(str(folder))
    theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    original, info = load_clip(str(world.TOY_DIR / "clip.safetensors"))
    images = torch.rand(4, 3, 64, 64)
    assert torch.equal(ours.encode_image(images), theirs.eval().encode_image(images))
    assert not torch.equal(ours.encode_image(images), original.encode_image(images)), (
        "stage 2 changed the tower"
    )
    text = find_tokenizer(info)(["a photo of fish"])
    assert torch.equal(ours.encode_text(text), original.encode_text(text)), (
        "and left the text tower alone"
    )
    assert ours.state_dict().keys() == original.state_dict().keys()
    assert "| 2 | 4 |" in (folder / "README.md").read_text()


def test_stop_and_resume_is_bit_equal(straight, tmp_path):
    """Stage 1 stopped after 4 steps of 6 and stage 2 after 2 of 4, by removing what came later."""
    assert train(tmp_path, "stopped").returncode == 0
    run = tmp_path / "stopped"
    for stage, last in ((1, "step_00000006"), (2, "step_00000004")):
        before = tensors(run, stage)
        shutil.rmtree(run / f"stage{stage}" / last)
        if stage == 1:
            shutil.rmtree(run / "stage2")
        done = train(tmp_path, "stopped")
        assert done.returncode == 0, done.stderr
        assert equal(tensors(run, stage), before)
    for stage in (1, 2):
        assert equal(tensors(run, stage), tensors(straight, stage))
        mine, other = (tensors(r, stage, "moments") for r in (run, straight))
        assert equal(mine, other) and len(mine) == 3 * len(tensors(run, stage))
    assert metrics(run) == metrics(straight)


def test_a_kill_in_mid_run_loses_nothing(straight, tmp_path):
    """SIGKILL as soon as the first checkpoint is there; then the same command again."""
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--runs",
        str(tmp_path),
        "--name",
        "killed",
        *TINY,
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    deadline = time.time() + 120
    while not ckpt.checkpoints_in(tmp_path / "killed" / "stage1") and time.time() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "enhanced").exists()
    assert train(tmp_path, "killed").returncode == 0
    assert all(equal(tensors(tmp_path / "killed", s), tensors(straight, s)) for s in (1, 2))
    assert metrics(tmp_path / "killed") == metrics(straight)


def test_stages_one_by_one_equal_both(straight, tmp_path):
    assert train_here(tmp_path, "s", "--stage", "1").returncode == 0
    assert not (tmp_path / "s" / "stage2").exists()
    assert train_here(tmp_path, "s", "--stage", "2").returncode == 0
    assert all(equal(tensors(tmp_path / "s", stage), tensors(straight, stage)) for stage in (1, 2))


def test_accumulation_and_cache_change_next_to_nothing(straight, tmp_path):
    """The same global batch in four pieces, and without the cache, up to rounding."""
    assert train_here(tmp_path, "a", "--stage", "1", "--micro_batch", "4").returncode == 0
    assert train_here(tmp_path, "b", "--stage", "1", "--cache", "").returncode == 0
    for name in "ab":
        for key, value in tensors(straight, 1).items():
            assert torch.allclose(tensors(tmp_path / name, 1)[key], value, atol=2e-4), (name, key)


ABLATIONS = {
    "all": ["--stage2_trains", "all"],
    "direct": ["--tuning", "direct"],
    "local": ["--local_ratio", "50"],
    "uniform": ["--time_distribution", "uniform"],
    "scale": ["--time_scale", "5"],
    "drift": ["--drift_weight", "0.2"],
    "mean": ["--no-posterior"],
    "blocks": ["--blocks", "2"],
    "init": ["--initialisation", "pytorch"],
    "guidance": ["--guidance"],
    "no bias": ["--lora_bias", "none"],
    "constant": ["--schedule", "constant"],
    "seed": ["--seed", "1"],
}


SHORT = [*TINY, "--stage1_steps", "3", "--stage2_steps", "3"]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The run that every ablation is compared with: the same steps, no flag."""
    runs = tmp_path_factory.mktemp("short")
    assert train_here(runs, "x", tiny=SHORT).returncode == 0
    return runs / "x"


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_flag_changes_the_run(short, tmp_path, name):
    done = train_here(tmp_path, "x", *ABLATIONS[name], tiny=SHORT)
    assert done.returncode == 0, done.stderr
    changed, base = metrics(tmp_path / "x")[-1], metrics(short)[-1]
    assert_another_run(changed, base)


def test_end_to_end_has_no_stage_1(tmp_path):
    done = train_here(tmp_path, "e", "--end_to_end")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "e"
    assert not (run / "stage1").exists()
    names = ("denoiser", "project_vector", "project_context")
    assert parts_in(run, 2) == {"visual", *(f"paradigms.flow.{name}" for name in names)}


def test_stage1_from_another_run(straight, tmp_path):
    done = train_here(tmp_path, "other", "--stage1_from", straight)
    assert done.returncode == 0, done.stderr
    assert equal(tensors(tmp_path / "other", 2), tensors(straight, 2))


# -- the discrete denoiser: what is its own; the loop itself is the same ---------------------------
@pytest.fixture(scope="module")
def perceiver(tmp_path_factory):
    """One undisturbed run of both stages with the discrete denoiser."""
    runs = tmp_path_factory.mktemp("perceiver")
    done = train_here(runs, "straight", tiny=PERCEIVER)
    assert done.returncode == 0, done.stderr
    return runs / "straight"


def test_perceiver_metrics_stand_beside_ln_k(perceiver):
    lines = metrics(perceiver)
    assert [(line["stage"], line["step"]) for line in lines] == [(1, 3), (1, 6), (2, 3), (2, 4)]
    codes = load_vqgan(world.TOY_DIR / "vqgan.safetensors").config.codes
    for line in lines:
        assert line["uniform_guess"] == math.log(codes)
        assert abs(line["loss"] - line["uniform_guess"]) < 1.5 and 0 <= line["accuracy"] <= 1
        for what in ("loss", "accuracy"):
            bins = line[f"{what}_per_mask_ratio_bin"]
            assert len(bins) == 10 and bins[:5] == [None] * 5, "nothing is masked less than half"
            assert any(b is not None for b in bins[5:])
    assert "drift" in lines[-1]


def test_perceiver_checkpoints_samples_and_enhanced_model(perceiver):
    names = ("denoiser", "project_context")
    assert parts_in(perceiver, 1) == {f"paradigms.perceiver.{name}" for name in names}
    assert all(n.startswith("visual.") for n in tensors(perceiver, 2))
    grid = np.asarray(Image.open(perceiver / "samples" / "stage2_step000004.png"))
    assert grid.std() > 10 and grid.shape[0] > 5 * 96, "five rows"
    ours, _ = load_clip(str(perceiver / "enhanced"))
    assert ours.encode_image(torch.rand(1, 3, 64, 64)).shape == (1, 64)


def test_perceiver_resume_is_bit_equal(perceiver, tmp_path):
    shutil.copytree(perceiver, tmp_path / "stopped")
    run = tmp_path / "stopped"
    for stage, last in ((1, "step_00000006"), (2, "step_00000004")):
        shutil.rmtree(run / f"stage{stage}" / last)
        if stage == 1:
            shutil.rmtree(run / "stage2")
        done = train_here(tmp_path, "stopped", tiny=PERCEIVER)
        assert done.returncode == 0, done.stderr
        assert equal(tensors(run, stage), tensors(perceiver, stage))
    assert metrics(run) == metrics(perceiver)


def test_perceiver_accumulation_changes_next_to_nothing(perceiver, tmp_path):
    """One mask count for all pieces of a step: four of them equal one, up to rounding."""
    done = train_here(tmp_path, "a", "--stage", "1", "--micro_batch", "4", tiny=PERCEIVER)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "a")[0]["loss"] == pytest.approx(
        metrics(perceiver)[0]["loss"], abs=1e-5
    )
    for key, value in tensors(perceiver, 1).items():
        assert torch.allclose(tensors(tmp_path / "a", 1)[key], value, atol=2e-4), key


PERCEIVER_ABLATIONS = {
    "all": "--stage2_trains all",
    "direct": "--tuning direct",
    "local": "--local_ratio 50",
    "drift": "--drift_weight 0.5",
    "fixed ratio": "--mask_from 0.75 --mask_to 0.75",
    "layers": "--layers 4",
    "learnt latents": "--learnt_latents 8",
    "seed": "--seed 1",
}


SHORT_PERCEIVER = [*PERCEIVER, "--stage1_steps", "3", "--stage2_steps", "3"]


@pytest.fixture(scope="module")
def short_perceiver(tmp_path_factory):
    """The run that every ablation is compared with: the same steps, no flag."""
    runs = tmp_path_factory.mktemp("short")
    assert train_here(runs, "x", tiny=SHORT_PERCEIVER).returncode == 0
    return runs / "x"


@pytest.mark.parametrize("name", PERCEIVER_ABLATIONS)
def test_every_perceiver_ablation_changes_the_run(short_perceiver, tmp_path, name):
    done = train_here(tmp_path, "x", *shlex.split(PERCEIVER_ABLATIONS[name]), tiny=SHORT_PERCEIVER)
    assert done.returncode == 0, done.stderr
    changed, base = metrics(tmp_path / "x")[-1], metrics(short_perceiver)[-1]
    assert_another_run(changed, base)
    if name == "fixed ratio":
        bins = changed["loss_per_mask_ratio_bin"]
        assert [i for i, b in enumerate(bins) if b is not None] == [7]


def test_perceiver_end_to_end(tmp_path):
    done = train_here(tmp_path, "e", "--end_to_end", tiny=PERCEIVER)
    assert done.returncode == 0, done.stderr
    names = ("denoiser", "project_context")
    found = parts_in(tmp_path / "e", 2)
    assert found == {"visual", *(f"paradigms.perceiver.{name}" for name in names)}


def test_the_two_denoisers_do_not_share_a_run(straight, perceiver):
    """Neither a run of the other kind nor its stage 1 is taken for one's own."""
    done = train_here(straight.parent, "straight", tiny=PERCEIVER)
    assert done.returncode == 2 and "in its settings (denoiser: flow → perceiver" in done.stderr
    done = train_here(
        straight.parent, "x", "--stage", "2", "--stage1_from", straight, tiny=PERCEIVER
    )
    assert done.returncode == 2 and "had other settings (denoiser: flow → perceiver" in done.stderr
