"""How long does it take? The rule, a training step, Figure 6, and waking (Section 6.5).

    python -m lab.benchmark                all parts, minutes to an hour
    python -m lab.benchmark --quick        fewer cases, shorter: does it run?

Times are medians with interquartile ranges, warm and synchronised. Each part is written when it is
finished, to results.json in a new folder; then plot.png.
"""
import argparse
import gc
import json
import math
import time
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import sleep
from lab.plot import figure, parser, save_figure


# ------------------------------------------------------------------------------------------------
# Measuring

def timed(f, device, seconds):
    """Milliseconds of f(): median and interquartile range, warm and synchronised."""
    # The timer itself waits for CUDA.
    call = (lambda: (f(), torch.mps.synchronize())) if device == "mps" else f
    timer = Timer("f()", globals=dict(f=call), num_threads=torch.get_num_threads())
    once = timer.timeit(2).median
    m = timer.blocked_autorange(min_run_time=max(seconds, 5 * once))
    return 1e3 * m.median, 1e3 * m.iqr


def solve_flop(A_shape, B_shape, *_, **__):
    """FLOP of a triangular system (..., C, C) with right sides (..., C, V)."""
    return math.prod(B_shape) * A_shape[-1]


def count_flop(model, tokens, targets, N=None):
    """FLOP of a loss and its gradients: matrix products and triangular systems, both ways."""
    systems = {torch.ops.aten.linalg_solve_triangular: solve_flop}
    with (FlopCounterMode(display=False, custom_mapping=systems) as count,
          sdpa_kernel(SDPBackend.MATH)):   # it does not see inside the CPU's fused attention
        model(tokens, targets, N)[1].backward()
    return count.get_total_flops()


def ms(t):
    return f"{t[0]:9.3f} ms (+-{t[1]:.3f})"


# ------------------------------------------------------------------------------------------------
# The rule

def unit_lower_inverse(A):
    """(I + A)^-1 for strictly lower triangular A (..., C, C), as matrix products only.

    Diagonal blocks of 1, 2, 4, ... tokens are inverted exactly and merged. The shorter product
    (I - A)(I + A^2)(I + A^4)... is equal on paper, but with repeated keys its powers of A grow
    like binomials and lose all digits in float32 from 32 tokens on.
    """
    C = A.shape[-1]
    i = torch.arange(C, device=A.device)
    fixed, X, size = A.detach(), torch.eye(C, dtype=A.dtype, device=A.device), 1
    while size < C:
        block = i // size
        below = (block[:, None] == block + 1) & (block[:, None] % 2 == 1)      # (C, C)
        X = X - (X @ (fixed * below) @ X if size > 1 else fixed * below)
        size *= 2
    # The loop is outside autograd. This line subtracts X 0 X, which changes no number, but its
    # gradient is that of an inverse: dX = -X dA X.
    return X - X @ (A - fixed) @ X


def block_merge(q, k, v, log_alpha, beta, S, chunk=64):
    """sleep.gated_delta_rule_chunked with inverses for its systems, all chunks of them at once."""
    T = q.shape[2]
    n = math.ceil(T / chunk)
    C = math.ceil(T / n)
    pad = n * C - T                        # padding: no decay (log_alpha 0), no write (beta 0)
    q, k, v = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (n, C)) for x in (q, k, v))
    log_alpha, beta = (F.pad(x, (0, pad)).unflatten(2, (n, C)) for x in (log_alpha, beta))
    c, beta = log_alpha.cumsum(-1), beta[..., None]        # (B, H, n, C), (B, H, n, C, 1)
    future = torch.ones(C, C, dtype=torch.bool, device=q.device).triu(1)
    D = (c[..., :, None] - c[..., None, :]).masked_fill(future, -torch.inf).exp()
    X = unit_lower_inverse((beta * (k @ k.mT) * D).tril(-1))                   # (B, H, n, C, C)
    left, right = c.exp()[..., None], (c[..., -1:] - c).exp()[..., None]
    outputs, parts = [], (left * q, right * k, X @ (beta * v), X @ (beta * left * k),
                          (q @ k.mT) * D, left[..., -1:, :])
    for q, k, Xv, Xk, scores, decay in zip(*(x.unbind(2) for x in parts)):
        u = Xv - Xk @ S.mT                                                     # (B, H, C, V)
        outputs.append(q @ S.mT + scores @ u)
        S = decay * S + u.mT @ k
    return torch.cat(outputs, 2)[:, :, :T], S


