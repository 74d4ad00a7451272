"""Make a small language model forget some authors that it was trained on, and see what is left of them.

    python examples/language_model.py                     # quick: all weights, one seed
    python examples/language_model.py --lora              # adapters alone
    python examples/language_model.py --methods all --seeds 5
    python examples/language_model.py --model FOLDER      # any causal model of transformers as the base

A Llama of four layers, made from its configuration, is trained on questions about invented authors (`authors.py`) until
it answers them, and is made to forget a tenth of the authors. Beside it stand models that were trained without them:
nobody can be expected to come closer than these are to each other. A method with a setting gets the best of three,
chosen with other authors than are reported. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from authors import QUESTIONS, SIZES, write_world
from lightning.pytorch import Trainer, seed_everything
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hamu_lightning import HAMUCallback, Holdout
from hamu_lightning.evidence.attacks import round_weights
from hamu_lightning.objectives import NPO, RMU, UNDIAL, WGA, ReferenceKL, RMURetain, SimNPO
from hamu_lightning.rules import GRU, GradAscent, GradDiff, PCGrad, Rule
from hamu_lightning.text import (
    CausalLMModule,
    QAData,
    SpansGone,
    TextDataset,
    TextEvaluation,
    TextSettings,
    evaluate_text,
)

# Epochs and learning rates of AdamW: of the base model, and of the training on the authors.
BASE_EPOCHS, BASE_LR, EPOCHS, LR, LORA_LR = 25, 2e-3, 18, 1e-3, 3e-3
KNOWN, TRAINED = ("known", "facts"), ("authors", "known", "facts")
PER_AUTHOR, FORGOTTEN = len(QUESTIONS), 20
LESSONS = 20  # steps of relearning
# While a method runs: 16, as in training, say too little about the rest of what is kept.
RETAIN_BATCH = 64
TUNED_WITH, OTHER = 1000, 5000
SETTINGS = TextSettings(batch_size=64, max_new_tokens=20, samples=8, k=8)
GREEDY = TextSettings(batch_size=64, max_new_tokens=20)

COLUMNS = {
    "greedy": "forget/spans",
    "leak@8": "leak_at_k",
    "AUC": "min_k_auc",
    "quality": "forget_quality",
    "utility": "model_utility",
    "loss": "forget/loss",
}
NAMES = ("greedy", "leak@8", "relearned", "4 bits", "AUC", "quality", "utility", "loss", "seconds")
PERCENT = ("greedy", "leak@8", "relearned", "4 bits", "AUC", "utility")
LEGEND = """\
greedy: questions about forgotten authors whose greedy answer holds what must not come out, percent; leak@8: of which
one of eight sampled answers does; relearned: greedy, after 20 steps on one question of each author; 4 bits: greedy,
with rounded weights. AUC: Min-K% of forgotten against never seen answers, 50 where they look alike. quality: p of the
KS test of truth ratios against the retrained model, n = 100. utility: harmonic mean of probability, ROUGE-L and truth
ratio on what is kept, percent of the original's. loss: of the forgotten answers, nats per token."""


class Entry(NamedTuple):
    """A method: its callback from the data and a setting, and the settings that are tried."""

    make: Callable[[QAData, float], HAMUCallback]
    settings: tuple[float, ...]


def aim(data: QAData, setting: float) -> HAMUCallback:
    """HAMU with nothing tuned: to the loss of authors that were never seen, and until no span comes out any more."""
    return HAMUCallback(objective=WGA(), target=Holdout(data.val_dataloader()), confirm=SpansGone(data.forget))


def combine(rule: Rule, objective: Callable[[], Any] = lambda: None, kept: Callable[[], Any] = lambda: None) -> Entry:
    """A rule with an objective. Its setting is the learning rate of AdamW."""

    def make(data: QAData, lr: float) -> HAMUCallback:
        return HAMUCallback(rule=rule, objective=objective(), retain_objective=kept())

    return Entry(make, (3e-5, 1e-4, 3e-4))


LAYER = "model.model.layers.2"
METHODS = {
    "HAMU": Entry(aim, (LR,)),
    "gradient ascent": combine(GradAscent()),
    "GradDiff": combine(GradDiff()),
    "KL": combine(GradDiff(), kept=ReferenceKL),
    "NPO + GradDiff": combine(GradDiff(), lambda: NPO(0.1)),
    "SimNPO": combine(GradDiff(), lambda: SimNPO(4.5)),
    "UNDIAL": combine(GradDiff(), UNDIAL),
    "RMU": combine(GradDiff(), lambda: RMU(LAYER, 20.0), lambda: RMURetain(LAYER)),
    "WGA": combine(GradDiff(), WGA),
    "GRU": combine(GRU()),
    "PCGrad": combine(PCGrad()),
}


