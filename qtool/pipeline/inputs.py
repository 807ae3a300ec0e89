"""What a run works on: the network, the evaluation images and the calibration images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from qtool.config import Config
from qtool.data.calibration_set import calibration_indices, overlap
from qtool.data.datasets import check_outputs, open_dataset
from qtool.data.image_dataset import ImageDataset
from qtool.data.kinds import dataset_kind, has_calibration_split
from qtool.data.loader import Loader, make_loader
from qtool.data.preprocessing import Preprocessing, choose_preprocessing
from qtool.deploy.native.files import LoadedNative, from_file, is_native_file
from qtool.deploy.onnx.files import from_file as from_onnx_file
from qtool.deploy.onnx.files import is_onnx_file
from qtool.deploy.onnx.session import OnnxNetwork
from qtool.deploy.pt2e.files import ProgramNetwork, is_program_file
from qtool.deploy.pt2e.files import from_file as from_program_file
from qtool.errors import ConfigError, DataError, ModelError
from qtool.graph.fingerprint import tensors_sha256
from qtool.graph.trace import trace
from qtool.models import DEFAULT_ARCH, load_model, read_checkpoint
from qtool.pipeline.logits import logits_of, outputs_of
from qtool.pipeline.ranks import ALONE, Ranks
from qtool.pipeline.steps import example_input
from qtool.quantizers.checkpoint import from_checkpoint, is_quantized
from qtool.quantizers.prepare import QuantizedModel

LOG = logging.getLogger("qtool")

DEFAULT_FRACTION = 0.05
# From a set of its own, which may have thousands.
DEFAULT_SAMPLES = 256
ADVICE = "for an accuracy on unseen images, calibrate on others with --calib-data or --calib-split"


@dataclass(frozen=True)
class Subject:
    """The network of a run.

    Args:
        network: float or quantized, in evaluation mode.
        arch, weights: for the report.
        input_shape: (C, H, W) that images have after preprocessing.
        preprocessing: what images go through.
        checkpoint_sha256: of the file it came from, or None.
    """

    network: nn.Module
    arch: str
    weights: str
    input_shape: tuple[int, ...]
    preprocessing: Preprocessing
    checkpoint_sha256: str | None

    @property
    def form(self) -> str:
        """What it is: float, quantized, native (on int8 kernels), onnx (in onnxruntime), pt2e (a program)."""
        forms = {
            QuantizedModel: "quantized",
            LoadedNative: "native",
            OnnxNetwork: "onnx",
            ProgramNetwork: "pt2e",
        }
        return forms.get(type(self.network), "float")

    def traced(self) -> fx.GraphModule:
        """The graph of a float network."""
        return trace(self.network, example_input(self.input_shape))

    def num_outputs(self) -> int:
        """How many classes it tells apart."""
        try:
            if isinstance(self.network, QuantizedModel):
                return outputs_of(self.network.network.graph)
            with torch.no_grad():
                return logits_of(self.network(example_input(self.input_shape))).shape[1]
        except ModelError as error:
            raise ModelError(f"{self.arch}: {error}") from error


def announce_default(config: Config, data_needed: bool = True) -> None:
    """Say in the first line that the embedded network, and images, are used."""
    if data_needed and config.data.path is not None and not config.data.path.exists():
        raise DataError(f"{config.data.path}: no such file or folder; DATA names the evaluation images")
    no_model = config.model.arch is None and config.model.checkpoint is None
    if not no_model:
        return
    if not data_needed:
        LOG.info("no model named: using the embedded digits_resnet")
    elif config.data.path is None and config.data.dataset in (None, "digits"):
        LOG.info("no model or data named: using the embedded digits_resnet and UCI handwritten digits")
    elif config.data.dataset != "digits":
        raise ConfigError("--arch: no network named for these images; add -a, such as -a resnet18")


def open_subject(config: Config) -> Subject:
    """Load the network that a config names, float or quantized, and warn of one without trained weights.

    Raises:
        ModelError, ConfigError: if it cannot be loaded.
    """
    subject = load_subject(config)
    if subject.weights.startswith("random"):
        LOG.warning(
            "%s has %s; give --pretrained or --checkpoint for trained ones", subject.arch, subject.weights
        )
    return subject


def load_subject(config: Config) -> Subject:
    """The network that a config names, as open_subject does it, but without a warning."""
    asked = config.model
    content = None
    if asked.checkpoint is not None and is_program_file(asked.checkpoint):
        return _open_exported(config, asked.checkpoint, *from_program_file(asked.checkpoint))
    if asked.checkpoint is not None and is_native_file(asked.checkpoint):
        return _open_native(config, asked.checkpoint)
    if asked.checkpoint is not None and is_onnx_file(asked.checkpoint):
        return _open_exported(config, asked.checkpoint, *from_onnx_file(asked.checkpoint))
    if asked.checkpoint is not None and not asked.pretrained:
        content = read_checkpoint(asked.checkpoint)
    if content is not None and is_quantized(content):
        assert asked.checkpoint is not None
        return _open_quantized(config, content, asked.checkpoint)
    if asked.arch is None and asked.checkpoint is not None:
        raise ConfigError(
            f"--arch: {asked.checkpoint} holds weights only; say with -a which network they are of"
        )
    loaded = load_model(
        asked.arch,
        pretrained=asked.pretrained,
        weights=asked.weights,
        checkpoint=asked.checkpoint,
        num_classes=asked.num_classes,
        input_shape=asked.input_shape,
        seed=config.run.seed,
    )
    preprocessing = _preprocessing(config, loaded.arch, loaded.input_shape, loaded.preprocessing)
    shape = _image_shape(loaded.input_shape, preprocessing)
    return Subject(loaded.model, loaded.arch, loaded.weights, shape, preprocessing, loaded.checkpoint_sha256)


def _open_native(config: Config, path: Path) -> Subject:
    network = from_file(path)
    return _open_converted(config, path, network, network.info.get("model", {}), "a converted")


def _open_exported(
    config: Config, path: Path, network: OnnxNetwork | ProgramNetwork, is_as_written: bool
) -> Subject:
    if not is_as_written:
        LOG.warning("%s: has been changed since qtool wrote it; what follows is of the changed network", path)
    return _open_converted(config, path, network, network.info.get("model", {}), "an exported")


def _open_converted(config: Config, path: Path, network: nn.Module, info: Any, how: str) -> Subject:
    """A network that runs as it is, and says in its file which images it takes."""
    arch, shape, stored_steps = (info.get(key) for key in ("arch", "input_shape", "preprocessing"))
    if not isinstance(arch, str) or not isinstance(shape, list) or not isinstance(stored_steps, dict):
        raise ModelError(f"{path}: does not say which images it takes; make the file again")
    if config.model.arch not in (None, arch):
        raise ConfigError(f"--arch: {path} is {how} {arch}, not {config.model.arch}; leave it out")
    preprocessing = _preprocessing(config, arch, tuple(shape), Preprocessing(**_tuples(stored_steps)))
    image_shape = _image_shape(tuple(shape), preprocessing)
    return Subject(network, arch, f"{how.split()[1]} network {path.name}", image_shape, preprocessing, None)


def _open_quantized(config: Config, content: dict[str, Any], path: Path) -> Subject:
    info = content.get("model", {})
    stored = info.get("arch")
    arch = config.model.arch or stored
    if not isinstance(arch, str):
        raise ModelError(f"{path}: does not name its network; say with -a which one it is")
    from_file = ".py:" in arch
    if from_file and config.model.arch is None:
        raise ModelError(
            f"{path}: its network is defined in {arch}; name that file with -a to allow running it"
        )
    shape = tuple(info.get("input_shape", ())) or config.model.input_shape
    classes = config.model.num_classes if from_file else info.get("num_outputs")
    loaded = load_model(arch, num_classes=classes, input_shape=shape, check=False)
    stored_steps = info.get("preprocessing")
    hint = Preprocessing(**_tuples(stored_steps)) if isinstance(stored_steps, dict) else loaded.preprocessing
    preprocessing = _preprocessing(config, loaded.arch, loaded.input_shape, hint)
    input_shape = _image_shape(loaded.input_shape, preprocessing)
    try:
        network = from_checkpoint(content, loaded.model, example_input(input_shape))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    return Subject(network, loaded.arch, f"quantized model {path.name}", input_shape, preprocessing, None)


def _tuples(tree: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in tree.items()}


def model_info(subject: Subject, num_outputs: int) -> dict[str, Any]:
    """What a quantized checkpoint says of its architecture."""
    return {
        "arch": subject.arch,
        "num_outputs": num_outputs,
        "input_shape": list(subject.input_shape),
        "preprocessing": {
            k: list(v) if isinstance(v, tuple) else v for k, v in asdict(subject.preprocessing).items()
        },
    }


def _preprocessing(config: Config, arch: str, input_shape: tuple[int, ...], hint: Any) -> Preprocessing:
    data = config.data
    chosen = choose_preprocessing(
        dataset_kind(data.path, data.dataset) if data.path or data.dataset else "digits",
        hint,
        resize=data.resize,
        crop=data.crop,
        mean=data.mean,
        std=data.std,
        arch=arch,
    )
    return chosen.for_channels(input_shape[0])


def _image_shape(shape: tuple[int, ...], preprocessing: Preprocessing) -> tuple[int, ...]:
    return shape if preprocessing.crop is None else (shape[0], preprocessing.crop, preprocessing.crop)


@dataclass(frozen=True)
class Images:
    """Some images of a data set.

    Args:
        dataset: where they are from.
        indices: their numbers, ascending.
        words: how to speak of them.
        preprocessing: what they go through.
        from_evaluation: whether these calibration images were taken from the evaluation images.
    """

    dataset: ImageDataset
    indices: list[int]
    words: str
    preprocessing: Preprocessing
    from_evaluation: bool = False

    def part(self, places: Sequence[int]) -> Images:
        """Those at some places among the indices."""
        return replace(self, indices=[self.indices[place] for place in places])

    def loader(self, config: Config, batch_size: int | None = None, ranks: Ranks = ALONE) -> Loader:
        """Batches of them, in order: those of this process, of the size that is asked for, or the run's."""
        return make_loader(
            self.dataset,
            batch_size=batch_size or config.data.batch_size,
            workers=config.data.workers,
            indices=self.indices,
            share=(ranks.rank, ranks.size),
        )


