"""When to wake: does a sleep show that it is finished?

    python -m lab.experiments.when_to_wake out/a/N4-seed0.pt        k hops or trees
    python -m lab.experiments.when_to_wake out/a/N3-seed0.pt --N 8  at most 8 passes
    python -m lab.experiments.when_to_wake --draw lab/results/trees-wake.json         draw it again

Sleeps over every window of the test for up to --N passes. After each pass: how far h and S have
moved (|now - before| / |now|, a window at a time), and what is answered if it is asked after so
many passes. Then a sleep that stops by itself, as soon as a pass moves h (or S) by less than a
threshold: its passes and its accuracy, beside those of a sleep of N passes for every window.
"""
from argparse import Namespace
from pathlib import Path

import torch

import sleep
from lab.common import (METRIC_WORDS, TASK_WORDS, check_output, parser, picture_of, program,
                        read_results, write_results)
from lab.course import demo
from lab.experiments import variants
from lab.experiments.plots import figure, legend, save_figure
from lab.experiments.registry import load_task

THRESHOLDS = [0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05]


def load(path):
    """The model and the task of a checkpoint; BadInput if it is none with one window asleep."""
    if not Path(path).is_file():
        raise sleep.BadInput(f"there is no checkpoint {path}.")
    try:
        saved = sleep.read_checkpoint(Path(path))
        run = saved["run"]
        if run["task"] not in ("khop", "hops", "trees"):
            raise ValueError
        _, presets, _, Task = load_task(run["task"])
        # A flag that the run does not name is as in the cpu preset.
        settings = sleep.DEFAULTS | presets["cpu"] | run["settings"]
        settings |= dict(device="cpu", batch_size=1, N=run["N"])
        task = Task(Namespace(**settings | dict(N=[run["N"]])), settings["seed"])
        values = {flag: settings[flag] for flag in sleep.MODEL_FLAGS}
        model = variants.make_model(sleep.Config(task.vocab_size, task.T, **values), settings)
        model.load_state_dict(saved["model"])
    except Exception:                 # another file, a dict of other keys, a model of other shapes
        raise sleep.BadInput(f"{path} is no checkpoint of k hops or trees: train one "
                             "with `python -m lab.experiments.trees`.") from None
    if not all(p.isfinite().all() for p in model.parameters()):
        raise sleep.BadInput(f"{path}: a weight of this model is not finite.")
    one_window = task.T - task.test[1].shape[1] == model.cfg.L
    if model.cfg.eviction != "hard" or not one_window:
        raise sleep.BadInput(f"{path}: only models with hard eviction and all edges in one window "
                             "are watched.")
    return model, task


# ------------------------------------------------------------------------------------------------
# Measuring

@torch.no_grad()
def watch(model, tokens, targets, N):
    """-> moves of h and of S (N, B), and which questions would be answered rightly (N, B, M)."""
    L = model.cfg.L
    h = model.embed(tokens[:, :L])
    questions = model.embed(tokens[:, L:])
    empty = model.empty_memory(len(tokens))
    seen, _ = demo.passes(model, h, empty, N)
    h_before = h
    S_before = flat(empty.S)
    h_moved = []
    S_moved = []
    right = []
    for h_now, S_now in seen:
        logits, _ = model.wake(questions, sleep.Memory(S_now, empty.cache, 0))
        right.append(logits.argmax(-1) == targets)
        S_now = flat(S_now)
        h_moved.append(norm(h_now - h_before) / norm(h_now))
        S_moved.append(norm(S_now - S_before) / norm(S_now))
        h_before = h_now
        S_before = S_now
    return torch.stack(h_moved), torch.stack(S_moved), torch.stack(right)


def flat(S):
    """The fast weights of all blocks, (B, numbers)."""
    return torch.cat([x.flatten(1) for x in S if x is not None], 1)


def norm(x):
    """The length of each sequence's numbers, (B,)."""
    return x.flatten(1).norm(dim=1)


def stopped(moved, threshold):
    """moved (N, B) -> the pass (from 0) after which each window is asked: the first from the
    second on that moves by less than the threshold, or the last."""
    small = moved < threshold
    small[0] = False
    small[-1] = True
    return small.int().argmax(0)


def in_order(tokens, depths, first):
    """The same trees, edges sorted by depth: those of "parents", or of "children", come first."""
    n = depths.shape[1]
    edges = tokens[:, :2 * n].unflatten(1, (n, 2))             # (B, n, 2): node, parent
    asked = tokens[:, 2 * n:]
    depth_of_node = torch.zeros_like(depths).scatter(1, asked, depths)
    depth_of_edge = depth_of_node.gather(1, edges[..., 0])
    order = depth_of_edge.argsort(1, descending=first == "children")
    edges = edges.gather(1, order[..., None].expand_as(edges)).flatten(1)
    return torch.cat([edges, asked], 1)


