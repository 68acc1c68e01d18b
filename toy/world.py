"""The toy world: a closed world, drawn by this file, in which the whole method can be watched.

Why a toy can show the effect at all
------------------------------------
CLIP is blind to a detail where captions never mention it ("reporting bias"), even though its text
tower knows the words from elsewhere. Here that bias is made on purpose. Eight subjects share nine
attributes, one attribute per MMVP pattern, and *each attribute is only ever captioned for some of
the subjects*. A tiny CLIP pretrained on such captions reads "facing left" well on a fish whose
captions sometimes say so (a **mentioned** subject of that attribute) and badly on a bird whose
captions never do (an **unmentioned** one): CLIP-blind pairs, made to measure.

GenHancer then sees pictures only. Stage 1 teaches a denoiser to draw the attribute from the
direction of feature space that CLIP uses on the mentioned subjects; stage 2 lets the reconstruction
loss push the encoder to use that same direction on the unmentioned ones, and the frozen text tower
understands it. If the benchmark moves on unmentioned subjects, that is the paper's claim at work.

What is in this file, in reading order: the attributes and who mentions them, the drawing, the
captions, and the endless data set. The pairs that measure the effect are in benchmark.py, and
pretrain.py makes the shipped weights again from nothing. Images are float RGB in [0, 1].
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

TOY_DIR = Path(__file__).resolve().parent
IMAGE_SIZE = 64  # pixels; scenes are drawn at twice this and box-filtered: our antialiasing

# ------------------------------------------------------------------------------------------------
# The nine attributes. Names are MMVP-VLM's nine visual patterns, in the paper's Tab. 1 order; the
# phrases are what a caption or a benchmark statement says. `{}` stands for the subject.
# ------------------------------------------------------------------------------------------------
PATTERNS: dict[str, dict[str, str]] = {
    "Orientation": {"left": "{} facing left", "right": "{} facing right"},
    "Presence": {"hat": "{} with a hat", "bare": "{} without a hat"},
    "State": {"awake": "awake {}", "asleep": "asleep {}"},
    "Quantity": {"one": "one {}", "two": "two {}", "three": "three {}"},
    "Spatial": {"above": "{} above a ball", "below": "{} below a ball"},
    "Color": {c: f"{c} {{}}" for c in ("red", "yellow", "green", "blue", "purple")},
    "Structural Character": {"tall": "tall {}", "wide": "wide {}"},
    "Text": {letter: f"{{}} labelled {letter}" for letter in "LTXO"},
    "Camera Perspective": {"close": "{} up close", "far": "{} far away"},
}
SUBJECTS = ("fish", "car", "house", "tree", "cup", "bird", "boat", "key")
MENTIONED_PER_PATTERN = 2  # of the 8 subjects; the fewer, the blinder the pretrained CLIP


def mentioned_subjects(pattern: str) -> list[str]:
    """Subjects whose captions may mention `pattern`; everywhere else it is never written down.

    The stride of 3 deals the patterns out so that every subject is mentioned for two or three.
    """
    start = 3 * list(PATTERNS).index(pattern)
    return [SUBJECTS[(start + k) % len(SUBJECTS)] for k in range(MENTIONED_PER_PATTERN)]


@dataclass(frozen=True)
class Scene:
    """What a picture shows: the subject and one value for each of the nine patterns."""

    subject: str
    values: tuple[str, ...]  # in the order of PATTERNS

    def __getitem__(self, pattern: str) -> str:
        return self.values[list(PATTERNS).index(known(pattern, PATTERNS))]

    def replace(self, pattern: str, value: str) -> "Scene":
        """The same scene with one attribute changed: the other half of a benchmark pair.

        Raises: ValueError for a pattern or a value that this world does not have.
        """
        pattern = known(pattern, PATTERNS)
        value = known(value, PATTERNS[pattern])
        pairs = zip(PATTERNS, self.values, strict=True)
        return Scene(self.subject, tuple(value if p == pattern else v for p, v in pairs))


def known(name: str, names: Iterable[str]) -> str:
    """`name`, if it is one of `names`. Raises: ValueError with the nearest spelling."""
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
        raise ValueError(f"the toy world has no {name!r}; {hint}")
    return name


def scene(subject: str, **attributes: str) -> Scene:
    """A scene by name: ``scene("fish", Color="red", Camera_Perspective="far")``. What is not named
    has its first value. Raises: ValueError as `Scene.replace`."""
    made = Scene(known(subject, SUBJECTS), tuple(next(iter(v)) for v in PATTERNS.values()))
    for pattern, value in attributes.items():
        made = made.replace(pattern.replace("_", " "), value)
    return made


def random_scene(rng: np.random.Generator, subject: str | None = None) -> Scene:
    """A scene with every attribute drawn uniformly and independently."""
    subject = subject or SUBJECTS[rng.integers(len(SUBJECTS))]
    return Scene(subject, tuple(list(v)[rng.integers(len(v))] for v in PATTERNS.values()))


# ------------------------------------------------------------------------------------------------
# Drawing. Each subject is a few polygons and ellipses in a [-1, 1]² box, facing right, so that
# "facing left" is a mirror and "tall" a stretch. Shade 1 is the subject's own colour, lower is
# darker. `eye` and `hat` are anchor points. All silhouettes are asymmetric, and the eye is in
# front: a subject must face somewhere, and facing must look alike on all of them.
# ------------------------------------------------------------------------------------------------
# fmt: off
OUTLINES: dict[str, dict] = {
    "fish": {
        "parts": [("ellipse", [(-0.6, -0.7), (1, 0.7)], 1.0),
                  ("polygon", [(-1, -0.75), (-0.35, 0), (-1, 0.75)], 0.6)],
        "eye": (0.45, -0.12), "hat": (0.25, -0.65)},
    "car": {
        "parts": [("polygon", [(-1, 0.6), (-1, -0.1), (0, -0.1), (0.1, -0.8), (0.75, -0.8),
                               (1, -0.1), (1, 0.6)], 1.0),
                  ("ellipse", [(-0.85, 0.3), (-0.25, 1)], 0.2),
                  ("ellipse", [(0.25, 0.3), (0.85, 1)], 0.2)],
        "eye": (0.48, -0.2), "hat": (0.4, -0.75)},
    "house": {
        "parts": [("polygon", [(-0.8, 1), (-0.8, -0.2), (0.8, -0.2), (0.8, 1)], 1.0),
                  ("polygon", [(1, -0.15), (0.5, -1), (-1, -0.15)], 0.6),
                  ("polygon", [(-0.65, 1), (-0.65, 0.25), (-0.2, 0.25), (-0.2, 1)], 0.3)],
        "eye": (0.35, 0.3), "hat": (0.45, -0.85)},
    "tree": {
        "parts": [("polygon", [(-0.15, 1), (-0.15, 0), (0.2, 0), (0.4, 1)], 0.4),
                  ("ellipse", [(-1, -0.35), (0.1, 0.6)], 0.75),
                  ("ellipse", [(-0.5, -1), (1, 0.4)], 1.0)],
        "eye": (0.4, -0.25), "hat": (0.25, -0.9)},
    "cup": {
        "parts": [("ellipse", [(-1, -0.55), (0, 0.55)], 0.6),
                  ("ellipse", [(-0.75, -0.25), (-0.25, 0.25)], 1.6),
                  ("polygon", [(-0.5, -0.8), (1, -0.8), (0.8, 0.95), (-0.3, 0.95)], 1.0)],
        "eye": (0.4, 0), "hat": (0.25, -0.75)},
    "bird": {
        "parts": [("polygon", [(-1, -0.5), (-0.3, 0.1), (-0.6, 0.5)], 0.6),
                  ("ellipse", [(-0.7, -0.2), (0.5, 1)], 1.0),
                  ("ellipse", [(-0.2, -0.95), (0.75, 0.3)], 1.0),
                  ("polygon", [(0.65, -0.6), (1, -0.25), (0.65, 0)], 0.3)],
        "eye": (0.32, -0.38), "hat": (0.28, -0.85)},
    "boat": {
        "parts": [("polygon", [(-0.8, 0.3), (1, 0.3), (0.5, 1), (-0.6, 1)], 0.6),
                  ("polygon", [(0.6, -1), (0.6, 0.2), (-0.9, 0.2)], 1.0)],
        "eye": (0.25, -0.15), "hat": (0.5, -0.85)},
    "key": {
        "parts": [("ellipse", [(-0.2, -0.75), (1, 0.6)], 1.0),
                  ("polygon", [(0, -0.3), (-1, -0.3), (-1, 0.6), (-0.75, 0.6), (-0.75, 0.1),
                               (-0.55, 0.1), (-0.55, 0.45), (-0.3, 0.45), (-0.3, 0.1),
                               (0, 0.1)], 0.7)],
        "eye": (0.42, -0.08), "hat": (0.4, -0.7)},
}
# fmt: on
COLORS = {
    "red": (205, 45, 45),
    "yellow": (225, 195, 40),
    "green": (45, 160, 65),
    "blue": (50, 90, 210),
    "purple": (150, 60, 185),
}
LETTERS = {
    "L": [[(-1, -1), (-1, 1), (1, 1)]],
    "T": [[(-1, -1), (1, -1)], [(0, -1), (0, 1)]],
    "X": [[(-1, -1), (1, 1)], [(-1, 1), (1, -1)]],
    "O": [[(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)]],
}


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Paint a scene. `rng` decides only the nuisance: background, jitter of place, size and hue.

    Returns: uint8 RGB (64, 64, 3).
    """
    # Nuisance is kept mild on purpose: whatever [CLS] does not say costs reconstruction loss, and
    # what costs most is what stage 2 learns first. In a scene that is mostly background, that would
    # be the background.
    size = 2 * IMAGE_SIZE
    pale, tint = rng.uniform(190, 232, (2, 1)), rng.uniform(-12, 12, (2, 3))
    sky, ground = pale + tint
    ramp = np.linspace(0, 1, size)[:, None, None]
    canvas = np.broadcast_to(sky * (1 - ramp) + ground * ramp, (size, size, 3)).astype(np.uint8)
    image = Image.fromarray(canvas)
    pen = ImageDraw.Draw(image)

    # The strip with the ball and the sign lies under the subjects ("above a ball") or over them.
    above = scene["Spatial"] == "above"
    strip_y = (108 if above else 19) + rng.uniform(-3, 3)
    zone_y = (52 if above else 82) + rng.uniform(-4, 4)
    side = 1 if rng.random() < 0.5 else -1  # nuisance: ball left and sign right, or the other way
    ball_x, sign_x = 64 - side * 30 + rng.uniform(-6, 6), 64 + side * 30 + rng.uniform(-6, 6)
    gray = int(rng.uniform(50, 110))
    pen.ellipse((ball_x - 12, strip_y - 12, ball_x + 12, strip_y + 12), fill=(gray, gray, gray))
    pen.rectangle(
        (sign_x - 16, strip_y - 15, sign_x + 16, strip_y + 15),
        fill=(252, 252, 252),
        outline=(0, 0, 0),
    )
    for stroke in LETTERS[scene["Text"]]:
        pen.line([(sign_x + 9 * x, strip_y + 9 * y) for x, y in stroke], fill=(0, 0, 0), width=6)

    # One to three copies side by side. Their size depends on the camera and the shape, never on
    # the count: otherwise a reader could count by measuring.
    count = 1 + list(PATTERNS["Quantity"]).index(scene["Quantity"])
    scale = (1.0 if scene["Camera Perspective"] == "close" else 0.66) * rng.uniform(0.93, 1.07)
    half_w, half_h = (16, 33) if scene["Structural Character"] == "tall" else (20.5, 18)
    half_w, half_h = half_w * scale, half_h * scale
    color = np.array(COLORS[scene["Color"]]) + rng.uniform(-18, 18, 3)
    center_x = 64 + rng.uniform(-3, 3) + (3 - count) * rng.uniform(-5, 5)
    for copy in range(count):  # the rightmost is drawn last and may overlap its neighbour a little
        x = center_x + 41 * (copy - (count - 1) / 2) * (0.75 + 0.25 * scale) + rng.uniform(-1, 1)
        center = x, zone_y + rng.uniform(-2, 2)
        _draw_subject(pen, scene, center, (half_w, half_h), color)
    small = image.reduce(2)  # box filter: exact, and the same in every version of Pillow
    return np.asarray(small)


