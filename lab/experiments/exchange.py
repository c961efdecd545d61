"""Two texts exchange S in the middle of a sleep: what does h carry, and what is looked up in S?

    python -m lab.experiments.exchange lab/models/khop-N3.pt
    python -m lab.experiments.exchange lab/models/trees-N7.pt
    python -m lab.experiments.exchange --draw lab/results/exchange-trees.json         draw it again

After a pass, each text of the test gets the S of another one, which has other edges; its h stays. Then
the sleep goes on. An answer may go i edges along the text itself, then j along the other one: if h carries
a node i edges on, and a later pass looks up in S where that node leads. No other way goes there.

Counted are the shares of the answers that go (i, j). On k hops i + j = k, and the exchange comes after
each pass of a sleep as in training. On trees there is a pass or two after the exchange, and what is asked
about is at least 6 edges deep, so that the root is still out of reach; a pair is counted where both ways
go on beyond it. Beside the model stands the machine of lab.experiments.reach, with the same exchange, a
pass earlier. Writes a picture and its numbers.
"""
from pathlib import Path

import torch

import sleep
from lab.common import (check_output, parser, picture_of, program, read_results,
                        write_results)
from lab.experiments import reach, when_to_wake
from lab.experiments.plots import figure, save_figure, write_in_cell

DEEP = 6                                   # edges to the root, on trees
FAR = 8                                    # edges that are counted along each text, on trees
FEWEST = 200                               # questions of a share
LAST_TREES = 6                             # passes of the longest sleep, on trees
SMALL = 0.01                               # a share below it is not kept,
WRITTEN = 0.08                             # and below this one not written into a picture
FIELDS = {"task", "test", "trained_N", "seed", "passes", "after", "asked", "shares", "machine"}


# ------------------------------------------------------------------------------------------------
# Measuring

@torch.no_grad()
def answers(model, tokens, n_asked, passes, after):
    """tokens (B, T), the last n_asked of them questions -> what is said at each (B, n_asked).

    After pass `after` of `passes` each text gets the S of the text before it in the batch.
    """
    L = model.cfg.L
    empty = model.empty_memory(len(tokens))
    h = model.embed(tokens[:, :L])
    S = empty.S
    for n in range(1, passes + 1):
        h, S, _ = model.one_pass(h, S, empty.cache)
        if n == after:
            S = [None if of_block is None else of_block.roll(1, 0) for of_block in S]
    logits, _ = model.wake(model.embed(tokens[:, L:]), sleep.Memory(S, empty.cache, 0))
    return logits[:, -n_asked:].argmax(-1)


def next_nodes(tokens, nodes, vocab_size):
    """Tokens that begin with edges, source and target -> the token that each leads to (B, vocab)."""
    source, target = tokens[:, :2 * nodes].unflatten(1, (nodes, 2)).unbind(-1)
    return torch.zeros(len(tokens), vocab_size, dtype=torch.long).scatter(1, source, target)


def follow(leads_to, node, edges):
    for _ in range(edges):
        node = leads_to.gather(1, node)
    return node


def edges_to_the_end(leads_to, node, most):
    """Edges from each node to its root; `most` where the way is longer, or has no end."""
    edges = torch.zeros_like(node)
    for _ in range(most):
        after = leads_to.gather(1, node)
        edges += after != node
        node = after
    return edges


def measure_hops(model, task, path):
    """Runs of k hops: an exchange after each pass of a sleep but the last."""
    tokens, targets = task.test[:2]
    asked = (targets >= 0)[0].nonzero().squeeze(1)             # the same places in every text
    start = tokens[:, -targets.shape[1]:][:, asked]
    own = next_nodes(tokens, task.nodes, task.vocab_size)
    other = own.roll(1, 0)
    hops = task.hops(tokens)
    N = model.cfg.N
    if N < 2:
        raise sleep.BadInput(f"{path} sleeps for one pass: there is none after an exchange.")
    runs = []
    for after in range(1, N):
        said = answers(model, tokens, targets.shape[1], N, after)[:, asked]
        for k in task.test_k:
            of_k = hops == k
            shares = {}
            for i in range(k + 1):
                node = follow(other, follow(own, start, i), k - i)
                shares[f"{i}+{k - i}"] = (said == node)[of_k].float().mean().item()
            runs.append(dict(task=task.name, test="", trained_N=N, seed=task.seed, passes=N,
                             after=after, asked=k, shares=kept(shares), machine=None))
    return runs


