//! Waiting for the services that one needs, so that services can be started in any order.

use std::{collections::HashMap, time::Duration};

use cnsmo_proto::pb::catalog::{
    Phase, WatchInstancesRequest, WatchInstancesResponse,
    catalog_service_client::CatalogServiceClient, watch_instances_response::Event,
};
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Code, Status, transport::Channel};

use crate::{backoff::Backoff, supervise::Chain};

/// First and longest wait after a core did not answer.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(5);

/// Why a need is not met.
#[derive(Debug, thiserror::Error)]
pub enum Unmet {
    /// No instance is ready in time.
    #[error("no instance of {service} is ready: {seen}")]
    TimedOut {
        /// What is needed.
        service: String,
        /// The phases of its instances, for people.
        seen: String,
    },
    /// The core will not tell, however often it is asked.
    #[error("the core does not tell of {service}")]
    Refused {
        /// What is needed.
        service: String,
        /// Why.
        #[source]
        source: Box<Status>,
    },
}

/// Waits until each of these services has an instance that is ready, one service after the other.
///
/// # Errors
/// See [`Unmet`]; of the first service that is missing.
pub async fn ready(channel: &Channel, services: &[&str], deadline: Instant) -> Result<(), Unmet> {
    for service in services {
        let mut need = Need {
            client: CatalogServiceClient::new(channel.clone()),
            service: (*service).to_owned(),
            phases: HashMap::new(),
        };
        match timeout_at(deadline, need.met()).await {
            Ok(Ok(())) => {}
            Ok(Err(status)) => {
                return Err(Unmet::Refused { service: need.service, source: status.into() });
            }
            Err(_) => {
                let seen = need.seen();
                return Err(Unmet::TimedOut { service: need.service, seen });
            }
        }
    }
    Ok(())
}

struct Need {
    client: CatalogServiceClient<Channel>,
    service: String,
    phases: HashMap<String, Phase>,
}

impl Need {
    async fn met(&mut self) -> Result<(), Status> {
        let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
        loop {
            match self.watch().await {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(status)
                    if matches!(
                        status.code(),
                        Code::InvalidArgument | Code::PermissionDenied | Code::Unauthenticated
                    ) =>
                {
                    return Err(status);
                }
                Err(status) => {
                    tracing::debug!(error = %Chain(&status), service = self.service, "asking again");
                }
            }
            sleep(backoff.after_failure()).await;
        }
    }

    /// True: an instance is ready. False: the stream ended.
    async fn watch(&mut self) -> Result<bool, Status> {
        let request = WatchInstancesRequest { service: self.service.clone(), ..Default::default() };
        let mut stream = self.client.watch_instances(request).await?.into_inner();
        self.phases.clear();
        while let Some(message) = stream.message().await? {
            if self.take(message) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn take(&mut self, message: WatchInstancesResponse) -> bool {
        match (message.event(), message.instance) {
            (Event::Reset, _) => self.phases.clear(),
            (Event::Delete, Some(instance)) => {
                self.phases.remove(&instance.name);
            }
            (Event::Upsert, Some(instance)) => {
                let phase = instance.phase();
                self.phases.insert(instance.name, phase);
                return phase == Phase::Ready;
            }
            _ => {}
        }
        false
    }

    fn seen(&self) -> String {
        if self.phases.is_empty() {
            return "there is none".to_owned();
        }
        let mut seen: Vec<_> = self
            .phases
            .iter()
            .map(|(name, phase)| {
                let word = phase.as_str_name().trim_start_matches("PHASE_").to_lowercase();
                format!("{name} is {word}")
            })
            .collect();
        seen.sort_unstable();
        seen.join(", ")
    }
}
