"""SSF: scales and shifts behind every operation, which fold into its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import host
from tools import SMALL, build, check_resume, toy_data, train, weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from ftrecipes import export
from ftrecipes.compose import compose
from ftrecipes.errors import UserError
from ftrecipes.methods.adapters.activation import Affine
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/adapters/activation.py", "wide = scale * bias.to(scale.dtype)", "wide = bias.to(scale.dtype)")
VIT = ("model=tiny-vit", "data.size=64", "trainer.batch=8", "trainer.eval_examples=16")
SMALL_VIT = (
    *VIT, "model.weights=random", "trainer.checkpoint_every=2",
    "model.architecture={num_hidden_layers:1,hidden_size:24,intermediate_size:32,num_attention_heads:2,patch_size:8}",
)  # fmt: skip
TOY = ("model=toy", "method.ssf.targets=[linear]", "trainer.clip=.inf")


def inserts(run: Run) -> dict[str, Affine]:
    return run.stack.methods[0].inserts  # type: ignore[attr-defined]


@torch.no_grad()
def scramble(run: Run) -> None:
    """Scales and shifts that do something."""
    rng = torch.Generator().manual_seed(1)
    for insert in inserts(run).values():
        for parameter in insert.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng).to(parameter))


# -- counts and starts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "depth", "d", "count"), [("tiny-vit", 6, 96, 13_056), ("vit-b16", 12, 768, 205_824)])
def test_the_count_is_that_of_the_official_code(model: str, depth: int, d: int, count: int) -> None:
    """Per block two norms, q k v o, fc1 (4d) and fc2; besides these the patches and the last norm; 2 numbers a channel."""
    run = Run(compose(["method=ssf", f"model={model}"]))
    run.load_model(meta=True)
    run.prepare()
    ours = [p for name, p in run.trainable().items() if ".inserted." in name]
    assert sum(p.numel() for p in ours) == depth * 22 * d + 4 * d == count
    head = {name for name in run.trainable() if ".inserted." not in name}
    assert head == (run.loaded.fresh if model == "vit-b16" else set())  # a head for new classes trains


def test_starts() -> None:
    run = build("method=ssf", *VIT)
    gammas = torch.cat([i.scale for i in inserts(run).values()])
    betas = torch.cat([i.shift for i in inserts(run).values()])
    assert abs(gammas.mean() - 1) < 0.005 and abs(gammas.std() - 0.02) < 0.002
    assert abs(betas.mean()) < 0.005 and abs(betas.std() - 0.02) < 0.002
    batch = run.window(0).micros[0]
    identity = build("method=ssf", "method.ssf.init=identity", *VIT)
    with torch.no_grad():
        base = run.task.outputs(run.pristine().eval(), batch).logits
        assert torch.equal(identity.task.outputs(identity.model.eval(), batch).logits, base)
        assert not torch.allclose(run.task.outputs(run.model.eval(), batch).logits, base, atol=1e-2)


def test_it_stands_between_linear_and_activation_and_before_the_residual() -> None:
    run = build("method=ssf", *VIT)
    scramble(run)
    block = run.model.vit.layers[2]
    x = torch.randn(2, 5, 96)

    def affine(name: str, y: Tensor) -> Tensor:
        insert = inserts(run)[f"vit.layers.2.{name}"]
        return insert.scale * y + insert.shift

    def linear(module: nn.Linear, y: Tensor) -> Tensor:
        return nn.functional.linear(y, module.weight, module.bias)

    with torch.no_grad():
        fc1, fc2 = block.mlp.fc1, block.mlp.fc2
        hidden = nn.functional.gelu(affine("mlp.fc1", linear(fc1, x)))
        torch.testing.assert_close(block.mlp(x), affine("mlp.fc2", linear(fc2, hidden)), rtol=1e-5, atol=1e-5)


# -- gradients and what it can learn -----------------------------------------------------------------------------------


def test_gradients_are_sums_over_positions() -> None:
    run = build("method=ssf", *TOY, "model.bias=true", "model.dtype=float64", "trainer.batch=16")
    (insert,) = inserts(run).values()
    (batch,) = run.window(0)
    x, y = batch["x"].double(), batch["y"].double()
    with torch.no_grad():
        plain = x @ run.model.layer.weight.T + run.model.layer.bias
        error = (insert.scale * plain + insert.shift - y) / len(x)
    run.gradients(run.window(0))
    torch.testing.assert_close(insert.shift.grad, error.sum(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(insert.scale.grad, (error * plain).sum(0), rtol=1e-10, atol=1e-12)


def test_it_undoes_a_rescaled_and_shifted_layer_which_neither_half_nor_lora_can() -> None:
    """h = a (W x) + c, target W x: exact at gamma = 1/a, beta = -c/a. The other ends are known in closed form."""
    rng = torch.Generator().manual_seed(0)
    W, x = torch.randn(16, 8, generator=rng), torch.randn(256, 8, generator=rng)
    x -= x.mean(0)
    a, c = torch.rand(16, generator=rng) * 1.5 + 0.5, torch.randn(16, generator=rng)
    layer = nn.Linear(8, 16)
    layer.weight.data, layer.bias.data = a[:, None] * W, c
    rows = toy_data("rescaled-features", x, x @ W.T)
    shared = ("model=toy", "model.inputs=8", "model.outputs=16", f"data={rows}", "trainer.batch=256", "trainer.eval_examples=256",
              "trainer.clip=.inf", "schedule.warmup=0", "optimizer.lr=0.1")  # fmt: skip

    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    def error(*words: str) -> float:
        run = host(Host(), *shared, *words)
        run.fit(150)
        return run.evaluate("test")["mse"]

    v = (x @ W.T).square().mean(0)
    assert error("method=ssf", "method.ssf.targets=[linear]") < 1e-3
    scale_alone = float((c**2 * v / (a**2 * v + c**2)).mean())
    assert error("method=ssf", "method.ssf.targets=[linear]", "method.ssf.shift=none") == pytest.approx(scale_alone, rel=0.01)
    assert scale_alone > 0.05
    assert error("method=lora", "method.lora.targets=[linear]", "method.lora.rank=8") >= float((c**2).mean()) * 0.999


def test_the_base_stays_bit_equal() -> None:
    run = build("method=ssf", *VIT)
    start = {name: p.clone() for name, p in run.pristine().named_parameters()}
    run.fit(3)
    now = weights(run)
    assert all(torch.equal(now[name], start[name]) for name in start)
    assert all(not torch.equal(i.scale, torch.ones_like(i.scale)) for i in inserts(run).values())


# -- merging -----------------------------------------------------------------------------------------------------------


class Sequence(nn.Module):
    """One module between a frozen input and output map, in the layout that it wants."""

    def __init__(self, module: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.middle, self.shape = module, shape

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.middle, nn.Embedding):
            return self.middle(x.argmax(-1))
        return self.middle(x.reshape(-1, *self.shape)).flatten(1)


def _norm(kind: type[nn.Module], *args: Any) -> nn.Module:
    norm = kind(*args)
    with torch.no_grad():
        norm.weight.normal_()
        if getattr(norm, "bias", None) is not None:
            norm.bias.normal_()
        if hasattr(norm, "running_mean"):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return norm


KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(16, 16), (16,)),
    "linear without bias": (lambda: nn.Linear(16, 16, bias=False), (16,)),
    "Conv1D of GPT-2": (lambda: Conv1D(16, 16), (16,)),
    "convolution": (lambda: nn.Conv2d(4, 4, 3, padding=1, bias=False), (4, 2, 2)),
    "depthwise convolution": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 2, 2)),
    "LayerNorm": (lambda: _norm(nn.LayerNorm, 16), (16,)),
    "BatchNorm": (lambda: _norm(nn.BatchNorm2d, 4), (4, 2, 2)),
    "RMSNorm": (lambda: _norm(LlamaRMSNorm, 16), (16,)),
    "RMSNorm of Gemma": (lambda: _norm(Gemma3RMSNorm, 16), (16,)),
    "embedding": (lambda: nn.Embedding(16, 16), (16,)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_equal_in_every_kind_of_layer(kind: str) -> None:
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    run = host(Sequence(make(), shape), "method=ssf", "model=toy", "method.ssf.targets=['re:middle']", "method.ssf.shift=all")
    scramble(run)
    (insert,) = inserts(run).values()
    assert (insert.shift is None) == kind.startswith("RMSNorm")
    x = torch.randn(8, 16)
    with torch.no_grad():
        run.model.eval()
        wanted = run.model(x)
        assert (wanted - run.pristine().eval()(x)).abs().max() > 0.1
        merged = run.merge()
        torch.testing.assert_close(merged(x), wanted, rtol=1e-5, atol=1e-5)
    start = run.pristine()
    assert type(merged.middle) is type(start.middle) and not hasattr(merged.middle, "inserted")
    assert all(now.shape == before.shape for now, before in zip(merged.parameters(), start.parameters(), strict=False))


def test_a_merged_llama_has_biases_and_loads_in_transformers(tmp_path: Path) -> None:
    train("method=ssf", *SMALL, "trainer.max_steps=2", folder=tmp_path / "run")
    run = Run.open(tmp_path / "run")
    ids = run.task.collate([run.task.encode({"text": "The fox sleeps."})])["ids"]
    with torch.no_grad():
        wanted = run.model(ids).logits
        folder = export.merge(str(tmp_path / "run"))
        assert json.loads((folder / "config.json").read_text())["mlp_bias"] is True
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_where_the_architecture_has_no_room_nothing_is_shifted_unless_asked() -> None:
    shape = "{num_hidden_layers:1,hidden_size:32,intermediate_size:48,num_attention_heads:2,num_key_value_heads:2,vocab_size:1100,layer_types:[full_attention]}"
    qwen = (
        "model=qwen2.5-0.5b",
        "model.weights=random",
        f"model.architecture={shape}",
        "data.size=16",
        "data.max_length=64",
        "trainer.eval_examples=4",
    )
    run = build("method=ssf", *qwen)
    shifted = {name.rpartition(".")[2] for name, i in inserts(run).items() if i.shift is not None}
    assert shifted == {"q_proj", "k_proj", "v_proj"}
    assert any("4 layers without a bias are scaled and not shifted" in remark for remark in run.remarks)
    scramble(run)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        wanted = run.model(ids).logits
        torch.testing.assert_close(run.merge()(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    everywhere = build("method=ssf", "method.ssf.shift=all", *qwen)
    with pytest.raises(UserError, match=r"ssf: Qwen2ForCausalLM has no place for the shift of .*o_proj|down_proj.*shift=foldable"):
        everywhere.merge()


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_half_the_strength_is_the_point_between_the_weights() -> None:
    run = build("method=ssf", *VIT)
    scramble(run)
    full = {n: p.clone() for n, p in run.pristine().named_parameters()}
    for insert in inserts(run).values():
        insert.strength = 0.25
    batch = run.window(0).micros[0]
    with torch.no_grad():
        wanted = run.task.outputs(run.model.eval(), batch).logits
        quarter = dict(run.merge().named_parameters())
        torch.testing.assert_close(run.task.outputs(run.model, batch).logits, wanted, rtol=1e-4, atol=1e-4)
    other = build("method=ssf", *VIT)
    scramble(other)
    whole = dict(other.merge().named_parameters())
    for name, start in full.items():
        torch.testing.assert_close(quarter[name], torch.lerp(start, whole[name], 0.25), rtol=1e-4, atol=1e-5)


def test_wise_ft_moves_along_that_line(tmp_path: Path) -> None:
    run = train("method=[ssf,wise_ft]", "method.wise_ft.alpha=[0.3]", *SMALL_VIT, "trainer.max_steps=2", folder=tmp_path)
    assert {i.strength for i in inserts(run).values()} == {0.3}
    again = Run.open(tmp_path)
    assert {i.strength for i in inserts(again).values()} == {0.3}


def test_a_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    check_resume("method=ssf", *SMALL_VIT, "trainer.max_steps=6", folder=tmp_path, at=5)


def test_two_methods_at_one_place_are_refused() -> None:
    with pytest.raises(UserError, match="already carries"):
        build("method=[lora,ssf]", "method.lora.targets=[up]", "method.ssf.targets=['re:fc1']", *VIT)
