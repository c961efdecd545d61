"""How long does it take? The rule, a training step, Figure 6, and waking (Section 6.5).

    python -m lab.tools.benchmark                all parts, minutes to an hour
    python -m lab.tools.benchmark --only rule    one part: rule, N, L or wake
    python -m lab.tools.benchmark --quick        fewer cases, shorter: does it run?

Times are medians with interquartile ranges, warm and synchronised. Each part is written when it is
finished, to results.json in a new folder; then plot.png, if all parts have run.

If they are installed, other people's forms of the rule are timed beside ours: that of transformers
(Qwen3-Next, plain PyTorch), and on CUDA the Triton kernel of fla-core.
"""
import argparse
import gc
import math
import statistics
import time
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import sleep
from lab.common import parser, picture_of, program, read_results, write_results
from lab.experiments.plots import figure, save_figure


# ------------------------------------------------------------------------------------------------
# Measuring

def timer_of(f, device):
    """A timer of f() that waits until the device has finished."""

    def call():
        f()
        if device == "mps":                # of CUDA the timer itself waits
            torch.mps.synchronize()

    return Timer("f()", globals=dict(f=call), num_threads=torch.get_num_threads())


def timed(f, device, seconds):
    """Milliseconds of f(): median and interquartile range, warm and synchronised."""
    timer = timer_of(f, device)
    once = timer.timeit(2).median
    measured = timer.blocked_autorange(min_run_time=max(seconds, 5 * once))
    return 1e3 * measured.median, 1e3 * measured.iqr


def timed_by_turns(calls, device, seconds):
    """{name: f} -> {name: what `timed` says of f}, in turns: a busy moment of the machine hits all.

    In a turn every f runs for some 20 ms, at least once.
    """
    timers = {name: timer_of(f, device) for name, f in calls.items()}
    once = {name: timer.timeit(2).median for name, timer in timers.items()}
    turns = max(7, math.ceil(seconds / max(0.02, *once.values())))
    times = {name: [] for name in calls}
    for _ in range(turns):
        for name, timer in timers.items():
            n = max(1, int(0.02 / once[name]))
            times[name].append(1e3 * timer.timeit(n).median)
    result = {}
    for name in calls:
        low, median, high = statistics.quantiles(times[name], n=4)
        result[name] = (median, high - low)
    return result


def solve_flop(A_shape, B_shape, *_, **__):
    """FLOP of a triangular system (..., C, C) with right sides (..., C, V)."""
    return math.prod(B_shape) * A_shape[-1]


def count_flop(model, tokens, targets, N=None):
    """FLOP of a loss and its gradients: matrix products and triangular systems, both ways."""
    systems = {torch.ops.aten.linalg_solve_triangular: solve_flop}
    counter = FlopCounterMode(display=False, custom_mapping=systems)
    with counter, sdpa_kernel(SDPBackend.MATH):            # it does not see inside fused attention
        loss = model(tokens, targets, N)[1]
        loss.backward()
    return counter.get_total_flops()


def format_time(t):
    median, spread = t
    return f"{median:9.3f} ms (+-{spread:.3f})"


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
    fixed = A.detach()
    X = torch.eye(C, dtype=A.dtype, device=A.device)
    size = 1
    while size < C:
        block = i // size
        below = (block[:, None] == block + 1) & (block[:, None] % 2 == 1)      # (C, C)
        if size == 1:                      # X is still the identity
            X = X - fixed * below
        else:
            X = X - X @ (fixed * below) @ X
        size *= 2
    # The loop is outside autograd. This line subtracts X 0 X, which changes no number, but its
    # gradient is that of an inverse: dX = -X dA X.
    return X - X @ (A - fixed) @ X


