import pytest
import torch

from qtool.config.sections import NATIVE_BACKENDS
from qtool.deploy.native.target import BACKENDS, Target, engine, supported_backends
from qtool.errors import ConfigError


def test_the_command_line_offers_the_engines_that_there_are():
    assert NATIVE_BACKENDS == BACKENDS


def test_an_engine_that_this_build_lacks_is_refused_with_those_it_has(monkeypatch):
    monkeypatch.setattr("qtool.deploy.native.target.supported_backends", lambda: ["fbgemm", "x86"])
    with pytest.raises(ConfigError, match="this build of torch lacks 'onednn'; it has fbgemm, x86"):
        Target("onednn", vnni=True)


def test_the_former_engine_comes_back():
    former = torch.backends.quantized.engine
    other = next(name for name in supported_backends() if name != former)
    with pytest.raises(ZeroDivisionError), engine(other):
        assert torch.backends.quantized.engine == other
        _ = 1 / 0
    assert torch.backends.quantized.engine == former


def test_only_x86_kernels_without_vnni_saturate():
    assert Target("x86", vnni=False).saturates
    assert not Target("x86", vnni=True).saturates
    if "qnnpack" in supported_backends():
        assert not Target("qnnpack", vnni=False).saturates
