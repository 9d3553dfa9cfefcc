//! The key pair of this VM's tunnel. Its private half never leaves the VM.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use cnsmo_proto::model::PublicKey;
use cnsmo_service::durable;
use ring::rand::{SecureRandom as _, SystemRandom};
use x25519_dalek::StaticSecret;
use zeroize::Zeroizing;

/// An X25519 private key (RFC 7748). Its memory is cleared on drop.
#[derive(Clone)]
pub struct PrivateKey(Zeroizing<[u8; 32]>);

/// The key cannot be read or made.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Of the file system.
    #[error("cannot use {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The content is not 32 bytes. It is not replaced: peers know the public half of another key.
    #[error("{} is not a key of 32 bytes; remove it to have a new one made", path.display())]
    NotAKey {
        /// The file.
        path: PathBuf,
    },
    /// The operating system has no random numbers.
    #[error("no random numbers")]
    NoRandomness,
}

impl PrivateKey {
    /// Reads the key in `path`, or makes one there.
    ///
    /// # Errors
    /// See [`KeyError`].
    pub fn open(path: &Path) -> Result<Self, KeyError> {
        match Self::load(path) {
            Err(KeyError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                let key = Self::generate()?;
                durable::write(path, &*key.0, 0o600)
                    .map_err(|source| KeyError::File { path: path.to_owned(), source })?;
                Ok(key)
            }
            other => other,
        }
    }

    /// Reads the key in `path`.
    ///
    /// # Errors
    /// See [`KeyError`].
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        let content = fs::read(path)
            .map(Zeroizing::new)
            .map_err(|source| KeyError::File { path: path.to_owned(), source })?;
        let bytes = content.as_slice().try_into();
        let bytes = bytes.map_err(|_| KeyError::NotAKey { path: path.to_owned() })?;
        Ok(Self(Zeroizing::new(bytes)))
    }

    fn generate() -> Result<Self, KeyError> {
        let mut bytes = Zeroizing::new([0; 32]);
        SystemRandom::new().fill(&mut *bytes).map_err(|_| KeyError::NoRandomness)?;
        Ok(Self(bytes))
    }

    /// The half that peers know.
    pub fn public(&self) -> PublicKey {
        PublicKey(x25519_dalek::PublicKey::from(&self.secret()).to_bytes())
    }

    pub(super) fn secret(&self) -> StaticSecret {
        StaticSecret::from(*self.0)
    }

    pub(super) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_for_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let made = PrivateKey::open(&path).unwrap();
        assert_eq!(PrivateKey::open(&path).unwrap().public(), made.public());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let other = PrivateKey::open(&dir.path().join("other")).unwrap();
        assert_ne!(other.public(), made.public());
    }

    #[test]
    fn a_damaged_key_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        fs::write(&path, [7; 31]).unwrap();
        assert!(matches!(PrivateKey::open(&path), Err(KeyError::NotAKey { .. })));
        assert_eq!(fs::read(&path).unwrap(), [7; 31]);
    }

    /// RFC 7748, section 5.2: one iteration from the base point.
    #[test]
    fn the_public_half_is_that_of_the_standard() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let mut private = [0; 32];
        private[0] = 9;
        fs::write(&path, private).unwrap();
        let public: String = PrivateKey::load(&path)
            .unwrap()
            .public()
            .0
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        assert_eq!(public, "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079");
    }

    #[test]
    fn a_key_is_not_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        fs::write(&path, [119; 32]).unwrap();
        assert_eq!(format!("{:?}", PrivateKey::load(&path).unwrap()), "PrivateKey(redacted)");
    }
}
