"""MMVP-VLM and the toy benchmark: does CLIP see what it was blind to, and how sure are we?

    python eval_mmvp.py         toy benchmark: original and newest enhanced model
    python eval_mmvp.py --benchmark MMVP_VLM --model ViT-L-14-quickgelu:openai \\
        --model runs/NAME/enhanced

Nine patterns, pairs of images that differ in one of them, one statement per image (Tong et al.;
Sec. 5.1, Tab. 1). For each of a pair's two texts: which of the **two images** is more similar? The
pair counts only if both answers are right; a tie is wrong, so that a constant encoder scores 0 and
not everything. Chance is 25 %.

What is printed beside the percentage decides whether it means anything. MMVP-VLM has 135 pairs: one
pair is 0.74 points, the standard error at 32 % is 4.0. Hence hits and n, a Wilson 95 % interval,
and for before/after the exact McNemar test, which looks only at the pairs whose verdict changed.
MMVP does not notice when image and text tower drift apart (only two images compete), so the toy run
shows subject zero-shot accuracy and a linear probe in the same breath.

Letters: K pairs, d width of the joint space.
"""

import argparse
import csv
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import toyworld
from backbones import ClipInfo, load_clip
from checkpoints import write_atomically
from cli import OneLineParser, run_command
from pictures import labelled_rows
from scoring import markdown, pair_hits, summarise

IMAGE_FOLDERS = (
    "MMVP_VLM_Images",
    "MLLM_VLM Images",
    "MLLM_VLM_Images",
)  # three spellings are about
PROBE_TRAIN, PROBE_TEST = 3000, 1500  # scenes for the retention measures


# ------------------------------------------------------------------------------------------------
# Benchmarks
# ------------------------------------------------------------------------------------------------
def read_mmvp(folder: str | Path) -> list[toyworld.Pair]:
    """A folder in MMVP-VLM's layout as pairs; images stay file names until they are needed.

    Rows are keyed by Type and Question ID, never by their order. Pair k is ids (2k − 1, 2k).

    Raises: FileNotFoundError or ValueError naming the first row, id or picture that is wrong.
    """
    folder = Path(folder)
    table = folder / "Questions.csv"
    if not table.is_file():
        raise FileNotFoundError(
            f"benchmark: {table} is missing; --benchmark wants an MMVP-VLM folder"
        )
    # The published archive and its mirrors do not agree on the folder's name.
    images = next((folder / n for n in IMAGE_FOLDERS if (folder / n).is_dir()), None)
    if images is None:
        raise FileNotFoundError(
            f"benchmark: {folder} has none of the image folders {', '.join(IMAGE_FOLDERS)}"
        )
    # Statements hold commas and quotes, so only a CSV parser may touch them; "utf-8-sig" because
    # some copies went through a spreadsheet and start with a byte order mark.
    rows: dict[int, tuple[str, str]] = {}
    with open(table, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = {"Question ID", "Type", "Statement"} - set(reader.fieldnames or [])
        if missing:
            raise ValueError(f"benchmark: {table} has no column {', '.join(sorted(missing))}")
        for row in reader:
            try:
                number = int(row["Question ID"])
            except (TypeError, ValueError):
                raise ValueError(
                    f"benchmark: {table} line {reader.line_num}: Question ID "
                    f"{row['Question ID']!r} "
                    "is not a number"
                ) from None
            if number in rows:
                raise ValueError(
                    f"benchmark: {table} line {reader.line_num}: id {number} appears twice"
                )
            if not row["Type"] or not row["Statement"]:
                raise ValueError(
                    f"benchmark: {table} line {reader.line_num}: id {number} has no Type or no "
                    "Statement"
                )
            rows[number] = (row["Type"].strip(), row["Statement"].strip())
    if not rows:
        raise ValueError(f"benchmark: {table} has no rows")
    # An incomplete benchmark would still give a percentage, of something else. Refuse it.
    last = max(rows) + max(rows) % 2
    absent = sorted(set(range(1, last + 1)) - set(rows))
    if absent:
        raise ValueError(
            f"benchmark: {table} lacks {len(absent)} of the ids 1 to {last}: "
            f"{', '.join(map(str, absent[:10]))}{' …' if len(absent) > 10 else ''}"
        )
    if min(rows) < 1:
        raise ValueError(f"benchmark: {table} has id {min(rows)}; ids start at 1")
    pairs = []
    for first in range(1, last, 2):
        (pattern, left), (other, right) = rows[first], rows[first + 1]
        if pattern != other:
            raise ValueError(
                f"benchmark: {table}: ids {first} and {first + 1} are a pair of two types, "
                f"{pattern} and {other}"
            )
        files = tuple(_find_picture(images / pattern, number) for number in (first, first + 1))
        pairs.append(toyworld.Pair(pattern, files, (left, right), (first, first + 1)))
    return pairs


def _find_picture(folder: Path, number: int) -> Path:
    for suffix in (".jpg", ".png", ".jpeg", ".JPG", ".PNG"):
        if (folder / f"{number}{suffix}").is_file():
            return folder / f"{number}{suffix}"
    raise FileNotFoundError(f"benchmark: picture {number}.jpg is missing in {folder}")


# ------------------------------------------------------------------------------------------------
# Encoding
# ------------------------------------------------------------------------------------------------
@dataclass
class Judge:
    """One CLIP with its tokenizer and preprocessing, in float32."""

    name: str
    clip: torch.nn.Module
    info: ClipInfo
    device: torch.device

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

    @torch.no_grad()
    def images(self, images: list, batch: int = 256) -> Tensor:
        """uint8 arrays (H, W, 3) or file names → unit vectors (K, d)."""
        parts = []
        for start in range(0, len(images), batch):
            stacked = torch.stack(
                [self.transform(open_picture(i)) for i in images[start : start + batch]]
            )
            parts.append(
                self.clip.encode_image(stacked.to(self.device), normalize=True).float().cpu()
            )
        return torch.cat(parts)

    @torch.no_grad()
    def texts(self, texts: list[str], batch: int = 256) -> Tensor:
        """Texts → unit vectors (K, d)."""
        parts = [
            self.clip.encode_text(
                self.tokenizer(texts[i : i + batch]).to(self.device), normalize=True
            )
            for i in range(0, len(texts), batch)
        ]
        return torch.cat(parts).float().cpu()


def open_picture(image) -> Image.Image:
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    try:
        with Image.open(image) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"benchmark: picture {image} cannot be read ({error})") from None


