"""Word problems in the spirit of GSM-Infinite (Sections 6.3 and 6.4, Figures 4 and 5)

A question, then a text of shuffled sentences that each define one quantity, all modulo a prime p.
Every quantity looks alike, few matter. The question is evicted first, then most of the text. The
answer is one number, said in one pass, without a chain of thought.

    fox in biki ? owl in biki is 3 . fox in biki is 2 plus all in dora . emu in dora is
    owl in biki . answer fox in biki is            5: `all in dora` sums what is said of dora

The depth of a question is its longest chain of reads: 1 if a sentence tells the number, else 1 more
than that of the deepest quantity in its sentence (or of its place, if it is a sum). Here it is 4.
With --no-words a name is one token, and `is` is left out.

    python train_gsm.py                   N = 1 against N = 3, minutes on two CPU cores
    python train_gsm.py --preset paper --batch_size 64 --recompute      Section 6.3, for a GPU
    python train_gsm.py --preset paper --L 512 --eviction sliding --warmup 1562 --recompute      6.4

Our choice: how problems are made. The paper takes GSM-Infinite's. Ours are forward problems only;
GSM-Infinite also has reverse ones, which hide a constant and tell a result. A training text asks
for several quantities, a test text for one. Every training step draws new problems.
"""
import random
import textwrap
from collections import Counter
from typing import NamedTuple

import torch
from tqdm import tqdm

import sleep

PRESETS = {
    "cpu": dict(N=[1, 3], reads=4, questions=8, T=[48], L=48, p=7, places=8, animals=3, words=False,
                tests=2000, layout="as", d_model=64, n_head=2, steps=1600, batch_size=64,
                lr_muon=7e-3, lr_adamw=3e-3, cooldown=0.15, eval_every=200),
    "gpu": dict(N=[1, 2, 4], reads=8, questions=8, T=[256, 304, 352, 400], L=128, p=11, places=48,
                animals=12, words=True, tests=4000, layout="asas", d_model=256, n_head=4,
                steps=8000, batch_size=128, lr_muon=2e-3, lr_adamw=1e-3, cooldown=0.1,
                eval_every=400),
    "paper": dict(N=[1, 4], reads=8, questions=8, T=[2000, 2400, 2800, 3200], L=2000, p=11,
                  places=200, animals=12, words=True, tests=2000, layout="as" * 5, d_model=512,
                  n_head=8, steps=4687, batch_size=256, lr_muon=1e-3, lr_adamw=5e-4,
                  eval_every=500, conv="s"),
}
FLAGS = dict(
    reads="the longest chain of reads that a question needs",
    questions="questions in a training sequence, all depths taking turns; a test has one",
    T="tokens before the answers; a batch has one of these, the test the largest",
    p="a prime: all numbers are modulo p",
    places="places that quantities can be in",
    animals="at most 12; a place has up to three of them",
    words="names of three words and `is`, else one token a name",
    tests="problems of the test, as many of each depth")
LIMITS = dict(reads=(1, 50), questions=(1, 1000), T=(1, 20_000), L=(1, 20_000), p=(5, 97),
              places=(1, 2000), animals=(1, 12), tests=(1, 100_000))

# Tokens: ten words, then the numbers 0..p-1, then the names.
WORDS = "PAD . ? answer is in all plus times minus".split()
PAD, END, ASK, ANSWER, IS, IN, ALL, PLUS, TIMES, MINUS = range(10)
ZERO = 10
FORMS = ("copy", "c plus", "c times", "plus", "minus")
ANIMALS = "fox owl emu bear wolf deer hare lynx seal crow toad swan".split()


# ------------------------------------------------------------------------------------------------
# A problem. `s` are the settings: p, places, animals, words, reads.

class Quantity(NamedTuple):
    name: list                 # tokens
    sentence: list             # tokens of its definition; a sum over a place has none
    value: int                 # modulo p
    reads: int                 # its depth: the longest chain of reads that ends with its own
    constants: frozenset       # names of the constants that it depends on


