"""The leaderboard: how little compute teaches a model to sleep?

    python -m lab.experiments.leaderboard                              the preset
    python -m lab.experiments.leaderboard --grow_N 0.6 --seed 0 1 2    with further flags
    python -m lab.experiments.leaderboard --hops 8 --N 4               the second class

The flags are those of train_khop.py and of lab.experiments.

The rules:
1. There are two classes. Three hops: the task of `python train_khop.py`. Eight hops: that of
   `python -m lab.experiments.hops`, cycles of twenty nodes. What the test asks, shows and holds
   out stays as it is.
2. A model has arrived when its accuracy at the hops of its class is 0.9 or more in two
   evaluations in a row, at most 100 steps apart (in the second class 200).
3. Its compute is the TFLOP of all training up to the first of them, counted as in
   lab.experiments.
4. An entry is the mean of seeds 0, 1, 2. All three have to arrive; settings are tuned on other
   seeds.
5. An answer takes one pass over the question. All else may change.

Runs are kept in out/experiments, and go on where they stopped.
"""
from pathlib import Path

import sleep
from lab.common import load_runs, mean, parser, program
from lab.experiments import runner, variants
from lab.experiments.registry import load_task, train

CLASSES = {                                # hops: (task, most steps between evaluations)
    "3": ("khop", 100),
    "8": ("hops", 200),
}
FREE = {"deeper", "k_law", "growth"}       # flags of a task that say what training asks


def arrival(run):
    """The first point of the curve that has 0.9 at the hops of its class, as the next has, or None."""
    hops, = [hops for hops, (task, _) in CLASSES.items() if task == run["task"]]
    for point, following in zip(run["curve"], run["curve"][1:]):
        if point["accuracy"][hops] >= 0.9 and following["accuracy"][hops] >= 0.9:
            return point
    return None


def tflop_to_arrive(run):
    """TFLOP of the training up to the arrival; None if there is none."""
    point = arrival(run)
    return None if point is None else runner.flop(run, point["step"]) / 1e12


def check_rules(args, default, flags, most_steps):
    """BadInput if the flags change the task, or when an arrival is seen. flags: those of the task."""
    if args.preset != "cpu":
        raise sleep.BadInput(f"--preset {args.preset}: the task of the leaderboard is that of cpu.")
    fixed = sorted({*flags, "L", "think"} - FREE)
    changed = [flag for flag in fixed if getattr(args, flag) != getattr(default, flag)]
    if changed:
        raise sleep.BadInput(f"the task of the leaderboard is that of the cpu preset: leave "
                             f"{' '.join(f'--{flag}' for flag in changed)} as it is there.")
    if getattr(args, "k_law", "all") not in ("all", "power"):
        raise sleep.BadInput(f"--k_law {args.k_law} changes what the test asks: take all or power.")
    if args.eval_every > most_steps:
        raise sleep.BadInput(f"--eval_every {args.eval_every}: evaluations are at most "
                             f"{most_steps} steps apart.")


def class_of(argv):
    """The hops of the class, and the command line without --hops."""
    p = parser(__doc__)
    p.add_argument("--hops", choices=list(CLASSES), default="3")
    args, rest = p.parse_known_args(argv)
    return args.hops, rest


@program
def main(argv):
    if "-h" in argv or "--help" in argv:
        print(__doc__)
        return
    if "--resume" in argv:
        raise sleep.BadInput("--resume: runs go on where they stopped in any case; leave it out.")
    hops, argv = class_of(argv)
    task, most_steps = CLASSES[hops]
    doc, presets, flags, _ = load_task(task)
    line = ["--preset", "cpu", "--N", "3", "--seed", "0", "1", "2", *argv]
    _, args = sleep.parse(doc, presets, flags, line)
    _, default = sleep.parse(doc, presets, flags, ["--preset", "cpu"])
    check_rules(args, default, set(flags) - set(variants.FLAGS), most_steps)
    folder = Path(args.out or runner.folder_of(task, args, default))
    line += ["--out", str(folder)]
    if folder.is_dir():
        line.append("--resume")
    train(task, line)
    tflop = []
    for N in dict.fromkeys(args.N):
        for seed in dict.fromkeys(args.seed):
            run, = load_runs(folder / f"N{N}-seed{seed}.json")
            at_the_end = sleep.format_metrics(dict(accuracy=run["accuracy"]))
            tflop.append(tflop_to_arrive(run))
            if tflop[-1] is None:
                print(f"N {N} seed {seed}: did not arrive; {at_the_end}")
            else:
                print(f"N {N} seed {seed}: step {arrival(run)['step']}, {tflop[-1]:.2f} TFLOP; "
                      f"after all {run['steps']}: {at_the_end}")
    if None not in tflop:
        print(f"{mean(tflop):.2f} TFLOP in the mean")


if __name__ == "__main__":
    main()
