"""Prefix-Tuning: Optimizing Continuous Prompts for Generation (arXiv 2101.00190).

Trainable keys and values stand in front of those of the tokens in every layer of a frozen transformer,

    K_l <- [P_K,l ; K_l],  V_l <- [P_V,l ; V_l],   P (n x 2 L D), D = key heads x head width

With `projection` m > 0 the table is not trained itself but made by a small network, P[i] = W_2 tanh(W_1 E[i] + b_1) + b_2
with E (n x d), W_1 (m x d), W_2 (2 L D x m), which trains more steadily; after training the table is computed once and
the network is dropped. Tokens count their positions from n on, as behind a prefix of tokens; keys of a rotary model
enter as they are, unrotated.

`init: text` starts P at the keys and values that the frozen model itself computes for a text, so the run starts where
that text stood before every input. The authors' code does so with projection 0, as here; with a network it first fits that
to the activations, which this leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftrecipes.errors import UserError
from ftrecipes.methods.adapters.activation import Prefix, SequenceMethod, heads_of
from ftrecipes.methods.adapters.delta import parameter

if TYPE_CHECKING:
    from ftrecipes.run import Run


class Made(Prefix):
    """A prefix whose table is made by a network with one hidden layer, from E (n x d) in the table's place."""

    def __init__(
        self, near: Tensor, sizes: tuple[int, int, int, int], heads: int, width: int, draw: Callable[[str], torch.Generator]
    ) -> None:
        n, d, m, numbers = sizes
        super().__init__(parameter(near, n, d, init=lambda t: t.normal_(generator=draw("E"))), heads, width)

        def uniform(name: str, bound: float) -> Callable[[Tensor], Any]:
            return lambda t: t.uniform_(-bound, bound, generator=draw(name))

        self.W1 = parameter(near, m, d, init=uniform("W1", 1 / math.sqrt(d)))
        self.b1 = parameter(near, m, init=uniform("b1", 1 / math.sqrt(d)))
        self.W2 = parameter(near, numbers, m, init=uniform("W2", 1 / math.sqrt(m)))
        self.b2 = parameter(near, numbers, init=uniform("b2", 1 / math.sqrt(m)))

    def numbers(self, layer: int) -> Tensor:
        size = 2 * self.heads * self.width
        return self.rows(slice(layer * size, (layer + 1) * size))

    def rows(self, rows: slice) -> Tensor:
        """Some columns of the table."""
        hidden = torch.tanh(F.linear(self.table, self.W1, self.b1))
        return F.linear(hidden, self.W2[rows], self.b2[rows])


class PrefixTuning(SequenceMethod):
    """Trains keys and values in front of every layer's own."""

    length: int
    projection: int
    init: str
    init_std: float
    text: str
    blocks: Any

    def prepare(self, run: Run) -> None:
        found = None
        if self.init == "text":
            if self.projection or run.task.domain != "causal-lm":
                raise UserError("prefix_tuning.init=text starts the table of a language model; it needs prefix_tuning.projection=0")
            found = self.activations(run)
        self.build(run, flat=self.projection == 0)
        if found is not None:
            self.prefix.table.data.copy_(found)
        run.count("virtual_tokens", self.length)

    def build(self, run: Run, *, flat: bool) -> None:
        """Put a prefix in front of the model, as a table or as the network that makes it."""
        attentions = self.attentions(run, self.blocks)
        near = next(attentions[0].parameters())
        heads, width = heads_of(run.model)
        numbers = 2 * len(attentions) * heads * width

        def draw(purpose: str) -> torch.Generator:
            return run.generator("init", "prefix", purpose)

        if flat:
            start = parameter(near, self.length, numbers, init=lambda t: t.normal_(0, self.init_std, generator=draw("table")))
            self.prefix = Prefix(start, heads, width)
        else:
            sizes = (self.length, run.model.config.hidden_size, self.projection, numbers)  # type: ignore[union-attr]
            self.prefix = Made(near, sizes, heads, width, draw)  # type: ignore[arg-type]
        self.prefixes(run, self.prefix, length=self.length, blocks=self.blocks, shift=run.task.domain == "causal-lm")

    @torch.no_grad()
    def activations(self, run: Run) -> Tensor | None:
        """Keys and values (n, 2 L D) that the frozen model computes for the text; None where it has no weights."""
        model: Any = run.model
        ids = self.repeated(run, self.text, self.length)
        device = model.device
        if device.type == "meta":
            return None
        training = model.training
        model.eval()
        cache = model.get_decoder()(input_ids=torch.tensor([ids], device=device), use_cache=True).past_key_values
        model.train(training)
        layers = [cache.layers[module.layer_idx] for module in self.attentions(run, self.blocks)]
        return torch.cat([part[0].transpose(0, 1).flatten(1) for layer in layers for part in (layer.keys, layer.values)], 1)

    @torch.no_grad()
    def finish(self, run: Run) -> None:
        """Compute the table once and drop the network that made it."""
        if isinstance(self.prefix, Made):
            flat = Prefix(nn.Parameter(self.prefix.rows(slice(None))), self.prefix.heads, self.prefix.width)
            self.prefixes(run, flat, length=self.length, blocks=self.blocks, shift=False)
            self.prefix = flat

    def structure(self) -> dict[str, Any]:
        return {"flat": not isinstance(self.prefix, Made)}

    def restore(self, run: Run, structure: dict[str, Any]) -> None:
        self.build(run, flat=structure["flat"])

    def peft(self, run: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if len(self.attentions(run, self.blocks)) != len(run.anatomy.blocks):
            raise UserError("prefix_tuning: peft has prefixes in all layers or in none, and prefix_tuning.blocks leaves some out")
        table, heads = self.prefix.table, self.prefix.heads
        return {"prompt_embeddings": table}, {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": self.length,
            "token_dim": heads * self.prefix.width,
            "num_transformer_submodules": 1,
            "num_layers": len(run.anatomy.blocks),
            "num_attention_heads": heads,
            "encoder_hidden_size": heads * self.prefix.width,
            "prefix_projection": False,
        }
