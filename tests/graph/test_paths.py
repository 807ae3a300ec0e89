"""Networks whose code depends on the values of tensors: every way through it gives the same numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qtool.errors import ModelError
from qtool.graph import trace as tracing
from qtool.graph.control import UncapturedPath
from qtool.graph.paths import MAX_ROUNDS, by_paths
from qtool.graph.trace import layers, trace

SCALES = (-3.0, -1.0, -0.2, 0.0, 0.2, 0.6, 1.0, 3.0)


class Toy(nn.Module):
    """(N, 4) -> (N, 4); what it does with its layers is given."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)
        self.steps = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(self, x)


def either(net, x):
    return net.c(net.a(x) if x.mean() > 0 else net.b(x))


def only_if(net, x):
    y = net.a(x)
    if (y.abs() > 0.5).any():
        y = net.b(y)
    return net.c(y)


def three_ways(net, x):
    if x.mean() > 0.5:
        y = net.a(x)
    elif x.mean() < -0.5:
        y = net.b(x)
    else:
        y = torch.zeros(x.shape[0], 4)
    return net.c(y)


def early_return(net, x):
    y = net.a(x)
    if y.max() > 1:
        return y
    return net.b(y)


def return_inside(net, x):
    if x.mean() > 0:
        x = net.a(x)
        if x.mean() > 0:
            return net.b(x)
    return net.c(x)


def flag_of_python(net, x):
    big = False
    if x.max() > 1:
        big = True
    if x.mean() > 0:
        x = net.a(x) if big else net.b(x)
    return net.c(x)


def shadowed(net, x):
    y = net.a(x) if x.mean() > 0 else x
    if x.max() > 1:
        y = torch.ones_like(x)
    return net.c(y)


def while_large(net, x):
    while x.abs().max() > 1:
        x = net.a(x) * 0.5
    return net.c(x)


def until_small(net, x):
    while not x.abs().max() < 1:
        x = x * 0.7
    return net.c(x)


def with_break(net, x):
    for block in net.blocks:
        x = F.relu(block(x))
        if x.sum() < 1:
            break
    else:
        x = net.b(x)
    return net.c(x)


def skipped_blocks(net, x):
    for block in net.blocks:
        if x.mean() > 0:
            x = x + block(x)
    return net.c(x)


def in_place_in_a_branch(net, x):
    y = net.a(x)
    if y.mean() > 0:
        y += 1
        y = net.relu(y)
    else:
        y.mul_(2)
    return net.c(y) + y


def compared_as_number(net, x):
    return net.a(x) if x.sum().item() > 0 else net.b(x)


def both_conditions(net, x):
    if x.mean() > 0 and x.max() < 1:
        x = net.a(x)
    return net.c(x)


def guarded_by_raise(net, x):
    if x.isnan().any():
        raise ValueError("not a number")
    assert (x.abs() < 100).all()
    return net.a(x) if x.mean() > 0 else net.b(x)


def by_rows(net, x):
    rows = (x.mean(1) > 0).nonzero().squeeze(1)
    if rows.numel() == 0:
        return net.a(x)
    return net.b(x) + net.c(x[rows]).sum(0)


def loop_over_a_size(net, x):
    for _ in range(x.shape[1] - 2):
        x = net.a(x)
    if x.mean() > 0:
        x = net.b(x)
    return net.c(x)


def constants(net, x):
    shift = torch.tensor([1.0, 2.0, 3.0, 4.0]) if x.mean() > 0 else torch.tensor([0.0, 0.0, 0.0, 1.0])
    return net.a(x) + shift.to(x.device) * torch.arange(x.shape[1], device=x.device)


def tuples(net, x):
    pair = (net.a(x), x) if x.mean() > 0 else net.b(x).split(2, 1)
    return net.c(torch.cat(list(pair), 1)[:, :4])


FORMS = [
    either, only_if, three_ways, early_return, return_inside, flag_of_python, shadowed, while_large,
    until_small, with_break, skipped_blocks, in_place_in_a_branch, compared_as_number, both_conditions,
    guarded_by_raise, by_rows, loop_over_a_size, constants, tuples,
]  # fmt: skip


def names(traced: fx.GraphModule) -> list[str]:
    return [name for name, _, _ in layers(traced)]


@pytest.fixture
def captured(monkeypatch) -> Callable[[Callable[..., Tensor]], tuple[nn.Module, fx.GraphModule]]:
    """A toy and its trace by paths."""

    def make(forward: Callable[..., Tensor]) -> tuple[nn.Module, fx.GraphModule]:
        monkeypatch.setattr(tracing, "capture", by_paths)
        net = Toy(forward).eval()
        return net, trace(net, torch.rand(2, 4))

    return make


@pytest.mark.parametrize("form", FORMS)
def test_every_way_gives_the_same(form, captured):
    net, traced = captured(form)
    generator = torch.Generator().manual_seed(1)
    outputs = []
    for batch in (1, 2, 5):
        for shift in SCALES:
            for spread in (0.1, 1.0, 3.0):
                x = torch.randn(batch, 4, generator=generator) * spread + shift
                with torch.no_grad():
                    expected = net(x.clone())
                    torch.testing.assert_close(traced(x.clone()), expected, atol=1e-4, rtol=1e-4)
                outputs.append(expected)
    assert len(outputs) == 3 * len(SCALES) * 3


