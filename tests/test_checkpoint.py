"""The checkpoint format: what is written comes back exactly, and what is damaged is refused by name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from gtddp_dist import checkpoint
from gtddp_dist.checkpoint import CheckpointError
from gtddp_dist.checkpoint_writer import Writer
from gtddp_dist.training_state import Progress, TrainingState, decode, encode

SHARD = "shard-00000-of-00001.safetensors"


def some_tensors() -> dict[str, Tensor]:
    return {
        "model/weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
        "model/half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "optimizer/weight/step": torch.tensor(3.0),
        "random/torch": torch.arange(16, dtype=torch.uint8),
    }


def save(directory: Path, step: int, keep: int = 10, **values: checkpoint.JSON) -> Path:
    return checkpoint.save(directory, step, some_tensors(), values, keep)


def rewrite_index(folder: Path, change: Callable[[dict[str, checkpoint.JSON]], object]) -> None:
    """Changes the index and gives it a checksum that fits, as somebody would who wants it to be believed."""
    path = folder / checkpoint.INDEX
    index = json.loads(path.read_text())
    del index["sha256"]
    change(index)
    text = json.dumps(index, sort_keys=True, separators=(",", ":"))
    index["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(index))


def test_tensors_and_values_come_back_exactly(tmp_path: Path) -> None:
    values: dict[str, checkpoint.JSON] = {"third": 1 / 3, "tiny": 5e-324, "list": [1, None, True, "x"]}
    folder = checkpoint.save(tmp_path, 120, some_tensors(), values, keep=2)
    assert folder.name == "step-00000120"
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", SHARD]
    read = checkpoint.load(folder)
    assert read.step == 120 and read.values == values
    assert read.tensors.keys() == some_tensors().keys()
    for name, tensor in some_tensors().items():
        assert read.tensors[name].dtype == tensor.dtype
        assert torch.equal(read.tensors[name], tensor), name


def test_the_format_is_that_of_version_1_to_the_byte(tmp_path: Path) -> None:
    # Written by the version before checkpoints had several shards.
    expected = {
        SHARD: "482b2bdaeba7920007d9ef123193df4a7e7f68081b7ee606a1670dffeb64dfe9",
        checkpoint.INDEX: "6db36a15713474a5bb72bb0665566952283a5b09b31e4cb15d1c8cb156dc8b91",
    }
    tensors = {
        "model/weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "optimizer/weight/step": torch.tensor(3.0),
    }
    values: dict[str, checkpoint.JSON] = {"progress": {"step": 120, "third": 1 / 3}}
    by_call = checkpoint.save(tmp_path / "call", 120, tensors, values, keep=1)
    with Writer(tmp_path / "thread", rank=0, world=1, keep=1) as writer:
        writer.save(120, tensors, values)
    for folder in (by_call, tmp_path / "thread" / by_call.name):
        written = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        assert written == expected


def test_views_and_tensors_that_share_memory_can_be_saved(tmp_path: Path) -> None:
    whole = torch.randn(4, 6)
    tensors = {"a": whole, "tied": whole, "transposed": whole.t(), "part": whole[1, 2:5]}
    read = checkpoint.load(checkpoint.save(tmp_path, 1, tensors, {}, keep=1)).tensors
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert (tmp_path / "step-00000001" / SHARD).stat().st_size < 1000  # the part is not saved with its whole


def test_shards_of_several_ranks_make_one_checkpoint(tmp_path: Path) -> None:
    folder = checkpoint.begin(tmp_path, 7, "once")
    first = checkpoint.write_shard(folder, {"model/a": torch.ones(2)}, rank=0, world=2)
    second = checkpoint.write_shard(folder, {"model/b": torch.zeros(3)}, rank=1, world=2)
    with pytest.raises(CheckpointError, match=r"no index\.json"):
        checkpoint.load(folder)
    # Entries are plain data: another rank can send its own.
    checkpoint.write_index(folder, 7, json.loads(json.dumps([first, second])), {})
    assert checkpoint.newest_valid(tmp_path)[0] is None  # only once it has its name
    folder = checkpoint.publish(folder)
    assert folder.name == "step-00000007"
    assert {name: len(tensor) for name, tensor in checkpoint.load(folder).tensors.items()} == {
        "model/a": 2,
        "model/b": 3,
    }
    with pytest.raises(ValueError, match="two shards hold the tensor 'model/a'"):
        checkpoint.write_index(folder, 7, [first, {**second, "tensors": first["tensors"]}], {})


class MakesAFile:
    """Unpickling it makes a file: the stand-in for code that a foreign checkpoint would like to run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return (Path.touch, (self.path,))


