"""Spectral DeTuning: the base of several merged LoRA tunings, from the merged weights alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tools import SMALL, build, check_resume, train
from torch import Tensor

from ftrecipes.errors import RunFailed, UserError
from ftrecipes.methods.weights.spectral_detuning import RankSchedule, SpectralDeTuning, recover
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/weights/spectral_detuning.py", "star = (core - M).mean(0)", "star = star + 0.5 * (core - star - M).mean(0)")


def tunings(n: int, rank: int, seed: int = 0, shape: tuple[int, int] = (64, 48)) -> tuple[Tensor, list[Tensor]]:
    """A base and n tunings of a rank, float64."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=rng, dtype=torch.float64)  # noqa: E731
    base = draw(*shape)
    return base, [base + 0.1 * draw(shape[0], rank) @ draw(rank, shape[1]) for _ in range(n)]


def error(found: Tensor, base: Tensor) -> float:
    return float((found - base).norm() / base.norm())


# -- the algorithm -----------------------------------------------------------------------------------------------------


def test_exact_recovery_where_the_mean_is_far_off() -> None:
    base, tuned = tunings(5, 4)
    found, losses = recover(tuned, rank=4, rounds=300)
    assert error(found, base) < 1e-12 and len(losses) == 300
    assert float((torch.stack(tuned).mean(0) - base).norm()) > 0.3 * float((tuned[0] - base).norm())


def test_two_models_do_not_determine_the_base_and_a_rank_too_large_hides_that() -> None:
    base, tuned = tunings(2, 4)
    found, _ = recover(tuned, rank=4, rounds=300)
    assert error(found, base) > 0.1 * error(torch.stack(tuned).mean(0), base)
    base, tuned = tunings(5, 4)
    right, wrong = (recover(tuned, rank=rank, rounds=300) for rank in (4, 5))
    assert wrong[1][-1] < 1e-20 and error(wrong[0], base) > 1e6 * error(right[0], base)


def authors(tuned: list[Tensor], end: int, rounds: int) -> tuple[Tensor, list[float]]:
    """The released loop on whole matrices, with exact decompositions in place of randomised ones."""
    star, rank = torch.stack(tuned).mean(0), 1
    best, bad, losses = math.inf, 0, []
    for t in range(1, rounds + 1):
        M = []
        for w in tuned:
            U, s, Vh = torch.linalg.svd(w - star, full_matrices=False)
            M.append(U[:, :rank] @ torch.diag(s[:rank]) @ Vh[:rank])
        star = torch.stack([w - m for w, m in zip(tuned, M, strict=True)]).mean(0)
        losses.append(float(torch.stack([((w - (star + m)) ** 2).mean() for w, m in zip(tuned, M, strict=True)]).mean()))
        if t < rounds - rounds * 0.5:
            best, bad = (losses[-1], 0) if losses[-1] < best else (best, bad + 1)
            if bad > 15:
                rank, bad = min(rank * 2, end), 0
        else:
            rank = end
    return star, losses


def test_rounds_are_those_of_the_released_code_on_whole_matrices() -> None:
    base, tuned = tunings(4, 3, shape=(40, 30))
    for rounds in (1, 7, 60):
        found, losses = recover(tuned, rank=3, rounds=rounds)
        wanted, theirs = authors(tuned, 3, rounds)
        assert torch.allclose(found, wanted, atol=1e-10) and torch.allclose(
            torch.tensor(losses), torch.tensor(theirs), rtol=1e-6, atol=1e-22
        )
    assert error(found, base) > 1e-10  # it was still on its way


def test_loss_never_rises_while_the_rank_stays() -> None:
    _, tuned = tunings(5, 4, seed=1)
    losses = recover(tuned, rank=2, rounds=80, start=2)[1]
    assert all(b <= a * (1 + 1e-9) for a, b in zip(losses, losses[1:], strict=False)) and losses[-1] < losses[0]


def test_mean_without_rounds_and_identical_inputs() -> None:
    base, tuned = tunings(3, 2)
    assert torch.equal(recover(tuned, rank=2, rounds=0)[0], torch.stack(tuned).mean(0))
    assert torch.allclose(recover([base] * 4, rank=2, rounds=20)[0], base, atol=1e-14)


def test_equivariance_and_a_common_direction_stays() -> None:
    base, tuned = tunings(5, 3)
    rng = torch.Generator().manual_seed(5)
    C, Q = (
        torch.randn(64, 48, generator=rng, dtype=torch.float64),
        torch.linalg.qr(torch.randn(64, 64, generator=rng, dtype=torch.float64)).Q,
    )
    found = recover(tuned, rank=3, rounds=200)[0]
    assert torch.allclose(recover([w + C for w in tuned], rank=3, rounds=200)[0], found + C, atol=1e-9)
    assert torch.allclose(recover([Q @ w for w in tuned], rank=3, rounds=200)[0], Q @ found, atol=1e-9)
    common = torch.outer(torch.arange(64.0, dtype=torch.float64), torch.ones(48, dtype=torch.float64)) / 64
    assert error(recover([w + common for w in tuned], rank=3, rounds=300)[0], base + common) < 1e-10


