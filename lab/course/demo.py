"""Watch a trained model sleep over the edges of a cycle, and answer when they are gone.

    python sleep.py                              a cycle drawn from seed 0
    python sleep.py --seed 7                     another one
    python sleep.py --edges "0>3 3>1 1>2 ..."    your own, in the order in which they are read
    python sleep.py --trees                      a sleep that jumps, over three trees
    python sleep.py --checkpoint out/khop-cpu-0102-030405/N3-seed0.pt        your own model

The model that ships, lab/models/khop-N3.pt, was trained with N = 3 passes by
`python train_khop.py --N 3 --compile`.
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
from lab.common import LAB, parser, program
from lab.course import demo_trees

SHIPPED = LAB / "models" / "khop-N3.pt"
TREES = LAB / "models" / "trees-N7.pt"


class Frame(NamedTuple):
    """A model after pass n of the sleep over a window; n = 0: before the first one."""
    window: int
    n: int
    S: list                # of every SSM block, (H, V, K)
    h_moved: float         # by this pass: |h - before| / |h|
    S_moved: float         # the same of S
    answers: torch.Tensor  # probabilities if it were asked now, (K hops, nodes, nodes)


# ------------------------------------------------------------------------------------------------
# The model, and the edges that it reads

def load(path):
    """The model and the task of a checkpoint of train_khop.py; BadInput if it is none."""
    if not Path(path).is_file():
        raise sleep.BadInput(f"there is no checkpoint {path}.")
    try:
        saved = sleep.read_checkpoint(Path(path))
        if saved["run"]["task"] != "khop":
            raise ValueError
        settings = sleep.DEFAULTS | saved["run"]["settings"] | dict(device="cpu", batch_size=1)
        task = train_khop.Cycles(Namespace(**settings), settings["seed"])
        values = {flag: settings[flag] for flag in sleep.MODEL_FLAGS}
        model = sleep.SleepLM(sleep.Config(task.vocab_size, task.T, **values))
        model.load_state_dict(saved["model"])
    except Exception:                 # another file, a dict of other keys, a model of other shapes
        raise sleep.BadInput(f"{path} is no checkpoint of train_khop.py, or a damaged one: train "
                             "one with `python train_khop.py --N 3`.") from None
    if not all(p.isfinite().all() for p in model.parameters()):
        raise sleep.BadInput(f"{path}: a weight of this model is not finite.")
    if task.feed or model.cfg.eviction != "hard":
        raise sleep.BadInput(f"{path}: only models with hard eviction are shown, without answers "
                             "in the input (--feed).")
    return model, task


def read_edges(text, n):
    """"0>3 3>1 ..." -> [(0, 3), (3, 1), ...]; BadInput if it is not one cycle of n nodes."""
    try:
        edges = [tuple(map(int, edge.split(">"))) for edge in text.replace(",", " ").split()]
        after = dict(edges)
    except ValueError:
        raise sleep.BadInput(f"--edges {text!r}: write them as \"0>3 3>1\".") from None
    sources = [a for a, _ in edges]
    for node in [node for edge in edges for node in edge]:
        if not 0 <= node < n:
            raise sleep.BadInput(f"--edges: there is no node {node}; this model knows 0 to "
                                 f"{n - 1}.")
    for node in range(n):
        if sources.count(node) > 1:
            raise sleep.BadInput(f"--edges: node {node} points to two nodes; on a cycle it has "
                                 "one.")
        if node not in after:
            raise sleep.BadInput(f"--edges: no edge starts at node {node}; the cycle has all {n}.")
    node = after[0]
    length = 1
    while node != 0 and length <= n:
        node = after[node]
        length += 1
    if length != n:
        how = f"is back after {length} steps." if node == 0 else "never comes back."
        raise sleep.BadInput(f"--edges: these are not one cycle of {n} nodes, since the walk from "
                             f"0 {how}")
    return edges


def draw_edges(seed, n):
    """A random cycle of n nodes, its edges in random order."""
    rng = random.Random(seed)
    name = rng.sample(range(n), n)
    following = name[1:] + name[:1]
    return rng.sample(list(zip(name, following)), n)


def spell(task, edges):
    """Edges -> the tokens before the questions, (1, context)."""
    tokens = [train_khop.PAD] * task.pad
    for a, b in edges:
        source = task.node + a
        target = task.node + b
        if task.words:
            tokens += [source, train_khop.ARROW, target, train_khop.COMMA]
        else:
            tokens += [source, target]
    return torch.tensor([tokens])


def spell_questions(task, k, q):
    """k hops after q, both (rows, questions) -> tokens (rows, questions, tokens of a question)."""
    k_token = train_khop.ONE + k
    q_token = task.node + q
    if not task.words:
        return train_khop.phrase(k_token, q_token)
    return train_khop.phrase(k_token, train_khop.HOPS, train_khop.AFTER, q_token, train_khop.COLON)


def right_answers(edges, K):
    """(K, nodes): the node k hops after every node."""
    after = dict(edges)
    rows = [sorted(after)]
    for _ in range(K):
        rows.append([after[node] for node in rows[-1]])
    return torch.tensor(rows[1:])


# ------------------------------------------------------------------------------------------------
# Asleep, and asked

@torch.no_grad()
def ask(model, task, S):
    """All questions to fast weights S, one pass a sequence -> probabilities (K, nodes, nodes)."""
    K = task.K
    n = task.nodes
    # A row of questions holds every node once and mixes the k, as in training.
    k = (torch.arange(n) + torch.arange(K)[:, None]) % K       # (K rows, nodes), from 0
    probabilities = []
    for first in range(0, n, task.M):      # as many questions in a sequence as in training
        q = torch.arange(first, min(first + task.M, n))
        questions = spell_questions(task, k[:, q], q.expand(K, -1))        # (K, questions, tokens)
        memory = model.empty_memory(K)
        memory = memory._replace(S=[None if x is None else x.expand(K, -1, -1, -1) for x in S])
        logits = []
        for window in questions.flatten(1).split(model.cfg.L, 1):
            window_logits, memory = model.wake(model.embed(window), memory)
            memory = model.evict(memory)
            logits.append(window_logits)
        length = questions.shape[2]
        at_last_token = torch.cat(logits, 1)[:, length - 1::length]         # (K, questions, vocab)
        nodes = at_last_token[..., task.node:task.node + n]
        probabilities.append(nodes.softmax(-1))
    rows = torch.cat(probabilities, 1)                         # (K rows, nodes, nodes)
    by_hops = []
    for hops in range(K):
        row = (k == hops).int().argmax(0)                      # where each node was asked so far
        by_hops.append(rows[row, torch.arange(n)])
    return torch.stack(by_hops)


@torch.no_grad()
def passes(model, h, memory, N):
    """[(h, S) after each pass] of a sleep over a window, and the memory after the eviction."""
    seen = []
    one_pass = model.one_pass

    def recorded(*args):
        h, S, cache = one_pass(*args)
        seen.append((h, S))
        return h, S, cache

    model.one_pass = recorded
    try:
        memory = model.sleep(h, memory, N)
    finally:
        del model.one_pass                 # the method of the class again
    return seen, memory


def length_of(tensors):
    return torch.cat([x.flatten() for x in tensors]).norm()


def watch(model, task, tokens, N):
    """The frames of a sleep with N passes a window, and the memory after the last eviction."""
    memory = model.empty_memory(1)
    frames = []
    for i, window in enumerate(tokens.split(model.cfg.L, 1)):
        with torch.no_grad():
            h = model.embed(window)
        S = [x for x in memory.S if x is not None]
        frames.append(Frame(i, 0, [x[0] for x in S], 0, 0, ask(model, task, memory.S)))
        seen, memory = passes(model, h, memory, N)
        for n, (new_h, new_S) in enumerate(seen, 1):
            answers = ask(model, task, new_S)
            new_S = [x for x in new_S if x is not None]
            h_moved = length_of([new_h - h]) / length_of([new_h])
            S_moved = length_of([now - before for now, before in zip(new_S, S)]) / length_of(new_S)
            written = [x[0] for x in new_S]
            frames.append(Frame(i, n, written, h_moved.item(), S_moved.item(), answers))
            h = new_h
            S = new_S
    return frames, memory


# ------------------------------------------------------------------------------------------------
# What is printed

def hops(k):
    return f"{k} hop" if k == 1 else f"{k} hops"


def show(model, task, edges, color):
    """Print a sleep, pass by pass, and what is left of it."""
    n = task.nodes
    N = model.cfg.N
    print(f"The edges of a cycle of {n} nodes, as the model reads them:\n\n  "
          + "  ".join(f"{a}>{b}" for a, b in edges) + "\n")
    tokens = spell(task, edges)
    truth = right_answers(edges, task.K)
    frames, memory = watch(model, task, tokens, N)
    print(f"Which node is k hops after another one? {'Green' if color else '[ ]'} is right; "
          f"chance is one in {n - 1}.\nThe model sleeps over each window of {model.cfg.L} tokens, "
          f"{N} pass{'es' * (N > 1)}; each rewrites h, the tokens' features,\nand S, its memory. "
          "What it answers if it is asked after a pass:")
    n_windows = frames[-1].window + 1
    for frame in frames:
        if frame.n > 0:
            print_frame(frame, n_windows, truth, color)
    print_evicted(model, task, tokens, truth, memory)


def print_frame(frame, n_windows, truth, color):
    n = truth.shape[1]
    where = f"window {frame.window + 1} of {n_windows}, " if n_windows > 1 else ""
    print(f"\n{where}after pass {frame.n}")
    print("  after node " + "".join(f"{q:5}" for q in range(n)) + "     right")
    rows = zip(frame.answers.argmax(-1).tolist(), truth.tolist())
    for k, (answers, right_nodes) in enumerate(rows, 1):
        cells = []
        n_right = 0
        for answer, right_node in zip(answers, right_nodes):
            is_right = answer == right_node
            n_right += is_right
            cells.append(mark(answer, color) if is_right else f"{answer:5}")
        print(f"  {hops(k):10} {''.join(cells)}     {n_right:2} of {n}")
    print(f"  this pass has changed h by {frame.h_moved:.0%} of its norm, S by {frame.S_moved:.0%}")


def mark(node, color):
    return f"\033[1;32m{node:5}\033[0m" if color else f"[{node}]".rjust(5)


def print_evicted(model, task, tokens, truth, memory):
    """What is right when only S is left, and of S from other sleeps."""
    n = task.nodes
    N = model.cfg.N
    S = memory.S
    numbers = sum(x.numel() for x in S if x is not None)
    print(f"\nevicted: {tokens.shape[1]} tokens are gone; what is left is S, {numbers:,} numbers. "
          "Asked now, in one pass:\n")
    print("  right of " + f"{n:<24}" + "".join(f"{hops(k):>9}" for k in range(1, task.K + 1)))
    zero = [None if x is None else torch.zeros_like(x) for x in S]
    rows = [(f"slept for {N} passes, as trained", S), ("the same, S set to zero", zero)]
    for passes_now in (1, 2 * N):
        _, after = watch(model, task, tokens, passes_now)
        rows.append((f"this model slept for N = {passes_now}", after.S))
    for words, S in rows:
        right = (ask(model, task, S).argmax(-1) == truth).sum(1).tolist()
        print(f"  {words:33}" + "".join(f"{x:9}" for x in right))


@program
def main(argv):
    p = parser(__doc__)
    p.prog = "sleep.py"
    p.add_argument("--seed", type=int, default=0, help="of the cycle, or of the trees")
    p.add_argument("--edges", help='a cycle of your own, "0>3 3>1 ...", as it is read')
    p.add_argument("--trees", nargs="?", const="random", choices=demo_trees.ORDERS,
                   help="three trees in the place of a cycle, with their edges in this order "
                        "(random; parents or children first)")
    p.add_argument("--checkpoint", type=Path,
                   help="default: lab/models/khop-N3.pt, with --trees trees-N7.pt")
    p.add_argument("--no_color", action="store_true", help="mark right answers by brackets")
    args = p.parse_args(argv)
    torch.set_num_threads(1)               # so small a model is no faster with more
    color = sys.stdout.isatty() and not args.no_color and "NO_COLOR" not in os.environ
    if args.trees:
        if args.edges:
            raise sleep.BadInput("--trees takes no --edges: it draws its own, from --seed.")
        demo_trees.show(args.checkpoint or TREES, args.seed, args.trees,
                        lambda number: mark(number, color))
        return
    model, task = load(args.checkpoint or SHIPPED)
    if args.edges is None:
        edges = draw_edges(args.seed, task.nodes)
    else:
        edges = read_edges(args.edges, task.nodes)
    show(model, task, edges, color)


if __name__ == "__main__":
    main()
