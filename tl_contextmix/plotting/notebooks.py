"""What a notebook holds beside the frame of a page: a still, its height, and CircuitsVis once.

CircuitsVis is as large as a hundred maps, so that it must not be in every output. The first output
of a notebook that can use it brings it, packed, and the frames of all outputs ask the notebook for
it. A frame that gets no answer (a cell that is run alone, a viewer that keeps outputs apart) draws
everything itself.
"""

from __future__ import annotations

import sys
from typing import Any

from tl_contextmix.plotting import circuitsvis_source

# Shown only where the frame is not: it goes with the frame, or with the rule, or with both.
HIDE_STILL = "<style>iframe[srcdoc]+.tl-contextmix-still{display:none}</style>"

# Frames cannot see the notebook, nor it them: they say how high they are.
_HEIGHT = """<script>(() => {
  if (window.tlContextmixHeights) return;
  window.tlContextmixHeights = true;
  addEventListener("message", ({ data, source }) => {
    if (data?.tl_contextmix !== "height") return;
    for (const frame of document.querySelectorAll("iframe[srcdoc]"))
      if (frame.contentWindow === source)
        frame.style.height = `${Math.min(6000, data.height + 4)}px`;
  });
})();</script>"""

_LIBRARY = """<script>(() => {
  if (window.tlContextmixLibrary) return;
  window.tlContextmixLibrary = true;
  const packed = "%s";
  let program;
  const inflate = async () => {
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).text();
  };
  addEventListener("message", async ({ data, source }) => {
    if (data?.tl_contextmix === "is there") source.postMessage({ tl_contextmix: "here" }, "*");
    if (data?.tl_contextmix === "program please")
      source.postMessage({ tl_contextmix: "program", program: await (program ??= inflate()) }, "*");
  });
  for (const frame of document.querySelectorAll("iframe[srcdoc]"))
    frame.contentWindow.postMessage({ tl_contextmix: "here" }, "*");
})();</script>"""

# The cell that brought CircuitsVis, and the run of it that did.
_brought_by: list[tuple[object, object]] = []


def scripts(document: str) -> str:
    """Returns the scripts of an output: for the height of its frame, and for CircuitsVis."""
    wanted = 'id="circuitsvis"' in document
    return _HEIGHT + (_LIBRARY % circuitsvis_source.packed() if wanted and _is_due() else "")


def _is_due() -> bool:
    """Whether no other cell of this notebook has brought CircuitsVis.

    A cell that is run again replaces its output, and brings it again.
    """
    run = _run()
    if run is None:
        return False
    due = not _brought_by or (_brought_by[0][0] == run[0] and _brought_by[0][1] != run[1])
    if due:
        _brought_by[:] = [run]
    return due


def _run() -> tuple[object, object] | None:
    """Returns the cell that runs and the number of its run; None outside of a notebook."""
    ipython = sys.modules.get("IPython")
    shell: Any = None if ipython is None else ipython.get_ipython()
    if shell is None or getattr(shell, "kernel", None) is None:
        return None
    parent = shell.get_parent() if hasattr(shell, "get_parent") else {}
    count = shell.execution_count
    return parent.get("metadata", {}).get("cellId", count), count
