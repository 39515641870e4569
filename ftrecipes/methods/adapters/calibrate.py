"""What calibration batches say of the weights that an adapter will sit on, before anything trains.

    mean_gradients(run, parts, …)    the gradient of the loss with respect to each whole weight
    watching(parts, see)             the inputs of each module, as they pass
    token_rows(x, batch, …)          the rows of an input that belong to tokens

Batches are of the training data in a shuffled order of their own (`run.calibration`). The loss is the task's at the
pretrained weights; what other methods of the stack do to it is not built yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftrecipes.errors import UserError
from ftrecipes.update import Window, wide

if TYPE_CHECKING:
    from ftrecipes.anatomy import Part
    from ftrecipes.method import Method
    from ftrecipes.run import Run


def mean_gradients(run: Run, method: Method, parts: Sequence[Part], *, iters: int, bsz: int) -> dict[str, Tensor]:
    """dL/dW of each part as it is stored, the mean over `iters` batches of `bsz` examples of the gradient of a batch's mean loss.

    The model is in train mode. A weight's gradient leaves the device as soon as the backward pass made it, so that one
    layer's is held there at a time; the sums are float32 or better on the CPU.
    """
    world = run.update.world
    mine = list(run.calibration(iters * bsz, batch=bsz))[world.rank :: world.size]
    if not mine:
        raise UserError(f"{method.key}: {iters} calibration batches are too few for {world.size} processes; raise {method.key}.iters")
    sums: dict[str, Tensor] = {}
    unscale = 1.0 / run.update.scaler.scale if run.update.scaler else 1.0

    def keep(name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            grad = wide(weight.grad).to("cpu").mul_(unscale)
            weight.grad = None
            sums[name] = sums[name].add_(grad) if name in sums else grad

        return hook

    def mean_loss(batch: dict[str, Any]) -> Tensor:
        return run.task.losses(run.task.outputs(run.model, batch), batch).sum() / run.task.count(batch)

    training = run.model.training
    flags = [(part.weight, part.weight.requires_grad) for part in parts]
    hooks = []
    try:
        run.model.train()
        for part in parts:
            hooks.append(part.weight.requires_grad_(True).register_post_accumulate_grad_hook(keep(part.name)))
        run.gradients(Window(mine, float(iters)), mean_loss)
    finally:
        for handle in hooks:
            handle.remove()
        for weight, flag in flags:
            weight.requires_grad_(flag)
        for parameter in run.model.parameters():
            parameter.grad = None
        run.model.train(training)
    for part in parts:
        if part.name not in sums:
            raise UserError(
                f"{method.key}: the loss of the calibration batches does not depend on {part.name}; narrow {method.key}.targets"
            )
        if world.size > 1:
            total = sums[part.name].to(run.device)
            world.sum([total])
            sums[part.name] = total.cpu()
        if not torch.isfinite(sums[part.name]).all():
            raise UserError(f"{method.key}: the gradient of {part.name} on the calibration batches is not finite")
    run.count("calibration_batches", iters)
    return sums


@contextmanager
def watching(parts: Sequence[Part], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see(name, x)` with the input of each part at every forward pass inside."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: see(name, args[0].detach())

    handles = [part.module.register_forward_pre_hook(hook(part.name)) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def token_rows(x: Tensor, batch: dict[str, Any], *, learned: bool) -> Tensor:
    """An input (…, features) as rows; where it has one for each token, without padding, and of `learned` tokens alone if asked."""
    labels, segment = batch.get("labels"), batch.get("segment")
    keep = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device).flatten()
    if segment is not None and segment.numel() == len(keep):
        keep &= (segment >= 0).flatten()
    if learned and labels is not None and labels.numel() == len(keep) and not labels.is_floating_point():
        keep &= (labels != -100).flatten()
    return x.flatten(0, -2)[keep]
