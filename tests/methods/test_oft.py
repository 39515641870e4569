"""OFT: rotations of inputs that keep the angles between neurons, agreeing with `peft`."""

from __future__ import annotations

import pytest
import torch
from peers import Matrix, adapter, host, language_loss, plain_loop, scramble
from peft import OFTConfig, get_peft_model
from tools import SMALL, build, toy_data
from torch import nn

from ftrecipes.errors import UserError
from ftrecipes.run import Run

MUTATION = (
    "ftrecipes/methods/adapters/oft.py",
    "torch.eye(self.b, dtype=Q.dtype, device=Q.device) - Q, 2 * Q",
    "torch.eye(self.b, dtype=Q.dtype, device=Q.device) - Q, Q",
)
STEADY = ("schedule=constant", "schedule.warmup=0", "optimizer.lr=1e-3")


def small(*words: str) -> Run:
    return build("method=oft", *SMALL, "method.oft.block_size=8", *words)


def toy(*words: str) -> Run:
    return build(
        "method=oft", "model=toy", "model.dtype=float64", "data.unit=true", "trainer.batch=16", "method.oft.targets=[linear]",
        "method.oft.block_size=4", "trainer.clip=.inf", *words,
    )  # fmt: skip


def only(run: Run):
    (delta,) = adapter(run).deltas.values()
    return delta


def twin(run: Run, sign: float, **config):
    """peft's model with the run's numbers: with the inverse it turns the other way."""
    own = {"oft_block_size": 8, "r": 0, **config}
    model = get_peft_model(run.pristine(), OFTConfig(target_modules=list(adapter(run).deltas), **own))
    with torch.no_grad():
        for _, ours, theirs in pairs(run, model):
            theirs.copy_(sign * ours)
    return model


def pairs(run: Run, model):
    for name, delta in adapter(run).deltas.items():
        yield name, delta.Q, model.base_model.model.get_submodule(name).oft_R["default"].weight


def skew(delta) -> torch.Tensor:
    """Q as matrices, entry by entry."""
    b, out = delta.b, torch.zeros(len(delta.Q), delta.b, delta.b, dtype=delta.Q.dtype)
    at = 0
    for i in range(b):
        for j in range(i + 1, b):
            out[:, i, j], out[:, j, i] = delta.Q[:, at].detach(), -delta.Q[:, at].detach()
            at += 1
    return out


