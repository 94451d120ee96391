"""Reading components through the vocabulary: which tokens they raise and lower."""

from __future__ import annotations

import torch
from torch import Tensor

from tl_contextmix.attribution import Cut, ask, cuts
from tl_contextmix.decompose import DEFAULT_MAX_BYTES
from tl_contextmix.errors import InvalidInput, four_parts
from tl_contextmix.hosts import as_view
from tl_contextmix.inputs import Cache, Given, PaddingSide, Text, make_batch
from tl_contextmix.model_view import ModelView
from tl_contextmix.results import ComponentReadouts, LogProbContributions
from tl_contextmix.results.axes import require_count
from tl_contextmix.results.components import join
from tl_contextmix.selection import answer_of


def component_readouts(
    model: object,
    input: Text | Tensor,
    *,
    components: LogProbContributions,
    k: int = 10,
    attention_mask: Tensor | None = None,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide = "right",
    decoder_input: Text | Tensor | None = None,
    cache: Cache | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
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
        attention_mask: 1 at real tokens, 0 at padding.
        prepend_bos: Whether texts get a beginning-of-sequence token; None: the model's default.
        padding_side: Where texts of unequal length are padded.
        decoder_input: Decoder side of an encoder-decoder; None: its start token.
        cache: A TransformerLens ActivationCache of the same input, instead of a forward pass.
        max_bytes: Workspace.

    Returns:
        `ComponentReadouts`.

    Raises:
        InvalidInput: If an argument does not fit the model, or the components another input.
        UnsupportedModel: If the model has no vocabulary readout.

    Cost: a forward pass and ``2 d d_vocab`` operations per component.
    """
    k = require_count(k)
    view = as_view(model)
    given = Given(input, attention_mask, prepend_bos, padding_side, decoder_input, cache)
    answer_of(make_batch(view, given), view, components)
    wanted, pos = components.components, components.pos
    with torch.no_grad():
        question = ask(
            view,
            given,
            target=None,
            target_ids=components.target.ids[:, 0].tolist(),
            pos=pos,
            norm="frozen",
            max_bytes=max_bytes,
        )
        k = min(k, question.vocabulary.weight.shape[1])
        listed = list(cuts(question.stream, components.by))
        labels = join([p for cut in listed for p in _labels(cut)])
        places = labels.find(wanted)
        found = [
            question.vocabulary.extremes(_vectors(listed, places[row], row), row, k)
            for row in range(len(places))
        ]
    top, top_ids, low, low_ids = (torch.stack(column) for column in zip(*found, strict=True))
    return ComponentReadouts(
        top_logits=top,
        top_ids=top_ids,
        top_words=_words(view, top_ids),
        bottom_logits=low,
        bottom_ids=low_ids,
        bottom_words=_words(view, low_ids),
        components=wanted,
        scores=components.scores,
        unit=components.unit,
        tokens=question.done.target,
        encoder=question.encoder,
        provenance=question.done.provenance("component_readouts", {"k": k, "by": components.by}),
    )


def _labels(cut: Cut) -> list:
    return [cut.labels] if cut.bias is None else [cut.labels, cut.bias[0]]


def _vectors(listed: list[Cut], places: Tensor, row: int) -> Tensor:
    """Returns the vectors of components of one sentence, by their place in the joined table."""
    first, found = 0, {}
    for cut in listed:
        count = cut.labels.kind.shape[1]
        inside = (places >= first) & (places < first + count)
        for index in inside.nonzero()[:, 0].tolist():
            found[index] = _vector(cut, int(places[index]) - first, row)
        first += count
        if cut.bias is not None:
            for index in (places == first).nonzero()[:, 0].tolist():
                found[index] = cut.bias[1][row, 0]
            first += 1
    if not found:
        raise InvalidInput(
            four_parts(
                "there is nothing to read",
                "a result without components",
                "at least one component",
                "Take them from a result's .top(k).",
            )
        )
    return torch.stack([found[index] for index in range(len(found))])


def _vector(cut: Cut, place: int, row: int) -> Tensor:
    if cut.neurons is None:
        assert cut.vectors is not None
        return cut.vectors()[row, place]
    source, neuron = divmod(place, cut.neurons.rows.shape[0])
    number = cut.neurons.coefficients[row, source, neuron]
    return number * cut.neurons.vectors(slice(neuron, neuron + 1))[0]


def _words(view: ModelView, ids: Tensor) -> tuple:
    texts = {token: view.to_string(token) for token in ids.unique().tolist()}
    return tuple(tuple(tuple(texts[t] for t in one) for one in row) for row in ids.tolist())
