"""`gtddp doctor`: what it says of machines that are wrong in one way each, and of ranks that run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from gtddp_dist.doctor import checks, facts, folder, network, report, run, run_doctor
from gtddp_dist.doctor.checks import Check
from gtddp_dist.doctor.facts import RankFacts
from gtddp_dist.doctor.network import Link
from gtddp_dist.launch.ranks import Ranks, alone

GIB = 1 << 30


def healthy(rank: int, host: str = "a") -> RankFacts:
    return RankFacts(
        rank=rank,
        local_rank=rank,
        host=host,
        pid=1,
        python="3.11.7",
        packages={"gtddp-dist": "0.1.0", "torch": "2.13.0+cpu", "deepspeed": "0.19.8", "tqdm": "4.70.1"},
        threads=1,
        usable_cores=8,
        open_files=4096,
        disk_free=100 * GIB,
        shared_memory_free=8 * GIB,
    )


def with_gpu(rank: int, host: str = "a", identity: str | None = None) -> RankFacts:
    return dataclasses.replace(
        healthy(rank, host),
        device="Tesla V100",
        device_id=f"{host} {identity or rank}",
        capability="7.0",
        cuda="12.8",
        nccl="2.27.5",
    )


def found(name: str, facts: Sequence[RankFacts]) -> Check:
    [check] = [check for check in checks.check_facts(facts) if check.name == name]
    return check


def test_healthy_ranks_are_well() -> None:
    for ranks in ([healthy(0)], [healthy(rank, "ab"[rank % 2]) for rank in range(4)], [with_gpu(0), with_gpu(1)]):
        assert {check.status for check in checks.check_facts(ranks)} == {"ok"}
        assert not any(check.advice for check in checks.check_facts(ranks))


@pytest.mark.parametrize(
    ("name", "change", "status", "text"),
    [
        ("versions", {"python": "3.10.2"}, "problem", r"Python: 3.11 on ranks 0, 1 \(a\); 3.10 on rank 2 \(b\)"),
        ("versions", {"python": "3.11.8"}, "ok", "the same on all ranks"),
        ("versions", {"revision": "abc"}, "problem", r"revision of the code: none on ranks 0, 1 \(a\); abc on rank 2"),
        ("versions", {"cuda": "12.8"}, "problem", "CUDA: none on ranks 0, 1"),
        ("devices", {"device_id": "b 0", "device": "H200"}, "problem", "no GPU on ranks 0, 1, but on the other"),
        ("devices", {"no_kernels": "no kernels for sm_70"}, "problem", "rank 2: no kernels for sm_70"),
        ("host names", {"loopback": "127.0.1.1"}, "warning", r"b is 127\.0\.1\.1 \(rank 2\)"),
        ("threads", {"host": "a", "threads": 7}, "warning", "a: 9 threads of 3 ranks on 8 cores"),
        ("open files", {"open_files": 256}, "warning", "at most 256 on rank 2; 3 ranks may need 576"),
        ("free disk", {"disk_free": 2 * GIB}, "warning", "2 GiB on rank 2"),
        ("free disk", {"disk_free": 1 << 20}, "problem", "1 MiB on rank 2"),
        ("/dev/shm", {"shared_memory_free": 64 << 20}, "warning", "64 MiB free on rank 2"),
        ("facts", {"unknown": {"GPU": "lost"}}, "warning", r"GPU: lost \(rank 2\)"),
    ],
)
def test_what_is_wrong_with_one_rank_is_said_of_that_rank(
    name: str, change: dict[str, object], status: str, text: str
) -> None:
    odd = dataclasses.replace(healthy(2, "b"), **change)  # type: ignore[arg-type]
    check = found(name, [healthy(0), healthy(1), odd])
    assert check.status == status, check
    assert re.search(text, check.text), check
    assert bool(check.advice) == (status != "ok")


@pytest.mark.parametrize(
    ("package", "version", "status", "text"),
    [
        ("torch", "2.10.0", "problem", "torch: 2.13.0+cpu on rank 0 (a); 2.10.0 on rank 1 (b)"),
        ("deepspeed", None, "problem", "deepspeed: 0.19.8 on rank 0 (a); not installed on rank 1 (b)"),
        ("tqdm", "4.1", "warning", "tqdm: 4.70.1 on rank 0 (a); 4.1 on rank 1 (b)"),
    ],
)
def test_packages_that_differ_are_named(package: str, version: str | None, status: str, text: str) -> None:
    other = healthy(1, "b")
    other = dataclasses.replace(other, packages={**other.packages, package: version})
    check = found("versions", [healthy(0), other])
    assert check.status == status and check.text == text


def test_deepspeed_is_needed_by_several_ranks_only() -> None:
    without = [dataclasses.replace(healthy(rank), packages={"torch": "2.13.0"}) for rank in range(2)]
    assert found("deepspeed", without[:1]).status == "warning"
    assert found("deepspeed", without).status == "problem"


def test_ranks_that_share_a_gpu() -> None:
    shared = [with_gpu(0), with_gpu(1, identity="0"), with_gpu(2, "b", "0")]
    check = found("devices", shared)
    assert check.status == "problem" and check.text.startswith("on one GPU: ranks 0, 1.")
    mixed = [with_gpu(0), dataclasses.replace(with_gpu(1), device="H200")]
    assert found("devices", mixed).status == "warning"


def test_what_data_goes_over() -> None:
    def backend(*ranks: RankFacts) -> tuple[str, str]:
        return network.choose_backend(ranks)

    assert backend(with_gpu(0), with_gpu(1))[0] == "nccl"
    assert backend(healthy(0), healthy(1)) == ("gloo", "there is no GPU")
    assert backend(with_gpu(0), healthy(1)) == ("gloo", "not every rank has a GPU")
    assert backend(with_gpu(0), with_gpu(1, identity="0")) == ("gloo", "NCCL refuses several ranks on one GPU")
    assert backend(dataclasses.replace(with_gpu(0), no_kernels="none"))[0] == "gloo"


def test_a_torch_without_kernels_for_the_gpu_is_said_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimpleNamespace(name="Tesla V100-SXM2-32GB", major=7, minor=0, uuid="GPU-1", total_memory=32 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    collected = facts.collect_facts(alone(), tmp_path)
    assert collected.device == gpu.name and collected.capability == "7.0"
    check = found("devices", [collected])
    assert check.status == "problem" and "compute capability 7.0 (it has: sm_80, sm_90)" in check.text
    assert check.advice == "pip install -c constraints/v100.txt"
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70", "sm_80"])
    assert found("devices", [facts.collect_facts(alone(), tmp_path)]).status == "ok"


def test_a_fact_that_cannot_be_found_out_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> object:
        raise OSError("no such thing here")

    monkeypatch.setattr(facts, "describe_environment", broken)
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    collected = facts.collect_facts(alone(), tmp_path)
    assert collected.unknown.keys() >= {"environment", "GPU"} and collected.disk_free is not None
    assert RankFacts.from_json(collected.to_json()) == collected


def test_a_check_that_fails_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checks._CHECKS, "devices", lambda facts: Check("devices", "ok", str(1 // 0)))
    made = checks.check_facts([healthy(0)])
    assert len(made) == len(checks._CHECKS)
    assert [check.name for check in made if check.status != "ok"] == ["devices"]
    assert "the check itself failed: ZeroDivisionError" in found("devices", [healthy(0)]).text


def test_clocks() -> None:
    ranks = [healthy(0), healthy(1), healthy(2, "b")]
    assert checks.check_clocks([5.0, 5.01, 5.02], ranks).status == "ok"
    check = checks.check_clocks([5.0, 5.01, 65.0], ranks)
    assert check.status == "warning" and check.text == "60.0 s apart: rank 2 (b) +60.0 s"


def test_figures_for_people() -> None:
    told = {0: "0 bytes", 999: "999 bytes", 1010 << 20: "0.986 GiB", 3 << 40: "3 TiB"}
    assert {count: checks.size(count) for count in told} == told
    assert [checks.duration(seconds) for seconds in (25e-6, 2e-3, 3.0)] == ["25 us", "2 ms", "3 s"]


def test_which_links_are_measured() -> None:
    assert network.pairs(["a"]) == []
    assert network.pairs(["a", "a", "a"]) == [(0, 1), (1, 2)]
    assert network.pairs(["a", "a", "b", "b", "c", "c"]) == [
        (0, 1),
        (1, 2),
        (2, 3),
        (3, 4),
        (4, 5),
        (0, 2),
        (0, 4),
        (2, 4),
    ]
    assert len(network.pairs([str(host) for host in range(100)])) == network.MOST_LINKS


def test_links_that_fail_or_are_slow_are_named() -> None:
    good = [Link(rank, rank + 1, "same host", 1e-5, 1e9) for rank in range(4)]
    assert network.check_links(good, 4).status == "ok"
    slow = network.check_links([*good, Link(4, 5, "same host", 1e-5, 1e8)], 5)
    assert slow.status == "warning" and slow.text.startswith("slow: 4 - 5 (")
    # Links to other hosts are slower than those within one, as they should be.
    assert network.check_links([*good, Link(4, 5, "other host", 1e-4, 1e8)], 5).status == "ok"
    bad = network.check_links([*good, Link(4, 5, "other host", None, None, "rank 4: timed out")], 9)
    assert bad.status == "problem" and bad.text == "4 - 5: rank 4: timed out; 4 more not tried"


# The folder --------------------------------------------------------------------------------------------------


class Threads:
    """Ranks that are threads: the texts of all, once all have given theirs."""

    def __init__(self, world: int) -> None:
        self.texts = [""] * world
        self.barrier = threading.Barrier(world, timeout=30)
        self.local = threading.local()

    def allgather(self, key: str, text: str, within_s: float | None = None) -> list[str]:
        self.texts[self.local.rank] = f"{key}|{text}"
        self.barrier.wait()
        found = [other.partition("|") for other in self.texts]
        self.barrier.wait()
        assert {other for other, _, _ in found} == {key}  # all ranks are at the same place
        return [text for _, _, text in found]


def check_folders(folders: Sequence[Path], within_s: float) -> Check:
    """What all ranks come to, each with the folder that it sees."""
    meeting = Threads(len(folders))

    def work(rank: int) -> Check:
        meeting.local.rank = rank
        return folder.check_folder(folders[rank], rank, meeting, within_s)

    with ThreadPoolExecutor(len(folders)) as pool:
        made = [future.result(60) for future in [pool.submit(work, rank) for rank in range(len(folders))]]
    assert all(check == made[0] for check in made)
    return made[0]


def test_a_folder_that_all_see(tmp_path: Path) -> None:
    for world in (1, 3):
        assert check_folders([tmp_path] * world, 20.0).status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_see_another_folder_are_named(tmp_path: Path) -> None:
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    there.mkdir()
    elsewhere.mkdir()
    check = check_folders([there, elsewhere, there, tmp_path / "nowhere"], 0.2)
    assert check.status == "problem"
    assert f"rank 1: {elsewhere}: not the folder of rank 0" in check.text
    assert f"rank 3: {tmp_path / 'nowhere'}: does not exist" in check.text
    assert "rank 2" not in check.text
    assert [*there.iterdir(), *elsewhere.iterdir()] == []


def test_a_rank_that_cannot_write_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = check_folders([tmp_path / "nowhere"] * 2, 0.2)
    assert check.status == "problem" and check.text.startswith("rank 0: ")
    write = folder._write
    monkeypatch.setattr(
        folder, "_write", lambda place, rank, token: "read-only" if rank == 1 else write(place, rank, token)
    )
    check = check_folders([tmp_path] * 3, 5.0)
    assert check.text == "rank 1: read-only"
    # One that writes something else, or reads what another run left.
    monkeypatch.setattr(folder, "_write", lambda place, rank, token: write(place, rank, "old" if rank == 1 else token))
    check = check_folders([tmp_path] * 3, 5.0)
    assert check.text.startswith("rank 1: its file is not seen by rank 0") and check.text.endswith("has other content")
    # One whose file does not come to rank 0, though it says that it wrote it.
    monkeypatch.setattr(folder, "_write", lambda place, rank, token: "" if rank == 2 else write(place, rank, token))
    check = check_folders([tmp_path] * 3, 0.3)
    assert check.text.startswith("rank 2: its file is not seen by rank 0")


# All of it ---------------------------------------------------------------------------------------------------


def test_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_doctor(tmp_path)
    shown = capsys.readouterr().out
    assert "shared folder      ok" in shown and "all-reduce (gloo)  ok" in shown
    assert not dist.is_initialized()
    assert list(tmp_path.iterdir()) == []


def test_the_exit_code_says_whether_there_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_doctor(tmp_path / "nowhere", as_json=True) == 1
    content = json.loads(capsys.readouterr().out)
    status = {check["name"]: check["status"] for check in content["checks"]}
    assert status["shared folder"] == "problem" and status["all-reduce (gloo)"] == "ok"


def test_a_rank_that_never_comes_is_named_and_the_rest_still_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = Ranks(0, 2, 0, 2, "here", "127.0.0.1", port, "torchrun")
    assert run_doctor(tmp_path, ranks, as_json=True, start_within_s=0.5) == 1
    content = json.loads(capsys.readouterr().out)
    first = content["checks"][0]
    assert first["status"] == "problem" and "rank 1 of 2 not there after" in first["text"]
    assert len(content["checks"]) == 1 + len(checks._CHECKS) and len(content["ranks"]) == 1


RANK = """
import os, sys
from pathlib import Path
from gtddp_dist.doctor import network, run_doctor
from gtddp_dist.launch.ranks import Ranks

