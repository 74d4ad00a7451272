"""The pictures show the numbers that they were given, and say what is wrong with others."""

from __future__ import annotations

import builtins
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.report import (
    MissingMatplotlibError,
    _figures,
    plot_comparison,
    plot_hardness,
    plot_promises,
    plot_tradeoff,
)

pytest.importorskip("matplotlib")

STEPS, BLOCKS = 6, 70


def hardness_arrays() -> dict[str, Any]:
    """Blocks of scales from 1e-12 to 1e6, all with the same cosines and thresholds."""
    norms = np.logspace(-12, 6, BLOCKS)[None].repeat(STEPS, axis=0)
    cosine = np.linspace(-0.9, 0.9, STEPS)[:, None]
    return {
        "kappa": cosine * norms,
        "kappa_1": -0.6 * norms,
        "kappa_2": 0.8 * norms,
        "norms": norms,
        "labels": [f"layer{i}.weight" for i in range(BLOCKS)],
        "steps": np.arange(1, STEPS + 1),
    }


def line(axes: Any, label: str) -> np.ndarray:
    (found,) = [line for line in axes.get_lines() if label in str(line.get_label())]
    return found.get_ydata()


def test_tradeoff_shows_path_and_reference() -> None:
    retain, forget = torch.tensor([0.0, -0.1, 0.2]), torch.tensor([0.0, 1.0, 3.0])
    figure = plot_tradeoff(retain, forget, [0, 5, 10], reference=(0.1, 2.5), reference_label="retrained")
    axes = figure.axes[0]
    path = next(line for line in axes.get_lines() if len(line.get_xdata()) == 3)
    np.testing.assert_array_equal(path.get_xdata(), retain.double().numpy())
    np.testing.assert_array_equal(path.get_ydata(), forget.double().numpy())
    points = {c.get_label(): c.get_offsets().tolist() for c in axes.collections if len(c.get_offsets()) == 1}
    assert points == {"original": [[0, 0]], "unlearned": [[retain[2].item(), 3]], "retrained": [[0.1, 2.5]]}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["original", "unlearned", "retrained"]


def test_tradeoff_without_reference() -> None:
    axes = plot_tradeoff([0.0], [0.0], [0]).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["original", "unlearned"]


def test_hardness_is_scaled_per_block() -> None:
    arrays = hardness_arrays()
    figure = plot_hardness(**arrays)
    upper, lower = figure.axes[:2]
    # The quotients are exact to rounding.
    np.testing.assert_allclose(line(upper, "median"), np.linspace(-0.9, 0.9, STEPS), rtol=1e-12)
    np.testing.assert_allclose(line(upper, "kappa_1"), -0.6, rtol=1e-12)
    np.testing.assert_allclose(line(upper, "kappa_2"), 0.8, rtol=1e-12)
    mesh = lower.collections[0]
    assert mesh.get_array().shape == (BLOCKS, STEPS)
    np.testing.assert_allclose(mesh.get_array()[3], np.linspace(-0.9, 0.9, STEPS), rtol=1e-12)
    # The first block is on top, and with many blocks only some names are written.
    names = [text.get_text() for text in lower.get_yticklabels()]
    assert names[0] == "layer0.weight" and lower.yaxis_inverted() and 10 < len(names) <= 26


def test_hardness_leaves_out_what_has_no_number(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    arrays = hardness_arrays()
    for name in ("kappa", "kappa_1", "kappa_2", "norms"):
        arrays[name] = arrays[name].copy()
    arrays["norms"][:, 0] = arrays["kappa"][:, 0] = 0  # no gradient
    arrays["kappa_1"][:, 1], arrays["kappa_2"][:, 1] = -np.inf, np.nan  # no radius
    arrays["norms"][2] = 0  # nothing at all at one step
    figure = plot_hardness(**arrays)
    median = line(figure.axes[0], "median")
    assert np.isnan(median[2]) and np.isfinite(np.delete(median, 2)).all()
    np.testing.assert_allclose(np.delete(line(figure.axes[0], "kappa_1"), 2), -0.6, rtol=1e-12)
    figure.savefig(tmp_path / "hardness.png")
    assert not recwarn.list


def test_hardness_marks_quotas_beyond_the_radius() -> None:
    arrays = hardness_arrays()

    def labels() -> list[str]:
        return [text.get_text() for text in plot_hardness(**arrays).axes[0].get_legend().get_texts()]

    assert "quota beyond the radius" not in labels()
    arrays["kappa_1"] = arrays["kappa_1"] * 2  # -Q/(R|g_f|) = -1.2: more than the radius allows
    assert "quota beyond the radius" in labels()


def test_pictures_are_written(tmp_path: Path) -> None:
    plot_hardness(**hardness_arrays()).savefig(tmp_path / "hardness.png")
    plot_tradeoff([0.0, 0.1], [0.0, 1.0], [0, 1]).savefig(tmp_path / "tradeoff.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("hardness", "tradeoff"))


def test_one_step_and_one_block() -> None:
    figure = plot_hardness([[0.5]], [[-0.1]], [[0.9]], [[1.0]], ["weight"], [7])
    (axes,) = figure.axes  # a second panel would only repeat it
    assert line(axes, r"$\kappa$").tolist() == [0.5] and axes.get_xlabel() == "step"
    two = plot_hardness([[0.5, 0.5]], [[-0.1] * 2], [[0.9] * 2], [[1.0] * 2], ["weight", "bias"], [7])
    assert two.axes[1].get_xlim() == (6.5, 7.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kappa": np.zeros(STEPS)},
            r"Expected `kappa` to have 2 dimensions and at least one entry, but got shape \[6\]",
        ),
        ({"kappa_2": np.zeros((STEPS, 2))}, r"Expected `kappa_2` to have shape \[6, 70\], but got \[6, 2\]"),
        ({"steps": [1.0]}, r"Expected `steps` to have shape \[6\], but got \[1\]"),
        ({"labels": ["a"]}, "Expected `labels` to have 70 entries, but got 1"),
    ],
)
def test_hardness_refuses_wrong_shapes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        plot_hardness(**hardness_arrays() | change)


