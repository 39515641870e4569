"""What all adapters share: where they go, that the base stays as it is, merging, and the record."""

from __future__ import annotations

import pytest
import torch
from peers import Matrix, adapter, host, scramble
from safetensors.torch import load_file
from tools import SMALL, build, toy_data, train, weights
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ftrecipes.compose import compose
from ftrecipes.errors import UserError
from ftrecipes.models.base import fingerprint
from ftrecipes.run import Run

MUTATION = (
    "ftrecipes/methods/adapters/delta.py",
    "new = layer.stored(delta.final(layer.weight))",
    "new = layer.stored(delta.final(layer.weight).T)",
)
ADAPTERS = ["lora", "dora", "svft", "periodic_lora", "capaboost", "flora_tucker", "vera", "oft", "adalora"]
RANK = {"svft": [], "oft": ["method.oft.block_size=2"], "adalora": ["method.adalora.init_r=3", "method.adalora.target_r=2"]}
"""What makes an adapter small enough for a tiny layer, where it is not `rank`."""
GPT2 = (
    "model=gpt2", "model.weights=random", "model.architecture={n_layer:2,n_embd:32,n_head:2,vocab_size:1024,bos_token_id:1,eos_token_id:2}",
    "data.max_length=128", *SMALL[3:],
)  # fmt: skip


def logits(run: Run) -> torch.Tensor:
    with run.evaluating():
        return run.model(run.window(0).micros[0]["ids"]).logits


def names(run: Run) -> set[str]:
    """Adapted modules, without what all names share."""
    return {name.removeprefix("model.layers.") for name in adapter(run).deltas}


# -- where adapters go -------------------------------------------------------------------------------------------------

BLOCK = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
THREE = (*SMALL[:2], SMALL[2].replace("num_hidden_layers:2", "num_hidden_layers:3"), *SMALL[3:])


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        ("[all-linear]", BLOCK),
        ("[q]", BLOCK[:1]),
        ("[q,down]", [BLOCK[0], BLOCK[6]]),
        ("[attention]", BLOCK[:4]),
        ("[mlp]", BLOCK[4:]),
        ("['re:(k|v)_proj$']", BLOCK[1:3]),
        ("[o,'re:up_proj']", [BLOCK[3], BLOCK[5]]),
        ("q", BLOCK[:1]),
    ],
)
def test_targets_by_role_group_and_pattern(targets, wanted):
    run = build("method=lora", *SMALL, f"method.lora.targets={targets}")
    assert names(run) == {f"{block}.{name}" for block in (0, 1) for name in wanted}
    assert all(p.requires_grad == (".delta." in n) for n, p in run.model.named_parameters())


@pytest.mark.parametrize(
    ("blocks", "wanted"), [("all", [0, 1, 2]), ("first-1", [0]), ("last-2", [1, 2]), ("[0,2]", [0, 2]), ("[-1]", [2]), ("1", [1])]
)
def test_blocks_by_depth(blocks, wanted):
    run = build("method=lora", *THREE, "method.lora.targets=[q]", f"method.lora.blocks={blocks}")
    assert names(run) == {f"{block}.self_attn.q_proj" for block in wanted}


def test_parts_outside_the_blocks_are_named_by_their_role():
    run = build("method=lora", *SMALL, "method.lora.targets=[embed,head,q]", "method.lora.blocks=first-1")
    assert names(run) == {"model.embed_tokens", "lm_head", "0.self_attn.q_proj"}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["method.lora.targets=[qq]"], r"targets=\['qq'\] .* name nothing in tiny-llama; it has down, embed, gate"),
        (["method.lora.blocks=[7]"], r"blocks=\[7\]: the model has 2 blocks, 0 to 1"),
        (["method.lora.targets=[norm]"], r"lora cannot act on .*norm \(LlamaRMSNorm\); narrow lora.targets"),
        (["method.lora.rank=65"], r"lora.rank=65: model.layers.0.self_attn.q_proj is 128 x 64, its rank is at most 64"),
    ],
)
def test_what_cannot_be_adapted_is_refused_in_one_line(words, text):
    with pytest.raises(UserError, match=text) as caught:
        build("method=lora", *SMALL, *words)
    assert "\n" not in str(caught.value)


