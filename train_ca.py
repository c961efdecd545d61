"""Rule 110: does a deeper question need more sleep? (Sections 4 and 6.1, Figure 2)

A few random tapes of W cells on a ring, cells as tokens, one tape a window; then a separator and
one label a tape: its first cell after t steps of the rule. Every tape is evicted before the first
label is asked for. The tapes take the same room whatever t is, and the question gets deeper (until
t = W / 2 more of their cells matter, too).

    0 1 1 0 | 1 0 0 1 | = y1        inputs of two tapes of W = 4 cells, three windows
                        y1 y2       targets of the last window

    python train_ca.py                            N = 1 against N = 3, minutes on two CPU cores
    python train_ca.py --preset paper             Section 6.1's model and data, for a GPU
    python train_ca.py --experiment iterated      what readers of the paper ask, see EXPERIMENTS
    python train_ca.py --film out/ca-cpu/N3-seed0.pt      the sleep film of a trained model

paper does not say: where the tape ends; here it is a ring. Between borders of zeros the first cell
would be constant from t = 12 on.
"""
import argparse
import json
import re
import shlex
from functools import partial
from pathlib import Path

import numpy as np
import torch

import sleep

PRESETS = {
    "cpu": dict(N=[1, 3], t=6, W=16, tapes=2, L=16, layout="as", d_model=64, n_head=2, steps=500,
                batch_size=256, lr_muon=7e-3, lr_adamw=3e-3, cooldown=0.2, eval_every=50, taps=4),
    "gpu": dict(N=[1, 2, 4], t=12, W=24, tapes=4, L=24, layout="asas", d_model=256, n_head=4,
                steps=2000, batch_size=512, lr_muon=2e-3, lr_adamw=5e-4, eval_every=100),
    "paper": dict(N=[1, 2, 3, 4], t=32, W=24, tapes=4, L=24, layout="asas", d_model=256, n_head=4,
                  steps=80_000, batch_size=512, lr_muon=2e-3, lr_adamw=5e-5, eval_every=400, conv="s",
                  taps=4, hold_out="reach"),
}


def add_flags(f):
    f.add_argument("--rule", type=int, default=110, help="elementary rule 0-255; 90 is the control")
    f.add_argument("--t", type=int, help="steps of the rule: the depth of the question")
    f.add_argument("--W", type=int, help="cells of a ring")
    f.add_argument("--tapes", type=int, help="tapes in a sequence")
    f.add_argument("--hold_out", default="matter", choices=["matter", "reach"], help="keep for the test "
                   "one in eight patterns of the cells that matter (new questions), or of all 2 t + 1 in "
                   "reach (an easier test; also where fewer than 7 matter)")
    f.add_argument("--carry", default="hS", choices=["hS", "h", "S"],
                   help="what a pass of a sleep hands to the next; without S only the last pass writes")
    f.add_argument("--think", type=int, default=1, help="passes over the answer window")
    f.add_argument("--detach", type=int, default=0,
                   help="gradients pass through the last so many passes of a sleep only, and skip "
                   "the others; 0: all")
    add_more_flags(f)


def add_more_flags(f):
    f.add_argument("--experiment", choices=list(EXPERIMENTS), help="run one of EXPERIMENTS, see there")
    f.add_argument("--film", metavar="CHECKPOINT", help="draw what a sleep works out, pass by pass")


def evolve(cells, rule, t):
    """t steps of an elementary rule on a ring; cells (..., W) of 0 and 1."""
    table = (rule >> torch.arange(8, device=cells.device)) & 1     # bit 4l + 2c + r of the rule
    for _ in range(t):
        cells = table[4 * cells.roll(1, -1) + 2 * cells + cells.roll(-1, -1)]
    return cells


