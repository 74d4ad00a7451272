"""Pictures of single samples: that they show the numbers that they are given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.report import plot_losses, plot_ranks, render

FEW, MANY = torch.tensor([0.001, 0.01, 2.0]), torch.rand(50, generator=torch.Generator().manual_seed(0))


def heights(axes: object) -> list[np.ndarray]:
    return [np.asarray(patch.get_data().values) for patch in axes.patches if hasattr(patch, "get_data")]  # type: ignore[attr-defined]


def test_losses_are_all_shown() -> None:
    figure = plot_losses((FEW, MANY), (FEW, torch.cat([MANY, torch.tensor([torch.inf])])), auc=(0.75, np.nan))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["before: AUC 0.75", "after"]
    assert figure.axes[0].get_xscale() == "log"
    for axes in figure.axes:
        assert [float(values.sum()) for values in heights(axes)] == pytest.approx([1, 1, 1, 1])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["forgotten (3)", "held-out (50)"]


def test_losses_of_one_size_or_below_zero_have_a_plain_axis() -> None:
    for losses in (torch.ones(3), torch.tensor([-1.0, 5.0, 100.0]), torch.zeros(2)):
        figure = plot_losses((losses, losses), (losses, losses))
        assert figure.axes[0].get_xscale() == "linear"
        assert all(float(values.sum()) == pytest.approx(1) for values in heights(figure.axes[1]))


def test_a_loss_of_zero_stands_in_the_first_bin() -> None:
    losses = torch.tensor([0.0, 0.0, 1e-3, 10.0])
    (first, *_) = heights(plot_losses((losses, losses), (losses, losses)).axes[0])
    assert first[0] == 0.5


def test_ranks_are_shares_of_all_samples() -> None:
    figure = plot_ranks(torch.linspace(0.01, 0.99, 100), before=torch.zeros(100), held_out=50)
    after, _, before = heights(figure.axes[0])
    assert after.sum() == pytest.approx(1) and before[0] == 1 and np.allclose(after, 0.1)


def test_a_figure_becomes_an_image() -> None:
    image = render(plot_ranks(MANY))
    assert image.dtype == np.uint8 and image.shape[2] == 3 and image.shape[1] > image.shape[0] > 200
    assert (image[0, 0] == 255).all() and (image < 128).any()  # a light ground, also on a dark page


def test_nothing_to_show_is_refused() -> None:
    with pytest.raises(HAMUValueError, match="finite number"):
        plot_ranks([float("nan")])
    with pytest.raises(HAMUValueError, match="at least one entry"):
        plot_losses((FEW, MANY), ([], MANY))
