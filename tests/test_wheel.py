"""The built wheel: what it holds, and that it works outside the checkout."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing left in the checkout by an earlier build gets in, and nothing is left."""
    source = tmp_path_factory.mktemp("source") / "project"
    source.mkdir()
    for folder in ("gtddp_dist", "launch", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CHECKOUT / folder, source / folder, symlinks=True, ignore=ignore)
    for file in CHECKOUT.iterdir():
        if file.is_file():
            shutil.copy(file, source)
    out = tmp_path_factory.mktemp("wheel")
    # Without isolation: the build must not need a package index.
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [built] = out.glob("*.whl")
    return built


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        entries = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    top = {name.split("/")[0] for name in entries}
    [info_folder] = [name for name in top if name.endswith(".dist-info")]
    assert top == {"gtddp_dist", info_folder}

    expected = {
        f"gtddp_dist/{path.relative_to(CHECKOUT).as_posix()}"
        for folder, pattern in (("launch", "**/*.py"), ("configs", "**/*.yaml"))
        for path in (CHECKOUT / folder).glob(pattern)
    } | {path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "gtddp_dist").glob("**/*.py")}
    assert "gtddp_dist/launch/__init__.py" in expected and "gtddp_dist/configs/digits.yaml" in expected
    assert expected | {"gtddp_dist/py.typed"} == {name for name in entries if name.startswith("gtddp_dist/")}
    for info in entries.values():
        assert not stat.S_ISLNK(info.external_attr >> 16), info.filename
        assert info.file_size or Path(info.filename).name in ("__init__.py", "py.typed"), info.filename
    assert f"{info_folder}/licenses/LICENSE" in entries


def test_installed_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    place, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(place)]
    subprocess.run([*install, str(wheel)], check=True)
    assert {path.name for path in place.iterdir() if not path.name.endswith(".dist-info")} == {"gtddp_dist", "bin"}

    environment = {**os.environ, "PYTHONPATH": str(place)}

    def python(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = "import gtddp_dist, gtddp_dist.launch as launch; print(gtddp_dist.__file__); print(launch.__file__)"
    for file in python("-c", code).split():
        assert Path(file).is_relative_to(place)
    assert python("-m", "gtddp_dist.cli", "train", "digits", "--check").startswith("ok: ")
    assert list(elsewhere.iterdir()) == []
