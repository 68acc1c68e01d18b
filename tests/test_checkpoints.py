"""checkpoints.py: whole or not at all, the newest kept, damage named, nothing unpickled."""

import errno
import json
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from training import checkpoints as ckpt
from training.preflight import differences, newest_sound, read_state, require_same, verify
from training.process import Process
from training.stages import newest_for_all
from util.files import fingerprint
from util.sealed import hash_of

FILES = ("trained", "moments")


def save(folder, step, keep=2, value=0.0):
    trained = {"weight": torch.full((2, 2), value)}
    ckpt.save_checkpoint(folder, step, {"trained": trained, "moments": {}}, {"settings": {}}, keep)
    return ckpt.checkpoints_in(folder)[-1]


def test_round_trip_and_rotation(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step, value=float(step))
    assert [p.name for p in ckpt.checkpoints_in(tmp_path)] == ["step_00000002", "step_00000010"]
    newest = ckpt.checkpoints_in(tmp_path)[-1]
    state = read_state(newest)
    files = state.pop("files")
    assert state == {"step": 10, "settings": {}, "keep": 2}
    assert files == {f"{n}.safetensors": hash_of(newest / f"{n}.safetensors") for n in FILES}
    assert torch.equal(
        load_file(newest / "trained.safetensors")["weight"], torch.full((2, 2), 10.0)
    )


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch, call):
    save(tmp_path, 1)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ckpt.os, call, fail)
    line = r"step_00000002 could not be written \(No space .*\): it takes some kB|it takes \d+ kB"
    with pytest.raises(OSError, match=line):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"], "nothing is left behind"


def test_a_run_whose_folder_was_removed_notices(tmp_path):
    """It does not make the folder again, for a checkpoint without config and metrics."""
    with pytest.raises(OSError, match="step_00000001 could not be written"):
        save(tmp_path / "gone" / "stage1", 1)
    assert not (tmp_path / "gone").exists()


def test_what_is_not_finite_is_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match=r"not finite any more \(trained\): no checkpoint"):
        save(tmp_path, 2, value=float("nan"))
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


