"""LayerNorm tuning: norms alone, the part of them that Fisher information picks, and agreement with `peft`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peers import host, language_loss, plain_loop
from peft import LNTuningConfig, PeftModel, get_peft_model
from tools import SMALL, build, check_resume, toy_data, train, weights
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

from ftrecipes import export
from ftrecipes.anatomy import Anatomy
from ftrecipes.errors import UserError
from ftrecipes.methods.selection.layernorm_tuning import LayerNormTuning, kinds
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/selection/layernorm_tuning.py", "total += wide(g).square()", "total += wide(g)")
VIT = (
    "model=tiny-vit", "model.weights=random", "data.size=64", "trainer.batch=8", "trainer.eval_examples=16",
    "model.architecture={num_hidden_layers:2,hidden_size:24,intermediate_size:32,num_attention_heads:2,patch_size:8}",
)  # fmt: skip
STEADY = ("schedule=constant", "schedule.warmup=0", "optimizer.lr=1e-2")
SUBSET = ("method.layernorm_tuning.mode=subset", "method.layernorm_tuning.fisher_samples=16")


def method(run: Run) -> LayerNormTuning:
    return run.stack.methods[0]  # type: ignore[return-value]


def moved(run: Run, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """Which entries moved, by name, where any did."""
    found = {name: now != start[name] for name, now in weights(run).items()}
    return {name: at for name, at in found.items() if at.any()}


# -- which norms -------------------------------------------------------------------------------------------------------


def bert(mode: str, layers: int = 2, width: int = 32) -> list[str]:
    """The norms of a BERT that a mode names."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 2 * width}
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig(**sizes))
    run = build("method=layernorm_tuning", f"method.layernorm_tuning.mode={mode}", *VIT)
    run.model, run.anatomy = model, Anatomy(model)
    return [part.name for part in method(run).norms(run) for _ in range(sum(p.numel() for p in part.module.parameters()))]


def test_counts_of_bert() -> None:
    """(2 N + 1) 2 D in all, N 2 D behind feed-forward layers; 38,400 and 18,432 in BERT base."""
    assert len(bert("all")) == 320 and len(bert("output")) == len(bert("attention")) == 128
    assert set(bert("output")) == {f"bert.encoder.layer.{i}.output.LayerNorm" for i in range(2)}
    assert set(bert("attention")) == {f"bert.encoder.layer.{i}.attention.output.LayerNorm" for i in range(2)}
    assert len(bert("all", 12, 768)) == 38_400 and len(bert("output", 12, 768)) == 18_432


