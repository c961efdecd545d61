"""What can be guessed, looked up or read off without sleep: the baselines of Rule 110 and of the
word problems. (Of k hops nothing can: a test computes it.)

    python -m lab.experiments.baselines ca --split 0  lookups and a small network
    python -m lab.experiments.baselines gsm  the commonest number; readers of one to three sentences

The flags are those of train_ca.py and train_gsm.py that make the task, --seed and --L; flags of the
model or of the training change nothing here.
"""
from collections import Counter

import torch
import torch.nn.functional as F

import sleep
import train_ca
import train_gsm
from lab.common import mean, program


# ------------------------------------------------------------------------------------------------
# Rule 110

def ca(task):
    """{baseline: metrics on the test} of Rule 110, a train_ca.Tapes."""
    W = task.W
    if W > 20:
        raise sleep.BadInput(f"--W {W}: the lookups list all tapes, so take 20 cells at most.")
    tape = torch.arange(1 << W)            # every tape, as a number: bit i is cell i
    cells = (tape[:, None] >> torch.arange(W)) & 1             # (2^W, W)
    label = train_ca.evolve(cells, task.rule, task.t)[:, 0]
    trained = ~task.held_out(tape)
    tokens, test_labels = task.test
    test_cells = tokens[:, :W * task.n_tapes].unflatten(1, (task.n_tapes, W))
    test_tape = (test_cells << torch.arange(W)).sum(-1)        # (B, tapes)

    def score(predicted):
        """Metrics of the labels predicted for all tapes (2^W,)."""
        right = predicted[test_tape] == test_labels
        return dict(exact=right.all(1).float().mean().item(), bit=right.float().mean().item())

    def lookup(mask):
        """Metrics of the majority among the trained tapes that agree in the cells of the mask."""
        key = tape & mask
        n_ones = torch.zeros(1 << W).index_add_(0, key[trained], label[trained].float())
        n_seen = torch.zeros(1 << W).index_add_(0, key[trained], torch.ones(trained.sum()))
        commonest = label[trained].mode()[0]
        majority = (n_ones > n_seen / 2).long()
        return score(torch.where(n_seen[key] > 0, majority[key], commonest))

    all_cells = (1 << W) - 1
    matter = [1 << i for i in range(W) if task.deciding >> i & 1]
    neighbours = tape[:, None] ^ torch.tensor(matter)          # differ in one cell that matters
    votes = ((2 * label[neighbours] - 1) * trained[neighbours]).sum(1)
    without_a_cell = [lookup(all_cells ^ (1 << i)) for i in range(W)]
    without_a_cell_that_matters = [lookup(task.deciding ^ bit) for bit in matter]
    return {
        "best constant": task.chance,
        "majority of the trained patterns that differ in one cell": score((votes > 0).long()),
        "best lookup that forgets one cell of the ring": best_bit(without_a_cell),
        "best lookup of the cells that matter but one": best_bit(without_a_cell_that_matters),
        "network (256, 256) on the cells": score(network(2.0 * cells - 1, label, trained)),
    }


def best_bit(scores):
    return max(scores, key=lambda metrics: metrics["bit"])


def network(x, label, trained, steps=2000):
    """The labels that an MLP predicts for all x after training on those that are trained."""
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 256), torch.nn.ReLU(),
                              torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 2))
    adamw = torch.optim.AdamW(mlp.parameters(), lr=1e-3)
    rows = trained.nonzero().flatten()
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
    asked, rest = task.text(row).split(" ? ")
    body, _ = rest.split(" answer ")
    return asked, [sentence.split() for sentence in body.split(" .") if sentence]


def resolve(asked, sentences, p, reads):
    """The value of a name if `reads` nested reads are enough, else None."""
    if reads == 0:
        return None
    said = next((rest for name, *rest in sentences if name == asked), [])
    if not said:
        return None
    total = 0
    sign = 1
    for word in said:
        if word in ("plus", "minus"):
            sign = 1 if word == "plus" else -1
            continue
        value = int(word) if word.isdigit() else resolve(word, sentences, p, reads - 1)
        if value is None:
            return None
        total += sign * value
    return total % p


def gsm(task):
    """{baseline: {depth: accuracy}} of word problems, a train_gsm.Problems; a reader who cannot
    tell takes the commonest number."""
    tokens, targets, depths = task.test
    answers = targets[targets >= 0].tolist()
    right = {}                             # {baseline: {depth: [bool]}}
    for row, answer, depth in zip(tokens, answers, depths.flatten().tolist()):
        asked, sentences = read(task, row)
        numbers = Counter(said[0] for _, *said in sentences if len(said) == 1 and said[0].isdigit())
        commonest = int(numbers.most_common(1)[0][0]) if numbers else 0
        predicted = {"commonest number among the sentences `x c .`": commonest}
        for reads in (1, 2, 3):
            value = resolve(asked, sentences, task.args.p, reads)
            plural = "" if reads == 1 else "s"
            baseline = f"a reader of {reads} sentence{plural} in a chain"
            predicted[baseline] = commonest if value is None else value
        for baseline, number in predicted.items():
            hits = right.setdefault(baseline, {}).setdefault(str(depth), [])
            hits.append(number == answer - train_gsm.ZERO)
    found = {"any number": dict(accuracy=task.chance["accuracy"])}
    for baseline, by_depth in right.items():
        accuracy = {depth: mean(hits) for depth, hits in sorted(by_depth.items())}
        found[baseline] = dict(accuracy=accuracy)
    return found


@program
def main(argv):
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    name, *flags = argv
    if name == "ca":
        module, Task, baselines = train_ca, train_ca.Tapes, ca
    elif name == "gsm":
        module, Task, baselines = train_gsm, train_gsm.Problems, gsm
    else:
        raise sleep.BadInput(f"there are baselines of ca and of gsm, not of {name}.")
    allowed = {*module.FLAGS, "seed", "L", "preset", "device"}
    names = {flag[2:].split("=")[0] for flag in flags if flag.startswith("--")} - {"help"}
    if names - allowed:
        raise sleep.BadInput(f"--{' --'.join(sorted(names - allowed))} changes nothing here: "
                             "leave it out.")
    _, args = sleep.parse(module.__doc__, module.PRESETS, module.FLAGS, flags)
    for baseline, metrics in baselines(Task(args, args.seed[0])).items():
        print(f"{baseline:60} {sleep.format_metrics(metrics)}")


if __name__ == "__main__":
    main()
