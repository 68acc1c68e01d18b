"""Enhanced CLIP → transformers layout (LLaVA and friends), and back.

    python export_hf.py --model runs/toy/enhanced --out enhanced-hf     open_clip → transformers
    python export_hf.py --model enhanced-hf --out enhanced-oc           transformers → open_clip

The two libraries hold the same numbers under other names. What differs beyond names:

* open_clip packs q, k and v of an attention into one matrix, transformers keeps three;
* `visual.proj` and `text_projection` of CLIP multiply from the right (x @ P), an nn.Linear from the
  left: transposed;
* SigLIP's image tower is a timm model in open_clip. Its attention pool keeps q apart from k and v,
  transformers packs all three, just there.

No model is run: tensors are renamed, reshaped, and checked against the names and shapes that
open_clip itself would build. Going there and back gives every bit back. The activation is read off
the model, never guessed: it is the one thing that wrong weights files do not betray.

This module imports nothing of this project: copy it freely.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

OURS = "open_clip_config"  # key in config.json under which the way back is kept


# ------------------------------------------------------------------------------------------------
# One rule per tensor, or per group of tensors that is packed on one side
# ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Rule:
    """Names in open_clip ↔ names in transformers, and how the tensors of one become the other's."""

    open_clip: tuple[str, ...]
    transformers: tuple[str, ...]
    export: Callable[..., tuple[Tensor, ...]]
    restore: Callable[..., tuple[Tensor, ...]]


def same(a: str, b: str) -> Rule:
    return Rule((a,), (b,), lambda x: (x,), lambda x: (x,))


def transposed(a: str, b: str) -> Rule:
    return Rule((a,), (b,), lambda x: (x.T,), lambda x: (x.T,))


def batched(a: str, b: str) -> Rule:
    """A leading axis of length 1 that only one side has: open_clip's (1, …)."""
    return Rule((a,), (b,), lambda x: (x[0],), lambda x: (x[None],))


def scalar(a: str, b: str) -> Rule:
    """A scalar that transformers' SigLIP keeps as a vector of one."""
    return Rule((a,), (b,), lambda x: (x.reshape(1),), lambda x: (x.reshape(()),))


def split_qkv(a: str, b: str, kind: str) -> Rule:
    """Packed (3·D, …) ↔ q, k and v of (D, …) each."""
    return Rule(
        (a,),
        tuple(f"{b}.{part}_proj.{kind}" for part in "qkv"),
        lambda packed: packed.chunk(3),
        lambda q, k, v: (torch.cat([q, k, v]),),
    )


