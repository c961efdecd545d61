"""What the programs of lab/ share: their command lines, and the files and words of results.

A file of results is {"runs": [...]}, with one run a line, so that a diff shows a run.
"""
import argparse
import errno
import functools
import json
import os
import re
import sys
from pathlib import Path

import sleep

LAB = Path(__file__).resolve().parent
RESULTS = LAB / "results"
PICTURES = LAB / "pictures"

TASK_WORDS = {                             # a task, and one case of it, in words
    "ca": ("Cellular automaton", ""),
    "khop": ("Hops along a shuffled cycle", "hop"),
    "hops": ("Hops along a shuffled cycle", "hop"),
    "trees": ("Roots of three trees", "edge"),
    "swaps": ("Swaps of four items", ""),
    "gsm": ("Word problems", "read"),
    "facts": ("Facts in plain English", "read"),
    "recall": ("Recall of the first token", ""),
}
SETTING_WORDS = {                          # settings that a title names
    "ca": {"rule": "rule {}", "t": "steps asked for: {}", "W": "{} cells"},
    "khop": {"nodes": "{} nodes"},
    "hops": {"nodes": "{} nodes", "k_law": "law of k: {}"},
    "trees": {"size": "{} nodes each", "depth": "trained up to depth {}"},
    "gsm": {"p": "numbers modulo {}", "reads": "chains of up to {} reads"},
}
MODEL_WORDS = {"layout": "blocks '{}'", "d_model": "width {}", "L": "window of {} tokens"}
METRIC_WORDS = {
    "places": "places: share of them right",
    "all": "all: all four places right",
    "exact": "exact: every bit right",
    "bit": "bit: share of bits right",
    "accuracy": "accuracy: share of answers right",
    "loss": "loss: cross entropy in nats",
}


# ------------------------------------------------------------------------------------------------
# Command lines

