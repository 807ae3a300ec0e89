"""What is compared with the float network: the section `compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qtool.config.options import FILE, option


@dataclass(frozen=True)
class CompareConfig:
    """Comparison"""

    quantized: Path | None = option(
        None,
        FILE,
        "A quantized checkpoint to compare with the float network that the model options name.",
        "--quantized",
        shown_default="the network, quantized as the settings say",
    )
