"""preflight.py: what is refused before PyTorch is loaded, in seconds, with nothing written; what
config.json says afterwards; and a finished run, which says so."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from tiny_runs import TINY, train, train_here

from settings import Settings, settings_of_run
from training import preflight
from util.sealed import seal

FULL = ["--preset", "openai-l14-224"]
PERCEIVER = [*FULL, "--denoiser", "perceiver"]
TOY = str(ROOT / "toy")


def timed(*arguments):
    start = time.time()
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )
    return done, time.time() - start


WRONG = {
    # flags that people type
    "lr": (["--lr", "1e-4"], "--stage1_lr and --stage2_lr"),
    "steps": (["--steps", "10"], "--stage1_steps and --stage2_steps"),
    "epochs": (["--epochs", "3"], "there are steps, not epochs"),
    "batch_size": (["--batch_size", "8"], "--batch is the global batch"),
    "output": (["--output", "x"], "--runs DIR/--name NAME"),
    "device": (["--device", "cuda"], "CUDA_VISIBLE_DEVICES="),
    "a mistyped flag": (["--blokcs", "3"], "did you mean --blocks?"),
    "a mistyped preset": (["--preset", "openai-l14"], "did you mean openai-l14-224?"),
    "a preset by its model": (["--preset", "siglip"], "did you mean siglip-so400m-224?"),
    # settings
    "a name with a path": (["--name", "../x"], "a plain name, no path"),
    "an uneven batch": (["--batch", "10", "--micro_batch", "4"], "no multiple of micro_batch 4"),
    "the other denoiser's": (["--layers", "4"], "add --denoiser perceiver"),
    "too many patch tokens": (["--local_ratio", "200"], "must be at most 100"),
    "a scale of zero": (["--time_scale", "0"], "must be above 0"),
    "not a number": (["--stage2_lr", "nan"], "must be a finite number"),
    "a mask of more than all": (["--denoiser", "perceiver", "--mask_to", "2"], "at most 1"),
    "heads that do not divide": (["--heads", "7"], "--width 192 must be heads 7"),
    "odd axes": (["--rope_axes", "8,8"], "three even numbers"),
    "stage 1 end to end": (["--end_to_end", "--stage", "1"], "drop --stage 1"),
    "stage 1 from elsewhere": (["--stage", "1", "--stage1_from", "x"], "drop --stage 1"),
    "not a whole number": (["--batch", "many"], "invalid int value: 'many'"),
    "an empty batch": (["--batch", "0"], "--batch 0: must be at least 1"),
    "negative steps": (["--stage1_steps", "-1"], "must be at least 1"),
    "a mistyped denoiser": (["--denoiser", "perciever"], "did you mean perceiver?"),
    "an odd Perceiver": (["--denoiser", "perceiver", "--heads", "7"], "4 and of --heads 7"),
    "negative latents": (["--denoiser", "perceiver", "--learnt_latents", "-1"], "at least 0"),
    "masks upside down": (
        ["--denoiser", "perceiver", "--mask_from", "0.9", "--mask_to", "0.5"],
        "from ≤ to",
    ),
    "the flow's": (["--denoiser", "perceiver", "--time_scale", "5"], "is of the flow denoiser"),
    "words for axes": (["--rope_axes", "a,b,c"], "expected three numbers"),
    # paths
    "no such data": (["--data", "{here}/nowhere"], "no folder and no file"),
    "an empty folder": (["--data", "{here}"], "is empty"),
    "no data": (FULL, "--data is missing"),
    "no VAE": ([*FULL, "--data", TOY], "--vae is missing"),
    "no VQ-GAN": ([*PERCEIVER, "--data", TOY], "--vqgan is missing"),
    "no such VAE": (["--vae", "gone.safetensors"], "no file gone.safetensors"),
    "no such VQ-GAN": (["--denoiser", "perceiver", "--vqgan", "gone.ckpt"], "no file gone.ckpt"),
    "no such CLIP": (["--clip", "gone.safetensors"], "gone.safetensors is missing"),
    # runs
    "stage 2 without stage 1": (["--stage", "2"], "stage 2 needs stage 1"),
    "no such other run": (["--stage1_from", "{here}/nowhere"], "holds no checkpoint"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refused_at_once_in_one_line_with_nothing_written(tmp_path, case):
    flags, words = WRONG[case]
    here = tmp_path / "here"
    here.mkdir()
    flags = [flag.format(here=here) for flag in flags]
    done, seconds = timed("train.py", "--runs", tmp_path / "runs", *flags)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert words in done.stderr and done.stderr.startswith("train.py: ") and not done.stdout
    assert seconds < 5, f"{seconds:.1f} s"
    assert not (tmp_path / "runs").exists() and not list(here.iterdir())


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--stage1_lr", "1e-5"], "settings (stage1_lr: 0.002 → 1e-05)"),
        (["--seed", "3"], "settings (seed: 0 → 3)"),
        (
            ["--width", "64", "--rope_axes", "8,12,12"],
            "settings (rope_axes: 4,6,6 → 8,12,12, width: 32 → 64)",
        ),
        (["--toy_images", "47"], "settings (toy_images: 48 → 47)"),
    ],
)
def test_a_run_of_other_settings_is_refused_at_once(straight, flags, words):
    before = contents(straight)
    command = "train.py", "--runs", straight.parent, "--name", "straight", *TINY, *flags
    done, seconds = timed(*command)
    assert done.returncode == 2 and words in done.stderr and seconds < 5, done.stderr
    assert contents(straight) == before


def test_a_finished_run_says_so_at_once(straight):
    before = contents(straight)
    done, seconds = timed("train.py", "--runs", straight.parent, "--name", "straight", *TINY)
    assert done.returncode == 0 and seconds < 5, done.stderr
    assert "is finished: stage 1 at step 6, stage 2 at step 4" in done.stdout
    assert contents(straight) == before


def test_a_finished_run_says_so_to_one_process_of_torchrun(straight, tmp_path):
    """Of torchrun's processes the main one decides, once they know each other; one alone, too."""
    shutil.copytree(straight, tmp_path / "a")
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "a").rglob("*")}
    done = train_here(tmp_path, "a")
    assert done.returncode == 0 and "is finished" in done.stdout
    assert before == {f: f.stat().st_mtime_ns for f in (tmp_path / "a").rglob("*")}


