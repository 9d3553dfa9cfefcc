//! Which nodes are in which network, and with which addresses.
//!
//! A dynamic address is the lowest free one: nothing but what is given needs to be kept, and the same requests give the
//! same addresses. One that was freed may soon be another VM's; peers know each other by keys, so no packet goes astray.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use cnsmo_proto::{
    model::{Addresses, Name, Network},
    pb::resource::Kind,
};

use super::{Membership, Node, State, Write, check::Next};

/// Members of one network: each of them has a record of all others.
pub const MEMBERS_MAX: usize = 16_384;

/// The nodes whose membership another one must replace after `writes`, with it, by name.
pub(super) fn settle(state: &State, next: &Next<'_>, writes: &[Write]) -> BTreeMap<String, Node> {
    let everywhere = writes.iter().any(Write::is_overlay);
    let mut draft = Draft::new(state, next, everywhere);
    let mut seen = BTreeSet::new();
    for write in writes {
        match write {
            Write::Node(node) => {
                seen.insert(node.metadata.name.as_str());
                draft.look_at(node);
            }
            Write::Delete(Kind::Node, name) => {
                seen.insert(name.as_str());
                draft.leave(name, Addresses::default());
            }
            _ => {}
        }
    }
    let others: Vec<&Node> = if everywhere {
        state.nodes.values().collect()
    } else {
        let waiting = draft.left.iter().filter_map(|network| state.rosters.get(*network));
        waiting
            .flat_map(|roster| &roster.waiting)
            .filter_map(|name| state.nodes.get(name))
            .collect()
    };
    for node in others {
        if !seen.contains(node.metadata.name.as_str()) {
            draft.look_at(node);
        }
    }
    draft.fill()
}

/// A node whose addresses change.
struct Open<'a> {
    node: &'a Node,
    network: &'a str,
    /// It has these already.
    kept: Addresses,
}

struct Draft<'a> {
    state: &'a State,
    next: &'a Next<'a>,
    /// Networks or balancers change: what a node has may not be its any more.
    everywhere: bool,
    /// By name.
    open: BTreeMap<&'a str, Open<'a>>,
    settled: BTreeMap<String, Node>,
    /// Addresses that nodes give up.
    freed: HashSet<IpAddr>,
    /// Networks that nodes leave.
    left: BTreeSet<&'a str>,
    pools: BTreeMap<&'a str, Pool>,
}

/// What is left of a network.
struct Pool {
    /// Static and virtual addresses.
    reserved: HashSet<IpAddr>,
    members: usize,
    /// All below are taken.
    next_v4: Option<u32>,
    next_v6: Option<u128>,
}

impl<'a> Draft<'a> {
    fn new(state: &'a State, next: &'a Next<'a>, everywhere: bool) -> Self {
        Self {
            state,
            next,
            everywhere,
            open: BTreeMap::new(),
            settled: BTreeMap::new(),
            freed: HashSet::new(),
            left: BTreeSet::new(),
            pools: BTreeMap::new(),
        }
    }

    /// Finds the network of a node, and what it keeps of its addresses.
    fn look_at(&mut self, node: &'a Node) {
        let name = node.metadata.name.as_str();
        let Some((network, model)) = self.next.home(&node.labels) else {
            self.leave(name, Addresses::default());
            if node.membership.is_some() {
                self.settled.insert(name.to_owned(), Node { membership: None, ..node.clone() });
            }
            return;
        };
        let (had, kept) = match &node.membership {
            Some(Membership { network: old, addresses: Some(had) }) if old == network => {
                (*had, self.kept(name, network, model, *had))
            }
            _ => Default::default(),
        };
        if kept != had || !is_complete(kept, model) {
            self.leave(name, kept);
            self.open.insert(name, Open { node, network, kept });
        }
    }

