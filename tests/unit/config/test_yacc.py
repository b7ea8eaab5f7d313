"""The parser generator of vm.conf by itself: which grammars it accepts, how it parses, and how it recovers."""

import random
from collections.abc import Iterator
from typing import Any

import pytest

from vmd.config.yacc import ERROR, GrammarError, Parser, Production, Tables, rules_of

TOKENS = {"NUMBER", "+", "*", "(", ")", ";"}


class Token:
    """A token with its kind and value."""

    def __init__(self, kind: str, value: object) -> None:
        self.type = kind
        self.value = value


class Words:
    """A lexer of words and numbers between blanks."""

    def __init__(self, text: str) -> None:
        self.words: Iterator[str] = iter(text.split())

    def token(self) -> Token | None:
        """Return the next token."""
        word = next(self.words, None)
        if word is None:
            return None
        return Token("NUMBER", int(word)) if word.isdigit() else Token(word, word)


class Sums:
    """Sums and products, each with a semicolon at its end."""

    def __init__(self) -> None:
        self.parser = Parser(Tables(rules_of(self), TOKENS, "lines"), self.wrong)

    def wrong(self, token: Token | None) -> None:
        """Note a token that cannot be there."""
        self.errors.append(token.value if token else None)

    def read(self, text: str) -> list[int]:
        """Return the results of a text."""
        self.results: list[int] = []
        self.errors: list[object] = []
        self.parser.parse(Words(text))
        return self.results

    def p_lines(self, p: Production) -> None:
        """lines :
                 | lines sum ';'
        """
        if len(p) > 1:
            self.results.append(p[2])

    def p_lines_error(self, p: Production) -> None:
        """lines : lines error ';'"""
        p.parser.errok()

    def p_sum(self, p: Production) -> None:
        """sum : product
               | sum '+' product"""
        p[0] = p[1] if len(p) == 2 else p[1] + p[3]

    def p_product(self, p: Production) -> None:
        """product : factor
                   | product '*' factor"""
        p[0] = p[1] if len(p) == 2 else p[1] * p[3]

    def p_factor(self, p: Production) -> None:
        """factor : NUMBER
                  | '(' sum ')'"""
        p[0] = p[1] if len(p) == 2 else p[1:][1]


def grammar(*productions: str) -> Any:  # noqa: ANN401 - made here
    """Return an object with these productions."""

    def action(production: str) -> Any:  # noqa: ANN401 - a method
        def reduce(_self: object, _p: Production) -> None:
            pass

        reduce.__doc__ = production
        return reduce

    return type("It", (), {f"p_{number}": action(each) for number, each in enumerate(productions)})()


def tables(*productions: str, shifted: tuple[str, ...] = ()) -> Tables:
    """Return the tables of productions.  The first one is the start symbol, and tokens are in capitals."""
    rules = rules_of(grammar(*productions))
    terminals = {symbol for rule in rules for symbol in rule.symbols if symbol.isupper()}
    return Tables(rules, terminals, rules[0].name, shifted)


class Bare:
    """A lexer of tokens without values."""

    def __init__(self, kinds: str) -> None:
        self.kinds = iter(kinds)

    def token(self) -> Token | None:
        """Return the next token."""
        kind = next(self.kinds, None)
        return kind if kind is None else Token(kind, kind)


def takes(of: Tables, text: str) -> bool:
    """Return whether a grammar of single-letter tokens accepts a text."""
    errors: list[object] = []
    Parser(of, errors.append).parse(Bare(text))
    return errors == []


def test_values() -> None:
    """An action reads the values of the right-hand side by number or as a slice, and sets its own value."""
    assert Sums().read("1 + 2 * ( 3 + 4 ) ; 5 ; ( 6 ) * 7 ;") == [15, 5, 42]


def test_sums_are_python_s() -> None:
    """The results of three hundred random expressions are those of Python."""
    generator = random.Random(1)
    sums = Sums()

    def expression(depth: int) -> str:
        kind = generator.randrange(4) if depth else 3
        if kind == 3:
            return str(generator.randrange(10))
        inner = expression(depth - 1)
        return f"( {inner} )" if kind == 2 else f"{inner} {'+*'[kind]} {expression(depth - 1)}"

    texts = [expression(6) for _ in range(300)]

    assert sums.read("".join(f"{text} ; " for text in texts)) == [eval(text) for text in texts]


