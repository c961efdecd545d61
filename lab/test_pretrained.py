"""Tests of lab/pretrained: files, tokenizer, the model that is read, and the task of facts.

Nothing is downloaded: a test writes tiny random checkpoints in both formats, and plain code that
shares nothing with lab/pretrained says what their models compute.

    python test_sleep.py                     all tests, those of this file among them
    python test_sleep.py gguf forget         those whose names contain one of the words
"""
import functools
import json
import math
import random
import re
import struct
import sys
import tempfile
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

import sleep
from lab.pretrained import __main__ as demo
from lab.pretrained import facts, model, read
from test_sleep import close, refused, run


# ------------------------------------------------------------------------------------------------
# Tiny checkpoints

SIZES = dict(blocks=3, d_model=32, heads=4, kv_heads=2, d_ff=64, theta=500.0, eps=1e-5)
SPECIAL = "<|endoftext|>"


@functools.cache
def words():
    """A tokenizer's parts: all bytes, and every word of the task as one token -> tokens, merges."""
    tokens = [SPECIAL, *read.LETTERS.values()]
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
    shapes = {"model.embed_tokens.weight": (len(words()[0]), d), "model.norm.weight": (d,)}
    if not tied:
        shapes["lm_head.weight"] = (len(words()[0]), d)
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
    tokens, merges = words()
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
    tokens, merges = words()
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
    names = {new: old for old, new in read.NAMES.items()}
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


def place():
    return tempfile.TemporaryDirectory()


@functools.cache
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
        with place() as folder:
            path = write_folder(Path(folder) / "model", tensors, tied=tied, shards=shards)
            shape, found, _ = read.read(path)
        assert shape.tied == tied and shape.kv_heads == 2
        assert set(found) == set(tensors)
        built = model.make(shape, found, L=16)
        close(logits_of(built, TEXT).double(), plain_model(tensors, TEXT)[0], 1e-5)


def test_a_gguf_of_four_types_has_the_logits_of_a_plain_model_and_its_rows_are_sorted_back():
    with place() as folder:
        path = Path(folder) / "model.gguf"
        for kinds, tied in (((0, 1, 3, 8), True), ((8, 3), False)):
            meant = write_gguf(path, random_tensors(tied=tied), kinds=kinds)
            shape, found, _ = read.read(path)
            assert shape.tied == tied and set(found) == set(meant)
            for name, x in meant.items():
                close(found[name], x, 1e-6)
            built = model.make(shape, found, L=16)
            close(logits_of(built, TEXT).double(), plain_model(meant, TEXT)[0], 1e-5)


def test_both_formats_have_the_same_tokenizer():
    with place() as folder:
        write_gguf(Path(folder) / "model.gguf", random_tensors())
        one = read.read(Path(folder) / "model.gguf")[2]
    two = read.read(tiny_file()[1])[2]
    assert (one.numbers, one.ranks, one.special) == (two.numbers, two.ranks, two.special)


def test_a_file_that_is_cut_off_or_lies_about_its_size_gets_a_sentence_and_no_memory():
    huge = 2 ** 43
    with place() as folder:
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
                    str(i): x | dict(shape=[900], data_offsets=[0, 3600]) for i in range(9)}): "more",
                safetensors_bytes({}, dict(a=5)): "header"}.items():
            tensors.write_bytes(raw)
            refused(sentence, read.read_safetensors, tensors)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20e6, peak


def test_a_foreign_model_or_tokenizer_and_a_file_that_contradicts_itself_get_a_sentence():
    refused("cannot be opened", read.read, "no/such/file")
    with place() as folder:
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
    refused("lacks model.norm.weight", model.make, shape,
            {name: x for name, x in tensors.items() if name != "model.norm.weight"}, 16)
    for name, sentence in (("a.bias", "known here, a.bias"), ("model.norm.weight", "contradicts")):
        refused(sentence, model.make, shape, tensors | {name: torch.ones(31)}, 16)
    refused("3 blocks", model.make, shape, tensors, 16, layout="aasaa")
    refused("--span 2:9", model.make, shape, tensors, 16, span=(2, 9))
    refused("no convolution", model.make, shape, tensors, 16, conv="as")


def test_text_becomes_tokens_and_the_same_text_again_with_digits_alone_and_the_first_merge_first():
    tokenizer = read.read(tiny_file()[1])[2]
    rng = random.Random(0)
    for _ in range(300):
        parts = ["Anna", " Anna", " ", "\n", "7", "it's", "é", "_", "漢", SPECIAL, "\0"]
        text = "".join(rng.choice(parts) for _ in range(20))
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(SPECIAL) == [0] and len(tokenizer.encode(" Anna")) == 1
    # Merges by hand: of `a b`, `b c` and `ab c` the first that fits is taken, not the longest.
    letters = {letter: i for i, letter in enumerate(read.LETTERS.values())}
    for merges, text, parts in (
            ([("a", "b"), ("b", "c"), ("ab", "c")], "abc", ["abc"]),
            ([("b", "c"), ("a", "b"), ("ab", "c")], "abc", ["a", "bc"]),
            ([("1", "2")], "12", ["1", "2"]), ([("a", "a")], "aaaaa", ["aa", "aa", "a"]),
            ([("Ġ", "Ġ")], "a   b", ["a", "ĠĠ", "Ġ", "b"])):
        tokens = dict(letters)
        for pair in merges:
            tokens["".join(pair)] = len(tokens)
        made = read.make_tokenizer(tokens, merges, [])
        assert [made.texts[number] for number in made.encode(text)] == parts, (merges, text)


