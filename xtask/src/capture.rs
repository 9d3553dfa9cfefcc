//! What is seen on the wires between the hosts: tcpdump on the router, and a reader of what it wrote.

use std::{
    fs::{self, File},
    io::{self, BufReader},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};

use crate::{
    netns::Netns,
    process::{Process, pause},
};

const START_LIMIT: Duration = Duration::from_secs(20);
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// The kernel hands over what it has every second; what it has when tcpdump ends is lost. (The immediate mode would reserve
/// a largest packet's place for each.)
const HAND_OVER: Duration = Duration::from_millis(1500);
/// In KiB. Its being too small is noticed: tcpdump counts what did not fit.
const BUFFER: &str = "131072";
/// Of pcap files in this machine's byte order, with microseconds.
const MAGIC: u32 = 0xa1b2_c3d4;
/// `LINKTYPE_LINUX_SLL2`: 20 bytes before each packet, with its protocol first.
const SLL2: u32 = 276;
const SLL2_BYTES: usize = 20;
/// tcpdump's largest record.
const RECORD_MAX: u32 = 262_144;

/// A running capture of all devices of a namespace.
#[derive(Debug)]
pub(crate) struct Capture {
    tcpdump: Process,
    file: PathBuf,
}

impl Capture {
    /// Starts it; every packet from now on is in it. `filter` is tcpdump's, empty for everything.
    pub(crate) fn start(router: &Netns, file: &Path, filter: &str) -> anyhow::Result<Self> {
        let mut command = router.command("tcpdump")?;
        command.args(["-i", "any", "-y", "LINUX_SLL2", "-n", "-s", "0", "-B", BUFFER, "-U"]);
        command.args(["-Z", "root", "-w"]).arg(file);
        command.args((!filter.is_empty()).then_some(filter));
        let mut tcpdump = Process::spawn("tcpdump", &mut command, &file.with_extension("log"))?;
        tcpdump.wait_for("listening on", START_LIMIT)?;
        Ok(Self { tcpdump, file: file.to_owned() })
    }

    /// Ends it. An error if it has not seen everything.
    pub(crate) fn finish(mut self) -> anyhow::Result<Recording> {
        pause(HAND_OVER);
        self.tcpdump.terminate(STOP_LIMIT)?;
        let said = self.tcpdump.output()?;
        let complete = said.lines().any(|line| line.trim() == "0 packets dropped by kernel");
        ensure!(complete, "{} is not complete, tcpdump said\n{said}", self.file.display());
        Ok(Recording { file: self.file.clone() })
    }
}

/// A finished capture. Dropping it removes its file.
#[derive(Debug)]
pub(crate) struct Recording {
    file: PathBuf,
}

/// A packet with its IP header, as it was on a wire. A forwarded one is there twice.
#[derive(Debug)]
pub(crate) struct Packet<'a> {
    /// What tells it from others; `None` of what is not IP.
    pub(crate) ip: Option<Ip>,
    pub(crate) bytes: &'a [u8],
}

/// From where to where, and what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ip {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    /// IP protocol number; of IPv6 that of the first header.
    pub(crate) protocol: u8,
    /// Source and destination, of TCP and UDP without extension headers and but the first fragment.
    pub(crate) ports: Option<(u16, u16)>,
}

impl Recording {
    /// Shows each packet to `look`.
    pub(crate) fn each(&self, mut look: impl FnMut(&Packet<'_>)) -> anyhow::Result<()> {
        let file = File::open(&self.file);
        let file = file.with_context(|| format!("opening {}", self.file.display()))?;
        let broken = || format!("reading {}", self.file.display());
        let mut reader = BufReader::with_capacity(1 << 20, file);
        check_header(&mut reader).with_context(broken)?;
        let mut bytes = Vec::new();
        while next_record(&mut reader, &mut bytes).with_context(broken)? {
            let payload = bytes.get(SLL2_BYTES..).unwrap_or_default();
            look(&Packet { ip: parse(&bytes), bytes: payload });
        }
        Ok(())
    }

    /// How many packets contain `needle`.
    pub(crate) fn count(&self, needle: &[u8]) -> anyhow::Result<usize> {
        let finder = memchr::memmem::Finder::new(needle);
        let mut count = 0;
        self.each(|packet| count += usize::from(finder.find(packet.bytes).is_some()))?;
        Ok(count)
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
    }
}

fn check_header(reader: &mut impl io::Read) -> anyhow::Result<()> {
    let mut header = [0; 24];
    reader.read_exact(&mut header)?;
    let (magic, link) = (word(&header, 0), word(&header, 20));
    if magic != MAGIC || link != SLL2 {
        bail!("neither the expected format (magic {magic:#x}) nor link type ({link})");
    }
    Ok(())
}

/// Reads one record into `bytes`; false at the end.
fn next_record(reader: &mut impl io::Read, bytes: &mut Vec<u8>) -> anyhow::Result<bool> {
    let mut header = [0; 16];
    let first = reader.read(&mut header)?;
    if first == 0 {
        return Ok(false);
    }
    reader.read_exact(&mut header[first..])?;
    let length = word(&header, 8);
    ensure!(length <= RECORD_MAX, "a record of {length} bytes");
    bytes.resize(length as usize, 0);
    reader.read_exact(bytes)?;
    Ok(true)
}

/// In this machine's byte order. Zero behind the end.
fn word(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk()).copied();
    u32::from_ne_bytes(word.unwrap_or_default())
}

