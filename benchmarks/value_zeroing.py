"""Value Zeroing of one block: the replay against a loop over zeroed forward passes.

``python benchmarks/value_zeroing.py [--quick]`` prints three Markdown tables: operations and most
bytes held at once, which do not depend on the machine, and seconds (medians of interleaved runs on
one thread). GPT-2's sizes: d=768, 12 heads, 3072 neurons. Both ways' distances are compared first.

*Bound*: the product with W_out that every pair needs, n (n + 1) d_mlp d (causal) or 2 n^2 d_mlp d.
*With H terms*: and what every pair needs per head, and what every source's values are to the
neurons, 2 n d d_mlp. *First call*: W_O folded into W_in besides, 2 d^2 d_mlp, which a model keeps.

``--trapezoid`` prints what a rotated W_out would save instead: distances need norms and inner
products alone, so that d rows of it may be made triangular.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import torch
from meters import Memory, WithoutProducts, command_line, flops, interleaved, row, say
from torch import Tensor
from torch.nn import functional

from tl_contextmix.core.activations import ACTIVATIONS
from tl_contextmix.core.blocks import AttentionSublayer, Batch, Block, FeedForward, Side, Trace
from tl_contextmix.core.token_sums import Norm
from tl_contextmix.core.value_ablation import TILE_BYTES, ablate_values

D, HEADS, M = 768, 12, 3072
MAX_BYTES = 2**30


@dataclass(frozen=True)
class Layer:
    """A pre-LN block of random weights and its input."""

    x: Tensor
    weights: dict[str, Tensor]
    norms: tuple[Norm, Norm]
    causal: bool

    def attention(self) -> tuple[Tensor, Tensor]:
        """Returns pattern [batch head target source] and values [batch source head d_head]."""
        x = self.norms[0](self.x)
        query, key, value = (
            (x @ self.weights[name]).unflatten(-1, (HEADS, -1)) for name in ("Q", "K", "V")
        )
        scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) / (D // HEADS) ** 0.5
        if self.causal:
            seen = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
            scores = scores.masked_fill(~seen, -torch.inf)
        return scores.softmax(-1), value

    def __call__(self, zeroed: int | None = None) -> Tensor:
        """Returns the block's output, with the value of one token set to zero."""
        pattern, value = self.attention()
        if zeroed is not None:
            value[:, zeroed] = 0
        mixed = (pattern @ value.transpose(1, 2)).transpose(1, 2).flatten(2)
        stream = self.x + mixed @ self.weights["W_O"].flatten(0, 1) + self.weights["b_O"]
        pre = self.norms[1](stream) @ self.weights["W_in"] + self.weights["b_in"]
        return stream + functional.gelu(pre) @ self.weights["W_out"] + self.weights["b_out"]

    def view(self) -> tuple[Block, Trace]:
        """Returns the block as the package sees it, and what a forward pass leaves behind."""
        pattern, value = self.attention()
        attention = AttentionSublayer(
            stack="decoder",
            kind="self",
            pattern="p",
            value="v",
            mixed="z",
            key="k",
            weights=self.weights.get,
            norm_in=self.norms[0],
        )
        ff = FeedForward(
            pre="pre",
            post="post",
            pre_linear=None,
            weights=self.weights.get,
            norm_in=self.norms[1],
            activation=next(known for known in ACTIVATIONS if known.name == "gelu"),
        )
        mixed = (pattern @ value.transpose(1, 2)).transpose(1, 2)
        ids = torch.zeros(self.x.shape[:2], dtype=torch.long)
        stream = self.x + mixed.flatten(2) @ self.weights["W_O"].flatten(0, 1) + self.weights["b_O"]
        pre = self.norms[1](stream) @ self.weights["W_in"] + self.weights["b_in"]
        values = {"x": self.x, "p": pattern, "v": value, "z": mixed, "pre": pre}
        batch = Batch(Side(ids, torch.ones_like(ids, dtype=torch.bool)))
        block = Block(0, "x", "out", (attention,), ff, folds={})
        return block, Trace(batch, values, self.x.dtype)


def made(n: int, causal: bool) -> Layer:
    """Returns a layer of random weights."""
    generator = torch.Generator().manual_seed(n)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[0] ** 0.5

    weights = {name: draw(D, D) for name in "QKV"}
    weights |= {"W_O": draw(D, D).unflatten(0, (HEADS, -1)), "b_O": draw(D)}
    weights |= {"W_in": draw(D, M), "b_in": draw(M), "W_out": draw(M, D), "b_out": draw(D)}
    norms = [Norm("ln", 1 + draw(D), draw(D), 1e-5) for _ in range(2)]
    return Layer(torch.randn(1, n, D, generator=generator), weights, (norms[0], norms[1]), causal)


def distance(changed: Tensor, kept: Tensor) -> Tensor:
    """Returns cosine distances as half the squared distance of unit vectors."""
    unit = functional.normalize
    return (unit(changed, dim=-1) - unit(kept, dim=-1)).square().sum(-1) / 2


def ours(block: Block, trace: Trace, max_bytes: int = MAX_BYTES) -> Tensor:
    """Returns distances [target source] by replaying the block."""
    n = trace["x"].shape[1]
    out = torch.zeros(n, n)
    found = ablate_values(block, trace, "self").folded(None, 1, max_bytes)
    for rows, columns, changed, kept in found.tiles(None, max_bytes):
        out[rows, columns] = distance(changed, kept)[0].T
    return out


