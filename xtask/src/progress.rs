//! What the user sees of long steps: a spinner on a terminal, plain lines elsewhere.

use std::{
    io::{self, IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// A heading before a part of the work.
pub(crate) fn heading(text: &str) {
    say(&format!("\n== {text}"));
}

/// One line for people; results for programs go to standard output.
pub(crate) fn say(text: &str) {
    // A closed terminal must not end the work.
    let _ = writeln!(io::stderr(), "{text}");
}

/// An error with its causes, one line each.
pub(crate) fn error(error: &anyhow::Error) {
    say(&format!("\nerror: {error}"));
    for cause in error.chain().skip(1) {
        say(&format!("  because: {cause}"));
    }
}

/// Does `work` under a line that says so, and how long it took.
pub(crate) fn step<T>(text: &str, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let spinner = spinner(text);
    let start = Instant::now();
    let result = work();
    let took = start.elapsed().as_secs_f32();
    spinner.finish_and_clear();
    match &result {
        Ok(_) => say(&format!("  ok    {text} ({took:.1} s)")),
        Err(_) => say(&format!("  FAIL  {text} ({took:.1} s)")),
    }
    result
}

fn spinner(text: &str) -> ProgressBar {
    if !io::stderr().is_terminal() {
        say(&format!("  ...   {text}"));
        return ProgressBar::hidden();
    }
    let spinner = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("  {spinner:4} {msg} {elapsed:.dim}") {
        spinner.set_style(style);
    }
    spinner.set_message(text.to_owned());
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}
