"""shards.py: what is found in tar files, whatever state they are in, and how it is read back."""

import io
import itertools
import json
import multiprocessing
import os
import pickle
import tarfile
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from settings import Settings
from training import assemble, shards
from training.process import Process, wait_for_slowest

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "cc3m_style"


def picture(value, kind="jpeg"):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (value, 255 - value, 7)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, members):
    """members: (name, bytes)"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(start, count, kind="jpg"):
    for i in range(start, start + count):
        yield f"{i:07d}.{kind}", picture(i, {"jpg": "jpeg"}.get(kind, kind))
        yield f"{i:07d}.txt", b"a caption"
        yield f"{i:07d}.json", b"{}"


# -- patterns ------------------------------------------------------------------------------------
def test_braces():
    assert shards.expand_braces("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert shards.expand_braces("{x,y}{1..2}") == ["x1", "x2", "y1", "y2"]
    assert shards.expand_braces("{9..11}") == ["9", "10", "11"]
    assert shards.expand_braces("plain") == ["plain"]


def test_folder_glob_brace_and_single_file(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"{i:05d}.tar", samples(10 * i, 2))
    for source, count in (
        (tmp_path, 3),
        (f"{tmp_path}/*.tar", 3),
        (f"{tmp_path}/{{00001..00002}}.tar", 2),
        (f"{tmp_path}/00000.tar", 1),
    ):
        assert shards.is_shard_pattern(source)
        assert len(shards.find_shards(source)) == count
    odd = tmp_path / "a{b}[c]"
    odd.mkdir()
    assert shards.find_shards(write_tar(odd / "0.tar", samples(0, 1)).parent) == [odd / "0.tar"]
    with pytest.raises(FileNotFoundError, match=r"no tar shard .*00003\.tar"):
        shards.find_shards(f"{tmp_path}/{{00000..00003}}.tar")
    assert not shards.is_shard_pattern(tmp_path / "nothing")


# -- what counts as a picture --------------------------------------------------------------------
def test_any_order_any_kind_missing_keys(tmp_path):
    members = [("5.txt", b"first the caption"), ("5.JPG", picture(5)), ("9.json", b"{}")]
    members += [("2.webp", picture(2, "webp")), ("sub/2.png", picture(3, "png"))]
    members += [("7.jpeg", picture(7)), ("7.png", picture(8, "png")), ("8.gif", b"GIF")]
    members += [("5.seg.png", picture(6, "png")), ("9.mask.png", picture(7, "png"))]
    members += [("IMG.2020.jpg", picture(1)), ("._5.JPG", b"macOS"), ("IMG.2021.jpg", picture(2))]
    index = shards.ShardIndex(write_tar(tmp_path / "a.tar", members))
    found = [index.name(i).rpartition(".tar/")[2] for i in range(len(index))]
    dotted = ["IMG.2020.jpg", "IMG.2021.jpg"]
    assert found == ["5.JPG", "2.webp", "sub/2.png", "7.jpeg", *dotted], "one a key, in file order"
    want = [picture(5), members[3][1], members[4][1], picture(7), picture(1), picture(2)]
    assert [index.read(i) for i in range(6)] == want
    assert index.problems == []


def test_long_names_and_large_offsets_are_tarfiles_business(tmp_path):
    name = "x" * 180 + ".jpg"  # needs an extended header
    index = shards.ShardIndex(write_tar(tmp_path / "a.tar", [(name, picture(1))]))
    assert index.read(0) == picture(1)


def test_a_cut_an_empty_and_a_false_shard_are_reported_and_survived(tmp_path):
    whole = write_tar(tmp_path / "0.tar", samples(0, 4))
    content = whole.read_bytes()
    offsets, sizes, _ = shards.scan_shard(whole)
    (tmp_path / "1.tar").write_bytes(content[: offsets[2] + sizes[2] // 2])  # within a picture
    write_tar(tmp_path / "2.tar", [])
    (tmp_path / "3.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "4.tar").write_bytes(b"")
    write_tar(tmp_path / "5.tar", [("1.txt", b"words")])
    (tmp_path / "6.tar").write_bytes(content[: offsets[3] - 300])  # within a header
    index = shards.ShardIndex(tmp_path)
    assert np.bincount(index.shard, minlength=7).tolist() == [4, 2, 0, 0, 0, 0, 3]
    assert len(index.problems) == 6
    for number in range(1, 7):
        assert any(f"{number}.tar" in problem for problem in index.problems), number
    files = data.Pictures(index, 16)
    assert all(not files[(i, 0)]["unreadable"] for i in range(9))
    with pytest.raises(ValueError, match="no pictures in .*2.tar"):
        shards.ShardIndex(tmp_path / "2.tar")


def test_a_corrupt_picture_is_replaced_and_named(tmp_path):
    members = [("1.jpg", picture(1)), ("2.jpg", b"\xff\xd8 broken"), ("3.jpg", picture(3))]
    files = data.Pictures(shards.ShardIndex(write_tar(tmp_path / "a.tar", members)), 16)
    item = files[(1, 0)]
    assert files.name(item["index"]) == f"{tmp_path}/a.tar/3.jpg"
    assert item["unreadable"] == [f"{tmp_path}/a.tar/2.jpg"]


# -- the index file ------------------------------------------------------------------------------
def test_the_index_is_kept_and_made_anew_when_a_shard_changes(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", samples(0, 3))
    calls = []
    real = shards.scan_shard
    monkeypatch.setattr(shards, "scan_shard", lambda path: calls.append(path) or real(path))
    assert len(shards.ShardIndex(tmp_path)) == 3 and len(calls) == 1
    again = shards.ShardIndex(tmp_path)
    assert len(again) == 3 and len(calls) == 1 and again.read(2) == picture(2)
    write_tar(tmp_path / "a.tar", samples(0, 5))
    assert len(shards.ShardIndex(tmp_path)) == 5 and len(calls) == 2
    for file in tmp_path.glob(".pictures-*.npz"):
        file.write_bytes(b"damaged")
    assert len(shards.ShardIndex(tmp_path)) == 5 and len(calls) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_a_scan_that_was_killed_goes_on_where_it_was(tmp_path, monkeypatch, workers):
    for i in range(6):
        write_tar(tmp_path / f"{i}.tar", samples(10 * i, 1 + i))
    (tmp_path / "3.tar").write_bytes((tmp_path / "3.tar").read_bytes() + b"x")  # a problem to keep
    whole = shards.ShardIndex(tmp_path, cache=tmp_path / "missing")  # nothing is kept
    real, log = shards.scan_shard, tmp_path / "log"
    log.touch()

    def killed_at_the_fifth(path):
        if len(log.read_text().splitlines()) >= 4:
            raise KeyboardInterrupt
        return logged(path)

    def logged(path):
        with open(log, "a") as file:
            file.write(f"{path}\n")
        return real(path)

    monkeypatch.setattr(shards, "scan_shard", killed_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        shards.ShardIndex(tmp_path)  # one after the other: four are done
    parts = sorted(tmp_path.glob(".pictures-*.part.npz"))
    assert len(parts) == 4 == len(list(tmp_path.glob(".pictures-*")))
    parts[0].write_bytes(parts[0].read_bytes()[:200])  # damaged: that shard is scanned again
    content = bytearray(parts[1].read_bytes())
    content[-500] ^= 1  # one bit of it
    parts[1].write_bytes(content)
    monkeypatch.setattr(shards, "scan_shard", logged)
    index = shards.ShardIndex(tmp_path, workers=workers)
    assert len(log.read_text().splitlines()) == 4 + 2 + 2
    assert len(list(tmp_path.glob(".pictures-*"))) == 1, "folded into one"
    for again in (index, shards.ShardIndex(tmp_path)):
        for name in ("shard", "offset", "size"):
            assert np.array_equal(getattr(whole, name), getattr(again, name))
        assert again.problems == whole.problems and "3.tar has no end mark" in again.problems[0]
    assert len(log.read_text().splitlines()) == 8


def test_whoever_finds_the_whole_index_half_way_takes_it(tmp_path, monkeypatch):
    """Another process finishes, and clears the parts away, while this one scans its second."""
    for i in range(4):
        write_tar(tmp_path / f"{i}.tar", samples(10 * i, 2))
    real, calls = shards.scan_shard, []

    def slow(path):
        calls.append(path)
        if len(calls) == 2:
            monkeypatch.setattr(shards, "scan_shard", real)
            shards.ShardIndex(tmp_path)
            monkeypatch.setattr(shards, "scan_shard", slow)
        return real(path)

    monkeypatch.setattr(shards, "scan_shard", slow)
    index = shards.ShardIndex(tmp_path)
    assert len(calls) == 2 and len(index) == 8 and index.read(7) == picture(31)
    assert len(list(tmp_path.glob(".pictures-*"))) == 1, "its own late part is cleared away"


def build(folder, rank, counts):
    """One of several processes that start at once."""
    scans = []
    real = shards.scan_shard
    shards.scan_shard = lambda path: scans.append(path) or time.sleep(0.05) or real(path)
    index = shards.ShardIndex(folder)
    counts.put((rank, len(scans), len(index), index.read(len(index) - 1)))


def test_processes_that_scan_at_the_same_time_share_the_work(tmp_path):
    for i in range(24):
        write_tar(tmp_path / f"{i:02d}.tar", samples(2 * i, 2))
    context = multiprocessing.get_context("fork")
    counts = context.Queue()
    started = [context.Process(target=build, args=(tmp_path, i, counts)) for i in range(3)]
    for process in started:
        process.start()
    found = [counts.get(timeout=60) for _ in started]
    for process in started:
        process.join()
    assert all(rest == (48, picture(47)) for *_, length, last in found for rest in [(length, last)])
    scanned = sum(scans for _, scans, *_ in found)
    assert 24 <= scanned <= 24 + 16, "a few twice, never all by all"
    assert len(list(tmp_path.glob(".pictures-*"))) == 1


# -- many ranks ----------------------------------------------------------------------------------
def test_ranks_wait_for_the_slowest_and_leave_together():
    """Over the store, which has no time-out; the last one needs a second longer."""
    store, left = torch.distributed.HashStore(), []

    def rank(number):
        process = Process(number, 3, store=store)
        time.sleep(number == 2)
        arrived[number] = time.time()
        wait_for_slowest(process, "here")
        left.append(time.time())

    arrived = {}
    threads = [threading.Thread(target=rank, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(left) == 3 and min(left) >= arrived[2] >= max(arrived[0], arrived[1]) + 0.5
    wait_for_slowest(Process(), "alone")


@pytest.mark.parametrize("kind", ["shards", "folder"])
def test_ranks_that_see_different_pictures_refuse(tmp_path, monkeypatch, kind):
    """As where one node's own disk has a copy that was cut."""
    write_tar(tmp_path / "shards" / "a.tar", samples(0, 3))
    (tmp_path / "folder").mkdir()
    for name, content in samples(0, 3):
        (tmp_path / "folder" / name).write_bytes(content)
    settings = Settings.of("toy", data=str(tmp_path / kind))
    assert len(assemble.picture_source(settings, Process())) == 3
    monkeypatch.setattr(assemble, "wait_for_slowest", lambda process, what: None)
    monkeypatch.setattr(assemble, "union_over_ranks", lambda items, process: items | {"2"})
    with pytest.raises(ValueError, match=f"{kind} is not the same for all ranks.* 2 and 3"):
        assemble.picture_source(settings, Process(0, 2))