def test_what_is_not_finished(straight, tmp_path):
    """Without its last checkpoint, or without its enhanced model, a run goes on."""
    given = dict(zip((n[2:] for n in TINY[::2]), TINY[1::2], strict=True))
    kinds = {name: type(getattr(Settings(), name)) for name in given}
    given = {name: kinds[name](value) for name, value in given.items()}
    settings = Settings.of("toy", runs=str(tmp_path), name="a", **given)
    assert not preflight.finished(settings)
    shutil.copytree(straight, tmp_path / "a")
    assert "is finished" in preflight.finished(settings)
    (tmp_path / "a" / "enhanced" / "README.md").unlink()
    assert not preflight.finished(settings)
    shutil.copytree(straight, tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "stage2" / "step_00000004")
    assert not preflight.finished(Settings.of("toy", runs=str(tmp_path), name="b", **given))


def contents(run):
    return {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}


def test_a_missing_tensorboard_is_said(monkeypatch, tmp_path):
    settings = Settings.of("toy", tensorboard=True, runs=str(tmp_path))
    preflight.preflight(settings, ranks=1)
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tensorboard: not installed; pip install tensorboard"):
        preflight.preflight(settings, ranks=1)


def test_preflight_needs_no_pytorch():
    code = "print(sorted({'torch', 'open_clip'} & {*sys.modules}))"
    done, _ = timed("-c", f"import settings, training.preflight, sys; {code}")
    assert done.stdout.strip() == "[]", done.stderr


# -- config.json ---------------------------------------------------------------------------------
def test_config_keeps_the_settings_of_each_stage(tmp_path):
    """Stage 1 and stage 2 started with different flags: both true, and none of the other stage."""
    file = tmp_path / "c" / "config.json"
    assert train_here(tmp_path, "c", "--stage", "1", "--log_every", "2").returncode == 0
    first = json.loads(file.read_text())["stages"]
    assert first.keys() == {"1"} and "lora_rank" not in first["1"]["settings"]
    more = ["--stage", "2", "--log_every", "4", "--stage1_lr", "0.5", "--lora_alpha", "8"]
    assert train_here(tmp_path, "c", *more).returncode == 0
    both = json.loads(file.read_text())["stages"]
    assert both["1"] == first["1"], "stage 2 leaves stage 1's as they were"
    assert both["2"]["settings"]["log_every"] == 4 and both["1"]["settings"]["log_every"] == 2
    assert "stage1_lr" not in both["2"]["settings"], "it had no say in stage 2"
    settings = settings_of_run(tmp_path / "c")
    assert (settings.stage1_lr, settings.lora_alpha, settings.stage) == (2e-3, 8, "both")


def test_a_resume_leaves_the_config_as_it_was(tmp_path):
    assert train_here(tmp_path, "r").returncode == 0
    file = tmp_path / "r" / "config.json"
    before = file.read_bytes()
    shutil.rmtree(tmp_path / "r" / "stage2" / "step_00000004")
    assert train_here(tmp_path, "r", "--micro_batch", "4", "--keep", "1").returncode == 0
    assert file.read_bytes() == before


