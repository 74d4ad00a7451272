"""EvaluateUnlearning: measures forgetting during a fit and at its ends."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset
from typing_extensions import Self, override

from hamu_lightning.callbacks import HAMUMisconfigurationError, find_hamu, find_parts
from hamu_lightning.callbacks.passes import HoldsData
from hamu_lightning.checks import check_count, check_optional, check_type
from hamu_lightning.data import UnlearnData
from hamu_lightning.evidence._evaluate import Evaluator, evaluate
from hamu_lightning.evidence._ordered import check_part
from hamu_lightning.evidence._publish import log_layout, log_numbers, log_pictures, log_settings, publish
from hamu_lightning.evidence._sample_table import SampleTable
from hamu_lightning.evidence._scores import FORGET, HOLDOUT, PARTS, RETAIN, TEST, Evaluation, PartScores
from hamu_lightning.evidence._trade_off import trade_off
from hamu_lightning.objectives import Outputs

# What a checkpoint holds of the scores before: not the log-probabilities, which are large.
_KEPT = ("losses", "recognised", "ids", "labels")


class EvaluateUnlearning(HoldsData, Callback):
    """Measures what a model says of retain, forget, held-out and test data, while it unlearns and at both ends.

    It goes with `HAMUCallback`, with any other method that is a fit, and with several loggers or none.

    - `on_fit_start` puts the callback behind all others but those that save checkpoints, so that it measures the
      weights that they leave.
    - `on_train_start` finds the data, measures all of it (`before`), and the references.
    - Every `every_n_steps` optimizer steps, and at the end of every `every_n_epochs`-th epoch (before `ModelCheckpoint`
      looks, in an epoch with validation too), at most `max_batches` batches of each part are measured, spread over it.
    - `on_train_end` measures all of it again (`after`), with the slower attack, and makes the table and the pictures.
    - Each time `eval/<name>` goes to all loggers and to `trainer.callback_metrics`: what `Evaluation.numbers`, `since`
      the start and, with references, `distances` return, and `eval/score` (`trade_off`). With
      `ModelCheckpoint(monitor="eval/score", mode="max")` the best trade-off is kept.
    - TensorBoard gets pictures, a layout of custom scalars, and the settings with the final numbers as a run
      "unlearning" of its own; loggers with `log_image` (W&B's) get the pictures.

    A measurement leaves no trace, see `evaluate`. With several processes each of them measures all of the data, and all
    take the numbers of the first one. A resumed run goes on with `before` and `history` of the checkpoint, if its data
    are the same; `before` has no log-probabilities then. Where processes are spawned the attributes stay behind in
    them.

    Args:
        retain: Data to keep, as for `evaluate`. Default: the training data of the fit.
        forget: Data to forget. Default: those of the `HAMUCallback` of the same trainer, all requests together.
        holdout: Data that the model was never trained on, of the same distribution as the data to forget. Default: the
            held-out data of the target of the `HAMUCallback`, or the validation data.
        test: Further data that the model was never trained on.
        references: Models that never saw the data to forget, such as retrained ones, or their `Evaluation`s.
        every_n_steps: Measure after so many optimizer steps.
        every_n_epochs: Measure at the end of so many epochs; None for not.
        max_batches: So many batches of each part between the ends of the fit; None for all.
        outputs: How to ask the module about a batch; see `hamu_lightning.objectives.Outputs`.

    Attributes:
        before: All samples before the first step; None before the fit.
        after: All samples at the end; None before.
        history: For each measurement the optimizer step and the numbers by name; those that are not defined are left
            out.
        samples: What became of each sample; None before the end, and where it cannot be told.
        left_out: What `eval/score` leaves out, by name, and why.

    Raises:
        HAMUValueError: If an argument is of another kind.

    Example:
        >>> import torch
        >>> forget = torch.utils.data.TensorDataset(torch.zeros(4, 2), torch.tensor([0, 1, 2, 0]))
        >>> evaluation = EvaluateUnlearning(forget=forget, every_n_steps=50)
        >>> # Trainer(callbacks=[HAMUCallback(...), evaluation]).fit(module, retain_loader)
        >>> # print(evaluation.after.numbers()["auc"]); evaluation.samples.to_csv("samples.csv")
    """

    _data: ClassVar[tuple[str, ...]] = ("_given",)

    def __init__(
        self,
        *,
        retain: Iterable[Any] | Dataset | None = None,  # type: ignore[type-arg]  # LightningCLI makes no Dataset[Any]
        forget: Iterable[Any] | Dataset | None = None,  # type: ignore[type-arg]
        holdout: Iterable[Any] | Dataset | None = None,  # type: ignore[type-arg]
        test: Iterable[Any] | Dataset | None = None,  # type: ignore[type-arg]
        references: Sequence[Any] = (),
        every_n_steps: int | None = None,
        every_n_epochs: int | None = 1,
        max_batches: int | None = 16,
        outputs: Outputs | None = None,
    ) -> None:
        super().__init__()
        given = {RETAIN: retain, FORGET: forget, HOLDOUT: holdout, TEST: test}
        self._given = {name: source for name, source in given.items() if source is not None}
        for name, source in self._given.items():
            check_part(name, source)
        check_type("references", references, list | tuple, "a list of models that never saw the data to forget")
        for reference in references:
            check_type("references", reference, LightningModule | Evaluation, "LightningModules or Evaluations")
        self._references = [*references]
        self._every_steps = check_optional(check_count, "every_n_steps", every_n_steps)
        self._every_epochs = check_optional(check_count, "every_n_epochs", every_n_epochs)
        self._max_batches = check_optional(check_count, "max_batches", max_batches)
        self._outputs = outputs
        self.before: Evaluation | None = None
        self.after: Evaluation | None = None
        self.samples: SampleTable | None = None
        self.history: list[tuple[int, dict[str, float]]] = []
        self.left_out: dict[str, str] = {}
        self._evaluator: Evaluator | None = None
        self._measured_at = -1
        self._state: dict[str, Any] = {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [callback for callback in callbacks if callback is not self]
        last = [callback for callback in others if isinstance(callback, Checkpoint)]
        # The list is replaced: the trainer is going through the one that was there.
        trainer.callbacks = [*(c for c in others if c not in last), self, *last]  # type: ignore[attr-defined]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        # Under one transform for all parts, as `evaluate(module, data.parts())` measures other models.
        own = data.parts() if isinstance(data, UnlearnData) else {}
        parts = {**find_parts(trainer, {*own, *self._given}), **own, **self._given}
        if FORGET not in parts:
            raise HAMUMisconfigurationError(
                "Expected to find the data to forget, but none was passed, and no HAMUCallback of this trainer has "
                "data that can be joined. Pass EvaluateUnlearning(forget=loader_or_dataset)."
            )
        parts = {name: parts[name] for name in PARTS if name in parts}
        self._evaluator = Evaluator(pl_module, parts, outputs=self._outputs)
        self.after, self.samples, self.history, self._measured_at = None, None, [], -1
        self._references = [self._evaluate_reference(trainer, x, parts) for x in self._references]
        log_layout(trainer)
        if self._go_on():
            publish(trainer, self.history[-1][1])
        else:
            self.before = self._evaluate(trainer, None)
            self._take(trainer, self.before, is_whole=True)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        every, step = self._every_steps, trainer.global_step
        if every is not None and step // every > max(self._measured_at, 0) // every:
            self._measure(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # ModelCheckpoint looks here where there is validation, before the epoch ends.
        if self._evaluator is not None and not trainer.sanity_checking and trainer.is_last_batch:
            self._end_epoch(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_epoch(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.before is not None
        self.after = self._evaluate(trainer, None)
        numbers = self._take(trainer, self.after, is_whole=True)
        self._evaluator = None
        self.samples = None if self.before.at(self.after) is None else SampleTable.of(self.before, self.after)
        log_pictures(trainer, self.before, self.after, self.history, self._references)
        log_settings(trainer, find_hamu(trainer), numbers)
        if self.left_out:
            told = "; ".join(f"{name} ({reason})" for name, reason in self.left_out.items())
            rank_zero_info(f"eval/score leaves out: {told}.")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._evaluator = None

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._evaluator = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the numbers so far, and while the fit runs the losses of single samples before it."""
        state: dict[str, Any] = {"history": [[step, dict(numbers)] for step, numbers in self.history]}
        if self._evaluator is not None and self.before is not None:
            parts = self.before.parts.items()
            state["before"] = {name: {key: getattr(x, key) for key in _KEPT} for name, x in parts}
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """A pickle holds nothing of a running fit, and of the data a description."""
        return {**super().__getstate__(), "_evaluator": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = copy.copy(self)
        made._evaluator = None
        return HoldsData.__deepcopy__(made, memo)

    def _end_epoch(self, trainer: Trainer) -> None:
        is_due = self._every_epochs is not None and (trainer.current_epoch + 1) % self._every_epochs == 0
        if is_due and self._measured_at != trainer.global_step:
            self._measure(trainer)

    def _measure(self, trainer: Trainer) -> None:
        self._take(trainer, self._evaluate(trainer, self._max_batches), is_whole=False)

    def _take(self, trainer: Trainer, found: Evaluation, *, is_whole: bool) -> dict[str, float]:
        """Take what was measured into the history, and hand it to the loggers."""
        assert self.before is not None
        step = self._measured_at = trainer.global_step
        before = self.before.at(found)
        references = [at for x in self._references if (at := x.at(found)) is not None]
        estimates = found.numbers(quick=not is_whole)
        estimates |= {} if before is None else found.since(before)
        estimates |= found.distances(references) if references else {}
        score, self.left_out = trade_off(found, before or self.before, references)
        numbers = {name: estimate.value for name, estimate in estimates.items() if estimate.is_defined}
        numbers["score"] = score.value
        self.history.append((step, {name: value for name, value in numbers.items() if value == value}))
        log_numbers(trainer, numbers, step)
        return numbers

    def _evaluate(self, trainer: Trainer, max_batches: int | None) -> Evaluation:
        assert self._evaluator is not None
        return _agree(trainer, self._evaluator.measure(max_batches))

    def _evaluate_reference(self, trainer: Trainer, model: Any, parts: Mapping[str, Any]) -> Evaluation:
        if isinstance(model, Evaluation):
            return model
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        return _agree(trainer, evaluate(model, parts, outputs=self._outputs, datamodule=datamodule))

    def _go_on(self) -> bool:
        """Whether a checkpoint says what was before, of the same data; its numbers are taken over."""
        state, self._state = self._state, {}
        if not state.get("before"):
            return False
        before = Evaluation({name: PartScores(**columns) for name, columns in state["before"].items()})
        assert self._evaluator is not None
        if not self._evaluator.holds(before):
            return False
        self.before, self.history = before, [(step, numbers) for step, numbers in state["history"]]
        self._measured_at = self.history[-1][0]
        return True


def _agree(trainer: Trainer, found: Evaluation) -> Evaluation:
    """The evaluation of the first process: others may have rounded differently."""
    if trainer.world_size == 1:
        return found
    parts, is_whole = trainer.strategy.broadcast((dict(found.parts), found.is_whole))
    return Evaluation(parts, is_whole=is_whole)
