"""sleep.py: language models that sleep, in one file.

"Do Language Models Need Sleep? Offline Recurrence for Improved Online Inference", Lee, McLeish,
Goldstein, Fanti, arXiv 2605.26099. Sections, equations and lines are those of version 3.

Attention sees a window of L tokens. SSM blocks (state-space models) carry fast weights S: a matrix
that maps keys to values and is written token by token. When the window is full, the model sleeps:
it makes N passes over the window through all blocks, and hands the features h and the fast weights
S from pass to pass. Then the window is evicted. Under hard eviction only S remains. An answer takes
one pass, whatever N is. N = 1 is the plain hybrid of attention and SSM blocks.

  name       paper      meaning                                          shape
  T                     tokens of this call
  tokens     x, c       B sequences                                      (B, T)
  targets    x, m       what the last M positions are to predict;        (B, M)
                        negative where the loss mask m is 0
  h          h          features (hidden states): a vector of width d    (B, T, d)
                        per token
  q k v      q k v      query, key, value                                (B, H, T, K or V)
  H, K, V               heads; sizes of a key and of a value, both d / H
  alpha      alpha_t    the share of S that a token keeps; log_alpha <= 0   (B, H, T)
  beta       beta_t     how strongly a token is written, in (0, 1)       (B, H, T)
  S          S_t        fast weights: they map k_t to about v_t          (B, H, V, K)
  L, N       L, N       window length (of what the paper calls a chunk); passes of a sleep
  P                     tokens in the cache when a call begins

The order of this file: the fast-weight rule, token by token; the model and its sleep; its layers;
training. Then one line says: skip the rest at first reading. Functions named check_* are there: they
refuse bad input with a sentence (BadInput, a ValueError); some also convert it, as integers to int64.

`python sleep.py` shows a trained model asleep, if the folder lab/ is beside this file.
"""
import math
import operator
import time
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm import tqdm


# ------------------------------------------------------------------------------------------------
# The fast-weight rule

def fast_weight_rule(q, k, v, log_alpha, beta, S, delta=True):
    """One token after another: the definition. (Training uses the same rule as matrix products.)

    Eq. 3 is a gated Hebbian write, delta=False here:
        S_t = alpha_t S_{t-1} + beta_t v_t k_t^T,    o_t = S_t q_t
    Gated DeltaNet, the default, writes only what S lacks at k_t:
        S_t = alpha_t S_{t-1} + beta_t (v_t - alpha_t S_{t-1} k_t) k_t^T
            = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T

    Shapes as in the glossary. Returns o (B, H, T, V) and the last S.
    """
    check_rule(q, k, v, log_alpha, beta, S)
    outputs = []
    for t in range(q.shape[2]):
        q_t = q[:, :, t]                                       # (B, H, K)
        k_t = k[:, :, t]
        v_t = v[:, :, t]                                       # (B, H, V)
        alpha_t = log_alpha[:, :, t].exp()                     # (B, H)
        beta_t = beta[:, :, t]
        S = alpha_t[..., None, None] * S                       # forget
        write_t = v_t
        if delta:
            write_t = v_t - torch.einsum("bhvk,bhk->bhv", S, k_t)      # what S lacks at k_t
        S = S + torch.einsum("bh,bhv,bhk->bhvk", beta_t, write_t, k_t)
        outputs.append(torch.einsum("bhvk,bhk->bhv", S, q_t))  # read
    return torch.stack(outputs, 2), S


# ------------------------------------------------------------------------------------------------
# The model and its sleep

@dataclass(frozen=True)
class Config:
    """The shape of a model, checked when it is made (ValueError)."""
    vocab_size: int
    seq_len: int                   # tokens of a training sequence: how slowly S forgets before training
    L: int                         # window of attention, in tokens
    N: int = 1                     # passes of a sleep, where a call does not say otherwise
    layout: str = "asas"           # one letter per block: a = attention, s = SSM (fast weights)
    d_model: int = 256             # width d
    n_head: int = 4                # heads H of every mixer
    eviction: str = "hard"         # hard: only S survives; sliding: also the latest L - 1 tokens
    update_rule: str = "gated_delta"   # one of UPDATE_RULES
    conv: str = "as"               # letters of the blocks with a short convolution; in the paper: s
    bf16: bool = False             # matrix products of the blocks in bfloat16; the rule in float32

    def __post_init__(self):
        check_config(self)


class Cache(NamedTuple):
    """What a block keeps of its latest P tokens. It is emptied by hard eviction."""
    tail: torch.Tensor             # latest inputs of the short convolution (B, n <= 3, d)
    keys: torch.Tensor | None      # of attention, unrotated (B, H, P, K); None in an SSM block
    values: torch.Tensor | None    # of attention (B, H, P, V); None in an SSM block


class Memory(NamedTuple):
    """All that a model knows of the past. It is passed in and returned, never kept in the module."""
    S: list                        # one per block: fast weights (B, H, V, K), None for attention
    cache: list                    # one Cache per block
    n_awake: int                   # tokens of this window that were read so far; only checked


