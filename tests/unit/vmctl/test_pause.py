"""vmctl pause and unpause."""

import errno
import json

import pytest

from tests.unit.vmctl.conftest import Vmctl
from tests.unit.vmctl.fake import FakeDaemon
from vmd.ipc.messages.clients import Failed, PauseRequest, VmPaused

WORDS = pytest.mark.parametrize(("word", "paused"), [("pause", True), ("unpause", False)])


@WORDS
def test_request_and_upstreams_words(vmctl: Vmctl, daemon: FakeDaemon, word: str, paused: bool) -> None:
    """By name, to standard error as upstream's."""
    daemon.answers(VmPaused(vmid=3, name="web", paused=paused))

    assert vmctl(word, "web") == (0, "", f"vmctl: {word}d vm 3 successfully\n")
    assert daemon.requests == [PauseRequest(name="web", paused=paused)]


def test_what_should_be_known_of_it(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """Before it is said that it was done."""
    daemon.answers(VmPaused(vmid=3, name="web", paused=False, notes=("disk0: its lock was lost", "disk1: too")))

    assert vmctl("unpause", "-f", "web")[2] == (
        "vmctl: disk0: its lock was lost\nvmctl: disk1: too\nvmctl: unpaused vm 3 successfully\n"
    )
    assert daemon.requests == [PauseRequest(name="web", paused=False, force=True)]


@WORDS
def test_by_number(vmctl: Vmctl, daemon: FakeDaemon, word: str, paused: bool) -> None:
    """An id is one."""
    daemon.answers(VmPaused(vmid=3, name="web", paused=paused))

    assert vmctl(word, "3")[0] == 0
    assert daemon.requests == [PauseRequest(vmid=3, name="3", paused=paused)]


@pytest.mark.parametrize("name", ["4294967296", "9" * 63, "0" * 22 + "9" * 30])
def test_number_beyond_32_bits_is_a_name(vmctl: Vmctl, daemon: FakeDaemon, name: str) -> None:
    """However it is written: it fits no message as a number."""
    daemon.answers(VmPaused(vmid=3, name=name, paused=True))

    assert vmctl("pause", name)[0] == 0
    assert daemon.requests == [PauseRequest(name=name, paused=True)]


@WORDS
def test_refusals(vmctl: Vmctl, daemon: FakeDaemon, word: str, paused: bool) -> None:
    """With the daemon's sentence."""
    daemon.answers(Failed(code=errno.EINVAL, text="vm web is not running"))

    assert vmctl(word, "web") == (1, "", f"vmctl: {word} vm command failed: vm web is not running\n")


@WORDS
def test_json(vmctl: Vmctl, daemon: FakeDaemon, word: str, paused: bool) -> None:
    """One document, for success and for failure."""
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
    """Answered with the usage; the daemon is not bothered."""
    status, output, errors = vmctl(word, *operands)

    assert (status, output, daemon.requests) == (2, "", [])
    options = "" if paused else "[-f] "
    assert errors.endswith(f"usage:\tvmctl [-v] {word} {options}id\n")
