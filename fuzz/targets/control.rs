//! The command socket: the engine is asked anything, and whoever asks is answered anything, over a real socket.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::LazyLock;
use std::thread;

use knockq::serve::control::{Request, ask};
use knockq_fuzz::Scratch;
use libfuzzer_sys::fuzz_target;

static IMPOSTOR: LazyLock<(Scratch, UnixListener)> = LazyLock::new(|| {
    let scratch = Scratch::new("impostor");
    let socket = scratch.path().join("control.sock");
    let _ = std::fs::remove_file(&socket);
    (scratch, UnixListener::bind(socket).unwrap())
});

fuzz_target!(|bytes: &[u8]| {
    match bytes.split_first() {
        Some((kind, request)) if kind % 8 != 0 => engine_is_asked(request),
        Some((_, answer)) => asker_is_answered(answer),
        None => {}
    }
});

fn engine_is_asked(bytes: &[u8]) {
    let Ok(request) = postcard::from_bytes::<Request>(bytes) else { return };
    // What was understood is what was said: postcard's encoding of it, but for numbers that are written longer.
    let written = postcard::to_stdvec(&request).unwrap();
    assert!(written.len() <= bytes.len(), "{request:?}");
    assert_eq!(postcard::from_bytes::<Request>(&written).unwrap(), request);
}

fn asker_is_answered(bytes: &[u8]) {
    let (scratch, listener) = &*IMPOSTOR;
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = [0; 64];
            let _ = stream.read(&mut asked);
            let _ = stream.write_all(bytes);
        });
        if let Err(error) = ask(scratch.path(), &Request::Reload) {
            let _ = error.to_string();
        }
    });
}
