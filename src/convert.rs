//! Executes a plan: parallel, in bounded buffers, resumable, every file whole or absent.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde::Serialize;

use crate::arrivals::Arrivals;
use crate::cast::{Counts, OnOverflow, Target};
use crate::check::{self, CheckFile, CheckTensor, Findings, Tree};
use crate::checkpoint::{Checkpoint, SourceFile};
use crate::checksum::TensorHasher;
use crate::dtype;
use crate::error::{Error, Result};
use crate::file;
use crate::journal::{Entry, Journal};
use crate::manifest::{FORMAT_VERSION, Losses, Manifest, ShardInfo, SideFileOrigin, SourceInfo, TensorInfo};
use crate::mxfp4::{BLOCK_BYTES, BLOCKS_SUFFIX, ErrorSums, MX_BLOCK_SIZE, QuantizationError};
use crate::options::Options;
use crate::ordered_map::OrderedMap;
use crate::output_folder::{self, Expected, OutputFolder, Prepared};
use crate::plan::{self, Plan, PlannedTensor};
use crate::progress::{Observer, Phase, Progress};
use crate::side_files::{self, SideFile};
use crate::sink::Sinks;
use crate::transform::{self, Producer};
use crate::verify::{self, VerificationReport};
use crate::work::{self, Chunk, Chunks, Job, Pool, Resources, lock};

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
    #[serde(serialize_with = "verify::as_text")]
    pub output: PathBuf,
    /// The options that were used.
    pub options: Options,
    /// Number of tensors in the output.
    pub total_tensors: u64,
    /// Number of parameters; MXFP4 values count once, scales do not.
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
    /// What encoding to MXFP4 lost and gained, by the name of the matrix.
    pub quantization: OrderedMap<Quantized>,
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

/// What encoding one matrix to MXFP4 lost and gained.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Quantized {
    /// The error of its values.
    #[serde(flatten)]
    pub error: QuantizationError,
    /// Bytes of the source for a byte of codes and scales.
    pub compression: f64,
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
    convert_arriving(source, None, output, options, mode, resources, observer)
}

/// As [`convert`], from stand-ins at `source` for files that `arrivals` tells of.
pub fn convert_arriving(
    source: &Path,
    arrivals: Option<&Arc<Arrivals>>,
    output: &Path,
    options: &Options,
    mode: Mode,
    resources: Resources,
    observer: &mut Observer<'_>,
) -> Result<ConversionReport> {
    let started = Instant::now();
    let pool = resources.pool()?;
    let options = &options.settled()?;
    let mut checkpoint = Checkpoint::open(source)?;
    if let Some(arrivals) = arrivals {
        checkpoint = checkpoint.arriving(arrivals);
    }
    let plan = plan::of_checkpoint(&checkpoint, options)?;
    let side_files = side_files::plan(&checkpoint, &plan, options)?;
    let job = Conversion { checkpoint: &checkpoint, plan: &plan, side_files: &side_files, options, output };
    let expected = Expected::new(&checkpoint, &plan, &side_files, options);
    let (folder, listed) = match OutputFolder::prepare(output, expected, mode)? {
        Prepared::Ready(folder, listed) => (folder, listed),
        Prepared::Finished(manifest) => return job.report_finished(&manifest, pool, observer, started),
    };
    let done = job.recheck(listed, pool, observer)?;
    let resumed_tensors = done.iter().flatten().count() as u64;
    let entries = job.write_tensors(&folder.journal, done, pool, observer)?;
    checkpoint.files().iter().try_for_each(SourceFile::check)?;
    let manifest = job.manifest()?;
    if mode.verify {
        job.verify_written(&manifest, &entries, pool, observer)?;
    }
    folder.finish(&manifest, job.tensor_infos(&entries))?;
    let tensors = plan.tensors.iter().zip(&entries);
    let losses = tensors.map(|(tensor, entry)| (tensor.name.as_str(), tensor.source_dtype, entry.losses()));
    Ok(job.report(&manifest, losses, resumed_tensors, mode.verify, started))
}

struct Conversion<'a> {
    checkpoint: &'a Checkpoint,
    plan: &'a Plan,
    side_files: &'a [SideFile],
    options: &'a Options,
    output: &'a Path,
}