def truncate(folder: Path) -> None:
    shard = folder / SHARD
    shard.write_bytes(shard.read_bytes()[:-7])


def flip_a_byte(folder: Path) -> None:
    shard = folder / SHARD
    content = bytearray(shard.read_bytes())
    content[-3] ^= 0x10
    shard.write_bytes(content)


def flip_a_digit_of_the_index(folder: Path) -> None:
    index = folder / checkpoint.INDEX
    text = index.read_text()
    assert '"rate": 0.125' in text
    index.write_text(text.replace('"rate": 0.125', '"rate": 0.135'))


def truncate_the_index(folder: Path) -> None:
    index = folder / checkpoint.INDEX
    index.write_text(index.read_text()[:-20])


def remove_the_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def remove_the_index(folder: Path) -> None:
    (folder / checkpoint.INDEX).unlink()


def put_a_pickle_in_place_of_the_shard(folder: Path) -> None:
    content = pickle.dumps(MakesAFile(folder / "executed"))
    (folder / SHARD).write_bytes(content)

    def believe(index: dict[str, checkpoint.JSON]) -> None:
        index["shards"] = {SHARD: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}

    rewrite_index(folder, believe)


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (truncate, rf"{SHARD}: has \d+ bytes, its index says \d+"),
    (flip_a_byte, rf"{SHARD}: its content does not match its checksum"),
    (flip_a_digit_of_the_index, r"index\.json: its content does not match its checksum"),
    (truncate_the_index, r"index\.json: is not JSON"),
    (remove_the_shard, rf"{SHARD}: is missing"),
    (remove_the_index, r"step-00000020: has no index\.json, so writing it was interrupted"),
    (put_a_pickle_in_place_of_the_shard, rf"{SHARD}: is not a safetensors file"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    good = save(tmp_path, 10, rate=0.25)
    bad = save(tmp_path, 20, rate=0.125)
    assert checkpoint.load(bad).step == 20
    damage(bad)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.load(bad)
    assert str(bad) in str(error.value)
    newest, refused = checkpoint.newest_valid(tmp_path)
    assert newest is not None and newest.folder == good and newest.step == 10
    assert [item.folder for item in refused] == [bad]
    assert re.search(message, refused[0].reason)
    assert not (bad / "executed").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "something-else", r"index\.json: is not the index of a gtddp-checkpoint"),
        ("version", 2, r"has version 2 of the format, this program reads version 1"),
        ("step", 11, r"step is 11, which the folder's name does not say"),
        ("shards", {"../step-00000010/x": {}}, r"'\.\./step-00000010/x' is not the name of a shard"),
        ("shards", {}, r"the tensor 'model/weight' is in no shard that it lists"),
        ("tensors", [], r"tensors is missing or not an object"),
        ("values", None, r"values is missing or not an object"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, key: str, value: checkpoint.JSON, message: str) -> None:
    folder = save(tmp_path, 10)
    rewrite_index(folder, lambda index: index.update({key: value}))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder)


def test_names_shapes_and_types_have_to_be_those_of_the_index(tmp_path: Path) -> None:
    def damaged(step: int, tensors: dict[str, Tensor]) -> Path:
        folder = save(tmp_path, step)
        save_file(tensors, folder / SHARD)
        content = (folder / SHARD).read_bytes()
        facts: checkpoint.JSON = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        rewrite_index(folder, lambda index: index.update({"shards": {SHARD: facts}}))
        return folder

    tensors = load_file(save(tmp_path, 1) / SHARD)
    with pytest.raises(CheckpointError, match="has the key 'extra', not in its index"):
        checkpoint.load(damaged(2, {**tensors, "extra": torch.ones(1)}))
    with pytest.raises(CheckpointError, match="lacks the key 'model/half' of its index"):
        checkpoint.load(damaged(3, {name: t for name, t in tensors.items() if name != "model/half"}))
    reshaped = {**tensors, "model/weight": tensors["model/weight"].reshape(4, 3).contiguous()}
    with pytest.raises(CheckpointError, match=r"'model/weight' is float32 \[4, 3\], its index says float32 \[3, 4\]"):
        checkpoint.load(damaged(4, reshaped))
    converted = {**tensors, "model/weight": tensors["model/weight"].double()}
    with pytest.raises(CheckpointError, match=r"'model/weight' is float64 .* says float32"):
        checkpoint.load(damaged(5, converted))


def test_prune_keeps_the_newest_complete_ones(tmp_path: Path) -> None:
    for step in (5, 10, 9):
        save(tmp_path, step)
    checkpoint.begin(tmp_path, 12, "now")  # being written by somebody: no index yet
    (tmp_path / ".removed-step-00000001").mkdir()  # left by an interrupted removal
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000009",
        "step-00000010",
        "unfinished-step-00000012-now",
    ]
    with pytest.raises(ValueError, match="keep is 0"):
        checkpoint.prune(tmp_path, keep=0)


