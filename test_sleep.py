"""Every claim of sleep.py and its scripts, as a test with the claim as its name.

    python test_sleep.py              all of them
    python test_sleep.py rule wake    those whose names contain one of the words
"""
import contextlib
import io
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

import sleep
import train_ca
import train_gsm
import train_khop
from sleep import Config, Memory, SleepLM

HERE = Path(__file__).parent
TASKS = {"train_ca": "Tapes", "train_khop": "Cycles", "train_gsm": "Problems"}
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


def tiny(build=SleepLM, **kw):
    """A small model in float64 with every weight random, so that nothing is hidden by a zero."""
    cfg = dict(vocab_size=7, T=20, L=5, N=2, layout="asas", d_model=16, n_head=2)
    cfg.update(kw)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        model = build(Config(**cfg))
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
    for kw in (dict(), dict(conv="s"), dict(conv=""), dict(layout="ssa"), dict(taps=4)):
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


def test_a_lesion_empties_S_and_leaves_sliding_attention_alone():
    hard, sliding = tiny(keep_S=False), tiny(keep_S=False, eviction="sliding")
    a, b = answers_for_two_contexts(hard, lambda m: m)
    assert torch.equal(a, b)
    a, b = answers_for_two_contexts(sliding, lambda m: m)
    assert (a - b).abs().max() > 1e-3
    memory = sliding.sleep(sliding.embed(random_tokens(T=5)), sliding.empty_memory(3))
    assert all(S is None or not S.any() for S in memory.S)


def test_recomputed_passes_have_the_same_gradients_and_keep_less():
    for eviction in EVICTIONS:
        results = []
        for wrap in (lambda f: f, lambda f: partial(sleep.recompute, f, use_reentrant=False)):
            model, tokens, kept = tiny(N=3, eviction=eviction), random_tokens(T=42), []
            model.one_pass = wrap(model.one_pass)
            with torch.autograd.graph.saved_tensors_hooks(
                    lambda x: kept.append(x.numel()) or x, lambda x: x):
                _, loss = model(tokens, targets_for(tokens, 2))
            loss.backward()
            results.append((loss, [p.grad for p in model.parameters()], sum(kept)))
        (a, grads_a, kept_a), (b, grads_b, kept_b) = results
        assert torch.equal(a, b) and kept_b < 0.1 * kept_a, (kept_a, kept_b)
        for x, y in zip(grads_a, grads_b):
            close(y, x, 1e-12)


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
    for flags, reach in (("--t 6 --hold_out reach", 6), ("--t 0", 3), ("--t 32 --W 24 --L 24", None)):
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


def test_rule_110_never_looks_at_two_of_the_13_cells_in_reach_and_no_question_of_the_test_is_trained():
    index = torch.arange(1 << 16)
    every = (index[:, None] >> torch.arange(16)) & 1
    label = train_ca.evolve(every, 110, 6)[:, 0]
    matter = [i for i in range(16) if (label[index ^ (1 << i)] != label).any()]
    assert matter == [0, 1, 2, 3, 4, 5, 6, 12, 13, 14, 15]             # cells -4 to 6
    task, easy, bits = tapes(), tapes("--hold_out reach"), sum(1 << i for i in matter)
    assert task.bits == bits and easy.bits is None and tapes("--rule 90").bits is None
    asked = lambda task, step: {number & bits for number in (
        task.make_batch(step)[0][:, :32].unflatten(1, (2, 16)) << torch.arange(16)).sum(-1).flatten().tolist()}
    trained = lambda task: set().union(*(asked(task, step) for step in range(40)))
    test, seen = asked(task, -1), trained(task)
    assert len(test) > 200 and len(seen) > 1700 and not test & seen
    assert len(asked(easy, -1) & trained(easy)) > 0.99 * len(asked(easy, -1))      # new tapes only


def test_a_lookup_of_the_nearest_trained_patterns_is_right_in_64_of_100_bits():
    task, cells = tapes(), [12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6]       # those that matter
    pattern = lambda tape: (tape[..., cells] << torch.arange(11)).sum(-1)
    index, bit = torch.arange(1 << 11), 1 << torch.arange(11)
    every = torch.zeros(1 << 11, 16, dtype=torch.long)
    every[:, cells] = (index[:, None] & bit).ne(0).long()
    label = train_ca.evolve(every, 110, 6)[:, 0]
    trained = ~task.held_out((every << torch.arange(16)).sum(-1))
    near = index[:, None] ^ bit                        # the patterns that differ in one cell
    votes = ((2 * label[near] - 1) * trained[near]).sum(1)
    guess = torch.where(votes == 0, label[trained].mode()[0], votes > 0)
    tokens, labels = task.test
    asked = pattern(tokens[:, :32].unflatten(1, (2, 16)))
    assert not trained[asked].any() and torch.equal(label[asked], labels)
    right = guess[asked] == labels
    share = [round(x.float().mean().item(), 2) for x in (right, right.all(1))]
    assert share == [0.64, 0.41], share                # the README says so


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
    assert seen[0].pop(1)[0] == 0                      # a look whether there are data
    for (test, *batches), other in ((seen[0], seen[1]), (seen[1], seen[0])):
        half = len(batches) // 2
        assert half == 11 and test[0] == -1 and torch.equal(test[1], other[0][1])
        for (i, x), (j, y), (k, z) in zip(batches[:half], batches[half:], other[1:]):
            assert i == j == k and torch.equal(x, y) and not torch.equal(x, z)
    assert not torch.equal(seen[0][1][1], seen[0][2][1])


def test_the_paper_preset_is_section_6_1():
    p = train_ca.PRESETS["paper"]
    assert (p["W"], p["tapes"], p["L"], p["layout"], p["d_model"]) == (24, 4, 24, "asas", 256)
    assert (p["batch_size"], p["lr_muon"], p["lr_adamw"], p["t"]) == (512, 2e-3, 5e-5, 32)
    assert 4e9 <= p["steps"] * 512 * 100 <= 5e9 and p["conv"] == "s"


