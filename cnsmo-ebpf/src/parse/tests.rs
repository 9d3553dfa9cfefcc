use super::*;
use crate::frames::{FAMILIES, Ip, PEERS, V4, VM, chain, ethernet, every_kind, icmp, ipv6, udp};

fn v4(packet: &[u8]) -> Result<Datagram<[u8; 4]>, Reason> {
    let mut datagram = Datagram::default();
    <[u8; 4]>::parse(packet, 0, &mut datagram).map(|()| datagram)
}

fn v6(packet: &[u8]) -> Result<Datagram<[u8; 16]>, Reason> {
    let mut datagram = Datagram::default();
    <[u8; 16]>::parse(packet, 0, &mut datagram).map(|()| datagram)
}

/// Kind and ports, which both families have.
fn summary(ip: Ip, packet: &[u8]) -> Result<(Kind, u16, u16), Reason> {
    let [sport, dport, kind] = match ip {
        Ip::V4 => v4(packet).map(|d| (d.kind, d.sport, d.dport)),
        Ip::V6 => v6(packet).map(|d| (d.kind, d.sport, d.dport)),
    }
    .map(|(kind, sport, dport)| {
        [u16::from_be_bytes(sport), u16::from_be_bytes(dport), kind as u16]
    })?;
    let kinds = [
        Kind::Tcp,
        Kind::Datagram,
        Kind::EchoRequest,
        Kind::EchoReply,
        Kind::IcmpError,
        Kind::Icmp,
        Kind::Later,
    ];
    Ok((kinds[usize::from(kind)], sport, dport))
}

#[test]
fn every_kind_is_told_apart() {
    for ip in FAMILIES {
        let kinds: Vec<_> = every_kind(ip).iter().map(|p| summary(ip, p).unwrap()).collect();
        assert_eq!(
            kinds[..10],
            [
                (Kind::Tcp, 4000, 80),
                (Kind::Datagram, 4000, 53),
                (Kind::Datagram, 0, 0),
                (Kind::Datagram, 0, 0),
                (Kind::EchoRequest, 9, 0),
                (Kind::EchoReply, 9, 0),
                (Kind::IcmpError, 0, 0),
                (Kind::Icmp, 0, 0),
                (Kind::Tcp, 1, 2),
                (Kind::Later, 0, 0),
            ],
            "{ip:?}"
        );
    }
}

#[test]
fn a_packet_cut_anywhere_is_malformed() {
    for ip in FAMILIES {
        for packet in every_kind(ip) {
            assert!(summary(ip, &packet).is_ok());
            for end in 0..packet.len() {
                let cut = summary(ip, &packet[..end]);
                assert_eq!(cut, Err(Reason::Malformed), "{ip:?} {packet:?} up to {end}");
            }
        }
    }
}

#[test]
fn a_packet_whose_length_ends_in_a_header_is_refused() {
    for ip in FAMILIES {
        // All but the protocol without a header of its own.
        for mut packet in every_kind(ip).into_iter().filter(|p| summary(ip, p).unwrap().1 != 0) {
            let (at, header) = if ip == Ip::V4 { (2, 20) } else { (4, 0) };
            for claimed in header + 1..header + 8 {
                packet[at..at + 2].copy_from_slice(&u16::to_be_bytes(claimed));
                let error = summary(ip, &packet).unwrap_err();
                assert!(matches!(error, Reason::Malformed | Reason::FragmentTiny), "{packet:?}");
            }
        }
    }
}

#[test]
fn padding_behind_the_packet_is_ignored() {
    for ip in FAMILIES {
        for packet in every_kind(ip) {
            let padded = [&packet[..], &[0xff; 30]].concat();
            assert_eq!(summary(ip, &padded), summary(ip, &packet));
        }
    }
}

#[test]
fn up_to_two_tags_are_looked_through() {
    let packet = every_kind(Ip::V4).remove(0);
    for (tags, at) in [(&[][..], 14), (&[0x8100], 18), (&[0x88a8, 0x8100], 22), (&[0x8100; 2], 22)]
    {
        for ip in FAMILIES {
            let ether_type = if ip == Ip::V4 { 0x0800 } else { 0x86dd };
            let tagged = ethernet(ether_type, tags, &packet);
            let seen = match frame::<_, 14>(&tagged[..]) {
                Ok(Carried::V4(at)) => (Ip::V4, at),
                Ok(Carried::V6(at)) => (Ip::V6, at),
                _ => panic!("{tags:?}"),
            };
            assert_eq!(seen, (ip, at));
            for end in 0..at {
                assert_eq!(frame::<_, 14>(&tagged[..end]).err(), Some(Reason::Malformed));
            }
        }
    }
    let three = ethernet(0x0800, &[0x8100; 3], &packet);
    assert_eq!(frame::<_, 14>(&three[..]).err(), Some(Reason::Malformed));
    assert!(matches!(frame::<_, 14>(&ethernet(0x0806, &[], &[])[..]), Ok(Carried::Arp)));
    assert!(matches!(frame::<_, 14>(&ethernet(0x88cc, &[], &[])[..]), Ok(Carried::NotIp)));
}

