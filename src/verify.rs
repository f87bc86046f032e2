//! Re-reads a converted tree: against its checksums, and against its source after the same casts.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::Serialize;

use crate::cast::Counts;
use crate::checkpoint::{self, Checkpoint};
use crate::checksum::{Checksum, TensorChecksums, TensorHasher};
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

impl VerificationReport {
    fn fail(&mut self, failure: Failure) {
        self.failures.push(failure);
        self.ok = false;
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
        Err(fault) => return Ok(manifest_fault(read_fault(fault)?)),
    };
    let manifest = match Manifest::from_bytes(&path, &bytes) {
        Ok(manifest) => manifest,
        Err(Error::MalformedFile { found, expected, .. }) => {
            return Ok(manifest_fault(format!("found {found}, expected {expected}")));
        }
        Err(fault) => return Err(fault),
    };
    let (source, options_fault) = match source.map(|source| Source::open(source, &manifest)).transpose() {
        Ok(source) => (source, None),
        // The arguments that do not hold are the manifest's.
        Err(fault @ (Error::Argument { .. } | Error::Mapping { .. })) => (None, Some(format!("options: {fault}"))),
        Err(fault) => return Err(fault),
    };
    let mut report = check_tree(output, &manifest, source.as_ref(), worker_bytes, resources.workers, observer)?;
    for stray in stray_files(output, &manifest)? {
        report.fail(stray);
    }
    if let Some(what) = options_fault {
        report.fail(in_manifest(None, what));
    }
    if !Manifest::self_hash_holds(&bytes) {
        report.fail(in_manifest(None, "its own hash does not hold: the manifest was edited or damaged".into()));
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
    let planned: HashMap<&str, usize> = source
        .map(|source| &source.plan.tensors)
        .into_iter()
        .flatten()
        .enumerate()
        .map(|(index, tensor)| (tensor.name.as_str(), index))
        .collect();
    let mut checks = Vec::with_capacity(manifest.tensors.0.len());
    for (name, info) in &manifest.tensors.0 {
        let mut check = match tensor_check(root, name, info) {
            Ok(check) => check,
            Err(failure) => {
                failures.push(failure);
                continue;
            }
        };
        match (source, planned.get(name.as_str())) {
            (Some(source), Some(&index)) => {
                let tensor = &source.plan.tensors[index];
                match compare_plan(info, tensor, &source.plan) {
                    Ok(()) => check.planned = Some(tensor),
                    Err(what) => failures.push(in_manifest(Some(name), what)),
                }
            }
            (Some(_), None) => failures.push(in_manifest(Some(name), "not in the source".into())),
            (None, _) => {}
        }
        checks.push(check);
    }
    if let Some(source) = source {
        let held: HashSet<&str> = manifest.tensors.0.iter().map(|(name, _)| name.as_str()).collect();
        for tensor in source.plan.tensors.iter().filter(|tensor| !held.contains(tensor.name.as_str())) {
            failures.push(in_manifest(Some(&tensor.name), "missing, though the source has it".into()));
        }
    }
    check_totals(manifest, &mut failures);
    check_shards(manifest, &mut failures);
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
    let checksums = TensorChecksums { whole: info.xxh3_128, parts: info.part_xxh3_128.clone() };
    let counts = Some((info.overflow, info.underflow));
    Ok(CheckTensor { name, files, checksums, counts, planned: None })
}

/// Whether the manifest describes a tensor as the plan from the source does.
fn compare_plan(info: &TensorInfo, tensor: &PlannedTensor, plan: &Plan) -> Result<(), String> {
    let of_source = (dtype::name(tensor.dtype), &tensor.shape, tensor.source_dtype);
    let of_manifest = (info.dtype.as_str(), &info.shape, info.source_dtype.as_str());
    if of_source != of_manifest {
        return Err(format!("found {of_manifest:?}, expected {of_source:?} (dtype, shape, source_dtype)"));
    }
    let unit_bytes = tensor.transform.output_unit_bytes();
    let of_source = tensor.pieces.iter().map(|piece| {
        (plan.files[piece.file].path.as_str(), piece.offset, (piece.units.end - piece.units.start) * unit_bytes)
    });
    let of_manifest = info.files.iter().zip(&info.offsets).zip(&info.part_nbytes);
    let of_manifest = of_manifest.map(|((file, &offset), &nbytes)| (file.as_str(), offset, nbytes));
    if !of_source.eq(of_manifest) {
        return Err("its files are not those that its options make".into());
    }
    Ok(())
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

/// Compares the shards of the manifest with its tensors.
fn check_shards(manifest: &Manifest, failures: &mut Vec<Failure>) {
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
}

/// npy files in the tree, or in a folder that is named like a shard, that the manifest does not list.
fn stray_files(root: &Path, manifest: &Manifest) -> Result<Vec<Failure>> {
    let listed: HashSet<&str> =
        manifest.tensors.0.iter().flat_map(|(_, info)| &info.files).map(String::as_str).collect();
    let mut strays = Vec::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        let path = root.join(&folder);
        for entry in std::fs::read_dir(&path).map_err(|fault| Error::io(&path, fault))? {
            let entry = entry.map_err(|fault| Error::io(&path, fault))?;
            let name = format!("{folder}{}", entry.file_name().to_string_lossy());
            let is_npy = Path::new(&name).extension() == Some(OsStr::new("npy"));
            if is_npy && !listed.contains(name.as_str()) {
                strays.push(Failure { file: name, tensor: None, what: "not in the manifest".into() });
            } else if folder.is_empty() && name.starts_with("shard_") && entry.path().is_dir() {
                folders.push(format!("{name}/"));
            }
        }
    }
    strays.sort_by(|a, b| a.file.cmp(&b.file));
    Ok(strays)
}

fn check_side_files(root: &Path, manifest: &Manifest, failures: &mut Vec<Failure>) -> Result<()> {
    for (name, info) in &manifest.side_files.0 {
        let what = match manifest::tree_path(root, name) {
            None => Some("not a plain file name".into()),
            Some(path) => match file::read_bounded(&path, u64::from(u32::MAX)) {
                Ok(bytes) if (bytes.len() as u64, Checksum::of(&bytes)) == (info.nbytes, info.xxh3_128) => None,
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
    /// Hashes of its data.
    pub checksums: TensorChecksums,
    /// Values that overflow and underflow, where they are to be compared with the source.
    pub counts: Option<(u64, u64)>,
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
    written_bytes: usize,
    counts: Counts,
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
    hasher: TensorHasher,
    counts: Counts,
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
            written_bytes: 0,
            counts: Counts::default(),
            fault: None,
        }
    }

    fn begin(&self, item: usize) -> CheckState {
        let hasher = TensorHasher::new(self.tensors[item].files.len());
        CheckState { hasher, counts: Counts::default(), broken: false, differs: false }
    }

    fn process(&self, chunk: &Chunk, scratch: &mut Self::Scratch) -> Result<()> {
        let tensor = &self.tensors[chunk.item];
        let unit_bytes = tensor.unit_bytes();
        let nbytes = (chunk.units.end - chunk.units.start) * unit_bytes;
        scratch.written_bytes = usize::try_from(nbytes).expect("no more than a worker's buffer");
        transform::grow(&mut scratch.written, scratch.written_bytes);
        let start = chunk.units.start * unit_bytes;
        scratch.fault = self.read(chunk, scratch, start).err().map(read_fault).transpose()?.map(Fault::File);
        if let (None, Some(planned), Some(producer)) = (&scratch.fault, tensor.planned, &mut scratch.producer) {
            scratch.counts = producer.produce(planned, &chunk.units)?;
            let written = &scratch.written[..scratch.written_bytes];
            scratch.fault = difference(planned, start, written, producer.output()).map(Fault::Value);
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
        state.hasher.update(&scratch.written[..scratch.written_bytes], chunk.ends_piece);
        state.counts.merge(std::mem::take(&mut scratch.counts));
        Ok(())
    }

    fn finish(&self, item: usize, state: CheckState) -> Result<()> {
        if state.broken {
            return Ok(());
        }
        let tensor = &self.tensors[item];
        let found = state.hasher.finish();
        for (piece, (found, expected)) in found.parts.iter().zip(&tensor.checksums.parts).enumerate() {
            if found != expected {
                self.fail(item, piece, "its checksum does not hold".into());
            }
        }
        if found.whole != tensor.checksums.whole && found.parts == tensor.checksums.parts {
            self.failures().push((item, in_manifest(Some(tensor.name), "xxh3_128 is not that of the tensor".into())));
        }
        let counted = (state.counts.overflow, state.counts.underflow);
        if tensor.planned.is_some() && tensor.counts.is_some_and(|told| told != counted) {
            let what = format!("overflow and underflow: found {:?}, expected {counted:?}", tensor.counts);
            self.failures().push((item, in_manifest(Some(tensor.name), what)));
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
        file::read_exact_at(
            &path,
            handle,
            &mut scratch.written[..scratch.written_bytes],
            file.offset + (start - file.data.start),
        )
    }

    fn fail(&self, item: usize, piece: usize, what: String) {
        let tensor = &self.tensors[item];
        let failure = Failure { file: tensor.files[piece].path.to_owned(), tensor: Some(tensor.name.to_owned()), what };
        self.failures().push((item, failure));
    }

    fn failures(&self) -> MutexGuard<'_, Vec<(usize, Failure)>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
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
