//! Facts about this VM.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr, UdpSocket},
    path::Path,
};

use cnsmo_proto::model::{NAME_BYTES_MAX, Name};
use nix::{ifaddrs::getifaddrs, net::if_::InterfaceFlags};

use crate::tunnel;

/// Addresses that are reported. More say nothing new and would bloat each report.
const ADDRESSES_MAX: usize = 256;

/// The host name made a valid name: the part before the first dot, other characters replaced; `None` if nothing is left.
pub fn host_name() -> Option<Name> {
    name_of_host(&fs::read_to_string("/proc/sys/kernel/hostname").ok()?)
}

/// Release of the running kernel.
pub fn kernel_release() -> String {
    proc_line("/proc/sys/kernel/osrelease")
}

/// Tells a restart of the agent from a reboot of the VM.
pub fn boot_id() -> String {
    proc_line("/proc/sys/kernel/random/boot_id")
}

/// Addresses where this VM can be reached outside of its tunnel, the one that packets to `core` leave from first: no
/// loopback, no link-local ones.
pub fn addresses(core: Option<SocketAddr>) -> Vec<IpAddr> {
    let Ok(all) = getifaddrs() else { return Vec::new() };
    let outside = all.filter(|interface| interface.interface_name != tunnel::DEVICE);
    let addresses = outside.filter_map(|interface| {
        let address = interface.address?;
        if let Some(v4) = address.as_sockaddr_in() {
            return Some(IpAddr::V4(v4.ip()));
        }
        address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip()))
    });
    let reachable: BTreeSet<_> = addresses
        .filter(|address| match address {
            IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
            IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
        })
        .collect();
    let towards_core = core.and_then(source_towards);
    let mut sorted: Vec<_> = reachable.into_iter().collect();
    sorted.sort_by_key(|address| Some(*address) != towards_core);
    sorted.truncate(ADDRESSES_MAX);
    sorted
}

/// The address that the kernel's routes choose for packets to `there`. Sends none.
fn source_towards(there: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = match there {
        SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(there).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// Network devices that packets of other machines come in by: up, Ethernet-like, and not built on top of another device
/// that is guarded already.
pub fn outer_interfaces() -> nix::Result<Vec<String>> {
    let mut names = BTreeSet::new();
    for interface in getifaddrs()? {
        let name = interface.interface_name;
        let device = Path::new("/sys/class/net").join(&name);
        // The tunnel is guarded when it is there, and in another way.
        if name == tunnel::DEVICE {
            continue;
        }
        if is_ethernet_like(interface.flags) && (is_hardware(&device) || !is_stacked(&device)) {
            names.insert(name);
        }
    }
    Ok(names.into_iter().collect())
}

/// Up, and with link-layer addresses: leaves out loopback, tunnels, dummies.
fn is_ethernet_like(flags: InterfaceFlags) -> bool {
    flags.contains(InterfaceFlags::IFF_UP | InterfaceFlags::IFF_BROADCAST)
        && !flags.intersects(
            InterfaceFlags::IFF_LOOPBACK
                | InterfaceFlags::IFF_POINTOPOINT
                | InterfaceFlags::IFF_NOARP,
        )
}

fn is_hardware(device: &Path) -> bool {
    device.join("device").exists()
}

/// A bridge, a port of one, a tap device, a VLAN or the like.
fn is_stacked(device: &Path) -> bool {
    let has_lower = || {
        let entries = fs::read_dir(device).into_iter().flatten().flatten();
        entries.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with("lower_"))
    };
    ["bridge", "brport", "tun_flags"].iter().any(|part| device.join(part).exists()) || has_lower()
}

fn proc_line(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn name_of_host(host: &str) -> Option<Name> {
    let first = host.trim().split('.').next().unwrap_or_default();
    let replaced: String = first
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
        .take(NAME_BYTES_MAX)
        .collect();
    Name::new(replaced.trim_matches('-')).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_names_become_names() {
        for (host, name) in [
            ("web-1\n", Some("web-1")),
            ("Web_1.example.org", Some("web-1")),
            ("-x-", Some("x")),
            ("...", None),
            ("", None),
        ] {
            assert_eq!(name_of_host(host).as_ref().map(Name::as_str), name, "{host:?}");
        }
        assert_eq!(name_of_host(&"x".repeat(100)).unwrap().as_str().len(), NAME_BYTES_MAX);
    }

    #[test]
    fn the_kernel_is_asked() {
        assert!(!kernel_release().is_empty());
        assert_eq!(boot_id().len(), 36);
    }

    #[test]
    fn loopback_is_no_outer_interface_and_no_address() {
        assert!(!outer_interfaces().unwrap().contains(&"lo".to_owned()));
        assert!(!addresses(None).iter().any(IpAddr::is_loopback));
    }

    #[test]
    fn the_address_towards_the_core_is_the_first() {
        for address in addresses(None) {
            let core = SocketAddr::new(address, 7400);
            // A VM talks to itself from the very address it talks to.
            assert_eq!(addresses(Some(core)).first(), Some(&address));
        }
        let loopback: IpAddr = [127, 0, 0, 1].into();
        assert_eq!(source_towards(SocketAddr::new(loopback, 7400)), Some(loopback));
    }

    #[test]
    fn flags_leave_tunnels_and_dummies_out() {
        let up = InterfaceFlags::IFF_UP | InterfaceFlags::IFF_BROADCAST;
        assert!(is_ethernet_like(up));
        assert!(!is_ethernet_like(InterfaceFlags::IFF_BROADCAST));
        for no in [
            InterfaceFlags::IFF_LOOPBACK,
            InterfaceFlags::IFF_POINTOPOINT,
            InterfaceFlags::IFF_NOARP,
        ] {
            assert!(!is_ethernet_like(up | no));
        }
    }
}
