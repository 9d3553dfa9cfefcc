//! One processor sends frames and does all that becomes of them. A frame that is lost on its way would be a frame that nobody
//! had to judge, so whoever judges counts, and a round in which frames are missing is void.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use serde::Deserialize;

use super::{
    super::{Better, Row, driver::Driver},
    DEVICE, Guard, ROUNDS,
};
use crate::{
    interrupt,
    netns::{Netns, PinDir, RunDir},
    process::pause,
    progress, shell,
};

const RULES: u32 = 10_000;
/// Flows of the case `forward`, all of them established.
const FLOWS: u64 = 16_384;
/// As the sender writes it to all frames.
const MAC: &str = "02:00:00:00:00:01";
/// Where the sender's packets go to when they are forwarded.
const BEYOND: &str = "198.51.100.1";
/// Frames at once; a device holds four times as many.
const BATCH: u32 = 64;
/// Void rounds before giving up.
const TRIES: usize = 5;
/// One in so many frames may be missing in a round, or be another's.
const WRONG: u64 = 1_000;
/// For frames that are still under way when the sender has ended.
const UNDER_WAY: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(5);

const NANOSECONDS: (&str, Better) = ("ns", Better::Lower);

/// What judges the frames that arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Judge {
    /// Ours, on XDP.
    Ours,
    /// An XDP program that drops everything.
    Empty,
    /// nftables, one rule after the other, before routing.
    Linear,
    /// nftables, a map from addresses and port to verdicts, before routing.
    Set,
    /// The same at the device, where nftables is as early as it can be.
    SetIngress,
}

impl Judge {
    const ALL: [Self; 5] = [Self::Ours, Self::Empty, Self::Linear, Self::Set, Self::SetIngress];

    /// Some tenths of a second.
    fn frames(self) -> u32 {
        match self {
            Self::Ours | Self::Empty => 1 << 19,
            Self::Set | Self::SetIngress => 1 << 17,
            Self::Linear => 1 << 12,
        }
    }

    /// Of the device that the sender sends by.
    fn link(self) -> String {
        format!("drop{}", self as u8)
    }
}

pub(super) fn measure(program: &Path) -> anyhow::Result<Vec<Row>> {
    let mut sender = Sender::start(program)?;
    let mut rows = drops(program, &mut sender)?;
    rows.push(forwards(program, &mut sender)?);
    Ok(rows)
}

fn drops(program: &Path, sender: &mut Sender) -> anyhow::Result<Vec<Row>> {
    let receivers = Judge::ALL.map(|judge| {
        Receiver::start(program, sender, judge).with_context(|| format!("starting {judge:?}"))
    });
    let mut receivers = receivers.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    let mut samples = vec![Vec::new(); receivers.len()];
    for round in 1..=ROUNDS {
        progress::step(&format!("dropping, round {round} of {ROUNDS}"), || {
            for (receiver, samples) in receivers.iter_mut().zip(&mut samples) {
                let judge = receiver.judge;
                let time = sender.time("drop", &judge.link(), judge.frames(), || receiver.judged());
                samples.push(time.with_context(|| format!("measuring {judge:?}"))?);
            }
            Ok(())
        })?;
    }
    let [ours, empty, linear, set, set_ingress] = &samples[..] else { unreachable!("one each") };
    let rows = [
        ("empty-xdp", "empty XDP", empty),
        ("nft-linear", "nft", linear),
        ("nft-set", "nft", set),
        ("nft-set-ingress", "nft", set_ingress),
    ];
    let row = |(what, name, peer): (&str, &str, &Vec<f64>)| {
        Row::of(&format!("fw/drop-10k-vs-{what}"), NANOSECONDS, ours, (name, peer))
    };
    rows.into_iter().map(row).collect()
}

