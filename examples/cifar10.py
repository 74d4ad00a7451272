"""CIFAR-10 from its standard binary files, and the ResNet-20 for it. Nothing is unpickled, nothing downloaded.

Nothing in this file knows of unlearning.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from digits import DigitsClassifier, make_resnet20
from torch import Tensor

# One record: a byte for the label, then the red, the green and the blue plane, 32 rows of 32 bytes each.
_IMAGE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32
TRAINING_FILES = tuple(f"data_batch_{n}.bin" for n in range(1, 6))
# Of the training images, by channel.
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class CIFAR10Classifier(DigitsClassifier):
    """The ResNet-20 for three channels.

    Args:
        width: Channels of the first stage.
        lr: Learning rate.
    """

    def __init__(self, width: int = 16, lr: float = 0.1) -> None:
        super().__init__(width, lr)
        self.net = make_resnet20(width, in_channels=_IMAGE[0])


def read_cifar10(path: Path) -> tuple[Tensor, Tensor]:
    """Read one binary file.

    Args:
        path: The file.

    Returns:
        Images `[N, 3, 32, 32]`, uint8, and labels `[N]`, int64.

    Raises:
        ValueError: If the file does not consist of whole records, or a label is not one of ten.
    """
    data = np.fromfile(path, dtype=np.uint8)
    if data.size == 0 or data.size % _RECORD:
        raise ValueError(
            f"Expected {path} to hold records of {_RECORD} bytes, but it has {data.size} bytes. "
            "Give the folder of the 'binary version' of CIFAR-10."
        )
    records = torch.from_numpy(data).view(-1, _RECORD)
    labels = records[:, 0].long()
    if labels.max() > 9:
        raise ValueError(f"Expected labels from 0 to 9 in {path}, but got {int(labels.max())}.")
    return records[:, 1:].reshape(-1, *_IMAGE), labels


def load_cifar10(folder: Path) -> tuple[Tensor, Tensor]:
    """Read the training files in a folder.

    Returns:
        Images `[N, 3, 32, 32]`, of mean 0 and standard deviation 1 by channel, and labels `[N]`.
    """
    images, labels = zip(*(read_cifar10(folder / name) for name in TRAINING_FILES), strict=True)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (_MEAN, _STD))
    return (torch.cat(images).float() / 255 - mean) / std, torch.cat(labels)