def block_merge(q, k, v, log_alpha, beta, S, chunk=64):
    """sleep.fast_weight_rule_chunked with inverses for its systems, all chunks of them at once."""
    T = q.shape[2]
    n = math.ceil(T / chunk)
    C = math.ceil(T / n)
    padding = n * C - T               # it decays nothing (log_alpha 0) and writes nothing (beta 0)
    q, k, v = (F.pad(x, (0, 0, 0, padding)).unflatten(2, (n, C)) for x in (q, k, v))
    log_alpha, beta = (F.pad(x, (0, padding)).unflatten(2, (n, C)) for x in (log_alpha, beta))
    beta = beta[..., None]                                     # (B, H, n, C, 1)
    c = log_alpha.cumsum(-1)                                   # (B, H, n, C)
    future = torch.ones(C, C, dtype=torch.bool, device=q.device).triu(1)
    D = (c[..., :, None] - c[..., None, :]).masked_fill(future, -torch.inf).exp()
    X = unit_lower_inverse((beta * (k @ k.mT) * D).tril(-1))   # (B, H, n, C, C)
    decay = c.exp()[..., None]                                 # (B, H, n, C, 1)
    decay_to_end = (c[..., -1:] - c).exp()[..., None]
    queries = decay * q
    keys = decay_to_end * k
    written = X @ (beta * v)
    erased = X @ (beta * decay * k)
    scores = (q @ k.mT) * D
    outputs = []
    for i in range(n):
        u = written[:, :, i] - erased[:, :, i] @ S.mT          # (B, H, C, V)
        outputs.append(queries[:, :, i] @ S.mT + scores[:, :, i] @ u)
        S = decay[:, :, i, -1:, :] * S + u.mT @ keys[:, :, i]
    return torch.cat(outputs, 2)[:, :, :T], S


def forms_of_the_rule(device, compile):
    """{name: form of the rule}"""
    rules = {"recurrent": sleep.fast_weight_rule, "chunked": sleep.fast_weight_rule_chunked,
             "chunked, block merge": block_merge}
    if compile:
        for name in ("chunked", "chunked, block merge"):
            rules[f"{name}, compiled"] = torch.compile(rules[name], dynamic=False)
    others = {"transformers": rules_of_transformers}
    if device == "cuda":
        others["fla-core"] = rules_of_fla
    for package, find in others.items():
        try:
            rules |= find()
        except Exception as e:             # not installed, or not for this Triton
            print(f"  without the rule of {package} ({type(e).__name__})")
    return rules


def rules_of_transformers():
    """Hugging Face's form in plain PyTorch; it takes (B, T, H, K), S^T, and divides q by sqrt(K).

    It pads to whole chunks of 64 tokens; so there is a second one, of chunks that fit.
    """
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    def rule(q, k, v, log_alpha, beta, S, fit=False):
        T = q.shape[2]
        chunk = math.ceil(T / math.ceil(T / 64)) if fit else 64
        q = q * q.shape[3] ** 0.5
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o, S = torch_chunk_gated_delta_rule(q, k, v, log_alpha.mT, beta.mT, chunk_size=chunk,
                                            initial_state=S.mT, output_final_state=True)
        return o.transpose(1, 2), S.mT

    return {"transformers": rule, "transformers, chunks that fit": partial(rule, fit=True)}


