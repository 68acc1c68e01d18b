"""Damaged pictures, tens of thousands of them, on the way that training takes.

One in three million pictures is enough to end a run of a week, if its decoder raises what nobody
thought of. So valid small pictures of every format and mode that Pillow writes are damaged as
disks, networks and jokers do (`damaged`), and each is asked of `data.Pictures`. It must come back
as a picture, or be named as unreadable while the next one stands in for it. Nothing is raised.

    python tests/storm/pictures.py 7 250            the 250 pictures of seed 7, in this process
"""

import io
import random
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.storm.table import Case  # noqa: E402

CASES, AT_ONCE = 84, 250  # 21 000 pictures
SLOWEST = 20.0  # seconds for one small file; a decoder that takes longer holds up a training


def cases(forks, folder: Path) -> list[Case]:
    """As __init__.py has it; a case is a seed."""

    def case(seed: int) -> Case:
        def check(forks, here: Path) -> None:
            line = ["tests/storm/pictures.py", seed, AT_ONCE]
            ended = forks.run(line, here / "said.txt", limit_s=300, memory_gb=2)
            assert not ended.hung and ended.memory_gb < 2, f"{ended.memory_gb:.1f} GB, {ended.said}"
            assert ended.code == 0, ended.lines[-1] if ended.lines else f"code {ended.code}"

        return Case(
            "damaged pictures on the way to training: each is read, or named and replaced",
            f"seed {seed}",
            check,
            AT_ONCE,
        )

    return [case(seed) for seed in range(CASES)]


