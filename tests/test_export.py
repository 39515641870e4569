"""Merged weights and adapters for other libraries load there with equal logits; starts from what was tuned before."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tools import SMALL, Run, build, train
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer
from typer.testing import CliRunner

from ftrecipes import cli, export
from ftrecipes.errors import UserError
from ftrecipes.models.base import PACKAGED
from ftrecipes.report import finished

SHORT = ("trainer.max_steps=2", "trainer.batch=8", "trainer.eval_examples=4", "data.size=64")
TEXT = (*SMALL, *SHORT)
GPT2 = (
    "model=gpt2", "model.weights=random", "data=storyqa", "data.max_length=64", *SHORT,
    "model.architecture={n_layer:2,n_embd:32,n_head:2,vocab_size:1100,bos_token_id:1,eos_token_id:2}",
)  # fmt: skip
GEMMA = (
    "model=gemma3-1b", "model.weights=random", "data=storyqa", "data.max_length=64", *SHORT,
    "model.architecture={num_hidden_layers:2,hidden_size:64,intermediate_size:96,num_attention_heads:4,num_key_value_heads:1,"
    "head_dim:16,vocab_size:1100,layer_types:[sliding_attention,full_attention],query_pre_attn_scalar:16}",
)  # fmt: skip
IMAGES = ("model=tiny-vit", "data=shapes", *SHORT)
CLOSE = {"rtol": 1e-5, "atol": 2e-6}

Trained = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A finished run of these words, trained once for the whole module."""
    runs: dict[tuple[str, ...], Path] = {}

    def get(*words: str) -> Path:
        if words not in runs:
            runs[words] = tmp_path_factory.mktemp("run") / "run"
            train(*words, folder=runs[words])
        return runs[words]

    return get


def logits(model: Any) -> torch.Tensor:
    """Of fixed tokens, or of a fixed image."""
    torch.manual_seed(0)
    vision = "pixel_values" in model.forward.__code__.co_varnames or hasattr(model, "classifier") or hasattr(model, "vit")
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)} if vision else {"input_ids": torch.randint(20, 800, (2, 24))}
    with torch.no_grad():
        return model.eval()(**inputs).logits.float()


def loads_in_peft(base: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return PeftModel.from_pretrained(base, str(folder))


# ---------------------------------------------------------------------------------------------------------------------
# merge


@pytest.mark.parametrize(
    "words",
    [
        ("method=lora",), ("method=lora", "method.lora.targets=[embed,head,q]", "model.also_train=[norm]"), ("method=dora",),
        ("method=svft",), ("method=periodic_lora", "method.periodic_lora.stage_steps=1", "method.periodic_lora.momentum=0.3"),
        ("method=full",), ("method=gmt",), ("method=lift",), ("method=linear_probe",), ("method=[dora,dft,wise_ft]",),
    ],
    ids=" ".join,
)  # fmt: skip
def test_merged_weights_have_equal_logits(trained: Trained, tmp_path: Path, words: tuple[str, ...], monkeypatch: Any) -> None:
    run_folder = trained(*TEXT, *words)
    monkeypatch.setattr(export, "SHARD", "100KB")
    folder = export.merge(str(run_folder), str(tmp_path / "merged"))
    run = Run.open(run_folder)
    wanted = logits(run.model)
    assert (wanted - logits(run.pristine())).abs().max() > 1e-3  # training moved it
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(model), wanted, **CLOSE)
    assert (folder / "model.safetensors.index.json").is_file()
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == run.task.tokenizer.get_vocab()
    torch.testing.assert_close(
        logits(build("model=causal-lm", f"model.path={folder}", "data=storyqa", "data.max_length=128", *SHORT).model), wanted, **CLOSE
    )


