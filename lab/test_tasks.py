"""Tests of the tasks of train_ca.py, train_khop.py and train_gsm.py: every batch is read and solved
by independent code, and no shortcut finds an answer.

    python test_sleep.py                     all tests, those of this file among them
    python test_sleep.py rule_110 cycle      those whose names contain one of the words
"""
import math
import random
import re
import sys
from collections import Counter
from itertools import combinations, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

import train_ca
import train_gsm
import train_khop
from test_sleep import built, settings


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
        if word == "times":
            total *= value
        elif word == "minus":
            total -= value
        else:
            assert word == "plus"
            total += value
    return total % p, needed, chain + 1


def test_a_reader_of_the_text_alone_finds_every_answer_and_its_depth():
    name = r"[a-z]{4}"
    said = rf"(\d+|{name}|(\d+|{name}) (plus|minus) {name}|\d+ times {name})"
    for flags in ("", "--T 60 80 --L 50 --reads 3 --questions 7", "--questions 3 --T 40 48 --L 40"):
        task = built(train_gsm, f"--batch_size 32 --tests 120 {flags}")
        args = task.args
        for step in (None, 0, 1, 2):
            tokens, targets, depths = task.test if step is None else task.make_batch(step)
            M = 1 if step is None else args.questions
            assert depths.shape == (len(tokens), M) and tokens.shape[1] <= task.T
            before = tokens.shape[1] + 1 - 3 * M               # tokens before the answers
            assert before in args.T and (step is not None or before == max(args.T))
            for row, wanted, depth in zip(tokens, targets, depths.tolist()):
                assert re.fullmatch(rf"({name} ){{{M}}}\? ({name} {said} \. )+"
                                    rf"(answer {name} \d+ ){{{M - 1}}}answer {name}",
                                    task.text(row))
                asked, sentences, phrases = read(task, row)
                assert asked == [phrase[0] for phrase in phrases] and len(set(asked)) == M
                answers = [(target - train_gsm.ZERO) for target in wanted.tolist() if target >= 0]
                found = [solve(sentences, question, args.p) for question in asked]
                assert [value for value, _, _ in found] == answers
                assert [chain for _, _, chain in found] == depth
                assert [phrase[1] for phrase in phrases[:-1]] == [str(x) for x in answers[:-1]]
                places = (wanted >= 0).nonzero().flatten().tolist()
                assert places == [3 * i + 1 for i in range(M)]  # said by the name
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
    task = built(train_gsm, "--reads 1 --p 5 --names 20 --T 8 --L 8 --questions 1 --tests 300 "
                            "--batch_size 4000")               # few texts, so most of them are seen

    def texts(batch):
        found = set()
        for row in batch[0]:
            sentences = read(task, row)[1]
            found.add(frozenset((name, *said) for name, said in sentences.items()))
        return found

    test = texts(task.test)
    trained = set.union(*[texts(task.make_batch(step)) for step in range(4)])
    every = {frozenset(two) for two in combinations(product(range(20), range(5)), 2)
             if two[0][0] != two[1][0]}
    assert len(test) > 200 and len(test | trained) > 0.9 * len(every) and not test & trained
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
    assert task.chance["accuracy"] == {str(depth): 1 / 7 for depth in (1, 2, 3, 4)}


def test_an_answer_of_any_depth_is_any_number_as_often():
    task = built(train_gsm, "--batch_size 2000")
    _, targets, depths = task.make_batch(0)
    answers = targets[targets >= 0] - train_gsm.ZERO           # 16,000: 4,000 of each depth
    for depth in (1, 2, 3, 4):
        counts = torch.bincount(answers[depths.flatten() == depth], minlength=7)
        chi2 = ((counts - 4000 / 7) ** 2 / (4000 / 7)).sum()
        assert chi2 < 27, counts                               # 6 degrees of freedom: 1 in 10,000
