"""Watch a trained model sleep over the edges of a cycle, and answer when they are gone.

    python sleep.py                              a cycle drawn from seed 0
    python sleep.py --seed 7                     another one
    python sleep.py --edges "0>3 3>1 1>2 ..."    your own, in the order in which they are read
    python sleep.py --checkpoint out/khop-cpu-0102-030405/N3-seed0.pt        your own model

The model that ships, lab/khop-N3.pt, was trained with N = 3 passes by `python train_khop.py --N 3 --compile`.
"""
import os
import random
import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch

import sleep
import train_khop
from lab.plot import parser

SHIPPED = Path(__file__).with_name("khop-N3.pt")


class Frame(NamedTuple):
    """A model after pass n of the sleep over a window; n = 0: before the first one."""
    window: int
    n: int
    S: list                # of every SSM block, (H, V, K)
    h_moved: float         # by this pass: |h - before| / |h|
    S_moved: float         # the same of S
    answers: torch.Tensor  # probabilities if it were woken now, (K hops, nodes, nodes)


def load(path):
    """The model and the task of a checkpoint of train_khop.py; BadInput if it is none."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["run"]["task"] != "khop":
            raise ValueError
        settings = sleep.DEFAULTS | saved["run"]["settings"] | dict(device="cpu", batch_size=1)
        task = train_khop.Cycles(Namespace(**settings), settings["seed"])
        cfg = sleep.Config(task.vocab_size, task.T, **{k: settings[k] for k in sleep.MODEL_FLAGS})
        model = sleep.SleepLM(cfg)
        model.load_state_dict(saved["model"])
    except Exception as e:                 # torch.load raises many kinds
        raise sleep.BadInput(f"{path} is no checkpoint of train_khop.py ({type(e).__name__}): train "
                             "one with `python train_khop.py --N 3`.") from None
    if task.feed or task.question_first or cfg.eviction != "hard":
        raise sleep.BadInput(f"{path}: only models with hard eviction are shown, whose questions come "
                             "last and are not fed answers.")
    return model, task


def read_edges(text, n):
    """"0>3 3>1 ..." -> [(0, 3), (3, 1), ...]; BadInput if it is not one cycle of n nodes."""
    try:
        edges = [tuple(map(int, edge.split(">"))) for edge in text.replace(",", " ").split()]
        after = dict(edges)
        ends = [x for edge in edges for x in edge]
    except ValueError:
        raise sleep.BadInput(f"--edges {text!r}: write them as \"0>3 3>1\".") from None
    if strange := [x for x in ends if not 0 <= x < n]:
        raise sleep.BadInput(f"--edges: there is no node {strange[0]}; this model knows 0 to {n - 1}.")
    if twice := [a for a in after if sum(a == b for b, _ in edges) > 1]:
        raise sleep.BadInput(f"--edges: node {twice[0]} points to two nodes; on a cycle it has one.")
    if missing := [x for x in range(n) if x not in after]:
        raise sleep.BadInput(f"--edges: no edge starts at node {missing[0]}; the cycle has all {n}.")
    x, length = after[0], 1
    while x != 0 and length <= n:
        x, length = after[x], length + 1
    if length != n:
        raise sleep.BadInput(f"--edges: these are not one cycle of {n} nodes, since the walk from 0 " +
                             (f"is back after {length} steps." if x == 0 else "never comes back."))
    return edges


def draw_edges(seed, n):
    """A random cycle of n nodes, its edges in random order."""
    rng = random.Random(seed)
    name = rng.sample(range(n), n)
    return rng.sample([*zip(name, name[1:] + name[:1])], n)


def spell(task, edges):
    """Edges -> the tokens before the questions, (1, context)."""
    node = lambda x: task.node + x
    tokens = [[node(a), train_khop.ARROW, node(b), train_khop.COMMA] if task.words else
              [node(a), node(b)] for a, b in edges]
    return torch.tensor([[train_khop.PAD] * task.pad + sum(tokens, [])])


@torch.no_grad()
def ask(model, task, S):
    """All questions to fast weights S, one pass a sequence -> probabilities (K, nodes, nodes)."""
    K, n, L, found = task.K, task.nodes, model.cfg.L, []
    k = (torch.arange(n) + torch.arange(K)[:, None]) % K       # (K, nodes): mixed in every row, as in training
    for start in range(0, n, task.M):      # as many in a sequence as in training
        q = torch.arange(start, min(start + task.M, n))
        parts = [train_khop.ONE + k[:, q], (task.node + q).expand(K, -1)]
        if task.words:
            same = lambda token: torch.full_like(parts[0], token)
            parts = [parts[0], same(train_khop.HOPS), same(train_khop.AFTER), parts[1],
                     same(train_khop.COLON)]
        tokens, logits = torch.stack(parts, -1).flatten(1), []                 # (K, questions * ask)
        memory = model.empty_memory(K)._replace(
            S=[None if x is None else x.expand(K, -1, -1, -1) for x in S])
        for window in tokens.split(L, 1):
            out, memory = model.wake(model.embed(window), memory)
            memory = model.evict(memory)
            logits.append(out)
        said = torch.cat(logits, 1)[:, len(parts) - 1::len(parts)]             # at the last tokens
        found.append(said[..., task.node:task.node + n].softmax(-1))
    rows = torch.cat(found, 1)                                 # (K, nodes, nodes), k mixed
    return torch.stack([rows[(k == hops).int().argmax(0), torch.arange(n)] for hops in range(K)])


@torch.no_grad()
def passes(model, h, memory, N):
    """[(h, S) after each pass] of a sleep over a window, and the memory after the eviction."""
    seen, one_pass = [], model.one_pass

    def recorded(*args):
        result = one_pass(*args)
        seen.append(result[:2])
        return result
    model.one_pass = recorded
    try:
        return seen, model.sleep(h, memory, N)
    finally:
        model.one_pass = one_pass


def watch(model, task, tokens, N):
    """The frames of a sleep with N passes a window, and the memory after the last eviction."""
    memory, frames = model.empty_memory(1), []
    norm = lambda tensors: torch.cat([x.flatten() for x in tensors]).norm()
    for i, window in enumerate(tokens.split(model.cfg.L, 1)):
        h, S = model.embed(window), memory.S
        frames.append(Frame(i, 0, [x[0] for x in S if x is not None], 0, 0, ask(model, task, S)))
        seen, memory = passes(model, h, memory, N)
        for n, (new_h, new_S) in enumerate(seen, 1):
            change = norm([a - b for a, b in zip(new_S, S) if a is not None])
            h_moved, h, S = norm([new_h - h]) / norm([new_h]), new_h, new_S
            written = [x[0] for x in S if x is not None]
            frames.append(Frame(i, n, written, h_moved.item(), (change / norm(written)).item(),
                                ask(model, task, S)))
    return frames, memory


def right_answers(edges, K):
    """(K, nodes): the node k hops after every node."""
    after = dict(edges)
    rows = [sorted(after)]
    for _ in range(K):
        rows.append([after[x] for x in rows[-1]])
    return torch.tensor(rows[1:])


def hops(k):
    return f"{k} hop" + "s" * (k != 1)


def show(model, task, edges, color):
    """Print a sleep, pass by pass, and what is left of it."""
    n, K, N, L = task.nodes, task.K, model.cfg.N, model.cfg.L
    mark = (lambda x: f"\033[1;32m{x:5}\033[0m") if color else (lambda x: f"[{x}]".rjust(5))
    print(f"The edges of a cycle of {n} nodes, as the model reads them:\n\n  "
          + "  ".join(f"{a}>{b}" for a, b in edges) + "\n")
    tokens, truth = spell(task, edges), right_answers(edges, K)
    frames, memory = watch(model, task, tokens, N)
    print(f"Which node is k hops after another one? {'Green' if color else '[ ]'} is right; a guess is "
          f"right once in {n - 1}.\nThe model sleeps over each window of {L} tokens, {N} pass"
          f"{'es' * (N > 1)}; each rewrites h, the tokens' features,\nand S, its memory. What it would say "
          "if it were woken early:")
    for frame in frames:
        if frame.n == 0:
            continue
        where = f"window {frame.window + 1} of {frames[-1].window + 1}, " * (frames[-1].window > 0)
        print(f"\n{where}after pass {frame.n}: h moved by {frame.h_moved:.2f} of its length, S by "
              f"{frame.S_moved:.2f}\n  after node " + "".join(f"{q:5}" for q in range(n)) + "     right")
        for k, (said, wanted) in enumerate(zip(frame.answers.argmax(-1), truth), 1):
            row = "".join(mark(x) if x == y else f"{x:5}"
                          for x, y in zip(said.tolist(), wanted.tolist()))
            print(f"  {hops(k):10} {row}     {(said == wanted).sum().item():2} of {n}")
    numbers = sum(x.numel() for x in memory.S if x is not None)
    print(f"\nevicted: {tokens.shape[1]} tokens are gone; what is left is S, {numbers:,} numbers. "
          "Asked now, in one pass:\n")
    print("  right of " + f"{n:<24}" + "".join(f"{hops(k):>9}" for k in range(1, K + 1)))
    zero = [None if x is None else torch.zeros_like(x) for x in memory.S]
    tests = [(f"slept for {N} passes, as trained", memory.S), ("the same, S set to zero", zero)]
    tests += [(f"this model slept for N = {x}", watch(model, task, tokens, x)[1].S) for x in (1, 2 * N)]
    for said, S in tests:
        right = (ask(model, task, S).argmax(-1) == truth).sum(1).tolist()
        print(f"  {said:33}" + "".join(f"{x:9}" for x in right))


def main(argv=None):
    p = parser(__doc__)
    p.prog = "sleep.py"
    p.add_argument("--seed", type=int, default=0, help="of the cycle")
    p.add_argument("--edges", help='a cycle of your own, "0>3 3>1 ...", as it is read')
    p.add_argument("--checkpoint", type=Path, default=SHIPPED, help="default: lab/khop-N3.pt")
    p.add_argument("--no_color", action="store_true", help="mark right answers by brackets")
    args = p.parse_args(argv)
    torch.set_num_threads(1)               # so small a model is no faster with more
    try:
        model, task = load(args.checkpoint)
        edges = (draw_edges(args.seed, task.nodes) if args.edges is None else
                 read_edges(args.edges, task.nodes))
        show(model, task, edges, sys.stdout.isatty() and not (args.no_color or "NO_COLOR" in os.environ))
    except sleep.BadInput as e:
        p.error(e)


if __name__ == "__main__":
    main()