def test_the_old_one_goes_only_after_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_index", lambda *_: 1 / 0)  # the disk is full, say
        with pytest.raises(ZeroDivisionError):
            save(tmp_path, 2, keep=1)
    newest, refused = checkpoint.newest_valid(tmp_path)
    assert newest is not None and newest.step == 1
    assert [item.complete for item in refused] == [False]
    save(tmp_path, 2, keep=1)  # writes over the unfinished one
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_refused_checkpoints_are_set_aside(tmp_path: Path) -> None:
    save(tmp_path, 1)
    flip_a_byte(save(tmp_path, 2))
    remove_the_index(save(tmp_path, 3))
    _, refused = checkpoint.newest_valid(tmp_path)
    checkpoint.set_aside(refused)
    # The damaged one is its owner's to look at; the unfinished one is of no use to anybody.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["refused-step-00000002", "step-00000001"]
    assert checkpoint.newest_valid(tmp_path)[1] == []


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert checkpoint.newest_valid(tmp_path / "nowhere") == (None, [])
    with pytest.raises(CheckpointError, match="has no index"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 0.1, "text", (0.9, 0.999), [1, (2, [3.5])], {"a": {"b": (None,)}}, float("inf"), -0.0, 1e-310],
)
def test_values_come_back_with_their_types(value: object) -> None:
    text = json.dumps(encode(value, "here"), allow_nan=False)
    back = decode(json.loads(text))
    assert back == value and repr(back) == repr(value)


def test_nan_comes_back() -> None:
    assert repr(decode(encode(float("nan"), "here"))) == "nan"


@pytest.mark.parametrize("value", [torch.ones(1), {1: 2}, {"__tuple__": []}, len, {"deep": [object()]}])
def test_a_value_that_json_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"^optimizer/\S+: a checkpoint cannot hold a \w+"):
        encode(value, "optimizer/x")


# The state of a run ------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Has a buffer, and two names for one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.norm(self.first(x))))


class Noisy(torch.optim.SGD):
    """An optimizer with state of its own kind: a number by parameter, and one that belongs to none."""

    calls = 0

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        super().step()
        self.calls += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["seen"] = self.calls
                self.state[parameter]["high"] = torch.ones(2, dtype=torch.float64) / 3

    def extra_state(self) -> dict[str, checkpoint.JSON]:
        return {"calls": self.calls}

    def load_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, momentum=0.5, centered=True),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, betas=(0.8, 0.99), amsgrad=True),
    "two groups": lambda m: torch.optim.AdamW(
        [
            {"params": [p for p in m.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in m.parameters() if p.ndim == 1], "lr": 0.003, "weight_decay": 0.0},
        ],
        lr=0.01,
    ),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.1, lr_decay=0.01),
    "own state": lambda m: Noisy(m.parameters(), lr=0.1, momentum=0.9),
}


def make_state(optimizer: str, seed: int, dtype: torch.dtype = torch.float32) -> TrainingState:
    torch.manual_seed(seed)
    model = Net().to(dtype)
    built = OPTIMIZERS[optimizer](model)
    return TrainingState(model, built, LambdaLR(built, lambda step: 1 / (step + 1)), None, Progress())


def take_steps(state: TrainingState, count: int) -> None:
    dtype = next(state.model.parameters()).dtype
    for _ in range(count):
        state.optimizer.zero_grad()
        F.mse_loss(state.model(torch.randn(8, 4, dtype=dtype)), torch.zeros(8, 4, dtype=dtype)).backward()
        state.optimizer.step()
        assert state.scheduler is not None
        state.scheduler.step()
        state.progress.step += 1


def as_checkpoint(state: TrainingState, directory: Path) -> checkpoint.Checkpoint:
    tensors, values, own = state.collect()
    with Writer(directory, rank=0, world=1, keep=1) as writer:
        writer.save(state.progress.step, tensors, values, rank_values=own)
    return checkpoint.load(checkpoint.folder_of(directory, state.progress.step), state.wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_a_restored_run_goes_on_bitwise(tmp_path: Path, optimizer: str, dtype: torch.dtype) -> None:
    unbroken = make_state(optimizer, seed=0, dtype=dtype)
    take_steps(unbroken, 3)
    saved = as_checkpoint(unbroken, tmp_path)
    take_steps(unbroken, 3)

    resumed = make_state(optimizer, seed=1, dtype=dtype)  # other weights, other random numbers
    resumed.restore(saved)
    tensors, _, _ = resumed.collect()
    assert tensors.keys() == saved.tensors.keys()
    assert as_checkpoint(resumed, tmp_path / "again").values == saved.values
    for name, tensor in saved.tensors.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name
    take_steps(resumed, 3)
    expected, *expected_values = unbroken.collect()
    got, *got_values = resumed.collect()
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name].dtype == expected[name].dtype
        assert torch.equal(got[name], expected[name]), name
    assert got_values == expected_values


