"""Candidates for the next word of a command line, for the completions of shells.

The files in completions/ run `vmctl --complete WORD ...` with the words after `vmctl`.  The last word is still being
typed.  The answer has these lines:

    words | files       `files` if names of files are candidates, too
    WORD<tab>WHAT       one for each candidate; WHAT may be empty
"""


from vmctl.errors import UsageError
from vmctl.options import find_command
from vmctl.output import clean, put
from vmctl.session import Session
from vmctl.table import (
    COMMAND,
    COMMANDS,
    COMMON,
    FILE,
    GLOBAL,
    SEED_FILES,
    SEED_WORDS,
    SWITCH,
    VM,
    Command,
    Operand,
    Option,
)
from vmd import signals as signal
from vmd.client import DEFAULT_SOCKET
from vmd.errors import VmdError

DEADLINE_S = 2  # a slow daemon must not block the user who types

Candidates = list[tuple[str, str]]


class Place:
    """The place of the cursor, found from the words before it."""

    def __init__(self, words: list[str]) -> None:
        """Read the words before the cursor.  Raises UsageError if they are wrong."""
        self.command: Command | None = None
        self.options: tuple[Option, ...] = GLOBAL
        self.given: dict[str, str] = {}
        self.operands = 0
        self.only_operands = False  # after --
        self.pending: Option | None = None  # an option whose value comes next
        for word in words:
            self._take(word)

    def _take(self, word: str) -> None:
        if self.pending is not None:
            self.given[self.pending.name] = word
            self.pending = None
        elif self.only_operands or not word.startswith("-") or word == "-":
            self._take_operand(word)
        elif word == "--":
            self.only_operands = self.command is not None
        elif word.startswith("--"):
            self.given[word] = ""
        else:
            self._take_letters(word[1:])

    def _take_operand(self, word: str) -> None:
        if self.command is None:
            self.command = find_command(word)
            self.options = (*self.command.options, *COMMON)
        else:
            self.operands += 1

    def _take_letters(self, letters: str) -> None:
        known = {option.name: option for option in self.options}
        for index, letter in enumerate(letters):
            option = known.get(f"-{letter}")
            if option is None:
                raise UsageError(f"unknown option -- {letter}")
            self.given[option.name] = letters[index + 1 :] if option.value else ""
            if option.value:
                self.pending = None if letters[index + 1 :] else option
                return

    def next(self) -> "Option | Operand | None":
        """Return the option or operand that the typed word is the value of; None if there is none."""
        if self.pending is not None:
            return self.pending
        if self.command and self.command.behind and self.only_operands:
            return None  # these words are for another program
        operands = self.command.operands if self.command else ()
        left = [operand for operand in operands if not self._excluded(operand.name)][self.operands :]
        return left[0] if left else None

    def free_options(self) -> list[Option]:
        """Return the options that can still be given.  Options with a value can be given again."""
        return [
            option
            for option in self.options
            if (option.value or option.name not in self.given)
            and option.instead_of not in self.given
            and not self._excluded(option.name)
            and not (self.operands and option.instead_of and not option.instead_of.startswith("-"))
        ]

    def _excluded(self, name: str) -> bool:
        return any(option.instead_of == name and option.name in self.given for option in self.options)


def answer(words: list[str]) -> int:
    """Write the candidates for the last of some words; return the exit status."""
    *before, typed = words or [""]
    signal.alarm(DEADLINE_S)  # SIGALRM ends us, without a message
    try:
        found, files = candidates(Place(before), typed)
    except VmdError:
        return 1
    finally:
        signal.alarm(0)
    lines = ["files" if files else "words"]
    lines += [f"{word}\t{clean(what)}" for word, what in found if word.startswith(typed) and word.isprintable()]
    put("".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))
    return 0


def candidates(place: Place, typed: str) -> tuple[Candidates, bool]:
    """Return the candidates, and whether names of files are candidates, too.  Raises VmdError."""
    if typed.startswith("-") and place.pending is None and not place.only_operands:
        return [(option.name, option.help) for option in place.free_options()], False
    if place.command is None and place.pending is None:
        return [(command.name, command.help) for command in COMMANDS], False
    wanted = place.next()
    if wanted is None:
        return [], False
    if wanted.words == SEED_WORDS and typed.startswith(SEED_FILES):
        return [], True
    if wanted.words:
        return [(word, "") for word in wanted.words], False
    if wanted.kind == COMMAND:
        return [(command.name, command.help) for command in COMMANDS], False
    if wanted.kind in (VM, SWITCH):
        session = Session(place.given.get("-s") or DEFAULT_SOCKET)
        try:
            return vms(session) if wanted.kind == VM else switches(session), False
        finally:
            session.close()
    return [], wanted.kind == FILE


def vms(session: Session) -> Candidates:
    """Return the VMs that the daemon knows, with their states.  Raises VmdError."""
    return [(vm.name, vm.state) for vm in session.client.list_vms()]


def switches(session: Session) -> Candidates:
    """Return the switches of the configuration, with their bridges.  Raises VmdError."""
    return [(switch.name, switch.interface) for switch in session.client.list_switches()]
