"""Numbers that are NaN or infinite: what made them so, and what to do about it."""

from __future__ import annotations

import torch
from torch import Tensor

from tl_contextmix.errors import InvalidInput, four_parts


def why_not_finite(where: str, dtype: torch.dtype, *, padded: bool = False) -> str:
    """Returns the message about a model's numbers that are not finite.

    Args:
        where: Where they are.
        dtype: Their dtype in the model.
        padded: Whether the model was given padding.
    """
    what, remedy = "the model's own activations are not finite", _LOOK
    if dtype == torch.float16:
        largest = torch.finfo(dtype).max
        what = f"float16 overflows in this model: its largest number is {largest:.0f}"
        remedy = "Load the model in float32 or bfloat16 (dtype=torch.float32). "
    elif dtype == torch.float64 and padded:
        what = "a mask in float64 turns into NaN in this model's own attention"
        remedy = (
            "Hugging Face takes the softmax in float32, where a row of float64's lowest numbers "
            "has no maximum. Load the model in float32, pad on the other side (padding_side=), or "
            "give the text alone. "
        )
    elif dtype != torch.float32:
        remedy = f"Load the model in float32 instead of {dtype}. {_LOOK}"
    return four_parts(what, f"NaN or infinity in {where}", "finite numbers", remedy.strip())


_LOOK = "Look at hooks of your own, and at the weights: quantized ones lose their scale when cast."


def require_predictions(logits: Tensor, *, padded: bool = False) -> None:
    """Checks that logits say something; those of -inf are of tokens that are never said.

    Args:
        logits: The logits, in the dtype of the model.
        padded: Whether the model was given padding.

    Raises:
        InvalidInput: If one is NaN or +inf.
    """
    if says_nothing(logits):
        raise InvalidInput(why_not_finite("the logits", logits.dtype, padded=padded))


def says_nothing(logits: Tensor) -> bool:
    """Returns whether some logit is NaN or +inf."""
    # The largest of numbers and NaN is NaN.
    return bool(logits.numel()) and not bool((logits.detach().amax(dim=-1) < torch.inf).all())