# ------------------------------------------------------------------------------------------------
# Sound pictures
# ------------------------------------------------------------------------------------------------
def sound() -> dict[str, bytes]:
    """Name → file, of every format and mode that this Pillow can write."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (26, 34, 4), dtype=np.uint8)
    pixels[:9] = 200  # something to compress
    full = Image.fromarray(pixels, "RGBA")
    ways = {
        "JPEG": (("RGB", {}), ("L", {}), ("CMYK", {}), ("RGB", {"progressive": True}),
                 ("RGB", {"exif": exif(3)}), ("RGB", {"exif": exif(6), "comment": b"c"})),
        "PNG": (("RGB", {}), ("RGBA", {}), ("LA", {}), ("P", {}), ("1", {}), ("I;16", {}),
                ("P", {"transparency": b"\0\7\200"}), ("RGB", {"exif": exif(8), "dpi": (9, 9)})),
        "WEBP": (("RGB", {}), ("RGBA", {"lossless": True}), ("RGB", {"exif": exif(5)})),
        "BMP": (("RGB", {}), ("P", {}), ("1", {}), ("RGBA", {})),
        "GIF": (("P", {}), ("RGB", {"save_all": True, "append_images": [full.convert("P")]})),
        "TIFF": (("RGB", {}), ("RGB", {"compression": "tiff_lzw"}), ("CMYK", {}), ("I;16", {}),
                 ("RGB", {"compression": "jpeg"}), ("L", {"exif": exif(2)}), ("F", {})),
        "AVIF": (("RGB", {}), ("RGBA", {}), ("RGB", {"exif": exif(7)})),
        "DDS": (("RGB", {}), ("RGBA", {}), ("RGBA", {"pixel_format": "DXT5"})),
        "ICO": (("RGBA", {}),), "JPEG2000": (("RGB", {}),), "PPM": (("RGB", {}), ("1", {})),
        "TGA": (("RGB", {}), ("RGBA", {"compression": "tga_rle"})), "PCX": (("P", {}),),
        "MPO": (("RGB", {"save_all": True, "append_images": [full.convert("RGB")]}),),
        "SGI": (("RGB", {}),), "QOI": (("RGB", {}),),
    }  # fmt: skip
    found = {}
    for kind, variants in ways.items():
        for number, (mode, options) in enumerate(variants):
            file, image = io.BytesIO(), full.convert("L" if mode == "I;16" else mode)
            image = (
                Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image
            )
            try:
                image.save(file, kind, **options)
            except Exception:  # this Pillow cannot: no library for it, or the mode is newer
                continue
            found[f"{kind} {mode} {number}"] = file.getvalue()
    return found


def exif(orientation: int) -> bytes:
    """Entries of several types, an orientation among them."""
    from PIL import Image

    tags = Image.Exif()
    tags[0x0112], tags[0x010F], tags[0x011A] = orientation, "a camera", 72.0
    tags.get_ifd(0x8769)[0x9003] = "2020:02:02 02:02:02"
    tags.get_ifd(0x8825)[2] = (0.5, 3.25, 5.0)
    return tags.tobytes()


# ------------------------------------------------------------------------------------------------
# Damaged ones
# ------------------------------------------------------------------------------------------------
LENGTHS = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """A file that is wrong in a way or three."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not data:
            return b""
        # Most of a picture is pixels, and any are valid: the head is where decoders go astray.
        near = rng.random() < 0.65
        place = rng.randrange(min(len(data), 400) if near else len(data))
        way = rng.randrange(8)
        if way <= 1:
            data[place] ^= 1 << rng.randrange(8)
        elif way == 2:
            data[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif way == 3:
            del data[place + (0 if near else 1) :]
        elif way == 4:  # a field of a length, in either order of bytes
            form = rng.choice(("<H", ">H", "<I", ">I"))
            number = rng.choice(LENGTHS) & (0xFFFF if form[1] == "H" else 0xFFFFFFFF)
            value = struct.pack(form, number)
            data[place : place + len(value)] = value
        elif way == 5:
            data[place : place + rng.randrange(1, 40)] = b""
        elif way == 6:  # a block twice, or of zeros
            block = data[place : place + rng.randrange(1, 64)]
            data[place:place] = block if rng.random() < 0.5 else bytes(len(block))
        else:
            for _ in range(rng.randrange(2, 12)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    # A wrong checksum would be all that a reader of PNGs sees.
    if whole.startswith(b"\x89PNG") and rng.random() < 0.8:
        return sealed(bytes(data))
    return bytes(data)


def sealed(data: bytes) -> bytes:
    """A PNG with the checksums that its blocks ask for."""
    out, place = bytearray(data[:8]), 8
    while place + 8 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        end = place + 8 + length
        if end + 4 > len(data):
            break
        out += data[place:end] + struct.pack(">I", zlib.crc32(data[place + 4 : end]))
        place = end + 4
    return bytes(out + data[place:])


def series(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """The damaged pictures of a seed, with the name of what each was."""
    files, rng = sorted(sound().items()), random.Random(seed)
    for number in range(count):
        name, whole = files[rng.randrange(len(files))]
        yield f"{seed}:{number} {name}", damaged(whole, rng)


# ------------------------------------------------------------------------------------------------
# The way that training takes
# ------------------------------------------------------------------------------------------------
class Between:
    """A source of damaged pictures, each followed by a sound one that can stand in for it."""

    def __init__(self, pictures: list[tuple[str, bytes]], good: bytes):
        self.pictures, self.good = pictures, good

    def __len__(self) -> int:
        return 2 * len(self.pictures)

    def name(self, index: int) -> str:
        return f"good {index}" if index % 2 else self.pictures[index // 2][0]

    def read(self, index: int) -> bytes:
        return self.good if index % 2 else self.pictures[index // 2][1]


def wrong_with(pictures: list[tuple[str, bytes]], folder: Path | None = None) -> list[str]:
    """What goes wrong with which picture, a line each.

    Args: folder: every tenth goes through an evaluation's eyes too, as a file of that folder.
    """
    import torch

    from data import Pictures

    source = Between(pictures, sound()["PNG RGB 0"])
    dataset, found = Pictures(source, 32, 0.5, crop_white=True), []
    for number, (name, data) in enumerate(pictures):
        start = time.monotonic()
        try:
            item = dataset[(2 * number, 0)]
            image, unreadable = item["image"], list(item["unreadable"])
            assert image.dtype is torch.uint8 and image.shape == (3, 32, 32), "is no picture"
            stands_in = item["index"] == 2 * number + 1
            assert unreadable == [name] * stands_in, f"said: {unreadable}"
            if folder and number % 10 == 0:
                judged(folder / "picture.jpg", data)
        except BaseException as error:
            said = " ".join(str(error).split())[:120]
            found.append(f"{name}: {type(error).__name__}: {said} in {place_of(error)}")
        if time.monotonic() - start > SLOWEST:
            found.append(f"{name}: takes {time.monotonic() - start:.0f} s")
    return found


def judged(file: Path, data: bytes) -> None:
    """Evaluations may refuse a picture, with a line of their own."""
    from evaluation.encoder import check_pictures, open_picture

    file.write_bytes(data)
    try:
        check_pictures([file])
        open_picture(file)
    except ValueError as error:
        assert str(file) in str(error), f"a line that names no file: {error}"


def place_of(error: BaseException) -> str:
    """The innermost place in this repository."""
    frame, last = error.__traceback__, ""
    while frame:
        file = Path(frame.tb_frame.f_code.co_filename)
        last = f"{file.name}:{frame.tb_lineno}" if file.is_relative_to(ROOT) else last
        frame = frame.tb_next
    return last


def main() -> None:
    """Prints what went wrong; exit code 1 if anything did."""
    import tempfile

    warnings.simplefilter("ignore")  # Pillow's, on every second picture
    seed, count = map(int, sys.argv[1:3])
    with tempfile.TemporaryDirectory() as folder:
        found = wrong_with(list(series(seed, count)), Path(folder))
    print(f"{len(sound())} formats and modes, {count} pictures")
    if found:
        print(*found, f"{len(found)} wrong, the first: {found[0]}", sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
