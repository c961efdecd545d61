"""The experiments: what is run. `python -m lab.experiments` lists them."""
import importlib
from typing import NamedTuple

import sleep
from lab.experiments import variants

TASKS = {                                  # name: (module, class)
    "ca": ("train_ca", "Tapes"),
    "khop": ("train_khop", "Cycles"),
    "hops": ("lab.experiments.hops", "Hops"),
    "gsm": ("train_gsm", "Problems"),
    "trees": ("lab.experiments.trees", "Trees"),
}


class Experiment(NamedTuple):
    """One experiment: conditions that are trained on the same task, and a picture of them."""
    task: str                              # one of TASKS
    question: str
    conditions: dict                       # {flags: the same in words}
    picture: str = "bars"                  # a function of plots.py
    N_test: tuple = ()                     # test with these N, too
    results: str = ""                      # its file in lab/results; "": none is kept
    drawn_as: str = ""                     # its picture in lab/pictures; "": named as the results


def product(kinds, costs):
    """{flags: words} of every kind with every cost."""
    conditions = {}
    for kind, kind_words in kinds.items():
        for cost, cost_words in costs.items():
            conditions[f"{kind} {cost}".strip()] = f"{kind_words}, {cost_words}"
    return conditions


ONE_OR_THREE = {"--N 1": "1 pass", "--N 3": "3 passes"}
ONE_TO_FOUR = {
    "--N 1": "trained with N = 1",
    "--N 2": "trained with N = 2",
    "--N 3": "trained with N = 3",
    "--N 4": "trained with N = 4",
}
ALTERNATING = "alternating, hard eviction (the preset)"
SMALL_CYCLE = "--nodes 12 --K 4 --queries 12 --L 24 --d_model 64 --batch_size 64 --steps 1200"
SLOW = "--deeper 0.8 --steps 3000"
RECALL = "--recall --growth doubling --deeper 0.52 --cooldown 0.3 --steps 4600 --eval_every 200"
SIXTEEN = ("--nodes 33 --K 16 --queries 33 --L 66 --growth doubling --deeper 0.82 --steps 5500 "
           "--eval_every 250")
LONG = "--deeper 0.8 --steps 9000 --eval_every 300"
POWERS = "--k_law doubles --growth doubling"
DEEPER_N = (1, 2, 3, 4, 6, 8, 12, 16)

