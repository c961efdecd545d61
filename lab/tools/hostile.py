"""Hostile use: random command lines, random calls of the library, and killed runs. Not part of the tests.

    python -m lab.tools.hostile                                         500 lines, 200 calls, 200 kills
    python -m lab.tools.hostile --lines 50 --calls 50 --kills 10 --seed 7

A command line of a script has to end with status 0 and finite results, or with status 2 and one sentence.
A call has to return finite numbers, or raise a ValueError of one sentence. A run that is killed at a random
moment has to go on with --resume to the same numbers as a run that nobody killed, and must not lose a
finished result. Everything else is a fault: it is printed, and the exit status is 1. Needs os.fork.
"""
import contextlib
import importlib
import io
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch

import sleep
from lab.common import parser, program

SCRIPTS = {"train_ca": "Tapes", "train_khop": "Cycles", "train_gsm": "Problems"}
SMALL = ["--steps", "2", "--batch_size", "2", "--d_model", "8", "--n_head", "1"]
GOOD = {                                   # values that often fit; other flags take the preset's
    "N": ["1", "2", "3"], "N_test": ["0", "1", "4"], "seed": ["0", "7", "1000000"], "steps": ["1", "3"],
    "batch_size": ["1", "3"], "L": ["6", "8", "12", "16", "24", "48"], "layout": ["a", "s", "sa", "asas"],
    "d_model": ["4", "8", "16"], "n_head": ["1", "2"], "eviction": ["hard", "sliding"],
    "update_rule": ["delta", "hebbian", "gated_hebbian"], "conv": ["", "a", "s"], "warmup": ["0", "1"],
    "cooldown": ["0", "0.5", "1"], "eval_every": ["1", "2"], "lr_muon": ["1e-3", "0.1"],
    "lr_adamw": ["1e-3"], "device": ["cpu", "auto"], "preset": ["cpu"], "nodes": ["7", "9", "16"],
    "K": ["1", "3", "6"], "queries": ["1", "4"], "n_law": ["all", "law"], "deeper": ["0", "0.5"],
    "t": ["0", "3", "9"], "W": ["8", "16"], "rule": ["30", "90", "255"], "tapes": ["1", "3"],
    "split": ["0", "5"], "reads": ["1", "2", "5"], "questions": ["1", "4"], "p": ["5", "11"],
    "places": ["5", "9"], "animals": ["2", "3"], "T": ["48", "60"]}
NUMBERS = ["0", "1", "2", "3", "-1", "7", "12", "16", "24", "1000000000000", "0.5", "1e-3", "nan", "inf", "x",
           "", "1.0", "٣", "0x10"]
WORDS = ["as", "a", "s", "", "hard", "sliding", "gated_delta", "delta", "hebbian", "law", "all", "mix", "%s",
         "ü", "../x", "None", "true", "cpu", "cuda", "mps", "cuda:9"]
SECONDS = 60                               # a small run that takes longer is a fault


class TooSlow(Exception):
    pass


def in_time(function):
    """function(), or TooSlow."""
    def stop(*_):
        raise TooSlow(f"more than {SECONDS} seconds")
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return function()
    finally:
        signal.alarm(0)


def last_line(error):
    return traceback.format_exception_only(error)[-1].strip()


# ------------------------------------------------------------------------------------------------
# Command lines

def draw_line(rng, flags):
    """One to four random flags with random values, good and bad ones."""
    line = list(SMALL)
    for flag in rng.sample(flags, rng.randint(1, 4)):
        if flag in ("compile", "recompute", "words", "feed"):
            line.append(rng.choice([f"--{flag}", f"--no-{flag}"]))
            continue
        how_many = rng.choice([1, 1, 1, 1, 1, 1, 2, 0])
        pool = GOOD.get(flag, ["1"]) if rng.random() < 0.75 else NUMBERS + WORDS
        values = [rng.choice(pool) for _ in range(how_many)]
        line += [f"--{flag}", *values]
    return line


