"""Several denoisers at once: the sum is a sum, each learns to draw as if it were alone, and what
holds for a run of one holds for a run of both."""

import json
import shlex
import shutil

import pytest
import torch
from conftest import ROOT
from test_distributed import torchrun
from tiny_runs import PERCEIVER, TINY, equal, metrics, parts_in, tensors, train_here

import train
from settings import Settings, of_stage, parts, settings_of_run
from toy.world import ToyScenes
from training import assemble
from training import checkpoints as ckpt
from training.assemble import build_model, load_run
from training.preflight import finished
from util.cli import run_command

TINY_JOINT = [*TINY, *shlex.split("--denoiser flow+perceiver --layers 2")]
SETTINGS = {
    "width": 32, "heads": 2, "batch": 16, "micro_batch": 16, "warmup": 2, "lora_rank": 4,
    "rope_axes": "4,6,6", "vector_dim": 12, "context_dim": 20, "drift_weight": 0.1,
    "stage2_lr": 1e-3, "stage2_steps": 4, "stage2_trains": "only",
}  # fmt: skip
# AdaLN-zero would begin with a denoiser that no condition reaches.
BOTH = Settings.of("toy", denoiser="flow+perceiver", layers=2, initialisation="pytorch", **SETTINGS)


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    """One undisturbed run of three parts: two stages 1, one stage 2."""
    runs = tmp_path_factory.mktemp("joint")
    done = train_here(runs, "straight", tiny=TINY_JOINT)
    assert done.returncode == 0, done.stderr
    return runs / "straight"


def started(settings):
    """A model in stage 2 whose adapters say something, and a batch for it."""
    _, model = build_model(settings)
    torch.manual_seed(1)
    assemble.start_stage2(model, settings)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval(), ToyScenes(8, seed=1).batch(8)


# -- the sum -------------------------------------------------------------------------------------
def test_the_gradient_of_the_sum_is_the_sum_of_the_gradients():
    """θ learns from Eq. (3) and 0.2 × Eq. (4) at once: ≤ 1e-6 of the two alone, weighted."""
    weights = {"flow": 1.0, "perceiver": 0.2}
    model, images = started(Settings(**{**vars(BOTH), "drift_weight": 0.0}))
    draws = model.draw_from(list(range(9)), images.device)

    def gradient(chosen):
        model.loss_weights = chosen
        model.zero_grad()
        result = model(images, draws)
        result["loss"].backward()
        flat = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat(flat), result

    together, result = gradient(weights)
    alone = [gradient({**dict.fromkeys(weights, 0.0), name: 1.0})[0] for name in weights]
    assert all(g.abs().max() > 1e-6 for g in alone), [g.abs().max() for g in alone]
    expected = sum(w * g for w, g in zip(weights.values(), alone, strict=True))
    assert (together - expected).abs().max() <= 1e-6
    per_image = sum(w * result[f"{name}.per_image"] for name, w in weights.items())
    assert torch.equal(result["per_image"], per_image)
    assert torch.allclose(result["loss"], per_image.mean())


def test_weights_1_and_0_are_the_flow_alone():
    """Bit-equal through a stage 2, dropout, drift term and all."""
    found = {}
    for denoiser, more in (("flow", {}), ("flow+perceiver", {"loss_weights": "1,0", "layers": 2})):
        settings = Settings.of("toy", denoiser=denoiser, **SETTINGS, **more)
        _, model = build_model(settings)
        steps = train.train_steps(model, ToyScenes(32, seed=1), 4, stage=2, settings=settings)
        losses = [step["flow.per_image"] for step in steps]
        learnt = {n: p for n, p in model.named_parameters() if n.startswith("visual.")}
        found[denoiser] = torch.cat(losses), {n: p.detach().clone() for n, p in learnt.items()}
    (losses, weights), (losses2, weights2) = found.values()
    assert torch.equal(losses, losses2) and equal(weights, weights2)


def test_one_paradigm_of_a_kind_and_one_weight_each(make_genhancer):
    model = make_genhancer()
    kinds = type(model), model.paradigm
    clip = torch.nn.Module()
    clip.visual = model.visual
    with pytest.raises(ValueError, match="flow, flow.*one each, all different"):
        kinds[0](clip, model.info, [kinds[1], kinds[1]])
    with pytest.raises(ValueError, match="one each"):
        kinds[0](clip, model.info, kinds[1], loss_weights=[1.0, 2.0])


# -- the run -------------------------------------------------------------------------------------
def test_each_learns_to_draw_as_if_it_were_alone(joint, tmp_path):
    for name, tiny in (("flow", TINY), ("perceiver", PERCEIVER)):
        assert train_here(tmp_path, name, "--stage", "1", tiny=tiny).returncode == 0
        assert equal(tensors(tmp_path / name, 1), tensors(joint / name, 1))
        assert metrics(tmp_path / name) == metrics(joint / name)


