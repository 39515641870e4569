"""Generators of images: a denoiser of diffusers and, frozen around it, autoencoder, text encoders and noise schedule.

A folder in the hub's format (model_index.json and one sub-folder a component) is read component by component: only classes
that stand in FAMILIES, only safetensors. The denoiser is the model that is tuned; the rest goes to the task.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ftrecipes.errors import UserError
from ftrecipes.models.base import Loaded, check_weights, dtype_of, folder_of, load_errors, read_json
from ftrecipes.rng import derive
from ftrecipes.tasks.denoising import Denoising, Diffusion, Flow

if TYPE_CHECKING:
    from ftrecipes.compose import Settings

INDEX = "model_index.json"
TEXT_ENCODERS = {"CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"}
TOKENIZERS = {"CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast"}
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that tuning and sampling from text need not."""


@dataclass(frozen=True)
class Family:
    """A pipeline of diffusers: which of its components is tuned, of which class, and the domain's task."""

    part: str
    denoiser: str
    task: type[Denoising]


FAMILIES = {
    "StableDiffusionPipeline": Family("unet", "UNet2DConditionModel", Diffusion),
    "StableDiffusionXLPipeline": Family("unet", "UNet2DConditionModel", Diffusion),
    "StableDiffusion3Pipeline": Family("transformer", "SD3Transformer2DModel", Flow),
    "FluxPipeline": Family("transformer", "FluxTransformer2DModel", Flow),
}
ROLES = [
    ("o", r"to_add_out$"),
    ("up", r"(proj_mlp|ff(_context)?\.net\.0\.proj)$"),
    ("down", r"(single_transformer_blocks\.\d+\.proj_out|ff(_context)?\.net\.2)$"),
]


def load(settings: Settings, *, meta: bool = False) -> Loaded:
    """The denoiser with the task around it; on the meta device neither hub nor weights are touched."""
    folder = folder_of(settings, meta=meta, index=INDEX)
    about = settings.entry("model").about
    name = str(read_json(folder / INDEX).get("_class_name")) if folder else about["pipeline"]
    family = FAMILIES.get(name)
    if family is None:
        raise UserError(f"{folder}: a {name}; supported are {', '.join(FAMILIES)}")
    if family.task.domain != about["domain"]:
        raise UserError(
            f"{folder}: a {name}, which is for domain {family.task.domain}, and model {settings.model.name} is {about['domain']}"
        )
    if folder is None and not meta:
        raise UserError(f"model {settings.model.name}: random weights need its tokenizers; give model.path=<folder in the hub's format>")
    pristine = functools.partial(denoiser, settings, folder, family, meta)
    model = pristine()
    with load_errors(settings, folder):
        pipe = around(settings, folder, name, family, model, meta)
    for component in vars(pipe).values():
        if isinstance(component, torch.nn.Module) and component is not model:
            component.requires_grad_(False).eval()
    return Loaded(model, task_of(settings, pipe, family), pristine, roles=ROLES, blocks=depths(model))


def depths(model: Any) -> list[str] | None:
    """A UNet's blocks from the noisy to the predicted latents; those of transformers are found by themselves."""
    if not hasattr(model, "mid_block"):
        return None
    down, up = len(model.down_blocks), len(model.up_blocks)
    return [*(f"down_blocks.{i}" for i in range(down)), "mid_block", *(f"up_blocks.{i}" for i in range(up))]


def denoiser(settings: Settings, folder: Path | None, family: Family, meta: bool) -> Any:
    """The network that is tuned, as it is before any tuning."""
    import diffusers

    quiet()
    cls = getattr(diffusers, family.denoiser)
    changes = dict(settings.model.architecture)
    if changes and settings.model.weights != "random":
        raise UserError("model.architecture changes the shapes of weights; it needs model.weights=random")
    place = folder / family.part if folder else None
    with load_errors(settings, place):
        if meta or settings.model.weights == "random":
            known = cls.load_config(place) if place else settings.entry("model").about["architecture"][family.part]
            with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
                torch.manual_seed(derive("weights", settings.seed))
                model = cls.from_config({**known, **changes}).to(dtype_of(settings))
        else:
            assert place
            check_weights(place)
            model, info = cls.from_pretrained(
                place, torch_dtype=dtype_of(settings), use_safetensors=True, local_files_only=True,
                low_cpu_mem_usage=False, output_loading_info=True,
            )  # fmt: skip
            if wrong := sorted({*info["missing_keys"], *info["mismatched_keys"]}):
                raise UserError(f"{place}: {len(wrong)} weights are missing or of another shape, {wrong[0]} first")
    return model.train()


