"""A tuned run in the format of other libraries: merged weights as on the hub, or an adapter of `peft`.

What is written appears under its name when it is whole. Everything cheap is checked before torch is imported.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
import yaml
from safetensors import SafetensorError

from ftrecipes import __version__, catalogue
from ftrecipes.errors import RunFailed, UserError, nearest
from ftrecipes.record import Record, new_folder
from ftrecipes.stacking import check_mergeable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ftrecipes.method import Method
    from ftrecipes.methods.adapters.delta import DeltaMethod, Factors, Layer
    from ftrecipes.run import Run

FORMATS = ("hf", "peft")
SHARD = "5GB"
"""Largest file of merged weights."""


def merge(run_folder: str, to: str | None = None) -> Path:
    """Write the tuned model as plain weights with configuration, tokenizer and a card; returns the folder (RUN/merged).

    Deltas are folded in float32 and rounded to the dtype of the base; the largest rounding is printed.
    """
    check_mergeable(Record(run_folder).info.get("methods", []))
    with _target(run_folder, to or f"{run_folder}/merged") as (run, folder):
        model: Any = run.model
        if not hasattr(model, "save_pretrained"):
            raise UserError(f"{run_folder}: {run.settings.model.name} has no format of the hub")
        run.merge()
        remark = _one_dtype(run)
        if remark:
            typer.echo(remark)
        run.task.save_model(model, folder, SHARD)
        run.task.save(folder)
        _card(run, folder, run.task.library, run.task.loader(model), remark)
    return Path(to or f"{run_folder}/merged")


def export(run_folder: str, to: str, folder: str | None = None, rank: int | None = None) -> Path:
    """Write a tuned run for another library; returns the folder (RUN/export-<format>).

    to: `hf` (as merge) or `peft` (a LoRA or DoRA, or what peft has by another name). rank: of a LoRA that approximates the update where peft has no such
    form; its relative error is printed.
    """
    if to not in FORMATS:
        raise UserError(f"--to {to}: unknown format{nearest(to, FORMATS)}")
    if to == "hf":
        if rank is not None:
            raise UserError("--rank is of --to peft; merged weights are exact")
        return merge(run_folder, folder or f"{run_folder}/export-hf")
    with _target(run_folder, folder or f"{run_folder}/export-peft") as (run, place):
        _peft(run, place, rank, run_folder)
    return Path(folder or f"{run_folder}/export-peft")


@contextmanager
def _target(run_folder: str, to: str) -> Iterator[tuple[Run, Path]]:
    """The reopened run and a temporary folder that is renamed to `to` at the end; an existing target is refused."""
    if os.path.lexists(to):
        raise UserError(f"{to}: exists already; choose another folder or remove it")
    if not Record(run_folder).info:
        raise UserError(f"{run_folder}: not the record of a run (no run.json)")
    home = new_folder(Path(to).absolute().parent)
    from ftrecipes.run import Run, quiet

    quiet()
    run = Run.open(run_folder)
    with Record(home).whole_folder(Path(to).name) as folder:
        try:
            yield run, folder
        except SafetensorError as error:  # a full disk, where transformers writes
            raise RunFailed(f"{to} was not written: {error}") from None
        umask = os.umask(0)
        os.umask(umask)
        folder.chmod(0o777 & ~umask)  # temporary folders and safetensors are made for their owner alone
        for file in folder.rglob("*"):
            file.chmod((0o777 if file.is_dir() else 0o666) & ~umask)


def _one_dtype(run: Run) -> str:
    """Bring all weights to the dtype of the base; returns what to say of the rounding."""
    from ftrecipes.models.base import dtype_of

    dtype, largest = dtype_of(run.settings), run.rounding
    for parameter in run.model.parameters():
        if parameter.dtype != dtype:
            exact = parameter.data
            parameter.data = exact.to(dtype)
            largest = max(largest, float((exact - parameter.data).abs().max()))
    if not isinstance(run.model.config, dict):  # a configuration of diffusers is fixed and holds no dtype
        run.model.config.dtype = dtype  # type: ignore[union-attr, assignment]
    return f"rounding to {str(dtype).removeprefix('torch.')} moved no weight by more than {largest:.2e}" if largest else ""


# ---------------------------------------------------------------------------------------------------------------------
# peft


def _peft(run: Run, folder: Path, rank: int | None, run_folder: str) -> None:
    from ftrecipes.method import overrides
    from ftrecipes.methods.adapters.delta import DeltaMethod

    own = [m for m in run.stack if overrides(m, "peft")]
    if own:
        _own(run, folder, own[0], rank, run_folder)
        return
    adapters = [m for m in run.stack if isinstance(m, DeltaMethod)]
    others = [m.key for m in run.stack if m not in adapters and (overrides(m, "structure") or not adapters)]
    if others and (reason := catalogue.get("method", others[0]).about.get("unmergeable")):
        raise UserError(f"{run_folder}: peft has no form for {others[0]}: {reason}")
    if others:
        raise UserError(f"{run_folder}: {others[0]} changes the weights themselves, which no adapter holds; use --to hf")
    _check_base(run, run_folder)
    deltas = {name: (method, method.deltas[name].layer) for method in adapters for name in method.deltas}
    whole = {name for name in run.touched if name.rpartition(".")[0] not in deltas or name.endswith(".bias")}
    exact = {name: method.factors(name) for name, (method, _) in deltas.items()}
    moved = sorted(name for name in run.touched - whole if name.rpartition(".")[0] in deltas)
    kinds = {f is not None and f.m is not None for f in exact.values()}
    remark = ""
    if rank is not None:
        factors, remark = _truncated(run, deltas, rank)
        typer.echo(remark)
    elif moved or len(kinds) > 1 or not all(exact.values()):
        formless = next((name for name, f in exact.items() if f is None), None)
        what = moved[0] if moved else formless or "some weights and without lengths of others"
        raise UserError(
            f"{run_folder}: peft has no form for what {'+'.join(m.key for m in adapters)} made of {what}; "
            "--rank R writes a LoRA that approximates it, --to hf the merged model"
        )
    else:
        factors = {name: f for name, f in exact.items() if f is not None}
    weights, extra = _weights(run, deltas, factors, whole)
    config = _config(run, deltas, factors, extra)
    from ftrecipes.storage import save_weights

    save_weights(folder / "adapter_model.safetensors", weights, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    run.task.save(folder)
    _card(run, folder, "peft", "PeftModel", remark)


def _own(run: Run, folder: Path, method: Method, rank: int | None, run_folder: str) -> None:
    """A method that peft has under a name of its own."""
    from ftrecipes.method import overrides
    from ftrecipes.models.adapter import PREFIX
    from ftrecipes.storage import save_weights

    if rank is not None:
        raise UserError(f"--rank is of updates that a LoRA approximates; peft holds {method.key} itself")
    others = [m.key for m in run.stack if m is not method and (m.picks or overrides(m, "structure"))]
    if others:
        raise UserError(f"{run_folder}: peft holds {method.key} alone, and {others[0]} changed the model too; export a run without it")
    _check_base(run, run_folder)
    weights, config = method.peft(run)
    owners = {name.rpartition(".")[0] for name in run.touched}
    modules = sorted(owner for owner in owners if not any(name.startswith(f"{PREFIX}{owner}.") for name in weights))
    if modules and "num_virtual_tokens" in config:
        raise UserError(f"{run_folder}: {modules[0]} was tuned too, which peft cannot hold beside a prompt")
    for owner in modules:
        weights |= {f"{PREFIX}{owner}.{name}": p for name, p in run.model.get_submodule(owner).named_parameters(recurse=False)}
    shared = {
        "task_type": "CAUSAL_LM" if run.task.domain == "causal-lm" else None,
        "base_model_name_or_path": None if run.settings.model.weights == "random" else _base(run),
        "inference_mode": True,
        **({} if "num_virtual_tokens" in config else {"modules_to_save": modules or None}),
    }
    save_weights(folder / "adapter_model.safetensors", {name: tensor.detach() for name, tensor in weights.items()}, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({**config, **shared}, indent=2) + "\n")
    run.task.save(folder)
    _card(run, folder, "peft", "PeftModel", "")


def _check_base(run: Run, run_folder: str) -> None:
    """Refuse an adapter for a base that others do not have."""
    if run.settings.model.adapter:
        raise UserError(f"{run_folder}: started from model.adapter={run.settings.model.adapter}, and fits no other base; use --to hf")


def _truncated(run: Run, deltas: dict[str, tuple[DeltaMethod, Layer]], rank: int) -> tuple[dict[str, Factors], str]:
    """The best factors of a rank for every merged update, and what to say of their error."""
    from ftrecipes.methods.adapters.delta import Factors
    from ftrecipes.methods.adapters.svd import svd

    layers = {name: layer for name, (_, layer) in deltas.items()}
    run.merge()
    start = run.pristine()
    out, lost, total = {}, 0.0, 0.0
    for name, layer in layers.items():
        before = layer.matrix(start.get_submodule(name).weight.detach()).float()  # type: ignore[arg-type, operator]
        update = layer.weight.float().cpu() - before
        if rank > min(update.shape):
            raise UserError(f"--rank {rank}: {name} is {update.shape[0]} x {update.shape[1]}, its rank is at most {min(update.shape)}")
        U, s, V = svd(update, rank)
        out[name] = Factors(U * s.sqrt(), (V * s.sqrt()).T, 1.0)
        lost += float((update - U * s @ V.T).square().sum())
        total += float(update.square().sum())
    error = (lost / total) ** 0.5 if total else 0.0
    return out, f"a LoRA of rank {rank} holds the update up to a relative error of {error:.4f} (Frobenius norm, all weights together)"


def _weights(
    run: Run, deltas: dict[str, tuple[DeltaMethod, Layer]], factors: dict[str, Factors], whole: set[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by peft's names, and what the configuration must say of biases and modules that are saved whole."""
    from torch import nn

    from ftrecipes.methods.adapters.delta import tied_weights
    from ftrecipes.models.adapter import PREFIX

    out: dict[str, Tensor] = {}
    for name, (B, A, _, m) in factors.items():
        module, at = deltas[name][1].module, f"{PREFIX}{name}"
        if isinstance(module, nn.Embedding):
            if m is not None:
                raise UserError(f"{name}: peft splits lengths off the other side of an embedding; use --to hf")
            out |= {f"{at}.lora_embedding_A": A, f"{at}.lora_embedding_B": B}
            continue
        if isinstance(module, nn.Conv2d):
            A, B = A.reshape(len(A), *module.weight.shape[1:]), B[:, :, None, None]
            m = None if m is None else m[None, :, None, None]
        out |= {f"{at}.lora_A.weight": A, f"{at}.lora_B.weight": B}
        if m is not None:
            out[f"{at}.lora_magnitude_vector"] = m
    biases, modules, tied = set(), set(), tied_weights(run.model)
    for name in sorted(whole):
        owner, _, last = name.rpartition(".")
        if last == "bias":
            biases.add(owner)
        elif owner in tied:
            raise UserError(f"{name} is tied to another weight and was tuned as one with it, which peft cannot hold; use --to hf")
        else:
            modules.add(owner)
    for owner in biases - modules:
        at = f"{PREFIX}{owner}.base_layer" if owner in deltas else f"{PREFIX}{owner}"
        out[f"{at}.bias"] = run.model.get_parameter(f"{owner}.bias")
    for owner in modules:
        out |= {f"{PREFIX}{owner}.{name}": p for name, p in run.model.get_submodule(owner).named_parameters(recurse=False)}
    bias = "none" if not biases - modules else "lora_only" if biases - modules <= set(deltas) else "all"
    return {name: tensor.detach() for name, tensor in out.items()}, {"bias": bias, "modules_to_save": sorted(modules) or None}


