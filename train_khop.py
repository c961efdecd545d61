"""k hops on a shuffled cycle: the task Depo of Physics of Language Models 4.1 (Section 6.2, Figure 3)

A sequence shows the edges of one directed cycle of n nodes in random order. Then it asks: which
node is k hops after q? The edges are evicted before the first question. To store them is the same
work for every k; only the number of edges to follow grows. In the first pass a token has read only
the edges before it, so it can follow a chain only where its edges happen to stand in order.

    3 -> 0 , 1 -> 3 , 0 -> 2 , 2 -> 1 ,     2 hops after 1 :     edges, then a question (--words)
    3 0 1 3 0 2 2 1                         2 1                  the same: k, then q (--no-words)

The answer, 0, is said at the last token of the question. It is not in the input, where it would
help with the next question. (With --feed it is, as in the paper.)

    python train_khop.py                    N = 1 against N = 3, minutes on two CPU cores
    python train_khop.py --preset paper     Section 6.2's sizes, for a GPU

Our choice, as the paper does not say it: n in training. In the cpu preset every cycle has all
nodes. The larger presets take n as in Physics of Language Models 4.1, from 3 on with weight 1 / (n +
sqrt(nodes)). A test cycle always has all nodes.
"""
import math

import torch
import torch.nn.functional as F

import sleep

PRESETS = {
    "cpu": dict(N=[1, 3], nodes=12, K=4, queries=12, words=False, feed=False, n_law="all",
                deeper=0.3, L=24, layout="as", d_model=64, n_head=1, steps=1200, batch_size=64,
                lr_muon=1e-2, lr_adamw=4e-3, cooldown=0.4, eval_every=100),
    "gpu": dict(N=[1, 2, 4], nodes=24, K=8, queries=12, words=True, feed=False, n_law="law",
                deeper=0.0, L=20, layout="asas", d_model=256, n_head=4, steps=5000, batch_size=128,
                lr_muon=2e-3, lr_adamw=5e-4, eval_every=250),
    "paper": dict(N=[1, 2, 4], nodes=75, K=16, queries=10, words=True, feed=True, n_law="law",
                  deeper=0.0, L=75, layout="as" * 5, d_model=512, n_head=8, steps=100_000,
                  batch_size=128, lr_muon=2e-3, lr_adamw=5e-4, eval_every=1000, conv="s"),
}
FLAGS = dict(
    nodes="nodes of the largest cycle",
    K="most hops that are asked for; beyond 8 the test asks for powers of two only",
    queries="questions in a sequence, with distinct starts",
    words="4 tokens an edge and 5 a question, as in the paper; else 2 and 2",
    feed="as in the paper, every answer follows its question in the input, where later ones see it",
    deeper="first share of the steps, in K equal phases: k is at most 1, then 2, and so on",
    n_law="nodes of a training cycle: all, or law, n >= 3 with weight 1 / (n + sqrt(nodes))")

# Tokens: seven words, of which ONE is the number 1, then 2..K, then the nodes.
PAD, ARROW, COMMA, HOPS, AFTER, COLON, ONE = range(7)


def phrase(*words):
    """Words -> tokens (B, m, words). A word is a tensor (B, m) or one token; the first is a tensor."""
    columns = [word if torch.is_tensor(word) else torch.full_like(words[0], word) for word in words]
    return torch.stack(columns, -1)


