"""Attention norms of one block: operations, memory and seconds against the field's way.

``python benchmarks/run.py`` prints three Markdown tables; ``--quick`` does so for small sizes, in
seconds. ``--long`` prints what folding slopes into weights saves of long inputs, in operations.
What the columns mean is in README.md beside this file.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import reference
import torch
from blocks import Sizes, build
from meters import Memory, WithoutProducts, command_line, flops, interleaved, row, say

import tl_contextmix as cm
from tl_contextmix.core.blocks import Block, Trace
from tl_contextmix.core.feed_forward_parts import Precision
from tl_contextmix.core.neuron_routes import Costs
from tl_contextmix.engine.parts import POINTS, Point, linear_points, norms_at, parts_at_all
from tl_contextmix.results.labels import package_version

MAX_BYTES = 2**30
STEPS = 50
# Beyond these tokens the reference's [head, target, source, d_model] (0.6 GB at 128) or the
# gradients' 50 x 4 n^2 d m operations take too long to be run for their seconds.
LITERAL_UP_TO, GRADIENTS_UP_TO = 128, 64


@dataclass(frozen=True)
class Cost:
    """What a piece of work takes.

    Attributes:
        flops: Operations.
        peak: Most bytes alive at once, of what it allocated itself.
        largest: Bytes of the largest tensor among them.
    """

    flops: int
    peak: int
    largest: int


def measure(work: Callable[[], object], *, products: bool = True) -> Cost:
    """Returns the cost of a piece of work.

    Args:
        work: Run once.
        products: Whether products of matrices are really computed; counts are the same.
    """
    with ExitStack() as modes, torch.no_grad():
        if not products:
            modes.enter_context(WithoutProducts())
        memory = modes.enter_context(Memory())
        count = flops(work)
    return Cost(count, memory.peak, memory.largest)


def ours(
    block: Block,
    trace: Trace,
    *points: Point,
    max_bytes: int = MAX_BYTES,
    precision: Precision = "full",
) -> dict:
    """Returns the norms at some points, as `tl_contextmix.attention_norms` computes them."""
    linear = linear_points(block, trace, "decoder", points)
    parts = parts_at_all(block, linear, points, "contributor", max_bytes)
    return norms_at(parts, max_bytes, precision)


@contextmanager
def all_neurons() -> Iterator[None]:
    """Has every part go through all neurons, whatever would be cheaper."""
    with mock.patch.object(Costs, "route", return_value="all"):
        yield


def bound(sizes: Sizes) -> int:
    """Returns 2 n^2 m (d + H), half of it if causal: mixing heads, and one product per pair."""
    pairs = sizes.n**2 if sizes.causal else 2 * sizes.n**2
    return pairs * sizes.m * (sizes.d + sizes.heads)


def output_products(sizes: Sizes, at: Point) -> int:
    """Returns the products with W_O: value vectors, and attention's output where a norm follows."""
    return (2 if at == "mlp_in" else 1) * 2 * sizes.n * sizes.d**2


def masks(lengths: list[int], base: Sizes) -> Iterator[tuple[str, Sizes]]:
    """Yields what is measured: GPT-2's kind of block, then BERT's."""
    for n in lengths:
        yield "causal", replace(base, n=n, causal=True, post_norm=False)
    for n in lengths:
        yield "both ways", replace(base, n=n, causal=False, post_norm=True)


def linear_table(lengths: list[int], base: Sizes) -> None:
    """Prints the points up to the feed-forward input."""
    row(
        "mask",
        "n",
        "point",
        "W_O",
        "ours",
        "[H,n,n,d]",
        "less by",
        "ours MiB",
        "[H,n,n,d] MiB",
        "less by",
    )
    row(*["---"] * 10)
    for mask, sizes in masks(lengths, base):
        block, trace = build(sizes)
        shapes = build(sizes, device="meta")
        for at in reference.LINEAR_POINTS:
            here = measure(partial(ours, block, trace, at))
            there = measure(partial(reference.norms, *shapes, at, sizes.causal))
            shared = output_products(sizes, at)
            beyond = here.flops - shared, there.flops - 2 * sizes.n * sizes.d**2
            row(
                mask,
                sizes.n,
                at,
                _short(shared),
                *map(_short, beyond),
                _times(*beyond),
                _mib(here.peak),
                _mib(there.peak),
                _times(here.peak, there.peak),
            )


