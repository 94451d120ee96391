"""The identity check sees wrong readings, says where, and runs only when something changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
import zoo_build
from asked import case_of, relative, view_of
from torch import Tensor, nn

import tl_contextmix as cm
from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.handles import Handle
from tl_contextmix.adapters.verification import (
    CheckRow,
    IdentityReport,
    check_rows,
    readout_row,
    run_probe,
    tolerance_of,
)
from tl_contextmix.adapters.verification.probe import relative_error
from tl_contextmix.core.activations import ACTIVATIONS
from tl_contextmix.core.blocks import Block
from tl_contextmix.core.experts import Experts
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.token_sums import Norm

CASES = [pytest.param(case, id=case.id) for case in zoo.cases()]

# Wrong readings of one block


def _change_weights(part: Any, changed: dict[str, Callable[[Any], Any]]) -> Any:
    read = part.weights

    def weights(name: str) -> Any:
        weight = read(name)
        return changed[name](weight) if name in changed and weight is not None else weight

    return replace(part, weights=weights)


def _tilt(weight: Tensor) -> Tensor:
    """A factor alone would vanish in a norm of the output."""
    return weight * torch.linspace(1, 1.01, weight.shape[-1], dtype=weight.dtype)


def _first_attention(block: Block, change: Callable[[Any], Any]) -> Block | None:
    changed = change(block.attentions[0])
    return None if changed is None else replace(block, attentions=(changed, *block.attentions[1:]))


def _feed_forward(block: Block, change: Callable[[Any], Any]) -> Block | None:
    changed = None if block.feed_forward is None else change(block.feed_forward)
    return None if changed is None else replace(block, feed_forward=changed)


def _experts(ff: Any, change: Callable[[Any], Any]) -> Any:
    """Changes every expert where there are some, else the sublayer."""
    if not isinstance(ff, Experts):
        return change(ff)
    return replace(ff, experts=tuple(map(change, ff.experts)))


def _norms(part: Any, change: Callable[[Norm], Norm]) -> Any:
    places = [name for name in ("norm_in", "norm_out", "norm_after") if getattr(part, name)]
    if not places:
        return None
    return replace(part, **{name: change(getattr(part, name)) for name in places})


def _without_bias(part: Any, name: str) -> Any:
    bias = part.weights(name)
    if bias is None or not bool(bias.any()):
        return None
    return _change_weights(part, {name: lambda weight: None})


def _other_activation(ff: Any) -> Any:
    if ff.activation is None:
        return None
    # The nearest one there is.
    near = {"gelu": "gelu_new", "gelu_new": "gelu", "silu": "quick_gelu", "relu": "relu2"}
    wrong = next(known for known in ACTIVATIONS if known.name == near[ff.activation.name])
    return _experts(ff, lambda one: replace(one, activation=wrong))


def _eps(norm: Norm) -> Norm:
    return replace(norm, eps=norm.eps + 1e-2)


def _gain(norm: Norm) -> Norm:
    gain = 1.0 if norm.weight is None else norm.weight
    return replace(norm, weight=gain * torch.ones(zoo.rows.D_MODEL, dtype=torch.float64) * 1.01)


WRONG: dict[str, Callable[[Block], Block | None]] = {
    "W_O": lambda block: _first_attention(
        block, lambda part: _change_weights(part, {"W_O": _tilt})
    ),
    "no b_O": lambda block: _first_attention(block, lambda part: _without_bias(part, "b_O")),
    "W_out": lambda block: _feed_forward(
        block, lambda part: _experts(part, lambda one: _change_weights(one, {"W_out": _tilt}))
    ),
    "no b_out": lambda block: _feed_forward(block, lambda part: _without_bias(part, "b_out")),
    "no b_in": lambda block: _feed_forward(block, lambda part: _without_bias(part, "b_in")),
    "norm eps": lambda block: _feed_forward(block, lambda part: _norms(part, _eps)),
    "norm gain": lambda block: _feed_forward(block, lambda part: _norms(part, _gain)),
    "activation": lambda block: _feed_forward(block, _other_activation),
    "parallel": lambda block: (
        None if block.feed_forward is None else replace(block, parallel=not block.parallel)
    ),
    "pattern": lambda block: _first_attention(
        block, lambda part: replace(part, pattern=part.pattern.replace(".0.", ".1."))
    ),
    "values": lambda block: _first_attention(
        block, lambda part: replace(part, value=part.value.replace(".0.", ".1."))
    ),
}


def _with_block(view: ModelView, stack: str, block: Block) -> ModelView:
    return replace(view, stacks={**view.stacks, stack: (block, *view.stacks[stack][1:])})


@pytest.mark.parametrize("case", CASES)
def test_every_wrong_reading_is_seen_and_placed(case: zoo.Case) -> None:
    model = zoo.shared(case)
    view = view_of(model)
    probe = run_probe(view)
    assert all(row.ok for row in check_rows(view, probe))
    seen = 0
    for stack in view.stacks:
        block = view.stacks[stack][0]
        for name, wrong in WRONG.items():
            changed = wrong(block)
            if changed is None:
                continue
            seen += 1
            rows = list(check_rows(_with_block(view, stack, changed), probe))
            failed = [row for row in rows if not row.ok]
            assert failed, name
            assert {row.where.split(" self")[0].split(" feed")[0] for row in failed} == {
                f"{stack} block 0"
            }, name
    assert seen >= 4


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_readout_is_seen(case: zoo.Case) -> None:
    model = zoo.shared(case)
    view = view_of(model)
    probe = run_probe(view)
    assert readout_row(view, probe).ok
    for wrong in ({"scale": view.readout.scale * 1.01}, {"soft_cap": 3.0}):
        assert not readout_row(replace(view, readout=replace(view.readout, **wrong)), probe).ok


def test_a_missing_bias_is_seen_beside_an_enormous_direction() -> None:
    # As GPT-2's first token, whose stream holds entries of 3000 while a block adds ten.
    model = zoo.build(case_of("gpt2"), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("W_pos", "wpe", "pos_embed")):
                weight[:, 3] = 3000.0
    view = view_of(model)
    probe = run_probe(view)
    # Measured: 6e-6 for the right reading, 3e-2 without the bias.
    assert all(row.ok for row in check_rows(view, probe))
    changed = WRONG["no b_O"](view.blocks()[0])
    assert changed is not None
    rows = check_rows(_with_block(view, "decoder", changed), probe)
    assert any(not row.ok and row.identity == "recomputed block = block output" for row in rows)


# From a wrong reading to the user


def _misread(monkeypatch: pytest.MonkeyPatch) -> None:
    """W_O is read up to one percent too large, everywhere."""
    right = Handle.weights

    def weights(self: Handle, *args: Any, **kwargs: Any) -> Any:
        read = right(self, *args, **kwargs)

        def tilted(name: str) -> Tensor | None:
            weight = read(name)
            return _tilt(weight) if name == "W_O" and weight is not None else weight

        return tilted

    monkeypatch.setattr(Handle, "weights", weights)


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_is_not_reproduced_is_refused_and_check_says_why(
    case: zoo.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = zoo.build(case), zoo.inputs(case)
    _misread(monkeypatch)
    report = cm.check(model)
    assert not report.ok
    assert any(row.ok for row in report.rows)
    for _ in range(2):  # an answer that is kept stays a refusal
        with pytest.raises(cm.UnsupportedModel, match="is not read correctly") as raised:
            cm.attention_norms(model, given.tokens)
        message = str(raised.value)
        worst = report.worst()
        assert worst.identity in message
        assert worst.where in message
        assert f"got a relative error of {worst.error:.2g}" in message
        assert f"expected at most {worst.tolerance:.0e}" in message
        assert "tl_contextmix.check(model)" in message


def test_mixed_values_that_are_not_of_the_pattern_are_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As hosts whose pattern hook is only shown: what is mixed is not what the pattern says.
    model = zoo.build(case_of("gpt2"))
    point = model.hook_dict["blocks.1.attn.hook_z"]
    monkeypatch.setattr(point, "forward", lambda mixed: mixed * 1.1)
    report = cm.check(model)
    failed = {(row.where, row.identity) for row in report.rows if not row.ok}
    failed -= {("GPT2LMHeadModel", "logits = Hugging Face's")}  # a bridge's, which mixes as ever
    place = "decoder block 1 self-attention"
    assert failed == {(place, "pattern @ v = z"), (place, "pattern @ v = z after zeroing a value")}


class Softened(nn.Module):
    """No function of one neuron: it divides by all of them."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the neurons."""
        return x * x.softmax(-1)


