"""Checks of arguments, and of what is read back: a folder may come from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from tl_contextmix.core.validation import MOST
from tl_contextmix.engine.memory_coefficients import QUADRANTS
from tl_contextmix.errors import InvalidInput
from tl_contextmix.results.axes import positions

TAILS: dict[str, tuple[str, ...]] = {
    "positive": ("positive",),
    "both": ("positive", "negative"),
    "quadrants": QUADRANTS,
}
COUNTS = (
    *("documents", "empty", "malformed", "too_long", "cut_tokens", "tokens", "positions"),
    *("special", "padding"),
)
"""What a manifest counts: documents of any kind, those that are empty, unreadable or too long, the
tokens that were cut off, the tokens the model read, the positions whose memories counted, those
skipped because a special token stands there, and the padding that token ids came with."""

_NUMBER, _SIZE = range(MOST), range(1, MOST)
_TEXT, _DICT = (str,), (dict,)
_RUN = {
    "model": _TEXT,
    "weights": _TEXT,
    "tokenizer": _TEXT,
    "source": {"corpus": _TEXT, "model": (str, None)},
    "corpus": {"kind": _TEXT, "column": (str, None)},
    "options": {
        "k": _SIZE,
        "batch_size": _SIZE,
        "shard_size": _SIZE,
        "stack": ("decoder", "encoder"),
        "tails": tuple(TAILS),
        "unit": ("prefix", "document"),
        "duplicates": ("keep", "drop"),
        "prepend_bos": (None, True, False),
        "too_long": ("cut", "skip", "error"),
        "layers": (list,),
        "neurons": _DICT,
    },
}
_MANIFEST = {
    "run": _RUN,
    "corpus": {"digest": _TEXT, "shards": _NUMBER},
    "counts": dict.fromkeys(COUNTS[:-2], _NUMBER),
}
_PART = {
    "run": _RUN,
    **dict.fromkeys(("rank", "world_size", "shards"), _NUMBER),
    "done": (True, False),
    "counts": _DICT,
}


def require_path(value: Any) -> Path:
    """Returns a path; raises InvalidInput unless the system could have it."""
    if isinstance(value, (str, Path)) and "\0" not in str(value) and str(value):
        return Path(value)
    raise InvalidInput("this is no path", repr(value)[:200], "a str or Path", "Pass a path.")


def one_layer(layer: Any, layers: tuple[int, ...]) -> int:
    """Returns the number of one layer, counted from the end if negative."""
    found = [] if layer is None else positions("layer", layer, layers)
    if len(found) != 1:
        raise InvalidInput(
            "this is about one layer", repr(layer)[:200], f"one of {list(layers)}", "Name one."
        )
    return layers[found[0]]


def check_manifest(found: Any) -> dict[str, Any]:
    """Returns a manifest; raises ValueError, naming the first thing, unless it is one."""
    _require(found, _MANIFEST, "the manifest")
    # Not counted by earlier versions.
    for name in COUNTS[-2:]:
        _require(found["counts"].setdefault(name, 0), _NUMBER, f"counts: {name}")
    if found["counts"].keys() != set(COUNTS):
        raise ValueError("counts of something else")
    _require_neurons(found["run"])
    if found.get("neurons") != found["run"]["options"]["neurons"]:
        raise ValueError("neurons are not those of the options")
    return found


def _require(value: Any, form: Any, name: str) -> None:
    """Raises ValueError, naming the first difference, unless a value has a form.

    Forms: a range of integers; a tuple of types and constants, of which one must fit; forms by key.
    """
    if isinstance(form, range):
        fits = type(value) is int and value in form
    elif isinstance(form, tuple):
        fits = any(
            isinstance(value, one)
            if isinstance(one, type)
            else type(value) is type(one) and value == one
            for one in form
        )
    else:
        fits = isinstance(value, dict)
    if not fits:
        raise ValueError(f"{name} is {value!r}"[:200])
    if isinstance(form, dict):
        outer = "" if name in ("the manifest", "the part") else f"{name.removeprefix('run: ')}: "
        held = cast("dict[str, Any]", value)
        for key, inner in form.items():
            if key not in held:
                raise ValueError(f"{outer}no {key}")
            _require(held[key], inner, f"{outer}{key}")


def _require_neurons(run: dict[str, Any]) -> None:
    """Raises ValueError unless the neurons of every layer are listed, each once and in order."""
    layers, neurons = run["options"]["layers"], run["options"]["neurons"]
    lists: list[tuple[str, Any]] = [("layers", layers), *neurons.items()]
    for name, listed in lists:
        if not isinstance(listed, list) or not all(type(one) is int for one in listed):
            raise ValueError(f"options: {name} are no numbers")
        if not listed or listed != sorted(set(listed)) or not 0 <= listed[0] <= listed[-1] < MOST:
            raise ValueError(f"options: {name} are not in order")
    if neurons.keys() != {str(layer) for layer in layers}:
        raise ValueError("options: neurons of other layers")


def check_part(facts: Any, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless facts and tensors are a part of a run."""
    _require(facts, _PART, "the part")
    _require_neurons(facts["run"])
    for name, count in facts["counts"].items():
        _require(count, _NUMBER, f"counts: {name}")
    options, digests = facts["run"]["options"], tensors.get("digests")
    rank, size, shards = (facts[name] for name in ("rank", "world_size", "shards"))
    if rank >= size:
        raise ValueError(f"process {rank} of {size}")
    if digests is None or digests.dtype != torch.uint8 or digests.shape[1:] != (32,):
        raise ValueError("no hashes of shards")
    if facts["done"] and len(digests) != len(range(rank, shards, size)):
        raise ValueError(f"{len(digests)} hashes of {shards} shards")
    names = ("values", "places", "tokens", "hashes", "keys")
    expected = {
        f"{layer} {tail} {name}": (len(options["neurons"][str(layer)]), options["k"])
        for layer in options["layers"]
        for tail in TAILS[options["tails"]]
        for name in names[: 5 if options["duplicates"] == "drop" else 4]
    }
    if tensors.keys() != {"digests", *expected}:
        raise ValueError("tensors of other layers or tails")
    for key, shape in expected.items():
        one, whole = tensors[key], not key.endswith("values")
        if tuple(one.shape) != shape or (one.dtype == torch.int64) != whole:
            raise ValueError(f"{key}: {tuple(one.shape)} {one.dtype}")
        if not whole and bool(one.isnan().any() | (one == torch.inf).any()):
            raise ValueError(f"{key}: not finite")


def check_table(frame: Any, manifest: dict[str, Any]) -> None:
    """Raises ValueError unless rows of the table are those of the manifest's run."""
    options, counts = manifest["run"]["options"], manifest["counts"]
    limits = {
        "rank": (0, options["k"]),
        "document": (0, counts["documents"]),
        "position": (0, MOST),
        "token": (0, MOST),
        "next_token": (-1, MOST),
        "hash": (-(2**63), 2**63),
    }
    for name in [name for name in limits if name in frame]:
        column, (least, limit) = frame[name], limits[name]
        if column.dtype.kind != "i" or not bool(column.between(least, limit - 1).all()):
            raise ValueError(f"{name} out of range")
    if frame["value"].dtype.kind != "f" or not bool((frame["value"].abs() < torch.inf).all()):
        raise ValueError("values that are not finite")
    if not set(frame["tail"].unique()) <= set(TAILS[options["tails"]]):
        raise ValueError("other tails")
    for layer, some in frame.groupby("layer")["neuron"]:
        if not set(some.unique()) <= set(options["neurons"].get(str(layer), ())):
            raise ValueError(f"other neurons in layer {layer}")
