//! Re-reads a converted tree: against its checksums, and against its source after the same casts.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Serialize, Serializer};
use xxhash_rust::xxh3::Xxh3;

use crate::cast::{self, OnOverflow};
use crate::check::{self, CheckFile, CheckTensor, Tree};
use crate::checkpoint::{self, Checkpoint};
use crate::checksum::Checksum;
use crate::dtype;
use crate::error::{Error, Result};
use crate::file;
use crate::manifest::{self, MANIFEST_NAME, Manifest, ShardInfo, SideFileInfo, TensorInfo};
use crate::mxfp4::{self, BLOCKS_SUFFIX, Candidate};
use crate::plan::{self, Plan, PlannedTensor};
use crate::progress::{Observer, Phase};
use crate::work::{Pool, Resources};

/// What a verification found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VerificationReport {
    /// The tree.
    #[serde(serialize_with = "as_text")]
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
    let pool = resources.pool()?;
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
        Err(fault) => return Ok(manifest_fault(check::read_fault(fault)?)),
    };
    let manifest = match Manifest::from_bytes(&path, &bytes) {
        Ok(manifest) => manifest,
        Err(Error::MalformedFile { found, expected, .. }) => {
            return Ok(manifest_fault(format!("found {found}, expected {expected}")));
        }
        Err(fault) => return Err(fault),
    };
    let checkpoint = source.map(Checkpoint::open).transpose()?;
    // The source may be another serialization of the same tensors.
    let names = || manifest.tensors.0.iter().map(|(name, _)| name.as_str());
    let plan = checkpoint.as_ref().map(|checkpoint| plan::in_order(checkpoint, &manifest.options, names()));
    let (plan, options_fault) = match plan.transpose() {
        Ok(plan) => (plan, None),
        // The arguments that do not hold are the manifest's.
        Err(fault @ (Error::Argument { .. } | Error::Mapping { .. })) => (None, Some(format!("options: {fault}"))),
        Err(fault) => return Err(fault),
    };
    let source = checkpoint.as_ref().zip(plan.as_ref()).map(|(checkpoint, plan)| Source {
        checkpoint,
        plan,
        on_overflow: manifest.options.on_overflow,
    });
    let mut report = check_tree(output, &manifest, source.as_ref(), pool, observer)?;
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
pub(crate) struct Source<'a> {
    /// The source.
    pub checkpoint: &'a Checkpoint,
    /// What the tree's options make of it.
    pub plan: &'a Plan,
    /// What became of values beyond the precision.
    pub on_overflow: OnOverflow,
}

