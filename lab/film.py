"""The film of a sleep: what has a trained model worked out after each of its passes?

    python train_ca.py --N 3 --out out/ca
    python -m lab.film out/ca/N3-seed0.pt          -> out/ca/film-N3-seed0.png and .json

Linear probes read from h, and from S, the cells of every step of the rule: before the sleep over a
window, and after each pass of it. A control reads shuffled labels. The probes are fitted to tapes
of their own and tested on tapes that the model was not trained on.
"""
import json
from argparse import Namespace
from pathlib import Path

import torch

import sleep
from lab.plot import figure, parser, save_figure
from train_ca import Tapes, evolve


@torch.no_grad()
def watch(model, tape):
    """h (B, L, d) and S, flat, before the sleep over the first window and after each pass of it."""
    h, (S, cache, _) = model.embed(tape), model.empty_memory(len(tape))
    flat = lambda S: torch.cat([x.flatten(1) for x in S if x is not None], 1)
    frames = [(h.flatten(1), flat(S))]
    for _ in range(model.cfg.N):
        h, S, _ = model.one_pass(h, S, cache, 0, len(model.blocks))
        frames.append((h.flatten(1), flat(S)))
    return frames


def probe(x, y, x_test, y_test):
    """Of what a constant guess gets wrong, the share that least squares reads from x, (n,).

    x (B, f), labels y (B, n) of +-1.
    """
    mean, scale = x.mean(0), x.std(0) + 1e-3
    x, x_test = ((z - mean) / scale for z in (x, x_test))
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    w = torch.linalg.solve(x.T @ x + 1e-2 * len(x) * eye, x.T @ (y - y.mean(0)))
    right = ((x_test @ w + y.mean(0) > 0) == (y_test > 0)).double().mean(0)
    common = (y_test > 0).double().mean(0)
    common = torch.maximum(common, 1 - common)
    return ((right - common) / (1 - common).clamp(min=1e-9)).clamp(min=0)


def load(path):
    """Model and task of a checkpoint; BadInput if it cannot be filmed."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        s = saved["run"]["settings"] | dict(device="cpu", batch_size=6000)
        task = Tapes(Namespace(**s), s["seed"] + 1)            # the probe has data of its own
        cfg = sleep.Config(task.vocab_size, task.T, **{k: s[k] for k in sleep.MODEL_FLAGS})
    except Exception as e:                 # torch.load raises many kinds
        raise sleep.BadInput(f"{path} is no checkpoint of train_ca.py "
                             f"({type(e).__name__}).") from None
    changed = [s.get("carry", "hS"), s.get("think", 1), s.get("detach", 0)] != ["hS", 1, 0]
    SSMs, head = cfg.layout.count("s"), cfg.d_model // cfg.n_head
    features = max(cfg.L * cfg.d_model, SSMs * cfg.d_model * head)
    if (cfg.L != task.W or cfg.loop != (0, len(cfg.layout)) or not SSMs or changed
            or features > 8000):
        raise sleep.BadInput(f"{path}: the film shows models with L = W, all blocks looped, an SSM "
                             "block, nothing changed by --carry, --think or --detach, and at most "
                             f"8,000 numbers in h or S (here {features:,}).")
    model = sleep.SleepLM(cfg)
    model.load_state_dict(saved["model"])
    return model, task


def film(path, out):
    """Which cells of which step can be read from h and from S after each pass, as a picture."""
    model, task = load(path)
    W, t, N, middle = task.W, task.t, model.cfg.N, task.W // 2
    tapes = [x[0][:, :W * task.n_tapes].reshape(-1, W) for x in (task.make_batch(0), task.test)]
    rows = [torch.stack([evolve(x, task.rule, r) for r in range(t + 1)], 1) for x in tapes]
    y, y_test = (2.0 * x.roll(middle, -1).flatten(1) - 1 for x in rows)    # cell 0 in the middle
    frames, frames_test = (watch(model, x) for x in tapes)
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    scores = {}
    fig, axes = figure(2, N + 3, (2.1 * (N + 3), 5))
    for ax, tape in zip(axes[:, 0], rows[1]):
        ax.imshow(tape.roll(middle, -1), cmap="binary", aspect="auto")
        ax.set_title(f"a tape, rule {task.rule}", fontsize=9)
        ax.set_ylabel("step of the rule")
    for row, (what, words) in enumerate(dict(h="h (features)", S="S (fast weights)").items()):
        for n in range(N + 2):
            k = min(n, N)                  # the last column: the control
            score = probe(frames[k][row], y if n <= N else shuffled, frames_test[k][row], y_test)
            score = score.view(t + 1, W)
            name = (f"{what} before" if n == 0 else f"{what} after pass {n}" if n <= N else
                    f"{what}, shuffled labels")
            norm = frames[k][row].norm(dim=1).mean().item()
            scores[name] = dict(norm=norm, steps=score.tolist())
            ax = axes[row, n + 1]
            image = ax.imshow(score, cmap="viridis", vmin=0, vmax=1, aspect="auto")
            ax.set_title(name.replace("before", "before the sleep"), fontsize=9)
            if n == 0:
                ax.set_ylabel(f"read from {words}", fontsize=9)
            shown = " ".join(f"{v:.2f}" for v in score[:, middle].tolist())
            print(f"{name:20} cell 0 of steps 0 to {t}: {shown}; norm {norm:.2f}")
    for ax in axes.flat:
        ax.grid(False)
        ax.set(xticks=[0, middle, W - 1], xticklabels=[-middle, 0, W - 1 - middle],
               yticks=range(0, t + 1, max(1, t // 8)))
    for ax in axes[1]:
        ax.set_xlabel("cell")
    fig.colorbar(image, ax=axes, label="0: constant guess; 1: all read")
    fig.suptitle(f"What a sleep of {N} passes works out: cells of a tape after 0 to {t} steps of "
                 f"rule {task.rule}\n{len(y)} tapes to fit the probes, {len(y_test)} to test them",
                 fontsize=10)
    sleep.write(Path(f"{out}.json"), lambda p: p.write_text(json.dumps(scores)))
    save_figure(fig, f"{out}.png")
    print(f"saved: {out}.png and .json")


def main(argv=None):
    p = parser(__doc__)
    p.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    p.add_argument("--out", type=Path, metavar="NAME",
                   help="of NAME.png and NAME.json; default: film-CHECKPOINT, beside it")
    args = p.parse_args(argv)
    out = args.out or args.checkpoint.parent / f"film-{args.checkpoint.stem}"
    try:
        if Path(f"{out}.json").exists():
            raise sleep.BadInput(f"{out}.json is there already: choose another --out.")
        film(args.checkpoint, out)
    except sleep.BadInput as e:
        p.error(e)


if __name__ == "__main__":
    main()
