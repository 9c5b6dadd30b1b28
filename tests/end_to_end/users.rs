//! What each user may, and for how long.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use knockq::config::Moment;
use nix::sys::signal::Signal;

use crate::lab::{self, Daemon, FAMILIES, Family, Lab, PATIENCE, eventually, succeeds};
use crate::{seconds_left, unix_now};

impl Lab {
    /// Adds lines to a user's file, before the services.
    fn narrow(&self, user: &str, line: &str) {
        self.edit(&format!("users.d/{user}.toml"), "services", &format!("{line}\nservices"));
    }

    fn knock_as(&self, user: &str, family: Family, service: &str) {
        succeeds(&self.knockq_as(user, &self.alice, &["send", "server", service, family.flag()]));
    }
}

fn reload(daemon: &Daemon) {
    let before = daemon.log().matches("engine: reloaded").count();
    daemon.signal(Signal::SIGHUP);
    eventually("reloading", || daemon.log().matches("engine: reloaded").count() > before);
}

#[test]
fn a_user_opens_several_services_each_for_the_users_time_at_most() {
    let lab = Lab::with("open_for = \"1d\"");
    lab.add_user("dave", &["ssh", "mail"]);
    lab.narrow("dave", "open_for = \"1h\"");
    let mut daemon = lab.start();
    for family in FAMILIES {
        lab.knock_as("dave", family, "ssh");
        let left = seconds_left(&lab.wait_for_door(family.alice(), 22));
        assert!((3000.0..=3600.0).contains(&left), "the user's cap: {left}");
        lab.knock_as("dave", family, "mail");
        assert!(seconds_left(&lab.wait_for_door(family.alice(), 25)) <= 6.0, "the service's own time");
        lab.knock(family, &["ssh"]);
        daemon.wait_for(&format!("granted user=alice service=ssh source={} port=tcp/22 seconds=86400", family.alice()));
        let granted =
            |user: &str, service: &str| format!("granted user={user} service={service} source={}", family.alice());
        let log = daemon.log();
        let line = log.lines().find(|line| line.contains(&granted("dave", "ssh"))).unwrap();
        assert!(
            line.ends_with("port=tcp/22 seconds=3600 bound=false") || line.ends_with("seconds=3600 bound=true"),
            "{line}"
        );
    }
}

/// By each way in which a user may do less than before; what others hold open stays.
#[test]
fn a_door_that_its_user_could_not_open_any_more_shuts_at_once() {
    let lab = Lab::with("open_for = \"1h\"");
    lab.add_user("dave", &["ssh", "mail"]);
    let entry = lab.config().with_file_name("users.d/dave.toml");
    let whole = fs::read_to_string(&entry).unwrap();
    let daemon = lab.start();
    let yesterday = unix_now() - 86_400;
    let expired = format!("expires = {}", jiff::Timestamp::from_second(yesterday.cast_signed()).unwrap());
    for narrower in [
        "from = [\"192.0.2.0/24\", \"2001:db8::/32\"]",
        "source = \"bound\"",
        "open_for = \"10s\"",
        expired.as_str(),
        "gone",
        "services",
    ] {
        for family in FAMILIES {
            // A token that is not bound, whatever this client would do by itself.
            succeeds(&lab.knockq_as("dave", &lab.alice, &["send", "server", "ssh", family.flag(), "--source", "none"]));
            assert!(seconds_left(&lab.wait_for_door(family.alice(), 22)) > 600.0, "{narrower}");
        }
        match narrower {
            "gone" => fs::remove_file(&entry).unwrap(),
            "services" => lab.edit("users.d/dave.toml", "\"ssh\", ", ""),
            line => lab.narrow("dave", line),
        }
        reload(&daemon);
        for family in FAMILIES {
            assert_eq!(lab.door(family.alice(), 22), None, "{narrower}");
            assert!(
                daemon.log().contains(&format!("shut user=dave service=ssh source={}", family.alice())),
                "{narrower}"
            );
        }
        fs::write(&entry, &whole).unwrap();
        reload(&daemon);
    }
}

