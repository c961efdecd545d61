"""The claims of lab/ and of its pages, each as a test with the claim as its name.

    python -m lab.test_lab              all of them, two minutes on one core
    python -m lab.test_lab trees wake   those whose names contain one of the words
"""
import argparse
import ast
import contextlib
import importlib
import io
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import sleep
import train_ca
import train_gsm
import train_khop
from lab import common
from lab.common import PICTURES, RESULTS, load_runs, mean
from lab.course import demo, exercises, ladder, solutions
from lab.experiments import __main__ as experiments
from lab.experiments import (baselines, hops, leaderboard, plots, reach, recall, registry, runner,
                             swaps, trees, variants, when_to_wake, which_node)
from lab.tools import (benchmark, draw_mechanism, draw_runs, gpu_check, interactive_page,
                       paper_figures)
from sleep import Config, SleepLM
from test_sleep import patched, targets_for, tiny

HERE = Path(__file__).resolve().parents[1]


# ------------------------------------------------------------------------------------------------
# Helpers

def close(a, b, tolerance):
    """Relative distance of two tensors, checked; nan never passes."""
    distance = ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
    assert distance <= tolerance, f"relative distance {distance:.1e} > {tolerance:.0e}"


def differ(a, b):
    assert (a - b).abs().max() > 1e-3


def run(main, command=""):
    """Run a program in this process -> exit status, what it printed, what it complained."""
    argv = shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
    out = io.StringIO()
    err = io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(argv)
        except SystemExit as e:
            status = e.code or 0
            if isinstance(status, str):    # what sys.exit would print
                print(status, file=err)
                status = 1
    return status, out.getvalue(), err.getvalue()


def runs_well(main, command=""):
    """Run a program that has to end with status 0 -> what it printed."""
    status, text, err = run(main, command)
    assert status == 0, (command, status, err)
    return text


def is_refused(words, main, command):
    """The program ends with status 2 and one sentence, which contains the words."""
    status, _, err = run(main, command)
    assert status == 2 and words in err and err.count("\n") == 1, (command, status, err)


@contextlib.contextmanager
def new_folder():
    """Work in an empty folder, for programs that write into out/."""
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        yield Path(place)


def train(task, command):
    """Train a task of the registry, quietly."""
    runs_well(lambda argv: registry.train(task, argv), command)


def is_png(path):
    return Path(path).read_bytes()[:4] == b"\x89PNG"


def changed(**settings):
    """A tiny model whose sleep is changed, by arguments of ChangedSleep and of Config."""
    changes = {flag: settings.pop(flag) for flag in variants.OF_SLEEP if flag in settings}
    return tiny(lambda cfg: variants.ChangedSleep(cfg, **changes), **settings)


def random_tokens(T, B=3, seed=0):
    return torch.randint(7, (B, T), generator=torch.Generator().manual_seed(seed))


def outcome(model, tokens, targets, N=None):
    """-> logits, and {name: gradient} of the loss."""
    model.zero_grad()
    logits, loss = model(tokens, targets, N)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads


def same_outcome(model, other, tokens, targets, N=None):
    """Logits and all gradients of two models are equal up to rounding."""
    logits, grads = outcome(model, tokens, targets, N)
    other_logits, other_grads = outcome(other, tokens, targets, N)
    close(logits, other_logits, 1e-12)
    assert grads.keys() == other_grads.keys()
    for name in grads:
        close(grads[name], other_grads[name], 1e-9)


def task_of(name, flags="", seed=0):
    """A task of the registry, by the flags of its cpu preset."""
    doc, presets, flags_help, Task = registry.load_task(name)
    _, args = sleep.parse(doc, presets, flags_help, shlex.split(f"--device cpu {flags}"))
    return Task(args, seed)


def settings_of(name, flags=""):
    doc, presets, flags_help, _ = registry.load_task(name)
    _, args = sleep.parse(doc, presets, flags_help, shlex.split(f"--device cpu {flags}"))
    return vars(args)


def from_seed_and_step_alone(make_task):
    """A batch is the same for the same seed and step, else another; all seeds share one test."""
    task = make_task(0)
    again = make_task(0)
    other_seed = make_task(1)
    for x, y in zip(task.make_batch(3), again.make_batch(3)):
        assert torch.equal(x, y)
    for x, y in zip(task.test, other_seed.test):
        assert torch.equal(x, y)
    batches = [task.make_batch(3), task.make_batch(4), other_seed.make_batch(2),
               other_seed.make_batch(3), other_seed.make_batch(4)]
    for i, (tokens, *_) in enumerate(batches):
        for others, *_ in batches[:i]:
            assert tokens.shape != others.shape or not torch.equal(tokens, others)


# ------------------------------------------------------------------------------------------------
# Variants: what a pass hands to the next

def test_a_changed_sleep_that_changes_nothing_is_algorithm_1():
    tokens = random_tokens(13)
    same_outcome(changed(N=3), tiny(N=3), tokens, targets_for(tokens, 3))


def test_every_change_of_a_sleep_changes_the_answers_or_the_gradient_alone():
    tokens = random_tokens(13)
    targets = targets_for(tokens, 3)
    logits, grads = outcome(tiny(N=3), tokens, targets)
    name = "blocks.0.mixer.q.weight"
    for change in (dict(carry="h"), dict(carry="S"), dict(think=2), dict(recall=True),
                   dict(guess=True)):
        differ(outcome(changed(N=3, **change), tokens, targets)[0], logits)
    for change in (dict(detach=1), dict(detach=2), dict(every_pass=True)):
        other, other_grads = outcome(changed(N=3, **change), tokens, targets)
        close(other, logits, 1e-12)
        assert (other_grads[name] - grads[name]).norm() > 1e-3 * grads[name].norm(), change


def test_carrying_S_without_h_is_a_replay_of_fixed_keys_and_values():
    model = changed(carry="S", layout="as", N=3)
    calls = []
    rule = sleep.gated_delta_rule_chunked

    def spy(*args):
        calls.append(args)
        return rule(*args)

    with patched(sleep, "gated_delta_rule_chunked", spy):
        slept = model.sleep(model.embed(random_tokens(5)), model.empty_memory(3))
    *first_pass, S, _ = calls[0]
    for _ in range(3):                     # the first pass's keys and values, three times
        _, S = sleep.gated_delta_rule(*first_pass, S)
    close(slept.S[1], S, 1e-10)


def test_carrying_h_without_S_starts_every_pass_from_one_S_and_keeps_what_the_last_one_writes():
    model = changed(carry="h", N=3)
    memory = model.sleep(model.embed(random_tokens(5, seed=1)), model.empty_memory(3))
    h = model.embed(random_tokens(5))
    slept = model.sleep(h, memory)
    for _ in range(3):
        h, S, _ = model.one_pass(h, memory.S, memory.cache)
    close(slept.S[1], S[1], 1e-12)
    close(slept.S[3], S[3], 1e-12)


def test_recall_adds_the_embeddings_to_h_of_length_one_before_every_pass_but_the_first():
    model = changed(recall=True, N=3, layout="as")
    empty = model.empty_memory(3)
    start = model.embed(random_tokens(5))
    h, S, _ = model.one_pass(start, empty.S, empty.cache)
    for _ in range(2):
        length = (h.square().mean(-1, keepdim=True) + torch.finfo(h.dtype).eps).sqrt()
        h, S, _ = model.one_pass(h / length + start, S, empty.cache)
    close(model.sleep(start, empty).S[1], S[1], 1e-12)


def test_the_answer_is_fed_back_as_the_mean_of_the_embeddings_of_what_would_be_said():
    model = changed(guess=True, N=2, layout="as")
    empty = model.empty_memory(3)
    start = model.embed(random_tokens(5))
    h, S, _ = model.one_pass(start, empty.S, empty.cache)
    length = (h.square().mean(-1, keepdim=True) + torch.finfo(h.dtype).eps).sqrt()
    said = (h / length * model.norm.weight @ model.head.weight.T).exp()
    probability = said / said.sum(-1, keepdim=True)
    h = h + torch.einsum("btv,vd->btd", probability, model.embed.weight)
    _, S, _ = model.one_pass(h, S, empty.cache)
    close(model.sleep(start, empty).S[1], S[1], 1e-10)


def test_thinking_longer_over_the_answers_passes_them_again_from_the_S_before_the_window():
    model = changed(think=3, N=2)
    memory = model.sleep(model.embed(random_tokens(5)), model.empty_memory(3))
    h = model.embed(random_tokens(4, seed=1))
    logits, _ = model.wake(h, memory)
    for _ in range(3):
        h, _, _ = model.one_pass(h, memory.S, memory.cache)
    close(logits, model.head(model.norm(h)), 1e-12)


def test_thinking_longer_over_the_answers_does_not_see_the_tokens_after_them():
    model = changed(think=3, N=1)
    tokens = random_tokens(14)
    before = model(tokens, targets_for(tokens, 4))[0]
    tokens[:, 12] = (tokens[:, 12] + 1) % 7
    after = model(tokens, targets_for(tokens, 4))[0]
    assert torch.equal(before[:, :2], after[:, :2])
    assert (before[:, 2] - after[:, 2]).abs().max() > 1e-6


# ------------------------------------------------------------------------------------------------
# Variants: where the loss stands, and where gradients pass

