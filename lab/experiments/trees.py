"""Trees: a question whose depth is in the data, not in a token. Does more sleep answer deeper ones?

Three trees of equal size; every node points to its parent, a root to itself. The edges stand in
random order in one window, and are evicted; then each node is asked for: which root does it lead
to? Who knows no more than the roots is right once in three times. (With three trees only, training
was stuck at that chance. So it has three to twelve, the more the smaller: there chance is lower.)
In training no node lies deeper than `depth` edges, in the test up to `test_depth`: a model that
steps from parent to parent can go on for as long as it sleeps.

    3 1  1 1  0 3  2 2  4 0  5 2 ..  | 4 0 5 ..  edges (node, parent), questions; answers 1 1 2 ..

    python -m lab.experiments.trees        train with 4 passes, test with up to 16
"""
import random

import torch

import sleep
from lab.common import program

PRESETS = {"cpu": dict(N=[4], size=8, depth=3, test_depth=7, deeper=0.3, growth="linear",
                       order="random", L=48, layout="as", d_model=96, n_head=1, steps=2000,
                       batch_size=32, lr_muon=1e-2, lr_adamw=4e-3, cooldown=0.4,
                       N_test=[1, 2, 3, 4, 6, 8, 12, 16])}
FLAGS = dict(size="nodes of each of the test's three trees",
             depth="edges from the deepest node to its root, in training",
             test_depth="the same, in the test",
             deeper="first share of the steps, in which the depth grows from 1",
            growth="of the depth: linear (1, 2, 3, ..), or doubling (1, 2, 4, ..), each as long",
             order="of the edges in training: random, or mixed (a third each: random, parents "
                   "first, children first)")


class Trees:
    """The task, as sleep.main wants it."""
    name = "trees"

    def __init__(self, args, seed):
        sleep.check_limits(args, dict(size=(2, 1000), deeper=(0, 1)))
        if not 1 <= args.depth <= args.test_depth < args.size:
            raise sleep.BadInput(f"--depth {args.depth} --test_depth {args.test_depth}: take 1 <= "
                                 f"depth <= test_depth < size = {args.size}.")
        if args.growth not in ("linear", "doubling"):
            raise sleep.BadInput(f"--growth {args.growth} must be linear or doubling.")
        if args.order not in ("random", "mixed"):
            raise sleep.BadInput(f"--order {args.order} must be random or mixed.")
        self.args = args
        self.seed = seed
        self.nodes = 3 * args.size
        self.vocab_size = self.nodes
        self.T = 3 * self.nodes
        if (2 * self.nodes) % args.L:
            raise sleep.BadInput(f"--L {args.L} must divide the edges' {2 * self.nodes} tokens.")
        self.test = self.make_batch(-1)
        self.chance = dict(accuracy={str(depth): 1 / 3 for depth in range(1, args.test_depth + 1)})

    def make_batch(self, step):
        """Step -> tokens (B, T), targets and depths of what is asked (B, nodes); -1 is the test."""
        args = self.args
        is_test = step < 0
        B = 1024 if is_test else args.batch_size
        g = torch.Generator(args.device)
        g.manual_seed(0 if is_test else self.seed * 10 ** 9 + step + 1)
        deepest = args.test_depth if is_test else self.deepest_in_training(step)
        n_trees = 3 if is_test else self.draw_n_trees(step, deepest)
        order = "random" if is_test else args.order
        return self.draw(B, n_trees, deepest, order, g)

    def draw(self, B, n_trees, deepest, order, g):
        """B texts of n_trees trees no deeper than `deepest` edges -> as make_batch."""
        parent, depth = draw_trees(B, n_trees, self.nodes // n_trees, deepest, g)
        # The nodes of tree i are first[i], first[i] + 1, ... A random name for each.
        first = torch.arange(n_trees, device=g.device)[:, None] * parent.shape[2]    # (n_trees, 1)
        name = random_order(B, self.nodes, g)                                  # (B, nodes)
        parent_name = name.gather(1, (parent + first).flatten(1))
        root = first.expand(parent.shape[1:]).flatten()                        # (nodes,)
        root_name = name.gather(1, root.expand(B, -1))
        depth = depth.flatten(1)                                               # (B, nodes)
        edges = torch.stack([name, parent_name], -1)                           # (B, nodes, 2)
        place = torch.rand(B, self.nodes, generator=g, device=g.device)
        if order == "mixed":
            kind = torch.randint(-1, 2, (B, 1), generator=g, device=g.device)
            place = place + kind * depth           # 1: parents first, 0: random, -1: children first
        order = place.argsort(1)
        asked = random_order(B, self.nodes, g)
        edges = edges.gather(1, order[..., None].expand_as(edges)).flatten(1)
        tokens = torch.cat([edges, name.gather(1, asked)], 1)
        return tokens, root_name.gather(1, asked), depth.gather(1, asked)

    def deepest_in_training(self, step):
        depth = self.args.depth
        growing = self.args.deeper * self.args.steps
        if step >= growing:
            return depth
        share = step / growing
        if self.args.growth == "doubling":
            return 2 ** int(depth.bit_length() * share)        # 1, 2, 4, .., none above depth
        return 1 + int(depth * share)

    def draw_n_trees(self, step, deepest):
        """A number of trees that divides the nodes and leaves each tree deep enough."""
        fits = []
        for n_trees in range(3, self.nodes):
            if self.nodes % n_trees == 0 and self.nodes // n_trees > deepest:
                fits.append(n_trees)
        return random.Random(self.seed * 10 ** 9 + step).choice(fits)

    def score(self, tokens, targets, logits, depths):
        """Accuracy by the depth of the node that is asked for; roots are not counted."""
        right = (logits.argmax(-1) == targets).float()
        accuracy = {}
        for depth in range(1, self.args.test_depth + 1):
            accuracy[str(depth)] = right[depths == depth].mean().item()
        return dict(accuracy=accuracy)

    def show(self, tokens, targets):
        n_edge_tokens = 2 * self.nodes
        pairs = tokens[:n_edge_tokens].view(-1, 2).tolist()
        edges = ", ".join(f"{node} -> {parent}" for node, parent in pairs)
        answers = zip(tokens[n_edge_tokens:].tolist(), targets.tolist())
        return f"  {edges}\n  roots: " + ", ".join(f"{node}: {root}" for node, root in answers)


def random_order(B, n, g):
    """B random orders of 0 to n - 1: (B, n)."""
    return torch.rand(B, n, generator=g, device=g.device).argsort(1)


def draw_trees(B, n_trees, n, deepest, g):
    """Trees of n nodes, node 0 the root -> parents and depths, (B, n_trees, n) each.

    In each tree nodes 0 to D are a path, with D from 1 to `deepest`; each other node hangs on any
    node before it that lies above depth D.
    """
    D = 1 + (torch.rand(B, 1, generator=g, device=g.device) * deepest).long()
    D = D.expand(B, n_trees)
    parent = torch.zeros(B, n_trees, n, dtype=torch.long, device=g.device)
    depth = torch.zeros_like(parent)
    for i in range(1, n):
        lot = torch.rand(B, n_trees, i, generator=g, device=g.device)
        above_D = depth[..., :i] < D[..., None]
        drawn = (lot * above_D).argmax(-1)                     # (B, n_trees)
        parent[..., i] = torch.where(i <= D, i - 1, drawn)
        depth[..., i] = 1 + depth.gather(2, parent[..., i:i + 1]).squeeze(-1)
    return parent, depth


@program
def main(argv):
    from lab.experiments.registry import train             # it imports this file
    train("trees", argv)


if __name__ == "__main__":
    main()
