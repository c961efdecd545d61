"""What readers of the paper ask: a few models each, on equal terms.

    python -m lab.experiments                            the list of experiments
    python -m lab.experiments iterated --seed 0 1 2      run one; further flags are for all its runs
    python -m lab.experiments other_N --any_N --help     all flags; these nine are of this file:

    --carry hS, h or S   what a pass of a sleep hands to the next; without S the last pass writes it
    --think n            passes over an answer window
    --detach n           gradients pass through the last n passes of a sleep only, and skip the rest;
                         with --every_pass through the last n before each loss, and end there
    --recall             before every pass but the first, h <- rms_norm(h) + embeddings
    --guess              before every pass but the first, h <- h + the embedding of what it would say
    --every_pass         train on the answers after every pass n of the last sleep, with weight n
    --parallel           attention and fast weights side by side in every block (layout a, aa, ...)
    --any_N              draw N anew for every training step, from 1 to --N
    --grow_N x           let N grow from 1 to --N over the first share x of the training

Runs are kept in out/experiments/ and shared: what one experiment has finished, no other one runs
again. An experiment's file NAME-FLAGS.json holds its runs, and their cost in TFLOP; NAME-FLAGS.png
shows them. The preset is cpu, if no flag says otherwise.
"""
import importlib
import json
import math
import random
import re
import shlex
import sys
import tempfile
from argparse import Namespace
from contextlib import redirect_stdout
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, ScalarFormatter

import sleep
from lab import baselines
from lab.benchmark import count_flop
from lab.plot import (METRICS, TASKS, case_words, figure, legend, load_runs, panels, pick,
                      save_figure, title)

FOLDER = Path("out/experiments")
MODULES = dict(ca=("train_ca", "Tapes"), khop=("train_khop", "Cycles"),
               gsm=("train_gsm", "Problems"), forest=("lab.forest", "Forests"))
OWN = dict(carry="hS", think=1, detach=0, recall=False, guess=False, every_pass=False,
           parallel=False, any_N=False, grow_N=0.0)
HELP = dict(carry="what a pass of a sleep hands to the next: hS, h or S",
            think="passes over an answer window",
            detach="gradients pass through the last so many passes of a sleep only; 0: through all",
            recall="before every pass but the first, h <- rms_norm(h) + embeddings",
            guess="before every pass but the first, h <- h + the embedding of what it would say",
            every_pass="train on the answers after every pass n of the last sleep, with weight n",
            parallel="attention and fast weights side by side in every block, as in Hymba",
            any_N="draw N anew for every training step, from 1 to --N",
            grow_N="first share of the steps, in which N grows from 1 to --N")


class Row(NamedTuple):
    """An experiment."""
    task: str              # one of MODULES
    question: str
    conditions: dict       # {flags: the same in words}
    picture: str = "bars"  # one of PICTURES, at the end of this file
    N_test: tuple = ()     # test with these N, too


ONE_OR_THREE = {"--N 1": "1 pass", "--N 3": "3 passes"}


def times(kinds, costs):
    """Every kind with every cost: the product of two tables of conditions."""
    return {f"{a} {b}".strip(): f"{x}, {y}" for a, x in kinds.items() for b, y in costs.items()}


