"""How deep a question does a sleep answer, pass by pass? Does a pass add an edge, or double the reach?

    python -m lab.experiments.reach out/experiments/trees*/N6-seed?.pt --out reach.png
    python -m lab.experiments.reach out/mixed/N6-seed0.pt --near 8        attention looks back 8 tokens only
    python -m lab.experiments.reach --draw lab/results/trees-reach-by-pass.json         draw it again
    python -m lab.experiments.reach --draw lab/results/trees-reach-by-pass.json --short \
        --out lab/pictures/trees-jump.png                      the picture of README

Checkpoints of lab.experiments.trees. The model sleeps over new trees for up to --passes passes. After
every pass it is asked for the root of each node. The reach after a pass is the deepest question that it
answers with 0.9, all shallower ones, too. Also counted: which node is said in the place of the root, how
many edges up from the node that is asked about. The trees are those of training, or as many nodes in two
deeper trees, or those of training with their edges sorted by depth. Beside it stands a machine without
weights that reads the same texts (`pointer_machine`). Writes a picture and its numbers.
"""
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

import sleep
from lab.common import (check_output, mean, parser, picture_of, program, read_results,
                        write_results)
from lab.experiments import when_to_wake
from lab.experiments.plots import figure, legend, save_figure
from lab.experiments.which_node import walk

ENOUGH = 0.9
ROWS = 512                                 # texts of a test
FIELDS = {"test", "trained_N", "trained_depth", "seed", "nodes", "order", "layout", "update_rule", "near",
          "accuracy", "said", "machine"}   # of a run
ZERO_AT = 0.5                              # where a reach of 0 is drawn: the scale is logarithmic
LAG = 1                                    # passes that models are behind the machine
TESTS = {                                  # name: (trees, order of their edges)
    "trees as in training": (3, None),
    "two deeper trees": (2, None),
    "parents first": (3, "parents"),
    "children first": (3, "children"),
}
RANDOM = ("trees as in training", "two deeper trees")
SORTED = ("parents first", "children first")


# ------------------------------------------------------------------------------------------------
# Measuring

@torch.no_grad()
def answers_after_each_pass(model, tokens, n_passes):
    """tokens (B, L + questions) -> the answers after 1, ..., n_passes passes (n_passes, B, questions)."""
    L = model.cfg.L
    h = model.embed(tokens[:, :L])
    questions = model.embed(tokens[:, L:])
    empty = model.empty_memory(len(tokens))
    S = empty.S
    answers = []
    for _ in range(n_passes):
        h, S, cache = model.one_pass(h, S, empty.cache)
        memory = model.evict(sleep.Memory(S, cache, 0))
        logits, _ = model.wake(questions, memory)
        answers.append(logits.argmax(-1))
    return torch.stack(answers)


@contextmanager
def near_attention(near):
    """While it is open, attention within a window sees the last `near` tokens only. 0: all of them."""
    full_attention = F.scaled_dot_product_attention

    def attention(q, k, v, **options):
        T = q.shape[2]
        if k.shape[2] > T:                                     # tokens of an earlier window, too
            return full_attention(q, k, v, **options)
        distance = torch.arange(T)[:, None] - torch.arange(T)
        return full_attention(q, k, v, attn_mask=(distance >= 0) & (distance < near))

    if near:
        F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = full_attention


def pointer_machine(tokens, nodes, n_passes, reads="now", exchange_after=None):
    """As answers_after_each_pass, for a machine that makes no errors.

    The token of an edge from a to b has a pointer, b at first. In a pass the tokens take turns. Each
    writes to S that a points to its pointer, and reads in S where its pointer points to: that is its
    new pointer. So what is read in a pass is written in the next one.

    reads: "now", S as it is; "before", S as it was before the pass; "first", S as it is, and only then
    it writes: as two SSM blocks can, the second of which writes what the first one read.
    exchange_after: the pass after which each text gets the S of the text before it in the batch.
    """
    B = len(tokens)
    text = torch.arange(B)
    edges = tokens[:, :2 * nodes].unflatten(1, (nodes, 2))
    asked = tokens[:, 2 * nodes:]
    pointers = edges[..., 1].clone()                           # (B, nodes)
    S = torch.full((B, nodes), -1)                             # where a node points to; -1: nowhere
    answers = []
    for n in range(1, n_passes + 1):
        before = S.clone()
        for i in range(nodes):
            node = edges[:, i, 0]
            if reads != "first":
                S[text, node] = pointers[:, i]
            found = (before if reads == "before" else S)[text, pointers[:, i]]
            pointers[:, i] = torch.where(found >= 0, found, pointers[:, i])
            if reads == "first":
                S[text, node] = pointers[:, i]
        if n == exchange_after:
            S = S.roll(1, 0)
        answers.append(S.gather(1, asked))
    return torch.stack(answers)


