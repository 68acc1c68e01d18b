"""Enhanced CLIP → transformers layout (LLaVA and friends), and back.

    python export_hf.py --model runs/toy/enhanced --out enhanced-hf     open_clip → transformers
    python export_hf.py --model enhanced-hf --out enhanced-oc           transformers → open_clip

Both libraries hold the same numbers, under other names and sometimes in other shapes. So no model
is run here: tensors are renamed and reshaped by the tables below, and going there and back returns
every bit. Three differences are more than a name or an axis of length 1:

* open_clip's attention is PyTorch's own, which makes q, k and v in one product: their matrices are
  packed into one. transformers has three layers, which can be adapted one by one.
* CLIP multiplies features by a bare matrix P from the right, x @ P. In transformers it is an
  nn.Linear, which stores W and computes x @ W.T. So W is P transposed.
* SigLIP's image tower is a timm model. In its pool one learned query looks at all patches, so q is
  a matrix of its own beside the packed k and v. transformers packs all three here, and only here.

Nothing is guessed, for no error would tell. A model with the wrong activation or epsilon loads
without a word, and its features are merely worse. No shape tells GELU from QuickGELU. Hence
open_clip builds the model, and what the tensors do not say is read off its modules.

Letters: D width of a tower, E width of the space that images and texts share, N positions.
This module imports nothing of this project: copy it freely.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

OURS = "open_clip_config"  # key in config.json under which the way back is kept

# -- Which tensor becomes which ------------------------------------------------------------------
# What happens to tensors on their way: open_clip → transformers, and transformers → open_clip.
CHANGES = {
    "same": (lambda *x: x, lambda *x: x),
    "transpose": (lambda x: [x.T], lambda x: [x.T]),  # (D, E) ↔ (E, D)
    "unbatch": (lambda x: [x[0]], lambda x: [x[None]]),  # (1, N, D) ↔ (N, D)
    "vector": (lambda x: [x.reshape(1)], lambda x: [x.reshape(())]),  # () ↔ (1,)
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
# Outside of the blocks: the change, the name in open_clip, the name in transformers. There,
# positions are an nn.Embedding, which adds ".weight" to their name.
CLIP = (
    ("same", "visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("same", "visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("same", "visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("transpose", "visual.proj", "visual_projection.weight"),
    ("same", "token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("same", "positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("transpose", "text_projection", "text_projection.weight"),
    ("same", "logit_scale", "logit_scale"),
    ("same", "visual.ln_pre.*", "vision_model.pre_layrnorm.*"),  # the missing "e" is theirs
    ("same", "visual.ln_post.*", "vision_model.post_layernorm.*"),
    ("same", "ln_final.*", "text_model.final_layer_norm.*"),
)
SIGLIP = (
    ("unbatch", "visual.trunk.pos_embed", "vision_model.embeddings.position_embedding.weight"),
    ("same", "visual.trunk.attn_pool.latent", "vision_model.head.probe"),  # the learned query
    ("same", "text.token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("same", "text.positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("vector", "logit_scale", "logit_scale"),
    ("vector", "logit_bias", "logit_bias"),
    ("pack", "visual.trunk.attn_pool.{q,kv}.*", "vision_model.head.attention.in_proj_*"),
    ("same", "visual.trunk.patch_embed.proj.*", "vision_model.embeddings.patch_embedding.*"),
    ("same", "visual.trunk.norm.*", "vision_model.post_layernorm.*"),
    ("same", "visual.trunk.attn_pool.proj.*", "vision_model.head.attention.out_proj.*"),
    ("same", "visual.trunk.attn_pool.norm.*", "vision_model.head.layernorm.*"),
    ("same", "visual.trunk.attn_pool.mlp.{fc1,fc2}.*", "vision_model.head.mlp.{fc1,fc2}.*"),
    ("same", "text.ln_final.*", "text_model.final_layer_norm.*"),
    ("same", "text.text_projection.*", "text_model.head.*"),
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
    head, _, rest = pattern.partition("{")
    options, _, tail = rest.partition("}")
    return [head + option + tail for option in options.split(",")]


def rules_for(model: nn.Module) -> list[tuple[str, list[str], list[str]]]:
    """The tables, written out for one model.
    Args: model: as open_clip builds it; the meta device will do.
    Returns: a change, its names in open_clip and its names in transformers, rule by rule.
    Raises: ValueError as `kind_of`.
    """
    rows, *towers = KINDS[kind_of(model)]
    rows = list(rows)
    for blocks, tower in zip(towers, TOWERS, strict=True):
        for i in range(len(model.get_submodule(blocks))):
            here, there = f"{blocks}.{i}", f"{tower}.encoder.layers.{i}"
            for change, plain, timm, theirs in BLOCK:
                ours = timm if "trunk" in blocks else plain  # open_clip's word for a timm model
                rows.append((change, f"{here}.{ours}", f"{there}.{theirs}"))
    return [
        (change, _names(ours.replace("*", part)), _names(theirs.replace("*", part)))
        for change, ours, theirs in rows
        for part in (("weight", "bias") if "*" in ours else ("",))
    ]


def convert(state: dict[str, Tensor], rules: list, export: bool) -> dict[str, Tensor]:
    """All tensors to the other side. Each must be used: one that no rule asks for would be dropped
    in silence, and the copy would be another model.
    Args: state: tensors by name; rules: those of `rules_for`; export: open_clip → transformers?
    Returns: tensors by their new names, contiguous: safetensors stores no transposed views.
    Raises: ValueError naming a tensor that is missing or left over.
    """
    state, result = dict(state), {}
    for change, ours, theirs in rules:
        here, there = (ours, theirs) if export else (theirs, ours)
        missing = next((name for name in here if name not in state), None)
        if missing:
            raise ValueError(f"tensor {missing} is missing; is this a whole CLIP or SigLIP?")
        parts = CHANGES[change][0 if export else 1](*(state.pop(name) for name in here))
        result |= {n: part.contiguous() for n, part in zip(there, parts, strict=True)}
    if state:
        raise ValueError(f"{len(state)} tensors have no place there, e.g. {min(state)}")
    return result


# -- Configurations ------------------------------------------------------------------------------
def build_empty(about: dict, folder: Path) -> nn.Module:
    """The model that open_clip would build, on the meta device: all modules, but no memory.
    Args: about: the open_clip config; folder: where it comes from, for the error.
    Raises: ValueError if half of the config is missing.
    """
    if "vision_cfg" not in about.get("model_cfg", {}) or "preprocess_cfg" not in about:
        raise ValueError(f"{folder}: the open_clip config has no model_cfg and preprocess_cfg")
    settings = dict(about["model_cfg"])
    # The one key that is no argument: it says that the text tower is a module of its own.
    build = open_clip.CustomTextCLIP if settings.pop("custom_text", False) else open_clip.CLIP
    with torch.device("meta"):
        return build(**settings)


def activation_name(blocks: nn.Module) -> str:
    """transformers' name of the activation in the MLPs of a tower's blocks. The module is asked,
    for open_clip decides in several places: a switch for the whole model, arguments for one tower,
    or timm's own list.
    Raises: ValueError for others than GELUs.
    """
    _, activation, *_ = blocks[0].mlp.children()  # it follows the first layer in both libraries
    if type(activation).__name__ == "QuickGELU":  # x · sigmoid(1.702 x), in OpenAI's own weights
        return "quick_gelu"
    if isinstance(activation, nn.GELU):
        return "gelu" if activation.approximate == "none" else "gelu_pytorch_tanh"
    raise ValueError(f"activation {type(activation).__name__} has no name in transformers")


def transformers_config(model: nn.Module, about: dict, state: dict[str, Tensor]) -> dict:
    """config.json. Nothing is left to transformers' defaults, which are those of other models.
    Args: model: as open_clip builds it; about: its open_clip config; state: the exported tensors.
    Returns: the file as a dict, with `about` inside, so that the way back need not be derived.
    Raises: ValueError as `kind_of` and `activation_name`.
    """
    kind = kind_of(model)
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
    Args: config: its config.json; folder: where preprocessor_config.json may be.
    Raises: ValueError for another kind of model, an activation that open_clip has no switch for,
        or a SigLIP of unknown size.
    """
    if OURS in config:
        return config[OURS]
    kind = config.get("model_type")
    if kind not in KINDS:
        raise ValueError(f"{folder}: model_type {kind!r}; expected 'clip' or 'siglip'")
    vision, text = config["vision_config"], config["text_config"]
    if kind == "clip":
        model_cfg = _clip_architecture(vision, text, folder)
        model_cfg["embed_dim"] = config.get("projection_dim", 512)  # E
        mean, std, mode = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, "shortest"
    else:
        model_cfg = _siglip_architecture(vision, text, folder)
        mean, std, mode = (0.5,) * 3, (0.5,) * 3, "squash"
    if (file := folder / "preprocessor_config.json").is_file():
        processor = _read(file)
        mean, std = processor.get("image_mean", mean), processor.get("image_std", std)
    preprocess = {"mean": list(mean), "std": list(std), "resize_mode": mode}
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess}


