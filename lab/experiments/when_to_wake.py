"""When to wake: does a sleep show that it is finished?

    python -m lab.wake out/a/N4-seed0.pt               -> N4-seed0-wake.json, N4-seed0-wake.png
    python -m lab.wake out/a/N3-seed0.pt --N 8         any checkpoint of k hops or roots, hard eviction

Sleeps over every window of the test for up to --N passes. After each pass: how far h and S have moved
(|now - before| / |now|, a window at a time), and what is answered if the model is woken there. Then a
sleep that stops by itself, as soon as a pass moves h (or S) by less than a threshold: its passes and its
accuracy, beside those of a sleep of N passes for every window.
"""
import json
from argparse import Namespace
from pathlib import Path

import torch

import sleep
from lab import demo, experiments
from lab.plot import METRICS, TASKS, figure, legend, parser, save_figure

THRESHOLDS = [0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05]


def load(path):
    """The model and the task of a checkpoint; BadInput if it is none with one window asleep."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        s = sleep.DEFAULTS | experiments.OWN | saved["run"]["settings"]
        s |= dict(device="cpu", batch_size=1, N=[saved["run"]["N"]])
        *_, Task = experiments.load_task(saved["run"]["task"])
        task = Task(Namespace(**s), s["seed"])
        s |= dict(N=saved["run"]["N"])
        cfg = sleep.Config(task.vocab_size, task.T, **{k: s[k] for k in sleep.MODEL_FLAGS})
        model = getattr(task, "model", sleep.SleepLM)(cfg)
        model.load_state_dict(saved["model"])
    except Exception as e:                 # torch.load raises many kinds
        raise sleep.BadInput(f"{path} is no checkpoint of k hops or roots ({type(e).__name__}): train one with "
                             "`python -m lab.forest`.") from None
    one_window = task.T - task.test[1].shape[1] == cfg.L
    if task.name not in ("khop", "forest") or cfg.eviction != "hard" or not one_window:
        raise sleep.BadInput(f"{path}: only models of k hops or roots are watched, with hard eviction and all "
                             "edges in one window.")
    return model, task


@torch.no_grad()
def watch(model, tokens, targets, N):
    """-> moves of h and of S (N, B), and which questions would be answered rightly (N, B, M)."""
    window, asked = tokens.split([model.cfg.L, tokens.shape[1] - model.cfg.L], 1)
    h, empty = model.embed(window), model.empty_memory(len(tokens))
    seen, _ = demo.passes(model, h, empty, N)
    answers = [model.wake(model.embed(asked), sleep.Memory(S, empty.cache, 0))[0] for _, S in seen]
    seen = [(h, torch.cat([x.flatten(1) for x in S if x is not None], 1)) for h, S in seen]
    length = lambda x: x.flatten(1).norm(dim=1)
    path = [(h, torch.zeros_like(seen[0][1])), *seen]          # with what was there before
    moved = [torch.stack([length(now[i] - before[i]) / length(now[i]) for before, now in zip(path, seen)])
             for i in (0, 1)]
    return *moved, torch.stack([(logits.argmax(-1) == targets) for logits in answers])


def stopped(moved, threshold):
    """moved (N, B) -> the pass (from 0) at which each window is woken: the first from the second on that
    moves by less than the threshold, or the last."""
    small = moved < threshold
    small[0], small[-1] = False, True
    return small.int().argmax(0)


def in_order(tokens, depths, first):
    """The same forests with their edges sorted by depth: those of "parents", or of "children", first."""
    n = depths.shape[1]
    edges, asked = tokens[:, :2 * n].unflatten(1, (n, 2)), tokens[:, 2 * n:]
    deep = torch.zeros_like(depths).scatter(1, asked, depths).gather(1, edges[..., 0])         # of each edge
    order = deep.argsort(1, descending=first == "children")
    return torch.cat([edges.gather(1, order[..., None].expand_as(edges)).flatten(1), asked], 1)


def measure(model, task, N, first=None):
    """All numbers of the picture: by kind of window, by pass, and by threshold."""
    tokens, targets, *facts = task.test
    tokens = in_order(tokens, facts[0], first) if first else tokens
    h, S, right = watch(model, tokens, targets, N)
    asked = targets >= 0
    share = lambda x, rows=slice(None): (x & asked)[rows].sum().item() / asked[rows].sum().item()
    kinds = {"all windows": torch.ones(len(tokens), dtype=torch.bool)}
    if facts:                              # roots: the depth of a window is that of its deepest node
        deepest = facts[0].amax(1)
        kinds = {f"depth {d}": deepest == d for d in deepest.unique().tolist()}
    by_kind = {kind: dict(h=[x[rows].mean().item() for x in h], S=[x[rows].mean().item() for x in S],
                          accuracy=[share(x, rows) for x in right]) for kind, rows in kinds.items()}
    by_depth = {str(d): [x[facts[0] == d].float().mean().item() for x in right]
                for d in facts[0].unique().tolist()} if facts else {}

    def alone(moved, threshold):
        woken = stopped(moved, threshold)
        return dict(threshold=threshold, passes=(woken + 1.0).mean().item(),
                    accuracy=share(right[woken, torch.arange(len(tokens))]),
                    by_kind={kind: (woken[rows] + 1.0).mean().item() for kind, rows in kinds.items()})
    stops = {name: [alone(moved, x) for x in THRESHOLDS] for name, moved in (("h", h), ("S", S))}
    return dict(N=model.cfg.N, passes=N, by_kind=by_kind, by_depth=by_depth,
                fixed=[share(x) for x in right], stops=stops)


def draw(found, path, task):
    """Three panels: how far a pass moves, what is answered after it, and sleeps that stop by themselves."""
    fig, axes = figure(1, 3, (14, 4.8))
    passes = range(1, found["passes"] + 1)
    for i, (kind, x) in enumerate(found["by_kind"].items()):
        axes[0, 0].plot(passes, x["h"], f"C{i}-", label=kind)
        axes[0, 0].plot(passes, x["S"], f"C{i}:")
        axes[0, 1].plot(passes, x["accuracy"], f"C{i}-")
    axes[0, 0].set(yscale="log", title="A pass moves h (lines), S (dots)", ylabel="|now - before| / |now|")
    axes[0, 1].set(ylim=(0, 1.03), title="Woken after a pass", ylabel=METRICS["accuracy"])
    axes[0, 2].plot(passes, [1 - x for x in found["fixed"]], "k.-", label="so many passes for every window")
    for style, (name, stops) in zip(("o", "^"), found["stops"].items()):
        axes[0, 2].plot([x["passes"] for x in stops], [1 - x["accuracy"] for x in stops], f"{style}--",
                        label=f"until a pass moves {name} by less than {THRESHOLDS[0]} to {THRESHOLDS[-1]}")
    axes[0, 2].set(yscale="log", title="A sleep that stops by itself", xlabel="passes of a sleep, mean",
                   ylabel="share of answers wrong")
    axes[0, 2].legend(fontsize=8)
    for ax in axes[0, :2]:
        ax.axvline(found["N"], color="k", ls="--", lw=1)
        ax.set_xlabel("pass")
    args = vars(getattr(task, "args", Namespace()))
    changed = "".join(f", --{flag}" for flag, value in experiments.OWN.items() if args.get(flag, value) != value)
    fig.suptitle(f"When to wake? {TASKS[task.name][0]}, trained with N = {found['N']} (dashed){changed}",
                 fontsize=10)
    legend(fig, axes[0, 0], "windows, by their deepest node" if task.name == "forest" else "")
    save_figure(fig, path)


def main(argv=None):
    p = parser(__doc__)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--N", type=int, default=16, help="most passes (default: 16)")
    p.add_argument("--first", choices=["parents", "children"], help="of roots: sort the edges of the test")
    p.add_argument("--out", type=Path, help="the picture; default: N4-seed0-wake.png beside N4-seed0.pt")
    args = p.parse_args(argv)
    out = args.out or args.checkpoint.with_name(f"{args.checkpoint.stem}-wake.png")
    try:
        if args.N < 2 or out.suffix != ".png":
            raise sleep.BadInput(f"--N {args.N} --out {out}: take 2 passes or more, and a name that ends in .png.")
        model, task = load(args.checkpoint)
        if args.first and task.name != "forest":
            raise sleep.BadInput("--first is for roots only: edges of a cycle have no parents.")
    except sleep.BadInput as e:
        p.error(e)
    found = measure(model, task, args.N, args.first)
    for n in range(args.N):
        print(f"pass {n + 1:2}: accuracy {found['fixed'][n]:.3f}; " + "; ".join(
            f"{kind} h {x['h'][n]:.3f} S {x['S'][n]:.3f}" for kind, x in found["by_kind"].items()))
    for name, stops in found["stops"].items():
        for x in stops:
            print(f"until {name} moves by less than {x['threshold']:.2f}: {x['passes']:5.2f} passes, "
                  f"accuracy {x['accuracy']:.3f}")
    sleep.write(out.with_suffix(".json"), lambda path: path.write_text(json.dumps(found, indent=1)))
    draw(found, out, task)
    print(f"saved: {out.with_suffix('.json')}, {out}")


if __name__ == "__main__":
    main()
