"""A CLIP as its judges see it: any spelling of a model, its pictures and texts as unit vectors.

Every evaluation asks the same of a model: encode these pictures, encode these texts, in float32 and
with the preprocessing that the model was trained with. That takes minutes on real data, and the
answer is the same tomorrow; so features are kept on the disk, under a name made of the weights,
the preprocessing and the content of the inputs. A second call on the same weights is quick, a
changed weight or picture is never mistaken for the old one. The file carries a checksum of its own,
since a disk changes a bit now and then, and one bit of a feature looks like any other.

Letters: K pictures or texts, d width of the joint space, D width of the tower.
"""

import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.transform import image_transform
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

import export_hf
from data import opened
from pretrained.backbones import (
    ALLOWED,
    ClipInfo,
    build_clip,
    check_finite,
    describe_clip,
    load_clip,
)
from settings import settings_of_run
from util.cli import printable
from util.files import fingerprint, save_tensors

Picture = Path | str | np.ndarray


@dataclass
class Encoder:
    """One CLIP with its tokenizer and preprocessing, in float32.

    Args:
        device: where the model runs; features come back to the CPU. A GPU's TF32 is switched off,
            for the whole process.
        cache: folder for features; None keeps none.
        progress: bars, on terminals. False: none, here and in all that is measured with it.
    """

    name: str
    clip: torch.nn.Module
    info: ClipInfo
    device: torch.device | str = "cpu"
    cache: Path | None = None
    progress: bool = True

    def __post_init__(self):
        self.device = torch.device(self.device)
        if self.device.type == "cuda":  # where convolutions, unless told, round to TF32's 10 bits
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self.clip = self.clip.to(self.device).float().eval()
        self.transform = image_transform(
            self.info.image_size,
            is_train=False,
            mean=self.info.mean,
            std=self.info.std,
            resize_mode=self.info.resize_mode,
            interpolation=self.info.interpolation,
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
        """Mean token of the image tower after each block, one (K, D) a layer.

        Raises: ValueError for a tower that is no ViT.
        """
        visual = self.clip.visual
        part = getattr(visual, "trunk", None) or getattr(visual, "transformer", None)
        blocks = getattr(part, "blocks", None) or getattr(part, "resblocks", None)
        no_vit = f"--layers: {self.name}'s image tower is no ViT: leave --layers out"
        if not blocks:  # a ResNet, a ConvNeXt
            raise ValueError(no_vit)
        tokens = 1 if getattr(part, "batch_first", True) else 0  # their axis: `_tokens_first`
        found: list[list[Tensor]] = [[] for _ in blocks]

        def keep(layer: int):
            def hook(module, inputs, output):  # (K, N, D) or (N, K, D)
                if getattr(output, "ndim", 0) != 3:
                    raise ValueError(no_vit)
                found[layer].append(output.mean(tokens).float().cpu())

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
            if (kept := read_features(file, len(inputs))) is not None:
                return kept
            print(f"{file} is damaged: these features are made again", file=sys.stderr)
        parts = []
        starts = range(0, len(inputs), batch)
        hidden = True if len(starts) < 4 else hide_bar([self])
        style = {"leave": False, "disable": hidden, "unit": "batch"}
        for start in tqdm(starts, f"{self.name}: {kind}s", **style):
            parts.append(encode(inputs[start : start + batch]).float().cpu())
        features = torch.cat(parts)
        if file:
            try:
                save_tensors({"features": features}, file, {"sha256": checksum(features)})
            except (OSError, SafetensorError) as error:  # what was computed is not lost for that
                print(f"{file} could not be kept ({error})", file=sys.stderr)
        return features

    def _digest(self, kind: str, inputs: list) -> str:
        """What the features depend on, as 24 letters."""
        # The weights are read each time (a second for ViT-L): they may have been trained since.
        how = "cuda without TF32" if self.device.type == "cuda" else self.device.type
        about = repr((self.info.open_clip_config(), torch.__version__, how))
        digest = hashlib.sha256(f"{kind} {fingerprint(self.clip)} {about}".encode())
        for item in inputs:
            if kind == "text":
                digest.update(item.encode() + b"\0")
            elif isinstance(item, np.ndarray):
                digest.update(repr(item.shape).encode() + item.tobytes())
            else:
                digest.update(hashlib.sha256(picture_bytes(item)).digest())
        return digest.hexdigest()[:24]


def checksum(features: Tensor) -> str:
    """Of every bit of them, and of their shape."""
    content = features.contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(repr(tuple(features.shape)).encode() + content.tobytes()).hexdigest()


def read_features(file: Path, count: int) -> Tensor | None:
    """What `_remembered` has kept of `count` inputs; None for a damaged file."""
    try:
        with safe_open(file, "pt") as content:
            features, noted = content.get_tensor("features"), content.metadata()["sha256"]
        whole = features.dtype == torch.float32 and features.ndim == 2 and len(features) == count
        return features if whole and checksum(features) == noted else None
    except Exception:  # of a damaged file, anything
        return None


def picture_bytes(file: Path | str) -> bytes:
    """Raises: ValueError naming a picture that cannot be read."""
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"picture {printable(str(file))} cannot be read ({error})") from None


