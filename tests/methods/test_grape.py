"""GRAPE: of several responses to one instruction the one that the untouched model finds most probable per token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tools import SMALL, build, train

from ftrecipes.catalogue import cache_folder
from ftrecipes.data.base import Splits
from ftrecipes.errors import UserError
from ftrecipes.methods.selectors.grape import GRAPE
from ftrecipes.registry import data as register_data
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/selectors/grape.py", 'fit = total / count if self.normalize == "length" else total', "fit = total")

PLAIN = tuple(word for word in SMALL if not word.startswith("data"))
POOL = (*SMALL, "data=storypool", "data.size=20")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FTR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picked(*words: str) -> Run:
    return build("method=grape", *words)


def texts(run: Run) -> set[str]:
    raw = run.data["train"].raw
    return {raw[i]["prompt"] + "|" + raw[i]["response"] for i in run.data["train"].keep}


def rows(name: str, train_rows: list[dict[str, Any]]) -> str:
    held = [{"prompt": "What is it?", "response": "A cup."}]
    register_data(name)(lambda knobs, domain: Splits(list(train_rows), held, held))
    return name


def test_every_instruction_keeps_one_response_however_many_it_has() -> None:
    pool = [{"prompt": f"Question {i}", "response": f"answer {j} of {'x' * j}"} for i in range(7) for j in range(1 + i % 4)]
    run = picked(*PLAIN, f"data={rows('uneven', pool)}")
    raw, keep = run.data["train"].raw, list(run.data["train"].keep)
    assert [raw[i]["prompt"] for i in keep] == [f"Question {i}" for i in range(7)] and keep == sorted(keep)
    assert run.events == {"instructions": 7, "scored": len(pool), "kept": 7}


def test_score_is_minus_the_mean_loss_of_transformers_whatever_the_batch() -> None:
    run = picked(*POOL)
    method, dataset = run.stack.methods[0], run.data["train"]
    assert isinstance(method, GRAPE)
    positions = list(range(len(dataset.raw)))
    found = method.measured(run, positions)
    for row in (0, 7, 33):
        e = dataset[positions[row]]
        ids, labels = torch.tensor(e["ids"])[None].long(), torch.tensor(e["labels"])[None].long()
        with torch.no_grad():
            loss = run.model.eval()(input_ids=ids, labels=labels).loss
            alone = method.features(run, dataset.batch([positions[row]]))[0]
            padded = method.features(run, dataset.batch(positions[:40]))[row]
        assert float(found[row, 0] / found[row, 1]) == pytest.approx(-float(loss), abs=1e-5)
        assert torch.allclose(alone, found[row], atol=1e-4) and torch.allclose(padded, found[row], atol=1e-4)
        assert int(found[row, 1]) == int((labels[0, 1:] != -100).sum())  # the prompt is context only


def test_mean_not_sum() -> None:
    run = picked(*POOL)
    method = run.stack.methods[0]
    assert isinstance(method, GRAPE)
    run.data["train"].raw = [{"prompt": "p", "response": "short"}, {"prompt": "p", "response": "long"}]
    run.data["train"].keep = [0, 1]
    features = torch.tensor([[2 * -3.2, 2.0], [7 * -2.9, 7.0]], dtype=torch.float64)
    assert method.choose(run, features)[0] == [1]
    method.normalize = "sum"
    assert method.choose(run, features)[0] == [0]
    method.select = "min"
    assert method.choose(run, features)[0] == [1]
    tie = torch.tensor([[-4.0, 2.0], [-8.0, 4.0]], dtype=torch.float64)
    method.normalize, method.select = "length", "max"
    assert method.choose(run, tie)[0] == [0]  # the first of equals
    method.per_instruction = 2
    with pytest.raises(UserError, match="no instruction of data=storypool has more than 2"):
        method.choose(run, tie)


def test_order_and_source_of_the_candidates_do_not_matter() -> None:
    run = picked(*POOL)
    pool = [dict(row) for row in run.data["train"].raw]
    turned = [{**row, "source": "other"} for row in reversed(pool)]
    again = picked(*PLAIN, f"data={rows('turned', turned)}")
    assert texts(again) == texts(run) and len(texts(run)) == 20


def test_the_untouched_model_scores_and_another_model_picks_others(tmp_path: Path) -> None:
    """A model that was tuned on one style picks that style; what is stored are scores of the start, not of the end."""

    def taught(style: str) -> int:
        folder = tmp_path / style
        run = build("method=full", *POOL, "trainer.batch=4")
        dataset = run.data["train"]
        dataset.keep = [i for i in dataset.keep if dataset.raw[i]["source"] == style]
        run.settings.optimizer.lr = 1e-2
        run.fit(60)
        run.model.save_pretrained(folder)  # type: ignore[operator]
        run.task.save(folder)
        words = [w for w in POOL if not w.startswith("model")]
        end = train("method=grape", "model=causal-lm", f"model.path={folder}", *words, "trainer.max_steps=2", "optimizer.lr=1e-3",
                    "trainer.clip=1", "trainer.batch=4", "data.max_length=128", folder=folder / "run")  # fmt: skip
        lines = [json.loads(line) for line in (folder / "run/selection.grape.jsonl").read_text().splitlines()]
        assert len(lines) == 60 and sum(line["kept"] for line in lines) == 20 and not torch.equal(*(p.flatten()[:50] for p in (
            end.model.get_parameter("lm_head.weight"), end.pristine().get_parameter("lm_head.weight"))))  # fmt: skip
        end.model = end.pristine()
        for line in lines[:6]:
            e = end.data["train"][line["position"]]
            ids, labels = torch.tensor(e["ids"])[None].long(), torch.tensor(e["labels"])[None].long()
            logp = -F.cross_entropy(end.model(input_ids=ids).logits[0, :-1].float(), labels[0, 1:], ignore_index=-100)
            assert line["score"] == pytest.approx(float(logp.detach()), abs=1e-4)
        return sum(line["source"] == style for line in lines if line["kept"])

    assert taught("statement") >= 18 and taught("bare") >= 18  # of 20


def test_scores_are_cached_by_what_they_depend_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    features = GRAPE.features
    monkeypatch.setattr(GRAPE, "features", lambda self, run, batch: passes.append(1) or features(self, run, batch))
    first = texts(picked(*POOL))
    assert passes and cache == cache_folder() and len(list((cache / "selectors").iterdir())) == 1
    passes.clear()
    assert texts(picked(*POOL)) == first and texts(picked(*POOL, "method.grape.select=min")) != first and not passes
    for words in (
        ("seed=1",),
        ("data.size=21",),
        ("data.max_length=40",),
        ("data.template=plain",),
    ):  # the model, the pool, what is seen of it
        passes.clear()
        picked(*POOL, *words)
        assert passes, words


def test_nothing_to_choose_from_is_one_line() -> None:
    with pytest.raises(UserError, match="no instruction of data=storyqa has more than 1; give rows that share a prompt"):
        picked(*SMALL, "data=storyqa")
    with pytest.raises(UserError, match="texts have no instruction"):
        picked(*SMALL, "data=stories", "data.size=30")


def test_a_resumed_run_keeps_its_selection(tmp_path: Path) -> None:
    from tools import check_resume

    run = check_resume("method=[lora,grape]", *POOL, "trainer.max_steps=10", folder=tmp_path, at=8)
    assert len(run.data["train"]) == 20
