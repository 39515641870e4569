"""EMA: the run ends with a decaying average of its path, and the path is that of plain training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tools import SMALL, build, check_resume, toy_data, train, weights
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ftrecipes.compose import compose
from ftrecipes.errors import RunFailed, UserError
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/weights/ema.py", "1 - self.rate())", "self.rate())")

TWO = ("model=toy", "model.kind=two_layer", "model.bias=true", "data.noise=0.3")


def path(run: Run, steps: int) -> list[dict[str, Tensor]]:
    """The weights after each of some updates."""
    run.fit_steps, run.optimizer = steps, run.build_optimizer()
    out = []
    for step in range(steps):
        run.update(run.window(step))
        out.append(weights(run))
    return out


def test_agreement_with_torch_bit_for_bit() -> None:
    run = build("method=ema", "method.ema.decay=0.8", "method.ema.warmup=false", *SMALL, "optimizer.lr=1e-3")
    peer = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=False)
    run.fit_steps, run.optimizer = 6, run.build_optimizer()
    for step in range(6):
        run.update(run.window(step))
        peer.update_parameters(run.model)
    last = weights(run)
    run.stack.finish(run)
    theirs = dict(peer.module.named_parameters())
    assert all(torch.equal(w, theirs[name]) for name, w in weights(run).items())
    assert any(not torch.equal(w, last[name]) for name, w in weights(run).items())
    assert run.events == {"averages": 5}


def test_agreement_with_diffusers_where_the_decay_grows() -> None:
    training_utils = pytest.importorskip("diffusers.training_utils")
    run = build("method=ema", "method.ema.decay=0.5", *TWO, "optimizer.lr=0.05")
    peer = training_utils.EMAModel(run.model.parameters(), decay=0.5)
    run.fit_steps, run.optimizer = 20, run.build_optimizer()
    used = []
    for step in range(20):
        run.update(run.window(step))
        peer.step(run.model.parameters())
        used.append(run.stack.methods[0].rate())
    run.stack.finish(run)
    assert all(torch.allclose(p, q, atol=1e-7) for p, q in zip(run.model.parameters(), peer.shadow_params, strict=True))
    assert used[1] == 2 / 11 and used[-1] == 0.5


def test_the_path_is_that_of_plain_training() -> None:
    run, full = build("method=ema", *TWO), build("method=full", *TWO)
    for mine, theirs in zip(path(run, 6), path(full, 6), strict=True):
        assert all(torch.equal(w, theirs[name]) for name, w in mine.items())


def test_which_updates_are_averaged() -> None:
    run = build("method=ema", "method.ema.decay=0.6", "method.ema.warmup=false", "method.ema.every=2", "method.ema.start=3", *TWO)
    steps = path(run, 8)
    run.stack.finish(run)
    for name, now in weights(run).items():
        average = steps[2][name]
        for seen in (4, 6):  # updates 5 and 7
            average = 0.6 * average + 0.4 * steps[seen][name]
        assert torch.allclose(now, average, atol=1e-7)


def test_no_memory_is_the_last_update() -> None:
    run = build("method=ema", "method.ema.decay=0", *TWO)
    last = path(run, 5)[-1]
    run.stack.finish(run)
    assert all(torch.equal(w, last[name]) for name, w in weights(run).items())


def test_less_noise_than_the_last_weights() -> None:
    """Noisy rows one at a time around a known optimum: the average is clearly nearer to it."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(512, 8, generator=rng, dtype=torch.float64)
    truth = torch.randn(8, 1, generator=rng, dtype=torch.float64)
    y = x @ truth + torch.randn(512, 1, generator=rng, dtype=torch.float64)
    data, best = toy_data("noisy-stream", x, y), torch.linalg.lstsq(x, y).solution
    shape = ("model=toy", "model.dtype=float64", "model.inputs=8", "model.outputs=1", f"data={data}", "trainer.batch=1")
    sgd = ("optimizer=sgd", "optimizer.lr=0.1", "schedule=constant", "schedule.warmup=0", "trainer.clip=.inf")
    off: dict[str, list[float]] = {"last": [], "average": []}
    for seed in range(3):
        run = build("method=ema", "method.ema.decay=0.99", *shape, *sgd, f"seed={seed}")
        path(run, 500)
        off["last"].append(float((run.model.layer.weight - best.T).detach().norm()))
        run.stack.finish(run)
        off["average"].append(float((run.model.layer.weight - best.T).detach().norm()))
    assert all(a < 0.7 * b for a, b in zip(off["average"], off["last"], strict=True))


def test_with_an_adapter_its_tensors_are_averaged(tmp_path: Path) -> None:
    run = train("method=[lora,ema]", *SMALL, "trainer.max_steps=6", folder=tmp_path)
    average = run.stack.methods[1].average
    assert set(average) == set(run.trainable()) and all("delta" in name for name in average)
    opened = Run.open(tmp_path)
    assert all(torch.equal(opened.model.get_parameter(name), tensor) for name, tensor in average.items())


def test_what_it_cannot_average_is_refused() -> None:
    with pytest.raises(UserError, match="ema and lift cannot stack: lift trains other entries"):
        compose(["method=[ema,lift]"])
    with pytest.raises(UserError, match=r"ema requires trainer.keep_best=False"):
        compose(["method=ema", "trainer.keep_best=true"])
    run = build("method=lift", "method.lift.update_interval=3", *SMALL)
    ema = build("method=ema", *SMALL).stack.methods[0]
    ema.updated(run)
    run.step = 1
    ema.updated(run)
    run.step = 2
    run.stack.updated(run)
    with pytest.raises(RunFailed, match="chose other entries"):
        ema.updated(run)


@pytest.mark.parametrize("stack", ["ema", "[ema,lora]"])
def test_resumed_run_is_bit_equal(stack: str, tmp_path: Path) -> None:
    run = check_resume(f"method={stack}", *SMALL, "trainer.max_steps=8", "optimizer.lr=1e-3", folder=tmp_path, at=5)
    assert run.events == {"averages": 7}
