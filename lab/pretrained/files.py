"""What the readers of files share: the sizes of a model, and the bytes of a file.

A file is never trusted: every length that it names is compared with the size of the file before
memory is taken for it. What is wrong is said in a sentence (BadInput).
"""
import struct
from dataclasses import dataclass

import numpy as np

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
