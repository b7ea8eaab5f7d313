"""Enumerations without the module `enum`, which costs each process and each command 4 ms and half a MiB.

For type checkers this is `enum`.  Members have `name` and `value`, compare and hash as members of `enum` do, and are
looked up by value, `Outcome(3)`, or by name, `Outcome["ENDED"]`.  A flag is any set of bits, also of bits that no
member has.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enum import Enum, IntEnum, IntFlag
else:

    class EnumType(type):
        """Makes a member of each value in a class body that is not private, not a method and not a property."""

        def __new__(mcls, name, bases, namespace):  # noqa: ANN001, ANN204
            """Build the class and then its members.  Two names of the same value are the same member."""
            values = {
                each: value
                for each, value in namespace.items()
                if not each.startswith("_") and not hasattr(value, "__get__")
            }
            rest = {each: value for each, value in namespace.items() if each not in values}
            cls = super().__new__(mcls, name, bases, rest)
            cls.__members__ = {}
            cls._by_value = {}
            for each, value in values.items():
                member = cls._by_value.get(value)
                if member is None:
                    member = cls._by_value[value] = cls._make(each, value)
                cls.__members__[each] = member
                setattr(cls, each, member)
            return cls

        def __call__(cls, value):  # noqa: ANN001, ANN204
            """Return the member of a value.  Raises ValueError if there is none."""
            try:
                return cls._by_value[value]
            except (KeyError, TypeError):  # TypeError: the value cannot be a key of a dict
                return cls._other(value)

        def _make(cls, name, value):  # noqa: ANN001, ANN202
            member = int.__new__(cls, value) if issubclass(cls, int) else object.__new__(cls)
            member.__dict__.update(name=name, value=value)
            return member

        def _other(cls, value):  # noqa: ANN001, ANN202
            """Return the member of a value that the class body does not have."""
            raise ValueError(f"{value!r} is not a valid {cls.__qualname__}")

        def __getitem__(cls, name):  # noqa: ANN001, ANN204
            """Return a member by name.  Raises KeyError."""
            return cls.__members__[name]

        def __iter__(cls):  # noqa: ANN204
            """Iterate over the members in order of declaration, each once."""
            return iter(cls._by_value.values())

        def __len__(cls):  # noqa: ANN204
            """The number of members."""
            return len(cls._by_value)

        def __contains__(cls, member):  # noqa: ANN001, ANN204
            """Whether this is a member of the class."""
            return isinstance(member, cls)

    class Enum(metaclass=EnumType):
        """A choice.  A member is equal to itself only."""

        def __repr__(self):  # noqa: ANN204
            return f"<{type(self).__name__}.{self.name}: {self.value!r}>"

        def __str__(self):  # noqa: ANN204
            return f"{type(self).__name__}.{self.name}"

        def __reduce__(self):  # noqa: ANN204
            return type(self), (self.value,)

    class IntEnum(int, Enum):
        """A choice whose members are also numbers."""

        __repr__, __str__ = Enum.__repr__, int.__repr__

    class FlagType(EnumType):
        """Sets of bits.  A set without a name of its own is made when it is first needed."""

        def _other(cls, value):  # noqa: ANN001, ANN202
            """Return a set of bits without a name of its own.  A negative number is a complement among the members."""
            if not isinstance(value, int):
                return super()._other(value)
            if value < 0:
                return cls(value & sum(cls.__members__.values()))
            return cls._make(None, int(value))

    class IntFlag(int, Enum, metaclass=FlagType):
        """Single bits, and sets of bits."""

        __str__ = int.__repr__

        def __repr__(self):  # noqa: ANN204
            names = "|".join(member.name for member in type(self) if member and member & self == member)
            return f"<{type(self).__name__}{'.' if names else ''}{names}: {self.value}>"

        def __contains__(self, other):  # noqa: ANN001, ANN204
            """Whether this set has all bits of the other."""
            return self & other == other

        def __or__(self, other):  # noqa: ANN001, ANN204
            return type(self)(int.__or__(self, other))

        def __and__(self, other):  # noqa: ANN001, ANN204
            return type(self)(int.__and__(self, other))

        def __xor__(self, other):  # noqa: ANN001, ANN204
            return type(self)(int.__xor__(self, other))

        def __invert__(self):  # noqa: ANN204
            return type(self)(int.__invert__(self))

        __ror__, __rand__, __rxor__ = __or__, __and__, __xor__


__all__ = ["Enum", "IntEnum", "IntFlag"]
