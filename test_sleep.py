"""Every claim of sleep.py and the three train scripts: a test with the claim as its name.

    python test_sleep.py              all of them, and those of lab/test_*.py if they are there
    python test_sleep.py rule wake    those whose names contain one of the words

The tests are in the order of sleep.py. No GPU, no compiler and no network is needed. Exit status: 0
only if all of them ran and passed. pytest can collect this file, too.
"""
import ast
import contextlib
import copy
import importlib
import io
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import sleep
import train_ca
import train_gsm
import train_khop
from sleep import Config, SleepLM

TASKS = {train_ca: train_ca.Tapes, train_khop: train_khop.Cycles, train_gsm: train_gsm.Problems}
EVICTIONS = ("hard", "sliding")
warnings.filterwarnings("ignore", r"\d+ tokens of context share")      # one test looks at it


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


@contextlib.contextmanager
def patched(place, name, value):
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


@contextlib.contextmanager
def folder():
    """A path in a temporary folder, at which nothing is yet."""
    with tempfile.TemporaryDirectory() as place:
        yield Path(place) / "runs"


@torch.no_grad()
def tiny(build=SleepLM, **changes):
    """A small model in float64, every weight random: nothing is hidden by a 0 or a 1."""
    values = dict(vocab_size=7, T=20, L=5, N=2, layout="asas", d_model=16, n_head=2) | changes
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        model = build(Config(**values))
        for name, p in model.named_parameters():
            if "norm" in name or "A_log" in name:
                p += 0.3 * torch.randn_like(p)
        torch.nn.init.normal_(model.head.weight)
    finally:
        torch.set_default_dtype(torch.float32)
    return model.requires_grad_()


def random_tokens(B=3, T=17, seed=0):
    return torch.randint(7, (B, T), generator=torch.Generator().manual_seed(seed))


def targets_for(tokens, M):
    return torch.randint(7, (len(tokens), M), generator=torch.Generator().manual_seed(5))


def gradients(model, *args, **kwargs):
    model.zero_grad()
    logits, loss = model(*args, **kwargs)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads


@contextlib.contextmanager
def counted_passes(model):
    """The tokens of every pass that the model makes, as a list that grows."""
    passes = []
    one_pass = model.one_pass

    def spy(h, S, cache):
        passes.append(h.shape[1])
        return one_pass(h, S, cache)

    with patched(model, "one_pass", spy):
        yield passes


def run(main, *args):
    """Run a program in this process -> exit status, what it printed, what it complained."""
    out = io.StringIO()
    err = io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(*args)
        except SystemExit as e:
            status = e.code or 0
            if isinstance(status, str):                # what sys.exit would print
                print(status, file=err)
                status = 1
    return status, out.getvalue(), err.getvalue()


def script(module, command):
    argv = shlex.split(f"--device cpu {command}")
    return run(sleep.main, module.__doc__, module.PRESETS, module.FLAGS, TASKS[module], argv)


def settings(module, flags=""):
    argv = shlex.split(f"--device cpu {flags}")
    return sleep.parse("", module.PRESETS, module.FLAGS, argv)[1]


def built(module, flags="", seed=0):
    return TASKS[module](settings(module, flags), seed)


# ------------------------------------------------------------------------------------------------
# The fast-weight rule

REGIMES = ("random", "alpha 1", "alpha 0", "alpha mixed", "beta 0", "one key, beta 1",
           "one key, beta 1, alpha 1", "two keys, beta 1, alpha 1", "two keys, alpha mixed")


def rule_inputs(T, regime, B=2, H=2, K=4, V=6, dtype=torch.float64):
    g = torch.Generator().manual_seed(T)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q = F.normalize(draw(B, H, T, K), dim=-1)
    k = F.normalize(draw(B, H, T, K), dim=-1)
    v = draw(B, H, T, V)
    S = draw(B, H, V, K)
    log_alpha = -draw(B, H, T).exp()
    beta = draw(B, H, T).sigmoid()
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
        log_alpha = torch.full_like(log_alpha, -40.0)
    if "alpha mixed" in regime:
        log_alpha = -40.0 * (draw(B, H, T) > 0).double()
    return [x.to(dtype).requires_grad_() for x in (q, k, v, log_alpha, beta, S)]


def test_without_delta_the_rule_is_equation_3_and_with_it_gated_deltanet():
    q, k, v, log_alpha, beta, S = rule_inputs(6, "random")
    I = torch.eye(4, dtype=torch.float64)
    for delta in (True, False):
        o, last = sleep.gated_delta_rule(q, k, v, log_alpha, beta, S, delta)
        for b in range(2):
            for h in range(2):
                M = S[b, h]
                for t in range(6):
                    k_t = k[b, h, t][:, None]
                    v_t = v[b, h, t][:, None]
                    beta_t = beta[b, h, t]
                    M = log_alpha[b, h, t].exp() * M @ (I - delta * beta_t * k_t @ k_t.T)
                    M = M + beta_t * v_t @ k_t.T
                    close(o[b, h, t], M @ q[b, h, t], 1e-12)
                close(last[b, h], M, 1e-12)


def rule_with_gradients(rule, inputs, **kwargs):
    """Output and S of a rule, and the gradient of a random sum of them to each of its inputs."""
    o, S = rule(*inputs, **kwargs)
    g = torch.Generator().manual_seed(1)
    loss = 0
    for y in (o, S):
        loss = loss + (y * torch.randn(y.shape, generator=g, dtype=y.dtype)).sum()
    return o, S, *torch.autograd.grad(loss, inputs)


def test_the_chunked_rule_is_the_rule_token_by_token_with_all_gradients():
    names = ("o", "S", "dq", "dk", "dv", "dlog_alpha", "dbeta", "dS")
    for delta in (True, False):
        for regime in REGIMES:
            for T, chunk in ((1, 64), (5, 64), (23, 24), (24, 24), (25, 24), (75, 64), (6, 1)):
                inputs = rule_inputs(T, regime)
                slow = rule_with_gradients(sleep.gated_delta_rule, inputs, delta=delta)
                fast = rule_with_gradients(sleep.gated_delta_rule_chunked, inputs, delta=delta,
                                           chunk=chunk)
                for name, x, y in zip(names, slow, fast, strict=True):
                    error = ((y - x).norm() / x.norm().clamp(min=1e-6)).item()
                    assert error <= 1e-9, (name, error, regime, T, chunk, delta)


def test_repeated_keys_cost_no_digits_in_float32():
    for regime in ("one key, beta 1, alpha 1", "two keys, beta 1, alpha 1"):
        for T in (24, 64, 130):
            exact = sleep.gated_delta_rule(*rule_inputs(T, regime))
            fast = sleep.gated_delta_rule_chunked(*rule_inputs(T, regime, dtype=torch.float32))
            for a, b in zip(fast, exact):
                close(a.double(), b, 2e-6)


def test_a_token_may_forget_everything():
    inputs = rule_inputs(9, "random")
    with torch.no_grad():
        inputs[3][:, :, 4] = -torch.inf
    slow = sleep.gated_delta_rule(*inputs)
    fast = sleep.gated_delta_rule_chunked(*inputs)
    for a, b in zip(fast, slow):
        close(a, b, 1e-12)
    grads = torch.autograd.grad(fast[0].sum() + fast[1].sum(), inputs)
    assert all(grad.isfinite().all() for grad in grads)
    (to_S,) = torch.autograd.grad(sleep.gated_delta_rule_chunked(*inputs)[1].sum(), inputs[5])
    assert to_S.abs().max() < 1e-30                            # of the S before it nothing is left


def test_both_rules_refuse_shapes_that_do_not_fit_no_tokens_and_an_alpha_above_1():
    for rule in (sleep.gated_delta_rule, sleep.gated_delta_rule_chunked):
        for i in range(6):
            inputs = rule_inputs(5, "random")
            inputs[i] = inputs[i][:, :, :-1]
            refused("must be (B, H, T, K)", rule, *inputs)
        refused("with T >= 1", rule, *rule_inputs(0, "random"))
        inputs = rule_inputs(5, "random")
        inputs[3] = -inputs[3]
        refused("log_alpha must be <= 0", rule, *inputs)


# ------------------------------------------------------------------------------------------------
# Config and a new model

def test_a_config_that_makes_no_sense_is_refused_in_a_sentence():
    def config(**changes):
        return Config(**dict(vocab_size=7, T=20, L=5) | changes)

    for name in ("vocab_size", "T", "L", "N", "d_model", "n_head"):
        for value in (0, -1, 2.5, "3", None, True):
            refused(f"{name} must be an integer >= 1", config, **{name: value})
    for layout in ("", "axs", None, ["a", "s"]):
        refused("must be made of the letters a and s", config, layout=layout)
    refused("multiple of 2 * n_head", config, d_model=30, n_head=4)
    refused("eviction 'soft' must be", config, eviction="soft")
    refused("update_rule 'x' must be one of", config, update_rule="x")
    refused("conv 'q' must be", config, conv="q")


def test_numbers_of_numpy_are_numbers():
    cfg = Config(np.int64(7), np.int32(20), np.int16(5), N=np.uint8(3), d_model=np.uint16(16),
                 n_head=2)
    assert cfg == Config(7, 20, 5, N=3, d_model=16, n_head=2)
    assert type(cfg.N) is int
    model = tiny()
    tokens = random_tokens()
    targets = targets_for(tokens, 2)
    expected = model(tokens, targets, N=3)[0]
    for N in (np.int64(3), np.uint8(3), torch.tensor(3), [np.int64(3)] * 4, (3, 3, 3, 3)):
        assert torch.equal(model(tokens, targets, N=N)[0], expected)
    for N in (True, 2.0, -1, "2", [2, 2, 2.5, 2]):
        refused("N must be an integer >= 0", model, tokens, targets, N=N)


def test_a_new_model_has_the_stated_standard_deviations_and_its_head_says_nothing():
    torch.manual_seed(0)
    d = 256
    model = SleepLM(Config(100, T=100, L=25, layout="as", d_model=d, n_head=4))
    for name, p in model.named_parameters():
        std = p.std().item()
        if name == "embed.weight":
            assert abs(std - 1) < 0.03
        elif "conv" in name:
            assert abs(std / 0.5 - 1) < 0.1
        elif name == "head.weight":
            assert not p.any()
        elif "norm" in name:
            assert (p == 1).all()
        elif "A_log" in name:
            assert not p.any()
        elif "dt_bias" not in name:
            assert abs(std * p.shape[1] ** 0.5 - 1) < 0.05, name
            assert abs(p.mean()) < 0.01
    logits, loss = model(torch.zeros(2, 100, dtype=torch.long), torch.ones(2, 1, dtype=torch.long))
    assert not logits.any()
    assert math.isclose(loss.item(), math.log(100), rel_tol=1e-6)


def test_at_first_the_half_lives_of_the_heads_are_from_4_tokens_to_all_writes_of_a_sequence():
    mixer = SleepLM(Config(7, T=100, L=25, N=5, layout="s", d_model=64, n_head=4)).blocks[0].mixer
    alpha = (-mixer.A_log.exp() * F.softplus(mixer.dt_bias)).exp()
    half_lives = torch.tensor([500.0, 100.0, 20.0, 4.0])       # N T = 500
    close(alpha ** half_lives, torch.full((4,), 0.5), 1e-4)


def test_models_with_other_N_start_equal_up_to_N_4():
    one = tiny(N=1).state_dict()
    four = tiny(N=4).state_dict()
    assert all(torch.equal(one[name], four[name]) for name in one)


# ------------------------------------------------------------------------------------------------
# An independent model, token by token: lists for memory, no chunks, no caches

EPS = torch.finfo(torch.float64).eps


def norm_by_hand(x, weight, eps=EPS):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def project(linear, x, H):
    return (x @ linear.weight.T).view(len(x), H, -1)           # (B, H, K)


