"""Tests of all that is not the method: the machine, files and scripts; the three tasks; the course;
the lab and its pages; a pretrained model. A test has its claim as its name.

    python test_sleep.py                     all tests, those of this file among them
    python test_sleep.py resume compiled     those whose names contain one of the words
"""
import argparse
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
import runpy
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections import Counter
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sleep
import test_sleep
import train_ca
import train_gsm
import train_khop
from lab import common
from lab.common import PICTURES, RESULTS, load_runs, mean
from lab.course import demo, demo_trees, exercises, ladder, make_notebook, solutions
from lab.course import tiny as tiny_py
from lab.experiments import __main__ as experiments
from lab.experiments import (baselines, exchange, hops, leaderboard, plots, reach, recall, registry, runner,
                             swaps, trees, variants, when_to_wake, which_node)
from lab.pretrained import __main__ as pretrained_demo
from lab.pretrained import facts, gguf, read
from lab.pretrained import folder as folders
from lab.pretrained import model as pretrained
from lab.pretrained import tokenizer as tokenizers
from lab.tools import (benchmark, draw_mechanism, draw_runs, gpu_check, interactive_page,
                       paper_figures)
from sleep import Config, SleepLM
from test_sleep import (ECHO, HERE, TASKS, Echo, a_run, built, close, echo, echo_plan, folder,
                        gradients, patched, random_tokens, refused, run, same, settings,
                        targets_for, tiny, weights)


# ================================================================================================
# Part 1: the rest of sleep.py, from compiled blocks to whole scripts

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
            f = sleep.accelerate(model, compile, recompute)
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
        compiled = sleep.accelerate(models[0], True, False)
        plain = sleep.accelerate(models[1], False, False)
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
            sleep.accelerate(model, True, recompute)(tokens, targets, 2)
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
        f = sleep.accelerate(model, compile, False)
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


class StandInGraph:
    """In the place of torch.cuda.CUDAGraph: a replay runs the recorded step again, on the CPU."""
    step = None                            # what is being recorded

    def replay(self):
        loss = self.step()
        self.buffers[0].copy_(loss)
        for buffer, p in zip(self.buffers[1:], self.parameters):
            if buffer is not None:
                buffer.copy_(p.grad)


@contextlib.contextmanager
def cuda_graphs_on_the_cpu():
    """sleep.CudaGraphs without a GPU; yields a list that gets an entry for each recording."""
    recordings = []

    @contextlib.contextmanager
    def recording(graph, **kwargs):
        recordings.append(graph)
        yield

    def nothing(*args, **kwargs):
        return SimpleNamespace(wait_stream=lambda stream: None)

    record = sleep.CudaGraphs.record

    def record_and_note(self, tokens, targets, asleep, N):
        result = record(self, tokens, targets, asleep, N)
        graph, inputs, loss, grads = result
        graph.step = partial(self.step, *inputs, asleep, N)
        graph.parameters = list(self.model.parameters())
        graph.buffers = [loss, *grads]
        return result

    with (patched(torch.cuda, "Stream", nothing), patched(torch.cuda, "current_stream", nothing),
          patched(torch.cuda, "graph_pool_handle", nothing), patched(torch.cuda, "graph", recording),
          patched(torch.cuda, "stream", lambda side: contextlib.nullcontext()),
          patched(torch.cuda, "CUDAGraph", StandInGraph),
          patched(sleep.CudaGraphs, "record", record_and_note)):
        yield recordings


def test_a_recorded_step_is_the_plain_one_and_every_kind_of_batch_is_recorded_once():
    plain = tiny(layout="as")
    model = tiny(layout="as")
    with cuda_graphs_on_the_cpu() as recordings:
        f = sleep.CudaGraphs(model)
        for seed, (T, N, frozen) in enumerate(((12, 2, False), (12, 2, False), (7, 2, False),
                                               (12, 3, False), (12, 2, True), (12, 2, False))):
            tokens = random_tokens(T=T, seed=seed)
            targets = targets_for(tokens, 2)
            for some_model in (plain, model):
                some_model.blocks[0].requires_grad_(not frozen)
            loss = sleep.forward_backward(plain, tokens, targets, N)
            close(f(tokens, targets, N), loss, 1e-12)
            for p, q in zip(model.parameters(), plain.parameters()):
                assert (p.grad is None) == (q.grad is None)
                if q.grad is not None:
                    close(p.grad, q.grad, 1e-12)
        assert len(recordings) == 4


def test_a_random_step_and_one_that_cannot_be_recorded_are_refused_in_a_sentence():
    tokens = random_tokens(T=12)
    targets = targets_for(tokens, 2)
    with cuda_graphs_on_the_cpu():
        refused("--recompute", sleep.CudaGraphs(tiny(Dropping)), tokens, targets, 2)
        new = Dropping(Config(7, 20, 5, d_model=16, n_head=2))             # its head is 0
        refused("--recompute", sleep.CudaGraphs(new), tokens, targets, 2)

        @contextlib.contextmanager
        def failing(graph, **kwargs):
            yield
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        with patched(torch.cuda, "graph", failing):
            refused("not permitted when stream is capturing): add --recompute",
                    sleep.CudaGraphs(tiny()), tokens, targets, 2)


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
        assert resumed.pop("seconds") >= 1000 > straight.pop("seconds")    # those before count, too
        assert resumed == straight
        assert [entry["step"] for entry in resumed["curve"]] == [2, 4, 6, 8]


class Dropping(SleepLM):
    """A model that is random in training."""

    def one_pass(self, h, S, cache):
        h, S, cache = super().one_pass(h, S, cache)
        return F.dropout(h, 0.5, self.training), S, cache


def test_a_model_with_dropout_recomputes_its_own_passes_and_resumes_exactly():
    tokens = random_tokens(T=17)
    targets = targets_for(tokens, 2)
    results = []
    for recompute in (False, True):
        model = tiny(Dropping, N=3)
        f = sleep.accelerate(model, compile=False, recompute=recompute)
        torch.manual_seed(0)
        loss = f(tokens, targets, None)
        results.append([loss, *[p.grad for p in model.parameters()]])
        assert not torch.equal(loss, f(tokens, targets, None))             # it is random
    for plain, recomputed in zip(*results):
        close(recomputed, plain, 1e-12)

    with folder() as a, folder() as b:
        make_model = {"make_model": lambda cfg, settings: Dropping(cfg)}
        assert echo(f"--eval_every 2 --out {a}", **make_model)[0] == 0
        b.mkdir()
        assert echo(f"--eval_every 2 --out {b} --resume", stop_at(5), **make_model)[0] == 130
        assert echo(f"--eval_every 2 --out {b} --resume", **make_model)[0] == 0
        assert same(weights(a), weights(b))


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


def test_a_folder_of_another_task_is_not_resumed_into():
    with folder() as out:
        out.mkdir()
        (out / "N1-seed0.json").write_text(json.dumps(dict(task="ca")), encoding="utf-8")
        line = ["--N", "2", "--steps", "1", "--resume", "--out", str(out)]
        status, _, err = run(sleep.main, train_khop.__doc__, train_khop.PRESETS, train_khop.FLAGS,
                             train_khop.Cycles, line)
        assert status == 2 and "holds runs of the task ca, not of khop" in err, err


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


def test_the_demonstration_refuses_a_checkpoint_that_it_cannot_show_in_a_sentence():
    saved = torch.load(demo.SHIPPED, weights_only=True)
    nan = saved["model"] | {"head.weight": saved["model"]["head.weight"] * torch.nan}
    shape = saved["model"] | {"head.weight": saved["model"]["head.weight"][:1]}
    run_of = saved["run"]
    with folder() as place:
        place.mkdir()
        path = place / "x.pt"
        for words, changes in (
                ("not finite", dict(model=nan)),
                ("no checkpoint of train_khop.py", dict(model=shape)),
                ("no checkpoint of train_khop.py", dict(model=[])),
                ("no checkpoint of train_khop.py", dict(run=run_of | dict(task="ca"))),
                ("no checkpoint of train_khop.py",
                 dict(run=run_of | dict(settings=run_of["settings"] | dict(nodes=4))))):
            torch.save(saved | changes, path)
            refused_to_show(words, path)
        damaged = bytearray(demo.SHIPPED.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
        refused_to_show("a damaged one", path)
        path.write_bytes(damaged[:1000])
        refused_to_show("no checkpoint of train_khop.py", path)
        refused_to_show("there is no checkpoint", place)
        refused_to_show("there is no checkpoint", place / "y.pt")


def refused_to_show(words, path):
    status, text, err = run(demo.main, ["--checkpoint", str(path)])
    assert status == 2 and not text and words in err and err.count("\n") == 1, (words, err)
    assert not re.search(r"\w(Error|Input)\b", err), err         # no name of an exception


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
        command = "the command of the other process"
        (out / "command.txt").write_text(command)
        with sleep.locked(out / "N1-seed0.pt"):
            status, _, err = echo(f"--out {out} --resume --N_test 2")
            assert status == 2 and "another process is training N1-seed0" in err, err
            assert err.count("\n") == 1 and "N_test" not in a_run(out)
            assert (out / "command.txt").read_text() == command
        assert echo(f"--out {out} --resume --N_test 2")[0] == 0
        assert set(a_run(out)["N_test"]) == {"2"}


# ------------------------------------------------------------------------------------------------
# A whole script

SMALL = ("--W 8 --L 8 --t 2 --d_model 16 --n_head 2 --batch_size 8 --steps 8 --eval_every 4 "
         "--cooldown 0.5")


def script(module, command):
    argv = shlex.split(f"--device cpu {command}")
    return run(sleep.main, module.__doc__, module.PRESETS, module.FLAGS, TASKS[module], argv)


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


def test_output_to_a_full_disk_is_a_sentence():
    if not Path("/dev/full").exists():
        print("skipped: there is no /dev/full here")
        return
    env = os.environ | dict(OMP_NUM_THREADS="1")
    with folder() as out:
        flags = ["--device", "cpu", *shlex.split(SMALL), "--N", "1", "--out", str(out)]
        for script, more, expected, words in (
                ("train_ca.py", flags, 130, f"the same command with --resume --out {out}"),
                ("sleep.py", [], 1, "the disk to which this prints is full.")):
            with open("/dev/full", "w") as full:
                done = subprocess.run([sys.executable, str(HERE / script), *more], stdout=full,
                                      stderr=subprocess.PIPE, text=True, env=env)
            assert done.returncode == expected, done.stderr
            assert words in done.stderr and done.stderr.count("\n") == 1, done.stderr


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
            (train_ca, "8 to 60", "--W 4 --L 4"), (train_ca, "0 to 1,000", "--t 99999"),
            (train_ca, "--split 1000", "--split 1000"), (train_ca, "--tapes 0", "--tapes 0"),
            (train_ca, "every label", "--rule 90 --t 8"),
            (train_ca, "too few patterns", "--W 9 --L 9 --t 4 --split 686"),
            (train_khop, "--K 0 must be", "--K 0"), (train_khop, "--K 12 must be", "--K 12"),
            (train_khop, "--queries 13", "--queries 13"), (train_khop, "--nodes 4", "--nodes 4"),
            (train_khop, "be padding", "--L 49"), (train_khop, "--L 0 must be", "--L 0"),
            (train_khop, "cut a question", "--L 9"), (train_khop, "--n_law some", "--n_law some"),
            (train_khop, "--deeper", "--deeper 2"),
            (train_gsm, "--p 1 must be", "--p 1"), (train_gsm, "--deeper 2", "--deeper 2"),
            (train_gsm, "--names 10001", "--names 10001"), (train_gsm, "never sleeps", "--L 53"),
            (train_gsm, "--questions 0", "--questions 0"), (train_gsm, "--L 0 must", "--L 0"),
            (train_gsm, "--reads 0 must", "--reads 0"), (train_gsm, "--tests 3", "--tests 3"),
            (train_gsm, "--questions 3 must", "--questions 3"),
            (train_gsm, "--names 40 and --T 241", "--questions 40 --names 40"),
            (train_gsm, "--names 21", "--questions 21 --names 20 --T 200"),
            (train_gsm, "--questions 8 must", "--reads 25 --T 200"),
            (train_gsm, "--T 49", "--T 48 --L 48"),
            (train_gsm, "--tests 10001 must", "--tests 10001")):
        status, _, err = script(module, flags)
        assert status == 2 and words in err and err.count("\n") == 1, (flags, status, err)


