"""Text of manual pages in mdoc(7) without their macros."""

import re
import shlex


def items(page: str) -> list[str]:
    """Return the heads of a manual page's list items as plain text."""
    found = []
    for several, one in re.findall(r"^\.It (?:Xo\b ?(.*?)\n\.Xc$|([^\n]*)$)", page, flags=re.M | re.S):
        lines = several.split("\n") if several else [one]
        found.append(" ".join(filter(None, (plain(line.removeprefix(".")) for line in lines))))
    return found


def plain(macros: str) -> str:
    """Return a line of mdoc(7) macros as plain text."""
    words: list[str] = []
    flag = optional = False
    for word in shlex.split(macros):
        if word in ("Cm", "Ar", "Fl", "Ns", "Nm"):
            flag = word == "Fl"
        elif word in ("Op", "Oo"):
            optional = optional or word == "Op"
            words.append("[")
        elif word == "Oc":
            words.append("]")
        else:
            words.append(f"-{word}" if flag and word not in "|," else word)
    return " ".join([*words, *("]" if optional else "")]).replace("[ ", "[").replace(" ]", "]")


def synopsis(page: str) -> str:
    """Return the section SYNOPSIS on one line."""
    text = page.partition("\n.Sh SYNOPSIS\n")[2].partition("\n.Sh ")[0]
    return " ".join(plain(line.removeprefix(".")) for line in text.splitlines())