def gradient_after_two_sleeps(model, cut_before):
    """{name: gradient} of one loss after sleeps of three passes over two windows, `as`.

    Before pass `cut_before` (from 0) of each sleep the graph is cut, and what the first pass began
    with takes the place of what is cut off, for the gradient alone.
    """
    tokens = random_tokens(13)
    targets = targets_for(tokens, 3)
    model.zero_grad()
    memory = model.empty_memory(3)
    for window in (tokens[:, :5], tokens[:, 5:10]):
        start = model.embed(window)
        h = start
        S = memory.S
        for n in range(3):
            if n == cut_before:
                h = start + (h - start).detach()
                S = [None, memory.S[1] + (S[1] - memory.S[1]).detach()]
            h, S, _ = model.one_pass(h, S, memory.cache)
        memory = memory._replace(S=S)
    logits, _ = model.wake(model.embed(tokens[:, 10:]), memory)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_detach_lets_the_gradient_through_so_many_last_passes_of_each_sleep():
    tokens = random_tokens(13)
    targets = targets_for(tokens, 3)
    by_detach = {}
    for detach, cut_before in ((0, None), (1, 2), (2, 1)):
        model = changed(N=3, layout="as", detach=detach)
        _, grads = outcome(model, tokens, targets)
        wanted = gradient_after_two_sleeps(model, cut_before)
        assert grads.keys() == wanted.keys()
        for name in wanted:
            close(grads[name], wanted[name], 1e-9)
        by_detach[detach] = grads["blocks.1.mixer.v.weight"]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (by_detach[one] - by_detach[other]).norm() > 1e-3 * by_detach[one].norm()


def test_a_loss_after_every_pass_is_the_mean_of_the_losses_asked_then_weighted_by_the_pass():
    model = changed(every_pass=True, N=3)
    tokens = random_tokens(13)
    targets = targets_for(tokens, 3)       # two sleeps: the first one always has all three passes
    losses = [tiny(N=3)(tokens, targets, [3, n, 1])[1] for n in (1, 2, 3)]
    close(model(tokens, targets)[1], (losses[0] + 2 * losses[1] + 3 * losses[2]) / 6, 1e-12)
    with torch.no_grad():                  # a test asks after the last one
        close(model(tokens, targets)[1], losses[2], 1e-12)


def test_with_a_loss_after_every_pass_detach_ends_each_gradient_after_its_passes():
    model = changed(every_pass=True, detach=1, N=2, layout="as")
    tokens = random_tokens(7)
    targets = targets_for(tokens, 2)
    _, grads = outcome(model, tokens, targets)
    model.zero_grad()
    empty = model.empty_memory(3)
    h, S_1, _ = model.one_pass(model.embed(tokens[:, :5]), empty.S, empty.cache)
    _, S_2, _ = model.one_pass(h.detach(), [None, S_1[1].detach()], empty.cache)
    for n, S in ((1, S_1), (2, S_2)):
        logits, _ = model.wake(model.embed(tokens[:, 5:]), empty._replace(S=S))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        (n / 3 * loss).backward()
    close(grads["blocks.1.mixer.v.weight"], model.blocks[1].mixer.v.weight.grad, 1e-10)


# ------------------------------------------------------------------------------------------------
# Variants: blocks

def span(first, stop, **settings):
    return tiny(lambda cfg: variants.SpanLM(cfg, first, stop), **settings)


def test_a_span_of_all_blocks_is_algorithm_1_under_both_evictions():
    tokens = random_tokens(14)
    for eviction in ("hard", "sliding"):
        same_outcome(span(0, 4, N=3, eviction=eviction), tiny(N=3, eviction=eviction), tokens,
                     targets_for(tokens, 4))


def test_a_span_loops_its_own_blocks_only():
    for first, stop in ((0, 4), (0, 1), (1, 2), (1, 3), (2, 4)):
        model = span(first, stop, N=3)
        calls = [0] * 4

        def count(block, *_):
            calls[list(model.blocks).index(block)] += 1

        for block in model.blocks:
            block.register_forward_hook(count)
        model.sleep(model.embed(random_tokens(5)), model.empty_memory(3))
        assert calls == [3 if first <= i < stop else 1 for i in range(4)], (first, stop, calls)


def test_a_span_keeps_the_S_and_the_cache_of_each_blocks_last_call():
    for first, stop, eviction in ((1, 3, "hard"), (1, 3, "sliding"), (0, 2, "sliding"),
                                  (2, 4, "hard")):
        model = span(first, stop, N=3, eviction=eviction)
        memory = model.sleep(model.embed(random_tokens(5, seed=1)), model.empty_memory(3))
        order = [*range(stop), *range(first, stop), *range(first, 4)]      # three passes
        h = model.embed(random_tokens(5))
        S = list(memory.S)
        cache = list(memory.cache)
        for i in order:
            h, S[i], cache[i] = model.blocks[i](h, S[i], memory.cache[i])
        wanted = model.evict(memory._replace(S=S, cache=cache))
        found = model.sleep(model.embed(random_tokens(5)), memory)
        for x, y in zip([*found.S, *sum(found.cache, ())], [*wanted.S, *sum(wanted.cache, ())]):
            assert x is None or torch.equal(x, y)


def test_a_span_repeats_its_passes_for_the_gradient_with_the_same_numbers():
    tokens = random_tokens(13)
    model = span(1, 3, N=3)
    repeated = span(1, 3, N=3)
    repeated.recompute = True
    same_outcome(model, repeated, tokens, targets_for(tokens, 3))