def test_an_unknown_activation_limits_the_model_and_no_more() -> None:
    case = case_of("gpt2")
    model, given = zoo.build(case), zoo.inputs(case)
    mlp = model.blocks[0].mlp
    if case.host == "HookedTransformer":
        mlp.act_fn = Softened()
    else:
        mlp.original_component.act = Softened()
    report = cm.check(model)
    assert report.ok
    assert "unknown feed-forward activation: got a relative error of" in report.limits[0]
    assert "unavailable" in str(report)
    cm.attention_norms(model, given.tokens, at="mlp_in")
    cm.attention_norms(model, given.tokens, at="block_out", layer=1)
    with pytest.raises(cm.UnsupportedModel, match=r"unknown feed-forward.*Use 'attn_out'"):
        cm.attention_norms(model, given.tokens, at="block_out")


def test_an_elementwise_activation_of_the_hosts_own_is_taken() -> None:
    case = case_of("gpt2", host="HookedTransformer")
    model, given = zoo.build(case), zoo.inputs(case)
    for block in model.blocks:
        block.mlp.act_fn = torch.sin
    found = cm.decompose(model, given.tokens, at="mlp_out")
    total = found.parts.sum(dim=3) + found.bias
    _, cache = model.run_with_cache(given.tokens)
    for layer in range(3):
        assert relative(total[:, layer], cache[f"blocks.{layer}.hook_mlp_out"]) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gelu", "gelu_new", "silu", "relu"])
