"""Commands on real images and pretrained weights."""

import json
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

STATS = "acts_quantization_stats.yaml"
SMALL_NET = """
from torch import nn

def small(num_classes=10):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 7 * 7, num_classes)
    )

small.input_shape = (1, 28, 28)
"""


@pytest.fixture
def run(run_cli):
    """Run a command that must end well, and give its results and its folder."""

    def run(*args: object) -> tuple[dict, Path]:
        result = run_cli(*args)
        assert result.exit_code == 0, result.output
        folder = Path(result.stdout.splitlines()[-1])
        return json.loads((folder / "results.json").read_text()), folder

    return run


@pytest.fixture
def imagenet(shared_data):
    """The arguments for twenty images; the folder lacks most of the classes that the list has."""
    classes = shared_data / "imagenet-classes.txt"
    return (
        "--classes",
        classes,
        "--effective-test-size",
        "0.02",
        "-j",
        "0",
        shared_data / "imagenet-nips2017",
    )


def network(shared_data: Path, arch: str) -> tuple[object, ...]:
    return ("-a", arch, "--checkpoint", shared_data / "weights" / f"{arch}.pth")


def cifar(shared_data: Path, arch: str, name: str) -> tuple[object, ...]:
    return ("-a", arch, "--checkpoint", shared_data / "cifar10" / f"{name}.pth", "-j", "0",
            "--effective-test-size", "0.2", shared_data / "cifar10" / "test-1017.npz")  # fmt: skip


@pytest.mark.parametrize("arch", ["resnet18", "squeezenet1_1"])
def test_imagenet_network_keeps_its_predictions_in_eight_bits(arch, run, shared_data, imagenet):
    calibration = ("--calib-data", shared_data / "imagenet-sample", "--calib-samples", "8")
    record, _ = run(
        "quantize", *network(shared_data, arch), *calibration, "--qem", "asym_u", "--qepc", *imagenet
    )
    assert record["quantized"]["images"] == 20
    assert record["float"]["top1"] >= 50
    assert record["agreement"] >= 80
    assert record["calibration"] == {
        "images": 8, "skipped": 0, "dataset": "imagenet-sample", "overlap": 0,
    }  # fmt: skip


def test_stats_file_of_distiller_quantizes_resnet18(run, shared_data, imagenet):
    stats = shared_data / "distiller" / "resnet18_quant_stats.yaml"
    record, folder = run(
        "quantize", *network(shared_data, "resnet18"), "--qe-stats-file", stats, "--qepc", *imagenet
    )
    assert record["calibration"] == {"stats_file": str(stats)}
    assert record["quantized"]["top1"] >= 50
    assert not (folder / STATS).exists()


def test_folder_that_lacks_classes_needs_a_class_list(run_cli, shared_data):
    result = run_cli("evaluate", *network(shared_data, "resnet18"), shared_data / "imagenet-nips2017")
    assert result.exit_code == 1
    assert "430 class folders, but the model has 1000 outputs; say which class" in result.stderr
    assert not any(Path().rglob("*.json"))


@pytest.mark.parametrize(
    ("arch", "name"),
    [("resnet20", "resnet20"), ("resnet20_cifar", "resnet20_distiller")],
)
def test_cifar_network_keeps_its_accuracy_in_eight_bits(arch, name, run, shared_data):
    calibration = ("--calib-data", shared_data / "cifar10" / "train-5085.npz", "--calib-samples", "32")
    record, folder = run("quantize", *cifar(shared_data, arch, name), *calibration, "--qem", "asym_u")
    assert record["float"]["top1"] > 88
    assert abs(record["top1_difference"]) < 2.5
    evaluated, _ = run(
        "evaluate",
        "--checkpoint",
        folder / "quantized_checkpoint.pth.tar",
        *cifar(shared_data, arch, name)[4:],
    )
    assert evaluated["quantized"]["loss"] == record["quantized"]["loss"]


def test_checkpoint_of_the_other_cifar_resnet_is_refused(run_cli, shared_data):
    result = run_cli("evaluate", *cifar(shared_data, "resnet20", "resnet20_distiller"))
    assert result.exit_code == 1
    assert "resnet20_distiller.pth: does not fit resnet20: " in result.stderr.splitlines()[-1]


def test_network_of_a_user_file_runs_on_fashion_mnist(run, shared_data):
    Path("nets").mkdir()
    Path("nets", "net.py").write_text(SMALL_NET)
    images = ("--dataset", "fashion-mnist", "--effective-test-size", "0.01", "-j", "0", shared_data)
    options = ("-a", "nets/net.py:small", "--save-predictions", "p.npz", "--calib-samples", "32")
    record, _ = run("quantize", *options, *images)
    assert record["model"]["arch"] == "nets/net.py:small"
    assert record["calibration"]["overlap"] == 0
    assert len(np.load("p.npz")["label"]) == record["quantized"]["images"] == 100