impl Conversion<'_> {
    /// For each planned tensor what the journal says of it, if its files are there and whole.
    fn recheck(
        &self,
        mut listed: HashMap<String, Entry>,
        pool: Pool,
        observer: &mut Observer<'_>,
    ) -> Result<Vec<Option<Entry>>> {
        // Blocks whose line says nothing of their error are done again.
        let listed = |tensor: &PlannedTensor| {
            let entry = listed.remove(&tensor.name)?;
            (entry.quantization.is_some() == tensor.transform.encodes_blocks()).then_some(entry)
        };
        let mut done: Vec<_> = self.plan.tensors.iter().map(listed).collect();
        if done.iter().any(Option::is_some) {
            let findings = self.check(Phase::Check, done.iter().map(Option::as_ref), pool, observer)?;
            let mut is_broken = findings.is_broken.into_iter();
            for entry in &mut done {
                entry.take_if(|_| is_broken.next().unwrap_or(true));
            }
        }
        // A file is written whole: what is missing of it takes along what is there.
        for file in &self.plan.files {
            let tensors = file.placed.tensors.clone();
            if done[tensors.clone()].iter().any(Option::is_none) {
                done[tensors].fill(None);
            }
        }
        Ok(done)
    }

    /// Re-reads the tensors that have an entry.
    fn check<'b>(
        &'b self,
        phase: Phase,
        entries: impl Iterator<Item = Option<&'b Entry>>,
        pool: Pool,
        observer: &mut Observer<'_>,
    ) -> Result<Findings> {
        let checks: Vec<_> = self
            .plan
            .tensors
            .iter()
            .zip(entries)
            .filter_map(|(tensor, entry)| Some(self.check_of(tensor, entry?)))
            .collect();
        let tree = Tree { root: self.output, format: self.options.format, metadata: self.checkpoint.metadata() };
        check::check_tensors(phase, tree, &checks, None, pool, observer)
    }

    fn check_of<'b>(&'b self, tensor: &'b PlannedTensor, entry: &'b Entry) -> CheckTensor<'b> {
        let unit_bytes = tensor.transform.output_unit_bytes();
        let files = tensor.pieces.iter().map(|piece| {
            let data = piece.units.start * unit_bytes..piece.units.end * unit_bytes;
            CheckFile { path: self.plan.files[piece.file].path(), offset: piece.offset, data }
        });
        CheckTensor {
            name: &tensor.name,
            dtype: tensor.dtype,
            shape: &tensor.shape,
            files: files.collect(),
            whole: entry.xxh3_128,
            parts: &entry.part_xxh3_128,
            losses: None,
            planned: None,
        }
    }

    /// Writes all tensors but those already `done`.
    fn write_tensors(
        &self,
        journal: &Journal,
        done: Vec<Option<Entry>>,
        pool: Pool,
        observer: &mut Observer<'_>,
    ) -> Result<Vec<Entry>> {
        for folder in self.plan.folders() {
            let folder = self.output.join(folder);
            output_folder::refuse_link(&folder)?;
            std::fs::create_dir_all(&folder).map_err(|fault| Error::io(&folder, fault))?;
        }
        // What is still on its way comes in the order of the source.
        let files_at_once = if self.checkpoint.is_arriving() { 1 } else { pool.workers };
        let todo = self.in_turns(&done, files_at_once);
        let tensors = || todo.iter().map(|&tensor| &self.plan.tensors[tensor]);
        let names = tensors().map(|tensor| tensor.name.as_str()).collect();
        let bytes_total = tensors().map(|tensor| tensor.nbytes).sum();
        let progress = Progress::new(Phase::Convert, names, bytes_total);
        let job = WriteJob {
            checkpoint: self.checkpoint,
            plan: self.plan,
            todo: &todo,
            worker_bytes: pool.worker_bytes,
            sinks: Sinks::new(
                self.output,
                self.plan.files.iter().map(|file| (file.path(), file.nbytes)),
                tensors().flat_map(|tensor| tensor.pieces.iter().map(|piece| piece.file)),
            ),
            on_overflow: self.options.on_overflow,
            journal,
            ledger: Mutex::new(Ledger::new(self.plan, done)),
            progress: &progress,
        };
        work::run(&job, 0..todo.len(), pool.workers, &progress, observer)?;
        let ledger = job.ledger.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(ledger.entries.into_iter().map(|entry| entry.expect("what was not done before is done now")).collect())
    }

    /// The tensors that are not done, in the order in which they are begun: those of some files in turns, one for each worker,
    /// for the kernel lets one of them write a file at a time.
    fn in_turns(&self, done: &[Option<Entry>], files_at_once: usize) -> Vec<usize> {
        let is_first = |tensor: &usize| {
            let file = self.plan.tensors[*tensor].pieces.first().map(|piece| &self.plan.files[piece.file]);
            file.is_none_or(|file| file.placed.tensors.start == *tensor)
        };
        let mut files: Vec<Vec<usize>> = Vec::new();
        for tensor in (0..done.len()).filter(|&tensor| done[tensor].is_none()) {
            match files.last_mut() {
                Some(file) if !is_first(&tensor) => file.push(tensor),
                _ => files.push(vec![tensor]),
            }
        }
        let turns = files.chunks(files_at_once.max(1)).flat_map(|files| {
            let longest = files.iter().map(Vec::len).max().unwrap_or(0);
            (0..longest).flat_map(move |turn| files.iter().filter_map(move |file| file.get(turn).copied()))
        });
        turns.collect()
    }

    /// What the manifest says of each tensor, made when it is asked for.
    fn tensor_infos<'b>(&'b self, entries: &'b [Entry]) -> impl Iterator<Item = (&'b str, TensorInfo)> {
        self.plan.tensors.iter().zip(entries).map(|(tensor, entry)| {
            let info = TensorInfo {
                files: tensor.pieces.iter().map(|piece| self.plan.files[piece.file].path().to_owned()).collect(),
                offsets: tensor.pieces.iter().map(|piece| piece.offset).collect(),
                part_nbytes: tensor.pieces.iter().map(|piece| tensor.piece_nbytes(piece)).collect(),
                shape: tensor.shape.clone(),
                dtype: dtype::name(tensor.dtype).into(),
                source_dtype: tensor.source_dtype.into(),
                nbytes: tensor.nbytes,
                xxh3_128: entry.xxh3_128,
                part_xxh3_128: entry.part_xxh3_128.clone(),
                overflow: entry.overflow,
                underflow: entry.underflow,
                quantization: entry.quantization,
            };
            (tensor.name.as_str(), info)
        })
    }

    /// Writes the side files, makes all files durable, and says all that the manifest does but for the tensors.
    fn manifest(&self) -> Result<Manifest> {
        let mut side_files = Vec::with_capacity(self.side_files.len());
        for file in self.side_files {
            side_files.push((file.name.clone(), file.write(self.output)?));
        }
        for folder in self.plan.folders() {
            file::sync_folder(&self.output.join(folder))?;
        }
        let shards = self.plan.shards.iter().map(|(name, range)| {
            let files = &self.plan.files[range.clone()];
            let nbytes = files.iter().map(|file| file.data_nbytes).sum();
            (name.clone(), ShardInfo { files: files.len() as u64, nbytes })
        });
        Ok(Manifest {
            format: self.options.format.name().into(),
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
            tensors: OrderedMap::default(),
            manifest_xxh3_128: String::new(),
        })
    }

    /// Re-reads what was written, before the manifest vouches for it.
    fn verify_written(
        &self,
        manifest: &Manifest,
        entries: &[Entry],
        pool: Pool,
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        let started = Instant::now();
        let mut failures = Vec::new();
        verify::check_side_files(self.output, manifest, &mut failures)?;
        failures.extend(self.check(Phase::Verify, entries.iter().map(Some), pool, observer)?.failures);
        if failures.is_empty() {
            return Ok(());
        }
        Err(Error::Verification(Box::new(VerificationReport {
            output: self.output.to_path_buf(),
            ok: false,
            failures,
            tensors: manifest.total_tensors,
            nbytes: manifest.total_bytes,
            compared_with_source: false,
            seconds: started.elapsed().as_secs_f64(),
        })))
    }

    /// `losses` are each tensor's name, its dtype in the source, and what it lost.
    fn report<'b>(
        &self,
        manifest: &Manifest,
        losses: impl Iterator<Item = (&'b str, &'b str, Losses)>,
        resumed_tensors: u64,
        verified: bool,
        started: Instant,
    ) -> ConversionReport {
        let (mut overflow, mut underflow) = (OrderedMap::default(), OrderedMap::default());
        let mut quantization = OrderedMap::default();
        for (name, source_dtype, lost) in losses {
            for (counts, count) in [(&mut overflow, lost.overflow), (&mut underflow, lost.underflow)] {
                if count > 0 {
                    counts.0.push((name.to_owned(), count));
                }
            }
            quantization.0.extend(lost.quantization.map(|error| quantized(name, source_dtype, error)));
        }
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
            total_files: self.plan.files.len() as u64,
            resumed_tensors,
            overflow,
            underflow,
            quantization,
            copied_files: of_origin(SideFileOrigin::Copied),
            edited_files: of_origin(SideFileOrigin::Edited),
            warnings,
            verified,
            seconds: started.elapsed().as_secs_f64(),
        }
    }

    /// A tree with the right options and source headers was finished before: all that resuming can do is to make sure
    /// that it is whole, and that it was made from this very source.
    fn report_finished(
        &self,
        manifest: &Manifest,
        pool: Pool,
        observer: &mut Observer<'_>,
        started: Instant,
    ) -> Result<ConversionReport> {
        let written = verify::check_tree(self.output, manifest, None, pool, observer)?;
        if !written.ok {
            return Err(Error::Verification(Box::new(written)));
        }
        let source =
            verify::Source { checkpoint: self.checkpoint, plan: self.plan, on_overflow: self.options.on_overflow };
        let compared = verify::check_tree(self.output, manifest, Some(&source), pool, observer)?;
        let mut side_files = Vec::with_capacity(self.side_files.len());
        for file in self.side_files {
            side_files.push((file.name.clone(), file.info()?));
        }
        if !compared.ok || side_files != manifest.side_files.0 {
            let found = compared.failures.first().map_or("other side files".to_owned(), ToString::to_string);
            let found = format_args!("a finished tree of another source ({found})");
            return Err(Error::output(self.output, found, "overwrite, or another folder"));
        }
        let tensors = manifest.tensors.0.iter();
        let losses = tensors.map(|(name, info)| (name.as_str(), info.source_dtype.as_str(), info.losses()));
        Ok(self.report(manifest, losses, manifest.total_tensors, true, started))
    }
}

