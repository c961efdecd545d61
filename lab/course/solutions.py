"""One solution to each exercise of lab/course/exercises.py."""
import math

import torch
import torch.nn.functional as F

import sleep


# 1. The delta rule replaces, the Hebbian rule adds. In K dimensions there are K orthogonal keys.

def recalled(v0, v1):
    return v1, v0 + v1


def capacity(V, K):
    return K


def changed_by(keys, ninth):
    return (keys @ ninth).abs() > 1e-4


# 2. L * N tokens pass, and every one decays S.

def log_alpha_for_half(L, N):
    return -math.log(2) / (L * N)


# 3. A second delta write corrects what the first left; a Hebbian one adds the same overlap again.

def delta_write(S, k, v, beta):
    return S + beta * torch.outer(v - S @ k, k)


def which_replay_repairs():
    return {"delta"}


# 4. Replay does not compose; reading twice and writing under another key does.

def compose(S, keys, keys2):
    for key, value in zip(keys2, (S @ S @ keys.T).T):
        S = delta_write(S, key, value, 1.0)
    return S


# 5. c is the running sum of log_alpha: e^c is what is left of S.

def two_tokens(q, k, v, log_alpha, beta, S):
    c1 = log_alpha[0]
    c2 = log_alpha[0] + log_alpha[1]
    decay = (c2 - c1).exp()                # of what the first token wrote, at the second
    u1 = beta[0] * (v[0] - c1.exp() * S @ k[0])
    u2 = beta[1] * (v[1] - c2.exp() * S @ k[1] - decay * u1 * (k[0] @ k[1]))
    o1 = c1.exp() * S @ q[0] + u1 * (k[0] @ q[0])
    o2 = c2.exp() * S @ q[1] + decay * u1 * (k[0] @ q[1]) + u2 * (k[1] @ q[1])
    S = c2.exp() * S + decay * torch.outer(u1, k[0]) + torch.outer(u2, k[1])
    return torch.stack([o1, o2]), S


# 6. Hard eviction: only S crosses. Sliding: the last L - 1 tokens do, too.

def evict(memory, eviction, L):
    keep = 0 if eviction == "hard" else L - 1
    cache = []
    for tail, keys, values in memory.cache:
        if keys is not None:
            keys = sleep.latest(keys, keep)
            values = sleep.latest(values, keep)
        cache.append(sleep.Cache(sleep.latest(tail, keep), keys, values))
    return sleep.Memory(memory.S, cache, 0)


def can_depend(eviction, S_emptied, N):
    return N > 0 and (eviction == "sliding" or not S_emptied)


def equal_parts():
    return {"S"}                           # sleep empties the cache, and nothing is awake


# 7. Windows in which nothing is predicted sleep, N passes each; the others take one.

def sleep_over(model, h, memory, N):
    S = memory.S
    for _ in range(N):
        h, S, _ = model.one_pass(h, S, memory.cache)
    return model.evict(sleep.Memory(S, memory.cache, 0))


def passes_in_all(T, L, M, N):
    windows = math.ceil(T / L)
    asleep = (T - M) // L
    return asleep * N + windows - asleep


# 8. The S of the window's tokens, read awake, is thrown away: the sleep begins before them.

def stream(model, tokens):
    before = model.empty_memory(len(tokens))
    now = before
    window = []
    logits = []
    for h in model.embed(tokens).split(1, 1):
        token_logits, now = model.wake(h, now)
        logits.append(token_logits)
        window.append(h)
        if len(window) == model.cfg.L:
            before = model.sleep(torch.cat(window, 1), before)
            now = before
            window = []
    return torch.cat(logits, 1)


# 9. A sleep that stops by itself.

def sleep_until_still(model, h, memory, threshold, most):
    S = memory.S
    for n in range(1, most + 1):
        new_h, S, _ = model.one_pass(h, S, memory.cache)
        moved = (new_h - h).norm() / new_h.norm()
        h = new_h
        if moved < threshold:
            break
    return model.evict(sleep.Memory(S, memory.cache, 0)), n


# 10. The gates of FastWeights, with a mask; and a task.

class Unwritten(sleep.FastWeights):
    def write_and_read(self, x, q, k, v, S):
        written = (x[..., 0] >= 0)[:, None]                                    # (B, 1, T)
        a, b = self.ab(x).transpose(1, 2).chunk(2, 1)                          # (B, H, T) each
        beta = b.sigmoid() * written
        speed = self.A_log.exp()[:, None]
        log_alpha = -speed * F.softplus(a + self.dt_bias[:, None]) * written
        return sleep.fast_weight_rule_chunked(q, k, v, log_alpha, beta, S)


class Majority:
    name = "majority"
    vocab_size = 3

    def __init__(self, args, seed):
        self.args = args
        self.seed = seed
        self.T = args.L + 1
        self.test = self.make_batch(-1)
        ones = self.test[1].float().mean().item()
        self.chance = dict(accuracy=max(ones, 1 - ones))

    def make_batch(self, step):
        seed = 0 if step < 0 else self.seed * 10 ** 9 + step + 1
        g = torch.Generator(self.args.device).manual_seed(seed)
        bits = torch.randint(2, (self.args.batch_size, self.args.L), generator=g, device=g.device)
        commoner = (2 * bits.sum(1, keepdim=True) > self.args.L).long()
        return torch.cat([bits, torch.full_like(commoner, 2)], 1), commoner

    def score(self, tokens, targets, logits):
        return dict(accuracy=(logits.argmax(-1) == targets).float().mean().item())
