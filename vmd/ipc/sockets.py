"""Sockets without the module `socket`, whose enumerations cost 0.2 MiB and some milliseconds in each process.

For type checkers this is `socket`.  Sockets of this module and of `socket` are used in the same way.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from socket import (
        AF_UNIX,
        CMSG_LEN,
        CMSG_SPACE,
        MSG_CMSG_CLOEXEC,
        MSG_CTRUNC,
        MSG_DONTWAIT,
        MSG_NOSIGNAL,
        MSG_TRUNC,
        SCM_CREDENTIALS,
        SCM_RIGHTS,
        SO_PASSCRED,
        SOCK_SEQPACKET,
        SOL_SOCKET,
        socket,
        socketpair,
    )
else:
    import _socket
    import posix
    from _socket import (
        AF_UNIX,
        CMSG_LEN,
        CMSG_SPACE,
        MSG_CMSG_CLOEXEC,
        MSG_CTRUNC,
        MSG_DONTWAIT,
        MSG_NOSIGNAL,
        MSG_TRUNC,
        SCM_CREDENTIALS,
        SCM_RIGHTS,
        SO_PASSCRED,
        SOCK_SEQPACKET,
        SOL_SOCKET,
    )

    class socket(_socket.socket):
        """A socket; a context manager that closes it."""

        __slots__ = ("__weakref__",)

        def __enter__(self):  # noqa: ANN204
            return self

        def __exit__(self, *_):  # noqa: ANN002, ANN204
            self.close()

        def set_inheritable(self, inheritable):  # noqa: ANN001, ANN201
            """Set whether programs that this process starts inherit the socket."""
            posix.set_inheritable(self.fileno(), inheritable)

    def socketpair(family, kind):  # noqa: ANN001, ANN201
        """Return two connected sockets."""
        return tuple(socket(fileno=each.detach()) for each in _socket.socketpair(family, kind))


__all__ = [
    "AF_UNIX", "CMSG_LEN", "CMSG_SPACE", "MSG_CMSG_CLOEXEC", "MSG_CTRUNC", "MSG_DONTWAIT", "MSG_NOSIGNAL", "MSG_TRUNC",
    "SCM_CREDENTIALS", "SCM_RIGHTS", "SOCK_SEQPACKET", "SOL_SOCKET", "SO_PASSCRED", "socket", "socketpair",
]  # fmt: skip