def test_near_activations_are_told_apart(name: str, dtype: torch.dtype) -> None:
    if zoo.major() == 4:
        pytest.skip("TransformerLens 4 builds no HookedTransformer")
    with zoo_build.quiet():
        options = {"act_fn": name, "normalization_type": "LN"}
        model = zoo_build.config_built(options, dtype=dtype, seed=0)
    ff = view_of(model).blocks()[0].feed_forward
    assert ff.require_activation().name == name


# When it runs


class Counter:
    """Counts the forward passes of a model."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes = 0
        run = type(model).run_with_hooks

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.passes += 1
            return run(*args, **kwargs)

        monkeypatch.setattr(type(model), "run_with_hooks", counted)

    def since(self, call: Callable[[], Any]) -> int:
        """How many passes a call makes."""
        before = self.passes
        call()
        return self.passes - before


@pytest.mark.parametrize("case", CASES)
def test_the_check_runs_once_and_again_when_a_weight_has_changed(
    case: zoo.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.build(case)
    count = Counter(model, monkeypatch)
    assert count.since(lambda: as_view(model)) == 1
    assert count.since(lambda: as_view(model)) == 0
    assert count.since(lambda: cm.check(model)) == 0
    matrix = next(weight for weight in model.parameters() if weight.ndim == 2)
    with torch.no_grad():
        matrix[3, 5] += 1e-3  # no sampled entry
    assert count.since(lambda: as_view(model)) == 1
    vector = [weight for weight in model.parameters() if weight.ndim == 1][-1]
    before = as_view(model).fingerprint
    vector.data[3] += 1e-3  # past PyTorch's counter
    assert count.since(lambda: as_view(model)) == 1
    assert as_view(model).fingerprint != before
    model.load_state_dict({**model.state_dict()})
    assert count.since(lambda: as_view(model)) == 1
    assert count.since(lambda: as_view(model)) == 0


def test_a_view_reads_the_norms_of_now() -> None:
    case = case_of("llama")
    model, given = zoo.build(case), zoo.inputs(case)
    before = cm.attention_norms(model, given.tokens, at="mlp_in").scores
    for name, weight in model.named_parameters():
        if "ln2" in name or "post_attention_layernorm" in name:
            weight.data *= 2
    after = cm.attention_norms(model, given.tokens, at="mlp_in", layer=0).scores
    assert torch.allclose(after[:, 0], before[:, 0] * 2, rtol=1e-9)


# What is reported


def test_report_sorts_prints_tabulates_shows_and_saves(tmp_path: Any) -> None:
    rows = (
        CheckRow("a = b", "decoder block 0", 1e-7, 1e-4),
        CheckRow("c = d", "decoder block 1", float("nan"), 1e-4),
        CheckRow("e = f", "decoder block 2", 0.5, 1e-4),
    )
    report = IdentityReport("tiny (HookedTransformer)", rows, limits=("no readout",))
    assert [row.ok for row in rows] == [True, False, False]
    assert not report.ok
    assert report.worst() is rows[1]
    assert "FAIL" in str(report)
    assert "unavailable: no readout" in str(report)
    assert list(report.to_dataframe()["ok"]) == [True, False, False]
    assert "no readout" in report.panels()[0].caption
    path = report.save(tmp_path / "report.safetensors")
    again = IdentityReport.load(path)
    assert again.limits == report.limits
    assert dataclasses.asdict(again.rows[2]) == dataclasses.asdict(rows[2])


def test_tolerance_is_that_of_the_coarsest_weights() -> None:
    cpu = torch.device("cpu")
    assert tolerance_of({torch.float64}, cpu) == 1e-5
    assert tolerance_of({torch.float64, torch.float32}, cpu) == 1e-4
    assert tolerance_of({torch.bfloat16, torch.float32}, cpu) == 8e-2
    assert tolerance_of({torch.uint8}, cpu) == 1e-4


@pytest.mark.parametrize("way", ["old", "new"])
def test_tensor_floats_widen_the_tolerance_on_a_gpu(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda")
    assert tolerance_of({torch.float32}, gpu) == 1e-4
    matmul = torch.backends.cuda.matmul
    if way == "new" and not hasattr(matmul, "fp32_precision"):
        pytest.skip("this PyTorch has the old switch only")
    try:
        if way == "new":
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        assert tolerance_of({torch.float32}, gpu) == 2e-2
        assert tolerance_of({torch.float64}, gpu) == 1e-5
    finally:
        if way == "new":
            matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")


def test_relative_error_counts_real_positions_by_their_size() -> None:
    expected = torch.tensor([[[1.0], [100.0], [7.0]]])
    value = expected + torch.tensor([[[0.1], [0.1], [5.0]]])
    real = torch.tensor([[True, True, False]])
    assert relative_error(value, expected, real=real) == pytest.approx(1e-3, rel=1e-4)
    assert relative_error(value, expected, size=expected, real=real) == pytest.approx(0.1, rel=1e-4)
    assert relative_error(value, expected[:, :2]) != relative_error(value, expected[:, :2])
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
