import subprocess
import sys

import pytest
import torch
from torch import nn

import qtool
from qtool.deploy.pt2e import reference, to_program
from qtool.deploy.pt2e.files import ENTRY, from_file, to_bytes
from qtool.deploy.pt2e.lowered import LoweredNetwork
from qtool.deploy.pt2e.parity import program_parity
from qtool.errors import ConfigError, ModelError

SYMMETRIC = {"mode": "asym_u", "mode_weights": "sym", "per_channel_weights": True}
OPS = torch.ops.quantized_decomposed


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (6, 8), (3, 12)])
@pytest.mark.parametrize("mode", ["sym", "asym_u", "asym_s"])
def test_every_layer_gives_the_simulations_integers(mode, bits, quantized, kernel_batch):
    model = quantized(mode=mode, bits_weights=bits[0], bits_activations=bits[1], per_channel_weights=True)
    found = program_parity(model, reference(model), kernel_batch)
    assert found.keys() == {n for n, layer in model.plan.layers.items() if layer.output is not None}
    # The operation multiplies by 1 / scale where the simulation divides, which moves ties. Symmetric grids
    # make many: half of the integers of add2's inputs are ties of its output, and what follows differs.
    compared = list(found)[: list(found).index("leaky") if mode == "sym" else None]
    assert len(compared) >= 8
    for name in compared:
        assert found[name].largest <= 2 and found[name].equal >= 0.99, (name, found[name])


@pytest.mark.parametrize("rounding", ["sum", "fused", "none"])
def test_sums_are_rounded_as_often_as_in_the_simulation(rounding, tiny_net, tiny_batches):
    settings = {**SYMMETRIC, "bits_activations": 4, "add_rounding": rounding}
    model = qtool.quantize(
        tiny_net, qtool.calibrate(tiny_net, tiny_batches), qtool.QuantizeConfig(**settings)
    )
    found = program_parity(model, reference(model), torch.cat(tiny_batches))
    assert all(layer.equal >= 0.999 for layer in found.values()), found


def test_operations_have_qtools_own_grids(quantized, kernel_batch):
    model = quantized(**SYMMETRIC, bits_weights=4, bits_activations=6)
    program = to_program(reference(model), kernel_batch[:2])
    layer = model.plan.layers["few_groups"]
    weights = [n for n in program.graph.nodes if n.target is OPS.dequantize_per_channel.default]
    assert {node.args[3:] for node in weights} == {(0, -8, 7, torch.int8)}
    state = program.state_dict
    assert torch.equal(state["few_groups.weight.integers"], layer.weight_q)
    assert torch.equal(state["few_groups.weight.scales"], layer.weight.scale)
    grids = {n.args[1:] for n in program.graph.nodes if n.target is OPS.quantize_per_tensor.default}
    assert (float(layer.output.scale), int(layer.output.zero_point), 0, 63, torch.uint8) in grids


def test_a_program_takes_any_number_of_images(quantized, kernel_batch):
    model = quantized(**SYMMETRIC)
    network = to_program(reference(model), kernel_batch[:2]).module()
    for count in (1, 3, 4):
        assert torch.equal(network(kernel_batch[:count]).argmax(1), model(kernel_batch[:count]).argmax(1))


def test_weights_alone_and_tables_are_written(tiny_net, tiny_batches):
    stats = qtool.calibrate(tiny_net, tiny_batches)
    model = qtool.quantize(tiny_net, stats, qtool.QuantizeConfig(bits_activations=0, bits_weights=5))
    network = reference(model)
    assert torch.allclose(network(tiny_batches[0]), model(tiny_batches[0]), atol=1e-5)
    assert network.get_submodule("conv1").weight.integers.dtype == torch.int8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale_approx_bits": 6}, "layer 'conv1': multiplies by approximated scales"),
        ({"bits_accum": 17}, "bits, where the simulation saturates; quantize with --qe-bits-accum 32"),
    ],
)
def test_what_a_program_cannot_say_is_refused_by_layer(settings, message, quantized):
    with pytest.raises(ConfigError, match=message):
        reference(quantized(**settings))


