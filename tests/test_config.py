"""The configuration: precedence, strictness, messages, round trip."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gtddp_dist import config_docs, registry, strict_yaml
from gtddp_dist.config import (
    Config,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    from_yaml,
    load_config,
    shipped_configs,
    to_yaml,
)
from gtddp_dist.config_schema import GROUPS
from gtddp_dist.errors import ConfigError
from gtddp_dist.jobs.script import ranks_per_node


def write(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def message(name_or_path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(name_or_path, overrides)
    return str(caught.value)


# --- loading and precedence


def test_shipped_configs_load() -> None:
    assert {"digits", "digits-sgd"} <= set(shipped_configs())
    for name in shipped_configs():
        assert isinstance(load_config(name), Config)


@pytest.mark.parametrize("gpus", [4, 8, 32])
def test_configs_for_gpus_have_a_rank_for_each(gpus: int) -> None:
    config = load_config(f"cifar100-v100x{gpus}")
    assert config.launch.nodes * (config.launch.gpus_per_node or 0) == gpus
    assert ranks_per_node(config) == config.launch.gpus_per_node
    assert config.train.dtype != "bfloat16"


def test_command_line_over_file_over_default(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {epochs: 3, seed: 5}\n")
    config = load_config(path, ["train.epochs=4", "train.epochs=6"])
    assert config.train.epochs == 6  # the later of two overrides counts
    assert config.train.seed == 5
    assert config.train.batch_size == TrainConfig().batch_size == 32


def test_file_of_the_name_of_a_shipped_config_needs_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "train: {epochs: 3}\n", "digits")
    write(tmp_path, "train: {epochs: 4}\n", "other")
    assert load_config("digits").train.epochs == 8
    assert load_config("./digits").train.epochs == 3
    assert load_config("other").train.epochs == 4


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", ".001", "+1e-3", "1.e-3"])
def test_numbers_follow_yaml_1_2(text: str, tmp_path: Path) -> None:
    assert load_config("digits", [f"optimizer.lr={text}"]).optimizer.lr == 1e-3
    assert load_config(write(tmp_path, f"optimizer:\n  lr: {text}\n")).optimizer.lr == 1e-3


def test_an_integer_is_a_number() -> None:
    lr = load_config("digits", ["optimizer.lr=1"]).optimizer.lr
    assert lr == 1.0 and isinstance(lr, float)


def test_null_unsets(tmp_path: Path) -> None:
    path = write(tmp_path, "optimizer: {lr: 0.5}\n")
    assert load_config(path, ["optimizer.lr=null"]).optimizer.lr is None


def test_unions() -> None:
    assert load_config("digits", ["optimizer.gauss_newton_weight=1/B"]).optimizer.gauss_newton_weight == "1/B"
    assert load_config("digits", ["optimizer.scope=8"]).optimizer.scope == 8
    assert load_config("digits", ["optimizer.scope=micro_batch"]).optimizer.scope == "micro_batch"


# --- messages: every one names the key, the place, and what to do

FILE_ERRORS = [
    pytest.param("train:\n  batchsize: 3\n", ["train.batchsize", "line 2", "train.batch_size"], id="unknown key"),
    pytest.param("trian:\n  epochs: 3\n", ["trian", "line 1", "nearest: train"], id="unknown group"),
    pytest.param("\nbatch_size: 3\n", ["batch_size", "line 2", "train.batch_size"], id="key without its group"),
    pytest.param("train.epochs: 3\n", ["train.epochs", "line 1", "'train:'", "'epochs: ...'"], id="dotted key"),
    pytest.param("train: 3\n", ["train", "line 1", "indented", "got 3"], id="group is a number"),
    pytest.param("data:\ntrain:\n", ["data", "line 1", "got nothing", "line 2"], id="empty groups"),
    pytest.param("train:\n  epochs: 2.5\n", ["train.epochs = 2.5", "line 2", "integer"], id="float for integer"),
    pytest.param("train:\n  epochs: true\n", ["train.epochs = true", "line 2", "integer"], id="bool for integer"),
    pytest.param("run:\n  baseline: yes\n", ["run.baseline = 'yes'", "line 2", "boolean"], id="yes is no bool"),
    pytest.param("run:\n  baseline: 1\n", ["run.baseline = 1", "line 2", "boolean"], id="integer for bool"),
    pytest.param("run:\n  dir: 3\n", ["run.dir = 3", "line 2", "string"], id="integer for text"),
    pytest.param("train:\n  epochs: 0\n", ["train.epochs = 0", "line 2", "greater than or equal to 1"], id="range"),
    pytest.param("train:\n  seed: 4294967296\n", ["train.seed", "line 2", "less than 4294967296"], id="seed"),
    pytest.param("optimizer:\n  lr: .nan\n", ["optimizer.lr = nan", "line 2", "finite"], id="nan"),
    pytest.param("optimizer:\n  lr: .inf\n", ["optimizer.lr = inf", "line 2", "finite"], id="inf"),
    pytest.param("train:\n  dtype: float8\n", ["train.dtype", "line 2", "'float32'", "'bfloat16'"], id="choice"),
    pytest.param("data:\n  name: digit\n", ["data.name", "line 2", "digits"], id="data set"),
    pytest.param("model:\n  name: resnet\n", ["model.name", "line 2", "nearest first", "resnet18"], id="model"),
    pytest.param(
        "optimizer:\n  name: gtdp-sgd\n",
        ["optimizer.name", "line 2", "nearest first): gtddp-sgd"],
        id="optimizer",
    ),
    pytest.param(
        "optimizer:\n  scope: false\n",
        ["optimizer.scope = false", "line 2", "'batch'", "integer"],
        id="union",
    ),
    pytest.param(
        "optimizer:\n  betas: [0.9]\n",
        ["optimizer.betas = [0.9]", "line 2", "list of another length"],
        id="short list",
    ),
    pytest.param(
        "optimizer:\n  betas: [0.9, 1.0]\n",
        ["optimizer.betas", "line 2", "position 2", "less than 1"],
        id="in a list",
    ),
    pytest.param("model:\n  channels: 8\n", ["model.channels = 8", "line 2", "a list"], id="number for list"),
    pytest.param("train:\n  epochs: 1\n  epochs: 2\n", ["train.epochs", "line 3", "line 2", "twice"], id="duplicate"),
    pytest.param("train:\n  epochs: 1\ntrain:\n  seed: 2\n", ["train", "line 3", "line 1", "twice"], id="twice"),
    pytest.param("train:\n  epochs: !!int 3\n", ["line 2", "tags", "remove"], id="tag"),
    pytest.param("train:\n  dir: !!python/object/apply:os.getcwd []\n", ["line 2", "tags"], id="python tag"),
    pytest.param("train: &a {epochs: 1}\n", ["line 1", "anchors", "write the value out"], id="anchor"),
    pytest.param("train:\n  <<: {epochs: 1}\n", ["train.<<", "line 2", "unknown key"], id="merge key"),
    pytest.param("1: 2\n", ["line 1", "a key must be a word"], id="number as key"),
    pytest.param("? [a]\n: 2\n", ["line 1", "a key must be a word", "a list"], id="list as key"),
    pytest.param("train:\n  epochs: [1\n", ["line 3", "not valid YAML"], id="syntax"),
    pytest.param("train:\n\tepochs: 1\n", ["line 2", "not valid YAML"], id="tab"),
    pytest.param("train: {epochs: 1}\n---\ntrain: {}\n", ["line 2", "not valid YAML"], id="two documents"),
    pytest.param("a: \x07\n", ["line 1", "not allowed"], id="control character"),
    pytest.param("[" * 1000, ["line 1", "nested"], id="deep"),
    pytest.param("train:\n  epochs: " + "9" * 5000, ["line 2", "too large"], id="huge integer"),
    pytest.param("", ["is empty", "set at least one option"], id="empty"),
    pytest.param("# nothing\n", ["is empty"], id="only a comment"),
    pytest.param("- train\n", ["groups of options", "not ['train']"], id="list"),
    pytest.param("digits\n", ["groups of options", "not 'digits'"], id="text"),
]


@pytest.mark.parametrize(("text", "parts"), FILE_ERRORS)
def test_error_in_a_file(text: str, parts: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, text)
    found = message(path)
    for part in [path, *parts]:
        assert part in found


OVERRIDE_ERRORS = [
    ("train.epoch=3", ["train.epoch", "unknown key", "train.epochs"]),
    ("epochs=3", ["epochs", "unknown key", "train.epochs"]),
    ("optimiser.lr=3", ["optimiser.lr", "unknown key", "optimizer.lr"]),
    ("optimizer.maximize=true", ["optimizer.maximize", "unknown key", "options there: optimizer.name"]),
    ("xyz.qqq=3", ["xyz.qqq", "unknown key", "groups: run, train"]),
    ("train=3", ["train", "a group of options", "train.epochs"]),
    ("train.epochs", ["'train.epochs'", "expected key=value", "train.epochs=4"]),
    ("=3", ["'=3'", "expected key=value"]),
    ("train.epochs=", ["train.epochs", "no value", "train.epochs=null"]),
    ("train.epochs=three", ["train.epochs = 'three'", "integer"]),
    ("run.dir=[x", ["run.dir", "not valid YAML", "quotes"]),
    ("run.dir=!!str x", ["run.dir", "tags"]),
    ("optimizer.gauss_newton_weight=-1", ["optimizer.gauss_newton_weight = -1", "0", "'1/B'"]),
]


@pytest.mark.parametrize(("override", "parts"), OVERRIDE_ERRORS)
def test_error_on_the_command_line(override: str, parts: list[str]) -> None:
    found = message("digits", override)
    for part in ["command line", *parts]:
        assert part in found


CROSS_FIELD_ERRORS = [
    (["train.micro_batches=3"], ["train.micro_batches = 3", "multiple", "= 3"]),
    (["train.replica_groups=2", "train.micro_batches=5"], ["train.replica_groups = 2", "= 10"]),
    (["optimizer.scope=3"], ["optimizer.scope = 3", "divide", "32"]),
    (["optimizer.scope=16", "train.micro_batches=4"], ["optimizer.scope = 16", "divide", "8 samples"]),
    (["optimizer.statistics=value", "optimizer.metric=previous"], ["optimizer.metric=current"]),
    (
        ["optimizer.preset=paper", "optimizer.metric=previous"],
        ["optimizer.preset", "optimizer.metric=current"],
    ),
    (["optimizer.momentum=0.9"], ["optimizer.momentum", "gtddp-adam takes no option momentum", "betas"]),
    (["optimizer.name=sgd"], ["optimizer.gauss_newton_weight", "line", "sgd takes no option", "nesterov"]),
    (["optimizer.name=adam", "optimizer.preset=paper"], ["adam takes no option preset"]),
    (["train.dtype=float16", "optimizer.capture=weighted"], ["train.dtype", "capture=gradient"]),
    (["parallel.data=2", "train.replica_groups=2"], ["parallel.data = 2", "train.replica_groups", "not both"]),
    (["parallel.data=5"], ["parallel.data = 5", "train.batch_size = 32", "multiple of micro_batches * data = 5"]),
    (["parallel.pipe=3", "parallel.cuts=[2]"], ["parallel.cuts = [2]", "3 segments need 2 cuts"]),
    (["parallel.pipe=3", "parallel.cuts=[3, 2]"], ["parallel.cuts = [3, 2]", "increasing order"]),
    (["parallel.zero=1"], ["parallel.zero = 1", "gtddp-adam", "base optimizers"]),
    (["schedule.milestones=[3]"], ["schedule.milestones = [3]", "schedule.name=step"]),
    (["schedule.name=constant", "schedule.min_factor=0.1"], ["schedule.min_factor = 0.1", "schedule.name=cosine"]),
    (["schedule.gamma=0.5"], ["schedule.gamma = 0.5", "schedule.name=step"]),
    (["schedule.name=step"], ["schedule.name = 'step'", "needs schedule.milestones"]),
    (["schedule.name=step", "schedule.milestones=[5, 3]"], ["schedule.milestones = [5, 3]", "increasing"]),
    (["optimizer.name=gtddp-sgd", "optimizer.nesterov=true"], ["optimizer.nesterov", "momentum above 0"]),
    (
        ["optimizer.name=adam", "optimizer.gauss_newton_weight=null", "run.baseline=true"],
        ["run.baseline", "gtddp-"],
    ),
    (["model.stem=imagenet"], ["model.stem", "small-resnet takes no option stem", "blocks, width"]),
    (["model.name=resnet18", "model.blocks=2"], ["model.blocks = 2", "resnet18 takes no option blocks"]),
    (["model.depth=2"], ["model.depth = 2", "small-resnet takes no option depth"]),
    (
        ["optimizer.name=adam", "optimizer.gauss_newton_weight=null", "optimizer.projection=separate"],
        ["optimizer.projection = 'separate'", "adam takes no option projection"],
    ),
    (
        ["optimizer.name=gtddp-ekfac", "optimizer.projection=separate", "optimizer.cooperation=exact"],
        ["optimizer.projection = 'separate'", "optimizer.cooperation = 'exact'", "nobody to cooperate with"],
    ),
    (
        ["optimizer.name=gtddp-kfac", "optimizer.basis_method=qr"],
        ["optimizer.basis_method = 'qr'", "optimizer.name = 'gtddp-kfac'", "basis_method=eigh, or ekfac"],
    ),
    (["optimizer.name=kfac", "optimizer.gauss_newton_weight=null", "optimizer.basis_method=qr"], ["basis_method=eigh"]),
    (
        ["optimizer.name=gtddp-kfac", "optimizer.basis_lag=8", "optimizer.basis_every=8"],
        ["optimizer.basis_lag = 8", "optimizer.basis_every = 8", "expected less than 8, or a larger"],
    ),
    (["model.channels=[8, 8]"], ["model.channels = [8, 8]", "one number for each block"]),
    (["data.dir=here"], ["data.dir = 'here'", "digits takes no option dir"]),
]


@pytest.mark.parametrize(("overrides", "parts"), CROSS_FIELD_ERRORS)
def test_options_that_do_not_go_together(overrides: list[str], parts: list[str]) -> None:
    found = message("digits", *overrides)
    for part in ["command line", *parts]:
        assert part in found


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.micro_batches=4", "train.replica_groups=2", "optimizer.scope=2"],
        ["optimizer.statistics=value", "optimizer.metric=current"],
        ["optimizer.preset=paper"],
        ["optimizer.preset=paper", "optimizer.statistics=gradient", "optimizer.metric=previous"],
        ["schedule.name=step", "schedule.milestones=[3, 5]", "schedule.gamma=0.5"],
        ["schedule.name=cosine", "schedule.min_factor=0.1", "schedule.warmup_steps=3"],
        ["optimizer.name=gtddp-sgd", "optimizer.nesterov=true", "optimizer.momentum=0.9"],
        ["optimizer.name=adam", "optimizer.gauss_newton_weight=null"],
        ["model.name=resnet18", "model.stem=imagenet", "model.blocks=1"],
        ["model.blocks=2", "model.channels=[8, 16]"],
        ["model.name=vit", "model.width=16", "model.depth=2", "model.heads=2", "model.mlp_ratio=4"],
        ["optimizer.projection=separate", "optimizer.cooperation=none"],
        ["optimizer.name=gtddp-ekfac", "optimizer.projection=cooperative", "optimizer.cooperation=exact"],
        ["train.dtype=bfloat16", "optimizer.capture=weighted"],
    ],
)
def test_options_that_go_together(overrides: list[str]) -> None:
    # resnet18 takes no blocks: an option at its default counts as not set.
    assert isinstance(load_config("digits", overrides), Config)


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  epochs: 0\n  lr: 1\ndata:\n  name: mnits\n")
    found = message(path, "log.evry=3", "optimizer.lr=x")
    assert found.startswith("5 problems")
    for part in ["train.epochs = 0", "train.lr", "data.name", "log.evry", "optimizer.lr = 'x'"]:
        assert part in found


def test_an_override_takes_the_blame_from_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  epochs: 0\n")
    assert load_config(path, ["train.epochs=1"]).train.epochs == 1
    assert path not in message(path, "train.epochs=-1")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("digit", ["'digit'", "Shipped configs: digits", "path"]),
        ("", ["''", "Shipped configs"]),
        ("nowhere/mine.yaml", ["no such file", "nowhere/mine.yaml", "digits"]),
        ("nowhere/mine", ["no such file", "nowhere/mine"]),
        ("a\0b.yaml", ["cannot read"]),
    ],
)
def test_missing_file(name: str, parts: list[str]) -> None:
    found = message(name)
    for part in parts:
        assert part in found


def test_unreadable_files(tmp_path: Path) -> None:
    assert "cannot read" in message(str(tmp_path))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\xfa")
    assert "cannot read" in message(str(binary))


# --- the schema in Python


def test_a_config_cannot_be_inconsistent() -> None:
    with pytest.raises(ValidationError, match=r"batch_size must be a multiple"):
        Config(train=TrainConfig(batch_size=33, micro_batches=2))
    with pytest.raises(ValidationError, match="valid integer"):
        TrainConfig(epochs=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().epochs = 3  # type: ignore[misc]


def test_every_option_of_the_registry_is_in_the_schema() -> None:
    for config, entries in ((OptimizerConfig, registry.OPTIMIZERS), (ModelConfig, registry.MODELS)):
        names = {item.name for item in dataclasses.fields(config)} - {"name"}
        taken = {option for entry in entries.values() for option in entry.options}
        assert taken == names
    for name, entry in registry.OPTIMIZERS.items():
        assert entry.base == (None if entry.whole_batch else name.partition("-")[2] or None)


def test_every_key_is_documented() -> None:
    docs = {doc.key: doc for doc in config_docs.option_docs()}
    keys = {f"{group}.{item.name}" for group, cls in GROUPS.items() for item in dataclasses.fields(cls)}
    assert set(docs) == keys
    assert [key for key, doc in docs.items() if not doc.text] == []
    assert set(GROUPS) == {item.name for item in dataclasses.fields(Config)}
    assert docs["train.seed"].type == "integer >= 0 and < 4294967296"
    assert docs["optimizer.scope"].type == "batch|micro_batch, or integer >= 1, or null"
    assert docs["optimizer.betas"].type == "list of 2, each number >= 0 and < 1, or null"


def test_load_object() -> None:
    assert registry.load_object("gtddp_dist.config:Config") is Config
    with pytest.raises(ValueError, match="module:attribute"):
        registry.load_object("gtddp_dist.config")
    with pytest.raises(AttributeError):
        registry.load_object("gtddp_dist.config:Confg")


# --- round trip

awkward_text = st.text(min_size=1, max_size=20) | st.sampled_from(
    [
        "1e-3",
        "yes",
        "null",
        "~",
        "0o17",
        "0x1F",
        "1:30",
        "2020-01-01",
        " a ",
        "a: b",
        "# a",
        "'",
        '"',
        "x" * 300,
    ]
)


@given(
    lr=st.none() | st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    weight=st.none() | st.just("1/B") | st.floats(min_value=0, allow_infinity=False),
    directory=st.none() | awkward_text,
    milestones=st.lists(st.integers(1, 10**6), unique=True, min_size=1, max_size=4).map(sorted),
    baseline=st.booleans(),
    scope=st.sampled_from([None, "batch", "micro_batch", 4]),
)
@settings(max_examples=200, deadline=None)
@example(lr=1e-5, weight=1e300, directory="1e-3", milestones=[1], baseline=True, scope=None)
def test_round_trip(
    lr: float | None,
    weight: float | str | None,
    directory: str | None,
    milestones: list[int],
    baseline: bool,
    scope: str | int | None,
) -> None:
    from gtddp_dist.config import RunConfig

    config = Config(
        run=RunConfig(dir=directory, baseline=baseline),
        optimizer=OptimizerConfig(lr=lr, gauss_newton_weight=weight, scope=scope),  # type: ignore[arg-type]
        schedule=ScheduleConfig(name="step", milestones=tuple(milestones)),
    )
    assert from_yaml(to_yaml(config)) == config


def test_resolved_config_of_a_run_is_a_config(tmp_path: Path) -> None:
    config = load_config("digits", ["optimizer.lr=1e-3", "run.dir='1e-3'"])
    assert load_config(write(tmp_path, to_yaml(config))) == config


# --- fuzz: a configuration or a ConfigError, never anything else

KEYS = [f"{group}.{item.name}" for group, cls in GROUPS.items() for item in dataclasses.fields(cls)]
awkward_values = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        [0, 1, 2, 3, 10**30, -1, 0.5, "1/B", "batch", "step", "sgd", "gtddp-sgd", "paper", "{x}", "${HOME}"]
    )
)
nested_values = st.recursive(
    awkward_values,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=4,
)


@given(
    changes=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), nested_values, max_size=4),
    overrides=st.lists(
        st.tuples(st.sampled_from(KEYS) | st.text(max_size=6), nested_values.map(str) | st.text(max_size=12)).map(
            "=".join
        )
        | st.text(max_size=12),
        max_size=3,
    ),
    damage=st.none() | st.tuples(st.integers(0, 2000), st.text(max_size=3)),
)
@settings(max_examples=200, deadline=None)
@example(changes={}, overrides=[r'run.dir="\U99999999"', r'run.dir="\ud800"', "a=\0"], damage=None)
@example(changes={"train.epochs": 10**5000}, overrides=[], damage=None)
def test_any_input_gives_a_config_or_a_config_error(
    changes: dict[str, object], overrides: list[str], damage: tuple[int, str] | None
) -> None:
    tree: dict[str, object] = {}
    for key, value in changes.items():
        group, _, name = key.partition(".")
        place = tree.setdefault(group, {})
        if name and isinstance(place, dict):
            place[name] = value
        else:
            tree[group] = value
    try:
        text = strict_yaml.dump(tree)
    except ValueError:  # Python writes no integer of more than 4300 digits
        text = "train: {epochs: " + "9" * 5000 + "}"
    if damage is not None:
        position, inserted = damage
        text = text[: position % (len(text) + 1)] + inserted + text[position % (len(text) + 1) + 1 :]
    base = load_config("digits")
    try:
        config = from_yaml(text)
    except ConfigError as error:
        assert str(error)
    else:
        assert from_yaml(to_yaml(config)) == config
    try:
        config = load_config("digits", overrides)
    except ConfigError as error:
        assert str(error)
    else:
        assert config == base or overrides


@given(st.text(alphabet=st.sampled_from(list(":-?{}[],&*!|>'\"%@`# \n\t\\aeU01~.xu")), max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        document = strict_yaml.parse(text)
    except strict_yaml.YamlError as error:
        assert error.line >= 1
    else:
        assert document.value is None or isinstance(document.value, (str, int, float, bool, list, dict))