def test_help_shows_every_flag_with_its_default():
    for module in TASKS:
        status, text, _ = script(module, "--help")
        assert status == 0
        for flag in (sleep.FLAGS | module.FLAGS):
            assert re.search(rf"--{flag}\b.*?\(default:", text, re.S), flag
    status, text, _ = run(sleep.parse, None, ECHO, {}, ["--help"])         # as with python -OO
    assert status == 0 and "--steps" in text


def test_every_preset_makes_models_and_a_preset_without_eval_every_evaluates_ten_times():
    for module, Task in TASKS.items():
        assert module.PRESETS["paper"]["conv"] == "s"          # as in the paper
        for preset in module.PRESETS:
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
# The runner: python test_sleep.py

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
        status, _, err = run(test_sleep.main)
        assert status == 2 and err.count("\n") == 1
    with patched(sys, "argv", ["test_sleep.py", "--help"]):
        status, text, _ = run(test_sleep.main)
        assert status == 0 and "python test_sleep.py rule wake" in text


# ================================================================================================
# Part 2: the tasks of the three scripts

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
        assert task.deciding == sum(1 << i for i in cells)
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
            if task.deciding >> i & 1:
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

def read_problem(task, row):
    """A row of tokens -> names asked, {name: what is said of it}, what was answered."""
    questions, rest = f"{task.text(row)} ".split(" ? ")
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
        if word == "minus":
            total -= value
        else:
            assert word == "plus"
            total += value
    return total % p, needed, chain + 1


def test_a_reader_of_the_text_alone_finds_every_answer_and_its_depth():
    name = r"x\d+"
    said = rf"(\d+|{name}|(\d+|{name}) (plus|minus) {name}|{name} (plus|minus) \d+)"
    for flags in ("", "--T 80 --L 50 --reads 3 --questions 7", "--questions 4 --T 40 --L 40"):
        task = built(train_gsm, f"--deeper 0 --batch_size 32 --tests 120 {flags}")
        args = task.args
        for step in (None, 0, 1, 2):
            tokens, targets, depths = task.test if step is None else task.make_batch(step)
            M = 1 if step is None else args.questions
            assert depths.shape == (len(tokens), M)
            assert tokens.shape[1] == args.T + 3 * M - 1 <= task.T
            for row, wanted, depth in zip(tokens, targets, depths.tolist()):
                assert re.fullmatch(rf"({name} ){{{M}}}\? ({name} {said} \. )+"
                                    rf"(answer {name} \d+ ){{{M - 1}}}answer {name}",
                                    task.text(row))
                asked, sentences, phrases = read_problem(task, row)
                assert asked == [phrase[0] for phrase in phrases] and len(set(asked)) == M
                answers = [(target - train_gsm.ZERO) for target in wanted.tolist() if target >= 0]
                found = [solve(sentences, question, args.p) for question in asked]
                assert [value for value, _, _ in found] == answers
                assert [chain for _, _, chain in found] == depth
                assert [phrase[1] for phrase in phrases[:-1]] == [str(x) for x in answers[:-1]]
                places = (wanted >= 0).nonzero().flatten().tolist()
                assert places == [3 * i + 1 for i in range(M)]  # said by the name
                if step is not None:                           # the depths take turns
                    assert sorted(depth) == sorted(1 + i % args.reads for i in range(M))
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
        (name,), sentences, _ = read_problem(task, row)
        answer, needed, chain = solve(sentences, name, p)
        kept = {other: said for other, said in sentences.items() if other in needed}
        dropped += len(sentences) - len(kept)
        shuffled = dict(rng.sample(list(sentences.items()), len(sentences)))
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


def test_no_text_of_word_problems_is_drawn_twice():
    task = built(train_gsm, "--deeper 0")

    def texts(batch):
        return [frozenset((name, *said) for name, said in read_problem(task, row)[1].items())
                for row in batch[0]]

    drawn = texts(task.test)
    for step in range(40):
        drawn += texts(task.make_batch(step))
    assert len(set(drawn)) == len(drawn) == 2000 + 40 * 64
    assert torch.equal(task.make_batch(3)[0], task.make_batch(3)[0])


def test_the_report_and_chance_of_word_problems_are_by_depth():
    task = built(train_gsm, "--deeper 0 --tests 200 --batch_size 100")
    g = torch.Generator().manual_seed(0)
    for tokens, targets, depths in (task.make_batch(0), task.test):
        logits = torch.randn(*targets.shape, task.vocab_size, generator=g)
        logits += 2.5 * F.one_hot(targets.clamp(min=0), task.vocab_size)
        right = (logits.argmax(2) == targets)[targets >= 0].view_as(depths)
        accuracy = task.score(tokens, targets, logits, depths)["accuracy"]
        assert set(accuracy) == {"1", "2", "3", "4"}
        for depth, share in accuracy.items():
            assert math.isclose(share, right[depths == int(depth)].double().mean(), rel_tol=1e-6)
    assert task.chance["accuracy"] == {str(depth): 1 / 5 for depth in (1, 2, 3, 4)}


def test_word_problems_get_deeper_over_the_first_share_of_the_steps():
    task = built(train_gsm, "--deeper 0.5 --steps 80 --tests 4 --batch_size 8")
    deepest = [task.make_batch(step)[2].max().item() for step in (0, 9, 10, 19, 20, 30, 39, 40, 79)]
    assert deepest == [1, 1, 2, 2, 3, 4, 4, 4, 4]
    first = task.make_batch(0)[0][0]                           # a text is as deep as its questions
    assert "plus" not in task.text(first) and "minus" not in task.text(first)


def test_an_answer_of_any_depth_is_any_number_as_often():
    task = built(train_gsm, "--deeper 0 --batch_size 2000")
    _, targets, depths = task.make_batch(0)
    answers = targets[targets >= 0] - train_gsm.ZERO           # 16,000: 4,000 of each depth
    for depth in (1, 2, 3, 4):
        counts = torch.bincount(answers[depths.flatten() == depth], minlength=5)
        chi2 = ((counts - 4000 / 5) ** 2 / (4000 / 5)).sum()
        assert chi2 < 24, counts                               # 4 degrees of freedom: 1 in 10,000


# ================================================================================================
# Part 3: the course

# ------------------------------------------------------------------------------------------------
# tiny.py

IN_SLEEP = {                               # a matrix of tiny_py.Model -> those of SleepLM, in rows
    "embed": ["embed"],
    "attention_qkv": ["blocks.0.mixer.q", "blocks.0.mixer.k", "blocks.0.mixer.v"],
    "attention_o": ["blocks.0.mixer.o"],
    "up_1": ["blocks.0.up"],
    "down_1": ["blocks.0.down"],
    "qkv": ["blocks.1.mixer.q", "blocks.1.mixer.k", "blocks.1.mixer.v"],
    "beta": ["blocks.1.mixer.ab"],         # row 1; row 0 is alpha, which the delta rule has not
    "gate": ["blocks.1.mixer.z"],
    "o": ["blocks.1.mixer.o"],
    "up_2": ["blocks.1.up"],
    "down_2": ["blocks.1.down"],
    "head": ["head"],
}


class PairEmbed(torch.nn.Embedding):
    """The embedding of tiny.py, in which a token is two words, for sleep.SleepLM."""

    def forward(self, tokens):
        return super().forward(tokens).sum(2)


def both_models(N):
    """tiny_py.Model and the SleepLM of the same weights, random, in float64."""
    torch.manual_seed(0)
    small = tiny_py.Model(N)
    for p in small.parameters():
        torch.nn.init.normal_(p, std=0.3)
    cfg = sleep.Config(tiny_py.NODES, 2 * tiny_py.L, tiny_py.L, N=N, layout="as",
                       d_model=tiny_py.d, n_head=1, update_rule="delta", conv="")
    large = sleep.SleepLM(cfg)
    large.embed = PairEmbed(*small.embed.weight.shape)
    small.double()
    large.double()
    with torch.no_grad():
        for name in IN_SLEEP:
            parts = parts_in_sleep(large, name)
            for part, rows in zip(parts, small.get_submodule(name).weight.chunk(len(parts))):
                part[-len(rows):] = rows
    return small, large                    # the norms' weights are 1 in SleepLM, and tiny has none


def parts_in_sleep(large, name):
    return [large.get_submodule(part).weight for part in IN_SLEEP[name]]


def test_tiny_computes_what_sleep_computes():
    for N, windows in ((1, 2), (3, 2), (2, 4)):                # four windows: three of them sleep
        small, large = both_models(N)
        tokens = torch.randint(small.embed.num_embeddings, (3, windows * tiny_py.L, 2))
        answers = torch.randint(tiny_py.NODES, (3, tiny_py.L))
        asleep = [True] * (windows - 1) + [False]
        small_logits, small_loss = small(tokens, answers)
        large_logits, large_loss = large.algorithm_1(tokens, answers, asleep)
        assert small_logits.dtype == torch.float64
        assert (small_logits - large_logits).abs().max() < 1e-10, N
        assert abs(small_loss - large_loss) < 1e-10, N
        small_loss.backward()
        large_loss.backward()
        assert set(IN_SLEEP) == {name.split(".")[0] for name, _ in small.named_parameters()}
        for name in IN_SLEEP:
            grad = small.get_submodule(name).weight.grad
            parts = parts_in_sleep(large, name)
            assert grad.abs().max() > 0, name
            for part, rows in zip(parts, grad.chunk(len(parts))):
                assert (part.grad[-len(rows):] - rows).abs().max() < 1e-10, name


def test_tiny_asks_what_follows_from_the_edges():
    g = torch.Generator().manual_seed(0)
    tokens, answers, k = tiny_py.make_batch(5, tiny_py.K, g)
    n = tiny_py.NODES
    for row in range(5):
        edges = tokens[row, :n].tolist()
        after = {a: b - tiny_py.TO for a, b in edges}
        assert sorted(after) == sorted(after.values()) == list(range(n))
        questions = tokens[row, n:].tolist()
        for (node, word), answer, steps in zip(questions, answers[row].tolist(), k[row].tolist()):
            assert 1 <= steps <= tiny_py.K and word == tiny_py.HOPS + steps - 1
            for _ in range(steps):
                node = after[node]
            assert node == answer


def test_tiny_learns_to_recall_an_edge():
    points = list(tiny_py.train(N=1, steps=100))
    assert [step for step, _ in points] == list(range(10, 101, 10))
    assert points[-1][1][0] > 0.3, points[-1]                  # one hop; chance is 1 / (NODES - 1)


def test_tiny_is_short_and_takes_no_flags_but_help():
    assert len(Path(tiny_py.__file__).read_text(encoding="utf-8").splitlines()) < 150
    for argv, expected, words in ((["--help"], 0, "on three screens"),
                                  (["--steps", "3"], 2, "--steps 3")):
        with patched(sys, "argv", ["tiny.py", *argv]):
            status, text, err = run(runpy.run_path, tiny_py.__file__, None, "__main__")
        assert status == expected and words in text + err, (argv, status, text, err)
        assert "step  100" not in text


# ------------------------------------------------------------------------------------------------
# sleep.ipynb

def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def tags(cell):
    return cell["metadata"].get("tags", [])


def printed(cell):
    return "".join("".join(output["text"]) for output in cell["outputs"] if "text" in output)


def alike(text, other):
    """Are two texts equal, up to 0.02 in numbers with a point? A CPU may round in another way."""
    number = r"\d+\.\d+"
    pairs = zip(re.findall(number, text), re.findall(number, other))
    close = all(abs(float(a) - float(b)) <= 0.02 for a, b in pairs)
    return close and re.sub(number, "", text) == re.sub(number, "", other)


def n_pictures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell["outputs"])


def with_solutions(notebook):
    """A copy in which every exercise is replaced by the solution that the notebook hides."""
    solved = copy.deepcopy(notebook)
    texts = ["".join(cell["source"]) for cell in solved["cells"] if cell["cell_type"] == "markdown"]
    solution = r"<summary>A solution</summary>\s*```python\n(.*?)```"
    solutions = re.findall(solution, "\n".join(texts), re.S)
    exercises = [cell for cell in code_cells(solved) if "exercise" in tags(cell)]
    for cell, code in zip(exercises, solutions, strict=True):
        cell["source"] = code.splitlines(True)
    return solved


