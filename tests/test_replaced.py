"""A module, function or setting replaced after the first question is seen, and so is its return."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import zoo
from asked import case_of, keywords, relative, stacks, view_of
from torch import Tensor, nn

import tl_contextmix as cm

FAMILIES = ("gpt2", "llama", "bert", "t5")
CASES = [case for case in zoo.cases() if case.family in FAMILIES]
TOLERANCE = 1e-5  # that of the check of identities; a stale answer is off by .01 and more
Undo = Callable[[], None]


class Spliced(nn.Module):
    """What an SAE does at a hook point: another module in its place."""

    def forward(self, x: Tensor) -> Tensor:
        """Halves it."""
        return 0.5 * x


class Around(nn.Module):
    """Another module where one was, with all that it has."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Halves what the module returns."""
        return halved(self.module(*args, **kwargs))


def halved(found: Any) -> Any:
    return (0.5 * found[0], *found[1:]) if isinstance(found, tuple) else 0.5 * found


def first_block(model: Any) -> Any:
    name = next(name for name in ("blocks", "encoder_blocks", "encoder") if name in model._modules)
    return model._modules[name][0]


def own(module: Any) -> Any:
    """The module that a bridge wraps, which is the one that computes."""
    wrapped = module._modules.get("_original_component")
    return module if wrapped is None else wrapped


def put(parent: nn.Module, name: str, module: nn.Module) -> Undo:
    before = parent._modules[name]
    parent._modules[name] = module
    return lambda: parent._modules.update({name: before})


def set_attribute(module: Any, name: str, value: Any) -> Undo:
    before = module.__dict__[name]
    module.__dict__[name] = value
    return lambda: module.__dict__.update({name: before})


def hook_point(model: Any) -> Undo:
    block = first_block(model)
    if hasattr(model, "original_model"):
        # A layer of BERT calls the two halves that a bridge of 3.x joins in `mlp`, never `mlp`
        # itself: what fires is the hook point of the second half, which is `hook_mlp_out`, too.
        halves = zoo.major() == 3 and hasattr(own(block), "feed_forward_chunk")
        return put(block.mlp.out if halves else block.mlp, "hook_out", Spliced())
    return put(block, "hook_mlp_out", Spliced())


def submodule(model: Any) -> Undo:
    block = first_block(model)
    if not hasattr(model, "original_model"):
        return put(block, "ln1", Around(block.ln1))
    # A bridge's own modules are in the places of those they wrap.
    parent, name = next(
        (parent, name)
        for parent in own(block).modules()
        for name, child in parent._modules.items()
        if child is block.ln1
    )
    return put(parent, name, Around(block.ln1))


def subclass(model: Any) -> Undo:
    norm = first_block(model).ln1
    before = type(norm)
    forward = {"forward": lambda self, *args: 0.5 * before.forward(self, *args)}
    object.__setattr__(norm, "__class__", type(before.__name__, (before,), forward))
    return lambda: object.__setattr__(norm, "__class__", before)


def forward_of_an_instance(model: Any) -> Undo:
    module = own(first_block(model).mlp)
    before = module.forward
    module.forward = lambda *args, **kwargs: halved(before(*args, **kwargs))
    return lambda: delattr(module, "forward")


def forward_of_a_class(model: Any) -> Undo:
    kind = type(first_block(model).ln1)
    before = kind.forward
    kind.forward = lambda self, *args, **kwargs: halved(before(self, *args, **kwargs))
    return lambda: setattr(kind, "forward", before)


def activation(model: Any) -> Undo:
    mlp = first_block(model).mlp
    if "act_fn" in mlp.__dict__:
        return set_attribute(mlp, "act_fn", torch.tanh)
    for module in (own(mlp), own(first_block(model))):
        for name in ("act", "act_fn", "activation_fn", "intermediate_act_fn"):
            if name in module._modules:
                return put(module, name, nn.Tanh())
            if name in module.__dict__:
                return set_attribute(module, name, torch.tanh)
    pytest.skip("an activation elsewhere")


def parameter(model: Any) -> Undo:
    for module in own(first_block(model).mlp).modules():
        for name, one in module._parameters.items():
            if one is not None and one.ndim == 1:
                module._parameters[name] = nn.Parameter(one.detach() + 0.5)
                return partial(module._parameters.update, {name: one})
    pytest.skip("no biases")


def scalar(model: Any) -> Undo:
    norm, undos = first_block(model).ln1, []
    for holder in (own(norm), norm.__dict__.get("config")):
        for name in ("eps", "variance_epsilon"):
            if name in getattr(holder, "__dict__", {}):
                undos.append(set_attribute(holder, name, 0.5))

    def undo() -> None:
        for one in undos:
            one()

    return undo


def config_entry(model: Any) -> Undo:
    if type(model).__name__ != "HookedTransformer":
        pytest.skip("of HookedTransformer alone")
    return set_attribute(model.cfg, "parallel_attn_mlp", not model.cfg.parallel_attn_mlp)


WAYS = (
    hook_point,
    submodule,
    subclass,
    forward_of_an_instance,
    forward_of_a_class,
    activation,
    parameter,
    scalar,
    config_entry,
)