EXPERIMENTS = {
    "main": Experiment(
        "khop", "With more passes of the sleep, more hops are answered", ONE_TO_FOUR,
        picture="as_trained", results="khop-staircase", drawn_as="khop-main"),
    "staircase": Experiment(
        "khop", "Does a pass buy a hop?", ONE_TO_FOUR,
        picture="passes_by_cases", N_test=(1, 2, 3, 4, 5, 6), results="khop-staircase"),
    "depth": Experiment(
        "khop", "What does the same compute buy?", {
            "--N 1 --seed 0 1 2 3 4": "N = 1",
            "--N 2 --seed 0 1 2 3 4": "N = 2",
            "--N 3 --seed 0 1 2 3 4": "N = 3",
            "--N 4 --seed 0 1 2 3 4": "N = 4",
            "--N 1 --steps 3600 --seed 0 1 2": "N = 1, 3 x tokens",
            "--N 2 --steps 3600 --seed 0 1 2": "N = 2, 3 x tokens",
            "--N 3 --steps 3600 --seed 0 1 2": "N = 3, 3 x tokens",
            "--N 4 --steps 3600 --seed 0 1 2": "N = 4, 3 x tokens",
            "--N 1 --steps 2600 --seed 0 1 2": "N = 1, 2.2 x tokens",
            "--N 1 --steps 12000 --seed 0 1": "N = 1, 10 x tokens",
            "--N 1 --n_head 2 --seed 0 1 2": "N = 1 with 2 heads",
            "--N 1 --batch_size 16 --steps 10400 --eval_every 400 --seed 0 1 2":
                "N = 1 in batches of 16",
            "--N 1 --layout asasas --seed 0 1 2": "N = 1 and three times as deep",
            "--N 1 --d_model 112 --seed 0 1 2": "N = 1 and wider",
            "--N 1 --think 3 --seed 0 1 2": "N = 1 and 3 passes over the answers",
        }, picture="compute", results="khop-depth"),
    "windows": Experiment(
        "khop", "And if the edges fill two windows?", {
            "--N 3": "one window, 3 passes",
            "--N 1 --steps 2600": "one window, 1 pass",
            "--N 3 --L 12": "two windows, 3 passes",
            "--N 1 --L 12 --steps 2600": "two windows, 1 pass",
        }, results="khop-windows"),
    "iterated": Experiment(
        "khop", "What is iterated: h, S, or both?", {
            "--N 3": "3 passes hand on h and S",
            "--N 3 --carry h": "3 passes hand on h, the last one writes S",
            "--N 3 --carry S": "3 passes hand on S, each reads the embeddings",
            "--N 1": "1 pass",
        }, results="khop-iterated"),
    "rule": Experiment(
        "khop", "Does the fast-weight rule matter?", product({
            "--update_rule hebbian": "Hebbian",
            "--update_rule gated_hebbian": "gated Hebbian (Eq. 3)",
            "--update_rule delta": "delta",
            "": "gated delta",
        }, ONE_OR_THREE), results="khop-rule"),
    "conv": Experiment(
        "khop", "What does the short convolution do?", product({
            "--conv ''": "none",
            "--conv a": "before attention",
            "--conv s": "before the SSM (paper)",
            "": "before both",
        }, ONE_OR_THREE), results="khop-conv"),
    "gradient": Experiment(
        "khop", "Does the gradient have to reach all passes?", {
            "--N 3": "3 passes",
            "--N 3 --detach 2": "3 passes, gradient through the last 2",
            "--N 3 --detach 1": "3 passes, gradient through the last one",
            "--N 3 --detach 1 --recall --every_pass":
                "the same with recall, and a loss after each pass",
            "--N 1": "1 pass",
        }, results="khop-gradient"),
    "span": Experiment(
        "khop", "Is one block enough to loop?", {
            "--N 3": "3 passes through both blocks",
            "--N 3 --loop 1 2": "3 passes, SSM block only",
            "--N 3 --loop 0 1": "3 passes, attention block only",
            "--N 1": "1 pass",
        }),
    "other_N": Experiment(
        "khop", "What if N is another one at the test?", {
            "--N 4": "trained with N = 4",
            "--N 4 --any_N": "trained with N drawn from 1 to 4",
        }, picture="lines", N_test=DEEPER_N),
    "levers": Experiment(
        "khop", "Which training tricks help three passes, at the compute of the preset?", {
            "--N 3": "the preset",
            "--N 3 --grow_N 0.6 --steps 1575": "N grows",
            "--N 3 --recall": "recall and an outer norm",
            "--N 3 --guess --steps 1185": "the answer so far is fed back",
            "--N 3 --every_pass --steps 780": "a loss after each pass",
            "--N 3 --every_pass --recall --grow_N 0.6 --steps 1130":
                "N grows, recall, a loss after each pass",
        }, N_test=(3, 4, 6, 8), results="khop-levers"),
    "fast_weights": Experiment(
        "khop", "Other fast weights: what is read, and how often is written?", {
            "--N 1 --seed 0": "1 pass",
            "--N 1 --update_rule two_writes --seed 0 1 2": "1 pass, two writes a token",
            "--N 1 --update_rule deep_read --seed 0": "1 pass, eight reads in a row",
            "--N 1 --update_rule read_before --seed 0": "1 pass, reads the S before the pass",
            "--N 1 --update_rule copy --seed 0": "1 pass, a write that copies",
            "--N 3 --seed 0": "3 passes",
            "--N 3 --update_rule copy --seed 0": "3 passes, a write that copies",
            "--N 3 --update_rule read_before --seed 0": "3 passes, read the S before the pass",
            "--N 3 --tell_pass --seed 0": "3 passes, each knows its number",
            "--N 3 --n_head 2 --seed 0": "3 passes, two heads",
        }, results="khop-fast-weights"),
    "k_law": Experiment(
        "hops", "Do questions from a power law teach three passes sooner?", {
            f"{SMALL_CYCLE} --N 3 --seed 0": "all k as frequent, K grows",
            f"{SMALL_CYCLE} --N 3 --k_law power --deeper 0 --seed 0": "k with weight k^-1.5",
        }, results="hops-law"),
    "hops": Experiment(
        "hops", "Twenty nodes, up to eight hops: does a sleep learn to double?", {
            "--N 4": "4 passes, all k",
            "--N 4 --k_law doubles": "4 passes, k = 1, 2, 4, 8",
        }, results="hops"),
    "eight_hops": Experiment(
        "hops", "Twenty nodes, and k grows slowly: how many hops do N passes answer?", {
            f"{SLOW} --N 1": "1 pass",
            f"{SLOW} --N 2": "2 passes",
            f"{SLOW} --N 3": "3 passes",
            f"{SLOW} --N 4": "4 passes",
            f"{SLOW} --N 6": "6 passes",
            f"{SLOW} --N 4 --layout ass": "4 passes, two SSM blocks",
        }, results="hops-eight"),
    "eight_hops_by_pass": Experiment(
        "hops", "Twenty nodes, and k grows slowly: how many hops are answered after each pass?", {
            f"{SLOW} --N 5 --seed 0": "trained with 5 passes, seed 0",
            f"{SLOW} --N 5 --seed 1": "trained with 5 passes, seed 1",
            f"{SLOW} --N 5 --seed 3": "trained with 5 passes, seed 3",
            f"{SLOW} --N 5 --seed 4": "trained with 5 passes, seed 4",
            f"{SLOW} --N 8 --seed 0": "trained with 8 passes, seed 0",
        }, picture="passes_by_cases", N_test=(1, 2, 3, 4, 5, 6, 7, 8, 9, 12),
        results="hops-eight-by-pass"),
    "eight_hops_recall": Experiment(
        "hops", "Twenty nodes, recall, and the largest k doubles: hops after each pass", {
            f"{RECALL} --N 6 --seed 0": "trained with 6 passes, recall, seed 0",
            f"{RECALL} --N 6 --seed 1": "trained with 6 passes, recall, seed 1",
            f"{RECALL} --N 6 --seed 2": "trained with 6 passes, recall, seed 2",
        }, picture="passes_by_cases", N_test=(1, 2, 3, 4, 5, 6, 7, 8, 9, 12),
        results="hops-eight-recall"),
    "longer_hops": Experiment(
        "hops", "Twenty nodes, three times the training: how many hops are answered after each pass?", {
            f"{LONG} --N 1": "trained with 1 pass",
            f"{LONG} --N 2": "trained with 2 passes",
            f"{LONG} --N 3": "trained with 3 passes",
            f"{LONG} --N 4": "trained with 4 passes",
            f"{LONG} --N 5": "trained with 5 passes",
            f"{LONG} --N 6": "trained with 6 passes",
        }, picture="passes_by_cases", N_test=(1, 2, 3, 4, 5, 6, 8), results="hops-longer"),
    "powers_of_two": Experiment(
        "hops", "Twenty nodes, 1, 2, 4 and 8 hops: how many are answered after each pass?", {
            f"{SLOW} {POWERS} --N 1": "trained with 1 pass",
            f"{SLOW} {POWERS} --N 2": "trained with 2 passes",
            f"{SLOW} {POWERS} --N 3": "trained with 3 passes",
            f"{SLOW} {POWERS} --N 4": "trained with 4 passes",
            f"{SLOW} {POWERS} --N 5": "trained with 5 passes",
            f"{SLOW} {POWERS} --N 6": "trained with 6 passes",
        }, picture="passes_by_cases", N_test=(1, 2, 3, 4, 5, 6, 8), results="hops-powers"),
    "longer_powers": Experiment(
        "hops", "1, 2, 4 and 8 hops, three times the training: how many after each pass?", {
            f"{LONG} {POWERS} --N 1": "trained with 1 pass",
            f"{LONG} {POWERS} --N 2": "trained with 2 passes",
            f"{LONG} {POWERS} --N 3": "trained with 3 passes",
            f"{LONG} {POWERS} --N 4": "trained with 4 passes",
            f"{LONG} {POWERS} --N 5": "trained with 5 passes",
            f"{LONG} {POWERS} --N 6": "trained with 6 passes",
        }, picture="passes_by_cases", N_test=(1, 2, 3, 4, 5, 6, 8), results="hops-powers-longer"),
    "sixteen_hops": Experiment(
        "hops", "33 nodes, sixteen hops asked for: how many are answered after each pass?", {
            f"{SIXTEEN} --N 6": "trained with 6 passes",
        }, picture="passes_by_cases", N_test=(1, 2, 3, 4, 5, 6, 7, 8), results="hops-sixteen"),
    "layouts": Experiment(
        "khop", "Which hybrid, with and without sleep, at the same compute?", {
            "--N 1 --layout aa --eviction sliding --steps 2900":
                "transformer, sliding window, 1 pass",
            "--N 3 --layout aa --eviction sliding --steps 1380":
                "transformer, sliding window, 3 passes",
            "--N 1 --layout as --eviction sliding --steps 2570":
                "alternating, sliding window (Samba), 1 pass",
            "--N 3 --layout as --eviction sliding --steps 1190":
                "alternating, sliding window (Samba), 3 passes",
            "--N 1 --layout aa --parallel --eviction sliding --steps 1710":
                "parallel, sliding window (Hymba), 1 pass",
            "--N 3 --layout aa --parallel --eviction sliding --steps 800":
                "parallel, sliding window (Hymba), 3 passes",
            "--N 1 --layout aa --parallel --steps 1775": "parallel, hard eviction, 1 pass",
            "--N 3 --layout aa --parallel --steps 815": "parallel, hard eviction, 3 passes",
            "--N 1 --layout ss --steps 2250": "SSM only, hard eviction, 1 pass",
            "--N 3 --layout ss --steps 1040": "SSM only, hard eviction, 3 passes",
            "--N 1 --layout as --steps 2600": f"{ALTERNATING}, 1 pass",
            "--N 3 --layout as --steps 1200": f"{ALTERNATING}, 3 passes",
            "--N 1 --layout aa --eviction sliding --L 48 --steps 1975":
                "transformer, nothing evicted, 1 pass",
            "--N 1 --layout as --eviction sliding --L 48 --steps 1725":
                "alternating, nothing evicted, 1 pass",
            "--N 3 --layout as --eviction sliding --warmup 300 --steps 1190":
                "alternating, sliding window, attention frozen at first, 3 passes",
        }, results="khop-layouts"),
    "trees": Experiment(
        "trees", "Asleep for longer than in training: deeper answers?", {
            "--N 4": "trained with N = 4",
        }, picture="passes_by_cases", N_test=DEEPER_N, results="trees"),
    "trees_levers": Experiment(
        "trees", "With which training tricks does a longer sleep answer deeper?", {
            "--N 4 --seed 0 1 2": "Algorithm 1",
            "--N 4 --recall --every_pass --grow_N 0.4 --seed 0 1 2":
                "recall, a loss a pass, growing N",
            "--N 4 --recall --grow_N 0.4 --seed 0": "recall, growing N",
            "--N 4 --every_pass --grow_N 0.4 --seed 0": "a loss a pass, growing N",
        }, picture="passes_by_cases", N_test=DEEPER_N, results="trees-levers"),
    "trees_N": Experiment(
        "trees", "How many passes of training teach a step that can be repeated?", {
            **ONE_TO_FOUR,
            "--N 4 --any_N": "trained with N drawn from 1 to 4",
        }, picture="passes_by_cases", N_test=DEEPER_N, results="trees-N"),
    "gsm_compute": Experiment(
        "gsm", "Word problems: what is left at the same compute?", {
            "--N 1": "1 pass",
            "--N 1 --steps 4430 --eval_every 443": "1 pass, 4,430 steps",
            "--N 3": "3 passes",
        }, results="words-compute"),
    "ca_splits": Experiment(
        "ca", "Do three passes learn more of Rule 110?", product({
            "--split 0 --seed 0": "split and seed 0",
            "--split 1 --seed 1": "split and seed 1",
            "--split 2 --seed 2": "split and seed 2",
        }, {
            "--N 1": "1 pass",
            "--N 1 --lr_muon 0.014 --lr_adamw 0.006": "1 pass, rates of its own",
            "--N 3": "3 passes",
        }), results="rule110-splits"),
    "ca_long": Experiment(
        "ca", "Does a gap survive convergence, at 8 steps of the rule?", {
            "--t 8 --steps 6000 --N 1": "1 pass, 6,000 steps",
            "--t 8 --steps 2000 --N 3": "3 passes, 2,000 steps",
        }, results="rule110-long"),
}


def load_task(name):
    """Docstring, presets, flags and class of a task, with the flags of variants.py."""
    module_name, class_name = TASKS[name]
    module = importlib.import_module(module_name)
    Task = getattr(module, class_name)

    class CheckedTask(Task):
        def __init__(self, args, seed):
            variants.check(args)
            super().__init__(args, seed)

    presets = {preset: variants.DEFAULTS | values for preset, values in module.PRESETS.items()}
    return module.__doc__, presets, module.FLAGS | variants.FLAGS, CheckedTask


def train(name, argv):
    """sleep.main for a task of TASKS, with the flags of variants.py."""
    sleep.main(*load_task(name), argv, variants.make_model, variants.draw_N)
