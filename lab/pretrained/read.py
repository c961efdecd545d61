"""Reads a pretrained model: a GGUF file, or a folder with config.json, tokenizer.json, safetensors.

No package is needed for it. Two families are read: llama (SmolLM2 is one), and ouro, which has four
norms in a block.
"""
import itertools
from pathlib import Path

from lab.pretrained import folder, gguf
from sleep import BadInput


def read(path):
    """Path of a GGUF file or of a folder -> Shape, {name: float32 tensor}, Tokenizer."""
    path = Path(path)
    try:
        shape, tensors, tokenizer = folder.read(path) if path.is_dir() else gguf.read(path)
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
        return folder.shape_of_config(folder.read_json(path / "config.json"))
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
