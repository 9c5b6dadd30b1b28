//! Client and server in memory with an injected clock: every rule of docs/protocol.md sections 2 and 3.

#[path = "support/pair.rs"]
mod pair;
#[path = "support/persona.rs"]
mod recorded;

use knockq::crypto::Binding;
use knockq::service::{Name, Transport};
use knockq::verify::{Decision, Reason, Registry, SourcePolicy};
use pair::{End, Knock, NOW, Server, WINDOW, address, world};
use proptest::prelude::{ProptestConfig, any, prop_assert, prop_assert_eq, proptest};

const REFUSED: fn(Reason) -> End = End::Refused;

#[test]
fn a_knock_opens_the_service_it_names_for_its_source_alone() {
    for source in ["203.0.113.9", "2001:db8::9"] {
        let (mut server, clients) = world(3, |_, _| {});
        let grant = server.receive(&Knock::new(&clients[1], NOW).from(source).packet(), NOW).grant();
        assert_eq!((grant.user.as_str(), grant.service.as_str()), ("u1", "ssh"));
        assert_eq!(grant.source, address(source));
        assert_eq!((grant.open_for, grant.once), (30, false));
        let ports: Vec<_> = grant.ports.iter().map(|port| (port.transport, port.number)).collect();
        assert_eq!(ports, [(Transport::Tcp, 22)]);
    }
}

#[test]
fn a_service_with_several_ports_opens_them_all() {
    let (mut server, clients) = world(1, |_, _| {});
    let grant = server.receive(&Knock::new(&clients[0], NOW).port(51820).packet(), NOW).grant();
    assert_eq!(grant.ports.len(), 2);
    assert!(grant.once);
}

#[test]
fn a_replay_is_refused_from_anywhere_and_after_a_restart() {
    let (mut server, clients) = world(1, |_, _| {});
    let knock = || Knock::new(&clients[0], NOW).bound_to("203.0.113.9");
    server.receive(&knock().packet(), NOW).grant();
    assert_eq!(server.receive(&knock().packet(), NOW), REFUSED(Reason::Replayed));
    assert_eq!(server.receive(&knock().from("198.51.100.1").packet(), NOW), REFUSED(Reason::WrongTag));
    server.restart(NOW + 1);
    assert_eq!(server.receive(&knock().packet(), NOW + 1), REFUSED(Reason::Replayed));
    server.receive(&Knock::new(&clients[0], NOW + 1).packet(), NOW + 1).grant();
}

#[test]
fn an_unbound_token_from_a_second_address_withdraws_the_grant_once() {
    let (mut server, clients) = world(1, |_, _| {});
    let knock = || Knock::new(&clients[0], NOW);
    server.receive(&knock().packet(), NOW).grant();
    assert_eq!(server.receive(&knock().packet(), NOW), REFUSED(Reason::Replayed), "the same address is only a copy");
    let withdrawn = End::Withdrawn { source: address("203.0.113.9"), elsewhere: address("198.51.100.1") };
    assert_eq!(server.receive(&knock().from("198.51.100.1").packet(), NOW), withdrawn);
    assert_eq!(server.receive(&knock().from("198.51.100.2").packet(), NOW), REFUSED(Reason::Replayed));
}

#[test]
fn a_copy_from_elsewhere_while_the_first_is_being_written_leaves_no_grant() {
    let (mut server, clients) = world(1, |_, _| {});
    let knock = || Knock::new(&clients[0], NOW);
    let claim = server.claim(&knock().packet(), NOW).unwrap();
    assert!(matches!(server.claim(&knock().from("198.51.100.1").packet(), NOW), Err(End::Withdrawn { .. })));
    let recorded = server.record(claim).unwrap();
    assert_eq!(server.settle(&recorded, NOW), REFUSED(Reason::SpentTwice));
}

