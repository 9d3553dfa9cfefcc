//! The chain of the audit: each record's hash covers the one before, so that none can be changed or taken out unseen.

use cnsmo_proto::pb::identity::AuditRecord;
use ring::digest::{Context, SHA256};

/// SHA-256 of the hash before, 32 zero bytes before the first, and of the record: number, time in ms since 1970 and
/// revision as 64 bits, big-endian; then identity, role, call, decision, status and detail, each after its length in bytes.
pub fn hash(previous: &[u8], record: &AuditRecord) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    context.update(previous);
    for number in [record.sequence, time_ms(record), record.revision] {
        context.update(&number.to_be_bytes());
    }
    let AuditRecord { identity, role, rpc, decision, status, detail, .. } = record;
    for text in [identity, role, rpc, decision, status, detail] {
        context.update(&(text.len() as u64).to_be_bytes());
        context.update(text.as_bytes());
    }
    let mut hash = [0; 32];
    hash.copy_from_slice(context.finish().as_ref());
    hash
}

/// When, in ms since 1970.
pub fn time_ms(record: &AuditRecord) -> i64 {
    let time = record.time.unwrap_or_default();
    time.seconds.saturating_mul(1_000).saturating_add(i64::from(time.nanos) / 1_000_000)
}

/// Whether `record` is the one that was written after `previous`; none: the first of all.
pub fn follows(record: &AuditRecord, previous: Option<&AuditRecord>) -> bool {
    let (before, number) = match previous {
        None => ([0; 32].as_slice(), 0),
        Some(previous) => (previous.hash.as_slice(), previous.sequence),
    };
    number.checked_add(1) == Some(record.sequence) && hash(before, record).as_slice() == record.hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_change_shows() {
        let mut first =
            AuditRecord { sequence: 1, identity: "operator/ada".into(), ..Default::default() };
        first.hash = hash(&[0; 32], &first).to_vec();
        let mut second = AuditRecord { sequence: 2, rpc: "Apply".into(), ..Default::default() };
        second.hash = hash(&first.hash, &second).to_vec();
        assert!(follows(&first, None) && follows(&second, Some(&first)));
        assert!(!follows(&second, None));
        let changes: [fn(&mut AuditRecord); 5] = [
            |record| record.identity = "operator/eve".into(),
            |record| record.revision = 1,
            |record| record.sequence = 3,
            |record| record.time = Some(std::time::SystemTime::now().into()),
            // What moves from one text to the next is another record.
            |record| (record.rpc, record.role) = ("Appl".into(), "y".into()),
        ];
        for change in changes {
            let mut changed = second.clone();
            change(&mut changed);
            assert!(!follows(&changed, Some(&first)), "{changed:?}");
        }
    }
}
