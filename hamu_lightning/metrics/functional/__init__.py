"""The metrics of unlearning as functions of predictions, losses and accuracies: torch alone, float64 inside.

What gives one number returns an `Estimate`: value, interval, number of samples, ideal value, and the reason of a NaN.
"""

from hamu_lightning.metrics.functional._distances import (
    activation_distance,
    agreement,
    js_divergence,
    js_to_references,
    kl_divergence,
    kl_to_references,
    log_odds,
    log_odds_distance,
    zrf,
)
from hamu_lightning.metrics.functional._estimate import Estimate, mean_estimate, rate_estimate, undefined
from hamu_lightning.metrics.functional._gaps import anamnesis_index, average_gap, relearn_steps, tow, tow_mia
from hamu_lightning.metrics.functional._inputs import as_numbers
from hamu_lightning.metrics.functional._ranks import (
    KSTest,
    auc,
    balanced_accuracy,
    bootstrap_auc,
    compute_auc,
    ks_test,
    membership_auc,
    tpr_at_fpr,
)
from hamu_lightning.metrics.functional._shadow import KLOM, ULiRA, klom, lira_scores, u_lira

__all__ = [
    "KLOM",
    "Estimate",
    "KSTest",
    "ULiRA",
    "activation_distance",
    "agreement",
    "anamnesis_index",
    "as_numbers",
    "auc",
    "average_gap",
    "balanced_accuracy",
    "bootstrap_auc",
    "compute_auc",
    "js_divergence",
    "js_to_references",
    "kl_divergence",
    "kl_to_references",
    "klom",
    "ks_test",
    "lira_scores",
    "log_odds",
    "log_odds_distance",
    "mean_estimate",
    "membership_auc",
    "rate_estimate",
    "relearn_steps",
    "tow",
    "tow_mia",
    "tpr_at_fpr",
    "u_lira",
    "undefined",
    "zrf",
]
