# Copyright (C) 2001-2018
# David M. Beazley (Dabeaz LLC)
# All rights reserved.
#
# Redistribution and use in source and binary forms, with or without
# modification, are permitted provided that the following conditions are
# met:
#
# * Redistributions of source code must retain the above copyright notice,
#   this list of conditions and the following disclaimer.
# * Redistributions in binary form must reproduce the above copyright notice,
#   this list of conditions and the following disclaimer in the documentation
#   and/or other materials provided with the distribution.
# * Neither the name of the David Beazley or Dabeaz LLC may be used to
#   endorse or promote products derived from this software without
#  specific prior written permission.
#
# THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS
# "AS IS" AND ANY EXPRESS OR IMPLIED WARRANTIES, INCLUDING, BUT NOT
# LIMITED TO, THE IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR
# A PARTICULAR PURPOSE ARE DISCLAIMED. IN NO EVENT SHALL THE COPYRIGHT
# OWNER OR CONTRIBUTORS BE LIABLE FOR ANY DIRECT, INDIRECT, INCIDENTAL,
# SPECIAL, EXEMPLARY, OR CONSEQUENTIAL DAMAGES (INCLUDING, BUT NOT
# LIMITED TO, PROCUREMENT OF SUBSTITUTE GOODS OR SERVICES; LOSS OF USE,
# DATA, OR PROFITS; OR BUSINESS INTERRUPTION) HOWEVER CAUSED AND ON ANY
# THEORY OF LIABILITY, WHETHER IN CONTRACT, STRICT LIABILITY, OR TORT
# (INCLUDING NEGLIGENCE OR OTHERWISE) ARISING IN ANY WAY OUT OF THE USE
# OF THIS SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY OF SUCH DAMAGE.
"""Makes LALR(1) parsers from productions in docstrings.  This is a modified part of PLY 3.11.

PLY has no further release.  This module keeps its construction of tables (DeRemer and Pennello), its parser and its
error recovery.  It leaves out the parts that vmd never used: tables in pickles (CVE-2025-56005) and in modules, debug
files, precedence and positions.  In a conflict PLY chooses one side; here a conflict is an error, unless the caller
has resolved it (`shifted`).
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any, Protocol

END = "$end"
ERROR = "error"
START = "S'"
SHIFTS_MAX = 3  # tokens that must be shifted after an error before another one is reported

Transition = tuple[int, str]  # a state, and a nonterminal after a dot in it


class GrammarError(Exception):
    """The productions are not an LALR(1) grammar."""


class Symbol(Protocol):
    """A token of the lexer, or a nonterminal.  The stack of the parser has these."""

    type: str
    value: Any


class Lexer(Protocol):
    """The source of tokens."""

    def token(self) -> Any:  # noqa: ANN401 - of the type that `on_error` takes
        """Return the next token, a `Symbol`, or None at the end."""


class Made:
    """A symbol that the parser makes itself: a nonterminal, the end, or an error."""

    def __init__(self, kind: str, value: object = None) -> None:
        self.type = kind
        self.value: Any = value


class Production:
    """The argument of each action.  Item 0 is its result; the others are the values of the right-hand side."""

    def __init__(self, parser: "Parser") -> None:
        self.parser = parser
        self.symbols: list[Symbol] = []

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - actions decide about the types of values
        if isinstance(index, slice):
            return [symbol.value for symbol in self.symbols[index]]
        return self.symbols[index].value

    def __setitem__(self, index: int, value: object) -> None:
        self.symbols[index].value = value

    def __len__(self) -> int:
        return len(self.symbols)


class Rule:
    """One alternative of a production, and the action that is called when it is reduced."""

    def __init__(self, name: str, symbols: tuple[str, ...], action: Callable[[Production], None]) -> None:
        self.name = name
        self.symbols = symbols
        self.length = len(symbols)
        self.action = action

    def __str__(self) -> str:
        return f"{self.name} : {' '.join(self.symbols)}"


def rules_of(grammar: object) -> list[Rule]:
    """Return the rules in the docstrings of the methods p_* of an object, in the order of its class.

    Raises:
        GrammarError: a docstring is not a production.
    """
    rules = []
    for method in vars(type(grammar)):
        if method.startswith("p_"):
            action = getattr(grammar, method)
            name, colon, text = (action.__doc__ or "").partition(" :")
            first, *others = text.split("\n")
            lines = [line.split() for line in others if line.strip()]
            if not colon or not name.isidentifier() or any(line[0] != "|" for line in lines):
                raise GrammarError(f"the docstring of {method} is not a production")
            for words in (first.split(), *(line[1:] for line in lines)):
                rules.append(Rule(name, tuple(word.strip("'") for word in words), action))
    return rules


class Tables:
    """The tables of an LALR(1) parser, by state.

    In a conflict between shifting and reducing, a terminal in `shifted` is shifted.  Any other conflict is an error.

    `action`: terminal -> the state to shift to, or the negative number of the rule to reduce, or 0 to accept.
    `goto`: nonterminal -> the state after its reduction.
    """

    def __init__(
        self, rules: Iterable[Rule], terminals: Iterable[str], start: str, shifted: Collection[str] = ()
    ) -> None:
        """Raises GrammarError."""
        self.shifted = shifted
        self.rules = [Rule(START, (start,), lambda _p: None), *rules]
        self.of: dict[str, list[int]] = {}  # nonterminal -> numbers of its rules
        for number, rule in enumerate(self.rules):
            self.of.setdefault(rule.name, []).append(number)
        self.check({*terminals, ERROR})
        # An item is a rule with a dot in it.  Item n + 1 is item n with the dot one symbol further.
        self.first_item: list[int] = []
        self.behind: list[str] = []  # by item: the symbol after the dot, "" at the end of the rule
        self.rule_at: list[int] = []
        for number, rule in enumerate(self.rules):
            self.first_item.append(len(self.behind))
            self.behind += [*rule.symbols, ""]
            self.rule_at += [number] * (rule.length + 1)
        self.states: list[list[int]] = []
        self.moves: list[dict[str, int]] = []  # by state: symbol -> next state
        self.find_states()
        self.action: list[dict[str, int]] = []
        self.goto: list[dict[str, int]] = []
        self.fill(self.lookaheads())

    def check(self, terminals: set[str]) -> None:
        """Raise GrammarError unless each symbol is either a terminal or the name of a rule."""
        for rule in self.rules:
            if rule.name in terminals:
                raise GrammarError(f"{rule.name} is a token, and cannot be a production")
            for symbol in rule.symbols:
                if symbol not in self.of and symbol not in terminals:
                    raise GrammarError(f"{symbol} is neither a token nor a production: {rule}")

    # States

    def closure(self, kernel: tuple[int, ...]) -> list[int]:
        """Return the closure of items: also those that begin where these have a nonterminal after the dot."""
        items = list(kernel)
        added: set[str] = set()
        for item in items:
            symbol = self.behind[item]
            if symbol in self.of and symbol not in added:
                added.add(symbol)
                items += [self.first_item[number] for number in self.of[symbol]]
        return items

    def find_states(self) -> None:
        """Make the states, which are the LR(0) sets of items, and the moves between them."""
        known: dict[tuple[int, ...], int] = {(0,): 0}
        self.states.append(self.closure((0,)))
        for items in self.states:
            behind: dict[str, list[int]] = {}
            for item in items:
                if symbol := self.behind[item]:
                    behind.setdefault(symbol, []).append(item + 1)
            moves: dict[str, int] = {}
            for symbol, kernel in behind.items():
                state = known.setdefault(tuple(kernel), len(self.states))
                if state == len(self.states):
                    self.states.append(self.closure(tuple(kernel)))
                moves[symbol] = state
            self.moves.append(moves)

    # Lookaheads

    def nullable(self) -> set[str]:
        """Return the nonterminals that can be empty."""
        found: set[str] = set()
        before = -1
        while len(found) > before:
            before = len(found)
            found |= {rule.name for rule in self.rules if found.issuperset(rule.symbols)}
        return found

    def lookaheads(self) -> dict[tuple[int, int], set[str]]:
        """Return the terminals that may follow a rule, by (state in which the rule is complete, rule).

        DeRemer and Pennello, Efficient Computation of LALR(1) Look-Ahead Sets, TOPLAS 4 (4), October 1982.
        """
        nullable = self.nullable()
        reads: dict[Transition, list[Transition]] = {}
        includes: dict[Transition, list[Transition]] = {}
        lookback: dict[Transition, list[tuple[int, int]]] = {}
        follow: dict[Transition, set[str]] = {}
        for state, moves in enumerate(self.moves):
            for symbol, then in moves.items():
                if symbol in self.of:
                    here = state, symbol
                    behind = self.moves[then]
                    follow[here] = {each for each in behind if each not in self.of}
                    reads[here] = [(then, each) for each in behind if each in nullable]
        follow[0, self.rules[0].symbols[0]].add(END)
        for here in follow:
            for number in self.of[here[1]]:
                state, symbols = here[0], self.rules[number].symbols
                for at, symbol in enumerate(symbols, 1):
                    if symbol in self.of and nullable.issuperset(symbols[at:]):
                        includes.setdefault((state, symbol), []).append(here)
                    state = self.moves[state][symbol]
                lookback.setdefault(here, []).append((state, number))
        follow = digraph(digraph(follow, reads), includes)
        found: dict[tuple[int, int], set[str]] = {}
        for here, ends in lookback.items():
            for end in ends:
                found.setdefault(end, set()).update(follow[here])
        return found

    def fill(self, lookaheads: dict[tuple[int, int], set[str]]) -> None:
        """Fill `action` and `goto`.  Raises GrammarError."""
        for state, items in enumerate(self.states):
            moves = self.moves[state]
            action = {symbol: then for symbol, then in moves.items() if symbol not in self.of}
            self.goto.append({symbol: then for symbol, then in moves.items() if symbol in self.of})
            for item in items:
                number = self.rule_at[item]
                if self.behind[item]:
                    continue
                for terminal in [END] if number == 0 else sorted(lookaheads[state, number]):
                    other = action.get(terminal)
                    if other is None:
                        action[terminal] = -number
                    elif other <= 0:
                        raise GrammarError(
                            f"before {terminal} two rules can be reduced: {self.rules[-other]} and {self.rules[number]}"
                        )
                    elif terminal not in self.shifted:
                        raise GrammarError(f"{terminal} can be shifted, or {self.rules[number]} be reduced before it")
            self.action.append(action)


def digraph(
    sets: dict[Transition, set[str]], relation: dict[Transition, list[Transition]]
) -> dict[Transition, set[str]]:
    """Return for each node the union of its set and the sets of all nodes that it reaches by `relation`."""
    depth = dict.fromkeys(sets, 0)
    found: dict[Transition, set[str]] = {}
    stack: list[Transition] = []
    done = len(sets) + 1

    def visit(node: Transition) -> None:
        stack.append(node)
        own = depth[node] = len(stack)
        found[node] = set(sets[node])
        for other in relation.get(node, ()):
            if depth[other] == 0:
                visit(other)
            depth[node] = min(depth[node], depth[other])
            found[node] |= found[other]
        if depth[node] == own:
            while (other := stack.pop()) != node:
                depth[other], found[other] = done, found[node]
            depth[node] = done

    for node in sets:
        if depth[node] == 0:
            visit(node)
    return found


class Parser:
    """Parses with tables.  It can parse several inputs, one after the other.

    `on_error` is called with the token of a syntax error, or None at the end of the input.  To recover, the parser pops
    states until the symbol `error` can be shifted.  Then it skips tokens until one can be shifted or reduced after it.
    An action can call `errok`, so that an error directly after that is reported.
    """

    def __init__(self, tables: Tables, on_error: Callable[[Any], None]) -> None:
        self.rules = tables.rules
        self.action = tables.action
        self.goto = tables.goto
        self.on_error = on_error
        # state -> the only possible reduction, which is done without lookahead
        self.defaulted: dict[int, int] = {}
        self.recovered = True
        self.states: list[int] = []
        self.symbols: list[Any] = []

    def errok(self) -> None:
        """Report the next error, even directly after this one."""
        self.recovered = True

    def parse(self, lexer: Lexer) -> None:
        """Parse an input.  Return at its end."""
        actions, goto, rules, defaulted = self.action, self.goto, self.rules, self.defaulted
        states = self.states = [0]
        symbols: list[Symbol] = [Made(END)]
        self.symbols = symbols
        production = Production(self)
        self.recovered = True
        errors = 0  # tokens to shift until a further error is reported
        lookahead: Symbol | None = None
        waiting: list[Symbol] = []  # tokens after the lookahead
        state = 0
        while True:
            act = defaulted.get(state)
            if act is None:
                if lookahead is None:
                    lookahead = waiting.pop() if waiting else lexer.token() or Made(END)
                act = actions[state].get(lookahead.type)
            if act is None:
                assert lookahead is not None, "a defaulted state has an action"
                if errors == 0 or self.recovered:
                    self.recovered = False
                    self.on_error(None if lookahead.type == END else lookahead)
                errors = SHIFTS_MAX
                if len(states) == 1 and lookahead.type != END:
                    lookahead, state, waiting = None, 0, []
                elif lookahead.type == END:
                    return
                elif lookahead.type == ERROR:
                    symbols.pop()
                    states.pop()
                    state = states[-1]
                elif symbols[-1].type == ERROR:
                    lookahead = None
                else:
                    waiting.append(lookahead)
                    lookahead = Made(ERROR, lookahead)
            elif act > 0:
                assert lookahead is not None, "a shift needs a lookahead"
                states.append(act)
                state = act
                symbols.append(lookahead)
                lookahead = None
                errors -= errors > 0
            elif act < 0:
                rule = rules[-act]
                made = Made(rule.name)
                length = rule.length
                production.symbols = [made, *symbols[-length:]] if length else [made]
                if length:
                    del symbols[-length:]
                rule.action(production)
                if length:
                    del states[-length:]
                symbols.append(made)
                state = goto[states[-1]][rule.name]
                states.append(state)
            else:
                return
