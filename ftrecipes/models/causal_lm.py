"""Decoder-only language models: packaged, from a folder, from the hub, or with seeded random weights."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ftrecipes.errors import UserError
from ftrecipes.models.base import PACKAGED, Loaded, build, config_of, folder_of, load_errors, read_json
from ftrecipes.tasks.causal_lm import CausalLM

if TYPE_CHECKING:
    from ftrecipes.compose import Settings


def load(settings: Settings, *, meta: bool = False) -> Loaded:
    """The model and its tokenizer; on the meta device neither hub nor weights are touched."""
    notes: list[str] = []
    folder = folder_of(settings, meta=meta)
    config = config_of(settings, folder, meta=meta)
    limit = getattr(config, "max_position_embeddings", None)
    length = settings.data.max_length
    if limit and length > limit and "data.max_length" in settings.origin:  # nobody asked for that much
        notes.append(f"data.max_length is {limit}, the positions that the model has, not {length}")
        length = limit
    if limit and length > limit:
        raise UserError(f"data.max_length={length}: model {settings.model.name} has {limit} positions; data.max_length={limit} fits")
    tokenizer = _tokenizer(settings, folder, notes, stand_in=meta or settings.model.weights == "random")
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"{folder or settings.model.name}: its tokenizer has {len(tokenizer)} tokens, its embedding {config.vocab_size}")
    pristine = functools.partial(_build, settings, folder, meta)
    task = CausalLM(tokenizer, max_length=length, template=settings.data.template, packing=settings.data.packing)
    return Loaded(pristine(), task, pristine, notes=notes)


def _build(settings: Settings, folder: Path | None, meta: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model, _ = build(settings, folder, AutoModelForCausalLM, config_of(settings, folder, meta=meta), meta=meta)
    return model  # type: ignore[no-any-return]


def _tokenizer(settings: Settings, folder: Path | None, notes: list[str], *, stand_in: bool) -> Any:
    from transformers import AutoTokenizer

    if folder and _has_tokenizer(folder):
        place = folder
    elif stand_in:
        place = PACKAGED / "tiny-llama"
        notes.append("there is no tokenizer beside the weights; tiny-llama's stands in")
    else:
        raise UserError(f"{folder}: no tokenizer (tokenizer.json or tokenizer.model)")
    with load_errors(settings, place):
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UserError(f"{place}: a fast tokenizer (tokenizer.json) is needed to tell answers from prompts")
    if settings.data.template == "chat" and not tokenizer.chat_template:
        raise UserError(f"{place}: its tokenizer has no chat template; use data.template=plain")
    return tokenizer


def _has_tokenizer(folder: Path) -> bool:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