def test_the_start_is_the_base_model_and_the_count_is_b_minus_one_over_two_per_input():
    for share in (False, True):
        run = small(f"method.oft.block_share={str(share).lower()}")
        batch = run.window(0).micros[0]
        with torch.no_grad():
            assert torch.equal(run.model(batch["ids"]).logits, run.pristine()(batch["ids"]).logits)
        for name, delta in adapter(run).deltas.items():
            trains = sum(p.numel() for n, p in run.trainable().items() if n.startswith(f"{name}."))
            assert trains == (28 if share else delta.layer.shape[1] * 7 // 2)


@pytest.mark.parametrize("share", [False, True])
def test_the_weight_times_a_cayley_rotation(share):
    run = toy(f"method.oft.block_share={str(share).lower()}")
    scramble(run, size=0.8)
    delta, W = only(run), run.model.layer.weight.detach().clone()
    Q, eye = skew(delta), torch.eye(4, dtype=torch.float64)
    blocks = [(eye + q) @ torch.linalg.inv(eye - q) for q in Q] * (4 if share else 1)
    R = torch.block_diag(*blocks)
    torch.testing.assert_close(R @ R.T, torch.eye(16, dtype=torch.float64), atol=1e-12, rtol=0)
    x = torch.randn(5, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(run.model(x), x @ R @ W.T, atol=1e-12, rtol=0)
        delta.strength = 0.5
        torch.testing.assert_close(run.model(x), x @ (0.5 * W @ R.T + 0.5 * W).T, atol=1e-12, rtol=0)
        delta.strength = 1.0
    merged = run.merge().layer.weight
    torch.testing.assert_close(merged, W @ R.T, atol=1e-12, rtol=0)
    # what orthogonality is for: angles and lengths of neurons, and singular values, are those of the pretrained weight
    torch.testing.assert_close(merged @ merged.T, W @ W.T, atol=1e-12, rtol=0)
    assert (merged - W).norm() > 0.5 * W.norm()


def test_the_series_comes_near_the_inverse():
    errors = []
    for terms in (3, 5, 9):
        run = toy(f"method.oft.neumann_terms={terms}")
        scramble(run, size=0.1)
        Q, eye = skew(only(run)), torch.eye(4, dtype=torch.float64)
        powers = [torch.linalg.matrix_power(Q, k) for k in range(terms)]
        series = eye + 2 * sum(powers[1:-1]) + powers[-1]
        torch.testing.assert_close(only(run).turn().detach() + eye, series, atol=1e-12, rtol=0)
        errors.append(float((series - (eye + Q) @ torch.linalg.inv(eye - Q)).norm()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0


@pytest.mark.parametrize("terms", [None, 5])
@pytest.mark.parametrize("share", [False, True])
def test_peft_on_llama(terms, share):
    words = (f"method.oft.block_share={str(share).lower()}", *((f"method.oft.neumann_terms={terms}",) if terms else ()))
    run = small(*STEADY, *words, "optimizer.weight_decay=0.1")
    scramble(run, size=0.1)
    sign = 1.0 if terms else -1.0
    peer = twin(run, sign, block_share=share, use_cayley_neumann=bool(terms))
    (batch,) = run.window(0)
    with torch.no_grad():
        torch.testing.assert_close(run.model(batch["ids"]).logits, peer(batch["ids"]).logits, atol=2e-5, rtol=1e-5)
    run.gradients(run.window(0))
    language_loss(peer, batch).backward()
    for name, ours, theirs in pairs(run, peer):
        torch.testing.assert_close(ours.grad, sign * theirs.grad, atol=1e-6, rtol=1e-3, msg=name)
    trains = [p for p in peer.parameters() if p.requires_grad]
    assert sum(p.numel() for p in run.trainable().values()) == sum(p.numel() for p in trains)
    if not share:
        run.fit(10)
        plain_loop(run, peer, language_loss, 10, lr=1e-3, decay=0.1)
        for name, ours, theirs in pairs(run, peer):
            torch.testing.assert_close(ours, sign * theirs, atol=5e-5, rtol=0, msg=name)
            theirs.data.copy_(sign * ours)
    merged = run.merge().state_dict()
    for name, value in peer.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], value, atol=1e-5, rtol=1e-5, msg=name)


def test_coft_keeps_every_block_small_as_peft_does():
    run = small(*STEADY, "method.oft.coft=true", "method.oft.eps=0.01", "optimizer.lr=0.05")
    scramble(run, size=0.1)
    run.optimizer = run.build_optimizer()
    peer = twin(run, 1.0, coft=True, eps=0.01, use_cayley_neumann=False)
    adapter(run).updated(run)
    with torch.no_grad():
        peer(run.window(0).micros[0]["ids"])
    for name, ours, theirs in pairs(run, peer):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-5, msg=name)
    run.fit(3)
    for delta in adapter(run).deltas.values():
        norms = skew(delta).flatten(1).norm(dim=1)
        assert norms.max() <= 0.01 * len(delta.Q) ** -0.5 * (1 + 1e-5) and norms.max() > 1e-4
    assert run.events == {"projections": 14 * 4}


def test_a_small_rotation_is_not_lost_in_16_bits():
    run = small("model.dtype=bfloat16", "hardware.precision=bf16-mixed")
    delta = next(iter(adapter(run).deltas.values()))
    module, x = delta.layer.module, torch.randn(256, delta.layer.shape[1]).bfloat16()
    with torch.no_grad(), run.update.autocast():
        delta.Q.fill_(5e-4)
        assert torch.equal((delta.turn() + torch.eye(8)).bfloat16().float().diagonal(dim1=1, dim2=2), torch.ones(len(delta.Q), 8))
        turned = delta.enter(x.float()) - x.float()
        wanted = torch.einsum("tnk,nkc->tnc", x.float().unflatten(-1, (-1, 8)), delta.turn()).flatten(1).float()
    torch.testing.assert_close(turned, wanted, atol=5e-5, rtol=0.02)
    assert module(x).isfinite().all()


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.out = nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.conv(x.view(-1, 4, 4, 4))).flatten(1))


def test_a_convolution_s_flattened_kernel_is_turned_as_in_peft():
    rows = toy_data("turned", torch.randn(16, 64), torch.randn(16, 3))
    run = host(Picture().double(), "method=oft", f"data={rows}", "method.oft.targets=[conv,linear]", "method.oft.block_size=6")
    scramble(run, size=0.5)
    peer = twin(run, -1.0, oft_block_size=6, use_cayley_neumann=False)
    peer.double()
    with torch.no_grad():
        for _, ours, theirs in pairs(run, peer):
            theirs.copy_(-ours)
    x = torch.randn(5, 64, dtype=torch.float64)
    with run.evaluating():
        before = run.model(x)
    merged = run.merge()
    theirs = peer.merge_and_unload()
    torch.testing.assert_close(merged.conv.weight, theirs.conv.weight, atol=1e-6, rtol=0)
    with run.evaluating():
        torch.testing.assert_close(run.model(x), before, atol=1e-10, rtol=0)


def test_it_finds_a_rotation():
    rng = torch.Generator().manual_seed(0)
    W = torch.randn(12, 8, generator=rng, dtype=torch.float64)
    R = torch.linalg.matrix_exp(0.4 * (s := torch.randn(8, 8, generator=rng, dtype=torch.float64)) - 0.4 * s.T)
    rows = toy_data("rotation", torch.eye(8, dtype=torch.float64), (W @ R.T).T)
    run = host(
        Matrix(W), "method=oft", f"data={rows}", "method.oft.targets=[linear]", "method.oft.block_size=8", "trainer.batch=8",
        "trainer.clip=.inf", "optimizer.lr=0.05", "optimizer.weight_decay=0", "schedule.warmup=0", "schedule=cosine",
    )  # fmt: skip
    assert sum(p.numel() for p in run.trainable().values()) == 28
    run.fit(300)
    assert (run.merge().layer.weight - W @ R.T).norm() < 1e-3 * (W @ R.T - W).norm()


def test_a_block_that_does_not_divide_the_inputs_is_refused():
    with pytest.raises(UserError, match=r"oft.block_size=7: .*q_proj has 64 inputs, which it does not divide"):
        small("method.oft.block_size=7")
