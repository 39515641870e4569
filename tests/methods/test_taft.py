"""TAFT: the first-order Taylor expansion in the weights, exactly linear in what trains, and what follows from that for shards."""

from __future__ import annotations

import pytest
import torch
from test_vision import SMALL_VIT
from tools import build, check_resume, train, weights
from torch.nn.attention import SDPBackend, sdpa_kernel

from ftrecipes.data.base import Splits
from ftrecipes.errors import UserError
from ftrecipes.registry import data as register_data
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/adapters/taft.py", "out.logits = logits + tangent", "out.logits = 2 * tangent + logits")


def small(*words: str) -> Run:
    """A random ViT of three blocks; in float64, for formulas have to hold to many digits."""
    run = build("method=taft", *SMALL_VIT, "method.taft.blocks=last-2", "model.dtype=float32", *words)
    run.model.double()
    return run


def taft(run: Run):
    (method,) = run.stack
    return method


@torch.no_grad()
def fill(run: Run, seed: int = 1, size: float = 0.05) -> dict[str, torch.Tensor]:
    """Random numbers in D; by names of the weights they belong to."""
    rng = torch.Generator().manual_seed(seed)
    for _, D in taft(run).named():
        D.copy_(size * torch.randn(D.shape, generator=rng, dtype=D.dtype))
    return {name: D.detach().clone() for name, D in taft(run).named()}


@torch.no_grad()
def put(run: Run, D: dict[str, torch.Tensor]) -> None:
    for name, own in taft(run).named():
        own.copy_(D[name])


def images(run: Run, count: int = 8) -> torch.Tensor:
    return run.data["train"].batch(list(range(count)))["pixels"].double()


@torch.no_grad()
def logits(run: Run, x: torch.Tensor) -> torch.Tensor:
    return run.model(pixel_values=x).logits


def plain(run: Run, x: torch.Tensor, D: dict[str, torch.Tensor] | None = None, scale: float = 1.0) -> torch.Tensor:
    """The ordinary model at w + scale D."""
    model = run.pristine().double()
    w = {name: p.detach() + scale * D[name] if D and name in D else p.detach() for name, p in model.named_parameters()}
    with torch.no_grad():
        return torch.func.functional_call(model, w, (), {"pixel_values": x}).logits


# -- the expansion -----------------------------------------------------------------------------------------------------


def test_it_is_f_plus_the_directional_derivative():
    """Against torch.func.jvp of the untouched model, and against its reverse-mode gradient of one output."""
    run = small()
    x, D = images(run), fill(run)
    model = run.pristine().double()
    w = {name: p.detach() for name, p in model.named_parameters()}

    def f(thawed):
        return torch.func.functional_call(model, {**w, **thawed}, (), {"pixel_values": x}).logits

    with sdpa_kernel(SDPBackend.MATH):
        f_w, J_D = torch.func.jvp(f, ({n: w[n] for n in D},), (D,))
    ours = logits(run, x)
    assert J_D.abs().max() > 0.05
    torch.testing.assert_close(ours, f_w + J_D, atol=1e-10, rtol=1e-10)
    model.requires_grad_(True)
    out = model(pixel_values=x[:1]).logits[0, 3]
    grads = torch.autograd.grad(out, [dict(model.named_parameters())[n] for n in D])
    slope = sum((g * d).sum() for g, d in zip(grads, D.values(), strict=True))
    torch.testing.assert_close(ours[0, 3], (out + slope).detach(), atol=1e-10, rtol=1e-10)


def test_the_start_is_the_pretrained_model_and_w_never_moves():
    run = small("optimizer.lr=1e-2", "schedule=constant", "schedule.warmup=0")
    x, before = images(run), weights(run)
    torch.testing.assert_close(logits(run, x), plain(run, x), atol=1e-12, rtol=0)
    run.model.float()
    run.fit(3)
    after = weights(run)
    assert all(torch.equal(after[n].double(), before[n]) for n in before if ".delta." not in n)
    assert all((after[n] != 0).any() for n in after if ".delta." in n)
    assert run.events == {"tangent_passes": 3}


