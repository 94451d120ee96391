"""What a model's own forward takes of each token besides its id: segments, positions, languages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_contextmix.adapters.inputs.activation_cache import describe
from tl_contextmix.core.blocks import Batch, Side
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.errors import InvalidInput, warn


def further_arguments(
    view: ModelView, given: Mapping[str, Any], main: Side
) -> dict[str, Int[Tensor, "batch pos"]]:
    """Returns what is given of each token, [batch, pos] or the same [pos] for all rows, checked.

    Raises:
        InvalidInput: If the model's forward takes no such argument, or not these values.
    """
    result = {}
    for name, value in given.items():
        value = torch.tensor(0.5) if isinstance(value, (int, float)) else value  # fits no tokens
        whole = isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
        if name not in view.takes:
            # Many tokenizers give them to every model.
            if name == "token_type_ids" and whole and not bool(value.any()):
                continue
            raise InvalidInput(
                f"this model takes no {name}",
                describe(value),
                f"of each token, besides its id: {', '.join(view.takes) or 'nothing'}",
                "Leave it out, or out of the tokenizer's result.",
            )
        shape = main.ids.shape
        if not whole or value.shape not in (shape, shape[1:], (1, shape[1])):
            raise InvalidInput(
                f"the {name} do not fit the tokens",
                describe(value),
                f"a tensor of integers of shape {tuple(shape)}",
                "Give one for every token, padding included.",
            )
        least, most, bound = int(value.min()), int(value.max()), view.takes[name]
        if least < 0 or (bound is not None and most >= bound):
            raise InvalidInput(
                f"the {name} are not all known to the model",
                f"values from {least} to {most}",
                "integers from 0" + ("" if bound is None else f" to {bound - 1}"),
                "Take them from the model's own tokenizer.",
            )
        result[name] = value.to(main.ids.device).long().expand(shape)
    return result


def warn_of_lost_segments(view: ModelView, main: Side) -> None:
    """Warns of a second segment in a row that came without segment ids.

    Warns:
        ContextMixWarning: If the model was trained with segments, the tokenizer tells them apart,
            and a row has two separators.
    """
    separator = view.special_ids().get("separator")
    if separator is None or (view.takes.get("token_type_ids") or 0) < 2:
        return
    counts = ((main.ids == separator) & main.mask).sum(dim=1)
    rows = (counts > 1).nonzero()[:, 0].tolist()
    if rows:
        warn(
            "two texts are read as one segment",
            f"{int(counts[rows[0]])} times {view.to_string(separator)!r} in row {rows[0]}, and "
            "no token_type_ids",
            "segment ids as the model was trained with",
            "Give pairs, [(first, second)], or what the tokenizer returns for them, or "
            "token_type_ids=.",
        )


def require_same_arguments(view: ModelView, options: Mapping[str, Any], batch: Batch) -> None:
    """Checks that a batch is given what the pass of an earlier result, by its options, was given.

    Raises:
        InvalidInput: If something is missing, added or different.
    """
    before = {name: options[name] for name in view.takes if options.get(name)}
    now = {name: value.tolist() for name, value in batch.further.items()}
    # Of a result's rows some may have been selected.
    if before.keys() != now.keys() or any(
        before[name] != value for name, value in now.items() if len(before[name]) == len(value)
    ):
        raise InvalidInput(
            "the earlier result is of another input",
            f"{' and '.join(now) or 'nothing'} of the tokens besides their ids",
            f"the same {' and '.join(before)} as before" if before else "no more than before",
            "Give all that the result's own pass was given.",
        )