/// Checks all of a tree but the text of its manifest.
pub(crate) fn check_tree(
    root: &Path,
    manifest: &Manifest,
    source: Option<&Source<'_>>,
    pool: Pool,
    observer: &mut Observer<'_>,
) -> Result<VerificationReport> {
    let started = Instant::now();
    let mut failures = Vec::new();
    let planned: HashMap<&str, &PlannedTensor> = source
        .into_iter()
        .flat_map(|source| &source.plan.tensors)
        .map(|tensor| (tensor.name.as_str(), tensor))
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
            (Some(source), Some(&tensor)) => match compare_plan(info, tensor, source.plan) {
                Ok(()) => check.planned = Some(tensor),
                Err(what) => failures.push(in_manifest(Some(name), what)),
            },
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
    let (tensors, nbytes) = (checks.len() as u64, checks.iter().map(CheckTensor::nbytes).fold(0, u64::saturating_add));
    let tree = Tree { root, format: manifest.options.format, metadata: &manifest.metadata };
    failures.extend(check::check_tensors(Phase::Verify, tree, &checks, source, pool, observer)?.failures);
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

pub(crate) fn in_manifest(tensor: Option<&str>, what: String) -> Failure {
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
    if let Some(what) = quantization_fault(name, info) {
        return Err(fault(what));
    }
    let dtype = spec.dtype;
    let (whole, parts) = (info.xxh3_128, info.part_xxh3_128.as_slice());
    let (losses, files) = (Some(info.losses()), Vec::with_capacity(info.files.len()));
    let mut check = CheckTensor { name, dtype, shape: &info.shape, files, whole, parts, losses, planned: None };
    let mut start = 0;
    for ((path, &offset), &nbytes) in info.files.iter().zip(&info.offsets).zip(&info.part_nbytes) {
        if manifest::tree_path(root, path).is_none() {
            return Err(fault(format!("file {path:?} is not a plain path below the manifest's folder")));
        }
        check.files.push(CheckFile { path, offset, data: start..start + nbytes });
        start += nbytes;
    }
    Ok(check)
}

/// What is wrong with a tensor's error of quantization, as far as that can be told without the source.
fn quantization_fault(name: &str, info: &TensorInfo) -> Option<String> {
    // No other conversion makes bytes of floats.
    let is_encoded = info.dtype == "uint8"
        && name.ends_with(BLOCKS_SUFFIX)
        && dtype::from_name(&info.source_dtype).is_some_and(cast::is_castable);
    let Some(error) = &info.quantization else {
        return is_encoded.then(|| "found no error of quantization, expected that of blocks made of floats".into());
    };
    if !is_encoded {
        return Some("found an error of quantization, expected none but that of blocks made of floats".into());
    }
    let values = info.nbytes.saturating_mul(2);
    (!error.is_possible(values)).then(|| format!("found {error:?}, expected the error of {values} values"))
}

/// Whether the manifest describes a tensor as the plan from the source does.
fn compare_plan(info: &TensorInfo, tensor: &PlannedTensor, plan: &Plan) -> Result<(), String> {
    let of_source = (dtype::name(tensor.dtype), &tensor.shape, tensor.source_dtype);
    let of_manifest = (info.dtype.as_str(), &info.shape, info.source_dtype.as_str());
    if of_source != of_manifest {
        return Err(format!("found {of_manifest:?}, expected {of_source:?} (dtype, shape, source_dtype)"));
    }
    let unit_bytes = tensor.transform.output_unit_bytes();
    let of_source = tensor
        .pieces
        .iter()
        .map(|piece| (plan.files[piece.file].path(), piece.offset, (piece.units.end - piece.units.start) * unit_bytes));
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

/// Compares the shards of the manifest, folders or files, with its tensors.
fn check_shards(manifest: &Manifest, failures: &mut Vec<Failure>) {
    let mut shards: BTreeMap<&str, ShardInfo> = BTreeMap::new();
    let mut listed = HashSet::new();
    let mut last = "";
    for (name, info) in &manifest.tensors.0 {
        for (path, &nbytes) in info.files.iter().zip(&info.part_nbytes) {
            let (shard, _) = path.split_once('/').unwrap_or((path, ""));
            let shard = shards.entry(shard).or_insert(ShardInfo { files: 0, nbytes: 0 });
            shard.nbytes = shard.nbytes.saturating_add(nbytes);
            if path == last {
                continue;
            }
            shard.files += 1;
            last = path;
            if !listed.insert(path.as_str()) {
                let what = format!("file {path:?} is listed again, behind others");
                failures.push(in_manifest(Some(name), what));
            }
        }
    }
    let told: BTreeMap<&str, ShardInfo> =
        manifest.shards.0.iter().map(|(name, info)| (name.as_str(), info.clone())).collect();
    if told != shards {
        failures.push(in_manifest(None, "shards: they do not add up to the tensors".into()));
    }
}

pub(crate) fn check_side_files(root: &Path, manifest: &Manifest, failures: &mut Vec<Failure>) -> Result<()> {
    for (name, info) in &manifest.side_files.0 {
        let what = match manifest::tree_path(root, name) {
            None => Some("not a plain file name".into()),
            Some(path) => match side_file_fault(&path, info) {
                Ok(fault) => fault,
                Err(fault) => Some(check::read_fault(fault)?),
            },
        };
        failures.extend(what.map(|what| Failure { file: name.clone(), tensor: None, what }));
    }
    Ok(())
}

fn side_file_fault(path: &Path, info: &SideFileInfo) -> Result<Option<String>> {
    let (_, stat) = file::open_regular(path)?;
    if stat.len() != info.nbytes {
        return Ok(Some(format!("found {} bytes, expected {}", stat.len(), info.nbytes)));
    }
    let mut hasher = Xxh3::new();
    file::read_through(path, |bytes, _| {
        hasher.update(bytes);
        Ok(())
    })?;
    let holds = Checksum(hasher.digest128()) == info.xxh3_128;
    Ok((!holds).then(|| "its checksum does not hold".into()))
}

/// Paths as JSON text: those that are not UTF-8 too.
pub(crate) fn as_text<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}
