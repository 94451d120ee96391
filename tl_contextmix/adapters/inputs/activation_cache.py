"""A trace made of an ActivationCache that the user already has, checked against the input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tl_contextmix.core.blocks import Batch, Block, Side, Trace
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.errors import InvalidInput

# Embeddings of the same token differ by a factor (Gemma) and by rounding, 4e-3 in bfloat16; those
# of two tokens point elsewhere. Those of neighbouring positions are alike, and no factor is theirs.
_SAME_TOKEN, _SAME_POSITION = 0.1, 0.01


@runtime_checkable
class Cache(Protocol):
    """What is needed of an ActivationCache: activations by name."""

    def __getitem__(self, name: str, /) -> Tensor:
        """Returns one activation."""
        ...

    def keys(self) -> Any:
        """Returns the names."""
        ...


class NamesRead(Exception):
    """What a method reads of a pass, raised where it would be read.

    Attributes:
        needed: Names without which there is no answer.
        checked: Names by which a cache is checked where it holds them.
    """

    def __init__(self, needed: list[str], checked: list[str]) -> None:
        super().__init__()
        self.needed, self.checked = needed, checked


class NamesOnly(dict[str, Tensor]):
    """Stands in for a cache to learn which names are read: see `names_read`."""


def names_read(model: Any, call: Callable[[NamesOnly], Any]) -> list[str] | None:
    """Returns the names that a call reads of a cache, and those it checks it by.

    None if ``call``, which is given a stand-in for a cache, reads none.
    """
    try:
        call(NamesOnly())
    except NamesRead as found:
        more = [name for name in found.checked if name in model.hook_dict]
        return list(dict.fromkeys([*found.needed, *more]))
    return None


def trace_of(
    view: ModelView, cache: Cache, batch: Batch, blocks: Sequence[Block], needed: list[str]
) -> Trace:
    """Returns what a cache holds of some blocks.

    Names that are needed must be there; what else is there to check the blocks by is taken, too.

    Raises:
        InvalidInput: If it lacks an activation that is needed, or is of another input.
        UnsupportedModel: If what it holds shows that its pass was edited.
    """
    if not isinstance(cache, Cache):
        raise InvalidInput(
            "the cache cannot be read",
            describe(cache),
            "activations by name, as TransformerLens' caching run returns them",
            "Pass the second of its results; the first are the logits.",
        )
    made = {name: view.cached.made[name] for name in needed if name in view.cached.made}
    shown = [made[name][0] if name in made else (name,) for name in needed]
    needed = [*dict.fromkeys(name for names in shown for name in names)]
    checks = [name for block in blocks for name in block.checkpoints()]
    if isinstance(cache, NamesOnly):
        embedded = [name for names in view.cached.embedded.values() for name in names]
        raise NamesRead(needed, [*checks, *embedded])
    reader = _Reader(view, cache, blocks[0].resid_in)
    missing = [name for name in needed if name not in reader]
    if missing:
        raise InvalidInput(
            "the cache lacks activations that are read",
            f"{len(reader.names)} activations without {', '.join(missing)}",
            f"all {len(needed)} that are read",
            "Cache with names_filter=tl_contextmix.evaluation.hook_names(model, method) or "
            "names_filter=None, or leave `cache` out. Where an SAE is attached, a cache has other "
            "names: leave it out.",
        )
    values = {name: reader.read(name) for name in [*needed, *checks] if name in reader}
    _require_shapes(values, batch, blocks)
    _require_masked(view, values, batch, blocks)
    _require_tokens(view, reader, batch)
    for name, (sources, make) in made.items():
        values[name] = make(batch.main.ids, *(values[source] for source in sources))
    return Trace(batch=batch, values=values, dtype=view.dtype)


class _Reader:
    """Reads activations under any of their names, with a batch axis, on the device of the maths.

    The shape of ``stream``, a residual stream, says whether the batch axis was removed.
    """

    def __init__(self, view: ModelView, cache: Cache, stream: str) -> None:
        self.names = set(cache.keys())
        self._view = view
        self._cache = cache
        self._stream = stream

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def _find(self, name: str) -> str | None:
        options = (name, *self._view.cached.other_names(name))
        return next((option for option in options if option in self.names), None)

    def _raw(self, name: str) -> Tensor:
        found = self._find(name)
        assert found is not None
        return self._cache[found]

    def read(self, name: str) -> Tensor:
        value = self._raw(name).detach().to(self._view.device)
        value = value if self._raw(self._stream).ndim == 3 else value[None]
        return self._view.cached.read(name, value)


def _require_shapes(values: dict[str, Tensor], batch: Batch, blocks: Sequence[Block]) -> None:
    for block in blocks:
        for attention in block.attentions:
            own = batch.side(attention.stack).ids
            read = batch.main.ids if attention.kind == "cross" else own
            stream, pattern = values[block.resid_in], values[attention.pattern]
            seen = (*stream.shape[:2], *pattern.shape[2:])
            expected = (*own.shape, own.shape[1], read.shape[1])
            if seen != expected or pattern.shape[0] != own.shape[0]:
                raise _other_input(
                    f"[batch, pos] = {list(stream.shape[:2])} and an attention pattern of "
                    f"{list(pattern.shape[2:])}",
                    f"{list(own.shape)} and {list(expected[2:])} as in the input",
                )


def _require_masked(
    view: ModelView, values: dict[str, Tensor], batch: Batch, blocks: Sequence[Block]
) -> None:
    for attention in (attention for block in blocks for attention in block.attentions):
        own = batch.side(attention.stack).mask
        read = batch.main.mask if attention.kind == "cross" else own
        if bool(read.all()):
            continue
        pattern = values[attention.pattern]
        hidden = (own[:, :, None] & ~read[:, None, :]).to(pattern.device)
        most = float(pattern.masked_fill(~hidden[:, None], 0).max())
        if not most <= view.tolerance:
            raise InvalidInput(
                "the cache was made without this mask",
                f"{most:.2g} of a token's attention on padding, in {attention.pattern}",
                "none",
                "Make the cache with the same attention_mask; where the model's class drops it "
                "(a bidirectional HookedTransformer), leave `cache` out. Without a mask, padding "
                "at the ends of the ids is known by the tokenizer's: pass ones if it is text.",
            )


def _require_tokens(view: ModelView, reader: _Reader, batch: Batch) -> None:
    main, segments = batch.main, batch.further.get("token_type_ids")
    sides = {"main": main, "decoder": batch.decoder}
    kept = [name for name in view.cached.embedded["token_type_ids"] if name in reader]
    if kept:
        ids = torch.zeros_like(main.ids) if segments is None else segments
        sides["token_type_ids"] = Side(ids, main.mask)
    elif segments is not None:
        del sides["main"]  # GPT-2 looks segments up in the same table, after the tokens
    positions = batch.further.get("position_ids")
    table = view.cached.embedded.get("position_ids", ())
    if any(name in reader for name in table):
        # How a host counts padding is its own matter.
        if positions is None and bool(main.mask.all()):
            counted = torch.arange(main.ids.shape[1]) + view.cached.first_position
            positions = counted.expand_as(main.ids)
        sides["position_ids"] = None if positions is None else Side(positions, main.mask)
    elif positions is not None and table:  # rotary positions leave nothing to compare
        raise InvalidInput(
            "the positions of this cache are not known",
            f"position_ids, and a cache without {' or '.join(table)}",
            "the embeddings of positions",
            "Leave `cache` out, or the filter of names that it was made with.",
        )
    for name, side in sides.items():
        found = [key for key in view.cached.embedded.get(name, ()) if key in reader]
        if side is None or not found:
            continue
        cached = reader.read(found[0]).to(torch.float32)
        own = view.cached.embedding(side.ids, name).to(cached.device)
        if name == "position_ids":
            cached = cached.expand_as(own) if cached.shape[1:] == own.shape[1:] else cached
        if cached.shape != own.shape:
            continue
        along = (cached * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True).clamp(
            min=1e-30
        )
        # Embeddings of positions are added as they are.
        most, along = (_SAME_POSITION, 1) if name == "position_ids" else (_SAME_TOKEN, along)
        off = (cached - along * own).norm(dim=-1) > most * cached.norm(dim=-1)
        wrong = (off & side.mask.to(off.device)).nonzero()
        if len(wrong):
            row, pos = wrong[0].tolist()
            what = name if name in ("token_type_ids", "position_ids") else "tokens"
            raise _other_input(
                f"{len(wrong)} positions with another embedding, the first in row {row} at "
                f"position {pos}",
                f"the embeddings of the input's {what} ({found[0]})",
            )


def _other_input(seen: str, expected: str) -> InvalidInput:
    return InvalidInput(
        "the cache is of another input",
        seen,
        expected,
        "Pass the same tokens that made the cache (prepend_bos included), all positions, and their "
        "token_type_ids and position_ids. Where "
        "hooks of your own changed the embeddings, leave `cache` out and the hooks on.",
    )


def describe(value: Any) -> str:
    """Returns the shape and dtype of a tensor, or the type of anything else, for messages."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
