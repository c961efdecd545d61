"""Word problems in the spirit of GSM-Infinite (Sections 6.3 and 6.4, Figures 4 and 5)

A question, then a text of shuffled sentences that each define one quantity, all modulo a prime p.
Every quantity in it looks alike, few matter. The question is evicted first, then most of the text;
the answer is one number, said in one pass, without a chain of thought.

    fox in biki ? owl in biki is 3 . fox in biki is 2 plus all in dora . emu in dora is
    owl in biki . answer fox in biki is            5: `all in dora` sums what is said of dora

The depth of a question is its longest chain of reads: 1 if a sentence tells the number, else 1 more
than that of the deepest quantity in its sentence (or of its place, if it is a sum). A reverse
problem hides a constant and tells a result instead. A small preset writes a name as one token and
leaves out `is`.

    python train_gsm.py                   N = 1 against N = 3, minutes on two CPU cores
    python train_gsm.py --preset paper --batch_size 64 --recompute      Section 6.3, for a GPU
    python train_gsm.py --preset paper --L 512 --eviction sliding --warmup 1562 --recompute      6.4

paper does not say: how its problems are made. The generator is ours: lab/README.md, "Where the
paper is silent".
"""
import inspect
import json
import multiprocessing
import os
import random
import signal
import textwrap
import zlib
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import sleep

PRESETS = {
    "cpu": dict(N=[1, 3], reads=4, questions=8, T=[48], L=48, p=7, places=8, animals=3, words=False,
                reverse=0.0, problems=100_000, tests=2000, data="out/gsm-data", layout="as",
                d_model=64, n_head=2, steps=1600, batch_size=64, lr_muon=7e-3, lr_adamw=3e-3,
                cooldown=0.15, eval_every=200),
    "gpu": dict(N=[1, 2, 4], reads=8, questions=8, T=[256, 304, 352, 400], L=128, p=11, places=48,
                animals=12, words=True, reverse=0.125, problems=400_000, tests=8000,
                data="out/gsm-data", layout="asas", d_model=256, n_head=4, steps=8000,
                batch_size=128, lr_muon=2e-3, lr_adamw=1e-3, cooldown=0.1, eval_every=400),
    "paper": dict(N=[1, 4], reads=8, questions=8, T=[2000, 2400, 2800, 3200], L=2000, p=11, places=200,
                  animals=12, words=True, reverse=0.125, problems=400_000, tests=8000,
                  data="out/gsm-data", layout="as" * 5, d_model=512, n_head=8, steps=4687,
                  batch_size=256, lr_muon=1e-3, lr_adamw=5e-4, eval_every=500, conv="s"),
}
WORDS = "PAD . ? answer is in all plus times minus unknown".split()
PAD, END, ASK, ANSWER, IS, IN, ALL, PLUS, TIMES, MINUS, UNKNOWN = range(11)    # then 0..p-1, names
ANIMALS = "fox owl emu bear wolf deer hare lynx seal crow toad swan".split()
FORMS = ("copy", "c plus", "c times", "plus", "minus")


FLAGS = dict(
    reads="the longest chain of reads that a question needs",
    questions="questions in a training sequence, all depths taking turns; a test has one",
    T="tokens before the answers; a batch has one of these, the test the largest",
    p="a prime: all numbers are modulo p",
    places="places that quantities can be in",
    animals="at most 12; a place has up to three of them",
    words="names of three words and `is`, else one token a name",
    reverse="share of the training questions that ask for a hidden constant, at most one in a text; "
            "if not 0, half of the test does, from depth 2 on",
    problems="training problems, drawn again and again",
    tests="held-out problems, as many of each depth",
    data="folder to keep them in")


# ------------------------------------------------------------------------------------------------
# The generator

class Quantity(NamedTuple):
    words: list          # tokens of its name
    sentence: list       # tokens of its definition; a sum over a place has none
    value: int
    reads: int           # the longest chain of reads behind it, with its own
    slope: dict          # {u: d value / d u mod p} for itself and every quantity u that it depends on


class Full(Exception):
    """The next sentence does not fit any more."""


def name(s, animal, place):
    """The tokens of a quantity, `owl in biki`; animal None: the sum over a place, `all in biki`."""
    first = 11 + s.p
    if s.words:
        return [ALL if animal is None else first + animal, IN, first + s.animals + place]
    return [first + place * (s.animals + 1) + (s.animals if animal is None else animal)]


