//! An enforcer without a VM: it keeps the set by the same rules and enforces nothing. For measuring many agents in one
//! process.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use cnsmo_proto::pb::agent::{Ack, TypeState, Update};
use tokio::sync::{mpsc, watch};

use super::{EnforcerHandle, InForce, MAILBOX_MAX, Message, VmStatus, worker::NO_SET_DIGEST};
use crate::{
    desired::{DesiredSet, RESOURCE_TYPE},
    parts::Parts,
};

const NO_DATAPATH: &str = "there is no data path";

/// Serves a mailbox as long as there are handles to it.
#[derive(Debug)]
pub struct MemoryEnforcer {
    mailbox: mpsc::Receiver<Message>,
    in_force: watch::Sender<InForce>,
    // Kept so that whoever follows the checks is not told that the enforcer is gone.
    _checks: watch::Sender<Arc<crate::health::Checks>>,
    set: DesiredSet,
}

impl MemoryEnforcer {
    /// With an empty set, as on a new VM, and the handle to it.
    pub fn new() -> (Self, EnforcerHandle) {
        let (sender, mailbox) = mpsc::channel(MAILBOX_MAX);
        let set = DesiredSet::default();
        let (in_force, in_force_watch) = watch::channel(shown(&set));
        let (checks, checks_watch) = watch::channel(Arc::default());
        let this = Self { mailbox, in_force, _checks: checks, set };
        let (in_force, checks) = (in_force_watch, checks_watch);
        let parts = Parts::default();
        let (_, instances) = watch::channel(None);
        (this, EnforcerHandle { mailbox: sender, in_force, checks, instances, parts })
    }

    /// Runs until no handle is left. `received` sees each update before it is carried out.
    pub async fn run(mut self, received: impl Fn(&Update)) {
        while let Some(message) = self.mailbox.recv().await {
            // An asker that is gone needs no answer.
            match message {
                Message::Update { store_epoch, update, reply } => {
                    received(&update);
                    let _ = reply.send(self.update(store_epoch, *update));
                }
                Message::Status { reply } => {
                    let _ = reply.send(VmStatus::default());
                }
                Message::Explain { reply, .. } => {
                    let _ = reply.send(Err(NO_DATAPATH.to_owned()));
                }
                Message::Flows { reply, .. } => {
                    let _ = reply.send(Err(NO_DATAPATH.to_owned()));
                }
                Message::Preview { reply, .. } => {
                    let _ = reply.send(Err(NO_DATAPATH.to_owned()));
                }
                Message::CoreAt { reply, .. }
                | Message::Named { reply, .. }
                | Message::ConfirmWithin { reply, .. }
                | Message::Confirm { reply, .. }
                | Message::Undo { reply }
                | Message::Followed { reply }
                | Message::Health { reply, .. } => {
                    let _ = reply.send(());
                }
                Message::Held | Message::Sweep { .. } => {}
            }
        }
    }

    fn update(&mut self, store_epoch: u64, update: Update) -> Ack {
        let received = Instant::now();
        let (nonce, r#type) = (update.nonce, update.r#type.clone());
        let error = match self.set.stage(store_epoch, update) {
            Ok(staged) => {
                self.set = staged.into_set();
                self.in_force.send_replace(shown(&self.set));
                String::new()
            }
            Err(refusal) => refusal.to_string(),
        };
        let state = || self.set.running_state(&BTreeMap::new());
        let no_set = || TypeState { revision: 0, digest: NO_SET_DIGEST.to_vec() };
        let known = r#type == RESOURCE_TYPE;
        Ack {
            nonce,
            r#type,
            applied: Some(if known { state() } else { no_set() }),
            error,
            resource_errors: self.set.errors(&BTreeMap::new()),
            apply_duration: received.elapsed().try_into().ok(),
        }
    }
}

fn shown(set: &DesiredSet) -> InForce {
    let types = [(RESOURCE_TYPE.to_owned(), set.running_state(&BTreeMap::new()))].into();
    InForce { types, ..InForce::default() }
}
