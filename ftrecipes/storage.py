"""Reading and writing of weights and states: safetensors for weights, plain types and tensors for the rest."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ftrecipes.errors import UserError
from ftrecipes.models.base import check_safetensors
from ftrecipes.record import Record, disk_errors

if TYPE_CHECKING:
    from ftrecipes.run import Run


def save_weights(path: Path, weights: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Tensors by name as safetensors."""
    with disk_errors(str(path)):
        try:
            save_file({name: tensor.contiguous().cpu() for name, tensor in weights.items()}, path, metadata)
        except SafetensorError as error:
            raise OSError(28, f"{error}") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name from safetensors; a cut-off file is refused."""
    if not path.is_file():
        raise UserError(f"{path}: missing")
    check_safetensors(path)
    return load_file(path)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Plain types and tensors."""
    with disk_errors(str(path)):
        try:
            torch.save(state, path)
        except RuntimeError as error:  # torch's zip writer hides errno
            raise OSError(28, str(error).splitlines()[0]) from None


def read_state(path: Path) -> dict[str, Any]:
    """A state that holds plain types and tensors alone; anything that would run code is refused."""
    try:
        return dict(torch.load(path, weights_only=True, map_location="cpu"))
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds objects that would run code when loaded; refused") from None
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None


def save_checkpoint(record: Record, name: str, state: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """A checkpoint, whole or not at all."""
    with record.whole_folder(f"checkpoints/{name}") as folder:
        save_weights(folder / "weights.safetensors", weights)
        save_state(folder / "state.pt", state)


def load_checkpoint(record: Record, name: str) -> dict[str, Any]:
    """State and weights of a checkpoint."""
    folder = record.folder / "checkpoints" / name
    return {**read_state(folder / "state.pt"), "weights": read_weights(folder / "weights.safetensors")}


def save_tuned(record: Record, run: Run) -> None:
    """What differs from the base, as safetensors, and the structure to rebuild it, as JSON."""
    plain, tensors = split(run.stack.structure())
    weights = run.saved_weights()
    info = {"base": run.fingerprint, "methods": json.dumps(list(run.settings.method)), "hash": run.settings.hash, "format": "pt"}
    with record.whole_folder("tuned") as folder:
        save_weights(folder / "weights.safetensors", weights, info)
        if tensors:
            save_weights(folder / "structure.safetensors", tensors)
        text = json.dumps({"structure": plain, **info, "model": run.settings.model.name}, indent=1)
        (folder / "structure.json").write_text(text)


def load_tuned(record: Record) -> dict[str, Any]:
    """Weights and structure of a finished run."""
    folder = record.folder / "tuned"
    plain = json.loads((folder / "structure.json").read_text())["structure"]
    tensors = read_weights(folder / "structure.safetensors") if (folder / "structure.safetensors").is_file() else {}
    return {"structure": join(plain, tensors), "weights": read_weights(folder / "weights.safetensors")}


def split(node: Any, prefix: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Nested plain data with its tensors taken out; each is replaced by its name."""
    if isinstance(node, Tensor):
        return {"__tensor__": prefix}, {prefix: node.detach()}
    tensors: dict[str, Tensor] = {}
    if isinstance(node, dict):
        out: Any = {}
        for key, value in node.items():
            out[key], found = split(value, f"{prefix}/{key}" if prefix else str(key))
            tensors |= found
        return out, tensors
    if isinstance(node, (list, tuple)):
        out = []
        for index, value in enumerate(node):
            plain, found = split(value, f"{prefix}/{index}")
            out.append(plain)
            tensors |= found
        return out, tensors
    return node, tensors


def join(node: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `split`."""
    if isinstance(node, dict):
        if set(node) == {"__tensor__"}:
            return tensors[node["__tensor__"]]
        return {key: join(value, tensors) for key, value in node.items()}
    return [join(value, tensors) for value in node] if isinstance(node, list) else node


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
