"""Runs the code cells of a notebook, without Jupyter.

`python -m tests.notebooks` runs examples/walkthrough.ipynb and keeps its outputs in the file.
"""

import base64
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

WALK = Path(__file__).parents[1] / "examples" / "walkthrough.ipynb"


def read(path: Path = WALK) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """Run the cells in order, store their outputs in place, and return the names they define."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        cell["execution_count"] = number
        cell["outputs"] = [_text(printed.getvalue())] if printed.getvalue() else []
        cell["outputs"] += [_picture(plt.figure(number)) for number in plt.get_fignums()]
        plt.close("all")
    return names


def _text(printed: str) -> dict[str, Any]:
    lines = printed.splitlines(keepends=True)
    return {"output_type": "stream", "name": "stdout", "text": lines}


def _picture(figure: Any) -> dict[str, Any]:
    """Return a small PNG."""
    content = io.BytesIO()
    figure.savefig(content, dpi=60, bbox_inches="tight")
    data = {"image/png": base64.b64encode(content.getvalue()).decode(), "text/plain": ["<Figure>"]}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def main() -> None:
    notebook = read()
    run(notebook)
    WALK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
