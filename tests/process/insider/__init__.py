"""The program that the tests start as a confined process.  It confines itself, and then tries calls.

`main` is started exactly as vmd's own processes are.  The command line names the confinement to enter (`-` for none)
and the functions of `ATTEMPTS` to call.  The answers are lines on fd 3, one for each attempt.  A call that kills leaves
no answer.  So with the first argument `each` the program forks a process for each attempt, which confines itself and
makes the attempt, and the parent answers with its exit status.
"""
# ruff: noqa: D103 - the names of the attempts say what is tried

import _socket
import _thread
import contextlib
import ctypes
import fcntl
import gc
import mmap
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback

from vmd.config.model import DEFAULT_FIRST_ID as FIRST_ID
from vmd.errors import HostError, number
from vmd.privsep import confine, linux
from vmd.privsep.spawn import spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.privsep.spawn import Child

libc = ctypes.CDLL(None, use_errno=True)
VICTIM_FD = 7  # a pidfd of another process
DATA_FD = 8  # a file
KEPT: list[socket.socket] = []
INT80 = b"\xb8\x14\0\0\0\xcd\x80\xc3"  # mov eax, 20 (getpid to a 32-bit process); int 0x80; ret
CLONE_NEWUSER = 0x10000000


def raw(number: int, *arguments: object) -> int:
    """Make a system call; raises OSError."""
    wide = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    result = int(libc.syscall(ctypes.c_long(number), *wide))
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result


def machine_code() -> "Callable[[], int]":
    """Return a function that makes a 32-bit system call.  Once confined, a process cannot make executable memory."""
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(INT80)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return ctypes.CFUNCTYPE(ctypes.c_int)(address)


# --- calls that some confinements forbid ---


def open_passwd() -> object:
    return os.open("/etc/passwd", os.O_RDONLY)


def list_root() -> object:
    return os.listdir("/")


def write_code() -> object:
    return os.open("/vmd/vmd/errors.py", os.O_WRONLY)


def create_file() -> object:
    return os.open("/vmd/new", os.O_CREAT | os.O_WRONLY)


def create_outside() -> object:
    return os.open("/tmp/vmd-insider-made-this", os.O_CREAT | os.O_WRONLY)


def remove_outside() -> None:
    os.unlink("/tmp/vmd-insider-made-this")


def connect_inet() -> None:
    sock = _socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.connect(("192.0.2.1", 80))


def connect_unix() -> None:
    _socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).connect("/run/systemd/notify")


def raw_packets() -> object:
    return _socket.socket(socket.AF_PACKET, socket.SOCK_RAW)


def send_elsewhere() -> object:
    ours, _ = _socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    return ours.sendto(b"x", "/nowhere")


def send_with_an_address() -> object:
    ours, _ = _socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    return ours.sendmsg([b"x"], (), 0, "/nowhere")


def set_an_option() -> object:
    ours, _ = _socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    return ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)


def execute() -> object:
    return os.execv(sys.executable, [sys.executable, "-c", ""])


def fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def fork_by_vfork() -> object:
    return os.posix_spawn("/bin/true", ["true"], {})


def clone_namespace() -> object:
    return raw(56, CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0)


def trace_me() -> object:
    return raw(101, 0, 0, 0, 0)


def read_other_memory() -> object:
    return raw(310, os.getppid(), 0, 0, 0, 0, 0)


def io_uring() -> object:
    return raw(425, 1, ctypes.create_string_buffer(120))


def bpf() -> object:
    return raw(321, 0, None, 0)


def userfault() -> object:
    return raw(323, 0)


def foreign_ioctl() -> object:
    return fcntl.ioctl(0, 0x5412, b"x")  # TIOCSTI


def kvm_ioctl() -> object:
    return fcntl.ioctl(0, 0xAE01, 0)  # KVM_CREATE_VM


def executable_mmap() -> object:
    return mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)


def executable_mprotect() -> object:
    page = mmap.mmap(-1, 4096)
    return raw(10, ctypes.addressof(ctypes.c_char.from_buffer(page)), 4096, 5)


def mount() -> None:
    linux.mount("none", "/dev", "tmpfs", 0)


def change_root() -> None:
    os.chroot("/dev")


def become_root() -> None:
    os.setresuid(0, 0, 0)


def unshare_net() -> None:
    linux.unshare(linux.CLONE_NEWNET)


def unshare_user() -> None:
    linux.unshare(CLONE_NEWUSER)


def kill_parent() -> None:
    os.kill(os.getppid(), 0)


def kill_victim() -> None:
    signal.pidfd_send_signal(VICTIM_FD, signal.SIGTERM)


def tgkill_other() -> object:
    return raw(234, os.getppid(), os.getppid(), 0)


