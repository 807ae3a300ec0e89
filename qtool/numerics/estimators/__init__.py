"""Ranges that are found from a histogram, or from the ranges of single images.

All are functions of stored statistics: another estimator costs milliseconds, and no data is run.
"""

from collections.abc import Callable

from qtool.numerics.estimators.images import PerImage, image_range
from qtool.numerics.estimators.kl import kl_range
from qtool.numerics.estimators.mse import mse_range
from qtool.numerics.estimators.quantiles import percentile_range, quantile_range
from qtool.numerics.estimators.rows import ROW_ESTIMATORS
from qtool.numerics.histogram import Histogram
from qtool.numerics.spec import ClipSpec, QuantSpec

# clip mode -> low and high of a histogram's values on a grid
HISTOGRAM_ESTIMATORS: dict[str, Callable[[Histogram, QuantSpec, ClipSpec], tuple[float, float]]] = {
    "percentile": percentile_range,
    "quantile": quantile_range,
    "mse": mse_range,
    "kl": kl_range,
}

__all__ = ["HISTOGRAM_ESTIMATORS", "ROW_ESTIMATORS", "PerImage", "image_range"]