def make_name(s, place, animal):
    """Tokens of `owl in biki`; of `all in biki`, the sum over a place, if animal is s.animals."""
    first = ZERO + s.p
    if not s.words:
        return [first + place * (s.animals + 1) + animal]
    return [ALL if animal == s.animals else first + animal, IN, first + s.animals + place]


def pick(items, rng):
    """One item of a list, as rng.choice(items), but three times as fast."""
    return items[int(rng.random() * len(items))]


def begin(s, name):
    """The first tokens of a sentence: `name is`."""
    return name + [IS] if s.words else name


def define(s, name, deepest, earlier, rng):
    """A quantity that reads one of the list `deepest` and perhaps one of the list `earlier`.

    All of `deepest` have the same depth, none of `earlier` is deeper. The two must depend on
    different constants; if they do not, the result is None: draw again. So nothing cancels out, as
    it does in `x minus x`: every constant that a quantity depends on changes it, and a quantity is
    uniform modulo p.
    """
    y = pick(deepest, rng)
    form = pick(FORMS, rng)
    constants = y.constants
    if form == "copy":
        value = y.value
        said = y.name
    elif form == "c plus":
        c = pick((1, 2, 3, 4), rng)
        value = c + y.value
        said = [ZERO + c, PLUS] + y.name
    elif form == "c times":
        c = pick((2, 3, 4), rng)           # has an inverse modulo a prime from 5 on
        value = c * y.value
        said = [ZERO + c, TIMES] + y.name
    else:
        z = pick(earlier, rng)
        if not y.constants.isdisjoint(z.constants):
            return None
        constants = y.constants | z.constants
        first, second = (y, z) if rng.random() < 0.5 else (z, y)
        if form == "plus":
            value = first.value + second.value
            said = first.name + [PLUS] + second.name
        else:
            value = first.value - second.value
            said = first.name + [MINUS] + second.name
    return Quantity(name, begin(s, name) + said + [END], value % s.p, y.reads + 1, constants)


def add_up(s, place, members):
    """The sum over a place; None if it is too deep or if two members share a constant."""
    reads = 1 + max(q.reads for q in members)
    constants = frozenset().union(*[q.constants for q in members])
    if reads > s.reads or len(constants) < sum(len(q.constants) for q in members):
        return None
    value = sum(q.value for q in members) % s.p
    return Quantity(make_name(s, place, s.animals), [], value, reads, constants)


def add(quantity, by_depth, up_to_depth):
    """Put a quantity into the list of its depth and into those of all up to a depth."""
    by_depth[quantity.reads].append(quantity)
    for quantities in up_to_depth[quantity.reads:]:
        quantities.append(quantity)


def make_text(s, room, rng):
    """Quantities whose sentences fill `room` tokens -> lists of those of each depth.

    None if all names are used before the text is full. Places come in random order, each with one
    to three animals. Its sum may be spoken of once it is complete. Three quantities in ten are
    constants; the others aim at the depth that was tried least, and are left out if they do not
    reach it.
    """
    by_depth = [[] for _ in range(s.reads + 1)]
    up_to_depth = [[] for _ in range(s.reads + 1)]
    tried = [0] * (s.reads + 1)
    animals = range(s.animals)
    for place in rng.sample(range(s.places), s.places):
        found = []
        for animal in rng.sample(animals, min(pick((1, 2, 3), rng), s.animals)):
            name = make_name(s, place, animal)
            quantity = None
            if s.reads == 1 or rng.random() < 0.3:             # a constant: `name is c`
                c = pick(range(s.p), rng)
                sentence = begin(s, name) + [ZERO + c, END]
                quantity = Quantity(name, sentence, c, 1, frozenset([tuple(name)]))
            else:
                least = min(tried[2:])
                depth = pick([d for d in range(2, s.reads + 1) if tried[d] == least], rng)
                tried[depth] += 1
                tries = 40 if by_depth[depth - 1] else 0
                while quantity is None and tries:
                    quantity = define(s, name, by_depth[depth - 1], up_to_depth[depth - 1], rng)
                    tries -= 1
            if quantity is None:
                continue
            room -= len(quantity.sentence)
            if room < 0:
                return by_depth
            add(quantity, by_depth, up_to_depth)
            found.append(quantity)
        total = add_up(s, place, found) if found else None
        if total is not None:
            add(total, by_depth, up_to_depth)
    return None


