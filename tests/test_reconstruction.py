"""reconstruction.py: what the denoiser draws, from what, and what the pictures are called."""

import pytest
import torch

from evaluation.reconstruction import kept, psnr, reconstruct
from perceiver_denoiser import split_positions

BOTH = pytest.mark.parametrize("denoiser", ["flow", "perceiver"])


def images(count=3):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@BOTH
def test_rows_are_pictures_with_a_label(make_genhancer, denoiser):
    rows = reconstruct(make_genhancer(denoiser), images())
    more = set() if denoiser == "flow" else {"visible", "completed"}
    assert rows.keys() == {"original", "kept", "drawn"} | more
    assert torch.equal(rows["original"].pictures, images())
    for pictures, label in rows.values():
        assert pictures.shape == (3, 3, 32, 32) and pictures.min() >= 0 and pictures.max() <= 1
        assert label
    assert "[CLS] alone" in rows["drawn"].label


@BOTH
def test_the_label_says_what_the_condition_was(make_genhancer, denoiser):
    model = make_genhancer(denoiser, local_ratio=50)
    label = reconstruct(model, images())["drawn"].label
    assert "[CLS] and 50 % of the patch tokens" in label and "alone" not in label
    other = model.encode(images())[0].roll(1, 0)
    assert "a [CLS] of your choice" in reconstruct(model, images(), condition=other)["drawn"].label


@BOTH
def test_a_condition_of_ones_choice(make_genhancer, denoiser):
    """The images' own gives the same pictures, another gives others."""
    model = make_genhancer(denoiser)
    if denoiser == "perceiver":  # untrained, its logits are nearly equal whatever it is told
        torch.nn.init.normal_(model.paradigm.denoiser.head.weight, std=30)
    usual = reconstruct(model, images())["drawn"].pictures
    own = model.encode(images())[0]
    same = reconstruct(model, images(), condition=own)["drawn"].pictures
    other = reconstruct(model, images(), condition=3 * own.roll(1, 0))["drawn"].pictures
    assert torch.equal(usual, same) and not torch.equal(usual, other)


def test_noise_and_steps_of_the_continuous(make_genhancer):
    model = make_genhancer("flow")
    noise = torch.randn(3, 4, 4, 4)
    first = reconstruct(model, images(), noise=noise)["drawn"].pictures
    assert torch.equal(first, reconstruct(model, images(), seed=9, noise=noise)["drawn"].pictures)
    assert not torch.equal(first, reconstruct(model, images())["drawn"].pictures)
    assert not torch.equal(first, reconstruct(model, images(), noise=noise, steps=3)["drawn"][0])


@BOTH
def test_the_seed_decides(make_genhancer, denoiser):
    model = make_genhancer(denoiser)
    first, again, other = (reconstruct(model, images(), seed)["drawn"][0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_discrete_keeps_what_was_visible(make_genhancer):
    model, decoded = make_genhancer("perceiver"), []
    decode = model.paradigm.tokenizer.decode
    model.paradigm.tokenizer.decode = lambda indices: decoded.append(indices) or decode(indices)
    rows = reconstruct(model, images(), ratio=0.75)
    truth, completed, drawn = decoded
    order = model.draw_from([0, 0, 1, 2], torch.device("cpu"))["order"]
    visible, masked = split_positions(order, 12)
    assert torch.equal(completed.gather(1, visible), truth.gather(1, visible))
    assert not torch.equal(completed.gather(1, masked), truth.gather(1, masked))
    assert not torch.equal(drawn.gather(1, visible), truth.gather(1, visible))
    shown, label = rows["visible"]
    assert label == "visible: 25% of the tokens"
    hidden = (shown == 0.5).all(dim=1).view(3, 4, 8, 4, 8).all(dim=(2, 4)).flatten(1)  # (B, N)
    expected = torch.zeros(3, 16, dtype=torch.bool).scatter_(1, masked, True)
    assert torch.equal(hidden, expected)


@pytest.mark.parametrize(
    "denoiser, wrong, words",
    [
        ("flow", {"ratio": 0.5}, r"knows \['noise', 'steps'\], not \['ratio'\]"),
        ("perceiver", {"noise": torch.zeros(3)}, r"knows \['ratio', 'steps'\], not \['noise'\]"),
        ("flow", {"noise": torch.zeros(3, 4, 4, 5)}, r"noise: expected \(3, 4, 4, 4\)"),
        ("flow", {"steps": 0}, "0 steps"),
        ("perceiver", {"ratio": 0}, "ratio 0"),
        ("perceiver", {"ratio": 1.5}, "ratio 1.5"),
    ],
)
def test_what_cannot_be_is_refused_in_words(make_genhancer, denoiser, wrong, words):
    with pytest.raises(ValueError, match=words):
        reconstruct(make_genhancer(denoiser), images(), **wrong)


@BOTH
def test_images_out_of_range_are_refused(make_genhancer, denoiser):
    with pytest.raises(ValueError, match="expected values in"):
        reconstruct(make_genhancer(denoiser), images() * 255)
    with pytest.raises(ValueError, match="expected floats"):
        reconstruct(make_genhancer(denoiser), images()[0])


def test_psnr():
    black, grey = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.1)
    assert abs(psnr(black, grey) - 20) < 1e-4


@BOTH
def test_kept_is_there_and_back(make_genhancer, denoiser):
    model = make_genhancer(denoiser)
    assert torch.equal(kept(model.paradigm, images()), reconstruct(model, images())["kept"][0])
