"""Runs the notebooks and keeps what they show: ``python docs/notebooks.py [NAME ...]``.

Needs ipykernel. Of a page of this package, the picture and the text are kept: GitHub and the
documentation run no scripts, and a notebook stays small. Opened and run, it shows the page.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

DEMOS = Path(__file__).parent.parent / "demos"


def run(path: Path) -> None:
    """Runs a notebook and writes it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(DEMOS)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        # What is written to stderr is progress, of one machine.
        shown = [one for one in cell.get("outputs", ()) if one.get("name") != "stderr"]
        if "outputs" in cell:
            cell.outputs = shown
        for output in shown:
            data = output.get("data", {})
            if "<iframe" in data.get("text/html", ""):
                del data["text/html"]
    notebook.metadata["language_info"] = {"name": "python"}  # not the version that ran it
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for path in sorted(DEMOS.glob("*.ipynb")):
        if path.stem in sys.argv[1:] or len(sys.argv) == 1:
            run(path)
