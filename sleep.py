"""sleep.py: language models that sleep, in one file.

"Do Language Models Need Sleep? Offline Recurrence for Improved Online Inference", Lee, McLeish,
Goldstein, Fanti, arXiv 2605.26099. Sections, equations and lines are those of version 3.

Attention sees a window of L tokens. SSM blocks (state-space models) carry fast weights S: a matrix
that maps keys to values and is written token by token. When the window is full the model sleeps: N
passes over the window through the blocks, h and S carried from pass to pass. Then the window is
evicted and only S remains (hard eviction). An answer takes one pass, whatever N is; in training, so
does every window with a target. N = 1 is the plain hybrid.

  name       paper      meaning                                          shape
  tokens     x, c       B sequences of T; a window is the paper's chunk  (B, T)
  h          h          features, one vector of width d per token        (B, T, d)
  q k v      q k v      query, key, value, H heads of K = V = d / H      (B, H, T, K)
  alpha      alpha_t    how much of S a token keeps, as log_alpha <= 0   (B, H, T)
  beta       beta_t     how strongly a token is written, in (0, 1)       (B, H, T)
  S          S_t        fast weights: S k ~ v                            (B, H, V, K)
  L, N       L, N       window length; passes of a sleep

Read down to the line "The method ends here". `python sleep.py` shows a trained model asleep.
"""
import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------
# The fast-weight rule

def gated_delta_rule(q, k, v, log_alpha, beta, S, delta=True):
    """One token after another: the definition, against which the chunked form is tested.

        S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,    o_t = S_t q_t

    Eq. 3 is the gated Hebbian write, S_t = alpha_t S_{t-1} + beta_t v_t k_t^T: delta=False. Gated
    DeltaNet, used in the experiments, writes v_t - alpha_t S_{t-1} k_t, what S lacks, in its place.
    Shapes as in the glossary, else ValueError. Returns o (B, H, T, V) and the last S.
    """
    check_shapes(q, k, v, log_alpha, beta, S)
    outputs = []
    for q_t, k_t, v_t, log_alpha_t, beta_t in zip(q.unbind(2), k.unbind(2), v.unbind(2),
                                                  log_alpha.unbind(2), beta.unbind(2)):
        S = log_alpha_t.exp()[..., None, None] * S                             # forget
        if delta:
            v_t = v_t - (S @ k_t[..., None]).squeeze(-1)                       # what S lacks at k_t
        S = S + (beta_t[..., None] * v_t)[..., None] * k_t[..., None, :]       # write
        outputs.append((S @ q_t[..., None]).squeeze(-1))                       # read
    return torch.stack(outputs, 2), S


def gated_delta_rule_chunked(q, k, v, log_alpha, beta, S, delta=True, chunk=64):
    """`gated_delta_rule`, up to rounding, as matrix products over chunks of `chunk` tokens.

    Unrolled inside a chunk, token i writes u_i and reads o_i,
        u_i = beta_i (v_i - e^{c_i} S k_i - sum_{j<i} e^{c_i - c_j} (k_i . k_j) u_j)
        o_i = e^{c_i} S q_i + sum_{j<=i} e^{c_i - c_j} (q_i . k_j) u_j
    with c the running sum of log_alpha and S the state before the chunk: the first line is a
    triangular system (u_i = beta_i v_i without delta). D_ij = e^{c_i - c_j}, masked before exp:
    every exponent that the mask leaves is <= 0, so nothing overflows.
    """
    check_shapes(q, k, v, log_alpha, beta, S)
    outputs = []
    for q, k, v, log_alpha, beta in zip(*(x.split(chunk, 2) for x in (q, k, v, log_alpha, beta))):
        c = log_alpha.clamp(min=-100).cumsum(-1)           # (B, H, C); -inf - (-inf) would be nan
        D = c[..., :, None] - c[..., None, :]                                  # (B, H, C, C)
        D = D.masked_fill(torch.ones_like(D).triu(1) > 0, -torch.inf).exp()    # 0 for the future
        kept, beta = c.exp()[..., None], beta[..., None]   # share of S kept so far (B, H, C, 1)
        u = beta * v                                                           # (B, H, C, V)
        if delta:      # solve (I + A) u = beta (v - kept S k); unitriangular supplies I
            A = (beta * (k @ k.mT) * D).tril(-1)                               # (B, H, C, C)
            u = torch.linalg.solve_triangular(A, u - beta * kept * (k @ S.mT), upper=False,
                                              unitriangular=True)
        outputs.append(kept * (q @ S.mT) + ((q @ k.mT) * D) @ u)
        S = kept[..., -1:, :] * S + u.mT @ ((c[..., -1:] - c).exp()[..., None] * k)
    return torch.cat(outputs, 2), S


def check_shapes(q, k, v, log_alpha, beta, S):
    BHT, K, V = q.shape[:-1], q.shape[-1], v.shape[-1]
    wanted = [(*BHT, K), (*BHT, K), (*BHT, V), BHT, BHT, (*BHT[:-1], V, K)]
    if (shapes := [x.shape for x in (q, k, v, log_alpha, beta, S)]) != wanted:
        raise ValueError("q, k, v, log_alpha, beta, S must be (B, H, T, K) twice, (B, H, T, V), "
                         f"(B, H, T) twice and (B, H, V, K), not {[*map(tuple, shapes)]}.")


