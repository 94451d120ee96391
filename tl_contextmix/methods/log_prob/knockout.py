"""Knocking components out: does the answer fall when what an attribution names is removed?"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Input, name_tokens, read_batch
from tl_contextmix.adapters.passes import run_pass
from tl_contextmix.adapters.questions import TokenAnswerInputs, ask, label_sets, split_answer
from tl_contextmix.core.contrast import Contrast
from tl_contextmix.core.validation import NotNegative
from tl_contextmix.engine.edited_runs import Ablation, Replacement
from tl_contextmix.engine.registry import method
from tl_contextmix.engine.selection import Chosen, Controls, chosen_components, without_sources
from tl_contextmix.results import Knockout
from tl_contextmix.results.components import finest


@method(cites=("yu2024neuron",), on_text=False)
def knockout(
    model: object,
    input: Input,
    *,
    neurons: Chosen | None = None,
    heads: Chosen | None = None,
    experts: Chosen | None = None,
    everywhere: bool = False,
    replace_with: Replacement = "zero",
    controls: NotNegative = 10,
    seed: int = 0,
    **inputs: Unpack[TokenAnswerInputs],
) -> Knockout:
    """Returns how probable a token is with and without some heads and neurons.

    A feed-forward neuron's activation (``hook_post``), an attention neuron's (one dimension of a
    head's ``hook_z``, whatever source it was read from) or a head's whole ``hook_z`` is replaced
    while the model runs; everything after it follows. One that a result names for several
    sources is one neuron and is ablated once. As many components of the same kinds, drawn at random
    from the whole model, are ablated for comparison; none of them is, or is part of, a chosen
    one. What an attribution calls important should do more than they.

    Args:
        model: Any TransformerLens model with a vocabulary readout.
        input: A text, several, or token ids [batch, pos].
        neurons: What to ablate: a result of `log_prob_contributions` or `query_contributions`
            whose components are neurons or heads (each sentence has its own), or for all sentences
            one or several ``(layer, neuron)`` and ``(layer, head, neuron)``, or labels such as
            ``"L3N120"``.
        heads: The same, or ``(layer, head)``, such as ``"L3H5"``.
        experts: The same, or ``(layer, expert)`` and ``(layer, expert, neuron)``. Of an expert all
            neurons are ablated; routing and its biases stay.
        everywhere: Whether they are ablated at every position, as by setting parameters to zero,
            which the authors do; else only at the position whose stream they were found to write
            to: the predicting one, unless they come from `query_contributions`.
        replace_with: ``"zero"`` (a neuron's part of the stream vanishes; b_post stays), or the
            ``"mean"`` of its values over the real tokens of the input.
        controls: How many random sets.
        seed: Of the random sets.
        **inputs: ``target``, ``foil`` and ``pos``, see `Asked` (None: what was asked where the
            components were found); mask, padding and the like, see `TokenInputs`.

    Returns:
        `Knockout`: log-probability, probability and reciprocal rank (its mean is the MRR) of the
        target, before, after, and with each random set; with a foil each less the foil's. Of
        several alternatives it is their probability together, and the rank of the best.

    Raises:
        InvalidInput: If an argument does not fit the model, or nothing was chosen.
        UnsupportedModel: If the model has no vocabulary readout.

    Cost: ``2 + controls`` forward passes.
    """
    view = name_tokens(as_view(model), inputs.get("labels"))
    view.readout.require()
    given, answer = split_answer(input, inputs)
    question = ask(view, read_batch(view, given), answer, neurons, heads, experts)
    chosen = chosen_components(view, neurons, heads, question.rows, experts)
    chosen = without_sources(chosen, per_position=not everywhere)
    drawn = Controls(view, chosen, seed)
    sets = [chosen, *(drawn.draw() for _ in range(controls))]
    with torch.no_grad():
        batch = question.batch
        if not question.plain:  # a run of its own for each prediction
            batch = batch.each(lambda x: x[question.sentences])
        forward_pass = run_pass(view, given, batch=batch, logits=True)
        ablation = Ablation(forward_pass, question, everywhere)
        logits, filling = ablation.before(sets if replace_with == "mean" else [])
        contrast = question.contrast(logits)
        after, *others = (ablation.run(some, filling) for some in sets)
    before = _figures(logits, contrast)
    random = [_figures(one, contrast) for one in others]
    return Knockout(
        before=before,
        after=_figures(after, contrast),
        controls=torch.stack(random, dim=1) if random else before.new_empty(len(before), 0, 3),
        components=chosen,
        target=label_sets(view, contrast.target),
        foil=None if contrast.foil is None else label_sets(view, contrast.foil),
        best=label_sets(view, [*after.argmax(dim=-1)[:, None]]),
        pos=question.rows,
        sentence=question.sentences,
        provenance=forward_pass.provenance(
            "knockout",
            {
                "pos": answer.pos,
                "everywhere": everywhere,
                "replace_with": replace_with,
                "controls": controls,
                "seed": seed,
            },
            removed=finest(chosen),
        ),
    )


def _figures(logits: Tensor, contrast: Contrast) -> Tensor:
    """Returns log-probability, probability and reciprocal rank of target less foil."""
    ranks = 1 / contrast.best_ranks(logits).to(logits)
    rank = ranks[:, 0] if contrast.foil is None else ranks[:, 0] - ranks[:, 1]
    return torch.stack([contrast.score(logits), contrast.score(logits, "prob"), rank], dim=-1)
