"""Language models by name and from folders: shapes as published, logits as transformers has them, bad folders in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ftrecipes import catalogue, models
from ftrecipes.anatomy import Anatomy
from ftrecipes.compose import compose
from ftrecipes.errors import UserError
from ftrecipes.models.base import PACKAGED

# Parameters as published (a tied head counts once), and whether head and embedding are one weight.
PUBLISHED = {
    "gemma-2b": (2_506_172_416, True),
    "gemma3-1b": (999_885_952, True),
    "gpt2": (124_439_808, True),
    "gpt2-medium": (354_823_168, True),
    "gpt2-xl": (1_557_611_200, True),
    "llama-7b": (6_738_415_616, False),
    "llama2-7b": (6_738_415_616, False),
    "llama2-13b": (13_015_864_320, False),
    "llama3-8b": (8_030_261_248, False),
    "llama3.1-8b": (8_030_261_248, False),
    "llama3.2-1b": (1_235_814_400, True),
    "llama3.2-3b": (3_212_749_824, True),
    "mistral-7b": (7_241_732_096, False),
    "olmo2-1b": (1_484_916_736, False),
    "opt-350m": (331_196_416, True),
    "opt-1.3b": (1_315_758_080, True),
    "opt-13b": (12_853_473_280, True),
    "phi-2": (2_779_683_840, False),
    "pythia-160m": (162_322_944, False),
    "pythia-1b": (1_011_781_632, False),
    "qwen2-7b": (7_615_616_512, False),
    "qwen2.5-0.5b": (494_032_768, True),
    "qwen2.5-1.5b": (1_543_714_304, True),
    "qwen2.5-7b": (7_615_616_512, False),
    "qwen3-0.6b": (596_049_920, True),
    "qwen3-8b": (8_190_735_360, False),
    "smollm2-135m": (134_515_008, True),
    "smollm2-360m": (361_821_120, True),
    "smollm2-1.7b": (1_711_376_384, True),
    "tinyllama-1.1b": (1_100_048_384, False),
}


def test_every_real_language_model_is_checked() -> None:
    real = {n for n, e in catalogue.entries("model").items() if e.about["domain"] == "causal-lm" and e.about.get("architecture")}
    assert real == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shape_is_the_published_one(name: str) -> None:
    loaded = models.load(compose([f"model={name}"]), meta=True)
    model: Any = loaded.model
    count, tied = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == count == catalogue.get("model", name).about["parameters"]
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert all(p.is_meta for p in model.parameters())
    anatomy = Anatomy(model)
    inside = [p.role for p in anatomy.parts if p.block is not None]
    assert len(anatomy.blocks) == model.config.num_hidden_layers
    assert "linear" not in inside and {"o", "up", "down", "norm"} <= set(inside)
    assert {"q", "k", "v"} <= set(inside) or "qkv" in inside
    assert [p.name for p in anatomy.parts if p.role == "head"] == ["lm_head"]


# One small model of each family, as changes of a real one's architecture.
FAMILIES = {
    "llama3.2-1b": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "qwen2.5-0.5b": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3-0.6b": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "gemma-2b": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8},
    "gemma3-1b": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral-7b": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    "opt-350m": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "pythia-160m": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "phi-2": {"hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
    "olmo2-1b": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
}  # fmt: skip


def random_settings(name: str) -> Any:
    settings = compose([f"model={name}", "model.weights=random", "data=storyqa", "data.max_length=64"])
    settings.model.architecture = {**FAMILIES[name], "vocab_size": 1100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return settings


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_are_those_of_transformers(name: str) -> None:
    """The task takes hidden states through the head by itself; the sum of its losses is the loss of the whole model."""
    loaded = models.load(random_settings(name))
    model: Any = loaded.model.eval()
    examples = [{"text": "The cat sat on the mat and looked."}, {"prompt": "Who?", "response": "The dog."}]
    batch = loaded.task.collate([loaded.task.encode(e) for e in examples])
    outputs = loaded.task.outputs(model, batch)
    ours = loaded.task.losses(outputs, batch).sum()
    mask = (batch["segment"] >= 0).long()
    logits = model(input_ids=batch["ids"], attention_mask=mask).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_random_weights_are_seeded() -> None:
    first, again = (models.load(random_settings("gpt2")).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[n], again[n]) for n in first)
    other = random_settings("gpt2")
    other.values.seed = 1
    assert not torch.equal(models.load(other).model.state_dict()["lm_head.weight"], first["lm_head.weight"])


# ---------------------------------------------------------------------------------------------------------------------
# folders in the hub's format


def write_folder(to: Path, *, tied: bool = True, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Any:
    """A two-layer Llama with tiny-llama's tokenizer, as transformers saves it."""
    shape: Any = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=1030, max_position_embeddings=256, tie_word_embeddings=tied, **shape)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(to, max_shard_size=shard)
    AutoTokenizer.from_pretrained(PACKAGED / "tiny-llama").save_pretrained(to)
    return model


def load_folder(folder: Path, *words: str) -> models.Loaded:
    return models.load(compose(["model=causal-lm", f"model.path={folder}", "data=storyqa", "data.max_length=64", *words]))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["5GB", "100KB"])
