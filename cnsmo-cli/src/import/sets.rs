//! Sets of numbers, and the packets that a rule matches as a product of such sets.

/// Numbers from 0 to `last`, as sorted ranges that neither overlap nor touch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ranges {
    ranges: Vec<(u128, u128)>,
    last: u128,
}

impl Ranges {
    pub(super) fn none(last: u128) -> Self {
        Self { ranges: vec![], last }
    }

    pub(super) fn all(last: u128) -> Self {
        Self { ranges: vec![(0, last)], last }
    }

    pub(super) fn one(last: u128, number: u128) -> Self {
        Self::of(last, [(number, number)])
    }

    /// Of ranges in any order, both ends included. What is above `last` does not exist.
    pub(super) fn of(last: u128, ranges: impl IntoIterator<Item = (u128, u128)>) -> Self {
        let within = ranges.into_iter().filter(|(first, end)| first <= end && *first <= last);
        let mut sorted: Vec<_> = within.map(|(first, end)| (first, end.min(last))).collect();
        sorted.sort_unstable();
        let mut ranges: Vec<(u128, u128)> = Vec::with_capacity(sorted.len());
        for (first, end) in sorted {
            match ranges.last_mut() {
                Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(end),
                _ => ranges.push((first, end)),
            }
        }
        Self { ranges, last }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    pub(super) fn is_all(&self) -> bool {
        self.ranges == [(0, self.last)]
    }

    pub(super) fn contains(&self, number: u128) -> bool {
        let at = self.ranges.partition_point(|(_, end)| *end < number);
        self.ranges.get(at).is_some_and(|(first, _)| *first <= number)
    }

    pub(super) fn is_within(&self, other: &Self) -> bool {
        other.is_all() || self.and(other) == *self
    }

    pub(super) fn and(&self, other: &Self) -> Self {
        let (mut i, mut j, mut ranges) = (0, 0, vec![]);
        while let (Some(a), Some(b)) = (self.ranges.get(i), other.ranges.get(j)) {
            let (first, end) = (a.0.max(b.0), a.1.min(b.1));
            if first <= end {
                ranges.push((first, end));
            }
            if a.1 < b.1 {
                i += 1;
            } else {
                j += 1;
            }
        }
        Self { ranges, last: self.last }
    }

    pub(super) fn not(&self) -> Self {
        let mut ranges = vec![];
        let mut next = Some(0);
        for (first, end) in &self.ranges {
            if let Some(from) = next.filter(|from| from < first) {
                ranges.push((from, first - 1));
            }
            next = end.checked_add(1);
        }
        if let Some(from) = next.filter(|from| *from <= self.last) {
            ranges.push((from, self.last));
        }
        Self { ranges, last: self.last }
    }

    pub(super) fn iter(&self) -> impl ExactSizeIterator<Item = (u128, u128)> + '_ {
        self.ranges.iter().copied()
    }
}

/// What a rule can ask of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Field {
    Source4,
    Destination4,
    Source6,
    Destination6,
    Protocol,
    SourcePort,
    Port,
    /// Type and code, as `type << 8 | code`.
    Icmp4,
    Icmp6,
    /// Of connection tracking, as [`state`].
    State,
    /// That it came by, as [`device`].
    InputDevice,
    /// That it leaves by.
    OutputDevice,
}

impl Field {
    const ADDRESSES: [Self; 4] =
        [Self::Source4, Self::Source6, Self::Destination4, Self::Destination6];
    const OTHERS: [Self; 8] = [
        Self::Protocol,
        Self::SourcePort,
        Self::Port,
        Self::Icmp4,
        Self::Icmp6,
        Self::State,
        Self::InputDevice,
        Self::OutputDevice,
    ];
    const COUNT: usize = 12;

    /// Its greatest value.
    pub(super) fn last(self) -> u128 {
        match self {
            Self::Source4 | Self::Destination4 => u32::MAX.into(),
            Self::Source6 | Self::Destination6 => u128::MAX,
            Self::Protocol => u8::MAX.into(),
            Self::SourcePort | Self::Port | Self::Icmp4 | Self::Icmp6 => u16::MAX.into(),
            Self::State => state::UNTRACKED,
            Self::InputDevice | Self::OutputDevice => device::ABSENT,
        }
    }
}

/// States of connection tracking.
pub(super) mod state {
    pub(in crate::import) const NEW: u128 = 0;
    pub(in crate::import) const ESTABLISHED: u128 = 1;
    pub(in crate::import) const RELATED: u128 = 2;
    pub(in crate::import) const INVALID: u128 = 3;
    pub(in crate::import) const UNTRACKED: u128 = 4;
}

/// Devices that rules tell apart here.
pub(super) mod device {
    use cnsmo_proto::model::Direction;