class Experiment(sleep.SleepLM):
    """Algorithm 1 with one thing changed, see the flags; hard eviction, all blocks looped."""

    def __init__(self, cfg, carry, think, detach):
        super().__init__(cfg)
        self.carry, self.think, self.detach = carry, think, detach

    def sleep(self, h, memory):
        start, S = h, memory.S
        skip = lambda now, then: None if now is None else now.detach() + then - then.detach()
        for n in range(self.cfg.N):
            if self.detach and n == self.cfg.N - self.detach:  # numbers of now, gradients of then
                h, S = skip(h, start), [skip(*pair) for pair in zip(S, memory.S)]
            refined, written, _ = self.one_pass(h, S, memory.cache, 0, len(self.blocks))
            h = refined if "h" in self.carry else h
            S = written if "S" in self.carry or n == self.cfg.N - 1 else S
        return self.evict(sleep.Memory(S, memory.cache))

    def wake(self, tokens, memory):
        h = self.embed(tokens)
        for _ in range(self.think):        # each from the S before the window: S behind it has read labels
            h, S, cache = self.one_pass(h, *memory, 0, len(self.blocks))
        return self.head(self.norm(h)), sleep.Memory(S, cache)

    def stream(self, tokens, state=None):
        raise ValueError("an Experiment does not stream: its sleep begins with all of the window.")


class Tapes:
    """The task, as sleep.main wants it. Tokens: 0, 1 the cells, 2 the separator."""
    name, cases, vocab_size = "ca", None, 3

    def __init__(self, args, seed):
        self.rule, self.t, self.W, self.n_tapes = args.rule, args.t, args.W, args.tapes
        self.batch_size, self.seed, self.device = args.batch_size, seed, args.device
        if not 0 <= self.rule <= 255:
            raise ValueError(f"--rule {self.rule} must be an elementary rule, 0 to 255.")
        if not (8 <= self.W <= 60 and self.t >= 0 and self.n_tapes >= 1):
            raise ValueError(f"--W {self.W} --t {self.t} --tapes {self.n_tapes}: a ring has 8 to 60 "
                             "cells, t is 0 or more, and there is at least one tape.")
        if args.L < 1 or (self.W * self.n_tapes) % args.L:
            raise ValueError(f"--L {args.L} must divide the {self.n_tapes} * {self.W} cells, so that "
                             "all of them are evicted before the first label.")
        self.T = (self.W + 1) * self.n_tapes
        self.bits = self.deciding() if args.hold_out == "matter" else None
        change = dict(carry=args.carry, think=args.think, detach=args.detach)
        if args.detach and args.detach >= min(args.N):
            raise ValueError(f"--detach {args.detach} must be fewer passes than --N {min(args.N)}: it "
                             "would change nothing.")
        if change != dict(carry="hS", think=1, detach=0):
            if args.eviction != "hard" or args.loop != "all" or min(args.think, args.detach + 1) < 1:
                raise ValueError(f"--carry {args.carry} --think {args.think} --detach {args.detach}: these "
                                 "take hard eviction, --loop all, and no negative number.")
            self.model = partial(Experiment, **change)
        self.test = self.make_batch(-1)
        labels = self.test[1]
        self.chance = dict(exact=max((labels == c).all(1).float().mean().item() for c in (0, 1)),
                           bit=max((labels == c).float().mean().item() for c in (0, 1)))

    def deciding(self):
        """Mask of the cells that matter: switched alone, one changes a label of 2^14 random tapes.

        None if they are fewer than 7, too few to hold patterns of them out.
        """
        tapes = torch.randint(2, (2 ** 14, self.W), generator=torch.Generator().manual_seed(0))
        label = lambda tapes: evolve(tapes, self.rule, self.t)[:, 0]
        parts = [(part, label(part)) for part in tapes.split(256)]
        bits = [1 << i for i, switch in enumerate(torch.eye(self.W, dtype=torch.long))
                if any((label(part ^ switch) != before).any() for part, before in parts)]
        return sum(bits) if len(bits) >= 7 else None

    def held_out(self, tape):
        """Is it for the test? One in eight of the patterns of some cells is, with all of its tapes.

        --hold_out matter: of the cells that matter, if they are 7 or more. The test asks new questions.
        reach, and otherwise: of the 2t + 1 cells from which a label could be reached, at least 7, or of
        the whole ring. The test has new tapes, but asks what was asked in training: some of these cells
        never matter (at t = 6 2 of 13, since Rule 110 is slower towards the right).
        """
        reach = max(self.t, 3)             # bits 0..2 reach are then cells -reach..reach
        if self.bits is not None:
            tape = tape & self.bits
        elif 2 * reach + 1 < self.W:
            tape = ((tape << reach) | (tape >> (self.W - reach))) & ((1 << (2 * reach + 1)) - 1)
        return ((tape * 2654435761) & (2 ** 32 - 1)) < 2 ** 29

    def make_batch(self, step):
        """Step -> tokens (B, T), targets (B, tapes), from seed and step alone; -1 is the test set."""
        test = step < 0
        B, draws = (2048, 256) if test else (self.batch_size, 16)
        g = torch.Generator(self.device).manual_seed(0 if test else self.seed * 10 ** 9 + step + 1)
        # A tape is a number, bit i its cell i. Of many draws one from the right side is taken; all
        # of them being on the wrong one has a probability below 1e-14.
        tape = torch.randint(1 << self.W, (B, self.n_tapes, draws), generator=g, device=self.device)
        right = self.held_out(tape) == test
        tape = tape.gather(-1, right.int().argmax(-1, keepdim=True))               # (B, tapes, 1)
        cells = (tape >> torch.arange(self.W, device=self.device)) & 1             # (B, tapes, W)
        labels = evolve(cells, self.rule, self.t)[..., 0]                          # (B, tapes)
        separator = torch.full_like(labels[:, :1], 2)
        return torch.cat([cells.flatten(1), separator, labels[:, :-1]], 1), labels

    def score(self, tokens, labels, logits):
        right = logits.argmax(-1) == labels
        return dict(exact=right.all(1).float().mean().item(), bit=right.float().mean().item())

    def show(self, tokens, labels, guess=None):
        text = []
        for i, label in enumerate(labels.tolist()):
            cells = "".join(map(str, tokens[i * self.W:][:self.W].tolist()))
            said = "" if guess is None else f"; the model says {guess[i].item()}"
            text.append(f"  {cells}  first cell after {self.t} steps of rule {self.rule}: {label}{said}")
        return "\n".join(text)


