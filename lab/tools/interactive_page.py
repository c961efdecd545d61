"""One sleep of a trained model as an interactive page that works offline.

    python -m lab.tools.interactive_page lab/models/khop-N3.pt             -> sleep.html
    python -m lab.tools.interactive_page out/a/N4-seed0.pt --seed 3 --out my.html

The cycle, S of every head, a slider for the window and the pass; a click on a question shows what
the model would answer after every pass. Open it in a browser.
"""
import json
import re
from pathlib import Path

import sleep
from lab.common import PICTURES, check_output, parser, program
from lab.course import demo

PAGE = PICTURES / "sleep.html"             # a page is this one with other numbers


def numbers(model, task, edges):
    """All that the page draws."""
    frames, _ = demo.watch(model, task, demo.spell(task, edges), model.cfg.N)
    L = model.cfg.L
    tokens_of_an_edge = 4 if task.words else 2
    window_of_edge = [(task.pad + i * tokens_of_an_edge) // L for i in range(len(edges))]
    drawn = []
    for frame in frames:
        drawn.append(dict(
            window=frame.window, n=frame.n, h=round(frame.h_moved, 4), s=round(frame.S_moved, 4),
            S=[short(head) for block in frame.S for head in block],
            answers=[short(of_k) for of_k in frame.answers]))
    return dict(nodes=task.nodes, K=task.K, L=L, N=model.cfg.N, edges=edges, read=window_of_edge,
                truth=demo.right_answers(edges, task.K).tolist(), frames=drawn)


def short(x):
    """A matrix as lists of numbers with three decimals."""
    return [[round(number, 3) for number in row] for row in x.tolist()]


@program
def main(argv):
    p = parser(__doc__)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--seed", type=int, default=0, help="of the cycle")
    p.add_argument("--edges", help='a cycle of your own, "0>3 3>1 ...", as it is read')
    p.add_argument("--out", type=Path, default=Path("sleep.html"), help="default: sleep.html")
    args = p.parse_args(argv)
    check_output(args.out, ".html")
    model, task = demo.load(args.checkpoint)
    if args.edges is None:
        edges = demo.draw_edges(args.seed, task.nodes)
    else:
        edges = demo.read_edges(args.edges, task.nodes)
    data = json.dumps(numbers(model, task, edges), separators=(",", ":"))
    template = PAGE.read_text(encoding="utf-8")
    page = re.sub("(?m)^const data = .*$", lambda _: f"const data = {data};", template)
    sleep.write_text(args.out, page)
    print(f"saved: {args.out}, {len(page) / 1e3:.0f} kB; open it in a browser")


if __name__ == "__main__":
    main()
