"""What is asked of a model: which token, rather than which other, at which position."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tl_contextmix.adapters.inputs.model_arguments import require_same_arguments
from tl_contextmix.adapters.inputs.passes import Pass
from tl_contextmix.adapters.inputs.tokens import Given, Input, Inputs, TokenInputs, require_ids
from tl_contextmix.core.blocks import Batch, Side
from tl_contextmix.core.contrast import Contrast
from tl_contextmix.core.finite import require_predictions
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.validation import is_text, whole_number
from tl_contextmix.errors import InvalidInput, bad, four_parts, seen, warn
from tl_contextmix.results import LogProbContributions, QueryContributions, Tokens

Token = str | int
Target = (
    Token
    | AbstractSet[Token]
    | Sequence[Token | AbstractSet[Token] | Sequence[Token]]
    | Int[Tensor, "..."]
)
Pos = int | Sequence[int] | Literal["all"]
# Below this ratio of probabilities, whether a word was meant with its space is a matter of taste.
_MUCH = 10.0
_TARGETS = "a text, a token id, or a set of them as alternatives; or a list with one for each text"
# The alternatives of each token of an answer.
Steps = tuple[tuple[int, ...], ...]


class Asked(TypedDict, total=False):
    """What a method that explains a prediction is asked."""

    target: Target | None
    """The predicted token as text (its leading space included) or id. A text of several tokens, or
    a list of ids, is an answer that the model is given token by token: each of its tokens is asked
    about. A set holds alternatives, of which any will do. A list has one for each text. None: the
    model's own best."""

    foil: Target | None
    """The token, or the set, that the target is contrasted with: the score is then
    ``log p(target) - log p(foil)``, for two tokens the difference of their logits."""

    pos: Pos | None
    """Position that predicts, several, or ``"all"``; negative ones count from the last real token.
    None: that token, or the mask of a masked language model."""

    generate: int | None
    """The answer is what the model itself says next, at most so many tokens (without sampling; by
    the generation settings of a bridge's Hugging Face model)."""


class AnswerInputs(Inputs, Asked, total=False):
    """What methods take that look at a forward pass and explain a prediction."""


class TokenAnswerInputs(TokenInputs, Asked, total=False):
    """What methods take that run the model themselves and explain a prediction."""


@dataclass(frozen=True)
class Answer:
    """What is asked; see `Asked`."""

    target: object = None
    foil: object = None
    pos: object = None
    generate: object = None

    @property
    def empty(self) -> bool:
        """Whether nothing is asked but the default."""
        return all(asked is None for asked in vars(self).values())