# ------------------------------------------------------------------------------------------------
# Layers

@dataclass
class Config:
    """A model. ValueError says in one sentence what does not fit."""
    vocab_size: int
    T: int                         # tokens of a sequence: sets the longest half-life, not a limit
    L: int                         # window of attention, in tokens
    N: int = 1                     # passes of a sleep, where a call does not say otherwise
    layout: str = "asas"           # one letter per block: a = attention, s = SSM (fast weights)
    d_model: int = 256
    n_head: int = 4
    eviction: str = "hard"         # "hard": nothing but S survives; "sliding": also L - 1 tokens
    loop: tuple = ()               # (first, stop) of the looped blocks; (): all (Section 6.3)
    update_rule: str = "gated_delta"   # one of UPDATE_RULES
    conv: str = "as"               # blocks with a short convolution in front; the paper: "s" only

    def __post_init__(self):
        D, H, sizes = len(self.layout), self.n_head, "vocab_size T L N d_model n_head".split()
        self.loop = tuple(self.loop) or (0, D)
        for name, must, fits in (
                *((x, "an integer >= 1", lambda x: isinstance(x, int) and x >= 1) for x in sizes),
                ("layout", "made of the letters a and s", lambda x: x and set(x) <= set("as")),
                ("d_model", f"a multiple of 2 * n_head = {2 * H}", lambda x: x % (2 * H) == 0),
                ("eviction", "hard or sliding", lambda x: x in ("hard", "sliding")),
                ("loop", f"(first, stop) with 0 <= first < stop <= {D}",
                 lambda x: len(x) == 2 and 0 <= x[0] < x[1] <= D),
                ("update_rule", "one of " + ", ".join(UPDATE_RULES), lambda x: x in UPDATE_RULES),
                ("conv", "'', a, s or as", lambda x: set(x) <= set("as"))):
            if not fits(value := getattr(self, name)):
                raise ValueError(f"{name} {value!r} must be {must}.")


class Memory(NamedTuple):
    """All that a model knows of the past; passed in and returned, never kept in the module."""
    S: list          # one per block: fast weights (B, H, V, K), or None for attention
    cache: list      # one per block: (conv tail (B, n, d), keys, values (B, H, m, K)); SSM: tail
    awake: int       # tokens read since the last eviction; a window has room for L


def latest(x, n):
    """The last n tokens of x (..., T, d), fewer if there are not as many; the rest can be freed."""
    if n == 0:
        return x.new_zeros(*x.shape[:-2], 0, x.shape[-1])      # a slice would keep x's graph
    return x[..., max(x.shape[-2] - n, 0):, :].clone()


class Embed(nn.Embedding):
    """Tokens (B, T), integers of any type -> h (B, T, d). ValueError if they are not."""

    def forward(self, tokens):
        fit = tokens.ndim == 2 and tokens.numel() and not tokens.is_floating_point()
        if fit and tokens.device.type == "cpu":        # on a GPU it would wait for the device
            fit = 0 <= tokens.min() and tokens.max() < len(self.weight)
        if not fit:
            raise ValueError(f"tokens must be (B, T) integers from 0 to {len(self.weight) - 1}, at "
                             f"least one; these are {tokens.dtype}, {tuple(tokens.shape)}.")
        return super().forward(tokens.long())


class ShortConv(nn.Module):
    """x_t + sum_j w_j * x_{t-j}: a causal depthwise convolution over a few tokens."""

    def __init__(self, d, taps=4):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(taps, d))

    def forward(self, x, tail):
        """x (B, T, d) and the tokens before it, tail (B, n, d) -> (B, T, d), the new tail."""
        taps, T = len(self.weight), x.shape[1]
        known = torch.cat([tail, x], 1)
        padded = F.pad(known, (0, 0, taps - 1 - tail.shape[1], 0))     # (B, taps - 1 + T, d)
        for j in range(taps):
            x = x + self.weight[j] * padded[:, taps - 1 - j: taps - 1 - j + T]
        return x, latest(known, taps - 1)


def rope(x, cos, sin):
    """Rotary positions for x (B, H, T, K); cos, sin (T, K / 2)."""
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).to(x.dtype)


