"""Classification of images: one label each, cross-entropy over the classes of the head."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftrecipes.tasks.base import Batch, Encoded, Outputs, Task

if TYPE_CHECKING:
    from ftrecipes.data.base import Example
    from ftrecipes.run import Run

MODES = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
"""Ways of resizing by the number that preprocessor_config.json gives them."""


class ClassOutputs(Outputs):
    """logits: (n, classes), in the model's dtype."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class ImageClassification(Task):
    """Images to one of the model's classes.

    labels: names of the classes, in the order of the head. size: (height, width) that the model takes. mean, std: of each
    channel on the scale 0 to 1. mode: how images of another size are resized. positions: of the model for one image.
    """

    domain: ClassVar[str] = "vit"
    unit = "image"
    target = "accuracy"
    forgetting: ClassVar[tuple[str, ...]] = ("accuracy", "nll")

    def __init__(
        self, labels: Sequence[str], *, size: tuple[int, int], mean: Sequence[float], std: Sequence[float], mode: str, positions: int
    ) -> None:
        self.labels = list(labels)
        self.number = {name: index for index, name in enumerate(self.labels)}
        self.size, self.mode, self.positions = size, mode, positions
        self.mean, self.std = (torch.tensor(list(v)).view(-1, 1, 1) for v in (mean, std))

    def encode(self, example: Example) -> Encoded:
        """Bytes of the image (channels, h, w) and the number of its label.

        The image is an array or tensor of bytes, (h, w) or (h, w, channels), or a PIL image; the label a name or a number.
        """
        if "image" not in example or "label" not in example:
            raise ValueError(f"an example needs `image` and `label`, this one has {', '.join(example) or 'nothing'}")
        return {"pixels": self.bytes_of(example["image"]), "label": self.label_of(example["label"]), "length": self.positions}

    def bytes_of(self, image: Any) -> Tensor:
        """An image as (channels, h, w), uint8; grey is repeated to as many channels as the model takes."""
        channels = len(self.mean)
        if hasattr(image, "convert"):
            image = image.convert("RGB" if channels == 3 else "L")
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or 0 in pixels.shape:
            raise ValueError(f"an image must hold bytes, height x width x channels, not {pixels.dtype} {pixels.shape}")
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        if pixels.shape[2] not in (1, channels):
            raise ValueError(f"the model takes images of {channels} channels, this one has {pixels.shape[2]}")
        return torch.tensor(pixels).permute(2, 0, 1).expand(channels, -1, -1)

    def label_of(self, label: Any) -> int:
        """The number of a class."""
        number = self.number.get(label) if isinstance(label, str) else label
        if not isinstance(number, (int, np.integer)) or not 0 <= number < len(self.labels):
            raise ValueError(f"label {label!r} is none of the model's {len(self.labels)} classes")
        return int(number)

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        """pixels (n, channels, *size), float32 and normalised; labels (n,)."""
        shapes = {e["pixels"].shape for e in encoded}
        groups = [[e["pixels"] for e in encoded]] if len(shapes) == 1 else [[e["pixels"]] for e in encoded]
        pixels = torch.cat([self.resized(torch.stack(group)) for group in groups])
        return {"pixels": (pixels / 255 - self.mean) / self.std, "labels": torch.tensor([e["label"] for e in encoded])}

    def blank(self, examples: int, length: int) -> Batch:
        images = torch.zeros(examples, len(self.mean), *self.size)
        return {"pixels": images, "labels": torch.zeros(examples, dtype=torch.long), "example": torch.arange(examples)}

    def resized(self, pixels: Tensor) -> Tensor:
        """Bytes (n, channels, h, w) at the model's size, float32 from 0 to 255, rounded as image libraries do."""
        images = pixels.float()
        if images.shape[-2:] == self.size:
            return images
        if self.mode == "nearest-exact":
            return F.interpolate(images, self.size, mode=self.mode)
        return F.interpolate(images, self.size, mode=self.mode, antialias=True).round().clamp(0, 255)

    def outputs(self, model: nn.Module, batch: Batch) -> ClassOutputs:
        return ClassOutputs(model(pixel_values=batch["pixels"]).logits)

    def losses(self, outputs: Outputs, batch: Batch) -> Tensor:
        assert isinstance(outputs, ClassOutputs)
        return F.cross_entropy(outputs.logits.float(), batch["labels"], reduction="none")

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`accuracy`: the share of images whose likeliest class is right; `nll` per image."""
        outputs = self.outputs(model, batch)
        right = (outputs.logits.argmax(-1) == batch["labels"]).float()
        count = torch.tensor(float(len(right)), device=right.device)
        values = {"accuracy": right, "nll": self.losses(outputs, batch)}
        return {name: torch.stack([v.sum(), count]) for name, v in values.items()}

    def save(self, folder: Path) -> None:
        known = {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": self.size[0], "width": self.size[1]},
            "resample": next(number for number, mode in MODES.items() if mode == self.mode),
            "image_mean": self.mean.flatten().tolist(),
            "image_std": self.std.flatten().tolist(),
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(known, indent=1) + "\n")

    def samples(self, run: Run, examples: Sequence[Example]) -> list[dict[str, str]]:
        """What the model takes images for; drawn ones are described."""
        out = []
        for number, example in enumerate(examples):
            encoded = self.encode(example)
            batch = run.move(self.collate([encoded]))
            answer = int(self.outputs(run.model, batch).logits.argmax())
            shown = example["scene"].caption() if "scene" in example else f"image {number + 1}"
            out.append({"prompt": shown, "wanted": self.labels[encoded["label"]], "answer": self.labels[answer]})
        return out
