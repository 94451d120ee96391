"""Text to token ids and back, as the users of each TransformerLens class expect."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import dropwhile
from typing import Annotated, Any

from tl_contextmix.adapters.handles import Handle
from tl_contextmix.adapters.recognition import Facts, token_embedding
from tl_contextmix.core.model_view import ModelView, Padding
from tl_contextmix.core.pieces import join_pieces, show_bytes
from tl_contextmix.core.validation import LATER
from tl_contextmix.errors import InvalidInput, reason, warn

Names = Sequence[str] | Callable[[int], str]
Labels = Annotated[Names | tuple[Names, Names], LATER]
"""Names of token ids: a list, or a function of the id. Where a model's outputs are not its tokens
(``d_vocab_out``): of the tokens and of the outputs."""


def require_tokenizer(model: Any) -> Any:
    """Returns the model's tokenizer.

    Raises:
        InvalidInput: If it has none.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise InvalidInput(
            "text cannot be turned into tokens",
            "a model without a tokenizer",
            "token ids of shape [batch, pos]",
            "Pass a tensor of token ids, or give the model a tokenizer.",
        )
    return tokenizer


def make_encode(handle: Handle, facts: Facts) -> Callable[[str, bool | None], list[int]]:
    """Returns the function that turns one text into token ids.

    HookedTransformer and decoder-only bridges are asked themselves. Encoders and encoder-decoders
    were trained on the ids that their tokenizers give, which to_tokens of a bridge puts special
    tokens in front of and cuts some off, so there the tokenizer is asked.
    """
    framed = _is_framed(facts)

    def encode(text: str, prepend_bos: bool | None) -> list[int]:
        model = handle.get()
        tokenizer = require_tokenizer(model)
        if not framed:
            options: dict[str, Any] = {"truncate": False, "move_to_device": False}
            options |= {} if prepend_bos is None else {"prepend_bos": prepend_bos}
            ids = model.to_tokens(text, **options)[0].tolist()
            wants_bos = prepend_bos is None or prepend_bos
            return _with_one_bos(tokenizer, text, ids) if wants_bos else ids
        if prepend_bos is not None:
            raise InvalidInput(
                "prepend_bos has no meaning for an encoder",
                f"prepend_bos={prepend_bos}",
                "None",
                "Leave it out: the tokenizer adds the model's own special tokens.",
            )
        before, words, after = in_frame(tokenizer, text=text)
        return [*before, *words, *after]

    return encode


def _is_framed(facts: Facts) -> bool:
    """Whether texts get the special tokens of their tokenizer, not those of TransformerLens."""
    pair = facts.host == "HookedEncoderDecoder" or "decoder_blocks" in facts.model._modules
    return pair or (facts.encoder_only and facts.host != "HookedTransformer")


def make_encode_pair(
    handle: Handle, facts: Facts
) -> Callable[[str, str], tuple[list[int], list[int] | None]]:
    """Returns the function that turns two texts into the token ids and segments of one row."""
    framed = _is_framed(facts)

    def encode_pair(first: str, second: str) -> tuple[list[int], list[int] | None]:
        tokenizer = require_tokenizer(handle.get())
        if not framed:
            raise InvalidInput(
                "a pair of texts has no meaning for this model",
                f"({first!r}, {second!r})",
                "one text a row: a decoder has no segments",
                "Join the two into one text.",
            )
        before, _, after = _split(tokenizer, {"text": first})
        if _lost_frame(tokenizer, before, after):
            tokenizer = _published(tokenizer)
        found = tokenizer(first, second)
        return list(found["input_ids"]), found.get("token_type_ids")

    return encode_pair


