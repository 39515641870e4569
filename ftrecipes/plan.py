"""What a run would train and cost, with nothing loaded.

The model is built without memory (meta device), the methods prepare on it, and one forward and backward pass of a
micro-batch is traced on fake tensors: every operation is counted, and every storage while it lives, so activations are
those of the real graph, adapters, checkpointing and mixed precision included.
"""

from __future__ import annotations

import json
import time
import weakref
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ftrecipes.errors import UserError
from ftrecipes.run import Run
from ftrecipes.update import Window

if TYPE_CHECKING:
    from ftrecipes.compose import Settings

GIB = 2**30
STATES = {"adamw": 2.0, "sgd": 0.0, "adafactor": 0.01, "lion": 1.0, "muon": 1.0}
"""Optimizer state in numbers a trainable number (sgd without momentum; adafactor keeps rows and columns)."""
GPU_RATES = {"H100": 600e12, "H200": 600e12, "A100": 220e12, "L40S": 250e12, "4090": 130e12, "A10": 60e12, "T4": 25e12, "V100": 70e12}
"""Rates that matrix products of this size reach, FLOP/s in 16 bits."""


@dataclass
class Plan:
    """Counts, bytes and operations of a run.

    roles: trainable and total numbers by role. memory: bytes by kind at the peak of an update. flops: of one update.
    """

    methods: list[str]
    model: str
    trainable: int
    total: int
    roles: dict[str, tuple[int, int]]
    memory: dict[str, int]
    flops: float
    forward_flops: float
    tokens: int
    micro_batch: int
    length: int
    steps: int | None
    device: str
    available: int
    seconds: float | None
    settings: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.available


class Live(TorchDispatchMode):
    """Bytes of the storages that live, and their peak; what existed before does not count."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {t.untyped_storage()._cdata for t in known}

    def _free(self, key: int, size: int) -> None:
        self.now -= size
        self._seen.discard(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._seen:
                    self._seen.add(key)
                    size = storage.nbytes()
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, key, size)
        return out


def plan(settings: Settings) -> Plan:
    """The plan of a run."""
    run = Run(settings)
    run.load_model(meta=True)
    run.prepare()
    run.stack.begin(run)
    model = run.model
    trainable = run.trainable()
    total = dict(model.named_parameters())
    frozen = sum(_bytes(p) for n, p in total.items() if n not in trainable)
    learned = sum(_bytes(p) for p in trainable.values())
    base = {n: p for n, p in total.items() if n in run.base_names}
    extra = sum(_bytes(b) for n, b in model.named_buffers() if n not in run.base_names)
    length = getattr(run.task, "positions", None) or settings.data.get("max_length") or 1
    batch = settings.trainer.batch
    micro = settings.hardware.micro_batch
    per_pass = int(micro) if micro != "auto" else max(1, min(batch, run.budget // max(1, length * (1 + run.task.alternatives))))
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # tables of a task stay real
    with fake:
        for held in (model, *run.held):
            to_fake(held)
        trace, flops, forward = _trace(run, run.task.blank(per_pass, length))
    passes = batch / per_pass
    backward = run.stack.gradients_used
    states = STATES.get(settings.optimizer.name, 2.0) if backward else 0.0
    if settings.optimizer.name == "sgd" and settings.optimizer.momentum:
        states = 1.0
    active = sum(_bytes(p) for p in run.active().values())
    gradients = active if backward else 0
    memory = {
        "weights": frozen + learned,
        "of the methods": extra,
        "gradients": gradients,
        "optimizer": int(states * active),
        "activations": max(0, trace - gradients),
    }
    for method in run.stack:
        for kind, size in method.holds(run).items():
            memory[kind] = size if kind == "optimizer" else memory.get(kind, 0) + size
    if run.held:
        memory["further models"] = sum(_bytes(p) for held in run.held for p in held.parameters())
    roles: dict[str, tuple[int, int]] = {}
    names = {part.name: part.role for part in run.anatomy.parts}
    for name, parameter in total.items():
        owner = name.rpartition(".")[0]
        while owner and owner not in names:
            owner = owner.rpartition(".")[0]
        role = names.get(owner, "other")
        now = roles.get(role, (0, 0))
        roles[role] = (now[0] + parameter.numel() * (name in trainable), now[1] + parameter.numel() * (name in base))
    rate, device = speed(run)
    by_method = run.stack.owner["optimizer"] or (None if backward else run.stack.owner["step"])
    return Plan(
        methods=list(settings.method),
        model=settings.model.name,
        trainable=sum(p.numel() for p in trainable.values()),
        total=sum(p.numel() for p in base.values()),
        roles=roles,
        memory=memory,
        flops=flops * passes,
        forward_flops=forward * passes,
        tokens=batch * length,
        micro_batch=per_pass,
        length=length,
        steps=settings.trainer.max_steps,
        device=device,
        available=available(run),
        seconds=None if rate is None else flops * passes / rate,
        settings={
            "batch": batch,
            "precision": run.precision,
            "optimizer": f"{by_method.key}'s own" if by_method else settings.optimizer.name,
        },
        remarks=run.remarks,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def to_fake(model: nn.Module) -> None:
    """Every parameter and buffer as a fake CPU tensor; shared ones stay shared."""
    known: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Any:
        if id(tensor) not in known:
            made = torch.empty(tensor.shape, dtype=tensor.dtype)
            known[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
        return known[id(tensor)]

    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = fake(parameter)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = fake(buffer)


def _trace(run: Run, batch: dict[str, Any]) -> tuple[int, float, float]:
    """Peak bytes that a micro-batch's passes hold beyond the weights, operations of both passes, and of the forward one."""
    model = run.model.train()
    run._trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    run.device = torch.device("cpu")
    known = [t for held in (model, *run.held) for t in (*held.parameters(), *held.buffers())]
    live, both = Live(known), FlopCounterMode(display=False)
    window = Window([batch], float(run.task.count(batch)))
    with live, both:
        if run.stack.gradients_used:
            run.gradients(window)
        else:
            run.loss(window)
    total = both.get_total_flops()
    with FlopCounterMode(display=False) as once:
        run.loss(window)
    forward = once.get_total_flops()
    return live.peak, total if run.stack.gradients_used else 2 * forward, forward


