"""k hops on larger cycles, with other laws of k: what does a sleep learn for which questions?

The task is that of train_khop.py with more than 2 K nodes, so that no answer is nearer backwards.

    all       every k from 1 to K is as frequent, and K grows at first (--deeper)
    power     k with weight k^-1.5 from the first step on
    doubles   1, 2, 4, 8, ..: each k is twice the one before
    walk      as many hops as the sleep of this step has passes
    jump      1, 1, 2, 3, 5, 8, .. hops after 1, 2, 3, 4, 5, 6, .. passes: the Fibonacci numbers

With walk and jump only one k can be asked after a sleep, so that S may overwrite what it knew after
the pass before. With --grow_N the passes grow during training, and the hops with them. Why those
numbers: lab/pages/jumps.md, "Why does it jump?".

    python -m lab.experiments.hops --N 4 --k_law doubles
    python -m lab.experiments.hops --N 8 --k_law jump --grow_N 0.7 --K 21 --nodes 43 --L 86
"""
import torch

import sleep
import train_khop
from lab.common import program
from lab.experiments import variants

K_LAWS = ("all", "power", "doubles", "walk", "jump")
PRESETS = {"cpu": train_khop.PRESETS["cpu"] | dict(N=[4], nodes=20, K=8, queries=20, L=40,
                                                   d_model=96, batch_size=32, steps=2400,
                                                   eval_every=200, k_law="all",
                                                   growth="linear")}
FLAGS = train_khop.FLAGS | dict(k_law="the k of training: all, power (k^-1.5), doubles (1, 2, 4), "
                                      "walk (the passes) or jump (their Fibonacci number)",
                                growth="of the largest k: linear (1, 2, 3, ..), or doubling (1, 2, "
                                       "4, ..), each as long")


class Hops(train_khop.Cycles):
    """train_khop.Cycles with --k_law."""
    name = "hops"

    def __init__(self, args, seed):
        if args.k_law not in K_LAWS:
            raise sleep.BadInput(f"--k_law {args.k_law} must be one of {', '.join(K_LAWS)}.")
        if args.growth not in ("linear", "doubling"):
            raise sleep.BadInput(f"--growth {args.growth} must be linear or doubling.")
        self.k_law = args.k_law
        self.growth = args.growth
        by_passes = args.k_law in ("walk", "jump")
        if by_passes:
            if len(args.N) > 1:
                raise sleep.BadInput(f"--k_law {args.k_law} asks for as many hops as there are "
                                     "passes: give one --N.")
            self.settings = vars(args) | dict(N=args.N[0], seed=seed)
        super().__init__(args, seed)
        # The test asks what training asks: questions share a window, and a k that was never trained
        # spoils the answers to the others.
        asked = None
        if by_passes:
            asked = sorted({self.k_after(N) for N in range(1, args.N[0] + 1)})
        elif args.k_law == "doubles":
            asked = [2 ** i for i in range(self.K.bit_length())]
        if asked is not None:
            self.test_k = asked
            self.test = self.make_batch(-1)
            self.chance = self.best_guess()

    def k_after(self, N):
        """The hops that are asked after N passes."""
        return min(N if self.k_law == "walk" else fibonacci(N), self.K)

    def largest_k(self, step):
        if self.growth == "linear" or step >= self.phases_end:
            return super().largest_k(step)
        return 2 ** int(self.K.bit_length() * step / self.phases_end)          # none above K

    def draw_k(self, shape, step, g):
        if step < 0 or self.k_law == "all":
            return super().draw_k(shape, step, g)
        if self.k_law in ("walk", "jump"):
            k = self.k_after(variants.draw_N(step, self.settings))
            return torch.full(shape, k, device=self.device)
        k = torch.arange(1, self.largest_k(step) + 1, device=self.device)
        weights = k ** -1.5
        if self.k_law == "doubles":
            weights = (k & (k - 1) == 0).float()               # 1 where k is a power of two
        drawn = torch.multinomial(weights, shape.numel(), replacement=True, generator=g)
        return k[drawn].view(shape)


def fibonacci(n):
    """1, 1, 2, 3, 5, 8, .. for n = 1, 2, 3, 4, 5, 6, .."""
    before, number = 0, 1
    for _ in range(n - 1):
        before, number = number, before + number
    return number


@program
def main(argv):
    from lab.experiments.registry import train             # it imports this file
    train("hops", argv)


if __name__ == "__main__":
    main()
