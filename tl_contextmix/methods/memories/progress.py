"""How far a corpus has been read: tokens per second, and the time left."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def progress(what: str, done: int = 0) -> Any:
    """Returns a bar with tokens per second, and the time left once the end is in sight."""
    return tqdm(
        desc=what,
        unit="token",
        unit_scale=True,
        initial=done,
        delay=2,
        leave=False,
        disable=None,
    )


def expect(bar: Any, read: int, size: int | None) -> None:
    """Tells a bar how many tokens there will be, by how much of the corpus they were found in."""
    if size is not None:
        bar.total = max(bar.n, round(bar.n * size / max(1, read)))
