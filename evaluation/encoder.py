"""A CLIP as its judges see it: any spelling of a model, its pictures and texts as unit vectors.

Every evaluation asks the same of a model: encode these pictures, encode these texts, in float32 and
with the preprocessing that the model was trained with. That takes minutes on real data, and the
answer is the same tomorrow; so features are kept on the disk, under a name made of the weights,
the preprocessing and the inputs. A second call on the same weights is quick, a changed weight or
picture is never mistaken for the old one.

Letters: K pictures or texts, d width of the joint space, D width of the tower.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import export_hf
from pretrained.backbones import ClipInfo, build_clip, load_clip
from util.files import fingerprint, save_tensors

Picture = Path | str | np.ndarray


@dataclass
class Encoder:
    """One CLIP with its tokenizer and preprocessing, in float32.

    Args: cache: folder for features; None keeps none.
    """

    name: str
    clip: torch.nn.Module
    info: ClipInfo
    device: torch.device
    cache: Path | None = None
    _weights: str = field(default="", init=False)

    def __post_init__(self):
        self.clip = self.clip.to(self.device).float().eval()
        self.transform = image_transform(
            self.info.image_size,
            is_train=False,
            mean=self.info.mean,
            std=self.info.std,
            resize_mode=self.info.resize_mode,
        )
        self.tokenizer = find_tokenizer(self.info)

    def images(self, pictures: list[Picture], batch: int = 64) -> Tensor:
        """Pictures, uint8 arrays (H, W, 3) or files → unit vectors (K, d).

        Raises: ValueError naming a picture that cannot be read.
        """

        def encode(part: list[Picture]) -> Tensor:
            return self.clip.encode_image(self._stacked(part), normalize=True)

        return self._remembered("image", pictures, encode, batch)

    def texts(self, texts: list[str], batch: int = 256) -> Tensor:
        """Texts → unit vectors (K, d)."""

        def encode(part: list[str]) -> Tensor:
            return self.clip.encode_text(self.tokenizer(part).to(self.device), normalize=True)

        return self._remembered("text", texts, encode, batch)

    @torch.no_grad()
    def layers(self, pictures: list[Picture], batch: int = 64) -> list[Tensor]:
        """Mean token of the image tower after each block, one (K, D) a layer."""
        visual = self.clip.visual
        blocks = visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks
        found: list[list[Tensor]] = [[] for _ in blocks]

        def keep(layer: int):
            def hook(module, inputs, output):
                found[layer].append(output.mean(1).float().cpu())

            return hook

        hooks = [block.register_forward_hook(keep(i)) for i, block in enumerate(blocks)]
        try:
            for start in range(0, len(pictures), batch):
                self.clip.encode_image(self._stacked(pictures[start : start + batch]))
        finally:
            for hook in hooks:
                hook.remove()
        return [torch.cat(parts) for parts in found]

    def _stacked(self, pictures: list[Picture]) -> Tensor:
        """Preprocessed and on the device: (K, 3, H, W)."""
        ready = [self.transform(open_picture(picture)) for picture in pictures]
        return torch.stack(ready).to(self.device)

    @torch.no_grad()
    def _remembered(self, kind: str, inputs: list, encode, batch: int) -> Tensor:
        file = self.cache and self.cache / f"{kind}-{self._digest(kind, inputs)}.safetensors"
        if file and file.is_file():
            try:
                return load_file(file)["features"]
            except Exception:  # a damaged cache is no cache
                file.unlink()
        parts = []
        starts = range(0, len(inputs), batch)
        style = {"leave": False, "disable": len(starts) < 4, "unit": "batch"}
        for start in tqdm(starts, f"{self.name}: {kind}s", **style):
            parts.append(encode(inputs[start : start + batch]).float().cpu())
        features = torch.cat(parts)
        if file:
            save_tensors({"features": features}, file)
        return features

    def _digest(self, kind: str, inputs: list) -> str:
        """What the features depend on, as 24 letters."""
        self._weights = self._weights or fingerprint(self.clip)
        about = repr((self.info.open_clip_config(), torch.__version__, self.device.type))
        digest = hashlib.sha256(f"{kind} {self._weights} {about}".encode())
        for item in inputs:
            if kind == "text":
                digest.update(item.encode() + b"\0")
            elif isinstance(item, np.ndarray):
                digest.update(repr(item.shape).encode() + item.tobytes())
            else:
                status = os.stat(item)
                digest.update(f"{item} {status.st_size} {status.st_mtime_ns}\0".encode())
        return digest.hexdigest()[:24]


def open_picture(picture: Picture) -> Image.Image:
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    try:
        with Image.open(picture) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"picture {picture} cannot be read ({error})") from None


class WordTokenizer:
    """Texts of whole words, called as open_clip's tokenizers are: texts → (K, L) int64.

    open_clip pools the text tower at the *largest* id of a row, so the end token must be the
    largest of all. Id 0 pads.

    Args: words: the vocabulary, as the model's JSON lists it; context_length: L.
    Raises: ValueError naming the word that the model does not know, or a text that is too long.
    """

    def __init__(self, words: Sequence[str], context_length: int):
        self.ids = {word: number for number, word in enumerate(words, start=1)}
        self.start, self.end = len(words) + 1, len(words) + 2
        self.vocab_size, self.context_length = len(words) + 3, context_length

    def __call__(self, texts: str | list[str]) -> Tensor:
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.long)  # (K, L)
        for row, text in enumerate(texts):
            unknown = next((word for word in text.split() if word not in self.ids), None)
            if unknown is not None:
                known = " ".join(self.ids)
                raise ValueError(
                    f"this CLIP has no word {unknown!r} (in {text!r}); it has: {known}"
                )
            ids = [self.start, *(self.ids[word] for word in text.split()), self.end]
            if len(ids) > self.context_length:
                raise ValueError(f"{text!r} has more than {self.context_length - 2} words")
            tokens[row, : len(ids)] = torch.tensor(ids)
        return tokens


def find_tokenizer(info: ClipInfo):
    """The tokenizer that a text tower was trained with."""
    text = info.model_cfg["text_cfg"]
    length = text.get("context_length", 77)
    if info.words:
        return WordTokenizer(info.words, length)
    if name := text.get("hf_tokenizer_name"):
        try:
            more = text.get("tokenizer_kwargs", {})
            return open_clip.tokenizer.HFTokenizer(name, context_length=length, **more)
        except Exception as error:  # not installed, or no network: many kinds
            raise ValueError(
                f"model {info.name}: its tokenizer {name} could not be loaded; it needs "
                f"`pip install transformers sentencepiece` and its files "
                f"({str(error).splitlines()[0]})"
            ) from None
    tokenizer = open_clip.SimpleTokenizer(context_length=length)
    if text.get("vocab_size", tokenizer.vocab_size) != tokenizer.vocab_size:
        raise ValueError(
            f"model {info.name}: its text tower knows {text['vocab_size']} tokens, CLIP's own "
            f'{tokenizer.vocab_size}; a model of whole words lists them in its JSON ("words")'
        )
    return tokenizer


# ------------------------------------------------------------------------------------------------
# Models by any spelling
# ------------------------------------------------------------------------------------------------
def load_encoders(
    models: Sequence[str], device: torch.device, cache: Path | None = None
) -> list[Encoder]:
    """One encoder a model, with names that tell them apart.

    Args: models: spellings of `backbones.load_clip`, or folders in transformers' layout.
    Raises: ValueError or FileNotFoundError naming the model.
    """
    if len(set(models)) < len(models):
        raise ValueError("--model: the same model is named twice")
    names = [short_name(model) for model in models]
    if len(set(names)) < len(names):
        names = models
    return [Encoder(n, *_load(m), device, cache) for n, m in zip(names, models, strict=True)]


def _load(model: str) -> tuple[torch.nn.Module, ClipInfo]:
    folder = Path(model)
    if (folder / "open_clip_config.json").is_file() or not (folder / "config.json").is_file():
        return load_clip(model)
    about, state, notes = export_hf.read_transformers(folder)
    for note in notes:
        print(note)
    info = ClipInfo.from_config(model, about)
    clip = build_clip(info)
    clip.load_state_dict(state)
    return clip.eval(), info


def short_name(model: str) -> str:
    """What a table calls a model: runs/demo/enhanced → demo/enhanced, toy/clip.safetensors →
    toy/clip, and any other spelling as it is."""
    path = Path(model)
    if ":" not in model and path.suffix == ".safetensors":
        path = path.with_suffix("")
    elif not path.is_dir():
        return model
    return "/".join(path.resolve().parts[-2:])


def cache_folder(cache: str, runs: str) -> Path | None:
    """Where features are kept: `cache`, by default RUNS/features, or nowhere."""
    return None if cache == "none" else Path(cache or Path(runs) / "features")
