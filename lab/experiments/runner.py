"""Running experiments: their conditions, what training costs, and the files that they leave."""
import importlib
import json
import re
import shlex
import sys
from argparse import Namespace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import sleep
from lab.common import (PICTURES, RESULTS, by_label, case_words, cases, load_runs, mean, pick,
                        picture_of, write_results)
from lab.experiments import baselines, plots, variants
from lab.experiments.registry import TASKS, load_task, train
from lab.tools.benchmark import count_flop

FOLDER = Path("out/experiments")           # shared: what one experiment finished, none runs again


class Condition(NamedTuple):
    flags: str
    args: Namespace                        # all settings
    line: list                             # the command line for sleep.main
    folder: Path                           # where its runs are kept


# ------------------------------------------------------------------------------------------------
# Before anything is trained

def plan(experiment, argv, name):
    """The conditions, with further flags argv, as Conditions; BadInput if one makes no sense."""
    tests = []
    own_flags = {"--out", "--resume"}
    if experiment.N_test:
        tests = ["--N_test", *map(str, experiment.N_test)]
        own_flags.add("--N_test")
    for flags in experiment.conditions:
        own_flags.update(re.findall(r"--\w+", flags))
    taken = own_flags & {word.split("=")[0] for word in argv}
    if taken:
        raise sleep.BadInput(f"{name} takes no {' '.join(sorted(taken))}: it sets that itself.")

    doc, presets, flags_help, Task = load_task(experiment.task)
    conditions = []
    for flags in experiment.conditions:
        line = ["--preset", "cpu", *argv, *shlex.split(flags), *tests]
        _, args = sleep.parse(doc, presets, flags_help, line)
        _, default = sleep.parse(doc, presets, flags_help, ["--preset", args.preset])
        sleep.plan(args, Task)
        folder = folder_of(experiment.task, args, default)
        conditions.append(Condition(flags, args, line, folder))
    return conditions


def folder_of(task, args, default):
    """Where the runs of a condition are kept: named by all that is not as in the preset."""
    not_in_name = {"N", "seed", "N_test", "preset", "device", "compile", "recompute", "out",
                   "resume"}
    words = [task]
    if args.preset != "cpu":
        words.append(args.preset)
    for flag, value in sorted(vars(args).items()):
        if flag in not_in_name or value == getattr(default, flag):
            continue
        if value is True:
            words.append(flag)
        else:
            text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
            words.append(f"{flag}-{text or 'none'}")
    return FOLDER / "-".join(words)


# ------------------------------------------------------------------------------------------------
# What training costs, and what is got without sleep