def make_text(s, room, rng):
    """Quantities whose sentences fill `room` tokens, and their numbers by depth, or None.

    Places come in random order, each with one to three animals; a place's sum may be spoken of once
    it is complete. A quantity counts only if no slope is 0, that is if nothing cancels out.
    """
    quantities, by_depth = [], [[] for _ in range(s.reads + 1)]
    aimed = [0] * (s.reads + 1)            # how often each depth was tried for

    def add(words, parents, c=0, sentence=()):
        """Quantity c + sum of factor * parent; False if it is too deep, or cancels."""
        nonlocal room
        slope = {len(quantities): 1}
        for parent, factor in parents:
            for u, x in quantities[parent].slope.items():
                slope[u] = (slope.get(u, 0) + factor * x) % s.p
        reads = 1 + max((quantities[parent].reads for parent, _ in parents), default=0)
        if reads > s.reads or not all(slope.values()):
            return False
        if len(sentence) > room:
            raise Full
        room -= len(sentence)
        value = c + sum(factor * quantities[parent].value for parent, factor in parents)
        by_depth[reads].append(len(quantities))
        quantities.append(Quantity(words, list(sentence), value % s.p, reads, slope))
        return True

    def define(words, depth):
        """Try to define `words` with a chain of `depth` reads, if there is anything to read."""
        x, zero = words + [IS] * s.words, 11                   # token of the number 0
        if depth == 1:
            c = rng.randrange(s.p)
            return add(words, [], c, x + [zero + c, END])
        for _ in range(40 * bool(by_depth[depth - 1])):
            form, c, y = rng.choice(FORMS), rng.randint(2, 4), rng.choice(by_depth[depth - 1])
            said = quantities[y].words + [END]
            if form == "copy":
                done = add(words, [(y, 1)], 0, x + said)
            elif form == "c plus":
                c -= rng.randint(0, 1)                         # 1 to 4
                done = add(words, [(y, 1)], c, x + [zero + c, PLUS] + said)
            elif form == "c times":
                done = add(words, [(y, c)], 0, x + [zero + c, TIMES] + said)
            else:
                pair = [y, rng.choice([*chain(*by_depth[:depth])])]
                rng.shuffle(pair)
                sign, word = (1, PLUS) if form == "plus" else (-1, MINUS)
                said = quantities[pair[0]].words + [word] + quantities[pair[1]].words + [END]
                done = pair[0] != pair[1] and add(words, [*zip(pair, (1, sign))], 0, x + said)
            if done:
                return True
        return False

    try:
        for place in rng.sample(range(s.places), s.places):
            here = []
            for animal in rng.sample(range(s.animals), rng.randint(1, min(3, s.animals))):
                depth = 1
                if s.reads > 1 and rng.random() > 0.3:         # the depth that was tried least
                    depth = min(range(2, s.reads + 1), key=lambda x: (aimed[x], rng.random()))
                aimed[depth] += 1
                if define(name(s, animal, place), depth):
                    here.append(len(quantities) - 1)
            if here:
                add(name(s, None, place), [(i, 1) for i in here])
    except Full:
        return quantities, by_depth
    return None                            # the names ran out before the text was full


def make_problem(s, T, depths, reverse, rng):
    """A text of T tokens and one question for each of `depths`; `reverse`: one of them is.

    Returns tokens, answers, depths (in the order of the questions, negative if reverse) and the
    sentences, or None if this text has no such question: then the caller draws another one.
    """
    size, verb = 3 if s.words else 1, [IS] * s.words
    # Names of the questions and `?`; in a reverse problem also the sentence that tells a value.
    text = make_text(s, T - len(depths) * size - 1 - reverse * (size + len(verb) + 2), rng)
    if text is None:
        return None
    quantities, by_depth = text
    sentences, hidden, asked, said = [q.sentence for q in quantities], None, [], []
    if reverse:
        back = rng.choice([d for d in depths if d > 1])
        if not by_depth[back]:
            return None
        told = quantities[rng.choice(by_depth[back])]
        hidden = rng.choice([u for u in told.slope if len(quantities[u].slope) == 1])
        sentences[hidden] = quantities[hidden].words + verb + [UNKNOWN, END]
        sentences.append(told.words + verb + [11 + told.value, END])
    for d in depths:
        if reverse and d == back and hidden not in asked:
            asked.append(hidden)
            said.append(-d)
            continue
        free = [i for i in by_depth[d] if hidden not in quantities[i].slope and i not in asked]
        if not free:
            return None
        asked.append(rng.choice(free))
        said.append(d)
    sentences = [x for x in sentences if x]
    rng.shuffle(sentences)
    asked = [quantities[i] for i in asked]
    tokens = [*chain(*(q.words for q in asked)), ASK, *chain(*sentences)]
    tokens = [PAD] * (T - len(tokens)) + tokens
    for q in asked:
        tokens += [ANSWER, *q.words, *verb, 11 + q.value]
    return tokens, [q.value for q in asked], said, sentences


