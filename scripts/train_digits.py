"""Train the network that qtool brings along: qtool/models/digits_resnet.pth, from qtool/data/digits.npz.

    python scripts/train_digits.py [FILE]

Takes about ten seconds on one core. Two runs on one machine write the same bytes.
"""

import io
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtool.models.archs import DIGITS_PREPROCESSING
from qtool.models.digits import DigitsResNet

QTOOL = Path(__file__).parents[1] / "qtool"
# The first seed; no seed was chosen by its accuracy.
SEED = 0
EPOCHS, BATCH_SIZE, MAX_LEARNING_RATE = 60, 32, 0.01


def load_split(first: int, last: int) -> tuple[Tensor, Tensor]:
    """Normalized images (N, 1, 8, 8) and labels (N,) whose index modulo 10 is first to last.

    The digits come grouped by writer, so an interleaved split shows every writer to every part.
    """
    with np.load(QTOOL / "data" / "digits.npz") as digits:
        index = np.arange(len(digits["labels"])) % 10
        chosen = (index >= first) & (index <= last)
        images, labels = (
            torch.from_numpy(digits["images"][chosen]),
            torch.from_numpy(digits["labels"][chosen]),
        )
    (mean,), (std,) = DIGITS_PREPROCESSING.mean, DIGITS_PREPROCESSING.std
    return (images[:, None] / 16 - mean) / std, labels


def shift(images: Tensor) -> Tensor:
    """Move each image by up to one pixel in each direction; what comes in is background."""
    padded = F.pad(images, (1, 1, 1, 1), value=float(images.min()))
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1)  # (N, 1, 3, 3, 8, 8)
    dy, dx = torch.randint(3, (2, len(images)))
    return windows[torch.arange(len(images)), :, dy, dx]


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    steps = EPOCHS * -(-len(images) // BATCH_SIZE)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, MAX_LEARNING_RATE, total_steps=steps)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(BATCH_SIZE):
            loss = F.cross_entropy(model(shift(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def main(path: Path) -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # sums in one order
    torch.use_deterministic_algorithms(True)
    model = DigitsResNet()
    train(model, *load_split(0, 4))
    model.eval()
    images, labels = load_split(7, 9)
    with torch.no_grad():
        top1 = 100 * (model(images).argmax(1) == labels).float().mean().item()
    # A file object, because torch writes the name of a path into the archive.
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(buffer.getvalue())
    partial.replace(path)
    num_params = sum(p.numel() for p in model.parameters())
    print(f"{path}: top-1 {top1:.2f} % on {len(labels)} test images, {num_params} parameters")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else QTOOL / "models" / "digits_resnet.pth")