def test_an_experiment_that_changes_nothing_is_algorithm_1():
    tokens, targets = random_tokens(T=13), targets_for(random_tokens(), 3)
    results = {}
    for change in (dict(), dict(carry="h"), dict(carry="S"), dict(think=2), dict(detach=1)):
        change = dict(carry="hS", think=1, detach=0) | change
        experiment = tiny(partial(train_ca.Experiment, **change), N=3)
        logits, loss = experiment(tokens, targets)
        loss.backward()
        results[str(change)] = logits.detach(), experiment.blocks[0].mixer.q.weight.grad
    same, *others = results.values()
    model = tiny(N=3)
    logits, loss = model(tokens, targets)
    loss.backward()
    close(same[0], logits, 1e-12)
    close(same[1], model.blocks[0].mixer.q.weight.grad, 1e-10)
    *others, detached = others
    assert all((x - logits).abs().max() > 1e-3 for x, _ in others)
    close(detached[0], logits, 1e-12)                  # the same numbers, other gradients
    assert (detached[1] - same[1]).norm() > 1e-3 * same[1].norm()


def test_carrying_S_without_h_is_a_replay_of_fixed_keys_and_values():
    model = tiny(partial(train_ca.Experiment, carry="S", think=1, detach=0), layout="as", N=3)
    tokens = random_tokens(T=5)
    calls, rule = [], sleep.gated_delta_rule_chunked
    try:
        sleep.gated_delta_rule_chunked = lambda *args: calls.append(args) or rule(*args)
        slept = model.sleep(model.embed(tokens), model.empty_memory(3))
    finally:
        sleep.gated_delta_rule_chunked = rule
    S = torch.zeros_like(calls[0][5])
    for _ in range(3):
        _, S = sleep.gated_delta_rule(*calls[0][:5], S)        # the first pass's k and v, three times
    close(slept.S[1], S, 1e-10)


def test_thinking_longer_in_the_answer_window_does_not_see_the_labels():
    model = tiny(partial(train_ca.Experiment, carry="hS", think=3, detach=0), N=1)
    tokens = random_tokens(T=14)
    before = model(tokens, targets_for(tokens, 4))[0]
    tokens[:, 12] = (tokens[:, 12] + 1) % 7
    after = model(tokens, targets_for(tokens, 4))[0]
    assert torch.equal(before[:, :2], after[:, :2]) and (before[:, 2] - after[:, 2]).abs().max() > 1e-6


def test_every_condition_of_every_experiment_is_a_command_that_parses():
    for conditions in train_ca.EXPERIMENTS.values():
        for flags in conditions:
            task = tapes(flags)
            _, args = sleep.parse("", train_ca.PRESETS, train_ca.add_flags,
                                  shlex.split(f"--preset cpu --device cpu {flags}"))
            sleep.config(task, vars(args) | dict(N=args.N[0]))


def test_the_probe_of_the_film_reads_what_is_linear_and_no_more():
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(2, (3000, 100), generator=g).double()
    x, wide = 2 * bits - 1, torch.randn(100, 150, generator=g, dtype=torch.float64)
    labels = torch.stack([x[:, 3], (x[:, 0] + x[:, 1] + x[:, 2]).sign(), x[:, 0] * x[:, 1]], 1)
    read = train_ca.probe(x[:2000] @ wide, labels[:2000], x[2000:] @ wide, labels[2000:])
    assert read[0] > 0.99 and read[1] > 0.9 and read[2] < 0.15         # a cell, a majority; not XOR
    control = train_ca.probe(x[:2000] @ wide, labels[torch.randperm(2000, generator=g)],
                             x[2000:] @ wide, labels[2000:])
    assert control.max() < 0.15


def test_the_film_and_the_experiments_draw_what_they_promise():
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        assert script(train_ca, f"{SMALL} --N 2 --out run")[0] == 0
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            train_ca.film("run/N2-seed0.pt")
            train_ca.experiment("iterated", shlex.split(SMALL))
        frames = json.loads(Path("run/N2-seed0-film.json").read_text())
        assert list(frames) == [f"{what}{when}" for what in "hS" for when in (
            " before", " after pass 1", " after pass 2", ", shuffled labels")]
        assert min(frames["h before"]["steps"][0]) > 0.95 and frames["S before"]["norm"] == 0
        assert len(frames["S after pass 2"]["steps"]) == 3 and "h before" in printed.getvalue()
        runs = json.loads(Path("out/ca-experiments/iterated.json").read_text())["runs"]
        assert [run["flags"] for run in runs] == train_ca.EXPERIMENTS["iterated"]
        for image in ("run/N2-seed0-film.png", "out/ca-experiments/iterated.png"):
            assert Path(image).read_bytes()[:4] == b"\x89PNG"
        assert script(train_ca, f"{SMALL} --L 4 --N 2 --out other")[0] == 0
        for words, flags in (("no checkpoint of train_ca.py", "--film run/results.json"),
                             ("models with L = W", "--film other/N2-seed0.pt"),
                             ("takes no other flag", "--film run/N2-seed0.pt --steps 3"),
                             ("takes no --N --out", "--experiment iterated --out=x --N 2"),
                             ("takes no --hold_out", "--experiment conv --hold_out matter"),
                             ("invalid choice", "--experiment all")):
            err = io.StringIO()
            with contextlib.redirect_stderr(err):
                try:
                    train_ca.main(flags.split())
                except SystemExit as e:
                    assert e.code == 2
            assert words in err.getvalue() and err.getvalue().count("\n") == 1, err.getvalue()


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
# Word problems

TERSE = "--ops 4 --p 7 --places 8 --animals 3 --no-words --T 48 --L 24"


@cache                                                         # worker processes need none
def problem_folder():
    return tempfile.TemporaryDirectory()


def problems(flags="", preset="gpu", seed=0):
    _, args = sleep.parse("", train_gsm.PRESETS, train_gsm.add_flags, shlex.split(
        f"--preset {preset} --device cpu --data {problem_folder().name} {flags}"))
    return train_gsm.Problems(args, seed)


