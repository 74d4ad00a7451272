"""The pool of retrained models: distances from it, and what its members have among themselves."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from hamu_lightning import compare
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.methods import SSD, Comparison, Retrain, Run, Search
from hamu_lightning.methods._evaluation import Samples, Seen, evaluate_parts, measure
from hamu_lightning.methods._pool import DISTANCES, measure_distances, measure_floor
from hamu_lightning.metrics.functional import average_gap
from tests.methods.setups import OPTIONS, Classifier, make_split
from tests.methods.test_evaluation import make_parts


def make_seen(seed: int) -> Seen:
    torch.manual_seed(seed)
    return evaluate_parts(Classifier(), make_parts())


def js(p: list[float], q: list[float]) -> float:
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return sum(
        (a * math.log(a / m) + b * math.log(b / m)) / 2 for a, b, m in zip(p, q, middle, strict=True)
    ) / math.log(2)


def ks(ours: list[float], theirs: list[float]) -> float:
    def share(values: list[float], x: float) -> float:
        return sum(value <= x for value in values) / len(values)

    return max(abs(share(ours, x) - share(theirs, x)) for x in (*ours, *theirs))


def odds(samples: Samples) -> list[float]:
    p = samples.log_probs.exp()
    return [math.log(float(p[n, y]) / (1 - float(p[n, y]))) for n, y in enumerate(samples.labels.tolist())]


def test_the_distances_are_those_of_loops() -> None:
    ours, original, *pool = (make_seen(seed) for seed in range(4))
    found = measure_distances(ours, pool, original)
    assert set(found) == set(DISTANCES)
    for title, part in (("JS", "forget"), ("JS_test", "test")):
        # The forget set has samples of all three classes.
        rows = [getattr(seen, part).log_probs.exp().tolist() for seen in (ours, *pool)]
        values = [js(p, q) for other in rows[1:] for p, q in zip(rows[0], other, strict=True)]
        assert found[title] == pytest.approx(mean(values)) and found[title] > 1e-3
    losses = [seen.forget.losses.tolist() for seen in (ours, *pool)]
    assert found["KS"] == pytest.approx(mean(ks(losses[0], other) for other in losses[1:]))
    classes = [seen.forget.log_probs.argmax(dim=1) for seen in (ours, *pool)]
    assert found["agreement"] == pytest.approx(mean(float((classes[0] == c).double().mean()) for c in classes[1:]))
    phi = [odds(seen.forget) for seen in (ours, *pool)]
    differences = [abs(a - b) for other in phi[1:] for a, b in zip(phi[0], other, strict=True)]
    assert found["log_odds"] == pytest.approx(mean(differences))
    assert found["surer"] == mean(float(a > b) for a, b in zip(phi[0], odds(original.forget), strict=True))


def test_only_test_samples_of_the_forgotten_classes_count() -> None:
    ours, other = make_seen(0), make_seen(1)
    ones = (ours.test.labels == 1).nonzero().flatten()
    narrow = [
        seen._replace(forget=seen.forget.select((seen.forget.labels == 1).nonzero().flatten()))
        for seen in (ours, other)
    ]
    cut = [seen._replace(test=seen.test.select(ones)) for seen in narrow]
    found = [measure_distances(a, [b], b)["JS_test"] for a, b in (narrow, cut)]
    assert found[0] == found[1] != measure_distances(ours, [other], other)["JS_test"]
    absent = [seen._replace(test=seen.test.select((seen.test.labels != 1).nonzero().flatten())) for seen in narrow]
    assert math.isnan(measure_distances(absent[0], absent[1:], absent[1])["JS_test"])


def test_a_model_without_numbers_has_no_distances() -> None:
    ours, other = make_seen(0), make_seen(1)
    broken = ours._replace(forget=Samples(torch.full_like(ours.forget.log_probs, math.nan), ours.forget.labels))
    found = measure_distances(broken, [other], other)
    assert all(math.isnan(found[title]) for title in ("JS", "KS", "agreement", "log_odds"))


def test_each_member_is_measured_against_the_others() -> None:
    pool, original = [make_seen(seed) for seed in range(3)], make_seen(9)
    floors = measure_floor(pool, [original, pool[0]])
    others = [pool[0], pool[2]]
    expected = measure_distances(pool[1], others, original)
    surer = measure_distances(pool[1], others, pool[0])["surer"]
    assert floors[1]["JS"] == expected["JS"] and floors[1]["surer"] == (expected["surer"] + surer) / 2
    assert floors[1]["KL"] == pytest.approx(mean(measure(pool[1], other)["KL"] for other in others))
    assert floors[1]["RA"] == pool[1].retain.accuracy


def run_compare(out: Path, methods: Any, **settings: Any) -> Comparison:
    source, forget = make_split()
    return compare(Classifier, source, forget, methods, out=out, options=OPTIONS, **settings)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    methods = {"SSD": Search(SSD, 0.1, 1.0), "fixed": SSD(0.5)}
    return run_compare(tmp_path_factory.mktemp("out"), methods, seeds=(0, 1), pool=3, trials=2)


def test_values_are_chosen_with_other_seeds_than_are_reported(result: Comparison) -> None:
    tuned = {run.seed for run in result.runs if run.name == "SSD" and run.trial != result.chosen["SSD"]}
    reported = {name: [run.seed for run in result.best(name)] for name in ("SSD", "fixed", "original", "retrained")}
    assert all(seeds == [0, 1] for seeds in reported.values())
    assert tuned == {1000, 1001}
    assert {run.seed for run in result.runs if run.name == "fixed"} == {0, 1}  # nothing to tune
    pool = [run.seed for run in result.best("another retrained")]
    assert pool == [2000, 2001, 2002]


def test_all_are_measured_against_the_same_pool(result: Comparison) -> None:
    source, _ = make_split()
    pool = [
        evaluate_parts(Retrain(Classifier, OPTIONS, seed)(None, source), make_parts()) for seed in range(2000, 2003)
    ]
    assert [run.numbers["JS"] for run in result.best("another retrained")] == pytest.approx(
        [floor["JS"] for floor in measure_floor(pool, pool)]
    )
    retrained = evaluate_parts(Retrain(Classifier, OPTIONS, 1)(None, source), make_parts())
    expected = measure_distances(retrained, pool, retrained)["JS"]
    assert result.best("retrained")[1].numbers["JS"] == pytest.approx(expected)
    numbers = [run.numbers for run in result.best("another retrained")]
    gaps = [float(average_gap(numbers[0], other)) for other in numbers[1:]]
    assert result.gaps("another retrained")[0] == pytest.approx(mean(gaps))


def test_the_table_has_the_floor_and_says_its_order(result: Comparison, tmp_path: Path) -> None:
    table = result.table()
    assert max(map(len, table.splitlines())) <= 120
    assert [line[:22].strip() for line in table.splitlines()[1:4]] == ["retrained", "another retrained", "original"]
    assert f"Ordered by {'the gap' if result.ordered_by == 'gap' else result.ordered_by}" in table
    result.to_csv(tmp_path / "a.csv")
    result.to_json(tmp_path / "a.json")
    assert (tmp_path / "a.csv").read_text().count("another retrained") == 3


def make_comparison(js: dict[str, list[float]], margins: dict[str, float] | None = None) -> Comparison:
    """Runs of one trial with these JS; and, with margins, the log-odds of five samples around them."""
    generator, runs = torch.Generator().manual_seed(0), []
    for name, values in js.items():
        for seed, value in enumerate(values):
            numbers = {"UA": value, "RA": 1.0, "TA": 1.0, "MIA": 0.5, "KL": 0.0, "JS": value}
            odds = ((margins or {}).get(name, 0.0) + torch.randn(5, generator=generator)).tolist()
            runs.append(Run(name, seed, 0, None, 0.0, numbers, 1.0, 1.0, [], odds if margins else []))
    return Comparison(runs, dict.fromkeys(js, 0), "retrained")


FAR = {"original": [0.5, 0.6], "retrained": [0.1, 0.1], "another retrained": [0.1, 0.11, 0.12]}
NEAR = {**FAR, "original": [0.1, 0.13]}


def test_js_ranks_where_the_original_is_clearly_further_than_the_floor() -> None:
    assert make_comparison({**FAR, "b": [0.3, 0.3], "a": [0.2, 0.2]}).ordered_by == "JS"
    assert make_comparison({**FAR, "b": [0.3, 0.3], "a": [0.2, 0.2]}).ranking() == ["a", "b"]
    one = {name: values[:1] for name, values in FAR.items() if name != "another retrained"}
    assert make_comparison({**one, "another retrained": [0.1, 0.11, 0.12]}).ordered_by == "JS"


def test_the_gap_ranks_where_js_tells_nothing_and_models_are_few() -> None:
    found = make_comparison({**NEAR, "b": [0.3, 0.3], "a": [0.2, 0.2]})
    assert found.ordered_by == "gap" and "Ordered by the gap" in found.table()
    assert math.isnan(found.klom("a")) and math.isnan(found.u_lira("a"))
    # One member has no spread, and no other to be measured against.
    assert make_comparison({**FAR, "original": [0.5], "another retrained": [0.1]}).ordered_by == "gap"


def test_klom_ranks_where_js_tells_nothing_and_models_are_many() -> None:
    names = ("original", "retrained", "another retrained", "a", "b")
    many = {name: [0.1 + 0.01 * (n % 3) for n in range(16)] for name in names}
    found = make_comparison(many, {"original": 6.0, "a": 4.0, "b": 1.0})
    assert found.ordered_by == "KLOM" and found.ranking() == ["b", "a"]
    assert found.klom("another retrained") == found.klom("retrained") < found.klom("b")
    assert 0.4 < found.u_lira("retrained") < 0.75 < 0.95 < found.u_lira("a")
    assert "KLOM" in found.table()


def test_differences_are_paired() -> None:
    found = make_comparison({**FAR, "a": [0.1, 0.5], "b": [0.2, 0.6]})
    assert found.difference("a", "b") == pytest.approx((-0.1, 0.0), abs=1e-12)
    assert found.difference("b", "a", "gap") == pytest.approx((0.025, 0.0), abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"pool": -1}, "Expected `pool` to be at least 0"), ({"tune_seeds": ()}, "Expected different `tune_seeds`")],
)
def test_wrong_arguments(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(HAMUValueError, match=message):
        run_compare(tmp_path, [SSD()], **settings)