# ------------------------------------------------------------------------------------------------
# Experiments: python train_ca.py --experiment NAME [flags for all of its runs]

EXPERIMENTS = {                            # the flags of every condition
    # What is iterated: h, S, or both? Without h every pass reads the embeddings again.
    "iterated": ["--N 3", "--N 3 --carry h", "--N 3 --carry S", "--N 1"],
    # Depth or difficulty? t = 0 asks for storage only; Rule 90 is an XOR, of 2 cells at t = 4, 4 at 6.
    "difficulty": [f"{task} --N {N}".strip()
                   for task in ("--t 0 --steps 150", "--t 1 --steps 150", "--rule 90 --t 4",
                                "--rule 90", "--t 4", "", "--t 8") for N in (1, 3)],
    # New questions in the test, or only new tapes?
    "hold_out": [f"{kind} --N {N}".strip() for kind in ("", "--hold_out reach") for N in (1, 3)],
    # Is it just compute? As deep without sharing weights, as large but wider, looped at the answer.
    "compute": ["--N 1", "--N 3", "--N 1 --layout asasas", "--N 1 --d_model 112", "--N 1 --think 3"],
    # Other N at test than in training?
    "other_N": [f"{train} --N_test 1 2 3 4 6 8 12 16" for train in
                ("--N 1", "--N 2", "--N 3", "--N 4", "--N 4 --any_N")],
    # Does the rule matter? With the easier test, see Tapes.held_out.
    "rule": [f"--hold_out reach --update_rule {rule} --N {N}".replace(" --update_rule gated_delta", "")
             for rule in ("hebbian", "gated_hebbian", "delta", "gated_delta") for N in (1, 3)],
    # What does the short convolution do, at equal tokens and at equal compute? With the easier test.
    "conv": [f"--hold_out reach{conv} {cost}" for conv in (" --conv ''", " --conv a", " --conv s", "")
             for cost in ("--N 1", "--N 1 --steps 1500", "--N 3")],
    # Is it stable? With --seed 0 1 2 3 4.
    "seeds": ["--N 1", "--N 3"],
    # Does the gradient have to reach all passes?
    "gradient": ["--N 3", "--N 3 --detach 2", "--N 1"],
    # Loop the SSM block only, or the attention block only?
    "span": ["--N 3", "--N 3 --loop 1:2", "--N 3 --loop 0:1", "--N 1"],
}


