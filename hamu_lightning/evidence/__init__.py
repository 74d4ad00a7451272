"""Evidence of what was forgotten: what models say of all parts of the data, attacks, the residue, and the report."""

from hamu_lightning.evidence._callback import EvaluateUnlearning
from hamu_lightning.evidence._card import model_card
from hamu_lightning.evidence._evaluate import evaluate
from hamu_lightning.evidence._logs import report_folder
from hamu_lightning.evidence._of_callback import report
from hamu_lightning.evidence._page import render_page, write_report
from hamu_lightning.evidence._record import hash_id, load_schema, make_record, read_record
from hamu_lightning.evidence._rows import AttackRow, Finding
from hamu_lightning.evidence._sample_table import MissingPyArrowError, SampleTable
from hamu_lightning.evidence._scores import Evaluation, PartScores
from hamu_lightning.evidence._signature import canonical, check_signature, sign
from hamu_lightning.evidence._trade_off import TradeOff, trade_off
from hamu_lightning.evidence._verdict import Verdict, judge
from hamu_lightning.evidence._weights import compare_weights, hash_weights
from hamu_lightning.evidence.attacks import attack
from hamu_lightning.evidence.residue import audit, scrub

__all__ = [
    "AttackRow",
    "EvaluateUnlearning",
    "Evaluation",
    "Finding",
    "MissingPyArrowError",
    "PartScores",
    "SampleTable",
    "TradeOff",
    "Verdict",
    "attack",
    "audit",
    "canonical",
    "check_signature",
    "compare_weights",
    "evaluate",
    "hash_id",
    "hash_weights",
    "judge",
    "load_schema",
    "make_record",
    "model_card",
    "read_record",
    "render_page",
    "report",
    "report_folder",
    "scrub",
    "sign",
    "trade_off",
    "write_report",
]