def find_tokenizer(info: ClipInfo):
    """The tokenizer that a text tower was trained with."""
    # The toy world's tokenizer is recognised by the size of its vocabulary: CLIPs have tens of
    # thousands of tokens, the toy a few dozen.
    text, toy = info.model_cfg["text_cfg"], toyworld.ToyTokenizer()
    if text.get("vocab_size") == toy.vocab_size:
        return toy
    if name := text.get("hf_tokenizer_name"):
        try:
            return open_clip.tokenizer.HFTokenizer(
                name,
                context_length=text.get("context_length", 77),
                **text.get("tokenizer_kwargs", {}),
            )
        except Exception as error:  # not installed, or no network: many kinds
            raise ValueError(
                f"model {info.name}: its tokenizer {name} could not be loaded; it needs "
                f"`pip install transformers` and its files ({str(error).splitlines()[0]})"
            ) from None
    return open_clip.SimpleTokenizer(context_length=text.get("context_length", 77))


# ------------------------------------------------------------------------------------------------
# Scoring
# ------------------------------------------------------------------------------------------------
def score(judge: Judge, pairs: list[toyworld.Pair], prefix: str = toyworld.PREFIX) -> np.ndarray:
    """Which pairs a model gets right, bool (K,)."""
    images = judge.images([image for pair in pairs for image in pair.images])  # (2K, d)
    texts = judge.texts([f"{prefix} {s}" for pair in pairs for s in pair.statements])  # (2K, d)
    return pair_hits(images.view(len(pairs), 2, -1), texts.view(len(pairs), 2, -1))


# ------------------------------------------------------------------------------------------------
# Retention in the toy world: what was the price?
# ------------------------------------------------------------------------------------------------
def subject_zero_shot(judge: Judge, scenes: list) -> tuple[np.ndarray, Tensor]:
    """Is "a photo of SUBJECT" nearest for the right subject? bool (scenes,), and features (scenes,
    d)."""
    features = judge.images([pixels for _, pixels in scenes])  # (scenes, d)
    names = judge.texts([f"{toyworld.PREFIX} {s}" for s in toyworld.SUBJECTS])  # (S, d)
    subjects = np.array([toyworld.SUBJECTS.index(scene.subject) for scene, _ in scenes])
    return (features @ names.T).argmax(1).numpy() == subjects, features


