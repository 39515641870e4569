"""TRAM: sharpness-aware steps whose radius is the distance between the model's predictions and a target's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tools import SMALL, build, check_resume, weights
from torch import Tensor, nn

from ftrecipes.compose import compose
from ftrecipes.errors import UserError
from ftrecipes.methods.optimizers import tram
from ftrecipes.methods.optimizers.tram import TRAM
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/optimizers/tram.py", "forward = F.kl_div(p, q,", "forward = F.kl_div(q, p,")

LLAMA = (*(w.replace("num_hidden_layers:2", "num_hidden_layers:1") for w in SMALL), "optimizer.lr=1e-3")
PLAIN = ("schedule=constant", "schedule.warmup=0", "trainer.clip=.inf", "optimizer.weight_decay=0.0")


def ready(*words: str, variant: str = "x", double: bool = False) -> Run:
    run = build(
        *(words if words[0].startswith("method") else ("method=tram", f"method.tram.variant={variant}", *words)), "schedule.warmup=0"
    )
    if double:
        run.model.double()
    run.fit_steps, run.optimizer = 10**6, run.build_optimizer()
    return run


def distance(run: Run) -> float:
    return float(run._row["tram/d"])


def log_probs(run: Run, model: nn.Module, noise: Any = None) -> Tensor:
    """Log-probabilities of all counted positions of window 0, by a forward pass of the test's own."""
    hook = model.get_input_embeddings().register_forward_hook(lambda m, i, o: o + noise(o)) if noise else None
    rows = []
    for batch in run.window(0):
        outputs = run.task.outputs(model, batch)
        rows.append(F.log_softmax(outputs.logits().double(), -1))
    if hook:
        hook.remove()
    return torch.cat(rows).detach()


def passes(run: Run) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Weights and gradients of every gradient pass from now on."""
    seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    gradients = run.update.gradients

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        at = weights(run)
        loss = gradients(*args, **kwargs)
        seen.append((at, {n: p.grad.clone() for n, p in run.trainable().items() if p.grad is not None}))
        return loss

    run.update.gradients = watched  # type: ignore[method-assign]
    return seen


# -- the distance ------------------------------------------------------------------------------------------------------


def test_distance_to_noised_inputs() -> None:
    """KL(q || p) in nats, the mean over label tokens, with noise on the embeddings of q alone; drawn again it is the same."""
    run = ready(*LLAMA, "hardware.micro_batch=8", double=True)
    method: Any = run.stack.methods[0]
    draws: list[Tensor] = []
    draw = method.draw
    method.draw = lambda run, like: draws.append(draw(run, like)) or draws[-1]
    p = log_probs(run, run.model)
    run.update(run.window(0))
    (z,) = draws
    assert z.shape[-1] == 64 and abs(float(z.std()) - 0.1) < 0.01 and abs(float(z.mean())) < 0.01
    run = ready(*LLAMA, "hardware.micro_batch=8", double=True)
    q = log_probs(run, run.model, noise=lambda o: z)
    wanted = float((q.exp() * (q - p)).sum(-1).mean())
    run.update(run.window(0))
    assert wanted > 1e-3
    assert distance(run) == pytest.approx(wanted, rel=1e-6)
    assert run._row["tram/d"].grad_fn is None
    assert run.update(run.window(1)) is None and distance(run) != pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("kl_type", ["reverse", "symmetric"])
def test_other_divergences(kl_type: str) -> None:
    run = ready(
        "method=tram", "method.tram.variant=theta_0", f"method.tram.kl_type={kl_type}", "method.tram.logit_scale=3", *LLAMA, double=True
    )
    start = copy.deepcopy(run.model)
    run.update(run.window(0))
    q, p = log_probs(run, start), log_probs(run, run.model)
    forward, reverse = (float((a.exp() * (a - b)).sum(-1).mean()) for a, b in ((q, p), (p, q)))
    run.step = 0  # the same window and draws again
    run.update(run.window(0))
    assert forward != pytest.approx(reverse, rel=1e-3)
    assert distance(run) == pytest.approx(3 * (reverse + (forward if kl_type == "symmetric" else 0)), rel=1e-5)


def test_sigma_law() -> None:
    """Small noise: the distance grows with its square."""
    d = {}
    for sigma in (2e-4, 4e-4):
        run = ready("method=tram", f"method.tram.sigma={sigma}", *LLAMA, double=True)
        run.update(run.window(0))
        d[sigma] = distance(run)
    assert 3.8 < d[4e-4] / d[2e-4] < 4.2


def test_laws_of_the_noise() -> None:
    like = torch.zeros(40, 500)
    run = ready("method=tram", "method.tram.noise=uniform", "method.tram.sigma=0.3", *LLAMA)
    method: Any = run.stack.methods[0]
    method.micro = 0
    z = method.draw(run, like)
    assert 0.299 < float(z.abs().max()) <= 0.3 and float(z.std()) == pytest.approx(0.3 / 3**0.5, rel=0.02)
    assert torch.equal(z, method.draw(run, like))
    method.micro = 1
    assert not torch.equal(z, method.draw(run, like))


@pytest.mark.parametrize("micro", [8, 2])
@pytest.mark.parametrize("variant", ["theta_prev", "theta_0", "ema"])
def test_distance_to_past_weights(variant: str, micro: int) -> None:
    """Against a model of its own that holds the target's weights; zero while nothing has moved."""
    run = ready(*LLAMA, f"hardware.micro_batch={micro}", variant=variant, double=True)
    target, decay = copy.deepcopy(run.model), {"theta_prev": 0.0, "theta_0": 1.0, "ema": 0.99}[variant]
    for step in range(3):
        before = copy.deepcopy(run.model)
        run.step = 0
        q, p = log_probs(run, target), log_probs(run, run.model)
        run.update(run.window(0))
        assert distance(run) == pytest.approx(float((q.exp() * (q - p)).sum(-1).mean()), rel=1e-5, abs=1e-12)
        assert (distance(run) > 1e-5) == (step > 0)
        with torch.no_grad():  # the target takes in the weights from before the update
            for kept, old in zip(target.parameters(), before.parameters(), strict=True):
                kept.mul_(decay).add_((1 - decay) * old)
        kept = run.stack.methods[0].copy
        assert all(torch.allclose(kept[n], t, atol=1e-12) for n, t in target.named_parameters())


