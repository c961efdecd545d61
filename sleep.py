"""sleep.py: language models that sleep, in one file.

"Do Language Models Need Sleep? Offline Recurrence for Improved Online Inference", Lee, McLeish,
Goldstein, Fanti, arXiv 2605.26099. Sections, equations and lines are those of version 3.

Attention sees a window of L tokens. SSM blocks carry fast weights S. When the window is full the
model sleeps: N passes over the window through all blocks, h and S carried from pass to pass. Then
the window is evicted and only S remains. An answer takes one pass, whatever N is. N = 1 is the
plain attention-SSM hybrid.

  name       paper      meaning                                          shape
  tokens     x, c       token ids; a window (chunk) of them              (B, T)
  h          h          features, one vector per token                   (B, T, d)
  q k v      q k v      query, key, value, H heads of K = V = d / H      (B, H, T, K)
  alpha      alpha_t    how much of S a token keeps, as log_alpha <= 0   (B, H, T)
  beta       beta_t     how strongly a token is written, in (0, 1)       (B, H, T)
  S          S_t        fast weights: S k ~ v                            (B, H, V, K)
  L, N       L, N       window length; passes of a sleep

  Eq. 1-2  Attention                    Eq. 6, Section 6.3      Config.loop
  Eq. 3    gated_delta_rule             Algorithm 1             SleepLM.forward
  Eq. 4-5  Block, Config.layout         Algorithm 1, lines 6-7  SleepLM.sleep

Nothing runs on import. `python sleep.py` runs the benchmark at the end of the file (Section 6.5).
"""
import argparse
import json
import math
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# The fast-weight rule (Eq. 3 with the delta correction)

RULES = {                                  # (gated: alpha < 1, delta: write v - S k instead of v)
    "hebbian": (False, False), "gated_hebbian": (True, False),
    "delta": (False, True), "gated_delta": (True, True),
}


def gated_delta_rule(q, k, v, log_alpha, beta, S, delta=True):
    """Eq. 3, one token after another: the definition, and the oracle of the chunked form.

        S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,    o_t = S_t q_t

    q, k (B, H, T, K); v (B, H, T, V); log_alpha, beta (B, H, T); S (B, H, V, K).
    delta=False leaves the correction out: S_t = alpha_t S_{t-1} + beta_t v_t k_t^T.
    Returns o (B, H, T, V) and the last S (B, H, V, K).
    """
    outputs = []
    for q_t, k_t, v_t, log_alpha_t, beta_t in zip(q.unbind(2), k.unbind(2), v.unbind(2),
                                                  log_alpha.unbind(2), beta.unbind(2)):
        S = log_alpha_t.exp()[..., None, None] * S                             # forget
        if delta:
            v_t = v_t - (S @ k_t[..., None]).squeeze(-1)                       # what S lacks at k_t
        S = S + (beta_t[..., None] * v_t)[..., None] * k_t[..., None, :]       # write
        outputs.append((S @ q_t[..., None]).squeeze(-1))                       # read
    return torch.stack(outputs, 2), S


def unit_lower_inverse(A):
    """(I + A)^-1 for strictly lower triangular A (..., C, C).

    Diagonal blocks of 1, 2, 4, ... tokens are inverted exactly and merged. The shorter product
    (I - A)(I + A^2)(I + A^4)... is equal on paper, but with repeated keys its powers of A grow
    like binomials and lose all digits in float32 from 32 tokens on.
    """
    C = A.shape[-1]
    i = torch.arange(C, device=A.device)
    fixed, X, size = A.detach(), torch.eye(C, dtype=A.dtype, device=A.device), 1
    while size < C:
        block = i // size
        below = (block[:, None] == block + 1) & (block[:, None] % 2 == 1)      # (C, C)
        X = X - (X @ (fixed * below) @ X if size > 1 else fixed * below)
        size *= 2
    # The loop is outside autograd. This line subtracts X 0 X, which changes no number, but its
    # gradient is that of an inverse: dX = -X dA X.
    return X - X @ (A - fixed) @ X


def gated_delta_rule_chunked(q, k, v, log_alpha, beta, S, delta=True, chunk=64,
                             inverse=unit_lower_inverse):
    """The numbers of `gated_delta_rule` as matrix products over chunks of at most `chunk` tokens.

    Unrolled inside a chunk, token i writes u_i and reads o_i,
        u_i = beta_i (v_i - e^{c_i} S k_i - sum_{j<i} e^{c_i - c_j} (k_i . k_j) u_j)
        o_i = e^{c_i} S q_i + sum_{j<=i} e^{c_i - c_j} (q_i . k_j) u_j
    with c the running sum of log_alpha and S the state before the chunk: the first line is a
    triangular system (u_i = beta_i v_i without delta). D_ij = e^{c_i - c_j}: every exponent is
    <= 0, and the mask comes before exp, so nothing overflows.
    """
    T = q.shape[2]
    n_chunks = math.ceil(T / chunk)
    C = math.ceil(T / n_chunks)
    if pad := n_chunks * C - T:            # padding: no decay (log_alpha 0), no write (beta 0)
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        log_alpha, beta = F.pad(log_alpha, (0, pad)), F.pad(beta, (0, pad))
    q, k, v, log_alpha, beta = (x.unflatten(2, (n_chunks, C)) for x in (q, k, v, log_alpha, beta))

    c = log_alpha.cumsum(-1)                                                   # (B, H, n, C)
    future = torch.ones(C, C, dtype=torch.bool, device=q.device).triu(1)
    D = (c[..., :, None] - c[..., None, :]).masked_fill(future, -torch.inf).exp()
    scores = (q @ k.mT) * D                                                    # (B, H, n, C, C)
    A = (beta[..., None] * (k @ k.mT) * D).tril(-1)                            # (B, H, n, C, C)
    X = inverse(A) if delta else A         # (I + A)^-1; not used without delta
    bv, bk = beta[..., None] * v, (beta * c.exp())[..., None] * k
    q_in = c.exp()[..., None] * q                          # reads the S before the chunk
    k_out = (c[..., -1:] - c).exp()[..., None] * k         # writes to the S after it
    decay = c[..., -1].exp()[..., None, None]              # of S over a chunk  (B, H, n, 1, 1)

    outputs = []                           # (unbind: a slice's backward would fill all chunks with 0)
    for q_i, k_i, bv_i, bk_i, X_i, scores_i, decay_i in zip(*(
            x.unbind(2) for x in (q_in, k_out, bv, bk, X, scores, decay))):
        u = X_i @ (bv_i - bk_i @ S.mT) if delta else bv_i                      # (B, H, C, V)
        outputs.append(q_i @ S.mT + scores_i @ u)
        S = decay_i * S + u.mT @ k_i
    return torch.cat(outputs, 2)[:, :, :T], S


# ------------------------------------------------------------------------------------------------
# Layers

