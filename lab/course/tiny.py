"""The whole of "Do Language Models Need Sleep?" on three screens: python -m lab.course.tiny

A model reads the edges of a cycle, sleeps over them for N passes, and forgets them. Then it is
asked which node is k hops after another one. A minute on a CPU trains N = 1 and N = 3: of three
hops N = 3 answers at least 0.98 in three seeds, N = 1 at most 0.30. The same weights in sleep.py
give the same numbers. Here are one head, the delta rule, hard eviction, and no short convolution.
"""
import argparse
import torch
import torch.nn as nn
import torch.nn.functional as F

NODES = 8                                  # of a cycle
K = 3                                      # most hops that are asked for
L = NODES                                  # window of attention: all edges, one token each
d = 32                                     # width, and size of a key and of a value
STEPS = 1000                               # of training

# A token is the sum of two words: an edge is "from a" and "to b", a question "from a" and "k hops".
TO = NODES                                 # the number of the word "to 0"; "from 0" is 0
HOPS = 2 * NODES                           # the number of the word "1 hop"


def make_batch(size, hardest, g, test=False):
    """Tokens (size, 2 L, 2): L edges, then L questions; their answers and their k, (size, L)."""
    name = torch.rand(16 * size, NODES, generator=g).argsort(1)    # place on the cycle -> node
    after = name.roll(-1, 1).gather(1, name.argsort(1))            # node -> the one after it
    for_test = (after * torch.arange(NODES) ** 2).sum(1) % 8 == 0  # a ninth of all cycles
    name = name[for_test == test][:size]                           # 16 times as many were drawn
    after = after[for_test == test][:size]
    a = torch.rand(size, NODES, generator=g).argsort(1)            # edges in random order
    edges = torch.stack([a, TO + after.gather(1, a)], 2)
    k = torch.randint(1, hardest + 1, (size, NODES), generator=g)
    place = torch.rand(size, NODES, generator=g).argsort(1)        # every node is asked about once
    questions = torch.stack([name.gather(1, place), HOPS + k - 1], 2)
    answers = name.gather(1, (place + k) % NODES)
    return torch.cat([edges, questions], 1), answers, k


def matrix(n_in, n_out):
    linear = nn.Linear(n_in, n_out, bias=False)
    nn.init.normal_(linear.weight, std=n_in ** -0.5)
    return linear


def norm(x, eps=None):
    return F.rms_norm(x, (d,), eps=eps)            # every vector gets the length sqrt(d)


def rotate(x):
    """Rotary positions: the place t turns pairs of features, so q k depends on distances."""
    angle = torch.arange(x.shape[1])[:, None] * 10000 ** (-torch.arange(0, d, 2) / d)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class Model(nn.Module):
    def __init__(self, N):
        super().__init__()
        self.N = N                                             # passes of a sleep
        self.embed = nn.Embedding(2 * NODES + K, d)
        self.attention_qkv = matrix(d, 3 * d)
        self.attention_o = matrix(d, d)
        self.up_1 = matrix(d, 4 * d)
        self.down_1 = matrix(4 * d, d)
        self.qkv = matrix(d, 3 * d)
        self.beta = matrix(d, 1)                               # how strongly a token is written
        self.gate = matrix(d, d)                               # what is let through of a read
        self.o = matrix(d, d)
        self.up_2 = matrix(d, 4 * d)
        self.down_2 = matrix(4 * d, d)
        self.head = matrix(d, NODES)

    def attention(self, x):
        """The exact memory of a window: a token looks at itself and at all before it (Eq. 1-2)."""
        q, k, v = self.attention_qkv(x).chunk(3, -1)
        read = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.attention_o(read)

    def fast_weights(self, x, S):
        """The memory that survives (Eq. 3): S (B, d, d), with S k close to v; x (B, T, d)."""
        q, k, v = F.silu(self.qkv(x)).chunk(3, -1)
        q = F.normalize(q, dim=-1)
        k = F.normalize(k, dim=-1)                             # of length 1: no write overshoots
        beta = self.beta(x).sigmoid()                          # (B, T, 1)
        reads = []
        for t in range(x.shape[1]):
            k_t = k[:, t, :, None]                             # a column (B, d, 1)
            lacking = v[:, t, :, None] - S @ k_t               # what S does not yet say at k_t
            S = S + beta[:, t, :, None] * lacking @ k_t.mT     # the delta rule writes it
            reads.append(S @ q[:, t, :, None])
        o = norm(torch.cat(reads, 2).mT, 1e-5)                 # (B, T, d)
        return self.o(o * F.silu(self.gate(x))), S

    def one_pass(self, h, S):
        """h, S <- Blocks(h, S): each part reads h and adds what it finds (Eq. 5)."""
        h = h + self.attention(norm(h))
        h = h + self.down_1(F.relu(self.up_1(norm(h))).square())
        read, S = self.fast_weights(norm(h), S)
        h = h + read
        h = h + self.down_2(F.relu(self.up_2(norm(h))).square())
        return h, S

    def forward(self, tokens, answers):
        """Algorithm 1: tokens (B, T, 2), answers (B, L) -> logits (B, L, NODES), loss."""
        *context, questions = tokens.split(L, dim=1)           # line 2: windows of L tokens
        S = self.head.weight.new_zeros(len(tokens), d, d)      # line 1
        for window in context:                                 # line 3
            h = self.embed(window).sum(2)                      # line 4
            for _ in range(self.N):                            # line 6: the sleep
                h, S = self.one_pass(h, S)                     # line 7: h and S both go on
            # The window is evicted. h is dropped, and later tokens cannot attend to it: S remains.
        h = self.embed(questions).sum(2)
        h, S = self.one_pass(h, S)                             # line 10: awake, one pass is all
        logits = self.head(norm(h))
        return logits, F.cross_entropy(logits.flatten(0, 1), answers.flatten())    # line 11


def train(N, steps=STEPS, seed=0):
    """Train a model; yields the step and the share of right answers by hops, ten times."""
    torch.manual_seed(seed)
    model = Model(N)
    rest = [model.embed.weight, model.beta.weight, model.head.weight]
    matrices = [p for p in model.parameters() if all(p is not other for other in rest)]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0)           # Section 6.1; our rates
    adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.0)
    g = torch.Generator().manual_seed(seed)
    test_tokens, test_answers, test_k = make_batch(500, K, g, test=True)
    for step in range(1, steps + 1):
        hardest = min(K, 1 + 5 * K * step // steps)            # one hop first, soon all
        tokens, answers, _ = make_batch(32, hardest, g)
        _, loss = model(tokens, answers)
        model.zero_grad()
        loss.backward()                                        # through all passes (line 14)
        muon.step()
        adamw.step()
        if step % max(1, steps // 10) == 0:
            with torch.no_grad():
                right = model(test_tokens, test_answers)[0].argmax(-1) == test_answers
            yield step, [right[test_k == k].float().mean().item() for k in range(1, K + 1)]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    print(f"Share of right answers, by hops from 1 to {K}; chance is {1 / (NODES - 1):.2f}.")
    for N in (1, 3):
        for step, right in train(N):
            print(f"N = {N} | step {step:4} | " + "  ".join(f"{share:.2f}" for share in right))