def contenders(device, compile):
    """{name: form of the rule}"""
    rules = {"recurrent": sleep.gated_delta_rule, "chunked": sleep.gated_delta_rule_chunked,
             "chunked, block merge": block_merge}
    if compile:
        rules |= {f"{name}, compiled": torch.compile(rule, dynamic=False)
                  for name, rule in rules.items() if "chunked" in name}
    if device == "cuda":
        try:
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule        # (B, T, H, K)

            def fla(q, k, v, log_alpha, beta, S):
                q, k, v = (x.transpose(1, 2).bfloat16() for x in (q, k, v))
                o, S = chunk_gated_delta_rule(q, k, v, log_alpha.mT, beta.mT, scale=1.0,
                                              initial_state=S.mT, output_final_state=True)
                return o.transpose(1, 2), S.mT
            rules["fla's Triton kernel"] = fla
        except Exception as e:             # not installed, or not for this Triton
            print(f"  without fla-core's kernel ({type(e).__name__})")
    return rules


def bench_rule(device, quick, compile, seconds):
    """Time and error of every form of the rule: forward, and forward and backward.

    Keys repeat (4 of them, the hard case, see unit_lower_inverse); q, k, v are bfloat16 numbers, as
    the matrix products of a block make them on a GPU. The error is the largest relative distance of
    o, S and the six gradients from the recurrent rule in float64; on CUDA our forms take TF32
    products, and the kernel's casts to bfloat16 are part of its time.
    """
    shapes = [(512, 4, 24, 64), (128, 8, 75, 64), (8, 8, 2048, 64), (4, 8, 4096, 64)]
    if device != "cuda":
        shapes = [(32, 4, 24, 64), (8, 4, 75, 64), (2, 8, 2048, 64)]
    rules, rows = contenders(device, compile), []
    for B, H, T, K in shapes[:2] if quick else shapes:
        g = torch.Generator(device).manual_seed(0)
        rand = lambda *shape: torch.randn(*shape, generator=g, device=device)
        which = torch.randint(4, (B, H, T, 1), generator=g, device=device).expand(B, H, T, K)
        k = F.normalize(rand(B, H, 4, K), dim=-1).gather(2, which)
        q, k, v = (x.bfloat16().float() for x in (F.normalize(rand(B, H, T, K), dim=-1), k,
                                                  rand(B, H, T, K)))
        inputs = [q, k, v, -0.05 * rand(B, H, T).exp(), (2 + rand(B, H, T)).sigmoid(),
                  rand(B, H, K, K)]
        weights = rand(B, H, T, K), rand(B, H, K, K)

        def forward(rule):
            with torch.no_grad():
                return rule(*inputs)

        def both(rule, inputs=inputs):
            leaves = [x.detach().requires_grad_() for x in inputs]
            results = rule(*leaves)
            loss = sum((x * w.to(x.device)).sum() for x, w in zip(results, weights))
            return [*results, *torch.autograd.grad(loss, leaves)]

        oracle = "cpu" if device == "mps" else device                          # MPS: no float64
        exact = both(sleep.gated_delta_rule, [x.to(oracle).double() for x in inputs])
        for name, rule in rules.items():
            if T >= 2048 and "compiled" in name:
                continue                   # its chunks are unrolled: minutes to compile
            row = dict(shape=[B, H, T, K], rule=name)
            try:
                row["forward"] = timed(lambda: forward(rule), device, seconds)
                row["error"] = max(((x.to(y.device) - y).norm() / y.norm()).item()
                                   for x, y in zip(both(rule), exact))
                row["both"] = timed(lambda: both(rule), device, seconds)
                said = (f"forward {ms(row['forward'])}, with backward {ms(row['both'])}, "
                        f"error {row['error']:.0e}")
            except Exception as e:         # a kernel that refuses this GPU, or needs more memory
                said = row["failed"] = f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"
            rows.append(row)
            print(f"  {str((B, H, T, K)):18} {name:32} {said}", flush=True)
    return rows


# ------------------------------------------------------------------------------------------------
# The model

def bench_model(device, compile, T, B, M=4, **settings):
    """A model, f() = one training step on random tokens, M of them predicted, and its batch."""
    torch.manual_seed(0)
    model = sleep.SleepLM(sleep.Config(vocab_size=3, T=T, **settings)).to(device)
    model.bf16 = device == "cuda"
    gradients = sleep.make_gradients(model, compile, False)
    optimizers = sleep.make_optimizers(model, 1e-3, 1e-3)
    tokens, targets = (torch.randint(3, (B, n), device=device) for n in (T, M))

    def step():
        gradients(tokens, targets, model.cfg.N)
        for optimizer in optimizers:
            optimizer.step()
    return model, step, tokens, targets