#[test]
fn no_door_outlives_its_users_expiry_and_none_opens_after_it() {
    let lab = Lab::with("open_for = \"1h\"");
    lab.add_user("dave", &["ssh"]);
    let end = unix_now() + 90;
    let written: Moment = jiff::Timestamp::from_second(end.cast_signed()).unwrap().to_string().parse().unwrap();
    lab.narrow("dave", &format!("expires = {written}"));
    let mut daemon = lab.start();
    for family in FAMILIES {
        let left = end.saturating_sub(unix_now());
        lab.knock_as("dave", family, "ssh");
        let element = lab.wait_for_door(family.alice(), 22);
        assert!(seconds_left(&element) <= f64::from(u32::try_from(left).unwrap()) + 1.0, "{element}");
    }
    eventually("the expiry", || unix_now() > end + 1);
    for family in FAMILIES {
        eventually("closing", || lab.door(family.alice(), 22).is_none());
        lab.knock_as("dave", family, "ssh");
        daemon.wait_for("reason=expired user=dave");
        assert_eq!(lab.door(family.alice(), 22), None);
    }
    let listed = lab.control(&["user", "list", "--config", lab.config().to_str().unwrap()]);
    assert!(listed.contains("(over)"), "{listed}");
}

#[test]
fn a_knock_from_outside_a_users_networks_opens_nothing_and_names_the_user() {
    let lab = Lab::with("open_for = \"1h\"");
    lab.add_user("dave", &["ssh"]);
    lab.narrow("dave", "from = [\"10.77.1.0/24\", \"fd77:1::/64\"]");
    let mut daemon = lab.start();
    for family in FAMILIES {
        succeeds(&lab.knockq_as(
            "dave",
            &lab.mallory,
            &["send", "server", family.flag(), "--source", &family.mallory().to_string()],
        ));
        daemon.wait_for(&format!("reason=source_not_allowed user=dave source={}", family.mallory()));
        assert_eq!(lab.door(family.mallory(), 22), None);
        lab.knock_as("dave", family, "ssh");
        lab.wait_for_door(family.alice(), 22);
    }
}

#[test]
fn a_pre_shared_key_opens_for_whoever_has_it_besides_their_own() {
    let lab = Lab::with("open_for = \"1h\"");
    let secret = lab.directory.path.join("dave.psk");
    fs::write(&secret, "q83vASNFZ4mrze8BI0VniavN7wEjRWeJq83vASNFZ4k=\n").unwrap();
    let key = succeeds(&lab.knockq_as("dave", &lab.alice, &["keygen"]));
    let config = lab.config().display().to_string();
    let add = ["user", "add", "dave", "--key", key.trim_end(), "--allow", "ssh", "--config", &config, "--psk-file"];
    let refused = lab.knockq(&lab.server, &[&add[..], &[secret.to_str().unwrap()]].concat());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("must not be readable by others"), "a secret");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let profile = succeeds(&lab.knockq(&lab.server, &[&add[..], &[secret.to_str().unwrap()]].concat()));
    assert!(!profile.contains("q83v"), "the profile holds no secret: {profile}");

    let path = lab.directory.path.join("dave.profile");
    fs::write(&path, profile).unwrap();
    let import = || lab.knockq_as("dave", &lab.alice, &["host", "add", "server", path.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&import().stderr).into_owned();
    assert!(said.contains("dave.psk: the pre-shared key is missing") && said.contains("Hint: "), "{said}");
    let brought = lab.home("dave").join(".config/knockq/dave.psk");
    fs::copy(&secret, &brought).unwrap();
    succeeds(&import());

    let mut daemon = lab.start();
    for family in FAMILIES {
        lab.knock_as("dave", family, "ssh");
        lab.wait_for_door(family.alice(), 22);
        lab.revoke(&["--all"]);
    }
    fs::write(&brought, "AAAAASNFZ4mrze8BI0VniavN7wEjRWeJq83vASNFZ4k=\n").unwrap();
    for family in FAMILIES {
        lab.knock_as("dave", family, "ssh");
        lab.knock(family, &["ssh"]);
        daemon.wait_for(&format!("granted user=alice service=ssh source={}", family.alice()));
    }
    assert_eq!(daemon.log().matches("granted user=dave").count(), 2, "not with another's: {}", daemon.log());
}

