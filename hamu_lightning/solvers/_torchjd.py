"""TorchJD's weightings as unlearning methods."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import KW_ONLY, dataclass, field
from importlib.util import find_spec
from typing import Any, get_args

import torch
from torch import Tensor

from hamu_lightning.checks import check_count, describe, store
from hamu_lightning.errors import HAMUError, HAMUStateError, HAMUValueError
from hamu_lightning.gramian import Blocks, check_blocks
from hamu_lightning.rules import Coefficients, Rule, as_wide, check_gramian, descend, descent_gramian, join_blocks
from hamu_lightning.solvers._module_state import load_attributes, save_attributes


class MissingTorchJDError(HAMUError, ImportError):
    """`FromTorchJD` was asked for, but TorchJD is not installed."""


@dataclass(frozen=True, eq=False)
class FromTorchJD(Rule):
    """Any weighting of TorchJD that acts on a Gramian, as an unlearning method.

    TorchJD (Quinton & Rey, https://torchjd.org) solves multi-objective problems: a weighting maps the Gramian of the
    objectives' descent gradients to weights `w`. The objectives here are the retain loss and the negative forget loss,
    with descent gradients `a = D g`, `D = diag(1, -1)`:

        w = weighting(D K D),   d = -lr sum_k w_k a_k

    There is neither a quota nor a trust region: the result reports a quota of 0, and the length of the step as its
    radius. The Gramians are copied to the host once per step, where the weighting sees them in float64 as they are:
    absolute thresholds of its own act. (UPGradWeighting and CAGradWeighting ignore gradients with
    `|a_r|^2 + |a_f|^2 < norm_eps`, by default 1e-4. On a trained model that is soon reached: give them a smaller one.)
    Random ones draw from torch's global generator.

    Args:
        weighting: A TorchJD weighting of Gramians such as `UPGradWeighting()`, an aggregator that is built on one such
            as `UPGrad()`, or `NashMTL(n_tasks=2)`, which sees a square root of the Gramian. What sees the gradients
            themselves (ExcessMTL, GradDrop) or two batches (MoDo, SDMGrad) is refused.
        blocks: As for `HAMUQ`. "global", the default, weighs the whole gradients; it stays one problem when the
            optimizer has several parameter groups. With more blocks each has a copy of the weighting: their states do
            not mix.
        forget_groups: For `values` with more than two gradients: how many of them, the last ones, are to be forgotten.

    Raises:
        MissingTorchJDError: If TorchJD is not installed.
        HAMUValueError: If an argument cannot be used.

    Example:
        >>> import torch
        >>> from torchjd.aggregation import MGDAWeighting
        >>> gramian = torch.tensor([[[4.0, 0.0], [0.0, 1.0]]])
        >>> FromTorchJD(MGDAWeighting()).coefficients(gramian, lr=0.1).values
        tensor([[-0.0200,  0.0800]], dtype=torch.float64)
    """

    weighting: Any
    _: KW_ONLY
    blocks: Blocks = "global"
    forget_groups: int = 1
    _states: list[Any] = field(default_factory=list, init=False, repr=False)
    """For each problem of the step its weighting: made at the first step."""

    def __post_init__(self) -> None:
        """Check the settings."""
        if find_spec("torchjd") is None:
            raise MissingTorchJDError(
                "Expected TorchJD for FromTorchJD, but it is not installed. Run: pip install 'hamu_lightning[torchjd]'"
            )
        check_blocks(self.blocks)
        store(self, forget_groups=check_count("forget_groups", self.forget_groups))
        object.__setattr__(self, "weighting", find_weighting(self.weighting))

    def coefficients(
        self,
        gramian: Tensor,
        *,
        lr: float | Tensor,
        weight_norms: Tensor | None = None,
        sizes: Tensor | None = None,
        quota: Tensor | None = None,
    ) -> Coefficients:
        """Compute the step of each block; see `Rule.coefficients`. A quota is of no account."""
        check_gramian(gramian)
        values = self.values(gramian, lr=lr)
        return Coefficients.without_quota(gramian.to(values.dtype), values)

    @torch.no_grad()
    def values(self, gramian: Tensor, *, lr: float | Tensor) -> Tensor:
        """Compute the coefficients of the raw gradients, for two or more of them.

        Args:
            gramian: `[B, n, n]`, in the order retain, protected groups, forget groups.
            lr: The learning rate, a float or `[B]`.

        Returns:
            `[B, n]`, float64: the change of the weights is `d = sum_k values[:, k] g_k`. NaN where a number that it is
            computed from is not finite; the weighting is then not asked.

        Raises:
            HAMUStateError: If the weighting finds no answer.
        """
        rate = as_wide(lr, gramian).expand(gramian.shape[0]).unsqueeze(1)  # [B, 1]
        gramian = gramian.to(rate.dtype)
        problems = join_blocks(gramian, rate) if self.blocks == "global" else gramian
        problems = torch.where(gramian.isfinite().all(), descent_gramian(problems, self.forget_groups), torch.nan)
        problems = problems.to("cpu", torch.float64)  # the step's only copy to the host
        if problems.isfinite().all():
            weights = torch.stack([_ask(w, k) for w, k in zip(self._weightings(len(problems)), problems, strict=True)])
        else:
            weights = torch.full_like(problems[:, 0], torch.nan)
        return descend(gramian, weights.to(gramian), rate, self.forget_groups)

    def state_dict(self) -> dict[str, Any]:
        """Return what the weightings remember from step to step: tensors, numbers, strings, lists and dicts.

        Nash-MTL keeps its last weights, GradVac and PCD moving averages, CR-MOGM smoothed weights; most keep nothing.
        """
        return {"weightings": [save_attributes(weighting) for weighting in self._states]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` of a rule with the same weighting returned."""
        saved = state_dict["weightings"]
        for weighting, attributes in zip(self._weightings(len(saved)), saved, strict=True):
            if isinstance(weighting, NashMTLOnGramian):
                weighting.build()
            load_attributes(weighting, attributes)

    def _weightings(self, count: int) -> list[Any]:
        """One weighting for each problem; fresh ones when their number has changed."""
        if len(self._states) != count:
            self._states[:] = [deepcopy(self.weighting) for _ in range(count)]
        return self._states


def find_weighting(method: Any) -> Any:
    """Return the weighting that a TorchJD object acts by, or raise if it does not act on Gramians."""
    from torchjd.aggregation import CRMOGMWeighting, NashMTL, Weighting
    from torchjd.linalg import PSDMatrix

    if isinstance(method, NashMTLOnGramian):
        return method
    if isinstance(method, NashMTL):
        return NashMTLOnGramian(method.weighting)
    weighting = getattr(method, "gramian_weighting", method)
    inner = weighting.weighting if isinstance(weighting, CRMOGMWeighting) else weighting
    # A weighting says in its bases what it acts on: Weighting[PSDMatrix] or Weighting[Matrix].
    bases = [base for kind in type(inner).__mro__ for base in vars(kind).get("__orig_bases__", ())]
    if not isinstance(inner, Weighting) or not any(PSDMatrix in get_args(base) for base in bases):
        raise HAMUValueError(
            f"Expected `weighting` to be a TorchJD weighting that acts on Gramians, but got {describe(method)}. "
            "Use one such as UPGradWeighting(), an aggregator built on one such as UPGrad(), or NashMTL(n_tasks=2)."
        )
    return weighting


class NashMTLOnGramian(torch.nn.Module):
    """Nash-MTL's weighting, which asks for the gradients and uses their inner products alone: it sees a square root.

    Args:
        weighting: That of `NashMTL`.
    """

    def __init__(self, weighting: Any) -> None:
        super().__init__()
        self.weighting = weighting

    def forward(self, gramian: Tensor) -> Tensor:
        """Return the weights for a matrix `A` with `A A' = gramian`; the eigendecomposition takes singular ones."""
        values, vectors = torch.linalg.eigh(gramian)
        return self.weighting(vectors * values.clamp(min=0).sqrt())  # type: ignore[no-any-return]

    def build(self) -> None:
        """Make the cone problem, which is not saved, and which the weighting makes at its first call alone."""
        self.weighting(torch.eye(self.weighting.n_tasks))


def _ask(weighting: Any, gramian: Tensor) -> Tensor:
    """The weights `[n]` for one Gramian `[n, n]` on the host; without any gradient there is nothing to ask."""
    if not gramian.any():
        return torch.zeros_like(gramian[0])
    try:
        return weighting(gramian)  # type: ignore[no-any-return]
    except ValueError as error:
        raise HAMUStateError(
            f"Expected {weighting} to weigh the descent gradients with the Gramian {gramian.tolist()}, but it says: "
            f"{error} Try another weighting, or other settings of this one."
        ) from error