class SleepLM(nn.Module):
    """A looped hybrid (Eq. 6) that sleeps before it forgets (Section 5, Algorithm 1)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.ModuleList(Block(kind, cfg) for kind in cfg.layout)
        self.norm = nn.RMSNorm(cfg.d_model)
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)     # OutProj
        self.initialize()

    def forward(self, tokens, targets, N=None):
        """Algorithm 1: windows without a target sleep, the others are read in one pass.

        tokens (B, T). targets (B, M): what the last M positions are to predict, already shifted; a
        negative number, such as PyTorch's -100, is no target. N: passes of a sleep. With L = 4:

            tokens     a b c d | e f g h | = y0 y1
            targets                       y0 y1 y2        M = 3: at "=" y0 is predicted
                       asleep    asleep    awake

        Fill whole windows: a window that holds a target does not sleep, so context that shares it
        with an answer is read in one pass. Pad on the left if the context is not a multiple of L.

        The separator "=" opens the window of the answers: without it y0 would be predicted at h, and
        the window e f g h would not sleep.

        Returns logits (B, M, vocab), 0 where a window sleeps, and their mean cross entropy in nats (our
        choice: one mean over the targets of all windows).
        """
        tokens, targets = check_batch(tokens, targets, self.cfg.vocab_size)
        asleep = self.windows_asleep(tokens, targets)
        return self.algorithm_1(tokens, targets, asleep, N)

    def windows_asleep(self, tokens, targets):
        """Line 5, one bool per window: it sleeps if its loss mask is zero.

        Our choice for a batch: a window sleeps only if it has no target in any of the sequences.
        """
        T = tokens.shape[1]
        M = targets.shape[1]
        L = self.cfg.L
        has_target = [False] * (T - M) + (targets >= 0).any(0).tolist()    # T bools
        asleep = [not any(has_target[start:start + L]) for start in range(0, T, L)]
        check_asleep(asleep, has_target, M, L)
        return asleep

    def algorithm_1(self, tokens, targets, asleep, N=None):
        """Algorithm 1, if it is known which windows sleep: asleep, one bool per window.

        Apart from `forward`, since a CUDA graph records it, and cannot branch on the targets. These are
        as check_batch returns them: every negative one is -1.
        """
        M = targets.shape[1]
        logits = []
        memory = self.empty_memory(len(tokens))                            # line 1: S <- 0
        windows = tokens.split(self.cfg.L, dim=1)                          # line 2
        for window, window_sleeps in zip(windows, asleep, strict=True):    # line 3
            h = self.embed(window)                                         # line 4
            if window_sleeps:                                              # line 5
                memory = self.sleep(h, memory, N)                          # lines 6-7
                logits.append(zero_logits(h, self.cfg.vocab_size))
            else:                                                          # line 9
                window_logits, memory = self.wake(h, memory)               # line 10
                memory = self.evict(memory)            # a sleep ends with this, too
                logits.append(window_logits)
        first = (tokens.shape[1] - M) // self.cfg.L    # where the last M positions begin
        logits = torch.cat(logits[first:], 1)[:, -M:]                      # (B, M, vocab)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)   # line 11
        return logits, loss

    def sleep(self, h, memory, N=None):
        """N passes over a window (Algorithm 1, lines 6-7), then eviction (Section 5).

        h (B, T <= L, d): embeddings of the window. Every pass starts from the h and S that the pass
        before returned; between passes h is neither normed nor mixed with the embeddings again. The
        last h is dropped. Nothing is detached: gradients flow through all N passes, and under hard
        eviction they reach a window only through S.

        Returns the memory after eviction. N = 0 is a control: nothing of the window is read. (Under
        sliding eviction the cache of earlier windows then stays as it is.)
        """
        N = self.cfg.N if N is None else whole_number("N", N, 0)
        check_window(h, memory, self.cfg, asleep=True)
        S = memory.S
        cache = memory.cache
        for _ in range(N):                                                 # line 6
            # Every pass sees the cache of earlier windows. With that of the pass before, attention
            # would see the window twice.
            h, S, cache = self.one_pass(h, S, memory.cache)                # line 7
        return self.evict(Memory(S, cache, n_awake=0))

    def evict(self, memory):
        """Hard eviction empties the cache; sliding eviction keeps L - 1 tokens of it. S stays."""
        if self.cfg.eviction == "hard":
            B = len(memory.cache[0].tail)                      # every block has one, perhaps empty
            return Memory(memory.S, self.empty_memory(B).cache, 0)
        keep = self.cfg.L - 1
        cache = []
        for tail, keys, values in memory.cache:
            if keys is not None:
                keys = latest(keys, keep)
                values = latest(values, keep)
            cache.append(Cache(latest(tail, keep), keys, values))          # a tail has <= 3 tokens
        return Memory(memory.S, cache, 0)

    def wake(self, h, memory):
        """One pass over h (B, T, d), the next tokens of a window (Algorithm 1, line 10).

        h are embeddings, as in pass 1 of a sleep, but the S that they read was written by pass N:
        training must make it readable from a first pass. Does not evict, since more tokens of the
        window may follow. Returns logits (B, T, vocab) and the memory, with these tokens in its cache.
        """
        check_window(h, memory, self.cfg)
        h_out, S, cache = self.one_pass(h, memory.S, memory.cache)
        with torch.autocast(h.device.type, enabled=False):     # float32, even inside another autocast
            logits = self.head(self.norm(h_out))
        return logits, Memory(S, cache, memory.n_awake + h.shape[1])

    def one_pass(self, h, S, cache):
        """h, S <- Blocks(h, S): all blocks once. Also returns their caches, with h's tokens added."""
        S = list(S)
        cache = list(cache)
        # cache_enabled=False: inside another autocast, bfloat16 copies of weights from before the
        # optimizer's step would be used again.
        with torch.autocast(h.device.type, torch.bfloat16, self.cfg.bf16, cache_enabled=False):
            for i, block in enumerate(self.blocks):
                h, S[i], cache[i] = block(h, S[i], cache[i])
        return h, S, cache

    def empty_memory(self, B):
        """S = 0 (Algorithm 1, line 1) and empty caches, for B sequences."""
        cfg = self.cfg
        H = cfg.n_head
        K = cfg.d_model // H
        zeros = self.embed.weight.new_zeros
        S = []
        cache = []
        for kind in cfg.layout:
            no_tail = zeros(B, 0, cfg.d_model)
            if kind == "s":
                S.append(zeros(B, H, K, K))
                cache.append(Cache(no_tail, None, None))
            else:
                S.append(None)
                cache.append(Cache(no_tail, zeros(B, H, 0, K), zeros(B, H, 0, K)))
        return Memory(S, cache, 0)

    def initialize(self):
        """Our choice: normal, with standard deviation 1 for embeddings, d_in^-1/2 for matrices, 0.5 for
        convolutions. The head starts at 0, so at first every token is as likely.
        """
        nn.init.normal_(self.embed.weight)
        nn.init.zeros_(self.head.weight)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features ** -0.5)
            elif isinstance(module, ShortConv):
                nn.init.normal_(module.weight, std=0.5)

    @torch.no_grad()
    def stream(self, tokens, state=None):
        """Not in the paper: tokens (B, T) arrive one at a time; after every L the model sleeps.

        Every full window sleeps. The logits of the last window equal those of `forward` where only that
        window has targets. What a window wrote to S awake is dropped when it sleeps: the N passes
        start from the S before the window. Returns logits (B, T, vocab) and the state for the next
        call: the memory now, the memory before this window, and the embeddings of the window so far
        (B, n, d).
        """
        tokens = check_tokens(tokens, self.cfg.vocab_size)
        embedded = self.embed(tokens)
        if state is None:
            empty = self.empty_memory(len(tokens))
            state = (empty, empty, embedded[:, :0])
        check_state(state, embedded, self.cfg)
        memory, before, window = state
        logits = []
        for h in embedded.split(1, dim=1):
            token_logits, memory = self.wake(h, memory)
            logits.append(token_logits)
            window = torch.cat([window, h], 1)
            if window.shape[1] == self.cfg.L:
                before = self.sleep(window, before)            # what was written awake is dropped
                memory = before
                window = window[:, :0]
        return torch.cat(logits, 1), (memory, before, window)


def zero_logits(h, vocab_size):
    """Those of a window that sleeps: (B, T, vocab), as a view of one number that takes no memory."""
    return h.new_zeros(()).expand(*h.shape[:2], vocab_size)


def latest(x, n):
    """The last n tokens of x (..., T, d), fewer if there are not as many."""
    first = max(x.shape[-2] - n, 0)
    return x[..., first:, :].clone()                           # a view would keep all of x


# ------------------------------------------------------------------------------------------------
# Layers

class Block(nn.Module):
    """Eq. 4-5: a mixer (attention or fast weights) and an MLP, each behind a norm, in a residual."""

    def __init__(self, kind, cfg):
        super().__init__()
        d = cfg.d_model
        self.kind = kind
        self.norm1 = nn.RMSNorm(d)
        self.norm2 = nn.RMSNorm(d)
        self.conv = ShortConv(d) if kind in cfg.conv else None
        self.mixer = Attention(cfg) if kind == "a" else UPDATE_RULES[cfg.update_rule](cfg)
        self.up = nn.Linear(d, 4 * d, bias=False)
        self.down = nn.Linear(4 * d, d, bias=False)

    def forward(self, h, S, cache):
        """h (B, T, d), this block's S and Cache -> h, S, and the cache with these tokens."""
        tail, keys, values = cache
        x = self.norm1(h)
        if self.conv is not None:
            x, tail = self.conv(x, tail)
        if self.kind == "a":
            x, keys, values = self.mixer(x, keys, values)
        else:
            x, S = self.mixer(x, S)
        h = h + x
        x = F.relu(self.up(self.norm2(h))).square()            # squared ReLU (Primer, So et al. 2021)
        h = h + self.down(x)
        return h, S, Cache(tail, keys, values)


