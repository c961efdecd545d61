"""How far along the way is the node that a model says?

    python -m lab.reach out/experiments/khop/*.pt --out lab/khop-reach.png
    python -m lab.reach out/experiments/forest/N4-seed?.pt --N 4 6 8        passes at the test

A right answer lies so many edges from the node that is asked about. Walks the edges of the test from
there, and counts at which one the model's answer lies, right or wrong. Checkpoints that were trained with
the same N share a panel. Writes a picture and, beside it, its numbers.
"""
import json
from pathlib import Path

import torch

import sleep
from lab import wake
from lab.plot import TASKS, figure, parser, save_figure


def walk(tokens, n, start, end):
    """Edges from node `start` to node `end` (both (B, M)); n if the walk never comes there.

    tokens (B, ...) begin with n edges, two tokens each: source, target. A node has one edge.
    """
    source, target = tokens[:, :2 * n].unflatten(1, (n, 2)).unbind(-1)
    after = torch.zeros(len(tokens), tokens.max() + 1, dtype=torch.long).scatter(1, source, target)
    edges = torch.full_like(start, n)
    for i in range(n):
        edges = torch.where((start == end) & (edges == n), i, edges)
        start = after.gather(1, start)
    return edges


@torch.no_grad()
def measure(model, task, N):
    """{edges to the right answer: shares of answers that lie 0, 1, ..., n - 1 edges away, or elsewhere}"""
    tokens, targets = task.test[:2]
    n, M = task.nodes, targets.shape[1]
    asked = (targets >= 0)[0].nonzero().squeeze(1)             # the same places in every sequence
    start, end = tokens[:, -M:][:, asked], targets[:, asked]
    said = model(tokens, targets, N=N)[0].argmax(-1)[:, asked]
    right, there = walk(tokens, n, start, end), walk(tokens, n, start, said)
    return {str(k): [(there[right == k] == i).float().mean().item() for i in range(n + 1)]
            for k in right.unique().tolist()}


def draw(found, path, name):
    """A panel a kind of model: downwards what is asked, to the right what is said."""
    fig, axes = figure(1, len(found), (max(4.2 * len(found), 6), 0.4 * len(found[0]["share"]) + 2.2), sharey=True)
    ends = 1 + max(i for x in found for row in x["share"].values() for i, share in enumerate(row[:-1])
                   if share >= 0.005)
    for ax, x in zip(axes[0], found):
        rows = [[*row[:ends], sum(row[ends:])] for row in x["share"].values()]
        image = ax.imshow(rows, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for y, row in enumerate(rows):
            for i, share in enumerate(row):
                if share >= 0.005:         # what is less than 0.01 stays dark
                    ax.text(i, y, f"{share:.2f}", ha="center", va="center", fontsize=7,
                            color="w" if share < 0.6 else "k")
        ax.set_xticks(range(ends + 1), [*range(ends), "else"])
        ax.set_yticks(range(len(rows)), x["share"])
        ax.set(title=f"trained with N = {x['trained']}, tested with {x['passes']}",
               xlabel="edges to the node that is said")
        ax.grid(False)
    axes[0, 0].set_ylabel("edges to the right answer")
    fig.colorbar(image, ax=axes[0, -1], label="share of answers")
    fig.suptitle(f"{TASKS[name][0]}: how far along the way is the node that a model says?\n"
                 f"mean of seeds {', '.join(map(str, found[0]['seeds']))}", fontsize=10)
    save_figure(fig, path)


def main(argv=None):
    p = parser(__doc__)
    p.add_argument("checkpoint", type=Path, nargs="+")
    p.add_argument("--N", type=int, nargs="+", help="passes at the test; default: as in training")
    p.add_argument("--out", type=Path, default=Path("out/reach.png"), help="default: out/reach.png")
    args = p.parse_args(argv)
    kinds, first = {}, None                # {N in training: [(seed, model, task)]}, the first task
    try:
        if args.out.suffix != ".png" or args.N and min(args.N) < 0:
            raise sleep.BadInput(f"--N {args.N} --out {args.out}: take passes >= 0, and a name that ends in .png.")
        for path in args.checkpoint:
            model, task = wake.load(path)
            if model.cfg.L != 2 * task.nodes:                  # words, padding, questions in front
                raise sleep.BadInput(f"{path}: its window holds more than edges; take a model of a cpu preset.")
            first = task if first is None else first
            if not torch.equal(task.test[0], first.test[0]):
                raise sleep.BadInput(f"{path} has another test than {args.checkpoint[0]}: take models of one "
                                     "task, with the same settings of it.")
            kinds.setdefault(model.cfg.N, []).append((task.seed, model, task))
    except sleep.BadInput as e:
        p.error(e)
    found = []
    for trained, models in sorted(kinds.items(), key=lambda kind: kind[0]):
        for N in args.N or [trained]:
            shares = [measure(model, task, N) for _, model, task in models]
            share = {k: [sum(x) / len(x) for x in zip(*(s[k] for s in shares))] for k in shares[0]}
            found.append(dict(trained=trained, passes=N, seeds=sorted(seed for seed, *_ in models), share=share))
            print(f"trained with N = {trained}, tested with {N}: of the answers to what lies k edges away")
            for k, row in share.items():
                said = [f"{i}: {x:.2f}" for i, x in enumerate(row[:-1]) if x >= 0.005]
                print(f"  k = {k}: so many lie so far:  {'  '.join(said)}  elsewhere: {row[-1]:.2f}")
    sleep.write(args.out.with_suffix(".json"), lambda path: path.write_text(json.dumps(found, indent=1)))
    draw(found, args.out, first.name)
    print(f"saved: {args.out.with_suffix('.json')}, {args.out}")


if __name__ == "__main__":
    main()
