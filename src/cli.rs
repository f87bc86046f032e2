//! The command line: one definition of each flag, for the binary and for the Python entry point.

use std::ffi::OsString;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, Parser, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::arrivals::Arrivals;
use crate::cast::OnOverflow;
use crate::checkpoint::Checkpoint;
use crate::convert::{self, ConversionReport, Mode, Quantized};
use crate::error::{Error, Result, printable};
use crate::inspect::{self, grouped, human_bytes, one_line};
use crate::mxfp4::ScaleRule;
use crate::options::{Float8Mode, Format, Mxfp4Mode, Options, Precision};
use crate::progress::{Event, Phase};
use crate::verify;
use crate::work::Resources;

/// Exit status of a failed job.
const FAILED: u8 = 1;
/// Exit status of a usage error.
const USAGE: u8 = 2;
/// Exit status of a job that was stopped: 128 and the number of SIGINT, as shells count.
pub const INTERRUPTED: u8 = 130;

/// What commands that run models are installed with.
const MODELS: &str = "tensorport[jax,text]";

/// What runs the command line.
pub trait Host {
    /// Its name behind the version.
    fn name(&self) -> &'static str;

    /// Asked some twenty times a second whether to stop.
    fn interrupted(&mut self) -> ControlFlow<()>;

    /// The path that a source names, which may be the id of a repository; None where the host says what is wrong.
    ///
    /// `may_arrive`: files may be stand-ins for what is on its way.
    fn local_path(&mut self, source: &Path, may_arrive: bool) -> Result<Option<LocalSource>>;
}

/// A source on this machine.
#[derive(Debug)]
pub struct LocalSource {
    /// Where it is.
    pub path: PathBuf,
    /// What tells of its files, where they are still on their way.
    pub arrivals: Option<Arc<Arrivals>>,
}

/// What the binary of `cargo install` says of a source that is no path: it reads no hub.
pub fn path_alone(source: &Path) -> Result<LocalSource> {
    let fault = match std::fs::symlink_metadata(source) {
        Err(fault) if fault.kind() == io::ErrorKind::NotFound => fault,
        // Opening it says what else is wrong.
        _ => return Ok(LocalSource { path: source.to_path_buf(), arrivals: None }),
    };
    let text = source.to_string_lossy();
    if source.is_relative() && text.contains('/') && !text.starts_with('.') {
        return Err(Error::NoCheckpoint {
            path: source.to_path_buf(),
            found: "no such file or folder".into(),
            expected: "a path; the id of a repository is for the Python package: pip install 'tensorport[hub]'".into(),
        });
    }
    Err(Error::io(source, fault))
}

/// Brings large checkpoints into JAX: converts, verifies and inspects safetensors.
#[derive(Debug, Parser)]
#[command(
    name = "tensorport",
    disable_version_flag = true,
    disable_help_subcommand = true,
    arg_required_else_help = true
)]
struct Cli {
    /// Print the version, and which of the two programs this is
    #[arg(long, short = 'V')]
    version: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Convert a checkpoint to JAX-ready files
    Convert(ConvertArgs),
    /// Re-read a converted tree against its checksums, or against its source
    Verify(VerifyArgs),
    /// Show a checkpoint's tensors
    Inspect(InspectArgs),
    /// Write a random checkpoint in a real layout (Python)
    #[command(disable_help_flag = true)]
    Synthesize(PythonArgs),
    /// Continue prompts with a model (Python)
    #[command(disable_help_flag = true)]
    Generate(PythonArgs),
    /// Talk to a model (Python)
    #[command(disable_help_flag = true)]
    Chat(PythonArgs),
    /// Check what a model computes, layer by layer and against a reference (Python)
    #[command(disable_help_flag = true)]
    Validate(PythonArgs),
    /// Synthesize, convert, verify, load and run a small model (Python)
    #[command(disable_help_flag = true)]
    Demo(PythonArgs),
}

