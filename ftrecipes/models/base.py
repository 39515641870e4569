"""What all loaders share: finding a folder in the hub's format, checking it, fingerprints, and the pristine weights."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftrecipes.catalogue import PACKAGE
from ftrecipes.errors import UserError
from ftrecipes.rng import derive
from ftrecipes.tasks.base import Task

if TYPE_CHECKING:
    from ftrecipes.compose import Settings

PACKAGED = PACKAGE / "models" / "packaged"
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*", "README.md"]
NESTED_LEFT = [
    "*.fp16.*",
    "*.non_ema.*",
    "safety_checker/*",
    "feature_extractor/*",
    "*_pytorch_*/*",
    "vae_*/*",
    "v1-*",
    "sd_xl_*",
    "sd3*",
    "flux1*",
    "ae.*",
]
"""Of a pipeline on the hub: what stands there twice, or is not used."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Loaded:
    """A model with the task of its domain.

    pristine: gives the model as it was before any tuning, a second one; for methods that look back at the start.
    blocks: names of the blocks by depth, where they are not lists of one kind.
    fresh: parameters that the weights lacked and that start at random (a new head); they train under every method.
    notes: one-line remarks for the user.
    """

    model: nn.Module
    task: Task
    pristine: Callable[[], nn.Module]
    roles: list[tuple[str, str]] = field(default_factory=list)
    fresh: set[str] = field(default_factory=set)
    blocks: list[str] | None = None
    notes: list[str] = field(default_factory=list)


def dtype_of(settings: Settings) -> torch.dtype:
    """The dtype that frozen weights are held in."""
    if settings.model.dtype:
        return DTYPES[settings.model.dtype]
    return torch.bfloat16 if precision_of(settings).startswith("bf16") else torch.float32


def device_of(settings: Settings) -> torch.device:
    """The device of the run; one that was asked for and is missing is refused."""
    wanted = settings.hardware.device
    have = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return torch.device("cuda" if have["cuda"] else "cpu")
    if not have[wanted]:
        raise UserError(f"hardware.device={wanted}: this machine has none; hardware=auto takes what there is")
    return torch.device(wanted)


def precision_of(settings: Settings) -> str:
    """`32`, `bf16`, `bf16-mixed` or `16-mixed`."""
    wanted = str(settings.hardware.precision)
    if wanted != "auto":
        return wanted
    return "bf16-mixed" if device_of(settings).type == "cuda" else "32"


def folder_of(settings: Settings, *, meta: bool, index: str = "config.json") -> Path | None:
    """The local folder that a model is loaded from, made or downloaded the first time; None where a shape is enough.

    index: the file that must be there; that of a pipeline lists components, each in a sub-folder.
    """
    about, path = settings.entry("model").about, settings.model.path
    hub = settings.model.get("hub") or about.get("hub")
    if path:
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise UserError(f"model.path={path}: no such folder")
    elif about.get("packaged"):
        folder = PACKAGED / about["packaged"]
        if not folder.is_dir():
            raise UserError(f"model {settings.model.name}: its packaged weights are missing ({folder})")
    elif meta or settings.model.weights == "random":
        return None
    elif about.get("gguf"):
        from ftrecipes.models import gguf

        folder = gguf.folder(settings.model.name, about["gguf"])
    elif hub:
        folder = download(settings.model.name, hub, settings.model.revision, nested=index != "config.json")
    else:
        either = "model.hub=<organisation/name> or model.path=<folder>" if "hub" in settings.model else "model.path=<folder>"
        raise UserError(f"model {settings.model.name} has no weights of its own; give {either}")
    if not (folder / index).is_file():
        raise UserError(f"{folder}: no {index}; a folder in the hub's format is needed")
    return folder


def download(name: str, hub: str, revision: str | None, *, nested: bool = False) -> Path:
    """The folder of a hub's model in the local cache, fetched when it is not there. Pickles stay away, and folders in it unless `nested`.

    Without a network the cached copy serves; when there is none, that is said at once.
    """
    from huggingface_hub import errors, snapshot_download

    instead = "give model.path=<folder> with a local copy, or model.weights=random for the shape alone"
    where = f"model {name}: {hub}" + (f" at {revision}" if revision else "")
    try:
        left = NESTED_LEFT if nested else ["*/*", "consolidated*"]
        return Path(snapshot_download(hub, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=left))
    except errors.GatedRepoError:
        raise UserError(f"{where} is gated: accept its licence on huggingface.co/{hub}, then `hf auth login`; or {instead}") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise UserError(f"{where} is not on the hub, or not for this login ({_first(error)})") from None
    except errors.LocalEntryNotFoundError:
        raise UserError(f"{where} is not in the local cache and the hub cannot be reached; {instead}") from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise UserError(f"{where} could not be fetched: {_first(error)}; {instead}") from None