/// The entry of a report for blocks that were made of a matrix of some dtype.
fn quantized(blocks: &str, source_dtype: &str, error: QuantizationError) -> (String, Quantized) {
    let name = blocks.strip_suffix(BLOCKS_SUFFIX).unwrap_or(blocks).to_owned();
    let source_bits = dtype::from_name(source_dtype).map_or(0, |dtype| dtype.bitsize());
    #[expect(clippy::cast_precision_loss, reason = "bytes of a block")]
    let compression = (source_bits / 8 * MX_BLOCK_SIZE) as f64 / (BLOCK_BYTES + 1) as f64;
    (name, Quantized { error, compression })
}

/// Writes tensors chunk by chunk.
struct WriteJob<'a> {
    checkpoint: &'a Checkpoint,
    plan: &'a Plan,
    /// Which of the tensors to write.
    todo: &'a [usize],
    worker_bytes: u64,
    sinks: Sinks<'a>,
    on_overflow: OnOverflow,
    journal: &'a Journal,
    ledger: Mutex<Ledger>,
    progress: &'a Progress<'a>,
}

/// What is done: a tensor is listed in the journal when it and all its files are whole.
struct Ledger {
    entries: Vec<Option<Entry>>,
    is_listed: Vec<bool>,
    /// For each tensor how many of its files have yet to appear.
    files_left: Vec<usize>,
}

