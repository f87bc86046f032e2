//! Signals that ask the binary to stop: the job stops where it can be resumed, and then the process ends as it would have.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::{flag, low_level};

/// The signals that came.
#[derive(Default)]
pub struct Signals {
    /// The number of the last one; 0 before the first.
    received: Arc<AtomicUsize>,
}

impl Signals {
    /// Watches for the signals that would end the process. A second one ends it at once.
    pub fn watch() -> Self {
        let signals = Self::default();
        let is_stopping = Arc::new(AtomicBool::new(false));
        let ignored = ignored();
        for signal in [SIGHUP, SIGINT, SIGTERM] {
            // What is ignored stays ignored: nohup and shells ask for that.
            if (ignored >> (signal - 1)) & 1 == 0 {
                // These fail for signals that cannot be caught, and for them alone. The second signal is told from the
                // first because its action is registered before the one that sets the flag.
                let _ = flag::register_conditional_default(signal, Arc::clone(&is_stopping));
                let _ = flag::register(signal, Arc::clone(&is_stopping));
                let _ = flag::register_usize(signal, Arc::clone(&signals.received), signal.unsigned_abs() as usize);
            }
        }
        signals
    }

    /// Breaks once a signal came.
    pub fn interrupted(&self) -> ControlFlow<()> {
        if self.received.load(Ordering::Relaxed) == 0 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }

    /// Ends the process by the signal that came, if one did: shells stop their loops only when a child ends that way.
    /// Returns in the first process of a container, which its own signals do not end.
    pub fn end_process(&self) {
        let received = i32::try_from(self.received.load(Ordering::Relaxed)).unwrap_or_default();
        if received != 0 && std::process::id() != 1 {
            let _ = low_level::emulate_default_handler(received);
        }
    }
}

/// The signals that the process ignores, as bits from 1 for signal 1; all where the system does not say.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(u64::MAX)
}
