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

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import tl_contextmix as cm
from tl_contextmix.demo_models import demo_folder
from tl_contextmix.demo_models.grammar_fr import TranslationGrammar


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


def interleaved(ways: list[Callable[[], object]], runs: int) -> list[float]:
    """Medians of the seconds each way takes, run in turn."""
    taken: list[list[float]] = [[] for _ in ways]
    for _ in range(runs):
        for way, times in zip(ways, taken, strict=True):
            start = time.perf_counter()
            way()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in taken]


def operations(way: Callable[[], object]) -> int:
    """Products of matrices, counted."""
    with FlopCounterMode(display=False) as counter:
        way()
    return counter.get_total_flops()


def row(name: str, layers: int | None, count: int, length: int, runs: int) -> str:
    """Measures one model on so many sentences."""
    model = plain(layers)
    bridge, models = bridged(model), shortened(model)
    pairs = TranslationGrammar(7, "test").translations(count)
    tokens = bridge.tokenizer([p.source_text for p in pairs], padding=True, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]

    def ours() -> cm.LayerwiseDecoding:
        return cm.decoder_lens(bridge, ids, attention_mask=mask, max_new_tokens=length)

    def theirs() -> list[Any]:
        return calls(models, ids, mask, length)

    found, expected = ours(), theirs()
    for place, answers in enumerate(expected):
        for said, real, answer in zip(
            found.ids[:, place], found.mask[:, place], answers, strict=True
        ):
            assert said[real].tolist() == answer[: int(real.sum())].tolist(), (name, place)
    here, there = interleaved([ours, theirs], runs)
    flops = operations(ours), operations(theirs)
    cells = (
        name,
        len(models) - 1,
        count,
        f"{here:.3f}",
        f"{there:.3f}",
        f"{there / here:.1f}x",
        f"{flops[0]:.3g}",
        f"{flops[1]:.3g}",
        f"{flops[1] / flops[0]:.2f}x",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few runs")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)
    runs, length = (3 if quick else 15), 20
    columns = "model, L, sentences, ours s, generate calls s, faster, ours FLOPs, calls FLOPs, less"
    sys.stdout.write("| " + " | ".join(columns.split(", ")) + " |\n")
    sys.stdout.write("|" + "---|" * len(columns.split(", ")) + "\n")
    for name, layers in (("embedded", None), ("random", 6), ("random", 12)):
        for count in (1, 8, 32):
            sys.stdout.write(row(name, layers, count, length, runs) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
