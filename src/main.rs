//! The `tensorport` binary.

use std::ops::ControlFlow;
use std::process::ExitCode;

use tensorport::cli::{self, Host};

fn main() -> ExitCode {
    // Ctrl-C ends the process as it ends any other: a conversion can be resumed after that.
    cli::run(std::env::args_os().skip(1), Host::Binary, &mut || ControlFlow::Continue(())).into()
}
