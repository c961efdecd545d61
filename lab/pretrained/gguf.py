"""Reads a GGUF file: magic, version, counts; metadata; a table of tensors; then, aligned, their data.

A GGUF of llama.cpp gets the names and the order of rows that safetensors have, so that one model
takes both. Source: the specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""
import math
import re
import struct

import numpy as np
import torch

from lab.pretrained import tokenizer
from lab.pretrained.files import Bytes, Shape
from sleep import BadInput

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?",
           10: "Q", 11: "q", 12: "d"}      # as in Python's struct
STRING, ARRAY = 8, 9
LAYOUTS = {                    # type of a tensor: weights and bytes of one block of it
    0: (1, 4),                 # F32
    1: (1, 2),                 # F16
    3: (32, 20),               # Q4_1
    8: (32, 34),               # Q8_0
}


def read(path):
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
    its_tokenizer = tokenizer.of_gguf(facts)
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
    return shape, tensors, its_tokenizer


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
