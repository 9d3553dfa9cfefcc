//! Announcing an instance of a service to the catalogue, for as long as it runs.

use std::{collections::BTreeMap, time::Duration};

use cnsmo_proto::pb::catalog::{
    self, AnnounceRequest, Endpoint, Instance, WithdrawRequest,
    catalog_service_client::CatalogServiceClient,
};
use ring::rand::{SecureRandom as _, SystemRandom};
use tokio::time::{sleep, timeout};
use tonic::{Code, Status, transport::Channel};

use crate::{
    backoff::Backoff,
    lifecycle::{Lifecycle, State},
    supervise::{Chain, Stop},
};

/// Announcements per TTL: two may be lost and the third is still in time.
const PER_TTL: u32 = 3;
/// First wait after a core did not answer; doubles up to the time between two announcements.
const FIRST_RETRY: Duration = Duration::from_millis(100);
/// How long the end of a service waits for the core to hear of it. Without it the TTL tells.
const WITHDRAW_TIMEOUT: Duration = Duration::from_secs(2);

/// What is announced beside the phase.
#[derive(Clone, Debug, Default)]
pub struct Announcement {
    /// A DNS label.
    pub service: String,
    /// A DNS label, unique among the instances of the service.
    pub name: String,
    /// The VM; may be empty.
    pub node: String,
    /// Where it can be reached.
    pub endpoints: Vec<Endpoint>,
    /// As labels of resources.
    pub attributes: BTreeMap<String, String>,
    /// Silence for longer than this makes it unreachable: 1 s to 10 min.
    pub ttl: Duration,
    /// Unreachable for longer than this is lost: up to 24 h. Zero: the core's default.
    pub grace: Duration,
}

/// The core will not take the announcement, however often it is asked.
#[derive(Debug, thiserror::Error)]
#[error("the core does not take the announcement of {service}/{name}")]
pub struct Refused {
    service: String,
    name: String,
    source: Box<Status>,
}

/// Announces the phases of `life`, each at once and then again and again, until a stop is asked for; then withdraws.
///
/// A core that does not answer is asked again: an announcement says all there is to say, so that nothing needs to be
/// repeated when it is back. An instance that another owner still has is asked for until that one is lost.
///
/// # Errors
/// The announcement is wrong or not allowed.
pub async fn announce(
    channel: Channel,
    announcement: Announcement,
    life: &Lifecycle,
    mut stop: Stop,
) -> Result<(), Refused> {
    let mut announcer = Announcer {
        client: CatalogServiceClient::new(channel),
        incarnation: incarnation(),
        announcement,
        told: 0,
    };
    let interval = announcer.announcement.ttl / PER_TTL;
    let mut backoff = Backoff::new(FIRST_RETRY.min(interval), interval);
    let mut states = life.watch();
    loop {
        states.mark_unchanged();
        // Not cut short by a stop: whether the core has heard of a phase must be known before the next one is told.
        let wait = match timeout(interval, announcer.tell(life)).await {
            Ok(Ok(())) => {
                backoff.reset();
                interval
            }
            Ok(Err(status)) if is_final(&status) => return Err(announcer.refused(status)),
            Ok(Err(status)) => {
                tracing::debug!(error = %Chain(&status), "not announced, trying again");
                backoff.after_failure()
            }
            Err(_) => backoff.after_failure(),
        };
        tokio::select! {
            () = sleep(wait) => {}
            // The sender is in `life`, which outlives this.
            Ok(()) = states.changed() => {}
            () = stop.asked() => break,
        }
    }
    announcer.end(life).await;
    Ok(())
}

struct Announcer {
    client: CatalogServiceClient<Channel>,
    announcement: Announcement,
    /// Tells this run from the last.
    incarnation: String,
    /// Phases entered up to the last one that the core has from this run.
    told: u64,
}

impl Announcer {
    /// Tells each state that is new, in order; or the last one, to show that the instance lives.
    async fn tell(&mut self, life: &Lifecycle) -> Result<(), Status> {
        let (mut states, entered) = life.entered_after(self.told);
        if states.is_empty() {
            states.push(life.watch().borrow().clone());
        }
        let first = entered.saturating_sub(states.len() as u64);
        for (state, nth) in states.iter().zip(first + 1..) {
            match self.client.announce(self.request(state)).await {
                Ok(_) => self.told = nth,
                // The core knows of another phase than this: an answer was lost. The same life cannot be told on.
                Err(status) if status.code() == Code::FailedPrecondition => {
                    self.incarnation = incarnation();
                    self.told = entered.saturating_sub(1);
                    return Err(status);
                }
                Err(status) => return Err(status),
            }
        }
        Ok(())
    }

    fn request(&self, state: &State) -> AnnounceRequest {
        let Announcement { service, name, node, endpoints, attributes, ttl, grace } =
            self.announcement.clone();
        let instance = Instance {
            name,
            service,
            node,
            phase: catalog::Phase::from(state.phase).into(),
            reason: state.reason.to_owned(),
            message: state.message.clone(),
            endpoints,
            attributes,
            incarnation: self.incarnation.clone(),
            ..Instance::default()
        };
        let time = |time: Duration| prost_types::Duration::try_from(time).ok();
        AnnounceRequest { instance: Some(instance), ttl: time(ttl), grace: time(grace) }
    }

    /// Tells what was not told yet, and withdraws.
    async fn end(&mut self, life: &Lifecycle) {
        if self.told == 0 {
            return;
        }
        if !matches!(timeout(WITHDRAW_TIMEOUT, self.tell(life)).await, Ok(Ok(()))) {
            tracing::debug!(phase = %life.phase(), "the last phase is not announced");
        }
        let Announcement { service, name, .. } = self.announcement.clone();
        let withdrawn = self.client.withdraw(WithdrawRequest { service, name });
        match timeout(WITHDRAW_TIMEOUT, withdrawn).await {
            Ok(Ok(_)) => {}
            Ok(Err(status)) => tracing::debug!(error = %Chain(&status), "not withdrawn"),
            Err(_) => tracing::debug!("not withdrawn in time"),
        }
    }

    fn refused(self, status: Status) -> Refused {
        let Announcement { service, name, .. } = self.announcement;
        Refused { service, name, source: Box::new(status) }
    }
}

fn is_final(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::InvalidArgument
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::Unimplemented
    )
}

/// Tells one run of an instance from the next. Without random numbers empty: then its phases alone do.
pub fn incarnation() -> String {
    let mut bytes = [0; 16];
    if SystemRandom::new().fill(&mut bytes).is_err() {
        return String::new();
    }
    format!("{:032x}", u128::from_be_bytes(bytes))
}