def attention_by_hand(mixer, seen):
    """The last of the tokens that are seen, [x (B, d), ...], attends to all of them -> (B, d)."""
    H = mixer.H
    q = project(mixer.q, seen[-1], H)
    K = q.shape[-1]
    turn = 10000 ** (-torch.arange(0, K, 2, dtype=q.dtype) / K)

    def as_complex(y):
        return torch.complex(y[..., :K // 2], y[..., K // 2:])

    scores = []
    for j, x in enumerate(seen):
        distance = j + 1 - len(seen)
        k = project(mixer.k, x, H)
        product = as_complex(q).conj() * as_complex(k) * torch.exp(1j * turn * distance)
        scores.append(product.real.sum(-1))
    weights = (torch.stack(scores, -1) / math.sqrt(K)).softmax(-1)         # (B, H, tokens)
    o = 0
    for j, x in enumerate(seen):
        o = o + weights[..., j, None] * project(mixer.v, x, H)
    return o.flatten(1) @ mixer.o.weight.T


def fast_weights_by_hand(mixer, x, S):
    """Gated DeltaNet for one token x (B, d) -> (B, d), S."""
    q, k, v = [project(linear, x, mixer.H) for linear in (mixer.q, mixer.k, mixer.v)]
    q, k, v = [y * y.sigmoid() for y in (q, k, v)]
    q = q / q.norm(dim=-1, keepdim=True)
    k = k / k.norm(dim=-1, keepdim=True)
    a, b = (x @ mixer.ab.weight.T).chunk(2, -1)                            # (B, H)
    alpha = torch.exp(-mixer.A_log.exp() * torch.log(1 + torch.exp(a + mixer.dt_bias)))
    beta = 1 / (1 + torch.exp(-b))
    S = alpha[..., None, None] * S
    lacks = v - (S @ k[..., None]).squeeze(-1)
    S = S + beta[..., None, None] * lacks[..., :, None] * k[..., None, :]
    o = norm_by_hand((S @ q[..., None]).squeeze(-1), mixer.norm.weight, 1e-5).flatten(1)
    z = x @ mixer.z.weight.T
    return (o * z * z.sigmoid()) @ mixer.o.weight.T, S


def token_by_hand(block, cfg, h, S, past):
    """One token h (B, d) through a block. past: its inputs that may still be seen, (x, after the
    convolution) of each token -> h, S, past with this token."""
    x = norm_by_hand(h, block.norm1.weight)
    known = [before for before, _ in past] + [x]
    convolved = x
    if block.kind in cfg.conv:
        for j in range(min(4, len(known))):
            convolved = convolved + block.conv.weight[j] * known[-1 - j]
    past = past + [(x, convolved)]
    if block.kind == "a":
        seen = [after for _, after in past[-cfg.L:]]
        mixed = attention_by_hand(block.mixer, seen)
    else:
        mixed, S = fast_weights_by_hand(block.mixer, convolved, S)
    h = h + mixed
    up = norm_by_hand(h, block.norm2.weight) @ block.up.weight.T
    return h + up.clamp(min=0) ** 2 @ block.down.weight.T, S, past


def by_hand(model, tokens, targets, passes, evict=True):
    """Algorithm 1. passes: one number a window, 0 = it is awake and predicts.

    -> logits of the last M tokens of the windows that predict, and their loss.
    """
    cfg = model.cfg
    K = cfg.d_model // cfg.n_head
    D = len(cfg.layout)
    S = [torch.zeros(len(tokens), cfg.n_head, K, K, dtype=torch.float64)] * D
    past = [[] for _ in range(D)]
    logits = []
    for window, N in zip(tokens.split(cfg.L, 1), passes, strict=True):
        hs = [model.embed.weight[column] for column in window.T]
        began = past
        for _ in range(max(N, 1)):
            past = list(began)
            for i, block in enumerate(model.blocks):
                for t in range(len(hs)):
                    hs[t], S[i], past[i] = token_by_hand(block, cfg, hs[t], S[i], past[i])
        if evict:
            keep = 0 if cfg.eviction == "hard" else cfg.L - 1
            past = [p[len(p) - min(keep, len(p)):] for p in past]
        if N == 0:
            logits += [norm_by_hand(h, model.norm.weight) @ model.head.weight.T for h in hs]
    logits = torch.stack(logits, 1)[:, -targets.shape[1]:]
    return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def test_logits_and_all_gradients_are_those_of_an_independent_model_token_by_token():
    tokens = random_tokens(B=2, T=11)
    for changes in (dict(), dict(eviction="sliding"), dict(layout="ssa", conv="s"),
                    dict(eviction="sliding", layout="as", L=2), dict(layout="as", conv="")):
        model = tiny(**dict(N=3, L=4) | changes)
        windows = math.ceil(11 / model.cfg.L)
        targets = targets_for(tokens, 11 - (windows - 2) * model.cfg.L)    # two windows predict
        targets[0, 1] = -1
        logits, grads = gradients(model, tokens, targets)
        assert set(grads) == {name for name, _ in model.named_parameters()}
        model.zero_grad()
        slow, loss = by_hand(model, tokens, targets, [3] * (windows - 2) + [0, 0])
        loss.backward()
        close(logits, slow, 1e-10)
        for name, p in model.named_parameters():
            error = (grads[name] - p.grad).norm() / p.grad.norm()
            assert error < 1e-8, (name, changes, error)


def test_N_1_is_the_plain_hybrid_and_sliding_eviction_is_attention_to_the_last_L_tokens():
    tokens = random_tokens(B=2, T=11)
    for eviction in EVICTIONS:
        for L in (4, 5, 11, 12):
            model = tiny(N=1, L=L, eviction=eviction)
            all_awake = [0] * math.ceil(11 / L)
            expected, _ = by_hand(model, tokens, tokens, all_awake, evict=eviction == "hard")
            close(model(tokens, tokens)[0], expected, 1e-10)               # every window predicts
            close(model(tokens, tokens[:, -1:])[0], expected[:, -1:], 1e-10)


# ------------------------------------------------------------------------------------------------
# Algorithm 1: sleep, evict, wake, forward, stream

def test_an_answer_takes_one_pass_whatever_N():
    tokens = random_tokens(T=12)
    for N in (1, 2, 5):
        model = tiny(N=N)
        with counted_passes(model) as passes:
            model(tokens, targets_for(tokens, 2))
            assert passes == [5] * 2 * N + [2]         # two windows sleep, two tokens answer
            passes.clear()
            _, state = model.stream(tokens[:, :10])
            assert passes == ([1] * 5 + [5] * N) * 2
            passes.clear()
            model.stream(tokens[:, 10:], state)
            assert passes == [1] * 2


def test_a_window_sleeps_if_it_has_no_target_wherever_it_stands():
    tokens = random_tokens(T=23)
    for eviction in EVICTIONS:
        model = tiny(N=3, eviction=eviction)
        short = targets_for(tokens, 3)
        full = F.pad(short, (20, 0), value=-1)                 # as long as the tokens
        with counted_passes(model) as passes:
            a, loss_a = model(tokens, short)
            b, loss_b = model(tokens, full)
            assert passes == 2 * ([5] * 3 * 4 + [3])
            close(b[:, -3:], a, 1e-12)
            close(loss_b, loss_a, 1e-12)
            assert not b[:, :20].any()                         # asleep it says nothing
            passes.clear()
            middle = full.clone()
            middle[1, 7] = 4                                   # sleep, predict, sleep, predict
            logits, loss = model(tokens, middle)
            assert passes == [5] * 3 + [5] + [5] * 3 * 2 + [3]
        slow, _ = by_hand(model, tokens, middle[:, -3:], [3, 0, 3, 3, 0])
        close(logits[:, -3:], slow, 1e-10)
        one = F.cross_entropy(logits[1, 7][None], middle[1, 7:8])
        rest = F.cross_entropy(logits[:, -3:].flatten(0, 1), short.flatten())
        close(loss, (9 * rest + one) / 10, 1e-10)
        refused("nothing is predicted", model, tokens, torch.full_like(tokens, -100))


def test_every_negative_target_of_every_integer_type_is_nothing():
    model = tiny()
    tokens = random_tokens(T=15)
    targets = targets_for(tokens, 10)
    targets[:, :5] = -1                                        # the second window sleeps, too
    targets[0, 7] = -1
    expected, expected_grads = gradients(model, tokens, targets)
    for nothing in (-1, -100, -7):
        for dtype in (torch.int64, torch.int32, torch.int16, torch.int8):
            other = torch.where(targets < 0, nothing, targets).to(dtype)
            logits, grads = gradients(model, tokens, other)
            assert torch.equal(logits, expected)
            assert all(torch.equal(grads[name], expected_grads[name]) for name in grads)
    positive = targets_for(tokens, 5)
    for dtype in (torch.uint8, torch.uint16, torch.int32):
        assert torch.equal(model(tokens, positive.to(dtype))[1], model(tokens, positive)[1])


def test_tokens_may_be_integers_of_any_type():
    model = tiny()
    tokens = random_tokens()
    expected = model(tokens, targets_for(tokens, 2))[0]
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.uint64):
        assert torch.equal(model(tokens.to(dtype), targets_for(tokens, 2))[0], expected), dtype
        assert torch.equal(model.stream(tokens.to(dtype))[0], model.stream(tokens)[0]), dtype


def test_context_that_shares_a_window_with_an_answer_is_said_in_a_warning():
    model = tiny()                                             # L = 5
    for T, M, expected in ((12, 2, None), (12, 7, None), (13, 3, None), (12, 12, None),
                           (12, 1, "1 tokens of context"), (10, 1, "4 tokens of context")):
        tokens = random_tokens(T=T)
        short = targets_for(tokens, M)
        full = F.pad(short, (T - M, 0), value=-100)            # as long as the tokens
        for targets in (short, full):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                model(tokens, targets)
            if expected is None:
                assert not said, (M, T)
            else:
                text = str(said[0].message)
                assert expected in text and "fill whole windows" in text, text


def test_N_may_be_given_per_call_and_per_window():
    tokens = random_tokens(T=17)
    targets = targets_for(tokens, 2)
    model = tiny(N=2)
    close(model(tokens, targets, N=3)[0], tiny(N=3)(tokens, targets)[0], 1e-12)
    expected = by_hand(model, tokens, targets, [1, 4, 2, 0])[0]
    close(model(tokens, targets, N=[1, 4, 2, 9])[0], expected, 1e-10)
    refused("N has 2 numbers; there are 4", model, tokens, targets, N=[1, 2])


def test_with_0_passes_a_window_is_evicted_unread():
    model = tiny()
    tokens = random_tokens(T=12)
    other = tokens.clone()
    other[:, :10] = random_tokens(T=10, seed=1)
    a = model(tokens, targets_for(tokens, 2), N=0)[0]
    assert torch.equal(a, model(other, targets_for(other, 2), N=0)[0])
    close(a, model(tokens[:, 10:], targets_for(tokens, 2))[0], 1e-12)


def test_streaming_token_by_token_equals_the_forward_pass_over_a_batch():
    for eviction in EVICTIONS:
        for changes in (dict(N=1), dict(N=1, L=4), dict(), dict(layout="ssa"), dict(layout="aa"),
                        dict(L=4, conv=""), dict(L=12), dict(L=13), dict(L=14), dict(L=1),
                        dict(L=2)):
            model = tiny(**dict(N=3, eviction=eviction, layout="asa") | changes)
            tokens = random_tokens(B=2, T=13)
            first, state = model.stream(tokens[:, :7])
            rest, _ = model.stream(tokens[:, 7:], state)
            streamed = torch.cat([first, rest], 1)
            close(streamed, model.stream(tokens)[0], 1e-12)
            for M in {1, 12 % model.cfg.L + 1}:        # one token, and all of the last window
                logits, _ = model(tokens, targets_for(tokens, M))
                close(streamed[:, -M:], logits, 1e-10)


def test_no_token_sees_a_later_one():
    for eviction in EVICTIONS:
        model = tiny(eviction=eviction)
        tokens = random_tokens(T=17)
        for changed in (3, 11, 15):
            other = tokens.clone()
            other[:, changed] = (other[:, changed] + 1) % 7
            a = model(tokens, tokens)[0]                       # every window is awake
            b = model(other, tokens)[0]
            assert torch.equal(a[:, :changed], b[:, :changed])
            assert (a[:, changed:] - b[:, changed:]).abs().amin(0).amax(1).min() > 1e-6


def answers_after_two_pasts(model, lesion):
    """Logits of the same answer window after two different first windows."""
    answer = model.embed(random_tokens(T=3, seed=9))
    logits = []
    for seed in (1, 2):
        h = model.embed(random_tokens(T=5, seed=seed))
        memory = lesion(model.sleep(h, model.empty_memory(3)))
        logits.append(model.wake(answer, memory)[0])
    return logits


def test_under_hard_eviction_the_past_reaches_the_answer_through_S_alone():
    def whole(memory):
        return memory

    def without_S(memory):
        return memory._replace(S=[None if S is None else 0 * S for S in memory.S])

    for changes, lesion, reaches in (
            (dict(), whole, True), (dict(), without_S, False), (dict(N=1), without_S, False),
            (dict(eviction="sliding"), without_S, True), (dict(layout="aaaa", N=3), whole, False)):
        a, b = answers_after_two_pasts(tiny(**changes), lesion)
        if reaches:
            assert (a - b).abs().max() > 1e-3, changes
        else:
            assert torch.equal(a, b), changes


def test_the_gradient_reaches_an_evicted_window_through_S_alone():
    for N in (1, 3):
        for cut in (False, True):
            model = tiny(N=N)
            h = model.embed(random_tokens(T=5)).detach().requires_grad_()
            memory = model.sleep(h, model.empty_memory(3))
            memory = model.sleep(model.embed(random_tokens(T=5, seed=1)).detach(), memory)
            if cut:
                memory = memory._replace(S=[S if S is None else S.detach() for S in memory.S])
            logits, _ = model.wake(model.embed(random_tokens(T=2, seed=2)), memory)
            (grad,) = torch.autograd.grad(logits.square().sum(), h, allow_unused=True)
            if cut:
                assert grad is None
            else:
                assert grad.abs().max() > 1e-6


def test_hard_eviction_keeps_no_token_and_sliding_eviction_the_last_L_minus_1():
    for eviction, kept in (("hard", 0), ("sliding", 4)):
        model = tiny(eviction=eviction)
        memory = model.empty_memory(3)
        for _ in range(2):
            memory = model.sleep(model.embed(random_tokens(T=5)), memory)
        assert memory.n_awake == 0
        for kind, cache in zip(model.cfg.layout, memory.cache):
            assert cache.tail.shape[1] == min(kept, 3)
            if kind == "a":
                assert cache.keys.shape[2] == cache.values.shape[2] == kept


def test_memory_is_a_value_and_calls_do_not_change_it():
    model = tiny()
    h = model.embed(random_tokens(T=5))
    for memory in (model.empty_memory(3), model.wake(h[:, :3], model.empty_memory(3))[1]):
        tensors = [x for x in tree_leaves((memory.S, memory.cache)) if x is not None]
        copies = [x.clone() for x in tensors]
        model.wake(h[:, 3:], memory)
        model.sleep(h, model.evict(memory))
        assert all(map(torch.equal, tensors, copies))


def test_a_window_has_space_for_L_tokens_however_they_arrive():
    for eviction, layout in (("hard", "asas"), ("sliding", "asas"), ("hard", "ss")):
        model = tiny(eviction=eviction, layout=layout)
        h = model.embed(random_tokens())
        empty = model.empty_memory(3)
        for call in (model.wake, model.sleep):
            refused("6 tokens do not fit", call, h[:, :6], empty)
        _, memory = model.wake(h[:, :3], model.sleep(h[:, :5], empty))
        refused("after 3 that were read awake", model.wake, h[:, :3], memory)
        refused("after 3 that were read awake", model.sleep, h[:, :2], memory)
        model.wake(h[:, :2], memory)
        memory = empty
        for t in range(5):                                     # L single tokens
            _, memory = model.wake(h[:, t:t + 1], memory)
        refused("after 5 that were read awake", model.wake, h[:, :1], memory)


def test_recomputed_passes_have_the_same_gradients_and_keep_less():
    tokens = random_tokens(T=42)
    for eviction in EVICTIONS:
        losses = []
        grads = []
        kept = []
        for recompute in (False, True):
            model = tiny(N=3, layout="as", eviction=eviction)
            f = sleep.make_gradients(model, False, recompute)
            sizes = []

            def keep(x):
                sizes.append(x.numel())
                return x

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                losses.append(f(tokens, targets_for(tokens, 2), None))
            grads.append([p.grad for p in model.parameters()])
            kept.append(sum(sizes))
        assert torch.equal(*losses)
        assert kept[1] < 0.1 * kept[0], kept
        for plain, recomputed in zip(*grads):
            close(recomputed, plain, 1e-12)


# ------------------------------------------------------------------------------------------------
# Precision

def test_bfloat16_is_for_the_matrix_products_and_the_rule_stays_float32():
    tokens = random_tokens(T=5)
    exact = tiny().float()
    model = tiny(bf16=True).float()
    dtypes = set()
    rule = sleep.gated_delta_rule_chunked

    def spy(q, k, v, log_alpha, beta, S, delta):
        dtypes.update(x.dtype for x in (q, k, v, log_alpha, beta, S))
        return rule(q, k, v, log_alpha, beta, S, delta)

    with patched(sleep, "gated_delta_rule_chunked", spy):
        logits, loss = model(tokens, targets_for(tokens, 2))
    assert dtypes == {torch.float32} == {logits.dtype, loss.dtype}
    expected = exact(tokens, targets_for(tokens, 2))[0]
    assert (logits != expected).any()
    close(logits, expected, 0.03)                              # 4 blocks with 8 bits of mantissa


def test_the_weights_may_be_bfloat16_or_float16_and_S_stays_float32():
    tokens = random_tokens(T=12)
    targets = targets_for(tokens, 2)
    exact = tiny().float()
    for dtype, tolerance in ((torch.bfloat16, 0.06), (torch.float16, 0.01)):
        model = tiny().to(dtype)
        try:
            logits, grads = gradients(model, tokens, targets)
        except RuntimeError as e:
            if "not implemented for 'Half'" not in str(e):
                raise
            print("skipped: weights in float16, which this torch cannot multiply on a CPU")
            continue
        expected, expected_grads = gradients(exact, tokens, targets)
        close(logits.float(), expected, tolerance)
        assert set(grads) == set(expected_grads)
        assert all(grad.isfinite().all() for grad in grads.values())
        streamed, (memory, *_) = model.stream(tokens)
        close(streamed[:, -2:].float(), expected, tolerance)
        assert {S.dtype for S in memory.S if S is not None} == {torch.float32}


def test_training_inside_another_autocast_is_training_outside_of_it():
    losses = []
    for outer in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16),
                  torch.autocast("cpu", enabled=False)):
        model = tiny(bf16=True, layout="as").float()
        optimizers = sleep.make_optimizers(model, 1e-2, 1e-2)
        tokens = random_tokens(T=11)
        with outer:
            for _ in range(12):
                model.zero_grad()
                loss = model(tokens, tokens[:, :1])[1]
                with torch.autocast("cpu", enabled=False):     # as PyTorch advises for backward
                    loss.backward()
                    for optimizer in optimizers:
                        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == losses[1] == losses[2], losses


