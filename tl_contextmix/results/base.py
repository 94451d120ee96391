"""What every result can do."""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch

from tl_contextmix.core.validation import require_choice, require_shape
from tl_contextmix.errors import InvalidInput
from tl_contextmix.plotting.panels import Panel
from tl_contextmix.results import storage
from tl_contextmix.results.components import Components
from tl_contextmix.results.labels import Tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tl_contextmix.plotting import Page

R = TypeVar("R", bound="Result")


class Shown:
    """What can be looked at: its subclasses say in `panels` what there is to see."""

    def panels(self) -> tuple[Panel, ...]:
        """Returns what there is to see, as data for `render`."""
        raise NotImplementedError

    def figure(
        self,
        panel: int | None = None,
        *,
        sheet: int | str | None = None,
        fonts: Sequence[str] = (),
        ax: Axes | None = None,
        width: float | None = None,
    ) -> Figure:
        r"""Returns what there is to see as a matplotlib figure, for a paper.

        Panels stand below each other, maps and charts side by side where a page has room. The
        figure has the size of its content in inches, lives outside pyplot, and ``savefig`` writes
        the same bytes each time: vector graphics for ``.pdf`` (fonts embedded) and ``.svg``.

        Args:
            panel: Which of `panels`; negative counts from the end. None: all of them.
            sheet: Of a stack of maps, which one, by position or name; None: all, side by side.
            fonts: Names of installed fonts to look in first for characters that DejaVu Sans lacks;
                the others that are installed follow. Characters that none of them has are written
                as ``\uXXXX``.
            ax: Axes of your own to draw into: one map, bars, curves or a graph; the figure is then
                theirs, and its size stays.
            width: Of each panel, in inches, the height with it (a column of a paper has about 3.3);
                None: as much as it needs. Not of tables and texts.

        Raises:
            InvalidInput: If there is no such panel, sheet or font, or it does not fit into axes, a
                width or a page of 200 inches.
            ContextMixError: If matplotlib is not installed (``tl-contextmix[figures]``).
        """
        from tl_contextmix.plotting import draw_figure

        return draw_figure(self.panels(), panel, sheet=sheet, fonts=fonts, ax=ax, width=width)

    def _page(self) -> Page:
        # The one import against the direction of the layers: a result must be able to show
        # itself, and nobody should have to know the module that draws.
        from tl_contextmix.plotting import Page

        return Page(self.panels(), title=in_words(type(self).__name__))

    def _repr_html_(self) -> str:
        return self._page()._repr_html_()

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        bundle = self._page()._repr_mimebundle_()
        heading, *_ = repr(self).splitlines()
        numbers = bundle["text/plain"].split("\n", 1)[-1]
        return {**bundle, "text/plain": f"{heading}\n{numbers}".rstrip()}


