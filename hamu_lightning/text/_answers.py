"""Answers that a model writes: drawn from it, and what is said of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.text._encoding import Encoder, PadCollator
from hamu_lightning.text._extra import check_installed
from hamu_lightning.text._layouts import QARecord
from hamu_lightning.text._spans import find_spans


def contains_spans(answer: str, spans: Sequence[str]) -> bool:
    r"""Whether one of the given spans stands in an answer: as whole words, whatever the case and the white space.

    Args:
        answer: What the model wrote.
        spans: What must not come out, such as a name or a year.

    Returns:
        True if any of them does.

    Example:
        >>> contains_spans("She was born in  New\nYork.", ["new york"]), contains_spans("in 1970", ["70"])
        (True, False)
    """
    return bool(find_spans(answer, spans))


def is_gibberish(answer: str) -> bool:
    """Whether an answer says nothing: it has no word, or fewer than half of its pairs of neighbouring words differ.

    This finds empty answers and loops, and no nonsense that reads well. A word is a run of letters and digits.

    Args:
        answer: What the model wrote.

    Returns:
        True if it does.

    Example:
        >>> is_gibberish("the of the of the of the of"), is_gibberish("!?"), is_gibberish("She won the prize.")
        (True, True, False)
    """
    words = re.findall(r"\w+", answer.lower())
    pairs = list(zip(words, words[1:], strict=False))
    return not words or 2 * len(set(pairs)) < len(pairs)


def rouge_l_recall(answer: str, right: str) -> float:
    """ROUGE-L recall of an answer, stemmed, by torchmetrics (Lin 2004).

        longest common subsequence of words / number of words of the right answer

    Args:
        answer: What the model wrote.
        right: What it should have written.

    Returns:
        A number in [0, 1].

    Example:
        >>> rouge_l_recall("It was the year 1970.", "In the year 1970")
        0.75
    """
    check_installed("nltk", "ROUGE")
    from torchmetrics.functional.text.rouge import rouge_score

    return float(rouge_score(answer, right, use_stemmer=True, rouge_keys="rougeL")["rougeL_recall"])


def find_generator(module: nn.Module) -> Any:
    """Return what generates: the module itself, or the first of its parts with `generate`.

    Raises:
        HAMUValueError: If there is none.
    """
    found = next((part for part in module.modules() if callable(getattr(part, "generate", None))), None)
    if found is None:
        raise HAMUValueError(
            f"Expected {type(module).__name__} to have a `generate`, as models of transformers have it, but neither it "
            "nor a part of it does. Set TextSettings(max_new_tokens=0) to evaluate without answers."
        )
    return found


def write_answers(
    module: nn.Module,
    encoder: Encoder,
    records: Sequence[QARecord],
    max_new_tokens: int,
    samples: int = 0,
) -> list[list[str]]:
    """Let a model answer questions: greedily, or by samples from its own distribution (temperature 1, nothing cut).

    Args:
        module: A module with a model of transformers, on its device.
        encoder: How prompts are made.
        records: Their questions are asked.
        max_new_tokens: An answer ends there, or at an end-of-text token.
        samples: How many answers are drawn; 0: the greedy one.

    Returns:
        For each record its answers.
    """
    from transformers import GenerationConfig

    generator = find_generator(module)
    prompts = [encoder.prompt(record) for record in records]
    batch = PadCollator(encoder.pad_id, left=True)([{"input_ids": ids, "labels": ids} for ids in prompts])
    device = next(module.parameters()).device
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if samples else {"do_sample": False}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_return_sequences=samples or 1,
        pad_token_id=encoder.pad_id,
        eos_token_id=_ends(generator, encoder.tokenizer),
        use_cache=True,
        **drawn,
    )
    written = generator.generate(
        input_ids=batch["input_ids"].to(device),
        attention_mask=batch["attention_mask"].to(device),
        generation_config=config,
    )
    rows = written[:, batch["input_ids"].shape[1] :].cpu()
    texts = [_decode(encoder.tokenizer, row) for row in rows]
    each = samples or 1
    return [texts[i : i + each] for i in range(0, len(texts), each)]


def _ends(generator: Any, tokenizer: Any) -> list[int] | None:
    """All tokens that end an answer: chat models have others than the tokenizer's."""
    own = getattr(getattr(generator, "generation_config", None), "eos_token_id", None)
    ends = own if isinstance(own, list) else [own]
    found = sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})
    return found or None


def _decode(tokenizer: Any, row: torch.Tensor) -> str:
    return str(tokenizer.decode(row.tolist(), skip_special_tokens=True)).strip()