# ------------------------------------------------------------------------------------------------
# The layers and the update rules

def test_the_four_update_rules_are_two_switches():
    x = torch.randn(1, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    states = []
    for name in sleep.UPDATE_RULES:
        mixer = tiny(update_rule=name).blocks[1].mixer
        k = F.normalize(sleep.split_heads(F.silu(mixer.k(x)), 2), dim=-1)
        v = sleep.split_heads(F.silu(mixer.v(x)), 2)
        a, b = mixer.ab(x).transpose(1, 2).chunk(2, 1)
        log_alpha = -mixer.A_log.exp()[:, None] * F.softplus(a + mixer.dt_bias[:, None])
        if "gated" not in name:
            log_alpha = 0 * log_alpha
        _, S = sleep.gated_delta_rule(v, k, v, log_alpha, b.sigmoid(), zero, delta="delta" in name)
        close(mixer(x, zero)[1], S, 1e-12)
        assert all((S - other).abs().max() > 1e-3 for other in states)
        states.append(S)
    assert len(states) == 4


class PerChannel(sleep.FastWeights):
    """Kimi Delta Attention's decay: one alpha for each channel of the key."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.a = torch.nn.Linear(cfg.d_model, cfg.d_model, bias=False)

    def write_and_read(self, x, q, k, v, S):
        alpha = sleep.split_heads(self.a(x), self.H).sigmoid()             # (B, H, T, K)
        beta = self.ab(x).transpose(1, 2)[:, self.H:].sigmoid()            # (B, H, T)
        outputs = []
        for t in range(x.shape[1]):
            S = S * alpha[:, :, t, None]
            lacks = v[:, :, t] - (S @ k[:, :, t, :, None]).squeeze(-1)
            S = S + beta[:, :, t, None, None] * lacks[..., None] * k[:, :, t, None]
            outputs.append((S @ q[:, :, t, :, None]).squeeze(-1))
        return torch.stack(outputs, 2), S


def test_a_new_update_rule_is_one_class_and_its_name():
    refused("update_rule 'per_channel' must be one of", Config, 7, 20, 5, update_rule="per_channel")
    with patched(sleep, "UPDATE_RULES", sleep.UPDATE_RULES | dict(per_channel=PerChannel)):
        model = tiny(update_rule="per_channel", N=3)
        tokens = random_tokens(T=12)
        logits, grads = gradients(model, tokens, targets_for(tokens, 2))
        close(model.stream(tokens)[0][:, -2:], logits, 1e-10)
        assert grads["blocks.1.mixer.a.weight"].abs().max() > 1e-6
        muon, _ = sleep.make_optimizers(model, 1e-3, 1e-3)
        assert any(p is model.blocks[1].mixer.a.weight for p in muon.param_groups[0]["params"])
        assert settings(train_ca, "--update_rule per_channel").update_rule == "per_channel"


# ------------------------------------------------------------------------------------------------
# What is passed in is checked

def test_tokens_targets_and_features_that_do_not_fit_are_refused_in_a_sentence():
    model = tiny()
    tokens = random_tokens()
    targets = targets_for(tokens, 1)
    for wrong in (tokens + 1, tokens - 1, tokens[0], tokens[:, :0], tokens[:0], tokens.double(),
                  tokens > 3):
        refused("integers from 0 to 6", model, wrong, targets)
        refused("integers from 0 to 6", model.stream, wrong)
    for wrong in (tokens.tolist(), tokens.numpy(), None):
        refused("torch.as_tensor(tokens)", model, wrong, targets)
        refused("torch.as_tensor(tokens)", model.stream, wrong)
    refused("M from 1 to T", model, tokens, targets_for(tokens, 18))
    refused("M from 1 to T", model, tokens, targets[:, :0])
    refused("M from 1 to T", model, tokens, targets[:, 0])
    refused("M from 1 to T", model, tokens, targets[:2])
    refused("(B, M) integers", model, tokens, targets.float())
    refused("(B, M) integers", model, tokens, targets > 3)
    refused("below 7, the size of the vocabulary", model, tokens, targets + 7)
    for wrong in (targets.tolist(), targets.numpy(), None):
        refused("torch.as_tensor(targets)", model, tokens, wrong)
    for call in (model.sleep, model.wake):
        empty = model.empty_memory(3)
        refused("h must be features (B, T, 16)", call, tokens, empty)
        refused("h must be features (B, T, 16)", call, tokens.tolist(), empty)
        refused("h must be features (B, T, 16)", call, model.embed(tokens)[..., :8], empty)
        refused("at least one token", call, model.embed(tokens)[:, :0], empty)


def test_memory_of_another_model_or_batch_is_refused_in_a_sentence():
    model = tiny()
    tokens = random_tokens(T=5)
    h = model.embed(tokens)
    for other in (tiny(layout="as"), tiny(layout="asasas"), tiny(layout="sasa"), tiny(d_model=32),
                  tiny(n_head=4)):
        empty = other.empty_memory(3)
        for memory in (empty, other.sleep(other.embed(tokens), empty)):
            for call in (model.wake, model.sleep):
                refused("this memory is of a model with layout", call, h, memory)
        state = other.stream(tokens)[1]
        refused("this memory is of a model with layout", model.stream, tokens, state)
    refused("belongs to a batch of 2", model.wake, h, model.empty_memory(2))
    refused("belongs to a batch of 2", model.stream, tokens, model.stream(tokens[:2])[1])


def test_the_method_stands_alone_before_the_line_where_it_ends():
    text = (HERE / "sleep.py").read_text(encoding="utf-8")
    method, line, _ = text.partition("# The method ends here.")
    assert line
    alone = type(sys)("alone")
    with patched(sys, "modules", sys.modules | dict(alone=alone)):         # a dataclass looks there
        exec(method, alone.__dict__)
        torch.manual_seed(0)
        model = alone.SleepLM(alone.Config(7, 20, 5))
    tokens = random_tokens()
    assert model(tokens, targets_for(tokens, 2))[0].shape == (3, 2, 7)


def test_sleep_py_copied_alone_imports_and_says_what_its_demonstration_lacks():
    with tempfile.TemporaryDirectory() as place:
        shutil.copy(HERE / "sleep.py", place)
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run([sys.executable, "sleep.py"], cwd=place, env=env, capture_output=True,
                              text=True)
        assert done.returncode == 1
        assert "lab/" in done.stderr and done.stderr.count("\n") == 1, done.stderr


# ------------------------------------------------------------------------------------------------
# Training one model

class Echo:
    """A small task of three windows: the first token is asked for at the end."""
    name = "echo"
    vocab_size = 5
    T = 9

    def __init__(self, args, seed):
        self.seed = seed
        self.batch_size = args.batch_size
        self.test = self.make_batch(-1)
        self.chance = dict(right=0.2)

    def make_batch(self, step):
        g = torch.Generator().manual_seed(self.seed * 10 ** 9 + step + 1)
        tokens = torch.randint(5, (self.batch_size, 9), generator=g)
        return tokens, tokens[:, :1]

    def score(self, tokens, targets, logits):
        return dict(right=(logits.argmax(-1) == targets).float().mean().item())


ECHO = {"cpu": dict(N=[1], L=4, layout="sa", d_model=16, n_head=2, steps=8, batch_size=8,
                    lr_muon=0.01, lr_adamw=0.01, eval_every=4)}


def echo(command, Task=Echo, **kwargs):
    argv = shlex.split(f"--device cpu {command}")
    return run(partial(sleep.main, "", ECHO, {}, Task, argv, **kwargs))


def echo_plan(flags=""):
    """Task, Config and settings of one model."""
    _, args = sleep.parse("", ECHO, {}, shlex.split(f"--device cpu {flags}"))
    return sleep.plan(args, Echo)[0]


def weights(out, name="N1-seed0.pt"):
    return torch.load(out / name, weights_only=True)["model"]


def a_run(out, name="N1-seed0.json"):
    return json.loads((out / name).read_text(encoding="utf-8"))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextlib.contextmanager
def spied_gradients(after):
    """after(model, loss) is called after every backward pass of a training step."""
    make = sleep.make_gradients

    def make_and_spy(model, compile, recompute):
        f = make(model, compile, recompute)

        def g(tokens, targets, N):
            loss = f(tokens, targets, N)
            after(model, loss)
            return loss
        return g

    with patched(sleep, "make_gradients", make_and_spy):
        yield


@contextlib.contextmanager
def spied_sleep():
    """Whether gradients are on, and N, of every sleep of any model, as a list that grows."""
    original = SleepLM.sleep
    calls = []

    def spy(self, h, memory, N=None):
        calls.append((torch.is_grad_enabled(), N))
        return original(self, h, memory, N)

    with patched(SleepLM, "sleep", spy):
        yield calls


def test_every_N_starts_from_the_same_weights_and_every_seed_from_others():
    embeddings = {}
    for seed in (0, 1):
        for N in (1, 2):
            task, cfg, settings = echo_plan(f"--N {N} --seed {seed}")
            model, _, _ = sleep.begin(task, cfg, settings, Path("nothing.pt"))
            embeddings[seed, N] = model.embed.weight
    assert torch.equal(embeddings[0, 1], embeddings[0, 2])
    assert torch.equal(embeddings[1, 1], embeddings[1, 2])
    assert not torch.equal(embeddings[0, 1], embeddings[1, 1])


def test_every_N_sees_the_same_batches_and_no_batch_of_one_seed_is_one_of_another():
    flags = {train_ca: "--batch_size 8", train_khop: "--preset paper --batch_size 8",
             train_gsm: "--tests 40 --batch_size 8"}
    for module in TASKS:
        a = built(module, f"{flags[module]} --N 1", 0)
        b = built(module, f"{flags[module]} --N 2", 0)
        c = built(module, f"{flags[module]} --N 1", 1)
        assert all(map(torch.equal, a.test, c.test))
        assert all(map(torch.equal, a.make_batch(5), b.make_batch(5)))     # whatever came before
        seen = [task.make_batch(step)[0] for task in (a, c) for step in range(6)]
        for i, x in enumerate(seen):
            for y in seen[:i]:
                assert x.shape != y.shape or not torch.equal(x, y)


def test_the_curve_has_the_mean_loss_and_the_largest_gradient_norm_of_each_interval():
    losses = []
    norms = []

    def note(model, loss):
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if len(losses) in (1, 4, 6):                           # the largest is not the last one
            for grad in grads:
                grad *= 10
        losses.append(loss.item())
        norms.append(sum(grad.square().sum().item() for grad in grads) ** 0.5)

    with folder() as out, spied_gradients(note):
        task, cfg, settings = echo_plan("--eval_every 3")
        *_, run = sleep.train(task, cfg, settings, out / "N1-seed0.pt")
    for entry, (first, last) in zip(run["curve"], ((0, 3), (3, 6), (6, 8)), strict=True):
        mean = sum(losses[first:last]) / (last - first)
        assert entry["step"] == last
        assert entry["tokens"] == last * 8 * 9
        assert math.isclose(entry["train_loss"], mean, rel_tol=1e-5)
        assert math.isclose(entry["grad_norm"], max(norms[first:last]), rel_tol=1e-5)


def test_a_loss_or_a_weight_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint():
    make = sleep.make_optimizers
    for bad_step in (6, 8):                # in step 8 the loss is still finite, a weight is not

        def explode(model, *rates):
            optimizers = make(model, *rates)
            step = optimizers[1].step
            count = []

            def stepped():
                step()
                count.append(1)
                if len(count) == bad_step:
                    model.blocks[0].up.weight.data[0, 0] = torch.nan
            optimizers[1].step = stepped
            return optimizers

        with folder() as out:
            with patched(sleep, "make_optimizers", explode):
                status, _, err = echo(f"--out {out}")
            assert status == 2 and "not finite after step 8; step 4 is kept" in err, err
            assert a_run(out)["steps"] == 4
            assert all(p.isfinite().all() for p in weights(out).values())


def test_N_may_be_drawn_for_every_step_and_is_tested_with_its_own():
    def draw_N(step, settings):
        return 1 + step % settings["N"]

    with folder() as out, spied_sleep() as calls:
        status, _, err = echo(f"--N 3 --out {out}", draw_N=draw_N)
        assert status == 0, err
    trained = [N for learning, N in calls if learning]
    assert trained[::2] == [1, 2, 3, 1, 2, 3, 1, 2]            # two windows sleep
    assert {N for learning, N in calls if not learning} == {None}


def test_a_script_may_bring_its_own_model():
    class Wider(SleepLM):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.extra = torch.nn.Parameter(torch.zeros(1000))

    with folder() as out:
        status, text, err = echo(f"--out {out}", make_model=lambda cfg, settings: Wider(cfg))
        assert status == 0, err
        task, cfg, _ = echo_plan()
        parameters = 1000 + sum(p.numel() for p in SleepLM(cfg).parameters())
        assert a_run(out)["parameters"] == parameters
        assert f"{parameters:,} parameters" in text


def test_a_model_is_scored_in_evaluation_mode_and_trained_in_training_mode():
    modes = []

    class Moody(SleepLM):
        def one_pass(self, h, S, cache):
            modes.append((torch.is_grad_enabled(), self.training))
            return super().one_pass(h, S, cache)

    with folder() as out:
        status, _, err = echo(f"--out {out}", make_model=lambda cfg, settings: Moody(cfg))
        assert status == 0, err
    assert set(modes) == {(True, True), (False, False)}
    model = Moody(echo_plan()[1]).eval()                       # and it is left as it was
    task, *_ = echo_plan()
    sleep.evaluate(model, task, task.test)
    assert not model.training


def test_the_test_is_read_with_the_N_that_is_asked_for():
    with folder() as out, spied_sleep() as calls:
        status, text, err = echo(f"--N 1 --N_test 4 0 --out {out}")
        assert status == 0, err
        assert [N for learning, N in calls if not learning][-4:] == [4, 4, 0, 0]
        assert "tested with N = 4" in text and set(a_run(out)["N_test"]) == {"0", "4"}
    task, cfg, _ = echo_plan()
    model = tiny(vocab_size=5, L=4).float()
    results = [sleep.evaluate(model, task, task.test, N) for N in range(6)]
    assert len({result["right"] for result in results}) > 1    # and it makes a difference


def test_an_evaluation_in_parts_is_that_of_the_whole_batch():
    task, *_ = echo_plan("--batch_size 40")
    model = tiny(vocab_size=5, L=4, layout="s", N=1).float()
    tokens, targets = task.test
    many = tokens.repeat(500, 1), targets.repeat(500, 1)       # 180,000 tokens, read in two parts
    whole = sleep.evaluate(model, task, task.test)
    assert math.isclose(sleep.evaluate(model, task, many)["right"], whole["right"], rel_tol=1e-5)


def test_the_warm_up_trains_the_ssm_blocks_alone_with_hard_eviction_then_all_with_sliding():
    states = []

    def note(model, loss):
        state = {name: p.detach().clone() for name, p in model.named_parameters()}
        states.append((model.cfg.eviction, state))

    with folder() as out, spied_gradients(note):
        status, _, err = echo(f"--N 2 --layout asas --eviction sliding --warmup 4 --out {out}")
        assert status == 0, err
        last = weights(out, "N2-seed0.pt")
    assert [eviction for eviction, _ in states] == ["hard"] * 4 + ["sliding"] * 4
    first, middle = states[0][1], states[4][1]
    for name in last:
        attention = name.startswith(("blocks.0", "blocks.2"))
        assert torch.equal(first[name], middle[name]) == attention, name
        assert not torch.equal(middle[name], last[name]), name


def test_every_optimizer_steps_with_its_own_rate_that_cools_down():
    make = sleep.make_optimizers
    rates = ([], [])

    def spy(model, *args):
        optimizers = make(model, *args)
        for kept, optimizer in zip(rates, optimizers, strict=True):
            def step(kept=kept, group=optimizer.param_groups[0], original=optimizer.step):
                kept.append(group["lr"])
                original()
            optimizer.step = step
        return optimizers

    with folder() as out, patched(sleep, "make_optimizers", spy):
        status, _, err = echo(f"--cooldown 0.5 --lr_muon 0.5 --lr_adamw 0.25 --out {out}")
        assert status == 0, err
    assert rates[0] == [0.5 * x for x in (1, 1, 1, 1, 1, 0.75, 0.5, 0.25)]
    assert rates[1] == [0.25 * x for x in (1, 1, 1, 1, 1, 0.75, 0.5, 0.25)]


def test_one_adamw_in_the_place_of_both_optimizers_runs_at_its_own_rates():
    def one(model, lr_muon, lr_adamw):
        groups = [dict(params=list(model.blocks.parameters()), lr=0.125),
                  dict(params=[model.embed.weight, model.norm.weight, model.head.weight])]
        return [torch.optim.AdamW(groups, lr=0.0625)]

    with patched(sleep, "make_optimizers", one):
        task, cfg, settings = echo_plan("--lr_muon 0.5 --lr_adamw 0.25 --cooldown 0.5")
        model, optimizers, _ = sleep.begin(task, cfg, settings, Path("nothing.pt"))
    for step, share in ((0, 1), (6, 0.5), (7, 0.25), (1, 1)):
        sleep.set_phase(model, optimizers, settings, step)
        rates = [group["lr"] for group in optimizers[0].param_groups]
        assert rates == [0.125 * share, 0.0625 * share]


def test_muon_has_the_matrices_of_the_blocks_adamw_the_rest_and_nothing_decays():
    model = tiny()
    muon, adamw = sleep.make_optimizers(model, 0.1, 0.2)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {names[id(p)] for p in muon.param_groups[0]["params"]}
    rest = {names[id(p)] for p in adamw.param_groups[0]["params"]}
    assert not matrices & rest and matrices | rest == set(names.values())
    assert "blocks.1.mixer.q.weight" in matrices and "blocks.0.up.weight" in matrices
    assert {"embed.weight", "head.weight", "blocks.0.conv.weight", "blocks.1.mixer.dt_bias"} <= rest
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    muon.step()
    adamw.step()
    assert same(before, model.state_dict())                    # a weight without a gradient stays


def test_muon_is_that_of_torch_up_to_the_rounding_of_bfloat16_and_orthogonalises():
    g = torch.Generator().manual_seed(0)
    shapes = ((8, 8), (8, 8), (32, 8), (8, 32), (2, 8))
    first = [torch.randn(*shape, generator=g) for shape in shapes]
    ours = [torch.nn.Parameter(x.clone()) for x in first]
    theirs = [torch.nn.Parameter(x.clone()) for x in first]
    muon = sleep.Muon(ours, dict(lr=0.01))
    torchs = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.0)
    for step in range(10):
        for i, (a, b) in enumerate(zip(ours, theirs)):
            frozen = i == 1 and step < 3
            a.grad = None if frozen else torch.randn(*a.shape, generator=g)
            b.grad = a.grad
        before = [a.detach().clone() for a in ours]
        muon.step()
        torchs.step()
        for a, b, old in zip(ours, theirs, before):
            assert (a - b).abs().max() < 1e-3
            if a.grad is None:
                assert torch.equal(a, old)
            else:
                scale = 0.01 * max(1, len(a) / a.shape[1]) ** 0.5
                values = torch.linalg.svdvals((old - a) / scale)
                assert 0.6 < values.median() and values.max() < 1.3, values


# ------------------------------------------------------------------------------------------------
# Compiled blocks

def compiled_with(backend):
    """torch.compile without code for a machine: no compiler is needed."""
    original = torch.compile
    return patched(torch, "compile", lambda f, **kwargs: original(f, backend=backend, **kwargs))


def compiled_and_plain(backend, N, T, layout, eviction, recompute):
    """Loss and gradients of a step, compiled and plain, and the number of graphs."""
    from torch._dynamo.testing import CompileCounterWithBackend
    torch._dynamo.reset()
    sleep.set_up_torch("cpu")
    counter = CompileCounterWithBackend(backend)
    tokens = random_tokens(T=T)
    results = []
    for compile in (True, False):
        model = tiny(layout=layout, eviction=eviction)
        with compiled_with(counter):
            f = sleep.make_gradients(model, compile, recompute)
            loss = f(tokens, targets_for(tokens, 5), N)
        results.append([loss] + [p.grad for p in model.parameters()])
    torch._dynamo.reset()
    return *results, counter.frame_count


def test_compiled_blocks_are_the_plain_ones_and_neither_N_nor_windows_nor_layers_add_graphs():
    for eviction, recompute, backend in (("hard", False, "aot_eager_decomp_partition"),
                                         ("sliding", True, "eager")):
        compiled, plain, graphs = compiled_and_plain(backend, 2, 15, "as", eviction, recompute)
        for x, y in zip(compiled, plain, strict=True):
            close(x, y, 1e-10)
        *_, more = compiled_and_plain("eager", 3, 20, "asas", eviction, recompute)
        assert 0 < graphs == more <= 8, (eviction, graphs, more)


def test_attention_that_thaws_after_a_warm_up_gets_its_gradients_when_it_is_compiled():
    sleep.set_up_torch("cpu")
    torch._dynamo.reset()
    tokens = random_tokens(T=5)
    models = [tiny(), tiny()]
    with compiled_with("aot_eager"):
        compiled = sleep.make_gradients(models[0], True, False)
        plain = sleep.make_gradients(models[1], False, False)
        for step in range(4):
            for model in models:
                for block in model.blocks:
                    block.requires_grad_(block.kind == "s" or step >= 2)
            compiled(tokens, tokens, 2)
            plain(tokens, tokens, 2)
            for (name, p), q in zip(models[0].named_parameters(), models[1].parameters()):
                assert (p.grad is None) == (q.grad is None), (step, name)
                if q.grad is not None:
                    close(p.grad, q.grad, 1e-10)
    torch._dynamo.reset()


def test_a_copy_an_average_and_a_pickle_of_a_compiled_model_compute_with_their_own_weights():
    sleep.set_up_torch("cpu")
    tokens = random_tokens(T=10)
    targets = targets_for(tokens, 5)
    for recompute in (False, True):
        torch._dynamo.reset()
        model = tiny(layout="as")
        with compiled_with("eager"):
            sleep.make_gradients(model, True, recompute)(tokens, targets, 2)
            copied = copy.deepcopy(model)
            averaged = torch.optim.swa_utils.AveragedModel(model)
            pickled = pickle.loads(pickle.dumps(model))
            for other in (copied, averaged.module, pickled):
                with torch.no_grad():
                    for p in other.parameters():
                        p *= 1.1
                fresh = tiny(layout="as")
                fresh.load_state_dict(other.state_dict())
                logits, grads = gradients(other, tokens, targets)
                expected, expected_grads = gradients(fresh, tokens, targets)
                close(logits, expected, 1e-10)
                assert (logits - model(tokens, targets)[0]).abs().max() > 1e-3
                for name, grad in expected_grads.items():
                    close(grads[name], grad, 1e-8)
    torch._dynamo.reset()


def test_a_step_that_is_compiled_for_this_machine_is_the_plain_step():
    missing = sleep.why_no_compile("cpu")
    if missing:
        print(f"skipped: blocks compiled for this CPU, since {missing}")
        return
    sleep.set_up_torch("cpu")
    torch._dynamo.reset()
    tokens = random_tokens(T=10)
    losses = []
    grads = []
    for compile in (False, True):
        model = tiny(layout="s")
        f = sleep.make_gradients(model, compile, False)
        losses.append(f(tokens, targets_for(tokens, 5), 1))
        grads.append([p.grad for p in model.parameters()])
    close(losses[1], losses[0], 1e-10)
    for plain, compiled in zip(*grads, strict=True):
        close(compiled, plain, 1e-8)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------
# The machine

@contextlib.contextmanager
def machine(gpu=None, archs=("sm_75", "sm_80", "sm_90"), mps=False, triton=True,
            compilers=("g++", "gcc"), headers=True, python_too_new=False):
    """A machine as torch would see it. gpu: the capability of its GPU, (8, 0) for an A100."""
    sleep.set_up_torch("cpu")              # imports the compiler, which looks at the true machine
    compile = torch.compile

    def compile_here(*args, **kwargs):
        if python_too_new:
            raise RuntimeError("torch.compile is not supported on Python 3.99+\nmore lines")
        return compile(*args, **kwargs)

    def is_bf16_supported(including_emulation=True):
        return gpu is not None and (gpu >= (8, 0) or including_emulation)

    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    with contextlib.ExitStack() as stack:
        include = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if headers:
            (include / "Python.h").touch()
        for place, name, value in (
                (torch.cuda, "is_available", lambda: gpu is not None),
                (torch.cuda, "device_count", lambda: int(gpu is not None)),
                (torch.cuda, "get_device_capability", lambda device=None: gpu),
                (torch.cuda, "get_device_name", lambda device=None: "a GPU"),
                (torch.cuda, "get_arch_list", lambda: list(archs)),
                (torch.cuda, "is_bf16_supported", is_bf16_supported),
                (torch.backends.mps, "is_available", lambda: mps),
                (torch, "compile", compile_here),
                (sleep, "find_spec", lambda name: object() if triton else None),
                (sleep.shutil, "which", lambda name: name if name in compilers else None),
                (sleep.sysconfig, "get_paths", lambda: dict(include=str(include))),
                (os, "environ", environment)):
            stack.enter_context(patched(place, name, value))
        yield


P100 = (6, 0)
T4 = (7, 5)
A100 = (8, 0)


def test_the_machine_decides_device_bfloat16_and_compiling():
    for here, device, bf16, compiled, words in (
            (dict(), "cpu", False, False, ""),
            (dict(compilers=()), "cpu", False, False, "there is no C++ compiler"),
            (dict(compilers=("clang++",)), "cpu", False, False, ""),
            (dict(headers=False), "cpu", False, False, "the headers of Python are missing"),
            (dict(python_too_new=True), "cpu", False, False, "cannot compile here"),
            (dict(mps=True), "cpu", False, False, ""),         # MPS only when it is asked for
            (dict(gpu=T4), "cuda", False, True, ""),
            (dict(gpu=A100), "cuda", True, True, ""),
            (dict(gpu=A100, triton=False), "cuda", True, False, "Triton is not installed"),
            (dict(gpu=A100, compilers=("g++",)), "cuda", True, False, "there is no C compiler"),
            (dict(gpu=A100, python_too_new=True), "cuda", True, False, "cannot compile here"),
            (dict(gpu=P100, archs=("sm_60", "sm_80")), "cuda", False, False, "too old for Triton")):
        with machine(**here):
            assert sleep.choose_device() == device, here
            assert sleep.has_bf16(device) == bf16, here
            why = sleep.why_no_compile(device)
            assert words in why and bool(words) == bool(why) and "\n" not in why, (here, why)
            assert sleep.parse("", ECHO, {}, [])[1].compile == compiled, here
            if words:
                status, _, err = run(sleep.parse, "", ECHO, {}, ["--compile"])
                assert status == 2 and words in err and err.count("\n") == 1, (here, err)
                assert not sleep.parse("", ECHO, {}, ["--no-compile"])[1].compile


def test_a_device_that_is_not_there_is_refused_in_a_sentence():
    with machine(mps=True):
        assert sleep.choose_device("mps") == "mps"
        assert "MPS" in sleep.why_no_compile("mps") and not sleep.has_bf16("mps")
    with machine(gpu=A100):
        assert sleep.choose_device("cuda:0") == "cuda:0" and sleep.choose_device("cpu") == "cpu"
        refused("there is no device 'cuda:1' here", sleep.choose_device, "cuda:1")
    with machine(gpu=P100):
        refused("no kernels for the GPU a GPU (sm_60; it was built for sm_75", sleep.choose_device)
        status, _, err = run(sleep.parse, "", ECHO, {}, [])
        assert status == 2 and "take --device cpu" in err and err.count("\n") == 1
        assert sleep.choose_device("cpu") == "cpu"
    with machine():
        for device in ("cuda", "mps", "tpu", "xpu", "cpu:x"):
            refused(f"there is no device '{device}' here", sleep.choose_device, device)
        with patched(torch.version, "cuda", "12.8"):
            refused("is the driver too old?", sleep.choose_device, "cuda")


@contextlib.contextmanager
def device_without_data():
    """torch's "meta" in the place of a GPU: a tensor of the CPU that slips in is refused."""
    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls, "cpu")

    class OneDevice(TorchDispatchMode):    # "meta" alone would take indices of the CPU
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            tensors = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x) and x.ndim]
            there = {x.device.type for x in tensors}
            assert len(there) < 2 or f.overloadpacket == torch.ops.aten.copy_, f"{f} of {there}"
            return f(*args, **kwargs)

    def no_autocast(*args, **kwargs):
        return contextlib.nullcontext()

    with patched(torch, "Generator", Generator), patched(torch, "autocast", no_autocast), patched(
            sleep, "check_tokens", lambda *args: None), OneDevice():
        yield


