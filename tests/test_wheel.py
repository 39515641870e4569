"""The built wheel by itself: configs, recipes and packaged weights travel with it."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (file,) = folder.glob("*.whl")
    return file


def test_holds_all_configs_and_weights(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for place in ("conf", "recipes"):
        for file in (ROOT / place).rglob("*.yaml"):
            assert f"ftrecipes/{file.relative_to(ROOT)}" in names
    for file in (ROOT / "ftrecipes" / "models" / "packaged").rglob("*.safetensors"):
        assert str(file.relative_to(ROOT)) in names
    assert wheel.stat().st_size < 30e6


def test_runs_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    """In a venv that holds the wheel and, from outside, its dependencies; the checkout is out of reach."""
    venv, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    code = "import ftrecipes, sys; assert ftrecipes.__file__.startswith(sys.argv.pop(1)), ftrecipes.__file__; from ftrecipes.cli import main; main()"

    def ftr(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(venv / "bin" / "python"), "-c", code, str(packages), *words]
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run(command, cwd=empty, capture_output=True, text=True, env=clean)

    assert "svft" in ftr("ls").stdout
    assert "pretrain/tiny_llama" in ftr("ls", "recipes").stdout
    done = ftr("train", "trainer.max_steps=2", "trainer.eval_examples=8", "data.size=64", "trainer.batch=4")
    assert done.returncode == 0, done.stderr
    assert list(empty.glob("outputs/*/*/tuned/weights.safetensors"))
