"""LIT: TransformerLens' model of it with our fields, in LIT's own checks where it is installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

import tl_contextmix as cm
from tl_contextmix.reporting import lit_fields, lit_model

pytestmark = pytest.mark.once
TEXT = "the keys to the cabinet"


def test_without_lit_its_name_is_said():
    if find_spec("lit_nlp") is not None:
        pytest.skip("LIT is installed")
    with pytest.raises(cm.errors.ContextMixError, match="Install lit-nlp"):
        lit_model(cm.load_demo("causal-lm"))


def test_methods_that_lit_cannot_show_are_refused():
    model = cm.load_demo("causal-lm")
    with pytest.raises(cm.InvalidInput, match="Did you mean 'value_zeroing'"):
        lit_model(model, maps=["value_zeroin"])
    with pytest.raises(cm.InvalidInput, match="one of gradient_x_input"):
        lit_model(model, salience=["value_zeroing"])


def test_fields_have_the_numbers_of_the_methods(monkeypatch):
    """Those that are given to TransformerLens' wrapper, which is not needed for it."""
    given = {}
    monkeypatch.setattr(
        lit_fields, "lit_wrapper", lambda *args: given.update(zip(_TAKEN, args, strict=True))
    )
    model = cm.load_demo("causal-lm")
    lit_model(model, maps=["value_zeroing"], salience=["gradient_x_input"])
    maps = {f"Value Zeroing, layer {layer}": False for layer in range(4)}
    assert given["fields"] == {**maps, "Gradient times input": True}
    ids = model.to_tokens(TEXT)
    found = given["compute"](ids)
    map = cm.value_zeroing(model, ids).normalize()
    for layer, name in enumerate(maps):
        assert torch.equal(torch.as_tensor(found[name]), map.scores[0, layer, 0, -1])
    scores = cm.gradient_x_input(model, ids).scores
    assert torch.equal(torch.as_tensor(found["Gradient times input"]), scores[0, 0, 0, 0])


_TAKEN = ("model", "fields", "compute", "config")


def test_lit_takes_it():
    """LIT's own validation of what a model says it outputs and what it outputs."""
    pytest.importorskip("lit_nlp.api.model")
    from transformer_lens import lit

    model = cm.load_demo("causal-lm")
    made = lit_model(model)
    assert isinstance(made, getattr(lit, "TransformerLensLIT", lit.HookedTransformerLIT))
    (found,) = made.predict([{"text": TEXT}])
    spec = made.output_spec()
    assert set(found) == set(spec)
    for name in ("Attention norms, layer 3", "Value Zeroing, layer 0", "Gradient times input"):
        assert list(found[name].tokens) == found["tokens"]
        assert len(found[name].salience) == len(found["tokens"])
        assert spec[name].signed == (name == "Gradient times input")
        if not spec[name].signed:
            assert float(found[name].salience.sum()) == pytest.approx(1, abs=1e-5)


def test_lit_shows_it_as_salience_of_the_model():
    components = pytest.importorskip("lit_nlp.components.model_salience")
    made = lit_model(cm.load_demo("causal-lm"))
    interpreter = components.ModelSalience({"demo": made})
    assert interpreter.is_compatible(made, None)
    assert "demo:Gradient times input" in interpreter.meta_spec()
    (found,) = interpreter.run([{"text": TEXT}], made, None)
    assert {"Gradient times input", "Value Zeroing, layer 3"} <= set(found)