def test_large_vocabularies_go_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for chunk in (tram.CHUNK, 7 * 1024):
        monkeypatch.setattr(tram, "CHUNK", chunk)
        run = ready(*LLAMA, variant="theta_0")
        run.update(run.window(0))
        run.update(run.window(1))
        found.append(distance(run))
    assert found[0] > 1e-5 and found[1] == pytest.approx(found[0], rel=1e-3)


def test_mixed_precision_sees_the_targets_weights() -> None:
    """Autocast keeps 16-bit twins of weights; the target's must not be the model's."""
    found = []
    for precision in ("32", "bf16-mixed"):
        run = ready(*LLAMA, f"hardware.precision={precision}", variant="theta_0")
        run.update(run.window(0))
        run.update(run.window(1))
        found.append(distance(run))
    assert found[0] > 1e-5 and found[1] == pytest.approx(found[0], rel=0.2)


def test_pixels_of_images_are_noised() -> None:
    shape = "model.architecture={num_hidden_layers:1,hidden_size:32,intermediate_size:32,num_attention_heads:2}"
    run = ready(
        "method=tram", "model=tiny-vit", "model.weights=random", shape, "data.size=16", "trainer.batch=8", "trainer.eval_examples=4"
    )
    window = run.window(0)
    clean = [batch["pixels"].clone() for batch in window]
    seen: list[Tensor] = []
    outputs = run.task.outputs
    run.task.outputs = lambda model, batch: seen.append(batch["pixels"]) or outputs(model, batch)
    run.update(window)
    assert len(seen) == 3 and torch.equal(seen[0], clean[0]) and torch.equal(seen[2], clean[0])
    assert float((seen[1] - clean[0]).std()) == pytest.approx(0.1, rel=0.05)
    assert distance(run) > 0


# -- the step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", [("method.tram.sigma=0",), ("method.tram.variant=theta_prev",)], ids=["sigma", "theta_prev"])
def test_no_distance_is_plain_training_bit_for_bit(knobs: tuple[str, ...]) -> None:
    run, full = build("method=tram", *knobs, *LLAMA, *PLAIN), build("method=full", *LLAMA, *PLAIN)
    steps = 1 if "theta_prev" in knobs[0] else 3
    run.fit(steps)
    full.fit(steps)
    assert all(torch.equal(w, weights(full)[name]) for name, w in weights(run).items())
    run.fit(2)
    full.fit(2)
    assert all(torch.equal(w, weights(full)[name]) for name, w in weights(run).items()) == (steps == 3)