def machine_of(model):
    """How the machine reads that has the blocks of the model."""
    if model.cfg.update_rule == "read_before":
        return "before"
    return "first" if model.cfg.layout.count("s") > 1 else "now"


def draw_texts(task, n_trees, order):
    """-> tokens, targets, depths of a test, and the deepest question of it."""
    deepest = task.nodes // n_trees - 1
    g = torch.Generator().manual_seed(10 ** 6)                 # of no training: those are 10^9 seed + step
    tokens, targets, depths = task.draw(ROWS, n_trees, deepest, "random", g)
    if order:
        tokens = when_to_wake.in_order(tokens, depths, order)
    return tokens, targets, depths, deepest


def accuracy_by_depth(answers, targets, depths, deepest):
    """Answers (n_passes, B, questions) -> (n_passes, deepest)."""
    right = answers == targets
    return [[at[depths == d].float().mean().item() for d in range(1, deepest + 1)] for at in right]


def edges_up(answers, tokens, depths, deepest, task):
    """What is said to the deeper half of the questions: shares by pass and edges up.

    -> (n_passes, deepest + 2): the last is a node off the way.
    """
    asked = tokens[:, 2 * task.nodes:]
    deep = depths > deepest // 2
    said = []
    for answer in answers:
        up = walk(tokens, task.nodes, asked, answer)[deep]
        row = [(up == i).float().mean().item() for i in range(deepest + 1)]
        said.append(row + [1 - sum(row)])
    return said


def measure_all(paths, n_passes, near=0):
    """A run for each checkpoint and test."""
    runs = []
    for path in dict.fromkeys(path.resolve() for path in paths):
        model, task = when_to_wake.load(path)
        if task.name != "trees":
            raise sleep.BadInput(f"{path} is no checkpoint of trees.")
        if runs and task.nodes != runs[0]["nodes"]:
            raise sleep.BadInput(f"{path} has {task.nodes} nodes, the model before it {runs[0]['nodes']}: "
                                 "measure them apart.")
        for test, (n_trees, order) in TESTS.items():
            if task.nodes % n_trees:
                continue
            tokens, targets, depths, deepest = draw_texts(task, n_trees, order)
            with near_attention(near):
                answers = answers_after_each_pass(model, tokens, n_passes)
            by_machine = pointer_machine(tokens, task.nodes, n_passes, machine_of(model))
            run = dict(test=test, trained_N=model.cfg.N, trained_depth=task.args.depth,
                       seed=task.seed, nodes=task.nodes, order=task.args.order, n_trees=n_trees,
                       layout=model.cfg.layout, update_rule=model.cfg.update_rule, near=near,
                       accuracy=accuracy_by_depth(answers, targets, depths, deepest),
                       said=edges_up(answers, tokens, depths, deepest, task),
                       machine=reach(accuracy_by_depth(by_machine, targets, depths, deepest)))
            runs.append(run)
            print(f"{label(run)}, seed {run['seed']}, {test}: reach after 1, 2, ... passes: "
                  f"{' '.join(map(str, reach(run['accuracy'])))}; the machine: "
                  f"{' '.join(map(str, run['machine']))}")
    return runs


def reach(accuracy):
    """By pass: the deepest depth that has ENOUGH, as have all before it."""
    result = []
    for row in accuracy:
        depth = 0
        while depth < len(row) and row[depth] >= ENOUGH:
            depth += 1
        result.append(depth)
    return result


# ------------------------------------------------------------------------------------------------
# Drawing

def label(run):
    words = f"trained with N = {run['trained_N']}, depth up to {run['trained_depth']}"
    if run["order"] == "mixed":
        words += ", mixed orders"
    if run["update_rule"] == "read_before":
        words += ", reads the S before the pass"
    elif run["update_rule"] != "gated_delta":
        words += f", {run['update_rule']}"
    n_ssm = run["layout"].count("s")
    words += f", {n_ssm} SSM block{'s' * (n_ssm > 1)}"
    if "a" not in run["layout"]:
        words += ", no attention"
    if run["near"]:
        words += f", attention sees {run['near']} tokens"
    return words


