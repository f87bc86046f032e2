//! Executes a plan: parallel, in bounded buffers, resumable, every file whole or absent.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde::Serialize;

use crate::cast::{Counts, OnOverflow, Target};
use crate::check::{self, CheckFile, CheckTensor};
use crate::checkpoint::{Checkpoint, SourceFile};
use crate::checksum::{TensorChecksums, TensorHasher};
use crate::dtype;
use crate::error::{Error, Result};
use crate::file;
use crate::journal::{Entry, Journal};
use crate::manifest::{FORMAT_VERSION, Manifest, ShardInfo, SideFileOrigin, SourceInfo, TensorInfo};
use crate::ordered_map::OrderedMap;
use crate::output_folder::{self, Expected, OutputFolder, Prepared};
use crate::plan::{self, Options, Plan, PlannedTensor};
use crate::progress::{Observer, Phase, Progress};
use crate::side_files::{self, SideFile};
use crate::sink::Sinks;
use crate::transform::{self, Producer};
use crate::verify;
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
    let pool = resources.pool()?;
    let checkpoint = Checkpoint::open(source)?;
    let plan = plan::plan(checkpoint.tensors(), |tensor| checkpoint.path_of(tensor), options)?;
    let side_files = side_files::plan(&checkpoint, &plan, options)?;
    let job = Conversion { checkpoint: &checkpoint, plan: &plan, side_files: &side_files, options, output };
    let expected = Expected::new(&checkpoint, &plan, &side_files, options);
    let (folder, listed) = match OutputFolder::prepare(output, &expected, mode)? {
        Prepared::Ready(folder, listed) => (folder, listed),
        Prepared::Finished(manifest) => return job.report_finished(&manifest, pool, observer, started),
    };
    let done = job.recheck(&listed, pool, observer)?;
    let resumed_tensors = done.len() as u64;
    let entries = job.write_tensors(&folder.journal, done, pool, observer)?;
    checkpoint.files().iter().try_for_each(SourceFile::check)?;
    let manifest = job.manifest(&entries)?;
    if mode.verify {
        job.verify_written(&manifest, pool, observer)?;
    }
    folder.finish(&manifest)?;
    Ok(job.report(&manifest, resumed_tensors, mode.verify, started))
}

struct Conversion<'a> {
    checkpoint: &'a Checkpoint,
    plan: &'a Plan,
    side_files: &'a [SideFile],
    options: &'a Options,
    output: &'a Path,
}

impl Conversion<'_> {
    /// Of the tensors that the journal lists, those whose files are there and whole.
    fn recheck(
        &self,
        listed: &HashMap<String, Entry>,
        pool: Pool,
        observer: &mut Observer<'_>,
    ) -> Result<HashMap<String, Entry>> {
        let listed_tensors: Vec<_> =
            self.plan.tensors.iter().filter_map(|tensor| Some((tensor, listed.get(&tensor.name)?))).collect();
        if listed_tensors.is_empty() {
            return Ok(HashMap::new());
        }
        let checks: Vec<_> =
            listed_tensors.iter().map(|(tensor, entry)| self.check_of(tensor, entry.checksums())).collect();
        let failures = check::check_tensors(Phase::Check, self.output, &checks, None, pool, observer)?;
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
        pool: Pool,
        observer: &mut Observer<'_>,
    ) -> Result<HashMap<String, Entry>> {
        for (shard, _) in &self.plan.shards {
            let folder = self.output.join(shard);
            output_folder::refuse_link(&folder)?;
            std::fs::create_dir_all(&folder).map_err(|fault| Error::io(&folder, fault))?;
        }
        let tensors: Vec<_> = self.plan.tensors.iter().filter(|tensor| !done.contains_key(&tensor.name)).collect();
        let names = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        let bytes_total = tensors.iter().map(|tensor| tensor.nbytes).sum();
        let progress = Progress::new(Phase::Convert, names, bytes_total);
        let job = WriteJob {
            checkpoint: self.checkpoint,
            tensors: &tensors,
            worker_bytes: pool.worker_bytes,
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
        work::run(&job, 0..tensors.len(), pool.workers, &progress, observer)?;
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
    fn verify_written(&self, manifest: &Manifest, pool: Pool, observer: &mut Observer<'_>) -> Result<()> {
        let report = verify::check_tree(self.output, manifest, None, pool, observer)?;
        if report.ok { Ok(()) } else { Err(Error::Verification(Box::new(report))) }
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

    /// A tree with the right options and source headers was finished before: all that resuming can do is to make sure
    /// that it is whole, and that it was made from this very source.
    fn report_finished(
        &self,
        manifest: &Manifest,
        pool: Pool,
        observer: &mut Observer<'_>,
        started: Instant,
    ) -> Result<ConversionReport> {
        self.verify_written(manifest, pool, observer)?;
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
        Ok(self.report(manifest, manifest.total_tensors, true, started))
    }
}

/// Writes tensors chunk by chunk.
struct WriteJob<'a> {
    checkpoint: &'a Checkpoint,
    tensors: &'a [&'a PlannedTensor],
    worker_bytes: u64,
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

    fn chunks(&self, item: usize) -> Chunks {
        let tensor = self.tensors[item];
        let chunk_units = transform::chunk_units(tensor.transform, self.worker_bytes);
        Chunks::new(item, tensor.pieces.iter().map(|piece| piece.units.clone()), chunk_units)
    }

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
        // The journal outlives this run: it must not vouch for a tensor that was read from an edited file.
        let specs = self.tensors[item].sources.iter().map(|&source| &self.checkpoint.tensors()[source]);
        for part in specs.flat_map(|spec| &spec.parts) {
            self.checkpoint.files()[part.file].check()?;
        }
        let checksums = state.hasher.finish();
        let entry = Entry {
            tensor: self.tensors[item].name.clone(),
            xxh3_128: checksums.whole,
            part_xxh3_128: checksums.parts,
            overflow: state.counts.overflow,
            underflow: state.counts.underflow,
        };
        // Under the lock: lines of two workers must not mix.
        let mut entries = lock(&self.entries);
        self.journal.append(&entry)?;
        entries.insert(entry.tensor.clone(), entry);
        Ok(())
    }
}