def a_step_on_meta(module, task, args, eviction):
    if module is train_gsm:
        task.args = copy.copy(args)
        task.args.device = "meta"
    task.device = "meta"
    tokens, targets, *facts = task.make_batch(0)
    assert all(x.device.type == "meta" for x in (tokens, targets, *facts))
    values = {flag: getattr(args, flag) for flag in sleep.MODEL_FLAGS}
    cfg = Config(task.vocab_size, task.T, **values | dict(N=2, eviction=eviction))
    model = SleepLM(cfg).to("meta")
    windows = math.ceil(tokens.shape[1] / cfg.L)
    model.algorithm_1(tokens, targets, [True] * (windows - 1) + [False])[1].backward()
    for optimizer in sleep.make_optimizers(model, 0.1, 0.1):
        optimizer.step()


def test_no_tensor_of_a_batch_or_a_step_is_made_on_another_device():
    for module, flags, eviction in (
            (train_ca, "--batch_size 8", "hard"), (train_ca, "--batch_size 8", "sliding"),
            (train_khop, "--batch_size 8", "sliding"),
            (train_khop, "--words --feed --L 24 --n_law law --batch_size 8", "hard"),
            (train_gsm, "--tests 40 --batch_size 4", "hard")):
        args = settings(module, flags)
        task = TASKS[module](args, 0)
        with device_without_data():
            a_step_on_meta(module, task, args, eviction)
    with device_without_data():
        args = settings(train_ca, "--batch_size 8")
        task = TASKS[train_ca](args, 0)
        of_the_cpu = torch.zeros(1, dtype=torch.long)
        with patched(train_ca, "evolve", lambda cells, rule, t: cells + of_the_cpu):
            try:
                a_step_on_meta(train_ca, task, args, "hard")
            except (AssertionError, RuntimeError) as e:
                assert "meta" in str(e)
            else:
                raise LookupError("a tensor of the CPU was not noticed")