#[test]
fn a_second_copy_during_the_write_of_the_first_makes_one_grant() {
    let (mut server, clients) = world(1, |_, _| {});
    let packet = Knock::new(&clients[0], NOW).packet();
    let claim = server.claim(&packet, NOW).unwrap();
    assert_eq!(server.claim(&packet, NOW).unwrap_err(), REFUSED(Reason::Replayed));
    let recorded = server.record(claim).unwrap();
    server.settle(&recorded, NOW).grant();
}

#[test]
fn a_reload_changes_who_may_what_and_forgets_nothing_that_was_spent() {
    let (mut server, clients) = world(3, |_, _| {});
    let knock = |client: usize, n| Knock::new(&clients[client], n).bound_to("203.0.113.9").packet();
    server.receive(&knock(0, NOW), NOW).grant();
    server.log.is_full = true;
    assert_eq!(server.receive(&knock(1, NOW), NOW), REFUSED(Reason::NotDurable));
    server.log.is_full = false;
    let unbound = || Knock::new(&clients[2], NOW);
    server.receive(&unbound().packet(), NOW).grant();
    let in_flight = server.claim(&knock(0, NOW + 1), NOW).unwrap();

    server.reload(NOW, |registry| {
        registry.users[1].services = vec![2];
        registry.users.swap(0, 2);
    });
    let recorded = server.record(in_flight).unwrap();
    server.settle(&recorded, NOW).grant();
    assert_eq!(server.receive(&knock(0, NOW + 1), NOW), REFUSED(Reason::Replayed));
    assert_eq!(server.receive(&knock(1, NOW), NOW), REFUSED(Reason::Unknown), "not a service of hers any more");
    let mail = Knock::new(&clients[1], NOW).port(25).packet();
    assert_eq!(server.receive(&mail, NOW), REFUSED(Reason::Replayed), "its counter stays taken, durable or not");
    server.receive(&Knock::new(&clients[1], NOW + 1).port(25).packet(), NOW).grant();
    let withdrawn = End::Withdrawn { source: address("203.0.113.9"), elsewhere: address("198.51.100.1") };
    assert_eq!(server.receive(&unbound().from("198.51.100.1").packet(), NOW), withdrawn, "where it came from is known");
}

#[test]
fn a_user_who_was_removed_gets_nothing_for_a_knock_in_flight_nor_for_an_old_one_when_back() {
    let (mut server, clients) = world(2, |_, _| {});
    let knock = || Knock::new(&clients[0], NOW).packet();
    let in_flight = server.claim(&knock(), NOW).unwrap();
    let mut removed = None;
    server.reload(NOW, |registry| removed = Some(registry.users.remove(0)));
    let recorded = server.record(in_flight).unwrap();
    assert_eq!(server.settle(&recorded, NOW), REFUSED(Reason::NotPermitted));
    assert_eq!(server.receive(&knock(), NOW), REFUSED(Reason::Unknown));
    server.receive(&Knock::new(&clients[1], NOW).packet(), NOW).grant();
    server.reload(NOW, |registry| registry.users.extend(removed));
    assert_eq!(server.receive(&knock(), NOW), REFUSED(Reason::Replayed));
    server.receive(&Knock::new(&clients[0], NOW + 1).packet(), NOW).grant();
}

/// Its counter is being written when the settings change: it is judged by those that are in force when it is durable.
#[test]
fn a_knock_in_flight_over_a_reload_opens_nothing_that_the_new_settings_would_not() {
    type Change = fn(&mut Registry);
    let changes: [(Change, Option<Reason>); 5] = [
        (|_| {}, None),
        (|registry| registry.users[0].from = vec!["198.51.100.0/24".parse().unwrap()], Some(Reason::SourceNotAllowed)),
        (|registry| registry.users[0].source = SourcePolicy::Bound, Some(Reason::NotPermitted)),
        (|registry| registry.users[0].expires = Some(NOW), Some(Reason::Expired)),
        (|registry| registry.users[0].secrets = registry.users.remove(1).secrets, Some(Reason::SpentTwice)),
    ];
    for (change, refused) in changes {
        let (mut server, clients) = world(2, |_, _| {});
        let in_flight = server.claim(&Knock::new(&clients[0], NOW).packet(), NOW).unwrap();
        let recorded = server.record(in_flight).unwrap();
        server.reload(NOW, change);
        match (server.settle(&recorded, NOW), refused) {
            (settled, None) => drop(settled.grant()),
            (settled, Some(reason)) => assert_eq!(settled, REFUSED(reason)),
        }
    }
}