def test_a_run_with_a_setting_that_did_nothing_is_read_back(tmp_path):
    """By hand such a flag is refused; a run that has it is a run."""
    kept = {"preset": "toy", "tuning": "direct", "lora_rank": 4, "crop_min": 0.9}
    config = {"stages": {"2": {"settings": kept}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert settings_of_run(tmp_path).lora_rank == 4
    with pytest.raises(ValueError, match="--lora_rank would do nothing with --tuning direct"):
        Settings.of(**kept)


@pytest.mark.parametrize(
    "text", ['{"settings": {}}', "{", '{"stages": {"1": {"settings": {"x": 1}}}}']
)
def test_a_config_of_another_version_is_said(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="is of another version"):
        settings_of_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no run"):
        settings_of_run(Path(tmp_path) / "nowhere")


def test_a_failed_start_leaves_nothing(tmp_path):
    """Refused late, by what only the weights can tell."""
    done = train(tmp_path, "late", "--vae", ROOT / "toy" / "clip.safetensors")
    assert done.returncode == 2 and "does not fit" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command, words",
    [
        ("eval_mmvp.py --modle x", "did you mean --model?"),
        ("eval_mmvp.py --benchmark {here}/nowhere", "Questions.csv is missing"),
        ("eval_mmvp.py --template x", "put {{}} where the statement goes"),
        ("eval_zeroshot.py", "nothing to do: give --classify"),
        ("eval_zeroshot.py --captions x --probe", "--probe needs --classify"),
    ],
)
def test_evaluations_answer_at_once_too(tmp_path, command, words):
    done, seconds = timed(*command.format(here=tmp_path).split())
    assert done.returncode == 2 and words.format() in done.stderr and seconds < 5, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# -- runs that change on the way -----------------------------------------------------------------
CONSTANT = ["--schedule", "constant"]


def test_a_prolonged_run_is_finished_only_with_its_new_enhanced_model(tmp_path, monkeypatch):
    """Interrupted between the last checkpoint and the enhanced model: the next start writes it."""
    import train as training

    assert train_here(tmp_path, "p", *CONSTANT).returncode == 0
    model = tmp_path / "p" / "enhanced" / "open_clip_model.safetensors"
    before = model.read_bytes()
    more = [*CONSTANT, "--stage2_steps", "6"]
    with monkeypatch.context() as patch:

        def interrupted(*_):
            raise KeyboardInterrupt

        patch.setattr(training, "write_enhanced", interrupted)
        assert train_here(tmp_path, "p", *more).returncode == 130
    command = "train.py", "--runs", tmp_path, "--name", "p", *TINY, *more
    done, _ = timed(*command)
    assert (
        done.returncode == 0 and "is finished" not in done.stdout and "step 6 of 6" in done.stdout
    )
    assert model.read_bytes() != before
    assert "is finished" in timed(*command)[0].stdout


def test_stage_1_is_not_taken_away_from_stage_2(straight, tmp_path):
    assert train_here(tmp_path, "t", *CONSTANT).returncode == 0
    before = contents(tmp_path / "t")
    done = train_here(tmp_path, "t", *CONSTANT, "--stage1_steps", "12")
    assert done.returncode == 2 and "began from a stage 1 of 6 steps: 12 would" in done.stderr
    assert contents(tmp_path / "t") == before


def test_fewer_steps_than_are_done_is_a_finished_stage(tmp_path):
    assert train_here(tmp_path, "f", *CONSTANT, "--stage", "1").returncode == 0
    done = train_here(tmp_path, "f", *CONSTANT, "--stage1_steps", "4")
    assert done.returncode == 0 and (tmp_path / "f" / "enhanced" / "README.md").is_file()


def test_a_state_without_settings_is_named(tmp_path):
    checkpoint = tmp_path / "runs" / "s" / "stage1" / "step_00000006"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(seal({"step": 6, "files": {}}))
    done, _ = timed("train.py", "--runs", tmp_path / "runs", "--name", "s", *TINY)
    assert done.returncode == 2 and "it has no settings" in done.stderr


def test_a_run_whose_stage_1_is_another_is_not_loaded(straight, tmp_path):
    """Adapters of stage 2 belong to the denoiser that they were trained against."""
    from training.assemble import load_run

    shutil.copytree(straight, tmp_path / "m")
    assert train_here(tmp_path, "other", "--stage", "1", "--seed", "9").returncode == 0
    newest = "stage1/step_00000006"
    shutil.copytree(tmp_path / "other" / newest, tmp_path / "m" / newest, dirs_exist_ok=True)
    load_run(tmp_path / "m", stage=1)
    with pytest.raises(ValueError, match="trained beside other parts .fingerprints: flow.denoiser"):
        load_run(tmp_path / "m", stage=2)
