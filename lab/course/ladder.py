"""From one line to the method, in seven steps: python -m lab.course.ladder

Nothing is trained. A cycle of twelve nodes is read edge by edge, a > b, in random order; a node is
a fixed random vector of length 1. Every step changes one thing and prints what it buys: the share
of right answers over 50 cycles, where chance is 0.09.
"""
import torch
import torch.nn.functional as F

from lab.common import parser, program
from sleep import fast_weight_rule

NODES = 12
CYCLES = 50
d = 128                                    # numbers of a vector

g = torch.Generator().manual_seed(0)
node = F.normalize(torch.randn(NODES, d, generator=g), dim=-1)               # e_a, a node's vector
turn = torch.linalg.qr(torch.randn(4, d, d, generator=g))[0]                   # rotations: see key


def cycles():
    """(CYCLES, NODES) twice: the edges a > b of every cycle, in random order."""
    name = torch.rand(CYCLES, NODES, generator=g).argsort(1)
    order = torch.rand(CYCLES, NODES, generator=g).argsort(1)
    a = name.gather(1, order)
    b = name.roll(-1, 1).gather(1, order)
    return a, b


def key(k, a):
    """The key of "k hops after a": e_a, rotated by turn_k. a: nodes, or their vectors."""
    vectors = node[a] if a.dtype == torch.long else a
    return vectors @ turn[k - 1].T


def write(S, keys, values, alpha=1.0, delta=True):
    """S after the writes v k^T, one after another (beta = 1): (CYCLES, d, d)."""
    k = keys[:, None]                                          # one head: (CYCLES, 1, T, d)
    v = values[:, None]
    log_alpha = torch.full(keys.shape[:2], alpha).log()[:, None]               # (CYCLES, 1, T)
    beta = torch.ones_like(log_alpha)
    q = k                                  # what is read meanwhile is not used
    _, S = fast_weight_rule(q, k, v, log_alpha, beta, S[:, None], delta)
    return S[:, 0]


def read(S, keys):
    """S k for every key."""
    return keys @ S.mT


def right(vectors, wanted):
    """The share of vectors that are nearest to the node that is wanted."""
    return (nearest(vectors) == wanted).double().mean().item()


def nearest(vectors):
    return (vectors @ node.T).argmax(-1)


def walk(a, b, k):
    """The node k hops after each of 0..11: (CYCLES, NODES)."""
    after = torch.empty_like(a).scatter_(1, a, b)
    x = torch.arange(NODES).expand_as(a)
    for _ in range(k):
        x = after.gather(1, x)
    return x


everyone = torch.arange(NODES).expand(CYCLES, -1)
empty = torch.zeros(CYCLES, d, d)
old_a, old_b = cycles()
a, b = cycles()
truth = {k: walk(a, b, k) for k in (1, 2, 3, 4)}


# ------------------------------------------------------------------------------------------------
# The steps

def hebbian():
    """1. Hebbian write: S <- S + v k^T. A matrix is a memory: S k is v, and some of the others."""
    S = write(empty, key(1, a), node[b], delta=False)
    return {"one cycle": right(read(S, key(1, everyone)), truth[1])}


def forgetting():
    """2. Forgetting: S <- alpha S + v k^T. Same write; what is old fades, be it right or not."""
    asked = key(1, everyone)
    rows = {}
    for alpha, words in ((1.0, "a second cycle over the first, alpha = 1"), (0.9, "alpha = 0.9")):
        S = write(empty, key(1, old_a), node[old_b], alpha, delta=False)
        S = write(S, key(1, a), node[b], alpha, delta=False)
        rows[words] = right(read(S, asked), truth[1])
    S = write(empty, key(1, a), node[b], 0.4, delta=False)
    rows["its price: one cycle alone, alpha = 0.4"] = right(read(S, asked), truth[1])
    return rows


