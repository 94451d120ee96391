"""Log-probability contributions: how much work the bound spares, and which score finds neurons.

``python benchmarks/log_prob.py`` prints Markdown tables; ``--quick`` takes seconds. What they
say, and on which numbers, is in README.md beside this file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, get_args

import torch
from meters import Memory, WithoutProducts, command_line, flops, interleaved, row, say
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.core.contrast import Contrast
from tl_contextmix.core.model_view import Readout
from tl_contextmix.core.residual_stream import Neurons
from tl_contextmix.core.statistics import bootstrap_interval
from tl_contextmix.core.tiled_logits import Vocabulary, read_vocabulary
from tl_contextmix.core.token_sums import FrozenNorm, Norm
from tl_contextmix.demo_models.lexicon import FACTS
from tl_contextmix.engine.log_prob_scores import Split, TopComponents, best_components
from tl_contextmix.methods.log_prob.contributions import Score
from tl_contextmix.results.components import Grid

GPT2 = (12, 3072, 768, 50257)
MAX_BYTES = 2**28


class Sizes:
    """A stack of feed-forward layers with numbers that are drawn, not trained.

    Args:
        layers: How many.
        neurons: In each.
        width: Of the residual stream.
        vocabulary: How many tokens.
        heavy: Standard deviation of the logarithm of activations, most of which are small.
        sharp: Standard deviation of the final logits.
    """

    def __init__(
        self,
        layers: int,
        neurons: int,
        width: int,
        vocabulary: int,
        *,
        heavy: float = 1.5,
        sharp: float = 2.5,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        ids = torch.zeros(1, dtype=torch.long)
        start = draw(1, width)
        self.weights = {"W_U": draw(width, vocabulary) * sharp / width**0.5}
        self.splits, states = [], [torch.zeros(1, width), start]
        for layer in range(layers):
            rows = draw(neurons, width) * 2 / (neurons * width) ** 0.5 * width**0.5
            post = draw(1, 1, neurons).sign() * (heavy * draw(1, 1, neurons) - heavy).exp()
            grid = Grid("mlp", layer, ids, (("neuron", range(neurons)),))
            path = FrozenNorm((), torch.ones(1, 1))
            self.splits.append(
                Split(layer + 1, grid, neurons=Neurons(lambda rows=rows: rows, post, path))
            )
            states.append(states[-1] + post[:, 0] @ rows)
        self.states = torch.stack(states, dim=1)
        norm = Norm("ln", None, None, 1e-5)
        self.readout = Readout(norm=norm, head=None, weights=self.weights.get)
        best = self.readout(self.states[:, -1]).argmax(dim=-1)
        self.target = best

    def vocabulary(self, max_bytes: int = MAX_BYTES) -> Vocabulary:
        """Returns the readout with the scale of the norm frozen."""
        return read_vocabulary(
            self.readout,
            "frozen",
            self.states[:, -1],
            Contrast((*self.target.split(1),)),
            max_bytes,
        )

    def best(self, k: int, max_bytes: int = MAX_BYTES) -> TopComponents:
        """Returns the best neurons."""
        return best_components(self.vocabulary(max_bytes), self.states[0], self.splits, k, 0)

    def full(self, layers: int | None = None, max_bytes: int = MAX_BYTES) -> Tensor:
        """Returns the scores of all neurons, of some layers or all."""
        vocabulary = self.vocabulary(max_bytes)
        return torch.stack(
            [
                vocabulary.neuron_gains(
                    self.states[:, split.step], split.neurons.vectors, split.neurons.coefficients
                )[0, 0]
                for split in self.splits[:layers]
            ]
        )


def full_flops(sizes: Sizes) -> int:
    """Returns the operations of evaluating all neurons; products are counted, not computed."""
    with WithoutProducts():
        one = flops(partial(sizes.full, 1), elementwise=False)
    return one * len(sizes.splits)


def peak(work: Callable[[], object]) -> int:
    """Returns the most bytes a piece of work has alive at once."""
    with Memory() as memory:
        work()
    return memory.peak


def work_table(shape: tuple[int, int, int, int], ks: list[int]) -> None:
    """Prints how many operations the bound spares, on numbers that are drawn."""
    names = ("activations", "logits", "k", "best", "k-th", "evaluated", "of")
    row(*names, "ours", "all", "less by", "peak MiB")
    row(*["---"] * 11)
    for heavy in (1.0, 2.0):
        for sharp in (1.0, 2.5, 5.0):
            sizes = Sizes(*shape, heavy=heavy, sharp=sharp)
            every = full_flops(sizes)
            for k in ks:
                found: list[TopComponents] = []
                spent = flops(lambda k=k, s=sizes, f=found: f.append(s.best(k)), elementwise=False)
                used = peak(partial(sizes.best, k))
                best, last = (float(score) for score in found[0].score[[0, -1]])
                row(
                    f"log-normal {heavy}",
                    f"sd {sharp}",
                    k,
                    f"{best:.2f}",
                    f"{last:.3f}",
                    found[0].evaluated,
                    shape[0] * shape[1],
                    f"{spent:.3g}",
                    f"{every:.3g}",
                    f"{every / spent:.0f}x",
                    f"{used / 2**20:.0f}",
                )


def decompose_resid(model: Any, ids: Tensor, target: int) -> Tensor:
    """Returns increases by sublayer [component], as a user of TransformerLens takes them.

    From its `decompose_resid`, the states one after the other through the final norm, its scale
    frozen, and the unembedding: for models whose final norm is folded into W_U.
    """

    def needed(name: str) -> bool:
        read = (
            "hook_attn_out",
            "hook_mlp_out",
            "hook_embed",
            "hook_pos_embed",
            "ln_final.hook_scale",
        )
        return name.endswith(read)

    _, cache = model.run_with_cache(ids, names_filter=needed)
    parts = cache.decompose_resid(pos_slice=-1)[:, 0]
    # Token and position embeddings are one component here.
    states = torch.cat([torch.zeros_like(parts[:1]), parts.cumsum(dim=0)[1:]])
    read = cache.apply_ln_to_stack(states[:, None], pos_slice=-1)[:, 0] @ model.W_U + model.b_U
    return read.log_softmax(dim=-1)[:, target].diff()


def logit_attribution(model: Any, ids: Tensor, target: int, foil: int | None = None) -> Tensor:
    """Returns what each head brings to a logit, or a difference, by TransformerLens' tool."""
    from transformer_lens.tools.analysis import direct_logit_attribution

    found = direct_logit_attribution(
        model, ids, answer_tokens=target, incorrect_tokens=foil, unit="head"
    )
    return found.attribution[:-1, 0]  # the last is everything else