def _clip_architecture(vision: dict, text: dict, folder: Path) -> dict:
    """config.json describes a CLIP in full. What it leaves out equals transformers' defaults, the
    sizes of ViT-B/32: they are the second argument of each `get`."""
    activation = vision.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise ValueError(f"{folder}: hidden_act {activation!r} has no switch in open_clip")
    width, text_width = vision.get("hidden_size", 768), text.get("hidden_size", 512)
    return {
        "quick_gelu": activation == "quick_gelu",  # one switch for both towers
        "vision_cfg": {
            "image_size": vision.get("image_size", 224),
            "layers": vision.get("num_hidden_layers", 12),
            "width": width,
            # open_clip wants the width of a head for images, but the number of heads for text
            "head_width": width // vision.get("num_attention_heads", 12),
            "patch_size": vision.get("patch_size", 32),
            "mlp_ratio": vision.get("intermediate_size", 3072) / width,
        },
        "text_cfg": {
            "context_length": text.get("max_position_embeddings", 77),
            "vocab_size": text.get("vocab_size", 49408),
            "width": text_width,
            "heads": text.get("num_attention_heads", 8),
            "layers": text.get("num_hidden_layers", 12),
            "mlp_ratio": text.get("intermediate_size", 2048) / text_width,
        },
    }


