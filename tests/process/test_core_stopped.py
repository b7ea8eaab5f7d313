"""Core processes are stopped (SIGSTOP) or hang: clients that wait for them are told, and guests run on."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bystander import NAME, PROMPT, Bystander, vm_block
from tests.support.clients import connect, receive
from tests.support.daemon import DEADLINE_S, Daemon
from vmd.ipc.imsg import encode
from vmd.ipc.messages.clients import ConsoleRequest, Failed, PauseRequest, StartRequest, StopRequest
from vmd.parent.askvmm import SILENT

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.deep, pytest.mark.timeout(300)]

CONF = vm_block(NAME) + vm_block("a") + vm_block("b")


class Patient(Bystander):
    """A bystander that lets root wait for root's own control."""

    status_s = DEADLINE_S


@pytest.fixture
def vmd(tmp_path: Path) -> Iterator[Daemon]:
    """Yield a daemon."""
    with Daemon(tmp_path, CONF) as daemon:
        yield daemon


def test_vmm_that_is_stopped_is_named(vmd: Daemon) -> None:
    """A start and other requests that wait for a VM report it.  When vmm continues, it does what was requested."""
    requests = (
        StartRequest(name="a"), PauseRequest(name="b", paused=True), StopRequest(name="b", wait=True),
        ConsoleRequest(name=NAME),
    )  # fmt: skip
    vmd.must("start", "b")
    with Bystander(vmd):
        vmm = vmd.processes()["vmd: vmm"]
        os.kill(vmm, signal.SIGSTOP)
        clients = [connect(vmd.socket) for _ in requests]
        for client, request in zip(clients, requests, strict=True):
            client.send(encode(request)[0])
        for client in clients:
            with client:
                answer = receive(client)
                assert isinstance(answer, Failed)
                assert SILENT in answer.text
        assert vmd.status("a")["state"] == "starting"
        os.kill(vmm, signal.SIGCONT)

        vmd.wait_log("vmm answers again")
        vmd.wait_state("a", "running")
        vmd.wait_state("b", "stopped")
        with vmd.console("a") as console:
            console.answer("", PROMPT, DEADLINE_S)
    assert vmd.log.count(SILENT) == 1


def test_the_daemon_ends_though_vmm_is_stopped(vmd: Daemon) -> None:
    """The VMs cannot be asked to shut down, so they are killed with vmm."""
    vmd.must("start", "a")
    processes = [*vmd.processes().values()]
    os.kill(vmd.processes()["vmd: vmm"], signal.SIGSTOP)

    assert vmd.stop() == 1

    assert SILENT in vmd.log
    assert [pid for pid in processes if Path(f"/proc/{pid}").exists()] == []


def test_root_s_control_that_is_stopped_is_replaced(vmd: Daemon) -> None:
    """The log reports the replacement.  Root waits until then, and is then served."""
    with Patient(vmd) as bystander:
        control = vmd.processes()["vmd: control"]
        os.kill(control, signal.SIGSTOP)
        with connect(vmd.socket) as client:
            assert receive(client) is None
        vmd.must("status")
        assert "vmd: control: does not answer for 16 s" in vmd.log
        assert vmd.processes()["vmd: control"] != control
        bystander.core = bystander.core_now()
