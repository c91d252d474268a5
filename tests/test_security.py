"""What SECURITY.md promises: nothing that is read runs, listens to the network, tells secrets or writes elsewhere."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import safe_open
from test_resume import configure

from gtddp_dist import checkpoint, cli
from gtddp_dist.config import load_config
from gtddp_dist.data import cifar
from gtddp_dist.errors import BAD_INPUT, OK, UserError
from gtddp_dist.files import write_text_atomically
from gtddp_dist.launch.ranks import Ranks
from gtddp_dist.launch.rendezvous import connect
from gtddp_dist.pipeline.costs import read_costs
from gtddp_dist.run_directory import RunDirectory, read_metrics
from gtddp_dist.tensorboard import served
from gtddp_dist.train import evaluate_run, resume_training, run_training
from gtddp_dist.trials.folder import SweepFolder
from gtddp_dist.trials.spec import read_sweep

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCY-first",
    "HF_TOKEN": "hf_QwErTyUiOpAsDfGh-second",
    "DB_PASSWORD": "correct-horse-battery-third",
    "WANDB_API_KEY": "0123456789abcdef-fourth",
}


# --- loading runs nothing


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self._target), "w")


@pytest.fixture
def bait(tmp_path: Path) -> Path:
    """Where the payload would make a file."""
    return tmp_path / "the payload was here"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, with its checkpoints, which hold a curvature's factors too."""
    path = tmp_path_factory.mktemp("trained") / "run"
    words = ("optimizer.name=gtddp-ekfac", "train.steps=4", "checkpoint.every=2")
    assert run_training(configure(str(path), *words), "digits") == OK
    (shard,) = (path / "checkpoints" / "step-00000004").glob("*.safetensors")
    with safe_open(shard, "pt") as tensors:
        assert any("factor" in key for key in tensors.keys())  # noqa: SIM118  # no mapping
    return path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunDirectory:
    """A copy of it, whose end is forgotten: it is to be continued."""
    path = tmp_path / "run"
    subprocess.run(["cp", "-r", str(trained), str(path)], check=True)
    (path / "summary.json").unlink()
    return RunDirectory(path)


def test_the_payload_would_make_its_file(bait: Path) -> None:
    pickle.loads(pickle.dumps(Payload(bait))).close()
    assert bait.exists()


