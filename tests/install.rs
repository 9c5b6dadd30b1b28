//! `make install` and `make uninstall`, into a directory of their own.

#[path = "support/tree.rs"]
mod tree;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

const KNOCKQ: &str = env!("CARGO_BIN_EXE_knockq");

/// What is installed below DESTDIR, besides manual pages. The first two of them alone are programs.
const FILES: [&str; 9] = [
    "usr/bin/knockq",
    "usr/libexec/knockq/knockq-gate",
    "usr/libexec/knockq/knockq-root",
    "usr/lib/systemd/system/knockq-gate.service",
    "usr/lib/systemd/system/knockq.service",
    "usr/lib/sysusers.d/knockq.conf",
    "usr/share/bash-completion/completions/knockq",
    "usr/share/fish/vendor_completions.d/knockq.fish",
    "usr/share/zsh/site-functions/_knockq",
];

/// The same with every page of dist/man in its section, in order.
fn installed() -> Vec<String> {
    let pages = tree::files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("dist/man"));
    assert!(pages.len() > 3, "{pages:?}");
    let place = |page: &PathBuf| {
        let name = page.file_name().unwrap().to_str().unwrap();
        format!("usr/share/man/man{}/{name}", name.rsplit('.').next().unwrap())
    };
    let mut files: Vec<String> = pages.iter().map(place).chain(FILES.map(str::to_owned)).collect();
    files.sort();
    files
}

/// CAP_NET_RAW permitted and effective, as the kernel writes it to a file (linux/capability.h: revision 2, little-endian).
const NET_RAW: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

struct Stage(PathBuf);

impl Stage {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("knockq-install-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn make(&self, target: &str, binary: &str) -> Output {
        make(&[target, &format!("BINARY={binary}"), &format!("DESTDIR={}", self.0.display()), "PREFIX=/usr"])
    }

    fn path(&self, file: &str) -> PathBuf {
        self.0.join(file)
    }

    fn files(&self) -> Vec<String> {
        let relative = |path: &PathBuf| path.strip_prefix(&self.0).unwrap().display().to_string();
        tree::files(&self.0).iter().map(relative).collect()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn make(arguments: &[&str]) -> Output {
    let mut command = Command::new("make");
    command.args(["--no-print-directory", "-C", env!("CARGO_MANIFEST_DIR")]).args(arguments);
    // Those of a `make test` around this are none of its business.
    command.env_remove("MAKEFLAGS").env_remove("MAKELEVEL").output().unwrap()
}

#[track_caller]
fn succeeds(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[track_caller]
fn fails(output: &Output, said: &[&str]) {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{errors}");
    for text in said {
        assert!(errors.contains(text), "`{text}` is not in:\n{errors}");
    }
}

#[test]
fn install_puts_every_file_in_its_place_and_uninstall_leaves_none() {
    let stage = Stage::new();
    for _ in 0..2 {
        let said = succeeds(&stage.make("install", KNOCKQ));
        assert_eq!(stage.files(), installed());
        for file in installed() {
            let mode = if FILES[..3].contains(&file.as_str()) { 0o755 } else { 0o644 };
            assert_eq!(fs::metadata(stage.path(&file)).unwrap().permissions().mode() & 0o7777, mode, "{file}");
        }
        let mut value = [0; 64];
        match rustix::fs::getxattr(stage.path("usr/bin/knockq"), "security.capability", &mut value) {
            Ok(length) => assert_eq!(value[..length], NET_RAW),
            // No setcap here, or a file system that cannot hold capabilities.
            Err(error) => assert!(said.contains("only root can knock"), "{error}: {said}"),
        }
    }
    let version = Command::new(stage.path("usr/bin/knockq")).arg("--version").output().unwrap();
    assert!(succeeds(&version).starts_with("knockq "));
    for _ in 0..2 {
        succeeds(&stage.make("uninstall", KNOCKQ));
        assert_eq!(stage.files(), [""; 0]);
    }
}

#[test]
fn the_units_start_the_binary_that_was_installed_and_systemd_finds_no_fault() {
    let stage = Stage::new();
    succeeds(&stage.make("install", KNOCKQ));
    let units = ["knockq.service", "knockq-gate.service"].map(|unit| stage.path("usr/lib/systemd/system").join(unit));
    for unit in &units {
        let text = fs::read_to_string(unit).unwrap();
        assert!(text.contains("\nExecStart=/usr/bin/knockq "));
        assert!(!text.contains("@BINDIR@"), "{text}");
        // systemd looks for the program that a unit starts.
        fs::write(unit, text.replace("/usr/bin/knockq", &stage.path("usr/bin/knockq").display().to_string())).unwrap();
    }
    match Command::new("systemd-analyze").arg("verify").args(&units).output() {
        Ok(verified) => {
            let said = String::from_utf8_lossy(&verified.stderr).into_owned();
            assert!(verified.status.success() && !said.contains("knockq"), "{said}");
        }
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "systemd-analyze: {error}"),
    }
}

#[test]
fn install_says_what_is_missing_and_changes_nothing_then() {
    let stage = Stage::new();
    fails(&stage.make("install", "/no/such/binary"), &["/no/such/binary: is not built yet", "Hint: make"]);
    assert_eq!(stage.files(), [""; 0]);
    for prefix in ["/opt/with space", "/opt/a&b", "/opt/%h", "opt"] {
        let destination = format!("DESTDIR={}", stage.0.display());
        let ran = make(&["install", &format!("BINARY={KNOCKQ}"), &destination, &format!("PREFIX={prefix}")]);
        fails(&ran, &[&format!("BINDIR={prefix}/bin: is not an absolute path")]);
    }
    // Another user may not see this project: it may lie below a home directory.
    let project = Stage::new();
    let mut cp = Command::new("cp");
    cp.args(["-r", "Makefile", "dist", project.0.to_str().unwrap()]).current_dir(env!("CARGO_MANIFEST_DIR"));
    succeeds(&cp.output().unwrap());
    let prefix = format!("PREFIX={}", stage.0.display());
    for target in ["install", "uninstall"] {
        let ran = Command::new("setpriv")
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "make", "-C"])
            .arg(&project.0)
            .args([target, &prefix, "BINARY=/bin/sh"])
            .output()
            .unwrap();
        fails(&ran, &["needs root", &format!("Hint: sudo make {target}")]);
    }
    assert_eq!(stage.files(), [""; 0]);
}
