r"""Maps of a prediction: what each source token brings to the target's logit, less the foil's.

With the scale of the final norm frozen a logit is linear in the residual stream, so that whatever
splits the stream by source tokens splits the logit,

.. math:: l_w - l_f = \sum_j C_j + b

with :math:`b` what no token brings. Of a set the logits' mean is meant, each token as likely as the
model finds it among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_contextmix.adapters.inputs import Input
from tl_contextmix.adapters.passes import Pass, ask_in_pass
from tl_contextmix.adapters.questions import AnswerInputs, Question, predictions, split_answer
from tl_contextmix.core.model_view import ModelView, StackName, select_blocks
from tl_contextmix.core.tiled_logits import Vocabulary, read_vocabulary
from tl_contextmix.core.validation import Layers
from tl_contextmix.engine.log_prob_scores import require_read
from tl_contextmix.errors import InvalidInput, UnsupportedModel
from tl_contextmix.results import ContextMap


@dataclass(frozen=True)
class LogitReader:
    """How a prediction of each sentence is read from the stream after the last block.

    Attributes:
        rows: Its positions.
        vocabulary: The readout there, the norm's scale frozen.
        total: The target's logit, less the foil's, as the model itself has it.
        best: The first token asked about.
    """

    rows: Int[Tensor, " batch"]
    vocabulary: Vocabulary
    total: Float[Tensor, " batch"]
    best: Int[Tensor, " batch"]


Split = Callable[[Pass, Sequence[LogitReader]], Float[Tensor, "batch prediction layer source"]]


def logit_map(
    method: str,
    view: ModelView,
    input: Input,
    inputs: AnswerInputs,
    split: Split,
    *,
    max_bytes: int,
    options: Mapping[str, Any],
    layer: Layers | None = None,
    stack: StackName | None = None,
    **needed: Any,
) -> ContextMap:
    """Returns the map of the predictions asked about, a row for each.

    Args:
        method: Name of the method.
        view: The model.
        input: The input.
        inputs: What `AnswerInputs` has.
        split: Returns what each source token brings to each prediction of a part of the pass, the
            n-th prediction of every sentence side by side; by layer, where the method has layers.
        max_bytes: Workspace.
        options: What the method was asked for.
        layer: Layers to return, each alone; None for all of them together, and the rest as `bias`.
        stack: The stack that was asked for.
        **needed: Further options of `run_pass`.

    Raises:
        InvalidInput: If the stack predicts nothing.
        UnsupportedModel: If the readout is not linear, or hooks of the user's own change it.
    """
    if view.base_stack(stack) != view.base_stack(None):
        raise InvalidInput(
            "a prediction is read after the last layer of the stack that predicts",
            f"stack={stack!r}",
            "the decoder",
            "Leave stack out, or ask with another of=.",
        )
    if why := _not_linear(view):
        raise UnsupportedModel(
            "no logit is a sum over input tokens",
            f"{view.name}: {why}",
            "a final norm and an unembedding",
            "Ask gradient_x_input, or with another of= and pos=.",
        )
    given, answer = split_answer(input, inputs)
    question, forward_pass = ask_in_pass(view, given, answer, stack=stack, logits=True, **needed)
    turns, chosen = [*question.rounds()], select_blocks(forward_pass.blocks, layer)

    def read(part: Pass) -> dict[str, tuple[str, Tensor]]:
        each = [_reader(part, part.own_question(turn), max_bytes) for turn, _ in turns]
        scores = split(part, each).transpose(1, 2)
        if layer is None:
            scores = scores.sum(dim=1, keepdim=True)
        else:
            scores = scores[:, [block.layer for block in chosen]]
        return {
            "scores": ("batch layer prediction source:block_out", scores),
            "total": ("batch prediction", torch.stack([one.total for one in each], dim=1)),
            "best": ("batch prediction", torch.stack([one.best for one in each], dim=1)),
        }

    with torch.no_grad():
        found = forward_pass.together(read)
    there = torch.stack([there for _, there in turns], dim=1)
    predicted = question.target or [[token] for token in found["best"][there].tolist()]
    rows = predictions(question, forward_pass.target, predicted)
    there = there.to(found["scores"].device)
    scores = found["scores"] * there[:, None, :, None]
    bias = (found["total"] * there)[:, None] - scores.sum(dim=-1)
    facts: dict[str, Any] = {"layers": (0,), "point": "prediction", "bias": bias[:, :, None]}
    if layer is not None:
        facts = {"layers": tuple(block.layer for block in chosen), "point": "attn_out"}
    return replace(forward_pass, asked=rows).map(
        method,
        scores[:, :, None],
        "block_out",
        "logit" if question.foil is None else "difference of logits",
        options={**options, "of": "logit"},
        target=rows.target,
        from_input=True,
        signed=True,
        **facts,
    )


def _not_linear(view: ModelView) -> str:
    if view.readout.head is not None:
        return "its head is not linear"
    return "it caps its logits" if view.readout.soft_cap is not None else ""


def _reader(part: Pass, question: Question, max_bytes: int) -> LogitReader:
    stream = part.trace[part.blocks[-1].resid_out]
    rows = question.rows.to(stream.device)
    final = stream[torch.arange(len(rows), device=rows.device), rows]
    logits, readout = part.trace.logits, part.view.readout
    if logits is None:
        own = readout(final)
    else:
        own = question.read(logits)
        require_read(part.view, final, own)
    contrast = question.contrast(own)
    return LogitReader(
        rows=question.rows,
        vocabulary=read_vocabulary(readout, "frozen+beta", final, contrast, max_bytes),
        total=contrast.mean_logits(own),
        best=torch.stack([ids[0] for ids in contrast.target]),
    )


__all__ = ["LogitReader", "logit_map"]
