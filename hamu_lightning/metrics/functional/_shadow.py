"""Attacks and distances that rest on many models: LiRA, U-LiRA and KLOM.

All take log-odds of the label, as `log_odds` gives them, `[M, N]` for M models and N samples.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from hamu_lightning.checks import check_choice, check_count, check_number, check_positive
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics.functional._estimate import Estimate, mean_estimate, undefined
from hamu_lightning.metrics.functional._inputs import as_matrix, as_vector
from hamu_lightning.metrics.functional._ranks import auc, tpr_at_fpr

Spread = Literal["sample", "all"]
# Where all shadow models agree. As in tensorflow/privacy; its square is still a normal float64.
_SMALLEST_SD = 1e-30


class ULiRAValue(NamedTuple):
    """What an attacker with shadow models can tell of unlearned and never-trained models; ideal is 0.5 each."""

    accuracy: Estimate
    """Share of (model, sample) pairs that the likelihood ratio assigns to the right kind."""
    auc: Estimate
    """AUC of the likelihood ratio over all pairs, without an interval: pairs of one model hang together."""
    tpr_at_0_1_percent: Estimate
    """Share of unlearned pairs found at 0.1 % false alarms; ideal 0.001."""
    tpr_at_1_percent: Estimate
    """The same at 1 %; ideal 0.01."""
    per_sample: Tensor
    """`[N]`, the accuracy for each sample."""


class KLOMValue(NamedTuple):
    """KL divergence of margins, over the samples, nats; ideal is what two halves of the retrained models have."""

    mean: Estimate
    p95: Estimate
    """95 % of the samples have at most this."""
    p99: Estimate
    """99 % of the samples have at most this."""
    per_sample: Tensor
    """`[N]`."""


def lira_scores(scores: Any, out_scores: Any, in_scores: Any = None, *, spread: Spread = "sample") -> Tensor:
    """Likelihood-ratio attack: how much likelier each sample was trained on than not (Carlini et al. 2022, 2112.03570).

        online    log N(phi; mu_in, s_in^2) - log N(phi; mu_out, s_out^2)        with `in_scores`
        offline   -log P(Z > phi),  Z ~ N(mu_out, s_out^2)                       without

    with mean and standard deviation over the shadow models. The offline score is a monotone map of the paper's
    `1 - P(Z > phi)` that does not round to 1. tensorflow/privacy (`mi_lira_2021/plot.py`) differs: medians instead of
    means; a two-sided density offline, which also accuses samples that are *less* sure than the others; and with a
    fixed variance the spread of the `in` models for both.

    Args:
        scores: `[N]`, log-odds by the model under attack.
        out_scores: `[M, N]`, log-odds by shadow models that were not trained on the sample.
        in_scores: `[M', N]`, by shadow models that were trained on it; None for the offline attack.
        spread: "sample" for each sample's own standard deviation, "all" for one of all samples together, which is
            better with few shadow models.

    Returns:
        `[N]`, higher means member; NaN where a log-odds is not finite. For `auc` and `tpr_at_fpr`.

    Raises:
        HAMUValueError: If an argument is of another shape, or there are fewer than 2 shadow models of a kind.

    Example:
        >>> out = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
        >>> lira_scores(torch.tensor([0.0, 3.0]), out, out + 3.0)
        tensor([-4.5000,  4.5000], dtype=torch.float64)
    """
    phi, outside = as_vector("scores", scores), as_matrix("out_scores", out_scores)
    check_choice("spread", spread, get_args(Spread))
    _check_models("out_scores", outside, phi.numel(), 2)
    mean_out, sd_out = _fit(outside.to(phi.device), spread)
    if in_scores is None:
        return -cast(Tensor, torch.special.log_ndtr((mean_out - phi) / sd_out))
    inside = as_matrix("in_scores", in_scores)
    _check_models("in_scores", inside, phi.numel(), 2)
    mean_in, sd_in = _fit(inside.to(phi.device), spread)
    return _log_density(phi, mean_in, sd_in) - _log_density(phi, mean_out, sd_out)


def u_lira(unlearned: Any, retrained: Any, *, spread: Spread = "sample") -> ULiRAValue:
    """LiRA for unlearning: can unlearned models be told from models never trained on the samples?

    Hayes et al. 2024, arXiv 2403.01218. For each sample two normal distributions are fitted, to its log-odds by
    unlearned and by retrained models; a model is called unlearned where the first is likelier. Each model is judged by
    shadow models without it. An unlearned and a retrained model are left out *together*, so that chance gives 0.5 in
    the mean: with one left out alone its own kind moves away from it, and chance gives less (0.49 with 8 models each).

    A value below 0.5 by more than its interval means too few models or samples, not good forgetting.

    Args:
        unlearned: `[M, N]`, log-odds of the forget samples by unlearned models, each from a training of its own.
        retrained: `[M', N]`, the same samples by models trained without them.
        spread: As for `lira_scores`.

    Returns:
        Accuracy, with an interval over samples (that does not cover the choice of the models), AUC and TPR at 0.1 %
        and 1 % FPR; NaN with a reason where there are fewer than 3 models of a kind, no sample, or log-odds that are
        not finite.

    Raises:
        HAMUValueError: If an argument is of another shape.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> retrained = torch.randn(8, 50, generator=generator)
        >>> round(float(u_lira(retrained + 9.0, retrained).accuracy), 2)
        1.0
    """
    ours, theirs = as_matrix("unlearned", unlearned), as_matrix("retrained", retrained)
    check_choice("spread", spread, get_args(Spread))
    _check_models("retrained", theirs, ours.shape[1], 0)
    theirs, samples = theirs.to(ours.device), ours.shape[1]
    pairs, reason = min(len(ours), len(theirs)), _why_no_models(ours, theirs, 3)
    n = (len(ours), len(theirs), samples)
    if reason is not None:
        nan = undefined(reason, n, 0.5)
        return ULiRAValue(
            nan, nan, undefined(reason, n, 0.001), undefined(reason, n, 0.01), ours.new_full((samples,), math.nan)
        )
    members: list[Tensor] = []
    others: list[Tensor] = []
    for left in range(pairs):
        shadows = [torch.cat((kind[:left], kind[left + 1 :])) for kind in (ours, theirs)]
        for kind, found in ((ours, members), (theirs, others)):
            found.append(lira_scores(kind[left], shadows[1], shadows[0], spread=spread))
    inside, outside = torch.stack(members), torch.stack(others)  # [pairs, N]
    right = _half(inside) + 1 - _half(outside)
    per_sample = right.mean(dim=0) / 2
    accuracy = mean_estimate(per_sample, "accuracies", ideal=0.5, limits=(0, 1))
    flat = inside.flatten(), outside.flatten()
    low, high = (Estimate(tpr_at_fpr(*flat, fpr).value, None, n, fpr) for fpr in (0.001, 0.01))
    area = Estimate(auc(*flat, interval=None).value, None, n, 0.5)
    return ULiRAValue(Estimate(accuracy.value, accuracy.interval, n, 0.5), area, low, high, per_sample)


def klom(unlearned: Any, retrained: Any, *, bins: int = 20, clip: float = 100.0, eps: float = 1e-5) -> KLOMValue:
    """KL divergence of margins: how differently unlearned and retrained models judge each sample (2410.23232).

        KLOM(x) = KL(histogram of the unlearned models' margins || that of the retrained models'), nats

    The margin is the log-odds of the label. Both histograms have the same bins, of equal width from the lowest to the
    highest of all margins of the sample, and empty bins of the second count as `eps`, after which it is made to sum to
    1 again. With M models the largest value is about `-log eps`, and two halves of the retrained models do not have 0:
    compare with that.

    The published code (`unlearning_bench/eval.py` of data-unlearning-bench) leaves out the highest margin of all, which
    `np.digitize` puts behind the last bin; here it is in the last bin. Mean and percentiles are our choice.

    Args:
        unlearned: `[M, N]`, log-odds of each sample by M unlearned models, each from a training of its own.
        retrained: `[M', N]`, the same samples by models trained without the forget set.
        bins: Number of bins.
        clip: Margins beyond `+-clip` count as that.
        eps: The least share of a bin.

    Returns:
        Mean with an interval over samples, 95 % and 99 % quantile, and each sample's value; NaN with a reason where
        there is no model of a kind, no sample, or a NaN.

    Raises:
        HAMUValueError: If an argument is of another shape or out of range.

    Example:
        >>> margins = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
        >>> float(klom(margins, margins).mean)
        0.0
        >>> round(float(klom(margins + 10.0, margins).mean), 2)  # log(1 / (1e-5 / (1 + 4e-5))), no bin in common
        10.13
    """
    ours, theirs = as_matrix("unlearned", unlearned), as_matrix("retrained", retrained)
    bins, clip = check_count("bins", bins), check_positive("clip", clip)
    eps = check_number("eps", eps, above=0, below=1)
    _check_models("retrained", theirs, ours.shape[1], 0)
    theirs, samples, n = theirs.to(ours.device), ours.shape[1], (len(ours), len(theirs), ours.shape[1])
    reason = "no sample was seen" if samples == 0 else None
    for name, kind in (("unlearned", ours), ("retrained", theirs)):
        n_nan = int(kind.isnan().sum())
        reason = reason or (f"no {name} model was given" if len(kind) == 0 else None)
        reason = reason or (f"{n_nan} margins of {name} models are NaN" if n_nan else None)
    if reason is not None:
        nan = undefined(reason, n, 0)
        return KLOMValue(nan, nan, nan, ours.new_full((samples,), math.nan))
    values = _compare_histograms(ours.clamp(-clip, clip), theirs.clamp(-clip, clip), bins, eps)
    mean = mean_estimate(values, "divergences", ideal=0, limits=(0, math.inf))
    p95, p99 = (Estimate(float(_quantile(values, q)), None, n, 0) for q in (0.95, 0.99))
    return KLOMValue(Estimate(mean.value, mean.interval, n, 0), p95, p99, values)


def _compare_histograms(ours: Tensor, theirs: Tensor, bins: int, eps: float) -> Tensor:
    both = torch.cat((ours, theirs))
    low, high = both.min(dim=0).values, both.max(dim=0).values
    width = torch.where(high > low, high - low, torch.ones_like(low))
    p, q = (_histogram(kind, low, width, bins) for kind in (ours, theirs))
    q = torch.where(p > 0, q.clamp_min(eps), q)
    q = q / q.sum(dim=0)
    # 0 log 0 = 0. At least 0 but for rounding.
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(dim=0).clamp_min(0)


def _histogram(margins: Tensor, low: Tensor, width: Tensor, bins: int) -> Tensor:
    """Shares of `[M, N]` margins in each bin, `[bins, N]`; an edge belongs to the bin above it."""
    edges = low + width * torch.linspace(0, 1, bins + 1, dtype=low.dtype, device=low.device)[:, None]  # [bins + 1, N]
    index = torch.searchsorted(edges[1:-1].T.contiguous(), margins.T.contiguous(), right=True)  # [N, M]
    counts = torch.zeros(len(index), bins, dtype=low.dtype, device=low.device)
    return (counts.scatter_add_(1, index, torch.ones_like(index, dtype=low.dtype)) / margins.shape[0]).T


def _quantile(values: Tensor, q: float) -> Tensor:
    """A quantile of any number of values: `torch.quantile` takes at most 16 million."""
    ordered = values.sort().values
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _fit(scores: Tensor, spread: Spread) -> tuple[Tensor, Tensor]:
    mean = scores.mean(dim=0)
    variance = (scores - mean).square().mean(dim=0)
    sd = (variance if spread == "sample" else variance.mean().expand_as(variance)).sqrt()
    return mean, sd.clamp_min(_SMALLEST_SD)


def _log_density(phi: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    return -((phi - mean) / sd).square() / 2 - sd.log() - math.log(2 * math.pi) / 2


def _half(scores: Tensor) -> Tensor:
    """1 where a likelihood ratio says "unlearned", 1/2 where it does not say."""
    return (scores > 0).to(scores.dtype) + (scores == 0).to(scores.dtype) / 2


def _why_no_models(ours: Tensor, theirs: Tensor, least: int) -> str | None:
    if ours.shape[1] == 0:
        return "no sample was seen"
    for name, kind in (("unlearned", ours), ("retrained", theirs)):
        if len(kind) < least:
            return f"{len(kind)} {name} models are too few, at least {least} are needed"
        n_bad = int((~kind.isfinite()).sum())
        if n_bad:
            return f"{n_bad} log-odds of {name} models are not finite"
    return None


def _check_models(name: str, scores: Tensor, samples: int, least: int) -> None:
    if scores.shape[1] != samples or len(scores) < least:
        raise HAMUValueError(
            f"Expected `{name}` to be of shape [M, {samples}]"
            + (f" with at least {least} models" if least else "")
            + f", but got {list(scores.shape)}. Ask all models about the same samples in the same order."
        )
