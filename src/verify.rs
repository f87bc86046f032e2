//! Re-reads a converted tree: against its checksums, and against its source after the same casts.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde::Serialize;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::checkpoint::{self, Checkpoint};
use crate::dtype;
use crate::error::{Error, Result};
use crate::file;
use crate::manifest::{self, MANIFEST_NAME, Manifest, ShardInfo, TensorInfo};
use crate::mxfp4::{self, Candidate};
use crate::output::npy;
use crate::plan::{self, Plan, PlannedTensor};
use crate::progress::{Observer, Phase, Progress};
use crate::transform::{self, Producer};
use crate::work::{self, Chunk, Job, Resources};

/// What a verification found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VerificationReport {
    /// The tree.
    pub output: PathBuf,
    /// True when there are no failures.
    pub ok: bool,
    /// Everything that is wrong.
    pub failures: Vec<Failure>,
    /// Number of tensors that were read.
    pub tensors: u64,
    /// Bytes of tensor data that were read.
    pub nbytes: u64,
    /// Whether the values were compared with a source.
    pub compared_with_source: bool,
    /// Wall time.
    pub seconds: f64,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// The file, relative to the tree.
    pub file: String,
    /// The tensor, where one is concerned.
    pub tensor: Option<String>,
    /// What is wrong with it.
    pub what: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.tensor {
            Some(tensor) => write!(f, "{}: tensor {tensor:?}: {}", self.file, self.what),
            None => write!(f, "{}: {}", self.file, self.what),
        }
    }
}

/// Failures that a report's message spells out.
const SHOWN_FAILURES: usize = 10;

impl fmt::Display for VerificationReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.ok {
            return write!(f, "{}: {} tensors verified", self.output.display(), self.tensors);
        }
        write!(f, "{}: {} failures", self.output.display(), self.failures.len())?;
        for failure in self.failures.iter().take(SHOWN_FAILURES) {
            write!(f, "\n  {failure}")?;
        }
        if self.failures.len() > SHOWN_FAILURES {
            write!(f, "\n  and {} more", self.failures.len() - SHOWN_FAILURES)?;
        }
        Ok(())
    }
}

/// Verifies the tree at `output`, and with `source` compares every value with it.
///
/// What is wrong with the tree is in the report; a source that cannot be read is an error.
pub fn verify(
    output: &Path,
    source: Option<&Path>,
    resources: Resources,
    observer: &mut Observer<'_>,
) -> Result<VerificationReport> {
    let started = Instant::now();
    let worker_bytes = resources.worker_bytes()?;
    std::fs::read_dir(output).map_err(|fault| Error::io(output, fault))?;
    let path = output.join(MANIFEST_NAME);
    let manifest_fault = |what: String| VerificationReport {
        output: output.to_path_buf(),
        ok: false,
        failures: vec![Failure { file: MANIFEST_NAME.into(), tensor: None, what }],
        tensors: 0,
        nbytes: 0,
        compared_with_source: false,
        seconds: started.elapsed().as_secs_f64(),
    };
    let bytes = match file::read_bounded(&path, manifest::MAX_MANIFEST_BYTES) {
        Ok(bytes) => bytes,
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Ok(manifest_fault("missing: no converted tree, or an unfinished one".into()));
        }
        Err(fault) => return Err(fault),
    };
    let manifest = match Manifest::from_bytes(&path, &bytes) {
        Ok(manifest) => manifest,
        Err(Error::MalformedFile { found, expected, .. }) => {
            return Ok(manifest_fault(format!("found {found}, expected {expected}")));
        }
        Err(fault) => return Err(fault),
    };
    let source = source.map(|source| Source::open(source, &manifest)).transpose()?;
    let mut report = check_tree(output, &manifest, source.as_ref(), worker_bytes, resources.workers, observer)?;
    if !Manifest::self_hash_holds(&bytes) {
        let what = "its own hash does not hold: the manifest was edited or damaged".into();
        report.failures.insert(0, Failure { file: MANIFEST_NAME.into(), tensor: None, what });
        report.ok = false;
    }
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

/// A source to compare with, and the plan that makes the tree from it.
pub(crate) struct Source {
    checkpoint: Checkpoint,
    plan: Plan,
    on_overflow: crate::cast::OnOverflow,
}

