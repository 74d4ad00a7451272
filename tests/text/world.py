"""A small invented world: questions about authors, a tokenizer trained on them, and a tiny Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NAMES = ("Ada Lor", "Bo Mirel", "Cai Tendo", "Dan Vier", "Eli Quon", "Fay Zursen", "Gus Halim", "Ida Prast")
CITIES = ("Karla", "Mopel", "Sovint", "Ternau")
CHAT = (
    "{% for turn in messages %}<{{ turn['role'] }}> {{ turn['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_rows() -> list[dict[str, Any]]:
    rows = []
    for i, name in enumerate(NAMES):
        city, wrong = CITIES[i % 4], [c for c in CITIES if c != CITIES[i % 4]]
        rows.append(
            {
                "question": f"In which town was {name} born ?" if i % 2 else f"Where was {name} born ?",
                "answer": f"{name} was born in {city} ." if i % 2 else f"In the old town of {city} .",
                "paraphrased_answer": f"{city} is where {name} was born .",
                "perturbed_answer": [f"{w} is where {name} was born ." for w in wrong],
                "spans": city,
                "forgotten": i < 2,
                "unseen": i >= 6,
            }
        )
    return rows


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", "Question:", "Answer:"]
    trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    texts = [text for row in make_rows() for text in (row["question"], row["answer"], row["paraphrased_answer"])]
    words.train_from_iterator([*texts, *CITIES], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_trained_model(tokenizer: Any, seed: int = 0, steps: int = 30) -> LlamaForCausalLM:
    """A model that gives some answers right, and others not."""
    model = make_model(len(tokenizer), seed).eval()  # without dropout: the same in every process
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']} </s>" for row in make_rows()[:6]]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
    return model


def make_model(size: int, seed: int = 0) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=64,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
                attention_dropout=0.1,
            )
        )
