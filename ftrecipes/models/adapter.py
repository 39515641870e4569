"""A start from what was tuned before: a finished run of this project, or a `peft` adapter folder.

What was tuned is folded into the weights of the same base, so the run that starts from it sees a plain model.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftrecipes.errors import UserError
from ftrecipes.record import Record
from ftrecipes.stacking import check_mergeable

if TYPE_CHECKING:
    from torch import nn

    from ftrecipes.models.base import Loaded

FOLDED = ("LORA", "IA3", "LN_TUNING")
"""Kinds of peft's adapters that the weights can hold (a DoRA is a LORA)."""
PREFIX = "base_model.model."
"""What peft writes before the name of a module."""


def check(folder: Path) -> str:
    """`run` or `peft`, by what lies in a folder; anything else is refused. Needs no torch."""
    where = f"model.adapter={folder}"
    if not folder.is_dir():
        raise UserError(f"{where}: no such folder")
    if (folder / "run.json").is_file():
        if not (folder / "tuned").is_dir():
            raise UserError(f"{where}: this run is not finished; go on with it by resume={folder}")
        check_mergeable(Record(folder).info.get("methods", []))
        return "run"
    if (folder / "adapter_config.json").is_file():
        if not (folder / "adapter_model.safetensors").is_file():
            pickled = (folder / "adapter_model.bin").is_file()
            why = "adapter_model.bin is a pickle, which can run code; convert it to safetensors first" if pickled else "no adapter weights"
            raise UserError(f"{where}: {why}")
        if find_spec("peft") is None:
            raise UserError(f"{where}: a peft adapter, and peft is not installed (pip install 'ftrecipes[peft]')")
        return "peft"
    if (folder / "config.json").is_file():
        raise UserError(f"{where}: a whole model, no adapter; load it with model.path={folder}")
    raise UserError(f"{where}: neither a finished run (run.json) nor a peft adapter (adapter_config.json)")


def apply(loaded: Loaded, folder: Path) -> Loaded:
    """The model with what was tuned folded in, in the dtypes that it was loaded in; its pristine copies have it too."""
    fold = _from_run if check(folder) == "run" else _from_peft

    def put(start: Loaded) -> set[str]:
        dtypes = {name: p.dtype for name, p in start.model.named_parameters()}
        given = fold(start, folder)
        for name, parameter in start.model.named_parameters():
            parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
        return given

    def pristine() -> nn.Module:
        start = replace(loaded, model=loaded.pristine())
        put(start)
        return start.model

    given = put(loaded)
    return replace(loaded, pristine=pristine, fresh=loaded.fresh - given, notes=[*loaded.notes, f"starts from {folder}"])


def _from_run(start: Loaded, folder: Path) -> set[str]:
    """Fold a finished run into the model that it was tuned from; returns the names of the weights that it holds."""
    from ftrecipes.run import Run

    run = Run.open(folder, loaded=start)
    run.merge()
    return run.touched


def _from_peft(start: Loaded, folder: Path) -> set[str]:
    """Fold an adapter of peft into the model; returns the names of the weights that it holds whole."""
    from peft import PeftModel, get_peft_model_state_dict

    from ftrecipes.methods.adapters.delta import tied_weights, untie
    from ftrecipes.models.base import read_json
    from ftrecipes.storage import read_weights

    where = f"model.adapter={folder}"
    kind = read_json(folder / "adapter_config.json").get("peft_type")
    if kind not in FOLDED:
        raise UserError(f"{where}: peft_type {kind} cannot be folded in here; {', '.join(FOLDED)} can")
    saved = read_weights(folder / "adapter_model.safetensors")
    model: Any = start.model
    try:
        with warnings.catch_warnings(action="ignore"):  # what matters of them is refused below
            wrapped: Any = PeftModel.from_pretrained(model, str(folder), torch_device="cpu")
            wanted = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{where}: does not fit this model: {' '.join(str(error).split())[:200]}") from error
    if missing := sorted(wanted - set(saved)):
        raise UserError(f"{where}: does not fit this model: {missing[0]} is missing")
    if stray := sorted(name for name in set(saved) - wanted if ".base_layer." not in name):
        raise UserError(f"{where}: does not fit this model: there is no place for {stray[0]}")
    tied = tied_weights(model)
    for name, module in model.named_modules():
        if name in tied and name.endswith(".base_layer"):  # folding into a shared weight would change its other owner too
            untie(model, module)
    wrapped.merge_and_unload(safe_merge=True)
    if tied and not tied_weights(model):  # one of them was saved whole
        model.config.tie_word_embeddings = False
    return {name.removeprefix(PREFIX) for name in saved} & set(model.state_dict())