def parser(doc):
    """An argparse parser that says in one sentence what is wrong, with exit status 2."""
    p = argparse.ArgumentParser(description=(doc or "").replace("%", "%%"), allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda sentence: p.exit(2, f"{p.prog}: {sentence}\n")
    return p


def program(main):
    """Decorator of main(argv): bad input is a sentence and status 2; `| head` ends it quietly."""

    @functools.wraps(main)
    def run(argv=None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # letters that a console lacks
        try:
            main(sys.argv[1:] if argv is None else argv)
            if sys.stdout is not None:
                sys.stdout.flush()
        except sleep.BadInput as e:
            path = Path(sys.argv[0])
            name = path.parent.name if path.name == "__main__.py" else path.name
            print(f"{name}: {e}", file=sys.stderr)
            sys.exit(2)
        except OSError as e:
            if e.errno not in (errno.EPIPE, errno.ENOSPC):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if e.errno == errno.ENOSPC:
                sys.exit("the disk to which this prints is full.")
        except KeyboardInterrupt:
            sys.exit(130)

    return run


def check_output(path, suffix):
    """BadInput if `path` lacks the suffix or cannot be written: before anything is measured."""
    path = Path(path)
    if path.suffix != suffix:
        raise sleep.BadInput(f"--out {path}: take a name that ends in {suffix}.")
    if path.is_dir():
        raise sleep.BadInput(f"--out {path} is a folder: name a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f"{path.name}.tmp")
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise sleep.BadInput(f"--out {path} cannot be written ({e.strerror}).") from None


def picture_of(path):
    """Where the picture of a file of results belongs: beside it; of lab/results in lab/pictures."""
    picture = Path(path).with_suffix(".png")
    return PICTURES / picture.name if picture.parent.resolve() == RESULTS else picture


# ------------------------------------------------------------------------------------------------
# Files of results

def write_results(path, results):
    """Write a dict as json: one element of a list a line, numbers with four digits."""
    sleep.write_text(Path(path), to_json(rounded(results)))


def rounded(x):
    """x with every float in it rounded to four significant digits."""
    if isinstance(x, float):
        return float(f"{x:.4g}")
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(value) for value in x]
    return x


def to_json(results):
    """A dict as json: a line a key, and where lists of dicts stand, a line an element."""
    parts = []
    for key, value in results.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines = [json.dumps(element) for element in value]
            text = "[\n " + ",\n ".join(lines) + "\n]"
        else:
            text = json.dumps(value)
        parts.append(f"{json.dumps(key)}: {text}")
    return "{" + ",\n".join(parts) + "}\n"


def read_results(path):
    """A file of results -> a dict. BadInput if it cannot be read."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise sleep.BadInput(f"{path} cannot be opened ({e.strerror}).") from None
    except ValueError as e:
        raise sleep.BadInput(f"{path} is no json ({type(e).__name__}).") from None
    if not isinstance(results, dict):
        raise sleep.BadInput(f"{path} holds no results: its json is a {type(results).__name__}.")
    return results


def load_runs(path):
    """The runs of a folder, or of a file with one run or {"runs": [...]}; BadInput if broken."""
    path = Path(path)
    if path.is_dir():
        files = [file for file in path.iterdir() if re.fullmatch(r"N\d+-seed\d+\.json", file.name)]
        runs = [run for file in files for run in load_runs(file)]
    else:
        results = read_results(path)
        runs = results.get("runs", [results])
        if not isinstance(runs, list) or not all(is_run(run) for run in runs):
            raise sleep.BadInput(f"{path} cannot be read as runs: a task, N, a seed, settings, "
                                 "chance or a curve with tokens is missing.")
    if not runs:
        raise sleep.BadInput(f"there are no runs in {path}: none has come to its first evaluation.")
    return sorted(runs, key=lambda run: (run["N"], run["seed"]))


def is_run(run):
    """Does this have what the programs of lab/ need of a run?"""
    kinds = {"task": str, "N": int, "seed": int, "chance": dict, "settings": dict, "curve": list}
    if not isinstance(run, dict):
        return False
    if not all(isinstance(run.get(key), kind) for key, kind in kinds.items()):
        return False
    points = run["curve"]
    return (len(points) > 0 and len(run["chance"]) > 0
            and all(isinstance(point, dict) for point in points)
            and all(isinstance(point.get("tokens"), (int, float)) for point in points))


def load_all(paths):
    """The runs of all paths, each once; BadInput if they are not of one task."""
    runs = []
    for path in paths:
        for run in load_runs(path):
            if run not in runs:
                runs.append(run)
    tasks = sorted({run["task"] for run in runs})
    if len(tasks) > 1:
        raise sleep.BadInput(f"these are runs of several tasks ({', '.join(tasks)}): draw each "
                             "task for itself.")
    return runs


# ------------------------------------------------------------------------------------------------
# Metrics: {metric: a number, or {case: number}}

def cases(metrics, metric):
    """The cases of a metric, or [None] if it is one number."""
    value = metrics[metric]
    return list(value) if isinstance(value, dict) else [None]


def pick(metrics, metric, case):
    """One number of a run, of a point of its curve or of its chance; nan if it is not there."""
    value = metrics.get(metric)
    if isinstance(value, dict):
        value = value.get(case)
    return value if isinstance(value, (int, float)) else float("nan")


def mean(values):
    return sum(values) / len(values)


def by_label(runs):
    """{a condition in words: its runs}"""
    groups = {}
    for run in runs:
        groups.setdefault(run["label"], []).append(run)
    return groups


# ------------------------------------------------------------------------------------------------
# Words

def case_words(task, case):
    """"3 hops"; "" if there are no cases."""
    if case is None:
        return ""
    word = TASK_WORDS.get(task, (task, "case"))[1]
    plural = "" if case == "1" else "s"
    return f"{case} {word}{plural}"


def title(runs):
    """The task in words, then the model, as far as all runs have them in common."""
    task = runs[0]["task"]
    name = TASK_WORDS.get(task, (task, ""))[0]
    seeds = sorted({run["seed"] for run in runs})
    of_task = in_common(runs, SETTING_WORDS.get(task, {}))
    of_model = in_common(runs, MODEL_WORDS)
    of_model.append(f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}")
    first = f"{name}: {', '.join(of_task)}" if of_task else name
    return f"{first}\n{', '.join(of_model)}"


def in_common(runs, words):
    """The settings among `words`, {setting: text}, that all runs have in common, as texts."""
    texts = []
    for setting, text in words.items():
        values = [run["settings"].get(setting) for run in runs]
        if values[0] is not None and values.count(values[0]) == len(values):
            texts.append(text.format(values[0]))
    return texts