# -- open files ----------------------------------------------------------------------------------
def open_shards():
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return [os.readlink(link) for link in links if os.path.lexists(link)]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are listed on Linux")
def test_open_shards_are_kept_and_bounded(tmp_path, monkeypatch):
    for i in range(5):
        write_tar(tmp_path / f"{i}.tar", samples(i, 1))
    index = shards.ShardIndex(tmp_path)
    monkeypatch.setattr(shards, "HANDLES", 3)
    for i in (0, 1, 2, 3, 4, 0, 4, 4):
        assert index.read(i) == picture(i) and index.name(i).endswith(f"{i}.tar/{i:07d}.jpg")
        assert sum(name.startswith(str(tmp_path)) for name in open_shards()) <= 3
    kept = list(index._open.values())
    assert index.read(4) == picture(4) and list(index._open.values()) == kept
    again = pickle.loads(pickle.dumps(index))  # as for a worker that is spawned
    assert not again._open and again.read(1) == picture(1)


def test_open_shards_have_no_position_that_processes_could_share(tmp_path):
    """Two children read with the files that they inherit, both at the same time."""
    write_tar(tmp_path / "a.tar", samples(0, 200))
    index = shards.ShardIndex(tmp_path)
    want = [index.read(i) for i in range(200)]  # opened before the fork
    children = []
    for seed in range(2):
        if child := os.fork():
            children.append(child)
            continue
        order = np.random.default_rng(seed).integers(200, size=3000)
        os._exit(0 if all(index.read(i) == want[i] for i in order) else 1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def test_a_shard_that_shrank_or_went_is_an_oserror(tmp_path):
    write_tar(tmp_path / "a.tar", samples(0, 3))
    index = shards.ShardIndex(tmp_path)
    os.truncate(tmp_path / "a.tar", 2000)
    with pytest.raises(OSError, match="a.tar is shorter than when it was indexed"):
        index.read(2)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(FileNotFoundError, match="a.tar"):
        pickle.loads(pickle.dumps(index)).read(0)


def test_a_folder_that_cannot_be_written_still_works(tmp_path, monkeypatch):
    write_tar(tmp_path / "data" / "a.tar", samples(0, 3))
    refuse = np.savez

    def savez(path, **arrays):
        if Path(path).parent == tmp_path / "data":
            raise PermissionError(path)
        refuse(path, **arrays)

    monkeypatch.setattr(np, "savez", savez)
    monkeypatch.setattr(shards, "temporary_folder", lambda: tmp_path)
    assert len(shards.ShardIndex(tmp_path / "data")) == 3
    assert len(list(tmp_path.glob(".pictures-*.npz"))) == 1
    assert not list((tmp_path / "data").glob(".pictures*"))


def test_scanning_in_processes_gives_the_same(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", samples(10 * i, 2 + i))
    one = shards.ShardIndex(tmp_path, cache=tmp_path / "missing" / "folder")
    two = shards.ShardIndex(tmp_path, cache=tmp_path / "missing" / "folder", workers=2)
    for name in ("shard", "offset", "size"):
        assert np.array_equal(getattr(one, name), getattr(two, name))


def test_one_hundred_thousand_samples(tmp_path):
    """Headers only matter, so bodies are tiny. The time limits are wide: they catch the quadratic,
    not the slow machine."""
    header = tarfile.TarInfo("x").tobuf()
    for shard in range(10):
        with open(tmp_path / f"{shard}.tar", "wb") as file:
            for i in range(10_000):
                for kind in ("jpg", "json", "txt"):
                    info = tarfile.TarInfo(f"{shard * 10_000 + i:09d}.{kind}")
                    info.size = 1
                    file.write(info.tobuf() + b"x".ljust(len(header), b"\0"))
            file.write(bytes(1024))
    start = time.time()
    assert len(shards.ShardIndex(tmp_path)) == 100_000
    built = time.time() - start
    tracemalloc.start()
    start = time.time()
    index = shards.ShardIndex(tmp_path)
    reopened = time.time() - start
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"built {built:.1f} s, reopened {reopened:.3f} s, {memory / 1e6:.1f} MB at the peak")
    assert built < 90 and reopened < 1 and memory < 20e6
    assert index.read(99_999) == b"x" and index.name(99_999).endswith("9.tar/000099999.jpg")


# -- whole epochs --------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["generated", "real"])
def some_shards(request, tmp_path_factory):
    """83 samples in two shards: ours, and the shared ones of img2dataset where they are."""
    if request.param == "real":
        if not REAL.is_dir():
            pytest.skip("the photographs in ../shared/data are not here")
        return REAL
    folder = tmp_path_factory.mktemp("generated")
    write_tar(folder / "00000.tar", reversed(list(samples(0, 63))))
    write_tar(folder / "00001.tar", samples(100, 20, "png"))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_sample_once_per_epoch(tmp_path, some_shards, ranks, workers):
    """Global batch 8: every sample exactly once per epoch, whoever reads, in an order that is a
    function of seed and epoch; resuming sees exactly the rest."""
    index = shards.ShardIndex(some_shards, cache=tmp_path)
    expected = []
    for shard in some_shards.glob("*.tar"):
        with tarfile.open(shard) as tar:
            names = [name for name in tar.getnames() if name.endswith((".jpg", ".png"))]
        expected += [f"{shard}/{name}" for name in names]
    expected.sort()
    assert len(index) == len(expected) == 83
    files = data.Pictures(index, 32, seed=4)

    def read(seed, steps, start=0):
        """(position, name) of the global batches, all ranks together."""
        found = []
        for rank in range(ranks):
            sampler = data.MicroBatches(83, data.Share(8, 2, rank, ranks), seed, start)
            stream = data.batches(files, sampler, workers)
            for batch in itertools.islice(stream, steps * sampler.accumulation):
                assert not any(batch["unreadable"])
                found += zip(batch["position"], batch["name"], strict=True)
        return sorted(found)

    straight = read(seed=1, steps=21)  # 168 positions: two epochs and two
    names = [name for _, name in straight]
    assert [p for p, _ in straight] == list(range(168))
    assert sorted(names[:83]) == sorted(names[83:166]) == expected
    assert names[:83] != names[83:166], "the second epoch has an order of its own"
    assert read(seed=1, steps=14, start=7) == straight[56:]
    order = np.random.default_rng([1, 0]).permutation(83)
    assert names[:83] == [index.name(i) for i in order], "nothing but seed and epoch decides"


@pytest.mark.skipif(not REAL.is_dir(), reason="the photographs in ../shared/data are not here")
def test_real_letterboxes_are_found(tmp_path):
    index = shards.ShardIndex(REAL, cache=tmp_path)
    for i in range(len(index)):
        cropped = data.crop_white_bars(data.decode(index.read(i)))
        with tarfile.open(index.shards[index.shard[i]]) as tar:
            member = index.name(i).rpartition("/")[2].replace(".jpg", ".json")
            about = json.load(tar.extractfile(member))
        scale = 256 / max(about["original_width"], about["original_height"])
        for got, key in ((2, "original_width"), (1, "original_height")):
            assert abs(cropped.shape[got] - about[key] * scale) <= 6, index.name(i)
    assert os.listdir(tmp_path), "the index was kept where it may be written"