#[test]
fn the_window_is_exact_on_both_sides() {
    let (mut server, clients) = world(3, |_, _| {});
    for (client, n) in [(0, NOW - WINDOW), (1, NOW + WINDOW)] {
        server.receive(&Knock::new(&clients[client], n).packet(), NOW).grant();
    }
    for n in [NOW - WINDOW - 1, NOW + WINDOW + 1, 0, u64::MAX] {
        let end = server.receive(&Knock::new(&clients[2], n).packet(), NOW);
        assert!(matches!(end, End::Refused(Reason::Unknown | Reason::OutsideWindow)), "{n}: {end:?}");
    }
}

#[test]
fn lost_knocks_cost_nothing_and_late_ones_are_refused() {
    let (mut server, clients) = world(1, |_, _| {});
    server.receive(&Knock::new(&clients[0], NOW + 20).packet(), NOW).grant();
    assert_eq!(server.receive(&Knock::new(&clients[0], NOW + 19).packet(), NOW), REFUSED(Reason::Superseded));
    server.receive(&Knock::new(&clients[0], NOW + 21).packet(), NOW).grant();
}

#[test]
fn a_bound_token_is_worth_nothing_elsewhere() {
    let (mut server, clients) = world(1, |_, _| {});
    let knock = Knock::new(&clients[0], NOW).bound_to("203.0.113.9").from("198.51.100.1");
    assert_eq!(server.receive(&knock.packet(), NOW), REFUSED(Reason::WrongTag));
    server.receive(&Knock::new(&clients[0], NOW).bound_to("203.0.113.9").packet(), NOW).grant();
}

#[test]
fn a_user_who_must_bind_cannot_send_unbound_tokens() {
    let (mut server, clients) = world(1, |_, user| user.source = SourcePolicy::Bound);
    assert_eq!(server.receive(&Knock::new(&clients[0], NOW).packet(), NOW), REFUSED(Reason::WrongTag));
    server.receive(&Knock::new(&clients[0], NOW).bound_to("203.0.113.9").packet(), NOW).grant();
}

#[test]
fn a_wrong_tag_from_outside_the_users_networks_or_to_another_knock_port_is_no_try() {
    let (mut server, clients) = world(1, |_, user| user.from = vec!["203.0.113.0/24".parse().unwrap()]);
    let knock = Knock::new(&clients[0], NOW);
    for difference in 1..5 {
        let elsewhere = Knock::new(&clients[0], NOW).from("198.51.100.1").with_tag_off_by(difference);
        assert_eq!(server.receive(&elsewhere, NOW), REFUSED(Reason::SourceNotAllowed));
        let token = clients[0].key.seal(NOW, 22, Binding::Unbound);
        let other_port = knock.syn(20_000, token.sequence, token.tsval ^ difference);
        assert_eq!(server.receive(&other_port, NOW), REFUSED(Reason::WrongKnockPort));
    }
    server.receive(&knock.packet(), NOW).grant();
}

/// Sends a knock that is refused so, and then copies of it from anywhere: before and after a restart.
fn is_spent(server: &mut Server, refused: &[u8], reason: Reason, copies: &[Vec<u8>], now: u64) {
    assert_eq!(server.receive(refused, now), REFUSED(reason));
    let is_taken = |server: &mut Server, copy: &[u8]| match server.receive(copy, now) {
        End::Refused(Reason::Replayed) => true,
        End::Refused(other) => other == reason,
        other => panic!("{reason}: {other:?}"),
    };
    assert!(copies.iter().all(|copy| is_taken(server, copy)), "{reason}");
    server.restart(now);
    assert!(copies.iter().all(|copy| is_taken(server, copy)), "{reason}, after a restart");
}

