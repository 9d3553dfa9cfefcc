//! Where the core is now, also when no name server can be asked.

use std::{net::SocketAddr, time::Duration};

use cnsmo_service::channel::CoreAddress;
use tokio::{net::lookup_host, time::timeout};

use crate::enforcer::{EnforcerHandle, Gone};

/// Longest wait for the name servers.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
/// Addresses of one core that are tried and let through. A name with more is not a core's.
const ADDRESSES_MAX: usize = 16;

/// Finds the core and keeps the way there open.
#[derive(Clone, Debug)]
pub struct Locator {
    core: CoreAddress,
    last: Vec<SocketAddr>,
    enforcer: EnforcerHandle,
}

impl Locator {
    /// `last`: from the ledger; used as long as the name cannot be looked up.
    pub fn new(core: CoreAddress, last: Vec<SocketAddr>, enforcer: EnforcerHandle) -> Self {
        Self { core, last, enforcer }
    }

    /// Addresses of the core, best first, which no policy blocks. Empty: it was never found.
    ///
    /// # Errors
    /// See [`Gone`].
    pub async fn locate(&mut self) -> Result<Vec<SocketAddr>, Gone> {
        let lookup = lookup_host((self.core.host(), self.core.port()));
        match timeout(LOOKUP_TIMEOUT, lookup).await {
            Ok(Ok(found)) => {
                let found: Vec<_> = found.take(ADDRESSES_MAX).collect();
                if !found.is_empty() {
                    self.last = found;
                }
            }
            Ok(Err(error)) => tracing::warn!(core = %self.core, %error, "lookup failed"),
            Err(_) => tracing::warn!(core = %self.core, "no name server answers"),
        }
        if !self.last.is_empty() {
            self.enforcer.core_at(self.last.clone()).await?;
        }
        Ok(self.last.clone())
    }
}
