"""The blocks of an optimizer: names, groups, norms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hamu_lightning.optim._layout import make_layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_weight_norms_and_sizes(dtype: torch.dtype) -> None:
    parameters = [nn.Parameter(torch.randn(n, 3, dtype=dtype)) for n in (2, 4, 5)]
    names: dict[Tensor, str] = dict(zip(parameters, ("a.weight", "a.bias", "b.weight"), strict=True))
    layout = make_layout([{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "lr": 0.2}], names, "layer")
    expected = [
        torch.cat([parameters[0].detach(), parameters[1].detach()]).to(torch.complex128).norm(),
        parameters[2].detach().to(torch.complex128).norm(),
    ]
    # Norms are taken in float32 or wider.
    torch.testing.assert_close(layout.weight_norms(), torch.stack(expected).double(), rtol=1e-6, atol=0)
    assert (layout.labels, layout.sizes, layout.groups) == (("a", "b"), (18, 15), (0, 1))


@pytest.mark.parametrize("first", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_of_several_types(first: torch.dtype) -> None:
    parameters = [nn.Parameter(torch.randn(4, 3).to(dtype)) for dtype in (first, torch.float64, torch.float32)]
    layout = make_layout([{"params": parameters, "lr": 0.1}], {}, "tensor")
    expected = torch.stack([p.detach().double().norm() for p in parameters])
    torch.testing.assert_close(layout.weight_norms(), expected, rtol=1e-6, atol=0)  # float32


def test_learning_rates_may_be_tensors() -> None:
    parameter = nn.Parameter(torch.ones(1))
    groups = [{"params": [parameter], "lr": torch.tensor(0.5)}]
    assert make_layout(groups, {}, "tensor").learning_rates(groups).tolist() == [0.5]
