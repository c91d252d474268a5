"""Where the files of a data set are, and how they get there: `data.dir`, `data.download`."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from ..config_schema import DataConfig
from ..errors import UserError
from ..models.torchvision_import import import_torchvision


@dataclass(frozen=True)
class Source:
    """A file to download; an archive (.tar.gz) is unpacked."""

    url: str
    md5: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Files:
    """The files of a data set.

    Attributes:
        data_set: its name.
        folders: under `data.dir`, and in archives, where they may be; the first is where downloads go.
        names: of all files.
        sources: where they come from.
        suffixes: endings that a file may have besides its name.
        note: for the error: what else to know.
    """

    data_set: str
    folders: tuple[str, ...]
    names: tuple[str, ...]
    sources: tuple[Source, ...]
    suffixes: tuple[str, ...] = ("",)
    note: str = ""

    def find(self, config: DataConfig) -> list[Path]:
        """The files in the order of `names`, downloaded first where they are not there and `data.download` is set.

        Raises:
            UserError: there are none, or not all; the message says the two ways to get them.
        """
        if config.dir is None:
            raise UserError(f"data.name={self.data_set} needs data.dir, the folder of its files: {self._ways()}")
        root = Path(config.dir)
        if config.download and self._missing(root):
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / ".download.lock"):  # of several ranks one downloads
                if self._missing(root):
                    self._download(root)
        missing = self._missing(root)
        if missing:
            raise UserError(f"data.dir = {root} has no {', '.join(missing)} of {self.data_set}: {self._ways()}")
        return self._in(root)

    def _ways(self) -> str:
        note = f" ({self.note})" if self.note else ""
        urls = ", ".join(source.url for source in self.sources)
        return (
            f"either set data.dir and data.download=true, which downloads {urls}, or set data.dir to a folder that has "
            f"{', '.join(self.names)} already{note}"
        )

    def _in(self, root: Path) -> list[Path]:
        """The files of the folder that has most of them."""
        found = [
            [path for name in self.names for path in self._variants(root / folder, name)[:1]] for folder in self.folders
        ]
        return max(found, key=len)

    def _variants(self, folder: Path, name: str) -> list[Path]:
        return [path for suffix in self.suffixes if (path := folder / f"{name}{suffix}").is_file()]

    def _missing(self, root: Path) -> list[str]:
        there = {path.name for path in self._in(root)}
        return [name for name in self.names if not any(f"{name}{suffix}" in there for suffix in self.suffixes)]

    def _download(self, root: Path) -> None:
        """Through torchvision, which compares checksums; a file takes its place once it is whole."""
        utils = import_torchvision("torchvision.datasets.utils")
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as temporary:
            place = Path(temporary)
            for source in self.sources:
                try:
                    utils.download_url(source.url, temporary, md5=source.md5)
                    if source.name.endswith(".tar.gz"):
                        self.unpack(place / source.name, place)
                except (OSError, RuntimeError, tarfile.TarError) as error:  # no network; another checksum
                    raise UserError(f"data.download: {source.url} cannot be had ({error}): {self._ways()}") from error
            folder = root / self.folders[0]
            folder.mkdir(parents=True, exist_ok=True)
            for name in self.names:
                for found in [path for under in self.folders for path in self._variants(place / under, name)][:1]:
                    found.replace(folder / found.name)

    def unpack(self, archive: Path, place: Path) -> None:
        """Takes the files of the data set, and nothing else, out of a .tar.gz: to their names in `place`.

        What they are called there is ours, so that no name in the archive, and no link, leads elsewhere. Raises OSError
        and tarfile.TarError.
        """
        with tarfile.open(archive, "r:gz") as packed:
            members = {member.name: member for member in packed if member.isreg()}
            for under in self.folders:
                for name in self.names:
                    member = members.get(str(Path(under) / name))
                    content = None if member is None else packed.extractfile(member)
                    if content is not None:
                        target = place / under / name
                        target.parent.mkdir(parents=True, exist_ok=True)
                        with content, open(target, "wb") as file:
                            shutil.copyfileobj(content, file)


def of_one_data_set(parts: Sequence[int], where: Path) -> None:
    """Refuse files that hold no samples, or as many images as labels do not go with.

    Raises:
        UserError: names the file.
    """
    if len(set(parts)) != 1 or parts[0] == 0:
        raise UserError(f"{where}: {' and '.join(map(str, parts))} images and labels: the files do not belong together")
