"""Units and sizes that more than one process counts in.  Every process may import this module."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
NS = 1_000_000_000  # nanoseconds of a second
DAY_S = 86400

PAGE = 4096  # bytes of a page of memory, of guests and of the host
SECTOR = 512  # bytes; virtio-blk, partition tables and boot loaders count in it on any storage
IOV_MAX = 1024  # buffers that one readv(2), writev(2), preadv(2) or pwritev(2) takes; Linux' UIO_MAXIOV
