"""data.py: what is found, how it is decoded, in which order it comes."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

import data


def write_images(folder, count=5, size=(40, 30)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((size[1], size[0], 3), 20 * i, np.uint8)).save(folder / f"{i}.png")
    return folder


def pictures_in(folder, *args, **kwargs):
    return data.Pictures(data.FileList(data.find_images(folder)), *args, **kwargs)


# -- finding -------------------------------------------------------------------------------------
def test_folder_and_list(tmp_path):
    folder = write_images(tmp_path / "a")
    write_images(folder / "deeper", 2)
    (folder / "notes.txt").write_text("not an image")
    assert len(data.find_images(folder)) == 7
    (tmp_path / "list.txt").write_text(f"a/0.png\n\n{folder / '1.png'}\n")
    assert data.find_images(tmp_path / "list.txt") == [folder / "0.png", folder / "1.png"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: p / "absent", "no folder and no file"),
        (lambda p: (p / "empty").mkdir() or p / "empty", "no images"),
        (lambda p: (p / "l.txt").write_text("") or (p / "l.txt"), "x"),
        (lambda p: write_images(p / "i", 1) / "0.png", "give a folder"),
    ],
)
def test_wrong_sources(tmp_path, make, message):
    if message == "x":
        (tmp_path / "l.txt").write_text("\n")
        with pytest.raises(ValueError, match="is empty"):
            data.find_images(tmp_path / "l.txt")
        (tmp_path / "l.txt").write_text("gone.jpg\n")
        with pytest.raises(FileNotFoundError, match="gone.jpg, which does not exist"):
            data.find_images(tmp_path / "l.txt")
        (tmp_path / "l.txt").write_bytes(b"\xff\xfe\x00\x81")
        with pytest.raises(ValueError, match="not a text file"):
            data.find_images(tmp_path / "l.txt")
        return
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.find_images(make(tmp_path))


# -- decoding ------------------------------------------------------------------------------------
def test_every_mode_becomes_rgb(tmp_path):
    rgb = Image.new("RGB", (8, 6), (200, 100, 50))
    rgb.save(tmp_path / "rgb.png")
    rgb.convert("P").save(tmp_path / "palette.png")
    rgb.convert("L").save(tmp_path / "grey.png")
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(np.full((6, 8), 257 * 128, np.uint16)).save(tmp_path / "sixteen.png")
    Image.new("RGBA", (8, 6), (200, 100, 50, 0)).save(tmp_path / "clear.png")
    expected = {
        "rgb.png": (200, 100, 50),
        "palette.png": (200, 100, 50),
        "grey.png": (124,) * 3,
        "cmyk.jpg": (200, 100, 50),
        "sixteen.png": (128,) * 3,
        "clear.png": (255,) * 3,
    }
    for name, color in expected.items():
        image = data.load_rgb(tmp_path / name)
        assert image.mode == "RGB" and image.size == (8, 6)
        assert np.abs(np.asarray(image)[3, 4].astype(int) - color).max() <= 8, name


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert data.load_rgb(tmp_path / "turned.jpg").size == (4, 8)


def test_crop_is_a_function_of_seed_epoch_and_index(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8)).save(tmp_path / "x.png")
    files = pictures_in(tmp_path, 32, 0.5, seed=1)
    a, again, other_epoch = files[(0, 0)]["image"], files[(0, 0)]["image"], files[(0, 1)]["image"]
    assert a.shape == (3, 32, 32) and a.min() >= 0 and a.max() <= 1
    assert torch.equal(a, again) and not torch.equal(a, other_epoch)
    assert not torch.equal(a, pictures_in(tmp_path, 32, 0.5, seed=2)[(0, 0)]["image"])


def test_crop_area_stays_in_range():
    """A horizontal ramp tells the width of the crop by its contrast."""
    ramp = Image.fromarray(
        np.tile(np.linspace(0, 255, 256).astype(np.uint8)[None, :, None], (256, 1, 3))
    )
    widths, heights = [], []
    for i in range(200):
        crop = np.asarray(data.random_resized_crop(ramp, 64, 0.9, np.random.default_rng(i)))[
            0, :, 0
        ].astype(float)
        widths.append((crop[-1] - crop[0]) / 255 * 64 / 63)
        tall = np.asarray(
            data.random_resized_crop(
                ramp.transpose(Image.Transpose.ROTATE_270), 64, 0.9, np.random.default_rng(i)
            )
        )[:, 0, 0].astype(float)
        heights.append((tall[-1] - tall[0]) / 255 * 64 / 63)
    areas = np.array(widths) * np.array(heights)
    assert areas.min() > 0.85 and areas.max() < 1.03 and areas.std() > 0.01


@pytest.mark.parametrize("size", [(600, 400), (400, 600), (1000, 300), (300, 1000), (640, 480)])
def test_pictures_too_wide_or_tall_get_torchvisions_central_box(size):
    """No box of nine tenths with a ratio within [3/4, 4/3] fits into 3 : 2, so the box is
    torchvision's own fallback, whatever the generator draws."""
    from torchvision.transforms import RandomResizedCrop

    theirs = RandomResizedCrop.get_params(Image.new("L", size), (0.9, 1.0), (3 / 4, 4 / 3))
    boxes = {data.crop_box(size, 0.9, np.random.default_rng(i)) for i in range(50)}
    if size == (640, 480):
        assert len(boxes) > 1, "4 : 3 leaves room to draw"
    else:
        top, left, height, width = theirs
        assert boxes == {(left, top, width, height)}


