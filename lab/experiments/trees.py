"""Roots: a question whose depth is in the data, not in a token. Does more sleep answer deeper ones?

Three trees of equal size; every node points to its parent, a root to itself. The edges stand in random
order in one window, and are evicted; then each node is asked for: which root does it lead to? Who knows
no more than the roots is right once in three times. (With three trees only, training was stuck at that
guess. So it has three to twelve, the more the smaller: there the guess is worth less.) In training no
node lies deeper than `depth` edges, in the test up to `test_depth`: a model that steps from parent to
parent can go on for as long as it sleeps.

    3 1  1 1  0 3  2 2  4 0  5 2 ..   | 4 0 5 ..       edges (node, parent), questions; answers 1 1 2 ..

    python -m lab.forest                   train with 4 passes, test with up to 16
"""
import random

import torch

import sleep

PRESETS = {"cpu": dict(N=[4], size=8, depth=3, test_depth=7, deeper=0.3, L=48, layout="as", d_model=96,
                       n_head=1, steps=2000, batch_size=32, lr_muon=1e-2, lr_adamw=4e-3, cooldown=0.4,
                       N_test=[1, 2, 3, 4, 6, 8, 12, 16])}
FLAGS = dict(size="nodes of each of the test's three trees",
             depth="edges from the deepest node to its root, in training",
             test_depth="the same, in the test",
             deeper="first share of the steps, in which the depth grows from 1")


class Forests:
    """The task, as sleep.main wants it."""
    name = "forest"

    def __init__(self, args, seed):
        self.args, self.seed, self.nodes = args, seed, 3 * args.size
        self.vocab_size, self.T = self.nodes, 3 * self.nodes
        if not (2 <= args.size <= 1000 and 1 <= args.depth <= args.test_depth < args.size
                and 0 <= args.deeper <= 1):
            raise sleep.BadInput(f"--size {args.size} --depth {args.depth} --test_depth {args.test_depth} "
                                 f"--deeper {args.deeper}: take 2 to 1,000 nodes, depths from 1 to less "
                                 "than that, the test's not smaller, and a share from 0 to 1.")
        if (2 * self.nodes) % args.L:
            raise sleep.BadInput(f"--L {args.L} must divide the {2 * self.nodes} tokens of the edges.")
        self.test = self.make_batch(-1)
        self.chance = dict(accuracy={str(d): 1 / 3 for d in range(1, args.test_depth + 1)})

    def make_batch(self, step):
        """Step -> tokens (B, T), targets (B, nodes), depths (B, nodes) of what is asked; -1: the test."""
        args, test, nodes = self.args, step < 0, self.nodes
        g = torch.Generator(args.device).manual_seed(0 if test else self.seed * 10 ** 9 + step + 1)
        rand = lambda *shape: torch.rand(*shape, generator=g, device=args.device)
        B, growing = (1024 if test else args.batch_size), args.deeper * args.steps
        deepest = args.test_depth if test else args.depth
        if not test and step < growing:
            deepest = 1 + int(deepest * step / growing)
        fits = [trees for trees in range(3, nodes) if nodes % trees == 0 and nodes // trees > deepest]
        trees = 3 if test else random.Random(self.seed * 10 ** 9 + step).choice(fits)
        n = nodes // trees                                     # nodes of a tree
        # In each tree nodes 0 to D are a path; the others hang on any node before them above depth D.
        D = 1 + (rand(B, 1) * deepest).long().expand(B, trees)                 # (B, trees)
        parent = torch.zeros(B, trees, n, dtype=torch.long, device=args.device)
        depth = torch.zeros_like(parent)
        for i in range(1, n):
            free = rand(B, trees, i) * (depth[..., :i] < D[..., None])
            parent[..., i] = torch.where(i <= D, i - 1, free.argmax(-1))
            depth[..., i] = 1 + depth.gather(2, parent[..., i:i + 1]).squeeze(-1)
        first = torch.arange(trees, device=args.device)[:, None] * n           # (trees, 1)
        name = rand(B, nodes).argsort(1)                                       # of node first + i
        parent = name.gather(1, (parent + first).flatten(1))
        root = name.gather(1, first.expand(trees, n).flatten().expand(B, -1))
        edges = torch.stack([name, parent], -1)                                # (B, nodes, 2)
        order, asked = rand(B, nodes).argsort(1), rand(B, nodes).argsort(1)
        edges = edges.gather(1, order[..., None].expand_as(edges)).flatten(1)
        tokens = torch.cat([edges, name.gather(1, asked)], 1)
        return tokens, root.gather(1, asked), depth.flatten(1).gather(1, asked)

    def score(self, tokens, targets, logits, depth):
        """Accuracy by the depth of the node that is asked for; roots are not counted."""
        right = (logits.argmax(-1) == targets).float()
        return dict(accuracy={str(d): right[depth == d].mean().item()
                              for d in range(1, self.args.test_depth + 1)})

    def show(self, tokens, targets):
        edges = ", ".join(f"{a} -> {b}" for a, b in tokens[:2 * self.nodes].view(-1, 2).tolist())
        asked = zip(tokens[2 * self.nodes:].tolist(), targets.tolist())
        return f"  {edges}\n  roots: " + ", ".join(f"{node}: {root}" for node, root in asked)


if __name__ == "__main__":
    from lab import experiments
    sleep.main(*experiments.load_task("forest"))