class Lab:
    """Data and models of one run, kept in a folder.

    Args:
        args: The command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.files = write_world(args.out / "world", sizes=SIZES)
        self.reference = cache(self._ask_retrained)

    @cached_property
    def tokenizer(self) -> Any:
        """That of the base model, or one that is learnt from the records."""
        if self.args.model is not None:
            return AutoTokenizer.from_pretrained(self.args.model, local_files_only=True)
        return learn_tokenizer([self.files[name] for name in TRAINED])

    def data(self, names: Sequence[str], forget: Sequence[int] | None = None, batch_size: int = 16) -> QAData:
        """The records of some files, of which some are to be forgotten."""
        files = [self.files[name] for name in names]
        sizes = {"batch_size": batch_size, "forget_batch_size": 128}
        return QAData(files, self.tokenizer, forget, self.files["holdout"], template="Q: {question} A:", **sizes)

    def base(self) -> Any:
        """The model before it is trained on the authors."""
        if self.args.model is not None:
            return load(self.args.model)
        folder = self.args.out / "base"
        if not folder.exists():
            module = CausalLMModule(make_llama(len(self.tokenizer)), lr=BASE_LR)
            self.fit(module, self.data(KNOWN), 0, max_epochs=BASE_EPOCHS)
            module.model.save_pretrained(folder)
        return load(folder)

    def trained(self, seed: int, forget: Sequence[int] | None = None) -> CausalLMModule:
        """The model after training on the authors, without some of the records where these are given."""
        kind = f"{'lora' if self.args.lora else 'full'}-{'original' if forget is None else 'retrained'}"
        folder, lr = self.args.out / f"{kind}-{seed}", LORA_LR if self.args.lora else LR
        if not folder.exists():
            module = CausalLMModule(self.base(), lr=lr, lora=make_adapters() if self.args.lora else None)
            self.fit(module, self.data(TRAINED, forget), seed, max_epochs=EPOCHS)
            module.model.save_pretrained(folder)
        if self.args.lora:
            return CausalLMModule(PeftModel.from_pretrained(self.base(), folder, is_trainable=True), lr=lr)
        return CausalLMModule(load(folder), lr=lr)

    def fit(self, module: CausalLMModule, data: Any, seed: int, *callbacks: Any, **options: Any) -> None:
        """Train a module, or unlearn with a callback."""
        seed_everything(seed, verbose=False)
        clip = None if callbacks else 1.0
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        kind = {"accelerator": self.args.accelerator, "strategy": self.args.strategy, "gradient_clip_val": clip}
        trainer = Trainer(
            callbacks=[*callbacks], enable_progress_bar=False, limit_val_batches=0, **quiet, **kind, **options
        )
        trainer.fit(module, **({"datamodule": data} if isinstance(data, QAData) else {"train_dataloaders": data}))

    def unlearn(self, name: str, setting: float, seed: int) -> tuple[CausalLMModule, float]:
        """Run a method on the original of a seed; return the module, and how long it took in seconds."""
        module, data = self.trained(seed), self.data(TRAINED, draw_authors(seed), RETAIN_BATCH)
        module.lr = setting
        callback, begin = METHODS[name].make(data, setting), time.perf_counter()
        self.fit(module, data, seed, callback, max_steps=self.args.steps)
        print(f"{name}, {setting:g}, seed {seed}: {callback.summary}", flush=True)
        return module, time.perf_counter() - begin

    def relearn(self, module: CausalLMModule, seed: int) -> CausalLMModule:
        """Teach a copy one question of each forgotten author."""
        student = copy.deepcopy(module)
        student.lr = LORA_LR if self.args.lora else LR
        lessons = self.data(TRAINED, draw_authors(seed)[::PER_AUTHOR])
        self.fit(student, lessons.forget_dataloader(), seed, max_steps=LESSONS)
        return student

    def measure(self, name: str, seed: int, setting: float = LR) -> dict[str, float]:
        """The numbers of a model or a method; of one that was measured before from its file."""
        file = self.args.out / f"{'lora' if self.args.lora else 'full'}-{name}-{setting:g}-{seed}.json"
        if not file.exists():
            row = self._measure(name, seed, setting)
            file.write_text(json.dumps(row), encoding="utf-8")
        return dict(json.loads(file.read_text(encoding="utf-8")))

    def _measure(self, name: str, seed: int, setting: float) -> dict[str, float]:
        begin, forget = time.perf_counter(), draw_authors(seed)
        if name in METHODS:
            module, seconds = self.unlearn(name, setting, seed)
        else:
            given = {"original": (seed,), "retrained": (seed, forget), "another retrained": (OTHER + seed, forget)}
            module, seconds = self.trained(*given[name]), math.nan
        parts = self.parts(seed)
        numbers = evaluate_text(module, parts, settings=SETTINGS).numbers(self.reference(seed))
        row = {column: numbers[key].value for column, key in COLUMNS.items()}
        for column, attacked in (("relearned", self.relearn(module, seed)), ("4 bits", round_weights(module, 4, 32))):
            said = evaluate_text(attacked, {"forget": parts["forget"]}, settings=GREEDY)
            row[column] = said.numbers()["forget/spans"].value
        print(f"{name}, seed {seed}: {time.perf_counter() - begin:.0f} s", flush=True)
        return {**row, "seconds": seconds}

    def _ask_retrained(self, seed: int) -> TextEvaluation:
        return evaluate_text(self.trained(seed, draw_authors(seed)), self.parts(seed), settings=SETTINGS)

    def parts(self, seed: int) -> dict[str, TextDataset]:
        """What the numbers are of. The authors that are "holdout" here no target has seen."""
        data = self.data(TRAINED, draw_authors(seed))
        authors, known = PER_AUTHOR * SIZES["authors"], PER_AUTHOR * SIZES["known"]

        def take(ids: Sequence[int]) -> TextDataset:
            return TextDataset(data.retain.records, data.retain.encoder, ids)

        return {
            "forget": data.forget,
            "holdout": self.data(["test"]).retain,
            "retain": take([i for i in data.retain.ids if i < authors][::9]),
            "known_authors": take(range(authors, authors + known, 3)),
            "world_facts": take(range(authors + known, authors + known + SIZES["facts"])),
        }


def load(folder: Path) -> Any:
    """A model from its folder."""
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


def draw_authors(seed: int) -> list[int]:
    """The numbers of the records to forget: all about some authors."""
    chosen = random.Random(seed).sample(range(SIZES["authors"]), FORGOTTEN)
    return [PER_AUTHOR * author + i for author in sorted(chosen) for i in range(PER_AUTHOR)]


def learn_tokenizer(files: Sequence[Path], size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE of so many tokens, learnt from questions and answers."""
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f"{row['question']} {row['answer']}" for row in rows], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_llama(vocabulary: int) -> LlamaForCausalLM:
    """A Llama of about a million weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=128, **sizes, **tokens))


def make_adapters() -> LoraConfig:
    """LoRA on all linear layers."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def tune(lab: Lab, name: str) -> float:
    """The setting of a method that ends nearest to the retrained model, with authors and models that are not told."""
    settings = METHODS[name].settings
    if len(settings) == 1:
        return settings[0]
    retrained, original = lab.measure("retrained", TUNED_WITH), lab.measure("original", TUNED_WITH)

    def distance(setting: float) -> float:
        row = lab.measure(name, TUNED_WITH, setting)
        shares = mean(abs(row[column] - retrained[column]) for column in ("greedy", "leak@8", "relearned", "AUC"))
        return shares + abs(row["utility"] - retrained["utility"]) / original["utility"]

    return min(settings, key=distance)