def hide_bar(encoders: Iterable[Encoder]) -> bool | None:
    """tqdm's `disable`: True hides a bar, None shows it where a terminal is looking. A file of
    thousands of half-drawn bars is no log."""
    return None if all(encoder.progress for encoder in encoders) else True


def in_turn(encoders: list[Encoder], what: str) -> Iterable[Encoder]:
    """One after the other, under a bar that says what is being done."""
    return tqdm(encoders, what, leave=False, disable=hide_bar(encoders))


def open_picture(picture: Picture, decode: bool = True) -> Image.Image:
    """RGB. Raises: ValueError naming the picture. decode=False reads no more than the head."""
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    try:
        with opened(picture) as image:
            return image.convert("RGB") if decode else image
    except MemoryError:  # the machine's fault, not the picture's
        raise
    except Exception as error:  # every decoder has its own kinds
        why = printable(f"{type(error).__name__}: {error}")
        raise ValueError(f"picture {printable(str(picture))} cannot be read ({why})") from None


def check_pictures(pictures: Iterable[Picture]) -> None:
    """Is each a picture, going by its head? A tenth of a millisecond each: cheaper than finding out
    after the models were loaded. (That a file was cut off shows only where it is decoded.)

    Raises: ValueError naming the first that is none.
    """
    for picture in pictures:
        open_picture(picture, decode=False)


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
        more = dict(text.get("tokenizer_kwargs") or {})
        if wrong := more.keys() - ALLOWED["tokenizer_kwargs"]:
            raise ValueError(f"model {info.name}: tokenizer_kwargs.{min(wrong)} is not allowed")
        if mode := text.get("tokenizer_mode"):
            more["tokenizer_mode"] = mode
        try:
            # False: else transformers would ask whether the tokenizer's own Python may run.
            more |= {"context_length": length, "trust_remote_code": False}
            return open_clip.tokenizer.HFTokenizer(name, **more)
        except Exception as error:  # not installed, or no network: many kinds
            raise ValueError(
                f"model {info.name}: its tokenizer {name} could not be loaded; it needs "
                f"`pip install transformers sentencepiece` and its files "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
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
    models: Sequence[str],
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    progress: bool = True,
) -> list[Encoder]:
    """One encoder a model, with names that tell them apart.

    Args:
        models: spellings of `backbones.load_clip`, runs, or folders in transformers' layout.
        device, cache, progress: as for `Encoder`.
    Raises: ValueError or FileNotFoundError naming the model.
    """
    named = name_models(models)
    return [Encoder(n, *_load(m), device, cache, progress) for n, m in named.items()]


def name_models(models: Sequence[str]) -> dict[str, str]:
    """What tables call each → its spelling, as `find_model` gives it. No weights are read: a slip
    in the second should not cost the minutes of loading the first.

    Raises: ValueError or FileNotFoundError naming a model that is not there or is named twice.
    """
    models = [find_model(model) for model in models]
    if len(set(models)) < len(models):
        raise ValueError("--model: the same model is named twice")
    for model in models:
        if not _is_transformers(model):
            describe_clip(model)
    names = [printable(short_name(model)) for model in models]
    return dict(zip(names if len(set(names)) == len(names) else models, models, strict=True))


def find_model(model: str | Path) -> str:
    """A run stands for its enhanced model: runs/NAME → runs/NAME/enhanced; others stay as they are.

    Raises: FileNotFoundError for a run that has none yet.
    """
    folder = Path(model)
    if not folder.is_dir():
        return str(model)
    if (folder / "open_clip_config.json").is_file():
        return str(folder)  # without a last slash: one model, one spelling
    if (folder / "enhanced" / "open_clip_config.json").is_file():
        return str(folder / "enhanced")
    if is_run(folder):
        raise FileNotFoundError(
            f"--model {model}: no enhanced/ in this run, since stage 2 writes it at its end; go on "
            f"with `python train.py --name {folder.name}` and the flags it was started with"
        )
    return str(folder)


def is_run(folder: Path) -> bool:
    """Has train.py written there? Models in transformers' layout have a config.json, too."""
    try:
        return bool(settings_of_run(folder))
    except (OSError, ValueError, RecursionError):  # brackets within brackets, a hundred thousand
        return (folder / "metrics.jsonl").is_file()


def _is_transformers(model: str) -> bool:
    """A folder in transformers' layout?"""
    folder = Path(model)
    return (folder / "config.json").is_file() and not (folder / "open_clip_config.json").is_file()


def _load(model: str) -> tuple[torch.nn.Module, ClipInfo]:
    if not _is_transformers(model):
        return load_clip(model)
    try:
        about, state, notes = export_hf.read_transformers(Path(model))
        info = ClipInfo.from_config(model, about)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{model}: config.json describes no model ({error!r:.200})") from None
    for note in notes:
        print(note)
    check_finite(state, model)
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
