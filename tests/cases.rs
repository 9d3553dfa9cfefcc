//! One module per subject.

mod kernel;
