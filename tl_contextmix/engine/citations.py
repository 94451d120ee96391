"""What to cite: BibTeX of the papers and programs behind each method."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tl_contextmix.errors import bad
from tl_contextmix.results import ContextMap, Provenance, Result

_KOBAYASHI = ("Goro Kobayashi", "Tatsuki Kuribayashi", "Sho Yokoi", "Kentaro Inui")
_EMNLP = "Proceedings of the {} Conference on Empirical Methods in Natural Language Processing"


@dataclass(frozen=True)
class Work:
    """A paper or a program.

    Attributes:
        authors: First name, then last name.
        title: As published.
        year: Of publication.
        booktitle: Proceedings; empty for what is in none.
        short: Name of the venue for readers, for example ``"EMNLP 2020"``.
        address: arXiv number or DOI or address, as a BibTeX field and its value.
        pages: In the proceedings.
    """

    authors: tuple[str, ...]
    title: str
    year: int
    booktitle: str
    short: str
    address: tuple[str, str]
    pages: str = ""

    @property
    def sentence(self) -> str:
        """The work in one line, for a reader."""
        names = ", ".join(name.split()[-1] for name in self.authors)
        return f"{names}: {self.title} ({self.short})."

    def bibtex(self, key: str) -> str:
        """Returns the entry under a key, in ASCII."""
        kind = "inproceedings" if self.booktitle else "misc"
        fields = [("title", f"{{{self.title}}}"), ("author", " and ".join(self.authors))]
        if self.booktitle:
            fields.append(("booktitle", self.booktitle))
        fields.append(("year", str(self.year)))
        if self.pages:
            fields.append(("pages", self.pages))
        name, value = self.address
        fields.append((name, f"\\url{{{value}}}" if name == "howpublished" else value))
        if name == "eprint":
            fields.append(("archiveprefix", "arXiv"))
        lines = "".join(f"  {name} = {{{_ascii(value)}}},\n" for name, value in fields)
        return f"@{kind}{{{key},\n{lines}}}"


WORKS: dict[str, Work] = {
    "kobayashi2020attention": Work(
        _KOBAYASHI,
        "Attention is Not Only a Weight: Analyzing Transformers with Vector Norms",
        2020,
        "Proceedings of the 2020 Conference on Empirical Methods in Natural Language Processing "
        "(EMNLP)",
        "EMNLP 2020",
        ("eprint", "2004.10102"),
    ),
    "kobayashi2021incorporating": Work(
        _KOBAYASHI,
        "Incorporating Residual and Normalization Layers into Analysis of Masked Language Models",
        2021,
        _EMNLP.format(2021),
        "EMNLP 2021",
        ("doi", "10.18653/v1/2021.emnlp-main.373"),
        "4547--4568",
    ),
    "kobayashi2024analyzing": Work(
        _KOBAYASHI,
        "Analyzing Feed-Forward Blocks in Transformers through the Lens of Attention Maps",
        2024,
        "The Twelfth International Conference on Learning Representations",
        "ICLR 2024",
        ("eprint", "2302.00456"),
    ),
    "mohebbi2023quantifying": Work(
        ("Hosein Mohebbi", "Willem Zuidema", "Grzegorz Chrupała", "Afra Alishahi"),
        "Quantifying Context Mixing in Transformers",
        2023,
        "Proceedings of the 17th Conference of the European Chapter of the Association for "
        "Computational Linguistics",
        "EACL 2023",
        ("eprint", "2301.12971"),
        "3378--3400",
    ),
    "geva2021transformer": Work(
        ("Mor Geva", "Roei Schuster", "Jonathan Berant", "Omer Levy"),
        "Transformer Feed-Forward Layers Are Key-Value Memories",
        2021,
        _EMNLP.format(2021),
        "EMNLP 2021",
        ("eprint", "2012.14913"),
    ),
    "geva2022transformer": Work(
        ("Mor Geva", "Avi Caciularu", "Kevin Wang", "Yoav Goldberg"),
        "Transformer Feed-Forward Layers Build Predictions by Promoting Concepts in the Vocabulary "
        "Space",
        2022,
        _EMNLP.format(2022),
        "EMNLP 2022",
        ("doi", "10.18653/v1/2022.emnlp-main.3"),
        "30--45",
    ),
    "yu2023exploring": Work(
        ("Zeping Yu", "Kailai Yang", "Zhiwei Liu", "Sophia Ananiadou"),
        "Exploring the Residual Stream of Transformers",
        2023,
        "",
        "arXiv 2023",
        ("eprint", "2312.12141v1"),
    ),
    "yu2024neuron": Work(
        ("Zeping Yu", "Sophia Ananiadou"),
        "Neuron-Level Knowledge Attribution in Large Language Models",
        2024,
        _EMNLP.format(2024),
        "EMNLP 2024",
        ("eprint", "2312.12141"),
        "3267--3280",
    ),
    "langedijk2024decoderlens": Work(
        ("Anna Langedijk", "Hosein Mohebbi", "Gabriele Sarti", "Willem Zuidema", "Jaap Jumelet"),
        "DecoderLens: Layerwise Interpretation of Encoder-Decoder Transformers",
        2024,
        "Findings of the Association for Computational Linguistics: NAACL 2024",
        "Findings of NAACL 2024",
        ("doi", "10.18653/v1/2024.findings-naacl.296"),
        "4764--4780",
    ),
    "abnar2020quantifying": Work(
        ("Samira Abnar", "Willem Zuidema"),
        "Quantifying Attention Flow in Transformers",
        2020,
        "Proceedings of the 58th Annual Meeting of the Association for Computational Linguistics",
        "ACL 2020",
        ("eprint", "2005.00928"),
    ),
    "modarressi2022globenc": Work(
        ("Ali Modarressi", "Mohsen Fayyaz", "Yadollah Yaghoobzadeh", "Mohammad Taher Pilehvar"),
        "GlobEnc: Quantifying Global Token Attribution by Incorporating the Whole Encoder Layer in "
        "Transformers",
        2022,
        "Proceedings of the 2022 Conference of the North American Chapter of the Association for "
        "Computational Linguistics: Human Language Technologies",
        "NAACL 2022",
        ("doi", "10.18653/v1/2022.naacl-main.19"),
        "258--271",
    ),
    "modarressi2023decompx": Work(
        (
            "Ali Modarressi",
            "Mohsen Fayyaz",
            "Ehsan Aghazadeh",
            "Yadollah Yaghoobzadeh",
            "Mohammad Taher Pilehvar",
        ),
        "DecompX: Explaining Transformers Decisions by Propagating Token Decomposition",
        2023,
        "Proceedings of the 61st Annual Meeting of the Association for Computational Linguistics "
        "(Volume 1: Long Papers)",
        "ACL 2023",
        ("doi", "10.18653/v1/2023.acl-long.149"),
        "2649--2664",
    ),
    "ferrando2022measuring": Work(
        ("Javier Ferrando", "Gerard I. Gállego", "Marta R. Costa-jussà"),
        "Measuring the Mixing of Contextual Information in the Transformer",
        2022,
        _EMNLP.format(2022),
        "EMNLP 2022",
        ("eprint", "2203.04212"),
    ),
    "ferrando2022towards": Work(
        (
            "Javier Ferrando",
            "Gerard I. Gállego",
            "Belen Alastruey",
            "Carlos Escolano",
            "Marta R. Costa-jussà",
        ),
        "Towards Opening the Black Box of Neural Machine Translation: Source and Target "
        "Interpretations of the Transformer",
        2022,
        _EMNLP.format(2022),
        "EMNLP 2022",
        ("doi", "10.18653/v1/2022.emnlp-main.599"),
        "8756--8769",
    ),
    "denil2014extraction": Work(
        ("Misha Denil", "Alban Demiraj", "Nando de Freitas"),
        "Extraction of Salient Sentences from Labelled Documents",
        2014,
        "",
        "arXiv 2014",
        ("eprint", "1412.6815"),
    ),
    "shrikumar2017learning": Work(
        ("Avanti Shrikumar", "Peyton Greenside", "Anshul Kundaje"),
        "Learning Important Features Through Propagating Activation Differences",
        2017,
        "Proceedings of the 34th International Conference on Machine Learning",
        "ICML 2017",
        ("eprint", "1704.02685"),
    ),
    "sundararajan2017axiomatic": Work(
        ("Mukund Sundararajan", "Ankur Taly", "Qiqi Yan"),
        "Axiomatic Attribution for Deep Networks",
        2017,
        "Proceedings of the 34th International Conference on Machine Learning",
        "ICML 2017",
        ("eprint", "1703.01365"),
    ),
    "deyoung2020eraser": Work(
        (
            "Jay DeYoung",
            "Sarthak Jain",
            "Nazneen Fatema Rajani",
            "Eric Lehman",
            "Caiming Xiong",
            "Richard Socher",
            "Byron C. Wallace",
        ),
        "ERASER: A Benchmark to Evaluate Rationalized NLP Models",
        2020,
        "Proceedings of the 58th Annual Meeting of the Association for Computational Linguistics",
        "ACL 2020",
        ("doi", "10.18653/v1/2020.acl-main.408"),
        "4443--4458",
    ),
    "nanda2022transformerlens": Work(
        ("Neel Nanda", "Joseph Bloom"),
        "TransformerLens",
        2022,
        "",
        "2022",
        ("howpublished", "https://github.com/TransformerLensOrg/TransformerLens"),
    ),
    "cooney2023circuitsvis": Work(
        ("Alan Cooney",),
        "CircuitsVis",
        2023,
        "",
        "2023",
        ("howpublished", "https://github.com/TransformerLensOrg/CircuitsVis"),
    ),
}
"""Everything that can be cited, by BibTeX key."""

_NORMS = ("kobayashi2020attention", "kobayashi2021incorporating", "kobayashi2024analyzing")
_LOG_PROB = ("yu2023exploring", "yu2024neuron")
_GRADIENT = ("denil2014extraction", "shrikumar2017learning")
_MEMORIES = ("geva2021transformer",)
_FAITHFUL = ("deyoung2020eraser",)
_ROLLOUT = ("abnar2020quantifying", "modarressi2022globenc")

METHODS: dict[str, tuple[str, ...]] = {
    "decompose": _NORMS,
    "attention_norms": _NORMS,
    "mixing_ratio": _NORMS[1:],
    "contextualization_change": _NORMS[2:],
    "cancellation": _NORMS[2:],
    "amplified_pairs": _NORMS[2:],
    "value_zeroing": ("mohebbi2023quantifying",),
    "ff_values": (*_MEMORIES, "geva2022transformer"),
    "ff_memories": (*_MEMORIES, "geva2022transformer"),
    "composition": _MEMORIES,
    "mine_triggers": _MEMORIES,
    "mine_on_ray": _MEMORIES,
    "token_memory": (*_MEMORIES, *_NORMS[2:]),
    "log_prob_contributions": _LOG_PROB,
    "query_contributions": _LOG_PROB[1:],
    "component_readouts": _LOG_PROB,
    "knockout": _LOG_PROB[1:],
    "decoder_lens": ("langedijk2024decoderlens",),
    "attention": ("abnar2020quantifying",),
    "globenc": ("modarressi2022globenc",),
    "alti": ("ferrando2022measuring",),
    "decompx": ("modarressi2023decompx",),
    "decompx_vectors": ("modarressi2023decompx",),
    "gradient_x_input": _GRADIENT,
    "integrated_gradients": ("sundararajan2017axiomatic",),
    "rollout": (*_ROLLOUT, "ferrando2022towards"),
    "cue_alignment": ("mohebbi2023quantifying",),
    "agreement": ("mohebbi2023quantifying",),
    "faithfulness": _FAITHFUL,
    "compare": ("mohebbi2023quantifying", *_FAITHFUL),
}
"""The keys of each public function's sources."""

