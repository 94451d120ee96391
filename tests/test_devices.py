"""Numbers do not depend on the order of sums, on old memory, or on where the weights are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import unchecked
import zoo
import zoo_build
from asked import keywords, relative, shared
from gpu_waits import CudaWaits, require_few
from test_conformance import ASKED, Method, ask

import tl_contextmix as cm

pytestmark = pytest.mark.mostly_once

CASES = {case.family: case for case in zoo.cases()}
MAPS = {"alti", "attention", "attention_flow", "attention_norms", "decompx", "globenc"}
MAPS |= {"value_zeroing"}


def methods(case: zoo.Case) -> list[Method]:
    """What a case can be asked."""
    asked = [param.values for param in ASKED]
    return [method for method, other in asked if other == case and isinstance(method, Method)]


def numbers(method: Method, model: Any, case: zoo.Case, given: zoo.Inputs) -> torch.Tensor:
    """The numbers of a method, about the same prediction whatever the model finds likely."""
    # A whole map is asked for no target, though it takes one.
    # None of the foils that methods have of their own.
    asks = method.name not in MAPS and "target" in inspect.signature(method.ask).parameters
    fixed: dict[str, Any] = {"target": 6} if asks else {}
    fixed |= {"target": 6} if method.name in ("gradient_x_input", "integrated_gradients") else {}
    found = method.values(ask(method, model, case, given, **fixed))
    return torch.nan_to_num(found, nan=0.0)  # what is not there: components after the position


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Operators whose sums have no fixed order fail, and new memory is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_nothing_depends_on_the_order_of_sums_or_on_old_memory(
    family: str, request: pytest.FixtureRequest
) -> None:
    case = CASES[family]
    model, given = shared(case)
    plain = {m.name: numbers(m, model, case, given) for m in methods(case)}
    request.getfixturevalue("deterministic")
    for method in methods(case):
        found = numbers(method, model, case, given)
        assert torch.equal(found, plain[method.name]), method.name


# Devices

SCRIPT = Path(__file__).with_name("fake_gpu.py")


def test_everything_stays_where_the_model_is_and_has_a_fixed_order() -> None:
    """On a GPU that refuses what CUDA refuses, in a process of its own."""
    calls = int(unchecked.run(str(SCRIPT), "bart", "llama").split()[-4])
    assert calls > 60


def spread(family: str, places: dict[str, Any]) -> Any:
    """A bridge on a Hugging Face model that accelerate has put onto several devices."""
    import accelerate

    hf = zoo.hf_model(family)
    accelerate.dispatch_model(
        hf, device_map=places, main_device=next(iter(places.values())), force_hooks=True
    )
    with zoo_build.quiet():
        tokenizer = zoo_build.rows.FAMILIES[family].tokenizer
        return zoo_build.bridge(hf, tokenizer, dtype=torch.float64, processed=False)


def layers_on(first: Any, second: Any) -> dict[str, Any]:
    """GPT-2 with its second block and all that follows on another device."""
    early = dict.fromkeys(("wte", "wpe", "drop", "h.0"), first)
    late = dict.fromkeys(("h.1", "h.2", "ln_f"), second)
    places = {f"transformer.{name}": place for name, place in (early | late).items()}
    # The unembedding is the embedding.
    return {**places, "lm_head": first}


def same_everywhere(model: Any, case: zoo.Case, limit: float, dtype: torch.dtype) -> None:
    """Every method gives what the same weights give on the CPU."""
    given, here = zoo.inputs(case), zoo.build(case, dtype=dtype)
    for method in methods(case):
        expected = numbers(method, here, case, given)
        found = numbers(method, model, case, given)
        assert relative(found.cpu(), expected) <= limit, method.name


def test_modules_that_move_their_inputs_change_nothing() -> None:
    """What a device map does to a model, all places being the CPU."""
    model = spread("gpt2", layers_on("cpu", "cpu"))
    same_everywhere(model, CASES["gpt2"], 1e-12, torch.float64)


def test_offloaded_weights_are_refused_by_name() -> None:
    """A device map with a part on the CPU leaves that part without numbers between passes."""
    import accelerate

    hf = zoo.hf_model("gpt2")
    accelerate.cpu_offload(hf, execution_device=torch.device("cpu"))
    with zoo_build.quiet():
        model = zoo_build.bridge(hf, "gpt", dtype=torch.float64, processed=False)
    with pytest.raises(cm.UnsupportedModel, match=r"offloaded weights.*wte.*weight"):
        cm.check(model)


def gpus(count: int) -> pytest.MarkDecorator:
    """Skips a test where there are fewer."""
    fewer = torch.cuda.device_count() < count
    return pytest.mark.skipif(fewer, reason=f"needs CUDA devices: {count}")


@pytest.mark.every
@pytest.mark.gpu
@gpus(1)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("family", sorted(CASES))
def test_a_gpu_gives_the_numbers_of_the_cpu(family: str, dtype: torch.dtype) -> None:
    case = CASES[family]
    model = zoo.build(case, dtype=dtype).to("cuda")
    # In float32 shares of small scores keep three digits, see docs/pages/numbers.md.
    same_everywhere(model, case, 1e-6 if dtype == torch.float64 else 5e-3, dtype)


@pytest.mark.every
@pytest.mark.gpu
@gpus(1)
def test_no_layer_is_waited_for() -> None:
    require_few(CudaWaits(), torch.device("cuda"))


@pytest.mark.every
@pytest.mark.gpu
@gpus(1)
def test_padding_and_the_decoder_side_may_be_anywhere() -> None:
    case = CASES["bart"]
    given, mask = zoo.inputs(case), torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    asked = {"attention_mask": mask, **keywords(given)}
    model = zoo.build(case)
    expected = cm.value_zeroing(model, given.tokens, **asked).scores
    found = cm.value_zeroing(model.to("cuda"), given.tokens.cuda(), **asked).scores
    assert relative(found.cpu(), expected) <= 1e-9


@pytest.mark.gpu
@gpus(2)
def test_a_model_spread_over_two_gpus_gives_the_numbers_of_the_cpu() -> None:
    model = spread("gpt2", layers_on(0, 1))
    same_everywhere(model, CASES["gpt2"], 1e-9, torch.float64)