/// A door's end is no event of the kernel's: the daemon looks at its own clock.
#[test]
fn a_door_that_shuts_by_itself_has_a_line_where_that_is_asked_for() {
    let lab = Lab::with("open_for = \"8s\"");
    lab.set("log_closings = true");
    let mut daemon = lab.start();
    for family in FAMILIES {
        lab.knock(family, &[]);
        daemon.wait_for(&format!("closed user=alice service=ssh source={} port=tcp/22", family.alice()));
        eventually("closing", || lab.door(family.alice(), 22).is_none());
    }
    lab.edit("knockq.toml", "log_closings = true", "log_closings = false");
    reload(&daemon);
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    eventually("closing", || FAMILIES.iter().all(|family| lab.door(family.alice(), 22).is_none()));
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(daemon.log().matches("closed user=alice").count(), 2, "{}", daemon.log());
}

/// A service whose side of a connection the test holds.
fn talk(lab: &Lab) -> TcpListener {
    lab.server.enter(|| TcpListener::bind("[::]:7000").unwrap())
}

/// Both ends of a new connection to it.
fn ends(lab: &Lab, family: Family, service: &TcpListener) -> (TcpStream, TcpStream) {
    ends_from(&lab.alice, family, service)
}

/// The same, from this host.
fn ends_from(host: &lab::Host, family: Family, service: &TcpListener) -> (TcpStream, TcpStream) {
    let server = SocketAddr::new(family.server(), 7000);
    let client = host.enter(|| TcpStream::connect_timeout(&server, PATIENCE)).unwrap();
    (service.accept().unwrap().0, client)
}

/// Whether what one end says comes to the other within a while.
fn is_heard(mut speaking: &TcpStream, mut hearing: &TcpStream) -> bool {
    hearing.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let mut heard = [0; 5];
    speaking.write_all(b"hello").is_ok() && hearing.read_exact(&mut heard).is_ok()
}

const TALK: &str = "[services.ssh]\nports = [\"tcp/22\", \"tcp/7000\"]\nopen_for = \"1h\"\n\
                    [services.mail]\nports = [\"tcp/25\"]\nopen_for = \"1h\"\n";

/// Whoever speaks next, the service or its user.
#[test]
fn connections_end_with_a_revocation_that_says_so() {
    let lab = Lab::network();
    lab.configure(TALK);
    lab.add_user("alice", &["ssh"]);
    lab.add_user("carol", &["mail"]);
    lab.server.serve(25);
    let (service, daemon) = (talk(&lab), lab.start());
    let mut left = Vec::new();
    for family in FAMILIES {
        lab.knock_as("alice", family, "ssh");
        lab.knock_as("carol", family, "mail");
        for port in [7000, 25] {
            lab.wait_for_door(family.alice(), port);
        }
        let mut mail = lab.alice.connect(family.server(), 25).unwrap();
        let connections = [(); 2].map(|()| ends(&lab, family, &service));
        lab.revoke(&["--user", "alice"]);
        assert!(connections.iter().all(|(server, client)| is_heard(server, client)), "they live on unless it is said");
        // Its door has shut by now, and the daemon remembers whose it was.
        let config = lab.config().display().to_string();
        let revoked = lab.knockq(&lab.server, &["revoke", "--config", &config, "--user", "alice", "--kill"]);
        let said = String::from_utf8_lossy(&revoked.stderr).into_owned();
        // One that is hers by the other family too; and what an end that does not know it yet says makes another entry.
        let least = 2 + left.len();
        let ended = said.trim_end().strip_prefix("no such door is open; connections that were ended: ");
        assert!(ended.and_then(|ended| ended.parse().ok()) >= Some(least), "{said}");
        succeeds(&revoked);
        assert!(lab::echoes(&mut mail), "carol's lives on");
        let [(server, client), (other_server, other_client)] = &connections;
        assert!(!is_heard(server, client) && !is_heard(client, server), "the service speaks first");
        assert!(!is_heard(other_client, other_server), "the user does");

        lab.knock_as("alice", family, "ssh");
        lab.wait_for_door(family.alice(), 7000);
        let (server, client) = ends(&lab, family, &service);
        assert!(is_heard(&server, &client) && is_heard(&client, &server), "another knock, another connection");
        lab.revoke(&[&family.alice().to_string(), "--kill"]);
        assert!(!is_heard(&server, &client) && !is_heard(&mail, &mail), "all of this address");
        lab.knock_as("alice", family, "ssh");
        lab.wait_for_door(family.alice(), 7000);
        left.push((family, ends(&lab, family, &service)));
    }
    daemon.stop();
    for (family, (server, client)) in left {
        lab.revoke(&[&family.alice().to_string(), "--kill"]);
        assert!(!is_heard(&server, &client), "without the daemon too");
    }
}

