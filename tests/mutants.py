"""Do the proofs notice a mistake? Each proof file names one realistic mistake, which must turn it red.

    python tests/mutants.py                      all proof files
    python tests/mutants.py lora svft            these
    python tests/mutants.py --sample 5 --seed 3  five of them; seeds 0, 1, 2, … go round all of them

A proof file is `tests/methods/test_<key>.py`, or any other `tests/test_*.py` that holds

    MUTATION = ("ftrecipes/methods/adapters/svft.py", "old text", "new text")

with an old text that occurs once in the named file. The project is copied to a temporary folder and changed there; the
working tree is only read. Exit code 1 if a mutant survives, a proof file names no mutation or one that does not apply,
or is red without it.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
PARTS = ("ftrecipes", "conf", "recipes", "tests")
LIMIT = 900
"""Seconds for one proof file."""

Mutation = tuple[str, str, str]


def mutation_of(file: Path) -> Mutation | None:
    """The mutation that a proof file names, read without running it."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "MUTATION" for t in node.targets):
            where, old, new = ast.literal_eval(node.value)
            return str(where), str(old), str(new)
    return None


def proof_files() -> dict[str, Path]:
    """Proof files by key: all of the methods, and those of mechanisms that name a mutation."""
    tests = PROJECT / "tests"
    others = [file for file in tests.glob("test_*.py") if mutation_of(file)]
    return {file.stem.removeprefix("test_"): file for file in sorted([*tests.glob("methods/test_*.py"), *others])}


def rotating(keys: list[str], count: int, seed: int) -> list[str]:
    """`count` keys from place seed x count of a fixed shuffled round, so that successive seeds visit every key."""
    keys = sorted(keys)
    random.Random(0).shuffle(keys)
    return sorted({keys[(seed * count + i) % len(keys)] for i in range(min(count, len(keys)))})


def copy_project(target: Path) -> None:
    """What a test run reads, without derived files."""
    for part in PARTS:
        shutil.copytree(PROJECT / part, target / part, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))
    shutil.copy2(PROJECT / "pyproject.toml", target)


def run(target: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A Python command in the copy, which is what `import ftrecipes` finds there.

    No bytecode is written: a file that is changed twice within a second would be taken for unchanged.
    """
    own = {"PYTHONPATH": str(target), "PYTHONDONTWRITEBYTECODE": "1", "FTR_CACHE": str(target / ".cache")}
    env = {"OMP_NUM_THREADS": "1", **os.environ, **own}
    return subprocess.run([sys.executable, *words], cwd=target, env=env, capture_output=True, text=True, timeout=LIMIT)


def proofs(target: Path, file: Path) -> tuple[int, str]:
    """Exit code and last line of a proof file's quick tests; the first failure ends them."""
    place = str(file.relative_to(PROJECT))
    try:
        done = run(target, "-m", "pytest", "-x", "-m", "not slow", "-p", "no:cacheprovider", place)
    except subprocess.TimeoutExpired:
        return -1, f"not done after {LIMIT} s"
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return done.returncode, next(
        (line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1] if lines else done.stderr[-200:]
    )


def judge(target: Path, file: Path, trust: bool) -> tuple[str, str]:
    """`red`, or what is wrong with a proof file's mutation; and the test that noticed, or a detail."""
    mutation = mutation_of(file)
    if mutation is None:
        return "NO MUTATION", "the file names none"
    where, old, new = mutation
    place = target / where
    text = place.read_text(encoding="utf-8") if place.is_file() else ""
    if not text or text.count(old) != 1 or old == new:
        return "NOT APPLICABLE", f"{where}: the old text occurs {text.count(old)} times" if text else f"{where}: no such file"
    if not trust:
        code, line = proofs(target, file)
        if code != 0:
            return "RED WITHOUT IT", line
    changed = text.replace(old, new)
    if place.suffix == ".py":
        try:
            ast.parse(changed)
        except SyntaxError as error:
            return "NOT APPLICABLE", f"{where}: the new text does not parse ({error.msg})"
    place.write_text(changed, encoding="utf-8")
    try:
        code, line = proofs(target, file)
    finally:
        place.write_text(text, encoding="utf-8")
    if code == 1:
        return "red", line
    return ("STILL GREEN" if code == 0 else "BROKEN"), line


def main() -> int:
    parser = argparse.ArgumentParser(description="Apply each proof file's mutation to a copy of the project; its proofs must turn red.")
    parser.add_argument("keys", nargs="*", help="proof files by key (default: all)")
    parser.add_argument("--sample", type=int, metavar="N", help="only N of them")
    parser.add_argument("--seed", type=int, default=date.today().toordinal(), help="which N (default: another part every day)")
    parser.add_argument("--trust", action="store_true", help="skip the run without the mutation: the proofs were just seen green")
    words = parser.parse_args()
    files = proof_files()
    unknown = [key for key in words.keys if key not in files]
    if unknown:
        print(f"no proof file for {', '.join(unknown)}; there are {', '.join(files)}", file=sys.stderr)
        return 2
    keys = words.keys or list(files)
    if words.sample:
        keys = rotating(keys, words.sample, words.seed)
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="ftr-mutants-") as folder:
        target = Path(folder).resolve()
        copy_project(target)
        found = run(target, "-c", "import ftrecipes; print(ftrecipes.__file__)").stdout.strip()
        if not found.startswith(str(target)):
            print(f"the copy in {target} is not what Python imports ({found})", file=sys.stderr)
            return 1
        width = max(map(len, keys), default=3)
        print(f"{'key':{width}}  {'verdict':14}  {'seconds':>7}  mutation", flush=True)
        for key in keys:
            began = time.perf_counter()
            verdict, detail = judge(target, files[key], words.trust)
            verdicts.append(verdict)
            where, old, new = mutation_of(files[key]) or ("-", "", "")
            print(f"{key:{width}}  {verdict:14}  {time.perf_counter() - began:7.1f}  {where}: {_short(old)} -> {_short(new)}", flush=True)
            print(f"{'':{width}}  {'':14}  {'':>7}  {detail[:160]}", flush=True)
    bad = sum(verdict != "red" for verdict in verdicts)
    print(f"{len(verdicts) - bad} of {len(verdicts)} mutants were noticed")
    return 1 if bad else 0


def _short(text: str) -> str:
    """A text on one line, at most 60 characters."""
    line = " ".join(text.split())
    return repr(line if len(line) <= 60 else f"{line[:57]}...")


if __name__ == "__main__":
    sys.exit(main())
