"""The result of a run: RUNS/NAME/enhanced, a CLIP that needs nothing of this project.

open_clip loads the folder as it is, `export_hf.py` turns it into transformers' layout. Its card
says what the model is, how to load it, which tokenizer its text tower reads, and what made it. The
folder will be copied and published, so the card names no path of the machine that trained it.
"""

import json
from pathlib import Path

import torch

from genhancer import GenHancer
from lora import lora_state_dict, merged_state_dict
from pretrained.backbones import ClipInfo
from settings import Settings, parts, relevant, stage1_runs
from training.runlog import read_metrics
from util.files import save_tensors, write_atomically

CLIP_TOKENS = 49408  # of the tokenizer that open_clip takes where a config names no other


def write_enhanced(clip: torch.nn.Module, model: GenHancer, settings: Settings, run: Path) -> None:
    """Write the folder: weights, open_clip's config, the adapters alone, and the card.

    Args:
        clip: the whole CLIP, for its text tower; model: after stage 2, for its image tower.
        run: the run's folder, with its metrics.jsonl.
    Raises: FileNotFoundError where the run has no metrics; ValueError for weights that are not
        finite.
    """
    folder = run / "enhanced"
    # The text tower is copied as it was; the image tower has its adapters folded in, so that the
    # result has the original keys and shapes.
    rest = {k: v for k, v in clip.state_dict().items() if not k.startswith("visual.")}
    tower = {f"visual.{k}": v for k, v in merged_state_dict(model.visual).items()}
    if wrong := next((k for k, v in tower.items() if not torch.isfinite(v).all()), None):
        raise ValueError(f"{folder} was not written: {wrong} is not finite; lower --stage2_lr")
    save_tensors({**rest, **tower}, folder / "open_clip_model.safetensors")
    config = json.dumps(model.info.open_clip_config(), indent=1)
    write_atomically(folder / "open_clip_config.json", config)
    if settings.tuning == "lora":
        # In a folder of its own: open_clip takes any .safetensors beside its config for weights.
        save_tensors(lora_state_dict(model.visual), folder / "lora" / "lora.safetensors")
    write_atomically(folder / "README.md", model_card(model.info, settings, run))


# ------------------------------------------------------------------------------------------------
# The card
# ------------------------------------------------------------------------------------------------
def model_card(info: ClipInfo, settings: Settings, run: Path) -> str:
    """What the enhanced model is, how to use it, what it cost and what made it, as Markdown."""
    tokenizers = [p.vae if p.denoiser == "flow" else p.vqgan for p in parts(settings)]
    named = " and ".join(f"`{without_path(tokenizer)}`" for tokenizer in tokenizers)
    chosen = "\n".join(f"| {name} | {value} |" for name, value in relevant(settings, 2).items())
    return f"""---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags: [clip, genhancer]
---
# CLIP enhanced by GenHancer

Base: `{without_path(settings.clip)}`. The image tower has learnt, the text tower is unchanged.

## With open_clip

{how_to_load(info)}

In transformers' layout, for LLaVA and others: `python export_hf.py`, from open_clip's.

## How it was made

| denoiser | stage | steps | images seen | loss | drift 1 − cos |
|---|---|---|---|---|---|
{metrics_rows(settings, run)}

Benchmark figures: `python eval_mmvp.py --model runs/{run.name}` writes them into the \
run's folder `eval/`.

Settings that decide the numbers of stage 2; {where_stage1_is(settings)}:

| setting | value |
|---|---|
{chosen}

Licence: these weights are derived from the base model's and stand under its licence \
(OpenAI's CLIP: MIT; MetaCLIP: CC-BY-NC 4.0; SigLIP: Apache 2.0; the toy: MIT). {named} \
and the training images taught them, but none of their content is inside.
"""


