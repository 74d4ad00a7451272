"""Language models: a module around any causal model of transformers, questions and answers, and what is left of them.

Needs the extra `text`: transformers, with PEFT for adapters and pyarrow for Parquet. Your own modules need none of it.
"""

from hamu_lightning.text._answers import contains_spans, is_gibberish, rouge_l_recall, write_answers
from hamu_lightning.text._callback import EvaluateText
from hamu_lightning.text._data import QAData, TextDataset
from hamu_lightning.text._encoding import Encoded, Encoder, PadCollator
from hamu_lightning.text._evaluate import TextSettings, evaluate_text
from hamu_lightning.text._extra import MissingTextExtraError, check_installed
from hamu_lightning.text._hf_trainer import HAMUTrainerMixin
from hamu_lightning.text._layouts import QARecord, parse_record
from hamu_lightning.text._module import CausalLMModule
from hamu_lightning.text._open_unlearning import read_open_unlearning, write_open_unlearning
from hamu_lightning.text._records import Records
from hamu_lightning.text._scores import TextEvaluation, TextRow, TextScores
from hamu_lightning.text._spans import find_spans
from hamu_lightning.text._spans_gone import SpansGone

check_installed("transformers", "hamu_lightning.text")

__all__ = [
    "CausalLMModule",
    "Encoded",
    "Encoder",
    "EvaluateText",
    "HAMUTrainerMixin",
    "MissingTextExtraError",
    "PadCollator",
    "QAData",
    "QARecord",
    "Records",
    "SpansGone",
    "TextDataset",
    "TextEvaluation",
    "TextRow",
    "TextScores",
    "TextSettings",
    "check_installed",
    "contains_spans",
    "evaluate_text",
    "find_spans",
    "is_gibberish",
    "parse_record",
    "read_open_unlearning",
    "rouge_l_recall",
    "write_answers",
    "write_open_unlearning",
]
