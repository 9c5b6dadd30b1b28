#!/usr/bin/env python3
"""An oracle of the knock (token v1, carrier `linux`), for tests only. `oracle.py COMMAND --help` lists the options.
Written from docs/protocol.md, sections 1 to 4, alone; it shares no code with the Rust implementation. It keeps no
state: whether a counter was spent is the tests' business. Needs `cryptography` >= 38; `send` and `replay` need root.
"""
import argparse, base64, hmac, ipaddress, json, os, secrets, socket, struct, sys, time
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

def secret(text):  # 32 bytes from base64, or from a file with one line of it
    text = open(text, encoding="ascii").read().strip() if os.path.isfile(text) else text
    raw = base64.b64decode(text, validate=True)
    assert len(raw) == 32 and base64.b64encode(raw) == text.encode(), "a key must be 32 bytes in standard base64"
    return raw
def derive(private, peer, is_client, psk):  # (k_enc, k_mac), from either end
    private = X25519PrivateKey.from_private_bytes(private)
    own = private.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    assert int.from_bytes(peer, "little") < 2**255 - 19, "non-canonical public key"  # a set top bit is caught here too
    assert own != peer, "the client's key equals the server's"
    assert psk != bytes(32), "all-zero pre-shared key"
    try: z = private.exchange(X25519PublicKey.from_public_bytes(peer))
    except ValueError: raise ValueError("public key of low order") from None  # the library refuses an all-zero result
    hkdf = HKDF(hashes.SHA256(), 52, b"knockq v1", own + peer if is_client else peer + own)
    return struct.unpack("32s20s", hkdf.derive(z + (psk or bytes(32))))
def plaintext(keys, n, port, source):
    where = bytes([source.version]) + source.packed if source else b"\0"
    tag = hmac.digest(keys[1], b"knockq v1" + struct.pack(">QH", n, port) + where, "sha1")
    return struct.pack(">HH", port, 0) + tag[:4]
def crypt(keys, n, data):  # both ways
    return Cipher(algorithms.AES(keys[0]), modes.CTR(struct.pack(">QQ", n, 0))).encryptor().update(data)
def knock_port(keys, n, ports): return ports[int.from_bytes(crypt(keys, n, bytes(12))[8:], "big") % len(ports)]
def port_list(text):  # "22,20000-21023": ascending, no duplicates
    spans = [[int(end) for end in part.split("-")] for part in text.split(",")]
    assert all(len(s) < 3 and 0 < s[0] <= s[-1] < 65536 for s in spans), "bad port list"
    return sorted({port for s in spans for port in range(s[0], s[-1] + 1)})

def fields(packet):  # (source, destination, offset of the source address, offset of the TCP header)
    at, size, tcp, proto = (12, 4, (packet[0] & 15) * 4, 9) if packet[0] >> 4 == 4 else (8, 16, 40, 6)
    assert packet[0] >> 4 in (4, 6) and len(packet) >= tcp + 20 and packet[proto] == 6, "not a whole TCP packet"
    return *(ipaddress.ip_address(packet[i:i + size]) for i in (at, at + size)), at, tcp
def checksum(data):  # one's complement arithmetic is arithmetic modulo 65535, and 65536 is 1 there
    return struct.pack(">H", -int.from_bytes(data + bytes(len(data) % 2), "big") % 65535)
def rewritten(packet, source):  # with that source and right checksums
    old, to, at, tcp = fields(packet)
    assert source.version == old.version, "addresses of two families"
    ip, seg = packet[:at] + source.packed + packet[at + len(source.packed):tcp], packet[tcp:]
    if at == 12: ip = ip[:10] + checksum(ip[:10] + ip[12:]) + ip[12:]
    pseudo = source.packed + to.packed + struct.pack(">LL", len(seg), 6)
    return ip + seg[:16] + checksum(pseudo + seg[:16] + seg[18:]) + seg[18:]
def syn(source, to, source_port, port, token):  # Linux at MTU 1500 with tcp_rmem[2] = 6 MiB, hence window scale 7
    mss = 1460 if to.version == 4 else 1440
    tcp = struct.pack(">HH4sLBBHL", source_port, port, token[:4], 0, 10 << 4, 2, 65535 // mss * mss, 0)
    tcp += struct.pack(">BBHBBBB4sLBBBB", 2, 4, mss, 4, 2, 8, 10, token[4:], 0, 1, 3, 3, 7)  # MSS SACK_PERM TS NOP WS
    ip = struct.pack(">LHBB", 6 << 28 | secrets.randbits(20), len(tcp), 6, 64)
    if to.version == 4:  # the kernel replaces an ID of 0 even with IP_HDRINCL
        ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 1 + secrets.randbelow(65535), 0x4000, 64, 6, 0)
    return rewritten(ip + source.packed + to.packed + tcp, source)
