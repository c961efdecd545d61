"""Depo: following a shuffled cycle k steps on (Section 6.2, Figure 3)

The edges of one directed cycle of n nodes in random order, then questions: which node is k hops
after q? The edges are evicted before the first question. Storing them is the same work for every k;
only the number of edges that an answer strings together grows. In its first pass a token can read
only the edges before it: it strings edges together as far as they stand in order.

    3 -> 0 , 1 -> 3 , 0 -> 2 , 2 -> 1 ,     2 hops after 1 :     edges, then a question (words)
    3 0 1 3 0 2 2 1                         2 1                  the same, terse

The answer, 0, is said at the last token of the question. It never stands in the input, where it
would help with the next question. (--feed: it does, as in the paper.)

    python train_khop.py                    N = 1 against N = 3, minutes on two CPU cores
    python train_khop.py --preset paper     Section 6.2's sizes, for a GPU

paper does not say: the law of n in training. In the larger presets it is that of Physics of Language
Models 4.1, n from 3 on with weight 1 / (n + sqrt(nodes)); in the cpu preset all have all nodes.
"""
import math

import torch
import torch.nn.functional as F

import sleep

PRESETS = {
    "cpu": dict(N=[1, 3], nodes=12, K=4, queries=12, words=False, feed=False, n_law="all",
                deeper=0.3, question_first=False, L=24, layout="as", d_model=64, n_head=1,
                steps=1200, batch_size=64, lr_muon=1e-2, lr_adamw=4e-3, cooldown=0.4, eval_every=100),
    "gpu": dict(N=[1, 2, 4], nodes=24, K=8, queries=12, words=True, feed=False, n_law="law",
                deeper=0.0, question_first=False, L=20, layout="asas", d_model=256, n_head=4,
                steps=5000, batch_size=128, lr_muon=2e-3, lr_adamw=5e-4, eval_every=250),
    "paper": dict(N=[1, 2, 4], nodes=75, K=16, queries=10, words=True, feed=True, n_law="law",
                  deeper=0.0, question_first=False, L=75, layout="as" * 5, d_model=512, n_head=8,
                  steps=100_000, batch_size=128, lr_muon=2e-3, lr_adamw=5e-4, eval_every=1000,
                  conv="s"),
}
PAD, ARROW, COMMA, HOPS, AFTER, COLON, ONE = range(7)      # then 1..K as ONE.., then the nodes


FLAGS = dict(
    nodes="nodes of the largest cycle",
    K="most hops that are asked for",
    queries="questions in a sequence, with distinct starts",
    words="4 tokens an edge and 5 a question, as in the paper; else 2 and 2",
    feed="as in the paper, every answer follows its question in the input, where later ones see it",
    deeper="first share of the steps, in which the largest k that is trained grows from 1 to K",
    n_law="nodes in training: all, law = 1 / (n + sqrt(nodes)) from 3 on, or mix = half of each",
    question_first="ask before the edges are read")


