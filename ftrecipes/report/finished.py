"""What can be asked of a finished run: its metrics again, and answers of a tuned language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ftrecipes.errors import UserError
from ftrecipes.record import write_atomic
from ftrecipes.run import Run, quiet


def evaluate(folder: str, as_json: bool) -> None:
    """Rebuild the tuned model from base and record and evaluate it on all sets; written to RUN/eval.json."""
    quiet()
    run = Run.open(folder, data=True)
    results = {split: run.evaluate(split) for split in ("validation", "test", "retain")}
    write_atomic(Path(folder) / "eval.json", json.dumps(results, indent=1) + "\n")
    if as_json:
        print(json.dumps(results, indent=1))
        return
    from rich.table import Table

    from ftrecipes.report.listing import console

    names = {"validation": "validation", "test": "test", "retain": f"retained ({run.retain_name})"}
    shown = Table(box=None, header_style="bold")
    for column in ("set", "metric", "value"):
        shown.add_column(column, justify="right" if column == "value" else "left")
    for split, metrics in results.items():
        for name, value in metrics.items():
            shown.add_row(names[split], name, f"{value:.4f}")
    console().print(shown)


def prompts_of(prompt: str | None, file: str | None) -> list[str]:
    """The prompts that were given, one a line of a text file or the `prompt` of each JSONL row."""
    if (prompt is None) == (file is None):
        raise UserError("give --prompt TEXT or --file FILE")
    if prompt is not None:
        return [prompt]
    assert file is not None
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--file {file}: no such file")
    out = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            try:
                row = json.loads(line)
                line = row["prompt"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{file}:{number}: needs an object with `prompt`") from None
        out.append(str(line))
    if not out:
        raise UserError(f"--file {file}: holds no prompt")
    return out


def generate(folder: str, prompt: str | None, file: str | None, max_new_tokens: int, temperature: float, as_json: bool) -> None:
    """Print the tuned model's answer to each prompt."""
    asked = prompts_of(prompt, file)
    quiet()
    run = Run.open(folder)
    if not hasattr(run.task, "generate"):
        raise UserError(f"{folder}: {run.settings.model.name} does not generate text")
    run.seed_global("generate")
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    answers = []
    with run.evaluating():
        for text in asked:
            answer = run.task.generate(run.model, [{"role": "user", "content": text}], max_new_tokens=max_new_tokens, **sampling)
            answers.append({"prompt": text, "answer": answer})
            if not as_json:
                print(answer if len(asked) == 1 else f"> {text}\n{answer}\n")
    if as_json:
        print(json.dumps(answers, indent=1))