@pytest.mark.parametrize("file", ["trained.safetensors", "moments.safetensors", "state.json"])
def test_every_flipped_bit_is_noticed(tmp_path, file):
    """And the checkpoint before is the newest sound one. (An indentation of state.json says
    nothing.)"""
    save(tmp_path, 1)
    whole = save(tmp_path, 2)
    sound = (whole / file).read_bytes()
    for at in np.random.default_rng(0).integers(0, 8 * len(sound), 60):
        data = bytearray(sound)
        data[at // 8] ^= 1 << at % 8
        if file == "state.json" and bytes(data).split() == sound.split():
            continue
        (whole / file).write_bytes(data)
        found, problems = newest_sound(tmp_path, verify)
        harmless = file == "state.json" and same_json(data, sound)
        assert harmless or found.name == "step_00000001", f"bit {at}"
        assert harmless or str(whole) in problems[0] and file in problems[0]


def same_json(data, sound):
    try:
        return json.loads(data) == json.loads(sound)
    except ValueError:
        return False


def test_without_a_sound_checkpoint_there_is_no_start(tmp_path):
    (save(tmp_path, 1) / "trained.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="trained.safetensors is not what was written.*no other"):
        newest_sound(tmp_path, verify)
    assert newest_sound(tmp_path / "empty", verify) == (None, [])


def test_a_checkpoint_is_of_the_step_that_its_folder_says(tmp_path):
    save(tmp_path, 1).rename(tmp_path / "step_00000009")
    with pytest.raises(ValueError, match="it is of step 1"):
        read_state(tmp_path / "step_00000009")


def test_pictures_of_an_earlier_version_are_not_compared(tmp_path):
    """It made one hash of names and contents. Of toy scenes it is a name."""
    for names, same in (("0123456789abcdef", True), ("ToyScenes", False)):
        written = {"settings": {"images": 5, "names": names}}
        ckpt.save_checkpoint(tmp_path / names, 1, {"trained": {}, "moments": {}}, written, 2)
        old = read_state(ckpt.checkpoints_in(tmp_path / names)[0])["settings"]
        mine = {"images": 5, "names": "f" * 16, "samples": {"0": "x"}}
        assert (differences(old, mine) == []) == same
        assert differences(old, mine | {"images": 6})


def test_the_newest_is_that_of_most_steps(tmp_path):
    """Not the last by name: from 100 000 000 on, names are longer."""
    for step in (99_999_999, 100_000_000):
        assert save(tmp_path, step).name == f"step_{step}"
    (tmp_path / "step_100000000" / "trained.safetensors").write_text("")
    assert newest_for_all(tmp_path, Process()) == (tmp_path / "step_99999999", ["step_100000000"])


def test_a_half_written_folder_is_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step_00000002").mkdir()
    assert [p.name for p in ckpt.checkpoints_in(tmp_path)] == ["step_00000001"]


class Evil:
    def __reduce__(self):
        return (print, ("unpickled!",))


def trained_a_little():
    """A module and its optimiser after three steps."""
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        module(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


def test_weights_and_moments_come_back(tmp_path):
    """Bit by bit, and the next step is the one that would have come."""
    module, optimizer = trained_a_little()
    tensors = {"trained": ckpt.trainable(module), "moments": ckpt.moments(module, optimizer)}
    ckpt.save_checkpoint(tmp_path, 3, tensors, {}, 1)
    other = torch.nn.Linear(4, 3)
    again = torch.optim.AdamW(other.parameters(), lr=0.1, fused=True)
    ckpt.restore(other, ckpt.checkpoints_in(tmp_path)[-1])
    ckpt.restore_moments(other, again, ckpt.checkpoints_in(tmp_path)[-1])
    for m, o in ((module, optimizer), (other, again)):
        m(torch.ones(2, 4)).sum().backward()
        o.step()
    assert torch.equal(module.weight, other.weight) and torch.equal(module.bias, other.bias)


def test_the_count_of_steps_goes_where_the_fused_kernel_wants_it(tmp_path):
    """To the parameter's own device. (A count left on the CPU ends a GPU run at its first step
    after a resume: the kernel refuses.) "meta" stands in for a GPU."""
    module, optimizer = trained_a_little()
    tensors = {"trained": {}, "moments": ckpt.moments(module, optimizer)}
    ckpt.save_checkpoint(tmp_path, 3, tensors, {}, 1)
    elsewhere = torch.nn.Linear(4, 3, device="meta")
    again = torch.optim.AdamW(elsewhere.parameters(), lr=0.1)
    ckpt.restore_moments(elsewhere, again, ckpt.checkpoints_in(tmp_path)[-1])
    for state in again.state.values():
        assert {tensor.device.type for tensor in state.values()} == {"meta"}


def test_nothing_is_unpickled(tmp_path, capsys):
    checkpoint = save(tmp_path, 1)
    for name in ("trained", "moments"):
        file = checkpoint / f"{name}.safetensors"
        for write in (lambda f: f.write_bytes(pickle.dumps(Evil())), partial(torch.save, Evil())):
            write(file)
            with (
                pytest.raises(ValueError, match=f"{name}.safetensors is damaged"),
                ckpt.opened(checkpoint, name),
            ):
                pass
    assert "unpickled" not in capsys.readouterr().out


def test_restore_names_what_does_not_fit(tmp_path):
    """Exactly the parameters that train, each of its own shape."""
    module = torch.nn.Linear(2, 3)
    module.bias.requires_grad_(False)
    bias = module.bias.detach().clone()

    def checkpoint(**tensors):
        ckpt.save_checkpoint(tmp_path, 1, {"trained": tensors}, {}, 1)
        return ckpt.checkpoints_in(tmp_path)[-1]

    ckpt.restore(module, checkpoint(weight=torch.ones(3, 2)))
    assert torch.equal(module.weight.data, torch.ones(3, 2)) and torch.equal(module.bias, bias)
    for tensors, message in (
        ({}, "the checkpoint has no weight"),
        ({"weight": torch.ones(2, 2)}, r"weight has the shape \(2, 2\), expected \(3, 2\)"),
        ({"weight": torch.ones(3, 2), "more": torch.ones(1)}, "this model has no more"),
        ({"weight": torch.ones(3, 2), "bias": torch.ones(3)}, "this model has no bias"),
        ({"weight": torch.ones(3, 2).double()}, "weight holds torch.float64, expected"),
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
    b.bfloat16()  # as a device that computes in it reads them
    assert fingerprint(a) != fingerprint(b)
    assert fingerprint(a, torch.bfloat16) == fingerprint(b, torch.bfloat16) == fingerprint(b)


def test_differences():
    assert differences({"a": {"b": (1, 2)}}, {"a": {"b": [1, 2]}}) == []
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2}) == ["a.b: 1 → 3"]
    assert differences({"a": 1}, {"new": 1}) == ["a: 1 → None", "new: None → 1"]