#[test]
fn a_tunnel_carries_ip_by_its_first_digit() {
    for version in 0..16 {
        let packet = [version << 4, 0];
        match (version, frame::<_, 0>(&packet[..])) {
            (4, Ok(Carried::V4(0))) | (6, Ok(Carried::V6(0))) => {}
            (4 | 6, _) | (_, Ok(Carried::V4(_) | Carried::V6(_) | Carried::Arp) | Err(_)) => {
                panic!("version {version}")
            }
            (_, Ok(Carried::NotIp)) => {}
        }
    }
    assert_eq!(frame::<_, 0>(&[0x45][..]).err(), Some(Reason::Malformed));
}

#[test]
fn ipv4_headers_of_every_length() {
    for words in 0..16 {
        let options = vec![1; 40];
        let mut packet = V4 { options, proto: UDP, ..V4::default() }.carrying(&udp(7, 8));
        packet[0] = 0x40 | words;
        let result = v4(&packet).map(|d| d.l4);
        if words < 5 {
            assert_eq!(result, Err(Reason::Malformed), "{words}");
        } else {
            assert_eq!(result, Ok(usize::from(words) * 4));
        }
    }
}

#[test]
fn total_length_is_not_believed() {
    let good = every_kind(Ip::V4).remove(0);
    let claim = |total: u16| {
        let mut packet = good.clone();
        packet[2..4].copy_from_slice(&total.to_be_bytes());
        v4(&packet).map(|d| d.kind)
    };
    assert_eq!(claim(good.len() as u16), Ok(Kind::Tcp));
    // A super-packet of this machine.
    assert_eq!(claim(0), Ok(Kind::Tcp));
    for total in [1, 19, 20, 39, 41, u16::MAX] {
        assert_eq!(claim(total), Err(Reason::Malformed), "{total}");
    }
}

#[test]
fn the_version_must_agree_with_the_ethertype() {
    for version in 0..16 {
        let (mut four, mut six) = (every_kind(Ip::V4).remove(0), every_kind(Ip::V6).remove(0));
        four[0] = version << 4 | 5;
        six[0] = version << 4;
        assert_eq!(v4(&four).is_ok(), version == 4);
        assert_eq!(v6(&six).is_ok(), version == 6);
    }
}

/// All orders of `items`.
fn orders(items: &[u8]) -> Vec<Vec<u8>> {
    if items.is_empty() {
        return vec![vec![]];
    }
    let mut all = Vec::new();
    for n in 0..items.len() {
        let mut rest = items.to_vec();
        let first = rest.remove(n);
        all.extend(orders(&rest).into_iter().map(|order| [&[first][..], &order].concat()));
    }
    all
}

#[test]
fn extension_headers_are_followed_in_every_order() {
    let headers = [HOP_BY_HOP, DESTINATION, ROUTING, FRAGMENT, AUTHENTICATION];
    for order in orders(&headers) {
        for length in 0..=order.len() {
            let order = &order[..length];
            let first = order.first().copied().unwrap_or(UDP);
            let packet = ipv6(PEERS[0], VM, first, 64, &chain(order, UDP, &udp(7, 8)));
            let datagram = v6(&packet).unwrap();
            assert_eq!((datagram.proto, datagram.sport), (UDP, [0, 7]), "{order:?}");
            assert_eq!(datagram.l4, packet.len() - 12);
            assert!(!datagram.fragmented, "an atomic fragment is whole");
        }
    }
}

#[test]
fn too_many_extension_headers_are_refused() {
    let packet = |n| ipv6(1, 2, 60, 64, &chain(&vec![60; n], UDP, &udp(7, 8)));
    assert_eq!(v6(&packet(6)).map(|d| d.proto), Ok(UDP));
    for n in 7..12 {
        assert_eq!(v6(&packet(n)).err(), Some(Reason::ExtensionHeaders), "{n}");
    }
}

#[test]
fn routing_header_type_0_is_refused_wherever_it_is() {
    for before in 0..3 {
        let headers = [&vec![60; before][..], &[43]].concat();
        let mut payload = chain(&headers, UDP, &udp(7, 8));
        let kind = before * 16 + 2;
        let packet = |payload: &[u8]| ipv6(1, 2, headers[0], 64, payload);
        assert!(v6(&packet(&payload)).is_ok());
        payload[kind] = 0;
        assert_eq!(v6(&packet(&payload)).err(), Some(Reason::ExtensionHeaders));
    }
}

#[test]
fn an_extension_header_longer_than_the_packet_is_malformed() {
    for header in [0, 43, 51, 60] {
        let mut payload = chain(&[header], UDP, &udp(7, 8));
        payload[1] = 255;
        assert_eq!(v6(&ipv6(1, 2, header, 64, &payload)).err(), Some(Reason::Malformed));
    }
}

