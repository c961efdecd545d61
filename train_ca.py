"""Rule 110: does a deeper question need more sleep? (Sections 4 and 6.1, Figure 2)

A few random tapes of W cells on a ring, cells as tokens, one tape a window; then a separator and
one label a tape: its first cell after t steps of the rule. Every tape is evicted before the first
label is asked for. The tapes take the same room whatever t is, and the question gets deeper (until
t = W / 2 more of their cells matter, too).

    0 1 1 0 | 1 0 0 1 | = y1        inputs of two tapes of W = 4 cells, three windows
                        y1 y2       targets of the last window

    python train_ca.py                            N = 1 against N = 3, minutes on two CPU cores
    python train_ca.py --preset paper             Section 6.1's model and data, for a GPU

paper does not say: where the tape ends; here it is a ring. Between borders of zeros the first cell
would be constant from t = 12 on.
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
    split="which patterns are kept for the test: the number of a hash")


def evolve(cells, rule, t):
    """t steps of an elementary rule on a ring; cells (..., W) of 0 and 1."""
    table = (rule >> torch.arange(8, device=cells.device)) & 1     # bit 4l + 2c + r of the rule
    for _ in range(t):
        cells = table[4 * cells.roll(1, -1) + 2 * cells + cells.roll(-1, -1)]
    return cells


@cache
def deciding(rule, t, W):
    """Mask of the cells that matter: a switch of one changes the label of 30 % of 2^12 random tapes.

    Of all cells if these are fewer than 7, too few to hold patterns of them out.
    """
    tapes = torch.randint(2, (2 ** 12, W), generator=torch.Generator().manual_seed(0))
    label = lambda tapes: evolve(tapes, rule, t)[:, 0]
    before = label(tapes)
    bits = [1 << i for i, switch in enumerate(torch.eye(W, dtype=torch.long))
            if (label(tapes ^ switch) != before).float().mean() >= 0.3]
    return sum(bits) if len(bits) >= 7 else (1 << W) - 1


class Tapes:
    """The task, as sleep.main wants it. Tokens: 0, 1 the cells, 2 the separator."""
    name, vocab_size = "ca", 3

    def __init__(self, args, seed):
        self.rule, self.t, self.W, self.n_tapes = args.rule, args.t, args.W, args.tapes
        self.batch_size, self.seed, self.device = args.batch_size, seed, args.device
        self.split = args.split
        if not (0 <= self.rule <= 255 and 0 <= self.split < 1000):
            raise sleep.BadInput(f"--rule {self.rule} must be an elementary rule, 0 to 255, and "
                                 f"--split {self.split} from 0 to 999.")
        if not (8 <= self.W <= 60 and 0 <= self.t <= 1000 and 1 <= self.n_tapes <= 10_000):
            raise sleep.BadInput(f"--W {self.W} --t {self.t} --tapes {self.n_tapes}: a ring has 8 to "
                                 "60 cells, t is 0 to 1,000, and there are 1 to 10,000 tapes.")
        if args.L < 1 or (self.W * self.n_tapes) % args.L:
            raise sleep.BadInput(f"--L {args.L} must divide the {self.n_tapes} * {self.W} cells, so "
                                 "that all of them are evicted before the first label.")
        self.T = (self.W + 1) * self.n_tapes
        self.bits = deciding(self.rule, self.t, self.W)
        self.test = self.make_batch(-1)
        labels = self.test[1]
        commonest = labels.unique(dim=0, return_counts=True)[1].max().item()
        one = labels.float().mean(0)       # share of ones, tape by tape
        self.chance = dict(exact=commonest / len(labels), bit=one.maximum(1 - one).mean().item())

    def held_out(self, tape):
        """Is it for the test? One in eight of the patterns of the cells that matter is, with all of
        its tapes: the test asks new questions, unless `deciding` found fewer than 7 such cells."""
        x = tape & self.bits
        x = (x ^ (x >> 30)) + self.split * 0x9E3779B9
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):             # mix (MurmurHash3)
            x = ((x ^ ((x & 0xFFFFFFFF) >> shift)) * factor) & 0xFFFFFFFF
        return (x ^ (x >> 16)) < 2 ** 29

    def make_batch(self, step):
        """Step -> tokens (B, T), targets (B, tapes), from seed and step alone; -1 is the test set."""
        test = step < 0
        B, draws = (2048, 256) if test else (self.batch_size, 16)
        g = torch.Generator(self.device).manual_seed(0 if test else self.seed * 10 ** 9 + step + 1)
        # A tape is a number, bit i its cell i. Of many draws one from the right side is taken; all
        # of them being on the wrong one has a probability below 1e-14.
        tape = torch.randint(1 << self.W, (B, self.n_tapes, draws), generator=g, device=self.device)
        right = self.held_out(tape) == test
        tape = tape.gather(-1, right.int().argmax(-1, keepdim=True))               # (B, tapes, 1)
        cells = (tape >> torch.arange(self.W, device=self.device)) & 1             # (B, tapes, W)
        labels = evolve(cells, self.rule, self.t)[..., 0]                          # (B, tapes)
        separator = torch.full_like(labels[:, :1], 2)
        return torch.cat([cells.flatten(1), separator, labels[:, :-1]], 1), labels

    def score(self, tokens, labels, logits):
        right = logits.argmax(-1) == labels
        return dict(exact=right.all(1).float().mean().item(), bit=right.float().mean().item())

    def show(self, tokens, labels):
        text = []
        for i, label in enumerate(labels.tolist()):
            cells = "".join(map(str, tokens[i * self.W:][:self.W].tolist()))
            text.append(f"  {cells}  first cell after {self.t} steps of rule {self.rule}: {label}")
        return "\n".join(text)


if __name__ == "__main__":
    sleep.main(__doc__, PRESETS, FLAGS, Tapes)
