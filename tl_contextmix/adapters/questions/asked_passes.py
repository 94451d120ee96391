"""A pass whose maps have the rows asked about: those that predict an answer, or the model's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from tl_contextmix.adapters.inputs.passes import Pass, run_pass
from tl_contextmix.adapters.inputs.predictions import Predictions
from tl_contextmix.adapters.inputs.tokens import Given, Input, read_batch
from tl_contextmix.adapters.questions.asked import Answer, Asked, split, within_chats
from tl_contextmix.adapters.questions.earlier import label_sets
from tl_contextmix.adapters.questions.positions import predicting_rows
from tl_contextmix.adapters.questions.question import Question, ask
from tl_contextmix.adapters.tokenizers import name_tokens
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.errors import bad, seen
from tl_contextmix.results import Tokens
from tl_contextmix.results.predicted_rows import PredictedRows, split_at


def run_asked(view: ModelView, input: Input, inputs: Mapping[str, Any], **options: Any) -> Pass:
    """Returns a pass over an input and the answer to it, whose maps have the rows asked about.

    Args:
        view: The model.
        input: The input.
        inputs: What `AnswerInputs` has.
        **options: Those of `run_pass`.

    Raises:
        InvalidInput: If there is a foil, on which no such map depends, or the stack asked for
            predicts nothing.
    """
    if all(inputs.get(name) is None for name in Asked.__annotations__):
        given = {name: value for name, value in inputs.items() if name not in Asked.__annotations__}
        return run_pass(view, Given(input, **given), **options)
    given, answer = within_chats(*split(input, inputs))
    if answer.foil is not None:
        raise bad(
            "this map is the same whatever the foil",
            f"foil={seen(answer.foil)}",
            "target=, pos= or generate=, which say which rows are wanted",
            "Ask decompx, alti(of='logit'), gradient_x_input or log_prob_contributions why it is "
            "this token rather than that one.",
        )
    view = name_tokens(view, given.labels)
    stack, batch = view.base_stack(options.get("stack")), read_batch(view, given)
    if answer.target is None and answer.generate is None:
        rows = predicting_rows(view, batch, stack, answer.pos)
        forward_pass = run_pass(view, given, batch=batch, **options)
        return replace(forward_pass, asked=_at_positions(forward_pass.target, rows, answer.pos))
    if stack != view.base_stack(None):
        raise bad(
            "this stack predicts no tokens",
            f"stack={stack!r} with {'target' if answer.generate is None else 'generate'}=",
            "stack='decoder' or 'cross'",
            "Leave stack out, or ask for rows of the encoder with pos=.",
        )
    question, forward_pass = ask_in_pass(view, given, answer, **options)
    assert question.target is not None
    return replace(forward_pass, asked=predictions(question, forward_pass.target, question.target))


def ask_in_pass(
    view: ModelView, given: Given, answer: Answer, **options: Any
) -> tuple[Question, Pass]:
    """Returns what is asked, and a pass over the input and the answer.

    Args:
        view: The model.
        given: The input.
        answer: What is asked.
        **options: Those of `run_pass`.
    """
    view = name_tokens(view, given.labels)
    view.readout.require()
    question = ask(view, read_batch(view, given), answer)
    return question, run_pass(view, given, batch=question.batch, **options)


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
