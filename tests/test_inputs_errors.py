"""Bad input is named: what failed, the value seen, what was expected, what to do."""

from __future__ import annotations

import copy
import inspect
import re
from collections import UserDict
from typing import Any

import numpy
import pytest
import torch
import unchecked
import zoo
import zoo_build
from asked import case_of, keywords, view_of
from public import FUNCTIONS
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.adapters.inputs import Given, make_batch
from tl_contextmix.core import validation
from tl_contextmix.core.model_view import select_blocks

V, N_CTX = zoo.rows.D_VOCAB, zoo.rows.N_CTX
TOKENS = torch.tensor([[5, 6, 7]])


def mask(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)


# Input, further arguments, and a pattern that holds the value seen and the remedy.
BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty text": ("", {}, r"input is empty: got ''; .*Leave empty texts out"),
    "empty list": ([], {}, r"input is empty: got \[\]; .*Leave empty texts out"),
    "empty text in a list": (["a", ""], {}, r"input is empty: got \['a', ''\]; .*Leave empty"),
    "text without tokens": (
        " ",
        {"prepend_bos": False},
        r"no tokens: got ' '; .*let prepend_bos give it one",
    ),
    "id beyond the vocabulary": (
        torch.tensor([[5, V]]),
        {},
        rf"token id {V}; expected ids from 0 to {V - 1}.*tokenizer",
    ),
    "negative id": (torch.tensor([[5, -1]]), {}, r"got token id -1; expected ids from 0"),
    "float tokens": (
        TOKENS.float(),
        {},
        r"got a torch.float32 tensor .*expected integer.*Residuals are not",
    ),
    "truth values": (TOKENS.bool(), {}, r"got a torch.bool tensor .*expected integer"),
    "three axes": (TOKENS[None], {}, r"shape \(1, 1, 3\); expected shape \[batch, pos\].*Reshape"),
    "no axis": (torch.tensor(5), {}, r"shape \(\); expected shape \[batch, pos\].*Reshape"),
    "no tokens": (TOKENS[:, :0], {}, r"shape \(1, 0\); expected shape \[batch, pos\]"),
    "no rows": (TOKENS[:0], {}, r"shape \(0, 3\); expected shape \[batch, pos\]"),
    "too long": (
        torch.full((1, N_CTX + 1), 5),
        {},
        rf"got {N_CTX + 1} tokens; expected at most {N_CTX}.*Shorten the text",
    ),
    "too long a text": (
        "cat " * 40,
        {"prepend_bos": False},
        rf"got 40 tokens; expected at most {N_CTX}.*Shorten",
    ),
    "mask of another shape": (
        TOKENS,
        {"attention_mask": mask([1, 1])},
        r"tensor of shape \(1, 2\); expected .*shape \(1, 3\).*Give 1 for every real token",
    ),
    "mask for another batch": (
        TOKENS,
        {"attention_mask": mask([1, 1, 1], [1, 1, 1])},
        r"shape \(2, 3\); expected",
    ),
    "mask of attention": (
        TOKENS,
        {"attention_mask": torch.ones(1, 1, 3, 3)},
        r"shape \(1, 1, 3, 3\); expected",
    ),
    "mask with a two": (
        TOKENS,
        {"attention_mask": mask([1, 2, 1])},
        r"with the value 2; expected .*zeros and ones",
    ),
    "mask of log probabilities": (
        TOKENS,
        {"attention_mask": mask([0.0, -1e9, 0.0])},
        r"with the value -1000000000.0; expected .*zeros and ones",
    ),
    "mask with NaN": (
        TOKENS,
        {"attention_mask": mask([1.0, float("nan"), 1.0])},
        r"with the value nan; expected",
    ),
    "mask of zeros": (
        torch.cat([TOKENS, TOKENS]),
        {"attention_mask": mask([1, 1, 1], [0, 0, 0])},
        r"got row 1 of zeros; .*Leave the row out",
    ),
    "mask that calls padding real": (
        ["the cat sat", "paris"],
        {"attention_mask": torch.ones(2, 4), "prepend_bos": True},
        r"ones at the padding of a shorter text; .*Leave the mask out",
    ),
    "decoder of a model without one": (
        TOKENS,
        {"decoder_input": "cat"},
        r"got a str; expected None.*Leave it out",
    ),
    "no such layer": (TOKENS, {"layer": 99}, r"got 99; expected an integer from -3 to 2"),
    "no such layer from the end": (TOKENS, {"layer": -4}, r"got -4; expected an integer"),
    "no such layer among others": (TOKENS, {"layer": [0, 3]}, r"got 3; .*This stack has 3 layers"),
    "truth value as a layer": (TOKENS, {"layer": True}, r"got True; expected an integer"),
    "no layer": (TOKENS, {"layer": []}, r"got an empty list; .*Leave `layer` out"),
    "another stack": (
        TOKENS,
        {"stack": "encoder"},
        r"no such stack: got 'encoder'; expected one of \['decoder'\]",
    ),
    "no cross-attention": (TOKENS, {"stack": "cross"}, r"got 'cross'; .*Leave `stack` out"),
    "no budget": (TOKENS, {"max_bytes": 0}, r"max_bytes: got 0; expected an integer from 1\."),
    "a negative budget": (TOKENS, {"max_bytes": -5}, r"got -5; .*See help\(tl_contextmix\.att"),
    "heads behind their sum": (
        TOKENS,
        {"heads": True},
        r"got heads=True at \['block_out'\]; .*'attn_out' only",
    ),
    "no point": (TOKENS, {"at": []}, r"at least one point"),
}


