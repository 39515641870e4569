"""LoRA: the update s B A, its start, its scale, and agreement with `peft` to float32 rounding."""

from __future__ import annotations

import math

import pytest
import torch
from peers import adapter, host, language_loss, pairs, plain_loop, scramble, squared_loss, twin
from tools import SMALL, build, toy_data, train, weights
from torch import nn

from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/adapters/lora.py", "math.sqrt(rank) if getattr", "rank if getattr")
STEADY = ("schedule=constant", "schedule.warmup=0", "optimizer.lr=1e-3")


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
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.layer = nn.Linear(18, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.embed(x.long()).flatten(1))


def small(*words: str) -> Run:
    return build("method=lora", *SMALL, "method.lora.rank=4", "method.lora.alpha=6", *words)


def hosted(kind: str, *words: str) -> Run:
    """LoRA on the float64 model of a kind of layer."""
    torch.manual_seed(0)
    x = torch.randn(32, 108) if kind == "conv" else torch.randint(0, 11, (32, 3)).float()
    rows = toy_data(f"lora-{kind}", x, torch.randn(32, 4))
    model = Picture() if kind == "conv" else Words()
    return host(model.double(), "method=lora", f"data={rows}", "method.lora.rank=3", "trainer.batch=8", *STEADY, *words)


def close(ours: torch.Tensor, theirs: torch.Tensor, what: str, tolerance: float = 2e-6) -> None:
    """Equal to float32 rounding: the largest difference against the largest number."""
    off = float((ours - theirs.reshape(ours.shape)).abs().max() / theirs.abs().max().clamp_min(1e-8))
    assert off < tolerance, f"{what}: off by {off:.1e} of the largest number"


# -- the definition ----------------------------------------------------------------------------------------------------


def test_the_start_is_the_base_model_and_the_count_is_r_in_plus_out():
    run = small()
    batch = run.window(0).micros[0]
    with torch.no_grad():
        assert torch.equal(run.model(batch["ids"]).logits, run.pristine()(batch["ids"]).logits)
    shapes = [delta.layer.shape for delta in adapter(run).deltas.values()]
    assert sum(p.numel() for p in run.trainable().values()) == sum(4 * (rows + cols) for rows, cols in shapes)
    assert len(shapes) == 14  # seven matrices in each of two blocks


def test_a_is_uniform_within_one_over_the_root_of_the_inputs_and_b_is_zero():
    run = build("method=lora", "model=toy", "model.inputs=400", "data.inputs=400", "method.lora.targets=[linear]", "method.lora.rank=16")
    (delta,) = adapter(run).deltas.values()
    bound = 1 / math.sqrt(400)
    assert delta.A.abs().max() <= bound and delta.A.abs().max() > 0.99 * bound
    assert abs(float(delta.A.detach().std()) - bound / math.sqrt(3)) < 0.02 * bound
    assert not delta.B.any()


