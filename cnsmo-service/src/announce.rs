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
    lifecycle::{Lifecycle, Phase, State},
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
        acknowledged: None,
    };
    let interval = announcer.announcement.ttl / PER_TTL;
    let mut backoff = Backoff::new(FIRST_RETRY.min(interval), interval);
    let mut states = life.watch();
    loop {
        let state = states.borrow_and_update().clone();
        let wait = tokio::select! {
            told = timeout(interval, announcer.tell(&state)) => match told {
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
            },
            () = stop.asked() => break,
        };
        tokio::select! {
            () = sleep(wait) => {}
            // The sender is in `life`, which outlives this.
            Ok(()) = states.changed() => {}
            () = stop.asked() => break,
        }
    }
    let last = states.borrow_and_update().clone();
    announcer.end(&last).await;
    Ok(())
}

struct Announcer {
    client: CatalogServiceClient<Channel>,
    announcement: Announcement,
    /// Tells this run from the last.
    incarnation: String,
    /// The phase that the core has from this run.
    acknowledged: Option<Phase>,
}

impl Announcer {
    /// Tells the state; first the phases on the way to it, if some were too short to be told.
    async fn tell(&mut self, state: &State) -> Result<(), Status> {
        let steps = match self.acknowledged {
            Some(from) if from != state.phase => from.way_to(state.phase),
            _ => vec![state.phase],
        };
        for phase in steps {
            let request = self.request(state, phase);
            match self.client.announce(request).await {
                Ok(_) => self.acknowledged = Some(phase),
                // The core knows of another phase than this: an answer was lost. The same life cannot be told on.
                Err(status) if status.code() == Code::FailedPrecondition => {
                    self.incarnation = incarnation();
                    self.acknowledged = None;
                    return Err(status);
                }
                Err(status) => return Err(status),
            }
        }
        Ok(())
    }

    fn request(&self, state: &State, phase: Phase) -> AnnounceRequest {
        let Announcement { service, name, node, endpoints, attributes, ttl, grace } =
            self.announcement.clone();
        let instance = Instance {
            name,
            service,
            node,
            phase: catalog::Phase::from(phase).into(),
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

    /// Tells the last state, if it was not told yet, and withdraws.
    async fn end(&mut self, last: &State) {
        let Some(told) = self.acknowledged else { return };
        if told != last.phase
            && !matches!(timeout(WITHDRAW_TIMEOUT, self.tell(last)).await, Ok(Ok(())))
        {
            tracing::debug!(phase = %last.phase, "the last phase is not announced");
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
