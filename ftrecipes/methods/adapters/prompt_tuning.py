"""Prompt tuning: The Power of Scale for Parameter-Efficient Prompt Tuning (arXiv 2104.08691).

n trainable vectors P (n x d) stand before the embedded input of a frozen language model, [P; E(x)], and are all that
trains. They start as embeddings of vocabulary entries drawn without replacement from the 5000 most common ones
(`init: vocab`; a tokenizer's first ids are its most common), of a text, repeated or cut to n tokens (`text`), or uniform
in [-0.5, 0.5].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftrecipes.errors import UserError
from ftrecipes.methods.adapters.activation import Prompt, SequenceMethod
from ftrecipes.methods.adapters.delta import parameter

if TYPE_CHECKING:
    from ftrecipes.run import Run

COMMON = 5000
"""Entries of the vocabulary that are drawn from."""


class PromptTuning(SequenceMethod):
    """Trains vectors in front of the embedded input."""

    length: int
    init: str
    text: str

    def prepare(self, run: Run) -> None:
        embedding: Any = run.model.get_input_embeddings()  # type: ignore[operator]
        table = parameter(embedding.weight, self.length, embedding.weight.shape[1], init=lambda t: t.copy_(self.start(run, embedding)))
        self.prompts(run, Prompt(table), length=self.length)
        run.count("virtual_tokens", self.length)

    @torch.no_grad()
    def start(self, run: Run, embedding: Any) -> Tensor:
        """The vectors at the start (n, d), on the CPU."""
        rng = run.generator("init", "prompt")
        if self.init == "uniform":
            return torch.rand(self.length, embedding.weight.shape[1], generator=rng) - 0.5
        return embedding(torch.tensor(self.tokens(run, rng), device=embedding.weight.device)).float().cpu()  # type: ignore[no-any-return]

    def tokens(self, run: Run, rng: torch.Generator) -> list[int]:
        """The tokens whose embeddings are the start."""
        if self.init == "text":
            return self.repeated(run, self.text, self.length)
        tokenizer = run.task.tokenizer
        special = set(tokenizer.all_special_ids)
        common = [i for i in range(len(tokenizer)) if i not in special][:COMMON]
        if self.length > len(common):
            raise UserError(f"prompt_tuning.length={self.length}: the vocabulary has {len(common)} entries to draw from; use init=uniform")
        return [common[i] for i in torch.randperm(len(common), generator=rng)[: self.length]]

    def peft(self, run: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
        table = run.model.get_decoder().prompt.table  # type: ignore[operator]
        return {"prompt_embeddings": table}, {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": self.length,
            "token_dim": table.shape[1],
            "num_transformer_submodules": 1,
            "num_layers": run.model.config.num_hidden_layers,  # type: ignore[union-attr]
            "num_attention_heads": run.model.config.num_attention_heads,  # type: ignore[union-attr]
            "prompt_tuning_init": "RANDOM",
        }
