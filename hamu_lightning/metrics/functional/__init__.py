"""The metrics of unlearning as functions of predictions, losses and accuracies, in float64.

What gives one number returns an `Estimate`: value, interval, number of samples, ideal value, and the reason of a NaN.
"""

from hamu_lightning.metrics.functional._answers import (
    forget_quality,
    leak_at_k,
    model_utility,
    priv_leak,
    truth_ratio,
    truth_ratio_of_forgotten,
    truth_ratio_of_kept,
)
from hamu_lightning.metrics.functional._classifier import calibration_error, trained_attack
from hamu_lightning.metrics.functional._comparison import DISTANCES, Distance
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
from hamu_lightning.metrics.functional._forgetting import ForgettingScore, forgetting_score
from hamu_lightning.metrics.functional._gaps import anamnesis_index, average_gap, relearn_steps, tow, tow_mia
from hamu_lightning.metrics.functional._inputs import as_numbers, as_texts
from hamu_lightning.metrics.functional._levels import (
    accuracy,
    change,
    cross_entropies,
    match_classes,
    ranks_among,
    share_surer,
)
from hamu_lightning.metrics.functional._ranks import (
    IntervalMethod,
    KSTest,
    auc,
    balanced_accuracy,
    bootstrap_auc,
    compute_auc,
    ks_test,
    membership_auc,
    tpr_at_fpr,
)
from hamu_lightning.metrics.functional._shadow import KLOMValue, ULiRAValue, klom, lira_scores, u_lira
from hamu_lightning.metrics.functional._tokens import (
    TokenLosses,
    exact_memorization,
    extraction_strength,
    gradient_norm_scores,
    min_k_plus_plus_scores,
    min_k_scores,
    reference_scores,
    token_losses,
    zlib_scores,
)

__all__ = [
    "DISTANCES",
    "Distance",
    "Estimate",
    "ForgettingScore",
    "IntervalMethod",
    "KLOMValue",
    "KSTest",
    "TokenLosses",
    "ULiRAValue",
    "accuracy",
    "activation_distance",
    "agreement",
    "anamnesis_index",
    "as_numbers",
    "as_texts",
    "auc",
    "average_gap",
    "balanced_accuracy",
    "bootstrap_auc",
    "calibration_error",
    "change",
    "compute_auc",
    "cross_entropies",
    "exact_memorization",
    "extraction_strength",
    "forget_quality",
    "forgetting_score",
    "gradient_norm_scores",
    "js_divergence",
    "js_to_references",
    "kl_divergence",
    "kl_to_references",
    "klom",
    "ks_test",
    "leak_at_k",
    "lira_scores",
    "log_odds",
    "log_odds_distance",
    "match_classes",
    "mean_estimate",
    "membership_auc",
    "min_k_plus_plus_scores",
    "min_k_scores",
    "model_utility",
    "priv_leak",
    "ranks_among",
    "rate_estimate",
    "reference_scores",
    "relearn_steps",
    "share_surer",
    "token_losses",
    "tow",
    "tow_mia",
    "tpr_at_fpr",
    "trained_attack",
    "truth_ratio",
    "truth_ratio_of_forgotten",
    "truth_ratio_of_kept",
    "u_lira",
    "undefined",
    "zlib_scores",
    "zrf",
]
