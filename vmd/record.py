"""Frozen records, the base of messages and configuration objects.

A record behaves like `@dataclass(frozen=True, slots=True, kw_only=True)`, and type checkers treat it as one.  This
module exists because `dataclasses` imports `inspect`, `ast` and `re`.  That costs each VM process 15 ms of start-up and
2 MB of private memory, and a host runs hundreds of them.
"""

TYPE_CHECKING = False  # `typing` itself is one of the imports that cost too much
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Self, dataclass_transform
else:

    def dataclass_transform(**_: object):  # noqa: ANN201, D103 - stands in for typing's
        return lambda decorated: decorated


@dataclass_transform(frozen_default=True, kw_only_default=True, eq_default=True)
class RecordType(type):
    """Turns annotations into slots and class-level values into defaults."""

    fields: "Mapping[str, Any]"  # name -> declared type, in order of declaration
    defaults: "Mapping[str, Any]"
    least: int  # the least length of a list of values: all fields behind it have defaults

    def __new__(mcls, name: str, bases: tuple[type, ...], namespace: dict[str, object]) -> "RecordType":
        """Build the class.  A record inherits the fields of the record that it extends."""
        own = dict(namespace.get("__annotations__", {}))  # type: ignore[call-overload]
        fields: dict[str, Any] = {}
        defaults: dict[str, Any] = {}
        for base in bases:
            fields |= getattr(base, "fields", {})
            defaults |= getattr(base, "defaults", {})
        fields |= own
        defaults |= {field: namespace.pop(field) for field in own if field in namespace}
        cls = super().__new__(mcls, name, bases, {**namespace, "__slots__": tuple(own)})
        cls.fields = fields
        cls.defaults = defaults
        cls.least = max((place for place, field in enumerate(fields, 1) if field not in defaults), default=0)
        return cls


class Record(metaclass=RecordType):
    """Base of all records.  `check` is called on each new record, and raises ValueError for a bad value."""

    def __init__(self, **values: object) -> None:
        cls = type(self)
        for field in cls.fields:
            if field in values:
                value = values.pop(field)
            elif field in cls.defaults:
                value = cls.defaults[field]
            else:
                raise TypeError(f"{cls.__name__} needs {field}")
            object.__setattr__(self, field, value)
        if values:
            raise TypeError(f"{cls.__name__} has no {', '.join(sorted(values))}")
        self.check()

    def check(self) -> None:
        """Raise ValueError if the values are not valid together.  Records with rules override this."""

    def replace(self, **changes: object) -> "Self":
        """Return a copy with some fields changed."""
        return type(self)(**{**self.as_dict(), **changes})

    def as_dict(self) -> "dict[str, Any]":
        """Return the fields by name, one level deep."""
        return {field: getattr(self, field) for field in type(self).fields}

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} is frozen")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} is frozen")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, field) == getattr(other, field) for field in type(self).fields)

    def __hash__(self) -> int:
        return hash((type(self), *(getattr(self, field) for field in type(self).fields)))

    def __repr__(self) -> str:
        shown = ", ".join(f"{field}={getattr(self, field)!r}" for field in type(self).fields)
        return f"{type(self).__name__}({shown})"


class Part(Record):
    """A record that is stored or sent with its fields by name, for other versions of this program to read.

    A new field has a default with the meaning of the behaviour before.  Older readers ignore the field, and VERSION
    stays the same.  If older readers must not ignore it, VERSION is raised, and they refuse the part.
    """

    VERSION = 1  # the version that is written, and the newest one that is read

    version: int = 1

    def check(self) -> None:
        """Raise ValueError for a part that a newer program has written."""
        if not 1 <= self.version <= type(self).VERSION:
            raise ValueError(
                f"{type(self).__name__} of version {self.version}, where this vmd reads 1 to {type(self).VERSION}"
            )
