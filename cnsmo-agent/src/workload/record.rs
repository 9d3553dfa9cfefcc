//! What is known of an instance on disk, for an agent that comes later.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use cnsmo_proto::{model::Instance, pb::deployment as pb};
use cnsmo_service::durable;
use prost::Message;

use crate::node;

const FILE: &str = "record";
/// The variable by which a child is known that the record does not know yet.
pub(super) const MARK: &str = "CNSMO_INSTANCE";

/// Of one instance, in its folder.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Record {
    #[prost(message, optional, tag = "1")]
    instance: Option<pb::Instance>,
    /// Another boot, another process.
    #[prost(string, tag = "2")]
    boot_id: String,
    /// 0: about to be made.
    #[prost(int32, tag = "3")]
    pid: i32,
    /// Field 22 of proc_pid_stat(5): a process of the same id that began at another time is another one.
    #[prost(uint64, tag = "4")]
    start_time: u64,
}

impl Record {
    /// None: there is no record, or it cannot be read.
    pub(super) fn load(folder: &Path) -> Option<Self> {
        Self::decode(fs::read(folder.join(FILE)).ok()?.as_slice()).ok()
    }

    pub(super) fn instance(&self) -> Option<Instance> {
        Instance::try_from(self.instance.clone()?).ok()
    }

    /// A child is about to be made: durable when it returns.
    pub(super) fn before(folder: &Path, instance: &Instance) -> io::Result<Self> {
        let record = Self {
            instance: Some(instance.into()),
            boot_id: node::boot_id(),
            pid: 0,
            start_time: 0,
        };
        record.write(folder)?;
        Ok(record)
    }

    /// The child is there.
    pub(super) fn made(mut self, folder: &Path, pid: i32) -> io::Result<()> {
        (self.pid, self.start_time) = (pid, start_time(pid).unwrap_or_default());
        self.write(folder)
    }

    fn write(&self, folder: &Path) -> io::Result<()> {
        durable::write(&folder.join(FILE), &self.encode_to_vec(), 0o600)
    }

    /// The process of this record, if it still runs.
    pub(super) fn alive(&self, name: &str) -> Option<i32> {
        if self.boot_id != node::boot_id() {
            return None;
        }
        if self.pid == 0 {
            return marked(name);
        }
        (start_time(self.pid) == Some(self.start_time)).then_some(self.pid)
    }
}

/// None: it does not run, or has ended and nobody has asked for its status.
fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in brackets, may contain anything.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let is_dead = matches!(fields.first().copied(), Some("Z" | "X"));
    if is_dead { None } else { fields.get(19)?.parse().ok() }
}

/// The process that leads a session and has the mark of this instance in its environment.
fn marked(name: &str) -> Option<i32> {
    let mark = format!("{MARK}={name}").into_bytes();
    let all = fs::read_dir("/proc").ok()?;
    let pids = all.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    pids.into_iter().find(|pid| {
        let path = PathBuf::from(format!("/proc/{pid}/environ"));
        let has_mark = fs::read(path).is_ok_and(|environment| {
            environment.split(|b| *b == 0).any(|variable| variable == mark)
        });
        has_mark && start_time(*pid).is_some()
    })
}
