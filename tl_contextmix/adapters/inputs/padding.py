"""Whether a host handles padding before the text: measured, not believed."""

from __future__ import annotations

import torch
from torch import Tensor

from tl_contextmix.core.blocks import Batch, Side
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.errors import InvalidInput, four_parts

_PADS, _LENGTH = 2, 4
_FACT = "padding on the left"


def require_safe_padding(view: ModelView, side: Side) -> None:
    """Checks that padding before the text changes nothing about the text.

    Some hosts leave positions where they are (HookedEncoder, BART and Marian on the bridge),
    others turn rows of padding into NaN, by version, family and dtype. So it is tried once per
    model, on a few tokens with and without padding. Padding behind the text needs no trial: no
    position moves, and no supported model reads what its mask hides.

    Raises:
        InvalidInput: If there is padding before the text and it does.
    """
    if bool(side.mask[:, 0].all()):
        return
    if _FACT not in view.facts:
        view.facts[_FACT] = _try_left(view)
    if view.facts[_FACT]:
        raise InvalidInput(view.facts[_FACT])


def _try_left(view: ModelView) -> str:
    length = _LENGTH if view.n_ctx is None else min(_LENGTH, view.n_ctx - _PADS)
    if length < 1:
        return ""  # no text fits behind the padding
    # Words rather than the special tokens at the start of most vocabularies.
    ids = (11 + 7 * torch.arange(length)[None]) % view.d_vocab
    padding = torch.full((1, _PADS), view.pad_id())
    mask = torch.ones(1, length + _PADS, dtype=torch.bool)
    mask[:, :_PADS] = False
    plain = _streams(view, Side(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool)))
    padded = _streams(view, Side(ids=torch.cat([padding, ids], dim=1), mask=mask))
    error = max(_error(padded[name], stream) for name, stream in plain.items())
    if error <= view.tolerance:
        return ""
    return four_parts(
        f"padding before the text gives wrong numbers with this model on {view.host}",
        f"a relative error of {error:.2g} at the tokens themselves, against the same text alone",
        f"at most {view.tolerance:.0e}",
        "Pad on the right (padding_side='right').",
    )


def _streams(view: ModelView, side: Side) -> dict[str, Tensor]:
    decoder = None
    if view.encode_decoder is not None:
        ids = torch.tensor([view.encode_decoder(None)])
        decoder = Side(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool))
    last = {stack: blocks[-1] for stack, blocks in view.stacks.items()}
    names = [block.resid_out for block in last.values()]
    trace = view.run(Batch(main=side, decoder=decoder), names)
    return {
        block.resid_out: trace[block.resid_out][:, trace.batch.side(stack).mask[0]]
        for stack, block in last.items()
    }


def _error(found: Tensor, expected: Tensor) -> float:
    error = float((found - expected).abs().max() / expected.abs().max())
    return error if error == error else float("inf")
