"""The record: how little compute teaches a model to sleep?

    python -m lab.record                               the preset
    python -m lab.record --grow_N 0.6 --seed 0 1 2     flags of train_khop and lab.experiments

The rules:
1. The task is that of `python train_khop.py`: what is asked, fed and held out stays as it is.
2. A model has arrived when its accuracy at three hops is 0.9 or more in two evaluations in a row, at
   most 100 steps apart.
3. Its compute is the TFLOP of all training up to the first of them, counted as in lab.experiments.
4. The record is the mean of seeds 0, 1, 2. All three have to arrive; settings are tuned on other seeds.
5. An answer takes one pass over the question. All else may change.

Runs are kept in out/experiments, and go on where they stopped.
"""
import sys
from pathlib import Path

import sleep
import train_khop
from lab import experiments
from lab.plot import load_runs


def arrived(run):
    """The first entry of the curve that has 0.9 at three hops, as the next one has, or None."""
    good = [entry["accuracy"]["3"] >= 0.9 for entry in run["curve"]]
    return next((entry for entry, *two in zip(run["curve"], good, good[1:]) if all(two)), None)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & {*argv}:
        print(__doc__)
        return
    doc, presets, flags, Task = experiments.load_task("khop")
    line = ["--preset", "cpu", "--N", "3", "--seed", "0", "1", "2", *argv]
    args = sleep.parse(doc, presets, flags, line)[1]
    default = sleep.parse(doc, presets, flags, ["--preset", args.preset])[1]
    same = {*train_khop.FLAGS, "L", "think"} - {"deeper"}
    if args.preset != "cpu" or args.eval_every > 100 or any(
            getattr(args, flag) != getattr(default, flag) for flag in same):
        print("record.py: the task of the record is that of the cpu preset, with evaluations at most 100 steps "
              f"apart: leave {' '.join('--' + flag for flag in sorted(same))} as they are.", file=sys.stderr)
        sys.exit(2)
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
