//! A server's and a client's files in a directory, and the commands as people type them.

#![allow(dead_code, reason = "each test uses its own part")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::tree::files;

pub const KNOCKQ: &str = env!("CARGO_BIN_EXE_knockq");

/// A directory with a server's and a client's files.
pub struct World {
    pub path: PathBuf,
}

impl World {
    pub fn empty() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("knockq-cli-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self { path }
    }

    /// After `init`, `keygen`, `user add alice` and `host add home`.
    pub fn new() -> Self {
        let world = Self::empty();
        world.init(&["--protect", "tcp/22", "--knock-ports", "20000-21023", "--address", "192.0.2.1"]).succeeds();
        let key = world.run(&["keygen"]).succeeds();
        let profile = world.user_add("alice", key.trim_end(), &[]).succeeds();
        fs::write(world.path("alice.profile"), profile).unwrap();
        world.run(&["host", "add", "home", &world.text("alice.profile")]).succeeds();
        world
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    pub fn config(&self) -> PathBuf {
        self.path("etc/knockq.toml")
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(KNOCKQ);
        command.env_clear().env("HOME", &self.path).args(arguments).stdin(Stdio::null());
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Ran {
        Ran(self.command(arguments).output().unwrap())
    }

    /// The same on a host whose /etc has these files and no others, and where D-Bus has no name for the machine.
    pub fn on_host(&self, etc: &[(&str, &str)], home: &Path, arguments: &[&str]) -> Ran {
        let [files, nothing] = ["host-etc", "host-nothing"].map(|name| self.path(name));
        for directory in [&files, &nothing] {
            let _ = fs::remove_dir_all(directory);
            fs::create_dir(directory).unwrap();
        }
        for (name, text) in etc {
            fs::write(files.join(name), text).unwrap();
        }
        let script = "mount --bind \"$1\" /etc && { [ ! -d /var/lib/dbus ] || mount --bind \"$2\" /var/lib/dbus; } && shift 2 && exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script, "sh"]).args([files, nothing]).arg(KNOCKQ).args(arguments);
        Ran(command.env("HOME", home).stdin(Stdio::null()).output().unwrap())
    }

    pub fn init(&self, arguments: &[&str]) -> Ran {
        self.run(
            &[
                &["init", "--dir", &self.text("etc"), "--state", &self.text("state"), "--runtime", &self.text("run")],
                arguments,
            ]
            .concat(),
        )
    }

    pub fn user_add(&self, name: &str, key: &str, more: &[&str]) -> Ran {
        let config = self.config().display().to_string();
        self.run(&[&["user", "add", name, "--key", key, "--config", &config], more].concat())
    }

    /// A subcommand of `user` on this server.
    pub fn user(&self, arguments: &[&str]) -> Ran {
        let config = self.config().display().to_string();
        self.run(&[&["user"], arguments, &["--config", &config]].concat())
    }

    pub fn recover(&self, more: &[&str]) -> Ran {
        self.run(&[&["recover", "--config", &self.config().display().to_string()], more].concat())
    }

    /// The store, and those that `recover` has kept beside it.
    pub fn stores(&self) -> Vec<PathBuf> {
        self.files().into_iter().filter(|file| file.starts_with(self.path("state"))).collect()
    }

    pub fn check(&self) -> Ran {
        self.run(&["check", "--config", &self.config().display().to_string()])
    }

    pub fn serve(&self) -> Ran {
        self.run(&["serve", "--config", &self.config().display().to_string()])
    }

    pub fn edit(&self, file: &str, from: &str, to: &str) {
        let path = self.path(file);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(path, text.replace(from, to)).unwrap();
    }

    pub fn mode(&self, file: &str, mode: u32) {
        fs::set_permissions(self.path(file), fs::Permissions::from_mode(mode)).unwrap();
    }

    pub fn files(&self) -> Vec<PathBuf> {
        files(&self.path)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

pub struct Ran(pub Output);

impl Ran {
    #[track_caller]
    pub fn succeeds(&self) -> String {
        assert!(self.0.status.success(), "{}", self.errors());
        String::from_utf8(self.0.stdout.clone()).unwrap()
    }

    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.0.stderr).into_owned()
    }

    /// Ends with this code, says all of this, and panics nowhere.
    #[track_caller]
    pub fn fails(&self, code: i32, said: &[&str]) {
        let errors = self.errors();
        assert_eq!(self.0.status.code(), Some(code), "{errors}");
        for text in said {
            assert!(errors.contains(text), "`{text}` is not in:\n{errors}");
        }
        assert!(!errors.contains("panicked"), "{errors}");
    }
}

#[track_caller]
pub fn json(ran: &Ran) -> serde_json::Value {
    assert!(ran.0.status.success(), "{}", ran.errors());
    serde_json::from_slice(&ran.0.stdout).unwrap()
}
