"""Pictures that were made to hurt, or were damaged until they do: each is read, or is unreadable
and named, in training and in evaluation; none runs a program, ends a run or waits for ever."""

import io
import os
import stat
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

import data
from evaluation.encoder import check_pictures, open_picture

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n20 20 scale\nshowpage\n"


def encoded(image, kind="jpeg", **how):
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def noise(size=(24, 16), mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def in_training(folder, *contents):
    """What the second of two pictures, which is good, stands in for."""
    for number, content in enumerate(contents):
        (folder / f"{number}.jpg").write_bytes(content)
    (folder / f"{len(contents)}.jpg").write_bytes(encoded(noise()))
    files = data.Pictures(data.FileList(data.find_images(folder)), 8)
    return files[(0, 0)]["unreadable"]


# -- formats -------------------------------------------------------------------------------------
def test_a_jpg_that_is_postscript_starts_no_ghostscript(tmp_path, monkeypatch):
    """Pillow would call `gs`, found on the path, to draw it."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/it-ran\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    (tmp_path / "pictures").mkdir()
    assert len(in_training(tmp_path / "pictures", EPS)) == 1
    for decode in (True, False):
        with pytest.raises(ValueError, match="picture .*0.jpg cannot be read"):
            open_picture(tmp_path / "pictures" / "0.jpg", decode)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp", "gif"])
def test_the_content_tells_the_format_and_not_the_suffix(tmp_path, kind):
    content = encoded(noise(), kind)
    assert data.decode(content).shape == (3, 16, 24)
    (tmp_path / "x.jpg").write_bytes(content)
    assert open_picture(tmp_path / "x.jpg").size == (24, 16)
    check_pictures([tmp_path / "x.jpg"])


@pytest.mark.parametrize("kind", ["tiff", "ico", "tga", "ppm", "dds", "pcx"])
def test_any_other_format_is_unreadable(tmp_path, kind):
    assert len(in_training(tmp_path, encoded(noise(), kind))) == 1


def test_nothing_opens_a_picture_of_any_format():
    """Every Image.open of the project goes through data.opened."""
    from conftest import ROOT

    for file in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")]:
        for line in file.read_text(encoding="utf-8").splitlines():
            if "Image.open(" in line and file.parent.name != "tests":
                assert "formats=" in line, f"{file}: {line}"


# -- exceptions ----------------------------------------------------------------------------------
KINDS = [TypeError, struct.error, RuntimeError, NotImplementedError, KeyError, ZeroDivisionError,
         RecursionError, AssertionError, EOFError]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_decoder_raises_the_picture_is_unreadable(tmp_path, monkeypatch, kind):
    def load(self):
        raise kind("of a decoder")

    monkeypatch.setattr(data, "decode_jpeg", None)
    (tmp_path / "0.jpg").write_bytes(encoded(noise()))
    good = data.decode(encoded(noise()))
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    files = data.Pictures(data.FileList(data.find_images(tmp_path)), 8)
    with pytest.raises(ValueError, match=rf"0.jpg on \(the last: {kind.__name__}: .?of a decoder"):
        files[(0, 0)]
    with pytest.raises(ValueError, match="0.jpg cannot be read"):
        open_picture(tmp_path / "0.jpg")
    assert good.shape == (3, 16, 24)


def test_a_full_memory_is_not_the_pictures_fault(tmp_path, monkeypatch):
    """Another picture in its place would make another run of it, and nobody would know."""
    monkeypatch.setattr(data, "decode", lambda encoded: (_ for _ in ()).throw(MemoryError))
    (tmp_path / "0.jpg").write_bytes(encoded(noise()))
    files = data.Pictures(data.FileList(data.find_images(tmp_path)), 8)
    with pytest.raises(MemoryError):
        files[(0, 0)]
    share = data.Share(global_batch=1, micro_batch=1)
    for workers in (0, 1):
        with pytest.raises(ValueError, match="not enough memory"):
            next(data.batches(files, data.MicroBatches(1, share), workers))


@pytest.mark.parametrize("kind", [TypeError, struct.error, SyntaxError, KeyError])
def test_where_exif_alone_fails_the_picture_stays_as_it_is(monkeypatch, kind):
    def getexif(self):
        raise kind("of EXIF")

    exif = Image.Exif()
    exif[data.ORIENTATION] = 6
    content = encoded(noise(), exif=exif)
    assert data.decode(content).shape == (3, 24, 16)
    monkeypatch.setattr(Image.Image, "getexif", getexif)
    assert data.decode(content).shape == (3, 16, 24)
    assert data.load_rgb(io.BytesIO(content)).size == (24, 16)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_every_orientation_is_turned_as_pillow_does(kind):
    for number in range(10):
        exif = Image.Exif()
        exif[data.ORIENTATION] = number
        content = encoded(noise(), kind, exif=exif)
        want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
        assert np.array_equal(np.asarray(data.load_rgb(io.BytesIO(content))), want), number
        assert np.array_equal(data.decode(content).permute(1, 2, 0).numpy(), want), number


def test_a_cut_png_is_not_taken_for_whole_because_its_exif_was_looked_for():
    """Pillow reads the pixels to come to the EXIF behind them; a second reading of a damaged file
    gives what was decoded so far, without a word."""
    content = encoded(noise((200, 200)), "png")
    with pytest.raises(OSError, match="truncated"):
        data.decode(content[: len(content) // 2])


# -- sizes ---------------------------------------------------------------------------------------
def png_of(width, height):
    """The head of a PNG of that size, with one row of pixels' worth of data."""
    import zlib

    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("size", [(60_000, 60_000), (13_000, 13_000), (2**31 - 1, 1)])
def test_bombs_are_unreadable_before_a_pixel_is_decoded(tmp_path, monkeypatch, size):
    """Pillow refuses 179 million pixels; between 90 and those it warns, and decodes them."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (tmp_path / "0.jpg").write_bytes(png_of(*size))
        files = data.Pictures(data.FileList(data.find_images(tmp_path)), 8)
        with pytest.raises(ValueError, match="cannot be read"):
            files[(0, 0)]
        with pytest.raises(ValueError, match="0.jpg cannot be read"):
            check_pictures([tmp_path / "0.jpg"])


def test_a_huge_file_a_pipe_and_a_folder_are_unreadable_at_once(tmp_path):
    """A list may name anything; a pipe that nobody writes to would be waited for for ever."""
    names = ["huge.jpg", "pipe.jpg", "folder.jpg", "gone.jpg", "good.jpg"]
    (tmp_path / "good.jpg").write_bytes(encoded(noise()))
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(1 << 40)  # of holes
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    item = data.Pictures(data.FileList([tmp_path / name for name in names]), 8)[(0, 0)]
    assert [name.rpartition("/")[2] for name in item["unreadable"]] == names[:-1]


# -- names ---------------------------------------------------------------------------------------
def test_a_list_may_name_what_is_no_unicode(tmp_path):
    name = os.fsdecode(b"caf\xe9 \x1b[31m.png")
    noise().save(tmp_path / name, "png")
    (tmp_path / "list.txt").write_bytes(os.fsencode(name) + b"\n")
    files = data.Pictures(data.FileList(data.find_images(tmp_path / "list.txt")), 8)
    assert files[(0, 0)]["unreadable"] == []
    assert files.name(0) == f"{tmp_path}/caf\\udce9 \\x1b[31m.png"
    files.name(0).encode()


def test_names_are_shown_with_what_moves_a_cursor_escaped():
    assert data.printable("été 文 a b.jpg") == "été 文 a b.jpg"
    assert data.printable("\x1b[2J\r\n\u202egpj") == "\\x1b[2J\\r\\n\\u202egpj"


# -- anything ------------------------------------------------------------------------------------
def test_hundreds_of_mutated_pictures_end_no_run(tmp_path):
    """Of every kind that Pillow writes, cut, overwritten and spliced: a good one follows each."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[data.ORIENTATION] = 6
    kinds = "jpeg", "png", "webp", "gif", "bmp", "tiff", "dds"
    turned = {kind: {"exif": exif} for kind in kinds[:3]}
    seeds = [encoded(noise(), kind, **turned.get(kind, {})) for kind in kinds]
    seeds += [encoded(noise(mode="CMYK")), encoded(noise(mode="P"), "png"), EPS]

    class Memory:
        def __init__(self, contents):
            self.contents = contents

        def __len__(self):
            return len(self.contents)

        def name(self, index):
            return str(index)

        def read(self, index):
            return self.contents[index]

    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for trial in range(400):
            content = bytearray(seeds[trial % len(seeds)])
            for place in rng.integers(len(content), size=rng.integers(1, 9)):
                content[place] = rng.integers(256)
            if trial % 5 == 0:
                content = content[: rng.integers(len(content))]
            pair = Memory([bytes(content), encoded(noise())])
            item = data.Pictures(pair, 8, crop_white=True)[(0, 0)]
            assert item["image"].shape == (3, 8, 8) and item["image"].dtype == torch.uint8
            refused += bool(item["unreadable"])
    assert 80 < refused < 380


# -- folders of classes --------------------------------------------------------------------------
def test_classes_may_hold_and_be_called_anything(tmp_path):
    """What is no file is passed over; a name that is no Unicode is a class like any other."""
    from eval_zeroshot import read_classes

    for name in (b"caf\xe9", b"a_\x1b[2J", b"plain"):
        folder = tmp_path / os.fsdecode(name)
        folder.mkdir()
        noise().save(folder / "0.png")
    os.mkfifo(folder / "1.jpg")
    (folder / "2.jpg").mkdir()
    (folder / "3.jpg").symlink_to("3.jpg")
    (folder / "again").symlink_to(folder)
    found = read_classes(str(tmp_path), "")
    assert sorted(found.names) == ["a \\x1b[2J", "caf\\udce9", "plain"]
    assert len(found.pictures) == 3
    check_pictures(found.pictures)