def _with_its_checksum(folder: Path) -> None:
    """Makes the index agree with the shards as they are now: whoever changes a file can do that, too."""
    index = json.loads((folder / checkpoint.INDEX).read_text())
    for name, entry in index["shards"].items():
        data = (folder / name).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    del index["sha256"]
    index["sha256"] = checkpoint._content_checksum(index)
    (folder / checkpoint.INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("consistent", [False, True])
def test_a_pickle_in_place_of_a_checkpoints_tensors(run: RunDirectory, bait: Path, consistent: bool) -> None:
    for folder in run.checkpoints.glob("step-*"):
        for shard in folder.glob("*.safetensors"):
            shard.write_bytes(pickle.dumps(Payload(bait)))
        if consistent:
            _with_its_checksum(folder)
    with pytest.raises(checkpoint.CheckpointError, match="cannot be continued"):
        resume_training(run.path)
    assert not bait.exists()


def test_a_pickle_in_place_of_a_checkpoints_index(
    run: RunDirectory, bait: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in run.checkpoints.glob("step-*"):
        (folder / checkpoint.INDEX).write_bytes(pickle.dumps(Payload(bait)))
    with pytest.raises(checkpoint.CheckpointError, match="cannot be continued"):
        resume_training(run.path)
    assert "is not JSON" in capsys.readouterr().err
    assert not bait.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml"])
def test_a_pickle_in_place_of_what_an_evaluation_reads(run: RunDirectory, bait: Path, name: str) -> None:
    (run.path / name).write_bytes(pickle.dumps(Payload(bait)))
    with pytest.raises(UserError, match=name):
        evaluate_run(run.path)
    assert not bait.exists()


@pytest.mark.parametrize("name", ["summary.json", "environment.json", "metrics.jsonl"])
def test_a_pickle_in_place_of_what_a_run_notes(run: RunDirectory, bait: Path, name: str) -> None:
    (run.path / name).write_bytes(pickle.dumps(Payload(bait)) + b"\n")
    readers: dict[str, Callable[[], object]] = {
        "summary.json": run.read_summary,
        "environment.json": lambda: run.record_start(4),
        "metrics.jsonl": lambda: read_metrics(run),
    }
    with pytest.raises(UserError, match=name):
        readers[name]()
    assert not bait.exists()


def test_a_pickle_in_place_of_a_cost_file(tmp_path: Path, bait: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = tmp_path / "costs.json"
    costs.write_bytes(pickle.dumps(Payload(bait)))
    with pytest.raises(UserError, match="no JSON"):
        read_costs(costs)
    assert cli.main(["plan", "digits", "parallel.pipe=2", f"plan.costs={costs}"]) == BAD_INPUT
    assert str(costs) in capsys.readouterr().err
    assert not bait.exists()


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:builtins.open ['{bait}', w]",
        "!!python/object/new:builtins.open ['{bait}', w]",
        "{{name: !!python/object/apply:builtins.open ['{bait}', w]}}",
    ],
)
def test_a_yaml_tag_in_a_config_and_in_a_sweep(
    tmp_path: Path, bait: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    value = text.format(bait=bait)
    config, sweep = tmp_path / "config.yaml", tmp_path / "sweep.yaml"
    config.write_text(f"train:\n  epochs: 1\nmodel: {value}\n")
    sweep.write_text(f"config: digits\nset: {value}\n")
    assert cli.main(["train", str(config)]) == BAD_INPUT
    assert cli.main(["train", "digits", f"data.dir={value}"]) == BAD_INPUT
    assert cli.main(["sweep", str(sweep), "--dir", str(tmp_path / "trials")]) == BAD_INPUT
    assert capsys.readouterr().err.count("YAML tags are not supported") == 3
    assert not bait.exists()


def test_json_that_is_nested_too_deep_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    """Python's reader raises no ValueError there."""
    deep = "[" * 200_000
    (tmp_path / "costs.json").write_text(deep)
    run.summary_file.write_text(deep)
    run.metrics_file.write_text(deep + "\n")
    for read in (lambda: read_costs(tmp_path / "costs.json"), run.read_summary, lambda: read_metrics(run)):
        with pytest.raises(UserError, match="JSON"):
            read()
    run.summary_file.unlink()
    for folder in run.checkpoints.glob("step-*"):
        (folder / checkpoint.INDEX).write_text(deep)
    with pytest.raises(checkpoint.CheckpointError, match="cannot be continued"):
        resume_training(run.path)


# --- who listens, and to whom


def listening(processes: list[int]) -> set[str]:
    """Addresses at which these processes listen, such as 127.0.0.1 and 0.0.0.0."""
    inodes = set()
    for process in processes:
        for descriptor in glob.glob(f"/proc/{process}/fd/*"):
            try:
                target = os.readlink(descriptor)
            except OSError:
                continue
            inodes.add(target.removeprefix("socket:[").rstrip("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            address, state, inode = fields[1].partition(":")[0], fields[3], fields[9]
            if state == "0A" and inode in inodes:
                if len(address) == 8:
                    found.add(".".join(str(int(address[at : at + 2], 16)) for at in (6, 4, 2, 0)))
                else:
                    found.add("::1" if address == "00000000000000000000000001000000" else f"[{address}]")
    return found


def processes_below(parent: int) -> list[int]:
    """A process and all that it has started."""
    own = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [parent, *(process for child in own for process in processes_below(int(child)))]


def test_a_run_on_one_host_listens_on_loopback_alone(tmp_path: Path) -> None:
    """Two ranks while they train."""
    config = ["digits-ranks", "train.steps=100000", f"run.dir={tmp_path / 'run'}", "log.progress=false"]
    command = [sys.executable, "-m", "gtddp_dist", "train", *config, "log.tensorboard=false", "log.every=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            deadline = time.monotonic() + 120
            while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
                assert process.poll() is None, process.stdout.read() if process.stdout else ""
                time.sleep(0.2)
            found = listening(processes_below(process.pid))
        finally:
            process.terminate()
            process.wait(60)
    assert found == {"127.0.0.1"}


def ranks_at(address: str, local_world: int, port: int = 0) -> Ranks:
    return Ranks(0, 2, 0, local_world, "here", address, port, "torchrun")


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_the_store_of_a_loopback_address_listens_there_alone() -> None:
    """Also where somebody else than gtddp has started the ranks; for other hosts it listens on all networks."""
    before = listening([os.getpid()])
    store = connect(ranks_at("127.0.0.1", 2, free_port()), 20.0)
    assert listening([os.getpid()]) - before <= {"127.0.0.1"}
    store.set("key", "value")
    assert store.get("key") == b"value"


def test_what_tells_of_dead_ranks_listens_on_loopback_alone_on_one_host() -> None:
    """Also where the host has another name for those who meet, as under Slurm and torchrun."""
    assert ranks_at("node1", local_world=2).first_address == "127.0.0.1"
    assert ranks_at("node1", local_world=1).first_address == "node1"


def test_a_port_that_is_taken_is_still_named() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of here.* is in use"):
            connect(ranks_at("127.0.0.1", 2, port), 20.0)


def test_gloo_needs_no_network_on_one_host() -> None:
    environ: dict[str, str] = {}
    ranks_at("127.0.0.1", 2).export(environ)
    assert environ["GLOO_SOCKET_IFNAME"] == "lo"
    environ = {"GLOO_SOCKET_IFNAME": "ib0"}
    ranks_at("127.0.0.1", 2).export(environ)
    assert environ["GLOO_SOCKET_IFNAME"] == "ib0"
    environ = {}
    ranks_at("node1", 1).export(environ)
    assert "GLOO_SOCKET_IFNAME" not in environ


def test_tensorboard_listens_on_loopback_alone(trained: Path) -> None:
    before = listening([os.getpid()])
    with served([trained], port=0) as address:
        assert address.startswith(("http://127.0.0.1:", "http://localhost:"))
        assert listening([os.getpid()]) - before <= {"127.0.0.1", "::1"}
        assert listening([os.getpid()])


# --- secrets


def files_below(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def test_secrets_of_the_environment_are_written_nowhere(tmp_path: Path) -> None:
    """The run directory, the job's script and logs, and what is printed; by a job that trains."""
    run = tmp_path / "run"
    words = ["digits", "train.steps=2", f"run.dir={run}", "launch.executor=local", "--wait"]
    done = subprocess.run(
        [sys.executable, "-m", "gtddp_dist", "submit", *words],
        env={**os.environ, **SECRETS},
        capture_output=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == OK, done.stderr.decode()
    names = {path.name for path in files_below(run)}
    assert {"environment.json", "history.jsonl", "config.yaml", "summary.json"} <= names
    assert any(name.endswith(".out") for name in names)
    for secret in SECRETS.values():
        assert secret.encode() not in done.stdout + done.stderr
        for path in files_below(tmp_path):
            assert secret.encode() not in path.read_bytes(), path


def test_a_job_script_has_no_secrets(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gtddp_dist", "submit", "digits", "--dry-run", f"run.dir={tmp_path / 'run'}"],
        env={**os.environ, **SECRETS},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "#SBATCH" in done.stdout
    assert not [secret for secret in SECRETS.values() if secret in done.stdout]


# --- nothing is written elsewhere


def archive_with(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(path, "w:gz") as packed:
        for member, data in members:
            member.size = len(data)
            packed.addfile(member, io.BytesIO(data))


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_an_archive_writes_only_the_files_of_its_data_set(tmp_path: Path) -> None:
    files = cifar._files(cifar._CIFAR10)
    folder, name = files.folders[0], files.names[0]
    outside, place = tmp_path / "outside", tmp_path / "a" / "place"
    outside.mkdir()
    place.mkdir(parents=True)
    (outside / "kept").write_text("kept")
    archive_with(
        tmp_path / "evil.tar.gz",
        [
            (tarfile.TarInfo("../escaped"), b"x"),
            (tarfile.TarInfo(f"{folder}/../../../escaped"), b"x"),
            (tarfile.TarInfo(str(outside / "absolute")), b"x"),
            (link(folder, str(outside), tarfile.SYMTYPE), b""),
            (link(f"{folder}/{files.names[1]}", str(outside / "kept"), tarfile.SYMTYPE), b""),
            (link(f"{folder}/{files.names[2]}", str(outside / "kept"), tarfile.LNKTYPE), b""),
            (link(f"{folder}/{files.names[3]}", "", tarfile.FIFOTYPE), b""),
            (tarfile.TarInfo(f"{folder}/{files.names[1]}/inside"), b"x"),
            (tarfile.TarInfo(f"{folder}/{name}"), b"content"),
            (tarfile.TarInfo("run-me.py"), b"x"),
        ],
    )
    files.unpack(tmp_path / "evil.tar.gz", place)
    assert {str(path.relative_to(place)) for path in files_below(place)} == {f"{folder}/{name}"}
    assert (place / folder / name).read_bytes() == b"content"
    assert not (place / folder).is_symlink()
    assert [path.name for path in outside.iterdir()] == ["kept"] and (outside / "kept").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"outside", "a", "evil.tar.gz"}


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "..", "a/b", "", ".", "a\0b", "-rf"])
def test_the_name_of_a_trial_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / "sweep.yaml").write_text("config: digits\nparameters: {optimizer.lr: [0.1, 0.2]}\n")
    listing = [{"name": name, "label": "x", "values": {}}]
    write_text_atomically(sweep / "trials.json", json.dumps(listing))
    with pytest.raises(UserError, match=r"trials.json: does not list the trials of a sweep: .* is not the name"):
        SweepFolder(sweep).read()


def test_names_of_variants_and_values_make_no_paths(tmp_path: Path) -> None:
    from gtddp_dist.trials.space import trials_of

    file = tmp_path / "sweep.yaml"
    file.write_text(
        "config: digits\nvariants: {'../../../escaped': {optimizer.lr: 0.1}, '/etc/passwd': {optimizer.lr: 0.2}}\n"
    )
    names = [item.trial.name for item in trials_of(read_sweep(str(file)))]
    assert len(names) == 2
    for name in names:
        assert "/" not in name and (tmp_path / name).resolve().parent == tmp_path


def test_the_name_of_a_config_makes_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gtddp_dist.run_folder import new_path

    monkeypatch.chdir(tmp_path)
    made = new_path(load_config("digits"), "../../elsewhere/evil")
    assert made.resolve().parent == tmp_path / "runs"


def test_a_checkpoint_that_names_files_elsewhere_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    """Its index may list shards by their names only."""
    for folder in run.checkpoints.glob("step-*"):
        index = json.loads((folder / checkpoint.INDEX).read_text())
        [(name, entry)] = index["shards"].items()
        index["shards"] = {f"../../../{name}": entry}
        del index["sha256"]
        index["sha256"] = checkpoint._content_checksum(index)
        (folder / checkpoint.INDEX).write_text(json.dumps(index))
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(checkpoint.CheckpointError, match="cannot be continued"):
        resume_training(run.path)
