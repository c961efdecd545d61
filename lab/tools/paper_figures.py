"""The figures of the paper, one command each.

    python -m lab.tools.paper_figures                       the list
    python -m lab.tools.paper_figures 3                     Figure 3 at the paper's size
    python -m lab.tools.paper_figures 3 --share 0.1         with a tenth of its steps
    python -m lab.tools.paper_figures 3 --preset cpu  a small one, minutes on two CPU cores
    python -m lab.tools.paper_figures 2b --cost             only say what it will take

Before it starts it says what it will take: FLOP, counted, and hours, from a short measurement
here. Further flags are for all runs (--seed 0 1 2, --N ...). What a run leaves is kept as by
lab.experiments: the same command goes on from the last evaluation.
"""
import time
from typing import NamedTuple

import torch

import sleep
from lab.common import METRIC_WORDS, by_label, cases, mean, parser, pick, program, title
from lab.experiments import runner, variants
from lab.experiments.plots import figure, legend, save_figure
from lab.experiments.registry import Experiment, load_task
from lab.tools import benchmark


class Figure(NamedTuple):
    """A figure of the paper."""
    about: str
    experiments: dict      # {preset: Experiment}; a label is a line of the picture
    x: str                 # a setting ("t", "N"), or "case": the cases of the metric
    metric: str
    paper: dict            # {label: {x: the paper's value}}, read off or said in its text
    said: str              # what the paper says of it, and how its setting differs


def by_passes(task, *passes, flags=""):
    """An experiment with these N."""
    return Experiment(task, "", {f"--N {N} {flags}".strip(): f"N = {N}" for N in passes})


def by_depth(*depths, flags=""):
    """Rule 110 with one pass, asked for these many steps of the rule."""
    conditions = {f"--N 1 --t {t} {flags}".strip(): f"N = 1, t = {t}" for t in depths}
    return Experiment("ca", "", conditions)


SLIDING = "--L 512 --eviction sliding --warmup 1562 --batch_size 32 --recompute"
FIGURES = {
    "2a": Figure(
        "Rule 110: one pass, deeper and deeper questions",
        dict(paper=by_depth(4, 8, 10, 12, 14, 16, flags="--steps 782 --eval_every 46"),
             cpu=by_depth(4, 6, 8)),
        "t", "exact", {"N = 1": {4: 1.0, 8: 1.0}},
        "Falls as t grows; 4 and 8 steps reach 1.00 within 40M tokens."),
    "2b": Figure(
        "Rule 110, 32 steps: more passes",
        dict(paper=by_passes("ca", 1, 2, 3, 4), cpu=by_passes("ca", 1, 2, 3, 4)),
        "N", "exact", {"t = 32": {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.3}},
        "N = 1 about 0.10, N = 2 about 0.20, N = 3 and 4 above 0.30 after 4 to 5 billion tokens."),
    "3": Figure(
        "k hops: loss against hops",
        dict(paper=by_passes("khop", 1, 2, 4), cpu=by_passes("khop", 1, 2, 4)),
        "case", "loss", {},
        "N = 1 makes almost no progress from 4 hops on, N = 2 stalls from 8 on, N = 4 starts on "
        "16."),
    "4": Figure(
        "Word problems: hard eviction",
        dict(paper=by_passes("gsm", 1, 4, flags="--batch_size 32 --recompute"),
             cpu=by_passes("gsm", 1, 3)),
        "case", "accuracy", {},
        "By operations, not by reads: 2 0.86, 4 0.92, 6 0.419 (N = 1) and 0.615 (N = 4), 8 0.210 "
        "and 0.272 (Ouro 1.4B, fine-tuned)."),
    "5": Figure(
        "Word problems: a sliding window",
        dict(paper=by_passes("gsm", 1, 4, flags=SLIDING),
             cpu=by_passes("gsm", 1, 3, flags="--L 16 --eviction sliding --warmup 500")),
        "case", "accuracy", {},
        "By operations: 2 0.596 (N = 1) and 0.905 (N = 4), 8 0.116 and 0.137 (Ouro 1.4B, "
        "fine-tuned)."),
}


# ------------------------------------------------------------------------------------------------
# What a figure will take

def shortened(experiment, share, argv):
    """The experiment with `share` of its steps."""
    if share == 1:
        return experiment
    conditions = {}
    for condition in runner.plan(experiment, argv, "paper_figures"):
        flags = f"{condition.flags} --steps {max(1, round(condition.args.steps * share))}"
        if condition.args.warmup > 0:
            flags += f" --warmup {int(condition.args.warmup * share)}"
        conditions[flags] = experiment.conditions[condition.flags]
    return experiment._replace(conditions=conditions)


def cost(experiment, argv):
    """FLOP of all runs together, and seconds on this device: what one training step of the first
    condition takes, by FLOP."""
    *_, Task = load_task(experiment.task)
    total = 0
    flop_per_second = None
    for condition in runner.plan(experiment, argv, "paper_figures"):
        for task, cfg, settings in sleep.plan(condition.args, Task):
            run = dict(task=experiment.task, seed=settings["seed"], settings=settings)
            flop = runner.flop(run)
            total += flop
            if flop_per_second is None:
                flop_of_a_step = flop / settings["steps"]
                seconds = seconds_of_a_step(task, cfg, settings, flop_of_a_step)
                flop_per_second = flop_of_a_step / seconds
    return total, total / flop_per_second


