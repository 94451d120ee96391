"""Activations that no hook of a host shows, made of those that are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from tl_contextmix.adapters.per_layer_embeddings import vector_of
from tl_contextmix.core.blocks import Batch, Block
from tl_contextmix.core.experts import Experts
from tl_contextmix.core.model_view import Hooks, PassOutput, Runner
from tl_contextmix.core.per_layer_embedding import PerLayerEmbedding

EXPERTS_OUT = "experts_out"
"""What Granite 4 adds up in its block: what its experts and what its shared layer put out."""
SUMMED = ("moe", "shared_mlp")


@dataclass(frozen=True)
class Unseen:
    """An activation that no hook shows, and what it is made of.

    Attributes:
        sources: Names of the activations that it is made of.
        make: Makes it of token ids and these.
        plain: Whether these are meant as they are before hooks of the user's own.
    """

    sources: tuple[str, ...]
    make: Callable[..., Tensor]
    plain: bool = False


def find_unseen(handle: Any, stacks: Mapping[str, tuple[Block, ...]]) -> dict[str, Unseen]:
    """Returns how the activations that no hook shows are made, by name."""
    result: dict[str, Unseen] = {}
    for blocks in stacks.values():
        for block in blocks:
            for ff in block.feed_forwards:
                if isinstance(ff, PerLayerEmbedding):
                    make = partial(vector_of, handle, block.layer)
                    result[ff.vector] = Unseen((blocks[0].resid_in,), make, plain=True)
                written = ff.written if isinstance(ff, Experts) else ff.post
                path, _, leaf = written.rpartition(".")
                if leaf == EXPERTS_OUT:
                    names = tuple(f"{path}.{name}.hook_out" for name in SUMMED)
                    result[written] = Unseen(names, lambda ids, one, other: one + other)
    return result


def with_unseen(run: Runner, unseen: Mapping[str, Unseen]) -> Runner:
    """Returns a runner that makes what hooks do not show, too."""

    def whole(
        batch: Batch, hooks: Hooks, grad: bool, watch: bool, logits: bool = True
    ) -> PassOutput:
        made = {name: unseen[name] for name, _ in hooks if name in unseen}
        shown = {name: edit for name, edit in hooks if name not in made}
        for one in made.values():
            shown |= {name: shown.get(name) for name in one.sources}
        output, values, added = run(batch, [*shown.items()], grad, watch, logits)
        for name, one in made.items():
            given = [
                values[n] - added[n].to(values[n]) if one.plain and n in added else values[n]
                for n in one.sources
            ]
            values[name] = one.make(batch.main.ids, *given)
        return output, values, added

    return whole if unseen else run
