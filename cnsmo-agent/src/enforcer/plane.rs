//! Tunnel and data path as one: what they shall do together, in an order in which nothing is missing or unguarded.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
};

use cnsmo_proto::model::{Name, PublicKey};
use cnsmo_service::supervise::Chain;

use super::{Crashed, OpenTunnel};
use crate::{
    datapath::{ApplyError, Datapath, Status},
    desired::Key,
    effective::{Balancer, Effective, TunnelDevice},
    explain::{Answer, Question},
    live::{Impact, LiveFlows},
    plan::Plan,
    tunnel::{Device, Tunnel, TunnelConfig, TunnelStatus},
};

pub(super) struct Plane {
    datapath: Box<dyn Datapath>,
    open_tunnel: OpenTunnel,
    tunnel: Option<Box<dyn Tunnel>>,
    /// What the data path enforces; `None`: not known, as at the start.
    enforced: Option<Effective>,
    /// The tunnel failed, and its device may be another one, without the data path on it.
    unguarded: bool,
    /// What the tunnel is; `None`: not known, or between two configurations.
    tunnel_is: Option<(Option<TunnelConfig>, Option<Device>)>,
    /// What `tend` said last.
    tending: Option<String>,
    /// One of both panicked and must not be asked for anything.
    pub(super) crashed: bool,
}

/// What could not be followed, though the rest is in force.
#[derive(Debug, Default)]
pub(super) struct Shortfall {
    /// Resources, and why.
    pub(super) blocked: BTreeMap<Key, String>,
    /// Why the tunnel is not what it shall be.
    pub(super) tunnel: Option<String>,
}

impl Plane {
    pub(super) fn new(datapath: Box<dyn Datapath>, open_tunnel: OpenTunnel) -> Self {
        Self {
            datapath,
            open_tunnel,
            tunnel: None,
            enforced: None,
            unguarded: false,
            tunnel_is: None,
            tending: None,
            crashed: false,
        }
    }

    /// Makes before it breaks: tunnel and peers, then the data path, then packets through a new tunnel and the removal of
    /// old peers. A tunnel that fails stays what it was and is guarded as it is; the rest is in force all the same.
    ///
    /// A panic is an error like others, so that what makes the data path crash is refused and does not stay in the ledger
    /// to crash it again.
    ///
    /// # Errors
    /// Of the data path, which then enforces what it did. The tunnel may know peers of both plans.
    pub(super) fn enforce(&mut self, plan: Plan) -> Result<Shortfall, ApplyError> {
        self.guarded(|this| this.make_then_break(plan))
    }

    /// Closes this VM. The tunnel is not touched, but closed as well.
    ///
    /// # Errors
    /// Of the data path.
    pub(super) fn close(&mut self, mut closed: Effective) -> Result<(), ApplyError> {
        self.guarded(|this| {
            let device = this.device_found();
            closed.tunnel = device.map(|device| guard(device, None));
            this.apply(closed)
        })
    }

    /// Lets new flows go to the backends named now.
    ///
    /// # Errors
    /// Of the data path; they go where they went.
    pub(super) fn steer(&mut self, balancers: Vec<Balancer>) -> Result<(), ApplyError> {
        let Some(enforced) = &self.enforced else { return Ok(()) };
        let in_force =
            |balancer: &Balancer| enforced.balancers.iter().any(|b| b.name == balancer.name);
        let balancers: Vec<_> = balancers.into_iter().filter(in_force).collect();
        if balancers == enforced.balancers {
            return Ok(());
        }
        self.guarded(|this| this.datapath.steer(&balancers))?;
        if let Some(enforced) = &mut self.enforced {
            enforced.balancers = balancers;
        }
        Ok(())
    }

    /// Removes expired flows.
    pub(super) fn sweep(&mut self) {
        self.datapath.sweep();
    }

    /// What the data path would do with a packet, or why it cannot tell.
    pub(super) fn explain(&mut self, question: &Question) -> Result<Answer, String> {
        self.datapath.explain(question).map_err(|error| Chain(&*error).to_string())
    }

    /// At most `max` of the flows there are, or why they cannot be read.
    pub(super) fn flows(&mut self, max: usize) -> Result<LiveFlows, String> {
        self.datapath.flows(max).map_err(|error| Chain(&*error).to_string())
    }

    /// What a policy would do to the flows there are.
    ///
    /// # Errors
    /// Of the data path, which enforces what it did.
    pub(super) fn preview(&mut self, policy: &Effective, max: usize) -> Result<Impact, ApplyError> {
        self.guarded(|this| this.datapath.preview(policy, max))
    }

    /// Revives what has died of the tunnel. What that cannot mend takes another [`Self::enforce`]. Returns whether the tunnel
    /// fails otherwise than before, or no longer does.
    pub(super) fn tend(&mut self) -> bool {
        let Some(tunnel) = &mut self.tunnel else { return false };
        let failure = tunnel.tend().err().map(|error| Chain(&error).to_string());
        if failure.is_some() {
            (self.tunnel_is, self.unguarded) = (None, true);
        }
        if failure == self.tending {
            return false;
        }
        match &failure {
            Some(failure) => tracing::warn!(%failure, "the tunnel does not work"),
            None => tracing::info!("the tunnel works again"),
        }
        self.tending = failure;
        true
    }

    /// Why the tunnel does not work, as [`Self::tend`] found it.
    pub(super) fn tunnel_failure(&self) -> Option<&String> {
        self.tending.as_ref()
    }

    pub(super) fn status(&mut self) -> (Status, Option<TunnelStatus>) {
        (self.datapath.status(), self.tunnel_status())
    }