def test_tradeoff_refuses_wrong_shapes() -> None:
    with pytest.raises(HAMUValueError, match=r"Expected `forget_improvement` to have shape \[2\], but got \[1\]"):
        plot_tradeoff([0.0, 1.0], [0.0], [0, 1])
    with pytest.raises(
        HAMUValueError, match="Expected `retain_improvement` to have 1 dimension and at least one entry"
    ):
        plot_tradeoff([], [], [])


def test_missing_matplotlib_is_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        assert name == "matplotlib.figure"
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(_figures, "import_module", refuse)
    with pytest.raises(MissingMatplotlibError, match="pip install matplotlib"):
        plot_tradeoff([0.0], [0.0], [0])


def test_import_does_not_need_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        assert not name.startswith("matplotlib"), "matplotlib was imported with the package"
        return real(name, *args, **kwargs)

    for name in ("_figures", "_hardness", "_tradeoff"):
        spec = importlib.util.find_spec(f"hamu_lightning.report.{name}")
        assert spec is not None and spec.loader is not None
        monkeypatch.setattr(builtins, "__import__", refuse)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        monkeypatch.undo()


def comparison_paths(n: int) -> dict[str, np.ndarray]:
    return {f"method {i}": np.array([[0.0, 0.0], [-0.01 * i, 0.5], [-0.01 * i, 1.0 + 0.1 * i]]) for i in range(n)}


def test_comparison_shows_every_path_and_its_end() -> None:
    paths = comparison_paths(3)
    axes = plot_comparison(paths, reference=(0.1, 2.5)).axes[0]
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) == 3]
    for line, path in zip(lines, paths.values(), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), path)
    ends = {
        str(line.get_label()): line.get_xydata().tolist() for line in axes.get_lines() if line.get_marker() != "None"
    }
    assert ends == {name: [path[-1].tolist()] for name, path in paths.items()}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["original", "retrained", *paths]
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "linear")


def test_comparison_tells_thirty_methods_apart() -> None:
    axes = plot_comparison(comparison_paths(30)).axes[0]
    looks = {(line.get_color(), line.get_marker()) for line in axes.get_lines() if line.get_marker() != "None"}
    assert len(looks) == 30


def test_comparison_keeps_room_where_one_method_destroys_the_model() -> None:
    paths = comparison_paths(5)
    paths["destroyed"] = np.array([[0.0, 0.0], [-50.0, 1.0], [np.nan, np.nan]])
    figure = plot_comparison(paths)
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("symlog", "linear")
    (path,) = (line for line in axes.get_lines() if len(line.get_xdata()) == 2 and line.get_xdata()[-1] == -50)
    assert np.isfinite(path.get_xydata()).all()
    figure.canvas.draw()


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({}, "Expected at least one path"),
        ({"a": [0.0, 1.0]}, "Expected `a` to have 2 dimensions"),
        ({"a": [[0.0, 1.0, 2.0]]}, r"Expected the path of `a` to be of shape \[S, 2\], but got \[1, 3\]"),
    ],
)
def test_comparison_refuses_other_paths(paths: Any, message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        plot_comparison(paths)


def test_promises_beside_what_came() -> None:
    axes = plot_promises([0.1, 0.2, 0.2], [0.1, 0.05, 0.21], [1, 2, 2], [1, 0, 1]).axes[0]
    np.testing.assert_array_equal(line(axes, "promised"), [0.1, 0.2])
    points = {c.get_label(): c.get_offsets().tolist() for c in axes.collections}
    assert points == {"measured": [[1, 0.1], [2, 0.21]], "measured, and taken back": [[2, 0.05]]}
    with pytest.raises(HAMUValueError, match=r"Expected `measured` to have shape \[2\], but got \[1\]"):
        plot_promises([0.1, 0.2], [0.1], [1, 2])
