"""Word problems in the spirit of GSM-Infinite (Sections 6.3 and 6.4, Figures 4 and 5)

A sequence is questions, then a text of shuffled sentences, then the answers. Each sentence defines
one quantity, modulo p. Nothing marks the sentences that a question needs. Questions and text are
evicted before the first answer: one number, said in one pass, without a chain of thought. With p =
5, this is a text with one question, for x2:

    x2 ? x7 4 plus x4 . x4 3 . x2 x7 minus x9 . x5 x4 minus x9 . x9 1 . answer x2 1

x4 is 3, x7 is 4 + x4 = 7, which is 2 modulo 5, and x9 is 1, so x2 is x7 - x9 = 1. x5 is not
needed. The last number is to be predicted where `x2` is read.

The depth of a quantity is the longest chain of sentences that tells it: 1 if its sentence is a
number, else 1 more than the depth of the deepest quantity in its sentence. x2 has depth 3.

    python train_gsm.py                   N = 1 against N = 3, minutes on two CPU cores
    python train_gsm.py --preset paper --batch_size 32 --recompute      Section 6.3, for a GPU
    python train_gsm.py --preset paper --batch_size 32 --recompute --L 512 --eviction sliding \
        --warmup 1562                                                               Section 6.4

The preset `paper` has the paper's lengths, but trains from scratch. Its batch of 256 may not fit
one GPU; batches of 32 in as many steps are an eighth of the problems. What T leaves over after
whole windows shares a window with the answers and stays in view: 1,200 tokens of 3,200 in Section
6.3, 128 in 6.4. A warning says so.

Our choice: how problems are made. The paper takes GSM-Infinite's, which also has reverse problems:
they hide a constant and tell a result. A training text asks for several quantities, which is
cheaper; but later questions see earlier answers. A test text asks for one, so it is a little
longer. No texts are kept apart for the test: in the presets there are so many that none is drawn
twice.
"""
import random
import textwrap
from typing import NamedTuple

import torch

import sleep

PRESETS = {
    "cpu": dict(N=[1, 3], reads=4, questions=8, T=52, L=52, p=5, names=20, tests=2000, deeper=0.4,
                layout="as", d_model=64, n_head=2, steps=1600, batch_size=64, lr_muon=7e-3,
                lr_adamw=3e-3, cooldown=0.15, eval_every=200),
    "gpu": dict(N=[1, 2, 4], reads=8, questions=8, T=256, L=128, p=11, names=200, tests=4000,
                deeper=0.4, layout="asas", d_model=256, n_head=4, steps=8000, batch_size=128,
                lr_muon=2e-3, lr_adamw=1e-3, cooldown=0.1, eval_every=400),
    # Windows of 2,000 tokens are 32 unrolled chunks; to compile them takes too long.
    "paper": dict(N=[1, 4], reads=8, questions=8, T=3200, L=2000, p=11, names=2000, tests=800,
                  deeper=0.4, layout="as" * 5, d_model=512, n_head=8, steps=4687, batch_size=256,
                  lr_muon=1e-3, lr_adamw=5e-4, eval_every=500, conv="s", compile=False),
}
FLAGS = dict(
    reads="the deepest question: the longest chain of sentences to read",
    questions="questions in a training sequence, all depths taking turns; a test has one",
    T="tokens of questions and text",
    p="all numbers are modulo p",
    names="quantities that a text can speak of; if they are too few, padding fills it",
    deeper="first share of the steps, in phases: questions have depth 1, then up to 2, and so on",
    tests="problems of the test; their depths take turns")
LIMITS = dict(reads=(1, 50), questions=(1, 1000), T=(1, 10_000), p=(2, 100),
              names=(20, 10_000), tests=(1, 10_000), deeper=(0, 1))

# Tokens: six words, then the numbers 0..p-1, then the names.
WORDS = "PAD . ? answer plus minus".split()
PAD, END, ASK, ANSWER, PLUS, MINUS = range(6)
ZERO = 6
LONGEST = 5                                # tokens of the longest sentence


class Quantity(NamedTuple):
    word: int                  # the token of its name; of a number, the number's token
    value: int                 # modulo p
    roots: frozenset           # words of the quantities of depth 1 that it rests on
    sentence: tuple = ()       # the tokens that define it; a number has none


