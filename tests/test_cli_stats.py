"""qtool stats shows, compares and merges the files that qtool calibrate writes, and only such files."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

import qtool.data
from qtool.cli import main
from qtool.observers.files import read_stats
from qtool.observers.stats import records

STATS = "acts_quantization_stats.yaml"


def calibrate(folder: Path, name: str, *args: object) -> Path:
    """The statistics of a calibration of the embedded network."""
    words = ["calibrate", "-o", str(folder), "-n", name, "-j", "0", *(str(arg) for arg in args)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    return Path(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def calibrations(tmp_path_factory):
    """Files of the first and second part of some images, and of all of them; the parts differ in size."""
    folder = tmp_path_factory.mktemp("calibrations")
    digits = np.load(Path(qtool.data.__file__).parent / "digits.npz")
    key = next(name for name in digits.files if digits[name].ndim == 3)
    images = (digits[key][:200].astype(np.float64) * 15).clip(0, 255).astype(np.uint8)
    files = []
    for name, part in (("one", images[:72]), ("two", images[72:]), ("all", images)):
        np.savez(folder / f"{name}.npz", images=part, labels=np.zeros(len(part), dtype=np.int64))
        files.append(
            calibrate(folder, name, "--calib-data", folder / f"{name}.npz", "--calib-samples", len(part))
        )
    return files


@pytest.fixture
def stats(run_cli):
    """stats("show", FILE, ...): the result of a command, which must end well."""

    def stats(*args: object):
        done = run_cli("stats", *args)
        assert done.exit_code == 0, done.output
        return done

    return stats


def test_merged_halves_are_a_calibration_of_all_images(calibrations, stats, chdir_tmp):
    one, two, whole = calibrations
    assert (
        stats("merge", one, two, "-o", "merged.yaml").stdout == "2 calibrations of 27 layers\nmerged.yaml\n"
    )
    assert sorted(path.name for path in chdir_tmp.iterdir()) == ["merged.yaml", "merged_histograms.npz"]
    merged, wanted = read_stats(Path("merged.yaml")), read_stats(whole)
    assert merged.fingerprint == wanted.fingerprint
    theirs = dict(records(wanted))
    first = dict(records(read_stats(one)))
    for place, record in records(merged):
        other = theirs.pop(place)
        size = other.max - other.min
        assert (record.min, record.max, record.total_numel, record.shape) == (
            other.min, other.max, other.total_numel, other.shape,
        )  # fmt: skip
        # The network runs in other chunks, whose sums are rounded in another order.
        for name in ("avg_min", "avg_max", "mean", "std"):
            assert getattr(record, name) == pytest.approx(getattr(other, name), abs=1e-6 * size), (
                place,
                name,
            )
        # 2 |shift of the mean| x the largest error of the share of values below, one bin's, at both ends.
        share = (other.histogram.counts / other.histogram.total).max()
        shift = 2 * abs(first[place].mean - other.mean)
        assert abs(record.b - other.b) <= 4 * shift * share + 1e-6 * size
        assert record.histogram.total == other.histogram.total
        assert record.histogram.total_variation(other.histogram, 8192) < 1e-3
    assert not theirs
    assert stats("diff", "merged.yaml", whole, "--tolerance", "0.001").exit_code == 0


def test_merged_file_quantizes(calibrations, stats, run_cli):
    stats("merge", *calibrations[:2], "-o", "merged.yaml")
    done = run_cli("quantize", "--qe-stats-file", "merged.yaml", "--qe-stats-as-is", "--qe-clip-acts", "mse",
                   "--qe-bits-acts", "4", "--effective-test-size", "0.05", "-j", "0")  # fmt: skip
    assert done.exit_code == 0, done.output


def test_show_prints_a_table_with_histograms(calibrations, run_cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    done = run_cli("stats", "show", calibrations[0], "--layer", "conv1,relu")
    lines = done.stdout.splitlines()
    assert done.exit_code == 0
    assert [line.split()[0] for line in lines[1:5:2]] == ["conv1.inputs.0", "relu.output"]
    assert "█" in lines[4]
    assert len(lines[4]) > 120
    assert lines[3].split()[-2:] == [str(72 * 16 * 64), "1x16x8x8"]


def test_width_follows_the_terminal(calibrations, run_cli, monkeypatch):
    for width in (80, 100):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = run_cli("stats", "show", calibrations[0], "--layer", "relu").stdout.splitlines()
        assert max(len(line) for line in lines[:-2]) == width


def test_plain_bars_where_the_encoding_has_no_blocks(calibrations, chdir_tmp):
    done = CliRunner(charset="ascii").invoke(main, ["stats", "show", str(calibrations[0]), "--layer", "relu"])
    assert done.exit_code == 0, done.output
    assert "@" in done.stdout
    assert done.stdout.isascii()


def test_diff_ends_with_one_where_files_differ(calibrations, run_cli):
    one, two, _ = calibrations
    done = run_cli("stats", "diff", one, two, "--top", "2")
    assert done.exit_code == 1
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"A: {one}", f"B: {two}"]
    assert lines[-1] == "20 of 20 tensors differ"
    assert run_cli("stats", "diff", one, one).stdout == "20 tensors are equal\n"
    assert run_cli("stats", "diff", one, one).exit_code == 0


def test_other_weights_are_noticed(calibrations, run_cli, stats, chdir_tmp):
    from qtool.models import load_model

    state = load_model("digits_resnet").model.state_dict()
    state["fc.bias"] = state["fc.bias"] + 1
    torch.save(state, "mine.pth")
    other = calibrate(chdir_tmp, "w", "-a", "digits_resnet", "--checkpoint", "mine.pth", "--calib-samples", 9)
    done = run_cli("stats", "diff", calibrations[0], other, "--tolerance", "1")
    assert (done.exit_code, done.stdout.splitlines()[2]) == (1, "the weights differ")
    done = run_cli("stats", "merge", calibrations[0], other, "-o", "c.yaml")
    assert done.exit_code == 1
    assert "the weights differ; measure again with 'qtool calibrate', or add --as-is" in done.stderr
    stats("merge", calibrations[0], other, "-o", "c.yaml", "--as-is")
    assert "weights" not in yaml.safe_load(Path("c.yaml").read_text())[".qtool"]["fingerprint"]


def test_statistics_of_another_network_are_refused(calibrations, run_cli, chdir_tmp):
    Path("net.py").write_text(
        "from torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10))\n"
    )
    other = calibrate(chdir_tmp, "r", "-a", "net.py:make", "--input-shape", "1,8,8", "--calib-samples", 4)
    done = run_cli("stats", "merge", calibrations[0], other, "-o", "c.yaml", "--as-is")
    assert done.exit_code == 1
    assert "measured on another network than" in done.stderr
    assert not Path("c.yaml").exists()


BROKEN = {
    "missing": "cannot be read: No such file or directory",
    "folder": "cannot be read: Is a directory",
    "binary": "not a text file; a stats YAML is wanted",
    "wrong_key": "conv1.output: field 'max' is missing",
    "no_yaml": "not valid YAML",
    "damaged/s.yaml": "damaged/acts_histograms.npz: does not belong to damaged/s.yaml",
    "foreign/s.yaml": "foreign/acts_histograms.npz: does not belong to foreign/s.yaml",
}


@pytest.fixture
def broken(calibrations, chdir_tmp):
    """A folder with files that are no statistics, or not any more."""
    one, two, _ = calibrations
    Path("folder").mkdir()
    Path("binary").write_bytes(b"\xff\xfe\x00")
    Path("wrong_key").write_text("conv1: {output: {min: 0, maximum: 1}}")
    Path("no_yaml").write_text("a: [")
    for name, beside in (("damaged", one), ("foreign", two)):
        Path(name).mkdir()
        Path(name, "s.yaml").write_text(one.read_text())
        content = beside.with_name("acts_histograms.npz").read_bytes()
        Path(name, "acts_histograms.npz").write_bytes(content[:-9] if name == "damaged" else content)
    return chdir_tmp


@pytest.mark.parametrize("command", ["show", "diff", "merge"])
@pytest.mark.parametrize("name", BROKEN)
def test_file_that_is_no_statistics_is_one_line(name, command, broken, calibrations, run_cli):
    before = sorted(path.name for path in broken.iterdir())
    rest = {"show": (), "diff": (calibrations[1],), "merge": (calibrations[1], "-o", "out.yaml")}[command]
    done = run_cli("stats", command, name, *rest)
    assert (done.exit_code, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert BROKEN[name] in line
    assert sorted(path.name for path in broken.iterdir()) == before


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (
            ("show", "FILE", "--layer", "reluu"),
            1,
            "--layer: pattern 'reluu': matches no layer; did you mean 'relu'",
        ),
        (("diff", "FILE", "FILE", "--layer", "["), 1, "--layer: pattern '[': not a regular expression"),
        (("merge", "FILE", "-o", "x.yaml"), 2, "one file has nothing to be merged with"),
        (("merge", "FILE", "FILE"), 2, "Missing option '-o'"),
        (("merge", "FILE", "FILE", "-o", "x.yaml"), 1, "whose images would count twice"),
        (("merge", "FILE", "FILE", "-o", "FILE", "--force"), 1, "is an input; name another file with -o"),
        (("merge", "FILE", "FILE", "-o", "/dev/full/x.yaml"), 1, "no files can be made in /dev/full"),
        (("diff", "FILE", "FILE", "--tolerance", "2"), 2, "2.0 is not in the range 0<=x<=1"),
        (("diff", "FILE", "FILE", "--tolerance", "nan"), 2, "nan is not in the range 0<=x<=1"),
        (("show", "FILE", "--format", "xml"), 2, "'xml' is not one of"),
    ],
)
def test_what_cannot_be_done_is_said(args, code, message, calibrations, run_cli, chdir_tmp):
    done = run_cli("stats", *(calibrations[0] if arg == "FILE" else arg for arg in args))
    assert (done.exit_code, done.stdout) == (code, "")
    assert message in done.stderr
    assert not list(chdir_tmp.iterdir())


def test_files_of_distiller_are_shown_and_compared_but_not_merged(shared_data, calibrations, run_cli):
    theirs = [shared_data / "distiller" / f"resnet{n}_quant_stats.yaml" for n in (18, 50)]
    for file in theirs:
        assert run_cli("stats", "show", file).stdout.count("(no histogram)") > 40
    assert run_cli("stats", "diff", *theirs).exit_code == 1
    assert run_cli("stats", "diff", theirs[0], theirs[0]).exit_code == 0
    done = run_cli("stats", "merge", *theirs, "-o", "c.yaml")
    assert done.exit_code == 1
    assert "has no histograms (Distiller's files have none)" in done.stderr


@pytest.mark.parametrize("command", ["stats", "stats show", "stats diff", "stats merge"])
def test_help_stays_quick(command):
    script = (
        "import sys; from qtool.cli import main; main(sys.argv[1:], standalone_mode=False); "
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command.split(), "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False False"


# Distiller's --activation-histograms


@pytest.mark.parametrize(
    "command", [("calibrate",), ("quantize",), ("quantize", "--evaluate", "--quantize-eval")]
)
def test_activation_histograms_are_written_and_the_run_ends(command, run_cli, chdir_tmp):
    done = run_cli(*command, "--activation-histograms", "0.1", "-j", "0")
    assert done.exit_code == 0, done.output
    first, stats_file, file = done.stdout.splitlines()
    assert first == "27 layers of digits_resnet on 53 of 537 images of digits test (seed 0)"
    assert sorted(path.name for path in Path(file).parent.iterdir() if path.suffix != ".log") == [
        "acts_histograms.npz", "acts_histograms.pt", STATS, "config.yaml",
    ]  # fmt: skip
    tree = torch.load(file, weights_only=True)
    measured = read_stats(Path(stats_file))
    assert list(tree) == list(measured.layers)
    record = measured.layers["relu"].output
    found = tree["relu"]["output"]
    assert float(found["hist"].sum()) == pytest.approx(record.total_numel, rel=1e-4)
    half = (record.max - record.min) / 2048 / 2
    assert float(found["bin_centroids"][0]) == pytest.approx(record.min + half, rel=1e-4)
    # The mean out of the bins is the measured one.
    mean = float((found["hist"].double() * found["bin_centroids"]).sum() / found["hist"].double().sum())
    assert mean == pytest.approx(record.mean, abs=2 * half)


@pytest.mark.parametrize(
    "other",
    [
        ("--qe-stats-file", "s.yaml"),
        ("--qe-dynamic",),
        ("--qe-calibration", "0.1"),
        ("--qe-config-file", "q.yaml"),
        ("--fraction", "0.1"),
    ],
)
def test_activation_histograms_exclude_other_sources(other, run_cli, chdir_tmp):
    done = run_cli("quantize", "--activation-histograms", "0.1", *other)
    assert done.exit_code == 2
    assert f"--activation-histograms and {other[0]} exclude one another; give one of them." in done.stderr
    assert not list(chdir_tmp.iterdir())


@pytest.mark.parametrize("share", ["0", "1.5", "nan", "x"])
def test_share_of_activation_histograms_is_checked(share, run_cli):
    assert run_cli("calibrate", "--activation-histograms", share).exit_code == 2
