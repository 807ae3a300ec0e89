"""qtool finetune: what it leaves, that it can be killed and resumed, and what it refuses."""

import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

FOUR_BITS = ("--qe-mode", "asym_u", "--qe-per-channel", "--qe-bits-acts", "4", "--qe-bits-wts", "4")
QUICK = (*FOUR_BITS, "--calib-samples", "32", "-b", "16", "--workers", "0")
CHECKPOINT = "quantized_checkpoint.pth.tar"

# Keeps the state at each step, and ends itself behind some of them.
KILLED = """
import os, signal, sys
from qtool.algorithms.lsq import Trainer
from qtool.pipeline.finetune import loop
loop.SAVE_SECONDS = 0
loop.SAVE_SHARE = 1e9
learn, (number, last, *words) = Trainer.learn, sys.argv[1:]

def learn_and_end(self, *args):
    loss = learn(self, *args)
    if self.step == int(last):
        os.kill(os.getpid(), int(number))
    return loss

Trainer.learn = learn_and_end
from qtool.cli import main
main(words)
"""


@pytest.fixture
def finetune(run_cli, chdir_tmp):
    """Run the command into a folder: finetune("out", *flags) -> its results and its folder."""

    def run(out, *flags):
        result = run_cli("finetune", *QUICK, "-o", out, *flags)
        assert result.exit_code == 0, result.output
        (path,) = chdir_tmp.glob(f"{out}/*/results.json")
        return json.loads(path.read_text()), path.parent

    return run


def _end(folder):
    """All that a run has found: the network, bit by bit."""
    content = torch.load(folder / CHECKPOINT, weights_only=True)
    return content["layers"], content["float_state"]


def _assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            _assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            _assert_equal(x, y)
    else:
        assert a == b


def test_training_helps_and_its_result_is_an_ordinary_checkpoint(finetune, run_cli, chdir_tmp):
    settings = ("--qe-bits-wts", "2", "--steps", "60", "--held-out", "0.2")
    record, folder = finetune("runs", *settings)
    told = record["finetuning"]
    assert told["held_out_loss_after"] < 0.5 * told["held_out_loss_before"] and told["kept"]
    assert record["quantized"]["loss"] < told["start"]["loss"]
    assert (told["images"], told["held_out"], told["steps"], told["resumed"]) == (720, 180, 60, 0)
    assert len((folder / "training_losses.csv").read_text().splitlines()) == 61
    for engine in ("simulate", "int8"):
        again = run_cli("evaluate", "--checkpoint", folder / CHECKPOINT, "--engine", engine, "-o", engine)
        assert again.exit_code == 0, again.output
        (path,) = chdir_tmp.glob(f"{engine}/*/results.json")
        found = json.loads(path.read_text())["quantized"]
        assert found["top1"] == pytest.approx(record["quantized"]["top1"], abs=0.4 * (engine == "int8"))
    exported = run_cli(
        "export", "--checkpoint", folder / CHECKPOINT, "--format", "encodings", "-o", "exported"
    )
    assert exported.exit_code == 0, exported.output


