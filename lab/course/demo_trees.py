"""Watch a sleep that jumps: every node of a tree looks for its root, and each pass looks farther.

    python sleep.py --trees                edges in random order
    python sleep.py --trees parents        those of parents first
    python sleep.py --trees children       those of children first

The model that ships, lab/models/trees-N7.pt, had seven passes and edges in random order in
training: lab/pages/jumps.md, "Seven passes". Its weights are rounded to float16.
"""
import torch

import sleep
from lab.experiments import reach, when_to_wake
from lab.experiments.which_node import walk

ORDERS = ("random", "parents", "children")     # which edges stand first


def draw_deep_trees(task, seed, order):
    """Tokens (1, T) and depths (1, nodes) of three trees, one of them a single path."""
    deepest = task.args.size - 1
    g = torch.Generator().manual_seed(seed)
    while True:
        tokens, _, depths = task.draw(1, 3, deepest, "random", g)
        if depths.max() == deepest:
            break
    if order != "random":
        tokens = when_to_wake.in_order(tokens, depths, order)
    return tokens, depths


def path_to_root(tokens, n, node):
    """The nodes from this one up to its root. tokens (1, ...) begin with n edges."""
    edges = tokens[0, :2 * n].view(n, 2).tolist()
    parent = dict(edges)
    path = [node]
    while parent[path[-1]] != path[-1]:
        path.append(parent[path[-1]])
    return path


def show(path, seed, order, mark):
    """Print what the nodes of the deepest path are told after every pass of a sleep.

    path: of a checkpoint of lab.experiments.trees. mark(number) -> it, as a right answer.
    """
    model, task = when_to_wake.load(path)
    if task.name != "trees":
        raise sleep.BadInput(f"{path} is no checkpoint of trees: "
                             "train one with `python -m lab.experiments.trees`.")
    n = task.nodes
    N = model.cfg.N
    tokens, depths = draw_deep_trees(task, seed, order)
    asked = tokens[:, model.cfg.L:]
    deepest = asked[depths == depths.max()][0].item()
    way = path_to_root(tokens, n, deepest)

    print(f"{n} nodes point to their parents, three roots to themselves. The edges, in {order} "
          f"order{' first' * (order != 'random')}:\n")
    edges = [f"{a}>{b}" for a, b in tokens[0, :2 * n].view(n, 2).tolist()]
    for first in range(0, n, 12):
        print("  " + "  ".join(edges[first:first + 12]))
    print(f"\nOne path is {len(way) - 1} edges long: {' > '.join(map(str, way))}\n")
    print(f"The model was trained with {N} passes. After every pass the nodes of this path are asked "
          "for their root.\nHow many edges up is the node that is said? "
          f"{mark(4).strip()} is the root, 4 edges up; . is a node off the path.\n"
          "Chance is one in three, for who says a root.\n")
    print("  edges to the root" + "".join(f"{d:5}" for d in range(1, len(way))) + "     right")
    answers = reach.answers_after_each_pass(model, tokens, N + 2)
    place = {node: i for i, node in enumerate(asked[0].tolist())}
    for i, answer in enumerate(answers, 1):
        edges_up = walk(tokens, n, asked, answer)[0].tolist()
        cells = []
        right = 0
        for d in range(1, len(way)):
            up = edges_up[place[way[len(way) - 1 - d]]]
            right += up == d
            cells.append(mark(up) if up == d else f"{'.' if up == n else up:>5}")
        print(f"  after pass {i:<6}" + "".join(cells) + f"     {right:2} of {len(way) - 1}")
    print(f"\nThe window is evicted before every question: what answers is S, "
          f"{sum(S.numel() for S in model.empty_memory(1).S if S is not None):,} numbers.")