@pytest.mark.parametrize("adaptive", ["true", "false"])
def test_a_pinned_distance_is_sam_bit_for_bit(adaptive: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TRAM, "radius", lambda self, run, window: setattr(self, "measuring", False) or 0.3)
    run = build("method=tram", f"method.tram.adaptive={adaptive}", *LLAMA, *PLAIN)
    sam = build("method=sam", "method.sam.rho=0.3", f"method.sam.adaptive={adaptive}", *LLAMA, *PLAIN)
    run.fit(3)
    sam.fit(3)
    assert all(torch.equal(w, weights(sam)[name]) for name, w in weights(run).items())


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_distance_is_the_radius(adaptive: bool) -> None:
    run = ready("method=tram", f"method.tram.adaptive={str(adaptive).lower()}", *LLAMA, double=True)
    seen = passes(run)
    run.update(run.window(0))
    (here, g), (there, _) = seen
    eps = {n: there[n] - here[n] for n in here}
    size = torch.cat([(e / here[n] if adaptive else e)[here[n] != 0].flatten() for n, e in eps.items()]).norm()
    assert float(size) == pytest.approx(distance(run), rel=1e-5)
    assert distance(run) > 1e-3
    assert sum(float((e * g[n]).sum()) for n, e in eps.items()) > 0


def test_uphill(monkeypatch: pytest.MonkeyPatch) -> None:
    """(L(theta + eps) - L(theta)) / (d ||g||) is 1 to first order; along the released direction it is not."""
    monkeypatch.setattr(TRAM, "radius", lambda self, run, window: setattr(self, "measuring", False) or 1e-4)
    slopes = {}
    for direction in ("gradient", "released"):
        run = ready("method=tram", "method.tram.adaptive=false", f"method.tram.direction={direction}", *LLAMA, double=True)
        seen = passes(run)
        run.update(run.window(0))
        size = torch.cat([g.flatten() for g in seen[0][1].values()]).norm()
        slopes[direction] = float(run._row["tram/rise"]) / (1e-4 * float(size))
    assert slopes["gradient"] == pytest.approx(1.0, abs=0.01)
    assert abs(slopes["released"] - 1) > 0.5


def test_counts_of_one_update() -> None:
    run = ready(*LLAMA, "hardware.micro_batch=8")
    forwards: list[int] = []
    run.model.model.register_forward_hook(lambda *_: forwards.append(1))
    seen, steps = passes(run), []
    at = weights(run)
    run.optimizer.register_step_pre_hook(lambda *_: steps.append(weights(run)))
    run.update(run.window(0))
    assert (len(forwards), len(seen), len(steps)) == (3, 2, 1)
    assert all(torch.equal(steps[0][n], at[n]) for n in at)
    assert not torch.equal(seen[1][0]["model.norm.weight"], at["model.norm.weight"])


@pytest.mark.parametrize("stack", ["tram", "[lora,tram]", "[lift,tram]", "[dft,tram]"])
def test_measuring_changes_nothing_of_the_gradient(stack: str) -> None:
    run = ready(f"method={stack}", "method.tram.variant=theta_prev", *LLAMA)
    run.update(run.window(0))
    run.update(run.window(1))
    run.gradients(run.window(2))
    plain = {n: p.grad.clone() for n, p in run.trainable().items()}
    seen = passes(run)
    run.update(run.window(2))
    assert distance(run) > 0
    assert all(torch.equal(g, plain[n]) for n, g in seen[0][1].items())


# -- the run -----------------------------------------------------------------------------------------------------------


def test_only_models_with_predictions() -> None:
    with pytest.raises(UserError, match="tram is for causal-lm"):
        compose(["method=tram", "model=toy"])


@pytest.mark.parametrize("words", [("method=tram",), ("method=[lora,tram]", "method.tram.variant=theta_prev")], ids=["x", "theta_prev"])
def test_resumed_run_is_bit_equal(words: tuple[str, ...], tmp_path: Path) -> None:
    run = check_resume(*words, *LLAMA, "trainer.max_steps=8", folder=tmp_path, at=5)
    assert run.events["ascents"] == 8
