"""settings.py: what is not given comes from the preset, and no combination is half of one."""

import dataclasses

import pytest

from presets import BACKBONES
from settings import Settings, names, notes_of, of_stage, relevant, usual


def test_nothing_given_is_the_toy():
    assert (
        Settings() == Settings.of("toy") == Settings("toy") == Settings.of("toy", denoiser="flow")
    )
    assert Settings().width == 192 and Settings().stage1_steps == 1400


@pytest.mark.parametrize("preset", ["toy", *BACKBONES])
@pytest.mark.parametrize("denoiser", ["flow", "perceiver"])
def test_every_preset_is_whole(preset, denoiser):
    settings = Settings.of(preset, denoiser=denoiser)
    assert vars(settings) == usual(preset, denoiser)
    assert (settings.preset, settings.denoiser) == (preset, denoiser)
    assert settings.clip == BACKBONES.get(preset, settings.clip)
    assert Settings(**vars(settings)) == settings


def test_what_differs_wins_over_the_preset():
    settings = Settings.of("toy", denoiser="perceiver", layers=2, seed=3)
    assert (settings.layers, settings.seed, settings.width) == (2, 3, 128)
    again = dataclasses.replace(settings, seed=4)
    assert again.seed == 4 and again.layers == 2


@pytest.mark.parametrize(
    "given, words",
    [
        ({"preset": "tyo"}, "did you mean toy?"),
        ({"denoiser": "perciever"}, "did you mean perceiver?"),
        ({"stage1_step": 3}, "no setting 'stage1_step' .did you mean stage1_steps?"),
        ({"denoiser": "perceiver", "blocks": 3}, "--blocks is of the flow denoiser"),
        ({"layers": 3}, "add --denoiser perceiver"),
        ({"width": 100}, "--width 100 must be heads 6"),
        ({"batch": 0}, "at least 1"),
        ({"stage": 1}, "--stage 1: must be a text"),
        ({"batch": "64"}, "--batch '64': must be a whole number"),
        ({"batch": 64.0}, "must be a whole number"),
        ({"crop_white": 1}, "must be True or False"),
        ({"cache": True}, "--cache True: must be a text"),
        ({"cache": "none"}, "--cache none: give a folder .of that name: ./none., 'memory'"),
        ({"stage2_lr": float("inf")}, "finite"),
        ({"stage2_lr": -1.0}, "at least 0"),
        ({"lora_alpha": 0.0}, "above 0"),
        ({"crop_min": 1.5}, "at most 1"),
        ({"preset": "openai-l14-224", "flux": "x", "heads": 12}, "beside --flux"),
        ({"end_to_end": True, "stage1_from": "x"}, "drop --end_to_end"),
    ],
)
def test_what_does_not_go_together_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        Settings(**given)
    whole = {name: value for name, value in vars(Settings()).items() if name not in given}
    if "preset" not in given and "denoiser" not in given:
        with pytest.raises(ValueError, match=words):
            Settings(**{**whole, **given})


IDLE = [
    ({"cache": "", "cache_dtype": "fp16"}, "--cache_dtype would do nothing without --cache"),
    ({"loss_weights": "2"}, "--loss_weights would do nothing with one denoiser"),
    ({"time_distribution": "uniform", "time_scale": 5.0}, "--time_scale would do nothing with un"),
    ({"tuning": "direct", "lora_rank": 4}, "--lora_rank would do nothing with --tuning direct"),
    ({"crop_min": 0.9}, "--crop_min would do nothing without --data"),
]


@pytest.mark.parametrize("given, words", IDLE)
def test_what_would_do_nothing_is_refused_by_hand_and_read_back(given, words):
    with pytest.raises(ValueError, match=words):
        Settings(**given)
    whole = Settings(**{**vars(Settings()), **given})  # as from the config.json of a run
    assert all(getattr(whole, name) == value for name, value in given.items())
    Settings(data="photos", **{"tuning": "direct", "crop_min": 0.9})


def test_a_stage_knows_its_own():
    settings = Settings()
    one, two = of_stage(settings, 1), of_stage(settings, 2)
    assert "lora_rank" in two and "lora_rank" not in one
    assert "stage1_lr" in one and "stage1_lr" not in two
    assert one.keys() | two.keys() == set(names())
    # End to end, the denoiser learns in stage 2 at stage 1's rate: so it decides its numbers.
    assert "stage1_lr" in relevant(Settings(end_to_end=True), 2)
    assert "stage1_lr" not in relevant(settings, 2)


def test_every_number_has_bounds():
    """Whoever adds a number decides what it may be."""
    for name, value in vars(Settings()).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert {"at_least", "above"} & notes_of(name).keys(), name
