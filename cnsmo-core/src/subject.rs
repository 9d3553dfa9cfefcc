//! Subjects: where messages go, and patterns of subjects: what a subscriber wants.

use std::fmt;

/// Longest subject or pattern.
pub const SUBJECT_BYTES_MAX: usize = 255;
/// Most tokens in a subject or pattern: bounds the walk through the index of subscribers.
pub const TOKENS_MAX: usize = 16;
/// In a pattern: any one token.
const ANY: &str = "*";
/// At the end of a pattern: one token or more.
const REST: &str = ">";
/// First token of subjects for dead letters.
const DEAD: &str = "dead";

/// Not a subject, or not a pattern of subjects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSubject {
    /// Empty.
    #[error("is missing")]
    Empty,
    /// Above [`SUBJECT_BYTES_MAX`].
    #[error("is longer than {SUBJECT_BYTES_MAX} bytes")]
    TooLong,
    /// Above [`TOKENS_MAX`].
    #[error("has more than {TOKENS_MAX} tokens")]
    TooManyTokens,
    /// Starts or ends with a dot, or has two in a row.
    #[error("has an empty token")]
    EmptyToken,
    /// Something else than letters, digits, `_` and `-`.
    #[error("has a token with other characters than A-Z, a-z, 0-9, _ and -")]
    Character,
    /// `>` before the end.
    #[error("has `>` before its end")]
    RestInside,
    /// A wildcard where each message must belong to one stream.
    #[error("must name its stream: the first token cannot be a wildcard")]
    NoStream,
}

/// A subject: tokens of letters, digits, `_` and `-`, joined by dots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Subject<'a>(&'a str);

impl<'a> Subject<'a> {
    /// Reads one.
    ///
    /// # Errors
    /// It breaks the syntax or a limit.
    pub fn parse(text: &'a str) -> Result<Self, InvalidSubject> {
        check(text, |_, _| Err(InvalidSubject::Character))?;
        Ok(Self(text))
    }

    /// As it was written.
    pub fn as_str(self) -> &'a str {
        self.0
    }

    /// The tokens, one at least.
    pub fn tokens(self) -> impl Iterator<Item = &'a str> {
        self.0.split('.')
    }

    /// The stream that durable messages of this subject are in: see [`stream_of`].
    ///
    /// # Errors
    /// The subject is `dead` alone.
    pub fn stream(self) -> Result<&'a str, InvalidSubject> {
        stream_of(self.0)
    }

    /// Whether the subject is one that only the bus itself publishes to.
    pub fn is_dead_letter(self) -> bool {
        self.tokens().next() == Some(DEAD)
    }
}

impl fmt::Display for Subject<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// A pattern of subjects: a subject in which `*` stands for any one token and `>`, at its end, for one or more.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pattern(Box<str>);