@dataclass
class Config:
    """A model. ValueError says in one sentence what does not fit."""
    vocab_size: int
    T: int                         # tokens of one sequence; sets the decay at birth, limits nothing
    L: int                         # window of attention, in tokens
    N: int = 1                     # passes of a sleep
    layout: str = "asas"           # one letter a block: a = attention, s = SSM (fast weights)
    d_model: int = 256
    n_head: int = 4
    eviction: str = "hard"         # "hard": nothing but S survives; "sliding": also L - 1 tokens
    loop: str = "all"              # looped blocks: "all", "middle" (half), or a slice "first:last"
    update_rule: str = "gated_delta"   # one of RULES
    conv: str = "as"               # mixers behind a short convolution: the paper has it in "s" only
    taps: int = 3                  # its length in tokens
    keep_S: bool = True            # False: a lesion, evictions empty S as well

    def __post_init__(self):
        def need(ok, sentence):
            if not ok:
                raise ValueError(sentence)
        for name in ("vocab_size", "T", "L", "N", "d_model", "n_head", "taps"):
            value = getattr(self, name)
            need(isinstance(value, int) and value >= 1,
                 f"{name} must be an integer >= 1, not {value}.")
        need(self.layout and not set(self.layout) - set("as"),
             f"layout '{self.layout}' must be made of the letters a (attention) and s (SSM).")
        need(self.d_model % (2 * self.n_head) == 0,
             f"d_model {self.d_model} must be a multiple of 2 * n_head = {2 * self.n_head} (RoPE "
             "turns pairs).")
        need(self.eviction in ("hard", "sliding"),
             f"eviction '{self.eviction}' must be 'hard' or 'sliding'.")
        need(self.update_rule in RULES,
             f"update_rule '{self.update_rule}' must be one of {', '.join(RULES)}.")
        need(not set(self.conv) - set("as"), f"conv '{self.conv}' must be '', 'a', 's' or 'as'.")
        need(self.eviction == "hard" or self.L >= self.taps,
             f"sliding eviction keeps L - 1 = {self.L - 1} tokens, the convolution needs "
             f"{self.taps - 1}: take L >= {self.taps}.")
        self.span()

    def span(self):
        """First and last + 1 of the looped blocks (Section 6.3)."""
        D = len(self.layout)
        try:
            if self.loop in ("all", "middle"):
                first, last = (0, D) if self.loop == "all" else (D // 4, D - D // 4)
            else:
                first, last = (int(x) for x in self.loop.split(":"))
        except ValueError:
            first = last = 0
        if not 0 <= first < last <= D:
            raise ValueError(f"loop '{self.loop}' must be 'all', 'middle' or first:last with "
                             f"0 <= first < last <= {D}.")
        return first, last

    def blocks_of(self, n):
        """First and last + 1 of the blocks of pass n: those outside the looped span run once."""
        first, last = self.span()
        return 0 if n == 0 else first, len(self.layout) if n == self.N - 1 else last


class Memory(NamedTuple):
    """All that a model knows of the past; passed in and returned, never kept in the module."""
    S: list          # a block: fast weights (B, H, V, K), or None for attention
    cache: list      # a block: (conv tail (B, n, d), keys, values (B, H, n, K)); for SSM the tail


def latest(x, n):
    """The last n tokens of x (..., T, d), fewer if there are not as many; the rest can be freed."""
    if n == 0:
        return x.new_zeros(*x.shape[:-2], 0, x.shape[-1])
    return x[..., max(x.shape[-2] - n, 0):, :].contiguous()


class ShortConv(nn.Module):
    """x_t + sum_j w_j * x_{t-j}: a causal depthwise convolution over a few tokens."""

    def __init__(self, cfg):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cfg.taps, cfg.d_model))

    def forward(self, x, tail):
        """x (B, T, d) and the tokens before it, tail (B, n, d) -> (B, T, d), the new tail."""
        taps, T = len(self.weight), x.shape[1]
        seen = torch.cat([tail, x], 1)
        padded = F.pad(seen, (0, 0, taps - 1 - tail.shape[1], 0))             # (B, taps - 1 + T, d)
        for j in range(taps):
            x = x + self.weight[j] * padded[:, taps - 1 - j: taps - 1 - j + T]
        return x, latest(seen, taps - 1)


def rope(x, cos, sin):
    """Rotary positions for x (B, H, T, K); cos, sin (T, K / 2)."""
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).to(x.dtype)


class Attention(nn.Module):
    """Softmax attention (Eq. 1-2): every token sees itself and the L - 1 tokens before it."""

    def __init__(self, cfg):
        super().__init__()
        d, self.H, self.L = cfg.d_model, cfg.n_head, cfg.L
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        K = d // self.H
        # Scores depend on distances only, so positions are counted from the oldest cached token
        # and no more than 2 L of them are ever needed.
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
                                           is_causal=not P)                    # (B, H, T, K)
        return self.o(o.transpose(1, 2).flatten(2)), k, v


class FastWeights(nn.Module):
    """The SSM mixer: Gated DeltaNet, Eq. 3 with gates computed from the token."""

    def __init__(self, cfg):
        super().__init__()
        d, self.H = cfg.d_model, cfg.n_head
        self.gated, self.delta = RULES[cfg.update_rule]
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.z = nn.Linear(d, d, bias=False)                                   # output gate
        self.ab = nn.Linear(d, 2 * self.H, bias=False)                         # alpha and beta
        self.dt_bias = nn.Parameter(torch.empty(self.H))
        self.A_log = nn.Parameter(torch.empty(self.H))
        self.norm = nn.RMSNorm(d // self.H, eps=1e-5)

    def forward(self, x, S):
        """x (B, T, d), S (B, H, V, K) -> (B, T, d), the new S."""
        q, k, v = (F.silu(w(x)).unflatten(-1, (self.H, -1)).transpose(1, 2)
                   for w in (self.q, self.k, self.v))                          # (B, H, T, K)
        with torch.autocast(x.device.type, enabled=False):                     # float32 from here
            q, k, v = (y.to(S.dtype) for y in (q, k, v))
            a, b = self.ab(x.to(S.dtype)).transpose(1, 2).chunk(2, 1)          # (B, H, T)
            beta = b.sigmoid()
            log_alpha = -self.A_log.exp()[:, None] * F.softplus(a + self.dt_bias[:, None])
            if not self.gated:
                log_alpha = torch.zeros_like(log_alpha)
            # Unit keys make I - beta k k^T a contraction; without them training diverges.
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            rule = gated_delta_rule if x.shape[1] == 1 else gated_delta_rule_chunked
            o, S = rule(q, k, v, log_alpha, beta, S, self.delta)
            o = self.norm(o).transpose(1, 2).flatten(2)                        # (B, T, d)
        return self.o(o * F.silu(self.z(x))), S


class Block(nn.Module):
    """Eq. 4-5: mixer and MLP, each behind a norm and inside a residual."""

    def __init__(self, kind, cfg):
        super().__init__()
        d, self.kind = cfg.d_model, kind
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.conv = ShortConv(cfg) if kind in cfg.conv else None
        self.mixer = Attention(cfg) if kind == "a" else FastWeights(cfg)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, h, S, cache):
        """h (B, T, d), this block's S and cache (see Memory) -> h, S, cache grown by T tokens."""
        tail, *kv = cache
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
# The model: wake, sleep, evict

