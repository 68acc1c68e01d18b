"""training/enhanced.py: the result of a run, and a card whose every line of code works."""

import json
import re
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import SIGLIP, TINY_CLIP

from evaluation.encoder import find_tokenizer
from lora import inject_lora
from pretrained.backbones import ClipInfo, build_clip, load_clip
from settings import Settings
from toy.world import TOY_DIR, vocabulary
from training.enhanced import model_card, without_path, write_enhanced

SETTINGS = Settings(
    preset="toy",
    clip="/home/somebody/models/clip.safetensors",
    vae="/data/secret/ae.safetensors",
    stage2_lr=3e-5,
)
LINES = [
    {"stage": 1, "step": 3, "images": 48, "loss": 2.0},
    {"stage": 1, "step": 6, "images": 96, "loss": 1.25},
    {"stage": 2, "step": 4, "images": 12_800, "loss": 0.5, "drift": 0.0123},
]
# A text tower of CLIP's own tokens, as narrow as can be.
OPENAI_LIKE = {**TINY_CLIP, "text_cfg": {**TINY_CLIP["text_cfg"], "vocab_size": 49408}}


@pytest.fixture
def run(tmp_path):
    """A run that has its metrics and nothing else."""
    folder = tmp_path / "somewhere" / "my-run"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return folder


def described(model_cfg, words=()):
    return ClipInfo("x", model_cfg, (0.5,) * 3, (0.25,) * 3, words=tuple(words))


def write(run, info, settings=SETTINGS):
    """`write_enhanced` of a CLIP with adapters that are not zero. Returns: the CLIP before."""
    torch.manual_seed(0)
    clip = build_clip(info).eval()
    before = {k: v.clone() for k, v in clip.state_dict().items()}
    inject_lora(clip.visual, rank=2)
    with torch.no_grad():
        for name, parameter in clip.visual.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.1)

    class Model:  # what write_enhanced asks of a GenHancer
        visual = clip.visual

    Model.info = info
    write_enhanced(clip, Model, settings, run)
    return before


def execute(folder, monkeypatch):
    """All Python of a card, in one space, in the folder where the card lies."""
    monkeypatch.chdir(folder)
    blocks = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.S | re.M)
    assert blocks
    space = {}
    for block in blocks:
        exec(block, space)
    return space


# -- the folder ----------------------------------------------------------------------------------
def test_the_folder_holds_both_towers_and_the_adapters(run):
    before = write(run, described(TINY_CLIP))
    clip, info = load_clip(str(run / "enhanced"))
    after = clip.state_dict()
    assert after.keys() == before.keys(), "the original keys: nothing of LoRA"
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and all(name.startswith("visual.") for name in changed)
    assert info.model_cfg == TINY_CLIP
    assert {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()} == {
        "metrics.jsonl",
        "enhanced/open_clip_model.safetensors",
        "enhanced/open_clip_config.json",
        "enhanced/lora/lora.safetensors",
        "enhanced/README.md",
    }


def test_direct_tuning_has_no_adapters_to_write(run):
    write(run, described(TINY_CLIP), replace(SETTINGS, tuning="direct"))
    assert not (run / "enhanced" / "lora").exists()


# -- what the card says --------------------------------------------------------------------------
def test_the_card_says_what_what_it_cost_and_what_made_it(run):
    card = model_card(described(OPENAI_LIKE), SETTINGS, run)
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert "library_name: open_clip" in head.splitlines()
    assert "Base: `clip.safetensors`" in body and "`ae.safetensors`" in body
    rows = "| flow | 1 | 6 | 96 | 1.2500 | 0.0000 |\n| flow | 2 | 4 | 12,800 | 0.5000 | 0.0123 |"
    assert rows in body
    assert "python eval_mmvp.py --model runs/my-run" in body
    assert "| stage2_lr | 3e-05 |" in body and "stage1_lr" not in body
    assert "licence" in body and "export_hf.py" in body


@pytest.mark.parametrize(
    "model_cfg, words",
    [(OPENAI_LIKE, ()), (SIGLIP, ()), (TINY_CLIP, ()), (TINY_CLIP, vocabulary())],
    ids=["clip", "siglip", "unknown", "words"],
)
def test_the_card_names_no_path_of_this_machine(run, model_cfg, words):
    card = model_card(described(model_cfg, words), SETTINGS, run)
    for secret in ("somebody", "secret", "somewhere", str(run.parent)):
        assert secret not in card
    assert not re.search(r"(?<![\w.`/])/\w+/", card), "an absolute path"


