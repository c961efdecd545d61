"""Rule 110, an elementary cellular automaton (Sections 4 and 6.1, Figure 2)

A sequence shows a few random tapes of W cells on a ring: cells as tokens, one tape a window. Then
come a separator and one label a tape. The label is the tape's first cell after t steps of the rule.
Every tape is evicted before the first label is asked for. The tapes take the same space for every
t, but a larger t is a deeper question. (Up to t = W / 2 it also makes more cells matter.)

    0 1 1 0 | 1 0 0 1 | =  y1        inputs of two tapes of W = 4 cells, three windows
                        y1 y2        targets of the last window

    python train_ca.py                            N = 1 against N = 3, minutes on two CPU cores
    python train_ca.py --preset paper             Section 6.1's model and data, for a GPU

Our choice: the tape is a ring. Between borders of zeros, the first cell would be 1 for all but one in
8,192 tapes as soon as t is 12, so there would be nothing to ask.
"""
from functools import cache

import torch

import sleep

PRESETS = {
    "cpu": dict(N=[1, 3], rule=110, t=6, W=16, tapes=2, split=0, L=16, layout="as",
                d_model=64, n_head=2, steps=500, batch_size=256, lr_muon=7e-3, lr_adamw=3e-3,
                cooldown=0.2, eval_every=50),
    "gpu": dict(N=[1, 2, 4], rule=110, t=12, W=24, tapes=4, split=0, L=24, layout="asas",
                d_model=256, n_head=4, steps=2000, batch_size=512, lr_muon=2e-3, lr_adamw=5e-4,
                eval_every=100),
    "paper": dict(N=[1, 2, 3, 4], rule=110, t=32, W=24, tapes=4, split=0, L=24,
                  layout="asas", d_model=256, n_head=4, steps=80_000, batch_size=512, lr_muon=2e-3,
                  lr_adamw=5e-5, eval_every=400, conv="s"),
}
FLAGS = dict(
    rule="elementary rule 0-255; 90 is the control",
    t="steps of the rule: the depth of the question",
    W="cells of a ring",
    tapes="tapes in a sequence",
    split="a number that chooses the patterns kept for the test")
LIMITS = dict(rule=(0, 255), t=(0, 1000), W=(8, 60), tapes=(1, 100), split=(0, 999))
SEPARATOR = 2                                                  # 0 and 1 are the cells


def evolve(cells, rule, t):
    """t steps of an elementary rule on a ring; cells (..., W) of 0 and 1."""
    table = (rule >> torch.arange(8, device=cells.device)) & 1     # bit 4l + 2c + r of the rule
    for _ in range(t):
        left = cells.roll(1, -1)
        right = cells.roll(-1, -1)
        cells = table[4 * left + 2 * cells + right]
    return cells


@cache
def deciding_cells(rule, t, W):
    """The cells by whose pattern tapes are kept for the test, as a number: cell i is bit i.

    They are the cells that matter: flipping one changes the label of at least 30 % of 2^12 random
    tapes. Fewer than 7 such cells have too few patterns to hold some out: then all cells count.
    """
    g = torch.Generator().manual_seed(0)
    tapes = torch.randint(2, (2 ** 12, W), generator=g)
    labels = evolve(tapes, rule, t)[:, 0]
    cells = []
    for i in range(W):
        flipped = tapes.clone()
        flipped[:, i] = 1 - flipped[:, i]
        changed = evolve(flipped, rule, t)[:, 0] != labels
        if changed.float().mean() >= 0.3:
            cells.append(i)
    if len(cells) < 7:
        cells = range(W)
    return sum(1 << i for i in cells)