/// Reads what follows the SLL2 header.
fn parse(bytes: &[u8]) -> Option<Ip> {
    let packet = bytes.get(SLL2_BYTES..)?;
    let (source, destination, protocol, transport) = match bytes.first_chunk()? {
        [0x08, 0x00] => {
            let source: [u8; 4] = *packet.get(12..)?.first_chunk()?;
            let destination: [u8; 4] = *packet.get(16..)?.first_chunk()?;
            let fragment = u16::from_be_bytes(*packet.get(6..)?.first_chunk()?) & 0x1fff;
            let length = usize::from(packet.first()? & 0xf) * 4;
            let transport = (fragment == 0).then(|| packet.get(length..)).flatten();
            let ends = (Ipv4Addr::from(source).into(), Ipv4Addr::from(destination).into());
            (ends.0, ends.1, *packet.get(9)?, transport)
        }
        [0x86, 0xdd] => {
            let source: [u8; 16] = *packet.get(8..)?.first_chunk()?;
            let destination: [u8; 16] = *packet.get(24..)?.first_chunk()?;
            let ends = (Ipv6Addr::from(source).into(), Ipv6Addr::from(destination).into());
            (ends.0, ends.1, *packet.get(6)?, packet.get(40..))
        }
        _ => return None,
    };
    let ports = transport.filter(|_| matches!(protocol, 6 | 17)).and_then(|transport| {
        let [a, b, c, d] = *transport.first_chunk()?;
        Some((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
    });
    Some(Ip { source, destination, protocol, ports })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sll2(protocol: [u8; 2], packet: &[u8]) -> Vec<u8> {
        let mut bytes = protocol.to_vec();
        bytes.resize(SLL2_BYTES, 0);
        bytes.extend(packet);
        bytes
    }

    fn ipv4(fragment: u16) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 28, 0, 0];
        packet.extend(fragment.to_be_bytes());
        packet.extend([64, 17, 0, 0, 10, 77, 1, 5, 10, 77, 1, 11]);
        packet.extend([0xca, 0x6c, 0x00, 0x35, 0, 8, 0, 0]);
        packet
    }

    #[test]
    fn both_families_are_read() {
        let ip = parse(&sll2([8, 0], &ipv4(0))).unwrap();
        assert_eq!(ip.source.to_string(), "10.77.1.5");
        assert_eq!(ip.destination.to_string(), "10.77.1.11");
        assert_eq!((ip.protocol, ip.ports), (17, Some((51820, 53))));
        assert_eq!(parse(&sll2([8, 0], &ipv4(9))).unwrap().ports, None);
        let mut packet = vec![0x60, 0, 0, 0, 0, 8, 17, 64];
        packet.extend(Ipv6Addr::new(0xfd70, 0, 0, 0, 0, 0, 0, 5).octets());
        packet.extend(Ipv6Addr::new(0xfd70, 0, 0, 0, 0, 0, 0, 0x11).octets());
        packet.extend([0, 1, 0, 2, 0, 8, 0, 0]);
        let ip = parse(&sll2([0x86, 0xdd], &packet)).unwrap();
        assert_eq!(ip.destination.to_string(), "fd70::11");
        assert_eq!((ip.protocol, ip.ports), (17, Some((1, 2))));
    }

    #[test]
    fn what_is_no_ip_or_cut_off_is_not_read() {
        assert_eq!(parse(&sll2([8, 6], &[0; 28])), None);
        let whole = sll2([8, 0], &ipv4(0));
        for length in 0..SLL2_BYTES + 20 {
            assert_eq!(parse(&whole[..length]), None, "{length}");
        }
        assert_eq!(parse(&whole[..SLL2_BYTES + 20]).unwrap().ports, None);
    }
}