#[test]
fn a_knock_whose_tag_holds_is_spent_for_good_whatever_it_is_refused_for() {
    for [home, elsewhere] in [["203.0.113.9", "203.0.113.10"], ["2001:db8::9", "2001:db8::10"]] {
        let networks = ["203.0.113.0/24", "2001:db8::/32", "fe80::/10"].map(|network| network.parse().unwrap());
        let server = || world(1, |_, user| user.from = networks.to_vec());
        let outside = if home.contains(':') { "2001:db9::1" } else { "198.51.100.1" };
        let (_, clients) = server();
        let knock = |n| Knock::new(&clients[0], n);
        let copies = |n| [home, elsewhere].map(|source| knock(n).from(source).packet()).to_vec();

        is_spent(&mut server().0, &knock(NOW).from(outside).packet(), Reason::SourceNotAllowed, &copies(NOW), NOW);
        is_spent(&mut server().0, &knock(NOW).from("fe80::9").packet(), Reason::LinkLocal, &copies(NOW), NOW);
        let token = clients[0].key.seal(NOW, 22, Binding::Unbound);
        let other_port = knock(NOW).from(home).syn(1, token.sequence, token.tsval);
        is_spent(&mut server().0, &other_port, Reason::WrongKnockPort, &copies(NOW), NOW);

        let (mut exhausted, _) = server();
        for difference in 1..=3 {
            exhausted.receive(&knock(NOW).from(elsewhere).with_tag_off_by(difference), NOW);
        }
        let refused = knock(NOW).from(home).packet();
        is_spent(&mut exhausted, &refused, Reason::Exhausted, &copies(NOW), NOW);

        let (mut narrowed, _) = server();
        (NOW - 25..NOW).for_each(|n| drop(narrowed.receive(&knock(n).with_tag_off_by(1), NOW)));
        let refused = knock(NOW + 20).from(home).packet();
        is_spent(&mut narrowed, &refused, Reason::Narrowed, &copies(NOW + 20), NOW);

        let (mut early, _) = server();
        let n = NOW + WINDOW + 1;
        let refused = knock(n).from(home).packet();
        assert_eq!(early.receive(&refused, NOW), REFUSED(Reason::OutsideWindow));
        assert_eq!(early.receive(&knock(n).from(elsewhere).packet(), NOW + 1), REFUSED(Reason::Replayed));

        let (mut poor, _) = server();
        poor.reload(NOW, |registry| registry.grants_per_minute = 1);
        poor.receive(&knock(NOW - 1).from(home).packet(), NOW).grant();
        is_spent(&mut poor, &knock(NOW).from(home).packet(), Reason::OverRate, &copies(NOW), NOW);
    }
}

#[test]
fn only_what_a_key_has_made_causes_a_write_and_each_counter_of_it_one() {
    let (mut server, clients) = world(1, |_, user| user.from = vec!["203.0.113.0/24".parse().unwrap()]);
    let mut writes = 0;
    for difference in 0..50 {
        let token = clients[0].key.seal(NOW, 22, Binding::Unbound);
        for source in ["203.0.113.9", "198.51.100.1", "fe80::9"] {
            let knock = || Knock::new(&clients[0], NOW).from(source);
            let to_other_port = knock().syn(1, token.sequence, token.tsval ^ difference);
            for packet in [knock().with_tag_off_by(difference), to_other_port] {
                server.verifier.advance(NOW, usize::MAX);
                writes += usize::from(server.claim(&packet, NOW).is_ok());
            }
        }
        assert_eq!(writes, 1, "the first is the only one whose tag holds");
    }
}