impl Ledger {
    fn new(plan: &Plan, done: Vec<Option<Entry>>) -> Self {
        let files = |tensor: &PlannedTensor| {
            let mut files: Vec<_> = tensor.pieces.iter().map(|piece| piece.file).collect();
            files.dedup();
            files.len()
        };
        let files_left = plan.tensors.iter().map(files).collect();
        Self { is_listed: done.iter().map(Option::is_some).collect(), entries: done, files_left }
    }

    /// Lists a tensor if it can be.
    fn list(&mut self, tensor: usize, journal: &Journal) -> Result<()> {
        if self.files_left[tensor] > 0 || self.is_listed[tensor] {
            return Ok(());
        }
        if let Some(entry) = &self.entries[tensor] {
            journal.append(entry)?;
            self.is_listed[tensor] = true;
        }
        Ok(())
    }
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
    error_sums: ErrorSums,
}

impl WriteJob<'_> {
    fn tensor(&self, item: usize) -> &PlannedTensor {
        &self.plan.tensors[self.todo[item]]
    }
}

impl<'a> Job for WriteJob<'a> {
    type Scratch = WriteScratch<'a>;
    type State = WriteState;

    fn chunks(&self, item: usize) -> Chunks {
        let tensor = self.tensor(item);
        let chunk_units = transform::chunk_units(tensor.transform, self.worker_bytes);
        Chunks::new(item, tensor.pieces.iter().map(|piece| piece.units.clone()), chunk_units)
    }

