"""Draw how the model works: it sleeps over two windows, keeps only S, and answers in one pass.

    python -m lab.tools.draw_mechanism                -> lab/pictures/mechanism.png
    python -m lab.tools.draw_mechanism --out my.png

One unit of the drawing is a tenth of an inch.
"""
from pathlib import Path

from lab.common import PICTURES, check_output, parser, program
from lab.experiments import plots              # first: it chooses matplotlib's backend
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path as Line

INK = "#222222"
FADED = "#b4b4b4"
ASLEEP = "#e6ebf2"
AWAKE = "#fff3c4"
ASKED = "#ffe08a"                          # the edges that the question needs
H = "#0072b2"                              # blue and orange that stay apart for colour-blind eyes
S = "#d55e00"

WIDTH = 22                                 # of a column
GAP = 9.5                                  # between two columns
LEFT = 12                                  # where the first one begins
CELL = 3.2                                 # height of an edge
BAR = 4.4                                  # height of a pass
RISE = 3.6                                 # length of an arrow upwards
TOKENS_AT = 6.4                            # lower edges of the rows
PASS_AT = (13.2, 21.2, 29.2)
EVICTED_AT = 37.2
H_AT = WIDTH / 2                           # where h and S rise, from the left edge of a column
S_AT = WIDTH - 4.5


def text(ax, x, y, words, color=INK, size=13, **style):
    ax.text(x, y, words, color=color, size=size, va="center_baseline", **{"ha": "center", **style})


def symbol(ax, x, y, words, color):
    text(ax, x, y, words, color, 15, style="italic", weight="bold")


def arrow(ax, color, points, codes=None):
    ax.add_patch(FancyArrowPatch(path=Line(points, codes), arrowstyle="-|>", mutation_scale=16,
                                 color=color, lw=2.4, capstyle="butt"))


def rise(ax, x, y, name, color):
    arrow(ax, color, [(x, y), (x, y + RISE)])
    symbol(ax, x + 1.6, y + RISE / 2, name, color)


def carry(ax, x):
    """S leaves the last pass of a column and enters the first of the next, round two corners."""
    high = PASS_AT[-1] + BAR / 2
    low = PASS_AT[0] + BAR / 2
    middle = x + WIDTH + GAP / 2
    r = 1                                  # radius of a corner
    corner = [Line.LINETO, Line.CURVE3, Line.CURVE3]
    arrow(ax, S, [(x + WIDTH, high), (middle - r, high), (middle, high), (middle, high - r),
                  (middle, low + r), (middle, low), (middle + r, low), (x + WIDTH + GAP, low)],
          [Line.MOVETO, *corner, *corner, Line.LINETO])
    symbol(ax, middle + 1.8, (high + low) / 2, "S", S)


def cells(ax, x, y, signs, edge=INK, asked=(), **style):
    """A row of boxes, centred in the column that begins at x; those that are asked about coloured."""
    width = WIDTH / 3
    left = x + (WIDTH - len(signs) * width) / 2
    for i, sign in enumerate(signs):
        fill = ASKED if sign in asked else "white"
        ax.add_patch(Rectangle((left + i * width, y), width, CELL, fc=fill, ec=edge, lw=1.4))
        text(ax, left + (i + 0.5) * width, y + CELL / 2, sign, **style)


def column(ax, x, title, state, color, signs, passes=("pass 1", "pass 2", "pass 3")):
    """Edges at the bottom, one bar for each pass above; h rises through all, S between passes."""
    text(ax, x + WIDTH / 2, 4.3, title, weight="bold")
    text(ax, x + WIDTH / 2, 1.9, state)
    cells(ax, x, TOKENS_AT, signs, asked=("0>4", "4>7"))
    rise(ax, x + H_AT, TOKENS_AT + CELL, "h", H)
    for y, name in zip(PASS_AT, passes):
        ax.add_patch(FancyBboxPatch((x, y), WIDTH, BAR, "round,pad=0,rounding_size=0.6",
                                    ec=INK, fc=color, lw=1.4))
        text(ax, x + 1.8, y + BAR / 2, name, ha="left", weight="bold")
        text(ax, x + WIDTH - 1.8, y + BAR / 2, "Blocks", ha="right")
        rise(ax, x + H_AT, y + BAR, "h", H)
        if name != passes[-1]:
            rise(ax, x + S_AT, y + BAR, "S", S)


def draw(path):
    fig = Figure(figsize=(10, 4.5), facecolor="white")
    ax = fig.add_axes([0, 0, 1, 1], xlim=(0, 100), ylim=(0, 45))
    ax.axis("off")
    first = LEFT
    second = first + WIDTH + GAP
    last = second + WIDTH + GAP
    symbol(ax, 4.8, PASS_AT[0] + BAR / 2, "S = 0", S)
    arrow(ax, S, [(8.4, PASS_AT[0] + BAR / 2), (LEFT, PASS_AT[0] + BAR / 2)])
    for x, number, signs in ((first, 1, ["7>3", "0>4", "1>6"]), (second, 2, ["4>7", "5>9", "9>1"])):
        column(ax, x, f"window {number}: L tokens", "asleep, N = 3", ASLEEP, signs)
        cells(ax, x, EVICTED_AT, "✕" * 3, FADED, size=20)
        text(ax, x + WIDTH / 2, 42.7, r"evicted: cache and $\mathit{h}$")
        carry(ax, x)
    column(ax, last, "answer window", "awake: 2 hops after 0?", AWAKE, ["2  0"], ["one pass"])
    text(ax, last + WIDTH / 2, PASS_AT[1] + 1.6, "answer: 7", size=15, weight="bold")
    for y, name, words, color in ((40, "h", "features", H), (36, "S", "fast weights", S)):
        symbol(ax, last + 4, y, name, color)
        text(ax, last + 6, y, words, color, 14, ha="left")
    plots.save_figure(fig, path, dpi=150)


@program
def main(argv):
    p = parser(__doc__)
    p.add_argument("--out", type=Path, default=PICTURES / "mechanism.png",
                   help="default: lab/pictures/mechanism.png")
    args = p.parse_args(argv)
    check_output(args.out, ".png")
    draw(args.out)
    print(f"saved: {args.out}")


if __name__ == "__main__":
    main()