def _config(run: Run, deltas: dict[str, tuple[DeltaMethod, Layer]], factors: dict[str, Factors], extra: dict[str, Any]) -> dict[str, Any]:
    """adapter_config.json: one rank and alpha for most weights, patterns for the others."""
    from transformers.pytorch_utils import Conv1D

    ranks = {name: f.A.shape[0] for name, f in factors.items()}
    alphas = {name: f.scale * ranks[name] for name, f in factors.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if run.task.domain == "causal-lm" else None,
        "base_model_name_or_path": None if run.settings.model.weights == "random" else _base(run),
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "lora_dropout": max(getattr(method, "dropout", 0.0) or 0.0 for method, _ in deltas.values()),
        "target_modules": short_names(run.model, set(factors)),
        "use_dora": any(f.m is not None for f in factors.values()),
        "use_rslora": False,
        "fan_in_fan_out": any(isinstance(layer.module, Conv1D) for _, layer in deltas.values()),
        "init_lora_weights": True,
        **extra,
    }


def short_names(model: nn.Module, names: set[str]) -> list[str]:
    """Module names, by their last word alone where that names the same modules."""
    by_word: dict[str, set[str]] = {}
    for name, _ in model.named_modules():
        by_word.setdefault(name.rpartition(".")[2], set()).add(name)
    return sorted({word if by_word[word] <= names else name for name in names for word in [name.rpartition(".")[2]]})