def apart(input: Input, inputs: Mapping[str, Any]) -> tuple[Given, Answer]:
    """Returns what is given and what is asked, out of the options of one call."""
    names = [field.name for field in fields(Answer)]
    asked = {name: inputs[name] for name in names if name in inputs}
    if "pos" in asked:  # kept with the result: a number of Python, or a list of them
        asked["pos"] = _plain(_items(asked["pos"]) or asked["pos"])
    return Given(input, **{n: v for n, v in inputs.items() if n not in asked}), Answer(**asked)


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
    """

    view: ModelView
    batch: Batch
    stack: str
    sentences: Int[Tensor, " row"]
    rows: Int[Tensor, " row"]
    target: tuple[tuple[int, ...], ...] | None
    foil: tuple[tuple[int, ...], ...] | None
    named: tuple[str | None, ...]

    @property
    def plain(self) -> bool:
        """Whether each sentence is asked about once."""
        return self.sentences.equal(torch.arange(self.batch.main.ids.shape[0]))

    def part(self, index: slice) -> Question:
        """Returns some of the predictions."""
        return self._at([*range(len(self.rows))[index]])

    def rounds(self) -> Iterator[tuple[Question, Bool[Tensor, " batch"]]]:
        """Yields the first prediction of every sentence, then the second, and so on.

        With each comes which sentences have so many; the last one of the others is repeated.
        """
        count = self.batch.main.ids.shape[0]
        places = [(self.sentences == row).nonzero()[:, 0].tolist() for row in range(count)]
        for turn in range(max(map(len, places))):
            chosen = [some[min(turn, len(some) - 1)] for some in places]
            yield self._at(chosen), torch.tensor([turn < len(some) for some in places])

    def within(self, part: Pass) -> Question:
        """Returns the same of the sentences of a part of a pass, each asked about once."""
        if part.crop is None:
            return self
        own = self._at([*part.crop.rows])
        return replace(
            own,
            batch=part.batch,
            sentences=torch.arange(len(own.rows)),
            rows=part.own_positions(self.rows),
        )

    def _at(self, places: list[int]) -> Question:
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
        found = logits[at]
        require_predictions(found, padded=not bool(self.batch.main.mask.all()))
        return found.to(self.view.device, self.view.dtype)

    def contrast(self, logits: Float[Tensor, "row d_vocab"]) -> Contrast:
        """Returns what is asked of the logits of each prediction.

        Warns:
            ContextMixWarning: If a text without its leading space was given and the one with it is
                far more probable.
        """
        target = self.target or tuple((token,) for token in logits.argmax(dim=-1).tolist())
        for name, sets in (("target", target), ("foil", self.foil or ())):
            highest = max((max(ids) for ids in sets), default=0)
            if highest >= logits.shape[1]:
                raise _no_target(highest, name, logits.shape[1])
        _warn_about_spaces(self.view, self.named, target, logits)

        def tensors(sets: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
            return tuple(torch.tensor(ids, device=self.view.device) for ids in sets)

        return Contrast(tensors(target), None if self.foil is None else tensors(self.foil))


def ask(view: ModelView, batch: Batch, answer: Answer, *about: object) -> Question:
    """Returns which predictions are asked about.

    Args:
        view: The model.
        batch: Its input.
        answer: What is asked.
        *about: Results whose components are asked about; what is no result is passed over. Where
            they are contributions, what was asked there is asked again unless something else is.

    Raises:
        InvalidInput: If the model has no such token or position, it is not clear which is meant, or
            a result is of another input.
    """
    stack = view.base_stack(None)
    found, batch = _answer_of(batch, view, *about)
    if found is not None and answer.empty:
        return _again(view, batch, stack, found)
    count = batch.main.ids.shape[0]
    if found is not None and len(found.pos) != count:
        raise bad(
            "these components were found for other predictions",
            f"{len(found.pos)} predictions in {count} texts",
            "the same predictions",
            "Leave target, foil and pos out, or select one prediction: .select(batch=0).",
        )
    if answer.generate is not None:
        answer = _generated(view, batch, stack, answer)
    named, target = None, _each(view, answer.target, count, "target")
    if found is not None and target is None:
        target = [(ids,) for ids in _sets(found.target)]
    else:
        named = _names(answer.target, count)
    foil = _each(view, answer.foil, count, "foil")
    if found is not None and foil is None and found.foil is not None and answer.target is None:
        foil = [(ids,) for ids in _sets(found.foil)]
    if foil is not None and target is None:
        raise bad(
            "a foil needs a target",
            f"foil={seen(answer.foil)} and no target",
            "both",
            "Pass target=, the token that the foil is contrasted with.",
        )
    _require_one_token(foil)
    if target is not None and any(len(steps) > 1 for steps in target):
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
    )


def _generated(view: ModelView, batch: Batch, stack: str, answer: Answer) -> Answer:
    """Returns the question after what the model itself says next."""
    count = whole_number(answer.generate)
    if count is None or count < 1:
        raise bad(
            "generate= is how many tokens the model may say",
            seen(answer.generate),
            "an integer from 1",
            "Leave it out to ask about one token.",
        )
    if answer.target is not None or answer.pos is not None or stack == "encoder":
        what = "target= or pos=" if stack == "decoder" else "a masked language model"
        raise bad(
            "what a model generates is a target of its own",
            f"generate={count} with {what}",
            "a causal model or an encoder-decoder, and neither target= nor pos=",
            "Leave one of them out.",
        )
    longest = int(batch.side(stack).mask.sum(dim=1).max()) + count
    if view.n_ctx is not None and longest > view.n_ctx:
        raise bad(
            "the text and what is to be generated are too long",
            f"{longest} tokens",
            f"at most {view.n_ctx}, the longest input of this model",
            "Ask for fewer tokens, or shorten the text.",
        )
    said = view.generate(batch, count)
    return replace(answer, target=said, generate=None)


def _rows_of_answers(
    view: ModelView, batch: Batch, stack: str, answer: Answer, target: list[Steps]
) -> tuple[Batch, list[list[int]]]:
    """Returns texts with their answers of several tokens, and where each token is predicted."""
    if answer.pos is not None:
        raise bad(
            "an answer of several tokens has its own positions",
            f"pos={seen(answer.pos)} and an answer of {max(map(len, target))} tokens",
            "no pos",
            "Leave pos out: the answer follows the text, or stands where its masks are.",
        )
    lengths = [len(steps) for steps in target]
    if stack == "encoder":
        rows = _masks(view, batch.side(stack))
        for number, (some, length) in enumerate(zip(rows, lengths, strict=True)):
            if len(some) != length:
                raise bad(
                    "the answer does not fit the masks",
                    f"{length} tokens for {len(some)} masks in sentence {number}",
                    "one mask for each token of the answer",
                    "Put as many of the tokenizer's mask tokens there, or give a shorter answer.",
                )
        return batch, rows
    if batch.decoder is None and batch.further:
        raise bad(
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
    """Returns texts with their answers behind them, and the position that predicts the first."""
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
    return Side(together, mask), [end + by for end, by in zip(ends, moved, strict=True)]


def _again(view: ModelView, batch: Batch, stack: str, found: LogProbContributions) -> Question:
    """Returns the predictions that contributions are of."""
    return Question(
        view=view,
        batch=batch,
        stack=stack,
        sentences=_sentences(found),
        rows=found.pos.cpu(),
        target=_sets(found.target),
        foil=None if found.foil is None else _sets(found.foil),
        named=(None,) * len(found.pos),
    )


def _sets(tokens: Tokens) -> tuple[tuple[int, ...], ...]:
    """Returns the alternatives that labels name."""
    pairs = zip(tokens.ids, tokens.mask, strict=True)
    return tuple(tuple(ids[mask].tolist()) for ids, mask in pairs)


def label_sets(view: ModelView, sets: Sequence[Tensor]) -> Tokens:
    """Returns the labels of the tokens asked about, the alternatives of each side by side."""
    ids = pad_sequence([some.cpu() for some in sets], batch_first=True, padding_value=0)
    lengths = torch.tensor([len(some) for some in sets])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    strings = tuple(
        tuple(view.to_output(token) if real else "" for token, real in zip(row, there, strict=True))
        for row, there in zip(ids.tolist(), mask.tolist(), strict=True)
    )
    return Tokens(ids=ids, strings=strings, mask=mask, sides=(("target", ids.shape[1]),))


# Positions


def predicting_rows(view: ModelView, batch: Batch, stack: str, pos: object) -> list[list[int]]:
    """Returns the positions of each sentence that predictions are read from.

    Args:
        view: The model.
        batch: Its tokens.
        stack: The stack that writes the answer.
        pos: The position, several, or ``"all"``; None for the last token of a decoder and the mask
            of an encoder.

    Raises:
        InvalidInput: If there is no such position, or not one mask in every sentence.
    """
    side = batch.side(stack)
    if pos is None and stack == "encoder":
        found = _masks(view, side)
        counts = [len(some) for some in found]
        if any(count != 1 for count in counts):
            row = next(row for row, count in enumerate(counts) if count != 1)
            raise bad(
                "it is not clear which word the model is asked for",
                f"{counts[row]} masks in sentence {row}",
                "one mask in every sentence",
                "Put the tokenizer's mask token where a word is to be predicted, or give pos=.",
            )
        return found
    if isinstance(pos, str) and pos == "all":
        return [mask.nonzero()[:, 0].tolist() for mask in side.mask.cpu()]
    listed = _items(pos)
    if listed is None:
        listed = [-1 if pos is None else pos]
    if not listed:
        raise _no_position(pos, side.mask.shape[1])
    columns = [rows_at(one, side.mask).tolist() for one in listed]
    return [list(row) for row in zip(*columns, strict=True)]


def _masks(view: ModelView, side: Side) -> list[list[int]]:
    """Returns where each sentence has the tokenizer's mask token."""
    mask = view.special_ids().get("mask")
    found = (side.ids == -1 if mask is None else side.ids == mask) & side.mask.to(side.ids.device)
    return [row.nonzero()[:, 0].tolist() for row in found]


