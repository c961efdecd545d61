"""Variants of the model and of its training: Algorithm 1 with one thing changed.

Each has a flag of `python -m lab.experiments` (FLAGS below). make_model and draw_N are what
sleep.train asks for.
"""
import math
import random

import torch
import torch.nn as nn
import torch.nn.functional as F

import sleep

DEFAULTS = dict(carry="hS", think=1, detach=0, recall=False, guess=False, every_pass=False,
                tell_pass=False, parallel=False, loop=[], any_N=False, grow_N=0.0)
FLAGS = dict(
    carry="what a pass of a sleep hands to the next: hS, h or S; without S the last pass writes it",
    think="passes over an answer window",
    detach="gradients pass through the last so many passes of a sleep only; 0: through all. With "
           "--every_pass they pass through so many before each loss",
    recall="before every pass but the first, h <- rms_norm(h) + embeddings",
    guess="before every pass but the first, h <- h + the embedding of what it would answer",
    every_pass="train on the answers after every pass n of the last sleep, with weight n",
    tell_pass="before every pass n, h <- h + an embedding of n",
    parallel="attention and fast weights in every block, in parallel (layout a, aa, ...)",
    loop="first and stop of the blocks that are looped; if not given, all (Section 6.3)",
    any_N="draw N anew for every training step, from 1 to --N, or as far as it has grown",
    grow_N="let N grow from 1 to --N over this first share of the steps")
# Flags of ChangedSleep.
OF_SLEEP = ("carry", "think", "detach", "recall", "guess", "every_pass", "tell_pass")


def check(args):
    """BadInput if the flags of this file do not go together. args has a field for every flag."""
    changes_sleep = any(getattr(args, flag) != DEFAULTS[flag] for flag in OF_SLEEP)
    if args.carry not in ("hS", "h", "S"):
        raise sleep.BadInput(f"--carry {args.carry} must be hS, h or S.")
    if args.think < 1:
        raise sleep.BadInput(f"--think {args.think} must be at least 1.")
    if args.think > 1000:
        raise sleep.BadInput(f"--think {args.think} must be at most 1,000.")
    if args.detach < 0:
        raise sleep.BadInput(f"--detach {args.detach} must not be negative.")
    if args.detach and args.detach >= min(args.N):
        raise sleep.BadInput(f"--detach {args.detach} must be fewer passes than --N "
                             f"{min(args.N)}: it would change nothing.")
    if args.carry == "S" and (args.recall or args.guess):
        raise sleep.BadInput("--carry S hands on no h: leave out --recall and --guess.")
    if changes_sleep and (args.eviction != "hard" or args.loop):
        names = " ".join(f"--{flag}" for flag in OF_SLEEP if getattr(args, flag) != DEFAULTS[flag])
        raise sleep.BadInput(f"{names}: these take hard eviction, and no --loop.")
    if args.loop:
        check_loop(args.loop, len(args.layout))
    if args.parallel:
        if set(args.layout) != {"a"} or "a" not in args.conv:
            raise sleep.BadInput(f"--parallel --layout {args.layout} --conv {args.conv}: every "
                                 "block has both mixers, so take a layout of a only, and the "
                                 "convolution before a.")
        if changes_sleep or args.loop or args.warmup:
            raise sleep.BadInput("--parallel takes no --warmup, and no other change of the model.")
    if not 0 <= args.grow_N <= 1:
        raise sleep.BadInput(f"--grow_N {args.grow_N} must be a share of the steps, from 0 to 1.")


def check_loop(loop, n_blocks):
    if len(loop) != 2 or not 0 <= loop[0] < loop[1] <= n_blocks:
        raise sleep.BadInput(f"--loop {' '.join(map(str, loop))} must be two numbers, first and "
                             f"stop, with 0 <= first < stop <= {n_blocks}.")


def make_model(cfg, settings):
    """The model that the settings, a dict of flags, ask for."""
    if settings["parallel"]:
        return ParallelLM(cfg)
    if settings["loop"]:
        return SpanLM(cfg, *settings["loop"])
    change = {flag: settings[flag] for flag in OF_SLEEP if settings[flag] != DEFAULTS[flag]}
    if change:
        return ChangedSleep(cfg, **change)
    return sleep.SleepLM(cfg)


def draw_N(step, settings):
    """The passes of a sleep in a training step."""
    N = settings["N"]
    growing = settings["grow_N"] * settings["steps"]
    if step < growing:                     # arXiv 2511.07384: slowly at first
        N = max(1, math.ceil(N * (1 - math.sqrt(1 - step / growing))))
    if settings["any_N"]:
        return random.Random(f"N {settings['seed']} {step}").randint(1, N)
    return N