_TOOLS = ("nanda2022transformerlens", "cooney2023circuitsvis")
# How far into the block each point lies decides which of the three papers it takes.
_NORMS_UNTIL = {"attn_out": 1, "resid_mid": 2}


def cite(*used: Result | str | Callable[..., Any]) -> str:
    """Returns BibTeX of what was used, TransformerLens and CircuitsVis included.

    Args:
        used: Results, or methods: their names (``"value_zeroing"``) or the functions themselves.
            Of results, options count: a map at ``attn_out`` needs one paper of three, a rollout its
            own. Nothing: all there is.

    Returns:
        Entries in ASCII, each once, in the order they were used.

    Raises:
        InvalidInput: If something given is neither a result of this package nor one of its methods.

    Example:
        >>> import tl_contextmix as cm
        >>> print(cm.cite("value_zeroing").splitlines()[0])
        @inproceedings{mohebbi2023quantifying,
    """
    found = list(WORKS) if not used else [key for each in used for key in _keys(each)]
    return "\n\n".join(WORKS[key].bibtex(key) for key in dict.fromkeys([*found, *_TOOLS]))


def sources(*keys: str) -> str:
    """Returns works in one paragraph, for a reader."""
    return " ".join(WORKS[key].sentence for key in keys)


def _keys(used: object) -> Iterator[str]:
    if isinstance(used, Result):
        origin = getattr(used, "provenance", None)
        yield from _of(origin) if isinstance(origin, Provenance) else ()
        yield from _rolled(used) if isinstance(used, ContextMap) else ()
        return
    name = used if isinstance(used, str) else getattr(used, "__name__", "")
    if name not in METHODS:
        raise bad(
            "there is nothing to cite",
            repr(used) if isinstance(used, str) else f"a {type(used).__name__}",
            f"a result, or one of {', '.join(METHODS)}",
            "Give what a method returned, or its name.",
        )
    yield from METHODS[name]


