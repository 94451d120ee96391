"""The pruning rule of circuit-tracer (Ameisen et al. 2025): by influence on the answer.

Tensors in, tensors out. Nodes stand after those that they read; the last one is the answer.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Edges = Float[Tensor, "target source"]


def influence(edges: Edges) -> Float[Tensor, " node"]:
    """Returns the influence of each node: the products of shares along all paths to the answer."""
    shares = _shares(edges)
    result = edges.new_zeros(len(edges))
    answer = len(edges) - 1
    for target in reversed(range(len(edges))):
        result = result + shares[target] * (result[target] + (target == answer))
    return result


def kept_by_influence(
    edges: Edges, always: Bool[Tensor, " node"], node_threshold: float, edge_threshold: float
) -> Bool[Tensor, " node"]:
    """Returns which nodes the rule keeps.

    The nodes of largest influence that have `node_threshold` of it together; then, of the graph
    that is left, the edges that have `edge_threshold` of its influence together; then only what is
    on a way, over such edges, from something that reads nothing to the answer.

    Args:
        edges: From each source to each target.
        always: Nodes that are never pruned.
        node_threshold: Share of the influence of all nodes.
        edge_threshold: Share of the influence of all edges that are left.
    """
    always = always.clone()
    always[-1] = True
    size = influence(edges)
    kept = (size >= _threshold(size, node_threshold)) | always
    left = edges * kept * kept[:, None]
    through = influence(left)
    through[-1] += 1
    sizes = _shares(left) * through[:, None]
    shown = sizes >= _threshold(sizes.flatten(), edge_threshold)
    reads = (edges != 0).any(dim=1)
    before = torch.zeros_like(kept)
    while not bool((kept == before).all()):
        before = kept
        shown = shown & kept & kept[:, None]
        kept = kept & (always | (shown.any(dim=0) & (shown.any(dim=1) | ~reads)))
    return kept


def _shares(edges: Edges) -> Edges:
    """Returns the edges into each node as shares of their absolute sum."""
    size = edges.abs()
    return size / size.sum(dim=1, keepdim=True).clamp(min=1e-10)


def _threshold(sizes: Float[Tensor, " some"], share: float) -> Float[Tensor, ""]:
    """Returns the size from which on the largest ones have a share of the sum."""
    order = sizes.sort(descending=True).values
    sums = order.cpu().cumsum(0)  # on CUDA these have no fixed order
    place = int(torch.searchsorted(sums / sums[-1], share))
    return order[min(place, len(order) - 1)]