#[test]
fn connections_of_a_user_who_was_removed_end_with_a_revocation_that_says_so() {
    let lab = Lab::network();
    lab.configure(TALK);
    lab.add_user("dave", &["ssh"]);
    let entry = lab.config().with_file_name("users.d/dave.toml");
    let whole = fs::read_to_string(&entry).unwrap();
    let (service, daemon) = (talk(&lab), lab.start());
    for family in FAMILIES {
        lab.knock_as("dave", family, "ssh");
        lab.wait_for_door(family.alice(), 7000);
        let (server, client) = ends(&lab, family, &service);
        fs::remove_file(&entry).unwrap();
        reload(&daemon);
        assert!(is_heard(&server, &client), "the removal leaves it");
        lab.revoke(&["--user", "dave", "--kill"]);
        assert!(!is_heard(&server, &client) && !is_heard(&client, &server));
        fs::write(&entry, &whole).unwrap();
        reload(&daemon);
    }
}

#[test]
fn connections_to_a_service_that_says_so_end_when_the_door_shuts() {
    let lab = Lab::network();
    lab.configure(
        "[services.ssh]\nports = [\"tcp/22\", \"tcp/7000\"]\nopen_for = \"20s\"\non_close = \"kill\"\n\
         [services.mail]\nports = [\"tcp/25\"]\nopen_for = \"20s\"\n",
    );
    lab.add_user("alice", &["ssh"]);
    lab.add_user("carol", &["mail"]);
    lab.server.serve(25);
    let (service, daemon) = (talk(&lab), lab.start());
    for family in FAMILIES {
        lab.knock_as("alice", family, "ssh");
        lab.knock_as("carol", family, "mail");
        [7000, 25].iter().for_each(|&port| drop(lab.wait_for_door(family.alice(), port)));
        let (server, client) = ends(&lab, family, &service);
        let mut mail = lab.alice.connect(family.server(), 25).unwrap();
        assert!(is_heard(&server, &client));
        eventually("closing", || [7000, 25].iter().all(|&port| lab.door(family.alice(), port).is_none()));
        eventually("the end", || !is_heard(&server, &client));
        assert!(!is_heard(&client, &server));
        assert!(lab::echoes(&mut mail), "that of a service that does not say so lives on");
    }
    drop(daemon);
}