class Cycles:
    """The task, as sleep.main wants it."""
    name = "khop"

    def __init__(self, args, seed):
        self.nodes, self.K, self.M, self.n_law = args.nodes, args.K, args.queries, args.n_law
        self.words, self.feed, self.question_first = args.words, args.feed, args.question_first
        self.deeper = args.deeper * args.steps                 # steps until k reaches K
        self.batch_size, self.seed, self.device = args.batch_size, seed, args.device
        if not (7 <= self.nodes <= 10_000 and 1 <= self.K <= 10_000):
            raise sleep.BadInput(f"--nodes {self.nodes} --K {self.K}: take 7 to 10,000 nodes "
                                 "(fewer make too few cycles to hold out) and a K of 1 to 10,000.")
        if self.n_law not in ("all", "law", "mix") or not 0 <= args.deeper <= 1:
            raise sleep.BadInput(f"--n_law {self.n_law} must be all, law or mix, and --deeper "
                                 f"{args.deeper} a share of the steps, from 0 to 1.")
        if not 1 <= self.M <= self.nodes:
            raise sleep.BadInput(f"--queries {self.M} must be between 1 and the {self.nodes} "
                                 "nodes: every question of a sequence starts at another node.")
        self.node = ONE + self.K                               # the token of node 0
        self.vocab_size = self.node + self.nodes
        edge = 4 if self.words else 2
        ask = (5, 2) if self.words else (2, 1)                 # tokens, and if it was asked before
        self.ask = ask[self.question_first] + self.feed
        self.said = -2 if self.feed else -1                    # which of them says the answer
        self.prefix = self.M * (4 if self.words else 2) if self.question_first else 0
        context = self.prefix + edge * self.nodes
        if not 1 <= args.L <= 2 * context:
            raise sleep.BadInput(f"--L {args.L} must be between 1 and {2 * context}, twice the tokens "
                                 "before the answers: of a longer window most would be padding.")
        if self.M * self.ask > args.L and args.L % self.ask:
            raise sleep.BadInput(f"--L {args.L} would cut a question of {self.ask} tokens in two: "
                                 "take a multiple, or fewer --queries.")
        self.pad = -context % args.L                           # whole windows before the answers
        self.context = self.pad + context
        self.T = self.context + self.M * self.ask
        self.test_k = ([2 ** i for i in range(self.K.bit_length())] if self.K > 8
                       else list(range(1, self.K + 1)))
        self.test = self.make_batch(-1)
        # The best guess without the edges: any node but the one that is asked about. (Fed answers
        # allow a better one: not the earlier answers of the same k.)
        self.chance = dict(accuracy={str(k): 1 / (self.nodes - 1) for k in self.test_k},
                           loss={str(k): math.log(self.nodes - 1) for k in self.test_k})

    def make_batch(self, step):
        """Step -> tokens (B, T), targets (B, M * ask), from seed and step alone; -1 is the test."""
        test, device = step < 0, self.device
        g = torch.Generator(device).manual_seed(0 if test else self.seed * 10 ** 9 + step + 1)
        rand = lambda *shape: torch.rand(*shape, generator=g, device=device)
        B = 512 if test else self.batch_size
        rows = 12 * B if test else max(2 * B, B + 30)          # more than enough, see `right` below
        sizes = torch.arange(3, self.nodes + 1, device=device)
        law = 1 / (sizes + math.sqrt(self.nodes))
        n = sizes[torch.multinomial(law, rows, True, generator=g)]             # (rows,)
        everything = {"all": 1.0, "law": 0.0, "mix": 0.5}[self.n_law] if not test else 1.0
        n = torch.where(rand(rows) < everything, self.nodes, n)[:, None]       # (rows, 1)
        i = torch.arange(self.nodes, device=device)
        name = rand(rows, self.nodes).argsort(1)               # node at place i of the cycle
        after = name.gather(1, (i + 1) % n)                    # the node it points to
        live = i < n
        # One cycle in eight is kept for the test. Rows of this side come first.
        code = ((name + 1) * (after + 1) * live).sum(1)
        right = (((code * 2654435761) & (2 ** 32 - 1)) < 2 ** 29) == test
        pick = right.int().argsort(descending=True, stable=True)[:B]
        n, name, after, live = n[pick], name[pick], after[pick], live[pick]

        def phrase(*parts):                                    # numbers and (B, m) -> (B, m, len)
            shape = next(p.shape for p in parts if torch.is_tensor(p))
            return torch.stack([p if torch.is_tensor(p) else torch.full(shape, p, device=device)
                                for p in parts], -1)

        source, target = self.node + name, self.node + after
        edges = phrase(source, ARROW, target, COMMA) if self.words else phrase(source, target)
        edges = edges * live[..., None]                        # PAD is 0
        order = torch.where(live, rand(B, self.nodes), -1.0).argsort(1)        # padding to the left
        edges = edges.gather(1, order[..., None].expand_as(edges)).flatten(1)

        start = torch.where(live, rand(B, self.nodes), 2.0).argsort(1)[:, :self.M]     # distinct
        asked = start < n                                      # (B, M): a small cycle has fewer
        if test:
            k = torch.tensor(self.test_k, device=device)[
                torch.randint(len(self.test_k), start.shape, generator=g, device=device)]
        else:
            grown = 1 + int(self.K * step / self.deeper) if step < self.deeper else self.K
            k = torch.randint(1, min(grown, self.K) + 1, start.shape, generator=g, device=device)
        q = self.node + name.gather(1, start)
        a = self.node + name.gather(1, (start + k) % n)
        question = phrase(ONE - 1 + k, HOPS, AFTER, q) if self.words else phrase(ONE - 1 + k, q)
        first = []
        if self.question_first:            # whole questions in front; before the answers q again
            first, question = [(question * asked[..., None]).flatten(1)], q[..., None]
        colon = [torch.full_like(question[..., :1], COLON)] * self.words
        answer = [a[..., None]] * self.feed
        asking = torch.cat([question, *colon, *answer], -1) * asked[..., None]         # (B, M, ask)
        targets = torch.full_like(asking, -1)
        targets[..., self.said] = torch.where(asked, a, -1)
        padding = edges.new_full((B, self.pad), PAD)
        return torch.cat([padding, *first, edges, asking.flatten(1)], 1), targets.flatten(1)

    def hops(self, tokens):
        """The k of every question, (B, M)."""
        if self.question_first:
            questions = tokens[:, self.pad: self.pad + self.prefix]
        else:
            questions = tokens[:, self.context:]
        return questions.unflatten(1, (self.M, -1))[..., 0] - (ONE - 1)

    def score(self, tokens, targets, logits):
        """Accuracy and mean cross entropy in nats over the whole vocabulary, for each k."""
        logits = logits.unflatten(1, (self.M, -1))[:, :, self.said]            # (B, M, vocab)
        a = targets.unflatten(1, (self.M, -1))[..., self.said]
        k = self.hops(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), a.flatten(), ignore_index=-1,
                               reduction="none").view_as(a)
        right, metrics = logits.argmax(-1) == a, dict(accuracy={}, loss={})
        for hops in sorted(set(k[a >= 0].tolist())):
            chosen = (k == hops) & (a >= 0)
            metrics["accuracy"][str(hops)] = right[chosen].float().mean().item()
            metrics["loss"][str(hops)] = loss[chosen].float().mean().item()
        return metrics

    def show(self, tokens, targets):
        k = self.hops(tokens[None])[0].tolist()
        told = targets.unflatten(0, (self.M, -1))[:, self.said].tolist()
        ask = tokens[self.context:].unflatten(0, (self.M, -1))
        edges = tokens[self.pad + self.prefix: self.context]
        edges = edges[edges >= self.node].view(-1, 2) - self.node
        text = ["  " + ", ".join(f"{a} -> {b}" for a, b in edges.tolist())]
        asked = (ask[:, self.said - self.words] - self.node).tolist()
        text += [f"  {hops} hops after {q}: {a - self.node}"
                 for hops, q, a in zip(k, asked, told) if a >= 0]
        return "\n".join(text)


if __name__ == "__main__":
    sleep.main(__doc__, PRESETS, FLAGS, Cycles)
