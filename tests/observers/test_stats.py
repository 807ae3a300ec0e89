"""Stats files: what is written is read back, Distiller's files are read, malformed ones are explained."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtool.errors import StatsError
from qtool.observers import stats_yaml
from qtool.observers.files import read_stats
from qtool.observers.stats import ActivationStats, LayerStats, ModelStats, records
from qtool.observers.stats_yaml import write_stats

EDITS = yaml.safe_load((Path(__file__).parents[1] / "golden" / "edits.yaml").read_text(encoding="utf-8"))

numbers = st.floats(allow_nan=False, allow_infinity=False)
positive = st.none() | st.floats(0, allow_infinity=False)
stats_records = st.builds(
    lambda ends, **rest: ActivationStats(min=ends[0], max=ends[1], **rest),
    ends=st.tuples(numbers, numbers).map(sorted),
    avg_min=st.none() | numbers,
    avg_max=st.none() | numbers,
    mean=st.none() | numbers,
    std=positive,
    b=positive,
    shape=st.none() | st.lists(st.integers(0, 999), max_size=4).map(tuple),
    total_numel=st.none() | st.integers(0),
)
layer_stats = st.builds(
    LayerStats, st.dictionaries(st.integers(0, 3), stats_records, max_size=2), st.none() | stats_records
)
model_stats = st.dictionaries(st.text(min_size=1), layer_stats, min_size=1, max_size=3).map(ModelStats)

# The fixture's folder is the same for all examples, and each writes its file anew.
reuse_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def write_file(tmp_path: Path) -> Callable[[str | bytes], Path]:
    """Writes a stats file, of this text or these bytes."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "stats.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return write


# Files


@reuse_folder
@given(stats=model_stats)
def test_what_is_written_is_read_back_exactly(write_file, stats):
    assert read_stats(write_file(write_stats(stats))).layers == stats.layers


def test_file_has_the_schema_of_distiller(write_file):
    record = ActivationStats(-1, 2, -0.5, 1.5, 0.25, 1.0, 0.75, (4, 3, 8, 8), 768)
    text = write_stats(ModelStats({"conv1": LayerStats({0: record}, record)}))
    fields = {"min": -1, "max": 2, "avg_min": -0.5, "avg_max": 1.5, "mean": 0.25, "std": 1.0, "b": 0.75}
    fields |= {"shape": "(4, 3, 8, 8)", "total_numel": 768}
    assert yaml.safe_load(text) == {"conv1": {"inputs": {0: fields}, "output": fields}}
    assert text.splitlines()[3:5] == ["      min: -1", "      max: 2"]


@pytest.mark.parametrize(
    ("network", "layer"), [("resnet18", "layer4.1.conv2"), ("resnet50", "layer4.2.conv3")]
)
def test_files_of_distiller_are_read(shared_data, network, layer):
    path = shared_data / "distiller" / f"{network}_quant_stats.yaml"
    stats, tree = read_stats(path), yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
    assert list(stats.layers) == list(tree)
    record, expected = stats.output(layer), tree[layer]["output"]
    for name in ("min", "max", "avg_min", "avg_max", "mean", "std", "b"):
        assert getattr(record, name) == expected[name]
    assert str(record.shape) == expected["shape"]
    assert stats.input_shape()[1:] == (3, 224, 224)
    assert len(list(records(stats))) == sum(len(t.get("inputs", {})) + ("output" in t) for t in tree.values())


def test_text_that_is_a_number_to_other_writers_is_a_number(write_file):
    stats = read_stats(write_file("fc: {output: {min: -1e-05, max: 1e3}}"))
    assert stats.output("fc") == ActivationStats(-1e-05, 1000.0)