def all_neurons(shape: tuple[int, int, int, int]) -> None:
    """Prints what evaluating every neuron of a layer takes, and the notebook's loop.

    The loop is that of Yu and Ananiadou's notebook, on tensors: all neurons of a layer at once.
    `peers.py` runs the notebook itself.
    """
    sizes = Sizes(*shape)
    split, target = sizes.splits[0], int(sizes.target[0])
    assert split.neurons is not None
    neurons, base = split.neurons, sizes.states[0, split.step]
    scale = sizes.states[:, -1].var(dim=-1, unbiased=False).add(1e-5).sqrt()

    def read(states: Tensor) -> Tensor:
        logits = (states - states.mean(-1, keepdim=True)) / scale @ sizes.weights["W_U"]
        return torch.log(torch.softmax(logits, -1)[..., target])

    def loop() -> Tensor:
        return read(neurons.activations[0, 0, :, None] * neurons.rows + base) - read(base)

    ways = (lambda: sizes.full(1)[0], loop)
    assert float((ways[0]() - loop()).abs().max()) < 1e-4
    row(f"all {shape[1]:,} neurons of a layer, V={shape[3]:,}", "seconds", "peak MiB")
    row(*["---"] * 3)
    for name, way in zip(("ours", "the notebook's loop"), ways, strict=True):
        taken = interleaved([way], 3, time.process_time)[0]
        row(name, f"{taken:.2f}", f"{peak(way) / 2**20:.0f}")


def facts(count: int | None = None) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yields a pattern, its texts and their answers: what the embedded model knows.

    Args:
        count: How many of each; None for all.
    """
    known = FACTS[:count]
    patterns = (
        ("the capital of", "the capital of {0} is", " {1}"),
        ("the language of", "people in {0} speak", " {2}"),
    )
    for name, text, answer in patterns:
        yield name, [text.format(*f) for f in known], [answer.format(*f) for f in known]


def evaluated_table(model: object, facts_each: int | None) -> None:
    """Prints how many neurons of the embedded, trained model are evaluated to find the best."""
    row("facts", "k", "evaluated (median)", "most", "of")
    row(*["---"] * 5)
    for name, texts, answers in facts(facts_each):
        for k in (10, 100):
            found = cm.log_prob_contributions(model, texts, target=answers, by="ff_neuron", k=k)
            numbers = found.evaluated
            row(name, k, int(numbers.median()), int(numbers.max()), int(found.possible[0]))


def knockout_table(
    model: object, facts_each: int | None, *, count: int = 10, everywhere: bool = True
) -> dict[str, Tensor]:
    """Prints MRR and probability once the neurons that each score finds are set to zero."""
    row("score", "MRR", "95 % interval", "probability", "95 % interval")
    row(*["---"] * 5)
    found: dict[str, list[Tensor]] = {"none": [], "random": []}
    for _, texts, answers in facts(facts_each):
        for score in get_args(Score):
            best = cm.log_prob_contributions(
                model, texts, target=answers, by="ff_neuron", score=score
            ).top(count)
            first = score == get_args(Score)[0]
            done = cm.knockout(
                model,
                texts,
                target=answers,
                neurons=best,
                everywhere=everywhere,
                controls=10 if first else 0,
            )
            found.setdefault(score, []).append(done.after)
            if first:
                found["none"].append(done.before)
                found["random"].append(done.controls.mean(dim=1))
    for name, parts in found.items():
        values = torch.cat(parts)
        cells = []
        for column in (2, 1):
            low, high = bootstrap_interval(values[:, column])
            cells += [f"{float(values[:, column].mean()):.3f}", f"{low:.3f} to {high:.3f}"]
        row(name, *cells)
    return {name: torch.cat(parts) for name, parts in found.items()}


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables."""
    parser = command_line(__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a small vocabulary, few layers and facts"
    )
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)
    with torch.no_grad():
        work_table((3, 256, 64, 2000) if quick else GPT2, [10] if quick else [10, 100])
        say()
        all_neurons((3, 256, 64, 2000) if quick else GPT2)
        model = cm.load_demo("causal-lm")
        say()
        facts_each = 4 if quick else None
        evaluated_table(model, facts_each)
        for everywhere in (True, False):
            where = "all positions" if everywhere else "the predicting position"
            say(f"\nTen neurons set to zero at {where}\n")
            knockout_table(model, facts_each, everywhere=everywhere)


if __name__ == "__main__":
    main()
