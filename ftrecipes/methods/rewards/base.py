"""Rewards of sampled images, and what methods that learn from them share.

A reward takes images (n, 3, h, w) from 0 to 1 and their prompts and gives one number an image (n,). Those that can be
differentiated serve methods that send gradients through the sampler; any serves methods that only look at the number. A
plugin adds one with `@registry.reward("name")`, a function `(images, examples) -> scores` where an example holds `prompt`.

A paper on rewards is a `RewardMethod` (knobs `reward`, `num_steps`, `guidance_scale`). It finds

    self.reward_of(run, images, prompts)     the checked rewards (n,), with gradients where `differentiable` is set
    run.task.sample(model, batch, …)         latents by the model's sampler: `eta` > 0 is stochastic, `gradient_steps` keeps the
                                             graph of the last steps, `watch` sees mean and deviation of every step
    run.task.decode(latents)                 images; the decoder is frozen and gradients pass
    samplers.log_prob(x, mean, deviation)    log-probability of a step
    Reference(run)                           the model before training: deltas off where that is the same, else a frozen copy

Noise of a rollout is a function of the window's seeds, so it is another one in every update and the same after a resume.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ftrecipes import registry
from ftrecipes.data import scenes
from ftrecipes.errors import RunFailed, UserError, nearest
from ftrecipes.method import Method
from ftrecipes.methods.objectives.tokens import Reference as Reference

if TYPE_CHECKING:
    from ftrecipes.run import Run

Prompts = Sequence[str]


class Reward(NamedTuple):
    """function: (images, prompts) to (n,). differentiable: whether gradients reach the images."""

    function: Callable[[Tensor, Prompts], Tensor]
    differentiable: bool


def brightness(images: Tensor, prompts: Prompts) -> Tensor:
    """Mean of all channels."""
    return images.mean((1, 2, 3))


def redness(images: Tensor, prompts: Prompts) -> Tensor:
    """How much the red channel stands above the mean of the others."""
    red, green, blue = images.mean((2, 3)).unbind(1)
    return red - (green + blue) / 2


def smoothness(images: Tensor, prompts: Prompts) -> Tensor:
    """Minus the mean difference of neighbouring pixels: what a compressor saves, as something that can be differentiated."""
    return -(images.diff(dim=2).abs().mean((1, 2, 3)) + images.diff(dim=3).abs().mean((1, 2, 3)))


def compressibility(images: Tensor, prompts: Prompts) -> Tensor:
    """Minus the kilobytes of the image as JPEG at quality 95 (as in DDPO)."""
    from PIL import Image

    sizes = []
    for pixels in (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=95)
        sizes.append(-buffer.tell() / 1000)
    return torch.tensor(sizes, device=images.device)


def bright_pixels(images: Tensor, prompts: Prompts) -> Tensor:
    """Share of pixels whose mean is above a half: a count, which has no gradient."""
    return (images.mean(1) > 0.5).float().mean((1, 2))


def asked(images: Tensor, prompts: Prompts) -> Tensor:
    """Share of what the prompt asks for (count, colour, shape, place) that the image shows."""
    return scenes.score(images, prompts).mean(1).to(images.device)


REWARDS = {
    "brightness": Reward(brightness, True),
    "redness": Reward(redness, True),
    "smoothness": Reward(smoothness, True),
    "compressibility": Reward(compressibility, False),
    "bright_pixels": Reward(bright_pixels, False),
    "asked": Reward(asked, False),
}


def reward(name: str) -> Reward:
    """A reward by name, a plugin's or one of these."""
    if own := registry.find("reward", name):
        return Reward(lambda images, prompts: own(images, [{"prompt": p} for p in prompts]), True)
    if name not in REWARDS:
        raise UserError(f"unknown reward '{name}'{nearest(name, REWARDS)}; there are {', '.join(REWARDS)}")
    return REWARDS[name]


def scored(name: str, images: Tensor, prompts: Prompts) -> Tensor:
    """The reward of each image, float32; one that is not finite or of another shape stops the run."""
    found = reward(name).function(images, prompts)
    if not isinstance(found, Tensor) or found.shape != (len(images),):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise RunFailed(f"reward {name}: gave {shape} for {len(images)} images, must give one number an image")
    if not torch.isfinite(found).all():
        raise RunFailed(f"reward {name}: is not finite for {int((~torch.isfinite(found)).sum())} of {len(images)} images")
    return found.float()


def judged(images: Tensor, prompts: Prompts) -> dict[str, Tensor]:
    """All rewards of evaluated images by name, those of plugins included."""
    names = [*REWARDS, *(name for kind, name in registry._code if kind == "reward")]
    if not all(scenes.parse(prompt) for prompt in prompts):
        names.remove("asked")
    return {name: scored(name, images, prompts).detach() for name in names}


class RewardMethod(Method):
    """A method that learns from a reward of sampled images."""

    differentiable = False
    reward: str
    num_steps: int
    guidance_scale: float

    def prepare(self, run: Run) -> None:
        found = reward(self.reward)
        if self.differentiable and not found.differentiable:
            able = ", ".join(name for name, r in REWARDS.items() if r.differentiable)
            raise UserError(f"{self.key}.reward={self.reward}: has no gradient, which {self.key} needs; there are {able}")
        run.task.target = f"reward/{self.reward}"

    def reward_of(self, run: Run, images: Tensor, prompts: Prompts) -> Tensor:
        """The rewards of images (n,)."""
        found = scored(self.reward, images, prompts)
        if self.differentiable and not found.requires_grad and torch.is_grad_enabled():
            raise RunFailed(f"reward {self.reward}: no gradient passes it, and {self.key} needs one")
        run.report("reward", found.detach().sum())
        run.count("rollouts", len(images))
        return found
