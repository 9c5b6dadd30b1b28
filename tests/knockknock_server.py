#!/usr/bin/env python3
"""The server of knockknock, as the description of its format has it (docs/protocol.md section 6), and independent of knockq.

    knockknock_server.py PROFILES SET [LOST]

PROFILES holds a directory for each profile, with what the original's has: `cipher.key` and `mac.key` in base64, `counter`,
and `config` with the knock port. A knock adds its source and port to SET, words for nft such as `inet filter opened`. For
each SYN to a knock port a line says what came of it. So many of the first SYNs get LOST.
"""

import base64
import configparser
import hmac
import os
import socket
import struct
import subprocess
import sys

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

WINDOW, TCP, SYN, OUTGOING, ALL_IPV4 = 20, 6, 2, 4, 0x0800


class Profile:
    def __init__(self, path):
        self.path = path
        self.cipher = Cipher(algorithms.AES(base64.b64decode(self.read("cipher.key"))), modes.ECB())
        self.mac = base64.b64decode(self.read("mac.key"))
        config = configparser.ConfigParser()
        config.read_string(self.read("config"))
        self.port = config.getint("main", "knock_port")

    def read(self, name):
        with open(os.path.join(self.path, name), encoding="ascii") as file:
            return file.read()

    def write_counter(self, counter):
        """Durably, before anything comes of it."""
        new = os.path.join(self.path, "counter.new")
        with open(new, "w", encoding="ascii") as file:
            file.write(f"{counter}\n")
            file.flush()
            os.fsync(file.fileno())
        os.rename(new, os.path.join(self.path, "counter"))

    def open(self, token):
        """The count and the port of a token, where it is one of the next."""
        first = int(self.read("counter"))
        for count in range(first, first + WINDOW):
            encryptor = self.cipher.encryptor()
            pad = encryptor.update(struct.pack(">12xL", count)) + encryptor.finalize()
            plain = bytes(a ^ b for a, b in zip(token, pad))
            if hmac.compare_digest(plain[2:], hmac.digest(self.mac, plain[:2], "sha1")[:10]):
                self.write_counter(count + 1)
                return count, int.from_bytes(plain[:2], "big")
        return None


def main():
    directory, door, *lost = sys.argv[1:]
    lost = int(*lost)
    profiles = [Profile(os.path.join(directory, name)) for name in sorted(os.listdir(directory))]
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ALL_IPV4))
    print("ready", flush=True)
    while True:
        packet, (_, _, kind, *_) = wire.recvfrom(65535)
        tcp = packet[(packet[0] & 15) * 4 :]
        if kind == OUTGOING or packet[9] != TCP or len(tcp) < 20 or tcp[13] != SYN:
            continue
        token = packet[4:6] + tcp[4:12] + tcp[14:16]
        source = socket.inet_ntoa(packet[12:16])
        for profile in profiles:
            if profile.port != int.from_bytes(tcp[2:4], "big"):
                continue
            if lost:
                lost -= 1
                print(f"lost {source}", flush=True)
                continue
            opened = profile.open(token)
            if opened is None:
                print(f"refused {source}", flush=True)
                continue
            count, port = opened
            element = f"{{ {source} . {port} timeout 60s }}"
            subprocess.run(["nft", "add", "element", *door.split(), element], check=True)
            print(f"opened {port} for {source} count {count}", flush=True)


main()
