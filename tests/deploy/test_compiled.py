import pytest
import torch
from torch import nn

import qtool
from qtool.deploy.compiled import CompiledModel, compiled, reason_of

pytest.importorskip("torch._inductor.cpp_builder")


def has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


@pytest.fixture
def model(tiny_net, tiny_batches):
    config = qtool.QuantizeConfig(mode="asym_u", bits_weights=6, bits_activations=5)
    return qtool.quantize(tiny_net, qtool.calibrate(tiny_net, tiny_batches), config)


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    """Programs of earlier runs are not found."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_a_compiled_network_gives_the_same_to_the_last_bit(model, tiny_batches):
    x = tiny_batches[0]
    network, why = compiled(model, x)
    assert why == "" and isinstance(network, CompiledModel)
    for count in (len(x), len(x) - 1, 1):
        assert torch.equal(network(x[:count]), model(x[:count]))


def test_without_a_compiler_the_network_runs_as_it_is(model, tiny_batches):
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        network, why = compiled(model, tiny_batches[0])
    assert network is model
    assert why == "no C++ compiler that works was found; install one, such as g++, or name it in CXX"


def test_a_network_that_cannot_be_captured_runs_as_it_is():
    class Deciding(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    net = Deciding()
    network, why = compiled(net, torch.ones(3, 2))
    assert network is net and why.startswith("torch.compile: ") and "\n" not in why


def test_a_network_that_compiled_gives_something_else_runs_as_it_is(model, tiny_batches, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda program: lambda x: program(x) + 1)
    network, why = compiled(model, tiny_batches[0])
    assert network is model and why.startswith("compiled it gives other values than the simulation")


def test_one_image_is_not_compiled(model, tiny_batches):
    network, why = compiled(model, tiny_batches[0][:1])
    assert network is model and why == "programs are made for batches of 2 images and more"


def test_the_first_line_of_an_error_is_the_reason():
    assert reason_of(RuntimeError("\n  it broke\nat line 3\n")) == "torch.compile: it broke"
    assert reason_of(RuntimeError("")) == "torch.compile: RuntimeError"