def _siglip_architecture(vision: dict, text: dict, folder: Path) -> dict:
    """A SigLIP also needs the timm name of its image tower, which no config.json tells. So it must
    have the sizes of a model that open_clip knows by name; the first one is taken."""
    width, size = vision.get("hidden_size", 768), vision.get("image_size", 224)
    length, vocabulary = text.get("max_position_embeddings", 64), text.get("vocab_size", 32000)
    family = f"patch{vision.get('patch_size', 16)}_siglip"
    for name in open_clip.list_models():
        known = open_clip.get_model_config(name)
        trunk, words = known["vision_cfg"], known["text_cfg"]
        images = known["embed_dim"], trunk.get("image_size")  # E equals D in SigLIP
        tokens = words.get("context_length"), words.get("vocab_size")
        if (images, tokens) == ((width, size), (length, vocabulary)) and family in str(trunk):
            return known
    sizes = f"width {width}, {size} px and {length} text tokens"
    raise ValueError(f"{folder}: no SigLIP in open_clip has {sizes}")


def preprocessor_config(about: dict) -> dict:
    """preprocessor_config.json: how a picture becomes the tensor that the weights were trained on.
    CLIP resizes the shorter side and crops the middle, SigLIP squashes to a square.
    Args: about: the open_clip config.
    """
    side = about["model_cfg"]["vision_cfg"]["image_size"]
    preprocess = about["preprocess_cfg"]
    square = {"height": side, "width": side}
    if preprocess.get("resize_mode") == "squash":
        own = {"image_processor_type": "SiglipImageProcessor", "size": square}
    else:
        own = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side}}
        own |= {"do_center_crop": True, "crop_size": square, "do_convert_rgb": True}
    return {
        **own,
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True),
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,  # bytes → 0 … 1
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
    }


def tokenizer_files(about: dict) -> tuple[dict[str, str | dict], str]:
    """CLIP's tokenizer, from the merges that open_clip ships. Other models get none: with a wrong
    tokenizer every sentence means something else, and no error tells.
    Args: about: the open_clip config.
    Returns: file name → content, and a line that says what they are or why there are none.
    """
    text = about["model_cfg"]["text_cfg"]
    if name := text.get("hf_tokenizer_name"):
        return {}, f"not written: SigLIP's is a sentencepiece model; take it from {name}"
    if text["vocab_size"] != 49408:
        return {}, f"not written: CLIP's has 49408 tokens, this model {text['vocab_size']}"
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
        "special_tokens_map.json": special,
        "tokenizer_config.json": {**details, **special},
    }, "vocab.json, merges.txt"


# -- Folders -------------------------------------------------------------------------------------
def export(source: Path, target: Path) -> list[str]:
    """open_clip folder → transformers folder. All is checked before the first file is written.
    Returns: lines that say what was written.
    Raises: ValueError or OSError naming the file or the folder at fault.
    """
    about = _read(source / "open_clip_config.json")
    state = _read(source / "open_clip_model.safetensors")
    model = build_empty(about, source)
    _fill(model, state, source)
    tensors = convert(model.state_dict(), rules_for(model), export=True)
    config = transformers_config(model, about, tensors)
    tokenizer, line = tokenizer_files(about)
    files = {"model.safetensors": tensors, "config.json": config, **tokenizer}
    _write(source, target, {**files, "preprocessor_config.json": preprocessor_config(about)})
    weights = f"{target / 'model.safetensors'}: {len(tensors)} tensors"
    return [f"{weights}, {config['architectures'][0]}", f"tokenizer: {line}"]