def _with_one_bos(tokenizer: Any, text: str, ids: list[int]) -> list[int]:
    """Returns a text's ids without the BOS in front of one that the text itself has."""
    bos = tokenizer.bos_token_id
    # An unknown word may have the same id.
    if ids[:2] != [bos, bos] or not text.lstrip().startswith(str(tokenizer.bos_token)):
        return ids
    own = _leading(list(tokenizer(text, add_special_tokens=False)["input_ids"]), bos)
    added = _leading(ids, bos) - own
    if own < 1 or added < 1:
        return ids
    warn(
        "a text has its own beginning-of-sequence token",
        repr(tokenizer.bos_token),
        "a text without it, or prepend_bos=False",
        "It gets no second one. Pass prepend_bos=False to say that it has one.",
    )
    return ids[added:]


def _leading(ids: list[int], token: int) -> int:
    return len(ids) - len([*dropwhile(lambda one: one == token, ids)])


def in_frame(tokenizer: Any, **text: str) -> tuple[list[int], list[int], list[int]]:
    """Returns a text's ids between the special tokens that its tokenizer puts around them.

    They are the ones of the tokenizer as published. TransformerLens loads one that has a BOS token
    again with add_bos_token=True, and then transformers 5 has BOS replace all of them: BART and
    RoBERTa lose their end token, and texts of a tokenizer that adds nothing get a BOS.

    Args:
        tokenizer: The model's.
        text: One text by its name, ``text`` or ``text_target``.
    """
    before, words, after = _split(tokenizer, text)
    if _lost_frame(tokenizer, before, after):
        before, _, after = _split(_published(tokenizer), text)
    plain = next(iter(text.values())).strip()
    return before, _without_frame(tokenizer, plain, before, words, after), after


def _without_frame(
    tokenizer: Any, text: str, before: list[int], words: list[int], after: list[int]
) -> list[int]:
    """Returns the ids of a text without the special tokens that are put around it anyway."""
    start, stop = 0, len(words)
    # The text must have them, too: an unknown word may have the same id.
    if before and text.startswith(piece_of(tokenizer, before[0]).strip()):
        start = len(before) if words[: len(before)] == before else 0
    if after and text.endswith(piece_of(tokenizer, after[-1]).strip()):
        first = stop - len(after)
        stop = first if first >= start and words[first:] == after else stop
    own = [*words[:start], *words[stop:]]
    if own:
        warn(
            "a text has special tokens that its tokenizer puts around every text",
            ", ".join(repr(piece_of(tokenizer, one)) for one in own),
            "a text without them",
            "It gets no second ones. Leave them out of the text.",
        )
    return words[start:stop]


def _lost_frame(tokenizer: Any, before: list[int], after: list[int]) -> bool:
    """Whether a text has at most a BOS around it and its tokenizer was loaded again for that."""
    # NLLB's tokenizer puts its own back, in the language that is set now.
    bare = [*before, *after] in ([], [getattr(tokenizer, "bos_token_id", None)])
    return bool(getattr(tokenizer, "init_kwargs", {}).get("add_bos_token")) and bare


def _split(tokenizer: Any, text: dict[str, str]) -> tuple[list[int], list[int], list[int]]:
    ids = list(tokenizer(**text)["input_ids"])
    words = list(tokenizer(**text, add_special_tokens=False)["input_ids"])
    for start in range(len(ids) - len(words) + 1):
        end = start + len(words)
        if ids[start:end] == words:
            return ids[:start], words, ids[end:]
    return [], ids, []


_PUBLISHED: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _published(tokenizer: Any) -> Any:
    """Returns a tokenizer as it was before TransformerLens asked for a BOS token."""
    result = _PUBLISHED.get(tokenizer)
    if result is None:
        options = {**tokenizer.init_kwargs, "local_files_only": True}
        del options["add_bos_token"]
        place = options.pop("name_or_path", tokenizer.name_or_path)
        try:
            result = type(tokenizer).from_pretrained(place, **options)
        except (OSError, ValueError) as error:
            raise InvalidInput(
                "the special tokens of a text are not known",
                "a tokenizer that TransformerLens has loaded again with add_bos_token=True, which "
                f"replaces them, and none at {place!r} any more",
                "the tokenizer as published where it was loaded from",
                "Put it back there, or pass token ids.",
            ) from error
        _PUBLISHED[tokenizer] = result
    return result


