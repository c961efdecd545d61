"""Tests of lab/course/tiny.py and lab/course/sleep.ipynb. `python test_sleep.py` runs them, too."""
import copy
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import sleep
from lab.course import make_notebook, tiny
from test_sleep import patched, run


# ------------------------------------------------------------------------------------------------
# tiny.py

IN_SLEEP = {                               # a matrix of tiny.Model -> those of SleepLM, in rows
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
    """tiny.Model and the SleepLM of the same weights, random, in float64."""
    torch.manual_seed(0)
    small = tiny.Model(N)
    for p in small.parameters():
        torch.nn.init.normal_(p, std=0.3)
    cfg = sleep.Config(tiny.NODES, 2 * tiny.L, tiny.L, N=N, layout="as", d_model=tiny.d, n_head=1,
                       update_rule="delta", conv="")
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
        tokens = torch.randint(small.embed.num_embeddings, (3, windows * tiny.L, 2))
        answers = torch.randint(tiny.NODES, (3, tiny.L))
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
    tokens, answers, k = tiny.make_batch(5, tiny.K, g)
    n = tiny.NODES
    for row in range(5):
        edges = tokens[row, :n].tolist()
        after = {a: b - tiny.TO for a, b in edges}
        assert sorted(after) == sorted(after.values()) == list(range(n))
        questions = tokens[row, n:].tolist()
        for (node, word), answer, hops in zip(questions, answers[row].tolist(), k[row].tolist()):
            assert 1 <= hops <= tiny.K and word == tiny.HOPS + hops - 1
            for _ in range(hops):
                node = after[node]
            assert node == answer


def test_tiny_learns_to_recall_an_edge():
    points = list(tiny.train(N=1, steps=100))
    assert [step for step, _ in points] == list(range(10, 101, 10))
    assert points[-1][1][0] > 0.3, points[-1]                  # one hop; chance is 1 / (NODES - 1)


def test_tiny_is_short_and_takes_no_flags_but_help():
    assert len(Path(tiny.__file__).read_text(encoding="utf-8").splitlines()) < 150
    for argv, expected, words in ((["--help"], 0, "on three screens"),
                                  (["--steps", "3"], 2, "--steps 3")):
        with patched(sys, "argv", ["tiny.py", *argv]):
            status, text, err = run(runpy.run_path, tiny.__file__, None, "__main__")
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
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
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
        assert (ROOT / path).exists(), path


def test_bad_names_are_refused_before_the_notebook_runs():
    notebook = str(make_notebook.NOTEBOOK)
    readme = str(ROOT / "README.md")
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


if __name__ == "__main__":
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            test()
            print("ok  ", name)