def loop(layer: Layer) -> Tensor:
    """Returns distances [target source] by one forward pass of the block per source."""
    kept = layer()
    found = [distance(layer(source), kept)[0] for source in range(layer.x.shape[1])]
    return torch.stack(found, dim=1)


def bounds(n: int, causal: bool) -> tuple[int, int]:
    """Returns the least that all pairs need behind the activation, and that with the H terms."""
    pairs = n * (n + 1) if causal else 2 * n * n
    least = pairs * M * D
    return least, least + pairs * HEADS * (M + D) + 2 * n * D * M


def operations(sizes: list[int]) -> None:
    """Prints the table of operations."""
    row(
        "causal",
        "n",
        "bound",
        "with H terms",
        "ours",
        "loop",
        "ours / bound",
        "ours / with H terms",
        "loop / ours",
        "loop / first call",
    )
    row(*["---"] * 10)
    for causal in (True, False):
        for n in sizes:
            layer = made(n, causal)
            block, trace = layer.view()
            work = partial(ours, block, trace)
            first, here = (flops(work, elementwise=False) for _ in range(2))
            # Each of the loop's n + 1 passes does the same operations.
            there = (n + 1) * flops(layer, elementwise=False)
            bound, heads = bounds(n, causal)
            row(
                causal,
                n,
                *(f"{x:.3g}" for x in (bound, heads, here, there)),
                *(f"{x:.2f}" for x in (here / bound, here / heads, there / here, there / first)),
            )


def memory(sizes: list[int]) -> None:
    """Prints the table of most bytes held at once, distances included.

    Products of matrices are replaced by constants, which changes no allocation.
    """
    row("causal", "n", "max_bytes (MiB)", "peak (MiB)", "peak / max_bytes")
    row(*["---"] * 5)
    for causal in (True, False):
        for n in sizes:
            block, trace = made(n, causal).view()
            for max_bytes in (MAX_BYTES // 4, MAX_BYTES):
                with WithoutProducts(), Memory() as meter:
                    ours(block, trace, max_bytes)
                peak = f"{meter.peak / 2**20:.0f}", f"{meter.peak / max_bytes:.2f}"
                row(causal, n, max_bytes // 2**20, *peak)


def seconds(sizes: list[int], runs: int) -> None:
    """Prints the table of seconds."""
    row("causal", "n", "ours (s)", "loop (s)", "loop / ours", "largest difference")
    row(*["---"] * 6)
    for causal in (True, False):
        for n in sizes:
            layer = made(n, causal)
            block, trace = layer.view()
            apart = float((ours(block, trace) - loop(layer)).abs().max())
            ways = (partial(ours, block, trace), partial(loop, layer))
            here, there = interleaved(ways, runs)
            row(causal, n, f"{here:.3f}", f"{there:.3f}", f"{there / here:.1f}", f"{apart:.1e}")


def rotated(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns W_out in a basis in which its first d rows are lower triangular, and the basis."""
    basis = torch.linalg.qr(weight[:D].T)[0]
    found = weight @ basis
    found[:D].tril_()
    return found, basis


def by_blocks(post: Tensor, weight: Tensor, count: int) -> Tensor:
    """Returns a product with a rotated W_out, without what is zero in so many blocks of rows."""
    out, step = post[:, D:] @ weight[D:], D // count
    for start in range(0, D, step):
        rows = slice(start, start + step)
        out[:, : rows.stop].addmm_(post[:, rows], weight[rows, : rows.stop])
    return out


def trapezoid(sizes: list[int], runs: int, count: int = 8) -> None:
    """Prints what a product that leaves out a triangle of W_out would save of a call."""
    row("n", "operations", "product", "call", "rotation, in calls", "kept (MiB)", "difference")
    row(*["---"] * 7)
    for n in sizes:
        layer = made(n, True)
        block, trace = layer.view()
        weight = layer.weights["W_out"]
        post = torch.randn(TILE_BYTES // (4 * (3 * M + 11 * D)), M)
        turned, basis = rotated(weight)
        apart = (by_blocks(post, turned, count) @ basis.T - post @ weight).abs().max()
        ours(block, trace)  # what a model keeps
        ways = (
            partial(ours, block, trace),
            partial(torch.matmul, post, weight),
            partial(by_blocks, post, turned, count),
            partial(rotated, weight),
        )
        call, whole, part, turn = interleaved(ways, runs, time.process_time)
        tiles = n * (n + 1) / 2 / len(post)
        row(
            n,
            f"{D * (1 - 1 / count) / (2 * M):.1%} fewer",
            f"{1 - part / whole:.1%} less",
            f"{tiles * (whole - part) / call:.1%} less",
            f"{turn / call:.2f}",
            f"{4 * (M * D + D * D) / 2**20:.0f}",
            f"{float(apart / (post @ weight).abs().max()):.0e}",
        )


def main() -> None:
    """Prints the tables."""
    parser = command_line(__doc__)
    parser.add_argument("--trapezoid", action="store_true", help="of a rotated W_out alone")
    parser.add_argument("--quick", action="store_true", help="small sizes and few runs")
    given = parser.parse_args()
    quick = given.quick
    torch.set_num_threads(1)
    with torch.no_grad():
        if given.trapezoid:
            trapezoid([32, 64] if quick else [64, 128, 256], 3 if quick else 7)
            return
        operations([32, 64, 128] if quick else [32, 64, 128, 256, 512])
        say()
        memory([256] if quick else [256, 512, 1024])
        say()
        seconds([32, 64] if quick else [32, 64, 128], 3 if quick else 7)


if __name__ == "__main__":
    main()