def rows_at(pos: object, mask: Tensor) -> Int[Tensor, " batch"]:
    """Returns a position in each sentence; a negative one counts from its last real token.

    Raises:
        InvalidInput: If it is padding, or not there, in one of them.
    """
    mask = mask.cpu()
    length = mask.shape[1]
    number = whole_number(pos)
    if number is None or not -length <= number < length:
        raise _no_position(pos, length)
    last = length - 1 - mask.int().flip(dims=[1]).argmax(dim=1)
    rows = last + 1 + number if number < 0 else torch.full_like(last, number)
    real = (rows >= 0) & mask.gather(1, rows.clamp(min=0)[:, None])[:, 0]
    if not bool(real.all()):
        row = int((~real).nonzero()[0])
        raise bad(
            "nothing is predicted at this position",
            f"{number}, padding in sentence {row}",
            "a position of a real token in every sentence",
            "Count from the end with a negative one, or ask about this sentence alone.",
        )
    return rows


def _no_position(pos: object, length: int) -> InvalidInput:
    return bad(
        "there is no such position",
        seen(pos),
        f"an integer from {-length} to {length - 1}, several, or 'all'",
        "Positions are the same for all sentences; negative ones count from each one's last token.",
    )


# Tokens


def _items(asked: Any) -> list[Any] | None:
    """Returns what a list, an array or a tensor holds; None for anything else."""
    asked = asked.tolist() if hasattr(asked, "tolist") else asked
    several = isinstance(asked, Iterable) and not isinstance(asked, (str, AbstractSet, Mapping))
    return list(asked) if several else None