def x32() -> object:
    return raw(0x40000000 | 39)


def another_filter() -> object:
    return raw(317, 0, 0, 0)


def become_traceable() -> object:
    return raw(157, linux.PR_SET_DUMPABLE, 1, 0, 0, 0)


def limit_others() -> object:
    return raw(302, os.getppid(), 7, None, None)


def more_descriptors() -> None:
    linux.set_limit("raise the limit of descriptors", linux.RLIMIT_NOFILE, 1 << 20)


def memfd() -> None:
    fd = os.memfd_create("memory", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 8192)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    with mmap.mmap(fd, 8192) as view:
        view[0] = 1


def write_data() -> object:
    return os.write(DATA_FD, b"!")


def end_appending() -> object:
    return fcntl.fcntl(DATA_FD, fcntl.F_SETFL, 0)


def load_library() -> object:
    return ctypes.CDLL("libm.so.6")


def narrow_requests() -> None:
    confine.narrow_requests(confine.VM.ioctls)


# --- the work of vmd's processes, and VMs that try to reach each other ---


def threads() -> None:
    total: list[int] = []
    workers = [threading.Thread(target=lambda: total.append(len(bytearray(1 << 20)))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    gc.collect()
    assert total == [1 << 20] * 4


def events() -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    with select.epoll() as poller:
        poller.register(fd, select.EPOLLIN)
        os.eventfd_write(fd, 5)
        assert poller.poll(10) == [(fd, select.EPOLLIN)]
    assert os.eventfd_read(fd) == 5
    time.sleep(0.001)
    assert time.localtime().tm_year > 2000
    assert len(os.urandom(8)) == 8


def pass_descriptor() -> None:
    left, right = socket.socketpair()
    socket.send_fds(left, [b"x"], [0])
    _, fds, _, _ = socket.recv_fds(right, 1, 1)
    right.setblocking(False)
    os.close(fds[0])


def file_data() -> None:
    page = mmap.mmap(-1, 4096)
    assert os.preadv(DATA_FD, [memoryview(page)[:5]], 0) == 5
    assert page[:5] == b"hello"
    assert os.pwritev(DATA_FD, [memoryview(page)[:5]], 5) == 5
    os.fdatasync(DATA_FD)


def gather() -> None:
    reader, writer = os.pipe()
    assert os.writev(writer, [b"ab", b"c"]) == 3
    assert os.readv(reader, [bytearray(3)]) == 3


def signal_thread() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGUSR1, lambda signum, _frame: seen.append(signum))
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
    assert seen == [signal.SIGUSR1]


def late_import() -> None:
    try:
        import antigravity  # noqa: F401
    except ImportError:
        return
    raise AssertionError("imported")


def formatted_traceback() -> None:
    try:
        raise ValueError("caught")
    except ValueError:
        assert "caught" in traceback.format_exc()


def uncaught() -> None:
    raise ValueError("nobody catches this")


def spawn_child() -> None:
    ours, theirs = socket.socketpair()
    child = spawn("insider/child", ["VIOBLK", "threads"], channel=theirs, entry="insider:main")
    theirs.close()
    assert ours.recv(100) == b"VIOBLK confined\n"
    assert ours.recv(100) == b"threads done None\n"
    assert child.reap(30) == 0


def spawn_orphan() -> None:
    """Start a process that holds DATA_FD.  Its channel stays open until this process ends."""
    KEPT.extend(socket.socketpair())
    spawn("orphan", ["-", "announce_and_wait"], channel=KEPT[0], fds={DATA_FD: DATA_FD}, entry="insider:main")


def hide_a_process() -> None:
    """Leave a process that is no child of this one and holds DATA_FD."""
    if os.fork() == 0:
        if os.fork() == 0:
            announce_and_wait()
        os._exit(0)
    os.wait()


def start_two_vms(first: int, second: int) -> "tuple[Child, Child, socket.socket]":
    """Start two processes as vmm does, with these ids.  The second tries to kill the first, and has the channel."""
    idle, ours_of_idle = socket.socketpair()
    KEPT.append(ours_of_idle)
    victim = spawn("vm/victim", ["-", "wait"], channel=idle, uid=first, entry="insider:main")
    assert ours_of_idle.recv(100) == b"- confined\n"
    theirs, ours = socket.socketpair()
    attempts = ("kill_victim", "become_other", "many_threads", "capabilities", "wait")
    attacker = spawn(
        "vm/attacker", ["-", *attempts], channel=theirs, fds={VICTIM_FD: victim.pidfd}, uid=second, entry="insider:main"
    )
    theirs.close()
    return victim, attacker, ours


def vms_of_one_vmm() -> object:
    """Return the answers of a VM that attacks another, whether the other survived, and its status when we kill it."""
    victim, attacker, channel = start_two_vms(FIRST_ID + 1001, FIRST_ID + 1002)
    with channel.makefile() as answers:
        said = [answers.readline().strip() for _ in range(5)][1:]
    attacker.kill()  # takes a while: it has many threads
    attacker.reap(30)
    lived = victim.reap() is None
    victim.kill()
    return said, lived, victim.reap(30)


def become_other() -> None:
    os.setresuid(FIRST_ID + 1001, FIRST_ID + 1001, FIRST_ID + 1001)


def many_threads() -> object:
    """Start threads until the kernel refuses; return their number."""
    threading.stack_size(1 << 18)
    wanted = 4000
    with contextlib.suppress(RuntimeError):
        for count in range(wanted):
            _thread.start_new_thread(select.poll().poll, ())
            wanted = count + 1
    return wanted


def announce_and_wait() -> None:
    os.write(DATA_FD, b"!")
    wait()


def wait() -> None:
    select.poll().poll()  # not pause(), which no filter allows


# --- the work of priv, its limits, and the surroundings of a process ---


def run(*argv: str) -> str:
    """Run a program and return its output.  It does not use subprocess, which imports much at run time."""
    reader, writer = os.pipe()
    pid = os.posix_spawnp(
        argv[0], argv, {}, file_actions=[(os.POSIX_SPAWN_DUP2, writer, 1), (os.POSIX_SPAWN_DUP2, writer, 2)]
    )
    os.close(writer)
    with open(reader) as output:
        text = output.read()
    _, status = os.waitpid(pid, 0)
    if status:
        raise OSError(status, text)
    return text


def run_nft() -> object:
    run("nft", "add table inet vmdtest; add chain inet vmdtest nat { type nat hook postrouting priority 100; }")
    return "vmdtest" in run("nft", "list", "tables")


def run_ip() -> object:
    run("ip", "link", "add", "vmdtest0", "type", "bridge")
    return "vmdtest0" in run("ip", "link", "show")


def forward() -> object:
    with open("/proc/sys/net/ipv4/ip_forward", "r+") as file:
        file.write("1")
    with open("/proc/sys/net/ipv4/ip_forward") as file:
        return file.read().strip()


def tap_from_descriptor() -> None:
    fcntl.ioctl(VICTIM_FD, 0x400454CA, struct.pack("16sH22x", b"vmdtest1", 0x1002))


def open_tun() -> object:
    return os.open("/dev/net/tun", os.O_RDWR)


def own_directory() -> None:
    path = f"/run/vmd/priv/test-{os.getpid()}"
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    os.unlink(path)


def see_run() -> object:
    return [name for name in ("lock", "vmd", "vmd/priv") if os.path.exists(f"/run/{name}")]


def write_etc() -> object:
    return os.open("/etc/vmd-was-here", os.O_CREAT | os.O_WRONLY)


def give_away() -> None:
    os.fchown(DATA_FD, 1, 1)


def capabilities() -> object:
    return f"{linux.permitted_capabilities():x}"


def identity() -> object:
    return f"{os.getresuid()} {os.getresgid()} {os.getgroups()} {os.getcwd()}"


def tree() -> object:
    return sorted(os.listdir("/")) + sorted(os.listdir("/vmd"))


def environment() -> object:
    return sorted(os.environ)


def version() -> object:
    from .version import VERSION

    return VERSION


def compiled_msgpack() -> object:
    import msgpack

    return msgpack.Packer.__module__


def modules() -> object:
    import hashlib
    import termios
    import zlib

    return [module.__name__ for module in (hashlib, termios, zlib)]


ATTEMPTS: "dict[str, Callable[[], object]]" = {name: value for name, value in globals().items() if callable(value)}


def main() -> int:
    """Confine this process, make the attempts and answer.  With `each` first, fork a process for each attempt."""
    channel = socket.socket(fileno=3)
    ATTEMPTS["int80"] = machine_code()
    kind, *attempts = sys.argv[1:]
    if kind != "each":
        return confined(channel, kind, *attempts)
    kind, *attempts = attempts
    for attempt in attempts:
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(confined(channel, kind, *attempt.split("+")))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        channel.sendall(f"{attempt} ended {os.waitstatus_to_exitcode(status)}\n".encode())
    return 0


def confined(channel: socket.socket, kind: str, *attempts: str) -> int:
    """Confine this process, make the attempts and answer; return the exit status."""
    if kind != "-":
        confine.confine(getattr(confine, kind))
    channel.sendall(f"{kind} confined\n".encode())
    for name in attempts:
        try:
            answer = f"done {ATTEMPTS[name]()}"
        except (OSError, HostError) as error:
            answer = f"errno {number(error)}"
        channel.sendall(f"{name} {answer}\n".encode())
    return 0