class SleepLM(nn.Module):
    """A looped hybrid (Eq. 6) that sleeps before it forgets (Section 5)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.ModuleList(Block(kind, cfg) for kind in cfg.layout)
        self.norm = nn.RMSNorm(cfg.d_model)
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)         # OutProj
        self.bf16 = False                  # autocast matrix products of the blocks to bfloat16
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        nn.init.normal_(self.embed.weight)
        nn.init.zeros_(self.head.weight)
        for block in self.blocks:
            for m in block.modules():
                if isinstance(m, nn.Linear):
                    nn.init.normal_(m.weight, std=m.in_features ** -0.5)
                elif isinstance(m, ShortConv):
                    nn.init.normal_(m.weight, std=0.5)
                elif isinstance(m, FastWeights):
                    # paper does not say: half-lives of the heads, log-spaced from 4 tokens to all
                    # N * T token-steps of a sequence (the same for N = 1..4, to compare them) where
                    # the gate's input is 0. Random ones often forget the first window.
                    # softplus(dt_bias) = log 2 / half-life
                    longest = max(self.cfg.N, 4) * self.cfg.T
                    half_life = torch.logspace(math.log10(longest), math.log10(4), m.H)
                    m.dt_bias.copy_(torch.log(torch.expm1(math.log(2) / half_life)))
                    m.A_log.zero_()

    def empty_memory(self, B):
        """S = 0 (Algorithm 1, line 1) and an empty cache for B sequences."""
        cfg, zeros = self.cfg, self.embed.weight.new_zeros
        H, K = cfg.n_head, cfg.d_model // cfg.n_head
        S = [zeros(B, H, K, K) if kind == "s" else None for kind in cfg.layout]
        kv = dict(dtype=torch.bfloat16) if self.bf16 else {}
        cache = [(zeros(B, 0, cfg.d_model),) if kind == "s" else
                 (zeros(B, 0, cfg.d_model), zeros(B, H, 0, K, **kv), zeros(B, H, 0, K, **kv))
                 for kind in cfg.layout]
        return Memory(S, cache)

    def one_pass(self, h, S, cache, first, last):
        """h, S <- Blocks(h, S) with blocks first..last-1; their caches grow by the tokens of h.

        This is the unit that torch.compile fuses: N and the number of windows stay outside.
        """
        S, cache = list(S), list(cache)
        with torch.autocast(h.device.type, torch.bfloat16, enabled=self.bf16):
            for i in range(first, last):
                h, S[i], cache[i] = self.blocks[i](h, S[i], cache[i])
        return h, S, cache

    def sleep(self, h, memory, done=0):
        """N passes over a full window, then eviction (Algorithm 1, lines 6-7).

        h (B, L, d): embeddings of the window, or its features after `done` < N passes.
        Every pass reads the cache with which the window began, and hands h and S to the next.
        Returns the memory after eviction. The refined h is thrown away: only S was worth it.
        """
        S, seen = memory.S, list(memory.cache)
        for n in range(done, self.cfg.N):
            i, j = self.cfg.blocks_of(n)   # all of them, unless --loop says otherwise
            h, S, cache = self.one_pass(h, S, memory.cache, i, j)   # h, S <- Blocks(h, S)
            seen[i:j] = cache[i:j]
        return self.evict(Memory(S, seen))

    def evict(self, memory):
        """Hard eviction empties the cache; sliding eviction keeps L - 1 tokens. S stays."""
        keep = 0 if self.cfg.eviction == "hard" else self.cfg.L - 1
        S = memory.S
        if not self.cfg.keep_S:
            S = [None if x is None else torch.zeros_like(x) for x in S]
        return Memory(S, [tuple(latest(x, keep) for x in c) for c in memory.cache])

    def wake(self, tokens, memory):
        """One pass over the next tokens (B, T) of the present window (Algorithm 1, line 10).

        Returns logits (B, T, vocab) and the memory, whose cache has grown by T tokens.
        """
        self.check(tokens, memory)
        L, T = self.cfg.L, tokens.shape[1]
        seen = max((c[1].shape[2] for c in memory.cache if len(c) > 1), default=0)
        if seen + T > (L if self.cfg.eviction == "hard" else 2 * L - 1):
            raise ValueError(f"{T} tokens do not fit into a window of L = {L} after the {seen} in "
                             "the cache: sleep or evict first.")
        h, S, cache = self.one_pass(self.embed(tokens), *memory, 0, len(self.blocks))
        return self.head(self.norm(h)), Memory(S, cache)

    def forward(self, tokens, targets):
        """Algorithm 1. Every window of L tokens sleeps that ends before the last M positions.

        tokens (B, T); targets (B, M): what the last M positions are to predict, -1 for nothing.
        Returns logits (B, M, vocab) and their mean cross entropy in nats.
        """
        memory = self.empty_memory(len(tokens))                                # line 1
        self.check(tokens, memory)
        (B, T), L = tokens.shape, self.cfg.L
        if targets.ndim != 2 or len(targets) != B or not 1 <= targets.shape[1] <= T:
            raise ValueError(f"targets {tuple(targets.shape)} must be (B, M) with the B of tokens "
                             f"{tuple(tokens.shape)} and M from 1 to T.")
        M, logits = targets.shape[1], []
        for start in range(0, T, L):                                           # lines 2-3
            window = tokens[:, start: start + L]
            if start + window.shape[1] <= T - M:                               # line 5
                memory = self.sleep(self.embed(window), memory)
            else:                                                              # lines 9-11
                out, memory = self.wake(window, memory)
                memory = self.evict(memory)
                logits.append(out)
        logits = torch.cat(logits, 1)[:, -M:]
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def stream(self, tokens, state=None):
        """Tokens (B, T) that arrive one at a time; the model sleeps by itself when L have come.

        The arriving tokens make pass 1, the sleep adds passes 2..N. The numbers are those of
        `forward` as long as all tokens that predict are in the last window: in `forward` a window
        that predicts does not sleep.
        Returns logits (B, T, vocab) and the state for the next call: the memory now, the memory
        when the window began, and h of the window's tokens behind the looped blocks, one by one.
        """
        if state is None:
            empty = self.empty_memory(len(tokens))
            state = empty, empty, []
        now, began, window = state
        self.check(tokens, now)
        first, last = self.cfg.span()
        logits, window = [], list(window)
        for token in tokens.split(1, 1):
            h, S, cache = self.one_pass(self.embed(token), *now, 0, last)
            window.append(h)                                                   # (B, 1, d)
            h, S, cache = self.one_pass(h, S, cache, last, len(self.blocks))
            logits.append(self.head(self.norm(h)))
            now = Memory(S, cache)
            if len(window) == self.cfg.L:
                if self.cfg.N > 1:
                    # Blocks behind the looped span are to see the last pass only: their S goes
                    # back to where the window began. Blocks before it are done: theirs stay.
                    before = Memory(S[:last] + began.S[last:], began.cache)
                    slept = self.sleep(torch.cat(window, 1), before, done=1)
                    now = Memory(slept.S, cache[:first] + slept.cache[first:])
                now = began = self.evict(now)
                window = []
        return torch.cat(logits, 1), (now, began, window)

    def generate(self, tokens, n):
        """The n >= 1 likeliest next tokens (B, n) after the prompt (B, T), one by one."""
        if n < 1:
            raise ValueError(f"n must be at least 1 token to generate, not {n}.")
        logits, state = self.stream(tokens)
        out = [logits[:, -1:].argmax(-1)]
        while len(out) < n:
            logits, state = self.stream(out[-1], state)
            out.append(logits.argmax(-1))
        return torch.cat(out, 1)

    def check(self, tokens, memory):
        """ValueError if tokens (B, T) do not fit the model or the memory."""
        if tokens.ndim != 2 or tokens.dtype.is_floating_point or not tokens.numel():
            raise ValueError("tokens must be integers of shape (B, T) with B and T at least 1, "
                             f"not {tokens.dtype} {tuple(tokens.shape)}.")
        B = memory.cache[0][0].shape[0]
        if len(tokens) != B:
            raise ValueError(f"this memory belongs to a batch of {B}, not of {len(tokens)}.")
        # On a GPU this look would wait for the device in every step.
        if tokens.device.type == "cpu" and not (
                0 <= tokens.min() and tokens.max() < self.cfg.vocab_size):
            raise ValueError(f"tokens run from {tokens.min()} to {tokens.max()}; the vocabulary "
                             f"has 0 to {self.cfg.vocab_size - 1}.")


# ------------------------------------------------------------------------------------------------
# Training: the same for every task
#
# A task is built from the settings and a seed, and has
#   name, vocab_size, T         T = tokens of one sequence
#   cases                       what the cases of a metric are called, if it has cases
#   make_batch(step)            -> tokens (B, T), targets (B, M) of training step `step`, and further
#                               facts about the batch if score wants them
#   test                        a batch that training never shows
#   score(tokens, targets, logits, *facts)     -> {metric: number, or {case: number}}
#   chance                      the same metrics of the best constant guess
#   show(tokens, targets, guess=None)  -> one example as text
#   model(cfg)                  if it is not to be SleepLM

# Flags that do not change what a model learns, and the values where a preset says nothing.
RUN_FLAGS = ("N_test", "lesion", "experiment", "film", "data", "out", "resume", "plot_only", "preset")
DEFAULTS = dict(eviction="hard", loop="all", update_rule="gated_delta", conv="as", taps=3,
                N_test=[], warmup=0, cooldown=0.0, seed=[0])


class Parser(argparse.ArgumentParser):
    """Bad input gets one line, and exit status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def parse(doc, presets, add_task_flags, argv=None):
    """Command line -> the parser and the settings: the preset's values, then what the flags say."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=list(presets), help="default: gpu with CUDA, else cpu")
    first.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    p = Parser(description=doc, parents=[first], allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_flags(p.add_argument_group("task"))
    f = p.add_argument_group("model and training")
    f.add_argument("--N", type=int, nargs="+", help="passes of a sleep; one model for each value")
    f.add_argument("--any_N", action="store_true", help="draw N anew for every batch, from 1 to N")
    f.add_argument("--N_test", type=int, nargs="*", help="test the trained models with these N too")
    f.add_argument("--lesion", action="store_true",
                   help="test with S = 0 after every eviction too: is S used at all?")
    f.add_argument("--L", type=int, help="window of attention in tokens")
    f.add_argument("--layout", help="one letter a block: a = attention, s = SSM")
    f.add_argument("--d_model", type=int, help="width")
    f.add_argument("--n_head", type=int, help="heads of every mixer")
    f.add_argument("--eviction", help="hard: only S survives; sliding: also L - 1 tokens")
    f.add_argument("--loop", help="looped blocks: all, middle (half), or a slice first:last")
    f.add_argument("--update_rule", help=", ".join(RULES))
    f.add_argument("--conv", help="mixers behind a short convolution: as, s (the paper), a or ''")
    f.add_argument("--taps", type=int, help="tokens that the short convolution sees")
    f.add_argument("--steps", type=int, help="training steps")
    f.add_argument("--batch_size", type=int, help="sequences a step")
    f.add_argument("--lr_muon", type=float, help="learning rate of the blocks' matrices")
    f.add_argument("--lr_adamw", type=float, help="learning rate of all other parameters")
    f.add_argument("--warmup", type=int,
                   help="first steps, with attention blocks frozen and hard eviction, also in the "
                   "evaluations among them (Section 6.4)")
    f.add_argument("--cooldown", type=float, help="last share of the steps: rates fall to 0")
    f.add_argument("--eval_every", type=int, help="steps between evaluations and checkpoints")
    f.add_argument("--seed", type=int, nargs="+", help="of weights and data; one model for each")
    f.add_argument("--compile", action=argparse.BooleanOptionalAction,
                   help="fuse a pass with torch.compile; default: on CUDA only")
    f.add_argument("--recompute", action="store_true", help="save memory: keep no more of a pass than "
                   "h and S, and repeat it for the gradient (activation checkpointing)")
    p.add_argument("--out", type=Path, help="folder for results; default: a new out/TASK-PRESET")
    p.add_argument("--resume", action="store_true", help="go on where the runs in --out stopped")
    p.add_argument("--plot_only", action="store_true", help="draw the plot of --out again")

    known, _ = first.parse_known_args(argv)
    try:
        device = pick_device(known.device)
    except ValueError as e:
        p.error(e)
    preset = known.preset or ("gpu" if device == "cuda" and "gpu" in presets else "cpu")
    p.set_defaults(**DEFAULTS | dict(compile=device == "cuda") | presets[preset])
    args = p.parse_args(argv)
    args.preset, args.device = preset, device
    args.N, args.seed = list(dict.fromkeys(args.N)), list(dict.fromkeys(args.seed))
    return p, args


def config(task, settings):
    """The Config of a model for a task."""
    return Config(task.vocab_size, task.T, **{k: settings[k] for k in (
        "L", "N", "layout", "d_model", "n_head", "eviction", "loop", "update_rule", "conv", "taps")})


def pick_device(name):
    """'auto' takes CUDA, else MPS, else the CPU. ValueError if the device is not there."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        return next(d for d in there if there[d])
    if name not in there:
        raise ValueError(f"device '{name}' must be auto, {', '.join(there)}.")
    if not there[name]:
        raise ValueError(f"there is no {name} device here: take --device cpu.")
    return name


