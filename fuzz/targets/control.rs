//! The command socket, both ways, over real sockets: root is asked anything, and whoever asks is answered anything.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::LazyLock;
use std::thread;

use knockq::serve::control::{Control, Request, ask, reply};
use knockq_fuzz::Scratch;
use libfuzzer_sys::fuzz_target;

static KEEPER: LazyLock<(Scratch, Control)> = LazyLock::new(|| {
    let scratch = Scratch::new("root");
    let control = Control::listen(scratch.path()).unwrap();
    (scratch, control)
});

static IMPOSTOR: LazyLock<(Scratch, UnixListener)> = LazyLock::new(|| {
    let scratch = Scratch::new("impostor");
    let socket = scratch.path().join("control.sock");
    let _ = std::fs::remove_file(&socket);
    (scratch, UnixListener::bind(socket).unwrap())
});

fuzz_target!(|bytes: &[u8]| {
    match bytes.split_first() {
        Some((kind, request)) if kind % 8 != 0 => root_is_asked(request),
        Some((_, answer)) => asker_is_answered(answer),
        None => {}
    }
});

fn root_is_asked(bytes: &[u8]) {
    let (scratch, control) = &*KEEPER;
    let mut stream = UnixStream::connect(scratch.path().join("control.sock")).unwrap();
    stream.write_all(bytes).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let Some((request, asked)) = control.accept() else { return };
    // What was understood is what was said: postcard's encoding of it, but for numbers that are written longer.
    let written = postcard::to_stdvec(&request).unwrap();
    assert!(written.len() <= bytes.len(), "{request:?}");
    assert_eq!(postcard::from_bytes::<Request>(&written).unwrap(), request);
    reply(asked, &knockq::serve::control::Reply::Done);
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, [0]);
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
