"""Image classifiers: packaged, from a folder, from the hub, or with seeded random weights; a new head where classes differ."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftrecipes import data
from ftrecipes.anatomy import ROLES
from ftrecipes.errors import UserError
from ftrecipes.models.base import Loaded, build, config_of, folder_of, load_errors, read_json
from ftrecipes.tasks.classification import MODES, ImageClassification

if TYPE_CHECKING:
    from ftrecipes.compose import Settings

HEAD = re.compile(dict(ROLES)["head"])


def load(settings: Settings, *, meta: bool = False) -> Loaded:
    """The model with a head for the classes of the data set; on the meta device neither hub nor weights are touched."""
    folder = folder_of(settings, meta=meta)
    labels = data.splits(settings).labels
    pristine = functools.partial(_build, settings, folder, labels, meta)
    model, fresh, notes = pristine()
    config = model.config
    mean, std, mode = _preprocessing(settings, folder, config, notes, offline=meta or settings.model.weights == "random")
    height, width = _pair(config.image_size)
    rows, columns = (side // patch for side, patch in zip((height, width), _pair(config.patch_size), strict=True))
    names = [config.id2label[i] for i in range(config.num_labels)]
    task = ImageClassification(names, size=(height, width), mean=mean, std=std, mode=mode, positions=rows * columns + 1)
    return Loaded(model, task, lambda: pristine()[0], fresh=fresh, notes=notes)


def _build(settings: Settings, folder: Path | None, labels: Sequence[str], meta: bool) -> tuple[Any, set[str], list[str]]:
    """The model, its parameters that start at random, and what to say of them."""
    from transformers import AutoModelForImageClassification

    config = config_of(settings, folder, meta=meta)
    had = [str(config.id2label[i]) for i in range(config.num_labels)] if _has_head(config) else []
    if labels:
        config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
    elif not had:
        raise UserError(f"model {settings.model.name} has no head, and data {settings.data.name} names no classes to make one for")
    model, fresh = build(settings, folder, AutoModelForImageClassification, config, meta=meta, may_lack=_in_head)
    if meta and settings.model.weights != "random" and len(had) != config.num_labels:
        fresh = {name for name, _ in model.named_parameters() if _in_head(name)}
    notes = []
    if fresh:
        reason = f"the model's own is for {len(had)}" if had else "the model has none"
        notes.append(f"a new head for {config.num_labels} classes starts at random and trains ({reason})")
    elif labels and had != list(labels) and had[0] != "LABEL_0":
        notes.append(f"the head for {len(had)} classes is kept, although the data calls them otherwise ({labels[0]}, not {had[0]})")
    return model, fresh, notes


def _has_head(config: Any) -> bool:
    return any("ForImageClassification" in name for name in config.architectures or [])


def _in_head(parameter: str) -> bool:
    return bool(HEAD.search(parameter.rpartition(".")[0]))


def _pair(side: Any) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else (side[0], side[1])


def _preprocessing(
    settings: Settings, folder: Path | None, config: Any, notes: list[str], *, offline: bool
) -> tuple[list[float], list[float], str]:
    """Mean and deviation of the channels, and how images are resized, from preprocessor_config.json."""
    path = folder / "preprocessor_config.json" if folder else None
    if not folder and not offline:
        from huggingface_hub import hf_hub_download

        with load_errors(settings, folder):
            path = Path(hf_hub_download(settings.entry("model").about["hub"], "preprocessor_config.json"))
    known = read_json(path) if path and path.is_file() else {}
    if folder and not known:
        notes.append(f"{folder} has no preprocessor_config.json: pixels are scaled with mean 0.5 and deviation 0.5")
    if known.get("do_center_crop"):
        notes.append("images are resized to the model's size; the centre crop of preprocessor_config.json is left out")
    if not known.get("do_rescale", True) or abs(255 * known.get("rescale_factor", 1 / 255) - 1) > 1e-3:
        raise UserError(f"{path}: pixels that are not scaled to 0 … 1 are not supported")
    channels = config.num_channels
    plain = not known.get("do_normalize", True)
    mean, std = known.get("image_mean") or [0.5] * channels, known.get("image_std") or [0.5] * channels
    if len(mean) != channels or len(std) != channels:
        raise UserError(f"{path}: image_mean and image_std must have {channels} numbers each")
    mode = MODES.get(known.get("resample", 2))
    if mode is None:
        raise UserError(f"{path}: resample={known['resample']} is none of {', '.join(f'{k} ({v})' for k, v in MODES.items())}")
    return ([0.0] * channels, [1.0] * channels, mode) if plain else (mean, std, mode)
