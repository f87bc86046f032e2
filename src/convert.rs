//! Executes a plan: parallel, in bounded buffers, resumable, every file whole or absent.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde::Serialize;

use crate::cast::{Counts, OnOverflow, Target};
use crate::checkpoint::Checkpoint;
use crate::checksum::{TensorChecksums, TensorHasher};
use crate::dtype;
use crate::error::{Error, Result};
use crate::file;
use crate::journal::{Entry, Header, JOURNAL_NAME, Journal};
use crate::manifest::{
    self, FORMAT_VERSION, MANIFEST_NAME, Manifest, ShardInfo, SideFileOrigin, SourceInfo, TensorInfo,
};
use crate::ordered_map::OrderedMap;
use crate::plan::{self, Options, Plan, PlannedTensor};
use crate::progress::{Observer, Phase, Progress};
use crate::side_files::{self, SideFile};
use crate::sink::Sinks;
use crate::transform::{self, Producer};
use crate::verify::{self, CheckFile, CheckTensor};
use crate::work::{self, Chunk, Job, Resources};

/// How a conversion treats what is already in the output folder, and whether it checks what it wrote.
#[derive(Debug, Clone, Copy, Default)]
pub struct Mode {
    /// Go on with an interrupted conversion.
    pub resume: bool,
    /// Replace an earlier tree.
    pub overwrite: bool,
    /// Re-read everything that was written against its checksums.
    pub verify: bool,
}

/// What a conversion did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ConversionReport {
    /// The output folder.
    pub output: PathBuf,
    /// The options that were used.
    pub options: Options,
    /// Number of tensors in the output.
    pub total_tensors: u64,
    /// Number of parameters; MXFP4 values count once, their scales do not.
    pub total_parameters: u64,
    /// Bytes of tensor data in the output.
    pub total_bytes: u64,
    /// Number of files with tensor data.
    pub total_files: u64,
    /// Tensors that an earlier, interrupted run had finished.
    pub resumed_tensors: u64,
    /// Finite values beyond the precision, by tensor; only tensors that have some.
    pub overflow: OrderedMap<u64>,
    /// Values that became zero and were not, by tensor; only tensors that have some.
    pub underflow: OrderedMap<u64>,
    /// Files beside the tensors that were copied as they were.
    pub copied_files: Vec<String>,
    /// Files beside the tensors that were corrected to fit.
    pub edited_files: Vec<String>,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// Whether the output was re-read against its checksums.
    pub verified: bool,
    /// Wall time, verification included.
    pub seconds: f64,
}

/// Converts the checkpoint at `source` into `output`.
pub fn convert(
    source: &Path,
    output: &Path,
    options: &Options,
    mode: Mode,
    resources: Resources,
    observer: &mut Observer<'_>,
) -> Result<ConversionReport> {
    let started = Instant::now();
    let worker_bytes = resources.worker_bytes()?;
    let checkpoint = Checkpoint::open(source)?;
    let plan = plan::plan(checkpoint.tensors(), |tensor| checkpoint.path_of(tensor), options)?;
    let side_files = side_files::plan(&checkpoint, &plan, options)?;
    let job = Conversion { checkpoint: &checkpoint, plan: &plan, side_files: &side_files, options, output };
    std::fs::create_dir_all(output).map_err(|fault| Error::io(output, fault))?;
    let _lock = file::lock_folder(output)?.ok_or_else(|| {
        Error::output(output, "another conversion that is writing here now", "one conversion at a time into a folder")
    })?;
    let (journal, listed) = match job.prepare(mode)? {
        Prepared::Ready(journal, listed) => (journal, listed),
        Prepared::Finished(manifest) => return job.report_finished(&manifest, resources, observer, started),
    };
    let done = job.recheck(&listed, worker_bytes, resources, observer)?;
    let resumed_tensors = done.len() as u64;
    let entries = job.write_tensors(&journal, done, worker_bytes, resources, observer)?;
    for file in checkpoint.files() {
        let stat = std::fs::metadata(&file.path).map_err(|fault| Error::io(&file.path, fault))?;
        file.check_unchanged(&stat)?;
    }
    let manifest = job.manifest(&entries)?;
    if mode.verify {
        job.verify_written(&manifest, worker_bytes, resources, observer)?;
    }
    job.finish(&manifest, journal)?;
    Ok(job.report(&manifest, resumed_tensors, mode.verify, started))
}

struct Conversion<'a> {
    checkpoint: &'a Checkpoint,
    plan: &'a Plan,
    side_files: &'a [SideFile],
    options: &'a Options,
    output: &'a Path,
}

