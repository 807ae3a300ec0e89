"""Training of a quantized network; each step follows from the one before and its images alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qtool.algorithms.lsq.loss import mixed_loss
from qtool.algorithms.lsq.network import LEARNED, RANGES, TrainedNetwork, on_device
from qtool.graph.fold import Folded
from qtool.numerics.logits import logits_of
from qtool.quantizers.plan import ModelPlan

# Of what is learned, the rate that it has: weights and biases share one.
KINDS = {"weights": "learning_rate", "biases": "learning_rate", "scales": "scale_learning_rate"}


@dataclass(frozen=True)
class FinetuneSettings:
    """How a quantized network is trained.

    Args:
        steps: of Adam, each on one batch.
        learning_rate: of weights and biases at the start, in units of each channel, see weights.py; it falls
            to 0 along a cosine.
        scale_learning_rate: of the logarithms of scales.
        distillation: share of the float network's predictions in the loss, 0 to 1; the rest is cross-entropy
            with the labels.
        temperature: by which logits are divided for distillation.
        ranges: "learned" or "ema", see TrainedNetwork.

    Raises:
        ValueError: if one is out of range.
    """

    steps: int = 500
    learning_rate: float = 0.01
    scale_learning_rate: float = 0.01
    distillation: float = 1.0
    temperature: float = 1.0
    ranges: str = LEARNED

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, found {self.steps}")
        for name in ("learning_rate", "scale_learning_rate", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"distillation must be from 0 to 1, found {self.distillation}")
        if self.ranges not in RANGES:
            raise ValueError(f"ranges must be one of {', '.join(RANGES)}, found {self.ranges!r}")


class DivergedError(ValueError):
    """The loss, or a gradient, is no longer a finite number.

    Attributes:
        step: during which it was found, counted from 1; nothing that is learned has been changed by it.
        what: "the loss" or "a gradient".
    """

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"step {step}: {what} is not a finite number")
        self.step, self.what = step, what


class Trainer:
    """Trains a quantized network.

    Memory is that of one batch: its activations and two numbers for each of them, and four for each weight.

    Args:
        reference: the float network, batch norms folded, whose predictions are wanted.
        folded: the one that the plan quantizes; other weights than those of the reference are allowed.
        plan: static, of folded.
        settings: see there.
        device: where both run.

    Attributes:
        network: what is trained.
        step: how many steps have been made.

    Raises:
        ValueError: if the network cannot be trained, see network.why_not.
    """

    def __init__(
        self,
        reference: fx.GraphModule,
        folded: Folded,
        plan: ModelPlan,
        settings: FinetuneSettings,
        device: str | torch.device = "cpu",
    ) -> None:
        self.settings = settings
        self.network = TrainedNetwork(folded, plan, settings.ranges, device)
        self.step = 0
        self._reference = on_device(reference, self.network.device)
        parameters = self.network.parameters()
        self._rates = {kind: getattr(settings, rate) for kind, rate in KINDS.items() if parameters[kind]}
        groups: list[dict[str, Any]] = [
            {"params": list(parameters[kind].values()), "lr": rate} for kind, rate in self._rates.items()
        ]
        self._optimizer = torch.optim.Adam(groups)

    def learn(self, images: Tensor, labels: Tensor | None = None) -> float:
        """Make a step on a batch, and give the loss in front of it.

        Args:
            images: (N, ...).
            labels: (N,); needed unless the loss is distillation alone.

        Raises:
            DivergedError: if the loss or a gradient is not finite; all is as it was before the step.
            ValueError: if labels are needed and there are none.
        """
        if labels is None and self.settings.distillation < 1:
            raise ValueError("cross-entropy needs labels: give batches of images and labels")
        share = min(self.step / self.settings.steps, 1.0)
        for group, rate in zip(self._optimizer.param_groups, self._rates.values(), strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * share)) / 2
        with torch.enable_grad():
            images = self._placed(images)
            loss = self.loss_of(logits_of(self.network(images)), images, labels)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise DivergedError(self.step + 1, "the loss")
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        self._check_gradients()
        self._optimizer.step()
        self.step += 1
        return value

    def loss_of(self, logits: Tensor, images: Tensor, labels: Tensor | None) -> Tensor:
        """The loss, (), of what a network gives for a batch.

        Args:
            logits: (N, classes).
            images, labels: as for learn.
        """
        wanted = None
        if self.settings.distillation > 0:
            with torch.no_grad():
                wanted = logits_of(self._reference(self._placed(images)))
        labels = None if labels is None else labels.to(logits.device)
        return mixed_loss(logits, wanted, labels, self.settings.distillation, self.settings.temperature)

    def _placed(self, images: Tensor) -> Tensor:
        """Images where the network is, in the order in memory that convolutions are fastest in."""
        images = images.to(self.network.device)
        return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images

    def _check_gradients(self) -> None:
        found = [
            p.grad for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        total = torch.stack(torch._foreach_norm(found)).sum()
        if not bool(torch.isfinite(total)):
            raise DivergedError(self.step + 1, "a gradient")

    def is_finite(self) -> bool:
        """Whether all that is learned is finite; a step too long can leave it otherwise."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in self.network.state().values())

    def state(self) -> dict[str, Any]:
        """All that a later step depends on, as plain values and tensors; views, not copies."""
        return {"step": self.step, "network": self.network.state(), "optimizer": self._optimizer.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what state gave, of the same network with the same settings.

        Raises:
            ValueError: if it is of another one.
        """
        self.network.load_state(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])