def draw(runs, path):
    """Three pictures: the reach in random order, and in other orders; which node is said."""
    kinds = list(dict.fromkeys(label(run) for run in runs))
    draw_reaches(runs, kinds, RANDOM, path)
    draw_reaches(runs, kinds, SORTED, path.with_stem(path.stem + "-orders"))

    orders = [test for test in TESTS if test != "two deeper trees"]
    fig, axes = figure(len(kinds), len(orders), (4.8 * len(orders), 4.2 * len(kinds)))
    for row, kind in zip(axes, kinds):
        for ax, test in zip(row, orders):
            draw_said(ax, [run for run in runs if label(run) == kind and run["test"] == test], test)
        words = kind.replace(", ", ",\n")                      # a long line would run into the next row
        row[0].set_ylabel(f"{words}\n\npasses of the sleep")
    fig.suptitle("Which node is said to deep questions, pass by pass? mean of the seeds", fontsize=10)
    save_figure(fig, path.with_stem(path.stem + "-said"))


def draw_reaches(runs, kinds, tests, path):
    """The reach pass by pass, a panel for each of the tests that was run."""
    tests = [test for test in tests if any(run["test"] == test for run in runs)]
    fig, axes = figure(1, len(tests), (5.25 * len(tests), 5.2))
    for ax, test in zip(axes.flat, tests):
        draw_reach(ax, [run for run in runs if run["test"] == test], kinds, test)
    legend(fig, axes[0, 0], "a line is a model, a dot its reach after a pass;\nin pale what pointers "
           "reach that make no errors, a pass later")
    save_figure(fig, path)


def draw_reach(ax, runs, kinds, test):
    """Seeds are drawn a little apart, so that equal ones can be told."""
    deepest = len(runs[0]["accuracy"][0])
    passes = range(1, len(runs[0]["accuracy"]) + 1)
    named = set()
    machines = {}                          # reach of the machine: colour of the first model with it
    for run in runs:
        color = f"C{kinds.index(label(run))}"
        machines.setdefault(tuple(run["machine"]), color)
        words = None if label(run) in named else label(run)
        named.add(label(run))
        shifted = [x + 0.12 * (run["seed"] % 3 - 1) for x in passes]
        depths = [depth or ZERO_AT for depth in reach(run["accuracy"])]
        ax.plot(shifted, depths, f"{color}o-", ms=4, lw=1, alpha=0.8, label=words)
    for machine, color in machines.items():
        ax.plot([n + LAG for n in passes], machine, color, lw=7, alpha=0.2, zorder=0)
    ax.plot(passes, [max(n - 1, 0.5) for n in passes], "k:", lw=1, label="one edge a pass")
    ax.plot(passes, [2.0 ** (n - 3) for n in passes], "k--", lw=1, label="doubling with every pass")
    ax.axhline(deepest, color="0.6", lw=1, label="the deepest question of the test")
    ticks = [ZERO_AT, 1, 2, 4, 8, 16, 32]
    ax.set_yscale("log", base=2)
    ax.set_yticks(ticks, [0] + ticks[1:])
    ax.minorticks_off()
    ax.set(xlim=(0.5, 16.5), ylim=(0.42, deepest * 1.3), xlabel="passes of the sleep at the test")
    ax.set_ylabel(f"reach, in edges (right in {ENOUGH})")
    ax.set_title(f"{test}, {deepest} edges deep", fontsize=10)