def test_grids_found_at_run_time_are_refused(tiny_net, tiny_batches):
    config = qtool.QuantizeConfig(dynamic=True)
    model = qtool.quantize(tiny_net, None, config, example=tiny_batches[0])
    with pytest.raises(ConfigError, match=r"--format pt2e: .* --qe-dynamic finds them batch by batch"):
        reference(model)


@pytest.fixture
def exported(quantized, kernel_batch, tmp_path):
    """The simulation, and its program's file."""
    model = quantized(**SYMMETRIC, bits_weights=4)
    path = tmp_path / "kernel.pt2"
    path.write_bytes(to_bytes(to_program(reference(model), kernel_batch[:2]), {"model": {"arch": "kernel"}}))
    return model, path


def test_a_file_runs_in_a_fresh_process_that_cannot_import_qtool(exported, kernel_batch, tmp_path):
    model, path = exported
    torch.save(kernel_batch, tmp_path / "x.pt")
    program = (
        "import sys\n"
        "sys.modules['qtool'] = None\n"
        "import torch\n"
        "import torch.ao.quantization.fx._decomposed\n"
        f"network = torch.export.load({path.name!r}).module()\n"
        "torch.save(network(torch.load('x.pt')), 'y.pt')\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "y.pt").argmax(1), model(kernel_batch).argmax(1))


def test_a_file_says_what_it_is_and_nothing_of_the_machine(exported, kernel_batch):
    model, path = exported
    network, is_as_written = from_file(path)
    assert is_as_written and network.info["model"] == {"arch": "kernel"}
    assert torch.equal(network(kernel_batch).argmax(1), model(kernel_batch).argmax(1))
    content = path.read_bytes()
    assert str(path.parent.parent).encode() not in content and b"deploy/pt2e" not in content


def rewritten(path, change):
    """The archive again, with each entry's content passed through a function of its name and content."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            changed = change(name, content)
            if changed is not None:
                archive.writestr(name, changed)


def test_a_changed_weight_is_noticed(exported):
    _, path = exported
    rewritten(path, lambda n, c: c[:-1] + bytes([c[-1] ^ 1]) if n.endswith("weights/weight_1") else c)
    assert not from_file(path)[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, c: None if n.endswith(ENTRY) else c, "has no entry 'qtool.json'; programs that 'qtool"),
        (lambda n, c: b"[" if n.endswith(ENTRY) else c, "its entry 'qtool.json' cannot be read"),
        (lambda n, c: b"[]" if n.endswith(ENTRY) else c, "its entry 'qtool.json' is not qtool's"),
        (lambda n, c: c.replace(b'"version": 1', b'"version": 9') if n.endswith(ENTRY) else c, "version 9"),
        (lambda n, c: b"{}" if n.endswith("models/model.json") else c, "a damaged program: "),
    ],
)
def test_a_file_that_is_no_such_program_is_refused_in_one_line(change, message, exported):
    _, path = exported
    rewritten(path, change)
    with pytest.raises(ModelError) as found:
        from_file(path)
    assert message in str(found.value) and "\n" not in str(found.value)


def test_no_archive_at_all_is_refused(tmp_path):
    path = tmp_path / "a.pt2"
    path.write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"a\.pt2: a damaged program: .*; export it again"):
        from_file(path)


def test_a_lowered_network_takes_batches_of_any_size():
    sizes = []

    class Doubling(nn.Module):
        def forward(self, x):
            sizes.append(len(x))
            return 2 * x

    network, x = LoweredNetwork(Doubling(), 4), torch.randn(10, 3)
    assert torch.equal(network(x), 2 * x) and sizes == [4, 4, 4]


def test_a_lowered_program_gives_the_programs_values(exported, kernel_batch):
    pytest.importorskip("torchao", reason="needs the extra: pip install 'qtool[pt2e]'")
    from qtool.deploy.pt2e.lowered import int8_operations, lowered

    model, path = exported
    network = lowered(from_file(path)[0].program, kernel_batch)
    assert int8_operations() >= 5
    assert torch.equal(network(kernel_batch[:3]).argmax(1), model(kernel_batch[:3]).argmax(1))
