"""A message without a handler is dropped and logged, and no process and no guest ends because of it.

A changed copy of this program declares and sends the message.  In the real program `tests/unit/ipc/test_routes.py`
finds such messages.
"""

import errno
from pathlib import Path

import pytest

from tests.support.clients import connect
from tests.support.daemon import DEADLINE_S, Daemon
from tests.support.guests import guest
from tests.support.program import changed_program
from vmd.ipc.imsg import HEADER, MAX_MESSAGE, Form, decode, encode
from vmd.ipc.messages.clients import PROTOCOL, Failed, Hello

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(240)]

PROMPT = "vmd-demo> "
FORGOTTEN = 0xFFF3
MESSAGES = {
    "children": """

@message(0xFFF0, (Proc.PARENT, Proc.CONTROL), (Proc.PARENT, Proc.VMM), (Proc.PARENT, Proc.PRIV))
class ForNobody(Record):
    pass
""",
    "vm": """

@message(0xFFF1, TO_VM)
class ForNoVm(Record):
    vmid: int

@message(0xFFF2, FROM_VM)
class OfAVm(Record):
    vmid: int
""",
    "clients": """

@request(0xFFF3, Who.EVERYBODY, "Ok")
class AskedInVain(Request):
    pass

REQUESTS = relays(Proc.CONTROL, Proc.CLIENT)
""",
}
# Before each answer to `vmctl log`.
PARENT = """

from vmd.ipc.messages.children import ForNobody
from vmd.ipc.messages.vm import ForNoVm

def _forgetful(start):
    def wrapped(self, *arguments):
        start(self, *arguments)
        room, serve = SERVES[LogRequest]
        def serve_log(*arguments):
            for proc in (Proc.CONTROL, Proc.VMM, Proc.PRIV):
                self.core.peers.send(proc, ForNobody())
            for vm in self.core.vms:
                if vm.alive:
                    self.core.peers.send(Proc.VMM, ForNoVm(vmid=vm.vmid))
            serve(*arguments)
        SERVES[LogRequest] = (room, serve_log)
    return wrapped

Parent.start = _forgetful(Parent.start)
"""
# Before each answer to `vmctl status -v`.
VM = """

from vmd.ipc.messages.vm import OfAVm

def _say(self, message, envelope, channel):
    channel.send(OfAVm(vmid=self.vmid))
    VmProcess.on_ask_devices(self, message, envelope, channel)

VmProcess.HANDLERS.update(handles(Proc.VMM, AskDevices, _say))
"""


def forgetful(code: Path) -> Path:
    """Return a copy of the program with messages that have no handler."""
    borders = {f"vmd/ipc/messages/{border}.py": text for border, text in MESSAGES.items()}
    return changed_program(code, {**borders, "vmd/parent/main.py": PARENT, "vmd/vm/main.py": VM})


def block(name: str) -> str:
    """Return a vm block."""
    return f'vm "{name}" {{\ndisable\nmemory 64M\nboot "{guest("demo")}"\n}}\n'


def test_a_message_that_nobody_serves_ends_nobody(tmp_path: Path) -> None:
    """Neither a message to a child nor one to a parent ends a process; both guests go on, and clients are answered."""
    with Daemon(tmp_path, block("a") + block("b"), code=forgetful(tmp_path / "code")) as vmd:
        for name in "ab":
            vmd.must("start", name)
        with vmd.console("a") as one, vmd.console("b") as other:
            for console in (one, other):
                console.expect(PROMPT, DEADLINE_S)
            before = vmd.processes()

            vmd.must("log", "verbose")
            vmd.must("status", "-v", "a")
            vmd.must("status", "-v", "b")

            for console in (one, other):
                console.answer("echo a" "live", "alive\r\nalive\r\n")
            assert {row["state"] for row in vmd.rows()} == {"running"}
            after = vmd.processes()
            assert {title: after.get(title) for title in before} == before
            for title, above in (("control", "parent"), ("vmm", "parent"), ("priv", "parent")):
                assert f"{title}: {above}: ForNobody is dropped: nothing here serves it" in vmd.log
            for name in "ab":
                assert f"vm/{name}: vmm: ForNoVm is dropped: nothing here serves it" in vmd.log
            assert "vmd: vmm: OfAVm is dropped: nothing here serves it" in vmd.log
        asked_in_vain(vmd.socket)
        for name in "ab":
            vmd.must("stop", "-fw", name)


def asked_in_vain(path: Path) -> None:
    """Send a request without a handler; check the error answer."""
    with connect(path) as client:
        client.send(encode(Hello(version=PROTOCOL), form=Form.NAMED)[0])
        assert isinstance(decode(client.recv(MAX_MESSAGE), [], "vmd").message, Hello)
        body = b"\x92\x80\x80"  # [{}, {}]
        client.send(HEADER.pack(FORGOTTEN, HEADER.size + len(body), 0, 0, 0) + body)
        answer = decode(client.recv(MAX_MESSAGE), [], "vmd").message
    assert answer == Failed(code=errno.ENOSYS, text="this vmd does not serve AskedInVain")