def _first(error: Exception) -> str:
    """An error of another library, short and on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} …"


def config_of(settings: Settings, folder: Path | None, *, meta: bool) -> Any:
    """The transformers configuration: the folder's, or that of the model's YAML where no weights are needed."""
    from transformers import CONFIG_MAPPING, AutoConfig

    about, changes = settings.entry("model").about, dict(settings.model.architecture)
    options: Any = {"attn_implementation": settings.model.attention}
    if changes and settings.model.weights != "random":
        raise UserError("model.architecture changes the shapes of weights; it needs model.weights=random")
    with load_errors(settings, folder):
        if folder:
            written = read_json(folder / "config.json")
            if "auto_map" in written and written.get("model_type") not in CONFIG_MAPPING:
                raise UserError(
                    f"{folder}: needs code of its own (auto_map in config.json), which is not run; models that transformers knows load"
                )
            return AutoConfig.from_pretrained(folder, trust_remote_code=False, **options, **changes)
        if not about.get("architecture"):
            raise UserError(f"model {settings.model.name} has no architecture in its config; give model.path=<folder>")
        return AutoConfig.for_model(**{**about["architecture"], **changes}, **options)


def build(
    settings: Settings, folder: Path | None, auto: Any, config: Any, *, meta: bool, may_lack: Callable[[str], bool] | None = None
) -> tuple[Any, set[str]]:
    """A transformers model of this configuration, and the names of the parameters that its weights lacked.

    auto: the class that loads it. On the meta device and with random weights nothing is read. may_lack: which parameters
    may be absent or of another shape in the weights; these start at random. Any other is refused. Random values are seeded.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()  # what matters of a loading is said by us
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive("weights", settings.seed))
        if meta or settings.model.weights == "random":
            with torch.device("meta" if meta else "cpu"):
                return auto.from_config(config, dtype=dtype_of(settings)), set()
        assert folder
        check_weights(folder)
        options: Any = {"dtype": dtype_of(settings), "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
        with load_errors(settings, folder):
            model, info = auto.from_pretrained(folder, config=config, ignore_mismatched_sizes=True, **options)
    lacking = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    wrong = sorted(name for name in lacking if may_lack is None or not may_lack(name))
    if wrong:
        raise UserError(f"{folder}: {len(wrong)} weights are missing or of another shape, {wrong[0]} first")
    return model, lacking


@contextmanager
def load_errors(settings: Settings, folder: Path | None) -> Iterator[None]:
    """What transformers says of a model that it cannot load, as one line."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"model {settings.model.name}: cannot load {folder or 'its architecture'}: {_first(error)}") from error


def check_weights(folder: Path) -> None:
    """Refuse a folder whose safetensors are missing or cut off, and pickled weights, before anything is loaded."""
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        shards = (read_json(index) or {}).get("weight_map")
        if not isinstance(shards, dict):
            raise UserError(f"{index}: has no weight_map; copy or download it again")
        missing = set(shards.values()) - {f.name for f in files}
        if missing:
            raise UserError(f"{folder}: {sorted(missing)[0]} is named in {index.name} and missing")
    if not files:
        pickles = [p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"))]
        if pickles:
            raise UserError(f"{folder}: {pickles[0]} is a pickle, which can run code; convert it to safetensors first")
        raise UserError(f"{folder}: no *.safetensors (of a hub's model, model.revision=refs/pr/<number> can name a conversion)")
    for file in files:
        check_safetensors(file)


def check_safetensors(file: Path) -> None:
    """Refuse a file whose header and size do not fit."""
    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length >= size:
                raise ValueError(length)
            header = json.loads(handle.read(length))
        end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
    except (struct.error, ValueError, KeyError):
        end = -1
    if end < 0 or 8 + length + end != size:
        raise UserError(f"{file}: not a whole safetensors file ({size} bytes); copy or download it again")


def fingerprint(model: nn.Module, fresh: Collection[str] = ()) -> str:
    """A hash of names, shapes and a sample of the values of all weights but the fresh ones (16 hex digits)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name in fresh:
            continue
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // 4096)
        sample: Tensor = flat[::step][:4096].float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def read_json(path: Path) -> Any:
    """A JSON file of a model folder; a broken one is refused with its place."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
