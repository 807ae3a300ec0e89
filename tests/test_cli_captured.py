"""A user's own file with a network that decides by the values of its images, from the command line."""

from pathlib import Path

import numpy as np
import pytest
import yaml

import qtool

NET = """\
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.bright, self.dark = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8 * 16, 10)

    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        if x.mean() > LIMIT:
            y = self.bright(y) + y
        else:
            y = self.dark(y)
        y = F.max_pool2d(y, 2)
        return {"features": y, "logits": self.fc(y.flatten(1))}

def seeded():
    torch.manual_seed(0)
    return Net()

def blank():
    return Net()

def listing():
    net = Net()
    net.forward = lambda x: [x, x]
    return net

def rounded():
    class Rounded(Net):
        def forward(self, x):
            return super().forward(x if int(x.mean()) == 0 else -x)
    return Rounded()

for factory in (seeded, blank, listing, rounded):
    factory.input_shape = (1, 8, 8)
"""


@pytest.fixture
def folder(chdir_tmp) -> Path:
    """net.py, whose branches about half of the batches take, and set.npz with digits."""
    content = np.load(Path(qtool.__file__).parent / "data" / "digits.npz")
    np.savez(chdir_tmp / "set.npz", images=content["images"][:96], labels=content["labels"][:96])
    (chdir_tmp / "net.py").write_text(NET.replace("LIMIT", "-0.4"))
    return chdir_tmp


OPTIONS = ("--qem", "asym_u", "--calib-samples", "32", "-b", "2", "--workers", "0")


def test_it_is_quantized_saved_loaded_and_evaluated(folder, run_cli):
    quantized = run_cli("quantize", "-a", "net.py:seeded", "set.npz", *OPTIONS, "-o", "logs")
    assert quantized.exit_code == 0, quantized.output
    (checkpoint,) = Path("logs").rglob("quantized_checkpoint.pth.tar")
    (params,) = Path("logs").rglob("layer_quant_params.yaml")
    assert {"conv", "bright", "dark", "fc"} <= yaml.safe_load(params.read_text()).keys()
    again = run_cli("evaluate", "-a", "net.py:blank", "--checkpoint", checkpoint, "set.npz", *OPTIONS[4:])
    assert again.exit_code == 0, again.output

    def row(text: str) -> list[str]:
        (line,) = (line for line in text.splitlines() if line.startswith("quantized "))
        return line.split()[:5]

    assert row(again.stdout) == row(quantized.stdout)


def test_layers_shows_both_branches_and_their_work(folder, run_cli):
    result = run_cli("layers", "-a", "net.py:seeded")
    names = [line.split()[0] for line in result.stdout.splitlines()]
    assert names[1:] == ["conv", "bn", "relu", "mean", "bright", "add", "dark", "max_pool2d", "fc", "100.0"]
    assert "float (only decides which branch is taken)" in result.stdout


def test_a_branch_without_calibration_images_is_named_in_a_warning(folder, run_cli):
    (folder / "net.py").write_text(NET.replace("LIMIT", "-9.0"))
    result = run_cli("quantize", "-a", "net.py:seeded", "set.npz", *OPTIONS, "-o", "logs")
    assert result.exit_code == 0, result.output
    assert "1 layers stay in float, such as dark: no calibration image took its branch" in result.stderr


@pytest.mark.parametrize(
    "factory, words",
    [
        ("listing", "net.py:listing: for one image it gives a list of 2, the first a tensor of shape"),
        ("rounded", "the network cannot be captured: "),
    ],
)
def test_what_cannot_be_taken_is_one_line(folder, run_cli, factory, words):
    result = run_cli("quantize", "-a", f"net.py:{factory}", "set.npz", *OPTIONS)
    assert result.exit_code == 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error:"))
    assert words in line
    assert factory == "listing" or "(return super().forward(x if int(x.mean()) == 0 else -x))" in line
    assert "Traceback" not in result.output
