"""The user's own data: what is recognised, what is refused and how, how it is split, and that nothing leaks or gets lost."""

from __future__ import annotations

import csv
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tools
from tools import SMALL, train, train_cut_short

from ftrecipes.compose import box, compose
from ftrecipes.data import files, formats
from ftrecipes.data import splits as splits_of
from ftrecipes.data.base import Splits
from ftrecipes.errors import UserError
from ftrecipes.run import Run

MUTATION = ("ftrecipes/data/files.py", "where[store.keys[i]]", "where[keys[i % len(keys)]]")
datasets.disable_progress_bars()

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def knobs(path: Any = None, name: str = "file", **given: Any) -> Any:
    """Settings of data=file with its defaults."""
    values = dict(compose([f"data={name}"]).data)
    return box({**values, **({"path": str(path)} if path else {}), **given})


def read(path: Any, **given: Any) -> Splits:
    return files.build(knobs(path, **given), "causal-lm")


def lines(path: Path, *rows: Any) -> Path:
    """A JSONL file; text is written as it stands."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def bare(examples: Any) -> list[dict[str, Any]]:
    """Examples without their places."""
    return [{k: v for k, v in example.items() if k != "place"} for example in examples]


def one(tmp_path: Path, row: dict[str, Any], **given: Any) -> tuple[str, dict[str, Any]]:
    """How a row is read, and as what."""
    found = read(lines(tmp_path / "one.jsonl", row), **given)
    return found.notes[0].split("read as ")[1].split(" ")[0], bare(found.train)[0]


# -- shapes --------------------------------------------------------------------------------------------------------------

QA = {"prompt": "Hi?", "response": "Yes."}
CHAT = {"messages": TURNS}
WORSE = {"role": "assistant", "content": "Go away."}
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
SHAPES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "alpaca": ({"instruction": "Add.", "input": "1 2", "output": "3"}, "instruction", {"prompt": "Add.\n\n1 2", "response": "3"}),
    "alpaca, empty input": ({"instruction": "Hi?", "input": "", "output": "Yes.", "text": "…"}, "instruction", QA),
    "dolly": (
        {"instruction": "Hi?", "context": "A.", "response": "Yes.", "category": "qa"},
        "instruction",
        {"prompt": "Hi?\n\nA.", "response": "Yes."},
    ),
    "prompt, response": ({"prompt": "Hi?", "response": "Yes."}, "instruction", QA),
    "prompt, completion": ({"prompt": "Hi", "completion": " there"}, "completion", {"prompt": "Hi", "completion": " there"}),
    "prompt, completion as turns": ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "completion", CHAT),
    "question, answer": ({"question": "Hi?", "answer": "Yes."}, "instruction", QA),
    "upper case": ({"Question": "Hi?", "Answer": "Yes."}, "instruction", QA),
    "query, response": ({"type": "x", "query": "Hi?", "response": "Yes."}, "instruction", QA),
    "problem, solution": ({"problem": "Hi?", "solution": "Yes."}, "instruction", QA),
    "input, output": ({"input": "Hi?", "output": "Yes."}, "instruction", QA),
    "orca": ({"system_prompt": "Be.", "question": "Hi?", "response": "Yes."}, "instruction", {**QA, "system": "Be."}),
    "number as answer": ({"question": "1+1?", "answer": 2}, "instruction", {"prompt": "1+1?", "response": "2"}),
    "messages": ({"messages": TURNS, "prompt": "Hi", "source": "x"}, "chat", CHAT),
    "sharegpt": ({"conversations": SHAREGPT}, "chat", CHAT),
    "sharegpt with system": (
        {"system": "Be.", "conversations": SHAREGPT},
        "chat",
        {"messages": [{"role": "system", "content": "Be."}, *TURNS]},
    ),
    "content in parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, TURNS[1]]}, "chat", CHAT),
    "preference": ({"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}, "preference", {**QA, "others": ["No."]}),
    "preference with system and input": (
        {"system": "Be.", "question": "Hi?", "context": "A.", "chosen": "Yes.", "rejected": "No."},
        "preference",
        {"prompt": "Hi?\n\nA.", "response": "Yes.", "system": "Be.", "others": ["No."]},
    ),
    "preference as dialogues": (
        {"prompt": "Hi", "chosen": TURNS, "rejected": [TURNS[0], WORSE], "messages": TURNS, "score": 9.5},
        "preference",
        {**CHAT, "others": ["Go away."]},
    ),
    "preference, prompt inside": ({"chosen": SHAREGPT, "rejected": [TURNS[0], WORSE]}, "preference", {**CHAT, "others": ["Go away."]}),
    "preference, prompt as turns": (
        {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [WORSE]},
        "preference",
        {**CHAT, "others": ["Go away."]},
    ),
    "preference, prompt as turns, answers as text": (
        {"prompt": TURNS[:1], "chosen": "Hello.", "rejected": "Go away."},
        "preference",
        {**CHAT, "others": ["Go away."]},
    ),
    "preference, prompt as text, answers as turns": (
        {"prompt": "Hi", "chosen": TURNS[1:], "rejected": [WORSE]},
        "preference",
        {**CHAT, "others": ["Go away."]},
    ),
    "text": ({"text": "Once.", "url": "x"}, "text", {"text": "Once."}),
    "text, label": ({"text": "Bad.", "label": "negative"}, "classification", {"prompt": "Bad.", "response": "negative"}),
    "sentence, label, idx": ({"idx": 3, "sentence": "Bad.", "label": 0}, "classification", {"prompt": "Bad.", "response": "0"}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_well_known_shapes_are_recognised(name: str, tmp_path: Path) -> None:
    row, shape, example = SHAPES[name]
    assert one(tmp_path, row) == (shape, example)


def test_columns_and_formats_can_be_named(tmp_path: Path) -> None:
    row = {"q": "Hi?", "note": "N.", "gold": "Yes.", "input": "not asked for"}
    assert one(tmp_path, row, columns={"prompt": "q", "response": "gold"}) == ("instruction", QA)
    found = one(tmp_path, row, columns={"prompt": ["note", "q"], "response": "gold", "system": "input"})
    assert found[1] == {"prompt": "N.\n\nHi?", "response": "Yes.", "system": "not asked for"}
    row = {"prompt": "Hi?", "completion": "Yes."}
    assert one(tmp_path, row, format="instruction") == ("instruction", QA)
    assert one(tmp_path, row, columns={"text": "prompt"}) == ("text", {"text": "Hi?"})
    assert one(tmp_path, row, columns={"text": "prompt", "label": "completion"})[0] == "classification"
    row = {"text": "Bad.", "label": 1}
    assert one(tmp_path, row, labels=["good", "bad"])[1] == {"prompt": "Bad.", "response": "bad"}
    assert one(tmp_path, row, format="text") == ("text", {"text": "Bad."})
    with pytest.raises(UserError, match=r"data\.columns\.label: format text has no such field"):
        one(tmp_path, row, format="text", columns={"label": "label"})


def test_preference_columns_can_be_named_and_single_answers_can_be_taken(tmp_path: Path) -> None:
    row = {"q": "Hi?", "better": "Yes.", "worse": "No."}
    assert one(tmp_path, row, columns={"prompt": "q", "chosen": "better", "rejected": "worse"}) == ("preference", {**QA, "others": ["No."]})
    row = {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}
    assert one(tmp_path, row, columns={"prompt": "prompt", "response": "chosen"}) == ("instruction", QA)
    assert one(tmp_path, {**row, "messages": TURNS}, format="chat") == ("chat", CHAT)
    found = read(lines(tmp_path / "a.jsonl", *({**row, "prompt": f"{i}?"} for i in range(30))))
    assert found.target == "preference"
    assert (
        "read as preference (chosen=chosen, rejected=rejected, prompt=prompt); a method that learns from single answers" in found.notes[0]
    )
    assert read(lines(tmp_path / "b.jsonl", GOOD)).target == ""


def test_columns_from_the_command_line(in_tmp: Path) -> None:
    lines(in_tmp / "a.jsonl", {"q": "Hi?", "gold": "Yes."})
    for words in (["data.columns={prompt: q, response: gold}"], ["data.columns.prompt=q", "data.columns.response=gold"]):
        settings = compose(["data=file", "data.path=a.jsonl", *words])
        assert bare(splits_of(settings).train) == [QA]


def test_optional_columns_may_come_later(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"instruction": "Hi?", "output": "Yes."}, {"instruction": "Add.", "input": "1 2", "output": "3"})
    assert {"prompt": "Add.\n\n1 2", "response": "3"} in bare([*read(path, validation=0.0, test=0.0).train])


def test_dialogue_loses_the_turns_after_its_last_answer(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"messages": TURNS}, {"messages": [*TURNS, {"role": "user", "content": "Bye"}]})
    found = read(path, validation=0.0, test=0.0)
    assert bare(found.train) == [CHAT, CHAT]
    assert f"{path}: left out the turns after the last answer of 1 dialogues (first {path}:2)" in found.notes


# -- what is refused -----------------------------------------------------------------------------------------------------


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None


def rows(*content: Any, to: tuple[str, ...] = ("a.jsonl",)) -> Callable[[Path], None]:
    return lambda folder: [lines(folder / name, *content) for name in to] and None


def parquet(folder: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"question": "Hi?", "answer": "Yes."}] * 500), folder / "a.parquet")
    content = (folder / "a.parquet").read_bytes()
    (folder / "a.parquet").write_bytes(content[: len(content) // 2])


def parquet_rows(*content: dict[str, Any]) -> Callable[[Path], None]:
    return lambda folder: pq.write_table(pa.Table.from_pylist(list(content)), folder / "a.parquet")


def saved(folder: Path) -> None:
    datasets.Dataset.from_list([QA]).save_to_disk(folder / "saved")
    next((folder / "saved").glob("*.arrow")).unlink()


GOOD = {"question": "Hi?", "answer": "Yes."}
PAIR = {"prompt": "x", "chosen": "y", "rejected": "z"}
BAD: dict[str, tuple[str, Callable[[Path], None], str] | tuple[str, Callable[[Path], None], str, dict[str, Any]]] = {
    "no path": ("", rows(GOOD), r"data=file needs data\.path="),
    "missing file": ("b.jsonl", rows(GOOD), r"b\.jsonl: no such file; did you mean 'a\.jsonl'\?"),
    "missing folder": ("x/b.jsonl", rows(GOOD), r"x/b\.jsonl: no such file$"),
    "unknown ending": ("a.xlsx", text("a.xlsx", "PK"), r"a\.xlsx: unknown ending '\.xlsx'; files end in \.jsonl .*\.parquet"),
    "no ending": ("data", text("data", "x"), r"data: no ending; files end in"),
    "pickle by name": ("a.pkl", text("a.pkl", pickle.dumps([GOOD])), r"a\.pkl: may hold pickled objects.*run code.*save .* as JSONL"),
    "pickle in disguise": ("a.jsonl", text("a.jsonl", pickle.dumps([GOOD])), r"a\.jsonl: holds a pickle.*run code"),
    "folder of pickles": (".", text("train.pt", pickle.dumps([GOOD])), r"train\.pt: may hold pickled objects"),
    "empty file": ("a.jsonl", text("a.jsonl", ""), r"a\.jsonl: holds no example"),
    "blank lines": ("a.jsonl", text("a.jsonl", "\n\n"), r"a\.jsonl: holds no example"),
    "empty array": ("a.json", text("a.json", "[]"), r"a\.json: holds no example"),
    "empty csv": ("a.csv", text("a.csv", ""), r"a\.csv: the file is empty"),
    "header alone": ("a.csv", text("a.csv", "question,answer\n"), r"a\.csv: holds no example"),
    "malformed row": ("a.jsonl", rows(GOOD, '{"question": "Hi?", '), r"a\.jsonl:2: not valid JSON \(.*at character \d+\).*data\.invalid=skip"),
    "object over lines": ("a.jsonl", text("a.jsonl", json.dumps(GOOD, indent=1)), r"a\.jsonl:1: not valid JSON.*one object on one line"),
    "array cut off": ("a.json", text("a.json", json.dumps([GOOD] * 3, indent=1)[:-20]), r"a\.json:\d+: not valid JSON"),
    "deeply nested": ("a.jsonl", rows(GOOD, '{"a":' * 10**5), r"a\.jsonl:2: not valid JSON"),
    "row is a list": ("a.jsonl", rows(GOOD, "3"), r"a\.jsonl:2: a row is an object with named columns, this is int"),
    "element is text": ("a.json", text("a.json", json.dumps([GOOD, "x"])), r"a\.json: row 2: a row is an object .*, this is str"),
    "not UTF-8": ("a.jsonl", text("a.jsonl", json.dumps(GOOD).encode() + b'\n{"question": "caf\xe9"}'), r"a\.jsonl:2: not UTF-8 \(byte 0xe9 at 18\)"),
    "UTF-16": ("a.csv", text("a.csv", "question,answer\nx,y\n".encode("utf-16")), r"a\.csv:1: not UTF-8 \(byte 0xff at 1\); save the file as UTF-8"),
    "half a character": ("a.jsonl", rows(GOOD, '{"question": "\\ud83d", "answer": "x"}'), r"a\.jsonl:2: column 'question' holds half of a surrogate pair"),
    "unclear columns": ("a.jsonl", rows({"foo": "x", "bar": "y"}), r"a\.jsonl:1: cannot tell what the columns hold: there are foo, bar; say it with data\.columns=\{prompt: …, response: …\}"),
    "misspelt column": (
        "a.jsonl",
        rows({"instruction": "x", "outptu": "y"}),
        r"a\.jsonl:1: no column for the response .*; there are instruction, outptu; say which with data\.columns=\{response: outptu\}",
    ),
    "named column": ("a.jsonl", rows(GOOD), r"a\.jsonl:1: data\.columns\.prompt=qestion: no such column; did you mean 'question'\?", {"columns": {"prompt": "qestion"}}),
    "unknown field": ("a.jsonl", rows(GOOD), r"data\.columns\.promt: unknown; did you mean 'prompt'\?", {"columns": {"promt": "question"}}),
    "wrong format": ("a.csv", text("a.csv", "question,answer\na,b\n"), r"a\.csv: no column for the messages .*; there are question, answer", {"format": "chat"}),
    "column is gone": ("a.jsonl", rows(GOOD, {"question": "x", "anser": "y"}), r"a\.jsonl:2: no column 'answer'; did you mean 'anser'\?"),
    "pair without a prompt": ("a.jsonl", rows(PAIR, {"chosen": "y", "rejected": "z"}), r"a\.jsonl:2: chosen and rejected are text and need a prompt"),
    "pair with an empty prompt": ("a.csv", text("a.csv", "prompt,chosen,rejected\na,b,c\n,b,c\n"), r"a\.csv:3: empty prompt"),
    "pair of equals": ("a.jsonl", rows(PAIR, {**PAIR, "rejected": "y"}), r"a\.jsonl:2: chosen and rejected are the same answer"),
    "pair without a rejected answer": ("a.jsonl", rows(PAIR, {**PAIR, "rejected": " "}), r"a\.jsonl:2: empty rejected answer"),
    "pair, null": ("a.jsonl", rows(PAIR, {**PAIR, "rejected": None}), r"a\.jsonl:2: column 'rejected' holds null; text is needed"),
    "pair of two kinds": ("a.jsonl", rows({**PAIR, "chosen": TURNS}), r"a\.jsonl:1: chosen is a list and rejected str; both must be text or lists of turns"),
    "pair of two prompts": ("a.jsonl", rows({"chosen": TURNS, "rejected": [{"role": "user", "content": "Ho"}, TURNS[1]]}), r"a\.jsonl:1: chosen and rejected part at turn 1, before their last answer"),
    "pair of two lengths": ("a.jsonl", rows({"chosen": [*TURNS, *TURNS], "rejected": TURNS}), r"a\.jsonl:1: chosen and rejected part at turn 3, before their last answer"),
    "pair that ends with a question": ("a.jsonl", rows({"chosen": TURNS, "rejected": TURNS[:1]}), r"a\.jsonl:1: rejected does not end with an answer of the assistant"),
    "pair with an unknown role": ("a.jsonl", rows({"chosen": TURNS, "rejected": [{"role": "robot", "content": "x"}]}), r"a\.jsonl:1: turn 1: unknown role 'robot'"),
    "pair, a column is gone": ("a.jsonl", rows(PAIR, {"prompt": "x", "chosen": "y", "rejcted": "z"}), r"a\.jsonl:2: no column 'rejected'; did you mean 'rejcted'\?"),
    "pairs asked for": ("a.jsonl", rows(GOOD), r"a\.jsonl:1: no column for the chosen \(usual: chosen, preferred\); there are question, answer", {"format": "preference"}),
    "list as answer": ("a.jsonl", rows(GOOD, {"question": "x", "answer": ["y"]}), r"a\.jsonl:2: column 'answer' holds a list; text is needed"),
    "null as answer": ("a.jsonl", rows(GOOD, {"question": "x", "answer": None}), r"a\.jsonl:2: column 'answer' holds null; text is needed"),
    "fraction as answer": ("a.parquet", parquet_rows({"question": "x", "answer": 0.5}), r"a\.parquet: row 1: column 'answer' holds a number with a fraction"),
    "truth as answer": ("a.jsonl", rows({"question": "x", "answer": True}), r"a\.jsonl:1: column 'answer' holds true or false"),
    "messages are text": ("a.jsonl", rows({"messages": "Hi"}), r"a\.jsonl:1: column 'messages' holds str; a list of turns is needed"),
    "turn is text": ("a.jsonl", rows({"messages": ["Hi"]}), r"a\.jsonl:1: turn 1 is str; an object with role and content is needed"),
    "unknown role": ("a.jsonl", rows({"messages": [TURNS[0], {"role": "robot", "content": "x"}]}), r"a\.jsonl:1: turn 2: unknown role 'robot'; roles are system, user"),
    "turn without role": ("a.jsonl", rows({"messages": [{"content": "x"}]}), r"a\.jsonl:1: turn 1: unknown role None"),
    "image in a turn": ("a.jsonl", rows({"messages": [{"role": "user", "content": [{"type": "image"}]}, TURNS[1]]}), r"a\.jsonl:1: turn 1 holds a list; text is needed"),
    "no assistant": ("a.jsonl", rows({"messages": TURNS[:1]}), r"a\.jsonl:1: no turn of an assistant, so there is no answer to learn"),
    "empty answer": ("a.jsonl", rows(GOOD, {"question": "x", "answer": " \n"}), r"a\.jsonl:2: empty answer; .*data\.invalid=skip"),
    "empty turn": ("a.jsonl", rows({"messages": [TURNS[0], {"role": "assistant", "content": ""}]}), r"a\.jsonl:1: empty answer in turn 2"),
    "empty prompt": ("a.csv", text("a.csv", "question,answer\na,b\n,c\n"), r"a\.csv:3: empty prompt"),
    "empty text": ("a.jsonl", rows({"text": ""}), r"a\.jsonl:1: empty text"),
    "label without word": ("a.jsonl", rows({"text": "x", "label": 2}), r"a\.jsonl:1: column 'label': label '2' has no word among no, yes", {"labels": ["no", "yes"]}),
    "ragged csv": ("a.csv", text("a.csv", 'question,answer\n"a\nb",c\nd,e,f\n'), r"a\.csv:4: 3 fields where the header has 2; put quotes around fields that hold ','"),
    "short csv row": ("a.tsv", text("a.tsv", "question\tanswer\na\n"), r"a\.tsv:2: 1 fields where the header has 2"),
    "open quote": ("a.csv", text("a.csv", 'question,answer\na,b\n"c,d\ne,f\n'), r"a\.csv:3: not valid CSV \(unexpected end of data\)"),
    "header twice": ("a.csv", text("a.csv", "question,question\na,b\n"), r"a\.csv:1: the header needs one name a column; 'question' is empty or there twice"),
    "broken Parquet": ("a.parquet", parquet, r"a\.parquet: not a whole Parquet file .*; write or copy it again"),
    "text as Parquet": ("a.parquet", text("a.parquet", "question"), r"a\.parquet: not a whole Parquet file"),
    "saved, part missing": ("saved", saved, r"saved: data-00000-of-00001\.arrow is missing; save the data set again"),
    "folder without data": (".", text("readme.md", "x"), r": no file that can be read \(\.jsonl .*\), and no folder saved by datasets"),
    "folder without train": (".", rows(GOOD, to=("a.jsonl", "b.jsonl")), r": no train split; there are a, b; say which with data\.splits=\{train: …\}"),
    "folder, two endings": (".", rows(GOOD, to=("train.jsonl", "train.json")), r"'train' is there as train\.json and train\.jsonl"),
    "unknown split": (".", rows(GOOD, to=("train.jsonl",)), r"data\.splits\.train=trian: no such split; did you mean 'train'\?", {"splits": {"train": "trian"}}),
    "unknown role of a split": (".", rows(GOOD), r"data\.splits\.trian: unknown; did you mean 'train'\?", {"splits": {"trian": "a"}}),
    "number as a column": ("a.jsonl", rows(GOOD), r"data\.columns\.prompt: must be a name, not 3", {"columns": {"prompt": 3}}),
    "splits of a file": ("a.jsonl", rows(GOOD), r"data\.splits names files of a folder", {"splits": {"train": "a"}}),
    "shares": ("a.jsonl", rows(GOOD), r"data\.validation \+ data\.test = 1\.2: nothing is left", {"validation": 0.6, "test": 0.6}),
    "retained file": ("a.jsonl", rows(GOOD), r"r\.txt: no such file", {"retain": "r.txt"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_with_its_place(name: str, in_tmp: Path) -> None:
    """The quick look finds these, before torch is imported."""
    path, make, message, given = (*BAD[name], {})[:4]
    make(in_tmp)
    with pytest.raises(UserError, match=message) as caught:
        files.check(knobs(path, **given))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):
        files.build(knobs(path, **given), "causal-lm")


LATE: dict[str, tuple[Callable[[Path], None], str]] = {
    "malformed row": (rows(*[GOOD] * 2500, "{"), r"a\.jsonl:2501: not valid JSON"),
    "empty answer": (rows(*[GOOD] * 2500, {"question": "x", "answer": ""}), r"a\.jsonl:2501: empty answer"),
}


@pytest.mark.parametrize("name", LATE)
def test_problems_further_down_are_found_before_training(name: str, in_tmp: Path) -> None:
    make, message = LATE[name]
    make(in_tmp)
    files.check(knobs("a.jsonl"))
    run = Run(compose(["data=file", "data.path=a.jsonl", *(w for w in SMALL if "size" not in w)]))
    with pytest.raises(UserError, match=message):
        run.build()


def test_unreadable_file(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines(in_tmp / "a.jsonl", GOOD)

    usual = Path.open

    def refused(self: Path, *args: Any, **options: Any) -> Any:
        if self.name == "a.jsonl":
            raise PermissionError(13, "Permission denied")
        return usual(self, *args, **options)

    given = knobs("a.jsonl")
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read \(Permission denied\)"):
        files.check(given)


def test_invalid_rows_can_be_skipped_and_are_counted(in_tmp: Path) -> None:
    lines(in_tmp / "a.jsonl", GOOD, "{", {"question": "x", "answer": ""}, {**GOOD, "question": "Ho?"}, "[]")
    found = read("a.jsonl", invalid="skip", validation=0.0, test=0.0)
    assert bare(found.train) == [QA, {**QA, "prompt": "Ho?"}]
    assert any(n.startswith("a.jsonl: skipped 3 rows (first a.jsonl:2: not valid JSON") for n in found.notes)
    lines(in_tmp / "a.jsonl", "{")
    with pytest.raises(UserError, match=r"a\.jsonl: holds no example"):
        files.check(knobs("a.jsonl", invalid="skip"))


def test_commands_end_with_2_before_torch_is_imported(in_tmp: Path) -> None:
    lines(in_tmp / "a.jsonl", GOOD, {"question": "x"})
    code = "import sys; sys.argv = ['ftr', 'train', *sys.argv[1:]]\nfrom ftrecipes.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    for words in (["data=file", "data.path=a.jsonl"], ["data=file", "data.path=b.jsonl"], ["data=hub"], ["data=file"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=in_tmp, check=False)
        assert done.returncode == 2, done.stderr
        assert done.stdout == "False\n"
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (in_tmp / "outputs").exists() or not any((in_tmp / "outputs").rglob("run.json"))


# -- files ---------------------------------------------------------------------------------------------------------------

TRICKY = [
    {"question": 'He said "no", then left;\nwhy?', "answer": "Ünïcödé 🙂, tab\there"},
    {"question": "  spaces  ", "answer": "1"},
    *({"question": f"What is {i}?", "answer": str(i)} for i in range(40)),
]


def write_csv(path: Path, delimiter: str) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(TRICKY)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda p: lines(p, *TRICKY),
    "b.jsonl": lambda p: p.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(json.dumps(r, ensure_ascii=False) for r in TRICKY).encode()),
    "a.json": lambda p: p.write_text(json.dumps(TRICKY, indent=2)),
    "a.ndjson": lambda p: lines(p, *TRICKY),
    "a.csv": lambda p: write_csv(p, ","),
    "semicolon.csv": lambda p: write_csv(p, ";"),
    "a.tsv": lambda p: write_csv(p, "\t"),
    "a.parquet": lambda p: pq.write_table(pa.Table.from_pylist(TRICKY), p, row_group_size=7),
    "saved": lambda p: datasets.Dataset.from_list(TRICKY).save_to_disk(p),
    "shuffled": lambda p: datasets.Dataset.from_list(TRICKY[::-1]).select(range(len(TRICKY) - 1, -1, -1)).save_to_disk(p),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_examples(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    found = read(tmp_path / name, validation=0.0, test=0.0)
    assert bare(found.train) == [{"prompt": r["question"], "response": r["answer"]} for r in TRICKY]
    assert found.validation == found.test == []
    assert str(tmp_path / name) in found.train[0]["place"]
    numbers = [int(re.split(r"[ :]", e["place"])[-1]) for e in found.train]
    assert numbers == sorted(set(numbers)) and numbers[-1] >= len(TRICKY)
    split = read(tmp_path / name)
    assert [len(split.train), len(split.validation), len(split.test)] == [37, 3, 2]


def test_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("One\nstory.\n\n\nTwo. \n \nThree.\n")
    found = read(path, validation=0.0, test=0.0).train
    assert bare(found) == [{"text": "One\nstory."}, {"text": "Two."}, {"text": "Three."}]
    assert [e["place"].rpartition(":")[2] for e in found] == ["1", "5", "7"]


def test_folders_bring_their_splits(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": "x"} for i in range(30)]
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    lines(mixed / "train-00000-of-00002.jsonl", *rows[:10])
    lines(mixed / "train-00001-of-00002.jsonl", *rows[10:20])
    pq.write_table(pa.Table.from_pylist(rows[20:25]), mixed / "dev.parquet")
    (mixed / "test.csv").write_text("question,answer\n25?,x\n26?,x\n")
    (mixed / "README.md").write_text("about")
    found = read(mixed)
    assert [e["prompt"] for e in found.train] == [f"{i}?" for i in range(20)]
    assert {e["prompt"] for e in found.validation} == {f"{i}?" for i in range(20, 25)} and {e["prompt"] for e in found.test} == {
        "25?",
        "26?",
    }
    saved = tmp_path / "saved"
    tables = {"train_sft": datasets.Dataset.from_list(rows[:20]), "test_sft": datasets.Dataset.from_list(rows[20:])}
    datasets.DatasetDict(tables).save_to_disk(saved)
    with pytest.raises(UserError, match="no train split; there are train_sft, test_sft"):
        read(saved)
    found = read(saved, splits={"train": "train_sft", "test": "test_sft"})
    assert len(found.test) == 10 and len(found.train) + len(found.validation) == 20 and len(found.validation) >= 1


def test_label_words_come_with_the_file(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([{"text": "Bad.", "label": 0}, {"text": "Good.", "label": 1}])
    table = table.cast_column("label", datasets.ClassLabel(names=["negative", "positive"]))
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "a.parquet")
    for name in ("saved", "a.parquet"):
        found = read(tmp_path / name, validation=0.0, test=0.0)
        assert [e["response"] for e in found.train] == ["negative", "positive"]
    assert [e["response"] for e in read(tmp_path / "a.parquet", validation=0.0, test=0.0, labels=["no", "yes"]).train] == ["no", "yes"]


def test_unneeded_columns_are_not_read(tmp_path: Path) -> None:
    """A column of images would cost time, memory and packages."""
    table = pa.Table.from_pylist([{"question": "Hi?", "image": {"bytes": b"\xff" * 9, "path": None}, "answer": "Yes."}])
    pq.write_table(table, tmp_path / "a.parquet")
    features = datasets.Features({"question": datasets.Value("string"), "image": datasets.Image(), "answer": datasets.Value("string")})
    datasets.Dataset.from_list(
        [{"question": "Hi?", "image": {"bytes": b"no image", "path": None}, "answer": "Yes."}], features
    ).save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "saved"):
        assert bare(read(tmp_path / name).train) == [QA]


def test_large_sets_stay_on_disk_and_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines(tmp_path / "a.jsonl", *TRICKY)
    held = read(tmp_path / "a.jsonl")
    monkeypatch.setattr(files, "HELD", 10)
    monkeypatch.setattr(files, "HELD_BYTES", 1000)
    on_disk = read(tmp_path / "a.jsonl")
    assert isinstance(held.train, list) and isinstance(on_disk.train, files.Rows)
    assert list(on_disk.train) == held.train and on_disk.train[5] == held.train[5]
    assert held.validation == on_disk.validation and held.fingerprint == on_disk.fingerprint


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    from tools import fresh_process

    row = json.dumps({"question": "q " * 2000, "answer": "a"})
    path = tmp_path / "big.jsonl"
    with path.open("w") as file:
        for i in range(30_000):
            file.write(row.replace("q ", f"{i} ", 1) + "\n")
    assert path.stat().st_size > 120e6
    code = (
        "import types\nfrom ftrecipes.data import files\nimport ftrecipes.data.base\n"
        f"knobs = compose(['data=file', 'data.path={path}']).data\nbefore = resident()\n"
        "high = peak(lambda: globals().update(found=files.build(knobs, 'causal-lm')))\n"
        "print(json.dumps([high - before, len(found.train) + len(found.validation) + len(found.test)]))"
    )
    grown, n = fresh_process(code)
    assert n == 30_000
    assert grown < 100e6, f"{grown / 1e6:.0f} MB"


# -- splits --------------------------------------------------------------------------------------------------------------


def where(found: Splits) -> dict[str, set[str]]:
    """Split → prompts."""
    return {name: {e["prompt"] for e in getattr(found, name)} for name in ("train", "validation", "test")}


def numbered(n: int) -> list[dict[str, str]]:
    return [{"question": f"What is {i} and {i * i}?", "answer": str(i)} for i in range(n)]


def test_splits_are_deterministic_and_further_rows_move_none(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", *numbered(400))
    first = where(read(tmp_path / "a.jsonl", validation=0.1, test=0.2))
    assert first == where(read(tmp_path / "a.jsonl", validation=0.1, test=0.2))
    assert 20 <= len(first["validation"]) <= 60 and 50 <= len(first["test"]) <= 110
    order = [e["prompt"] for e in read(tmp_path / "a.jsonl").test]
    lines(tmp_path / "b.jsonl", *reversed(numbered(400)))
    assert order == [e["prompt"] for e in read(tmp_path / "b.jsonl").test]  # so the first of them are no part of a sorted file
    lines(tmp_path / "b.jsonl", *reversed(numbered(900)))
    later = where(read(tmp_path / "b.jsonl", validation=0.1, test=0.2))
    for split, prompts in first.items():
        assert prompts <= later[split]
    answers = [{**row, "answer": "another"} for row in numbered(400)]
    assert where(read(lines(tmp_path / "c.jsonl", *answers), validation=0.1, test=0.2)) == first  # the prompt decides


def test_equal_prompts_share_a_split(tmp_path: Path) -> None:
    rows = [
        {"question": variant, "answer": str(j)}
        for row in numbered(60)
        for j, variant in enumerate((row["question"], row["question"].upper() + " "))
    ]
    found = where(read(lines(tmp_path / "a.jsonl", *rows), validation=0.2, test=0.2))
    keys = {split: {" ".join(p.split()).casefold() for p in prompts} for split, prompts in found.items()}
    assert all(keys.values()) and sum(map(len, keys.values())) == 60
    assert sum(map(len, found.values())) == 120
    dialogues = [
        {"messages": [{"role": "user", "content": f"Hi {i % 40}"}, TURNS[1], {"role": "user", "content": str(i)}, TURNS[1]]}
        for i in range(120)
    ]
    found2 = read(lines(tmp_path / "b.jsonl", *dialogues), validation=0.2, test=0.2)
    openings = [{e["messages"][0]["content"] for e in s} for s in (found2.train, found2.validation, found2.test)]
    assert all(openings) and sum(map(len, openings)) == 40


def test_own_splits_do_not_leak_into_training(tmp_path: Path) -> None:
    rows = numbered(20)
    lines(tmp_path / "train.jsonl", *rows)
    lines(tmp_path / "validation.jsonl", *rows[:3], {"question": "new", "answer": "x"}, {"question": "NEW 2", "answer": "x"})
    lines(tmp_path / "test.jsonl", rows[5], {"question": "new  2", "answer": "y"})
    found = read(tmp_path)
    got = where(found)
    assert len(got["test"]) == 2 and len(got["validation"]) == 4 and len(got["train"]) == 16
    assert not got["train"] & (got["validation"] | got["test"])
    assert any(n.startswith("train: left out 4 examples whose prompts are also in a held-out set (first ") for n in found.notes)
    assert any(n.startswith("validation: left out 1 examples") for n in found.notes)
    lines(tmp_path / "train.jsonl", *rows[:3])
    with pytest.raises(UserError, match="every prompt of the train set is also in a held-out set"):
        read(tmp_path)


@pytest.mark.parametrize("n", range(1, 12))
def test_few_examples_are_shared_out(n: int, tmp_path: Path) -> None:
    found = read(lines(tmp_path / "a.jsonl", *numbered(n)))
    sizes = [len(found.train), len(found.validation), len(found.test)]
    assert sum(sizes) == n and sizes[0] >= 1
    assert all(sizes) or n < 3
    assert any("too few different prompts" in note for note in found.notes) == (n < 3)
    none = read(tmp_path / "a.jsonl", validation=0.0, test=0.0)
    assert len(none.train) == n


# -- the hub -------------------------------------------------------------------------------------------------------------


def test_hub_sets_are_read_through_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.Dataset.from_list(numbered(50))
    calls = []

    def load_dataset(path: str, **options: Any) -> Any:
        calls.append((path, options))
        return table.select(range(10)) if "split" in options else datasets.DatasetDict(train=table, test=table.select(range(3)))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(files, "_reachable", lambda: True)
    given = knobs(name="hub", id="someone/sums", config="main")
    files.check(given)
    found = files.hub(given, "causal-lm")
    assert calls == [("someone/sums", {"name": "main", "revision": None})]
    assert len(found.test) == 3 and len(found.train) + len(found.validation) == 47
    assert found.test[0]["place"].startswith("someone/sums test: row ")
    found = files.hub(box({**given, "splits": {"train": "train_sft[:10]"}, "validation": 0.0, "test": 0.0}), "causal-lm")
    assert calls[-1][1]["split"] == "train_sft[:10]" and len(found.train) == 10


def test_hub_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_reachable", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=r"data\.id=nobody/nothing-here: the hub cannot be reached and there is no cached copy") as caught:
        files.hub(knobs(name="hub", id="nobody/nothing-here"), "causal-lm")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    with pytest.raises(UserError, match=r"data=hub needs data\.id="):
        files.check(knobs(name="hub"))
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the package datasets is not installed \(pip install 'ftrecipes\[data\]'\)"):
        files.check(knobs(name="hub", id="a/b"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"a\.parquet: the package pyarrow is not installed \(pip install 'ftrecipes\[data\]'\)"):
        files._parquet(Path("a.parquet"))


# -- runs ----------------------------------------------------------------------------------------------------------------

WORDS = [*(w for w in SMALL if "size" not in w), "data=file", "data.path=a.jsonl", "trainer.max_steps=6", "method=full"]


def test_a_run_on_a_file_reports_target_and_forgetting(in_tmp: Path) -> None:
    lines(in_tmp / "a.jsonl", *numbered(60))
    (in_tmp / "r.txt").write_text("\n\n".join(f"Tom has {i} pears." for i in range(30)))
    run = train(*WORDS, "data.retain=r.txt", folder=in_tmp / "run")
    assert run.record and {"test", "retain", "validation"} == set(run.record.info["results"]["after"])
    assert run.retain_name == "r.txt" and len(run.data["retain"].keep) == 16
    assert run.data_notes[0] == "a.jsonl: read as instruction (prompt=question, response=answer)"
    none = train(*WORDS, "data.retain=none", "data.test=0", "data.validation=0")
    assert not len(none.data["retain"]) and not len(none.data["test"])


def test_the_stand_in_for_forgetting_is_said(in_tmp: Path) -> None:
    lines(in_tmp / "a.jsonl", *numbered(10))
    assert not any("stand-in" in n for n in splits_of(compose(["data=file", "data.path=a.jsonl"])).notes)
    found = splits_of(compose(["data=file", "data.path=a.jsonl", "model=smollm2-135m"]))
    assert any(n.startswith("forgetting is measured on generated stories in simple English, a stand-in") for n in found.notes)
    assert not any(
        "stand-in" in n for n in splits_of(compose(["data=file", "data.path=a.jsonl", "model=smollm2-135m", "data.retain=none"])).notes
    )


def test_a_run_does_not_go_on_with_other_data(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines(in_tmp / "a.jsonl", *numbered(60))
    words = [*WORDS, "trainer.checkpoint_every=2"]
    assert train_cut_short(*words, folder=in_tmp / "same", at=5).step == 6

    def resumed(*words: str, folder: Path) -> Run:
        lines(in_tmp / "a.jsonl", *numbered(61))
        return train(*words, folder=folder)

    monkeypatch.setattr(tools, "train", resumed)
    with pytest.raises(UserError, match="data file: it changed since this run began"):
        train_cut_short(*words, folder=in_tmp / "other", at=5)
    with pytest.raises(UserError, match="data file: it changed since this run began"):
        Run.open(in_tmp / "same", data=True)


def test_formats_are_declared_once() -> None:
    """The choices of the settings are the formats there are, and every field has usual names."""
    from ftrecipes import catalogue

    for name in ("file", "hub"):
        entry = catalogue.get("data", name)
        assert set(entry.knobs["format"]["choices"]) == {"auto", *formats.FORMATS}
        assert set(entry.knobs) - {"path", "id", "config", "revision"} == set(catalogue.get("data", "file").knobs) - {"path"}
    assert {f for required, optional in formats.FORMATS.values() for f in required + optional} == set(formats.NAMES)


def test_packaged_pairs_have_one_right_and_one_wrong_answer() -> None:
    splits = splits_of(compose(["data=storypairs", "data.size=2000"]))
    single = splits_of(compose(["data=storyqa", "data.size=50"]))
    assert splits.target == "preference" and not single.target
    kinds: dict[str, list[bool]] = {}
    for example in [*splits.train, *splits.test]:
        (wrong,) = example["others"]
        assert wrong != example["response"] and len(wrong.split()) == len(example["response"].split())
        assert wrong.isdecimal() == example["response"].isdecimal()
        if example["kind"] in ("move", "colour", "give", "compare"):  # of the same form
            assert wrong.startswith("in the ") == (example["kind"] == "move")
            kinds.setdefault(example["kind"], []).append(wrong.split()[-1] in example["prompt"])
    assert all(0.6 < sum(told) / len(told) < 1.0 for told in kinds.values())
    prompts = [{e["prompt"] for e in split} for split in (splits.train, splits.validation, splits.test)]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])
