"""Results that are arrays with labelled axes: parts, rankings, tables and differences of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool

from tl_contextmix.core.validation import require_number, require_shape
from tl_contextmix.errors import ContextMixError, InvalidInput, warn
from tl_contextmix.results.axes import as_array, largest, positions
from tl_contextmix.results.base import Result, axes_of, tensor_axes
from tl_contextmix.results.components import Components
from tl_contextmix.results.labels import Provenance, Tokens

if TYPE_CHECKING:
    import numpy as np
    import pandas
    import xarray

A = TypeVar("A", bound="LabelledArray")


class LabelledArray(Result):
    """A result whose numbers lie on labelled axes.

    Its subclasses declare what the axes are: by the annotations of their tensors, which name them,
    and by the class variables below.
    """

    COLUMNS: ClassVar[Mapping[str, str]] = {}
    """The numbers of the table: name of the column, and of the field. The first are ranked."""
    ARRAY: ClassVar[str] = ""
    """The field that is the result as an array; empty: that of the first column."""
    TEXTS: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Axes of the fields that are text, in tuples of tuples."""
    SUBTRACTED: ClassVar[tuple[str, ...]] = ()
    """The fields whose differences mean something; empty: `a - b` does not."""
    BY_SIZE: ClassVar[bool] = False
    """Whether numbers have a sign that a ranking leaves out."""

    def _require_whole(self) -> None:
        """Raises InvalidInput for text that does not fit its axes, too."""
        super()._require_whole()
        sizes = {
            axis: size
            for field, axes in tensor_axes(type(self)).items()
            if getattr(self, field) is not None
            for axis, size in zip(axes, getattr(self, field).shape, strict=True)
        }
        for name, axes in self.TEXTS.items():
            level = [] if getattr(self, name) is None else [getattr(self, name)]
            for axis in axes:
                for one in level:
                    require_shape(f"{type(self).__name__}.{name}", (len(one),), (sizes[axis],))
                level = [inner for one in level for inner in one]

    # Axes

    @property
    def _array(self) -> str:
        return self.ARRAY or next(iter(self.COLUMNS.values()))

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the array's axes, in their order."""
        return axes_of(type(self), self._array)

    def _labels(self, axis: str) -> Any:
        """Returns the labels of an axis; numbers from 0 where it has none."""
        field = self.LABELS.get(axis)
        labels = getattr(self, field) if isinstance(field, str) else field
        if axis == "batch" or labels is None or isinstance(labels, Components):
            return range(getattr(self, self._array).shape[self.axes.index(axis)])
        return labels

    def _real(self, axes: Sequence[str]) -> Bool[torch.Tensor, ...]:
        """Returns where no token is padding, with an axis of length 1 where it makes no matter."""
        real = torch.ones((1,) * len(axes), dtype=torch.bool)
        for axis in axes:
            tokens = self._labels(axis) if axis in self.LABELS else None
            if isinstance(tokens, Tokens):
                sizes = dict(zip(("batch", axis), tokens.shape, strict=True))
                real = real & tokens.mask.cpu().view([sizes.get(name, 1) for name in axes])
        return real

    def __repr__(self) -> str:
        sizes = dict(zip(self.axes, getattr(self, self._array).shape, strict=True))
        listed = []
        for axis, size in sizes.items():
            labels = self._labels(axis)
            if isinstance(labels, Tokens):
                listed.append(f"{axis} {size}{labels.where()}")
            elif axis in ("quantity", "token"):
                listed.append(f"{axis} {', '.join(repr(label) for label in labels)}")
            else:
                listed.append(f"{axis} {size}")
        kind = "Difference of " * self.is_difference + type(self).__name__
        return f"{kind}{self._heading()}: {', '.join(listed)}"

    @property
    def is_difference(self) -> bool:
        """Whether it is the difference of two results."""
        return "minus" in vars(self)["provenance"].options

    def _heading(self) -> str:
        """Returns what its text says after the class's name."""
        return f" {vars(self)['title']!r}" if "title" in vars(self) else ""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """Returns the numbers as a NumPy array; their axes are `axes`."""
        array = as_array(getattr(self, self._array))
        array = array if dtype is None else array.astype(dtype, copy=False)
        return array.copy() if copy else array

    # Parts

    def select(self: A, **where: Any) -> A:
        """Returns part of the result; every axis is kept, and nothing is renormalised.

        Positions, layers and heads keep their numbers: those of the input and of the model, which
        tables show and this method takes, in a part of a result too.

        Args:
            **where: One or several entries of an axis by its name (see `axes`), all of it where it
                is not named:

                * ``batch``: rows of the batch.
                * ``layer``, ``neuron``: numbers as in `layers` and `neurons`; negative counts from
                  the end.
                * ``head``: heads by number or label.
                * ``target``, ``source``, ``pos``: positions of the input; negative counts from the
                  end of the axis, which in a padded batch is padding for the shorter texts (a
                  warning says so). Or tokens, such as ``" cabinet"``: every occurrence; in a batch
                  it has to be at the same positions of every row. Or the name of a stack
                  (``source="encoder"``), which comes before a token of this text.
                * any other: by label or place.

        Raises:
            InvalidInput: If there is no such axis, something asked for is not there, or nothing is.

        Warns:
            ContextMixWarning: If every position selected of a row is padding.

        Example:
            >>> import tl_contextmix as cm
            >>> model = cm.load_demo("causal-lm")
            >>> norms = cm.attention_norms(model, "the keys to the cabinet are")
            >>> norms.select(layer=2, target=-1, source=[" keys", " cabinet"]).scores.shape
            torch.Size([1, 1, 1, 1, 2])
        """
        for axis in where:
            if axis not in self.axes:
                raise InvalidInput(
                    f"this {type(self).__name__} has no such axis",
                    repr(axis),
                    f"one of {list(self.axes)}",
                    "Name one of these.",
                )
        places: dict[str, list[int]] = {}
        # Rows first: tokens are looked for in them.
        for axis in sorted(where, key=self.axes.index):
            labels, wanted = self._labels(axis), where[axis]
            if isinstance(labels, Tokens):
                rows = places.get("batch", [*range(labels.shape[0])])
                places[axis] = labels.find(axis, wanted, rows)
                if wanted is not None:
                    _warn_of_padding(axis, labels, rows, places[axis])
            else:
                places[axis] = positions(axis, wanted, labels)
        return self._part(places)

    def _part(self: A, places: Mapping[str, list[int]]) -> A:
        """Returns the entries at some places of some axes."""
        changes: dict[str, Any] = {}
        for name, axes in tensor_axes(type(self)).items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            part = tensor
            for dim, axis in enumerate(axes):
                if places.get(axis, whole := [*range(part.shape[dim])]) != whole:
                    index = torch.tensor(places[axis], dtype=torch.long, device=tensor.device)
                    part = part.index_select(dim, index)
            changes[name] = tensor.clone() if part is tensor else part
        named = {field: axis for axis, field in self.LABELS.items() if isinstance(field, str)}
        for name, value in vars(self).items():
            if isinstance(value, (Tokens, Components)):
                rows, entries = (
                    places.get(axis, [*range(size)])
                    for axis, size in zip(("batch", named.get(name, "")), value.shape, strict=True)
                )
                if isinstance(value, Tokens):
                    changes[name] = value.select(rows, entries)
                else:
                    columns = (column[rows][:, entries] for column in vars(value).values())
                    changes[name] = Components(*columns)
            elif name in named and isinstance(value, tuple):
                changes[name] = _nested(value, (named[name],), places)
            elif name in self.TEXTS:
                changes[name] = _nested(value, self.TEXTS[name], places)
        return replace(self, **changes)

    # Rankings and tables

    def top(self, k: int = 10) -> list[dict[str, Any]]:
        """Returns the ``k`` largest numbers with their labels, largest first; no padding, no NaN.

        Positions are those of the input, so that `select` takes them. Where numbers have a sign
        (differences, shares) they are ranked by size.

        Raises:
            InvalidInput: If ``k`` is not a positive integer.
        """
        column, field = next(iter(self.COLUMNS.items()))
        axes, values = axes_of(type(self), field), getattr(self, field).detach()
        sizes = values.abs() if self._by_size else values
        real = self._real(axes).to(values.device)
        ranked = largest(sizes.masked_fill(~real, -torch.inf), require_number("k", k))
        places = torch.unravel_index(ranked, values.shape)
        numbers = values.flatten()[ranked.to(values.device)].tolist()
        rows = self._labelled(axes, [place.numpy() for place in places])
        listed = {name: column.tolist() for name, column in rows.items()}
        return [
            {**dict(zip(listed, labels, strict=True)), column: number}
            for *labels, number in zip(*listed.values(), numbers, strict=True)
        ]

    @property
    def _by_size(self) -> bool:
        return self.BY_SIZE

    def _labelled(self, axes: Sequence[str], places: Sequence[Any]) -> dict[str, Any]:
        """Returns the columns of a table that say where its numbers stand."""
        import numpy as np

        columns, where, words = {}, {}, {}
        at = dict(zip(axes, places, strict=True))
        for axis in axes:
            labels = self._labels(axis)
            if isinstance(labels, Tokens):
                where[axis] = np.array(labels.labels(), dtype=np.int64)[at[axis]]
                texts = np.array(labels.strings, dtype=object).reshape(labels.shape)
                name = "token" if axis == "pos" else f"{axis}_token"
                words[name] = texts[at["batch"], at[axis]]
            else:
                kind = np.int64 if isinstance(labels, range) or axis in _NUMBERS else object
                columns[axis] = np.array(labels, dtype=kind)[at[axis]]
        return {**columns, **where, **words}

    def _columns(self) -> dict[str, Any]:
        """Returns the numbers of the table: tensors, or arrays of text, on the table's axes."""
        return {name: getattr(self, field) for name, field in self.COLUMNS.items()}

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per number, with labels; padding is omitted.

        Columns: the axes, positions being those of the input; the tokens there; the numbers.
        """
        field = next(iter(self.COLUMNS.values()))
        return self._tabulated(
            axes_of(type(self), field), getattr(self, field).shape, self._columns()
        )

    def _tabulated(
        self, axes: Sequence[str], shape: Sequence[int], columns: Mapping[str, Any]
    ) -> pandas.DataFrame:
        """Returns a table of numbers on some axes."""
        import numpy as np
        import pandas

        real = self._real(axes).expand(shape).numpy()
        found = self._labelled(axes, np.nonzero(real))
        for name, values in columns.items():
            array = as_array(values) if isinstance(values, torch.Tensor) else values
            found[name] = np.broadcast_to(array, shape)[real]
        return pandas.DataFrame(found)

    def to_xarray(self) -> xarray.Dataset:
        """Returns every array of the result, with the labels of its axes.

        Coordinates: batch, layers, heads, positions of the input and so on; for axes of positions
        also ``target_token`` (the text) and ``target_mask`` (False at padding).

        Raises:
            ContextMixError: If xarray is not installed (``tl-contextmix[xarray]``).
        """
        try:
            import xarray
        except ImportError as error:
            raise ContextMixError(
                "to_xarray cannot build a data set",
                f"{error}",
                "xarray",
                'Install it: pip install "tl-contextmix[xarray]"; or use to_dataframe().',
            ) from error
        coords: dict[str, Any] = {}
        for axis in self.axes:
            labels = self._labels(axis)
            if isinstance(labels, Tokens):
                coords[axis] = [*labels.labels()]
                coords[f"{axis}_token"] = (("batch", axis), [*map(list, labels.strings)])
                coords[f"{axis}_mask"] = (("batch", axis), as_array(labels.mask))
            else:
                coords[axis] = [*labels]
        arrays = {
            name: (axes, as_array(getattr(self, name)))
            for name, axes in tensor_axes(type(self)).items()
            if getattr(self, name) is not None
        }
        # What is computed of the fields: what is shown, and columns of the table.
        for name in (self._array, *self.COLUMNS.values()):
            if name not in arrays and isinstance(values := getattr(self, name), torch.Tensor):
                arrays[name] = (axes_of(type(self), name), as_array(values))
        about = ("point", "stack", "unit", "title", "caption")
        attributes = {name: getattr(self, name) for name in about if hasattr(self, name)}
        where = vars(self)["provenance"]
        attributes |= {"method": where.method, "model": where.model}
        return xarray.Dataset(arrays, coords, attributes)

    # Differences

    def __sub__(self: A, other: Any) -> A:
        """Returns the difference of two results, number by number: a result of the same kind.

        Tokens that differ, as those of a minimal pair do, are labelled with both.

        Raises:
            InvalidInput: If axes or units do not agree.
        """
        if not self.SUBTRACTED or type(self) is not type(other):
            return NotImplemented
        labels = {}
        for axis in self.axes:
            mine, theirs = self._labels(axis), other._labels(axis)
            if isinstance(mine, Tokens):
                labels[str(self.LABELS[axis])] = _both(axis, mine, theirs)
            elif axis == "head" and len(mine) == len(theirs) == 1:
                labels["heads"] = (" - ".join(dict.fromkeys((*mine, *theirs))),)
            elif [*mine] != [*theirs]:
                raise unlike(f"{axis} axis", [*theirs], [*mine])
        return replace(self, **labels, **self._difference(other))

    def _difference(self, other: Any) -> dict[str, Any]:
        """Returns the fields of a difference, labels apart."""
        found: dict[str, Any] = {
            name: getattr(self, name) - getattr(other, name).to(getattr(self, name).device)
            for name in self.SUBTRACTED
        }
        for name, words in (("unit", "difference of {}"), ("title", "Difference: {}")):
            if hasattr(self, name):
                mine, theirs = getattr(self, name), getattr(other, name)
                if name == "unit" and not self._comparable(other):
                    raise unlike("unit", repr(theirs), repr(mine))
                both = mine if mine == theirs else f"{mine} and {theirs}"
                found[name] = words.format(both)
        return {**found, "provenance": minus(vars(self)["provenance"], vars(other)["provenance"])}

    def _comparable(self, other: Any) -> bool:
        return vars(self).get("unit") == vars(other).get("unit")


_NUMBERS = ("batch", "layer", "neuron")


def minus(a: Provenance, b: Provenance) -> Provenance:
    """Returns where a difference comes from: the first of the two, the other as an option."""
    names = ("method", "options", "model", "fingerprint")
    other = {name: getattr(b, name) for name in names}
    return replace(a, options={**a.options, "minus": other})


def unlike(what: str, seen: object, expected: object) -> InvalidInput:
    """Returns the error of results whose difference means nothing."""
    return InvalidInput(
        "these results cannot be subtracted",
        f"{what}: {str(seen)[:300]}",
        f"as in the first, {str(expected)[:300]}",
        "Ask for both with the same options, select the same part of both, or normalise both.",
    )


def _both(axis: str, mine: Tokens, theirs: Tokens) -> Tokens:
    """Returns the tokens of a difference; where they are not the same, both are named."""
    for what, a, b in (
        ("rows and tokens", tuple(mine.shape), tuple(theirs.shape)),
        ("stacks", mine.sides, theirs.sides),
        ("positions", [*mine.labels()], [*theirs.labels()]),
        ("positions in the stack", mine.positions().tolist(), theirs.positions().tolist()),
        ("padding", mine.mask.tolist(), theirs.mask.tolist()),
    ):
        if a != b:
            raise unlike(f"{what} of the {axis} axis", b, a)
    pairs = zip(mine.strings, theirs.strings, strict=True)
    rows = (zip(a, b, strict=True) for a, b in pairs)
    return replace(
        mine, strings=tuple(tuple(a if a == b else f"{a}|{b}" for a, b in row) for row in rows)
    )


def _warn_of_padding(axis: str, tokens: Tokens, rows: list[int], places: list[int]) -> None:
    padding = tokens.padding(rows, places)
    if padding:
        numbers = [tokens.labels()[place] for place in places]
        warn(
            f"every {axis} selected of row {padding[0]} is padding, whose numbers are 0: "
            f"{numbers}. Select one row, and positions of its "
            f"{int(tokens.mask[padding[0]].sum())} tokens."
        )


def _nested(value: Any, axes: tuple[str, ...], places: Mapping[str, list[int]]) -> Any:
    """Returns part of tuples in tuples."""
    if value is None or not axes:
        return value
    chosen = places.get(axes[0], range(len(value)))
    return tuple(_nested(value[place], axes[1:], places) for place in chosen)
