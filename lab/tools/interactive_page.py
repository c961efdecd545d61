"""The sleep film: one sleep of a trained model as an interactive page that works offline.

    python -m lab.film lab/khop-N3.pt                    -> sleep.html
    python -m lab.film out/a/N4-seed0.pt --seed 3 --out my.html

The cycle, S of every head, a slider for the window and the pass; a click on a question shows what the
model would say after every pass.
"""
import json
import re
from pathlib import Path

import sleep
from lab import demo
from lab.plot import parser

PAGE = Path(__file__).with_name("sleep.html")          # a page is this one with another film


def film(model, task, edges):
    """All that the page draws, as numbers."""
    tokens = demo.spell(task, edges)
    frames, _ = demo.watch(model, task, tokens, model.cfg.N)
    short = lambda x: [[round(y, 3) for y in row] for row in x.tolist()]
    per_edge, L = 4 if task.words else 2, model.cfg.L
    read = [(task.pad + i * per_edge) // L for i in range(len(edges))]         # window of each edge
    return dict(
        nodes=task.nodes, K=task.K, L=L, N=model.cfg.N, edges=edges, read=read,
        truth=demo.right_answers(edges, task.K).tolist(),
        frames=[dict(window=f.window, n=f.n, h=round(f.h_moved, 4), s=round(f.S_moved, 4),
                     S=[short(head) for block in f.S for head in block],
                     answers=[short(k) for k in f.answers]) for f in frames])


def main(argv=None):
    p = parser(__doc__)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--seed", type=int, default=0, help="of the cycle")
    p.add_argument("--edges", help='a cycle of your own, "0>3 3>1 ...", as it is read')
    p.add_argument("--out", type=Path, default=Path("sleep.html"), help="default: sleep.html")
    args = p.parse_args(argv)
    try:
        model, task = demo.load(args.checkpoint)
        edges = (demo.draw_edges(args.seed, task.nodes) if args.edges is None else
                 demo.read_edges(args.edges, task.nodes))
        data = json.dumps(film(model, task, edges), separators=(",", ":"))
    except sleep.BadInput as e:
        p.error(e)
    page = re.sub("(?m)^const film = .*$", lambda _: f"const film = {data};", PAGE.read_text())
    sleep.write(args.out, lambda path: path.write_text(page))
    print(f"saved: {args.out}, {len(page) / 1e3:.0f} kB; open it in a browser")


if __name__ == "__main__":
    main()
