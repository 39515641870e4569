"""Task arithmetic: sums, differences and scaling of what several tunings of one base changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tools import SMALL, build, check_resume, train
from torch import Tensor

from ftrecipes.errors import UserError
from ftrecipes.methods.weights.arithmetic import Shelf, average, moved, task_vector
from ftrecipes.methods.weights.task_arithmetic import TaskArithmetic
from ftrecipes.run import Run

MUTATION = (
    "ftrecipes/methods/weights/arithmetic.py",
    "return (start + factor * tau).to(start.dtype)",
    "return (start * factor + tau).to(start.dtype)",
)

SHORT = (*SMALL, "trainer.max_steps=8", "optimizer.lr=1e-2", "trainer.eval_examples=24")
KEEP = "method.task_arithmetic.keep_ingredients=true"


def test_arithmetic_of_tensors() -> None:
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    assert torch.equal(moved(a, task_vector(a, b)), b) and torch.equal(moved(a, task_vector(a, a), 0.3), a)
    assert torch.allclose(moved(a, task_vector(a, b), 0.3), 0.7 * a + 0.3 * b, atol=1e-6)
    assert torch.allclose(average([a, moved(a, -task_vector(a, b))]), moved(a, task_vector(a, b), -0.5), atol=1e-6)
    half = a.bfloat16()
    assert moved(half, task_vector(half, b.bfloat16()), 0.5).dtype == torch.bfloat16


def test_tasks_of_a_field_are_trained_apart_and_added_up(tmp_path: Path) -> None:
    run = train("method=task_arithmetic", *SHORT, KEEP, "method.task_arithmetic.k=3", folder=tmp_path)
    said, shelf = run.results["task_arithmetic"], Shelf(tmp_path / "ingredients")
    values = [set(i["values"]) for i in said["ingredients"]]
    kinds = {row["kind"] for row in run.data["train"].raw}
    assert len(values) == 3 and set().union(*values) == kinds and sum(map(len, values)) == len(kinds)
    best = max(said["curve"], key=lambda point: point["normalised"])
    assert len(said["curve"]) == 10 and said["scale"] == best["scale"] and len(best["exact_match"]) == 3
    for name in shelf.names():
        # the authors' sum of task vectors, applied with a scaling coefficient
        vectors = [shelf.get(i, name) - shelf.base(name) for i in range(3)]
        assert all(v.any() for v in vectors) and not torch.equal(vectors[0], vectors[1])
        wanted = shelf.base(name) + said["scale"] * (vectors[0] + vectors[1] + vectors[2])
        assert torch.allclose(run.model.get_parameter(name), wanted, atol=1e-6)
    assert run.events["ingredients"] == 3 and run.events["judged"] == 10


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Tensor]]]:
    place, ends = tmp_path_factory.mktemp("tasks"), []
    for i, words in enumerate((("method=lora",), ("method=full",))):
        run = train(*words, *SHORT, folder=place / str(i))
        ends.append({n: p.detach() for n, p in run.merge().named_parameters()})
    return place, [{n: p.detach() for n, p in run.pristine().named_parameters()}, *ends]


def test_a_task_taken_away_and_an_analogy(runs: tuple[Path, list[dict[str, Tensor]]]) -> None:
    place, (w0, a, b) = runs
    name = "model.layers.0.mlp.up_proj.weight"

    def result(folders: list[int], signs: list[int], scale: float) -> Run:
        words = (
            f"method.task_arithmetic.runs=[{','.join(str(place / str(i)) for i in folders)}]",
            f"method.task_arithmetic.scale=[{scale}]",
        )
        return train("method=task_arithmetic", *SHORT, *words, f"method.task_arithmetic.signs={signs}")

    assert torch.allclose(result([0], [-1], 0.5).model.get_parameter(name), w0[name] - 0.5 * (a[name] - w0[name]), atol=1e-6)
    wanted = w0[name] + (a[name] - w0[name]) - (b[name] - w0[name])
    assert torch.allclose(result([0, 1], [1, -1], 1.0).model.get_parameter(name), wanted, atol=1e-6)
    alone = result([1], [1], 1.0).model
    assert all(torch.equal(p, b[n]) for n, p in alone.named_parameters())  # one task at full strength is its model


def test_bad_input_is_one_line(runs: tuple[Path, list[dict[str, Tensor]]]) -> None:
    place, _ = runs
    given = f"method.task_arithmetic.runs=[{place / '0'},{place / '1'}]"
    for words, why in (
        ((given, "method.task_arithmetic.signs=[1]"), "2 models need 2 signs"),
        ((given, "method.task_arithmetic.signs=[1,-1]"), "give one method.task_arithmetic.scale"),
        (("method.task_arithmetic.by=colour",), "examples have kind, prompt, response"),
        (("method.task_arithmetic.k=20",), "has 8 values"),
    ):
        with pytest.raises(UserError, match=why):
            run = build("method=task_arithmetic", *SHORT, *words)
            run.stack.drive(run, run.fit)


def test_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    run = check_resume("method=[lora,task_arithmetic]", *SHORT, "trainer.max_steps=12", folder=tmp_path, at=8)
    assert isinstance(run.stack.methods[1], TaskArithmetic) and run.events["ingredients"] == 2
