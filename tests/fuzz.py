"""Random command lines for `gtddp train --check`: of some it is known whether they are valid, of others not.

Used by tests/test_fuzz.py, and by the reliability campaign with more examples and with real processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from hypothesis import strategies as st

from gtddp_dist import cli, errors
from gtddp_dist.config_schema import GROUPS

EXAMPLES = int(os.environ.get("GTDDP_FUZZ_EXAMPLES", "150"))
"""Examples of a test that draws command lines."""

CONFIG = "{config}"
"""Stands in the words of a `CommandLine` for the path of its file."""


@dataclass(frozen=True)
class CommandLine:
    """Words behind `gtddp train --check`, and the bytes of the file that they name as `CONFIG`.

    valid: whether the command is to be taken; None where only the program knows.
    """

    words: tuple[str, ...]
    file: bytes | None = None
    valid: bool | None = None


@dataclass(frozen=True)
class Answer:
    """What came of a command line."""

    code: int
    out: str
    err: str


KEYS = [f"{group}.{item.name}" for group, cls in GROUPS.items() for item in dataclasses.fields(cls)]

# --- what is known to be valid, beside the options of the config `digits`


def _texts() -> st.SearchStrategy[object]:
    words = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=12)
    return st.sampled_from(["a", "../b", "/tmp/c", "1e-3", "null", "{x}", "${HOME}", "%s", "-rf"]) | words


VALID: dict[str, st.SearchStrategy[object]] = {
    "run.dir": st.none() | _texts(),
    "run.baseline": st.booleans(),
    "train.epochs": st.integers(1, 10**18),
    "train.steps": st.none() | st.integers(1, 10**18),
    "train.batch_size": st.integers(1, 10**18),
    "train.seed": st.integers(0, 2**32 - 1),
    "train.dtype": st.sampled_from(["float32", "float64", "bfloat16", "float16"]),
    "train.threads": st.none() | st.integers(1, 10**6),
    "train.clip_norm": st.none() | st.floats(1e-300, 1e300),
    "schedule.warmup_steps": st.integers(0, 10**18),
    "schedule.min_factor": st.floats(0, 1),
    "eval.every": st.none() | st.integers(1, 10**18),
    "log.progress": st.booleans(),
    "checkpoint.keep": st.integers(1, 10**18),
    "model.width": st.none() | st.integers(1, 10**9),
    "model.activation": st.none() | st.sampled_from(["relu", "gelu", "silu", "elu", "softplus", "tanh"]),
    "optimizer.lr": st.none() | st.floats(1e-300, 1e300) | st.integers(1, 10**15),
    "optimizer.betas": st.none() | st.lists(st.floats(0, 0.999), min_size=2, max_size=2),
    "optimizer.gauss_newton_weight": st.none() | st.floats(0, 1e300) | st.just("1/B"),
    "optimizer.rollout": st.none() | st.sampled_from(["linear", "nonlinear"]),
    "optimizer.scope": st.sampled_from([None, "batch", "micro_batch"]),
    "parallel.pipe": st.integers(1, 10**9),
    "parallel.lost_after_s": st.floats(5, 3600),
    "launch.time": st.integers(1, 10**9) | st.sampled_from(["1-0:00:00", "30", "12:30:00"]),
    "launch.setup": st.lists(_texts(), max_size=3),
    "bench.image": st.lists(st.integers(1, 10**9), min_size=3, max_size=3),
}
"""Key -> values that are valid together with any of the others."""

# --- what is known not to be

WRONG: dict[str, list[object]] = {
    "run.dir": ["", 3, True, ["a"], {"a": 1}],
    "run.baseline": ["yes", "true ", 1, 0, None, "null"],
    "train.epochs": [0, -1, 1.0, 1e3, "8", True, None, [8], {}, float("nan"), float("inf")],
    "train.steps": [0, -5, 0.5, "four", False],
    "train.batch_size": [0, -32, 3.5, None, "32"],
    "train.micro_batches": [0, 3, 10**18],
    "train.seed": [-1, 2**32, 2**62, 1.5, None],
    "train.dtype": ["float8", "Float32", "", None, 32],
    "train.clip_norm": [0, -1.0, float("inf"), float("nan"), "big", True],
    "schedule.min_factor": [-0.1, 1.1, float("nan")],
    "schedule.milestones": [[0], ["a"], "3", 3, [[3]], [3], {"3": 3}],
    "model.name": ["", "resnet", "RESNET18", None, 18, ["resnet18"], "{listed}", "os.system", "a\x1b[31mb"],
    "model.channels": [[0], [1, 2, 3], ["a"], 16],
    "model.blocks": [0, -1, None],
    "data.name": ["mnits", "../digits", None, "{kind}"],
    "data.dir": ["x"],
    "optimizer.name": ["gtddp_adam", "gtddp-", "builtins:eval", None],
    "optimizer.lr": [0, -0.1, float("inf"), float("nan"), "1e", True, [0.1]],
    "optimizer.betas": [[0.9], [0.9, 1.0], [0.9, 0.99, 0.999], [-0.1, 0.9], "0.9,0.99", 0.9, ["a", "b"]],
    "optimizer.momentum": [0.9],
    "optimizer.scope": [0, "all", 7.0, True, -1],
    "parallel.pipe": [0, -2, 1.5, None, "two"],
    "parallel.data": [3, 5, 0],
    "parallel.zero": [2, -1, 1, True],
    "parallel.lost_after_s": [0, 4.9, 3601, float("nan"), None],
    "launch.time": [0, "1h", "1:99", "", -1],
    "bench.classes": [1, 0],
    "bench.image": [[3, 32], [3, 32, 32, 32], [0, 1, 1], []],
}
"""Key -> values that are refused, with the options of the config `digits` beside them."""

UNKNOWN = ["train.epoch", "epochs", "a.b", "train", "", ".", "train.", ".epochs", "Train.epochs", "train.epochs.x"]
UNKNOWN += ["__class__", "train.__init__", "optimizer.name.x", "{0}", "%s", "\u202etrain.epochs", "x" * 5000]

BASE: dict[str, dict[str, object]] = {
    "train": {"epochs": 8, "batch_size": 32},
    "schedule": {"name": "cosine"},
    "optimizer": {"name": "gtddp-adam", "lr": 0.03},
}
"""What every file that these tests write says."""

REFUSED_TEXT = [
    "",
    " \n\n",
    "# only a comment\n",
    "---\n...\n",
    "null\n",
    "7\n",
    "[]\n",
    "- train\n",
    "just words\n",
    "train:\n",
    "train: 3\n",
    "train: []\n",
    "train:\n  epochs: 1\n  epochs: 2\n",
    "train: {epochs: 1}\ntrain: {steps: 2}\n",
    "train: {epochs: 1, 'epochs': 1}\n",
    "train: &a {epochs: 1}\n",
    "train: *a\n",
    "a: &a [*a]\n",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n",
    "train: {<<: {epochs: 1}}\n",
    "train: !!python/object/apply:os.system ['true']\n",
    "train: {epochs: !!python/object/new:int [1]}\n",
    "!!python/module:os {}\n",
    "train: !!map {epochs: 1}\n",
    "train: {epochs: !!int '1'}\n",
    "train: {epochs: !own 1}\n",
    "%TAG ! tag:x,2000:\n---\ntrain: {epochs: !int 1}\n",
    "%YAML 9.9\n---\ntrain: {epochs: 1}\n",
    "train: {epochs: 1}\n---\ntrain: {epochs: 2}\n",
    "train:\n\tepochs: 1\n",
    "train:\n  epochs: 1\n steps: 2\n",
    "train: {epochs: 1\n",
    "train: {epochs: 1}}\n",
    "train: 'open\n",
    'train: "\\UFFFFFFFF"\n',
    'train: "\\ud800"\n',
    "train: {epochs: " + "9" * 5000 + "}\n",
    "train: {epochs: 0x" + "f" * 200 + "}\n",
    "train: {epochs: 1e999}\n",
    "train: {epochs: -.inf}\n",
    "optimizer: {lr: " + "1" * 400 + ".0}\n",
    "[" * 2000,
    "{a: " * 2000,
    "- " * 2000,
    "? " * 2000,
    "'\\\n" * 500,
    "x: |\n" + "  y\n" * 1000,
    "1: 2\n",
    "null: 2\n",
    "true: 2\n",
    "? [train]\n: {epochs: 1}\n",
    "? {train: 1}\n: 2\n",
    "train: {1: 2}\n",
    "train: {? [a, b] : 2}\n",
    "train.epochs: 3\n",
    "train: {epochs: 1:30}\n",
    "train: {epochs: 2020-01-01}\n",
    "train: {epochs: 08.5.1}\n",
    "\ufefftrain: {epochs: 0}\n",
    "train: {epochs: 1}\x00",
    "\x07",
    "train: {epochs: \u2028}\n",
    "run: {dir: [" + "a, " * 3000 + "]}\n",
    "import os; os.system('true')\n",
    "<config/>\n",
]
"""Texts that no reader of a configuration may take."""

REFUSED_BYTES = [
    b"\xff\xfe\xfa",
    b"train: {epochs: 1} # \xe9t\xe9",
    "train: {epochs: 1}\n".encode("utf-16"),
    "train: {epochs: 1}\n".encode("utf-32"),
    b"\x80\x04\x95\x00",
    b"PK\x03\x04",
    b"\x1f\x8b\x08\x00",
    b"\xed\xa0\x80: 1",
    b"\xc0\xaf",
    bytes(range(256)),
    b"\x00" * 64,
]
"""The same, not even text in UTF-8."""


class _Dumper(yaml.SafeDumper):
    """Quotes every string: what PyYAML leaves bare is by the rules of YAML 1.1, where 1e-3 is a string."""


_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def yaml_text(value: object) -> str:
    """A value as a word of the command line, which reads it as YAML, gives it."""
    text = str(yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6, allow_unicode=True))
    return text.removesuffix("\n").removesuffix("\n...")


def file_of(changes: dict[str, object]) -> bytes:
    """A config file: `BASE` with changes by dotted key."""
    tree = {group: dict(values) for group, values in BASE.items()}
    for key, value in changes.items():
        group, _, name = key.partition(".")
        tree.setdefault(group, {})[name] = value
    return str(yaml.dump(tree, Dumper=_Dumper, allow_unicode=True)).encode("utf-8")


# --- strategies

_valid_changes = st.lists(st.sampled_from(sorted(VALID)), unique=True, max_size=5).flatmap(
    lambda keys: st.fixed_dictionaries({key: VALID[key] for key in keys})
)


def _together(words: list[tuple[str, object]]) -> tuple[str, ...]:
    return tuple(f"{key}={yaml_text(value)}" for key, value in words)


@st.composite
def valid_commands(draw: st.DrawFn) -> CommandLine:
    """A file or the shipped config, with changes in the file and over it, that all keep to their ranges."""
    inside, over = draw(_valid_changes), draw(_valid_changes)
    words = _together(list(over.items()))
    if draw(st.booleans()):
        prefix = draw(st.sampled_from([b"", b"# caf\xc3\xa9\n", b"---\n", b"\n\n"]))
        return CommandLine((CONFIG, *words), prefix + file_of(inside), valid=True)
    return CommandLine(("digits", *words), valid=True)


@st.composite
def invalid_commands(draw: st.DrawFn) -> CommandLine:
    """A valid command with one thing wrong in it."""
    command = draw(valid_commands())
    wrong = draw(st.sampled_from(["value", "value in file", "key", "word", "text", "bytes", "name", "flag"]))
    name, *words = command.words
    if wrong == "value":
        key = draw(st.sampled_from(sorted(WRONG)))
        # Last, as the later of two counts; what else was drawn might make it right.
        return CommandLine(("digits", f"{key}={yaml_text(draw(st.sampled_from(WRONG[key])))}"), valid=False)
    if wrong == "value in file":
        key = draw(st.sampled_from(sorted(WRONG)))
        return CommandLine((CONFIG,), file_of({key: draw(st.sampled_from(WRONG[key]))}), valid=False)
    if wrong == "key":
        place = draw(st.integers(0, len(words)))
        words.insert(place, f"{draw(st.sampled_from(UNKNOWN))}={draw(st.sampled_from(['1', 'x', '[]']))}")
    elif wrong == "word":
        bad = ["more", "=", "=1", "train.epochs", "train.epochs=", "train.epochs= ", "train.epochs=[", "a=\0"]
        bad += [
            "train.epochs=!!int 1",
            "train.epochs=&a 1",
            "train.epochs=*a",
            "train.epochs=1\n---\n2",
            "\udcff=\udcff",
        ]
        bad += [
            "train.epochs=" + "[" * 3000,
            "run.dir='",
            'run.dir="\\ud800"',
            "run.dir=\udc80",
            "train.seed=" + "9" * 9999,
        ]
        words.insert(draw(st.integers(0, len(words))), draw(st.sampled_from(bad)))
    elif wrong == "text":
        return CommandLine(
            (CONFIG, *words), draw(st.sampled_from(REFUSED_TEXT)).encode("utf-8", "surrogatepass"), False
        )
    elif wrong == "bytes":
        return CommandLine((CONFIG, *words), draw(st.sampled_from(REFUSED_BYTES)), valid=False)
    elif wrong == "name":
        names = [
            "",
            " ",
            "digit",
            "nowhere.yaml",
            ".",
            "..",
            "/",
            "/dev/null",
            "a\0b",
            "a\0b.yaml",
            "~",
            "digits/",
            "-",
        ]
        names += ["\udcff.yaml", "x" * 300, "x" * 5000 + ".yaml", "../configs/digits", "digits.yml/x", "*", "%s", "{}"]
        name = draw(st.sampled_from(names))
    else:
        flags = ["--chek", "--check=1", "-x", "--resume", "--resume=", "--resume=nowhere", "--", "--no-check", "-"]
        words.insert(draw(st.integers(0, len(words))), draw(st.sampled_from(flags)))
        if "--" in words:  # by itself it is nothing wrong
            words.append("--check")
    return CommandLine((name, *words), command.file, valid=False)


_anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def wild_commands(draw: st.DrawFn) -> CommandLine:
    """Any keys with any values, and files with parts cut out, doubled and replaced."""
    key = st.sampled_from(KEYS) | st.text(max_size=6)
    value = _anything.map(str) | st.text(max_size=12)
    words = draw(st.lists(st.tuples(key, value).map("=".join) | st.text(max_size=12), max_size=4))
    if draw(st.booleans()):
        return CommandLine(("digits", *words))
    data = bytearray(file_of(draw(st.dictionaries(st.sampled_from(KEYS), _anything, max_size=4))))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 12)))
        data[start:end] = draw(st.binary(max_size=4) | st.just(bytes(data[start:end]) * 3) | st.just(b"\n"))
    return CommandLine((CONFIG, *words), bytes(data))


commands = valid_commands() | invalid_commands() | wild_commands()

# --- running them


def arguments(command: CommandLine, folder: Path) -> list[str]:
    """Writes the file of a command into `folder`; the arguments of gtddp."""
    file = folder / "config.yaml"
    if command.file is not None:
        file.write_bytes(command.file)
    return ["train", "--check", *(word.replace(CONFIG, str(file)) for word in command.words)]


def in_process(command: CommandLine, folder: Path) -> Answer:
    """Runs a command in this process, its output through streams as strict as a process has them."""
    out, err = (
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict", write_through=True),
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True),
    )
    words = arguments(command, folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(words)
    except SystemExit as stopped:  # argparse's way out
        code = errors.OK if stopped.code is None else int(stopped.code)
    finally:
        os.chdir(before)
    texts = [stream.buffer.getvalue().decode("utf-8") for stream in (out, err)]
    return Answer(code, *texts)


def as_process(command: CommandLine, folder: Path) -> Answer:
    """The same in a process of its own, where the operating system can pass the words to one."""
    words = [os.fsencode(word) for word in arguments(command, folder)]
    done = subprocess.run(
        [sys.executable, "-m", "gtddp_dist", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    return Answer(done.returncode, *(text.decode("utf-8", "replace") for text in (done.stdout, done.stderr)))


def can_be_a_process(command: CommandLine) -> bool:
    """Whether its words can be arguments of a process: no zero bytes, nothing that has no bytes."""
    try:
        return all(b"\0" not in os.fsencode(word) for word in command.words)
    except UnicodeEncodeError:
        return False


def problem(command: CommandLine, answer: Answer, folder: Path) -> str:
    """What is wrong with an answer; empty where nothing is. `folder` is where it ran."""
    expected = {True: (errors.OK,), False: (errors.BAD_INPUT,), None: (errors.OK, errors.BAD_INPUT)}[command.valid]
    left = sorted(path.name for path in folder.rglob("*") if path.name != "config.yaml")
    if answer.code not in expected:
        return f"exit code {answer.code}, expected {' or '.join(map(str, expected))}: {answer.err[-2000:]}"
    if "Traceback" in answer.err:
        return f"a traceback: {answer.err[-2000:]}"
    if answer.code == errors.OK and (answer.err or not answer.out):
        return f"valid, but it says: {answer.out!r}, {answer.err[:500]!r}"
    if answer.code == errors.BAD_INPUT and (answer.out or "error: " not in answer.err):
        return f"refused without saying why: {answer.out!r}, {answer.err[:500]!r}"
    return f"it has written {left}" if left else ""
