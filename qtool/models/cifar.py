"""The residual networks for CIFAR-10, of two lineages whose checkpoints are in circulation.

Reference:
    He, Zhang, Ren and Sun 2015, arXiv:1512.03385, section 4.2.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (16, 32, 64)


class EltwiseAdd(nn.Module):
    """x + y as a module, so that the addition has a name of its own.

    The attribute `qtool_op` says which operation a module stands for: tracing keeps a module that
    has it whole, as one layer of that kind.
    """

    qtool_op = "add"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut without parameters ("option A" of the paper).

    Where the shape changes, the shortcut takes every second pixel and pads channels with zeros, as
    many before as after.
    """

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.changes_shape = stride != 1 or in_planes != planes
        self.pad = planes // 4

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.changes_shape:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """(N, 3, 32, 32) -> (N, num_classes), with parameterless shortcuts; the classifier is `linear`.

    Args:
        depth: number of weighted layers, 6n + 2: 20, 32, 44 or 56.
        num_classes: rows of the classifier.

    Raises:
        ValueError: if depth is not 6n + 2.

    Reference:
        Layer names of github.com/akamaster/pytorch_resnet_cifar10.
    """

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        num_blocks = blocks_per_stage(depth)
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = self._stage(WIDTHS[0], WIDTHS[0], num_blocks, stride=1)
        self.layer2 = self._stage(WIDTHS[0], WIDTHS[1], num_blocks, stride=2)
        self.layer3 = self._stage(WIDTHS[1], WIDTHS[2], num_blocks, stride=2)
        self.linear = nn.Linear(WIDTHS[2], num_classes)

    @staticmethod
    def _stage(in_planes: int, planes: int, num_blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_planes, planes, stride)
        return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(num_blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        scores: Tensor = self.linear(x)
        return scores


class DistillerBlock(nn.Module):
    """Two convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu2 = nn.ReLU()
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_planes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )
        self.residual_eltwiseadd = EltwiseAdd()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        residual = x if self.downsample is None else self.downsample(x)
        out = self.relu2(self.residual_eltwiseadd(residual, out))
        return out


class DistillerResNet(nn.Module):
    """(N, 3, 32, 32) -> (N, num_classes), as in Distiller: every operation is a module with its name.

    Args:
        depth: number of weighted layers, 6n + 2: 20, 32, 44 or 56.
        num_classes: rows of the classifier, `fc`.

    Raises:
        ValueError: if depth is not 6n + 2.

    Reference:
        Layer names of github.com/IntelLabs/distiller, distiller/models/cifar10/resnet_cifar.py.
    """

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        num_blocks = blocks_per_stage(depth)
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.relu = nn.ReLU()
        self.layer1 = self._stage(WIDTHS[0], WIDTHS[0], num_blocks, stride=1)
        self.layer2 = self._stage(WIDTHS[0], WIDTHS[1], num_blocks, stride=2)
        self.layer3 = self._stage(WIDTHS[1], WIDTHS[2], num_blocks, stride=2)
        self.avgpool = nn.AvgPool2d(8, stride=1)
        self.fc = nn.Linear(WIDTHS[2], num_classes)

    @staticmethod
    def _stage(in_planes: int, planes: int, num_blocks: int, stride: int) -> nn.Sequential:
        first = DistillerBlock(in_planes, planes, stride)
        return nn.Sequential(first, *(DistillerBlock(planes, planes, 1) for _ in range(num_blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.avgpool(x)
        scores: Tensor = self.fc(x.view(x.size(0), -1))
        return scores


def blocks_per_stage(depth: int) -> int:
    """The n of a depth of 6n + 2.

    Raises:
        ValueError: if there is no such n.

    Example:
        >>> blocks_per_stage(20)
        3
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth must be 6n + 2, such as 20, found {depth}")
    return (depth - 2) // 6