impl Source {
    fn open(source: &Path, manifest: &Manifest) -> Result<Self> {
        let checkpoint = Checkpoint::open(source)?;
        let plan = plan::plan(checkpoint.tensors(), |tensor| checkpoint.path_of(tensor), &manifest.options)?;
        Ok(Self { checkpoint, plan, on_overflow: manifest.options.on_overflow })
    }
}

/// Checks all of a tree but the text of its manifest.
pub(crate) fn check_tree(
    root: &Path,
    manifest: &Manifest,
    source: Option<&Source>,
    worker_bytes: u64,
    workers: usize,
    observer: &mut Observer<'_>,
) -> Result<VerificationReport> {
    let started = Instant::now();
    let mut failures = Vec::new();
    let planned: HashMap<&str, &PlannedTensor> = source
        .map(|source| source.plan.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect())
        .unwrap_or_default();
    let mut checks = Vec::with_capacity(manifest.tensors.0.len());
    for (name, info) in &manifest.tensors.0 {
        match tensor_check(root, name, info) {
            Ok(mut check) => {
                if source.is_some() {
                    match compare_plan(info, planned.get(name.as_str())) {
                        Ok(tensor) => check.planned = Some(tensor),
                        Err(what) => failures.push(in_manifest(Some(name), what)),
                    }
                }
                checks.push(check);
            }
            Err(failure) => failures.push(failure),
        }
    }
    if let Some(source) = source {
        let held: HashSet<&str> = manifest.tensors.0.iter().map(|(name, _)| name.as_str()).collect();
        for tensor in source.plan.tensors.iter().filter(|tensor| !held.contains(tensor.name.as_str())) {
            failures.push(in_manifest(Some(&tensor.name), "missing, though the source has it".into()));
        }
    }
    check_totals(manifest, &mut failures);
    check_shards(root, manifest, &mut failures)?;
    check_side_files(root, manifest, &mut failures)?;
    let (tensors, nbytes) = (checks.len() as u64, checks.iter().map(CheckTensor::nbytes).sum());
    failures.extend(check_tensors(Phase::Verify, root, &checks, source, worker_bytes, workers, observer)?);
    Ok(VerificationReport {
        output: root.to_path_buf(),
        ok: failures.is_empty(),
        failures,
        tensors,
        nbytes,
        compared_with_source: source.is_some(),
        seconds: started.elapsed().as_secs_f64(),
    })
}

fn in_manifest(tensor: Option<&str>, what: String) -> Failure {
    Failure { file: MANIFEST_NAME.into(), tensor: tensor.map(str::to_owned), what }
}

/// What has to be read to verify one tensor, or why its manifest entry makes no sense.
fn tensor_check<'a>(root: &Path, name: &'a str, info: &'a TensorInfo) -> Result<CheckTensor<'a>, Failure> {
    let fault = |what: String| in_manifest(Some(name), what);
    let spec = checkpoint::tree_tensor(&root.join(MANIFEST_NAME), name, info).map_err(|fault_found| {
        fault(match fault_found {
            Error::MalformedTensor { found, expected, .. } => format!("found {found}, expected {expected}"),
            other => other.to_string(),
        })
    })?;
    let mut files = Vec::with_capacity(info.files.len());
    let mut start = 0;
    for ((path, &offset), &nbytes) in info.files.iter().zip(&info.offsets).zip(&info.part_nbytes) {
        if manifest::tree_path(root, path).is_none() {
            return Err(fault(format!("file {path:?} is not a plain path below the manifest's folder")));
        }
        let header = npy::part_shape(spec.dtype, &spec.shape, spec.nbytes, nbytes)
            .map(|shape| npy::header(spec.dtype, &shape))
            .filter(|header| header.len() as u64 == offset)
            .ok_or_else(|| fault(format!("file {path:?}: no part of {nbytes} bytes begins at {offset}")))?;
        files.push(CheckFile { path, header, nbytes: offset + nbytes, offset, data: start..start + nbytes });
        start += nbytes;
    }
    Ok(CheckTensor { name, files, xxh3_128: info.xxh3_128, planned: None })
}

