"""Which node does a model say? How far along the way is it?

    python -m lab.experiments.which_node out/experiments/khop/*.pt --out which_node.png
    python -m lab.experiments.which_node out/experiments/trees/N4-seed?.pt --N 4 6 8
    python -m lab.experiments.which_node --draw lab/results/khop-reach.json           draw it again

A right answer lies so many edges from the node that is asked about. Walks the edges of the test
from there, and counts at which one the model's answer lies, right or wrong. Checkpoints that were
trained with the same N share a panel. Writes a picture and, beside it, its numbers.
"""
from pathlib import Path

import torch

import sleep
from lab.common import (TASK_WORDS, check_output, mean, parser, picture_of, program, read_results,
                        write_results)
from lab.experiments import when_to_wake
from lab.experiments.plots import figure, save_figure, write_in_cell

SMALL = 0.005                              # a share below it is not written


def walk(tokens, n, start, end):
    """Edges from node `start` to node `end` (both (B, M)); n if the walk never comes there.

    tokens (B, ...) begin with n edges, two tokens each: source, target. A node has one edge.
    """
    source, target = tokens[:, :2 * n].unflatten(1, (n, 2)).unbind(-1)
    after = torch.zeros(len(tokens), tokens.max() + 1, dtype=torch.long).scatter(1, source, target)
    edges = torch.full_like(start, n)
    node = start
    for i in range(n):
        arrived_now = (node == end) & (edges == n)
        edges = torch.where(arrived_now, i, edges)
        node = after.gather(1, node)
    return edges


@torch.no_grad()
def measure(model, task, N):
    """{edges to the right answer: shares of answers that lie 0, ..., n - 1 edges away, or else}"""
    tokens, targets = task.test[:2]
    n = task.nodes
    asked = (targets >= 0)[0].nonzero().squeeze(1)             # the same places in every sequence
    start = tokens[:, -targets.shape[1]:][:, asked]
    right_answer = targets[:, asked]
    answer = model(tokens, targets, N=N)[0].argmax(-1)[:, asked]
    to_right_answer = walk(tokens, n, start, right_answer)
    to_answer = walk(tokens, n, start, answer)
    shares = {}
    for k in to_right_answer.unique().tolist():
        of_k = to_answer[to_right_answer == k]
        shares[str(k)] = [(of_k == i).float().mean().item() for i in range(n + 1)]
    return shares


def draw(runs, path):
    """A panel a run: downwards what is asked, to the right what is said."""
    size = (max(4.2 * len(runs), 6), 0.4 * len(runs[0]["share"]) + 2.2)
    fig, axes = figure(1, len(runs), size, sharey=True)
    columns = 1                            # up to the farthest node that is said
    for run in runs:
        for row in run["share"].values():
            far = [i for i, share in enumerate(row[:-1]) if share >= SMALL]
            columns = max([columns, *(i + 1 for i in far)])
    for ax, run in zip(axes[0], runs):
        rows = [[*row[:columns], sum(row[columns:])] for row in run["share"].values()]
        image = ax.imshow(rows, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for y, row in enumerate(rows):
            for x, share in enumerate(row):
                if share >= SMALL:
                    write_in_cell(ax, x, y, f"{share:.2f}", share, 7)
        ax.set_xticks(range(columns + 1), [*range(columns), "else"])
        ax.set_yticks(range(len(rows)), run["share"])
        ax.set_title(f"trained with N = {run['trained']}, tested with {run['passes']}", fontsize=10)
        ax.set_xlabel("edges to the node that is said")
        ax.grid(False)
    axes[0, 0].set_ylabel("edges to the right answer")
    fig.colorbar(image, ax=axes[0, -1], label="share of answers")
    fig.suptitle(f"{TASK_WORDS[runs[0]['task']][0]}: how far along the way is the node that a "
                 "model says?\nmean of seeds "
                 f"{', '.join(map(str, runs[0]['seeds']))}", fontsize=10)
    save_figure(fig, path)


def load_models(paths):
    """{N in training: [(seed, model, task)]}, each checkpoint once; BadInput if they do not fit."""
    kinds = {}
    first_task = None
    for path in dict.fromkeys(path.resolve() for path in paths):
        model, task = when_to_wake.load(path)
        if model.cfg.L != 2 * task.nodes:                      # words, or padding
            raise sleep.BadInput(f"{path}: its window holds more than edges; take a model of a "
                                 "cpu preset.")
        first_task = first_task or task
        if not torch.equal(task.test[0], first_task.test[0]):
            raise sleep.BadInput(f"{path} has another test than {paths[0]}: take models of one "
                                 "task, with the same settings of it.")
        kinds.setdefault(model.cfg.N, []).append((task.seed, model, task))
    return dict(sorted(kinds.items()))


def measure_all(kinds, passes):
    """Runs, one for each N in training and N at the test (passes; None: as in training)."""
    runs = []
    for trained, models in kinds.items():
        for N in dict.fromkeys(passes or [trained]):
            by_seed = [measure(model, task, N) for _, model, task in models]
            share = {}
            for k in by_seed[0]:
                share[k] = [mean(values) for values in zip(*(shares[k] for shares in by_seed))]
            runs.append(dict(task=models[0][2].name, trained=trained, passes=N,
                             seeds=sorted(seed for seed, *_ in models), share=share))
    return runs


def print_run(run):
    print(f"trained with N = {run['trained']}, tested with {run['passes']}: of the answers to "
          "what lies k edges away")
    for k, row in run["share"].items():
        texts = [f"{i}: {share:.2f}" for i, share in enumerate(row[:-1]) if share >= SMALL]
        print(f"  k = {k}: so many lie so far:  {'  '.join(texts)}  elsewhere: {row[-1]:.2f}")


def redraw(file, out):
    check_output(out, ".png")
    runs = read_results(file).get("runs", [])
    if not runs or any({"task", "trained", "passes", "seeds", "share"} - set(run) for run in runs):
        raise sleep.BadInput(f"{file} holds no numbers of lab.experiments.which_node.")
    draw(runs, out)
    print(f"saved: {out}")


@program
def main(argv):
    p = parser(__doc__)
    p.add_argument("checkpoint", type=Path, nargs="*")
    p.add_argument("--N", type=int, nargs="+", help="passes at the test; default: as in training")
    p.add_argument("--out", type=Path, help="the picture; default: out/which_node.png")
    p.add_argument("--draw", type=Path, metavar="FILE",
                   help="draw a file of numbers; nothing is measured")
    args = p.parse_args(argv)
    if args.draw:
        redraw(args.draw, args.out or picture_of(args.draw))
        return
    out = args.out or Path("out/which_node.png")
    if not args.checkpoint:
        raise sleep.BadInput("name at least one checkpoint, or --draw and a file of numbers.")
    if args.N and not 0 <= min(args.N) <= max(args.N) <= 1000:
        raise sleep.BadInput(f"--N {' '.join(map(str, args.N))} must be from 0 to 1,000.")
    check_output(out, ".png")
    kinds = load_models(args.checkpoint)
    runs = measure_all(kinds, args.N)
    for run in runs:
        print_run(run)
    write_results(out.with_suffix(".json"), dict(runs=runs))
    draw(runs, out)
    print(f"saved: {out.with_suffix('.json')}, {out}")


if __name__ == "__main__":
    main()
