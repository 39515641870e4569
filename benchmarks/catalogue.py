"""Every method by its name alone: `python benchmarks/catalogue.py [key …]` (or `make catalogue`).

Each method runs as a user would type it, in a process of its own, in an empty folder, with the network switched off for
the hub. A result is kept under a hash of the files that the run used, so that a second call runs only what changed and a
call that was cut off goes on. The table is written after every run: benchmarks/catalogue.md, beside its figures as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from ftrecipes import catalogue
from ftrecipes.record import write_atomic

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS, TABLE = HERE / "catalogue.json", HERE / "catalogue.md"
LIMIT = 1200  # seconds until a run counts as hanging
CHILD = """
import json, resource, sys
from pathlib import Path
from ftrecipes import cli
sys.argv = ["ftr", *json.loads(sys.argv[1])]
try:
    cli.main()
finally:
    used = sorted(m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None) and m.__name__.split(".")[0] == "ftrecipes")
    said = {"used": used, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    Path("child.json").write_text(json.dumps(said))
"""


def fingerprint(files: list[str]) -> str:
    """Hash of what these files of the project hold now; one that is gone changes it."""
    h = hashlib.sha256()
    for name in files:
        path = ROOT / name
        h.update(name.encode() + (path.read_bytes() if path.is_file() else b"gone"))
    return h.hexdigest()[:16]


def run(key: str) -> dict[str, Any]:
    """One method by its name; what its record says, or the line that it failed with."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", f"method={key}", "hydra.run.dir=run"]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        began = time.perf_counter()
        try:
            done = subprocess.run(
                [sys.executable, "-c", CHILD, json.dumps(words)], cwd=folder, env=env, capture_output=True, text=True, timeout=LIMIT
            )
        except subprocess.TimeoutExpired:
            return {"key": key, "failed": f"no end within {LIMIT} s", "used": [], "hash": ""}
        seconds = time.perf_counter() - began
        if done.returncode:
            return {"key": key, "failed": done.stderr.strip().splitlines()[-1][:200], "used": [], "hash": ""}
        child = json.loads((Path(folder) / "child.json").read_text())
        info = json.loads((Path(folder) / "run" / "run.json").read_text())
        config = yaml.safe_load((Path(folder) / "run" / "config.yaml").read_text())
        groups = [(g, config[g]["name"]) for g in ("model", "data", "optimizer", "schedule")]
        paths = [*child["used"], *(catalogue.get(group, name).path for group, name in (*groups, ("method", key)))]
        used = [os.path.relpath(path, ROOT) for path in paths]
        results = info["results"]
        return {
            "key": key,
            "model": config["model"]["name"],
            "data": config["data"]["name"],
            "seconds": round(seconds, 1),
            "peak_mib": round(child["peak"] / 2**20),
            "steps": results["steps"],
            "trainable": results["trainable"],
            "events": results["events"],
            "before": results["before"],
            "after": results["after"],
            "used": used,
            "hash": fingerprint(used),
        }


def target(row: dict[str, Any]) -> str:
    """The first metric of the test set that is not a loss, before and after; the loss where it tells more."""
    shown = []
    for name in row["after"]["test"]:
        before, after = row["before"]["test"].get(name), row["after"]["test"][name]
        if name in ("exact_match", "accuracy", "nll", "loss", "exact", "preference", "reward/asked") and before is not None:
            shown.append(f"{name} {before:.3f} → {after:.3f}")
    return ", ".join(shown)


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown, by model."""
    lines = [
        "# Every method by its name alone\n",
        "Written by `make catalogue`; seconds and memory are of the whole process. The rows `full` and `lora` are the plain ones.\n",
    ]
    done = [r for r in rows if "failed" not in r]
    for place in sorted({(r["model"], r["data"]) for r in done}):
        lines += [
            f"\n## {place[0]}, {place[1]}\n",
            "| method | seconds | MiB | updates | trains | test | forgetting (nll) | counted |",
            "|" + "---|" * 8,
        ]
        for r in sorted((r for r in done if (r["model"], r["data"]) == place), key=lambda r: r["key"]):
            b, a = r["before"].get("retain", {}), r["after"].get("retain", {})
            forgetting = f"{b['nll']:.2f} → {a['nll']:.2f}" if "nll" in a and "nll" in b else ""
            counted = ", ".join(f"{n} {k.replace('_', ' ')}" for k, n in r["events"].items())
            lines.append(
                f"| {r['key']} | {r['seconds']:.0f} | {r['peak_mib']} | {r['steps']} | {r['trainable']:,} | {target(r)} | {forgetting} | {counted} |"
            )
    failed = [r for r in rows if "failed" in r]
    if failed:
        lines += ["\n## Failed\n", *(f"- {r['key']}: {r['failed']}" for r in failed)]
    return "\n".join(lines) + "\n"


def main(keys: list[str]) -> int:
    known: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    methods = sorted(catalogue.entries("method"))
    for key in keys or methods:
        kept = known.get(key)
        if kept and kept["hash"] and kept["hash"] == fingerprint(kept["used"]) and "failed" not in kept:
            continue
        print(f"{key} …", end=" ", flush=True)
        known[key] = run(key)
        print(known[key].get("failed") or f"{known[key]['seconds']:.0f} s  {target(known[key])}", flush=True)
        known = {k: v for k, v in sorted(known.items()) if k in methods}
        write_atomic(RESULTS, json.dumps(known, indent=1) + "\n")
        write_atomic(TABLE, table(list(known.values())))
    return 1 if any("failed" in known[k] for k in keys or methods) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
