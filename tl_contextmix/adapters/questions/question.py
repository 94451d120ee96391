"""The predictions that are asked about, before the model has made them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tl_contextmix.adapters.chats import ROLES
from tl_contextmix.adapters.inputs.tokens import require_ids
from tl_contextmix.adapters.questions.asked import Answer
from tl_contextmix.adapters.questions.earlier import (
    earlier_answer,
    earlier_sets,
    require_same_text,
    sentence_rows,
)
from tl_contextmix.adapters.questions.positions import masks, predicting_rows
from tl_contextmix.adapters.questions.targets import (
    Steps,
    names_of_each,
    require_contrast,
    require_known,
    steps_of_each,
    warn_about_spaces,
)
from tl_contextmix.core.blocks import Batch, Side
from tl_contextmix.core.contrast import Contrast
from tl_contextmix.core.finite import require_predictions
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.validation import whole_number
from tl_contextmix.errors import InvalidInput, seen
from tl_contextmix.results import AttributionGraph, LogProbContributions


@dataclass(frozen=True)
class Question:
    """The predictions that are asked about, before the model has made them.

    Attributes:
        view: The model.
        batch: Its input, answers of several tokens included.
        stack: The stack that writes the answer.
        sentences: The sentence of each prediction.
        rows: The position of each prediction.
        target: Ids asked about in each prediction; None: the model's best.
        foil: Ids they are contrasted with, or None.
        named: What the target of each prediction was called, where that is one text.
        continued: Whether the batch has answers after its texts.
    """

    view: ModelView
    batch: Batch
    stack: str
    sentences: Int[Tensor, " row"]
    rows: Int[Tensor, " row"]
    target: tuple[tuple[int, ...], ...] | None
    foil: tuple[tuple[int, ...], ...] | None
    named: tuple[str | None, ...]
    continued: bool = False

    @property
    def plain(self) -> bool:
        """Whether each sentence is asked about once."""
        return self.sentences.equal(torch.arange(self.batch.main.ids.shape[0]))

    def part(self, index: slice) -> Question:
        """Returns some of the predictions."""
        return self.at([*range(len(self.rows))[index]])

    def rounds(self) -> Iterator[tuple[Question, Bool[Tensor, " batch"]]]:
        """Yields the first prediction of every sentence, then the second, and so on.

        With each comes which sentences have so many; the last one of the others is repeated.
        """
        count = self.batch.main.ids.shape[0]
        places = [(self.sentences == row).nonzero()[:, 0].tolist() for row in range(count)]
        for turn in range(max(map(len, places))):
            chosen = [some[min(turn, len(some) - 1)] for some in places]
            yield self.at(chosen), torch.tensor([turn < len(some) for some in places])

    def repeated(self, times: int) -> Question:
        """Returns the predictions of as many copies of the batch, one after the other."""
        count, predictions = len(self.batch.main.ids), len(self.rows)
        copy = torch.arange(times).repeat_interleave(predictions)
        return replace(
            self,
            batch=self.batch.each(lambda some: torch.cat([some] * times)),
            sentences=self.sentences.repeat(times) + count * copy,
            rows=self.rows.repeat(times),
        )

    def of_direction(self) -> Question:
        """Returns the same positions, asked about a direction; see `read_direction`."""
        each = range(len(self.rows))
        direction, nothing = tuple((0,) for _ in each), tuple((1,) for _ in each)
        return replace(self, target=direction, foil=nothing, named=(None,) * len(each))

    def at(self, places: list[int]) -> Question:
        """Returns the predictions at some places."""
        return replace(
            self,
            sentences=self.sentences[places],
            rows=self.rows[places],
            target=None if self.target is None else tuple(self.target[p] for p in places),
            foil=None if self.foil is None else tuple(self.foil[p] for p in places),
            named=tuple(self.named[p] for p in places),
        )

    def read(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, "row d_vocab"]:
        """Returns the logits of each prediction, in the dtype of the maths.

        Raises:
            InvalidInput: If one is NaN or +inf.
        """
        at = (self.sentences.to(logits.device), self.rows.to(logits.device))
        return self.require(logits[at]).to(self.view.device, self.view.dtype)

    def require(self, logits: Float[Tensor, "row d_vocab"]) -> Float[Tensor, "row d_vocab"]:
        """Returns the logits of each prediction; raises InvalidInput if one is NaN or +inf."""
        require_predictions(logits, padded=not bool(self.batch.main.mask.all()))
        return logits

    def contrast(self, logits: Float[Tensor, "row d_vocab"]) -> Contrast:
        """Returns what is asked of the logits of each prediction.

        Warns:
            ContextMixWarning: If a text without its leading space was given and the one with it is
                far more probable.
        """
        target = self.target or tuple((token,) for token in logits.argmax(dim=-1).tolist())
        warn_about_spaces(self.view, self.named, target, logits)

        def tensors(sets: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
            return tuple(torch.tensor(ids, device=self.view.device) for ids in sets)

        return Contrast(tensors(target), None if self.foil is None else tensors(self.foil))


def ask(view: ModelView, batch: Batch, answer: Answer, *about: object) -> Question:
    """Returns which predictions are asked about.

    With results whose components are asked about (what is no result is passed over): what was asked
    there is asked again unless something else is.

    Raises:
        InvalidInput: If the model has no such token or position, it is not clear which is meant, or
            a result is of another input.
    """
    stack = view.base_stack(None)
    found, batch = earlier_answer(batch, view, *about)
    if found is not None and answer.empty:
        return _again(view, batch, stack, found)
    count = batch.main.ids.shape[0]
    if found is not None and len(found.pos) != count:
        raise InvalidInput(
            "these components were found for other predictions",
            f"{len(found.pos)} predictions in {count} texts",
            "the same predictions",
            "Leave target, foil and pos out, or select one prediction: .select(batch=0).",
        )
    if answer.generate is not None:
        answer = _generated(view, batch, stack, answer)
    named, target = None, steps_of_each(view, answer.target, count, "target")
    earlier = (None, None) if found is None else earlier_sets(found)
    if earlier[0] is not None and target is None:
        target = [(ids,) for ids in earlier[0]]
    else:
        named = names_of_each(answer.target, count)
    foil = steps_of_each(view, answer.foil, count, "foil")
    if earlier[1] is not None and foil is None and answer.target is None:
        foil = [(ids,) for ids in earlier[1]]
    if foil is not None and target is None:
        raise InvalidInput(
            "a foil needs a target",
            f"foil={seen(answer.foil)} and no target",
            "both",
            "Pass target=, the token that the foil is contrasted with.",
        )
    if target is not None and foil is not None:
        require_contrast(target, foil)
    require_known(view, target, "target")
    require_known(view, foil, "foil")
    several = target is not None and any(len(steps) > 1 for steps in target)
    if target is not None and several:
        batch, rows = _rows_of_answers(view, batch, stack, answer, target)
    elif answer.pos is None and found is not None:
        rows = [[row] for row in found.pos.tolist()]
    else:
        rows = predicting_rows(view, batch, stack, answer.pos)

    def at_each(sets: list[Steps] | None) -> tuple[tuple[int, ...], ...] | None:
        """Returns the tokens of each prediction: one after the other, or one for all positions."""
        if sets is None:
            return None
        pairs = zip(sets, rows, strict=True)
        return tuple(
            steps[place if len(steps) > 1 else 0]
            for steps, some in pairs
            for place in range(len(some))
        )

    def name(sentence: int, place: int) -> str | None:
        """Returns the text of a target where its first token is predicted."""
        first = place == 0 or target is None or len(target[sentence]) == 1
        return named[sentence] if named is not None and first else None

    places = [(i, place) for i, some in enumerate(rows) for place in range(len(some))]
    return Question(
        view=view,
        batch=batch,
        stack=stack,
        sentences=torch.tensor([i for i, _ in places]),
        rows=torch.tensor([row for some in rows for row in some]),
        target=at_each(target),
        foil=at_each(foil),
        named=tuple(name(i, place) for i, place in places),
        continued=several and stack != "encoder",
    )


def _generated(view: ModelView, batch: Batch, stack: str, answer: Answer) -> Answer:
    """Returns the question after what the model itself says next."""
    count = whole_number(answer.generate)
    if count is None or count < 1:
        raise InvalidInput(
            "generate= is how many tokens the model may say",
            seen(answer.generate),
            "an integer from 1",
            "Leave it out to ask about one token.",
        )
    if answer.target is not None or answer.pos is not None or stack == "encoder":
        what = "target= or pos=" if stack == "decoder" else "a masked language model"
        raise InvalidInput(
            "what a model generates is a target of its own",
            f"generate={count} with {what}",
            "a causal model or an encoder-decoder, and neither target= nor pos=",
            "Leave one of them out.",
        )
    longest = int(batch.side(stack).mask.sum(dim=1).max()) + count
    if view.n_ctx is not None and longest > view.n_ctx:
        raise InvalidInput(
            "the text and what is to be generated are too long",
            f"{longest} tokens",
            f"at most {view.n_ctx}, the longest input of this model",
            "Ask for fewer tokens, or shorten the text.",
        )
    continuation = view.generate(batch, count)
    return replace(answer, target=continuation, generate=None)


def _rows_of_answers(
    view: ModelView, batch: Batch, stack: str, answer: Answer, target: list[Steps]
) -> tuple[Batch, list[list[int]]]:
    """Returns texts with their answers of several tokens, and where each token is predicted."""
    if answer.pos is not None:
        raise InvalidInput(
            "an answer of several tokens has its own positions",
            f"pos={seen(answer.pos)} and an answer of {max(map(len, target))} tokens",
            "no pos",
            "Leave pos out: the answer follows the text, or stands where its masks are.",
        )
    lengths = [len(steps) for steps in target]
    if stack == "encoder":
        rows = masks(view, batch.side(stack))
        for number, (some, length) in enumerate(zip(rows, lengths, strict=True)):
            if len(some) != length:
                raise InvalidInput(
                    "the answer does not fit the masks",
                    f"{length} tokens for {len(some)} masks in sentence {number}",
                    "one mask for each token of the answer",
                    "Put as many of the tokenizer's mask tokens there, or give a shorter answer.",
                )
        return batch, rows
    if batch.decoder is None and batch.further:
        raise InvalidInput(
            "an answer of several tokens cannot follow this text",
            f"{' and '.join(batch.further)} of the text alone",
            "a text and its mask",
            "Give text and answer together as the input, and ask with pos=.",
        )
    side, first = _continued(view, batch.side(stack), target)
    batch = replace(batch, **{"main" if batch.decoder is None else "decoder": side})
    pairs = zip(first, lengths, strict=True)
    return batch, [[start + step for step in range(length)] for start, length in pairs]


def _continued(view: ModelView, side: Side, answers: list[Steps]) -> tuple[Side, list[int]]:
    """Returns texts with their answers after them, and the position that predicts the first."""
    rows, masks, ends = [], [], []
    for ids, mask, steps in zip(side.ids, side.mask, answers, strict=True):
        real = mask.nonzero()[:, 0]
        text = slice(int(real[0]), int(real[-1]) + 1)
        answer = ids.new_tensor([step[0] for step in steps])
        rows.append(torch.cat([ids[text], answer]))
        masks.append(torch.cat([mask[text], mask.new_ones(len(steps))]))
        ends.append(text.stop - text.start - 1)
    where = "right" if bool(side.mask[:, 0].all()) else "left"
    together = pad_sequence(rows, batch_first=True, padding_value=view.pad_id(), padding_side=where)
    mask = pad_sequence(masks, batch_first=True, padding_value=False, padding_side=where)
    width = together.shape[1]
    moved = [width - len(row) if where == "left" else 0 for row in rows]
    together = require_ids(view, together, "input and its answer")
    roles = None
    if side.roles is not None:
        assistant = ROLES.index("assistant")
        listed = [
            torch.cat([own[real], own.new_full((len(steps),), assistant)])
            for own, real, steps in zip(side.roles, side.mask, answers, strict=True)
        ]
        roles = pad_sequence(listed, batch_first=True, padding_value=-1, padding_side=where)
    return Side(together, mask, roles), [end + by for end, by in zip(ends, moved, strict=True)]


def ask_about(view: ModelView, batch: Batch, graph: AttributionGraph) -> Question:
    """Returns the prediction that a graph is about.

    Raises:
        InvalidInput: If the graph is of another input.
    """
    require_same_text(view, batch, graph)
    return _again(view, batch, view.base_stack(None), graph)


def _again(
    view: ModelView, batch: Batch, stack: str, found: LogProbContributions | AttributionGraph
) -> Question:
    """Returns the predictions that a result is of."""
    target, foil = earlier_sets(found)
    for name, sets in (("target", target), ("foil", foil)):
        require_known(view, None if sets is None else [sets], name)
    single = isinstance(found, AttributionGraph)
    rows = torch.tensor([found.pos]) if single else found.pos.cpu()
    return Question(
        view=view,
        batch=batch,
        stack=stack,
        sentences=torch.zeros(1, dtype=torch.long) if single else sentence_rows(found),
        rows=rows,
        target=target,
        foil=foil,
        named=(None,) * len(rows),
    )
