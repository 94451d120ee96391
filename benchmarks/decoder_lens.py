"""DecoderLens: all encoder layers in one batch against a generate call per layer.

``python benchmarks/decoder_lens.py [--quick]`` prints a Markdown table: seconds (medians of
interleaved runs on one thread) and operations. The models: the embedded encoder-decoder, and
random ones of its shape with 6 and 12 encoder layers, whose outputs run to the length limit. Both
ways' tokens are compared first. It needs TransformerLens 4 (TransformerBridge of T5).

*generate calls*: for every layer ``generate`` of the same Hugging Face model with the later encoder
blocks removed, on all sentences at once, with its key-value cache: what one would write without
this package.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from meters import command_line, flops, interleaved, markdown, show

sys.path.append(str(Path(__file__).parents[1] / "scripts/demo_models"))

from grammar_fr import TranslationGrammar

import tl_contextmix as cm
from tl_contextmix.demo_models import demo_folder
from tl_contextmix.results import LayerwiseDecoding


def plain(layers: int | None) -> Any:
    """The embedded model (None), or a random one of its shape with so many encoder layers."""
    from transformers import T5Config, T5ForConditionalGeneration

    folder = demo_folder("encoder-decoder")
    if layers is None:
        return T5ForConditionalGeneration.from_pretrained(folder).eval()
    config = T5Config.from_pretrained(folder)
    config.num_layers = layers
    torch.manual_seed(0)
    return T5ForConditionalGeneration(config).eval()


def bridged(model: Any) -> Any:
    """The same model on a TransformerBridge, which takes over a copy."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformers import AutoTokenizer

    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    bridge = build_bridge_from_module(model, "T5ForConditionalGeneration", hf_config=model.config)
    bridge.tokenizer = AutoTokenizer.from_pretrained(demo_folder("encoder-decoder"))
    return bridge.eval()


def shortened(model: Any) -> list[Any]:
    """The model with the first 0, 1, ... encoder blocks."""
    found = []
    for count in range(len(model.encoder.block) + 1):
        short = copy.copy(model)
        short._modules = dict(model._modules)
        encoder = copy.copy(model.encoder)
        encoder._modules = {**model.encoder._modules, "block": model.encoder.block[:count]}
        short._modules["encoder"] = encoder
        found.append(short)
    return found


def calls(models: list[Any], ids: torch.Tensor, mask: torch.Tensor, length: int) -> list[Any]:
    """One generate call per layer."""
    return [
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=length,
            do_sample=False,
            past_key_values=_cache(),
        )[:, 1:]
        for model in models
    ]


def _cache() -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def ways(
    layers: int | None, count: int, length: int
) -> tuple[Callable[[], LayerwiseDecoding], Callable[[], list[Any]]]:
    """Returns both ways for one model and so many sentences, which say the same."""
    model = plain(layers)
    bridge, models = bridged(model), shortened(model)
    pairs = TranslationGrammar(7, "test").translations(count)
    tokens = bridge.tokenizer([p.source_text for p in pairs], padding=True, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    here = partial(cm.decoder_lens, bridge, ids, attention_mask=mask, max_new_tokens=length)
    there = partial(calls, models, ids, mask, length)
    found = here()
    for place, answers in enumerate(there()):
        for said, real, answer in zip(
            found.ids[:, place], found.mask[:, place], answers, strict=True
        ):
            assert said[real].tolist() == answer[: int(real.sum())].tolist(), (layers, place)
    return here, there


def row(name: str, layers: int | None, count: int, length: int, runs: int) -> list[object]:
    """Measures one model on so many sentences."""
    both = ways(layers, count, length)
    here, there = interleaved(both, runs)
    ours, theirs = (flops(way, elementwise=False) for way in both)
    return [
        name,
        len(both[0]().layers) - 1,
        count,
        f"{here:.3f}",
        f"{there:.3f}",
        f"{there / here:.1f}x",
        f"{ours:.3g}",
        f"{theirs:.3g}",
        f"{theirs / ours:.2f}x",
    ]


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="few runs")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)
    runs, length = (3 if quick else 15), 20
    columns = "model, L, sentences, ours s, generate calls s, faster, ours FLOPs, calls FLOPs, less"
    models = (("embedded", None), ("random", 6), ("random", 12))
    asked = ((name, layers, count) for name, layers in models for count in (1, 8, 32))
    show(markdown(columns.split(", "), (row(*one, length, runs) for one in asked)))


if __name__ == "__main__":
    main()
