"""Small valid files of every kind that a command reads; the fuzz makes each of them wrong."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from .forks import ROOT, Forks

TINY = (
    "train.py --toy_images 8 --width 32 --heads 2 --rope_axes 4,6,6 --vector_dim 12 --context_dim "
    "20 --batch 4 --micro_batch 4 --warmup 0 --stage1_steps 2 --stage2_steps 2 --log_every 1 "
    "--save_every 1 --sample_every 1000000 --lora_rank 2 --workers 0"
).split()
QUESTIONS = "Question ID,Type,Statement\n" + "".join(
    f"{i},{'Color' if i < 3 else 'State'},a photo of a {w} ball\n"
    for i, w in enumerate(("red", "blue", "green", "tall"), start=1)
)


def make_world(forks: Forks, folder: Path) -> Path:
    """All of it. Returns: the folder."""
    pictures(folder / "pictures")
    (folder / "list.txt").write_text("".join(f"pictures/{i}.png\n" for i in range(4)))
    shard(folder / "shards" / "0.tar", folder / "pictures")
    for name, content in json_files().items():
        (folder / name).write_text(json.dumps(content))
    (folder / "results.csv").write_text(
        "image_name| comment_number| comment\n"
        + "".join(f"pictures/{i}.png| {k}| a red ball\n" for i in range(3) for k in range(2))
    )
    for name, number in (("red_ball", 0), ("blue_bird", 1)):
        pictures(folder / "classes" / name, start=number)
    for number in range(1, 5):
        kind = "Color" if number < 3 else "State"
        target = folder / "mmvp" / "MMVP_VLM_Images" / kind / f"{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24), (50 * number, 0, 9)).save(target)
    (folder / "mmvp" / "Questions.csv").write_text(QUESTIONS)
    runs(forks, folder)
    return folder


def pictures(folder: Path, start: int = 0) -> None:
    """Four small ones."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(start)
    for i in range(4):
        pixels = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def shard(file: Path, folder: Path) -> None:
    """The same in a tar, as img2dataset writes them."""
    file.parent.mkdir(parents=True)
    with tarfile.open(file, "w") as tar:
        for path in sorted(folder.iterdir()):
            for name, content in ((path.name, path.read_bytes()), (f"{path.stem}.txt", b"a dog")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def json_files() -> dict[str, object]:
    """Name → content, of the files that evaluations read."""
    of = [f"pictures/{i}.png" for i in range(4)]
    texts = ["a red ball", "a blue ball", "two green bird", "one tall tree"]
    items = [
        {"id": 1, "category": "Color", "images": of[:2], "captions": texts[:2]},
        {"id": "b", "category": "State", "image": of[2], "captions": texts},
    ]
    coco = {
        "images": [{"id": i, "file_name": of[i]} for i in range(3)],
        "annotations": [{"image_id": i, "caption": texts[i]} for i in range(3)],
    }
    karpathy = [
        {"filename": of[i], "split": "test", "sentences": [{"raw": texts[i]}]} for i in range(3)
    ]
    return {
        "pairs.json": {"name": "small", "template": "{}", "items": items},
        "doubts.json": {"leave_out": ["b"], "swap": [1]},
        "captions.json": [{"file": of[i], "captions": texts[i : i + 2]} for i in range(3)],
        "coco.json": coco,
        "karpathy.json": {"images": karpathy},
    }


def runs(forks: Forks, folder: Path) -> None:
    """A run that is done, with a cache on the disk; one that stopped in stage 2; and the result in
    transformers' layout."""
    line = [*TINY, "--runs", folder / "runs", "--cache", folder / "cache"]
    clip = ROOT / "toy" / "clip.safetensors"
    for command in (
        [*line, "--name", "done"],
        ["export_hf.py", "--model", clip, "--out", folder / "hf"],
    ):
        ended = forks.run(command, folder / "said.txt", limit_s=300)
        assert ended.code == 0, ended.said
    half = folder / "runs" / "half"
    shutil.copytree(folder / "runs" / "done", half)
    shutil.rmtree(half / "enhanced")
    shutil.rmtree(half / "stage2" / "step_00000002")
