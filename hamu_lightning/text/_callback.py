"""Asks the model about the parts of the data during a fit and after it, and logs what it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from hamu_lightning.checks import check_count, check_optional, check_type
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics.functional import Estimate
from hamu_lightning.text._data import QAData
from hamu_lightning.text._evaluate import Part, TextSettings, evaluate_text
from hamu_lightning.text._scores import FORGET, HOLDOUT, RETAIN, TextEvaluation


class EvaluateText(Callback):
    """Logs what a language model says of the parts of the data as `eval/...`: before a fit, during it, and at its end.

    - `on_train_start`: the model as it came; of a fit that goes on, as it came from the checkpoint.
    - `on_train_batch_end`: every `every_n_steps` optimizer steps.
    - `on_train_end`: the model as it leaves, and in TensorBoard a table of greedy answers before and after.

    The names are those of `TextEvaluation.numbers`; what is NaN is not logged, and its reason is in `numbers`. All
    of them are in `trainer.callback_metrics`, for `ModelCheckpoint(monitor="eval/forget/spans")`. The fit
    goes on as without this callback: modes and random numbers are put back. All processes ask, see `evaluate_text`.
    Nothing of it is in a checkpoint. The table of answers, which may hold what is to be forgotten, is in the event
    file: delete that, or set `answers=0`.

    Args:
        parts: As for `evaluate_text`; default: retain, forget and holdout of the fit's `QAData`.
        tokenizer: For parts that are lists.
        settings: How much is asked.
        every_n_steps: How often during the fit; None: not at all.
        reference: What a retrained model says of the same parts, for forget quality and PrivLeak.
        answers: How many answers of the forget part are shown; 0: none.

    Attributes:
        numbers: The last numbers, by name.
        before: The `TextEvaluation` from before the first step.
        last: The last one.

    Raises:
        HAMUValueError: If an argument is of another kind, or there are no parts.
    """

    def __init__(
        self,
        parts: Mapping[str, Part] | None = None,
        tokenizer: Any = None,
        settings: TextSettings | None = None,
        *,
        every_n_steps: int | None = None,
        reference: TextEvaluation | None = None,
        answers: int = 8,
    ) -> None:
        self.parts: Mapping[str, Part] | None = check_type("parts", parts, Mapping | None, "a dict of datasets")
        self.tokenizer = tokenizer
        self.settings = TextSettings() if settings is None else settings
        self.every_n_steps = check_optional(check_count, "every_n_steps", every_n_steps)
        check_type("reference", reference, TextEvaluation | None, "what evaluate_text returned for a retrained model")
        self.reference = reference
        self.answers = check_count("answers", answers, least=0)
        self.numbers: dict[str, Estimate] = {}
        self.before: TextEvaluation | None = None
        self.last: TextEvaluation | None = None
        self._step = -1

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the model as it came."""
        self.before = self._ask(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask every `every_n_steps` steps."""
        step = trainer.global_step
        if self.every_n_steps and step != self._step and step % self.every_n_steps == 0:
            self._ask(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the model as it leaves, and show its answers."""
        after = self._ask(trainer, pl_module)
        table = self._table(after)
        for logger in trainer.loggers:
            if table and isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_text("eval/answers", table, trainer.global_step)

    def _ask(self, trainer: Trainer, pl_module: LightningModule) -> TextEvaluation:
        self._step = trainer.global_step
        found = evaluate_text(
            pl_module,
            self._parts_of(trainer),
            self.tokenizer,
            self.settings,
            precision=trainer.precision_plugin.forward_context,
        )
        self.last, self.numbers = found, found.numbers(self.reference)
        # With what is not defined, as NaN: a monitor would else say that there is no such name.
        monitored = {f"eval/{name}": torch.tensor(e.value) for name, e in self.numbers.items()}
        trainer.callback_metrics.update(monitored)
        values = {f"eval/{name}": e.value for name, e in self.numbers.items() if e.is_defined}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        return found

    def _parts_of(self, trainer: Trainer) -> Mapping[str, Part]:
        if self.parts is not None:
            return self.parts
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, QAData):
            raise HAMUValueError(
                "Expected `parts` of EvaluateText, or a fit with QAData, but got neither. Give {'forget': dataset}."
            )
        parts = {FORGET: data.forget, RETAIN: data.retain, HOLDOUT: data.holdout}
        return {name: part for name, part in parts.items() if len(part)}

    def _table(self, after: TextEvaluation) -> str:
        if self.before is None or FORGET not in after.parts:
            return ""
        pairs = zip(self.before.parts[FORGET].rows, after.parts[FORGET].rows, strict=True)
        shown = [(old.question, old.answer, new.answer) for old, new in pairs if new.answer is not None]
        lines = [f"| {' | '.join(map(_cell, row))} |" for row in shown[: self.answers]]
        head = ["| question | before | after |", "| --- | --- | --- |"]
        return "\n".join([*head, *lines]) if lines else ""


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")
