import hashlib
import pickle

import pytest
import torch
from torch import nn

from qtool.errors import ModelError
from qtool.models.checkpoint import (
    Mismatch,
    checkpoint_sha256,
    classes_of,
    compare_keys,
    load_state,
    read_checkpoint,
    state_dict_of,
)


@pytest.fixture
def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 10))


def assert_one_line(error):
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrap", [dict, lambda s: {"state_dict": s}, lambda s: {"epoch": 3, "model": s}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dict_is_found_and_stripped(net, tmp_path, wrap, prefix):
    saved = {prefix + key: tensor for key, tensor in net.state_dict().items()}
    torch.save(wrap(saved), tmp_path / "net.pth")
    state = state_dict_of(read_checkpoint(tmp_path / "net.pth"), tmp_path)
    assert state.keys() == net.state_dict().keys()
    assert torch.equal(state["3.weight"], net[3].weight)


def test_module_is_kept_when_it_is_part_of_a_name(tmp_path):
    state = {"module.weight": torch.ones(1), "submodule.module.weight": torch.ones(1)}
    assert state_dict_of(state, tmp_path).keys() == state.keys()


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "net.pth").write_bytes(b"abc")
    assert checkpoint_sha256(tmp_path / "net.pth") == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize(
    "content", [b"hello world\n", b"\x80\x02}q\x00.", b"PK\x03\x04" + b"x" * 100, b"a" * 99]
)
def test_foreign_bytes_are_refused(tmp_path, content):
    (tmp_path / "net.pth").write_bytes(content)
    with pytest.raises(ModelError, match=r"net\.pth: is no torch checkpoint, or is cut short; ") as error:
        read_checkpoint(tmp_path / "net.pth")
    assert_one_line(error)


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.99])
@pytest.mark.parametrize("new_format", [True, False])
def test_truncated_file_is_refused(net, tmp_path, kept, new_format):
    path = tmp_path / "net.pth"
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=new_format)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ModelError, match="cut short"):
        read_checkpoint(path)


def test_missing_empty_and_folder_are_told_apart(tmp_path):
    (tmp_path / "empty.pth").touch()
    for name, found in {"no.pth": "no such file", "empty.pth": "is empty", ".": "is a folder"}.items():
        for read in (read_checkpoint, checkpoint_sha256):
            with pytest.raises(ModelError, match=found):
                read(tmp_path / name)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (pickle.loads, (b"",))

    torch.save({"state_dict": {}, "extra": Payload()}, tmp_path / "net.pth")
    with pytest.raises(
        ModelError, match=r"needs the class _?pickle\.loads,.* save its plain state_dict"
    ) as error:
        read_checkpoint(tmp_path / "net.pth")
    assert_one_line(error)


def test_whole_module_is_refused_with_its_class_named(net, tmp_path):
    torch.save(net, tmp_path / "net.pth")
    with pytest.raises(ModelError, match=r"needs the class torch\.nn\.modules"):
        read_checkpoint(tmp_path / "net.pth")


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_named(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "net.pt")
    with pytest.raises(ModelError, match="is a TorchScript program"):
        read_checkpoint(tmp_path / "net.pt")


def test_tensor_is_not_a_checkpoint(tmp_path):
    torch.save(torch.ones(3), tmp_path / "x.pth")
    with pytest.raises(ModelError, match="holds a Tensor, not named tensors"):
        read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"state_dict": {}}, {"model": "resnet18"}])
def test_mapping_without_state_dict_is_refused(tmp_path, content):
    with pytest.raises(ModelError, match="no state_dict in it, found"):
        state_dict_of(content, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_name_their_key(net, tmp_path, value):
    state = net.state_dict()
    state["3.bias"][2] = value
    with pytest.raises(ModelError, match=r"'3\.bias' holds NaN or infinity"):
        state_dict_of(state, tmp_path)


def test_quantized_checkpoint_points_to_evaluate(tmp_path):
    with pytest.raises(ModelError, match="already quantized; use 'qtool evaluate --checkpoint"):
        state_dict_of({"format": "qtool-quantized", "state_dict": {}}, tmp_path)


def test_counters_of_batch_norm_may_be_absent(net):
    state = {key: tensor + 1 for key, tensor in net.state_dict().items() if "num_batches" not in key}
    assert not compare_keys(net, state)
    load_state(net, state)
    assert torch.equal(net[1].running_mean, torch.ones(4))


def test_mismatch_names_three_keys_and_the_total(net):
    state = {"0.weight": torch.ones(4, 3, 1, 1), "extra": torch.ones(1)}
    assert str(compare_keys(net, state)) == (
        "7 missing (0.bias, 1.weight, 1.bias, ...), 1 unexpected (extra), "
        "1 of another shape (0.weight (4, 3, 1, 1) rather than (4, 3, 3, 3))"
    )


def test_classes_are_the_rows_of_the_last_layer(net):
    state = net.state_dict() | {"3.weight": torch.ones(7, 4), "3.bias": torch.ones(7)}
    assert classes_of(compare_keys(net, state), net) == 7


@pytest.mark.parametrize(
    "changed",
    [
        {"3.weight": torch.ones(7, 5), "3.bias": torch.ones(7)},
        {"3.weight": torch.ones(7, 4)},
        {"3.weight": torch.ones(7, 4), "3.bias": torch.ones(8)},
        {"3.weight": torch.ones(7, 4), "3.bias": torch.ones(7), "1.bias": torch.ones(5)},
        {"3.weight": torch.ones(7, 4), "3.bias": torch.ones(7), "extra": torch.ones(1)},
    ],
)
def test_classes_are_unknown_when_anything_else_differs(net, changed):
    mismatch = compare_keys(net, net.state_dict() | changed)
    assert mismatch and classes_of(mismatch, net) is None


def test_nothing_differs_when_it_fits(net):
    mismatch = compare_keys(net, net.state_dict())
    assert mismatch == Mismatch((), (), ())
    assert classes_of(mismatch, net) is None


def test_real_distiller_file_that_needs_code_is_refused(shared_data):
    path = shared_data / "distiller" / "resnet20_cifar10_checkpoint.pth.tar"
    with pytest.raises(ModelError, match=r"needs the class torch\.optim\.sgd\.SGD"):
        read_checkpoint(path)