#[test]
fn a_copy_of_what_was_refused_withdraws_nothing_and_a_copy_that_is_refused_does_not_either() {
    for [home, elsewhere, outside] in
        [["203.0.113.9", "203.0.113.10", "198.51.100.1"], ["2001:db8::9", "2001:db8::10", "2001:db9::1"]]
    {
        let networks = ["203.0.113.0/24", "2001:db8::/32"].map(|network| network.parse().unwrap());
        let (mut server, clients) = world(1, |_, user| user.from = networks.to_vec());
        let knock = |n| Knock::new(&clients[0], n);
        server.receive(&knock(NOW).from(outside).packet(), NOW);
        assert_eq!(server.receive(&knock(NOW).from(home).packet(), NOW), REFUSED(Reason::Replayed));
        server.receive(&knock(NOW + 1).from(home).packet(), NOW).grant();
        let copy = server.receive(&knock(NOW + 1).from(outside).packet(), NOW);
        assert_eq!(copy, REFUSED(Reason::SourceNotAllowed));
        let copy = server.receive(&knock(NOW + 1).from(elsewhere).packet(), NOW);
        assert!(matches!(copy, End::Withdrawn { .. }), "{copy:?}");
    }
}

#[test]
fn a_withdrawal_means_the_token_that_was_copied_and_no_other() {
    let (mut server, clients) = world(2, |_, _| {});
    let mut numbers = Vec::new();
    for n in NOW..NOW + 3 {
        numbers.push(server.receive(&Knock::new(&clients[0], n).packet(), NOW).grant().token);
    }
    let copy = Knock::new(&clients[0], NOW + 1).from("198.51.100.1").packet();
    let Decision::Withdrawn(withdrawal) = server.verifier.handle(&copy, NOW) else { panic!("not withdrawn") };
    assert_eq!((withdrawal.user.as_str(), withdrawal.service.unwrap().as_str()), ("u0", "ssh"));
    assert_eq!(numbers.iter().position(|number| *number == withdrawal.token), Some(1));
    assert_eq!(numbers.iter().filter(|number| **number == withdrawal.token).count(), 1);
}

#[test]
fn no_door_opens_for_an_ipv6_link_local_source() {
    for (source, is_refused) in [
        ("fe80::1", true),
        ("febf:ffff::1", true),
        ("fec0::1", false),
        ("fe7f::1", false),
        ("fd00::1", false),
        ("169.254.1.1", false),
    ] {
        let (mut server, clients) = world(1, |_, _| {});
        let end = server.receive(&Knock::new(&clients[0], NOW).bound_to(source).from(source).packet(), NOW);
        assert_eq!(end == REFUSED(Reason::LinkLocal), is_refused, "{source}: {end:?}");
        assert_eq!(matches!(end, End::Granted(_)), !is_refused, "{source}: {end:?}");
    }
}

#[test]
fn a_user_with_many_ports_leaves_the_others_their_share_of_the_rate() {
    let (mut server, clients) = world(2, |_, _| {});
    server.reload(NOW, |registry| {
        registry.grants_per_minute = 100;
        registry.services[0].ports = (1..=20).map(|port| format!("tcp/{port}").parse().unwrap()).collect();
    });
    let mut ends: Vec<End> =
        (NOW - 50..NOW).map(|n| server.receive(&Knock::new(&clients[0], n).packet(), NOW)).collect();
    let refused = ends.split_off(2);
    assert!(ends.into_iter().all(|end| end.grant().ports.len() == 20), "whole");
    assert!(refused.into_iter().all(|end| end == REFUSED(Reason::OverRate)), "or not at all");
    assert_eq!(server.receive(&Knock::new(&clients[1], NOW).packet(), NOW).grant().ports.len(), 20);
    server.receive(&Knock::new(&clients[0], NOW + 120).packet(), NOW + 120).grant();
}

#[test]
fn a_service_that_the_user_may_not_open_is_not_even_looked_up() {
    let (mut server, clients) = world(1, |_, _| {});
    assert_eq!(server.receive(&Knock::new(&clients[0], NOW).port(25).packet(), NOW), REFUSED(Reason::Unknown));
}

