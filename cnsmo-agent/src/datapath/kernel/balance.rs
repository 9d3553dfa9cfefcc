//! Virtual addresses and rings in the kernel. What is there is found by its content, so that a restarted agent goes on
//! with what its predecessor made, and touches nothing that stays.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap as Index, HashSet},
    net::IpAddr,
};

use aya::maps::{Array, HashMap, MapData};
use cnsmo_common::{
    balance::{
        BACKENDS_MAX, BACKENDS_PER_BALANCER_MAX, BALANCERS_MAX, Backend, FILTER_WORDS, RING_STRIDE,
        Ring, Service, ServiceKey, algorithm, filter_bit,
    },
    flow::Address as _,
};
use cnsmo_proto::model::{Algorithm, Name};

use super::{GracePeriod, KernelError, Mapped};
use crate::{
    balance::ring,
    effective::{BackendTarget, Balancer},
};

/// Why a balancer is refused, by name.
pub(super) type Refused = BTreeMap<Name, String>;

/// The maps of all balancers.
pub(super) struct Balancers {
    services: HashMap<MapData, ServiceKey, Service>,
    words: Mapped<u64>,
    rings: Mapped<u16>,
    backends: Array<MapData, Backend>,
    /// In the kernel.
    known: BTreeMap<ServiceKey, Service>,
    /// In the kernel, by where they are.
    numbers: Index<Backend, u16>,
    /// A ring was switched: programs may still read the half before.
    read: bool,
}

/// Where balancers go.
pub(super) struct Plan {
    services: BTreeMap<ServiceKey, Service>,
    /// By place.
    places: BTreeMap<u16, Balancer>,
}

impl Plan {
    /// Destinations that need TC on network cards.
    pub(super) fn gateway_filter(&self) -> [u64; FILTER_WORDS] {
        let mut filter = [0; FILTER_WORDS];
        for address in self.gateways().flat_map(|balancer| &balancer.addresses) {
            let (word, bit) = match address {
                IpAddr::V4(address) => filter_bit(address.octets()),
                IpAddr::V6(address) => filter_bit(address.octets()),
            };
            filter[word] |= bit;
        }
        filter
    }

    /// The balancer of a virtual address.
    pub(super) fn balancer_at(&self, address: IpAddr) -> Option<Name> {
        let found = self.places.values().find(|balancer| balancer.addresses.contains(&address));
        found.map(|balancer| balancer.name.clone())
    }

    /// Some balancer serves clients at the network cards.
    pub(super) fn has_gateway(&self) -> bool {
        self.gateways().next().is_some()
    }

    /// There are virtual addresses.
    pub(super) fn has_services(&self) -> bool {
        !self.services.is_empty()
    }

    fn gateways(&self) -> impl Iterator<Item = &Balancer> {
        self.places.values().filter(|balancer| balancer.gateway)
    }
}

impl Balancers {
    pub(super) fn new(
        services: HashMap<MapData, ServiceKey, Service>,
        words: Mapped<u64>,
        rings: Mapped<u16>,
        backends: Array<MapData, Backend>,
    ) -> Result<Self, KernelError> {
        let known: Result<_, _> = services.iter().collect();
        let known = known.map_err(KernelError::kernel("read the virtual addresses"))?;
        let mut numbers = Index::new();
        for id in 0..BACKENDS_MAX as u16 {
            let backend = backends.get(&u32::from(id), 0);
            let backend = backend.map_err(KernelError::kernel("read the backends"))?;
            if backend != Backend::default() {
                numbers.insert(backend, id);
            }
        }
        Ok(Self { services, words, rings, backends, known, numbers, read: true })
    }

