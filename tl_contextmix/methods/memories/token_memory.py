"""Which source token feeds which memory: the neuron axis and the token axis of one vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Given, Input, Inputs
from tl_contextmix.adapters.passes import Pass, run_pass
from tl_contextmix.core.feed_forward_parts import Bias
from tl_contextmix.core.model_view import StackName
from tl_contextmix.core.neuron_shares import neuron_shares
from tl_contextmix.core.validation import Layers
from tl_contextmix.engine.memory_coefficients import require_feed_forward
from tl_contextmix.engine.parts import identities, linear_points
from tl_contextmix.engine.registry import method
from tl_contextmix.results import TokenMemory
from tl_contextmix.results.axes import positions


@method(cites=("geva2021transformer", "kobayashi2024analyzing"))
def token_memory(
    model: object,
    input: Input,
    *,
    layer: Layers | None = None,
    pos: int | Sequence[int] | None = None,
    neurons: int | Sequence[int] | None = None,
    stack: StackName | None = None,
    bias: Bias = "contributor",
    **inputs: Unpack[Inputs],
) -> TokenMemory:
    r"""Returns the share of every source token in the coefficient of every memory.

    .. math:: \phi_{ijk} = q_{ijk}\, r_{ik}, \qquad m_k(i) = \sum_j \phi_{ijk} + \phi_{ik}

    where :math:`q_{ijk}` is what source ``j`` contributes to the pre-activation of neuron ``k`` at
    ``i`` through attention and the residual connection (patterns and norm scales frozen) and
    :math:`r_{ik}` the neuron's secant slope: integrated gradients in closed form (Kobayashi et al.
    2024, eq. 12), before W_out is applied. The same feed-forward output is
    :math:`\sum_k m_k v_k + b` over neurons and the sum of `decompose`'s parts over tokens.

    Args:
        model: Any TransformerLens model, see `tl_contextmix.check`.
        input: A text, several, or token ids [batch, pos].
        layer: Layer or layers; None for all.
        pos: Positions of the memories; None for all, negative from the end.
        neurons: Neuron or neurons; None for all.
        stack: See `decompose`; with ``"cross"`` the sources are the decoder's and the encoder's
            tokens.
        bias: What the path starts from, see `decompose`.
        **inputs: Mask, padding and the like, see `Inputs`.

    Returns:
        `TokenMemory`: ``shares`` [batch layer target source neuron] and ``bias``, in units of the
        activation. A constant added after a gate (b_in of gated HookedTransformers) is no part
        of the coefficient.

    Raises:
        InvalidInput: If an argument does not fit the model.
        UnsupportedModel: If the activation does not act on each unit alone.

    Cost: a forward pass; per layer and branch the less of ``2 n d_model (d_model + H K)`` and
    ``2 d_model K (d_model + n)`` operations for what heads bring from each source to K neurons, and
    ``2 p n H K`` to mix it at p positions. The shares are ``p n K`` numbers per layer, held once.
    """
    needs = identities(("mlp_out",)) - {"mlp"}
    forward_pass = run_pass(
        as_view(model), Given(input, **inputs), layer=layer, stack=stack, needs=needs
    )
    sizes = {require_feed_forward(block).width for block in forward_pass.blocks}
    chosen = positions("neuron", neurons, range(min(sizes)))
    rows = positions("pos", pos, forward_pass.target.labels())
    source = forward_pass.source("mlp_out")
    target = forward_pass.target.select(list(range(len(forward_pass.target.ids))), rows)
    device = forward_pass.view.device
    columns = torch.tensor(chosen, device=device)

    def memories(part: Pass) -> dict[str, tuple[str, Tensor]]:
        mine = part.own(rows) or []
        # The result is what takes memory here: there is one of it.
        shape = (len(part.batch.main.ids), len(part.blocks), len(mine), len(chosen))
        rest = torch.empty(shape, dtype=part.trace.dtype, device=device)
        shares = rest.new_empty(*shape[:3], part.source("mlp_out").shape[1], len(chosen))
        for index, block in enumerate(part.progress("token_memory")):
            read = linear_points(block, part.trace, part.stack, ("mlp_in",))["mlp_in"]
            ff, own = require_feed_forward(block).followed(part.trace), shares[:, index]
            rest[:, index] = neuron_shares(ff, read, bias, mine, columns, own)
        return {
            "shares": ("batch layer rows source:mlp_out", shares),
            "bias": ("batch layer rows", rest),
        }

    with torch.no_grad():
        found = forward_pass.together(memories, rows)
    padding = ~target.mask.to(device), ~source.mask.to(device)
    unread = padding[0][:, :, None] | padding[1][:, None, :]
    return TokenMemory(
        shares=found["shares"].masked_fill_(unread[:, None, :, :, None], 0),
        bias=found["bias"].masked_fill_(padding[0][:, None, :, None], 0),
        neurons=tuple(chosen),
        layers=forward_pass.layers,
        stack=forward_pass.stack,
        target=target,
        source=source,
        provenance=forward_pass.provenance("token_memory", {"pos": rows, "bias": bias}),
    )
