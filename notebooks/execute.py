"""Run notebooks top to bottom and store their outputs, without the noise that differs between runs.

python notebooks/execute.py [NAME ...]     # default: all, in order; MINIMIND_PRESET chooses the preset
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def strip_noise(notebook: nbformat.NotebookNode) -> None:
    """Drop widget state, run times of cells, and output that only a live page can show."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata.kernelspec = {
        "display_name": "Python 3", "language": "python", "name": "python3",
    }  # fmt: skip
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not is_noise(o)]


def is_noise(output: nbformat.NotebookNode) -> bool:
    """Whether an output is a progress bar or a widget, which mean nothing in a stored page."""
    if output.output_type == "stream":
        return output.name == "stderr" and ("step/s" in output.text or "\r" in output.text)
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def execute(path: Path) -> float:
    """Run one notebook in place; return the seconds. An error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    started = time.monotonic()
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(HERE)}}).execute()
    strip_noise(notebook)
    nbformat.write(notebook, path)
    return time.monotonic() - started


if __name__ == "__main__":
    names = sys.argv[1:] or sorted(p.name for p in HERE.glob("*.ipynb"))
    for name in names:
        print(f"{name:28} {execute(HERE / name):6.1f} s", flush=True)