def toy_retention(judge: Judge, scenes: list) -> dict:
    """Subject zero-shot accuracy, and what a linear probe finds in the features.

    The probe (ridge regression on one-hot labels, features frozen) tells whether the information is
    there, whatever the text tower makes of it. It is scored on unmentioned subjects.
    """
    zero_shot, features = subject_zero_shot(judge, scenes)
    train, test = features[:PROBE_TRAIN].double(), features[PROBE_TRAIN:].double()
    center = train.mean(0)
    # Ridge regression in closed form: weights = (XᵀX + λI)⁻¹ Xᵀ Y, one column per value of a
    # pattern.
    train, test = train - center, test - center
    inverse = torch.linalg.inv(
        train.T @ train + 1e-2 * torch.eye(train.shape[1], dtype=torch.float64)
    )
    probe = {}
    for pattern, values in toyworld.PATTERNS.items():
        labels = torch.tensor([list(values).index(scene[pattern]) for scene, _ in scenes])
        target = F.one_hot(labels[:PROBE_TRAIN], len(values)).double()
        weights = inverse @ train.T @ (target - target.mean(0))  # (d, values)
        right = ((test @ weights + target.mean(0)).argmax(1) == labels[PROBE_TRAIN:]).numpy()
        told = toyworld.mentioned_subjects(pattern)
        unmentioned = np.array([scene.subject not in told for scene, _ in scenes[PROBE_TRAIN:]])
        # Mentioned subjects are easy and would hide what the others gain.
        probe[pattern] = float(right[unmentioned].mean())
    return {"zero_shot": zero_shot, "features": features, "probe": probe}


def changed_pairs_pictures(pairs: list, hits: dict[str, np.ndarray], out: Path, name: str) -> None:
    """One picture for every model but the first; from the third on, its name is in the file's."""
    (_, before), *others = hits.items()
    for number, (model, after) in enumerate(others):
        suffix = f"_{model.replace('/', '_')}" if number else ""
        changed_pairs_picture(pairs, before, after, out / f"{name}{suffix}.png")


def changed_pairs_picture(
    pairs: list, before: np.ndarray, after: np.ndarray, path: Path, most: int = 5
) -> None:
    """Pairs won and lost, at most one per pattern and kind, two images and their statements
    each."""
    rows = []
    for label, mask in (
        ("won: wrong before, right after", ~before & after),
        ("lost: right before, wrong after", before & ~after),
    ):
        shown, tiles, captions = set(), [], []
        for i in np.flatnonzero(mask):
            if pairs[i].pattern not in shown and len(shown) < most:
                shown.add(pairs[i].pattern)
                tiles += [
                    torch.from_numpy(np.array(open_picture(im))).permute(2, 0, 1) / 255
                    for im in pairs[i].images
                ]
                captions += [s if len(s) < 21 else s[:19] + "…" for s in pairs[i].statements]
        if tiles:
            rows.append((f"{label} ({int(mask.sum())} pairs)", tiles, captions))
    if rows:
        labelled_rows(rows, path, height=128)


# ------------------------------------------------------------------------------------------------
# Command
# ------------------------------------------------------------------------------------------------
def newest_enhanced(runs: Path) -> Path:
    """The enhanced model written last. Raises: FileNotFoundError where there is none."""
    found = sorted(
        runs.glob("*/enhanced/open_clip_model.safetensors"), key=lambda p: p.stat().st_mtime
    )
    if not found:
        raise FileNotFoundError(
            f"no enhanced model in {runs}/*/enhanced: run python train.py first, or name --model"
        )
    return found[-1].parent


def short_name(model: str) -> str:
    """What the table calls a model: runs/demo/enhanced → demo/enhanced, the toy CLIP → original."""
    path = Path(model)
    if path.resolve() == toyworld.TOY_DIR / "clip.safetensors":
        return "original"
    if path.is_dir():
        return "/".join(path.resolve().parts[-2:])
    return path.stem if path.suffix == ".safetensors" else model


