"""vmctl log: let every process of the daemon log more, or less."""

from vmctl.commands.reload import show_notes
from vmctl.errors import UsageError
from vmctl.options import operand, parse_options
from vmctl.session import Session
from vmd.ipc.messages import LogRequest, Ok

LEVELS = {"brief": 0, "verbose": 2}


def run(session: Session, arguments: list[str]) -> int:
    """Send the verbosity; its name may be shortened, in any case (*cat. 3.2*)."""
    _, operands = parse_options(arguments)
    word = operand(operands).lower()
    levels = [verbosity for name, verbosity in LEVELS.items() if word and name.startswith(word)]
    if not levels:
        raise UsageError
    show_notes(session.client.ask(LogRequest(verbosity=levels[0]), Ok))
    return 0
