"""Padding: found in ids that come without a mask, and whether a host handles it, measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import isfinite

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_contextmix.adapters.verification import relative_error
from tl_contextmix.core.blocks import Batch, Side
from tl_contextmix.core.finite import why_not_finite
from tl_contextmix.core.model_view import ModelView, Padding
from tl_contextmix.errors import InvalidInput, four_parts, warn

_PADS, _LENGTH = 2, 4
_REMEDY = {
    "left": "Pad on the right (padding_side='right').",
    "right": "Give texts of one length together, or each alone.",
}


def find_padding(view: ModelView, ids: Int[Tensor, "batch pos"], asked: str) -> Side:
    """Returns ids that came without a mask, with the padding at their ends masked.

    What the tokenizer pads with is padding where a row begins or ends in it. Where a text may
    begin or end in it, too (GPT-2's padding is its BOS and its EOS), rows that end in runs of
    unequal length are padded, and one token is left to each if each has one. Runs of equal
    length, such as that of a single row, are padding on the side that the tokenizer pads, or
    `asked`, if they are longer than one: one EOS at the end of a row is its text's, as is one BOS
    in front of it.

    Warns:
        ContextMixWarning: If there is padding.
    """
    remedy = "Pass attention_mask: zeros there, or ones if it is text."
    return _without(view, ids, partial(_real, asked), "input", remedy)


def _real(asked: str, how: Padding, text: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Returns which positions of ids are no padding, see `find_padding`."""
    mask = torch.ones_like(text)
    if bool(text[:, [0, -1]].all()) or not bool(text.any()):
        return mask
    declared = {asked, how.side}
    mask &= _inside(text, how.begins, "left" in declared, keep_one=True)
    mask &= _inside(text.flip(1), how.ends, "right" in declared, keep_one=False).flip(1)
    # Of a row of nothing else one token is left: the BOS of a text without words.
    empty = ~text.any(dim=1)
    mask[empty] = False
    mask[empty, -1 if how.side == "left" else 0] = True
    return mask


def without_padding(view: ModelView, ids: Sequence[int]) -> list[int]:
    """Returns one row of ids without the padding at its ends, see `find_padding`."""
    how = view.padding()
    if how is None or not ids or how.token not in (ids[0], ids[-1]):
        return list(ids)
    row = torch.tensor([ids])
    return row[_real("right", how, row != how.token)].tolist()


def _without(
    view: ModelView,
    ids: Int[Tensor, "batch pos"],
    real: Callable[[Padding, Tensor], Tensor],
    name: str,
    remedy: str,
) -> Side:
    """Returns ids with what the tokenizer pads with masked, and warns of it.

    ``real`` returns the positions that are not padding, from where there is another token.
    """
    how = view.padding()
    if how is None:
        return Side(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool))
    mask = real(how, ids != how.token)
    padded = (~mask).sum(dim=1)
    rows = padded.nonzero()[:, 0].tolist()
    if rows:
        warn(
            f"the {name} is taken as padded",
            f"{int(padded.sum())} times {how.token} ({view.to_string(how.token)!r}), which "
            f"the tokenizer pads with, at the ends of row {', '.join(map(str, rows))}",
            "a mask, or ids without padding",
            remedy,
        )
    return Side(ids=ids, mask=mask)


def _inside(
    text: Bool[Tensor, "batch pos"], shared: bool, declared: bool, *, keep_one: bool
) -> Bool[Tensor, "batch pos"]:
    """Returns the positions that are not padding in front of a text.

    Args:
        text: Where there is another token than padding.
        shared: Whether a text may begin with the same token.
        declared: Whether this is the side that is padded.
        keep_one: Whether a text that may begin with it does, if every row has one.
    """
    worded = text.any(dim=1)
    runs = text.int().argmax(dim=1)
    least, most = int(runs[worded].min()), int(runs[worded].max())
    if shared and least == most and (least < 2 or not declared):
        runs = torch.zeros_like(runs)
    elif shared and least > 0 and (keep_one or least == 1):
        runs = runs - 1
    return torch.arange(text.shape[1], device=text.device) >= runs[:, None]