class Attention(nn.Module):
    """Softmax attention (Eq. 1-2): a token sees itself and at most the L - 1 before it."""

    def __init__(self, cfg):
        super().__init__()
        d, self.H, self.L = cfg.d_model, cfg.n_head, cfg.L
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        K = d // self.H
        # Keys are cached unrotated and rotated in every call: scores depend on distances only, so
        # positions count from the oldest cached token: at most L - 1 kept ones and L of the window.
        angle = torch.outer(torch.arange(2. * self.L), 10000 ** (-torch.arange(0, K, 2) / K))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x, k_past, v_past):
        """x (B, T, d); k_past, v_past (B, H, P, K) -> (B, T, d), k and v (B, H, P + T, K)."""
        T = x.shape[1]
        q, k, v = (w(x).unflatten(-1, (self.H, -1)).transpose(1, 2)
                   for w in (self.q, self.k, self.v))                          # (B, H, T, K)
        if P := k_past.shape[2]:
            k, v = torch.cat([k_past, k], 2), torch.cat([v_past, v], 2)
            i = torch.arange(P + T, device=x.device)
            distance = i[P:, None] - i
            mask = (distance >= 0) & (distance < self.L)                       # (T, P + T)
        q_rot = rope(q, self.cos[P:P + T], self.sin[P:P + T])
        k_rot = rope(k, self.cos[:P + T], self.sin[:P + T])
        o = F.scaled_dot_product_attention(q_rot, k_rot, v, attn_mask=mask if P else None,
                                           is_causal=not P)    # without a past T <= L
        return self.o(o.transpose(1, 2).flatten(2)), k, v


class FastWeights(nn.Module):
    """The mixer of SSM blocks: Gated DeltaNet (with one convolution, in Block, not three)."""

    def __init__(self, cfg, gated=True, delta=True):
        super().__init__()
        d, self.H, self.gated, self.delta = cfg.d_model, cfg.n_head, gated, delta
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.z = nn.Linear(d, d, bias=False)                                   # output gate
        self.ab = nn.Linear(d, 2 * self.H, bias=False)                         # alpha and beta
        # log_alpha = -e^A_log softplus(a + dt_bias), in Mamba's names. At first S halves, at a = 0,
        # in log 2 / softplus(dt_bias) tokens. The paper does not say: the half-lives. Here they are
        # log-spaced over the heads, from max(N, 4) * T tokens (one head has this) down to 4.
        longest = max(cfg.N, 4) * cfg.T
        half_life = torch.logspace(math.log10(longest), math.log10(4), self.H)
        self.dt_bias = nn.Parameter(torch.log(torch.expm1(math.log(2) / half_life)))
        self.A_log = nn.Parameter(torch.zeros(self.H))
        self.norm = nn.RMSNorm(d // self.H, eps=1e-5)

    def write_and_read(self, x, q, k, v, S):
        """The gated delta rule and its gates -> o (B, H, T, V), the new S."""
        a, b = self.ab(x).transpose(1, 2).chunk(2, 1)                          # (B, H, T)
        beta = b.sigmoid()
        log_alpha = -self.A_log.exp()[:, None] * F.softplus(a + self.dt_bias[:, None])
        log_alpha = log_alpha * self.gated             # not gated: alpha = 1
        rule = gated_delta_rule if x.shape[1] == 1 else gated_delta_rule_chunked
        return rule(q, k, v, log_alpha, beta, S, self.delta)

    def forward(self, x, S):
        """x (B, T, d), S (B, H, V, K) -> (B, T, d), the new S."""
        q, k, v = (F.silu(w(x)).unflatten(-1, (self.H, -1)).transpose(1, 2)
                   for w in (self.q, self.k, self.v))                          # (B, H, T, K)
        with torch.autocast(x.device.type, enabled=False):                     # float32 from here
            q, k, v = (y.to(S.dtype) for y in (q, k, v))
            # For keys of length 1, I - beta k k^T lengthens no vector.
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            o, S = self.write_and_read(x.to(S.dtype), q, k, v, S)
            o = self.norm(o).transpose(1, 2).flatten(2)                        # (B, T, d)
        return self.o(o * F.silu(self.z(x))), S


UPDATE_RULES = {                           # one of your own: a subclass, and its name in here
    "gated_delta": FastWeights,
    "delta": partial(FastWeights, gated=False),
    "gated_hebbian": partial(FastWeights, delta=False),                        # Eq. 3
    "hebbian": partial(FastWeights, gated=False, delta=False),
}


class Block(nn.Module):
    """Eq. 4-5: mixer and MLP, each behind a norm and inside a residual."""

    def __init__(self, kind, cfg):
        super().__init__()
        d, self.kind = cfg.d_model, kind
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.conv = ShortConv(d) if kind in cfg.conv else None
        self.mixer = Attention(cfg) if kind == "a" else UPDATE_RULES[cfg.update_rule](cfg)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, h, S, cache):
        """h (B, T, d), this block's S and cache (see Memory) -> h, S, cache with these tokens."""
        tail, *kv = cache                  # kv: [keys, values]; [] for SSM
        x = self.norm1(h)
        if self.conv is not None:
            x, tail = self.conv(x, tail)
        if self.kind == "a":
            x, *kv = self.mixer(x, *kv)
        else:
            x, S = self.mixer(x, S)
        h = h + x
        h = h + self.down(F.relu(self.up(self.norm2(h))).square())
        return h, S, (tail, *kv)


# ------------------------------------------------------------------------------------------------
# The model: sleep, evict, wake

