"""Command line options, as getopt(3) takes them.

Our own: the module `getopt` imports `gettext`, and that `re`, which is a third of a status command's time.
Unlike vmd's, options may follow operands, as everywhere on Linux; `--` ends them.
"""

from vmctl.errors import UsageError


def parse_options(
    arguments: list[str], short: str = "", long: tuple[str, ...] = (), *, permute: bool = True
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return ([(option, value)], operands); `short` as in getopt(3), `long` are words without a value.

    With no `short` options at all a word like `-x` is an operand: commands that take an id say what is
    wrong with it.  Without `permute` the first operand ends the options.

    Raises:
        UsageError: an option is unknown or lacks its value.
    """
    given: list[tuple[str, str]] = []
    operands: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return given, operands + rest
        if word.startswith("--"):
            if word[2:] not in long:
                raise UsageError(f"unknown option -- {word[2:]}")
            given.append((word, ""))
        elif word.startswith("-") and word != "-" and short:
            _take_short(word[1:], rest, short, given)
        elif permute:
            operands.append(word)
        else:
            return given, [word, *rest]
    return given, operands


def _take_short(letters: str, rest: list[str], short: str, given: list[tuple[str, str]]) -> None:
    """Split `-cLm 1G` into its options; a value is the rest of the word, or else the next word."""
    for index, letter in enumerate(letters):
        at = short.find(letter)
        if at < 0 or letter == ":":
            raise UsageError(f"unknown option -- {letter}")
        if short[at + 1 : at + 2] != ":":
            given.append((f"-{letter}", ""))
            continue
        value = letters[index + 1 :]
        if not value:
            if not rest:
                raise UsageError(f"option requires an argument -- {letter}")
            value = rest.pop(0)
        given.append((f"-{letter}", value))
        return


def operand(operands: list[str]) -> str:
    """Return the only operand.  Raises UsageError if there is none, or more."""
    if len(operands) != 1:
        raise UsageError
    return operands[0]
