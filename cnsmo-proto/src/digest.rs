//! A digest of a set of resources that changes in O(1) with each member.

use std::fmt;

use ring::digest::{Context, SHA256};

/// Sum modulo 2^256 of `sha256(name || 0x00 || big-endian 64-bit revision)` over a set of resources, big-endian.
///
/// The order of the members does not matter; the empty set is 32 zero bytes. Equal digests prove equal sets as long as
/// nobody picks revisions freely: a sum of hashes does not withstand chosen members (Bellare and Micciancio, 1997), and
/// revisions are given out by the store.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Digest([u8; Digest::BYTES]);

impl Digest {
    /// Length on the wire.
    pub const BYTES: usize = 32;

    /// Puts a resource into the set.
    pub fn add(&mut self, name: &str, revision: i64) {
        *self = *self + Self(term(name, revision));
    }

    /// Takes a resource out of the set. It must be in it.
    pub fn remove(&mut self, name: &str, revision: i64) {
        let mut borrow = false;
        for (byte, term) in self.0.iter_mut().zip(term(name, revision)).rev() {
            let (difference, first) = byte.overflowing_sub(term);
            let (difference, second) = difference.overflowing_sub(u8::from(borrow));
            *byte = difference;
            borrow = first || second;
        }
    }

    /// The bytes, as in `TypeState.digest`.
    pub fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    /// The same as an owned list, for a message.
    pub fn to_vec(self) -> Vec<u8> {
        self.0.to_vec()
    }
}

fn term(name: &str, revision: i64) -> [u8; Digest::BYTES] {
    let mut context = Context::new(&SHA256);
    context.update(name.as_bytes());
    context.update(&[0]);
    context.update(&revision.to_be_bytes());
    let mut term = [0; Digest::BYTES];
    term.copy_from_slice(context.finish().as_ref());
    term
}

/// The digest of two sets together that have no member in common.
impl std::ops::Add for Digest {
    type Output = Self;
    fn add(mut self, other: Self) -> Self {
        let mut carry = 0;
        for (byte, other) in self.0.iter_mut().zip(other.0).rev() {
            let sum = u16::from(*byte) + u16::from(other) + carry;
            *byte = sum.to_be_bytes()[1];
            carry = sum >> 8;
        }
        self
    }
}

/// The digest of a whole set.
impl<'a> FromIterator<(&'a str, i64)> for Digest {
    fn from_iter<I: IntoIterator<Item = (&'a str, i64)>>(set: I) -> Self {
        let mut digest = Self::default();
        for (name, revision) in set {
            digest.add(name, revision);
        }
        digest
    }
}

impl From<[u8; Digest::BYTES]> for Digest {
    fn from(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }
}

/// Fails if the slice is not 32 bytes long.
impl TryFrom<&[u8]> for Digest {
    type Error = std::array::TryFromSliceError;
    fn try_from(bytes: &[u8]) -> Result<Self, Self::Error> {
        bytes.try_into().map(Self)
    }
}

/// Hexadecimal.
impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Guards the contract of agent.proto: the value was computed with sha256sum over `web\0` and 8 bytes.
    #[test]
    fn one_member_is_its_sha256() {
        let digest: Digest = [("web", 7)].into_iter().collect();
        assert_eq!(
            digest.to_string(),
            "b2d03ea2b0766040c945891fa19a7febd16fe32777e4ff18204ec8349461dbdb"
        );
    }

    #[test]
    fn the_empty_set_is_zero() {
        assert_eq!(Digest::default().as_bytes(), &[0; 32]);
    }

    #[test]
    fn sums_wrap_at_2_to_the_256() {
        let mut digest = Digest::from([0xff; 32]);
        digest.add("web", 7);
        let mut one_less: Digest = [("web", 7)].into_iter().collect();
        let last = one_less.0[31];
        assert_ne!(last, 0, "the value below needs no borrow");
        one_less.0[31] = last - 1;
        assert_eq!(digest, one_less);
        digest.remove("web", 7);
        assert_eq!(digest.as_bytes(), &[0xff; 32]);
    }

    #[test]
    fn other_lengths_are_refused() {
        assert!(Digest::try_from([0_u8; 31].as_slice()).is_err());
        assert!(Digest::try_from([0_u8; 33].as_slice()).is_err());
    }

    proptest! {
        #[test]
        fn edits_in_any_order_give_the_digest_of_the_set(
            edits in prop::collection::vec(("[a-c]{1,2}", 0_i64..4, any::<bool>()), 0..64),
        ) {
            let mut set = BTreeMap::new();
            let mut digest = Digest::default();
            for (name, revision, keep) in edits {
                if let Some(old) = set.remove(&name) {
                    digest.remove(&name, old);
                }
                if keep {
                    digest.add(&name, revision);
                    set.insert(name, revision);
                }
            }
            let whole: Digest = set.iter().map(|(name, revision)| (name.as_str(), *revision)).collect();
            prop_assert_eq!(digest, whole);
        }
    }
}
