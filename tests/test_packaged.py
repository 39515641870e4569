"""The packaged models: their weights have really learned, and their recipes can be run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tools import build

from ftrecipes.models import pretraining
from ftrecipes.models.base import PACKAGED


def test_tiny_llama_has_learned_its_domain_and_not_the_answers() -> None:
    words = ("model=tiny-llama", "data.size=64", "trainer.eval_examples=100")
    run = build(*words, "data=stories")
    known, random = run.evaluate("test"), build(*words, "data=stories", "model.weights=random").evaluate("test")
    assert random["nll"] > 6.5 and known["nll"] < 1.1, "nats a token, of ln(1130) = 7.0"
    assert known["token_accuracy"] > 0.6 > 0.02 > random["token_accuracy"]
    asked = build(*words).evaluate("test")
    assert asked["exact_match"] < 0.1 and asked["nll"] > 3 * known["nll"], "questions are left to fine-tuning"
    said = json.loads((PACKAGED / "tiny-llama" / "recipe.json").read_text())
    assert said["overrides"] == [] and known["nll"] == pytest.approx(said["after"]["test"]["nll"], abs=0.05)
    assert 3e6 < sum(p.numel() for p in run.pristine().parameters()) == said["parameters"] < 8e6
    assert (PACKAGED / "tiny-llama" / "model.safetensors").stat().st_size <= 12e6


def test_tiny_llama_goes_on_with_a_story() -> None:
    run = build("model=tiny-llama", "data=stories", "data.size=8")
    text = run.task.generate(run.model, "It is a sunny day. In the evening Anna goes", max_new_tokens=6)
    assert text.startswith("home and sleeps")


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-vit"])
def test_a_recipe_can_be_run_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = tmp_path / "packaged"
    (packaged / name).mkdir(parents=True)
    (packaged / name / "old").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretraining, "PACKAGED", packaged)
    said = pretraining.make(name, ["trainer.max_steps=2", "trainer.batch=4", "trainer.eval_examples=8", "data.size=64"])
    now, kept = packaged / name, PACKAGED / name
    assert said["steps"] == 2 and [f.name for f in packaged.iterdir()] == [name]
    assert sorted(f.name for f in now.iterdir()) == sorted(f.name for f in kept.iterdir())
    for file in kept.iterdir():  # tokenizer and architecture are made again to the byte; 2 updates are not the weights
        if file.name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"):
            assert (now / file.name).read_bytes() == file.read_bytes(), file.name
    settings = [{k: v for k, v in json.loads((f / "config.json").read_text()).items() if k != "transformers_version"} for f in (now, kept)]
    assert settings[0] == settings[1]
    from safetensors.torch import load_file

    ours, theirs = (load_file(f / "model.safetensors") for f in (now, kept))
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    assert not any(torch.equal(ours[n], theirs[n]) for n in ours if ours[n].dim() > 1)
