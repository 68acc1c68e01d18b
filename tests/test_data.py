"""data.py: what is found, how it is decoded, in which order it comes."""

import io
import itertools
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos"


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
    found = data.find_images(tmp_path / "list.txt")
    assert list(found) == [f"{folder}/0.png", f"{folder}/1.png"]
    assert found[-1] == f"{folder}/1.png" and len(found) == 2
    with pytest.raises(IndexError):
        found[2]


def test_the_order_of_a_folder_is_that_of_pathlib(tmp_path):
    """Part by part, so "a/z" comes before "a-b/c" and "a.jpg"; links to files count, folders behind
    links do not; hidden files do not; names need not be UTF-8."""
    names = ["a/z.jpg", "a/b/c.PNG", "a-b/c.jpg", "a.jpg", "a/b.jpg", ".hidden/x.webp", "Z.jpeg"]
    names += [".jpg", "no.txt", "é.jpg", "文/x.bmp", os.fsdecode(b"caf\xe9.jpg"), "two.dots.jpg"]
    names += [f"many/{i}.jpg" for i in range(30)]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "circle").symlink_to(tmp_path)
    today = [p for p in tmp_path.rglob("*") if p.suffix.lower() in data.SUFFIXES and p.is_file()]
    (tmp_path / "itself.jpg").symlink_to(tmp_path / "itself.jpg")
    (tmp_path / "._a.jpg").touch()
    found = data.find_images(tmp_path)
    assert list(found) == [str(file) for file in sorted(today)] and len(found) == 42
    assert data.FileList(found).read(5) == b"" and list(pickle.loads(pickle.dumps(found)))


def test_a_long_list_is_short_in_memory(tmp_path):
    """Two hundred thousand paths; as a list of Path they take 94 MB. Not all of them are looked
    for, yet one that is missing is found when its turn comes."""
    write_images(tmp_path / "a", 2)
    lines = [f"a/../a/{i % 2}.png" for i in range(200_000)]
    lines[1] = "a/gone.png"  # every third is looked for
    (tmp_path / "list.txt").write_text("\n".join(lines))
    del lines
    tracemalloc.start()
    files = data.find_images(tmp_path / "list.txt")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(files) == 200_000 and held < 6e6 and peak < 9e6
    assert files[199_999] == f"{tmp_path}/a/../a/1.png"
    item = data.Pictures(data.FileList(files), 16)[(1, 0)]
    assert item["index"] == 2 and item["unreadable"] == [f"{tmp_path}/a/gone.png"]


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


