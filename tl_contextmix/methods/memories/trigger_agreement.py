"""Whether values promote what follows their triggers (Geva et al. 2021, section 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tl_contextmix.adapters.inputs import word_table
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.readout import Unembedding, unembedding
from tl_contextmix.engine.memory_coefficients import (
    require_feed_forward,
    require_predicting,
    values,
)
from tl_contextmix.methods.memories.mined import Mined
from tl_contextmix.methods.memories.miner import NEGATIVE
from tl_contextmix.methods.memories.store import not_mined
from tl_contextmix.results import TriggerAgreement

if TYPE_CHECKING:
    import pandas


def agreement(triggers: Mined, tail: str) -> TriggerAgreement:
    """Returns the agreement of values and triggers, see `Triggers.agreement`."""
    view = triggers.require_view()
    if triggers.stack != "decoder":
        raise not_mined("next token", triggers.stack, "a model that predicts the next token")
    require_predicting(view, triggers.stack)
    frame = triggers.to_dataframe(tail=tail)
    frame = frame[frame["next_token"] >= 0].sort_values(["layer", "neuron", "rank"], kind="stable")
    reader = unembedding(view.readout, None, ("folded", "head"))
    columns: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for layer, group in frame.groupby("layer"):
            found = _layer(view, int(layer), group, reader, int(tail in NEGATIVE))
            for name, column in found.items():
                columns.setdefault(name, []).append(column)
    if not columns:
        raise not_mined("trigger with a next token", "none", "a longer corpus")
    whole = {name: torch.cat(parts) for name, parts in columns.items()}
    memories = sum(len(some) for some in triggers.manifest["neurons"].values())
    return TriggerAgreement(
        **whole,
        left_out=memories - len(whole["layer"]),
        k=triggers.k,
        words=word_table(view, whole["top"], whole["next_token"]),
        provenance=triggers.describe("agreement", {"tail": tail}),
    )


def _layer(
    view: ModelView, layer: int, group: pandas.DataFrame, reader: Unembedding, side: int
) -> dict[str, Tensor]:
    """Returns the columns of one layer's memories, whose triggers are in order."""
    firsts = group.drop_duplicates("neuron")
    neurons, following = (_numbers(firsts[name]) for name in ("neuron", "next_token"))
    vectors = values(require_feed_forward(view.blocks()[layer]))[neurons.to(view.device)]
    scan = reader.scan(reader.hidden(vectors), targets=following.to(view.device))
    top = scan.ids[:, side, 0].cpu()
    index = torch.searchsorted(neurons, _numbers(group["neuron"]))
    hits = (top[index] == _numbers(group["next_token"])).double()
    count = index.bincount(minlength=len(neurons))
    return {
        "layer": torch.full_like(neurons, layer),
        "neuron": neurons,
        "top": top,
        "next_token": following,
        "rank": scan.rank[:, side].cpu(),
        "max_prob": scan.max_prob[:, side].cpu().double(),
        "precision": index.bincount(hits, minlength=len(neurons)) / count,
        "triggers": count,
    }


def _numbers(column: pandas.Series) -> Tensor:
    return torch.tensor(column.to_numpy()).long()
