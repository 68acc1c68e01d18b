"""Enhanced CLIP → transformers layout (LLaVA and friends), and back.

    python export_hf.py --model runs/toy --out toy-hf       a run's result → transformers
    python export_hf.py --model toy-hf --out toy-oc         and back: transformers → open_clip

--model takes a folder in either layout, a run's folder, FILE.safetensors with FILE.json (an
open_clip config) beside it, open_clip's NAME:TAG, or NAME:FILE, that model with weights of yours.

Both libraries hold the same numbers, under other names and sometimes in other shapes. So no model
is run here: tensors are renamed and reshaped by the tables below, and going there and back returns
every bit. Three differences are more than a name or an axis of length 1:

* open_clip's attention is PyTorch's own, which makes q, k and v in one product: their matrices are
  packed into one. transformers has three layers, which can be adapted one by one.
* CLIP multiplies features by a bare matrix P from the right, x @ P. In transformers it is an
  nn.Linear, which stores W and computes x @ W.T. So W is P transposed.
* SigLIP's image tower is a timm model. In its pool one learned query looks at all patches, so q is
  a matrix of its own beside the packed k and v. transformers packs all three.

Nothing is guessed, for no error would tell: with the wrong activation or epsilon, features are
merely worse. open_clip builds the model, and what no tensor says is read off its modules.

Letters: D width of a tower, E width of the space that images and texts share, N positions.
This module imports nothing of this project: copy it freely.
"""

import argparse
import json
import logging
import os
import re
from pathlib import Path

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