def experiment(name, argv):
    """Run what is missing of an experiment, then write its runs to one file and draw them.

    Conditions are shared: what another experiment has finished is not run again.
    """
    own = {"--out", *re.findall(r"--\w+", " ".join(EXPERIMENTS[name]))}
    if taken := own & {flag.split("=")[0] for flag in argv}:
        raise ValueError(f"--experiment {name} takes no {' '.join(sorted(taken))}: it sets that itself.")
    folder, runs = Path("out/ca-experiments"), []
    for flags in EXPERIMENTS[name]:
        trained = flags.split(" --N_test")[0]
        out = folder / re.sub("[^a-zA-Z0-9]+", "-", " ".join([trained, *argv])).strip("-")
        sleep.main(__doc__, PRESETS, add_flags, Tapes,
                   ["--preset", "cpu", *argv, *shlex.split(flags), "--out", str(out), "--resume"])
        runs += [run | dict(flags=trained) for run in sleep.load_results(out / "results.json")]
    sleep.write(folder / f"{name}.json", lambda p: p.write_text(json.dumps(dict(runs=runs), indent=1)))
    N_test = "--N_test" in EXPERIMENTS[name][0]
    (plot_N_test if N_test else plot_conditions)(runs, folder / f"{name}.png")
    print(f"saved: {folder / name}.json and .png")


def by_flags(runs):
    groups = {}
    for run in runs:
        groups.setdefault(run["flags"], []).append(run)
    return groups


def figure(height):
    fig, ax = sleep.pyplot().subplots(figsize=(8, height), layout="constrained")
    ax.grid(alpha=0.3)
    return fig, ax


def plot_conditions(runs, path):
    """Exact match of every seed and the mean, by condition."""
    groups = by_flags(runs)
    fig, ax = figure(0.8 + 0.36 * len(groups))
    for i, group in enumerate(groups.values()):
        values, guess = [run["exact"] for run in group], group[0]["chance"]["exact"]
        color = f"C{min(group[0]['N'], 2) - 1}"                # N = 1 or more
        ax.barh(-i, np.mean(values), color=color, alpha=0.4)
        ax.plot(values, [-i] * len(values), f"{color}o", ms=4)
        ax.plot([guess, guess], [-i - 0.4, -i + 0.4], "k--", lw=1)
    ax.set(yticks=range(1 - len(groups), 1), yticklabels=list(groups)[::-1], xlim=(0, 1.02),
           xlabel="all bits right: seeds, mean; dashed: constant guess")
    sleep.save_figure(fig, path)


def plot_N_test(runs, path):
    """Exact match of every seed and the mean against N at the test."""
    fig, ax = figure(3.8)
    for i, (flags, group) in enumerate(by_flags(runs).items()):
        N = sorted(map(int, group[0]["N_test"]))
        values = np.array([[run["N_test"][str(n)]["exact"] for run in group] for n in N])
        ax.plot(N, values.mean(1), f"C{i}-", label=f"trained with {flags}")
        ax.plot(N, values, f"C{i}.", ms=4)
    guess = runs[0]["chance"]["exact"]
    ax.axhline(guess, color="gray", ls="--", label=f"constant guess {guess:.3f}")
    ax.set(xscale="log", xlabel="N at the test", ylabel="all bits right: seeds, mean")
    ax.set_xticks(N, N, minor=False)
    ax.legend(fontsize=7)
    sleep.save_figure(fig, path)


# ------------------------------------------------------------------------------------------------
# The sleep film: python train_ca.py --film out/ca-cpu/N3-seed0.pt

@torch.no_grad()
def watch(model, tape):
    """h (B, L, d) and S, flat, before the sleep over the first window and after each of its passes."""
    h, (S, cache) = model.embed(tape), model.empty_memory(len(tape))
    flat = lambda S: torch.cat([x.flatten(1) for x in S if x is not None], 1)
    frames = [(h.flatten(1), flat(S))]
    for _ in range(model.cfg.N):
        h, S, _ = model.one_pass(h, S, cache, 0, len(model.blocks))
        frames.append((h.flatten(1), flat(S)))
    return frames


def probe(x, y, x_test, y_test):
    """Share of +-1 labels y (B, n) that least squares reads from x (B, f), 0 for the commoner, (n,)."""
    mean, scale = x.mean(0), x.std(0) + 1e-3
    x, x_test = ((z - mean) / scale for z in (x, x_test))
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    w = torch.linalg.solve(x.T @ x + 1e-2 * len(x) * eye, x.T @ (y - y.mean(0)))
    right = ((x_test @ w + y.mean(0) > 0) == (y_test > 0)).double().mean(0)
    common = (y_test > 0).double().mean(0)
    common = torch.maximum(common, 1 - common)
    return ((right - common) / (1 - common).clamp(min=1e-9)).clamp(min=0)


