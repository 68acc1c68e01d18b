"""Some hundred damaged pictures; and whether the part would see one that ends a run."""

import random

import pytest
import torch

from . import pictures


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_picture_is_read_or_named(tmp_path):
    assert not pictures.wrong_with(list(pictures.series(1000, 300)), tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_decoder_that_raises_anything_would_be_seen(monkeypatch):
    import data

    def hostile(encoded):
        raise KeyboardInterrupt("from a decoder")

    monkeypatch.setattr(data, "decode", hostile)
    [line] = pictures.wrong_with([("a", b"")])
    assert line.startswith("a: KeyboardInterrupt: from a decoder")
    monkeypatch.setattr(data, "decode", lambda encoded: torch.zeros(3, 4, 4))  # not uint8
    [line] = pictures.wrong_with([("b", b"")])
    assert line.startswith("b: ")


def test_sound_pictures_of_many_formats_are_damaged_in_many_ways():
    files = pictures.sound()
    assert {name.split()[0] for name in files} >= {"JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"}
    rng = random.Random(0)
    whole = files["PNG RGB 0"]
    assert len({pictures.damaged(whole, rng) for _ in range(50)}) > 45
    assert pictures.sealed(whole) == whole, "a sound PNG has the right checksums already"
    assert pictures.CASES * pictures.AT_ONCE >= 20_000
    again = [list(pictures.series(3, 20)) for _ in range(2)]
    assert again[0] == again[1], "the same seed gives the same pictures"
