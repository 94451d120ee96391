"""What a model costs before its first answer, what each later call checks, and half precision.

``python benchmarks/first_calls.py [--quick]`` prints two Markdown tables. The first is of models in
single precision: a first call beside a forward pass, and what is checked again at each call. The
second is of a Llama in bfloat16 with the widths of a model of a billion parameters and fewer
layers: calls in forward passes over as many tokens, in seconds, in operations and in how often all
of its weights are converted to single precision. Seconds are the processor's, on one thread, the
least of a few runs; operations and conversions do not depend on the machine. It needs
TransformerLens 4; the second table takes 2 GiB and a few minutes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from memories import gpt2
from meters import command_line, flops, row, say, seconds
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.adapters import as_view, views
from tl_contextmix.core import half_weights

Work = Callable[[], object]
LENGTH = 32


def least(work: Work, runs: int) -> float:
    """Returns the least seconds of the processor that a piece of work takes."""
    return min(seconds(work, time.process_time) for _ in range(runs))


def anew(model: Any, work: Work) -> Work:
    """Returns work on a model that the package has not seen yet."""

    def first() -> None:
        views._KNOWN.pop(model, None)
        work()

    return first


def repeated(model: Any, runs: int) -> float:
    """Returns the seconds of what a call checks again: the model, and hooks on it."""
    view = as_view(model)

    def checks() -> None:
        as_view(model)
        view.hooked()

    return least(checks, runs)


def llama(layers: int, width: int, neurons: int, words: int) -> Any:
    """Returns a Llama in bfloat16 with random weights, on the TransformerBridge."""
    import transformers
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    sizes: dict[str, Any] = {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": neurons,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 256,
        "tie_word_embeddings": True,
        "attn_implementation": "eager",
    }
    config = transformers.LlamaConfig(**sizes)
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    return build_bridge_from_module(model, "LlamaForCausalLM", hf_config=config)


def converted(work: Work) -> int:
    """Returns the bytes in half precision that a piece of work converts, weight by weight."""
    total = 0
    convert = half_weights._converted

    def counted(weight: Tensor, dtype: torch.dtype) -> Tensor:
        nonlocal total
        total += weight.nbytes
        return convert(weight, dtype)

    with mock.patch.object(half_weights, "_converted", counted):
        work()
    return total


def products(model: Any, rows: int) -> None:
    """Multiplies every matrix of a model with some rows in single precision, and does no more."""
    for weight in model.parameters():
        if weight.ndim == 2:
            x = torch.ones(rows, weight.shape[1])
            torch.matmul(x, half_weights.in_precision(weight.T, torch.float32))


def calls(model: Any, ids: Tensor) -> dict[str, Work]:
    """Returns questions about a model, the first one before it is known."""
    asked: dict[str, Work] = {
        "nothing but a pass's products, in float32": partial(products, model, LENGTH),
        "the same, n=4": partial(products, model, 4),
        "`check`": anew(model, partial(cm.check, model)),
        "`check`, then Value Zeroing, n=4": anew(
            model, partial(cm.value_zeroing, model, ids[:, :4])
        ),
        "Value Zeroing, n=4": partial(cm.value_zeroing, model, ids[:, :4]),
        "Value Zeroing": partial(cm.value_zeroing, model, ids),
        "norms up to the feed-forward block": partial(cm.attention_norms, model, ids, at="mlp_in"),
        "norms through the feed-forward block": partial(
            cm.attention_norms, model, ids, at="block_out"
        ),
        "log-prob contributions by layer": partial(cm.log_prob_contributions, model, ids),
        "log-prob contributions by head": partial(cm.log_prob_contributions, model, ids, by="head"),
        "knockout, one head and one control": partial(
            cm.knockout, model, ids, heads=[(0, 1)], pos=-1, controls=1
        ),
    }
    return asked


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="small models, one run; for a look")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)
    runs, many = (1, 2) if quick else (5, 200)
    shapes = {"GPT-2, 2 layers" if quick else "GPT-2": (2, 128, 500) if quick else (12, 768, 50257)}
    models = {"embedded": cm.load_demo("causal-lm")}
    models |= {name: gpt2(*shape) for name, shape in shapes.items()}
    row("model", "n", "pass, s", "first `as_view`, passes", "in operations", "checks per call, ms")
    row(*["---"] * 6)
    with torch.no_grad():
        for name, model in models.items():
            n = 6 if name == "embedded" else 64
            forward = partial(model, torch.arange(3, 3 + n)[None])
            forward()
            once, count = least(forward, runs), flops(forward, elementwise=False)
            known = anew(model, partial(as_view, model))
            row(
                name,
                n,
                f"{once:.3g}",
                f"{least(known, runs) / once:.2f}",
                f"{flops(known, elementwise=False) / count:.2f}",
                f"{1000 * repeated(model, many):.2f}",
            )
        say()
        model = llama(1, 256, 1024, 2000) if quick else llama(4, 2048, 8192, 128_256)
        ids = torch.randint(3, 2000, (1, LENGTH), generator=torch.Generator().manual_seed(0))
        forward = partial(model, ids)
        forward()
        once, count = least(forward, runs), flops(forward, elementwise=False)
        weights = sum(weight.nbytes for weight in model.parameters())
        row("call, bfloat16, n=32", "passes", "in operations", "all weights converted, times")
        row(*["---"] * 4)
        for name, work in calls(model, ids).items():
            work()
            taken, operations = least(work, runs), flops(work, elementwise=False)
            times = converted(work) / weights
            row(name, f"{taken / once:.2f}", f"{operations / count:.2f}", f"{times:.2f}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
