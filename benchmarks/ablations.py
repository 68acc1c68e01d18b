"""Twelve claims about the method, each tried on the toy with five seeds, and a verdict on each.

    python benchmarks/ablations.py                    train what is missing, write the verdicts
    python benchmarks/ablations.py --only flow --only flow-uniform
    python benchmarks/ablations.py --list             what there is and what is missing
    python benchmarks/ablations.py --report           the verdicts from the records alone

An *arm* is a command line of train.py, run with seeds 1 to 5. Every arm and seed that was measured
leaves a record, benchmarks/evidence/ARM-SEED.json, and is never run again; whoever kills this
script goes on where it was. Two runs go side by side, one thread each. Where only stage 2 differs,
stage 1 is taken from another arm: the same file, hence the same start.

Every arm is judged twice. *As trained*: what the settings gave. *At equal retention*: its change of
weights is scaled (training/blend.py, strength 0 to 2), and the gain is read where naming the
subject has lost half a point, between two strengths by interpolation. An arm that merely pulls
harder gains more and loses more; at equal retention it has no advantage. (Where strength 0.25 has
cost half a point already, weaker ones are measured too. That was added after records were there:
arms without a drift term had been read on a straight line from 0, 0.5 to 1.1 points too low. It
turned "two stages teach more", at equal retention, from undecided into holds not.)

The arms are those of the demo's length, since there are many: 800 + 300 steps of the flow denoiser,
1500 + 450 of the Perceiver. Arms, seeds, claims and the rule of the verdicts (verdicts.py) were
written down before the runs. Nothing was tuned on these seeds or on toy benchmark 0.
"""

import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from report import HERE, ROOT, is_finished, parser

from training.preflight import checkpoints_in, read_state
from util.cli import run_command

SEEDS = (1, 2, 3, 4, 5)
RECORDS = HERE / "evidence"
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
WEAK = (0.05, 0.1, 0.15, 0.2)  # where 0.25 costs too much already


# ------------------------------------------------------------------------------------------------
# The arms
# ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Arm:
    """One way to train."""

    flags: str
    """of train.py"""
    stage1: str = ""
    """the arms whose stage 1 it takes over, with a comma between them; empty: its own"""
    steps: tuple[int, ...] = ()
    """stage 2 is measured at these steps too, from its checkpoints"""
    drawings: bool = False
    """how well stage 1 draws is measured too"""


