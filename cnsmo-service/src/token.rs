//! Join tokens: what an operator hands to a VM so that it can enrol.

use std::{fmt, str::FromStr};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::{
    digest::{SHA256, digest},
    rand::{SecureRandom as _, SystemRandom},
};

/// First part of every token; names the format.
pub const PREFIX: &str = "cnsmo1";

const ID_BYTES: usize = 12;
const SECRET_BYTES: usize = 32;
const HASH_BYTES: usize = 32;
/// `cnsmo1`, three dots, and the parts in base64: what any token is long.
const TOKEN_BYTES: usize = PREFIX.len() + 3 + 16 + 43 + 43;

/// `cnsmo1.<id>.<secret>.<sha256 of the CA's public key info>`, the parts in unpadded base64url (RFC 4648, section 5).
///
/// The last part pins the CA: a VM trusts no core but the one that made its token. [`fmt::Display`] gives the whole
/// token with its secret; [`fmt::Debug`] leaves the secret out.
#[derive(Clone)]
pub struct Token {
    id: [u8; ID_BYTES],
    secret: [u8; SECRET_BYTES],
    ca: [u8; HASH_BYTES],
}

impl Token {
    /// A new token with a random id and secret. Fails if the system has no random numbers.
    pub fn generate(ca_spki_sha256: [u8; HASH_BYTES]) -> Result<Self, ring::error::Unspecified> {
        let mut token = Self { id: [0; ID_BYTES], secret: [0; SECRET_BYTES], ca: ca_spki_sha256 };
        let random = SystemRandom::new();
        random.fill(&mut token.id)?;
        random.fill(&mut token.secret)?;
        Ok(token)
    }

    /// The public part, under which the core keeps the token.
    pub fn id(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.id)
    }

    /// What the core keeps of the secret. 256 random bits need no salt and no slow hash.
    pub fn secret_sha256(&self) -> [u8; HASH_BYTES] {
        let mut hash = [0; HASH_BYTES];
        hash.copy_from_slice(digest(&SHA256, &self.secret).as_ref());
        hash
    }

    /// SHA-256 of the DER `SubjectPublicKeyInfo` of the CA that the core's certificate must lead to.
    pub fn ca_spki_sha256(&self) -> &[u8; HASH_BYTES] {
        &self.ca
    }
}

/// The whole token, secret included.
impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [secret, ca] = [self.secret, self.ca].map(|part| URL_SAFE_NO_PAD.encode(part));
        write!(f, "{PREFIX}.{}.{secret}.{ca}", self.id())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({PREFIX}.{}.[redacted])", self.id())
    }
}

/// Why a text is not a join token. Never quotes the text: it may be a damaged secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Does not start with `cnsmo1.`.
    #[error("a join token starts with `{PREFIX}.`")]
    Prefix,
    /// Other than 110 characters.
    #[error("a join token has {TOKEN_BYTES} characters, this text has {0}: was it cut?")]
    Length(usize),
    /// Other than four parts.
    #[error("a join token has four parts with dots between them")]
    Parts,
    /// A part that is not base64url of its length.
    #[error("the {0} of the join token is damaged")]
    Damaged(&'static str),
}

/// Takes exactly what [`fmt::Display`] writes: no padding, no blanks.
impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let mut parts = text.split('.');
        if parts.next() != Some(PREFIX) {
            return Err(TokenError::Prefix);
        }
        if text.len() != TOKEN_BYTES {
            return Err(TokenError::Length(text.chars().count()));
        }
        let (Some(id), Some(secret), Some(ca), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(TokenError::Parts);
        };
        Ok(Self {
            id: decode(id, "id")?,
            secret: decode(secret, "secret")?,
            ca: decode(ca, "pin of the CA")?,
        })
    }
}

fn decode<const N: usize>(part: &str, what: &'static str) -> Result<[u8; N], TokenError> {
    let bytes = URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenError::Damaged(what))?;
    bytes.try_into().map_err(|_| TokenError::Damaged(what))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn debug_shows_the_id_alone() {
        let token = Token::generate([7; 32]).unwrap();
        let text = token.to_string();
        let secret = text.split('.').nth(2).unwrap();
        let shown = format!("{token:?}");
        assert!(shown.contains(&token.id()), "{shown}");
        assert!(!shown.contains(secret), "{shown}");
    }

    #[test]
    fn two_tokens_differ_in_id_and_secret() {
        let [a, b] = [(); 2].map(|()| Token::generate([7; 32]).unwrap());
        assert_ne!(a.id(), b.id());
        assert_ne!(a.secret_sha256(), b.secret_sha256());
    }

    #[test]
    fn each_mistake_has_its_own_message() {
        let good = Token::generate([7; 32]).unwrap().to_string();
        let cases = [
            (good.replace("cnsmo1", "cnsmo2"), TokenError::Prefix),
            (String::new(), TokenError::Prefix),
            (good[..80].to_owned(), TokenError::Length(80)),
            (format!("{good}\n"), TokenError::Length(TOKEN_BYTES + 1)),
            (good.replacen('.', "A", 3).replacen("cnsmo1A", "cnsmo1.", 1), TokenError::Parts),
            (format!("{}=", &good[..good.len() - 1]), TokenError::Damaged("pin of the CA")),
            (format!("{}!{}", &good[..7], &good[8..]), TokenError::Damaged("id")),
        ];
        for (text, error) in cases {
            assert_eq!(text.parse::<Token>().unwrap_err(), error, "{text}");
        }
    }

    fn any_token() -> impl Strategy<Value = Token> {
        let parts =
            (any::<[u8; ID_BYTES]>(), any::<[u8; SECRET_BYTES]>(), any::<[u8; HASH_BYTES]>());
        parts.prop_map(|(id, secret, ca)| Token { id, secret, ca })
    }

    proptest! {
        #[test]
        fn a_token_survives_the_round_trip(token in any_token()) {
            let text = token.to_string();
            prop_assert_eq!(text.len(), TOKEN_BYTES);
            let again: Token = text.parse().unwrap();
            prop_assert_eq!((again.id, again.secret, again.ca), (token.id, token.secret, token.ca));
        }

        /// One text per token: whatever is accepted is written back letter for letter.
        #[test]
        fn a_mutated_token_is_refused_or_another_token(
            token in any_token(), at in 0..TOKEN_BYTES, with in any::<char>(),
        ) {
            let mut letters: Vec<char> = token.to_string().chars().collect();
            letters[at] = with;
            let text: String = letters.into_iter().collect();
            if let Ok(parsed) = text.parse::<Token>() {
                prop_assert_eq!(parsed.to_string(), text);
            }
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,150}", tail in "[A-Za-z0-9_.-]{0,110}") {
            prop_assert!(text.parse::<Token>().is_err());
            if let Ok(parsed) = format!("cnsmo1.{tail}").parse::<Token>() {
                prop_assert_eq!(parsed.to_string(), format!("cnsmo1.{tail}"));
            }
        }
    }
}
