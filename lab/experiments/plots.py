"""The pictures of experiments.

A plot takes runs that carry the label of their condition, the experiment that they are from, and
the path of a png.
"""
import math
import os
from importlib.util import find_spec
from pathlib import Path

# A notebook's MPLBACKEND may name a backend that is not installed here. Files need none.
backend = os.environ.get("MPLBACKEND", "").removeprefix("module://").split(".")[0]
if backend and "://" in os.environ["MPLBACKEND"] and find_spec(backend) is None:
    os.environ["MPLBACKEND"] = "agg"

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, ScalarFormatter

import sleep
from lab.common import METRIC_WORDS, TASK_WORDS, by_label, case_words, cases, mean, pick, title


# ------------------------------------------------------------------------------------------------
# What all pictures share

def figure(rows=1, columns=1, size=(8, 4), **options):
    """A figure of its own and its axes (rows, columns), with grids."""
    fig = Figure(figsize=size, layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
    return fig, axes


def save_figure(fig, path, dpi=120):
    """Write a figure as png, whole or not at all."""
    sleep.write(Path(path), lambda temporary: fig.savefig(temporary, format="png", dpi=dpi))


def legend(fig, ax, words):
    """The legend of one panel, below the whole figure, in as many columns as fit."""
    handles, labels = ax.get_legend_handles_labels()
    longest = max(len(label) for label in labels)
    columns = int(fig.get_figwidth() / 0.065 / (longest + 9))
    fig.legend(handles, labels, loc="outside lower center", ncols=max(columns, 1), fontsize=8,
               frameon=False, title=words, title_fontsize=8)


def draw_chance(ax, value, label="chance: best constant answer"):
    ax.axhline(value, color="k", ls="--", lw=1, label=label)


def write_in_cell(ax, x, y, text, value, size):
    """Text in a cell of an image, in a colour that can be read on that of `value`, from 0 to 1."""
    ax.text(x, y, text, ha="center", va="center", fontsize=size, color="w" if value < 0.6 else "k")


def first_metric(runs):
    return next(iter(runs[0]["chance"]))


def which_seeds(group, runs):
    """" (seeds 0, 1)", if other groups have more seeds, and the label does not name them."""
    seeds = sorted({run["seed"] for run in group})
    of_all = {run["seed"] for run in runs}
    if len(seeds) == len(of_all) or "seed" in group[0]["label"]:
        return ""
    plural = "s" if len(seeds) > 1 else ""
    return f" (seed{plural} {', '.join(map(str, seeds))})"


# ------------------------------------------------------------------------------------------------
# Four kinds of pictures

def bars(runs, experiment, path):
    """A bar a condition, a dot a seed; a panel a case. Dashed: the best without sleep."""
    groups = by_label(runs)
    metric = first_metric(runs)
    panels = cases(runs[0]["chance"], metric)
    width = 4.2 + 2.6 * len(panels)
    if len(panels) == 1:
        width += 2.0
    fig, axes = figure(1, len(panels), (width, 1.7 + 0.36 * len(groups)), sharey=True)
    for ax, case in zip(axes[0], panels):
        in_legend = set()
        for i, group in enumerate(groups.values()):
            values = [pick(run, metric, case) for run in group]
            several = group[0]["N"] > 1
            color = "C1" if several else "C0"
            words = "mean, more passes" if several else "mean, 1 pass"
            ax.barh(-i, mean(values), color=color, alpha=0.4,
                    label=None if words in in_legend else words)
            ax.plot(values, [-i] * len(values), "o", color=color, ms=4)
            baseline = group[0]["baseline"]
            value = pick(baseline, metric, case)
            ax.plot([value, value], [-i - 0.45, -i + 0.45], "k--", lw=1,
                    label=None if baseline["words"] in in_legend else baseline["words"])
            in_legend |= {words, baseline["words"]}
        labels = [f"{label}{which_seeds(group, runs)}  [{group[0]['tflop']:.3g} TFLOP]"
                  for label, group in groups.items()]
        ax.set_yticks(range(0, -len(groups), -1))
        ax.set_yticklabels(labels, fontsize=8)
        ax.set_xlim(0, 1.03)
        ax.set_title(case_words(experiment.task, case), fontsize=10)
        words = METRIC_WORDS.get(metric, metric)
        ax.set_xlabel(words if len(panels) == 1 else words.split(":")[0])
    fig.suptitle(f"{experiment.question}\n{title(runs)}", fontsize=10)
    legend(fig, axes[0, 0], "a dot is a seed; in brackets: the cost of training a model")
    save_figure(fig, path)


def lines(runs, experiment, path):
    """A line a condition, a dot a seed, against N at the test; a panel a case."""
    groups = by_label(runs)
    metric = first_metric(runs)
    panels = cases(runs[0]["chance"], metric)
    N_test = experiment.N_test
    fig, axes = figure(1, len(panels), (max(3.2 * len(panels), 7), 4.6), sharey=True)
    for ax, case in zip(axes[0], panels):
        for i, (label, group) in enumerate(groups.items()):
            values = [[pick(run["N_test"][str(N)], metric, case) for run in group] for N in N_test]
            ax.plot(N_test, [mean(seeds) for seeds in values], f"C{i}-", label=label)
            ax.plot(N_test, values, f"C{i}.", ms=4)
        draw_chance(ax, pick(runs[0]["chance"], metric, case))
        ax.set(xscale="log", ylim=(0, 1.03), xlabel="N at the test: passes of a sleep")
        ax.set_title(case_words(experiment.task, case), fontsize=10)
        ax.set_xticks(N_test, N_test, minor=False)
        ax.minorticks_off()
    axes[0, 0].set_ylabel(METRIC_WORDS.get(metric, metric))
    fig.suptitle(f"{experiment.question}\n{title(runs)}", fontsize=10)
    legend(fig, axes[0, 0], "lines: mean of the seeds; dots: the seeds")
    save_figure(fig, path)


def passes_by_cases(runs, experiment, path):
    """A panel a condition: passes at the test downwards, cases to the right.

    Colour and number are the mean of the seeds; below it their range, where it is wide. A red box
    holds the passes and cases of the training.
    """
    groups = by_label(runs)
    metric = first_metric(runs)
    columns = cases(runs[0]["chance"], metric)
    N_test = [N for N in experiment.N_test if all(str(N) in run["N_test"] for run in runs)]
    panel_width = max(2.7, 0.78 * len(columns))
    rows = 1 if panel_width * len(groups) < 14 else 2          # panels above each other
    per_row = math.ceil(len(groups) / rows)
    size = (max(panel_width * per_row + 1.4, 5.5), 0.45 * len(N_test) * rows + 2.0)
    fig, axes = figure(rows, per_row, size, sharey=True)
    for ax, (label, group) in zip(axes.flat, groups.items()):
        seeds = [[[pick(run["N_test"][str(N)], metric, case) for run in group] for case in columns]
                 for N in N_test]                              # (passes, cases, seeds)
        image = ax.imshow([[mean(values) for values in row] for row in seeds], vmin=0, vmax=1,
                          cmap="viridis", aspect="auto")
        for y, row in enumerate(seeds):
            for x, values in enumerate(row):
                value = mean(values)
                text = f"{value:.2f}"
                size = 8
                if max(values) - min(values) > 0.1:
                    text += f"\n{min(values):.2f} to {max(values):.2f}"
                    size = 6.5
                write_in_cell(ax, x, y, text, value, size)
        draw_red_box(ax, group[0], N_test, columns)
        ax.set_xticks(range(len(columns)), columns)
        ax.set_yticks(range(len(N_test)), N_test)
        ax.set_title(label + which_seeds(group, runs), fontsize=10)
        words = TASK_WORDS[experiment.task][1] + "s"
        ax.set_xlabel("depth: edges to the root" if experiment.task == "trees" else words)
        ax.grid(False)
    for ax in axes.flat[len(groups):]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        ax.set_ylabel("passes of the sleep at the test")
    chance = pick(runs[0]["chance"], metric, columns[0])
    fig.colorbar(image, ax=axes[:, -1],
                 label=f"{METRIC_WORDS.get(metric, metric)} (chance {chance:.2f})")
    fig.suptitle(f"{experiment.question}\n{title(runs)}\nmean of the seeds; their range if above "
                 "0.1; red box: as in training", fontsize=10)
    save_figure(fig, path)


def draw_red_box(ax, run, N_test, columns):
    """Round the cells with as many passes and as deep cases as in training."""
    settings = run["settings"]
    if run["N"] not in N_test:
        return
    last = N_test.index(run["N"])
    trained_cases = settings.get("depth", len(columns))
    several_N = any(settings.get(flag) for flag in ("every_pass", "any_N", "grow_N"))
    height = last + 1 if several_N else 1
    ax.add_patch(Rectangle((-0.5, last + 0.5 - height), trained_cases, height, fill=False, ec="r",
                           lw=2, clip_on=False, zorder=3))


def as_trained(runs, experiment, path):
    """Passes downwards, cases to the right, each model tested with the passes of its training."""
    metric = first_metric(runs)
    columns = cases(runs[0]["chance"], metric)
    passes = sorted({run["N"] for run in runs})
    seeds = [[[pick(run, metric, case) for run in runs if run["N"] == N] for case in columns]
             for N in passes]                                  # (passes, cases, seeds)
    fig, axes = figure(1, 1, (6.4, 4.6))
    ax = axes[0, 0]
    image = ax.imshow([[mean(values) for values in row] for row in seeds], vmin=0, vmax=1,
                      cmap="viridis", aspect="auto")
    for y, row in enumerate(seeds):
        for x, values in enumerate(row):
            value = mean(values)
            write_in_cell(ax, x, y, f"{value:.2f}", value, 19)
            if max(values) - min(values) > 0.1:
                text = f"{min(values):.2f} to {max(values):.2f}"
                write_in_cell(ax, x, y + 0.34, text, value, 8.5)
            if columns[x] == str(passes[y]):                   # as many passes as hops
                ax.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fill=False, ec="red", lw=2.5))
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(passes)), passes)
    ax.tick_params(length=0, labelsize=12)
    ax.set_xlabel(f"{TASK_WORDS[experiment.task][1]}s asked for", fontsize=12)
    ax.set_ylabel("passes of the sleep", fontsize=12)
    ax.grid(False)
    chance = pick(runs[0]["chance"], metric, columns[0])
    fig.colorbar(image, ax=ax, label=f"share of answers right (chance {chance:.2f})")
    n_seeds = len({run["seed"] for run in runs})
    fig.suptitle(f"{experiment.question}\nmean of {n_seeds} seeds; small: their range, if wider "
                 f"than 0.1; red: as many passes as {TASK_WORDS[experiment.task][1]}s",
                 fontsize=11)
    save_figure(fig, path)