class FastWeights(nn.Module):
    """The mixer of SSM blocks: Gated DeltaNet. `gated` and `delta` switch its two parts off.

    The original has a short convolution after each of q, k and v; here one stands before all three,
    in Block.
    """

    def __init__(self, cfg, gated=True, delta=True):
        super().__init__()
        d = cfg.d_model
        H = cfg.n_head
        self.H = H
        self.gated = gated
        self.delta = delta
        self.q = nn.Linear(d, d, bias=False)
        self.k = nn.Linear(d, d, bias=False)
        self.v = nn.Linear(d, d, bias=False)
        self.o = nn.Linear(d, d, bias=False)
        self.z = nn.Linear(d, d, bias=False)                   # output gate
        self.ab = nn.Linear(d, 2 * H, bias=False)              # inputs of alpha and beta
        # log_alpha = -e^A_log softplus(a + dt_bias), with Mamba's names. At a = 0 and A_log = 0 it is
        # -rate, and half of S is left after log(2) / rate tokens.
        rate = math.log(2) / first_half_lives(cfg)
        self.dt_bias = nn.Parameter(torch.log(torch.expm1(rate)))          # softplus(dt_bias) = rate
        self.A_log = nn.Parameter(torch.zeros(H))
        self.norm = nn.RMSNorm(d // H, eps=1e-5)

    def forward(self, x, S):
        """x (B, T, d), S (B, H, V, K) -> (B, T, d), the new S."""
        q = split_heads(F.silu(self.q(x)), self.H)
        k = split_heads(F.silu(self.k(x)), self.H)
        v = split_heads(F.silu(self.v(x)), self.H)
        with torch.autocast(x.device.type, enabled=False):     # the rule in float32, as S is
            # For keys of unit norm, I - beta k k^T lengthens no vector.
            q = F.normalize(q.to(S.dtype), dim=-1)
            k = F.normalize(k.to(S.dtype), dim=-1)
            o, S = self.write_and_read(x, q, k, v.to(S.dtype), S)
            o = self.norm(o).transpose(1, 2).flatten(2)        # (B, T, d)
        o = o * F.silu(self.z(x))                              # output gate
        return self.o(o), S

    def write_and_read(self, x, q, k, v, S):
        """The gates and the rule: x (B, T, d) -> o (B, H, T, V), the new S."""
        a, b = self.ab(x).transpose(1, 2).chunk(2, 1)          # (B, H, T) each
        beta = b.sigmoid()
        log_alpha = torch.zeros_like(a)
        if self.gated:
            log_alpha = -self.A_log.exp()[:, None] * F.softplus(a + self.dt_bias[:, None])
        # For one token the recurrent form is the shorter way to the same numbers, up to rounding.
        rule = fast_weight_rule if x.shape[1] == 1 else fast_weight_rule_chunked
        return rule(q, k, v, log_alpha, beta, S, self.delta)


def first_half_lives(cfg):
    """Tokens until S has forgotten half, before training, one number per head. Our choice.

    The first head: max(N, 4) * seq_len, as a sleep writes every token N times; so models of N = 1 to 4
    start with the same numbers. The last of several heads: 4 tokens. Those between: log-spaced.

    This is so at a = 0. In a new model a is random, and S forgets about twice as fast.
    """
    longest = max(cfg.N, 4) * cfg.seq_len
    return torch.logspace(math.log10(longest), math.log10(4), cfg.n_head)


UPDATE_RULES = {       # your own: a subclass of FastWeights with another write_and_read, and its name
    "gated_delta": FastWeights,
    "delta": partial(FastWeights, gated=False),
    "gated_hebbian": partial(FastWeights, delta=False),        # Eq. 3
    "hebbian": partial(FastWeights, gated=False, delta=False),
}


class Attention(nn.Module):
    """Softmax attention (Eq. 1-2): a token sees itself and at most the L - 1 tokens before it."""

    def __init__(self, cfg):
        super().__init__()
        d = cfg.d_model
        self.H = cfg.n_head
        self.L = cfg.L
        self.q = nn.Linear(d, d, bias=False)
        self.k = nn.Linear(d, d, bias=False)
        self.v = nn.Linear(d, d, bias=False)
        self.o = nn.Linear(d, d, bias=False)
        # Scores depend on distances only. So the oldest token in view may be called position 0, and
        # keys are cached unrotated, as their position changes from call to call. In view are at most
        # L - 1 tokens of earlier windows and L of this one.
        K = d // self.H
        positions = torch.arange(2.0 * self.L)
        frequencies = 10000 ** (-torch.arange(0, K, 2) / K)
        angle = torch.outer(positions, frequencies)            # (2 L, K / 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x, past_keys, past_values):
        """x (B, T, d), keys and values of P tokens before it -> (B, T, d), and both with these tokens.

        past_keys, past_values: (B, H, P, K)
        """
        T = x.shape[1]
        P = past_keys.shape[2]
        q = split_heads(self.q(x), self.H)                     # (B, H, T, K)
        k = split_heads(self.k(x), self.H)
        v = split_heads(self.v(x), self.H)
        mask = None                                            # no past: is_causal is enough, T <= L
        if P > 0:
            k = torch.cat([past_keys, k], 2)
            v = torch.cat([past_values, v], 2)
            position = torch.arange(P + T, device=x.device)
            distance = position[P:, None] - position
            mask = (distance >= 0) & (distance < self.L)       # (T, P + T)
        if x.device.type == "mps":
            v = v.contiguous()             # PyTorch has had wrong values for other layouts there
        q_rotated = rotate(q, self.cos[P:P + T], self.sin[P:P + T])
        k_rotated = rotate(k, self.cos[:P + T], self.sin[:P + T])
        o = F.scaled_dot_product_attention(q_rotated, k_rotated, v, attn_mask=mask, is_causal=P == 0)
        return self.o(o.transpose(1, 2).flatten(2)), k, v


def split_heads(x, H):
    """(B, T, d) -> (B, H, T, d / H)."""
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


def rotate(x, cos, sin):
    """Rotary positions (RoPE) for x (B, H, T, K); cos, sin (T, K / 2)."""
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).to(x.dtype)


class ShortConv(nn.Module):
    """x_t + sum_j w_j * x_{t-j}, j = 0 to 3: a causal depthwise convolution in a residual."""

    def __init__(self, d, taps=4):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(taps, d))

    def forward(self, x, tail):
        """x (B, T, d) and the tokens before it, tail (B, n, d) -> (B, T, d), the new tail."""
        T = x.shape[1]
        taps = len(self.weight)
        known = torch.cat([tail, x], 1)
        missing = taps - 1 - tail.shape[1]                     # before the first token there are zeros
        padded = F.pad(known, (0, 0, missing, 0))              # (B, taps - 1 + T, d)
        for j in range(taps):
            start = taps - 1 - j
            x = x + self.weight[j] * padded[:, start:start + T]
        return x, latest(known, taps - 1)


# ------------------------------------------------------------------------------------------------
# The method ends here. What follows trains it.
#
# A task is a class, Task(args, seed), with
#   name, vocab_size
#   T                           tokens of one sequence
#   make_batch(step)            -> tokens (B, T), targets (B, M), as SleepLM.forward takes them, and
#                               what else score wants; from seed and step alone, on args.device
#   test                        a batch that is never trained on
#   score(tokens, targets, logits, ...)        -> {metric: number, or {case: number}}; logits
#                               (B, M, vocab)
#   chance                      the score of the best constant guess on the test, a dict like that
# and, if it likes,
#   show(tokens, targets)       -> one example as text; tokens (T,), targets (M,)
# The smallest one is in lab/experiments/recall.py.

def train(task, cfg, settings, path, make_model=None, draw_N=None):
    """Train one model -> the model, its optimizers, and its run.

    cfg: the model's shape. settings: all flags of this run, a dict. Used here are steps, eval_every,
    seed, device, compile, recompute, lr_muon, lr_adamw, cooldown and warmup.
    path: of its checkpoint; training goes on from there if it exists. run: a dict, among others of
    steps, seconds and tokens, the scores of the last evaluation, and a curve of all of them.
    make_model(cfg, settings) may give a subclass of SleepLM; draw_N(step, settings) the passes of a
    training step, if they are not always N.

    Every `eval_every` steps: evaluate, and save all that it takes to go on exactly from here.
    BadInput if the loss or a weight is not finite.
    """
    steps = settings["steps"]
    model, optimizers, run = begin(task, cfg, settings, path, make_model)
    forward_backward = accelerate(model, settings["compile"], settings["recompute"])
    started = time.monotonic() - run["seconds"]                # a resumed clock goes on
    first = run["steps"]
    # Both stay on the device until an evaluation: to read a number, the CPU has to wait for a GPU.
    # (Once in a step it does, in windows_asleep.)
    loss_sum = torch.zeros((), device=settings["device"])
    grad_max = torch.zeros((), device=settings["device"])      # largest norm, logged, not clipped
    progress = tqdm(range(first, steps), desc=path.stem, total=steps, initial=first, leave=False,
                    disable=None)
    for step in progress:
        set_rates(optimizers, settings, step)
        warm_up(model, step, settings["warmup"], cfg.eviction)
        tokens, targets, *_ = task.make_batch(step)
        N = draw_N(step, settings) if draw_N else cfg.N
        torch.manual_seed(settings["seed"] * 10 ** 9 + step)   # so that dropout, if you add it, resumes
        loss_sum = loss_sum + forward_backward(tokens, targets, N)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        grad_max = grad_max.maximum(nn.utils.get_total_norm(grads))
        for optimizer in optimizers:
            optimizer.step()                                   # Algorithm 1, line 14
        run["tokens"] += tokens.numel()

        if (step + 1) % settings["eval_every"] == 0 or step + 1 == steps:
            mean_loss = loss_sum.item() / (step + 1 - run["steps"])    # since the last evaluation
            refuse_infinite(model, mean_loss, path, step, run)
            metrics = evaluate(model, task, task.test)
            run["steps"] = step + 1
            run["seconds"] = round(time.monotonic() - started, 1)
            run.update(metrics)
            run["curve"].append(dict(step=step + 1, tokens=run["tokens"], train_loss=mean_loss,
                                     grad_norm=grad_max.item(), **metrics))
            save(path, model, optimizers, run)
            tqdm.write(f"{path.stem} | step {step + 1} | {run['tokens'] / 1e6:.2f}M tokens | "
                       f"train loss {mean_loss:.3f} | {format_metrics(metrics)} | "
                       f"{run['seconds']:.0f} s")
            loss_sum = torch.zeros_like(loss_sum)
            grad_max = torch.zeros_like(grad_max)
    return model, optimizers, run


