"""Meters that do not depend on the machine: operations done and bytes held.

Operations come from `torch.utils.flop_counter`, which knows products of matrices; sums and
products of single numbers are added to its table, so that code without a matrix product in it
does not count as free. Bytes are those of the tensors that are alive: every operator that
allocates one is seen. Both work on real tensors and on tensors without numbers (``meta``).
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import shape_wrapper

from tl_contextmix.core.counters import Memory, Operations
from tl_contextmix.core.statistics import bootstrap_interval
from tl_contextmix.core.token_sums import ONEDNN
from tl_contextmix.results.labels import package_version

__all__ = [
    "ELEMENTWISE",
    "Memory",
    "Operations",
    "WithoutProducts",
    "command_line",
    "flops",
    "interleaved",
    "machine",
    "markdown",
    "row",
    "say",
    "say_means",
    "seconds",
    "show",
    "with_interval",
]

_POINTWISE = (
    "mul mul_ add add_ sub sub_ rsub div div_ pow sqrt abs clamp where neg exp erf gelu silu "
    "sigmoid tanh relu special_ndtr gelu_backward"
).split()
_REDUCING = ("sum", "mean", "linalg_vector_norm")


def _per_output(*args: Any, out_shape: Any, **kwargs: Any) -> int:
    return prod(out_shape)


def _per_product(one: Any, other: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(one)


def _per_input(shape: Any, *args: Any, **kwargs: Any) -> int:
    return prod(shape)


ELEMENTWISE: dict[Any, Callable[..., int]] = {
    **{getattr(torch.ops.aten, name): _per_output for name in _POINTWISE},
    **{getattr(torch.ops.aten, name): _per_input for name in _REDUCING},
    # Products with one vector, which PyTorch's own table does not hold.
    torch.ops.aten.mv: _per_product,
    torch.ops.aten.dot: _per_product,
}
"""One operation per number written (elementwise) or read (sums), by PyTorch operator."""


class Everything(Operations):
    """Counts elementwise operations, too."""

    table: ClassVar = {
        **Operations.table,
        **{op: shape_wrapper(of) for op, of in ELEMENTWISE.items()},
    }


def flops(work: Callable[[], object], *, elementwise: bool = True) -> int:
    """Returns the operations of a piece of work; a multiplication with an addition counts two.

    Args:
        work: Run once.
        elementwise: Whether to count what is no product of matrices.
    """
    with (Everything if elementwise else Operations)() as counter:
        work()
    return counter.total


class WithoutProducts(TorchDispatchMode):
    """Fills the results of matrix products with ones instead of computing them.

    Tiles, allocations and counts stay what they are, in a fraction of the time. Counters have to
    be started after it: they then see the operator before it does.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator unless it is a product."""
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            return args[0].new_ones(*args[0].shape[:-1], args[1].shape[-1])
        if func.overloadpacket is ONEDNN:
            return args[0].new_ones(*args[0].shape[:-1], len(args[1]))
        return func(*args, **(kwargs or {}))


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Returns the seconds that a piece of work takes."""
    start = clock()
    work()
    return clock() - start


def interleaved(
    ways: Sequence[Callable[[], object]],
    runs: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Returns medians of the seconds that each way takes; run in turn, as machines change speed.

    Args:
        ways: What is run.
        runs: How often.
        clock: ``time.process_time`` for the processor's seconds, which other processes on the
            machine change less.
    """
    taken = [[seconds(way, clock) for way in ways] for _ in range(runs)]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


def machine() -> str:
    """Returns versions and the processor in words."""
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    packages = ("torch", "transformer-lens", "transformers")
    named = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"tl_contextmix {package_version()}, {named}, Python {platform.python_version()}; "
        f"{cpu}, {os.cpu_count()} cores of which one is used; float32"
    )


def markdown(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Returns a Markdown table."""
    head = [*head]
    lines = [head, ["---"] * len(head), *rows]
    return "".join(map(_line, lines))


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |\n"


def show(text: str) -> None:
    """Writes text to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def say(line: str = "") -> None:
    """Writes a line."""
    show(f"{line}\n")


def row(*cells: object) -> None:
    """Writes a row of a Markdown table."""
    show(_line(cells))


def with_interval(values: Sequence[float], digits: int = 2) -> str:
    """Returns a mean with its 95 % bootstrap interval; NaN values are skipped."""
    column = torch.tensor(values, dtype=torch.float64)
    mean, low, high = (
        f"{x:.{digits}f}" for x in (float(column.nanmean()), *bootstrap_interval(column))
    )
    return f"{mean} ({low} to {high})"


def say_means(of: str, figures: Mapping[str, Sequence[float]], among: str, digits: int = 2) -> None:
    """Writes a line of means with their intervals.

    Args:
        of: What they are of.
        figures: The values of each, by name.
        among: How many values there were, in words.
        digits: Digits after the point.
    """
    cells = [f"{name} {with_interval(values, digits)}" for name, values in figures.items()]
    say(f"{of}: {', '.join(cells)}; {among}")


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser that introduces itself with the first line of a module's docstring."""
    return argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