def make_problems(settings, T, M, numbers):
    """Problems number `numbers` as arrays, see load_problems. A worker process calls it."""
    s, test, rows, depths = SimpleNamespace(**settings), M == 0, [], []
    for i in numbers:
        rng = random.Random(f"{'test' if test else 'train'} {T} {i}")
        asked = [1 + i % s.reads] if test else [
            d for _ in range(0, M, s.reads) for d in rng.sample(range(1, s.reads + 1), s.reads)][:M]
        share = (0.5 if s.reverse else 0) if test else s.reverse * M           # of these texts
        reverse = max(asked) > 1 and rng.random() < share
        for _ in range(1000):
            problem = make_problem(s, T, asked, reverse, rng)
            # One text in eight is for the test, whatever the order of its sentences.
            if problem and (zlib.crc32(str(sorted(problem[3])).encode()) % 8 == 0) == test:
                break
        else:
            raise sleep.BadInput(f"no text of {T} tokens with chains of up to {s.reads} reads was found in "
                             "1000 tries: take more --places, a longer --T, fewer --reads or --questions.")
        rows.append(problem[0])
        depths.append(problem[2])
    kind = np.uint8 if vocabulary(s) <= 256 else np.int16
    return np.array(rows, kind), np.array(depths, np.int8)


def vocabulary(s):
    return 11 + s.p + (s.animals + s.places if s.words else s.places * (s.animals + 1))


