"""Run the cells of a notebook from top to bottom and store what they show, without Jupyter.

    python -m lab.course.make_notebook                       lab/course/sleep.ipynb, in place
    python -m lab.course.make_notebook FILE --out OTHER      another notebook, another place

Text is what a cell prints; pictures are the figures that it leaves open.
"""
import base64
import contextlib
import io
import json
import os
import sys
from pathlib import Path

from lab.common import LAB, check_output, parser, program
from sleep import BadInput, write_text

NOTEBOOK = LAB / "course" / "sleep.ipynb"


def read(path):
    """A notebook as a dict; BadInput if the file is none."""
    try:
        notebook = json.loads(Path(path).read_text(encoding="utf-8"))
        notebook["cells"]
    except (OSError, ValueError, TypeError, KeyError):
        raise BadInput(f"{path} is no notebook, or is not there.") from None
    return notebook


def run_cells(notebook):
    """Run all code cells in one namespace and replace their outputs. Errors are not caught."""
    os.environ["MPLBACKEND"] = "Agg"       # figures without a screen, once matplotlib is imported
    namespace = {"__name__": "__main__"}
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        count += 1
        printed = io.StringIO()
        code = compile("".join(cell["source"]), f"cell {count}", "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        cell["execution_count"] = count
        cell["outputs"] = outputs(printed.getvalue())


def outputs(text):
    """A cell's outputs, as the notebook format wants them."""
    found = []
    if text:
        found.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(True)})
    for png in open_figures():
        data = {"image/png": base64.b64encode(png).decode(), "text/plain": ["<Figure>"]}
        found.append({"output_type": "display_data", "metadata": {}, "data": data})
    return found


def open_figures():
    """All open figures as png, which are closed."""
    if "matplotlib.pyplot" not in sys.modules:
        return []
    from matplotlib import pyplot as plt
    pictures = []
    for number in plt.get_fignums():
        file = io.BytesIO()
        plt.figure(number).savefig(file, format="png", dpi=75, bbox_inches="tight")
        plt.close(number)
        pictures.append(file.getvalue())
    return pictures


@program
def main(argv):
    p = parser(__doc__)
    p.add_argument("notebook", type=Path, nargs="?", default=NOTEBOOK, help="default: sleep.ipynb")
    p.add_argument("--out", type=Path, help="where it is stored; default: where it was")
    args = p.parse_args(argv)
    out = args.out or args.notebook
    notebook = read(args.notebook)
    check_output(out, ".ipynb")
    run_cells(notebook)
    write_text(out, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
