"""Word problems in the spirit of GSM-Infinite (Sections 6.3 and 6.4, Figures 4 and 5)

A question, then a text of shuffled sentences that each define one quantity, all modulo p.
All quantities look alike; few matter. Question and text are evicted before the answer. The answer
is one number, said in one pass, without a chain of thought. With p = 5:

    x2 ? x7 4 plus x4 . x4 3 . x2 x7 minus x9 . x5 x4 minus x9 . x9 1 .
    answer x2  ->  1, because x4 is 3, x7 is 4 + 3 = 2, x9 is 1, and x2 is 2 - 1

The depth of a question is its longest chain of reads: 1 if a sentence tells the number, else 1 more
than that of the deepest quantity in its sentence. Here it is 3.

    python train_gsm.py                   N = 1 against N = 3, minutes on two CPU cores
    python train_gsm.py --preset paper --batch_size 32 --recompute      Section 6.3, for a GPU
    python train_gsm.py --preset paper --batch_size 32 --recompute --L 512 --eviction sliding \
        --warmup 1562                                                               Section 6.4

The preset `paper` has the paper's lengths, but trains from scratch; its batch of 256 may not fit
one GPU, hence 32. There the first 2,000 tokens are evicted; the rest shares a window with the
answer and stays in view.

Our choice: how problems are made. The paper takes GSM-Infinite's, which also has reverse problems:
they hide a constant and tell a result. A training text asks for several quantities, which is
cheaper, and later questions see the earlier answers; a test text asks for one, so it has room for
two more sentences.
"""
import math
import random
import textwrap
import zlib
from typing import NamedTuple

import torch
from tqdm import tqdm

import sleep

PRESETS = {
    "cpu": dict(N=[1, 3], reads=4, questions=8, T=[52], L=52, p=5, names=20, tests=2000,
                deeper=0.4, layout="as", d_model=64, n_head=2, steps=1600, batch_size=64,
                lr_muon=7e-3, lr_adamw=3e-3, cooldown=0.15, eval_every=200),
    "gpu": dict(N=[1, 2, 4], reads=8, questions=8, T=[128, 256], L=128, p=11, names=200,
                tests=4000, deeper=0.4, layout="asas", d_model=256, n_head=4, steps=8000,
                batch_size=128, lr_muon=2e-3, lr_adamw=1e-3, cooldown=0.1, eval_every=400),
    "paper": dict(N=[1, 4], reads=8, questions=8, T=[2000, 2400, 2800, 3200], L=2000, p=11,
                  names=2000, tests=2000, deeper=0.4, layout="as" * 5, d_model=512, n_head=8,
                  steps=4687, batch_size=256, lr_muon=1e-3, lr_adamw=5e-4, eval_every=500,
                  conv="s", compile=False),    # 2,000 tokens are 32 unrolled chunks: too long
}
FLAGS = dict(
    reads="the longest chain of reads that a question needs",
    questions="questions in a training sequence, all depths taking turns; a test has one",
    T="tokens before the answers; a batch has one of these, the test the largest",
    p="all numbers are modulo p",
    names="quantities that a text can speak of",
    deeper="first share of the steps, in phases: questions take at most 1 read, then 2, and so on",
    tests="problems of the test, as many of each depth")
LIMITS = dict(reads=(1, 50), questions=(1, 1000), T=(1, 10_000), L=(1, 10_000), p=(2, 100),
              names=(20, 10_000), tests=(1, 10_000), batch_size=(1, 10_000), deeper=(0, 1))

# Tokens: six words, then the numbers 0..p-1, then the names.
WORDS = "PAD . ? answer plus minus".split()
PAD, END, ASK, ANSWER, PLUS, MINUS = range(6)
ZERO = 6
ANSWER_TOKENS = 3                          # answer, name, number
SHORTEST = 3                               # tokens of a sentence that tells a number
LONGEST = 5                                # tokens of a sentence with two quantities


# ------------------------------------------------------------------------------------------------
# A problem. Of args only p and names are used.

class Quantity(NamedTuple):
    sentence: list             # tokens of its definition, the first is its name
    value: int                 # modulo p
    constants: frozenset       # names of the constants that it depends on


def define(args, name, depth, by_depth, rng):
    """A new quantity of this depth. by_depth[d]: the quantities of depth d so far, a list.

    It is a copy of y, a quantity of the depth before, or y plus or minus another one, z: in
    `x2 x7 minus x9`, of depth 3, y is x7 of depth 2, and z is x9. If y and z share a constant, a
    number takes the place of z. So nothing cancels out, as it does in `x7 minus x7`: every constant
    that a quantity depends on changes it, and it is uniform modulo p.
    """
    if depth == 1:
        c = rng.randrange(args.p)
        return Quantity([name, ZERO + c, END], c, frozenset([name]))
    y = rng.choice(by_depth[depth - 1])
    z = rng.choice(rng.choice(by_depth[1:depth]))
    form = rng.choice((END, PLUS, MINUS))                      # a copy, a sum or a difference
    if form == END:
        return Quantity([name, y.sentence[0], END], y.value, y.constants)
    c = rng.randrange(1, args.p)
    number = Quantity([ZERO + c], c, frozenset())
    other = z if y.constants.isdisjoint(z.constants) else number
    a, b = rng.sample((other, y), 2)
    value = a.value + b.value if form == PLUS else a.value - b.value
    said = [a.sentence[0], form, b.sentence[0]]
    return Quantity([name, *said, END], value % args.p, a.constants | b.constants)


