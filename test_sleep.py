"""Tests of the method and the training in sleep.py: a test with the claim as its name.

    python test_sleep.py              all tests: these, and those of lab/test_lab.py if it is there
    python test_sleep.py rule wake    those whose names contain one of the words

The tests are in the order of sleep.py. lab/test_lab.py tests all else: the machine, files, whole
scripts, the three tasks, the course, the lab. No GPU, no compiler and no network is needed. Exit
status: 0 only if all of them ran and passed. pytest can collect these files, too.
"""
import ast
import contextlib
import copy
import importlib
import io
import json
import math
import os
import re
import shlex
import shutil
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
    values = dict(vocab_size=7, seq_len=20, L=5, N=2, layout="asas", d_model=16, n_head=2) | changes
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
        o, last = sleep.fast_weight_rule(q, k, v, log_alpha, beta, S, delta)
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
                slow = rule_with_gradients(sleep.fast_weight_rule, inputs, delta=delta)
                fast = rule_with_gradients(sleep.fast_weight_rule_chunked, inputs, delta=delta,
                                           chunk=chunk)
                for name, x, y in zip(names, slow, fast, strict=True):
                    error = ((y - x).norm() / x.norm().clamp(min=1e-6)).item()
                    assert error <= 1e-9, (name, error, regime, T, chunk, delta)


def test_repeated_keys_cost_no_digits_in_float32():
    for regime in ("one key, beta 1, alpha 1", "two keys, beta 1, alpha 1"):
        for T in (24, 64, 130):
            exact = sleep.fast_weight_rule(*rule_inputs(T, regime))
            fast = sleep.fast_weight_rule_chunked(*rule_inputs(T, regime, dtype=torch.float32))
            for a, b in zip(fast, exact):
                close(a.double(), b, 2e-6)


def test_a_token_may_forget_everything():
    inputs = rule_inputs(9, "random")
    with torch.no_grad():
        inputs[3][:, :, 4] = -torch.inf
    slow = sleep.fast_weight_rule(*inputs)
    fast = sleep.fast_weight_rule_chunked(*inputs)
    for a, b in zip(fast, slow):
        close(a, b, 1e-12)
    grads = torch.autograd.grad(fast[0].sum() + fast[1].sum(), inputs)
    assert all(grad.isfinite().all() for grad in grads)
    (to_S,) = torch.autograd.grad(sleep.fast_weight_rule_chunked(*inputs)[1].sum(), inputs[5])
    assert to_S.abs().max() < 1e-30                            # of the S before it nothing is left


def test_both_rules_refuse_shapes_that_do_not_fit_no_tokens_and_an_alpha_above_1():
    for rule in (sleep.fast_weight_rule, sleep.fast_weight_rule_chunked):
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
        return Config(**dict(vocab_size=7, seq_len=20, L=5) | changes)

    for name in ("vocab_size", "seq_len", "L", "N", "d_model", "n_head"):
        for value in (0, -1, 2.5, "3", None, True):
            refused(f"{name} must be an integer >= 1", config, **{name: value})
    for layout in ("", "axs", None, ["a", "s"]):
        refused("must be made of the letters a and s", config, layout=layout)
    refused("multiple of 2 * n_head", config, d_model=30, n_head=4)
    refused("eviction 'soft' must be", config, eviction="soft")
    refused("update_rule 'x' must be one of", config, update_rule="x")
    refused("conv 'q' must be", config, conv="q")
    refused("bf16 'false' must be", config, bf16="false")


def test_numbers_of_numpy_are_numbers():
    cfg = Config(np.int64(7), np.int32(20), np.int16(5), N=np.uint8(3), d_model=np.uint16(16),
                 n_head=2)
    assert cfg == Config(7, 20, 5, N=3, d_model=16, n_head=2)
    assert type(cfg.N) is int
    model = tiny()
    tokens = random_tokens()
    targets = targets_for(tokens, 2)
    expected = model(tokens, targets, N=3)[0]
    for N in (np.int64(3), np.uint8(3), torch.tensor(3)):
        assert torch.equal(model(tokens, targets, N=N)[0], expected)
    for N in (True, 2.0, -1, "2", [2, 2, 2.5, 2]):
        refused("N must be an integer >= 0", model, tokens, targets, N=N)


def test_a_new_model_has_the_stated_standard_deviations_and_its_head_says_nothing():
    torch.manual_seed(0)
    d = 256
    model = SleepLM(Config(100, seq_len=100, L=25, layout="as", d_model=d, n_head=4))
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
    mixer = SleepLM(Config(7, seq_len=100, L=25, N=5, layout="s", d_model=64, n_head=4)).blocks[0].mixer
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
                assert said[0].filename == sleep.__file__      # not a file of torch


