"""Delta: what is added to a frozen weight.

A paper is a subclass of `Delta` (one weight's trainable numbers) and a `DeltaMethod` that names it. In `Delta`:

    __init__(layer, method, rng)   make parameters from `layer.weight` (rows x cols) and the knobs
    delta()                        the dense update (rows x cols)
    forward(x, y)                  the layer's new output, where y = W x + b was computed already; override it when the
                                   update has a cheaper form than a dense product: `y + self.product(x, B, A)`
    enter(x)                       what the frozen layer gets in place of x, for an update that acts on inputs alone
    merged(weight)                 the new dense weight, when it is not weight + delta()
    structure()                    what is needed to rebuild it before its values are loaded, beyond the knobs
    factors()                      the update as other libraries can hold it, where it has such a form

Rows are outputs and columns inputs, for Linear, Conv1D (GPT-2), convolutions (columns are kernel positions) and Embedding (rows
are its dimensions, columns its tokens) alike. Features stand last in y and in what `into` gives, so a formula written for
Linear holds for all. The base stays bit-equal; trainable numbers are float32 whatever the base is held in (float64 for a
float64 base), and products run in the dtype of the activations.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ftrecipes.anatomy import CONVS
from ftrecipes.errors import UserError
from ftrecipes.method import Method, parts_of

if TYPE_CHECKING:
    from ftrecipes.anatomy import Part
    from ftrecipes.run import Run


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products inside run in the dtype of their factors, under mixed precision too."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T in the dtype of x."""
    return F.linear(x, weight.to(x.dtype))


def parameter(near: Tensor, *shape: int, init: Callable[[Tensor], Any] | None = None) -> nn.Parameter:
    """A trainable tensor on the device of a weight, at least float32; zeros unless `init` fills it (drawn on the CPU)."""
    dtype = torch.promote_types(near.dtype, torch.float32)
    if near.is_meta:
        return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
    tensor = torch.zeros(shape, dtype=dtype)
    if init is not None:
        init(tensor)
    return nn.Parameter(tensor.to(near.device))


class Layer:
    """A module with one weight, seen as a matrix, whatever its kind."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module

    @property
    def raw(self) -> Tensor:
        """The frozen weight as it is stored."""
        return self.module.weight.detach()  # type: ignore[union-attr, operator]

    @property
    def dtype(self) -> torch.dtype:
        """What trainable numbers are held and merged in: float32, or float64 where the base is."""
        return torch.promote_types(self.raw.dtype, torch.float32)

    @property
    def weight(self) -> Tensor:
        """The frozen weight as (rows x cols), in `dtype`."""
        return self.matrix(self.raw).to(self.dtype)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.matrix(self.raw).shape
        return rows, cols

    @property
    def device(self) -> torch.device:
        return self.raw.device

    def matrix(self, weight: Tensor) -> Tensor:
        """A stored weight as (rows x cols)."""
        return weight.T if isinstance(self.module, (Conv1D, nn.Embedding)) else weight.flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        if isinstance(self.module, (Conv1D, nn.Embedding)):
            return matrix.T
        return matrix.reshape(self.raw.shape)

    def into(self, x: Tensor, matrix: Tensor) -> Tensor:
        """The layer's product with another matrix (r x cols) in place of its weight; features last (…, r)."""
        module = self.module
        if isinstance(module, CONVS):
            kernel = matrix.to(x.dtype).reshape(len(matrix), *self.raw.shape[1:])
            return module._conv_forward(x, kernel, None).movedim(1, -1)
        if isinstance(module, nn.Embedding):
            scale = getattr(module, "embed_scale", 1.0)  # some families multiply what they look up
            return F.embedding(x, matrix.T, module.padding_idx) * scale
        return linear(x, matrix)

    def last(self, y: Tensor) -> Tensor:
        """An output of the module with features last."""
        return y.movedim(1, -1) if isinstance(self.module, CONVS) else y

    def back(self, y: Tensor) -> Tensor:
        """The inverse of `last`."""
        return y.movedim(-1, 1) if isinstance(self.module, CONVS) else y


class Factors(NamedTuple):
    """An update as thin factors, scale * B A (rows x r, r x cols); with DoRA's lengths m (rows,) of the new weight's rows."""

    B: Tensor
    A: Tensor
    scale: float
    m: Tensor | None = None