def neuron_table(lengths: list[int], base: Sizes) -> None:
    """Prints the points behind the activation."""
    row(
        "mask",
        "n",
        "point",
        "bound",
        "ours",
        "ours / bound",
        "n^2 vectors",
        "less by",
        f"{STEPS} steps",
        "less by",
        "ours MiB",
        "n^2 vectors MiB",
    )
    row(*["---"] * 12)
    for mask, sizes in masks(lengths, base):
        block, trace = build(sizes)
        shapes = build(sizes, device="meta")
        parts = reference.attention_parts(*shapes, "mlp_in")
        step = partial(reference.gradient_step, shapes[0], *parts, 0.5, sizes.causal)
        gradients = STEPS * measure(step).flops
        for at in POINTS[3:]:
            here = measure(partial(ours, block, trace, at), products=False)
            there = measure(partial(reference.norms, *shapes, at, sizes.causal))
            least = bound(sizes)
            row(
                mask,
                sizes.n,
                at,
                _short(least),
                _short(here.flops),
                f"{here.flops / least:.3f}",
                _short(there.flops),
                _times(here.flops, there.flops),
                _short(gradients),
                _times(here.flops, gradients),
                _mib(here.peak),
                _mib(there.peak),
            )


def long_table(lengths: list[int], base: Sizes, layers: int = 2) -> None:
    """Prints what folding slopes into weights saves: norms of a block, and DecompX of a model."""
    from memories import gpt2  # needs TransformerLens

    row("method", "mask", "n", "plain", "ours", "less by", "ours MiB", "plain MiB")
    row(*["---"] * 8)
    for mask, sizes in masks(lengths, base):
        block, trace = build(sizes)
        work = partial(ours, block, trace, "block_out")
        here = measure(work, products=False)
        with all_neurons():
            there = measure(work, products=False)
        _long_row("norms, block_out", mask, sizes.n, here.flops, there.flops, here.peak, there.peak)
    model = gpt2(layers, base.d, 64, max(lengths))
    for n in lengths:
        # Without a limit, so that all tokens are carried at once.
        work = partial(cm.estimate, model, n, partial(cm.decompx, max_bytes=2**40))
        here = work()
        with all_neurons():
            there = cm.estimate(model, n, cm.decompx)
        counts = here.flops, there.flops, here.peak_bytes, there.peak_bytes
        _long_row(f"DecompX, {layers} layers", "causal", n, *counts)


def _long_row(name: str, mask: str, n: int, here: int, there: int, *peaks: int) -> None:
    times = f"{there / here:.2f}x"
    row(name, mask, n, _short(there), _short(here), times, *map(_mib, peaks))


def seconds_table(lengths: list[int], base: Sizes, runs: int) -> None:
    """Prints medians of interleaved runs."""
    names = (
        "ours: mlp_in",
        "ours: block_out",
        "ours: six points",
        "[H,n,n,d]: mlp_in",
        "n^2 vectors: block_out",
        f"{STEPS} steps",
    )
    row("mask", "n", *names)
    row(*["---"] * (2 + len(names)))
    for mask, sizes in masks(lengths, base):
        block, trace = build(sizes)
        ways: list[Callable[[], object]] = [
            partial(ours, block, trace, "mlp_in"),
            partial(ours, block, trace, "block_out"),
            partial(ours, block, trace, *POINTS),
        ]
        if sizes.n <= LITERAL_UP_TO:
            ways += [
                partial(reference.norms, block, trace, at, sizes.causal)
                for at in ("mlp_in", "block_out")
            ]
        if sizes.n <= GRADIENTS_UP_TO:
            parts = reference.attention_parts(block, trace, "mlp_in")
            ways.append(partial(reference.gradient_step, block, *parts, 0.5, sizes.causal))
        taken = interleaved(ways, runs)
        # One step is timed; all take the same.
        taken[5:] = [STEPS * time for time in taken[5:]]
        found = [f"{seconds:.3f}" for seconds in taken]
        row(mask, sizes.n, *found, *["not run"] * (len(names) - len(found)))


def _short(count: int) -> str:
    return f"{count:.3g}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"


def _times(here: float, there: float) -> str:
    return f"{there / here:.1f}x"


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables."""
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes and few runs")
    parser.add_argument("--long", action="store_true", help="long inputs alone; minutes")
    given = parser.parse_args(arguments)
    quick = given.quick
    torch.set_num_threads(1)
    base = Sizes(0, d=48, heads=4, m=192) if quick else Sizes(0)
    lengths = [8, 16] if quick else [64, 128, 256, 512]
    say(
        f"tl_contextmix {package_version()}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()} with {os.cpu_count()} cores "
        "of which one is used, float32; "
        f"d={base.d}, H={base.heads}, m={base.m}, one row, max_bytes {MAX_BYTES}."
    )
    if given.long:
        with torch.no_grad():
            long_table([64, 128] if quick else [1024, 2048, 4096], base)
        return
    with torch.no_grad():
        say("\nUp to the feed-forward input: operations beyond the products with W_O\n")
        linear_table(lengths, base)
        say("\nBehind the activation: operations\n")
        neuron_table(lengths, base)
        say("\nSeconds\n")
        seconds_table([n for n in lengths if n <= 256], base, 1 if quick else 5)


if __name__ == "__main__":
    main()
