"""What is done on the emulated host, by its own Python: each step is a function, and what it returns is its result.

Started by a unit at each boot, it goes on with the steps of that boot.  /host/results gets a line of JSON for each:
{"step", "seen"} or, if it raised something, {"step", "error"}.  Steps that follow a failed one are done all the same.
"""

import json
import os
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOST = Path("/host")
DEADLINE_S = 300.0  # the machine is some thirty times as slow as what it runs on
POLL_S = 0.5
BOOT_COUNT = Path("/var/lib/boots")


def run(*command: str) -> tuple[int, str]:
    """Run a program; returns its exit status and all that it said."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout


def must(*command: str) -> str:
    """Run a program that has to succeed; returns what it said."""
    status, said = run(*command)
    if status:
        raise RuntimeError(f"{' '.join(command)}: status {status}: {said}")
    return said


def unit(*names: str) -> dict[str, str]:
    """Return properties of the unit."""
    shown = must("systemctl", "show", "vmd", *(f"--property={name}" for name in names))
    return dict(line.split("=", 1) for line in shown.splitlines())


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not after {DEADLINE_S} s\n{run('journalctl', '-b', '-u', 'vmd')[1]}")
        time.sleep(POLL_S)


def states() -> dict[str, str]:
    """Return the state of each VM; nothing while nobody answers."""
    status, said = run("vmctl", "status", "--json")
    return {row["name"]: row["state"] for row in json.loads(said)["vms"]} if status == 0 else {}


def wait_running(*names: str) -> None:
    """Wait until these VMs run."""
    wait_for(lambda: all(states().get(name) == "running" for name in names), f"{names} run")


def rows() -> dict[str, Any]:
    """Return what is said of each VM."""
    return {row["name"]: row for row in json.loads(must("vmctl", "status", "-v", "--json"))["vms"]}


def journal(*options: str) -> list[dict[str, Any]]:
    """Return what the daemon has written into the journal since the host started, or as the options say."""
    must("journalctl", "--sync")
    lines = must("journalctl", "-o", "json", "-u", "vmd", *(options or ("-b",))).splitlines()
    return [entry for entry in map(json.loads, lines) if entry.get("_TRANSPORT") == "stdout"]


# --- first boot ----------------------------------------------------------------------------------------------------


def enable() -> dict[str, Any]:
    """Enable and start it, as the README says."""
    said = must("systemctl", "enable", "--now", "vmd")
    wait_running("full")
    return {"said": said, "rows": rows(), "devices": os.listdir("/dev"), "links": json.loads(must("ip", "-j", "link"))}


def control_group() -> dict[str, Any]:
    """Look at what the host's control groups count of it."""
    return unit("MemoryCurrent", "TasksCurrent", "ControlGroup")


def journal_fields() -> dict[str, Any]:
    """Look at its journal."""
    return {"entries": journal()}


def upgrade() -> dict[str, Any]:
    """Install a newer version while a guest runs."""
    before = unit("MainPID")
    said = must("apt-get", "-q", "-y", "install", "/host/newer.deb")
    version = must("vmctl", "--version")
    return {"said": said, "before": before, "after": unit("MainPID"), "states": states(), "version": version}


# --- second boot ---------------------------------------------------------------------------------------------------


def previous() -> dict[str, Any]:
    """Look at how the host's power-off went for the guest."""
    return {"said": [entry["MESSAGE"] for entry in journal("-b", "-1")][-20:]}


def again() -> dict[str, Any]:
    """Wait until what is enabled runs, without being asked to."""
    wait_running("full")
    return {"unit": unit("ActiveState", "NRestarts"), "said": [entry["MESSAGE"] for entry in journal()]}


BOOTS: tuple[tuple[Callable[[], dict[str, Any]], ...], ...] = (
    (enable, control_group, journal_fields, upgrade),
    (previous, again),
)


def main() -> None:
    """Do the steps of this boot, and switch the host off with its guests running."""
    number = int(BOOT_COUNT.read_text()) if BOOT_COUNT.exists() else 0
    BOOT_COUNT.write_text(str(number + 1))
    for step in BOOTS[number]:
        began = time.monotonic()
        result: dict[str, Any]
        try:
            result = {"seen": step()}
        except Exception:
            result = {"error": traceback.format_exc()}
        result |= {"step": step.__name__, "took_s": round(time.monotonic() - began, 1)}
        with open(HOST / "results", "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    must("systemctl", "poweroff")


if __name__ == "__main__":
    main()
