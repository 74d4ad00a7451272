"""Objectives that compare distributions: with the reference, a teacher that knows nothing, or adjusted logits."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from hamu_lightning.checks import check_choice, check_positive, check_seed
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.objectives._base import BatchPass, Objective, to_raise
from hamu_lightning.objectives._outputs import Outputs, as_outputs
from hamu_lightning.objectives._reference import FrozenCopy, Reference, as_reference, copy_module

Direction = Literal["forward", "reverse"]


def kl_divergence(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) = sum over classes of p (log p - log q) in nats, for logits `[..., V]`.

    p = softmax(p_logits / temperature), q likewise; not multiplied by the square of the temperature.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> round(float(kl_divergence(p.log(), q.log())), 4)
        0.1438
    """
    log_p, log_q = (p_logits / temperature).log_softmax(-1), (q_logits / temperature).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class ReferenceKL(Objective):
    """How far the module's predictions are from the reference's, in nats: lowered on retain, raised on forget.

        forward   KL(reference || module)     the default
        reverse   KL(module || reference)

    per token that has a label, the mean over a sample's tokens, the mean over samples. Forward is the distance d of
    SCRUB (Kurmanji et al. 2023, arXiv 2302.09880) and of the KL baseline of TOFU (Maini et al. 2024, arXiv 2401.06121).
    SCRUB, `min alpha d(retain) + gamma CE(retain) - d(forget)`, is in its simultaneous form

        reference = FrozenCopy()
        HAMUCallback(
            objective=ReferenceKL(reference),
            retain_objective=WeightedSum((alpha, ReferenceKL(reference)), (gamma, CrossEntropy())),
        )

    At its minimum, where the module is the reference, it has no gradient, and this is where unlearning starts. On the
    retain stream it therefore needs a radius that does not come from the retain gradient (`RelativeRadius`,
    `FixedRadius`), or `CrossEntropy()` beside it: with `LearningRateRadius` the first step has length 0, and so have
    all others. On the forget stream something else has to make the first difference: dropout (the reference has none),
    or steps on the retain data.

    Args:
        reference: What to compare with.
        direction: "forward" or "reverse".
        temperature: Both models' logits are divided by it; the result is not multiplied by its square.
        outputs: How to ask the models.

    Raises:
        HAMUValueError: If a setting is out of its range.
    """

    is_forget_only = False
    is_nonnegative = True
    _parts = ("reference",)

    def __init__(
        self,
        reference: Reference | None = None,
        *,
        direction: Direction = "forward",
        temperature: float = 1.0,
        outputs: Outputs | None = None,
    ) -> None:
        check_choice("direction", direction, get_args(Direction))
        self.reference, self.direction = as_reference(reference), direction
        self.temperature = check_positive("temperature", temperature)
        self.outputs = as_outputs(outputs)

    @override
    def samples(self, batch: BatchPass) -> Tensor:
        prediction, reference = self.reference.predict(batch, self.outputs)

        def distance(now: Tensor, labels: Tensor, original: Tensor) -> Tensor:
            pair = (original, now) if self.direction == "forward" else (now, original)
            return kl_divergence(*pair, temperature=self.temperature)

        return prediction.mean_over_places(prediction.by_rows(distance, reference))


class BadTeacher(Objective):
    """Predict what a randomly initialised teacher predicts; the forget half of Chundawat et al. 2023.

        to raise   -KL(teacher || module) <= 0        arXiv 2205.08096: its loss where l_u = 1

    per token, the mean over a sample's tokens, the mean over samples. The retain half, with l_u = 0, is
    `retain_objective=ReferenceKL()`.

    Args:
        teacher: A module that knows nothing of the data. Default: a copy of the trained one with fresh weights.
        temperature: As for `ReferenceKL`.
        seed: Of the fresh weights. They follow from it and the module alone, so that no checkpoint holds them.
        outputs: How to ask the models.

    Raises:
        HAMUValueError: If a setting is out of its range, or (at the first batch) weights cannot be drawn afresh.
    """

    def __init__(
        self,
        teacher: nn.Module | None = None,
        *,
        temperature: float = 1.0,
        seed: int = 0,
        outputs: Outputs | None = None,
    ) -> None:
        self.teacher: Reference = RandomTeacher(seed) if teacher is None else FrozenCopy(teacher)
        self.temperature, self.outputs = check_positive("temperature", temperature), as_outputs(outputs)

    @override
    def samples(self, batch: BatchPass) -> Tensor:
        prediction, teacher = self.teacher.predict(batch, self.outputs)

        def distance(now: Tensor, labels: Tensor, taught: Tensor) -> Tensor:
            return kl_divergence(taught, now, self.temperature)

        return to_raise(prediction.mean_over_places(prediction.by_rows(distance, teacher)))