def delta():
    """3. Delta: first take away what S says at k. Same memory; a new value replaces the old one."""
    S = write(empty, key(1, old_a), node[old_b])
    S = write(S, key(1, a), node[b])
    return {"a second cycle over the first": right(read(S, key(1, everyone)), truth[1])}


def sleep_by_hand(passes, carry_h=True):
    """Passes over the edges a > b. A token carries h, the node that it has reached: b at first.
    From the second pass on it first moves h one hop, by what S says of it; then it writes h under
    "n hops after a". Without carry_h every pass begins at b again, so no pass gets further than
    two hops."""
    S = empty
    h = node[b]
    for n in range(1, passes + 1):
        if n > 1:
            start = h if carry_h else node[b]
            found = read(S, key(1, start))
            h = node[nearest(found)]       # the nearest node: an MLP learns that
        hops = n if carry_h else min(n, 2)
        S = write(S, key(hops, a), h)
    return S


def write_back():
    """4. Read twice, write back: what S says of a is b, what it says of b is two hops after a. Do
    both when all edges are in S, write the second under "2 hops after a", and an answer takes one
    read."""
    S = write(empty, key(1, a), node[b])
    once = read(S, key(1, everyone))
    twice = read(S, key(1, once))
    slept = sleep_by_hand(2)
    asked = key(2, everyone)
    return {"2 hops, two reads at the answer": right(twice, truth[2]),
            "one read": right(read(S, asked), truth[2]),
            "one read, after a second pass wrote it": right(read(slept, asked), truth[2])}


def narrow(vectors):
    """Vectors of 8 dimensions only."""
    return F.normalize(vectors[..., :8], dim=-1)


def attention(queries, keys, values):
    """softmax(q k) v over the keys and values that are in the window."""
    return (60 * queries @ keys.mT).softmax(-1) @ values


def attention_beside():
    """5. Attention beside it: the window is kept as it is. S holds as many edges as keys have
    dimensions, here 8, of twelve; attention holds its whole window."""
    keys = narrow(key(1, a))
    asked = narrow(key(1, everyone))
    S = write(empty[:, :, :8], keys, node[b])
    return {"1 hop by S": right(read(S, asked), truth[1]),
            "1 hop by attention to the window": right(attention(asked, keys, node[b]), truth[1])}


def evict():
    """6. Evict: a window is finite. Same two memories; the next window, other facts under other
    keys, has pushed the edges out, and S (128 dimensions again) has read it, too."""
    next_keys = key(2, old_a)
    next_values = node[old_b]
    asked = key(1, everyone)
    S = write(empty, key(1, a), node[b])
    S = write(S, next_keys, next_values)
    by_attention = attention(asked, next_keys, next_values)
    return {"1 hop by attention to the next window": right(by_attention, truth[1]),
            "by S": right(read(S, asked), truth[1])}


def loop():
    """7. Loop h and S: before the eviction, N passes h, S <- Blocks(h, S). h is how far a token has
    come, S what all have found out. Here a pass buys a hop; an answer is still one read."""
    rows = {}
    for N in (1, 2, 3, 4):
        rows[f"N = {N}: 1, 2, 3, 4 hops"] = by_hops(sleep_by_hand(N))
    rows["N = 4, h thrown away"] = by_hops(sleep_by_hand(4, carry_h=False))
    return rows


def by_hops(S):
    return [right(read(S, key(k, everyone)), truth[k]) for k in (1, 2, 3, 4)]


STEPS = (hebbian, forgetting, delta, write_back, attention_beside, evict, loop)


@program
def main(argv):
    parser(__doc__).parse_args(argv)
    for step in STEPS:
        print()
        for line in (step.__doc__ or "").splitlines():
            print(line.strip())
        for words, shares in step().items():
            if not isinstance(shares, list):
                shares = [shares]
            print(f"     {words:45}" + "".join(f"{share:7.2f}" for share in shares))
    print("\nIn sleep.py nobody says what h holds, under which key it is written or when to "
          "forget: the blocks learn it.\n`python sleep.py` shows what they learned.")


if __name__ == "__main__":
    main()