class Cycles:
    """The task, as sleep.main wants it.

    A cycle is n (B, 1), its number of nodes, and cycle (B, nodes): cycle[i] is the node at place i,
    and an edge goes from place i to place i + 1, modulo n. Places from n on are not used.
    """
    name = "khop"

    def __init__(self, args, seed):
        self.nodes = args.nodes
        self.K = args.K
        self.M = args.queries
        self.words = args.words
        self.feed = args.feed
        self.n_law = args.n_law
        self.phases_end = args.deeper * args.steps             # the last step of the K phases
        self.batch_size = args.batch_size
        self.seed = seed
        self.device = args.device
        self.check(args)
        self.node = ONE + self.K                               # the token of node 0
        self.vocab_size = self.node + self.nodes
        self.ask = (5 if self.words else 2) + self.feed        # tokens of a question
        self.said = -2 if self.feed else -1                    # which of them says the answer
        edges = (4 if self.words else 2) * self.nodes          # tokens of all edges
        if not 1 <= args.L <= 2 * edges:
            raise sleep.BadInput(f"--L {args.L} must be from 1 to {2 * edges}, twice the tokens of "
                                 "the edges: of a longer window most would be padding.")
        if self.M * self.ask > args.L and args.L % self.ask:
            raise sleep.BadInput(f"--L {args.L} would cut a question of {self.ask} tokens in two: "
                                 "take a multiple, or fewer --queries.")
        self.pad = -edges % args.L                             # fills whole windows with the edges
        self.context = self.pad + edges                        # tokens before the first question
        self.T = self.context + self.M * self.ask
        self.test_k = list(range(1, self.K + 1))
        if self.K > 8:                                         # only powers of two
            self.test_k = [2 ** i for i in range(self.K.bit_length())]
        self.test = self.make_batch(-1)
        self.chance = self.best_guess()

    def check(self, args):
        """BadInput, in a sentence, for flags that make no sense."""
        if not 7 <= self.nodes <= 1000:
            raise sleep.BadInput(f"--nodes {self.nodes} must be from 7 to 1,000: fewer make too "
                                 "few cycles to keep some for the test.")
        if not 1 <= self.K < self.nodes:
            raise sleep.BadInput(f"--K {self.K} must be from 1 to {self.nodes - 1}, fewer than the "
                                 f"--nodes {self.nodes}: on a cycle of n nodes n hops lead home, "
                                 "and k hops forward are n - k hops back.")
        if not 1 <= self.M <= self.nodes:
            raise sleep.BadInput(f"--queries {self.M} must be from 1 to the {self.nodes} nodes: "
                                 "every question of a sequence starts at another node.")
        if self.n_law not in ("all", "law"):
            raise sleep.BadInput(f"--n_law {self.n_law} must be all or law.")
        sleep.check_limits(args, dict(deeper=(0, 1)))

    def best_guess(self):
        """The score of a guess among the nodes other than the one asked about.

        On a cycle of all nodes each of them is as likely, whatever k is. Without the edges there is
        no better guess, unless answers are in the input (--feed). Then the earlier answers to the
        same k are known to be wrong, which this number does not count.
        """
        others = self.nodes - 1
        return dict(accuracy={str(k): 1 / others for k in self.test_k},
                    loss={str(k): math.log(others) for k in self.test_k})

    def make_batch(self, step):
        """Step -> tokens (B, T), targets (B, M * ask), from seed and step alone; -1 is the test."""
        test = step < 0
        B = 512 if test else self.batch_size
        g = torch.Generator(self.device)
        g.manual_seed(0 if test else self.seed * 10 ** 9 + step + 1)
        n, cycle = self.draw_cycles(B, test, g)
        edges = self.write_edges(n, cycle, g)
        questions, targets = self.ask_questions(n, cycle, step, g)
        padding = torch.full((B, self.pad), PAD, device=self.device)
        return torch.cat([padding, edges, questions], 1), targets

    def draw_cycles(self, B, test, g):
        """-> n (B, 1) and cycle (B, nodes). One cycle in eight is kept for the test, by a hash."""
        # Draw more than B, keep B on the right side of the hash. On average 12 B / 8 are test
        # cycles, or 2 B * 7 / 8 training cycles; fewer than B has a probability below 1e-12.
        rows = 12 * B if test else max(2 * B, B + 30)
        sizes = torch.arange(3, self.nodes + 1, device=self.device)
        weights = 1 / (sizes + math.sqrt(self.nodes))
        n = sizes[torch.multinomial(weights, rows, replacement=True, generator=g)]
        # The n that is overwritten here, and the numbers below it, are drawn and not used: every
        # recorded run depends on the order of draws.
        if test or self.n_law == "all":
            n = torch.full_like(n, self.nodes)
        torch.rand(rows, generator=g, device=self.device)
        n = n[:, None]                                         # (rows, 1)
        cycle = torch.rand(rows, self.nodes, generator=g, device=self.device).argsort(1)

        place = torch.arange(self.nodes, device=self.device)
        after = cycle.gather(1, (place + 1) % n)               # the node after cycle[place]
        # The hash is of a sum over edges, so a cycle has the same code wherever it begins.
        total = ((cycle + 1) * (after + 1) * (place < n)).sum(1)
        code = total * 2654435761 % 2 ** 32                    # Knuth's multiplicative hash
        right_side = (code < 2 ** 29) == test
        # Those on the right side come first, in the order in which they were drawn.
        first = right_side.int().argsort(descending=True, stable=True)[:B]
        return n[first], cycle[first]

    def write_edges(self, n, cycle, g):
        """n, cycle -> tokens (B, nodes * 2 or 4): the edges in random order, padding before them."""
        place = torch.arange(self.nodes, device=self.device)
        source = self.node + cycle
        target = self.node + cycle.gather(1, (place + 1) % n)
        edges = phrase(source, ARROW, target, COMMA) if self.words else phrase(source, target)
        used = place < n                                       # (B, nodes)
        edges = torch.where(used[..., None], edges, PAD)
        key = torch.rand(cycle.shape, generator=g, device=self.device)
        order = torch.where(used, key, -1.0).argsort(1)        # the padding first
        return edges.gather(1, order[..., None].expand_as(edges)).flatten(1)

    def ask_questions(self, n, cycle, step, g):
        """n, cycle -> tokens of the questions and their targets, both (B, M * ask).

        A question starts at a place that no other one of its sequence has. A cycle of fewer than M
        nodes has fewer questions; the rest is padding.
        """
        place = torch.arange(self.nodes, device=self.device)
        key = torch.rand(cycle.shape, generator=g, device=self.device)
        order = torch.where(place < n, key, 2.0).argsort(1)    # the unused places last
        start = order[:, :self.M]
        asked = start < n                                      # (B, M)
        k = self.draw_k(start.shape, step, g)
        q = self.node + cycle.gather(1, start)
        a = self.node + cycle.gather(1, (start + k) % n)

        number = ONE - 1 + k
        words = [number, HOPS, AFTER, q, COLON] if self.words else [number, q]
        if self.feed:
            words.append(a)
        questions = torch.where(asked[..., None], phrase(*words), PAD)         # (B, M, ask)
        targets = torch.full_like(questions, -1)
        targets[..., self.said] = torch.where(asked, a, -1)
        return questions.flatten(1), targets.flatten(1)

    def draw_k(self, shape, step, g):
        """The hops of every question: in the test one of test_k, in training 1 to largest_k."""
        if step < 0:
            choices = torch.tensor(self.test_k, device=self.device)
        else:
            choices = torch.arange(1, self.largest_k(step) + 1, device=self.device)
        return choices[torch.randint(len(choices), shape, generator=g, device=self.device)]

    def largest_k(self, step):
        """The most hops of a training step: 1 at first, K after the share `deeper` of the steps."""
        if step >= self.phases_end:
            return self.K
        return 1 + int(self.K * step / self.phases_end)

    def hops(self, tokens):
        """Tokens (B, T) -> the k of every question, (B, M)."""
        questions = tokens[:, self.context:].unflatten(1, (self.M, self.ask))
        return questions[..., 0] - (ONE - 1)

    def score(self, tokens, targets, logits):
        """Accuracy and mean cross entropy in nats over the whole vocabulary, for each k.

        targets (B, M * ask), logits (B, M * ask, vocab)
        """
        logits = logits.unflatten(1, (self.M, self.ask))[:, :, self.said]      # (B, M, vocab)
        a = targets.unflatten(1, (self.M, self.ask))[..., self.said]           # (B, M)
        asked = a >= 0
        k = self.hops(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), a.flatten(), ignore_index=-1, reduction="none")
        loss = loss.view_as(a)
        right = logits.argmax(-1) == a
        metrics = dict(accuracy={}, loss={})
        for hops in sorted(set(k[asked].tolist())):
            chosen = asked & (k == hops)
            metrics["accuracy"][str(hops)] = right[chosen].float().mean().item()
            metrics["loss"][str(hops)] = loss[chosen].float().mean().item()
        return metrics

    def show(self, tokens, targets):
        """One example as text. tokens (T,), targets (M * ask,)"""
        edges = tokens[self.pad: self.context]
        edges = edges[edges >= self.node].view(-1, 2) - self.node
        lines = ["  " + ", ".join(f"{a} -> {b}" for a, b in edges.tolist())]
        k = self.hops(tokens[None])[0].tolist()
        questions = tokens[self.context:].unflatten(0, (self.M, self.ask))
        q = (questions[:, 3 if self.words else 1] - self.node).tolist()
        answers = targets.unflatten(0, (self.M, self.ask))[:, self.said].tolist()
        for i in range(self.M):
            if answers[i] >= 0:
                lines.append(f"  {k[i]} hop{'s' * (k[i] > 1)} after {q[i]}: {answers[i] - self.node}")
        return "\n".join(lines)


if __name__ == "__main__":
    sleep.main(__doc__, PRESETS, FLAGS, Cycles)