def set_rates(optimizers, settings, step):
    """The learning rates of this step: constant, then linear towards 0 over the last `cooldown`."""
    cooldown_steps = max(1.0, settings["cooldown"] * settings["steps"])
    share = min(1.0, (settings["steps"] - step) / cooldown_steps)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share          # initial_lr: as it was made, see begin


def warm_up(model, step, warmup, eviction):
    """Section 6.4's warm-up, the first `warmup` steps: attention is frozen, eviction is hard.

    eviction: that of later steps. Our choice, as the models start from scratch: whole attention blocks
    are frozen, with their MLP; SSM blocks, embedding and head learn. What is frozen gets no gradient,
    and optimizers skip it. An evaluation during the warm-up is of this model. Without a warm-up nothing
    is changed: what make_model froze stays frozen.
    """
    if warmup == 0:
        return
    warming_up = step < warmup
    model.cfg = replace(model.cfg, eviction="hard" if warming_up else eviction)
    for block in model.blocks:
        block.requires_grad_(block.kind == "s" or not warming_up)


class Muon(torch.optim.Optimizer):
    """Moves a matrix by its momentum with all singular values near 1 (Jordan et al. 2024).

    The same step as torch.optim.Muon's, in float32, as bfloat16 is slow on a CPU, and with all
    matrices of one shape at once.
    """
    momentum = 0.95

    def __init__(self, matrices, lr):
        super().__init__(matrices, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}                                      # shape: [(matrix, its update)]
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p]["mean"] = torch.zeros_like(p)
                    mean = self.state[p]["mean"]
                    mean.lerp_(p.grad, 1 - self.momentum)      # a running mean
                    update = p.grad.lerp(mean, self.momentum)  # Nesterov
                    by_shape.setdefault(p.shape, []).append((p, update))
            for (rows, columns), pairs in by_shape.items():
                X = torch.stack([update for _, update in pairs])
                if rows > columns:
                    X = X.mT                                               # (n, short, long)
                X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
                for _ in range(5):             # Newton-Schulz: singular values go to 0.7 to 1.2
                    A = X @ X.mT
                    X = 3.4445 * X + (2.0315 * A @ A - 4.775 * A) @ X
                if rows > columns:
                    X = X.mT
                scale = max(1, rows / columns) ** 0.5
                for (p, _), x in zip(pairs, X):
                    p.sub_(x, alpha=group["lr"] * scale)


def make_optimizers(model, lr_muon, lr_adamw):
    """Muon for the matrices of the blocks, AdamW for all else (Section 6.1), as a list.

    Our choice: no weight decay.
    """
    matrices = [module.weight for module in model.blocks.modules() if isinstance(module, nn.Linear)]
    is_matrix = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in is_matrix]
    adamw = torch.optim.AdamW(rest, lr=lr_adamw, weight_decay=0.0, fused=rest[0].is_cuda)
    muon = Muon(matrices, lr=lr_muon)
    return [muon, adamw]


def forward_backward(model, tokens, targets, N):
    """The loss of a batch (Algorithm 1, lines 1-11). Its gradients are then in p.grad (line 14)."""
    model.zero_grad()
    _, loss = model(tokens, targets, N)
    loss.backward()
    return loss.detach()


def accelerate(model, compile, recompute):
    """-> f(tokens, targets, N): forward_backward of this model, made fast or small in memory.

    compile: fuse every block. recompute: checkpointing, of a pass only what goes in and comes out is
    kept, and the backward pass runs it again for the rest. On CUDA, unless recompute is on, a step is
    recorded as a CUDA graph (see the end of this file).
    """
    if compile:
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False)
    if recompute:
        one_pass = partial(type(model).one_pass, model)        # the class's: a second call wraps it anew
        model.one_pass = partial(recompute_in_backward, one_pass, use_reentrant=False)
    elif model.head.weight.is_cuda:
        return CudaGraphs(model)
    return partial(forward_backward, model)


