"""How a log-probability moves: along the residual stream, and as more and more is ablated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Input
from tl_contextmix.adapters.questions import AnswerInputs, TokenAnswerInputs, split_answer
from tl_contextmix.core.tiled_logits import NormRule
from tl_contextmix.core.validation import LATER, NotNegative, Positive, checked
from tl_contextmix.engine.log_prob_scores import run_question
from tl_contextmix.engine.parts import DEFAULT_MAX_BYTES
from tl_contextmix.errors import InvalidInput, seen
from tl_contextmix.methods.log_prob.knockout import knockout
from tl_contextmix.results import LogProbContributions

Found = Annotated[LogProbContributions, LATER]


@checked
def log_prob_path(
    model: object,
    input: Input,
    *,
    steps: Positive = 20,
    norm: NormRule = "frozen+beta",
    max_bytes: Positive = DEFAULT_MAX_BYTES,
    **inputs: Unpack[AnswerInputs],
) -> Any:  # a pandas.DataFrame
    r"""Returns probability and log-probability on the way from the first state to the last.

    .. math:: \log p(w \mid h^0 + a (h^L - h^0)), \qquad a = 0, 1/n, \dots, 1

    (Yu & Ananiadou 2024, figure 3). The probability stays near 0 for most of the way and rises
    at its end, which would give all of it to whatever comes last; the log-probability rises from
    the start.

    Args:
        model: Any TransformerLens model with a vocabulary readout.
        input: A text, several, or token ids [batch, pos].
        steps: How many steps, :math:`n`.
        norm: Rule for the final norm, see `tl_contextmix.log_prob_contributions`.
        max_bytes: Workspace, likewise.
        **inputs: ``target``, ``foil`` and ``pos``, see `Asked`; mask, padding and the like, see
            `Inputs`.

    Returns:
        A table with one row per prediction and step: ``batch``, ``share`` (:math:`a`),
        ``log_prob``, ``probability``; with a foil, ``log_prob`` is that of target over foil and
        ``probability`` its exponential.

    Raises:
        InvalidInput: If an argument does not fit the model.
        UnsupportedModel: If the model has no vocabulary readout.

    Cost: a forward pass and ``2 d d_vocab`` operations per step.

    Example:
        >>> import tl_contextmix as cm
        >>> from tl_contextmix.evaluation import log_prob_path
        >>> model = cm.load_demo("causal-lm")
        >>> found = log_prob_path(model, "the keys to the cabinet", target=" are", steps=4)
        >>> found.share.tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    import pandas

    given, answer = split_answer(input, inputs)
    with torch.no_grad():
        prediction = run_question(as_view(model), given, answer).prediction(norm, max_bytes)
        states = prediction.stream.states
        first, last = states[:, 1:2], states[:, -1:]
        share = torch.linspace(0, 1, steps + 1).to(states)
        path = first + share[None, :, None] * (last - first)
        found = prediction.vocabulary.target_log_probs(path).double().cpu()
    return pandas.DataFrame(
        {
            "batch": torch.arange(len(found)).repeat_interleave(steps + 1).numpy(),
            "share": share.double().cpu().repeat(len(found)).numpy(),
            "log_prob": found.flatten().numpy(),
            "probability": found.exp().flatten().numpy(),
        }
    )


@checked
def knockout_curve(
    model: object,
    input: Input,
    components: Found,
    *,
    counts: Sequence[int] = (1, 3, 10, 30),
    everywhere: bool = False,
    controls: NotNegative = 10,
    seed: NotNegative = 0,
    **inputs: Unpack[TokenAnswerInputs],
) -> Any:  # a pandas.DataFrame
    """Returns what is left of an answer as more and more of the best components are ablated.

    Args:
        model: Any TransformerLens model with a vocabulary readout.
        input: What the components were found on.
        components: Heads or neurons, those with the largest scores first: a result of
            `tl_contextmix.log_prob_contributions`.
        counts: How many are ablated.
        everywhere: See `tl_contextmix.knockout`.
        controls: As many random ones of the same kinds, drawn so often.
        seed: Of the draws.
        **inputs: ``target``, ``foil`` and ``pos``, see `Asked`; mask, padding and the like, see
            `TokenInputs`.

    Returns:
        The rows of `Knockout.summary` with ``count``: means over prompts of log-probability,
        probability and reciprocal rank (the MRR) before, after and with random components, with
        95 % bootstrap intervals.

    Raises:
        InvalidInput: If there are fewer components than are to be ablated.

    Cost: that of `tl_contextmix.knockout` for each count.

    Example:
        >>> import tl_contextmix as cm
        >>> from tl_contextmix.evaluation import knockout_curve
        >>> model, text = cm.load_demo("causal-lm"), "the capital of france is"
        >>> asked = {"target": " paris"}
        >>> best = cm.log_prob_contributions(model, text, by="ff_neuron", k=30, **asked)
        >>> found = knockout_curve(model, text, best, counts=[1, 30], **asked)
        >>> rows = found[(found.quantity == "probability") & (found.when == "after")]
        >>> rows["mean"].round(2).tolist()
        [0.98, 0.0]
    """
    import pandas

    if not isinstance(components, LogProbContributions):
        raise InvalidInput(
            "these components have no order",
            seen(components),
            "a result of log_prob_contributions",
            "Ask it by='head' or by='ff_neuron'; knockout takes components of your own.",
        )
    there = int((~components.components.is_empty()).sum(dim=1).min())
    if not counts or not 1 <= min(counts) <= max(counts) <= there:
        raise InvalidInput(
            "so many components cannot be ablated",
            seen([*counts]),
            f"counts from 1 to {there}",
            "Ask log_prob_contributions for a larger k.",
        )
    kind = "heads" if components.by == "head" else "neurons"
    some: Any = {"everywhere": everywhere, "controls": controls, "seed": seed, **inputs}
    frames = []
    for count in counts:
        some |= {kind: components.top(count)}
        found = knockout(model, input, **some)
        frames.append(found.summary().assign(count=count))
    return pandas.concat(frames, ignore_index=True)