def restore(source: Path, target: Path) -> list[str]:
    """transformers folder → open_clip folder. Returns and raises as `export`."""
    about, state, notes = read_transformers(source)
    _write(source, target, {"open_clip_model.safetensors": state, "open_clip_config.json": about})
    return [*notes, f"{target / 'open_clip_model.safetensors'}: {len(state)} tensors"]


def read_transformers(source: Path) -> tuple[dict, dict[str, Tensor], list[str]]:
    """A transformers folder as open_clip has it.
    Returns: the open_clip config, the tensors, and lines that the user should read.
    Raises: ValueError or OSError naming the file or the folder at fault.
    """
    config = _read(source / "config.json")
    if "vision_config" not in config:
        raise ValueError(f"{source}: config.json has no vision_config: not a whole CLIP or SigLIP")
    about = open_clip_config(config, source)
    model = build_empty(about, source)
    # Older versions of transformers also saved these counters: 0, 1, 2, …
    found = {k: v for k, v in _read_weights(source).items() if not k.endswith(".position_ids")}
    _fill(model, convert(found, rules_for(model), export=False), source)
    # A SigLIP of open_clip's list brings timm's activation, which may not be this folder's.
    wanted = config["vision_config"].get("hidden_act")
    own = activation_name(model.get_submodule(KINDS[kind_of(model)][1]))
    note = f"note: {source} was made with {wanted}, open_clip's tower uses {own}: features "
    notes = [note + "differ a little"] if wanted and wanted != own else []
    return about, model.state_dict(), notes


def _fill(model: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """The tensors become the model's own; PyTorch refuses a wrong name or shape by itself."""
    try:
        model.load_state_dict(state, strict=True, assign=True)  # assign: meta cannot be copied to
    except RuntimeError as error:  # its first line names a class, the others what is wrong
        what = " ".join(str(error).partition("\n")[2].split())[:300]
        raise ValueError(f"{source}: the weights do not fit the configuration: {what} …") from None


def _read(file: Path) -> dict:
    """A JSON or safetensors file. Raises: ValueError naming a file that is neither."""
    try:
        return json.loads(file.read_text()) if file.suffix == ".json" else load_file(file)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error})") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error})") from None


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a transformers folder: one file, pieces that an index names, or a pickle."""
    index, pickled = folder / "model.safetensors.index.json", folder / "pytorch_model.bin"
    pieces = ["model.safetensors"]
    if index.is_file():
        pieces = sorted(set(_read(index)["weight_map"].values()))
    elif pickled.is_file() and not (folder / pieces[0]).is_file():
        try:  # a pickle may run any program; `weights_only` lets in nothing but tensors
            return torch.load(pickled, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds
            kind = type(error).__name__
            raise ValueError(f"{pickled} cannot be read as tensors alone ({kind})") from None
    # `.name`: an index may not point to other folders
    return {k: v for piece in pieces for k, v in _read(folder / Path(piece).name).items()}


def _write(source: Path, target: Path, files: dict[str, str | dict]) -> None:
    """Files by name, and the model card of `source`, if it has one.

    Each is written under a temporary name and then renamed, which happens at once or not at all.
    A run that is cut off thus leaves no half of a file that looks like a whole one.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        temporary = target / f"{name}.tmp{os.getpid()}"
        if name.endswith(".safetensors"):
            # transformers refuses tensors that do not say which framework wrote them
            save_file(content, temporary, {"format": "pt"})
        else:
            text = content if isinstance(content, str) else json.dumps(content, indent=1)
            temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target / name)
    if (source / "README.md").is_file():
        shutil.copy(source / "README.md", target / "README.md")


def main() -> None:
    """The command. Exit code 2 and one line for what the user can mend; a traceback is a bug."""
    summary, example = __doc__.split("\n\n")[:2]
    parser = argparse.ArgumentParser(
        description=summary, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder to read")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    ways = {"open_clip_config.json": export, "config.json": restore}
    try:
        if not args.model.is_dir():
            raise FileNotFoundError(f"no folder {args.model}")
        if args.out.resolve() == args.model.resolve():
            raise ValueError(f"--out {args.out} is --model: give another folder")
        found = [way for name, way in ways.items() if (args.model / name).is_file()]
        if not found:
            names = " nor ".join(ways)
            raise FileNotFoundError(f"{args.model} is no model folder: neither {names}")
        print(*found[0](args.model, args.out), sep="\n")
    except (OSError, ValueError, KeyError, TypeError) as error:
        # a KeyError says the key and nothing else
        what = f"{args.model}: {error} is missing" if isinstance(error, KeyError) else error
        print(f"export_hf.py: {what}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