def test_a_rank_beyond_the_matrix_is_refused_for_every_low_rank_method():
    for key in ("dora", "periodic_lora", "svft"):
        with pytest.raises(UserError, match=rf"{key}.rank=17: layer is 16 x 16, its rank is at most 16"):
            build(f"method={key}", "model=toy", f"method.{key}.targets=[linear]", f"method.{key}.rank=17")


def test_two_adapters_on_one_weight_are_refused():
    with pytest.raises(UserError, match=r"svft and dora cannot stack: both act on the same weights \(.*\bq\b.*\)"):
        compose(["method=[svft,dora]"])
    # a pattern is known to name the same weight only when the model is there
    with pytest.raises(UserError, match=r"dora: .*q_proj already carries a delta; two adapters cannot share a weight"):
        build("method=[lora,dora]", *SMALL, "method.lora.targets=[q]", "method.dora.targets=['re:q_proj$']")
    run = build("method=[lora,dora]", *SMALL, "method.lora.targets=[q]", "method.dora.targets=[v]")
    assert {type(d).__name__ for m in run.stack for d in m.deltas.values()} == {"LowRank", "Decomposed"}


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.view(-1, 4, 3, 3)).flatten(1)


def test_a_grouped_convolution_is_refused():
    rows = toy_data("grouped", torch.randn(8, 36), torch.randn(8, 4))
    with pytest.raises(UserError, match=r"lora: conv is a grouped convolution; narrow lora.targets"):
        host(Grouped(), "method=lora", f"data={rows}", "method.lora.targets=[conv]")


# -- the function and the merged weight --------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ADAPTERS)
def test_merging_keeps_the_function_and_leaves_a_plain_model(key):
    run = build(f"method={key}", *SMALL)
    scramble(run)
    before, kinds = logits(run), {n: type(m) for n, m in run.pristine().named_modules()}
    assert not torch.allclose(before, run.pristine()(run.window(0).micros[0]["ids"]).logits, atol=1e-2)
    merged = run.merge()
    torch.testing.assert_close(logits(run), before, atol=2e-5, rtol=0)
    assert {n: type(m) for n, m in merged.named_modules()} == kinds
    assert merged.state_dict().keys() == run.pristine().state_dict().keys()


class Scaled(nn.Embedding):
    """An embedding that multiplies what it looks up, as several families' do."""

    embed_scale = 6.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.embed_scale


