"""A guest that must not notice what is done to another one, and a daemon that serves root all the while."""

from tests.support.daemon import DEADLINE_S, Daemon
from tests.support.guests import guest

PROMPT = "vmd-demo> "
NAME = "bystander"


def vm_block(name: str, *more: str) -> str:
    """Return a VM of a configuration that runs the demo guest; `more` are statements of it."""
    statements = ["disable", "memory 32M", f'boot "{guest("demo")}"', *more]
    return "\n".join((f'vm "{name}" {{', *(f"  {statement}" for statement in statements), "}\n"))


class Bystander:
    """The guest, from its start to the end of a test."""

    def __init__(self, vmd: Daemon) -> None:
        """Start it."""
        self.vmd = vmd
        vmd.must("start", NAME)
        self.pid = vmd.status(NAME)["pid"]
        self.core = self.core_now()
        with vmd.console(NAME) as console:
            console.expect(PROMPT, DEADLINE_S)

    def core_now(self) -> dict[str, int]:
        """Return the processes that all guests hang on."""
        return {title: pid for title, pid in self.vmd.processes().items() if "/" not in title and title != "vmd: vm"}

    def check(self) -> None:
        """It runs on in the same process and answers what is typed; root is answered, by the same processes."""
        row = self.vmd.status(NAME)
        assert (row["state"], row["pid"]) == ("running", self.pid), self.vmd.log
        with self.vmd.console(NAME) as console:
            console.answer("", PROMPT)
        now = self.core_now()
        for title in ("vmd: control", "vmd: vmm", "vmd: priv"):
            assert now.get(title) == self.core.get(title), self.vmd.log