def read(task, tokens):
    """A row of tokens -> names asked, sentences [name, what is said of it...], phrases; words."""
    text = (task.text(tokens) + " ").replace(" is ", " ").replace(" in ", "-")
    questions, rest = text.split(" ? ")
    body, *phrases = rest.split(" answer ")
    *sentences, end = body.split(" .")
    assert not end.strip()
    return questions.split(), [x.split() for x in sentences], [x.split() for x in phrases]


def is_number(said):
    return len(said) == 1 and said[0].isdigit()


def solve(sentences, asked, p, reach=99):
    """By reading alone: the answer, {needed name: its operations}, the longest chain of reads.

    None if a sentence is missing. What lies more than `reach` reads away counts as 0.
    """
    said, cost = {}, {}
    for name, *rest in sentences:
        said.setdefault(name, []).append(rest)

    @cache
    def form(name, reach):
        """a, b, chain: the name is a x + b, x the unknown number."""
        if reach == 0:
            return 0, 0, 0
        if name.startswith("all-"):
            members = [x for x in said if x.endswith(name[3:]) and x != name]
            rest, cost[name] = " plus ".join(members).split(), len(members)
        else:
            rest = min(said[name], key=is_number)              # its definition, not its told value
            cost[name] = 1 if len(rest) == 1 else 2
        if rest == ["unknown"]:
            return 1, 0, 1
        if rest[1:2] == ["times"]:
            a, b, chain = form(rest[2], reach - 1)
            return int(rest[0]) * a % p, int(rest[0]) * b % p, chain + 1
        a = b = chain = 0
        for word, term in zip(["plus", *rest[1::2]], rest[::2], strict=True):
            x, y, z = (0, int(term), 0) if term.isdigit() else form(term, reach - 1)
            sign = {"plus": 1, "minus": -1}[word]
            a, b, chain = (a + sign * x) % p, (b + sign * y) % p, max(chain, z)
        return a, b, chain + 1

    try:
        if ["unknown"] not in said.get(asked, []):
            a, b, chain = form(asked, reach)
            return (b, cost, chain) if a == 0 and sum(cost.values()) else None
        told, value = next((name, int(x[0])) for name, said_of in said.items() for x in said_of
                           if is_number(x) and (len(said_of) > 1 or name.startswith("all-")))
        a, b, chain = form(told, reach)
        return (value - b) * pow(a, -1, p) % p, cost, chain    # ValueError if a is 0
    except (KeyError, StopIteration, ValueError):
        return None


@cache
def generated(flags, T, M, preset):
    """Problems straight from the generator, as they are read, each with what is said to be true."""
    task, rng = problems(flags, preset), random.Random(0)
    s = SimpleNamespace(**task.settings)

    def endless():
        count = 0
        while True:
            levels = [1 + count % s.ops] if M == 1 else [
                op for _ in range(M) for op in rng.sample(range(1, s.ops + 1), s.ops)][:M]
            problem = train_gsm.make_problem(s, T, levels, rng)
            if problem:
                tokens, answers, ops, _ = problem
                questions, sentences, phrases = read(task, torch.tensor(tokens))
                assert phrases == [[q, str(a)] for q, a in zip(questions, answers, strict=True)]
                yield SimpleNamespace(asked=questions, sentences=sentences, answers=answers,
                                      ops=ops, p=s.p, pad=tokens.count(train_gsm.PAD))
                count += 1
    return [], endless()


def made(n, flags="", T=256, M=1, preset="gpu"):
    """The first n of them. Tests share them, so that none is made twice."""
    known, more = generated(flags, T, M, preset)
    known.extend(islice(more, max(0, n - len(known))))
    return known[:n]


def one_question(n, **kw):
    """Problems of one question with its answer, operations and sense (forward, reverse) at hand."""
    for x in made(n, **kw):
        yield x, x.sentences, x.asked[0], x.answers[0], abs(x.ops[0]), x.ops[0] < 0


def guesses_from_words(x, y, classes):
    """A linear least-squares guess from a count of words, learned on 3 of 4 rows -> right or wrong
    on the others."""
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    cut = len(x) * 3 // 4
    gram = x[:cut].T @ x[:cut] + torch.eye(x.shape[1])
    w = torch.linalg.solve(gram, x[:cut].T @ F.one_hot(y[:cut], classes).double())
    return (x[cut:] @ w).argmax(1) == y[cut:]


def count_words(rows):
    """Lists of words -> a matrix of counts."""
    column = {word: i for i, word in enumerate(sorted({word for row in rows for word in row}))}
    return torch.stack([torch.bincount(torch.tensor([column[word] for word in row]),
                                       minlength=len(column)) for row in rows])


def said_in(sentences):
    return [word for sentence in sentences for word in (*sentence, ".")]


LAYOUTS = (("--ops 3 --questions 7 --T 120 100 --L 50 --problems 64 --tests 90", "gpu"),
           ("--ops 3 --questions 1 --T 120 --L 50 --problems 40 --tests 90", "gpu"),
           ("--problems 300 --tests 200", "cpu"),
           ("--problems 300 --tests 200 --questions 3 --T 48 64 --reverse 0.25", "cpu"))