def run_line(module, Task, line, out):
    """`python module.py line` -> its exit status, and what is wrong with how it ends, or ""."""
    printed = io.StringIO()
    said = io.StringIO()
    status = 0
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            in_time(lambda: sleep.main(module.__doc__, module.PRESETS, module.FLAGS, Task,
                                       [*line, "--out", str(out)]))
    except SystemExit as e:
        status = e.code or 0
    except BaseException as e:
        return status, last_line(e)
    if status == 2:
        sentences = [text for text in said.getvalue().splitlines() if ".py: " in text]
        return status, "" if len(sentences) == 1 and "Traceback" not in said.getvalue() else "no sentence"
    if status != 0:
        return status, f"exit status {status}"
    return status, wrong_results(out)


def wrong_results(out):
    runs = list(out.glob("N*.json"))
    if not runs:
        return "status 0 and no result"
    for path in runs:
        run = json.loads(path.read_text(encoding="utf-8"))
        for metric in run["chance"]:
            values = run[metric].values() if isinstance(run[metric], dict) else [run[metric]]
            if not all(math.isfinite(value) for value in values):
                return f"{metric} is not finite"
    return ""


def try_lines(n, rng, folder):
    faults = []
    ended = {0: 0, 2: 0}
    for i in range(n):
        name = rng.choice(list(SCRIPTS))
        module = importlib.import_module(name)
        Task = getattr(module, SCRIPTS[name])
        flags = {*sleep.FLAGS, *module.FLAGS, "device", "preset", "nonsense"}
        flags = sorted(flags - {"compile"})                    # it would take most of the time
        line = draw_line(rng, flags)
        status, wrong = run_line(module, Task, line, folder / f"line{i}")
        ended[status] = ended.get(status, 0) + 1
        if wrong:
            faults.append(f"{name}.py {' '.join(map(repr, line))}: {wrong}")
    print("exit statuses:", ", ".join(f"{status} {count} times" for status, count in ended.items()))
    return faults


# ------------------------------------------------------------------------------------------------
# Calls

def draw_call(rng):
    """A call of the library with some strange argument, as a function of no arguments."""
    layout = rng.choice(["as", "s", "a", "asas"])
    L = rng.choice([1, 4, 8, np.int64(8)])
    N = rng.choice([1, 2, 3, np.int32(2), None, None, True, -1, 0, 1.0, "2", [1, 2], torch.tensor(2)])
    dtype = rng.choice([torch.long, torch.long, torch.int32, torch.int16, torch.uint8, torch.float32, torch.bool])
    T = rng.choice([1, 8, 8, 9, 9, 16, 0])
    M = rng.choice([1, 1, 2, T, 0, 20])
    wrong_batch = rng.random() < 0.1
    kind = rng.choice(["forward", "forward", "forward", "stream", "sleep", "wake", "rule"])

    def call():
        model = sleep.SleepLM(sleep.Config(5, 16, L, layout=layout, d_model=8, n_head=2,
                                           eviction=rng.choice(["hard", "sliding"])))
        tokens = torch.randint(0, 5, (2, T)).to(dtype)
        if rng.random() < 0.1:
            tokens = rng.choice([tokens.tolist(), tokens.numpy(), tokens + 9, tokens[0]])
        if kind == "forward":
            targets = torch.randint(0, 5, (3 if wrong_batch else 2, M))
            targets[:, ::2] = rng.choice([-1, -100])
            logits, loss = model(tokens, targets.to(rng.choice([torch.long, torch.int16, torch.int32])), N)
            return [logits, loss]
        if kind == "stream":
            return [model.stream(tokens)[0]]
        if kind == "rule":
            q, k, v = torch.randn(3, 2, 2, T, 4)
            gate = torch.randn(2, 2, T)
            S = torch.randn(2, 2, 4, rng.choice([4, 4, 3]))
            return list(sleep.fast_weight_rule_chunked(q, k, v, gate, gate.sigmoid(), S))
        other = sleep.SleepLM(sleep.Config(5, 16, 8, layout=rng.choice(["as", "sa", "s"]), d_model=8, n_head=2))
        memory = rng.choice([model, other]).empty_memory(rng.choice([2, 3]))
        h = rng.choice([tokens, torch.randn(2, T, 8), torch.randn(2, T, 6)])
        if kind == "wake":
            return [model.wake(h, memory)[0]]
        return [S for S in model.sleep(h, memory, N).S if S is not None]

    words = f"{kind} layout {layout} L {L} N {N!r} T {T} M {M} {dtype}"
    return call, words