@pytest.mark.parametrize(
    "settings, words",
    [
        (SETTINGS, "those of stage 1 are in the run's folder, in `config.json`, `stages` → `1`"),
        (replace(SETTINGS, stage1_from="/data/runs/base"), "stage 1 was that of the run `base`"),
        (replace(SETTINGS, end_to_end=True), "there was no stage 1"),
    ],
)
def test_the_card_says_where_the_settings_of_stage_1_are(run, settings, words):
    card = model_card(described(OPENAI_LIKE), settings, run)
    assert words in card and "/data/runs" not in card


def test_the_vqgan_of_the_discrete_denoiser(run):
    settings = Settings(denoiser="perceiver", vqgan="/data/vqgan.ckpt", layers=5)
    card = model_card(described(OPENAI_LIKE), settings, run)
    assert "`vqgan.ckpt`" in card and "| layers | 5 |" in card


def test_of_an_absolute_path_the_name_alone():
    assert without_path("ViT-L-14-quickgelu:openai") == "ViT-L-14-quickgelu:openai"
    assert without_path("/a/b:c/clip.safetensors") == "clip.safetensors"
    assert without_path("ViT-L-14:/a/b.pt") == "ViT-L-14:b.pt"
    assert without_path("toy/clip.safetensors") == "toy/clip.safetensors"


# -- the tokenizer of each kind ------------------------------------------------------------------
def test_the_code_of_the_card_with_clips_own_tokens(run, monkeypatch):
    info = described(OPENAI_LIKE)
    write(run, info)
    space = execute(run / "enhanced", monkeypatch)
    text = ["a photo of two cats", "It's naïve!"]
    assert torch.equal(space["tokenizer"](text), find_tokenizer(info)(text))
    clip, _ = load_clip(str(run / "enhanced"))
    tokens = space["tokenizer"](text)
    assert torch.equal(space["model"].encode_text(tokens), clip.encode_text(tokens))


def test_the_code_of_the_card_with_whole_words(run, monkeypatch):
    """open_clip would take CLIP's tokens without a word: the card warns, and its own code gives
    what the toy was trained with."""
    _, toy = load_clip(str(TOY_DIR / "clip.safetensors"))
    write(run, toy)
    card = (run / "enhanced" / "README.md").read_text()
    assert "**Not `open_clip.get_tokenizer`**" in card
    wrong = open_clip.get_tokenizer(f"local-dir:{run / 'enhanced'}")
    assert isinstance(wrong, open_clip.SimpleTokenizer), "as the card says"
    space = execute(run / "enhanced", monkeypatch)
    for text in ("a photo of fish", "a photo of two keys"):
        try:
            expected = find_tokenizer(toy)(text)
        except ValueError:
            with pytest.raises(KeyError):
                space["tokenizer"](text)
        else:
            assert torch.equal(space["tokenizer"](text), expected)
    assert space["features"].shape == (1, 64)
    with pytest.raises(KeyError, match="unicorn"):
        space["tokenizer"]("a photo of unicorn")
    with pytest.raises(IndexError):
        space["model"].encode_text(wrong("a photo of fish"))


@pytest.mark.usefixtures("small_siglip")
def test_the_code_of_the_card_with_a_hugging_face_tokenizer(run, monkeypatch):
    """There is none in the folder, and open_clip says so; the card fetches it once. The network is
    played by a small tokenizer under SigLIP's name."""
    transformers = pytest.importorskip("transformers")
    text_cfg = {**SIGLIP["text_cfg"], "tokenizer_kwargs": {"clean": "canonicalize"}}
    info = described({**SIGLIP, "text_cfg": text_cfg})
    write(run, info)
    with pytest.raises((OSError, ValueError)):
        open_clip.get_tokenizer(f"local-dir:{run / 'enhanced'}")
    from tokenizers import Tokenizer, models, pre_tokenizers

    small = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "cats": 2, "two": 3}, "<unk>"))
    small.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = transformers.PreTrainedTokenizerFast(
        tokenizer_object=small, pad_token="<pad>", unk_token="<unk>"
    )
    load = transformers.AutoTokenizer.from_pretrained

    def network(name, **options):
        return plain if name == "timm/ViT-B-16-SigLIP" else load(name, **options)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", network)
    tokenizer = execute(run / "enhanced", monkeypatch)["tokenizer"]
    assert tokenizer(["Two cats!"]).tolist() == [[3, 2] + [0] * 14], "canonicalized and padded"
    assert Path("tokenizer.json").is_file(), "beside the weights, for the next time"


def test_a_vocabulary_that_nobody_knows_is_not_given_clips(run):
    card = model_card(described(TINY_CLIP), SETTINGS, run)
    assert "text tower knows 60" in card and "get_tokenizer(" not in card