def test_optimizer_state_is_keyed_by_the_name_of_its_parameter(tmp_path: Path) -> None:
    state = make_state("adam", seed=0)
    take_steps(state, 2)
    tensors, _, _ = state.collect()
    assert torch.equal(
        tensors["optimizer/norm.bias/exp_avg"],
        state.optimizer.state[state.model.get_parameter("norm.bias")]["exp_avg"],
    )
    assert {name.rpartition("/")[2] for name in tensors if name.startswith("optimizer/norm.bias/")} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
    }
    # The betas are a tuple again, and rates are exact.
    restored = make_state("adam", seed=1)
    restored.restore(as_checkpoint(state, tmp_path))
    assert restored.optimizer.param_groups[0]["betas"] == (0.8, 0.99)
    assert restored.optimizer.param_groups[0]["lr"] == state.optimizer.param_groups[0]["lr"] != 0.01


def test_optimizer_state_that_is_no_tensor_comes_back(tmp_path: Path) -> None:
    state, restored = make_state("own state", seed=0), make_state("own state", seed=0)
    take_steps(state, 2)
    restored.restore(as_checkpoint(state, tmp_path))
    weight = restored.model.get_parameter("first.weight")
    assert restored.optimizer.state[weight]["seen"] == 2
    assert restored.optimizer.state[weight]["high"].dtype == torch.float64  # in a float32 model


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    state = make_state("sgd", seed=5)
    random.seed(5)
    np.random.seed(5)
    random.gauss(0, 1)
    saved = as_checkpoint(state, tmp_path)
    expected = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1))
    state.restore(saved)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)) == expected


def test_progress_comes_back(tmp_path: Path) -> None:
    state = make_state("sgd", seed=0)
    for number, item in enumerate(dataclasses.fields(Progress), start=1):
        setattr(state.progress, item.name, type(getattr(state.progress, item.name))(number))
    other = make_state("sgd", seed=0)
    other.restore(as_checkpoint(state, tmp_path))
    assert other.progress == state.progress


def test_the_loss_scale_comes_back(tmp_path: Path) -> None:
    state = dataclasses.replace(make_state("sgd", seed=0), scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    other = dataclasses.replace(make_state("sgd", seed=0), scaler=torch.amp.GradScaler("cpu"))
    other.restore(as_checkpoint(state, tmp_path))
    assert other.scaler is not None and other.scaler.get_scale() == 8.0
    with pytest.raises(CheckpointError, match="no state of: scaler"):
        other.restore(as_checkpoint(make_state("sgd", seed=0), tmp_path))


def test_another_model_or_optimizer_is_refused_by_name(tmp_path: Path) -> None:
    state = make_state("adam", seed=0)
    take_steps(state, 1)
    saved = as_checkpoint(state, tmp_path)

    with pytest.raises(CheckpointError, match="parameter groups are not those"):
        make_state("two groups", seed=0).restore(saved)
    with pytest.raises(CheckpointError, match=r"'first\.bias' is torch\.float32 \[4\], in the model .*float64"):
        make_state("adam", seed=0, dtype=torch.float64).restore(saved)

    without = dataclasses.replace(
        saved, tensors={name: t for name, t in saved.tensors.items() if name != "model/norm.running_mean"}
    )
    with pytest.raises(CheckpointError, match=r"has no tensor 'norm\.running_mean' of the model"):
        make_state("adam", seed=0).restore(without)
    for key, message in [
        ("model/third.weight", r"the model has no tensor 'third\.weight'"),
        ("optimizer/third.weight/exp_avg", r"the model has no parameter 'third\.weight'"),
    ]:
        more = dataclasses.replace(saved, tensors={**saved.tensors, key: torch.ones(1)})
        with pytest.raises(CheckpointError, match=message):
            make_state("adam", seed=0).restore(more)


def test_optimizer_state_that_the_format_cannot_hold_is_refused() -> None:
    state = make_state("sgd", seed=0)
    weight = state.model.get_parameter("first.weight")
    state.optimizer.state[weight]["history"] = [torch.ones(2)]  # as LBFGS keeps it
    with pytest.raises(CheckpointError, match=r"optimizer/first\.weight/history: .* cannot hold a Tensor"):
        state.collect()
