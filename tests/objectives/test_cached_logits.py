"""Stored logits: those of the reference, found again by the sample alone."""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.files import UNFINISHED
from hamu_lightning.objectives import (
    DPO,
    NPO,
    BatchPass,
    CachedLogits,
    FrozenCopy,
    ModuleOutputs,
    Reference,
    ReferenceKL,
    RMURetain,
)
from hamu_lightning.objectives._keys import sample_keys
from tests.objectives.models import VOCABULARY, LanguageModel, grads, make_batch, make_model
from tests.objectives.test_references import OUTPUTS, clone_by_pickle, move


def logits_of(reference: Reference, model: nn.Module, batch: Any) -> Tensor:
    """Those that predict a label, `[M, V]`."""
    prediction, logits = reference.predict(BatchPass(model, batch), OUTPUTS)
    return logits[prediction.mask]


@pytest.mark.parametrize("kind", ["classes", "tokens"])
def test_stored_logits_equal_live_ones(kind: str, tmp_path: Path) -> None:
    model, batch = make_model(kind), make_batch(kind)
    live = FrozenCopy()
    expected = logits_of(live, model, batch)
    cache = CachedLogits(tmp_path).fill(model, [batch])
    assert model.training
    move(model)
    for reference in (cache, clone_by_pickle(cache), copy.deepcopy(cache), CachedLogits(tmp_path)):
        assert torch.equal(logits_of(reference, model, batch), expected)
        for make in (lambda r: NPO(reference=r), ReferenceKL):
            value, other = make(reference)(BatchPass(model, batch)), make(live)(BatchPass(model, batch))
            assert torch.equal(value, other)
            for one, two in zip(grads(value, model), grads(other, model), strict=True):
                assert torch.equal(one, two)


def test_stored_logits_follow_the_samples_not_the_batches(tmp_path: Path) -> None:
    model, (x, y) = make_model("classes"), make_batch("classes")
    cache = CachedLogits(tmp_path).fill(model, [(x[:2], y[:2]), (x[2:], y[2:])])
    order = torch.tensor([3, 0, 2])
    # In other batches the rounding of the matrix products may differ.
    torch.testing.assert_close(logits_of(cache, model, (x[order], y[order])), model(x[order]), atol=1e-12, rtol=0)
    files = sorted(tmp_path.iterdir())
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    CachedLogits(tmp_path).fill(model, [(x[:2], y[:2])])
    assert not calls  # what is there is not computed again
    assert sorted(tmp_path.iterdir()) == files


def test_a_folder_is_one_models(tmp_path: Path) -> None:
    """Another model's logits are not taken for this one's, whoever has made the object."""
    model, batch = make_model("classes"), make_batch("classes")
    CachedLogits(tmp_path).fill(model, [batch])
    move(model)
    with pytest.raises(HAMUValueError, match=r"holds those of one with other weights. Give it a folder of its own, or"):
        CachedLogits(tmp_path).fill(model, [batch])
    CachedLogits(tmp_path).delete()
    assert not tmp_path.exists()
    CachedLogits(tmp_path).delete()  # nothing is there
    cache = CachedLogits(tmp_path).fill(model, [batch])
    assert torch.equal(logits_of(cache, model, batch), logits_of(FrozenCopy(), model, batch))


def test_what_is_not_ours_is_left_when_logits_are_deleted(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / f"x{UNFINISHED}").write_text("half")
    CachedLogits(tmp_path).fill(make_model("classes"), [make_batch("classes")]).delete()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_two_folders_do_not_know_the_same_numbers(tmp_path: Path) -> None:
    """What is known of one cache, or of the sample alone, cannot be looked up in another."""
    model, batch = make_model("classes"), make_batch("classes")
    known = set(sample_keys(batch).tolist())
    for name in ("a", "b"):
        CachedLogits(tmp_path / name).fill(model, [batch])
        (path,) = (tmp_path / name).glob("*.pt")
        keys = set(torch.load(path)["keys"].tolist())
        assert len(keys) == 4 and not keys & known
        known |= keys


