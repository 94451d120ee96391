"""What is asked of a model: which token, rather than which other, at which position."""

from tl_contextmix.adapters.questions.asked import (
    Answer,
    AnswerInputs,
    Asked,
    Pos,
    Target,
    TokenAnswerInputs,
    split_answer,
)
from tl_contextmix.adapters.questions.directions import Direction, Reading, read_direction
from tl_contextmix.adapters.questions.earlier import label_sets
from tl_contextmix.adapters.questions.positions import predicting_rows, rows_at
from tl_contextmix.adapters.questions.predictions import predictions
from tl_contextmix.adapters.questions.question import Question, ask, ask_about
from tl_contextmix.adapters.questions.targets import one_each, single_token

__all__ = [
    "Answer",
    "AnswerInputs",
    "Asked",
    "Direction",
    "Pos",
    "Question",
    "Reading",
    "Target",
    "TokenAnswerInputs",
    "ask",
    "ask_about",
    "label_sets",
    "one_each",
    "predicting_rows",
    "predictions",
    "read_direction",
    "rows_at",
    "single_token",
    "split_answer",
]