def transmit(packet):
    family, to = socket.AF_INET if packet[0] >> 4 == 4 else socket.AF_INET6, str(fields(packet)[1])
    socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW).sendto(packet, (to, 0))  # IPPROTO_RAW implies HDRINCL
def opened(packet, keys, ports, knock_ports, now, window):
    source, _, _, tcp = fields(packet)
    dport, seq, offset, flags = struct.unpack(">H4s4xBB", packet[tcp + 2:tcp + 14])
    options, tsval = packet[tcp + 20:tcp + (offset >> 4) * 4], b""
    while options and options[0] != 0 and not tsval:
        tsval = options[2:6] if options[:2] == b"\x08\x0a" else b""
        options = options[1 if options[0] == 1 else max(options[1:2] + b"\2"):]
    for n in range(max(0, now - window), min(2**64, now + window + 1)):
        if flags & 0x17 == 2 and dport == knock_port(keys, n, knock_ports):  # SYN without ACK, RST, FIN
            for port, bound in ((port, bound) for port in ports for bound in (source, None)):
                if crypt(keys, n, seq + tsval) == plaintext(keys, n, port, bound):
                    return {"counter": n, "port": port, "source": str(bound or "unbound")}
    sys.exit("no token fits")
def check(e):  # a worked example: every computed field, and its token, opened from a packet
    n, ports, source = e["counter"], port_list(e["knock_ports"]), e["source"] and ipaddress.ip_address(e["source"])
    key = {name: secret(e[name]) for name in e if name.endswith(("_private", "_public", "_key"))}
    psk, three = any(key["preshared_key"]) and key["preshared_key"], port_list("443,8443,2222")
    keys = derive(key["client_private"], key["server_public"], True, psk)
    token, here = crypt(keys, n, plaintext(keys, n, e["port"], source)), source or ipaddress.ip_address("127.0.0.1")
    made = {"k_enc": keys[0].hex(), "k_mac": keys[1].hex(), "token": token.hex(),
            "tcp_sequence": int.from_bytes(token[:4], "big"), "tsval": int.from_bytes(token[4:], "big"),
            "knock_port": knock_port(keys, n, ports), "knock_port_of_443_8443_and_2222": knock_port(keys, n, three)}
    assert keys == derive(key["server_private"], key["client_public"], False, psk), f"public keys of counter {n} differ"
    for name in made: assert made[name] == e[name], f"{name} of counter {n}: {made[name]}, the file has {e[name]}"
    seen = opened(syn(here, here, 32768, e["knock_port"], token), keys, [e["port"]], ports, n, 0)
    assert seen["source"] == str(source or "unbound"), f"the token of counter {n} opened as {seen}"

SYN = "--client-key! --server-key! --knock-ports! --from! --to! --port! --bind --counter --source-port --knock-port"
OPEN = "open hex --server-private! --client-key! --knock-ports! --port! --psk --window --now"
COMMANDS = "vectors file", "packet --psk " + SYN, "send --psk --repeat " + SYN, "replay hex --from", OPEN  # !: required
if __name__ == "__main__":
    sys.excepthook = lambda kind, error, trace: print(f"oracle: {str(error) or kind}", file=sys.stderr)  # and exit 1
    ip, now, cli = ipaddress.ip_address, int(time.time()), argparse.ArgumentParser(description=__doc__)
    kinds = {"file": lambda path: json.load(open(path)), "hex": bytes.fromhex, "--knock-ports": port_list, "--to": ip,
             "--from": ip, "--bind": lambda text: ip(text) if text != "none" else None,
             **dict.fromkeys(("--client-key", "--server-key", "--server-private", "--psk"), secret)}  # else a number
    commands = cli.add_subparsers(dest="command", required=True)
    for command, *flags in map(str.split, COMMANDS):
        parser = commands.add_parser(command)
        parser.set_defaults(counter=now, now=now, window=60, repeat=1, source_port=32768 + 2 * secrets.randbelow(14116))
        for flag in flags:
            how = {"required": True, "action": "append" if flag == "--port!" else "store"} if flag[-1] == "!" else {}
            parser.add_argument(flag.strip("!"), type=kinds.get(flag.strip("!"), int), **how)
    source = getattr(a := cli.parse_args(), "from", None)
    if a.command == "vectors":
        for example in a.file: check(example)
        print(len(a.file), "vectors ok")
    elif a.command == "replay": transmit(rewritten(a.hex, source) if source else a.hex)
    elif a.command == "open":
        keys = derive(a.server_private, a.client_key, False, a.psk)
        print(json.dumps(opened(a.hex, keys, a.port, a.knock_ports, a.now, a.window)))
    else:
        keys = derive(a.client_key, a.server_key, True, a.psk)
        token = crypt(keys, a.counter, plaintext(keys, a.counter, a.port[-1], a.bind))
        packet = syn(source, a.to, a.source_port, a.knock_port or knock_port(keys, a.counter, a.knock_ports), token)
        for _ in range(a.repeat if a.command == "send" else 0): transmit(packet)
        print(packet.hex())
