"""Every claim of sleep.py and its scripts, as a test with the claim as its name.

    python test_sleep.py              all of them
    python test_sleep.py rule wake    those whose names contain one of the words
"""
import contextlib
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

import sleep
import train_ca
import train_khop
from sleep import Config, Memory, SleepLM

HERE = Path(__file__).parent
TASKS = {"train_ca": "Tapes", "train_khop": "Cycles"}
EVICTIONS = ("hard", "sliding")


# ------------------------------------------------------------------------------------------------
# Helpers

def close(a, b, tolerance):
    """Relative distance of two tensors, checked; NaN never passes."""
    distance = ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
    assert distance <= tolerance, f"relative distance {distance:.1e} > {tolerance:.0e}"


def refused(words, call, *args, **kwargs):
    """The call raises ValueError with a sentence that contains the words."""
    try:
        call(*args, **kwargs)
    except ValueError as e:
        assert words in str(e), f"'{words}' is not in: {e}"
        return
    raise AssertionError(f"nothing was refused ('{words}')")


def script(module, command):
    """Run a script's main in this process -> exit status, what it printed, what it complained."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    task = getattr(module, TASKS[module.__name__])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            sleep.main(module.__doc__, module.PRESETS, module.add_flags, task, shlex.split(command))
        except SystemExit as e:
            status = e.code or 0
    return status, out.getvalue(), err.getvalue()


def tiny(**kw):
    """A small model in float64 with every weight random, so that nothing is hidden by a zero."""
    cfg = dict(vocab_size=7, T=20, L=5, N=2, layout="asas", d_model=16, n_head=2)
    cfg.update(kw)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        model = SleepLM(Config(**cfg))
    finally:
        torch.set_default_dtype(torch.float32)
    torch.nn.init.normal_(model.head.weight)
    return model


def rule_inputs(T, regime, B=2, H=2, K=4, V=6, dtype=torch.float64):
    g = torch.Generator().manual_seed(T)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    q, k = F.normalize(rand(B, H, T, K), dim=-1), F.normalize(rand(B, H, T, K), dim=-1)
    v, S = rand(B, H, T, V), rand(B, H, V, K)
    log_alpha, beta = -rand(B, H, T).exp(), rand(B, H, T).sigmoid()
    if "one key" in regime:
        k = k[:, :, :1].expand_as(k).clone()
    if "two keys" in regime:
        k = k[:, :, torch.arange(T) % 2 * (T > 1)]
    if "beta 1" in regime:
        beta = torch.ones_like(beta)
    if "beta 0" in regime:
        beta = torch.zeros_like(beta)
    if "alpha 1" in regime:
        log_alpha = torch.full_like(log_alpha, -1e-9)
    if "alpha 0" in regime:
        log_alpha = torch.full_like(log_alpha, -40.)
    if "alpha mixed" in regime:
        log_alpha = -40. * (rand(B, H, T) > 0).double()
    return [x.to(dtype).requires_grad_() for x in (q, k, v, log_alpha, beta, S)]


REGIMES = ("random", "alpha 1", "alpha 0", "alpha mixed", "beta 0", "one key, beta 1",
           "one key, beta 1, alpha 1", "two keys, beta 1, alpha 1", "two keys, alpha mixed")


# ------------------------------------------------------------------------------------------------
# The rule

def test_the_recurrent_rule_is_equation_3():
    q, k, v, log_alpha, beta, S = rule_inputs(6, "random")
    o, last = sleep.gated_delta_rule(q, k, v, log_alpha, beta, S)
    I = torch.eye(4, dtype=torch.float64)
    for b in range(2):
        for h in range(2):
            M = S[b, h]
            for t in range(6):
                kt, vt, bt = k[b, h, t][:, None], v[b, h, t][:, None], beta[b, h, t]
                M = log_alpha[b, h, t].exp() * M @ (I - bt * kt @ kt.T) + bt * vt @ kt.T
                close(o[b, h, t], M @ q[b, h, t], 1e-12)
            close(last[b, h], M, 1e-12)


def test_the_chunked_rule_is_the_recurrent_rule_with_all_gradients():
    for delta in (True, False):
        for regime in REGIMES:
            for T, chunk in ((1, 64), (4, 64), (5, 64), (6, 64), (23, 64), (24, 64), (25, 64),
                             (75, 64), (24, 7), (17, 16), (33, 5), (6, 1)):
                results = []
                for rule, kw in ((sleep.gated_delta_rule, {}),
                                 (sleep.gated_delta_rule_chunked, dict(chunk=chunk))):
                    inputs = rule_inputs(T, regime)
                    o, S = rule(*inputs, delta=delta, **kw)
                    g = torch.Generator().manual_seed(1)
                    loss = sum((y * torch.randn(y.shape, generator=g, dtype=y.dtype)).sum()
                               for y in (o, S))
                    grads = torch.autograd.grad(loss, inputs)
                    results.append((o, S, *grads))
                for name, slow, fast in zip(("o", "S", "dq", "dk", "dv", "dlog_alpha", "dbeta", "dS"),
                                            *results):
                    scale = slow.norm().clamp(min=1e-6)
                    error = ((fast - slow).norm() / scale).item()
                    assert error <= 1e-9, (name, error, regime, T, chunk, delta)


def test_repeated_keys_cost_no_digits_in_float32():
    for regime in ("one key, beta 1, alpha 1", "two keys, beta 1, alpha 1"):
        for T in (24, 32, 64, 130):
            exact = sleep.gated_delta_rule(*rule_inputs(T, regime))
            fast = sleep.gated_delta_rule_chunked(*rule_inputs(T, regime, dtype=torch.float32))
            for a, b in zip(fast, exact):
                close(a.double(), b, 2e-6)


def test_the_delta_rule_replaces_what_a_key_recalls_and_the_hebbian_rule_adds_to_it():
    k = torch.zeros(1, 1, 2, 3)
    k[..., 0] = 1
    v = torch.tensor([[[[1., 2.], [5., 7.]]]])
    one, zero = torch.ones(1, 1, 2), torch.zeros(1, 1, 2)
    for rule in (sleep.gated_delta_rule, sleep.gated_delta_rule_chunked):
        for delta, expected in ((True, v[0, 0, 1]), (False, v.sum(2)[0, 0])):
            _, S = rule(k, k, v, zero, one, torch.zeros(1, 1, 2, 3), delta=delta)
            close((S @ k[0, 0, 0])[0, 0], expected, 1e-6)


def test_the_four_update_rules_are_two_switches():
    states = {}
    for name, (gated, delta) in sleep.RULES.items():
        mixer = tiny(update_rule=name).blocks[1].mixer
        x = torch.randn(1, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        zero = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
        q, k, v = (F.silu(w(x)).unflatten(-1, (2, 8)).transpose(1, 2)
                   for w in (mixer.q, mixer.k, mixer.v))
        a, b = mixer.ab(x).transpose(1, 2).chunk(2, 1)
        log_alpha = -F.softplus(a + mixer.dt_bias[:, None]) if gated else torch.zeros_like(a)
        _, expected = sleep.gated_delta_rule(q, F.normalize(k, dim=-1), v, log_alpha, b.sigmoid(),
                                             zero, delta=delta)
        states[name] = mixer(x, zero)[1]
        close(states[name], expected, 1e-12)
    for a in states:
        for b in states:
            assert a == b or (states[a] - states[b]).abs().max() > 1e-3, (a, b)


def test_at_birth_something_survives_all_token_steps_of_a_sequence():
    mixer = SleepLM(Config(7, T=100, L=25, N=4, layout="s", d_model=64, n_head=4)).blocks[0].mixer
    alpha = (-mixer.A_log.exp() * F.softplus(mixer.dt_bias)).exp()
    close(alpha ** torch.tensor([400., 400 / 100 ** (1 / 3), 400 / 100 ** (2 / 3), 4.]),
          torch.full((4,), 0.5), 1e-4)
    one, four = tiny(N=1).state_dict(), tiny(N=4).state_dict()
    assert all(torch.equal(one[k], four[k]) for k in one)      # models to compare are born alike


# ------------------------------------------------------------------------------------------------
# The model

def plain_hybrid(model, tokens, visible, window):
    """The vanilla hybrid by other means: layer after layer over the whole sequence, attention as a
    matrix with a mask, positions as complex rotations, the convolution as conv1d on every window.
    """
    T = tokens.shape[1]
    h = model.embed(tokens)
    for block, kind in zip(model.blocks, model.cfg.layout):
        x = block.norm1(h)
        if block.conv is not None:
            taps, d = block.conv.weight.shape
            kernel = block.conv.weight.flip(0).T[:, None]                      # (d, 1, taps)
            x = torch.cat([w + F.conv1d(F.pad(w.mT, (taps - 1, 0)), kernel, groups=d).mT
                           for w in x.split(window, 1)], 1)
        m = block.mixer
        q, k, v = (w(x).unflatten(-1, (m.H, -1)).transpose(1, 2) for w in (m.q, m.k, m.v))
        if kind == "a":
            K = q.shape[-1]
            turn = torch.exp(1j * torch.outer(torch.arange(T).double(),
                                              10000 ** (-torch.arange(0, K, 2).double() / K)))
            q, k = (torch.complex(y[..., :K // 2], y[..., K // 2:]) * turn for y in (q, k))
            scores = (q @ k.mH).real / math.sqrt(K)
            y = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v
        else:
            q, k = (F.normalize(F.silu(y), dim=-1) for y in (q, k))
            a, b = m.ab(x).transpose(1, 2).chunk(2, 1)
            log_alpha = -m.A_log.exp()[:, None] * F.softplus(a + m.dt_bias[:, None])
            S = torch.zeros(len(x), m.H, *[q.shape[-1]] * 2, dtype=x.dtype)
            y, _ = sleep.gated_delta_rule(q, k, F.silu(v), log_alpha, b.sigmoid(), S)
            y = m.norm(y)
        y = y.transpose(1, 2).flatten(2)
        if kind == "s" and m.z is not None:
            y = y * F.silu(m.z(x))
        h = h + m.o(y)
        h = h + block.down(F.relu(block.up(block.norm2(h))) ** 2)
    return model.head(model.norm(h))


def random_tokens(B=3, T=17, seed=0):
    return torch.randint(7, (B, T), generator=torch.Generator().manual_seed(seed))


def targets_for(tokens, M):
    return torch.randint(7, (len(tokens), M), generator=torch.Generator().manual_seed(5))


def test_N_1_is_the_vanilla_hybrid():
    tokens, i = random_tokens(), torch.arange(17)
    visible = (i[:, None] >= i) & (i[:, None] // 5 == i // 5)
    for kw in (dict(), dict(conv="s"), dict(conv="", gate=False), dict(layout="ssa"), dict(taps=4)):
        model = tiny(N=1, **kw)
        expected = plain_hybrid(model, tokens, visible, window=5)
        close(model(tokens, targets_for(tokens, 2))[0], expected[:, -2:], 1e-10)
        close(model(tokens, targets_for(tokens, 17))[0], expected, 1e-10)


def test_sliding_window_with_N_1_is_sliding_window_attention_over_the_whole_sequence():
    tokens, i = random_tokens(), torch.arange(17)
    for L in (3, 5, 16, 17, 18):
        model = tiny(N=1, L=L, eviction="sliding")
        distance = i[:, None] - i
        expected = plain_hybrid(model, tokens, (distance >= 0) & (distance < L), window=17)
        close(model(tokens, targets_for(tokens, 1))[0], expected[:, -1:], 1e-10)
        close(model(tokens, targets_for(tokens, 17))[0], expected, 1e-10)


def test_a_sleep_is_N_passes_that_carry_h_and_S():
    model, tokens = tiny(N=3, L=4), random_tokens(T=4)
    h, (S, cache) = model.embed(tokens), model.empty_memory(3)
    for n in range(3):
        for i, block in enumerate(model.blocks):
            h, S[i], _ = block(h, S[i], cache[i])
    slept = model.sleep(model.embed(tokens), model.empty_memory(3))
    for a, b in zip(slept.S, S):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b, 1e-12)


def test_streaming_token_by_token_is_the_training_forward():
    for eviction in EVICTIONS:
        for N in (1, 3):
            for kw in (dict(), dict(loop="middle"), dict(loop="0:1"), dict(loop="2:4"),
                       dict(layout="ssss"), dict(layout="aaaa"), dict(L=4, conv=""), dict(L=16),
                       dict(L=17), dict(L=18), *([dict(L=1)] if eviction == "hard" else [])):
                model, tokens = tiny(N=N, eviction=eviction, **kw), random_tokens()
                first, state = model.stream(tokens[:, :9])
                rest, _ = model.stream(tokens[:, 9:], state)
                close(torch.cat([first, rest], 1), model.stream(tokens)[0], 1e-12)
                for M in {1, 16 % model.cfg.L + 1}:    # one token, and all of the last window
                    logits, _ = model(tokens, targets_for(tokens, M))
                    close(torch.cat([first, rest], 1)[:, -M:], logits, 1e-10)


def test_generate_is_greedy_and_feeds_its_answers_back():
    model, tokens = tiny(N=2), random_tokens()
    out = model.generate(tokens, 4)
    for i in range(4):
        logits, _ = model.stream(torch.cat([tokens, out[:, :i]], 1))
        assert torch.equal(logits[:, -1].argmax(-1), out[:, i])


def test_the_answer_takes_one_pass_whatever_N():
    for N in (1, 2, 5):
        model, tokens, passes = tiny(N=N), random_tokens(T=12), []
        original = model.one_pass
        model.one_pass = lambda h, *rest: passes.append(h.shape[1]) or original(h, *rest)
        model(tokens, targets_for(tokens, 2))
        assert passes == [5] * 2 * N + [2]             # two windows sleep, two tokens answer
        model.one_pass = lambda h, S, c, i, j: (j > i and passes.append(h.shape[1])) or original(
            h, S, c, i, j)
        passes.clear()
        _, state = model.stream(tokens[:, :10])
        assert passes == ([1] * 5 + [5] * (N - 1)) * 2
        passes.clear()
        model.stream(tokens[:, 10:], state)
        assert passes == [1] * 2


def test_a_window_that_predicts_does_not_sleep():
    model, tokens, passes = tiny(N=3), random_tokens(T=15), []
    original = model.one_pass
    model.one_pass = lambda h, *rest: passes.append(h.shape[1]) or original(h, *rest)
    model(tokens, targets_for(tokens, 6))
    assert passes == [5] * 3 + [5, 5]


def test_only_the_looped_span_is_repeated():
    model, tokens, spans = tiny(N=3, layout="asasasas", loop="middle"), random_tokens(T=6), []
    original = model.one_pass
    model.one_pass = lambda h, S, c, i, j: spans.append((i, j)) or original(h, S, c, i, j)
    model(tokens, targets_for(tokens, 1))
    assert spans == [(0, 6), (2, 6), (2, 8), (0, 8)]
    assert Config(7, 10, 5, layout="a" * 28, loop="middle").span() == (7, 21)      # Section 6.3


def answers_for_two_contexts(model, lesion):
    """Logits of the same answer window after two different first windows."""
    out, answer = [], random_tokens(T=3, seed=9)
    for seed in (1, 2):
        memory = model.sleep(model.embed(random_tokens(T=5, seed=seed)), model.empty_memory(3))
        out.append(model.wake(answer, lesion(memory))[0])
    return out


def test_under_hard_eviction_the_past_reaches_the_answer_through_S_only():
    for N in (1, 3):
        model = tiny(N=N)
        a, b = answers_for_two_contexts(model, lambda m: m)
        assert (a - b).abs().max() > 1e-3
        no_S = lambda m: Memory([None if S is None else 0 * S for S in m.S], m.cache)
        a, b = answers_for_two_contexts(model, no_S)
        assert torch.equal(a, b)


def test_under_sliding_eviction_the_past_reaches_the_answer_without_S_too():
    model = tiny(eviction="sliding")
    a, b = answers_for_two_contexts(
        model, lambda m: Memory([None if S is None else 0 * S for S in m.S], m.cache))
    assert (a - b).abs().max() > 1e-3


def test_a_transformer_whose_cache_is_evicted_can_only_guess():
    a, b = answers_for_two_contexts(tiny(layout="aaaa", N=3), lambda m: m)
    assert torch.equal(a, b)


def test_the_gradient_to_the_first_window_flows_through_S_alone():
    for N in (1, 3):
        for cut in (False, True):
            model = tiny(N=N)
            h = model.embed(random_tokens(T=5)).detach().requires_grad_()
            memory = model.sleep(h, model.empty_memory(3))
            memory = model.sleep(model.embed(random_tokens(T=5, seed=1)).detach(), memory)
            if cut:
                memory = Memory([S if S is None else S.detach() for S in memory.S], memory.cache)
            logits, _ = model.wake(random_tokens(T=2, seed=2), memory)
            (grad,) = torch.autograd.grad(logits.square().sum(), h, allow_unused=True)
            assert (grad is None) if cut else (grad.abs().max() > 1e-6)


def test_a_token_never_sees_the_future():
    for eviction in EVICTIONS:
        model, tokens = tiny(N=1, eviction=eviction), random_tokens()
        before = model(tokens, targets_for(tokens, 17))[0]
        tokens[:, 11] = (tokens[:, 11] + 1) % 7
        after = model(tokens, targets_for(tokens, 17))[0]
        assert torch.equal(before[:, :11], after[:, :11])
        assert (before[:, 11:] - after[:, 11:]).abs().amax((0, 2)).min() > 1e-6


def test_the_loss_is_the_cross_entropy_of_the_targets_that_count():
    model, tokens = tiny(), random_tokens()
    targets = targets_for(tokens, 3)
    targets[0, 0] = targets[1, 2] = -1
    logits, loss = model(tokens, targets)
    log_p = logits.log_softmax(-1)
    picked = [log_p[b, m, targets[b, m]] for b in range(3) for m in range(3) if targets[b, m] >= 0]
    close(loss, -torch.stack(picked).mean(), 1e-6)


def test_memory_is_a_value_and_calls_do_not_change_it():
    model, tokens = tiny(), random_tokens(T=5)
    _, memory = model.wake(tokens[:, :3], model.empty_memory(3))
    copy = [None if S is None else S.clone() for S in memory.S], [[x.clone() for x in c]
                                                                 for c in memory.cache]
    model.wake(tokens[:, 3:], memory)
    model.sleep(model.embed(tokens), memory)
    for a, b in zip(memory.S, copy[0]):
        assert a is None or torch.equal(a, b)
    assert all(torch.equal(a, b) for c, d in zip(memory.cache, copy[1]) for a, b in zip(c, d))


def test_eviction_keeps_nothing_or_L_minus_1_tokens():
    for eviction, kept in (("hard", 0), ("sliding", 4)):
        model = tiny(eviction=eviction)
        memory = model.sleep(model.embed(random_tokens(T=5)), model.empty_memory(3))
        for kind, cache in zip("asas", memory.cache):
            assert cache[0].shape[1] == min(kept, 2)                           # conv tail
            assert all(x.shape[2] == kept for x in cache[1:])
            assert len(cache) == (3 if kind == "a" else 1)


def test_compiled_is_eager():
    torch._dynamo.reset()
    backend = "inductor" if sleep.can_compile("cpu") else "aot_eager"
    model, tokens = tiny(N=3, layout="as").float(), random_tokens(T=5)
    weight = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for compiled in (False, True):
        if compiled:
            model.one_pass = torch.compile(model.one_pass, fullgraph=True, dynamic=False,
                                           backend=backend)
        model.zero_grad()
        memory = model.empty_memory(3)
        memory.S[1] += weight
        memory.S[1].requires_grad_()       # as in all windows but the first
        S = model.sleep(model.embed(tokens), memory).S[1]
        (S * weight).sum().backward()
        results.append([S.detach(), memory.S[1].grad] + [p.grad.clone() for p in model.parameters()
                                                         if p.grad is not None])
    assert len(results[0]) == len(results[1]) > 20
    for eager, compiled in zip(*results):
        close(compiled, eager, 1e-5)


def test_neither_N_nor_the_number_of_windows_enters_the_graph():
    for eviction, bf16, most in (("hard", False, 3), ("hard", True, 3), ("sliding", False, 4)):
        counts = []
        for N, T in ((2, 12), (4, 22)):
            torch._dynamo.reset()
            counter = CompileCounter()
            model, tokens = tiny(N=N, layout="as", eviction=eviction), random_tokens(T=T)
            if bf16:
                model.float().bf16 = True
            expected = model(tokens, targets_for(tokens, 2))[0]
            model.one_pass = torch.compile(model.one_pass, fullgraph=True, dynamic=False,
                                           backend=counter)
            logits, loss = model(tokens, targets_for(tokens, 2))
            loss.backward()
            close(logits, expected, 2e-2 if bf16 else 1e-10)
            counts.append(counter.frame_count)
        assert counts[0] == counts[1] <= most, (eviction, counts)


def test_bfloat16_is_for_the_matrix_products_and_the_rule_stays_float32():
    model, tokens = tiny().float(), random_tokens(T=5)
    exact = model(tokens, targets_for(tokens, 2))[0]
    model.bf16, rule, seen = True, sleep.gated_delta_rule_chunked, set()
    try:
        sleep.gated_delta_rule_chunked = lambda *args: (
            seen.update(x.dtype for x in args[:6]) or rule(*args))
        logits, loss = model(tokens, targets_for(tokens, 2))
    finally:
        sleep.gated_delta_rule_chunked = rule
    assert seen == {torch.float32} == {logits.dtype, loss.dtype}
    assert (logits != exact).any()
    close(logits, exact, 0.03)             # 4 blocks of products with 8 bits of mantissa


def test_the_library_refuses_bad_input_in_one_sentence():
    good = dict(vocab_size=7, T=20, L=5)
    for words, kw in (("N must be", dict(N=0)), ("L must be", dict(L=0)), ("L must be", dict(L=2.5)),
                      ("layout 'axs'", dict(layout="axs")), ("layout ''", dict(layout="")),
                      ("multiple of 2 * n_head", dict(d_model=30, n_head=4)),
                      ("eviction 'soft'", dict(eviction="soft")), ("loop '3:2'", dict(loop="3:2")),
                      ("loop 'some'", dict(loop="some")), ("update_rule 'x'", dict(update_rule="x")),
                      ("conv 'q'", dict(conv="q")), ("take L >= 3", dict(L=2, eviction="sliding"))):
        refused(words, Config, **{**good, **kw})
    model, tokens = tiny(), random_tokens()
    refused("the vocabulary has 0 to 6", model, tokens + 1, targets_for(tokens, 1))
    refused("M from 1 to T", model, tokens, targets_for(tokens, 18))
    refused("targets (3,)", model, tokens, targets_for(tokens, 1)[:, 0])
    refused("targets (2, 1)", model, tokens, targets_for(tokens[:2], 1))
    refused("must be integers", model.stream, tokens.double())
    refused("must be integers", model.stream, tokens[0])
    refused("at least 1", model, tokens[:, :0], targets_for(tokens, 1))
    refused("at least 1 token", model.generate, tokens, 0)
    refused("6 tokens do not fit", model.wake, tokens[:, :6], model.empty_memory(3))
    _, memory = model.wake(tokens[:, :3], model.empty_memory(3))
    refused("after the 3 in the cache", model.wake, tokens[:, 3:6], memory)
    refused("belongs to a batch of 2", model.wake, tokens, model.empty_memory(2))
    refused("belongs to a batch of 2", model.stream, tokens, model.stream(tokens[:2])[1])


# ------------------------------------------------------------------------------------------------
# Rule 110

def tapes(flags="", seed=0):
    _, args = sleep.parse("", train_ca.PRESETS, train_ca.add_flags,
                          shlex.split(f"--preset cpu --device cpu {flags}"))
    return train_ca.Tapes(args, seed)


def test_rule_110_is_its_published_truth_table_and_a_brute_force():
    published = {"111": 0, "110": 1, "101": 1, "100": 0, "011": 1, "010": 1, "001": 1, "000": 0}
    for pattern, new in published.items():
        cells = torch.tensor([int(x) for x in pattern])
        assert train_ca.evolve(cells, 110, 1)[1] == new
    for rule in (30, 90, 110, 184):
        cells = torch.randint(2, (5, 13), generator=torch.Generator().manual_seed(rule))
        expected = cells.tolist()
        for _ in range(7):
            expected = [[(rule >> (4 * row[i - 1] + 2 * row[i] + row[(i + 1) % 13])) & 1
                         for i in range(13)] for row in expected]
        assert train_ca.evolve(cells, rule, 7).tolist() == expected


def test_rule_90_needs_no_depth():
    cells = torch.randint(2, (200, 24), generator=torch.Generator().manual_seed(0))
    for t in (2, 4, 8, 16, 32):                        # the first cell is the XOR of two cells
        label = train_ca.evolve(cells, 90, t)[:, 0]
        assert torch.equal(label, cells[:, -t % 24] ^ cells[:, t % 24])


def test_the_constant_guess_at_t_32_is_0_563_to_the_4th():
    cells = torch.randint(2, (100_000, 24), generator=torch.Generator().manual_seed(0))
    p = train_ca.evolve(cells, 110, 32)[:, 0].double().mean().item()
    assert abs(p - 0.563) < 0.005
    chance = tapes("--t 32 --W 24 --L 24 --tapes 4").chance
    assert abs(chance["exact"] - 0.563 ** 4) < 0.025 and abs(chance["bit"] - 0.563) < 0.02


def test_a_sequence_of_tapes_is_laid_out_as_documented():
    task = tapes("--W 24 --L 24 --tapes 4 --t 3")
    tokens, labels = task.make_batch(0)
    assert tokens.shape == (256, 100) and labels.shape == (256, 4) and task.T == 100
    assert (tokens[:, 96] == 2).all() and (tokens[:, :96] < 2).all()
    assert torch.equal(tokens[:, 97:], labels[:, :-1])
    for i in range(4):                                 # the label of tape i comes from window i
        expected = train_ca.evolve(tokens[:, 24 * i: 24 * i + 24], 110, 3)[:, 0]
        assert torch.equal(labels[:, i], expected)
    assert 0.47 < tokens[:, :96].double().mean() < 0.53


def test_no_pattern_of_cells_that_decides_a_test_label_is_ever_trained_on():
    for flags, reach in (("--t 6", 6), ("--t 0", 3), ("--t 32 --W 24 --L 24", None)):
        task = tapes(flags)
        def patterns(step):
            cells = task.make_batch(step)[0][:, :task.W * 2].unflatten(1, (2, task.W)).flatten(0, 1)
            if reach:
                cells = torch.cat([cells[:, -reach:], cells[:, :reach + 1]], 1)
            return set(map(tuple, cells.tolist()))
        test = patterns(-1)
        assert len(test) > 10
        for step in range(30):
            assert not test & patterns(step), (flags, step)


def test_every_N_sees_the_same_data_and_every_seed_other_data():
    make_batch, seen = train_ca.Tapes.make_batch, {}

    def spy(self, step):
        batch = make_batch(self, step)
        seen.setdefault(self.seed, []).append((step, batch[0]))
        return batch

    train_ca.Tapes.make_batch = spy
    try:
        with tempfile.TemporaryDirectory() as out:
            assert script(train_ca, f"{SMALL} --N 1 3 --seed 0 1 --out {out}")[0] == 0
    finally:
        train_ca.Tapes.make_batch = make_batch
    for (test, *batches), other in ((seen[0], seen[1]), (seen[1], seen[0])):
        half = len(batches) // 2
        assert half == 10 and test[0] == -1 and torch.equal(test[1], other[0][1])
        for (i, x), (j, y), (k, z) in zip(batches[:half], batches[half:], other[1:]):
            assert i == j == k and torch.equal(x, y) and not torch.equal(x, z)
    assert not torch.equal(seen[0][1][1], seen[0][2][1])


def test_the_paper_preset_is_section_6_1():
    p = train_ca.PRESETS["paper"]
    assert (p["W"], p["tapes"], p["L"], p["layout"], p["d_model"]) == (24, 4, 24, "asas", 256)
    assert (p["batch_size"], p["lr_muon"], p["lr_adamw"], p["t"]) == (512, 2e-3, 5e-5, 32)
    assert 4e9 <= p["steps"] * 512 * 100 <= 5e9 and p["conv"] == "s"


# ------------------------------------------------------------------------------------------------
# k-hop retrieval

def cycles(flags="", preset="paper", seed=0):
    _, args = sleep.parse("", train_khop.PRESETS, train_khop.add_flags,
                          shlex.split(f"--preset {preset} --device cpu {flags}"))
    return train_khop.Cycles(args, seed)


def read_edges(task, row):
    """The edges that a row of tokens spells, by reading alone -> {source: target}, in order."""
    size = 4 if task.words else 2
    body = row[task.pad + task.prefix: task.context].tolist()
    live = body[next(i for i, x in enumerate(body) if x):]
    assert len(live) % size == 0 and 0 not in live
    edges = {}
    for i in range(0, len(live), size):
        edge = live[i: i + size]
        if task.words:
            assert edge[1] == train_khop.ARROW and edge[3] == train_khop.COMMA
        source, target = edge[0] - task.node, edge[size // 2] - task.node
        assert 0 <= source < task.nodes and 0 <= target < task.nodes and source not in edges
        edges[source] = target
    return edges


def test_edges_spell_one_cycle_and_a_walker_finds_every_answer():
    for L, flags in ((75, "--n_law mix"), (75, "--n_law law"), (30, "--n_law all --no-words"),
                     (75, "--question_first"), (24, "--nodes 12 --K 16 --queries 3 --n_law law")):
        task = cycles(f"--batch_size 40 --L {L} {flags}")
        assert task.context % L == 0                           # whole windows before the answers
        for step in (-1, 0, 1):
            tokens, targets = task.make_batch(step)
            assert tokens.shape[1] == task.T and tokens.max() < task.vocab_size
            hops = task.hops(tokens)
            for row, wanted, ks in zip(tokens, targets, hops.tolist()):
                edges = read_edges(task, row)
                n, node, orbit = len(edges), next(iter(edges)), 0
                while orbit == 0 or node != next(iter(edges)):
                    node, orbit = edges[node], orbit + 1
                assert orbit == n and set(edges) == set(edges.values())
                asks = row[task.context:].unflatten(0, (task.M, -1)).tolist()
                wanted = wanted.unflatten(0, (task.M, -1)).tolist()
                starts = []
                for ask, want, k in zip(asks, wanted, ks):
                    if want[-2] < 0:
                        assert not any(ask) and set(want) == {-1}
                        continue
                    q = node = ask[-3 if task.words else -2] - task.node
                    for _ in range(k):
                        node = edges[node]
                    assert ask[-1] == want[-2] == node + task.node      # said one token before it
                    assert sum(x >= 0 for x in want) == 1
                    starts.append(q)
                assert len(set(starts)) == len(starts) == min(n, task.M)


def test_the_geometry_of_depo_is_section_6_2():
    task = cycles()
    assert (task.T, task.context, task.pad, task.vocab_size) == (360, 300, 0, 97)
    tokens, targets = task.make_batch(0)
    assert tokens.shape == (128, 360) and targets.shape == (128, 60)
    n = torch.tensor([len(read_edges(task, row)) for row in tokens])
    position = torch.arange(300)
    assert torch.equal(tokens[:, :300] == 0, position < 300 - 4 * n[:, None])   # left padding
    assert ((targets >= 0).sum(1) == n.clamp(max=10)).all()
    asked = targets >= 0
    assert not asked[:, torch.arange(60) % 6 != 4].any()       # predicted at 304 + 6 j
    straddling = [e for e in range(75) if (4 * e) // 75 != (4 * e + 3) // 75]
    assert straddling == [18, 37, 56]                          # edges that an eviction cuts in two
    p = train_khop.PRESETS["paper"]
    assert (len(p["layout"]), p["d_model"], p["L"], p["batch_size"], p["steps"]) == (
        10, 512, 75, 128, 100_000) and p["conv"] == "s"


def test_hops_and_cycle_sizes_follow_their_stated_laws():
    task = cycles("--n_law law --batch_size 4000")
    tokens, targets = task.make_batch(0)
    k = task.hops(tokens)[targets.unflatten(1, (10, 6))[..., 4] >= 0]
    count = torch.bincount(k, minlength=17)[1:].double()
    expected = len(k) / 16
    assert ((count - expected) ** 2 / expected).sum() < 39.3   # chi-square, 15 degrees, p = 0.0006
    n = (tokens[:, :300] > 0).sum(1) // 4
    sizes = torch.arange(3, 76).double()
    law = 1 / (sizes + 75 ** 0.5)
    assert n.min() == 3 and abs(n.double().mean() - (law * sizes).sum() / law.sum()) < 1.0
    mixed = (cycles("--n_law mix --batch_size 4000").make_batch(0)[0][:, 0] > 0).double().mean()
    assert 0.46 < mixed < 0.55
    tokens, _ = task.test
    share = torch.bincount(task.hops(tokens).flatten(), minlength=17) / tokens.shape[0] / 10
    for k in range(17):
        assert (0.18 < share[k] < 0.22) if k in (1, 2, 4, 8, 16) else share[k] == 0


def test_the_order_of_the_edges_tells_nothing():
    task, distances, others = cycles("--n_law all --batch_size 1500"), [], []
    for row in task.make_batch(0)[0]:
        edges = read_edges(task, row)
        rank = {source: i for i, source in enumerate(edges)}
        distances += [abs(rank[a] - rank[b]) for a, b in edges.items()]
    expected = (75 + 1) / 3                                    # mean distance of two random places
    assert abs(sum(distances) / len(distances) / expected - 1) < 0.02


def test_the_k_hop_loss_is_that_of_the_answers_alone():
    task = cycles("--batch_size 64 --n_law all")
    tokens, targets = task.make_batch(0)
    perfect = torch.full((64, 60, 97), -50.0)
    following = torch.cat([tokens[:, 301:], tokens[:, :1]], 1)
    perfect.scatter_(2, following[..., None], 50.0)            # certain of the next token
    cheater = task.score(tokens, targets, perfect)
    assert set(cheater["accuracy"].values()) == {1.0} and max(cheater["loss"].values()) < 1e-6
    blind = torch.full((64, 60, 97), -1e9)
    blind[..., 22:] = 0.0                                      # every node alike
    for value in task.score(tokens, targets, blind)["loss"].values():
        assert abs(value - math.log(75)) < 1e-5
    shifted = task.score(tokens, targets, perfect.roll(1, 1))  # one token off
    assert max(shifted["accuracy"].values()) < 0.1
    assert abs(task.chance["loss"]["1"] - math.log(75)) < 1e-9


def test_the_k_hop_report_averages_over_the_questions_of_each_k():
    task = cycles("--batch_size 16 --n_law law")
    tokens, targets = task.make_batch(0)
    logits = torch.randn(16, 60, 97, generator=torch.Generator().manual_seed(0))
    metrics, hops, by_hand = task.score(tokens, targets, logits), task.hops(tokens), {}
    for b in range(16):
        for j in range(10):
            a = targets[b, 6 * j + 4]
            if a >= 0:
                log_p = logits[b, 6 * j + 4].log_softmax(-1)
                by_hand.setdefault(str(hops[b, j].item()), []).append(
                    (-log_p[a].item(), float(log_p.argmax() == a)))
    assert set(metrics["loss"]) == set(by_hand)
    for k, rows in by_hand.items():
        assert abs(metrics["loss"][k] - sum(r[0] for r in rows) / len(rows)) < 1e-4
        assert abs(metrics["accuracy"][k] - sum(r[1] for r in rows) / len(rows)) < 1e-6


def test_earlier_answers_do_not_give_later_ones_away():
    task, leaks, asked = cycles("--batch_size 1000 --n_law all"), 0, 0
    tokens, targets = task.make_batch(0)
    q = tokens[:, 300:].unflatten(1, (10, 6))[..., 3].tolist()
    answers = targets.unflatten(1, (10, 6))[..., 4].tolist()
    for ks, qs, wanted in zip(task.hops(tokens).tolist(), q, answers):
        place = {}                                             # node -> (group, place in the group)
        for k, start, a in zip(ks, qs, wanted):
            asked += 1
            known = place.get(start)
            leaks += known is not None and any(
                node == a for node, (group, at) in place.items()
                if group == known[0] and (at - known[1] - k) % 75 == 0)
            g, at = place.setdefault(start, (start, 0))
            if a not in place:
                place[a] = (g, at + k)
            elif place[a][0] != g:                             # two groups become one
                old, shift = place[a][0], at + k - place[a][1]
                place = {x: (g, y + shift) if o == old else (o, y) for x, (o, y) in place.items()}
    assert asked == 10_000 and leaks < 0.001 * asked


def test_no_cycle_of_the_test_is_ever_trained_on():
    task = cycles("--nodes 7 --L 7 --K 4 --queries 2 --no-words --n_law all", preset="cpu")
    seen = lambda step: {frozenset(read_edges(task, row).items()) for row in task.make_batch(step)[0]}
    test = seen(-1)
    assert len(test) > 30                                      # of 6! = 720 cycles
    trained = set().union(*(seen(step) for step in range(30)))
    assert len(trained) > 500 and not trained & test
    a, b = cycles(), cycles(seed=1)
    assert torch.equal(a.make_batch(3)[0], cycles("--N 2").make_batch(3)[0])
    assert not torch.equal(a.make_batch(3)[0], b.make_batch(3)[0])
    assert torch.equal(a.test[0], b.test[0])


# ------------------------------------------------------------------------------------------------
# Training

SMALL = ("--device cpu --W 8 --L 8 --t 2 --d_model 16 --n_head 2 --batch_size 8 --steps 8 "
         "--eval_every 4 --cooldown 0.5 ")


def weights(folder, name="N1-seed0.pt"):
    return torch.load(Path(folder) / name, weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = tiny()
    muon, adamw = sleep.make_optimizers(model, 0.1, 0.2)
    names = {id(p): n for n, p in model.named_parameters()}
    matrices = {names[id(p)] for p in muon.param_groups[0]["params"]}
    rest = {names[id(p)] for p in adamw.param_groups[0]["params"]}
    assert not matrices & rest and matrices | rest == set(names.values())
    assert "blocks.1.mixer.q.weight" in matrices and "blocks.0.up.weight" in matrices
    assert {"embed.weight", "head.weight", "blocks.0.conv.weight", "blocks.1.mixer.dt_bias"} <= rest


def test_both_optimizers_step_with_their_own_rate_that_cools_down():
    rates, make_optimizers = ([], []), sleep.make_optimizers

    def spy(model, *args):
        optimizers = make_optimizers(model, *args)
        for i, optimizer in enumerate(optimizers):
            def step(i=i, optimizer=optimizer, original=optimizer.step):
                before = [p.clone() for p in optimizer.param_groups[0]["params"]]
                original()
                moved = [not torch.equal(a, b) for a, b in zip(before,
                                                               optimizer.param_groups[0]["params"])]
                rates[i].append((optimizer.param_groups[0]["lr"], any(moved)))
            optimizer.step = step
        return optimizers

    sleep.make_optimizers = spy
    try:
        with tempfile.TemporaryDirectory() as out:
            assert script(train_ca, f"{SMALL} --N 1 --lr_muon 0.02 --lr_adamw 0.004 --out {out}")[0] == 0
    finally:
        sleep.make_optimizers = make_optimizers
    falling = [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]                 # --steps 8 --cooldown 0.5
    for rate, steps in zip((0.02, 0.004), rates):
        close(torch.tensor([r for r, _ in steps]), rate * torch.tensor(falling), 1e-6)
        assert all(moved for _, moved in steps[1:])            # the head starts at 0: no gradient yet


def test_evaluation_with_another_N_leaves_the_model_as_it_was():
    task = tapes("--W 8 --L 8 --t 2")
    torch.manual_seed(0)
    model = SleepLM(Config(3, task.T, 8, 1, "as", 16, 2))
    torch.nn.init.normal_(model.head.weight)
    passes, original = [], model.one_pass
    model.one_pass = lambda *args: passes.append(1) or original(*args)
    for N, expected in ((None, 3), (3, 7), (None, 3)):
        passes.clear()
        sleep.evaluate(model, task, *(x[:9] for x in task.test), N)
        assert len(passes) == expected and model.cfg.N == 1


def test_a_script_writes_the_results_that_it_promises():
    with tempfile.TemporaryDirectory() as out:
        status, text, err = script(train_ca, f"{SMALL} --N 1 2 --seed 0 1 --out {out}")
        assert status == 0, err
        runs = json.loads((Path(out) / "results.json").read_text())["runs"]
        assert [(r["N"], r["seed"]) for r in runs] == [(1, 0), (2, 0), (1, 1), (2, 1)]
        for r in runs:
            assert r["task"] == "ca" and r["steps"] == 8 and r["tokens"] == 8 * 8 * 18
            assert 0 <= r["exact"] <= r["bit"] <= 1 and r["seconds"] > 0
            assert set(r["chance"]) == {"exact", "bit"} and r["settings"]["N"] == r["N"]
            assert [p["step"] for p in r["curve"]] == [4, 8] and r["torch"] == torch.__version__
            assert r["curve"][-1]["exact"] == r["exact"]
        assert (Path(out) / "plot.png").read_bytes()[:4] == b"\x89PNG"
        assert "constant guess" in text and "parameters" in text and "is wrong in" in text
        assert "| 2 | 1 | 8 |" in text
        (Path(out) / "plot.png").unlink()
        assert script(train_ca, f"--plot_only --out {out}")[0] == 0
        assert (Path(out) / "plot.png").exists()
        assert not list(Path(out).glob("*.tmp"))


def test_a_resumed_run_is_a_straight_run():
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        assert script(train_ca, f"{SMALL} --N 1 --out {a}")[0] == 0
        make_batch, calls = train_ca.Tapes.make_batch, []

        def ctrl_c(self, step):
            calls.append(step)
            if step == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return make_batch(self, step)

        train_ca.Tapes.make_batch = ctrl_c
        try:
            status, _, err = script(train_ca, f"{SMALL} --N 1 --out {b}")
            assert status == 1 and "stopped after step 6 of 8" in err and "--resume" in err, err
            assert weights(b)["run"]["steps"] == 6
            assert json.loads((Path(b) / "results.json").read_text())["runs"][0]["steps"] == 6
            status, _, err = script(train_ca, f"{SMALL} --N 1 --out {b} --resume")
        finally:
            train_ca.Tapes.make_batch = make_batch
        assert status == 0, err
        x, y = weights(a), weights(b)
        assert same(x["model"], y["model"])
        strip = lambda run: [{k: v for k, v in p.items() if k != "seconds"} for p in run["curve"]]
        assert strip(x["run"]) == strip(y["run"])
        assert calls == [-1, 0, 1, 2, 3, 4, 4, 5, -1, 6, 7, 8]


def test_resume_refuses_other_settings_and_broken_files():
    with tempfile.TemporaryDirectory() as out:
        assert script(train_ca, f"{SMALL} --N 1 --out {out}")[0] == 0
        status, _, err = script(train_ca, f"{SMALL} --N 1 --out {out}")
        assert status == 2 and "is not empty" in err
        for N in (1, 2):
            status, _, err = script(train_ca, f"{SMALL} --N {N} --out {out} --resume --t 3")
            assert status == 2 and "t was 2, is 3" in err
        status, _, err = script(train_khop, f"--device cpu --steps 1 --out {out} --resume")
        assert status == 2 and "other settings" in err
        before = weights(out)
        status, _, err = script(train_ca, f"{SMALL} --N 1 --out {out} --resume")
        assert status == 0 and same(before["model"], weights(out)["model"])
        (Path(out) / "N1-seed0.pt").write_bytes(b"PK broken")
        status, _, err = script(train_ca, f"{SMALL} --N 1 --out {out} --resume")
        assert status == 2 and "not a checkpoint" in err and err.count("\n") == 1
        (Path(out) / "results.json").write_text("{")
        status, _, err = script(train_ca, f"--out {out} --plot_only")
        assert status == 2 and "cannot be read as results" in err
        (Path(out) / "results.json").write_text('{"runs": []}')
        status, _, err = script(train_ca, f"--out {out} --plot_only")
        assert status == 2 and "no run to plot" in err


def test_a_finished_model_is_tested_with_other_N_without_training_again():
    with tempfile.TemporaryDirectory() as out:
        assert script(train_ca, f"{SMALL} --N 1 --out {out}")[0] == 0
        before = weights(out)["model"]
        status, text, err = script(train_ca, f"{SMALL} --N 1 --out {out} --resume --N_test 1 4")
        assert status == 0 and "tested with N = 4" in text, err
        (run,) = json.loads((Path(out) / "results.json").read_text())["runs"]
        assert run["N_test"]["1"]["exact"] == run["exact"] and set(run["N_test"]) == {"1", "4"}
        assert same(before, weights(out)["model"])
        assert script(train_ca, f"{SMALL} --N 1 2 --out {out} --resume")[0] == 0
        runs = json.loads((Path(out) / "results.json").read_text())["runs"]
        assert [set(r["N_test"]) for r in runs] == [{"1", "4"}, set()]     # nothing finished is lost


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint():
    with tempfile.TemporaryDirectory() as out:
        make_optimizers = sleep.make_optimizers

        def explode_later(model, *rates):
            optimizers = make_optimizers(model, *rates)
            step = optimizers[1].step
            count = []
            def bad_step():
                count.append(1)
                step()
                if len(count) == 6:
                    model.head.weight.data[0] = torch.nan
            optimizers[1].step = bad_step
            return optimizers

        sleep.make_optimizers = explode_later
        try:
            status, _, err = script(train_ca, f"{SMALL} --N 1 --out {out}")
        finally:
            sleep.make_optimizers = make_optimizers
        assert status == 1 and "not finite" in err and "keeps step 4" in err, err
        saved = weights(out)
        assert saved["run"]["steps"] == 4
        assert all(x.isfinite().all() for x in saved["model"].values())


def test_a_script_refuses_bad_input_in_one_line_with_status_2():
    for words, flags in (
            ("N must be", "--N 0"), ("L 0 must divide", "--L 0"), ("must divide", "--L 9"),
            ("layout 'abc'", "--layout abc"), ("multiple of", "--d_model 62 --n_head 4"),
            ("invalid choice", "--preset laptop"), ("--rule 256", "--rule 256"),
            ("8 to 60 cells", "--W 4 --L 4"), ("--steps must be", "--steps 0"),
            ("--lr_muon must be", "--lr_muon -1"), ("--lr_adamw must be", "--lr_adamw nan"),
            ("invalid int", "--t three"), ("unrecognized", "--bogus"), ("unrecognized", "--step 3"),
            ("device 'tpu'", "--device tpu"), ("no out", "--resume --preset paper"),
            ("not a folder", f"--out {__file__}"), ("cannot be made", f"--out {__file__}/x"), ("update_rule", "--update_rule oja"),
            ("--N_test must be", "--N_test 0"), ("--cooldown from", "--cooldown 2"),
            ("--seed must be", "--seed 0 99999999999"), ("--seed must be", "--seed -1"),
            *([] if torch.cuda.is_available() else [("no cuda device here", "--device cuda")])):
        status, _, err = script(train_ca, f"--device cpu {flags}")
        assert status == 2 and words in err and err.count("\n") == 1, (flags, status, err)
    for words, flags in (
            ("K of 1 or more", "--K 0"), ("between 1 and the 12 nodes", "--queries 13"),
            ("take 7 nodes or more", "--nodes 4"), ("never full", "--L 25"), ("never full", "--L 0"),
            ("cut a question", "--L 10"), ("invalid choice", "--n_law some")):
        status, _, err = script(train_khop, f"--device cpu {flags}")
        assert status == 2 and words in err and err.count("\n") == 1, (flags, status, err)


# ------------------------------------------------------------------------------------------------
# README and the rest

def readme_commands():
    """Every `python ...` in a code block or table of the README."""
    text = (HERE / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)) + "\n" + "\n".join(
        re.findall(r"`(python [^`]*)`", text))
    return [line.split("#")[0].strip() for line in blocks.splitlines() if line.startswith("python ")]


def test_every_command_of_the_readme_parses_and_the_short_ones_run():
    commands, ran = readme_commands(), 0
    assert "python train_ca.py" in commands and "python train_khop.py" in commands
    for command in commands:
        _, file, *flags = shlex.split(command)
        if file in ("test_sleep.py", "recall.py") or "--help" in flags:
            continue
        module = {"train_ca.py": train_ca, "train_khop.py": train_khop}[file]
        p, args = sleep.parse("", module.PRESETS, module.add_flags, flags)
        task = getattr(module, TASKS[module.__name__])(args, 0)
        Config(task.vocab_size, task.T, args.L, args.N[0], args.layout, args.d_model, args.n_head)
        if args.steps <= 20:
            with tempfile.TemporaryDirectory() as out:
                done = subprocess.run([sys.executable, HERE / file, *flags], cwd=out,
                                      capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                ran += 1
    assert ran >= 1


def test_the_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(import.*?)```", (HERE / "README.md").read_text(), re.S)
    assert len(blocks) == 2
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(blocks[0], {})
    assert re.findall(r"\[.*?\]", out.getvalue()) == re.findall(r"\[\d.*?\]", blocks[0].split(
        "print", 1)[1].replace("memory.S[1]", "").replace("memory.cache[0][1]", ""))
    space = {"__name__": "recall"}
    exec(blocks[1], space)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(out):
        sleep.main("", space["PRESETS"], lambda f: f.add_argument("--windows", type=int),
                   space["Recall"], f"--device cpu --steps 2 --out {folder}".split())
        assert len(json.loads((Path(folder) / "results.json").read_text())["runs"]) == 2


def test_the_code_in_the_readme_is_the_code():
    block = re.search(r"```python\n(    def sleep\(.*?)```", (HERE / "README.md").read_text(), re.S)
    source = (HERE / "sleep.py").read_text()
    code = re.sub(r'        """.*?"""\n', "", source, flags=re.S)
    assert block and block[1].strip() in code
    diffs = "".join(re.findall(r"```diff\n(.*?)```", (HERE / "README.md").read_text(), re.S))
    removed = re.findall(r"^-(.*)$", diffs, re.M)
    assert len(removed) == 2 and all(line in source for line in removed)       # the worked examples


def test_the_readme_states_every_choice_that_the_code_marks():
    readme = (HERE / "README.md").read_text()
    section = readme.split("## Where the paper is silent")[1].split("\n## ")[0]
    for file, word in (("sleep.py", "half-lives"), ("sleep.py", "weight decay"),
                       ("train_ca.py", "ring"), ("train_khop.py", "law of n")):
        marks = re.findall(r"paper does not say:.*?\.", (HERE / file).read_text(), re.S)
        assert any(word in mark for mark in marks), (file, word)
        assert word in section.lower(), word
    assert sum(f.read_text().count("paper does not say:") for f in HERE.glob("*.py")
               if f.name != "test_sleep.py") == 4


def test_nothing_is_imported_beyond_torch_numpy_tqdm_matplotlib():
    local = {f.stem for f in HERE.glob("*.py")}
    for f in HERE.glob("*.py"):
        for name in re.findall(r"^\s*(?:import|from) (\w+)", f.read_text(), re.M):
            assert name in sys.stdlib_module_names or name in local or name in (
                "torch", "numpy", "tqdm", "matplotlib"), (f.name, name)


def main():
    tests = [(name, f) for name, f in globals().items() if name.startswith("test_")
             and (len(sys.argv) == 1 or any(word in name for word in sys.argv[1:]))]
    failed = 0
    for name, f in tests:
        start = time.time()
        try:
            f()
            print(f"ok    {time.time() - start:5.1f} s  {name[5:].replace('_', ' ')}", flush=True)
        except (Exception, SystemExit):
            failed += 1
            print(f"FAIL  {time.time() - start:5.1f} s  {name[5:].replace('_', ' ')}", flush=True)
            traceback.print_exc()
    print(f"{len(tests) - failed} passed, {failed} failed")
    sys.exit(1 if failed or not tests else 0)


if __name__ == "__main__":
    main()
