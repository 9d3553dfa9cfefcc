//! Ctrl-C and SIGTERM end a command through its destructors, which remove what it made on the host.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::bail;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::process::pause;

static ASKED: AtomicBool = AtomicBool::new(false);
const POLL: Duration = Duration::from_millis(50);

/// Makes both signals be noted instead of ending the process.
pub(crate) fn install() -> anyhow::Result<()> {
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only stores to an atomic.
        unsafe { sigaction(signal, &action)? };
    }
    Ok(())
}

/// Whether one of them has arrived.
pub(crate) fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// An error if one of them has arrived: called between steps.
pub(crate) fn check() -> anyhow::Result<()> {
    if asked() {
        bail!("interrupted; everything that was started is being removed");
    }
    Ok(())
}

/// Asks `ready` again and again until it says yes or `limit` has passed; returns which. An error when interrupted.
pub(crate) fn wait_until(
    limit: Duration,
    mut ready: impl FnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<bool> {
    let end = Instant::now() + limit;
    loop {
        check()?;
        if ready()? {
            return Ok(true);
        }
        if Instant::now() > end {
            return Ok(false);
        }
        pause(POLL);
    }
}

extern "C" fn note(_: i32) {
    ASKED.store(true, Ordering::Relaxed);
}