def require_four_parts(message: str) -> None:
    """What failed: got the value; expected this. Do that."""
    failed, rest = message.split(": got ", 1)
    seen, rest = rest.split("; expected ", 1)
    assert failed.strip()
    assert seen.strip()
    assert ". " in rest
    assert message.endswith(".")


@pytest.mark.parametrize(("given", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_with_value_and_remedy(
    given: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(cm.InvalidInput, match=message) as raised:
        cm.attention_norms(zoo.shared(case_of("gpt2")), given, **options)
    require_four_parts(str(raised.value))


BAD_PAIRS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "one decoder text for two": (
        ["cat", "dog"],
        {"decoder_input": "cat"},
        r"got 2 and 1 rows; .*Give one decoder input per input",
    ),
    "two decoder rows for one": (
        TOKENS,
        {"decoder_input": torch.cat([TOKENS, TOKENS])},
        r"got 1 and 2 rows",
    ),
    "decoder id beyond the vocabulary": (
        TOKENS,
        {"decoder_input": torch.tensor([[V]])},
        rf"decoder_input .*got token id {V}",
    ),
    "empty decoder text": (TOKENS, {"decoder_input": ""}, r"decoder_input is empty: got ''"),
    "float decoder tokens": (
        TOKENS,
        {"decoder_input": TOKENS.float()},
        r"decoder_input .*got a torch.float32",
    ),
    "beginning of an encoder": (
        "cat",
        {"prepend_bos": False},
        r"got prepend_bos=False; .*Leave it out",
    ),
}


@pytest.mark.parametrize(("given", "options", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_bad_input_of_two_sides_is_refused(
    given: Any, options: dict[str, Any], message: str
) -> None:
    model = zoo.shared(next((c for c in zoo.cases() if c.encoder_decoder), None) or case_of("t5"))
    with pytest.raises(cm.InvalidInput, match=message) as raised:
        cm.attention_norms(model, given, **options)
    require_four_parts(str(raised.value))


# What annotations exclude: tests check those, users do not. So these calls are made elsewhere.

UNCHECKED: dict[str, tuple[str, str]] = {
    "None": ("None, {}", r"input cannot be read: got a NoneType; .*a str, a list of str"),
    "int": ("5, {}", r"input cannot be read: got a int; .*token ids \[batch, pos\]"),
    "bytes": ("b'cat', {}", r"got a bytes;"),
    "dict": ("{'ids': [1]}, {}", r"got a dict; .*what a tokenizer returns"),
    "rows of unequal length": ("[[5, 6], [7]], {}", r"got a list of list; .*Give rows of ids one"),
    "list with a None": ("['cat', None], {}", r"got a list of NoneType, str;"),
    "list of ids and texts": ("[5, 'cat'], {}", r"got a list of int, str;"),
    "generator": ("(t for t in ['cat']), {}", r"got a generator;"),
    "an argument of no model": (
        "collections.UserDict(input_ids=[[5, 6]], offset_mapping=[[0, 1]]), {}",
        r"takes no offset_mapping: got a torch.int64 tensor.*besides its id: .*Leave it out",
    ),
    "a pair for a decoder": (
        "[('the cat', 'a dog')], {}",
        r"pair of texts has no meaning.*got \('the cat', 'a dog'\); .*Join the two",
    ),
    "half a character": ("'\\ud800', {}", r"input .* read: got '\\ud800'; expected characters"),
    "mask as text": ("TOKENS, {'attention_mask': '111'}", r"attention_mask .*got a str;"),
    "switch as text": (
        "'cat', {'prepend_bos': 'no'}",
        r"prepend_bos cannot be read: got 'no'; expected True, False or None",
    ),
    "labels of numbers": ("TOKENS, {'labels': [1]}", r"labels do not name .*: got 1 of int;"),
    "labels that raise": (
        "TOKENS, {'labels': {}.__getitem__}",
        r"labels\(5\), which raises KeyError",
    ),
    "unknown side": (
        "['cat', 'a cat'], {'padding_side': 'lft'}",
        r"no such padding side: got 'lft'; expected one of .*Did you mean 'left'\?",
    ),
    "unknown side with tokens": ("TOKENS, {'padding_side': 1}", r"padding side: got 1;"),
    "unknown point": (
        "TOKENS, {'at': 'mlp_ot'}",
        r"cannot use this at: got 'mlp_ot'; expected one of .* or several\. Did you mean 'mlp_out'",
    ),
    "unknown point among others": ("TOKENS, {'at': ['mlp_in', 'x']}", r"got \['mlp_in', 'x'\];"),
    "unknown bias": ("TOKENS, {'bias': 'none'}", r"got 'none'; expected one of .*See help\(tl_con"),
    "unknown stack": ("TOKENS, {'stack': 'both'}", r"this stack: got 'both'; expected one of"),
    "layer as text": ("TOKENS, {'layer': '0'}", r"got '0'; expected an integer, several or None"),
    "layer between": ("TOKENS, {'layer': 0.5}", r"got 0\.5; expected an integer, several or None"),
    "layers of the wrong kind": ("TOKENS, {'layer': [0, None]}", r"layer: got \[0, None\]; exp"),
    "layers as a set": ("TOKENS, {'layer': {0}}", r"layer: got \{0\}; expected"),
    "layer that is too long": ("TOKENS, {'layer': 10**30}", r"got 10{30}; expected an integer"),
    "number as a switch": ("TOKENS, {'max_bytes': True}", r"got True; expected an integer from 1"),
    "budget as text": ("TOKENS, {'max_bytes': '1G'}", r"got '1G'; expected an integer from 1"),
    "cache that is none": ("TOKENS, {'cache': 3}", r"cache cannot be read: got a int; .*second"),
    "logits as cache": ("TOKENS, {'cache': TOKENS.float()}", r"cache cannot be read: got a torch"),
}


SETTING = """
import collections, numpy, zoo
from asked import case_of
from test_inputs_errors import TOKENS
import tl_contextmix as cm
model = zoo.build(case_of("gpt2"))
def ask(given, options):
    return cm.attention_norms(model, given, **options)
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, list[str]]:
    return unchecked.answers(SETTING, *(f"ask({given})" for given, _ in UNCHECKED.values()))


@pytest.mark.once
@pytest.mark.parametrize("name", UNCHECKED)
def test_what_annotations_exclude_is_refused_by_the_code_too(
    name: str, answers: dict[str, list[str]]
) -> None:
    given, expected = UNCHECKED[name]
    kind, message = answers[f"ask({given})"]
    assert kind == "InvalidInput", message
    assert re.search(expected, message), message
    require_four_parts(message)


# The model


def test_a_block_without_neurons_has_no_point_inside_of_them() -> None:
    found = [case for case in zoo.cases() if case.family == "attn_only"]
    for case in found:
        with pytest.raises(cm.InvalidInput, match=r"no mlp_out in layer 0.*'resid_post'"):
            cm.attention_norms(zoo.shared(case), TOKENS, at="mlp_out")
    assert bool(found) == (zoo.major() < 4)


def test_layers_may_be_any_integers() -> None:
    blocks = view_of(zoo.shared(case_of("gpt2"))).blocks()
    assert [block.layer for block in select_blocks(blocks, range(2))] == [0, 1]
    assert [block.layer for block in select_blocks(blocks, (2, -3))] == [2, 0]
    ask: Any = cm.attention
    for layer in (numpy.int64(-1), numpy.array([2]), torch.tensor(2), torch.tensor([2])):
        found = ask(zoo.shared(case_of("gpt2")), TOKENS, layer=layer)
        assert found.layers == (2,)
        assert type(found.layers[0]) is int


TOKENIZED: dict[str, Any] = {
    "list": [[5, 6, 7], [8, 9, 0]],
    "array": numpy.array([[5, 6, 7], [8, 9, 0]], dtype=numpy.int32),
    "tokenizer's": UserDict(input_ids=[[5, 6, 7], [8, 9, 0]], attention_mask=[[1] * 3, [1, 1, 0]]),
}


@pytest.mark.parametrize("name", TOKENIZED)
def test_ids_may_be_arrays_lists_and_what_a_tokenizer_returns(name: str) -> None:
    model, mask = zoo.shared(case_of("gpt2")), [[True] * 3, [True, True, False]]
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    expected = cm.attention_norms(model, ids, attention_mask=torch.tensor(mask))
    options: Any = {} if name == "tokenizer's" else {"attention_mask": numpy.array(mask)}
    found = cm.attention_norms(model, TOKENIZED[name], **options)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.target.mask, torch.tensor(mask))


def test_a_mask_that_is_given_counts_more_than_the_tokenizers() -> None:
    model, mask = zoo.shared(case_of("gpt2")), [[1, 1, 1], [1, 0, 0]]
    found = cm.attention(model, TOKENIZED["tokenizer's"], attention_mask=mask)
    assert found.target.mask.tolist() == [[True] * 3, [True, False, False]]


def test_a_decoders_ids_may_be_lists_too() -> None:
    case = next((c for c in zoo.cases() if c.encoder_decoder), None)
    if case is None:
        pytest.skip("no encoder-decoder under this version")
    model, said = zoo.shared(case), torch.tensor([[0, 6]])
    expected = cm.attention(model, TOKENS, decoder_input=said, stack="cross")
    for decoder_input in (said.tolist(), said.numpy(), UserDict(input_ids=said)):
        found = cm.attention(model, TOKENS.tolist(), decoder_input=decoder_input, stack="cross")
        assert torch.equal(found.scores, expected.scores)


# What is raised inside of a call


class Broken(Exception):
    """An error of the user's own."""


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt, Broken, TypeError])
def test_what_a_hook_raises_comes_out_as_it_is(error: type[BaseException]) -> None:
    model, raised = zoo.build(case_of("gpt2")), error("of my own")

    def hook(stream: Tensor, hook: Any) -> None:
        raise raised

    ask: Any = cm.attention_norms
    cm.check(model)
    name = view_of(model).blocks()[1].resid_in
    with model.hooks(fwd_hooks=[(name, hook)]), pytest.raises(error) as found:
        ask(model, TOKENS.numpy(), layer=numpy.int64(1), max_bytes=numpy.int32(2**20))
    assert found.value is raised


# Names of options


def test_an_option_that_is_not_there_is_refused_with_the_one_that_was_meant() -> None:
    ask: Any = cm.attention_norms
    for kind in (cm.InvalidInput, TypeError):
        with pytest.raises(kind, match=r"no such option: got padding_sid;.*mean 'padding_side'\?"):
            ask(None, "cat", padding_sid="left")
    with pytest.raises(TypeError, match=r"got colour;.*See help\(tl_contextmix\.attention_norms"):
        ask(None, "cat", colour="red")


def test_old_names_tell_the_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    face: Any = cm
    monkeypatch.setitem(validation.RENAMED, "attention_flows", "attention")
    monkeypatch.setitem(validation.RENAMED, "attention.per_head", "heads")
    with pytest.raises(AttributeError, match="attention_flows is now called attention"):
        face.attention_flows()
    with pytest.raises(TypeError, match="no such option: got per_head; .*now called heads"):
        face.attention(None, "cat", per_head=True)


def test_missing_arguments_are_told_in_pythons_own_words() -> None:
    ask: Any = cm.attention_norms
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'input'"):
        ask(None)
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3"):
        ask(None, "cat", "mlp_in")


def test_signatures_show_every_option_by_name() -> None:
    known = ["attention_mask", "prepend_bos", "padding_side", "decoder_input", "cache"]
    assert len(FUNCTIONS) > 10
    for function in FUNCTIONS.values():
        parameters = inspect.signature(function).parameters.values()
        assert all(one.kind is not one.VAR_KEYWORD for one in parameters), function
    shown = inspect.signature(cm.attention_norms).parameters
    assert [name for name in shown if name in known] == known
    assert shown["cache"].annotation == "Cache | None"
    assert "cache" not in inspect.signature(cm.gradient_x_input).parameters


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in zoo.cases()])
def test_weights_that_are_not_finite_are_named(case: zoo.Case) -> None:
    model = zoo.build(case)
    name, weight = list(model.named_parameters())[-3]
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            weight.view(-1)[0] = value
        with pytest.raises(cm.InvalidInput, match="is not finite") as raised:
            cm.attention_norms(model, zoo.inputs(case).tokens)
        assert f"the weight {name} is not finite" in str(raised.value)
        assert "Load the weights" in str(raised.value)


