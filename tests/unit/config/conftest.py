"""A directory with files to point a vm.conf at, and a way to load one from text."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vmd.config.check import ConfigErrors, load
from vmd.config.model import Config, VmConfig


class Loader:
    """Writes configurations to files and loads them; keeps the warnings."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "vm.conf"
        self.warnings: list[str] = []
        self.image = directory / "disk.img"
        self.image.write_bytes(b"")

    def load(self, text: str | bytes, **macros: str) -> Config:
        """Return what a text says."""
        self.path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(str(self.path), macros=macros, warn=self.warnings.append)

    def vm(self, options: str) -> VmConfig:
        """Return the VM that a block's options describe."""
        (vm,) = self.load(f'vm "a" {{\n{options}\n}}\n').vms
        return vm

    def errors(self, text: str | bytes, **macros: str) -> list[str]:
        """Return the error lines of a text, without the path in front if it is ours."""
        with pytest.raises(ConfigErrors) as refused:
            self.load(text, **macros)
        return [str(error).removeprefix(f"{self.path}:") for error in refused.value.errors]


@pytest.fixture
def conf(tmp_path: Path) -> Loader:
    """A loader with a directory of its own."""
    return Loader(tmp_path)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    """Write a further file and return its path."""

    def write_file(name: str, text: str) -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write_file
