"""Is training on this device what it should be? A minute, then a verdict in words.

    python -m lab.tools.gpu_check                 the GPU, if there is one; else what a CPU can tell

Every case is trained three times from the same weights, for eight steps: in float32; plainly, in the
precision of this device (bfloat16 where the GPU has it); and as sleep.train does it (fused by
torch.compile, and on CUDA replayed from CUDA graphs). All gradients of a step are one vector. How
far is it from that of float32? What is trained has to be at most twice as far as the plain model
is: rounding is then as it should be. Batches have two lengths, N is drawn, attention thaws, and an
evaluation comes in between.
"""
import math
import sys
import time
from dataclasses import replace
from statistics import median

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
    T = cfg.seq_len
    M = 5                                  # the tokens before them fill whole windows
    if step % 3 == 0:
        T = cfg.seq_len - cfg.L
    tokens = torch.randint(cfg.vocab_size, (B, T), generator=g)
    targets = torch.randint(cfg.vocab_size, (B, M), generator=g)
    return tokens.to(device), targets.to(device)


def make_model(cfg, device):
    torch.manual_seed(0)
    model = sleep.SleepLM(cfg).to(device)
    # Initialised as 0, the head would hide all gradients before it.
    torch.nn.init.normal_(model.head.weight, std=cfg.d_model ** -0.5)
    return model


def gradient_vector(model):
    """All gradients of a step as one vector, in float64. A parameter that is frozen counts as 0."""
    vectors = []
    for p in model.parameters():
        trained = p.grad is not None and p.requires_grad
        vectors.append(p.grad.flatten() if trained else torch.zeros_like(p).flatten())
    return torch.cat(vectors).double()


def compare(change, compile, device, bf16):
    """The relative distance of a step's gradients from float32, median: plainly, and as trained.

    inf if a number is not finite. The median, since random models are sensitive: in a step or two of
    eight, bfloat16 may turn the whole gradient.
    """
    size = dict(seq_len=69, L=16, d_model=64) if device == "cuda" else dict(seq_len=23, L=6, d_model=16)
    cfg = sleep.Config(vocab_size=11, n_head=2, bf16=bf16, **size, **change)
    exact = make_model(replace(cfg, bf16=False), device)
    plain = make_model(cfg, device)
    trained = make_model(cfg, device)
    models = [exact, plain, trained]
    gradients = [sleep.accelerate(exact, compile=False, recompute=True),
                 sleep.accelerate(plain, compile=False, recompute=True),
                 sleep.accelerate(trained, compile=compile, recompute=False)]
    distances = {"plain": [], "trained": []}
    for step in range(STEPS):
        tokens, targets = make_batch(cfg, step, device)
        frozen = cfg.eviction == "sliding" and step < 4
        for model in models:
            for block in model.blocks:
                block.requires_grad_(block.kind == "s" or not frozen)
        vectors = []
        for model, gradients_of in zip(models, gradients):
            loss = gradients_of(tokens, targets, 1 + step % 3)
            vectors.append(torch.cat([gradient_vector(model), loss.double()[None]]))
        for name, vector in zip(distances, vectors[1:]):
            distance = ((vector - vectors[0]).norm() / vectors[0].norm()).item()
            if not math.isfinite(distance):
                return math.inf, math.inf
            distances[name].append(distance)
        with torch.no_grad():
            trained(tokens, targets, 2)    # an evaluation between two steps
            for p, q, r in zip(*(model.parameters() for model in models)):
                if p.grad is not None and p.requires_grad:
                    p.sub_(0.02 * p.grad)
                    q.copy_(p)
                    r.copy_(p)
    return median(distances["plain"]), median(distances["trained"])


def is_good(plain, trained):
    """Is what is trained at most twice as far from float32 as the plain model is?

    Random models are sensitive: in bfloat16 the plain model itself may be a third away.
    """
    return plain < 0.5 and trained <= 2 * plain + 1e-4


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
    bf16 = sleep.has_bf16(device)
    precision = "bfloat16" if bf16 else "float32"
    print(f"{sleep.device_name(device)}, torch {torch.__version__}; "
          f"{f'not compiled ({no_compile})' if no_compile else 'compiled'}"
          f"{', replayed from CUDA graphs' if on_gpu else ''}, {precision}")
    bad = []
    for words, change in CASES.items():
        start = time.monotonic()
        try:
            plain, trained = compare(change, not no_compile, device, bf16)
        except sleep.BadInput as e:
            print(f"  {words}: {e}")
            bad.append(words)
            continue
        print(f"  {words:52} from float32: plainly {plain:.1e}, as trained {trained:.1e}, "
              f"{time.monotonic() - start:.0f} s")
        if not is_good(plain, trained):
            bad.append(words)
    if bad:
        advice = "Train with --no-compile."
        if on_gpu:
            advice = ("Try --no_compile to see if compiling or capture is at fault; train with "
                      "--recompute, which records no graph, or with --no-compile.")
        sys.exit(f"not good: {'; '.join(bad)}. {advice}")
    not_tried = "" if on_gpu else " CUDA graphs and bfloat16 were not tried: no GPU."
    print(f"good: what is trained here is what the plain model trains.{not_tried}")


if __name__ == "__main__":
    main()
