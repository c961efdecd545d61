"""Tests of sleep.py around the training of one model: compiled blocks, the machine, checkpoints and
--resume, a whole script from its command line to its files; and of the runner of all tests.

    python test_sleep.py                     all tests, those of this file among them
    python test_sleep.py resume compiled     those whose names contain one of the words
"""
import contextlib
import copy
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sleep
import test_sleep
import train_ca
import train_gsm
import train_khop
from lab.course import demo
from sleep import Config, SleepLM
from test_sleep import (ECHO, HERE, TASKS, Echo, a_run, close, echo, echo_plan, folder, gradients,
                        patched, random_tokens, refused, run, same, settings, targets_for, tiny,
                        weights)


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
            (train_ca, "8 to 60 cells", "--W 4 --L 4"), (train_ca, "0 to 1,000", "--t 99999"),
            (train_ca, "--split 1000", "--split 1000"), (train_ca, "--tapes 0", "--tapes 0"),
            (train_khop, "--K 0 must be", "--K 0"), (train_khop, "--K 12 must be", "--K 12"),
            (train_khop, "--queries 13", "--queries 13"), (train_khop, "--nodes 4", "--nodes 4"),
            (train_khop, "be padding", "--L 49"), (train_khop, "--L 0 must be", "--L 0"),
            (train_khop, "cut a question", "--L 9"), (train_khop, "--n_law some", "--n_law some"),
            (train_khop, "--deeper", "--deeper 2"),
            (train_gsm, "must be a prime", "--p 9"), (train_gsm, "--p 3 must be", "--p 3"),
            (train_gsm, "--names 4901", "--names 4901"), (train_gsm, "never full", "--L 53"),
            (train_gsm, "--questions 0", "--questions 0"), (train_gsm, "--L 0 must", "--L 0"),
            (train_gsm, "--reads 0 must", "--reads 0"), (train_gsm, "--tests 3", "--tests 3"),
            (train_gsm, "40 --names and --T 241", "--questions 40"),
            (train_gsm, "20 --names and --T 121", "--questions 20 --names 20"),
            (train_gsm, "--T 49", "--T 48 --L 48"),
            (train_gsm, "million tokens", "--tests 100000 --T 3000")):
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