def test_folder_loads_with_equal_logits(tmp_path: Path, tied: bool, dtype: torch.dtype, shard: str) -> None:
    write_folder(tmp_path, tied=tied, dtype=dtype, shard=shard)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "100KB") == (tmp_path / "model.safetensors.index.json").is_file()
    loaded = load_folder(tmp_path)
    model: Any = loaded.model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    ids = torch.arange(30).view(2, 15)
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, plain(input_ids=ids).logits)
    kept = load_folder(tmp_path, "model.dtype=bfloat16").model
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.pristine().lm_head.weight, model.lm_head.weight)  # type: ignore[union-attr, arg-type]


def _truncate(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])


def _pickle_only(folder: Path) -> None:
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")


def _no_weights(folder: Path) -> None:
    for file in folder.glob("model*.safetensors*"):
        file.unlink()


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _own_code(folder: Path) -> None:
    _config(folder, model_type="mine", auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"})
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")


def _no_tokenizer(folder: Path) -> None:
    for file in (*folder.glob("tokenizer*"), *folder.glob("chat_template*")):
        file.unlink()


def _large_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"<more{i}>" for i in range(300)])
    tokenizer.save(str(folder / "tokenizer.json"))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), "is named in model.safetensors.index.json and missing"),
    "truncated shard": (_truncate, "not a whole safetensors file"),
    "pickle alone": (_pickle_only, "pytorch_model.bin is a pickle, which can run code"),
    "no weights": (_no_weights, r"no \*\.safetensors"),
    "broken index": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json: not valid JSON"),
    "index without a map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text('{"model_type": "llama",'), "config.json: not valid JSON"),
    "unknown architecture": (lambda f: _config(f, model_type="nonesuch", architectures=None), "cannot load .*nonesuch"),
    "not a language model": (lambda f: _config(f, model_type="vit"), "cannot load"),
    "wrong type in config": (lambda f: _config(f, hidden_size="wide"), "cannot load"),
    "weights of another shape": (lambda f: _config(f, intermediate_size=100), "6 weights are missing or of another shape"),
    "weights missing": (lambda f: _config(f, num_hidden_layers=3), "9 weights are missing or of another shape, model.layers.2"),
    "code of its own": (_own_code, "needs code of its own"),
    "no tokenizer": (_no_tokenizer, "no tokenizer"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("[1,"), "tokenizer.json: not valid JSON"),
    "tokenizer too large": (_large_tokenizer, r"its tokenizer has 1\d\d\d tokens, its embedding 1030"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_folder_is_one_line(tmp_path: Path, what: str) -> None:
    write_folder(tmp_path, shard="100KB")
    spoil, message = BROKEN[what]
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_folder(tmp_path)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500 and str(tmp_path) in text
    assert not (tmp_path / "ran").exists()


def test_settings_that_do_not_fit_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path)
    with pytest.raises(UserError, match=r"data.max_length=300: .* has 256 positions"):
        load_folder(tmp_path, "data.max_length=300")
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"has no chat template; use data.template=plain"):
        load_folder(tmp_path, "data.template=chat")
    assert not load_folder(tmp_path).task.chat  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"needs model.weights=random"):
        load_folder(tmp_path, "model.architecture={num_hidden_layers: 1}")
    with pytest.raises(UserError, match="no such folder"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"model.hub=<organisation/name> or model.path=<folder>"):
        models.load(compose(["model=causal-lm", "data=storyqa"]))


# ---------------------------------------------------------------------------------------------------------------------
# the hub


def cached(hub: Path, name: str) -> Path:
    """An empty snapshot of a model in a hub's cache."""
    repository = hub / f"models--{name.replace('/', '--')}"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


def test_cached_hub_model_loads_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    saved = write_folder(cached(tmp_path, "some/model"))
    loaded = models.load(compose(["model=causal-lm", "model.hub=some/model", "data=storyqa", "data.max_length=64"]))
    assert torch.equal(loaded.model.lm_head.weight, saved.lm_head.weight)  # type: ignore[union-attr, arg-type]
    with pytest.raises(UserError, match=r"other/model is not in the local cache and the hub cannot be reached; give model.path"):
        models.load(compose(["model=causal-lm", "model.hub=other/model", "data=storyqa"]))


def test_unreachable_hub_is_said_at_once(tmp_path: Path) -> None:
    """The whole command, with a hub that refuses every connection: exit code 2 and no minute of retries."""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    code = (
        "import sys, time; from ftrecipes import models; from ftrecipes.compose import compose\n"
        "from ftrecipes.errors import UserError\n"
        "import transformers\nstart = time.perf_counter()\n"
        "try:\n    models.load(compose(['model=gpt2']))\n"
        "except UserError as error:\n    print(round(time.perf_counter() - start), error, file=sys.stderr)\n    sys.exit(error.exit_code)\n"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    seconds, _, line = done.stderr.strip().partition(" ")
    assert done.returncode == 2, done.stderr
    assert line.startswith("model gpt2: openai-community/gpt2 is not in the local cache and the hub cannot be reached") and "\n" not in line
    assert int(seconds) < 15, f"{seconds} s of {time.perf_counter() - began:.0f} s"


# ---------------------------------------------------------------------------------------------------------------------
# starts from what was tuned


def test_adapter_folder_is_checked_before_anything_heavy(tmp_path: Path) -> None:
    from ftrecipes.models.adapter import check

    with pytest.raises(UserError, match="neither a finished run"):
        check(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"a whole model, no adapter; load it with model.path="):
        check(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="no adapter weights"):
        check(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(UserError, match=r"adapter_model.bin is a pickle, which can run code"):
        check(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="this run is not finished"):
        check(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        check(tmp_path / "nowhere")
