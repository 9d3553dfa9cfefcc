//! Where the core is now, also when no name server can be asked.

use std::{net::SocketAddr, time::Duration};

use cnsmo_service::channel::CoreAddress;
use tokio::{net::lookup_host, time::timeout};

use crate::enforcer::{EnforcerHandle, Gone};

/// Longest wait for the name servers.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
/// Addresses of all cores together that are tried and let through.
const ADDRESSES_MAX: usize = 16;

/// Finds the cores and keeps the way there open.
#[derive(Clone, Debug)]
pub struct Locator {
    cores: Vec<CoreAddress>,
    last: Vec<SocketAddr>,
    enforcer: EnforcerHandle,
}

impl Locator {
    /// `last`: from the ledger; used as long as a name cannot be looked up.
    pub fn new(cores: Vec<CoreAddress>, last: Vec<SocketAddr>, enforcer: EnforcerHandle) -> Self {
        Self { cores, last, enforcer }
    }

    /// Addresses of the cores, in the order of their names, which no policy blocks. Empty: none was ever found.
    ///
    /// # Errors
    /// See [`Gone`].
    pub async fn locate(&mut self) -> Result<Vec<SocketAddr>, Gone> {
        let lookups = self.cores.iter().map(look_up);
        let lookups = futures::future::join_all(lookups).await;
        // Which of the last addresses was that name's is not known: all are kept.
        let old = if lookups.iter().all(Option::is_some) { &[][..] } else { &self.last };
        let mut known: Vec<SocketAddr> = Vec::new();
        for address in lookups.into_iter().flatten().flatten().chain(old.iter().copied()) {
            if known.len() < ADDRESSES_MAX && !known.contains(&address) {
                known.push(address);
            }
        }
        self.last = known;
        if !self.last.is_empty() {
            self.enforcer.core_at(self.last.clone()).await?;
        }
        Ok(self.last.clone())
    }
}

/// `None`: no address was found.
async fn look_up(core: &CoreAddress) -> Option<Vec<SocketAddr>> {
    match timeout(LOOKUP_TIMEOUT, lookup_host((core.host(), core.port()))).await {
        Ok(Ok(found)) => {
            let found: Vec<_> = found.take(ADDRESSES_MAX).collect();
            (!found.is_empty()).then_some(found)
        }
        Ok(Err(error)) => {
            tracing::warn!(%core, %error, "lookup failed");
            None
        }
        Err(_) => {
            tracing::warn!(%core, "no name server answers");
            None
        }
    }
}
