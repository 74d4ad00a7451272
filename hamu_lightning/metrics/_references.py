"""How far a model is from models that never saw the forgotten data, batch by batch."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from typing_extensions import override

from hamu_lightning.checks import check_choice
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics._samples import SampleMetric
from hamu_lightning.metrics.functional import DISTANCES, Estimate, as_numbers, ks_test


class DistanceToReference(SampleMetric):
    """What all distances to references share: a number per sample, and the mean over the samples."""

    plot_lower_bound = 0.0
    _name: ClassVar[str]

    @override
    def update(self, scores: Any, references: Any, ids: Any = None) -> None:
        """Add some samples. Nothing is read on the host.

        Args:
            scores: `[n, K]`, logits or log-probabilities of the model.
            references: `[n, K]`, those of the reference on the same samples, or a list of such for a pool.
            ids: integer `[n]`, the number of each sample in its data set, below 2^53 (2^24 on a device without
                float64). Samples without ids are all kept.

        Raises:
            HAMUValueError: If the shapes are others, there is no reference, or `ids` are not integers.
        """
        self._add(DISTANCES[self._distance()].samples(scores, references)[:, None], ids)

    def _distance(self) -> str:
        return self._name

    @override
    def _summarise(self) -> Estimate:
        return DISTANCES[self._distance()].summarise(self._rows(1)[:, 0])


class JSToReference(DistanceToReference):
    """Mean Jensen-Shannon divergence to references; see `functional.js_to_references`.

        mean over samples, and over the pool, of JS(p_w, p_R)

    Ideal 0; in practice that of another retrained model.

    Args:
        unit: "share" of ln 2, in [0, 1], or "nats".
        **options: torchmetrics' own, such as `sync_on_compute`.

    Raises:
        HAMUValueError: If an argument is none of its choices.

    Example:
        >>> metric = JSToReference()
        >>> metric.update(torch.tensor([[0.0, 9.0]]), torch.tensor([[9.0, 0.0]]))
        >>> metric.update(torch.tensor([[2.0, 0.0]]), [torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 1.0]])])
        >>> metric.compute()
        tensor(0.4991, dtype=torch.float64)
        >>> print(metric.estimate())
        0.4991 [0, 1] (n = 2, ideal 0)
    """

    higher_is_better = False
    ideal = 0.0

    def __init__(self, unit: Literal["share", "nats"] = "share", **options: Any) -> None:
        super().__init__(**options)
        check_choice("unit", unit, ("share", "nats"))
        self.unit = unit

    @override
    def _distance(self) -> str:
        return "js" if self.unit == "share" else "js_nats"


class KLToReference(DistanceToReference):
    """Mean Kullback-Leibler divergence to references, nats; see `functional.kl_to_references`.

        forward   mean of KL(p_R || p_w), from the reference to the model        reverse   mean of KL(p_w || p_R)

    Ideal 0; in practice that of another retrained model.

    Args:
        direction: "forward" or "reverse".
        **options: torchmetrics' own, such as `sync_on_compute`.

    Raises:
        HAMUValueError: If an argument is none of its choices.

    Example:
        >>> metric = KLToReference("reverse")
        >>> metric.update(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log())
        >>> metric.compute()
        tensor(0.1308, dtype=torch.float64)
    """

    higher_is_better = False
    ideal = 0.0

    def __init__(self, direction: Literal["forward", "reverse"] = "forward", **options: Any) -> None:
        super().__init__(**options)
        check_choice("direction", direction, ("forward", "reverse"))
        self.direction = direction

    @override
    def _distance(self) -> str:
        return f"kl_{self.direction}"


class Agreement(DistanceToReference):
    """Share of samples for which model and reference predict the same class; see `functional.agreement`.

    On the forget set it is also called completeness. Ideal 1; in practice that of another retrained model.

    Args:
        **options: torchmetrics' own, such as `sync_on_compute`.

    Raises:
        HAMUValueError: If an option is unknown.

    Example:
        >>> metric = Agreement()
        >>> metric.update(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True
    ideal = 1.0
    plot_upper_bound = 1.0
    _name = "agreement"


class ActivationDistance(DistanceToReference):
    """Mean Euclidean distance of the probabilities to those of references; see `functional.activation_distance`.

    Ideal 0; in practice that of another retrained model.

    Args:
        **options: torchmetrics' own, such as `sync_on_compute`.

    Raises:
        HAMUValueError: If an option is unknown.

    Example:
        >>> metric = ActivationDistance()
        >>> metric.update(torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.0, 1.0]]).log())
        >>> metric.compute()
        tensor(1.4142, dtype=torch.float64)
    """

    higher_is_better = False
    ideal = 0.0
    _name = "activation"


class ZRF(DistanceToReference):
    """Zero retrain forgetting, 1 - JS to a randomly initialised teacher as a share of ln 2; see `functional.zrf`.

    Give the teacher's predictions as `references`. The ideal is the retrained model's own ZRF, not 1.

    Args:
        **options: torchmetrics' own, such as `sync_on_compute`.

    Raises:
        HAMUValueError: If an option is unknown.

    Example:
        >>> metric = ZRF()
        >>> metric.update(torch.tensor([[2.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    higher_is_better = None
    plot_upper_bound = 1.0
    _name = "zrf"


class LogOddsDistance(SampleMetric):
    """Mean absolute difference of the label's log-odds to references, nats; see `functional.log_odds_distance`.

        mean over samples, and over the pool, of |phi_w - phi_R|,  phi = log p_y / (1 - p_y)

    Ideal 0; in practice that of another retrained model.

    Args:
        **options: torchmetrics' own, such as `sync_on_compute`.

    Raises:
        HAMUValueError: If an option is unknown.

    Example:
        >>> metric = LogOddsDistance()
        >>> metric.update(torch.tensor([[5.0, 0.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        >>> metric.compute()
        tensor(3., dtype=torch.float64)
    """

    higher_is_better = False
    ideal = 0.0
    plot_lower_bound = 0.0

    @override
    def update(self, scores: Any, references: Any, labels: Any, ids: Any = None) -> None:
        """Add some samples. Nothing is read on the host.

        Args:
            scores: `[n, K]`, logits or log-probabilities of the model.
            references: `[n, K]`, those of the reference on the same samples, or a list of such for a pool.
            labels: integer `[n]`; one that is no class makes the result NaN.
            ids: integer `[n]`, as for `JSToReference`.

        Raises:
            HAMUValueError: If the shapes are others, there is no reference, or `ids` are not integers.
        """
        self._add(DISTANCES["log_odds"].samples(scores, references, labels)[:, None], ids)

    @override
    def _summarise(self) -> Estimate:
        return DISTANCES["log_odds"].summarise(self._rows(1)[:, 0])


class KSOfLosses(SampleMetric):
    """Two-sample Kolmogorov-Smirnov test between a model's losses and a reference's; see `functional.ks_test`.

        D = max over x of |F_w(x) - F_R(x)|,    F: share of losses that are at most x        ideal 0

    Args:
        of: The one number that `compute` returns: "distance", or "p_value", which depends on the number of samples.
        **options: torchmetrics' own, such as `sync_on_compute`.

    Raises:
        HAMUValueError: If an argument is none of its choices.

    Example:
        >>> metric = KSOfLosses()
        >>> metric.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.5, 3.5, 4.5]))
        >>> metric.compute()
        tensor(0.6667, dtype=torch.float64)
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, of: Literal["distance", "p_value"] = "distance", **options: Any) -> None:
        super().__init__(**options)
        check_choice("of", of, ("distance", "p_value"))
        self.of = of
        self.ideal = 0.0 if of == "distance" else None

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """Whether a larger number is nearer to the reference."""
        return self.of == "p_value"

    @override
    def update(self, losses: Any, reference_losses: Any, ids: Any = None) -> None:
        """Add some samples. Nothing is read on the host.

        Args:
            losses: `[n]`, one loss of the model per sample.
            reference_losses: `[n]`, the reference's losses on the same samples.
            ids: integer `[n]`, as for `JSToReference`.

        Raises:
            HAMUValueError: If the shapes are others, or `ids` are not integers.
        """
        ours, theirs = (
            as_numbers(name, given, self.device)
            for name, given in (("losses", losses), ("reference_losses", reference_losses))
        )
        if ours.ndim != 1 or ours.shape != theirs.shape:
            raise HAMUValueError(
                f"Expected `losses` and `reference_losses` to be of one shape [N], but got {list(ours.shape)} and "
                f"{list(theirs.shape)}. Give one loss per sample: compute it with `reduction='none'`."
            )
        self._add(torch.stack([ours, theirs.to(ours.device)], dim=1), ids)

    @override
    def _summarise(self) -> Estimate:
        ours, theirs = self._rows(2).unbind(dim=1)
        result = ks_test(ours, theirs)
        return result.distance if self.of == "distance" else result.p_value
