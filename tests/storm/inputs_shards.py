"""Tar shards that lie, and indices of shards that somebody forged."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from .inputs import ACCEPTED, EITHER, Input
from .inputs_json import PHOTOS


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar header with its checksum, whatever it says."""
    block = bytearray(512)
    for place, value in ((0, name[:100]), (100, b"0000644\0"), (124, size), (156, kind),
                         (257, b"ustar\x0000")):  # fmt: skip
        block[place : place + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def size_of(number: int) -> bytes:
    """A size in base 256, as GNU writes what octal digits cannot say."""
    return b"\x80" + number.to_bytes(11, "big", signed=number < 0)


def pax(size: str) -> bytes:
    """A pax header that gives the next member another size."""
    text = f" size={size}\n"
    count = len(text) + len(str(len(text) + 2))
    body = f"{count}{text}".encode()
    return header(b"pax", b"%011o\0" % len(body), b"x") + body.ljust(512, b"\0")


def shards(good: bytes) -> dict[str, bytes]:
    """Hostile tars by name."""
    end, octal = bytes(1024), b"%011o\0"
    body = good.removesuffix(bytes(1024)).rstrip(b"\0")
    body += bytes(-len(body) % 512)
    found = {"empty": b"", "zeros": bytes(10240), "text": b"no tar" * 200, "cut": good[:700]}
    for power in (31, 32, 40, 62, 63, 64, 70, 80):
        number = size_of(2**power)
        long = header(b"././@LongLink", number, b"L")
        found[f"2^{power} as a picture"] = header(b"a.png", number) + body + end
        found[f"2^{power} as a long name"] = long + header(b"a.png", octal % 5) + body + end
        found[f"2^{power} as a long link"] = header(b"././@LongLink", number, b"K") + body + end
        found[f"2^{power} as a pax header"] = header(b"pax", number, b"x") + body + end
        found[f"2^{power} in a pax header"] = pax(str(2**power)) + header(b"a.png", octal % 5) + end
        found[f"2^{power} as a global header"] = header(b"pax", number, b"g") + body + end
        found[f"2^{power} as a sparse file"] = header(b"a.png", number, b"S") + body + end
    for size in ("-1", "-5", "nan", "1e9", "", "9" * 5000, "٣"):
        found[f"pax size {size[:9]}"] = pax(size) + header(b"a.png", octal % 5) + bytes(512) + end
    for name in (
        b"\xff\xfe.png",
        b"../../a.png",
        b"/etc/a.png",
        b"\x1b[31m.png",
        b"a\nb.png",
        b".png",
    ):
        found[f"name {name!r}"] = header(name, octal % 0) + body + end
    found["size of letters"] = header(b"a.png", b"zzzzzzzzzzz\0") + body + end
    found["negative size"] = header(b"a.png", size_of(-512)) + body + end
    found["picture of no bytes"] = header(b"a.png", octal % 0) + end
    found["a member of three GB"] = header(b"a.png", octal % (3 << 30)) + end
    found["link as a picture"] = header(b"a.png", octal % 0, b"2") + body + end
    found["a million headers"] = header(b"a.txt", octal % 0) * 100_000 + end
    found["gzip"] = b"\x1f\x8b\x08" + bytes(1000)
    return found


def shard_cases(world: Path) -> Iterator[Input]:
    """A hostile shard beside a good one (the run goes on) and alone; and hostile index files."""
    good = (world / "shards" / "0.tar").read_bytes()
    for what, content in shards(good).items():
        for beside in (True, False):

            def prepare(here: Path, world: Path, content=content, beside=beside) -> None:
                (here / "shards").mkdir()
                (here / "shards" / "1.tar").write_bytes(content)
                if beside:
                    shutil.copy(world / "shards" / "0.tar", here / "shards")

            wanted = ACCEPTED if beside else EITHER
            name = f"shard{' beside a good one' * beside}: {what}"
            yield Input(name, (*PHOTOS, "--data", "{here}/shards"), prepare, wanted)

    def odd(make: Callable[[Path], None]) -> Callable[[Path], None]:
        def prepare(here: Path, world: Path) -> None:
            shutil.copytree(world / "shards", here / "shards")
            make(here / "shards")

        return prepare

    def sparse(shards: Path) -> None:
        with open(shards / "1.tar", "wb") as file:
            file.write(header(b"a.png", b"%011o\0" % (3 << 30)))
            file.truncate((3 << 30) + 2048)

    ways = {
        "a pipe": lambda shards: os.mkfifo(shards / "1.tar"),
        "a folder": lambda shards: (shards / "1.tar").mkdir(),
        "a loop": lambda shards: (shards / "1.tar").symlink_to("1.tar"),
        "a link to nothing": lambda shards: (shards / "1.tar").symlink_to("nowhere"),
        "a device": lambda shards: (shards / "1.tar").symlink_to("/dev/zero"),
        "a name beyond UTF-8": lambda shards: shutil.copy(shards / "0.tar", shards / "\udcff.tar"),
        "three GB that are there": sparse,
    }
    for what, make in ways.items():
        yield Input(f"shard is {what}", (*PHOTOS, "--data", "{here}/shards"), odd(make))
    yield from index_cases(odd)


def index_cases(odd: Callable) -> Iterator[Input]:
    """Index files that a scan finds instead of its own."""
    from training.shards import digest

    def forged(arrays: dict) -> Callable[[Path], None]:
        def make(shards: Path) -> None:
            stamps = [(s.name, s.stat().st_size, s.stat().st_mtime_ns) for s in [shards / "0.tar"]]
            np.savez(shards / f".pictures-{digest(stamps)}.npz", **arrays)

        return odd(make)

    n, problems = np.arange(4), np.frombuffer(b"[]", np.uint8)
    good = {"shard": n.astype(np.int32) * 0, "offset": n * 512, "size": n + 1, "problems": problems}
    wrong = {
        "shard": (n + 9, n - 9, n * 0.5, n[:2], n[None], np.array(0), n.astype(bool),
                  n.astype(str)),
        "offset": (n - 5, n + 2**62, n * np.nan, n[:1], n[:, None], n.astype(complex)),
        "size": (n - 9, n + 2**40, n + 2**62, n + np.inf, n[:3], n.astype("S4")),
        "problems": (n, np.frombuffer(b"{}", np.uint8), np.frombuffer(b"[1", np.uint8),
                     np.frombuffer(b"[1, null, {}]", np.uint8), np.zeros(0, np.uint8),
                     np.frombuffer(b"[" * 99_999, np.uint8),
                     np.frombuffer(b'["\\u001b[31m"]', np.uint8)),
    }  # fmt: skip
    for name, values in wrong.items():
        for number, value in enumerate(values):
            case = forged({**good, name: value})
            yield Input(f"index: {name} {number}", (*PHOTOS, "--data", "{here}/shards"), case)
    for name in good:
        case = forged({k: v for k, v in good.items() if k != name})
        yield Input(f"index: no {name}", (*PHOTOS, "--data", "{here}/shards"), case)
