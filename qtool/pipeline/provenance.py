"""Statistics and what they were measured on: noted with them, and compared when they are used."""

from __future__ import annotations

from dataclasses import asdict, replace

from torch import fx

from qtool.data.preprocessing import Preprocessing
from qtool.errors import StatsError
from qtool.graph.fingerprint import check_network, with_weights
from qtool.observers.fingerprint import Fingerprint, differences_of_images
from qtool.observers.stats import ModelStats


def fingerprint_of(traced: fx.GraphModule, preprocessing: Preprocessing) -> Fingerprint:
    """Of a network with its weights, and of the images that it is given."""
    return replace(with_weights(traced), preprocessing=asdict(preprocessing))


def check_origin(
    stats: ModelStats, traced: fx.GraphModule, preprocessing: Preprocessing, as_is: bool
) -> None:
    """Refuse statistics of another network, of other weights, or of images preprocessed in another way.

    Args:
        stats: those without a fingerprint, such as Distiller's, pass.
        traced: the network that they are to be used for.
        preprocessing: of its images.
        as_is: whether other weights and other preprocessing pass.

    Raises:
        StatsError: naming what differs.
    """
    check_network(stats, traced)
    if stats.fingerprint is None or as_is:
        return
    here = fingerprint_of(traced, preprocessing)
    differences = differences_of_images(stats.fingerprint, here)
    if differences:
        raise StatsError(
            f"{stats.source}: measured on images preprocessed in another way: {', '.join(differences)}; "
            "measure again with 'qtool calibrate', or add --qe-stats-as-is"
        )
    if stats.fingerprint.weights not in (None, here.weights):
        raise StatsError(
            f"{stats.source}: measured with other weights of this network; "
            "measure again with 'qtool calibrate', or add --qe-stats-as-is"
        )