def test_norms_of_queries_and_keys_are_left_alone() -> None:
    run = build("method=layernorm_tuning", *SMALL)
    config = Qwen3ForCausalLM.config_class(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    with torch.device("meta"):
        run.model = Qwen3ForCausalLM(config)
    run.anatomy = Anatomy(run.model)
    assert any("q_norm" in part.name for part in run.anatomy.parts if part.role == "norm")
    found = kinds(run)
    assert len(found) == 5 and not any("q_norm" in part.name or "k_norm" in part.name for part, _ in found)
    assert {part.name.rpartition(".")[2]: kind for part, kind in found} == {
        "input_layernorm": "attention", "post_attention_layernorm": "output", "norm": "norm",
    }  # fmt: skip


def test_they_alone_move_and_are_never_decayed() -> None:
    run = build("method=layernorm_tuning", *VIT, *STEADY, "optimizer.weight_decay=0.5")
    start = weights(run)
    run.optimizer = run.build_optimizer()
    assert {group["weight_decay"] for group in run.optimizer.param_groups} == {0.0}
    run.fit(3)
    assert set(moved(run, start)) == {name for name in start if "norm" in name}
    output = build("method=layernorm_tuning", "method.layernorm_tuning.mode=output", *VIT)
    assert set(output.trainable()) == {f"vit.layers.{i}.layernorm_after.{p}" for i in range(2) for p in ("weight", "bias")}


# -- agreement ---------------------------------------------------------------------------------------------------------


def test_ten_updates_agree_with_peft() -> None:
    run = build("method=layernorm_tuning", *SMALL, *STEADY)
    model = get_peft_model(run.pristine(), LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"]))
    run.model.train()
    run.fit(10)
    plain_loop(run, model, language_loss, 10, lr=1e-2)
    for name, ours in run.trainable().items():
        owner, _, last = name.rpartition(".")
        theirs = model.base_model.model.get_submodule(owner).ln_tuning_layers["default"].get_parameter(last)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert (ours.detach() - 1).abs().max() > 0.03


def test_exported_it_loads_in_peft(tmp_path: Path) -> None:
    train("method=layernorm_tuning", *SMALL, *STEADY, "trainer.max_steps=3", folder=tmp_path / "run")
    run = Run.open(tmp_path / "run")
    loaded = PeftModel.from_pretrained(run.pristine(), str(export.export(str(tmp_path / "run"), "peft"))).eval()
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, run.model(ids).logits, rtol=1e-5, atol=1e-6)
        assert (run.model(ids).logits - run.pristine().eval()(ids).logits).abs().max() > 1e-4
        start = build("method=full", *SMALL, f"model.adapter={tmp_path / 'run' / 'export-peft'}")
        torch.testing.assert_close(start.model.eval()(ids).logits, run.model(ids).logits, rtol=1e-5, atol=1e-6)


# -- Fisher information ------------------------------------------------------------------------------------------------


def test_it_is_the_mean_of_squared_gradients_of_single_examples() -> None:
    run = build("method=layernorm_tuning", *SUBSET, *VIT)
    found = method(run).scores
    base: Any = run.pristine().eval()
    named = {name: base.get_parameter(name) for name in found}
    F = {name: torch.zeros_like(p) for name, p in named.items()}
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    for batch in run.calibration(16, batch=1):
        loss = nn.functional.cross_entropy(base(pixel_values=batch["pixels"]).logits, batch["labels"])
        for name, g in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
            F[name] += g.square() / 16
            total[name] += g / 16
    for name in F:
        torch.testing.assert_close(found[name], F[name], rtol=1e-4, atol=1e-10)
    wrong = torch.cat([t.square().flatten() for t in total.values()])
    right = torch.cat([t.flatten() for t in F.values()])
    assert (right > 1.5 * wrong).float().mean() > 0.9, "the squared mean gradient is another thing"


def test_padding_and_dropout_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    a = build("method=layernorm_tuning", *SUBSET, *SMALL)
    b = build("method=layernorm_tuning", *SUBSET, *SMALL, "model.architecture.attention_dropout=0.5", "data.packing=true")
    for name, score in method(a).scores.items():
        torch.testing.assert_close(method(b).scores[name], score, rtol=1e-4, atol=1e-9)


# -- subsets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "score"), [(0.2, "fisher"), (0.05, "random"), (0.2, "reverse")])
def test_exactly_the_chosen_entries_move(ratio: float, score: str) -> None:
    words = (*SUBSET, f"method.layernorm_tuning.ratio={ratio}", f"method.layernorm_tuning.score={score}")
    run = build("method=layernorm_tuning", *words, *VIT, *STEADY, "optimizer.weight_decay=0.5")
    start = weights(run)
    flat = torch.cat([s.flatten() for s in method(run).scores.values()])
    run.fit(4)
    at = moved(run, start)
    assert sum(int(m.sum()) for m in at.values()) == int(ratio * len(flat)) == run.events["entries"]
    for name, entries in at.items():
        assert torch.equal(entries, method(run).masks[name])
    chosen = torch.cat([method(run).masks.get(n, torch.zeros_like(s, dtype=torch.bool)).flatten() for n, s in method(run).scores.items()])
    if score != "random":
        inside, outside = flat[chosen], flat[~chosen]
        assert inside.min() >= outside.max() if score == "fisher" else inside.max() <= outside.min()


def test_all_entries_are_mode_all_bit_for_bit() -> None:
    whole = build("method=layernorm_tuning", *VIT, *STEADY)
    subset = build("method=layernorm_tuning", *SUBSET, "method.layernorm_tuning.ratio=1", *VIT, *STEADY)
    fifth = build("method=layernorm_tuning", *SUBSET, *VIT, *STEADY)
    for run in (whole, subset, fifth):
        run.fit(4)
    assert all(torch.equal(now, weights(subset)[name]) for name, now in weights(whole).items())
    assert any(not torch.equal(now, weights(fifth)[name]) for name, now in weights(whole).items())


def test_whole_norms_are_kept_by_their_sum() -> None:
    run = build("method=layernorm_tuning", *SUBSET, "method.layernorm_tuning.granularity=layer", "method.layernorm_tuning.ratio=0.4", *VIT)
    owners = {name.rpartition(".")[0] for name in run.trainable()}
    sums: dict[str, float] = {}
    for name, score in method(run).scores.items():
        sums[name.rpartition(".")[0]] = sums.get(name.rpartition(".")[0], 0.0) + float(score.sum())
    assert len(sums) == 5 and owners == set(sorted(sums, key=lambda n: -sums[n])[:2])
    assert all(mask.all() for mask in method(run).masks.values())


def test_other_tasks_can_choose(tmp_path: Path) -> None:
    for seed in (1, 2):
        train("method=layernorm_tuning", *SUBSET, *VIT, "trainer.max_steps=1", f"seed={seed}", folder=tmp_path / str(seed))
    folders = f"method.layernorm_tuning.fisher_from=[{tmp_path}/1,{tmp_path}/2]"
    run = build("method=layernorm_tuning", *SUBSET, folders, *VIT)
    parts = [method(Run.open(tmp_path / str(seed))).scores for seed in (1, 2)]
    for name, score in method(run).scores.items():
        wanted = sum(p[name] / sum(s.sum() for s in p.values()) for p in parts) / 2
        torch.testing.assert_close(score, wanted)
    assert sum(s.sum() for s in method(run).scores.values()) == pytest.approx(1.0, rel=1e-5)
    with pytest.raises(UserError, match="has no scores of this model's norms"):
        build("method=layernorm_tuning", *SUBSET, folders, *SMALL)
    with pytest.raises(UserError, match="nowhere is no finished run"):
        build("method=layernorm_tuning", *SUBSET, "method.layernorm_tuning.fisher_from=[nowhere]", *VIT)


# -- what it is for ----------------------------------------------------------------------------------------------------


class Teacher(nn.Module):
    """A norm between two frozen maps."""

    def __init__(self, gain: Tensor, shift: Tensor) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.first, self.norm, self.layer = nn.Linear(16, 16, bias=False), nn.LayerNorm(16), nn.Linear(16, 16, bias=False)
        for module in (self.first, self.layer):
            nn.init.orthogonal_(module.weight, generator=rng)
        self.norm.weight.data, self.norm.bias.data = gain, shift

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x + self.first(x)))