def test_it_is_linear_in_d():
    run = small()
    x, f_w = images(run), plain(run, images(run))
    D1, D2 = fill(run, 1), fill(run, 2)
    put(run, D1)
    first = logits(run, x) - f_w
    put(run, D2)
    second = logits(run, x) - f_w
    put(run, {n: 3.0 * D1[n] - 0.7 * D2[n] for n in D1})
    torch.testing.assert_close(logits(run, x) - f_w, 3.0 * first - 0.7 * second, atol=1e-10, rtol=0)


def test_what_it_leaves_out_is_of_second_order():
    """Half the step, a quarter of the distance to the ordinary model at w + D: neither zero nor of first order."""
    run = small()
    x, D = images(run), fill(run)
    distances = []
    for scale in (1 / 64, 1 / 128, 1 / 256):
        put(run, {n: scale * d for n, d in D.items()})
        distances.append(float((plain(run, x, D, scale) - logits(run, x)).norm()))
    assert distances[-1] > 1e-8
    for large, half in zip(distances, distances[1:], strict=False):
        assert abs(large / half - 4) < 0.2


def test_the_count_is_that_of_the_thawed_weights():
    """Last N blocks, final norm, head; of the paper's size too."""
    for blocks, depth in (("last-1", [2]), ("last-2", [1, 2]), ("all", [0, 1, 2])):
        run = build("method=taft", *SMALL_VIT, f"method.taft.blocks={blocks}")
        inside = sum(p.numel() for i in depth for p in run.pristine().vit.layers[i].parameters())
        ends = sum(p.numel() for m in (run.pristine().vit.layernorm, run.pristine().classifier) for p in m.parameters())
        assert sum(p.numel() for p in run.trainable().values()) == inside + ends
        assert all(".delta." in name for name in run.trainable())


def test_half_the_strength_is_half_of_d():
    run = small()
    x, D = images(run), fill(run)
    for tangent in taft(run).tangents.values():
        tangent.strength = 0.5
    halved = logits(run, x)
    for tangent in taft(run).tangents.values():
        tangent.strength = 1.0
    put(run, {n: d / 2 for n, d in D.items()})
    torch.testing.assert_close(logits(run, x), halved, atol=1e-12, rtol=0)


def test_the_line_back_to_the_start_is_a_line_of_outputs():
    """With WiSE-FT at 0.3: 0.7 f_w + 0.3 f_lin, exactly, which no line of weights gives a model that is not linear in them."""
    words = (*SMALL_VIT, "method.taft.shards=1", "trainer.max_steps=3", "optimizer.lr=1e-2")
    run = train("method=[taft,wise_ft]", *words, "method.wise_ft.alpha=[0.3]")
    whole = train("method=taft", *words)
    for one in (run, whole):
        one.model.double()
    x = images(run)
    torch.testing.assert_close(logits(run, x), 0.7 * plain(run, x) + 0.3 * logits(whole, x), atol=1e-6, rtol=0)
    assert (logits(whole, x) - plain(run, x)).abs().max() > 0.1


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_the_loss_and_its_gradient():
    """(logits - 15 onehot)^2 over classes and images; dD = J^T r from reverse mode on the untouched model, the norm's slope added."""
    run = small("method.taft.wd=0.1")
    D = fill(run)
    (batch,) = run.window(0)
    batch["pixels"] = batch["pixels"].double()
    total = run.gradients(run.window(0), lambda b: run.stack.loss(run, batch))
    r = logits(run, batch["pixels"])
    r[torch.arange(8), batch["labels"]] -= 15.0
    norm = (sum(d.square().sum() for d in D.values()) + 1e-6).sqrt()
    torch.testing.assert_close(total, r.square().mean() + 0.1 * norm, atol=1e-10, rtol=1e-10)
    model = run.pristine().double()
    w = {name: p.detach() for name, p in model.named_parameters()}
    _, pull = torch.func.vjp(
        lambda thawed: torch.func.functional_call(model, {**w, **thawed}, (), {"pixel_values": batch["pixels"]}).logits,
        {n: w[n] for n in D},
    )
    (wanted,) = pull(2 * r / r.numel())
    for name, own in taft(run).named():
        torch.testing.assert_close(own.grad, wanted[name] + 0.1 * D[name] / norm, atol=1e-10, rtol=1e-8)


