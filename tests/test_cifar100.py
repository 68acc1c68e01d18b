"""CIFAR-100 and ImageNet from their pickles: arrays alone, and no program."""

import hashlib
import os
import pickle

import numpy as np
import pytest
import torch

import eval_zeroshot as ez
from evaluation import cifar100


class Evil:
    """What a pickle can do to whoever opens it."""

    def __reduce__(self):
        return (os.mkdir, (os.environ["CANARY"],))


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Write both files as if they were the published ones."""
    monkeypatch.setenv("CANARY", str(tmp_path / "it-ran"))
    folder = tmp_path / cifar100.FOLDER
    folder.mkdir()

    def write(test, meta):
        for name, content in (("test", test), ("meta", meta)):
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))
            digest = hashlib.md5((folder / name).read_bytes()).hexdigest()
            monkeypatch.setitem(cifar100.MD5, name, digest)
        return str(tmp_path)

    yield write
    assert not (tmp_path / "it-ran").exists()


PIXELS = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), np.uint8)
TEST = {"data": PIXELS.transpose(0, 3, 1, 2).reshape(3, -1), "fine_labels": [0, 1, 1]}
META = {"fine_label_names": ["maple_tree", "ray"]}


def test_pictures_labels_and_names(publish):
    found = ez.read_classes("cifar100", publish(TEST, META))
    assert found.names == ["maple tree", "ray"] and found.labels.tolist() == [0, 1, 1]
    assert np.array_equal(found.pictures, PIXELS) and found.title == "CIFAR-100"


def test_it_is_what_torchvision_reads(publish, monkeypatch):
    import torchvision.datasets as tv

    root = publish(TEST, META)
    monkeypatch.setattr(tv.CIFAR100, "test_list", [["test", cifar100.MD5["test"]]])
    monkeypatch.setattr(tv.CIFAR100, "train_list", [])
    monkeypatch.setitem(tv.CIFAR100.meta, "md5", cifar100.MD5["meta"])
    theirs = tv.CIFAR100(root, train=False)
    pixels, labels, names = cifar100.read_cifar100(ez.Path(root))
    assert np.array_equal(theirs.data, pixels) and theirs.targets == labels
    assert theirs.classes == names


@pytest.mark.parametrize("which", ["test", "meta"])
def test_a_pickle_that_calls_a_program_is_refused(publish, which):
    parts = {"test": TEST, "meta": META}
    root = publish(**{**parts, which: {**parts[which], "more": Evil()}})
    with pytest.raises(ValueError, match="holds more than arrays .*mkdir"):
        ez.read_classes("cifar100", root)


def test_a_file_that_was_not_published_is_not_unpickled_at_all(publish, tmp_path):
    root = publish(TEST, META)
    (tmp_path / cifar100.FOLDER / "test").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="test is not the file that was published"):
        ez.read_classes("cifar100", root)


def test_imagenets_meta_runs_no_program(tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY", str(tmp_path / "it-ran"))
    (tmp_path / "val").mkdir()
    torch.save(Evil(), tmp_path / "meta.bin")
    with pytest.raises(ValueError, match="--classify imagenet"):
        ez.read_classes("imagenet", str(tmp_path))
    assert not (tmp_path / "it-ran").exists()