def test_N_may_be_given_per_call():
    tokens = random_tokens(T=17)
    targets = targets_for(tokens, 2)
    close(tiny(N=2)(tokens, targets, N=3)[0], tiny(N=3)(tokens, targets)[0], 1e-12)


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
            f = sleep.accelerate(model, False, recompute)
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
    rule = sleep.fast_weight_rule_chunked

    def spy(q, k, v, log_alpha, beta, S, delta):
        dtypes.update(x.dtype for x in (q, k, v, log_alpha, beta, S))
        return rule(q, k, v, log_alpha, beta, S, delta)

    with patched(sleep, "fast_weight_rule_chunked", spy):
        logits, loss = model(tokens, targets_for(tokens, 2))
    assert dtypes == {torch.float32} == {logits.dtype, loss.dtype}
    expected = exact(tokens, targets_for(tokens, 2))[0]
    assert (logits != expected).any()
    close(logits, expected, 0.03)                              # 4 blocks with 8 bits of mantissa


def test_weights_in_half_precision_are_refused_in_a_sentence():
    tokens = random_tokens(T=12)
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny().to(dtype)
        for call in (lambda: model(tokens, targets_for(tokens, 2)), lambda: model.stream(tokens)):
            refused("Config(bf16=True)", call)


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
        _, S = sleep.fast_weight_rule(v, k, v, log_alpha, b.sigmoid(), zero, delta="delta" in name)
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
    refused("memory must be a Memory", model.sleep, h, None)


def test_memory_of_a_model_with_another_convolution_eviction_or_window_is_refused():
    tokens = random_tokens(T=4)                                # awake, in a window of 5
    for eviction in EVICTIONS:
        for conv in ("", "a", "s", "as"):
            model = tiny(conv=conv, eviction=eviction)
            h = model.embed(tokens)
            for other_conv in ("", "a", "s", "as"):
                other = tiny(conv=other_conv, eviction=eviction)
                memory = other.wake(h[:, :1], other.empty_memory(3))[1]
                for read in (1, 2, 3):                         # tokens that the memory knows
                    if other_conv == conv:
                        model.wake(h[:, :1], memory)
                    else:
                        refused("with another conv than", model.wake, h[:, :1], memory)
                        refused("with another conv than", model.sleep, h, memory)
                    memory = other.wake(h[:, :1], memory)[1]
                slept = other.sleep(h, other.empty_memory(3))
                if other_conv == conv or eviction == "hard":   # all that hard eviction leaves is S
                    model.sleep(h, slept)
                else:
                    refused("with another conv than", model.sleep, h, slept)
    sliding = tiny(eviction="sliding")
    slept = sliding.sleep(h, sliding.empty_memory(3))
    sliding.wake(h, slept)
    refused("another eviction or L", tiny().wake, h, slept)
    refused("another eviction or L", tiny(eviction="sliding", L=4).wake, h, slept)


def test_a_state_that_stream_did_not_return_is_refused_in_a_sentence():
    model = tiny()
    tokens = random_tokens(T=7)
    state = model.stream(tokens)[1]
    model.stream(tokens, state)
    memory, before, window = state
    for wrong in (0, [], (), memory, state[:2], list(state), "abc", tokens, dict(memory=memory)):
        refused("state must be the three things", model.stream, tokens, wrong)
    for wrong in ((None, before, window), (memory, None, window), (window, before, memory)):
        refused("memory must be a Memory", model.stream, tokens, wrong)
    other = model.stream(tokens[:, :6])[1]
    for wrong in ((memory, before, None), (memory, before, window[:, :1]), (memory, memory, window),
                  (memory, before, window[:2]), (other[0], before, window)):
        refused("do not belong together", model.stream, tokens, wrong)
    refused("belongs to a batch of 2", model.stream, tokens, model.stream(tokens[:2])[1])
    other = tiny(layout="as").stream(tokens)[1]
    refused("with layout as", model.stream, tokens, (memory, other[1], window))


def test_the_method_needs_nothing_of_training_but_its_checks_and_the_matrix_form():
    text = (HERE / "sleep.py").read_text(encoding="utf-8")
    method, line, rest = text.partition("# The method ends here.")
    assert line
    _, begins, rest = rest.partition("# The rule as matrix products")
    needed, ends, _ = rest.partition("# Runs: a model and its optimizers")
    assert begins and ends
    alone = type(sys)("alone")
    with patched(sys, "modules", sys.modules | dict(alone=alone)):         # a dataclass looks there
        exec(method + needed, alone.__dict__)
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
    make = sleep.accelerate

    def make_and_spy(model, compile, recompute):
        f = make(model, compile, recompute)

        def g(tokens, targets, N):
            loss = f(tokens, targets, N)
            after(model, loss)
            return loss
        return g

    with patched(sleep, "accelerate", make_and_spy):
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


def test_without_a_warm_up_what_a_model_froze_stays_frozen():
    model = tiny()
    for p in model.blocks[1].parameters():
        p.requires_grad_(False)
    for step in (0, 5):
        sleep.warm_up(model, step, 0, "hard")
        frozen = [i for i, block in enumerate(model.blocks)
                  if not all(p.requires_grad for p in block.parameters())]
        assert frozen == [1]


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
        sleep.set_rates(optimizers, settings, step)
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
    muon = sleep.Muon(ours, lr=0.01)
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
# This file runs its tests and those of lab/

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
    of_the_lab = HERE / "lab" / "test_lab.py"
    if of_the_lab.exists():
        tests += tests_of(of_the_lab, "lab.test_lab")
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
