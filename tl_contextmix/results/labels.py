"""What the numbers of a result belong to: tokens, and where it all comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache, reduce
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate, groupby
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int

from tl_contextmix.core.pieces import join_pieces
from tl_contextmix.core.validation import require_choice, require_shape
from tl_contextmix.core.words import Spans, find_sentences, find_text, find_words, require_spans
from tl_contextmix.errors import InvalidInput
from tl_contextmix.results import storage
from tl_contextmix.results.axes import positions

Stretches = Literal["words", "sentences", "sides"] | Sequence[str | tuple[int, int]]
"""What tokens are summed over, see `Tokens.spans`."""


@storage.storable
@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens along one axis of a result.

    Attributes:
        ids: Token ids, padding included.
        strings: The same as text; padding too.
        mask: True at real tokens, False at padding.
        sides: Which stack each stretch of the axis belongs to, with its length. One entry, except
            where a decoder block reads its own tokens and the encoder's: the source axis is then
            ``(("decoder", n), ("encoder", m))``.
        places: Position of each token in its stack, where some have been omitted or joined; None:
            those of each side counted from 0.
        numbers: Number of each entry on the whole axis that `select` took it from; None: counted
            from 0.
        spaced: Whether a word begins with its space (GPT-2, T5), or the tokens that continue one
            with ``##`` (BERT); None: not known.
    """

    ids: Int[torch.Tensor, "batch pos"]
    strings: tuple[tuple[str, ...], ...]
    mask: Bool[torch.Tensor, "batch pos"]
    sides: tuple[tuple[str, int], ...]
    places: Int[torch.Tensor, "batch pos"] | None = None
    numbers: tuple[int, ...] | None = None
    spaced: bool | None = None

    def __post_init__(self) -> None:
        batch, pos = self.ids.shape
        require_shape("Tokens.mask", tuple(self.mask.shape), (batch, pos))
        require_shape("Tokens.numbers", (len(self.labels()),), (pos,))
        if self.mask.dtype != torch.bool:
            raise _unbuilt(f"a mask of {self.mask.dtype}", "a mask of torch.bool", "Use .bool().")
        lengths = {len(row) for row in self.strings} | {sum(length for _, length in self.sides)}
        negative = any(length < 0 for _, length in self.sides)
        if len(self.strings) != batch or lengths != {pos} or negative:
            raise _unbuilt(
                f"{len(self.strings)} rows of lengths {sorted(lengths)}, sides {self.sides}",
                f"{batch} rows of {pos} strings and sides of {pos} positions together",
                "Give one string per token id.",
            )

    def __repr__(self) -> str:
        sides = " + ".join(f"{length} {name}" for name, length in self.sides)
        words = [word for row in self.strings[:1] for word in row[:6]]
        more = len(self.strings) > 1 or self.ids.shape[1] > len(words)
        shown = ", ".join(repr(word) for word in words) + (", ..." if more else "")
        return f"Tokens: batch {len(self.strings)}, pos {sides}: {shown}"

    @property
    def shape(self) -> torch.Size:
        """Number of rows, and of positions."""
        return self.ids.shape

    def equals(self, other: Tokens) -> bool:
        """Returns whether both are the same tokens of the same stacks, with the same padding.

        Text counts: a word is labelled with the id of its first token, see `join`.
        """
        return (
            self.sides == other.sides
            and self.strings == other.strings
            and torch.equal(self.positions(), other.positions())
            and torch.equal(self.ids.cpu(), other.ids.cpu())
            and torch.equal(self.mask.cpu(), other.mask.cpu())
        )

    def select(self, batch: list[int], pos: list[int]) -> Tokens:
        """Returns the tokens at these rows and positions."""
        names, numbers = self.names(), tuple(self.labels()[index] for index in pos)
        part = Tokens(
            ids=self.ids[batch][:, pos],
            strings=tuple(tuple(self.strings[row][index] for index in pos) for row in batch),
            mask=self.mask[batch][:, pos],
            sides=tuple((name, len([*run])) for name, run in groupby(names[i] for i in pos))
            or ((self.sides[0][0], 0),),
            numbers=None if numbers == (*range(len(pos)),) else numbers,
            spaced=self.spaced,
        )
        places = self.positions()[batch][:, pos]
        return part if places.equal(part.positions()) else replace(part, places=places)

    def gather(
        self,
        index: Int[torch.Tensor, "batch some"],
        mask: Bool[torch.Tensor, "batch some"],
        side: str,
    ) -> Tokens:
        """Returns tokens of each row by their place on the axis, of a side of their own.

        Args:
            index: Places in each row.
            mask: False where a row has fewer: padding.
            side: Name of the side.
        """
        pairs = zip(self.strings, index.tolist(), mask.tolist(), strict=True)
        return Tokens(
            ids=self.ids.gather(1, index.to(self.ids.device)),
            strings=tuple(
                tuple(row[place] if real else "" for place, real in zip(places, there, strict=True))
                for row, places, there in pairs
            ),
            mask=self.mask.gather(1, index.to(self.mask.device)) & mask.to(self.mask.device),
            sides=((side, index.shape[1]),),
            places=self.positions().gather(1, index.cpu()),
            spaced=self.spaced,
        )

    def labels(self) -> tuple[int, ...]:
        """Returns the number of each entry on the whole axis, whatever part of it this is."""
        return (*range(self.ids.shape[1]),) if self.numbers is None else self.numbers

    def where(self) -> str:
        """Returns where in the input a part of an axis is, in words; empty for a whole axis."""
        numbers = self.numbers or ()
        listed = ", ".join(map(str, numbers[:6])) + (", ..." if len(numbers) > 6 else "")
        return f" at {listed}" if numbers else ""

    def find(self, axis: str, wanted: Any, batch: list[int]) -> list[int]:
        """Returns the places on this axis that are asked for; None asks for all.

        Args:
            axis: Its name, for messages.
            wanted: Numbers as in `labels`, negative ones from the end; tokens (all their
                occurrences); names of sides; one or several.
            batch: The rows in question. A token has to stand at the same places in all of them.

        Raises:
            InvalidInput: If something asked for is not there.
        """
        listed = [*wanted] if isinstance(wanted, (list, tuple)) else [wanted]
        if not any(isinstance(one, str) for one in listed):
            return positions(axis, wanted, self.labels())
        result = []
        for one in listed:
            if isinstance(one, str):
                result += self.side(one) or self._occurrences(axis, one, batch)
            else:
                result += positions(axis, [one], self.labels())
        return result

    def _occurrences(self, axis: str, token: str, batch: list[int]) -> list[int]:
        """Returns the places of a token; padding is none."""
        real = {row: self.mask[row].tolist() for row in batch}
        rows = {
            row: [i for i, word in enumerate(self.strings[row]) if word == token and real[row][i]]
            for row in batch
        }
        places = rows[batch[0]]
        if not any(rows.values()):
            raise self._unknown(axis, token, batch)
        if any(other != places for other in rows.values()):
            labels = self.labels()
            seen = [f"{[labels[i] for i in rows[row]]} of row {row}" for row in batch]
            raise InvalidInput(
                f"cannot select from the {axis} axis",
                f"{token!r}, at {' and '.join(seen[:4])}",
                "a token at the same positions of every row",
                "Select one row first: .select(batch=0).",
            )
        return places

    def _unknown(self, axis: str, token: str, batch: list[int]) -> InvalidInput:
        words = [*dict.fromkeys(word for row in batch for word in self.strings[row])]
        bare = [word for word in words if word.strip(" ▁Ġ#").lower() == token.strip(" ▁Ġ#").lower()]
        near = [*dict.fromkeys([*bare, *get_close_matches(token, words)])][:3]
        sides = [*dict.fromkeys(name for name, _ in self.sides)]
        return InvalidInput(
            f"cannot select from the {axis} axis",
            repr(token),
            f"one of the tokens {words[:20]}, of the sides {sides}, or positions",
            f"Did you mean {' or '.join(map(repr, near))}?"
            if near
            else "Name a token as it is written there, its space included.",
        )

    def padding(self, batch: list[int], pos: list[int]) -> list[int]:
        """Returns the rows, out of some, in which all of these positions are padding."""
        return [row for row in batch if pos and not bool(self.mask[row, pos].any())]

    def side(self, name: str) -> list[int]:
        """Returns the positions that belong to one stack."""
        return [index for index, side in enumerate(self.names()) if side == name]

    def cat(self, other: Tokens) -> Tokens:
        """Returns this axis followed by another one."""
        return Tokens(
            ids=torch.cat([self.ids, other.ids], dim=1),
            strings=tuple(a + b for a, b in zip(self.strings, other.strings, strict=True)),
            mask=torch.cat([self.mask, other.mask], dim=1),
            sides=self.sides + other.sides,
            places=None
            if self.places is None and other.places is None
            else torch.cat([self.positions(), other.positions()], dim=1),
            numbers=None
            if self.numbers is None and other.numbers is None
            else (
                *self.labels(),
                *(1 + max(self.labels(), default=-1) + i for i in other.labels()),
            ),
            spaced=self.spaced,
        )

    def alternatives(self, row: int) -> str:
        """Returns the real tokens of a row as alternatives: ``a`` or ``a | b``."""
        pairs = zip(self.strings[row], self.mask[row].tolist(), strict=True)
        return " | ".join(word for word, real in pairs if real)

    @staticmethod
    def stack(parts: Sequence[Tokens]) -> Tokens:
        """Returns the rows of several axes one after the other, shorter ones padded."""
        width = max(part.shape[1] for part in parts)

        def wide(values: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(values, (0, width - values.shape[1]))

        first = max(parts, key=lambda part: part.shape[1])
        return replace(
            first,
            ids=torch.cat([wide(part.ids) for part in parts]),
            strings=tuple(
                (*row, *[""] * (width - len(row))) for part in parts for row in part.strings
            ),
            mask=torch.cat([wide(part.mask) for part in parts]),
            places=None
            if first.places is None
            else torch.cat([wide(part.positions()) for part in parts]),
        )

    def real_pairs(self, source: Tokens) -> Bool[torch.Tensor, "batch target source"]:
        """Returns which pairs of these and the tokens of a source axis have no padding."""
        return self.mask[:, :, None] & source.mask[:, None, :]

    def positions(self) -> Int[torch.Tensor, "batch pos"]:
        """Returns the position of each token in its stack; of joined tokens, that of the last."""
        if self.places is not None:
            return self.places.cpu()
        counted = torch.cat([torch.arange(length) for _, length in self.sides])
        return counted.expand(self.ids.shape)

    def words(self) -> list[list[tuple[int, int]]]:
        """Returns the stretches ``(start, stop)`` of tokens that are words, per row; no padding.

        Told from the text of the tokens. Where words begin with their space (GPT-2, T5; see
        `spaced`), tokens that do not continue the word before, apostrophes and hyphens inside of a
        word included; elsewhere those that begin with ``##`` (BERT). Tokens that share a character
        are never parted; a space that is a token of its own belongs to what follows. Marks such as
        ``<s>`` or ``[MASK]`` and other punctuation stand alone. No word reaches from one stack into
        another, and none depends on the other rows.
        """
        result: list[list[tuple[int, int]]] = [[] for _ in self.strings]
        for start, stop in self._stretches():
            for row, (words, mask) in enumerate(zip(self.strings, self.mask, strict=True)):
                spaced = self.spaced
                if spaced is None:
                    spaced = any(word[:1].isspace() and word.strip() for word in words)
                part = find_words(words[start:stop], mask[start:stop].tolist(), spaced)
                result[row] += [(start + first, start + last) for first, last in part]
        return result

    def spans(self, of: Stretches) -> list[list[tuple[int, int]]]:
        """Returns stretches ``(start, stop)`` of tokens per row that together hold all real ones.

        Args:
            of: ``"words"``, see `words`; ``"sentences"``, which end with ``.``, ``!``, ``?`` and
                the like, or a new line; ``"sides"``, such as the prompt and the output; or a list
                of stretches and texts of whole tokens (the first place that has them; where none is
                written so, whatever their case and spaces). Tokens between those of a list are
                stretches of their own.

        Raises:
            InvalidInput: If a row has no such text, or stretches overlap.
        """
        if isinstance(of, str):
            require_choice("kind of span", of, ("words", "sentences", "sides"))
        words = self.words() if of in ("words", "sentences") else []
        if of == "words":
            return words
        result = []
        for row, pieces in enumerate(self.strings):
            if of == "sentences":
                parts = self.by_side(words)
                mine = [one for part in parts for one in find_sentences(pieces, part[row])]
            else:
                mine = [] if isinstance(of, str) else sorted(self._span(row, one) for one in of)
            result.append(self._filled(row, mine))
        return result

    def _span(self, row: int, one: str | tuple[int, int]) -> tuple[int, int]:
        if not isinstance(one, str):
            return require_spans([one], self.ids.shape[1])[0]
        for start, stop in self._stretches():
            real = self.mask[row, start:stop].tolist()
            found = find_text(self.strings[row][start:stop], real, one, self.spaced)
            if found:
                return start + found[0][0], start + found[0][1]
        raise InvalidInput(
            "there is no such text among the tokens",
            repr(one[:200]),
            f"a part of {join_pieces(self.strings[row], self.spaced)[:200]!r}",
            "Give whole tokens as they stand in the text, or a stretch (start, stop) of them.",
        )

    def _filled(self, row: int, spans: Spans) -> list[tuple[int, int]]:
        """Returns stretches of a row, and between them those of the other real tokens."""
        mask, result = self.mask[row].tolist(), []
        for (at, stop), mine in zip(self._stretches(), self.by_side([spans]), strict=True):
            for first, last in (*mine[0], (stop, stop)):
                if first < at:
                    raise InvalidInput(
                        "spans overlap",
                        f"({first}, {last}) after one that ends at {at}",
                        "stretches that share no token",
                        "Ask for one after the other.",
                    )
                result += [(at, first)] * any(mask[at:first]) + [(first, last)] * (first < last)
                at = last
        return result

    def join(self, spans: Sequence[Spans]) -> Tokens:
        """Returns one label per stretch of tokens: their text, and the id of the first.

        A stretch is real where any of its tokens is. Rows with fewer stretches of a side are
        padded.

        Args:
            spans: Stretches ``(start, stop)`` per row, in order.

        Raises:
            InvalidInput: If a stretch reaches from one stack into another.
        """
        joined = [
            self._joined(name, part)
            for (name, _), part in zip(self.sides, self.by_side(spans), strict=True)
        ]
        return reduce(Tokens.cat, joined)

    def by_side(self, spans: Sequence[Spans]) -> list[list[list[tuple[int, int]]]]:
        """Returns stretches per row by the side of the axis that they are of.

        Raises:
            InvalidInput: If a stretch reaches from one stack into another.
        """
        result = []
        for start, stop in self._stretches():
            result.append([[(a, b) for a, b in row if start <= a < stop] for row in spans])
            for a, b in (span for row in result[-1] for span in row):
                if b > stop:
                    raise _unbuilt(
                        f"the stretch ({a}, {b}) over {self.sides}",
                        "stretches of tokens of one stack",
                        "Cut it where the next stack begins.",
                    )
        return result

    def _joined(self, side: str, spans: Sequence[Spans]) -> Tokens:
        longest = max(map(len, spans))
        ids = self.ids.new_zeros(len(spans), longest)
        mask = self.mask.new_zeros(len(spans), longest)
        places = torch.zeros(len(spans), longest, dtype=torch.long)
        strings, positions = [], self.positions()
        for row, found in enumerate(spans):
            texts = []
            for index, (start, stop) in enumerate(found):
                real = [place for place in range(start, stop) if self.mask[row, place]]
                # A stretch of padding alone keeps the padding's label.
                kept = real or [*range(start, stop)]
                ids[row, index], mask[row, index] = self.ids[row, kept[0]], bool(real)
                places[row, index] = positions[row, kept[-1]]
                first, *rest = (self.strings[row][place] for place in kept)
                if self.spaced is not False:
                    rest = [piece.removeprefix("##") for piece in rest]
                texts.append(join_pieces([first, *rest], self.spaced))
            strings.append((*texts, *[""] * (longest - len(found))))
        sides = ((side, longest),)
        return Tokens(ids, tuple(strings), mask, sides, places, spaced=self.spaced)

    def _stretches(self) -> list[tuple[int, int]]:
        ends = [*accumulate(length for _, length in self.sides)]
        return list(zip([0, *ends], ends, strict=False))

    def names(self) -> list[str]:
        """Returns the stack of each token."""
        return [side for side, length in self.sides for _ in range(length)]


@storage.storable
@dataclass(frozen=True)
class Provenance:
    """Where a number comes from.

    Attributes:
        method: The function that was called.
        options: Its options, as given: text, numbers, booleans, None, and lists, tuples and
            dictionaries of these.
        model: The model's name.
        host: Class of the model object, for example ``"HookedTransformer"``.
        host_version: Version of TransformerLens.
        version: Version of this package.
        processing: Weight processing that was found, for example ``("fold_value_biases",)``;
            empty for weights as published.
        fingerprint: Hash over a sample of every weight.
    """

    method: str
    options: dict[str, Any]
    model: str
    host: str
    host_version: str
    version: str
    processing: tuple[str, ...]
    fingerprint: str


@cache
def package_version() -> str:
    """Returns the installed version of this package."""
    try:
        return version("tl-contextmix")
    except PackageNotFoundError:
        return "0+source"


def _unbuilt(seen: str, expected: str, remedy: str) -> InvalidInput:
    return InvalidInput("Tokens cannot be built", seen, expected, remedy)


def asked_words(
    target: Tokens, foil: Tokens | None, row: int = 0, quote: Callable[[str], str] = repr
) -> str:
    """Returns what a prediction is asked about, such as ``' are' rather than ' is'``.

    Args:
        target: The alternatives asked about, side by side.
        foil: Those they are contrasted with, or None.
        row: The prediction.
        quote: Puts a token in quotes.
    """
    sides = [target] if foil is None else [target, foil]
    listed = (zip(side.strings[row], side.mask[row].tolist(), strict=True) for side in sides)
    return " rather than ".join(
        " or ".join(quote(word) for word, real in pairs if real) for pairs in listed
    )
