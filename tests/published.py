"""Small files in the formats that the papers' data is published in, with sentences of our own."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Sentences after BLiMP's templates: the set, the text with right and wrong word, cues, lures.
BLIMP = [
    ("anaphor_number_agreement", "Most bakers amused {themselves|herself}.", "Most bakers", ""),
    (
        "anaphor_number_agreement",
        "A lot of nurses weren't blaming {themselves|itself}.",
        "A lot of nurses",
        "",
    ),
    ("anaphor_number_agreement", "Olga praised {herself|themselves}.", "Olga", ""),
    (
        "anaphor_number_agreement",
        "Some high schools had praised {themselves|himself}.",
        "Some high schools",
        "",
    ),
    ("determiner_noun_agreement_2", "Ivan repaired {this|these} kettle.", "kettle", ""),
    ("determiner_noun_agreement_2", "Those cats like {these|this} art galleries.", "galleries", ""),
    (
        "determiner_noun_agreement_with_adj_2",
        "Olga paints {those|that} round tables.",
        "tables",
        "",
    ),
    (
        "determiner_noun_agreement_with_adj_2",
        "Ivan sees {that|those} out in the open grocery store.",
        "store",
        "",
    ),
    (
        "distractor_agreement_relational_noun",
        "The poster of kettles {hasn't|haven't} faded.",
        "poster",
        "kettles",
    ),
    (
        "distractor_agreement_relational_noun",
        "The newspaper articles about Winston Churchill {bore|bores} Olga.",
        "articles",
        "Churchill",
    ),
    ("regular_plural_subject_verb_agreement_1", "Ivan {paints|paint} kettles.", "Ivan", ""),
    (
        "regular_plural_subject_verb_agreement_1",
        "A lot of bakers {are|is} sleeping.",
        "bakers",
        "",
    ),
]


def blimp_row(uid: str, text: str) -> dict[str, Any]:
    """Returns a line in BLiMP's published format."""
    start, right, wrong, end = re.split(r"[{|}]", text)
    row: dict[str, Any] = {
        "sentence_good": f"{start}{right}{end}",
        "sentence_bad": f"{start}{wrong}{end}",
        "field": "morphology",
        "linguistics_term": uid.rpartition("_")[0],
        "UID": uid,
    }
    for method in ("simple_LM_method", "two_prefix_method", "lexically_identical"):
        row[method] = True
    return row | {"one_prefix_method": False, "pairID": "0"}


SENTENCES = (
    "the keys to the cabinet are old .",
    "the doctors near the farmer sing .",
    "the cow is old .",
)


def _lines(rows: Any) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def blimp(folder: Path, uids: Sequence[str]) -> str:
    """Writes a file for each set, named as BLiMP's are; returns their paths, with commas."""
    paths = []
    for uid in uids:
        rows = [blimp_row(name, text) for name, text, _, _ in BLIMP if name == uid]
        paths.append(folder / f"{uid}.jsonl")
        paths[-1].write_text(_lines(rows), encoding="utf-8")
    return ",".join(map(str, paths))


def segments(folder: Path) -> str:
    """Writes segments of two parts in word pieces, as Clark et al. (2019) have them."""
    rows = [
        {"tokens": ["[CLS]", *one.split(), "[SEP]", "the", "cab", "##inet", "[SEP]"]}
        for one in SENTENCES
    ]
    path = folder / "unlabeled.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def glue(folder: Path) -> str:
    """Writes sentences with labels, as SST-2 of GLUE has them."""
    path = folder / "dev.tsv"
    path.write_text("\n".join(["sentence\tlabel", *(f"{one}\t1" for one in SENTENCES)]))
    return str(path)


def wikitext(folder: Path) -> str:
    """Writes articles, as WikiText-103 has them: headings and paragraphs of tokens."""
    path = folder / "wiki.train.tokens"
    body = " ".join(SENTENCES)
    path.write_text(f" \n = The <unk> cabinet = \n \n {body} \n \n = = Keys = = \n \n {body} \n")
    return str(path)


def known_facts(folder: Path) -> str:
    """Writes one JSON array, as known_1000.json is."""
    facts = [("france", "paris"), ("japan", "tokyo"), ("italy", "rome")]
    rows = [
        {
            "known_id": number,
            "subject": country,
            "attribute": city,
            "template": "the capital of {} is",
            "prediction": f" {city} .",
            "prompt": f"the capital of {country} is",
            "relation_id": "P36",
        }
        for number, (country, city) in enumerate(facts)
    ]
    path = folder / "known_1000.json"
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    return str(path)


def trivia_qa(folder: Path) -> str:
    """Writes questions with aliases of their answers, as TriviaQA's JSON has them."""
    rows = [
        {
            "Answer": {
                "Aliases": [french.upper(), french],
                "NormalizedAliases": [french],
                "Value": french,
            },
            "Question": english,
            "QuestionId": f"tc_{number}",
        }
        for number, (english, french) in enumerate(TRANSLATIONS)
    ]
    path = folder / "wikipedia-dev.json"
    path.write_text(json.dumps({"Data": rows, "Domain": "Wikipedia", "Version": 1.0}))
    return str(path)


TRANSLATIONS = (
    ("the bat burned .", "la batte brûlait ."),
    ("the farmer sings .", "le fermier chante ."),
)


def parallel(folder: Path) -> str:
    """Writes a file per language with a sentence per line, as FLORES-101 has them."""
    paths = [folder / "eng.dev", folder / "fra.dev"]
    for path, texts in zip(paths, zip(*TRANSLATIONS, strict=True), strict=True):
        path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return ",".join(map(str, paths))


def gold_alignment(folder: Path) -> str:
    """Writes sentences, translations and links, sure and possible, as the gold alignments are."""
    path = folder / "alignment.talp"
    path.write_text("1-1 2-2 3-3 4-4\n1-1 2-2 3p3 4-4\n")
    return f"{parallel(folder)},{path}"
