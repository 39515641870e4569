"""Decoder-only language models: packaged, from a folder, from the hub, or with seeded random weights."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ftrecipes.errors import UserError
from ftrecipes.models.base import PACKAGED, Loaded, build, config_of, folder_of, read_json
from ftrecipes.tasks.causal_lm import CausalLM

if TYPE_CHECKING:
    from ftrecipes.compose import Settings


def load(settings: Settings, *, meta: bool = False) -> Loaded:
    """The model and its tokenizer; on the meta device neither hub nor weights are touched."""
    notes: list[str] = []
    folder = converted(settings) or folder_of(settings)
    pristine = functools.partial(_build, settings, folder, meta)
    model = pristine()
    tokenizer = _tokenizer(settings, folder, notes, offline=meta or settings.model.weights == "random")
    limit = getattr(model.config, "max_position_embeddings", None)
    length = settings.data.max_length
    if limit and length > limit:
        raise UserError(f"data.max_length={length}: model {settings.model.name} has {limit} positions")
    task = CausalLM(tokenizer, max_length=length, template=settings.data.template, packing=settings.data.packing)
    return Loaded(model, task, pristine, notes=notes)


def converted(settings: Settings) -> Path | None:
    """The folder that a model out of a Python package was converted to, made the first time."""
    source = settings.entry("model").about.get("gguf")
    if not source or settings.model.path:
        return None
    from ftrecipes.models import gguf

    return gguf.folder(settings.model.name, source)


def _build(settings: Settings, folder: Path | None, meta: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model, _ = build(settings, folder, AutoModelForCausalLM, config_of(settings, folder, meta=meta), meta=meta)
    return model  # type: ignore[no-any-return]


def _tokenizer(settings: Settings, folder: Path | None, notes: list[str], *, offline: bool) -> Any:
    from transformers import AutoTokenizer

    hub = settings.entry("model").about.get("hub")
    place: Path | str | None = folder if folder and _has_tokenizer(folder) else None
    if place is None and offline:
        place = PACKAGED / "tiny-llama"
        notes.append("there is no tokenizer beside the weights; tiny-llama's stands in")
    if place is None:
        if folder:
            raise UserError(f"{folder}: no tokenizer (tokenizer.json or tokenizer.model)")
        place = hub
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {place}: {' '.join(str(error).split())[:200]}") from None
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {place}: a fast tokenizer (tokenizer.json) is needed to tell answers from prompts")
    if settings.data.template == "chat" and not tokenizer.chat_template:
        raise UserError(f"tokenizer {place} has no chat template; use data.template=plain")
    return tokenizer


def _has_tokenizer(folder: Path) -> bool:
    if (folder / "tokenizer_config.json").is_file():
        read_json(folder / "tokenizer_config.json")
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
