"""Evidence of what was forgotten: what models say of all parts of the data, attacks, the residue, and the report."""

from hamu_lightning.evidence._card import model_card
from hamu_lightning.evidence._logs import report_folder
from hamu_lightning.evidence._of_callback import report
from hamu_lightning.evidence._page import render_page, write_report
from hamu_lightning.evidence._record import hash_id, load_schema, make_record, read_record
from hamu_lightning.evidence._rows import AttackRow, Finding
from hamu_lightning.evidence._scores import Evaluation, PartScores
from hamu_lightning.evidence._signature import canonical, check_signature, sign
from hamu_lightning.evidence._verdict import Verdict, judge
from hamu_lightning.evidence._weights import compare_weights, hash_weights

__all__ = [
    "AttackRow",
    "Evaluation",
    "Finding",
    "PartScores",
    "Verdict",
    "canonical",
    "check_signature",
    "compare_weights",
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
    "sign",
    "write_report",
]