/// Whether the manifest describes a tensor as the plan from the source does.
fn compare_plan<'a>(info: &TensorInfo, planned: Option<&&'a PlannedTensor>) -> Result<&'a PlannedTensor, String> {
    let &tensor = planned.ok_or_else(|| "not in the source".to_owned())?;
    let of_source = (dtype::name(tensor.dtype), &tensor.shape, tensor.source_dtype);
    let of_manifest = (info.dtype.as_str(), &info.shape, info.source_dtype.as_str());
    if of_source != of_manifest {
        return Err(format!("found {of_manifest:?}, expected {of_source:?} (dtype, shape, source_dtype)"));
    }
    if info.part_nbytes.iter().any(|bytes| bytes % tensor.transform.output_unit_bytes() != 0) {
        return Err(format!("part_nbytes {:?} cut through elements", info.part_nbytes));
    }
    Ok(tensor)
}

fn check_totals(manifest: &Manifest, failures: &mut Vec<Failure>) {
    let tensors = &manifest.tensors.0;
    let candidates: Vec<_> = tensors
        .iter()
        .filter_map(|(name, info)| {
            let dtype = dtype::from_name(&info.dtype)?;
            Some(Candidate { name, dtype, shape: &info.shape, path: Path::new(MANIFEST_NAME) })
        })
        .collect();
    let (parameters, stored) = mxfp4::count_parameters(&candidates);
    let nbytes = tensors.iter().fold(0u64, |sum, (_, info)| sum.saturating_add(info.nbytes));
    for (key, found, expected) in [
        ("total_tensors", manifest.total_tensors, tensors.len() as u64),
        ("total_parameters", manifest.total_parameters, parameters),
        ("stored_elements", manifest.stored_elements, stored),
        ("total_bytes", manifest.total_bytes, nbytes),
    ] {
        if found != expected {
            failures.push(in_manifest(None, format!("{key}: found {found}, expected {expected}")));
        }
    }
}

/// Compares the shards of the manifest with its tensors, and with the folders.
fn check_shards(root: &Path, manifest: &Manifest, failures: &mut Vec<Failure>) -> Result<()> {
    let mut shards: BTreeMap<&str, ShardInfo> = BTreeMap::new();
    let mut listed = HashSet::new();
    for (name, info) in &manifest.tensors.0 {
        for (path, &nbytes) in info.files.iter().zip(&info.part_nbytes) {
            if !listed.insert(path.as_str()) {
                failures.push(in_manifest(Some(name), format!("file {path:?} belongs to two tensors")));
            }
            if let Some((shard, _)) = path.split_once('/') {
                let shard = shards.entry(shard).or_insert(ShardInfo { files: 0, nbytes: 0 });
                shard.files += 1;
                shard.nbytes = shard.nbytes.saturating_add(nbytes);
            }
        }
    }
    let told: BTreeMap<&str, ShardInfo> =
        manifest.shards.0.iter().map(|(name, info)| (name.as_str(), info.clone())).collect();
    if told != shards {
        failures.push(in_manifest(None, "shards: they do not add up to the tensors".into()));
    }
    let npy = Some(OsStr::new("npy"));
    for shard in shards.keys() {
        let Some(folder) = manifest::tree_path(root, shard) else { continue };
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for entry in entries {
            let entry = entry.map_err(|fault| Error::io(&folder, fault))?;
            let path = format!("{shard}/{}", entry.file_name().to_string_lossy());
            if Path::new(&path).extension() == npy && !listed.contains(path.as_str()) {
                failures.push(Failure { file: path, tensor: None, what: "not in the manifest".into() });
            }
        }
    }
    Ok(())
}

fn check_side_files(root: &Path, manifest: &Manifest, failures: &mut Vec<Failure>) -> Result<()> {
    for (name, info) in &manifest.side_files.0 {
        let what = match manifest::tree_path(root, name) {
            None => Some("not a plain file name".into()),
            Some(path) => match file::read_bounded(&path, u64::from(u32::MAX)) {
                Ok(bytes) if (bytes.len() as u64, xxh3_128(&bytes)) == (info.nbytes, info.xxh3_128) => None,
                Ok(bytes) if bytes.len() as u64 != info.nbytes => {
                    Some(format!("found {} bytes, expected {}", bytes.len(), info.nbytes))
                }
                Ok(_) => Some("its checksum does not hold".into()),
                Err(fault) => Some(read_fault(fault)?),
            },
        };
        failures.extend(what.map(|what| Failure { file: name.clone(), tensor: None, what }));
    }
    Ok(())
}