/// State of the output folder after [`Conversion::prepare`].
enum Prepared {
    /// There is work to do; these tensors are listed as whole.
    Ready(Journal, HashMap<String, Entry>),
    /// The very tree that was asked for is there.
    Finished(Box<Manifest>),
}

impl Conversion<'_> {
    /// Brings the output folder into the state that the journal describes. Deletes nothing that no conversion wrote.
    fn prepare(&self, mode: Mode) -> Result<Prepared> {
        let output = self.output;
        self.refuse_own_source()?;
        let names = visible_names(output)?;
        let mut header = Header::new(self.checkpoint, self.options, self.output_names());
        if let Some((journal, begun, entries)) = Journal::open(output)? {
            let difference = begun.difference(&header);
            if mode.resume && difference.is_none() {
                remove_leftovers(output, &begun)?;
                return Ok(Prepared::Ready(journal, entries));
            }
            if !mode.overwrite {
                let found = difference.unwrap_or_else(|| "an unfinished conversion".into());
                let expected = "resume=True with the same source and options, overwrite=True, or another folder";
                return Err(Error::output(output, found, expected));
            }
            header.replaces = begun.files;
            header.replaces.extend(begun.replaces);
        } else if names.iter().any(|name| name == MANIFEST_NAME) {
            let path = output.join(MANIFEST_NAME);
            let bytes = file::read_bounded(&path, manifest::MAX_MANIFEST_BYTES)?;
            let finished = Manifest::from_bytes(&path, &bytes).map_err(|fault| {
                Error::output(output, format_args!("a manifest.json that is not ours ({fault})"), "an empty folder")
            })?;
            if mode.resume && self.is_result(&finished) {
                if !Manifest::self_hash_holds(&bytes) {
                    let expected = "the manifest as it was written, or overwrite=True";
                    return Err(Error::output(&path, "an edited or damaged manifest", expected));
                }
                return Ok(Prepared::Finished(Box::new(finished)));
            }
            if !mode.overwrite {
                let found = if mode.resume { "a finished tree of another conversion" } else { "a finished tree" };
                return Err(Error::output(output, found, "overwrite=True, or another folder"));
            }
            let tensor_files = finished.tensors.0.into_iter().flat_map(|(_, info)| info.files);
            let side_files = finished.side_files.0.into_iter().map(|(name, _)| name);
            header.replaces = tensor_files.chain(side_files).collect();
        } else if let Some(foreign) = names.first() {
            let found = format_args!("{foreign:?} and {} more files that no conversion wrote", names.len() - 1);
            return Err(Error::output(output, found, "an empty folder, or a new one"));
        }
        let journal = Journal::create(output, &header)?;
        remove_leftovers(output, &header)?;
        Ok(Prepared::Ready(journal, HashMap::new()))
    }

    /// Every file of the tree but the manifest.
    fn output_names(&self) -> Vec<String> {
        let side_files = self.side_files.iter().map(|file| file.name.clone());
        self.plan.files.iter().map(|file| file.path.clone()).chain(side_files).collect()
    }

    /// A tree cannot be converted into itself.
    fn refuse_own_source(&self) -> Result<()> {
        let canonical = |path: &Path| std::fs::canonicalize(path).map_err(|fault| Error::io(path, fault));
        let output = canonical(self.output)?;
        let root = canonical(self.checkpoint.root())?;
        if root == output || root.starts_with(&output) {
            let found = format_args!("the source {} in it", self.checkpoint.root().display());
            return Err(Error::output(self.output, found, "an output folder that does not hold the source"));
        }
        Ok(())
    }

    /// Whether a finished tree is what this conversion would write.
    fn is_result(&self, manifest: &Manifest) -> bool {
        manifest.options == *self.options
            && manifest.source.files == self.checkpoint.fingerprints()
            && manifest.tensorport_version == env!("CARGO_PKG_VERSION")
    }

    /// Of the tensors that the journal lists, those whose files are there and whole.
    fn recheck(
        &self,
        listed: &HashMap<String, Entry>,
        worker_bytes: u64,
        resources: Resources,
        observer: &mut Observer<'_>,
    ) -> Result<HashMap<String, Entry>> {
        let listed_tensors: Vec<_> =
            self.plan.tensors.iter().filter_map(|tensor| Some((tensor, listed.get(&tensor.name)?))).collect();
        if listed_tensors.is_empty() {
            return Ok(HashMap::new());
        }
        let checks: Vec<_> =
            listed_tensors.iter().map(|(tensor, entry)| self.check_of(tensor, entry.checksums())).collect();
        let failures =
            verify::check_tensors(Phase::Check, self.output, &checks, None, worker_bytes, resources.workers, observer)?;
        let broken: BTreeSet<_> = failures.into_iter().filter_map(|failure| failure.tensor).collect();
        let whole = listed_tensors.into_iter().filter(|(tensor, _)| !broken.contains(&tensor.name));
        Ok(whole.map(|(tensor, entry)| (tensor.name.clone(), entry.clone())).collect())
    }

    fn check_of<'b>(&'b self, tensor: &'b PlannedTensor, checksums: TensorChecksums) -> CheckTensor<'b> {
        let unit_bytes = tensor.transform.output_unit_bytes();
        CheckTensor {
            name: &tensor.name,
            files: tensor
                .pieces
                .iter()
                .map(|piece| {
                    let file = &self.plan.files[piece.file];
                    CheckFile {
                        path: &file.path,
                        header: file.header.clone(),
                        nbytes: file.nbytes,
                        offset: piece.offset,
                        data: piece.units.start * unit_bytes..piece.units.end * unit_bytes,
                    }
                })
                .collect(),
            checksums,
            counts: None,
            planned: None,
        }
    }

    /// Writes all tensors but those already `done`.
    fn write_tensors(
        &self,
        journal: &Journal,
        done: HashMap<String, Entry>,
        worker_bytes: u64,
        resources: Resources,
        observer: &mut Observer<'_>,
    ) -> Result<HashMap<String, Entry>> {
        for (shard, _) in &self.plan.shards {
            let folder = self.output.join(shard);
            refuse_link(&folder)?;
            std::fs::create_dir_all(&folder).map_err(|fault| Error::io(&folder, fault))?;
        }
        let tensors: Vec<_> = self.plan.tensors.iter().filter(|tensor| !done.contains_key(&tensor.name)).collect();
        let names = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        let bytes_total = tensors.iter().map(|tensor| tensor.nbytes).sum();
        let progress = Progress::new(Phase::Convert, names, bytes_total);
        let chunks = tensors.iter().enumerate().flat_map(|(item, tensor)| {
            let pieces = tensor.pieces.iter().map(|piece| piece.units.clone());
            work::chunks(item, pieces, transform::chunk_units(tensor.transform, worker_bytes))
        });
        let job = WriteJob {
            checkpoint: self.checkpoint,
            tensors: &tensors,
            sinks: Sinks::new(
                self.output,
                &self.plan.files,
                tensors.iter().flat_map(|tensor| tensor.pieces.iter().map(|piece| piece.file)),
            ),
            on_overflow: self.options.on_overflow,
            journal,
            entries: Mutex::new(done),
            progress: &progress,
        };
        work::run(&job, chunks, tensors.len(), resources.workers, &progress, observer)?;
        for (shard, _) in &self.plan.shards {
            file::sync_folder(&self.output.join(shard))?;
        }
        Ok(job.entries.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Writes the side files and says all that is known of the tree.
    fn manifest(&self, entries: &HashMap<String, Entry>) -> Result<Manifest> {
        let mut side_files = Vec::with_capacity(self.side_files.len());
        for file in self.side_files {
            side_files.push((file.name.clone(), file.write(self.output)?));
        }
        let tensors = self.plan.tensors.iter().map(|tensor| {
            let entry = &entries[&tensor.name];
            let unit_bytes = tensor.transform.output_unit_bytes();
            let info = TensorInfo {
                files: tensor.pieces.iter().map(|piece| self.plan.files[piece.file].path.clone()).collect(),
                offsets: tensor.pieces.iter().map(|piece| piece.offset).collect(),
                part_nbytes: tensor
                    .pieces
                    .iter()
                    .map(|piece| (piece.units.end - piece.units.start) * unit_bytes)
                    .collect(),
                shape: tensor.shape.clone(),
                dtype: dtype::name(tensor.dtype).into(),
                source_dtype: tensor.source_dtype.into(),
                nbytes: tensor.nbytes,
                xxh3_128: entry.xxh3_128,
                part_xxh3_128: entry.part_xxh3_128.clone(),
                overflow: entry.overflow,
                underflow: entry.underflow,
            };
            (tensor.name.clone(), info)
        });
        let shards = self.plan.shards.iter().map(|(name, range)| {
            let files = &self.plan.files[range.clone()];
            let nbytes = files.iter().map(|file| file.nbytes - file.header.len() as u64).sum();
            (name.clone(), ShardInfo { files: files.len() as u64, nbytes })
        });
        let format = serde_json::to_value(self.options.format).expect("a unit variant serializes");
        Ok(Manifest {
            format: format.as_str().unwrap_or_default().to_owned(),
            format_version: FORMAT_VERSION,
            tensorport_version: env!("CARGO_PKG_VERSION").into(),
            source: SourceInfo { files: self.checkpoint.fingerprints().to_vec() },
            options: self.options.clone(),
            total_tensors: self.plan.tensors.len() as u64,
            total_parameters: self.plan.total_parameters,
            stored_elements: self.plan.stored_elements,
            total_bytes: self.plan.tensors.iter().map(|tensor| tensor.nbytes).sum(),
            metadata: self.checkpoint.metadata().clone(),
            shards: OrderedMap(shards.collect()),
            side_files: OrderedMap(side_files),
            tensors: OrderedMap(tensors.collect()),
            manifest_xxh3_128: String::new(),
        })
    }

    /// Re-reads what was written, before the manifest vouches for it.
    fn verify_written(
        &self,
        manifest: &Manifest,
        worker_bytes: u64,
        resources: Resources,
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        let report = verify::check_tree(self.output, manifest, None, worker_bytes, resources.workers, observer)?;
        if report.ok { Ok(()) } else { Err(Error::Verification(Box::new(report))) }
    }

    /// Makes the tree a finished one: the manifest appears, the journal goes.
    fn finish(&self, manifest: &Manifest, journal: Journal) -> Result<()> {
        file::sync_folder(self.output)?;
        file::write_atomically(&self.output.join(MANIFEST_NAME), manifest.to_text().as_bytes())?;
        file::sync_folder(self.output)?;
        journal.remove()?;
        file::sync_folder(self.output)
    }

    fn report(&self, manifest: &Manifest, resumed_tensors: u64, verified: bool, started: Instant) -> ConversionReport {
        let counted = |count: fn(&TensorInfo) -> u64| {
            let counts = manifest.tensors.0.iter().map(|(name, info)| (name.clone(), count(info)));
            OrderedMap(counts.filter(|(_, count)| *count > 0).collect())
        };
        let (overflow, underflow) = (counted(|info| info.overflow), counted(|info| info.underflow));
        let of_origin = |origin: SideFileOrigin| {
            let files = manifest.side_files.0.iter().filter(|(_, info)| info.origin == origin);
            files.map(|(name, _)| name.clone()).collect()
        };
        let mut warnings = self.plan.warnings.clone();
        if self.options.on_overflow == OnOverflow::Warn {
            warnings.extend(overflow.0.iter().map(|(name, count)| {
                format!("tensor {name:?}: {count} finite values beyond the target precision became infinite")
            }));
        }
        ConversionReport {
            output: self.output.to_path_buf(),
            options: self.options.clone(),
            total_tensors: manifest.total_tensors,
            total_parameters: manifest.total_parameters,
            total_bytes: manifest.total_bytes,
            total_files: manifest.tensors.0.iter().map(|(_, info)| info.files.len() as u64).sum(),
            resumed_tensors,
            overflow,
            underflow,
            copied_files: of_origin(SideFileOrigin::Copied),
            edited_files: of_origin(SideFileOrigin::Edited),
            warnings,
            verified,
            seconds: started.elapsed().as_secs_f64(),
        }
    }

    /// The tree was finished before: all that resuming can do is to make sure of it.
    fn report_finished(
        &self,
        manifest: &Manifest,
        resources: Resources,
        observer: &mut Observer<'_>,
        started: Instant,
    ) -> Result<ConversionReport> {
        self.verify_written(manifest, resources.worker_bytes()?, resources, observer)?;
        Ok(self.report(manifest, manifest.total_tensors, true, started))
    }
}

/// Names in a folder, except the lock and the temporary file of a journal that never came to be.
fn visible_names(folder: &Path) -> Result<Vec<String>> {
    let own = [format!("{JOURNAL_NAME}{}", file::TEMPORARY_SUFFIX), file::LOCK_NAME.to_owned()];
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|fault| Error::io(folder, fault))? {
        let entry = entry.map_err(|fault| Error::io(folder, fault))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !own.contains(&name) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// A shard folder that is a link leads out of the tree: nothing is written or deleted there.
fn refuse_link(folder: &Path) -> Result<()> {
    match std::fs::symlink_metadata(folder) {
        Ok(stat) if stat.is_symlink() => Err(Error::output(folder, "a symbolic link", "a folder of the tree")),
        _ => Ok(()),
    }
}

/// Removes temporary files of an interrupted run, and the files of a tree that is being replaced: those that its
/// manifest or journal names, and no others.
fn remove_leftovers(output: &Path, header: &Header) -> Result<()> {
    let remove = |relative: &str| {
        let Some(path) = manifest::tree_path(output, relative) else { return Ok(()) };
        if let Some((shard, _)) = relative.split_once('/') {
            refuse_link(&output.join(shard))?;
        }
        match std::fs::remove_file(&path) {
            Err(fault) if fault.kind() != std::io::ErrorKind::NotFound => Err(Error::io(&path, fault)),
            _ => Ok(()),
        }
    };
    // The manifest first: without it, what is left is no finished tree.
    remove(MANIFEST_NAME)?;
    let planned: HashSet<&str> = header.files.iter().map(String::as_str).collect();
    for relative in &header.replaces {
        remove(&format!("{relative}{}", file::TEMPORARY_SUFFIX))?;
        if !planned.contains(relative.as_str()) {
            remove(relative)?;
        }
        if let Some((shard, _)) = relative.split_once('/') {
            // Fails while the folder holds anything, as it should.
            let _ = std::fs::remove_dir(output.join(shard));
        }
    }
    for relative in header.files.iter().map(String::as_str).chain([MANIFEST_NAME, JOURNAL_NAME]) {
        remove(&format!("{relative}{}", file::TEMPORARY_SUFFIX))?;
    }
    Ok(())
}

/// Writes tensors chunk by chunk.
struct WriteJob<'a> {
    checkpoint: &'a Checkpoint,
    tensors: &'a [&'a PlannedTensor],
    sinks: Sinks<'a>,
    on_overflow: OnOverflow,
    journal: &'a Journal,
    entries: Mutex<HashMap<String, Entry>>,
    progress: &'a Progress<'a>,
}

