"""What many tests share: small networks, their batches, and places to read and write."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

# No deadline, as torch's first call is slow; derandomized, so that a failure is the same for everyone.
hypothesis.settings.register_profile("qtool", deadline=None, derandomize=True)
hypothesis.settings.load_profile("qtool")
# A shell lets what it starts in the background ignore Ctrl-C, and so would what tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class TinyNet(nn.Module):
    """conv-bn-relu, depthwise conv-bn-relu6, residual add, pooling, flatten, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu2 = nn.ReLU6()
        self.pool = nn.AvgPool2d(2)
        self.fc = nn.Linear(8 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = x + self.relu2(self.bn2(self.depthwise(x)))
        x = torch.flatten(self.pool(x), 1)
        return self.fc(x)


@pytest.fixture
def tiny_net() -> TinyNet:
    """A seeded network in eval mode, (N, 3, 8, 8) -> (N, 10); its batch norms change x, its ReLU6 clips."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = TinyNet().eval()
        for bn in (net.bn1, net.bn2):
            nn.init.uniform_(bn.weight, 1.0, 4.0)
            nn.init.normal_(bn.bias, std=2.0)
            nn.init.normal_(bn.running_mean, std=0.5)
            nn.init.uniform_(bn.running_var, 0.2, 2.0)
    return net


@pytest.fixture
def tiny_batches() -> list[Tensor]:
    """Three seeded batches for tiny_net, each (4, 3, 8, 8)."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(3)]


class ChainNet(nn.Module):
    """As in MobileNetV2: conv, depthwise and 1 x 1 convolutions with ReLU6 or nothing between, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(8), nn.ReLU6()
        self.project = nn.Conv2d(8, 4, 1, bias=False)
        self.expand, self.relu3 = nn.Conv2d(4, 6, 1), nn.ReLU()
        self.pool, self.dropout = nn.AvgPool2d(3), nn.Dropout()
        self.fc = nn.Linear(6 * 2 * 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.depthwise(x)))
        x = self.pool(self.relu3(self.expand(self.project(x))))
        return self.fc(self.dropout(torch.flatten(x, 1)))


@pytest.fixture
def chain_net() -> ChainNet:
    """Seeded, in eval mode, (N, 3, 8, 8) -> (N, 5); channels differ thirtyfold, and ReLU6 clips some."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ChainNet().eval().requires_grad_(False)
        for conv, bn, mean_square in ((net.conv1, net.bn1, 1.0), (net.depthwise, net.bn2, 4.0)):
            bn.running_var.copy_(mean_square * conv.weight.square().sum((1, 2, 3)))
            bn.weight.copy_(torch.logspace(-0.8, 0.7, 8)[torch.randperm(8)])
            nn.init.normal_(bn.bias, std=0.3)
        net.project.weight *= torch.logspace(-1, 1, 8)[torch.randperm(8)][:, None, None]
        net.expand.weight *= torch.logspace(-1, 1, 6)[torch.randperm(6)][:, None, None, None]
    return net


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


@pytest.fixture
def run_cli(runner: CliRunner, chdir_tmp: Path) -> Callable[..., Result]:
    """Run a command in an empty folder: run_cli("layers", "-a", path) -> exit_code, stdout, stderr."""

    def run(*args: object) -> Result:
        from qtool.cli import main

        return runner.invoke(main, [str(arg) for arg in args], prog_name="qtool")

    return run


@pytest.fixture
def chdir_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the working directory while the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and pretrained weights, which is not part of the repository."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("QTOOL_DATA") or default).absolute()
    if not folder.is_dir():
        pytest.skip("needs real images and weights: set QTOOL_DATA to the folder that holds them")
    return folder