def test_an_error_costs_its_line() -> None:
    """Each error is reported once with its token, and parsing continues after the line."""
    sums = Sums()

    assert sums.read("1 + + 2 + + ; 3 ; ( ; 4 ) ; 5 ;") == [3, 5]
    assert sums.errors == ["+", ";", ")"]


def test_an_error_at_the_end_of_the_text() -> None:
    """There is nothing to continue with, and the parser can be used again."""
    sums = Sums()

    assert sums.read("1 ; 2 +") == [1]
    assert sums.errors == [None]
    assert sums.read("6 ;") == [6]


def test_errors_in_a_row_are_one() -> None:
    """Without a call of `errok`, three valid tokens must follow before the next error is reported."""
    of = tables("lines :\n | lines A B C\n | lines error")
    errors: list[Token | None] = []

    Parser(of, errors.append).parse(Bare("BBACABCABCB"))

    assert [token.type for token in errors if token] == ["B", "B"]


def test_more_than_slr() -> None:
    """FOLLOW(b) contains D, but b may be reduced before D only after E."""
    of = tables("s : a D\n | E b D\n | E a C\n | b C", "a : X", "b : X")

    assert [takes(of, text) for text in ("XD", "EXD", "EXC", "XC")] == [True] * 4
    assert [takes(of, text) for text in ("XE", "EX", "DX", "")] == [False] * 4


def test_empty_productions() -> None:
    """They stand before, between and after others."""
    of = tables("s : a B a c", "a :\n | A", "c : d e", "d :\n | D", "e :\n | E")

    every = {a + "B" + b + d for a in ("", "A") for b in ("", "A") for d in ("", "D", "E", "DE")}
    assert {text for text in every if takes(of, text)} == every
    assert not any(takes(of, text) for text in ("", "A", "AA", "BB", "AAB", "BDD", "BED", "BDA"))


def test_mutual_recursion() -> None:
    """These symbols have the same lookahead sets."""
    of = tables("s : a", "a : A b\n | X", "b : B c\n | Y", "c : C a\n | Z")

    assert [takes(of, text) for text in ("X", "AY", "ABZ", "ABCX", "ABCABZ", "ABCABCAY")] == [True] * 6
    assert [takes(of, text) for text in ("A", "AB", "ABC", "ABX", "XX", "ABCAZ")] == [False] * 6


@pytest.mark.parametrize(
    ("productions", "what"),
    [
        (("s : A", "s A"), "the docstring of p_1 is not a production"),
        (("s : A", "s+ : A"), "the docstring of p_1 is not a production"),
        (("s : A\n  B",), "the docstring of p_0 is not a production"),
        (("s : a",), "a is neither a token nor a production: s : a"),
        (("s : A error", "error : B"), "error is a token, and cannot be a production"),
        (("s : a\n | a A", "a : X\n | X A"), "A can be shifted, or a : X be reduced before it"),
        (("s : a\n | b", "a : A", "b : A"), "before $end two rules can be reduced: a : A and b : A"),
        (("s : s\n | A",), "before $end two rules can be reduced: S' : s and s : s"),
    ],
)
def test_invalid_grammars(productions: tuple[str, ...], what: str) -> None:
    """The message names the production."""
    with pytest.raises(GrammarError) as raised:
        tables(*productions)

    assert str(raised.value) == what


def test_a_conflict_that_is_resolved() -> None:
    """The token is shifted.  Every other conflict is still an error."""
    of = tables("s : a\n | a A", "a : X\n | X A", shifted=("A",))

    assert [takes(of, text) for text in ("X", "XA", "XAA")] == [True] * 3
    assert not takes(of, "XAAA")
    with pytest.raises(GrammarError, match="before A two rules can be reduced"):
        tables("s : a A\n | b A", "a : X", "b : X", shifted=("A",))


def test_the_symbol_for_errors_is_no_token() -> None:
    """No text can contain it."""
    assert ERROR not in TOKENS