    pub(super) fn tunnel_status(&mut self) -> Option<TunnelStatus> {
        self.tunnel.as_mut()?.status()
    }

    /// Opens the tunnel if that is still to be done.
    pub(super) fn public_key(&mut self) -> Option<PublicKey> {
        Some(self.open().ok()?.public_key())
    }

    /// Names of the balancers in force.
    pub(super) fn balancers(&self) -> impl Iterator<Item = &Name> {
        self.enforced.iter().flat_map(|effective| &effective.balancers).map(|b| &b.name)
    }

    fn make_then_break(&mut self, plan: Plan) -> Result<Shortfall, ApplyError> {
        let Plan { mut effective, tunnel: config, mut blocked, .. } = plan;
        let (device, mut failure) = match self.prepare(config.as_ref()) {
            Ok(device) => (device, None),
            // What is there must be guarded, whoever left it.
            Err(failure) => (self.device_found(), Some(failure)),
        };
        if device.is_none()
            && let (Some(config), Some(failure)) = (&config, &failure)
        {
            for Balancer { name, .. } in std::mem::take(&mut effective.balancers) {
                let why = format!("needs network `{}`: {failure}", config.network);
                blocked.insert(Key::LoadBalancer(name), why);
            }
        }
        effective.tunnel = device.clone().map(|device| guard(device, config.as_ref()));
        self.apply(effective)?;
        if failure.is_none() {
            failure = self.complete(config.as_ref(), device).err();
        }
        if let (Some(config), Some(failure)) = (&config, &failure) {
            blocked.insert(Key::Network(config.network.clone()), failure.clone());
        }
        Ok(Shortfall { blocked, tunnel: failure })
    }

    /// Returns the device that is to be guarded.
    fn prepare(&mut self, config: Option<&TunnelConfig>) -> Result<Option<Device>, String> {
        if let Some((is, device)) = &self.tunnel_is
            && is.as_ref() == config
        {
            return Ok(device.clone());
        }
        let Some(config) = config else { return Ok(None) };
        let prepared = self.open()?.prepare(config).map_err(|error| Chain(&error).to_string());
        self.tunnel_is = None;
        prepared.map(Some)
    }

    fn complete(
        &mut self,
        config: Option<&TunnelConfig>,
        device: Option<Device>,
    ) -> Result<(), String> {
        if self.tunnel_is.as_ref().is_some_and(|(is, _)| is.as_ref() == config) {
            return Ok(());
        }
        match (self.open(), config) {
            (Ok(tunnel), _) => {
                tunnel.complete(config).map_err(|error| Chain(&error).to_string())?;
            }
            // Nothing is wanted and nothing can be there.
            (Err(_), None) => {}
            (Err(failure), Some(_)) => return Err(failure),
        }
        self.tunnel_is = Some((config.cloned(), device));
        Ok(())
    }

    /// Touches the data path only as far as needed: compiling the rules of a large policy takes seconds.
    fn apply(&mut self, next: Effective) -> Result<(), ApplyError> {
        match &self.enforced {
            _ if self.unguarded => self.datapath.apply(&next)?,
            Some(now) if *now == next => return Ok(()),
            Some(now) if differ_in_backends_only(now, &next) => {
                self.datapath.steer(&next.balancers)?;
            }
            _ => self.datapath.apply(&next)?,
        }
        self.enforced = Some(next);
        self.unguarded = false;
        Ok(())
    }

    /// The device as the tunnel has it, whatever it shall be.
    fn device_found(&mut self) -> Option<Device> {
        self.open().ok()?.existing()
    }

    fn open(&mut self) -> Result<&mut dyn Tunnel, String> {
        let tunnel = match self.tunnel.take() {
            Some(tunnel) => tunnel,
            None => (self.open_tunnel)().map_err(|error| format!("{error:#}"))?,
        };
        Ok(&mut **self.tunnel.insert(tunnel))
    }

    fn guarded<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, ApplyError>,
    ) -> Result<T, ApplyError> {
        catch_unwind(AssertUnwindSafe(|| work(self))).unwrap_or_else(|_| {
            self.crashed = true;
            Err(ApplyError::Failed(Crashed.into()))
        })
    }
}

/// Without a configuration the VM is closed, and nobody may know what the addresses are.
fn guard(device: Device, config: Option<&TunnelConfig>) -> TunnelDevice {
    TunnelDevice {
        device: device.name,
        addresses: config.map(|config| config.addresses).unwrap_or_default(),
        prefixes: config.map(|config| config.prefixes.clone()).unwrap_or_default(),
        mtu: device.mtu,
    }
}

fn differ_in_backends_only(one: &Effective, other: &Effective) -> bool {
    let Effective {
        open,
        ingress,
        egress,
        audit,
        rules,
        timeouts,
        orphans_pass,
        tunnel,
        balancers,
    } = one;
    let same = |(a, b): (&Balancer, &Balancer)| {
        let Balancer { name, addresses, ports, algorithm, gateway, backends: _ } = a;
        (name, addresses, ports, algorithm, gateway)
            == (&b.name, &b.addresses, &b.ports, &b.algorithm, &b.gateway)
    };
    (open, ingress, egress, audit, tunnel)
        == (&other.open, &other.ingress, &other.egress, &other.audit, &other.tunnel)
        && (timeouts, orphans_pass) == (&other.timeouts, &other.orphans_pass)
        && balancers.len() == other.balancers.len()
        && balancers.iter().zip(&other.balancers).all(same)
        && *rules == other.rules
}