def bench_N(device, quick, compile, seconds):
    """A training step of Section 6.1 (on a CPU: of the cpu preset of train_ca.py) against N."""
    size = dict(T=100, B=512, L=24, layout="asas", d_model=256, n_head=4)
    if device != "cuda":
        size = dict(T=34, B=16 if quick else 256, M=2, L=16, layout="as", d_model=64, n_head=2)
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    ceiling = 2 * n ** 3 / timed(lambda: a @ b, device, seconds)[0]            # FLOP per ms
    del a, b                               # peak memory is that of a step
    print(f"  {ceiling / 1e9:.2f} TFLOP/s in a matrix product of {n} x {n}, {dtype}: the ceiling")
    rows = []
    for N in (1, 2) if quick else (1, 2, 4, 8):
        model, step, tokens, targets = bench_model(device, compile, N=N, **size)
        plain = sleep.SleepLM(model.cfg)
        work = size["B"] * count_flop(plain, tokens[:1].cpu(), targets[:1].cpu())
        if device == "cuda":
            gc.collect()                   # the model before this one, and its graphs
            torch.cuda.reset_peak_memory_stats()
        t = timed(step, device, seconds)
        rows.append(dict(N=N, step=t, tokens_per_s=1e3 * size["B"] * size["T"] / t[0],
                         ratio=t[0] / rows[0]["step"][0] if rows else 1.0, flop=work,
                         share=work / ceiling / t[0],
                         peak=torch.cuda.max_memory_allocated() if device == "cuda" else None))
        r = rows[-1]
        print(f"  N = {N}: {ms(t)}, {r['tokens_per_s']:,.0f} tokens/s, {r['ratio']:.2f} x N = 1, "
              f"{100 * r['share']:.0f} % of the ceiling"
              + (f", peak {r['peak'] / 1e9:.2f} GB" if r["peak"] else ""), flush=True)
    return rows


def bench_L(device, quick, compile, seconds):
    """Figure 6: training tokens per second against the window at a fixed length T, and against N.

    L = T is the fully parallel model: one window, all T tokens at once, attention to all of them.
    Not compiled, since every L would be compiled anew.
    """
    size = dict(T=12000, B=4, layout="as", d_model=512, n_head=8)
    windows = [512, 1000, 2000, 4000, 12000]
    if device != "cuda":
        size = dict(T=1024, B=1 if quick else 4, layout="as", d_model=64, n_head=2)
        windows = [32, 64, 128, 256, 1024]
    rows = []
    for L in windows[1:-1:2] if quick else windows:
        for N in (1,) if L == size["T"] else (1, 2) if quick else (1, 2, 4):
            _, step, *_ = bench_model(device, False, N=N, L=L, **size)
            t = timed(step, device, seconds)
            rows.append(dict(L=L, N=N, step=t, tokens_per_s=1e3 * size["B"] * size["T"] / t[0]))
            print(f"  T = {size['T']}, L = {L:5}, N = {N}: {rows[-1]['tokens_per_s']:12,.0f} "
                  f"tokens/s, {ms(t)}", flush=True)
    return rows