def run_notebook(notebook, steps):
    """The notebook after its cells ran in a fresh process, with a training of so many steps."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.ipynb"
        source.write_text(json.dumps(notebook), encoding="utf-8")
        out = Path(folder) / "out.ipynb"
        command = [sys.executable, "-m", "lab.course.make_notebook", str(source), "--out", str(out)]
        env = os.environ | dict(OMP_NUM_THREADS="1", NOTEBOOK_STEPS=str(steps))
        done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return make_notebook.read(out)


def test_the_notebook_shows_what_its_cells_print_and_its_solutions_are_right():
    stored = make_notebook.read(make_notebook.NOTEBOOK)
    now = run_notebook(with_solutions(stored), steps=10)
    for before, after in zip(code_cells(stored), code_cells(now), strict=True):
        assert before["execution_count"] == after["execution_count"]
        assert n_pictures(before) == n_pictures(after)
        if "check" in tags(before):
            assert printed(before).endswith(": not solved yet.\n"), printed(before)
            assert ": right." in printed(after), printed(after)
        elif "varies" not in tags(before):                     # of the machine, and of the training
            assert alike(printed(before), printed(after)), (printed(before), printed(after))


def test_without_the_project_the_notebook_says_what_to_do():
    first = "".join(code_cells(make_notebook.read(make_notebook.NOTEBOOK))[0]["source"])
    for address, words in (("", ""), ("/nothing/is/here.git", "/nothing/is/here.git")):
        changed = first.replace('REPOSITORY = ""', f'REPOSITORY = "{address}"')
        assert bool(address) == (changed != first)
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([sys.executable, "-c", changed], cwd=folder, capture_output=True,
                                  text=True)
        assert done.returncode == 1 and words in done.stdout
        assert done.stderr.startswith("The project is not here") and done.stderr.count("\n") == 1


def test_the_notebook_is_what_jupyter_opens():
    stored = make_notebook.read(make_notebook.NOTEBOOK)
    assert stored["nbformat"] == 4 and stored["nbformat_minor"] >= 5
    ids = [cell["id"] for cell in stored["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in stored["cells"]:
        wanted = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            wanted |= {"execution_count", "outputs"}
        assert set(cell) == wanted, cell["id"]
    text = "".join("".join(cell["source"]) for cell in stored["cells"])
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("http"):
            assert (make_notebook.NOTEBOOK.parent / link).is_file(), link
    for path in re.findall(r"`(lab/[\w/.]+)`", text):
        assert (HERE / path).exists(), path


def test_bad_names_are_refused_before_the_notebook_runs():
    notebook = str(make_notebook.NOTEBOOK)
    readme = str(HERE / "README.md")
    with tempfile.TemporaryDirectory() as folder:
        for words, argv in (("ends in .ipynb", [notebook, "--out", f"{folder}/x.txt"]),
                            ("cannot be written", [notebook, "--out", f"{notebook}/x.ipynb"]),
                            ("is a folder", [notebook, "--out", make_folder(folder, "x.ipynb")]),
                            ("is no notebook", [readme, "--out", f"{folder}/y.ipynb"]),
                            ("is not there", [f"{folder}/z.ipynb"])):
            with patched(make_notebook, "run_cells", None):
                status, text, err = run(make_notebook.main, argv)
            assert status == 2 and words in err and err.count("\n") == 1, (argv, err)


def make_folder(folder, name):
    path = Path(folder) / name
    path.mkdir()
    return str(path)


# ================================================================================================
# Part 4: the lab

# ------------------------------------------------------------------------------------------------
# Helpers

def differ(a, b):
    assert (a - b).abs().max() > 1e-3


def run_line(main, command=""):
    """Run a program in this process with a command line, a string or a list -> as `run`."""
    argv = shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
    return run(main, argv)


def runs_well(main, command=""):
    """Run a program that has to end with status 0 -> what it printed."""
    status, text, err = run_line(main, command)
    assert status == 0, (command, status, err)
    return text


def is_refused(words, main, command):
    """The program ends with status 2 and one sentence, which contains the words."""
    status, _, err = run_line(main, command)
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
    tokens = random_tokens(T=13)
    same_outcome(changed(N=3), tiny(N=3), tokens, targets_for(tokens, 3))


def test_every_change_of_a_sleep_changes_the_answers_or_the_gradient_alone():
    tokens = random_tokens(T=13)
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
    rule = sleep.fast_weight_rule_chunked

    def spy(*args):
        calls.append(args)
        return rule(*args)

    with patched(sleep, "fast_weight_rule_chunked", spy):
        slept = model.sleep(model.embed(random_tokens(T=5)), model.empty_memory(3))
    *first_pass, S, _ = calls[0]
    for _ in range(3):                     # the first pass's keys and values, three times
        _, S = sleep.fast_weight_rule(*first_pass, S)
    close(slept.S[1], S, 1e-10)


def test_carrying_h_without_S_starts_every_pass_from_one_S_and_keeps_what_the_last_one_writes():
    model = changed(carry="h", N=3)
    memory = model.sleep(model.embed(random_tokens(T=5, seed=1)), model.empty_memory(3))
    h = model.embed(random_tokens(T=5))
    slept = model.sleep(h, memory)
    for _ in range(3):
        h, S, _ = model.one_pass(h, memory.S, memory.cache)
    close(slept.S[1], S[1], 1e-12)
    close(slept.S[3], S[3], 1e-12)


def test_recall_adds_the_embeddings_to_h_of_length_one_before_every_pass_but_the_first():
    model = changed(recall=True, N=3, layout="as")
    empty = model.empty_memory(3)
    start = model.embed(random_tokens(T=5))
    h, S, _ = model.one_pass(start, empty.S, empty.cache)
    for _ in range(2):
        length = (h.square().mean(-1, keepdim=True) + torch.finfo(h.dtype).eps).sqrt()
        h, S, _ = model.one_pass(h / length + start, S, empty.cache)
    close(model.sleep(start, empty).S[1], S[1], 1e-12)


def test_the_answer_is_fed_back_as_the_mean_of_the_embeddings_of_what_would_be_said():
    model = changed(guess=True, N=2, layout="as")
    empty = model.empty_memory(3)
    start = model.embed(random_tokens(T=5))
    h, S, _ = model.one_pass(start, empty.S, empty.cache)
    length = (h.square().mean(-1, keepdim=True) + torch.finfo(h.dtype).eps).sqrt()
    said = (h / length * model.norm.weight @ model.head.weight.T).exp()
    probability = said / said.sum(-1, keepdim=True)
    h = h + torch.einsum("btv,vd->btd", probability, model.embed.weight)
    _, S, _ = model.one_pass(h, S, empty.cache)
    close(model.sleep(start, empty).S[1], S[1], 1e-10)


def test_thinking_longer_over_the_answers_passes_them_again_from_the_S_before_the_window():
    model = changed(think=3, N=2)
    memory = model.sleep(model.embed(random_tokens(T=5)), model.empty_memory(3))
    h = model.embed(random_tokens(T=4, seed=1))
    logits, _ = model.wake(h, memory)
    for _ in range(3):
        h, _, _ = model.one_pass(h, memory.S, memory.cache)
    close(logits, model.head(model.norm(h)), 1e-12)


def test_thinking_longer_over_the_answers_does_not_see_the_tokens_after_them():
    model = changed(think=3, N=1)
    tokens = random_tokens(T=14)
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
    tokens = random_tokens(T=13)
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
    tokens = random_tokens(T=13)
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
    tokens = random_tokens(T=13)
    targets = targets_for(tokens, 3)       # two sleeps: the first one always has all three passes
    plain = tiny(N=3)
    losses = []
    for n in (1, 2, 3):
        memory = plain.sleep(plain.embed(tokens[:, :5]), plain.empty_memory(3))
        memory = plain.sleep(plain.embed(tokens[:, 5:10]), memory, n)
        logits, _ = plain.wake(plain.embed(tokens[:, 10:]), memory)
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    close(model(tokens, targets)[1], (losses[0] + 2 * losses[1] + 3 * losses[2]) / 6, 1e-12)
    with torch.no_grad():                  # a test asks after the last one
        close(model(tokens, targets)[1], losses[2], 1e-12)


def test_with_a_loss_after_every_pass_detach_ends_each_gradient_after_its_passes():
    model = changed(every_pass=True, detach=1, N=2, layout="as")
    tokens = random_tokens(T=7)
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
    tokens = random_tokens(T=14)
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
        model.sleep(model.embed(random_tokens(T=5)), model.empty_memory(3))
        assert calls == [3 if first <= i < stop else 1 for i in range(4)], (first, stop, calls)


def test_a_span_keeps_the_S_and_the_cache_of_each_blocks_last_call():
    for first, stop, eviction in ((1, 3, "hard"), (1, 3, "sliding"), (0, 2, "sliding"),
                                  (2, 4, "hard")):
        model = span(first, stop, N=3, eviction=eviction)
        memory = model.sleep(model.embed(random_tokens(T=5, seed=1)), model.empty_memory(3))
        order = [*range(stop), *range(first, stop), *range(first, 4)]      # three passes
        h = model.embed(random_tokens(T=5))
        S = list(memory.S)
        cache = list(memory.cache)
        for i in order:
            h, S[i], cache[i] = model.blocks[i](h, S[i], memory.cache[i])
        wanted = model.evict(memory._replace(S=S, cache=cache))
        found = model.sleep(model.embed(random_tokens(T=5)), memory)
        for x, y in zip([*found.S, *sum(found.cache, ())], [*wanted.S, *sum(wanted.cache, ())]):
            assert x is None or torch.equal(x, y)


def test_a_span_repeats_its_passes_for_the_gradient_with_the_same_numbers():
    tokens = random_tokens(T=13)
    model = span(1, 3, N=3)
    repeated = span(1, 3, N=3)
    sleep.accelerate(repeated, compile=False, recompute=True)
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


def test_a_write_that_copies_writes_what_s_says_at_a_second_key():
    mixer, x, q, k, v, S = fast_weights("copy")
    o, new_S = mixer.write_and_read(x, q, k, v, S)
    for chunk in (1, 3):                                       # several chunks: the same numbers
        whole = sleep.fast_weight_rule_chunked
        a, b = (x @ mixer.ab.weight.T).transpose(1, 2).chunk(2, 1)
        log_alpha = -F.softplus(a + mixer.dt_bias[:, None])
        pieces = variants.read_one_key_write_another(q, k, k, v, log_alpha, b.sigmoid(), S, chunk)
        for piece, plain in zip(pieces, whole(q, k, v, log_alpha, b.sigmoid(), S)):
            close(piece, plain, 1e-10)                         # read where it writes: the delta rule
    k2 = F.normalize(sleep.split_heads(F.silu(mixer.k2(x)), 2), dim=-1)
    g = mixer.g(x).sigmoid().transpose(1, 2)[..., None]
    for t in range(8):
        S = log_alpha[:, :, t, None, None].exp() * S
        at_key, at_second = (torch.einsum("bhvk,bhk->bhv", S, key[:, :, t]) for key in (k, k2))
        write = (1 - g[:, :, t]) * v[:, :, t] + g[:, :, t] * at_second - at_key
        S = S + torch.einsum("bh,bhv,bhk->bhvk", b.sigmoid()[:, :, t], write, k[:, :, t])
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
    tokens = random_tokens(T=13)
    model = changed(tell_pass=True, N=3)
    targets = targets_for(tokens, 3)
    # The embeddings of the numbers start at 0.
    close(outcome(model, tokens, targets)[0], outcome(tiny(N=3), tokens, targets)[0], 1e-12)
    with torch.no_grad():
        model.pass_embed.copy_(torch.randn(3, model.cfg.d_model))
    empty = model.empty_memory(3)
    h = model.embed(random_tokens(T=5))
    slept = model.sleep(h, empty)
    S = empty.S
    for n in range(3):
        h, S, _ = model.one_pass(h + model.pass_embed[n], S, empty.cache)
    close(slept.S[1], S[1], 1e-12)


def test_every_law_of_k_draws_what_it_says_and_the_test_asks_what_training_asks():
    counts = {}
    for law in ("all", "power", "doubles"):
        task = task_of("hops", f"--k_law {law} --deeper 0 --batch_size 5000")
        k = task.hops(task.make_batch(0)[0])
        counts[law] = torch.bincount(k.flatten(), minlength=9)[1:] / k.numel()     # of 100,000
        wanted = {1, 2, 4, 8} if law == "doubles" else set(range(1, 9))
        assert set(task.hops(task.test[0]).flatten().tolist()) == wanted == set(task.test_k)
        assert set(task.chance["accuracy"]) == {str(k) for k in wanted}
    close(counts["all"], torch.full((8,), 1 / 8), 0.02)
    weights = torch.arange(1, 9) ** -1.5
    close(counts["power"], weights / weights.sum(), 0.02)
    close(counts["doubles"], torch.tensor([1, 1, 0, 1, 0, 0, 0, 1]) / 4, 0.02)
    assert (counts["doubles"][[2, 4, 5, 6]] == 0).all()
    growing = task_of("hops", "--k_law doubles --deeper 1 --steps 100")
    assert growing.hops(growing.make_batch(30)[0]).max() == 2              # 1 + 8 * 0.3 is 3.4
    doubling = task_of("hops", "--k_law doubles --growth doubling --deeper 0.8 --steps 100")
    assert [doubling.largest_k(step) for step in (0, 19, 20, 40, 60, 79, 80)] == [1, 1, 2, 4, 8, 8, 8]
    assert doubling.hops(doubling.make_batch(50)[0]).max() == 4
    by_pass = dict(walk=[1, 2, 3, 4, 5, 6, 7, 8], jump=[1, 1, 2, 3, 5, 8, 8, 8])     # K is 8
    for law, wanted in by_pass.items():
        task = task_of("hops", f"--k_law {law} --N 8 --grow_N 1 --steps 100 --batch_size 2")
        for step in range(0, 100, 9):
            passes = variants.draw_N(step, dict(N=8, any_N=False, grow_N=1.0, steps=100, seed=0))
            assert set(task.hops(task.make_batch(step)[0]).flatten().tolist()) == {wanted[passes - 1]}
        assert set(task.hops(task.test[0]).flatten().tolist()) == set(wanted) == set(task.test_k)
    is_refused("one of all, power, doubles", hops.main, "--k_law some")
    is_refused("give one --N", hops.main, "--k_law walk --N 1 2")
    is_refused("linear or doubling", hops.main, "--growth slow")


def test_of_two_parallel_mixers_both_speak_and_only_the_fast_weights_remember():
    model = tiny(variants.ParallelLM, layout="aa")
    tokens = random_tokens(T=12)
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
            ("from 0 to 1", "--grow_N 2")):
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
    growing = settings_of("khop", "--grow_N 0.6 --steps 1000") | dict(N=4, seed=0)
    grown = [variants.draw_N(step, growing) for step in range(1000)]
    both = [variants.draw_N(step, growing | dict(any_N=True)) for step in range(1000)]
    assert all(N <= top for N, top in zip(both, grown)) and both[:250] == [1] * 250
    assert all(70 < both[600:].count(N) < 130 for N in (1, 2, 3, 4))


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


def test_the_depth_of_the_trees_grows_linearly_or_doubles_each_depth_as_long():
    flags = "--size 16 --depth 15 --test_depth 15 --L 96 --deeper 0.8 --steps 1000"
    linear = task_of("trees", flags)
    doubling = task_of("trees", f"{flags} --growth doubling")
    steps = (0, 199, 200, 399, 400, 599, 600, 799, 800, 999)
    assert [doubling.deepest_in_training(step) for step in steps] == [1, 1, 2, 2, 4, 4, 8, 8, 15, 15]
    assert [linear.deepest_in_training(step) for step in (0, 53, 54, 400, 799, 800)] == [1, 1, 2, 8, 15, 15]
    is_refused("must be linear or doubling", trees.main, "--device cpu --growth fast")


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
    _, S = sleep.fast_weight_rule(k, k, v, torch.zeros(1, 1, 1), two, torch.eye(4)[None, None])
    assert torch.allclose(S[0, 0], torch.eye(4)[[1, 0, 2, 3]], atol=1e-6)      # I - 2 k k^T
    torch.manual_seed(0)
    layer = swaps.Overshoot(Config(7, 20, 5, layout="s", d_model=16, n_head=2))
    betas = []
    rule = sleep.fast_weight_rule_chunked

    def spy(q, k, v, log_alpha, beta, *rest):
        betas.append(beta)
        return rule(q, k, v, log_alpha, beta, *rest)

    x = torch.randn(2, 9, 16)
    with patched(sleep, "fast_weight_rule_chunked", spy):
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
    above = dict(zip("1234", (0.4, 0.15, 0.06, 0.06)))         # what is told is often an answer
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
        status, _, err = run_line(experiments.main, "nothing")
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
    of_eight = a_curve(0.95, 0.95)
    of_eight["task"] = "hops"
    for point, accuracy in zip(of_eight["curve"], (0.9, 0.91)):
        point["accuracy"]["8"] = accuracy
    assert leaderboard.arrival(of_eight)["step"] == 100
    of_eight["curve"][1]["accuracy"]["8"] = 0.89               # at three hops it is still above
    assert leaderboard.arrival(of_eight) is None


def test_the_leaderboard_counts_the_compute_up_to_the_arrival():
    arrived = a_curve(0.2, 0.95, 0.95, 0.99)
    whole = runner.flop(arrived) / 1e12
    assert math.isclose(leaderboard.tflop_to_arrive(arrived), whole / 2, rel_tol=1e-12)


def test_the_leaderboard_says_who_arrived_and_refuses_another_task():
    few = "--device cpu --steps 2 --eval_every 1 --batch_size 4 --seed 0 --N 2 --out a"
    with new_folder():
        text = runs_well(leaderboard.main, few)
        assert "N 2 seed 0: did not arrive" in text and "in the mean" not in text
        text = runs_well(leaderboard.main, f"{few.replace('--out a', '--out b')} --hops 8 --k_law power")
        assert "N 2 seed 0: did not arrive" in text and "8: " in text
        with patched(leaderboard, "arrival", lambda run: run["curve"][-1]):
            assert "TFLOP in the mean" in runs_well(leaderboard.main, few)
        for words, flags in (("the task of the leaderboard", "--nodes 7 --queries 7"),
                             ("leave --think", "--think 2"),
                             ("the task of the leaderboard", "--preset gpu"),
                             ("100 steps apart", "--eval_every 200"), ("leave it out", "--resume"),
                             ("invalid choice: '4'", "--hops 4"),
                             ("expected one argument", "--hops"),
                             ("leave --nodes", "--hops=8 --nodes 30"),
                             ("what the test asks", "--hops 8 --k_law walk"),
                             ("what the test asks", "--hops 8 --k_law doubles"),
                             ("200 steps apart", "--hops 8 --eval_every 300")):
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


def test_near_attention_sees_the_last_tokens_only_and_is_undone():
    q, k, v = torch.randn(3, 2, 1, 6, 4, generator=torch.Generator().manual_seed(0))
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with reach.near_attention(1):
        close(F.scaled_dot_product_attention(q, k, v, is_causal=True), v, 1e-6)
    with reach.near_attention(6):
        close(F.scaled_dot_product_attention(q, k, v, is_causal=True), full, 1e-6)
    with reach.near_attention(2):
        near = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    last_two = F.scaled_dot_product_attention(q[:, :, 5:], k[:, :, 4:], v[:, :, 4:])
    close(near[:, :, 5:], last_two, 1e-6)
    assert torch.equal(F.scaled_dot_product_attention(q, k, v, is_causal=True), full)


def test_pointers_double_their_reach_if_parents_come_first_and_else_add_the_last_two():
    n = 40                                                     # a path: i points to i - 1, 0 to 0
    edges = torch.tensor([[i, max(i - 1, 0)] for i in range(n)])
    asked = torch.arange(n)
    orders = dict(parents=torch.arange(n), children=torch.arange(n).flip(0),
                  random=torch.randperm(n, generator=torch.Generator().manual_seed(0)))

    def reaches(order, reads):
        tokens = torch.cat([edges[orders[order]].flatten(), asked])[None]
        after_each = reach.pointer_machine(tokens, n, 7, reads)
        return [(answers[0] == 0).sum().item() - 1 for answers in after_each]      # 0 to its reach

    fibonacci = [1, 1, 2, 3, 5, 8, 13]
    assert [hops.fibonacci(i) for i in range(1, 8)] == fibonacci
    assert reaches("parents", "now") == [1, 2, 4, 8, 16, 32, 39]
    assert reaches("children", "now") == fibonacci
    assert reaches("children", "first") == [1, 2, 4, 8, 16, 32, 39]
    for order in orders:
        assert reaches(order, "before") == fibonacci
    for slow, between, fast in zip(fibonacci, reaches("random", "now"), [1, 2, 4, 8, 16, 32, 39]):
        assert slow <= between <= fast


def test_texts_that_exchange_s_answer_from_what_they_got_and_what_h_carries():
    task, model = small_trees()
    tokens, targets, _ = task.test
    n = task.nodes
    plain = model(tokens, targets, 2)[0].argmax(-1)
    # No exchange: after pass 0. After the last pass: the questions are put to the text before.
    assert torch.equal(exchange.answers(model, tokens, n, 2, after=0), plain)
    to_the_text_before = torch.cat([tokens[:, :12].roll(1, 0), tokens[:, 12:]], 1)
    wanted = model(to_the_text_before, targets, 2)[0].argmax(-1)
    assert torch.equal(exchange.answers(model, tokens, n, 2, after=2), wanted)
    # Two passes by hand, S exchanged between them.
    empty = model.empty_memory(len(tokens))
    h, S, _ = model.one_pass(model.embed(tokens[:, :12]), empty.S, empty.cache)
    S = [None, S[1][torch.arange(-1, len(tokens) - 1)]]
    memory = model.evict(sleep.Memory(*model.one_pass(h, S, empty.cache)[1:], 0))
    wanted = model.wake(model.embed(tokens[:, 12:]), memory)[0].argmax(-1)
    assert torch.equal(exchange.answers(model, tokens, n, 2, after=1), wanted)
    assert not torch.equal(wanted, plain)


def test_ways_are_followed_and_end_at_roots():
    edges = torch.tensor([[5, 3, 3, 4, 4, 4, 7, 6, 6, 6]])     # 5 > 3 > 4, a root, and 7 > 6, a root
    leads_to = exchange.next_nodes(edges, 5, 8)
    nodes = torch.tensor([[5, 3, 4, 7]])
    assert exchange.follow(leads_to, nodes, 0).tolist() == nodes.tolist()
    assert exchange.follow(leads_to, nodes, 2).tolist() == [[4, 4, 4, 6]]
    assert exchange.edges_to_the_end(leads_to, nodes, 9).tolist() == [[2, 1, 0, 1]]
    assert exchange.edges_to_the_end(leads_to, nodes, 1).tolist() == [[1, 1, 0, 1]]


def test_pointers_that_meet_another_s_go_on_along_its_edges():
    n = 40
    name = torch.stack([torch.arange(n), torch.randperm(n, generator=torch.Generator().manual_seed(1))])
    source = name[:, 1:].flip(1)                               # two paths, the children first
    root = name[:, :1]
    edges = torch.stack([torch.cat([source, root], 1), torch.cat([name[:, :-1].flip(1), root], 1)], 2)
    asked = name[:, 10:]
    tokens = torch.cat([edges.flatten(1), asked], 1)
    own = exchange.next_nodes(tokens, n, n)
    fibonacci = [1, 1, 2, 3, 5, 8]
    for passes in (3, 4, 5, 6):
        for left in (1, 2):                                    # passes after the exchange
            machine = reach.pointer_machine(tokens, n, passes, "now", passes - left)[-1]
            along = fibonacci[passes - 1] if left == 1 else fibonacci[passes - 2]
            then = 0 if left == 1 else fibonacci[passes - 3]
            node = exchange.follow(own, asked, along)
            goes_on = exchange.edges_to_the_end(own.roll(1, 0), node, 9) > then
            wanted = exchange.follow(own.roll(1, 0), node, then)
            assert torch.equal(machine[goes_on], wanted[goes_on]) and goes_on.sum() > 20


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

        train("hops", f"{few} --k_law doubles --out h")
        runs_well(which_node.main, "h/N2-seed0.pt --out h.png")
        text = runs_well(exchange.main, "a/N2-seed0.pt h/N2-seed0.pt --out x.png")
        assert "3 hops, S exchanged after pass 1 of 2" in text and "8 hops" in text
        for run in common.read_results("x.json")["runs"]:
            i_and_j = [sum(map(int, pair.split("+"))) for pair in run["shares"]]
            assert set(i_and_j) <= {run["asked"]}
        runs_well(exchange.main, "--draw x.json")
        early = [run | dict(passes=3) for run in common.read_results("x.json")["runs"]]
        common.write_results("early.json", dict(runs=early))
        with patched(exchange, "DEEP", 1), patched(exchange, "FEWEST", 1):
            text = runs_well(exchange.main, "t/N2-seed0.pt --out xt.png")
        assert "children first, S exchanged after pass 4 of 6" in text and is_png("xt.png")

        runs_well(reach.main, "t/N2-seed0.pt --passes 3 --out r.png")
        for measured in common.read_results("r.json")["runs"]:
            assert len(measured["accuracy"]) == len(measured["said"]) == 3
            assert all(abs(sum(row) - 1) < 1e-2 for row in measured["said"])
        runs_well(reach.main, "--draw r.json")
        before = Path("r.png").read_bytes()
        is_refused("--short takes --draw and --out", reach.main, "--draw r.json --short")
        runs_well(reach.main, "--draw r.json --short --out short.png")
        assert is_png("short.png") and Path("r.png").read_bytes() == before

        train("khop", f"{few} --K 5 --out k5")
        train("khop", f"{few} --L 12 --out short")
        train("khop", f"{few.replace('--N 2', '--N 1')} --out one")
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
                ("measure them apart", exchange.main, "a/N2-seed0.pt t/N2-seed0.pt"),
                ("one pass", exchange.main, "one/N1-seed0.pt"),
                ("larger --size", exchange.main, "t/N2-seed0.pt"),
                ("no exchange before the last", exchange.main, "--draw early.json"),
                ("name at least one", exchange.main, ""),
                ("holds no numbers", exchange.main, "--draw w.json"),
                ("no checkpoint of trees", reach.main, "a/N2-seed0.pt"),
                ("measure them apart", reach.main, f"t/N2-seed0.pt {demo.TREES} --passes 2"),
                ("0 (all tokens) or more", reach.main, "t/N2-seed0.pt --near -1"),
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
    assert run_line(exercises.main, "3") == (1, "", "3, delta: nothing is written yet.\n")
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


def test_the_demonstration_of_trees_prints_what_the_model_answers_after_each_pass():
    with new_folder():
        runs_well(trees.main, "--size 4 --depth 3 --test_depth 3 --L 24 --d_model 16 --steps 2 "
                              "--N 2 --N_test 1 --lr_muon 0.1 --lr_adamw 0.1 --device cpu --out t")
        checkpoint = "t/N2-seed0.pt"
        for order in demo_trees.ORDERS:
            text = runs_well(demo.main, ["--trees", order, "--checkpoint", checkpoint])
            edges = re.findall(r"(\d+)>(\d+)", text)
            roots = [a for a, b in edges if a == b]
            first, last = [a for a, _ in edges[:3]], [a for a, _ in edges[-3:]]
            assert len(edges) == 12 and len(roots) == 3
            assert (first == roots) == (order == "parents")
            assert (last == roots) == (order == "children")
            way = re.search(r"3 edges long: (.*)", text)[1].split(" > ")
            assert all(edge in edges for edge in zip(way, way[1:])) and way[-1] in roots
            model, task = when_to_wake.load(checkpoint)
            tokens, depths = demo_trees.draw_deep_trees(task, 0, order)
            asked = tokens[0, 24:].tolist()
            rows = re.findall(r"after pass \d +(.*?) +(\d+) of 3", text)
            assert len(rows) == 4                              # two more than in training
            for N, (cells, right) in enumerate(rows, 1):
                answer = model(tokens, torch.zeros_like(depths), N=N)[0].argmax(-1)
                assert int(right) == cells.count("[")
                for node, cell in zip(way[2::-1], cells.split()):      # 1, 2, 3 edges to the root
                    said = str(answer[0, asked.index(int(node))].item())
                    up = dict(zip(way, range(4))).get(said, 99) - way.index(node)
                    wanted = "." if not 0 <= up <= 3 else f"[{up}]" if said == way[-1] else str(up)
                    assert cell == wanted, (order, N, node, cell, wanted)
        is_refused("takes no --edges", demo.main, ["--trees", "--edges", "0>1"])
        is_refused("is no checkpoint of trees", demo.main,
                   ["--trees", "--checkpoint", demo.SHIPPED])


def test_the_model_of_trees_that_ships_is_small_and_jumps():
    assert demo.TREES.stat().st_size <= 500_000
    for order, wanted in (("parents", [0, 1, 2, 4, 8, 11]),    # powers of two
                          ("children", [0, 1, 1, 2, 3, 5])):   # Fibonacci numbers
        text = runs_well(demo.main, ["--trees", order])
        rows = re.findall(r"after pass \d +(.*?) +(\d+) of 11", text)
        found = [cells.count("[") for cells, _ in rows]        # roots on a way of 11 edges
        assert found[:6] == wanted and rows[7][1] == "11", found


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


def test_the_benchmark_times_the_rule_of_transformers_if_it_is_there():
    name = "transformers.models.qwen3_next.modeling_qwen3_next"

    def theirs(q, k, v, g, beta, chunk_size, initial_state, output_final_state):
        """The conventions of theirs: tokens before heads, S transposed, q divided by sqrt(K)."""
        q, k, v = (x.transpose(1, 2) for x in (q * q.shape[3] ** -0.5, k, v))
        o, S = sleep.fast_weight_rule(q, k, v, g.mT, beta.mT, initial_state.mT)
        return o.transpose(1, 2), S.mT

    module = sys.modules.get(name)
    try:
        sys.modules[name] = SimpleNamespace(torch_chunk_gated_delta_rule=theirs)
        rules = benchmark.forms_of_the_rule("cpu", compile=False)
        sys.modules[name] = None                               # to import it fails, as if not there
        without = benchmark.forms_of_the_rule("cpu", compile=False)
    finally:
        del sys.modules[name]
        if module is not None:
            sys.modules[name] = module
    inputs = benchmark.inputs_of_the_rule(2, 2, 5, 4, "cpu")
    added = set(rules) - set(without)
    assert added == {"transformers", "transformers, chunks that fit"}
    for rule in added:
        for a, b in zip(rules[rule](*inputs), sleep.fast_weight_rule(*inputs)):
            close(a, b, 1e-6)


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
    accelerate = sleep.accelerate

    def make_wrong_gradients(model, compile, recompute):
        gradients = accelerate(model, compile, recompute)

        def wrong(*args):
            loss = gradients(*args)
            if not recompute:              # the plain models of the check repeat their passes
                for p in model.parameters():
                    if p.grad is not None:
                        p.grad *= factor
            return loss

        return wrong

    name, case = next(iter(gpu_check.CASES.items()))
    with (patched(sleep, "accelerate", make_wrong_gradients),
          patched(gpu_check, "CASES", {name: case})):
        return run_line(gpu_check.main, "--device cpu --no_compile")


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


def test_the_tables_of_four_pages_are_computed_from_the_results_that_they_name():
    checked = {}
    for page in ("khop", "trees", "hops", "fast_weights"):
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
    assert checked["trees"] == 56 and checked["khop-fast-weights"] == 50, checked
    assert checked["hops-eight"] == 54 and checked["hops-longer"] == 54, checked
    assert sum(checked.values()) > 500, checked


def test_the_table_of_the_readme_holds_the_means_of_results():
    labels = {                             # passes asleep, over an answer, training: label of its runs
        ("1", "1", "2.2 times the tokens"): "N = 1, 2.2 x tokens",
        ("1", "1", "four times smaller batches"): "N = 1 in batches of 16",
        ("2", "1", "the preset"): "N = 2",
        ("1", "3", "the preset"): "N = 1 and 3 passes over the answers",
        ("**3**", "**1**", "**the preset"): "N = 3",
        ("1", "1", "three times as many blocks"): "N = 1 and three times as deep",
        ("2", "1", "three times the tokens"): "N = 2, 3 x tokens",
        ("1", "1", "ten times the tokens"): "N = 1, 10 x tokens"}
    runs = load_runs(RESULTS / "khop-depth.json")
    staircase = load_runs(RESULTS / "khop-staircase.json")
    checked = 0
    for _, header, rows in tables(README.read_text(encoding="utf-8")):
        if "TFLOP" not in header:
            continue
        for row in rows:
            if not any(row[1:]):                               # a line that parts the table
                continue
            training, n_seeds = re.fullmatch(r"(.*) \((\d) seeds\)\**", row[2]).groups()
            label = labels[(row[0], row[1], training)]
            seeds = list(range(int(n_seeds)))
            of_row = [run for run in runs if run["label"] == label and run["seed"] in seeds]
            assert [run["seed"] for run in of_row] == seeds
            for name, cell in zip(header[3:], row[3:]):
                if name == "TFLOP":
                    values = [of_row[0]["tflop"]]
                else:
                    values = [run["accuracy"][name.split()[0]] for run in of_row]
                assert agrees(cell, values), (label, name, cell, values)
                checked += 1
            if label == "N = 3":                               # the same runs are in both files
                in_both = [run for run in staircase if run["label"] == f"trained with {label}"
                           and run["seed"] in seeds]
                assert [run["accuracy"] for run in in_both] == [run["accuracy"] for run in of_row]
    assert checked == 24


def test_the_table_of_what_does_not_hold_has_the_means_of_results():
    def of(name, metric, **wanted):
        runs = [run for run in load_runs(RESULTS / f"{name}.json")
                if all(run.get(key) == value for key, value in wanted.items())]
        return [run["accuracy"][metric] if metric.isdigit() else run[metric] for run in runs]

    def layout(words, N):
        return of("khop-layouts", "3", label=f"{words}, {N} pass{'es' * (N > 1)}")

    swaps_of = load_runs(RESULTS / "swaps.json")
    better = [run["settings"]["update_rule"] == "overshoot" for run in swaps_of]
    assert sum(better) == 3
    wanted = {                             # how a row begins: one pass, three passes
        "k hops": [layout("alternating, sliding window (Samba)", N) for N in (1, 3)],
        "that, after": [[], layout("alternating, sliding window, attention frozen at first", 3)],
        "[word": [of("words-compute", "2", label="1 pass, 4,430 steps"),
                  of("words-compute", "2", label="3 passes")],
        "[Rule": [of("rule110-long", "exact", N=N) for N in (1, 3)],
        "[a part": [of("pretrained-facts", "2", N=N) for N in (1, 3)],
        "[swaps": [[run["all"] for run, b in zip(swaps_of, better) if run["N"] == N and not b]
                   for N in (1, 3)],
        "that, with": [[run["all"] for run, b in zip(swaps_of, better) if b], []]}
    found, = [rows for _, header, rows in tables(README.read_text(encoding="utf-8"))
              if header[1:] == ["compute", "chance", "one pass", "three passes", "seeds"]]
    assert len(found) == len(wanted)
    for row in found:
        values, = [wanted[start] for start in wanted if row[0].startswith(start)]
        for cell, of_seeds in zip(row[3:5], values):
            if cell == "not run":
                assert not of_seeds, row
            else:
                assert len(of_seeds) == int(row[5]) and agrees(cell, of_seeds), (row, of_seeds)


def test_the_largest_misses_on_the_page_of_jumps_are_those_of_the_results():
    misses = {}                            # (what is changed, N, test): those of the seeds
    for name in ("trees-reach-six", "trees-reach-by-pass", "trees-reach-changed"):
        for run in common.read_results(RESULTS / f"{name}.json")["runs"]:
            if run["trained_depth"] < 11:
                continue
            found = reach.reach(run["accuracy"])
            miss = max(abs(found[n - 1] - run["machine"][n - 2]) for n in range(2, 9))
            kind = (run["layout"], run["update_rule"], run["order"], run["trained_N"])
            misses.setdefault((kind, run["test"]), {})[run["seed"]] = miss
    rows_of = {
        "N = 6: seeds 0, 1, 2": ("as", "gated_delta", "random", 6),
        "N = 7: seeds 0, 1, 2": ("as", "gated_delta", "random", 7),
        "two SSM blocks: seeds 0, 1, 2": ("ass", "gated_delta", "random", 5),
        "mixed orders": ("as", "gated_delta", "mixed", 6),
        "no attention": ("s", "gated_delta", "random", 6),
        "`read_before`": ("as", "read_before", "random", 6),
        "`read_before`, no attention": ("s", "read_before", "random", 6)}
    text = (HERE / "lab/pages/jumps.md").read_text(encoding="utf-8")
    (_, header, rows), = [table for table in tables(text) if table[1][0] == ""
                          and table[1][1:] == list(reach.TESTS)]
    for row in rows:
        for test, cell in zip(header[1:], row[1:]):
            wanted = misses[rows_of[row[0]], test]
            assert cell == " ".join(str(miss) for _, miss in sorted(wanted.items())), (row[0], test)
    assert len(rows) == len(rows_of)


def test_the_reaches_on_the_page_of_jumps_are_those_of_the_results_that_it_names():
    checked = 0
    text = (HERE / "lab/pages/jumps.md").read_text(encoding="utf-8")
    for results, header, rows in tables(text):
        if not header[0].startswith("reach after so many passes"):
            continue
        runs = common.read_results(RESULTS / f"{results}.json")["runs"]
        trained_N = None
        for row in rows:
            named = re.match(r"(?:N = (\d+): )?([a-z ]+)", row[0])
            trained_N = named[1] or trained_N                  # as in the rows above
            of_row = [run for run in runs if run["test"] == named[2].strip() and not run["near"]
                      and run["trained_N"] == int(trained_N or run["trained_N"])]
            if results == "trees-reach-by-pass":               # the page's table is of N = 7 alone
                of_row = [run for run in of_row if (run["layout"], run["trained_depth"]) == ("as", 11)]
            if results == "trees-reach-changed":
                of_row = [run for run in of_row if run["order"] == "mixed"]
            assert of_row, (results, row[0])
            for passes, cell in zip(header[1:], row[1:]):
                after = int(passes.split(",")[0])
                found = [reach.reach(run["accuracy"])[after - 1] for run in of_row]
                assert cell.split() == [str(edges) for edges in found], (results, row[0], passes)
                checked += 1
    assert checked > 180, checked



def test_the_ways_on_the_page_of_exchanges_are_those_of_the_results_that_it_names():
    checked = 0
    text = (HERE / "lab/pages/exchange.md").read_text(encoding="utf-8")
    for results, header, rows in tables(text):
        runs = common.read_results(RESULTS / f"{results}.json")["runs"]
        left = 2 if "two passes" in header[0] else 1           # passes after the exchange
        runs = [run for run in runs if run["passes"] - run["after"] == left]
        for row in rows:
            for column, cell in zip(header[1:], row[1:]):
                number = int(column.split()[0])
                if results == "exchange-trees":
                    test, who = row[0].split(": ")
                    of_cell, = [run for run in runs if (run["test"], run["passes"]) == (test, number)]
                    shares = of_cell["machine" if who == "machine" else "shares"]
                else:
                    N, seed = map(int, re.fullmatch(r"N = (\d), seed (\d)", row[0]).groups())
                    of_cell, = [run for run in runs if (run["trained_N"], run["seed"], run["asked"])
                                == (N, seed, number)]
                    shares = of_cell["shares"]
                said = re.findall(r"(\d\+\d) \(([\d.]+)\)", cell)
                commonest = sorted(shares, key=shares.get, reverse=True)[:len(said)]
                assert [pair for pair, _ in said] == commonest, (results, row[0], column)
                for pair, share in said:
                    assert agrees(share, [shares[pair]]), (results, row[0], column, pair)
                    checked += 1
                if not said:
                    limit = {"spread over many": 0.1, "none above 0.12": 0.125}[cell]
                    assert max(shares.values()) < limit, (results, row[0], column)
    assert checked > 90, checked


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
    blocks = re.findall(r"```text\n\$ python (.*)\n([^`]*)```", README.read_text(encoding="utf-8"))
    assert [command for command, _ in blocks] == ["sleep.py", "sleep.py --trees parents"]
    for command, quoted in blocks:
        printed = subprocess.run([sys.executable, *command.split()], cwd=HERE, capture_output=True,
                                 text=True, check=True).stdout
        lines = [line for line in quoted.splitlines() if line.strip() not in ("", "...")]
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
    """sleep.py, with the lines of a diff exchanged, as a module."""
    method = (HERE / "sleep.py").read_text(encoding="utf-8")
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
    tokens = random_tokens(T=13)
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
                compared = (file.name == "benchmark.py"                        # if they are there
                            and name.startswith(("fla.", "transformers.")))
                assert name.partition(".")[0] in known or compared, (file.name, name)


# ================================================================================================
# Part 5: a pretrained model. Nothing is downloaded: a test writes tiny random checkpoints, and
# plain code that shares nothing with lab/pretrained says what their models compute.

# ------------------------------------------------------------------------------------------------
# Tiny checkpoints

SIZES = dict(blocks=3, d_model=32, heads=4, kv_heads=2, d_ff=64, theta=500.0, eps=1e-5)
SPECIAL = "<|endoftext|>"


@cache
def bpe_parts():
    """A tokenizer's parts: all bytes, and every word of the task as one token -> tokens, merges."""
    tokens = [SPECIAL, *tokenizers.LETTERS.values()]
    merges = []
    for word in facts.NAMES + facts.SURNAMES + facts.PLACES:
        for end in range(1, len(word) + 1):
            pair = ("Ġ" + word[:end - 1], word[end - 1])
            if pair not in merges:
                merges.append(pair)
                tokens.append("Ġ" + word[:end])
    return tokens, merges