def test_old_file_may_lack_fields(write_file):
    record = read_stats(write_file("fc: {output: {min: 0, max: 1, shape: [2, 3]}}")).output("fc")
    assert record == ActivationStats(0, 1, shape=(2, 3))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{max: 1}", "fc.output: field 'min' is missing"),
        ("{min: 1}", "fc.output: field 'max' is missing"),
        ("{min: .nan, max: 1}", "fc.output.min: found nan; a finite number is wanted, run 'qtool calibrate'"),
        ("{min: 0, max: .inf}", "fc.output.max: found inf; a finite number is wanted"),
        ("{min: 0, max: 1, std: 1e999}", "fc.output.std: found '1e999'; a finite number is wanted"),
        ("{min: low, max: 1}", "fc.output.min: found str 'low'; a number is wanted"),
        ("{min: 0, max: 1, b: [1]}", "fc.output.b: found list [1]; a number is wanted"),
        ("{min: true, max: 1}", "fc.output.min: found True; a finite number is wanted"),
        (f"{{min: 0, max: {'9' * 400}}}", "fc.output.max: found int 999"),
        ("{min: 2, max: 1}", "fc.output: min 2 is greater than max 1"),
        ("{min: 0, max: 1, std: -1}", "fc.output.std: found -1; it cannot be negative"),
        ("{min: 0, max: 1, shape: big}", "fc.output.shape: found 'big'; a shape such as (1, 3, 224, 224)"),
        ("{min: 0, max: 1, shape: '(2, -1)'}", "fc.output.shape: found '(2, -1)'; a shape such as"),
        ("{min: 0, max: 1, total_numel: many}", "fc.output.total_numel: found 'many'; a count is wanted"),
        ("3", "fc.output: found int 3; a record with min, max, ... is wanted"),
    ],
)
def test_malformed_record_is_explained_in_one_line(write_file, record, message):
    path = write_file(f"fc: {{output: {record}}}")
    with pytest.raises(StatsError) as caught:
        read_stats(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("fc: {output: {min: 0", "not valid YAML: while parsing a flow mapping"),
        ("a: 1\n---\nb: 2", "not valid YAML: expected a single document"),
        ("fc: {output: {min: !!int '', max: 1}}", "not valid YAML: string index out of range"),
        ("fc: {output: {min: !!bool maybe, max: 1}}", "not valid YAML: 'maybe'"),
        ("[" * 200_000, "not valid YAML: nested more than 100 levels deep"),
        ("", "no layers found; a mapping of layer names to records is wanted"),
        ("{}", "no layers found"),
        ("- fc\n- conv1", "no layers found"),
        ("some words", "no layers found"),
        ("fc: 3", "fc: found int 3; a mapping with 'inputs' and 'output' is wanted"),
        ("fc: {inputs: [1]}", "fc.inputs: a mapping with keys 0, 1, ... is wanted"),
        ("fc: {inputs: ''}", "fc.inputs: a mapping with keys 0, 1, ... is wanted"),
        ("fc: {inputs: {first: {min: 0, max: 1}}}", "fc.inputs: a mapping with keys 0, 1, ... is wanted"),
        ("fc: {inputs: {1: {min: 0}}}", "fc.inputs.1: field 'max' is missing"),
        (b"\x80\x02PK\xff", "not a text file; a stats YAML is wanted"),
        (b"\x00\x01", "not valid YAML: "),
    ],
)
def test_malformed_file_is_explained_in_one_line(write_file, content, message):
    path = write_file(content)
    with pytest.raises(StatsError) as caught:
        read_stats(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "message"), [("none.yaml", "No such file"), ("", "Is a directory")])
def test_file_that_cannot_be_read_is_explained(tmp_path, name, message):
    with pytest.raises(StatsError, match=f"cannot be read: {message}"):
        read_stats(tmp_path / name)


def test_all_problems_are_reported_together_up_to_five(write_file):
    path = write_file("".join(f"layer{i}: {{output: {{min: {i}}}}}\n" for i in range(8)))
    with pytest.raises(StatsError) as caught:
        read_stats(path)
    lines = str(caught.value).splitlines()
    assert lines[:5] == [f"{path}: layer{i}.output: field 'max' is missing" for i in range(5)]
    assert lines[5:] == ["... and 3 more such problems"]


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["conv1", "inputs", "output", "min", "max", "shape", "total_numel", 0])
            | st.text(),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@reuse_folder
