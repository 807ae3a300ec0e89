"""What a long method keeps of each layer, on disk."""

import pytest
import torch
from torch import nn

from qtool.errors import ConfigError
from qtool.pipeline.layer_files import LayerFiles, fingerprint_of
from qtool.quantizers.plan import LayerPlan, ModelPlan


def test_tensors_come_back_bit_by_bit(tmp_path):
    tensors = {
        "weight_q": torch.arange(6, dtype=torch.uint8),
        "bias": torch.randn(3),
        "n": torch.tensor(0.1).double(),
    }
    LayerFiles(tmp_path / "a", "x").put("layer1.0.conv1", tensors)
    found = LayerFiles(tmp_path / "a", "x").get("layer1.0.conv1")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_other_inputs_and_other_keys_have_no_entry(tmp_path):
    LayerFiles(tmp_path, "x").put("fc", {"a": torch.ones(1)})
    assert LayerFiles(tmp_path, "y").get("fc") is None
    assert LayerFiles(tmp_path, "x").get("FC") is None
    LayerFiles(tmp_path, "y").put("fc", {"a": torch.zeros(1)})
    assert LayerFiles(tmp_path, "y").get("fc")["a"] == 0


def test_an_entry_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    files = LayerFiles(tmp_path, "x")
    files.put("fc", {"a": torch.ones(1)})

    def fail(entry, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(Exception, match="No space left"):
        files.put("fc", {"a": torch.zeros(1)})
    assert files.get("fc")["a"] == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04"])
def test_a_file_of_something_else_is_named(tmp_path, content):
    files = LayerFiles(tmp_path, "x")
    files.put("fc", {"a": torch.ones(1)})
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is no result of a layer; delete it"):
        files.get("fc")


def test_everything_that_results_depend_on_is_in_the_fingerprint():
    net, batches = nn.Linear(2, 2), [torch.ones(2, 2), torch.zeros(1, 2)]
    plan = ModelPlan({"fc": LayerPlan("integer", "linear", weight_q=torch.ones(2, 2, dtype=torch.int8))})
    other = ModelPlan({"fc": LayerPlan("integer", "linear", weight_q=torch.zeros(2, 2, dtype=torch.int8))})
    changed = nn.Linear(2, 2)
    changed.load_state_dict({"weight": net.weight.detach() + 1e-6, "bias": net.bias.detach()})
    prints = [
        fingerprint_of({"sweeps": 1}, [net], plan, batches),
        fingerprint_of({"sweeps": 2}, [net], plan, batches),
        fingerprint_of({"sweeps": 1}, [changed], plan, batches),
        fingerprint_of({"sweeps": 1}, [net], other, batches),
        fingerprint_of({"sweeps": 1}, [net], plan, batches[:1]),
        fingerprint_of({"sweeps": 1}, [net], plan, [torch.cat(batches)]),
    ]
    assert len(set(prints)) == len(prints)
    assert prints[0] == fingerprint_of({"sweeps": 1}, [net], plan, batches)
