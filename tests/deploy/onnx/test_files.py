"""Exported files: without qtool, read back, changed by hand, damaged."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch

import qtool
from qtool.deploy.onnx import float_model, qdq_model, to_model
from qtool.deploy.onnx.files import ENTRY, from_file, to_bytes
from qtool.errors import ModelError
from qtool.graph.fold import fold_batch_norms


@pytest.fixture
def exported(tiny_net, tiny_batches, tmp_path):
    """The simulation, an exported file, and a batch."""
    model = qtool.quantize(tiny_net, qtool.calibrate(tiny_net, tiny_batches))
    proto = to_model(qdq_model(model, (3, 8, 8)), "tiny")
    path = tmp_path / "tiny.onnx"
    path.write_bytes(to_bytes(proto, {"model": {"arch": "tiny"}}))
    return model, path, tiny_batches[0]


def test_a_file_runs_in_a_fresh_process_that_cannot_import_qtool(exported, tmp_path):
    model, _, x = exported
    np.save(tmp_path / "x.npy", x.numpy())
    program = (
        "import sys, numpy as np, onnxruntime\n"
        "sys.modules['qtool'] = None\n"
        "s = onnxruntime.InferenceSession('tiny.onnx', providers=['CPUExecutionProvider'])\n"
        "np.save('y.npy', s.run(None, {'x': np.load('x.npy')})[0])\n"
        "assert not [m for m in sys.modules if m.startswith(('qtool.', 'torch'))]\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(x)
    step = float(model.plan.layers["fc"].output.scale)
    assert (torch.from_numpy(np.load(tmp_path / "y.npy")) - expected).abs().max() <= 1.01 * step


def test_a_float_file_runs_in_a_fresh_process_that_cannot_import_qtool(tiny_net, tiny_batches, tmp_path):
    folded = fold_batch_norms(qtool.trace(tiny_net, tiny_batches[0])).traced
    proto = to_model(float_model(folded, (3, 8, 8)), "tiny")
    (tmp_path / "tiny.onnx").write_bytes(to_bytes(proto, {"model": {"arch": "tiny"}}))
    np.save(tmp_path / "x.npy", tiny_batches[0].numpy())
    program = (
        "import sys, numpy as np, onnxruntime\n"
        "sys.modules['qtool'] = None\n"
        "s = onnxruntime.InferenceSession('tiny.onnx', providers=['CPUExecutionProvider'])\n"
        "np.save('y.npy', s.run(None, {'x': np.load('x.npy')})[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = tiny_net(tiny_batches[0])
    assert torch.allclose(torch.from_numpy(np.load(tmp_path / "y.npy")), expected, atol=1e-4)


def test_a_file_is_read_back_as_it_was_written(exported):
    model, path, x = exported
    network, is_as_written = from_file(path)
    assert is_as_written and network.info["model"] == {"arch": "tiny"}
    assert torch.equal(network(x).argmax(1), model(x).argmax(1))


def test_a_changed_graph_is_noticed(exported):
    _, path, _ = exported
    proto = onnx.load(path)
    proto.graph.node[0].name = "another"
    onnx.save(proto, path)
    assert not from_file(path)[1]


def without_entry(proto):
    del proto.metadata_props[:]


def with_other_entry(proto):
    (entry,) = (e for e in proto.metadata_props if e.key == ENTRY)
    entry.value = '{"format": "another"}'


def with_newer_entry(proto):
    (entry,) = (e for e in proto.metadata_props if e.key == ENTRY)
    entry.value = '{"format": "qtool-onnx", "version": 99}'


def with_missing_tensor(proto):
    del proto.graph.initializer[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_entry, "has no entry 'qtool' in its metadata"),
        (with_other_entry, "its entry 'qtool' is not qtool's"),
        (with_newer_entry, "format version 99, this one reads 1"),
        (with_missing_tensor, "a damaged ONNX model: "),
    ],
)
def test_a_file_that_was_changed_by_hand_is_refused(change, message, exported):
    _, path, _ = exported
    proto = onnx.load(path)
    change(proto)
    onnx.save(proto, path)
    with pytest.raises(ModelError) as refused:
        from_file(path)
    assert str(refused.value).startswith(f"{path}: ") and message in str(refused.value)


@pytest.mark.parametrize("size", [10, 1000])
def test_a_file_that_was_cut_off_is_refused(size, exported):
    _, path, _ = exported
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"ONNX model|has no entry"):
        from_file(path)
