"""checkpoints.py: whole or not at all, the newest kept, damage named, nothing unpickled."""

import pickle

import pytest
import torch

import checkpoints as ckpt


def save(folder, step, keep=2, value=0.0):
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    tensors = {"weight": torch.full((2, 2), value)}
    return ckpt.save_checkpoint(folder, step, tensors, optimizer.state_dict(), {"note": "x"}, keep)


def test_round_trip_and_rotation(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step, value=float(step))
    assert [p.name for p in ckpt.checkpoints_in(tmp_path)] == ["step_00000002", "step_00000010"]
    newest = ckpt.checkpoints_in(tmp_path)[-1]
    assert ckpt.read_state(newest) == {"step": 10, "note": "x"}
    assert torch.equal(ckpt.read_trained(newest)["weight"], torch.full((2, 2), 10.0))
    assert "param_groups" in ckpt.read_optimizer(newest)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [p.name for p in ckpt.checkpoints_in(tmp_path)] == ["step_00000001"]
    save(tmp_path, 3)
    assert not list(tmp_path.glob("tmp_*")), "leftovers of the failed write are swept away"


def test_a_half_written_folder_is_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step_00000002").mkdir()
    assert [p.name for p in ckpt.checkpoints_in(tmp_path)] == ["step_00000001"]


class Evil:
    def __reduce__(self):
        return (print, ("unpickled!",))


def test_nothing_is_unpickled(tmp_path, capsys):
    checkpoint = save(tmp_path, 1)
    (checkpoint / "optimizer.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="optimizer.pt cannot be read"):
        ckpt.read_optimizer(checkpoint)
    torch.save({"state": Evil()}, checkpoint / "optimizer.pt")
    with pytest.raises(ValueError, match="optimizer.pt cannot be read"):
        ckpt.read_optimizer(checkpoint)
    assert "unpickled" not in capsys.readouterr().out


def test_put_names_what_does_not_fit():
    module = torch.nn.Linear(2, 3)
    names = {"weight"}
    ckpt.put(module, {"weight": torch.ones(3, 2)}, names, "x")
    assert torch.equal(module.weight.data, torch.ones(3, 2))
    for tensors, message in (
        ({}, r"weight is absent in the checkpoint and \(3, 2\)"),
        ({"weight": torch.ones(2, 2)}, r"weight is \(2, 2\) in the checkpoint"),
        (
            {"weight": torch.ones(3, 2), "more": torch.ones(1)},
            "more is .* and absent in this model",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ckpt.put(module, tensors, names, "x")


def test_fingerprint_tells_models_apart():
    torch.manual_seed(0)
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert ckpt.fingerprint(a) == ckpt.fingerprint(a) != ckpt.fingerprint(b)
    b.load_state_dict(a.state_dict())
    assert ckpt.fingerprint(a) == ckpt.fingerprint(b)


def test_first_difference():
    assert ckpt.first_difference({"a": {"b": (1, 2)}}, {"a": {"b": [1, 2]}}) is None
    assert ckpt.first_difference({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2}) == "a.b: 1 → 3"
    assert ckpt.first_difference({}, {"new": 1}) == "new: None → 1"