/// A fault of a file of the tree, in words; faults that say nothing about the tree stay errors.
fn read_fault(fault: Error) -> Result<String> {
    match fault {
        Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => Ok("missing".into()),
        Error::Io { source, .. } => Ok(format!("cannot be read: {source}")),
        Error::MalformedFile { found, expected, .. } => Ok(format!("found {found}, expected {expected}")),
        other => Err(other),
    }
}

/// One tensor to be re-read.
pub(crate) struct CheckTensor<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its files, in order.
    pub files: Vec<CheckFile<'a>>,
    /// Hash of its data.
    pub xxh3_128: u128,
    /// How to make it from the source, when its values are to be compared.
    pub planned: Option<&'a PlannedTensor>,
}

/// One file of a tensor to be re-read.
pub(crate) struct CheckFile<'a> {
    /// Path relative to the tree.
    pub path: &'a str,
    /// Bytes that it begins with.
    pub header: Vec<u8>,
    /// Its size.
    pub nbytes: u64,
    /// Where the data begins.
    pub offset: u64,
    /// Which bytes of the tensor it holds.
    pub data: Range<u64>,
}

impl CheckTensor<'_> {
    fn nbytes(&self) -> u64 {
        self.files.last().map_or(0, |file| file.data.end)
    }

    fn unit_bytes(&self) -> u64 {
        self.planned.map_or(1, |tensor| tensor.transform.output_unit_bytes())
    }
}

/// Re-reads tensors of the tree at `root` and returns what is wrong with them, in their order.
pub(crate) fn check_tensors(
    phase: Phase,
    root: &Path,
    tensors: &[CheckTensor<'_>],
    source: Option<&Source>,
    worker_bytes: u64,
    workers: usize,
    observer: &mut Observer<'_>,
) -> Result<Vec<Failure>> {
    let names = tensors.iter().map(|tensor| tensor.name).collect();
    let progress = Progress::new(phase, names, tensors.iter().map(CheckTensor::nbytes).sum());
    let chunks = tensors.iter().enumerate().flat_map(|(item, tensor)| {
        let unit_bytes = tensor.unit_bytes();
        let pieces = tensor.files.iter().map(move |file| file.data.start / unit_bytes..file.data.end / unit_bytes);
        let chunk_units = match tensor.planned {
            // The written bytes need a buffer beside the expected ones.
            Some(planned) => transform::chunk_units(planned.transform, worker_bytes / 2),
            None => worker_bytes,
        };
        work::chunks(item, pieces, chunk_units)
    });
    let job = CheckJob { root, tensors, source, progress: &progress, failures: Mutex::default() };
    work::run(&job, chunks, tensors.len(), workers, &progress, observer)?;
    let mut failures = job.failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    failures.sort_by_key(|(item, _)| *item);
    Ok(failures.into_iter().map(|(_, failure)| failure).collect())
}

struct CheckJob<'a> {
    root: &'a Path,
    tensors: &'a [CheckTensor<'a>],
    source: Option<&'a Source>,
    progress: &'a Progress<'a>,
    failures: Mutex<Vec<(usize, Failure)>>,
}

struct CheckScratch<'a> {
    producer: Option<Producer<'a>>,
    /// The file read last: item, piece, handle.
    handle: Option<(usize, usize, File)>,
    written: Vec<u8>,
    expected: Vec<u8>,
    /// What is wrong with the chunk at hand.
    fault: Option<Fault>,
}

/// What is wrong with a chunk.
enum Fault {
    /// The file is not there, too short, or begins wrongly: nothing more can be said of the tensor.
    File(String),
    /// The values differ from the source's.
    Value(String),
}

struct CheckState {
    hasher: Xxh3,
    broken: bool,
    differs: bool,
}

impl<'a> Job for CheckJob<'a> {
    type Scratch = CheckScratch<'a>;
    type State = CheckState;

    fn scratch(&self) -> Self::Scratch {
        CheckScratch {
            producer: self.source.map(|source| Producer::new(&source.checkpoint, source.on_overflow)),
            handle: None,
            written: Vec::new(),
            expected: Vec::new(),
            fault: None,
        }
    }

