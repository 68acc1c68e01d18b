"""feature_cache.py: on the disk are the numbers that would be in memory, whole or not at all."""

import copy
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_distributed import spied
from tiny_runs import PERCEIVER, TINY, equal, metrics, tensors, train_here

from data import FileList, Pictures, find_images
from pretrained.autoencoders import load_vae
from settings import Settings
from toy.world import TOY_DIR, ToyScenes
from training import feature_cache
from training.preflight import UNREAD, differences
from training.process import Process
from util.sealed import seal

HERE = Process()


def photos(folder, count=20, broken=()):
    """Pictures of noise, of several shapes."""
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(0)
    for i in range(count):
        pixels = noise.integers(0, 256, (40 + i % 3 * 9, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        if i in broken:
            (folder / f"{i:02d}.png").write_bytes(b"broken")
    return folder


def pictures_in(folder, **how):
    return Pictures(FileList(find_images(folder)), 32, **how)


def settings_for(folder, **more):
    """Of a cache; what model they would make is of no interest here."""
    return Settings.of("toy", cache=str(folder), workers=0, **more)


@pytest.fixture
def small_files(monkeypatch):
    """Files of four pictures, which are encoded two by two."""
    for name, value in (("SMALLEST", 4), ("LARGEST", 4)):
        monkeypatch.setattr(feature_cache, name, value)
    monkeypatch.setattr(feature_cache, "images_at_once", lambda size: 2)
    monkeypatch.setattr(feature_cache, "PATIENCE", 0.0)


def same_files(one, two):
    """Whether two caches are equal byte by byte."""
    names = [sorted(f.name for f in folder.glob("features*")) for folder in (one, two)]
    return names[0] == names[1] and all(
        (one / name).read_bytes() == (two / name).read_bytes() for name in names[0]
    )


# -- whole runs ------------------------------------------------------------------------------------
@pytest.mark.parametrize("tiny", [TINY, PERCEIVER])
def test_a_folder_gives_the_numbers_of_the_memory(tmp_path, tiny):
    """Both stages, over two files; and a run goes on from one to the other, but not to none."""
    tiny = [*tiny, "--toy_images", "300"]
    folder = ["--cache", str(tmp_path / "cache")]
    assert train_here(tmp_path, "memory", tiny=tiny).returncode == 0
    assert train_here(tmp_path, "disk", *folder, tiny=tiny).returncode == 0
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2
    for stage in (1, 2):
        for what in ("trained", "moments"):
            a, b = (tensors(tmp_path / run, stage, what) for run in ("memory", "disk"))
            assert equal(a, b)
    assert metrics(tmp_path / "memory") == metrics(tmp_path / "disk")
    run = tmp_path / "memory"
    shutil.rmtree(run / "stage2" / "step_00000004")
    other = train_here(tmp_path, "memory", "--cache", "", tiny=tiny)
    assert other.returncode == 2 and "cache: True → False" in other.stderr
    assert train_here(tmp_path, "memory", *folder, tiny=tiny).returncode == 0
    assert equal(tensors(run, 2), tensors(tmp_path / "disk", 2))


@pytest.mark.parametrize("more", [[], ["--cache_dtype", "fp16", "--no-posterior"]])
def test_photographs_keep_the_crop_of_the_first_epoch(tmp_path, more):
    """Read by worker processes, several epochs, one picture broken: named in both."""
    data = photos(tmp_path / "photos", 24, broken=[5])
    flags = ["--data", str(data), "--crop_min", "0.5", *more]
    memory = train_here(tmp_path, "memory", *flags)
    disk = train_here(tmp_path, "disk", *flags, "--cache", tmp_path / "cache", "--workers", "2")
    for done in (memory, disk):
        assert done.returncode == 0, done.stdout
        assert "unreadable, replaced by the next: " + str(data / "05.png") in done.stdout
    for stage in (1, 2):
        assert equal(tensors(tmp_path / "memory", stage), tensors(tmp_path / "disk", stage))
    assert metrics(tmp_path / "memory") == metrics(tmp_path / "disk")
    assert metrics(tmp_path / "disk")[-1]["unreadable"] == 1
    names = np.load(tmp_path / "cache" / "features-00000.npy").dtype.names
    assert ("log_variance" in names) == (not more)


def test_killed_while_it_writes(tmp_path):
    """kill -9 between two files: what was whole stays as it is, the rest is made."""
    flags = ["--runs", str(tmp_path), *TINY, "--toy_images", "1000", "--stage", "1"]
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--cache", str(tmp_path / "cache")]
    first = tmp_path / "cache" / "features-00000.npy"
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as running:
        while not first.is_file() or not list(first.parent.glob("*.tmp")):
            assert running.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        os.kill(running.pid, signal.SIGKILL)
    kept = {file: file.stat().st_ino for file in first.parent.glob("*.npy")}
    assert 1 <= len(kept) < 4
    tiny = [*TINY, "--toy_images", "1000", "--stage", "1"]
    for name, folder in (("killed", "cache"), ("straight", "other")):
        done = train_here(tmp_path, name, "--cache", tmp_path / folder, tiny=tiny)
        assert done.returncode == 0, done.stdout
    assert all(file.stat().st_ino == inode for file, inode in kept.items())
    assert same_files(tmp_path / "cache", tmp_path / "other")
    assert not list(first.parent.glob("*.tmp"))


def test_two_processes_make_it_together(tmp_path):
    """gloo; and their stage 1 is that of two processes with a cache in memory."""
    tiny = [*TINY, "--toy_images", "600", "--micro_batch", "8", "--stage", "1"]
    disk = ["--cache", str(tmp_path / "cache")]
    spied(tmp_path, {"m": (2, "memory", [], []), "d": (2, "disk", disk, [])}, tiny)
    assert equal(tensors(tmp_path / "memory", 1), tensors(tmp_path / "disk", 1))
    alone = train_here(tmp_path, "alone", "--cache", tmp_path / "other", tiny=tiny)
    assert alone.returncode == 0 and same_files(tmp_path / "cache", tmp_path / "other")


# -- stage 1 looks at no picture -------------------------------------------------------------------
class Spied(ToyScenes):
    """Counts what is drawn."""

    drawn = 0

    def __getitem__(self, key):
        Spied.drawn += 1
        return super().__getitem__(key)


def test_stage_1_draws_no_scene_and_stage_2_does(tmp_path, monkeypatch):
    from training import assemble

    monkeypatch.setattr(assemble, "ToyScenes", Spied)
    seen = {}
    for stage in ("1", "2", "1 local"):
        more = ["--local_ratio", "50"] if "local" in stage else []
        flags = ["--cache", tmp_path / "cache", "--stage", stage[0], *more]
        Spied.drawn = 0
        done = train_here(tmp_path, f"run{more}", *flags)
        assert done.returncode == 0, done.stdout
        seen[stage] = Spied.drawn
    assert seen["1"] == 48 + 8, "each once for the cache, and eight for the sample grid"
    assert seen["2"] >= 4 * 16, "the tower that learns looks at each"
    assert seen["1 local"] >= 6 * 16, "patch tokens are not kept"


@pytest.mark.parametrize("denoiser", ["flow", "perceiver"])
def test_a_step_without_images(make_genhancer, denoiser):
    model, images = make_genhancer(denoiser), torch.rand(3, 3, 32, 32)
    cached, draws = model.precompute(images), model.draw_from([1, 2, 3, 4], torch.device("cpu"))
    model.start_stage1()
    with_them, without = model(images, draws, cached), model(None, draws, cached)
    assert torch.equal(with_them["per_image"], without["per_image"])
    with pytest.raises(ValueError, match="images: None"):
        model(None, draws)
    model.start_stage2()
    with pytest.raises(ValueError, match="images: None"):
        model(None, draws, cached)


# -- what is refused -------------------------------------------------------------------------------
def made(folder, pictures, model, **more):
    return feature_cache.disk_cache(pictures, model, settings_for(folder, **more), HERE)


def test_another_model_or_other_pictures_are_refused(tmp_path, make_genhancer, small_files):
    """By name of what differs, before anything is written."""
    folder, pictures = tmp_path / "cache", pictures_in(photos(tmp_path / "photos"))
    made(folder, pictures, make_genhancer())
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}

    def refused(words, pictures=pictures, model=None, **more):
        with pytest.raises(ValueError, match=f"holds features of other {words}"):
            made(folder, pictures, model or make_genhancer(), **more)

    other = make_genhancer()
    with torch.no_grad():
        other.visual.proj += 1
    refused("clip .weights: .* → ", model=other)
    other = copy.deepcopy(make_genhancer())  # the fixture's models share one tokenizer
    with torch.no_grad():
        next(other.paradigm.tokenizer.parameters()).add_(1)
    refused("flow.tokenizer .weights: .* → ", model=other)
    other = make_genhancer()
    other.info = dataclasses.replace(other.info, mean=(0.1, 0.1, 0.1))
    refused("clip .preprocess_cfg.mean", model=other)
    refused("pictures .crop_min: 1.0 → 0.8", crop_min=0.8, data="photos")
    refused("pictures .seed: 0 → 1", seed=1)
    refused("records .log_variance", cache_dtype="fp16")
    refused("records .log_variance", model=make_genhancer(sample_posterior=False))
    refused("perceiver.tokenizer", model=make_genhancer("perceiver"))
    refused("pictures .images: 20 → 19", pictures_in(photos(tmp_path / "fewer", 19)))
    (tmp_path / "fewer" / "other.png").write_bytes((tmp_path / "photos" / "00.png").read_bytes())
    refused("pictures .names: .*, samples.19: ", pictures_in(tmp_path / "fewer"))
    assert before == {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    shutil.copytree(tmp_path / "photos", tmp_path / "moved")
    made(folder, pictures_in(tmp_path / "moved"), make_genhancer())  # the same under another name


def test_a_picture_that_is_away_for_a_moment_makes_no_other_data_set(tmp_path):
    """As on a network disk. What was read both times must be the same."""
    data = photos(tmp_path / "photos", 4)
    pictures = pictures_in(data)
    whole = feature_cache.which(pictures)
    assert whole.keys() == {"images", "names", "samples"} and len(whole["samples"]) == 4
    (data / "02.png").rename(tmp_path / "away.png")
    less = feature_cache.which(pictures)
    assert whole != less and less["samples"]["2"] == UNREAD
    assert differences(whole, less) == differences(less, whole) == []
    (data / "01.png").write_bytes((tmp_path / "away.png").read_bytes())
    (found,) = differences(whole, feature_cache.which(pictures))
    assert found.startswith("samples.1: ")


def test_two_starts_on_one_new_folder_agree(tmp_path):
    """Whoever writes about.json first decides whose the folder is; the other looks at that."""

    real = feature_cache.created

    def overtaken(folder, mine, theirs):
        """The tokens of a start and of another, which goes by between its look and its write."""
        tokens = []

        def late(path, content):
            patch.undo()
            tokens.append(feature_cache.claimed(folder, theirs))
            return real(path, content)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(feature_cache, "created", late)
            return [feature_cache.claimed(folder, mine), *tokens]

    mine, other = {"pictures": {"seed": 1}}, {"pictures": {"seed": 2}}
    one, two = overtaken(tmp_path / "a", mine, mine)
    assert one == two
    with pytest.raises(ValueError, match=r"features of other pictures \(seed: 2 → 1\)"):
        overtaken(tmp_path / "b", mine, other)


def test_what_is_no_cache_is_refused(tmp_path, make_genhancer, small_files):
    folder, pictures = tmp_path / "cache", pictures_in(photos(tmp_path / "photos"))
    made(folder, pictures, make_genhancer())
    for content in ("{", "[]", "{}"):
        (folder / "about.json").write_text(content)
        with pytest.raises(ValueError, match="about.json is damaged, or .* delete that"):
            made(folder, pictures, make_genhancer())
    (folder / "about.json").unlink()
    with pytest.raises(ValueError, match="features without about.json"):
        made(folder, pictures, make_genhancer())
    (tmp_path / "file").write_text("")
    refused = train_here(tmp_path, "x", "--cache", tmp_path / "file")
    assert refused.returncode == 2 and "file is a file: give a folder" in refused.stderr


def test_too_little_space_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    """48 scenes of two times 2048 numbers, 64 more, and a checksum."""
    needed = 48 * (4 * (2 * 2048 + 64) + 4)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    refused = train_here(tmp_path, "x", "--cache", tmp_path / "cache")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "needs 0.00 GB more for 48 pictures of 16.6 kB, and 0.00 GB are free" in refused.stderr
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["about.json"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed + 1000))
    assert train_here(tmp_path, "x", "--cache", tmp_path / "cache").returncode == 0


def test_each_rank_makes_its_share_and_must_see_the_others(
    tmp_path, monkeypatch, make_genhancer, small_files
):
    """Rank 1 of 2 on a machine of its own, to whose disk the main process does not write."""
    folder, model = tmp_path / "cache", make_genhancer()
    pictures = pictures_in(photos(tmp_path / "photos"))
    whole = made(tmp_path / "whole", pictures, model)
    told = [("", "the main process's token")]
    monkeypatch.setattr(feature_cache, "agreed", lambda value, process: told.pop(0))
    monkeypatch.setattr(feature_cache, "union_over_ranks", lambda items, process: items)
    monkeypatch.setattr(feature_cache, "wait_for_slowest", lambda process, what: None)
    second = Process(rank=1, ranks=2)
    with pytest.raises(ValueError, match="rank 1 does not see there what others wrote"):
        feature_cache.disk_cache(pictures, model, settings_for(folder), second)
    assert not folder.exists(), "seen before anything was encoded"
    folder.mkdir()
    (folder / "about.json").write_text(seal({"token": "a"}))
    told += [("", "a"), ([0, 1, 2, 3, 4], 10**9)]
    with pytest.raises(ValueError, match="rank 1 does not see there what others wrote"):
        feature_cache.disk_cache(pictures, model, settings_for(folder), second)
    mine = sorted(file.name for file in folder.glob("*.npy"))
    assert mine == ["features-00001.npy", "features-00003.npy"]
    assert all((folder / n).read_bytes() == (whole.folder / n).read_bytes() for n in mine)


# -- damage ----------------------------------------------------------------------------------------
def test_damaged_files_are_made_again(tmp_path, make_genhancer, small_files, capsys):
    """Cut short, with another beginning, or with one bit that has changed."""
    folder, pictures = tmp_path / "cache", pictures_in(photos(tmp_path / "photos"))
    cache = made(folder, pictures, make_genhancer())
    shutil.copytree(folder, tmp_path / "sound")
    assert cache.files == 5 and cache.missing() == []
    for number, damage in enumerate((lambda b: b[:-1], lambda b: b"", lambda b: b"x" + b[1:])):
        cache.path(number).write_bytes(damage(cache.path(number).read_bytes()))
    assert cache.missing() == [0, 1, 2]
    made(folder, pictures, make_genhancer())
    assert same_files(folder, tmp_path / "sound")
    flip(cache.path(3))
    made(folder, pictures, make_genhancer())
    assert (
        "note: --cache: features-00003.npy was damaged and is made again" in capsys.readouterr().err
    )
    assert same_files(folder, tmp_path / "sound")


def flip(file):
    """One bit of it."""
    changed = bytearray(file.read_bytes())
    changed[-100] ^= 1
    file.write_bytes(changed)


def test_damage_in_a_large_cache_is_seen_when_it_is_read(
    tmp_path, make_genhancer, small_files, monkeypatch
):
    """To read hundreds of gigabytes at every start would take longer than many a run. The file is
    removed, so that the next start makes it again."""
    folder, pictures = tmp_path / "cache", pictures_in(photos(tmp_path / "photos"))
    cache = made(folder, pictures, make_genhancer())
    shutil.copytree(folder, tmp_path / "sound")
    flip(cache.path(3))
    monkeypatch.setattr(feature_cache, "READ_AT_START", 0)
    cache = made(folder, pictures, make_genhancer())
    assert cache.features(14)["mean"].shape == (4, 4, 4)
    with pytest.raises(ValueError, match="features-00003.npy was damaged and is removed"):
        cache.features(15)
    made(folder, pictures, make_genhancer())
    assert same_files(folder, tmp_path / "sound")


def test_numbers_and_types(tmp_path, make_genhancer, small_files):
    """What comes out is what went in: in float32 exactly, in fp16 to eleven bits."""
    pictures = pictures_in(photos(tmp_path / "photos"))
    for denoiser, dtype, bits in (("flow", "fp32", 24), ("flow", "fp16", 11), ("perceiver",) * 3):
        model, own = make_genhancer(denoiser), {} if denoiser == "flow" else {"denoiser": denoiser}
        own |= {} if denoiser == dtype else {"cache_dtype": dtype}
        cache = made(tmp_path / f"{denoiser}{dtype}", pictures, model, **own)
        assert len(cache) == 20
        for first in range(0, 20, 2):
            items = [cache[(i, 3)] for i in (first, first + 1)]
            images = torch.stack([item["image"] for item in items])
            images = images.float() / 255 if images.dtype == torch.uint8 else images
            for name, expected in model.precompute(images).items():
                got = torch.stack([item["cached"][name] for item in items])
                assert got.dtype == expected.dtype and got.shape == expected.shape
                if dtype == "fp16":
                    assert torch.allclose(got, expected, rtol=2.0**-bits, atol=2.0**-24)
                    assert not torch.equal(got, expected)
                else:
                    assert torch.equal(got, expected), (denoiser, name)
    with pytest.raises(ValueError, match="mean holds numbers that torch.float16 cannot"):
        feature_cache.as_stored({"mean": torch.full((1, 4), 1e6)}, "fp16")


def test_bytes_of_the_full_size():
    """ViT-L/14 at 224 px: 52 kB an image, 155 GB for CC3M, and about half without the variance."""
    moments = {name: torch.empty(2, 16, 28, 28, device="meta") for name in ("mean", "log_variance")}
    found = {**moments, "original": torch.empty(2, 768, device="meta")}
    assert feature_cache.cache_bytes(found, 1, "fp16") == 2 * (2 * 16 * 28 * 28 + 768) + 4
    assert round(feature_cache.cache_bytes(found, 3_000_000, "fp16") / 1e9) == 155
    del found["log_variance"]
    assert round(feature_cache.cache_bytes(found, 3_000_000, "fp16") / 1e9) == 80
    indices = {"indices": torch.empty(2, 196, dtype=torch.long, device="meta")}
    assert feature_cache.cache_bytes(indices, 1, "fp16") == 4 * 196 + 4


def test_half_precision_is_fine_beside_what_the_posterior_says():
    """Of the toy's VAE: rounding the mean moves it by far less than its own standard deviation,
    which is noise that the run adds on purpose."""
    vae, scenes = load_vae(str(TOY_DIR / "vae.safetensors")), ToyScenes(64, seed=5).batch(64)
    with torch.no_grad():
        mean, log_variance = vae.moments(scenes * 2 - 1)
    error = (mean.half().float() - mean).square().mean().sqrt()
    assert error < 0.1 * torch.exp(0.5 * log_variance).mean()


def test_sizes_of_batches_and_files(tmp_path):
    assert [feature_cache.images_at_once(s) for s in (16, 64, 224, 336, 384, 2000)] == [
        256, 256, 16, 8, 4, 1,
    ]  # fmt: skip
    record = np.dtype([("a", "<f2"), ("crc32", "<u4")])
    for count, per_file in ((48, 256), (12_288, 256), (100_000, 1792), (3_000_000, 8192)):
        cache = feature_cache.FeatureCache(ToyScenes(count, seed=0), tmp_path, record, 16)
        assert cache.per_file == per_file and per_file % 256 == 0
        assert sum(map(cache.count, range(cache.files))) == count


# -- pictures that cannot be read ------------------------------------------------------------------
def test_a_picture_that_cannot_be_read_any_more(tmp_path, make_genhancer, small_files):
    """Its stand-in comes with the stand-in's features. One that came back has no features: said."""
    folder, data = tmp_path / "cache", photos(tmp_path / "photos", broken=[9])
    pictures, model = pictures_in(data), make_genhancer()
    sound, broken = (data / "03.png").read_bytes(), (data / "09.png").read_bytes()
    cache = made(folder, pictures, model)
    cache = made(folder, pictures, model)  # what was noted is read again
    assert cache.unreadable == {9: [str(data / "09.png")]}
    alone = cache.features_alone[(9, 1)]
    assert alone["index"] == 10 and alone["unreadable"] == [str(data / "09.png")]
    assert "image" not in alone
    whole = cache[(9, 1)]
    assert torch.equal(whole["cached"]["mean"], alone["cached"]["mean"])
    (data / "03.png").write_bytes(broken)
    item = cache[(3, 0)]
    assert torch.equal(item["cached"]["mean"], cache.features(4)["mean"])
    (data / "03.png").write_bytes(sound)
    (data / "09.png").write_bytes(sound)
    with pytest.raises(ValueError, match="09.png could not be read when this was made, and can be"):
        cache[(9, 0)]