def open_evaluation(config: Config, subject: Subject) -> Images:
    """The evaluation images.

    Raises:
        DataError: if they cannot be read, or do not fit the network.
    """
    data = config.data
    if data.path is None and data.dataset in (None, "digits") and subject.arch != DEFAULT_ARCH:
        raise DataError(
            f"DATA: {subject.arch} needs images; name a folder or file, "
            f"as in 'qtool quantize -a {subject.arch} DATA'"
        )
    dataset = open_images(config, data.path, data.dataset, data.split or "evaluation", subject, data.classes)
    check_outputs(dataset, subject.num_outputs())
    indices = list(range(len(dataset)))
    if data.effective_test_size < 1:
        indices = calibration_indices(len(dataset), fraction=data.effective_test_size, seed=config.run.seed)
    part = "" if len(indices) == len(dataset) else f"{len(indices)} of "
    words = f"{part}{len(dataset)} images of {dataset.name}"
    return Images(dataset, indices, words, subject.preprocessing)


def open_calibration(config: Config, subject: Subject, evaluation: Images | None) -> Images:
    """The calibration images, apart from the evaluation images unless asked otherwise.

    Raises:
        ConfigError: if the options contradict each other.
        DataError: if the images cannot be read, or there are too few.
    """
    asked, data = config.calibration, config.data
    if asked.fraction is not None and asked.calib_samples is not None:
        raise ConfigError(
            "--fraction and --calib-samples: both say how many images calibrate; give one of them"
        )
    fraction, samples = asked.fraction, asked.calib_samples
    from_evaluation = False
    if asked.calib_data is not None:
        dataset = open_images(
            config, asked.calib_data, None, asked.calib_split or _part(asked.calib_data, None), subject,
            asked.calib_classes or classes_for(asked.calib_data, data.classes),
        )  # fmt: skip
    elif asked.calib_split is not None:
        dataset = open_images(config, data.path, data.dataset, asked.calib_split, subject, data.classes)
    elif fraction is None and has_calibration_split(data.path, data.dataset):
        dataset = open_images(config, data.path, data.dataset, "calibration", subject, data.classes)
    else:
        dataset = (evaluation or open_evaluation(config, subject)).dataset
        from_evaluation = True
        fraction = fraction if fraction is not None or samples is not None else DEFAULT_FRACTION
    if fraction is None and samples is None:
        samples = min(DEFAULT_SAMPLES, len(dataset))
    if samples is not None and samples > len(dataset):
        raise DataError(
            f"--calib-samples: {samples} images asked for, but {dataset.name} has {len(dataset)}; "
            "ask for fewer"
        )
    indices = calibration_indices(len(dataset), fraction=fraction, samples=samples, seed=config.run.seed)
    words = f"{len(indices)} of {len(dataset)} images of {dataset.name} (seed {config.run.seed})"
    return Images(dataset, indices, words, subject.preprocessing, from_evaluation)