fn forwards(program: &Path, sender: &mut Sender) -> anyhow::Result<Row> {
    const FRAMES: u32 = 1 << 17;
    let mut gateways =
        [Gateway::start(program, sender, true)?, Gateway::start(program, sender, false)?];
    let mut samples = [Vec::new(), Vec::new()];
    for round in 1..=ROUNDS {
        progress::step(&format!("forwarding, round {round} of {ROUNDS}"), || {
            for (gateway, samples) in gateways.iter_mut().zip(&mut samples) {
                samples
                    .push(sender.time("forward", gateway.link, FRAMES, || {
                        gateway.sink.counted("netdev")
                    })?);
            }
            Ok(())
        })?;
    }
    gateways[0].check()?;
    let [ours, none] = &samples;
    Row::of("fw/forward-10k-vs-none", NANOSECONDS, ours, ("no firewall", none))
}

/// Sends frames out of the devices of its namespace. Fields are dropped in order.
struct Sender {
    driver: Driver,
    pins: PinDir,
    _state: RunDir,
    netns: Netns,
}

#[derive(Deserialize)]
struct Sent {
    /// Per frame, with all that became of it.
    ns: f64,
}

impl Sender {
    fn start(program: &Path) -> anyhow::Result<Self> {
        let netns = Netns::new("fw-sender")?;
        let (pins, state) = (PinDir::new("bench-fw"), RunDir::new("bench-fw")?);
        let mut command = netns.command(program)?;
        let mut driver = Driver::start(command.arg("send").args([pins.path(), state.path()]))?;
        driver.wait_until_ready()?;
        Ok(Self { driver, pins, _state: state, netns })
    }

    /// Nanoseconds per frame, all of which `judged` counts.
    fn time(
        &mut self,
        case: &str,
        link: &str,
        frames: u32,
        mut judged: impl FnMut() -> anyhow::Result<u64>,
    ) -> anyhow::Result<f64> {
        let mut seen = Vec::new();
        for _ in 0..TRIES {
            interrupt::check()?;
            let before = judged()?;
            let sent: Sent = self.driver.ask(&format!("{case} {link} {frames} {BATCH}"))?;
            let end = Instant::now() + UNDER_WAY;
            let mut count = judged()? - before;
            while count < u64::from(frames) && Instant::now() < end {
                pause(POLL);
                count = judged()? - before;
            }
            // More are as wrong as fewer: others were judged, and not these.
            if count.abs_diff(frames.into()) <= u64::from(frames) / WRONG {
                return Ok(sent.ns);
            }
            seen.push(count);
        }
        anyhow::bail!("of {frames} frames, so many were judged in the rounds: {seen:?}")
    }

    /// Joins a namespace by a device that takes frames in bulk, which is so where there is XDP or GRO.
    fn join(&self, link: &str, netns: &Netns) -> anyhow::Result<()> {
        Netns::veth((&self.netns, link), (netns, DEVICE))?;
        netns.ip(&["link", "set", DEVICE, "address", MAC])?;
        shell::read(netns.command("ethtool")?.args(["-K", DEVICE, "gro", "on"])).map(drop)
    }
}

/// A namespace that drops what arrives. Fields are dropped in order.
struct Receiver {
    judge: Judge,
    guard: Option<Guard>,
    end: End,
}

impl Receiver {
    fn start(program: &Path, sender: &Sender, judge: Judge) -> anyhow::Result<Self> {
        let end = End(Netns::new("fw-receiver")?);
        sender.join(&judge.link(), &end.0)?;
        let mut guard = None;
        match judge {
            Judge::Ours => guard = Some(Guard::start(program, &end.0, RULES, "drop")?),
            Judge::Empty => {
                // `ip -n` would see another file system in place of the pins.
                let mut command = end.0.command("ip")?;
                command.args(["link", "set", DEVICE, "xdpdrv", "pinned"]);
                shell::read(command.arg(sender.pins.path().join("bench_drop")))?;
            }
            Judge::Linear => end.load(program, "linear")?,
            Judge::Set => end.load(program, "set")?,
            Judge::SetIngress => end.load(program, "set-ingress")?,
        }
        Ok(Self { judge, guard, end })
    }

