"""The rows of a map that are asked about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from tl_contextmix.adapters.inputs.tokens import Given, read_batch
from tl_contextmix.adapters.questions.asked import Answer
from tl_contextmix.adapters.questions.earlier import label_sets
from tl_contextmix.adapters.questions.positions import predicting_rows
from tl_contextmix.adapters.questions.question import Question, ask
from tl_contextmix.core.blocks import Batch
from tl_contextmix.core.model_view import ModelView, StackName
from tl_contextmix.errors import InvalidInput, seen
from tl_contextmix.results import ContextMap, Tokens
from tl_contextmix.results.predicted_rows import PredictedRows, split_at


@dataclass(frozen=True)
class Predictions:
    """The rows of a map that are asked about, labelled.

    Attributes:
        target: Labels of the rows: what each predicts, or, where a position alone was asked for,
            the token there. Their positions are those of the rows.
        written: Tokens of the stack that writes the answer, prompt and output apart; None: as they
            stand.
        options: What was asked, for the provenance.
    """

    target: Tokens
    written: Tokens | None
    options: Mapping[str, Any]

    @property
    def rows(self) -> list[int]:
        """Positions that are asked about in any sentence."""
        return self.target.positions()[self.target.mask].unique().tolist()

    def rows_of(self, map: ContextMap, *, whole: bool = True) -> ContextMap:
        """Returns the rows of a map.

        Where its columns are the ``whole`` of the tokens, prompt and output are kept apart.
        """
        source, encoder = map.source, map.source.side("encoder")
        if whole and self.written is not None and len(encoder) < source.shape[1]:
            source = self.written
            if encoder:
                source = source.cat(map.source.select([*range(len(source.ids))], encoder))
                source = replace(source, numbers=None)
        options = {**map.provenance.options, **self.options}
        found = map.at(self.target, source)
        return replace(found, provenance=replace(map.provenance, options=options))


def read_rows(
    view: ModelView, given: Given, answer: Answer, stack: StackName | None
) -> tuple[Batch, Callable[[Tokens], Predictions]]:
    """Returns an input with the answer to it, and what labels the rows of maps of it.

    Args:
        view: The model.
        given: The input.
        answer: What is asked.
        stack: The stack whose maps are asked for.

    Returns:
        The tokens, and a function that takes the labels of the stack.

    Raises:
        InvalidInput: If there is a foil, on which no such map depends, or the stack asked for
            predicts nothing.
    """
    if answer.foil is not None:
        raise InvalidInput(
            "this map is the same whatever the foil",
            f"foil={seen(answer.foil)}",
            "target=, pos= or generate=, which say which rows are wanted",
            "Ask decompx, alti(of='logit'), gradient_x_input or log_prob_contributions why it is "
            "this token rather than that one.",
        )
    base, batch = view.base_stack(stack), read_batch(view, given)
    if answer.target is None and answer.generate is None:
        rows = predicting_rows(view, batch, base, answer.pos)
        return batch, partial(_at_positions, rows=rows, pos=answer.pos)
    if base != view.base_stack(None):
        raise InvalidInput(
            "this stack predicts no tokens",
            f"stack={base!r} with {'target' if answer.generate is None else 'generate'}=",
            "stack='decoder' or 'cross'",
            "Leave stack out, or ask for rows of the encoder with pos=.",
        )
    view.readout.require()
    question = ask(view, batch, answer)
    assert question.target is not None
    return question.batch, partial(predictions, question, predicted=question.target)


def predictions(
    question: Question, tokens: Tokens, predicted: Sequence[Sequence[int]]
) -> Predictions:
    """Returns the rows of what is asked, labelled with what each predicts.

    Args:
        question: What is asked.
        tokens: Labels of the stack that writes the answer.
        predicted: Ids of the alternatives of each prediction.
    """
    rows = PredictedRows.of(question.sentences)
    labels = label_sets(question.view, [torch.tensor(ids) for ids in predicted])
    target, listed = rows.label(tokens, question.rows, labels), rows.order.tolist()
    options: dict[str, Any] = {"pos": question.rows[rows.order].tolist()}
    for name, sets in (("target", predicted), ("foil", question.foil)):
        if sets is not None:
            each = [one[0] if len(one) == 1 else [*one] for one in sets]
            options[name] = [[each[place] for place in some] for some in listed]
    if rows.order.shape[1] == 1:  # as one number for each sentence
        options = {name: [row[0] for row in value] for name, value in options.items()}
    if not question.continued:
        return Predictions(target, None, options)
    prompt = "prompt" if question.batch.decoder is None else "decoder"
    first = (question.rows[rows.order[:, 0]] + 1).tolist()
    return Predictions(target, split_at(tokens, first, (prompt, "output")), options)


def _at_positions(tokens: Tokens, rows: list[list[int]], pos: Any) -> Predictions:
    """Returns the rows of some positions, labelled with the tokens there."""
    options = {"pos": pos if isinstance(pos, (int, str)) or pos is None else [*pos]}
    if all(some == rows[0] for some in rows):
        return Predictions(tokens.select([*range(len(rows))], rows[0]), None, options)
    sentences = [row for row, some in enumerate(rows) for _ in some]
    found = PredictedRows.of(torch.tensor(sentences))
    flat = torch.tensor([row for some in rows for row in some])
    target = tokens.gather(flat[found.order], found.mask, tokens.sides[0][0])
    return Predictions(target, None, options)