def random_tensors(family="llama", tied=True, seed=0):
    """{name as in safetensors: tensor}, every number random."""
    g = torch.Generator().manual_seed(seed)
    d = SIZES["d_model"]
    kv = d // SIZES["heads"] * SIZES["kv_heads"]
    shapes = {"model.embed_tokens.weight": (len(bpe_parts()[0]), d), "model.norm.weight": (d,)}
    if not tied:
        shapes["lm_head.weight"] = (len(bpe_parts()[0]), d)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if family == "ouro":
        norms += ["input_layernorm_2", "post_attention_layernorm_2"]
        shapes["model.early_exit_gate.weight"] = (1, d)
    for i in range(SIZES["blocks"]):
        parts = {"self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d),
                 "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, d),
                 "mlp.gate_proj": (SIZES["d_ff"], d), "mlp.up_proj": (SIZES["d_ff"], d),
                 "mlp.down_proj": (d, SIZES["d_ff"])}
        parts |= {norm: (d,) for norm in norms}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in parts.items()}
    tensors = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=g)
        tensors[name] = 1 + 0.3 * x if len(shape) == 1 else x * shape[1] ** -0.5
    return tensors


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def safetensors_bytes(tensors, header=None):
    raw = b""
    made = {"__metadata__": {"format": "pt"}}
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    for name, x in tensors.items():
        data = x.contiguous().view(torch.uint8).numpy().tobytes()
        made[name] = dict(dtype=kinds[x.dtype], shape=list(x.shape),
                          data_offsets=[len(raw), len(raw) + len(data)])
        raw += data
    text = json.dumps(made | (header or {})).encode()
    return struct.pack("<Q", len(text)) + text + raw


