"""util/files.py: whole or absent, and readable for whom the user's umask says."""

import errno
import os
import re
import stat
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from training.checkpoints import save_checkpoint
from util import files
from util.sealed import seal, unseal


@pytest.fixture
def umask():
    """Sets the umask; puts the old one back whatever happens."""
    before = os.umask(0o022)
    try:
        yield os.umask
    finally:
        os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o027])
def test_files_are_made_with_the_users_umask(tmp_path, umask, mask):
    umask(mask)
    files.save_tensors({"x": torch.ones(3)}, tmp_path / "a" / "x.safetensors")
    files.write_atomically(tmp_path / "a" / "x.json", "{}")
    assert mode(tmp_path / "a" / "x.safetensors") == 0o666 & ~mask
    assert mode(tmp_path / "a" / "x.json") == 0o666 & ~mask
    assert mode(tmp_path / "a") == 0o777 & ~mask
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["x.json", "x.safetensors"]


def test_a_checkpoint_is_readable_for_the_group(tmp_path, umask):
    umask(0o027)
    tensors = {"trained": {"x": torch.ones(3)}, "moments": {"x.step": torch.tensor(1.0)}}
    save_checkpoint(tmp_path / "stage1", 5, tensors, {}, keep=1)
    [folder] = (tmp_path / "stage1").iterdir()
    assert mode(folder) == mode(folder.parent) == 0o750
    found = {file.name: mode(file) for file in folder.iterdir()}
    names = ("trained.safetensors", "moments.safetensors", "state.json")
    assert found == dict.fromkeys(names, 0o640)


def test_tensors_and_what_is_written_about_them_come_back(tmp_path):
    """Views and transposed tensors too; what was there before is replaced, and so is its mode."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    path.chmod(0o600)
    tensors = {"whole": torch.arange(6.0).view(2, 3), "half": torch.randn(4).half()}
    tensors["turned"] = tensors["whole"].T
    files.save_tensors(tensors, path, metadata={"kind": "test"})
    again = load_file(path)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[k], tensors[k]) for k in tensors)
    assert again["half"].dtype == torch.float16
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"kind": "test"}
    current = os.umask(0o022)
    os.umask(current)
    assert mode(path) == 0o666 & ~current


def test_the_umask_of_other_threads_is_never_touched(tmp_path, umask):
    """While one thread saves, another makes files: all of them come out as the umask says."""
    umask(0o027)
    done, modes = threading.Event(), set()

    def make_files():
        while not done.is_set():
            (tmp_path / "plain").unlink(missing_ok=True)
            (tmp_path / "plain").touch()
            modes.add(mode(tmp_path / "plain"))

    thread = threading.Thread(target=make_files)
    thread.start()
    try:
        for i in range(100):
            files.save_tensors({"x": torch.ones(3)}, tmp_path / f"{i}.safetensors")
    finally:
        done.set()
        thread.join()
    assert modes == {0o640}
    assert {mode(file) for file in tmp_path.glob("*.safetensors")} == {0o640}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    files.save_tensors({"x": torch.ones(3)}, path)
    files.write_atomically(tmp_path / "x.json", "old")

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        files.save_tensors({"x": torch.zeros(3)}, path)
    with pytest.raises(OSError, match="no space"):
        files.write_atomically(tmp_path / "x.json", "new")
    assert torch.equal(load_file(path)["x"], torch.ones(3))
    assert (tmp_path / "x.json").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2, "nothing is left behind"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, number):
    """What, where, how much it takes and how much is free."""

    def full(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError) as caught:
        files.save_tensors({"x": torch.zeros(500_000)}, tmp_path / "x.safetensors")
    line = rf"{tmp_path}/x.safetensors could not be written \({os.strerror(number)}\): it takes "
    assert re.match(line + r"2\.0 MB, [\d.]+ [GM]B are free there; once that", str(caught.value))


def test_a_real_full_disk_and_a_missing_folder(tmp_path):
    """/dev/full says on every write that it is full."""
    with pytest.raises(OSError, match="No space"), open("/dev/full", "wb") as file:
        files.stream_tensors({"x": torch.zeros(9000)}, file)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="x.json could not be written"):
        files.write_atomically(tmp_path / "file" / "x.json", "{}")


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_are_not(tmp_path):
    dead = tmp_path / "sub" / "x.json.0123abcd.tmp"
    dead.parent.mkdir()
    dead.write_text("half")
    others = [tmp_path / name for name in ("notes.tmp", "thesis.version2.tmp", "a.20261128.tmp")]
    for other in others:
        other.write_text("somebody's")
    with files.replacing(tmp_path / "y.json") as file:
        file.write(b"{}")
        files.sweep(tmp_path, "features-*", "y.json")
        assert dead.exists() and all(other.exists() for other in others)
        files.sweep(tmp_path, "**/*")
        assert not dead.exists() and others[0].exists() and others[1].exists()
    assert (tmp_path / "y.json").read_text() == "{}"


def test_every_type_of_numbers_comes_back(tmp_path):
    """As safetensors itself reads them; scalars and empty tensors too."""
    tensors = {str(kind): torch.ones(3, 2).to(kind) for kind in files.TYPES}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3)}
    files.save_tensors(tensors, tmp_path / "x.safetensors")
    again = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(again[k], t) and again[k].dtype == t.dtype for k, t in tensors.items())
    assert again.keys() == tensors.keys()


# -- JSON with its own hash ----------------------------------------------------------------------
def test_sealed_json_notices_what_became_of_it():
    about = {"a": [1, 2.5, None], "b": {"c": "Ω\udcff"}}
    text = seal(about)
    assert unseal(text) == about and unseal(text.replace("\n", "")) == about
    for damaged in (text.replace("2.5", "2.6"), text.replace('"a"', '"A"'), "{}", "[]", "{"):
        with pytest.raises(ValueError):
            unseal(damaged)
