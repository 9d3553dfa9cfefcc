//! Page tokens: which revision a list is of, and the last key that was looked at.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::digest::{SHA256, digest};

use crate::{error::Error, store::Revision};

/// First byte of a token: the form of the rest.
const FORM: u8 = 1;
/// Of the digest that tells a token of this core and this prefix from other text. It is no secret: a token gives no right.
const CHECK_BYTES: usize = 8;
const HEAD_BYTES: usize = 1 + CHECK_BYTES + size_of::<Revision>();

/// A token for the page behind `last`.
pub(super) fn encode(revision: Revision, prefix: &str, last: &str) -> String {
    let mut token = Vec::with_capacity(HEAD_BYTES + last.len());
    token.push(FORM);
    token.extend(check(revision, prefix, last));
    token.extend(revision.to_be_bytes());
    token.extend(last.as_bytes());
    URL_SAFE_NO_PAD.encode(token)
}

/// Revision and key. None: an empty token, for the first page.
pub(super) fn decode(token: &str, prefix: &str) -> Result<Option<(Revision, String)>, Error> {
    if token.is_empty() {
        return Ok(None);
    }
    let page =
        parse(token).filter(|(found, revision, last)| *found == check(*revision, prefix, last));
    let (_, revision, last) = page.ok_or_else(|| {
        Error::Invalid("page_token: is not one that a list with this prefix has given".into())
    })?;
    Ok(Some((revision, last)))
}

fn parse(token: &str) -> Option<([u8; CHECK_BYTES], Revision, String)> {
    let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
    let (&form, rest) = bytes.split_first()?;
    let (check, rest) = rest.split_first_chunk()?;
    let (revision, last) = rest.split_first_chunk()?;
    let last = String::from_utf8(last.to_vec()).ok()?;
    (form == FORM).then(|| (*check, Revision::from_be_bytes(*revision), last))
}

fn check(revision: Revision, prefix: &str, last: &str) -> [u8; CHECK_BYTES] {
    // A key holds no control characters: the parts cannot run into each other.
    let text = format!("{revision}\0{prefix}\0{last}");
    let mut check = [0; CHECK_BYTES];
    check.copy_from_slice(&digest(&SHA256, text.as_bytes()).as_ref()[..CHECK_BYTES]);
    check
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_token_of_the_same_list_is_taken() {
        let token = encode(7, "a/", "a/ü");
        assert_eq!(decode(&token, "a/").unwrap(), Some((7, "a/ü".to_owned())));
        assert_eq!(decode("", "a/").unwrap(), None);
        assert!(decode(&token, "a").is_err());
        let bytes = URL_SAFE_NO_PAD.decode(&token).unwrap();
        for at in 1..bytes.len() {
            let mut wrong = bytes.clone();
            wrong[at] ^= 1;
            assert!(decode(&URL_SAFE_NO_PAD.encode(&wrong), "a/").is_err(), "byte {at}");
            assert!(decode(&URL_SAFE_NO_PAD.encode(&bytes[..at]), "a/").is_err(), "cut to {at}");
        }
    }
}