def test_card_says_what_was_tuned(trained: Trained, tmp_path: Path) -> None:
    run_folder = trained(*TEXT, "method=lora")
    text = (export.merge(str(run_folder), str(tmp_path / "merged")) / "README.md").read_text()
    info = json.loads((run_folder / "run.json").read_text())
    head = yaml.safe_load(text.split("---")[1])
    assert head["ftrecipes"]["settings_hash"] == info["hash"] and head["ftrecipes"]["base_fingerprint"] == info["base"]
    assert head["tags"] == ["ftrecipes", "lora"]
    assert "arxiv.org/abs/2106.09685" in text and info["hash"] in text.split("---")[2] and "tiny-llama" in text
    after = info["results"]["after"]["test"]["nll"]
    assert f"| {after:.4f} |" in text


def test_merge_rounds_once_and_says_how_far(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = trained(*TEXT, "hardware.precision=bf16-mixed", "method=lora", "model.also_train=[norm]", "optimizer.lr=0.02")
    finished.generate(str(run_folder), "Anna has a ball.", None, 4, 0.0, True)  # two dtypes in one forward pass
    assert json.loads(capsys.readouterr().out)[0]["prompt"] == "Anna has a ball."
    folder = export.merge(str(run_folder), str(tmp_path / "merged"))
    said = re.search(r"rounding to bfloat16 moved no weight by more than (\S+)", capsys.readouterr().out)
    assert said and said[0] in (folder / "README.md").read_text()
    saved = load_file(folder / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    run = Run.open(run_folder)
    largest = 0.0
    for name, exact in run.model.named_parameters():
        if name.endswith((".A", ".B")):
            continue
        delta = getattr(run.model.get_submodule(name.removesuffix(".weight")), "delta", None)
        whole = exact.detach().float() if delta is None else exact.detach().float() + delta.scale * delta.B @ delta.A
        assert torch.equal(saved[name], whole.to(torch.bfloat16)), name
        largest = max(largest, float((whole - saved[name].float()).detach().abs().max()))
    assert largest > 0 and float(said[1]) == pytest.approx(largest, rel=0.01)


def test_merge_of_images(trained: Trained, tmp_path: Path) -> None:
    run_folder = trained(*IMAGES, "method=lora", "model.also_train=[head]")
    folder = export.export(str(run_folder), "hf", str(tmp_path / "merged"))
    run = Run.open(run_folder)
    model = AutoModelForImageClassification.from_pretrained(folder)
    torch.testing.assert_close(logits(model), logits(run.model), **CLOSE)
    again = build("model=vit-b16", f"model.path={folder}", "data=shapes", *SHORT)
    assert again.task.labels == run.task.labels and torch.equal(again.task.mean, run.task.mean) and again.task.size == run.task.size
    assert not again.loaded.fresh


# ---------------------------------------------------------------------------------------------------------------------
# peft


@pytest.mark.parametrize(
    "words",
    [
        (*TEXT, "method=lora"),
        (*TEXT, "method=lora", "method.lora.rslora=true", "method.lora.rank=5", "method.lora.targets=[q,v,head,embed]", "model.also_train=[norm]"),
        (*TEXT, "method=lora", "method.lora.blocks=first-1"),
        (*TEXT, "method=dora", "method.dora.magnitude_only=[down]", "method.dora.targets=[q,k,o]"),
        (*TEXT, "method=periodic_lora", "method.periodic_lora.stage_steps=1", "method.periodic_lora.momentum=0.3"),
        (*TEXT, "method=[lora,gmt,wise_ft]"),
        (*GPT2, "method=lora", "method.lora.bias=lora_only", "method.lora.targets=[qkv,up,head]"),
        (*GPT2, "method=lora", "method.lora.bias=all", "method.lora.targets=[qkv]"),
        (*GPT2, "method=dora", "method.dora.targets=[qkv,o,down]"),
        (*GEMMA, "method=lora", "method.lora.targets=[embed,q]"),
        (*IMAGES, "method=dora", "method.dora.targets=[conv,embed,q]", "model.also_train=[head,norm]"),
        (*IMAGES, "method=lora", "method.lora.targets=[embed,q,up]"),
    ],
    ids=lambda words: " ".join(w for w in words if not w.startswith(("trainer", "data", "model."))),
)  # fmt: skip
def test_adapter_loads_in_peft_with_equal_logits(trained: Trained, tmp_path: Path, words: tuple[str, ...]) -> None:
    run_folder = trained(*words)
    folder = export.export(str(run_folder), "peft", str(tmp_path / "adapter"))
    run = Run.open(run_folder)
    wanted = logits(run.model)
    assert (wanted - logits(run.pristine())).abs().max() > 1e-4
    torch.testing.assert_close(logits(loads_in_peft(run.pristine(), folder)), wanted, **CLOSE)
    # and it is a start: of a run here as well
    start = build(*(w for w in words if not w.startswith("method")), "method=full", f"model.adapter={folder}")
    torch.testing.assert_close(logits(start.model), wanted, **CLOSE)
    assert not [name for name, _ in start.model.named_modules() if "lora" in name or "base_layer" in name]


def test_periodic_lora_is_one_stacked_lora(trained: Trained, tmp_path: Path) -> None:
    run_folder = trained(*TEXT, "method=periodic_lora", "method.periodic_lora.stage_steps=1")
    config = json.loads((export.export(str(run_folder), "peft", str(tmp_path / "adapter")) / "adapter_config.json").read_text())
    rank = Run.open(run_folder).settings.method.periodic_lora.rank
    assert config["r"] == 3 * rank  # two stages, and the live adapter, which is empty


def test_other_deltas_need_a_rank(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = trained(*TEXT, "method=svft")
    with pytest.raises(UserError, match=r"peft has no form for what svft made of model.layers.0.*--rank R .*--to hf"):
        export.export(str(run_folder), "peft", str(tmp_path / "adapter"))
    run = Run.open(run_folder)
    wanted, start = logits(run.model), logits(run.pristine())
    errors, distances = [], []
    for rank in (2, 8, 32):
        folder = export.export(str(run_folder), "peft", str(tmp_path / f"adapter-{rank}"), rank)
        said = re.search(r"a LoRA of rank (\d+) holds the update up to a relative error of (\S+)", capsys.readouterr().out)
        assert said and int(said[1]) == rank and said[0] in (folder / "README.md").read_text()
        errors.append(float(said[2]))
        distances.append(float((logits(loads_in_peft(run.pristine(), folder)) - wanted).norm()))
    updates = [(d.delta().detach(), d) for d in run.stack.methods[0].deltas.values()]  # type: ignore[attr-defined]
    lost = sum(float(torch.linalg.svdvals(update)[8:].square().sum()) for update, _ in updates)
    total = sum(float(update.square().sum()) for update, _ in updates)
    assert errors[1] == pytest.approx((lost / total) ** 0.5, abs=1e-3)
    assert 1 > errors[0] > errors[1] > errors[2] and (wanted - start).norm() > distances[0] > distances[1] > distances[2]
    with pytest.raises(UserError, match="its rank is at most 64"):
        export.export(str(run_folder), "peft", str(tmp_path / "adapter-65"), 65)
    assert not list(tmp_path.glob("*adapter-65*"))


def test_a_rank_shortens_a_lora(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = trained(*TEXT, "method=lora")
    folder = export.export(str(run_folder), "peft", str(tmp_path / "adapter"), 8)  # its own rank: nothing is lost
    assert "relative error of 0.0000" in capsys.readouterr().out
    run = Run.open(run_folder)
    torch.testing.assert_close(logits(loads_in_peft(run.pristine(), folder)), logits(run.model), rtol=0.0, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("method=full",), r"full changes the weights themselves, which no adapter holds; use --to hf"),
        (("method=gmt",), r"gmt changes the weights themselves.*use --to hf"),
        (("method=lift",), r"lift changes the weights themselves.*use --to hf"),
        (("method=[lora,lift]", "method.lora.targets=[q]", "method.lift.targets=[up]"), r"lift changes the weights themselves.*use --to hf"),
        (("method=[dora,dft,wise_ft]",), r"peft has no form for what dora made of .*--rank"),
        (("method=dora", "method.dora.targets=[embed]"), r"peft splits lengths off the other side of an embedding"),
        (("method=lora", "model.also_train=[embed]"), r"is tied to another weight .*use --to hf"),
    ],
    ids=str,
)  # fmt: skip
def test_what_peft_cannot_hold_is_refused(trained: Trained, tmp_path: Path, words: tuple[str, ...], reason: str) -> None:
    run_folder = trained(*TEXT, *words)
    with pytest.raises(UserError, match=reason) as caught:
        export.export(str(run_folder), "peft", str(tmp_path / "adapter"))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# what is refused, and what is never left behind


def test_targets_and_runs_are_checked(trained: Trained, tmp_path: Path) -> None:
    run_folder = trained(*TEXT, "method=lora")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already; choose another folder"):
        export.merge(str(run_folder), str(tmp_path / "there"))
    with pytest.raises(UserError, match=r"--to pefd: unknown format; did you mean 'peft'\?"):
        export.export(str(run_folder), "pefd")
    with pytest.raises(UserError, match="--rank is of --to peft"):
        export.export(str(run_folder), "hf", None, 4)
    with pytest.raises(UserError, match="not the record of a run"):
        export.merge(str(tmp_path / "there"))
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run_folder, unfinished)
    shutil.rmtree(unfinished / "tuned")
    with pytest.raises(UserError, match="no tuned weights"):
        export.merge(str(unfinished))
    toy = trained("model=toy", "method=lora", "method.lora.targets=[linear]", "trainer.max_steps=1")
    with pytest.raises(UserError, match="toy has no format of the hub"):
        export.merge(str(toy), str(tmp_path / "toy"))
    assert not (unfinished / "merged").exists() and not (tmp_path / "toy").exists()


def test_a_failure_leaves_nothing(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_card", fail)
    for to in ("hf", "peft"):
        with pytest.raises(KeyboardInterrupt):
            export.export(str(trained(*TEXT, "method=lora")), to, str(tmp_path / to))
    assert not list(tmp_path.iterdir())


def test_commands(trained: Trained, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    shutil.copytree(trained(*TEXT, "method=lora"), run_folder)
    done = CliRunner().invoke(cli.app, ["merge", str(run_folder)], catch_exceptions=False)
    assert done.exit_code == 0 and done.stdout.splitlines()[-1] == str(run_folder / "merged")
    done = CliRunner().invoke(cli.app, ["export", str(run_folder), "--to", "peft"], catch_exceptions=False)
    assert done.exit_code == 0 and done.stdout.splitlines()[-1] == str(run_folder / "export-peft")
    assert {p.name for p in (run_folder / "export-peft").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    done = CliRunner().invoke(cli.app, ["export", str(run_folder), "--to", "hf", "--folder", str(tmp_path / "x")], catch_exceptions=False)
    assert done.exit_code == 0 and (tmp_path / "x" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---------------------------------------------------------------------------------------------------------------------
# starts


@pytest.mark.parametrize("method", ["lora", "dora", "svft", "periodic_lora", "full", "lift", "linear_probe"])
def test_a_finished_run_is_a_start(trained: Trained, tmp_path: Path, method: str) -> None:
    first = trained(*TEXT, f"method={method}")
    wanted = logits(Run.open(first).model)
    words = (*TEXT, "method=svft", f"model.adapter={first}")
    start = build(*words, "method.svft.init=zero")
    torch.testing.assert_close(logits(start.model), wanted, **CLOSE)
    torch.testing.assert_close(logits(start.pristine()), wanted, **CLOSE)
    # training goes on from there, and its record leads through both
    second = train(*words, folder=tmp_path / "second")
    tuned = logits(second.model)
    assert (tuned - wanted).abs().max() > 1e-3
    assert torch.equal(logits(Run.open(tmp_path / "second").model), tuned)
    merged = AutoModelForCausalLM.from_pretrained(export.merge(str(tmp_path / "second")))
    torch.testing.assert_close(logits(merged), tuned, **CLOSE)
    with pytest.raises(UserError, match=r"started from model\.adapter="):
        export.export(str(tmp_path / "second"), "peft")
    third = build(*TEXT, "method=full", f"model.adapter={tmp_path / 'second'}")
    torch.testing.assert_close(logits(third.model), tuned, **CLOSE)


def test_a_start_from_another_base_is_refused(trained: Trained) -> None:
    first = trained(*TEXT, "method=lora")
    with pytest.raises(UserError, match="tuned from another base"):
        build(*TEXT, "method=lora", f"model.adapter={first}", "seed=1")  # other random weights


def test_a_new_head_of_a_finished_run_is_no_longer_new(tmp_path: Path) -> None:
    """Its random start depends on the seed, and is no part of the base that a start must share."""
    folder = tmp_path / "vit"
    shutil.copytree(PACKAGED / "tiny-vit", folder)
    weights = load_file(folder / "model.safetensors")
    save_file({n: t[:5] if n.startswith("classifier") else t for n, t in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {i: f"kind {i}" for i in range(5)}, "label2id": {f"kind {i}": i for i in range(5)}}
    (folder / "config.json").write_text(json.dumps(config))
    words = (*IMAGES, f"model.path={folder}")
    first = train(*words, "method=lora", folder=tmp_path / "first")
    assert first.loaded.fresh == {"classifier.weight", "classifier.bias"}
    wanted = logits(first.model)
    start = build(*words, "method=lora", f"model.adapter={tmp_path / 'first'}", "seed=1")
    assert not start.loaded.fresh
    torch.testing.assert_close(logits(start.model), wanted, **CLOSE)
    adapter = export.export(str(tmp_path / "first"), "peft")
    assert json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    torch.testing.assert_close(logits(loads_in_peft(first.pristine(), adapter)), wanted, **CLOSE)
    assert not build(*words, "method=lora", f"model.adapter={adapter}", "seed=1").loaded.fresh


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "r": 3, "lora_alpha": 7},
        {"target_modules": ["q_proj", "lm_head"], "use_dora": True, "r": 4, "rank_pattern": {"lm_head": 2}},
        {"target_modules": ["v_proj", "embed_tokens"], "r": 2},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"], "r": 2},
    ],
    ids=str,
)
def test_an_adapter_of_peft_is_a_start(tmp_path: Path, options: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(build(*TEXT, "method=full").model, LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wanted = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    run = train(
        *TEXT,
        "method=svft",
        "method.svft.init=zero",
        "trainer.max_steps=0",
        f"model.adapter={tmp_path / 'adapter'}",
        folder=tmp_path / "run",
    )
    torch.testing.assert_close(logits(run.model), wanted, **CLOSE)
    assert (wanted - logits(build(*TEXT, "method=full").model)).abs().max() > 1e-2
    merged = AutoModelForCausalLM.from_pretrained(export.merge(str(tmp_path / "run")))
    torch.testing.assert_close(logits(merged), wanted, **CLOSE)


def test_peft_folders_that_do_not_fit(trained: Trained, tmp_path: Path) -> None:
    good = export.export(str(trained(*TEXT, "method=lora")), "peft", str(tmp_path / "good"))
    weights, config = load_file(good / "adapter_model.safetensors"), json.loads((good / "adapter_config.json").read_text())
    name = next(iter(weights))

    def start(changed: dict[str, Any], **fields: Any) -> Run:
        folder = tmp_path / f"bad-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        save_file(changed, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
        return build(*TEXT, "method=lora", f"model.adapter={folder}")

    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: start({n: t for n, t in weights.items() if n != name}), f"does not fit this model: {name} is missing"),
        (
            lambda: start({**weights, "base_model.model.other.lora_A.weight": torch.zeros(1)}),
            "there is no place for base_model.model.other",
        ),
        (lambda: start({**weights, name: weights[name][:1]}), "does not fit this model: .*size mismatch"),
        (lambda: start(weights, target_modules=["nothing"]), "does not fit this model: Target modules"),
        (lambda: start(weights, peft_type="LOHA"), "peft_type LOHA cannot be folded in here"),
    ]
    for make, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value) and "model.adapter=" in str(caught.value)
    file = good / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        build(*TEXT, "method=lora", f"model.adapter={good}")