@torch.no_grad()
def evaluate(model, task, batch, N=None):
    """The metrics of a batch after sleeps of N passes, as plain numbers."""
    given_tokens, given_targets, *facts = batch
    tokens, targets = check_batch(given_tokens, given_targets, model.cfg.vocab_size)
    asleep = model.windows_asleep(tokens, targets)
    rows = max(1, 2 ** 17 // tokens.shape[1])                  # about 2^17 tokens at a time
    training = model.training
    model.eval()
    logits = []
    with torch.compiler.set_stance("force_eager"):             # these shapes are not worth compiling
        for x, y in zip(tokens.split(rows), targets.split(rows)):
            logits.append(model.algorithm_1(x, y, asleep, N)[0])
    model.train(training)
    return plain_numbers(task.score(given_tokens, given_targets, torch.cat(logits), *facts))


# ------------------------------------------------------------------------------------------------
# Skip the rest at first reading. It has the rule as matrix products; checks of what is passed in; and
# what a script needs: files, the machine, the command line. A script calls main, which calls parse,
# plan and run_all; that one calls begin, train and save. These imports are for scripts alone.
import argparse
import contextlib
import errno
import json
import os
import shutil
import signal
import sys
import sysconfig
import textwrap
import threading
import zipfile
from importlib.util import find_spec
from pathlib import Path


# ------------------------------------------------------------------------------------------------
# The rule as matrix products

def fast_weight_rule_chunked(q, k, v, log_alpha, beta, S, delta=True, chunk=64):
    """`fast_weight_rule` as matrix products over chunks of `chunk` tokens, up to rounding.

    Unrolled inside a chunk of C tokens, token i writes u_i and reads o_i,
        u_i = beta_i (v_i - e^{c_i} S k_i - sum_{j<i} e^{c_i - c_j} (k_i . k_j) u_j)
        o_i = e^{c_i} S q_i + sum_{j<=i} e^{c_i - c_j} (q_i . k_j) u_j
    with c the running sum of log_alpha, and S the state before the chunk. The first line is a
    triangular system for u; without delta u_i = beta_i v_i. Rounding: in float32 outputs differ from
    the token-by-token form by about 1e-6, and by some 1e-4 after strong forgetting inside a chunk
    (on CUDA by more, where a script's float32 products are TF32).
    """
    check_rule(q, k, v, log_alpha, beta, S)
    outputs = []
    chunks = (x.split(chunk, 2) for x in (q, k, v, log_alpha, beta))
    for q_c, k_c, v_c, log_alpha_c, beta_c in zip(*chunks):
        # D_ij = e^{c_i - c_j}, 0 for a later j. The mask comes before exp: what it leaves is <= 0 in
        # the exponent, so nothing overflows. The clamp avoids -inf - (-inf), which would be nan.
        c = log_alpha_c.clamp(min=-100).cumsum(-1)             # (B, H, C)
        D = c[..., :, None] - c[..., None, :]                  # (B, H, C, C)
        future = torch.ones_like(D).triu(1) > 0
        D = D.masked_fill(future, -torch.inf).exp()
        decay = c.exp()[..., None]                             # share of S left (B, H, C, 1)
        beta_c = beta_c[..., None]                             # (B, H, C, 1)
        u = beta_c * v_c                                       # (B, H, C, V)
        if delta:
            # Solve (I + A) u = beta (v - decay S k). unitriangular supplies the I.
            A = (beta_c * (k_c @ k_c.mT) * D).tril(-1)         # (B, H, C, C)
            lacking = u - beta_c * decay * (k_c @ S.mT)
            u = torch.linalg.solve_triangular(A, lacking, upper=False, unitriangular=True)
        outputs.append(decay * (q_c @ S.mT) + ((q_c @ k_c.mT) * D) @ u)
        decay_to_end = (c[..., -1:] - c).exp()[..., None]      # (B, H, C, 1)
        S = decay[..., -1:, :] * S + u.mT @ (decay_to_end * k_c)
    return torch.cat(outputs, 2), S


# ------------------------------------------------------------------------------------------------
# Checks of what is passed in. A script prints a BadInput as one sentence, without a traceback

class BadInput(ValueError):
    """What was asked for cannot be done. The sentence says what is wrong and what to do."""


def whole_number(name, value, least):
    """value as an int, if it is an integer of any kind (numpy's, too) from `least` on."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise BadInput(f"{name} must be an integer >= {least}, not {value!r}.")
    return number


def check_config(cfg):
    for name in ("vocab_size", "seq_len", "L", "N", "d_model", "n_head"):
        number = whole_number(name, getattr(cfg, name), 1)
        object.__setattr__(cfg, name, number)                  # numpy's integers become Python's
    if not isinstance(cfg.layout, str) or not cfg.layout or set(cfg.layout) - set("as"):
        raise BadInput(f"layout {cfg.layout!r} must be made of the letters a and s.")
    if cfg.d_model % (2 * cfg.n_head):
        raise BadInput(f"d_model {cfg.d_model} must be a multiple of 2 * n_head = {2 * cfg.n_head}.")
    if cfg.eviction not in ("hard", "sliding"):
        raise BadInput(f"eviction {cfg.eviction!r} must be hard or sliding.")
    if cfg.update_rule not in UPDATE_RULES:
        raise BadInput(f"update_rule {cfg.update_rule!r} must be one of {', '.join(UPDATE_RULES)}.")
    if cfg.conv not in ("", "a", "s", "as", "sa"):
        raise BadInput(f"conv {cfg.conv!r} must be '', a, s or as.")
    if not isinstance(cfg.bf16, bool):         # the word "false" would be true
        raise BadInput(f"bf16 {cfg.bf16!r} must be True or False.")


def check_tokens(tokens, vocab_size):
    """The tokens as int64."""
    wanted = f"(B, T) integers from 0 to {vocab_size - 1}, at least one"
    if not torch.is_tensor(tokens):
        raise BadInput(f"tokens must be a tensor of {wanted}; this is a {type(tokens).__name__}: "
                       "take torch.as_tensor(tokens).")
    of_integers = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    if tokens.ndim != 2 or tokens.numel() == 0 or not of_integers:
        raise BadInput(f"tokens must be {wanted}; these are {tokens.dtype}, {tuple(tokens.shape)}.")
    tokens = tokens.long()
    if tokens.device.type != "cuda":       # there the lookup checks it, without waiting for the GPU
        low, high = tokens.aminmax()
        if low < 0 or high >= vocab_size:
            raise BadInput(f"tokens must be {wanted}; these are from {low} to {high}.")
    return tokens


def check_batch(tokens, targets, vocab_size):
    """Tokens and targets as int64; every negative target becomes -1."""
    tokens = check_tokens(tokens, vocab_size)
    if not torch.is_tensor(targets):
        raise BadInput(f"targets must be a tensor (B, M) of integers; this is a "
                       f"{type(targets).__name__}: take torch.as_tensor(targets).")
    of_floats = targets.is_floating_point() or targets.is_complex()
    of_integers = not of_floats and targets.dtype != torch.bool
    fits = targets.ndim == 2 and len(targets) == len(tokens) and 1 <= targets.shape[1] <= tokens.shape[1]
    if not of_integers or not fits:
        raise BadInput(f"targets must be (B, M) integers for tokens (B, T), with M from 1 to T; these "
                       f"are {targets.dtype}, {tuple(targets.shape)}, for {tuple(tokens.shape)}.")
    targets = targets.long().clamp(min=-1)
    if targets.device.type != "cuda" and targets.max() >= vocab_size:
        raise BadInput(f"targets must be below {vocab_size}, the size of the vocabulary, or negative "
                       f"for nothing; the largest is {targets.max()}.")
    return tokens, targets


def check_asleep(asleep, has_target, M, L):
    """That something is predicted. A warning, if tokens before the answers are not slept over.

    asleep: one bool per window. has_target: one bool per token, for all sequences together.
    """
    if all(asleep):
        raise BadInput("all targets are negative: nothing is predicted, so there is no loss.")
    # The context: all before the targets. If these cover the sequence, as in a batch of plain language
    # modelling (M = T), all before the first of them that is not negative.
    T = len(has_target)
    context = has_target.index(True) if M == T else T - M
    first_awake = L * asleep.index(False)
    if first_awake < context:
        warnings.warn(f"{context - first_awake} tokens of context share a window of L = {L} with "
                      "an answer: the model does not sleep over them. If it should, fill whole "
                      "windows (pad on the left).")


def check_features(h, memory, cfg):
    """That h is features (B, T, d), and that memory is of a model of this layout, width and kind."""
    if not torch.is_tensor(h) or not h.is_floating_point() or h.ndim != 3 or h.shape[2] != cfg.d_model:
        is_what = f"{h.dtype}, {tuple(h.shape)}" if torch.is_tensor(h) else type(h).__name__
        raise BadInput(f"h must be features (B, T, {cfg.d_model}), as model.embed(tokens) gives; "
                       f"this is {is_what}.")
    if h.dtype not in (torch.float32, torch.float64):
        raise BadInput(f"the weights are {h.dtype}, too coarse for S: keep them in float32, and make "
                       "the model with Config(bf16=True) for matrix products in bfloat16.")
    if not isinstance(memory, Memory):
        raise BadInput(f"memory must be a Memory, as model.empty_memory(B) and model.sleep give; this "
                       f"is a {type(memory).__name__}.")
    kinds = "".join("a" if block.keys is not None else "s" for block in memory.cache)
    width = memory.cache[0].tail.shape[2]
    heads = {S.shape[1] for S in memory.S if S is not None}
    heads |= {block.keys.shape[1] for block in memory.cache if block.keys is not None}
    if (kinds, width, heads) != (cfg.layout, cfg.d_model, {cfg.n_head}):
        raise BadInput(f"this memory is of a model with layout {kinds}, width {width} and heads "
                       f"{heads}; here they are {cfg.layout}, {cfg.d_model} and {cfg.n_head}.")
    B = len(memory.cache[0].tail)
    if len(h) != B:
        raise BadInput(f"this memory belongs to a batch of {B}, not of {len(h)}.")
    if h.shape[1] == 0:
        raise BadInput("h must have at least one token.")
    check_cache(memory, cfg)


def check_window(h, memory, cfg, asleep=False):
    """Also that h fits into what is left of the window."""
    check_features(h, memory, cfg)
    T = h.shape[1]
    if memory.n_awake + T > cfg.L or (asleep and memory.n_awake > 0):
        raise BadInput(f"{T} tokens do not fit into a window of L = {cfg.L} after {memory.n_awake} "
                       "that were read awake: evict first (a sleep starts at the first token of a "
                       "window).")


def check_cache(memory, cfg):
    """That the blocks know as many of the latest tokens as a model of this Config leaves them."""
    n_awake = memory.n_awake
    most = n_awake if cfg.eviction == "hard" else n_awake + cfg.L - 1
    known = n_awake
    for block in memory.cache:
        if block.keys is not None:
            known = block.keys.shape[2]
            if not n_awake <= known <= most:
                raise BadInput("this memory is of a model with another eviction or L: it holds "
                               f"keys of {known} tokens, here they are from {n_awake} to {most}.")
    for i, (kind, block) in enumerate(zip(cfg.layout, memory.cache)):
        n = block.tail.shape[1]
        fits = n >= min(3, known) if kind in cfg.conv else n == 0
        if not fits:
            raise BadInput(f"this memory is of a model with another conv than {cfg.conv!r}: "
                           f"block {i} has a tail of {n} tokens.")


def check_state(state, embedded, cfg):
    """That state is what `stream` returned for as many sequences as are embedded (B, T, d)."""
    if not isinstance(state, tuple) or isinstance(state, Memory) or len(state) != 3:
        raise BadInput("state must be the three things that model.stream returned after the "
                       f"logits, or None at the start; this is a {type(state).__name__}.")
    memory, before, window = state
    check_features(embedded, memory, cfg)
    check_features(embedded, before, cfg)
    wanted = (len(embedded), memory.n_awake, cfg.d_model)
    if not torch.is_tensor(window) or window.shape != wanted or before.n_awake > 0:
        raise BadInput("the parts of this state do not belong together: take all three from one "
                       "call of model.stream.")


def check_rule(q, k, v, log_alpha, beta, S):
    shapes = [tuple(x.shape) for x in (q, k, v, log_alpha, beta, S)]
    fits = q.ndim == 4 and v.ndim == 4
    if fits:
        B, H, T, K = q.shape
        V = v.shape[3]
        wanted = [(B, H, T, K), (B, H, T, K), (B, H, T, V), (B, H, T), (B, H, T), (B, H, V, K)]
        fits = shapes == wanted and T >= 1
    if not fits:
        raise BadInput("q, k, v, log_alpha, beta, S must be (B, H, T, K) twice, (B, H, T, V), "
                       f"(B, H, T) twice and (B, H, V, K), with T >= 1, not {shapes}.")
    if log_alpha.device.type == "cpu" and not torch.compiler.is_compiling() and (log_alpha > 0).any():
        raise BadInput("log_alpha must be <= 0: alpha is a share of S, at most 1.")


# ------------------------------------------------------------------------------------------------
# Runs: a model and its optimizers, new or as a checkpoint left them

def begin(task, cfg, settings, path, make_model=None):
    """Model, optimizers and run: new, or as the checkpoint at `path` left them."""
    torch.manual_seed(settings["seed"])
    model = make_model(cfg, settings) if make_model else SleepLM(cfg)
    model = model.to(settings["device"])
    optimizers = make_optimizers(model, settings["lr_muon"], settings["lr_adamw"])
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])        # set_rates starts from it
    if path.exists():
        run = load(path, task, settings, model, optimizers)
        return model, optimizers, run
    run = dict(task=task.name, N=cfg.N, seed=settings["seed"], steps=0, tokens=0, seconds=0.0,
               parameters=sum(p.numel() for p in model.parameters()),
               chance=plain_numbers(task.chance), curve=[], settings=settings,
               torch=str(torch.__version__), device=device_name(settings["device"]))
    taken = set(run) | {"N_test"}
    if taken & set(run["chance"]):
        raise BadInput(f"a metric of this task is named {', '.join(taken & set(run['chance']))}: that is "
                       "a field of the run already, take another name.")
    return model, optimizers, run


def refuse_infinite(model, mean_loss, path, step, run):
    if not (math.isfinite(mean_loss) and all(p.isfinite().all() for p in model.parameters())):
        raise BadInput(f"{path.stem}: the loss or a weight is not finite after step {step + 1}; step "
                       f"{run['steps']} is kept. Try smaller learning rates.")


def plain_numbers(metrics):
    """{metric: number or {case: number}} as floats: numpy's numbers and tensors of one become plain."""
    plain = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            plain[str(name)] = {str(case): float(number) for case, number in value.items()}
        else:
            plain[str(name)] = float(value)
    return plain


def format_metrics(metrics):
    words = []
    for name, value in metrics.items():
        if isinstance(value, dict):
            cases = [f"{case}: {number:.3f}" for case, number in value.items()]
            words.append(f"{name} {'  '.join(cases)}")
        else:
            words.append(f"{name} {value:.3f}")
    return " | ".join(words)


# ------------------------------------------------------------------------------------------------
# The machine: which device, and what it can do

def choose_device(wanted="auto"):
    """auto, cpu, cuda, cuda:1 or mps -> the device. auto: cuda if there is one, else cpu.

    BadInput if it is not there. MPS is taken only when asked for: nothing here has run on one.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(wanted).type
    except RuntimeError:
        kind = None
    if kind == "cpu":
        return "cpu"
    if kind == "mps" and torch.backends.mps.is_available():
        return "mps"
    if kind == "cuda" and torch.cuda.is_available():
        index = torch.device(wanted).index or 0
        if index < torch.cuda.device_count():
            check_gpu(index)
            return wanted
    too_old = ""
    if kind == "cuda" and torch.version.cuda is not None:
        too_old = " (torch was built for CUDA, but finds no GPU that it can use: is the driver too old?)"
    raise BadInput(f"there is no device '{wanted}' here{too_old}: take --device cpu.")


def check_gpu(index):
    """BadInput if this build of torch has no kernels for the GPU."""
    major, minor = torch.cuda.get_device_capability(index)
    built_for = [int(arch[3:]) for arch in torch.cuda.get_arch_list() if arch[3:].isdigit()]
    if built_for and 10 * major + minor < min(built_for):
        raise BadInput(f"this torch has no kernels for the GPU {torch.cuda.get_device_name(index)} "
                       f"(sm_{major}{minor}; it was built for sm_{min(built_for)} and newer): take "
                       "--device cpu, or an older torch.")


def has_bf16(device):
    """Does this device multiply matrices in bfloat16 itself? (A T4 only imitates it, slowly.)"""
    on_cuda = torch.device(device).type == "cuda"
    return on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)


def why_no_compile(device):
    """What torch.compile lacks on this device, in words; an empty string if nothing."""
    kind = torch.device(device).type
    try:
        torch.compile(nn.Identity(), backend="eager")          # refuses a Python that is too new
    except Exception as e:                     # whatever importing the compiler raises
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        return f"this torch cannot compile here ({reason})"
    if kind == "mps":
        return "compiling has not been tried on MPS"
    if kind == "cuda":
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "the GPU is too old for Triton, which needs compute capability 7.0"
        if find_spec("triton") is None:
            return "Triton is not installed"
    if not has_compiler(kind):
        return f"there is no {'C' if kind == 'cuda' else 'C++'} compiler"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "the headers of Python are missing (the package python3-dev)"
    return ""


def has_compiler(kind):
    """Triton, on a GPU, compiles C; on a CPU torch.compile needs C++."""
    if os.name == "nt":
        names = ["cl"]
    elif kind == "cuda":
        names = ["gcc", "clang", os.environ.get("CC")]
    else:
        names = ["g++", "clang++", os.environ.get("CXX")]
    return any(name and shutil.which(name) for name in names)


def set_up_torch(device):
    """Global switches of torch: once, before anything is computed or compiled."""
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(torch.device(device).index or 0)
    torch.set_float32_matmul_precision("high" if torch.device(device).type == "cuda" else "highest")
    torch.backends.cuda.enable_cudnn_sdp(False)        # its backward pass has had NaN bugs
    torch._dynamo.config.recompile_limit = 1000        # a graph for each shape and kind of call
    torch._dynamo.config.accumulated_recompile_limit = 10_000
    # Attention that thaws after a warm-up has to be compiled again (torch 2.9 to 2.11 would not).
    if hasattr(torch._dynamo.config, "skip_tensor_guards_with_matching_dict_tags"):
        torch._dynamo.config.skip_tensor_guards_with_matching_dict_tags = False
    # The rule's backward pass is float32 as its forward pass is, although the block is in bfloat16.
    if hasattr(torch._functorch.config, "backward_pass_autocast"):
        torch._functorch.config.backward_pass_autocast = "off"


def device_name(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} threads"


# ------------------------------------------------------------------------------------------------
# Files: of each model its run, N1-seed0.json, and a checkpoint to go on from, N1-seed0.pt

def write(path, save_to):
    """Make a file whole or not at all: save_to(temporary path), then rename. BadInput if it fails."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_to(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:       # torch.save raises the second when a disk is full
        reason = getattr(e, "strerror", None) or "is the disk full?"
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise BadInput(f"{path} could not be written ({reason}): free some space, or choose another "
                       "--out.") from None


def write_text(path, text):
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8",
                                                           errors="surrogateescape"))


