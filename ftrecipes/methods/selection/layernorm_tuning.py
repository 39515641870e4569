"""LayerNorm: A key component in parameter-efficient fine-tuning (arXiv 2403.20284).

Of all parts of BERT the LayerNorm behind the feed-forward layer changes most when everything is tuned. So the gains gamma
and biases beta (D,) of the norms train, with the head of a new task, and the rest is frozen:

    y = gamma * (x - mean) / sqrt(var + eps) + beta

`mode: all` trains every norm, `output` those of feed-forward layers, `attention` those of attention. `subset` trains the
part of their entries that matters most to the task by the diagonal of the empirical Fisher information at the start,

    F_i = (1 / N) sum_n (d log p(y_n | x_n) / d theta_i)^2

one sample at a time, squared before averaging: the int(ratio * entries) largest, or whole norms by their sum
(`granularity: layer`). `fisher_from` takes the mean of the normalised F of earlier runs in place of the task's own.
`probe` trains everything and reports how far each kind of part moved, mean |W1 - W0| and |W1 - W0| / |W0|.

Norms of queries and keys, and BatchNorm, are left alone. Of a block's norms the second half belongs to the feed-forward
layer, whether it stands before it or behind it. An RMSNorm has gains alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftrecipes.errors import UserError
from ftrecipes.method import Method
from ftrecipes.update import wide

if TYPE_CHECKING:
    from ftrecipes.anatomy import Part
    from ftrecipes.run import Run


class LayerNormTuning(Method):
    """Trains norms, or the entries of them that matter most."""

    picks = True
    mode: str
    ratio: float
    score: str
    granularity: str
    fisher_samples: int
    fisher_from: list[str]

    def prepare(self, run: Run) -> None:
        self.scores: dict[str, Tensor] = {}
        if self.mode == "probe":
            if other := [m.key for m in run.stack if m.picks and m is not self]:
                raise UserError(f"layernorm_tuning.mode=probe trains every weight, {other[0]} freezes some; leave it out")
            run.model.requires_grad_(True)
            return
        parts = self.norms(run)
        if self.mode == "subset":
            if not run.stack.gradients_used:
                raise UserError("layernorm_tuning.mode=subset masks gradients, and this stack computes none; use mode=all")
            self.scores = self.scored(run, parts)
            self.mask(run, self.chosen())
        else:
            for part in parts:
                part.module.requires_grad_(True)
        run.count("norms", len(parts))

    # -- which norms ----------------------------------------------------------------------------------------------

    def norms(self, run: Run) -> list[Part]:
        """The norms of the mode, by place in the model."""
        found = kinds(run)
        wanted = {"output": {"output"}, "attention": {"attention"}}.get(self.mode, {"attention", "output", "norm"})
        parts = [part for part, kind in found if kind in wanted]
        if not parts:
            have = ", ".join(sorted({kind for _, kind in found})) or "none"
            raise UserError(f"layernorm_tuning.mode={self.mode}: {run.settings.model.name} has no such norm (it has {have})")
        return parts

    # -- which entries --------------------------------------------------------------------------------------------

    def scored(self, run: Run, parts: list[Part]) -> dict[str, Tensor]:
        """A score for every entry of the norms, by name of the parameter."""
        named = {f"{part.name}.{name}": p for part in parts for name, p in part.module.named_parameters(recurse=False)}
        if next(iter(named.values())).is_meta:
            return {name: torch.zeros(p.shape) for name, p in named.items()}
        if self.score == "random":
            return {name: torch.rand(p.shape, generator=run.generator("score", name)) for name, p in named.items()}
        return earlier(self.fisher_from, named) if self.fisher_from else fisher(run, named, self.fisher_samples)

    def chosen(self) -> dict[str, Tensor]:
        """Which entries train, by name; a reversed score takes the least important ones."""
        sign = -1.0 if self.score == "reverse" else 1.0
        scores = {name: sign * score for name, score in self.scores.items()}
        if self.granularity == "layer":
            whole: dict[str, float] = {}
            for name, score in scores.items():
                owner = name.rpartition(".")[0]
                whole[owner] = whole.get(owner, 0.0) + float(score.sum())
            kept = sorted(whole, key=lambda n: -whole[n])[: max(1, int(self.ratio * len(whole)))]
            return {name: torch.full(score.shape, name.rpartition(".")[0] in kept) for name, score in scores.items()}
        flat = torch.cat([score.flatten() for score in scores.values()])
        mask = torch.zeros(len(flat), dtype=torch.bool)
        mask[flat.argsort(descending=True, stable=True)[: max(1, int(self.ratio * len(flat)))]] = True
        return dict(zip(scores, mask.split([score.numel() for score in scores.values()]), strict=True))

    def mask(self, run: Run, chosen: dict[str, Tensor]) -> None:
        """Let these entries train: the gradient of the others is zero, and vectors are never decayed."""
        self.masks = {name: mask for name, mask in chosen.items() if mask.any()}
        for name, mask in self.masks.items():
            parameter = run.model.get_parameter(name).requires_grad_(True)
            here = mask.to(parameter.device)
            parameter.register_hook(lambda gradient, here=here: gradient * here)
        run.count("entries", sum(int(mask.sum()) for mask in self.masks.values()))

    def group(self, name: str, parameter: nn.Parameter) -> dict[str, Any]:
        return {"weight_decay": 0.0} if self.mode == "subset" and name in self.masks else {}

    # -- saving ---------------------------------------------------------------------------------------------------

    def structure(self) -> dict[str, Any]:
        return {"masks": self.masks, "scores": self.scores} if self.mode == "subset" else {}

    def restore(self, run: Run, structure: dict[str, Any]) -> None:
        if self.mode != "subset":
            return self.prepare(run)
        self.scores = structure["scores"]
        self.mask(run, structure["masks"])
        return None

    def finish(self, run: Run) -> None:
        if self.mode == "probe":
            run.results["change"] = change(run)

    def peft(self, run: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
        from ftrecipes.export import short_names
        from ftrecipes.models.adapter import PREFIX

        owners = sorted({name.rpartition(".")[0] for name in run.touched} & {part.name for part, _ in kinds(run)})
        modules = {name: run.model.get_submodule(name) for name in owners}
        weights: dict[str, Tensor] = {
            f"{PREFIX}{n}.ln_tuning_layers.{own}": p for n, m in modules.items() for own, p in m.named_parameters(recurse=False)
        }
        return weights, {"peft_type": "LN_TUNING", "target_modules": short_names(run.model, set(owners))}


def kinds(run: Run) -> list[tuple[Part, str]]:
    """The norms of a model with what each belongs to: `attention`, `output` (the feed-forward layer), or `norm` elsewhere."""
    inner = {part.name.rpartition(".")[0] for part in run.anatomy.parts if part.role in ("q", "k", "v", "qkv")}
    batch = nn.modules.batchnorm._BatchNorm
    parts = [
        part for part in run.anatomy.parts
        if part.role == "norm" and not isinstance(part.module, batch) and part.name.rpartition(".")[0] not in inner
    ]  # fmt: skip
    out = []
    for part in parts:
        beside = [p for p in parts if p.block == part.block]
        place = [p.name for p in beside].index(part.name)
        sub = "output" if place >= len(beside) - len(beside) // 2 else "attention"
        out.append((part, "norm" if part.block is None else sub))
    return out


def fisher(run: Run, named: dict[str, nn.Parameter], samples: int) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher information of some parameters, a float32 tensor each, without dropout."""
    F = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in named.items()}
    training = run.model.training
    run.model.eval()
    for p in named.values():
        p.requires_grad_(True)
    for batch in run.calibration(samples, batch=1):
        with run.update.autocast():
            nll = run.task.losses(run.task.outputs(run.model, batch), batch).sum()
        for total, g in zip(F.values(), torch.autograd.grad(nll, list(named.values())), strict=True):
            total += wide(g).square()
    for p in named.values():
        p.requires_grad_(False)
    run.model.train(training)
    run.count("fisher_samples", samples)
    return {name: (total / samples).cpu() for name, total in F.items()}