def test_what_follows_both_branches_is_one_layer(captured):
    assert names(captured(either)[1]) == ["mean", "a", "b", "c"]
    assert names(captured(only_if)[1]) == ["a", "abs", "b", "c"]
    assert names(captured(skipped_blocks)[1])[-1] == "c"


def test_only_the_branch_that_is_taken_runs(captured):
    _, traced = captured(either)
    ran = []
    for name in ("a", "b"):
        traced.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    traced(torch.ones(1, 4))
    traced(-torch.ones(1, 4))
    assert ran == ["a", "b"]


def test_the_graph_does_not_depend_on_the_weights(captured):
    net, traced = captured(while_large)
    for parameter in net.parameters():
        nn.init.constant_(parameter, 5.0)  # it would never end
    assert names(trace(net, torch.rand(2, 4), check=False)) == names(traced)


def test_a_loop_runs_so_many_rounds_and_then_names_its_line(captured):
    _, traced = captured(until_small)
    assert torch.isfinite(traced(torch.full((1, 4), 0.7**-MAX_ROUNDS * 0.99))).all()
    with pytest.raises(
        UncapturedPath, match=rf"test_paths\.py:\d+ \(while not .*more than {MAX_ROUNDS} rounds"
    ):
        traced(torch.full((1, 4), 0.7 ** -(MAX_ROUNDS + 1)))


def test_a_branch_that_raises_is_refused_with_its_line(captured):
    _, traced = captured(guarded_by_raise)
    with pytest.raises(UncapturedPath, match=r"test_paths\.py:\d+ \(raise .*ValueError: not a number"):
        traced(torch.full((1, 4), torch.nan))


def test_a_size_that_python_used_is_expected_of_later_inputs(captured):
    def forward(net, x):
        return net.a(x) * len(x) if x.mean() > 0 else net.b(x)

    _, traced = captured(forward)
    with pytest.raises(UncapturedPath, match=r"test_paths\.py:\d+ .*captured with 2 here, and found 3"):
        traced(torch.ones(3, 4))


@pytest.mark.parametrize("convert", [float, int])
def test_a_value_as_a_number_of_python_is_refused_with_its_line(convert):
    def forward(net, x):
        return net.a(x) if convert(x.mean()) > 0 else net.b(x)

    with pytest.raises(
        ModelError, match=r"captured: .*test_paths\.py:\d+ \(return .*a value of a tensor"
    ) as raised:
        trace(Toy(forward).eval(), torch.rand(2, 4))
    assert "\n" not in str(raised.value)


def test_too_many_ways_are_refused_with_the_line():
    def forward(net, x):
        for _ in range(8):
            if x.mean() > 0:
                x = net.a(x)
        return x

    with pytest.raises(ModelError, match=r"test_paths\.py:\d+ \(if x.mean.*more than 64 ways"):
        trace(Toy(forward).eval(), torch.rand(2, 4))


def test_branches_of_different_kinds_are_refused_with_the_line():
    def forward(net, x):
        if x.mean() > 0:
            return x, x
        return x

    with pytest.raises(ModelError, match=r"test_paths\.py:\d+ \(if x.mean.*differ in number or kind"):
        trace(Toy(forward).eval(), torch.rand(2, 4))


def test_several_inputs_by_name_and_a_dict():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, y=None, scale=2.0):
            total = self.a(x) + self.b(y)
            return {"logits": total * scale if total.mean() > 0 else total, "sum": total}

    net, x, y = Net().eval(), torch.randn(2, 4), torch.randn(2, 4)
    for example in ((x, y), {"x": x, "y": y}):
        traced = trace(net, example)
        with torch.no_grad():
            for factor in (-1, 1):
                found, expected = traced(factor * x, y=factor * y), net(factor * x, factor * y)
                torch.testing.assert_close(found["logits"], expected["logits"])


def test_a_table_is_cut_to_the_length_of_each_input(captured):
    def forward(net, x):
        table = torch.arange(40.0).reshape(10, 4)
        x = x + table[: x.shape[0]]
        return net.a(x) if x.mean() > 0 else net.b(x)

    net, traced = captured(forward)
    for length in (1, 3, 7):
        x = torch.randn(length, 4)
        with torch.no_grad():
            torch.testing.assert_close(traced(x), net(x))


class Switched(nn.Module):
    """Decides by a parameter and by a buffer, whose values are not those of the network that is loaded."""

    def __init__(self, on: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.tensor(1.0 if on else -1.0))
        self.register_buffer("on", torch.tensor(on))

    def forward(self, x: Tensor) -> Tensor:
        if self.scale > 0:
            x = self.a(x) * self.scale
        return self.b(x) if self.on else x


def test_parameters_and_buffers_decide_when_the_graph_runs(monkeypatch):
    monkeypatch.setattr(tracing, "capture", by_paths)
    x = torch.randn(2, 4)
    on, off = (trace(Switched(value).eval(), x) for value in (True, False))
    assert names(on) == names(off) == ["a", "mul", "b"]
    assert torch.equal(off(x), x)
    off.load_state_dict(on.state_dict())
    assert torch.equal(off(x), on(x))