# ------------------------------------------------------------------------------------------------
# What a pass hands to the next, and where gradients pass

class ChangedSleep(sleep.SleepLM):
    """A SleepLM with other passes; hard eviction. The arguments are described in FLAGS."""

    def __init__(self, cfg, carry="hS", think=1, detach=0, recall=False, guess=False,
                 every_pass=False, tell_pass=False):
        super().__init__(cfg)
        self.carry = carry
        self.think = think
        self.detach = detach
        self.recall = recall
        self.guess = guess
        self.every_pass = every_pass
        self.pass_embed = None
        if tell_pass:                      # it starts at 0, and later passes share the last one
            self.pass_embed = nn.Parameter(torch.zeros(cfg.N, cfg.d_model))

    def sleep(self, h, memory, N=None):
        return self.after_each_pass(h, memory, N)[-1]

    def after_each_pass(self, h, memory, N=None):
        """N + 1 memories: what is left after 0, ..., N passes over the window, and an eviction."""
        N = self.cfg.N if N is None else sleep.whole_number("N", N, 0)
        sleep.check_window(h, memory, self.cfg, asleep=True)
        embedded = h
        S = memory.S
        memories = [self.evict(memory)]
        for n in range(N):
            if n in self.cuts(N):
                h = self.cut(h, embedded)
                S = [self.cut(*pair) for pair in zip(S, memory.S)]
            if self.recall and n > 0:
                h = F.rms_norm(h, h.shape[-1:]) + embedded
            if self.guess and n > 0:
                answers = self.head(self.norm(h)).softmax(-1)  # (B, T, vocab)
                h = h + answers @ self.embed.weight
            if self.pass_embed is not None:
                h = h + self.pass_embed[min(n, len(self.pass_embed) - 1)]
            refined, written, _ = self.one_pass(h, S, memory.cache)
            if "h" in self.carry:
                h = refined
            if "S" in self.carry:
                S = written
            memories.append(self.evict(sleep.Memory(written, memory.cache, 0)))
        return memories

    def cuts(self, N):
        """The passes, from 0, before which the gradient is cut."""
        if not self.detach:
            return []
        if self.every_pass:                # segments of --detach passes, counted from the end
            return [n for n in range(1, N) if (N - n) % self.detach == 0]
        return [N - self.detach]

    def cut(self, now, before):
        """The value of `now`, without its gradient. None stays None.

        It gets the gradient of `before`, what the first pass began with: the passes between are
        skipped. With --every_pass, as in the literature, it gets none.
        """
        if now is None:
            return None
        if self.every_pass:
            return now.detach()
        return now.detach() + before - before.detach()

    def wake(self, h, memory):
        sleep.check_window(h, memory, self.cfg)
        n_awake = memory.n_awake + h.shape[1]
        for _ in range(self.think):        # from the S before the window: a later S saw its tokens
            h, S, cache = self.one_pass(h, memory.S, memory.cache)
        return self.head(self.norm(h)), sleep.Memory(S, cache, n_awake)

    def algorithm_1(self, tokens, targets, asleep, N=None):
        if self.every_pass and torch.is_grad_enabled():
            return self.loss_after_every_pass(tokens, targets, asleep, N)
        return super().algorithm_1(tokens, targets, asleep, N)

    def loss_after_every_pass(self, tokens, targets, asleep, N=None):
        """As Algorithm 1, with N memories: the n-th is evicted after n passes of the last sleep."""
        N = self.cfg.N if N is None else N
        M = targets.shape[1]
        memories = [self.empty_memory(len(tokens))] * N
        logits = []                                            # (N, B, T, vocab) of each window
        for window, window_sleeps in zip(tokens.split(self.cfg.L, 1), asleep):
            h = self.embed(window)
            if window_sleeps:
                memories = self.after_each_pass(h, memories[-1], N)[1:]
                logits.append(h.new_zeros(()).expand(N, *window.shape, self.cfg.vocab_size))
            else:
                awake = [self.wake(h, memory) for memory in memories]
                logits.append(torch.stack([window_logits for window_logits, _ in awake]))
                memories = [self.evict(memory) for _, memory in awake]
        logits = torch.cat(logits, 2)[:, :, -M:]               # (N, B, M, vocab)
        targets = targets.flatten()
        loss = 0.0
        for n, logits_n in enumerate(logits, 1):
            loss_n = F.cross_entropy(logits_n.flatten(0, 1), targets, ignore_index=-1)
            loss = loss + n * loss_n
        weights = N * (N + 1) / 2                              # 1 + 2 + ... + N
        return logits[-1], loss / weights

    def stream(self, tokens, state=None):
        raise ValueError("a changed model does not stream: its sleep begins with a whole window.")