/// One worker's reader and buffer, and what the chunk it holds lost.
struct WriteScratch<'a> {
    producer: Producer<'a>,
    counts: Counts,
}

/// What is known of a tensor between its first and its last chunk.
struct WriteState {
    hasher: TensorHasher,
    counts: Counts,
}

impl<'a> Job for WriteJob<'a> {
    type Scratch = WriteScratch<'a>;
    type State = WriteState;

    fn scratch(&self) -> Self::Scratch {
        WriteScratch { producer: Producer::new(self.checkpoint, self.on_overflow), counts: Counts::default() }
    }

    fn begin(&self, item: usize) -> WriteState {
        WriteState { hasher: TensorHasher::new(self.tensors[item].pieces.len()), counts: Counts::default() }
    }

    fn process(&self, chunk: &Chunk, scratch: &mut Self::Scratch) -> Result<()> {
        let tensor = self.tensors[chunk.item];
        scratch.counts = scratch.producer.produce(tensor, &chunk.units)?;
        let output = scratch.producer.output();
        let piece = &tensor.pieces[chunk.piece];
        let skipped = (chunk.units.start - piece.units.start) * tensor.transform.output_unit_bytes();
        self.sinks.write(piece.file, output, piece.offset + skipped)?;
        self.progress.add_bytes(output.len() as u64);
        Ok(())
    }