def bench_wake(device, quick, compile, seconds):
    """One stream: time of an answered token, of a sleep, and bytes of what is remembered."""
    size = dict(T=12000, L=512, layout="asas", d_model=512, n_head=8)
    if device != "cuda":
        size = dict(T=1024, L=64, layout="as", d_model=64, n_head=2)
    rows = []
    for N in (1, 2) if quick else (1, 2, 4, 8):
        torch.manual_seed(0)
        model = sleep.SleepLM(sleep.Config(vocab_size=3, N=N, **size)).to(device)
        with torch.no_grad():
            h = model.embed(torch.randint(3, (1, size["L"]), device=device))
            empty = model.empty_memory(1)
            _, full = model.wake(h[:, 1:], model.sleep(h, empty))  # a cache of L - 1 tokens
            awake = timed(lambda: model.wake(h[:, :1], full), device, seconds)
            asleep = timed(lambda: model.sleep(h, empty), device, seconds)
        bytes_S = sum(S.nbytes for S in full.S if S is not None)
        cached = sum(x.nbytes for c in full.cache for x in c[1:]) * size["L"] // (size["L"] - 1)
        rows.append(dict(N=N, wake=awake, sleep=asleep, bytes_S=bytes_S, bytes_cache=cached,
                         bytes_full_attention=cached * size["T"] // size["L"]))
        print(f"  N = {N}: a token {ms(awake)}, a sleep {ms(asleep)}", flush=True)
    print(f"  bytes: S {bytes_S:,}, cache of a full window {cached:,}, of all {size['T']:,} tokens "
          f"{rows[-1]['bytes_full_attention']:,}")
    return rows


# ------------------------------------------------------------------------------------------------
# The picture and the command

def plot(results, path):
    """Four panels, one a part of the benchmark."""
    fig, axes = figure(1, 4, (18, 4.4))
    rule = [r for r in results["bench_rule"] if "both" in r]
    shapes = list(dict.fromkeys(str(tuple(r["shape"])) for r in rule))
    names = list(dict.fromkeys(r["rule"] for r in rule))
    ax = axes[0, 0]
    for i, name in enumerate(names):
        rows = [r for r in rule if r["rule"] == name]
        ax.bar([shapes.index(str(tuple(r["shape"]))) + 0.8 * i / len(names) for r in rows],
               [r["both"][0] for r in rows], 0.8 / len(names), label=name)
    ax.set(yscale="log", xlabel="sequences, heads, tokens, width of a head",
           ylabel="ms, forward and backward", title="The fast-weight rule")
    ax.set_ylim(top=6 * ax.get_ylim()[1])                  # room for the legend
    ax.set_xticks([i + 0.4 - 0.4 / len(names) for i in range(len(shapes))], shapes)
    ax = axes[0, 1]
    N, times, spread = zip(*((r["N"], *r["step"]) for r in results["bench_N"]))
    ax.errorbar(N, times, spread, marker="o", label="measured")
    ax.plot(N, [n / N[0] * times[0] for n in N], "k--", label="N times as long as N = 1")
    ax.set(xlabel="N: passes of a sleep", ylabel="ms", title="A training step", xticks=N, ylim=0)
    ax = axes[0, 2]
    for n in sorted({r["N"] for r in results["bench_L"]}):
        rows = [r for r in results["bench_L"] if r["N"] == n]
        ax.plot([r["L"] for r in rows], [r["tokens_per_s"] for r in rows], "o-", label=f"N = {n}")
    windows = sorted({r["L"] for r in results["bench_L"]})
    ax.set(xscale="log", yscale="log", xlabel="window in tokens; the last holds the whole sequence",
           ylabel="training tokens per second", title="The window (Figure 6)")
    ax.set_xticks(windows, windows, minor=False)
    ax = axes[0, 3]
    for what, label in (("wake", "one token, awake"), ("sleep", "one sleep")):
        ax.plot([r["N"] for r in results["bench_wake"]],
                [r[what][0] for r in results["bench_wake"]], "o-", label=label)
    ax.set(xscale="log", yscale="log", xlabel="N: passes of a sleep", ylabel="ms",
           title="One stream of tokens")
    ax.set_xticks(N, N, minor=False)
    for ax in axes[0]:
        ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        ax.legend(fontsize=7)
    fig.suptitle(f"Times on {results['device']}, torch {results['torch']}", fontsize=10)
    save_figure(fig, path)


def main(argv=None):
    p = parser(__doc__)
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    p.add_argument("--quick", action="store_true", help="fewer cases, shorter: does it run?")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA only")
    p.add_argument("--out", type=Path,
                   help="a new folder; default: benchmark-DEVICE-MMDD-HHMMSS in out/")
    args = p.parse_args(argv)
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    device = next(d for d in there if there[d]) if args.device == "auto" else args.device
    if not there.get(device):
        p.error(f"there is no device '{device}' here: take --device cpu.")
    fuse = device == "cuda" and find_spec("triton") is not None
    compile = fuse if args.compile is None else args.compile
    out = args.out or Path("out") / time.strftime(f"benchmark-{device}-%m%d-%H%M%S")
    try:
        if compile:
            torch.compile(torch.sin)(torch.ones(1, device=device))
    except Exception as e:                 # no C++ compiler, no Triton: each has its own error
        p.error(f"torch.compile does not work here ({type(e).__name__}): take --no-compile.")
    try:
        out.mkdir(parents=True)
    except OSError as e:
        p.error(f"{out} cannot be made ({e.strerror}): choose another --out.")
    torch._dynamo.config.recompile_limit = 64          # one graph for each shape and kind of call
    if device == "cuda":
        torch.set_float32_matmul_precision("high")                             # TF32
    name = (torch.cuda.get_device_name() if device == "cuda" else
            f"{device}, {torch.get_num_threads()} threads")
    print(f"{name}, torch {torch.__version__}, {'compiled' if compile else 'eager'}; medians and "
          "interquartile ranges")
    results = dict(device=name, torch=str(torch.__version__), compile=compile)
    for words, bench in (("the rule (B, H, T, K)", bench_rule),
                         ("a training step against N", bench_N),
                         ("Figure 6: tokens per second", bench_L),
                         ("waking and sleeping", bench_wake)):
        print(words)
        results[bench.__name__] = bench(device, args.quick, compile, 0.05 if args.quick else 1.0)
        sleep.write(out / "results.json", lambda p: p.write_text(json.dumps(results, indent=1)))
    plot(results, out / "plot.png")
    print(f"saved: {out / 'results.json'}, {out / 'plot.png'}")


if __name__ == "__main__":
    main()
