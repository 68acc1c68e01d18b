"""Tar shards that were made to hurt, among good ones: what they claim is not believed, what they
are is not waited for, and the others are used."""

import io
import os
import struct
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
from test_shards import picture, samples, write_tar

from training import shards


def header(name, size=0, kind=b"0"):
    """512 bytes as tar wants them; a size that does not fit is written as a binary number."""
    number = b"%011o\0" % size if 0 <= size < 8**11 else (
        bytes([0xFF if size < 0 else 0x80]) + (size % 256**11).to_bytes(11, "big"))  # fmt: skip
    block = bytearray(512)
    block[:100] = name.encode()[:100].ljust(100, b"\0")
    block[100:124] = b"0000644\0" * 3
    block[124:136] = number
    block[136:148] = b"%011o\0" % 0
    block[156:157] = kind
    block[257:265] = b"ustar\00000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content):
    return content + bytes(-len(content) % 512)


def good(name="good.jpg"):
    return header(name, len(picture(1))) + padded(picture(1))


def pax(**said):
    """A pax header that says this of the member behind it."""
    content = b""
    for key, value in said.items():
        record = f" {key.replace('_', '.')}={value}\n".encode()
        length = next(n for n in range(999) if len(str(n)) + len(record) == n)
        content += str(length).encode() + record
    return header("PaxHeader", len(content), b"x") + padded(content)


END = bytes(1024)
HOSTILE = {
    "a long name of 2^62 bytes": good() + header("././@LongLink", 2**62, b"L") + END,
    "a long name of 2^70 bytes": good() + header("././@LongLink", 2**70, b"L") + END,
    "a pax header of 2^62 bytes": good() + header("PaxHeader", 2**62, b"x") + END,
    "a global pax header of 2^70 bytes": good() + header("PaxHeader", 2**70, b"g") + END,
    "a picture of 2^62 bytes": good() + header("x.jpg", 2**62) + END,
    "a picture of 2^70 bytes": good() + header("x.jpg", 2**70) + END,
    "a caption of 2^70 bytes": good() + header("x.txt", 2**70) + END,
    "a negative size": good() + header("x.txt", -1024) + good("y.jpg") + END,
    "a size in pax": good() + pax(size=2**62) + header("x.jpg", 3) + END,
    "a huge size in pax": good() + pax(size=2**70) + header("x.txt", 3) + END,
    "words in pax": good() + pax(size="many") + header("x.jpg", 3) + END,
    "no size in pax": good() + header("P", 28, b"x") + padded(b"99999999999999999 =") + END,
    "long names without end": good() + 3000 * (header("@LongLink", 1, b"L") + padded(b"x")) + END,
    "a sparse map without end": good() + pax(GNU_sparse_major=1, GNU_sparse_minor=0)
    + header("x.jpg", 1 << 22) + padded(b"9" * 15 + b"\n") + b"0\n" * (1 << 21) + END,
    "words": b"no tar at all" * 1000,
    "zeros": bytes(10240),
    "nothing": b"",
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_one_hostile_shard_ends_no_run_in_which_others_are_good(tmp_path, what):
    write_tar(tmp_path / "0.tar", samples(0, 3))
    (tmp_path / "1.tar").write_bytes(HOSTILE[what])
    write_tar(tmp_path / "2.tar", samples(10, 2))
    tracemalloc.start()
    index = shards.ShardIndex(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    counts = np.bincount(index.shard, minlength=3).tolist()
    before = HOSTILE[what].startswith(b"good.jpg")
    assert counts[0] == 3 and counts[2] == 2 and counts[1] >= before
    assert peak < 30e6
    if counts[1] < 2:
        assert len(index.problems) == 1 and "1.tar" in index.problems[0]
    assert all(isinstance(index.read(i), bytes) for i in range(len(index)))


def test_a_long_name_of_three_gigabytes_is_not_read(tmp_path):
    """They are really there, as holes: tarfile alone would take them into memory."""
    with open(tmp_path / "0.tar", "wb") as file:
        file.write(good() + header("././@LongLink", 3 << 30, b"L"))
        file.truncate(4 << 30)
    write_tar(tmp_path / "1.tar", samples(0, 1))
    index = shards.ShardIndex(tmp_path)
    assert len(index) == 2 and "a header of more than 1 MB" in index.problems[0]


def test_a_picture_of_three_gigabytes_is_skipped_and_said(tmp_path):
    with open(tmp_path / "0.tar", "wb") as file:
        file.write(good() + header("large.jpg", 3 << 30))
        file.truncate(1024 + len(padded(picture(1))) + (3 << 30))
        file.seek(0, os.SEEK_END)
        file.write(good("after.jpg") + END)
    index = shards.ShardIndex(tmp_path)
    assert [index.name(i).rpartition("/")[2] for i in range(2)] == ["good.jpg", "after.jpg"]
    assert index.problems == [f"{tmp_path}/0.tar; 1 pictures of more than 512 MB are skipped"]
    assert len(shards.ShardIndex(tmp_path)) == 2, "and the index of it is read again"


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "nowhere.tar").symlink_to(tmp_path / "gone")
    (tmp_path / "circle.tar").symlink_to(tmp_path / "circle.tar")
    write_tar(tmp_path / "good.tar", samples(0, 2))
    index = shards.ShardIndex(tmp_path)
    assert len(index) == 2 and len(index.problems) == 4


def test_names_of_any_bytes_are_read_and_shown(tmp_path):
    name = os.fsdecode(b"\xff\x1b[2J.jpg")
    with tarfile.open(tmp_path / os.fsdecode(b"caf\xe9.tar"), "w", format=tarfile.GNU_FORMAT,
                      errors="surrogateescape") as tar:  # fmt: skip
        member = tarfile.TarInfo(name)
        member.size = len(picture(1))
        tar.addfile(member, io.BytesIO(picture(1)))
    index = shards.ShardIndex(tmp_path)
    assert index.read(0) == picture(1)
    assert index.name(0) == f"{tmp_path}/caf\\udce9.tar/\\udcff\\x1b[2J.jpg"


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("{9..0}.tar", "{9..0} counts down: write {0..9}"),
        ("{0..1000000000000}.tar", "stands for more than 1,000,000 shards"),
        ("{0.." + "9" * 5000 + "}.tar", "stands for more than"),
        ("{0..9999}{0..9999}.tar", "stands for more than"),
        ("{a,b}" * 40 + ".tar", "stands for more than"),
        ("{a}" * 5000 + ".tar", "stands for more than"),
        ("\x1b[2J{0..1}.tar", r"\x1b[2J0.tar"),
    ],
)
def test_braces_of_nonsense_are_a_line(tmp_path, pattern, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        shards.find_shards(f"{tmp_path}/{pattern}")
    assert message in str(error.value) and len(str(error.value)) < 400
    assert len(shards.expand_braces("{0..999}{0..999}")) == 1_000_000


# -- the index file ------------------------------------------------------------------------------
@pytest.fixture
def known(tmp_path):
    """A folder with an index, and that file."""
    write_tar(tmp_path / "0.tar", samples(0, 3))
    shards.ShardIndex(tmp_path)
    [file] = tmp_path.glob(".pictures-*.npz")
    return tmp_path, file


class Evil:
    def __reduce__(self):
        return (os.mkdir, (os.environ["CANARY"],))


GOOD = {"shard": np.zeros(3, np.int32), "offset": np.array([512, 4096, 8192]),
        "size": np.array([9, 9, 9], np.int32),
        "problems": np.frombuffer(b"[]", np.uint8)}  # fmt: skip
FALSE = {
    "objects": {"offset": np.array([Evil(), 0, 0], dtype=object)},
    "other lengths": {"offset": np.array([512])},
    "a shard that is not there": {"shard": np.array([0, 1, 0], np.int32)},
    "negative": {"offset": np.array([512, -4096, 8192])},
    "too large a picture": {"size": np.array([9, 2**31 - 1, 9], np.int32)},
    "broken numbers": {"offset": np.array([0.5, 1, 2])},
    "tables": {name: GOOD[name][:, None] for name in ("shard", "offset", "size")},
    "no list": {"problems": np.frombuffer(b'{"a": 1}', np.uint8)},
    "no texts": {"problems": np.frombuffer(b"[1]", np.uint8)},
    "brackets": {"problems": np.frombuffer(b"[" * 100_000, np.uint8)},
}


@pytest.mark.parametrize("what", FALSE)
def test_an_index_that_says_nonsense_is_made_again(known, monkeypatch, what):
    folder, file = known
    monkeypatch.setenv("CANARY", str(folder / "it-ran"))
    assert shards.read_index(file, 1)["size"].tolist() and shards.read_index(file, 1)
    np.savez(file, **{**GOOD, **FALSE[what]})
    assert shards.read_index(file, 1) is None
    index = shards.ShardIndex(folder)
    assert len(index) == 3 and index.read(2) == picture(2)
    assert not (folder / "it-ran").exists()


def test_an_index_that_is_a_bomb_is_not_unpacked(known):
    folder, file = known
    np.savez_compressed(file, **{**GOOD, "offset": np.zeros(20_000_000, np.int64)})
    tracemalloc.start()
    assert shards.read_index(file, 1) is None
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
    text = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }"
    with zipfile.ZipFile(file, "w") as parts:
        parts.writestr("offset.npy", header + text.ljust(117) + b"\n")
    assert shards.read_index(file, 1) is None


