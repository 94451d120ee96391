"""Context reliance: PECoRe (Sarti et al. 2024, ICLR) and MIRAGE (Qi, Sarti et al. 2024, EMNLP)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Given, TokenInputs, label, name_tokens, read_batch
from tl_contextmix.adapters.passes import run_pass
from tl_contextmix.adapters.questions import Answer, Question, ask, label_sets
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.validation import NotNegativeNumber, Positive
from tl_contextmix.engine.registry import method
from tl_contextmix.errors import InvalidInput, seen
from tl_contextmix.methods.attention_knockout import attention_knockout
from tl_contextmix.methods.gradients import gradient_x_input
from tl_contextmix.methods.value_zeroing import value_zeroing
from tl_contextmix.results import ContextReliance
from tl_contextmix.results.token_groups import TokenGroups, find_groups

By = Literal["gradient_x_input", "attention_knockout", "value_zeroing"]


@method(cites=("sarti2024quantifying", "qi2024mirage"), on_text=False)
def context_reliance(
    model: object,
    context: str | Sequence[str],
    prompt: str,
    *,
    target: str | int | Sequence[int] | None = None,
    generate: Positive | None = None,
    by: By = "gradient_x_input",
    metric: Literal["kl", "pcxmi"] = "kl",
    threshold: NotNegativeNumber = 1.0,
    joiner: str = " ",
    **inputs: Unpack[TokenInputs],
) -> ContextReliance:
    r"""Returns which tokens of an answer depend on a context, and on which part of it.

    The answer is given to the model twice, after the context and the prompt and after the prompt
    alone. For each of its tokens (2024, context-sensitive token identification)

    .. math::

        \mathrm{KL}_i = \sum_w p(w \mid c, x, y_{<i}) \log
        \frac{p(w \mid c, x, y_{<i})}{p(w \mid x, y_{<i})}, \qquad
        \mathrm{PCXMI}_i = \log \frac{p(y_i \mid c, x, y_{<i})}{p(y_i \mid x, y_{<i})}

    and for each of its tokens and each passage of the context how much the passage speaks for the
    token rather than the one that the model prefers without the context (contextual cues
    imputation; where that is the same token, for the token alone).

    Args:
        model: Any TransformerLens model with a vocabulary readout.
        context: The context: passages, each scored as a whole, or one text, scored token by token.
        prompt: What follows it; of a masked language model with its mask.
        target: The answer as text or token ids; None: what the model says with the context.
        generate: How many tokens it says at most; None: one.
        by: How passages are scored. ``"gradient_x_input"``: the length of each token's gradient
            times input of the contrast, summed over a passage. ``"attention_knockout"``: how much
            the contrast falls when no position attends to the passage, in any layer.
            ``"value_zeroing"``: Value Zeroing of the passage as a whole, the mean over layers; of
            the state, not of the contrast.
        metric: What is held against the threshold.
        threshold: A token is flagged whose metric is so many standard deviations above the mean
            over the answer, or more, as in PECoRe. No token and no score is dropped.
        joiner: What stands between passages, and between them and the prompt.
        **inputs: ``prepend_bos``, ``decoder_input`` and ``labels``, see `TokenInputs`. The context
            of an encoder-decoder is read by its encoder.

    Returns:
        `ContextReliance` [batch target source], one row.

    Raises:
        InvalidInput: If an argument does not fit the model, or the tokens of the context run into
            those of the prompt.
        UnsupportedModel: If the model has no vocabulary readout.

    Cost: two forward passes; by gradients one more and a backward pass for each token of the
    answer; by knockout one for each token and passage.
    """
    view = name_tokens(as_view(model), inputs.get("labels"))
    view.readout.require()
    parts = [context] if isinstance(context, str) else [*context]
    _require_texts(parts, prompt)
    given = Given(joiner.join([*parts, prompt]), **inputs)
    asked: Any = target
    if isinstance(target, Sequence) and not isinstance(target, str):
        asked = [[*target]]  # one answer, not one for each text
    question = ask(view, read_batch(view, given), Answer(target=asked, generate=generate))
    with torch.no_grad():
        logits = _logits(view, given, question)
        ids = [int(token[0]) for token in question.contrast(logits).target]
        alone = Given(prompt, **inputs)
        repeated = ask(view, read_batch(view, alone), Answer(target=[ids]))
        without = _logits(view, alone, repeated)
    with_log, without_log = logits.log_softmax(dim=-1), without.log_softmax(dim=-1)
    place = torch.tensor(ids, device=logits.device)[:, None]
    kl = (with_log.exp() * (with_log - without_log)).nansum(dim=-1)
    log_probs = [some.gather(1, place)[:, 0] for some in (with_log, without_log)]
    flagged = kl if metric == "kl" else log_probs[0] - log_probs[1]
    stack = question.stack if question.batch.decoder is None else "encoder"
    tokens = label(view, stack, question.batch.main)
    stretches = _stretches(view, parts, prompt, joiner, inputs.get("prepend_bos"))
    if isinstance(context, str):
        stretches = [(at, at + 1) for at in range(*stretches[0])]
    groups = find_groups("context", tokens, stretches)
    alternatives = without_log.argmax(dim=-1).tolist()
    contrasts = [
        (row, one, None if other == one else other)
        for row, one, other in zip(question.rows.tolist(), ids, alternatives, strict=True)
    ]
    scores = _cues(model, question, groups, by, contrasts, labels=inputs.get("labels"))
    return ContextReliance(
        scores=scores[None],
        kl=kl[None],
        log_prob=log_probs[0][None],
        log_prob_without=log_probs[1][None],
        flagged=(flagged >= flagged.mean() + threshold * flagged.std(correction=0))[None],
        target=label_sets(view, [torch.tensor(ids)]),
        without=(tuple(map(view.to_output, alternatives)),),
        source=groups.labels,
        by=by,
        metric=metric,
        provenance=run_pass(view, given, batch=question.batch).provenance(
            "context_reliance",
            {
                "context": parts,
                "prompt": prompt,
                "generate": generate,
                "by": by,
                "metric": metric,
                "threshold": threshold,
            },
        ),
    )


def _require_texts(parts: Sequence[object], prompt: object) -> None:
    for name, one in (*(("context", part) for part in parts), ("prompt", prompt)):
        if not isinstance(one, str) or not one.strip():
            raise InvalidInput(
                f"the {name} cannot be read",
                seen(one),
                "text",
                "Give the context as one text or a list of passages, and the prompt as a text.",
            )
    if not parts:
        raise InvalidInput(
            "there is no context", seen(parts), "a text or passages", "Give at least one."
        )


def _logits(view: ModelView, given: Given, question: Question) -> Tensor:
    """Returns the logits of each prediction."""
    logits = run_pass(view, given, batch=question.batch).rerun().logits
    assert logits is not None
    return question.read(logits)


def _stretches(
    view: ModelView, parts: Sequence[str], prompt: str, joiner: str, bos: bool | None
) -> list[tuple[int, int]]:
    """Returns the tokens ``(start, stop)`` of each passage of the context."""
    whole = view.encode(joiner.join([*parts, prompt]), bos)
    special = view.special_tokens()
    text = [place for place, token in enumerate(whole) if token not in special]
    after = len(whole) - 1 - text[-1]  # special tokens after the text
    ends = [text[0]]
    for count in range(1, len(parts) + 1):
        ids = view.encode(joiner.join(parts[:count]), bos)
        same = [one == other for one, other in zip(ids, whole, strict=False)]
        end = same.index(False) if False in same else len(same)
        if end < len(ids) - after or end <= ends[-1]:
            raise InvalidInput(
                "the tokens of a passage run into what follows",
                f"{parts[count - 1]!r}, joined by {joiner!r}",
                "passages that end where a token ends",
                "Choose another joiner, such as a space or a line break.",
            )
        ends.append(end)
    return [*pairwise(ends)]


def _cues(
    model: object,
    question: Question,
    groups: TokenGroups,
    by: By,
    contrasts: Sequence[tuple[int, int, int | None]],
    **inputs: Any,
) -> Tensor:
    """Returns how much each token of the answer depends on each group [target source].

    ``contrasts`` are position, token and alternative of each prediction.
    """
    ids, decoder = question.batch.main.ids, question.batch.decoder
    stack: Any = None if decoder is None else "cross"
    inputs |= {} if decoder is None else {"decoder_input": decoder.ids}
    if by == "value_zeroing":
        rows = [row for row, _, _ in contrasts]
        map = value_zeroing(model, ids, spans=groups.spans(0), pos=rows, stack=stack, **inputs)
        return map.scores[0, :, 0].mean(dim=0)
    places = [members.nonzero()[:, 0].tolist() for members in groups.members[0]]
    found = []
    for pos, target, foil in contrasts:
        asked = {"pos": pos, "target": target, "foil": foil, **inputs}
        if by == "attention_knockout":
            knockout = attention_knockout(
                model, ids, sources=places, to="all", window=None, stack=stack, **asked
            )
            found.append(-knockout.changes[0, 0, 0])
            continue
        map = gradient_x_input(model, ids, of="log_prob", **asked)
        sources = map.source.side(groups.labels.sides[0][0])
        each = map.scores[0, 0, 0, 0, sources]
        found.append((groups.members[0].to(each) * each).sum(dim=-1))
    return torch.stack(found)