OURS = "open_clip_config"  # key in config.json under which the way back is kept
MEAN, STD = list(open_clip.OPENAI_DATASET_MEAN), list(open_clip.OPENAI_DATASET_STD)
PREPROCESS = {  # what a kind was trained with, where nothing says otherwise
    "clip": {"mean": MEAN, "std": STD, "resize_mode": "shortest"},
    "siglip": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
}
HIDDEN_ACT = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}  # of a config that says none
# What a config may hand to open_clip, timm and transformers. They take more: `trust_remote_code`
# runs the Python beside a tokenizer, timm reads "local-dir:…". So texts are plain names.
ALLOWED = {"act_kwargs": {"approximate"}, "norm_kwargs": {"eps"}}
ALLOWED["tokenizer_kwargs"] = {"clean", "strip_sep_token", "language"}
PLAIN = re.compile(r"(\w[\w.-]*/)?[\w.-]*")
# What a terminal would obey, as it is shown: names of files may hold anything.
CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
# What happens to tensors on their way: open_clip → transformers, and transformers → open_clip.
CHANGES = {
    "same": (lambda *x: x, lambda *x: x),
    "transpose": (lambda *x: [i.T for i in x],) * 2,  # (D, E) ↔ (E, D)
    "unbatch": (lambda x: [x[0]], lambda x: [x[None]]),  # (1, N, D) ↔ (N, D)
    "vector": (lambda *x: [i.reshape(1) for i in x], lambda *x: [i.reshape(()) for i in x]),
    # (3·D, …) ↔ three of (D, …). A bias is packed as a matrix is, hence the dots.
    "split": (lambda qkv: qkv.chunk(3), lambda q, k, v: [torch.cat([q, k, v])]),
    # (D, …) and (2·D, …) ↔ (3·D, …)
    "pack": (lambda q, kv: [torch.cat([q, kv])], lambda qkv: qkv.tensor_split([len(qkv) // 3])),
}
# A residual block: the change, then the names in open_clip, in timm and in transformers. A star
# stands for a rule each for weight and bias, {a,b} for several names in one rule, as in a shell.
BLOCK = (
    ("same", "ln_{1,2}.*", "norm{1,2}.*", "layer_norm{1,2}.*"),
    ("split", "attn.in_proj_*", "attn.qkv.*", "self_attn.{q,k,v}_proj.*"),
    ("same", "attn.out_proj.*", "attn.proj.*", "self_attn.out_proj.*"),
    ("same", "mlp.{c_fc,c_proj}.*", "mlp.{fc1,fc2}.*", "mlp.{fc1,fc2}.*"),
)
# Outside of the blocks: the change, the name in open_clip, the name in transformers.
TEXT = "text_model.embeddings.{token,position}_embedding.weight"
CLIP = (
    ("same", "visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("same", "visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("same", "visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("transpose", "{visual.proj,text_projection}", "{visual,text}_projection.weight"),
    ("same", "{token_embedding.weight,positional_embedding}", TEXT),
    ("same", "logit_scale", "logit_scale"),
    ("same", "visual.ln_{pre,post}.*", "vision_model.{pre_layrnorm,post_layernorm}.*"),  # sic
    ("same", "ln_final.*", "text_model.final_layer_norm.*"),
)
SIGLIP = (
    ("unbatch", "visual.trunk.pos_embed", "vision_model.embeddings.position_embedding.weight"),
    ("same", "visual.trunk.attn_pool.latent", "vision_model.head.probe"),  # the learned query
    ("same", "text.{token_embedding.weight,positional_embedding}", TEXT),
    ("vector", "logit_{scale,bias}", "logit_{scale,bias}"),
    ("pack", "visual.trunk.attn_pool.{q,kv}.*", "vision_model.head.attention.in_proj_*"),
    ("same", "visual.trunk.patch_embed.proj.*", "vision_model.embeddings.patch_embedding.*"),
    ("same", "visual.trunk.{norm,attn_pool.norm}.*", "vision_model.{post_,head.}layernorm.*"),
    ("same", "visual.trunk.attn_pool.proj.*", "vision_model.head.attention.out_proj.*"),
    ("same", "visual.trunk.attn_pool.mlp.{fc1,fc2}.*", "vision_model.head.mlp.{fc1,fc2}.*"),
    ("same", "text.{ln_final,text_projection}.*", "text_model.{final_layer_norm,head}.*"),
)
# By transformers' model_type: the table, and where open_clip keeps the blocks of each tower.
TOWERS = ("vision_model", "text_model")
KINDS = {
    "clip": (CLIP, "visual.transformer.resblocks", "transformer.resblocks"),
    "siglip": (SIGLIP, "visual.trunk.blocks", "text.transformer.resblocks"),
}


def kind_of(model: nn.Module) -> str:
    """A model is of the kind whose blocks it has. Returns: "clip" or "siglip".
    Raises: ValueError for towers that transformers' CLIP and SigLIP cannot express."""
    for kind, (_, *towers) in KINDS.items():
        if {*towers} <= dict(model.named_modules()).keys():
            return kind
    raise ValueError("neither a CLIP with a ViT nor a SigLIP: transformers has no layout for it")


def _names(pattern: str) -> list[str]:
    """a.{q,k}.b → a.q.b and a.k.b."""
    head, options, tail = re.fullmatch(r"([^{]*){?([^}]*)}?(.*)", pattern).groups()
    return [head + option + tail for option in options.split(",")]


def rules_for(model: nn.Module) -> list[tuple[str, list[str], list[str]]]:
    """The tables, written out for one model as open_clip builds it, be it on the meta device.
    A rule: change, names in open_clip, names in transformers. Raises: ValueError as `kind_of`."""
    rows, *towers = KINDS[kind_of(model)]
    for blocks, tower in zip(towers, TOWERS, strict=True):
        for i in range(len(model.get_submodule(blocks))):
            for change, plain, timm, theirs in BLOCK:
                ours = timm if "trunk" in blocks else plain  # open_clip's word for a timm model
                rows += ((change, f"{blocks}.{i}.{ours}", f"{tower}.encoder.layers.{i}.{theirs}"),)
    return [
        (change, _names(ours.replace("*", part)), _names(theirs.replace("*", part)))
        for change, ours, theirs in rows
        for part in (("weight", "bias") if "*" in ours else ("",))
    ]


def convert(state: dict[str, Tensor], rules: list, export: bool) -> dict[str, Tensor]:
    """All tensors to the other side. Each must be used: one that no rule asks for would be dropped
    in silence, and the copy would be another model. `rules`: those of `rules_for`.
    Returns: contiguous tensors. Raises: ValueError naming one that is missing or left over."""
    state, result = dict(state), {}
    for change, ours, theirs in rules:
        here, there = (ours, theirs) if export else (theirs, ours)
        if missing := next((name for name in here if name not in state), None):
            raise ValueError(f"tensor {missing} is missing; is this a whole CLIP or SigLIP?")
        parts = CHANGES[change][0 if export else 1](*(state.pop(name) for name in here))
        result |= {n: part.contiguous() for n, part in zip(there, parts, strict=True)}
    if state:
        raise ValueError(f"{len(state)} tensors have no place there, e.g. {min(state)}")
    return result


def check_model_cfg(about: dict, path: str) -> None:
    """May open_clip be handed this part of a config? Raises: ValueError naming the key if not."""
    for key, value in about.items():
        foreign = key not in ALLOWED.get(path.rpartition(".")[2], about)
        foreign |= key in ("timm_model_pretrained", "hf_model_name") and bool(value)  # fetched
        foreign |= isinstance(value, str) and not PLAIN.fullmatch(value)
        foreign |= key == "layers" and not 0 < max([value] if type(value) is int else value) <= 999
        if foreign:
            raise ValueError(f"{path}.{key}: {value!r:.60} may not stand in a config")
        if isinstance(value, dict):
            check_model_cfg(value, f"{path}.{key}")


def build_empty(about: dict, source: str) -> nn.Module:
    """The model that open_clip would build, on the meta device: all modules, but no memory.
    Raises: ValueError if half of the config is missing, or describes nothing that is known."""
    if "vision_cfg" not in about.get("model_cfg", {}) or "preprocess_cfg" not in about:
        raise ValueError(f"{source}: the open_clip config has no model_cfg and preprocess_cfg")
    settings = dict(about["model_cfg"])
    check_model_cfg(settings, f"{source}: model_cfg")
    # The one key that is no argument: it says that the text tower is a module of its own.
    build = open_clip.CustomTextCLIP if settings.pop("custom_text", False) else open_clip.CLIP
    try:
        with torch.device("meta"):
            return build(**settings)
    except Exception as error:  # open_clip, timm and transformers raise many kinds
        raise ValueError(f"{source}: open_clip cannot build it ({error!r:.200})") from None


def activation_name(blocks: nn.Module) -> str:
    """transformers' name of the activation in the MLPs of a tower's blocks. The module is asked,
    for open_clip decides in several places. Raises: ValueError for others than GELUs."""
    _, activation, *_ = blocks[0].mlp.children()  # it follows the first layer in both libraries
    if type(activation).__name__ == "QuickGELU":  # x · sigmoid(1.702 x), in OpenAI's own weights
        return "quick_gelu"
    if isinstance(activation, nn.GELU):
        return "gelu" if activation.approximate == "none" else "gelu_pytorch_tanh"
    raise ValueError(f"activation {type(activation).__name__} has no name in transformers")


def transformers_config(model: nn.Module, about: dict, state: dict[str, Tensor]) -> dict:
    """config.json. Nothing is left to transformers' defaults, which are those of other models.
    Args: model: as open_clip builds it; about: its open_clip config; state: the exported tensors.
    Returns: the file, `about` inside for the way back. Raises: ValueError as `activation_name`."""
    kind = kind_of(model)
    # How a tower pools and masks no tensor tells, and no error would.
    text, pool = getattr(model, "text", model), getattr(model.visual, "pool_type", "tok")
    own = pool, text.text_pool_type if text is model else text.pool_type, text.attn_mask is None
    if own != (("tok", "argmax", False) if kind == "clip" else ("tok", "last", True)):
        raise ValueError(f"transformers' {kind} pools or masks its tokens in another way")
    # model_type picks the class that reads this file, architectures the one that loads weights.
    whole = {"model_type": kind, "torch_dtype": "float32", OURS: about}
    for tower, name in zip(TOWERS, KINDS[kind][1:], strict=True):
        blocks = model.get_submodule(name)
        hidden, width = state[f"{tower}.encoder.layers.0.mlp.fc1.weight"].shape  # (hidden, D)
        whole[tower.replace("model", "config")] = {
            "model_type": f"{kind}_{tower}",
            "hidden_size": width,  # D
            "intermediate_size": hidden,
            "num_hidden_layers": len(blocks),
            "num_attention_heads": blocks[0].attn.num_heads,  # no shape tells: q, k, v are (D, D)
            "hidden_act": activation_name(blocks),
            # what LayerNorm adds to a variance: 1e-5 in CLIP, 1e-6 in SigLIP
            "layer_norm_eps": next(m.eps for m in blocks.modules() if isinstance(m, nn.LayerNorm)),
        }
    images, words = whole["vision_config"], whole["text_config"]
    images["image_size"] = about["model_cfg"]["vision_cfg"]["image_size"]
    images["patch_size"] = state["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    words["vocab_size"] = len(state["text_model.embeddings.token_embedding.weight"])
    words["max_position_embeddings"] = len(state["text_model.embeddings.position_embedding.weight"])
    if kind == "siglip":
        # Text is pooled at the last position, whatever stands there. There are no start and end
        # tokens, and transformers' default ids for them lie outside of the vocabulary.
        words |= {"projection_size": len(state["text_model.head.weight"]), "pad_token_id": 1}
        words |= {"bos_token_id": None, "eos_token_id": None}
        return {**whole, "architectures": ["SiglipModel"]}
    # Text is pooled at its end token: for open_clip the highest id in a sentence, for transformers
    # the first id that equals eos_token_id.
    end = words["vocab_size"] - 1
    words |= {"eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": end}
    # E, three times: a tower that is loaded alone (LLaVA) reads its own part only.
    for part in (whole, words, images):
        part["projection_dim"] = len(state["visual_projection.weight"])
    return {**whole, "architectures": ["CLIPModel"]}


def open_clip_config(config: dict, folder: Path) -> dict:
    """The open_clip config of a transformers folder: ours if it came from here, else derived.
    Raises: ValueError for another kind of model, activation, or size of a SigLIP."""
    if OURS in config:
        return config[OURS]
    kind = config.get("model_type")
    if kind not in KINDS:
        raise ValueError(f"{folder}: model_type {kind!r}; expected 'clip' or 'siglip'")
    model_cfg = (_clip_architecture if kind == "clip" else _siglip_architecture)(config, folder)
    file, side = folder / "preprocessor_config.json", model_cfg["vision_cfg"]["image_size"]
    fitted = _preprocess(_read(file) if file.is_file() else {}, kind, side, file)
    return {"model_cfg": model_cfg, "preprocess_cfg": fitted}


def _preprocess(own: dict, kind: str, side: int, file: Path) -> dict:
    """preprocessor_config.json in open_clip's words. What it leaves out is as in most of its kind.
    Raises: ValueError for a way to make a picture fit that open_clip has no word for."""
    own = {key: value for key, value in own.items() if value is not None}
    given = {k: own[f"image_{k}"] for k in ("mean", "std") if f"image_{k}" in own}
    crop, resample = own.get("do_center_crop", kind == "clip"), own.get("resample", 3)
    square = {"height": side, "width": side}
    cut = own.get("crop_size", side) in (side, square) or not crop
    crop &= own.get("size") != square  # which leaves nothing to cut off
    sizes = side, ({"shortest_edge": side} if crop else square)
    steps = all(own.get(f"do_{step}", True) for step in ("resize", "rescale", "normalize"))
    if own.get("size", side) not in sizes or not (cut and steps) or resample not in (2, 3):
        raise ValueError(f"{file}: open_clip cannot make pictures of {side} px fit in that way")
    given |= {"interpolation": "bilinear"} if resample == 2 else {}  # 3, bicubic, is the default
    return PREPROCESS[kind] | given | {"resize_mode": "shortest" if crop else "squash"}


def _clip_architecture(config: dict, folder: Path) -> dict:
    """A CLIP is described in full; what config.json leaves out is as in transformers' ViT-B/32."""
    vision, text = config["vision_config"], config["text_config"]
    activation, other = (part.get("hidden_act", "quick_gelu") for part in (vision, text))
    if activation not in ("quick_gelu", "gelu") or other != activation:
        raise ValueError(f"{folder}: hidden_act {activation}, {other} has no switch in open_clip")
    names = "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"
    shapes = zip((vision, text), ((768, 12, 12, 3072), (512, 12, 8, 2048)), strict=True)
    images, words = (
        {"width": width, "layers": layers, "heads": heads, "mlp_ratio": hidden / width}
        for width, layers, heads, hidden in (map(part.get, names, sizes) for part, sizes in shapes)
    )
    for ours, theirs in ((images, vision), (words, text)):
        if (eps := theirs.get("layer_norm_eps", 1e-5)) != 1e-5:  # open_clip's
            ours["norm_kwargs"] = {"eps": eps}  # goes to every LayerNorm of the tower
    # open_clip wants the width of a head for images, but the number of heads for text
    images["head_width"] = images["width"] // images.pop("heads")
    images |= {k: vision.get(k, v) for k, v in (("image_size", 224), ("patch_size", 32))}
    words["context_length"] = text.get("max_position_embeddings", 77)  # N, tokens of a text
    words["vocab_size"] = text.get("vocab_size", 49408)
    # E, and one switch of the activation for both towers
    common = {"embed_dim": config.get("projection_dim", 512), "quick_gelu": activation != "gelu"}
    return common | {"vision_cfg": images, "text_cfg": words}


def _siglip_architecture(config: dict, folder: Path) -> dict:
    """A SigLIP also needs the timm name of its image tower, which no config.json tells. So it must
    have the sizes of a model that open_clip knows by name; the first one is taken."""
    vision, text = config["vision_config"], config["text_config"]
    width, side = vision.get("hidden_size", 768), vision.get("image_size", 224)  # D equals E
    length, size = text.get("max_position_embeddings", 64), text.get("vocab_size", 32000)
    family = f"patch{vision.get('patch_size', 16)}_siglip"
    for known in map(open_clip.get_model_config, open_clip.list_models()):
        trunk, words = known["vision_cfg"], known["text_cfg"]
        sizes = trunk.get("image_size"), words.get("context_length"), words.get("vocab_size")
        if (known["embed_dim"], *sizes) == (width, side, length, size) and family in str(trunk):
            return known
    raise ValueError(f"{folder}: open_clip has no SigLIP {width} wide, {side} px, {length} tokens")


def preprocessor_config(about: dict) -> dict:
    """preprocessor_config.json: how a picture becomes the tensor that the weights were trained on.
    CLIP resizes the shorter side and crops the middle, SigLIP squashes to a square.
    Raises: ValueError for open_clip's other ways to make a picture fit."""
    side, preprocess = about["model_cfg"]["vision_cfg"]["image_size"], about["preprocess_cfg"]
    square = {"height": side, "width": side}
    if (mode := preprocess.get("resize_mode", "shortest")) not in ("shortest", "squash"):
        raise ValueError(f"transformers cannot make pictures fit as open_clip's {mode!r:.60} does")
    if mode == "squash":
        own = {"image_processor_type": "SiglipImageProcessor", "size": square}  # and no crop
    else:
        own = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side}}
        own |= {"crop_size": square, "do_convert_rgb": True}
    return {
        "do_center_crop": mode == "shortest",
        **own,
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True),
        "resample": 2 if preprocess.get("interpolation") == "bilinear" else 3,  # 3: bicubic
        "rescale_factor": 1 / 255,  # bytes → 0 … 1
        **{f"image_{key}": list(preprocess[key]) for key in ("mean", "std")},
    }


def tokenizer_files(about: dict) -> tuple[dict[str, str | dict], str]:
    """CLIP's tokenizer, from the merges that open_clip ships. Other models get none: with a wrong
    tokenizer every sentence means something else, and no error tells.
    Returns: file name → content, and a line that says what they are or why there are none."""
    text = about["model_cfg"]["text_cfg"]
    if name := text.get("hf_tokenizer_name"):
        return {}, f"none is here; take that of {name}"
    if text["vocab_size"] != 49408:
        what = f"whole words, {OURS}'s `words`" if "words" in about else "unknown"
        return {}, f"{what}; not CLIP's, which open_clip.get_tokenizer would give in silence"
    tokenizer = open_clip.SimpleTokenizer()
    start, end = "<|startoftext|>", "<|endoftext|>"  # OpenAI's spelling of the last two tokens
    rename = {"<start_of_text>": start, "<end_of_text>": end}
    vocabulary = {rename.get(word, word): i for word, i in tokenizer.encoder.items()}
    merges = ["#version: 0.2", *map(" ".join, tokenizer.bpe_ranks)]  # in the order of their rank
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    details = {"tokenizer_class": "CLIPTokenizer", "model_max_length": text["context_length"]}
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(merges) + "\n",
        "tokenizer_config.json": {**details, **special},
    }, "CLIP's own; AutoTokenizer and open_clip.get_tokenizer find it"


def model_card(library: str, source: str, code: str, about: dict) -> str:
    """README.md: how to load the model with `library`, by the line `code`; then what the card of
    `source` says, if it has one, but for what names the other library and would be wrong now."""
    other = "open_clip" if library == "transformers" else "transformers"
    path = Path(source).resolve()
    name = (path.parent if path.name == "enhanced" else path).name  # a run has a name of its own
    card, head = path / "README.md", "pipeline_tag: zero-shot-image-classification\n"
    old = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if found := re.match(r"---\n(.*?\n)---\n", old, re.DOTALL):
        head, old = re.sub(r"(?m)^library_name:.*\n", "", found[1]), old[found.end() :]
    blocks = [f"---\nlibrary_name: {library}\n{head}---\n# {name}, converted for {library}"]
    blocks += [f'```python\nimport {library}\n\n# "." is the folder of this file\n{code}\n```']
    blocks += [f"Tokenizer ({library}): {tokenizer_files(about)[1]}."]
    for number, part in enumerate(re.split(r"(?ms)^(```.*?^```)$", old)):  # text and code in turn
        parts = [part] if number % 2 else re.split(r"\n\s*\n", part)
        blocks += [block.strip("\n") for block in parts if block.strip() and other not in block]
    return "\n\n".join(blocks) + "\n"


def read_open_clip(model: str) -> tuple[dict, nn.Module, list[str]]:
    """A CLIP in any spelling of --model, but transformers' layout.
    Returns: open_clip config, model, lines for the user. Raises: ValueError or OSError."""
    path, (name, _, tag) = Path(model), model.partition(":")
    if path.is_dir() or name not in open_clip.list_models():
        if not path.is_dir() and path.suffix != ".safetensors":
            raise ValueError(f"{model}: no folder, .safetensors or NAME:TAG (ViT-B-32:openai)")
        beside = "open_clip_config.json", "open_clip_model.safetensors"
        files = map(path.joinpath, beside) if path.is_dir() else (path.with_suffix(".json"), path)
        about, state = map(_read, files)
        return about, _fill(build_empty(about, model), state, model), []
    about = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": {}}
    empty = build_empty(about, name)
    about["preprocess_cfg"] = dict(PREPROCESS[kind_of(empty)])
    quick = about["model_cfg"].get("quick_gelu", False)
    if Path(tag).suffix or Path(tag).is_file():  # no tag has a dot
        note = f"note: {'QuickGELU' if quick else 'GELU'}, as {name} says: no weights can tell"
        return about, _fill(empty, _read(Path(tag)), model), [note]
    if not (known := open_clip.get_pretrained_cfg(name, tag)):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(f"{model}: open_clip has no weights {tag!r} of it, only {tags}")
    if known.get("quick_gelu", False) != quick:
        right = name.removesuffix("-quickgelu") if quick else f"{name}-quickgelu"
        raise ValueError(f"{model} was trained with the other activation: use {right}:{tag}")
    own = ("mean", "std", "resize_mode", "interpolation")
    about["preprocess_cfg"] |= {key: known[key] for key in own if known.get(key)}
    try:
        return about, open_clip.create_model(name, pretrained=tag), []
    except Exception as error:  # no network, a broken download, …: many kinds
        raise ValueError(f"{model}: open_clip could not load it ({error!r:.200})") from None


def read_transformers(source: Path) -> tuple[dict, dict[str, Tensor], list[str]]:
    """A transformers folder: as `read_open_clip`, but the tensors instead of a model."""
    config = _read(source / "config.json")
    if "vision_config" not in config:
        raise ValueError(f"{source}: config.json has no vision_config: not a whole CLIP or SigLIP")
    about = open_clip_config(config, source)
    model = build_empty(about, source)
    # In one file (it wins), in pieces or in a pickle. Older versions saved counters, too: 0, 1, …
    pieces = [*source.glob("model-*-of-*.safetensors"), *source.glob("model.safetensors")]
    found = {k: v for p in pieces or [source / "pytorch_model.bin"] for k, v in _read(p).items()}
    found = {k: v for k, v in found.items() if not k.endswith(".position_ids")}
    _fill(model, convert(found, rules_for(model), export=False), source)
    # A SigLIP of open_clip's list brings timm's activation, which may not be this folder's.
    kind = kind_of(model)
    wanted = config["vision_config"].get("hidden_act", HIDDEN_ACT[kind])
    own = activation_name(model.get_submodule(KINDS[kind][1]))
    note = f"note: {source} has {wanted}, open_clip's tower {own}: features differ a little"
    return about, model.state_dict(), [note] if wanted != own else []


def _fill(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> nn.Module:
    """The tensors become the model's own, in float32; PyTorch refuses a wrong name or shape."""
    try:  # assign: meta cannot be copied to
        model.load_state_dict({k: v.float() for k, v in state.items()}, strict=True, assign=True)
    except RuntimeError as error:  # its first line names a class, the others what is wrong
        what = " ".join(str(error).partition("\n")[2].split())  # on one line
        raise ValueError(f"{source}: the weights do not fit the config: {what:.300} …") from None
    return model


def _read(file: Path) -> dict:
    """A JSON or weights file. Raises: OSError or ValueError, naming the file."""
    kinds = {".json": "JSON", ".safetensors": "a whole safetensors file"}
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: a model needs config and weights")
    try:
        if file.suffix in kinds:
            return json.loads(file.read_bytes()) if file.suffix == ".json" else load_file(file)
        # A pickle may run any program; `weights_only` lets in nothing but tensors.
        content = torch.load(file, map_location="cpu", weights_only=True)
        state = content.get("state_dict", content)  # as training scripts leave it
        return {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    except Exception as error:  # all three raise many kinds
        kind = kinds.get(file.suffix, "a file of tensors alone")
        raise ValueError(f"{file} is not {kind} ({error!r:.200})") from None


def export(model: str | Path, target: Path) -> list[str]:
    """open_clip (as --model spells it) → transformers folder; all is checked before it is written.
    Returns: what was written. Raises: ValueError or OSError naming what is at fault."""
    about, whole, notes = read_open_clip(str(model))
    tensors = convert(whole.state_dict(), rules_for(whole), export=True)
    config = transformers_config(whole, about, tensors)
    (tokenizer, line), kind = tokenizer_files(about), config["architectures"][0]
    load = f'model = transformers.{kind}.from_pretrained(".")'
    card = model_card("transformers", str(model), load, about)
    files = {"README.md": card, "preprocessor_config.json": preprocessor_config(about)}
    _write(target, {"model.safetensors": tensors, "config.json": config, **files, **tokenizer})
    weights = f"{target / 'model.safetensors'}: {len(tensors)} tensors, {kind}"
    return [*notes, weights, f"tokenizer: {line}"]


def restore(source: Path, target: Path) -> list[str]:
    """transformers folder → open_clip folder. Returns and raises as `export`."""
    about, state, notes = read_transformers(Path(source))
    load = 'model, preprocess = open_clip.create_model_from_pretrained("local-dir:.")'
    files = {"open_clip_model.safetensors": state, "open_clip_config.json": about}
    _write(target, files | {"README.md": model_card("open_clip", str(source), load, about)})
    return [*notes, f"{target / 'open_clip_model.safetensors'}: {len(state)} tensors"]


def _write(target: Path, files: dict[str, str | dict]) -> None:
    """Files by name, each written under a temporary name and renamed: never half of one.
    Raises: OSError where one cannot be written; nothing is left of it."""
    target.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        temporary = target / f"{name}.tmp{os.getpid()}"
        try:
            temporary.touch()
            mode = temporary.stat().st_mode  # the user's umask; safetensors lets its owner in only
            if name.endswith(".safetensors"):
                save_file(content, temporary, {"format": "pt"})  # transformers asks who wrote it
            else:
                text = content if isinstance(content, str) else json.dumps(content, indent=1)
                temporary.write_text(text, encoding="utf-8")
            temporary.chmod(mode)
            os.replace(temporary, target / name)
        except SafetensorError as error:  # a full disk, in its words
            raise OSError(f"{target / name} could not be written ({error})") from None
        finally:
            temporary.unlink(missing_ok=True)


def main() -> None:
    """The command. Exit code 2 and one line for what the user can mend; a traceback is a bug."""
    about, style = __doc__.split("\n\nBoth")[0], argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=style)
    line = lambda text: " ".join(text.split()).translate(CONTROL)  # noqa: E731
    parser.error = lambda what: parser.exit(2, f"export_hf.py: {line(what)}\n")
    parser.add_argument("--model", required=True, help="what to read")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    logging.disable(logging.ERROR)  # open_clip logs what it then raises
    model = Path(args.model)
    try:
        layouts = "open_clip_config.json", "enhanced/open_clip_config.json", "config.json"
        layout = next((name for name in layouts if (model / name).is_file()), "")
        if model.is_dir() and not layout:
            raise FileNotFoundError(f"{model} is no model folder: none of {', '.join(layouts)}")
        model = model / "enhanced" if layout.startswith("enhanced") else model  # a run: its result
        way = restore if layout == "config.json" else export
        for source in (model, Path(args.model.rpartition(":")[2])):  # or the file of NAME:FILE
            if source.exists() and source.resolve().is_relative_to(os.path.realpath(args.out)):
                raise ValueError(f"--out {args.out} is --model, or holds it: give another folder")
        print(*map(line, way(model, args.out)), sep="\n")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        parser.error(f"{args.model} has no config of a CLIP: {error!r:.200}")


if __name__ == "__main__":
    main()