    /// Frames that were looked at, and dropped because no rule matches.
    fn judged(&mut self) -> anyhow::Result<u64> {
        match (self.judge, &mut self.guard) {
            (_, Some(guard)) => {
                let drops = guard.counts()?.drops;
                Ok(drops.get("denied-by-default").copied().unwrap_or(0))
            }
            (Judge::SetIngress, None) => self.end.counted("netdev"),
            (Judge::Linear | Judge::Set, None) => self.end.counted("ip"),
            (Judge::Ours | Judge::Empty, None) => self.end.arrived(),
        }
    }
}

/// A router between the sender and a sink. Fields are dropped in order.
struct Gateway {
    link: &'static str,
    guard: Option<Guard>,
    sink: End,
    _netns: Netns,
}

impl Gateway {
    fn start(program: &Path, sender: &Sender, guarded: bool) -> anyhow::Result<Self> {
        const OUT: &str = "out";
        let link = if guarded { "guarded" } else { "unguarded" };
        let (netns, sink) = (Netns::new("fw-gateway")?, End(Netns::new("fw-sink")?));
        sender.join(link, &netns)?;
        Netns::veth((&netns, OUT), (&sink.0, DEVICE))?;
        sink.0.ip(&["link", "set", DEVICE, "address", MAC])?;
        netns.sysctl("net/ipv4/ip_forward", "1")?;
        netns.ip(&["address", "add", "198.51.100.2/24", "dev", OUT])?;
        netns.ip(&["neighbour", "add", BEYOND, "lladdr", MAC, "dev", OUT])?;
        sink.rules(&format!(
            "table netdev bench {{\ncounter judged {{ }}\n\
             chain sink {{\ntype filter hook ingress device \"{DEVICE}\" priority 0;\n\
             ip daddr {BEYOND} counter name judged drop\n}}\n}}\n"
        ))?;
        let guard = match guarded {
            true => Some(Guard::start(program, &netns, RULES, "forward")?),
            false => None,
        };
        let mut gateway = Self { link, guard, sink, _netns: netns };
        gateway.check()?;
        Ok(gateway)
    }

    /// The firewall has not forgotten its flows.
    fn check(&mut self) -> anyhow::Result<()> {
        let Some(guard) = &mut self.guard else { return Ok(()) };
        let flows = guard.counts()?.flows;
        ensure!(flows == FLOWS, "{flows} flows are established, not {FLOWS}");
        Ok(())
    }
}

/// The namespace where frames end.
struct End(Netns);

impl End {
    fn load(&self, program: &Path, form: &str) -> anyhow::Result<()> {
        self.rules(&shell::read(Command::new(program).args(["nft", form]))?)
    }

    /// Has nftables take them.
    fn rules(&self, text: &str) -> anyhow::Result<()> {
        let files = RunDir::new("bench-fw")?;
        let path = files.path().join("bench.nft");
        shell::write(&path, text)?;
        let program = shell::find("nft").context("nft is not installed")?;
        shell::read(self.0.command(program)?.arg("-f").arg(&path)).map(drop)
    }

    /// Packets that nftables counted.
    fn counted(&self, family: &str) -> anyhow::Result<u64> {
        let program = shell::find("nft").context("nft is not installed")?;
        let mut command = self.0.command(program)?;
        let text = shell::read(command.args(["list", "counter", family, "bench", "judged"]))?;
        let mut words = text.split_whitespace().skip_while(|word| *word != "packets");
        let packets = words.nth(1).and_then(|packets| packets.parse().ok());
        packets.with_context(|| format!("nft says\n{text}"))
    }

    /// Packets that arrived at the device.
    fn arrived(&self) -> anyhow::Result<u64> {
        let text = self.0.run(|| fs::read_to_string("/proc/thread-self/net/dev"))??;
        let line = text.lines().find_map(|line| line.trim().strip_prefix("in:"));
        let packets = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
        packets.with_context(|| format!("the kernel says of its devices\n{text}"))
    }
}
