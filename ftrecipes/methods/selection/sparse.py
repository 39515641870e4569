"""Sparse selection: of each target weight only chosen entries train, and only they have gradients and optimizer state.

A paper subclasses `SparseMethod` and gives

    select(run, part)    flat positions (k,) of the entries of `part.weight` that train now
    due(run)             whether they are selected anew after this update (never, by default)

The chosen values of a weight live in one compact vector, the parameter that the optimizer sees. Each forward pass writes
them into the weight, and the backward pass forms the dense gradient of one layer at a time, keeps the chosen entries and
drops the rest; memory for gradients and moments falls with the density. When entries are selected anew, what an
optimizer remembers is carried over by position (`carry`): entries that stay keep it, newcomers start at zero, and a
leaver's weight stays where it was moved to.

With `deltas = True` the parameter holds changes from the pretrained entries instead: they start at zero, decay pulls them
to the pretrained weight, and a leaver returns to it (`Chosen.replace`). What must see the dense gradient of a layer before
it is dropped sets `Chosen.watch`.

The record holds the entries that were ever chosen and their values, never the whole weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ftrecipes.errors import UserError
from ftrecipes.method import Method, parts_of
from ftrecipes.methods.adapters.delta import tied_weights
from ftrecipes.update import wide

if TYPE_CHECKING:
    from ftrecipes.anatomy import Part
    from ftrecipes.run import Run


class _Selected(torch.autograd.Function):
    """A layer's output with the chosen values written into its weight; their gradient alone leaves the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, module: nn.Module) -> Tensor:
        weight: Tensor = module.weight  # type: ignore[assignment]
        write(weight, index, module.chosen.entries())  # type: ignore[union-attr, operator]
        ctx.save_for_backward(x, index)
        ctx.module, ctx.values_dtype = module, values.dtype
        return apply(module, x, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, Tensor | None, None]:
        x, index = ctx.saved_tensors
        module = ctx.module
        weight: Tensor = module.weight.detach()
        wants_x, wants_values, _, wants_bias, _ = ctx.needs_input_grad
        grad_x = grad_w = None
        if isinstance(module, nn.Linear):
            flat = g.reshape(-1, g.shape[-1])
            grad_x = g @ weight.to(g.dtype) if wants_x else None
            grad_w = flat.T @ x.reshape(-1, x.shape[-1]).to(g.dtype) if wants_values else None
        else:
            w, inputs = weight.to(g.dtype), x.detach().to(g.dtype) if x.is_floating_point() else x
            wanted = [t.requires_grad_(True) for t, asked in ((inputs, wants_x), (w, wants_values)) if asked]
            with torch.enable_grad():
                y = apply(module, inputs, w, None)
            found = list(torch.autograd.grad(y, wanted, g))
            grad_x = found.pop(0) if wants_x else None
            grad_w = found.pop(0) if wants_values else None
        grad_values = None if grad_w is None else grad_w.reshape(-1)[index].to(ctx.values_dtype)
        if grad_w is not None and module.chosen.watch is not None:
            module.chosen.watch(grad_w.reshape(-1))
        features = 1 if isinstance(module, nn.Conv2d) else -1
        grad_bias = g.movedim(features, -1).reshape(-1, g.shape[features]).sum(0).to(module.bias.dtype) if wants_bias else None
        return None if grad_x is None else grad_x.to(x.dtype), grad_values, None, grad_bias, None


