//! A service that keeps its state in the core is killed, and another copy goes on where it was.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use cnsmo_proto::pb::bus::Message;
use cnsmo_service::bus::Bus;
use cnsmo_tests::Process;
use tokio::task::JoinSet;
use tonic::Code;

use super::programs::{Core, POLL, in_time, program, until};

const CLIENTS: usize = 4;
/// Answers of the first copy before it is killed, and of the one after it.
const ANSWERS: u64 = 100;
const TIMEOUT: Duration = Duration::from_secs(10);

/// A copy of the example in an empty folder of its own.
fn counter(core: &Core, name: &str) -> Process {
    let folder = core.folder().join(name);
    fs::create_dir(&folder).unwrap();
    let mut command = Command::new(program("examples/counter"));
    command.current_dir(&folder).arg(core.socket()).arg(name);
    Process::spawn(name, &mut command, &core.folder().join(format!("{name}.log"))).unwrap()
}

fn one() -> Message {
    Message { subject: "svc.counter".into(), payload: "1".into(), ..Message::default() }
}

/// What clients know.
#[derive(Default)]
struct Known {
    answers: AtomicU64,
    /// Requests that failed after the service may have done them.
    unknown: AtomicU64,
    enough: AtomicBool,
}

/// Counts until it is enough; returns the answers.
async fn client(bus: Bus, known: Arc<Known>) -> Vec<u64> {
    let mut answers = Vec::new();
    while !known.enough.load(Ordering::Relaxed) {
        match bus.request(one(), TIMEOUT, false).await {
            Ok(reply) => {
                answers.push(String::from_utf8(reply.payload.to_vec()).unwrap().parse().unwrap());
                known.answers.fetch_add(1, Ordering::Relaxed);
            }
            // Nobody has seen the request.
            Err(status) if matches!(status.code(), Code::Unavailable | Code::ResourceExhausted) => {
                tokio::time::sleep(POLL).await;
            }
            Err(status) => {
                assert_eq!(status.code(), Code::Aborted, "{status}");
                known.unknown.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
    answers
}

/// Regular files that a process may write, but for its two outputs.
fn written_files(process: &Process) -> Vec<String> {
    let descriptors = format!("/proc/{}/fd", process.id());
    let mut files = Vec::new();
    for entry in fs::read_dir(descriptors).unwrap() {
        let path = entry.unwrap().path();
        let number: u32 = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
        // One that was closed meanwhile is none.
        let Ok(metadata) = fs::metadata(&path) else { continue };
        if number > 2 && metadata.is_file() {
            files.push(fs::read_link(&path).unwrap().display().to_string());
        }
    }
    files
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).unwrap().next().is_none()
}

#[tokio::test(flavor = "multi_thread")]
async fn s10_a_killed_service_goes_on_elsewhere_where_it_was() {
    let core = Core::start("s10");
    let bus = Bus::new(core.channel());
    let nobody = bus.request(one(), TIMEOUT, false).await.unwrap_err();
    assert_eq!(nobody.code(), Code::Unavailable, "{nobody}");

    let mut first = counter(&core, "counter-1");
    let known = Arc::new(Known::default());
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        clients.spawn(client(bus.clone(), known.clone()));
    }
    let answered = async |least: u64| {
        until("answers", async || (known.answers.load(Ordering::Relaxed) >= least).then_some(()))
            .await;
    };
    answered(ANSWERS).await;
    assert_eq!(written_files(&first), Vec::<String>::new());
    first.kill().unwrap();
    let before = known.answers.load(Ordering::Relaxed);

    let second = counter(&core, "counter-2");
    answered(before + ANSWERS).await;
    assert_eq!(written_files(&second), Vec::<String>::new());
    known.enough.store(true, Ordering::Relaxed);
    let mut answers = Vec::new();
    while let Some(one) = in_time("the end of a client", clients.join_next()).await {
        answers.extend(one.unwrap());
    }

    // Each acknowledged step is counted once, and nothing else but what clients know nothing of.
    let distinct: BTreeSet<_> = answers.iter().collect();
    assert_eq!(distinct.len(), answers.len(), "a count was given twice");
    let total: u64 = core.cnsmo(&["kv", "get", "counter/total"]).trim().parse().unwrap();
    let acknowledged = answers.len() as u64;
    let most = acknowledged + known.unknown.load(Ordering::Relaxed);
    assert!((acknowledged..=most).contains(&total), "{total} of {acknowledged} to {most}");
    assert!(distinct.last().is_some_and(|last| **last <= total));
    for name in ["counter-1", "counter-2"] {
        assert!(is_empty(&core.folder().join(name)), "{name} has left something on its disk");
    }
}