def test_two_hundred_changed_bits_of_an_index_are_noticed_or_change_nothing(known):
    folder, file = known
    content, found = file.read_bytes(), shards.ShardIndex(folder)
    for bit in range(0, 8 * len(content), 8 * len(content) // 200):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        again = shards.ShardIndex(folder)
        assert np.array_equal(again.offset, found.offset) and again.problems == found.problems
        assert np.array_equal(again.size, found.size) and np.array_equal(again.shard, found.shard)


def test_what_an_index_says_of_problems_is_shown_with_care(known):
    folder, file = known
    np.savez(file, **{**GOOD, "problems": np.frombuffer(b'["\\u001b[2J"]', np.uint8)})
    assert shards.ShardIndex(folder).problems == ["\\x1b[2J"]


def test_a_full_disk_leaves_no_half_index(tmp_path, monkeypatch):
    write_tar(tmp_path / "0.tar", samples(0, 1))

    def savez(path, **arrays):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", savez)
    assert len(shards.ShardIndex(tmp_path, cache=tmp_path)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["0.tar"]


def test_somebody_elses_temporary_folder_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.tempfile, "tempdir", str(tmp_path))
    mine = shards.temporary_folder()
    assert mine == shards.temporary_folder() and mine.stat().st_mode & 0o77 == 0
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    (tmp_path / f"genhancer-{owner + 1}").mkdir()
    assert shards.temporary_folder() != tmp_path / f"genhancer-{owner + 1}"