# ------------------------------------------------------------------------------------------------
# The model

def test_ouro_has_four_norms_and_a_norm_after_every_pass_as_a_plain_implementation():
    tensors = random_tensors("ouro", tied=False)
    with place() as folder:
        path = write_folder(Path(folder) / "ouro", tensors, "ouro", tied=False)
        shape, found, _ = read.read(path)
    built = model.make(shape, found, L=9, eviction="sliding")
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
    plain = model.make(shape, tensors, L=16)
    built = model.make(shape, tensors, L=16, layout="asasas")
    assert torch.equal(logits_of(built, TEXT), logits_of(plain, TEXT))
    one_by_one, _ = built.stream(torch.tensor([TEXT]))
    assert torch.equal(one_by_one, plain.stream(torch.tensor([TEXT]))[0])
    assert not torch.equal(logits_of(awaken(built), TEXT), logits_of(plain, TEXT))


def test_blocks_that_are_skipped_are_left_out_and_the_others_keep_their_place():
    shape, tensors, _ = read.read(tiny_file()[1])
    built = model.make(shape, tensors, L=16, layout="aa", skip=(1, 2))
    whole = model.make(shape, tensors, L=16)
    del whole.blocks[1]
    with torch.no_grad():
        empty = whole.empty_memory(1)
        h, _, _ = whole.one_pass(whole.embed(torch.tensor([TEXT])), empty.S, empty.cache)
        close(logits_of(built, TEXT), whole.head(whole.norm(h))[0], 1e-6)


def test_a_sleep_repeats_the_span_alone_and_one_pass_is_the_plain_model():
    shape, tensors, _ = read.read(tiny_file()[1])
    h = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    for recompute in (False, True):
        built = awaken(model.make(shape, tensors, L=16, layout="asasas", span=(2, 5)))
        built.recompute = recompute
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
        whole = model.make(shape, tensors, L=16, layout="asasas")
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
    for algorithm in (built.algorithm_1, functools.partial(sleep.SleepLM.algorithm_1, built)):
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
    gradients = sleep.make_gradients(built, False, False)

    def moved(step):
        before = {name: p.detach().clone() for name, p in built.named_parameters()}
        sleep.set_phase(built, optimizers, settings, step)
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
    with place() as folder:
        out = Path(folder) / "runs"
        status, printed, error = run(facts.main, f"{flags} --out {out}".split())
        assert status == 0, error
        assert "N 2 seed 0" in printed and "accuracy 1:" in printed
        status, printed, error = run(facts.main, f"{flags} --out {out} --resume".split())
        assert status == 0 and "step 4 of 4" in printed, error
        checkpoint = str(out / "N2-seed0.pt")
        status, printed, error = run(demo.main, [str(tiny_file()[1]), "--checkpoint", checkpoint])
        assert status == 0, error
        for words in ("in view, untouched, 3 reads:", "evicted, untouched, 1 read:",
                      "trained; evicted after a sleep of 2 passes, 2 reads:"):
            assert words in printed, printed
        forgotten = re.search(r"\nevicted, untouched\n(.*?)\n\n", printed, re.S)[1]
        checkpoint = str(out / "command.txt")
        status, _, error = run(demo.main, [str(tiny_file()[1]), "--checkpoint", checkpoint])
        assert status == 2 and "checkpoint" in error and error.count("\n") == 1, error
    shape_of_file, tensors, tokenizer = read.read(tiny_file()[1])
    whole = model.make(shape_of_file, tensors, L=64)
    names = re.findall(r"So (\w+) is in", forgotten)
    said = demo.answers(whole, tokenizer, whole.empty_memory(1), [(name, 1, "") for name in names])
    assert len(said) == 6
    for line, text in zip(forgotten.splitlines(), said):
        assert f" is in{text}" in line, (line, text)
    for flags, sentence in (("", "--file is missing"), (f"{shape} --people 7", "multiple"),
                            (f"{shape} --span 3", "two numbers"),
                            (f"{shape} --n_head 2", "--n_head 4"),
                            (f"{shape} --questions 99", "only")):
        status, _, error = run(facts.main, flags.split())
        assert status == 2 and sentence in error and error.count("\n") == 1, error


def test_the_plan_says_flop_that_grow_with_the_passes_and_needs_no_weights():
    with place() as folder:
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