class Delta(nn.Module):
    """The trainable numbers of one weight."""

    def __init__(self, layer: Layer, method: Any, rng: Callable[[str], torch.Generator]) -> None:
        super().__init__()
        self.layer = layer
        self.strength = 1.0

    def parameter(self, *shape: int, init: Callable[[Tensor], Any] | None = None) -> nn.Parameter:
        """A parameter beside the layer's weight; zeros unless `init` fills it (drawn on the CPU)."""
        return parameter(self.layer.raw, *shape, init=init)

    def delta(self) -> Tensor:
        """The dense update (rows x cols)."""
        raise NotImplementedError

    def merged(self, weight: Tensor) -> Tensor:
        """The new weight (rows x cols) for the frozen one, both in the layer's `dtype`."""
        return weight + self.delta()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.layer.into(x, self.delta())

    def enter(self, x: Tensor) -> Tensor | None:
        """What the frozen layer gets in place of x, where that alone is the update; None where `forward` is."""
        return None

    def product(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """The update left @ right (rows x r, r x cols) applied to x, never formed."""
        return linear(self.layer.into(x, right), left)

    def structure(self) -> dict[str, Any]:
        return {}

    def factors(self) -> Factors | None:
        """The update as thin factors, None where it has no such form."""
        return None

    def apply_to(self, x: Tensor, y: Tensor) -> Tensor:
        """The module's output with the delta at its strength, in the module's dtype and layout."""
        if self.strength == 0.0:
            return y
        last = self.layer.last(y)
        new = self(x.to(y.dtype) if x.is_floating_point() else x, last).to(y.dtype)
        if self.strength != 1.0:
            new = torch.lerp(last, new, self.strength)
        return self.layer.back(new)

    def final(self, weight: Tensor) -> Tensor:
        """The merged weight at the delta's strength."""
        merged = self.merged(weight)
        return merged if self.strength == 1.0 else torch.lerp(weight, merged, self.strength)


class _Adapted:
    """Mixed into the class of a module that carries a delta; its weights keep their names."""

    delta: Delta

    def forward(self, x: Tensor) -> Tensor:
        entering = self.delta.enter(x)
        if entering is not None:
            return super().forward(entering)  # type: ignore[misc, no-any-return]
        return self.delta.apply_to(x, super().forward(x))  # type: ignore[misc]


_classes: dict[type, type] = {}


def adapted(cls: type) -> type:
    """The class of a module once it carries a delta."""
    if cls not in _classes:
        _classes[cls] = type(f"Adapted{cls.__name__}", (_Adapted, cls), {})
    return _classes[cls]


class DeltaMethod(Method):
    """A method that freezes the model and puts a Delta on each target.

    Knobs that it reads: `targets` (roles, groups of roles, `re:…`), `blocks` (all, first-N, last-N, a list).
    """

    picks = True
    module: ClassVar[type[Delta]]
    kinds: ClassVar[tuple[type, ...]] = (nn.Linear, Conv1D, nn.Conv2d, nn.Embedding)
    grouped: ClassVar[bool] = False
    """True when its deltas can sit on grouped convolutions."""
    targets: list[str]
    blocks: Any = "all"

    def __init__(self, key: str, knobs: dict[str, Any]) -> None:
        super().__init__(key, knobs)
        self.deltas: dict[str, Delta] = {}

    def prepare(self, run: Run) -> None:
        for part in parts_of(run, self, self.targets, self.blocks):
            self.attach(run, part)

    def restore(self, run: Run, structure: dict[str, Any]) -> None:
        parts = {part.name: part for part in run.anatomy.parts}
        for name, saved in structure["deltas"].items():
            self.attach(run, parts[name], saved)

    def structure(self) -> dict[str, Any]:
        return {"deltas": {n: {"strength": d.strength, **d.structure()} for n, d in self.deltas.items()}}

    def check(self, part: Part) -> None:
        """Refuse a part that cannot carry a delta of this method."""
        module = part.module
        if not isinstance(module, self.kinds):
            raise UserError(f"{self.key} cannot act on {part.name} ({type(module).__name__}); narrow {self.key}.targets")
        if isinstance(module, _Adapted):
            raise UserError(f"{self.key}: {part.name} already carries a delta; two adapters cannot share a weight")
        if isinstance(module, CONVS) and module.groups > 1 and not self.grouped:
            raise UserError(f"{self.key}: {part.name} is a grouped convolution; narrow {self.key}.targets")

    def attach(self, run: Run, part: Part, saved: dict[str, Any] | None = None) -> None:
        """Put a delta on a part; `saved` is its structure when it is rebuilt."""
        self.check(part)
        module = part.module
        layer = Layer(part.name, module)
        delta = self.make(layer, lambda purpose: run.generator("init", part.name, purpose), saved)
        delta.strength = (saved or {}).get("strength", 1.0)
        self.deltas[part.name] = delta
        module.__class__ = adapted(type(module))
        module.delta = delta.to(part.weight.device) if part.weight.device.type != "meta" else delta

    def make(self, layer: Layer, rng: Callable[[str], torch.Generator], saved: dict[str, Any] | None) -> Delta:
        """The delta of a layer; a subclass whose deltas have a structure of their own reads `saved`."""
        return self.module(layer, self, rng)

    def factors(self, name: str) -> Factors | None:
        """The update of a module as thin factors, None where it has no such form."""
        return self.deltas[name].factors()

    def merge(self, run: Run) -> None:
        tied = tied_weights(run.model)
        for name, delta in self.deltas.items():
            module, layer = delta.layer.module, delta.layer
            new = layer.stored(delta.final(layer.weight))
            if name in tied:
                untie(run.model, module)
            module.weight.copy_(new)  # type: ignore[union-attr, operator]
            run.rounding = max(run.rounding, float((new - layer.raw).abs().max()))
            module.__class__ = type(module).__mro__[2]
            del module.delta
        self.deltas = {}


def tied_weights(model: nn.Module) -> set[str]:
    """Names of modules whose weight is shared with another module."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def untie(model: Any, module: nn.Module) -> None:
    """Give a module whose weight is shared a weight of its own, equal to the shared one and frozen."""
    module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)  # type: ignore[union-attr, operator]
    model.config.tie_word_embeddings = False


def check_rank(method: Any, layer: Layer, rank: int, knob: str = "rank") -> None:
    """Refuse a rank that the layer's matrix does not have."""
    if rank > min(layer.shape):
        raise UserError(
            f"{method.key}.{knob}={rank}: {layer.name} is {layer.shape[0]} x {layer.shape[1]}, its rank is at most {min(layer.shape)}"
        )
