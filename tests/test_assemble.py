"""assemble.py: the same model from the same settings, whatever happened before; seeds that mix."""

import itertools

import pytest
import torch

from settings import Settings, preset_of
from training import assemble
from training.process import Process

HERE = Process(0, 1, torch.device("cpu"), False)


@pytest.mark.parametrize("denoiser", ["flow", "perceiver"])
def test_every_rank_builds_the_same(denoiser):
    settings = Settings(**preset_of({"denoiser": denoiser}) | {"denoiser": denoiser})
    _, first = assemble.build_model(settings, HERE)
    torch.manual_seed(12345)  # another process has drawn other numbers before
    torch.rand(100)
    _, second = assemble.build_model(settings, HERE)
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    _, other = assemble.build_model(Settings(**{**vars(settings), "seed": 1}), HERE)
    c = other.state_dict()
    changed = {k.split(".")[0] for k in a if not torch.equal(a[k], c[k])}
    assert "paradigm" in changed and "visual" not in changed
    tokenizer = [k for k in a if k.startswith("paradigm.tokenizer")]
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
