"""Classifiers of texts and of tokens: their classes are what is asked about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
import zoo_build
import zoo_others
from asked import FLOAT32_INSIDE, relative, words
from test_value_zeroing import literal
from zoo_configs import BERT_LIKE

import tl_contextmix as cm

pytestmark = [pytest.mark.newest, pytest.mark.once]
NAMES = ("calm", "angry", "glad")
OPTIONS: dict[str, dict[str, Any]] = {
    "Bert": BERT_LIKE,
    "Roberta": {**BERT_LIKE, "pad_token_id": 1},
    **{name: row.sizes | row.options for name, row in zoo_others.ENCODERS.items()},
}
OPTIONS["EuroBert"] = OPTIONS["EuroBert"] | {"classifier_pooling": "bos"}


def classifier(name: str, of: str = "Sequence", **options: Any) -> Any:
    """A random classifier in memory."""
    names = f"{name}For{of}Classification", f"{name}Config"
    options = OPTIONS[name] | {"num_labels": len(NAMES)} | options
    hf = zoo_build.hugging_face(*names, options, dtype=torch.float64, seed=0)
    if hf.config.num_labels == len(NAMES):
        hf.config.id2label = dict(enumerate(NAMES))
        hf.config.label2id = {label: index for index, label in enumerate(NAMES)}
    return hf


def read(hf: Any) -> Any:
    """The classifier, to be asked."""
    return cm.load_model(hf, tokenizer=zoo_build.load_tokenizer("bert"))


@pytest.mark.parametrize("of", ["Sequence", "Token"])
@pytest.mark.parametrize("name", OPTIONS)
def test_log_probabilities_of_classes_are_hugging_faces(name: str, of: str) -> None:
    if of == "Token" and name not in ("Bert", "ModernBert", "EuroBert"):
        pytest.skip("the same head as BERT's")
    hf, tokens = classifier(name, of), words(6)
    with torch.no_grad():
        own = hf(tokens).logits
    where: dict[str, Any] = {} if of == "Sequence" else {"pos": 3}
    said = (own if of == "Sequence" else own[:, 3]).log_softmax(dim=-1)
    model = read(hf)
    assert cm.check(model).ok
    scores = cm.log_prob_contributions(model, tokens, target="angry", **where)
    limit = FLOAT32_INSIDE if name in ("ModernBert", "EuroBert") else 1e-10
    assert relative(scores.trajectory[:, -1], said[:, 1]) <= limit
    assert scores.pos.tolist() == [where.get("pos", 0)] * 2
    best = cm.log_prob_contributions(model, tokens, **where)
    assert relative(best.log_prob, said.amax(dim=-1)) <= limit
    with torch.no_grad():
        again = hf(tokens).logits
    assert relative(again, own) <= limit  # what it was made of answers as before


def test_gradients_are_those_of_the_class() -> None:
    hf, tokens = classifier("Bert"), words(6)
    read_by_blocks: list[torch.Tensor] = []

    def keep(module: Any, given: Any, found: torch.Tensor) -> torch.Tensor:
        read_by_blocks.append(found.detach().requires_grad_())
        return read_by_blocks[-1]

    handle = hf.bert.embeddings.register_forward_hook(keep)
    logits = hf(tokens).logits
    handle.remove()
    (gradient,) = torch.autograd.grad((logits[:, 2] - logits[:, 0]).sum(), read_by_blocks)
    expected = (gradient * read_by_blocks[0].detach()).norm(dim=-1)
    model = read(hf)
    found = cm.gradient_x_input(model, tokens, target="glad", foil="calm")
    assert relative(found.scores.flatten(), expected.flatten()) <= 1e-10
    assert found.target.strings == (("glad",),) * 2


def test_value_zeroing_and_memories_are_of_the_same_encoder() -> None:
    model, tokens = read(classifier("Bert")), words(6)
    zeroed = cm.value_zeroing(model, tokens).scores[:, :, 0]
    assert relative(zeroed, literal(model, zoo.Inputs(tokens))[1]) <= 1e-10
    tops = cm.ff_memories(model, tokens)
    with torch.no_grad():
        assert torch.equal(tops.final_top, model(tokens).argmax(dim=-1))
    heads = cm.log_prob_contributions(model, tokens[:1], by="head")
    out = cm.knockout(model, tokens[:1], heads=heads.top(1))
    assert float(out.before[0, 0]) == pytest.approx(float(heads.log_prob[0]), abs=1e-10)


def test_a_folder_is_read_with_its_head_and_its_names(tmp_path: Path) -> None:
    hf, text = classifier("DistilBert").float(), "the dog runs"
    hf.save_pretrained(tmp_path)
    tokenizer = zoo_build.load_tokenizer("bert")
    tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        said = hf(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits
    model = cm.load_model(tmp_path)
    found = cm.log_prob_contributions(model, text)
    assert found.asked() == f"'{NAMES[int(said.argmax())]}'"
    torch.testing.assert_close(found.log_prob, said.log_softmax(dim=-1).amax(dim=-1))


def test_what_is_no_class_is_refused_by_name() -> None:
    model = read(classifier("Bert"))
    with pytest.raises(cm.InvalidInput, match=r"no class is called that.*'bored'.*'angry'"):
        cm.gradient_x_input(model, words(6), target="bored")
    with pytest.raises(cm.InvalidInput, match=r"ids from 0 to 2"):
        cm.gradient_x_input(model, words(6), target=3)
    with pytest.raises(cm.InvalidInput, match=r"which token's class is meant.*Give pos="):
        cm.gradient_x_input(read(classifier("Bert", "Token")), words(6), target="glad")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mean": (
        "ModernBert",
        {"classifier_pooling": "mean"},
        r"first token.*classifier_pooling='mean",
    ),
    "late": ("EuroBert", {"classifier_pooling": "late"}, r"first token.*classifier_pooling='late"),
    "regression": ("Bert", {"num_labels": 1}, r"one class of several.*num_labels=1"),
    "several": (
        "Bert",
        {"problem_type": "multi_label_classification"},
        r"one class of several.*multi_label",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_answer_that_is_no_class_of_one_token_is_refused(kind: str) -> None:
    name, options, match = REFUSED[kind]
    with pytest.raises(cm.UnsupportedModel, match=match):
        read(classifier(name, **options))