def flop(run, steps=None):
    """FLOP of the training of a run, or of its first `steps` steps; rebuilt from its settings.

    A hundred steps are counted, one sequence of their batch, on the CPU.
    """
    _, presets, _, Task = load_task(run["task"])
    # A flag that the run does not name is as in the cpu preset.
    settings = sleep.DEFAULTS | presets["cpu"] | run["settings"]
    n_steps = settings["steps"] if steps is None else steps
    small = dict(N=[settings["N"]], device="cpu", batch_size=1)
    if run["task"] == "gsm":
        small["tests"] = settings["reads"]                     # a test as small as there can be
    task = Task(Namespace(**settings | small), settings["seed"])
    values = {flag: settings[flag] for flag in sleep.MODEL_FLAGS}
    model = variants.make_model(sleep.Config(task.vocab_size, task.T, **values), settings)
    sample = range(0, n_steps, max(1, n_steps // 100))
    cost = {}                              # steps of the same shape and N cost the same
    total = 0
    for step in sample:
        tokens, targets, *_ = task.make_batch(step)
        N = variants.draw_N(step, settings)
        shape = (tokens.shape, N)
        if shape not in cost:
            cost[shape] = count_flop(model, tokens, targets, N)
        total += cost[shape]
    mean_of_a_step = total / len(sample)   # of one sequence
    return settings["batch_size"] * n_steps * mean_of_a_step


@cache
def baseline(task_name, settings):
    """The best that is got without sleep, in words, and its metrics. Of k hops and trees it is
    chance.

    settings: the flags of the task, as json.
    """
    module, Task = TASKS[task_name]
    args = Namespace(**dict(batch_size=1, steps=1) | json.loads(settings))
    task = getattr(importlib.import_module(module), Task)(args, 0)
    if task_name in ("khop", "hops"):
        return dict(words="chance: best constant answer", **task.chance)
    if task_name == "trees":
        return dict(words="chance: one of the roots", **task.chance)
    if task_name == "gsm":                 # its readers of sentences know what is to be learned
        found = {words: metrics for words, metrics in baselines.gsm(task).items()
                 if "reader" not in words}
    elif task.W <= 20:
        found = baselines.ca(task)
    else:
        found = {"best constant": task.chance}
    best = max(found, key=lambda words: mean_of_first(found[words]))
    return dict(words=f"best without sleep: {best}", **found[best])


def mean_of_first(metrics):
    """The mean over the cases of the first metric."""
    first = next(iter(metrics.values()))
    return mean(list(first.values())) if isinstance(first, dict) else first


# ------------------------------------------------------------------------------------------------
# Running and drawing

def run(experiment, argv, name, draw):
    """Run what is missing of an experiment, write its runs to one file, and draw them."""
    runs = []
    for condition in plan(experiment, argv, name):
        words = experiment.conditions[condition.flags]
        print(f"\n{name}: {words} ({condition.flags})")
        runs += run_condition(experiment.task, condition, words)
    out = FOLDER / re.sub("[^a-zA-Z0-9_.]+", "-", " ".join([name, *argv])).strip("-")
    json_file = out.with_name(f"{out.name}.json")
    picture = out.with_name(f"{out.name}.png")
    write_results(json_file, dict(runs=runs))
    draw(runs, experiment, picture)
    print(f"\n{experiment.question}")
    print_means(runs)
    print(f"saved: {json_file}, {picture}")


def run_condition(task, condition, words):
    """The runs of one condition, a seed each, with what an experiment says of them."""
    line = [*condition.line, "--out", str(condition.folder)]
    if condition.folder.is_dir():
        line.append("--resume")
    try:
        train(task, line)
    except SystemExit as e:
        if e.code == 130:
            print("The same experiment goes on from the last evaluation.", file=sys.stderr)
        raise
    args = condition.args
    runs = []
    for N in dict.fromkeys(args.N):
        for seed in dict.fromkeys(args.seed):
            runs += load_runs(condition.folder / f"N{N}-seed{seed}.json")
    task_flags = {*importlib.import_module(TASKS[task][0]).FLAGS, "L", "device"}
    settings = {flag: getattr(args, flag) for flag in sorted(task_flags)}
    more = dict(flags=condition.flags, label=words, baseline=baseline(task, json.dumps(settings)),
                tflop=flop(runs[0]) / 1e12)
    return [one | more for one in runs]


def print_means(runs):
    """A line a condition: the mean of the seeds of each case, and their range."""
    metric = next(iter(runs[0]["chance"]))
    for label, group in by_label(runs).items():
        texts = []
        for case in cases(runs[0]["chance"], metric):
            values = [pick(run, metric, case) for run in group]
            texts.append(f"{case_words(group[0]['task'], case)} {mean(values):.3f} "
                         f"({min(values):.3f} to {max(values):.3f})".strip())
        print(f"  {label:50} {group[0]['tflop']:8.3g} TFLOP  {metric} {'; '.join(texts)}")


def redraw(experiment, name, file=None):
    """Draw an experiment's results, those in lab/results if no file is named -> the picture."""
    if file is None and not experiment.results:
        raise sleep.BadInput(f"there are no results of {name} in lab/results: run it first.")
    path = RESULTS / f"{experiment.results}.json" if file is None else Path(file)
    runs = load_runs(path)
    if any("label" not in run or "tflop" not in run or "baseline" not in run for run in runs):
        raise sleep.BadInput(f"{path} holds runs, but no experiment's: draw it with "
                             "lab.tools.draw_runs.")
    runs = in_order(runs, experiment)
    picture = picture_of(path)
    if file is None and experiment.drawn_as:
        picture = PICTURES / f"{experiment.drawn_as}.png"
    getattr(plots, experiment.picture)(runs, experiment, picture)
    return picture


def in_order(runs, experiment):
    """Runs in the order of the conditions; those of another experiment come last."""
    place = {label: i for i, label in enumerate(experiment.conditions.values())}
    return sorted(runs, key=lambda run: place.get(run["label"], len(place)))