def rules_of_fla():
    """fla-core's Triton kernel, in bfloat16; it takes (B, T, H, K) and S^T."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def rule(q, k, v, log_alpha, beta, S):
        q, k, v = (x.transpose(1, 2).bfloat16() for x in (q, k, v))
        o, S = chunk_gated_delta_rule(q, k, v, log_alpha.mT, beta.mT, scale=1.0,
                                      initial_state=S.mT, output_final_state=True)
        return o.transpose(1, 2), S.mT

    return {"fla's Triton kernel": rule}


def inputs_of_the_rule(B, H, T, K, device):
    """q, k, v, log_alpha, beta, S. Keys repeat (4 of them): the hard case, see unit_lower_inverse.

    q, k, v are bfloat16 numbers, as the matrix products of a block make them on a GPU.
    """
    g = torch.Generator(device).manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=g, device=device)

    which = torch.randint(4, (B, H, T, 1), generator=g, device=device).expand(B, H, T, K)
    k = F.normalize(rand(B, H, 4, K), dim=-1).gather(2, which)
    q = F.normalize(rand(B, H, T, K), dim=-1)
    v = rand(B, H, T, K)
    q, k, v = (x.bfloat16().float() for x in (q, k, v))
    log_alpha = -0.05 * rand(B, H, T).exp()
    beta = (2 + rand(B, H, T)).sigmoid()
    return [q, k, v, log_alpha, beta, rand(B, H, K, K)]


def bench_rule(device, quick, compile, seconds):
    """Time and error of every form of the rule: forward, and forward and backward.

    The error is the largest relative distance of o, S and the six gradients from the recurrent rule
    in float64; on CUDA our forms take TF32 products, and the kernel's casts to bfloat16 are part of
    its time.
    """
    shapes = [(512, 4, 24, 64), (128, 8, 75, 64), (8, 8, 2048, 64), (4, 8, 4096, 64)]
    if device != "cuda":
        shapes = [(32, 4, 24, 64), (8, 4, 75, 64), (64, 1, 24, 64), (2, 8, 2048, 64)]
    rules = forms_of_the_rule(device, compile)
    rows = []
    for shape in shapes[:2] if quick else shapes:
        B, H, T, K = shape
        inputs = inputs_of_the_rule(*shape, device)
        g = torch.Generator(device).manual_seed(1)
        weights = [torch.randn(B, H, T, K, generator=g, device=device),
                   torch.randn(B, H, K, K, generator=g, device=device)]

        def forward(rule):
            with torch.no_grad():
                return rule(*inputs)

        def both(rule, inputs=inputs):
            leaves = [x.detach().requires_grad_() for x in inputs]
            results = rule(*leaves)
            loss = sum((x * w.to(x.device)).sum() for x, w in zip(results, weights))
            return [*results, *torch.autograd.grad(loss, leaves)]

        exact_device = "cpu" if device == "mps" else device    # MPS has no float64
        exact = both(sleep.fast_weight_rule, [x.to(exact_device).double() for x in inputs])
        rows_of_shape = []
        for name, rule in rules.items():
            if T >= 2048 and "compiled" in name:
                continue                   # its chunks are unrolled: minutes to compile
            row = dict(shape=list(shape), rule=name)
            try:
                errors = [((x.to(y.device) - y).norm() / y.norm()).item()
                          for x, y in zip(both(rule), exact)]
                row["error"] = max(errors)
            except Exception as e:         # a kernel that refuses this GPU, or needs more memory
                row["failed"] = f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"
            rows_of_shape.append(row)
        works = {row["rule"]: rules[row["rule"]] for row in rows_of_shape if "error" in row}
        calls = {name: partial(forward, rule) for name, rule in works.items()}
        forward_times = timed_by_turns(calls, device, seconds)
        calls = {name: partial(both, rule) for name, rule in works.items()}
        both_times = timed_by_turns(calls, device, seconds)
        for row in rows_of_shape:
            name = row["rule"]
            words = row.get("failed")
            if name in works:
                row["forward"] = forward_times[name]
                row["both"] = both_times[name]
                words = (f"forward {format_time(row['forward'])}, with backward "
                         f"{format_time(row['both'])}, error {row['error']:.0e}")
            print(f"  {str(shape):18} {name:32} {words}", flush=True)
        rows += rows_of_shape
    return rows


# ------------------------------------------------------------------------------------------------
# The model

def training_step(device, compile, T, B, M=4, **settings):
    """A model, step() = one training step on random tokens, M of them predicted, and its batch."""
    torch.manual_seed(0)
    bf16 = sleep.has_bf16(device)
    model = sleep.SleepLM(sleep.Config(vocab_size=3, seq_len=T, bf16=bf16, **settings)).to(device)
    gradients = sleep.accelerate(model, compile, False)
    optimizers = sleep.make_optimizers(model, 1e-3, 1e-3)
    tokens = torch.randint(3, (B, T), device=device)
    targets = torch.randint(3, (B, M), device=device)

    def step():
        gradients(tokens, targets, model.cfg.N)
        for optimizer in optimizers:
            optimizer.step()

    return model, step, tokens, targets


def flop_per_ms(device, seconds):
    """The ceiling: FLOP per millisecond in a large matrix product."""
    on_gpu = device == "cuda"
    n = 8192 if on_gpu else 1024
    dtype = torch.bfloat16 if sleep.has_bf16(device) else torch.float32
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    ceiling = 2 * n ** 3 / timed(lambda: a @ b, device, seconds)[0]
    print(f"  {ceiling / 1e9:.2f} TFLOP/s in a matrix product of {n} x {n}, {dtype}: the ceiling")
    return ceiling


def bench_N(device, quick, compile, seconds):
    """A training step of Section 6.1 (on a CPU: of the cpu preset of train_ca.py) against N."""
    on_gpu = device == "cuda"
    size = dict(T=100, B=512, L=24, layout="asas", d_model=256, n_head=4)
    if not on_gpu:
        size = dict(T=34, B=16 if quick else 256, M=2, L=16, layout="as", d_model=64, n_head=2)
    ceiling = flop_per_ms(device, seconds)
    rows = []
    for N in (1, 2) if quick else (1, 2, 4, 8):
        model, step, tokens, targets = training_step(device, compile, N=N, **size)
        plain = sleep.SleepLM(model.cfg)
        flop = size["B"] * count_flop(plain, tokens[:1].cpu(), targets[:1].cpu())
        if on_gpu:
            gc.collect()                   # the model before this one, and its graphs
            torch.cuda.reset_peak_memory_stats()
        t = timed(step, device, seconds)
        row = dict(N=N, step=t, tokens_per_s=1e3 * size["B"] * size["T"] / t[0],
                   ratio=t[0] / rows[0]["step"][0] if rows else 1.0, flop=flop,
                   share=flop / ceiling / t[0],
                   peak=torch.cuda.max_memory_allocated() if on_gpu else None)
        rows.append(row)
        memory = f", peak {row['peak'] / 1e9:.2f} GB" if on_gpu else ""
        print(f"  N = {N}: {format_time(t)}, {row['tokens_per_s']:,.0f} tokens/s, "
              f"{row['ratio']:.2f} x N = 1, {100 * row['share']:.0f} % of the "
              f"ceiling{memory}", flush=True)
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
    if quick:
        windows = windows[1:-1:2]
    rows = []
    for L in windows:
        passes = (1, 2) if quick else (1, 2, 4)
        if L == size["T"]:
            passes = (1,)
        for N in passes:
            _, step, *_ = training_step(device, False, N=N, L=L, **size)
            t = timed(step, device, seconds)
            row = dict(L=L, N=N, step=t, tokens_per_s=1e3 * size["B"] * size["T"] / t[0])
            rows.append(row)
            print(f"  T = {size['T']}, L = {L:5}, N = {N}: {row['tokens_per_s']:12,.0f} tokens/s, "
                  f"{format_time(t)}", flush=True)
    return rows


def bench_wake(device, quick, compile, seconds):
    """One stream: time of an answered token, of a sleep, and bytes of what is remembered."""
    size = dict(seq_len=12000, L=512, layout="asas", d_model=512, n_head=8)
    if device != "cuda":
        size = dict(seq_len=1024, L=64, layout="as", d_model=64, n_head=2)
    L = size["L"]
    rows = []
    for N in (1, 2) if quick else (1, 2, 4, 8):
        torch.manual_seed(0)
        model = sleep.SleepLM(sleep.Config(vocab_size=3, N=N, **size)).to(device)
        with torch.no_grad():
            h = model.embed(torch.randint(3, (1, L), device=device))
            empty = model.empty_memory(1)
            slept = model.sleep(h, empty)
            _, full = model.wake(h[:, 1:], slept)              # a cache of L - 1 tokens
            awake = timed(lambda: model.wake(h[:, :1], full), device, seconds)
            asleep = timed(lambda: model.sleep(h, empty), device, seconds)
        bytes_S = sum(S.nbytes for S in full.S if S is not None)
        kv = [x for block in full.cache for x in (block.keys, block.values) if x is not None]
        bytes_cache = sum(x.nbytes for x in kv) * L // (L - 1)
        rows.append(dict(N=N, wake=awake, sleep=asleep, bytes_S=bytes_S, bytes_cache=bytes_cache,
                         bytes_full_attention=bytes_cache * size["seq_len"] // L))
        print(f"  N = {N}: a token {format_time(awake)}, a sleep {format_time(asleep)}", flush=True)
    print(f"  bytes: S {bytes_S:,}, cache of a full window {bytes_cache:,}, of all {size['seq_len']:,} "
          f"tokens {rows[-1]['bytes_full_attention']:,}")
    return rows


# ------------------------------------------------------------------------------------------------
# The picture: four panels, one a part of the benchmark

def draw(results, path):
    fig, axes = figure(1, 4, (18, 4.4))
    draw_rule(axes[0, 0], [row for row in results["bench_rule"] if "both" in row])
    draw_N(axes[0, 1], results["bench_N"])
    draw_L(axes[0, 2], results["bench_L"])
    draw_wake(axes[0, 3], results["bench_wake"])
    for ax in axes[0]:
        ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        ax.legend(fontsize=7)
    fig.suptitle(f"Times on {results['device']}, torch {results['torch']}", fontsize=10)
    save_figure(fig, path)


def draw_rule(ax, rows):
    shapes = list(dict.fromkeys(str(tuple(row["shape"])) for row in rows))
    names = list(dict.fromkeys(row["rule"] for row in rows))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        of_name = [row for row in rows if row["rule"] == name]
        x = [shapes.index(str(tuple(row["shape"]))) + i * width for row in of_name]
        ax.bar(x, [row["both"][0] for row in of_name], width, label=name)
    ax.set(yscale="log", xlabel="sequences, heads, tokens, width of a head",
           ylabel="ms, forward and backward", title="The fast-weight rule")
    ax.set_ylim(top=6 * ax.get_ylim()[1])                      # space for the legend
    ax.set_xticks([i + 0.4 - width / 2 for i in range(len(shapes))], shapes)


def draw_N(ax, rows):
    N = [row["N"] for row in rows]
    times = [row["step"][0] for row in rows]
    ax.errorbar(N, times, [row["step"][1] for row in rows], marker="o", label="measured")
    ax.plot(N, [n / N[0] * times[0] for n in N], "k--", label="N times as long as N = 1")
    ax.set(xlabel="N: passes of a sleep", ylabel="ms", title="A training step", xticks=N, ylim=0)


def draw_L(ax, all_rows):
    for N in sorted({row["N"] for row in all_rows}):
        rows = [row for row in all_rows if row["N"] == N]
        ax.plot([row["L"] for row in rows], [row["tokens_per_s"] for row in rows], "o-",
                label=f"N = {N}")
    windows = sorted({row["L"] for row in all_rows})
    ax.set(xscale="log", yscale="log", xlabel="window in tokens; the last holds the whole sequence",
           ylabel="training tokens per second", title="The window (Figure 6)")
    ax.set_xticks(windows, windows, minor=False)


def draw_wake(ax, rows):
    N = [row["N"] for row in rows]
    for part, label in (("wake", "one token, awake"), ("sleep", "one sleep")):
        ax.plot(N, [row[part][0] for row in rows], "o-", label=label)
    ax.set(xscale="log", yscale="log", xlabel="N: passes of a sleep", ylabel="ms",
           title="One stream of tokens")
    ax.set_xticks(N, N, minor=False)


# ------------------------------------------------------------------------------------------------
# The program

PARTS = {"bench_rule": (bench_rule, "the rule (B, H, T, K), all its forms in turns"),
         "bench_N": (bench_N, "a training step against N"),
         "bench_L": (bench_L, "Figure 6: tokens per second"),
         "bench_wake": (bench_wake, "waking and sleeping")}


@program
def main(argv):
    p = parser(__doc__)
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    p.add_argument("--quick", action="store_true", help="fewer cases, shorter: does it run?")
    p.add_argument("--only", choices=[name.removeprefix("bench_") for name in PARTS],
                   help="this part alone, without a picture")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA only")
    p.add_argument("--out", type=Path,
                   help="a new folder; default: benchmark-DEVICE-MMDD-HHMMSS in out/")
    p.add_argument("--draw", type=Path, metavar="FILE",
                   help="draw a file of results; nothing is measured")
    args = p.parse_args(argv)
    if args.draw:
        draw_file(args.draw)
        return
    device = torch.device(sleep.choose_device(args.device)).type
    no_compile = sleep.why_no_compile(device)
    if args.compile and no_compile:
        raise sleep.BadInput(f"--compile: {no_compile}. Leave it out.")
    compile = device == "cuda" and not no_compile if args.compile is None else args.compile
    out = args.out or Path("out") / time.strftime(f"benchmark-{device}-%m%d-%H%M%S")
    try:
        out.mkdir(parents=True)
    except OSError as e:
        raise sleep.BadInput(f"{out} cannot be made ({e.strerror}): choose another "
                             "--out.") from None
    sleep.set_up_torch(device)
    name = sleep.device_name(device)
    print(f"{name}, torch {torch.__version__}, {'compiled' if compile else 'eager'}; medians and "
          "interquartile ranges")
    # Figure 6 has one window of all tokens, answers and all.
    warnings.filterwarnings("ignore", message=".*share a window")
    results = dict(device=name, torch=str(torch.__version__), compile=compile)
    for part, (bench, words) in PARTS.items():
        if args.only and part != f"bench_{args.only}":
            continue
        print(words)
        results[part] = bench(device, args.quick, compile, 0.05 if args.quick else 1.0)
        write_results(out / "results.json", results)
    if not args.only:
        draw(results, out / "plot.png")
    print(f"saved: {out}")


def draw_file(file):
    results = read_results(file)
    if {"device", "torch", *PARTS} - set(results):
        raise sleep.BadInput(f"{file} holds no results of lab.tools.benchmark.")
    draw(results, picture_of(file))
    print(f"saved: {picture_of(file)}")


if __name__ == "__main__":
    main()