def film(path):
    """Which cells of which step a linear probe reads from h and from S after each pass of the sleep."""
    plt = sleep.pyplot()
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        s = saved["run"]["settings"] | dict(device="cpu", batch_size=6000)
        task = Tapes(argparse.Namespace(**s), s["seed"] + 1)   # the probe has data of its own
    except Exception as e:                 # torch.load raises many kinds for a broken file
        raise ValueError(f"{path} is no checkpoint of train_ca.py ({type(e).__name__}).") from None
    W, t, cfg = task.W, task.t, sleep.config(task, s)
    features = max(cfg.L * cfg.d_model, cfg.layout.count("s") * cfg.d_model ** 2 // cfg.n_head)
    if cfg.L != W or cfg.loop != "all" or "s" not in cfg.layout or hasattr(task, "model") or features > 8000:
        raise ValueError(f"{path}: the film shows models with L = W, --loop all, an SSM block, nothing "
                         f"changed by --carry, --think or --detach, and at most 8,000 numbers in h or S "
                         f"(here {features:,}).")
    model = sleep.SleepLM(cfg)
    model.load_state_dict(saved["model"])
    tapes = [x[0][:, :W * task.n_tapes].reshape(-1, W) for x in (task.make_batch(0), task.test)]
    rows = [torch.stack([evolve(x, task.rule, r) for r in range(t + 1)], 1) for x in tapes]
    y, y_test = (2.0 * x.roll(W // 2, -1).flatten(1) - 1 for x in rows)        # cell 0 in the middle
    frames, frames_test = (watch(model, x) for x in tapes)
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    N, scores = model.cfg.N, {}
    fig, axes = plt.subplots(2, N + 3, figsize=(2.1 * (N + 3), 4.4), layout="constrained")
    for ax, tape in zip(axes[:, 0], rows[1][[0, 1]]):
        ax.imshow(tape.roll(W // 2, -1), cmap="binary", aspect="auto")
        ax.set_title(f"rule {task.rule}", fontsize=9)
        ax.set_ylabel("step")
    for row, what in enumerate("hS"):
        for n in range(N + 2):
            k = min(n, N)                  # the last column: the control
            score = probe(frames[k][row], y if n <= N else shuffled, frames_test[k][row], y_test)
            title = (f"{what} before" if n == 0 else f"{what} after pass {n}" if n <= N else
                     f"{what}, shuffled labels")
            scores[title] = dict(norm=frames[k][row].norm(dim=1).mean().item(),
                                 steps=score.view(t + 1, W).tolist())
            ax = axes[row, n + 1]
            image = ax.imshow(score.view(t + 1, W), cmap="viridis", vmin=0, vmax=1, aspect="auto")
            ax.set_title(title, fontsize=9)
            shown = " ".join(f"{v:.2f}" for v in score.view(t + 1, W)[:, W // 2].tolist())
            print(f"{title:20} cell 0 of steps 0..{t}: {shown}; norm {scores[title]['norm']:.2f}")
    for ax in axes.flat:
        ax.set(xticks=[0, W // 2, W - 1], xticklabels=[-(W // 2), 0, W - 1 - W // 2])
    fig.colorbar(image, ax=axes, label="of what a constant guess gets wrong, the probe gets right")
    fig.suptitle(f"{path}: {len(y)} tapes to fit the probes, {len(y_test)} to test them", fontsize=9)
    out = Path(path).with_name(Path(path).stem + "-film")
    sleep.save_figure(fig, out.with_suffix(".png"))
    sleep.write(out.with_suffix(".json"), lambda p: p.write_text(json.dumps(scores)))
    print(f"saved: {out}.png and .json")


def main(argv=None):
    p = sleep.Parser(add_help=False, allow_abbrev=False)
    add_more_flags(p)
    args, argv = p.parse_known_args(argv)
    try:
        if args.film:
            if argv or args.experiment:
                raise ValueError("--film takes no other flag: it draws the checkpoint as it was trained.")
            film(args.film)
        elif args.experiment:
            experiment(args.experiment, argv)
        else:
            sleep.main(__doc__, PRESETS, add_flags, Tapes, argv)
    except ValueError as e:
        p.error(e)


if __name__ == "__main__":
    main()
