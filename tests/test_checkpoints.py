"""checkpoints.py: whole or not at all, the newest kept, damage named, nothing unpickled."""

import pickle

import pytest
import torch

from training import checkpoints as ckpt
from training.preflight import differences, read_state, require_same
from util.files import fingerprint


def save(folder, step, keep=2, value=0.0):
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    tensors = {"weight": torch.full((2, 2), value)}
    return ckpt.save_checkpoint(
        folder, step, tensors, optimizer.state_dict(), {"settings": {}}, keep
    )


def test_round_trip_and_rotation(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step, value=float(step))
    assert [p.name for p in ckpt.checkpoints_in(tmp_path)] == ["step_00000002", "step_00000010"]
    newest = ckpt.checkpoints_in(tmp_path)[-1]
    assert read_state(newest) == {"step": 10, "settings": {}}
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


def test_restore_names_what_does_not_fit(tmp_path):
    """Exactly the parameters that train, each of its own shape."""
    module = torch.nn.Linear(2, 3)
    module.bias.requires_grad_(False)
    bias = module.bias.detach().clone()

    def checkpoint(**tensors):
        return ckpt.save_checkpoint(tmp_path, 1, tensors, {}, {}, 1)

    ckpt.restore(module, checkpoint(weight=torch.ones(3, 2)))
    assert torch.equal(module.weight.data, torch.ones(3, 2)) and torch.equal(module.bias, bias)
    for tensors, message in (
        ({}, "the checkpoint has no weight"),
        ({"weight": torch.ones(2, 2)}, "size mismatch for weight"),
        ({"weight": torch.ones(3, 2), "more": torch.ones(1)}, "this model has no more"),
        ({"weight": torch.ones(3, 2), "bias": torch.ones(3)}, "this model has no bias"),
    ):
        with pytest.raises(ValueError, match=message):
            ckpt.restore(module, checkpoint(**tensors))


def test_require_same_names_what_differs():
    require_same({"a": {"b": 1}, "more": 3}, {"a": {"b": 1}}, "never")
    with pytest.raises(ValueError, match=r"another settings \(lr: 1 → 2\)"):
        require_same({"settings": {"lr": 1}}, {"settings": {"lr": 2}},
                          "another {what} ({difference})")  # fmt: skip
    with pytest.raises(ValueError, match=r"runs/\{odd\} differs in its a: b: 1 → 2"):
        require_same({"a": {"b": 1}}, {"a": {"b": 2}},
                          "runs/{odd} differs in its {what}: {difference}")  # fmt: skip
    with pytest.raises(ValueError, match="fingerprints: clip: None → x"):
        require_same({}, {"fingerprints": {"clip": "x"}}, "{what}: {difference}")


def test_fingerprint_tells_models_apart():
    torch.manual_seed(0)
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert fingerprint(a) == fingerprint(a) != fingerprint(b)
    b.load_state_dict(a.state_dict())
    assert fingerprint(a) == fingerprint(b)


def test_differences():
    assert differences({"a": {"b": (1, 2)}}, {"a": {"b": [1, 2]}}) == []
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2}) == ["a.b: 1 → 3"]
    assert differences({"a": 1}, {"new": 1}) == ["a: 1 → None", "new: None → 1"]
