"""Every canary once; and each of them sings, where somebody opens it without care."""

import pickle

import numpy as np
import pytest
import torch

from . import canaries
from .inputs_world import make_world, pictures
from .table import try_case


def test_no_canary_sings(forks, tmp_path):
    world = make_world(forks, tmp_path / "world")
    chosen = {case.name.split(",")[0]: case for case in canaries.cases(forks, tmp_path, world)}
    assert len(chosen) >= 6
    tried = (try_case(case, forks, tmp_path / str(i)) for i, case in enumerate(chosen.values()))
    assert not [wrong for wrong, _ in tried if wrong]


def careless_index(here):
    pictures(here / "pictures")
    canaries.shard(here / "shards" / "0.tar", here / "pictures")
    canaries.index(here)
    [file, *_] = here.glob("shards/.pictures-*.npz")
    return dict(np.load(file, allow_pickle=True))


def careless_tokenizer(here):
    transformers = pytest.importorskip("transformers")
    canaries.tokenizer("tokenizer_kwargs")(here)
    folder = str(here / "tokenizer")
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


OPENED = {
    "song.pt": lambda here: pickle.loads((here / "song.pt").read_bytes()),
    "zip.pt": lambda here: torch.load(here / "zip.pt", weights_only=False),
    "index": careless_index,
    "tokenizer": careless_tokenizer,
}


@pytest.mark.parametrize("name", OPENED)
def test_a_canary_sings_to_whoever_is_careless(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if name.endswith(".pt"):
        canaries.pickled(name)(tmp_path)
    try:
        OPENED[name](tmp_path)
    except Exception as error:  # after its song a canary is no model
        print(error)
    assert (tmp_path / canaries.MARK).exists()
