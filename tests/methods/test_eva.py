"""EVA: A starts along the inputs' principal directions, ranks are earned, and `peft` finds the same."""

from __future__ import annotations

import pytest
import torch
from peers import Matrix, adapter, host, language_loss, pairs, twin
from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import EvaConfig
from tools import SMALL, build, check_resume, toy_data
from torch import nn

from ftrecipes.errors import UserError
from ftrecipes.methods.adapters.eva import Components
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/adapters/eva.py", "X = X - mean.to(X.dtype)", "X = X - 0 * mean.to(X.dtype)")
KNOBS = ("method.eva.rank=4", "method.eva.alpha=6", "method.eva.svd_batch=64", "method.eva.svd_iterations=0")
GROUPS = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")]


def small(*words: str) -> Run:
    return build("method=eva", *SMALL, *KNOBS, *words)


def inputs_of(run: Run, *, learned: bool = True) -> dict[str, torch.Tensor]:
    """The inputs (tokens x in) of every target over the whole training set, caught on a model of its own."""
    model, caught = run.pristine().eval(), {}
    (batch,) = run.calibration(64)
    keep = (batch["labels"] != -100) if learned else (batch["segment"] >= 0)
    for part in run.anatomy.select(["all-linear"]):
        module = model.get_submodule(part.name)
        module.register_forward_pre_hook(lambda module, args, name=part.name: caught.__setitem__(name, args[0][keep].double()))
    with torch.no_grad():
        model(input_ids=batch["ids"], attention_mask=(batch["segment"] >= 0).long())
    return caught


def projector(rows: torch.Tensor) -> torch.Tensor:
    return rows.T @ rows


def ranks(run: Run) -> dict[str, int]:
    return {name: len(delta.A) for name, delta in adapter(run).deltas.items()}


# -- the start ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [True, False])
def test_one_batch_gives_the_leading_directions_of_the_centred_inputs(learned):
    run = small("method.eva.rho=1", f"method.eva.use_label_mask={str(learned).lower()}")
    for name, X in inputs_of(run, learned=learned).items():
        delta = adapter(run).deltas[name]
        V = torch.linalg.svd(X - X.mean(0), full_matrices=False).Vh[:4]
        torch.testing.assert_close(projector(delta.A.double()), projector(V), atol=1e-3, rtol=0)
        torch.testing.assert_close((delta.A.double() @ V.T).abs(), torch.eye(4, dtype=torch.float64), atol=2e-2, rtol=0)
        torch.testing.assert_close(delta.A @ delta.A.T, torch.eye(4), atol=1e-5, rtol=0)
        assert not delta.B.any() and delta.scale == 6 / 4
        not_centred = torch.linalg.svd(X, full_matrices=False).Vh[:4]
        assert (projector(not_centred) - projector(V)).abs().max() > 1e-2
    batch = run.window(0).micros[0]
    with torch.no_grad():
        assert torch.equal(run.model(batch["ids"]).logits, run.pristine()(batch["ids"]).logits)


def test_nothing_is_left_on_the_model_and_dropout_rests():
    run = build("method=eva", *SMALL, *KNOBS, "model.architecture.attention_dropout=0.5")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in run.model.modules())
    again = build("method=eva", *SMALL, *KNOBS)  # with dropout at work, attention's outputs would be others
    assert all(torch.equal(d.A, adapter(again).deltas[n].A) for n, d in adapter(run).deltas.items())


def test_whitened_rows_are_divided_by_the_root_of_their_singular_values():
    plain, white = (small("method.eva.rho=1", f"method.eva.whiten={word}") for word in ("false", "true"))
    for name, X in inputs_of(plain).items():
        s = torch.linalg.svdvals(torch.cat([X - X.mean(0)] * 2))[:4]  # the one batch was seen twice
        size = adapter(plain).deltas[name].A / adapter(white).deltas[name].A
        torch.testing.assert_close(size[:, 0].double(), s.sqrt(), rtol=1e-3, atol=0)


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0])
def test_ranks_share_one_budget(rho):
    run = small(f"method.eva.rho={rho}")
    have = ranks(run)
    assert sum(have.values()) == 4 * 14 and max(have.values()) <= round(4 * rho)
    if rho == 1:
        assert set(have.values()) == {4}
        return
    assert len(set(have.values())) > 1
    # the budget's largest shares of variance, counted by numpy's measure on the same inputs
    xi = []
    for X in inputs_of(run).values():
        square = torch.linalg.svdvals(X - X.mean(0)).square()
        xi.append((square / square.sum())[: round(4 * rho)])
    bound = torch.cat(xi).sort(descending=True).values[4 * 14 - 1]
    assert sorted(have.values()) == pytest.approx(sorted(int((x >= bound).sum()) for x in xi), abs=1)
    assert all(delta.scale == 6 / 4 for delta in adapter(run).deltas.values())
    own = small(f"method.eva.rho={rho}", "method.eva.adjust_scaling_factors=false")
    assert all(delta.scale == 6 / len(delta.A) for delta in adapter(own).deltas.values())