#[test]
fn fragments() {
    let ends = (PEERS[0], VM);
    for ip in FAMILIES {
        let kind = |proto, at, payload: &[u8]| {
            summary(ip, &ip.fragment(ends, proto, at, payload)).map(|(kind, ..)| kind)
        };
        let segment = crate::frames::tcp(1, 2, 2);
        assert_eq!(kind(TCP, (0, true), &segment), Ok(Kind::Tcp));
        assert_eq!(kind(TCP, (0, false), &segment), Ok(Kind::Tcp));
        for length in 0..20 {
            let tiny = kind(TCP, (0, true), &segment[..length]);
            assert_eq!(tiny, Err(Reason::FragmentTiny), "TCP {length}");
        }
        for (proto, needed) in [(UDP, 8), (132, 12), (ip.icmp(), 8)] {
            for length in 0..needed {
                assert_eq!(kind(proto, (0, true), &vec![0; length]), Err(Reason::FragmentTiny));
            }
        }
        assert_eq!(kind(TCP, (1, true), &segment), Err(Reason::FragmentTiny), "on the flags");
        assert_eq!(kind(TCP, (1, false), &segment), Err(Reason::FragmentTiny));
        for (proto, offset) in [(TCP, 2), (UDP, 1), (ip.icmp(), 1), (TCP, 0x1fff)] {
            assert_eq!(kind(proto, (offset, true), &[]), Ok(Kind::Later), "{proto} {offset}");
        }
    }
}

#[test]
fn headers_behind_extension_headers_are_not_overwritten() {
    let later = |offset| Ip::V6.fragment((1, 2), DESTINATION, (offset, true), &[0; 8]);
    for offset in 1..CHAIN_END {
        assert_eq!(v6(&later(offset)).err(), Some(Reason::FragmentTiny), "{offset}");
    }
    assert_eq!(v6(&later(CHAIN_END)).map(|d| d.kind), Ok(Kind::Later));
}

#[test]
fn icmp_belongs_to_its_family() {
    let request = icmp([8, 0], 9, &[]);
    let foreign = Ip::V6.packet(1, 2, ICMP, &request);
    assert_eq!(summary(Ip::V6, &foreign), Ok((Kind::Datagram, 0, 0)));
    let solicitation = Ip::V4.packet(1, 2, ICMPV6, &icmp([135, 0], 0, &[0; 16]));
    assert_eq!(summary(Ip::V4, &solicitation), Ok((Kind::Datagram, 0, 0)));
}

#[test]
fn tcp_flags_of_every_combination() {
    let (fin, syn, rst, ack) = (tcp::FIN, tcp::SYN, tcp::RST, tcp::ACK);
    let sane = [syn, syn | ack, rst, rst | ack, fin | ack, ack];
    // PSH and URG, and the two of ECN, say nothing.
    for flags in 0..=u8::MAX {
        for ip in FAMILIES {
            let result = summary(ip, &ip.tcp((1, 1), (2, 2), flags)).map(|(kind, ..)| kind);
            let expected = if sane.contains(&(flags & (fin | syn | rst | ack))) {
                Ok(Kind::Tcp)
            } else {
                Err(Reason::TcpFlags)
            };
            assert_eq!(result, expected, "{flags:08b}");
        }
    }
}

#[test]
fn tcp_header_length_is_not_believed() {
    for words in 0..16 {
        for ip in FAMILIES {
            let mut packet = ip.tcp((1, 1), (2, 2), tcp::SYN);
            let at = packet.len() - 20 + 12;
            packet[at] = words << 4;
            assert_eq!(summary(ip, &packet).is_ok(), words == 5, "{words}");
        }
    }
}

#[test]
fn quoted_packets_are_read_as_far_as_their_ports() {
    for ip in FAMILIES {
        let ports = |quoted: &[u8]| match ip {
            Ip::V4 => <[u8; 4]>::quoted(quoted, 0).map(|q| (q.kind, q.sport, q.dport)),
            Ip::V6 => <[u8; 16]>::quoted(quoted, 0).map(|q| (q.kind, q.sport, q.dport)),
        };
        let segment = ip.tcp((1, 4000), (2, 80), tcp::SYN);
        let l4 = segment.len() - 20;
        for end in 0..segment.len() {
            let seen = ports(&segment[..end]);
            let whole = Some((Kind::Tcp, [0x0f, 0xa0], [0, 80]));
            assert_eq!(seen, if end < l4 + 4 { None } else { whole }, "{end}");
        }
        let request = ip.echo_request(1, 2, 9);
        assert_eq!(ports(&request), Some((Kind::EchoRequest, [0, 9], [0, 0])));
        assert_eq!(ports(&ip.error(1, 2, &request)), None, "an error about an error");
        let later = ip.fragment((1, 2), UDP, (3, false), &[0; 16]);
        assert_eq!(ports(&later), None, "a later fragment has no ports");
    }
}