def how_to_load(info: ClipInfo) -> str:
    """Lines of code for model, preprocessing and tokenizer, run in the folder of the card.

    `open_clip.get_tokenizer` knows two kinds: CLIP's own, and Hugging Face tokenizers whose files
    lie in the folder. It takes the first for any text tower whose config names none.
    """
    model = """import open_clip

# "." is the folder of this file; from elsewhere, give its path
model, preprocess = open_clip.create_model_from_pretrained("local-dir:.")
model.eval()"""
    text = info.model_cfg["text_cfg"]
    length, size = text.get("context_length", 77), text.get("vocab_size", CLIP_TOKENS)
    if info.words:
        return f"""{as_code(model)}

**Not `open_clip.get_tokenizer`**: it returns CLIP's tokenizer without a warning, but this text
tower reads whole words. It has {size} tokens where CLIP's are {CLIP_TOKENS}: `encode_text` would
end in an IndexError. The words are in `open_clip_config.json`:

{as_code(word_tokenizer(length))}"""
    if name := text.get("hf_tokenizer_name"):
        return f"""{as_code(model)}

`open_clip.get_tokenizer("local-dir:.")` looks for the tokenizer's files in this folder, where there
are none: they are not ours to pass on. Fetch them once (`pip install transformers sentencepiece`):

{as_code(fetched_tokenizer(name, length, text))}"""
    if size == CLIP_TOKENS:
        return as_code(f'{model}\ntokenizer = open_clip.get_tokenizer("local-dir:.")')
    return f"""{as_code(model)}

**Not `open_clip.get_tokenizer`**: it returns CLIP's tokenizer of {CLIP_TOKENS} tokens, and this
text tower knows {size}. Take the one that the base model was trained with."""


def word_tokenizer(length: int) -> str:
    """A tokenizer of whole words in a few lines. It gives what `WordTokenizer` in
    evaluation/encoder.py gives, and the folder may be where that file is not."""
    return f"""import json, torch

words = json.load(open("open_clip_config.json", encoding="utf-8"))["words"]
ids = {{word: i for i, word in enumerate(["<pad>", *words, "<start>", "<end>"])}}

def tokenizer(text):
    \"\"\"One text → (1, {length}); a KeyError is a word that this CLIP does not know.\"\"\"
    row = [ids[word] for word in ["<start>", *text.split(), "<end>"]]
    return torch.tensor([row + [ids["<pad>"]] * ({length} - len(row))])

features = model.encode_text(tokenizer(" ".join(words[:3])))  # any words of the list"""


def fetched_tokenizer(name: str, length: int, text: dict) -> str:
    """A Hugging Face tokenizer as open_clip calls it, kept beside the weights."""
    options = {"context_length": length, **text.get("tokenizer_kwargs", {})}
    given = "".join(f", {key}={value!r}" for key, value in options.items())
    return f"""tokenizer = open_clip.tokenizer.HFTokenizer({name!r}{given})
tokenizer.save_pretrained(".")
# from now on, and without a network:
tokenizer = open_clip.get_tokenizer("local-dir:.")"""


def as_code(lines: str) -> str:
    """A Markdown block of Python."""
    return f"```python\n{lines}\n```"


def metrics_rows(settings: Settings, run: Path) -> str:
    """The last line of each stage of metrics.jsonl, as rows of a table. Several denoisers have
    learnt to draw in runs of their own, inside this one."""
    own = [] if settings.stage1_from or settings.end_to_end else parts(settings)
    runs = [(part.denoiser, run / part.name) for part in own if part is not settings]
    rows = []
    for denoiser, folder in [*runs, (settings.denoiser, run)]:
        metrics, last = read_metrics(folder), {}
        for row, stage in enumerate(metrics["stage"]):
            last[stage] = {name: column[row] for name, column in metrics.items()}
        rows += [
            f"| {denoiser} | {stage} | {line['step']} | {line['images']:,} | {line['loss']:.4f} | "
            f"{line.get('drift') or 0:.4f} |"
            for stage, line in sorted(last.items())
        ]
    return "\n".join(rows)


def where_stage1_is(settings: Settings) -> str:
    """Where a reader finds the settings that decided stage 1."""
    if settings.end_to_end:
        return "there was no stage 1 (end to end)"
    where = "in `config.json`, `stages` → `1` → `settings`"
    if settings.stage1_from:
        # A part of a joint run is called after its denoiser alone: the run it is of says more.
        names = [
            f"{f.parent.name}/{f.name}" if f.name in settings.denoisers else f.name
            for f in map(Path.absolute, stage1_runs(settings))
        ]
        named, several = " and ".join(f"`{name}`" for name in names), "s" * (len(names) > 1)
        return f"stage 1 was that of the run{several} {named}, whose settings are there {where}"
    if len(settings.denoisers) > 1:
        folders = " and ".join(f"`{name}/`" for name in settings.denoisers)
        return f"those of the stages 1 are in the run's folders {folders}, {where}"
    return f"those of stage 1 are in the run's folder, {where}"


def without_path(spelling: str) -> str:
    """A model or file as the user gave it, but of an absolute path its name alone.

    NAME:FILE keeps its NAME; what is relative means the same on every machine, and stays."""
    if Path(spelling).is_absolute():
        return Path(spelling).name
    name, _, file = spelling.partition(":")
    return f"{name}:{Path(file).name}" if Path(file).is_absolute() else spelling
