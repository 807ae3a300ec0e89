"""Corrections and presets as commands: what they do, say, write and refuse."""

import json

import pytest

QUICK = ("--calib-samples", "32", "--effective-test-size", "0.2", "--workers", "0")
FOUR_BITS = ("--qe-mode", "asym_u", "--qe-bits-acts", "4", "--qe-bits-wts", "4")


def _results(folder):
    (path,) = folder.glob("logs/*/results.json")
    return json.loads(path.read_text()), path.parent


def test_a_preset_says_what_it_chose_and_records_what_was_done(run_cli, chdir_tmp):
    result = run_cli("quantize", "--preset", "accurate", *FOUR_BITS, *QUICK)
    assert result.exit_code == 0, result.output
    assert "preset accurate: ranges by mse" in result.stderr
    record, folder = _results(chdir_tmp)
    assert record["corrections"]["preset"] == "accurate"
    methods = {m["method"]: m for m in record["corrections"]["methods"]}
    assert {"weight_correction", "bias_correction"} <= methods.keys()
    assert len(methods["bias_correction"]["changed"]) > 5
    assert (folder / "acts_quantization_stats.yaml").is_file()


def test_corrections_keep_more_than_none(run_cli, chdir_tmp):
    found = []
    for more in ((), ("--corrections", "gptq,bias_correction")):
        result = run_cli("quantize", *FOUR_BITS, *QUICK, *more, "-o", f"runs{len(found)}")
        assert result.exit_code == 0, result.output
        (path,) = chdir_tmp.glob(f"runs{len(found)}/*/results.json")
        found.append(json.loads(path.read_text())["logit_sqnr_db"])
    assert found[1] > found[0] + 2


def test_ranges_are_chosen_by_what_their_errors_do_to_the_outputs(run_cli, chdir_tmp):
    bits = (
        "--qe-mode",
        "asym_u",
        "--qe-bits-acts",
        "5",
        "--qe-clip-acts",
        "mse",
        "--qe-max-pool-grid",
        "input",
    )
    found = []
    images = ("--calib-samples", "128", *QUICK[2:])
    for more in ((), ("--corrections", "activation_ranges")):
        result = run_cli("quantize", *bits, *images, *more, "-o", f"runs{len(found)}")
        assert result.exit_code == 0, result.output
        (path,) = chdir_tmp.glob(f"runs{len(found)}/*/results.json")
        found.append(json.loads(path.read_text()))
    plain, chosen = found
    assert chosen["logit_sqnr_db"] > plain["logit_sqnr_db"] + 0.2
    (method,) = chosen["corrections"]["methods"]
    assert method["method"] == "activation_ranges" and method["settings"]["probes"] == 2
    assert all("its range times" in change["note"] for change in method["changed"])
    assert "activation_ranges: " in result.stderr


@pytest.mark.parametrize("more", [(), ("--qe-per-channel",)])
def test_a_corrected_network_is_evaluated_from_its_checkpoint(run_cli, chdir_tmp, more):
    result = run_cli(
        "quantize", "--corrections", "equalization", "--corrections", "gptq", *FOUR_BITS, *QUICK, *more
    )
    assert result.exit_code == 0, result.output
    record, folder = _results(chdir_tmp)
    again = run_cli(
        "evaluate", "--checkpoint", folder / "quantized_checkpoint.pth.tar", *QUICK[2:], "-o", "again"
    )
    assert again.exit_code == 0, again.output
    (path,) = chdir_tmp.glob("again/*/results.json")
    same = json.loads(path.read_text())["quantized"]
    assert same["top1"] == record["quantized"]["top1"]
    assert same["loss"] == record["quantized"]["loss"]


def test_a_file_names_corrections_as_a_list(run_cli, chdir_tmp):
    (chdir_tmp / "qtool.yaml").write_text(
        "corrections:\n- gptq: {sweeps: 2, exclude: [conv1]}\n- fast_bias_correction\n"
    )
    result = run_cli("quantize", *FOUR_BITS, *QUICK)
    assert result.exit_code == 0, result.output
    first, second = _results(chdir_tmp)[0]["corrections"]["methods"]
    assert first["settings"]["sweeps"] == 2 and "conv1" not in {c["layer"] for c in first["changed"]}
    assert second["method"] == "fast_bias_correction"


def test_a_resumed_run_takes_over_what_was_found(run_cli, chdir_tmp):
    command = ("quantize", "--corrections", "gptq", "--qe-per-channel", *FOUR_BITS, *QUICK)
    assert run_cli(*command, "-o", "first").exit_code == 0
    (folder,) = chdir_tmp.glob("first/*/")
    again = run_cli(*command, "-o", "second", "--resume-search-from", folder)
    assert again.exit_code == 0, again.output
    assert "layers that the earlier run has finished are taken over" in again.stderr
    first, second = (path.read_bytes() for path in chdir_tmp.glob("*/*/quantized_checkpoint.pth.tar"))
    assert first == second


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--preset", "fast", "--qe-dynamic"), "does not go with --qe-dynamic"),
        (("--corrections", "gptq", "--qe-lapq"), "does not go with --qe-lapq"),
        (("--corrections-images", "8"), "has an effect with --corrections or --preset only"),
        (("--corrections", "{gptq: {exclude: nowhere}}"), "matches no layer"),
        (("--corrections", "gptq,equalization"), "put it in front"),
        (("--corrections", "gptq", "--search-eval-size", "0.5"), "--corrections-images says how many"),
        (("--resume-search-from", "."), "with --qe-lapq or --corrections only"),
        (("--corrections", "gptq", "--resume-search-from", "."), "has no folder corrected_layers"),
        (("--preset", "fast", "--resume-search-from", "."), "takes long enough to be resumed"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(run_cli, flags, words):
    result = run_cli("quantize", *FOUR_BITS, *QUICK, *flags)
    assert result.exit_code == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0]


def test_an_unknown_method_is_wrong_usage(run_cli):
    result = run_cli("quantize", "--corrections", "gtpq", *QUICK)
    assert result.exit_code == 2
    assert "did you mean 'gptq'" in result.stderr