#[test]
fn an_expired_user_spends_the_counter_and_gets_nothing() {
    let (mut server, clients) = world(1, |_, user| user.expires = Some(NOW + 10));
    server.receive(&Knock::new(&clients[0], NOW).packet(), NOW).grant();
    let late = Knock::new(&clients[0], NOW + 10).packet();
    assert_eq!(server.receive(&late, NOW + 10), REFUSED(Reason::Expired));
    assert_eq!(server.receive(&late, NOW + 10), REFUSED(Reason::Replayed));
}

#[test]
fn without_a_durable_counter_nothing_opens_and_the_counter_stays_taken() {
    let (mut server, clients) = world(1, |_, _| {});
    server.log.is_full = true;
    let packet = Knock::new(&clients[0], NOW).packet();
    assert_eq!(server.receive(&packet, NOW), REFUSED(Reason::NotDurable));
    server.log.is_full = false;
    assert_eq!(server.receive(&packet, NOW), REFUSED(Reason::Replayed));
    server.receive(&Knock::new(&clients[0], NOW + 1).packet(), NOW).grant();
}

#[test]
fn the_third_wrong_tag_withdraws_the_counter_and_no_other() {
    let (mut server, clients) = world(2, |_, _| {});
    let knock = Knock::new(&clients[0], NOW);
    for difference in [1, 2] {
        assert_eq!(server.receive(&knock.with_tag_off_by(difference), NOW), REFUSED(Reason::WrongTag));
    }
    server.receive(&Knock::new(&clients[0], NOW - 1).packet(), NOW).grant();
    assert_eq!(server.receive(&knock.with_tag_off_by(3), NOW), REFUSED(Reason::WrongTag));
    assert_eq!(server.receive(&knock.packet(), NOW), REFUSED(Reason::Exhausted));
    server.receive(&Knock::new(&clients[0], NOW + 1).packet(), NOW).grant();
    server.receive(&Knock::new(&clients[1], NOW).packet(), NOW).grant();
}

#[test]
fn wrong_tags_for_spent_counters_are_no_tries() {
    let (mut server, clients) = world(2, |_, _| {});
    server.receive(&Knock::new(&clients[0], NOW).packet(), NOW).grant();
    for difference in 1..100 {
        let packet = Knock::new(&clients[0], NOW).with_tag_off_by(difference);
        assert_eq!(server.receive(&packet, NOW), REFUSED(Reason::WrongTag));
    }
    assert_eq!(server.verifier.narrowed(NOW).next(), None, "a copied knock cannot narrow its user's window");
}

#[test]
fn many_wrong_tags_narrow_the_window_of_their_key_for_a_minute_and_of_no_other() {
    let (mut server, clients) = world(2, |_, _| {});
    let narrowed = |server: &Server, now| server.verifier.narrowed(now).map(Name::to_string).collect::<Vec<_>>();
    for n in NOW..NOW + 21 {
        assert!(narrowed(&server, NOW).is_empty());
        server.receive(&Knock::new(&clients[0], n).with_tag_off_by(1), NOW);
    }
    assert_eq!(narrowed(&server, NOW), ["u0"]);
    server.reload(NOW, |registry| registry.users.swap(0, 1));
    server.verifier.forget(NOW);
    assert_eq!(narrowed(&server, NOW), ["u0"]);
    for off in [NOW - 20, NOW + 20] {
        server.receive(&Knock::new(&clients[1], off).packet(), NOW).grant();
    }
    assert_eq!(server.receive(&Knock::new(&clients[0], NOW - 6).packet(), NOW), REFUSED(Reason::Narrowed));
    server.receive(&Knock::new(&clients[0], NOW - 5).packet(), NOW).grant();
    server.receive(&Knock::new(&clients[0], NOW + 5).packet(), NOW).grant();
    assert_eq!(server.receive(&Knock::new(&clients[0], NOW + 6).packet(), NOW), REFUSED(Reason::Narrowed));
    assert!(narrowed(&server, NOW + 60).is_empty());
    server.receive(&Knock::new(&clients[0], NOW + 60 + 30).packet(), NOW + 60).grant();
}

