"""Draw runs: every metric against the tokens that were trained on.

    python -m lab.tools.draw_runs out/khop-cpu-0102-030405       a folder of runs -> plot.png in it
    python -m lab.tools.draw_runs lab/results/swaps.json   a file of runs -> lab/pictures/swaps.png
    python -m lab.tools.draw_runs out/a out/b --merge c.json   many runs -> one new file, and c.png

One panel a metric and case, one colour a kind of model, one line a seed. A run named twice is one
run.
"""
from pathlib import Path

import sleep
from lab.common import (METRIC_WORDS, case_words, check_output, load_all, parser, pick, picture_of,
                        program, title, write_results)
from lab.experiments.plots import draw_chance, figure, legend, save_figure


def rows_of_panels(chance):
    """{metric: number or {case: number}} -> rows of (metric, case); cases make a row."""
    rows = []
    for metric, value in chance.items():
        metric_cases = list(value) if isinstance(value, dict) else [None]
        rows.append([(metric, case) for case in metric_cases])
    if all(len(row) == 1 for row in rows):
        return [[row[0] for row in rows]]
    return rows


def kinds(runs):
    """{label: runs that differ in nothing but the seed}; the label says in what they differ."""
    not_compared = {"seed", "device", "compile", "recompute", "N_test"}
    all_settings = [dict(run["settings"], N=run["N"]) for run in runs]
    names = {name for settings in all_settings for name in settings} - not_compared
    differ = []
    for name in sorted(names, key=lambda name: (name != "N", name)):
        if len({str(settings.get(name)) for settings in all_settings}) > 1:
            differ.append(name)
    groups = {}
    for run in sorted(runs, key=lambda run: run["N"]):
        values = dict(run["settings"], N=run["N"])
        label = ", ".join(f"{setting} = {values.get(setting)}" for setting in differ or ["N"])
        groups.setdefault(label, []).append(run)
    return groups


def draw(runs, path):
    """One panel a metric and case, one colour a kind, one line a seed; chance is dashed."""
    chance = runs[0]["chance"]
    rows = rows_of_panels(chance)
    height = len(rows)
    width = max(len(row) for row in rows)
    fig, axes = figure(height, width, (max(3.0 * width + 1, 5), 2.8 * height + 1.1), sharex=True)
    groups = kinds(runs)
    for y, row in enumerate(rows):
        for ax in axes[y, len(row):]:
            ax.set_axis_off()
        for x, (metric, case) in enumerate(row):
            ax = axes[y, x]
            for color, (label, group) in enumerate(groups.items()):
                draw_lines(ax, group, metric, case, f"C{color}", label)
            draw_chance(ax, pick(chance, metric, case))
            ax.set_title(case_words(runs[0]["task"], case), fontsize=10)
            if metric == "loss":
                ax.set_ylim(bottom=0)
            else:
                ax.set_ylim(0, 1.03)
            if case is None or x == 0:
                ax.set_ylabel(METRIC_WORDS.get(metric, metric))
            if y == height - 1:
                ax.set_xlabel("training tokens (millions)")
    fig.suptitle(title(runs), fontsize=10)
    legend(fig, axes[0, 0], "N: passes of a sleep; one line a seed")
    save_figure(fig, path)


def draw_lines(ax, group, metric, case, color, label):
    """A line a run; the first one carries the label."""
    for run in group:
        tokens = [point["tokens"] / 1e6 for point in run["curve"]]
        values = [pick(point, metric, case) for point in run["curve"]]
        ax.plot(tokens, values, color=color, marker=".", lw=1.2, label=label)
        label = None


@program
def main(argv):
    p = parser(__doc__)
    p.add_argument("paths", nargs="+", type=Path, metavar="FOLDER_OR_FILE")
    p.add_argument("--out", type=Path, help="the picture; default: FOLDER/plot.png, or FILE as png")
    p.add_argument("--merge", type=Path, metavar="FILE", help="a new file for all these runs")
    args = p.parse_args(argv)
    if args.merge and args.merge.exists():
        raise sleep.BadInput(f"--merge {args.merge} is there already: choose another name.")
    if args.merge and args.merge.suffix != ".json":
        raise sleep.BadInput(f"--merge {args.merge}: take a name that ends in .json.")
    if len(args.paths) > 1 and not (args.out or args.merge):
        raise sleep.BadInput("for more than one folder or file, name the picture: add --out.")
    first = args.merge or args.paths[0]
    out = args.out or (first / "plot.png" if first.is_dir() else picture_of(first))
    runs = load_all(args.paths)
    check_output(out, ".png")
    if args.merge:
        write_results(args.merge, dict(runs=runs))
    draw(runs, out)
    print(f"saved: {out}" + (f", {args.merge}" if args.merge else ""))


if __name__ == "__main__":
    main()