def _of(origin: Provenance) -> Iterator[str]:
    """Yields the keys of a result's method and of its options."""
    # Results of mined triggers are named after their function: triggers.patterns.
    name = "mine_triggers" if origin.method.startswith("triggers.") else origin.method
    keys = METHODS.get(name, ())
    if name in ("attention_norms", "decompose"):
        keys = keys[: _NORMS_UNTIL.get(origin.options.get("at", ""), len(keys))]
    yield from keys
    other = origin.options.get("minus")
    if other:  # a difference of two results
        yield from _of(replace(origin, method=other["method"], options=other["options"]))


def _rolled(map: ContextMap) -> Iterator[str]:
    """Yields the key of the way a map was rolled out, if it was."""
    options = map.provenance.options
    if not options.get("rollout"):
        return
    yield _ROLLOUT[0] if options["add_identity"] else _ROLLOUT[1]
    # A decoder's map over its own tokens and the encoder's was rolled out through both.
    if not map.source.equals(map.target):
        yield "ferrando2022towards"


def _ascii(text: str) -> str:
    """Returns the text with accents as TeX writes them."""
    marks = {"\u0301": "'", "\u0300": "`"}
    pieces = []
    for character in unicodedata.normalize("NFD", text.replace("ł", "{\\l}")):
        if character in marks:
            pieces[-1] = f"{{\\{marks[character]}{pieces[-1]}}}"
        else:
            pieces.append(character)
    return "".join(pieces)
