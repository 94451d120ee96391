"""What every result can do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from tl_contextmix.plotting.panels import Panel
from tl_contextmix.results import storage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tl_contextmix.plotting import Page

R = TypeVar("R", bound="Result")


class Shown:
    """What can be looked at: its subclasses say in `panels` what there is to see."""

    def panels(self) -> tuple[Panel, ...]:
        """Returns what there is to see, as data for `render`."""
        raise NotImplementedError

    def figure(
        self, panel: int = 0, *, sheet: int | str | None = None, fonts: Sequence[str] = ()
    ) -> Figure:
        r"""Returns one picture as a matplotlib figure, for a paper.

        It has the size of its content in inches, lives outside pyplot, and ``savefig`` writes the
        same bytes each time: vector graphics for ``.pdf`` (fonts embedded) and ``.svg``.

        Args:
            panel: Which of `panels`; negative counts from the end.
            sheet: Of a stack of maps, which one, by position or name; None: all, side by side.
            fonts: Names of installed fonts to look in for characters that DejaVu Sans lacks.
                Characters that none of them has are written as ``\uXXXX``.

        Raises:
            InvalidInput: If there is no such panel, sheet or font.
            ContextMixError: If matplotlib is not installed (``tl-contextmix[figures]``).
        """
        from tl_contextmix.plotting import draw_figure

        return draw_figure(self.panels(), panel, sheet=sheet, fonts=fonts)

    def _page(self) -> Page:
        # The one import against the direction of the layers: a result must be able to show
        # itself, and nobody should have to know the module that draws.
        from tl_contextmix.plotting import Page

        return Page(self.panels(), title=type(self).__name__)

    def _repr_html_(self) -> str:
        return self._page()._repr_html_()

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        bundle = self._page()._repr_mimebundle_()
        heading, *_ = repr(self).splitlines()
        numbers = bundle["text/plain"].split("\n", 1)[-1]
        return {**bundle, "text/plain": f"{heading}\n{numbers}".rstrip()}


class Result(Shown):
    """What every result can do; its subclasses, all frozen dataclasses, add what they hold."""

    def show(self) -> Page:
        """Returns a page that a notebook displays; offline, it makes no request.

        In a script, write it with ``.save(path)`` or open it with ``.open()``.
        """
        return self._page()

    def equals(self, other: object) -> bool:
        """Returns whether another result has the same class, labels and numbers, bit by bit.

        NaN equals NaN; devices may differ, dtypes may not.
        """
        return same(self, other)

    def save(self, path: str | Path) -> Path:
        """Writes the result to one safetensors file, numbers and labels; returns the path.

        A file that is there is replaced once the new one is complete.

        Raises:
            InvalidInput: If the path is not one of a file in a folder that exists.
        """
        return storage.save(self, path)

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:
        """Reads a result of this class back, onto the CPU; ``Result.load`` reads any class.

        Raises:
            FileFormatError: If the file holds anything else.
        """
        return storage.load(cls, path)


def same(a: Any, b: Any) -> bool:
    """Returns whether two values are equal down to the numbers in their tensors."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return _same_tensor(a, b)
    if dataclasses.is_dataclass(a):
        names = [field.name for field in dataclasses.fields(a)]
        return all(same(getattr(a, name), getattr(b, name)) for name in names)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(one, other) for one, other in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b or (a != a and b != b))


def _same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.detach().cpu(), b.detach().cpu()
    return bool(((a == b) | ((a != a) & (b != b))).all())