def encoded(image, kind="jpeg", **how):
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def photographs():
    """Encoded: the shared ones, where they are; a made-up one of every kind."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (9, 13, 3), np.uint8))
    image = coarse.resize((131, 91), Image.Resampling.BICUBIC)
    exif = image.getexif()
    for turned in range(1, 9):
        exif[0x0112] = turned
        yield f"exif {turned}", encoded(image, exif=exif)
    for mode in ("L", "RGB", "CMYK"):
        for how in ({}, {"progressive": True}, {"quality": 30, "optimize": True}):
            yield f"{mode} {how}", encoded(image.convert(mode), **how)
    for chroma in (0, 1, 2):
        yield f"chroma {chroma}", encoded(image, subsampling=chroma, restart_marker_blocks=5)
    yield "stored as RGB", encoded(image, keep_rgb=True)
    for kind, mode in (
        ("png", "RGB"),
        ("png", "P"),
        ("png", "RGBA"),
        ("webp", "RGB"),
        ("bmp", "L"),
    ):
        yield f"{kind} {mode}", encoded(image.convert(mode), kind)
    yield from ((file.name, file.read_bytes()) for file in sorted(PHOTOS.glob("*.jpg")))


def test_decoding_gives_pillows_very_pixels(monkeypatch):
    by_torchvision, plain = 0, data.decode_jpeg

    def counted(*args, **kwargs):
        nonlocal by_torchvision
        by_torchvision += 1
        return plain(*args, **kwargs)

    monkeypatch.setattr(data, "decode_jpeg", counted)
    every = list(photographs())
    for name, content in every:
        mine, want = data.decode(content), np.asarray(data.load_rgb(io.BytesIO(content)))
        assert mine.dtype == torch.uint8, name
        assert np.array_equal(mine.permute(1, 2, 0).numpy(), want), name
    assert by_torchvision == len(every) - 7 - 3 - 5, (
        "all but turned ones, CMYK, and what is no JPEG"
    )
    monkeypatch.setattr(data, "decode_jpeg", None)  # a torchvision without it
    for name, content in every[:30]:
        want = np.asarray(data.load_rgb(io.BytesIO(content)))
        assert np.array_equal(data.decode(content).permute(1, 2, 0).numpy(), want), name


def test_damaged_pictures_are_refused_as_pillow_refuses_them():
    """Cut anywhere, or with bytes changed: the same pixels, or both refuse."""
    rng = np.random.default_rng(0)
    contents = [content for name, content in photographs() if not name.endswith(".jpg")]

    def outcome(read, content):
        try:
            return np.asarray(read(content))
        except Exception:
            return np.zeros(0)

    refused = 0
    for trial in range(1500):
        content = bytearray(contents[trial % len(contents)])
        if trial % 3 == 0:
            content = content[: rng.integers(len(content))]
        else:
            for place in rng.integers(len(content), size=trial % 3 * 2):
                content[place] = rng.integers(256)
        content = bytes(content)
        mine = outcome(lambda c: data.decode(c).permute(1, 2, 0).numpy(), content)
        assert np.array_equal(mine, outcome(lambda c: data.load_rgb(io.BytesIO(c)), content))
        refused += mine.size == 0
    assert 300 < refused < 1200


def test_a_decompression_bomb_is_refused(tmp_path):
    bomb = bytearray(encoded(Image.new("L", (8, 8))))
    start = bomb.index(b"\xff\xc0")
    bomb[start + 5 : start + 9] = b"\xff\xff\xff\xff"  # 65 535 × 65 535
    with pytest.raises(Image.DecompressionBombError):
        data.decode(bytes(bomb))
    (tmp_path / "0.jpg").write_bytes(bomb)
    write_images(tmp_path, 2)
    item = pictures_in(tmp_path, 16)[(0, 0)]
    assert item["unreadable"] == [str(tmp_path / "0.jpg")] and item["index"] == 1


def test_resizing_is_pillows_within_a_level():
    """Inside of the box's edges: there Pillow looks at pixels beyond the box, and we do not."""
    image = data.decode(encoded(Image.effect_noise((200, 150), 60).convert("RGB")))
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
    left, top, w, h = data.crop_box((200, 150), 0.9, np.random.default_rng(3))
    mine = data.random_resized_crop(image, 64, 0.9, np.random.default_rng(3))
    box = (left, top, left + w, top + h)
    want = np.asarray(pillow.resize((64, 64), Image.Resampling.BICUBIC, box=box)).astype(int)
    difference = np.abs(mine.permute(1, 2, 0).numpy() - want)[3:-3, 3:-3]
    assert difference.max() <= 1 and mine.is_contiguous()


def test_bytes_become_the_floats_they_always_were():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.as_floats(every), every.float() / 255)
    assert torch.equal((data.as_floats(every) * 255).round().to(torch.uint8), every)
    floats = torch.rand(3, 4)
    assert data.as_floats(floats) is floats


def test_crop_is_a_function_of_seed_epoch_and_index(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8)).save(tmp_path / "x.png")
    files = pictures_in(tmp_path, 32, 0.5, seed=1)
    a, again, other_epoch = files[(0, 0)]["image"], files[(0, 0)]["image"], files[(0, 1)]["image"]
    assert a.shape == (3, 32, 32) and a.dtype == torch.uint8
    assert torch.equal(a, again) and not torch.equal(a, other_epoch)
    assert not torch.equal(a, pictures_in(tmp_path, 32, 0.5, seed=2)[(0, 0)]["image"])


def test_crop_area_stays_in_range():
    """A horizontal ramp tells the width of the crop by its contrast."""
    ramp = torch.arange(256, dtype=torch.uint8).expand(3, 256, 256)
    widths, heights = [], []
    for i in range(200):
        wide, tall = (
            data.random_resized_crop(image, 64, 0.9, np.random.default_rng(i)).double()
            for image in (ramp, ramp.transpose(1, 2))
        )
        widths.append((wide[0, 0, -1] - wide[0, 0, 0]) / 255 * 64 / 63)
        heights.append((tall[0, -1, 0] - tall[0, 0, 0]) / 255 * 64 / 63)
    areas = np.array(widths) * np.array(heights)
    assert areas.min() > 0.85 and areas.max() < 1.03 and areas.std() > 0.01


