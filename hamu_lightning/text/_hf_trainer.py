"""The Trainer of transformers, with a forget pass and a step of ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from hamu_lightning.checks import check_count, check_flag, check_optional, check_type, describe
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.files import read_tensors, write_whole
from hamu_lightning.objectives import BatchPass, Objective
from hamu_lightning.optim import HAMUOptimizer
from hamu_lightning.randomness import RandomStream
from hamu_lightning.rules import Rule, find_adapters

# In the folder of a checkpoint.
_STATE = "hamu_state.pt"
# Strategies that hold gradients where two of them cannot be kept apart.
_REFUSED = ("DEEPSPEED", "FSDP", "MEGATRON_LM")


class HAMUTrainerMixin:
    """Unlearning in a `transformers.Trainer`: `class Unlearner(HAMUTrainerMixin, Trainer): ...`, and two arguments.

    `train_dataset` is what is kept. Beside each batch of it one of `forget_dataset` goes through the model, with the
    Trainer's collator, precision and accumulation, into a gradient of its own; the optimizer that the Trainer makes, or
    is given, becomes the base of a `HAMUOptimizer`. Each of the two gradients is clipped for itself. The forget pass
    draws from random numbers of its own: with the rule `FineTune` a run is that of the plain Trainer.

    The training log gets `forget_loss`, the mean of what is raised since the last log, and of the last step
    `hamu/kappa`, `hamu/cosine`, `hamu/forget_improvement` and `hamu/retain_improvement` (docs/logged.md).

    There are no targets, verified steps and guards here: those belong to `HAMUCallback`; `evaluate_text` measures any
    model.

    The Trainer's checkpoints get a file `hamu_state.pt`: the place in the forget data and its random numbers, the
    counters, and what the objective keeps, such as the model before. `train(resume_from_checkpoint=...)` goes on with
    it; where there is none, a warning says what begins anew.

    Args:
        *args: For the Trainer.
        forget_dataset: What is to be forgotten, in the form of the training data.
        rule: A rule of retain and forget with a quota, such as `HAMUQ(quota=1e-3)`.
        objective: What is raised, from `hamu_lightning.objectives`; default: the model's own loss.
        forget_batch_size: Of each process; default: that of the training data.
        exact: Take the learning rate from the optimizer, and nothing else, as in `HAMUOptimizer`.
        **options: For the Trainer.

    Attributes:
        hamu: The `HAMUOptimizer`, once training has begun.

    Raises:
        HAMUValueError: If an argument is of another kind, the rule goes to a target or has other groups, or the Trainer
            runs under DeepSpeed, FSDP or Megatron, or in float16.

    Example:
        >>> from transformers import Trainer
        >>> class Unlearner(HAMUTrainerMixin, Trainer):
        ...     pass
        >>> # Unlearner(model, args, train_dataset=retain, forget_dataset=forget, rule=HAMUQ(quota=1e-3)).train()
    """

    args: Any
    accelerator: Any
    model: Any
    optimizer: Any

    def __init__(
        self,
        *args: Any,
        forget_dataset: Any,
        rule: Rule,
        objective: Objective | None = None,
        forget_batch_size: int | None = None,
        exact: bool = False,
        **options: Any,
    ) -> None:
        check_type("rule", rule, Rule, "a rule such as HAMUQ(quota=1e-3)")
        check_type("objective", objective, Objective | None, "one of hamu_lightning.objectives")
        if rule.target_quotas or set(rule.groups) != {"retain", "forget"}:
            raise HAMUValueError(
                f"Expected a rule of retain and forget with a quota for each step, but got {rule}. Give "
                "HAMUQ(quota=1e-3); targets and several groups need HAMUCallback in a Trainer of Lightning."
            )
        if not hasattr(forget_dataset, "__getitem__") or not len(forget_dataset):
            raise HAMUValueError(
                f"Expected `forget_dataset` to be a Dataset with samples, but got {describe(forget_dataset)}."
            )
        self.forget_dataset, self.rule, self.objective = forget_dataset, rule, objective
        self.forget_batch_size = check_optional(check_count, "forget_batch_size", forget_batch_size)
        self._exact = check_flag("exact", exact)
        self._forget_batches: Iterator[Any] = iter(())
        self._window: list[Any] = []
        self._items: Any = None
        self._seen: list[Tensor] = []
        self._windows = self._passes = 0
        self._is_forgetting = False
        self._resumes: str | bool | None = None
        super().__init__(*args, **options)
        self._check_set_up()
        self._stream = RandomStream(self.args.seed, self.args.process_index)
        events = _make_events(self._clip_forget, self._save_state, self._load_state)
        self.add_callback(events)  # type: ignore[attr-defined]

    @property
    def hamu(self) -> HAMUOptimizer:
        """The optimizer that combines the gradients, below what Accelerate puts around it."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        if not isinstance(inner, HAMUOptimizer):
            raise HAMUStateError(f"Expected an optimizer of ours, but got {describe(inner)}. Call train() first.")
        return inner

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        """Train as ever, and go on with our state where a run is resumed."""
        self._resumes = resume_from_checkpoint
        return super().train(resume_from_checkpoint, *args, **options)  # type: ignore[misc]

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """Wrap what the Trainer makes, or was given."""
        made = super().create_optimizer(*args, **options)  # type: ignore[misc]
        # A second train() finds what Accelerate put around ours in the first.
        if not isinstance(getattr(made, "optimizer", made), HAMUOptimizer):
            adapters = find_adapters(self.model)
            made = HAMUOptimizer(made, self.rule, self.model.named_parameters, exact=self._exact, adapters=adapters)
            self.optimizer = made
        return made

    def get_train_dataloader(self) -> Any:
        """Return the Trainer's own loader, and load the forget data alike."""
        loader = super().get_train_dataloader()  # type: ignore[misc]
        self._forget_batches, self._window, self._passes = self._load_forget(loader), [], 0
        return loader

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run a forget batch into a gradient of its own, then the training batch as ever; return the latter's loss."""
        batch = self._next_forget_batch()
        with self._stream.active(), self.hamu.forget():
            self._is_forgetting = True
            try:
                loss = super().training_step(model, batch, self._items)  # type: ignore[misc]
            finally:
                self._is_forgetting = False
        self._stream.draw += 1
        self._passes += 1
        self._seen.append(loss)
        with self.hamu.retain():
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc,no-any-return]

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Any:
        """Return what is raised in a forget pass, the Trainer's own loss else."""
        own = super().compute_loss  # type: ignore[misc]
        if not self._is_forgetting or self.objective is None:
            return own(model, inputs, *args, **options)
        return self.objective(BatchPass(model, inputs, lambda: own(model, inputs)))

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Add what the forget data and the last step say to the training log."""
        if "loss" in logs and self._seen:
            logs["forget_loss"] = float(torch.stack(self._seen).sum()) / self._windows
            self._seen, self._windows = [], 0
            logs.update(self._describe_step())
        super().log(logs, *args, **options)  # type: ignore[misc]

    def _describe_step(self) -> dict[str, float]:
        step = self.hamu.last_step
        if step is None:
            return {}
        numbers = {
            "kappa": step.kappa.sum(),
            "cosine": step.total_cosine,
            "forget_improvement": step.improvement("forget"),
            "retain_improvement": step.improvement("retain"),
        }
        return {f"hamu/{name}": float(number) for name, number in numbers.items()}

    def _check_set_up(self) -> None:
        kind = str(getattr(self.accelerator.distributed_type, "name", ""))
        if kind in _REFUSED or self.args.fp16:
            got = "float16" if self.args.fp16 else kind
            raise HAMUValueError(
                f"Expected one process or DDP, in float32 or bfloat16, but got {got}. "
                "Set bf16=True, or unlearn with HAMUCallback, which works with Lightning's FSDP2 and 16-mixed."
            )

    def _next_forget_batch(self) -> Any:
        if not self._window:
            count = self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
            taken = self.get_batch_samples(self._forget_batches, count, self.args.device)  # type: ignore[attr-defined]
            self._window, items = taken
            # An objective is a mean over samples: the Trainer divides it by the number of batches.
            self._items = items if self.objective is None else None
            self._windows += 1
        return self._window.pop(0)

    def _load_forget(self, like: Any) -> Iterator[Any]:
        """Yield forget batches without end, shuffled anew in each pass."""
        dataset, ranks, seed = _with_columns_of(like.dataset, self.forget_dataset), self.args.world_size, self.args.seed
        sampler: DistributedSampler[Any] | None
        sampler = None if ranks == 1 else DistributedSampler(dataset, ranks, self.args.process_index, seed=seed)
        loader: DataLoader[Any] = DataLoader(
            dataset,
            self.forget_batch_size or self.args.train_batch_size,
            shuffle=sampler is None,
            sampler=sampler,
            collate_fn=like.collate_fn,
            num_workers=self.args.dataloader_num_workers,
            # Otherwise each pass would take a number from the generator of the training data.
            generator=torch.Generator().manual_seed(seed),
        )
        passes = 0
        while True:
            if sampler is not None:
                sampler.set_epoch(passes)
            yield from loader
            passes += 1

    def _save_state(self, step: int) -> None:
        """Put our state into the checkpoint that was written after so many steps."""
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        if not (self.args.should_save and folder.is_dir()):
            return
        objective = {} if self.objective is None else self.objective.state_dict()
        counts = {"draw": self._stream.draw, "passes": self._passes}
        state = {"optimizer": self.hamu.hamu_state_dict(), "objective": objective, **counts}
        write_whole(folder / _STATE, lambda file: torch.save(state, file))

    def _load_state(self) -> None:
        """Go on with the state of the checkpoint that the run is resumed from."""
        from transformers.trainer_utils import get_last_checkpoint

        resumes, self._resumes = self._resumes, None
        folder = get_last_checkpoint(self.args.output_dir) if resumes is True else resumes
        if not folder:
            return
        if not (path := Path(folder) / _STATE).exists():
            warnings.warn(
                f"The checkpoint {str(folder)!r} has no {_STATE}: the forget data, their random numbers, the counters "
                "and the reference of the objective begin anew, with the weights of the checkpoint.",
                stacklevel=2,
            )
            return
        state = read_tensors(path, "the state of unlearning", "Take it out to begin the forget data anew.")
        self.hamu.load_hamu_state_dict(state["optimizer"])
        if self.objective is not None:
            self.objective.load_state_dict(state["objective"])
        self._stream.draw, self._passes = state["draw"], state["passes"]
        for _ in range(self._passes):
            next(self._forget_batches)

    def _clip_forget(self) -> None:
        if self.args.max_grad_norm > 0:  # 0 and below: no clipping, as in the Trainer
            with self.hamu.forget():
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)


def _make_events(clip: Callable[[], None], save: Callable[[int], None], load: Callable[[], None]) -> Any:
    """A callback: clips the forget gradient when the other one has been clipped; saves and loads with checkpoints."""
    from transformers import TrainerCallback

    class Events(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **options: Any) -> None:
            load()

        def on_pre_optimizer_step(self, *args: Any, **options: Any) -> None:
            clip()

        def on_save(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            save(state.global_step)

    return Events()


def _with_columns_of(like: Any, dataset: Any) -> Any:
    """Take out the columns of a dataset of Hugging Face that the Trainer took out of the training data."""
    kept, own = getattr(like, "column_names", None), getattr(dataset, "column_names", None)
    if not kept or not own:
        return dataset
    return dataset.remove_columns([name for name in own if name not in kept])
