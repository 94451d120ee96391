"""The rows of a map that are asked about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tl_contextmix.results import ContextMap, Tokens


@dataclass(frozen=True)
class Predictions:
    """The rows of a map that are asked about, labelled.

    Attributes:
        target: Labels of the rows: what each predicts, or, where a position alone was asked for,
            the token there. Their positions are those of the rows.
        written: Tokens of the stack that writes the answer, prompt and output apart; None: as they
            stand.
        options: What was asked, for the provenance.
    """

    target: Tokens
    written: Tokens | None
    options: Mapping[str, Any]

    @property
    def rows(self) -> list[int]:
        """Positions that are asked about in any sentence."""
        return self.target.positions()[self.target.mask].unique().tolist()

    def rows_of(self, map: ContextMap, *, whole: bool = True) -> ContextMap:
        """Returns the rows of a map.

        Where its columns are the ``whole`` of the tokens, prompt and output are kept apart.
        """
        source, encoder = map.source, map.source.side("encoder")
        if whole and self.written is not None and len(encoder) < source.shape[1]:
            source = self.written
            if encoder:
                source = source.cat(map.source.select([*range(len(source.ids))], encoder))
                source = replace(source, numbers=None)
        options = {**map.provenance.options, **self.options}
        found = map.at(self.target, source)
        return replace(found, provenance=replace(map.provenance, options=options))