    fn commit(&self, chunk: &Chunk, scratch: &mut Self::Scratch, state: &mut WriteState) -> Result<()> {
        let tensor = self.tensors[chunk.item];
        state.hasher.update(scratch.producer.output(), chunk.ends_piece);
        state.counts.merge(scratch.counts);
        if chunk.ends_item && state.counts.overflow > 0 && self.on_overflow == OnOverflow::Error {
            let target = Target::from_dtype(tensor.dtype).expect("only casts overflow");
            return Err(Error::Overflow {
                tensor: tensor.name.clone(),
                count: state.counts.overflow,
                largest: state.counts.largest,
                precision: dtype::name(tensor.dtype),
                limit: target.max(),
            });
        }
        if chunk.ends_piece {
            self.sinks.end_piece(tensor.pieces[chunk.piece].file)?;
        }
        Ok(())
    }

    fn finish(&self, item: usize, state: WriteState) -> Result<()> {
        let checksums = state.hasher.finish();
        let entry = Entry {
            tensor: self.tensors[item].name.clone(),
            xxh3_128: checksums.whole,
            part_xxh3_128: checksums.parts,
            overflow: state.counts.overflow,
            underflow: state.counts.underflow,
        };
        self.journal.append(&entry)?;
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.insert(entry.tensor.clone(), entry);
        Ok(())
    }
}
