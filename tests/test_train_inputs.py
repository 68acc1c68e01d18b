"""train.py at tiny size on other pictures and weights, and what it refuses in one line."""

import json
import math
import shlex
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import open_clip
import pytest
import torch
from conftest import ROOT, SIGLIP
from PIL import Image
from safetensors.torch import save_file
from tiny_runs import COMMON, PERCEIVER, TINY, equal, metrics, parts_in, tensors, train_here

from flow_denoiser import FlowDenoiser, FlowDenoiserConfig
from pretrained.backbones import load_clip
from toy import world
from training import checkpoints as ckpt
from training.preflight import read_state


def photos(folder, count=12):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (70, 90, 3), np.uint8)).save(folder / f"{i:02d}.jpg")
    return folder


def test_pictures_from_a_folder_with_a_broken_one(tmp_path):
    folder = photos(tmp_path / "photos", 60)
    (folder / "05.jpg").write_bytes(b"broken")
    done = train_here(tmp_path, "photos", "--data", folder)
    assert done.returncode == 0, done.stderr
    assert "05.jpg" in done.stderr + done.stdout
    assert metrics(tmp_path / "photos")[-1]["unreadable"] >= 1


@pytest.mark.parametrize("denoiser", ["flow", "perceiver"])
def test_real_photographs_both_stages(tmp_path, denoiser):
    """The shared COCO photographs, where they are: the same code, and the loss falls."""
    folder = ROOT.parent / "shared" / "data" / "photos"
    if not folder.is_dir():
        pytest.skip("no ../shared/data/photos here")
    tiny = TINY if denoiser == "flow" else PERCEIVER
    steps = "--stage1_steps 60 --stage2_steps 10 --log_every 10 --save_every 60"
    done = train_here(tmp_path, "real", "--data", folder, tiny=[*tiny, *shlex.split(steps)])
    assert done.returncode == 0, done.stderr
    lines = [line for line in metrics(tmp_path / "real") if line["stage"] == 1]
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]


