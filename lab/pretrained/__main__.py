"""A pretrained model reads facts, forgets them, and is asked

    python -m lab.pretrained FILE                                 everything in view; and evicted
    python -m lab.pretrained FILE --checkpoint RUN/N3-seed0.pt    also after training to sleep
    python -m lab.pretrained FILE --texts 100                     how often it is right

A text of the task in lab/pretrained/facts.py is shown, and a question for every person in it. Every
answer is the likeliest next token of all. FILE: see `python -m lab.pretrained.facts --help`.
"""
from types import SimpleNamespace

import torch

import sleep
from lab.common import parser, program
from lab.pretrained import facts, model


@torch.no_grad()
def answers(reader, tokenizer, memory, people):
    """What the model says of each person, as text: all are asked from the same memory."""
    questions = torch.tensor([tokenizer.encode(f" So {name} is in") for name, _, _ in people])
    memory = for_each(memory, len(people))
    logits, _ = reader.wake(reader.embed(questions), memory)
    return [tokenizer.decode([token]) for token in logits[:, -1].argmax(-1)]


def for_each(memory, B):
    """The memory of one sequence -> that of B which have read the same."""

    def repeat(x):
        return None if x is None else x.expand(B, *x.shape[1:])

    cache = [sleep.Cache(*map(repeat, parts)) for parts in memory.cache]
    return sleep.Memory([repeat(S) for S in memory.S], cache, memory.n_awake)


@torch.no_grad()
def in_view(reader, tokens):
    """The memory with the whole text in view."""
    return reader.wake(reader.embed(tokens), reader.empty_memory(1))[1]


@torch.no_grad()
def slept(reader, tokens, N):
    """The memory after a sleep of N passes over every window, and the eviction of all of them."""
    memory = reader.empty_memory(1)
    for window in tokens.split(reader.cfg.L, dim=1):
        memory = reader.sleep(reader.embed(window), memory, N)
    return memory


def say(title, people, said):
    print(f"\n{title}")
    for text, (name, depth, place) in zip(said, people):
        mark = "right" if text.strip() == place else f"it is {place}"
        print(f"  {depth} read{'s' if depth > 1 else ' '}  So {name} is in{text:<12} {mark}")


def share_right(people, said, depth):
    right = []
    for text, (_, reads, place) in zip(said, people):
        if reads == depth:
            right.append(text.strip() == place)
    return sum(right) / len(right)


def settings_of(checkpoint, file):
    """The settings of a run, or those of the preset: a dict."""
    _, args = sleep.parse("", facts.PRESETS, facts.FLAGS, ["--device", "cpu"])
    settings = vars(args) | dict(N=1, seed=0)
    if checkpoint:
        try:
            settings |= sleep.read_checkpoint(checkpoint)["run"]["settings"]
        except (KeyError, TypeError):
            raise sleep.BadInput(f"{checkpoint} is no checkpoint of "
                                 "lab.pretrained.facts.") from None
    return settings | dict(file=file, tests=1, device="cpu")


def trained_model(checkpoint, settings, task):
    values = {flag: settings[flag] for flag in sleep.MODEL_FLAGS}
    trained = facts.make_model(sleep.Config(task.vocab_size, task.T, **values), settings)
    try:
        trained.load_state_dict(sleep.read_checkpoint(checkpoint)["model"])
    except (KeyError, RuntimeError):
        raise sleep.BadInput(f"{checkpoint} is of another model than the file.") from None
    return trained


@program
def main(argv):
    p = parser(__doc__)
    p.add_argument("file", help="a GGUF file, or a folder with safetensors")
    p.add_argument("--checkpoint", help="a model that lab.pretrained.facts trained")
    p.add_argument("--texts", type=int, default=1, help="texts that are read (default: 1)")
    args = p.parse_args(argv)
    if not 1 <= args.texts <= 10_000:
        raise sleep.BadInput(f"--texts {args.texts} must be from 1 to 10,000.")
    settings = settings_of(args.checkpoint, args.file)
    shape, tensors, tokenizer = facts.read_once(args.file)
    task = facts.Facts(SimpleNamespace(**settings), seed=0)
    N = settings["N"]
    whole = model.make(shape, tensors, L=2 * task.T)
    trained = trained_model(args.checkpoint, settings, task) if args.checkpoint else None

    results = {}
    for number in range(args.texts):
        sentences, people, tokens = task.text(number)
        people = sorted(people, key=lambda person: person[1])
        memory = in_view(whole, tokens)
        said = {"everything in view, untouched": answers(whole, tokenizer, memory, people),
                "evicted, untouched": answers(whole, tokenizer, whole.evict(memory), people)}
        if trained is not None:
            memory = slept(trained, tokens, N)
            title = f"trained; evicted after a sleep of {N} pass{'es' if N > 1 else ''}"
            said[title] = answers(trained, tokenizer, memory, people)
        if number == 0:
            print("".join(sentences).strip())
        for title, texts in said.items():
            if number == 0:
                say(title, people, texts)
            for depth in range(1, settings["reads"] + 1):
                results.setdefault((title, depth), []).append(share_right(people, texts, depth))

    constant = 1 / len(facts.PLACES)
    named = settings["reads"] / len(people)
    print(f"\nshare right, texts: {args.texts} (a constant answer: {constant:.2f}; one of the "
          f"places that are named: {named:.2f})")
    for (title, depth), shares in results.items():
        print(f"  {title}, {depth} read{'s' if depth > 1 else ''}: {sum(shares) / len(shares):.2f}")


if __name__ == "__main__":
    main()
