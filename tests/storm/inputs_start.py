"""In a fork: a command as the interpreter starts it, until it would begin to work.

    python tests/storm/inputs_start.py FOLDER train.py --stage1_lr nan

FOLDER is where it runs. A training that comes to its first batch, or a pretraining that draws its
first scene, ends there with a code of its own: the input was accepted.
"""

import importlib
import os
import runpy
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.storm.inputs import reached  # noqa: E402

# What stands for "now it begins", by command.
STOPS = {
    "train.py": ("training.stages", "Stage.global_batches"),
    "toy.pretrain": ("toy.world", "ToyScenes.scene"),
    "eval_mmvp.py": ("toy.benchmark", "pairs"),
    "toy.benchmark": ("toy.world", "draw"),
}


def start(script: str) -> None:
    """A file, or a module of ``python -m``."""
    if stop := STOPS.get(script):
        module, name = stop
        owner, _, method = name.rpartition(".")
        place = importlib.import_module(module)
        setattr(getattr(place, owner) if owner else place, method, reached)
    if script.endswith(".py"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    else:
        sys.modules.pop(script, None)  # else it warns that the module is there already
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def main() -> None:
    """Ends the process at once: what Python would tidy up takes longer than most inputs."""
    _, folder, *sys.argv = sys.argv
    os.chdir(folder)
    code = 0
    try:
        start(sys.argv[0])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        sys.stdout.flush(), sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