def test_the_held_out_loss_is_that_of_the_checkpoint(finetune, run_cli, chdir_tmp):
    """With cross-entropy alone it is the loss that the ordinary evaluation of those images finds."""
    flags = ("--qe-bits-wts", "2", "--steps", "30", "--distillation", "0", "--held-out", "0.1")
    record, folder = finetune("runs", *flags)
    assert record["finetuning"]["kept"]
    from qtool.config import load_config
    from qtool.data.calibration_set import calibration_indices
    from qtool.pipeline import steps
    from qtool.pipeline.inputs import Images, open_images, open_subject

    config = load_config(checkpoint=folder / CHECKPOINT, workers=0)
    subject = open_subject(config)
    dataset = open_images(config, None, "digits", "train", subject, None)
    held = calibration_indices(len(dataset), samples=90)
    images = Images(dataset, held, "", subject.preprocessing)
    found = steps.evaluate(subject.network, images.loader(config, 16))
    assert found.loss == pytest.approx(record["finetuning"]["held_out_loss_after"], rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_ended_goes_on_to_the_same_end(finetune, chdir_tmp, number):
    settings = ("--steps", "12", "--augment", "flip-crop")
    _, whole = finetune("whole", *settings)
    words = ["finetune", *QUICK, *settings, "-o", "ended"]
    (chdir_tmp / "killed.py").write_text(KILLED)
    command = [sys.executable, "killed.py", str(int(number)), "5", *words]
    # As many threads as here: sums depend on it.
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    ended = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    (folder,) = chdir_tmp.glob("ended/*/")
    if number == signal.SIGINT:
        assert ended.returncode == 1
        line = f"to go on: qtool finetune -c {folder.relative_to(chdir_tmp)}/config.yaml"
        assert line in ended.stderr and "Traceback" not in ended.stderr
    else:
        assert ended.returncode == -signal.SIGKILL
    assert not (folder / CHECKPOINT).exists()
    record, resumed = finetune("resumed", *settings, "--resume-training-from", str(folder))
    assert record["finetuning"]["resumed"] == 5 - (number == signal.SIGKILL)
    _assert_equal(_end(whole), _end(resumed))
    losses = [(path / "training_losses.csv").read_text() for path in (whole, resumed)]
    assert losses[0] == losses[1]


def test_the_end_does_not_depend_on_workers(finetune):
    (_, one), (_, two) = (finetune(f"w{n}", "--steps", "6", "--workers", n) for n in ("0", "2"))
    _assert_equal(_end(one), _end(two))


def test_another_seed_ends_elsewhere(finetune):
    (_, one), (_, two) = (finetune(f"s{n}", "--steps", "6", "--seed", n) for n in ("0", "1"))
    with pytest.raises(AssertionError):
        _assert_equal(_end(one), _end(two))


def test_a_start_that_is_better_is_kept(finetune, run_cli):
    """A rate that throws all weights about makes things worse."""
    record, _ = finetune("runs", "--qe-bits-wts", "8", "--qe-bits-acts", "8", "--steps", "3", "--lr", "2")
    told = record["finetuning"]
    assert not told["kept"] and told["held_out_loss_after"] > told["held_out_loss_before"]
    assert record["quantized"]["loss"] == told["start"]["loss"]


def test_training_starts_from_corrections(finetune, run_cli, chdir_tmp):
    record, _ = finetune("runs", "--corrections", "gptq,bias_correction", "--steps", "4", "--lr", "1e-6")
    assert {m["method"] for m in record["corrections"]["methods"]} == {"gptq", "bias_correction"}
    result = run_cli("quantize", *QUICK, "--corrections", "gptq,bias_correction", "-o", "corrected")
    assert result.exit_code == 0, result.output
    (path,) = chdir_tmp.glob("corrected/*/results.json")
    assert json.loads(path.read_text())["quantized"]["loss"] == record["finetuning"]["start"]["loss"]


def test_a_resumed_run_takes_over_corrections(finetune, run_cli, chdir_tmp):
    flags = ("--corrections", "gptq", "--steps", "4")
    _, whole = finetune("whole", *flags)
    result = run_cli("finetune", *QUICK, *flags, "-o", "again", "--resume-training-from", whole)
    assert result.exit_code == 0, result.output
    assert "layers that the earlier run has finished are taken over" in result.stderr
    (folder,) = chdir_tmp.glob("again/*/")
    _assert_equal(_end(whole), _end(folder))


def test_a_loss_that_is_lost_names_the_step_and_keeps_the_state(run_cli, chdir_tmp, monkeypatch):
    from qtool.algorithms.lsq import Trainer
    from qtool.pipeline.finetune import loop

    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(loop, "SAVE_SHARE", 1e9)
    loss_of = Trainer.loss_of

    def loss_of_few(self, *args):
        return loss_of(self, *args) * (math.nan if self.step == 7 else 1)

    monkeypatch.setattr(Trainer, "loss_of", loss_of_few)
    result = run_cli("finetune", *QUICK, "--steps", "30", "-o", "runs")
    assert result.exit_code == 1
    (error,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert "training: step 8: the loss is not a finite number; lower the rates" in error
    (state,) = chdir_tmp.glob("runs/*/training_state.pt")
    assert "the state of step 7 is in" in error and state.name in error
    kept = torch.load(state, weights_only=True)
    assert all(bool(torch.isfinite(v).all()) for v in kept["state"]["network"].values())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--qe-dynamic",), "--qe-dynamic: finds grids batch by batch"),
        (("--qe-scale-approx-bits", "8"), "approximated by integers"),
        (("--train-split", "test"), "537 of the 537 evaluation images are also training images"),
        (("--train-data", "nowhere"), "nowhere: no such file"),
        (("--train-classes", "nowhere"), "is of --train-data, which is not given"),
        (("--distillation", "0", "--temperature", "2"), "--temperature: has an effect"),
        (("--resume-training-from", "."), "has no training_state.pt"),
        (("--qe-bits-wts", "0", "--qe-bits-acts", "0"), "nothing in it is quantized"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(run_cli, chdir_tmp, flags, words):
    result = run_cli("finetune", *QUICK, "--steps", "2", *flags)
    assert result.exit_code == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0]
    assert not list(chdir_tmp.glob("logs/*/results.json"))


@pytest.mark.parametrize(
    "flags",
    [("--lr", "nan"), ("--lr", "0"), ("--lr", "11"), ("--distillation", "1.1"), ("--distillation", "nan"),
     ("--held-out", "1"), ("--steps", "0"), ("--temperature", "-1"), ("--augment", "rotate")],
)  # fmt: skip
def test_a_value_out_of_range_is_wrong_usage(run_cli, flags):
    assert run_cli("finetune", *flags).exit_code == 2


def test_a_state_of_another_training_is_refused_and_named(finetune, run_cli):
    _, folder = finetune("runs", "--steps", "4")
    for flags, words in (
        (("--steps", "5"), "other steps"),
        (("--steps", "4", "-b", "8"), "other batch size"),
        (("--steps", "4", "--seed", "1"), "images"),
        (("--steps", "4", "--qe-bits-wts", "5"), "network or quantization"),
    ):
        result = run_cli("finetune", *QUICK, *flags, "--resume-training-from", folder)
        assert result.exit_code == 1 and words in result.stderr
    (folder / "training_state.pt").write_bytes(b"PK")
    result = run_cli("finetune", *QUICK, "--steps", "4", "--resume-training-from", folder)
    assert result.exit_code == 1 and "is no state of a training" in result.stderr


def test_labels_matter_to_cross_entropy_alone(run_cli, chdir_tmp):
    """The network has ten outputs; other images may have more classes where it learns from itself."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez("more.npz", images=pixels, labels=np.arange(40) % 12)
    flags = ("--train-data", "more.npz", "--steps", "2")
    assert run_cli("finetune", *QUICK, *flags).exit_code == 0
    result = run_cli("finetune", *QUICK, *flags, "--distillation", "0.5")
    assert result.exit_code == 1 and "but the model has 10 outputs" in result.stderr


def test_on_real_images_training_brings_back_what_four_bits_have_cost(run_cli, chdir_tmp, shared_data):
    cifar = shared_data / "cifar10"
    words = ("-a", "resnet20", "--checkpoint", cifar / "resnet20.pth", cifar / "test-1017.npz")
    words += ("--train-data", cifar / "train-5085.npz", "--first-last-bits", "8")
    words += ("--qe-clip-acts", "auto", "--qe-clip-wts", "mse", "--steps", "30", "-b", "32")
    words += ("--effective-test-size", "0.3", "--held-out", "0.02", "--workers", "0", *FOUR_BITS)
    result = run_cli("finetune", *words)
    assert result.exit_code == 0, result.output
    (path,) = chdir_tmp.glob("logs/*/results.json")
    told = json.loads(path.read_text())["finetuning"]
    assert told["dataset"] == "train-5085.npz" and told["images"] == 4983
    assert told["held_out_loss_after"] < 0.75 * told["held_out_loss_before"]