def shared_images(evaluation: Images, calibration: Images) -> int:
    """How many of the evaluation images also calibrate, with a notice when there are any."""
    count = overlap(evaluation.dataset, evaluation.indices, calibration.dataset, calibration.indices)
    if count:
        LOG.warning(
            "%d of the %d evaluation images are also calibration images: %s",
            count,
            len(evaluation.indices),
            ADVICE,
        )
    return count


def _part(path: Path, kind: str | None) -> str:
    return "calibration" if has_calibration_split(path, kind) else "evaluation"


def classes_for(path: Path, classes: Path | None) -> Path | None:
    """The class list of DATA serves a calibration folder too; other kinds have none."""
    return classes if dataset_kind(path, None) == "folder" else None


def open_images(
    config: Config, path: Path | None, kind: str | None, split: str, subject: Subject, classes: Path | None
) -> ImageDataset:
    """One part of a dataset, for a network; arguments as for data.datasets.open_dataset."""
    return open_dataset(
        path,
        kind,
        split,
        preprocessing=subject.preprocessing,
        classes=classes,
        skip_bad_images=config.data.skip_bad_images,
        channels=subject.input_shape[0],
    )


def weights_sha256(network: nn.Module) -> str:
    """Of the names and values of parameters and buffers, wherever they were read from."""
    return tensors_sha256(network.state_dict().items())


def quantized_network(subject: Subject) -> QuantizedModel | None:
    """The network, if it is a quantized one."""
    return subject.network if isinstance(subject.network, QuantizedModel) else None
