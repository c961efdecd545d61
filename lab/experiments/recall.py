"""A task of one's own: does the first token survive many sleeps?

A sequence is windows of random digits. All of them are evicted; then the first digit is asked for.

    4 7 1 0 .. | 3 9 .. | .. | ?           answer 4

    python -m lab.experiments.recall       N = 1 against N = 2, a minute on a CPU
"""
import torch

import sleep
from lab.common import program

PRESETS = {"cpu": dict(N=[1, 2], windows=8, L=8, layout="as", d_model=32, n_head=2, steps=300,
                       batch_size=128, lr_muon=1e-2, lr_adamw=3e-3)}
FLAGS = dict(windows="windows before the question")
QUESTION = 10


class Recall:
    """Say the first of many random digits, all evicted."""
    name = "recall"
    vocab_size = 11                        # ten digits and the question

    def __init__(self, args, seed):
        sleep.check_limits(args, dict(windows=(1, 10_000)))
        self.args = args
        self.seed = seed
        self.T = args.L * args.windows + 1
        self.test = self.make_batch(-1)
        self.chance = dict(accuracy=0.1)

    def make_batch(self, step):
        """Step -> tokens (B, T), targets (B, 1), from seed and step alone; -1 is the test."""
        is_test = step < 0
        seed = 0 if is_test else self.seed * 10 ** 9 + step + 1
        B = 1024 if is_test else self.args.batch_size
        g = torch.Generator(self.args.device).manual_seed(seed)
        tokens = torch.randint(10, (B, self.T), generator=g, device=g.device)
        first = tokens[:, :1].clone()
        tokens[:, -1] = QUESTION
        return tokens, first

    def score(self, tokens, targets, logits):
        right = logits.argmax(-1) == targets
        return dict(accuracy=right.float().mean().item())


@program
def main(argv):
    sleep.main(__doc__, PRESETS, FLAGS, Recall, argv)


if __name__ == "__main__":
    main()