def test_rank_schedule() -> None:
    schedule, ranks = RankSchedule(rounds=200, end=16), []
    for _ in range(120):
        schedule.step(1.0)
        ranks.append(schedule.rank)
    # the first loss is an improvement; then a doubling after every 16 rounds without one, and the last rank from the middle on
    assert [ranks.index(r) + 1 for r in (2, 4, 8, 16)] == [17, 33, 49, 65] and schedule.rank == 16
    falling = RankSchedule(rounds=100, end=16)
    for t in range(49):
        falling.step(1.0 / (t + 1))
    assert falling.rank == 1
    falling.step(0.001)
    assert falling.rank == 16


def test_rounded_weights_are_recovered_to_their_rounding() -> None:
    base, tuned = tunings(6, 2)
    found = recover([w.float() for w in tuned], rank=2, rounds=300)[0]
    assert error(found, base) < 1e-6
    assert error(torch.stack(tuned).mean(0), base) > 1e-2


# -- the run -----------------------------------------------------------------------------------------------------------

RUN = (*SMALL, "method.spectral_detuning.rank=2", "method.spectral_detuning.targets=[q,up]", "optimizer.lr=1e-2", "trainer.max_steps=30")


def test_the_run_recovers_the_base_of_the_tunings_that_it_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pristine = Run.pristine
    read: list[int] = []
    monkeypatch.setattr(Run, "pristine", lambda self: read.append(self.events.get("recovered weights", 0)) or pristine(self))
    run = train("method=spectral_detuning", *RUN, folder=tmp_path)
    base, said = dict(pristine(run).named_parameters()), run.results["spectral_detuning"]
    assert read == [4]  # the base was not looked at before all four weights were recovered
    moved = [n for n, p in run.model.named_parameters() if not torch.equal(p, base[n])]
    assert len(said["weights"]) == 4 and set(moved) <= set(said["weights"])
    for name in said["weights"]:
        assert (run.model.get_parameter(name) - base[name]).abs().max() < 1e-5
        assert said["weights"][name]["rank between two"] == 4  # two tunings of rank 2
    assert said["error"]["recovered"] < -13 < -8 < said["error"]["mean of the tunings"] < 0
    assert said["semantic"]["recovered"]["largest"] < 1e-4 < 1e-2 < said["semantic"]["mean of the tunings"]["largest"]
    assert len(said["ingredients"]) == 5 and len({i["seed"] for i in said["ingredients"]}) == 5
    ids = run.window(0).micros[0]["ids"]
    opened = Run.open(tmp_path)
    with torch.no_grad():
        logits = pristine(run).eval()(ids).logits
        assert torch.allclose(opened.model(ids).logits, logits, atol=1e-4)
        assert torch.equal(opened.merge()(ids).logits, run.model.eval()(ids).logits)
    assert not any("delta" in n for n, _ in opened.model.named_parameters())


def test_whole_models_whose_base_nobody_has(tmp_path: Path) -> None:
    small = (*SMALL, "trainer.max_steps=6", "optimizer.lr=1e-2", "method.lora.rank=2", "method.lora.targets=[v]")
    folders, base = [], None
    for i in range(5):
        run = build("method=lora", *small)
        run.seed = 100 + i
        run.restart()
        run.fit(6)
        base = base or {n: p.detach().clone() for n, p in run.pristine().named_parameters()}
        run.merge().save_pretrained(tmp_path / str(i))  # type: ignore[operator]
        folders.append(str(tmp_path / str(i)))
    words = ("method=spectral_detuning", *SMALL, "seed=9", f"method.spectral_detuning.runs=[{','.join(folders)}]")
    run = train(*words, "method.spectral_detuning.rank=2")
    assert base and run.step == 0 and "error" not in run.results["spectral_detuning"]
    for name, p in run.model.named_parameters():
        assert torch.allclose(p, base[name], atol=1e-5), name
    with pytest.raises(RunFailed, match="differs by a matrix of rank 4, more than 2 x rank 1"):
        train(*words, "method.spectral_detuning.rank=1")
    stranger = tmp_path / "stranger"
    build("method=full", *SMALL, "seed=4").model.save_pretrained(stranger)  # type: ignore[operator]
    with pytest.raises(RunFailed, match=r"do not share a base|not LoRA tunings of one base"):
        train(
            "method=spectral_detuning",
            *SMALL,
            f"method.spectral_detuning.runs=[{folders[0]},{stranger}]",
            "method.spectral_detuning.rank=2",
        )
    with pytest.raises(UserError, match="neither a finished run"):
        (tmp_path / "empty").mkdir()
        build("method=spectral_detuning", *SMALL, f"method.spectral_detuning.runs=[{folders[0]},{tmp_path / 'empty'}]")


def test_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    words = (
        "method=spectral_detuning",
        *RUN,
        "trainer.max_steps=12",
        "method.spectral_detuning.n_loras=3",
        "method.spectral_detuning.n_iters=20",
    )
    run = check_resume(*words, folder=tmp_path, at=7)
    assert isinstance(run.stack.methods[0], SpectralDeTuning) and run.events["ingredients"] == 3
