#!/usr/bin/env python3
"""Translates TCP between one IPv6 host and IPv4 (RFC 7915), as a NAT64 gateway does; ends with the process that started it.

    nat64.py CLIENT6 CLIENT4

It makes the tun device `nat64` in the network namespace that it runs in. What is sent there from CLIENT6 to any /96 prefix
with an IPv4 address at its end comes out from CLIENT4 to that address, and the answers come back. The prefix is remembered
by the ports, which is all the state that there is. The MSS is lowered to what fits everywhere, as many gateways do.
"""

import fcntl
import ipaddress
import os
import struct
import sys

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000
MSS = 1220
TCP, SYN = 6, 2


def checksum(data):
    total = sum(struct.unpack(f">{len(data) // 2}H", data[: len(data) & ~1]))
    if len(data) & 1:
        total += data[-1] << 8
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack(">H", total ^ 0xFFFF)


def segment(addresses, tcp):
    """The TCP segment between other addresses. Sequence number, timestamps and all else stay as they are."""
    if tcp[13] & SYN and tcp[20:22] == b"\x02\x04":  # the MSS stands first in what Linux sends
        tcp = tcp[:22] + struct.pack(">H", min(MSS, *struct.unpack(">H", tcp[22:24]))) + tcp[24:]
    tcp = tcp[:16] + bytes(2) + tcp[18:]
    return tcp[:16] + checksum(addresses + struct.pack(">LL", len(tcp), TCP) + tcp) + tcp[18:]


def to_ipv4(packet, source, destination):
    """RFC 7915 section 5.1: a new identification, and no DF on what is small."""
    length, traffic_class = len(packet) - 20, (packet[0] & 15) << 4 | packet[1] >> 4
    identification, fragment = os.urandom(2), 0x4000 if length > 1260 else 0
    head = struct.pack(">BBH2sHBBH", 0x45, traffic_class, length, identification, fragment, packet[7] - 1, TCP, 0)
    head += source + destination
    return head[:10] + checksum(head) + head[12:] + segment(source + destination, packet[40:])


def to_ipv6(packet, source, destination):
    """RFC 7915 section 4.1: a flow label of zero."""
    tcp = packet[(packet[0] & 15) * 4 :]
    head = struct.pack(">BBHHBB", 0x60 | packet[1] >> 4, (packet[1] & 15) << 4, 0, len(tcp), TCP, packet[8] - 1)
    return head + source + destination + segment(source + destination, tcp)


def main():
    client6, client4 = (ipaddress.ip_address(text).packed for text in sys.argv[1:])
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"nat64", IFF_TUN | IFF_NO_PI))
    print("ready", flush=True)
    servers = {}
    while packet := os.read(tun, 65535):
        if packet[0] >> 4 == 6 and packet[6] == TCP and packet[8:24] == client6:
            server6, own_port, server_port = packet[24:40], packet[40:42], packet[42:44]
            servers[server6[12:], server_port, own_port] = server6
            os.write(tun, to_ipv4(packet, client4, server6[12:]))
        elif packet[0] >> 4 == 4 and packet[9] == TCP and packet[16:20] == client4:
            tcp = (packet[0] & 15) * 4
            server6 = servers.get((packet[12:16], packet[tcp : tcp + 2], packet[tcp + 2 : tcp + 4]))
            if server6:
                os.write(tun, to_ipv6(packet, server6, client6))


main()