def test_a_word_problem_is_laid_out_as_documented():
    for flags, preset in LAYOUTS:
        task, seen = problems(f"--batch_size 32 {flags}", preset), set()
        levels = task.args.ops
        name, verb, ask = (r"\w+ in \w+", " is", 5) if task.args.words else (r"\w+-\w+", "", 2)
        said = rf"(\d+|unknown|{name}|\d+ (plus|times) {name}|{name} (plus|minus) {name})"
        for step in (None, *range(8)):
            tokens, targets, ops = task.test if step is None else task.make_batch(step)
            M = 1 if step is None else task.args.questions
            T = tokens.shape[1] - M * (ask + 1) + 1            # tokens before the answers
            seen.add(T)
            assert step is not None or T == max(task.args.T) and len(tokens) == task.args.tests
            assert tokens.max() < task.vocab_size and tokens.shape[1] <= task.T
            assert targets.shape[1] == M * (ask + 1) - 1 and ops.shape == (len(targets), M)
            place = torch.arange(targets.shape[1]) % (ask + 1) == ask - 1
            assert torch.equal(targets >= 0, place.expand_as(targets))
            following, asked = tokens[:, T + 1:], place[:-1]   # said one token before it
            assert torch.equal(following[:, asked], targets[:, :-1][:, asked])
            pad = (tokens > 0).int().argmax(1)                 # less than the longest sentence
            assert pad.max() < (12 if task.args.words else 5)
            assert torch.equal(tokens == 0, torch.arange(tokens.shape[1]) < pad[:, None])
            for row, wanted, op in zip(tokens, targets, ops.tolist()):
                text = task.text(row)
                assert re.fullmatch(
                    rf"({name} ){{{M}}}\? ({name}{verb} {said} \. )+"
                    rf"(answer {name}{verb} \d+ ){{{M - 1}}}answer {name}{verb}", text)
                questions, _, phrases = read(task, row)
                assert questions == [phrase[0] for phrase in phrases] and len(set(questions)) == M
                for i in range(0, M, levels):                  # the operations take turns
                    turn = [abs(o) for o in op[i:i + levels]]
                    assert len(set(turn)) == len(turn) and 1 <= min(turn) <= max(turn) <= levels
                last = " ".join(text.split()[-ask:])
                assert task.show(row, wanted).endswith(f"  {last} {wanted[-1] - 11}")
        assert seen == set(task.args.T)
    for task in (problems(), problems(TERSE), problems(preset="paper")):
        words = [task.text(torch.tensor([i])) for i in range(1, task.vocab_size)]
        assert len(set(words)) == len(words)


def test_a_solver_that_reads_only_the_text_finds_every_answer_and_counts_its_operations():
    for n, kw in (
            (2400, {}), (800, dict(T=400)), (200, dict(M=8)), (200, dict(M=3, flags="--no-words")),
            (2400, dict(flags=TERSE, T=48)), (400, dict(flags=TERSE, T=48, M=8)),
            (16, dict(preset="paper", T=3200)), (400, dict(flags="--p 5")),
            (400, dict(flags="--p 7")), (400, dict(flags="--p 23")),
            (200, dict(flags="--reverse 1", M=2)), (200, dict(flags="--reverse 0 --p 23", M=8))):
        kinds = Counter()
        for x in made(n, **kw):
            assert sum(op < 0 for op in x.ops) <= 1
            for name, answer, op in zip(x.asked, x.answers, x.ops, strict=True):
                found, cost, chain = solve(x.sentences, name, x.p)
                assert found == answer and 0 <= found < x.p
                assert sum(cost.values()) == abs(op) and chain <= abs(op)
                assert (op < 0) == ([name, "unknown"] in x.sentences)
                kinds[op] += 1
        ops = max(kinds)
        reverse = set() if "--reverse 0" in kw.get("flags", "") else set(range(-ops, -1))
        assert n < 100 or set(kinds) >= {*range(2, ops + 1), *reverse} and -1 not in kinds
        assert sum(kinds.values()) == n * kw.get("M", 1)


def test_batches_train_on_the_answers_that_the_solver_finds():
    for flags, preset in LAYOUTS:
        task = problems(f"--batch_size 32 {flags}", preset)
        for batch in (task.test, task.make_batch(0), task.make_batch(1)):
            for row, wanted, ops in zip(*(x.tolist() for x in batch)):
                questions, sentences, _ = read(task, torch.tensor(row))
                solved = [solve(sentences, name, task.args.p) for name in questions]
                assert [task.text(torch.tensor([t])) for t in wanted if t >= 0] == [
                    str(answer) for answer, *_ in solved]
                assert [sum(cost.values()) for _, cost, _ in solved] == [abs(o) for o in ops]
        of_each = task.args.tests // task.args.ops
        assert Counter(task.test[2].abs().flatten().tolist()) == {
            op: of_each for op in range(1, task.args.ops + 1)}


def test_without_a_needed_sentence_there_is_no_answer_and_every_number_in_it_counts():
    for n, kw in ((800, {}), (400, dict(flags=TERSE, T=48))):
        counted = Counter()
        for x, sentences, asked, answer, op, reverse in one_question(n, **kw):
            _, cost, _ = solve(sentences, asked, x.p)
            sums = {name[3:] for name in cost if name.startswith("all-")}
            for i, (name, *said) in enumerate(sentences):
                if name not in cost:
                    continue
                less = solve(sentences[:i] + sentences[i + 1:], asked, x.p)
                if name[name.index("-"):] in sums:             # a sum over the rest of its place
                    assert less is None or sum(less[1].values()) < op
                else:
                    assert less is None
                if said[0].isdigit() and said[1:2] != ["times"]:
                    said[0] = str((int(said[0]) + 1) % x.p)
                    other = solve([*sentences[:i], [name, *said], *sentences[i + 1:]], asked, x.p)
                    assert other[0] != answer
                    counted[reverse] += 1
        assert min(counted[False], counted[True]) > n // 10


def test_distractors_and_the_order_of_the_sentences_change_nothing():
    rng, dropped = random.Random(0), 0
    for n, kw in ((800, {}), (400, dict(flags=TERSE, T=48))):
        for x, sentences, asked, answer, op, reverse in one_question(n, **kw):
            _, cost, _ = expected = solve(sentences, asked, x.p)
            needed = [s for s in sentences if s[0] in cost]
            dropped += len(sentences) - len(needed)
            other = [[w if not w.isdigit() or s[0] in cost else str(rng.randrange(x.p)) for w in s]
                     for s in sentences]
            more = [["fox-nowhere", "3"], ["owl-nowhere", "2", "plus", rng.choice([*cost])]]
            shuffled = rng.sample(sentences, len(sentences))
            for changed in (needed, other, sentences + more, shuffled):
                assert solve(changed, asked, x.p) == expected
    assert dropped > 800 * 20                                  # of 29 sentences


