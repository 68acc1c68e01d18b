"""The two paradigms of paradigms.py: what each draws, hides, asks for and shows."""

import dataclasses

import pytest
import torch
from conftest import TINY_DENOISER, TINY_PERCEIVER

from flow_denoiser import FlowDenoiser
from paradigms import Continuous, Discrete
from perceiver_denoiser import PerceiverDenoiser, split_positions


@pytest.fixture
def discrete(tiny_vqgan):
    torch.manual_seed(0)
    return Discrete(tiny_vqgan, PerceiverDenoiser(TINY_PERCEIVER), 32)


@pytest.fixture
def continuous(tiny_vae):
    torch.manual_seed(0)
    return Continuous(tiny_vae, FlowDenoiser(TINY_DENOISER), 32)


def generators(*seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


def images(n=3):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_masks_belong_to_images_and_their_number_to_the_batch(discrete):
    whole = discrete.draw(generators(0, 1, 2), *generators(9))
    piece = discrete.draw(generators(2), *generators(9))
    assert torch.equal(piece["order"][0], whole["order"][2]), "whichever batch it lands in"
    assert int(piece["count"]) == int(whole["count"]), "the same M in every piece of a step"
    assert not torch.equal(whole["order"][0], whole["order"][1])
    counts = {int(discrete.draw(generators(0), *generators(s))["count"]) for s in range(200)}
    assert counts == set(range(8, 15)), "round(r·16), r from 0.5 to 0.9: 8 to 14, each"


def test_no_masked_index_reaches_the_logits_through_the_paradigm(discrete):
    """Labels change with them, logits do not: bit-equal."""
    seen = []
    discrete.denoiser.head.register_forward_hook(lambda m, args, out: seen.append(out))
    draws = discrete.draw(generators(0, 1, 2), *generators(9))
    tokens = discrete.tokenize(images())
    context = torch.randn(3, 1, 32)
    before = discrete.losses(discrete.hide(tokens, draws), context, None)
    _, masked = split_positions(draws["order"], int(draws["count"]))
    indices = tokens["indices"]
    changed = indices.scatter(1, masked, (indices.gather(1, masked) + 5) % 24)
    after = discrete.losses(discrete.hide({"indices": changed}, draws), context, None)
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(before["per_image"], after["per_image"])
    assert before["level"].tolist() == [int(draws["count"]) / 16] * 3


def test_codes_are_brought_to_unit_scale(discrete):
    """Whatever scale a published codebook has; and still rows of it, told apart by index."""
    with torch.no_grad():
        discrete.tokenizer.codebook.mul_(1e-3).add_(0.5)
    every = discrete.codes(torch.arange(24)[None])[0]  # (K, E)
    assert abs(float(every.mean())) < 1e-4 and abs(float(every.std()) - 1) < 1e-4
    assert len(torch.unique(every, dim=0)) == 24


def test_continuous_draws_belong_to_images(continuous):
    whole = continuous.draw(generators(0, 1, 2), *generators(9))
    piece = continuous.draw(generators(2), *generators(5))
    for name in ("t", "noise", "posterior"):
        assert torch.equal(piece[name][0], whole[name][2])
    assert whole["noise"].shape == (3, 4, 4, 4) and whole["t"].shape == (3,)


def test_tokens_by_name(continuous, discrete):
    tokens = continuous.tokenize(images())
    mean, log_variance = continuous.tokenizer.moments(images() * 2 - 1)
    assert torch.equal(tokens["mean"], mean) and torch.equal(tokens["log_variance"], log_variance)
    expected = discrete.tokenizer.indices(images() * 2 - 1)
    assert torch.equal(discrete.tokenize(images())["indices"], expected)


def test_parts_that_do_not_fit(tiny_vae, tiny_vqgan):
    flow = dataclasses.replace(TINY_DENOISER, latent_channels=16)
    with pytest.raises(ValueError, match="4 latent channels, the denoiser wants 16"):
        Continuous(tiny_vae, FlowDenoiser(flow), 32)
    with pytest.raises(ValueError, match="no multiple of a token's 16"):
        Continuous(tiny_vae, FlowDenoiser(TINY_DENOISER), 40)
    with pytest.raises(ValueError, match="'normal': 'logit-normal' or 'uniform'"):
        Continuous(tiny_vae, FlowDenoiser(TINY_DENOISER), 32, times=("normal", 1.0))
    perceiver = dataclasses.replace(TINY_PERCEIVER, codes=99)
    with pytest.raises(ValueError, match="24 codes of width 6, the denoiser wants 99"):
        Discrete(tiny_vqgan, PerceiverDenoiser(perceiver), 32)
    with pytest.raises(ValueError, match="no grid of 4 × 4 tokens of 8 px"):
        Discrete(tiny_vqgan, PerceiverDenoiser(TINY_PERCEIVER), 64)
    with pytest.raises(ValueError, match="expected 0 < from"):
        Discrete(tiny_vqgan, PerceiverDenoiser(TINY_PERCEIVER), 32, mask_range=(0.0, 0.9))
