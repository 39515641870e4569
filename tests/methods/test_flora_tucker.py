"""FLoRA: Tucker updates that keep a convolution's axes, against explicit sums and against what flattening to a matrix can do."""

from __future__ import annotations

import itertools

import pytest
import torch
from peers import adapter, host, scramble
from tools import SMALL, build, toy_data, train
from torch import nn

from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/adapters/flora_tucker.py", "dims = [cols, rows, *sides]", "dims = [rows, cols, *sides]")


class Sides(nn.Module):
    """Every kind of convolution with what is easy to forget, and a linear layer: rows of 4 x 6 x 7 numbers to three."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, (3, 5), stride=2, padding=(1, 2), dilation=(1, 1), padding_mode="circular")
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.groups = nn.Conv2d(6, 4, 1, groups=2)
        self.line = nn.Conv1d(4, 5, 3, padding=1, padding_mode="reflect")
        self.cube = nn.Conv3d(1, 3, (2, 3, 2), stride=(1, 2, 1))
        self.out = nn.Linear(36, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.groups(torch.tanh(self.depthwise(self.conv(x.view(-1, 4, 6, 7))))))
        h = torch.tanh(self.line(h.flatten(2))).view(-1, 1, 5, 3, 4)
        return self.out(torch.tanh(self.cube(h)).flatten(1))


MODULES = ["conv", "depthwise", "groups", "line", "cube", "out"]


def sides(*words: str) -> Run:
    torch.manual_seed(0)
    rows = toy_data("sides", torch.randn(16, 168), torch.randn(16, 3))
    targets = "method.flora_tucker.targets=[" + ",".join(f"'re:^{name}$'" for name in MODULES) + "]"
    return host(
        Sides().double(), "method=flora_tucker", f"data={rows}", targets, "trainer.batch=16", "method.flora_tucker.rank=[2,3,2,2,1]", *words
    )


def explicit(delta, shape: torch.Size) -> torch.Tensor:
    """dW entry by entry: s times the sum over the core's entries of a product of one number to each axis."""
    G, U = delta.G.detach(), [u.detach() for u in delta.U]
    out = torch.zeros(shape, dtype=G.dtype)
    for place in itertools.product(*map(range, shape)):
        i = (place[1], place[0], *place[2:])  # the core has in before out
        for a in itertools.product(*map(range, G.shape)):
            term = G[a]
            for n in range(len(a)):
                term = term * U[n][i[n], a[n]]
            out[place] += term
    return delta.scale * out


def unfolded(weight: torch.Tensor, n: int) -> torch.Tensor:
    return weight.movedim(n, 0).flatten(1)


# -- the definition ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_the_update_is_the_product_over_all_axes_and_the_function_is_that_of_the_merged_weight(name):
    run = sides("method.flora_tucker.scale=1.5", f"method.flora_tucker.targets=['re:^{name}$']")
    scramble(run, size=0.7)
    (delta,) = adapter(run).deltas.values()
    module = run.model.get_submodule(name)
    start = module.weight.detach().clone()
    wanted = explicit(delta, start.shape)
    assert wanted.abs().max() > 1e-2
    x = torch.stack([run.data["train"][i]["x"] for i in range(16)]).double()
    if (factors := delta.factors()) is not None:
        torch.testing.assert_close((factors.scale * factors.B @ factors.A).view_as(start), wanted, atol=1e-10, rtol=0)
    with run.evaluating():
        before = run.model(x)
    merged = run.merge()
    torch.testing.assert_close(merged.get_submodule(name).weight - start, wanted, atol=1e-10, rtol=0)
    with run.evaluating():
        torch.testing.assert_close(run.model(x), before, atol=1e-10, rtol=0)


def test_multilinear_ranks_after_training():
    """Each unfolding of dW has its own rank, whatever the others are: U_in of a depthwise convolution has one row."""
    run = sides("optimizer.lr=0.05", "schedule=constant", "schedule.warmup=0", "method.flora_tucker.rank=[3,2,2,4]")
    run.fit(8)
    ranks = {}
    for name, delta in adapter(run).deltas.items():
        shape = delta.layer.raw.shape
        dW = delta.delta().detach().view(shape)
        ranks[name] = [int(torch.linalg.matrix_rank(unfolded(dW, n), rtol=1e-9)) for n in range(dW.dim())]
        assert [u.shape[0] for u in delta.U] == [shape[1], shape[0], *shape[2:]]
    # out, in, sides
    assert ranks["conv"] == [2, 3, 2, 4] and ranks["line"] == [2, 3, 2] and ranks["out"] == [2, 2]
    assert ranks["depthwise"][1] == ranks["groups"][2] == 1


def test_a_lora_of_the_flattened_kernel_keeps_no_side():
    run = host(
        Sides().double(), "method=lora", f"data={toy_data('sides2', torch.randn(8, 168), torch.randn(8, 3))}", "method.lora.rank=2",
        "method.lora.targets=['re:^conv$']",
    )  # fmt: skip
    scramble(run, size=1)
    (delta,) = adapter(run).deltas.values()
    dW = delta.delta().detach().view(6, 4, 3, 5)
    assert [int(torch.linalg.matrix_rank(unfolded(dW, n))) for n in range(4)] == [2, 4, 3, 5]


