"""DoRA: lengths and directions, the norm held constant in the backward pass, and agreement with `peft`."""

from __future__ import annotations

import pytest
import torch
from peers import adapter, host, language_loss, pairs, plain_loop, scramble, squared_loss, twin
from tools import SMALL, build, toy_data, train, weights
from torch import nn

from ftrecipes.errors import UserError
from ftrecipes.run import Run

MUTATION = (
    "ftrecipes/methods/adapters/dora.py",
    "torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm)",
    "torch.set_grad_enabled(torch.is_grad_enabled() and self.detach_norm)",
)
STEADY = ("schedule=constant", "schedule.warmup=0", "optimizer.lr=1e-3")


def small(*words: str) -> Run:
    return build("method=dora", *SMALL, "method.dora.rank=4", "method.dora.alpha=6", *words)


def toy(*words: str) -> Run:
    """One 16 x 16 weight in float64 whose loss is the squared distance to a target, over 16."""
    return build(
        "method=dora", "model=toy", "model.dtype=float64", "data.unit=true", "trainer.batch=16", "method.dora.targets=[linear]",
        "method.dora.rank=4", "method.dora.alpha=12", "trainer.clip=.inf", *words,
    )  # fmt: skip


def only(run: Run):
    (delta,) = adapter(run).deltas.values()
    return delta


def gradient_of_the_weight(run: Run) -> torch.Tensor:
    """G = dL/dW' of the toy: (W' - target) / 16."""
    target = torch.stack([run.data["train"][i]["y"] for i in range(16)]).T
    with torch.no_grad():
        return (only(run).final(run.model.layer.weight) - target) / 16


def close(ours: torch.Tensor, theirs: torch.Tensor, what: str, tolerance: float = 2e-6) -> None:
    """Equal to float32 rounding: the largest difference against the largest number."""
    off = float((ours - theirs.reshape(ours.shape)).abs().max() / theirs.abs().max().clamp_min(1e-8))
    assert off < tolerance, f"{what}: off by {off:.1e} of the largest number"


# -- the definition ----------------------------------------------------------------------------------------------------


def test_the_start_is_the_base_model_and_the_count_is_r_in_plus_out_plus_out():
    run = small()
    batch = run.window(0).micros[0]
    with torch.no_grad():
        torch.testing.assert_close(run.model(batch["ids"]).logits, run.pristine()(batch["ids"]).logits, atol=1e-5, rtol=0)
    for name, delta in adapter(run).deltas.items():
        rows, cols = delta.layer.shape
        assert sum(p.numel() for n, p in run.trainable().items() if n.startswith(f"{name}.")) == 4 * (rows + cols) + rows
        torch.testing.assert_close(delta.m, delta.layer.weight.norm(dim=1))
        assert not delta.B.any() and delta.A.any()


def test_lengths_of_the_merged_rows_are_m_whatever_the_direction():
    norms = []
    for factor in (1, 10):
        run = toy()
        scramble(run)
        m = only(run).m.detach().clone()
        with torch.no_grad():
            only(run).B.mul_(factor)
        norms.append(run.merge().layer.weight.norm(dim=1))
        torch.testing.assert_close(norms[-1], m.abs(), atol=1e-12, rtol=0)
    torch.testing.assert_close(norms[0], norms[1], atol=1e-12, rtol=0)