def save(path, model, optimizers, run):
    """The checkpoint first: a run can be written again from it, but not the other way round."""
    state = dict(run=run, model=model.state_dict(),
                 optimizers=[optimizer.state_dict() for optimizer in optimizers])
    write(path, lambda temporary: torch.save(state, temporary))
    write_text(path.with_suffix(".json"), json.dumps(run, indent=1))


def load(path, task, settings, model, optimizers):
    """Load a checkpoint into the model and its optimizers -> its run. BadInput if it does not fit."""
    saved = read_checkpoint(path, settings["device"])
    try:
        refuse_other_settings(path, saved["run"], task, settings)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        return saved["run"]
    except BadInput:
        raise
    except Exception as e:                     # a dict of other keys, tensors of other shapes
        raise BadInput(f"{path} is no checkpoint of this model ({type(e).__name__}): delete it to train "
                       "the model anew.") from None


def read_checkpoint(path, device="cpu"):
    """What `save` saved; BadInput if it cannot be read, or if a bit of it has changed."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()        # torch.load does not compare checksums
        if damaged is None:
            return torch.load(path, map_location=device, weights_only=True)
        reason = f"its part {damaged} is damaged"
    except OSError as e:
        raise BadInput(f"{path} cannot be opened ({e.strerror or e}).") from None
    except Exception as e:                     # zipfile and torch.load raise many kinds
        reason = type(e).__name__
    raise BadInput(f"{path} cannot be read as a checkpoint ({reason}): delete it to train the model "
                   "anew.")


def refuse_other_settings(path, run, task, settings):
    old = dict(run["settings"], task=run["task"])
    new = dict(settings, task=task.name)
    differences = []
    for flag in sorted(set(old) | set(new)):
        if flag not in ("compile", "recompute") and old.get(flag) != new.get(flag):
            differences.append(f"{flag} was {old.get(flag)}, is {new.get(flag)}")
    if differences:
        raise BadInput(f"{path} was made with other settings ({'; '.join(differences)}): resume with "
                       "the same ones, or choose another --out.")


@contextlib.contextmanager
def locked(path):
    """Keep a second process from training the same model. The lock ends with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.stem}.lock"), "a") as file:
        try:
            if os.name == "nt":
                import msvcrt
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):             # the second on Windows
            raise BadInput(f"another process is training {path.stem} in {path.parent}: wait for it, or "
                           "choose another --out.") from None
        except OSError:
            pass                               # a file system without locks
        yield