def write_folder(path, tensors, family="llama", tied=True, shards=1, **config):
    path.mkdir()
    tokens, merges = bpe_parts()
    write_json(path / "config.json", dict(
        model_type=family, num_hidden_layers=SIZES["blocks"], hidden_size=SIZES["d_model"],
        num_attention_heads=SIZES["heads"], num_key_value_heads=SIZES["kv_heads"],
        intermediate_size=SIZES["d_ff"], vocab_size=len(tokens), rope_theta=SIZES["theta"],
        rms_norm_eps=SIZES["eps"], tie_word_embeddings=tied, hidden_act="silu") | config)
    write_json(path / "tokenizer.json", dict(
        normalizer=None, added_tokens=[dict(id=0, content=SPECIAL)],
        pre_tokenizer=dict(type="Sequence", pretokenizers=[
            dict(type="Digits", individual_digits=True),
            dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)]),
        model=dict(type="BPE", merges=[" ".join(pair) for pair in merges],
                   vocab={token: i for i, token in enumerate(tokens) if i > 0})))
    if shards == 1:
        (path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return path
    weight_map = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        part = {name: x for name, x in tensors.items() if weight_map[name] == shard}
        (path / shard).write_bytes(safetensors_bytes(part))
    write_json(path / "model.safetensors.index.json", dict(weight_map=weight_map))
    return path


def gguf_string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_value(value):
    """A value of the metadata: its type, and its bytes."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_string(value)
    if isinstance(value, list):
        strings = isinstance(value[0], str)
        items = [gguf_string(x) if strings else struct.pack("<i", x) for x in value]
        return struct.pack("<IIQ", 9, 8 if strings else 5, len(value)) + b"".join(items)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<II", 4, value)


def gguf_facts():
    tokens, merges = bpe_parts()
    return {
        "general.architecture": "llama", "llama.block_count": SIZES["blocks"],
        "llama.embedding_length": SIZES["d_model"], "llama.feed_forward_length": SIZES["d_ff"],
        "llama.attention.head_count": SIZES["heads"],
        "llama.attention.head_count_kv": SIZES["kv_heads"],
        "llama.attention.layer_norm_rms_epsilon": SIZES["eps"],
        "llama.rope.freq_base": SIZES["theta"], "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges]}


def llama_cpp_rows(weight, heads):
    """Rows i and i + K/2 of a head become neighbours, one by one."""
    K = len(weight) // heads
    order = []
    for head in range(heads):
        for i in range(K // 2):
            order += [head * K + i, head * K + K // 2 + i]
    return weight[order]


def to_blocks(x, kind):
    """A tensor as bytes of a type of GGUF, and the float32 tensor that they mean: plain loops."""
    if kind in (0, 1):
        x = x.to(torch.float32 if kind == 0 else torch.float16)
        return x.contiguous().view(torch.uint8).numpy().tobytes(), x.float()
    raw = b""
    meant = []
    for block in x.reshape(-1, 32).tolist():
        least = min(block) if kind == 3 else 0.0
        steps = 15 if kind == 3 else 127
        scale = max(abs(w - least) for w in block) / steps
        scale, least = struct.unpack("<ee", struct.pack("<ee", scale, least))
        q = [max(0 if kind == 3 else -127, min(steps, round((w - least) / scale))) for w in block]
        meant += [scale * n + least for n in q]
        if kind == 8:
            raw += struct.pack("<e32b", scale, *q)
        else:
            raw += struct.pack("<ee16B", scale, least, *[q[i] + 16 * q[16 + i] for i in range(16)])
    return raw, torch.tensor(meant).view_as(x)


def write_gguf(path, tensors, facts=None, kinds=(0, 1, 3, 8)):
    """Writes the tensors, matrices in the types `kinds` by turns -> the tensors that these mean."""
    facts = facts or gguf_facts()
    table = b""
    data = b""
    meant = {}
    names = {new: old for old, new in gguf.NAMES.items()}
    for i, (name, x) in enumerate(tensors.items()):
        block = re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.weight", name)
        short = names[block[2] if block else name.removesuffix(".weight")]
        if block:
            short = f"blk.{block[1]}.{short}"
        kind = 0 if x.ndim == 1 else kinds[i % len(kinds)]
        heads = dict(q_proj=SIZES["heads"], k_proj=SIZES["kv_heads"]).get(name.split(".")[-2])
        stored = llama_cpp_rows(x, heads) if heads else x
        raw, back = to_blocks(stored, kind)
        if heads:                          # where each of the stored rows belongs
            place = llama_cpp_rows(torch.arange(len(x)), heads)
            sorted_back = torch.empty_like(back)
            sorted_back[place] = back
            back = sorted_back
        meant[name] = back
        table += gguf_string(f"{short}.weight") + struct.pack("<I", x.ndim)
        table += struct.pack(f"<{x.ndim}Q", *x.shape[::-1]) + struct.pack("<IQ", kind, len(data))
        data += raw + b"\0" * (-len(raw) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts))
    for key, value in facts.items():
        head += gguf_string(key) + gguf_value(value)
    head += table
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return meant


def plain_model(tensors, tokens, family="llama", passes=1):
    """Tokens (list) -> logits (T, vocab) and the last pass's unrotated keys of each block.

    Plain code: one head and one token at a time, with complex numbers for RoPE.
    """
    W = {name: x.double() for name, x in tensors.items()}
    heads = SIZES["heads"]
    K = SIZES["d_model"] // heads
    served = heads // SIZES["kv_heads"]

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + SIZES["eps"]).sqrt() * W[f"{name}.weight"]

    def turn(x, t):                        # x (K,) at position t
        half = torch.complex(x[:K // 2], x[K // 2:])
        angle = t * SIZES["theta"] ** (-torch.arange(0, K, 2, dtype=torch.float64) / K)
        half = half * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([half.real, half.imag])

    h = W["model.embed_tokens.weight"][tokens]
    for _ in range(passes):
        all_keys = []
        for i in range(SIZES["blocks"]):
            at = f"model.layers.{i}"
            x = norm(h, f"{at}.input_layernorm")
            q, k, v = [x @ W[f"{at}.self_attn.{name}_proj.weight"].T for name in "qkv"]
            rows = []
            for t in range(len(tokens)):
                row = []
                for head in range(heads):
                    mine = slice(head * K, head * K + K)
                    theirs = slice(head // served * K, head // served * K + K)
                    scores = [turn(q[t, mine], t) @ turn(k[s, theirs], s) for s in range(t + 1)]
                    share = (torch.stack(scores) / K ** 0.5).softmax(0)
                    row.append(share @ v[:t + 1, theirs])
                rows.append(torch.cat(row))
            x = torch.stack(rows) @ W[f"{at}.self_attn.o_proj.weight"].T
            h = h + (norm(x, f"{at}.input_layernorm_2") if family == "ouro" else x)
            x = norm(h, f"{at}.post_attention_layernorm")
            gate = x @ W[f"{at}.mlp.gate_proj.weight"].T
            x = gate / (1 + (-gate).exp()) * (x @ W[f"{at}.mlp.up_proj.weight"].T)
            x = x @ W[f"{at}.mlp.down_proj.weight"].T
            h = h + (norm(x, f"{at}.post_attention_layernorm_2") if family == "ouro" else x)
            all_keys.append(k)
        last = norm(h, "model.norm")
        if family == "ouro":
            h = last
    return last @ W.get("lm_head.weight", W["model.embed_tokens.weight"]).T, all_keys


def logits_of(reader, tokens):
    """Logits (T, vocab) of a list of tokens, read awake."""
    with torch.no_grad():
        return reader.wake(reader.embed(torch.tensor([tokens])), reader.empty_memory(1))[0][0]


def a_place():
    return tempfile.TemporaryDirectory()


@cache
def tiny_file():
    """A folder of a tiny model, for this process."""
    folder = tempfile.TemporaryDirectory()
    path = write_folder(Path(folder.name) / "model", random_tensors())
    return folder, path                    # the first keeps it from being deleted


def tiny_args(flags=""):
    argv = (f"--device cpu --file {tiny_file()[1]} --d_model 32 --n_head 4 --layout asaas --skip= "
            f"--people 6 --reads 3 --questions 2 --tests 12 --L 64 --deeper 0 --no-bf16 "
            f"--batch_size 4 {flags}")
    return sleep.parse("", facts.PRESETS, facts.FLAGS, argv.split())[1]


def tiny_plan(flags=""):
    return sleep.plan(tiny_args(flags), facts.Facts)[0]


@torch.no_grad()
def awaken(built, seed=0):
    """Random output projections of the inserted blocks: as if they had learned."""
    g = torch.Generator().manual_seed(seed)
    for block in built.blocks:
        if block.kind == "s":
            block.mixer.o.weight.copy_(torch.randn(block.mixer.o.weight.shape, generator=g) * 0.2)
    return built


TEXT = [5, 80, 33, 33, 120, 7, 250, 9, 61]


# ------------------------------------------------------------------------------------------------
# Files

def test_a_model_of_safetensors_has_the_logits_of_a_plain_implementation_in_one_file_or_in_shards():
    for tied, shards, dtype in ((True, 1, torch.float32), (False, 3, torch.bfloat16),
                                (False, 1, torch.float16)):
        tensors = {name: x.to(dtype) for name, x in random_tensors(tied=tied).items()}
        with a_place() as folder:
            path = write_folder(Path(folder) / "model", tensors, tied=tied, shards=shards)
            shape, found, _ = read.read(path)
        assert shape.tied == tied and shape.kv_heads == 2
        assert set(found) == set(tensors)
        built = pretrained.make(shape, found, L=16)
        close(logits_of(built, TEXT).double(), plain_model(tensors, TEXT)[0], 1e-5)


def test_a_gguf_of_four_types_has_the_logits_of_a_plain_model_and_its_rows_are_sorted_back():
    with a_place() as folder:
        path = Path(folder) / "model.gguf"
        for kinds, tied in (((0, 1, 3, 8), True), ((8, 3), False)):
            meant = write_gguf(path, random_tensors(tied=tied), kinds=kinds)
            shape, found, _ = read.read(path)
            assert shape.tied == tied and set(found) == set(meant)
            for name, x in meant.items():
                close(found[name], x, 1e-6)
            built = pretrained.make(shape, found, L=16)
            close(logits_of(built, TEXT).double(), plain_model(meant, TEXT)[0], 1e-5)


def test_both_formats_have_the_same_tokenizer():
    with a_place() as folder:
        write_gguf(Path(folder) / "model.gguf", random_tensors())
        one = read.read(Path(folder) / "model.gguf")[2]
    two = read.read(tiny_file()[1])[2]
    assert (one.numbers, one.ranks, one.special) == (two.numbers, two.ranks, two.special)


def test_a_file_that_is_cut_off_or_lies_about_its_size_gets_a_sentence_and_no_memory():
    huge = 2 ** 43
    with a_place() as folder:
        folder = Path(folder)
        path = folder / "model.gguf"
        write_gguf(path, random_tensors())
        good = path.read_bytes()
        kv = 4 + 4 + 8 + 8
        lies = {
            "": "no GGUF file", "PK\3\4 and more": "no GGUF file",
            b"GGUF" + struct.pack("<I", 7): "version 7",
            good[:100]: "cut off", good[:-50]: "cut off", good[:len(good) // 2]: "cut off",
            good[:16] + struct.pack("<Q", huge) + good[24:]: "cut off",        # keys
            good[:8] + struct.pack("<Q", huge) + good[16:]: "",                # tensors
            good[:kv] + struct.pack("<Q", huge) + good[kv + 8:]: "cut off",    # letters of a key
            good[:kv] + gguf_string("x") + struct.pack("<IIQ", 9, 10, huge): "cut off",
            good[:kv] + gguf_string("x") + struct.pack("<IIQ", 9, 9, 1): "type 9",
            good[:kv] + gguf_string("x") + struct.pack("<I", 77): "type 77"}
        where = good.index(gguf_string("token_embd.weight")) + 8 + 17
        lies[good[:where + 4] + struct.pack("<Q", huge) + good[where + 12:]] = "cut off"
        lies[good[:where] + struct.pack("<I", 9) + good[where + 4:]] = "9 dimensions"
        lies[good[:where + 20] + struct.pack("<I", 14) + good[where + 24:]] = "type 14"
        tracemalloc.start()
        for raw, sentence in lies.items():
            path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
            refused(sentence, read.read, path)
        tensors = folder / "model.safetensors"
        x = dict(dtype="F32", shape=[2 ** 20, 2 ** 20], data_offsets=[0, 2 ** 42])
        for raw, sentence in {
                b"": "cut off", struct.pack("<Q", huge) + b"{}": "cut off",
                struct.pack("<Q", 2) + b"[]": "header", struct.pack("<Q", 4) + b"\xff{}1": "header",
                safetensors_bytes({}, dict(a=x)): "cut off",
                safetensors_bytes({}, dict(a=x | dict(data_offsets=[0, 8]))): "8 bytes",
                safetensors_bytes({}, dict(a=x | dict(data_offsets=[-2 ** 42, 0]))): "damaged",
                safetensors_bytes({}, dict(a=x | dict(dtype="F8_E4M3"))): "F8_E4M3",
                safetensors_bytes(dict(a=torch.ones(900)), {
                    str(i): x | dict(shape=[900], data_offsets=[0, 3600])
                    for i in range(9)}): "more",
                safetensors_bytes({}, dict(a=5)): "header"}.items():
            tensors.write_bytes(raw)
            refused(sentence, folders.read_safetensors, tensors)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20e6, peak


def test_a_foreign_model_or_tokenizer_and_a_file_that_contradicts_itself_get_a_sentence():
    refused("cannot be opened", read.read, "no/such/file")
    with a_place() as folder:
        path = Path(folder) / "model.gguf"
        for key, value, sentence in (
                ("general.architecture", "gpt2", "'gpt2'"),
                ("tokenizer.ggml.pre", "llama-bpe", "llama-bpe"),
                ("tokenizer.ggml.model", "llama", "'llama'"),
                ("llama.block_count", 0, "blocks is 0"),
                ("llama.attention.head_count_kv", 3, "divide"),
                ("llama.rope.freq_base", -1.0, "theta"),
                ("llama.rope.dimension_count", 4, "rotates 4"),
                ("tokenizer.ggml.token_type", [1], "do not fit"),
                ("tokenizer.ggml.merges", ["a b c"], "two parts")):
            write_gguf(path, random_tensors(), facts=gguf_facts() | {key: value})
            refused(sentence, read.read, path)
        for key, value, sentence in (
                ("model_type", "mamba", "'mamba'"), ("hidden_act", "gelu", "hidden_act"),
                ("rope_scaling", dict(type="yarn"), "rope_scaling"),
                ("attention_bias", True, "bias"),
                ("head_dim", 16, "head_dim"), ("hidden_size", "32", "d_model"),
                ("num_hidden_layers", None, "blocks"), ("num_hidden_layers", 10 ** 7, "missing"),
                ("vocab_size", 10 ** 7, "contradicts"),
                ("intermediate_size", 10 ** 7, "contradicts")):
            path = write_folder(Path(folder) / f"{key} {value}", random_tensors(), **{key: value})
            refused(sentence, read.read, path)
        path = write_folder(Path(folder) / "tokenizer", random_tensors())
        other = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
        other["pre_tokenizer"]["pretokenizers"][0]["type"] = "Split"
        write_json(path / "tokenizer.json", other)
        refused("'Split'", read.read, path)
        other["pre_tokenizer"]["pretokenizers"][0]["type"] = "Digits"
        broken = other["model"]["vocab"] | {"a new one": "7"}
        for model_part in (dict(vocab={"a": 1}), dict(vocab=broken), dict(merges=[[["a"], ["b"]]]),
                           dict(merges=[5])):
            write_json(path / "tokenizer.json", other | dict(model=other["model"] | model_part))
            refused("tokenizer", read.read, path)
        (path / "tokenizer.json").write_text("{", encoding="utf-8")
        refused("no json", read.read, path)

    shape, tensors, _ = read.read(tiny_file()[1])
    refused("lacks model.norm.weight", pretrained.make, shape,
            {name: x for name, x in tensors.items() if name != "model.norm.weight"}, 16)
    for name, sentence in (("a.bias", "known here, a.bias"), ("model.norm.weight", "contradicts")):
        refused(sentence, pretrained.make, shape, tensors | {name: torch.ones(31)}, 16)
    refused("3 blocks", pretrained.make, shape, tensors, 16, layout="aasaa")
    refused("--span 2:9", pretrained.make, shape, tensors, 16, span=(2, 9))
    refused("no convolution", pretrained.make, shape, tensors, 16, conv="as")


def test_text_becomes_tokens_and_the_same_text_again_with_digits_alone_and_the_first_merge_first():
    tokenizer = read.read(tiny_file()[1])[2]
    rng = random.Random(0)
    for _ in range(300):
        parts = ["Anna", " Anna", " ", "\n", "7", "it's", "é", "_", "漢", SPECIAL, "\0"]
        text = "".join(rng.choice(parts) for _ in range(20))
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(SPECIAL) == [0] and len(tokenizer.encode(" Anna")) == 1
    # Merges by hand: of `a b`, `b c` and `ab c` the first that fits is taken, not the longest.
    letters = {letter: i for i, letter in enumerate(tokenizers.LETTERS.values())}
    for merges, text, parts in (
            ([("a", "b"), ("b", "c"), ("ab", "c")], "abc", ["abc"]),
            ([("b", "c"), ("a", "b"), ("ab", "c")], "abc", ["a", "bc"]),
            ([("1", "2")], "12", ["1", "2"]), ([("a", "a")], "aaaaa", ["aa", "aa", "a"]),
            ([("Ġ", "Ġ")], "a   b", ["a", "ĠĠ", "Ġ", "b"])):
        tokens = dict(letters)
        for pair in merges:
            tokens["".join(pair)] = len(tokens)
        made = tokenizers.make_tokenizer(tokens, merges, [])
        assert [made.texts[number] for number in made.encode(text)] == parts, (merges, text)


# ------------------------------------------------------------------------------------------------
# The model

def test_ouro_has_four_norms_and_a_norm_after_every_pass_as_a_plain_implementation():
    tensors = random_tensors("ouro", tied=False)
    with a_place() as folder:
        path = write_folder(Path(folder) / "ouro", tensors, "ouro", tied=False)
        shape, found, _ = read.read(path)
    built = pretrained.make(shape, found, L=9, eviction="sliding")
    close(logits_of(built, TEXT).double(), plain_model(tensors, TEXT, "ouro")[0], 1e-5)
    for N in (1, 3):                       # a sliding cache shows the keys of the last pass
        with torch.no_grad():
            memory = built.sleep(built.embed(torch.tensor([TEXT])), built.empty_memory(1), N)
        _, keys = plain_model(tensors, TEXT, "ouro", passes=N)
        for cache, k in zip(memory.cache, keys):
            k = k.unflatten(1, (2, 1, 8)).expand(-1, -1, 2, -1).flatten(1, 2).transpose(0, 1)
            close(cache.keys[0].double(), k[:, -8:], 1e-5)


def test_inserted_blocks_change_no_bit_before_training_and_do_after():
    shape, tensors, _ = read.read(tiny_file()[1])
    plain = pretrained.make(shape, tensors, L=16)
    built = pretrained.make(shape, tensors, L=16, layout="asasas")
    assert torch.equal(logits_of(built, TEXT), logits_of(plain, TEXT))
    one_by_one, _ = built.stream(torch.tensor([TEXT]))
    assert torch.equal(one_by_one, plain.stream(torch.tensor([TEXT]))[0])
    assert not torch.equal(logits_of(awaken(built), TEXT), logits_of(plain, TEXT))


def test_blocks_that_are_skipped_are_left_out_and_the_others_keep_their_place():
    shape, tensors, _ = read.read(tiny_file()[1])
    built = pretrained.make(shape, tensors, L=16, layout="aa", skip=(1, 2))
    whole = pretrained.make(shape, tensors, L=16)
    del whole.blocks[1]
    with torch.no_grad():
        empty = whole.empty_memory(1)
        h, _, _ = whole.one_pass(whole.embed(torch.tensor([TEXT])), empty.S, empty.cache)
        close(logits_of(built, TEXT), whole.head(whole.norm(h))[0], 1e-6)


def test_a_sleep_repeats_the_span_alone_and_one_pass_is_the_plain_model():
    shape, tensors, _ = read.read(tiny_file()[1])
    h = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    for recompute in (False, True):
        built = awaken(pretrained.make(shape, tensors, L=16, layout="asasas", span=(2, 5)))
        sleep.accelerate(built, compile=False, recompute=recompute)
        calls = [0] * 6
        for i, block in enumerate(built.blocks):
            block.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
        memory = built.sleep(h, built.empty_memory(2), 3)
        assert calls == [1, 1, 3, 3, 3, 1]
        unread = built.sleep(h, memory, 0)
        assert unread.S == memory.S and calls == [1, 1, 3, 3, 3, 1]
        # By hand: the blocks before, three times those of the span, those after.
        S = built.empty_memory(2).S
        empty = built.empty_memory(2).cache
        x = h
        for i in [0, 1] + 3 * [2, 3, 4] + [5]:
            x, S[i], _ = built.blocks[i](x, S[i], empty[i])
        for mine, theirs in zip(memory.S, S):
            assert mine is None or torch.equal(mine, theirs)
        whole = pretrained.make(shape, tensors, L=16, layout="asasas")
        whole.load_state_dict(built.state_dict())
        for mine, theirs in zip(built.sleep(h, built.empty_memory(2), 1).S,
                                whole.sleep(h, whole.empty_memory(2), 1).S):
            assert mine is None or torch.equal(mine, theirs)


def test_algorithm_1_with_logits_for_answers_alone_has_the_loss_and_gradients_of_sleep():
    task, cfg, settings = tiny_plan("--N 2 --questions 3")
    built = awaken(facts.make_model(cfg, settings))
    tokens, targets, _ = task.make_batch(0)
    asleep = built.windows_asleep(tokens, targets)
    assert asleep == [True, False]
    same_algorithm(built, tokens, targets, asleep)
    # Two windows awake, and targets for all tokens, of which most are nothing.
    tokens = tokens.repeat(1, 3)[:, :192]
    targets = torch.full_like(tokens, -1)
    targets[:, [70, 130, 191]] = tokens[:, :3]
    same_algorithm(built, tokens, targets, [True, False, False])


def same_algorithm(built, tokens, targets, asleep):
    results = []
    for algorithm in (built.algorithm_1, partial(sleep.SleepLM.algorithm_1, built)):
        built.zero_grad()
        logits, loss = algorithm(tokens, targets, asleep)
        loss.backward()
        grads = [p.grad for p in built.parameters() if p.grad is not None]
        assert logits.shape[:2] == targets.shape
        results.append((logits.detach()[targets >= 0], loss.detach(), *grads))
    assert len(results[0]) == len(results[1])
    for mine, theirs in zip(*results):
        close(mine, theirs, 1e-4)


def test_hard_eviction_leaves_S_alone_to_answer_from():
    task, cfg, settings = tiny_plan("--N 2")
    built = awaken(facts.make_model(cfg, settings))
    tokens, _, _ = task.make_batch(-1)
    window = built.embed(tokens[:2, :64])
    question = built.embed(tokens[:1, 64:].expand(2, -1))      # the same for both texts
    with torch.no_grad():
        memory = built.sleep(window, built.empty_memory(2))
        assert all(part is None or part.shape[-2] == 0 for cache in memory.cache for part in cache)
        said, _ = built.wake(question, memory)
        assert not torch.allclose(said[0], said[1], atol=1e-3)
        swapped = [S if S is None else S.flip(0) for S in memory.S]
        close(built.wake(question, memory._replace(S=swapped))[0], said.flip(0), 1e-6)
        nothing = [S if S is None else S * 0 for S in memory.S]
        unread, _ = built.wake(question, built.empty_memory(2))
        close(built.wake(question, memory._replace(S=nothing))[0], unread, 1e-6)


def test_a_warm_up_step_moves_inserted_blocks_only_and_words_never_move():
    task, cfg, settings = tiny_plan("--N 2 --steps 4 --warmup 2 --eviction sliding")
    torch.manual_seed(0)
    built = facts.make_model(cfg, settings)
    optimizers = sleep.make_optimizers(built, 1e-2, 1e-2)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]
    gradients = sleep.accelerate(built, False, False)

    def moved(step):
        before = {name: p.detach().clone() for name, p in built.named_parameters()}
        sleep.set_rates(optimizers, settings, step)
        sleep.warm_up(built, step, settings["warmup"], cfg.eviction)
        gradients(*task.make_batch(step)[:2], 2)
        for optimizer in optimizers:
            optimizer.step()
        return {name for name, p in built.named_parameters() if not torch.equal(p, before[name])}

    inserted = {name for i in (1, 4) for name, _ in built.named_parameters()
                if name.startswith(f"blocks.{i}.")}
    assert "blocks.1.conv.weight" in inserted
    first = moved(0)
    assert first == {"blocks.1.mixer.o.weight", "blocks.4.mixer.o.weight"}     # the others see a 0
    assert built.cfg.eviction == "hard"
    assert moved(1) == inserted
    every_block = {name for name, _ in built.named_parameters() if name.startswith("blocks.")}
    assert moved(2) == every_block
    assert built.cfg.eviction == "sliding"


# ------------------------------------------------------------------------------------------------
# The task

def test_every_text_can_be_solved_by_reading_and_all_of_it_is_slept_over():
    for flags in ("", "--people 6 --reads 1", "--people 44 --reads 4 --L 256 --questions 5"):
        task, cfg, settings = tiny_plan(flags)
        first_sentences = set()
        for step in (-1, 0, 1):
            tokens, targets, depths = task.make_batch(step)
            again = task.make_batch(step)
            assert torch.equal(tokens, again[0]) and torch.equal(targets, again[1])
            assert tokens.shape[1] - targets.shape[1] == len(task.windows(task.text(0)[0]))
            assert (tokens.shape[1] - targets.shape[1]) % cfg.L == 0
            for row, answers, depth in zip(tokens, targets, depths):
                text = task.tokenizer.decode(row)
                answers = answers[answers >= 0]
                said = re.findall(r" ([\w ]+?) is (in|with) ([\w ]+?)\.", text.split(" So ")[0])
                known = {name: (how, what) for name, how, what in said}
                first_sentences.add(said[0][1])
                assert len(known) == task.args.people
                asked = re.findall(r" So ([\w ]+?) is in", text)
                for name, answer in zip(asked, answers, strict=True):
                    reads = 1
                    while known[name][0] == "with":
                        name = known[name][1]
                        reads += 1
                    assert task.tokenizer.decode([answer]).strip() == known[name][1]
                assert reads == depth
        assert len(first_sentences) == 1 + (task.args.reads > 1)       # in any order
    depths = tiny_plan()[0].test[2].tolist()
    assert [depths.count(depth) for depth in (1, 2, 3)] == [4, 4, 4]


def test_chains_grow_longer_over_the_first_share_of_the_steps():
    task = tiny_plan("--steps 30 --warmup 0 --deeper 0.5")[0]
    assert [task.reads(step) for step in (0, 4, 5, 9, 10, 14, 15, 29)] == [1, 1, 2, 2, 3, 3, 3, 3]
    lengths = set()
    for step, deepest in ((0, 1), (5, 2), (29, 3)):
        tokens, _, depths = task.make_batch(step)
        assert depths.max() <= deepest
        lengths.add(tokens.shape)
    assert len(lengths) == 1


def test_the_program_trains_resumes_and_its_checkpoint_answers_in_the_demonstration():
    shape = (f"--device cpu --file {tiny_file()[1]} --d_model 32 --n_head 4 --layout asaas --skip= "
             "--L 64")
    flags = (f"{shape} --N 1 2 --people 6 --questions 2 --tests 12 --batch_size 4 --steps 4 "
             "--warmup 2 --eval_every 2")
    with a_place() as folder:
        out = Path(folder) / "runs"
        status, printed, error = run(facts.main, f"{flags} --out {out}".split())
        assert status == 0, error
        assert "N 2 seed 0" in printed and "accuracy 1:" in printed
        status, printed, error = run(facts.main, f"{flags} --out {out} --resume".split())
        assert status == 0 and "step 4 of 4" in printed, error
        argv = [str(tiny_file()[1]), "--checkpoint", str(out / "N2-seed0.pt")]
        status, printed, error = run(pretrained_demo.main, argv)
        assert status == 0, error
        for words in ("in view, untouched, 3 reads:", "evicted, untouched, 1 read:",
                      "trained; evicted after a sleep of 2 passes, 2 reads:"):
            assert words in printed, printed
        forgotten = re.search(r"\nevicted, untouched\n(.*?)\n\n", printed, re.S)[1]
        argv[2] = str(out / "command.txt")
        status, _, error = run(pretrained_demo.main, argv)
        assert status == 2 and "checkpoint" in error and error.count("\n") == 1, error
    shape_of_file, tensors, tokenizer = read.read(tiny_file()[1])
    whole = pretrained.make(shape_of_file, tensors, L=64)
    names = re.findall(r"So (\w+) is in", forgotten)
    questions = [(name, 1, "") for name in names]
    said = pretrained_demo.answers(whole, tokenizer, whole.empty_memory(1), questions)
    assert len(said) == 6
    for line, text in zip(forgotten.splitlines(), said):
        assert f" is in{text}" in line, (line, text)
    with new_folder():                     # a refusal may leave an empty out/
        for flags, sentence in (("", "--file is missing"), (f"{shape} --people 7", "multiple"),
                                (f"{shape} --span 3", "two numbers"),
                                (f"{shape} --n_head 2", "--n_head 4"),
                                (f"{shape} --questions 99", "only")):
            status, _, error = run(facts.main, flags.split())
            assert status == 2 and sentence in error and error.count("\n") == 1, error


def test_the_plan_says_flop_that_grow_with_the_passes_and_needs_no_weights():
    with a_place() as folder:
        write_json(Path(folder) / "config.json", dict(
            model_type="ouro", num_hidden_layers=24, hidden_size=2048, num_attention_heads=16,
            intermediate_size=5632, vocab_size=49152, rope_theta=1e6))
        status, printed, error = run(facts.main, ["--preset", "ouro", "--file", folder, "--plan"])
    assert status == 0, error
    assert "1,233,125,376 weights" in printed              # 24 blocks of 4 d^2 + 3 d d_ff
    petaflop = [float(x.replace(",", "")) for x in re.findall(r"([\d,.]+) PFLOP", printed)]
    tokens = [2000 * N + 8 * 5 for N in (1, 4)]
    assert math.isclose(petaflop[1] / petaflop[0], tokens[1] / tokens[0], rel_tol=1e-3)
    for flags in ("", "--people 44 --reads 4 --L 256 --questions 5"):
        task = tiny_plan(flags)[0]
        sentences, people, _ = task.text(0)
        asleep, awake = facts.tokens_of(task.args)
        context = 1 + len(re.findall(r"\w+|\.", " ".join(sentences)))
        assert asleep - task.args.L < context <= asleep and asleep % task.args.L == 0
        assert awake == task.args.questions * len(f"So {people[0][0]} is in".split())


if __name__ == "__main__":
    sys.exit("lab/test_lab.py: run these tests with `python test_sleep.py`.")