def make_text(args, room, deepest, rng):
    """Quantities up to a depth, whose sentences fill `room` tokens -> by_depth, as in `define`.

    The next one gets the depth that has the fewest so far. A depth can be used as soon as the depth
    before it has a quantity.
    """
    by_depth = [[] for _ in range(deepest + 1)]
    for name in rng.sample(range(ZERO + args.p, ZERO + args.p + args.names), args.names):
        reached = [d for d in range(1, deepest + 1) if d == 1 or by_depth[d - 1]]
        depth = min(reached, key=lambda d: (len(by_depth[d]), rng.random()))
        quantity = define(args, name, depth, by_depth, rng)
        room -= len(quantity.sentence)
        if room < 0:
            break
        by_depth[depth].append(quantity)
    return by_depth


def make_problem(args, T, deepest, depths, rng):
    """Questions of these depths and a text up to the deepest, in T tokens; then the answers.

    -> tokens (T + 3 * questions), and the sentences, sorted: a text without its order
    """
    by_depth = make_text(args, T - len(depths) - 1, deepest, rng)
    sentences = [q.sentence for quantities in by_depth for q in quantities]
    rng.shuffle(sentences)
    for quantities in by_depth:
        rng.shuffle(quantities)
    asked = [by_depth[depth].pop() for depth in depths]
    tokens = [q.sentence[0] for q in asked] + [ASK]
    for sentence in sentences:
        tokens += sentence
    tokens = [PAD] * (T - len(tokens)) + tokens
    for q in asked:
        tokens += [ANSWER, q.sentence[0], ZERO + q.value]
    return tokens, sorted(sentences)


# ------------------------------------------------------------------------------------------------
# The task

class Problems:
    """The task, as sleep.main wants it. A batch has a third part: the depths of its questions."""
    name = "gsm"

    def __init__(self, args, seed):
        self.args = args
        self.seed = seed
        self.vocab_size = ZERO + args.p + args.names
        self.T = max(args.T) + ANSWER_TOKENS * args.questions - 1
        self.check()
        depths = [[1 + i % args.reads] for i in range(args.tests)]
        self.test = self.draw(max(args.T), args.reads, depths, random.Random("test"), test=True)
        self.chance = dict(accuracy={str(d): 1 / args.p for d in range(1, args.reads + 1)})

    def check(self):
        """BadInput, in a sentence, for flags that make no sense."""
        args = self.args
        sleep.check_limits(args, LIMITS)
        if args.tests < args.reads:
            raise sleep.BadInput(f"--tests {args.tests} must be one for each of the {args.reads} "
                                 "depths, or more.")
        if args.L > min(args.T):
            raise sleep.BadInput(f"--L {args.L} must be at most the {min(args.T)} tokens before "
                                 "the answers: a longer window is never full.")
        # No quantity is asked for twice in a text: each depth needs as many as it has questions.
        # The deepest one grows during training, so every value that it takes is checked.
        for deepest in range(1, args.reads + 1):
            of_a_depth = math.ceil(args.questions / deepest)
            names = of_a_depth * deepest
            T = of_a_depth * (SHORTEST + LONGEST * (deepest - 1)) + args.questions + 1
            if min(args.T) < T or args.names < names:
                raise sleep.BadInput(f"{args.questions} questions with chains of {deepest} reads "
                                     f"take {names} --names and --T {T}, or more.")

    def make_batch(self, step):
        """Step -> batch, from seed and step alone."""
        args = self.args
        rng = random.Random(f"train {self.seed} {step}")
        deepest = args.reads
        if step < args.deeper * args.steps:
            deepest = 1 + int(args.reads * step / (args.deeper * args.steps))
        depths = []
        for _ in range(args.batch_size):
            row = []
            while len(row) < args.questions:                   # all depths take turns
                row += rng.sample(range(1, deepest + 1), deepest)
            depths.append(row[:args.questions])
        return self.draw(rng.choice(args.T), deepest, depths, rng, test=False)

    def draw(self, context, deepest, depths, rng, test):
        """A row of depths for each problem, in `context` tokens, and their answers -> a batch.

        tokens (B, context + 3 M - 1), targets (B, 3 M - 1), depths (B, M)

        One text in eight is kept for the test, by a hash.
        """
        rows = []
        for asked in tqdm(depths, "problems of the test", disable=None if test else True,
                          leave=False):
            is_test = None
            while is_test != test:
                tokens, text = make_problem(self.args, context, deepest, asked, rng)
                is_test = zlib.crc32(repr(text).encode()) % 8 == 0
            rows.append(tokens)
        tokens = torch.tensor(rows, device=self.args.device)
        depths = torch.tensor(depths, device=self.args.device)
        targets = tokens[:, context:].clone().unflatten(1, (-1, ANSWER_TOKENS))     # (B, M, 3)
        targets[..., 1] = targets[..., 2]          # the number is predicted where the name is read
        targets[..., ::2] = -1                                 # elsewhere nothing is
        # The last number is a target only.
        return tokens[:, :-1], targets.flatten(1)[:, :-1], depths

    def score(self, tokens, targets, logits, depths):
        """Accuracy for each depth.

        targets (B, 3 M - 1), logits (B, 3 M - 1, vocab), depths (B, M)
        """
        right = (logits.argmax(-1) == targets)[targets >= 0]
        depths = depths.flatten()
        return dict(accuracy={str(d): right[depths == d].float().mean().item()
                              for d in depths.unique().tolist()})

    def text(self, tokens):
        """Token ids as words. tokens (n,)"""
        numbers = [str(i) for i in range(self.args.p)]
        words = WORDS + numbers + [f"x{i}" for i in range(self.args.names)]
        return " ".join(words[i] for i in tokens.tolist() if i != PAD)

    def show(self, tokens, targets):
        """One example as text. All answers but the last are among its tokens."""
        return textwrap.indent(f"{textwrap.fill(self.text(tokens), 92)} {targets[-1] - ZERO}", "  ")


if __name__ == "__main__":
    sleep.main(__doc__, PRESETS, FLAGS, Problems)