def describe(device):
    """What a number was measured on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{device}, {torch.get_num_threads()} threads"


def can_compile(device):
    try:
        torch.compile(torch.sin)(torch.ones(1, device=device))
        return True
    except Exception:                      # no C++ compiler, no Triton: each has its own error
        return False


def pick_out(args, task_name):
    """The folder of results. Nothing that a run has finished is ever written over."""
    go_on = args.resume or args.plot_only
    if args.out is None:
        base, i = Path("out") / f"{task_name}-{args.preset}", 1
        folders = [base]
        while folders[-1].exists():
            i += 1
            folders.append(base.with_name(f"{base.name}-{i}"))
        if go_on and i == 1:
            raise ValueError(f"there is no {base} to go on with: name the folder with --out.")
        return folders[-2 if go_on else -1]
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"{args.out} is a file, not a folder: choose another --out.")
    if not go_on and args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"{args.out} is not empty: add --resume to go on with its runs, or choose "
                         "another --out.")
    return args.out


def write(path, save):
    """Make a file whole or not at all: `save(temporary path)`, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    save(temporary)
    os.replace(temporary, path)


class Muon(torch.optim.Muon):
    """torch.optim.Muon with all matrices of one shape in one batch: far fewer kernels to launch.

    For its defaults only: with Nesterov's momentum, and rates scaled as "original".
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), batch in shapes.items():
                grads, momentum = [p.grad for p in batch], group["momentum"]
                for p in batch:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                averages = [self.state[p]["momentum_buffer"] for p in batch]
                torch._foreach_lerp_(averages, grads, 1 - momentum)
                G = torch.stack(torch._foreach_lerp(grads, averages, momentum)).bfloat16()
                X = G.mT if rows > columns else G                              # (n, short, long)
                X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
                a, b, c = group["ns_coefficients"]
                for _ in range(group["ns_steps"]):                             # Newton-Schulz
                    A = X @ X.mT
                    X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
                X = (X.mT if rows > columns else X).to(batch[0].dtype)
                torch._foreach_mul_(batch, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(batch, X.unbind(),
                                    alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def make_optimizers(model, lr_muon, lr_adamw):
    """Muon for the matrices of the blocks, AdamW for all else (Section 6.1).

    paper does not say: the weight decay. None here.
    """
    matrices = [m.weight for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    return (Muon(matrices, lr=lr_muon, weight_decay=0.0),
            torch.optim.AdamW(rest, lr=lr_adamw, weight_decay=0.0,
                              fused=rest[0].is_cuda))


def make_gradients(model, compile, recompute_passes):
    """-> f(tokens (B, T), targets (B, M)), the loss; its gradients are then in p.grad.

    compile: fuse model.one_pass. On CUDA f then also records its kernels once for each shape of batch
    and replays them as one CUDA graph, so that none waits for Python; the loss that it returns is
    written over by the next call. recompute_passes: activation checkpointing, see --recompute; such
    passes are long enough to hide Python, and a graph would keep their memory for every shape.
    """
    if compile:
        torch._dynamo.config.recompile_limit = 64      # one graph for each shape and kind of call
        model.one_pass = torch.compile(model.one_pass, fullgraph=True, dynamic=False)
    if recompute_passes:
        model.one_pass = partial(recompute, model.one_pass, use_reentrant=False,
                                 preserve_rng_state=False)                     # nothing is random
    replays = compile and not recompute_passes and model.head.weight.is_cuda
    graphs, side = {}, torch.cuda.Stream() if replays else None

    def eager(tokens, targets):
        model.zero_grad()
        loss = model(tokens, targets)[1]
        loss.backward()
        return loss.detach()

    def replayed(tokens, targets):
        learning = tuple(p.requires_grad for p in model.parameters())
        key = tokens.shape, targets.shape, model.cfg.eviction, model.cfg.N, learning
        if key not in graphs:
            inputs = tokens.clone(), targets.clone()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):                     # compile, and settle all libraries
                    eager(*inputs)
            torch.cuda.current_stream().wait_stream(side)
            # The graph makes gradients of its own, since p.grad is None before it. All graphs share
            # memory: only the gradients of the latest replay are ever read.
            graph, pool = torch.cuda.CUDAGraph(), next((g.pool() for g, *_ in graphs.values()), None)
            with torch.cuda.graph(graph, pool=pool, stream=side):
                loss = eager(*inputs)
            graphs[key] = graph, inputs, loss, [p.grad for p in model.parameters()]
        graph, inputs, loss, grads = graphs[key]
        for old, new in zip(inputs, (tokens, targets)):
            old.copy_(new)
        graph.replay()
        for p, grad in zip(model.parameters(), grads):
            p.grad = grad
        return loss

    return replayed if side else eager


@torch.no_grad()
def evaluate(model, task, batch, **change):
    """Metrics and likeliest answers, from one teacher-forced forward pass.

    change: fields of Config that differ for this test, N = 4 or keep_S = False.
    """
    tokens, targets, *facts = batch
    rows = max(1, 2 ** 17 // tokens.shape[1])                                  # at a time
    cfg, model.cfg = model.cfg, replace(model.cfg, **change)
    with torch.compiler.set_stance("force_eager"):             # these shapes are not worth compiling
        logits = torch.cat([model(x, y)[0] for x, y in zip(tokens.split(rows), targets.split(rows))])
    model.cfg = cfg
    return task.score(tokens, targets, logits, *facts), logits.argmax(-1)


def peak_memory(device):
    """Bytes at the most: of tensors on CUDA (since the last reset), else of the process so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if device == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource                    # not on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def number(value):
    """A metric as text: 0.912, or one number a case, 1: 0.998  2: 0.913."""
    if isinstance(value, dict):
        return "  ".join(f"{case}: {x:.3f}" for case, x in value.items())
    return f"{value:.3f}"


