"""Reading components through the vocabulary: which tokens they raise and lower."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Given, Input, Inputs
from tl_contextmix.adapters.questions import Answer
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.validation import Positive
from tl_contextmix.engine.log_prob_scores import By, Prediction, Split, run_question, split_stream
from tl_contextmix.engine.parts import DEFAULT_MAX_BYTES
from tl_contextmix.engine.registry import method
from tl_contextmix.errors import InvalidInput
from tl_contextmix.results import ComponentReadouts, LogProbContributions
from tl_contextmix.results.components import Components


@method(cites=("yu2023exploring", "yu2024neuron"), on_text=False)
def component_readouts(
    model: object,
    input: Input,
    *,
    components: LogProbContributions,
    k: Positive = 10,
    max_bytes: Positive = DEFAULT_MAX_BYTES,
    **inputs: Unpack[Inputs],
) -> ComponentReadouts:
    r"""Returns the tokens that components of the residual stream raise and lower most.

    .. math:: b(v) = \mathrm{LIN}_s(v)\, W_U

    the before-softmax values of a component's vector (2024, section 3.2), with the scale of the
    final norm frozen at its real value and without constants: values of components add up to the
    model's logits less those of the constants. What is read is what the component really writes,
    a neuron's vector times its coefficient. A masked-LM head, which is no sum, is applied to each
    vector in full.

    Args:
        model: Any TransformerLens model with a vocabulary readout.
        input: The input the components were found on.
        components: A result of `log_prob_contributions`, usually its ``.top(k)``.
        k: How many tokens of either end.
        max_bytes: Workspace.
        **inputs: Mask, padding and the like, see `Inputs`.

    Returns:
        `ComponentReadouts`.

    Raises:
        InvalidInput: If an argument does not fit the model, or the components another input.
        UnsupportedModel: If the model has no vocabulary readout.

    Cost: a forward pass and ``2 d d_vocab`` operations per component.
    """
    if not isinstance(components, LogProbContributions):
        raise InvalidInput(
            "there is nothing to read",
            repr(components)[:100],
            "a result of log_prob_contributions",
            "Take components from a result's .top(k).",
        )
    view = as_view(model)
    with torch.no_grad():
        by = cast(By, components.by)
        given = Given(input, **inputs)
        asked = run_question(view, given, Answer(), by=by, about=components)
        prediction = asked.prediction("frozen", max_bytes)
        k = min(k, prediction.vocabulary.weight.shape[1])
        there = ~components.scores.isnan().cpu()
        vectors = _vectors(prediction, cast(By, components.by), components.components, there)
        found = [prediction.vocabulary.extremes(some, row, k) for row, some in enumerate(vectors)]
    blank = ~there[:, :, None].to(vectors.device)
    top, top_ids, low, low_ids = (torch.stack(column) for column in zip(*found, strict=True))
    top, low = (logits.masked_fill(blank, torch.nan) for logits in (top, low))
    top_ids, low_ids = (ids.masked_fill(blank, -1) for ids in (top_ids, low_ids))
    return ComponentReadouts(
        top_logits=top,
        top_ids=top_ids,
        top_words=_words(prediction.view, top_ids),
        bottom_logits=low,
        bottom_ids=low_ids,
        bottom_words=_words(prediction.view, low_ids),
        components=components.components,
        scores=components.scores,
        unit=components.unit,
        tokens=prediction.tokens,
        encoder=prediction.encoder,
        provenance=prediction.forward_pass.provenance(
            "component_readouts", {"k": k, "by": components.by}
        ),
    )


def _vectors(
    prediction: Prediction, by: By, wanted: Components, there: Tensor
) -> Float[Tensor, "batch component d_model"]:
    """Returns the vectors of components; zero where none is there.

    Raises:
        InvalidInput: If one is not written to the stream.
    """
    shape = (*there.shape, prediction.stream.total.shape[1])
    result = prediction.stream.total.new_zeros(shape)
    missing = there.clone()
    for split in split_stream(prediction.stream, by):
        place = split.grid.find(wanted)
        mine = (place >= 0) & there
        if bool(mine.any()):
            row = mine.nonzero()[:, 0].to(result.device)
            result[mine] = _vectors_of(split, row, place[mine].to(result.device))
            missing &= ~mine
        if split.bias is not None:
            grid, vector = split.bias
            mine = (grid.find(wanted) >= 0) & there
            result[mine] = vector[mine.nonzero()[:, 0], 0]
            missing &= ~mine
    if bool(missing.any()) or not bool(there.any()):
        odd = missing.nonzero()[:1].tolist()
        raise InvalidInput(
            "there is no such component to read here",
            wanted.label(*odd[0]) if odd else "a result without components",
            "components written to the stream of the position they were found at",
            "Take them from a result's .top(k), and give the input they were found on.",
        )
    return result


def _vectors_of(split: Split, row: Tensor, place: Tensor) -> Float[Tensor, "some d_model"]:
    if split.neurons is None:
        assert split.vectors is not None
        return split.vectors()[row, place]
    number = split.neurons.coefficients.flatten(1)[row, place]
    return number[:, None] * split.neurons.vectors(place % split.neurons.count)


def _words(view: ModelView, ids: Tensor) -> tuple:
    texts = {token: view.to_output(token) for token in ids.unique().tolist() if token >= 0}
    texts[-1] = ""
    return tuple(tuple(tuple(texts[t] for t in one) for one in row) for row in ids.tolist())