# ---------------------------------------------------------------------------------------------------------------------
# the card


def _base(run: Run) -> str:
    """What the base is called: its id on the hub, or the folder that it lies in, or its name here."""
    settings = run.settings
    about = settings.entry("model").about
    hub = settings.model.get("hub") or about.get("hub")
    if settings.model.weights == "random":
        return f"{settings.model.name} with random weights"
    if hub and not settings.model.path:
        return str(hub)
    from ftrecipes.models.base import folder_of

    return str((folder_of(settings, meta=False) or Path(settings.model.name)).absolute())


def _card(run: Run, folder: Path, library: str, loader: str, remark: str) -> None:
    """README.md: what was tuned, how and from what, in words and as the metadata that the hub reads."""
    settings, info, base = run.settings, Record(run.source.folder).info, _base(run)  # type: ignore[attr-defined]
    names = "+".join(settings.method)
    results = info.get("results", {})
    head: dict[str, Any] = {"library_name": library, "tags": ["ftrecipes", *settings.method]}
    if not Path(base).is_absolute() and "/" in base:
        head["base_model"] = base
    head["ftrecipes"] = {
        "version": __version__, "methods": list(settings.method), "model": settings.model.name, "data": settings.data.name,
        "seed": settings.seed, "settings_hash": info["hash"], "base_fingerprint": info["base"],
    }  # fmt: skip
    lines = [f"# {settings.model.name} tuned with {names}", ""]
    for method in settings.methods():
        about = method.about
        link = f" ([arXiv {about['arxiv']}](https://arxiv.org/abs/{about['arxiv']}))" if about.get("arxiv") else ""
        lines.append(f"- method `{method.name}`: {about.get('title', method.name)}{link}")
    start = f", with `{settings.model.adapter}` folded in" if settings.model.adapter else ""
    lines += [
        f"- base: `{base}`{start} (fingerprint `{info['base']}`)",
        f"- data: `{settings.data.name}`, {results.get('steps', '?')} updates of {settings.trainer.batch} examples",
        f"- settings: hash `{info['hash']}`, seed {settings.seed}, ftrecipes {__version__}",
    ]
    if remark:
        lines.append(f"- {remark}")
    rows = [
        f"| {split} | {metric} | {before:.4f} | {results['after'][split][metric]:.4f} |"
        for split, metrics in results.get("before", {}).items()
        for metric, before in metrics.items()
        if metric in results.get("after", {}).get(split, {})
    ]
    if rows:
        lines += ["", "| set | metric | before | after |", "| --- | --- | ---: | ---: |", *rows]
    place = '"<this folder>"' if library == "transformers" else 'base, "<this folder>"'
    lines += ["", "```python", f"from {library} import {loader}", "", f"model = {loader}.from_pretrained({place})", "```"]
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    (folder / "README.md").write_text(f"---\n{front}---\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