def _draw_subject(
    pen, scene: Scene, center: tuple[float, float], half: tuple[float, float], color: np.ndarray
) -> None:
    """One copy of the subject with its eye and, perhaps, its hat. `half`: of its width, height."""
    (x, y), (half_w, half_h) = center, half
    outline = OUTLINES[scene.subject]
    mirror = -1 if scene["Orientation"] == "left" else 1

    def place(point):
        return x + mirror * half_w * point[0], y + half_h * point[1]

    for kind, points, shade in outline["parts"]:
        fill = tuple(int(c) for c in np.clip(color * shade, 0, 255))
        points = [place(p) for p in points]
        if kind == "ellipse":
            (x0, y0), (x1, y1) = points
            pen.ellipse((min(x0, x1), y0, max(x0, x1), y1), fill=fill)
        else:
            pen.polygon(points, fill=fill)

    radius = 0.34 * math.sqrt(half_w * half_h)  # the same for tall and wide
    eye_x, eye_y = place(outline["eye"])
    if scene["State"] == "awake":
        pen.ellipse(
            (eye_x - radius, eye_y - radius, eye_x + radius, eye_y + radius), fill=(255, 255, 255)
        )
        pupil = 0.45 * radius
        pen.ellipse((eye_x - pupil, eye_y - pupil, eye_x + pupil, eye_y + pupil), fill=(0, 0, 0))
    else:
        pen.rectangle(
            (eye_x - radius, eye_y - 0.25 * radius, eye_x + radius, eye_y + 0.25 * radius),
            fill=(0, 0, 0),
        )

    if scene["Presence"] == "hat":
        hat_x, hat_y = place(outline["hat"])
        brim, crown = 0.62 * math.sqrt(half_w * half_h), 0.4 * math.sqrt(half_w * half_h)
        pen.rectangle((hat_x - crown, hat_y - 1.6 * crown, hat_x + crown, hat_y), fill=(30, 25, 30))
        pen.rectangle(
            (hat_x - brim, hat_y - 0.3 * crown, hat_x + brim, hat_y + 0.2 * crown),
            fill=(30, 25, 30),
        )