def pack_pool(a: str, b: str, kind: str) -> Rule:
    """timm's pool: q (D, …) and kv (2·D, …) ↔ one packed (3·D, …)."""
    return Rule(
        (f"{a}.q.{kind}", f"{a}.kv.{kind}"),
        (f"{b}.in_proj_{kind}",),
        lambda q, kv: (torch.cat([q, kv]),),
        lambda packed: packed.split([len(packed) // 3, 2 * (len(packed) // 3)]),
    )


def both(a: str, b: str) -> list[Rule]:
    """Weight and bias of one module."""
    return [same(f"{a}.{kind}", f"{b}.{kind}") for kind in ("weight", "bias")]


# What the parts of a residual block are called: two norms, packed qkv, output, two MLP layers.
OPEN_CLIP_BLOCK = ("ln_1", "ln_2", "attn.in_proj_{}", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
TIMM_BLOCK = ("norm1", "norm2", "attn.qkv.{}", "attn.proj", "mlp.fc1", "mlp.fc2")
HF_BLOCK = ("layer_norm1", "layer_norm2", "self_attn", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


def blocks(a: str, b: str, count: int, names: tuple[str, ...]) -> list[Rule]:
    """All residual blocks of a tower: `a`.i on open_clip's side, `b`.i on transformers'."""
    rules = []
    for i in range(count):
        for mine, theirs in zip(names, HF_BLOCK, strict=True):
            here, there = f"{a}.{i}.{mine}", f"{b}.{i}.{theirs}"
            if "{}" in mine:
                rules += [split_qkv(here.format(kind), there, kind) for kind in ("weight", "bias")]
            else:
                rules += both(here, there)
    return rules


def clip_rules(vision_layers: int, text_layers: int) -> list[Rule]:
    """OpenAI's and MetaCLIP's models."""
    tower, text = "vision_model", "text_model"
    rules = [
        same("visual.class_embedding", f"{tower}.embeddings.class_embedding"),
        same("visual.positional_embedding", f"{tower}.embeddings.position_embedding.weight"),
        same("visual.conv1.weight", f"{tower}.embeddings.patch_embedding.weight"),
        transposed("visual.proj", "visual_projection.weight"),
        same("token_embedding.weight", f"{text}.embeddings.token_embedding.weight"),
        same("positional_embedding", f"{text}.embeddings.position_embedding.weight"),
        transposed("text_projection", "text_projection.weight"),
        same("logit_scale", "logit_scale"),
        *both("visual.ln_pre", f"{tower}.pre_layrnorm"),  # the missing "e" is theirs
        *both("visual.ln_post", f"{tower}.post_layernorm"),
        *both("ln_final", f"{text}.final_layer_norm"),
    ]
    layers, own = "encoder.layers", "transformer.resblocks"
    rules += blocks(f"visual.{own}", f"{tower}.{layers}", vision_layers, OPEN_CLIP_BLOCK)
    return rules + blocks(own, f"{text}.{layers}", text_layers, OPEN_CLIP_BLOCK)


def siglip_rules(vision_layers: int, text_layers: int) -> list[Rule]:
    """SigLIP's models: a timm trunk with an attention pool, and a text tower with a head."""
    trunk, tower, text = "visual.trunk", "vision_model", "text_model"
    pool, head = f"{trunk}.attn_pool", f"{tower}.head"
    rules = [
        batched(f"{trunk}.pos_embed", f"{tower}.embeddings.position_embedding.weight"),
        same(f"{pool}.latent", f"{head}.probe"),
        same("text.token_embedding.weight", f"{text}.embeddings.token_embedding.weight"),
        same("text.positional_embedding", f"{text}.embeddings.position_embedding.weight"),
        scalar("logit_scale", "logit_scale"),
        scalar("logit_bias", "logit_bias"),
        *(pack_pool(pool, f"{head}.attention", kind) for kind in ("weight", "bias")),
        *both(f"{trunk}.patch_embed.proj", f"{tower}.embeddings.patch_embedding"),
        *both(f"{trunk}.norm", f"{tower}.post_layernorm"),
        *both(f"{pool}.proj", f"{head}.attention.out_proj"),
        *both(f"{pool}.norm", f"{head}.layernorm"),
        *both(f"{pool}.mlp.fc1", f"{head}.mlp.fc1"),
        *both(f"{pool}.mlp.fc2", f"{head}.mlp.fc2"),
        *both("text.ln_final", f"{text}.final_layer_norm"),
        *both("text.text_projection", f"{text}.head"),
    ]
    layers, own = "encoder.layers", "text.transformer.resblocks"
    rules += blocks(f"{trunk}.blocks", f"{tower}.{layers}", vision_layers, TIMM_BLOCK)
    return rules + blocks(own, f"{text}.{layers}", text_layers, OPEN_CLIP_BLOCK)


def convert(state: dict[str, Tensor], rules: list[Rule], export: bool) -> dict[str, Tensor]:
    """All tensors to the other side. Raises: ValueError naming one that is missing or left over."""
    state, result = dict(state), {}
    for rule in rules:
        here, there = rule.open_clip, rule.transformers
        if not export:
            here, there = there, here
        missing = next((name for name in here if name not in state), None)
        if missing:
            raise ValueError(f"tensor {missing} is missing; is this a whole CLIP or SigLIP?")
        parts = (rule.export if export else rule.restore)(*(state.pop(name) for name in here))
        result |= {n: part.contiguous() for n, part in zip(there, parts, strict=True)}
    if state:
        raise ValueError(f"{len(state)} tensors have no place there, e.g. {min(state)}")
    return result


# ------------------------------------------------------------------------------------------------
# Configurations
# ------------------------------------------------------------------------------------------------
def build_empty(model_cfg: dict) -> torch.nn.Module:
    """The model that open_clip would build, without memory: for its names, shapes, activations."""
    build = open_clip.CustomTextCLIP if model_cfg.get("custom_text") else open_clip.CLIP
    with torch.device("meta"):
        return build(**{k: v for k, v in model_cfg.items() if k != "custom_text"})


def rules_for(model: torch.nn.Module) -> list[Rule]:
    """Raises: ValueError for towers that transformers' CLIP and SigLIP cannot express."""
    if hasattr(model.visual, "trunk") and hasattr(model, "text"):
        return siglip_rules(len(model.visual.trunk.blocks), len(model.text.transformer.resblocks))
    if hasattr(model.visual, "transformer") and hasattr(model, "transformer"):
        return clip_rules(len(model.visual.transformer.resblocks), len(model.transformer.resblocks))
    raise ValueError("neither a CLIP with a ViT nor a SigLIP: transformers has no layout for it")


def activation_name(module: torch.nn.Module) -> str:
    """transformers' name of an activation. Raises: ValueError for others than GELUs."""
    if type(module).__name__ == "QuickGELU":
        return "quick_gelu"
    if isinstance(module, torch.nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    raise ValueError(f"activation {type(module).__name__} has no name in transformers")


def tower_config(
    state: dict, prefix: str, heads: int, activation: torch.nn.Module, epsilon: float
) -> dict:
    """What transformers wants to know about one tower, read off its exported tensors."""
    layers = {name.split(".")[3] for name in state if name.startswith(f"{prefix}.encoder.layers.")}
    hidden, width = state[f"{prefix}.encoder.layers.0.mlp.fc1.weight"].shape
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "hidden_act": activation_name(activation),
        "layer_norm_eps": epsilon,
    }


def transformers_config(model: torch.nn.Module, about: dict, state: dict[str, Tensor]) -> dict:
    """config.json for exported tensors `state`; `about` is the open_clip config, kept inside.

    Sizes are read off the tensors, activations and epsilons off the modules. Nothing is left to
    transformers' defaults, which are those of other models.
    """
    siglip = hasattr(model.visual, "trunk")
    kind, text = ("siglip", model.text) if siglip else ("clip", model)
    first = text.transformer.resblocks[0]
    words = tower_config(
        state, "text_model", first.attn.num_heads, first.mlp.gelu, text.ln_final.eps
    )
    words["vocab_size"] = len(state["text_model.embeddings.token_embedding.weight"])
    words["max_position_embeddings"] = len(state["text_model.embeddings.position_embedding.weight"])
    if siglip:
        first, norm = model.visual.trunk.blocks[0], model.visual.trunk.norm
        activation, both_towers = first.mlp.act, {}
        words |= {"projection_size": len(state["text_model.head.weight"]), "pad_token_id": 1}
        words |= {"bos_token_id": None, "eos_token_id": None}
    else:
        first, norm = model.visual.transformer.resblocks[0], model.visual.ln_post
        activation = first.mlp.gelu
        both_towers = {"projection_dim": len(state["visual_projection.weight"])}
        # CLIP pools the text at its end token, which has the highest id (open_clip: argmax).
        end = words["vocab_size"] - 1
        words |= {"eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": end}
    images = tower_config(state, "vision_model", first.attn.num_heads, activation, norm.eps)
    images["image_size"] = about["model_cfg"]["vision_cfg"]["image_size"]
    images["patch_size"] = state["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    return {
        "model_type": kind,
        "architectures": ["SiglipModel" if siglip else "CLIPModel"],
        "torch_dtype": "float32",
        **both_towers,
        "text_config": {"model_type": f"{kind}_text_model", **words, **both_towers},
        "vision_config": {"model_type": f"{kind}_vision_model", **images, **both_towers},
        OURS: about,
    }


def open_clip_config(config: dict, folder: Path) -> dict:
    """The open_clip config of a transformers folder: ours if it came from here, else derived.

    CLIP is described in full by its config.json. SigLIP's trunk needs a timm name, so it must be
    one of the sizes that open_clip knows.

    Raises: ValueError for another kind of model, or a SigLIP of unknown size.
    """
    if OURS in config:
        return config[OURS]
    kind = config.get("model_type")
    if kind not in ("clip", "siglip"):
        raise ValueError(f"{folder}: model_type {kind!r}; expected 'clip' or 'siglip'")
    if kind == "clip":
        model_cfg = _clip_architecture(config, folder)
        mean, std, mode = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, "shortest"
    else:
        model_cfg = _siglip_architecture(config, folder)
        mean, std, mode = (0.5,) * 3, (0.5,) * 3, "squash"
    if (file := folder / "preprocessor_config.json").is_file():
        processor = _read_json(file)
        mean, std = processor.get("image_mean", mean), processor.get("image_std", std)
    preprocess = {"mean": list(mean), "std": list(std), "resize_mode": mode}
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess}


def _clip_architecture(config: dict, folder: Path) -> dict:
    """config.json may leave out what equals transformers' defaults: those of ViT-B/32."""
    vision, text = config["vision_config"], config["text_config"]
    activation = vision.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise ValueError(f"{folder}: hidden_act {activation!r} has no switch in open_clip")
    width, text_width = vision.get("hidden_size", 768), text.get("hidden_size", 512)
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": activation == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.get("image_size", 224),
            "layers": vision.get("num_hidden_layers", 12),
            "width": width,
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


def _siglip_architecture(config: dict, folder: Path) -> dict:
    """The SigLIP of open_clip that has these sizes."""
    vision, text = config["vision_config"], config["text_config"]
    width, size = vision.get("hidden_size", 768), vision.get("image_size", 224)
    length, vocabulary = text.get("max_position_embeddings", 64), text.get("vocab_size", 32000)
    family = f"patch{vision.get('patch_size', 16)}_siglip"
    for name in open_clip.list_models():
        known = open_clip.get_model_config(name)
        trunk, words = known["vision_cfg"], known["text_cfg"]
        has = known["embed_dim"], trunk.get("image_size"), words.get("context_length")
        wanted = width, size, length, vocabulary
        if (*has, words.get("vocab_size")) == wanted and family in str(trunk):
            return known
    raise ValueError(
        f"{folder}: no SigLIP in open_clip has width {width}, {size} px and {length} text tokens"
    )


def preprocessor_config(about: dict) -> dict:
    """preprocessor_config.json: CLIP resizes the shorter side and crops, SigLIP squashes."""
    side = about["model_cfg"]["vision_cfg"]["image_size"]
    preprocess = about["preprocess_cfg"]
    squash = preprocess.get("resize_mode") == "squash"
    square = {"height": side, "width": side}
    crop = {} if squash else {"do_center_crop": True, "crop_size": square, "do_convert_rgb": True}
    return {
        "image_processor_type": "SiglipImageProcessor" if squash else "CLIPImageProcessor",
        "do_resize": True,
        "size": square if squash else {"shortest_edge": side},
        "resample": 3,  # bicubic
        **crop,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
    }


def write_tokenizer(folder: Path, about: dict) -> str:
    """CLIP's tokenizer files from the merges that open_clip ships. Returns: what was done."""
    text = about["model_cfg"]["text_cfg"]
    if text.get("hf_tokenizer_name"):
        name = text["hf_tokenizer_name"]
        return f"not written: SigLIP's is a sentencepiece model; take it from {name}"
    if text["vocab_size"] != 49408:
        return f"not written: CLIP's has 49408 tokens, this model {text['vocab_size']}"
    tokenizer = open_clip.SimpleTokenizer()
    start, end = "<|startoftext|>", "<|endoftext|>"
    rename = {"<start_of_text>": start, "<end_of_text>": end}
    vocabulary = {rename.get(word, word): i for word, i in tokenizer.encoder.items()}
    _write(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    merges = [" ".join(pair) for pair in tokenizer.bpe_ranks]  # in the order of their rank
    _write(folder / "merges.txt", "#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    _write(folder / "special_tokens_map.json", json.dumps(special, indent=1))
    length = text["context_length"]
    details = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **special}
    _write(folder / "tokenizer_config.json", json.dumps(details, indent=1))
    return "vocab.json, merges.txt"


# ------------------------------------------------------------------------------------------------
# Folders
# ------------------------------------------------------------------------------------------------
def export(source: Path, target: Path) -> list[str]:
    """open_clip folder → transformers folder. Returns: lines that say what was written."""
    about = _read_json(source / "open_clip_config.json")
    state = _read_tensors(source / "open_clip_model.safetensors")
    model = _checked(about, state, source)
    tensors = convert(state, rules_for(model), export=True)
    config = transformers_config(model, about, tensors)
    target.mkdir(parents=True, exist_ok=True)
    # transformers refuses a file that does not say which framework wrote it.
    _save(tensors, target / "model.safetensors", {"format": "pt"})
    _write(target / "config.json", json.dumps(config, indent=1))
    _write(target / "preprocessor_config.json", json.dumps(preprocessor_config(about), indent=1))
    lines = [
        f"{target / 'model.safetensors'}: {len(tensors)} tensors, {config['architectures'][0]}",
        f"tokenizer: {write_tokenizer(target, about)}",
    ]
    if (source / "README.md").is_file():  # the model card goes along
        shutil.copy(source / "README.md", target / "README.md")
    return lines


def restore(source: Path, target: Path) -> list[str]:
    """transformers folder → open_clip folder. Returns: lines that say what was written."""
    about, state, notes = read_transformers(source)
    target.mkdir(parents=True, exist_ok=True)
    _save(state, target / "open_clip_model.safetensors", {"format": "pt"})
    _write(target / "open_clip_config.json", json.dumps(about, indent=1))
    if (source / "README.md").is_file():
        shutil.copy(source / "README.md", target / "README.md")
    return [*notes, f"{target / 'open_clip_model.safetensors'}: {len(state)} tensors"]


def read_transformers(source: Path) -> tuple[dict, dict[str, Tensor], list[str]]:
    """A transformers folder as open_clip has it: its config, its tensors, and what to know."""
    config = _read_json(source / "config.json")
    if "vision_config" not in config:
        raise ValueError(f"{source}: config.json has no vision_config: not a whole CLIP or SigLIP")
    about = open_clip_config(config, source)
    model = build_empty(about["model_cfg"])
    tensors = {
        # An older transformers also saved these counters; they are 0, 1, 2, …
        name: tensor
        for name, tensor in _read_shards(source).items()
        if not name.endswith(".position_ids")
    }
    state = convert(tensors, rules_for(model), export=False)
    _checked(about, state, source)
    wanted = config["vision_config"].get("hidden_act")
    trunk = getattr(model.visual, "trunk", None)
    if trunk is not None and wanted and wanted != activation_name(trunk.blocks[0].mlp.act):
        own = activation_name(trunk.blocks[0].mlp.act)
        note = f"note: {source} was made with {wanted}, open_clip's tower uses {own}: features "
        return about, state, [note + "differ a little"]
    return about, state, []


def _checked(about: dict, state: dict[str, Tensor], source: Path) -> torch.nn.Module:
    """The empty model, once `state` has exactly its names and shapes."""
    if "vision_cfg" not in about.get("model_cfg", {}) or "preprocess_cfg" not in about:
        raise ValueError(f"{source}: the open_clip config has no model_cfg and preprocess_cfg")
    model = build_empty(about["model_cfg"])
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if expected != found:
        first = next(n for n in sorted(expected | found) if expected.get(n) != found.get(n))
        raise ValueError(
            f"{source}: weights and configuration do not fit; first mismatch {first}: expected "
            f"{expected.get(first, 'nothing')}, found {found.get(first, 'nothing')}"
        )
    return model


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error})") from None


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error})") from None


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """model.safetensors, or the pieces that model.safetensors.index.json names, or a torch file,
    of which only tensors are let in."""
    index, pickled = folder / "model.safetensors.index.json", folder / "pytorch_model.bin"
    if index.is_file():
        pieces = sorted(set(_read_json(index)["weight_map"].values()))
        tensors = {}
        for piece in pieces:
            tensors |= _read_tensors(folder / Path(piece).name)
        return tensors
    if not (folder / "model.safetensors").is_file() and pickled.is_file():
        try:
            return torch.load(pickled, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds; none may end in unpickling
            raise ValueError(
                f"{pickled} cannot be read as tensors alone ({type(error).__name__})"
            ) from None
    return _read_tensors(folder / "model.safetensors")


def _save(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Under a temporary name, then renamed: never half a file."""
    temporary = file.with_name(f"{file.name}.tmp{os.getpid()}")
    save_file(tensors, temporary, metadata)
    os.replace(temporary, file)


def _write(file: Path, text: str) -> None:
    temporary = file.with_name(f"{file.name}.tmp{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def main() -> None:
    summary, example = __doc__.split("\n\n")[:2]
    parser = argparse.ArgumentParser(
        description=summary, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder to read")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    try:
        if not args.model.is_dir():
            raise FileNotFoundError(f"no folder {args.model}")
        if args.out.resolve() == args.model.resolve():
            raise ValueError(f"--out {args.out} is --model: give another folder")
        ours, theirs = (
            (args.model / n).is_file() for n in ("open_clip_config.json", "config.json")
        )
        if not ours and not theirs:
            raise FileNotFoundError(
                f"{args.model} is no model folder: neither open_clip_config.json nor config.json"
            )
        for line in (export if ours else restore)(args.model, args.out):
            print(line)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{args.model}: {error} is missing" if isinstance(error, KeyError) else error
        print(f"export_hf.py: {what}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
