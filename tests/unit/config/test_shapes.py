"""Files in the style of other projects get upstream's verdict.  A file whose verdict differs here states the reason."""

from pathlib import Path

import pytest

from tests.support.shapes import ACCEPTED, IMAGES, Shape, shapes, write
from vmd.config.check import ConfigErrors, load

ROOT = Path(__file__).resolve().parents[3]
SHAPES = shapes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in place of those in the files.  The contents of named files are not read here."""
    made = tmp_path_factory.mktemp("shapes")
    (made / "minimal.conf").write_text("vm inner { disable }\n")
    return made


def test_there_are_many() -> None:
    """There are enough files of each verdict."""
    assert len([shape for shape in SHAPES if shape.upstream == ACCEPTED]) >= 30
    assert len([shape for shape in SHAPES if shape.upstream != ACCEPTED]) >= 20


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_verdict(shape: Shape, folder: Path) -> None:
    """A file is accepted, or its first error has the expected line and text."""
    path = write(shape, folder)

    try:
        load(str(path), warn=lambda _text: None)
        said = ACCEPTED
    except ConfigErrors as refused:
        said = str(refused).splitlines()[0].removeprefix(f"{path}:")

    assert said.startswith(shape.here.replace(IMAGES.decode(), str(folder)))


@pytest.mark.parametrize("shape", [each for each in SHAPES if each.here != each.upstream], ids=lambda shape: shape.name)
def test_differences_are_in_the_manual(shape: Shape) -> None:
    """A user with a file from another system has to find them there."""
    manual = (ROOT / "man/vm.conf.5").read_text()
    section = manual[manual.index(".Sh DIFFERENCES") : manual.index(".Sh CAVEATS")]

    assert (shape.here == ACCEPTED) != (shape.upstream == ACCEPTED)
    assert shape.differs in " ".join(section.split())
    assert shape.differs
