//! A kernel's SYNs to copy, for tests that make knocks without asking a kernel.

use knockq::packet::Persona;

/// Over loopback, with TCP_MAXSEG 1460 and 1440, of Linux 6.18 with 4 GiB of memory and more.
const V4: &str = "4500003cbbde4000400680db7f0000017f000001b0f2d4b502e7e90c00000000a002faf0fe300000\
                  020405b40402080ab7907c3c000000000103030a";
const V6: &str = "6001744e00280640000000000000000000000000000000010000000000000000000000000000000\
                  1828e9f931f17ef7600000000a002fd2000300000020405a00402080a61fd888b000000000103030a";

pub fn persona(is_v4: bool) -> Persona {
    let hex = if is_v4 { V4 } else { V6 };
    let byte = |place| u8::from_str_radix(&hex[place..place + 2], 16).unwrap();
    Persona::of(&(0..hex.len()).step_by(2).map(byte).collect::<Vec<u8>>()).unwrap()
}