@contextmanager
def target_mode(tokenizer: Any) -> Iterator[None]:
    """Lets a tokenizer without a target language read target texts, and forget it again.

    M2M100's raises, others take the source language for one from then on.
    """
    unset = getattr(tokenizer, "tgt_lang", "") is None
    if unset:
        tokenizer.tgt_lang = tokenizer.src_lang
    try:
        yield
    finally:
        if unset:
            tokenizer.tgt_lang = None


def make_pieces(handle: Handle) -> Callable[[str], list[int]]:
    """Returns the function that turns a word into token ids, without special tokens.

    Of an encoder-decoder, the ids its decoder predicts. SentencePiece puts a space in front of
    every text, so that one given with its space gets two: the tokenizer is then asked without.
    """

    def pieces(text: str) -> list[int]:
        tokenizer = require_tokenizer(handle.get())
        pair = getattr(handle.get(), "_modules", {})
        name = "text_target" if "decoder" in pair or "decoder_blocks" in pair else "text"

        def bare(text: str) -> list[int]:
            with target_mode(tokenizer):
                return list(tokenizer(**{name: text}, add_special_tokens=False)["input_ids"])

        result = bare(text)
        if len(result) > 1 and text.startswith(" "):
            first = tokenizer.convert_ids_to_tokens(result[0])
            if isinstance(first, str) and first and not first.strip("\u2581"):
                fewer = bare(text[1:])
                result = fewer if len(fewer) < len(result) else result
        return result

    return pieces


def special_ids(model: Any) -> dict[str, int]:
    """Returns the ids of special tokens by their role; see `ModelView.special_ids`."""
    tokenizer = getattr(model, "tokenizer", None)
    segmented = "token_type_ids" in getattr(tokenizer, "model_input_names", ())
    found = {
        "mask": getattr(tokenizer, "mask_token_id", None),
        "unknown": getattr(tokenizer, "unk_token_id", None),
        "separator": getattr(tokenizer, "sep_token_id", None) if segmented else None,
    }
    return {name: int(token) for name, token in found.items() if token is not None}


def make_pad_id(handle: Handle, facts: Facts) -> Callable[[], int]:
    """Returns the function that gives the id of padding.

    RoBERTa counts positions by it, so the model's own comes before the tokenizer's, to which
    TransformerLens adds one where it has none; that one may lie outside of the vocabulary.
    """
    d_vocab = int(token_embedding(facts.model).shape[0])
    configured = getattr(facts.hf_config(), "pad_token_id", None)

    def pad_id() -> int:
        tokenizer = getattr(handle.get(), "tokenizer", None)
        for result in (configured, getattr(tokenizer, "pad_token_id", None)):
            if isinstance(result, int) and 0 <= result < d_vocab:
                return result
        return 0

    return pad_id


def padding_of(model: Any) -> Padding | None:
    """Returns how the model's tokenizer pads; None where there is none, or it does not."""
    tokenizer = getattr(model, "tokenizer", None)
    token = getattr(tokenizer, "pad_token_id", None)
    if not isinstance(token, int):
        return None

    def also(*roles: str) -> bool:
        return any(getattr(tokenizer, f"{role}_token_id", None) == token for role in roles)

    side = str(getattr(tokenizer, "padding_side", "right"))
    return Padding(token, side, also("bos", "cls", "unk"), also("eos", "sep", "unk"))


def make_to_string(handle: Handle) -> Callable[[int], str]:
    """Returns the function that shows one token id, leading spaces kept."""
    return lambda token: piece_of(getattr(handle.get(), "tokenizer", None), token)


