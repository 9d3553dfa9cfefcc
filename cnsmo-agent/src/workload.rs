//! Instances of services that this VM runs for the core, each a child process or a unit of systemd.
//!
//! They outlive the agent: the next one finds each by its record (`child.rs`, `unit.rs`) and takes it up where it is.

mod cgroup;
mod child;
mod journal;
mod launch;
mod log;
mod notify;
mod probe;
mod runner;
mod systemd;
mod unit;

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use cnsmo_proto::{
    model::{Instance, Name},
    pb::deployment as pb,
};
use cnsmo_service::{
    host::{Host, OrderError},
    lifecycle::{Lifecycle, Phase},
    supervise::Stop,
};
use prost::Message as _;
use tokio::{sync::watch, task::JoinSet};

pub use self::systemd::Systemd;
use self::{
    child::Folder,
    runner::{Runner, Units, folder},
    unit::Claims,
};
use crate::enforcer::Instances;

/// Folder of the instances, within the agent's own.
const FOLDER: &str = "instances";
/// Between two attempts to stop an instance that is between two phases.
const RETRY: Duration = Duration::from_millis(100);

/// The instances of this VM.
pub struct Workloads {
    host: Host,
    folder: PathBuf,
    /// The agent ends, its instances do not.
    leaving: Arc<AtomicBool>,
    known: BTreeMap<(Name, Name), Known>,
    /// Instances that are being ended.
    ending: JoinSet<(Name, Name)>,
    units: Units,
}

struct Known {
    name: String,
    life: Lifecycle,
    /// It is being ended, or has.
    is_ending: bool,
    /// The core does not want to hear of it any more.
    is_unwanted: bool,
}

impl Workloads {
    /// `host`: of the services of this VM.
    pub fn new(host: Host, state_dir: &Path, systemd: Systemd) -> Self {
        Self {
            host,
            folder: state_dir.join(FOLDER),
            leaving: Arc::default(),
            known: BTreeMap::new(),
            ending: JoinSet::new(),
            units: Units { systemd, claims: Claims::default() },
        }
    }

    /// To be set before the agent ends, if its instances shall go on.
    pub fn leaving(&self) -> Arc<AtomicBool> {
        self.leaving.clone()
    }

    /// Runs what `wanted` says until `stop`; then the instances are left alone.
    ///
    /// # Errors
    /// The folder of the instances cannot be used.
    pub async fn run(
        mut self,
        mut wanted: watch::Receiver<Option<Arc<Instances>>>,
        mut stop: Stop,
    ) -> io::Result<()> {
        let mut is_first = true;
        loop {
            let now = wanted.borrow_and_update().clone();
            if let Some(instances) = now {
                if std::mem::take(&mut is_first) {
                    self.take_up_orphans(&instances)?;
                }
                self.follow(&instances);
            }
            tokio::select! {
                () = stop.asked() => {
                    self.leaving.store(true, Ordering::Relaxed);
                    self.ending.abort_all();
                    return Ok(());
                }
                changed = wanted.changed() => if changed.is_err() {
                    return Ok(());
                },
                Some(ended) = self.ending.join_next() => match ended {
                    Ok(key) => self.ended(&key),
                    Err(error) => tracing::error!(%error, "the end of an instance failed"),
                },
            }
        }
    }

    /// Instances that were taken from this VM while there was no agent.
    fn take_up_orphans(&mut self, wanted: &Instances) -> io::Result<()> {
        let folders = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            folders => folders?,
        };
        for folder in folders {
            let message = Folder::new(folder?.path(), None).message();
            let message = fs::read(message).unwrap_or_default();
            let instance = pb::Instance::decode(message.as_slice());
            let Ok(instance) = Instance::try_from(instance.unwrap_or_default()) else { continue };
            if !wanted.contains_key(&(instance.deployment.clone(), instance.name.clone())) {
                let draining = Some("Removed".to_owned());
                self.begin(Instance { draining, ..instance });
            }
        }
        Ok(())
    }

    fn follow(&mut self, wanted: &Instances) {
        for (key, instance) in wanted {
            match self.known.get_mut(key) {
                None => self.begin(instance.clone()),
                Some(known) if instance.draining.is_some() && !known.is_ending => self.end(key),
                Some(_) => {}
            }
        }
        let unwanted = self.known.keys().filter(|key| !wanted.contains_key(key));
        for key in unwanted.cloned().collect::<Vec<_>>() {
            self.forget(&key);
        }
    }

    fn begin(&mut self, instance: Instance) {
        let key = (instance.deployment.clone(), instance.name.clone());
        let name = format!("{}/{}", instance.deployment, instance.name);
        let folder = folder(&self.folder, &instance.deployment, &instance.name);
        let is_ending = instance.draining.is_some();
        tracing::info!(instance = name, "to be run");
        let (leaving, units) = (self.leaving.clone(), self.units.clone());
        let runner = Runner::new(name.clone(), instance, folder, leaving, units);
        let life = match self.host.add(Arc::new(runner)) {
            Ok(life) => life,
            Err(error) => return tracing::error!(instance = name, %error, "cannot be run"),
        };
        let known = Known { name, life, is_ending: false, is_unwanted: false };
        self.known.insert(key.clone(), known);
        if is_ending {
            self.end(&key);
        }
    }

    /// Lets it finish what it has.
    fn end(&mut self, key: &(Name, Name)) {
        let Some(known) = self.known.get_mut(key).filter(|known| !known.is_ending) else { return };
        known.is_ending = true;
        let (host, name, life) = (self.host.clone(), known.name.clone(), known.life.clone());
        let key = key.clone();
        self.ending.spawn(async move {
            while life.phase() != Phase::Stopped {
                match host.stop(&name, None).await {
                    Ok(_) | Err(OrderError::Unknown(_)) => break,
                    Err(_) => tokio::time::sleep(RETRY).await,
                }
            }
            key
        });
    }

    fn forget(&mut self, key: &(Name, Name)) {
        let Some(known) = self.known.get_mut(key) else { return };
        known.is_unwanted = true;
        let has_ended = known.is_ending && known.life.phase() == Phase::Stopped;
        if has_ended { self.remove(key) } else { self.end(key) }
    }

    fn ended(&mut self, key: &(Name, Name)) {
        if self.known.get(key).is_some_and(|known| known.is_unwanted) {
            self.remove(key);
        }
    }

    fn remove(&mut self, key: &(Name, Name)) {
        let Some(known) = self.known.remove(key) else { return };
        let (deployment, name) = key;
        if let Err(error) = folder(&self.folder, deployment, name).remove() {
            tracing::warn!(instance = known.name, %error, "its folder is left behind");
        }
        if let Err(error) = self.host.remove(&known.name) {
            tracing::debug!(%error, "taken out already");
        }
        tracing::info!(instance = known.name, "gone from this VM");
    }
}

#[cfg(test)]
mod tests;
