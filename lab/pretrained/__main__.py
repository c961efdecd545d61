"""A pretrained model reads facts, forgets them, and is asked: untouched, evicted, and trained to sleep

    python -m lab.pretrained FILE                              the model of a GGUF file or of a folder
    python -m lab.pretrained FILE --checkpoint RUN/N3-seed0.pt           also a model that was trained

A text of the task in lab/pretrained/facts.py is shown, and one question for every person in it. Every
answer is the likeliest next token of all. FILE: see `python -m lab.pretrained.facts --help`.
"""
from types import SimpleNamespace

import torch

import sleep
from lab.common import parser, program
from lab.pretrained import facts, model, read


@torch.no_grad()
def answers(reader, tokenizer, memory, people):
    """What the model says of each person, as text: each is asked from the same memory."""
    said = []
    for name, _, _ in people:
        question = torch.tensor([tokenizer.encode(f" So {name} is in")])
        logits, _ = reader.wake(reader.embed(question), memory)
        said.append(tokenizer.decode([logits[0, -1].argmax()]))
    return said


@torch.no_grad()
def read_awake(reader, tokens):
    """The memory with the whole text in view."""
    return reader.wake(reader.embed(tokens), reader.empty_memory(1))[1]


@torch.no_grad()
def read_asleep(reader, tokens, N):
    """The memory after a sleep of N passes over every window: what was evicted is gone."""
    memory = reader.empty_memory(1)
    for window in tokens.split(reader.cfg.L, dim=1):
        memory = reader.sleep(reader.embed(window), memory, N)
    return memory


def say(title, people, said):
    right = sum(text.strip() == place for text, (_, _, place) in zip(said, people))
    print(f"\n{title}: {right} of {len(people)} right")
    for text, (name, depth, place) in zip(said, people):
        words = repr(text.strip() or text)
        mark = "right" if text.strip() == place else f"it is {place}"
        print(f"  {depth} read{'s' if depth > 1 else ''}:  So {name} is in {words:<12} {mark}")


def settings_of(checkpoint, file, device="cpu"):
    """The settings of a run, or those of the preset: a dict."""
    _, args = sleep.parse("", facts.PRESETS, facts.FLAGS, ["--device", device])
    settings = vars(args) | dict(N=1, seed=0)
    if checkpoint:
        settings |= sleep.read_checkpoint(checkpoint)["run"]["settings"]
    return settings | dict(file=file, tests=1, device=device)


@program
def main(argv):
    p = parser(__doc__)
    p.add_argument("file", help="a GGUF file, or a folder with safetensors")
    p.add_argument("--checkpoint", help="a model that lab.pretrained.facts trained")
    p.add_argument("--text", type=int, default=0, help="another text (default: 0)")
    args = p.parse_args(argv)
    settings = settings_of(args.checkpoint, args.file)
    shape, tensors, tokenizer = facts.read_once(args.file)
    task = facts.Facts(SimpleNamespace(**settings), seed=0)
    sentences, people, tokens = task.text(args.text)
    people = sorted(people, key=lambda person: person[1])
    print("".join(sentences).strip())
    print(f"\n{tokens.shape[1]} tokens; a constant answer is right for one person in "
          f"{len(facts.PLACES)}, one of the named places for one in {len({p[2] for p in people})}.")

    whole = model.make(shape, tensors, L=2 * tokens.shape[1])
    memory = read_awake(whole, tokens)
    say("Everything in view, untouched", people, answers(whole, tokenizer, memory, people))
    memory = whole.evict(memory)
    say("The text is evicted, nothing is trained", people, answers(whole, tokenizer, memory, people))
    if args.checkpoint is None:
        return
    del whole
    N = settings["N"]
    cfg = sleep.Config(task.vocab_size, task.T, **{flag: settings[flag] for flag in sleep.MODEL_FLAGS})
    trained = facts.make_model(cfg, settings)
    trained.load_state_dict(sleep.read_checkpoint(args.checkpoint)["model"])
    memory = read_asleep(trained, tokens, N)
    title = f"Trained, and slept over it for {N} pass{'es' if N > 1 else ''}; the text is evicted"
    say(title, people, answers(trained, tokenizer, memory, people))


if __name__ == "__main__":
    main()