def test_what_a_joint_run_leaves_behind(joint):
    assert {p.name for p in joint.iterdir()} == {
        "config.json", "metrics.jsonl", "stage2", "enhanced", "samples", "flow", "perceiver",
    }  # fmt: skip
    along = {"paradigms.flow.denoiser", "paradigms.perceiver.denoiser"}
    assert {"visual", *along} < parts_in(joint, 2), "the toy's preset trains all"
    last = metrics(joint)[-1]
    weighted = last["loss_flow"] + 0.2 * last["loss_perceiver"]
    assert last["loss"] == pytest.approx(weighted) and 0 < last["accuracy"] < 1
    assert len(last["loss_per_t_bin"]) == len(last["loss_per_mask_ratio_bin"]) == 10
    card = (joint / "enhanced" / "README.md").read_text()
    assert "| flow | 1 | 6 |" in card and "| perceiver | 1 | 6 |" in card
    assert "| flow+perceiver | 2 | 4 |" in card and str(ROOT) not in card


def test_a_joint_run_is_finished_and_loads(joint, tmp_path):
    where = {"runs": str(joint.parent), "name": "straight"}
    both = Settings(**{**vars(BOTH), **where, "stage1_steps": 6, "stage2_trains": "all"})
    assert "is finished: stage 1 of flow at step 6" in finished(both)
    moved = shutil.copytree(joint, tmp_path / "elsewhere")
    _, model = load_run(moved)
    trained = tensors(joint, 2)
    own = dict(model.named_parameters())
    assert all(torch.equal(own[name], tensor) for name, tensor in trained.items())
    for name in ("flow", "perceiver"):
        first = tensors(joint / name, 1)
        assert first and first.keys() <= trained.keys(), "stage 2 has trained them along"
        assert not all(torch.equal(own[n], t) for n, t in first.items())


def test_a_joint_stage_2_may_train_the_tower_only(joint, tmp_path):
    where = f"{joint / 'flow'},{joint / 'perceiver'}"
    flags = ["--stage1_from", where, "--stage2_trains", "only"]
    done = train_here(tmp_path, "only", *flags, tiny=TINY_JOINT)
    assert done.returncode == 0 and parts_in(tmp_path / "only", 2) == {"visual"}, done.stderr
    own = dict(load_run(tmp_path / "only")[1].named_parameters())
    for name in ("flow", "perceiver"):
        assert all(torch.equal(own[n], t) for n, t in tensors(joint / name, 1).items())


def test_stages_1_of_two_other_runs(joint, tmp_path):
    where = f"{joint / 'flow'},{joint / 'perceiver'}"
    done = train_here(tmp_path, "other", "--stage1_from", where, tiny=TINY_JOINT)
    assert done.returncode == 0, done.stderr
    assert equal(tensors(tmp_path / "other", 2), tensors(joint, 2))
    assert not (tmp_path / "other" / "flow").exists()
    card = (tmp_path / "other" / "enhanced" / "README.md").read_text()
    assert "that of the runs `straight/flow` and `straight/perceiver`, whose" in card
    assert load_run(tmp_path / "other")[1].original is not None


def test_a_joint_run_goes_on_bit_equal(joint, tmp_path):
    """From the middle of the second stage 1, and from the middle of stage 2."""
    for gone in ("perceiver/stage1/step_00000006", "stage2/step_00000004"):
        run = shutil.copytree(joint, tmp_path / gone.split("/")[0] / "straight")
        shutil.rmtree(run / gone)
        shutil.rmtree(run / "enhanced")
        if gone.startswith("perceiver"):
            shutil.rmtree(run / "stage2")
        assert train_here(run.parent, "straight", tiny=TINY_JOINT).returncode == 0
        assert equal(tensors(run, 2), tensors(joint, 2))
        assert equal(tensors(run, 2, "moments"), tensors(joint, 2, "moments"))
        assert metrics(run) == metrics(joint)


def test_two_processes_train_together(joint, tmp_path):
    torchrun(2, tmp_path, "two", "--lora_dropout", "0", "--micro_batch", "8", tiny=TINY_JOINT)
    one = train_here(tmp_path, "one", "--lora_dropout", "0", tiny=TINY_JOINT)
    assert one.returncode == 0, one.stderr
    for run, stage in (("flow", 1), ("perceiver", 1), ("", 2)):
        a, b = (tensors(tmp_path / name / run, stage) for name in ("one", "two"))
        assert a.keys() == b.keys()
        assert max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-4