def test_uninitialised_weights_of_the_classes_that_leave_them() -> None:
    if zoo.major() == 4:
        pytest.skip("TransformerLens 4 has no HookedEncoder")
    from transformer_lens import HookedEncoder

    cfg = zoo.build(case_of("bert", host="HookedEncoder")).cfg
    with zoo_build.quiet():
        kind: Any = HookedEncoder  # its parameters depend on the version
        model = kind(cfg, zoo_build.load_tokenizer("bert"))
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(float("nan"))  # whatever was in memory
    with pytest.raises(cm.InvalidInput, match=r"HookedEncoder\(cfg\)"):
        cm.check(model)


BRIDGES = [
    pytest.param(case, id=case.id) for case in zoo.cases() if case.host == "TransformerBridge"
]


@pytest.mark.parametrize("case", BRIDGES)
def test_a_model_that_drops_activations_is_refused(case: zoo.Case) -> None:
    given = zoo.inputs(case)
    rates = [
        rate
        for module in zoo.shared(case).modules()
        for rate in (getattr(module, "p", 0.0), module.__dict__.get("dropout", 0.0))
        if isinstance(rate, float)
    ]
    for known in (False, True):
        model = zoo.build(case)
        if known:
            cm.check(model)
        model.train()
        if not max(rates, default=0):
            cm.check(model)  # nothing to drop
            continue
        with pytest.raises(cm.InvalidInput, match=r"got dropout 0.1 in .*model\.eval\(\)"):
            cm.attention_norms(model, given.tokens, **keywords(given))
        assert model.training


