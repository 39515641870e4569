"""LoRA-GA: the start lies along the gradient, the first step is that of full fine-tuning as far as the rank allows."""

from __future__ import annotations

import pytest
import torch
from peers import adapter, language_loss, pairs, twin
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from tools import SMALL, build, check_resume, train

from ftrecipes import export
from ftrecipes.errors import UserError
from ftrecipes.methods.adapters import lora_ga
from ftrecipes.methods.adapters.calibrate import mean_gradients
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/adapters/lora_ga.py", '"ArB2r": lambda i: (i[:r], i[r:])', '"ArB2r": lambda i: (i[:r], i[:r])')
DIRECTIONS = ["ArB2r", "A2rBr", "ArBr", "random"]
KNOBS = ("method.lora_ga.rank=4", "method.lora_ga.alpha=6", "method.lora_ga.iters=3", "method.lora_ga.bsz=4")


def small(*words: str) -> Run:
    return build("method=lora_ga", *SMALL, *KNOBS, *words)


def toy(*words: str) -> Run:
    """A 16 x 24 weight in float64 on unit vectors; its gradient over all rows is (W - target) / 24, at every batch of 24."""
    shape = ("model.inputs=24", "model.outputs=16", "data.inputs=24", "data.outputs=16", "trainer.batch=24")
    return build(
        "method=lora_ga", "model=toy", "model.dtype=float64", "data.unit=true", *shape, "method.lora_ga.targets=[linear]",
        "method.lora_ga.rank=3", "method.lora_ga.alpha=5", "method.lora_ga.iters=1", "method.lora_ga.bsz=24", "trainer.clip=.inf",
        "schedule=constant", "schedule.warmup=0", "optimizer=sgd", "optimizer.weight_decay=0", *words,
    )  # fmt: skip


def only(run: Run):
    (delta,) = adapter(run).deltas.values()
    return delta


def gradient(run: Run) -> torch.Tensor:
    target = torch.stack([run.data["train"][i]["y"] for i in range(24)]).T
    return (run.model.layer.weight.detach() - target) / 24


