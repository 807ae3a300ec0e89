import copy
import operator
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from torch import fx, nn
from torch.nn import functional as F

from qtool.errors import ModelError
from qtool.graph import ops
from qtool.graph.trace import copy_graph, layers, tensor_inputs, trace

X = torch.linspace(-2, 2, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.conv(self.relu(self.conv(x))))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = F.relu(self.conv(x)) + x
        y = torch.cat([y, x], 1)[:, :3]
        return torch.relu(y) + y * x


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.stage = nn.Sequential(Block())

    def forward(self, x):
        return self.stage(x) + 1


def names(model: nn.Module, x: torch.Tensor = X) -> list[str]:
    return [name for name, _, _ in layers(trace(model, x))]


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_names_of_torchvisions_resnets_are_those_of_published_statistics(shared_data: Path, arch):
    text = (shared_data / "distiller" / f"{arch}_quant_stats.yaml").read_text()
    published = yaml.load(text, yaml.CSafeLoader)
    model = torchvision.models.get_model(arch)
    assert sorted(names(model, torch.rand(1, 3, 32, 32))) == sorted(published)


def test_a_reused_relu_and_the_add_of_a_resnet_block_are_named_by_order_and_place():
    found = names(torchvision.models.resnet18(), torch.rand(1, 3, 32, 32))
    block = ["conv1", "bn1", "relu1", "conv2", "bn2", "add", "relu2"]
    assert found[:4] == ["conv1", "bn1", "relu", "maxpool"]
    assert found[4:11] == [f"layer1.0.{name}" for name in block]
    assert found[-2:] == ["avgpool", "fc"]  # flatten computes nothing


def test_a_module_called_twice_becomes_two_layers_that_share_weights():
    found = {name: module for name, _, module in layers(trace(Reused(), X))}
    assert list(found) == ["conv1", "relu1", "conv2", "relu2"]
    assert found["conv1"].weight is found["conv2"].weight
    assert found["conv1"] is not found["conv2"]


def test_functions_and_operators_are_named_by_the_module_that_contains_them_and_numbered():
    place = "stage.0."
    inside = ["conv", "relu1", "add1", "cat", "relu2", "mul", "add2"]
    assert names(Blocks()) == [place + name for name in inside] + ["add"]


def test_a_numbered_name_gives_way_to_a_module_of_that_name():
    class Net(Reused):
        def __init__(self):
            super().__init__()
            self.relu1 = nn.Tanh()

        def forward(self, x):
            return self.relu1(super().forward(x))

    assert names(Net()) == ["conv1", "relu1_", "conv2", "relu2", "relu1"]


def test_an_operator_gives_way_to_a_module_of_its_name():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.add = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.add(x) + x

    found = names(Net())
    assert len(found) == len(set(found)) == 2
    traced = trace(Net(), X)
    assert {node.meta["op"] for _, node, _ in layers(traced)} == {"conv", "add"}


@pytest.mark.parametrize(
    ("write", "op"),
    [
        (lambda x, y: x + y, "add"),
        (lambda x, y: operator.iadd(x.clone(), y), "add"),
        (torch.add, "add"),
        (lambda x, y: x.clone().add_(y), "add"),
        (lambda x, y: torch.concat([x, y]), "cat"),
        (lambda x, y: x @ y, "matmul"),
        (lambda x, y: torch.multiply(x, y), "mul"),
        (lambda x, y: torch.relu(x), "relu"),
        (lambda x, y: x.clone().relu_(), "relu"),
        (lambda x, y: F.relu(x.clone(), True), "relu"),
        (lambda x, y: F.hardtanh(x, 0.0, 6.0), "hardtanh"),
    ],
)
def test_every_spelling_of_an_operation_is_the_same_operation(write, op):
    class Net(nn.Module):
        def forward(self, x):
            return write(x, x)

    assert [node.meta["op"] for _, node, _ in layers(trace(Net(), X))] == [op]


def test_hardtanh_from_0_to_6_is_relu6_and_another_is_not():
    net = nn.Sequential(nn.Hardtanh(0.0, 6.0), nn.Hardtanh(-1.0, 1.0), nn.ReLU6())
    assert [node.meta["op"] for _, node, _ in layers(trace(net, X))] == ["relu6", "hardtanh", "relu6"]


def add_inplace(x, y):
    x = x.clone()
    x += y
    return x * y


def add_with_unused_result(x, y):
    x = x * 1
    x.add_(y)
    return x * y


def relu_of_a_tensor_read_before_and_after(x, y):
    z = x - y
    before = z * 2
    F.relu(z, inplace=True)
    return before + z


def relu_method_unused(x, y):
    z = x - y
    z.relu_()
    return z - y


def function_with_underscore(x, y):
    z = x * 2
    torch.relu_(z)
    return z + y


def positional_inplace(x, y):
    z = x - 0.5
    F.hardtanh(z, -1.0, 1.0, True)
    return z * y


def chain_of_updates(x, y):
    z = x * 2
    z += y
    z *= y
    z -= x
    z.clamp_(-1, 1)
    return z + y


def loop(x, y):
    z = x * 0
    for step in range(3):
        z += x * step
    return z / y


