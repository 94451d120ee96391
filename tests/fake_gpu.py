"""A GPU for machines without one: its tensors hold their numbers on the CPU and say otherwise.

What a real one refuses is refused: tensors of two devices in one operator, and under
``torch.use_deterministic_algorithms`` operators that have no deterministic CUDA kernel. Numbers
are the CPU's. Run by test_devices.py in a process of its own, as PyTorch cannot forget a device:
``python tests/fake_gpu.py FAMILY ...`` asks everything of models on it and prints what fails.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, no_type_check

import torch
from gpu_waits import Waits, require_few
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    return_and_correct_aliasing,
)

from tl_contextmix.methods.flow_knockout import flow_knockout
from tl_contextmix.results import LogProbContributions

GPU = torch.device("privateuseone:0")
# Of what has no deterministic CUDA kernel for fractions, what could be called here; see the
# documentation of torch.use_deterministic_algorithms.
_UNORDERED = {"cumsum", "cumsum_", "histc", "kthvalue", "put", "put_"}
_ANYWHERE = {"copy_", "_to_copy"}
_INDEXING = {"index", "index_put", "index_put_"}
WAITS = Waits()


class GpuTensor(Tensor):
    """A tensor that says it is on the GPU."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> GpuTensor:
        """Returns numbers as a tensor of the GPU."""
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=GPU,
        )
        made.numbers = numbers
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, **options: Any) -> str:
        return f"GpuTensor({self.numbers!r})"

    def tolist(self) -> Any:
        """Returns the numbers as lists."""
        WAITS.see("tolist", [True], (self,), None)
        return self.numbers.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator."""
        return _run(func, args, kwargs or {})


class FakeGpu(TorchDispatchMode):
    """Inside of it there is the GPU."""

    def __enter__(self) -> FakeGpu:
        # torch.tensor(..., device=) makes a tensor on the CPU then, and sends it.
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    @no_type_check
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator."""
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    given = [*_tensors((args, kwargs))]
    there = [isinstance(x, GpuTensor) for x in given]
    _require_one_device(name, given, there)
    unordered = name in _UNORDERED and any(there) and given[0].is_floating_point()
    if unordered and torch.are_deterministic_algorithms_enabled():
        raise RuntimeError(f"{name} does not have a deterministic implementation")
    device, plain = kwargs.get("device"), kwargs
    asked = None if device is None else torch.device(device).type == GPU.type
    to_gpu = any(there) if name not in _ANYWHERE else there[0]
    free = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
    to_cpu = (name == "copy_" and there == [False, True]) or (name == "_to_copy" and asked is False)
    if free and to_cpu and there[-1]:
        raise RuntimeError("what is copied from the GPU may be read before it is there")
    WAITS.see(name, there, args, asked, blocking=not free)
    if device is not None:
        to_gpu = bool(asked)
        plain = {**kwargs, "device": torch.device("cpu")}
    with _disable_current_modes():
        found = func(*_each(_numbers, args), **_each(_numbers, plain))
    if not to_gpu:
        return found
    wrapped = _each(GpuTensor, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


# torch.utils._pytree does the same, and took half of the time.


def _each(change: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Changes the tensors in what an operator takes or gives."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, (tuple, list)):
        return type(x)([_each(change, one) for one in x])
    if isinstance(x, dict):
        return {name: _each(change, one) for name, one in x.items()}
    return x


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list, dict)):
        for one in x.values() if isinstance(x, dict) else x:
            yield from _tensors(one)


def _numbers(x: Tensor) -> Tensor:
    return x.numbers if isinstance(x, GpuTensor) else x


def _require_one_device(name: str, given: list[Tensor], there: list[bool]) -> None:
    """Raises RuntimeError where CUDA does; single numbers may be on the CPU."""
    if name in _ANYWHERE:
        return
    if name in _INDEXING and there[0]:  # indices may be anywhere then
        ends = [0] if name == "index" else [0, -1]
        given, there = [given[end] for end in ends], [there[end] for end in ends]
    elsewhere = [x for x, gpu in zip(given, there, strict=True) if not gpu and x.ndim > 0]
    if any(there) and elsewhere:
        shapes = [tuple(x.shape) for x in elsewhere]
        raise RuntimeError(f"{name} on the GPU with tensors of shape {shapes} on the CPU")


