"""The `ftr` command. Heavy imports stand inside the commands, so that the catalogue answers at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ftrecipes.errors import FtrError, Interrupted, UserError

app = typer.Typer(
    name="ftr",
    help="Fine-tuning methods of the literature behind one command.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
PASS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
Plugin = Annotated[list[str] | None, typer.Option("--plugin", help="run a Python file that registers methods, data, metrics or rewards")]

TRAIN_HELP = """Usage: ftr train [group=name …] [path.to.setting=value …] [options]

Fine-tune a model. Without words: LoRA on the packaged tiny-llama, offline, about a minute.

Groups (ftr ls shows their names, ftr show GROUP NAME their settings):
  model=…      what is tuned            method=…     how: one name, or '[a,b]' to stack several
  data=…       what it is tuned on      optimizer=…  schedule=…  hardware=…  logger=…
  recipe=…     a whole experiment       trainer.…    steps, batch, evaluation, checkpoints

Examples:
  ftr train method=svft model=llama3-8b
  ftr train 'method=[dora,dft]' optimizer.lr=1e-3 trainer.max_steps=200
  ftr train data=file data.path=my.jsonl model=smollm2-135m
  ftr train -m method=svft,lora,gmt optimizer.lr=1e-4,5e-4        every combination
  ftr train resume=auto …                                         go on with the last unfinished run of these settings
  ftr train --plugin my_method.py method=mine

Options:
  -m, --multirun          a sweep: every combination of the values given with commas
  --plugin FILE           run a Python file that registers a method, data set, metric or reward
  --config-dir DIR        a folder with YAML of your own (DIR/recipe/mine.yaml → recipe=mine)
  --cfg job|hydra|all, --info, --hydra-help, hydra.run.dir=DIR    Hydra's own
  --debug                 a traceback instead of one line
  -h, --help              this text
"""


def main() -> None:
    """Run the command line; every expected error is one line on standard error with its exit code."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app(standalone_mode=False)
    except FtrError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("stopped", Interrupted.exit_code)
    except Exception as error:
        import click

        if isinstance(error, click.exceptions.Abort):
            _fail("stopped", Interrupted.exit_code)
        if isinstance(error, click.ClickException):
            _fail(error.format_message(), 2)
        if debug:
            raise
        place = error.__traceback__
        while place and place.tb_next:
            place = place.tb_next
        where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place else ""
        _fail(f"{type(error).__name__}: {error} ({where}; --debug shows the traceback)", 1)


def _fail(text: str, code: int) -> None:
    line = " ".join(text.split())
    print(f"error: {line}", file=sys.stderr)
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code) if code == Interrupted.exit_code else sys.exit(code)


def _plugins(paths: list[str] | None) -> None:
    if paths:
        from ftrecipes.registry import load_plugin

        for path in [*filter(None, os.environ.get("FTR_PLUGINS", "").split(os.pathsep)), *paths]:
            load_plugin(path)
        os.environ["FTR_PLUGINS"] = os.pathsep.join(str(Path(p).resolve()) for p in paths)


@app.command(context_settings=PASS, add_help_option=False)
def train(context: typer.Context) -> None:
    """Fine-tune a model (ftr train --help explains the words)."""
    from ftrecipes import front

    words = list(context.args)
    if "-h" in words or "--help" in words:
        print(TRAIN_HELP)
        return
    paths: list[str] = []
    while "--plugin" in words:
        at = words.index("--plugin")
        if at + 1 >= len(words):
            raise UserError("--plugin needs a file")
        paths.append(words[at + 1])
        del words[at : at + 2]
    _plugins(paths)
    front.train(words)


@app.command("ls")
def list_entries(what: Annotated[str, typer.Argument(help="methods, models, data, optimizers, schedules, hardware, loggers, recipes")] = "methods", as_json: Json = False) -> None:  # fmt: skip
    """What can be chosen."""
    from ftrecipes.report import listing

    listing.show_list(what, as_json)


@app.command()
def show(
    group: Annotated[str, typer.Argument(help="method, model, data, optimizer, schedule, hardware, logger, recipe")],
    name: str,
    cite: Annotated[bool, typer.Option("--cite", help="print a BibTeX entry")] = False,
    as_json: Json = False,
) -> None:
    """What one entry is: the paper, its idea, settings, findings and fidelity."""
    from ftrecipes.report import listing

    listing.show_entry(group, name, cite, as_json)


@app.command(context_settings=PASS)
def plan(context: typer.Context, as_json: Json = False, plugin: Plugin = None) -> None:
    """What a run would train and cost; nothing is loaded."""
    _plugins(plugin)
    from ftrecipes.plan import show_plan

    show_plan(list(context.args), as_json)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="runs, or folders of runs")],
    everything: Annotated[bool, typer.Option("--all", help="show every setting that differs")] = False,
    as_json: Json = False,
) -> None:
    """Runs side by side: metrics, and what differs in their settings."""
    from ftrecipes.report.compare import show_compare

    show_compare(runs, as_json, everything)


@app.command("eval")
def evaluate(run: str, as_json: Json = False, plugin: Plugin = None) -> None:
    """Evaluate a finished run again from its record."""
    _plugins(plugin)
    from ftrecipes.report import finished

    finished.evaluate(run, as_json)


@app.command()
def generate(
    run: str,
    prompt: Annotated[str | None, typer.Option("--prompt", help="one prompt")] = None,
    file: Annotated[str | None, typer.Option("--file", help="a file with one prompt a line, or JSONL with `prompt`")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 48,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.0,
    as_json: Json = False,
    plugin: Plugin = None,
) -> None:
    """Let a tuned language model answer."""
    _plugins(plugin)
    from ftrecipes.report import finished

    finished.generate(run, prompt, file, max_new_tokens, temperature, as_json)


@app.command()
def merge(
    run: str, to: Annotated[str | None, typer.Option("--to", help="folder (default: RUN/merged)")] = None, plugin: Plugin = None
) -> None:
    """Write the tuned model as plain weights in the hub's format."""
    _plugins(plugin)
    from ftrecipes.export import merge as write_merged

    print(write_merged(run, to))


@app.command("export")
def export_run(
    run: str,
    to: Annotated[str, typer.Option("--to", help="hf (merged weights) or peft (an adapter)")],
    folder: Annotated[str | None, typer.Option("--folder", help="where to (default: RUN/export-<format>)")] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="rank of an approximate LoRA where peft lacks the method")] = None,
    plugin: Plugin = None,
) -> None:
    """Write a tuned run in the format of another library."""
    _plugins(plugin)
    from ftrecipes.export import export as write

    print(write(run, to, folder, rank))


def print_json(value: Any) -> None:
    """JSON on standard output."""
    print(json.dumps(value, indent=1, default=str))


if __name__ == "__main__":
    main()