def earlier(runs: list[str], named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The mean over finished runs of their Fisher information, each scaled to sum 1."""
    from ftrecipes.record import Record
    from ftrecipes.storage import load_tuned

    total: dict[str, Tensor] = {name: torch.zeros(p.shape) for name, p in named.items()}
    for folder in runs:
        if not (Path(folder) / "tuned").is_dir():
            raise UserError(f"layernorm_tuning.fisher_from: {folder} is no finished run")
        scores = load_tuned(Record(folder))["structure"].get("layernorm_tuning", {}).get("scores", {})
        if {n: s.shape for n, s in scores.items()} != {n: p.shape for n, p in named.items()}:
            raise UserError(
                f"layernorm_tuning.fisher_from: {folder} has no scores of this model's norms; it needs mode=subset of the same model"
            )
        whole = sum(float(s.sum()) for s in scores.values())
        for name, score in scores.items():
            total[name] += score / whole / len(runs)
    return total


def change(run: Run) -> list[dict[str, Any]]:
    """How far the parts of a model are from their start: one row a kind and block, and one a kind over all blocks."""
    start = dict(run.pristine().named_parameters())
    kind = {part.name: name for part, name in kinds(run)}
    sums: dict[tuple[str, int | None], list[float]] = {}
    for part in run.anatomy.parts:
        label = f"{kind[part.name]} norm" if kind.get(part.name) in ("attention", "output") else part.role
        for name, p in part.module.named_parameters(recurse=False):
            before = wide(start[f"{part.name}.{name}"].detach()).to(p.device)
            moved = wide(p.detach()) - before
            found = [float(moved.abs().sum()), float(moved.numel()), float(moved.square().sum()), float(before.square().sum())]
            for key in {(label, part.block), (label, None)}:
                sums[key] = [a + b for a, b in zip(sums.get(key, [0.0] * 4), found, strict=True)]
    return [
        {"part": label, "block": block, "mean": total / count, "relative": (moved / before) ** 0.5 if before else None}
        for (label, block), (total, count, moved, before) in sorted(
            sums.items(), key=lambda item: (item[0][0], item[0][1] is not None, item[0][1] or 0)
        )
    ]