class UNDIAL(Objective):
    """Predict what the reference predicts with the label's logit turned down (Dong et al. 2024, arXiv 2402.10052).

        to raise   -KL(softmax(z_ref - strength onehot(y)) || module) <= 0

    per token, the mean over a sample's tokens, the mean over samples. The paper's loss is the cross-entropy with the
    same targets: it differs by their entropy, which does not depend on the weights. The target is finite, so forgetting
    ends by itself.

    Args:
        strength: What is taken from the label's logit.
        reference: Whose logits are adjusted.
        outputs: How to ask the models.

    Raises:
        HAMUValueError: If `strength` is not positive.
    """

    _parts = ("reference",)

    def __init__(
        self, strength: float = 10.0, *, reference: Reference | None = None, outputs: Outputs | None = None
    ) -> None:
        self.strength, self.reference = check_positive("strength", strength), as_reference(reference)
        self.outputs = as_outputs(outputs)

    @override
    def samples(self, batch: BatchPass) -> Tensor:
        prediction, reference = self.reference.predict(batch, self.outputs)

        def distance(now: Tensor, labels: Tensor, original: Tensor) -> Tensor:
            taken = torch.full_like(original[..., :1], -self.strength)
            return kl_divergence(original.scatter_add(-1, labels.unsqueeze(-1), taken), now)

        return to_raise(prediction.mean_over_places(prediction.by_rows(distance, reference)))


class DELETE(Objective):
    """Predict the reference's second choice: its prediction without the label, renormalised (Zhou et al. 2025).

        to raise   -KL(s || module) <= 0,    s = softmax(z_ref without the label's logit)        arXiv 2503.23751

    per token, the mean over a sample's tokens, the mean over samples. "Decoupled Distillation to Erase", CVPR 2025: the
    loss forgets, as s gives the label nothing, and retains, as it gives the other classes what they had among
    themselves. The published method distils on the forget data alone; here the retain stream comes in by the rule. The
    published code sets the label's logit to -1e10. The target is finite, so forgetting ends by itself; but it ends
    where the label has no probability at all, for a sample whose class stays as well.

    Args:
        reference: Whose second choice is learnt.
        outputs: How to ask the models.
    """

    _parts = ("reference",)

    def __init__(self, *, reference: Reference | None = None, outputs: Outputs | None = None) -> None:
        self.reference, self.outputs = as_reference(reference), as_outputs(outputs)

    @override
    def samples(self, batch: BatchPass) -> Tensor:
        prediction, reference = self.reference.predict(batch, self.outputs)

        def distance(now: Tensor, labels: Tensor, original: Tensor) -> Tensor:
            # Finite, or 0 log 0 would be NaN; half of the smallest number, or it would not differ from the others.
            nothing = torch.finfo(original.dtype).min / 2
            return kl_divergence(original.scatter(-1, labels.unsqueeze(-1), nothing), now)

        return to_raise(prediction.mean_over_places(prediction.by_rows(distance, reference)))


class RandomTeacher(FrozenCopy):
    """A copy of the module with all its weights drawn afresh, the same ones for the same seed.

    Args:
        seed: Of the weights.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = check_seed(seed)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._copy = None

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_seed": self._seed}

    @override
    def _make(self, module: nn.Module) -> nn.Module:
        teacher = copy_module(module)
        device = next((weight.device for weight in teacher.parameters()), torch.device("cpu"))
        # On the CPU, so that the weights are the same on every machine, and no other generator is touched.
        teacher.to("cpu")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._seed)
            draw_weights(teacher)
        return teacher.to(device)


def draw_weights(module: nn.Module) -> None:
    """Initialise all weights as torch's layers do.

    Raises:
        HAMUValueError: If a weight belongs to a layer that does not say how: it would stay as it was trained.
    """
    left = []
    for name, part in module.named_modules():
        reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        if callable(reset):
            reset()
        else:
            left += [f"{name}.{weight}".lstrip(".") for weight, _ in part.named_parameters(recurse=False)]
    if left:
        raise HAMUValueError(
            f"Expected all layers to have `reset_parameters`, but the weights {left[:5]} have no such layer and would "
            "stay as they were trained. Give BadTeacher(teacher=...) a module with fresh weights."
        )