def line(metrics):
    """All metrics as one line of text."""
    return " | ".join(f"{name} {number(value)}" for name, value in metrics.items())


class Stopped(Exception):
    """Training ended early, for the reason given; all that is worth keeping is on disk."""


def timed(f, device, seconds):
    """Milliseconds of f(): median and interquartile range, warm and synchronised."""
    call = (lambda: (f(), torch.mps.synchronize())) if device == "mps" else f      # Timer waits for CUDA
    timer = Timer("f()", globals=dict(f=call), num_threads=torch.get_num_threads())
    once = timer.timeit(2).median
    m = timer.blocked_autorange(min_run_time=max(seconds, 5 * once))
    return 1e3 * m.median, 1e3 * m.iqr


def costs(build, cfg, tokens, targets, device):
    """Of build(cfg): parameters, FLOP of a training step, milliseconds to answer one token.

    FLOP: matrix products only, a backward pass counted as two forward passes. The answer is timed
    in eager float32 for a batch of one, right after a hard eviction.
    """
    model = build(cfg).to(device)
    token, memory = torch.zeros(1, 1, dtype=torch.long, device=device), model.empty_memory(1)
    with torch.no_grad():
        # FlopCounterMode does not see inside the CPU's fused attention.
        with FlopCounterMode(display=False) as count, sdpa_kernel(SDPBackend.MATH):
            model(tokens[:1], targets[:1])
        wake, _ = timed(lambda: model.wake(token, memory), device, 0.2)
    return dict(parameters=sum(p.numel() for p in model.parameters()),
                flop=3 * count.get_total_flops() * len(tokens), wake_ms=wake)


def train(task, cfg, settings, out, report, resume=False, N_test=(), lesion=False):
    """Train one model. Every `eval_every` steps: evaluate, save a checkpoint, report(run).

    Returns the model and its run, a dict (see README, results.json). Raises Stopped after Ctrl-C
    and if the loss or a weight is not finite, ValueError if the checkpoint to resume does not fit.
    """
    device, steps, name = settings["device"], settings["steps"], f"N {cfg.N} seed {settings['seed']}"
    path = checkpoint(out, settings)
    saved = load_checkpoint(path, settings) if resume and path.exists() else None
    torch.manual_seed(settings["seed"])
    build = getattr(task, "model", SleepLM)
    model = build(cfg).to(device)
    model.bf16 = device == "cuda"
    gradients = make_gradients(model, settings["compile"], settings["recompute"])
    rates = settings["lr_muon"], settings["lr_adamw"]
    optimizers = make_optimizers(model, *rates)
    run = dict(task=task.name, N=cfg.N, seed=settings["seed"], steps=0, tokens=0, seconds=0.0,
               peak_memory=0, chance=task.chance, curve=[], settings=settings,
               torch=str(torch.__version__), device=describe(device))
    total, since = 0.0, 0                  # training loss, summed since the last evaluation
    grad_norm = torch.zeros((), device=device)         # the largest since then
    seen = 0                               # tokens since the last report
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if saved:
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        run, total, since, grad_norm = (saved[k] for k in ("run", "total", "since", "grad_norm"))

    interrupted = []

    def interrupt(*_):                     # finish the step; a second Ctrl-C does not wait for it
        interrupted.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, interrupt)
    start = time.time() - run["seconds"]
    bar = tqdm(total=steps, initial=run["steps"], desc=name, disable=None, leave=False)
    try:
        for step in range(run["steps"], steps):
            falling = min(1.0, (steps - step) / max(1.0, settings["cooldown"] * steps))
            for optimizer, rate in zip(optimizers, rates):
                optimizer.param_groups[0]["lr"] = rate * falling
            # Section 6.4: SSM blocks stay unused if attention learns to do without: they go first.
            warming = step < settings["warmup"]
            model.cfg.eviction = "hard" if warming else settings["eviction"]
            if settings["any_N"]:
                key = settings["seed"] * 10 ** 9 + step
                model.cfg.N = random.Random(key).randint(1, settings["N"])
            for block in model.blocks:
                block.requires_grad_(block.kind == "s" or not warming)
            tokens, targets, *_ = task.make_batch(step)
            total += gradients(tokens, targets)
            grad_norm = grad_norm.maximum(nn.utils.get_total_norm(
                [p.grad for p in model.parameters() if p.grad is not None]))
            for optimizer in optimizers:
                optimizer.step()
            seen += tokens.numel()
            bar.update()

            done = step + 1
            evaluating = done % settings["eval_every"] == 0 or done == steps
            if not (evaluating or interrupted):
                continue
            mean = float(total) / (done - since)
            if not (math.isfinite(mean) and all(p.isfinite().all() for p in model.parameters())):
                kept = f"{path} keeps step {run['steps']}" if path.exists() else "nothing was saved yet"
                raise Stopped(f"{name}: the loss or a weight is not finite after step {done}; {kept}. "
                              "Try smaller learning rates.")
            run.update(steps=done, tokens=run["tokens"] + seen, seconds=round(time.time() - start, 1),
                       peak_memory=max(run["peak_memory"], peak_memory(device)))
            seen = 0
            if evaluating:
                metrics, _ = evaluate(model, task, task.test, N=settings["N"])
                next_batch, _ = evaluate(model, task, task.make_batch(done), N=settings["N"])
                run.update(metrics, seconds=round(time.time() - start, 1))
                run["curve"].append(dict(step=done, tokens=run["tokens"], seconds=run["seconds"],
                                         train_loss=mean, grad_norm=grad_norm.item(), train=next_batch,
                                         **metrics))
                total, since, grad_norm = 0.0, done, torch.zeros_like(grad_norm)
                tqdm.write(f"{name} | step {done} | {run['tokens'] / 1e6:.2f}M tokens | train loss "
                           f"{mean:.3f} | {line(metrics)} | {run['seconds']:.0f} s")
            write(path, lambda p: torch.save(dict(
                model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers],
                run=run, total=float(total), since=since, grad_norm=grad_norm), p))
            report(run)
            if interrupted:
                raise Stopped(f"{name}: stopped after step {done} of {steps}, which is saved. To go "
                              f"on: the same command with --resume --out {out}")
    finally:
        bar.close()
        signal.signal(signal.SIGINT, previous)
    model.cfg.N = settings["N"]
    run |= costs(build, model.cfg, *task.make_batch(0)[:2], device)
    run["N_test"] = {str(n): evaluate(model, task, task.test, N=n)[0] for n in N_test}
    if lesion:
        run["lesion"] = evaluate(model, task, task.test, keep_S=False)[0]
    report(run)
    return model, run