EXPERIMENTS = {
    "staircase": Row("khop", "Does a pass buy a hop?", {
        f"--N {N}": f"trained with N = {N}" for N in (1, 2, 3, 4)}, "heat", (1, 2, 3, 4, 5, 6)),
    "depth": Row("khop", "What does the same compute buy?", {
        **{f"--N {N} --seed 0 1 2 3 4": f"N = {N}" for N in (1, 2, 3, 4)},
        **{f"--N {N} --steps 3600 --seed 0 1 2": f"N = {N}, 3 x tokens" for N in (1, 2, 3, 4)},
        "--N 1 --steps 2600 --seed 0 1 2": "N = 1, 2.2 x tokens",
        "--N 1 --steps 12000 --seed 0 1": "N = 1, 10 x tokens",
        "--N 1 --n_head 2 --seed 0 1 2": "N = 1 with 2 heads",
        "--N 1 --batch_size 16 --steps 10400 --eval_every 400 --seed 0 1 2": "N = 1 in batches of 16",
        "--N 1 --layout asasas --seed 0 1 2": "N = 1 and three times as deep",
        "--N 1 --d_model 112 --seed 0 1 2": "N = 1 and wider",
        "--N 1 --think 3 --seed 0 1 2": "N = 1 and 3 passes over the answers"}, "tflop"),
    "windows": Row("khop", "And if the edges fill two windows?", {
        "--N 3": "one window, 3 passes", "--N 1 --steps 2600": "one window, 1 pass",
        "--N 3 --L 12": "two windows, 3 passes", "--N 1 --L 12 --steps 2600": "two windows, 1 pass"}),
    "iterated": Row("khop", "What is iterated: h, S, or both?", {
        "--N 3": "3 passes hand on h and S",
        "--N 3 --carry h": "3 passes hand on h, the last one writes S",
        "--N 3 --carry S": "3 passes hand on S, each reads the embeddings",
        "--N 1": "1 pass"}),
    "rule": Row("khop", "Does the fast-weight rule matter?", times({
        "--update_rule hebbian": "Hebbian", "--update_rule gated_hebbian": "gated Hebbian (Eq. 3)",
        "--update_rule delta": "delta", "": "gated delta"}, ONE_OR_THREE)),
    "conv": Row("khop", "What does the short convolution do?", times({
        "--conv ''": "none", "--conv a": "before attention", "--conv s": "before the SSM (paper)",
        "": "before both"}, ONE_OR_THREE)),
    "gradient": Row("khop", "Does the gradient have to reach all passes?", {
        "--N 3": "3 passes", "--N 3 --detach 2": "3 passes, gradient through the last 2",
        "--N 3 --detach 1": "3 passes, gradient through the last one",
        "--N 3 --detach 1 --recall --every_pass": "the same with recall, and a loss after each pass",
        "--N 1": "1 pass"}),
    "span": Row("khop", "Is one block enough to loop?", {
        "--N 3": "3 passes through both blocks", "--N 3 --loop 1 2": "3 passes, SSM block only",
        "--N 3 --loop 0 1": "3 passes, attention block only", "--N 1": "1 pass"}),
    "other_N": Row("khop", "What if N is another one at the test?", {
        "--N 4": "trained with N = 4", "--N 4 --any_N": "trained with N drawn from 1 to 4"},
        "lines", (1, 2, 3, 4, 6, 8, 12, 16)),
    "levers": Row("khop", "What helps a sleep of three passes, at the compute of the preset?", {
        "--N 3": "the preset", "--N 3 --grow_N 0.6 --steps 1575": "N grows",
        "--N 3 --recall": "recall and an outer norm", "--N 3 --guess --steps 1185": "the guess fed back",
        "--N 3 --every_pass --steps 780": "a loss after each pass",
        "--N 3 --every_pass --recall --grow_N 0.6 --steps 1130": "all but the guess"},
        "bars", (3, 4, 6, 8)),
    "layouts": Row("khop", "Which hybrid, with and without sleep, at the same compute?", {
        f"--N {N} {flags} --steps {steps}": f"{words}, {N} pass{'es' * (N > 1)}"
        for flags, words, *costs in (
            ("--layout aa --eviction sliding", "transformer, sliding window", 2900, 1380),
            ("--layout as --eviction sliding", "in turn, sliding window (Samba)", 2570, 1190),
            ("--layout aa --parallel --eviction sliding", "side by side, sliding window (Hymba)", 1710, 800),
            ("--layout aa --parallel", "side by side, hard eviction", 1775, 815),
            ("--layout ss", "SSM only, hard eviction", 2250, 1040),
            ("--layout as", "in turn, hard eviction (the preset)", 2600, 1200),
            ("--layout aa --eviction sliding --L 48", "transformer, nothing evicted", 1975),
            ("--layout as --eviction sliding --L 48", "in turn, nothing evicted", 1725))
        for N, steps in zip((1, 3), costs)} | {
        "--N 3 --layout as --eviction sliding --warmup 300 --steps 1190":
            "in turn, sliding window, attention frozen at first, 3 passes"}),
    "roots": Row("forest", "Asleep for longer than in training: deeper answers?", {
        "--N 4": "trained with N = 4"}, "heat", (1, 2, 3, 4, 6, 8, 12, 16)),
    "roots_levers": Row("forest", "What does a longer sleep need, to answer deeper?", {
        "--N 4 --seed 0 1 2": "Algorithm 1",
        "--N 4 --recall --every_pass --grow_N 0.4 --seed 0 1 2": "recall, a loss a pass, growing N",
        "--N 4 --recall --grow_N 0.4 --seed 0": "recall, growing N",
        "--N 4 --every_pass --grow_N 0.4 --seed 0": "a loss a pass, growing N"},
        "heat", (1, 2, 3, 4, 6, 8, 12, 16)),
    "roots_N": Row("forest", "How many passes of training teach a step that can be repeated?", {
        **{f"--N {N}": f"trained with N = {N}" for N in (1, 2, 3, 4)},
        "--N 4 --any_N": "trained with N drawn from 1 to 4"},
        "heat", (1, 2, 3, 4, 6, 8, 12, 16)),
    "gsm_compute": Row("gsm", "Word problems: what is left at the same compute?", {
        "--N 1": "1 pass", "--N 1 --steps 4340": "1 pass, 4,340 steps", "--N 3": "3 passes"}),
    "ca_splits": Row("ca", "Do three passes learn more of Rule 110?", times(
        {f"--split {x} --seed {x}": f"split and seed {x}" for x in (0, 1, 2)},
        {"--N 1": "1 pass", "--N 1 --lr_muon 0.014 --lr_adamw 0.006": "1 pass, rates of its own",
         "--N 3": "3 passes"})),
    "ca_long": Row("ca", "Does a gap survive convergence, at 8 steps of the rule?", {
        "--t 8 --steps 6000 --N 1": "1 pass, 6,000 steps",
        "--t 8 --steps 2000 --N 3": "3 passes, 2,000 steps"}),
}