INPLACE = [
    add_inplace,
    add_with_unused_result,
    relu_of_a_tensor_read_before_and_after,
    relu_method_unused,
    function_with_underscore,
    positional_inplace,
    chain_of_updates,
    loop,
]


class TwoConvs(nn.Module):
    """A function of two computed tensors."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.function = function

    def forward(self, x):
        return self.function(self.a(x), self.b(x))


class ReluOverwritesItsInput(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.conv, self.activation = nn.Conv2d(3, 3, 1), activation

    def forward(self, x):
        y = self.conv(x)
        self.activation(y)
        return y + x


@pytest.mark.parametrize("function", INPLACE, ids=lambda f: f.__name__)
def test_code_in_place_gives_the_same_and_writes_into_nothing(function):
    """D15: a module could write into a tensor that others read."""
    net, x = TwoConvs(function).eval(), torch.randn(2, 3, 5, 5)
    traced = trace(net, X)
    assert torch.equal(traced(x.clone()), net(x.clone()))
    for _, node, module in layers(traced):
        if isinstance(module, ops.Op):
            tensors = iter([torch.randn(2, 4, 5, 5) for _ in tensor_inputs(node)])
            args = fx.node.map_arg(node.args, lambda _, t=tensors: next(t))
            before = copy.deepcopy(args)
            module(*args, **node.kwargs)
            torch.testing.assert_close(args, before, rtol=0, atol=0)


@pytest.mark.parametrize("activation", [nn.ReLU(True), nn.ReLU6(True), nn.Hardswish(True), nn.SiLU(True)])
def test_a_module_in_place_whose_input_is_read_later_gives_the_same(activation):
    net, x = ReluOverwritesItsInput(activation).eval(), torch.randn(2, 3, 5, 5)
    traced = trace(net, X)
    assert torch.equal(traced(x), net(x))
    assert not any(getattr(module, "inplace", False) for module in traced.modules())
    assert activation.inplace


def test_the_input_batch_is_not_written_into():
    """D15."""
    x = torch.randn(2, 3, 5, 5)
    before = x.clone()
    trace(nn.Sequential(nn.ReLU(inplace=True)), X)(x)
    assert torch.equal(x, before)


def test_the_given_model_is_untouched():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout())
    model.train()
    before = copy.deepcopy(model.state_dict())
    trace(model, X)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [(k, v.tolist()) for k, v in model.state_dict().items()] == [
        (k, v.tolist()) for k, v in before.items()
    ]


def test_a_copy_of_a_graph_can_be_changed_alone():
    traced = trace(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), X)
    expected = traced(X)
    copied = copy_graph(traced)
    copied.set_submodule("1", nn.Tanh())
    assert torch.equal(traced(X), expected)
    assert not torch.equal(copied(X), expected)


def test_training_mode_is_not_traced():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5)).train()
    traced = trace(model, X)
    assert torch.equal(traced(X), copy.deepcopy(model).eval()(X))


def test_a_line_that_cannot_be_captured_is_named_with_its_file(tmp_path):
    folder = tmp_path / "qtool" / "torch"  # folders of a user may be called so
    folder.mkdir(parents=True)
    source = folder / "branching.py"
    source.write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def forward(self, x):\n"
        "        if float(x.sum()) > 0:\n"
        "            return x\n"
        "        return -x\n"
    )
    namespace = {"__name__": "branching"}
    exec(compile(source.read_text(), str(source), "exec"), namespace)
    with pytest.raises(ModelError) as error:
        trace(namespace["Net"](), X)
    assert f"{source}:4 (if float(x.sum()) > 0:)" in str(error.value)
    assert "\n" not in str(error.value)


class Random(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    "function", [lambda x: F.dropout(x, 0.5, training=True), lambda x: x + torch.rand_like(x)]
)
def test_randomness_is_refused(function):
    with pytest.raises(ModelError, match="randomness"):
        trace(Random(function), X)


@pytest.mark.parametrize("shape", [(2, 5, 4, 4), (2, 3), (1, 3, 0, 0)])
def test_an_input_that_does_not_fit_is_one_line_that_names_its_shape(shape):
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(ModelError) as error:
        trace(net, torch.rand(shape))
    assert f"input of shape {shape}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_that_gives_no_numbers_is_traced(value):
    """Which layer is to blame is what calibration says."""
    net = nn.Sequential(nn.Linear(4, 4))
    nn.init.constant_(net[0].bias[:1], value)
    assert names(net, torch.rand(2, 4)) == ["0"]


def test_shapes_and_dtypes_are_noted_without_numbers():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(20, 2))
    values = {name: node.meta["value"] for name, node, _ in layers(trace(net, X))}
    assert {name: tuple(v.shape) for name, v in values.items()} == {"0": (2, 5, 2, 2), "2": (2, 2)}
    assert all(v.is_meta for v in values.values())


def test_inputs_are_listed_in_the_order_of_the_call():
    class Net(nn.Module):
        def forward(self, x):
            return torch.cat([x - 1, x, x - 1], dim=1)

    *_, (_, node, _) = layers(trace(Net(), X))
    assert [n.meta["op"] for n in tensor_inputs(node)] == ["sub", "placeholder", "sub"]
