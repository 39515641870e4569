"""Activations: modules at a named place in a frozen model, and trained vectors in front of its sequence.

**A module at a place.** A paper is a subclass of `Insert` (the trainable numbers of one place) and an `InsertMethod`
that names it. In `Insert`:

    __init__(place, method, rng)   make parameters from the place's widths (place.rows outputs, place.cols inputs) and the knobs
    enter(x)                       what the module at the place is given instead of x
    forward(x, y)                  what becomes of its output y; x is what it was given
    fold(run)                      write the insert into the module's weights; left out where no weight can hold it

A place is a part by role, so `o` is the end of the attention sub-layer and `down` that of the feed-forward one, before the
residual sum; `up` (or `q`) is where they begin. What stands beside a sub-layer reads the input of its first part through
a `Tap` and acts on the output of its last. In y features stand last, whatever the module; x is as the module gets it.

`InsertMethod` puts one insert on each part that `targets` and `blocks` name. Override `insert(run, part)` for another
class by role, or `prepare` and call `self.put(run, part, insert)` yourself. `Affine`, a scale and a shift by channel, is
ready: it folds into linear, convolution, embedding and norm weights, and gives a bias to modules whose architecture has
room for one.

**In front of the sequence.** `SequenceMethod` has two tools, both for models of transformers:

    self.prompts(run, Prompt(table))       n vectors (n, d) stand before the embedded tokens of every sequence
    self.prefixes(run, Prefix(table, …))   n keys and values a layer, which every query of self-attention can read

A subclass of `Prompt` or `Prefix` computes them where they are no plain table. Callers see neither: outputs have the
tokens' length, a decoder's positions count on behind the n vectors (a prefix with `shift=False` leaves them), padding
masks grow by n columns, packed examples get the vectors each for itself and do not see one another, and a generation cache
holds prompts like tokens and prefixes not at all. Prefixes enter at transformers' attention interface, so they work under
checkpointing and with any mask.

A method that the weights cannot hold says why in its YAML, `unmergeable: <why>`, and merge, export and `model.adapter=`
refuse with that; `peft(run)` returns what peft can hold. The base stays bit-equal; trainable numbers are float32
(float64 for a float64 base) and act in the dtype of the activations.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.utils.import_utils import is_tracing

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

    inserted: Insert

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        insert, strength = self.inserted, self.inserted.strength
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
        if any(hasattr(module, name) for name in ("inserted", "delta", "chosen")):
            raise UserError(f"{self.key}: {part.name} already carries what another method put there; narrow {self.key}.targets")
        self.inserts[part.name] = insert
        mixed(_Placed, module)
        module.inserted = insert
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
            del module.inserted
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


# ---------------------------------------------------------------------------------------------------------------------
# in front of the sequence


class Prompt(nn.Module):
    """n vectors that stand before the embedded tokens of every sequence; a subclass may compute them."""

    def __init__(self, table: nn.Parameter) -> None:
        super().__init__()
        self.table = table

    def vectors(self) -> Tensor:
        """(n, d), in the dtype of the parameters."""
        return self.table

    def lay(self, tokens: Tensor, position: Tensor | None, packed: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Rows with the vectors in them, their positions, and where the tokens stand now.

        tokens: (B, L, d). position: (B, L), None where the model counts itself. packed: rows may hold several sequences,
        each of which begins where positions do not count on, and gets vectors of its own. The places of the tokens are
        (B, L), or None when they are simply the last L.
        """
        vectors = self.vectors().to(tokens.dtype)
        n, (B, L, d) = len(vectors), tokens.shape
        count = torch.arange(n, device=tokens.device)
        begins = None
        if packed and position is not None and not is_tracing(position):
            position = position.expand(B, -1)
            begins = torch.ones_like(position, dtype=torch.bool)
            begins[:, 1:] = position.diff(dim=1) != 1
        if begins is None or not begins[:, 1:].any():
            rows = torch.cat([vectors.expand(B, n, d), tokens], 1)
            if position is not None:
                position = torch.cat([position[:, :1] + count, position + n], 1)
            return rows, position, None
        assert position is not None
        ordinal = begins.cumsum(1)
        place = torch.arange(L, device=tokens.device) + n * ordinal
        width = L + n * int(ordinal[:, -1].max())
        row, at = begins.nonzero(as_tuple=True)
        front = (row[:, None], place[row, at][:, None] - n + count)  # (sequences, n)
        rows = tokens.new_zeros(B, width, d).scatter(1, place[..., None].expand(B, L, d), tokens)
        rows = rows.index_put(front, vectors.expand(len(row), n, d))
        positions = torch.arange(width, device=tokens.device).repeat(B, 1).scatter(1, place, position + n)
        return rows, positions.index_put(front, position[row, at][:, None] + count), place