def test_gradients_with_the_norm_held_constant():
    """dB = s diag(q) G A^T, dA = s B^T diag(q) G, dm_i = <G_i, V_i> / c_i."""
    run = toy()
    scramble(run)
    delta = only(run)
    A, B, m = (p.detach() for p in (delta.A, delta.B, delta.m))
    V = run.model.layer.weight.detach() + 3 * B @ A
    c, G = V.norm(dim=1), gradient_of_the_weight(run)
    run.gradients(run.window(0))
    dV = (m / c)[:, None] * G
    torch.testing.assert_close(delta.B.grad, 3 * dV @ A.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(delta.A.grad, 3 * B.T @ dV, atol=1e-12, rtol=0)
    torch.testing.assert_close(delta.m.grad, (G * V).sum(1) / c, atol=1e-12, rtol=0)


def test_a_live_norm_takes_out_the_component_along_each_row():
    """With A the identity, dB is s dV, whose rows are orthogonal to those of V."""
    run = toy("method.dora.detach_norm=false", "method.dora.rank=16", "method.dora.alpha=16")
    scramble(run)
    delta = only(run)
    with torch.no_grad():
        delta.A.copy_(torch.eye(16))
    V = run.model.layer.weight.detach() + delta.B.detach()
    c, G = V.norm(dim=1, keepdim=True), gradient_of_the_weight(run)
    run.gradients(run.window(0))
    q = delta.m.detach()[:, None] / c
    torch.testing.assert_close(delta.B.grad, q * (G - (G * V).sum(1, keepdim=True) * V / c**2), atol=1e-12, rtol=0)
    assert ((delta.B.grad * V).sum(1).abs() < 1e-12).all()
    assert delta.B.grad.abs().max() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_norm_from_thin_products_is_the_direct_norm(dtype):
    """In float32 under mixed precision and over a 16-bit base too."""
    run = small(f"model.dtype={dtype}", "hardware.precision=bf16-mixed")
    for name, delta in adapter(run).deltas.items():
        close(delta.m.detach(), delta.layer.raw.float().norm(dim=1), f"m of {name}", 1e-6)
    scramble(run)
    with run.update.autocast():
        for name, delta in adapter(run).deltas.items():
            assert delta.layer.raw.dtype == getattr(torch, dtype)
            with torch.autocast("cpu", enabled=False):
                direct = (delta.layer.raw.float() + delta.scale * delta.B @ delta.A).norm(dim=1)
            close(delta.norm(), direct, f"c of {name}", 1e-5)


def test_a_small_change_of_length_is_not_lost_in_16_bits():
    """A factor of 1.003 is 1 in bfloat16, to the nearest; the outputs must grow by it all the same, on average."""
    run = small("model.dtype=bfloat16", "hardware.precision=bf16-mixed")
    module, delta = next((d.layer.module, d) for d in adapter(run).deltas.values())
    x = torch.randn(512, module.in_features)
    with torch.no_grad(), run.update.autocast():
        before = module(x).float()
        delta.m.mul_(1.003)
        after = module(x).float()
    growth = float((after * before).sum() / before.square().sum())
    assert torch.tensor(1.003).bfloat16() == 1
    assert abs(growth - 1.003) < 1e-3


def test_lengths_alone_reach_a_rescaled_weight_and_a_rank_one_update_does_not():
    base = build("method=full", "model=toy", "model.dtype=float64").model.layer.weight.detach()
    t = torch.linspace(0.5, 2, 16, dtype=torch.float64)
    assert torch.linalg.matrix_rank(base) == 16
    rows = toy_data("rescaled", torch.eye(16, dtype=torch.float64), (t[:, None] * base).T)
    shared = ("model=toy", "model.dtype=float64", f"data={rows}", "trainer.batch=16", "trainer.clip=.inf", "schedule.warmup=0")
    run = build("method=dora", *shared, "method.dora.targets=[]", "method.dora.magnitude_only=[linear]", "optimizer.lr=0.05")
    assert sum(p.numel() for p in run.trainable().values()) == 16
    run.fit(400)
    assert (run.merge().layer.weight - t[:, None] * base).abs().max() < 1e-6
    lora = build("method=lora", *shared, "method.lora.targets=[linear]", "method.lora.rank=1", "optimizer.lr=0.05")
    lora.fit(400)
    best = torch.linalg.svdvals((t - 1)[:, None] * base)[1:].norm()
    assert (lora.merge().layer.weight - t[:, None] * base).norm() >= best * (1 - 1e-9)
    assert best > 0.5


# -- the rest of what the authors' code does ----------------------------------------------------------------------------


@pytest.mark.parametrize("magnitude_only", [False, True])
def test_dropout_spares_the_plain_product(magnitude_only):
    """y = W0 x + b + (q - 1) W0 xd + q s B A xd."""
    given = ("method.dora.targets=[]", "method.dora.magnitude_only=[linear]") if magnitude_only else ("method.dora.targets=[linear]",)
    run = build("method=dora", "model=toy", "model.bias=true", *given, "method.dora.dropout=0.5", "method.dora.rank=4")
    scramble(run)
    delta, layer = only(run), run.model.layer
    x = torch.randn(7, 16)
    with torch.no_grad():
        layer.bias.normal_()
        update = torch.zeros(16, 16) if magnitude_only else delta.scale * delta.B @ delta.A
        q = delta.m / (layer.weight + update).norm(dim=1)
        run.model.train()
        torch.manual_seed(5)
        y = run.model(x)
        torch.manual_seed(5)
        xd = nn.functional.dropout(x, 0.5)
        torch.testing.assert_close(y, x @ layer.weight.T + layer.bias + (q - 1) * (xd @ layer.weight.T) + q * (xd @ update.T))
        run.model.eval()
        torch.testing.assert_close(run.model(x), x @ (q[:, None] * (layer.weight + update)).T + layer.bias)


def test_magnitude_only_roles_train_their_lengths_and_come_back_from_the_record(tmp_path):
    words = ("method.dora.targets=[q,v]", "method.dora.magnitude_only=[q,o,down]", "trainer.max_steps=3", "optimizer.lr=1e-2")
    run = train("method=dora", *SMALL, *words, folder=tmp_path)
    named = {name.removeprefix("model.layers.0.") for name in run.trainable() if name.startswith("model.layers.0.")}
    assert named == {
        *(f"self_attn.{p}_proj.delta.{x}" for p in "qv" for x in "ABm"),
        "self_attn.o_proj.delta.m",
        "mlp.down_proj.delta.m",
    }
    again = Run.open(tmp_path)
    batch = run.window(0).micros[0]
    with torch.no_grad():
        logits = run.model(batch["ids"]).logits
        assert torch.equal(again.model(batch["ids"]).logits, logits)
        torch.testing.assert_close(again.merge()(batch["ids"]).logits, logits, atol=1e-5, rtol=0)


def test_a_role_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"targets=\['nonsense'\].* name nothing in tiny-llama; it has down, embed"):
        small("method.dora.magnitude_only=[nonsense]")