def define(word, depth, by_depth, p, rng):
    """A new quantity of this depth. by_depth[d]: the quantities of depth d so far, a list.

    At depth 1 it is a random number. Deeper, it is y, which is one step less deep, or y plus or
    minus z, in either order. z is less deep than the new one, too, and shares no root with y; if
    the one drawn does, a number takes its place. So nothing cancels out, as x4 would in `x7 minus
    x4` above, and every quantity is uniform modulo p.
    """
    if depth == 1:
        c = rng.randrange(p)
        return Quantity(word, c, frozenset([word]), (word, ZERO + c, END))
    y = rng.choice(by_depth[depth - 1])
    sign = rng.choice((None, PLUS, MINUS))
    if sign is None:                                           # a copy
        return Quantity(word, y.value, y.roots, (word, y.word, END))
    less_deep = rng.choice(by_depth[1:depth])
    z = rng.choice(less_deep)
    if not y.roots.isdisjoint(z.roots):
        c = rng.randrange(1, p)                                # plus 0 would be a copy
        z = Quantity(ZERO + c, c, frozenset())
    a, b = rng.sample((y, z), 2)                               # in either order
    value = a.value + b.value if sign == PLUS else a.value - b.value
    return Quantity(word, value % p, a.roots | b.roots, (word, a.word, sign, b.word, END))


def make_problem(args, deepest, depths, rng):
    """One problem: questions of these depths, a text up to the deepest, and the answers.

    -> a list of T + 3 * questions tokens
    """
    names = rng.sample(range(args.names), args.names)
    room = args.T - len(depths) - 1                            # tokens for the text
    by_depth = [[] for _ in range(deepest + 1)]
    for i, name in enumerate(names):
        depth = 1 + i % deepest                                # the depths take turns
        quantity = define(ZERO + args.p + name, depth, by_depth, args.p, rng)
        room -= len(quantity.sentence)
        if room < 0:                                           # what does not fit ends the text
            break
        by_depth[depth].append(quantity)
    sentences = [quantity.sentence for quantities in by_depth for quantity in quantities]
    rng.shuffle(sentences)

    for quantities in by_depth:
        rng.shuffle(quantities)
    asked = [by_depth[depth].pop() for depth in depths]        # none of them twice
    tokens = [quantity.word for quantity in asked] + [ASK]
    for sentence in sentences:
        tokens += sentence
    tokens = [PAD] * (args.T - len(tokens)) + tokens
    for quantity in asked:
        tokens += [ANSWER, quantity.word, ZERO + quantity.value]
    return tokens


class Problems:
    """The task, as sleep.main wants it. A batch has a third part: the depths of its questions."""
    name = "gsm"

    def __init__(self, args, seed):
        self.args = args
        self.seed = seed
        self.vocab_size = ZERO + args.p + args.names
        self.T = args.T + 3 * args.questions - 1   # 3 tokens an answer; the last is not read
        self.check()
        depths = [[1 + i % args.reads] for i in range(args.tests)]
        self.test = self.draw(args.reads, depths, random.Random("test"))
        self.chance = dict(accuracy={str(d): 1 / args.p for d in range(1, args.reads + 1)})

    def check(self):
        """BadInput, in a sentence, for flags that make no sense."""
        args = self.args
        sleep.check_limits(args, LIMITS)
        if min(args.tests, args.questions) < args.reads:
            raise sleep.BadInput(f"--tests {args.tests} and --questions {args.questions} must be "
                                 f"at least --reads {args.reads}, one for each depth.")
        # No quantity is asked for twice in a text, and the depths of both take turns.
        T = (LONGEST + 1) * args.questions + 1
        if args.names < args.questions or args.T < T:
            raise sleep.BadInput(f"--questions {args.questions} take --names {args.questions} and "
                                 f"--T {T}, or more.")
        if args.L > args.T:
            raise sleep.BadInput(f"--L {args.L} must be at most --T {args.T}: a longer window has "
                                 "an answer in it, and never sleeps.")

    def make_batch(self, step):
        """Step -> batch, from seed and step alone."""
        args = self.args
        rng = random.Random(f"train {self.seed} {step}")
        deepest = args.reads
        if step < args.deeper * args.steps:
            deepest = 1 + int(args.reads * step / (args.deeper * args.steps))
        turns = [1 + i % deepest for i in range(args.questions)]
        depths = [rng.sample(turns, len(turns)) for _ in range(args.batch_size)]
        return self.draw(deepest, depths, rng)

    def draw(self, deepest, depths, rng):
        """A problem for each list of M depths -> a batch.

        tokens (B, T + 3 M - 1), targets (B, 3 M - 1), depths (B, M)
        """
        problems = [make_problem(self.args, deepest, row, rng) for row in depths]
        tokens = torch.tensor(problems, device=self.args.device)               # (B, T + 3 M)
        answers = tokens[:, self.args.T:].unflatten(1, (-1, 3))                # (B, M, 3)
        targets = torch.full_like(answers, -1)
        targets[..., 1] = answers[..., 2]          # the number is predicted where the name is read
        depths = torch.tensor(depths, device=self.args.device)
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
        """One example as text, its middle left out if it is long."""
        text = f"{self.text(tokens)} {targets[-1] - ZERO}"     # the last answer is a target only
        if len(text) > 900:
            text = f"{text[:400]} ... {text[-400:]}"
        return textwrap.indent(textwrap.fill(text, 92), "  ")


if __name__ == "__main__":
    sleep.main(__doc__, PRESETS, FLAGS, Problems)
