"""Draw runs: every metric against the tokens that were trained on.

    python -m lab.plot out/ca-cpu-0102-030405        a folder of runs -> plot.png in it
    python -m lab.plot lab/ca-cpu.json               a file of runs -> lab/ca-cpu.png
    python -m lab.plot out/a out/b --merge lab/c.json       many runs -> one new file and lab/c.png

One panel a metric and case, one colour a kind of model, one line a seed.
"""
import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

import sleep

TASKS = {                                  # in words: the task, one case of it, its settings
    "ca": ("Cellular automaton", "", dict(rule="rule {}", t="steps asked for: {}", W="{} cells")),
    "khop": ("Hops along a shuffled cycle", "hop", dict(nodes="{} nodes")),
    "forest": ("Roots of three trees", "edge", dict(size="{} nodes each", depth="trained up to depth {}")),
    "swaps": ("Swaps of four items", "", {}),
    "gsm": ("Word problems", "read", dict(p="numbers modulo {}", reads="chains of up to {} reads")),
}
METRICS = dict(places="places: share of them right", all="all: all four places right",
               exact="exact: every bit right", bit="bit: share of bits right",
               accuracy="accuracy: share of answers right", loss="loss: cross entropy in nats",
               forward="accuracy of forward problems", reverse="accuracy of reverse problems")


def parser(doc):
    """An argparse parser that says in one sentence what is wrong, with exit status 2."""
    p = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda sentence: p.exit(2, f"{p.prog}: {sentence}\n")
    return p


# ------------------------------------------------------------------------------------------------
# Runs

def load_runs(path):
    """The runs of a folder, or of a file with one run or {"runs": [...]}; BadInput if broken."""
    path = Path(path)
    try:
        if path.is_dir():
            runs = [run for file in path.glob("N*-seed*.json") for run in load_runs(file)]
        else:
            runs = json.loads(path.read_text())
            runs = runs["runs"] if "runs" in runs else [runs]
        for run in runs:                   # what drawing needs
            run["task"], run["chance"], run["settings"]["layout"], run["curve"][-1]["tokens"]
        runs.sort(key=lambda run: (run["N"], run["seed"]))
    except sleep.BadInput:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise sleep.BadInput(f"{path} cannot be read as runs ({type(e).__name__}).") from None
    if not runs:
        raise sleep.BadInput(f"there are no runs in {path}: none has come to its first evaluation.")
    return runs


def load_all(paths):
    """The runs of all paths; BadInput if they are not of one task."""
    runs = [run for path in paths for run in load_runs(path)]
    if len(tasks := {run["task"] for run in runs}) > 1:
        raise sleep.BadInput(f"these are runs of several tasks ({', '.join(sorted(tasks))}): "
                             "draw each task for itself.")
    return runs


def merge(paths, out):
    """Write the runs of all paths to one new file {"runs": [...]}."""
    if Path(out).exists():
        raise sleep.BadInput(f"{out} is there already: choose another name.")
    runs = load_all(paths)
    sleep.write(Path(out), lambda p: p.write_text(json.dumps(dict(runs=runs), indent=1)))
    return runs


def panels(chance):
    """{metric: number or {case: number}} -> rows of (metric, case); case None: there are none."""
    rows = [[(metric, case) for case in x] if isinstance(x, dict) else [(metric, None)]
            for metric, x in chance.items()]
    return rows if any(len(row) > 1 for row in rows) else [[row[0] for row in rows]]


def pick(metrics, metric, case):
    """One number of a run, of a point of its curve or of its chance; nan if it is not there."""
    value = metrics.get(metric, float("nan"))
    return value.get(case, float("nan")) if isinstance(value, dict) else value


def case_words(task, case):
    """"3 hops" """
    word = TASKS.get(task, (task, "case", {}))[1]
    return "" if case is None else f"{case} {word}" + "s" * (case != "1")


def title(runs):
    """The task in words, then the model, as far as all runs have them in common."""
    name, _, task_settings = TASKS.get(runs[0]["task"], (runs[0]["task"], "", {}))
    model = dict(layout="blocks '{}'", d_model="width {}", L="window of {} tokens")

    def common(words):
        values = {k: [run["settings"].get(k) for run in runs] for k in words}
        return ", ".join(words[k].format(v[0]) for k, v in values.items()
                         if v[0] is not None and v.count(v[0]) == len(v))
    seeds = sorted({run["seed"] for run in runs})
    seeds = "seed " + str(seeds[0]) if len(seeds) == 1 else "seeds " + ", ".join(map(str, seeds))
    return (": ".join(x for x in (name, common(task_settings)) if x) + "\n"
            + ", ".join(x for x in (common(model), seeds) if x))