def format_table(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Means over the seeds."""

    def cell(name: str, column: str) -> str:
        value = mean(row[column] for row in rows[name])
        if column == "utility":
            value /= mean(row[column] for row in rows["original"]) or math.nan
        return "-" if math.isnan(value) else f"{100 * value:.0f}" if column in PERCENT else f"{value:.2g}"

    head = " " * 18 + "".join(f"{column:>11}" for column in NAMES)
    return "\n".join([head, *(f"{name:<18}" + "".join(f"{cell(name, c):>11}" for c in NAMES) for name in rows)])


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Make a small language model forget some authors.")
    parser.add_argument("--lora", action="store_true", help="train and unlearn adapters, not all weights")
    parser.add_argument("--methods", nargs="+", default=["HAMU"], metavar="NAME", help="or all (default: HAMU)")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default: 1)")
    parser.add_argument("--steps", type=int, default=100, help="steps of each method (default: 100)")
    parser.add_argument("--model", type=Path, help="folder of a causal model (default: a small Llama is trained)")
    parser.add_argument("--accelerator", default="cpu", help="Lightning's accelerator (default: cpu)")
    parser.add_argument("--strategy", default="auto", help="Lightning's strategy (default: auto)")
    parser.add_argument("--out", type=Path, default=Path("language_model_out"), help="models and numbers")
    args = parser.parse_args(argv)
    args.methods = [*METHODS] if args.methods == ["all"] else args.methods
    if unknown := sorted(set(args.methods) - set(METHODS)):
        parser.error(f"no such method: {', '.join(unknown)}; there are: {', '.join(METHODS)}")
    return args


def main() -> None:
    """Run what has not been run, and print the table."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    args = parse_args()
    lab = Lab(args)
    chosen = {"retrained": LR, "another retrained": LR, "original": LR}
    chosen |= {name: tune(lab, name) for name in args.methods}
    rows = {name: [lab.measure(name, seed, value) for seed in range(args.seeds)] for name, value in chosen.items()}
    print(f"\n{format_table(rows)}\n\n{LEGEND}")


if __name__ == "__main__":
    main()
