"""assemble.py: the same model from the same settings, whatever happened before; seeds that mix."""

import itertools
import re

import pytest
import torch

from evaluation.reconstruction import reconstruct
from pretrained.backbones import load_clip
from settings import Settings
from toy.world import TOY_DIR
from training import assemble
from training.process import Process

HERE = Process(0, 1, torch.device("cpu"), False)


@pytest.mark.parametrize("denoiser", ["flow", "perceiver"])
def test_every_rank_builds_the_same(denoiser):
    settings = Settings.of("toy", denoiser=denoiser)
    _, first = assemble.build_model(settings, HERE)
    torch.manual_seed(12345)  # another process has drawn other numbers before
    torch.rand(100)
    _, second = assemble.build_model(settings, HERE)
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    _, other = assemble.build_model(Settings(**{**vars(settings), "seed": 1}), HERE)
    c = other.state_dict()
    changed = {k.split(".")[0] for k in a if not torch.equal(a[k], c[k])}
    assert "paradigms" in changed and "visual" not in changed
    tokenizer = [k for k in a if k.startswith(f"paradigms.{denoiser}.tokenizer")]
    assert tokenizer and all(torch.equal(a[k], c[k]) for k in tokenizer)


def test_seeds_are_repeatable_and_far_apart():
    seeds = {
        assemble.seed_of(purpose, s, *more)
        for purpose in assemble.PURPOSES
        for s in range(5)
        # NumPy pads with zeros: (s,), (s, 0) and (s, 0, 0) must differ all the same
        for more in [(), *itertools.product(range(4)), *itertools.product(range(4), range(9))]
    }
    assert len(seeds) == len(assemble.PURPOSES) * 5 * (1 + 4 + 36)
    assert all(0 <= s < 2**62 for s in seeds)
    assert assemble.seed_of("LoRA", 2, 3) == assemble.seed_of("LoRA", 2, 3)
    with pytest.raises(ValueError):
        assemble.seed_of("lora", 2)


def test_a_run_in_one_call(straight):
    """CLIP and the module as each stage left them; what stage 2 wrote is what comes back."""
    images = torch.rand(3, 3, 64, 64)
    clip, model = assemble.load_run(straight, stage=1)
    before, enhanced = load_clip(str(TOY_DIR / "clip.safetensors"))[0], straight / "enhanced"
    # (close, not equal: PyTorch picks its kernels by who requires a gradient)
    assert torch.allclose(clip.encode_image(images), before.encode_image(images), atol=1e-5)
    assert not model.training and not model.tower_learns
    clip, model = assemble.load_run(str(straight))
    after = load_clip(str(enhanced))[0].encode_image(images)
    assert torch.allclose(clip.encode_image(images), after, atol=1e-5)
    assert not torch.allclose(after, before.encode_image(images), atol=1e-4)
    features = model.original_features(images)
    assert torch.allclose(features, before.encode_image((images - 0.5) / 0.25), atol=1e-5)
    assert {*reconstruct(model, images)} > {"original"}


def test_no_run_and_no_stage_are_named(straight, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no run"):
        assemble.load_run(tmp_path)
    (tmp_path / "config.json").write_text((straight / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*stage1"):
        assemble.load_run(tmp_path, 1)


@pytest.mark.parametrize("denoiser", ["flow", "perceiver"])
@pytest.mark.parametrize("stage", [1, 2])
def test_the_shipped_runs_load_and_name_no_machine(denoiser, stage):
    run = TOY_DIR / "runs" / denoiser
    _, model = assemble.load_run(run, stage)
    assert model.tower_learns == (stage == 2) and not model.training
    for file in run.rglob("*.json"):
        assert not re.search(r"/(home|tmp|work|root)/", file.read_text())


def test_toy_scenes_are_for_a_clip_of_their_size(tmp_path):
    """Found before any weight is read; the cache's limit counts scenes as well as photographs."""
    torch.save({}, tmp_path / "w.pt")
    large = Settings.of("toy", clip=f"ViT-B-32-quickgelu:{tmp_path / 'w.pt'}")
    with pytest.raises(ValueError, match="toy scenes have 64 px, .* looks at 224: give --data"):
        assemble.find_data(large, HERE)
    with pytest.raises(ValueError, match="--cache memory would hold 60000 images of 64 px"):
        assemble.find_data(Settings.of("toy", toy_images=60_000), HERE)
