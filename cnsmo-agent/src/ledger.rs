//! The last good set of resources on disk, so that a VM that boots without its core is guarded all the same.
//!
//! One file: magic and version (8 bytes) | length of the record (8, little-endian) | record (protobuf) | SHA-256 of all
//! before. The one before it is kept beside it as `.1`.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use cnsmo_proto::pb::agent::{Resource, ResourceError};
use cnsmo_service::durable;
use prost::Message as _;
use ring::digest::{SHA256, digest};

/// The last byte is the version.
const MAGIC: [u8; 8] = *b"cnsmolg\x02";
const HEADER_BYTES: usize = 16;
const CHECKSUM_BYTES: usize = 32;
/// Larger files are not read: four times the largest set that is sensible.
const FILE_BYTES_MAX: u64 = 256 << 20;
const FILE: &str = "policy.ledger";

/// What is kept.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Record {
    /// Of the store that the revisions belong to.
    #[prost(uint64, tag = "1")]
    pub store_epoch: u64,
    /// Of the set.
    #[prost(int64, tag = "2")]
    pub revision: i64,
    /// What runs.
    #[prost(message, repeated, tag = "3")]
    pub resources: Vec<Resource>,
    /// What was sent and refused.
    #[prost(message, repeated, tag = "4")]
    pub rejected: Vec<ResourceError>,
    /// Where the core was last: a policy may cut the VM from its name server.
    #[prost(string, repeated, tag = "5")]
    pub core_addresses: Vec<String>,
    /// What was in force before, as long as the core has not confirmed this.
    #[prost(message, optional, boxed, tag = "6")]
    pub before: Option<Box<Record>>,
    /// How long it has for that, in milliseconds.
    #[prost(uint64, tag = "7")]
    pub confirm_window_ms: u64,
}

/// The ledger in a state directory, which is locked by its owner.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    /// Only a good file may take the place of the previous one.
    current_is_good: bool,
}

/// What was found.
#[derive(Clone, Debug, PartialEq)]
pub enum Loaded {
    /// There never was a ledger here.
    Nothing,
    /// The newest record.
    Current(Record),
    /// The one before the newest, which is damaged.
    Previous(Record, String),
    /// Only damaged files.
    Damaged(String),
}

impl Ledger {
    /// Reads the ledger in `dir`. Never fails: what cannot be read is damaged.
    pub fn open(dir: &Path) -> (Self, Loaded) {
        let path = dir.join(FILE);
        let current = read(&path);
        let current_is_good = matches!(current, Ok(Some(_)));
        let loaded = match current {
            Ok(Some(record)) => Loaded::Current(record),
            current => match (current, read(&previous(&path))) {
                (Err(damage), Ok(Some(record))) => Loaded::Previous(record, damage),
                (_, Ok(Some(record))) => Loaded::Previous(record, "the newest is missing".into()),
                (Err(damage), _) | (_, Err(damage)) => Loaded::Damaged(damage),
                (_, Ok(None)) => Loaded::Nothing,
            },
        };
        (Self { path, current_is_good }, loaded)
    }

    /// Makes `record` the newest; the newest becomes the previous one. On return both survive a loss of power.
    ///
    /// # Errors
    /// Of the file system; the newest one is then still there.
    pub fn write(&mut self, record: &Record) -> io::Result<()> {
        if self.current_is_good {
            let previous = previous(&self.path);
            match fs::remove_file(&previous) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => fs::hard_link(&self.path, &previous)?,
            }
        }
        durable::write(&self.path, &encode(record), 0o600)?;
        self.current_is_good = true;
        Ok(())
    }
}

fn previous(path: &Path) -> PathBuf {
    durable::with_suffix(path, ".1")
}

fn read(path: &Path) -> Result<Option<Record>, String> {
    let damage = |reason: &dyn std::fmt::Display| format!("{}: {reason}", path.display());
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(damage(&e)),
    };
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|e| damage(&e))?;
    decode(&bytes).map(Some).map_err(|e| damage(&e))
}

fn encode(record: &Record) -> Vec<u8> {
    let body = record.encode_to_vec();
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len() + CHECKSUM_BYTES);
    bytes.extend(MAGIC);
    bytes.extend((body.len() as u64).to_le_bytes());
    bytes.extend(body);
    let checksum = digest(&SHA256, &bytes);
    bytes.extend(checksum.as_ref());
    bytes
}

