"""What is cited: entries that BibTeX reads, for what was really used."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest
import torch
from hand_built import map_of
from public import FUNCTIONS

import tl_contextmix as cm
from tl_contextmix.engine.citations import ROLLOUT, references
from tl_contextmix.engine.registry import methods
from tl_contextmix.results import ContextMap, Provenance

pytestmark = pytest.mark.once

TOOLS = ["nanda2022transformerlens", "cooney2023circuitsvis"]
ENTRY = re.compile(r"@(?:inproceedings|misc)\{(\w+),\n((?:  \w+ = \{.+\},\n)+)\}")


def keys(text: str) -> list[str]:
    found = ENTRY.findall(text)
    # Nothing but entries: what is not matched would be lost on BibTeX.
    assert ENTRY.sub("", text).split() == []
    return [key for key, _ in found]


def a_map(**options: object) -> ContextMap:
    """A map of two tokens that says it comes from `attention_norms`."""
    asked = {"at": "block_out", **options}
    made = Provenance("attention_norms", asked, "m", "h", "4", "0", (), "f")
    return map_of(torch.eye(2), provenance=made)


def test_everything_is_cited_without_arguments():
    assert keys(cm.cite()) == list(references())


def test_entries_are_ascii_and_whole():
    text = cm.cite()
    assert text.isascii()
    assert r"Grzegorz Chrupa{\l}a" in text
    assert r"Gerard I. G{\'a}llego" in text
    assert r"Costa-juss{\`a}" in text
    for key, fields in ENTRY.findall(text):
        assert fields.count("{") == fields.count("}"), key
        names = re.findall(r"^  (\w+) = ", fields, re.MULTILINE)
        assert {"title", "author", "year"} <= set(names), key
        assert {"eprint", "doi", "howpublished"} & set(names), key
        year = re.search(r"year = \{(\d{4})\}", fields)
        assert year, key
        assert year[1] in key


def test_methods_and_functions_are_cited_once_in_order():
    used = keys(cm.cite("decoder_lens", cm.value_zeroing, "decoder_lens"))
    assert used == ["langedijk2024decoderlens", "mohebbi2023quantifying", *TOOLS]


def test_options_of_a_result_count():
    norms = [key for key in references() if key.startswith("kobayashi")]
    assert keys(cm.cite(a_map(at="attn_out"))) == [*norms[:1], *TOOLS]
    assert keys(cm.cite(a_map(at="resid_mid"))) == [*norms[:2], *TOOLS]
    assert keys(cm.cite(a_map())) == [*norms, *TOOLS]
    assert keys(cm.cite(a_map().rollout())) == [*norms, "modarressi2022globenc", *TOOLS]
    added = a_map().rollout(add_identity=True)
    assert keys(cm.cite(added)) == [*norms, "abnar2020quantifying", *TOOLS]


@pytest.mark.parametrize("name", methods())
def test_a_result_cites_what_its_method_cites(name: str):
    found = a_map()
    origin = dataclasses.replace(found.provenance, method=name)
    assert keys(cm.cite(dataclasses.replace(found, provenance=origin))) == keys(cm.cite(name))


def test_a_rollout_through_the_encoder_is_cited(decoder_rollout):
    assert "ferrando2022towards" in keys(cm.cite(decoder_rollout))


@pytest.fixture
def decoder_rollout() -> ContextMap:
    """A rolled-out map over a decoder's tokens and the encoder's."""
    found = a_map(rollout=True, add_identity=False)
    both = found.source.cat(found.source)
    return dataclasses.replace(found, scores=torch.ones(1, 1, 1, 2, 4), source=both)


def test_every_public_method_has_its_sources():
    no_method = {
        *("check", "cite", "demo_pairs", "estimate", "load_demo", "load_minimal_pairs"),
        *("hook_names", "load_model", "load_triggers", "merge_triggers", "report"),
    }
    assert set(FUNCTIONS) - set(methods()) == no_method
    assert set(methods()) <= set(FUNCTIONS)
    assert all(
        inspect.unwrap(FUNCTIONS[name]) is known.function for name, known in methods().items()
    )
    cited = {key for known in methods().values() for key in known.sources()}
    assert cited | {*TOOLS, *ROLLOUT} == set(references())


@pytest.mark.parametrize("wrong", ["logit_lens", print])
def test_what_is_no_method_is_refused(wrong):
    with pytest.raises(cm.InvalidInput, match="there is nothing to cite: got .* or one of"):
        cm.cite(wrong)
