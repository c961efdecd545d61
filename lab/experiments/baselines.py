"""What can be guessed, looked up or read off without sleep: the baselines of Rule 110 and of the word
problems. (Of k hops nothing can: a test computes it.)

    python -m lab.baselines ca --split 0        lookups and a small network, on the tapes of train_ca.py
    python -m lab.baselines gsm                 the commonest number; readers of one to three sentences

The flags are those of train_ca.py and train_gsm.py.
"""
import sys
from collections import Counter

import torch
import torch.nn.functional as F

import sleep
import train_ca
import train_gsm


# ------------------------------------------------------------------------------------------------
# Rule 110

def ca(task):
    """{baseline: metrics on the test} of Rule 110, a train_ca.Tapes."""
    if task.W > 20:
        raise sleep.BadInput(f"--W {task.W}: the lookups list all tapes, so take 20 cells at most.")
    every = torch.arange(1 << task.W)
    cells = (every[:, None] >> torch.arange(task.W)) & 1                       # (2^W, W)
    label, trained = train_ca.evolve(cells, task.rule, task.t)[:, 0], ~task.held_out(every)
    tokens, labels = task.test
    asked = (tokens[:, :task.W * task.n_tapes].unflatten(1, (task.n_tapes, task.W))
             << torch.arange(task.W)).sum(-1)                                  # (B, tapes)

    def score(guess):                      # of every tape -> metrics
        right = guess[asked] == labels
        return dict(exact=right.all(1).float().mean().item(), bit=right.float().mean().item())

    def lookup(mask):                      # what most trained tapes with the same cells say
        ones = torch.zeros(1 << task.W).index_add_(0, every[trained] & mask, label[trained].float())
        seen = torch.zeros(1 << task.W).index_add_(0, every[trained] & mask, torch.ones(trained.sum()))
        known = (seen > 0)[every & mask]
        return torch.where(known, (ones > seen / 2)[every & mask].long(), label[trained].mode()[0])

    bits = [1 << i for i in range(task.W) if task.bits >> i & 1]
    near = every[:, None] ^ torch.tensor(bits)                                 # (2^W, cells)
    votes = ((2 * label[near] - 1) * trained[near]).sum(1)
    drop = {i: score(lookup(((1 << task.W) - 1) ^ (1 << i))) for i in range(task.W)}
    matter = {i: score(lookup(task.bits ^ bit)) for i, bit in enumerate(bits)}
    best = lambda scores: max(scores.values(), key=lambda metrics: metrics["bit"])
    return {"best constant": task.chance,
            "majority of the trained patterns that differ in one cell": score((votes > 0).long()),
            "best lookup that forgets one cell of the ring": best(drop),
            "best lookup of the cells that matter but one": best(matter),
            "network (256, 256) on the cells": score(network(2.0 * cells - 1, label, trained))}


def network(x, label, trained, steps=2000):
    """The labels that an MLP predicts for all x after training on those that are trained."""
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 256), torch.nn.ReLU(),
                              torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 2))
    adamw, rows = torch.optim.AdamW(mlp.parameters(), lr=1e-3), trained.nonzero().flatten()
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (512,))]
        adamw.zero_grad()
        F.cross_entropy(mlp(x[batch]), label[batch]).backward()
        adamw.step()
    with torch.no_grad():
        return mlp(x).argmax(1)


# ------------------------------------------------------------------------------------------------
# Word problems

def read(task, row):
    """A row of tokens -> the name asked for, and [name, what is said of it...] of each sentence."""
    text = (task.text(row) + " ").replace(" is ", " ").replace(" in ", "-")
    asked, rest = text.split(" ? ")
    body, _ = rest.split(" answer ")
    return asked, [sentence.split() for sentence in body.split(" .") if sentence.strip()]


def resolve(asked, sentences, p, reads):
    """The value of a name if `reads` nested reads are enough, else None; reverse is too much."""
    if reads == 0:
        return None
    if asked.startswith("all-"):
        members = [name for name, *_ in sentences if name.endswith(asked[3:]) and name != asked]
        said = " plus ".join(dict.fromkeys(members)).split()
    else:
        said = next((rest for name, *rest in sentences if name == asked), [])
    factor, total, sign = 1, 0, 1
    if said[1:2] == ["times"]:
        factor, said = int(said[0]), said[2:]
    for word in said:
        if word in ("plus", "minus"):
            sign = 1 if word == "plus" else -1
            continue
        value = int(word) if word.isdigit() else resolve(word, sentences, p, reads - 1)
        if value is None:
            return None
        total += sign * value
    return factor * total % p if said and said != ["unknown"] else None


def gsm(task):
    """{baseline: {depth: accuracy}} of word problems, a train_gsm.Problems; a reader who cannot tell
    takes the commonest number."""
    tokens, targets, depths = task.test
    answers, right = targets[targets >= 0].tolist(), {}
    for row, answer, depth in zip(tokens, answers, depths.flatten().abs().tolist()):
        asked, sentences = read(task, row)
        told = Counter(said[0] for _, *said in sentences if len(said) == 1 and said[0].isdigit())
        common = int(told.most_common(1)[0][0]) if told else 0
        guesses = {"commonest number among the sentences `x is c`": common}
        for reads in (1, 2, 3):
            value = resolve(asked, sentences, task.args.p, reads)
            guesses[f"a reader of {reads} sentence{'s' * (reads > 1)} in a chain"] = common if value is None else value
        for baseline, guess in guesses.items():
            right.setdefault(baseline, {}).setdefault(str(depth), []).append(guess == answer - 11)
    return {"best constant": dict(accuracy=task.chance["accuracy"])} | {
        baseline: dict(accuracy={d: sum(hits) / len(hits) for d, hits in sorted(by_depth.items())})
        for baseline, by_depth in right.items()}


def main(argv=None):
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["-h"]
    if name not in ("ca", "gsm"):
        print(__doc__)
        sys.exit(0 if name in ("-h", "--help") else 2)
    module, Task, baselines = dict(ca=(train_ca, train_ca.Tapes, ca),
                                   gsm=(train_gsm, train_gsm.Problems, gsm))[name]
    args = sleep.parse(module.__doc__, module.PRESETS, module.FLAGS, rest)[1]
    try:
        for baseline, metrics in baselines(Task(args, args.seed[0])).items():
            print(f"{baseline:60} {sleep.line(metrics)}")
    except sleep.BadInput as e:
        print(f"baselines.py: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