def fast_weights(name, d=16, H=2):
    """Fast weights of this --update_rule in float64, and inputs for them: x, q, k, v, S."""
    torch.manual_seed(0)
    cfg = Config(7, 20, 8, layout="s", d_model=d, n_head=H, update_rule=name)
    mixer = sleep.UPDATE_RULES[name](cfg).double()
    x = torch.randn(3, 8, d).double()
    q, k, v = F.normalize(torch.randn(3, 3, H, 8, d // H).double(), dim=-1)
    return mixer, x, q, k, v, torch.randn(3, H, d // H, d // H).double()


def test_fast_weights_that_read_before_see_no_write_of_the_same_pass_and_write_as_ever():
    mixer, x, q, k, v, S = fast_weights("read_before")
    o, new_S = mixer.write_and_read(x, q, k, v, S)
    close(o, torch.einsum("bhvk,bhtk->bhtv", S, q), 1e-12)
    plain = sleep.FastWeights.write_and_read(mixer, x, q, k, v, S)
    close(new_S, plain[1], 1e-12)
    differ(o, plain[0])


def test_two_writes_a_token_are_two_steps_of_the_rule_and_one_read():
    mixer, x, q, k, v, S = fast_weights("two_writes")
    o, new_S = mixer.write_and_read(x, q, k, v, S)
    a, b = (x @ mixer.ab.weight.T).transpose(1, 2).chunk(2, 1)
    alpha = (-F.softplus(a + mixer.dt_bias[:, None])).exp()
    k2 = F.normalize(sleep.split_heads(F.silu(mixer.k2(x)), 2), dim=-1)
    v2 = sleep.split_heads(F.silu(mixer.v2(x)), 2)
    beta2 = mixer.b2(x).sigmoid().transpose(1, 2)
    for t in range(8):
        S = alpha[:, :, t, None, None] * S
        for beta, key, value in ((b.sigmoid(), k, v), (beta2, k2, v2)):
            key, value = key[:, :, t], value[:, :, t]
            lacking = value - torch.einsum("bhvk,bhk->bhv", S, key)
            S = S + torch.einsum("bh,bhv,bhk->bhvk", beta[:, :, t], lacking, key)
        close(o[:, :, t], torch.einsum("bhvk,bhk->bhv", S, q[:, :, t]), 1e-10)
    close(new_S, S, 1e-10)


def test_a_deep_read_follows_a_chain_of_keys():
    mixer, x, _, k, v, S = fast_weights("deep_read", d=32)     # 16 keys a head
    S = torch.eye(16).roll(1, 0).double().expand(3, 2, 16, 16)             # node i points to i + 1
    q = torch.eye(16)[torch.arange(8)].double().expand(3, 2, 8, 16)
    shallow, new_S = sleep.FastWeights.write_and_read(mixer, x, q, k, v, S)
    for reads in range(2, 9):
        weight = F.one_hot(torch.tensor([reads - 2] * 2), 7).flatten()     # so many reads alone
        mixer.w.forward = lambda x: weight.expand(3, 8, 14)
        o, S_deep = mixer.write_and_read(x, q, k, v, S)
        close(o - shallow, torch.eye(16)[torch.arange(8) + reads].double().expand_as(o), 1e-12)
        close(S_deep, new_S, 1e-12)


def test_a_pass_that_knows_its_number_is_told_it_before_it_begins():
    tokens = random_tokens(13)
    model = changed(tell_pass=True, N=3)
    same_logits = outcome(tiny(N=3), tokens, targets_for(tokens, 3))[0]
    close(outcome(model, tokens, targets_for(tokens, 3))[0], same_logits, 1e-12)       # it starts at 0
    with torch.no_grad():
        model.pass_embed.copy_(torch.randn(3, model.cfg.d_model))
    empty = model.empty_memory(3)
    h = model.embed(random_tokens(5))
    slept = model.sleep(h, empty)
    S = empty.S
    for n in range(3):
        h, S, _ = model.one_pass(h + model.pass_embed[n], S, empty.cache)
    close(slept.S[1], S[1], 1e-12)


def test_every_law_of_k_draws_what_it_says_and_the_test_has_every_k():
    counts = {}
    for law in hops.K_LAWS:
        task = task_of("hops", f"--k_law {law} --deeper 0 --batch_size 5000")
        k = task.hops(task.make_batch(0)[0])
        counts[law] = torch.bincount(k.flatten(), minlength=9)[1:] / k.numel()     # of 100,000
        assert set(task.hops(task.test[0]).flatten().tolist()) == set(range(1, 9))
    close(counts["all"], torch.full((8,), 1 / 8), 0.02)
    weights = torch.arange(1, 9) ** -1.5
    close(counts["power"], weights / weights.sum(), 0.02)
    close(counts["doubles"], torch.tensor([1, 1, 0, 1, 0, 0, 0, 1]) / 4, 0.02)
    assert (counts["doubles"][[2, 4, 5, 6]] == 0).all()
    growing = task_of("hops", "--k_law doubles --deeper 1 --steps 100")
    assert growing.hops(growing.make_batch(30)[0]).max() == 2              # 1 + 8 * 0.3 is 3.4
    is_refused("one of all, power, doubles", hops.main, "--k_law some")


def test_of_two_parallel_mixers_both_speak_and_only_the_fast_weights_remember():
    model = tiny(variants.ParallelLM, layout="aa")
    tokens = random_tokens(12)
    targets = targets_for(tokens, 2)
    past = tokens.clone()
    past[:, 0] = (tokens[:, 0] + 1) % 7    # in a window that sleeps and is evicted
    both = model(tokens, targets)[0]
    for mixer in ("mixer", "fast"):
        outputs = [getattr(block, mixer).o.weight for block in model.blocks]
        kept = [weight.detach().clone() for weight in outputs]
        with torch.no_grad():
            for weight in outputs:
                weight.zero_()
            alone = model(tokens, targets)[0]
            other_past = model(past, targets)[0]
            for weight, old in zip(outputs, kept):
                weight.copy_(old)
        differ(alone, both)
        assert torch.equal(alone, other_past) == (mixer == "fast")


def test_the_flags_choose_the_model_and_bad_ones_are_refused_in_a_sentence():
    cfg = Config(7, 20, 5, layout="aa", d_model=16, n_head=2)
    for flags, kind in (({}, SleepLM), (dict(parallel=True), variants.ParallelLM),
                        (dict(loop=[0, 1]), variants.SpanLM),
                        (dict(detach=1), variants.ChangedSleep),
                        (dict(think=2), variants.ChangedSleep)):
        model = variants.make_model(cfg, variants.DEFAULTS | flags)
        assert type(model) is kind, flags
    for words, flags in (
            ("must be hS, h or S", "--carry x"), ("at least 1", "--think 0"),
            ("fewer passes", "--N 3 --detach 3"), ("fewer passes", "--N 2 3 --detach 2"),
            ("must not be negative", "--detach -1"), ("hands on no h", "--carry S --recall"),
            ("hard eviction", "--carry h --eviction sliding"), ("no --loop", "--recall --loop 0 1"),
            ("two numbers", "--loop 1"), ("first < stop <= 2", "--loop 1 3"),
            ("a layout of a only", "--parallel --layout as"),
            ("no other change", "--parallel --layout aa --recall"),
            ("from 0 to 1", "--grow_N 2"), ("do not go together", "--grow_N 0.5 --any_N")):
        is_refused(words, lambda argv: registry.train("khop", argv), f"--device cpu {flags}")


def test_N_grows_from_one_to_all_over_the_first_share_of_the_steps():
    settings = settings_of("khop", "--N 3 --steps 1000 --grow_N 0.6") | dict(N=3, seed=0)
    N = [variants.draw_N(step, settings) for step in range(1000)]
    assert N[:333] == [1] * 333 and N[600:] == [3] * 400 and N == sorted(N)
    assert 0.7 < sum(N) / 3000 < 0.74      # 28 % fewer passes


def test_N_is_drawn_anew_for_every_step_from_seed_and_step_alone():
    drawn = []
    for seed in (0, 1, 0):
        settings = settings_of("khop", "--any_N") | dict(N=4, seed=seed)
        drawn.append([variants.draw_N(step, settings) for step in range(400)])
    assert drawn[0] == drawn[2] != drawn[1] and drawn[0][1:] != drawn[1][:-1]
    assert all(70 < drawn[0].count(N) < 130 for N in (1, 2, 3, 4))


# ------------------------------------------------------------------------------------------------
# Tasks

def test_the_trees_are_trees_of_equal_size_and_every_answer_is_the_root():
    task = task_of("trees", "--steps 100 --batch_size 32")
    batches = {step: task.make_batch(step) for step in (0, 5, 20, 60, 61, 62, 63)}
    batches["test"] = task.test
    n_trees = {}
    for name, (tokens, roots, depths) in batches.items():
        found = set()
        for row, answers, deep in zip(tokens.tolist(), roots.tolist(), depths.tolist()):
            parent = dict(zip(row[:48:2], row[1:48:2]))
            asked = row[48:]
            assert sorted(parent) == sorted(asked) == list(range(24))      # each is told, and asked
            for node, answer, depth in zip(asked, answers, deep):
                edges = 0
                while parent[node] != node:
                    node = parent[node]
                    edges += 1
                assert (node, edges) == (answer, depth)
            sizes = {answers.count(root) for root in answers}
            assert len(sizes) == 1         # of equal size: to count names says nothing
            found.add(24 // sizes.pop())
        assert len(found) == 1
        n_trees[name] = found.pop()
        deepest = {0: 1, 5: 1, "test": 7}.get(name, min(3, 24 // n_trees[name] - 1))
        assert depths.max() == deepest, name
    assert n_trees["test"] == 3
    assert set(n_trees.values()) <= {3, 4, 6, 8, 12} and len(set(n_trees.values())) > 1


def test_the_batches_of_trees_swaps_and_recall_come_from_seed_and_step_alone():
    flags = "--size 2 --depth 1 --test_depth 1 --L 12 --batch_size 8"      # always three trees
    from_seed_and_step_alone(lambda seed: task_of("trees", flags, seed))
    args = SimpleNamespace(swaps=8, windows=4, L=12, batch_size=8, device="cpu")
    from_seed_and_step_alone(lambda seed: swaps.Swaps(args, seed))
    from_seed_and_step_alone(lambda seed: recall.Recall(args, seed))


def test_every_seed_of_the_trees_draws_its_own_numbers_of_trees():
    drawn = []
    for seed in (0, 1):
        task = task_of("trees", "--steps 100 --batch_size 1", seed)
        drawn.append([task.draw_n_trees(step, 1) for step in range(60)])
    assert drawn[0] != drawn[1] and drawn[0][1:] != drawn[1][:-1]
    assert set(drawn[0]) == {3, 4, 6, 8, 12}


def test_the_trees_count_each_depth_for_itself_and_leave_the_roots_out():
    task = task_of("trees")
    tokens, roots, depths = task.test
    said = F.one_hot(roots, 24)
    assert task.score(tokens, roots, said, depths)["accuracy"] == {str(d): 1.0 for d in range(1, 8)}
    assert task.chance["accuracy"] == {str(d): 1 / 3 for d in range(1, 8)}
    for only in (0, 3, 7):                 # right at one depth, wrong at all others
        answers = torch.where(depths == only, roots, (roots + 1) % 24)
        accuracy = task.score(tokens, roots, F.one_hot(answers, 24), depths)["accuracy"]
        assert accuracy == {str(d): float(d == only) for d in range(1, 8)}, only


def test_the_orders_of_the_trees_edges_are_random_or_a_third_each_parents_or_children_first():
    shares = {}
    for order in ("random", "mixed"):
        task = task_of("trees", f"--order {order} --steps 10 --batch_size 600")
        tokens, _, depths = task.make_batch(8)                 # a step of the full depth
        parents_first = 0
        children_first = 0
        for row, deep in zip(tokens.tolist(), depths.tolist()):
            depth = dict(zip(row[48:], deep))
            by_edge = [depth[node] for node in row[:48:2]]
            parents_first += by_edge == sorted(by_edge)
            children_first += by_edge == sorted(by_edge, reverse=True)
        shares[order] = parents_first / 600, children_first / 600
    assert max(shares["random"]) < 0.01
    assert all(0.27 < share < 0.4 for share in shares["mixed"])            # sigma .02


def test_swaps_are_followed_place_by_place():
    args = SimpleNamespace(swaps=8, L=12, batch_size=50, device="cpu")
    tokens, targets = swaps.Swaps(args, 0).make_batch(3)
    assert tokens.shape == (50, 16)
    assert (tokens[:, 12:] == swaps.FIRST_PLACE + torch.arange(4)).all()
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        items = row[:4]
        for token in row[4:12]:
            if token != swaps.NOTHING:
                x, y = swaps.PAIRS[token - swaps.FIRST_SWAP].tolist()
                items[x], items[y] = items[y], items[x]
        assert items == wanted and sorted(items) == [0, 1, 2, 3]


def test_a_write_that_overshoots_swaps_two_places_and_has_twice_the_beta():
    k = F.normalize(torch.tensor([1.0, -1, 0, 0]), dim=0)[None, None, None]    # e_0 - e_1
    v = torch.zeros_like(k)
    two = torch.full((1, 1, 1), 2.0)
    _, S = sleep.gated_delta_rule(k, k, v, torch.zeros(1, 1, 1), two, torch.eye(4)[None, None])
    assert torch.allclose(S[0, 0], torch.eye(4)[[1, 0, 2, 3]], atol=1e-6)      # I - 2 k k^T
    torch.manual_seed(0)
    layer = swaps.Overshoot(Config(7, 20, 5, layout="s", d_model=16, n_head=2))
    betas = []
    rule = sleep.gated_delta_rule_chunked

    def spy(q, k, v, log_alpha, beta, *rest):
        betas.append(beta)
        return rule(q, k, v, log_alpha, beta, *rest)

    x = torch.randn(2, 9, 16)
    with patched(sleep, "gated_delta_rule_chunked", spy):
        layer(x, torch.zeros(2, 2, 8, 8))
        sleep.FastWeights.forward(layer, x, torch.zeros(2, 2, 8, 8))
    b = (x @ layer.ab.weight.T)[..., 2:].transpose(1, 2)
    close(betas[0], 2 * b.sigmoid(), 1e-6)


def test_recall_asks_for_the_first_of_all_digits():
    args = SimpleNamespace(windows=4, L=3, batch_size=50, device="cpu")
    task = recall.Recall(args, 0)
    tokens, targets = task.make_batch(0)
    assert tokens.shape == (50, 13) and task.T == 13 and targets.tolist() == tokens[:, :1].tolist()
    assert (tokens[:, -1] == recall.QUESTION).all() and tokens[:, :-1].max() == 9
    assert task.score(tokens, targets, F.one_hot(targets, 11))["accuracy"] == 1


def test_the_programs_of_the_tasks_train_and_refuse_bad_flags_in_a_sentence():
    few = "--device cpu --N 1 --steps 2 --batch_size 8 --out"
    with new_folder():
        assert "places" in runs_well(swaps.main, f"--update_rule overshoot {few} swaps")
        del sleep.UPDATE_RULES["overshoot"]
        assert "accuracy" in runs_well(recall.main, f"{few} recall")
        small = "--size 2 --depth 1 --test_depth 1 --L 12 --d_model 16 --N_test 1"
        assert "accuracy 1: " in runs_well(trees.main, f"{small} {few} trees")
        for folder in ("swaps", "recall", "trees"):
            saved, = load_runs(folder)
            assert saved["steps"] == 2 and saved["task"] == folder
        runs_well(draw_runs.main, "recall")
        assert is_png("recall/plot.png")
    for words, main, flags in (
            ("from 1", swaps.main, "--L -3"), ("--swaps 0", swaps.main, "--swaps 0"),
            ("divide", swaps.main, "--L 5"), ("from 1", recall.main, "--L 0"),
            ("--windows 0", recall.main, "--windows 0"), ("--size 1 ", trees.main, "--size 1"),
            ("depth < size", trees.main, "--depth 8"), ("random or mixed", trees.main, "--order x"),
            ("from 0 to 1", trees.main, "--deeper 2"), ("must divide", trees.main, "--L 7"),
            ("from 1", trees.main, "--L 0")):
        is_refused(words, main, f"--device cpu {flags}")


# ------------------------------------------------------------------------------------------------
# What is got without sleep

def test_no_lookup_answers_the_test_of_rule_110_and_an_easier_one_is_found_out():
    train = baselines.network

    def few_steps(*args):                  # whatever it learns
        return train(*args, steps=20)

    eleven = sum(1 << i for i in (12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6))

    def by_lattice(self, tape):            # a hash that does not mix, of one cell too many
        return ((tape & eleven) * 2654435761 & (2 ** 32 - 1)) < 2 ** 29

    with patched(baselines, "network", few_steps):
        for split in range(3):
            for words, got in baselines.ca(task_of("ca", f"--split {split}")).items():
                assert got["bit"] < 0.7 and got["exact"] < 0.5, (split, words, got)
        with patched(train_ca.Tapes, "held_out", by_lattice):
            easy = baselines.ca(task_of("ca"))
    assert easy["best lookup that forgets one cell of the ring"]["bit"] > 0.95


def test_a_reader_of_two_sentences_is_at_chance_at_a_chain_of_three():
    found = baselines.gsm(task_of("gsm"))
    chance = found.pop("any number")["accuracy"]
    above = dict(zip("1234", (0.4, 0.15, 0.05, 0.05)))         # what is told is often an answer
    for reads, metrics in enumerate(found.values()):           # 0: the commonest number
        for depth, accuracy in metrics["accuracy"].items():
            if int(depth) <= reads:
                assert accuracy == 1, (reads, depth, accuracy)
            else:
                assert accuracy < chance[depth] + above[depth], (reads, depth, accuracy)
    assert reads == 3


def test_the_baselines_are_printed_and_flags_that_change_nothing_are_refused():
    with patched(baselines, "network", lambda cells, label, trained: label):
        text = runs_well(baselines.main, "ca --W 10 --L 10 --t 2")
    assert "best constant" in text and "network" in text
    is_refused("changes nothing here", baselines.main, "ca --steps 3")
    is_refused("not of khop", baselines.main, "khop")
    is_refused("20 cells", baselines.main, "ca --W 24 --L 24")


# ------------------------------------------------------------------------------------------------
# Experiments

KHOP = "--device cpu --nodes 7 --L 14 --K 2 --queries 2 --d_model 16 --batch_size 8 --steps 2"
NOT_COMPARED = {"N", "seed", "N_test", "preset", "device", "compile", "recompute", "out", "resume"}


def test_every_condition_of_every_experiment_makes_a_model_and_its_results_have_its_settings():
    for name, experiment in registry.EXPERIMENTS.items():
        doc, presets, flags_help, Task = registry.load_task(experiment.task)
        assert callable(getattr(plots, experiment.picture)), name
        by_label = {}
        for condition in runner.plan(experiment, ["--device", "cpu"], name):
            by_label[experiment.conditions[condition.flags]] = vars(condition.args)
            for task, cfg, settings in sleep.plan(condition.args, Task)[:1]:
                assert isinstance(variants.make_model(cfg, settings), SleepLM)
        if not experiment.results:
            continue
        runs = load_runs(RESULTS / f"{experiment.results}.json")
        assert {run["label"] for run in runs} == set(by_label), name
        for run in runs:
            wanted = by_label[run["label"]]
            settings = sleep.DEFAULTS | presets["cpu"] | run["settings"]
            assert run["N"] in wanted["N"], (name, run["label"])
            for flag in set(wanted) - NOT_COMPARED:
                assert settings[flag] == wanted[flag], (name, run["label"], flag)


def test_an_experiment_runs_what_is_missing_keeps_it_and_draws_it():
    staircase = registry.EXPERIMENTS["staircase"]
    two = dict(list(staircase.conditions.items())[:2])         # N = 1 and N = 2
    small = staircase._replace(conditions=two, N_test=(1, 2))
    with new_folder(), patched(experiments, "EXPERIMENTS", dict(two=small)):
        text = runs_well(experiments.main, f"two {KHOP}")
        assert "TFLOP" in text and "2 hops" in text
        file, = Path("out/experiments").glob("two*.json")
        runs = load_runs(file)
        assert [run["flags"] for run in runs] == list(two)
        assert [run["label"] for run in runs] == list(two.values())
        assert [set(run["N_test"]) for run in runs] == [{"1", "2"}] * 2
        assert all(run["tflop"] > 0 and "chance" in run["baseline"]["words"] for run in runs)
        assert is_png(file.with_suffix(".png"))
        with patched(sleep, "evaluate", None):                 # what is finished is kept
            runs_well(experiments.main, f"two {KHOP}")
        before = file.read_text()
        assert "saved" in runs_well(experiments.main, f"two --draw {file}")
        assert file.read_text() == before
        for picture in ("bars", "lines", "passes_by_cases", "as_trained", "compute"):
            getattr(plots, picture)(runs, small, Path(f"{picture}.png"))
            assert is_png(f"{picture}.png")


def test_an_experiment_refuses_flags_that_it_sets_itself_and_others_that_make_no_sense():
    with new_folder():
        for words, command in (
                ("takes no --N", "iterated --N 2"), ("takes no --conv", "conv --conv s"),
                ("takes no --seed", "depth --seed 3"), ("takes no --out", "iterated --out x"),
                ("fewer passes", "ca_long --detach 1"), ("unrecognized", "iterated --bogus 1"),
                ("hard eviction", "other_N --carry h --eviction sliding"),
                ("no results of span", "span --draw"),
                ("cannot be opened", "main --draw nothing.json"),
                ("no other flag", "main --seed 1 --draw")):
            is_refused(words, experiments.main, f"{command} --device cpu" if "--draw" not in command
                       else command)
        status, _, err = run(experiments.main, "nothing")
        assert status == 2 and "there is no experiment 'nothing'" in err
        names = runs_well(experiments.main)
        assert all(f"  {name} " in names for name in registry.EXPERIMENTS)


def flop_of(N, steps=None, **change):
    """FLOP of training on Rule 110 with two windows of eight tokens, asleep, and a short one."""
    flags = "--W 8 --L 8 --t 2 --d_model 16 --n_head 2 --batch_size 8 --steps 8"
    settings = settings_of("ca", flags) | dict(N=N, seed=0) | change
    return runner.flop(dict(task="ca", seed=0, settings=settings), steps)


def test_a_pass_costs_the_same_flop_every_time_and_an_answer_does_not_pay_for_it():
    one, two, three, four = (flop_of(N) for N in (1, 2, 3, 4))
    assert four - three == three - two
    assert two > 1.7 * one                 # two windows sleep, a short one answers
    assert 0.99 < (two - one) / (three - two) <= 1             # the first S needs no gradient
    d = 16
    matrices = 2 * (4 + 8 + 8) * d * d     # of both blocks: q k v o, up, down
    matrices += 2 * (d * d + 2 * 2 * d)    # of fast weights: z; alpha and beta
    tokens = 8 * 8 * 16                    # steps, sequences, cells
    assert three - two > 3 * tokens * matrices * 0.99          # forward, and twice that backward
    assert three - two < 3 * tokens * matrices * 1.5           # the rest: attention and the rule


def test_the_flop_of_a_training_are_those_of_its_steps_with_the_passes_that_they_made():
    whole = flop_of(3)
    assert math.isclose(flop_of(3, 4), whole / 2, rel_tol=1e-12)
    assert math.isclose(flop_of(3, steps=8, batch_size=4), whole / 2, rel_tol=1e-12)
    assert math.isclose(flop_of(3, grow_N=1.0, steps=1), flop_of(1, 1), rel_tol=1e-12)
    for change in (dict(any_N=True), dict(grow_N=1.0)):
        assert flop_of(1) < flop_of(3, **change) < whole


def test_the_tflop_of_results_are_those_of_their_settings():
    checked = 0
    for name in ("khop-staircase", "khop-layouts", "trees", "words-compute", "rule110-splits"):
        done = set()
        for saved in load_runs(RESULTS / f"{name}.json"):
            if saved["label"] in done or len(done) == 3:
                continue
            done.add(saved["label"])
            tflop = runner.flop(saved) / 1e12
            assert math.isclose(tflop, saved["tflop"], rel_tol=1e-3), saved["label"]
            checked += 1
    assert checked >= 13


# ------------------------------------------------------------------------------------------------
# The leaderboard

def a_curve(*accuracies):
    """A run of the cpu preset of train_khop.py with an evaluation every 100 steps."""
    points = [dict(step=100 * i, accuracy={"3": x}) for i, x in enumerate(accuracies, 1)]
    settings = settings_of("khop", f"--steps {100 * len(points)}") | dict(N=3, seed=0)
    return dict(task="khop", N=3, seed=0, settings=settings, curve=points)


def test_a_model_arrives_at_the_first_of_two_good_evaluations_in_a_row():
    assert leaderboard.arrival(a_curve(0.2, 0.95, 0.8, 0.9, 0.93, 0.99))["step"] == 400
    assert leaderboard.arrival(a_curve(0.2, 0.95, 0.89, 0.95)) is None
    assert leaderboard.tflop_to_arrive(a_curve(0.2, 0.95, 0.89, 0.95)) is None


def test_the_leaderboard_counts_the_compute_up_to_the_arrival():
    arrived = a_curve(0.2, 0.95, 0.95, 0.99)
    whole = runner.flop(arrived) / 1e12
    assert math.isclose(leaderboard.tflop_to_arrive(arrived), whole / 2, rel_tol=1e-12)


def test_the_leaderboard_says_who_arrived_and_refuses_another_task():
    few = "--device cpu --steps 2 --eval_every 1 --batch_size 4 --seed 0 --N 2 --out a"
    with new_folder():
        text = runs_well(leaderboard.main, few)
        assert "N 2 seed 0: did not arrive" in text and "in the mean" not in text
        with patched(leaderboard, "arrival", lambda run: run["curve"][-1]):
            assert "TFLOP in the mean" in runs_well(leaderboard.main, few)
        for words, flags in (("the task of the leaderboard", "--nodes 7 --queries 7"),
                             ("leave --think", "--think 2"),
                             ("the task of the leaderboard", "--preset gpu"),
                             ("100 steps apart", "--eval_every 200"), ("leave it out", "--resume")):
            is_refused(words, leaderboard.main, f"--device cpu {flags}")


# ------------------------------------------------------------------------------------------------
# Watching a sleep

def small_trees(flags="", N=2):
    """A task of three trees with two nodes each, and a model with random weights."""
    task = task_of("trees", f"--size 2 --depth 1 --test_depth 1 --L 12 {flags}")
    cfg = Config(task.vocab_size, task.T, L=12, N=N, layout="as", d_model=16, n_head=2)
    torch.manual_seed(0)
    model = variants.make_model(cfg, vars(task.args))
    torch.nn.init.normal_(model.head.weight)
    return task, model


def test_a_sleep_that_is_watched_is_the_sleep_of_the_model():
    for flags in ("", "--recall"):
        task, model = small_trees(flags)
        tokens, targets, _ = task.test
        h_moved, S_moved, right = when_to_wake.watch(model, tokens, targets, 3)
        assert h_moved.shape == S_moved.shape == (3, len(tokens))
        assert torch.allclose(S_moved[0], torch.ones(()))      # S was 0 before the first pass
        with torch.no_grad():
            for n in (1, 2, 3):
                wanted = model(tokens, targets, n)[0].argmax(-1) == targets
                assert torch.equal(wanted, right[n - 1])
            S = [model.sleep(model.embed(tokens[:, :12]), model.empty_memory(len(tokens)), n).S[1]
                 for n in (1, 2)]
        moved = (S[1] - S[0]).flatten(1).norm(dim=1) / S[1].flatten(1).norm(dim=1)
        close(S_moved[1], moved, 1e-4)


def test_a_sleep_stops_where_a_pass_moves_too_little_but_not_after_the_first():
    moved = torch.tensor([[0.01, 1.0, 1.0], [0.3, 0.01, 0.3], [0.01, 0.3, 0.3]])
    assert when_to_wake.stopped(moved, 0.1).tolist() == [2, 1, 2]          # else after the last


def test_edges_in_another_order_are_the_same_trees():
    tokens, _, depths = (x[:9] for x in task_of("trees", "--steps 10").test)
    for first in ("parents", "children"):
        told = when_to_wake.in_order(tokens, depths, first)
        for row, old, asked in zip(told.tolist(), tokens.tolist(), depths.tolist()):
            depth = dict(zip(row[48:], asked))
            by_edge = [depth[node] for node in row[:48:2]]
            assert by_edge == sorted(by_edge, reverse=first == "children") and row[48:] == old[48:]
            assert set(zip(row[:48:2], row[1:48:2])) == set(zip(old[:48:2], old[1:48:2]))


def test_a_walk_counts_the_edges_to_a_node_and_says_when_it_never_comes_there():
    edges = torch.tensor([[5, 3, 3, 4, 4, 5, 7, 6, 6, 6]])     # 5 > 3 > 4 > 5, and 7 > 6, a root
    start = torch.tensor([[5, 5, 5, 4, 7, 6, 7, 3]])
    end = torch.tensor([[5, 3, 4, 3, 6, 6, 5, 7]])
    assert which_node.walk(edges, 5, start, end).tolist() == [[0, 1, 2, 2, 1, 0, 5, 5]]
    tokens, roots, depths = task_of("trees", "--steps 10").test
    asked = tokens[:, -depths.shape[1]:]
    assert torch.equal(which_node.walk(tokens, depths.shape[1], asked, roots), depths)


def test_the_reach_after_a_pass_is_the_deepest_question_with_all_shallower_ones():
    accuracy = [[0.5, 1.0, 1.0], [0.95, 0.89, 0.95], [0.9, 0.9, 0.1], [1.0, 1.0, 1.0]]
    assert reach.reach(accuracy) == [0, 1, 2, 3]
    task, model = small_trees()
    tokens, targets, _ = task.test
    answers = reach.answers_after_each_pass(model, tokens, 3)
    with torch.no_grad():
        for n in (1, 2, 3):
            assert torch.equal(model(tokens, targets, n)[0].argmax(-1), answers[n - 1])


def test_programs_that_watch_a_checkpoint_write_numbers_that_agree_with_its_run():
    with new_folder():
        few = "--device cpu --steps 2 --eval_every 1 --batch_size 4 --seed 0 --N 2"
        train("khop", f"{few} --out a")
        small = "--size 2 --depth 1 --test_depth 1 --L 12 --d_model 16 --n_head 1 --N_test 1"
        train("trees", f"{few} {small} --out t")

        runs_well(when_to_wake.main, "a/N2-seed0.pt --N 3")
        found = common.read_results("a/N2-seed0-wake.json")
        assert len(found["fixed"]) == 3 and list(found["by_kind"]) == ["all windows"]
        assert is_png("a/N2-seed0-wake.png")
        runs_well(when_to_wake.main, "--draw a/N2-seed0-wake.json")
        runs_well(when_to_wake.main, "t/N2-seed0.pt --N 2 --first children --out c.png")
        assert set(common.read_results("c.json")["by_depth"]) == {"0", "1"}

        runs_well(which_node.main, "a/N2-seed0.pt --N 1 2 --out w.png")
        saved, = load_runs("a/N2-seed0.json")
        as_trained = common.read_results("w.json")["runs"][1]
        assert as_trained["passes"] == 2 and is_png("w.png")
        for k, row in as_trained["share"].items():
            assert abs(sum(row) - 1) < 1e-3
            assert abs(row[int(k)] - saved["accuracy"][k]) < 1e-3          # its diagonal
        runs_well(which_node.main, "--draw w.json")

        runs_well(reach.main, "t/N2-seed0.pt --passes 3 --out r.png")
        for measured in common.read_results("r.json")["runs"]:
            assert len(measured["accuracy"]) == len(measured["said"]) == 3
            assert all(abs(sum(row) - 1) < 1e-2 for row in measured["said"])
        runs_well(reach.main, "--draw r.json")

        train("khop", f"{few} --K 5 --out k5")
        train("khop", f"{few} --L 12 --out short")
        for words, main, command in (
                ("no checkpoint", when_to_wake.main, "a/N2-seed0.json"),
                ("no checkpoint", when_to_wake.main, "nothing.pt"),
                ("from 2 to", when_to_wake.main, "a/N2-seed0.pt --N 1"),
                ("for trees only", when_to_wake.main, "a/N2-seed0.pt --first parents"),
                ("one window", when_to_wake.main, "short/N2-seed0.pt"),
                ("name a checkpoint", when_to_wake.main, ""),
                ("holds no numbers", when_to_wake.main, "--draw w.json"),
                ("no checkpoint", which_node.main, "a/N2-seed0.json"),
                ("from 0 to", which_node.main, "a/N2-seed0.pt --N -1"),
                ("another test", which_node.main, "a/N2-seed0.pt k5/N2-seed0.pt"),
                ("holds no numbers", which_node.main, "--draw r.json"),
                ("no checkpoint of trees", reach.main, "a/N2-seed0.pt"),
                ("holds no numbers", reach.main, "--draw w.json")):
            is_refused(words, main, command)


# ------------------------------------------------------------------------------------------------
# The course

def test_the_ladder_climbs_from_a_hebbian_write_to_a_pass_that_buys_a_hop():
    found = {step.__name__: list(step().values()) for step in ladder.STEPS}
    assert list(found) == "hebbian forgetting delta write_back attention_beside evict loop".split()
    assert found["hebbian"][0] > 0.95
    remembered, faded, its_price = found["forgetting"]
    assert remembered < 0.65 and faded > 0.95 and its_price < 0.6
    assert found["delta"][0] > 0.95
    two_reads, one_read, slept = found["write_back"]
    assert min(two_reads, slept) > 0.95 and one_read < 0.15
    by_S, by_attention = found["attention_beside"]
    assert by_S < 0.8 and by_attention > 0.95
    by_attention, by_S = found["evict"]
    assert by_attention < 0.15 and by_S > 0.95
    *loops, thrown_away = found["loop"]
    for N, by_hops in enumerate(loops, 1):                     # a pass buys a hop
        assert min(by_hops[:N]) > 0.95 and max([0, *by_hops[N:]]) < 0.15
    assert min(thrown_away[:2]) > 0.95 and max(thrown_away[2:]) < 0.15     # without h: two hops


def test_the_ladder_prints_every_step_with_its_numbers():
    text = runs_well(ladder.main)
    for step in ladder.STEPS:
        assert step.__doc__.splitlines()[0] in text
    rows = re.findall(r"N = (\d): 1, 2, 3, 4 hops +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)", text)
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    for N, *shares in rows:
        assert [float(share) > 0.95 for share in shares] == [k <= int(N) for k in (1, 2, 3, 4)]


def test_every_stub_of_the_exercises_fails_and_every_solution_passes():
    for number in range(1, 11):
        assert exercises.grade(number, exercises) == "nothing is written yet."
        assert exercises.grade(number, solutions) is None, number
        hint = runs_well(exercises.main, f"{number} --hint")
        assert hint.strip() == exercises.HINTS[number - 1]
    assert run(exercises.main, "3") == (1, "", "3, delta: nothing is written yet.\n")
    is_refused("from 1 to 10", exercises.main, "11")
    assert "10  your own rule" in runs_well(exercises.main)


def test_wrong_answers_to_the_exercises_are_told_in_a_sentence_that_names_the_function():
    wrong = {
        1: dict(capacity=lambda V, K: V),
        2: dict(log_alpha_for_half=lambda L, N: -math.log(2) / L),
        3: dict(which_replay_repairs=lambda: {"delta", "hebbian"}),
        4: dict(compose=lambda S, keys, keys2: S),
        5: dict(two_tokens=lambda *x: (x[2], x[5])),
        6: dict(can_depend=lambda eviction, emptied, N: not emptied),
        7: dict(sleep_over=lambda model, h, memory, N: model.sleep(h, memory, 1)),
        8: dict(stream=lambda model, tokens: model(tokens, tokens)[0]),
        9: dict(sleep_until_still=lambda model, h, memory, *_: (model.sleep(h, memory, 12), 12)),
        10: dict(Unwritten=sleep.FastWeights)}
    for number, change in wrong.items():
        said = exercises.grade(number, SimpleNamespace(**vars(solutions) | change))
        assert said is not None and said.startswith(next(iter(change))), (number, said)


# ------------------------------------------------------------------------------------------------
# The demonstration

@cache
def shipped():
    """The model that ships, its task, a cycle in another order than its names, and its tokens."""
    model, task = demo.load(demo.SHIPPED)
    edges = demo.draw_edges(3, 12)
    return model, task, edges, demo.spell(task, edges)


def test_the_demonstration_asks_what_training_asks_and_shows_the_sleep_of_algorithm_1():
    model, task, edges, tokens = shipped()
    node = torch.arange(12)
    k = node % 4                           # what the demonstration asks in its first row
    asked = torch.stack([train_khop.ONE + k, task.node + node], 1).reshape(1, -1)
    targets = torch.full((1, 24), -1)
    targets[:, 1::2] = task.node
    frames, memory = demo.watch(model, task, tokens, 3)
    assert [(frame.window, frame.n) for frame in frames] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    for block in memory.cache:
        assert block.tail.shape[1] == 0 and (block.keys is None or block.keys.shape[2] == 0)
    for frame in frames:                   # asked after n passes: the model with N = n
        with torch.no_grad():
            logits = model(torch.cat([tokens, asked], 1), targets, frame.n)[0][0, 1::2]
        close(frame.answers[k, node], logits[:, task.node:].softmax(-1), 1e-4)
    truth = demo.right_answers(edges, 4)
    after = dict(edges)
    assert [after[after[x]] for x in range(12)] == truth[1].tolist()
    right = [(frame.answers.argmax(-1) == truth).double().mean().item() for frame in frames]
    assert right[0] < 0.3 and right[1] < right[2] < right[3] and right[3] > 0.9
    moved = (frames[2].S[0] - frames[1].S[0]).norm() / frames[2].S[0].norm()
    assert abs(frames[2].S_moved - moved) < 1e-5


def test_the_demonstration_runs_without_flags_and_refuses_edges_that_are_no_cycle_in_a_sentence():
    text = runs_well(demo.main)
    assert text.count("12 of 12") >= 4 and "evicted" in text and "\033" not in text
    ring = " ".join(f"{i}>{(i + 5) % 12}" for i in range(12))
    assert "0>5  1>6" in runs_well(demo.main, ["--edges", ring])
    pairs = " ".join(f"{i}>{i ^ 1}" for i in range(12))
    for words, edges in (("write them as", "0-1"), ("no node 12", ring.replace("0>5", "0>12")),
                         ("points to two nodes", ring + " 0>3"), ("starts at node 0", ring[4:]),
                         ("back after 2 steps", pairs), ("starts at node 0", ""),
                         ("never comes back", ring.replace("7>0", "7>5"))):
        is_refused(words, demo.main, ["--edges", edges])
    is_refused("no checkpoint", demo.main, ["--checkpoint", "nothing.pt"])
    is_refused("is no checkpoint of train_khop.py", demo.main, ["--checkpoint", HERE / "sleep.py"])


def test_the_interactive_page_works_offline_and_answers_a_click():
    model, task, edges, tokens = shipped()
    with new_folder() as place:
        page = place / "page.html"
        runs_well(interactive_page.main, [demo.SHIPPED, "--seed", "3", "--out", page])
        text = page.read_text(encoding="utf-8")
        template = interactive_page.PAGE.read_text(encoding="utf-8")
        assert text.split("const data = ")[0] == template.split("const data = ")[0]
        assert "http" not in text.replace("http-equiv", "")
        assert "src=" not in text and "NaN" not in text
        data = json.loads(re.search("(?m)^const data = (.*);$", text)[1])
        assert data["edges"] == [list(edge) for edge in edges] and len(data["frames"]) == 4
        is_refused("ends in .html", interactive_page.main, [demo.SHIPPED, "--out", "page.txt"])

        browsers = [shutil.which(name) for name in ("chromium", "google-chrome", "chrome")]
        browser = next((found for found in browsers if found), None)
        if browser is None:
            print("skipped: the page in a browser, since none is installed")
            return
        page.write_text(text.replace("</html>", """<script>
            document.querySelector('td[data-k="2"][data-q="5"]').click();
            document.getElementById("back").click(); </script></html>"""), encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                 f"--user-data-dir={place}/profile", "--dump-dom"]
        dom = subprocess.run([browser, *flags, page.as_uri()], capture_output=True, text=True,
                             timeout=60).stdout
        frame = demo.watch(model, task, tokens, 3)[0][2]       # one step back: after pass 2
        said = frame.answers[2, 5].argmax().item()
        truth = demo.right_answers(edges, 4)[2, 5].item()
        verdict = f"says {said}, right" if said == truth else f"says {said}; right is {truth}"
        assert "after pass 2 of 3" in dom and "3 hops after 5?" in dom and f">{verdict}<" in dom


# ------------------------------------------------------------------------------------------------
# Tools

def test_runs_are_drawn_and_merged_and_the_rest_is_refused_in_a_sentence():
    small = ("--device cpu --W 8 --t 2 --d_model 16 --n_head 2 --batch_size 8 --steps 4 "
             "--eval_every 2")
    with new_folder():
        train("ca", f"{small} --L 8 --N 1 2 --out run")
        train("ca", f"{small} --L 4 --N 2 --out other")
        train("khop", f"{KHOP} --N 1 --out khop")
        runs_well(draw_runs.main, "run")
        assert is_png("run/plot.png")
        runs_well(draw_runs.main, "run other run --merge all.json")        # each run once
        runs = load_runs("all.json")
        assert len(runs) == 3 and is_png("all.png")
        assert set(draw_runs.kinds(runs)) == {"N = 1, L = 8", "N = 2, L = 8", "N = 2, L = 4"}
        for words, command in (
                ("cannot be opened", "nothing"), ("add --out", "run other"),
                ("is there already", "run --merge all.json"),
                ("ends in .json", "run --merge x.txt"),
                ("several tasks", "run khop --out x.png"), ("ends in .png", "run --out x.txt")):
            is_refused(words, draw_runs.main, command)


def test_the_benchmark_measures_all_its_parts():
    with new_folder():
        runs_well(benchmark.main, "--quick --device cpu --out bench")
        results = common.read_results("bench/results.json")
        assert is_png("bench/plot.png")
        is_refused("cannot be made", benchmark.main, "--quick --device cpu --out bench")
        runs_well(benchmark.main, "--draw bench/results.json")
        assert is_png("bench/results.png")
    rules = {row["rule"] for row in results["bench_rule"]}
    assert rules >= {"recurrent", "chunked", "chunked, block merge"}
    assert all(row["error"] < 1e-5 and row["both"][0] > 0 for row in results["bench_rule"])
    assert [row["N"] for row in results["bench_N"]] == [1, 2]
    assert [row["N"] for row in results["bench_wake"]] == [1, 2]
    assert all(0 < row["share"] < 1.5 for row in results["bench_N"])
    assert {row["L"] for row in results["bench_L"]} == {64, 256}
    row = results["bench_wake"][0]         # float32: S is 2 x 32 x 32, keys and values 64 each
    assert row["bytes_S"] == 4 * 2 * 32 * 32 and row["bytes_cache"] == 4 * 64 * 2 * 64
    assert row["bytes_full_attention"] == 4 * 1024 * 2 * 64
    is_refused("tpu", benchmark.main, "--device tpu")


def test_training_on_this_machine_has_the_gradients_of_the_plain_model_and_a_fault_is_found():
    flags = "" if torch.cuda.is_available() else "--no_compile"
    assert "good: what is trained here" in runs_well(gpu_check.main, flags)
    for factor in (1.01, 2.0, float("nan")):
        status, _, err = verdict_with_fault(factor)
        assert status == 1 and "not good: hard eviction" in err


def test_the_check_of_a_gpu_allows_the_rounding_of_bfloat16_and_not_more():
    with patched(sleep, "has_bf16", lambda device: True):
        assert "bfloat16" in runs_well(gpu_check.main, "--device cpu --no_compile")
        assert verdict_with_fault(1.01)[0] == 0
        assert verdict_with_fault(2.0)[0] == 1
        assert verdict_with_fault(float("nan"))[0] == 1


def verdict_with_fault(factor):
    """The check of its first case on the CPU, if training has its gradients times a factor."""
    make_gradients = sleep.make_gradients

    def make_wrong_gradients(model, compile, recompute):
        gradients = make_gradients(model, compile, recompute)

        def wrong(*args):
            loss = gradients(*args)
            if not recompute:              # the plain models of the check repeat their passes
                for p in model.parameters():
                    if p.grad is not None:
                        p.grad *= factor
            return loss

        return wrong

    name, case = next(iter(gpu_check.CASES.items()))
    with (patched(sleep, "make_gradients", make_wrong_gradients),
          patched(gpu_check, "CASES", {name: case})):
        return run(gpu_check.main, "--device cpu --no_compile")


def test_a_figure_of_the_paper_says_its_cost_then_runs_its_share_and_is_drawn():
    short = "--preset cpu --device cpu --share 0.002 --batch_size 4 --d_model 16"

    def commonest(cells, label, trained):
        return label[trained].mode()[0].expand(len(cells))

    with new_folder(), patched(baselines, "network", commonest):
        for name, few in (("2b", "--W 8 --L 8 --t 2"), ("3", "--nodes 7 --L 14 --queries 2")):
            text = runs_well(paper_figures.main, f"{name} {short} {few}")
            assert "PFLOP" in text and "The paper:" in text
        runs_well(paper_figures.main, f"3 {short} --cost")
        made = sorted(path.suffix for path in Path("out/experiments").glob("figure-*"))
        assert made == [".json", ".json", ".png", ".png"]
        for words, command in (("no figure 7", "7"), ("above 0", "3 --share 2"),
                               ("takes no --N", "3 --device cpu --N 2"),
                               ("paper or cpu", "3 --preset gpu")):
            is_refused(words, paper_figures.main, command)


def test_every_figure_of_the_paper_has_two_sizes_and_each_condition_makes_a_model():
    for name, paper_figure in paper_figures.FIGURES.items():
        for preset, experiment in paper_figure.experiments.items():
            flags = ["--preset", preset, "--device", "cpu"]
            if experiment.task == "gsm":
                flags += ["--tests", "8"]
            assert runner.plan(experiment, flags, name)


def test_the_mechanism_is_drawn():
    with new_folder():
        runs_well(draw_mechanism.main, "--out m.png")
        assert is_png("m.png")
        is_refused("ends in .png", draw_mechanism.main, "--out m.txt")


# ------------------------------------------------------------------------------------------------
# Results

def test_every_file_of_results_has_a_run_a_line_and_can_be_drawn_or_read():
    files = sorted(RESULTS.glob("*.json"))
    assert len(files) >= 25
    for file in files:
        results = common.read_results(file)
        text = file.read_text(encoding="utf-8")
        assert text == common.to_json(common.rounded(results)), file
        runs = results.get("runs")
        if runs is None:                   # a measurement
            continue
        lines = [json.loads(line.strip().rstrip(",")) for line in text.splitlines()[1:-1]]
        assert lines == runs, file
        if "settings" in runs[0]:
            load_runs(file)
        if "share" in runs[0]:
            rows = [row for run in runs for row in run["share"].values()]
            assert all(abs(sum(row) - 1) < 2e-3 for row in rows), file


def test_the_leaderboard_has_the_arrivals_of_its_runs():
    page = (HERE / "lab/pages/leaderboard.md").read_text(encoding="utf-8")
    said = re.search(r"^\| (.*?) \| none: the preset", page, re.M)[1]
    runs = [run for run in load_runs(RESULTS / "khop-staircase.json") if run["N"] == 3]
    found = [leaderboard.tflop_to_arrive(run) for run in runs if run["seed"] in (0, 1, 2)]
    assert agrees(said, found), (said, found)


# ------------------------------------------------------------------------------------------------
# Pages: tables

def tables(text):
    """[(results, header, rows)] of the tables of a page; results: the last file named before it."""
    found = []
    results = None
    lines = text.splitlines()
    for i, line in enumerate(lines):
        named = re.findall(r"results/([\w-]+)\.json", line)
        if line.startswith("|---"):
            header = cells_of(lines[i - 1])
            rows = []
            for row in lines[i + 1:]:
                if not row.startswith("|"):
                    break
                rows.append(cells_of(row))
            found.append((results, header, rows))
        elif named and not line.startswith("|"):
            results = named[-1]
    return found


def cells_of(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def runs_of_row(runs, words):
    """The runs whose label a row's first cell begins with, the longest such label."""
    labels = {run["label"] for run in runs if words.startswith(run["label"])}
    if not labels:
        return []
    label = max(labels, key=len)
    return [run for run in runs if run["label"] == label]


def agrees(cell, values):
    """Is a cell, "0.85 (0.20): 0.96 0.62 0.97" or less, mean, deviation and values of these values?

    None if it holds something else.
    """
    parts = re.fullmatch(r"([\d.]+)(?: \(([\d.]+)\))?(?:: ([\d. ]+))?", cell)
    if parts is None:
        return None
    half = 0.5 * 10 ** -len(parts[1].partition(".")[2])
    half += 5e-4 * abs(mean(values))       # results have four digits
    right = abs(float(parts[1]) - mean(values)) <= half
    if parts[2]:
        right = right and abs(float(parts[2]) - torch.tensor(values).std().item()) <= half
    if parts[3]:
        said = [float(word) for word in parts[3].split()]
        right = right and len(said) == len(values)
        right = right and all(abs(a - b) <= half for a, b in zip(said, values))
    return right


def numbers_behind(runs, header, column, row):
    """The numbers of the seeds behind a cell of one of three kinds of tables, or None."""
    of_row = runs_of_row(runs, row[0])
    if header[column] == "TFLOP":
        return [of_row[0]["tflop"]] if of_row else None
    number = re.match(r"(?:k = |depth )?(\d+)\b", header[column])
    if number is None:
        return None
    number = number[1]
    if header[0].startswith("accuracy") and of_row:            # conditions down, cases to the right
        return [run["accuracy"][number] for run in of_row]
    if header[0].startswith("passes at the test"):             # passes down, cases to the right
        return [run["N_test"][row[0]]["accuracy"][number] for run in runs]
    if header[0].startswith("depth 7") and of_row:             # conditions down, passes right
        return [run["N_test"][number]["accuracy"]["7"] for run in of_row]
    return None


def test_the_tables_of_khop_and_trees_are_computed_from_the_results_that_they_name():
    checked = {}
    for page in ("khop", "trees"):
        text = (HERE / f"lab/pages/{page}.md").read_text(encoding="utf-8")
        for results, header, rows in tables(text):
            if results is None or "settings" not in common.read_results(
                    RESULTS / f"{results}.json").get("runs", [{}])[0]:
                continue
            runs = load_runs(RESULTS / f"{results}.json")
            for row in rows:
                for column in range(1, len(header)):
                    values = numbers_behind(runs, header, column, row)
                    right = None if values is None else agrees(row[column], values)
                    if right is not None:
                        assert right, (page, results, row[0], header[column], row[column], values)
                        checked[results] = checked.get(results, 0) + 1
    assert checked["khop-staircase"] == 20 and checked["khop-depth"] == 75
    assert checked["trees"] == 56 and sum(checked.values()) > 300, checked


def test_the_table_of_the_readme_holds_the_means_of_results():
    labels = {                             # how a row begins, and the label of its runs
        "N = 1 (": "N = 1",
        "N = 1 with the compute of N = 3": "N = 1, 2.2 x tokens",
        "N = 1 in small batches": "N = 1 in batches of 16",
        "N = 1 with ten times the tokens": "N = 1, 10 x tokens",
        "N = 1, three passes over": "N = 1 and 3 passes over the answers",
        "N = 3 (": "N = 3"}
    runs = load_runs(RESULTS / "khop-depth.json")
    staircase = load_runs(RESULTS / "khop-staircase.json")
    checked = 0
    for _, header, rows in tables(README.read_text(encoding="utf-8")):
        if "TFLOP" not in header:
            continue
        for row in rows:
            label, = [labels[start] for start in labels if row[0].startswith(start)]
            of_row = [run for run in runs if run["label"] == label]
            for name, cell in zip(header[1:], row[1:]):
                if name == "TFLOP":
                    values = [of_row[0]["tflop"]]
                else:
                    values = [run["accuracy"][name.split()[0]] for run in of_row]
                assert agrees(cell, values), (label, name, cell, values)
                checked += 1
            if label in ("N = 1", "N = 3"):                    # the same runs are in both files
                in_both = [run for run in staircase if run["label"] == f"trained with {label}"]
                assert [run["accuracy"] for run in in_both] == [run["accuracy"] for run in of_row]
    assert checked == 15


# ------------------------------------------------------------------------------------------------
# Pages: links, commands, code

README = HERE / "README.md"
PAGES = [README, HERE / "lab/README.md", HERE / "lab/course/lecture.md",
         *sorted(HERE.glob("lab/pages/*.md"))]


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(words.replace(" ", "-"))
    return found


def test_every_link_and_picture_of_a_page_is_there():
    n_links = 0
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), (page.name, target)
            if anchor:
                assert anchor in anchors(file.read_text(encoding="utf-8")), (page.name, target)
            n_links += 1
    assert n_links > 150


def test_every_page_and_picture_of_the_lab_is_reached_from_a_page():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for file in [*HERE.glob("lab/pages/*.md"), *PICTURES.glob("*.png"), *RESULTS.glob("*.json")]:
        assert f"/{file.name}" in text or f"({file.name}" in text, f"{file} is in no page"


class Parsed(BaseException):
    """A program has accepted its command line."""


def accept(command):
    """Run a command until it has parsed its flags; AssertionError if it refuses them."""
    _, *words = shlex.split(command.replace("NAME", "main"))
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args):
        parse_args(*args)
        raise Parsed

    if words[0] == "-m":
        name, *argv = words[1:]
        if (HERE / name.replace(".", "/")).is_dir():
            name += ".__main__"
        main = importlib.import_module(name).main
    elif words[0] == "sleep.py":
        argv = words[1:]
        main = demo.main
    elif words[0] in ("train_ca.py", "train_khop.py", "train_gsm.py"):
        argv = words[1:]
        module = importlib.import_module(words[0].removesuffix(".py"))

        def main(argv):
            sleep.main(module.__doc__, module.PRESETS, module.FLAGS, None, argv)
    else:
        assert (HERE / words[0]).is_file(), command
        return
    with (patched(argparse.ArgumentParser, "parse_args", parse_and_stop),
          patched(runner, "redraw", lambda *_: "")):
        try:
            status, _, err = run(main, argv)
        except Parsed:
            return
    assert status < 2, (command, err)      # programs without flags run


def commands(text):
    """What starts with python in code spans, in blocks of shell, and in indented lines."""
    lines = re.findall(r"`(python [^`]*)`", text)
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        lines += block.splitlines()
    lines += re.findall(r"^ {2,}(python .*)$", text, re.M)
    commands = [re.split(r" {2,}|#|->", line)[0].strip() for line in lines]
    return {command for command in commands if command.startswith("python ")}


def test_every_command_that_a_page_names_exists_and_takes_its_flags():
    found = set()
    for page in PAGES:
        found |= commands(page.read_text(encoding="utf-8"))
    board = (HERE / "lab/pages/leaderboard.md").read_text(encoding="utf-8")
    for flags in re.findall(r"^\|.*?`(--[^`]*)`", board, re.M):
        found.add(f"python -m lab.experiments.leaderboard {flags}")
    assert len(found) > 50
    for command in sorted(found):
        accept(command)


def test_every_command_that_a_program_names_exists_and_takes_its_flags():
    found = set()
    for file in [*HERE.glob("*.py"), *HERE.glob("lab/**/*.py")]:
        found |= commands(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "")
    assert len(found) > 30
    for command in sorted(found):
        accept(command)


def test_a_command_that_does_not_exist_or_has_another_flag_is_found_out():
    for command in ("python sleep.py --bogus", "python train_ca.py --bogus 1",
                    "python train_khop.py --recall", "python -m lab.experiments bogus",
                    "python -m lab.experiments main --bogus",
                    "python -m lab.tools.benchmark --fast",
                    "python -m lab.experiments.trees --bogus 1", "python bogus.py",
                    "python -m lab.bogus", "python -m lab.course.exercises 11"):
        try:
            accept(command)
        except (AssertionError, ModuleNotFoundError):
            continue
        raise AssertionError(f"{command} was accepted")


def test_the_output_that_the_readme_quotes_is_printed():
    blocks = re.findall(r"```text\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    quoted = [block for block in blocks if block.startswith("$ python sleep.py\n")]
    assert len(quoted) == 1
    printed = subprocess.run([sys.executable, "sleep.py"], cwd=HERE, capture_output=True, text=True,
                             check=True).stdout
    lines = [line for line in quoted[0].splitlines()[1:] if line.strip() not in ("", "...")]
    assert len(lines) >= 5
    for line in lines:
        assert line.rstrip() in printed, line


def test_the_python_of_the_pages_runs_or_is_that_of_sleep():
    source = without_comments((HERE / "sleep.py").read_text(encoding="utf-8"))
    n_run = 0
    for page in PAGES:
        for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            if "import" not in code:       # a part of sleep.py
                assert without_comments(code) in source, code
                continue
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(code, {})
            said = re.findall(r"print\(.*# (\[.*?\])", code)
            assert printed.getvalue().splitlines() == said, (page.name, printed.getvalue())
            n_run += 1
    assert n_run >= 1


def without_comments(code):
    """Lines of Python without comments, indentation and empty lines."""
    lines = [line.partition("#")[0].strip() for line in code.splitlines()]
    return "\n" + "\n".join(line for line in lines if line) + "\n"


def changed_by(diff):
    """sleep.py up to where the method ends, with the lines of a diff exchanged, as a module."""
    method = (HERE / "sleep.py").read_text(encoding="utf-8").partition("# The method ends here.")[0]
    old, = re.findall(r"^-(.*)$", diff, re.M)
    new, = re.findall(r"^\+(.*)$", diff, re.M)
    assert method.count(old + "\n") == 1, old
    module = type(sys)("changed")
    with patched(sys, "modules", sys.modules | dict(changed=module)):      # for the dataclass
        exec(method.replace(old + "\n", new + "\n"), module.__dict__)
    return module


def test_the_changes_that_the_readme_proposes_apply_and_do_what_it_says():
    diffs = re.findall(r"```diff\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    replay, overshoot = [changed_by(diff) for diff in diffs]

    model = tiny(lambda cfg: replay.SleepLM(replay.Config(**vars(cfg))), layout="as", N=3)
    tokens = random_tokens(13)
    targets = targets_for(tokens, 3)
    same_outcome(model, changed(carry="S", layout="as", N=3), tokens, targets)

    cfg = Config(7, 20, 5, layout="s", d_model=16, n_head=2)
    torch.manual_seed(0)
    proposed = overshoot.FastWeights(cfg)
    x = torch.randn(2, 9, 16)
    S = torch.randn(2, 2, 8, 8)
    of_the_lab = swaps.Overshoot(cfg)
    plain = sleep.FastWeights(cfg)
    for layer in (of_the_lab, plain):
        layer.load_state_dict(proposed.state_dict())
    for a, b in zip(proposed(x, S), of_the_lab(x, S)):
        close(a, b, 1e-6)
    differ(proposed(x, S)[1], plain(x, S)[1])


def test_the_lab_imports_nothing_beyond_torch_numpy_tqdm_and_matplotlib():
    known = {"torch", "numpy", "tqdm", "matplotlib", "lab", *sys.stdlib_module_names}
    known |= {file.stem for file in HERE.glob("*.py")}
    for file in HERE.glob("lab/**/*.py"):
        for statement in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(statement, ast.Import):
                names = [alias.name for alias in statement.names]
            elif isinstance(statement, ast.ImportFrom):
                names = [statement.module]
            for name in names:
                compared = file.name == "benchmark.py" and name.startswith("fla.")     # if there
                assert name.partition(".")[0] in known or compared, (file.name, name)


# ------------------------------------------------------------------------------------------------

def main():
    """The tests whose names are asked for. Exit status 1 if one fails, or if there is none."""
    if not __debug__:
        sys.exit("python -O removes every assert, so nothing is tested: leave it out.")
    words = sys.argv[1:]
    names = [name for name in globals() if name.startswith("test_")]
    names = [name for name in names if not words or any(word in name for word in words)]
    n_failed = 0
    begin = time.monotonic()
    for name in names:
        start = time.monotonic()
        word = "ok  "
        try:
            globals()[name]()
        except (Exception, SystemExit):
            n_failed += 1
            word = "FAIL"
            traceback.print_exc()
        seconds = time.monotonic() - start
        print(f"{word}  {seconds:5.1f} s  {name[5:].replace('_', ' ')}", flush=True)
    print(f"{len(names) - n_failed} passed, {n_failed} failed, {time.monotonic() - begin:.0f} s")
    sys.exit(1 if n_failed or not names else 0)


if __name__ == "__main__":
    main()
