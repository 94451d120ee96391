"""What mining costs over a bare forward pass, and what reading values as tokens costs.

``python benchmarks/memories.py [--quick]`` prints five Markdown tables. Operations do not depend on
the machine; seconds are medians, on as many threads as PyTorch takes.
"""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from meters import Memory, command_line, flops, markdown, say, seconds

import tl_contextmix as cm
from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Given, make_batch
from tl_contextmix.core.model_view import Readout
from tl_contextmix.core.readout import Unembedding
from tl_contextmix.demo_models.grammar import Grammar
from tl_contextmix.engine.memory_coefficients import require_feed_forward
from tl_contextmix.methods.memories.miner import Miner, make_miner
from tl_contextmix.methods.memories.shards import Cutting, Documents
from tl_contextmix.methods.memories.topk import TopK

BATCH, LENGTH, K = 16, 128, 25


def plain_gpt2(layers: int, d_model: int, d_vocab: int = 50257, positions: int = 1024) -> Any:
    """Returns a Hugging Face model of GPT-2's shape with random weights."""
    import transformers

    config = transformers.GPT2Config(
        n_layer=layers,
        n_embd=d_model,
        n_head=d_model // 64,
        vocab_size=d_vocab,
        n_positions=positions,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    eager = {"attn_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_config(config, **eager).eval()


def gpt2(layers: int, d_model: int, d_vocab: int = 50257, positions: int = 1024) -> Any:
    """Returns the same model on the TransformerBridge."""
    from transformer_lens.model_bridge import TransformerBridge

    model = plain_gpt2(layers, d_model, d_vocab, positions)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return TransformerBridge.boot_transformers(
            folder, hf_model=model, tokenizer=cm.load_demo("causal-lm").tokenizer, device="cpu"
        )


def batches(view: Any, count: int) -> Iterator[Documents]:
    """Yields batches of random tokens."""
    generator = torch.Generator().manual_seed(1)
    for index in range(count):
        ids = torch.randint(view.d_vocab, (BATCH, LENGTH), generator=generator)
        yield documents_of(view, ids, index * BATCH)


def documents_of(view: Any, ids: torch.Tensor, start: int = 0) -> Documents:
    """Returns token ids [batch pos] as a piece of a corpus, its documents numbered from a start."""
    return Documents(
        make_batch(view, Given(ids)),
        torch.arange(len(ids)) + start,
        torch.arange(len(ids)) + start,
        torch.ones_like(ids, dtype=torch.bool),
        ids.roll(-1, 1),
    )


def miner_of(view: Any, rows: int, k: int = K) -> tuple[Miner, dict[tuple[int, str], TopK]]:
    """Returns what mines batches of so many rows, and where nothing was found yet."""
    how = Cutting(256, rows, "cut", "error", None, False)
    miner: Miner = make_miner(view, how, k, None, None, None, "prefix", "positive", "keep")
    return miner, miner.zero()


class Hooked:
    """What a user writes: a hook on every activation, and a running top-k of each neuron.

    Args:
        body: A GPT-2 of Hugging Face, without its readout.
        k: How many are kept.
    """

    def __init__(self, body: Any, k: int) -> None:
        self.body, self.k = body, k
        self.values: dict[int, torch.Tensor] = {}
        self.places: dict[int, torch.Tensor] = {}

    def take(self, ids: torch.Tensor, start: int) -> None:
        """Runs the body on a batch and takes in its activations."""
        every = torch.arange(start, start + ids.numel())[:, None]
        hooks = [
            block.mlp.act.register_forward_hook(partial(self._keep, layer, every))
            for layer, block in enumerate(self.body.h)
        ]
        self.body(ids)
        for hook in hooks:
            hook.remove()

    def _keep(
        self, layer: int, every: torch.Tensor, module: Any, given: Any, out: torch.Tensor
    ) -> None:
        scores = out.flatten(0, 1)
        places = every.expand_as(scores)
        if layer in self.values:
            scores = torch.cat([self.values[layer], scores])
            places = torch.cat([self.places[layer], places])
        self.values[layer], index = scores.topk(self.k, dim=0)
        self.places[layer] = places.gather(0, index)


def mining(layers: int, d_model: int, count: int, ks: tuple[int, ...]) -> list[list[str]]:
    """Returns rows: mining against the body's pass alone, and against a hook with a running top-k.

    All in turns, batch by batch; outputs are compared at the end. Seconds are the processor's,
    which other processes on the machine change less; medians without the first batch.
    """
    model, body = gpt2(layers, d_model), plain_gpt2(layers, d_model).transformer
    view = as_view(model)
    read = list(batches(view, count))
    passes: list[float] = []
    ours: dict[int, list[float]] = {k: [] for k in ks}
    theirs: dict[int, list[float]] = {k: [] for k in ks}
    miners = {k: miner_of(view, BATCH, k) for k in ks}
    hooked = {k: Hooked(body, k) for k in ks}
    for index, documents in enumerate(read):
        ids = documents.batch.main.ids
        passes.append(seconds(lambda ids=ids: body(ids), time.process_time))
        for k in ks:
            miner, tops = miners[k]
            mine = partial(miner.take, tops, documents)
            hook = partial(hooked[k].take, ids, index * ids.numel())
            ours[k].append(seconds(mine, time.process_time))
            theirs[k].append(seconds(hook, time.process_time))
    rows = []
    for k in ks:
        for (layer, _), top in miners[k][1].items():
            fired = hooked[k].values[layer].T  # the hook keeps negative ones, too, where k is large
            expected = fired.where(fired > 0, -torch.inf)
            assert torch.allclose(top.values, expected, rtol=0, atol=1e-4)
        # Of each batch: what the machine does meanwhile is the same for all three.
        here, there = (
            statistics.median(a / b for a, b in zip(some[k][1:], passes[1:], strict=True))
            for some in (ours, theirs)
        )
        rows.append(
            [
                f"{layers} layers, d={d_model}, k={k}",
                f"{statistics.median(passes[1:]):.2f}",
                f"{BATCH * LENGTH / statistics.median(ours[k][1:]):,.0f}",
                f"{here:.3f}",
                f"{there:.3f}",
            ]
        )
    return rows


MINING = (
    "model",
    f"body's pass of {BATCH} x {LENGTH} tokens, s",
    "mining, tokens/s",
    "mining / body's pass",
    "hook with a running top-k / body's pass",
)
"""Columns of `mining`."""


def merging(columns: int) -> None:
    """Prints seconds of merging two states, and of a Python loop over the memories."""
    generator = torch.Generator().manual_seed(0)

    def state() -> TopK:
        values = torch.rand(columns, K, generator=generator).sort(dim=1, descending=True).values
        places = torch.randperm(columns * K, generator=generator).view(columns, K)
        return TopK(values, places, places, places)

    one, other = state(), state()
    found = one.merge(other)
    some = min(columns, 2000)

    def loop() -> list[list[tuple[float, int]]]:
        kept = []
        for column in range(some):
            entries = [
                (-float(v), int(p))
                for top in (one, other)
                for v, p in zip(top.values[column], top.places[column], strict=True)
            ]
            kept.append(sorted(entries)[:K])
        return kept

    for column, entries in enumerate(loop()):
        assert [-value for value, _ in entries] == found.values[column].tolist()
        assert [place for _, place in entries] == found.places[column].tolist()
    fast = statistics.median(seconds(lambda: one.merge(other)) for _ in range(5))
    slow = statistics.median(seconds(loop) for _ in range(5)) * columns / some
    say(f"\nMerging the {K} triggers of {columns:,} memories\n")
    say("| ours, s | a loop over memories, s | times |\n|---|---|---|")
    say(f"| {fast:.3f} | {slow:.2f} | {slow / fast:.0f} |")


def table(values: int, d_model: int, d_vocab: int) -> None:
    """Prints operations and memory of the static table, against its matrix products."""
    weight = torch.randn(d_model, d_vocab) / d_model**0.5
    vectors = torch.randn(values, d_model)
    reader = Unembedding(Readout(None, None, {"W_U": weight}.get), "folded")
    scan = partial(reader.scan, vectors)
    products = 2 * values * d_model * d_vocab
    counted, matrices = flops(scan), flops(scan, elementwise=False)
    with Memory() as meter:
        scan()
    took = seconds(scan)
    say(f"\nValues read as tokens: {values:,} values, d={d_model}, V={d_vocab:,}\n")
    say("| 2 N d V | products | all operations | most bytes at once | s |\n|---|---|---|---|---|")
    say(
        f"| {products:.3g} | {matrices / products:.3f} | {counted / products:.3f} | "
        f"{meter.peak / 2**20:.0f} MiB | {took:.1f} |"
    )


def on_text(layers: int, d_model: int, d_vocab: int, length: int = 64) -> None:
    """Prints operations of `ff_memories` on a text, first call or later one, in forward passes."""
    model = gpt2(layers, d_model, d_vocab)
    ids = torch.randint(d_vocab, (1, length), generator=torch.Generator().manual_seed(1))
    view = as_view(model)
    once = flops(partial(view.run, make_batch(view, Given(ids)), []), elementwise=False)
    whole = flops(partial(cm.ff_memories, model, ids), elementwise=False) / once
    readout = 2 * d_model * d_vocab / once
    # The pass has read the last stream.
    states = 1 + (3 * layers - 1) * length * readout
    every = layers * require_feed_forward(view.blocks()[0]).width * readout
    say(f"\nMemories of {length} tokens: {layers} layers, d={d_model}, V={d_vocab:,}; in passes\n")
    say("| ff_memories | of it a pass and states as tokens | all values as tokens |\n|---|---|---|")
    say(f"| {whole:.1f} | {states:.1f} | {every:.0f} |")


def corpus(tokens: int) -> None:
    """Prints speed and memory of mining sentences of the embedded model's grammar."""
    grammar = Grammar(5, "train")
    model = cm.load_demo("causal-lm")
    read = [0]
    marks: list[tuple[int, float, float]] = []

    def sentences() -> Iterator[str]:
        every = max(1, tokens // 4)
        while read[0] < tokens:
            text = grammar.sentence().text
            read[0] += len(text.split()) + 1
            if read[0] // every > len(marks):
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                marks.append((read[0], time.perf_counter() - start, peak))
            yield text

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        found = cm.mine_triggers(model, sentences(), out=folder, k=K, batch_size=64)
        took = time.perf_counter() - start
        size = (Path(folder) / "triggers.parquet").stat().st_size
    assert found is not None
    total = found.manifest["counts"]["tokens"]
    say("\nMining the embedded model\n")
    say("| tokens read | s | tokens/s | peak memory of the process |\n|---|---|---|---|")
    for seen, took_so_far, peak in marks:
        say(f"| {seen:,} | {took_so_far:.0f} | {seen / took_so_far:,.0f} | {peak:,.0f} MiB |")
    say(f"\n{total:,} tokens in {took:.0f} s, {total / took:,.0f} tokens/s; {size:,} bytes")


def main() -> int:
    """Prints all tables."""
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, seconds in all")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    quick = parser.parse_args().quick
    tokens = 20_000 if quick else parser.parse_args().tokens
    # First: the peak memory of a process never falls again.
    with torch.no_grad():
        corpus(tokens)
        merging(2_000 if quick else 36_864)
        table(256 if quick else 3_072, 128 if quick else 768, 5_000 if quick else 50_257)
        on_text(2 if quick else 12, 128 if quick else 768, 5_000 if quick else 50_257)
        for layers in (2,) if quick else (4, 12):
            rows = mining(layers, 128 if quick else 768, 4, (10, K, 50))
            say(f"\nMining, and a hook with a running top-k\n\n{markdown(MINING, rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
