"""Files of the shapes that others write get upstream's verdict, but where they say why not."""

from pathlib import Path

import pytest

from tests.support.shapes import ACCEPTED, IMAGES, Shape, shapes, write
from vmd.config.check import ConfigErrors, load

ROOT = Path(__file__).resolve().parents[3]
SHAPES = shapes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder in place of theirs; what is in the files is not looked at here."""
    made = tmp_path_factory.mktemp("shapes")
    (made / "minimal.conf").write_text("vm inner { disable }\n")
    return made


def test_there_are_many() -> None:
    """Of every kind."""
    assert len([shape for shape in SHAPES if shape.upstream == ACCEPTED]) >= 30
    assert len([shape for shape in SHAPES if shape.upstream != ACCEPTED]) >= 20


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_verdict(shape: Shape, folder: Path) -> None:
    """Accepted, or the first error and its line."""
    path = write(shape, folder)

    try:
        load(str(path), warn=lambda _text: None)
        said = ACCEPTED
    except ConfigErrors as refused:
        said = str(refused).splitlines()[0].removeprefix(f"{path}:")

    assert said.startswith(shape.here.replace(IMAGES.decode(), str(folder)))


@pytest.mark.parametrize("shape", [each for each in SHAPES if each.here != each.upstream], ids=lambda shape: shape.name)
def test_what_differs(shape: Shape) -> None:
    """Stands in the manual: whoever brings a file from elsewhere has to know."""
    manual = (ROOT / "man/vm.conf.5").read_text()
    section = manual[manual.index(".Sh DIFFERENCES") : manual.index(".Sh CAVEATS")]

    assert (shape.here == ACCEPTED) != (shape.upstream == ACCEPTED)
    assert shape.differs in " ".join(section.split())
    assert shape.differs
