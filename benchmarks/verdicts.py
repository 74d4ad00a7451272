"""Whether the verdict tells models apart: originals, unlearned and retrained ones, and fakes; many seeds.

    python benchmarks/verdicts.py mnist1d class --seeds 20
    python benchmarks/verdicts.py digits labels --seeds 3 --show

`small_sets.py` has the sets. "class" forgets a class (another one for each seed), "labels" a tenth of the training
samples, whose labels are wrong, "random" a tenth that is right. Prints how often each model gets each verdict.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).parent))

from lightning.pytorch import LightningModule, Trainer
from quickstart import prepare
from small_sets import FORGETS, SETS, Case, SmallSet, load_all
from torch.nn import functional as F
from torch.optim import SGD

from hamu_lightning import HAMUCallback, SecondChoice, Unseen
from hamu_lightning.evidence import Verdict, compare_weights, evaluate, judge

RETRAINED, ENORMOUS, KEPT = 4, 5, 256
REFERENCES = 3


def unlearn(original: LightningModule, sets: SmallSet, case: Case, forget: str, seed: int) -> LightningModule:
    """Return the original after unlearning, with nothing tuned."""
    module = copy.deepcopy(original).train()
    like = "holdout" if sets.augments else None
    target = SecondChoice() if forget == "labels" else Unseen(case.parts["holdout"], transform_like=like)
    callback = HAMUCallback(forget=case.forget, target=target, seed=seed)
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", max_epochs=-1, max_steps=100, callbacks=[callback], enable_progress_bar=False, **options
    )
    trainer.fit(module, sets.loader(case.retain, seed))
    return module


def shift_output(original: LightningModule, case: Case) -> LightningModule:
    """Fake: the logit of the forgotten class is lowered for all samples."""
    module = copy.deepcopy(original)
    module.net[-1].bias.data[case.gone] -= 50  # type: ignore[index,union-attr]
    return module


def renew_head(original: LightningModule, sets: SmallSet, case: Case, seed: int) -> LightningModule:
    """Fake: the last layer is trained anew on the data to keep, on features that keep everything."""
    module = copy.deepcopy(original)
    head = module.net[-1]  # type: ignore[index]
    head.reset_parameters()
    return sets.train(module, case.retain, 10, seed, head)


def raise_mean(original: LightningModule, case: Case) -> LightningModule:
    """Fake: five samples get an enormous loss, which the mean shows, and the others are learned still better."""
    module = copy.deepcopy(original).eval()
    (x, y), keep = load_all(case.parts["forget"]), load_all(case.parts["retain"], KEPT)
    optimizer = SGD(module.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        worse = F.cross_entropy(module(x[:ENORMOUS]), y[:ENORMOUS]).clamp(max=60)
        better = F.cross_entropy(module(x[ENORMOUS:]), y[ENORMOUS:])
        (F.cross_entropy(module(keep[0]), keep[1]) + 0.2 * better - 0.05 * worse).backward()
        optimizer.step()
    return module


def judge_all(name: str, forget: str, seed: int) -> Iterator[tuple[str, Verdict]]:
    """Train all models of one seed, and return the verdict on each."""
    sets = SETS[name]
    case, epochs = sets.case(forget, seed), sets.epochs[forget == "labels"]
    original = sets.train(sets.make(seed), case.train, epochs, seed)
    seeds = [seed + 1000 * (k + 1) for k in range(RETRAINED)]
    retrained = [sets.train(sets.make(s), case.retain, epochs, s) for s in seeds]
    models = {"original": original, "HAMU": unlearn(original, sets, case, forget, seed)}
    models |= {"retrained": retrained[0], "another retrained": retrained[1], "five samples": raise_mean(original, case)}
    if case.gone:
        models |= {"shifted logit": shift_output(original, case), "new head": renew_head(original, sets, case, seed)}
    before = evaluate(original, case.parts)
    references = [(module, evaluate(module, case.parts)) for module in retrained]
    for title, module in models.items():
        others = [scores for other, scores in references if other is not module][-REFERENCES:]
        yield title, judge(before, evaluate(module, case.parts), others, [compare_weights(original, module)])


def main() -> None:
    """Print how often each model gets each verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=[*SETS])
    parser.add_argument("forget", choices=FORGETS)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--show", action="store_true", help="print each verdict with its reasons")
    args = parser.parse_args()
    prepare()
    warnings.simplefilter("ignore")
    counts: dict[str, Counter[str]] = {}
    for seed in range(args.first, args.first + args.seeds):
        for name, verdict in judge_all(args.set, args.forget, seed):
            counts.setdefault(name, Counter())[verdict.kind] += 1
            if args.show:
                print(f"{seed} {name}: {verdict.kind}\n  " + "\n  ".join(verdict.reasons), file=sys.stderr, flush=True)
    print(f"{args.set}, {args.forget}, {args.seeds} seeds\n| model | verdicts |\n| --- | --- |")
    for name, found in counts.items():
        print(f"| {name} | {', '.join(f'{kind} {count}' for kind, count in found.most_common())} |")


if __name__ == "__main__":
    main()
