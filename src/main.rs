//! The `tensorport` binary.

#[cfg(target_os = "linux")]
mod signals;

use std::process::ExitCode;

use tensorport::cli::{self, Host};

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    let signals = signals::Signals::watch();
    let status = cli::run(std::env::args_os().skip(1), Host::Binary, &mut || signals.interrupted());
    if status == cli::INTERRUPTED {
        signals.end_process();
    }
    status.into()
}

#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    // Ctrl-C ends the process as it ends any other: a conversion can be resumed after that.
    let mut never = || std::ops::ControlFlow::Continue(());
    cli::run(std::env::args_os().skip(1), Host::Binary, &mut never).into()
}