impl Pattern {
    /// Reads one.
    ///
    /// # Errors
    /// It breaks the syntax or a limit.
    pub fn parse(text: &str) -> Result<Self, InvalidSubject> {
        check(text, |token, is_last| match token {
            ANY => Ok(()),
            REST if is_last => Ok(()),
            REST => Err(InvalidSubject::RestInside),
            _ => Err(InvalidSubject::Character),
        })?;
        Ok(Self(text.into()))
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The tokens, one at least.
    pub fn tokens(&self) -> impl Iterator<Item = &str> {
        self.0.split('.')
    }

    /// The stream that all matching subjects are in: see [`stream_of`].
    ///
    /// # Errors
    /// The subjects may be in several streams.
    pub fn stream(&self) -> Result<&str, InvalidSubject> {
        stream_of(&self.0)
    }

    /// Whether the subject is one of the pattern's.
    pub fn matches(&self, subject: Subject<'_>) -> bool {
        let mut tokens = subject.tokens();
        for wanted in self.tokens() {
            match tokens.next() {
                Some(_) if wanted == REST => return true,
                Some(token) if wanted == ANY || wanted == token => {}
                Some(_) | None => return false,
            }
        }
        tokens.next().is_none()
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A token of a pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted<'a> {
    Token(&'a str),
    Any,
    Rest,
}

impl<'a> From<&'a str> for Wanted<'a> {
    fn from(token: &'a str) -> Self {
        match token {
            ANY => Self::Any,
            REST => Self::Rest,
            token => Self::Token(token),
        }
    }
}

/// The stream of a subject or pattern: its first token. Dead letters have a stream for each stream that they came from,
/// `dead.<stream>`, so that those of one do not push out those of another.
fn stream_of(text: &str) -> Result<&str, InvalidSubject> {
    let mut dots = text.match_indices('.').map(|(at, _)| at);
    let first = &text[..dots.next().unwrap_or(text.len())];
    if first == ANY || first == REST {
        return Err(InvalidSubject::NoStream);
    }
    if first != DEAD {
        return Ok(first);
    }
    let stream = &text[..dots.next().unwrap_or(text.len())];
    match stream.strip_prefix("dead.") {
        None | Some(ANY | REST) => Err(InvalidSubject::NoStream),
        Some(_) => Ok(stream),
    }
}

/// The stream of the dead letters of a stream, which is also their subject.
pub(crate) fn dead_letters_of(stream: &str) -> String {
    format!("{DEAD}.{stream}")
}

/// `odd` judges tokens that contain other characters than those of a subject.
fn check(
    text: &str,
    odd: impl Fn(&str, bool) -> Result<(), InvalidSubject>,
) -> Result<(), InvalidSubject> {
    if text.is_empty() {
        return Err(InvalidSubject::Empty);
    }
    if text.len() > SUBJECT_BYTES_MAX {
        return Err(InvalidSubject::TooLong);
    }
    let mut tokens = text.split('.').peekable();
    let mut count = 0;
    while let Some(token) = tokens.next() {
        count += 1;
        if count > TOKENS_MAX {
            return Err(InvalidSubject::TooManyTokens);
        }
        if token.is_empty() {
            return Err(InvalidSubject::EmptyToken);
        }
        if !token.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-')) {
            odd(token, tokens.peek().is_none())?;
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn subjects_and_patterns_are_told_from_what_is_none() {
        let long = "a".repeat(SUBJECT_BYTES_MAX + 1);
        let deep = ["a"; TOKENS_MAX + 1].join(".");
        for (text, error) in [
            ("", InvalidSubject::Empty),
            (".a", InvalidSubject::EmptyToken),
            ("a.", InvalidSubject::EmptyToken),
            ("a..b", InvalidSubject::EmptyToken),
            ("a b", InvalidSubject::Character),
            ("ä", InvalidSubject::Character),
            ("a.b*", InvalidSubject::Character),
            (&long, InvalidSubject::TooLong),
            (&deep, InvalidSubject::TooManyTokens),
        ] {
            assert_eq!(Subject::parse(text), Err(error), "{text}");
            assert_eq!(Pattern::parse(text), Err(error), "{text}");
        }
        for text in ["*", ">", "a.*.b", "a.>"] {
            assert_eq!(Subject::parse(text), Err(InvalidSubject::Character), "{text}");
            assert_eq!(Pattern::parse(text).unwrap().as_str(), text);
        }
        assert_eq!(Pattern::parse(">.a"), Err(InvalidSubject::RestInside));
    }

    #[test]
    fn the_first_token_names_the_stream_and_dead_letters_have_one_each() {
        for (text, stream) in [
            ("orders", Ok("orders")),
            ("orders.new.eu", Ok("orders")),
            ("orders.>", Ok("orders")),
            ("dead.orders", Ok("dead.orders")),
            ("*.new", Err(InvalidSubject::NoStream)),
            (">", Err(InvalidSubject::NoStream)),
            ("dead", Err(InvalidSubject::NoStream)),
            ("dead.*", Err(InvalidSubject::NoStream)),
            ("deadly.x", Ok("deadly")),
        ] {
            assert_eq!(Pattern::parse(text).unwrap().stream(), stream, "{text}");
        }
        assert_eq!(dead_letters_of("orders"), "dead.orders");
    }

    /// By the definition: token by token, `>` tries every length.
    fn naive(pattern: &[&str], subject: &[&str]) -> bool {
        match (pattern, subject) {
            ([], []) => true,
            ([">"], rest) => !rest.is_empty(),
            ([wanted, pattern @ ..], [token, subject @ ..]) => {
                (wanted == token || *wanted == "*") && naive(pattern, subject)
            }
            ([], _) | (_, []) => false,
        }
    }

    /// Few different tokens, so that many pairs match.
    pub(crate) fn subject() -> impl Strategy<Value = String> {
        prop::collection::vec("[ab]", 1..6).prop_map(|tokens| tokens.join("."))
    }

    pub(crate) fn pattern() -> impl Strategy<Value = String> {
        (prop::collection::vec("[ab*]", 0..5), "[ab*>]").prop_map(|(mut tokens, last)| {
            tokens.push(last);
            tokens.join(".")
        })
    }

    proptest! {
        #[test]
        fn a_pattern_matches_what_its_definition_says(pattern in pattern(), subject in subject()) {
            let tokens: Vec<&str> = pattern.split('.').collect();
            let expected = naive(&tokens, &subject.split('.').collect::<Vec<_>>());
            let pattern = Pattern::parse(&pattern).unwrap();
            prop_assert_eq!(pattern.matches(Subject::parse(&subject).unwrap()), expected);
        }

        #[test]
        fn no_text_ends_in_a_panic(pattern in any::<String>(), subject in "[a.*> _-]{0,40}") {
            for text in [&pattern, &subject] {
                if let Ok(pattern) = Pattern::parse(text) {
                    let _ = pattern.stream();
                    for subject in [&pattern.0, "a"] {
                        if let Ok(subject) = Subject::parse(subject) {
                            let _ = subject.stream();
                            prop_assert!(!pattern.matches(subject) || subject.tokens().count() > 0);
                        }
                    }
                }
            }
        }
    }
}
