"""The contract of `test_conformance.py` on families that are not in the zoo: one row for each.

All of it at once and one model per family, as the hosts are the same and every method has been
through it in its parts.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import test_conformance as contract
import torch
import zoo
import zoo_build
import zoo_others
from asked import FLOAT32_INSIDE, relative, state
from test_families import given

import tl_contextmix as cm

pytestmark = pytest.mark.once
MIXTURES = (
    *("qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "glm4_moe", "llama4_text", "deepseek_v2"),
    *("deepseek_v3", "ernie4_5_moe", "flex_olmo", "switch_transformers"),
)
KINDS = ("youtu", "qwen3_5_text", "granite", "t5gemma")
PAIRS = ("switch_transformers", "t5gemma")
HYBRIDS = tuple(f"{kind}, hybrid" for kind in zoo_others.HYBRIDS)
ENDINGS = ("gemma4_text, ending",)
MASKED = tuple(zoo_others.ENCODERS)
FAMILIES = (*MIXTURES, *KINDS, *HYBRIDS, *ENDINGS, *MASKED)
# What needs the tokens of all layers, and says so.
OF_ALL_LAYERS = {"decompx", "attention_flow", "alti"}
# In each layer of Falcon-H1 a state space writes beside attention: maps are of attention alone.
BESIDE, BEYOND = "falcon_h1, hybrid", {"globenc", "mixing_ratio", "token_memory"}
ROWS = [
    pytest.param(zoo.Case(family, "TransformerBridge"), tuple(contract.METHODS), id=family)
    for family in FAMILIES
    if zoo.major() >= 4
]


@functools.cache
def built(family: str) -> Any:
    """A model that no test changes."""
    kind, _, how = family.partition(", ")
    if how in ("hybrid", "ending"):
        told: dict[str, Any] = {how: True}
        return zoo_others.build(kind, **told)
    if kind not in zoo_others.ENCODERS:
        return zoo_others.build(kind)
    row = zoo_others.ENCODERS[kind]
    names = f"{kind}ForMaskedLM", f"{kind}Config"
    hf = zoo_build.hugging_face(*names, row.sizes | row.options, dtype=torch.float64, seed=0)
    assert row.tokenizer is not None
    return cm.load_model(hf, tokenizer=zoo_build.load_tokenizer(row.tokenizer))


def inputs(family: str, rows: slice = slice(None)) -> zoo.Inputs:
    """Two sentences, or one of them."""
    tokens = given().tokens[rows]
    return zoo.Inputs(tokens, tokens[:, 2:6] if family in PAIRS else None)


def options(method: contract.Method, family: str) -> dict[str, Any]:
    """What is asked differently of a family."""
    name = method.name
    if family == BESIDE and method.pointed:
        return {"layer": [1], "at": "attn_out"}
    if family in HYBRIDS and (method.stacked or name == "attention_knockout"):
        return {"layer": [1]}
    if family in HYBRIDS and name == "knockout":
        return {"heads": [(1, 1)]}
    # Layers may be of unlike width.
    return {"layer": [-1]} if name in ("ff_memories", "token_memory") else {}


@pytest.mark.parametrize(("case", "methods"), ROWS)
def test_a_family_meets_the_contract(
    case: zoo.Case, methods: tuple[contract.Method, ...], tmp_path: Path
) -> None:
    family, model = case.family, built(case.family)
    contract.ask(methods[0], model, case, inputs(family), **options(methods[0], family))
    before = state(model)
    for method in methods:
        asked = functools.partial(contract.ask, method, model, case, **options(method, family))
        beyond = OF_ALL_LAYERS | BEYOND if family == BESIDE else OF_ALL_LAYERS
        if family in HYBRIDS and method.name in beyond:
            with pytest.raises(cm.UnsupportedModel, match=r"Ask for (layer=\[1\]|at='attn_out')"):
                contract.ask(method, model, case, inputs(family))
            continue
        found = asked(inputs(family))
        values = method.values(found)
        assert type(found) is method.kind, method.name
        assert values.dtype == torch.float64, method.name
        assert bool(values.isfinite().all()), method.name
        one = method.values(asked(inputs(family, slice(1, 2))))
        assert relative(one, values[1:]) <= FLOAT32_INSIDE, method.name
        again = method.kind.load(found.save(tmp_path / "result.safetensors"))
        assert torch.equal(method.values(again), values), method.name
        numbers = values.norm(dim=-1) if method.name == "decompose" else values
        frame = found.to_dataframe()
        if "source_token" in frame:
            frame = frame[frame.source_token != "(sink)"]
        assert frame[method.column].sum() == pytest.approx(float(numbers.sum()), rel=1e-9), (
            method.name
        )
    assert state(model) == before
