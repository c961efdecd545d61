"""A control: a task whose depth the recurrence itself supplies, if a write may overshoot.

Four items lie in four places; up to eight swaps of two places follow, with blanks in between; all of it
is evicted; then every place is asked for. A swap of x and y is the reflection I - 2 k k^T with
k = (e_x - e_y) / sqrt(2): one token, one write, if beta reaches 2. With beta below 1 a write can only
forget, so the swaps have to be worked out.

    2 0 3 1  ab . cd ab . . bc .   | a? b? c? d?          items of places a to d, swaps, questions

    python -m lab.swaps                                       N = 1 against N = 3
    python -m lab.swaps --N 1 --update_rule overshoot         beta up to 2
"""
from itertools import combinations

import torch

import sleep

PRESETS = {"cpu": dict(N=[1, 3], swaps=8, L=12, layout="as", d_model=64, n_head=2, steps=1000,
                       batch_size=128, lr_muon=7e-3, lr_adamw=3e-3, cooldown=0.3)}
FLAGS = dict(swaps="most swaps of a sequence")
PAIRS = torch.tensor([*combinations(range(4), 2)])             # tokens 4 to 9; 10 is nothing
NOTHING, PLACE = 10, 11                                        # items are 0 to 3, places 11 to 14


class Overshoot(sleep.FastWeights):
    """Gated DeltaNet with beta up to 2: I - beta k k^T also reflects (arXiv 2411.12537)."""

    def write_and_read(self, x, q, k, v, S):
        a, b = self.ab(x).transpose(1, 2).chunk(2, 1)
        log_alpha = -self.A_log.exp()[:, None] * torch.nn.functional.softplus(
            a + self.dt_bias[:, None])
        return sleep.gated_delta_rule_chunked(q, k, v, log_alpha, 2 * b.sigmoid(), S)


class Swaps:
    """The task, as sleep.main wants it."""
    name, vocab_size = "swaps", 15

    def __init__(self, args, seed):
        self.args, self.seed, self.T = args, seed, 4 + args.swaps + 4
        if not 1 <= args.swaps <= 1000 or (4 + args.swaps) % args.L:
            raise sleep.BadInput(f"--swaps {args.swaps} must be 1 to 1,000, and --L {args.L} divide the "
                                 f"{4 + args.swaps} tokens before the questions.")
        self.test = self.make_batch(-1)
        self.chance = dict(places=0.25, all=1 / 24)

    def make_batch(self, step):
        """Step -> tokens (B, T), targets (B, 4), from seed and step alone; -1 is the test."""
        g = torch.Generator().manual_seed(0 if step < 0 else self.seed * 10 ** 9 + step + 1)
        B, n = (2048 if step < 0 else self.args.batch_size), self.args.swaps
        items = torch.rand(B, 4, generator=g).argsort(1)
        pair = torch.randint(len(PAIRS), (B, n), generator=g)
        share = torch.rand(B, 1, generator=g)                  # share of swaps, one for each sequence
        swapped = torch.rand(B, n, generator=g) < share
        now, rows = items.clone(), torch.arange(B)
        for t in range(n):
            x, y = PAIRS[pair[:, t]].T
            y = torch.where(swapped[:, t], y, x)
            now[rows, x], now[rows, y] = now[rows, y], now[rows, x]
        tokens = torch.cat([items, torch.where(swapped, 4 + pair, NOTHING),
                            PLACE + torch.arange(4).expand(B, -1)], 1)
        return tokens.to(self.args.device), now.to(self.args.device)

    def score(self, tokens, targets, logits):
        right = logits.argmax(-1) == targets
        return dict(places=right.float().mean().item(), all=right.all(1).float().mean().item())


def main(argv=None):
    sleep.UPDATE_RULES["overshoot"] = Overshoot
    sleep.main(__doc__, PRESETS, FLAGS, Swaps, argv)


if __name__ == "__main__":
    main()