#[test]
fn a_knock_is_understood_after_the_clock_jumped_and_spent_ones_stay_spent() {
    let (mut server, clients) = world(1, |_, _| {});
    let spent = Knock::new(&clients[0], NOW).packet();
    server.receive(&spent, NOW).grant();
    for jump in [NOW + 3600, NOW - 3600, NOW] {
        let end = server.receive(&spent, jump);
        assert!(matches!(end, End::Refused(Reason::Unknown | Reason::Replayed)), "{end:?}");
    }
    let earlier = Knock::new(&clients[0], NOW - 3600).packet();
    assert_eq!(server.receive(&earlier, NOW - 3600), REFUSED(Reason::Superseded));
    server.receive(&Knock::new(&clients[0], NOW + 3600).packet(), NOW + 3600).grant();
}

#[test]
fn the_index_holds_every_knock_of_the_window_while_the_clock_ticks() {
    let (mut server, clients) = world(4, |_, _| {});
    for now in NOW..NOW + 200 {
        for (client, ahead) in clients.iter().zip([0, WINDOW, WINDOW + 30, 2 * WINDOW]) {
            server.receive(&Knock::new(client, now + ahead - WINDOW).packet(), now).grant();
        }
    }
    let seconds = 2 * WINDOW + 1 + 2;
    let expected = usize::try_from(seconds).unwrap() * 4 * 2;
    assert!(server.verifier.live() <= expected, "{} knocks live, {expected} expected at most", server.verifier.live());
    server.verifier.forget(NOW + 200);
}

#[test]
fn an_unbound_token_is_withdrawn_also_after_a_clock_jump() {
    let (mut server, clients) = world(1, |_, _| {});
    let knock = || Knock::new(&clients[0], NOW);
    server.receive(&knock().packet(), NOW).grant();
    server.verifier.advance(NOW + 20, usize::MAX);
    server.verifier.advance(NOW - 20, usize::MAX);
    let end = server.receive(&knock().from("198.51.100.1").packet(), NOW);
    assert!(matches!(end, End::Withdrawn { .. }), "{end:?}");
}

#[test]
fn an_advance_in_slices_ends_where_one_at_once_does() {
    let (mut at_once, _) = world(7, |_, _| {});
    while at_once.verifier.advance(NOW + 2, usize::MAX) {}
    let (mut in_slices, clients) = world(7, |_, _| {});
    let mut slices = 0;
    while in_slices.verifier.advance(NOW + 2, 3) {
        slices += 1;
    }
    assert!(slices > 5, "{slices}");
    assert_eq!(in_slices.verifier.live(), at_once.verifier.live());
    in_slices.receive(&Knock::new(&clients[6], NOW + 2 + WINDOW).packet(), NOW + 2).grant();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_packet_makes_the_verifier_panic_or_grant(bytes in proptest::collection::vec(any::<u8>(), 0..130)) {
        let (mut server, _) = world(1, |_, _| {});
        prop_assert!(matches!(server.receive(&bytes, NOW), End::Refused(_)));
    }

    #[test]
    fn what_is_sealed_opens_once(back in 0_u64..=WINDOW, ahead in 0_u64..=WINDOW, v6 in any::<bool>(), bind in any::<bool>()) {
        let (mut server, clients) = world(2, |_, _| {});
        let source = if v6 { "2001:db8::9" } else { "203.0.113.9" };
        for (client, n) in [(0, NOW - back), (1, NOW + ahead)] {
            let knock = Knock::new(&clients[client], n).from(source);
            let packet = if bind { knock.bound_to(source) } else { knock }.packet();
            prop_assert!(matches!(server.receive(&packet, NOW), End::Granted(_)));
            prop_assert_eq!(server.receive(&packet, NOW), End::Refused(Reason::Replayed));
        }
    }
}