def answer(model: Any, case: zoo.Case) -> list[Tensor] | None:
    """The maps, after every sum of parts was found to be the model's own; None if refused."""
    given, found = zoo.inputs(case), []
    try:
        for stack in stacks(case):
            blocks = view_of(model).blocks(stack)
            asked = {"stack": stack, **keywords(given)}
            parts = cm.decompose(model, given.tokens, at="block_out", **asked)
            kept: list[Tensor] = []

            def keep(value: Tensor, hook: Any, kept: list[Tensor] = kept) -> None:
                kept.append(value)

            hooks = [(block.resid_out, keep) for block in blocks]
            with torch.no_grad():
                model.run_with_hooks(given.tokens, fwd_hooks=hooks, **keywords(given))
            assert relative(parts.total(), torch.stack(kept, dim=1)) <= TOLERANCE
            found.append(parts.parts)
    except cm.UnsupportedModel:
        return None
    return found


def report_ok(model: Any) -> bool:
    try:
        return cm.check(model).ok
    except cm.UnsupportedModel:
        return False


def same(some: list[Tensor] | None, others: list[Tensor] | None) -> bool:
    assert some is not None
    assert others is not None
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


# Two stacks take four times as long as one, and hold nothing that one does not.
TRIED = [
    pytest.param(case, way, id=f"{case.id}-{way.__name__}")
    for case in CASES
    for way in WAYS
    if not case.encoder_decoder or way in (submodule, activation)
]


@pytest.mark.parametrize(("case", "way"), TRIED)
def test_what_is_replaced_is_seen_and_what_is_put_back_too(
    case: zoo.Case, way: Callable[[Any], Undo]
) -> None:
    model, given = zoo.build(case), zoo.inputs(case)
    first, logits = answer(model, case), zoo.logits(model, given)
    undo = way(model)
    try:
        assert relative(zoo.logits(model, given), logits) > 1e-3
        found, ok = answer(model, case), report_ok(model)
        assert found is None or not same(found, first)
        # Nothing but numbers is another.
        assert found is not None or way is not parameter
        fresh = zoo.build(case)
        undo_fresh = undo if way is forward_of_a_class else way(fresh)
        # As a model that was never asked before.
        assert (answer(fresh, case) is None, report_ok(fresh)) == (found is None, ok)
        # Read right, but one of its blocks has no answer, or what is spliced in was left out.
        report = cm.check(model) if ok else None
        assert found is not None or report is None or report.limits or report.hooked
    finally:
        undo()
    assert torch.equal(zoo.logits(model, given), logits)
    assert same(answer(model, case), first)
    assert report_ok(model)
    if undo_fresh is not undo:
        undo_fresh()
    assert same(answer(fresh, case), first)


def test_what_runs_in_a_bridge_is_seen_where_it_is_none_of_its_modules() -> None:
    model = zoo.build(case_of("gpt2", host="TransformerBridge"))
    assert not view_of(model).readout.refusal
    holder = model.original_model.transformer
    assert holder not in set(model.modules())
    before = holder.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        found = before(*args, **kwargs)
        found[0].mul_(0.5)
        return found

    holder.forward = forward
    assert "readout" in view_of(model).readout.refusal
    del holder.forward
    assert not view_of(model).readout.refusal


def test_a_reading_is_kept_whatever_passes_leave_on_a_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[Any] = []
    for case in CASES:
        model, given = zoo.build(case), zoo.inputs(case)
        view_of(model)
        with monkeypatch.context() as patch:
            patch.setattr(
                "tl_contextmix.adapters.views.build", lambda facts, _: built.append(facts)
            )
            for mask in (None, torch.ones_like(given.tokens)):
                cm.attention_norms(
                    model,
                    given.tokens,
                    attention_mask=mask,
                    stack=stacks(case)[-1],
                    **keywords(given),
                )
            model.run_with_cache(given.tokens, **keywords(given))
            first_block(model)._left_by_a_pass = torch.zeros(1)
            with model.hooks(fwd_hooks=[(view_of(model).blocks()[0].resid_in, lambda x, hook: x)]):
                view_of(model)
            cm.check(model)
    assert built == []


@pytest.mark.parametrize("size", [0, 2**26], ids=["large model", "small model"])
def test_weights_that_change_in_place_are_read_anew(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tensor in the same place, in another order or with other entries."""
    monkeypatch.setattr("tl_contextmix.adapters.views._KEPT_BYTES", size)
    case = case_of("gpt2")
    model, given = zoo.build(case), zoo.inputs(case)
    first = cm.attention_norms(model, given.tokens).scores
    square = next(
        weight for weight in model.parameters() if weight.ndim == 2 and len(set(weight.shape)) == 1
    )
    square.data = square.data.T
    turned = cm.attention_norms(model, given.tokens).scores
    assert not torch.equal(turned, first)
    torch.testing.assert_close(
        turned, cm.attention_norms(copy.deepcopy(model), given.tokens).scores
    )
    square.data = square.data.T
    assert torch.equal(cm.attention_norms(model, given.tokens).scores, first)
    norm = own(first_block(model).ln1)
    weight = next(norm.parameters())
    weight.data.mul_(2)  # past PyTorch's counter
    assert not torch.equal(cm.attention_norms(model, given.tokens).scores, first)
