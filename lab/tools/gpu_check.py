"""Is training on this device what it should be? A minute, then a verdict in words.

    python -m lab.tools.gpu_check                 the GPU, if there is one; else what a CPU can tell

Every case is trained twice from the same weights, for eight steps: plainly, and as sleep.train
does it (fused by torch.compile, and on CUDA replayed from CUDA graphs, in bfloat16 where the GPU
has it). Losses and the gradient of every parameter are compared. Batches have two lengths, N is
drawn, attention thaws, and an evaluation comes in between.
"""
import sys
import time

import torch

import sleep
from lab.common import parser, program

CASES = {                                  # all with N drawn from 1 to 3
    "hard eviction": dict(layout="asas", eviction="hard"),
    "sliding eviction, attention frozen for four steps": dict(layout="asas", eviction="sliding"),
    "fast weights alone, delta rule without decay": dict(layout="ss", update_rule="delta"),
}
STEPS = 8


def make_batch(cfg, step, device):
    """Tokens (B, T) and targets (B, M) of one of two lengths."""
    g = torch.Generator().manual_seed(step)
    B = 16 if device == "cuda" else 2
    T = cfg.T
    M = 5                                  # the tokens before them fill whole windows
    if step % 3 == 0:
        T = cfg.T - cfg.L
    tokens = torch.randint(cfg.vocab_size, (B, T), generator=g)
    targets = torch.randint(cfg.vocab_size, (B, M), generator=g)
    return tokens.to(device), targets.to(device)


def make_model(cfg, device):
    torch.manual_seed(0)
    model = sleep.SleepLM(cfg).to(device)
    torch.nn.init.normal_(model.head.weight)           # initialised as 0, it would hide all others
    return model


def compare(change, compile, device):
    """The largest relative difference of a loss or a gradient, and where; inf if not finite."""
    size = dict(T=69, L=16, d_model=64) if device == "cuda" else dict(T=23, L=6, d_model=16)
    cfg = sleep.Config(vocab_size=11, n_head=2, bf16=sleep.has_bf16(device), **size, **change)
    plain = make_model(cfg, device)
    trained = make_model(cfg, device)
    gradients_plain = sleep.make_gradients(plain, compile=False, recompute=True)
    gradients_trained = sleep.make_gradients(trained, compile=compile, recompute=False)
    worst = 0.0
    where = "nothing"
    for step in range(STEPS):
        tokens, targets = make_batch(cfg, step, device)
        frozen = cfg.eviction == "sliding" and step < 4
        for model in (plain, trained):
            for block in model.blocks:
                block.requires_grad_(block.kind == "s" or not frozen)
        N = 1 + step % 3
        pairs = [("the loss", gradients_plain(tokens, targets, N).clone(),
                  gradients_trained(tokens, targets, N).clone())]
        for (name, p), q in zip(plain.named_parameters(), trained.parameters()):
            if p.grad is not None and q.requires_grad:
                pairs.append((name, p.grad, q.grad))
        for name, a, b in pairs:
            if not (a.isfinite().all() and b.isfinite().all()):
                return float("inf"), f"{name} in step {step}"
            difference = ((a - b).norm() / a.norm().clamp(min=1e-12)).item()
            if difference > worst:
                worst = difference
                where = f"{name} in step {step}"
        with torch.no_grad():
            trained(tokens, targets, N)    # an evaluation between two steps
            for p, q in zip(plain.parameters(), trained.parameters()):
                if p.grad is not None and p.requires_grad:
                    p.sub_(0.02 * p.grad)
                    q.copy_(p)
    return worst, where


@program
def main(argv):
    p = parser(__doc__)
    p.add_argument("--device", default="auto", help="auto, cuda or cpu")
    p.add_argument("--no_compile", action="store_true",
                   help="graphs alone: tells faults of capture apart")
    args = p.parse_args(argv)
    device = torch.device(sleep.choose_device(args.device)).type
    on_gpu = device == "cuda"
    no_compile = "asked for" if args.no_compile else sleep.why_no_compile(device)
    sleep.set_up_torch(device)
    limit = 1e-4
    if sleep.has_bf16(device):             # it has 8 bits of mantissa
        limit = 3e-2
    elif on_gpu:                           # TF32 has 10
        limit = 1e-2
    precision = "bfloat16" if sleep.has_bf16(device) else "float32"
    print(f"{sleep.device_name(device)}, torch {torch.__version__}; "
          f"{f'not compiled ({no_compile})' if no_compile else 'compiled'}"
          f"{', replayed from CUDA graphs' if on_gpu else ''}, {precision}")
    bad = []
    for words, change in CASES.items():
        start = time.monotonic()
        try:
            worst, where = compare(change, not no_compile, device)
        except sleep.BadInput as e:
            worst, where = float("inf"), str(e)
        print(f"  {words:52} largest difference {worst:.1e} ({where}), "
              f"{time.monotonic() - start:.0f} s")
        if worst > limit:
            bad.append(words)
    if bad and on_gpu:
        sys.exit(f"not good: {'; '.join(bad)} differ by more than {limit:g}. Try --no_compile to "
                 "see if compiling or capture is at fault; train with --recompute, which records "
                 "no graph, or with --no-compile.")
    if bad:
        sys.exit(f"not good: {'; '.join(bad)} differ by more than {limit:g}. Train with "
                 "--no-compile.")
    not_tried = "" if on_gpu else " CUDA graphs and bfloat16 were not tried: no GPU."
    print("good: what is trained here is what the plain model trains, within "
          f"{limit:g}.{not_tried}")


if __name__ == "__main__":
    main()