class Tapes:
    """The task, as sleep.main wants it. Tokens: 0 and 1, the cells and the labels; a separator."""
    name = "ca"
    vocab_size = 3

    def __init__(self, args, seed):
        self.rule = args.rule
        self.t = args.t
        self.W = args.W
        self.n_tapes = args.tapes
        self.split = args.split
        self.batch_size = args.batch_size
        self.seed = seed
        self.device = args.device
        sleep.check_limits(args, LIMITS)
        if (self.W * self.n_tapes) % args.L:
            raise sleep.BadInput(f"--L {args.L} must divide the {self.n_tapes} * {self.W} cells, "
                                 "so that all of them are evicted before the first label.")
        self.T = self.n_tapes * self.W + 1 + (self.n_tapes - 1)        # see make_batch
        self.deciding = deciding_cells(self.rule, self.t, self.W)
        self.test = self.make_batch(-1)
        self.chance = self.best_constant(self.test[1])
        if self.chance["exact"] == 1:
            raise sleep.BadInput("every label of the test is the same, so there is nothing to learn: "
                                 "take another --rule or --t.")

    def best_constant(self, labels):
        """The score of the best constant guess: for `exact` one row, for `bit` one label a tape.

        labels (B, tapes)
        """
        _, counts = labels.unique(dim=0, return_counts=True)
        ones = labels.float().mean(0)                          # share of ones, tape by tape
        return dict(exact=counts.max().item() / len(labels),
                    bit=ones.maximum(1 - ones).mean().item())

    def held_out(self, tape):
        """Is a tape (any shape, numbers whose bit i is cell i) for the test? -> bool, same shape

        About one in eight of the patterns of the cells that matter is kept for it, with all tapes
        that show it. So the test asks new questions, unless fewer than 7 cells matter.
        """
        x = tape & self.deciding
        x = (x ^ (x >> 30)) + self.split * 0x9E3779B9
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):     # the mixing of MurmurHash3
            x = x ^ ((x & 0xFFFFFFFF) >> shift)
            x = (x * factor) & 0xFFFFFFFF
        x = x ^ (x >> 16)
        return x < 2 ** 29                                     # of 2^32

    def make_batch(self, step):
        """Step -> tokens (B, T), targets (B, tapes), from seed and step alone; -1 is the test."""
        test = step < 0
        B = 2048 if test else self.batch_size
        draws = 256 if test else 16
        g = torch.Generator(self.device)
        g.manual_seed(0 if test else self.seed * 10 ** 9 + step + 1)
        # Of many draws the first one on the right side is taken. If an eighth is kept for the test,
        # all are on the wrong side with a probability below 1e-14.
        tape = torch.randint(1 << self.W, (B, self.n_tapes, draws), generator=g, device=self.device)
        right_side = self.held_out(tape) == test
        if test and not right_side.any(-1).all():
            raise sleep.BadInput(f"--split {self.split} keeps too few patterns for the test: take "
                                 "another.")
        first = right_side.int().argmax(-1, keepdim=True)
        tape = tape.gather(-1, first)                          # (B, tapes, 1)
        cells = (tape >> torch.arange(self.W, device=self.device)) & 1         # (B, tapes, W)
        labels = evolve(cells, self.rule, self.t)[..., 0]      # (B, tapes)
        separator = torch.full_like(labels[:, :1], SEPARATOR)
        tokens = torch.cat([cells.flatten(1), separator, labels[:, :-1]], 1)
        return tokens, labels

    def score(self, tokens, labels, logits):
        """Share of sequences with all labels right, and of labels. logits (B, tapes, 3)"""
        right = logits.argmax(-1) == labels                    # (B, tapes)
        return dict(exact=right.all(1).float().mean().item(), bit=right.float().mean().item())

    def show(self, tokens, labels):
        """One example as text. tokens (T,), labels (tapes,)"""
        lines = []
        for i, label in enumerate(labels.tolist()):
            tape = tokens[i * self.W: (i + 1) * self.W].tolist()
            cells = "".join(str(cell) for cell in tape)
            lines.append(f"  {cells}  first cell after {self.t} steps of rule {self.rule}: {label}")
        return "\n".join(lines)


if __name__ == "__main__":
    sleep.main(__doc__, PRESETS, FLAGS, Tapes)
