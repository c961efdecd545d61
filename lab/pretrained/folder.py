"""Reads a folder with config.json, tokenizer.json and safetensors.

A file of safetensors is the length of a header, the header in json, and raw numbers. Source:
github.com/huggingface/safetensors.
"""
import json
import math
from pathlib import Path

import torch

from lab.pretrained import tokenizer
from lab.pretrained.files import Bytes, Shape
from sleep import BadInput

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_json(path):
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{path} is no json ({type(e).__name__}).") from None
    if not isinstance(facts, dict):
        raise BadInput(f"{path} should be a json object; it is a {type(facts).__name__}.")
    return facts


def read(folder):
    """Path -> Shape, {name: float32 tensor}, Tokenizer."""
    shape = shape_of_config(read_json(folder / "config.json"))
    its_tokenizer = tokenizer.of_json(read_json(folder / "tokenizer.json"))
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
    return shape, tensors, its_tokenizer


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