def test_the_square_loss_is_exactly_quadratic():
    """Its third difference along any line of D vanishes; the cross-entropy's does not."""
    thirds = {}
    for objective in ("square", "cross_entropy"):
        run = small("method.taft.wd=0", f"method.taft.objective={objective}")
        (batch,) = run.window(0)
        batch["pixels"] = batch["pixels"].double()
        D1, D2 = fill(run, 1), fill(run, 2)
        values = []
        for t in range(4):
            put(run, {n: D1[n] + t * D2[n] for n in D1})
            with torch.no_grad():
                values.append(run.stack.loss(run, batch).double())
        thirds[objective] = float(abs(values[3] - 3 * values[2] + 3 * values[1] - values[0]) / abs(values[0]))
    assert thirds["square"] < 1e-10
    assert thirds["cross_entropy"] > 1e-6


def two_classes(count: int) -> str:
    """Random pictures of two classes."""

    def splits(knobs, domain):
        rng = torch.Generator().manual_seed(0)
        rows = [
            {"image": torch.randint(0, 256, (32, 32, 3), generator=rng, dtype=torch.uint8).numpy(), "label": i % 2} for i in range(count)
        ]
        return Splits(rows, rows, rows, labels=["a", "b"])

    register_data("two_classes")(splits)
    return "two_classes"


def test_gradient_descent_ends_at_the_minimum_norm_solution():
    """D = J^T (J J^T)^-1 (y - f): three pictures, two classes, far more numbers than outputs. Momentum does not leave the rows of J."""
    words = [w for w in SMALL_VIT if not w.startswith("data.size")]
    run = build(
        "method=taft", *words, f"data={two_classes(3)}", "method.taft.blocks=all", "method.taft.wd=0", "trainer.batch=3", "optimizer=sgd",
        "optimizer.momentum=0", "optimizer.weight_decay=0", "schedule=constant", "schedule.warmup=0", "trainer.clip=.inf", "optimizer.lr=1",
    )  # fmt: skip
    run.model.double()
    (batch,) = run.window(0)
    batch["pixels"] = batch["pixels"].double()
    model = run.pristine().double()
    w = {name: p.detach() for name, p in model.named_parameters()}
    names = [name for name, _ in taft(run).named()]

    def f(thawed):
        return torch.func.functional_call(model, {**w, **thawed}, (), {"pixel_values": batch["pixels"]}).logits.flatten()

    parts = torch.func.jacrev(f)({n: w[n] for n in names})
    J = torch.cat([parts[n].flatten(1) for n in names], 1)
    K = J @ J.T
    y = 15 * torch.nn.functional.one_hot(batch["labels"], 2).double().flatten()
    wanted = J.T @ torch.linalg.solve(K, y - f({}).detach())
    mu, L = (float(torch.linalg.eigvalsh(K)[i]) * 2 / 6 for i in (0, -1))  # of the loss's Hessian
    kappa = L / mu
    assert kappa < 1e4
    for group in (optimizer := run.build_optimizer()).param_groups:
        group["lr"], group["momentum"] = (2 / (L**0.5 + mu**0.5)) ** 2, ((kappa**0.5 - 1) / (kappa**0.5 + 1)) ** 2
    for _ in range(int(8 * kappa**0.5)):
        run.gradients(run.window(0), lambda b: run.stack.loss(run, batch))
        optimizer.step()
    ours = torch.cat([D.detach().flatten() for _, D in taft(run).named()])
    assert (ours - wanted).norm() < 1e-3 * wanted.norm()