#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
struct ConvertArgs {
    /// A .safetensors file, a directory of them, a converted tree, or org/name[@revision][/subfolder]
    #[arg(long, value_name = "DIR|FILE|HUB_ID")]
    input: PathBuf,
    /// Folder to write; new or empty
    #[arg(long)]
    output: PathBuf,
    /// Output format
    #[arg(long, value_enum, default_value = "numpy-direct")]
    format: Format,
    /// Precision of the float tensors
    #[arg(long, value_enum, default_value = "source")]
    precision: Precision,
    /// Keep MXFP4 blocks and scales, decode them, or encode chosen matrices
    #[arg(long, value_enum, default_value = "keep")]
    mxfp4: Mxfp4Mode,
    /// Keep float8 weights and the scales of their blocks, or decode them
    #[arg(long, value_enum, default_value = "keep")]
    float8: Float8Mode,
    /// Encode matrices that match, with --mxfp4 quantize; may be repeated
    #[arg(long, value_name = "GLOB")]
    quantize: Option<Vec<String>>,
    /// Scales of what is encoded, with --mxfp4 quantize [default: floor]
    #[arg(long, value_enum)]
    scale_rule: Option<ScaleRule>,
    /// Largest shard in GB (10^9 bytes)
    #[arg(long, value_name = "GB", default_value_t = 1.8)]
    shard_size: f64,
    /// Memory of the process, such as 256MB or 1GiB
    #[arg(long, value_name = "SIZE", default_value = "256MB", value_parser = parse_bytes)]
    max_memory: u64,
    /// Worker threads [default: all cores]
    #[arg(long, value_name = "N")]
    workers: Option<usize>,
    /// Take only tensors that match; may be repeated
    #[arg(long, value_name = "GLOB")]
    include: Option<Vec<String>>,
    /// Leave out tensors that match; may be repeated
    #[arg(long, value_name = "GLOB")]
    exclude: Option<Vec<String>>,
    /// What becomes of finite values that the precision cannot hold
    #[arg(long, value_enum, default_value = "error")]
    on_overflow: OverflowArg,
    /// Go on with an interrupted conversion
    #[arg(long)]
    resume: bool,
    /// Replace an earlier tree
    #[arg(long)]
    overwrite: bool,
    /// Do not re-read what was written
    #[arg(long)]
    skip_verify: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

impl ConvertArgs {
    fn options(&self) -> Options {
        Options {
            format: self.format,
            precision: self.precision,
            mxfp4: self.mxfp4,
            float8: self.float8,
            quantize: self.quantize.clone(),
            scale_rule: self.scale_rule,
            shard_size: self.shard_size,
            include: self.include.clone(),
            exclude: self.exclude.clone(),
            on_overflow: self.on_overflow.into(),
        }
    }