def _plain(number: Any) -> Any:
    """Returns NumPy's whole numbers, or those in a list, as Python's; anything else as it is."""
    if isinstance(number, list):
        return [_plain(one) for one in number]
    found = whole_number(number)
    return number if found is None else found


def _names(target: object, count: int) -> list[str | None]:
    """Returns the text of each sentence's target, where it is one."""
    listed = one_each(target, count, "target")
    return [one if isinstance(one, str) else None for one in listed]


def one_each(asked: object, count: int, name: str) -> list[Any]:
    """Returns what each of some sentences is asked about, out of one for all or one for each.

    Raises:
        InvalidInput: If a list has another length.
    """
    listed = _items(asked)
    if listed is None:
        return [asked] * count
    if len(listed) != count:
        raise bad(
            f"there is not one {name} for each text",
            seen(asked),
            f"one for all, or a list of {count}",
            "Pass one for all texts, or one for each.",
        )
    return listed


def _each(view: ModelView, asked: object, count: int, name: str) -> list[Steps] | None:
    """Returns what each sentence is asked about, token by token; None if nothing is.

    Raises:
        InvalidInput: If something else is asked for.
    """
    if asked is None:
        return None
    return [_steps(view, one, name) for one in one_each(asked, count, name)]


def _steps(view: ModelView, one: object, name: str) -> Steps:
    """Returns the tokens of an answer, each with its alternatives."""
    if isinstance(one, str):
        return tuple((token,) for token in _pieces(view, one, name))
    if isinstance(one, AbstractSet):
        if not one:
            raise _no_target(one, name)
        each = [single_token(view, token, name) for token in one]
        return (tuple(sorted(set(each))),)
    listed = _items(one)
    if listed:
        return tuple((single_token(view, token, name),) for token in listed)
    return ((single_token(view, one, name),),)


def _pieces(view: ModelView, text: str, name: str) -> list[int]:
    """Returns the tokens of a text that the model is to predict.

    Raises:
        InvalidInput: If there are none, or one is unknown.
    """
    found = view.pieces(text) if is_text(text) else []
    if not found and view.labelled:
        raise bad(
            "no label is called that",
            repr(text),
            "one of the labels",
            f"Name the {name} as labels= does, or pass an id.",
        )
    if not found:
        raise _no_target(text, name)
    unknown = None if view.labelled else view.special_ids().get("unknown")
    for token in found:
        if token == unknown and view.to_output(token).strip() != text.strip():
            raise bad(
                f"the {name} is not in the vocabulary",
                f"{text!r}, which becomes {''.join(map(view.to_output, found))!r}",
                "words of this model's vocabulary",
                "Use another word, or pass an id.",
            )
    return found


def single_token(view: ModelView, one: object, name: str = "target") -> int:
    """Returns the id of a text that is one token, or an id that is one.

    Raises:
        InvalidInput: If it is several, naming them, or a word the model does not know.
    """
    if isinstance(one, str):
        found = _pieces(view, one, name)
        if len(found) != 1:
            raise _not_one(view, one, found, name)
        return found[0]
    number = whole_number(one)  # how many there are, the logits say: outputs may be no tokens
    if number is None or number < 0:
        raise _no_target(one, name)
    return number