def compute(runs, experiment, path):
    """Against the cost of training, a panel a case. A line is what comes before a label's comma."""
    metric = first_metric(runs)
    panels = cases(runs[0]["chance"], metric)
    models = {}                            # {start of the label: its groups}
    for label, group in by_label(runs).items():
        models.setdefault(label.split(",")[0], []).append(group)
    fig, axes = figure(1, len(panels), (3.0 * len(panels) + 1, 4.6), sharey=True)
    for ax, case in zip(axes[0], panels):
        for i, (label, groups) in enumerate(models.items()):
            groups = sorted(groups, key=lambda group: group[0]["tflop"])
            mark = "o" if len(groups) > 1 else "^"
            values = [[pick(run, metric, case) for run in group] for group in groups]
            tflop = [group[0]["tflop"] for group in groups]
            ax.plot(tflop, [mean(seeds) for seeds in values], f"C{i}{mark}-", ms=6, label=label)
            for x, seeds in zip(tflop, values):
                ax.plot([x] * len(seeds), seeds, f"C{i}{mark}", ms=3, alpha=0.5)
        draw_chance(ax, pick(runs[0]["chance"], metric, case))
        ax.set(xscale="log", ylim=(0, 1.03), xlabel="TFLOP of training")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.minorticks_off()
        ax.set_title(case_words(experiment.task, case), fontsize=10)
    axes[0, 0].set_ylabel(METRIC_WORDS.get(metric, metric))
    fig.suptitle(f"{experiment.question}\n{title(runs)}", fontsize=10)
    legend(fig, axes[0, 0], "large: mean of the seeds; small: the seeds")
    save_figure(fig, path)
