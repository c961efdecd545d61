"""A control: a task whose depth the recurrence itself supplies, if a write may overshoot.

Four items lie in four places; up to eight swaps of two places follow, with blanks in between; all
of it is evicted; then every place is asked for. A swap of x and y is the reflection I - 2 k k^T
with k = (e_x - e_y) / sqrt(2): one token, one write, if beta reaches 2. With beta below 1 a write
can only forget, so the swaps have to be worked out.

    2 0 3 1  ab . cd ab . . bc .   | a? b? c? d?          items of places a to d, swaps, questions

    python -m lab.experiments.swaps                             N = 1 against N = 3
    python -m lab.experiments.swaps --N 1 --update_rule overshoot         beta up to 2
"""
from itertools import combinations

import torch
import torch.nn.functional as F

import sleep
from lab.common import program

PRESETS = {"cpu": dict(N=[1, 3], swaps=8, L=12, layout="as", d_model=64, n_head=2, steps=1000,
                       batch_size=128, lr_muon=7e-3, lr_adamw=3e-3, cooldown=0.3)}
FLAGS = dict(swaps="most swaps of a sequence")

# Tokens: items are 0 to 3, swaps 4 to 9 (one a pair of places), then nothing, then the places.
PAIRS = torch.tensor(list(combinations(range(4), 2)))
FIRST_SWAP = 4
NOTHING = 10
FIRST_PLACE = 11


class Overshoot(sleep.FastWeights):
    """Gated DeltaNet with beta up to 2: I - beta k k^T also reflects (arXiv 2411.12537)."""

    def write_and_read(self, x, q, k, v, S):
        ab = F.linear(x, self.ab.weight.to(x.dtype))
        a, b = ab.transpose(1, 2).chunk(2, 1)                  # (B, H, T) each
        beta = 2 * b.sigmoid()
        speed = self.A_log.to(x.dtype).exp()[:, None]
        log_alpha = -speed * F.softplus(a + self.dt_bias.to(x.dtype)[:, None])
        return sleep.fast_weight_rule_chunked(q, k, v, log_alpha, beta, S)


class Swaps:
    """The task, as sleep.main wants it."""
    name = "swaps"
    vocab_size = 15

    def __init__(self, args, seed):
        if not 1 <= args.swaps <= 1000 or (4 + args.swaps) % args.L:
            raise sleep.BadInput(f"--swaps {args.swaps} must be 1 to 1,000, and --L {args.L} "
                                 f"divide the {4 + args.swaps} tokens before the questions.")
        self.args = args
        self.seed = seed
        self.T = 4 + args.swaps + 4
        self.test = self.make_batch(-1)
        self.chance = dict(places=0.25, all=1 / 24)

    def make_batch(self, step):
        """Step -> tokens (B, T), targets (B, 4), from seed and step alone; -1 is the test."""
        is_test = step < 0
        g = torch.Generator().manual_seed(0 if is_test else self.seed * 10 ** 9 + step + 1)
        B = 2048 if is_test else self.args.batch_size
        n = self.args.swaps
        items = torch.rand(B, 4, generator=g).argsort(1)
        pair = torch.randint(len(PAIRS), (B, n), generator=g)
        share = torch.rand(B, 1, generator=g)                  # of swaps, one for each sequence
        swapped = torch.rand(B, n, generator=g) < share        # (B, n)
        places = items.clone()
        rows = torch.arange(B)
        for t in range(n):
            x, y = PAIRS[pair[:, t]].T
            y = torch.where(swapped[:, t], y, x)
            in_x = places[rows, x]
            in_y = places[rows, y]
            places[rows, x] = in_y
            places[rows, y] = in_x
        told = torch.where(swapped, FIRST_SWAP + pair, NOTHING)
        questions = FIRST_PLACE + torch.arange(4).expand(B, -1)
        tokens = torch.cat([items, told, questions], 1)
        return tokens.to(self.args.device), places.to(self.args.device)

    def score(self, tokens, targets, logits):
        right = logits.argmax(-1) == targets
        return dict(places=right.float().mean().item(), all=right.all(1).float().mean().item())


@program
def main(argv):
    sleep.UPDATE_RULES["overshoot"] = Overshoot
    sleep.main(__doc__, PRESETS, FLAGS, Swaps, argv)


if __name__ == "__main__":
    main()
