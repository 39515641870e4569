"""Activations: modules at a named place in a frozen model, and trained vectors in front of its sequence.

**A module at a place.** A paper is a subclass of `Insert` (the trainable numbers of one place) and an `InsertMethod`
that names it. In `Insert`:

    __init__(place, method, rng)   make parameters from the place's widths (place.rows outputs, place.cols inputs) and the knobs
    enter(x)                       what the module at the place is given instead of x
    forward(x, y)                  what becomes of its output y; x is what it was given
    fold(place)                    write the insert into the module's weights; left out where no weight can hold it

A place is a part by role, so `o` is the end of the attention sub-layer and `down` that of the feed-forward one, before the
residual sum; `up` (or `q`) is where they begin. What stands beside a sub-layer reads the input of its first part through
a `Tap` and acts on the output of its last. In y features stand last, whatever the module; x is as the module gets it.

`InsertMethod` puts one insert on each part that `targets` and `blocks` name. Override `insert(run, part)` for another
class by role, or `prepare` and call `self.put(run, part, insert)` yourself. `Affine`, a scale and a shift by channel, is
ready: it folds into linear, convolution, embedding and norm weights, and gives a bias to modules whose architecture has
room for one.

**In front of the sequence.** `SequenceMethod` has two tools, both for models of transformers:

    self.prompts(run, prompt)          `prompt.vectors()` (n, d) stand before the embedded tokens of every sequence
    self.prefixes(run, prefix)         `prefix.of(layer)` gives keys and values (heads, n, head width) that every query of
                                       self-attention can read; no token is added

Callers see neither: outputs have the tokens' length, positions count on behind the n vectors (`shift=False` leaves them),
padding masks grow by n columns, packed examples each get their own vectors and do not see each other's, and a generation
cache holds prompts like tokens and prefixes not at all. Prefixes enter at transformers' attention interface, so they work
under checkpointing and with any mask.

Nothing in a method's YAML needs to say more, but `unmergeable: <why>` where the weights cannot hold the result: merge,
export and `model.adapter=` then refuse with that reason. `peft(run)` returns what peft can hold. The base stays bit-equal;
trainable numbers are float32 (float64 for a float64 base) and act in the dtype of the activations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ftrecipes.errors import UserError
from ftrecipes.method import Method, parts_of
from ftrecipes.methods.adapters.delta import Delta, Layer, tied_weights, untie

if TYPE_CHECKING:
    from ftrecipes.anatomy import Part
    from ftrecipes.run import Run

Draw = Callable[[str], torch.Generator]
"""A generator for one purpose."""

SWITCHES = ("attention_bias", "mlp_bias", "use_bias", "qkv_bias")
"""Settings of transformers' configurations that give biases to linear layers."""


# ---------------------------------------------------------------------------------------------------------------------
# modules at a place