# ------------------------------------------------------------------------------------------------
# Captions
# ------------------------------------------------------------------------------------------------
PREFIX = "a photo of"  # MMVP's prompt as well, so that benchmark and captions speak alike


def phrase(scene: Scene, patterns) -> str:
    """The subject with the given attributes worked in, e.g. "two red fish facing left"."""
    text = "{}"
    # Inner to outer: words before the noun are wrapped around it in English adjective order.
    order = (
        "Color",
        "Structural Character",
        "State",
        "Quantity",
        "Orientation",
        "Presence",
        "Spatial",
        "Text",
        "Camera Perspective",
    )
    for pattern in order:
        if pattern in patterns:
            text = PATTERNS[pattern][scene[pattern]].format(text)
    return text.format(scene.subject)


def caption(scene: Scene, rng: np.random.Generator, mention_probability: float) -> str:
    """A caption with reporting bias: mentionable attributes with some probability, others never."""
    said = [
        p
        for p in PATTERNS
        if scene.subject in mentioned_subjects(p) and rng.random() < mention_probability
    ]
    return f"{PREFIX} {phrase(scene, said)}"


def vocabulary() -> list[str]:
    """Every word that a caption or a statement can hold, sorted: a CLIP's JSON keeps this list, and
    its tokenizer (evaluation/encoder.py) numbers it."""
    words = set(PREFIX.split()) | set(SUBJECTS)
    for values in PATTERNS.values():
        for template in values.values():
            words |= set(template.replace("{}", "").split())
    return sorted(words)


