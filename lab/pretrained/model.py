"""A pretrained transformer that sleeps: its blocks, inserted SSM blocks, and a loop.

What is sleep.py's as it is: attention, the SSM mixer with its convolution, the fast-weight rule,
the memory, eviction, streaming, training. Where a pretrained model differs:
  grouped heads   fewer heads of keys and values than of queries: each serves several (Grouped).
  RoPE            the same rotation with the file's own base.
  MLP             SwiGLU: silu(gate(x)) * up(x), not squared ReLU.
  Ouro            a norm after attention and after the MLP, too: four a block; and the last norm
                  closes every pass, so the next one starts from normed features.
  inserted SSM    no MLP (Section 6.3). Their output projection starts at 0: a new one adds nothing.
  the loop        all blocks, or a span of them: the blocks before it are read once, those in it N
                  times, those after it once (Section 6.3: the middle 14 of 28 of Jet-Nemotron).

Embedding, last norm and head keep their weights: our choice. A warm-up (Section 6.4) therefore
trains the inserted blocks alone, with hard eviction; after it all blocks learn.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

import sleep
from sleep import BadInput, Cache


class Grouped(nn.Linear):
    """Keys or values of few heads, repeated for the heads of queries that they serve."""

    def __init__(self, shape):
        self_width = shape.d_model // shape.heads * shape.kv_heads
        super().__init__(shape.d_model, self_width, bias=False)
        self.kv_heads = shape.kv_heads
        self.times = shape.heads // shape.kv_heads

    def forward(self, x):
        """(B, T, d) -> (B, T, d)"""
        x = super().forward(x).unflatten(-1, (self.kv_heads, -1))
        return x.repeat_interleave(self.times, 2).flatten(2)


class PretrainedAttention(sleep.Attention):
    """sleep.Attention with grouped heads and the file's base of RoPE.

    The cache holds repeated keys: simple, and larger than it must be.
    """

    def __init__(self, cfg, shape):
        super().__init__(cfg)
        self.k = Grouped(shape)
        self.v = Grouped(shape)
        K = shape.d_model // shape.heads
        frequencies = shape.theta ** (-torch.arange(0, K, 2) / K)
        angle = torch.outer(torch.arange(2.0 * cfg.L), frequencies)        # (2 L, K / 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)


class PretrainedBlock(nn.Module):
    """Attention and SwiGLU; in Ouro with a norm after each, too."""
    kind = "a"

    def __init__(self, cfg, shape):
        super().__init__()
        d = shape.d_model
        ouro = shape.family == "ouro"
        self.norm1 = nn.RMSNorm(d, eps=shape.eps)
        self.mixer = PretrainedAttention(cfg, shape)
        self.after1 = nn.RMSNorm(d, eps=shape.eps) if ouro else nn.Identity()
        self.norm2 = nn.RMSNorm(d, eps=shape.eps)
        self.gate = nn.Linear(d, shape.d_ff, bias=False)
        self.up = nn.Linear(d, shape.d_ff, bias=False)
        self.down = nn.Linear(shape.d_ff, d, bias=False)
        self.after2 = nn.RMSNorm(d, eps=shape.eps) if ouro else nn.Identity()

    def forward(self, h, S, cache):
        """As sleep.Block: h (B, T, d), no S, and the Cache -> h, S, the cache with these tokens."""
        tail, keys, values = cache
        x, keys, values = self.mixer(self.norm1(h), keys, values)
        h = h + self.after1(x)
        x = self.norm2(h)
        x = self.down(F.silu(self.gate(x)) * self.up(x))
        h = h + self.after2(x)
        return h, S, Cache(tail, keys, values)


class InsertedBlock(nn.Module):
    """Fast weights behind a norm and a short convolution, in a residual. It has no MLP."""
    kind = "s"

    def __init__(self, cfg):
        super().__init__()
        self.norm1 = nn.RMSNorm(cfg.d_model)
        self.conv = sleep.ShortConv(cfg.d_model) if "s" in cfg.conv else None
        self.mixer = sleep.UPDATE_RULES[cfg.update_rule](cfg)

    def forward(self, h, S, cache):
        """As sleep.Block: h (B, T, d), S (B, H, V, K) and the Cache -> all three, updated."""
        tail, keys, values = cache
        x = self.norm1(h)
        if self.conv is not None:
            x, tail = self.conv(x, tail)
        x, S = self.mixer(x, S)
        return h + x, S, Cache(tail, keys, values)


class PretrainedLM(sleep.SleepLM):
    """Blocks of a file (a) and inserted ones (s), in the order of cfg.layout.

    cfg: a sleep.Config, whose layout has a letter a for every block that is taken from the file.
    span: (first, end), the part of the layout that a sleep repeats; None is all of it.
    skip: (first, end), the blocks of the file that are left out; None is none.
    BadInput if they do not fit the file.
    """

    def __init__(self, cfg, shape, span=None, skip=None):
        nn.Module.__init__(self)           # not SleepLM's, which makes its own blocks
        check(cfg, shape, span, skip)
        self.taken = [i for i in range(shape.blocks) if skip is None or i not in range(*skip)]
        self.cfg = cfg
        self.shape = shape
        self.span = span or (0, len(cfg.layout))
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        blocks = [PretrainedBlock(cfg, shape) if kind == "a" else InsertedBlock(cfg)
                  for kind in cfg.layout]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(cfg.d_model, eps=shape.eps)
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        if shape.tied:
            self.head.weight = self.embed.weight
        for part in (self.embed, self.norm, self.head):
            part.requires_grad_(False)
        self.initialize()

    def initialize(self):
        """Inserted blocks as in sleep.py, but for their output projection: 0."""
        for block in self.blocks:
            if block.kind == "s":
                for module in block.modules():
                    if isinstance(module, nn.Linear):
                        nn.init.normal_(module.weight, std=module.in_features ** -0.5)
                    elif isinstance(module, sleep.ShortConv):
                        nn.init.normal_(module.weight, std=0.5)
                nn.init.zeros_(block.mixer.o.weight)

    def load_pretrained(self, tensors):
        """Copy the tensors of the file into the model. BadInput if one is missing, or is not known.

        Blocks of the file that are skipped are left out, and so is Ouro's exit gate.
        """
        targets = self.names()
        missing = sorted(set(targets) - set(tensors))
        unused = set(tensors) - set(targets)
        skipped = set(range(self.shape.blocks)) - set(self.taken)
        skipped = tuple(f"model.layers.{i}." for i in skipped)
        gate = ("model.early_exit_gate.",) if self.shape.family == "ouro" else ()
        head = ("lm_head.",) if self.shape.tied else ()        # a second copy of the embedding
        unknown = sorted(name for name in unused if not name.startswith(skipped + gate + head))
        for words, names in (("lacks", missing), ("has, not known here,", unknown)):
            if names:
                raise BadInput(f"the file {words} {names[0]} (of {len(names)}): it is no model of "
                               f"the family {self.shape.family} as it is read here.")
        for name, parameter in targets.items():
            if parameter.shape != tensors[name].shape:
                raise BadInput(f"{name} is {tuple(tensors[name].shape)} in the file and should be "
                               f"{tuple(parameter.shape)}: the file contradicts itself.")
            parameter.data.copy_(tensors[name])

    def names(self):
        """{name in the file: parameter of this model}, of all that the file must hold."""
        names = {"model.embed_tokens.weight": self.embed.weight,
                 "model.norm.weight": self.norm.weight}
        if not self.shape.tied:
            names["lm_head.weight"] = self.head.weight
        pretrained = [block for block in self.blocks if block.kind == "a"]
        for i, block in zip(self.taken, pretrained, strict=True):
            parts = {"self_attn.q_proj": block.mixer.q, "self_attn.k_proj": block.mixer.k,
                     "self_attn.v_proj": block.mixer.v, "self_attn.o_proj": block.mixer.o,
                     "mlp.gate_proj": block.gate, "mlp.up_proj": block.up,
                     "mlp.down_proj": block.down, "input_layernorm": block.norm1,
                     "post_attention_layernorm": block.norm2}
            if self.shape.family == "ouro":
                parts["input_layernorm_2"] = block.after1
                parts["post_attention_layernorm_2"] = block.after2
            for name, module in parts.items():
                names[f"model.layers.{i}.{name}.weight"] = module.weight
        return names

    # The passes: as in SleepLM, but for a part of the blocks

    def one_pass(self, h, S, cache, part=slice(None)):
        S = list(S)
        cache = list(cache)
        with torch.autocast(h.device.type, torch.bfloat16, self.cfg.bf16, cache_enabled=False):
            for i in range(len(self.blocks))[part]:
                h, S[i], cache[i] = self.blocks[i](h, S[i], cache[i])
        return h, S, cache

    def sleep(self, h, memory, N=None):
        """SleepLM.sleep, with the span repeated: N = 1 reads every block once, as a plain model."""
        N = self.cfg.N if N is None else sleep.whole_number("N", N, 0)
        sleep.check_window(h, memory, self.cfg, asleep=True)
        if N == 0:
            return self.evict(memory)
        first, end = self.span
        h, S, before = self.one_pass(h, memory.S, memory.cache, slice(0, first))
        for _ in range(N):
            h, S, cache = self.one_pass(h, S, before, slice(first, end))
            if self.shape.family == "ouro":
                h = self.norm(h)
        h, S, cache = self.one_pass(h, S, cache, slice(end, None))
        return self.evict(sleep.Memory(S, cache, 0))

    def wake_features(self, h, memory):
        """`wake` without the head: normed features (B, T, d) and the memory."""
        sleep.check_window(h, memory, self.cfg)
        h_out, S, cache = self.one_pass(h, memory.S, memory.cache)
        return self.norm(h_out), sleep.Memory(S, cache, memory.n_awake + h.shape[1])

    def algorithm_1(self, tokens, targets, asleep, N=None):
        """SleepLM.algorithm_1, but only positions with a target get logits: a head of 49,152 tokens
        at all positions would cost more than some blocks. The others are 0.
        """
        B, M = targets.shape
        windows = tokens.split(self.cfg.L, dim=1)
        features = []
        memory = self.empty_memory(B)
        for window, window_sleeps in zip(windows, asleep, strict=True):
            h = self.embed(window)
            if window_sleeps:
                memory = self.sleep(h, memory, N)
                features.append(torch.zeros_like(h))
            else:
                window_features, memory = self.wake_features(h, memory)
                features.append(window_features)
                memory = self.evict(memory)
        features = torch.cat(features, 1)[:, -M:]              # (B, M, d)
        asked = targets >= 0                                   # (B, M)
        said = self.head(features[asked])                      # (number of targets, vocab)
        loss = F.cross_entropy(said, targets[asked].long())
        logits = said.new_zeros(B, M, self.cfg.vocab_size)
        logits[asked] = said.detach()
        return logits, loss


def check(cfg, shape, span, skip):
    wanted = dict(d_model=shape.d_model, n_head=shape.heads, vocab_size=shape.vocab_size)
    for name, value in wanted.items():
        if getattr(cfg, name) != value:
            raise BadInput(f"the model of this file has {name} {value}, not {getattr(cfg, name)}: "
                           f"take --{name} {value}.")
    for name, part, whole in (("span", span, len(cfg.layout)), ("skip", skip, shape.blocks)):
        if part is not None and not 0 <= part[0] < part[1] <= whole:
            raise BadInput(f"--{name} {part[0]}:{part[1]} must be a part of the {whole} blocks.")
    taken = shape.blocks - (skip[1] - skip[0] if skip else 0)
    if cfg.layout.count("a") != taken:
        raise BadInput(f"the layout {cfg.layout} has {cfg.layout.count('a')} letters a, and "
                       f"{taken} blocks of the {shape.blocks} of the file are taken: change "
                       "--layout or --skip.")
    if "a" in cfg.conv:
        raise BadInput(f"conv {cfg.conv!r}: pretrained attention has no convolution in front. Take "
                       "s.")


def make(shape, tensors, L, layout=None, T=None, span=None, skip=None, **values):
    """Shape and tensors of a file -> the model. layout None: all its blocks, and no inserted one.

    values: further fields of sleep.Config.
    """
    layout = layout or "a" * shape.blocks
    values = dict(conv="s") | values
    cfg = sleep.Config(shape.vocab_size, T or L, L, layout=layout, d_model=shape.d_model,
                       n_head=shape.heads, **values)
    model = PretrainedLM(cfg, shape, span, skip)
    model.load_pretrained(tensors)
    return model
