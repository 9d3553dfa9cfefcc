use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn names(n: usize) -> Vec<String> {
    (0..n).map(|n| format!("backend-{n}")).collect()
}

fn numbered(names: &[String]) -> Vec<(&str, u16)> {
    names.iter().map(String::as_str).zip(0..).collect()
}

fn shares(ring: &[u16]) -> BTreeMap<u16, usize> {
    let mut shares = BTreeMap::new();
    for id in ring {
        *shares.entry(*id).or_default() += 1;
    }
    shares
}

/// Slots that belong to another backend than before, though theirs is still there.
fn moved(before: &[u16], after: &[u16], changed: u16) -> usize {
    let moved = |(b, a): &(&u16, &u16)| b != a && **b != changed && **a != changed;
    before.iter().zip(after).filter(moved).count()
}

#[test]
fn no_backend_is_an_empty_ring() {
    for algorithm in [Algorithm::Maglev, Algorithm::Source, Algorithm::RoundRobin] {
        assert_eq!(ring(algorithm, vec![]), [0; 0]);
    }
}

#[test]
fn turns_go_round_by_name() {
    let names = names(3);
    let shuffled = vec![(names[2].as_str(), 7), (names[0].as_str(), 9), (names[1].as_str(), 8)];
    assert_eq!(ring(Algorithm::RoundRobin, shuffled), [9, 8, 7]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn all_backends_have_the_same_share(n in 1_usize..1_025) {
        let names = names(n);
        let ring = ring(Algorithm::Maglev, numbered(&names));
        prop_assert_eq!(ring.len(), RING_SLOTS);
        let shares = shares(&ring);
        prop_assert_eq!(shares.len(), n);
        let (least, most) = (RING_SLOTS / n, RING_SLOTS.div_ceil(n));
        prop_assert!(shares.values().all(|share| (least..=most).contains(share)));
    }

    #[test]
    fn the_order_of_backends_does_not_matter(
        mut order in Just((0..20_usize).collect::<Vec<_>>()).prop_shuffle(),
    ) {
        let names = names(20);
        let numbered = numbered(&names);
        let shuffled = order.drain(..).map(|n| numbered[n]).collect();
        prop_assert_eq!(
            ring(Algorithm::Maglev, shuffled),
            ring(Algorithm::Maglev, numbered.clone())
        );
    }

    /// Of the slots whose backend is there before and after, few change hands.
    #[test]
    fn the_loss_of_a_backend_moves_few_others(n in 2_usize..100, lost: prop::sample::Index) {
        let (names, lost) = (names(n), lost.index(n));
        let all = numbered(&names);
        let mut rest = all.clone();
        rest.remove(lost);
        let before = ring(Algorithm::Maglev, all);
        let after = ring(Algorithm::Maglev, rest);
        let moved = moved(&before, &after, lost as u16);
        prop_assert!(moved * 100 <= RING_SLOTS * 5, "{moved} slots moved");
    }
}
