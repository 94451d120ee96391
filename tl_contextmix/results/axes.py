"""Axes and their labels: finding places on them, ranking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int

from tl_contextmix.core.validation import whole_number
from tl_contextmix.errors import InvalidInput

_LISTED = 40


def positions(axis: str, wanted: Any, labels: Sequence[int] | Sequence[str]) -> list[int]:
    """Returns the places on an axis that are asked for; None asks for all.

    Args:
        axis: Its name, for messages.
        wanted: Labels, or places; one or several. Where labels are numbers (of layers, of heads,
            of the input's positions) an integer is one of these, and a negative one counts from
            the end; elsewhere it is a place.
        labels: Label of each place.
    """
    length = len(labels)
    if wanted is None:
        return list(range(length))
    # Of several entries with one label the first.
    known: dict[int | str, int] = {label: i for i, label in reversed([*enumerate(labels)])}
    # Labels of heads are text, as they may name groups; most are the model's numbers all the same.
    heads = axis == "head"
    numbered = all(isinstance(label, int) or (heads and label.isdecimal()) for label in labels)
    if numbered:
        known |= {int(label): place for label, place in known.items()}
    known |= {place - length: place for place in range(length)}
    if not numbered:
        known |= {place: place for place in range(length)}
    result = []
    for one in _asked(axis, wanted):
        if one not in known:
            raise _absent(axis, one, _known(labels, numbered))
        result.append(known[one])
    return result


def _known(labels: Sequence[int] | Sequence[str], numbered: bool) -> str:
    """Returns what can be asked for, in words."""
    length = len(labels)
    texts = any(isinstance(one, str) for one in labels)
    listed = str([*labels[:_LISTED]]).removesuffix("]") + (", ...]" if length > _LISTED else "]")
    if not numbered or [*map(int, labels)] == [*range(length)]:
        return f"an integer from {-length} to {length - 1}" + (f", or one of {listed}" * texts)
    return f"one of {listed}, or {f'{-length} to ' * (length > 1)}-1 from the end"


def _asked(axis: str, wanted: Any) -> list[int | str]:
    """Returns what is asked for as a list of integers and names."""
    if hasattr(wanted, "tolist"):  # arrays, tensors and their scalars
        wanted = wanted.tolist()
    listed = [wanted] if isinstance(wanted, str) or not isinstance(wanted, Sequence) else wanted
    if not listed:
        raise _absent(axis, "an empty list", "at least one entry")
    result = []
    for one in listed:
        number = one if isinstance(one, str) else whole_number(one)
        if number is None:
            raise _absent(axis, one, "integers")
        result.append(number)
    return result


def _absent(axis: str, seen: object, expected: str) -> InvalidInput:
    remedy = "Leave the argument out for the whole axis."
    if axis == "layer":
        remedy = "Layers keep the model's numbers, also in a part of a result."
    return InvalidInput(f"cannot select from the {axis} axis", repr(seen), expected, remedy)


def largest(values: torch.Tensor, k: int) -> Int[torch.Tensor, " found"]:
    """Returns the places of the ``k`` largest numbers in a flattened tensor, largest first.

    Equal numbers come in the order of their places, whatever the device; NaN and -inf are omitted.
    """
    flat = values.flatten().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if not flat.numel():
        return torch.zeros(0, dtype=torch.long)
    # Not topk alone: which of several equal numbers it takes is not defined.
    least = flat.topk(min(k, flat.numel())).values[-1]
    places = ((flat >= least) & (flat > -torch.inf)).nonzero()[:, 0]
    order = flat[places].sort(descending=True, stable=True).indices
    return places[order[:k]].cpu()


def as_array(tensor: torch.Tensor) -> Any:
    """Returns a NumPy array on the CPU; bfloat16, which NumPy lacks, as float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def require_place(name: str, last: int, size: int) -> None:
    """Raises InvalidInput for a place that an axis of this size has not."""
    if not -1 <= last < size:  # -1 is none
        raise InvalidInput(
            f"there is no such place on the axis of {name}",
            str(last),
            f"at most {size - 1}",
            "Save the result again.",
        )