    fn scratch(&self) -> Self::Scratch {
        WriteScratch { producer: Producer::new(self.checkpoint, self.on_overflow), counts: Counts::default() }
    }

    fn begin(&self, item: usize) -> WriteState {
        let hasher = TensorHasher::new(self.tensor(item).pieces.len());
        WriteState { hasher, counts: Counts::default(), error_sums: ErrorSums::default() }
    }

    fn process(&self, chunk: &Chunk, scratch: &mut Self::Scratch) -> Result<()> {
        let tensor = self.tensor(chunk.item);
        scratch.counts = scratch.producer.produce(tensor.transform, &tensor.sources, &chunk.units)?;
        let output = scratch.producer.output();
        let piece = &tensor.pieces[chunk.piece];
        let skipped = (chunk.units.start - piece.units.start) * tensor.transform.output_unit_bytes();
        self.sinks.write(piece.file, output, piece.offset + skipped, || self.plan.file_layout(piece.file).frames)?;
        self.progress.add_bytes(output.len() as u64);
        Ok(())
    }

    fn commit(&self, chunk: &Chunk, scratch: &mut Self::Scratch, state: &mut WriteState) -> Result<()> {
        let tensor = self.tensor(chunk.item);
        state.hasher.update(scratch.producer.output(), chunk.ends_piece);
        state.counts.merge(scratch.counts);
        state.error_sums.merge(&scratch.producer.take_error_sums());
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
            let file = tensor.pieces[chunk.piece].file;
            if self.sinks.end_piece(file)? {
                let mut ledger = lock(&self.ledger);
                for tensor in self.plan.files[file].placed.tensors.clone() {
                    ledger.files_left[tensor] -= 1;
                    ledger.list(tensor, self.journal)?;
                }
            }
        }
        Ok(())
    }

    fn release(&self) {
        self.checkpoint.stop_waiting();
    }

    fn finish(&self, item: usize, state: WriteState) -> Result<()> {
        // The journal outlives this run: it must not vouch for a tensor that was read from an edited file.
        let specs = self.tensor(item).sources.iter().map(|&source| &self.checkpoint.tensors()[source]);
        for part in specs.flat_map(|spec| &spec.parts) {
            self.checkpoint.files()[part.file].check()?;
        }
        let checksums = state.hasher.finish();
        let entry = Entry {
            tensor: self.tensor(item).name.clone(),
            xxh3_128: checksums.whole,
            part_xxh3_128: checksums.parts,
            overflow: state.counts.overflow,
            underflow: state.counts.underflow,
            quantization: self.tensor(item).transform.encodes_blocks().then(|| state.error_sums.error()),
        };
        // Under the lock: lines of two workers must not mix.
        let mut ledger = lock(&self.ledger);
        ledger.entries[self.todo[item]] = Some(entry);
        ledger.list(self.todo[item], self.journal)
    }
}