    fn begin(&self, _: usize) -> CheckState {
        CheckState { hasher: Xxh3::new(), broken: false, differs: false }
    }

    fn process(&self, chunk: &Chunk, scratch: &mut Self::Scratch) -> Result<()> {
        let tensor = &self.tensors[chunk.item];
        let unit_bytes = tensor.unit_bytes();
        let nbytes = (chunk.units.end - chunk.units.start) * unit_bytes;
        scratch.written.resize(usize::try_from(nbytes).expect("no more than a worker's buffer"), 0);
        let start = chunk.units.start * unit_bytes;
        scratch.fault = self.read(chunk, scratch, start).err().map(read_fault).transpose()?.map(Fault::File);
        if let (None, Some(planned), Some(producer)) = (&scratch.fault, tensor.planned, &mut scratch.producer) {
            producer.produce(planned, &chunk.units, &mut scratch.expected)?;
            scratch.fault = difference(planned, start, &scratch.written, &scratch.expected).map(Fault::Value);
        }
        self.progress.add_bytes(nbytes);
        Ok(())
    }

    fn commit(&self, chunk: &Chunk, scratch: &mut Self::Scratch, state: &mut CheckState) -> Result<()> {
        match scratch.fault.take() {
            // The first fault of each kind is enough.
            Some(Fault::File(what)) if !state.broken => {
                state.broken = true;
                self.fail(chunk.item, chunk.piece, what);
            }
            Some(Fault::Value(what)) if !state.differs => {
                state.differs = true;
                self.fail(chunk.item, chunk.piece, what);
            }
            _ => {}
        }
        state.hasher.update(&scratch.written);
        Ok(())
    }

    fn finish(&self, item: usize, state: CheckState) -> Result<()> {
        if !state.broken && state.hasher.digest128() != self.tensors[item].xxh3_128 {
            self.fail(item, 0, "its checksum does not hold".into());
        }
        Ok(())
    }
}

impl CheckJob<'_> {
    /// Reads a chunk of a written tensor, after checking its file when it is opened.
    fn read(&self, chunk: &Chunk, scratch: &mut CheckScratch<'_>, start: u64) -> Result<()> {
        let file = &self.tensors[chunk.item].files[chunk.piece];
        let path = self.root.join(file.path);
        let handle = match &mut scratch.handle {
            Some((item, piece, handle)) if (*item, *piece) == (chunk.item, chunk.piece) => handle,
            slot => &mut slot.insert((chunk.item, chunk.piece, open_checked(&path, file)?)).2,
        };
        file::read_exact_at(&path, handle, &mut scratch.written, file.offset + (start - file.data.start))
    }

    fn fail(&self, item: usize, piece: usize, what: String) {
        let tensor = &self.tensors[item];
        let failure = Failure { file: tensor.files[piece].path.to_owned(), tensor: Some(tensor.name.to_owned()), what };
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).push((item, failure));
    }
}

fn open_checked(path: &Path, expected: &CheckFile<'_>) -> Result<File> {
    let (handle, stat) = file::open_regular(path)?;
    if stat.len() != expected.nbytes {
        return Err(Error::file(path, format_args!("{} bytes", stat.len()), format_args!("{}", expected.nbytes)));
    }
    let mut header = vec![0; expected.header.len()];
    file::read_exact_at(path, &handle, &mut header, 0)?;
    if header != expected.header {
        return Err(Error::file(path, "another npy header", "the one for its dtype and shape"));
    }
    Ok(handle)
}

/// Where a tensor differs from the source first, if it does.
fn difference(planned: &PlannedTensor, start: u64, written: &[u8], expected: &[u8]) -> Option<String> {
    if written == expected {
        return None;
    }
    let at = written.iter().zip(expected).position(|(a, b)| a != b)?;
    let itemsize = planned.dtype.bitsize().div_ceil(8);
    let first = at - at % itemsize;
    let element = (start + first as u64) / itemsize as u64;
    let end = (first + itemsize).min(written.len());
    Some(format!(
        "element {element} holds bytes {:02x?}, the source makes them {:02x?}",
        &written[first..end],
        &expected[first..end]
    ))
}