def test_weights_with_one_input_share_its_directions():
    run = small()
    for block in range(2):
        for group in GROUPS:
            rows = [adapter(run).deltas[f"model.layers.{block}.{name}"].A for name in group]
            assert all(torch.equal(rows[0][: len(other)], other) for other in rows[1:])
    assert run.events["svd_updates"] == 2 * 8  # a decomposition for each of four inputs in two blocks, at two batches


class Feeds(nn.Module):
    """Two weights see inputs of full rank, one a single direction, one a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.bent, self.thin, self.still = (nn.Linear(16, 8, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        thin, still = x[:, :1] * torch.linspace(1, 2, 16), torch.full_like(x, 0.3)
        return self.wide(x) + self.bent(x.tanh()) + self.thin(thin) + self.still(still)


def test_a_weight_earns_no_more_than_its_inputs_vary():
    torch.manual_seed(0)
    rows = toy_data("feeds", torch.randn(64, 16), torch.randn(64, 8))
    words = (
        "method=eva",
        f"data={rows}",
        "method.eva.targets=['re:.']",
        "method.eva.rank=3",
        "method.eva.alpha=3",
        "method.eva.svd_batch=64",
    )
    run = host(Feeds(), *words)
    have = ranks(run)
    assert have["thin"] == 1 and have["wide"] + have["bent"] == 4 * 3 - 1 and "still" not in have
    assert {name.partition(".")[0] for name in run.trainable()} == {"wide", "bent", "thin"}
    assert not hasattr(run.model.still, "delta")
    direction = adapter(run).deltas["thin"].A[0]
    torch.testing.assert_close(direction.abs(), nn.functional.normalize(torch.linspace(1, 2, 16), dim=0), atol=1e-4, rtol=0)


# -- batch by batch ----------------------------------------------------------------------------------------------------


def test_batch_by_batch_equals_all_rows_at_once():
    """With as many components as features nothing is lost, whatever the order and the sizes of the batches."""
    X = torch.randn(300, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.7 ** torch.arange(12) + 3
    whole = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    for sizes in ([300], [60] * 5, [12, 100, 13, 175]):
        part = Components(12)
        for rows in X.split(sizes):
            assert part.add(rows, 0, torch.Generator())
        torch.testing.assert_close(part.s, whole.S, rtol=1e-9, atol=0)
        torch.testing.assert_close(projector(part.V[:4]), projector(whole.Vh[:4]), atol=1e-9, rtol=0)
        torch.testing.assert_close(part.var, X.var(0, correction=0), rtol=1e-9, atol=0)
        torch.testing.assert_close(part.explained, whole.S.square() / whole.S.square().sum(), rtol=1e-9, atol=0)
    few = Components(12)
    assert not few.add(X[:11], 0, torch.Generator()) and few.V is None


def test_truncated_components_hardly_depend_on_the_order_of_batches():
    rng = torch.Generator().manual_seed(0)
    X = torch.randn(400, 32, generator=rng) * 0.5 ** torch.arange(32)
    found = []
    for _ in range(2):
        part = Components(8)
        for rows in X[torch.randperm(400, generator=rng)].split(80):
            part.add(rows, 4, torch.Generator().manual_seed(1))
        found.append(projector(part.V[:4]))
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["method.eva.svd_batch=1"], r"eva: no batch of 1 examples held the 8 tokens that .* needs; raise eva.svd_batch"),
        (["method.eva.max_batches=2", "method.eva.svd_batch=16", "method.eva.tau=0.9999"], r"eva: after 2 batches the components of \d of 8 inputs"),
        (["method.eva.rank=65"], r"eva.rank=65: .*q_proj is 128 x 64, its rank is at most 64"),
        (["method.eva.targets=[embed]"], r"eva cannot act on model.embed_tokens \(Embedding\); narrow eva.targets"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(words, text):
    with pytest.raises(UserError, match=text) as caught:
        small(*words)
    assert "\n" not in str(caught.value)


def test_a_resumed_run_has_its_ranks_and_looks_at_no_inputs(tmp_path):
    run = check_resume("method=eva", *SMALL, *KNOBS, "trainer.max_steps=5", "optimizer.lr=1e-3", folder=tmp_path, at=4)
    assert len(set(ranks(run).values())) > 1 and ranks(run) == ranks(Run.open(tmp_path / "straight"))


# -- what it is for ----------------------------------------------------------------------------------------------------


def test_it_needs_fewer_steps_than_lora_where_inputs_live_in_few_directions():
    """Four hidden directions of 64, a target map that acts there: gradient steps to 1 % of the loss at the start."""
    rng = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 4, generator=rng, dtype=torch.float64)).Q
    x = torch.randn(256, 4, generator=rng, dtype=torch.float64) @ basis.T
    W = torch.randn(64, 64, generator=rng, dtype=torch.float64) / 8
    D = torch.randn(64, 64, generator=rng, dtype=torch.float64) / 8
    rows = toy_data("hidden", x, x @ (W + D).T)
    steps = {}
    for key, knobs in {"eva": ("method.eva.svd_batch=256",), "lora": ()}.items():
        run = host(
            Matrix(W), f"method={key}", f"data={rows}", f"method.{key}.targets=[linear]", f"method.{key}.rank=4", f"method.{key}.alpha=4", *knobs,
            "trainer.batch=256", "trainer.clip=.inf", "optimizer=sgd", "optimizer.lr=0.2", "optimizer.weight_decay=0", "schedule=constant",
            "schedule.warmup=0",
        )  # fmt: skip
        batch = run.window(0)
        start = float(run.loss(batch))
        steps[key] = 0
        while float(run.loss(batch)) > 0.01 * start and steps[key] < 200:
            run.fit(1)
            steps[key] += 1
    assert 0 < steps["eva"] * 1.5 <= steps["lora"] < 200


# -- agreement with peft -----------------------------------------------------------------------------------------------


def test_peft_finds_the_same_ranks_scales_and_directions():
    """At this rank its randomized decompositions are all but exact. Among weights of one input the ranks may change places."""
    words = ("method.eva.rank=16", "method.eva.svd_batch=32", "method.eva.tau=0.9", "data.size=128")
    run = build("method=eva", *SMALL, *KNOBS, *words)
    config = LoraConfig(
        target_modules="all-linear", r=16, lora_alpha=6, lora_dropout=0.0, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0, tau=0.9)
    )
    peer = get_peft_model(run.pristine(), config)
    batches = [
        {"input_ids": batch["ids"], "attention_mask": (batch["segment"] >= 0).long(), "labels": batch["labels"]}
        for batch in run.calibration(len(run.data["train"].keep), batch=32)
    ]
    initialize_lora_eva_weights(peer, batches, show_progress_bar=False)
    theirs = {}
    for name, module in peer.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            theirs[name] = (module.lora_A["default"].weight.detach(), module.scaling["default"])
    ours = adapter(run).deltas
    assert ours.keys() == theirs.keys() and len(set(ranks(run).values())) > 2
    for block in range(2):
        for group in [*GROUPS, ("self_attn.o_proj",), ("mlp.down_proj",)]:
            names = [f"model.layers.{block}.{name}" for name in group]
            assert sorted(len(ours[n].A) for n in names) == sorted(len(theirs[n][0]) for n in names), group
            for name in names:
                n = min(len(ours[name].A), len(theirs[name][0]))
                same = torch.cosine_similarity(ours[name].A.detach()[:n], theirs[name][0][:n]).abs()
                assert (same > 0.9 * 0.99).all(), (name, same)
                assert ours[name].scale == pytest.approx(theirs[name][1])


def test_peft_on_equal_weights_and_inputs():
    """Its LoRA with a rank for each weight: outputs, gradients and merged weights."""
    run = small("optimizer.lr=1e-3", "schedule.warmup=0")
    run.fit(3)
    have = ranks(run)
    alphas = {name: 6 / 4 * rank for name, rank in have.items()}
    peer = twin(run, r=4, lora_alpha=6, rank_pattern=have, alpha_pattern=alphas)
    (batch,) = run.window(0)
    with torch.no_grad():
        torch.testing.assert_close(run.model(batch["ids"]).logits, peer(batch["ids"]).logits, atol=1e-5, rtol=0)
    run.gradients(run.window(0))
    language_loss(peer, batch).backward()
    for _, ours, theirs in pairs(run, peer):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-6, rtol=1e-4)
    merged = run.merge().state_dict()
    for name, value in peer.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], value, atol=1e-6, rtol=0)
