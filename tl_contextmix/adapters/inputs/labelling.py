"""Labels of what goes in and comes out: tokens of each side, and where a result comes from."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tl_contextmix.adapters.chats import ROLES
from tl_contextmix.core.blocks import Batch, Side
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.results import Provenance, Tokens


def provenance(
    view: ModelView,
    method: str,
    options: Mapping[str, Any],
    *,
    further: Mapping[str, Tensor] = MappingProxyType({}),
    **given: str,
) -> Provenance:
    """Returns where the results of a method on a model come from.

    Warns where the processing of the weights changes them.

    Args:
        view: The model.
        method: Name of the method.
        options: What it was asked for.
        further: What the pass was given of each token besides its id.
        given: What else decides whether processing matters; see `weight_processing.changed_by`.
    """
    if view.processing:
        view.notice(method, {**options, **given})
    return Provenance(
        method=method,
        options={
            **options,
            **{name: _recorded(value) for name, value in further.items()},
            **({"dictionary": list(view.dictionaries)} if view.dictionaries else {}),
        },
        model=view.name,
        host=view.host,
        host_version=view.host_version,
        version=package_version(),
        processing=view.processing,
        fingerprint=view.fingerprint,
    )


def _recorded(value: Tensor) -> Any:
    """Returns what was given of each token; of sound a hash."""
    if not value.is_floating_point():
        return value.tolist()
    return hashlib.sha256(value.detach().cpu().double().numpy().tobytes()).hexdigest()[:16]


@functools.cache
def package_version() -> str:
    """Returns the installed version of this package."""
    try:
        return version("tl-contextmix")
    except PackageNotFoundError:
        return "0+source"


def label_sides(view: ModelView, batch: Batch) -> dict[str, Tokens]:
    """Returns the labels of each side of a batch."""
    sides = {"decoder": batch.decoder, "encoder": batch.main}
    if batch.decoder is None:
        sides = dict.fromkeys(view.stacks, batch.main)
    return {name: label(view, name, side) for name, side in sides.items() if side is not None}


def word_table(view: ModelView, *ids: Tensor) -> dict[str, str]:
    """Returns the text of all that is predicted, by its id as text (as files hold them)."""
    known = torch.cat([some.flatten().cpu() for some in ids]).unique().tolist()
    return {str(token): view.to_output(token) for token in known}


def label(view: ModelView, name: str, side: Side) -> Tokens:
    """Returns the labels of one side of a batch."""
    # Copies: the caller may write on what was given, or on a result.
    ids, mask = side.ids.cpu().clone(), side.mask.cpu().clone()
    # Each token is decoded once: long inputs repeat theirs.
    texts = {token: view.to_string(token) for token in ids.unique().tolist()}
    strings = tuple(tuple(texts[token] for token in row) for row in ids.tolist())
    sides, places = ((name, ids.shape[1]),), None
    if side.roles is not None and bool((side.roles == side.roles[0]).all()):
        runs = itertools.groupby(side.roles[0].tolist())
        sides = tuple((ROLES[role], len([*run])) for role, run in runs)
        places = torch.arange(ids.shape[1]).repeat(len(ids), 1)
    return Tokens(ids, strings, mask, sides, places=places, spaced=view.spaced())
