"""The record: how little compute teaches a model to sleep?

    python -m lab.record                               the preset
    python -m lab.record --grow_N 0.6 --seed 0 1 2     flags of train_khop and lab.experiments

The rules:
1. The task is that of `python train_khop.py`: what is asked, fed and held out stays as it is.
2. A model has arrived when its accuracy at three hops is 0.9 or more in two evaluations in a row.
3. Its compute is the TFLOP of all training up to the second of them, counted as in lab.experiments.
4. The record is the mean of seeds 0, 1, 2. All three have to arrive; settings are tuned on other seeds.
5. An answer takes one pass over the question. All else may change.

Runs are kept in out/experiments, and go on where they stopped.
"""
import sys
from pathlib import Path

import sleep
from lab import experiments
from lab.plot import load_runs


def arrived(run):
    """The entry of the curve at which a run has 0.9 at three hops for the second time in a row, or None."""
    good = [entry["accuracy"]["3"] >= 0.9 for entry in run["curve"]]
    return next((entry for entry, *two in zip(run["curve"][1:], good, good[1:]) if all(two)), None)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & {*argv}:
        print(__doc__)
        return
    doc, presets, flags, Task = experiments.load_task("khop")
    line = ["--preset", "cpu", "--N", "3", "--seed", "0", "1", "2", *argv]
    args = sleep.parse(doc, presets, flags, line)[1]
    default = sleep.parse(doc, presets, flags, ["--preset", args.preset])[1]
    out = args.out or experiments.folder("khop", args, default)
    sleep.main(doc, presets, flags, Task, [*line, "--out", str(out), "--resume"])
    spent = []
    for N in dict.fromkeys(args.N):
        for seed in dict.fromkeys(args.seed):
            run, = load_runs(Path(out) / f"N{N}-seed{seed}.json")
            if entry := arrived(run):
                spent.append(experiments.flop(run, entry["step"]) / 1e12)
                print(f"N {N} seed {seed}: step {entry['step']}, {spent[-1]:.2f} TFLOP; after all "
                      f"{run['steps']}: {sleep.line(dict(accuracy=run['accuracy']))}")
            else:
                print(f"N {N} seed {seed}: did not arrive; {sleep.line(dict(accuracy=run['accuracy']))}")
    if len(spent) == len(args.N) * len(args.seed):
        print(f"{sum(spent) / len(spent):.2f} TFLOP in the mean")


if __name__ == "__main__":
    main()