@given(tree=trees)
def test_any_yaml_gives_stats_or_a_stats_error(write_file, tree):
    path = write_file(yaml.dump(tree, allow_unicode=True))
    try:
        assert read_stats(path).layers
    except StatsError as error:
        assert str(error).startswith(f"{path}: ")


@reuse_folder
@given(text=st.text(alphabet="ab01:,.-{}[]&*!?|>'\"\n %\t", max_size=40))
def test_any_text_gives_stats_or_a_stats_error(write_file, text):
    path = write_file(text)
    try:
        assert read_stats(path).layers
    except StatsError as error:
        assert str(error).startswith(f"{path}: ")


# Records and look-up


@pytest.mark.parametrize(("before", "interval", "after"), EDITS)
def test_clamped_record_is_that_of_the_worked_example(before, interval, after):
    record = ActivationStats(*before, mean=-1.0, std=2.0, b=1.5, shape=(1, 2), total_numel=2)
    expected = ActivationStats(*after, mean=-1.0, std=2.0, b=1.5, shape=(1, 2), total_numel=2)
    assert record.clamped(*interval) == expected


def test_absent_averages_stay_absent_when_clamped():
    assert ActivationStats(-1, 1).clamped(0, 6) == ActivationStats(0, 1)


RECORD = ActivationStats(0, 1, shape=(2, 3))
STATS = ModelStats({"conv1": LayerStats({0: RECORD}), "fc": LayerStats(output=RECORD)}, source="s.yaml")


def test_records_are_listed_with_their_places():
    assert list(records(STATS)) == [("conv1.inputs.0", RECORD), ("fc.output", RECORD)]
    assert STATS.input_shape() == (2, 3)


@pytest.mark.parametrize(
    ("look_up", "message"),
    [
        (
            lambda: STATS.output("conv_1"),
            "s.yaml: no entry for 'conv_1'; did you mean 'conv1'?; the file must",
        ),
        (
            lambda: STATS.output("conv1"),
            "s.yaml: layer 'conv1' has no record of its output; run 'qtool calib",
        ),
        (lambda: STATS.input("conv1", 1), "s.yaml: layer 'conv1' has no record of its input 1; run 'qtool"),
    ],
)
def test_missing_record_is_named(look_up, message):
    with pytest.raises(StatsError) as caught:
        look_up()
    assert str(caught.value).startswith(message)


names = st.text(min_size=1, max_size=12) | st.sampled_from(
    ["0", "on", "Null", "a.b", "layer1.0.conv1", "-", "a:"]
)
numbers = st.floats(allow_nan=False, allow_infinity=False)


@given(st.dictionaries(names, st.tuples(numbers, numbers, numbers.map(abs)), min_size=1, max_size=4))
def test_the_quick_way_of_reading_and_yaml_itself_agree(content):
    layers = {}
    for name, (a, b, spread) in content.items():
        record = ActivationStats(min(a, b), max(a, b), std=spread, shape=(1, 2), total_numel=2)
        layers[name] = LayerStats({0: record, 1: record}, record)
    text = write_stats(ModelStats(layers))
    quick = stats_yaml._quick_tree(text)
    assert quick == yaml.safe_load(text) or (
        quick is None and not all(n.isascii() and n.isprintable() for n in content)
    )
    assert stats_yaml.parse_stats(text, "s.yaml")[0].layers == layers


@pytest.mark.parametrize(
    "text",
    [
        "fc: {output: {min: 0, max: 1}}",
        "fc:\n  output:\n    min: 0\n    max: 1\n    min: 2",
        "fc:\n  output:\n    min: .inf",
        "on:\n  output:\n    min: 0",
        "fc:\n  output:\n      min: 0",
        "fc:\n  inputs:\n    0:\n      min: 0x10",
        "fc:\n  output: # c\n    min: 0",
    ],
)
def test_files_laid_out_in_another_way_are_left_to_yaml(text):
    assert stats_yaml._quick_tree(text) is None
