"""Chats: messages with roles, as the tokenizer's chat template puts them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tl_contextmix.adapters.handles import Handle
from tl_contextmix.adapters.tokenizers import require_tokenizer
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.errors import InvalidInput, reason, seen

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
Message = Mapping[str, Any]


def chats_of(given: object) -> list[list[Message]] | None:
    """Returns the chats that an input is, of one or of several; None for any other input.

    Raises:
        InvalidInput: If something in it is no message.
    """
    listed: list[Any] = list(given) if isinstance(given, (list, tuple)) else []
    if listed and isinstance(listed[0], Mapping):
        listed = [listed]
    rows = [list(one) if isinstance(one, (list, tuple)) else [] for one in listed]
    if not rows or not all(row and isinstance(row[0], Mapping) for row in rows):
        return None
    for message in (one for row in rows for one in row):
        fine = isinstance(message, Mapping) and message.get("role") in ROLES
        if not fine or "content" not in message:
            raise InvalidInput(
                "this is no message of a chat",
                seen(message),
                f"a dictionary with content, and as its role one of {list(ROLES)}",
                "Give every message its role and content.",
            )
    return rows


@dataclass(frozen=True)
class LastMessage:
    """The last message of a chat as the answer to those before it."""

    chat: Sequence[Message]

    def tokens(self, view: ModelView) -> list[int]:
        """Returns its tokens after what opens the assistant's turn.

        Raises:
            InvalidInput: If the template writes a turn otherwise than it opens one.
        """
        before, _ = view.encode_chat(self.chat[:-1], False)
        whole, _ = view.encode_chat(self.chat, True)
        if len(whole) <= len(before) or whole[: len(before)] != before:
            raise InvalidInput(
                "the assistant's last message is no answer to the chat before it",
                seen(self.chat[-1]),
                "a message that continues the opening of the assistant's turn",
                "End the chat with the user's message, and pass the answer as target=.",
            )
        return whole[len(before) :]


def make_encode_chat(
    handle: Handle,
) -> Callable[[Sequence[Message], bool], tuple[list[int], list[int]]]:
    """Returns the function that turns a chat into token ids, and the role of each token.

    A chat that ends with anything but an assistant's message is followed by what opens the
    assistant's turn. The second argument leaves an assistant's last message open instead of closing
    the turn. Roles are places in `ROLES`; what a template will not put alone (a system message that
    is folded into the user's turn) has the role of the message after it.
    """

    def encode_chat(messages: Sequence[Message], open_ended: bool) -> tuple[list[int], list[int]]:
        tokenizer = require_tokenizer(handle.get())
        if not getattr(tokenizer, "chat_template", None):
            raise InvalidInput(
                "a chat cannot be turned into tokens",
                "a tokenizer without a chat template",
                "a model that was trained on chats",
                "Set model.tokenizer.chat_template, or pass the text as the model reads it.",
            )

        def put(some: Sequence[Message], **how: bool) -> tuple[str, list[int]]:
            text = tokenizer.apply_chat_template([*map(dict, some)], tokenize=False, **how)
            # The template writes the special tokens itself.
            return text, list(tokenizer(text, add_special_tokens=False)["input_ids"])

        own = messages[-1]["role"] == "assistant"
        how = {"continue_final_message": open_ended} if own else {"add_generation_prompt": True}
        try:
            text, ids = put(messages, **how)
        except Exception as error:  # templates raise what they like
            raise InvalidInput(
                "the chat template refuses this chat",
                reason(error),
                "messages in an order that the model was trained on",
                "Change the messages, or pass the text as the model reads it.",
            ) from error
        roles: list[int] = []
        for count in range(1, len(messages) + 1):
            try:
                before, first = put(messages[:count])
            except Exception:
                continue
            if text.startswith(before) and ids[: len(first)] == first:
                role = ROLES.index(messages[count - 1]["role"])
                roles += [role] * (len(first) - len(roles))
        return ids, roles + [ROLES.index("assistant")] * (len(ids) - len(roles))

    return encode_chat
