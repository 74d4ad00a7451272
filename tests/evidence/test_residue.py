"""The audit finds what may still hold forgotten data; scrubbing takes out what is ours, and nothing else."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.commands._scrub import scrub as run_scrub
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.evidence import Finding, audit, scrub
from hamu_lightning.evidence.residue import Scrubbed
from hamu_lightning.objectives import NPO, CachedLogits, FrozenCopy
from tests.methods.setups import OPTIONS, Classifier, Source, build, make_samples, make_split

# Twelve steps are a fit in whose midst checkpoints are written, no more.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The fit has ended before the target"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
OBJECTIVE = "weights of a reference from before unlearning"


def fit(folder: Path, callback: HAMUCallback, source: Source, ckpt_path: Path | None = None) -> Trainer:
    keep = ModelCheckpoint(folder, save_last=True, save_top_k=-1, every_n_train_steps=4)
    settings: dict[str, Any] = {**OPTIONS, "logger": False, "max_epochs": -1, "max_steps": 12, "log_every_n_steps": 1}
    trainer = Trainer(**settings, enable_model_summary=False, callbacks=[callback, keep])
    trainer.fit(build(batchnorm=True), source.train_dataloader(), ckpt_path=ckpt_path)
    return trainer


@pytest.fixture
def npo(tmp_path: Path) -> Path:
    """A folder with a fit whose objective has a reference."""
    source, forget = make_split()
    fit(tmp_path, HAMUCallback(forget=forget, rule=HAMUQ(quota=1e-3), objective=NPO()), source)
    return tmp_path


@pytest.fixture
def towards_target(tmp_path: Path) -> Path:
    """A folder with a fit that keeps weights and losses of samples."""
    source, forget = make_split()
    fit(tmp_path, HAMUCallback(forget=forget, target=1.6), source)
    return tmp_path


def of(findings: list[Finding], holds: str) -> set[str]:
    return {finding.place for finding in findings if finding.holds == holds}


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        value = list(value.items())
        yield name, [key for key, _ in value]
        for key, inner in value:
            yield from flat(inner, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        yield name, len(value)
        for number, inner in enumerate(value):
            yield from flat(inner, f"{name}/{number}")
    else:
        yield name, value


def assert_same(one: Any, two: Any) -> None:
    for (name, a), (other, b) in zip(flat(one), flat(two), strict=True):
        assert name == other
        if isinstance(a, Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b), name
        else:
            assert a == b, name


def test_checkpoints_before_the_end_are_found(npo: Path) -> None:
    found = audit(folder=npo)
    assert of(found, "yes") == {
        "epoch=0-step=4.ckpt: weights",
        "epoch=1-step=8.ckpt: weights",
        f"epoch=0-step=4.ckpt: {OBJECTIVE}",
        f"epoch=1-step=8.ckpt: {OBJECTIVE}",
    }
    # A fit that has ended writes no reference.
    assert {f"last.ckpt: {what}" for what in ("weights", "state of the HAMUCallback")} <= of(found, "no")
    assert "epoch=2-step=12.ckpt: weights" in of(found, "no")


def test_a_checkpoint_from_before_is_found_by_its_time(npo: Path) -> None:
    for name, seconds in (("best.ckpt", -1000), ("later.ckpt", 1000)):
        torch.save({"state_dict": build().state_dict()}, npo / name)
        os.utime(npo / name, ((npo / "last.ckpt").stat().st_mtime + seconds,) * 2)
    found = audit(folder=npo)
    assert "best.ckpt: weights" in of(found, "yes")
    assert "later.ckpt: weights" in of(found, "unknown")


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("was_run",)


def test_nothing_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "hyper_parameters": Evil()}, "evil.ckpt")
    Path("callback.pkl").write_bytes(pickle.dumps(Evil()))
    Path("cut.pt").write_bytes(Path("evil.ckpt").read_bytes()[:-50])
    found = audit(folder=tmp_path)
    assert of(found, "unknown") == {"evil.ckpt", "callback.pkl", "cut.pt"}
    assert [entry.action for entry in scrub(tmp_path, dry_run=False)] == ["remains"] * 3
    assert not Path("was_run").exists()


def test_logs_tables_and_caches_are_found(tmp_path: Path) -> None:
    (tmp_path / "hparams.yaml").write_text("lr: 0.1\n")
    (tmp_path / "other.yaml").write_text("data: !!python/object:torch.utils.data.TensorDataset {}\n")
    (tmp_path / "metrics.csv").write_text("step,loss\n1,0.5\n")
    (tmp_path / "forgotten.csv").write_text("position,loss_before\n7,0.5\n")
    (tmp_path / "run.json").write_text('{"log_odds": [1.0]}')
    with SummaryWriter(str(tmp_path / "numbers")) as writer:
        writer.add_scalar("loss", 1.0)
    with SummaryWriter(str(tmp_path / "media")) as writer:
        writer.add_image("batch", torch.rand(3, 4, 4))
        writer.add_text("sample", "someone")
    cache = CachedLogits(tmp_path / "cache").fill(build(), DataLoader(make_samples(8), batch_size=4))
    found = audit(folder=tmp_path)
    assert {"hparams.yaml", "metrics.csv"} < of(found, "no")
    assert any(place.startswith("numbers/events") for place in of(found, "no"))
    assert of(found, "yes") == {"forgotten.csv", "run.json", "cache: cached logits of the model that remembers"}
    unknown = of(found, "unknown")
    assert len(unknown) == 2 and "other.yaml" in unknown
    (media,) = (f.advice for f in found if f.place.startswith("media/"))
    assert "images, text" in media
    assert not any("someone" in str(finding) for finding in found)
    cache.delete()


def test_what_is_in_memory_is_found() -> None:
    source, forget = make_split()
    callback = HAMUCallback(forget=forget, target=1.6)
    module = build(batchnorm=True)
    module.ema = AveragedModel(nn.Linear(2, 2))
    module.ema.update_parameters(nn.Linear(2, 2))
    module.samples = forget
    module.save_hyperparameters({"lr": 0.1, "data": [forget]})
    optimizer = torch.optim.Adam(module.net.parameters())
    assert audit(optimizer=optimizer)[0].holds == "no"
    module.net(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    found = audit(module, callback=callback, optimizer=optimizer)
    assert of(found, "yes") == {
        "module: averaged weights, ema",
        "module: data among the hyper-parameters",
        "module: samples",
        "optimizer: moments",
        "HAMUCallback: the data to forget",
    }
    assert of(found, "unknown") == {"module: running statistics of 1 norm (net.1)"}
    assert of(audit(Classifier()), "no") == {"module: running statistics"}


def test_a_trainer_brings_the_rest(tmp_path: Path) -> None:
    source, forget = make_split()
    callback = HAMUCallback(forget=forget, target=1.6)
    trainer = fit(tmp_path, callback, source)
    trainer.callbacks.append(WeightAveraging())  # type: ignore[attr-defined]
    found = audit(trainer=trainer)
    assert {"HAMUCallback: table of forgotten samples", "epoch=0-step=4.ckpt: weights"} <= of(found, "yes")
    assert "trainer: averaged weights of WeightAveraging" in of(found, "unknown")
    assert "trainer: optimizer 0: moments" in of(found, "no")  # plain SGD


def test_scrubbing_takes_out_what_is_ours_and_nothing_else(npo: Path) -> None:
    names = sorted(path.name for path in npo.iterdir())
    before = {name: load(npo / name) for name in names}
    files = {name: (npo / name).read_bytes() for name in names}
    mine = ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"]
    (npo / mine[0]).chmod(0o600)
    times = [(npo / name).stat().st_mtime_ns for name in names]
    dry = scrub(npo)
    assert {name: (npo / name).read_bytes() for name in names} == files
    assert [entry.path.name for entry in dry if entry.action == "would be rewritten"] == mine
    done = scrub(npo, dry_run=False)
    assert [entry.path.name for entry in done if entry.action == "rewritten"] == mine
    assert (npo / mine[0]).stat().st_mode & 0o777 == 0o600
    assert [(npo / name).stat().st_mtime_ns for name in names] == times
    assert all((npo / name).read_bytes() == files[name] for name in set(names) - set(mine))
    for name in mine:
        objective = before[name]["callbacks"]["HAMUCallback"]["objectives"]["forget"]
        assert set(objective["reference"]) == {"weights"}
        objective["reference"] = {"released": True}
        after = load(npo / name)
        assert_same(before[name], after)
        assert after["state_dict"]._metadata == before[name]["state_dict"]._metadata
    assert not any(OBJECTIVE in finding.place for finding in audit(folder=npo))
    assert all(entry.action == "remains" for entry in scrub(npo, dry_run=False))


def test_the_state_beside_a_checkpoint_of_transformers_is_ours_too(npo: Path) -> None:
    objective = load(npo / "epoch=1-step=8.ckpt")["callbacks"]["HAMUCallback"]["objectives"]["forget"]
    path = npo / "beside" / "hamu_state.pt"
    path.parent.mkdir()
    torch.save({"optimizer": {"applied": 4}, "objective": objective, "draw": 1, "passes": 4}, path)
    assert of(audit(folder=path.parent), "yes") == {f"hamu_state.pt: {OBJECTIVE}"}
    assert [entry.action for entry in scrub(path.parent, dry_run=False)] == ["rewritten"]
    kept = {"optimizer": {"applied": 4}, "draw": 1, "passes": 4}
    assert load(path) == {**kept, "objective": {**objective, "reference": {"released": True}}}
    assert of(audit(folder=path.parent), "no") == {"hamu_state.pt: state of the HAMUTrainerMixin"}


def test_a_scrubbed_checkpoint_loads_and_says_what_it_needs(npo: Path) -> None:
    scrub(npo, dry_run=False)
    source, forget = make_split()
    module = build(batchnorm=True)
    module.load_state_dict(load(npo / "epoch=1-step=8.ckpt")["state_dict"])

    def go_on(objective: NPO) -> HAMUCallback:
        callback = HAMUCallback(forget=forget, rule=HAMUQ(quota=1e-3), objective=objective)
        fit(npo, callback, source, ckpt_path=npo / "epoch=1-step=8.ckpt")
        return callback

    with pytest.raises(HAMUStateError, match="goes on with a fit that had ended"):
        go_on(NPO())
    assert go_on(NPO(reference=FrozenCopy(build(batchnorm=True)))).combined_steps == 12


def test_a_scrubbed_run_towards_a_target_goes_on(towards_target: Path) -> None:
    path = towards_target / "epoch=1-step=8.ckpt"
    kinds = {p.partition(": ")[2] for p in of(audit(folder=towards_target), "yes") if p.startswith(path.name)}
    assert kinds == {"weights", "weights of an earlier step", "losses of single samples"}
    scrub(towards_target, dry_run=False)
    assert of(audit(folder=towards_target), "yes") == {"epoch=0-step=4.ckpt: weights", f"{path.name}: weights"}
    source, forget = make_split()
    callback = HAMUCallback(forget=forget, target=1.6)
    fit(towards_target, callback, source, ckpt_path=path)
    assert callback.combined_steps == 12


def test_caches_and_unfinished_files_are_deleted_and_others_stay(tmp_path: Path) -> None:
    CachedLogits(tmp_path / "cache").fill(build(), DataLoader(make_samples(8), batch_size=4))
    (tmp_path / "cache" / "mine.txt").write_text("stays")
    (tmp_path / "x.unfinished").write_text("left")
    (tmp_path / "notes.txt").write_text("stays")
    assert {e.action for e in scrub(tmp_path)} == {"would be deleted"}
    assert len(list(tmp_path.rglob("*"))) == 7
    assert scrub(tmp_path, dry_run=False) == [
        Scrubbed(tmp_path / "cache", "deleted", "logits of the model that remembers"),
        Scrubbed(tmp_path / "x.unfinished", "deleted", "what an interrupted writer left"),
    ]
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left == {"cache", "cache/mine.txt", "notes.txt"}


def test_the_command(npo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_scrub(str(npo)) == 0
    told = capsys.readouterr().out
    assert "would be rewritten" in told and told.endswith("Nothing was changed. --apply does it.\n")
    assert run_scrub(str(npo), apply=True) == 0
    told = capsys.readouterr().out
    assert "\nremains: " in told and "would" not in told
    (npo / "empty").mkdir()
    assert run_scrub(str(npo / "empty")) == 0
    assert capsys.readouterr().out == "Nothing was found.\n"


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HAMUValueError, match="Expected something to look at"):
        audit()
    with pytest.raises(HAMUValueError, match="Expected `folder` to be a folder"):
        audit(folder=tmp_path / "nowhere")
    with pytest.raises(HAMUValueError, match="Expected `folder` to be a folder"):
        scrub(tmp_path / "nowhere")
    with pytest.raises(HAMUValueError, match="Expected `module` to be a LightningModule"):
        audit(module=nn.Linear(1, 1))  # type: ignore[arg-type]
