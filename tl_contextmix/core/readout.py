r"""Vectors read as tokens, the vocabulary in tiles: no tensor here is as long as the vocabulary.

For vectors :math:`h` the logits :math:`h W_U` are computed tile by tile, and of each tile only what
a reader asks for is kept: the highest and lowest tokens, :math:`\log\sum e^{l}`, the entropy

.. math:: H = \log\sum_u e^{l_u} - \frac{\sum_u l_u e^{l_u}}{\sum_u e^{l_u}},

and the rank of a token. One pass, :math:`2 N d V` operations for :math:`N` vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_contextmix.core.blocks import require_weight
from tl_contextmix.core.model_view import Readout
from tl_contextmix.core.token_sums import blocks, multiply
from tl_contextmix.errors import InvalidInput

Projection = Literal["none", "folded", "frozen", "head", "model"]
TILE_BYTES = 2**26
"""Memory for one tile of logits and what is made of it."""
CACHE_BYTES = 2**23
"""The same where the processor's cache is to hold the tile."""
_ROWS, _WIDTH = 1024, 512
# Copies of a tile of logits that are alive at once.
_COPIES = 4


@dataclass(frozen=True)
class Unembedding:
    """How vectors of the residual stream are read as tokens.

    Attributes:
        readout: The model's.
        projection: ``"none"``: W_U alone. ``"folded"``: the gain (and centring) of the final norm
            before it. ``"frozen"``: that, divided by a scale of the final norm. ``"head"``: the
            masked-LM head, b_U included. ``"model"``: all the model does, norm recomputed, biases.
    """

    readout: Readout
    projection: Projection

    def hidden(
        self, x: Float[Tensor, "*some d_model"], scale: Tensor | float = 1.0
    ) -> Float[Tensor, "*some d_model"]:
        """Returns what W_U multiplies.

        Args:
            x: Vectors.
            scale: The final norm's scale, where it is frozen.
        """
        norm, how = self.readout.norm, self.projection
        if how == "model" and norm is not None:
            x = norm(x)
        elif how in ("folded", "frozen") and norm is not None:
            x = norm.linear(x) / (scale if how == "frozen" else 1.0)
        if how in ("head", "model") and self.readout.head is not None:
            x = self.readout.head(x)
        return x * self.readout.scale

    @property
    def linear(self) -> bool:
        """Whether the logits of ``-x`` are those of ``x`` with the other sign."""
        return self.projection in ("none", "folded", "frozen")

    def scan(
        self,
        hidden: Float[Tensor, "vector d_model"],
        k: int = 1,
        *,
        sides: int = 2,
        targets: Int[Tensor, " vector"] | None = None,
        max_bytes: int = TILE_BYTES,
    ) -> Scan:
        """Returns the scan of vectors, as `hidden` returns them; options are those of `scan`."""
        options = {"sides": sides, "targets": targets, "max_bytes": max_bytes}
        return scan(hidden, self.W_U, self.finish, k, **options)

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding."""
        return require_weight(self.readout.weights, "W_U")

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"] | None:
        """Its bias, where it is read."""
        return None if self.linear else self.readout.weights("b_U")

    def finish(self, products: Tensor, tokens: Tensor | slice) -> Tensor:
        """Makes logits of products with W_U, which are overwritten, of some tokens."""
        b_U, cap = self.b_U, self.readout.soft_cap
        logits = products if b_U is None else products.add_(b_U[tokens])
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


Finish = Callable[[Tensor, "Tensor | slice"], Tensor]
"""Makes logits of products with W_U, which it may overwrite, of some tokens."""


def scan(
    hidden: Float[Tensor, "vector d_model"],
    weight: Float[Tensor, "d_model d_vocab"],
    finish: Finish,
    k: int = 1,
    *,
    sides: int = 2,
    targets: Int[Tensor, " vector"] | None = None,
    max_bytes: int = TILE_BYTES,
) -> Scan:
    """Returns what vectors say about the vocabulary, tile by tile.

    Args:
        hidden: What W_U multiplies.
        weight: W_U.
        finish: Makes logits of products.
        k: How many tokens at either end.
        sides: 1 for the highest tokens only, 2 for the lowest, too.
        targets: One token per vector whose logit and rank are asked for.
        max_bytes: Workspace, besides vectors, W_U and result.
    """
    k = min(k, weight.shape[1])
    rows, tile = tile_sizes(len(hidden), weight.shape[1], hidden.element_size(), max_bytes)
    found = []
    # At least once, so that no vectors have a scan, too.
    for part in blocks(max(1, len(hidden)), rows):
        some = _Running(hidden[part], k, sides)
        if targets is not None:
            columns = weight[:, targets[part]].T
            at = torch.einsum("vm,vm->v", hidden[part], columns)
            some.aim(targets[part], finish(at, targets[part]))
        for columns in blocks(weight.shape[1], max(k, tile)):
            some.take(finish(multiply(hidden[part], weight[:, columns]), columns), columns)
        found.append(some.scan())
    return Scan.join(found)


def tile_sizes(
    count: int, d_vocab: int, element_size: int, max_bytes: int, *, whole: bool = False
) -> tuple[int, int]:
    """Returns how many vectors, and how many tokens, to multiply at once.

    Args:
        count: How many vectors there are.
        d_vocab: How many tokens.
        element_size: Bytes of a number.
        max_bytes: Workspace for a tile of logits and what is made of it.
        whole: Whether a tile has to have all tokens.
    """
    room = max(1, max_bytes // (_COPIES * element_size))
    if whole:
        return max(1, min(count, room // d_vocab)), d_vocab
    rows = max(1, min(count, _ROWS, room // min(d_vocab, _WIDTH)))
    return rows, max(1, min(d_vocab, room // rows))


@dataclass(frozen=True)
class Scan:
    """What vectors say about the vocabulary; side 0 is the softmax of the logits, 1 of -logits.

    Attributes:
        ends: Logits of the highest and of the lowest tokens, furthest first.
        ids: These tokens.
        log_sum: Log of the sum of exponentials.
        entropy: Entropy of the softmax, in nats.
        target: Logit of the target; empty where none was asked for.
        rank: Rank of the target from either end, the first being 1.
    """

    ends: Float[Tensor, "vector side k"]
    ids: Int[Tensor, "vector side k"]
    log_sum: Float[Tensor, "vector side"]
    entropy: Float[Tensor, "vector side"]
    target: Float[Tensor, " target"]
    rank: Int[Tensor, "target side"]

    @property
    def max_prob(self) -> Float[Tensor, "vector side"]:
        """Probability of the first token of either side."""
        signs = torch.tensor([1, -1], device=self.ends.device)[: self.ends.shape[1]]
        return (self.ends[:, :, 0] * signs - self.log_sum).exp()

    @property
    def target_prob(self) -> Float[Tensor, " target"]:
        """Probability of the target."""
        return (self.target - self.log_sum[:, 0]).exp()

    @staticmethod
    def join(parts: list[Scan]) -> Scan:
        """Returns scans of consecutive vectors as one."""
        names = list(Scan.__dataclass_fields__)
        return Scan(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


class _Running:
    """The scan of some vectors after some tiles."""

    def __init__(self, hidden: Tensor, k: int, sides: int) -> None:
        rows, device = len(hidden), hidden.device
        self.k, self.signs = k, (1, -1)[:sides]
        self.ends = [hidden.new_zeros(rows, 0) for _ in self.signs]
        self.ids = [torch.zeros(rows, 0, dtype=torch.long, device=device) for _ in self.signs]
        # Largest exponent so far, and sums of e^(l - largest) and of l e^(l - largest).
        self.peak = hidden.new_full((rows, sides), -torch.inf)
        self.sums, self.weighted = (hidden.new_zeros(rows, sides) for _ in range(2))
        self.targets = torch.zeros(0, dtype=torch.long, device=device)
        self.target = hidden.new_zeros(0)
        self.rank = torch.zeros(0, sides, dtype=torch.long, device=device)

    def aim(self, targets: Tensor, logits: Tensor) -> None:
        """Asks for the ranks of tokens, given their logits."""
        self.targets, self.target = targets, logits
        self.rank = self.rank.new_ones(len(targets), len(self.signs))

    def take(self, logits: Tensor, columns: slice) -> None:
        """Takes in the logits of some tokens."""
        for side, sign in enumerate(self.signs):
            self._extend(logits, columns.start, side)
            if len(self.target):
                self._count(logits, columns, side)
            first = self.ends[side][:, 0] * sign
            shrink = (self.peak[:, side] - first).exp()
            self.peak[:, side] = first
            raised = (logits * sign).sub_(first[:, None]).exp_()
            self.sums[:, side] = self.sums[:, side] * shrink + raised.sum(-1)
            moved = raised.mul_(logits).sum(-1) * sign
            self.weighted[:, side] = self.weighted[:, side] * shrink + moved

    def _extend(self, logits: Tensor, start: int, side: int) -> None:
        size, up = min(self.k, logits.shape[1]), side == 0
        if size == 1:
            values, ids = (logits.max if up else logits.min)(1, keepdim=True)
        else:
            values, ids = logits.topk(size, dim=1, largest=up)
        both = torch.cat([self.ends[side], values], dim=1)
        names = torch.cat([self.ids[side], ids + start], dim=1)
        # Stable: of tokens with the same logit the one of the earlier tile stays ahead.
        order = both.sort(dim=1, descending=up, stable=True).indices[:, : self.k]
        self.ends[side], self.ids[side] = both.gather(1, order), names.gather(1, order)

    def _count(self, logits: Tensor, columns: slice, side: int) -> None:
        ahead = (torch.gt if side == 0 else torch.lt)(logits, self.target[:, None])
        # The target is not ahead of itself, however its two products were rounded.
        here = (self.targets >= columns.start) & (self.targets < columns.stop)
        own = (self.targets - columns.start).clamp(0, ahead.shape[1] - 1)[:, None]
        ahead.scatter_(1, own, ahead.gather(1, own) & ~here[:, None])
        self.rank[:, side] += ahead.sum(-1)

    def scan(self) -> Scan:
        """Returns what was found."""
        log_sum = self.peak + self.sums.log()
        return Scan(
            ends=torch.stack(self.ends, dim=1),
            ids=torch.stack(self.ids, dim=1),
            log_sum=log_sum,
            entropy=log_sum - self.weighted / self.sums,
            target=self.target,
            rank=self.rank,
        )


def unembedding(readout: Readout, projection: object, known: tuple[str, ...]) -> Unembedding:
    """Returns how vectors are read as tokens; None is the way that suits the model.

    Args:
        readout: The model's.
        projection: What was asked for; None for ``"model"`` where that is known, else ``"head"``
            of a masked-LM head and ``"folded"`` of any other.
        known: Projections that the caller offers.

    Raises:
        UnsupportedModel: If there are no logits to read.
        InvalidInput: If there is no such projection, or the model has no such readout.
    """
    readout.require()
    masked = readout.head is not None
    if projection is None:
        projection = "model" if "model" in known else "head" if masked else "folded"
    fits = ("head", "model") if masked else ("none", "folded", "frozen", "model")
    if projection not in known or projection not in fits:
        raise InvalidInput(
            "vectors cannot be read as tokens like this",
            f"projection={projection!r}",
            f"one of {[name for name in known if name in fits]} for this model",
            "Leave it out for the one that suits the model.",
        )
    return Unembedding(readout, projection)  # type: ignore[arg-type]