    fn kept(&mut self, node: &str, network: &'a str, model: &Network, had: Addresses) -> Addresses {
        if !self.everywhere {
            return had;
        }
        let fixed = fixed(model, node);
        let reserved = &self.pool(network).reserved;
        let keeps = |has: IpAddr, fixed: Option<IpAddr>| {
            fixed
                .map_or_else(|| model.usable(has) && !reserved.contains(&has), |fixed| fixed == has)
        };
        Addresses {
            v4: had.v4.filter(|v4| keeps((*v4).into(), fixed.v4.map(Into::into))),
            v6: had.v6.filter(|v6| keeps((*v6).into(), fixed.v6.map(Into::into))),
        }
    }

    /// Takes a node out of its network, with what it has and does not keep.
    fn leave(&mut self, node: &str, kept: Addresses) {
        let state = self.state;
        let Some((_, network, had)) = state.member(node) else { return };
        self.freed.extend(had.iter().filter(|address| !kept.iter().any(|kept| kept == *address)));
        self.left.insert(network);
        self.pool(network).members -= 1;
    }

    /// Gives addresses to those who need them, by name.
    fn fill(mut self) -> BTreeMap<String, Node> {
        for (name, Open { node, network, kept }) in std::mem::take(&mut self.open) {
            let addresses = self.allocate(name, network, kept);
            let membership = Some(Membership { network: network.to_owned(), addresses });
            if node.membership != membership {
                self.settled.insert(name.to_owned(), Node { membership, ..node.clone() });
            }
        }
        self.settled
    }

    fn allocate(&mut self, node: &str, network: &'a str, kept: Addresses) -> Option<Addresses> {
        let model = &self.next.networks.get(network)?.model;
        let fixed = fixed(model, node);
        let (owners, freed) = (&self.state.owners, std::mem::take(&mut self.freed));
        let pool = self.pool(network);
        let free = |reserved: &HashSet<IpAddr>, address: IpAddr| {
            !reserved.contains(&address)
                && (!owners.contains_key(&address) || freed.contains(&address))
        };
        let mut addresses = Addresses { v4: kept.v4.or(fixed.v4), v6: kept.v6.or(fixed.v6) };
        if let (None, Some(net)) = (addresses.v4, model.ipv4) {
            let first = pool.next_v4.unwrap_or(u32::from(net.network()) + 1);
            let mut range = (first..u32::from(net.broadcast())).map(Ipv4Addr::from);
            addresses.v4 = range.find(|v4| free(&pool.reserved, (*v4).into()));
            pool.next_v4 = Some(addresses.v4.map_or(u32::MAX, |v4| u32::from(v4) + 1));
        }
        if let (None, Some(net)) = (addresses.v6, model.ipv6) {
            let first = pool.next_v6.unwrap_or(u128::from(net.network()) + 1);
            let mut range = (first..u128::from(net.broadcast())).map(Ipv6Addr::from);
            addresses.v6 = range.find(|v6| free(&pool.reserved, (*v6).into()));
            pool.next_v6 = Some(addresses.v6.map_or(u128::MAX, |v6| u128::from(v6) + 1));
        }
        let fits = pool.members < MEMBERS_MAX && is_complete(addresses, model);
        pool.members += usize::from(fits);
        self.freed = freed;
        fits.then_some(addresses)
    }

    fn pool(&mut self, network: &'a str) -> &mut Pool {
        self.pools.entry(network).or_insert_with(|| {
            let model = self.next.networks.get(network).map(|network| &network.model);
            let fixed = model.into_iter().flat_map(|model| model.addresses.values());
            let fixed = fixed.flat_map(|addresses| addresses.iter());
            Pool {
                reserved: fixed.chain(self.next.virtual_addresses()).collect(),
                members: self.state.rosters.get(network).map_or(0, |roster| roster.members.len()),
                next_v4: None,
                next_v6: None,
            }
        })
    }
}

fn fixed(network: &Network, node: &str) -> Addresses {
    let name = Name::new(node).ok();
    name.and_then(|name| network.addresses.get(&name).copied()).unwrap_or_default()
}

/// One address for each family of the network, and no other.
fn is_complete(addresses: Addresses, network: &Network) -> bool {
    addresses.v4.is_some() == network.ipv4.is_some()
        && addresses.v6.is_some() == network.ipv6.is_some()
}

#[cfg(test)]
mod tests;
