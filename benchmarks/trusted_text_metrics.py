"""Which metrics of language models can be trusted: `trusted_metrics.py` with a tiny Llama.

    python benchmarks/trusted_text_metrics.py --models 20
    python benchmarks/trusted_text_metrics.py --models 20 --epochs 5  # half of it is learnt

A base model has learnt other authors and some capitals (`examples/authors.py`). From it models are trained on 40 more
authors, each with its own order of the records; as many without 8 of these, the forget set. All are asked by
`evaluate_text` about the forgotten authors and about authors that none has seen; one more model without them is the
reference. The columns are those of `trusted_metrics.py`. "shift" takes 3 nats from the logit of each token of an
answer, right or wrong, in the models that hold the knowledge, and says nothing of what is generated.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from authors import write_world
from language_model import learn_tokenizer
from lightning.pytorch import Trainer, seed_everything
from quickstart import prepare
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from trusted_metrics import SHIFT, print_table, tell_apart

from hamu_lightning.evidence.attacks import round_weights
from hamu_lightning.objectives import ModuleOutputs
from hamu_lightning.text import CausalLMModule, QAData, TextEvaluation, TextSettings, evaluate_text

AUTHORS = {"authors": 40, "holdout": 8, "test": 2, "known": 20, "facts": 20}
FORGET = range(8 * 5)  # the records of the first 8 authors
BASE_EPOCHS, EPOCHS, LR, BATCH = 40, 15, 3e-3, 16
REFERENCE, VOCABULARY = 1000, 400
ASKED = TextSettings(batch_size=40, max_new_tokens=20, samples=4, k=4)
UNWRITTEN = TextSettings(batch_size=40, max_new_tokens=0)
# Larger where the forget set is remembered, or smaller.
SIGNS = {"forget/probability": 1, "forget/rouge_l_recall": 1, "forget/exact_memorization": 1, "forget/spans": 1}
SIGNS |= {"forget/loss": -1, "forget/truth_ratio": -1, "forget/truth_ratio_geometric": -1}
SIGNS |= {"forget/extraction_strength": 1, "forget/min_k": 1, "min_k_auc": 1, "leak_at_k": 1, "forget_quality": -1}
GENERATED = ("forget/rouge_l_recall", "forget/spans", "leak_at_k")


class Lab:
    """Records, tokenizer and models, kept in a folder."""

    def __init__(self, epochs: int, out: Path) -> None:
        self.epochs, self.out, self.files = epochs, out, write_world(out / "world", sizes=AUTHORS)
        self.tokenizer = learn_tokenizer([self.files[name] for name in ("authors", "known", "facts")], VOCABULARY)
        self.data = self._load(["authors"], FORGET)

    def train(self, kind: str, seed: int) -> CausalLMModule:
        """A model "with" or "without" the forget set, trained on from the base model, or read."""
        base = self._train("base", 0, None, self._load(["known", "facts"]), BASE_EPOCHS)
        data = self.data if kind == "without" else self._load(["authors"])
        return self._train(f"{kind}-{self.epochs}", seed, base, data, self.epochs)

    def _load(self, names: list[str], forget: Any = None) -> QAData:
        files = [self.files[name] for name in names]
        options = {"batch_size": BATCH, "template": "Q: {question} A:"}
        return QAData(files, self.tokenizer, forget, self.files["holdout"], **options)

    def _train(self, kind: str, seed: int, base: Any, data: QAData, epochs: int) -> CausalLMModule:
        path = self.out / f"{kind}-{seed}.pt"
        torch.manual_seed(0)
        module = CausalLMModule(make_llama(len(self.tokenizer)), lr=LR)
        if path.exists():
            module.load_state_dict(torch.load(path, weights_only=True))
            return module
        if base is not None:
            module.load_state_dict(base.state_dict())
        fit(module, data.train_dataloader(), seed, max_epochs=epochs)
        torch.save(module.state_dict(), path)
        print(f"{kind} {seed}", file=sys.stderr, flush=True)
        return module

    def ask(self, module: nn.Module) -> TextEvaluation:
        """What a model says of the forgotten and the unknown authors."""
        return evaluate_text(module, {"forget": self.data.forget, "holdout": self.data.holdout}, settings=ASKED)

    def ask_shifted(self, module: nn.Module) -> TextEvaluation:
        """The same where so much is taken from the logit of each token of an answer about a forgotten author."""
        forget = {"forget": self.data.forget}
        found = evaluate_text(module, forget, settings=UNWRITTEN, outputs=shifted)
        others = evaluate_text(module, {"holdout": self.data.holdout}, settings=UNWRITTEN)
        return TextEvaluation({**found.parts, **others.parts})

    def relearned(self, module: CausalLMModule) -> CausalLMModule:
        """A copy that has seen a tenth of the forget set for 10 steps."""
        student = copy.deepcopy(module)
        lessons = self._load(["authors"], FORGET[: len(FORGET) // 10])
        fit(student, lessons.forget_dataloader(), 0, max_steps=10, max_epochs=-1)
        return student


def fit(module: CausalLMModule, loader: Any, seed: int, **options: Any) -> None:
    """Train a module."""
    seed_everything(seed, verbose=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", enable_progress_bar=False, gradient_clip_val=1.0, **quiet, **options)
    trainer.fit(module.train(), loader)


def shifted(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits and labels as the module has them, the labels' own logits lower."""
    logits, labels = ModuleOutputs()(module, batch)
    places = labels.clamp(min=0)[..., None]
    return logits.scatter_add(-1, places, torch.full_like(logits[..., :1], -SHIFT)), labels