def kinds(runs):
    """{label: runs that differ in nothing but the seed}; the label says in what they differ."""
    same = {"seed", "device", "compile", "recompute", "N_test"}
    keys = sorted({k for run in runs for k in run["settings"]} - same, key=lambda k: (k != "N", k))
    differ = [k for k in keys if len({str(run["settings"].get(k)) for run in runs}) > 1] or ["N"]
    groups = {}
    for run in sorted(runs, key=lambda run: run["N"]):
        label = ", ".join(f"{k} = {run['settings'].get(k)}" for k in differ)
        groups.setdefault(label, []).append(run)
    return groups


# ------------------------------------------------------------------------------------------------
# Pictures

def figure(rows=1, columns=1, size=(8, 4), **options):
    """A figure of its own and its axes (rows, columns), with grids."""
    fig = Figure(figsize=size, layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
    return fig, axes


def save_figure(fig, path):
    """Write a figure as png, whole or not at all."""
    sleep.write(Path(path), lambda p: fig.savefig(p, format="png", dpi=120))


def legend(fig, ax, words):
    """The legend of one panel, below the whole figure, in as many columns as there is room for."""
    handles, labels = ax.get_legend_handles_labels()
    columns = int(fig.get_figwidth() / 0.065 / (max(map(len, labels)) + 9))
    fig.legend(handles, labels, loc="outside lower center", ncols=max(columns, 1), fontsize=8,
               frameon=False, title=words, title_fontsize=8)


def plot_runs(runs, path):
    """One panel a metric and case, one colour a kind, one line a seed; the guess is dashed."""
    rows = panels(runs[0]["chance"])
    height, width = len(rows), max(len(row) for row in rows)
    fig, axes = figure(height, width, (max(3.0 * width + 1, 5), 2.8 * height + 1.1), sharex=True)
    groups = kinds(runs)
    for y, row in enumerate(rows):
        for ax in axes[y, len(row):]:
            ax.set_axis_off()
        for x, (metric, case) in enumerate(row):
            ax = axes[y, x]
            for color, (label, group) in enumerate(groups.items()):
                for i, run in enumerate(group):
                    ax.plot([point["tokens"] / 1e6 for point in run["curve"]],
                            [pick(point, metric, case) for point in run["curve"]],
                            color=f"C{color}", marker=".", lw=1.2, label=None if i else label)
            ax.axhline(pick(runs[0]["chance"], metric, case), color="k", ls="--", lw=1,
                       label="constant guess")
            ax.set_title(case_words(runs[0]["task"], case), fontsize=10)
            if metric == "loss":
                ax.set_ylim(bottom=0)
            else:
                ax.set_ylim(0, 1.03)
            if case is None or x == 0:
                ax.set_ylabel(METRICS.get(metric, metric))
            if y == height - 1:
                ax.set_xlabel("training tokens (millions)")
    fig.suptitle(title(runs), fontsize=10)
    legend(fig, axes[0, 0], "N: passes of a sleep; one line a seed")
    save_figure(fig, path)


def main(argv=None):
    p = parser(__doc__)
    p.add_argument("paths", nargs="+", type=Path, metavar="FOLDER_OR_FILE")
    p.add_argument("--out", type=Path, help="the picture; default: FOLDER/plot.png, or FILE as png")
    p.add_argument("--merge", type=Path, metavar="FILE", help="a new file for all these runs")
    args = p.parse_args(argv)
    path = args.merge or args.paths[0]
    out = args.out or (path / "plot.png" if path.is_dir() else path.with_suffix(".png"))
    try:
        if out.suffix != ".png" or args.merge and args.merge.suffix != ".json":
            raise sleep.BadInput("a picture's name must end in .png, that of --merge in .json.")
        if len(args.paths) > 1 and not (args.out or args.merge):
            raise sleep.BadInput("for more than one folder or file, name the picture: add --out.")
        runs = merge(args.paths, args.merge) if args.merge else load_all(args.paths)
        plot_runs(runs, out)
    except sleep.BadInput as e:
        p.error(e)
    print(f"saved: {out}" + (f", {args.merge}" if args.merge else ""))


if __name__ == "__main__":
    main()
