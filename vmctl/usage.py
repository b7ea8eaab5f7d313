"""The usage lines of the commands, made from the table."""

from vmctl.table import COMMANDS, Command

GENERAL = "usage:\tvmctl [-v] command [arg ...]\n"
HINT = f"{GENERAL}Try 'vmctl help'.\n"


def synopsis(command: Command, together: str = " ") -> str:
    """Return a command with its options and operands, as vmctl(8) shows it.

    `together` is the space between words inside brackets.
    """
    behind = [f"[-- {command.behind}]"] if command.behind else []
    parts = [command.name, *option_words(command), *operand_words(command), *behind]
    return " ".join(part.replace(" ", together) for part in parts)


def option_words(command: Command) -> list[str]:
    """Return the options: letters without values in one bracket, each other option in its own."""
    by_name = {option.name: option for option in command.options}
    letters = ""
    valued, long = [], []
    for option in command.options:
        if option.instead_of:
            continue  # it is shown with the option or operand that it excludes
        also = [other for other in by_name.values() if other.instead_of == option.name]
        if option.value or also:
            valued.append(f"[{' | '.join(f'{one.name} {one.value}'.strip() for one in (option, *also))}]")
        elif option.name.startswith("--"):
            long.append(f"[{option.name}]")
        else:
            letters += option.name[1:]
    return [*([f"[-{letters}]"] if letters else []), *valued, *long]


def operand_words(command: Command) -> list[str]:
    """Return the operands, each with the options that may replace it."""
    found = []
    for operand in command.operands:
        words = " | ".join([operand.name, *(one.name for one in command.options if one.instead_of == operand.name)])
        found.append(f"[{words}]" if operand.optional or words != operand.name else words)
    return found


def usage_of(command: Command) -> str:
    """Return the usage line of a command."""
    return f"usage:\tvmctl [-v] {synopsis(command)}\n"


def usage() -> str:
    """Return the usage of all commands."""
    lines = [f"\tvmctl {synopsis(command)}\n" for command in COMMANDS]
    return GENERAL + "".join(lines) + "'vmctl help' explains them.\n"