def evaluate_toy(
    judges: list[Judge], pairs_per_pattern: int, seed: int, out: Path
) -> tuple[dict, str]:
    """Unmentioned and mentioned subjects, retention, pictures. Returns results and their text."""
    results, text = {}, []
    for side, mentioned in (("unmentioned", False), ("mentioned", True)):
        pairs = toyworld.benchmark(mentioned, pairs_per_pattern, seed)
        hits = {j.name: score(j, pairs) for j in tqdm(judges, f"{side} pairs", leave=False)}
        results[side] = summarise([p.pattern for p in pairs], hits)
        text.append(markdown(f"Toy benchmark, {side} subjects", results[side]))
        changed_pairs_pictures(pairs, hits, out, f"changed_{side}")
    held_out = toyworld.ToyScenes(PROBE_TRAIN + PROBE_TEST, seed=31_415_926 + seed)
    scenes = [held_out.scene(i) for i in range(len(held_out))]
    measured = {j.name: toy_retention(j, scenes) for j in tqdm(judges, "retention", leave=False)}
    results["subject_zero_shot"] = summarise(
        ["Subject"] * len(scenes), {n: m["zero_shot"] for n, m in measured.items()}
    )[:1]
    text.append(
        markdown("Retention: zero-shot accuracy on the subject", results["subject_zero_shot"])
    )
    first = measured[judges[0].name]
    for name, m in measured.items():
        probe = 100 * float(np.mean(list(m["probe"].values())))
        cosine = float(F.cosine_similarity(first["features"], m["features"]).mean())
        results.setdefault("features", {})[name] = {"probe": m["probe"], "cosine_to_first": cosine}
        text.append(
            f"{name}: linear probe of the nine attributes on unmentioned subjects {probe:.1f} %, "
            f"mean cosine to the first model's features {cosine:.4f}\n"
        )
    return results, "\n".join(text)


def main() -> None:
    summary, example = __doc__.split("\n\n")[:2]
    parser = OneLineParser(
        description=summary,
        epilog=example,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--benchmark", default="toy", metavar="DIR", help="'toy', or an MMVP-VLM folder"
    )
    parser.add_argument(
        "--model",
        action="append",
        metavar="MODEL",
        help="open_clip NAME:TAG, FILE.safetensors or an enhanced FOLDER; repeat to compare with "
        "the first (default: the toy CLIP and the newest enhanced model)",
    )
    parser.add_argument(
        "--runs",
        default="runs",
        help="where the newest enhanced model is looked for (default: runs)",
    )
    parser.add_argument(
        "--out",
        default="",
        metavar="DIR",
        help="where results go (default: eval/ beside the model)",
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=100,
        help="toy benchmark: pairs per pattern and side (default: 100)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="toy benchmark: which one; reported figures use 0"
    )
    args = parser.parse_args()
    if args.pairs < 1:
        raise ValueError(f"--pairs {args.pairs}: at least 1")
    pairs = None if args.benchmark == "toy" else read_mmvp(args.benchmark)
    models = args.model or [
        str(toyworld.TOY_DIR / "clip.safetensors"),
        str(newest_enhanced(Path(args.runs))),
    ]
    last = Path(models[-1])
    out = (
        Path(args.out) if args.out else (last.parent if last.is_dir() else Path(args.runs)) / "eval"
    )

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = ["original", "enhanced"] if not args.model else [short_name(m) for m in models]
    if len(set(names)) < len(names):
        names = models
    if len(set(models)) < len(models):
        raise ValueError("--model: the same model is named twice")
    judges = [
        Judge(name, *load_clip(model), device) for name, model in zip(names, models, strict=True)
    ]
    start = time.time()
    if pairs is None:
        results, text = evaluate_toy(judges, args.pairs, args.seed, out)
    else:
        hits = {j.name: score(j, pairs) for j in tqdm(judges, "pairs", leave=False)}
        results = {"mmvp": summarise([p.pattern for p in pairs], hits)}
        text = markdown(
            f"MMVP-VLM, {len(pairs)} pairs; one pair is {100 / len(pairs):.2f} points",
            results["mmvp"],
        )
        changed_pairs_pictures(pairs, hits, out, "changed")
    about = {
        "benchmark": args.benchmark,
        "seed": args.seed,
        "models": dict(zip(names, models, strict=True)),
        "date": time.strftime("%Y-%m-%d"),
        "device": str(device),
        "seconds": round(time.time() - start, 1),
    }
    print(text)
    write_atomically(out / "mmvp.json", json.dumps({**about, **results}, indent=1))
    write_atomically(out / "mmvp.md", text)
    print(
        f"written: {out}/mmvp.json, mmvp.md"
        + (" and pictures of the pairs that changed" if len(judges) > 1 else "")
    )


if __name__ == "__main__":
    run_command(main)