# ------------------------------------------------------------------------------------------------
# A whole script: the command line, and a model for each N and seed

DEFAULTS = dict(eviction="hard", update_rule="gated_delta", conv="as", warmup=0, cooldown=0.0,
                eval_every=0, seed=[0], N_test=[], recompute=False)
FLAGS = dict(
    N="passes of a sleep; one model for each value",
    seed="of weights and data; one model for each value",
    L="window of attention, in tokens",
    layout="one letter per block: a = attention, s = SSM",
    d_model="width",
    n_head="heads of every mixer",
    eviction="hard: only S survives; sliding: also L - 1 tokens",
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
MODEL_FLAGS = ("L", "N", "layout", "d_model", "n_head", "eviction", "update_rule", "conv")
LIMITS = dict(
    N=(1, 1000),
    N_test=(0, 1000),
    seed=(0, 10 ** 6),
    L=(1, 10 ** 6),
    d_model=(1, 10 ** 5),
    n_head=(1, 10 ** 5),
    steps=(1, 10 ** 9),
    eval_every=(1, 10 ** 9),
    batch_size=(1, 10 ** 6),
    warmup=(0, 10 ** 9),
    cooldown=(0, 1),
    lr_muon=(1e-9, 1000),
    lr_adamw=(1e-9, 1000))


def parse(doc, presets, flags, argv=None):
    """Command line -> the parser and the flags: the preset's values, then what the line says.

    presets: {name: {flag: value}}; the value gives the flag's type, too. flags: {flag: help} of the
    task.
    """
    p = argparse.ArgumentParser(description=(doc or "").replace("%", "%%"), add_help=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.error = lambda sentence: p.exit(2, f"{p.prog}: {sentence}\n")
    p.add_argument("--preset", choices=list(presets), default="cpu", help="default: cpu")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda (or cuda:1) or mps")
    args, _ = p.parse_known_args(argv)         # the preset and the device decide the other defaults
    try:
        device = choose_device(args.device)
    except BadInput as e:
        p.error(e)
    on_cuda = torch.device(device).type == "cuda"
    defaults = dict(compile=on_cuda and not why_no_compile(device))
    values = DEFAULTS | defaults | presets[args.preset]
    p.add_argument("-h", "--help", action="help", help="show this")
    for flag, words in (flags | FLAGS).items():
        value = values[flag]
        if isinstance(value, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(value, list):
            kind = dict(type=type(value[0]) if value else int, nargs="+")
        else:
            kind = dict(type=type(value))
        words = f"{words} (default: {value})".replace("%", "%%")
        p.add_argument(f"--{flag}", default=value, help=words, **kind)
    p.add_argument("--out", type=Path, help="folder for results; default: a new one in out/")
    p.add_argument("--resume", action="store_true", help="go on where the runs in --out stopped")
    args = p.parse_args(argv)
    args.device = device
    args.eval_every = args.eval_every or max(1, args.steps // 10)
    if args.compile and why_no_compile(device):
        p.error(f"--compile: {why_no_compile(device)}. Leave it out.")
    return p, args


def check_limits(args, limits):
    """BadInput if a flag is out of its limits. limits: {flag: (lowest, highest)}"""
    for flag, (low, high) in limits.items():
        value = getattr(args, flag)
        for number in value if isinstance(value, list) else [value]:
            if not low <= number <= high:
                raise BadInput(f"--{flag} {number} must be from {low:,} to {high:,}.")


def plan(args, Task):
    """(task, Config, settings) of each model. BadInput if one of them makes no sense."""
    check_limits(args, LIMITS)
    if args.warmup >= args.steps:
        raise BadInput(f"--warmup {args.warmup} must be less than --steps {args.steps}.")
    if not args.N or not args.seed:
        raise BadInput("--N and --seed need at least one number: there is a model for each.")
    not_of_a_model = {"N_test", "out", "resume", "preset"}
    flags = sorted(set(vars(args)) - not_of_a_model)
    plans = []
    for seed in dict.fromkeys(args.seed):
        task = Task(args, seed)
        for N in dict.fromkeys(args.N):
            settings = {flag: getattr(args, flag) for flag in flags} | dict(N=N, seed=seed)
            values = {flag: settings[flag] for flag in MODEL_FLAGS}
            cfg = Config(task.vocab_size, task.T, bf16=has_bf16(args.device), **values)
            plans.append((task, cfg, settings))
    return plans


def main(doc, presets, flags, Task, argv=None, make_model=None, draw_N=None):
    """Train a model for each N and seed. Exit status: 0; 2 for bad input; 130 if it is stopped.

    doc, presets, flags: see `parse`. make_model, draw_N: see `train`.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:                         # closed by who started this
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(getattr(sys, name), "reconfigure"):       # a letter that it lacks is escaped
            getattr(sys, name).reconfigure(errors="backslashreplace", line_buffering=True)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.signal(signal.SIGINT, signal.default_int_handler)   # in the background it is ignored
    out = None
    try:
        p, args = parse(doc, presets, flags, argv)
        set_up_torch(args.device)
        plans = plan(args, Task)
        out = make_folder(args, Task.name)
        run_all(p.prog, args, plans, out, make_model, draw_N)
    except BadInput as e:
        p.error(e)
    except torch.OutOfMemoryError:
        p.error("there is not enough memory on this GPU: try --recompute or a smaller --batch_size.")
    except KeyboardInterrupt:
        stop(out)
    except OSError as e:
        if e.errno not in (errno.EPIPE, errno.ENOSPC):         # as by `| head`, or by a full disk
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        stop(out)


def stop(out):
    """Say how to go on, and exit. out: the folder of the results; None before there is one."""
    to_go_on = "Nothing was saved."
    if out is not None:
        to_go_on = f"To go on: the same command with --resume --out {out}"
    print(f"stopped. {to_go_on}", file=sys.stderr)
    sys.exit(130)


def make_folder(args, name):
    """The folder of the results: a new one, or with --resume one that is there."""
    if args.resume:
        if args.out is None or not args.out.is_dir():
            raise BadInput(f"--resume needs --out and the folder of the runs; {args.out} is none.")
        for path in args.out.glob("N*-seed*.json"):
            try:
                task = json.loads(path.read_text(encoding="utf-8"))["task"]
            except (OSError, ValueError, KeyError, TypeError):
                continue                                       # a broken one is written again
            if task != name:
                raise BadInput(f"{args.out} holds runs of the task {task}, not of {name}: choose "
                               "another --out.")
        return args.out
    out = args.out or Path("out") / time.strftime(f"{name}-{args.preset}-%m%d-%H%M%S")
    try:
        is_empty_folder = out.is_dir() and not any(out.iterdir())
        if not is_empty_folder:
            out.mkdir(parents=True)                            # of two processes one makes it
    except OSError as e:
        raise BadInput(f"{out} cannot be made ({e.strerror}): add --resume to go on with what is in "
                       "it, or choose another --out.") from None
    return out


def run_all(name, args, plans, out, make_model=None, draw_N=None):
    """Train the models that are not finished, then print all of them."""
    flags = [f"{flag} {value}" for flag, value in sorted(vars(args).items())]
    print(textwrap.fill(f"{name}: {', '.join(flags)}", 99))
    paths = [out / f"N{settings['N']}-seed{settings['seed']}.pt" for _, _, settings in plans]
    for path, (task, cfg, settings) in zip(paths, plans):      # refuse before anything is trained
        if path.with_suffix(".json").exists() and not path.exists():
            raise BadInput(f"{path} is gone, but its .json is not: choose another --out.")
        _, _, run = begin(task, cfg, settings, path, make_model)
        print(f"{path.stem}: {run['parameters']:,} parameters, step {run['steps']} of {args.steps}")
    last_task, last_cfg, _ = plans[-1]                         # they differ in N and seed alone
    refuse_random_batches(last_task)
    say_machine(args, last_cfg)
    if hasattr(last_task, "show"):
        print(last_task.show(*(x[0] for x in last_task.test[:2])))
    print(f"chance (the best constant guess): {format_metrics(plain_numbers(last_task.chance))}")

    runs = []
    for path, (task, cfg, settings) in zip(paths, plans):
        with locked(path):
            write_text(out / "command.txt", " ".join(sys.argv) + "\n")
            model, optimizers, run = train(task, cfg, settings, path, make_model, draw_N)
            for N in args.N_test:
                tested = run.setdefault("N_test", {})
                if str(N) not in tested:
                    tested[str(N)] = evaluate(model, task, task.test, N)
            save(path, model, optimizers, run)
        runs.append(run)
    for run in runs:
        say_result(run)
    print(f"saved in {out}")
    if Path(__file__).with_name("lab").is_dir():               # this file may have been copied alone
        print(f"to draw it: python -m lab.tools.draw_runs {out}")


def say_machine(args, cfg):
    precision = "bfloat16 and float32" if cfg.bf16 else "float32"
    compiled = "compiled" if args.compile else "not compiled"
    if torch.device(args.device).type == "cuda" and not args.compile:
        compiled += f" ({why_no_compile(args.device) or 'as asked for'})"
    print(f"{device_name(args.device)}, {precision}, {compiled}, torch {torch.__version__}")
    if args.preset != "cpu" and args.device == "cpu":
        print(f"--preset {args.preset} is meant for a GPU: on this CPU it may take days.")


def say_result(run):
    metrics = {metric: run[metric] for metric in run["chance"] if metric in run}
    print(f"N {run['N']} seed {run['seed']} | {run['tokens'] / 1e6:.1f}M tokens | "
          f"{run['seconds']:.0f} s | {format_metrics(metrics)}")
    for N, metrics in run.get("N_test", {}).items():
        print(f"  tested with N = {N}: {format_metrics(metrics)}")


def refuse_random_batches(task):
    """A run resumes exactly only if a batch depends on seed and step alone."""
    for first, second in zip(task.make_batch(0), task.make_batch(0)):
        if not torch.equal(torch.as_tensor(first), torch.as_tensor(second)):
            raise BadInput("make_batch(0) gives another batch each time: draw from a torch.Generator "
                           "that is seeded with seed and step.")


# ------------------------------------------------------------------------------------------------
# CUDA graphs. They help where a step has thousands of small kernels, as in the cpu presets, and
# Python cannot launch them as fast as the GPU runs them. The numbers should be the same; no GPU has
# run this yet.

class CudaGraphs:
    """forward_backward of a model, recorded once for each kind of batch, then replayed.

    The loss is a buffer that the next call overwrites, and p.grad are buffers, too. BadInput if a
    step cannot be recorded: it is random, or it looks at its own numbers.
    """

    def __init__(self, model):
        self.model = model
        self.recorded = {}
        self.side = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()             # one pool of memory for all graphs

    def __call__(self, tokens, targets, N):
        model = self.model
        tokens, targets = check_batch(tokens, targets, model.cfg.vocab_size)
        asleep = model.windows_asleep(tokens, targets)         # looks at the targets: not recorded
        trained = [p.requires_grad for p in model.parameters()]
        kind = str((tokens.shape, targets.shape, asleep, N, model.cfg.eviction, trained))
        if kind not in self.recorded:
            self.recorded[kind] = self.record(tokens.clone(), targets.clone(), asleep, N)
        graph, inputs, loss, grads = self.recorded[kind]
        torch._foreach_copy_(inputs, [tokens, targets])
        graph.replay()
        for p, grad in zip(model.parameters(), grads):
            p.grad = grad
        return loss

    def step(self, tokens, targets, asleep, N):
        self.model.zero_grad()
        _, loss = self.model.algorithm_1(tokens, targets, asleep, N)
        loss.backward()
        return loss.detach()

    def numbers_of(self, tokens, targets, asleep, N):
        """Loss and length of the gradient. (A new model's loss is the same whatever its passes do.)"""
        loss = self.step(tokens, targets, asleep, N)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return loss.item(), nn.utils.get_total_norm(grads).item()

    def record(self, tokens, targets, asleep, N):
        # Three steps on a side stream: libraries and the compiler settle, as CUDA asks for.
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            seen = [self.numbers_of(tokens, targets, asleep, N) for _ in range(3)]
        torch.cuda.current_stream().wait_stream(self.side)
        for second, third in zip(seen[1], seen[2]):
            if math.isfinite(third) and not math.isclose(second, third, rel_tol=1e-3):
                raise BadInput("a pass of this model is random, which is not recorded here: add "
                               "--recompute.")
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.side):
                # A step clears p.grad first, so the gradients are made in the graph's own memory.
                loss = self.step(tokens, targets, asleep, N)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            reason = str(e).splitlines()[0]
            raise BadInput(f"no CUDA graph of a step ({reason}): add --recompute.") from None
        return graph, [tokens, targets], loss, [p.grad for p in self.model.parameters()]


if __name__ == "__main__":
    try:
        from lab.course import demo            # a trained model, watched while it sleeps
    except ModuleNotFoundError as e:
        if not (e.name or "").startswith("lab"):
            raise
        sys.exit("sleep.py: the demonstration is in lab/, which is not beside this file. The file works "
                 "without it: `from sleep import Config, SleepLM`.")
    demo.main()