    use super::{Field, Ranges};

    pub(in crate::import) const LOOPBACK: u128 = 0;
    /// Every other one.
    pub(in crate::import) const CARD: u128 = 1;
    /// None: what comes in has not left, and what leaves has not come in.
    pub(in crate::import) const ABSENT: u128 = 2;

    /// Of packets in one direction: where they come by, and where they leave by.
    pub(in crate::import) fn of(direction: Direction, devices: &[u128]) -> [(Field, Ranges); 2] {
        let set = |devices: &[u128]| Ranges::of(ABSENT, devices.iter().map(|one| (*one, *one)));
        let (here, absent) = (set(devices), set(&[ABSENT]));
        match direction {
            Direction::Ingress => [(Field::InputDevice, here), (Field::OutputDevice, absent)],
            Direction::Egress => [(Field::InputDevice, absent), (Field::OutputDevice, here)],
        }
    }
}

/// Packets whose fields are all in these sets: of one family those of `Source4` and `Destination4`, of the other those of
/// `Source6` and `Destination6`, and the other fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Match {
    sets: [Ranges; Field::COUNT],
    /// Of packets that begin no flow it matches fewer than the sets say, by their TCP flags.
    pub(super) narrow: bool,
}

impl Match {
    pub(super) fn all() -> Self {
        let all = |n| {
            let both = Field::ADDRESSES.into_iter().chain(Field::OTHERS);
            Ranges::all(both.into_iter().find(|f| *f as usize == n).map_or(0, Field::last))
        };
        Self { sets: std::array::from_fn(all), narrow: false }
    }

    /// Every packet of these families.
    pub(super) fn families(v4: bool, v6: bool) -> Self {
        let mut all = Self::all();
        for (given, fields) in [
            (v4, [Field::Source4, Field::Destination4]),
            (v6, [Field::Source6, Field::Destination6]),
        ] {
            for field in fields.into_iter().filter(|_| !given) {
                all = all.with(field, Ranges::none(field.last()));
            }
        }
        all
    }

    pub(super) fn get(&self, field: Field) -> &Ranges {
        &self.sets[field as usize]
    }

    /// With another set in the place of a field's.
    pub(super) fn with(mut self, field: Field, set: Ranges) -> Self {
        self.sets[field as usize] = set;
        for (a, b) in [(Field::Source4, Field::Destination4), (Field::Source6, Field::Destination6)]
        {
            // One way to write "no packet of this family".
            if self.get(a).is_empty() || self.get(b).is_empty() {
                self.sets[a as usize] = Ranges::none(a.last());
                self.sets[b as usize] = Ranges::none(b.last());
            }
        }
        self
    }

    pub(super) fn has_v4(&self) -> bool {
        !self.get(Field::Source4).is_empty()
    }

    pub(super) fn has_v6(&self) -> bool {
        !self.get(Field::Source6).is_empty()
    }

    pub(super) fn is_empty(&self) -> bool {
        !(self.has_v4() || self.has_v6())
            || Field::OTHERS.iter().any(|field| self.get(*field).is_empty())
    }

    pub(super) fn is_within(&self, other: &Self) -> bool {
        self.sets.iter().zip(&other.sets).all(|(a, b)| a.is_within(b))
    }

    /// None if no packet is in both.
    pub(super) fn and(&self, other: &Self) -> Option<Self> {
        let mut both = self.clone();
        both.narrow |= other.narrow;
        for field in Field::ADDRESSES.into_iter().chain(Field::OTHERS) {
            let set = self.get(field).and(other.get(field));
            both.sets[field as usize] = set;
        }
        let both = both.with(Field::State, self.get(Field::State).and(other.get(Field::State)));
        (!both.is_empty()).then_some(both)
    }

    /// What is not in `other`, in disjoint parts.
    pub(super) fn minus(&self, other: &Self) -> Vec<Self> {
        let (mut parts, mut rest) = (vec![], self.clone());
        let [source4, source6, destination4, destination6] = Field::ADDRESSES;
        let steps = [vec![source4, source6], vec![destination4, destination6]];
        for fields in steps.into_iter().chain(Field::OTHERS.map(|field| vec![field])) {
            let (mut part, mut inner) = (rest.clone(), rest);
            for field in fields {
                let set = part.get(field).and(&other.get(field).not());
                let shared = inner.get(field).and(other.get(field));
                part = part.with(field, set);
                inner = inner.with(field, shared);
            }
            if !part.is_empty() {
                parts.push(part);
            }
            if inner.is_empty() {
                return parts;
            }
            rest = inner;
        }
        parts
    }

    /// In proportion to its memory.
    pub(super) fn size(&self) -> usize {
        self.sets.iter().map(|set| set.iter().len()).sum()
    }
}