def seconds_of_a_step(task, cfg, settings, flop):
    """The second of two training steps, eager; on a CPU with as few sequences as take a moment."""
    on_gpu = torch.device(settings["device"]).type == "cuda"
    B = settings["batch_size"]
    few = B if on_gpu else max(1, min(B, int(2e10 / flop * B)))
    model = variants.make_model(cfg, settings).to(settings["device"])
    recompute = settings["recompute"] or on_gpu                # then no CUDA graph is recorded
    gradients = sleep.accelerate(model, False, recompute)
    tokens, targets, *_ = task.make_batch(0)
    for _ in range(2):
        start = time.monotonic()
        gradients(tokens[:few], targets[:few], cfg.N).item()   # waits for the device
        seconds = time.monotonic() - start
    return seconds * B / few


# ------------------------------------------------------------------------------------------------
# Picture and program

def points_of(runs, x, metric):
    """{line: {x: values of the seeds}}, {x: chance}"""
    lines = {}
    chance = {}
    for label, group in by_label(runs).items():
        for run in group:
            line = f"t = {run['settings']['t']}" if x == "N" else label.split(",")[0]
            for case in cases(run["chance"], metric):
                at = float(case) if x == "case" else run["settings"][x]
                lines.setdefault(line, {}).setdefault(at, []).append(pick(run, metric, case))
                chance[at] = pick(run["chance"], metric, case)
    return lines, chance


def draw(name, runs, experiment, path):
    """Lines over x, a colour a line, dots the seeds; stars the paper's values; chance dashed."""
    paper_figure = FIGURES[name]
    fig, axes = figure(1, 1, (7.5, 4.8))
    ax = axes[0, 0]
    lines, chance = points_of(runs, paper_figure.x, paper_figure.metric)
    for i, (line, points) in enumerate(lines.items()):
        xs = sorted(points)
        ax.plot(xs, [mean(points[x]) for x in xs], f"C{i}-", label=f"here, {line}")
        for x in xs:
            ax.plot([x] * len(points[x]), points[x], f"C{i}o", ms=4)
    for i, (line, points) in enumerate(paper_figure.paper.items(), 5):
        ax.plot(list(points), list(points.values()), f"C{i}*", ms=11, label=f"the paper, {line}")
    xs = sorted(chance)
    ax.plot(xs, [chance[x] for x in xs], "k--", lw=1, label="chance: best constant answer")
    x_words = {"t": "steps of the rule", "N": "N: passes of a sleep",
               "case": "hops" if experiment.task == "khop" else "longest chain of reads"}
    ax.set(xlabel=x_words[paper_figure.x], xticks=xs,
           ylabel=METRIC_WORDS.get(paper_figure.metric, paper_figure.metric))
    ax.set_ylim(bottom=0, top=None if paper_figure.metric == "loss" else 1.03)
    fig.suptitle(f"Figure {name}: {paper_figure.about}\n{title(runs)}", fontsize=10)
    legend(fig, ax, paper_figure.said if len(paper_figure.said) < 110 else "")
    save_figure(fig, path)


@program
def main(argv):
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        for name, paper_figure in FIGURES.items():
            print(f"  {name:3} {paper_figure.about}")
        print("  6   Speed and memory: this is python -m lab.tools.benchmark")
        return
    name, *flags = argv
    if name == "6":
        benchmark.main(flags)
        return
    p = parser(__doc__)
    p.add_argument("--share", type=float, default=1.0, help="of the steps")
    p.add_argument("--preset", default="paper", help="paper or cpu")
    p.add_argument("--cost", action="store_true", help="only say what it will take")
    own, flags = p.parse_known_args(flags)
    if name not in FIGURES:
        raise sleep.BadInput(f"there is no figure {name}: there are {', '.join(FIGURES)} and 6.")
    if own.preset not in FIGURES[name].experiments:
        raise sleep.BadInput(f"--preset {own.preset} must be paper or cpu.")
    if not 0 < own.share <= 1:
        raise sleep.BadInput(f"--share {own.share} must be above 0, and at most 1.")
    paper_figure = FIGURES[name]
    flags = ["--preset", own.preset, *flags]
    experiment = shortened(paper_figure.experiments[own.preset], own.share, flags)
    experiment = experiment._replace(question=f"Figure {name}: {paper_figure.about}")
    print(f"Figure {name}: {paper_figure.about}. The paper: {paper_figure.said}")
    total, seconds = cost(experiment, flags)
    print(f"{len(experiment.conditions)} conditions, {total / 1e15:.3g} PFLOP; about "
          f"{seconds / 3600:.2g} hours on this device, as one eager step goes")
    if not own.cost:
        runner.run(experiment, flags, f"figure-{name}", lambda *args: draw(name, *args))


if __name__ == "__main__":
    main()
