"""Is training on this device what it should be? A minute, then a verdict in words.

    python -m lab.gpu_check                 the GPU, if there is one; else what a CPU can tell

Every case is trained twice from the same weights, for eight steps: plainly, and as sleep.train does it
(fused by torch.compile, and on CUDA replayed from CUDA graphs, in bfloat16). Losses and the gradient of
every parameter are compared. Batches have two lengths, N is drawn, attention thaws, and an evaluation
comes in between.
"""
import sys
import time
from importlib.util import find_spec

import torch

import sleep
from lab.plot import parser

CASES = {                                  # all with N drawn from 1 to 3
    "hard eviction": dict(layout="asas", eviction="hard"),
    "sliding eviction, attention frozen for four steps": dict(layout="asas", eviction="sliding"),
    "fast weights alone, delta rule without decay": dict(layout="ss", update_rule="delta"),
}


def batch(cfg, step, device):
    """Tokens (B, T) and targets (B, M) of one of two lengths."""
    g, B = torch.Generator().manual_seed(step), 16 if device == "cuda" else 2
    T, M = (cfg.T, 5) if step % 3 else (cfg.T - cfg.L, 3)
    return (torch.randint(cfg.vocab_size, (B, T), generator=g).to(device),
            torch.randint(cfg.vocab_size, (B, M), generator=g).to(device))


def compare(change, compile, device):
    """The largest relative difference of a loss or a gradient, and where; inf if one is not finite."""
    size = dict(T=69, L=16, d_model=64) if device == "cuda" else dict(T=25, L=6, d_model=16)
    cfg = sleep.Config(vocab_size=11, n_head=2, **size, **change)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(sleep.SleepLM(cfg).to(device))
        torch.nn.init.normal_(models[-1].head.weight)          # born as 0, it would hide all others
        models[-1].bf16 = device == "cuda"
    plain, trained = models
    f = sleep.make_gradients(plain, False, True), sleep.make_gradients(trained, compile, False)
    worst, where = 0.0, "nothing"
    for step in range(8):
        tokens, targets = batch(cfg, step, device)
        for model in models:
            for block in model.blocks:
                block.requires_grad_(block.kind == "s" or cfg.eviction == "hard" or step >= 4)
        N = 1 + step % 3
        losses = [g(tokens, targets, N).clone() for g in f]
        pairs = [("the loss", *losses)] + [
            (name, p.grad, q.grad) for (name, p), q in zip(plain.named_parameters(), trained.parameters())
            if p.grad is not None and q.requires_grad]
        for name, a, b in pairs:
            if not (a.isfinite().all() and b.isfinite().all()):
                return float("inf"), f"{name} in step {step}"
            difference = ((a - b).norm() / a.norm().clamp(min=1e-12)).item()
            worst, where = max((worst, where), (difference, f"{name} in step {step}"))
        with torch.no_grad():
            trained(tokens, targets, N)    # an evaluation between two steps
            for p, q in zip(plain.parameters(), trained.parameters()):
                if p.grad is not None and p.requires_grad:
                    q.copy_(p.sub_(0.02 * p.grad))
    return worst, where


def main(argv=None):
    p = parser(__doc__)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   choices=["cuda", "cpu"])
    p.add_argument("--no_compile", action="store_true", help="graphs alone: tells faults of capture apart")
    args = p.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("there is no CUDA device here: take --device cpu.")
    cuda = args.device == "cuda"
    compile = not args.no_compile and (not cuda or find_spec("triton") is not None)
    name = torch.cuda.get_device_name() if cuda else "a CPU"
    torch.set_float32_matmul_precision("high" if cuda else "highest")
    torch.backends.cuda.enable_cudnn_sdp(False)
    limit = 3e-2 if cuda else 1e-4         # bfloat16 has 8 bits of mantissa
    print(f"{name}, torch {torch.__version__}; {'compiled' if compile else 'not compiled'}"
          f"{', replayed from CUDA graphs, bfloat16' if cuda else ', float32'}")
    bad = []
    for what, change in CASES.items():
        start = time.monotonic()
        try:
            worst, where = compare(change, compile, args.device)
        except sleep.BadInput as e:
            worst, where = float("inf"), str(e)
        print(f"  {what:52} largest difference {worst:.1e} ({where}), {time.monotonic() - start:.0f} s")
        if not worst <= limit:
            bad.append(what)
    if bad:
        sys.exit(f"not good: {'; '.join(bad)} differ by more than {limit:g}. " + (
            "Try --no_compile to see if compiling or capture is at fault; train with --recompute, which "
            "records no graph, or with --no-compile." if cuda else "Train with --no-compile."))
    print(f"good: what is trained here is what the plain model trains, within {limit:g}."
          + (" CUDA graphs and bfloat16 were not tried: no GPU." if not cuda else ""))


if __name__ == "__main__":
    main()
