"""What readers of the paper ask: a few models each, on equal terms.

    python -m lab.experiments                            the list of experiments
    python -m lab.experiments iterated --seed 0 1 2      run one; further flags are for all its runs
    python -m lab.experiments iterated --help            all flags
    python -m lab.experiments iterated --draw          draw it from lab/results; nothing is trained
    python -m lab.experiments iterated --draw FILE       draw it from a file of runs

Runs are kept in out/experiments/ and shared: what one experiment has finished, no other one runs
again. An experiment's file NAME-FLAGS.json holds its runs, and their cost in TFLOP; NAME-FLAGS.png
shows them. The preset is cpu, if no flag says otherwise.
"""
import sleep
from lab.common import program
from lab.experiments import plots, runner
from lab.experiments.registry import EXPERIMENTS


@program
def main(argv):
    names = "\n".join(f"  {name:14} {row.question}" for name, row in EXPERIMENTS.items())
    if not argv:
        print(f"python -m lab.experiments NAME [flags for all runs], with NAME one of\n{names}")
        return
    name, *flags = argv
    if name in ("-h", "--help"):
        print(f"{__doc__}\n{names}")
        return
    if name not in EXPERIMENTS:
        raise sleep.BadInput(f"there is no experiment '{name}'; there are\n{names}")
    experiment = EXPERIMENTS[name]
    if "--draw" not in flags:
        runner.run(experiment, flags, name, getattr(plots, experiment.picture))
        return
    if flags[0] != "--draw" or len(flags) > 2:
        raise sleep.BadInput("--draw takes a file of runs, or nothing, and no other flag beside "
                             "it.")
    picture = runner.redraw(experiment, name, *flags[1:])
    print(f"saved: {picture}")


if __name__ == "__main__":
    main()