def available(run: Run) -> int:
    """Bytes of memory that a run can have: as said, of the GPU, or what this machine has free."""
    said = run.settings.hardware.memory
    if said is not None:
        return parse_size(said)
    if run.device.type == "cuda":
        return int(torch.cuda.get_device_properties(run.device).total_memory)
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def parse_size(text: Any) -> int:
    """`24GB`, `24GiB` or a number of GiB as bytes."""
    units = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6, "g": 2**30}
    word = str(text).strip().lower()
    for unit, size in units.items():
        if word.endswith(unit):
            word, factor = word[: -len(unit)], size
            break
    else:
        factor = 2**30
    try:
        return int(float(word) * factor)
    except ValueError:
        raise UserError(f"hardware.memory={text}: write a size such as 24GB") from None


def speed(run: Run) -> tuple[float | None, str]:
    """FLOP/s that this machine reaches on products of a model's size, and what it is called."""
    if run.device.type == "cuda":
        name = torch.cuda.get_device_name(run.device)
        return next((rate for word, rate in GPU_RATES.items() if word in name), None), name
    size = 768
    a = torch.randn(size, size)
    a @ a
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    return (
        0.6 * 2 * size**3 / best,
        f"this CPU ({torch.get_num_threads()} threads, {2 * size**3 / best / 1e9:.0f} GFLOP/s on a product of {size})",
    )


def show_plan(words: list[str], as_json: bool) -> None:
    """`ftr plan`: compose, plan, print."""
    from ftrecipes.compose import compose
    from ftrecipes.run import quiet

    quiet()
    settings = compose(words)
    found = plan(settings)
    if as_json:
        print(json.dumps({**asdict(found), "peak": found.peak, "fits": found.fits}, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False, width=None if Console().is_terminal else 120)
    out.print(
        f"[bold]{'+'.join(found.methods)}[/] on {found.model}: {found.trainable:,} of {found.total:,} numbers train ({100 * found.trainable / found.total:.4f} %)"
    )
    for sentence in [*settings.overridden, *found.remarks]:
        out.print(f"note: {sentence}", markup=False)
    roles = Table(box=None, header_style="dim")
    for column in ("role", "trains", "of"):
        roles.add_column(column, justify="left" if column == "role" else "right")
    for role, (trains, of) in sorted(found.roles.items(), key=lambda item: -item[1][1]):
        roles.add_row(role, f"{trains:,}", f"{of:,}")
    out.print(roles)
    memory = Table(box=None, header_style="dim")
    memory.add_column("memory of an update")
    memory.add_column("GiB", justify="right")
    for kind, size in found.memory.items():
        memory.add_row(kind, f"{size / GIB:.2f}")
    memory.add_row("[bold]peak[/]", f"[bold]{found.peak / GIB:.2f}[/]")
    out.print(memory)
    out.print(
        f"{found.settings['batch']} examples an update of up to {found.length} positions, {found.micro_batch} at a time, "
        f"{found.settings['precision']}, {found.settings['optimizer']}: {found.flops / 1e12:.3g} TFLOP an update"
    )
    if found.seconds is not None:
        whole = f", {_duration(found.seconds * found.steps)} for {found.steps} updates" if found.steps else ""
        out.print(f"about {_duration(found.seconds)} an update{whole} at full length on {found.device}")
    verdict = "fits" if found.fits else "does not fit"
    out.print(f"[bold]{verdict}[/] in {found.available / GIB:.1f} GiB")
    if not found.fits:
        out.print("to make it fit: " + "; ".join(remedies(settings, found)), markup=False)


def remedies(settings: Settings, found: Plan) -> list[str]:
    """Settings that would lower the peak, the largest part first."""
    out = []
    if found.memory["activations"] > found.peak / 5:
        if found.micro_batch > 1:
            out.append("hardware.micro_batch=1")
        if not settings.hardware.checkpointing:
            out.append("hardware.checkpointing=true")
        out.append(f"data.max_length={found.length // 2}")
    if found.memory["optimizer"] + found.memory["gradients"] > found.peak / 5:
        out.append("a method that trains less (method=lora, lisa, mezo)")
    if found.memory["weights"] > found.peak / 3 and found.settings["precision"] == "32":
        out.append("hardware.precision=bf16")
    return out or ["a smaller model"]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
