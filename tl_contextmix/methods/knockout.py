"""Knocking components out: does the answer fall when what an attribution names is removed?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tl_contextmix.attribution import require_choice
from tl_contextmix.errors import InvalidInput, four_parts
from tl_contextmix.hosts import as_view
from tl_contextmix.inputs import Given, PaddingSide, Text, make_batch, provenance
from tl_contextmix.inputs.targets import Ids, Names, predicting_rows, target_tokens
from tl_contextmix.model_view import Batch, Edit, ModelView
from tl_contextmix.results import Knockout, Tokens
from tl_contextmix.results.components import Components
from tl_contextmix.selection import (
    Chosen,
    Sublayer,
    answer_of,
    chosen_components,
    every_sublayer,
    others_at_random,
)

Positions = Literal["last", "all"]
Replacement = Literal["zero", "mean"]


def knockout(
    model: object,
    input: Text | Tensor,
    *,
    neurons: Chosen | None = None,
    heads: Chosen | None = None,
    target: Names | None = None,
    target_ids: Ids | None = None,
    pos: int | None = None,
    positions: Positions = "last",
    replace_with: Replacement = "zero",
    controls: int = 10,
    seed: int = 0,
    attention_mask: Tensor | None = None,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide = "right",
    decoder_input: Text | Tensor | None = None,
) -> Knockout:
    """Returns how probable a token is with and without some heads and neurons.

    A feed-forward neuron's activation (``hook_post``), an attention neuron's (one dimension of a
    head's ``hook_z``, whatever source it was read from) or a head's whole ``hook_z`` is replaced
    while the model runs; everything behind it follows. As many components of the same kinds,
    drawn at random from the whole model, are taken out for comparison. What an attribution calls
    important should do more than they.

    Args:
        model: Any TransformerLens model with a vocabulary readout.
        input: A text, several, or token ids [batch, pos].
        neurons: What to take out: a result of `log_prob_contributions` or `query_contributions`
            whose components are neurons or heads (each sentence has its own), or a list of
            ``(layer, neuron)`` and ``(layer, head, neuron)`` for all sentences.
        heads: The same, or a list of ``(layer, head)``.
        target: The token, see `log_prob_contributions`. None: that of the contributions given, or
            the model's best.
        target_ids: Its id, instead.
        pos: Position that predicts; None: that of the contributions given, or else the last token,
            or the mask.
        positions: Where they are taken out: ``"last"``, only at the position whose stream they
            were found to write to (the predicting one, unless they come from
            `query_contributions`), or ``"all"``. Setting parameters to zero, as the authors do, is
            ``"all"``.
        replace_with: ``"zero"`` (a neuron's part of the stream vanishes; b_post stays), or the
            ``"mean"`` of its values over the real tokens of the input.
        controls: How many random sets.
        seed: Of the random sets.
        attention_mask: 1 at real tokens, 0 at padding.
        prepend_bos: Whether texts get a beginning-of-sequence token; None: the model's default.
        padding_side: Where texts of unequal length are padded.
        decoder_input: Decoder side of an encoder-decoder; None: its start token.

    Returns:
        `Knockout`: log-probability, probability and reciprocal rank (its mean is the MRR) of the
        target, before, after, and with each random set.

    Raises:
        InvalidInput: If an argument does not fit the model, or nothing was chosen.
        UnsupportedModel: If the model has no vocabulary readout.

    Cost: ``2 + controls`` forward passes; twice as many with ``"mean"``.
    """
    require_choice("positions", positions, ("last", "all"))
    require_choice("replacement", replace_with, ("zero", "mean"))
    if isinstance(controls, bool) or not isinstance(controls, int) or controls < 0:
        raise InvalidInput(
            four_parts(
                "there cannot be so many random sets",
                repr(controls),
                "0 or a positive integer",
                "Ten are the default.",
            )
        )
    view = as_view(model)
    view.readout.require()
    given = Given(input, attention_mask, prepend_bos, padding_side, decoder_input)
    batch = make_batch(view, given)
    found = answer_of(batch, view, neurons, heads)
    if found is not None and target is None and target_ids is None:
        target_ids = found.target.ids[:, 0].tolist()
    if found is not None and pos is None:
        rows = found.pos
    else:
        rows = predicting_rows(view, batch, view.base_stack(None), pos)
    chosen = chosen_components(view, neurons, heads, rows)
    generator = torch.Generator().manual_seed(seed)
    others = [others_at_random(view, chosen, generator) for _ in range(controls)]
    with torch.no_grad():
        ablation = _Ablation(view, batch, rows, positions == "all", replace_with)
        logits = ablation.run(None)
        tokens = target_tokens(view, target, target_ids, logits)
        after = ablation.run(chosen)
        random = [_figures(ablation.run(one), tokens) for one in others]
    before = _figures(logits, tokens)
    nothing = before.new_empty(len(before), 0, before.shape[1])
    options = {
        "pos": pos,
        "positions": positions,
        "replace_with": replace_with,
        "controls": controls,
        "seed": seed,
    }
    return Knockout(
        before=before,
        after=_figures(after, tokens),
        controls=torch.stack(random, dim=1) if random else nothing,
        components=chosen,
        target=tokens,
        best=target_tokens(view, None, None, after),
        provenance=provenance(view, "knockout", options),
    )


@dataclass(frozen=True)
class _Ablation:
    """Runs of the model with components replaced."""

    view: ModelView
    batch: Batch
    rows: Tensor
    everywhere: bool
    replace_with: Replacement

    def run(self, chosen: Components | None) -> Tensor:
        """Returns the logits of the predicting position, in the dtype of the maths."""
        edits = {} if chosen is None else self._edits(chosen)
        logits = self.view.run(self.batch, [], edits=edits).logits
        assert logits is not None
        each = torch.arange(len(self.rows), device=logits.device)
        found = logits[each, self.rows.to(logits.device)]
        return found.to(self.view.device, self.view.dtype)

    def _edits(self, chosen: Components) -> Mapping[str, Edit]:
        touched = [
            (one, mine)
            for one in every_sublayer(self.view)
            if bool((mine := chosen.of_kind(one.kind) & (chosen.layer == one.layer)).any())
        ]
        means = self._means([one for one, _ in touched]) if self.replace_with == "mean" else {}
        return {
            one.name: self._edit(chosen, mine, means.get(one.name, one.constant))
            for one, mine in touched
        }

    def _means(self, sublayers: list[Sublayer]) -> dict[str, Tensor]:
        """Returns the mean of activations over the real tokens of the input."""
        trace = self.view.run(self.batch, [one.name for one in sublayers])
        found = {}
        for one in sublayers:
            stack = "encoder" if one.kind.startswith("encoder ") else self.view.base_stack(None)
            values = trace.values[one.name]
            real = self.batch.side(stack).mask.to(values.device)
            found[one.name] = values[real].mean(dim=0)
        return found

    def _edit(self, chosen: Components, mine: Tensor, filling: Tensor | None) -> Edit:
        def edit(activation: Tensor) -> Tensor:
            gone = torch.zeros(activation.shape, dtype=torch.bool)
            for row, place in mine.nonzero().tolist():
                one = chosen.at(row, place)
                pos = slice(None) if self.everywhere else one["pos"]
                inside = [one[name] for name in ("head", "neuron") if one[name] is not None]
                gone[(row, pos, *inside)] = True
            new = torch.zeros((), device=activation.device, dtype=activation.dtype)
            new = new if filling is None else filling.to(activation)
            return torch.where(gone.to(activation.device), new, activation)

        return edit


def _figures(logits: Tensor, target: Tokens) -> Tensor:
    """Returns log-probability, probability and reciprocal rank of the targets."""
    ids = target.ids.to(logits.device)
    log_prob = logits.log_softmax(dim=-1).gather(1, ids)[:, 0]
    rank = 1 + (logits > logits.gather(1, ids)).sum(dim=-1)
    return torch.stack([log_prob, log_prob.exp(), 1 / rank.to(log_prob)], dim=-1)
