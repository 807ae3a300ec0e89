import pytest
import torch

from qtool.errors import ModelError
from qtool.models import load_model
from qtool.models.user_file import split_user_file

NET = """\
import torch
from torch import nn

def small(num_classes=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))

def fixed():
    return small()

def shaped():
    net = small()
    net.input_shape = (3, 2, 2)
    return net

def broken():
    raise RuntimeError("two\\nlines")

def number():
    return 3

def two_tensors():
    class Net(nn.Module):
        def forward(self, x):
            return x, x
    return Net()

def leave():
    raise SystemExit(2)

fixed.input_shape = (3, 2, 2)
"""


@pytest.fixture
def net_py(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    return tmp_path / "net.py"


def test_factory_is_called(net_py):
    loaded = load_model(f"{net_py}:small", input_shape=(3, 2, 2), num_classes=7)
    assert loaded.model(torch.zeros(2, 3, 2, 2)).shape == (2, 7)
    assert loaded.preprocessing is None
    assert loaded.arch == f"{net_py}:small"
    assert loaded.weights == f"weights of {net_py}:small"


@pytest.mark.parametrize("name", ["fixed", "shaped"])
def test_input_shape_may_be_an_attribute(net_py, name):
    assert load_model(f"{net_py}:{name}").input_shape == (3, 2, 2)


def test_checkpoint_of_the_users_own_network(net_py, tmp_path):
    saved = load_model(f"{net_py}:fixed", seed=1).model
    torch.save(saved.state_dict(), tmp_path / "net.pth")
    loaded = load_model(f"{net_py}:fixed", checkpoint=tmp_path / "net.pth")
    assert torch.equal(loaded.model[1].weight, saved[1].weight)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("small", "the shape of its input is not known; give --input-shape"),
        ("smal", "no function called 'smal'; did you mean 'small'"),
        ("broken", r"net\.py:16: broken\(\) raised RuntimeError: two lines; correct it there"),
        ("leave", r"net\.py:28: leave\(\) raised SystemExit: 2"),
        ("number", r"number\(\) returned a int; it should return an nn\.Module"),
    ],
)
def test_what_is_wrong_with_a_factory_is_one_line(net_py, name, message):
    with pytest.raises(ModelError, match=message) as error:
        load_model(f"{net_py}:{name}")
    assert "\n" not in str(error.value)


def test_num_classes_needs_a_parameter(net_py):
    with pytest.raises(ModelError, match=r"fixed\(num_classes=3\) cannot be called"):
        load_model(f"{net_py}:fixed", num_classes=3)


def test_a_network_without_logits_is_refused(net_py):
    with pytest.raises(
        ModelError, match=r"for one image it gives a tuple of 2, the first a tensor of shape .*\(N, classes\)"
    ):
        load_model(f"{net_py}:two_tensors", input_shape=(3, 2, 2))


def test_file_may_import_its_neighbour(tmp_path):
    (tmp_path / "qtool_test_layers.py").write_text(
        "from torch import nn\nclass Head(nn.Flatten):\n    pass\n"
    )
    (tmp_path / "net.py").write_text("from qtool_test_layers import Head\n")
    assert load_model(f"{tmp_path / 'net.py'}:Head", input_shape=(4,)).input_shape == (4,)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def net(:\n", r"net\.py:1: importing it raised SyntaxError"),
        ("\nimport no_such_package\n", r"net\.py:2: importing it raised ModuleNotFoundError"),
    ],
)
def test_file_that_cannot_be_imported(tmp_path, source, message):
    (tmp_path / "net.py").write_text(source)
    with pytest.raises(ModelError, match=message):
        load_model(f"{tmp_path / 'net.py'}:net")


def test_missing_file_and_missing_function_name(tmp_path):
    with pytest.raises(ModelError, match=r"no\.py: no such file"):
        load_model(f"{tmp_path / 'no.py'}:net")
    with pytest.raises(ModelError, match=r"names no function; give .*net\.py:FUNCTION"):
        load_model(f"{tmp_path / 'net.py'}")


def test_names_of_networks_are_not_files():
    assert split_user_file("resnet18") is None


def test_logits_may_be_in_a_dict(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Flatten):\n"
        "    def forward(self, x):\n"
        "        return {'features': x, 'logits': super().forward(x)}\n"
    )
    assert load_model(f"{tmp_path / 'net.py'}:Net", input_shape=(1, 2, 2)).input_shape == (1, 2, 2)
