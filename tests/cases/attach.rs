//! Hooks on devices of several kinds, and what stays and goes with them.

use std::{
    fs::{File, OpenOptions},
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr},
    os::fd::AsRawFd as _,
    path::Path,
};

use cnsmo_agent::datapath::{
    Attachment, Datapath as _,
    kernel::{Kernel, Options, XdpChoice},
};
use cnsmo_tests::Netns;

use super::lab::{Lab, PATIENCE, PEER4, SILENCE, VM4, allow_in, arrives, deny_in, udp};

fn attachment(interface: &str, ingress: &'static str) -> Vec<Attachment> {
    vec![Attachment { interface: interface.into(), ingress, egress: "tcx" }]
}

fn pins(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Guards with port 80 open and looks at who is heard.
fn judges(lab: &Lab, xdp: XdpChoice, expected: &[Attachment]) {
    let (open, shut) = (lab.udp(&lab.vm, VM4, 80), lab.udp(&lab.vm, VM4, 81));
    assert!(lab.hears(&shut, PEER4), "before there is a policy");
    let mut kernel = lab.open_with(Options { xdp, ..lab.options() }).unwrap();
    assert!(lab.hears(&shut, PEER4), "opened, not attached");
    lab.apply(&mut kernel, &deny_in(vec![allow_in("open", udp(80))]));
    assert_eq!(kernel.status().interfaces, expected);
    assert!(lab.hears(&open, PEER4));
    assert!(!lab.hears(&shut, PEER4));
}

#[test]
fn auto_takes_native_xdp_on_veth_and_detach_removes_all_of_it() {
    let lab = Lab::new("att-auto");
    judges(&lab, XdpChoice::Auto, &attachment("eth0", "xdp-native"));
    let shut = lab.udp(&lab.vm, VM4, 82);
    assert!(!lab.hears(&shut, PEER4), "the links hold without an agent");
    Kernel::detach(lab.pins.path()).unwrap();
    assert!(!lab.pins.path().exists());
    assert!(lab.hears(&shut, PEER4));
}

#[test]
fn detach_is_complete_while_the_data_path_is_still_open() {
    let lab = Lab::new("att-open");
    let _kernel = lab.guard(&deny_in(vec![]));
    let shut = lab.udp(&lab.vm, VM4, 80);
    assert!(!lab.hears(&shut, PEER4));
    Kernel::detach(lab.pins.path()).unwrap();
    assert!(lab.hears(&shut, PEER4));
}

#[test]
fn off_takes_tcx_and_another_choice_replaces_it() {
    let lab = Lab::new("att-off");
    judges(&lab, XdpChoice::Off, &attachment("eth0", "tcx"));
    let options = Options { xdp: XdpChoice::Native, ..lab.options() };
    let mut kernel = lab.open_with(options).unwrap();
    lab.apply(&mut kernel, &deny_in(vec![allow_in("open", udp(80))]));
    assert_eq!(kernel.status().interfaces, attachment("eth0", "xdp-native"));
    let mut links = pins(&lab.pins.path().join("links"));
    links.sort();
    assert_eq!(links, ["eth0@tcx-egress", "eth0@xdp-native"], "the old hook is gone");
}

#[test]
fn generic_xdp_judges() {
    let lab = Lab::new("att-gen");
    judges(&lab, XdpChoice::Generic, &attachment("eth0", "xdp-generic"));
}

#[test]
fn a_device_may_have_a_dot_in_its_name() {
    let lab = Lab::with_device("att-dot", "eth0.7");
    judges(&lab, XdpChoice::Auto, &attachment("eth0.7", "xdp-native"));
    let shut = lab.udp(&lab.vm, VM4, 82);
    let mut kernel = lab.guard(&deny_in(vec![]));
    assert_eq!(kernel.status().interfaces, attachment("eth0.7", "xdp-native"));
    assert!(!lab.hears(&shut, PEER4), "adopted");
    Kernel::detach(lab.pins.path()).unwrap();
    assert!(lab.hears(&shut, PEER4));
}

#[test]
fn a_missing_device_is_named_and_no_hook_stays() {
    let lab = Lab::new("att-none");
    let interfaces = vec!["eth0".to_owned(), "nosuch0".to_owned()];
    let mut kernel = lab.open_with(Options { interfaces, ..lab.options() }).unwrap();
    let error = lab.try_apply(&mut kernel, &deny_in(vec![])).unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("nosuch0"), "{cause}");
    assert_eq!(kernel.status().interfaces, []);
    assert_eq!(pins(&lab.pins.path().join("links")), [""; 0]);
    let socket = lab.udp(&lab.vm, VM4, 80);
    assert!(lab.hears(&socket, PEER4), "eth0 is not guarded by halves");
}