def load_problems(settings, T, M, n, folder):
    """n problems with texts of T tokens, from disk or made now; M = 0: the test, one question each.

    Returns tokens (n, T + answers) and the depths of the questions (n, M), negative if reverse.
    """
    generator = f"{WORDS} {FORMS}" + "".join(
        map(inspect.getsource, (name, make_text, make_problem, make_problems)))
    what = json.dumps(dict(settings, T=T, questions=M, problems=n, generator=zlib.crc32(
        generator.encode())), sort_keys=True)
    path = Path(folder) / f"{'train' if M else 'test'}-T{T}-{zlib.crc32(what.encode()):08x}.npz"
    if path.exists():
        try:
            with np.load(path) as saved:
                if str(saved["what"]) == what:
                    return saved["tokens"], saved["depths"]
        except Exception as e:             # np.load raises many kinds for a broken file
            raise sleep.BadInput(f"{path} cannot be read ({type(e).__name__}): delete it, and these "
                             "problems will be made anew.") from None
    print(f"making {n:,} problems of {T} tokens, once, for {path}")
    job = partial(make_problems, settings, T, M)
    jobs = [range(i, min(i + 500, n)) for i in range(0, n, 500)]
    bar = partial(tqdm, total=len(jobs), desc=f"500 problems each, T = {T}", disable=None, leave=False)
    if len(jobs) <= 4:
        parts = list(bar(map(job, jobs)))
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        with multiprocessing.get_context("spawn").Pool(     # Ctrl-C is for this process alone
                min(cores, len(jobs), 16), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            parts = list(bar(pool.imap(job, jobs)))
    tokens, depths = (np.concatenate(x) for x in zip(*parts))

    def save(p):
        with open(p, "wb") as f:
            np.savez(f, tokens=tokens, depths=depths, what=what)
    sleep.write(path, save)
    return tokens, depths


# ------------------------------------------------------------------------------------------------
# The task

class Problems:
    """The task, as sleep.main wants it; its batches carry the depths of the questions (B, M)."""
    name = "gsm"

    def __init__(self, args, seed):
        self.args, self.seed, self.lengths = args, seed, sorted(set(args.T))
        self.settings = {k: getattr(args, k) for k in
                         ("reads", "p", "places", "animals", "words", "reverse")}
        self.vocab_size = vocabulary(SimpleNamespace(**self.settings))
        self.ask = 5 if args.words else 2                      # tokens of `answer fox in biki is`
        self.T = self.lengths[-1] + args.questions * (self.ask + 1) - 1
        if not 5 <= args.p < 100 or any(args.p % i == 0 for i in range(2, args.p)):
            raise sleep.BadInput(f"--p {args.p} must be a prime from 5 to 97: then every factor has an "
                             "inverse, and reverse problems one solution.")
        if not (1 <= args.reads < 128 and args.questions >= 1):
            raise sleep.BadInput(f"--reads {args.reads} must be 1 to 127, and --questions "
                                 f"{args.questions} at least 1.")
        if not (1 <= args.animals <= len(ANIMALS) and 1 <= args.places <= 4900
                and 0 <= args.reverse <= 1 / args.questions and self.vocab_size < 2 ** 15):
            raise sleep.BadInput(f"--animals {args.animals} must be 1 to {len(ANIMALS)}, --places "
                             f"{args.places} 1 to 4900 with fewer than 32,768 tokens in all (here "
                             f"{self.vocab_size:,}), --reverse {args.reverse} 0 to 1 / questions.")
        if not 1 <= args.L <= self.lengths[0]:
            raise sleep.BadInput(f"--L {args.L} must be between 1 and the {self.lengths[0]} tokens before "
                             "the answers: a longer window is never full.")
        if args.problems < len(self.lengths) or args.tests < args.reads:
            raise sleep.BadInput(f"--problems {args.problems} must be at least one for each of --T, --tests "
                             f"{args.tests} one for each of the {args.reads} depths.")

    @cached_property
    def test(self):
        """Problems of one question, each depth as often; no text of the training."""
        problems = load_problems(self.settings, self.lengths[-1], 0, self.args.tests, self.args.data)
        return self.batch(*(torch.from_numpy(x).to(self.args.device) for x in problems))

    @cached_property
    def training(self):
        """The arrays for each length, as bytes on the device: a batch costs no copy to it."""
        n = self.args.problems // len(self.lengths)
        return [[torch.from_numpy(x).to(self.args.device) for x in load_problems(
            self.settings, T, self.args.questions, n, self.args.data)] for T in self.lengths]

    @cached_property
    def chance(self):
        """The best single number for each metric and depth, found on the test."""
        tokens, targets, depths = self.test
        right = [self.metrics(targets[targets >= 0] == c, depths) for c in range(11, 11 + self.args.p)]
        return {metric: {d: max(r[metric][d] for r in right) for d in by_depth}
                for metric, by_depth in right[0].items()}

    def batch(self, tokens, depths):
        """Rows of problems -> tokens (B, T), targets (B, answers), depths (B, M)."""
        tokens, depths, M, phrase = tokens.long(), depths.long(), depths.shape[1], self.ask + 1
        answers = tokens[:, -M * phrase:].unflatten(1, (M, phrase))            # (B, M, phrase)
        targets = torch.full_like(answers, -1)
        targets[..., -2] = answers[..., -1]                    # said by the token before the answer
        return tokens[:, :-1], targets.flatten(1)[:, :-1], depths

    def make_batch(self, step):
        """Step -> batch, from seed and step alone; every seed draws from the same problems."""
        key, device = self.seed * 10 ** 9 + step, self.args.device
        tokens, depths = self.training[random.Random(key).randrange(len(self.lengths))]
        rows = torch.randint(len(tokens), (self.args.batch_size,), device=device,
                             generator=torch.Generator(device).manual_seed(key))
        return self.batch(tokens[rows], depths[rows])

    def score(self, tokens, targets, logits, depths):
        """Accuracy by depth: of all problems, and of forward and reverse ones."""
        return self.metrics((logits.argmax(-1) == targets)[targets >= 0], depths)

    def metrics(self, right, depths):
        depths, metrics = depths.flatten(), {}
        kinds = [("accuracy", depths != 0), ("forward", depths > 0), ("reverse", depths < 0)]
        for metric, chosen in kinds if self.args.reverse else kinds[:1]:
            if chosen.any():
                metrics[metric] = {str(d): right[chosen & (depths.abs() == d)].float().mean().item()
                                   for d in depths[chosen].abs().unique().tolist()}
        return metrics

    def text(self, tokens):
        """Token ids as words."""
        s = self.args
        syllables = [c + v for v in "aeiou" for c in "bdfgklmnprstvz"]
        places = [syllables[i % 70] + syllables[(i // 70 + 11 * i + 3) % 70] for i in range(s.places)]
        if s.words:
            names = ANIMALS[:s.animals] + places
        else:
            names = [f"{a}-{place}" for place in places for a in (*ANIMALS[:s.animals], "all")]
        words = WORDS + [str(i) for i in range(s.p)] + names
        return " ".join(words[i] for i in tokens.tolist() if i != PAD)

    def show(self, tokens, targets):
        """The text, then every question with its answer."""
        start = len(tokens) + 1 - (self.ask + 1) * ((len(targets) + 1) // (self.ask + 1))
        lines = textwrap.wrap(self.text(tokens[:start]), 92, break_on_hyphens=False)
        for i in (targets >= 0).nonzero().flatten().tolist():
            end = len(tokens) - len(targets) + i + 1
            lines.append(f"{self.text(tokens[end - self.ask: end])} {targets[i] - 11}")
        return textwrap.indent("\n".join(lines), "  ")


if __name__ == "__main__":
    sleep.main(__doc__, PRESETS, FLAGS, Problems)