# ------------------------------------------------------------------------------------------------
# Which blocks are looped

class SpanLM(sleep.SleepLM):
    """Loops blocks first to stop - 1 only (Section 6.3).

    The blocks before them run in the first pass of a sleep, those after them in the last.
    """

    def __init__(self, cfg, first, stop):
        super().__init__(cfg)
        check_loop([first, stop], len(self.blocks))
        self.first = first
        self.stop = stop

    def sleep(self, h, memory, N=None):
        N = self.cfg.N if N is None else sleep.whole_number("N", N, 0)
        sleep.check_window(h, memory, self.cfg, asleep=True)
        S = memory.S
        cache = list(memory.cache)
        for n in range(N):
            first = 0 if n == 0 else self.first
            stop = len(self.blocks) if n == N - 1 else self.stop
            h, S, new_cache = self.one_pass(h, S, memory.cache, first, stop)
            cache[first:stop] = new_cache[first:stop]          # a block's last cache
        return self.evict(sleep.Memory(S, cache, 0))

    def one_pass(self, h, S, cache, first=0, stop=None):
        """SleepLM.one_pass through blocks first to stop - 1 only."""
        S = list(S)
        cache = list(cache)
        with torch.autocast(h.device.type, torch.bfloat16, self.cfg.bf16, cache_enabled=False):
            for i in range(len(self.blocks))[first:stop]:
                h, S[i], cache[i] = self.blocks[i](h, S[i], cache[i])
        return h, S, cache


# ------------------------------------------------------------------------------------------------
# Other fast weights: further names for --update_rule

class ReadBefore(sleep.FastWeights):
    """`read_before`: a token reads the S that its window began this pass with.

    So it does not see what earlier tokens wrote in the same pass.
    """

    def write_and_read(self, x, q, k, v, S):
        _, new_S = super().write_and_read(x, q, k, v, S)
        return q @ S.mT, new_S