def checkpoint(out, settings):
    return out / f"N{settings['N']}-seed{settings['seed']}.pt"


def load_checkpoint(path, settings):
    """ValueError if the file is broken or was made with other settings."""
    try:
        saved = torch.load(path, map_location=settings["device"], weights_only=True)
        old = saved["run"]["settings"]
    except Exception as e:                 # torch.load raises many kinds for a broken file
        raise ValueError(f"{path} is not a checkpoint that can be read ({type(e).__name__}): delete "
                         "it to train this model anew.") from None
    refuse_other_settings(path, old, settings, but=("compile", "recompute"))
    return saved


def refuse_other_settings(path, old, new, but):
    other = [f"{k} was {old.get(k)}, is {new.get(k)}" for k in sorted({*old, *new} - {*but})
             if old.get(k) != new.get(k)]
    if other:
        raise ValueError(f"{path} was made with other settings ({'; '.join(other)}): resume with the "
                         "same ones, or choose another --out.")


def load_results(path):
    """The runs in a results.json. ValueError if it cannot be read."""
    try:
        runs = json.loads(path.read_text())["runs"]
        return sorted(runs, key=lambda run: (run["seed"], run["N"]))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} cannot be read as results ({type(e).__name__}).") from None


def pyplot():
    """matplotlib.pyplot without a screen."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def save_figure(fig, path):
    write(path, lambda p: fig.savefig(p, format="png", dpi=120))
    pyplot().close(fig)


def plot(runs, path, cases):
    """One panel a metric and case, one colour an N, one line a seed, the constant guess dashed."""
    plt = pyplot()
    rows = [[(metric, case) for case in chance] if isinstance(chance, dict) else [(metric, None)]
            for metric, chance in runs[0]["chance"].items()]
    if all(len(row) == 1 for row in rows):
        rows = [[row[0] for row in rows]]

    def pick(metrics, metric, case):
        return metrics[metric] if case is None else metrics[metric][case]

    width, height = max(len(row) for row in rows), len(rows)
    fig, axes = plt.subplots(height, width, figsize=(3.2 * width + 1, 3 * height + 0.6),
                             squeeze=False, sharex=True, sharey="row", layout="constrained")
    for y, row in enumerate(rows):
        for x, (metric, case) in enumerate(row):
            ax = axes[y, x]
            for color, N in enumerate(sorted({run["N"] for run in runs})):
                for i, run in enumerate(run for run in runs if run["N"] == N):
                    ax.plot([point["tokens"] / 1e6 for point in run["curve"]],
                            [pick(point, metric, case) for point in run["curve"]],
                            color=f"C{color}", marker=".", lw=1.2, label=None if i else f"N = {N}")
            guess = pick(runs[0]["chance"], metric, case)
            ax.axhline(guess, color="gray", ls="--", label=f"constant guess {guess:.3f}")
            ax.set(title=None if case is None else f"{cases} = {case}",
                   ylabel=metric if case is None or x == 0 else None,
                   xlabel="training tokens (millions)" if y == height - 1 else None)
            ax.grid(alpha=0.3)
            ax.legend(fontsize=7)
    s = runs[0]["settings"]
    fig.suptitle(f"{runs[0]['task']}: layout {s['layout']}, d = {s['d_model']}, L = {s['L']}, seeds "
                 + ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs})), fontsize=10)
    save_figure(fig, path)


def main(doc, presets, add_task_flags, Task, argv=None):
    """A whole script: one model for each seed and N on the same data, compared, saved, plotted.

    Exit status: 2 after bad input, 1 if training stopped early, else 0.
    """
    p, args = parse(doc, presets, add_task_flags, argv)
    try:
        out = pick_out(args, Task.name)
        results = out / "results.json"
        runs = load_results(results) if results.exists() else []
        if args.plot_only:
            if not runs:
                raise ValueError(f"{results} is not there, or holds no run to plot.")
            plot(runs, out / "plot.png", Task.cases)
            return print(f"drew {out / 'plot.png'}")
        for flag in ("steps", "batch_size", "eval_every", "lr_muon", "lr_adamw"):
            if not getattr(args, flag) > 0:
                raise ValueError(f"--{flag} must be more than 0, not {getattr(args, flag)}.")
        if not 0 <= args.warmup < args.steps:
            raise ValueError(f"--warmup {args.warmup} must be fewer steps than the {args.steps} of "
                             "--steps, and not negative.")
        if min(args.N_test, default=1) < 1:
            raise ValueError(f"--N_test must be integers >= 1, not {args.N_test}.")
        if not (0 <= min(args.seed) and max(args.seed) <= 10 ** 6 and 0 <= args.cooldown <= 1):
            raise ValueError("--seed must be from 0 to a million, --cooldown from 0 to 1.")
        plans = []
        for seed in args.seed:
            task = Task(args, seed)
            for N in args.N:
                settings = {k: v for k, v in vars(args).items() if k not in RUN_FLAGS}
                settings.update(N=N, seed=seed)
                cfg = config(task, settings)
                plans.append((task, cfg, settings))
                path = checkpoint(out, settings)
                if args.resume and path.exists():
                    load_checkpoint(path, settings)
        for run in runs:
            refuse_other_settings(results, dict(run["settings"], task=run["task"]),
                                  dict(settings, task=task.name),
                                  but=("compile", "recompute", "N", "seed"))
        plans[0][0].make_batch(0)          # data that has to be made first is made here
        task.chance
    except ValueError as e:
        p.error(e)
    except OSError as e:
        p.error(f"{e.filename} cannot be used ({e.strerror}): choose another folder.")
    except KeyboardInterrupt:
        p.exit(1, "stopped before training began; nothing was saved\n")

    if args.compile and not can_compile(args.device):
        print("torch.compile finds no compiler here: going on without it.")
        for *_, settings in plans:
            settings["compile"] = False
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        p.error(f"the folder {out} cannot be made ({e.strerror}): choose another --out.")
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")                             # TF32
    print(f"{p.prog} --preset {args.preset}: " + ", ".join(
        f"{k} {v}" for k, v in sorted(vars(args).items())))
    print(f"{sum(p.numel() for p in SleepLM(plans[0][1]).parameters()):,} parameters | best constant "
          f"guess: {line(task.chance)} | results go to {out}")
    tokens, targets, *_ = task.test
    print("one example:", task.show(tokens[0], targets[0]), sep="\n")

    def report(run):
        for old in [r for r in runs if (r["N"], r["seed"]) == (run["N"], run["seed"])]:
            if old["steps"] == run["steps"]:                   # what it was tested with before
                run["N_test"] = old.get("N_test", {}) | run.get("N_test", {})
                run |= {"lesion": old["lesion"]} if "lesion" in old and "lesion" not in run else {}
            runs.remove(old)
        runs.append(run)
        write(results, lambda p: p.write_text(json.dumps({"runs": runs}, indent=1)))

    done = []
    try:
        for task, cfg, settings in plans:
            model, run = train(task, cfg, settings, out, report, args.resume, args.N_test, args.lesion)
            done.append(run)
            plot(runs, out / "plot.png", Task.cases)
    except Stopped as e:
        p.exit(1, f"{e}\n")
    except KeyboardInterrupt:
        p.exit(1, f"stopped; {out} holds what was done, --resume goes on from there\n")
    for r in done:
        for n, metrics in r["N_test"].items():
            print(f"trained with N = {r['N']}, seed {r['seed']}; tested with N = {n}: {line(metrics)}")
        if args.lesion:
            print(f"trained with N = {r['N']}, seed {r['seed']}; tested with S = 0: {line(r['lesion'])}")
    _, answers = evaluate(model, task, task.test)
    wrong = ((answers != targets) & (targets >= 0)).any(1).nonzero().flatten().tolist()
    print(f"N = {cfg.N}, seed {settings['seed']} is wrong in {len(wrong)} of {len(tokens)} sequences:")
    for i in wrong[:3]:
        print(task.show(tokens[i], targets[i], answers[i]))
    metrics = list(task.chance)
    print("| N | seed | parameters | steps | tokens | TFLOP | seconds | peak GB | ms to answer |",
          *(f"{m} (guess) |" for m in metrics))
    print("|---" * (9 + len(metrics)) + "|")
    for r in done:
        print(f"| {r['N']} | {r['seed']} | {r['parameters']:,} | {r['steps']} | "
              f"{r['tokens'] / 1e6:.1f}M | {r['flop'] * r['steps'] / 1e12:.1f} | {r['seconds']:.0f} | "
              f"{r['peak_memory'] / 1e9:.2f} | {r['wake_ms']:.2f} |",
              *(f"{number(r[m])} ({number(r['chance'][m])}) |" for m in metrics))
    print(f"saved: {results}, {out / 'plot.png'}")


# ------------------------------------------------------------------------------------------------
# The benchmark: python sleep.py

def ms(t):
    return f"{t[0]:9.3f} ms (+-{t[1]:.3f})"


def bench_rule(device, quick, compile, seconds):
    """Time and error of every form of the rule: forward, and forward and backward.

    Keys repeat (4 of them, the hard case, see unit_lower_inverse); q, k, v are bfloat16 numbers, as
    the matrix products of a block make them on a GPU. The error is the largest relative distance of
    o, S and the six gradients from the recurrent rule in float64; on CUDA our forms take TF32
    products, and the kernel's casts to bfloat16 are part of its time.
    """
    shapes = [(512, 4, 24, 64), (128, 8, 75, 64), (8, 8, 2048, 64), (4, 8, 4096, 64)]
    if device != "cuda":
        shapes = [(32, 4, 24, 64), (8, 4, 75, 64), (2, 8, 2048, 64)]

    def solve(A):                          # torch's own (I + A)^-1
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
        return torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)

    def chunked_solve(*inputs):
        return gated_delta_rule_chunked(*inputs, inverse=solve)

    rules = {"recurrent": gated_delta_rule, "chunked": gated_delta_rule_chunked,
             "chunked, solve_triangular": chunked_solve}
    if compile:
        rules |= {f"{name}, compiled": torch.compile(rule, dynamic=False)
                  for name, rule in rules.items() if "chunked" in name}
    if device == "cuda":
        try:
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule    # wants (B, T, H, K)

            def fla(q, k, v, log_alpha, beta, S):
                q, k, v = (x.transpose(1, 2).bfloat16() for x in (q, k, v))
                o, S = chunk_gated_delta_rule(q, k, v, log_alpha.mT, beta.mT, scale=1.0,
                                              initial_state=S.mT, output_final_state=True)
                return o.transpose(1, 2), S.mT
            rules["fla's Triton kernel"] = fla
        except Exception as e:             # not installed, or not for this Triton
            print(f"  without fla-core's kernel ({type(e).__name__})")
    rows = []
    for B, H, T, K in shapes[:2] if quick else shapes:
        g = torch.Generator(device).manual_seed(0)
        rand = lambda *shape: torch.randn(*shape, generator=g, device=device)
        which = torch.randint(4, (B, H, T, 1), generator=g, device=device).expand(B, H, T, K)
        k = F.normalize(rand(B, H, 4, K), dim=-1).gather(2, which)
        q, k, v = (x.bfloat16().float() for x in (F.normalize(rand(B, H, T, K), dim=-1), k,
                                                  rand(B, H, T, K)))
        inputs = [q, k, v, -0.05 * rand(B, H, T).exp(), (2 + rand(B, H, T)).sigmoid(), rand(B, H, K, K)]
        weights = rand(B, H, T, K), rand(B, H, K, K)

        def forward(rule):
            with torch.no_grad():
                return rule(*inputs)

        def both(rule, inputs=inputs):
            leaves = [x.detach().requires_grad_() for x in inputs]
            results = rule(*leaves)
            loss = sum((x * w.to(x.device)).sum() for x, w in zip(results, weights))
            return [*results, *torch.autograd.grad(loss, leaves)]

        oracle = "cpu" if device == "mps" else device                          # MPS has no float64
        exact = both(gated_delta_rule, [x.to(oracle).double() for x in inputs])
        for name, rule in rules.items():
            if T >= 2048 and "compiled" in name:
                continue                   # its chunks are unrolled: minutes to compile
            row = dict(shape=[B, H, T, K], rule=name)
            try:
                row["forward"] = timed(lambda: forward(rule), device, seconds)
                row["error"] = max(((x.to(y.device) - y).norm() / y.norm()).item()
                                   for x, y in zip(both(rule), exact))
                row["both"] = timed(lambda: both(rule), device, seconds)
            except Exception as e:         # a kernel that refuses this GPU, or needs more memory
                row["failed"] = f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"
            rows.append(row)
            shown = [f"forward {ms(row['forward'])}"] if "forward" in row else []
            shown += [row["failed"]] if "failed" in row else [f"with backward {ms(row['both'])}",
                                                              f"error {row['error']:.0e}"]
            print(f"  {str((B, H, T, K)):18} {name:35}", ", ".join(shown), flush=True)
    return rows


def bench_model(device, compile, T, B, M=4, **settings):
    """A model, f() = one training step on random tokens, M of them predicted, and its batch."""
    torch.manual_seed(0)
    model = SleepLM(Config(vocab_size=3, T=T, **settings)).to(device)
    model.bf16 = device == "cuda"
    gradients, optimizers = make_gradients(model, compile, False), make_optimizers(model, 1e-3, 1e-3)
    tokens, targets = (torch.randint(3, (B, n), device=device) for n in (T, M))

    def step():
        gradients(tokens, targets)
        for optimizer in optimizers:
            optimizer.step()
    return model, step, tokens, targets


def bench_N(device, quick, compile, seconds):
    """A training step of Section 6.1 (on a CPU: of the cpu preset of train_ca.py) against N."""
    size = dict(T=100, B=512, L=24, layout="asas", d_model=256, n_head=4)
    if device != "cuda":
        size = dict(T=34, B=16 if quick else 256, M=2, L=16, layout="as", d_model=64, n_head=2, taps=4)
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    ceiling = 2 * n ** 3 / timed(lambda: a @ b, device, seconds)[0]            # FLOP per ms
    del a, b                               # peak memory is that of a step
    print(f"  {ceiling / 1e9:.2f} TFLOP/s in a matrix product of {n} x {n}, {dtype}: the ceiling")
    rows = []
    for N in (1, 2) if quick else (1, 2, 4, 8):
        model, step, tokens, targets = bench_model(device, compile, N=N, **size)
        work = costs(SleepLM, model.cfg, tokens, targets, device)["flop"]
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        t = timed(step, device, seconds)
        rows.append(dict(N=N, step=t, tokens_per_s=1e3 * size["B"] * size["T"] / t[0],
                         ratio=t[0] / rows[0]["step"][0] if rows else 1.0, flop=work,
                         share=work / ceiling / t[0], peak=peak_memory(device)))
        r = rows[-1]
        print(f"  N = {N}: {ms(t)}, {r['tokens_per_s']:,.0f} tokens/s, {r['ratio']:.2f} x N = 1, "
              f"{100 * r['share']:.0f} % of the ceiling"
              + (f", peak {r['peak'] / 1e9:.2f} GB" if device == "cuda" else ""), flush=True)
    return rows


def bench_L(device, quick, compile, seconds):
    """Figure 6: training tokens per second against the window at a fixed length T, and against N.

    L = T is the fully parallel model: one window, all T tokens at once, attention to all of them.
    Not compiled, since every L would be compiled anew.
    """
    size = dict(T=12000, B=4, layout="as", d_model=512, n_head=8)
    windows = [512, 1000, 2000, 4000, 12000]
    if device != "cuda":
        size, windows = dict(T=1024, B=1 if quick else 4, layout="as", d_model=64, n_head=2), [
            32, 64, 128, 256, 1024]
    rows = []
    for L in windows[1:-1:2] if quick else windows:
        for N in (1,) if L == size["T"] else (1, 2) if quick else (1, 2, 4):
            _, step, *_ = bench_model(device, False, N=N, L=L, **size)
            t = timed(step, device, seconds)
            rows.append(dict(L=L, N=N, step=t, tokens_per_s=1e3 * size["B"] * size["T"] / t[0]))
            print(f"  T = {size['T']}, L = {L:5}, N = {N}: {rows[-1]['tokens_per_s']:12,.0f} tokens/s, "
                  f"{ms(t)}", flush=True)
    return rows


def bench_wake(device, quick, compile, seconds):
    """One stream: time of an answered token, of a sleep, and bytes of what is remembered."""
    size = dict(T=12000, L=512, layout="asas", d_model=512, n_head=8)
    if device != "cuda":
        size = dict(T=1024, L=64, layout="as", d_model=64, n_head=2)
    rows = []
    for N in (1, 2) if quick else (1, 2, 4, 8):
        torch.manual_seed(0)
        model = SleepLM(Config(vocab_size=3, N=N, **size)).to(device)
        window = torch.randint(3, (1, size["L"]), device=device)
        with torch.no_grad():
            h, empty = model.embed(window), model.empty_memory(1)
            slept = model.sleep(h, empty)
            _, full = model.wake(window[:, 1:], slept)         # a cache of L - 1 tokens
            wake = timed(lambda: model.wake(window[:, :1], full), device, seconds)
            sleep = timed(lambda: model.sleep(h, empty), device, seconds)
        bytes_S = sum(S.nbytes for S in full.S if S is not None)
        bytes_cache = sum(x.nbytes for c in full.cache for x in c[1:]) * size["L"] // (size["L"] - 1)
        rows.append(dict(N=N, wake=wake, sleep=sleep, bytes_S=bytes_S, bytes_cache=bytes_cache,
                         bytes_full_attention=bytes_cache * size["T"] // size["L"]))
        print(f"  N = {N}: a token {ms(wake)}, a sleep {ms(sleep)}", flush=True)
    print(f"  bytes: S {bytes_S:,}, cache of a full window {bytes_cache:,}, of all {size['T']:,} tokens "
          f"{rows[-1]['bytes_full_attention']:,}")
    return rows


def benchmark(argv=None):
    """Measure the rule, a training step, Figure 6, and waking; print, save and plot it."""
    p = Parser(description=benchmark.__doc__, allow_abbrev=False)
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    p.add_argument("--quick", action="store_true", help="fewer cases, shorter: does it run?")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA only")
    p.add_argument("--out", type=Path, help="folder for results; default: a new out/benchmark-DEVICE")
    args = p.parse_args(argv)
    try:
        device = args.preset = pick_device(args.device)
        args.resume = args.plot_only = False
        out = pick_out(args, "benchmark")
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as e:
        p.error(e)
    compile = (device == "cuda" if args.compile is None else args.compile) and can_compile(device)
    torch._dynamo.config.recompile_limit = 64          # one graph for each shape and kind of call
    if device == "cuda":
        torch.set_float32_matmul_precision("high")                             # TF32
    name = describe(device)
    print(f"{name}, torch {torch.__version__}, {'compiled' if compile else 'eager'}; medians and "
          "interquartile ranges")
    results, settings = dict(device=name, torch=str(torch.__version__), compile=compile), (
        device, args.quick, compile, 0.2 if args.quick else 1.0)
    for title, bench in (("the rule (B, H, T, K)", bench_rule), ("a training step against N", bench_N),
                         ("Figure 6: tokens per second", bench_L), ("waking and sleeping", bench_wake)):
        print(title)
        results[bench.__name__] = bench(*settings)
        write(out / "results.json", lambda p: p.write_text(json.dumps(results, indent=1)))
    plot_benchmark(results, out / "plot.png")
    print(f"saved: {out / 'results.json'}, {out / 'plot.png'}")


def plot_benchmark(results, path):
    """Four panels, one a part of the benchmark."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 4, figsize=(18, 4), layout="constrained")
    rule = [r for r in results["bench_rule"] if "both" in r]
    shapes = list(dict.fromkeys(str(r["shape"]) for r in rule))
    names = list(dict.fromkeys(r["rule"] for r in rule))
    for i, name in enumerate(names):
        rows = [r for r in rule if r["rule"] == name]
        axes[0].bar([shapes.index(str(r["shape"])) + 0.8 * i / len(names) for r in rows],
                    [r["both"][0] for r in rows], 0.8 / len(names), label=name)
    axes[0].set(yscale="log", xlabel="B, H, T, K", ylabel="ms, forward and backward",
                title="the rule", xticks=range(len(shapes)), xticklabels=shapes)
    N = [r["N"] for r in results["bench_N"]]
    axes[1].errorbar(N, [r["step"][0] for r in results["bench_N"]],
                     [r["step"][1] for r in results["bench_N"]], marker="o", label="measured")
    axes[1].plot(N, [n * results["bench_N"][0]["step"][0] for n in N], "k--", label="N times N = 1")
    axes[1].set(xlabel="N", ylabel="ms", title="a training step")
    for n in sorted({r["N"] for r in results["bench_L"]}):
        rows = [r for r in results["bench_L"] if r["N"] == n]
        axes[2].plot([r["L"] for r in rows], [r["tokens_per_s"] for r in rows], "o-", label=f"N = {n}")
    windows = sorted({r["L"] for r in results["bench_L"]})
    axes[2].set(xscale="log", yscale="log", xlabel="L; the last is one window of all T tokens",
                ylabel="training tokens per second", title="Figure 6")
    axes[2].set_xticks(windows, windows, minor=False)
    for what, label in (("wake", "a token, awake"), ("sleep", "a sleep")):
        axes[3].plot([r["N"] for r in results["bench_wake"]],
                     [r[what][0] for r in results["bench_wake"]], "o-", label=label)
    axes[3].set(xscale="log", yscale="log", xlabel="N", ylabel="ms", title="one stream")
    axes[3].set_xticks(N, N, minor=False)
    axes[3].minorticks_off()
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    fig.suptitle(f"{results['device']}, torch {results['torch']}", fontsize=10)
    save_figure(fig, path)


if __name__ == "__main__":
    benchmark()