def test_the_start_is_the_base_model_and_the_core_alone_has_a_gradient():
    run = build("method=flora_tucker", *SMALL, "method.flora_tucker.rank=[4,3]")
    batch = run.window(0).micros[0]
    with torch.no_grad():
        assert torch.equal(run.model(batch["ids"]).logits, run.pristine()(batch["ids"]).logits)
    run.gradients(run.window(0))
    for delta in adapter(run).deltas.values():
        assert delta.G.grad.abs().min() > 0 and not any(u.grad.any() for u in delta.U)
        assert delta.G.shape == (4, 3)
    run.build_optimizer()
    run.fit(2)
    for name, p in run.trainable().items():
        assert p.grad is None and p.abs().max() > 0, name


def test_factors_are_drawn_with_variance_one_over_twice_the_rank():
    run = build("method=flora_tucker", *SMALL, "method.flora_tucker.rank=[16,4]")
    for n, r in ((0, 16), (1, 4)):
        drawn = torch.cat([delta.U[n].detach().flatten() for delta in adapter(run).deltas.values()])
        assert abs(float(drawn.square().mean()) / (0.5 / r) - 1) < 0.05
        assert abs(float((drawn**4).mean() / drawn.square().mean() ** 2) - 3) < 0.3  # normal, not uniform


def test_the_count():
    """prod r + sum d r: a 7 x 7 convolution of 128 channels with ranks 16 16 2 2 has 5148."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(128, 128, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x.view(-1, 128, 7, 7)).flatten(1)

    rows = toy_data("wide", torch.randn(4, 128 * 49), torch.randn(4, 128))
    run = host(Wide(), "method=flora_tucker", f"data={rows}", "method.flora_tucker.rank=[16,16,2,2]", "method.flora_tucker.targets=[conv]")
    assert sum(p.numel() for p in run.trainable().values()) == 1024 + 4096 + 28 == 5148


def test_with_whole_sides_it_is_a_convolution_in_three_steps():
    """U_h = U_w = I and equal channel ranks: the Tucker-2 form of other libraries, 1x1 then r x r kernels then 1x1."""
    run = sides("method.flora_tucker.rank=[2,2,3,5]", "method.flora_tucker.targets=['re:^conv$']", "method.flora_tucker.scale=1")
    scramble(run, size=0.5)
    (delta,) = adapter(run).deltas.values()
    with torch.no_grad():
        delta.U[2].copy_(torch.eye(3))
        delta.U[3].copy_(torch.eye(5))
    core = delta.G.detach().transpose(0, 1)  # out first
    wanted = torch.einsum("bakl,ob,ia->oikl", core, delta.U[1].detach(), delta.U[0].detach())
    torch.testing.assert_close(delta.delta().detach().view_as(wanted), wanted, atol=1e-12, rtol=0)


# -- where the axes matter -----------------------------------------------------------------------------------------------


class Kernel(nn.Module):
    """A convolution over exactly its kernel: rows are flattened inputs, so the loss is a distance of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 5, bias=False)
        nn.init.zeros_(self.conv.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.view(-1, 8, 5, 5)).flatten(1)


def test_a_kernel_of_low_multilinear_rank_is_reached_with_a_third_of_lora_s_numbers():
    """68 numbers fit a change of multilinear rank 2 2 2 2; a LoRA of rank one, with 208, cannot pass the best of its kind."""
    rng = torch.Generator().manual_seed(0)
    G = torch.randn(2, 2, 2, 2, generator=rng, dtype=torch.float64)
    factors = [torch.linalg.qr(torch.randn(d, 2, generator=rng, dtype=torch.float64)).Q for d in (8, 8, 5, 5)]
    target = torch.einsum("abcd,oa,ib,kc,ld->oikl", G, *factors)
    rows = toy_data("kernel", torch.eye(200, dtype=torch.float64), target.flatten(1).T)
    words = (f"data={rows}", "trainer.batch=200", "trainer.clip=.inf", "schedule=cosine", "schedule.warmup=0", "optimizer.weight_decay=0")
    left = {}
    for method, knobs in (
        ("flora_tucker", ["method.flora_tucker.rank=[2]", "method.flora_tucker.scale=1", "optimizer.lr=0.03"]),
        ("lora", ["method.lora.rank=1", "method.lora.alpha=1", "optimizer.lr=0.03"]),
    ):
        run = host(Kernel().double(), f"method={method}", f"method.{method}.targets=[conv]", *words, *knobs)
        assert sum(p.numel() for p in run.trainable().values()) == {"flora_tucker": 68, "lora": 208}[method]
        run.fit(350)
        left[method] = float((run.merge().conv.weight - target).square().sum() / target.square().sum())
    floor = float(torch.linalg.svdvals(target.flatten(1))[1:].square().sum() / target.square().sum())
    assert floor > 0.1 and left["lora"] >= floor - 1e-9
    assert left["flora_tucker"] < 1e-3


def test_the_record_holds_core_and_factors_and_opens_again(tmp_path):
    run = train(
        "method=flora_tucker", *SMALL, "method.flora_tucker.rank=[4,3]", "trainer.max_steps=3", "optimizer.lr=1e-2", folder=tmp_path
    )
    again, batch = Run.open(tmp_path), run.window(0).micros[0]
    with torch.no_grad():
        logits = run.model(batch["ids"]).logits
        assert torch.equal(again.model(batch["ids"]).logits, logits)
        torch.testing.assert_close(again.merge()(batch["ids"]).logits, logits, atol=1e-5, rtol=0)