class _Prompted:
    """Mixed into the class of a decoder whose sequences have a prompt; callers see the tokens alone."""

    prompt: Prompt

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        n = len(self.prompt.vectors())
        if attention_mask is not None:
            attention_mask = _widened(attention_mask, n)
        given = {"attention_mask": attention_mask, "past_key_values": past_key_values, **kwargs}
        if past_key_values is not None and past_key_values.get_seq_length():  # the prompt is in the cache
            position_ids = None if position_ids is None else position_ids + n
            return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, position_ids=position_ids, **given)  # type: ignore[misc]
        tokens = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds  # type: ignore[attr-defined]
        rows, position_ids, place = self.prompt.lay(tokens, position_ids, packed=attention_mask is None and past_key_values is None)
        out = super().forward(inputs_embeds=rows, position_ids=position_ids, **given)  # type: ignore[misc]
        hidden = out.last_hidden_state
        out.last_hidden_state = hidden[:, n:] if place is None else hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[-1]))
        return out


class _Shifted:
    """Mixed into the class of a decoder whose positions begin behind a prefix that no token stands for."""

    behind: int

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if position_ids is None and tokens is not None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(tokens.shape[1], device=tokens.device)[None] + past
        given = {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds, **kwargs}
        return super().forward(input_ids=input_ids, position_ids=position_ids + self.behind, **given)  # type: ignore[misc, operator]


def _widened(mask: Tensor, n: int) -> Tensor:
    """A padding mask (B, L) with n columns in front that count."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise UserError("a prompt needs a padding mask of (batch, length); caches of a fixed size prepare another")
    return F.pad(mask, (n, 0), value=1)


class Prefix(nn.Module):
    """Keys and values that every query of some layers' self-attention can read.

    heads, width: of the keys. A column of the table (n x layers * 2 * heads * width) is ((2 layer + s) heads + head) width
    + entry, with s = 0 for keys and 1 for values; a subclass may compute the table.
    """

    def __init__(self, table: nn.Parameter, heads: int, width: int) -> None:
        super().__init__()
        self.table = table
        self.heads, self.width = heads, width

    def numbers(self, layer: int) -> Tensor:
        """A layer's columns of the table (n, 2 * heads * width)."""
        size = 2 * self.heads * self.width
        return self.table[:, layer * size : (layer + 1) * size]

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (heads, n, width) each."""
        numbers = self.numbers(layer)
        keys, values = numbers.view(len(numbers), 2, self.heads, self.width).permute(1, 2, 0, 3)
        return keys, values


PREFIXED = "ftr_prefixed"
"""Name of the attention function that reads prefixes; modules without one never call it."""


def prefixed_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    """The module's own attention with its prefix in front of keys and values (B, heads, L, width), seen by every query."""
    prefix, layer = module.prefixed
    keys, values = prefix.of(layer)
    B, n, Q, K = len(key), keys.shape[1], query.shape[2], key.shape[2]
    causal = kwargs.get("is_causal")
    if mask is None and Q > 1 and (getattr(module, "is_causal", True) if causal is None else causal):
        mask = torch.ones(Q, K, dtype=torch.bool, device=key.device).tril(K - Q)[None, None]
    if mask is not None:
        mask = F.pad(mask, (n, 0), value=True) if mask.dtype == torch.bool else F.pad(mask, (n, 0))
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = F.pad(kwargs["position_bias"], (n, 0))
    key = torch.cat([keys.to(key.dtype).expand(B, -1, -1, -1), key], 2)
    value = torch.cat([values.to(value.dtype).expand(B, -1, -1, -1), value], 2)
    return module.own_attention(module, query, key, value, mask, **kwargs)