def measure_trees(model, task, path):
    """Runs of trees: in three orders of the edges, a pass or two after the exchange."""
    deepest = task.nodes // 3 - 1
    if deepest < DEEP:
        raise sleep.BadInput(f"{path}: its trees are at most {deepest} edges deep, and {DEEP} are asked "
                             "for here: train one with a larger --size.")
    runs = []
    for test, (n_trees, order) in reach.TESTS.items():
        if n_trees != 3:
            continue
        tokens, targets, depths, _ = reach.draw_texts(task, n_trees, order)
        n = task.nodes
        for passes in range(3, LAST_TREES + 1):
            for after in (passes - 2, passes - 1):
                said = answers(model, tokens, n, passes, after)
                machine = reach.pointer_machine(tokens, n, passes - reach.LAG, reach.machine_of(model),
                                                after - reach.LAG)[-1]
                shares, of_machine = [kept(pairs(x, tokens, n, depths)) for x in (said, machine)]
                runs.append(dict(task=task.name, test=test, trained_N=model.cfg.N, seed=task.seed,
                                 passes=passes, after=after, asked="deep", shares=shares,
                                 machine=of_machine))
    return runs


def pairs(said, tokens, nodes, depths):
    """{"i+j": share of the answers that go i edges up in the text, then j in the other one}."""
    asked = tokens[:, 2 * nodes:]
    own = next_nodes(tokens, nodes, nodes)
    other = own.roll(1, 0)
    shares = {}
    for i in range(FAR + 1):
        node = follow(own, asked, i)
        left = edges_to_the_end(other, node, FAR + 1)
        for j in range(FAR + 1):
            goes_on = (depths >= DEEP) & (depths > i) & (left > j)
            if goes_on.sum() >= FEWEST:
                right = said == follow(other, node, j)
                shares[f"{i}+{j}"] = right[goes_on].float().mean().item()
    return shares


def kept(shares):
    return {pair: share for pair, share in shares.items() if share >= SMALL}


def measure_all(paths):
    runs = []
    for path in dict.fromkeys(path.resolve() for path in paths):
        model, task = when_to_wake.load(path)
        if model.cfg.L != 2 * task.nodes:                      # words, or padding
            raise sleep.BadInput(f"{path}: its window holds more than edges; take a model of a "
                                 "cpu preset.")
        if runs and (task.name == "trees") != (runs[0]["task"] == "trees"):
            raise sleep.BadInput(f"{path} is of {task.name}, the model before it of {runs[0]['task']}: "
                                 "measure them apart.")
        measure = measure_trees if task.name == "trees" else measure_hops
        runs += measure(model, task, path)
    return runs


def commonest(shares, n=3):
    """The commonest pairs, as text."""
    pairs = sorted(shares, key=shares.get, reverse=True)[:n]
    return "  ".join(f"{pair} {shares[pair]:.2f}" for pair in pairs) or "none"


def asked_for(run):
    return f"{run['asked']} hop{'s' * (run['asked'] > 1)}"


def print_run(run):
    words = run["test"] or asked_for(run)
    line = (f"N = {run['trained_N']}, seed {run['seed']}, {words}, S exchanged after pass {run['after']} "
            f"of {run['passes']}: {commonest(run['shares'])}")
    if run["machine"] is not None:
        line += f" | machine: {commonest(run['machine'], 2)}"
    print(line)


# ------------------------------------------------------------------------------------------------
# Drawing

