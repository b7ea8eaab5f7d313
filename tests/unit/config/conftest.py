"""Fixtures: a directory with files for a vm.conf to name, and a loader of configurations from text."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vmd.config.check import ConfigErrors, load
from vmd.config.model import Config, VmConfig


class Loader:
    """Writes configurations to files and loads them.  Keeps the warnings."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "vm.conf"
        self.warnings: list[str] = []
        self.image = directory / "disk.img"
        self.image.write_bytes(b"")

    def load(self, text: str | bytes, **macros: str) -> Config:
        """Return the configuration of a text."""
        self.path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(str(self.path), macros=macros, warn=self.warnings.append)

    def vm(self, options: str) -> VmConfig:
        """Return the VM of a block with these options."""
        (vm,) = self.load(f'vm "a" {{\n{options}\n}}\n').vms
        return vm

    def errors(self, text: str | bytes, **macros: str) -> list[str]:
        """Return the error lines of a text.  The path of our own file is removed from their beginning."""
        with pytest.raises(ConfigErrors) as refused:
            self.load(text, **macros)
        return [str(error).removeprefix(f"{self.path}:") for error in refused.value.errors]


@pytest.fixture
def conf(tmp_path: Path) -> Loader:
    """A loader with its own directory."""
    return Loader(tmp_path)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    """Returns a function that writes another file and returns its path."""

    def write_file(name: str, text: str) -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write_file