rank, world, port, directory, spoil = sys.argv[1:]
ranks = Ranks(int(rank), int(world), int(rank), int(world), "host" + rank, "127.0.0.1", int(port), "torchrun")
network.MARGIN_S = 1.0
if spoil == "dies" and rank == "1":
    network.measure_links = lambda *arguments: os._exit(9)
sys.exit(run_doctor(Path(directory), ranks, as_json=True, start_within_s=60, timeout_s=5))
"""


def start_ranks(world: int, directory: Path, spoil: str = "") -> tuple[list[int], dict[str, list[dict[str, object]]]]:
    """Exit codes, and what rank 0 said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(RANK), str(rank), str(world), str(port), str(directory), spoil],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]
    try:
        said = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait(10)
    assert said[1:] == [""] * (world - 1)
    return [process.returncode for process in processes], json.loads(said[0])


def test_three_ranks_measure_their_links(tmp_path: Path) -> None:
    codes, content = start_ranks(3, tmp_path)
    status = {str(check["name"]): check["status"] for check in content["checks"]}
    assert status["links"] == status["all-reduce (gloo)"] == status["shared folder"] == "ok"
    # Each stands for a host of its own; that this host's name may lead to 127.0.0.1 is none of the test's business.
    assert [(link["first"], link["second"], link["kind"]) for link in content["links"]] == [
        (0, 1, "other host"),
        (1, 2, "other host"),
        (0, 2, "other host"),
    ]
    for link in content["links"]:
        assert 0 < float(str(link["latency_s"])) < 5 and float(str(link["bytes_per_s"])) > 1e5
    assert [rank["rank"] for rank in content["ranks"]] == [0, 1, 2]
    assert codes == [int("problem" in status.values())] * 3
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_dies_while_links_are_measured_is_named(tmp_path: Path) -> None:
    codes, content = start_ranks(2, tmp_path, "dies")
    assert codes == [1, 9]
    assert content["checks"][-1]["name"] == "ranks" and "rank 1 of 2 not there" in str(content["checks"][-1]["text"])
    assert "shared folder" in [check["name"] for check in content["checks"]]


def test_what_goes_on_screen() -> None:
    shown = report.render(
        [Check("devices", "ok", "cpu"), Check("links", "problem", "0 - 1: timed out", "look for a firewall")],
        [healthy(0), healthy(1)],
        [Link(0, 1, "same host", None, None, "timed out"), Link(1, 2, "other host", 25e-6, 1 << 30)],
    )
    assert "problem: links: 0 - 1: timed out.\n  What to do: look for a firewall." in shown
    assert "25 us" in shown and "1 GiB/s" in shown and "failed" in shown
    assert shown.endswith("1 problem, no warnings")


def test_an_error_that_nobody_thought_of_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(run.network, "measure_links", broken)
    assert run_doctor(tmp_path, as_json=True) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["checks"][-1]["text"] == "KeyError: 'surprise'"
    assert not dist.is_initialized()