#[test]
fn a_device_made_anew_is_guarded_again() {
    let lab = Lab::new("att-anew");
    let mut kernel = lab.guard(&deny_in(vec![allow_in("open", udp(80))]));
    for round in 0..2 {
        lab.vm.ip(&["link", "del", "eth0"]).unwrap();
        lab.vm.run(|| kernel.sweep()).unwrap();
        lab.plug();
        if round == 0 {
            lab.vm.run(|| kernel.sweep()).unwrap();
        } else {
            drop(kernel);
            kernel = lab.guard(&deny_in(vec![allow_in("open", udp(80))]));
        }
        assert_eq!(kernel.status().interfaces, attachment("eth0", "xdp-native"));
        let (open, shut) = (lab.udp(&lab.vm, VM4, 80), lab.udp(&lab.vm, VM4, 81));
        assert!(lab.hears(&open, PEER4), "round {round}");
        assert!(!lab.hears(&shut, PEER4), "round {round}");
    }
}

/// Makes `tun0` and returns its user side.
fn tun(netns: &Netns) -> File {
    let open = || {
        let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
        // `struct ifreq`: name, then flags.
        let mut request = [0u8; 40];
        request[..4].copy_from_slice(b"tun0");
        let flags = (libc::IFF_TUN | libc::IFF_NO_PI) as i16;
        request[16..18].copy_from_slice(&flags.to_ne_bytes());
        // SAFETY: the request is as long as a `struct ifreq` and outlives the call.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        file
    };
    let file = netns.run(open).unwrap();
    netns.ip(&["addr", "add", "10.9.0.1/24", "dev", "tun0"]).unwrap();
    netns.ip(&["link", "set", "tun0", "up"]).unwrap();
    file
}

/// An IPv4 packet with a UDP datagram from 10.9.0.2:9 to 10.9.0.1.
fn packet(port: u16) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1];
    let sum: u32 =
        packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend([0, 9]);
    packet.extend(port.to_be_bytes());
    packet.extend([0, 12, 0, 0]);
    packet.extend(b"ping");
    packet
}

#[test]
fn a_tunnel_has_its_own_programs() {
    let lab = Lab::new("att-tun");
    let mut device = tun(&lab.vm);
    let options = Options { interfaces: vec!["tun0".into()], ..lab.options() };
    let mut kernel = lab.open_with(options).unwrap();
    let here = IpAddr::V4(Ipv4Addr::new(10, 9, 0, 1));
    let (open, shut) = (lab.udp(&lab.vm, here, 80), lab.udp(&lab.vm, here, 81));
    device.write_all(&packet(81)).unwrap();
    assert!(arrives(&shut), "before there is a policy");

    lab.apply(&mut kernel, &deny_in(vec![allow_in("open", udp(80))]));
    assert_eq!(kernel.status().interfaces, attachment("tun0", "tcx"));
    device.write_all(&packet(80)).unwrap();
    assert!(arrives(&open));
    device.write_all(&packet(81)).unwrap();
    assert!(!arrives(&shut));

    open.send_to(b"pong", "10.9.0.2:9").unwrap();
    let reader = std::thread::spawn(move || {
        let mut out = [0; 128];
        loop {
            // Reports of multicast listeners and the like come before.
            let length = device.read(&mut out).unwrap();
            if out[..length].ends_with(b"pong") {
                return out[..length].to_vec();
            }
        }
    });
    let end = std::time::Instant::now() + PATIENCE;
    while !reader.is_finished() {
        assert!(std::time::Instant::now() < end, "nothing left the tunnel");
        cnsmo_tests::pause(SILENCE / 10);
    }
    assert_eq!(&reader.join().unwrap()[20..24], [0, 80, 0, 9]);
}
