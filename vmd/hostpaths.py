"""Where a host has what networks of VMs need; for who uses it, and for who says beforehand that it is missing."""

TUN = "/dev/net/tun"
NFT_PATHS = ("/usr/sbin/nft", "/sbin/nft", "/usr/bin/nft", "/usr/local/sbin/nft")
IPV6 = "/proc/sys/net/ipv6"

NO_NFT = "nft was not found: install nftables, or write `local nat disable`"
