"""Finds the word that a user probably meant by a mistyped one."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

LONGEST = 32  # letters; a longer word is not a mistyped keyword
PER_MISTAKE = 3  # letters of a word for each mistake that is allowed in it


def nearest(word: str, choices: "Iterable[str]") -> str:
    """Return the choice that differs least from `word`, ignoring case; "" if none is close.

    A word of 3 letters may have one mistake, a word of 6 may have two.  If exactly one choice begins with `word`, that
    one is returned.
    """
    known = list(choices)
    word = word.lower()
    if not word or len(word) > LONGEST:
        return ""
    beginning = [choice for choice in known if choice.lower().startswith(word)]
    if len(beginning) == 1:
        return beginning[0]
    allowed = len(word) // PER_MISTAKE
    alike = [choice for choice in known if abs(len(choice) - len(word)) <= allowed]
    mistakes, best = min(((mistakes_in(word, choice.lower()), choice) for choice in alike), default=(0, ""))
    return best if mistakes <= allowed else ""


def meant(word: str, choices: "Iterable[str]") -> str:
    """Return the end of an error message that suggests the choice closest to `word`; "" if none is close."""
    found = nearest(word, choices)
    return f": did you mean {found}?" if found else ""


def mistakes_in(typed: str, meant: str) -> int:
    """Return how many letters were left out, added, replaced, or swapped with their neighbour.

    This is the "optimal string alignment" distance.
    """
    before: list[int] = []
    row = list(range(len(meant) + 1))
    for i, letter in enumerate(typed, 1):
        before, last, row = row, before, [i]
        for j, other in enumerate(meant, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == meant[j - 2] and typed[i - 2] == other:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]
