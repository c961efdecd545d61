"""k hops on larger cycles, with other laws of k: what does a sleep learn for which questions?

The task is that of train_khop.py with more than 2 K nodes, so that no answer is nearer backwards.

    all       every k from 1 to K is as frequent, and K grows at first (--deeper)
    power     k with weight k^-1.5 from the first step on
    doubles   1, 2, 4, 8, ..: each k is twice the one before

    python -m lab.experiments.hops --N 4 --k_law doubles
"""
import torch

import sleep
import train_khop
from lab.common import program

K_LAWS = ("all", "power", "doubles")
PRESETS = {"cpu": train_khop.PRESETS["cpu"] | dict(N=[4], nodes=20, K=8, queries=20, L=40,
                                                   d_model=96, batch_size=32, steps=2400,
                                                   eval_every=200, k_law="all")}
FLAGS = train_khop.FLAGS | dict(k_law="the k of training: all, power (k^-1.5) or doubles (1, 2, 4)")


class Hops(train_khop.Cycles):
    """train_khop.Cycles with --k_law."""
    name = "hops"

    def __init__(self, args, seed):
        if args.k_law not in K_LAWS:
            raise sleep.BadInput(f"--k_law {args.k_law} must be one of {', '.join(K_LAWS)}.")
        self.k_law = args.k_law
        super().__init__(args, seed)

    def draw_k(self, shape, step, g):
        if step < 0 or self.k_law == "all":
            return super().draw_k(shape, step, g)
        k = torch.arange(1, self.largest_k(step) + 1, device=self.device)
        weights = k ** -1.5
        if self.k_law == "doubles":
            weights = (k & (k - 1) == 0).float()               # 1 where k is a power of two
        drawn = torch.multinomial(weights, shape.numel(), replacement=True, generator=g)
        return k[drawn].view(shape)


@program
def main(argv):
    sleep.main(__doc__, PRESETS, FLAGS, Hops, argv)


if __name__ == "__main__":
    main()