def find_target_padding(
    view: ModelView, ids: Int[Tensor, "batch pos"], start: Sequence[int]
) -> Side:
    """Returns ids of the decoder side, with the padding after them masked.

    T5's start with padding, which is then in ``start``: the first of them alone.

    Raises:
        InvalidInput: If there is padding before the text.

    Warns:
        ContextMixWarning: If there is padding.
    """

    def real(how: Padding, text: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        before = text.int().argmax(dim=1) > (1 if how.token in start else 0)
        if bool(before.any()):
            row = int(before.nonzero()[0])
            raise InvalidInput(
                "the decoder_input is padded before its text",
                f"{how.token} ({view.to_string(how.token)!r}), which the tokenizer pads with, at "
                f"the beginning of row {row}",
                "padding after the text: no mask hides it from a decoder",
                "Pad the decoder's ids on the right.",
            )
        text[:, 0] = True
        return _inside(text.flip(1), how.ends, declared=True, keep_one=False).flip(1)

    remedy = "Cut it off where it is common to all rows, or give texts."
    return _without(view, ids, real, "decoder_input", remedy)


def require_safe_padding(view: ModelView, side: Side, *, placed: bool = False) -> None:
    """Checks that padding changes nothing about the text.

    Raises:
        InvalidInput: If there is padding and it does, see `unsafe_padding`.
    """
    reason = unsafe_padding(view, side, placed=placed)
    if reason:
        raise InvalidInput(reason)


def unsafe_padding(view: ModelView, side: Side, *, placed: bool = False) -> str:
    """Returns why padding changes something about the text; empty where it does not.

    Some hosts leave positions where they are (HookedEncoder, BART and Marian on the bridge), unless
    they are ``placed``, or drop the mask, others turn rows of padding into NaN, by version, family
    and dtype. So padding before the text and after it is tried once per model, on a few tokens with
    and without, and without hooks of the user's own.
    """
    for where, edge in (("left", 0), ("right", -1)):
        if bool(side.mask[:, edge].all()):
            continue
        fact = f"padding on the {where}{', positions given' if placed else ''}"
        if fact not in view.facts:
            view.facts[fact] = _try(view, where, placed)
        if view.facts[fact]:
            return view.facts[fact]
    return ""


def _try(view: ModelView, where: str, placed: bool) -> str:
    length = _LENGTH if view.n_ctx is None else min(_LENGTH, view.n_ctx - _PADS)
    if length < 1:
        return ""  # no text fits beside the padding
    # Words rather than the special tokens at the start of most vocabularies.
    ids = (11 + 7 * torch.arange(length)[None]) % view.d_vocab
    real = torch.ones_like(ids, dtype=torch.bool)
    pads = torch.full((1, _PADS), view.pad_id())
    order = slice(None, None, -1 if where == "left" else 1)
    padded = Side(
        ids=torch.cat([ids, pads][order], dim=1),
        mask=torch.cat([real, torch.zeros_like(pads, dtype=torch.bool)][order], dim=1),
    )
    sides = Side(ids=ids, mask=real), padded
    with view.without_hooks():
        plain, found = (_streams(view, side, placed) for side in sides)
    errors = [relative_error(found[name], stream) for name, stream in plain.items()]
    if all(error <= view.tolerance for error in errors):
        return ""
    place, error = "before" if where == "left" else "after", max(errors)
    if not all(map(isfinite, errors)):
        kind = next(iter(found.values())).dtype
        return why_not_finite(f"tokens with padding {place} them", kind, padded=True)
    return four_parts(
        f"padding {place} the text gives wrong numbers with this model on {view.host}",
        f"a relative error of {error:.2g} at the tokens themselves, against the same text alone",
        f"at most {view.tolerance:.0e}",
        _REMEDY[where],
    )


def _streams(view: ModelView, side: Side, placed: bool) -> dict[str, Tensor]:
    decoder = None
    if view.encode_decoder is not None:
        ids = torch.tensor([view.encode_decoder(None)[:1]])
        decoder = Side(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool))
    last = {stack: blocks[-1] for stack, blocks in view.stacks.items()}
    names = [block.resid_out for block in last.values()]
    positions = (side.mask.cumsum(dim=1) - 1).clamp(min=0)
    further = {"position_ids": positions} if placed else {}
    trace = view.run(Batch(main=side, decoder=decoder, further=further), names, logits=False)
    return {
        block.resid_out: trace[block.resid_out][:, trace.batch.side(stack).mask[0]]
        for stack, block in last.items()
    }