def make_to_source(handle: Handle) -> Callable[[int], str]:
    """Returns the function that shows one token id of a text that an encoder-decoder reads.

    Marian may have a vocabulary for the source and one for the target, and decodes by the latter.
    """

    def to_source(token: int) -> str:
        tokenizer: Any = getattr(handle.get(), "tokenizer", None)
        if not getattr(tokenizer, "separate_vocabs", False):
            return piece_of(tokenizer, token)
        if tokenizer not in _SOURCES:
            _SOURCES[tokenizer] = {number: piece for piece, number in tokenizer.encoder.items()}
        return _SOURCES[tokenizer].get(token, f"[{token}]").replace("\u2581", " ")

    return to_source


_SOURCES: weakref.WeakKeyDictionary[Any, dict[int, str]] = weakref.WeakKeyDictionary()


def piece_of(tokenizer: Any, token: int) -> str:
    """Returns one token as text, its leading space kept, parts of characters as `show_bytes` does.

    Args:
        tokenizer: The tokenizer; None shows the id.
        token: The id.
    """
    if tokenizer is None:
        return str(token)
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        # Vocabularies are padded to round numbers, and the last ids name no token.
        return f"[{token}]"
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    # ByT5 decodes parts of a character as nothing.
    data = _bytes_of(piece) if "\ufffd" in text or not text else None
    if data is not None:
        return show_bytes(data)
    # SentencePiece marks a leading space that decoding a single token drops.
    starts_word = isinstance(piece, str) and piece.startswith("\u2581")
    return " " + text.lstrip() if starts_word else text


_PRINTED = frozenset((*range(33, 127), *range(161, 173), *range(174, 256)))
_OTHERS = sorted(frozenset(range(256)) - _PRINTED)
# As in GPT-2's byte-level vocabulary, whose own characters are the first; ByT5's are the bytes.
_ALPHABET = {chr(256 + place): byte for place, byte in enumerate(_OTHERS)}
_ALPHABET |= {chr(byte): byte for byte in range(33, 256) if byte != 127}
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _bytes_of(piece: str | bytes) -> bytes | None:
    """Returns what a piece of a byte-level vocabulary stands for, or one by which others fall back.

    Args:
        piece: As the vocabulary has it; None is returned for one that is no bytes.
    """
    if isinstance(piece, bytes):
        return piece
    if (fallback := _BYTE.fullmatch(piece)) is not None:
        return bytes.fromhex(fallback[1])
    known = all(character in _ALPHABET for character in piece)
    return bytes(_ALPHABET[character] for character in piece) if known else None


def text_of(tokenizer: Any, ids: Sequence[int], **options: Any) -> str:
    """Returns token ids decoded as one text, without U+FFFD for characters that are cut off.

    Args:
        tokenizer: The tokenizer; None gives the ids.
        ids: The ids.
        **options: Of its ``decode``.
    """
    if tokenizer is None:
        return " ".join(map(str, ids))
    text = tokenizer.decode(list(ids), **options)
    if "\ufffd" not in text:
        return text
    skipped = tokenizer.all_special_ids if options.get("skip_special_tokens") else ()
    pieces = join_pieces([piece_of(tokenizer, one) for one in ids if one not in skipped])
    # Decoders of SentencePiece drop the space of the first word.
    return pieces if text.startswith(" ") else pieces.removeprefix(" ")


def make_to_text(handle: Handle) -> Callable[[Sequence[int]], str]:
    """Returns the function that shows token ids as one text, special tokens included."""

    def to_text(ids: Sequence[int]) -> str:
        tokenizer = getattr(handle.get(), "tokenizer", None)
        return text_of(tokenizer, ids, clean_up_tokenization_spaces=False)

    return to_text


_SPACED: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def make_spaced(handle: Handle) -> Callable[[], bool]:
    """Returns the function that says whether words begin with their space."""

    def spaced() -> bool:
        tokenizer = getattr(handle.get(), "tokenizer", None)
        if tokenizer is None:
            return False
        if tokenizer not in _SPACED:
            ids = tokenizer("a a", add_special_tokens=False)["input_ids"]
            _SPACED[tokenizer] = any(piece_of(tokenizer, one)[:1].isspace() for one in ids)
        return _SPACED[tokenizer]

    return spaced


