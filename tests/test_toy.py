"""toy/: the reporting bias, the drawing, the captions, the benchmark, the shipped weights and how
they are made."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from evaluation.encoder import find_tokenizer
from evaluation.pairsets import read_mmvp
from evaluation.scoring import MMVP_PATTERNS
from pretrained.autoencoders import load_vae, load_vqgan, nearest_codes
from pretrained.backbones import load_clip
from toy import benchmark, pretrain
from toy import world as toy


def test_nine_patterns_in_the_papers_order():
    assert tuple(toy.PATTERNS) == MMVP_PATTERNS


def test_every_attribute_is_mentioned_for_some_subjects_only():
    for pattern in toy.PATTERNS:
        told = toy.mentioned_subjects(pattern)
        assert len(set(told)) == toy.MENTIONED_PER_PATTERN < len(toy.SUBJECTS)
    shares = [sum(s in toy.mentioned_subjects(p) for p in toy.PATTERNS) for s in toy.SUBJECTS]
    assert min(shares) >= 1, "no subject is left without words"


def test_captions_never_mention_what_they_may_not():
    rng = np.random.default_rng(0)
    words = {
        p: {w for t in v.values() for w in t.replace("{}", "").split()} - {"a", "with", "without"}
        for p, v in toy.PATTERNS.items()
    }
    said = dict.fromkeys(toy.PATTERNS, 0)
    for _ in range(3000):
        scene = toy.random_scene(rng)
        text = set(toy.caption(scene, rng, 0.7).split())
        for pattern, own in words.items():
            if text & own and not (pattern == "Spatial" and not text & {"above", "below"}):
                assert scene.subject in toy.mentioned_subjects(pattern), (pattern, text)
                said[pattern] += 1
    # 2 of 8 subjects, mentioned with probability 0.7: 17.5 % of captions.
    assert all(0.14 < n / 3000 < 0.21 for n in said.values()), said


def test_drawing_is_repeatable_and_every_attribute_is_visible():
    """Changing one attribute, with the same nuisance, must change pixels; nothing else may."""
    rng = np.random.default_rng(1)
    for _ in range(10):
        scene = toy.random_scene(rng)
        image = toy.draw(scene, np.random.default_rng(7))
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        assert np.array_equal(image, toy.draw(scene, np.random.default_rng(7)))
        for pattern, values in toy.PATTERNS.items():
            other = next(v for v in values if v != scene[pattern])
            changed = toy.draw(scene.replace(pattern, other), np.random.default_rng(7))
            assert np.abs(changed.astype(int) - image).max() > 60, (pattern, scene)


def test_left_is_the_mirror_of_right():
    """Every silhouette must face somewhere: no subject may equal its mirror image."""
    for subject in toy.SUBJECTS:
        values = tuple(next(iter(v)) for v in toy.PATTERNS.values())
        scene = toy.Scene(subject, values).replace("Presence", "bare")
        left = toy.draw(scene.replace("Orientation", "left"), np.random.default_rng(3))
        right = toy.draw(scene.replace("Orientation", "right"), np.random.default_rng(3))
        assert np.abs(left.astype(int) - right).mean() > 1, subject


def test_a_scene_by_name():
    scene = toy.scene("fish", Color="blue", Camera_Perspective="far")
    assert (scene.subject, scene["Color"], scene["Camera Perspective"]) == ("fish", "blue", "far")
    assert scene["Quantity"] == "one", "what is not named has its first value"
    for wrong, words in (
        (lambda: toy.scene("fsih"), "did you mean 'fish'"),
        (lambda: toy.scene("fish", Colour="red"), "did you mean 'Color'"),
        (lambda: scene.replace("Colour", "red"), "did you mean 'Color'"),
        (lambda: scene.replace("Color", "rde"), "did you mean 'red'"),
        (lambda: scene["Zzz"], "there are Orientation, Presence"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()


def test_scenes_one_by_one_in_batches_and_in_a_loader():
    scenes = toy.ToyScenes(5, seed=4)
    assert torch.equal(scenes[3]["image"], scenes[(3, 7)]["image"])
    assert torch.equal(scenes.batch(2, first=3)[0], scenes[3]["image"])
    assert len(list(scenes)) == 5, "iteration ends"
    [batch] = torch.utils.data.DataLoader(scenes, batch_size=5)
    assert torch.equal(batch["image"], scenes.batch(5))


def test_scenes_are_a_function_of_seed_and_index():
    a, b = toy.ToyScenes(10, seed=4), toy.ToyScenes(99, seed=4)
    assert torch.equal(a[(3, 0)]["image"], b[(3, 5)]["image"])
    assert not torch.equal(a[(3, 0)]["image"], toy.ToyScenes(10, seed=5)[(3, 0)]["image"])
    assert a[(3, 0)]["image"].shape == (3, 64, 64) and a[(3, 0)]["image"].max() <= 1


# -- words ---------------------------------------------------------------------------------------
@pytest.fixture
def tokenizer():
    """As the shipped CLIP's JSON gives it: nothing but that file knows the toy's words."""
    _, info = load_clip(str(toy.TOY_DIR / "clip.safetensors"))
    assert list(info.words) == toy.vocabulary() and len(info.words) == 41
    return find_tokenizer(info)


def test_tokenizer(tokenizer):
    rows = tokenizer(["a photo of fish", "a photo of two tall red fish facing left"])
    assert rows.shape == (2, 16) and rows.dtype == torch.long
    assert (rows.argmax(1) == torch.tensor([5, 10])).all(), "the end token is the largest id"
    assert rows.max() < tokenizer.vocab_size == 44
    with pytest.raises(ValueError, match="no word 'dog'"):
        tokenizer("a photo of dog")
    with pytest.raises(ValueError, match="more than 14 words"):
        tokenizer("fish " * 15)


def test_longest_captions_and_statements_fit(tokenizer):
    rng = np.random.default_rng(0)
    tokenizer([toy.caption(toy.random_scene(rng), rng, 1.0) for _ in range(2000)])
    for mentioned in (True, False):
        items = benchmark.pairs(mentioned, 8)
        tokenizer([benchmark.TEMPLATE.format(text) for item in items for text in item.captions])


# -- the benchmark -------------------------------------------------------------------------------
@pytest.mark.parametrize("mentioned", [True, False])
def test_benchmark_pairs(mentioned):
    pairs = benchmark.pairs(mentioned, 12, seed=3)
    assert [pair.name for pair in pairs] == [f"{i}-{i + 1}" for i in range(1, 2 * 9 * 12, 2)]
    for pair in pairs:
        one, two = (text.split() for text in pair.captions)
        [subject] = [s for s in toy.SUBJECTS if s in one]
        assert one != two and subject in two
        assert (subject in toy.mentioned_subjects(pair.category)) == mentioned
        assert not np.array_equal(*pair.images)

    def same(others):
        return [
            np.array_equal(a.images[0], b.images[0]) for a, b in zip(pairs, others, strict=True)
        ]

    assert all(same(benchmark.pairs(mentioned, 12, seed=3)))
    assert not all(same(benchmark.pairs(mentioned, 12, seed=4)))


def test_the_command_writes_pairs_classes_and_a_picture(tmp_path):
    for what, file in (("pairs", "Questions.csv"), ("classes", "captions.json"), ("picture", "")):
        command = [sys.executable, "-m", "toy.benchmark", what, str(tmp_path / what)]
        done = subprocess.run(command, cwd=toy.TOY_DIR.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / what / file).exists()
    assert len(read_mmvp(tmp_path / "pairs")) == 900


# -- the weights ---------------------------------------------------------------------------------
def test_shipped_weights_load_and_are_small():

    files = list(toy.TOY_DIR.glob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) <= 12e6
    clip, info = load_clip(str(toy.TOY_DIR / "clip.safetensors"))
    vae = load_vae(toy.TOY_DIR / "vae.safetensors")
    assert info.image_size == 64 and vae.config.downsampling == 8
    world = toy.ToyScenes(256, seed=77)
    images = torch.stack([world[(i, 0)]["image"] for i in range(256)])
    latents = vae.encode(images * 2 - 1)
    assert abs(float(latents.mean())) < 0.1 and 0.9 < float(latents.std()) < 1.1, (
        "shift and scale fit"
    )
    psnr = 10 * torch.log10(4 / (vae.decode(latents) - (images * 2 - 1)).square().mean())
    assert psnr > 22


def test_pretraining_record_says_how_and_what():
    record = json.loads((toy.TOY_DIR / "PRETRAINING.json").read_text())
    for part in ("clip", "vae", "vqgan"):
        assert {"command", "seed", "torch", "minutes", "steps", "date"} <= record[part].keys()
    assert record["clip"]["mentioned"]["Average"] - record["clip"]["unmentioned"]["Average"] > 15
    assert record["clip"]["subject_zero_shot"] > 90


def test_shipped_vqgan_keeps_the_picture_and_uses_its_codes():

    vqgan = load_vqgan(toy.TOY_DIR / "vqgan.safetensors")
    world = toy.ToyScenes(128, seed=777)
    images = torch.stack([world[(i, 0)]["image"] for i in range(128)]) * 2 - 1
    indices = vqgan.indices(images)
    assert indices.shape == (128, 64)
    psnr = 10 * torch.log10(4 / (vqgan.decode(indices) - images).square().mean())
    record = json.loads((toy.TOY_DIR / "PRETRAINING.json").read_text())["vqgan"]
    assert abs(float(psnr) - record["psnr_db"]) < 0.5
    share = torch.bincount(indices.flatten(), minlength=vqgan.config.codes) / indices.numel()
    perplexity = float(torch.exp(torch.special.entr(share).sum()))
    assert perplexity == pytest.approx(record["perplexity"], rel=0.1)
    assert record["dead_codes"] < 0.05 * vqgan.config.codes == 0.05 * record["codes"]


def test_a_vqgan_starts_as_the_vae():
    vae = load_vae(toy.TOY_DIR / "vae.safetensors")
    vqgan = pretrain.vqgan_from_vae(vae, codes=16)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, _ = vae.moments(images)
    assert torch.allclose(vqgan.quant_conv(vqgan.encoder(images)), mean, atol=1e-5)
    through = vqgan.decoder(vqgan.post_quant_conv(mean))
    assert torch.allclose(through, vae.decoder(mean), atol=1e-5)


def test_the_moving_codebook_finds_clusters():
    """Eight clusters, one of them rare but heavily weighted; codes start far from all of them, so
    that all but the first chosen are dead at once and must be revived."""
    for seed in range(5):
        torch.manual_seed(seed)
        centers = 10 * torch.randn(8, 4)
        book = 100 + torch.randn(32, 4)  # more codes than clusters: two may share one
        moving = pretrain.MovingCodebook(book)
        for _ in range(400):
            which = torch.multinomial(torch.tensor([1.0] * 7 + [0.05]), 256, True)
            vectors = centers[which] + 0.1 * torch.randn(256, 4)
            weight = torch.where(which == 7, 10.0, 1.0)
            moving.update(vectors, nearest_codes(vectors, book), weight)
        assert torch.equal(moving.codebook, book), "in place"
        assert torch.cdist(centers, book).min(1).values.max() < 0.2


def test_a_code_follows_its_vectors_and_a_dead_one_restarts():
    torch.manual_seed(0)
    book = torch.tensor([[0.0], [10.0], [500.0]])
    moving = pretrain.MovingCodebook(book)
    vectors, chosen = torch.tensor([[1.0], [3.0], [12.0]]), torch.tensor([0, 0, 1])
    moving.update(vectors, chosen, torch.tensor([1.0, 3.0, 2.0]))
    assert book[0].item() == pytest.approx((1 * 1 + 3 * 3) / 4), "a weighted mean"
    assert book[1].item() == pytest.approx(12)
    assert book[2].item() in vectors, "nothing chose it: it restarts at a vector of the batch"


def make_again(folder, *flags):
    command = [sys.executable, "-m", "toy.pretrain", "--out", str(folder), *flags]
    done = subprocess.run(command, cwd=toy.TOY_DIR.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "PRETRAINING.json").read_text())


def test_the_whole_pretraining_at_a_tiny_size(tmp_path):
    """All three weights, to the end of the command: what it writes is what train.py and the
    evaluations read."""
    flags = "--scenes 600 --pairs 2 --clip_steps 2 --clip_batch 16 --vae_steps 2 --vae_batch 8 "
    flags += "--vqgan_steps 2 --vqgan_batch 8 --codes 32"
    record = make_again(tmp_path, *flags.split())
    shipped = json.loads((toy.TOY_DIR / "PRETRAINING.json").read_text())
    for part in ("clip", "vae", "vqgan"):
        assert record[part].keys() == shipped[part].keys(), part
        assert "python -m toy.pretrain --only" in record[part]["command"]
    assert record["clip"]["mentioned"].keys() == {*toy.PATTERNS, "Average"}
    _, info = load_clip(str(tmp_path / "clip.safetensors"))
    assert find_tokenizer(info)("a photo of fish").shape == (1, 16)
    assert load_vae(tmp_path / "vae.safetensors").config.latent_channels == 32
    assert load_vqgan(tmp_path / "vqgan.safetensors").config.codes == 32


def test_making_one_of_them_keeps_the_others(tmp_path):
    shutil.copy(toy.TOY_DIR / "vae.safetensors", tmp_path)
    shutil.copy(toy.TOY_DIR / "PRETRAINING.json", tmp_path)
    flags = "--only vqgan --vqgan_steps 3 --vqgan_batch 8 --scenes 600 --codes 32"
    record = make_again(tmp_path, *flags.split())
    assert record["vqgan"]["codes"] == 32 and record["vqgan"]["steps"] == 3
    assert 1 <= record["vqgan"]["perplexity"] <= 32
    shipped = json.loads((toy.TOY_DIR / "PRETRAINING.json").read_text())
    assert record["clip"] == shipped["clip"] and record["vae"] == shipped["vae"]