    fn resources(&self) -> Resources {
        Resources { max_memory: self.max_memory, ..Resources::default() }.with_workers(self.workers)
    }
}

#[derive(Debug, Args)]
struct VerifyArgs {
    /// The converted tree
    #[arg(long)]
    model: PathBuf,
    /// The checkpoint it was made from: compares every value
    #[arg(long, value_name = "DIR|FILE|HUB_ID")]
    source: Option<PathBuf>,
    /// Worker threads [default: all cores]
    #[arg(long, value_name = "N")]
    workers: Option<usize>,
    /// Say what was read
    #[arg(long)]
    verbose: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct InspectArgs {
    /// A .safetensors file, a directory of them, a converted tree, or org/name[@revision][/subfolder]
    path: PathBuf,
    /// Read every tensor: min, max, mean, std, NaN and Inf counts
    #[arg(long)]
    stats: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A command that the Python package answers, with its own flags.
#[derive(Debug, Args)]
struct PythonArgs {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _args: Vec<OsString>,
}

/// [`OnOverflow`] on the command line.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum OverflowArg {
    /// Fail, and say which tensor, how many values and the largest
    Error,
    /// Store infinities and report them
    Warn,
    /// Store the largest finite value and report it
    Saturate,
}

impl From<OverflowArg> for OnOverflow {
    fn from(arg: OverflowArg) -> Self {
        match arg {
            OverflowArg::Error => Self::Error,
            OverflowArg::Warn => Self::Warn,
            OverflowArg::Saturate => Self::Saturate,
        }
    }
}

/// Runs the command line and returns its exit status.
pub fn run(args: impl IntoIterator<Item = OsString>, host: &mut dyn Host) -> u8 {
    let cli = match Cli::try_parse_from(std::iter::once("tensorport".into()).chain(args)) {
        Ok(cli) => cli,
        Err(fault) => {
            // Help goes to stdout, errors to stderr; a closed pipe is nobody's fault.
            let _ = fault.print();
            return if fault.use_stderr() { USAGE } else { 0 };
        }
    };
    match dispatch(cli, host) {
        Ok(status) => status,
        Err(Error::Cancelled) => {
            complain("interrupted (an unfinished conversion goes on with --resume)");
            INTERRUPTED
        }
        Err(fault) => {
            complain(&format!("error: {fault}"));
            if matches!(fault, Error::Argument { .. }) { USAGE } else { FAILED }
        }
    }
}

fn dispatch(cli: Cli, host: &mut dyn Host) -> Result<u8> {
    if cli.version {
        return print(&format!("tensorport {} ({})\n", env!("CARGO_PKG_VERSION"), host.name()));
    }
    let source = match &cli.command {
        Some(Command::Convert(args)) => {
            // Before anything is downloaded.
            args.options().settled()?;
            args.resources().pool()?;
            Some(&args.input)
        }
        Some(Command::Verify(args)) => args.source.as_ref(),
        Some(Command::Inspect(args)) => Some(&args.path),
        _ => None,
    };
    let source = match source {
        None => None,
        Some(source) => match host.local_path(source, matches!(cli.command, Some(Command::Convert(_))))? {
            None => return Ok(FAILED),
            source => source,
        },
    };
    let arrivals = source.as_ref().and_then(|source| source.arrivals.as_ref());
    let source = source.as_ref().map(|source| source.path.as_path());
    let mut bar = Bar::default();
    let mut observer = |event: &Event<'_>| {
        bar.show(event);
        host.interrupted()
    };
    match cli.command {
        None => Ok(USAGE),
        Some(Command::Convert(args)) => {
            let source = source.unwrap_or(&args.input);
            let (options, resources) = (args.options(), args.resources());
            let mode = Mode { resume: args.resume, overwrite: args.overwrite, verify: !args.skip_verify };
            let report =
                convert::convert_arriving(source, arrivals, &args.output, &options, mode, resources, &mut observer)?;
            bar.clear();
            for warning in &report.warnings {
                complain(&format!("warning: {warning}"));
            }
            print(&if args.json { json(&report) } else { describe_conversion(&report) })
        }
        Some(Command::Verify(args)) => {
            let report =
                verify::verify(&args.model, source, Resources::default().with_workers(args.workers), &mut observer)?;
            bar.clear();
            let mut text = if args.json { json(&report) } else { format!("{report}\n") };
            if args.verbose && !args.json {
                let compared = if report.compared_with_source { ", compared with the source" } else { "" };
                text += &format!("{} read in {:.2} s{compared}\n", human_bytes(report.nbytes), report.seconds);
            }
            print(&text)?;
            Ok(if report.ok { 0 } else { FAILED })
        }
        Some(Command::Inspect(args)) => {
            let checkpoint = Checkpoint::open(source.unwrap_or(&args.path))?;
            let mut inspection = inspect::inspect(&checkpoint);
            if args.stats {
                inspect::add_stats(&mut inspection, &checkpoint, Resources::default(), &mut observer)?;
                bar.clear();
            }
            print(&if args.json { json(&inspection) } else { inspection.to_table() })
        }
        Some(Command::Synthesize(_)) => Ok(needs_python("synthesize", "tensorport")),
        Some(Command::Generate(_)) => Ok(needs_python("generate", MODELS)),
        Some(Command::Chat(_)) => Ok(needs_python("chat", MODELS)),
        Some(Command::Validate(_)) => Ok(needs_python("validate", MODELS)),
        Some(Command::Demo(_)) => Ok(needs_python("demo", MODELS)),
    }
}

fn needs_python(command: &str, package: &str) -> u8 {
    complain(&format!("error: `tensorport {command}` is part of the Python package: pip install '{package}'"));
    USAGE
}

/// Writes to stdout, without control characters that files may have supplied; a reader that closed the pipe has seen enough.
fn print(text: &str) -> Result<u8> {
    match io::stdout().lock().write_all(printable(text).as_bytes()).and_then(|()| io::stdout().flush()) {
        Err(fault) if fault.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::Io { path: "standard output".into(), source: fault })
        }
        _ => Ok(0),
    }
}