    /// Finds a place for each balancer, the one that it has already if it can; changes nothing.
    pub(super) fn plan(&self, balancers: &[Balancer]) -> Result<Plan, Refused> {
        let mut refused = Refused::new();
        let mut plan = Plan { services: BTreeMap::new(), places: BTreeMap::new() };
        let mut left = Vec::new();
        for balancer in balancers {
            let place = self.place_of(balancer);
            match place.filter(|place| !plan.places.contains_key(place)) {
                Some(place) => drop(plan.places.insert(place, balancer.clone())),
                None => left.push(balancer),
            }
        }
        let used: BTreeSet<u16> = self.known.values().map(|service| service.balancer).collect();
        for balancer in left {
            let mut free = (0..BALANCERS_MAX as u16)
                .filter(|place| !used.contains(place) && !plan.places.contains_key(place));
            if let Some(place) = free.next() {
                plan.places.insert(place, balancer.clone());
            } else {
                let why = format!("no room: a VM has {BALANCERS_MAX} balancers at most");
                refused.insert(balancer.name.clone(), why);
            }
        }
        let mut owners = BTreeMap::new();
        let mut backends = HashSet::new();
        for (&place, balancer) in &plan.places {
            if let Err(why) = check(balancer, &mut backends) {
                refused.insert(balancer.name.clone(), why);
            }
            for (key, service) in services(balancer, place) {
                if let Some(owner) = owners.insert(key, &balancer.name) {
                    let why = format!("an address and port belong to `{owner}` already");
                    refused.insert(balancer.name.clone(), why);
                }
                plan.services.insert(key, service);
            }
        }
        if refused.is_empty() { Ok(plan) } else { Err(refused) }
    }

    /// The place that all services of a balancer have that are in the kernel.
    fn place_of(&self, balancer: &Balancer) -> Option<u16> {
        let keys = services(balancer, 0).map(|(key, _)| key);
        let mut places = keys.filter_map(|key| self.known.get(&key)).map(|known| known.balancer);
        let first = places.next()?;
        places.all(|place| place == first).then_some(first)
    }

    /// Makes all of the plan reachable; what is no longer wanted stays, see [`Self::remove`].
    pub(super) fn add(&mut self, plan: &Plan, grace: &GracePeriod) -> Result<(), KernelError> {
        self.steer(plan, grace)?;
        for (key, service) in &plan.services {
            if self.known.get(key) != Some(service) {
                let result = self.services.insert(key, service, 0);
                result.map_err(KernelError::kernel("add a virtual address"))?;
                self.known.insert(*key, *service);
            }
        }
        Ok(())
    }

    /// Writes the rings that differ, and switches each by one store.
    pub(super) fn steer(&mut self, plan: &Plan, grace: &GracePeriod) -> Result<(), KernelError> {
        self.make_room(plan, grace);
        for (&place, balancer) in &plan.places {
            let mut numbered = Vec::new();
            for target in &balancer.backends {
                numbered.push((target.ring_name(), self.number(backend(target))?));
            }
            let slots = ring(balancer.algorithm, numbered);
            let place = usize::from(place);
            let now = Ring(self.words.read(place, 1)[0]);
            let is_same = now.slots() as usize == slots.len()
                && (slots.is_empty() || self.rings.holds(now.first() as usize, &slots));
            if is_same {
                continue;
            }
            self.settle(grace);
            let halves = place * 2 * RING_STRIDE;
            let first = if now.first() as usize == halves { halves + RING_STRIDE } else { halves };
            self.rings.write(first, &slots);
            let next = Ring::new(first as u32, slots.len() as u32);
            self.words.store_word(place * size_of::<u64>(), next.0);
            self.read = true;
        }
        Ok(())
    }

    /// Takes away what is not in the plan.
    pub(super) fn remove(&mut self, plan: &Plan) -> Result<(), KernelError> {
        let gone: Vec<ServiceKey> =
            self.known.keys().filter(|key| !plan.services.contains_key(key)).copied().collect();
        for key in gone {
            let result = self.services.remove(&key);
            result.map_err(KernelError::kernel("remove a virtual address"))?;
            self.known.remove(&key);
        }
        let used: BTreeSet<u16> = plan.places.keys().copied().collect();
        for place in (0..BALANCERS_MAX as u16).filter(|place| !used.contains(place)) {
            self.words.store_word(usize::from(place) * size_of::<u64>(), 0);
        }
        self.read = true;
        Ok(())
    }

