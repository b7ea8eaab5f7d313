"""The part of `ctypes` that system calls need.

`ctypes` itself creates much more, which costs 0.1 to 0.2 MiB in each process.  Its classes and those here have the same
base classes, so objects of both can be mixed.  For type checkers these are the classes of ctypes.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ctypes import (
        CDLL,
        Array,
        Structure,
        Union,
        addressof,
        byref,
        c_char,
        c_char_p,
        c_int,
        c_int32,
        c_int64,
        c_long,
        c_uint8,
        c_uint16,
        c_uint32,
        c_uint64,
        c_ulong,
        c_void_p,
        get_errno,
        sizeof,
    )
else:
    from _ctypes import (
        FUNCFLAG_CDECL,
        FUNCFLAG_USE_ERRNO,
        RTLD_LOCAL,
        CFuncPtr,
        Structure,
        Union,
        _SimpleCData,
        addressof,
        byref,
        dlopen,
        get_errno,
        sizeof,
    )

    def simple(name, letter):  # noqa: ANN001, ANN202 - these are ctypes', for type checkers
        """Return a C type by its letter in `struct`."""
        return type(name, (_SimpleCData,), {"_type_": letter})

    c_char, c_char_p, c_void_p = simple("c_char", "c"), simple("c_char_p", "z"), simple("c_void_p", "P")
    c_uint8, c_uint16, c_uint32, c_uint64 = map(simple, ("c_uint8", "c_uint16", "c_uint32", "c_uint64"), "BHIL")
    c_int32, c_int64 = map(simple, ("c_int32", "c_int64"), "il")
    c_int, c_long, c_ulong = c_int32, c_int64, c_uint64  # on a machine of 64 bits

    class Function(CFuncPtr):
        """A function of a library.  By default it returns an int."""

        _flags_ = FUNCFLAG_CDECL | FUNCFLAG_USE_ERRNO
        _restype_ = c_int

    class CDLL:
        """A library, with its functions as attributes.  The name None is for the libraries that are already loaded."""

        def __init__(self, name, *, use_errno=False):  # noqa: ANN001, ANN204
            self._handle = dlopen(name, RTLD_LOCAL)

        def __getattr__(self, name):  # noqa: ANN001, ANN204
            function = Function((name, self))
            setattr(self, name, function)
            return function


__all__ = [
    "CDLL", "Structure", "Union", "addressof", "buffer", "byref", "c_char", "c_char_p", "c_int", "c_int32",
    "c_int64", "c_long", "c_uint8", "c_uint16", "c_uint32", "c_uint64", "c_ulong", "c_void_p", "get_errno",
    "memory_at", "sizeof",
]  # fmt: skip


def memory_at(address: int, size: int) -> "Array[c_char]":
    """Return the memory of this process at an address, as an array.  Its `raw` reads and writes the memory."""
    return (c_char * size).from_address(address)


def buffer(content: bytes) -> "Array[c_char]":
    """Return an array with this content.  A system call may change it."""
    return (c_char * len(content)).from_buffer_copy(content)