class TwoWrites(sleep.FastWeights):
    """`two_writes`: a token writes twice, then reads (DeltaProduct, arXiv 2502.10297)."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.k2 = nn.Linear(cfg.d_model, cfg.d_model, bias=False)
        self.v2 = nn.Linear(cfg.d_model, cfg.d_model, bias=False)
        self.b2 = nn.Linear(cfg.d_model, cfg.n_head, bias=False)

    def write_and_read(self, x, q, k, v, S):
        ab = self.ab(x)
        a, b = ab.transpose(1, 2).chunk(2, 1)                  # (B, H, T) each
        speed = self.A_log.exp()[:, None]
        log_alpha = -speed * F.softplus(a + self.dt_bias[:, None])
        k2 = F.normalize(sleep.split_heads(F.silu(self.k2(x)), self.H), dim=-1)
        v2 = sleep.split_heads(F.silu(self.v2(x)), self.H)
        beta2 = self.b2(x).transpose(1, 2).sigmoid()
        # Two steps of the rule a token. It forgets in the first and reads after the second.
        o, S = sleep.fast_weight_rule_chunked(
            in_turn(q, q), in_turn(k, k2), in_turn(v, v2),
            in_turn(log_alpha, torch.zeros_like(log_alpha)), in_turn(b.sigmoid(), beta2), S)
        return o[:, :, 1::2], S


def in_turn(first, second):
    """(B, H, T, ...) twice -> (B, H, 2 T, ...): first, second, first, second, ..."""
    return torch.stack([first, second], 3).flatten(2, 3)


class DeepRead(sleep.FastWeights):
    """`deep_read`: what is read is a key to read with, up to eight times.

    o = S q + w_2 S k_2 + w_3 S k_3 + ..., where k_2 is what S says at q, k_3 what it says at k_2;
    weights w by token and head. The later reads take the S of the window's beginning.
    """
    READS = 8

    def __init__(self, cfg):
        super().__init__(cfg)
        self.w = nn.Linear(cfg.d_model, cfg.n_head * (self.READS - 1), bias=False)

    def write_and_read(self, x, q, k, v, S):
        o, new_S = super().write_and_read(x, q, k, v, S)
        weights = self.w(x).unflatten(2, (self.H, -1)).permute(3, 0, 2, 1)     # (reads, B, H, T)
        said = q @ S.mT                                        # (B, H, T, V), V = K
        for weight in weights:
            said = F.normalize(said, dim=-1) @ S.mT
            o = o + weight[..., None] * said
        return o, new_S


class CopyWrite(sleep.FastWeights):
    """`copy`: a token writes, in part, what S says at a second key k2. A gate g by token and head:

        S_t = S + beta ((1 - g) v + g S k2 - S k) k^T    with S = alpha S_{t-1}
    """

    def __init__(self, cfg):
        super().__init__(cfg)
        self.k2 = nn.Linear(cfg.d_model, cfg.d_model, bias=False)
        self.g = nn.Linear(cfg.d_model, cfg.n_head, bias=False)

    def write_and_read(self, x, q, k, v, S):
        a, b = self.ab(x).transpose(1, 2).chunk(2, 1)          # (B, H, T) each
        speed = self.A_log.exp()[:, None]
        log_alpha = -speed * F.softplus(a + self.dt_bias[:, None])
        k2 = F.normalize(sleep.split_heads(F.silu(self.k2(x)), self.H), dim=-1)
        g = self.g(x).transpose(1, 2).sigmoid()[..., None]     # (B, H, T, 1)
        return read_one_key_write_another(q, k, k - g * k2, (1 - g) * v, log_alpha, b.sigmoid(), S)


def read_one_key_write_another(q, k, r, v, log_alpha, beta, S, chunk=64):
    """sleep.fast_weight_rule_chunked with S_t = S + beta (v - S r) k^T: what is lacking is read at r."""
    outputs = []
    chunks = (x.split(chunk, 2) for x in (q, k, r, v, log_alpha, beta))
    for q_c, k_c, r_c, v_c, log_alpha_c, beta_c in zip(*chunks):
        c = log_alpha_c.clamp(min=-100).cumsum(-1)             # (B, H, C)
        D = c[..., :, None] - c[..., None, :]                  # (B, H, C, C)
        D = D.masked_fill(torch.ones_like(D).triu(1) > 0, -torch.inf).exp()
        decay = c.exp()[..., None]                             # (B, H, C, 1)
        beta_c = beta_c[..., None]
        A = (beta_c * (r_c @ k_c.mT) * D).tril(-1)
        lacking = beta_c * (v_c - decay * (r_c @ S.mT))
        u = torch.linalg.solve_triangular(A, lacking, upper=False, unitriangular=True)
        outputs.append(decay * (q_c @ S.mT) + ((q_c @ k_c.mT) * D) @ u)
        decay_to_end = (c[..., -1:] - c).exp()[..., None]      # (B, H, C, 1)
        S = decay[..., -1:, :] * S + u.mT @ (decay_to_end * k_c)
    return torch.cat(outputs, 2), S


sleep.UPDATE_RULES |= dict(read_before=ReadBefore, two_writes=TwoWrites, deep_read=DeepRead,
                           copy=CopyWrite)


# ------------------------------------------------------------------------------------------------
# Both mixers in a block

class ParallelBlock(sleep.Block):
    """Both mixers read the same tokens; their outputs are normed and averaged (Hymba)."""

    def __init__(self, cfg):
        super().__init__("a", cfg)
        self.fast = sleep.UPDATE_RULES[cfg.update_rule](cfg)
        self.norm_a = nn.RMSNorm(cfg.d_model)
        self.norm_s = nn.RMSNorm(cfg.d_model)

    def forward(self, h, S, cache):
        tail, keys, values = cache
        x = self.norm1(h)
        x, tail = self.conv(x, tail)
        a, keys, values = self.mixer(x, keys, values)
        s, S = self.fast(x, S)
        h = h + (self.norm_a(a) + self.norm_s(s)) / 2
        h = h + self.down(F.relu(self.up(self.norm2(h))).square())
        return h, S, sleep.Cache(tail, keys, values)


class ParallelLM(sleep.SleepLM):
    """Every block is a ParallelBlock."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.blocks = nn.ModuleList(ParallelBlock(cfg) for _ in cfg.layout)
        self.initialize()

    def empty_memory(self, B):
        memory = super().empty_memory(B)
        H = self.cfg.n_head
        K = self.cfg.d_model // H
        S_type = torch.promote_types(self.embed.weight.dtype, torch.float32)
        S = [self.embed.weight.new_zeros(B, H, K, K, dtype=S_type) for _ in self.blocks]
        return memory._replace(S=S)
