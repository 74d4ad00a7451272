"""What a language model answers: truth ratio, forget quality, utility, and leaks among several answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hamu_lightning.checks import check_choice, check_count, check_number, check_type
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics.functional._estimate import Estimate, mean_estimate, undefined, why_not
from hamu_lightning.metrics.functional._inputs import as_matrix, as_vector
from hamu_lightning.metrics.functional._ranks import ks_test

Mean = Literal["arithmetic", "geometric"]


def truth_ratio(paraphrased: Any, perturbed: Any, mean: Mean = "arithmetic") -> Tensor:
    """How likely wrong answers are beside a right one, per question (TOFU, Maini et al. 2024, arXiv 2401.06121).

        R = mean over wrong answers a of P(a | q)^(1/|a|)  /  P(right | q)^(1/|right|)

    "arithmetic" is the mean of the probabilities, the paper's. "geometric" is the exponential of the mean of their
    logarithms, which public code takes: locuslab/open-unlearning as R here, locuslab/tofu (`aggregate_eval_stat.py`)
    as 1 / R. The geometric mean is the smaller one. `truth_ratio_of_forgotten` and `forget_quality` are the same for R
    and 1 / R, `truth_ratio_of_kept` is not.

    Args:
        paraphrased: `[N]`, mean log-probability per token of a paraphrase of the right answer, nats.
        perturbed: `[N, A]`, the same of A wrong answers.
        mean: "arithmetic" or "geometric".

    Returns:
        `[N]`, positive.

    Raises:
        HAMUValueError: If the shapes are others.

    Example:
        >>> right, wrong = torch.tensor([0.5]).log(), torch.tensor([[0.1, 0.4]]).log()
        >>> truth_ratio(right, wrong), truth_ratio(right, wrong, "geometric")
        (tensor([0.5000], dtype=torch.float64), tensor([0.4000], dtype=torch.float64))
    """
    check_choice("mean", mean, get_args(Mean))
    right, wrong = as_vector("paraphrased", paraphrased), as_matrix("perturbed", perturbed)
    if len(wrong) != len(right) or wrong.shape[1] == 0:
        raise HAMUValueError(
            f"Expected `perturbed` to be of shape [{len(right)}, A] with at least one wrong answer, but got "
            f"{list(wrong.shape)}."
        )
    wrong = wrong.to(right.device)
    log_mean = wrong.logsumexp(dim=1) - math.log(wrong.shape[1]) if mean == "arithmetic" else wrong.mean(dim=1)
    return (log_mean - right).exp()


def truth_ratio_of_forgotten(ratios: Any) -> Estimate:
    """Mean of min(R, 1/R) on the forget set: 1 where wrong and right answers are equally likely (TOFU, 2401.06121).

    The ideal is the retrained model's.

    Args:
        ratios: `[N]`, what `truth_ratio` returned.

    Returns:
        A number in [0, 1], with an interval over questions; NaN with a reason without a question, or with NaN.

    Raises:
        HAMUValueError: If it is no vector.

    Example:
        >>> float(truth_ratio_of_forgotten([0.5, 2.0]))
        0.5
    """
    values = as_vector("ratios", ratios)
    return mean_estimate(torch.minimum(values, 1 / values), "truth ratios", limits=(0, 1))


def truth_ratio_of_kept(ratios: Any) -> Estimate:
    """Mean of max(0, 1 - R) on data to keep: 1 where wrong answers are out of the question (TOFU, 2401.06121).

    The ideal is the retrained model's. In published code 1 / R in the place of R gives 0 for a good model.

    Args:
        ratios: `[N]`, what `truth_ratio` returned.

    Returns:
        A number in [0, 1], with an interval over questions; NaN with a reason without a question, or with NaN.

    Raises:
        HAMUValueError: If it is no vector.

    Example:
        >>> float(truth_ratio_of_kept([0.5, 2.0]))
        0.25
    """
    values = as_vector("ratios", ratios)
    return mean_estimate((1 - values).clamp_min(0), "truth ratios", limits=(0, 1))


def forget_quality(ratios: Any, retrained: Any) -> Estimate:
    """p-value of the Kolmogorov-Smirnov test between truth ratios of model and retrained model (TOFU, 2401.06121).

    Above 0.05 the two cannot be told apart *with this number of questions*: with few questions that says little, so the
    number stands beside the value. TOFU's sets have 40, 200 and 400.

    Args:
        ratios: `[N]`, what `truth_ratio` returned on the forget set.
        retrained: `[M]`, the same of a retrained model; None where there is none.

    Returns:
        A number in [0, 1]; NaN with a reason without a retrained model, without a question, or with NaN.

    Raises:
        HAMUValueError: If these are no vectors.

    Example:
        >>> print(forget_quality([0.1, 0.2, 0.3], [0.15, 0.25, 0.35]), forget_quality([0.1], None), sep="; ")
        1 (n = 3 + 3); nan: no retrained model was given
    """
    values = as_vector("ratios", ratios)
    if retrained is None:
        return undefined("no retrained model was given", (values.numel(),))
    others = as_vector("retrained", retrained)
    for whose, given in (("the model", values), ("the retrained model", others)):
        reason = why_not(given, f"truth ratios of {whose}")
        if reason is not None:
            return undefined(reason, (values.numel(), others.numel()))
    return ks_test(values, others).p_value


def model_utility(scores: Mapping[str, Any]) -> Estimate:
    """Harmonic mean of scores in [0, 1]: one that is 0 makes it 0 (TOFU, Maini et al. 2024, arXiv 2401.06121).

        n / sum_i (1 / s_i)        ideal: that of the retrained model

    In TOFU these are nine: probability of the right answer (for real authors and world facts as a share of all
    options), ROUGE-L recall, and `truth_ratio_of_kept`, each on retain set, real authors and world facts.

    Args:
        scores: For each name a number, or its `Estimate`.

    Returns:
        A number in [0, 1]; NaN with a reason where there is no score, or one is NaN.

    Raises:
        HAMUValueError: If a score is not in [0, 1].

    Example:
        >>> print(model_utility({"retain ROUGE": 0.5, "retain probability": 1.0}))
        0.6667 (n = 2)
    """
    check_type("scores", scores, Mapping, "a dict from names to scores")
    values = {name: score.value if isinstance(score, Estimate) else score for name, score in scores.items()}
    if not values:
        return undefined("no score was given", (0,))
    for name, value in values.items():
        if isinstance(value, float) and math.isnan(value):
            return undefined(f"{name} is NaN", (len(values),))
        values[name] = check_number("scores", value, least=0, most=1, cure="Give fractions, not percentages.")
    if min(values.values()) == 0:
        return Estimate(0.0, n=(len(values),))
    return Estimate(len(values) / math.fsum(1 / value for value in values.values()), n=(len(values),))


def leak_at_k(leaks: Any, k: int) -> Estimate:
    """Leak@k: how much the worst of k sampled answers gives away (Reisizadeh et al. 2025, arXiv 2511.04934).

        mean over questions of E max(s_1, ..., s_k),  estimated from n >= k answers s_(1) <= ... <= s_(n) by

            sum over i >= k of  C(i - 1, k - 1) / C(n, k)  s_(i)

    which is the mean over all sets of k answers, without bias; for scores of 0 and 1 it is the estimate of pass@k (Chen
    et al. 2021, arXiv 2107.03374). Greedy decoding shows one answer and hides what sampling brings out. The maximum of
    all n answers depends on n. Ideal: the retrained model's.

    Args:
        leaks: `[N, n]`, how much each of n answers to a question gives away, in [0, 1]: a ROUGE-L recall, or 0 and 1.
        k: How many answers somebody would sample, at most n.

    Returns:
        A number in [0, 1], with an interval over questions; NaN with a reason without a question, or with NaN.

    Raises:
        HAMUValueError: If the shape is another, or `k` is out of range.

    Example:
        >>> round(float(leak_at_k(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), k=2)), 4)  # 3 of 6 pairs hold the leak
        0.5
    """
    values = as_matrix("leaks", leaks)
    n = values.shape[1]
    k = check_count("k", k, most=max(n, 1), cure="Sample at least k answers.")
    reason = why_not(values.sum(dim=1), "questions")
    if n == 0 or reason is not None:
        return undefined(reason or "no answer was given", (len(values),))
    weights = torch.tensor([math.comb(i, k - 1) / math.comb(n, k) for i in range(n)], dtype=values.dtype)
    worst = (values.sort(dim=1).values * weights.to(values.device)).sum(dim=1)
    return mean_estimate(worst, "questions", limits=(0, 1))


def priv_leak(membership: Estimate | float, retrained: Estimate | float = 0.5) -> Estimate:
    """PrivLeak of MUSE: how far a membership attack's AUC is from the retrained model's, in percent (2407.06460).

        (A_w - A_R) / A_R x 100,    A = P(score(holdout) > score(forget)) = 1 - AUC        ideal 0

    with Min-40 % log-probabilities as scores. Below 0 forgotten texts look like members (under-unlearning, at least
    -100), above 0 they stand out as unknown (over-unlearning). MUSE's A grows where forgotten texts do *not* look like
    members: it is 1 minus the AUC of `auc` and `membership_auc`, which is what is given here.

    Args:
        membership: AUC of the attack on the model, 1 where forget samples look like members, or its `Estimate`.
        retrained: The same of the retrained model. 0.5, the default, is what MUSE's successors take without one.

    Returns:
        A percentage, with the limits of the AUC's interval; NaN with a reason where an AUC is NaN or A_R is 0.

    Raises:
        HAMUValueError: If an AUC is not in [0, 1].

    Example:
        >>> round(float(priv_leak(0.981)), 1), float(priv_leak(0.0))
        (-96.2, 100.0)
    """
    ours, theirs = (
        given if isinstance(given, Estimate) else Estimate(check_number(name, given, least=0, most=1))
        for name, given in (("membership", membership), ("retrained", retrained))
    )
    reason = ours.reason or theirs.reason
    if reason is None and theirs.value == 1:
        reason = "the retrained model's AUC is 1, so that there is nothing to divide by"
    if reason is not None:
        return undefined(reason, ours.n, 0)

    def leak(area: float) -> float:
        return 100 * ((1 - area) / (1 - theirs.value) - 1)

    limits = None if ours.interval is None else (leak(ours.interval[1]), leak(ours.interval[0]))
    return Estimate(leak(ours.value), limits, ours.n, 0)