/// Writes a line to stderr; that it is closed is no reason to fail.
fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "{}", printable(text));
}

fn json(value: &impl Serialize) -> String {
    let mut text = serde_json::to_string_pretty(value).expect("plain structs with string keys serialize");
    text.push('\n');
    text
}

fn describe_conversion(report: &ConversionReport) -> String {
    let verified = if report.verified { "verified" } else { "not verified" };
    let resumed = match report.resumed_tensors {
        0 => String::new(),
        count => format!(", {count} of them from an earlier run"),
    };
    let mut text = format!(
        "{}: {} tensors{resumed}, {} parameters, {} in {} files, {verified}, {:.2} s\n",
        report.output.display(),
        report.total_tensors,
        grouped(report.total_parameters),
        human_bytes(report.total_bytes),
        report.total_files,
        report.seconds,
    );
    for (label, files) in [("copied", &report.copied_files), ("edited", &report.edited_files)] {
        if !files.is_empty() {
            text += &format!("{label}: {}\n", one_line(&files.join(", ")));
        }
    }
    for (name, count) in &report.underflow.0 {
        text += &format!("{}: {count} values became zero\n", one_line(name));
    }
    for (name, Quantized { error, compression }) in &report.quantization.0 {
        text += &format!("{}: quantized, {compression:.2} times smaller, {error}\n", one_line(name));
    }
    text
}

/// `256MB`, `1GiB`, `1000000`: decimal and binary units.
fn parse_bytes(text: &str) -> std::result::Result<u64, String> {
    let digits_end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits_end);
    let scale = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1u64,
        "k" | "kb" => 1_000,
        "m" | "mb" => 1_000_000,
        "g" | "gb" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        _ => return Err(format!("{text:?} is not a size such as 256MB or 1GiB")),
    };
    #[expect(clippy::cast_precision_loss, reason = "scales are powers of two or ten below 2^53")]
    let bytes = number.parse::<f64>().map_err(|fault| format!("{text:?}: {fault}"))? * scale as f64;
    if !(1.0..1e18).contains(&bytes) {
        return Err(format!("{text:?} is out of range"));
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "in range by the check above")]
    Ok(bytes as u64)
}

/// The bar on stderr; hidden by indicatif where stderr is no terminal.
#[derive(Default)]
struct Bar {
    phase: Option<Phase>,
    bar: Option<ProgressBar>,
}

impl Bar {
    fn show(&mut self, event: &Event<'_>) {
        if self.phase != Some(event.phase) {
            self.clear();
            let style = ProgressStyle::with_template(
                "{prefix:>10} {bar:30} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta} {wide_msg}",
            );
            let bar = ProgressBar::new(event.bytes_total)
                .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
                .with_prefix(event.phase.as_str());
            (self.phase, self.bar) = (Some(event.phase), Some(bar));
        }
        if let Some(bar) = &self.bar {
            bar.set_position(event.bytes_done);
            bar.set_message(one_line(event.tensor));
        }
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        self.phase = None;
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_bytes("256MB"), Ok(256_000_000));
        assert_eq!(parse_bytes("1GiB"), Ok(1 << 30));
        assert_eq!(parse_bytes("1.5kb"), Ok(1500));
        assert_eq!(parse_bytes("77"), Ok(77));
        for text in ["", "MB", "-1", "1XB", "1e9", "0", "1.2.3MB", "99999999999GB"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }
}