def draw(runs, path):
    """On k hops a row a model, a column a question; on trees a row an order, a column a sleep."""
    panels = {}                            # (row, column): shares
    for run in runs:
        left = run["passes"] - run["after"]
        if run["task"] != "trees" and left == 1:
            row = f"N = {run['trained_N']}, seed {run['seed']}, S exchanged\nbefore the last pass"
            panels[row, asked_for(run)] = run["shares"]
        elif run["task"] == "trees" and left == 2:
            column = f"{run['passes']} passes, S exchanged after {run['after']}"
            model = f"N = {run['trained_N']}, seed {run['seed']}"
            panels[f"{run['test']}:\n{model}", column] = run["shares"]
            panels[f"{run['test']}:\nmachine", column] = run["machine"]
    rows = list(dict.fromkeys(row for row, _ in panels))
    columns = list(dict.fromkeys(column for _, column in panels))
    if not panels:
        raise sleep.BadInput("there is no exchange before the last pass (on trees: two passes before the "
                             "end) among these numbers: measure them again.")
    fig, axes = figure(len(rows), len(columns), (2.6 * len(columns) + 0.6, 2.4 * len(rows) + 0.6))
    for x, column in enumerate(columns):
        of_column = [panels[row, column] for row in rows if (row, column) in panels]
        seen = [pair for shares in of_column for pair, share in shares.items() if share >= WRITTEN]
        most = max([3, *(edges for pair in seen for edges in edges_of(pair))])
        if runs[0]["task"] != "trees":
            most = max(3, int(column.split()[0]))              # all hops that are asked for
        for y, row in enumerate(rows):
            ax = axes[y, x]
            if (row, column) in panels:
                draw_panel(ax, panels[row, column], most)
            else:
                ax.axis("off")
            if y == 0:
                ax.set_title(column, fontsize=9)
            if x == 0:
                ax.set_ylabel(f"{row}\nedges in the text itself", fontsize=7)
            if y == len(rows) - 1:
                ax.set_xlabel("then edges in the other text", fontsize=8)
    save_figure(fig, path)


def edges_of(pair):
    """"2+1" -> (2, 1)."""
    i, j = pair.split("+")
    return int(i), int(j)


def draw_panel(ax, shares, most):
    """The shares of pairs up to `most` edges."""
    image = [[shares.get(f"{i}+{j}", 0.0) for j in range(most + 1)] for i in range(most + 1)]
    ax.imshow(image, vmin=0, vmax=1, cmap="viridis", origin="lower")
    for i, row in enumerate(image):
        for j, share in enumerate(row):
            if share >= WRITTEN:
                write_in_cell(ax, j, i, f"{share:.2f}".removeprefix("0"), share, 7)
    ax.set_xticks(range(most + 1))
    ax.set_yticks(range(most + 1))
    ax.tick_params(labelsize=7)
    ax.grid(False)


@program
def main(argv):
    p = parser(__doc__)
    p.add_argument("checkpoint", type=Path, nargs="*")
    p.add_argument("--out", type=Path, help="the picture; default: out/exchange.png")
    p.add_argument("--draw", type=Path, metavar="FILE", help="draw a file of numbers; nothing is measured")
    args = p.parse_args(argv)
    if args.draw:
        out = args.out or picture_of(args.draw)
        check_output(out, ".png")
        runs = read_results(args.draw).get("runs", [])
        if not runs or any(FIELDS - set(run) for run in runs):
            raise sleep.BadInput(f"{args.draw} holds no numbers of lab.experiments.exchange.")
    else:
        out = args.out or Path("out/exchange.png")
        if not args.checkpoint:
            raise sleep.BadInput("name at least one checkpoint, or --draw and a file of numbers.")
        check_output(out, ".png")
        runs = measure_all(args.checkpoint)
        for run in runs:
            print_run(run)
        write_results(out.with_suffix(".json"), dict(runs=runs))
    draw(runs, out)
    print(f"saved: {out}")


if __name__ == "__main__":
    main()