def test_unreadable_is_replaced_and_named(tmp_path):
    folder = write_images(tmp_path, 3)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:40])
    item = pictures_in(folder, 16)[(1, 0)]
    assert item["name"].endswith("2.png") and [f.endswith("1.png") for f in item["unreadable"]] == [
        True
    ]


def test_nothing_readable_is_an_error(tmp_path):
    folder = write_images(tmp_path, 2)
    for file in folder.glob("*.png"):
        file.write_bytes(b"broken")
    with pytest.raises(ValueError, match="in a row cannot be read"):
        pictures_in(folder, 16)[(0, 0)]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_arrives_as_one_line(tmp_path, workers):
    folder = write_images(tmp_path, 2)
    for file in folder.glob("*.png"):
        file.write_bytes(b"broken")
    stream = data.batches(pictures_in(folder, 16), data.MicroBatches(2, data.Share(2, 2)), workers)
    with pytest.raises(ValueError, match="^data: 2 images in a row cannot be read[^\n]*$"):
        next(stream)


# -- white bars ----------------------------------------------------------------------------------
def letterboxed(top, bottom, left=0, right=0):
    """Colourful noise, never white, with white bars around."""
    rng = np.random.default_rng(0)
    picture = np.full((64, 64, 3), 255, np.uint8)
    inner = picture[top : 64 - bottom, left : 64 - right]
    inner[:] = rng.integers(0, 200, inner.shape)
    return Image.fromarray(picture)


def test_white_bars_are_cut_in_pairs_only():
    assert data.crop_white_bars(letterboxed(10, 11)).size == (64, 43)
    assert data.crop_white_bars(letterboxed(0, 0, 12, 12)).size == (40, 64)
    for same in (letterboxed(0, 0), letterboxed(20, 0), letterboxed(20, 5), letterboxed(0, 0, 9)):
        assert data.crop_white_bars(same).size == (64, 64)
    blank = Image.new("RGB", (8, 8), "white")
    assert data.crop_white_bars(blank).size == (8, 8)


def test_white_bars_of_a_jpeg_and_in_a_data_set(tmp_path):
    letterboxed(16, 16).save(tmp_path / "a.jpg", quality=80)
    with Image.open(tmp_path / "a.jpg") as image:
        assert abs(data.crop_white_bars(image.convert("RGB")).height - 32) <= 2
    kept = pictures_in(tmp_path, 64, 1.0)[(0, 0)]["image"]
    cut = pictures_in(tmp_path, 64, 1.0, crop_white=True)[(0, 0)]["image"]
    assert kept.mean() > 0.65 and cut.mean() < 0.45


# -- order ---------------------------------------------------------------------------------------
def take(n, length, *share, **kwargs):
    """The first n micro-batches of a `share`: global batch, micro batch, rank, ranks."""
    return list(itertools.islice(data.MicroBatches(length, data.Share(*share), **kwargs), n))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro", [2, 4])
def test_global_batch_is_the_same_for_any_split(ranks, micro):
    whole = take(5, 37, 16, 16, seed=3)
    pieces = [
        take(5 * 16 // (micro * ranks), 37, 16, micro, r, ranks, seed=3) for r in range(ranks)
    ]
    per_step = 16 // (micro * ranks)
    for step in range(5):
        union = [
            item
            for r in range(ranks)
            for b in pieces[r][step * per_step : (step + 1) * per_step]
            for item in b
        ]
        assert sorted(union) == sorted(whole[step]), "the same images, disjoint over ranks"
        assert len(set(union)) == 16


def test_every_image_once_per_epoch_and_reshuffled():
    stream = [item for b in take(20, 40, 8, 8, seed=0) for item in b]
    epochs = {e: [i for _, (i, epoch) in stream if epoch == e] for e in range(4)}
    assert all(sorted(indices) == list(range(40)) for indices in epochs.values())
    assert epochs[0] != epochs[1]
    assert [p for p, _ in stream] == list(range(160))


def test_resume_sees_exactly_the_rest():
    straight = take(12, 23, 8, 4, seed=5)
    resumed = take(6, 23, 8, 4, seed=5, start_step=3)
    assert resumed == straight[6:]


def test_data_smaller_than_a_batch_works():
    assert len(take(1, 3, 8, 8)[0]) == 8


def test_uneven_global_batch_is_refused():
    with pytest.raises(ValueError, match="no multiple"):
        data.MicroBatches(10, data.Share(10, 4))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_carry_images_names_and_positions(tmp_path, workers):
    files = pictures_in(write_images(tmp_path, 6), 16)
    stream = data.batches(files, data.MicroBatches(6, data.Share(4, 4), seed=1), workers)
    first, second = next(stream), next(stream)
    assert first["image"].shape == (4, 3, 16, 16) and first["position"] == [0, 1, 2, 3]
    assert second["position"] == [4, 5, 6, 7] and len(first["name"]) == 4
    assert sorted(first["name"] + second["name"][:2]) == sorted(str(f) for f in files.source.files)


def test_cache_returns_the_same_images_and_what_was_encoded(tmp_path):
    files = pictures_in(write_images(tmp_path, 5), 16)
    cache = data.CachedPictures(files, lambda x: {"mean_color": x.mean((2, 3))}, chunk=2)
    assert len(cache) == 5
    for i in range(5):
        item, original = cache[(i, 7)], files[(i, 0)]
        assert (item["image"] - original["image"]).abs().max() <= 0.5 / 255 + 1e-6
        assert torch.allclose(item["cached"]["mean_color"], original["image"].mean((1, 2)))
        assert item["name"] == original["name"]
    batch = data.collate([cache[(i, 0)] for i in (3, 1)])
    assert torch.equal(batch["cached"]["mean_color"], cache.cached["mean_color"][[3, 1]])