class Touches:
    """Would leave a file behind if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_broken_and_foreign_files_are_named(tmp_path: Path) -> None:
    model, batch = make_model("classes"), make_batch("classes")
    CachedLogits(tmp_path / "a").fill(model, [batch])
    (path,) = (tmp_path / "a").glob("*.pt")
    whole, trap = path.read_bytes(), tmp_path / "trap"

    def nan() -> None:
        path.write_bytes(whole)
        stored = torch.load(path)
        torch.save({**stored, "logits": stored["logits"] * math.nan}, path)

    broken = {
        "cannot be read": [
            lambda: path.write_bytes(whole[: len(whole) // 2]),
            lambda: path.write_bytes(b""),
            lambda: torch.save({"keys": torch.zeros(1), "logits": Touches(trap)}, path),
        ],
        "it holds a list": [lambda: torch.save([1, 2], path)],
        "but it is not": [lambda: torch.save({"a": torch.ones(2)}, path)],
        "some are NaN": [nan],
    }
    for message, ways in broken.items():
        for way in ways:
            way()
            with pytest.raises(HAMUStateError, match=rf"{message}.*CachedLogits\(folder\).delete\(\)"):
                logits_of(CachedLogits(tmp_path / "a"), model, batch)
    assert not trap.exists()
    path.write_bytes(whole)
    (tmp_path / "a" / "cached_logits.json").write_text("{}")
    with pytest.raises(HAMUStateError, match="to say whose logits these are"):
        CachedLogits(tmp_path / "a").fill(model, [batch])


def test_logits_that_are_no_numbers_are_not_stored(tmp_path: Path) -> None:
    model = make_model("classes")
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(HAMUValueError, match="Expected the module's logits to be numbers, but some are NaN"):
        CachedLogits(tmp_path).fill(model, [make_batch("classes")])


def test_threads_fill_one_folder(tmp_path: Path) -> None:
    model, (x, y) = make_model("classes"), make_batch("classes")
    batches = [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: CachedLogits(tmp_path).fill(model, batches), range(8)))
    assert len(list(tmp_path.glob("*.pt"))) == len(x) and len(list(tmp_path.iterdir())) == len(x) + 1
    torch.testing.assert_close(logits_of(CachedLogits(tmp_path), model, (x, y)), model(x), atol=1e-12, rtol=0)


def test_stored_logits_by_index(tmp_path: Path) -> None:
    model, batch = make_model("tokens"), make_batch("tokens")
    batch["index"], order = torch.tensor([3, 1, 4, 0]), [3, 0]

    def outputs(module: nn.Module, batch: Any) -> Any:
        return ModuleOutputs()(module, {name: value for name, value in batch.items() if name != "index"})

    cache = CachedLogits(tmp_path, key=lambda batch: batch["index"]).fill(model, [batch], outputs=outputs)
    prediction, found = cache.predict(BatchPass(model, {name: x[order] for name, x in batch.items()}), outputs)
    expected = outputs(model, batch)[0][order]
    assert torch.equal(found[prediction.mask], expected[prediction.mask])


def test_samples_that_are_not_stored_are_an_error(tmp_path: Path) -> None:
    model, (x, y) = make_model("classes"), make_batch("classes")
    cache = CachedLogits(tmp_path).fill(model, [(x[:3], y[:3])])
    with pytest.raises(HAMUStateError, match="Expected the reference's logits of all 4 samples in .*, but 1 are not"):
        logits_of(cache, model, (x, y))
    with pytest.raises(HAMUStateError, match="Expected a reference that is a model, but CachedLogits holds logits"):
        RMURetain("body", reference=cache)(BatchPass(model, (x, y)))


def pad(batch: dict[str, Tensor], left: int, right: int) -> dict[str, Tensor]:
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {name: nn.functional.pad(value, (left, right), value=fill[name]) for name, value in batch.items()}


@pytest.mark.parametrize("keep", ["logits", "likelihoods"])
@pytest.mark.parametrize(("left", "right"), [(0, 2), (3, 0), (1, 1)])
def test_padding_makes_no_other_sample(tmp_path: Path, left: int, right: int, keep: Any) -> None:
    """Also where shorter samples come in batches of their own."""
    model, batch = make_model("tokens"), make_batch("tokens")
    # The second sample is as long as its four tokens: the same in a batch without padding.
    cache = CachedLogits(tmp_path, keep=keep).fill(model, [batch, {name: x[1:2, :4] for name, x in batch.items()}])
    assert len(cache._rows) == 4
    live = FrozenCopy(copy.deepcopy(model))
    move(model)
    found = NPO(reference=cache).samples(BatchPass(model, pad(batch, left, right)))
    expected = NPO(reference=live).samples(BatchPass(model, batch))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)  # rounding of other batches' products


def test_rows_without_a_label_are_not_stored(tmp_path: Path) -> None:
    model, batch = make_model("tokens"), make_batch("tokens")
    CachedLogits(tmp_path / "rows").fill(model, [batch])
    CachedLogits(tmp_path / "numbers", keep="likelihoods").fill(model, [batch])
    rows, numbers = (torch.load(next((tmp_path / name).glob("*.pt"))) for name in ("rows", "numbers"))
    labelled = int((batch["labels"] != -100).sum())
    assert rows["logits"].shape == (labelled, VOCABULARY) and "labels" not in rows
    assert numbers["likelihoods"].shape == (4,) and "logits" not in numbers


def test_numbers_do_for_likelihoods_alone(tmp_path: Path) -> None:
    model, batch = make_model("tokens"), make_batch("tokens")
    numbers = CachedLogits(tmp_path, keep="likelihoods").fill(model, [batch])
    original = copy.deepcopy(model)
    live = FrozenCopy(original)
    move(model)
    for make in (lambda r: NPO(reference=r), lambda r: DPO(lambda b: pad(b, 0, 1), reference=r)):
        found, expected = (make(r).samples(BatchPass(model, batch)) for r in (numbers, live))
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)  # sums in another order
    with pytest.raises(HAMUStateError, match=r"holds one number for each sample.*keep='logits'"):
        ReferenceKL(numbers)(BatchPass(model, batch))
    with pytest.raises(HAMUValueError, match="to be for logits, but it holds likelihoods"):
        CachedLogits(tmp_path).fill(original, [batch])
    with pytest.raises(HAMUValueError, match="Expected `keep` to be one of 'logits', 'likelihoods'"):
        CachedLogits(tmp_path, keep="all")  # type: ignore[arg-type]


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    model, batch = make_model("tokens"), make_batch("tokens")
    index = lambda b: torch.arange(len(b["labels"]))  # noqa: E731
    cache = CachedLogits(tmp_path, key=index).fill(model, [batch])
    fewer = {**batch, "labels": batch["labels"].clone()}
    fewer["labels"][0, 2] = -100
    with pytest.raises(HAMUValueError, match=r"as many places as there are labels, \[3, 2, 4, 0\].*labels and the"):
        NPO(reference=cache)(BatchPass(model, fewer))
    packed = {**batch, "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]] * 4)}
    with pytest.raises(HAMUValueError, match="one sequence for CachedLogits"):
        CachedLogits(tmp_path / "packed").fill(model, [packed], outputs=lambda m, b: ModuleOutputs()(m, batch))
    with pytest.raises(HAMUValueError, match="Expected the other model's logits to be of shape \\[4, 6, 7\\]"):
        ReferenceKL(FrozenCopy(LanguageModel().double()), outputs=Shortening())(BatchPass(model, batch))


class Shortening:
    """Gives the second model it is asked for shorter samples."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: nn.Module, batch: Any) -> Any:
        self.calls += 1
        logits, labels = ModuleOutputs()(module, batch)
        return (logits, labels) if self.calls == 1 else (logits[:, 1:], labels[:, 1:])


def test_keys_tell_samples_apart_and_nothing_else() -> None:
    x = torch.randn(1000, 3, 2)
    y = torch.randint(0, 5, (1000,))
    keys = sample_keys({"x": x, "nested": [y, "text"], "scalar": torch.tensor(1.0), "other": torch.ones(3)})
    assert len(set(keys.tolist())) == 1000
    order = torch.randperm(1000)
    assert torch.equal(sample_keys({"x": x[order], "nested": [y[order], "text"], "s": torch.tensor(2.0)}), keys[order])
    x[7, 0, 0] = -x[7, 0, 0]
    assert (sample_keys({"x": x, "nested": [y]}) != keys).nonzero().tolist() == [[7]]
    swapped = sample_keys(torch.tensor([[1, 2], [2, 1], [1, 1], [2, 2]]))
    assert len(set(swapped.tolist())) == 4
    for dtype in (torch.bool, torch.bfloat16, torch.float64, torch.complex64):
        assert len(set(sample_keys(torch.eye(4).to(dtype)).tolist())) == 4, dtype
    with pytest.raises(
        HAMUValueError, match="Expected a batch with tensors, to tell its samples apart, but got a list"
    ):
        sample_keys(["a", "b"])