class SleepLM(nn.Module):
    """A looped hybrid (Eq. 6) that sleeps before it forgets (Section 5)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed = Embed(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.ModuleList(Block(kind, cfg) for kind in cfg.layout)
        self.norm = nn.RMSNorm(cfg.d_model)
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)         # OutProj
        self.bf16 = False                  # autocast matrix products of the blocks to bfloat16
        nn.init.normal_(self.embed.weight)
        nn.init.zeros_(self.head.weight)
        for m in self.blocks.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=m.in_features ** -0.5)
            elif isinstance(m, ShortConv):
                nn.init.normal_(m.weight, std=0.5)

    def empty_memory(self, B):
        """S = 0 (Algorithm 1, line 1) and an empty cache for B sequences."""
        cfg, zeros = self.cfg, self.embed.weight.new_zeros
        H, K = cfg.n_head, cfg.d_model // cfg.n_head
        S = [zeros(B, H, K, K) if kind == "s" else None for kind in cfg.layout]
        bf16 = dict(dtype=torch.bfloat16) if self.bf16 else {}
        cache = [(zeros(B, 0, cfg.d_model),) if kind == "s" else
                 (zeros(B, 0, cfg.d_model), zeros(B, H, 0, K, **bf16), zeros(B, H, 0, K, **bf16))
                 for kind in cfg.layout]
        return Memory(S, cache, 0)

    def one_pass(self, h, S, cache, first, stop):
        """h, S <- Blocks(h, S), blocks first to stop - 1; also their caches with h's tokens."""
        S, cache = list(S), list(cache)
        with torch.autocast(h.device.type, torch.bfloat16, enabled=self.bf16):
            for i in range(first, stop):
                h, S[i], cache[i] = self.blocks[i](h, S[i], cache[i])
        return h, S, cache

    def sleep(self, h, memory, N=None):
        """N passes over a window, then eviction (Algorithm 1, lines 6-7). N = 0: evicted unread.

        h (B, T <= L, d): embeddings of the window. Every pass reads the same memory.cache (empty
        under hard eviction); h and S go from pass to pass. Returns the memory after eviction.
        """
        self.check(h, memory, asleep=True)
        N, S, cache = (self.cfg.N if N is None else N), memory.S, list(memory.cache)
        if not isinstance(N, int) or N < 0:
            raise ValueError(f"N must be an integer >= 0, the passes of a sleep, not {N}.")
        for n in range(N):                                                     # line 6
            first, stop = self.blocks_of(n, N)         # all blocks, unless cfg.loop names some
            h, S, grown = self.one_pass(h, S, memory.cache, first, stop)       # line 7
            cache[first:stop] = grown[first:stop]      # a block's last cache, for sliding eviction
        return self.evict(Memory(S, cache, 0))

    def blocks_of(self, n, N):
        """First and stop of the blocks of pass n of N: those outside the loop run once."""
        first, stop = self.cfg.loop
        return (0 if n == 0 else first), (len(self.blocks) if n == N - 1 else stop)

    def evict(self, memory):
        """Hard eviction empties the cache; sliding eviction keeps L - 1 tokens. S stays."""
        keep = 0 if self.cfg.eviction == "hard" else self.cfg.L - 1
        return Memory(memory.S, [tuple(latest(x, keep) for x in c) for c in memory.cache], 0)

    def wake(self, h, memory):
        """One pass over h (B, T, d), the next tokens of this window (Algorithm 1, line 10).

        Returns logits (B, T, vocab) and the memory, with these tokens in its cache.
        """
        self.check(h, memory)
        awake = memory.awake + h.shape[1]
        h, S, cache = self.one_pass(h, memory.S, memory.cache, 0, len(self.blocks))
        return self.head(self.norm(h)), Memory(S, cache, awake)

    def check(self, h, memory, asleep=False):
        """ValueError if h (B, T, d) does not fit into what is left of the memory's window."""
        B, T, L, awake = len(memory.cache[0][0]), h.shape[1], self.cfg.L, memory.awake
        if len(h) != B:
            raise ValueError(f"this memory belongs to a batch of {B}, not of {len(h)}.")
        if awake + T > L or (awake and asleep):
            raise ValueError(f"{T} tokens do not fit into a window of L = {L} after {awake} that "
                             "were read awake: evict first (a sleep begins its window).")

    def forward(self, tokens, targets, N=None, silent=None):
        """Algorithm 1. A window sleeps if no sequence of the batch has a target in it.

        tokens (B, T); targets (B, M): what the last M positions are to predict, already shifted, -1
        for nothing. N: passes of a sleep, or a list, one number a window (not used where it is
        awake). silent: (targets < 0).all(0) as a list; a CUDA graph cannot look for itself.
        Returns logits (B, M, vocab), 0 where a window sleeps, and their mean cross entropy in nats.
        """
        B, T, M, L = len(tokens), tokens.shape[-1], targets.shape[-1], self.cfg.L
        if tokens.shape != (B, T) or targets.shape != (B, M) or not 1 <= M <= T:
            raise ValueError(f"tokens {tuple(tokens.shape)}, targets {tuple(targets.shape)}: they "
                             "must be (B, T) and (B, M), with M from 1 to T.")
        if all(silent := silent or (targets < 0).all(0).tolist()):
            raise ValueError("all targets are -1: nothing is predicted, so there is no loss.")
        silent, logits = [True] * (T - M) + silent, []         # T entries; True: loss mask 0
        memory = self.empty_memory(B)                                          # line 1: S <- 0
        windows = tokens.split(L, 1)                                           # line 2
        N = N if isinstance(N, (list, tuple)) else [N] * len(windows)
        if len(N) != len(windows):
            raise ValueError(f"N has {len(N)} numbers; there are {len(windows)} windows.")
        for i, (window, passes) in enumerate(zip(windows, N)):                 # line 3
            h = self.embed(window)                                             # line 4
            if all(silent[i * L:(i + 1) * L]):                                 # line 5
                memory = self.sleep(h, memory, passes)                         # lines 6-7
                out = h.new_zeros(()).expand(*window.shape, self.cfg.vocab_size)
            else:                                                              # line 9
                out, memory = self.wake(h, memory)                             # line 10
                memory = self.evict(memory)            # an awake window is evicted, too
            logits.append(out)
        logits = torch.cat(logits[(T - M) // L:], 1)[:, -M:]   # of the last M positions
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)   # line 11
        return logits, loss

    @torch.no_grad()
    def stream(self, tokens, state=None):
        """Not in the paper: tokens (B, T) arrive one at a time; after every L the model sleeps.

        Equals `forward` if only its last window has targets: here every full window sleeps.
        Returns logits (B, T, vocab) and the state for the next call: the memory now, the memory
        before this window, and the window's embeddings.
        """
        embedded, empty, logits = self.embed(tokens), self.empty_memory(len(tokens)), []
        now, before, window = state or (empty, empty, embedded[:, :0])
        for h in embedded.split(1, 1):
            out, now = self.wake(h, now)
            logits.append(out)
            window = torch.cat([window, h], 1)                                 # (B, n, d)
            if window.shape[1] == self.cfg.L:      # from the S before it; the awake S is dropped
                now = before = self.sleep(window, before)
                window = window[:, :0]
        return torch.cat(logits, 1), (now, before, window)


# The method ends here. What follows trains it. ---------------------------------------------------
import argparse
import json
import os
import signal
import sys
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path

from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm import tqdm

# A task is a class, Task(args, seed), with
#   name, vocab_size, T         T = tokens of one sequence
#   make_batch(step)            -> tokens (B, T), targets (B, M) of a training step, and further
#                               facts if score wants any; from seed and step alone
#   test                        a batch that is never trained on
#   chance                      the score of the best constant guess on it
#   score(tokens, targets, logits, *facts)     -> {metric: number, or {case: number}}
# and, if it likes,
#   show(tokens, targets)       -> one example as text
#   model(cfg)                  the model, if it is not to be SleepLM: a subclass of it
#   draw_N(step, N)             passes of a sleep in a training step, if they are not always N


class BadInput(ValueError):
    """What was asked for cannot be done; the sentence says what is wrong and what to do."""


def train(task, cfg, settings, path):
    """Train one model -> the model and its run, a dict (see lab/README.md).

    Every `eval_every` steps: evaluate, and save all that it takes to go on exactly from here.
    Ends with a sentence if the loss or a weight is not finite.
    """
    steps, every, device = settings["steps"], settings["eval_every"], settings["device"]
    model, optimizers, run = begin(task, cfg, settings, path)
    gradients = make_gradients(model, settings["compile"], settings["recompute"])
    draw_N = getattr(task, "draw_N", lambda step, N: N)
    start, first = time.monotonic() - run["seconds"], run["steps"]
    loss = grad_norm = torch.zeros((), device=device)  # sum and largest since the last evaluation
    for step in tqdm(range(first, steps), path.stem, steps, False, initial=first, disable=None):
        set_phase(model, optimizers, settings, step)
        tokens, targets, *_ = task.make_batch(step)
        loss = loss + gradients(tokens, targets, draw_N(step, cfg.N))      # zero_grad, backward
        grad_norm = grad_norm.maximum(nn.utils.get_total_norm(
            [p.grad for p in model.parameters() if p.grad is not None]))
        for optimizer in optimizers:
            optimizer.step()                                               # line 14
        run["tokens"] += tokens.numel()
        if (step + 1) % every and step + 1 < steps:
            continue
        mean = loss.item() / (step + 1 - run["steps"])         # those are of the last evaluation
        if not (math.isfinite(mean) and all(p.isfinite().all() for p in model.parameters())):
            sys.exit(f"{path.stem}: the loss or a weight is not finite after step {step + 1}; step "
                     f"{run['steps']} is kept. Try smaller learning rates.")
        metrics = evaluate(model, task, task.test)
        run |= dict(steps=step + 1, seconds=round(time.monotonic() - start, 1), **metrics)
        run["curve"].append(dict(step=step + 1, tokens=run["tokens"], train_loss=mean,
                                 grad_norm=grad_norm.item(), **metrics))
        save(path, dict(run=run, model=model.state_dict(),
                        optimizers=[optimizer.state_dict() for optimizer in optimizers]))
        tqdm.write(f"{path.stem} | step {step + 1} | {run['tokens'] / 1e6:.2f}M tokens | train "
                   f"loss {mean:.3f} | {line(metrics)} | {run['seconds']:.0f} s")
        loss = grad_norm = torch.zeros_like(loss)
    return model, run


def begin(task, cfg, settings, path):
    """Model, optimizers and run: new, or as the checkpoint at `path` left them."""
    device = settings["device"]
    torch.manual_seed(settings["seed"])
    model = getattr(task, "model", SleepLM)(cfg).to(device)
    model.bf16 = device == "cuda"
    torch.set_float32_matmul_precision("high" if model.bf16 else "highest")    # TF32 on CUDA
    torch.backends.cuda.enable_cudnn_sdp(False)        # its backward pass has had NaN bugs
    optimizers = make_optimizers(model, settings["lr_muon"], settings["lr_adamw"])
    cpu = f"{device}, {torch.get_num_threads()} threads"
    if not path.exists():
        return model, optimizers, dict(
            task=task.name, N=cfg.N, seed=settings["seed"], steps=0, tokens=0, seconds=0.0,
            parameters=sum(p.numel() for p in model.parameters()), chance=task.chance, curve=[],
            settings=settings, torch=str(torch.__version__),
            device=torch.cuda.get_device_name() if device == "cuda" else cpu)
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        refuse_other_settings(path, saved["run"], task, settings)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        return model, optimizers, saved["run"]
    except BadInput:
        raise
    except Exception as e:                 # torch.load raises many kinds
        raise BadInput(f"{path} cannot be read as a checkpoint of this model ({type(e).__name__}): "
                       "delete it to train the model anew.") from None


def set_phase(model, optimizers, settings, step):
    """The rates of a step. In Section 6.4's warm-up attention blocks rest, and eviction is hard."""
    left, warming = settings["steps"] - step, step < settings["warmup"]
    for optimizer, rate in zip(optimizers, (settings["lr_muon"], settings["lr_adamw"])):
        falling = min(1.0, left / max(1.0, settings["cooldown"] * settings["steps"]))
        optimizer.param_groups[0]["lr"] = rate * falling
    model.cfg.eviction = "hard" if warming else settings["eviction"]
    for block in model.blocks:
        block.requires_grad_(block.kind == "s" or not warming)


class Muon(torch.optim.Optimizer):
    """The step is the momentum with all its singular values near 1 (Jordan et al. 2024): that of
    torch.optim, in float32, as bfloat16 is slow on a CPU, and all matrices of a shape at once."""

    @torch.no_grad()
    def step(self):
        group, = self.param_groups
        params = [p for p in group["params"] if p.grad is not None]
        for rows, columns in dict.fromkeys(p.shape for p in params):
            batch = [p for p in params if p.shape == (rows, columns)]
            grads = [p.grad for p in batch]
            means = [self.state[p].setdefault("mean", torch.zeros_like(p)) for p in batch]
            torch._foreach_lerp_(means, grads, 0.05)
            X = torch.stack(torch._foreach_lerp(grads, means, 0.95))           # Nesterov
            X = X.mT if rows > columns else X                                  # (n, short, long)
            X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
            for _ in range(5):                                                 # Newton-Schulz
                A = X @ X.mT
                X = 3.4445 * X + (2.0315 * A @ A - 4.775 * A) @ X
            X = X.mT if rows > columns else X
            torch._foreach_add_(batch, list(X), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def make_optimizers(model, lr_muon, lr_adamw):
    """Muon for the matrices of the blocks, AdamW for all else (Section 6.1). paper does not say:
    the weight decay. None here."""
    matrices = [m.weight for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    return Muon(matrices, dict(lr=lr_muon)), torch.optim.AdamW(rest, lr=lr_adamw, weight_decay=0.0,
                                                               fused=rest[0].is_cuda)


def make_gradients(model, compile, recompute):
    """-> f(tokens (B, T), targets (B, M), N), the loss; its gradients are then in p.grad.

    compile: fuse every block. recompute: keep only h and S of a pass, and run it again in the
    backward pass. Else, on CUDA, a step is recorded as one CUDA graph for each kind of batch and
    replayed: the loss is then a buffer that the next call overwrites. BadInput if it cannot be.
    """
    if compile:
        torch._dynamo.config.recompile_limit = 64      # one graph for each shape and kind of call
        for block in model.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
    if recompute:
        model.one_pass = partial(recompute_in_backward, model.one_pass, use_reentrant=False,
                                 preserve_rng_state=False)                     # nothing is random

    def eager(tokens, targets, N, silent=None):
        model.zero_grad()
        loss = model(tokens, targets, N, silent)[1]
        loss.backward()
        return loss.detach()

    if recompute or not model.head.weight.is_cuda:
        return eager
    graphs, side, pool = {}, torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def replayed(tokens, targets, N):
        silent = (targets < 0).all(0).tolist()
        key = str((tokens.shape, silent, N, model.cfg.eviction,
                   [p.requires_grad for p in model.parameters()]))
        if key not in graphs:
            inputs = tokens.clone(), targets.clone()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                losses = [eager(*inputs, N, silent).item() for _ in range(3)]  # settles libraries
            torch.cuda.current_stream().wait_stream(side)
            if not math.isclose(losses[1], losses[2], rel_tol=1e-3):
                raise BadInput("a pass of this model is random, a graph is not: add --recompute.")
            # p.grad is None before it, so its gradients are its own, good until the next replay.
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=pool, stream=side):
                    loss = eager(*inputs, N, silent)
            except RuntimeError as e:      # a pass that looks at its numbers, or too little memory
                raise BadInput(f"no CUDA graph of a step ({e}): add --recompute.") from None
            graphs[key] = graph, inputs, loss, [p.grad for p in model.parameters()]
        graph, inputs, loss, grads = graphs[key]
        torch._foreach_copy_(inputs, (tokens, targets))
        graph.replay()
        for p, grad in zip(model.parameters(), grads):
            p.grad = grad
        return loss

    return replayed


@torch.no_grad()
def evaluate(model, task, batch, N=None):
    """The metrics of one teacher-forced forward pass with N passes a sleep."""
    tokens, targets, *facts = batch
    rows, silent = max(1, 2 ** 17 // tokens.shape[1]), (targets < 0).all(0).tolist()
    with torch.compiler.set_stance("force_eager"):     # these shapes are not worth compiling
        logits = torch.cat([model(x, y, N, silent)[0]
                            for x, y in zip(tokens.split(rows), targets.split(rows))])
    return task.score(tokens, targets, logits, *facts)


def line(metrics):
    cases = lambda x: "  ".join(f"{case}: {v:.3f}" for case, v in x.items())
    return " | ".join(f"{name} {cases(x) if isinstance(x, dict) else f'{x:.3f}'}"
                      for name, x in metrics.items())


# ------------------------------------------------------------------------------------------------
# Files: of each model its run, N1-seed0.json, and a checkpoint to go on from, N1-seed0.pt

def write(path, save):
    """Make a file whole or not at all: `save(temporary path)`, then rename."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:   # torch.save raises the second when a disk is full
        sys.exit(f"{path} could not be written: {e}.")
    finally:
        temporary.unlink(missing_ok=True)


def save(path, state):
    write(path, lambda p: torch.save(state, p))
    write(path.with_suffix(".json"), lambda p: p.write_text(json.dumps(state["run"], indent=1)))


def refuse_other_settings(path, run, task, settings):
    old, new = dict(run["settings"], task=run["task"]), dict(settings, task=task.name)
    if other := [f"{k} was {old.get(k)}, is {new.get(k)}" for k in sorted({*old, *new})
                 if old.get(k) != new.get(k) and k not in ("compile", "recompute")]:
        raise BadInput(f"{path} was made with other settings ({'; '.join(other)}): resume with the "
                       "same ones, or choose another --out.")


# ------------------------------------------------------------------------------------------------
# A whole script: the command line, and a model for each N and seed

DEFAULTS = dict(eviction="hard", loop=[], update_rule="gated_delta", conv="as", warmup=0,
                cooldown=0.0, eval_every=0, seed=[0], N_test=[], recompute=False)
FLAGS = dict(
    N="passes of a sleep; one model for each value",
    seed="of weights and data; one model for each value",
    L="window of attention, in tokens",
    layout="one letter a block: a = attention, s = SSM",
    d_model="width",
    n_head="heads of every mixer",
    eviction="hard: only S survives; sliding: also L - 1 tokens",
    loop="first and stop of the looped blocks; all of them, if not given",
    update_rule=", ".join(UPDATE_RULES),
    conv="mixers behind a short convolution: as, s (the paper), a or ''",
    steps="training steps",
    batch_size="sequences a step",
    lr_muon="learning rate of the blocks' matrices",
    lr_adamw="learning rate of all other parameters",
    warmup="first steps, in which attention is frozen and eviction hard (Section 6.4)",
    cooldown="last share of the steps, in which the rates fall to 0",
    eval_every="steps between evaluations and checkpoints; 0: a tenth of all",
    compile="fuse every block with torch.compile",
    recompute="save memory: of a pass keep h and S, repeat it for the gradient (checkpointing)",
    N_test="test with these N, too; 0: windows are evicted unread")
MODEL_FLAGS = "L N layout d_model n_head eviction loop update_rule conv".split()
LIMITS = dict(N=(1, 1000), N_test=(0, 1000), L=(1, 10 ** 9), seed=(0, 10 ** 6), steps=(1, 10 ** 9),
              eval_every=(1, 10 ** 9), batch_size=(1, 10 ** 6), cooldown=(0, 1),
              lr_muon=(1e-9, 1e3), lr_adamw=(1e-9, 1e3))


def parse(doc, presets, flags, argv=None):
    """Command line -> the parser and the settings: the preset's values, then what the flags say.

    presets: {name: {flag: value}}, the value gives its type, too; flags: {flag: help} of the task.
    """
    p = argparse.ArgumentParser(description=doc, add_help=False, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda sentence: p.exit(2, f"{p.prog}: {sentence}\n")
    p.add_argument("--preset", choices=list(presets), default="cpu", help="default: cpu")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args, _ = p.parse_known_args(argv)
    p.add_argument("-h", "--help", action="help", help="show this")
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    device = next(d for d in there if there[d]) if args.device == "auto" else args.device
    if not there.get(device):
        p.error(f"there is no device '{device}' here: take --device cpu.")
    fuse = dict(compile=device == "cuda" and find_spec("triton") is not None)
    values = DEFAULTS | fuse | presets[args.preset]
    for flag, text in (flags | FLAGS).items():
        value, kind = values[flag], dict(type=type(values[flag]))
        if isinstance(value, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(value, list):
            kind = dict(type=type(value[0]) if value else int, nargs="+")
        p.add_argument(f"--{flag}", default=value, help=f"{text} (default: {value})", **kind)
    p.add_argument("--out", type=Path, help="folder for results; default: a new one in out/")
    p.add_argument("--resume", action="store_true", help="go on where the runs in --out stopped")
    args = p.parse_args(argv)
    args.device = device
    args.eval_every = args.eval_every or max(1, args.steps // 10)
    return p, args


def plan(args, Task):
    """(task, Config, settings) of each model. BadInput if one of them makes no sense."""
    for flag, (low, high) in dict(LIMITS, warmup=(0, args.steps - 1)).items():
        value = getattr(args, flag)
        if not all(low <= x <= high for x in (value if isinstance(value, list) else [value])):
            raise BadInput(f"--{flag} {value} must be from {low:g} to {high:g}.")
    plans, flags = [], vars(args).keys() - {"N_test", "data", "out", "resume", "preset"}
    for seed in dict.fromkeys(args.seed):
        task = Task(args, seed)
        for N in dict.fromkeys(args.N):
            settings = {flag: getattr(args, flag) for flag in sorted(flags)} | dict(N=N, seed=seed)
            try:
                cfg = Config(task.vocab_size, task.T, **{k: settings[k] for k in MODEL_FLAGS})
            except ValueError as e:
                raise BadInput(e) from None
            plans.append((task, cfg, settings))
    return plans


def main(doc, presets, flags, Task, argv=None):
    """Train a model for each N and seed. Exit status: 2 bad input, 1 ended early, else 0."""
    p, args = parse(doc, presets, flags, argv)
    out = args.out or Path("out") / time.strftime(f"{Task.name}-{args.preset}-%m%d-%H%M%S")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)    # a file or a pipe sees it at once, too
    try:
        plans = plan(args, Task)
        try:
            out.mkdir(parents=True, exist_ok=args.resume)      # of two processes one makes a folder
        except OSError as e:
            raise BadInput(f"{out} cannot be made ({e.strerror}): add --resume to go on with what "
                           "is in it, or choose another --out.") from None
        run_all(p.prog, args, plans, out)
    except BadInput as e:
        p.error(e)
    except KeyboardInterrupt:
        sys.exit(f"stopped. To go on: the same command with --resume --out {out}")


def run_all(name, args, plans, out):
    """Train the models that are not finished, then print all of them."""
    flags = ", ".join(f"{flag} {value}" for flag, value in sorted(vars(args).items()))
    print(textwrap.fill(f"{name}: {flags}", 99))
    write(out / "command.txt", lambda p: p.write_text(" ".join(sys.argv) + "\n"))
    paths, runs = [out / f"N{s['N']}-seed{s['seed']}.pt" for _, _, s in plans], []
    for path, (task, cfg, settings) in zip(paths, plans):      # refuse before anything is trained
        if path.with_suffix(".json").exists() and not path.exists():
            raise BadInput(f"{path} is gone, but its .json is not: choose another --out.")
        *_, run = begin(task, cfg, settings, path)
        print(f"{path.stem}: {run['parameters']:,} parameters, step {run['steps']} of {args.steps}")
    print(f"{run['device']} (where others work, too, OMP_NUM_THREADS=1), torch {run['torch']}")
    if hasattr(task, "show"):
        print(task.show(*(x[0] for x in task.test[:2])))
    print(f"best constant guess: {line(task.chance)}")
    for path, (task, cfg, settings) in zip(paths, plans):
        model, run = train(task, cfg, settings, path)
        if new := [N for N in args.N_test if str(N) not in run.get("N_test", {})]:
            tests = {str(N): evaluate(model, task, task.test, N) for N in new}
            run["N_test"] = run.get("N_test", {}) | tests
        save(path, torch.load(path, weights_only=True) | dict(run=run))
        runs.append(run)
    for run in runs:
        print(f"N {run['N']} seed {run['seed']} | {run['tokens'] / 1e6:.1f}M tokens | "
              f"{run['seconds']:.0f} s | {line({metric: run[metric] for metric in task.chance})}")
        for N in run.get("N_test", {}):
            print(f"  tested with N = {N}: {line(run['N_test'][N])}")
    print(f"saved in {out}; to draw it: python -m lab.plot {out}")


if __name__ == "__main__":
    from lab import demo                   # a trained model, watched while it sleeps
    demo.main()