def draw_short(runs, path):
    """One panel: the deeper trees, models with one SSM block, no machines."""
    runs = [run for run in runs if run["test"] == "two deeper trees" and run["layout"] == "as"]
    if not runs:
        raise sleep.BadInput("there are no runs of two deeper trees with the layout as: leave out --short.")
    deepest = len(runs[0]["accuracy"][0])
    passes = range(1, len(runs[0]["accuracy"]) + 1)
    fig, axes = figure(1, 1, (7.5, 4))
    ax = axes[0, 0]
    kinds = list(dict.fromkeys((run["trained_N"], run["trained_depth"]) for run in runs))
    for i, (N, depth) in enumerate(kinds):
        of_kind = [run for run in runs if (run["trained_N"], run["trained_depth"]) == (N, depth)]
        seeds = "one seed" if len(of_kind) == 1 else f"{len(of_kind)} seeds"
        words = f"trained with {N} passes, on depths up to {depth} ({seeds})"
        for run in of_kind:
            depths = [depth or float("nan") for depth in reach(run["accuracy"])]
            ax.plot(passes, depths, f"C{i}o-", ms=4, lw=1.2, alpha=0.7, label=words)
            words = None
    later = passes[3:]                     # both lines begin with one edge, after four passes
    ax.plot(later, [n - 3 for n in later], "k:", lw=1, label="one edge a pass")
    ax.plot(later, [2.0 ** (n - 4) for n in later], "k--", lw=1, label="doubling with every pass")
    ax.axhline(deepest, color="0.6", lw=1, label=f"the deepest question: {deepest} edges")
    ticks = [1, 2, 4, 8, 16]
    ax.set_yscale("log", base=2)
    ax.set_yticks(ticks, ticks)
    ax.minorticks_off()
    ax.set(xlim=(0.5, len(passes) + 0.5), ylim=(0.8, deepest * 1.3), xlabel="passes of the sleep at the test")
    ax.set_ylabel(f"reach: edges up to which\naccuracy is at least {ENOUGH}")
    ax.legend(loc="lower right", fontsize=9, frameon=False)
    save_figure(fig, path)


def draw_said(ax, runs, test):
    """The share of answers to deep questions, by pass and edges up; mean of the seeds."""
    n_passes = min(8, len(runs[0]["said"]))
    columns = len(runs[0]["said"][0])
    rows = [[mean([run["said"][n][i] for run in runs]) for i in range(columns)] for n in range(n_passes)]
    ax.imshow(rows, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for y, row in enumerate(rows):
        for x, share in enumerate(row):
            if share >= 0.05:
                ax.text(x, y, f"{share:.2f}".lstrip("0"), ha="center", va="center", fontsize=6.5,
                        color="w" if share < 0.6 else "k")
    ax.set_xticks(range(columns), [*range(columns - 1), "off"])
    ax.set_yticks(range(n_passes), range(1, n_passes + 1))
    ax.set(xlabel="edges up to the node that is said", ylabel="passes of the sleep")
    ax.set_title(f"{test}, questions deeper than {(columns - 2) // 2}", fontsize=9)
    ax.grid(False)


@program
def main(argv):
    p = parser(__doc__)
    p.add_argument("checkpoint", type=Path, nargs="*")
    p.add_argument("--passes", type=int, default=16, help="most passes of a sleep (default: 16)")
    p.add_argument("--near", type=int, default=0, help="tokens that attention sees at the test; 0: all")
    p.add_argument("--out", type=Path, help="the picture; default: out/reach.png")
    p.add_argument("--draw", type=Path, metavar="FILE", help="draw a file of numbers; nothing is measured")
    p.add_argument("--short", action="store_true", help="with --draw and --out: one panel, as in README")
    args = p.parse_args(argv)
    if args.short and not (args.draw and args.out):
        raise sleep.BadInput("--short takes --draw and --out: a picture of its own.")
    if args.draw:
        out = args.out or picture_of(args.draw)
        check_output(out, ".png")
        runs = read_results(args.draw).get("runs", [])
        if not runs or any(FIELDS - set(run) for run in runs):
            raise sleep.BadInput(f"{args.draw} holds no numbers of lab.experiments.reach.")
    else:
        out = args.out or Path("out/reach.png")
        if not args.checkpoint:
            raise sleep.BadInput("name at least one checkpoint, or --draw and a file of numbers.")
        if not 1 <= args.passes <= 1000:
            raise sleep.BadInput(f"--passes {args.passes} must be from 1 to 1,000.")
        if args.near < 0:
            raise sleep.BadInput(f"--near {args.near} must be 0 (all tokens) or more.")
        check_output(out, ".png")
        runs = measure_all(args.checkpoint, args.passes, args.near)
        write_results(out.with_suffix(".json"), dict(runs=runs))
    if args.short:
        draw_short(runs, out)
    else:
        draw(runs, out)
    print(f"saved: {out}")


if __name__ == "__main__":
    main()