def tar_shards(folder, photos):
    """Two shards of jpg/txt pairs, the second cut off in the middle of its last picture."""
    folder.mkdir()
    files = sorted(photos.iterdir())
    for shard, part in enumerate((files[::2], files[1::2])):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for file in part:
                tar.add(file, f"{file.stem}.jpg")
    last = folder / "00001.tar"
    with tarfile.open(last) as tar:
        member = tar.getmembers()[-1]
    last.write_bytes(last.read_bytes()[: member.offset_data + member.size // 2])
    return folder


def test_tar_shards_both_stages_and_a_resume(tmp_path):
    """Read by worker processes; the cut shard is named, and its whole pictures are used."""
    folder = tar_shards(tmp_path / "shards", photos(tmp_path / "photos"))
    flags = ["--data", f"{folder}/{{00000..00001}}.tar", "--cache", "", "--workers", "2"]
    done = train_here(tmp_path, "straight", *flags, "--crop_white")
    assert done.returncode == 0 and "00001.tar is cut off" in done.stdout
    assert read_settings(tmp_path / "straight" / "stage1")["images"] == 11
    assert train_here(tmp_path, "stopped", *flags, "--crop_white").returncode == 0
    run = tmp_path / "stopped"
    shutil.rmtree(run / "stage1" / "step_00000006")
    shutil.rmtree(run / "stage2")
    assert train_here(tmp_path, "stopped", *flags, "--crop_white").returncode == 0
    for stage in (1, 2):
        assert equal(tensors(run, stage), tensors(tmp_path / "straight", stage))
    refused = train_here(tmp_path, "stopped", *flags)
    assert refused.returncode == 2 and "crop_white: True → False" in refused.stderr


def read_settings(stage):
    return read_state(ckpt.checkpoints_in(stage)[-1])["settings"]


def test_published_flux_as_the_denoiser(tmp_path):
    """--flux: depth and width from the file, frozen in both stages; stage 1 trains the projectors
    alone, and a resume refuses another file."""
    config = FlowDenoiserConfig(
        latent_channels=32, width=256, heads=2, double_blocks=1, single_blocks=2, vector_dim=12,
        context_dim=20, flux_time=True,
    )  # fmt: skip
    for name in ("a", "b"):
        save_file(FlowDenoiser(config).state_dict(), tmp_path / f"{name}.safetensors")
    flags = [*COMMON, "--flux", str(tmp_path / "a.safetensors")]
    del flags[flags.index("--width") : flags.index("--width") + 4]  # and --heads: the file decides
    done = train_here(tmp_path, "flux", tiny=flags)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "flux"
    names = ("project_vector", "project_context")
    assert parts_in(run, 1) == {f"paradigms.flow.{name}" for name in names}
    assert (run / "enhanced" / "open_clip_model.safetensors").is_file()
    losses = [line["loss"] for line in metrics(run)]
    assert all(math.isfinite(loss) for loss in losses)
    # In bf16, as on a GPU: the weights are kept in it, and grids are drawn in it.
    half = train_here(tmp_path, "half", "--precision", "bf16", tiny=flags)
    assert half.returncode == 0, half.stderr
    assert (tmp_path / "half" / "samples" / "stage2_step000004.png").is_file()
    given = [read_state(ckpt.checkpoints_in(tmp_path / n / "stage1")[-1]) for n in ("flux", "half")]
    one, other = (state["fingerprints"]["flow.denoiser"] for state in given)
    assert one == other, "read as float32 or as bf16, it is one file"
    flags[-1] = str(tmp_path / "b.safetensors")
    (run / "enhanced" / "README.md").unlink()  # else it is finished, and says so
    again = train_here(tmp_path, "flux", tiny=flags)
    assert again.returncode == 2 and "in its fingerprints (flow.denoiser" in again.stderr


@pytest.mark.usefixtures("small_siglip")
@pytest.mark.parametrize("denoiser", ["flow", "perceiver"])
def test_a_siglip_from_training_to_transformers(tmp_path, denoiser):
    """A timm tower with an attention pool: both stages with local tokens, LoRA on its fused qkv and
    on the pool's MLP, the enhanced folder in open_clip and in transformers."""
    transformers = pytest.importorskip("transformers")
    import export_hf

    torch.manual_seed(0)
    clip = open_clip.CustomTextCLIP(**{k: v for k, v in SIGLIP.items() if k != "custom_text"})
    save_file(clip.state_dict(), tmp_path / "siglip.safetensors")
    about = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    config = {"model_cfg": SIGLIP, "preprocess_cfg": about}
    (tmp_path / "siglip.json").write_text(json.dumps(config))
    tiny = TINY if denoiser == "flow" else PERCEIVER
    flags = ["--clip", tmp_path / "siglip.safetensors", "--local_ratio", "25", "--lora_pool"]
    done = train_here(tmp_path, "siglip", *flags, tiny=tiny)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "siglip"
    learnt = {name.split(".adapters")[0] for name in tensors(run, 2) if ".adapters" in name}
    blocks = {f"visual.trunk.blocks.{i}.{part}" for i in (0, 1)
              for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}  # fmt: skip
    assert learnt == blocks | {f"visual.trunk.attn_pool.mlp.fc{i}" for i in (1, 2)}
    theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{run / 'enhanced'}")
    export_hf.export(run / "enhanced", tmp_path / "hf")
    exported = transformers.SiglipVisionModel.from_pretrained(tmp_path / "hf").eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before, after = clip.eval().encode_image(images), theirs.eval().encode_image(images)
        assert torch.allclose(exported(images).pooler_output, after, atol=1e-4)
    assert not torch.allclose(before, after, atol=1e-4), "stage 2 changed it"


def test_the_enhanced_model_leaves_for_transformers(straight, tmp_path):
    """A run's result, exported: transformers' CLIP gives the same features."""
    transformers = pytest.importorskip("transformers")
    import export_hf

    export_hf.export(straight / "enhanced", tmp_path / "hf")
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "hf").eval()
    clip, _ = load_clip(str(straight / "enhanced"))
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        mine = clip.encode_image(images)
        features = theirs.visual_projection(theirs.vision_model(images).pooler_output)
    assert torch.allclose(features, mine, atol=1e-4)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "licence" in card and "| lora_rank | 4 |" in card and "drift" in card


DISCRETE = ["--denoiser", "perceiver"]
WRONG = {  # what only the weights can tell; all else is in test_preflight.py
    "CLIP given as VAE": (["--vae", str(world.TOY_DIR / "clip.safetensors")], "does not fit"),
    "VAE given as VQ-GAN": (
        [*DISCRETE, "--vqgan", str(world.TOY_DIR / "vae.safetensors")],
        "does not fit",
    ),
    "VQ-GAN given as VAE": (
        ["--vae", str(world.TOY_DIR / "vqgan.safetensors")],
        "is of another kind",
    ),
    "no such weights": (["--clip", "ViT-B-32:nowhere.pt"], "no weights file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_exit_2(tmp_path, case):
    flags, message = WRONG[case]
    done = train_here(tmp_path, "x", *flags, tiny=PERCEIVER if flags[:2] == DISCRETE else TINY)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and message in last, done.stderr
    assert last.startswith("train.py: ") and "Traceback" not in done.stderr


def test_full_size_presets_say_what_is_missing(tmp_path):
    for denoiser, flag in (("flow", "--vae"), ("perceiver", "--vqgan")):
        tiny = ["--preset", "openai-l14-224", "--denoiser", denoiser, "--data", str(ROOT)]
        done = train_here(tmp_path, "x", tiny=tiny)
        assert done.returncode == 2 and f"{flag} is missing" in done.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--width", "64", "--rope_axes", "8,12,12"], "in its settings (rope_axes"),
        (["--stage1_lr", "1e-5"], "in its settings (stage1_lr"),
        (["--seed", "3"], "in its settings (seed"),
    ],
)
def test_going_on_with_other_settings_is_refused(straight, flags, message):
    before = (straight / "config.json").read_bytes()
    done = train_here(straight.parent, "straight", *flags)
    assert done.returncode == 2 and message in done.stderr.replace("\n", " ")
    assert (straight / "config.json").read_bytes() == before, "a refused start writes nothing"


@pytest.mark.parametrize("flags", [["--stage", "2"], ["--batch", "10", "--micro_batch", "4"]])
def test_a_refused_start_leaves_no_folder(tmp_path, flags):
    assert train_here(tmp_path, "refused", *flags).returncode == 2
    assert not (tmp_path / "refused").exists()


def test_stage2_refuses_stage1_of_another_architecture_by_name(straight, tmp_path):
    done = train_here(
        tmp_path, "x", "--stage", "2", "--stage1_from", straight, "--vector_dim", "16"
    )
    assert done.returncode == 2 and "had other settings (vector_dim: 12 → 16)" in done.stderr


def test_a_damaged_checkpoint_is_named(tmp_path):
    assert train_here(tmp_path, "d", "--stage", "1").returncode == 0
    file = ckpt.checkpoints_in(tmp_path / "d" / "stage1")[-1] / "trained.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    done = train_here(tmp_path, "d", "--stage", "2")
    assert done.returncode == 2 and f"{file.parent.name} is damaged: delete it" in done.stderr


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    clip = torch.nn.utils.clip_grad_norm_
    broken = lambda *args: clip(*args) * float("inf")  # noqa: E731
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    done = train_here(tmp_path, "n", "--stage", "1")
    assert done.returncode == 2 and "not finite" in done.stderr and "toy scene" in done.stderr


def test_help_names_every_flag_and_an_example():
    done = subprocess.run(
        [sys.executable, "train.py", "--help", "all"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and "--drift_weight" in done.stdout and "torchrun" in done.stdout
