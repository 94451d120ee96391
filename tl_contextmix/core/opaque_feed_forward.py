"""A feed-forward sublayer that is not taken apart: its module, as one component of the stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from tl_contextmix.core.blocks import FeedForward, Trace
from tl_contextmix.errors import UnsupportedModel


@dataclass(frozen=True)
class OpaqueFeedForward(FeedForward):
    """A feed-forward sublayer whose neurons are not known, such as a mixture of experts.

    What asks only for its input or for what it adds to the stream is answered; what asks for its
    neurons is refused, with `refusal`.

    Attributes:
        pre: As `post`; it has no pre-activations.
        post: Name of what its module puts out, edits included.
        module: Calls the module on its (normed) input.
        working: About how many numbers the module holds of each token as it computes.
    """

    module: Callable[[Float[Tensor, "batch target d_model"]], Tensor] = field(
        kw_only=True, repr=False
    )
    working: int = field(kw_only=True)
    neurons_known: ClassVar[bool] = False

    @property
    def pre_names(self) -> tuple[str, ...]:
        """Nothing: it has no pre-activations."""
        return ()

    @property
    def read_names(self) -> tuple[str, ...]:
        """Names of the activations that tell what the sublayer reads."""
        return (self.post,)

    @property
    def W_out(self) -> Tensor:
        """Raises UnsupportedModel: it is not taken apart into neurons."""
        raise UnsupportedModel(self.refusal)

    @property
    def width(self) -> int:
        """About how many numbers it holds of each token as it computes."""
        return self.working

    def branches(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        """Returns nothing: it has no branches."""
        return ()

    def reread(self, x: Float[Tensor, "batch target d_model"]) -> Iterator[tuple[str, str, Tensor]]:
        """Yields what the module makes of its (normed) input, see `FeedForward.reread`."""
        yield "module(input) = output", self.post, self.module(x)

    def __call__(self, stream: Float[Tensor, "*some d_model"]) -> Float[Tensor, "*some d_model"]:
        """Returns what the sublayer adds to the residual stream, given what it reads of it."""
        x = stream if self.norm_in is None else self.norm_in(stream)
        return self.project(self.module(x.reshape(1, -1, x.shape[-1])).reshape(x.shape))

    def project(self, post: Float[Tensor, "*some d_model"]) -> Float[Tensor, "*some d_model"]:
        """Returns what the sublayer adds to the residual stream, given what its module puts out."""
        return post if self.norm_out is None else self.norm_out(post)

    def raw_output(self, trace: Trace, where: Any = slice(None)) -> Float[Tensor, "*some d_model"]:
        """Returns what its module put out in a pass, edits included."""
        return trace[self.post][where]

    def coefficients(self, trace: Trace, where: Any = slice(None)) -> Tensor:
        """Raises UnsupportedModel: it is not taken apart into neurons."""
        raise UnsupportedModel(self.refusal)