def try_calls(n, rng):
    faults = []
    refused = 0
    for _ in range(n):
        call, words = draw_call(rng)
        try:
            results = in_time(call)
            if not all(torch.isfinite(x).all() for x in results):
                faults.append(f"{words}: not finite")
        except ValueError as e:
            refused += 1
            if len(str(e).strip().splitlines()) != 1:
                faults.append(f"{words}: {str(e)!r} is no sentence")
        except Exception as e:
            faults.append(f"{words}: {last_line(e)}")
    print(f"{refused} calls refused, {n - refused} answered")
    return faults


# ------------------------------------------------------------------------------------------------
# Kills

KILLED = ["--N", "1", "2", "--steps", "12", "--eval_every", "3", "--batch_size", "4", "--d_model", "16"]


def child(argv):
    """Run train_khop.py in a child process -> its number. It prints nothing."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        import train_khop
        sleep.main(train_khop.__doc__, train_khop.PRESETS, train_khop.FLAGS, train_khop.Cycles, argv)
        status = 0
    except SystemExit as e:
        status = e.code or 0
    finally:
        os._exit(status)


def results_of(out):
    """All that a run writes but its seconds."""
    results = {}
    for path in sorted(out.glob("N*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        results[path.name] = {key: value for key, value in run.items() if key != "seconds"}
    return results


def try_kills(n, rng, folder):
    faults = []
    undisturbed = folder / "undisturbed"
    start = time.monotonic()
    os.waitpid(child([*KILLED, "--out", str(undisturbed)]), 0)
    seconds = time.monotonic() - start
    expected = results_of(undisturbed)
    for i in range(n):
        out = folder / f"kill{i}"
        how = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        finished = {}
        for _ in range(rng.choice([1, 1, 2])):                 # killed once or twice
            resume = ["--resume"] if out.is_dir() else []
            pid = child([*KILLED, "--out", str(out), *resume])
            time.sleep(rng.uniform(0, seconds))
            os.kill(pid, how)
            os.waitpid(pid, 0)
            now = results_of(out)
            lost = [name for name, run in finished.items() if run["steps"] > now.get(name, run)["steps"]]
            if lost:
                faults.append(f"kill {i} ({how.name}): {lost} went back")
            finished = now
        resume = ["--resume"] if out.is_dir() else []
        _, status = os.waitpid(child([*KILLED, "--out", str(out), *resume]), 0)
        if os.waitstatus_to_exitcode(status) != 0:
            faults.append(f"kill {i} ({how.name}): the resumed run ends with {os.waitstatus_to_exitcode(status)}")
        elif results_of(out) != expected:
            faults.append(f"kill {i} ({how.name}): other numbers than the undisturbed run")
    return faults


@program
def main(argv):
    p = parser(__doc__)
    p.add_argument("--lines", type=int, default=500)
    p.add_argument("--calls", type=int, default=200)
    p.add_argument("--kills", type=int, default=200)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    if not hasattr(os, "fork"):
        raise sleep.BadInput("this needs os.fork, which Windows lacks.")
    if min(args.lines, args.calls, args.kills) < 0:
        raise sleep.BadInput("--lines, --calls and --kills must not be negative.")
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)               # a fork keeps no other thread
    warnings.simplefilter("ignore")
    faults = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for words, attempt in (("calls", lambda: try_calls(args.calls, rng)),
                               ("command lines", lambda: try_lines(args.lines, rng, folder)),
                               ("kills", lambda: try_kills(args.kills, rng, folder))):
            start = time.monotonic()
            found = attempt()
            faults += found
            print(f"{words}: {len(found)} faults, {time.monotonic() - start:.0f} s", flush=True)
            for fault in found:
                print(f"  {fault}", flush=True)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