# What is asked of it


def require_refusals() -> None:
    """Raises AssertionError unless what CUDA refuses is refused here."""
    with FakeGpu():
        x, place = torch.ones(3, device=GPU), torch.zeros(2, dtype=torch.long, device=GPU)
        assert torch.equal((x * 2)[place.cpu()].cpu(), torch.full((2,), 2.0))
        wrong: list[Callable[[], object]] = [
            lambda: x + torch.ones(3),
            lambda: torch.ones(3)[place],
            lambda: x.gather(0, place.cpu()),
            lambda: x.masked_fill(torch.ones(3, dtype=torch.bool), 0),
            lambda: x.cumsum(0),
            lambda: x.to("cpu", non_blocking=True),
            lambda: torch.ones(3).copy_(x, non_blocking=True),
        ]
        for one in wrong:
            try:
                one()
            except RuntimeError:
                continue
            raise AssertionError("this GPU allows what CUDA refuses")


class Asked:
    """Calls, and what failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.made = 0

    def call(self, name: str, function: Callable[[], object]) -> None:
        """Makes a call."""
        self.made += 1
        try:
            function()
        except Exception:  # whatever it is, it is printed
            self.failed.append(f"{name}\n{traceback.format_exc(limit=-4)}")


def ask_methods(asked: Asked, family: str) -> None:
    """Every method of the contract, in an order of sums that is fixed, against the CPU."""
    import zoo
    from test_devices import CASES, methods, numbers

    case, given = CASES[family], zoo.inputs(CASES[family])
    expected = {m.name: numbers(m, zoo.shared(case), case, given) for m in methods(case)}
    with FakeGpu():
        model = zoo.build(case).to(GPU)

        def equal(method: Any) -> None:
            found = numbers(method, model, case, given)
            assert isinstance(found, GpuTensor), "numbers are not where the model is"
            torch.testing.assert_close(found.cpu(), expected[method.name], rtol=0, atol=1e-12)

        for method in methods(case):
            asked.call(f"{family} {method.name}", lambda method=method: equal(method))


# Ray and processes know nothing of this GPU, `estimate` switches it off while it measures; the
# others have no model. Maps of two points are too few for the two that compare four.
_LEFT_OUT = (
    *("mine_on_ray", "merge_triggers", "load_model", "load_demo", "estimate"),
    *("cancellation", "contextualization_change", "cue_alignment"),
)


def ask_functions(asked: Asked, folder: Path) -> None:
    """Every public function, its table, its page and its file."""
    import fuzz_calls
    import zoo

    from tl_contextmix.results import Result

    build = zoo.build
    with FakeGpu():
        zoo.build = lambda case, **options: build(case, **options).to(GPU)  # type: ignore[assignment]
        table = fuzz_calls.calls(folder)
        for name in _LEFT_OUT:
            del table[name]

        def whole(name: str, arguments: dict[str, Any]) -> None:
            found = fuzz_calls.named(name)(**arguments)
            if isinstance(found, Result):
                found.save(folder / "result.safetensors")
                for read in ("to_dataframe", "__repr__", "show"):
                    getattr(found, read)()

        for name, some in table.items():
            asked.call(name, lambda name=name, some=some: whole(name, some))


def ask_options(asked: Asked, family: str) -> None:
    """What arguments change of the way a tensor takes, with masks that are on the CPU."""
    import zoo
    from test_devices import CASES

    import tl_contextmix as cm
    from tl_contextmix.results.scanned import LEVELS

    given = zoo.inputs(CASES[family])
    mask = torch.ones_like(given.tokens)
    mask[0, -2:] = 0
    with FakeGpu():
        model = zoo.build(CASES[family]).to(GPU)
        padded = {"model": model, "input": given.tokens.to(GPU), "attention_mask": mask}

        def best(by: Any) -> LogProbContributions:
            return cm.log_prob_contributions(**padded, by=by, k=3)

        cuts = ("layer", "head", "position", "head_position", "ff_neuron", "attn_neuron")
        calls: dict[str, Callable[[], object]] = {
            "spans": lambda: cm.value_zeroing(**padded, spans=[(0, 2), (2, 4)], span_rows="mean"),
            "groups of heads": lambda: cm.value_zeroing(**padded, heads=[[0, 1], [2]]),
            "tiles": lambda: cm.value_zeroing(**padded, max_bytes=20000),
            "norms in tiles": lambda: cm.attention_norms(**padded, max_bytes=20000),
            "fixed bias": lambda: cm.decompose(**padded, bias="fixed"),
            "padding": lambda: cm.decompx(**padded),
            "norm rule": lambda: cm.log_prob_contributions(**padded, by="head", norm="recompute"),
            "direction": lambda: cm.log_prob_contributions(
                **padded, by="head", target=cm.Direction(torch.linspace(-1, 2, 32), layer=1)
            ),
            "heads": lambda: cm.decompose(**padded, heads=True),
            "rank": lambda: cm.log_prob_contributions(**padded, by="ff_neuron", score="rank"),
            "chain": lambda: cm.query_contributions(**padded, neurons=best("ff_neuron"), k=4),
            "score of an edge": lambda: cm.query_contributions(
                model, given.tokens[:1].to(GPU), edge=(1, 2, -1, 1), by="head_position"
            ),
            "mean": lambda: cm.knockout(**padded, heads=[(0, 1)], replace_with="mean", controls=1),
            "last": lambda: cm.knockout(**padded, neurons=best("attn_neuron")),
            "edges": lambda: cm.attention_knockout(
                **padded, sources=[0, (1, 3)], heads=[[0], [1, 2]]
            ),
            "answers": lambda: cm.value_zeroing(**padded, target=[[5, 6], [7]]),
            "logits of answers": lambda: cm.decompx(**padded, target=[[5, 6], [7]]),
            "layers to logits": lambda: cm.alti(**padded, of="logit", target=[[5, 6], [7]]),
            "generated": lambda: cm.attention_norms(**padded, generate=2, at="mlp_out"),
            "graph of neurons": lambda: cm.flow(
                model, given.tokens[:1].to(GPU), target=5, foil=6, neurons=True, k=20
            ),
            "routes": lambda: cm.information_flow_routes(model, given.tokens[:1].to(GPU), target=5),
            "graph without nodes": lambda: flow_knockout(
                model,
                given.tokens[:1].to(GPU),
                graph=cm.flow(model, given.tokens[:1].to(GPU), prune="influence", k=6),
                replace_with="mean",
                others=True,
                controls=2,
            ),
            "scan": lambda: cm.scan(model, [(row, 5, 6) for row in given.tokens], by=LEVELS),
            "memories": lambda: cm.ff_memories(**padded, projection="frozen").figures(),
            "gradients": lambda: cm.gradient_x_input(**padded, of="log_prob"),
        }
        elsewhere = zoo.shared(CASES[family])
        calls["tokens there, model here"] = lambda: cm.attention_norms(
            elsewhere, given.tokens.to(GPU), attention_mask=mask.to(GPU), at="mlp_out"
        )
        for by in cuts:
            calls[by] = lambda by=by: cm.log_prob_contributions(**padded, by=by).top(5)
        for name, function in calls.items():
            asked.call(f"{family} {name}", function)


def main(families: list[str]) -> int:
    """Asks everything, prints what failed, and returns how much that was."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("gpu")
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("ignore")
    # Views of these tensors cannot be made in inference mode; those of CUDA can.
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else nullcontext()  # type: ignore[assignment]
    require_refusals()
    asked = Asked()
    for family in families:
        ask_methods(asked, family)
    ask_options(asked, "gpt2")
    with FakeGpu():
        asked.call("waits", lambda: require_few(WAITS, GPU))
    with tempfile.TemporaryDirectory() as place:
        ask_functions(asked, Path(place))
    sys.stdout.write("\n".join([*asked.failed, f"{asked.made} calls, {len(asked.failed)} failed"]))
    return len(asked.failed)


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