def measure(model, task, N, first=None):
    """All numbers of the picture: by kind of window, by pass, and by threshold."""
    tokens, targets, *facts = task.test
    if first:
        tokens = in_order(tokens, facts[0], first)
    h_moved, S_moved, right = watch(model, tokens, targets, N)
    asked = targets >= 0                                       # (B, M)
    all_windows = torch.ones(len(tokens), dtype=torch.bool)
    kinds = {"all windows": all_windows}
    by_depth = {}
    if facts:                            # trees: the depth of a window is that of its deepest node
        depths = facts[0]
        deepest = depths.amax(1)
        kinds = {f"depth {d}": deepest == d for d in deepest.unique().tolist()}
        for d in depths.unique().tolist():
            by_depth[str(d)] = [right_n[depths == d].float().mean().item() for right_n in right]

    def accuracy(right_n, windows):
        return (right_n & asked)[windows].sum().item() / asked[windows].sum().item()

    by_kind = {}
    for kind, windows in kinds.items():
        by_kind[kind] = dict(h=[moved[windows].mean().item() for moved in h_moved],
                             S=[moved[windows].mean().item() for moved in S_moved],
                             accuracy=[accuracy(right_n, windows) for right_n in right])
    stops = {"h": [], "S": []}
    for name, moved in (("h", h_moved), ("S", S_moved)):
        for threshold in THRESHOLDS:
            last_pass = stopped(moved, threshold)              # (B,), from 0
            n_passes = last_pass + 1.0
            right_then = right[last_pass, torch.arange(len(tokens))]
            stops[name].append(dict(
                threshold=threshold, passes=n_passes.mean().item(),
                accuracy=accuracy(right_then, all_windows),
                by_kind={kind: n_passes[windows].mean().item() for kind, windows in kinds.items()}))
    settings = vars(getattr(task, "args", Namespace()))
    changed = {flag: settings[flag] for flag, value in variants.DEFAULTS.items()
               if settings.get(flag, value) != value}
    return dict(task=task.name, changed=changed, N=model.cfg.N, passes=N, by_kind=by_kind,
                by_depth=by_depth, fixed=[accuracy(right_n, all_windows) for right_n in right],
                stops=stops)


# ------------------------------------------------------------------------------------------------
# Picture and program

def draw(found, path):
    """Three panels: moves of a pass, answers after it, and sleeps that stop by themselves."""
    fig, axes = figure(1, 3, (14, 4.8))
    moves, answers, stops = axes[0]
    passes = range(1, found["passes"] + 1)
    for i, (kind, numbers) in enumerate(found["by_kind"].items()):
        moves.plot(passes, numbers["h"], f"C{i}-", label=kind)
        moves.plot(passes, numbers["S"], f"C{i}:")
        answers.plot(passes, numbers["accuracy"], f"C{i}-")
    moves.set(yscale="log", title="A pass moves h (lines), S (dots)",
              ylabel="|now - before| / |now|")
    answers.set(ylim=(0, 1.03), title="Asked after a pass", ylabel=METRIC_WORDS["accuracy"])
    for ax in (moves, answers):
        ax.axvline(found["N"], color="k", ls="--", lw=1)
        ax.set_xlabel("pass")
    stops.plot(passes, [1 - accuracy for accuracy in found["fixed"]], "k.-",
               label="so many passes for every window")
    for mark, (name, rows) in zip("o^", found["stops"].items()):
        wrong = [1 - row["accuracy"] for row in rows]
        stops.plot([row["passes"] for row in rows], wrong, f"{mark}--",
                   label=f"until a pass moves {name} by less than {rows[0]['threshold']} to "
                         f"{rows[-1]['threshold']}")
    stops.set(yscale="log", title="A sleep that stops by itself", xlabel="passes of a sleep, mean",
              ylabel="share of answers wrong")
    stops.legend(fontsize=8)
    changed = "".join(f", --{flag}" for flag in found["changed"])
    fig.suptitle(f"When to wake? {TASK_WORDS[found['task']][0]}, trained with N = {found['N']} "
                 f"(dashed){changed}", fontsize=10)
    legend(fig, moves, "windows, by their deepest node" if found["task"] == "trees" else "")
    save_figure(fig, path)


def redraw(file, out):
    check_output(out, ".png")
    found = read_results(file)
    if {"task", "changed", "N", "passes", "by_kind", "fixed", "stops"} - set(found):
        raise sleep.BadInput(f"{file} holds no numbers of lab.experiments.when_to_wake.")
    draw(found, out)
    print(f"saved: {out}")


def print_numbers(found):
    for n in range(found["passes"]):
        texts = [f"{kind} h {numbers['h'][n]:.3f} S {numbers['S'][n]:.3f}"
                 for kind, numbers in found["by_kind"].items()]
        print(f"pass {n + 1:2}: accuracy {found['fixed'][n]:.3f}; {'; '.join(texts)}")
    for name, rows in found["stops"].items():
        for row in rows:
            print(f"until {name} moves by less than {row['threshold']:.2f}: {row['passes']:5.2f} "
                  f"passes, accuracy {row['accuracy']:.3f}")


@program
def main(argv):
    p = parser(__doc__)
    p.add_argument("checkpoint", type=Path, nargs="?")
    p.add_argument("--N", type=int, default=16, help="most passes (default: 16)")
    p.add_argument("--first", choices=["parents", "children"],
                   help="of trees: sort the edges of the test")
    p.add_argument("--out", type=Path,
                   help="the picture; default: N4-seed0-wake.png beside N4-seed0.pt")
    p.add_argument("--draw", type=Path, metavar="FILE",
                   help="draw a file of numbers; nothing is measured")
    args = p.parse_args(argv)
    if args.draw:
        redraw(args.draw, args.out or picture_of(args.draw))
        return
    if args.checkpoint is None:
        raise sleep.BadInput("name a checkpoint, or --draw and a file of numbers.")
    if not 2 <= args.N <= 1000:
        raise sleep.BadInput(f"--N {args.N} must be from 2 to 1,000.")
    out = args.out or args.checkpoint.with_name(f"{args.checkpoint.stem}-wake.png")
    model, task = load(args.checkpoint)
    check_output(out, ".png")
    if args.first and task.name != "trees":
        raise sleep.BadInput("--first is for trees only: edges of a cycle have no parents.")
    found = measure(model, task, args.N, args.first)
    print_numbers(found)
    write_results(out.with_suffix(".json"), found)
    draw(found, out)
    print(f"saved: {out.with_suffix('.json')}, {out}")


if __name__ == "__main__":
    main()
