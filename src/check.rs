//! Re-reads tensors that a conversion wrote: sizes, headers, checksums, and the values that the source makes.

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use safetensors::Dtype;

use crate::cast::Counts;
use crate::checksum::{Checksum, TensorHasher};
use crate::error::{Error, Result};
use crate::file;
use crate::manifest::Losses;
use crate::mxfp4::ErrorSums;
use crate::options::Format;
use crate::ordered_map::OrderedMap;
use crate::output::{self, Stretch, Tensor};
use crate::plan::PlannedTensor;
use crate::progress::{Observer, Phase, Progress};
use crate::system;
use crate::transform::{self, Producer};
use crate::verify::{self, Failure, Source};
use crate::work::{self, Chunk, Chunks, Job, Pool, lock};

/// One tensor to be re-read.
pub(crate) struct CheckTensor<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: &'a [u64],
    /// Its files, in order.
    pub files: Vec<CheckFile<'a>>,
    /// Hash of its data, as recorded.
    pub whole: Checksum,
    /// Hash of its data in each file, as recorded.
    pub parts: &'a [Checksum],
    /// What was lost, as recorded, where that is to be compared with the source.
    pub losses: Option<Losses>,
    /// How to make it from the source, when its values are to be compared.
    pub planned: Option<&'a PlannedTensor>,
}

/// One file of a tensor to be re-read.
pub(crate) struct CheckFile<'a> {
    /// Path relative to the tree.
    pub path: &'a str,
    /// Where the data begins.
    pub offset: u64,
    /// Which bytes of the tensor it holds.
    pub data: Range<u64>,
}

impl CheckTensor<'_> {
    /// Bytes of its data.
    pub fn nbytes(&self) -> u64 {
        self.files.last().map_or(0, |file| file.data.end)
    }

    fn view(&self) -> Tensor<'_> {
        Tensor { name: self.name, dtype: self.dtype, shape: self.shape, nbytes: self.nbytes() }
    }

    fn failure(&self, file: &CheckFile<'_>, what: String) -> Failure {
        Failure { file: file.path.to_owned(), tensor: Some(self.name.to_owned()), what }
    }

    fn unit_bytes(&self) -> u64 {
        self.planned.map_or(1, |tensor| tensor.transform.output_unit_bytes())
    }
}

/// A tree whose tensors are re-read.
#[derive(Clone, Copy)]
pub(crate) struct Tree<'a> {
    /// Its folder.
    pub root: &'a Path,
    /// Its format.
    pub format: Format,
    /// The metadata in it.
    pub metadata: &'a OrderedMap<String>,
}

/// What is wrong with tensors that were re-read.
#[derive(Default)]
pub(crate) struct Findings {
    /// Each fault, in the order of the tensors.
    pub failures: Vec<Failure>,
    /// For each tensor whether anything is wrong with it or its files.
    pub is_broken: Vec<bool>,
}

/// Re-reads tensors of a tree. Those of one file follow each other.
pub(crate) fn check_tensors(
    phase: Phase,
    tree: Tree<'_>,
    tensors: &[CheckTensor<'_>],
    source: Option<&Source<'_>>,
    pool: Pool,
    observer: &mut Observer<'_>,
) -> Result<Findings> {
    let mut failures = Vec::new();
    let mut is_broken = vec![false; tensors.len()];
    // Sizes and frames first: a manifest can claim any number of bytes, but only those that are there are read.
    let stretches = tensors.iter().enumerate().flat_map(|(item, tensor)| {
        tensor.files.iter().enumerate().map(move |(part, file)| Stretch {
            tensor: (item, part),
            view: tensor.view(),
            file: file.path,
            offset: file.offset,
            data: file.data.clone(),
            part_bytes: tensor.files[0].data.end,
        })
    });
    output::for_each_file(stretches, |stretches| {
        let Err(fault) = check_file(tree, stretches) else { return Ok(()) };
        let what = read_fault(fault)?;
        let items = stretches.iter().map(|stretch| stretch.tensor.0);
        let (first, last) = (stretches[0].tensor.0, stretches[stretches.len() - 1].tensor.0);
        let tensor = (first == last).then(|| tensors[first].name.to_owned());
        failures.push((first, Failure { file: stretches[0].file.to_owned(), tensor, what }));
        items.for_each(|item| is_broken[item] = true);
        Ok(())
    })?;
    let names = tensors.iter().map(|tensor| tensor.name).collect();
    let whole = || (0..tensors.len()).filter(|&item| !is_broken[item]);
    let nbytes = whole().map(|item| tensors[item].nbytes()).sum();
    let progress = Progress::new(phase, names, nbytes);
    let worker_bytes = pool.worker_bytes;
    let failures = Mutex::new(failures);
    let job = CheckJob { root: tree.root, tensors, source, worker_bytes, progress: &progress, failures };
    work::run(&job, whole(), pool.workers, &progress, observer)?;
    let mut failures = job.failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    failures.sort_by_key(|(item, _)| *item);
    for (item, _) in &failures {
        is_broken[*item] = true;
    }
    Ok(Findings { failures: failures.into_iter().map(|(_, failure)| failure).collect(), is_broken })
}

/// Compares a file's size and frames with what its format makes of its tensors.
fn check_file(tree: Tree<'_>, stretches: &[Stretch<'_, &str>]) -> Result<()> {
    let path = tree.root.join(stretches[0].file);
    let (handle, stat) = file::open_regular(&path)?;
    let layout = output::layout_of(tree.format.layout(), stretches, tree.metadata, stat.len())
        .map_err(|found| Error::file(&path, found, "parts where the format has them"))?;
    output::check_frames(&path, &handle, stat.len(), &layout)
}

