"""Small models of the kinds that objectives meet, in float64, and batches for them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

CLASSES, VOCABULARY = 5, 7


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class LanguageModel(nn.Module):
    """Causal, with the interface of Hugging Face's models."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.head = nn.Linear(6, VOCABULARY)
        self.config = SimpleNamespace(is_encoder_decoder=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        embedded = self.embedding(input_ids)
        if attention_mask is not None:
            embedded = embedded * attention_mask.unsqueeze(-1)
        return SimpleNamespace(logits=self.head(self.body(embedded.cumsum(1))), saw_labels=labels is not None)


class Adapted(nn.Module):
    """A model with an adapter that can be switched off, as PEFT's models are."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapter = nn.Parameter(torch.zeros(CLASSES))
        self.dropout = nn.Dropout(0.5)
        self.is_on = True

    def forward(self, x: Tensor) -> Tensor:
        logits = self.base(self.dropout(x))
        return logits + self.adapter if self.is_on else logits

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.is_on = False
        try:
            yield
        finally:
            self.is_on = True


def make_model(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return {"classes": Classifier, "tokens": LanguageModel}[kind]().double()


def perturbed(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """A model of the same kind that is not the same."""
    other = copy.deepcopy(model)
    for weight in other.parameters():
        weight.data += scale * torch.randn_like(weight)
    return other


def make_batch(kind: str) -> Any:
    """Four samples; of tokens: questions that are masked, padding on the right, and one sample without a label."""
    generator = torch.Generator().manual_seed(3)
    if kind == "classes":
        x = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        return x, torch.tensor([0, 4, 2, 0])
    ids = torch.randint(1, VOCABULARY, (4, 6), generator=generator)
    attention, labels = torch.ones_like(ids), ids.clone()
    labels[:, :2] = -100
    ids[1, 4:], attention[1, 4:], labels[1, 4:] = 0, 0, -100
    labels[3] = -100
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def grads(value: Tensor, model: nn.Module) -> list[Tensor]:
    weights = list(model.parameters())
    found = torch.autograd.grad(value, weights, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
