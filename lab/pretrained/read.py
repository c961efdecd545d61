"""Reads a pretrained model: a GGUF file, or a folder with config.json, tokenizer.json, safetensors.

No package is needed for it. A file is never trusted: every length that it names is compared with
the size of the file before memory is taken for it. What is wrong is said in a sentence (BadInput).

Two families are read: llama (SmolLM2 is one), and ouro, which has four norms in a block. A GGUF of
llama.cpp gets the names and the order of rows that safetensors have, so that one model takes both.

Sources: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md; the safetensors
format, github.com/huggingface/safetensors; byte-level BPE, Radford et al. 2019 (GPT-2).
"""
import functools
import itertools
import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sleep import BadInput


@dataclass(frozen=True)
class Shape:
    """The sizes of a pretrained transformer."""
    family: str                # llama; or ouro, with two more norms a block, and one every pass
    blocks: int
    d_model: int
    heads: int                 # of queries
    kv_heads: int              # of keys and values; each serves heads / kv_heads heads of queries
    d_ff: int                  # width of the MLP
    vocab_size: int
    theta: float               # base of RoPE's wavelengths
    eps: float                 # of the norms
    tied: bool                 # the head is the embedding

    def __post_init__(self):
        for name in ("blocks", "d_model", "heads", "kv_heads", "d_ff", "vocab_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 10 ** 7:
                raise BadInput(f"the file says that {name} is {value!r}, which is no size of a "
                               "model.")
        for name in ("theta", "eps"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < 1e12:
                raise BadInput(f"the file says that {name} is {value!r}; it must be a number above "
                               "0.")
        if self.d_model % (2 * self.heads) or self.heads % self.kv_heads:
            raise BadInput(f"a width of {self.d_model}, {self.heads} heads and {self.kv_heads} "
                           "heads of keys do not divide each other: this model cannot be read.")


def read(path):
    """Path of a GGUF file or of a folder -> Shape, {name: float32 tensor}, Tokenizer."""
    path = Path(path)
    try:
        shape, tensors, tokenizer = read_folder(path) if path.is_dir() else read_gguf(path)
        check_sizes(path, shape, tensors)
        return shape, tensors, tokenizer
    except OSError as e:
        raise BadInput(f"{e.filename or path} cannot be opened ({e.strerror or e}): give a GGUF "
                       "file, or a folder with config.json, tokenizer.json and "
                       "safetensors.") from None


def read_shape(path):
    """As read, but the Shape alone: of a folder only its config.json has to be there."""
    path = Path(path)
    if path.is_dir() and (path / "config.json").exists():
        return shape_of_config(read_json(path / "config.json"))
    return read(path)[0]


def check_sizes(path, shape, tensors):
    """BadInput if the sizes that a file names are not its tensors': before memory is taken."""
    wanted = itertools.chain(
        [("model.embed_tokens.weight", (shape.vocab_size, shape.d_model))],
        ((f"model.layers.{i}.mlp.gate_proj.weight", (shape.d_ff, shape.d_model))
         for i in range(shape.blocks)))
    for name, size in wanted:
        found = tuple(tensors[name].shape) if name in tensors else "missing"
        if found != size:
            raise BadInput(f"{path} contradicts itself: its tensor {name} should be {size} and is "
                           f"{found}.")


class Bytes:
    """The bytes of a file, mapped and not loaded, with a place to read from."""

    def __init__(self, path):
        self.path = path
        empty = path.stat().st_size == 0                       # which cannot be mapped
        self.data = np.zeros(0, np.uint8) if empty else np.memmap(path, np.uint8, "r")
        self.at = 0
        self.loaded = 0        # bytes of tensors

    def slice(self, start, size):
        """`size` bytes from `start` on. BadInput if the file has fewer: then nothing is loaded."""
        if start + size > len(self.data):
            raise BadInput(f"{self.path} is cut off or damaged: it has {len(self.data):,} bytes, "
                           f"and {start + size:,} are needed. Download it again.")
        return self.data[start:start + size]

    def tensor(self, start, size):
        """As slice. BadInput if tensors overlap: then many of them can be larger than the file."""
        raw = self.slice(start, size)
        self.loaded += size
        if self.loaded > len(self.data):
            raise BadInput(f"{self.path} is damaged: it names more tensors than it has bytes.")
        return raw

    def take(self, size):
        taken = self.slice(self.at, size).tobytes()
        self.at += size
        return taken

    def number(self, kind):
        """A little-endian number; kind as in Python's struct."""
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def string(self):
        return self.take(self.number("Q")).decode("utf-8", errors="replace")


# ------------------------------------------------------------------------------------------------
# GGUF: magic, version, counts; metadata; a table of tensors; then, aligned, their data

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?",
           10: "Q", 11: "q", 12: "d"}      # as in Python's struct
STRING, ARRAY = 8, 9
LAYOUTS = {                    # type of a tensor: weights and bytes of one block of it
    0: (1, 4),                 # F32
    1: (1, 2),                 # F16
    3: (32, 20),               # Q4_1
    8: (32, 34),               # Q8_0
}


def read_gguf(path):
    """Path -> Shape, {name: float32 tensor}, Tokenizer."""
    file = Bytes(path)
    if bytes(file.data[:4]) != b"GGUF":
        raise BadInput(f"{path} is no GGUF file: it does not begin with the letters GGUF.")
    file.at = 4
    version = file.number("I")
    if version not in (2, 3):
        raise BadInput(f"{path} is GGUF of version {version}; versions 2 and 3 are read here.")
    n_tensors = file.number("Q")
    n_keys = file.number("Q")
    facts = {}
    for _ in range(n_keys):                # a false count runs into the end of the file
        key = file.string()
        facts[key] = read_value(file, file.number("I"))
    table = []
    for _ in range(n_tensors):
        name = file.string()
        rank = file.number("I")
        if rank > 4:
            raise BadInput(f"{path} is damaged: its tensor {name!r} has {rank} dimensions.")
        shape = [file.number("Q") for _ in range(rank)][::-1]  # the fastest dimension comes first
        table.append((name, shape, file.number("I"), file.number("Q")))
    alignment = facts.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise BadInput(f"{path} is damaged: its alignment is {alignment!r}.")
    start = math.ceil(file.at / alignment) * alignment

    tied = "output.weight" not in {name for name, *_ in table}
    shape = shape_of_gguf(facts, tied)
    tokenizer = tokenizer_of_gguf(facts)
    tensors = {}
    for name, dimensions, kind, offset in table:
        if kind not in LAYOUTS:
            raise BadInput(f"{path}: its tensor {name} is of type {kind}; only F32, F16, Q4_1 and "
                           "Q8_0 (0, 1, 3 and 8) are read here. Take another file of the same "
                           "model.")
        weights, size = LAYOUTS[kind]
        count = math.prod(dimensions)
        if not dimensions or count % weights:
            raise BadInput(f"{path} is damaged: its tensor {name} is {dimensions}, which is no "
                           f"whole number of blocks of {weights}.")
        raw = file.tensor(start + offset, count // weights * size)
        tensor = torch.from_numpy(decode(raw, kind)).view(dimensions)
        name = name_of_gguf(name)
        if ".q_proj." in name:
            tensor = undo_llama_cpp(tensor, shape.heads)
        if ".k_proj." in name:
            tensor = undo_llama_cpp(tensor, shape.kv_heads)
        tensors[name] = tensor
    return shape, tensors, tokenizer


def read_value(file, kind):
    """One value of the metadata, of any type but an array of arrays."""
    if kind == STRING:
        return file.string()
    if kind in NUMBERS:
        return file.number(NUMBERS[kind])
    if kind == ARRAY:
        element = file.number("I")
        count = file.number("Q")
        if element == STRING:
            return [file.string() for _ in range(count)]       # a false count runs into the end
        if element in NUMBERS:
            letter = NUMBERS[element]
            size = struct.calcsize("<" + letter)
            return np.frombuffer(file.take(count * size), "<" + letter).tolist()
    raise BadInput(f"{file.path} is damaged, or newer than this reader: its metadata has a value "
                   f"of type {kind}.")


def decode(raw, kind):
    """Bytes of a tensor -> float32 numbers. Quantized weights come in blocks of 32."""
    weights, size = LAYOUTS[kind]
    if kind in (0, 1):
        return raw.view("<f4" if kind == 0 else "<f2").astype(np.float32)
    blocks = raw.reshape(-1, size)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)            # (n, 1)
    if kind == 8:                          # w = d q: d in float16, then 32 numbers of 8 bits
        return (scale * blocks[:, 2:].view(np.int8)).reshape(-1)
    # w = d q + m: d and m in float16, then 32 numbers of 4 bits. The low halves are the first 16.
    least = blocks[:, 2:4].copy().view("<f2").astype(np.float32)
    q = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], 1)        # (n, 32)
    return (scale * q + least).reshape(-1)


