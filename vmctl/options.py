"""Parses a command line by the table, much as getopt(3) does.

We do not use the module `getopt`: it imports `gettext`, which imports `re`, and that takes a third of the time of a
status command.  Unlike vmd: options may follow operands, as is usual on Linux.  `--` ends the options.
"""

from vmctl.errors import UsageError
from vmctl.table import COMMANDS, COMMON, HELP, Command, Operand, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Given:
    """The words after a command: options in their order, each with its value, and the operands."""

    def __init__(self, options: list[tuple[str, str]]) -> None:
        self.options = options
        self.operands: list[str] = []
        self.behind: list[str] = []  # words after `--`, for commands that pass them on

    @property
    def operand(self) -> str:
        """The first operand; "" if it is optional and was not given."""
        return self.operands[0] if self.operands else ""

    def has(self, name: str) -> bool:
        """Return whether an option was given."""
        return any(option == name for option, _ in self.options)

    def value(self, name: str) -> str | None:
        """Return the last value of an option; None if it was not given."""
        values = [value for option, value in self.options if option == name]
        return values[-1] if values else None

    @property
    def wants_help(self) -> bool:
        """Whether to explain the command instead of running it."""
        return any(self.has(option.name) for option in HELP)


def find_command(word: str) -> Command:
    """Return the command that `word` is, or the only one that it abbreviates.  Raises UsageError.

    Abbreviations that upstream's vmctl has keep their meaning: our own commands do not make them ambiguous.
    """
    found = [command for command in COMMANDS if command.name.startswith(word)]
    exact = [command for command in found if command.name == word]
    upstreams = [command for command in found if command.upstream]
    for meant_ones in (exact, upstreams, found):
        if len(meant_ones) == 1:
            return meant_ones[0]
    if found:
        raise UsageError(f"ambiguous argument: {word}: {alternatives([command.name for command in found])}")
    raise UsageError(f"unknown argument: {word}{meant(word, [command.name for command in COMMANDS])}")


def parse(command: Command, words: list[str]) -> Given:
    """Return the parsed `words`.

    Raises:
        UsageError: an option is unknown, has no value or conflicts with another; or a word is missing, unexpected or
            unknown.
    """
    behind: list[str] = []
    given, operands = split(words, (*command.options, *COMMON), behind=behind if command.behind else None)
    found = Given(given)
    found.behind = behind
    if found.wants_help:
        return found
    for option in command.options:
        if option.instead_of.startswith("-") and found.has(option.name) and found.has(option.instead_of):
            raise UsageError(f"conflicting {option.instead_of} and {option.name} arguments")
    replaced = {option.instead_of for option in command.options if found.has(option.name)}
    wanted = [operand for operand in command.operands if operand.name not in replaced]
    if len(operands) > len(wanted):
        hint = f": {command.behind} belongs after --" if command.behind else ""
        raise UsageError(f"unexpected argument: {operands[len(wanted)]}{hint}")
    for operand, word in zip(wanted, operands, strict=False):
        if not word:
            raise UsageError(f"empty argument: {operand.name}")
        found.operands.append(one_of(operand, word))
    for operand in wanted[len(operands) :]:
        if not operand.optional:
            raise UsageError(f"missing argument: {operand.name}")
    return found


def split(
    words: list[str], options: tuple[Option, ...], *, permute: bool = True, behind: list[str] | None = None
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return ([(option, value)], operands).  Without `permute` the first operand ends the options.

    The words after `--` are operands.  If there is a list `behind`, they are added to it instead.

    Raises UsageError: an option is unknown or has no value.
    """
    known = {option.name: option for option in options}
    given: list[tuple[str, str]] = []
    operands: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            if behind is None:
                return given, operands + rest
            behind += rest
            return given, operands
        if word.startswith("--"):
            if word not in known:
                misplaced = not permute and any(word == option.name for option in COMMON)
                hint = ": it belongs after the command" if misplaced else meant(word, known)
                raise UsageError(f"unknown option -- {word[2:]}{hint}")
            given.append((word, ""))
        elif word.startswith("-") and word != "-":
            take_letters(word[1:], rest, known, given)
        elif permute:
            operands.append(word)
        else:
            return given, [word, *rest]
    return given, operands


def take_letters(letters: str, rest: list[str], known: dict[str, Option], given: list[tuple[str, str]]) -> None:
    """Split `-cLm 1G` into its options.  A value is the rest of the word, or the next word if there is no rest."""
    for index, letter in enumerate(letters):
        option = known.get(f"-{letter}")
        if option is None:
            raise UsageError(f"unknown option -- {letter}")
        if not option.value:
            given.append((option.name, ""))
            continue
        value = letters[index + 1 :]
        if not value:
            if not rest:
                raise UsageError(f"option requires an argument -- {letter}")
            value = rest.pop(0)
        given.append((option.name, value))
        return


def one_of(operand: Operand, word: str) -> str:
    """Return the word for an operand.  Raises UsageError if the operand has a list of words and this is not one."""
    if not operand.words or word in operand.words:
        return word
    if operand.abbreviated and word:
        for known in operand.words:
            if known.startswith(word.lower()):
                return known
    raise UsageError(f"unknown argument: {word}{meant(word, operand.words) or f': {alternatives(operand.words)}'}")


def meant(word: str, known: "Iterable[str]") -> str:
    """Return ": did you mean ...?" with the known word that is close to `word`; "" if there is none."""
    from vmd import nearest  # only a mistake needs it

    return nearest.meant(word, known)


def alternatives(words: "Sequence[str]") -> str:
    """Return `a, b or c`."""
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
