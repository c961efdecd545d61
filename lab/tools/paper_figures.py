"""The figures of the paper, one command each.

    python -m lab.figures                       the list
    python -m lab.figures 3                     Figure 3 at the paper's size
    python -m lab.figures 3 --share 0.1         with a tenth of its steps
    python -m lab.figures 3 --preset cpu        a small one, minutes to an hour on two CPU cores
    python -m lab.figures 2b --cost             only say what it will take

Before it starts it says what it will take: FLOP, counted, and hours, from a short measurement here.
Further flags are for all runs (--seed 0 1 2, --N ...). What a run leaves is kept as by lab.experiments:
the same command goes on from the last evaluation.
"""
import sys
import time
from typing import NamedTuple

import sleep
from lab import benchmark, experiments
from lab.experiments import Row, by_label, cases
from lab.plot import METRICS, figure, legend, parser, pick, save_figure, title


class Figure(NamedTuple):
    """A figure of the paper."""
    about: str
    rows: dict             # {preset: Row}; a label is a line of the picture
    x: str                 # "t": that setting; "case": the cases of the metric
    metric: str
    paper: dict            # {label: {x: the paper's value}}, read off or said in its text
    said: str              # what the paper says of it, and how its setting differs


def hybrids(task, *N, flags=""):
    return Row(task, "", {f"--N {n} {flags}".strip(): f"N = {n}" for n in N})


def depths(*t, flags=""):
    return Row("ca", "", {f"--N 1 --t {x} {flags}".strip(): f"N = 1, t = {x}" for x in t})


FIGURES = {
    "2a": Figure("Rule 110: one pass, deeper and deeper questions",
                 dict(paper=depths(4, 8, 10, 12, 14, 16, flags="--steps 782 --eval_every 46"),
                      cpu=depths(4, 6, 8)),
                 "t", "exact", {"N = 1": {4: 1.0, 8: 1.0}},
                 "Falls as t grows; 4 and 8 steps reach 1.00 within 40M tokens."),
    "2b": Figure("Rule 110, 32 steps: more passes",
                 dict(paper=hybrids("ca", 1, 2, 3, 4), cpu=hybrids("ca", 1, 2, 3, 4)),
                 "N", "exact", {"t = 32": {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.3}},
                 "N = 1 about 0.10, N = 2 about 0.20, N = 3 and 4 above 0.30 after 4 to 5 billion tokens."),
    "3": Figure("k hops: loss against hops",
                dict(paper=hybrids("khop", 1, 2, 4), cpu=hybrids("khop", 1, 2, 4)),
                "case", "loss", {},
                "N = 1 makes almost no progress from 4 hops on, N = 2 stalls from 8 on, N = 4 starts on 16."),
    "4": Figure("Word problems: hard eviction",
                dict(paper=hybrids("gsm", 1, 4, flags="--batch_size 64 --recompute"),
                     cpu=hybrids("gsm", 1, 3)),
                "case", "accuracy", {},
                "By operations, not by reads: 2 0.86, 4 0.92, 6 0.419 (N = 1) and 0.615 (N = 4), 8 0.210 and "
                "0.272 (Ouro 1.4B, fine-tuned)."),
    "5": Figure("Word problems: a sliding window",
                dict(paper=hybrids("gsm", 1, 4, flags="--L 512 --eviction sliding --warmup 1562 "
                                                      "--batch_size 64 --recompute"),
                     cpu=hybrids("gsm", 1, 3, flags="--L 16 --eviction sliding --warmup 500")),
                "case", "accuracy", {},
                "By operations: 2 0.596 (N = 1) and 0.905 (N = 4), 8 0.116 and 0.137 (Ouro 1.4B, fine-tuned)."),
}


def shortened(row, share, argv):
    """The row with `share` of its steps."""
    conditions = {}
    for condition, args, *_ in experiments.plan(row, argv, "figures"):
        fewer = max(1, round(args.steps * share))
        less = f"--steps {fewer}" + f" --warmup {int(args.warmup * share)}" * (args.warmup > 0)
        conditions[f"{condition} {less}" if share < 1 else condition] = row.conditions[condition]
    return row._replace(conditions=conditions)


def cost(row, argv):
    """FLOP of all runs together, and seconds on this device: what one training step of the cheapest
    condition takes, by FLOP."""
    todo, total, rate = experiments.plan(row, argv, "figures"), 0, None
    doc, presets, flags, Task = experiments.load_task(row.task)
    for condition, args, *_ in todo:
        for task, cfg, settings in sleep.plan(args, Task):
            flop = experiments.flop(dict(task=row.task, seed=settings["seed"], settings=settings))
            step, total = flop / args.steps, total + flop
            rate = rate or step / seconds_of_a_step(task, cfg, settings, step)
    return total, total / rate