def close(ours: torch.Tensor, theirs: torch.Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Equal to rounding: the largest difference against the largest number."""
    off = float((ours - theirs.reshape(ours.shape)).detach().abs().max() / theirs.detach().abs().max().clamp_min(1e-8))
    assert off < tolerance, f"{what}: off by {off:.1e} of the largest number"


# -- the start ---------------------------------------------------------------------------------------------------------


def test_the_start_is_the_base_model_though_both_factors_are_filled():
    run = small()
    batch = run.window(0).micros[0]
    with torch.no_grad():
        assert torch.equal(run.model(batch["ids"]).logits, run.pristine()(batch["ids"]).logits)
    for delta in adapter(run).deltas.values():
        assert delta.scale == 6 / 2 and delta.B.abs().max() > 1e-2 and delta.A.abs().max() > 1e-2
        assert delta.A.numel() + delta.B.numel() == 4 * sum(delta.layer.shape) == sum(p.numel() for p in delta.parameters())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_first_step_is_that_of_the_gradient_s_best_approximation_of_rank_2r(direction):
    """s B A - s B0 A0 = -eta s^2 sqrt(m) / gamma [G]_2r after one step of gradient descent."""
    run = toy(f"method.lora_ga.direction={direction}", "method.lora_ga.gamma=9", "optimizer.lr=1e-6")
    G, W = gradient(run), run.model.layer.weight.detach().clone()
    run.fit(1)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    best = U[:, :6] * S[:6] @ Vh[:6]
    s = 5 / 3**0.5
    change = run.merge().layer.weight - W
    torch.testing.assert_close(change, -1e-6 * s**2 * 16**0.5 / 9 * best, rtol=1e-3, atol=1e-12)
    assert torch.linalg.matrix_rank(best) == 6 and S[6] > 0.1 * S[0]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rows_of_a_and_columns_of_b_are_orthogonal_and_of_other_indices(direction):
    run = toy(f"method.lora_ga.direction={direction}", "method.lora_ga.gamma=9")
    A, B = only(run).A0, only(run).B0
    c2 = 16**0.5 / 9  # m = 16 outputs, for both factors
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(A @ A.T, c2 * eye, atol=1e-12, rtol=0)
    torch.testing.assert_close(B.T @ B, c2 * eye, atol=1e-12, rtol=0)
    assert (B.T @ gradient(run) @ A.T).abs().max() < 1e-12
    U, _, Vh = torch.linalg.svd(gradient(run), full_matrices=False)
    places = [(x.abs() > 1e-6).any(0).nonzero().flatten().tolist() for x in (A @ Vh[:6].T, B.T @ U[:, :6])]
    wanted = {"ArB2r": [[0, 1, 2], [3, 4, 5]], "A2rBr": [[3, 4, 5], [0, 1, 2]], "ArBr": [[1, 3, 5], [0, 2, 4]]}
    assert sorted(places[0] + places[1]) == list(range(6))
    assert direction == "random" or places == wanted[direction]


def test_scales():
    W = toy().model.layer.weight.detach()
    s = 5 / 3**0.5
    wanted = {"unit": 1.0, "gd": 1 / s, "weightS": float((torch.linalg.svdvals(W)[:3] / s).sqrt().mean()), "stable": 2 / 16**0.5}
    for scale, c in wanted.items():
        delta = only(toy(f"method.lora_ga.scale={scale}"))
        for factor in (delta.A0, delta.B0):
            torch.testing.assert_close(torch.linalg.svdvals(factor), torch.full((3,), c, dtype=torch.float64))
    assert only(toy("method.lora_ga.rslora=false")).scale == 5 / 3


def test_a_start_larger_than_the_weight_is_clipped_when_asked():
    knobs = ("method.lora_ga.gamma=0.01", "method.lora_ga.norm_clip=true")
    free, clipped = only(toy(knobs[0])), only(toy(*knobs))
    largest = clipped.layer.weight.abs().max()
    assert (free.scale * free.B0 @ free.A0).abs().max() > 10 * largest
    torch.testing.assert_close((clipped.scale * clipped.B0 @ clipped.A0).abs().max(), largest)
    torch.testing.assert_close(clipped.B0.norm() / free.B0.norm(), clipped.A0.norm() / free.A0.norm())


# -- the gradient pass -------------------------------------------------------------------------------------------------


def test_the_gradient_pass_is_autograd_s_and_leaves_nothing_behind():
    """The mean over batches of the gradient of each batch's mean loss; at most one weight's gradient exists at a time."""
    run = build("method=full", *SMALL, "hardware.micro_batch=1")
    parts = run.anatomy.select(["all-linear"])
    alive = []
    for part in parts:
        part.weight.register_post_accumulate_grad_hook(lambda _: alive.append(sum(p.grad is not None for p in run.model.parameters())))
    run.model.requires_grad_(False).eval()
    found = mean_gradients(run, run.stack.methods[0], parts, iters=3, bsz=4)
    assert len(found) == len(parts) == 14 and alive == [1] * 42
    assert all(p.grad is None and not p.requires_grad for p in run.model.parameters()) and not run.model.training
    model = run.pristine()
    batches = list(run.calibration(12, batch=4))
    assert len({batch["units"] for batch in batches}) > 1  # a mean over tokens would be another
    sum(language_loss(model, batch) for batch in batches).div(3).backward()
    for part in parts:
        close(found[part.name], model.get_parameter(f"{part.name}.weight").grad, part.name)


def test_the_gradient_pass_recomputes_activations_where_training_does(monkeypatch):
    seen = []

    def look(run, *args, **kwargs):
        seen.append(run.model.is_gradient_checkpointing)
        return mean_gradients(run, *args, **kwargs)

    monkeypatch.setattr(lora_ga, "mean_gradients", look)
    plain, spared = small(), small("hardware.checkpointing=true")
    assert seen == [False, True]
    for name, delta in adapter(plain).deltas.items():
        torch.testing.assert_close(adapter(spared).deltas[name].B @ adapter(spared).deltas[name].A, delta.B @ delta.A, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["method.lora_ga.rank=17"], r"lora_ga.rank=17: model.layers.0.self_attn.k_proj is 32 x 64, .* the rank is at most 16"),
        (["method.lora_ga.iters=100"], r"400 calibration examples were asked for and the training set holds 64"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words, text):
    narrow = SMALL[2].replace("num_key_value_heads:2", "num_key_value_heads:1,head_dim:32")
    with pytest.raises(UserError, match=text) as caught:
        build("method=lora_ga", *SMALL[:2], narrow, *SMALL[3:], *KNOBS, *words)
    assert "\n" not in str(caught.value)


def test_a_weight_that_the_loss_does_not_reach_is_refused():
    run = build("method=full", *SMALL)
    lonely = run.anatomy.select(["q"])[0]
    lonely.module.forward = lambda x: torch.zeros(*x.shape[:-1], lonely.weight.shape[0])
    with pytest.raises(
        UserError, match=r"full: the loss of the calibration batches does not depend on model\.layers\.0\.self_attn\.q_proj"
    ):
        mean_gradients(run, run.stack.methods[0], [lonely], iters=1, bsz=4)


# -- the record --------------------------------------------------------------------------------------------------------


def test_a_resumed_run_does_not_look_at_the_gradients_again(tmp_path):
    run = check_resume("method=lora_ga", *SMALL, *KNOBS, "trainer.max_steps=5", "optimizer.lr=1e-3", folder=tmp_path, at=4)
    assert run.events["calibration_batches"] == 3 and run.events["gradient_starts"] == 14
    base = dict(run.pristine().named_parameters())
    assert all(torch.equal(p, base[n]) for n, p in run.model.named_parameters() if n in base)


def test_it_leaves_as_a_plain_lora_of_twice_the_rank_on_the_untouched_base(tmp_path):
    run = train("method=lora_ga", *SMALL, *KNOBS, "trainer.max_steps=3", "optimizer.lr=1e-3", folder=tmp_path / "run")
    theirs = PeftModel.from_pretrained(run.pristine(), str(export.export(str(tmp_path / "run"), "peft"))).eval()
    assert theirs.peft_config["default"].r == 8
    batch = run.window(0).micros[0]
    with torch.no_grad():
        close(run.model.eval()(batch["ids"]).logits, theirs(batch["ids"]).logits, "logits")
        assert not torch.allclose(theirs(batch["ids"]).logits, run.pristine()(batch["ids"]).logits, atol=1e-3)


# -- agreement with peft -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS[:3])
def test_peft_takes_the_same_singular_vectors_from_the_same_batches(direction):
    """At this rank its randomized SVD is exact. Its columns of B are longer, by the singular values."""
    run = small("method.lora_ga.rank=16", f"method.lora_ga.direction={direction}", "method.lora_ga.scale=unit")
    base = run.pristine()
    config = LoraConfig(
        target_modules=list(adapter(run).deltas), r=16, lora_alpha=6, lora_dropout=0.0, use_rslora=True, init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction=direction, scale="unit"),
    )  # fmt: skip
    batches = list(run.calibration(12, batch=4))
    preprocess_loraga(base, config, lambda: [language_loss(base, batch).backward() for batch in batches])
    peer = get_peft_model(base, config)
    for name, delta in adapter(run).deltas.items():
        layer = peer.base_model.model.get_submodule(name)
        A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        sizes = B.norm(dim=0)
        known = sizes > 1e-3 * sizes.max()  # vectors of near-zero singular values are anybody's
        assert known.sum() >= 8
        assert (torch.cosine_similarity(A, delta.A0)[known].abs() > 0.999).all(), name
        assert (torch.cosine_similarity(B.T, delta.B0.T)[known].abs() > 0.999).all(), name
    ids = run.window(0).micros[0]["ids"]
    with torch.no_grad():
        close(run.model(ids).logits, peer(ids).logits, "logits at the start", 1e-4)


def test_peft_on_equal_weights_and_inputs():
    """Its LoRA on a base from which the start was taken off: outputs, gradients and merged weights."""
    run = small("optimizer.lr=1e-3", "schedule.warmup=0")
    run.fit(3)
    peer = twin(run, r=4, lora_alpha=6, use_rslora=True)
    with torch.no_grad():
        for name, delta in adapter(run).deltas.items():
            peer.base_model.model.get_submodule(name).base_layer.weight -= delta.scale * delta.B0 @ delta.A0
    (batch,) = run.window(0)
    with torch.no_grad():
        close(run.model(batch["ids"]).logits, peer(batch["ids"]).logits, "logits")
    run.gradients(run.window(0))
    language_loss(peer, batch).backward()
    for name, ours, theirs in pairs(run, peer):
        close(ours.grad, theirs.grad, f"gradient of {name}", 2e-5)
    merged = run.merge().state_dict()
    for name, value in peer.merge_and_unload().state_dict().items():
        close(merged[name], value, f"merged {name}")