def test_crops_lie_anywhere_in_the_picture():
    """From edge to edge, at whole pixels, and never beyond."""
    boxes = [data.crop_box((50, 40), 0.5, np.random.default_rng(i)) for i in range(500)]
    for axis, length in ((0, 50), (1, 40)):
        assert all(isinstance(box[axis], int) for box in boxes)
        rests = [(box[axis], length - box[axis] - box[axis + 2]) for box in boxes]
        assert min(map(min, rests)) == 0, "it may touch an edge"
        assert np.mean([before > 2 for before, _ in rests]) > 0.2
        assert np.mean([after > 2 for _, after in rests]) > 0.2


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
    files = pictures_in(folder, 16)
    item = files[(1, 0)]
    assert files.name(item["index"]) == f"{folder}/2.png"
    assert item["unreadable"] == [f"{folder}/1.png"]


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


def shape_without_bars(image):
    return data.crop_white_bars(data.decode(encoded(image, "png"))).shape


def test_white_bars_are_cut_in_pairs_only():
    assert shape_without_bars(letterboxed(10, 11)) == (3, 43, 64)
    assert shape_without_bars(letterboxed(0, 0, 12, 12)) == (3, 64, 40)
    assert shape_without_bars(letterboxed(9, 9, 12, 12)) == (3, 46, 40)
    for same in (letterboxed(0, 0), letterboxed(20, 0), letterboxed(20, 5), letterboxed(0, 0, 9)):
        assert shape_without_bars(same) == (3, 64, 64)
    assert shape_without_bars(Image.new("RGB", (8, 8), "white")) == (3, 8, 8)


def test_white_bars_of_a_jpeg_and_in_a_data_set(tmp_path):
    letterboxed(16, 16).save(tmp_path / "a.jpg", quality=80)
    image = data.decode((tmp_path / "a.jpg").read_bytes())
    assert abs(data.crop_white_bars(image).shape[1] - 32) <= 2
    kept = pictures_in(tmp_path, 64, 1.0)[(0, 0)]["image"]
    cut = pictures_in(tmp_path, 64, 1.0, crop_white=True)[(0, 0)]["image"]
    assert data.as_floats(kept).mean() > 0.65 and data.as_floats(cut).mean() < 0.45


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
    names = [*first["name"], *second["name"]][:6]
    assert sorted(names) == sorted(files.source.files)
    assert first["image"].dtype == torch.uint8


class Named(torch.utils.data.Dataset):
    """As a user's own data set: floats, and a name in every item."""

    def __len__(self):
        return 3

    def __getitem__(self, key):
        return {"image": torch.rand(3, 4, 4), "name": f"picture {key[0]}"}


def test_names_are_looked_up_when_they_are_read(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(data.FileList, "name", lambda self, i: asked.append(i) or f"file {i}")
    files = pictures_in(write_images(tmp_path, 4), 16)
    batch = next(data.batches(files, data.MicroBatches(4, data.Share(4, 4))))
    assert not asked and ", ".join(batch["name"]) == ", ".join(f"file {i}" for i in batch["index"])
    assert sorted(asked) == [0, 1, 2, 3]
    batch = next(data.batches(Named(), data.MicroBatches(3, data.Share(3, 3))))
    assert sorted(batch["name"]) == ["picture 0", "picture 1", "picture 2"]


def test_cache_returns_the_same_images_and_what_was_encoded(tmp_path):
    files = pictures_in(write_images(tmp_path, 5), 16)
    cache = data.CachedPictures(files, lambda x: {"mean_color": x.mean((2, 3))}, chunk=2)
    assert len(cache) == 5
    for i in range(5):
        item, original = cache[(i, 7)], files[(i, 0)]
        assert torch.equal(item["image"], original["image"])
        color = data.as_floats(original["image"]).mean((1, 2))
        assert torch.allclose(item["cached"]["mean_color"], color)
        assert item["name"] == files.name(i)
    batch = data.collate([cache[(i, 0)] for i in (3, 1)])
    assert torch.equal(batch["cached"]["mean_color"], cache.cached["mean_color"][[3, 1]])


def test_cache_of_floats_holds_bytes_and_loses_nothing_that_bytes_hold():
    """As of toy scenes, which are bytes divided by 255: the very same floats come back."""

    class Scenes(Named):
        def __getitem__(self, key):
            values = torch.arange(48).reshape(3, 4, 4).add(key[0] * 100).to(torch.uint8)
            return {"image": values.float() / 255, "name": f"scene {key[0]}"}

    cache = data.CachedPictures(Scenes(), lambda x: {"x": x})
    for i in range(3):
        assert cache[(i, 0)]["image"].dtype == torch.uint8
        assert torch.equal(data.as_floats(cache[(i, 0)]["image"]), Scenes()[(i, 0)]["image"])
        assert torch.equal(cache[(i, 0)]["cached"]["x"], Scenes()[(i, 0)]["image"])
    assert cache.names == ["scene 0", "scene 1", "scene 2"]
