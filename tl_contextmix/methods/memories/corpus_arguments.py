"""What is given and what is read back is checked: a folder may come from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_contextmix.engine.memory_coefficients import QUADRANTS
from tl_contextmix.errors import bad
from tl_contextmix.results.axes import MOST, positions

TAILS: dict[str, tuple[str, ...]] = {
    "positive": ("positive",),
    "both": ("positive", "negative"),
    "quadrants": QUADRANTS,
}
COUNTS = ("documents", "empty", "malformed", "too_long", "cut_tokens", "tokens", "positions")
"""What a manifest counts: documents of any kind, those that are empty, unreadable or too long, the
tokens that were cut off, the tokens the model read, and the positions whose memories counted."""


def require_flag(name: str, value: Any, known: tuple[bool | None, ...] = (True, False)) -> Any:
    """Returns a switch that is given; raises InvalidInput unless it is one of those known."""
    if not any(value is one for one in known):
        raise bad(
            f"{name} is a switch",
            f"{name}={value!r}"[:200],
            f"one of {list(known)}",
            "Leave it out for the default.",
        )
    return value


def require_path(value: Any) -> Path:
    """Returns a path that is given; raises InvalidInput unless the system could have it."""
    if isinstance(value, (str, Path)) and "\0" not in str(value) and str(value):
        return Path(value)
    raise bad("this is no path", repr(value)[:200], "a str or a Path", "Give a path.")


def one_layer(layer: Any, layers: tuple[int, ...]) -> int:
    """Returns the number of the one layer that is asked for, counted from the end if negative."""
    found = [] if layer is None else positions("layer", layer, layers)
    if len(found) != 1:
        raise bad(
            "this is about one layer", repr(layer)[:200], f"one of {list(layers)}", "Name one."
        )
    return layers[found[0]]


def check_manifest(found: Any) -> dict[str, Any]:
    """Returns a manifest; raises ValueError, naming the first thing, unless it is one."""
    found = _is(found, dict, "the manifest")
    check_run(found.get("run"))
    corpus = _is(found.get("corpus"), dict, "corpus")
    _is(corpus.get("digest"), str, "corpus: digest")
    _number(corpus.get("shards"), "corpus: shards")
    counts = _is(found.get("counts"), dict, "counts")
    for name in COUNTS:
        _number(counts.get(name), f"counts: {name}")
    if counts.keys() != set(COUNTS):
        raise ValueError("counts of something else")
    if found.get("neurons") != found["run"]["options"]["neurons"]:
        raise ValueError("neurons are not those of the options")
    return found


def check_run(run: Any) -> dict[str, Any]:
    """Returns the description of a run; raises ValueError unless it is one."""
    run = _is(run, dict, "run")
    for name in ("model", "weights", "tokenizer"):
        _is(run.get(name), str, f"run: {name}")
    source = _is(run.get("source"), dict, "run: source")
    _is(source.get("corpus"), str, "run: source: corpus")
    if source.get("model") is not None:
        _is(source["model"], str, "run: source: model")
    corpus = _is(run.get("corpus"), dict, "run: corpus")
    _is(corpus.get("kind"), str, "run: corpus: kind")
    if corpus.get("column", 0) is not None:
        _is(corpus.get("column"), str, "run: corpus: column")
    _check_options(_is(run.get("options"), dict, "run: options"))
    return run


def _check_options(options: dict[str, Any]) -> None:
    for name in ("k", "batch_size", "shard_size"):
        if _number(options.get(name), f"options: {name}") < 1:
            raise ValueError(f"options: {name} is 0")
    for name, known in (
        ("stack", ("decoder", "encoder")),
        ("tails", tuple(TAILS)),
        ("unit", ("prefix", "document")),
        ("duplicates", ("keep", "drop")),
        ("prepend_bos", (None, True, False)),
        ("too_long", ("cut", "skip", "error")),
    ):
        value = options.get(name, "missing")
        if not any(type(value) is type(one) and value == one for one in known):
            raise ValueError(f"options: {name} is {value!r}"[:200])
    layers = _numbers(options.get("layers"), "options: layers")
    neurons = _is(options.get("neurons"), dict, "options: neurons")
    if neurons.keys() != {str(layer) for layer in layers}:
        raise ValueError("options: neurons of other layers")
    for layer, some in neurons.items():
        _numbers(some, f"options: neurons of layer {layer}")


def check_part(facts: Any, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless facts and tensors are a part of a run."""
    facts = _is(facts, dict, "the part")
    options = check_run(facts.get("run"))["options"]
    rank, size, shards = (_number(facts.get(n), n) for n in ("rank", "world_size", "shards"))
    if rank >= size or not isinstance(facts.get("done"), bool):
        raise ValueError(f"process {rank} of {size}")
    for name, count in _is(facts.get("counts"), dict, "counts").items():
        _number(count, f"counts: {name}")
    digests = tensors.get("digests")
    if digests is None or digests.dtype != torch.uint8 or digests.shape[1:] != (32,):
        raise ValueError("no hashes of shards")
    if facts["done"] and len(digests) != len(range(rank, shards, size)):
        raise ValueError(f"{len(digests)} hashes of {shards} shards")
    names = ["values", "places", "tokens", *(["keys"] if options["duplicates"] == "drop" else [])]
    expected = {
        f"{layer} {tail} {name}": (len(options["neurons"][str(layer)]), options["k"])
        for layer in options["layers"]
        for tail in TAILS[options["tails"]]
        for name in names
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
    for name, least, limit in (
        ("rank", 0, options["k"]),
        ("document", 0, counts["documents"]),
        ("position", 0, MOST),
        ("token", 0, MOST),
        ("next_token", -1, MOST),
    ):
        column = frame[name]
        if column.dtype.kind != "i" or not bool(column.between(least, limit - 1).all()):
            raise ValueError(f"{name} out of range")
    if frame["value"].dtype.kind != "f" or not bool((frame["value"].abs() < torch.inf).all()):
        raise ValueError("values that are not finite")
    if not set(frame["tail"].unique()) <= set(TAILS[options["tails"]]):
        raise ValueError("other tails")
    for layer, some in frame.groupby("layer")["neuron"]:
        if not set(some.unique()) <= set(options["neurons"].get(str(layer), ())):
            raise ValueError(f"other neurons in layer {layer}")


def _is(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is a {type(value).__name__}")
    return value


def _number(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MOST:
        raise ValueError(f"{name} is {str(value)[:50]}")
    return value


def _numbers(value: Any, name: str) -> list[int]:
    found = [_number(one, name) for one in _is(value, list, name)]
    if not found or found != sorted(set(found)):
        raise ValueError(f"{name}: not in order")
    return found