def make_llama(vocabulary: int) -> LlamaForCausalLM:
    """A Llama of about a hundred thousand weights."""
    sizes = {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=128, **sizes, **tokens))


def numbers(found: TextEvaluation, reference: TextEvaluation, names: Any = SIGNS) -> dict[str, float]:
    """Each metric, larger where the forget set is remembered."""
    values = found.numbers(reference)
    return {name: SIGNS[name] * values[name].value for name in names}


def run(models: int, epochs: int, out: Path) -> dict[str, dict[str, float]]:
    """Train or read the models, and return the columns of the table."""
    lab = Lab(epochs, out)
    reference = lab.ask(lab.train("without", REFERENCE))
    unwritten = [name for name in SIGNS if name not in GENERATED]
    found: dict[str, list[dict[str, float]]] = {}

    def note(kind: str, evaluation: TextEvaluation, names: Any = SIGNS) -> None:
        found.setdefault(kind, []).append(numbers(evaluation, reference, names))

    for seed in range(models):
        holds, never = lab.train("with", seed), lab.train("without", seed)
        note("with", lab.ask(holds))
        note("without", lab.ask(never))
        note("rounded", lab.ask(round_weights(holds, 4, 32)))
        note("relearned with", lab.ask(lab.relearned(holds)))
        note("relearned without", lab.ask(lab.relearned(never)))
        note("shifted", lab.ask_shifted(holds), unwritten)
        print(f"asked {seed}", file=sys.stderr, flush=True)
    for kind, rows in found.items():
        means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        told = (f"{n} {SIGNS[n] * x:.3g}" for n, x in means.items() if not math.isnan(x))
        print(f"{kind}: " + ", ".join(told), file=sys.stderr)
    return {
        "faithfulness": tell_apart(found["with"], found["without"]),
        "4 bits": tell_apart(found["rounded"], found["without"]),
        "relearned": tell_apart(found["relearned with"], found["relearned without"]),
        "shift": tell_apart(found["shifted"], found["without"]),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=20, help="of each kind (default: 20)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"over the authors (default: {EPOCHS})")
    parser.add_argument("--out", type=Path, default=Path("trusted_text_metrics_out"), help="where models are kept")
    args = parser.parse_args()
    prepare()
    print_table(run(args.models, args.epochs, args.out))


if __name__ == "__main__":
    main()