class Place(Layer):
    """A module that an insert stands at: its weight as (rows x cols), rows its outputs; a norm's is a single column."""

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def cols(self) -> int:
        return self.shape[1]

    def matrix(self, weight: Tensor) -> Tensor:
        return weight[:, None] if weight.dim() == 1 else super().matrix(weight)

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix[:, 0] if self.raw.dim() == 1 else super().stored(matrix)

    @property
    def channels_first(self) -> bool:
        """Whether features stand second in what the module gives, as images and BatchNorm have them."""
        images = (nn.Conv1d, nn.Conv2d, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
        return isinstance(self.module, images) or getattr(self.module, "data_format", None) == "channels_first"

    def last(self, y: Tensor) -> Tensor:
        return y.movedim(1, -1) if self.channels_first else y

    def back(self, y: Tensor) -> Tensor:
        return y.movedim(-1, 1) if self.channels_first else y


class Insert(Delta):
    """What stands at one place; by itself it changes nothing. Its strength scales what it changes."""

    layer: Place

    def __init__(self, place: Place) -> None:
        super().__init__(place, None, torch.Generator)

    def enter(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def fold(self, run: Run) -> None:
        raise UserError(f"what stands at {self.layer.name} cannot be folded into its weight")


class Tap(Insert):
    """Remembers what its module was given, for an insert further on in the same block."""

    seen: Tensor | None = None

    def enter(self, x: Tensor) -> Tensor:
        self.seen = x
        return x

    def take(self) -> Tensor:
        """What was seen, which is forgotten."""
        assert self.seen is not None
        x, self.seen = self.seen, None
        return x


class Affine(Insert):
    """y -> scale * y + shift by channel on a module's output, or x -> scale * x on its input; each may be absent (None)."""

    def __init__(self, place: Place, *, before: bool = False) -> None:
        super().__init__(place)
        self.scale: nn.Parameter | None = None
        self.shift: nn.Parameter | None = None
        self.before = before

    def enter(self, x: Tensor) -> Tensor:
        return self._scaled(x, x) if self.before else x

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.before:
            return y
        return self._scaled(y, y if self.shift is None else y + self.shift.to(y.dtype))

    def _scaled(self, x: Tensor, moved: Tensor) -> Tensor:
        """moved + (scale - 1) x. Rounded to 16 bits, a scale of 1.003 is 1; scale - 1 keeps its digits."""
        return moved if self.scale is None else torch.addcmul(moved, x, (self.scale - 1).to(x.dtype))

    @torch.no_grad()
    def fold(self, run: Run) -> None:
        """W' = diag(scale) W, b' = scale * b + shift; W' = W diag(scale) where the input is scaled."""
        place, module = self.layer, self.layer.module
        if place.name in tied_weights(run.model):
            untie(run.model, module)
        one = place.weight.new_ones(place.cols if self.before else place.rows)
        scale = one if self.scale is None else torch.lerp(one, self.scale, self.strength)
        if self.before:
            new = place.weight * scale
        else:
            offset = gain_offset(module)
            new = scale[:, None] * (place.weight + offset) - offset
        shift = None if self.shift is None else self.strength * self.shift
        if isinstance(module, nn.Embedding):
            new, shift = new if shift is None else new + shift[:, None], None
        self._write(run, module.weight, place.stored(new))  # type: ignore[arg-type]
        if self.before:
            return
        bias = getattr(module, "bias", None)
        if shift is not None and bias is None:
            bias = module.bias = nn.Parameter(torch.zeros_like(scale, dtype=place.raw.dtype), requires_grad=False)
        if bias is not None:
            wide = scale * bias.to(scale.dtype)
            self._write(run, bias, wide if shift is None else wide + shift)

    @staticmethod
    def _write(run: Run, weight: Tensor, value: Tensor) -> None:
        weight.copy_(value)
        run.rounding = max(run.rounding, float((value - weight).abs().max()))


def gain_offset(module: nn.Module) -> float:
    """1 for a norm whose gain is 1 + weight (Gemma's), 0 for all others, found by asking it with a weight of zeros."""
    weight = module.weight
    if weight.dim() > 1 or getattr(module, "bias", None) is not None:  # type: ignore[union-attr, operator]
        return 0.0
    zeroed = copy.deepcopy(module)
    zeroed.weight.data.zero_()  # type: ignore[union-attr, operator]
    probe = torch.linspace(1, 2, len(weight), dtype=weight.dtype, device=weight.device)  # type: ignore[arg-type, call-overload]
    return 1.0 if bool(type(module).forward(zeroed, probe[None]).any()) else 0.0  # type: ignore[operator]


class _Placed:
    """Mixed into the class of a module that an insert stands at; its weights keep their names."""

    insert: Insert

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        insert, strength = self.insert, self.insert.strength
        given = insert.enter(x) if strength else x
        if given is not x:
            x = torch.lerp(x, given, strength) if strength != 1.0 else given
        y = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return insert.apply_to(x, y) if strength else y


_classes: dict[tuple[type, type], type] = {}


def mixed(mixin: type, module: nn.Module) -> None:
    """Give a module the class that is its own with a mixin in front."""
    cls = type(module)
    if (mixin, cls) not in _classes:
        _classes[mixin, cls] = type(f"{mixin.__name__.strip('_')}{cls.__name__}", (mixin, cls), {})
    module.__class__ = _classes[mixin, cls]


class InsertMethod(Method):
    """A method that freezes the model and puts an insert at each target.

    Knobs that it reads: `targets` (roles, groups of roles, `re:…`), `blocks` (all, first-N, last-N, a list).
    """

    picks = True
    module: ClassVar[type[Insert]]
    targets: list[str]
    blocks: Any = "all"

    def __init__(self, key: str, knobs: dict[str, Any]) -> None:
        super().__init__(key, knobs)
        self.inserts: dict[str, Insert] = {}

    def prepare(self, run: Run) -> None:
        for part in parts_of(run, self, self.targets, self.blocks):
            self.put(run, part, self.insert(run, part))

    def insert(self, run: Run, part: Part) -> Insert:
        """The insert of a part."""
        return self.module(Place(part.name, part.module), self, self.draw(run, part))  # type: ignore[arg-type, call-arg]

    @staticmethod
    def draw(run: Run, part: Part) -> Draw:
        """Generators for the start of a part's numbers, by purpose."""
        return lambda purpose: run.generator("init", part.name, purpose)

    def put(self, run: Run, part: Part, insert: Insert) -> None:
        """Let an insert stand at a part."""
        module = part.module
        if any(hasattr(module, name) for name in ("insert", "delta", "chosen")):
            raise UserError(f"{self.key}: {part.name} already carries what another method put there; narrow {self.key}.targets")
        self.inserts[part.name] = insert
        mixed(_Placed, module)
        module.insert = insert
        run.count("places")

    def structure(self) -> dict[str, Any]:
        return {"strength": {name: i.strength for name, i in self.inserts.items() if i.strength != 1.0}}

    def restore(self, run: Run, structure: dict[str, Any]) -> None:
        super().restore(run, structure)
        for name, strength in structure["strength"].items():
            self.inserts[name].strength = strength

    def merge(self, run: Run) -> None:
        needy = {n for n, i in self.inserts.items() if getattr(i, "shift", None) is not None and not _has_bias(i.layer.module)}
        make_room(run, self.key, needy)
        for insert in self.inserts.values():
            module = insert.layer.module
            module.__class__ = type(module).__mro__[2]
            del module.insert
            insert.fold(run)
        self.inserts = {}


def _has_bias(module: nn.Module) -> bool:
    """Whether a module can take a shift: it has a bias, or is an embedding, whose rows can."""
    return getattr(module, "bias", None) is not None or isinstance(module, nn.Embedding)


def biases_of(model: Any, switches: tuple[str, ...]) -> set[str]:
    """Names of the modules that have a bias when these settings of the configuration are on."""
    config = copy.deepcopy(model.config)
    for switch in switches:
        setattr(config, switch, True)
    with torch.device("meta"):
        twin = type(model)(config)
    return {name for name, module in twin.named_modules() if getattr(module, "bias", None) is not None}


def room_for_biases(model: Any) -> set[str] | None:
    """Names of the modules that may have a bias in this architecture; None where any may (a plain torch module)."""
    if not hasattr(model, "config"):
        return None
    return biases_of(model, tuple(s for s in SWITCHES if getattr(model.config, s, None) is False))


def make_room(run: Run, key: str, needy: set[str]) -> None:
    """Give modules a bias of zeros, and the configuration the settings under which the model's class has them."""
    model: Any = run.model
    if not needy or not hasattr(model, "config"):
        run.base_names |= {f"{name}.bias" for name in needy}
        return
    off = [s for s in SWITCHES if getattr(model.config, s, None) is False]
    needed = {s: added for s in off if (added := biases_of(model, (s,)) - biases_of(model, ())) & needy}
    if left := sorted(needy - set().union(*needed.values())):
        raise UserError(
            f"{key}: {type(model).__name__} has no place for the shift of {left[0]} and {len(left) - 1} more; "
            f"train with {key}.shift=foldable (or {key}.shift=none) to merge"
        )
    for switch, names in needed.items():
        setattr(model.config, switch, True)
        for name in names:
            module = model.get_submodule(name)
            if getattr(module, "bias", None) is None:
                weight = module.weight
                rows = weight.shape[1] if type(module).__name__ == "Conv1D" else weight.shape[0]
                module.bias = nn.Parameter(torch.zeros(rows, dtype=weight.dtype, device=weight.device), requires_grad=False)
                run.base_names.add(f"{name}.bias")
