use std::fmt;

/// A value that is refused: which field, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    /// From the outside in, for example `spec.rules[2].ports[0]`. Empty: the value itself.
    field: String,
    reason: String,
}

impl Invalid {
    /// Refused for `reason`, which completes "... is refused: {reason}".
    pub fn new(reason: impl Into<String>) -> Self {
        Self { field: String::new(), reason: reason.into() }
    }

    /// Puts `outer` in front of the path: called once per level on the way out.
    #[must_use]
    pub fn at(mut self, outer: impl fmt::Display) -> Self {
        self.field = if self.field.is_empty() {
            outer.to_string()
        } else if self.field.starts_with('[') {
            format!("{outer}{}", self.field)
        } else {
            format!("{outer}.{}", self.field)
        };
        self
    }

    /// As [`Self::at`], for element `n` of a list.
    #[must_use]
    pub fn at_index(self, n: usize) -> Self {
        self.at(format_args!("[{n}]"))
    }

    /// The path of the field.
    pub fn field(&self) -> &str {
        &self.field
    }

    /// The reason.
    pub fn reason(&self) -> &str {
        &self.reason
    }
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.field.is_empty() {
            f.write_str(&self.reason)
        } else {
            write!(f, "{}: {}", self.field, self.reason)
        }
    }
}

impl std::error::Error for Invalid {}

/// The start of a text that came from outside, for a message.
pub(super) fn shorten(text: &str) -> String {
    const SHOWN_MAX: usize = 80;
    match text.char_indices().nth(SHOWN_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}