def undo_llama_cpp(weight, heads):
    """llama.cpp rotates neighbouring rows of a head, here RoPE takes i and i + K/2: sort back."""
    if weight.ndim != 2 or len(weight) % (2 * heads):
        raise BadInput(f"this GGUF contradicts itself: {heads} heads do not fit into a matrix "
                       f"{tuple(weight.shape)}.")
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


NAMES = {                      # in a GGUF, and in safetensors
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj"}


def name_of_gguf(name):
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight. Unknown names stay."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if block and block[2] in NAMES:
        return f"model.layers.{block[1]}.{NAMES[block[2]]}.weight"
    stem = name.removesuffix(".weight")
    return f"{NAMES[stem]}.weight" if stem in NAMES else name


def shape_of_gguf(facts, tied):
    family = facts.get("general.architecture")
    if family != "llama":
        raise BadInput(f"this GGUF holds a model of the family {family!r}; only llama is read "
                       "here.")

    def fact(name, default=None):
        value = facts.get(f"llama.{name}", default)
        if value is None:
            raise BadInput(f"this GGUF lacks llama.{name}, without which its model cannot be "
                           "built.")
        return value

    d_model = fact("embedding_length")
    heads = fact("attention.head_count")
    tokens = facts.get("tokenizer.ggml.tokens", [])
    scaling = facts.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise BadInput(f"this model scales its rotary positions ({scaling}), which is not read "
                       "here.")
    shape = Shape("llama", fact("block_count"), d_model, heads,
                  fact("attention.head_count_kv", heads), fact("feed_forward_length"),
                  fact("vocab_size", len(tokens)), fact("rope.freq_base", 10000.0),
                  fact("attention.layer_norm_rms_epsilon"), tied)
    rotated = fact("rope.dimension_count", d_model // heads)
    if rotated != d_model // heads:
        raise BadInput(f"this model rotates {rotated} of the {d_model // heads} numbers of a head; "
                       "only whole heads are read here.")
    return shape


# ------------------------------------------------------------------------------------------------
# A folder: safetensors are the length of a header, the header in json, and raw numbers

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_json(path):
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{path} is no json ({type(e).__name__}).") from None
    if not isinstance(facts, dict):
        raise BadInput(f"{path} should be a json object; it is a {type(facts).__name__}.")
    return facts


def read_folder(folder):
    shape = shape_of_config(read_json(folder / "config.json"))
    tokenizer = tokenizer_of_json(read_json(folder / "tokenizer.json"))
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BadInput(f"{index} has no weight_map.")
        names = sorted({str(name) for name in weight_map.values()})
    tensors = {}
    for name in names:
        if Path(name).name != name:
            raise BadInput(f"{index} names {name!r}, which is not in its folder.")
        tensors |= read_safetensors(folder / name)
    return shape, tensors, tokenizer


def read_safetensors(path):
    """Path -> {name: float32 tensor}."""
    file = Bytes(path)
    length = file.number("Q")
    try:
        header = json.loads(file.take(length))
        header.pop("__metadata__", None)
        table = []
        for name, x in header.items():
            first, end = map(int, x["data_offsets"])
            table.append((name, x["dtype"], [int(n) for n in x["shape"]], first, end))
    except BadInput:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise BadInput(f"{path} is no safetensors file: its header cannot be read "
                       f"({type(e).__name__}).") from None
    tensors = {}
    for name, dtype, shape, first, end in table:
        if dtype not in DTYPES:
            raise BadInput(f"{path}: its tensor {name} is of type {dtype}; only F32, F16 and BF16 "
                           "are read here.")
        size = DTYPES[dtype].itemsize
        if min(shape, default=1) < 1 or first < 0 or end - first != math.prod(shape) * size:
            raise BadInput(f"{path} is damaged: its tensor {name} is {shape} in {end - first} "
                           "bytes.")
        raw = bytearray(file.tensor(8 + length + first, end - first))
        tensors[name] = torch.frombuffer(raw, dtype=DTYPES[dtype]).view(shape).float()
    return tensors


def shape_of_config(config):
    family = config.get("model_type")
    if family not in ("llama", "ouro"):
        raise BadInput(f"config.json describes a model of the family {family!r}; only llama and "
                       "ouro are read here.")
    heads = config.get("num_attention_heads")
    rope = config.get("rope_parameters")                       # its place in newer files
    rope = rope if isinstance(rope, dict) else {}
    scaled = config.get("rope_scaling") or rope.get("rope_type", "default") != "default"
    unknown = {
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(config.get("attention_bias")),
        "mlp_bias": bool(config.get("mlp_bias")),
        "rope_scaling": bool(scaled),
        "use_sliding_window": bool(config.get("use_sliding_window"))}
    for name, is_unknown in unknown.items():
        if is_unknown:
            raise BadInput(f"config.json says {name} {config.get(name)!r}, which is not read here.")
    theta = config.get("rope_theta") or rope.get("rope_theta", 10000.0)
    shape = Shape(family, config.get("num_hidden_layers"), config.get("hidden_size"), heads,
                  config.get("num_key_value_heads") or heads, config.get("intermediate_size"),
                  config.get("vocab_size"), theta, config.get("rms_norm_eps", 1e-6),
                  bool(config.get("tie_word_embeddings")))
    width = config.get("head_dim") or shape.d_model // heads
    if width * heads != shape.d_model:
        raise BadInput(f"config.json says head_dim {width}: {heads} of them are not the width "
                       f"{shape.d_model}, which is not read here.")
    return shape


# ------------------------------------------------------------------------------------------------
# The tokenizer: byte-level BPE

# White space as Unicode has it; Python's \s has four control characters more.
SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
PIECE = re.compile(rf"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^{SPACE}\w]|_)+"
                   rf"|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+")


def letters_of_bytes():
    """GPT-2's letters for the 256 bytes: printable ones stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


LETTERS = letters_of_bytes()
BYTES = {letter: byte for byte, letter in LETTERS.items()}


class Tokenizer:
    """Text <-> tokens. The split of SmolLM2 and Ouro: every digit alone, then the pattern of GPT-2.

    ASCII text gets exactly their tokens. Elsewhere Python's letters and digits differ a little from
    Unicode's, which the pattern means. A byte that has no token is dropped, as they do: SmolLM2
    lacks 21, some control characters among them.
    """

    def __init__(self, tokens, merges, special):
        """tokens: {text: number}; merges: pairs of texts, the first come first; special: texts."""
        self.numbers = tokens
        self.texts = {number: text for text, number in tokens.items()}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.special = set(special)
        longest_first = sorted(special, key=len, reverse=True)
        self.split_special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self.encode_piece = functools.lru_cache(100_000)(self.merge)

    def encode(self, text):
        """Text -> list of token numbers. Special tokens may stand in it, as <|im_start|>."""
        numbers = []
        for part in self.split_special.split(text) if self.special else [text]:
            if part in self.special:
                numbers.append(self.numbers[part])
                continue
            for piece in re.split(r"(\d)", part):
                for word in PIECE.findall(piece):
                    numbers += self.encode_piece(word)
        return numbers

    def merge(self, word):
        """A word -> its tokens: of all neighbours that may merge, the pair of least rank does."""
        parts = [LETTERS[byte] for byte in word.encode("utf-8", errors="surrogatepass")]
        parts = [part for part in parts if part in self.numbers]
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:]))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, math.inf))
            if best not in self.ranks:
                break
            merged = []
            for part in parts:
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            parts = merged
        return tuple(self.numbers[part] for part in parts)

    def decode(self, numbers):
        """Token numbers -> text. Bytes that are no UTF-8 become U+FFFD."""
        raw = bytearray()
        for number in numbers:
            text = self.texts.get(int(number), "")
            if text in self.special:
                raw += text.encode()
            else:
                raw += bytes(BYTES[letter] for letter in text)
        return raw.decode("utf-8", errors="replace")


def make_tokenizer(tokens, merges, special):
    """As Tokenizer, after a check that the parts fit together."""
    missing = [chr(byte) for byte in range(33, 127) if chr(byte) not in tokens]
    if missing:
        raise BadInput(f"this tokenizer has no token for {missing[0]!r}: it is no byte-level BPE, "
                       "the only one that is read here.")
    if not all(isinstance(number, int) and number >= 0 for number in tokens.values()):
        raise BadInput("this tokenizer is damaged: the number of a token is none.")
    for first, second in merges:
        if first not in tokens or second not in tokens or first + second not in tokens:
            raise BadInput(f"this tokenizer is damaged: it merges {first!r} and {second!r}, and "
                           "one of them or their sum is no token.")
    return Tokenizer(tokens, merges, special)


def tokenizer_of_gguf(facts):
    kind = (facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise BadInput(f"this GGUF has the tokenizer {kind[0]!r} with the split {kind[1]!r}; only "
                       "'gpt2' with 'smollm' is read here.")
    texts = facts.get("tokenizer.ggml.tokens")
    types = facts.get("tokenizer.ggml.token_type")
    merges = facts.get("tokenizer.ggml.merges")
    fits = isinstance(texts, list) and isinstance(types, list) and isinstance(merges, list)
    fits = fits and len(texts) == len(types)
    if not fits or not all(isinstance(text, str) for text in texts + merges):
        raise BadInput("the tokenizer of this GGUF is damaged: tokens, their types and merges do "
                       "not fit.")
    control = 3
    special = [text for text, kind in zip(texts, types) if kind == control]
    tokens = {text: number for number, text in enumerate(texts)}
    return make_tokenizer(tokens, split_merges(merges), special)


def tokenizer_of_json(facts):
    try:
        model = facts["model"]
        steps = facts["pre_tokenizer"]["pretokenizers"]
        steps = [(step["type"], step.get("individual_digits"), step.get("add_prefix_space"))
                 for step in steps]
        known = steps == [("Digits", True, None), ("ByteLevel", None, False)]
        if model["type"] != "BPE" or not known or facts.get("normalizer"):
            raise BadInput(f"tokenizer.json has the tokenizer {model['type']!r} with the split "
                           f"{steps}; only byte-level BPE with single digits is read here.")
        tokens = dict(model["vocab"])
        special = [token["content"] for token in facts.get("added_tokens", [])]
        tokens |= {token["content"]: token["id"] for token in facts.get("added_tokens", [])}
        return make_tokenizer(tokens, split_merges(model["merges"]), special)
    except BadInput:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise BadInput(f"tokenizer.json is no tokenizer that is read here: {type(e).__name__} "
                       f"{e}.") from None


def split_merges(merges):
    """'a b' or ['a', 'b'] -> ('a', 'b'), for each."""
    pairs = []
    for merge in merges:
        pairs.append(tuple(merge.split(" ") if isinstance(merge, str) else merge))
    if any(len(pair) != 2 for pair in pairs):
        raise BadInput("the tokenizer is damaged: a merge is not of two parts.")
    return pairs