def _not_one(view: ModelView, text: str, found: list[int], name: str) -> InvalidInput:
    pieces = ", ".join(repr(view.to_output(token)) for token in found)
    spaced = " " + text
    fits = not text.startswith(" ") and len(view.pieces(spaced)) == 1
    hint = f"{spaced!r}, with its space, is one token. " if fits else ""
    return bad(
        f"the {name} is not one token",
        f"{text!r}, which is {len(found)}: {pieces}",
        "a text that is one token of this model's vocabulary",
        f"{hint}Ask for one of the pieces, or pass an id.",
    )


def _require_one_token(foil: list[Steps] | None) -> None:
    longest = max(map(len, foil)) if foil else 1
    if longest > 1:
        raise bad(
            "a foil is one token, or a set of single tokens",
            f"a foil of {longest} tokens",
            "what might stand in the place of one predicted token",
            "Two answers of several tokens are two texts: ask about each, and subtract log_prob.",
        )


def _no_target(asked: object, name: str, count: int | None = None) -> InvalidInput:
    return bad(
        f"this is no {name}",
        seen(asked),
        _TARGETS if count is None else f"{_TARGETS}; ids from 0 to {count - 1}",
        "Pass one for all texts, or one for each.",
    )


def _warn_about_spaces(
    view: ModelView, named: Sequence[str | None], ids: Sequence[Sequence[int]], logits: Tensor
) -> None:
    for row, (text, tokens) in enumerate(zip(named, ids, strict=True)):
        if text is None or text.startswith(" "):
            continue
        spaced = view.pieces(" " + text)[:1]
        if not spaced or spaced[0] == tokens[0]:
            continue
        ratio = float((logits[row, spaced[0]] - logits[row, tokens[0]]).double().exp())
        if ratio > _MUCH:
            warn(
                four_parts(
                    "the target continues the last word of the text",
                    f"{text!r}, which the model finds {ratio:.0f} times less probable than "
                    f"{' ' + text!r}",
                    "a word with its leading space where a new word begins",
                    f"Ask for {' ' + text!r} if that is what was meant.",
                )
            )


# Results


def _answer_of(
    batch: Batch, view: ModelView, *given: object
) -> tuple[LogProbContributions | None, Batch]:
    """Returns the contributions that components were taken from, and the input they were found on.

    That is the batch, or longer by the answers that were asked about.

    Raises:
        InvalidInput: If a result is of other tokens.
    """
    results = [g for g in given if isinstance(g, (LogProbContributions, QueryContributions))]
    for result in results:
        require_same_arguments(view, result.provenance.options, batch)
        if isinstance(result, LogProbContributions):
            batch = _with_answer(batch, result, view)
        sides = [(result.tokens, batch.side(view.base_stack(None)))]
        if result.encoder is not None:
            sides.append((result.encoder, batch.main))
        sentence = _sentences(result)
        for tokens, side in sides:
            known = int(sentence.max()) + 1 == len(side.ids)
            same = known and torch.equal(tokens.ids.cpu(), side.ids.cpu()[sentence])
            if not same or not torch.equal(tokens.mask.cpu(), side.mask.cpu()[sentence]):
                raise bad(
                    "the chosen components belong to another input",
                    f"components found in {tokens.strings[0]}",
                    f"components found in the tokens {side.ids.tolist()}, padding included",
                    "Give the input, and its padding, that they were found on.",
                )
    return next((r for r in results if isinstance(r, LogProbContributions)), None), batch


def _sentences(result: LogProbContributions | QueryContributions) -> Int[Tensor, " row"]:
    """Returns the sentence of each row, counted among those that the result is of."""
    return result.sentence.cpu().unique(return_inverse=True)[1]


def _with_answer(batch: Batch, result: LogProbContributions, view: ModelView) -> Batch:
    """Returns a batch with the answers of several tokens that a result is about."""
    side, sentence = batch.side(view.base_stack(None)), _sentences(result).tolist()
    if result.tokens.shape[1] <= side.ids.shape[1] or max(sentence) + 1 != len(side.ids):
        return batch
    first = [sentence.index(row) for row in range(len(side.ids))]
    ids, mask = result.tokens.ids[first].cpu(), result.tokens.mask[first].cpu()
    for row, place in enumerate(first):
        text = side.ids[row][side.mask[row]].cpu()
        before = mask[row].clone()
        before[int(result.pos[place]) + 1 :] = False  # an answer begins where it is predicted first
        if not torch.equal(ids[row][before], text):
            return batch
    longer = Side(ids.to(side.ids.device), mask.to(side.mask.device))
    return replace(batch, **{"main" if batch.decoder is None else "decoder": longer})
