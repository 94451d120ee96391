"""The triggers mined from one corpus: pointers and values on disk, with their model and corpus."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_contextmix.adapters.passes import provenance
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.validation import require_number
from tl_contextmix.errors import InvalidInput
from tl_contextmix.methods.memories.corpus_arguments import TAILS, one_layer
from tl_contextmix.methods.memories.corpus_formats import Corpus
from tl_contextmix.methods.memories.shards import Frame, frame_of
from tl_contextmix.methods.memories.store import TABLE, not_mined, read_table, unreadable
from tl_contextmix.results import Provenance
from tl_contextmix.results.base import Shown

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class Mined(Shown):
    """Pointers and values of the triggers of every memory that was mined; see `Triggers`."""

    folder: Path
    manifest: dict[str, Any] = field(repr=False)
    view: ModelView | None = field(default=None, repr=False)
    corpus: Corpus | None = field(default=None, repr=False)
    model: object = field(default=None, repr=False)

    def __repr__(self) -> str:
        counts = ", ".join(f"{n:,} {name}" for name, n in self.manifest["counts"].items() if n)
        run = self.manifest["run"]
        silent = "; ".join(
            f"layer {layer}: {', '.join(map(str, some))}"
            for layer, some in self.silent_experts.items()
        )
        return (
            f"Triggers of {run['model']}, layers {self.layers}, k {self.k} "
            f"({', '.join(self.tails)}) in {self.folder}: {counts or 'no documents'}"
            + (f". Experts without triggers: {silent}" if silent else "")
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that were mined."""
        return tuple(self.manifest["run"]["options"]["layers"])

    @cached_property
    def silent_experts(self) -> dict[int, tuple[int, ...]]:
        """Experts none of whose mined memories has a trigger, by layer.

        With ``tails="both"`` or ``"quadrants"`` these are those that no token was routed to.
        """
        result: dict[int, tuple[int, ...]] = {}
        sizes = self.manifest["run"]["options"].get("experts", {})
        for layer, each in sizes.items():
            spoken = set(
                read_table(self.folder, self.manifest, [("layer", "=", int(layer))])["neuron"]
            )
            mined, start, silent = set(self.manifest["neurons"][layer]), 0, []
            for expert, size in enumerate(each):
                own = mined & {*range(start, start + size)}
                silent += [expert] if own and not own & spoken else []
                start += size
            if silent:
                result[int(layer)] = tuple(silent)
        return result

    @property
    def k(self) -> int:
        """How many triggers were looked for."""
        return self.manifest["run"]["options"]["k"]

    @property
    def tails(self) -> tuple[str, ...]:
        """What was looked for."""
        return TAILS[self.manifest["run"]["options"]["tails"]]

    def to_dataframe(
        self, layer: int | None = None, neuron: int | None = None, tail: str | None = None
    ) -> pandas.DataFrame:
        """Returns one row per trigger: pointers, values and token ids.

        Only the requested layer is read from disk.

        Args:
            layer: Layer; None for all.
            neuron: Neuron; None for all.
            tail: Tail; None for all.

        Raises:
            InvalidInput: If they were not mined.
        """
        conditions: list[tuple[str, str, Any]] = []
        if layer is not None:
            conditions.append(("layer", "=", one_layer(layer, self.layers)))
        if neuron is not None:
            known = set().union(*self.manifest["neurons"].values())
            neuron = require_number("neuron", neuron, 0)
            if neuron not in known:
                raise not_mined("neuron", neuron, f"one of {len(known)} neurons")
            conditions.append(("neuron", "=", neuron))
        if tail is not None:
            conditions.append(("tail", "=", self.known_tail(tail)))
        result = read_table(self.folder, self.manifest, conditions)
        if self.view is not None:
            most = max(
                (int(result[n].max()) for n in ("token", "next_token") if len(result)), default=0
            )
            if most >= self.view.d_vocab:
                seen = f"token {most} of a vocabulary of {self.view.d_vocab}"
                raise unreadable(self.folder / TABLE, seen)
        return result

    def known_tail(self, tail: str | None) -> str:
        """Returns a tail that was mined; None is the first."""
        if tail is not None and tail not in self.tails:
            raise not_mined("tail", tail, f"one of {self.tails}")
        return self.tails[0] if tail is None else tail

    @property
    def stack(self) -> str:
        """The stack that was mined."""
        return self.manifest["run"]["options"]["stack"]

    @property
    def both_ways(self) -> bool:
        """Whether the model had also read what follows a trigger."""
        return self.stack == "encoder"

    def require_view(self) -> ModelView:
        """Returns the model; raises InvalidInput where it is not at hand."""
        if self.view is None:
            raise InvalidInput(
                "this needs the model that was mined",
                "triggers without one",
                f"the model {self.manifest['run']['model']}",
                "Call load_triggers(folder, model=...).",
            )
        return self.view

    def require_corpus(self) -> Corpus:
        """Returns the corpus; raises InvalidInput where it is not at hand."""
        if self.corpus is None:
            raise InvalidInput(
                "contexts cannot be shown",
                "no corpus",
                "the corpus that was mined",
                "Call load_triggers(folder, model=..., corpus=...).",
            )
        return self.corpus

    @property
    def bos(self) -> bool | None:
        """Whether documents got a beginning-of-sequence token; None: the model's default."""
        return self.manifest["run"]["options"]["prepend_bos"]

    @cached_property
    def frame(self) -> Frame:
        """The tokens that frame every text."""
        return frame_of(self.require_view(), self.bos)

    @property
    def left_out(self) -> frozenset[int]:
        """Tokens whose positions did not count."""
        counted = self.manifest["run"]["options"].get("special", False)
        return frozenset() if counted else self.require_view().special_tokens()

    def describe(self, name: str, options: dict[str, Any]) -> Provenance:
        """Returns where a result made from these triggers comes from."""
        digest = self.manifest["corpus"]["digest"]
        return provenance(self.require_view(), f"triggers.{name}", {**options, "corpus": digest})