class SequenceMethod(Method):
    """A method that freezes the model and puts trained vectors in front of its sequences."""

    picks = True

    def prompts(self, run: Run, prompt: Prompt, *, length: int) -> None:
        """Let `length` vectors stand before the embedded tokens of every sequence of a decoder."""
        decoder = self.decoder(run, length)
        if hasattr(decoder, "prompt"):
            raise UserError(f"{self.key}: another method put a prompt there; keep one of them")
        mixed(_Prompted, decoder)
        decoder.prompt = prompt

    def prefixes(self, run: Run, prefix: Prefix, *, length: int, blocks: Any = "all", shift: bool = True) -> None:
        """Let self-attention of these blocks read a prefix of `length`; with `shift`, a decoder's positions count on behind it.

        A second prefix takes the place of the first.
        """
        if shift:
            decoder = self.decoder(run, length)
            mixed(_Shifted, decoder)
            decoder.behind = length
        run.model.add_module("prefix", prefix)
        for layer, module in enumerate(self.attentions(run, blocks)):
            own = module.config._attn_implementation
            if "flash" in own:
                raise UserError(f"{self.key}: prefixes need a mask, which model.attention={own} has not; model.attention=sdpa has")
            if own != PREFIXED:
                eager = own not in ALL_ATTENTION_FUNCTIONS
                module.own_attention = (
                    sys.modules[type(module).__module__].eager_attention_forward if eager else ALL_ATTENTION_FUNCTIONS[own]
                )
                module.config = copy.copy(module.config)
                module.config._attn_implementation = PREFIXED
            module.prefixed = (prefix, layer)  # in a tuple: the prefix is the model's, not the layer's

    @staticmethod
    def repeated(run: Run, text: str, length: int) -> list[int]:
        """The tokens of a text, repeated or cut to a length."""
        ids = run.task.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        if not ids:
            raise UserError("init=text needs text='what the start should say'")
        return (ids * (length // len(ids) + 1))[:length]

    def attentions(self, run: Run, blocks: Any = "all") -> list[Any]:
        """The self-attention modules of blocks, by depth; those that do not use transformers' interface are refused."""
        names = dict.fromkeys(part.name.rpartition(".")[0] for part in parts_of(run, self, ["k", "qkv"], blocks))
        modules = [run.model.get_submodule(name) for name in names]
        for name, module in zip(names, modules, strict=True):
            forward = inspect.unwrap(type(module).forward)
            if "ALL_ATTENTION_FUNCTIONS" not in forward.__code__.co_names:
                raise UserError(f"{self.key} cannot act on {name}: {type(module).__name__} has attention of its own kind")
        return modules

    def decoder(self, run: Run, length: int) -> Any:
        """The decoder of a language model, if it has positions for `length` more."""
        limit = getattr(run.model.config, "max_position_embeddings", None)
        most = getattr(run.task, "max_length", 0)
        if limit and most + length > limit:
            raise UserError(
                f"{self.key}.length={length}: with data.max_length={most} that is more than the {limit} positions of "
                f"{run.settings.model.name}; data.max_length={limit - length} fits"
            )
        return run.model.get_decoder()  # type: ignore[operator]


def heads_of(model: Any) -> tuple[int, int]:
    """Heads and width of a head of a model's keys."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    queries = config.num_attention_heads
    return getattr(config, "num_key_value_heads", None) or queries, getattr(config, "head_dim", None) or config.hidden_size // queries


AttentionInterface.register(PREFIXED, prefixed_attention)