def seconds_of_a_step(task, cfg, settings, flop):
    """The second of two training steps, eager; on a CPU with as few sequences as take a moment."""
    device, B = settings["device"], settings["batch_size"]
    few = B if device == "cuda" else max(1, min(B, int(2e10 / flop * B)))
    model = sleep.SleepLM(cfg).to(device)
    model.bf16 = device == "cuda"
    gradients = sleep.make_gradients(model, False, settings["recompute"] or device == "cuda")  # no graph
    tokens, targets, *_ = (x[:few] for x in task.make_batch(0))
    for _ in range(2):
        start = time.monotonic()
        gradients(tokens, targets, cfg.N).item()               # waits for the device
    return (time.monotonic() - start) * B / few


def draw(name, runs, row, path):
    """Lines over x, a colour an N, dots the seeds; stars the paper's values; the guess dashed."""
    f, fig_axes = FIGURES[name], figure(1, 1, (7.5, 4.8))
    fig, ax = fig_axes[0], fig_axes[1][0, 0]
    lines, guess = {}, {}
    for label, group in by_label(runs).items():
        for run in group:
            for case in cases(run, f.metric):
                x = (float(case) if f.x == "case" else run["settings"][f.x])
                line = label.split(",")[0] if f.x != "N" else f"t = {run['settings']['t']}"
                lines.setdefault(line, {}).setdefault(x, []).append(pick(run, f.metric, case))
                guess[x] = pick(run["chance"], f.metric, case)
    for i, (line, points) in enumerate(lines.items()):
        xs = sorted(points)
        ax.plot(xs, [sum(points[x]) / len(points[x]) for x in xs], f"C{i}-", label=f"here, {line}")
        for x in xs:
            ax.plot([x] * len(points[x]), points[x], f"C{i}o", ms=4)
    for i, (line, points) in enumerate(f.paper.items()):
        ax.plot([*points], [*points.values()], f"C{i + 5}*", ms=11, label=f"the paper, {line}")
    xs = sorted(guess)
    ax.plot(xs, [guess[x] for x in xs], "k--", lw=1, label="constant guess")
    ax.set(xlabel=dict(t="steps of the rule", N="N: passes of a sleep").get(f.x, "hops" if row.task == "khop" else
           "longest chain of reads"), ylabel=METRICS.get(f.metric, f.metric), xticks=xs)
    ax.set_ylim(bottom=0, top=None if f.metric == "loss" else 1.03)
    fig.suptitle(f"Figure {name}: {f.about}\n{title(runs)}", fontsize=10)
    legend(fig, ax, f.said if len(f.said) < 110 else "")
    save_figure(fig, path)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__ + "\n" + "\n".join(f"  {name:3} {f.about}" for name, f in FIGURES.items())
              + "\n  6   Speed and memory: this is python -m lab.benchmark")
        return
    name, *rest = argv
    p = parser(__doc__)
    p.add_argument("--share", type=float, default=1.0)
    p.add_argument("--preset", default="paper")
    p.add_argument("--cost", action="store_true")
    own, rest = p.parse_known_args(rest)
    if name == "6":
        return benchmark.main(rest)
    try:
        if name not in FIGURES or own.preset not in FIGURES[name].rows or not 0 < own.share <= 1:
            raise sleep.BadInput(f"figure {name} --preset {own.preset} --share {own.share}: there are figures "
                                 f"{', '.join(FIGURES)} and 6, presets paper and cpu, and a share is 0 to 1.")
        rest = ["--preset", own.preset, *rest]
        row = shortened(FIGURES[name].rows[own.preset], own.share, rest)
        print(f"Figure {name}: {FIGURES[name].about}. The paper: {FIGURES[name].said}")
        total, seconds = cost(row, rest)
        print(f"{len(row.conditions)} conditions, {total / 1e15:.3g} PFLOP; about {seconds / 3600:.2g} hours on "
              "this device, as one eager step goes")
        if not own.cost:
            experiments.run(row._replace(question=f"Figure {name}: {FIGURES[name].about}"), rest,
                            f"figure-{name}", lambda *args: draw(name, *args))
    except sleep.BadInput as e:
        p.error(e)


if __name__ == "__main__":
    main()
