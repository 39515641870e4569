"""Bad input of every kind: one line that says what, where and what to do; exit code 2; nothing left behind.

`python tests/test_bad_input.py` prints the table.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from processes import ftr
from tools import SMALL


@dataclass
class Bad:
    """What is typed in a folder that `make` prepared, words of the line that must be printed, and the exit code."""

    words: list[str]
    says: list[str]
    make: Callable[[Path], object] = lambda folder: None
    code: int = 2
    before: Callable[[], None] | None = None
    leaves: set[str] = field(default_factory=set)
    light: bool = True  # known without torch


def model_folder(folder: Path) -> Path:
    """A tiny Llama in the hub's format."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from ftrecipes.models.base import PACKAGED

    place = folder / "model"
    config = LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(place)
    AutoTokenizer.from_pretrained(PACKAGED / "tiny-llama").save_pretrained(place)
    return place


def truncated(folder: Path) -> None:
    file = model_folder(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    place = model_folder(folder)
    (place / "model.safetensors").unlink()
    (place / "pytorch_model.bin").write_bytes(pickle.dumps({"a": os.getcwd}))


def no_template(folder: Path) -> None:
    place = model_folder(folder)
    (place / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((place / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (place / "tokenizer_config.json").write_text(json.dumps(config))


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).parent.mkdir(parents=True, exist_ok=True) or (folder / name).write_text(text)


def read_only(folder: Path) -> None:
    (folder / "outputs").write_text("a file where the folder should be")


def small_disk() -> None:
    """A disk that takes no more than 200 kB a file."""
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


FILE = "data=file"
QUICK = [*SMALL, "trainer.max_steps=2"]
LOCAL = ["model=tiny-llama", "model.path=model", "trainer.max_steps=1", "trainer.batch=2", "data.size=8", "trainer.eval_examples=2"]
BAD: dict[str, Bad] = {
    # names and values
    "unknown method": Bad(["method=lroa"], ["unknown method 'lroa'", "'lora'"]),
    "unknown method in a stack": Bad(["method=[lora,dtf]"], ["unknown method 'dtf'", "'dft'"]),
    "unknown model": Bad(["model=tinyllama"], ["unknown model 'tinyllama'", "'tiny-llama'"]),
    "unknown data set": Bad(["data=storyq"], ["unknown data 'storyq'", "'storyqa'"]),
    "unknown optimizer": Bad(["optimizer=adam"], ["unknown optimizer 'adam'", "adamw"]),
    "unknown recipe": Bad(["recipe=pretrain/tiny_lama"], ["unknown recipe", "pretrain/tiny_llama"]),
    "unknown key": Bad(["optimizer.lrr=1e-3"], ["unknown setting 'optimizer.lrr'", "optimizer.lr"]),
    "unknown key of a method": Bad(["method.lora.rnak=4"], ["method.lora.rnak", "method.lora.rank"]),
    "unknown group": Bad(["modle=tiny-llama"], ["unknown setting 'modle'", "model"]),
    "key of a method that is not there": Bad(["method=svft", "method.lora.rank=4"], ["lora is not in the stack", "method=[svft,lora]"]),
    "wrong type": Bad(["optimizer.lr=fast"], ["optimizer.lr", "a number", "'fast'"]),
    "fraction for a whole number": Bad(["trainer.batch=2.5"], ["trainer.batch", "whole number"]),
    "out of range": Bad(["method.lora.dropout=1.0"], ["method.lora.dropout", "below 1"]),
    "negative": Bad(["optimizer.lr=-1"], ["optimizer.lr", "at least 0"]),
    "not a choice": Bad(["method=svft", "method.svft.pattern=bandd"], ["method.svft.pattern", "'banded'"]),
    "bad item of a list": Bad(["optimizer.betas=[0.9,1.5]"], ["optimizer.betas", "1.5", "below 1"]),
    "null where a value is needed": Bad(["model=null"], ["a run needs a model"]),
    "empty stack": Bad(["method=[]"], ["method is empty", "method=full"]),
    "unreadable word": Bad(["method lora"], ["cannot read 'method lora'"]),
    "two values without -m": Bad(["seed=0,1"], ["-m"]),
    "nothing can be deleted": Bad(["~optimizer"], ["nothing can be deleted"]),
    # stacking
    "two adapters on one weight": Bad(["method=[svft,dora]"], ["svft and dora cannot stack", "same weights"]),
    "full beside an adapter": Bad(["method=[lora,full]"], ["lora and full cannot stack"]),
    "two owners of the update": Bad(["method=[mezo,gmt]"], ["mezo computes no gradients", "gmt"]),
    "optimizer beside its owner": Bad(["method=lift", "optimizer=lion"], ["lift brings its own optimizer"]),
    "a paper of another domain": Bad(["method=dft", "model=toy"], ["dft is for", "toy"]),
    "pairs for a method that needs them": Bad(["method=dpo", "data=storyqa"], ["dpo learns from chosen and rejected", "data=storypairs"]),
    "a loss beside weights": Bad(["method=[asft,dft]"], ["asft and dft cannot stack", "asft replaces the loss"]),
    "data of another domain": Bad(["model=toy", "data=storyqa"], ["storyqa is for causal-lm", "toy"]),
    # code in configs
    "_target_ on the command line": Bad(["+x._target_=os.system"], ["_target_", "configs are data"]),
    "_target_ in a value": Bad(["+x={_target_: os.system}"], ["_target_"]),
    "a hydra callback": Bad(["+hydra.callbacks.x.y=1"], ["hydra.callbacks", "cannot be set"]),
    "logging that names code": Bad(["+hydra.job_logging.handlers.x.class=os.system"], ["hydra.job_logging", "cannot be set"]),
    "_target_ in a recipe": Bad(
        ["--config-dir", "mine", "+recipe=evil"],
        ["_target_"],
        make=write("mine/recipe/evil.yaml", '# @package _global_\nx: {"\\x5ftarget_": os.system}\n'),
    ),
    "a hydra callback in a recipe": Bad(
        ["--config-dir", "mine", "+recipe=evil"],
        ["hydra.callbacks"],
        make=write("mine/recipe/evil.yaml", "# @package _global_\nhydra: {callbacks: {x: {_target_: os.system}}}\n"),
    ),
    "a code search path": Bad(["hydra.searchpath=[pkg://os]"], ["hydra.searchpath", "file://"]),
    "one bad point of a sweep": Bad(["-m", "method=lora,svft", "optimizer.lr=1e-3,-1", *QUICK], ["optimizer.lr", "at least 0"]),
    # files
    "missing data file": Bad([FILE, "data.path=no.jsonl"], ["no.jsonl"]),
    "malformed row": Bad(
        [FILE, "data.path=a.jsonl"], ["a.jsonl:2"], make=write("a.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt": \n')
    ),
    "missing column": Bad(
        [FILE, "data.path=a.jsonl", "data.columns={response: anwser}"],
        ["anwser", "answer"],
        make=write("a.jsonl", '{"prompt": "a", "answer": "b"}\n'),
    ),
    "empty data set": Bad([FILE, "data.path=a.jsonl"], ["a.jsonl", "holds no example"], make=write("a.jsonl", "")),
    "missing model folder": Bad(["model.path=nowhere"], ["model.path=nowhere", "no such folder"]),
    "truncated weights": Bad(LOCAL, ["model.safetensors", "not a whole safetensors file"], make=truncated, light=False),
    "pickled weights": Bad(LOCAL, ["pytorch_model.bin", "run code"], make=pickled, light=False),
    "no chat template": Bad([*LOCAL, "data.template=chat"], ["no chat template", "data.template=plain"], make=no_template, light=False),
    "unwritable output": Bad(QUICK, ["outputs", "cannot write there"], make=read_only, leaves={"outputs"}),
    "resume of nothing": Bad(["resume=nowhere"], ["resume=nowhere", "not the record of a run"]),
    "missing plugin": Bad(["--plugin", "no.py", "method=lora"], ["no.py", "no such file"]),
    "broken plugin": Bad(["--plugin", "p.py"], ["p.py", "NameError"], make=write("p.py", "undefined\n"), light=False),
    # found later
    "rank too large": Bad([*QUICK, "method.lora.rank=80"], ["rank=80", "at most"], light=False, leaves={"outputs"}),
    "targets that name nothing": Bad([*QUICK, "method.lora.targets=[qq]"], ["qq", "it has"], light=False, leaves={"outputs"}),
    "unknown metric to monitor": Bad(
        [*QUICK, "trainer.monitor=acc", "trainer.eval_every=1"],
        ["trainer.monitor=acc", "exact_match"],
        light=False,
        code=1,
        leaves={"outputs"},
    ),
    "a disk that is full": Bad([*QUICK, "method=full"], ["was not written"], before=small_disk, light=False, code=1, leaves={"outputs"}),
    "no GPU": Bad([*QUICK, "hardware=gpu"], ["hardware.device=cuda", "hardware=auto"], light=False, leaves={"outputs"}),
}


def run(name: str, folder: Path) -> tuple[int, list[str], float]:
    """Exit code, lines printed as errors, and seconds of a bad command."""
    bad = BAD[name]
    bad.make(folder)
    began = time.perf_counter()
    code = ftr("train", *bad.words, cwd=folder, before=bad.before)
    printed = (folder / "output.txt").read_text()
    lines = [line for line in printed.splitlines() if line.startswith("error:")]
    assert "Traceback" not in printed, printed
    return code, lines, time.perf_counter() - began


@pytest.mark.parametrize("name", BAD)
def test_one_line_and_nothing_left(name: str, tmp_path: Path) -> None:
    bad = BAD[name]
    code, lines, _ = run(name, tmp_path)
    assert code == bad.code, (code, lines)
    assert len(lines) == 1, lines
    for word in bad.says:
        assert word in lines[0], (word, lines[0])
    if "outputs" not in bad.leaves:
        assert not (tmp_path / "outputs").exists()
    assert not list(tmp_path.rglob("tuned")), "a failed run left weights"


@pytest.mark.parametrize("name", ["unknown method", "wrong type", "two adapters on one weight", "malformed row", "_target_ in a recipe"])
def test_known_without_torch(name: str, tmp_path: Path) -> None:
    BAD[name].make(tmp_path)
    code = (
        "import sys\n"
        f"sys.argv = ['ftr', 'train', *{BAD[name].words!r}]\n"
        "from ftrecipes.cli import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules and 'lightning' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr


if __name__ == "__main__":
    for name in BAD:
        with tempfile.TemporaryDirectory() as folder:
            code, lines, seconds = run(name, Path(folder))
            print(f"{name}\n  ftr train {' '.join(BAD[name].words)[:110]}\n  exit {code}, {seconds:.1f} s: {' '.join(lines)[:230]}")
