//! What programs report reaches the log of the agent.

use std::{
    io,
    sync::{Arc, Mutex},
};

use aya::maps::{Array, Map, MapData};
use cnsmo_agent::{
    datapath::{
        Datapath as _,
        kernel::{Kernel, Options, XdpChoice},
    },
    effective::Effective,
};
use cnsmo_proto::{
    model::{FirewallPolicy, Name},
    pb::policy as pb,
};
use cnsmo_tests::{
    PinDir,
    frame::{self, Ends, ethernet},
};
use tracing::subscriber::with_default;

const XDP_DROP: u32 = 1;
const TC_SHOT: u32 = 2;
/// Of both halves, at the smallest size of the policy memory.
const BLOB_BYTES: usize = 2 * 512 * 8;
const MESSAGE: &str = "the policy in the kernel is damaged";
/// More than the agent takes between two polls.
const FLOOD: u64 = 100;

#[test]
fn a_damaged_policy_drops_counts_and_is_reported() {
    let (pins, state) = (PinDir::new("log"), tempfile::tempdir().unwrap());
    let mut kernel = Kernel::open(Options {
        pins: pins.path().to_owned(),
        state: state.path().to_owned(),
        interfaces: vec![],
        xdp: XdpChoice::Auto,
        flows: 1_024,
        policy_bytes: BLOB_BYTES / 2,
        rules_max: 16,
    })
    .unwrap();
    kernel.apply(&policy()).unwrap();
    let lines = Lines::default();

    assert_ne!(
        kernel.test_run("nic_xdp", &ethernet(&[], &syn(40_000))).unwrap().0,
        XDP_DROP,
        "whole policy"
    );
    assert_eq!(lines.of_sweep(&mut kernel), Vec::<String>::new(), "whole policy");
    damage(&pins);
    // Of another flow: what is known goes on.
    let packet = syn(40_001);
    let framed = ethernet(&[], &packet);

    for (n, (program, frame, drop)) in [
        ("nic_xdp", &framed, XDP_DROP),
        ("nic_ingress", &framed, TC_SHOT),
        ("nic_egress", &framed, TC_SHOT),
        ("tunnel_ingress", &packet, TC_SHOT),
        ("tunnel_egress", &packet, TC_SHOT),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(kernel.test_run(program, frame).unwrap().0, drop, "{program}");
        assert_eq!(dropped_as_damaged(&mut kernel), n as u64 + 1, "{program}");
        let told = lines.of_sweep(&mut kernel);
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].contains("WARN") && told[0].contains(MESSAGE), "{told:?}");
    }

    let before = dropped_as_damaged(&mut kernel);
    for _ in 0..FLOOD {
        kernel.test_run("nic_ingress", &framed).unwrap();
    }
    assert_eq!(dropped_as_damaged(&mut kernel) - before, FLOOD);
    let told = lines.of_sweep(&mut kernel).len();
    assert!((1..10).contains(&told), "{told} messages");
    kernel.test_run("nic_ingress", &framed).unwrap();
    assert_eq!(lines.of_sweep(&mut kernel).len(), 1, "silent after a flood");
}

fn syn(sport: u16) -> Vec<u8> {
    frame::ip(Ends::V4([10, 0, 1, 1], [10, 0, 0, 5]), 6, &frame::tcp(sport, 80, 2, b""))
}

/// Any policy that asks the blob; under it a whole one lets the packet pass.
fn policy() -> Effective {
    let spec = pb::FirewallPolicySpec {
        rules: vec![
            pb::FirewallRule {
                name: "no-ssh".into(),
                action: pb::Action::Deny as i32,
                direction: pb::Direction::Ingress as i32,
                protocol: Some(6),
                ports: vec![pb::PortRange { first: 22, last: 22 }],
                ..Default::default()
            },
            pb::FirewallRule {
                name: "no-ssh-out".into(),
                action: pb::Action::Deny as i32,
                direction: pb::Direction::Egress as i32,
                protocol: Some(6),
                ports: vec![pb::PortRange { first: 22, last: 22 }],
                ..Default::default()
            },
        ],
        ..Default::default()
    };
    let (name, policy) = (Name::new("test").unwrap(), FirewallPolicy::try_from(spec).unwrap());
    Effective::merge(vec![], [(&name, &policy)])
}

/// Clears both halves of the IPv4 policy, as another program with the rights could: no tree in them ever ends.
fn damage(pins: &PinDir) {
    let maps = std::fs::read_dir(pins.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.join("BLOB_V4").exists())
        .unwrap();
    let map = Map::Array(MapData::from_pin(maps.join("BLOB_V4")).unwrap());
    let mut blob: Array<_, [u8; BLOB_BYTES]> = map.try_into().unwrap();
    blob.set(0, [0; BLOB_BYTES], 0).unwrap();
}

fn dropped_as_damaged(kernel: &mut Kernel) -> u64 {
    let drops = kernel.status().drops;
    drops.iter().filter(|(_, word, _)| *word == "classifier").map(|(.., count)| count.packets).sum()
}

/// Collects what is logged.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Lines {
    /// Lines that one sweep logs.
    fn of_sweep(&self, kernel: &mut Kernel) -> Vec<String> {
        let sink = self.clone();
        let subscriber =
            tracing_subscriber::fmt().with_ansi(false).with_writer(move || sink.clone()).finish();
        with_default(subscriber, || kernel.sweep());
        let bytes = std::mem::take(&mut *self.0.lock().unwrap());
        String::from_utf8(bytes).unwrap().lines().map(str::to_owned).collect()
    }
}

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