def make_problem(s, T, depths, rng):
    """A question of each of these depths, and a text, in T tokens; then the answers.

    -> tokens (T + questions * tokens of an answer), sentences (list of lists of tokens); None if
    the text that was drawn has no such questions: then draw again.
    """
    size = 3 if s.words else 1             # tokens of a name
    by_depth = make_text(s, T - len(depths) * size - 1, rng)
    if by_depth is None:
        return None
    chosen = {}
    for depth, n in Counter(depths).items():
        if len(by_depth[depth]) < n:
            return None
        chosen[depth] = rng.sample(by_depth[depth], n)
    asked = [chosen[depth].pop() for depth in depths]

    sentences = [q.sentence for quantities in by_depth for q in quantities if q.sentence]
    rng.shuffle(sentences)
    tokens = []
    for q in asked:
        tokens += q.name
    tokens.append(ASK)
    for sentence in sentences:
        tokens += sentence
    tokens = [PAD] * (T - len(tokens)) + tokens
    for q in asked:
        tokens += [ANSWER] + begin(s, q.name) + [ZERO + q.value]
    return tokens, sentences


# ------------------------------------------------------------------------------------------------
# The task

class Problems:
    """The task, as sleep.main wants it. A batch has a third part: the depths of its questions."""
    name = "gsm"

    def __init__(self, args, seed):
        self.args = args
        self.seed = seed
        self.lengths = sorted(set(args.T))
        names = args.animals + args.places if args.words else (args.animals + 1) * args.places
        self.vocab_size = ZERO + args.p + names
        self.ask = 5 if args.words else 2                      # tokens of `answer fox in biki is`
        self.T = self.lengths[-1] + args.questions * (self.ask + 1) - 1
        self.check()
        self.held_out = set()                                  # the texts of the test
        self.test = self.make_test()
        self.chance = self.best_constant()

    def check(self):
        """BadInput, in a sentence, for flags that make no sense or ask for too much."""
        args = self.args
        for flag, (low, high) in LIMITS.items():
            value = getattr(args, flag)
            for number in value if isinstance(value, list) else [value]:
                if not low <= number <= high:
                    raise sleep.BadInput(f"--{flag} {number} must be from {low} to {high:,}.")
        if any(args.p % i == 0 for i in range(2, args.p)):
            raise sleep.BadInput(f"--p {args.p} must be a prime: then every factor has an inverse.")
        if args.tests < args.reads:
            raise sleep.BadInput(f"--tests {args.tests} must be one for each of the {args.reads} "
                                 "depths, or more.")
        if args.L > self.lengths[0]:
            raise sleep.BadInput(f"--L {args.L} must be at most the {self.lengths[0]} tokens "
                                 "before the answers: a longer window is never full.")
        for flag, problems in (("tests", args.tests), ("batch_size", args.batch_size)):
            tokens = problems * self.T
            if tokens > 3e7:
                raise sleep.BadInput(f"--{flag} {problems} would be {tokens / 1e6:,.0f} million "
                                     f"tokens, about {tokens / 4e5:,.0f} s to make: take less.")
        rng = random.Random(0)
        for T in (self.lengths[0], self.lengths[-1]):
            problems = [make_problem(args, T, self.deal_depths(rng), rng) for _ in range(40)]
            if problems.count(None) > 36:
                raise sleep.BadInput(f"hardly any text of {T} tokens has {args.questions} "
                                     f"questions with chains of up to {args.reads} reads: take "
                                     "more --places, a longer --T, fewer --reads or --questions.")

    def deal_depths(self, rng):
        """Depths of the questions of a training text: all in random order, again and again."""
        depths = []
        while len(depths) < self.args.questions:
            depths += rng.sample(range(1, self.args.reads + 1), self.args.reads)
        return depths[:self.args.questions]

    def draw(self, T, depths, rng):
        """The tokens of a problem, and a hash of its text, whatever the order of its sentences.

        No text of the test is drawn again.
        """
        for _ in range(10_000):
            problem = make_problem(self.args, T, depths, rng)
            if problem is not None:
                tokens, sentences = problem
                text = hash(frozenset(tuple(sentence) for sentence in sentences))
                if text not in self.held_out:
                    return tokens, text
        raise sleep.BadInput(f"no other text of {T} tokens was found in 10,000 tries: take more "
                             "--places or a longer --T.")

    def make_test(self):
        """Problems of one question, each depth as often. They are the same for every seed."""
        rng = random.Random("test")
        depths = [[1 + i % self.args.reads] for i in range(self.args.tests)]
        problems = []
        for question in tqdm(depths, "problems of the test", disable=None, leave=False):
            tokens, text = self.draw(self.lengths[-1], question, rng)
            problems.append((tokens, text))
        self.held_out = {text for _, text in problems}
        return self.batch([tokens for tokens, _ in problems], depths)

    def make_batch(self, step):
        """Step -> batch, from seed and step alone."""
        rng = random.Random(f"train {self.seed} {step}")
        T = rng.choice(self.lengths)
        depths = [self.deal_depths(rng) for _ in range(self.args.batch_size)]
        return self.batch([self.draw(T, question, rng)[0] for question in depths], depths)

    def batch(self, rows, depths):
        """Lists of tokens and depths -> tokens (B, T), targets (B, answers), depths (B, M)."""
        tokens = torch.tensor(rows, device=self.args.device)
        depths = torch.tensor(depths, device=self.args.device)
        M = depths.shape[1]
        answers = tokens[:, -M * (self.ask + 1):].unflatten(1, (M, self.ask + 1))
        targets = torch.full_like(answers, -1)                 # (B, M, ask + 1)
        targets[..., -2] = answers[..., -1]                    # said by the token before the answer
        return tokens[:, :-1], targets.flatten(1)[:, :-1], depths

    def best_constant(self):
        """The score of the best constant answer on the test, for each depth."""
        _, targets, depths = self.test
        answers = targets[targets >= 0]
        best = {}
        for c in range(self.args.p):
            for depth, accuracy in self.accuracy(answers == ZERO + c, depths).items():
                best[depth] = max(accuracy, best.get(depth, 0.0))
        return dict(accuracy=best)

    def score(self, tokens, targets, logits, depths):
        """Accuracy for each depth.

        targets (B, answers), logits (B, answers, vocab), depths (B, M)
        """
        right = (logits.argmax(-1) == targets)[targets >= 0]
        return dict(accuracy=self.accuracy(right, depths))

    def accuracy(self, right, depths):
        """right (B * M,), depths (B, M) -> {depth: share of its answers that are right}"""
        depths = depths.flatten()
        return {str(d): right[depths == d].float().mean().item() for d in depths.unique().tolist()}

    def text(self, tokens):
        """Token ids as words. tokens (n,)"""
        animals = ANIMALS[:self.args.animals]
        syllables = [c + v for v in "aeiou" for c in "bdfgklmnprstvz"]         # 70
        places = [syllables[i % 70] + syllables[(i // 70 + 11 * i + 3) % 70]   # all of them differ
                  for i in range(self.args.places)]
        names = animals + places
        if not self.args.words:
            names = [f"{animal}-{place}" for place in places for animal in animals + ["all"]]
        words = WORDS + [str(i) for i in range(self.args.p)] + names
        return " ".join(words[i] for i in tokens.tolist() if i != PAD)

    def show(self, tokens, targets):
        """One example: the text, then every question with its answer.

        tokens (T,), targets (answers,)
        """
        said = (targets >= 0).nonzero().flatten() + len(tokens) - len(targets)
        start = said[0].item() - self.ask + 1
        lines = textwrap.wrap(self.text(tokens[:start]), 92, break_on_hyphens=False)
        for i in said.tolist():
            question = self.text(tokens[i - self.ask + 1: i + 1])
            answer = targets[i - len(tokens) + len(targets)] - ZERO
            lines.append(f"{question} {answer}")
        return textwrap.indent("\n".join(lines), "  ")


if __name__ == "__main__":
    sleep.main(__doc__, PRESETS, FLAGS, Problems)