def around(settings: Settings, folder: Path | None, name: str, family: Family, model: Any, meta: bool) -> Any:
    """The pipeline with everything that stands around the denoiser; without a folder, what a plan needs of it."""
    import diffusers

    cls = getattr(diffusers, name)
    index = read_json(folder / INDEX) if folder else {}
    parts: dict[str, Any] = dict.fromkeys(LEFT_OUT) | {family.part: model}
    for component, kind in index.items():
        if component in parts or not isinstance(kind, list) or kind[1] is None:
            continue
        assert folder
        parts[component] = companion(settings, folder / component, component, kind[1], meta)
    if folder is None:
        known = settings.entry("model").about["architecture"]
        parts["scheduler"] = getattr(diffusers, known["scheduler"].pop("_class", ""), None) or scheduler(known["scheduler"], family)
        with torch.device("meta"):
            parts["vae"] = diffusers.AutoencoderKL(**known["vae"])
    wanted = list(cls._get_signature_keys(cls)[0])
    with warnings.catch_warnings(action="ignore"):
        options = {"requires_safety_checker": False} if name == "StableDiffusionPipeline" else {}
        return cls(**{key: parts.get(key) for key in wanted}, **options)


def scheduler(config: dict[str, Any], family: Family) -> Any:
    """The noise schedule of a model by name, for plans."""
    import diffusers

    return (diffusers.FlowMatchEulerDiscreteScheduler if family.task is Flow else diffusers.DDIMScheduler)(**config)


def companion(settings: Settings, place: Path, component: str, kind: str, meta: bool) -> Any:
    """One component from its sub-folder."""
    import diffusers
    import transformers

    if component == "scheduler":
        if not hasattr(diffusers, kind) or not kind.endswith("Scheduler"):
            raise UserError(f"{place}: an unknown scheduler {kind}")
        return getattr(diffusers, kind).from_pretrained(place)
    if component.startswith("tokenizer") and kind in TOKENIZERS:
        return getattr(transformers, kind).from_pretrained(place)
    if component == "vae" and kind == "AutoencoderKL":
        if meta:
            with torch.device("meta"):
                return diffusers.AutoencoderKL.from_config(diffusers.AutoencoderKL.load_config(place))
        check_weights(place)
        # float32: some autoencoders overflow in 16 bits, and it is small beside the denoiser
        return diffusers.AutoencoderKL.from_pretrained(place, torch_dtype=torch.float32, use_safetensors=True, low_cpu_mem_usage=False)
    if component.startswith("text_encoder") and kind in TEXT_ENCODERS:
        cls = getattr(transformers, kind)
        if meta:
            with torch.device("meta"):
                return cls._from_config(transformers.AutoConfig.from_pretrained(place), dtype=dtype_of(settings))
        check_weights(place)
        model, info = cls.from_pretrained(
            place, dtype=dtype_of(settings), use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        if missing := sorted(info["missing_keys"]):
            raise UserError(f"{place}: {len(missing)} weights are missing, {missing[0]} first")
        return model
    raise UserError(f"{place}: {component} is a {kind}, which is not supported here")


def task_of(settings: Settings, pipe: Any, family: Family) -> Denoising:
    """The domain's task with the sizes of this model."""
    knobs, model = settings.model, getattr(pipe, family.part)
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    side = knobs.resolution or model.config.sample_size * factor
    patch = getattr(model.config, "patch_size", 1)
    patch = 2 if hasattr(model.config, "axes_dims_rope") else patch
    unit = factor * patch * (2 ** (len(model.down_blocks) - 1) if hasattr(model, "down_blocks") else 1)
    if side % unit:
        raise UserError(f"model.resolution={side}: {settings.model.name} takes sides that are multiples of {unit}")
    options: dict[str, Any] = {"law": knobs.levels} if family.task is Flow else {}
    return family.task(
        pipe, size=(side, side), positions=(side // factor // patch) ** 2, steps=knobs.sampling_steps, guidance=knobs.guidance,
        prompt_length=knobs.prompt_length, images=knobs.images, dropout=settings.data.get("prompt_dropout") or 0.0, **options,
    )  # fmt: skip


def quiet() -> None:
    """Silence what the libraries print about themselves."""
    transformers: Any = importlib.import_module("transformers.utils.logging")
    diffusers: Any = importlib.import_module("diffusers.utils.logging")
    for logging in (transformers, diffusers):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