@pytest.mark.parametrize(("rslora", "scale"), [("false", 12 / 4), ("true", 12 / 2)])
def test_the_merged_weight_is_w_plus_alpha_over_r_b_a(rslora, scale):
    run = build(
        "method=lora", "model=toy", "model.dtype=float64", "method.lora.targets=[linear]", "method.lora.rank=4",
        "method.lora.alpha=12", f"method.lora.rslora={rslora}",
    )  # fmt: skip
    scramble(run)
    (delta,) = adapter(run).deltas.values()
    wanted = run.model.layer.weight.detach() + scale * delta.B.detach() @ delta.A.detach()
    x = torch.randn(5, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(run.model(x), x @ wanted.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(run.merge().layer.weight, wanted, atol=1e-12, rtol=0)


def test_gradients_are_s_g_a_and_s_b_g_for_the_squared_distance():
    run = build(
        "method=lora", "model=toy", "model.dtype=float64", "data.unit=true", "trainer.batch=16", "method.lora.targets=[linear]",
        "method.lora.rank=4", "method.lora.alpha=12",
    )  # fmt: skip
    scramble(run)
    (delta,) = adapter(run).deltas.values()
    A, B = delta.A.detach(), delta.B.detach()
    target = torch.stack([run.data["train"][i]["y"] for i in range(16)]).T
    G = (run.model.layer.weight.detach() + 3 * B @ A - target) / 16
    run.gradients(run.window(0))
    torch.testing.assert_close(delta.A.grad, 3 * B.T @ G, atol=1e-12, rtol=0)
    torch.testing.assert_close(delta.B.grad, 3 * G @ A.T, atol=1e-12, rtol=0)


def test_training_reaches_the_best_update_of_its_rank_and_no_further():
    """Towards a target at a distance of rank 8, the squared error left is the tail of its singular values."""
    rng = torch.Generator().manual_seed(3)
    U, V = (torch.linalg.qr(torch.randn(16, 8, generator=rng, dtype=torch.float64)).Q for _ in range(2))
    s = torch.linspace(2, 1, 8, dtype=torch.float64)
    base = build("method=full", "model=toy", "model.dtype=float64").model.layer.weight.detach()
    rows = toy_data("rank8", torch.eye(16, dtype=torch.float64), (base + U @ torch.diag(s) @ V.T).T)
    run = build(
        "method=lora", "model=toy", "model.dtype=float64", f"data={rows}", "trainer.batch=16", "method.lora.targets=[linear]",
        "method.lora.rank=3", "method.lora.alpha=3", "optimizer.lr=0.05", "trainer.clip=.inf", "schedule.warmup=0",
    )  # fmt: skip
    run.fit(500)
    loss = float(run.loss(run.window(0)))
    tail = float(s[3:].square().sum()) / 2 / 16
    assert abs(loss / tail - 1) < 1e-3


def test_dropout_falls_on_the_input_of_a_alone_and_rests_in_evaluation():
    run = build("method=lora", "model=toy", "method.lora.targets=[linear]", "method.lora.dropout=0.5", "method.lora.rank=2")
    scramble(run)
    (delta,) = adapter(run).deltas.values()
    x = torch.randn(7, 16)
    run.model.train()
    with torch.no_grad():
        torch.manual_seed(5)
        y = run.model(x)
        torch.manual_seed(5)
        dropped = nn.functional.dropout(x, 0.5)
        assert not torch.equal(x, dropped)
        torch.testing.assert_close(y, x @ run.model.layer.weight.T + 8 * dropped @ delta.A.T @ delta.B.T)
        run.model.eval()
        torch.testing.assert_close(run.model(x), x @ (run.model.layer.weight + delta.delta()).T)


# -- which biases train ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bias", "wanted"), [("none", 0), ("all", 4), ("lora_only", 2)])
def test_biases_train_as_asked_and_stand_in_the_record(bias, wanted, tmp_path):
    biased = SMALL[2].replace("{", "{attention_bias:true,num_hidden_layers:1,").replace("num_hidden_layers:2,", "")
    words = (*SMALL[:2], biased, *SMALL[3:], "method=lora", "method.lora.targets=[q,v]", f"method.lora.bias={bias}")
    run = train(*words, "trainer.max_steps=3", "trainer.batch=4", "optimizer.lr=1e-2", folder=tmp_path)
    biases = {name for name in run.trainable() if name.endswith(".bias")}
    assert len(biases) == wanted
    if bias == "lora_only":
        assert {name.split(".")[-2] for name in biases} == {"q_proj", "v_proj"}
    assert all(run.trainable()[name].abs().max() > 0 for name in biases)
    again = Run.open(tmp_path)
    for name, value in weights(run).items():
        assert torch.equal(weights(again)[name], value), name


# -- peft --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_on_llama(rslora):
    """Logits, gradients of all numbers, merged weights."""
    run = small(f"method.lora.rslora={str(rslora).lower()}")
    scramble(run)
    peer = twin(run, r=4, lora_alpha=6, use_rslora=rslora)
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
    peer = twin(run, r=4, lora_alpha=6)
    run.fit(10)
    plain_loop(run, peer, language_loss, 10, lr=1e-3, decay=0.1)
    for name, ours, theirs in pairs(run, peer):
        close(ours, theirs, f"{name} after ten updates", 3e-5)  # Adam turns rounding of a small gradient into a share of its step
    assert all((p - start[n]).abs().max() > 1e-3 for n, p in run.trainable().items())  # they did move
    merged = run.merge().state_dict()
    for name, value in peer.merge_and_unload().state_dict().items():
        close(merged[name], value, f"merged {name}", 3e-5)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["conv", "embed"])
def test_peft_on_convolutions_and_embeddings(kind, rslora):
    """In float64, where the formulas must agree to many digits."""
    run = hosted(kind, f"method.lora.targets=[{kind},linear]", f"method.lora.rslora={str(rslora).lower()}")
    scramble(run, size=0.3)
    peer = twin(run, r=3, lora_alpha=16, use_rslora=rslora)
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


def test_peft_starts_the_same_factors():
    """The same factor is zero and the random one has the same spread, for every kind of layer."""
    for kind in ("conv", "embed"):
        run = hosted(kind, "method.lora.targets=[conv,embed,linear]", "method.lora.rank=4")
        ours = {name: p.detach().clone() for name, p in run.trainable().items()}
        peer = twin(run, r=4)
        for name, _, theirs in pairs(run, peer):
            owner, _, factor = name.rpartition(".")
            layer = peer.base_model.model.get_submodule(owner)
            layer.reset_lora_parameters("default", True)
            mine = ours[f"{owner}.delta.{factor}"]
            assert mine.any() == theirs.any(), name
            assert math.isclose(mine.std(), theirs.std(), rel_tol=0.35, abs_tol=0), name