# ------------------------------------------------------------------------------------------------
# Files: checkpoints, --resume

def stop_at(step, number=signal.SIGINT):
    """A task that is stopped by a signal at a step."""
    class Stopped(Echo):
        def make_batch(self, now):
            if now == step:
                os.kill(os.getpid(), number)
                time.sleep(1)
            return super().make_batch(now)
    return Stopped


def test_a_resumed_run_is_a_straight_run_whatever_stopped_it():
    def draw_N(step, settings):
        steps.append(step)
        return 1 + (step // 4 + step) % 2

    with folder() as a, folder() as b:
        flags = "--eval_every 2 --cooldown 0.5 --N_test 3"
        steps = []
        assert echo(f"{flags} --out {a}", draw_N=draw_N)[0] == 0
        b.mkdir()
        for number in (signal.SIGINT, signal.SIGTERM):
            stopped = stop_at(5, number)
            status, text, err = echo(f"{flags} --out {b} --resume", stopped, draw_N=draw_N)
            assert status == 130 and f"same command with --resume --out {b}" in err, err
            assert a_run(b)["steps"] == 4 and not same(weights(a), weights(b))
        saved = torch.load(b / "N1-seed0.pt", weights_only=True)
        saved["run"]["seconds"] = 1000.0
        torch.save(saved, b / "N1-seed0.pt")
        steps = []
        status, text, err = echo(f"{flags} --out {b} --resume", draw_N=draw_N)
        assert status == 0 and "step 4 of 8" in text, err
        assert steps == [4, 5, 6, 7]
        assert same(weights(a), weights(b))
        straight = a_run(a)
        resumed = a_run(b)
        assert resumed.pop("seconds") > 1000 > straight.pop("seconds")     # those before count, too
        assert resumed == straight
        assert [entry["step"] for entry in resumed["curve"]] == [2, 4, 6, 8]


def test_a_finished_model_is_tested_with_other_N_without_training_again():
    with folder() as out:
        assert echo(f"--out {out}")[0] == 0
        before = weights(out)
        tests = []
        evaluate = sleep.evaluate

        def spy(model, task, batch, N=None):
            tests.append(N)
            return evaluate(model, task, batch, N)

        with patched(sleep, "evaluate", spy):
            for flags in ("--N_test 1 4", "--N_test 4 2", ""):
                status, text, _ = echo(f"--out {out} --resume {flags}")
                assert status == 0 and "step 8 of 8" in text
        assert tests == [1, 4, 2] and set(a_run(out)["N_test"]) == {"1", "2", "4"}
        assert a_run(out)["N_test"]["1"]["right"] == a_run(out)["right"]
        assert same(before, weights(out))
        assert echo(f"--N 1 2 --out {out} --resume")[0] == 0
        assert set(a_run(out)["N_test"]) == {"1", "2", "4"}    # nothing finished is lost
        assert "N_test" not in a_run(out, "N2-seed0.json")


def test_resume_refuses_every_setting_that_differs_or_that_one_side_lacks():
    task, cfg, settings = echo_plan()
    run = dict(task="echo", settings=dict(settings))
    path = Path("N1-seed0.pt")
    sleep.refuse_other_settings(path, run, task, settings)
    assert {"N", "seed", "L", "layout", "lr_muon", "lr_adamw", "steps", "device"} <= set(settings)
    for flag in settings:
        less = {name: value for name, value in settings.items() if name != flag}
        changes = [dict(settings, **{flag: "another"}), less]
        for changed in changes:
            if flag in ("compile", "recompute"):               # the numbers do not depend on them
                sleep.refuse_other_settings(path, run, task, changed)
                continue
            refused(f"{flag} was", sleep.refuse_other_settings, path, run, task, changed)
            other = dict(run, settings=changed)
            refused(f"{flag} was", sleep.refuse_other_settings, path, other, task, settings)
    refused("t was None, is 3", sleep.refuse_other_settings, path, run, task, dict(settings, t=3))
    other = dict(run, task="ca")
    refused("task was ca, is echo", sleep.refuse_other_settings, path, other, task, settings)
    with folder() as out:
        assert echo(f"--out {out}")[0] == 0
        (out / "command.txt").write_text("the first command")
        before = weights(out)
        for flags in ("--lr_muon 0.02", "--batch_size 9", "--update_rule delta", "--d_model 32"):
            status, _, err = echo(f"--out {out} --resume {flags}")
            flag = flags.split()[0][2:]
            assert status == 2 and f"{flag} was" in err and err.count("\n") == 1, err
        assert (out / "command.txt").read_text() == "the first command"    # nothing is changed
        assert same(before, weights(out))


def test_resume_needs_its_folder_and_a_run_without_it_another_one():
    with folder() as out:
        for flags in ("--resume", f"--resume --out {out}"):
            status, _, err = echo(flags)
            assert status == 2 and "--resume needs --out" in err and err.count("\n") == 1
        assert not out.exists()
        assert echo(f"--out {out}")[0] == 0
        status, _, err = echo(f"--out {out}")
        assert status == 2 and "add --resume" in err and err.count("\n") == 1


def test_a_checkpoint_that_is_broken_is_refused_and_one_without_its_json_is_not():
    with folder() as out:
        assert echo(f"--out {out}")[0] == 0
        path = out / "N1-seed0.pt"
        before = weights(out)
        saved = torch.load(path, weights_only=True)
        less = {name: p for name, p in saved["model"].items() if "head" not in name}
        for broken in ({}, saved | dict(model=less), saved | dict(optimizers=[]),
                       saved | dict(run={}), dict(model=saved["model"], run=saved["run"]), [1]):
            torch.save(broken, path)
            status, _, err = echo(f"--out {out} --resume")
            assert status == 2 and "is no checkpoint of this model" in err, err
            assert err.count("\n") == 1
        for broken in (b"PK broken", b""):
            path.write_bytes(broken)
            status, _, err = echo(f"--out {out} --resume")
            assert status == 2 and "cannot be read as a checkpoint" in err, err
            assert err.count("\n") == 1
        path.unlink()
        status, _, err = echo(f"--out {out} --resume")
        assert status == 2 and "is gone, but its .json is not" in err
        torch.save(saved, path)
        path.with_suffix(".json").unlink()                     # killed between the two files
        assert echo(f"--out {out} --resume")[0] == 0
        assert same(before, weights(out)) and a_run(out)["steps"] == 8


def test_a_checkpoint_of_which_a_bit_has_changed_is_refused():
    with folder() as out:
        assert echo(f"--out {out}")[0] == 0
        path = out / "N1-seed0.pt"
        good = path.read_bytes()
        expected = tree_leaves(sleep.read_checkpoint(path))
        rng = random.Random(0)
        refusals = 0
        for _ in range(60):
            damaged = bytearray(good)
            damaged[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            try:
                found = tree_leaves(sleep.read_checkpoint(path))
            except sleep.BadInput as e:
                assert "delete it to train the model anew" in str(e)
                refusals += 1
                continue
            for a, b in zip(found, expected, strict=True):     # what is read is what was written
                assert torch.equal(a, b) if torch.is_tensor(a) else a == b
        assert refusals > 20


def test_the_checkpoint_is_written_before_the_json():
    order = []
    write = sleep.write

    def spy(path, save_to):
        order.append(path.suffix)
        write(path, save_to)

    with folder() as out, patched(sleep, "write", spy):
        task, cfg, settings = echo_plan()
        sleep.train(task, cfg, settings, out / "N1-seed0.pt")
    assert order == [".pt", ".json"] * 2


def test_a_file_is_whole_or_not_there():
    with folder() as out:
        path = out / "x"
        sleep.write_text(path, "old")

        def full_disk(temporary):
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

        def full_disk_in_torch(temporary):
            temporary.write_text("half")
            raise RuntimeError("unexpected pos 64 vs 0")

        refused("could not be written (No space left on device)", sleep.write, path, full_disk)
        refused("could not be written (is the disk full?)", sleep.write, path, full_disk_in_torch)
        refused("could not be written", sleep.write_text, path / "in a file", "new")
        assert path.read_text() == "old"
        assert [file.name for file in out.iterdir()] == ["x"]


def test_a_second_process_is_refused_while_a_model_is_trained():
    with folder() as out:
        assert echo(f"--out {out}")[0] == 0
        with sleep.locked(out / "N1-seed0.pt"):
            status, _, err = echo(f"--out {out} --resume --N_test 2")
            assert status == 2 and "another process is training N1-seed0" in err, err
            assert err.count("\n") == 1 and "N_test" not in a_run(out)
        assert echo(f"--out {out} --resume --N_test 2")[0] == 0
        assert set(a_run(out)["N_test"]) == {"2"}


# ------------------------------------------------------------------------------------------------
# A whole script

SMALL = ("--W 8 --L 8 --t 2 --d_model 16 --n_head 2 --batch_size 8 --steps 8 --eval_every 4 "
         "--cooldown 0.5")


def start(command, **kwargs):
    """train_ca.py in a process, as a non-interactive shell starts it in the background."""
    def ignore_ctrl_c():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    argv = [sys.executable, str(HERE / "train_ca.py"), "--device", "cpu", *shlex.split(command)]
    env = os.environ | dict(OMP_NUM_THREADS="1") | kwargs.pop("env", {})
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=env, preexec_fn=ignore_ctrl_c, **kwargs)


def test_a_script_writes_what_it_promises():
    with folder() as out:
        status, text, err = script(train_ca, f"{SMALL} --N 1 2 --seed 0 1 --N_test 0 2 --out {out}")
        assert status == 0, err
        files = {"command.txt"}
        for N in (1, 2):
            for seed in (0, 1):
                files |= {f"N{N}-seed{seed}.json", f"N{N}-seed{seed}.pt"}
                r = a_run(out, f"N{N}-seed{seed}.json")
                assert (r["task"], r["N"], r["seed"]) == ("ca", N, seed)
                assert r["steps"] == 8 and r["tokens"] == 8 * 8 * 18 and r["seconds"] > 0
                assert 0 <= r["exact"] <= r["bit"] <= 1 and set(r["chance"]) == {"exact", "bit"}
                assert r["settings"]["N"] == N and r["torch"] == torch.__version__
                assert [entry["step"] for entry in r["curve"]] == [4, 8]
                assert r["curve"][-1]["exact"] == r["exact"] and set(r["N_test"]) == {"0", "2"}
                assert N == 1 or r["N_test"]["2"]["exact"] == r["exact"]
                assert f"N {N} seed {seed} | 0.0M tokens" in text
        assert {x.name for x in out.iterdir() if not x.name.startswith(".")} == files
        assert "chance (the best constant guess): exact 0." in text
        assert "tested with N = 0" in text and f"saved in {out}" in text


def test_lines_are_seen_at_once_and_ctrl_c_stops_a_run_that_was_started_in_the_background():
    with folder() as out:
        first = start(f"{SMALL} --steps 1000000 --N 1 --out {out}")
        assert any("step 8 |" in line for line in iter(first.stdout.readline, ""))
        second = start(f"{SMALL} --steps 1000000 --N 1 --out {out} --resume")
        _, err = second.communicate()
        assert second.returncode == 2 and "another process is training" in err, err
        assert err.count("\n") == 1
        first.send_signal(signal.SIGINT)
        _, err = first.communicate()
        assert first.returncode == 130 and "stopped. To go on" in err, err
        assert "Traceback" not in err
        assert a_run(out)["steps"] >= 8


def test_output_that_nobody_reads_any_more_is_no_traceback():
    with folder() as out:
        process = start(f"{SMALL} --N 1 --out {out}", bufsize=1)
        process.stdout.readline()
        process.stdout.close()                                 # as `| head -1` does
        err = process.stderr.read()
        assert process.wait() == 130 and "Traceback" not in err and "Exception" not in err, err


def test_a_console_without_umlauts_and_a_path_with_one_are_no_obstacle():
    env = dict(PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    with tempfile.TemporaryDirectory() as place:
        process = start(f"{SMALL} --N 1 --out '{place}/über uns'", env=env)
        text, err = process.communicate()
        assert process.returncode == 0 and "saved in" in text, err
        (out,) = Path(place).iterdir()
        assert a_run(out)["steps"] == 8
        assert "ber uns" in (out / "command.txt").read_text(encoding="utf-8")


def test_a_script_runs_in_a_thread():
    with folder() as out:
        results = []
        thread = threading.Thread(target=lambda: results.append(echo(f"--out {out}")))
        thread.start()
        thread.join()
        (status, _, err), = results
        assert status == 0 and a_run(out)["steps"] == 8, err


def test_without_enough_memory_on_the_gpu_there_is_a_sentence():
    class Large(Echo):
        def make_batch(self, step):
            if step == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 80 GiB.")
            return super().make_batch(step)

    with folder() as out:
        status, _, err = echo(f"--out {out}", Large)
        assert status == 2 and "try --recompute" in err and err.count("\n") == 1


def test_an_error_of_the_program_is_not_shown_as_bad_input():
    class Faulty(Echo):
        def make_batch(self, step):
            if step == 2:
                raise ValueError("a fault of the program")
            return super().make_batch(step)

    with folder() as out:
        try:
            echo(f"--out {out}", Faulty)
        except ValueError as e:
            assert str(e) == "a fault of the program" and not isinstance(e, sleep.BadInput)
        else:
            raise LookupError("the fault was hidden")


def test_a_task_may_score_in_numbers_of_numpy_and_torch():
    class Numpy(Echo):
        def __init__(self, args, seed):
            super().__init__(args, seed)
            by_case = {1: np.float32(1)}
            self.chance = dict(right=np.float64(0.2), loss=torch.tensor(1.6), by_case=by_case)

        def score(self, tokens, targets, logits):
            right = (logits.argmax(-1) == targets).numpy()
            return dict(right=np.mean(right), loss=logits.mean(), by_case={1: np.float32(0.5)})

    with folder() as out:
        status, text, err = echo(f"--N_test 2 --out {out}", Numpy)
        assert status == 0, err
        r = a_run(out)
        assert r["by_case"] == {"1": 0.5} and r["chance"]["right"] == 0.2
        assert type(r["right"]) is float and type(r["loss"]) is float
        assert echo(f"--N_test 2 3 --out {out} --resume", Numpy)[0] == 0
        assert set(a_run(out)["N_test"]) == {"2", "3"}


def test_a_metric_with_the_name_of_a_field_of_the_run_is_refused():
    for name in ("seed", "N", "steps", "curve", "settings", "N_test", "chance"):
        class Named(Echo):
            def __init__(self, args, seed):
                super().__init__(args, seed)
                self.chance = {name: 0.2}

        with folder() as out:
            status, _, err = echo(f"--out {out}", Named)
            assert status == 2 and f"is named {name}" in err and err.count("\n") == 1, err


def test_batches_from_the_global_generator_are_refused():
    class Drawn(Echo):
        def make_batch(self, step):
            tokens = torch.randint(5, (self.batch_size, 9))
            return tokens, tokens[:, :1]

    with folder() as out:
        status, _, err = echo(f"--out {out}", Drawn)
        assert status == 2 and "make_batch(0) gives another batch each time" in err, err
        assert err.count("\n") == 1


def test_a_script_refuses_bad_input_in_one_line_with_status_2():
    a_file = shlex.quote(str(HERE / "sleep.py"))
    for words, flags in (
            ("--N 0 must be", "--N 0"), ("--N 5000", "--N 5000"), ("--L 0 must be", "--L 0"),
            ("layout 'abc'", "--layout abc"), ("invalid choice", "--preset x"),
            ("multiple of", "--d_model 62 --n_head 4"), ("--steps 0", "--steps 0"),
            ("--lr_muon -1", "--lr_muon -1"), ("--lr_adamw nan", "--lr_adamw nan"),
            ("--batch_size 0", "--batch_size 0"), ("--eval_every -1", "--eval_every -1"),
            ("invalid int", "--steps three"), ("unrecognized", "--bogus"),
            ("unrecognized", "--step 3"),
            ("device 'tpu'", "--device tpu"), ("cannot be made", f"--out {a_file}"),
            ("cannot be made", f"--out {a_file}/x"), ("update_rule", "--update_rule oja"),
            ("--N_test -1", "--N_test -1"), ("--warmup 8", "--warmup 8"),
            ("--cooldown 2", "--cooldown 2"), ("--seed 99999999999", "--seed 0 99999999999"),
            ("cannot be made", f"--out {'x' * 300}")):
        status, _, err = echo(flags)
        assert status == 2 and words in err and err.count("\n") == 1, (flags, status, err)
    for module, words, flags in (
            (train_ca, "must divide", "--L 9"), (train_ca, "--rule 256", "--rule 256"),
            (train_ca, "8 to 60 cells", "--W 4 --L 4"), (train_ca, "0 to 1,000", "--t 99999"),
            (train_ca, "--split 1000", "--split 1000"), (train_ca, "--tapes 0", "--tapes 0"),
            (train_khop, "--K 0 must be", "--K 0"), (train_khop, "--K 12 must be", "--K 12"),
            (train_khop, "--queries 13", "--queries 13"), (train_khop, "--nodes 4", "--nodes 4"),
            (train_khop, "be padding", "--L 49"), (train_khop, "--L 0 must be", "--L 0"),
            (train_khop, "cut a question", "--L 9"), (train_khop, "--n_law some", "--n_law some"),
            (train_khop, "--deeper", "--deeper 2"),
            (train_gsm, "must be a prime", "--p 9"), (train_gsm, "--p 3 must be", "--p 3"),
            (train_gsm, "--animals 13", "--animals 13"), (train_gsm, "never full", "--L 49"),
            (train_gsm, "--questions 0", "--questions 0"), (train_gsm, "--L 0 must", "--L 0"),
            (train_gsm, "--reads 0 must", "--reads 0"), (train_gsm, "--tests 3", "--tests 3"),
            (train_gsm, "--places 1000000", "--places 1000000"),
            (train_gsm, "40 questions", "--questions 40"),
            (train_gsm, "take more --places", "--places 2"),
            (train_gsm, "million tokens", "--tests 100000 --T 3000")):
        status, _, err = script(module, flags)
        assert status == 2 and words in err and err.count("\n") == 1, (flags, status, err)


def test_help_shows_every_flag_with_its_default():
    for module in TASKS:
        status, text, _ = script(module, "--help")
        assert status == 0
        for flag in (sleep.FLAGS | module.FLAGS):
            assert re.search(rf"--{flag}\b.*?\(default:", text, re.S), flag


def test_every_preset_makes_models_and_a_preset_without_eval_every_evaluates_ten_times():
    for module, Task in TASKS.items():
        assert module.PRESETS["paper"]["conv"] == "s"          # as in the paper
        for preset in module.PRESETS:
            if module is train_gsm and preset == "paper":      # its test takes long to make
                continue
            args = settings(module, f"--preset {preset}")
            assert len(sleep.plan(args, Task)) == len(args.N)
    preset = {name: value for name, value in ECHO["cpu"].items() if name != "eval_every"}
    assert sleep.parse("", dict(cpu=preset), {}, ["--steps", "20"])[1].eval_every == 2


def test_nothing_is_imported_beyond_torch_numpy_and_tqdm():
    known = {"torch", "numpy", "tqdm", "lab", "sleep", *[module.__name__ for module in TASKS]}
    for name in ("sleep", "train_ca", "train_khop", "train_gsm", "test_sleep"):
        text = (HERE / f"{name}.py").read_text(encoding="utf-8")
        for package in re.findall(r"^\s*(?:import|from) (\w+)", text, re.M):
            assert package in sys.stdlib_module_names or package in known, (name, package)


# ------------------------------------------------------------------------------------------------
# Rule 110

def patterns(task, steps, cells):
    """The patterns of these cells in the tapes of some batches, as a set of numbers."""
    found = set()
    for step in steps:
        tapes = task.make_batch(step)[0][:, :task.W * task.n_tapes].reshape(-1, task.W)
        found |= set((tapes[:, cells] << torch.arange(len(cells))).sum(1).tolist())
    return found


def test_rule_110_is_its_published_table_and_a_brute_force_and_rule_90_an_xor():
    published = {"111": 0, "110": 1, "101": 1, "100": 0, "011": 1, "010": 1, "001": 1, "000": 0}
    for pattern, new in published.items():
        assert train_ca.evolve(torch.tensor([int(x) for x in pattern]), 110, 1)[1] == new
    cells = torch.randint(2, (5, 24), generator=torch.Generator().manual_seed(0))
    for rule in (30, 90, 110, 184):
        rows = cells.tolist()
        for _ in range(7):
            old = rows
            rows = [[rule >> (4 * row[i - 1] + 2 * row[i] + row[(i + 1) % 24]) & 1
                     for i in range(24)] for row in old]
        assert train_ca.evolve(cells, rule, 7).tolist() == rows
    for t in (2, 4, 8, 16, 32):                                # the control needs no depth
        xor = cells[:, -t % 24] ^ cells[:, t % 24]
        assert torch.equal(train_ca.evolve(cells, 90, t)[:, 0], xor)


def test_tapes_are_laid_out_as_documented_and_the_paper_preset_is_section_6_1():
    task = built(train_ca, "--preset paper")
    tokens, labels = task.make_batch(0)
    assert tokens.shape == (512, 100) and labels.shape == (512, 4) and task.T == 100
    assert (tokens[:, 96] == 2).all() and (tokens[:, :96] < 2).all()
    assert torch.equal(tokens[:, 97:], labels[:, :-1])
    for i in range(4):                                         # tape i is window i
        expected = train_ca.evolve(tokens[:, 24 * i: 24 * i + 24], 110, 32)[:, 0]
        assert torch.equal(labels[:, i], expected)
    assert 0.48 < tokens[:, :96].double().mean() < 0.52        # sigma .002
    p = train_ca.PRESETS["paper"]
    assert (p["W"], p["tapes"], p["L"], p["layout"], p["d_model"]) == (24, 4, 24, "asas", 256)
    assert (p["batch_size"], p["lr_muon"], p["lr_adamw"], p["t"]) == (512, 2e-3, 5e-5, 32)
    assert 4e9 <= p["steps"] * 512 * 100 <= 5e9


def test_chance_of_rule_110_is_the_best_constant_by_brute_force():
    for flags in ("", "--tapes 3 --W 8 --L 8 --t 3"):
        task = built(train_ca, flags)
        labels = task.test[1].tolist()
        exact = Counter(map(tuple, labels)).most_common(1)[0][1] / len(labels)
        bit = 0
        for column in zip(*labels):
            bit += max(sum(column), len(column) - sum(column)) / len(column) / len(labels[0])
        assert math.isclose(task.chance["exact"], exact, rel_tol=1e-6)
        assert math.isclose(task.chance["bit"], bit, rel_tol=1e-6)
    chance = built(train_ca, "--preset paper").chance          # at t = 32 it is the paper's 0.563
    assert abs(chance["exact"] - 0.563 ** 4) < 0.025 and abs(chance["bit"] - 0.563) < 0.02


def test_no_pattern_of_the_cells_that_matter_is_both_tested_and_trained():
    index = torch.arange(1 << 16)
    label = train_ca.evolve((index[:, None] >> torch.arange(16)) & 1, 110, 6)[:, 0]
    flips = [(label[index ^ (1 << i)] != label).double().mean().item() for i in range(16)]
    matter = [i for i in range(16) if flips[i] >= 0.3]
    assert matter == [0, 1, 2, 3, 4, 5, 6, 14, 15]             # cells -2 to 6
    for flags, cells, tested, trained in (
            ("", matter, 50, 440), ("--split 1", matter, 50, 440),
            ("--t 8", [*range(9), 13, 14, 15], 400, 3000),
            ("--rule 90 --t 1", range(16), 3000, 9000)):       # only three matter: the whole ring
        task = built(train_ca, flags)
        assert task.bits == sum(1 << i for i in cells)
        test = patterns(task, [-1], cells)
        seen = patterns(task, range(20), cells)
        assert not test & seen, flags
        assert len(test) > tested and len(seen) > trained, (flags, len(test), len(seen))


def test_a_held_out_pattern_has_trained_neighbours_in_every_cell_as_often_as_chance_wants():
    tape = torch.arange(1 << 16)
    for split in range(3):                 # a hash that does not mix keeps a lattice: 0 or 1 here
        task = built(train_ca, f"--t 8 --split {split}")
        held = task.held_out(tape)
        assert abs(held.double().mean() - 1 / 8) < 0.02        # 4096 patterns: sigma .005
        for i in range(16):
            if task.bits >> i & 1:
                neighbours = task.held_out(tape[held] ^ (1 << i))
                assert abs(neighbours.double().mean() - 1 / 8) < 0.07      # 512: sigma .015


# ------------------------------------------------------------------------------------------------
# k hops

def read_edges(task, row):
    """The edges that a row of tokens spells, by reading alone -> [(source, target), ...]."""
    tokens = row[task.pad:task.context].tolist()
    size = 4 if task.words else 2
    edges = []
    for start in range(0, len(tokens), size):
        edge = tokens[start:start + size]
        if edge == [train_khop.PAD] * size:
            assert not edges                                   # all padding comes first
            continue
        if task.words:
            assert edge[1] == train_khop.ARROW and edge[3] == train_khop.COMMA
            edge = edge[::2]
        assert all(task.node <= token < task.vocab_size for token in edge)
        edges.append((edge[0] - task.node, edge[1] - task.node))
    return edges


def walk(after, node, hops):
    for _ in range(hops):
        node = after[node]
    return node


def test_edges_spell_one_cycle_and_a_walker_finds_every_answer():
    for flags in ("", "--feed --n_law law", "--preset paper", "--preset gpu --n_law all",
                  "--preset paper --L 30 --no-words --queries 5"):
        task = built(train_khop, f"{flags} --batch_size 40")
        assert task.context % settings(train_khop, flags).L == 0           # whole windows
        for step in (-1, 0, 1199):
            tokens, targets = task.make_batch(step)
            assert tokens.shape[1] == task.T and tokens.max() < task.vocab_size
            for row, wanted in zip(tokens[:100], targets[:100]):
                edges = read_edges(task, row)
                after = dict(edges)
                n = len(after)
                assert n == len(edges) == len(set(after.values()))
                orbit = [walk(after, edges[0][0], hops) for hops in range(n)]
                assert len(set(orbit)) == n                    # one cycle through all of them
                starts = []
                questions = row[task.context:].view(task.M, -1).tolist()
                for question, answer in zip(questions, wanted.view(task.M, -1).tolist()):
                    if not any(question):
                        assert answer == [-1] * len(answer)
                        continue
                    said = question.pop() - task.node if task.feed else None
                    place = len(question) - 1                  # where the answer is said
                    if task.words:
                        k, *words, q, colon = question
                        assert words == [train_khop.HOPS, train_khop.AFTER]
                        assert colon == train_khop.COLON
                    else:
                        k, q = question
                    k = k - train_khop.ONE + 1
                    q = q - task.node
                    truth = walk(after, q, k)
                    assert answer[place] == truth + task.node
                    assert answer.count(-1) == len(answer) - 1
                    assert said in (None, truth)
                    starts.append(q)
                assert len(starts) == len(set(starts)) == min(n, task.M)


def test_the_paper_preset_is_section_6_2():
    task = built(train_khop, "--preset paper")
    assert (task.T, task.context, task.pad, task.vocab_size) == (360, 300, 0, 98 - 1)
    tokens, targets = task.make_batch(0)
    assert tokens.shape == (128, 360) and targets.shape == (128, 60)
    p = train_khop.PRESETS["paper"]
    assert (len(p["layout"]), p["d_model"], p["L"], p["batch_size"]) == (10, 512, 75, 128)
    assert (p["steps"], p["N"], p["K"], p["nodes"], p["feed"]) == (100_000, [1, 2, 4], 16, 75, True)


def test_hops_and_sizes_follow_their_laws_and_the_order_of_the_edges_tells_nothing():
    task = built(train_khop, "--preset paper --batch_size 4000")
    tokens, targets = task.make_batch(0)
    k = task.hops(tokens)[targets.view(4000, 10, 6)[..., 4] >= 0]
    count = torch.bincount(k, minlength=17)[1:].double()
    expected = len(k) / 16
    assert ((count - expected) ** 2 / expected).sum() < 39.3   # chi-square, 15 degrees, p = 0.0006
    n = (tokens[:, :300] > 0).sum(1) // 4
    sizes = torch.arange(3, 76).double()
    law = 1 / (sizes + 75 ** 0.5)
    assert n.min() == 3 and abs(n.double().mean() - (law * sizes).sum() / law.sum()) < 1.0
    distances = []
    for row in task.test[0]:
        edges = read_edges(task, row)
        place = {source: i for i, (source, _) in enumerate(edges)}
        distances += [abs(place[source] - place[target]) for source, target in edges]
    mean = sum(distances) / len(distances)
    assert abs(mean / ((75 + 1) / 3) - 1) < 0.02               # that of two random places
    asked = Counter(task.hops(task.test[0]).flatten().tolist())
    assert set(asked) == {1, 2, 4, 8, 16}
    assert all(abs(number / 5120 - 0.2) < 0.03 for number in asked.values())


def test_the_report_is_loss_and_accuracy_of_the_answers_alone_for_each_k():
    task = built(train_khop, "--preset paper --batch_size 64")
    tokens, targets = task.make_batch(0)
    logits = torch.randn(64, 60, 97, generator=torch.Generator().manual_seed(0))
    logits += 2.5 * F.one_hot(targets.clamp(min=0), 97)        # half are right
    found = {}
    for row, x, y in zip(tokens, logits, targets):
        for i, k in enumerate(task.hops(row[None])[0].tolist()):
            at = 6 * i + 4                                     # the token before the answer
            if y[at] >= 0:
                loss = -x[at].log_softmax(-1)[y[at]].item()
                right = float(x[at].argmax() == y[at])
                found.setdefault(str(k), []).append((loss, right))
    metrics = task.score(tokens, targets, logits)
    assert set(metrics["loss"]) == set(metrics["accuracy"]) == set(found)
    for k, cases in found.items():
        losses, rights = zip(*cases)
        assert abs(metrics["loss"][k] - sum(losses) / len(losses)) < 1e-4
        assert abs(metrics["accuracy"][k] - sum(rights) / len(rights)) < 1e-5


def test_without_the_edges_no_guess_is_better_than_chance_unless_answers_are_in_the_input():
    for flags in ("", "--preset gpu", "--feed", "--K 11"):
        task = built(train_khop, flags)
        tokens, targets = task.test
        n = task.nodes
        questions = tokens[:, task.context:].unflatten(1, (task.M, -1))
        q = questions[..., task.said - task.words] - task.node
        a = targets.unflatten(1, (task.M, -1))[..., task.said] - task.node
        for k in task.test_k:
            this = task.hops(tokens) == k
            guesses = [a == node for node in range(n)]
            guesses += [a == (q + d) % n for d in range(n)]
            guesses += [a == q.roll(j, 1) for j in range(1, task.M)]       # of another question
            best = max(guess[this].double().mean().item() for guess in guesses)
            chance = task.chance["accuracy"][str(k)]
            assert chance == 1 / (n - 1)
            assert math.isclose(task.chance["loss"][str(k)], -math.log(chance))
            assert best < chance + 4.5 * (chance / this.sum().item()) ** 0.5, (flags, k, best)


def test_questions_get_deeper_over_the_first_share_of_the_steps():
    task = built(train_khop, "--deeper 0.5 --steps 80")
    for step, deepest in ((0, 1), (19, 1), (20, 3), (39, 4), (40, 4), (79, 4)):
        deepest = min(1 + step * 4 // 40, 4)
        asked = set(task.hops(task.make_batch(step)[0]).flatten().tolist())
        assert asked == set(range(1, deepest + 1))
    assert set(task.hops(task.test[0]).flatten().tolist()) == {1, 2, 3, 4}


def test_no_cycle_of_the_test_is_ever_trained_on():
    task = built(train_khop, "--nodes 7 --L 7 --K 4 --queries 2")

    def cycles(step):
        return {tuple(sorted(read_edges(task, row))) for row in task.make_batch(step)[0]}

    test = cycles(-1)
    trained = set.union(*[cycles(step) for step in range(30)])
    assert len(test) > 30                                      # of 6! = 720 cycles
    assert len(trained) > 500 and not trained & test


# ------------------------------------------------------------------------------------------------
# Word problems

def read(task, row):
    """A row of tokens -> names asked, {name: what is said of it}, what was answered."""
    text = f"{task.text(row)} ".replace(" is ", " ").replace(" in ", "-")
    questions, rest = text.split(" ? ")
    body, *phrases = rest.split(" answer ")
    sentences = {}
    for sentence in body.split(" .")[:-1]:
        name, *said = sentence.split()
        assert name not in sentences                           # every name is defined once
        sentences[name] = said
    return questions.split(), sentences, [phrase.split() for phrase in phrases]


def solve(sentences, name, p):
    """By reading alone -> value of a name, the names that it needs, its longest chain of reads.

    KeyError if a sentence is missing.
    """
    if name.startswith("all-"):
        members = [other for other in sentences if other.endswith(name[3:])]
        said = " plus ".join(members).split()
    else:
        said = sentences[name]
    needed = {name}
    chain = 0
    values = []
    for term in said[::2]:
        if term.isdigit():
            values.append(int(term))
            continue
        value, names, reads = solve(sentences, term, p)
        values.append(value)
        needed |= names
        chain = max(chain, reads)
    total = values[0]
    for word, value in zip(said[1::2], values[1:], strict=True):
        if word == "times":
            total *= value
        elif word == "minus":
            total -= value
        else:
            assert word == "plus"
            total += value
    return total % p, needed, chain + 1


def test_a_reader_of_the_text_alone_finds_every_answer_and_its_depth():
    name = r"\w+-\w+"
    said = rf"(\d+|{name}|\d+ (plus|times) {name}|{name} (plus|minus) {name})"
    for flags in ("", "--words --T 120 160 --L 50 --reads 3 --questions 7",
                  "--questions 3 --T 40 48 --L 40"):
        task = built(train_gsm, f"--batch_size 32 --tests 120 {flags}")
        args = task.args
        for step in (None, 0, 1, 2):
            tokens, targets, depths = task.test if step is None else task.make_batch(step)
            M = 1 if step is None else args.questions
            assert depths.shape == (len(tokens), M) and tokens.shape[1] <= task.T
            before = tokens.shape[1] + 1 - M * (task.ask + 1)  # tokens before the answers
            assert before in args.T and (step is not None or before == max(args.T))
            for row, wanted, depth in zip(tokens, targets, depths.tolist()):
                text = f"{task.text(row)} ".replace(" is ", " ").replace(" in ", "-")
                assert re.fullmatch(rf"({name} ){{{M}}}\? ({name} {said} \. )+"
                                    rf"(answer {name} \d+ ){{{M - 1}}}answer {name} ", text)
                asked, sentences, phrases = read(task, row)
                assert asked == [phrase[0] for phrase in phrases] and len(set(asked)) == M
                answers = [(target - train_gsm.ZERO) for target in wanted.tolist() if target >= 0]
                found = [solve(sentences, question, args.p) for question in asked]
                assert [value for value, _, _ in found] == answers
                assert [chain for _, _, chain in found] == depth
                assert [phrase[1] for phrase in phrases[:-1]] == [str(x) for x in answers[:-1]]
                places = (wanted >= 0).nonzero().flatten().tolist()
                assert places == [i * (task.ask + 1) + task.ask - 1 for i in range(M)]
                for start in range(0, M, args.reads):          # the depths take turns
                    turn = depth[start:start + args.reads]
                    assert len(set(turn)) == len(turn)
        counts = Counter(task.test[2].flatten().tolist())
        assert set(counts.values()) == {120 // args.reads} and len(counts) == args.reads
        words = [task.text(torch.tensor([i])) for i in range(1, task.vocab_size)]
        assert len(set(words)) == len(words)                   # every token is another word


def test_an_answer_takes_every_needed_sentence_but_no_distractor_and_no_order():
    task = built(train_gsm, "--tests 400")
    p = task.args.p
    rng = random.Random(0)
    changed = 0
    dropped = 0
    for row in task.test[0]:
        (name,), sentences, _ = read(task, row)
        answer, needed, chain = solve(sentences, name, p)
        kept = {other: said for other, said in sentences.items() if other in needed}
        dropped += len(sentences) - len(kept)
        shuffled = dict(rng.sample(list(sentences.items()), len(sentences)))
        if not any(other.startswith("all-") for other in needed):
            assert solve(kept, name, p) == (answer, needed, chain)
        assert solve(shuffled, name, p) == (answer, needed, chain)
        for other, said in kept.items():
            if len(said) == 1 and said[0].isdigit():           # every constant decides
                more = dict(sentences, **{other: [str((int(said[0]) + 1) % p)]})
                assert solve(more, name, p)[0] != answer
                changed += 1
    assert changed > 400 and dropped > 400


def guesses_from_words(texts, y):
    """A linear least-squares guess from counts of words, learned on 3 of 4 texts -> right or wrong
    on the others."""
    words = sorted({word for text in texts for word in text})
    column = {word: i for i, word in enumerate(words)}
    counts = []
    for text in texts:
        columns = torch.tensor([column[word] for word in text])
        counts.append(torch.bincount(columns, minlength=len(words)))
    x = F.pad(torch.stack(counts), (0, 1), value=1).double()
    y = torch.tensor(y)
    cut = len(x) * 3 // 4
    gram = x[:cut].T @ x[:cut] + torch.eye(x.shape[1])
    w = torch.linalg.solve(gram, x[:cut].T @ F.one_hot(y[:cut]).double())
    return ((x[cut:] @ w).argmax(1) == y[cut:]).double()


def test_no_shortcut_finds_an_answer_and_the_depth_cannot_be_read_from_counts_of_words():
    task = built(train_gsm)
    p = task.args.p
    texts = [task.text(row).split() for row in task.test[0]]
    depths = task.test[2].flatten().tolist()
    answers = [target - train_gsm.ZERO for target in task.test[1].amax(1).tolist()]
    right = {}
    for text, depth, answer in zip(texts, depths, answers):
        numbers = [word for word in text if word.isdigit()]
        guesses = dict(first=numbers[0], middle=numbers[len(numbers) // 2], last=numbers[-1],
                       common=Counter(numbers).most_common(1)[0][0])
        if depth > 2:
            for rule, guess in guesses.items():
                right.setdefault(rule, []).append(guess == str(answer))
    for rule, hits in right.items():                           # 1000 of them: sigma .011
        assert sum(hits) / len(hits) < 1 / p + 0.05, (rule, sum(hits) / len(hits))
    deep = [i for i, depth in enumerate(depths) if depth > 2]
    hits = guesses_from_words([texts[i] for i in deep], [answers[i] for i in deep])
    assert hits.mean() < 1 / p + 3.5 * (1 / p / len(hits)) ** 0.5, hits.mean()
    bodies = [text[:text.index("answer")] for text in texts]
    hits = guesses_from_words(bodies, [depth - 1 for depth in depths])
    assert hits.mean() < 1 / 4 + 3.5 * (1 / 4 / len(hits)) ** 0.5, hits.mean()


def test_no_text_of_the_test_is_ever_trained_on():
    task = built(train_gsm, "--reads 2 --p 5 --places 4 --animals 1 --T 11 --L 9 --questions 1 "
                            "--tests 100 --batch_size 500")    # few texts, so most of them are seen

    def texts(batch):
        found = set()
        for row in batch[0]:
            sentences = read(task, row)[1]
            found.add(frozenset((name, *said) for name, said in sentences.items()))
        return found

    test = texts(task.test)
    trained = set.union(*[texts(task.make_batch(step)) for step in range(4)])
    assert len(test) > 50 and len(trained) > 400 and not test & trained
    assert torch.equal(task.make_batch(3)[0], task.make_batch(3)[0])


def test_the_report_and_chance_of_word_problems_are_by_depth():
    task = built(train_gsm, "--tests 200 --batch_size 100")
    g = torch.Generator().manual_seed(0)
    for tokens, targets, depths in (task.make_batch(0), task.test):
        logits = torch.randn(*targets.shape, task.vocab_size, generator=g)
        logits += 2.5 * F.one_hot(targets.clamp(min=0), task.vocab_size)
        right = (logits.argmax(2) == targets)[targets >= 0].view_as(depths)
        accuracy = task.score(tokens, targets, logits, depths)["accuracy"]
        assert set(accuracy) == {"1", "2", "3", "4"}
        for depth, share in accuracy.items():
            assert math.isclose(share, right[depths == int(depth)].double().mean(), rel_tol=1e-6)
    for depth, chance in task.chance["accuracy"].items():
        answers = targets.amax(1)[depths[:, 0] == int(depth)].tolist()
        best = Counter(answers).most_common(1)[0][1] / len(answers)
        assert math.isclose(chance, best, rel_tol=1e-6)


# ------------------------------------------------------------------------------------------------
# This file runs its tests and those of lab/

def test_the_sum_counts_a_test_that_fails_and_one_whose_process_dies():
    lab_tests = '''
import os
def test_zebra_passes(): pass
def test_zebra_fails(): assert False
def test_zebra_ends_its_process(): os.abort()
def test_zebra_passes_in_the_other_process(): pass
def test_zebra_is_not_reached(): pass
'''
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryDirectory() as elsewhere:
        for name in ("sleep", "train_ca", "train_khop", "train_gsm", "test_sleep"):
            shutil.copy(HERE / f"{name}.py", place)
        (Path(place) / "lab").mkdir()
        (Path(place) / "lab" / "test_lab.py").write_text(lab_tests)

        def start_in(folder, *args):
            command = [sys.executable, *args]
            return subprocess.run(command, cwd=folder, capture_output=True, text=True)

        path = Path(place) / "test_sleep.py"
        done = start_in(elsewhere, path, "zebra")
        assert done.returncode == 1, done.stdout
        assert "2 passed, 1 failed, 2 missing" in done.stdout, done.stdout + done.stderr
        done = start_in(elsewhere, path, "zebra_passes")
        assert done.returncode == 0 and "2 passed, 0 failed, 0 missing" in done.stdout, done.stderr
        done = start_in(elsewhere, "-O", path)
        assert done.returncode == 2 and "python -O" in done.stderr and done.stderr.count("\n") == 1
    with patched(sys, "argv", ["test_sleep.py", "nothing_has_this_name"]):
        status, _, err = run(main)
        assert status == 2 and err.count("\n") == 1
    with patched(sys, "argv", ["test_sleep.py", "--help"]):
        status, text, _ = run(main)
        assert status == 0 and "python test_sleep.py rule wake" in text


def tests_of(path, module):
    """The tests in a file, in its order, as module:name, without importing it."""
    names = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            if node.name in names:
                sys.exit(f"{path}: two tests are named {node.name}, so one of them would not run.")
            names.append(node.name)
    return [f"{module}:{name}" for name in names]


def sentence(test):
    module, name = test.split(":")
    return name.removeprefix("test_").replace("_", " ")


def run_here(tests):
    """Run tests in this process, and print a line for each."""
    for test in tests:
        module, name = test.split(":")
        start = time.monotonic()
        try:
            if module == "test_sleep":
                globals()[name]()
            else:
                getattr(importlib.import_module(module), name)()
            word = "ok  "
        except (Exception, SystemExit):
            traceback.print_exc()
            word = "FAIL"
        print(f"{word}  {time.monotonic() - start:5.1f} s  {sentence(test)}", flush=True)


def run_in_two_processes(tests):
    """Run tests in two processes, and print what they print -> lists of the sentences that passed
    and of those that failed. A test whose process died is in neither."""
    passed = []
    failed = []

    def follow(part):
        command = [sys.executable, "-u", __file__, "--here", *part]
        env = os.environ | dict(OMP_NUM_THREADS="1")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        for line in process.stdout:
            print(line, end="", flush=True)
            found = re.fullmatch(r"(ok  |FAIL)  +[\d.]+ s  (.*)\n", line)
            if found:
                results = failed if found[1] == "FAIL" else passed
                results.append(found[2])
        process.wait()

    threads = []
    for part in (tests[::2], tests[1::2]):
        if part:
            threads.append(threading.Thread(target=follow, args=(part,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return passed, failed


def main():
    words = sys.argv[1:]
    if not __debug__:
        print("test_sleep.py: python -O removes every assert, so nothing is tested: leave it out.",
              file=sys.stderr)
        sys.exit(2)
    if words[:1] == ["--here"]:
        run_here(words[1:])
        return
    if any(word.startswith("-") for word in words):
        print(__doc__)
        sys.exit(0 if words[0] in ("-h", "--help") else 2)
    tests = tests_of(Path(__file__), "test_sleep")
    for path in sorted((HERE / "lab").glob("test_*.py")):
        tests += tests_of(path, f"lab.{path.stem}")
    if words:
        tests = [test for test in tests if any(word in test.split(":")[1] for word in words)]
    if not tests:
        print("test_sleep.py: no test has such a name.", file=sys.stderr)
        sys.exit(2)
    start = time.monotonic()
    passed, failed = run_in_two_processes(tests)
    missing = Counter(sentence(test) for test in tests) - Counter(passed + failed)
    for name in missing:
        print(f"missing: {name}")
    seconds = time.monotonic() - start
    print(f"{len(passed)} passed, {len(failed)} failed, {missing.total()} missing, {seconds:.0f} s")
    sys.exit(1 if failed or missing else 0)


if __name__ == "__main__":
    main()