FLOW = "--stage1_steps 800 --stage2_steps 300"
MASKS = "--denoiser perceiver --stage1_steps 1500 --stage2_steps 450"
JOINT = "--denoiser flow+perceiver --stage2_steps 375 --stage2_trains only"  # as the others
MANY = (25, 50, 100, 200, 400, 800, 1200)
ARMS = {
    # Tab. 6, and what all others are compared with
    "flow": Arm(FLOW, drawings=True),
    "perceiver": Arm(MASKS, drawings=True),
    "joint": Arm(f"{JOINT} --drift_weight 0.05", stage1="flow,perceiver"),
    # λ of the drift term
    "flow-lambda0": Arm(f"{FLOW} --drift_weight 0", stage1="flow"),
    "perceiver-lambda0": Arm(f"{MASKS} --drift_weight 0", stage1="perceiver"),
    "joint-lambda0": Arm(f"{JOINT} --drift_weight 0", stage1="flow,perceiver"),
    # Fig. 6
    "flow-end-to-end": Arm(f"{FLOW} --end_to_end"),
    "flow-end-to-end-lambda0": Arm(f"{FLOW} --end_to_end --drift_weight 0"),
    # Fig. S2, Fig. S4
    "flow-direct": Arm(f"{FLOW} --tuning direct", stage1="flow"),
    "flow-direct-tenth": Arm(f"{FLOW} --tuning direct --stage2_lr 7e-5", stage1="flow"),
    "flow-all": Arm(f"{FLOW} --stage2_trains all", stage1="flow"),
    # Tab. 4
    "flow-uniform": Arm(f"{FLOW} --time_distribution uniform"),
    "flow-scale0.1": Arm(f"{FLOW} --time_scale 0.1"),
    "flow-scale0.5": Arm(f"{FLOW} --time_scale 0.5"),
    "flow-scale5": Arm(f"{FLOW} --time_scale 5"),
    "flow-scale10": Arm(f"{FLOW} --time_scale 10"),
    # Fig. 5 (of the toy tower's 16 patch tokens 10 % are 2)
    "flow-local10": Arm(f"{FLOW} --local_ratio 10"),
    "flow-local50": Arm(f"{FLOW} --local_ratio 50"),
    "flow-local100": Arm(f"{FLOW} --local_ratio 100"),
    "perceiver-local10": Arm(f"{MASKS} --local_ratio 10"),
    "perceiver-local50": Arm(f"{MASKS} --local_ratio 50"),
    "perceiver-local100": Arm(f"{MASKS} --local_ratio 100"),
    # The title's claim: how long the denoiser learns to draw
    "flow-stage1-100": Arm(FLOW.replace("800", "100"), drawings=True),
    "flow-stage1-200": Arm(FLOW.replace("800", "200"), drawings=True),
    "flow-stage1-400": Arm(FLOW.replace("800", "400"), drawings=True),
    "flow-stage1-1400": Arm(FLOW.replace("800", "1400"), drawings=True),
    "flow-stage1-2800": Arm(FLOW.replace("800", "2800"), drawings=True),
    # Fig. 1 i
    "flow-long": Arm(
        "--stage1_steps 800 --stage2_steps 1200 --schedule constant --warmup 0 --save_every 25 "
        "--keep 99",
        stage1="flow",
        steps=MANY,
    ),
    # Tab. S1
    "perceiver-mask50": Arm(f"{MASKS} --mask_from 0.5 --mask_to 0.5"),
    "perceiver-mask70": Arm(f"{MASKS} --mask_from 0.7 --mask_to 0.7"),
    "perceiver-mask90": Arm(f"{MASKS} --mask_from 0.9 --mask_to 0.9"),
    # Tab. 5
    "flow-blocks2": Arm(f"{FLOW} --blocks 2"),
    "flow-blocks3": Arm(f"{FLOW} --blocks 3"),
    "flow-blocks4": Arm(f"{FLOW} --blocks 4"),
    "perceiver-layers2": Arm(f"{MASKS} --layers 2"),
    "perceiver-layers6": Arm(f"{MASKS} --layers 6"),
    "perceiver-layers8": Arm(f"{MASKS} --layers 8"),
    # Tab. 7: a denoiser that was pretrained on the text tower's condition, frozen
    # (benchmarks/heavy_denoiser.py makes it)
    "flow-heavy": Arm(f"{FLOW} --flux runs/heavy_denoiser/denoiser.safetensors"),
}


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------
def run_of(arm: str, seed: int, runs: Path) -> Path:
    """Where it is trained."""
    return runs / f"{arm}-seed{seed}"


def record_of(arm: str, seed: int) -> Path:
    """Where what was measured stands."""
    return RECORDS / f"{arm}-{seed}.json"


def stage1_steps(arm: Arm) -> int:
    """How long its own stage 1 lasts."""
    flags = shlex.split(arm.flags)
    return int(flags[flags.index("--stage1_steps") + 1])


def has_stage1(run: Path, steps: int) -> bool:
    """Whether a stage 1 of that many steps is there."""
    found = checkpoints_in(run / "stage1")
    return bool(found) and read_state(found[-1])["step"] >= steps