    /// The number of a backend; a new one takes a place that no ring has.
    fn number(&mut self, backend: Backend) -> Result<u16, KernelError> {
        if let Some(&number) = self.numbers.get(&backend) {
            return Ok(number);
        }
        let taken: BTreeSet<u16> = self.numbers.values().copied().collect();
        let free = (0..BACKENDS_MAX as u16).find(|number| !taken.contains(number));
        let free = free.ok_or_else(|| KernelError::Refused("no room for a backend".into()))?;
        let result = self.backends.set(u32::from(free), backend, 0);
        result.map_err(KernelError::kernel("add a backend"))?;
        self.numbers.insert(backend, free);
        Ok(free)
    }

    /// If a plan's new backends find no place: frees the numbers that are in no ring and not in the plan, all before the
    /// first is given away. Their addresses stay in the map until a new backend takes the number.
    fn make_room(&mut self, plan: &Plan, grace: &GracePeriod) {
        let targets = plan.places.values().flat_map(|balancer| &balancer.backends);
        let wanted: HashSet<Backend> = targets.map(backend).collect();
        let new = wanted.iter().filter(|backend| !self.numbers.contains_key(backend)).count();
        if self.numbers.len() + new <= BACKENDS_MAX {
            return;
        }
        let mut used = BTreeSet::new();
        for word in self.words.read(0, BALANCERS_MAX) {
            let ring = Ring(word);
            used.extend(self.rings.read(ring.first() as usize, ring.slots() as usize));
        }
        self.read = true;
        self.settle(grace);
        self.numbers.retain(|backend, number| wanted.contains(backend) || used.contains(number));
    }

    /// Waits until no program reads what was replaced.
    fn settle(&mut self, grace: &GracePeriod) {
        if self.read {
            grace.settle();
            self.read = false;
        }
    }
}

fn check(balancer: &Balancer, backends: &mut HashSet<Backend>) -> Result<(), String> {
    let n = balancer.backends.len();
    if n > BACKENDS_PER_BALANCER_MAX {
        return Err(format!("{n} backends; a balancer has {BACKENDS_PER_BALANCER_MAX} at most"));
    }
    backends.extend(balancer.backends.iter().map(backend));
    if backends.len() > BACKENDS_MAX {
        return Err(format!("more than {BACKENDS_MAX} backends on this VM"));
    }
    Ok(())
}

fn backend(target: &BackendTarget) -> Backend {
    Backend {
        v4: target.addresses.v4.map_or([0; 4], |address| address.octets()),
        v6: target.addresses.v6.map_or([0; 16], |address| address.octets()),
        port: target.port.to_be_bytes(),
        pad: [0; 2],
    }
}

fn services(
    balancer: &Balancer,
    place: u16,
) -> impl Iterator<Item = (ServiceKey, Service)> + use<'_> {
    balancer.addresses.iter().flat_map(move |address| {
        let (address, family) = match address {
            IpAddr::V4(address) => (address.octets().widen(), 4),
            IpAddr::V6(address) => (address.octets(), 6),
        };
        balancer.ports.iter().map(move |port| {
            let key =
                ServiceKey { address, port: port.port.to_be_bytes(), proto: port.protocol, family };
            let service = Service {
                balancer: place,
                target: port.target_port.to_be_bytes(),
                algorithm: match balancer.algorithm {
                    Algorithm::Maglev => algorithm::MAGLEV,
                    Algorithm::RoundRobin => algorithm::ROUND_ROBIN,
                    Algorithm::Source => algorithm::SOURCE,
                },
                gateway: u8::from(balancer.gateway),
                pad: [0; 2],
            };
            (key, service)
        })
    })
}