# ------------------------------------------------------------------------------------------------
# The endless, repeatable data set: scene i of seed s is a pure function of (s, i)
# ------------------------------------------------------------------------------------------------
class ToyScenes(torch.utils.data.Dataset):
    """`length` scenes; item i is {"image": float RGB (3, 64, 64) in [0, 1], "name": str}.

    Every item has a random generator of its own, so any worker on any rank draws the same picture
    for the same index, and a resumed run sees exactly the pictures it would have seen.
    """

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> tuple[Scene, np.ndarray]:
        rng = np.random.default_rng([self.seed, index])
        scene = random_scene(rng)
        return scene, draw(scene, rng)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        """`key`: the number of a scene; or that and an epoch, as data sets that crop are asked.
        Raises: IndexError beyond the last scene."""
        index = key[0] if isinstance(key, tuple) else key
        if not 0 <= index < self.length:
            raise IndexError(f"toy scene {index}: there are {self.length}")
        _, pixels = self.scene(index)
        return {"image": to_tensor(pixels), "name": f"toy scene {index} of seed {self.seed}"}

    def batch(self, count: int, first: int = 0) -> torch.Tensor:
        """Images of `count` scenes from number `first` on, (count, 3, 64, 64) in [0, 1]."""
        return torch.stack([self[i]["image"] for i in range(first, first + count)])


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) → float (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255