struct CheckJob<'a> {
    root: &'a Path,
    tensors: &'a [CheckTensor<'a>],
    source: Option<&'a Source<'a>>,
    worker_bytes: u64,
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
    error_sums: ErrorSums,
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
    error_sums: ErrorSums,
    broken: bool,
    differs: bool,
}

impl<'a> Job for CheckJob<'a> {
    type Scratch = CheckScratch<'a>;
    type State = CheckState;

    fn chunks(&self, item: usize) -> Chunks {
        let tensor = &self.tensors[item];
        let unit_bytes = tensor.unit_bytes();
        let pieces = tensor.files.iter().map(|file| file.data.start / unit_bytes..file.data.end / unit_bytes);
        let chunk_units = match tensor.planned {
            // The written bytes need a buffer beside the expected ones.
            Some(planned) => transform::chunk_units(planned.transform, self.worker_bytes / 2),
            None => self.worker_bytes,
        };
        Chunks::new(item, pieces, chunk_units)
    }

    fn scratch(&self) -> Self::Scratch {
        CheckScratch {
            producer: self.source.map(|source| Producer::new(source.checkpoint, source.on_overflow)),
            handle: None,
            written: Vec::new(),
            written_bytes: 0,
            counts: Counts::default(),
            error_sums: ErrorSums::default(),
            fault: None,
        }
    }

    fn begin(&self, item: usize) -> CheckState {
        let hasher = TensorHasher::new(self.tensors[item].files.len());
        let (counts, error_sums) = (Counts::default(), ErrorSums::default());
        CheckState { hasher, counts, error_sums, broken: false, differs: false }
    }

    fn process(&self, chunk: &Chunk, scratch: &mut Self::Scratch) -> Result<()> {
        let tensor = &self.tensors[chunk.item];
        let unit_bytes = tensor.unit_bytes();
        let nbytes = (chunk.units.end - chunk.units.start) * unit_bytes;
        scratch.written_bytes = usize::try_from(nbytes).expect("no more than a worker's buffer");
        transform::grow(&mut scratch.written, scratch.written_bytes)?;
        let start = chunk.units.start * unit_bytes;
        scratch.fault = self.read(chunk, scratch, start).err().map(read_fault).transpose()?.map(Fault::File);
        if let (None, Some(planned), Some(producer)) = (&scratch.fault, tensor.planned, &mut scratch.producer) {
            scratch.counts = producer.produce(planned.transform, &planned.sources, &chunk.units)?;
            scratch.error_sums = producer.take_error_sums();
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
        state.error_sums.merge(&std::mem::take(&mut scratch.error_sums));
        Ok(())
    }

    fn finish(&self, item: usize, state: CheckState) -> Result<()> {
        if state.broken {
            return Ok(());
        }
        let tensor = &self.tensors[item];
        let found = state.hasher.finish();
        for (piece, (found, expected)) in found.parts.iter().zip(tensor.parts).enumerate() {
            if found != expected {
                self.fail(item, piece, "its checksum does not hold".into());
            }
        }
        let (same_number, same_parts) = (found.parts.len() == tensor.parts.len(), found.parts == tensor.parts);
        if !same_number || (same_parts && found.whole != tensor.whole) {
            self.failures().push((
                item,
                verify::in_manifest(Some(tensor.name), "its checksums are not those of its parts".into()),
            ));
        }
        if let (Some(planned), Some(told)) = (tensor.planned, tensor.losses) {
            let Counts { overflow, underflow, .. } = state.counts;
            let quantization = planned.transform.encodes_blocks().then(|| state.error_sums.error());
            let found = Losses { overflow, underflow, quantization };
            if told != found {
                let what = format!("found {told}, expected {found}");
                self.failures().push((item, verify::in_manifest(Some(tensor.name), what)));
            }
        }
        Ok(())
    }
}

impl CheckJob<'_> {
    /// Reads a chunk of a written tensor.
    fn read(&self, chunk: &Chunk, scratch: &mut CheckScratch<'_>, start: u64) -> Result<()> {
        let tensor = &self.tensors[chunk.item];
        let file = &tensor.files[chunk.piece];
        let path = self.root.join(file.path);
        let handle = match &mut scratch.handle {
            Some((item, piece, handle)) if (*item, *piece) == (chunk.item, chunk.piece) => handle,
            slot => &mut slot.insert((chunk.item, chunk.piece, file::open_regular(&path)?.0)).2,
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
        self.failures().push((item, tensor.failure(&tensor.files[piece], what)));
    }

    fn failures(&self) -> MutexGuard<'_, Vec<(usize, Failure)>> {
        lock(&self.failures)
    }
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

/// A fault of a file of the tree, in words; faults that say nothing about the tree stay errors.
pub(crate) fn read_fault(fault: Error) -> Result<String> {
    match fault {
        Error::Io { ref source, .. }
            if source.kind() == std::io::ErrorKind::OutOfMemory || system::has_too_many_open_files(source) =>
        {
            Err(fault)
        }
        Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => Ok("missing".into()),
        Error::Io { source, .. } => Ok(format!("cannot be read: {source}")),
        Error::MalformedFile { found, expected, .. } => Ok(format!("found {found}, expected {expected}")),
        other => Err(other),
    }
}
