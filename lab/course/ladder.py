"""From one line to the method, in seven steps: python -m lab.ladder

Nothing is trained. A cycle of twelve nodes is read edge by edge, a > b, in random order; a node is a
fixed random vector of length 1. Every step changes one thing and prints what it buys: the share of
right answers over 50 cycles, where a guess has 0.09.
"""
import torch
import torch.nn.functional as F

from sleep import gated_delta_rule

NODES, CYCLES, d = 12, 50, 128
g = torch.Generator().manual_seed(0)
node = F.normalize(torch.randn(NODES, d, generator=g), dim=-1)                 # e_a, a node's vector
turn = torch.linalg.qr(torch.randn(4, d, d, generator=g))[0]   # rotations: see key


def cycles():
    """(CYCLES, NODES) twice: the edges a > b of every cycle, in random order."""
    name = torch.rand(CYCLES, NODES, generator=g).argsort(1)
    order = torch.rand(CYCLES, NODES, generator=g).argsort(1)
    return name.gather(1, order), name.roll(-1, 1).gather(1, order)


def key(k, a):
    """The key of "k hops after a": e_a, rotated by turn_k. a: nodes, or their vectors."""
    return (node[a] if a.dtype == torch.long else a) @ turn[k - 1].T


def write(S, keys, values, alpha=1.0, delta=True):
    """S after the writes v k^T, one after another (beta = 1): (CYCLES, d, d)."""
    log_alpha = torch.full(keys.shape[:2], alpha).log()[:, None]               # (CYCLES, 1, T)
    q = k = keys[:, None]                                                      # one head
    return gated_delta_rule(q, k, values[:, None], log_alpha, torch.ones_like(log_alpha), S[:, None],
                            delta)[1][:, 0]


def read(S, keys):
    return keys @ S.mT                     # S k for every key


def right(vectors, wanted):
    """The share of vectors that are nearest to the node that is wanted."""
    return ((vectors @ node.T).argmax(-1) == wanted).double().mean().item()


def walk(a, b, k):
    """The node k hops after each of 0..11: (CYCLES, NODES)."""
    after = torch.empty_like(a).scatter_(1, a, b)
    x = torch.arange(NODES).expand_as(a)
    for _ in range(k):
        x = after.gather(1, x)
    return x


everyone, empty = torch.arange(NODES).expand(CYCLES, -1), torch.zeros(CYCLES, d, d)
old_a, old_b = cycles()
a, b = cycles()
truth = {k: walk(a, b, k) for k in (1, 2, 3, 4)}


def hebbian():
    """1. Hebbian write: S <- S + v k^T. A matrix is a memory: S k is v, and a little of all others."""
    S = write(empty, key(1, a), node[b], delta=False)
    return {"one cycle": right(read(S, key(1, everyone)), truth[1])}


def hebbian_twice():
    S = write(empty, key(1, old_a), node[old_b], delta=False)
    return write(S, key(1, a), node[b], delta=False)


def forgetting():
    """2. Forgetting: S <- alpha S + v k^T. Same write; what is old fades, whether it is right or not."""
    S = write(empty, key(1, old_a), node[old_b], 0.9, delta=False)
    S = write(S, key(1, a), node[b], 0.9, delta=False)
    much = write(empty, key(1, a), node[b], 0.4, delta=False)
    return {"a second cycle over the first, alpha = 1": right(read(hebbian_twice(), key(1, everyone)), truth[1]),
            "alpha = 0.9": right(read(S, key(1, everyone)), truth[1]),
            "its price: one cycle alone, alpha = 0.4": right(read(much, key(1, everyone)), truth[1])}


def delta():
    """3. Delta: first take away what S says at k. Same memory; a new value replaces the old one."""
    S = write(write(empty, key(1, old_a), node[old_b]), key(1, a), node[b])
    return {"a second cycle over the first": right(read(S, key(1, everyone)), truth[1])}


def sleep_by_hand(passes, carry_h=True):
    """Passes over the edges a > b. A token carries h, the node that it has reached: b at first. From the
    second pass on it first moves h one hop, by what S says of it; then it writes h under "n hops after
    a". Without carry_h every pass begins at b again, so no pass gets further than two hops."""
    S, h = empty, node[b]
    for n in range(1, passes + 1):
        if n > 1:
            found = read(S, key(1, h if carry_h else node[b]))
            h = node[(found @ node.T).argmax(-1)]              # the nearest node: an MLP learns that
        S = write(S, key(n if carry_h else min(n, 2), a), h)
    return S


def write_back():
    """4. Read twice, write back: what S says of a is b, what it says of b is two hops after a. Do both
    when all edges are in S, write the second under "2 hops after a", and an answer takes one read."""
    S = write(empty, key(1, a), node[b])
    twice = read(S, key(1, read(S, key(1, everyone))))
    slept = sleep_by_hand(2)
    return {"2 hops, two reads at the answer": right(twice, truth[2]),
            "one read": right(read(S, key(2, everyone)), truth[2]),
            "one read, after a second pass wrote it": right(read(slept, key(2, everyone)), truth[2])}


narrow = lambda vectors: F.normalize(vectors[..., :8], dim=-1)                 # only 8 dimensions


def attention(keys, window):
    """softmax(q k) v over the keys and values that are in the window."""
    return (60 * keys @ window[0].mT).softmax(-1) @ window[1]


def attention_beside():
    """5. Attention beside it: the window is kept as it is. S has as much room as keys have dimensions,
    here 8, for twelve edges; attention has room for its whole window."""
    keys, asked = narrow(key(1, a)), narrow(key(1, everyone))
    S = write(empty[:, :, :8], keys, node[b])
    return {"1 hop by S": right(read(S, asked), truth[1]),
            "1 hop by attention to the window": right(attention(asked, (keys, node[b])), truth[1])}


def evict():
    """6. Evict: a window is finite. Same two memories; the next window, other facts under other keys, has
    pushed the edges out, and S (128 dimensions again) has read it, too."""
    other = key(2, old_a), node[old_b]
    S = write(write(empty, key(1, a), node[b]), *other)
    return {"1 hop by attention to the next window": right(attention(key(1, everyone), other), truth[1]),
            "by S": right(read(S, key(1, everyone)), truth[1])}


def loop():
    """7. Loop h and S: before the eviction, N passes h, S <- Blocks(h, S). h is how far a token has
    come, S what all have found out. Here a pass buys a hop; an answer is still one read."""
    def by_hops(S):
        return [right(read(S, key(k, everyone)), truth[k]) for k in (1, 2, 3, 4)]
    rows = {f"N = {N}: 1, 2, 3, 4 hops": by_hops(sleep_by_hand(N)) for N in (1, 2, 3, 4)}
    return rows | {"N = 4, h thrown away": by_hops(sleep_by_hand(4, carry_h=False))}


STEPS = (hebbian, forgetting, delta, write_back, attention_beside, evict, loop)


def main():
    for step in STEPS:
        print("\n" + "\n".join(line.strip() for line in step.__doc__.splitlines()))
        for what, share in step().items():
            shares = share if isinstance(share, list) else [share]
            print(f"     {what:45}" + "".join(f"{x:7.2f}" for x in shares))
    print("\nIn sleep.py nobody says what h holds, under which key it is written or when to forget: "
          "the blocks learn it.\n`python sleep.py` shows what they learned.")


if __name__ == "__main__":
    main()