def special_tokens(model: Any) -> frozenset[int]:
    """Returns the ids of special tokens; that of unknown words, which stands for words, is none."""
    tokenizer = getattr(model, "tokenizer", None)
    found = set(getattr(tokenizer, "all_special_ids", ()))
    # Those of a chat template may be special and have no role.
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    found.update(token for token, about in added.items() if about.special)
    unknown = getattr(tokenizer, "unk_token_id", None)
    roles = ("bos", "eos", "pad", "cls", "sep", "mask")
    if unknown not in [getattr(tokenizer, f"{role}_token_id", None) for role in roles]:
        found.discard(unknown)
    return frozenset(found)


def name_tokens(view: ModelView, labels: Labels | None) -> ModelView:
    """Returns a view that shows tokens, and knows targets, by names of the user's own.

    Raises:
        InvalidInput: If they are not one name for each token.
    """
    if labels is None or view.labelled:
        return view
    read, predicted = _as_pair(labels)
    to_string = _namer(read, view.d_vocab, "token")
    # A bare list names what is read; what is predicted, too, where that is the same.
    to_output = to_string if view.to_output == view.to_string else view.to_output
    if predicted is not None:
        to_output = _namer(predicted, view.readout.outputs or view.d_vocab, "output")
    known: dict[str, list[int]] = {}

    def pieces(text: str) -> list[int]:
        if not known:
            for token in range(view.readout.outputs or view.d_vocab):
                known.setdefault(to_output(token), []).append(token)
        result = known.get(text, [])
        if len(result) > 1:
            raise InvalidInput(
                "a label does not say which token is meant",
                f"{text!r}, of the ids {result[:5]}",
                "a label that is given once",
                "Pass the id.",
            )
        return result

    @cache
    def spaced() -> bool:
        return any(to_string(token)[:1].isspace() for token in range(view.d_vocab))

    return replace(
        view,
        to_string=to_string,
        to_source=None,
        to_output=to_output,
        to_text=lambda ids: ("" if spaced() else " ").join(map(to_string, ids)),
        pieces=pieces,
        spaced=spaced,
        labelled=True,
        classes=tuple(map(to_output, range(len(view.classes)))),
    )


def _as_pair(labels: Any) -> tuple[Names, Names | None]:
    two = isinstance(labels, tuple) and len(labels) == 2
    if two and not any(isinstance(one, str) for one in labels):
        return labels
    return labels, None


def _namer(labels: Names, count: int, what: str) -> Callable[[int], str]:
    """Returns the function that names ids."""
    if not callable(labels):
        several = getattr(labels, "ndim", int(isinstance(labels, Sequence))) == 1
        listed = [*labels] if several and not isinstance(labels, str) else []
        if len(listed) != count or not all(isinstance(label, str) for label in listed):
            kinds = sorted({type(label).__name__ for label in listed})
            raise InvalidInput(
                "the labels do not name the vocabulary",
                f"{len(listed)} of {', '.join(kinds) or type(labels).__name__}",
                f"{count} of str, one for each {what} id",
                "Name all of them, or pass a function of the id.",
            )
        return listed.__getitem__

    def name(token: int) -> str:
        try:
            label = labels(token)
        except Exception as error:  # functions raise what they like
            raise InvalidInput(
                "the labels do not name the vocabulary",
                f"labels({token}), which raises {reason(error)}",
                "a function that returns a str for every id",
                "Try it on this id.",
            ) from error
        if not isinstance(label, str):
            raise InvalidInput(
                "the labels do not name the vocabulary",
                f"labels({token}) = {label!r}",
                "a function that returns a str for every id",
                "Convert it.",
            )
        return label

    return name