def test_a_new_head_keeps_its_random_numbers():
    words = [w for w in SMALL_VIT if not w.startswith(("data.size", "model.weights", "model.architecture"))]
    run = build("method=taft", *words, f"data={two_classes(8)}", "optimizer.lr=1e-2")
    assert run.loaded.fresh == {"classifier.weight", "classifier.bias"}
    before = run.model.classifier.weight.detach().clone()
    run.fit(2)
    assert run.model.classifier.weight.equal(before) and run.model.classifier.delta.weight.any()
    assert "classifier.weight" in run.saved_weights()


# -- shards ------------------------------------------------------------------------------------------------------------

SHARDS = ("method.taft.shards=3", "trainer.max_steps=8", "optimizer.lr=3e-3")


def test_the_average_of_shards_is_their_ensemble_and_forgetting_one_leaves_no_trace(tmp_path):
    run = train("method=taft", *SMALL_VIT, *SHARDS, folder=tmp_path)
    method = taft(run)
    assert run.events == {"tangent_passes": 8, "shards": 3, "composed": 3} and run.step == 8
    run.model.double()
    x = images(run)
    composed, single = logits(run, x), []
    for k in range(3):
        method.compose([j for j in range(3) if j != k])
        single.append(logits(run, x))
    assert (single[0] - single[1]).abs().max() > 1e-2
    torch.testing.assert_close(composed, torch.stack(single).mean(0), atol=1e-5, rtol=0)
    # the record keeps every shard's vector: removal works on what is opened, and equals an average that never had it
    opened = Run.open(tmp_path)
    opened.model.double()
    torch.testing.assert_close(logits(opened, x), composed, atol=1e-6, rtol=0)
    assert taft(opened).compose(forget=[1]) == 2
    del method.kept[1]
    assert method.compose() == 2
    assert all(a.equal(b) for (_, a), (_, b) in zip(method.named(), taft(opened).named(), strict=True))
    asked = build("method=taft", *SMALL_VIT, *SHARDS, "method.taft.forget=[1]")
    asked.stack.drive(asked, asked.fit)
    asked.stack.finish(asked)
    assert all(a.float().equal(b) for (_, a), (_, b) in zip(method.named(), taft(asked).named(), strict=True))


def test_shards_are_disjoint_and_all_of_the_data():
    run = build("method=taft", *SMALL_VIT, *SHARDS)
    seen = []
    run.stack.drive(run, lambda steps, name: seen.append((steps, name, list(run.data["train"].keep))))
    assert [(steps, name) for steps, name, _ in seen] == [(3, "shard-0"), (3, "shard-1"), (2, "shard-2")]
    assert sorted(i for _, _, keep in seen for i in keep) == list(range(64)) == list(run.data["train"].keep)


def test_a_run_over_shards_goes_on_where_it_was_cut(tmp_path):
    check_resume("method=taft", *SMALL_VIT, *SHARDS, folder=tmp_path, at=5)


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("model.also_train=[head]", r"taft: model.also_train=\['head'\] would move what it expands around"),
        ("method.taft.forget=[3]", r"taft.forget=\[3\]: shards are numbered 0 to 2, and one has to be left"),
        ("hardware.checkpointing=true", r"taft requires hardware.checkpointing=False"),
    ],
)
def test_what_would_not_be_linear_is_refused(word, text):
    with pytest.raises(UserError, match=text):
        build("method=taft", *SMALL_VIT, word)


def test_more_shards_than_updates_are_refused():
    run = build("method=taft", *SMALL_VIT, "method.taft.shards=5", "trainer.max_steps=4")
    with pytest.raises(UserError, match=r"taft.shards=5: there are 64 examples and 4 updates"):
        run.stack.drive(run, run.fit)


def test_there_is_no_merged_model(tmp_path):
    run = train("method=taft", *SMALL_VIT, "trainer.max_steps=3", folder=tmp_path)
    opened = Run.open(tmp_path)
    batch = run.data["test"].batch(list(range(4)))
    with torch.no_grad():
        assert run.task.outputs(run.model.eval(), batch).logits.equal(opened.task.outputs(opened.model, batch).logits)
    with pytest.raises(UserError, match="taft cannot be folded into plain weights"):
        opened.merge()
