"""A LightningModule around a causal language model of transformers, whole or with PEFT's adapters."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import override

from hamu_lightning.checks import check_flag, check_number, check_optional, check_positive, describe
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.text._encoding import CORE
from hamu_lightning.text._extra import check_installed

_IGNORED = -100
_MARK = "hamu_adapters_only"


class CausalLMModule(LightningModule):
    """Any causal language model of transformers as a LightningModule, to be fine-tuned or unlearned.

        loss of a batch = sum over its answer tokens of -log p(x_t | x_<t)  /  number of its answer tokens

    the mean over tokens, in nats; answer tokens are those whose label is not -100. With accumulation, and on several
    processes, Lightning takes the mean of such means, in which tokens of short batches count more. With
    `tokens_per_batch=N` the sum is divided by N instead of by the batch's own number: the gradient of several
    micro-batches or processes is then that of the mean over all of their tokens, times a constant factor.

    `forward(**batch)` returns what transformers returns, so that `hamu_lightning.objectives` understand the batches of
    `QAData`: `input_ids`, `attention_mask`, and `labels` that are copies of the inputs, -100 for the prompt.

    Args:
        model: A model, a `PeftModel`, or a local folder for `AutoModelForCausalLM`. Nothing is downloaded. It is put
            into training mode, in which models from a folder are not, and its cache of keys is switched off.
        lr: Learning rate of AdamW, which gets the trainable parameters alone.
        weight_decay: Decoupled weight decay of AdamW, per step and unit of `lr`.
        lora: A `peft.LoraConfig`, or another configuration of PEFT, to add adapters; the other weights are frozen.
        gradient_checkpointing: Compute activations twice instead of keeping them.
        adapters_only: Let checkpoints hold the trainable parameters alone; loading fills the others from the module.
        tokens_per_batch: See above; a number such as the mean number of answer tokens in a batch.
        dtype: In which a folder's weights are loaded; default: as they are stored.

    Raises:
        HAMUValueError: If an argument is of another kind, or no parameter is to be trained.
        MissingTextExtraError: If transformers, or PEFT with `lora`, is not installed.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> module = CausalLMModule(LlamaForCausalLM(config), lr=1e-3)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> module(input_ids=ids).logits.shape
        torch.Size([1, 3, 9])
    """

    def __init__(
        self,
        model: Any,
        *,
        lr: float = 1e-5,
        weight_decay: float = 0.0,
        lora: Any = None,
        gradient_checkpointing: bool = False,
        adapters_only: bool = False,
        tokens_per_batch: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.lr = check_positive("lr", lr)
        self.weight_decay = check_number("weight_decay", weight_decay, least=0)
        self.tokens_per_batch = check_optional(check_positive, "tokens_per_batch", tokens_per_batch)
        self.adapters_only = check_flag("adapters_only", adapters_only)
        self.save_hyperparameters(ignore=["model", "lora"])
        self.model = _add_adapters(_load(model, dtype), lora).train()
        if self.adapters_only and not _has_adapters(self.model):
            raise HAMUValueError(
                "Expected a model with adapters for `adapters_only`, but it has none. Give `lora=LoraConfig(...)`."
            )
        # A cache is of no use in training, and takes memory; generation switches it on for itself.
        self.model.config.use_cache = False
        if check_flag("gradient_checkpointing", gradient_checkpointing):
            _checkpoint_activations(self.model)
        self._trainable_parameters()

    @override
    def forward(self, **batch: Any) -> Any:
        """Return what the model of transformers returns: `.logits` `[N, T, V]`, and `.loss` if there are labels."""
        return self.model(**{name: value for name, value in batch.items() if name != CORE})

    @override
    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int = 0) -> Tensor:
        """Return the loss of a batch over its answer tokens, 0-d."""
        loss = self._loss(batch)
        if self.tokens_per_batch is not None:
            loss = loss * count_targets(batch["labels"]) / self.tokens_per_batch
        self.log("train/loss", loss, batch_size=len(batch["labels"]))
        return loss

    @override
    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int = 0) -> Tensor:
        """Log `val/loss`, the mean over all answer tokens of the held-out data, nats."""
        loss = self._loss(batch)
        # Lightning weighs by it: the mean over all tokens.
        self.log("val/loss", loss, batch_size=int(count_targets(batch["labels"])), sync_dist=True)
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over the trainable parameters."""
        return torch.optim.AdamW(self._trainable_parameters().values(), lr=self.lr, weight_decay=self.weight_decay)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With `adapters_only` leave the frozen parameters out."""
        if self.adapters_only:
            names = self._trainable_parameters()
            checkpoint["state_dict"] = {n: v for n, v in checkpoint["state_dict"].items() if n in names}
            checkpoint[_MARK] = True

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fill what a checkpoint of adapters leaves out with the module's own weights.

        Raises:
            HAMUStateError: If the checkpoint's adapters are others than the module's.
        """
        if not checkpoint.get(_MARK):
            return
        saved, expected = set(checkpoint["state_dict"]), set(self._trainable_parameters())
        if saved != expected:
            raise HAMUStateError(
                f"Expected a checkpoint of the {len(expected)} trainable parameters of this module, but got "
                f"{len(saved)}, {len(saved & expected)} of them the same. Make the module with the same `lora`."
            )
        checkpoint["state_dict"] = {**self.state_dict(), **checkpoint["state_dict"]}

    def _loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return cast(Tensor, self(**batch).loss)

    def _trainable_parameters(self) -> dict[str, nn.Parameter]:
        found = {name: weight for name, weight in self.named_parameters() if weight.requires_grad}
        if not found:
            raise HAMUValueError(
                "Expected a model with parameters to train, but all are frozen. Load adapters with `is_trainable=True`."
            )
        return found


def count_targets(labels: Tensor) -> Tensor:
    """How many tokens of a batch of labels `[N, T]` a causal model is asked for: the first one has nothing before it.

    Example:
        >>> count_targets(torch.tensor([[5, 6, 7], [-100, 6, -100]]))
        tensor(3)
    """
    return (labels[:, 1:] != _IGNORED).sum()


def _load(model: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(model, nn.Module):
        return model
    check_installed("transformers", "a model from a folder")
    if not isinstance(model, str | PathLike) or not Path(model).is_dir():
        raise HAMUValueError(
            f"Expected `model` to be a model of transformers or a local folder with one, but got {describe(model)}. "
            "Nothing is downloaded: fetch the model beforehand, and give its folder."
        )
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, local_files_only=True, dtype=dtype or "auto")


def _checkpoint_activations(model: Any) -> None:
    # transformers 5 has the new name; PEFT passes both on. Reentrant checkpoints lose frozen inputs' gradients.
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _has_adapters(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def _add_adapters(model: Any, lora: Any) -> Any:
    if not callable(getattr(model, "generate", None)) or not hasattr(model, "config"):
        raise HAMUValueError(
            f"Expected `model` to be a causal language model of transformers, but got {describe(model)}. "
            "Load one with AutoModelForCausalLM."
        )
    if lora is None:
        return model
    check_installed("peft", "`lora`")
    if _has_adapters(model):
        raise HAMUValueError("Expected a model without adapters for `lora`, but it has some. Leave out one of the two.")
    from peft import PeftConfig, get_peft_model

    if not isinstance(lora, PeftConfig):
        raise HAMUValueError(f"Expected `lora` to be a configuration of PEFT, but got {describe(lora)}.")
    return get_peft_model(model, lora)