@pytest.mark.parametrize("known", [False, True])
def test_autocast_is_refused(known: bool) -> None:
    model = zoo.build(case_of("gpt2"), dtype=torch.float32)
    if known:
        cm.check(model)
    match = r"under autocast: got torch.autocast\('cpu', torch.bfloat16\).*Leave the autocast"
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(cm.InvalidInput, match=match):
        cm.attention_norms(model, TOKENS)


def test_activations_that_are_not_finite_are_named() -> None:
    model = zoo.build(case_of("gpt2"))
    block = view_of(model).blocks()[1]

    def overflow(stream: Tensor, hook: Any) -> Tensor:
        stream[:, 1] *= float("inf")
        return stream

    match = rf"not finite: got NaN or infinity in {block.resid_in}, at a real token; .*float32"
    with (
        model.hooks(fwd_hooks=[(block.resid_in, overflow)]),
        pytest.raises(cm.InvalidInput, match=match) as raised,
    ):
        cm.attention_norms(model, TOKENS)
    require_four_parts(str(raised.value))


def test_text_needs_a_tokenizer() -> None:
    model = zoo.build(case_of("gpt2"), tokenizer=False)
    cm.attention_norms(model, TOKENS)
    with pytest.raises(cm.InvalidInput, match=r"without a tokenizer; .*Pass a tensor") as raised:
        cm.attention_norms(model, "the cat")
    require_four_parts(str(raised.value))
    for case in zoo.cases():
        if case.encoder_decoder:
            view = view_of(model := zoo.build(case, tokenizer=False))
            with pytest.raises(cm.InvalidInput, match="without a tokenizer"):
                make_batch(view, Given(TOKENS, decoder_input="the cat"))
            del model


class Refused(cm.InvalidInput):
    """A user's own error, of four parts."""

    def __init__(self, failed: str, seen: str, expected: str, remedy: str) -> None:
        super().__init__(failed, seen, expected, remedy)


@pytest.mark.parametrize("kind", [Refused, cm.UnsupportedModel, cm.InvalidInput])
def test_errors_of_four_parts_come_back_from_another_process(kind: type[Exception]):
    error = copy.copy(kind("it failed", "this", "that", "Do it."))
    assert type(error) is kind
    assert str(error) == "it failed: got this; expected that. Do it."
