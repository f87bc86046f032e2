//! The `tensorport` binary.

#[cfg(target_os = "linux")]
mod signals;

use std::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;

use tensorport::cli::{self, Host, LocalSource};
use tensorport::error::Result;

/// This program, and what it asks whether to stop.
struct Binary<F>(F);

impl<F: FnMut() -> ControlFlow<()>> Host for Binary<F> {
    fn name(&self) -> &'static str {
        "Rust binary"
    }

    fn interrupted(&mut self) -> ControlFlow<()> {
        self.0()
    }

    fn local_path(&mut self, source: &Path, _: bool) -> Result<Option<LocalSource>> {
        cli::path_alone(source).map(Some)
    }
}

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    let signals = signals::Signals::watch();
    let status = cli::run(std::env::args_os().skip(1), &mut Binary(|| signals.interrupted()));
    if status == cli::INTERRUPTED {
        signals.end_process();
    }
    status.into()
}

#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    // Ctrl-C ends the process as it ends any other: a conversion can be resumed after that.
    cli::run(std::env::args_os().skip(1), &mut Binary(|| ControlFlow::Continue(()))).into()
}