fn decode(bytes: &[u8]) -> Result<Record, &'static str> {
    let (content, checksum) = bytes.split_last_chunk::<CHECKSUM_BYTES>().ok_or("cut short")?;
    let (magic, rest) = content.split_first_chunk::<8>().ok_or("cut short")?;
    if magic[..7] != MAGIC[..7] {
        return Err("not a ledger");
    }
    if magic[7] != MAGIC[7] {
        return Err("a ledger of another version");
    }
    let (length, body) = rest.split_first_chunk::<8>().ok_or("cut short")?;
    if u64::from_le_bytes(*length) != body.len() as u64 {
        return Err("not of the length it says");
    }
    if digest(&SHA256, content).as_ref() != checksum {
        return Err("the checksum does not fit");
    }
    Record::decode(body).map_err(|_| "the record cannot be decoded")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(revision: i64) -> Record {
        let resource = Resource { name: "web".into(), version: revision, spec: None };
        Record { store_epoch: 7, revision, resources: vec![resource], ..Record::default() }
    }

    fn damage(path: &Path) {
        let mut bytes = fs::read(path).unwrap();
        bytes[20] ^= 1;
        fs::write(path, bytes).unwrap();
    }

    #[test]
    fn the_newest_good_record_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let (mut ledger, loaded) = Ledger::open(dir.path());
        assert_eq!(loaded, Loaded::Nothing);

        ledger.write(&record(1)).unwrap();
        ledger.write(&record(2)).unwrap();
        assert_eq!(Ledger::open(dir.path()).1, Loaded::Current(record(2)));

        damage(&path);
        let (mut ledger, loaded) = Ledger::open(dir.path());
        let Loaded::Previous(found, reason) = loaded else { panic!("{loaded:?}") };
        assert_eq!(found, record(1));
        assert!(reason.contains("checksum"), "{reason}");

        // The damaged file must not take the place of the good one.
        ledger.write(&record(3)).unwrap();
        assert_eq!(read(&previous(&path)).unwrap(), Some(record(1)));
        assert_eq!(Ledger::open(dir.path()).1, Loaded::Current(record(3)));

        damage(&path);
        damage(&previous(&path));
        assert!(matches!(Ledger::open(dir.path()).1, Loaded::Damaged(_)));

        fs::remove_file(&path).unwrap();
        fs::remove_file(previous(&path)).unwrap();
        assert_eq!(Ledger::open(dir.path()).1, Loaded::Nothing);
    }

    #[test]
    fn a_crash_between_the_two_files_leaves_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        let (mut ledger, _) = Ledger::open(dir.path());
        ledger.write(&record(1)).unwrap();
        ledger.write(&record(2)).unwrap();
        fs::remove_file(dir.path().join(FILE)).unwrap();
        assert!(
            matches!(Ledger::open(dir.path()).1, Loaded::Previous(found, _) if found == record(1))
        );
    }

    #[test]
    fn a_write_that_fails_keeps_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        let (mut ledger, _) = Ledger::open(dir.path());
        ledger.write(&record(1)).unwrap();
        // A directory in the place of the temporary file.
        fs::create_dir(dir.path().join("policy.ledger.new")).unwrap();
        ledger.write(&record(2)).unwrap_err();
        assert_eq!(Ledger::open(dir.path()).1, Loaded::Current(record(1)));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let good = encode(&record(3));
        assert_eq!(decode(&good), Ok(record(3)));
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                assert!(decode(&bad).is_err(), "bit {bit} of byte {at}");
            }
            assert!(decode(&good[..at]).is_err(), "cut at {at}");
        }
        assert!(decode(&[good.as_slice(), &[0]].concat()).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(decode(&bytes).is_err());
        }

        #[test]
        fn a_record_that_only_the_checksum_vouches_for_does_not_panic(
            body in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut bytes = [MAGIC.as_slice(), &(body.len() as u64).to_le_bytes(), &body].concat();
            bytes.extend(digest(&SHA256, &bytes.clone()).as_ref());
            prop_assert_eq!(decode(&bytes).ok(), Record::decode(body.as_slice()).ok());
        }
    }
}