def test_gain_and_bias_suffice_for_a_rescaled_norm_and_a_rank_one_update_does_not() -> None:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(256, 16, generator=rng)
    gain, shift = 0.5 + torch.rand(16, generator=rng) * 1.5, torch.randn(16, generator=rng)
    with torch.no_grad():
        rows = toy_data("rescaled-norm", x, Teacher(gain, shift)(x))
    shared = ("model=toy", f"data={rows}", "trainer.batch=256", "trainer.eval_examples=256", "trainer.clip=.inf", "schedule.warmup=0",
              "schedule=linear", "optimizer.lr=0.05")  # fmt: skip

    def error(*words: str) -> float:
        run = host(Teacher(torch.ones(16), torch.zeros(16)), *shared, *words)
        run.fit(300)
        return run.evaluate("test")["mse"]

    ours = error("method=layernorm_tuning")
    assert ours < 2e-4
    assert error("method=lora", "method.lora.targets=['re:first']", "method.lora.rank=1") > 5 * max(ours, 2e-4)


def test_the_report_of_what_moved_names_the_one_part_that_did() -> None:
    run = build("method=layernorm_tuning", "method.layernorm_tuning.mode=probe", *VIT)
    assert set(run.trainable()) == set(weights(run))
    with torch.no_grad():
        run.model.vit.layers[1].layernorm_after.weight.mul_(1.5)
    run.stack.finish(run)
    found = [row for row in run.results["change"] if row["mean"]]
    assert [(row["part"], row["block"]) for row in found] == [("output norm", None), ("output norm", 1)]
    assert found[1]["mean"] == pytest.approx(0.25) and found[1]["relative"] == pytest.approx(0.5)  # half of gain, no bias
    assert {row["part"] for row in run.results["change"]} >= {"q", "k", "v", "o", "up", "down", "attention norm", "embed", "head"}


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), SUBSET], ids=["all", "subset"])
def test_a_resumed_run_is_bit_equal(words: tuple[str, ...], tmp_path: Path) -> None:
    run = check_resume("method=layernorm_tuning", *VIT, *words, "trainer.max_steps=5", folder=tmp_path, at=4)
    again = Run.open(tmp_path / "resumed")
    assert all(torch.equal(p, weights(run)[name]) for name, p in weights(again).items())


def test_bad_input() -> None:
    with pytest.raises(UserError, match="mode=all: toy has no such norm"):
        build("method=layernorm_tuning", "model=toy")
    with pytest.raises(UserError, match="masks gradients, and this stack computes none"):
        build("method=[layernorm_tuning,mezo]", *SUBSET, *SMALL)
    with pytest.raises(UserError, match="1000 calibration examples were asked for and the training set holds 64"):
        build("method=layernorm_tuning", SUBSET[0], "method.layernorm_tuning.fisher_samples=1000", *VIT)
    with pytest.raises(UserError, match="mode=probe trains every weight, lora freezes some"):
        build("method=[layernorm_tuning,lora]", "method.layernorm_tuning.mode=probe", *SMALL)