class Result(Shown):
    """What every result can do; its subclasses, all frozen dataclasses, add what they hold.

    Shapes are declared once, by the annotations of tensors: axes of one name are of one length,
    and as long as their labels.
    """

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, Any]]

    LABELS: ClassVar[Mapping[str, str | tuple[str, ...]]] = {}
    """The labels of an axis: the name of the field that holds them, or the labels themselves."""
    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """The words that a field may be."""
    NAMED: ClassVar[Mapping[str, str]] = {}
    """The names of whole numbers: field of the numbers, and of the names, by place or by number."""
    FROM_ZERO: ClassVar[str] = ""
    """The field of numbers that are from 0, unless `signed`, and 0 at padding: their sums, ranks
    and products count on that."""

    def __post_init__(self) -> None:
        name, sizes = type(self).__name__, dict[str, int]()

        def fit(what: str, axes: tuple[str, ...], shape: tuple[int, ...]) -> None:
            if len(axes) == len(shape):
                for axis, size in zip(axes, shape, strict=True):
                    sizes.setdefault(axis, size)
            expected = tuple(sizes.get(axis, axis) for axis in axes)
            require_shape(f"{name}.{what}", shape, expected)

        for axis, field in self.LABELS.items():
            labels = getattr(self, field) if isinstance(field, str) else field
            if isinstance(labels, (Tokens, Components)):
                fit(str(field), ("batch", axis), tuple(labels.shape))
            else:
                fit(axis, (axis,), (len(labels),))
        for field, axes in tensor_axes(type(self)).items():
            if getattr(self, field) is not None:
                fit(field, axes, tuple(getattr(self, field).shape))
        for field, words in self.CHOICES.items():
            require_choice(f"value of {field}", getattr(self, field), words)
        if self.FROM_ZERO and getattr(self, self.FROM_ZERO).numel():
            self._require_from_zero(self.FROM_ZERO)

    def _require_whole(self) -> None:
        """Raises InvalidInput for a number without a name, which only a file can have."""
        for field, names in self.NAMED.items():
            known = getattr(self, names)
            known = known if isinstance(known, dict) else {str(i) for i in range(len(known))}
            found = {str(number) for number in getattr(self, field).unique().tolist()}
            if not found <= {*known}:
                raise InvalidInput(
                    f"{type(self).__name__}.{field} do not fit {names}",
                    f"{sorted(found - {*known})[:5]} without a name",
                    f"numbers of {names}",
                    "Save the result again.",
                )

    def _require_from_zero(self, field: str) -> None:
        """Raises InvalidInput for numbers below zero, unless `signed`, or at padding."""
        name, values = f"{type(self).__name__}.{field}", getattr(self, field).detach()
        signed = vars(self).get("signed", False)
        lowest = values.new_zeros(()) if signed else values.amin()
        # A NaN hides what is below zero; the comparison costs memory and is left for that case.
        if bool(lowest < 0) or (bool(lowest.isnan()) and bool((values < 0).any())):
            raise InvalidInput(
                f"{name} are not {field}",
                "numbers below 0" if bool(lowest.isnan()) else f"{float(lowest):.3g}",
                "numbers from 0",
                "Clamp what rounding leaves below zero; take the size of what has a sign.",
            )
        real, others = torch.ones(len(values), dtype=torch.bool), []
        for dim, axis in enumerate(tensor_axes(type(self))[field][1:], 1):
            if isinstance(tokens := getattr(self, str(self.LABELS[axis]), None), Tokens):
                one_axis = [-1, *[1] * (real.ndim - 1), values.shape[dim]]
                real = real[..., None] & tokens.mask.cpu().view(one_axis)
            else:
                others.append(dim)
        if bool(real.all()):
            return
        # Not the scores at padding alone: a batch of unequal texts is padding for the most part.
        sizes = (values.abs() if signed else values).amax(others)
        right = (sizes == 0) | real.to(sizes.device)
        if not bool(right.all()):
            row = int(right.flatten(1).all(dim=1).int().argmin())
            raise InvalidInput(
                f"{name} are not zero at padding",
                f"{field} of tokens that the mask of sentence {row} leaves out",
                "0 wherever a token is padding",
                "Fill them with 0 before building the result.",
            )

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


def in_words(name: str) -> str:
    """Returns the name of a class as a heading: ``ContextMap`` is a "Context map"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).capitalize()


@functools.cache
def tensor_axes(kind: type) -> dict[str, tuple[str, ...]]:
    """Returns the axes of each tensor that a class holds, as its annotations name them."""
    result = {}
    for name, hint in storage.field_types(kind).items():
        for one in (hint, *typing.get_args(hint)):
            if hasattr(one, "dim_str"):
                result[name] = tuple(one.dim_str.split())
    return result


@functools.cache
def axes_of(kind: type, name: str) -> tuple[str, ...]:
    """Returns the axes of a tensor that a class holds or computes (a property), by its name."""
    if name in tensor_axes(kind):
        return tensor_axes(kind)[name]
    return tuple(typing.get_type_hints(getattr(kind, name).fget)["return"].dim_str.split())


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