def test_every_name_is_said_once_and_a_reverse_problem_has_one_solution():
    for n, kw in ((1600, {}), (800, dict(flags=TERSE, T=48)), (200, dict(M=8)),
                  (400, dict(flags="--p 5 --reverse 1", M=2))):
        reverse = 0
        for x in made(n, **kw):
            names = Counter(s[0] for s in x.sentences)
            sums = [name for name in names if name.startswith("all-")]
            hidden = [s[0] for s in x.sentences if s[1] == "unknown"]
            twice = [name for name in names if names[name] > 1]
            places = Counter(name.split("-")[1] for name in names if name not in sums)
            assert max(places.values()) <= 3
            if min(x.ops) > 0:
                assert not (hidden or twice or sums)
                continue
            (told,), (asked,), reverse = twice + sums, hidden, reverse + 1
            assert names[told] == 1 + (told in twice)
            (value,) = [int(s[1]) for s in x.sentences if s[0] == told and is_number(s[1:])]
            rest = [s for s in x.sentences if s != [told, str(value)]]
            fits = [c for c in range(x.p) if value == solve(
                [[asked, str(c)] if s[0] == asked else s for s in rest], told, x.p)[0]]
            assert fits == [a for a, op in zip(x.answers, x.ops) if op < 0]
        assert reverse > n // 16


