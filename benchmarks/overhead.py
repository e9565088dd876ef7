"""What elastic-fit costs while nothing fails: time per optimizer step against plain torchrun, same script.

    python benchmarks/overhead.py --rounds 10

Both run the same unmodified script on two gloo ranks with steps of about ten milliseconds, one after the other in
random order, round after round. A step's time is the median over the run's steps (the first hundred left out). The
ratio is paired by round. elastic-fit saves by its defaults meanwhile.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from arms import Arm, Job, elastic, quartiles, torchrun

ARMS = (elastic("elastic-fit"), torchrun("torchrun", kind="plain"))
WARM_UP_STEPS = 100


def step_ms(arm: Arm, folder: Path, steps: int, pause_ms: float) -> float:
    """Median milliseconds of a step in one run."""
    with Job(arm, folder, steps=steps, pause_ms=pause_ms) as job:
        job.process.wait(timeout=600)
        stamps = job.stamps()[WARM_UP_STEPS:]
    if len(stamps) < steps - WARM_UP_STEPS:
        raise RuntimeError(f"{arm.name} did not finish: see {folder / 'output'}")
    return quartiles([(later.t_ns - earlier.t_ns) / 1e6 for earlier, later in pairwise(stamps)])[0]


def main() -> int:
    """Play the rounds and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--pause-ms", type=float, default=8.0, help="so that a step takes about 10 ms in all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    times: dict[str, list[float]] = {arm.name: [] for arm in ARMS}
    with tempfile.TemporaryDirectory(prefix="elastic-fit-overhead-") as folder:
        for number in range(args.rounds):
            for arm in random.sample(ARMS, len(ARMS)):
                place = Path(folder) / f"{number}-{ARMS.index(arm)}"
                times[arm.name].append(step_ms(arm, place, args.steps, args.pause_ms))
                print(f"round {number + 1:2d}  {arm.name:12s} {times[arm.name][-1]:.3f} ms a step", flush=True)
    ratios = [mine / theirs for mine, theirs in zip(times["elastic-fit"], times["torchrun"])]
    middle, low, high = quartiles(ratios)
    print(f"\nelastic-fit / torchrun, {len(ratios)} pairs: {middle:.4f} ({low:.4f} - {high:.4f})")
    print(f"that is {(middle - 1) * 100:+.2f} % a step, at {quartiles(times['torchrun'])[0]:.2f} ms a step")
    return 0


if __name__ == "__main__":
    sys.exit(main())