def apply(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A module's output for another weight and bias."""
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(module, nn.Conv2d):
        return module._conv_forward(x, weight, bias)
    if isinstance(module, nn.Embedding):
        return F.embedding(x, weight, module.padding_idx)
    rows = x.reshape(-1, x.shape[-1])  # Conv1D of GPT-2
    y = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
    return y.view(*x.shape[:-1], -1)


@torch.no_grad()
def write(weight: Tensor, index: Tensor, values: Tensor) -> None:
    """Put values at flat positions of a weight."""
    weight.view(-1).index_copy_(0, index, values.to(weight.dtype))


class Chosen(nn.Module):
    """The chosen entries of one weight: flat positions, and values in float32, or float64 where the weight is.

    origin: the pretrained entries where the values are changes from them, else None. watch: called with the dense gradient
    (flat) of every backward pass.
    """

    index: Tensor
    origin: Tensor | None

    def __init__(self, weight: Tensor, index: Tensor, *, deltas: bool = False) -> None:
        super().__init__()
        entries = wide(weight.detach().reshape(-1)[index])
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("origin", entries if deltas else None, persistent=False)
        self.values = nn.Parameter(torch.zeros_like(entries) if deltas else entries)
        self.watch: Callable[[Tensor], None] | None = None

    @torch.no_grad()
    def entries(self) -> Tensor:
        """What the weight holds at the chosen positions."""
        return self.values.detach() if self.origin is None else self.origin + self.values

    @torch.no_grad()
    def take(self, weight: Tensor) -> None:
        """Read the values from the weight."""
        entries = wide(weight.reshape(-1)[self.index])
        self.values.copy_(entries if self.origin is None else entries - self.origin)

    @torch.no_grad()
    def replace(self, weight: Tensor, slots: Tensor, index: Tensor) -> None:
        """Give these places of the vector to other entries, which begin at no change; the old ones return to the pretrained weight."""
        assert self.origin is not None
        write(weight, self.index[slots], self.origin[slots])
        self.index, self.origin = self.index.clone(), self.origin.clone()
        self.index[slots], self.origin[slots] = index, wide(weight.reshape(-1)[index])
        self.values[slots] = 0.0


class _Sparse:
    """Mixed into the class of a module whose weight trains in part."""

    chosen: Chosen

    def forward(self, x: Tensor) -> Tensor:
        return _Selected.apply(x, self.chosen.values, self.chosen.index, getattr(self, "bias", None), self)  # type: ignore[no-any-return]


_classes: dict[type, type] = {}


class SparseMethod(Method):
    """Base of the methods that train chosen entries. Knobs that it reads: `targets`, `blocks`."""

    picks = True
    kinds: ClassVar[tuple[str, ...]] = ("Linear", "Conv1D", "Conv2d", "Embedding")
    deltas: ClassVar[bool] = False
    targets: list[str]
    blocks: Any = "all"

    def select(self, run: Run, part: Part) -> Tensor:
        raise NotImplementedError

    def due(self, run: Run) -> bool:
        return False

    def carry(self, run: Run, name: str, old: Tensor, new: Tensor) -> None:
        """Take what the optimizer remembers of a weight's chosen entries from old positions to new ones.

        Vectors of the state that are as long as the values are carried by position; the rest (step counters) stays.
        """
        for optimizer in getattr(run.optimizer, "parts", [run.optimizer]):
            state = optimizer.state.get(self.chosen[name].values, {}) if optimizer else {}
            for key, tensor in list(state.items()):
                if isinstance(tensor, Tensor) and tensor.shape == old.shape:
                    state[key] = carried(old, new, tensor)

    def group(self, name: str, parameter: nn.Parameter) -> dict[str, Any]:
        """Chosen values are a vector and decay as the matrix that they belong to."""
        return {"weight_decay": self.decay} if name.removesuffix(".chosen.values") in self.chosen else {}

    def prepare(self, run: Run) -> None:
        self.parts = {part.name: part for part in parts_of(run, self, self.targets, self.blocks)}
        self.begin_with(run)
        shared = tied_weights(run.model) & set(self.parts)
        if shared:
            raise UserError(f"{self.key} cannot act on {min(shared)}: another module shares its weight; narrow {self.key}.targets")
        for part in self.parts.values():
            self.attach(run, part, self.select(run, part))

    def begin_with(self, run: Run) -> None:
        """Nothing is chosen yet."""
        self.ever: dict[str, Tensor] = {}
        self.chosen: dict[str, Chosen] = {}
        self.decay: float = run.settings.optimizer.weight_decay

    def attach(self, run: Run, part: Part, index: Tensor) -> None:
        """Let these entries of a part train."""
        module = part.module
        if type(module).__name__ not in self.kinds:
            raise UserError(f"{self.key} cannot act on {part.name} ({type(module).__name__}); narrow {self.key}.targets")
        chosen = Chosen(part.weight, index.to(part.weight.device), deltas=self.deltas)
        module.__class__ = _classes.setdefault(type(module), type(f"Sparse{type(module).__name__}", (_Sparse, type(module)), {}))
        module.chosen = chosen
        self.chosen[part.name] = chosen
        self.ever[part.name] = chosen.index.clone()  # of its own: safetensors refuses two names for one memory

    def updated(self, run: Run) -> None:
        if self.due(run):
            for name, part in self.parts.items():
                self.reselect(run, name, part)
            run.count("reselections")

    @torch.no_grad()
    def reselect(self, run: Run, name: str, part: Part) -> None:
        """Choose entries anew from the weight as it is now."""
        chosen = self.chosen[name]
        write(part.weight, chosen.index, chosen.entries())
        old, new = chosen.index, self.select(run, part).to(chosen.index.device)
        if len(new) != len(old):
            raise RuntimeError(f"{self.key}: {name} went from {len(old)} chosen entries to {len(new)}")
        self.carry(run, name, old, new)
        run.log("sparse/kept", torch.isin(new, old).float().mean())
        chosen.index = new
        # the parameter stays the same object: the optimizer holds it
        kept = carried(old, new, chosen.values.detach())
        fresh = wide(part.weight.reshape(-1)[new])
        chosen.values.copy_(torch.where(torch.isin(new, old), kept, fresh))
        self.ever[name] = torch.cat([self.ever[name], new]).unique()

    def writes(self) -> set[str]:
        return {f"{name}.weight" for name in self.chosen}

    def structure(self) -> dict[str, Any]:
        """Chosen positions, and positions and values of all entries that were ever chosen."""
        out: dict[str, Any] = {}
        for name, chosen in self.chosen.items():
            weight = self.parts[name].weight
            write(weight, chosen.index, chosen.entries())
            if self.deltas:
                out[name] = {"index": chosen.index}
                continue
            ever = self.ever[name]
            out[name] = {"index": chosen.index, "ever": ever, "moved": weight.detach().reshape(-1)[ever]}
        return {"chosen": out}

    def restore(self, run: Run, structure: dict[str, Any]) -> None:
        parts = {part.name: part for part in run.anatomy.parts}
        self.parts = {name: parts[name] for name in structure["chosen"]}
        self.begin_with(run)
        for name, saved in structure["chosen"].items():
            part = self.parts[name]
            if not self.deltas:
                write(part.weight, saved["ever"].to(part.weight.device), saved["moved"].to(part.weight.device))
            self.attach(run, part, saved["index"])
            if not self.deltas:
                self.ever[name] = saved["ever"].to(part.weight.device)

    def finish(self, run: Run) -> None:
        for name, chosen in self.chosen.items():
            write(self.parts[name].weight, chosen.index, chosen.entries())

    def merge(self, run: Run) -> None:
        self.finish(run)
        for part in self.parts.values():
            part.module.__class__ = type(part.module).__mro__[2]
            del part.module.chosen
        self.chosen = {}


def carried(old: Tensor, new: Tensor, values: Tensor) -> Tensor:
    """Values by position from old to new positions; zero where a position is new."""
    sorted_old, by = old.sort()
    place = torch.searchsorted(sorted_old, new).clamp_max(len(old) - 1)
    found = sorted_old[place] == new
    return torch.where(found, values[by[place]], torch.zeros((), dtype=values.dtype, device=values.device))


def largest(score: Tensor, k: int) -> Tensor:
    """Flat positions of the k largest entries of a score, ascending."""
    if score.is_meta:
        return torch.empty(k, dtype=torch.long, device="meta")
    return score.flatten().topk(k, sorted=False).indices.sort().values