def test_no_shortcut_finds_the_answer():
    right, rows = {}, {}
    for x, sentences, asked, answer, op, reverse in one_question(8000):
        kind, words = (reverse, op > 2), said_in(sentences)
        rows.setdefault(kind, []).append((words + ["? " + asked], answer))
        numbers = [w for w in words if w.isdigit()]
        common = Counter(numbers).most_common(1)[0][0]
        guesses = dict(first=numbers[0], middle=numbers[len(numbers) // 2], last=numbers[-1],
                       common=common, **{f"always {c}": c for c in range(11)})
        if op > 1 and not reverse:         # a constant's own sentence is its answer
            own = [w for name, *said in sentences for w in said if name == asked and w.isdigit()]
            guesses["own"] = (own + [None])[0]
        if op > 4 and reverse:             # through copies, all that op 2 has, it is the answer
            twice = Counter(name for name, *_ in sentences)
            guesses["told"] = next(said[0] for name, *said in sentences if is_number(said)
                                   and (twice[name] > 1 or name.startswith("all-")))
        for rule, guess in guesses.items():
            right.setdefault((rule, *kind), []).append(str(guess) == str(answer))
    # 4500 forward and 1500 reverse ones have 3 operations or more: sigma .004 and .008, 7 and 4 of
    # them to 1/11 + .03. The answer of a shorter one is among the 17 numbers said, and their
    # commonest .16 of the time: sigma .009 and .023, 3 of them to the limit.
    for (rule, reverse, long), hits in right.items():
        limit = 1 / 11 + (0.03 if long else 0.15 if reverse else 0.1)
        limit = 0.08 if rule == "own" else limit
        assert sum(hits) / len(hits) < limit, (rule, reverse, long, sum(hits) / len(hits))
    for reverse in (False, True):          # a linear guess from all words: 1100 and 380 are guessed
        texts, answers = zip(*rows[reverse, True])
        hits = guesses_from_words(count_words(texts), torch.tensor(answers), 11).double()
        assert hits.mean() < 1 / 11 + 3.5 * (0.083 / len(hits)) ** 0.5, (reverse, hits.mean())


def test_in_the_short_texts_of_the_cpu_preset_the_commonest_number_is_a_better_guess_than_a_constant():
    task, hits = problems("", "cpu"), {}
    tokens, targets, ops = task.test
    for row, answer, op in zip(tokens.tolist(), targets[targets >= 0].tolist(), ops.flatten().tolist()):
        said = Counter(x for x in row if 11 <= x < 11 + task.args.p)
        hits.setdefault(op, []).append(said.most_common(1)[0][0] == answer)
    share = [round(sum(hits[op]) / len(hits[op]), 2) for op in (1, 2, 3, 4)]
    assert share == [0.26, 0.32, 0.17, 0.16], share    # the README says so


def test_the_number_of_operations_cannot_be_read_from_the_text():
    kinds = {}
    for x, sentences, _, _, op, reverse in one_question(8000):
        words = said_in(sentences)
        counts = [len(sentences), sum(w.isdigit() for w in words), len(words), x.pad,
                  words.count("plus"), words.count("times"), words.count("minus"),
                  sum(w.startswith("all-") for w in words)]
        kinds.setdefault(reverse, {}).setdefault(op, []).append((words, counts))
    for reverse, by_op in kinds.items():
        n = min(map(len, by_op.values()))                      # as many of each operation
        assert n > (200 if reverse else 700)
        counts = torch.tensor([[c for _, c in by_op[op][:n]] for op in by_op]).double()
        mean, sigma = counts.mean((0, 1)), (counts.flatten(0, 1).var(0) / n) ** 0.5
        assert ((counts.mean(1) - mean).abs() < 4 * sigma).all()       # 64 and 56 comparisons
        assert (counts.mean(1) / mean - 1)[:, :3].abs().max() < 0.03   # sigma .004, .01 if reverse
        rows = [(by_op[op][i][0], op - 1) for i in range(n) for op in by_op]
        forms = [[w.split("-")[0] for w in words] for words, _ in rows]
        for texts in (forms, [words for words, _ in rows]):    # 1400 and 400 are guessed
            hits = guesses_from_words(count_words(texts), torch.tensor([op for _, op in rows]), 8)
            chance = 1 / len(by_op)
            assert hits.double().mean() < chance + 3.5 * (chance / len(hits)) ** 0.5, reverse


def test_what_is_needed_lies_anywhere_and_looks_like_the_rest():
    rng, at, forms = random.Random(0), [], {}
    for x, sentences, asked, _, op, reverse in one_question(8000):
        _, cost, _ = solve(sentences, asked, x.p)
        for i, s in enumerate(sentences):
            if s[0] in cost:
                at.append((i + rng.random()) / len(sentences))
        if op < 6 or reverse:
            continue
        for name, *said in sentences:      # the form of quantities with 2 to 5 operations
            level = sum(solve(sentences, name, x.p)[1].values())
            if 2 <= level <= 5:
                form = next((w for w in said if w in ("plus", "minus", "times")), "copy")
                form += said[0].isdigit() * " c"
                forms.setdefault((level, name in cost), Counter())[form] += 1
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed by one uniform sample in a thousand.
    at = torch.tensor(at).double().sort().values
    step = torch.arange(len(at)) / len(at)
    assert len(at) > 20_000 and (at - step).abs().max() < 1.95 / len(at) ** 0.5
    # 400 needed ones a level: sigma .02. What is written early, while few names are there to choose
    # from, is needed more often, and then a copy of 4 operations is rare: .11 against .18.
    for level in range(2, 6):
        needed, other = forms[level, True], forms[level, False]
        assert needed.total() > 400
        for form in needed | other:
            assert abs(needed[form] / needed.total() - other[form] / other.total()) < 0.12


def test_more_operations_take_longer_chains():
    chains, near = {}, {}
    for x, sentences, asked, answer, op, reverse in one_question(8000):
        if not reverse:
            chains.setdefault(op, []).append(solve(sentences, asked, x.p)[2])
            guess = solve(sentences, asked, x.p, reach=3)
            near.setdefault(op, []).append(guess[0] == answer)
    mean = lambda x: sum(x) / len(x)
    for op in range(1, 8):                 # 750 each: sigma .04 for a mean, .06 for a difference
        assert mean(chains[op]) + 0.2 < mean(chains[op + 1]), op
    assert mean(near[1]) == mean(near[2]) == 1
    assert all(mean(near[op]) < 0.6 for op in (6, 7, 8))       # three reads do not do


def test_no_text_of_the_test_is_ever_trained_on():
    def texts(task, tokens):
        return [frozenset(map(tuple, read(task, row)[1])) for row in tokens]       # in any order
    small = "--ops 2 --p 5 --places 4 --animals 1 --no-words --L 9 --problems 2000 --tests 200"
    for M in (1, 3):                       # three sentences: few texts, so most of them are seen
        task = problems(f"{small} --questions {M} --T {10 + M}")
        test, trained = texts(task, task.test[0]), texts(task, task.training[0][0])
        assert len(set(test)) > 50 and len(set(trained)) > 500 and not set(test) & set(trained)
    task = problems("--tests 400", "cpu")
    assert len(set(texts(task, task.test[0]))) == 400          # where there are many, all differ


def test_problems_are_made_again_bit_for_bit():
    task = problems("--problems 2001 --tests 60 --reverse 0.25", "cpu")
    a, b, c = task, *(problems(f"--problems 2001 --tests 60 --reverse 0.25 {flags}", "cpu", seed)
                      for flags, seed in (("--N 2", 0), ("", 1)))
    (tokens, ops), = task.training         # five times 500 or less are made by worker processes
    for i in (range(30), range(490, 510), range(1981, 2001)):
        again = train_gsm.make_problems(task.settings, 48, 8, i)
        assert torch.equal(tokens[i.start:i.stop], torch.from_numpy(again[0]))
        assert torch.equal(ops[i.start:i.stop], torch.from_numpy(again[1]))
    assert len(tokens) == 2001 and len({bytes(row.tolist()) for row in tokens}) == 2001
    for step in (0, 5):                    # every N alike; another seed draws other rows of them
        for x, y, z in zip(*(t.make_batch(step) for t in (a, b, c))):
            assert torch.equal(x, y) and not torch.equal(x, z)
    assert not torch.equal(a.make_batch(0)[0], a.make_batch(5)[0])
    assert all(map(torch.equal, a.test, c.test)) and torch.equal(a.training[0][0], c.training[0][0])
    with tempfile.TemporaryDirectory() as folder:
        load = lambda **kw: train_gsm.load_problems(dict(task.settings, **kw), 48, 0, 60, folder)[0]
        first = load()
        assert torch.equal(torch.from_numpy(first[:, :-1]).long(), a.test[0])
        (path,) = Path(folder).iterdir()
        assert (load() == first).all() and (load(p=5) != first).any()
        (other,) = {*Path(folder).iterdir()} - {path}
        path.write_bytes(other.read_bytes())                   # of other settings: made anew
        assert (load() == first).all()
        path.write_bytes(b"PK broken")
        refused("delete it", load)


def test_the_gsm_report_is_by_operations_forward_and_reverse_next_to_the_best_constant():
    for flags, preset in LAYOUTS:
        task = problems(f"--batch_size 100 {flags}", preset)
        p, levels = task.args.p, [str(op) for op in range(1, task.args.ops + 1)]
        for batch in (task.test, task.make_batch(0)):
            tokens, targets, ops = batch
            perfect = torch.zeros(*targets.shape, task.vocab_size)
            perfect.scatter_(2, targets.clamp(min=0)[..., None], 1.0)
            found = task.score(tokens, targets, perfect, ops)
            assert set(found["accuracy"]) == set(levels)
            if task.args.reverse:
                assert list(found) == ["accuracy", "forward", "reverse"]
                assert set(found["forward"]) == {*levels} and set(found["reverse"]) == {*levels[1:]}
            else:
                assert list(found) == ["accuracy"]
            assert {v for by_op in found.values() for v in by_op.values()} == {1.0}
            rows = []                      # (operations, answer), the answers by the solver
            for row, op in zip(tokens, ops.tolist()):
                questions, sentences, _ = read(task, row)
                rows += [(o, solve(sentences, q, p)[0]) for q, o in zip(questions, op)]
            best = {}
            for c in range(p):
                constant = torch.zeros(*targets.shape, task.vocab_size)
                constant[..., 11 + c] = 1.0
                for metric, by_op in task.score(tokens, targets, constant, ops).items():
                    for op, value in by_op.items():
                        kinds = dict(accuracy=(1, -1), forward=(1,), reverse=(-1,))[metric]
                        hits = [a == c for o, a in rows if o in [int(op) * sign for sign in kinds]]
                        assert abs(value - sum(hits) / len(hits)) < 1e-6
                        best.setdefault(metric, {}).setdefault(op, []).append(value)
            if batch is task.test:
                assert task.chance == {metric: {op: max(values) for op, values in by_op.items()}
                                       for metric, by_op in best.items()}
            shifted = task.score(tokens, targets, perfect.roll(1, 1), ops)
            assert max(max(by_op.values()) for by_op in shifted.values()) < 0.5


def test_settings_that_make_no_word_problems_are_refused():
    for words, flags in (
            ("must be a prime", "--p 9"), ("must be a prime", "--p 3"),
            ("--animals 13", "--animals 13"), ("--questions 0 must", "--questions 0"),
            ("--ops 0 and", "--ops 0"), ("1 to 4900", "--places 1000000000"),
            ("fewer than 32,768", "--places 4900 --no-words"), ("--reverse nan", "--reverse nan"),
            ("--reverse 1.5", "--reverse 1.5"), ("never full", "--L 257"), ("never full", "--L 0"),
            ("one for each of --T", "--problems 3"), ("--tests 7 one for each", "--tests 7")):
        refused(words, problems, flags)
    refused("take more --places", lambda: problems("--places 2 --T 400").test)
    refused("a longer --T", lambda: problems("--T 20 --L 20").test)


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


def test_muon_in_batches_is_torch_optim_Muon():
    results = []
    for cls in (torch.optim.Muon, sleep.Muon):
        model = tiny().float()
        matrices = [m.weight for m in model.blocks.modules() if isinstance(m, torch.nn.Linear)]
        optimizer = cls(matrices, lr=0.02, weight_decay=0.1)
        g = torch.Generator().manual_seed(0)
        for _ in range(3):
            for p in matrices:
                p.grad = torch.randn(p.shape, generator=g)
            matrices[3].grad = None                    # a frozen one
            optimizer.step()
        results.append([p.detach().clone() for p in matrices])
    for a, b in zip(*results):
        close(b, a, 1e-6)
    assert torch.equal(results[1][3], tiny().float().blocks[0].mixer.o.weight)


def test_a_pass_costs_the_same_flops_every_time_and_an_answer_does_not_pay_for_it():
    task = tapes("--W 8 --L 8 --t 2")
    costs = [sleep.costs(SleepLM, Config(3, task.T, 8, N, "as", 16, 2), *task.make_batch(0), "cpu")
             for N in (1, 2, 3)]
    a, b, c = (x["flop"] for x in costs)
    assert c - b == b - a and b > 1.7 * a              # two windows sleep, a short one answers
    d, B, cells = 16, 256, 16
    matrices = 2 * (4 + 8 + 8) * d * d + 2 * (d * d + 2 * 2 * d)   # q k v o up down; z and alpha, beta
    assert b - a > 3 * B * cells * matrices * 0.99     # forward, and twice that backward
    assert all(0 < x["wake_ms"] < 100 for x in costs) and costs[0]["parameters"] == sum(
        p.numel() for p in SleepLM(Config(3, task.T, 8, 1, "as", 16, 2)).parameters())


def test_any_N_draws_N_for_every_batch_and_tests_with_the_largest():
    forward, seen = SleepLM.forward, []
    SleepLM.forward = lambda self, *args: seen.append(
        (torch.is_grad_enabled(), self.cfg.N)) or forward(self, *args)
    try:
        with tempfile.TemporaryDirectory() as out:
            assert script(train_ca, f"{SMALL} --steps 16 --N 3 --any_N --out {out}")[0] == 0
            (run,) = json.loads((Path(out) / "results.json").read_text())["runs"]
    finally:
        SleepLM.forward = forward
    trained = [N for learning, N in seen if learning]
    assert len(trained) == 16 and set(trained) == {1, 2, 3}
    assert {N for learning, N in seen if not learning} == {3} and run["N"] == 3


def test_a_cuda_graph_replays_the_gradients_of_the_eager_step():
    if not torch.cuda.is_available():
        return print("      (no CUDA here: nothing to replay)")
    task = tapes("--device cuda")
    batches = [[x[:n] for x in task.make_batch(step)] for step, n in enumerate((256, 64, 256, 256))]
    for again in (False, True):
        results = []
        for compile in (False, True):
            torch.manual_seed(0)
            model = SleepLM(Config(3, task.T, 16, 2, "as", 64, 2)).cuda()
            torch.nn.init.normal_(model.head.weight)
            gradients = sleep.make_gradients(model, compile, again)
            for step, batch in enumerate(batches):             # two shapes; the last step thaws a block
                model.blocks[0].requires_grad_(step == 3)
                loss = gradients(*batch)
                results.append([loss.clone()] + [torch.zeros(1) if p.grad is None else p.grad.clone()
                                                 for p in model.parameters()])
        for eager, replayed in zip(results[:4], results[4:]):
            for a, b in zip(eager, replayed):
                close(b, a, 1e-3)


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


def test_evaluation_with_another_N_or_without_S_leaves_the_model_as_it_was():
    task = tapes("--W 8 --L 8 --t 2")
    torch.manual_seed(0)
    model = SleepLM(Config(3, task.T, 8, 1, "as", 16, 2))
    torch.nn.init.normal_(model.head.weight)
    passes, original, before = [], model.one_pass, replace(model.cfg)
    model.one_pass = lambda *args: passes.append(1) or original(*args)
    batch, same = [x[:9] for x in task.test], SimpleNamespace(score=lambda x, y, logits: logits)
    logits, answers = sleep.evaluate(model, same, batch)
    assert len(passes) == 3 and torch.equal(answers, logits.argmax(-1))
    for change, expected in ((dict(N=3), 7), (dict(keep_S=False), 3)):
        passes.clear()
        other, _ = sleep.evaluate(model, same, batch, **change)
        assert len(passes) == expected and (other - logits).abs().max() > 1e-4, change
        assert model.cfg == before and torch.equal(sleep.evaluate(model, same, batch)[0], logits)


def test_the_warmup_trains_no_attention_block_and_evicts_hard():
    flags = f"{SMALL} --layout asas --eviction sliding --N 2"
    forward, seen = SleepLM.forward, []

    def spy(self, *args):
        if torch.is_grad_enabled():
            seen.append((self.cfg.eviction, {n: p.detach().clone() for n, p in self.named_parameters()}))
        return forward(self, *args)

    SleepLM.forward = spy
    try:
        with tempfile.TemporaryDirectory() as out:
            assert script(train_ca, f"{flags} --warmup 4 --out {out}")[0] == 0
            last = weights(out, "N2-seed0.pt")["model"]
    finally:
        SleepLM.forward = forward
    assert [eviction for eviction, _ in seen] == ["hard"] * 4 + ["sliding"] * 4
    for name in last:
        moved = [not torch.equal(a, b) for a, b in ((seen[0][1][name], seen[4][1][name]),
                                                    (seen[4][1][name], last[name]))]
        assert moved == [not name.startswith(("blocks.0", "blocks.2")), True], name


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
        assert re.search(r"\| 2 \| 1 \| [\d,]+ \| 8 \| 0.0M \|", text)
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
        assert calls == [-1, 0, 0, 1, 2, 3, 4, 4, 5, -1, 0, 6, 7, 8, 0]    # 0: are there data? costs?


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
        status, text, err = script(train_ca, f"{SMALL} --N 1 --out {out} --resume --N_test 1 4 --lesion")
        assert status == 0 and "tested with N = 4" in text and "tested with S = 0" in text, err
        (run,) = json.loads((Path(out) / "results.json").read_text())["runs"]
        assert run["N_test"]["1"]["exact"] == run["exact"] and set(run["N_test"]) == {"1", "4"}
        assert set(run["lesion"]) == {"exact", "bit"}
        assert same(before, weights(out)["model"])
        assert script(train_ca, f"{SMALL} --N 1 2 --out {out} --resume")[0] == 0
        runs = json.loads((Path(out) / "results.json").read_text())["runs"]
        assert [set(r["N_test"]) for r in runs] == [{"1", "4"}, set()]     # nothing finished is lost
        assert ["lesion" in r for r in runs] == [True, False]


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
            ("not a folder", f"--out {__file__}"), ("cannot be made", f"--out {__file__}/x"),
            ("update_rule", "--update_rule oja"), ("--N_test must be", "--N_test 0"),
            ("--warmup 500", "--warmup 500"), ("hard eviction", "--carry h --eviction sliding"),
            ("--think 0", "--think 0"), ("fewer passes", "--N 3 --detach 3"),
            ("invalid choice", "--experiment all"), ("--cooldown from", "--cooldown 2"),
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


def test_the_benchmark_measures_all_its_parts():
    with tempfile.TemporaryDirectory() as out:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            sleep.benchmark(["--quick", "--device", "cpu", "--out", f"{out}/b"])
        results = json.loads((Path(out) / "b" / "results.json").read_text())
        assert (Path(out) / "b" / "plot.png").read_bytes()[:4] == b"\x89PNG"
    rules = {row["rule"] for row in results["bench_rule"]}
    assert rules >= {"recurrent", "chunked", "chunked, solve_triangular"}
    assert all(row["error"] < 1e-5 and row["both"][0] > 0 for row in results["bench_rule"])
    assert [row["N"] for row in results["bench_N"]] == [1, 2] == [r["N"] for r in results["bench_wake"]]
    assert all(0 < row["share"] < 1.5 and row["peak"] > 1e6 for row in results["bench_N"])
    assert {row["L"] for row in results["bench_L"]} == {64, 256}
    row = results["bench_wake"][0]                     # float32: S is 2 x 32 x 32, K and V 64 each
    assert row["bytes_S"] == 4 * 2 * 32 * 32 and row["bytes_cache"] == 4 * 64 * 2 * 64
    assert row["bytes_full_attention"] == 4 * 1024 * 2 * 64
    status = subprocess.run([sys.executable, HERE / "sleep.py", "--device", "tpu"], capture_output=True,
                            text=True)
    assert status.returncode == 2 and status.stderr.count("\n") == 1 and "device 'tpu'" in status.stderr


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
        if file == "sleep.py" or "--film" in flags:
            continue                       # they have tests of their own
        module = {"train_ca.py": train_ca, "train_khop.py": train_khop, "train_gsm.py": train_gsm}[file]
        p, args = sleep.parse("", module.PRESETS, module.add_flags, flags)
        task = getattr(module, TASKS[module.__name__])(args, 0)
        Config(task.vocab_size, task.T, args.L, args.N[0], args.layout, args.d_model, args.n_head)
        if args.steps == 10:
            with tempfile.TemporaryDirectory() as out:
                done = subprocess.run([sys.executable, HERE / file, *flags], cwd=out,
                                      capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                ran += 1
    assert ran >= 1


def test_the_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(import.*?)```", (HERE / "README.md").read_text(), re.S)
    assert len(blocks) == 3
    exec(blocks[2], {})                    # the questions: asserts of their own
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
                       ("train_ca.py", "ring"), ("train_khop.py", "law of n"),
                       ("train_gsm.py", "problems are made")):
        marks = re.findall(r"paper does not say:.*?\.", (HERE / file).read_text(), re.S)
        assert any(word in mark for mark in marks), (file, word)
        assert word in section.lower(), word
    assert sum(f.read_text().count("paper does not say:") for f in HERE.glob("*.py")
               if f.name != "test_sleep.py") == 5


def test_nothing_is_imported_beyond_torch_numpy_tqdm_matplotlib():
    local = {f.stem for f in HERE.glob("*.py")}
    for f in HERE.glob("*.py"):
        for name in re.findall(r"^\s*(?:import|from) (\w+)", f.read_text(), re.M):
            assert name in sys.stdlib_module_names or name in local or name in (
                "torch", "numpy", "tqdm", "matplotlib") or (f.name, name) == ("sleep.py", "fla"), (
                    f.name, name)      # the benchmark compares itself with fla if it is there


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
