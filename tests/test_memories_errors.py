"""Questions about memories that have no answer end in an error that says what to ask instead.

Without the type checker of the test run, as users ask them.
"""

from __future__ import annotations

import pytest
import unchecked

pytestmark = pytest.mark.once

_SETTING = """
import tempfile
from pathlib import Path
import numpy as np, torch, zoo
from asked import case_of
from test_mining import texts
import tl_contextmix as cm
from tl_contextmix.methods.memories import merge_triggers
from tl_contextmix.methods.memories import mine_on_ray
here = Path(tempfile.mkdtemp())
model, corpus = zoo.build(case_of("gpt2")), texts(20)
tokens = zoo.inputs(case_of("gpt2")).tokens
found = cm.mine_triggers(model, corpus, out=here / "done", k=3, tails="both")
one = cm.mine_triggers(model, ["cat"], out=here / "one", k=3)
some = cm.mine_triggers(model, corpus, out=here / "some", k=3, neurons=[3, 5])
inside, row = cm.ff_memories(model, tokens), cm.ff_values(model, layer=0, neurons=1)
padded = cm.ff_memories(model, ["the cat sat on a mat", "the cat"])
two = [cm.composition(model, corpus, active=active) for active in ("positive", "nonzero")]
def mine(**options):
    return cm.mine_triggers(model, ["the cat"], **{"out": here / "new", "k": 2, **options})
def ray(**options):
    return mine_on_ray(object, "corpus.txt", **{"out": here / "ray", **options})
"""
_NOTHING_WRITTEN = 'assert not (here / "new").exists() or not list((here / "new").iterdir())'
_REFUSED = {
    "mine(special='no')": "special: got 'no'; expected True or False",
    "mine(prepend_bos='no')": "prepend_bos: got 'no'; expected True or False",
    "mine(rank='0')": "rank: got '0'",
    "mine(rank=True, world_size=2)": "rank: got True",
    "mine(world_size=1.5)": "world_size: got 1.5",
    "mine(checkpoint_seconds='a')": "checkpoint_seconds: got 'a'",
    "mine(checkpoint_seconds=float('nan'))": "checkpoint_seconds: got nan",
    "mine(batch_size=0)": "batch_size: got 0",
    "mine(shard_size=2.5)": "shard_size: got 2.5",
    "mine(duplicates='merge')": "duplicates: got 'merge'; expected one of",
    "mine(unit=['prefix'])": "unit: got ['prefix']; expected one of",
    "mine(source=object())": "source: got <object",
    "mine(out=5)": "out: got 5; expected a path",
    "mine(out=None)": "out: got None; expected a path",
    "mine(out='a' + chr(0))": "; expected a path",
    "mine(column=['a'])": "column: got ['a']",
    "mine(k=10**12)": "so many triggers do not fit",
    "mine(k=10**30)": "k: got 10000",
    "mine(k=10**15)": "so many triggers do not fit",
    "mine(neurons=2.0)": "got 2.0",
    "mine(layer='1')": "layer: got '1'; expected an integer, several or None",
    "found.to_dataframe(layer=[0, 1])": "this is about one layer: got [0, 1]",
    "found.to_dataframe(neuron=[1])": "got neuron=[1]",
    "found.to_dataframe(neuron=5.0)": "got neuron=5.0",
    "found.to_dataframe(neuron=True)": "got neuron=True",
    "found.to_dataframe(tail=['positive'])": "no such tail",
    "found.examples([0, 1], 1)": "this is about one layer",
    "found.examples(None, 1)": "this is about one layer: got None",
    "found.examples(0, None)": "got neuron=None",
    "found.examples(0, 5, k=0)": "got k=0",
    "found.patterns([0, 1])": "this is about one layer",
    "some.patterns(0, [3, 7])": "no such neuron among these triggers: got 7",
    "found.agreement().by_max_prob(0)": "got bins=0",
    "found.removal(per_layer=-1)": "got per_layer=-1",
    "found.removal(k='a')": "got k='a'",
    "found.removal(seed='a')": "got seed='a'",
    "one.removal()": "no such trigger of two tokens or more",
    "one.agreement()": "no such trigger with a next token",
    "found.to_sheet(here / 'a.csv', per_layer=0)": "got per_layer=0",
    "found.to_jsonl(5)": "this is no path: got 5",
    "found.to_jsonl(here)": "cannot be written",
    "found.to_jsonl(here / 'no' / 'a.jsonl')": "cannot be written",
    "cm.load_triggers(5)": "folder: got 5; expected a path",
    "cm.load_triggers(here / 'done', corpus=5)": "got a int",
    "merge_triggers(5)": "out: got 5; expected a path",
    "merge_triggers(here / 'typo')": "got no part",
    "merge_triggers(here / 'typo', parts=str(here))": "expected a list of paths",
    "cm.ff_values(model, max_bytes='a')": "max_bytes: got 'a'",
    "cm.ff_values(model, max_bytes=0)": "max_bytes: got 0",
    "cm.ff_values(model, projection=['none'])": "projection: got ['none']",
    "row.tokens([0], 1)": "no readout of this value",
    "cm.ff_memories(model, tokens, active=['positive'])": "active: got ['positive']",
    "inside.top('a')": "got k='a'",
    "inside.top(-1)": "got k=-1",
    "inside.top(pos=[0, 1])": "one place on the pos axis is asked for: got [0, 1]",
    "inside.top(pos=99)": "got 99",
    "inside.top(11)": "not read what these memories promote: got k=11 at position ",
    "inside.top(1, pos=0)": "Call ff_memories with pos=0 and k=1, or with k=None",
    "cm.ff_memories(model, tokens, pos=9)": "there is no such position: got 9",
    "cm.ff_memories(model, tokens, k=0)": "k: got 0; expected an integer from 1",
    "padded.top(pos=6, batch=1)": "there are no memories at padding: got pos=6 of row 1",
    "cm.composition(model, corpus, too_long='x')": "too_long: got 'x'; expected one of",
    "cm.composition(model, corpus, malformed=5)": "malformed: got 5; expected one of",
    "cm.composition(model, corpus, seed='a')": "seed: got 'a'",
    "cm.composition(model, corpus, batch_size=0)": "batch_size: got 0",
    "two[0] + two[1]": "figures cannot be added up: got {'active': 'nonzero'",
    "ray(options=5)": "options: got 5; expected a Mapping or None",
    "ray(workers='a')": "workers: got 'a'",
    "ray(parts=0)": "parts: got 0",
    "ray(num_cpus=0)": "num_cpus: got 0",
    "ray(out=5)": "out: got 5; expected a path",
}
_ACCEPTED = {
    "found.to_dataframe(np.int64(1), np.int32(3)).neuron.unique().tolist()": "[3]",
    "found.to_dataframe(-1).layer.unique().tolist()": "[2]",
    "sorted({p.neuron for p in found.patterns(0, np.array([1, 2])).rows})": "[1, 2]",
    "(here / 'typo').exists()": "False",
    "[path.name for path in (here / 'no').parent.glob('.*.part')]": "[]",
    "padded.top(1, batch=1, layer=0).equals(padded.top(1, batch=1, layer=0, pos=2))": "True",
}


@pytest.fixture(scope="module")
def answers() -> dict[str, list[str]]:
    return unchecked.answers(_SETTING, *_REFUSED, *_ACCEPTED, after=_NOTHING_WRITTEN)


@pytest.mark.parametrize("code", _REFUSED)
def test_bad_questions_end_in_invalid_input(answers: dict[str, list[str]], code: str) -> None:
    error, message = answers[code]
    assert error == "InvalidInput", message
    assert _REFUSED[code] in message


@pytest.mark.parametrize("code", _ACCEPTED)
def test_what_may_be_asked_has_an_answer(answers: dict[str, list[str]], code: str) -> None:
    assert answers[code] == ["", _ACCEPTED[code]]