def call(command: list[str], log: Path) -> None:
    """A command with one thread, its words in a file. Raises: ValueError where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        how = {"cwd": ROOT, "stdout": file, "stderr": file}
        code = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **how).returncode
    if code:
        raise ValueError(f"{shlex.join(command)} failed; its last words are in {log}")


class Runner:
    """Trains and measures arms. Two jobs that need the same stage 1 do not train it twice."""

    def __init__(self, runs: Path):
        self.runs, self.locks, self.own = runs, {}, Lock()

    def train(self, arm: str, seed: int, *more: str) -> None:
        """Up to its end, or as `more` says, from where an earlier start was."""
        run, flags = run_of(arm, seed, self.runs), shlex.split(ARMS[arm].flags)
        if sources := ARMS[arm].stage1:
            whence = ",".join(str(run_of(s, seed, self.runs)) for s in sources.split(","))
            flags += ["--stage1_from", whence]
        where = ["--runs", str(self.runs), "--name", run.name, "--seed", str(seed)]
        if "--local_ratio" not in flags:  # such arms look at the scenes all the time
            # What the frozen networks make of a seed's scenes is the same for all arms, bit by bit.
            kind = flags[flags.index("--denoiser") + 1] if "--denoiser" in flags else "flow"
            where += ["--cache", str(self.runs / f"features-{kind}-{seed}")]
        call([sys.executable, "train.py", *where, *flags, *more], run / "log.txt")

    def lock(self, arm: str, seed: int) -> Lock:
        """Held while that run trains."""
        with self.own:
            return self.locks.setdefault((arm, seed), Lock())

    def stage1(self, arm: str, seed: int) -> None:
        """The stage 1 that others start from, once."""
        with self.lock(arm, seed):
            if not has_stage1(run_of(arm, seed, self.runs), stage1_steps(ARMS[arm])):
                self.train(arm, seed, "--stage", "1")

    def heavy(self) -> None:
        """The pretrained denoiser that `flow-heavy` starts from, once."""
        with self.lock("heavy_denoiser", 0):
            if not (ROOT / "runs" / "heavy_denoiser" / "denoiser.safetensors").is_file():
                call([sys.executable, "benchmarks/heavy_denoiser.py"], self.runs / "log.txt")

    def job(self, arm: str, seed: int) -> None:
        """Train, measure, leave a record."""
        if record_of(arm, seed).is_file():
            return
        start = time.time()
        if "--flux" in ARMS[arm].flags:
            self.heavy()
        for source in filter(None, ARMS[arm].stage1.split(",")):
            self.stage1(source, seed)
        run = run_of(arm, seed, self.runs)
        with self.lock(arm, seed):
            if not is_finished(run):
                self.train(arm, seed)
        script = [sys.executable, "benchmarks/evidence.py", "--arm", arm, "--seed", str(seed)]
        call([*script, "--runs", str(self.runs)], run / "log.txt")
        print(f"{arm}, seed {seed}: {(time.time() - start) / 60:.1f} min", flush=True)


def missing(arms: list[str], seeds: tuple[int, ...]) -> list[tuple[str, int]]:
    """Arms and seeds without a record, the arms in their order, all seeds of one before the
    next."""
    return [(arm, seed) for arm in arms for seed in seeds if not record_of(arm, seed).is_file()]


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--only", action="append", help="an arm; repeat (all)")
    flags.add_argument("--seeds", type=int, default=len(SEEDS), help="the first so many")
    flags.add_argument("--runs", default=str(ROOT / "runs" / "evidence"))
    flags.add_argument("--workers", type=int, default=2, help="runs side by side")
    flags.add_argument("--list", action="store_true", help="say what is missing and end")
    flags.add_argument("--report", action="store_true", help="write the verdicts and end")
    args = flags.parse_args()
    arms = args.only or list(ARMS)
    if unknown := set(arms) - ARMS.keys():
        raise ValueError(f"--only {min(unknown)}: there are {', '.join(ARMS)}")
    todo = missing(arms, SEEDS[: args.seeds])
    if args.list:
        print("\n".join(f"{arm} {seed}" for arm, seed in todo) or "nothing is missing")
        return
    if not args.report:
        runner = Runner(Path(args.runs))
        if not (RECORDS / "original.json").is_file():
            script = [sys.executable, "benchmarks/evidence.py", "--arm", "original"]
            call(script, Path(args.runs) / "log.txt")
        with ThreadPoolExecutor(args.workers) as pool:
            if any("--flux" in ARMS[arm].flags for arm, _ in todo):
                pool.submit(runner.heavy)  # half an hour, for which its five jobs would all wait
            list(pool.map(lambda job: runner.job(*job), todo))
    from verdicts import write_verdicts

    write_verdicts()


if __name__ == "__main__":
    run_command(main)
