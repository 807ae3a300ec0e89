import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import qtool
from qtool.deploy.native import Target, convert, supported_backends
from qtool.deploy.native.files import ENTRY, from_file, is_native_file, to_file
from qtool.deploy.native.kernels import Conv, PinnedConv
from qtool.errors import ModelError

# A process in which qtool cannot be imported loads the file, whatever its engine, and runs it.
LOADER = """
import sys, warnings
warnings.simplefilter("ignore")
class NoQtool:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "qtool":
            raise ImportError("qtool is not here")
sys.meta_path.insert(0, NoQtool())
import torch
network = torch.jit.load(sys.argv[1])
x = torch.load(sys.argv[2], weights_only=True)
torch.save(network(x), sys.argv[3])
try:
    import qtool
except ImportError as error:
    print(error)
"""


@pytest.fixture(params=supported_backends())
def native(request, quantized):
    model = quantized(mode="asym_u", mode_weights="sym", per_channel_weights=True, bits_activations=8)
    return convert(model, Target.here(request.param))


@pytest.fixture
def saved(native, kernel_batch, tmp_path) -> Path:
    path = tmp_path / "native.pt"
    path.write_bytes(to_file(native, kernel_batch[:2], arch="kernel_net", input_shape=[3, 8, 8]))
    return path


def test_a_loaded_file_packs_weights_once(native, saved, kernel_batch):
    program = from_file(saved)
    packed = []
    for _ in range(3):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            program(kernel_batch)
        packed.append(sum("qconv_prepack" in event.name for event in profile.events()))
    pinned = sum(isinstance(module, PinnedConv) for module in native.network.modules())
    assert packed == [pinned, 0, 0]


@pytest.mark.skipif(
    not Target.here().vnni, reason="sums saturate on this processor: such layers are simulated"
)
def test_integers_go_straight_into_a_pinned_convolution(tmp_path):
    """From the one in front of it, which it alone reads."""
    torch.manual_seed(0)
    expand, depthwise = nn.Conv2d(3, 112, 1), nn.Conv2d(112, 112, 3, padding=1, groups=112)
    for layer in (expand, depthwise):
        layer.weight.data *= 4 * torch.rand(112, 1, 1, 1)
    net = nn.Sequential(expand, nn.ReLU6(), depthwise, nn.ReLU6(), nn.Conv2d(112, 4, 1), nn.Flatten()).eval()
    x = torch.randn(4, 3, 6, 6)
    config = qtool.QuantizeConfig(mode="asym_u", mode_weights="sym", per_channel_weights=True)
    native = convert(qtool.quantize(net, qtool.calibrate(net, [x]), config))
    assert [type(native.network.get_submodule(name)) for name in "024"] == [Conv, PinnedConv, Conv]
    path = tmp_path / "native.pt"
    path.write_bytes(to_file(native, x[:2]))
    program = from_file(path)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = program(x)
    assert torch.equal(found, native(x))
    names = [event.name for event in profile.events()]
    assert names.count("onednn::qconv_pointwise") == 2 and names.count("quantized::conv2d") == 1
    # Of the result, and of nothing in between.
    assert names.count("aten::int_repr") == 1


def test_a_fresh_process_without_qtool_gives_the_same(native, saved, kernel_batch, tmp_path):
    if native.target.backend != "qnnpack":  # whose depthwise kernel is its own; see docs
        kinds = {type(module) for module in native.network.modules()}
        assert not Target.here().vnni or PinnedConv in kinds
    x, y = tmp_path / "x.pt", tmp_path / "y.pt"
    torch.save(kernel_batch, x)
    command = [sys.executable, "-c", LOADER, str(saved), str(x), str(y)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "qtool is not here"
    found = torch.load(y, weights_only=True)
    if native.target.backend == "qnnpack":  # loaded on the engine x86
        assert torch.equal(found.argmax(1), native(kernel_batch).argmax(1))
    else:
        assert torch.allclose(found, native(kernel_batch), atol=0.02)


def test_a_file_gives_the_very_logits_for_any_number_of_images(native, saved, kernel_batch):
    loaded = from_file(saved)
    for batch in (kernel_batch, kernel_batch[:1], kernel_batch.repeat(3, 1, 1, 1)):
        assert torch.equal(loaded(batch), native(batch))
    assert loaded.info["backend"] == native.target.backend
    assert loaded.info["model"] == {"arch": "kernel_net", "input_shape": [3, 8, 8]}
    assert loaded.info["layers"]["conv1"]["runs"] == native.layers["conv1"].runs


def test_the_engine_of_the_process_stays_as_it_was(saved):
    former = torch.backends.quantized.engine
    from_file(saved)
    assert torch.backends.quantized.engine == former


def test_only_converted_networks_are_taken_for_one(saved, tmp_path):
    assert is_native_file(saved)
    torch.save({"weight": torch.ones(1)}, tmp_path / "weights.pt")
    (tmp_path / "text.pt").write_text("hello")
    assert not any(is_native_file(tmp_path / name) for name in ("weights.pt", "text.pt", "none.pt"))


def rewritten(path: Path, change) -> Path:
    """The file with entries changed: change(name, content) gives the new content, or None to leave it out."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    changed = path.with_name("changed.pt")
    with zipfile.ZipFile(changed, "w") as archive:
        for name, content in entries.items():
            new = change(name, content)
            if new is not None:
                archive.writestr(name, new)
    return changed


def with_info(**values):
    def change(name, content):
        return json.dumps({**json.loads(content), **values}) if name.endswith(ENTRY) else content

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_info(version=9), "format version 9, this one reads 1"),
        (with_info(format="mine"), "its entry qtool.json is not qtool's"),
        (with_info(backend="abacus"), "made for the engine 'abacus', which this build of torch lacks"),
        (lambda name, content: b"{" if name.endswith(ENTRY) else content, "a damaged converted network"),
        (lambda name, content: None if "/code/" in name else content, "a damaged converted network"),
        (
            lambda name, content: content[:9] if "/data.pkl" in name else content,
            "a damaged converted network",
        ),
    ],
)
def test_a_file_changed_by_hand_is_refused(saved, change, message):
    changed = rewritten(saved, change)
    with pytest.raises(ModelError, match=message) as error:
        from_file(changed)
    assert str(changed) in str(error.value) and "\n" not in str(error.value)
