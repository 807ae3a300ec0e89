"""The grids of a network as JSON."""

import json
import subprocess
import sys

import qtool
from qtool.deploy.onnx.encodings import encodings


def test_encodings_are_the_grids_of_the_plan(tiny_net, tiny_batches):
    config = qtool.QuantizeConfig(mode="asym_s", per_channel_weights=True, bits_activations=6)
    model = qtool.quantize(tiny_net, qtool.calibrate(tiny_net, tiny_batches), config)
    found = json.loads(json.dumps(encodings(model)))
    plan = model.plan.layers["conv1"]
    (entry,) = found["activation_encodings"]["conv1"]
    assert entry["bitwidth"] == 6 and entry["is_symmetric"] == "False" and entry["dtype"] == "int"
    assert entry["scale"] == float(plan.output.scale) and entry["offset"] == -32 - int(plan.output.zero_point)
    assert entry["min"] == entry["offset"] * entry["scale"]
    assert entry["max"] == (entry["offset"] + 63) * entry["scale"]
    assert [e["scale"] for e in found["param_encodings"]["conv1.weight"]] == plan.weight.scale.tolist()
    assert {"x", "flatten"} <= set(found["activation_encodings"])


def test_encodings_are_read_in_a_fresh_process_that_cannot_import_qtool(tiny_net, tiny_batches, tmp_path):
    model = qtool.quantize(tiny_net, qtool.calibrate(tiny_net, tiny_batches))
    (tmp_path / "encodings.json").write_text(json.dumps(encodings(model)))
    program = (
        "import sys, json\n"
        "sys.modules['qtool'] = None\n"
        "found = json.load(open('encodings.json'))\n"
        "print(found['activation_encodings']['conv1'][0]['scale'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == float(model.plan.layers["conv1"].output.scale)
