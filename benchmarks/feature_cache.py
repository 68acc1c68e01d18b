"""What does the cache on the disk save, and how are its records best read?

    python benchmarks/feature_cache.py          → feature_cache.json and .md, some minutes

1. A step of stage 1 on photographs with and without the cache, in turns, in one process on one
   thread; and once more with a cache whose images are decoded although nobody looks at them.
   Networks of FLUX.1's and ViT-B/32's layout, narrow enough for a CPU.
2. Floating-point operations of such a step at full size, counted on the meta device.
3. Records of the full size, read in a random order from a file that is not in memory: through a
   map, and at a place (pread), as training/feature_cache.py does.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from report import facts, headline, parser, publish, table

import train
from data import FileList, Pictures, find_images
from flow_denoiser import FlowDenoiser, FlowDenoiserConfig
from genhancer import GenHancer
from paradigms import Continuous
from pretrained.autoencoders import VAE, AutoencoderConfig
from pretrained.backbones import ClipInfo
from settings import Settings
from training import plan
from training.feature_cache import cache_bytes, disk_cache
from training.process import Process
from training.stages import begin
from util.cli import run_command

SIZE, BATCH = 224, 8
ROWS = [("openai-b32-224", "flow"), ("openai-l14-224", "flow"), ("openai-l14-224", "perceiver"),
        ("openai-l14-336", "flow"), ("siglip-so400m-384", "flow")]  # fmt: skip


def small_model() -> GenHancer:
    """At 224 px: a VAE with a quarter of FLUX.1's channels, a tower of half ViT-B/32's width and
    depth, and a denoiser of one MM-DiT and two Single-DiT blocks."""
    torch.manual_seed(0)
    vision = {"image_size": SIZE, "patch_size": 32, "width": 384, "layers": 6, "head_width": 64}
    text = {"context_length": 16, "vocab_size": 60, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 512, "vision_cfg": vision, "text_cfg": text}
    vae = VAE(AutoencoderConfig(base_channels=32, groups=8)).eval().requires_grad_(False)
    shape = {"width": 256, "heads": 2, "double_blocks": 1, "single_blocks": 2}
    condition = {"vector_dim": 64, "context_dim": 64}
    denoiser = FlowDenoiser(FlowDenoiserConfig(latent_channels=16, **shape, **condition))
    info = ClipInfo("narrow", config, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    return GenHancer(open_clip.CLIP(**config).eval(), info, Continuous(vae, denoiser, SIZE))


def steps(folder: Path, rounds: int) -> dict:
    """Milliseconds of steps of `BATCH` images, and medians of the ratios within a round."""
    noise = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for i in range(64):
        coarse = noise.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
        smooth.save(folder / "photos" / f"{i:02d}.jpg", quality=90)
    pictures, model = Pictures(FileList(find_images(folder / "photos")), SIZE), small_model()
    how = {"cache": str(folder / "cache"), "cache_dtype": "fp16", "workers": 0, "crop_min": 0.9}
    how["data"] = str(folder / "photos")
    settings = Settings.of("toy", batch=BATCH, micro_batch=BATCH, stage1_steps=1000, **how)
    cache = disk_cache(pictures, model, settings, Process())
    sets = {"without": pictures, "with": cache, "with, and decoding": ImagesToo(cache)}
    stage = begin(1, model, settings, Process())
    streams = {name: stage.global_batches(data) for name, data in sets.items()}
    spent: dict[str, list[float]] = {name: [] for name in sets}
    for turn in range(rounds + 1):  # the first warms up
        for name, stream in streams.items():
            start = time.process_time()  # the CPU's: a busy neighbour takes nothing away
            train.train_step(stage, next(stream))
            if turn:
                spent[name].append(1000 * (time.process_time() - start))
    ratio = {name: paired(values, spent["with"]) for name, values in spent.items()}
    return {"milliseconds": spent, "times_with": ratio}


def paired(values: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


class ImagesToo(torch.utils.data.Dataset):
    """A cache without the way around its images."""

    def __init__(self, cache):
        self.cache, self.name = cache, cache.name

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, key) -> dict:
        return self.cache[key]


def counted(preset: str, denoiser: str) -> dict:
    """Operations of a step of stage 1, of an image, with and without; and bytes of its record."""
    settings = Settings.of(preset, denoiser=denoiser)
    _, model = plan.skeleton(settings)
    plan.start(model, settings, 1)
    images, draws = plan.one_batch(model, 1, "meta")
    with plan.matrix_attention():
        found = plan.on_meta(model, lambda: model.precompute(images))
        flops = {}
        for name, given in (("without", (images, draws)), ("with", (None, draws, found))):
            with plan.Flops() as counter:
                plan.on_meta(model, lambda given=given: model(*given)["loss"].backward())
            flops[name] = counter.total
    sizes = {dtype: cache_bytes(found, 1, dtype) for dtype in ("fp16", "fp32")}
    return {"preset": preset, "denoiser": denoiser, "flops": flops, "bytes": sizes}


def reads(folder: Path, rounds: int, record: int = 51_716, count: int = 10_000) -> dict:
    """Microseconds and bytes from the disk per record, of 1000 in a random order."""
    file, order, found = folder / "records", np.random.default_rng(0), {"map": [], "place": []}
    with open(file, "wb") as out:
        for _ in range(count // 100):
            out.write(os.urandom(100 * record))
        os.fsync(out.fileno())
    with open(file, "rb", buffering=0) as source:
        for _ in range(rounds):
            for way, spent in found.items():
                os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                mapped = np.memmap(file, np.uint8, "r", shape=(count, record))
                before, start = bytes_read(), time.perf_counter()
                for i in map(int, order.choice(count, 1000, replace=False)):
                    if way == "map":
                        mapped[i].copy()
                    else:
                        os.pread(source.fileno(), record, i * record)
                microseconds = 1000 * (time.perf_counter() - start)
                spent.append([microseconds, (bytes_read() - before) / 1000])
                del mapped
    return {way: np.median(spent, axis=0).tolist() for way, spent in found.items()}


def bytes_read() -> int:
    """By this process from a disk, so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--rounds", type=int, default=15)
    args = flags.parse_args()
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        found = {"steps": steps(Path(folder), args.rounds), "counted": [counted(*r) for r in ROWS]}
        found["reads"] = reads(Path(folder), 5)
    command, about = f"python benchmarks/feature_cache.py --rounds {args.rounds}", facts()
    spent, ratio = found["steps"]["milliseconds"], found["steps"]["times_with"]
    medians = {name: f"{statistics.median(values):.0f}" for name, values in spent.items()}
    what = f"a step of stage 1 on {BATCH} photographs, narrow networks, n = {args.rounds}, 1 thread"
    lines = [headline(command, about, what) + "; medians, and of the ratios within a round.", ""]
    rows = [[name, medians[name], f"{ratio[name]:.2f}"] for name in spent]
    lines += [*table(["cache", "CPU ms a step", "× with the cache"], rows), ""]
    lines += ["At full size, counted: a step of stage 1, and the cache of CC3M.", ""]
    rows = []
    for row in found["counted"]:
        without, with_it = (row["flops"][k] / 1e9 for k in ("without", "with"))
        sizes = [f"{row['bytes'][d] / 1e3:.1f}" for d in ("fp16", "fp32")]
        whole = f"{row['bytes']['fp16'] * plan.CC3M / 1e9:.0f}"
        gflop = [f"{without:.0f}", f"{with_it:.0f}", f"{without / with_it:.2f}"]
        rows.append([row["preset"], row["denoiser"], *gflop, *sizes, whole])
    head = ["preset", "denoiser", "GFLOP an image without", "with", "ratio"]
    head += ["kB an image, fp16", "fp32", "GB for CC3M, fp16"]
    lines += [*table(head, rows), "", "A record of 51.7 kB, from a disk, in a random order.", ""]
    names = {"map": "through a memory map", "place": "at its place (pread)"}
    ways = found["reads"].items()
    rows = [[names[way], f"{us:.0f}", f"{read / 1e3:.0f}"] for way, (us, read) in ways]
    lines += table(["read", "µs", "kB from the disk"], rows)
    publish("feature_cache", lines, {"command": command, **about, **found})


if __name__ == "__main__":
    run_command(main)