def test_lengths_are_not_decayed():
    run = small("optimizer.weight_decay=0.5")
    for group in run.build_optimizer().param_groups:
        assert group["weight_decay"] == (0.5 if group["params"][0].dim() > 1 else 0.0)
        assert len({p.dim() for p in group["params"]}) == 1


def test_a_row_of_zeros_stays_finite():
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)
            nn.init.zeros_(self.layer.weight[1])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    rows = toy_data("dead", torch.randn(16, 6), torch.randn(16, 4))
    run = host(Dead(), "method=dora", f"data={rows}", "trainer.batch=8", "method.dora.rank=2", "method.dora.targets=[linear]", *STEADY)
    run.fit(5)
    assert all(p.isfinite().all() for p in run.trainable().values())
    assert run.merge().layer.weight.isfinite().all()


# -- peft --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_on_llama(rslora):
    """Logits, gradients of all numbers, merged weights."""
    run = small(f"method.dora.rslora={str(rslora).lower()}")
    scramble(run)
    peer = twin(run, r=4, lora_alpha=6, use_dora=True, use_rslora=rslora)
    (batch,) = run.window(0)
    with torch.no_grad():
        close(run.model(batch["ids"]).logits, peer(batch["ids"]).logits, "logits")
    run.gradients(run.window(0))
    language_loss(peer, batch).backward()
    compared = 0
    for name, ours, theirs in pairs(run, peer):
        close(ours.grad, theirs.grad, f"gradient of {name}", 1e-5)
        compared += 1
    assert compared == len(run.trainable()) == len([p for p in peer.parameters() if p.requires_grad])
    merged = run.merge().state_dict()
    for name, value in peer.merge_and_unload().state_dict().items():
        close(merged[name], value, f"merged {name}")


def test_peft_through_ten_updates():
    """AdamW with clipping and decay, by a plain loop on its side."""
    run = small(*STEADY, "optimizer.weight_decay=0.1")
    scramble(run)
    start = weights(run)
    peer = twin(run, r=4, lora_alpha=6, use_dora=True)
    run.fit(10)
    plain_loop(run, peer, language_loss, 10, lr=1e-3, decay=0.1)
    for name, ours, theirs in pairs(run, peer):
        close(ours, theirs, f"{name} after ten updates", 3e-5)  # Adam turns rounding of a small gradient into a share of its step
    assert all((p - start[n]).abs().max() > 1e-3 for n, p in run.trainable().items())  # they did move
    merged = run.merge().state_dict()
    for name, value in peer.merge_and_unload().state_dict().items():
        close(merged[name], value, f"merged {name}", 3e-5)


class Picture(nn.Module):
    """Rows as small pictures: a strided convolution with a bias, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.layer = nn.Linear(8 * 3 * 3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.relu(self.conv(x.view(-1, 3, 6, 6))).flatten(1))


class Words(nn.Module):
    """Rows as three token numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layer = nn.Linear(18, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.embed(x.long()).flatten(1))


@pytest.mark.parametrize("kind", ["conv", "embed"])
def test_peft_on_convolutions_and_embeddings(kind):
    """In float64, where the formulas must agree to many digits."""
    torch.manual_seed(0)
    x = torch.randn(32, 108) if kind == "conv" else torch.randint(0, 11, (32, 3)).float()
    rows = toy_data(f"dora-{kind}", x, torch.randn(32, 4))
    words = ("method=dora", f"data={rows}", "method.dora.rank=3", "method.dora.alpha=5", "trainer.batch=8", *STEADY)
    run = host((Picture() if kind == "conv" else Words()).double(), *words, f"method.dora.targets=[{kind},linear]")
    scramble(run, size=0.3)
    peer = twin(run, r=3, lora_alpha=5, use_dora=True)
    (batch,) = run.window(0)
    with torch.no_grad():
        close(run.model(batch["x"]), peer(batch["x"]), "output", 1e-12)
    run.gradients(run.window(0))
    squared_loss(peer, batch).backward()
    for name, ours, theirs in pairs(run, peer):
        close(ours.grad, theirs.grad, f"gradient of {name}", 1e-12)
    run.fit(10)
    plain_loop(run, peer, squared_loss, 10, lr=1e-3)
    for name, ours, theirs in pairs(run, peer):
        close(ours, theirs, f"{name} after ten updates", 1e-10)
    merged = run.merge().state_dict()
    for name, value in peer.merge_and_unload().state_dict().items():
        close(merged[name], value, f"merged {name}", 1e-10)
