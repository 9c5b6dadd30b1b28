#!/usr/bin/env python3
"""An oracle of the knock (token v1, carrier `linux`), for tests only.

Written from docs/protocol.md, sections 1 to 4, alone; it shares no code with the Rust implementation. It keeps no state:
whether a counter was spent is the tests' business. Needs `cryptography` 38 or newer; `send` and `replay` need root.
"""
import argparse, base64, hmac, ipaddress, json, os, secrets, socket, struct, sys, time
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

def need(condition, complaint):
    if not condition: raise ValueError(complaint)
def secret(text):  # base64, or a file with one line of it
    text = open(text, encoding="ascii").read().strip() if os.path.isfile(text) else text
    raw = base64.b64decode(text, validate=True)
    need(len(raw) == 32 and base64.b64encode(raw) == text.encode(), "a key must be 32 bytes in standard base64")
    return raw
def exchange(private, public):  # the library itself raises ValueError for an all-zero result
    return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
def public_key(text):
    raw = secret(text)
    need(int.from_bytes(raw, "little") < 2**255 - 19, "non-canonical public key")  # a set top bit is caught here too
    try: exchange(bytes(32), raw)  # this scalar is clamped to 2^254: the result is zero for low order and nothing else
    except ValueError: raise ValueError("public key of low order") from None
    return raw
def public_of(private):
    raw = serialization.Encoding.Raw, serialization.PublicFormat.Raw
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes(*raw)
def derive(private, peer, is_client, psk):  # (k_enc, k_mac), from either end
    own = public_of(private)
    need(own != peer, "the client's key equals the server's")
    need(psk != bytes(32), "all-zero pre-shared key")
    info = own + peer if is_client else peer + own
    okm = HKDF(hashes.SHA256(), 52, b"knockq v1", info).derive(exchange(private, peer) + (psk or bytes(32)))
    return okm[:32], okm[32:]

def plaintext(keys, n, port, source):
    where = bytes([source.version]) + source.packed if source else b"\0"
    signed = b"knockq v1" + struct.pack(">QH", n, port) + where
    return struct.pack(">HH", port, 0) + hmac.digest(keys[1], signed, "sha1")[:4]
def crypt(keys, n, data):  # both ways
    cipher = Cipher(algorithms.AES(keys[0]), modes.CTR(struct.pack(">QQ", n, 0)))
    return cipher.encryptor().update(data)
def knock_port(keys, n, ports): return ports[int.from_bytes(crypt(keys, n, bytes(12))[8:], "big") % len(ports)]
def port_list(text):  # "22,20000-21023": ascending, no duplicates
    spans = [[int(end) for end in part.split("-")] for part in text.split(",")]
    need(all(len(s) < 3 and 0 < s[0] <= s[-1] < 65536 for s in spans), "bad port list")
    return sorted({port for s in spans for port in range(s[0], s[-1] + 1)})

def fields(packet):  # (source, destination, offset of the source address, offset of the TCP header)
    at, size, tcp, proto = (12, 4, (packet[0] & 15) * 4, 9) if packet[0] >> 4 == 4 else (8, 16, 40, 6)
    need(packet[0] >> 4 in (4, 6) and len(packet) >= tcp + 20 and packet[proto] == 6, "not a whole TCP packet")
    return *(ipaddress.ip_address(packet[i:i + size]) for i in (at, at + size)), at, tcp
def checksum(data):  # one's complement arithmetic is arithmetic modulo 65535, and 65536 is 1 there
    return struct.pack(">H", -int.from_bytes(data + bytes(len(data) % 2), "big") % 65535)
def rewritten(packet, source):  # with that source and right checksums
    old, to, at, tcp = fields(packet)
    need(source.version == old.version, "addresses of two families")
    ip, seg = packet[:at] + source.packed + packet[at + len(source.packed):tcp], packet[tcp:]
    if at == 12: ip = ip[:10] + checksum(ip[:10] + ip[12:]) + ip[12:]
    pseudo = source.packed + to.packed + struct.pack(">LL", len(seg), 6)
    return ip + seg[:16] + checksum(pseudo + seg[:16] + seg[18:]) + seg[18:]
def syn(source, to, source_port, port, token):  # Linux at MTU 1500 with tcp_rmem[2] = 6 MiB, hence window scale 7
    need(source.version == to.version, "addresses of two families")
    mss = 1460 if to.version == 4 else 1440
    tcp = struct.pack(">HH4sLBBHL", source_port, port, token[:4], 0, 10 << 4, 2, 65535 // mss * mss, 0)
    tcp += struct.pack(">BBHBBBB4sLBBBB", 2, 4, mss, 4, 2, 8, 10, token[4:], 0, 1, 3, 3, 7)  # MSS SACK_PERM TS NOP WS
    ip = struct.pack(">LHBB", 6 << 28 | secrets.randbits(20), len(tcp), 6, 64)
    if to.version == 4:  # the kernel replaces an ID of 0 even with IP_HDRINCL
        ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 1 + secrets.randbelow(65535), 0x4000, 64, 6, 0)
    return rewritten(ip + source.packed + to.packed + tcp, source)
def transmit(packet, to):  # IPPROTO_RAW implies IP_HDRINCL and IPV6_HDRINCL
    family = socket.AF_INET if to.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw: raw.sendto(packet, (str(to), 0))
def opened(packet, keys, a):
    source, _, _, tcp = fields(packet)
    dport, seq, offset, flags = struct.unpack(">H4s4xBB", packet[tcp + 2:tcp + 14])
    options, tsval = packet[tcp + 20:tcp + (offset >> 4) * 4], b""
    while options and options[0] != 0 and not tsval:
        tsval = options[2:6] if options[:2] == b"\x08\x0a" else b""
        options = options[1 if options[0] == 1 else max(options[1:2] + b"\2"):]
    for n in range(max(0, a.now - a.window), min(2**64, a.now + a.window + 1)):
        if flags & 0x17 == 2 and dport == knock_port(keys, n, a.knock_ports):  # SYN without ACK, RST, FIN
            for port, bound in ((p, s) for p in a.port for s in (source, None)):
                if crypt(keys, n, seq + tsval) == plaintext(keys, n, port, bound):
                    return json.dumps({"counter": n, "port": port, "source": str(bound or "unbound")})
    sys.exit("no token fits")
def vector(e):  # the fields of a vector that can be computed
    n, port, source = e["counter"], e["port"], e["source"] and ipaddress.ip_address(e["source"])
    private, psk = [secret(e[f"{end}_private"]) for end in ("client", "server")], secret(e["preshared_key"])
    public = [public_key(e[f"{end}_public"]) for end in ("client", "server")]
    keys, peer_keys = (derive(private[i], public[1 - i], i == 0, any(psk) and psk) for i in (0, 1))
    token, plain = crypt(keys, n, plaintext(keys, n, port, source)), crypt(peer_keys, n, bytes.fromhex(e["token"]))
    need(plain == plaintext(peer_keys, n, port, source), f"the token of counter {n} does not open")
    return {**{f"{end}_public": base64.b64encode(public_of(k)).decode() for end, k in zip(("client", "server"), private)},
            "k_enc": keys[0].hex(), "k_mac": keys[1].hex(), "token": token.hex(),
            "tcp_sequence": int.from_bytes(token[:4], "big"), "tsval": int.from_bytes(token[4:], "big"),
            "knock_port": knock_port(keys, n, port_list(e["knock_ports"])),
            "knock_port_of_443_8443_and_2222": knock_port(keys, n, port_list("443,8443,2222"))}
