"""AdaLoRA: triplets under a falling budget, agreeing with `peft` in function, penalty, budgets and choices."""

from __future__ import annotations

import pytest
import torch
from peers import adapter, language_loss, scramble
from peft import AdaLoraConfig, get_peft_model
from tools import SMALL, build, check_resume, train

from ftrecipes.errors import UserError
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/adapters/adalora.py", "torch._foreach_sub_(ipt, self.J)", "torch._foreach_sub_(ipt, self.U)")
KNOBS = {"init_r": 6, "target_r": 2, "alpha": 9, "tinit": 3, "tfinal": 5, "deltaT": 2, "orth_reg_weight": 0.3}
STEPS = 20


def small(*words: str) -> Run:
    knobs = [f"method.adalora.{name}={value}" for name, value in KNOBS.items()]
    return build(
        "method=adalora",
        *SMALL,
        *knobs,
        f"trainer.max_steps={STEPS}",
        "schedule=constant",
        "schedule.warmup=0",
        "optimizer.lr=1e-2",
        *words,
    )


def twin(run: Run):
    config = AdaLoraConfig(
        target_modules=list(adapter(run).deltas), init_r=6, target_r=2, lora_alpha=9, tinit=3, tfinal=5, deltaT=2, total_step=STEPS,
        orth_reg_weight=0.3, lora_dropout=0.0,
    )  # fmt: skip
    model = get_peft_model(run.pristine(), config)
    with torch.no_grad():
        for _, ours, theirs in pairs(run, model):
            theirs.copy_(ours)
    return model


def pairs(run: Run, model):
    for name, delta in adapter(run).deltas.items():
        layer = model.base_model.model.get_submodule(name)
        for own in "ABE":
            yield f"{name}.{own}", getattr(delta, own), getattr(layer, f"lora_{own}")["default"]


def test_the_start_is_the_base_model_and_the_count_is_r_in_plus_out_plus_one():
    run = small()
    batch = run.window(0).micros[0]
    with torch.no_grad():
        assert torch.equal(run.model(batch["ids"]).logits, run.pristine()(batch["ids"]).logits)
    for name, delta in adapter(run).deltas.items():
        rows, cols = delta.layer.shape
        assert sum(p.numel() for n, p in run.trainable().items() if n.startswith(f"{name}.")) == 6 * (rows + cols + 1)
        assert not delta.E.any()
    drawn = torch.cat([p.detach().flatten() for n, p in run.trainable().items() if n.endswith((".A", ".B"))])
    assert abs(float(drawn.std()) / 0.02 - 1) < 0.02


def test_peft_in_function_penalty_gradients_and_merged_weights():
    run = small()
    scramble(run, size=0.3)
    peer = twin(run)
    (batch,) = run.window(0)
    with torch.no_grad():
        torch.testing.assert_close(run.model(batch["ids"]).logits, peer(batch["ids"]).logits, atol=2e-5, rtol=1e-5)
    ours = run.gradients(run.window(0))
    theirs = language_loss(peer.base_model, batch)  # holds the penalty
    theirs.backward()
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-5, rtol=1e-5)
    for name, own, other in pairs(run, peer):
        torch.testing.assert_close(own.grad, other.grad, atol=2e-6, rtol=1e-4, msg=name)
    assert len(run.trainable()) == len([p for p in peer.parameters() if p.requires_grad])
    merged = run.merge().state_dict()
    for name, value in peer.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], value, atol=1e-5, rtol=1e-5, msg=name)


def test_peft_in_budgets_and_choices_at_every_update():
    """Its allocator is given our numbers and gradients at every update, and must come to the same choice all by itself."""
    run = small()
    peer = twin(run)
    allocator = peer.base_model.rankallocator
    method, live = adapter(run), []
    own = method.updated

    def beside(run_: Run) -> None:
        t = run_.step - 1
        with torch.no_grad():
            for _, ours, theirs in pairs(run, peer):
                theirs.copy_(ours)
                theirs.grad = ours.grad.clone()
        own(run_)
        peer.base_model.update_and_allocate(t)
        budget, _ = allocator.budget_schedule(t)
        assert method.budget(run, t) == budget
        for name, ours, theirs in pairs(run, peer):
            torch.testing.assert_close(ours, theirs, atol=0, rtol=0, msg=f"{name} after update {t}")
        live.append(sum(int(d.E.count_nonzero()) for d in method.deltas.values()))

    method.updated = beside
    run.stack.drive(run, run.fit)
    assert live[:4] == [84] * 4 and live[-1] == 28 and live[-6:] == [28] * 6
    allocated = [t for t in range(STEPS) if t > 3 and (t % 2 == 0 or t > STEPS - 5) and t <= STEPS - 5] + [STEPS - 5]
    assert run.events == {"allocations": len(set(allocated))}
    ranks = [int(d.E.count_nonzero()) for d in method.deltas.values()]
    assert len(set(ranks)) > 1, "all layers ended with the same rank"


def test_a_pruned_triplet_comes_back_before_the_choice_is_final_and_not_after():
    run = small("method.adalora.deltaT=5")
    method, seen = adapter(run), []
    own = method.updated

    def watch(run_: Run) -> None:
        own(run_)
        seen.append(torch.cat([d.E.detach()[:, 0] != 0 for d in method.deltas.values()]))

    method.updated = watch
    run.stack.drive(run, run.fit)
    assert int(seen[5].sum()) < int(seen[6].sum())  # pruned after update 5, grown again by the next
    assert all(torch.equal(a, seen[-1]) for a in seen[STEPS - 5 :])


def test_ranks_stand_in_the_record_and_the_merged_update_has_them(tmp_path):
    knobs = [f"method.adalora.{name}={value}" for name, value in KNOBS.items()]
    run = train("method=adalora", *SMALL, *knobs, "trainer.max_steps=12", "optimizer.lr=1e-2", folder=tmp_path)
    ranks = run.results["adalora_ranks"]
    assert sum(ranks.values()) == 28
    for name, delta in adapter(run).deltas.items():
        s = torch.linalg.svdvals(delta.delta().detach().double())
        assert int((s > 1e-9).sum()) == ranks[name]
    again, batch = Run.open(tmp_path), run.window(0).micros[0]
    with torch.no_grad():
        assert torch.equal(again.model(batch["ids"]).logits, run.model(batch["ids"]).logits)


@pytest.mark.parametrize("at", [7, 10])
def test_a_resumed_run_is_bit_equal(tmp_path, at):
    knobs = [f"method.adalora.{name}={value}" for name, value in KNOBS.items()]
    check_resume("method=adalora", *SMALL, *knobs, "trainer.max_steps=12", "optimizer.lr=1e-2", folder=tmp_path, at=at)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["method.adalora.target_r=7"], r"adalora.target_r=7: the budget falls from init_r=6"),
        (["method.adalora.tinit=15"], r"adalora: 20 updates leave none between tinit=15 and the last tfinal=5"),
        (["method.adalora.init_r=65"], r"adalora.init_r=65: .*q_proj is 128 x 64, its rank is at most 64"),
    ],
)
def test_budgets_that_cannot_fall_are_refused(words, text):
    with pytest.raises(UserError, match=text):
        small(*words)
