"""What belongs to a run whatever its method: optimizers, schedules, precision, keep-best, early stopping, the record."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tools import SMALL, build, train, weights

from ftrecipes import optim
from ftrecipes.compose import compose
from ftrecipes.errors import RunFailed, UserError
from ftrecipes.record import Record
from ftrecipes.run import Run
from ftrecipes.update import Scaler


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "lion", "muon"])
def test_every_optimizer_lowers_the_loss(name: str, tmp_path: Path) -> None:
    run = train(
        "method=full",
        *SMALL,
        f"optimizer={name}",
        f"optimizer.lr={ {'sgd': 0.5, 'adafactor': 0.1}.get(name, 3e-3) }",
        "trainer.max_steps=12",
        folder=tmp_path,
    )
    rows = [r for r in Record(tmp_path).metrics() if "loss" in r]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2
    assert run.step == 12


def test_adamw_is_torch_adamw() -> None:
    run = build(
        "method=full",
        *SMALL,
        "optimizer.weight_decay=0.1",
        "optimizer.lr=1e-3",
        "schedule=constant",
        "schedule.warmup=0",
        "trainer.clip=.inf",
    )
    other = build("method=full", *SMALL)
    groups = [
        {"params": [p for p in other.trainable().values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in other.trainable().values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    peer = torch.optim.AdamW(groups, lr=1e-3)
    for step in range(3):
        other.step = step
        other.gradients(other.window(step))
        peer.step()
    run.fit(3)
    for name, p in run.trainable().items():
        torch.testing.assert_close(p, other.trainable()[name], rtol=1e-6, atol=1e-7)


def test_muon_takes_matrices_of_blocks_only() -> None:
    run = build("method=full", *SMALL, "optimizer=muon")
    together = run.build_optimizer()
    assert isinstance(together, optim.Together)
    muon = together.parts[0]
    in_muon = {id(p) for g in muon.param_groups for p in g["params"]}
    named = run.trainable()
    assert id(named["model.layers.0.mlp.up_proj.weight"]) in in_muon
    assert id(named["model.embed_tokens.weight"]) not in in_muon and id(named["model.norm.weight"]) not in in_muon


@pytest.mark.parametrize(
    ("knobs", "at"),
    [
        ({"name": "constant", "warmup": 0}, {0: 1.0, 99: 1.0}),
        ({"name": "linear", "warmup": 10, "end": 0.0}, {10: 1.0, 55: 0.5}),
        ({"name": "linear", "warmup": 0, "end": 0.2}, {0: 1.0, 50: 0.6}),
        ({"name": "cosine", "warmup": 0, "end": 0.0}, {0: 1.0, 50: 0.5, 25: 0.5 * (1 + math.cos(math.pi / 4))}),
        ({"name": "wsd", "warmup": 0.1, "decay": 0.2, "end": 0.0}, {10: 1.0, 79: 1.0, 90: 0.5}),
    ],
)
def test_schedules(knobs: dict[str, Any], at: dict[int, float]) -> None:
    for step, value in at.items():
        assert optim.factor(knobs, step, 100) == pytest.approx(value, abs=1e-9)
    if knobs["warmup"]:
        warm = [optim.factor(knobs, s, 100) for s in range(10)]
        assert warm == sorted(warm) and 0 < warm[0] < 0.2 and warm[-1] < 1


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16", "16-mixed"])
def test_precision_follows_float32(precision: str) -> None:
    exact = build("method=lora", *SMALL, "method.lora.dropout=0")
    loose = build("method=lora", *SMALL, f"hardware.precision={precision}")
    if precision == "bf16":
        assert loose.model.get_parameter("model.layers.0.mlp.up_proj.weight").dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for n, p in loose.trainable().items() if ".delta." in n) or precision == "bf16"
    exact.fit(4)
    loose.fit(4)
    with torch.no_grad():
        a, b = exact.evaluate("validation")["nll"], loose.evaluate("validation")["nll"]
    assert a == pytest.approx(b, rel=0.02)


def test_overflow_in_float16_skips_the_update_and_halves_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    run = build("method=lora", *SMALL, "hardware.precision=16-mixed")
    assert run.update.scaler is not None
    run.update.scaler.scale = 2.0**40  # every gradient overflows at first
    before = weights(run)
    run.fit(1)
    assert run.events["overflow"] == 1 and run.update.scaler.scale == 2.0**39
    assert all(p.equal(before[n]) for n, p in run.model.named_parameters())


def test_scaler_doubles_after_good_steps() -> None:
    scaler = Scaler(scale=8.0, interval=3)
    for finite in (True, True, False, True, True, True):
        scaler.record(finite)
    assert scaler.scale == 8.0  # halved once, doubled once


def test_checkpointing_changes_nothing() -> None:
    plain = build("method=full", *SMALL)
    saving = build("method=full", *SMALL, "hardware.checkpointing=true")
    plain.gradients(plain.window(0))
    saving.gradients(saving.window(0))
    for name, p in plain.trainable().items():
        torch.testing.assert_close(p.grad, saving.trainable()[name].grad)


def test_clipping_bounds_the_norm() -> None:
    run = build("method=full", *SMALL, "optimizer=sgd", "optimizer.lr=1.0", "schedule=constant", "schedule.warmup=0", "trainer.clip=0.01")
    before = weights(run)
    run.fit(1)
    moved = math.sqrt(sum(float((p - before[n]).square().sum()) for n, p in run.trainable().items()))
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_keep_best_ends_with_the_best_weights(tmp_path: Path) -> None:
    # a rate so high that the last validation is not the best one
    words = [
        "method=full",
        *SMALL,
        "trainer.max_steps=12",
        "trainer.eval_every=2",
        "trainer.monitor=nll",
        "optimizer.lr=0.03",
        "schedule=constant",
    ]
    run = train(*words, "trainer.keep_best=true", folder=tmp_path)
    rows = [r["validation/nll"] for r in Record(tmp_path).metrics() if "validation/nll" in r]
    info = Record(tmp_path).info["results"]
    assert info["after"]["validation"]["nll"] == pytest.approx(min(rows), abs=1e-6)
    assert info["best"]["step"] == 2 * (rows.index(min(rows)) + 1)
    assert rows[-1] > min(rows) + 1e-3, "the case is only telling when the end is worse"
    assert run.evaluate("validation")["nll"] == pytest.approx(min(rows), abs=1e-6)


def test_patience_stops_early(tmp_path: Path) -> None:
    words = [
        "method=full",
        *SMALL,
        "trainer.max_steps=40",
        "trainer.eval_every=1",
        "trainer.monitor=nll",
        "optimizer.lr=0.1",
        "schedule=constant",
    ]
    run = train(*words, "trainer.patience=3", folder=tmp_path)
    assert run.step < 40 and run.events["early_stop"] == 1
    assert Record(tmp_path).info["status"] == "done"


def test_epochs_and_overfit(tmp_path: Path) -> None:
    assert build("method=lora", *SMALL, "trainer.epochs=2").planned_steps == 2 * 64 // 8
    run = train("method=full", *SMALL, "trainer.overfit=4", "trainer.batch=4", "trainer.max_steps=40", "optimizer.lr=3e-3", folder=tmp_path)
    assert len(run.data["train"]) == 4 and run.data["test"].raw is run.data["train"].raw
    assert run.evaluate("test")["exact_match"] == 1.0


def test_also_train_adds_roles() -> None:
    run = build("method=lora", *SMALL, "model.also_train=[norm]")
    names = set(run.trainable())
    assert "model.norm.weight" in names and "model.layers.0.input_layernorm.weight" in names
    assert "model.layers.0.mlp.up_proj.weight" not in names
    with pytest.raises(UserError, match="also_train"):
        build("method=lora", *SMALL, "model.also_train=[nrom]")


def test_checkpoints_are_kept_as_asked(tmp_path: Path) -> None:
    train("method=lora", *SMALL, "trainer.max_steps=10", "trainer.checkpoint_every=2", "trainer.keep=2", folder=tmp_path)
    assert len(Record(tmp_path).checkpoints()) == 2


def test_two_processes_cannot_write_one_run(tmp_path: Path) -> None:
    Record(tmp_path).lock()
    first = Record(tmp_path / "a")
    first.lock()
    with pytest.raises(UserError, match="another process"):
        Record(tmp_path / "a").lock()


def test_a_record_of_another_base_is_refused(tmp_path: Path) -> None:
    train("method=lora", *SMALL, "trainer.max_steps=1", folder=tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("\nseed: 0", "\nseed: 5"))  # random weights of another seed
    with pytest.raises(UserError, match="another base"):
        Run.open(tmp_path)


def test_a_pickled_state_is_refused(tmp_path: Path) -> None:
    import pickle

    from ftrecipes.storage import read_state

    class Evil:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").touch, ())

    (tmp_path / "state.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"refused|cannot be read"):
        read_state(tmp_path / "state.pt")
    torch.save({"a": Evil()}, tmp_path / "zip.pt")
    with pytest.raises(UserError, match="run code"):
        read_state(tmp_path / "zip.pt")
    assert not (tmp_path / "ran").exists()


def test_monitor_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"trainer.monitor=accuracy: validation gives .*exact_match"):
        train("method=lora", *SMALL, "trainer.max_steps=2", "trainer.eval_every=1", "trainer.monitor=accuracy", folder=tmp_path)
    assert Record(tmp_path).info["status"] == "failed"


def test_settings_say_where_values_come_from() -> None:
    settings = compose(["method=[dora,dft]", "trainer.batch=4"])
    assert settings.origin["optimizer.lr"] == "dora, tiny" and "trainer.batch" not in settings.origin
    assert any("dft would have" in s for s in settings.overridden)
    assert compose(["method=lora", "model=llama3-8b"]).origin["optimizer.lr"] == "lora, paper"
    assert any("no data= was given" in n for n in compose(["model=llama3-8b"]).notes)
    assert not compose(["model=llama3-8b", "data=storyqa"]).notes


def test_hash_leaves_out_what_changes_no_number() -> None:
    base = compose(["method=lora"]).hash
    assert compose(["method=lora", "logger=none", "trainer.keep=3", "resume=auto", "tags=[a]"]).hash == base
    assert compose(["method=lora", "seed=1"]).hash != base
    assert compose(["method=lora", "hardware.precision=bf16"]).hash != base


def logged(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: a LevelDB log of 32 KiB blocks behind a header of 7 bytes."""
    data, at, part = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield part
            part = b""


def test_weights_and_biases_offline_holds_config_and_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    train("method=[dora,dft]", *SMALL, "logger=wandb", "trainer.max_steps=3", "tags=[first]", folder=tmp_path / "run")
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    from wandb.proto import wandb_internal_pb2

    def parsed(data: bytes) -> Any:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        return record

    config: dict[str, Any] = {}
    history: set[str] = set()
    tags: set[str] = set()
    until = time.monotonic() + 60  # a process of W&B's own writes the file, and goes on after the run was finished
    while not (records := [parsed(data) for data in logged(file)]) or not records[-1].HasField("exit"):
        assert time.monotonic() < until, [record.WhichOneof("record_type") for record in records]
        time.sleep(0.1)
    for record in records:
        if record.HasField("run"):
            tags |= set(record.run.tags)
            config |= {c.key: json.loads(c.value_json) for c in record.run.config.update}
        history |= {i.key or ".".join(i.nested_key) for i in record.history.item}
    assert {"dora", "dft", "tiny-llama", "storyqa", "first"} <= tags
    assert config["method"]["dora"]["rank"] == 8
    assert {"loss", "lr", "grad_norm"} <= history