# ------------------------------------------------------------------------------------------------
# Algorithm 1 with one thing changed

class SideBySide(sleep.Block):
    """Attention and fast weights read the same tokens; their outputs are normed and averaged (Hymba)."""

    def __init__(self, cfg):
        super().__init__("a", cfg)
        self.fast = sleep.UPDATE_RULES[cfg.update_rule](cfg)
        self.norm_a, self.norm_s = (torch.nn.RMSNorm(cfg.d_model) for _ in range(2))

    def forward(self, h, S, cache):
        tail, *kv = cache
        x = self.norm1(h)
        if self.conv is not None:
            x, tail = self.conv(x, tail)
        a, *kv = self.mixer(x, *kv)
        s, S = self.fast(x, S)
        h = h + (self.norm_a(a) + self.norm_s(s)) / 2
        h = h + self.down(F.relu(self.up(self.norm2(h))).square())
        return h, S, (tail, *kv)


class SideBySideLM(sleep.SleepLM):
    """Every block is SideBySide."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.blocks = torch.nn.ModuleList(SideBySide(cfg) for _ in cfg.layout)
        for m in self.blocks.modules():    # as in SleepLM
            if isinstance(m, torch.nn.Linear):
                torch.nn.init.normal_(m.weight, std=m.in_features ** -0.5)
            elif isinstance(m, sleep.ShortConv):
                torch.nn.init.normal_(m.weight, std=0.5)

    def empty_memory(self, B):
        cfg, K = self.cfg, self.cfg.d_model // self.cfg.n_head
        S = [self.embed.weight.new_zeros(B, cfg.n_head, K, K) for _ in cfg.layout]
        return super().empty_memory(B)._replace(S=S)


class Changed(sleep.SleepLM):
    """A SleepLM with what the flags of this file change; hard eviction, all blocks looped."""

    def __init__(self, cfg, carry, think, detach, recall, guess, every_pass):
        super().__init__(cfg)
        self.carry, self.think, self.detach = carry, think, detach
        self.recall, self.guess, self.every_pass = recall, guess, every_pass

    def sleep(self, h, memory, N=None):
        return self.after_each_pass(h, memory, self.cfg.N if N is None else N)[-1]

    def after_each_pass(self, h, memory, N):
        """What is left if the model is woken after 0, 1, ..., N passes over a window."""
        self.check(h, memory, asleep=True)
        start, S, after = h, memory.S, [self.evict(memory)]
        cut = self.detach and {N - self.detach}                # before these passes, from 0
        skip = lambda now, then: None if now is None else now.detach() + then - then.detach()
        if self.detach and self.every_pass:                    # as in the literature: segments
            cut = range(N % self.detach, N, self.detach)
            skip = lambda now, then: None if now is None else now.detach()
        for n in range(N):
            if self.detach and n and n in cut:                 # numbers of now, gradients of then
                h, S = skip(h, start), [skip(*pair) for pair in zip(S, memory.S)]
            if self.recall and n:
                h = F.rms_norm(h, h.shape[-1:]) + start
            if self.guess and n:
                h = h + self.head(self.norm(h)).softmax(-1) @ self.embed.weight
            refined, written, _ = self.one_pass(h, S, memory.cache, 0, len(self.blocks))
            h = refined if "h" in self.carry else h
            S = written if "S" in self.carry else S
            after.append(self.evict(sleep.Memory(written, memory.cache, 0)))
        return after

    def wake(self, h, memory):
        self.check(h, memory)
        awake = memory.awake + h.shape[1]
        for _ in range(self.think):        # from the S before the window: a later S saw labels
            h, S, cache = self.one_pass(h, memory.S, memory.cache, 0, len(self.blocks))
        return self.head(self.norm(h)), sleep.Memory(S, cache, awake)

    def forward(self, tokens, targets, N=None, silent=None):
        N, (B, M), L = self.cfg.N if N is None else N, targets.shape, self.cfg.L
        if not (self.every_pass and torch.is_grad_enabled()):
            return super().forward(tokens, targets, N, silent)
        T, memories = tokens.shape[1], [self.empty_memory(B)] * N
        silent, logits = [True] * (T - M) + (silent or (targets < 0).all(0).tolist()), []
        for i, window in enumerate(tokens.split(L, 1)):        # as in SleepLM, for N memories
            h, out = self.embed(window), self.head.weight.new_zeros(N, *window.shape, len(self.head.weight))
            if all(silent[i * L:(i + 1) * L]):
                memories = self.after_each_pass(h, memories[-1], N)[1:]
            else:
                woken = [self.wake(h, memory) for memory in memories]
                out = torch.stack([said for said, _ in woken])
                memories = [self.evict(memory) for _, memory in woken]
            logits.append(out)
        logits = torch.cat(logits, 2)[:, :, -M:]               # (N, B, M, vocab)
        losses = [F.cross_entropy(x.flatten(0, 1), targets.flatten(), ignore_index=-1) for x in logits]
        return logits[-1], sum(n * loss for n, loss in enumerate(losses, 1)) * 2 / (N * (N + 1))

    def stream(self, tokens, state=None):
        raise ValueError("a changed model does not stream: its sleep begins with a whole window.")


def changed(Task):
    """The class of a task that knows the flags of this file, too."""
    class ChangedTask(Task):
        def __init__(self, args, seed):
            super().__init__(args, seed)
            change = {flag: getattr(args, flag) for flag in OWN
                      if flag not in ("parallel", "any_N", "grow_N")}
            said = " ".join(f"--{flag} {value}" for flag, value in change.items())
            if args.carry not in ("hS", "h", "S") or args.think < 1 or args.detach < 0:
                raise sleep.BadInput(f"{said}: --carry is hS, h or S, --think at least 1, and "
                                     "--detach not negative.")
            if args.detach and args.detach >= min(args.N):
                raise sleep.BadInput(f"--detach {args.detach} must be fewer passes than --N "
                                     f"{min(args.N)}: it would change nothing.")
            if args.carry == "S" and (args.recall or args.guess):
                raise sleep.BadInput("--carry S hands on no h: leave out --recall and --guess.")
            if any(change[flag] != OWN[flag] for flag in change):
                if args.eviction != "hard" or tuple(args.loop) not in ((), (0, len(args.layout))):
                    raise sleep.BadInput(f"{said}: these take hard eviction and all blocks looped.")
                self.model = partial(Changed, **change)
            if args.parallel:
                if {*args.layout} != {"a"} or hasattr(self, "model") or args.warmup or "a" not in args.conv:
                    raise sleep.BadInput(f"--parallel --layout {args.layout}: every block has both mixers. Take a "
                                         "layout of a only, and no --warmup, --conv s or other change of the model.")
                self.model = SideBySideLM
            if not 0 <= args.grow_N <= 1 or (args.grow_N and args.any_N):
                raise sleep.BadInput(f"--grow_N {args.grow_N} must be a share of the steps, from 0 to 1, "
                                     "and not come with --any_N.")
            growing = args.grow_N * args.steps
            if args.any_N:
                self.draw_N = lambda step, N: random.Random(f"N {seed} {step}").randint(1, N)
            elif growing:                  # arXiv 2511.07384: slowly at first
                self.draw_N = lambda step, N: max(1, math.ceil(
                    N * (1 - math.sqrt(1 - min(1, step / growing)))))
    return ChangedTask


def load_task(name):
    """Docstring, presets, flags and class of a task, with the flags of this file."""
    module, Task = MODULES[name]
    module = importlib.import_module(module)
    presets = {preset: OWN | values for preset, values in module.PRESETS.items()}
    return module.__doc__, presets, module.FLAGS | HELP, changed(getattr(module, Task))


def flop(run, steps=None):
    """FLOP of the training of a run, or of its first `steps` steps; rebuilt from its settings.

    A hundred steps are counted, one sequence of their batch, on the CPU. Of the word problems only a
    few are made.
    """
    *_, Task = load_task(run["task"])
    with tempfile.TemporaryDirectory() as data, redirect_stdout(None):
        s = sleep.DEFAULTS | OWN | run["settings"]
        few = dict(N=[s["N"]], device="cpu", batch_size=1, data=data, problems=len(s.get("T", [])))
        task = Task(Namespace(**s | few), s["seed"])
        cfg = sleep.Config(task.vocab_size, task.T, **{k: s[k] for k in sleep.MODEL_FLAGS})
        model, draw_N = getattr(task, "model", sleep.SleepLM)(cfg), getattr(task, "draw_N", None)
        steps = s["steps"] if steps is None else steps
        sample = range(0, steps, max(1, steps // 100))
        batches = [(task.make_batch(step), draw_N(step, cfg.N) if draw_N else cfg.N) for step in sample]
    costs = {}                             # steps of the same shape cost the same
    for (tokens, targets, *_), N in batches:
        shape = tokens.shape, N
        costs[shape] = costs.get(shape) or count_flop(model, tokens, targets, N)
    mean = sum(costs[batch[0].shape, N] for batch, N in batches) / len(batches)
    return s["batch_size"] * steps * mean


# ------------------------------------------------------------------------------------------------
# Running

def folder(task, args, default):
    """Where the runs of a condition are kept: named by all that is not as in the preset."""
    but = {"N", "seed", "N_test", "preset", "compile", "recompute", "data", "out", "resume"}
    words = [task] + [args.preset] * (args.preset != "cpu")
    for flag, value in sorted(vars(args).items()):
        if flag not in but and value != getattr(default, flag):
            value = "-".join(map(str, value)) if isinstance(value, list) else str(value)
            words.append(flag if value == "True" else f"{flag}-{value or 'none'}")
    return FOLDER / "-".join(words)


@cache
def baseline(task, settings):
    """The best that is got without sleep: in words, and its metrics. Of k hops and roots it is a guess.

    settings: (flag, value as json) of the task.
    """
    module, Task = MODULES[task]
    settings = {flag: json.loads(value) for flag, value in settings}
    task = getattr(importlib.import_module(module), Task)(Namespace(batch_size=1, steps=1, **settings), 0)
    if task.name in ("khop", "forest"):
        return dict(words="constant guess" if task.name == "khop" else "one of the roots", **task.chance)
    if task.name == "ca":
        found = baselines.ca(task) if task.W <= 20 else {"constant guess": task.chance}
    else:                                  # (the readers of sentences know what is to be learned)
        found = {x: y for x, y in baselines.gsm(task).items() if "reader" not in x}
    def mean(metrics):
        first = next(iter(metrics.values()))
        return sum(first.values()) / len(first) if isinstance(first, dict) else first
    words = max(found, key=lambda x: mean(found[x]))
    return dict(words=f"best without sleep: {words}", **found[words])


def plan(row, argv, name):
    """(condition, args, command line, folder) of each; BadInput before anything is trained."""
    tests = ["--N_test", *map(str, row.N_test)] if row.N_test else []
    own = {"--out", "--resume", *tests[:1], *re.findall(r"--\w+", " ".join(row.conditions))}
    if taken := own & {flag.split("=")[0] for flag in argv}:
        raise sleep.BadInput(f"{name} takes no {' '.join(sorted(taken))}: it sets that itself.")
    doc, presets, flags, Task = load_task(row.task)
    todo = []
    for condition in row.conditions:
        line = ["--preset", "cpu", *argv, *shlex.split(condition), *tests]
        args = sleep.parse(doc, presets, flags, line)[1]
        default = sleep.parse(doc, presets, flags, ["--preset", args.preset])[1]
        sleep.plan(args, Task)
        todo.append((condition, args, line, folder(row.task, args, default)))
    return todo


def run(row, argv, name, draw):
    """Run what is missing of an experiment, write its runs to one file, and draw them."""
    todo, runs = plan(row, argv, name), []
    doc, presets, flags, Task = load_task(row.task)
    for condition, args, line, out in todo:
        print(f"\n{name}: {row.conditions[condition]} ({condition})")
        try:
            sleep.main(doc, presets, flags, Task, [*line, "--out", str(out), "--resume"])
        except SystemExit as e:
            if not isinstance(e.code, str):                    # the sentence is on the screen
                raise
            sys.exit("stopped. The same command goes on from the last evaluation."
                     if e.code.startswith("stopped") else f"{e.code} (In {out}.)")
        group = [load_runs(out / f"N{N}-seed{seed}.json")[0] for N in dict.fromkeys(args.N)
                 for seed in dict.fromkeys(args.seed)]
        task_flags = {*importlib.import_module(MODULES[row.task][0]).FLAGS, "L", "device"}
        of_task = tuple((flag, json.dumps(getattr(args, flag))) for flag in sorted(task_flags))
        more = dict(flags=condition, label=row.conditions[condition], baseline=baseline(row.task, of_task),
                    tflop=flop(group[0]) / 1e12)
        runs += [one | more for one in group]
    out = FOLDER / re.sub("[^a-zA-Z0-9_.]+", "-", " ".join([name, *argv])).strip("-")
    json_file, png = (out.with_name(out.name + end) for end in (".json", ".png"))
    sleep.write(json_file, lambda p: p.write_text(json.dumps(dict(runs=runs), indent=1)))
    draw(runs, row, png)
    print(f"\n{row.question}")
    metric = next(iter(runs[0]["chance"]))
    for label, group in by_label(runs).items():
        means = [f"{case_words(row.task, case)} {sum(v) / len(v):.3f} "
                 f"({min(v):.3f} to {max(v):.3f})" for case in cases(runs[0], metric)
                 for v in [[pick(run, metric, case) for run in group]]]
        print(f"  {label:50} {group[0]['tflop']:8.3g} TFLOP  {metric} {'; '.join(means).strip()}")
    print(f"saved: {json_file}, {png}")


# ------------------------------------------------------------------------------------------------
# Pictures

def by_label(runs):
    """{a condition in words: its runs}"""
    groups = {}
    for run in runs:
        groups.setdefault(run["label"], []).append(run)
    return groups


def fewer_seeds(group, runs):
    """" (seeds 0, 1)", if others of the runs have more seeds than the group, and its label does not say."""
    seeds = sorted({run["seed"] for run in group})
    if len(seeds) == len({run["seed"] for run in runs}) or "seed" in group[0]["label"]:
        return ""
    return f" (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})"


def cases(run, metric):
    """The cases of a metric, or [None] if it is one number."""
    return [case for row in panels({metric: run["chance"][metric]}) for _, case in row]


def plot_conditions(runs, row, path):
    """A bar a condition, a dot a seed; a panel a case."""
    groups, metric = by_label(runs), next(iter(runs[0]["chance"]))
    columns = cases(runs[0], metric)
    fig, axes = figure(1, len(columns), (4.2 + 2.6 * len(columns) + (len(columns) == 1) * 2.0,
                                         1.7 + 0.36 * len(groups)), sharey=True)
    for ax, case in zip(axes[0], columns):
        named = set()
        for i, group in enumerate(groups.values()):
            values = [pick(run, metric, case) for run in group]
            best, more = group[0]["baseline"], group[0]["N"] > 1
            said = "mean, more passes" if more else "mean, 1 pass"
            ax.barh(-i, sum(values) / len(values), color=f"C{int(more)}", alpha=0.4,
                    label=None if said in named else said)
            ax.plot(values, [-i] * len(values), f"C{int(more)}o", ms=4)
            ax.plot([pick(best, metric, case)] * 2, [-i - 0.45, -i + 0.45], "k--", lw=1,
                    label=None if best["words"] in named else best["words"])
            named |= {said, best["words"]}
        ax.set(yticks=range(0, -len(groups), -1), xlim=(0, 1.03))
        ax.set_title(case_words(row.task, case), fontsize=10)
        ax.set_yticklabels([f"{label}{fewer_seeds(group, runs)}  [{group[0]['tflop']:.3g} TFLOP]"
                            for label, group in groups.items()], fontsize=8)
        ax.set_xlabel(METRICS.get(metric, metric) if len(columns) == 1 else
                      METRICS.get(metric, metric).split(":")[0])
    fig.suptitle(f"{row.question}\n{title(runs)}", fontsize=10)
    legend(fig, axes[0, 0], "a dot is a seed, in brackets the cost of training a model")
    save_figure(fig, path)


def plot_other_N(runs, row, path):
    """A line a condition, a dot a seed, against N at the test; a panel a case."""
    groups, metric = by_label(runs), next(iter(runs[0]["chance"]))
    columns, N = cases(runs[0], metric), row.N_test
    fig, axes = figure(1, len(columns), (max(3.2 * len(columns), 7), 4.6), sharey=True)
    for ax, case in zip(axes[0], columns):
        for i, (label, group) in enumerate(groups.items()):
            values = [[pick(run["N_test"][str(n)], metric, case) for run in group] for n in N]
            ax.plot(N, [sum(v) / len(v) for v in values], f"C{i}-", label=label)
            ax.plot(N, values, f"C{i}.", ms=4)
        ax.axhline(pick(runs[0]["chance"], metric, case), color="k", ls="--", lw=1,
                   label="constant guess")
        ax.set(xscale="log", ylim=(0, 1.03), xlabel="N at the test: passes of a sleep")
        ax.set_title(case_words(row.task, case), fontsize=10)
        ax.set_xticks(N, N, minor=False)
        ax.minorticks_off()
    axes[0, 0].set_ylabel(METRICS.get(metric, metric))
    fig.suptitle(f"{row.question}\n{title(runs)}", fontsize=10)
    legend(fig, axes[0, 0], "lines: mean of the seeds; dots: the seeds")
    save_figure(fig, path)


def plot_heat(runs, row, path):
    """A panel a condition: passes at the test downwards, cases to the right; colour and number are the
    mean of the seeds, below it their range where it is wide."""
    groups, metric = by_label(runs), next(iter(runs[0]["chance"]))
    columns = cases(runs[0], metric)
    width = max(2.7, 0.78 * len(columns))
    high = 1 if width * len(groups) < 14 else 2                # panels above each other
    wide = math.ceil(len(groups) / high)
    fig, axes = figure(high, wide, (max(width * wide + 1.4, 5.5), 0.45 * len(row.N_test) * high + 2.0), sharey=True)
    for ax, (label, group) in zip(axes.flat, groups.items()):
        seeds = [[[pick(run["N_test"][str(n)], metric, case) for run in group] for case in columns]
                 for n in row.N_test]
        means = [[sum(v) / len(v) for v in line] for line in seeds]
        image = ax.imshow(means, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for y, values in enumerate(means):
            for x, value in enumerate(values):
                low, high = min(seeds[y][x]), max(seeds[y][x])
                spread = f"\n{low:.2f} to {high:.2f}" * (high - low > 0.1)
                ax.text(x, y, f"{value:.2f}{spread}", ha="center", va="center",
                        fontsize=6.5 if spread else 8, color="w" if value < 0.6 else "k")
        s, last = OWN | group[0]["settings"], row.N_test.index(group[0]["N"])
        trained = s.get("depth", len(columns))                 # the cases and passes of training
        rows = last + 1 if s["every_pass"] or s["any_N"] or s["grow_N"] else 1
        ax.add_patch(Rectangle((-0.5, last + 0.5 - rows), trained, rows, fill=False, ec="r", lw=2,
                               clip_on=False, zorder=3))
        ax.set_xticks(range(len(columns)), columns)
        ax.set_yticks(range(len(row.N_test)), row.N_test)
        ax.set_title(label + fewer_seeds(group, runs), fontsize=10)
        ax.set_xlabel("depth: edges to the root" if row.task == "forest" else TASKS[row.task][1] + "s")
        ax.grid(False)
    for ax in axes.flat[len(groups):]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        ax.set_ylabel("passes of the sleep at the test")
    guess = pick(runs[0]["chance"], metric, columns[0])
    fig.colorbar(image, ax=axes[:, -1], label=f"{METRICS.get(metric, metric)} (guess {guess:.2f})")
    fig.suptitle(f"{row.question}\n{title(runs)}\nmean; range of the seeds if above 0.1; framed: as in training",
                 fontsize=10)
    save_figure(fig, path)


def plot_tflop(runs, row, path):
    """Against the cost of training, a panel a case: a line what comes before a label's comma."""
    groups, metric = by_label(runs), next(iter(runs[0]["chance"]))
    columns, lines = cases(runs[0], metric), {}
    for label, group in groups.items():
        lines.setdefault(label.split(",")[0], []).append(group)
    fig, axes = figure(1, len(columns), (3.0 * len(columns) + 1, 4.6), sharey=True)
    for ax, case in zip(axes[0], columns):
        for i, (label, line) in enumerate(lines.items()):
            line = sorted(line, key=lambda group: group[0]["tflop"])
            values = [[pick(run, metric, case) for run in group] for group in line]
            mark = "o" if len(line) > 1 else "^"
            ax.plot([group[0]["tflop"] for group in line], [sum(v) / len(v) for v in values],
                    f"C{i}{mark}-", ms=6, label=label)
            for group, v in zip(line, values):
                ax.plot([group[0]["tflop"]] * len(v), v, f"C{i}{mark}", ms=3, alpha=0.5)
        ax.axhline(pick(runs[0]["chance"], metric, case), color="k", ls="--", lw=1,
                   label="constant guess")
        ax.set(xscale="log", ylim=(0, 1.03), xlabel="TFLOP of training")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.minorticks_off()
        ax.set_title(case_words(row.task, case), fontsize=10)
    axes[0, 0].set_ylabel(METRICS.get(metric, metric))
    fig.suptitle(f"{row.question}\n{title(runs)}", fontsize=10)
    legend(fig, axes[0, 0], "large: mean of the seeds; small: the seeds")
    save_figure(fig, path)


PICTURES = dict(bars=plot_conditions, lines=plot_other_N, heat=plot_heat, tflop=plot_tflop)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    names = "\n".join(f"  {name:14} {row.question}" for name, row in EXPERIMENTS.items())
    if not argv:
        print(f"python -m lab.experiments NAME [flags for all runs], with NAME one of\n{names}")
    elif argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n{names}")
    elif argv[0] not in EXPERIMENTS:
        print(f"there is no experiment '{argv[0]}'; there are\n{names}", file=sys.stderr)
        sys.exit(2)
    else:
        try:
            row = EXPERIMENTS[argv[0]]
            run(row, argv[1:], argv[0], PICTURES[row.picture])
        except sleep.BadInput as e:
            print(f"experiments.py: {e}", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
