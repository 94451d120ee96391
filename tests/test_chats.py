"""Chats: the tokenizer's own template, no second BOS, roles on the axes, the assistant's turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tl_contextmix as cm
from tl_contextmix.evaluation import cue_alignment

pytestmark = pytest.mark.once

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' and messages[loop.index0 - 1]['role'] == 'user' "
    "and loop.index0 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '' if loop.first else ' ' }}{{ 'the ' if message['role'] == 'assistant' }}"
    "{{ message['content'] }} .{% endfor %}{% if add_generation_prompt %} the{% endif %}"
)
SYSTEM = {"role": "system", "content": "people in kyiv speak ukrainian"}
USER = {"role": "user", "content": "the keys are old"}
ASSISTANT = {"role": "assistant", "content": "keys to the cabinet"}


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    """A demo model whose tokenizer has a template."""
    found = cm.load_demo("causal-lm")
    found.tokenizer.chat_template = TEMPLATE
    yield found
    found.tokenizer.chat_template = None


def ids(model: Any, text: str) -> list[int]:
    """The tokens of a text that has all of its special tokens."""
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_chat_is_what_the_template_writes(model: Any) -> None:
    bos = model.tokenizer.bos_token
    found = cm.value_zeroing(model, [SYSTEM, USER])
    written = f"{bos}people in kyiv speak ukrainian . the keys are old . the"
    assert found.source.ids.tolist() == [ids(model, written)]
    template = model.tokenizer.apply_chat_template([SYSTEM, USER], add_generation_prompt=True)
    listed = template if isinstance(template, list) else template["input_ids"]
    assert found.source.ids[0].tolist() == listed
    assert found.source.ids[0].tolist().count(model.tokenizer.bos_token_id) == 1
    same = cm.value_zeroing(model, torch.tensor([listed]))
    assert torch.equal(found.scores, same.scores)
    whole = cm.attention(model, [USER, ASSISTANT])
    assert whole.source.ids.tolist() == [
        ids(model, f"{bos}the keys are old . the keys to the cabinet .")
    ]


def test_roles_are_sides_of_the_axes(model: Any) -> None:
    found = cm.attention(model, [SYSTEM, USER, ASSISTANT, USER])
    lengths = {"system": 7, "user": 5, "assistant": 6}
    turns = [(one["role"], lengths[one["role"]]) for one in (SYSTEM, USER, ASSISTANT, USER)]
    assert found.source.sides == (*turns, ("assistant", 1))
    assert found.target.sides == found.source.sides
    assert found.source.positions().tolist() == [list(range(24))]
    system = found.select(source="system", target="assistant")
    assert system.scores.shape[-2:] == (7, 7)
    assert torch.equal(
        system.scores, found.select(source=[*range(7)], target=[*range(12, 18), 23]).scores
    )
    words = found.words()
    assert words.source.sides[0][0] == "system"
    # A cue after the target is no source in a chat either.
    scored = cue_alignment(found.mean("head"), [[1]], pos=3)
    assert scored.rows[0].chance == pytest.approx(1 / 4)
    parts = cm.log_prob_contributions(model, [SYSTEM, USER], by="position")
    assert parts.tokens.sides == (("system", 7), ("user", 5), ("assistant", 1))


def test_an_assistants_last_message_is_the_answer(model: Any) -> None:
    found = cm.log_prob_contributions(model, [USER, ASSISTANT], by="head")
    assert "".join(row[0] for row in found.target.strings).strip() == "keys to the cabinet"
    assert found.tokens.sides == (("user", 6), ("assistant", 5))
    prompt = f"{model.tokenizer.bos_token}the keys are old . the"
    plain = torch.tensor([ids(model, prompt)])
    answer = cm.log_prob_contributions(model, plain, target=" keys to the cabinet", by="head")
    assert torch.equal(found.scores, answer.scores)
    out = cm.knockout(model, [USER, ASSISTANT], heads=[(0, 0)], controls=0)
    assert torch.allclose(out.before[:, 0], found.log_prob)
    # What is asked besides goes on in the message.
    more = cm.log_prob_contributions(model, [USER, ASSISTANT], target=" are", foil=" is")
    whole = ids(model, f"{prompt} keys to the cabinet")
    assert more.tokens.ids[0].tolist() == whole
    saliency = cm.gradient_x_input(model, [USER, ASSISTANT])
    assert saliency.scores.shape[3] == len(found.target.strings)


def test_several_chats_and_scans(model: Any) -> None:
    chats = [[SYSTEM, USER], [USER]]
    found = cm.attention(model, chats)
    for row, chat in enumerate(chats):
        alone = cm.attention(model, chat)
        length = alone.scores.shape[-1]
        part = found.scores[row : row + 1, ..., :length, :length]
        assert torch.allclose(part, alone.scores, atol=1e-6)
    assert found.source.sides == (("decoder", 13),)  # they stand at unlike positions
    assert cm.attention(model, [[USER], [USER]]).source.sides == (("user", 6), ("assistant", 1))
    scanned = cm.scan(model, [{"messages": [USER, ASSISTANT]}, {"messages": chats[0]}], by="head")
    assert scanned.prompts.tolist() == [2]
    one = cm.log_prob_contributions(model, [USER, ASSISTANT], by="head").summed()
    other = cm.log_prob_contributions(model, chats[0], by="head")
    mean = (one.scores[0] + other.scores[0]).double() / 2
    assert torch.allclose(scanned.mean[0], mean, atol=1e-5)


def test_a_system_message_that_is_folded_in_is_of_the_users_turn(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folded = (
        "{% if messages | length == 1 and messages[0]['role'] == 'system' %}"
        "{{ raise_exception('no user') }}{% endif %}" + TEMPLATE
    )
    monkeypatch.setattr(model.tokenizer, "chat_template", folded)
    found = cm.attention(model, [SYSTEM, USER])
    assert found.source.sides == (("user", 12), ("assistant", 1))


def test_what_is_no_chat_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for given, message in (
        ([{"role": "user"}], "no message of a chat: got {'role': 'user'}"),
        ([{"role": "cat", "content": "meow"}], "as its role one of"),
        ([USER, "the cat"], "no message of a chat: got 'the cat'"),
        ([USER, USER], "template refuses this chat: got .*roles must alternate"),
    ):
        with pytest.raises(cm.InvalidInput, match=message):
            cm.attention(model, given)
    with pytest.raises(cm.InvalidInput, match="prepend_bos has no meaning for a chat"):
        cm.attention(model, [USER], prepend_bos=True)
    opened = TEMPLATE.replace(" the{% endif %}", " is{% endif %}")
    monkeypatch.setattr(model.tokenizer, "chat_template", opened)
    with pytest.raises(cm.InvalidInput, match="no answer to the chat before it"):
        cm.log_prob_contributions(model, [USER, ASSISTANT])
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    with pytest.raises(cm.InvalidInput, match="Set model.tokenizer.chat_template"):
        cm.attention(model, [USER])
