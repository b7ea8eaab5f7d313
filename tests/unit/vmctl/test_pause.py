"""vmctl pause and unpause."""

import errno
import json

import pytest

from tests.unit.vmctl.conftest import Vmctl
from tests.unit.vmctl.fake import FakeDaemon
from vmd.ipc.messages.clients import Failed, PauseRequest, VmPaused

WORDS = pytest.mark.parametrize(("word", "paused"), [("pause", True), ("unpause", False)])


@WORDS
def test_request_and_message(vmctl: Vmctl, daemon: FakeDaemon, word: str, paused: bool) -> None:
    """The VM is named, and upstream's text goes to standard error."""
    daemon.answers(VmPaused(vmid=3, name="web", paused=paused))

    assert vmctl(word, "web") == (0, "", f"vmctl: {word}d vm 3 successfully\n")
    assert daemon.requests == [PauseRequest(name="web", paused=paused)]


def test_notes_come_first(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """They stand before the message of success."""
    daemon.answers(VmPaused(vmid=3, name="web", paused=False, notes=("disk0: its lock was lost", "disk1: too")))

    assert vmctl("unpause", "-f", "web")[2] == (
        "vmctl: disk0: its lock was lost\nvmctl: disk1: too\nvmctl: unpaused vm 3 successfully\n"
    )
    assert daemon.requests == [PauseRequest(name="web", paused=False, force=True)]


@WORDS
def test_by_number(vmctl: Vmctl, daemon: FakeDaemon, word: str, paused: bool) -> None:
    """The VM is given by id."""
    daemon.answers(VmPaused(vmid=3, name="web", paused=paused))

    assert vmctl(word, "3")[0] == 0
    assert daemon.requests == [PauseRequest(vmid=3, name="3", paused=paused)]


@pytest.mark.parametrize("name", ["4294967296", "9" * 63, "0" * 22 + "9" * 30])
def test_number_beyond_32_bits_is_a_name(vmctl: Vmctl, daemon: FakeDaemon, name: str) -> None:
    """In any form: as a number it would not fit into a message."""
    daemon.answers(VmPaused(vmid=3, name=name, paused=True))

    assert vmctl("pause", name)[0] == 0
    assert daemon.requests == [PauseRequest(name=name, paused=True)]


@WORDS
def test_refusals(vmctl: Vmctl, daemon: FakeDaemon, word: str, paused: bool) -> None:
    """They have the daemon's text."""
    daemon.answers(Failed(code=errno.EINVAL, text="vm web is not running"))

    assert vmctl(word, "web") == (1, "", f"vmctl: {word} vm command failed: vm web is not running\n")


@WORDS
def test_json(vmctl: Vmctl, daemon: FakeDaemon, word: str, paused: bool) -> None:
    """Success and failure have one document each."""
    daemon.answers(VmPaused(vmid=3, name="web\n", paused=paused))
    status, output, _ = vmctl(word, "--json", "web")
    assert status == 0
    assert json.loads(output) == {"schema": 1, "id": 3, "name": "web\\x0a", "paused": paused, "notes": []}

    daemon.answers(Failed(code=errno.ENOENT, text="vm web not found"))
    status, output, _ = vmctl(word, "--json", "web")
    assert status == 4
    text = f"{word} vm command failed: vm web not found"
    assert json.loads(output) == {"schema": 1, "error": text, "code": errno.ENOENT}


@WORDS
@pytest.mark.parametrize("operands", [(), ("a", "b"), ("-x", "a")])
def test_wrong_arguments(
    vmctl: Vmctl, daemon: FakeDaemon, word: str, paused: bool, operands: tuple[str, ...]
) -> None:
    """The answer is the usage, without a request to the daemon."""
    status, output, errors = vmctl(word, *operands)

    assert (status, output, daemon.requests) == (2, "", [])
    options = "" if paused else "[-f] "
    assert errors.endswith(f"usage:\tvmctl [-v] {word} {options}id\n")