class Kinds(nn.Module):
    """Every kind of layer that a delta can sit on, with the options that are easy to forget: four tokens in, five numbers out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Scaled(11, 36, padding_idx=0)
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect")
        self.conv1d = Conv1D(7, 6)
        self.out = nn.Linear(7, 5)
        nn.init.normal_(self.conv1d.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(self.embed(x.long()).view(-1, 4, 6, 6)).flatten(2).mean(-1)
        return self.out(torch.tanh(self.conv1d(h)))


NOT = {("svft", "embed"), ("oft", "embed"), ("oft", "out")}  # an odd number of inputs
SEATS = [(key, module) for key in ADAPTERS for module in ("embed", "conv", "conv1d", "out") if (key, module) not in NOT]


@pytest.mark.parametrize(("key", "module"), SEATS)
def test_forward_is_that_of_the_merged_weight_for_every_kind_of_layer(key, module):
    """In float64; and half the strength is half the way, for the function of the layer and for its weight."""
    torch.manual_seed(0)
    rows = toy_data("kinds", torch.randint(0, 11, (16, 4)).double(), torch.randn(16, 5))
    words = (
        f"method={key}",
        f"data={rows}",
        f"method.{key}.targets=['re:^{module}$']",
        *RANK.get(key, [f"method.{key}.rank=3"]),
    )
    model = Kinds().double()
    for strength in (1.0, 0.5):
        run = host(model, *words)
        scramble(run, size=0.5)
        (delta,) = adapter(run).deltas.values()
        assert {p.dtype for p in delta.parameters()} == {torch.float64}
        delta.strength = strength
        x = torch.stack([run.data["train"][i]["x"] for i in range(16)])
        with run.evaluating():
            before = run.model(x)
        start = model.get_submodule(module).weight.detach()
        now = run.merge().get_submodule(module).weight
        assert now.shape == start.shape and (now - start).abs().max() > 1e-2
        with run.evaluating():
            torch.testing.assert_close(run.model(x), before, atol=1e-10, rtol=0)
        if strength == 1.0:
            whole = now - start
        else:
            torch.testing.assert_close(now - start, 0.5 * whole, atol=1e-10, rtol=0)


def test_svft_says_that_it_does_not_act_on_embeddings():
    with pytest.raises(UserError, match=r"svft cannot act on model.embed_tokens \(Embedding\); narrow svft.targets"):
        build("method=svft", *SMALL, "method.svft.targets=[embed]")


@pytest.mark.parametrize("key", ADAPTERS)
def test_gpt2_s_transposed_weights(key):
    run = build(f"method={key}", *GPT2, f"method.{key}.targets=[all-linear]")
    assert {type(d.layer.module).__mro__[2] for d in adapter(run).deltas.values()} == {Conv1D}
    assert {name.split(".")[-1] for name in adapter(run).deltas} == {"c_attn", "c_proj", "c_fc"}
    shapes = {d.layer.shape for d in adapter(run).deltas.values()}
    assert (96, 32) in shapes and (128, 32) in shapes and (32, 128) in shapes  # outputs x inputs
    scramble(run)
    before = logits(run)
    run.merge()
    torch.testing.assert_close(logits(run), before, atol=2e-5, rtol=0)


@pytest.mark.parametrize("key", ["lora", "dora"])
def test_a_16_bit_base_is_merged_in_float32_and_rounded_once(key):
    run = build(f"method={key}", *SMALL, "model.dtype=bfloat16", "hardware.precision=bf16-mixed")
    scramble(run, size=0.02)
    wanted = {}
    for name, delta in adapter(run).deltas.items():
        assert {p.dtype for p in delta.parameters()} == {torch.float32}
        with torch.no_grad():
            exact = delta.layer.raw.double() + delta.scale * delta.B.double() @ delta.A.double()
            if key == "dora":
                exact *= (delta.m.double() / exact.norm(dim=1))[:, None]
        wanted[name] = exact
    merged = run.merge()
    for name, exact in wanted.items():
        now = merged.get_submodule(name).weight
        assert now.dtype == torch.bfloat16
        # a sum in 16 bits would round the update first, and be a unit off in many places
        assert (now != exact.bfloat16()).float().mean() < 1e-3, name


# -- tied weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["lora", "dora"])
@pytest.mark.parametrize("targets", ["[embed]", "[head]", "[embed,head]"])
def test_tied_weights_part_where_one_side_is_adapted(key, targets, tmp_path):
    run = build(f"method={key}", *SMALL, f"method.{key}.targets={targets}")
    shared = run.model.model.embed_tokens.weight
    assert run.model.lm_head.weight is shared
    scramble(run)
    before, base = logits(run), shared.detach().clone()
    merged = run.merge()
    torch.testing.assert_close(logits(run), before, atol=2e-5, rtol=0)
    assert torch.equal(merged.model.embed_tokens.weight, base) == ("embed" not in targets)
    assert torch.equal(merged.lm_head.weight, base) == ("head" not in targets)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(run.window(0).micros[0]["ids"]).logits, before, atol=2e-5, rtol=0)


def test_tied_weights_stay_tied_where_neither_is_adapted():
    run = build("method=lora", *SMALL)
    merged = run.merge()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and merged.config.tie_word_embeddings


# -- training and the record -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["lora", "dora", "svft"])
def test_the_base_stays_bit_equal_and_the_record_holds_none_of_it(key, tmp_path):
    run = train(f"method={key}", *SMALL, "trainer.max_steps=4", "optimizer.lr=1e-2", folder=tmp_path)
    base = dict(run.pristine().named_parameters())
    for name, parameter in run.model.named_parameters():
        if ".delta." not in name:
            assert torch.equal(parameter, base[name]), name
    saved = load_file(tmp_path / "tuned" / "weights.safetensors")
    assert set(saved) == set(run.trainable()) and all(".delta." in name for name in saved)
    again = Run.open(tmp_path, data=True)
    assert torch.equal(logits(again), logits(run))
    assert not torch.equal(logits(run), run.pristine().eval()(run.window(0).micros[0]["ids"]).logits)
    again.merge()
    torch.testing.assert_close(logits(again), logits(run), atol=2e-5, rtol=0)


def test_a_record_of_a_merged_strength_opens_at_that_strength(tmp_path):
    run = train("method=[lora,wise_ft]", *SMALL, "trainer.max_steps=4", "optimizer.lr=1e-2", "method.wise_ft.alpha=[0.25]", folder=tmp_path)
    assert {d.strength for d in adapter(run).deltas.values()} == {0.25}
    again = Run.open(tmp_path, data=True)
    assert {d.strength for d in adapter(again).deltas.values()} == {0.25}
    assert torch.equal(logits(again), logits(run))


@pytest.mark.parametrize("key", ADAPTERS)
def test_checkpointing_changes_no_gradient(key):
    found = []
    for word in ("false", "true"):
        run = build(f"method={key}", *SMALL, f"hardware.checkpointing={word}")
        scramble(run)
        run.model.train()
        loss = run.gradients(run.window(0))
        found.append((loss, {n: p.grad.clone() for n, p in run.trainable().items()}))
    assert run.model.is_gradient_checkpointing
    torch.testing.assert_close(found[0], found[1], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("key", ADAPTERS)
def test_mixed_precision_is_finite_and_close(key, dtype, tmp_path):
    steady = ("optimizer.lr=1e-3", "schedule.warmup=0", f"method={key}")
    mixed = build(*SMALL, *steady, f"model.dtype={dtype}", "hardware.precision=bf16-mixed")
    mixed.pristine().save_pretrained(tmp_path)
    mixed.task.tokenizer.save_pretrained(tmp_path)
    exact = build("model=tiny-llama", f"model.path={tmp_path}", *SMALL[3:], *steady, "model.dtype=float32")
    for run in (exact, mixed):
        scramble(run)
    for run in (exact, mixed):
        run.value = run.gradients(run.window(0))
    assert abs(float(mixed.value / exact.value) - 1) < 0.01
    for name, parameter in mixed.trainable().items():
        assert parameter.dtype == torch.float32 and parameter.grad.isfinite().all()
        other = exact.trainable()[name].grad
        assert torch.cosine_similarity(parameter.grad.flatten(), other.flatten(), dim=0) > 0.95, name
    mixed.fit(3)
    assert all(p.isfinite().all() for p in mixed.trainable().values())


def test_gradients_do_not_depend_on_how_a_window_is_split():
    whole, split = (build("method=dora", *SMALL, f"hardware.micro_batch={n}") for n in (8, 3))
    for run in (whole, split):
        scramble(run)
        run.gradients(run.window(0))
    assert (len(whole.window(0)), len(split.window(0))) == (1, 3)
    for name, parameter in whole.trainable().items():
        torch.testing.assert_close(split.trainable()[name].grad, parameter.grad, atol=1e-7, rtol=1e-4)


def test_nothing_is_allocated_without_weights():
    """Counts of a model of eight billion numbers, with nothing loaded."""
    for key in ADAPTERS:
        run = Run(compose([f"method={key}", "model=llama3-8b"]))
        run.load_model(meta=True)
        run.prepare()
        assert {p.device.type for p in run.model.parameters()} == {"meta"}
        assert sum(p.numel() for p in run.trainable().values()) > 10**6


def test_a_float64_weight_is_merged_in_float64():
    W = torch.randn(8, 8, dtype=torch.float64)
    run = host(Matrix(W), "method=lora", f"data={toy_data('exact', torch.eye(8), torch.randn(8, 8))}", "method.lora.targets=[linear]")
    assert torch.equal(run.merge().layer.weight, W)
    assert fingerprint(run.model) == fingerprint(Matrix(W))


def test_seeds_decide_the_start():
    first, again, other = (weights(build("method=lora", *SMALL, f"seed={seed}")) for seed in (3, 3, 4))
    name = "model.layers.0.self_attn.q_proj.delta.A"
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first[name.replace("layers.0", "layers.1")])