/// Whoever may knock could knock with the administrator's address.
#[test]
fn connections_of_a_trusted_network_never_end_with_a_door() {
    let lab = Lab::network();
    lab.configure("[services.ssh]\nports = [\"tcp/22\", \"tcp/7000\"]\nopen_for = \"8s\"\non_close = \"kill\"\n");
    lab.set("trusted = [\"10.77.2.0/24\", \"fd77:2::/64\"]");
    lab.add_user("alice", &["ssh"]);
    let (service, mut daemon) = (talk(&lab), lab.start());
    for family in FAMILIES {
        let trusted = ends_from(&lab.mallory, family, &service);
        let spoofed = ["send", "server", "ssh", family.flag(), "--source", &family.mallory().to_string()];
        succeeds(&lab.knockq_as("alice", &lab.mallory, &spoofed));
        daemon.wait_for(&format!("granted user=alice service=ssh source={}", family.mallory()));
        lab.knock_as("alice", family, "ssh");
        lab.wait_for_door(family.alice(), 7000);
        let (server, client) = ends(&lab, family, &service);
        eventually("closing", || lab.door(family.mallory(), 7000).is_none());
        eventually("the end", || !is_heard(&server, &client));
        lab.revoke(&["--all", "--kill"]);
        let config = lab.config().display().to_string();
        let refused =
            lab.knockq(&lab.server, &["revoke", &family.mallory().to_string(), "--kill", "--config", &config]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(said.contains("revoke: 1 connections live on: their network is trusted\nHint: "), "{said}");
        assert!(is_heard(&trusted.0, &trusted.1) && is_heard(&trusted.1, &trusted.0), "not that one");
    }
}

/// Somebody copied the knock: whoever has come in by it, the user or the other, is out.
#[test]
fn connections_end_with_a_knock_that_is_taken_back_where_the_service_says_so() {
    let lab = Lab::network();
    lab.configure("[services.ssh]\nports = [\"tcp/22\", \"tcp/7000\"]\nopen_for = \"1h\"\non_close = \"kill\"\n");
    lab.add_user("alice", &["ssh"]);
    let (service, _daemon) = (talk(&lab), lab.start());
    for family in FAMILIES {
        let packet = lab.print_knock(family, &["ssh", "--source", "none"]);
        lab.alice.oracle_says(&["replay", &packet]);
        lab.wait_for_door(family.alice(), 7000);
        let (server, client) = ends(&lab, family, &service);
        assert!(is_heard(&server, &client));
        lab.mallory.oracle_says(&["replay", &packet, "--from", &family.mallory().to_string()]);
        eventually("the end", || !is_heard(&server, &client));
        assert!(!is_heard(&client, &server));
    }
}

/// Connection tracking has forgotten them for their silence, and what the service says next would begin another.
#[test]
fn idle_exchanges_over_udp_end_too_and_begin_again_with_another_knock() {
    let lab = Lab::network();
    lab.configure("[services.vpn]\nports = [\"udp/7001\"]\nopen_for = \"1h\"\non_close = \"kill\"\n");
    lab.add_user("alice", &["vpn"]);
    let socket = |host: &lab::Host, port: u16| {
        let mut bound = None;
        // A process that another test is just starting may hold the last one for a moment.
        eventually("the port", || {
            bound = host.enter(|| UdpSocket::bind(("::", port))).ok();
            bound.is_some()
        });
        let socket = bound.unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        socket
    };
    let _daemon = lab.start();
    for timeout in ["udp_timeout", "udp_timeout_stream"] {
        lab.server.sysctl(&format!("net/netfilter/nf_conntrack_{timeout}"), "1");
    }
    let knock = |family: Family| {
        lab.knock_as("alice", family, "vpn");
        let door = || lab.control(&["grants"]).contains(&family.alice().to_string());
        eventually("the door", door);
    };
    for family in FAMILIES {
        let (server, client) = (socket(&lab.server, 7001), socket(&lab.alice, 7002));
        let mut heard = [0; 5];
        knock(family);
        client.send_to(b"hello", SocketAddr::new(family.server(), 7001)).unwrap();
        let (_, peer) = server.recv_from(&mut heard).unwrap();
        let speaks = |heard: &mut [u8]| server.send_to(b"hello", peer).is_ok() && client.recv_from(heard).is_ok();
        assert!(speaks(&mut heard));
        std::thread::sleep(Duration::from_secs(4));
        lab.revoke(&["--user", "alice"]);
        assert!(!speaks(&mut heard), "the service cannot begin it anew");
        knock(family);
        eventually("beginning again", || speaks(&mut heard));
        lab.revoke(&["--all", "--kill"]);
    }
}