def test_the_plan_names_each_part(capsys):
    run_command(lambda: train.main(Settings.of("toy", denoiser="flow+perceiver", plan=True)))
    said = capsys.readouterr().out
    for line in ("denoiser flow;", "denoiser perceiver;", "denoiser flow+perceiver;"):
        assert said.count(line) == 1
    assert said.count("  stage 1: ") == 2 and said.count("  stage 2: ") == 1
    assert "denoiser (flow)" in said and "denoiser (perceiver)" in said


def test_curves_of_a_joint_run_show_each_part(joint):
    pytest.importorskip("matplotlib")
    from training import curves

    runs = curves.read_runs([str(joint)])
    assert list(runs) == ["straight/flow", "straight/perceiver", "straight"]
    assert set(runs["straight/flow"]) == {1} and set(runs["straight"]) == {2}
    assert len(curves.draw(runs).axes) > 10


# -- settings ------------------------------------------------------------------------------------
def test_each_part_has_its_own_presets_numbers():
    flow, perceiver = parts(Settings.of("toy", denoiser="flow+perceiver"))
    for part in (flow, perceiver):
        alone = Settings.of("toy", denoiser=part.denoiser)
        free = {"runs", "name"}
        assert {k: v for k, v in vars(part).items() if k not in free} == {
            k: v for k, v in vars(alone).items() if k not in free
        }
    shape = {"width": 64, "heads": 4, "layers": 2, "rope_axes": "4,6,6", "mask_from": 0.6}
    both = Settings.of("toy", denoiser="flow+perceiver", batch=8, micro_batch=8, **shape)
    given = parts(both)
    assert [part.width for part in given] == [64, 64] and [part.batch for part in given] == [8, 8]
    assert given[1].layers == 2 and given[1].mask_from == 0.6 and given[0].mask_from == 0.5


def test_beside_flux_the_perceiver_alone_is_told_its_width():
    where = {"denoiser": "flow+perceiver", "flux": "x"}
    flow, perceiver = parts(Settings.of("openai-l14-224", **where, width=512, heads=8))
    usual, _ = parts(Settings.of("openai-l14-224", **where))
    assert (perceiver.width, perceiver.heads, perceiver.flux) == (512, 8, "") and flow.flux == "x"
    assert flow.width == usual.width
    with pytest.raises(ValueError, match="--blocks would do nothing beside --flux"):
        Settings.of("openai-l14-224", **where, blocks=3)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--denoiser flow+perceiver --loss_weights 1", "expected 2 numbers"),
        ("--denoiser flow+perceiver --loss_weights 1,-2", "expected 2 numbers"),
        ("--denoiser flow+perceiver --loss_weights 1,nan", "expected 2 numbers"),
        ("--denoiser flow+perceiver --loss_weights 1,x", "expected 2 numbers"),
        ("--denoiser flow+perceiver --loss_weights 0,0", "not all 0, like 1,0.2"),
        ("--loss_weights 1", "would do nothing with one denoiser"),
        ("--denoiser flow+perceiver --stage1_steps 1400", "perceiver alone has 3000"),
        ("--denoiser flow+perceiver --batch 48", "flow alone has 64"),
        ("--denoiser perceiver+perceiver", "flow+perceiver"),
        ("--denoiser flow+perceiver --stage1_from runs/a", "one run for each"),
        ("--denoiser flow+perceiver --stage1_from none/a,none/b", "holds no checkpoint"),
    ],
)
def test_refusals(flags, words, tmp_path):
    done = train_here(tmp_path, "x", *shlex.split(flags), tiny=[])
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "x").exists()


def test_a_joint_run_of_the_presets_own_numbers_is_read_back(tmp_path):
    """Of such a run, config.json holds stage 2's settings alone: no flag given by hand."""
    both = Settings.of("toy", denoiser="flow+perceiver", seed=3)
    stages = {"2": {"settings": of_stage(both, 2)}}
    (tmp_path / "config.json").write_text(json.dumps({"stages": stages}))
    assert settings_of_run(tmp_path) == both


def test_a_stage_1_of_another_seed_or_shape_is_refused(joint, tmp_path):
    where = f"{joint / 'flow'},{joint / 'perceiver'}"
    flags = ["--stage1_from", where, "--layers", "3"]
    done = train_here(tmp_path, "x", *flags, tiny=TINY_JOINT)
    assert done.returncode == 2 and "layers: 2 → 3" in done.stderr
    state = json.loads(
        (ckpt.checkpoints_in(joint / "flow" / "stage1")[-1] / "state.json").read_text()
    )
    assert set(state["architecture"]) == {"clip", "local_ratio", "flow"}
