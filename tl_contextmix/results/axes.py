"""Axes and their labels: checking that they fit, finding places on them, ranking."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int

from tl_contextmix.errors import InvalidInput, bad

MOST = 2**62
"""No count and no number of a document is so large."""


def require_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Raises InvalidInput unless a tensor has as many entries per axis as there are labels."""
    if tuple(tensor.shape) != expected:
        raise bad(
            f"{name} does not fit its labels",
            f"shape {tuple(tensor.shape)}",
            f"shape {expected}",
            "Give every axis as many labels as it has entries.",
        )


def require_choice(operation: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises InvalidInput unless a value is one of the choices."""
    if value not in choices:
        raise bad(
            f"{operation} does not know this {name}",
            repr(value),
            f"one of {list(choices)}",
            "Choose one of these.",
        )


def whole_number(value: Any) -> int | None:
    """Returns an integer, NumPy's and tensors without axes included; None for anything else."""
    # True would be position 1, and a mask of booleans a list of ones and zeros.
    if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:
        return None
    if getattr(value, "ndim", 0):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def require_count(k: object) -> int:
    """Returns how many are asked for; raises InvalidInput unless it is a positive integer."""
    count = whole_number(k)
    if count is None or count < 1:
        raise bad("nothing can be ranked", f"k={k!r}", "a positive integer", "Ask for k=10.")
    return count


def positions(axis: str, wanted: Any, labels: Sequence[str], length: int) -> list[int]:
    """Returns the positions on an axis that are asked for; None asks for all.

    Args:
        axis: Its name, for messages.
        wanted: Positions, negative ones from the end, or labels; one or several.
        labels: Label of each position; empty where they are found by position only.
        length: Length of the axis.

    Raises:
        InvalidInput: If something asked for is not there.
    """
    if wanted is None:
        return list(range(length))
    found = []
    for one in _asked(axis, wanted):
        if isinstance(one, str) and one in labels:
            found.append(labels.index(one))
        elif isinstance(one, int) and -length <= one < length:
            found.append(one % length)
        else:
            known = f", or one of {list(labels)}" if labels else ""
            raise _absent(axis, one, f"an integer from {-length} to {length - 1}{known}")
    return found


def layer_positions(wanted: Any, layers: tuple[int, ...]) -> list[int]:
    """Returns the positions of layers asked for by number; a negative one counts from the end.

    Raises:
        InvalidInput: If something asked for is not there.
    """
    if wanted is None:
        return list(range(len(layers)))
    found = []
    for one in _asked("layer", wanted):
        if isinstance(one, int) and one in layers:
            found.append(layers.index(one))
        elif isinstance(one, int) and -len(layers) <= one < 0:
            found.append(one % len(layers))
        else:
            last = "-1" if len(layers) == 1 else f"{-len(layers)} to -1"
            raise _absent("layer", one, f"one of {list(layers)}, or {last} from the end")
    return found


def _asked(axis: str, wanted: Any) -> list[int | str]:
    """Returns what is asked for as a list of integers and names."""
    if hasattr(wanted, "tolist"):  # arrays, tensors and their scalars
        wanted = wanted.tolist()
    listed = [wanted] if isinstance(wanted, str) or not isinstance(wanted, Sequence) else wanted
    if not listed:
        raise _absent(axis, "an empty list", "at least one entry")
    return [one if isinstance(one, str) else _integer(axis, one) for one in listed]


def _integer(axis: str, value: Any) -> int:
    number = whole_number(value)
    if number is None:
        raise _absent(axis, value, "integers")
    return number


def _absent(axis: str, seen: object, expected: str) -> InvalidInput:
    remedy = "Leave the argument out for the whole axis."
    if axis == "layer":
        remedy = "Layers keep the model's numbers, also in a part of a result."
    return bad(f"cannot select from the {axis} axis", repr(seen), expected, remedy)


def largest(values: torch.Tensor, k: int) -> Int[torch.Tensor, " found"]:
    """Returns the places of the ``k`` largest numbers in a flattened tensor, largest first.

    Equal numbers come in the order of their places, whatever the device; NaN and -inf are left out.
    """
    flat = values.flatten().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if not flat.numel():
        return torch.zeros(0, dtype=torch.long)
    # Not topk alone: which of several equal numbers it takes is not defined.
    least = flat.topk(min(k, flat.numel())).values[-1]
    places = ((flat >= least) & (flat > -torch.inf)).nonzero()[:, 0]
    order = flat[places].sort(descending=True, stable=True).indices
    return places[order[:k]].cpu()


def unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the place on each axis of a place in a flattened tensor."""
    place = []
    for size in reversed(shape):
        place.append(index % size)
        index //= size
    return tuple(reversed(place))


def real_pairs(
    target: Bool[torch.Tensor, "batch target"], source: Bool[torch.Tensor, "batch source"]
) -> Bool[torch.Tensor, "batch target source"]:
    """Returns which pairs are of two real tokens, from the masks of both axes."""
    return target[:, :, None] & source[:, None, :]


def as_array(tensor: torch.Tensor) -> Any:
    """Returns a NumPy array on the CPU; bfloat16, which NumPy lacks, as float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def require_number(name: str, value: Any, least: int = 1) -> int:
    """Returns an integer that is given; raises InvalidInput unless it is at least so large."""
    try:
        found = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = least - 1
    if not least <= found < MOST:
        raise bad(
            f"there is no such {name}",
            f"{name}={value!r}"[:200],
            f"an integer from {least} on",
            "Leave it out for the default.",
        )
    return found
