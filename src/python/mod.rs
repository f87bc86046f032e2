//! The `_core` extension module: signatures and calls only.
#![expect(clippy::needless_pass_by_value, reason = "PyO3 hands over what it converted")]

mod array;
mod error;
mod handlers;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::exceptions::PyKeyError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arena::ArenaPool;
use crate::arrivals::Arrivals;
use crate::cast::OnOverflow;
use crate::checkpoint::{self, Part, TensorSpec};
use crate::cli::{self, LocalSource};
use crate::codec;
use crate::convert::Mode;
use crate::dtype;
use crate::error::{Error, Result};
use crate::load::{self, Conversion, Request};
use crate::mxfp4::ScaleRule;
use crate::options::Options;
use crate::ordered_map::OrderedMap;
use crate::progress::Event;
use crate::select::Selection;
use crate::simd::Level;
use crate::synthetic;
use crate::work::Resources;
use array::Bytes;

/// An opened checkpoint.
#[pyclass(frozen, name = "Checkpoint", module = "tensorport._core")]
struct PyCheckpoint {
    inner: Arc<checkpoint::Checkpoint>,
}

/// Memory for what is read, used again once nobody looks into it.
#[pyclass(frozen, name = "Memory", module = "tensorport._core")]
#[derive(Default)]
struct PyMemory {
    pool: ArenaPool,
}

#[pymethods]
impl PyMemory {
    #[new]
    fn new() -> Self {
        Self::default()
    }
}

/// Which files of a source have come.
#[pyclass(frozen, name = "Arrivals", module = "tensorport._core")]
#[derive(Default)]
struct PyArrivals {
    inner: Arc<Arrivals>,
}

#[pymethods]
impl PyArrivals {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    fn arrived(&self, name: String, path: PathBuf) {
        self.inner.arrived(name, path);
    }

    fn failed(&self, fault: String) {
        self.inner.failed(fault);
    }
}

fn shared(arrivals: Py<PyArrivals>) -> Arc<Arrivals> {
    Arc::clone(&arrivals.get().inner)
}

/// Names of the decoded tensor, of its blocks, of its scales.
type PairTuple = (String, String, String);

/// Names of a float8 weight and of its scales.
type Float8Tuple = (String, String);

/// A tensor that looks like half a pair: its name, that of the decoded tensor, what is wrong.
type MisfitTuple = (String, String, String);

/// Names of one tensor, or of one and its scales; the conversion's name; regions as (start, stop) for each axis.
type RequestTuple = (Vec<String>, String, Vec<Vec<(u64, u64)>>);

/// Bytes that left Rust.
type Array<'py> = Bound<'py, PyArray1<u8>>;

/// Arrays of the regions, overflows, underflows.
type LoadedTuple<'py> = (Vec<Array<'py>>, u64, u64);

/// dtype name, shape, nbytes, files, offset of the first part.
type SpecTuple = (&'static str, Vec<u64>, u64, Vec<String>, u64);

#[pymethods]
impl PyCheckpoint {
    #[new]
    fn new(py: Python<'_>, source: PathBuf) -> PyResult<Self> {
        let inner = py.detach(|| checkpoint::Checkpoint::open(&source))?;
        Ok(Self { inner: Arc::new(inner) })
    }

    fn names(&self) -> Vec<&str> {
        self.inner.tensors().iter().map(|tensor| tensor.name.as_str()).collect()
    }

    fn spec(&self, name: &str) -> PyResult<SpecTuple> {
        let tensor = self.tensor(name)?;
        let mut files: Vec<_> = tensor.parts.iter().map(|part| part.file).collect();
        files.dedup();
        let files = files.into_iter().map(|file| self.inner.files()[file].name.clone()).collect();
        let offset = tensor.parts.first().map_or(0, |part| part.offset);
        Ok((dtype::name(tensor.dtype), tensor.shape.clone(), tensor.nbytes, files, offset))
    }

    /// The parts of a tensor as 1-D read-only u8 arrays over the mapped files.
    fn view<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Vec<Array<'py>>> {
        let tensor = self.tensor(name)?;
        let views = py.detach(|| self.inner.view(tensor))?;
        views.into_iter().map(|view| array::array(py, Bytes::Mapped(view))).collect()
    }

    /// Where the parts of a tensor stand: number of the file, offset, nbytes, whether the filesystem is a remote one.
    fn parts(&self, py: Python<'_>, name: &str) -> PyResult<Vec<(usize, u64, u64, bool)>> {
        let tensor = self.tensor(name)?;
        let place = |part: &Part| {
            let file = &self.inner.files()[part.file];
            Ok((part.file, part.offset, part.nbytes, file.is_remote()?))
        };
        py.detach(|| tensor.parts.iter().map(place).collect::<Result<_>>()).map_err(PyErr::from)
    }

    /// The MXFP4 pairs: name of the decoded tensor, of its blocks, of its scales. And the tensors that look like half a
    /// pair but are none: name, name that the decoded tensor would have, what is wrong.
    fn pairs(&self) -> (Vec<PairTuple>, Vec<MisfitTuple>) {
        let name = |index: usize| self.inner.tensors()[index].name.clone();
        let pairing = self.inner.pairing();
        let pairs = pairing.pairs.into_iter().map(|pair| (pair.name, name(pair.blocks), name(pair.scales)));
        let misfits =
            pairing.misfits.into_iter().map(|misfit| (name(misfit.index), misfit.name, misfit.fault.to_string()));
        (pairs.collect(), misfits.collect())
    }

    /// The float8 weights with block scales: names of weights and of their scales. And the scales that fit no weight: name,
    /// name that the decoded tensor would have, what is wrong.
    fn float8_pairs(&self, py: Python<'_>) -> PyResult<(Vec<Float8Tuple>, Vec<MisfitTuple>)> {
        let name = |index: usize| self.inner.tensors()[index].name.clone();
        let pairing = py.detach(|| self.inner.float8_pairing())?;
        let pairs = pairing.pairs.into_iter().map(|pair| (name(pair.weight), name(pair.scales)));
        let misfits =
            pairing.misfits.into_iter().map(|misfit| (name(misfit.index), misfit.name, misfit.fault.to_string()));
        Ok((pairs.collect(), misfits.collect()))
    }

    /// Reads regions of tensors. Returns for each request its regions, how many values overflowed and how many became
    /// zero; and the bytes read.
    #[pyo3(signature = (requests, *, on_overflow, workers, memory, callback))]
    fn read<'py>(
        &self,
        py: Python<'py>,
        requests: Vec<RequestTuple>,
        on_overflow: &str,
        workers: Option<usize>,
        memory: &PyMemory,
        callback: Option<Py<PyAny>>,
    ) -> PyResult<(Vec<LoadedTuple<'py>>, u64)> {
        let on_overflow = OnOverflow::parse(on_overflow)?;
        let loaded = run_job(py, callback.as_ref(), |observer| {
            let request = |(names, conversion, regions): RequestTuple| {
                let regions =
                    regions.into_iter().map(|region| region.into_iter().map(|(a, b)| a..b).collect()).collect();
                Request::new(&self.inner, &names, Conversion::parse(&conversion)?, regions)
            };
            let requests = requests.into_iter().map(request).collect::<Result<Vec<_>>>()?;
            let resources = Resources::default().with_workers(workers);
            load::load(&self.inner, &requests, on_overflow, resources, &memory.pool, observer)
        })?;
        let results = loaded.regions.into_iter().zip(loaded.counts).map(|(regions, counts)| {
            let arrays =
                regions.into_iter().map(|view| array::array(py, Bytes::Memory(view))).collect::<PyResult<_>>()?;
            Ok((arrays, counts.overflow, counts.underflow))
        });
        Ok((results.collect::<PyResult<_>>()?, loaded.bytes_read))
    }

    #[getter]
    fn metadata(&self) -> BTreeMap<String, String> {
        self.inner.metadata().0.iter().cloned().collect()
    }

    #[getter]
    fn total_parameters(&self) -> u64 {
        self.inner.total_parameters()
    }

    #[getter]
    fn stored_elements(&self) -> u64 {
        self.inner.stored_elements()
    }
}

impl PyCheckpoint {
    fn tensor(&self, name: &str) -> PyResult<&TensorSpec> {
        self.inner.get(name).ok_or_else(|| PyKeyError::new_err(name.to_owned()))
    }
}

/// Which of the names include and exclude globs take.
#[pyfunction]
fn select(names: Vec<String>, include: Option<Vec<String>>, exclude: Option<Vec<String>>) -> PyResult<Vec<bool>> {
    let selection = Selection::new(include.as_deref(), exclude.as_deref())?;
    Ok(names.iter().map(|name| selection.takes(name)).collect())
}

/// Converts a checkpoint; `options` is JSON. Returns the report as JSON.
#[pyfunction]
#[pyo3(signature = (source, output, options, *, resume, overwrite, verify, workers, max_memory, callback, arrivals=None))]
#[expect(clippy::too_many_arguments, reason = "one per keyword of the Python function")]
fn convert(
    py: Python<'_>,
    source: PathBuf,
    output: PathBuf,
    options: &str,
    resume: bool,
    overwrite: bool,
    verify: bool,
    workers: Option<usize>,
    max_memory: u64,
    callback: Option<Py<PyAny>>,
    arrivals: Option<Py<PyArrivals>>,
) -> PyResult<String> {
    let arrivals = arrivals.map(shared);
    let options: Options = from_json("options", options)?;
    let mode = Mode { resume, overwrite, verify };
    let resources = Resources { max_memory, ..Resources::default() }.with_workers(workers);
    run_job(py, callback.as_ref(), |observer| {
        crate::convert::convert_arriving(&source, arrivals.as_ref(), &output, &options, mode, resources, observer)
    })
    .map(|report| to_json(&report))
}

/// Verifies a converted tree. Returns the report as JSON.
#[pyfunction]
#[pyo3(signature = (output, source, *, workers, callback))]
fn verify(
    py: Python<'_>,
    output: PathBuf,
    source: Option<PathBuf>,
    workers: Option<usize>,
    callback: Option<Py<PyAny>>,
) -> PyResult<String> {
    run_job(py, callback.as_ref(), |observer| {
        crate::verify(&output, source.as_deref(), Resources::default().with_workers(workers), observer)
    })
    .map(|report| to_json(&report))
}

/// Writes random safetensors files; `files` is JSON. Returns the bytes of tensor data.
#[pyfunction]
#[pyo3(signature = (folder, files, seed, *, workers, callback))]
fn synthesize(
    py: Python<'_>,
    folder: PathBuf,
    files: &str,
    seed: u64,
    workers: Option<usize>,
    callback: Option<Py<PyAny>>,
) -> PyResult<u64> {
    let files: OrderedMap<OrderedMap<synthetic::RandomTensor>> = from_json("files", files)?;
    run_job(py, callback.as_ref(), |observer| {
        synthetic::write(&folder, &files, seed, Resources::default().with_workers(workers), observer)
    })
}

// The two functions below read their arrays while the GIL is free. `PyReadonlyArray` keeps out all Rust code that borrows
// through the numpy crate; Python code that writes to an array meanwhile must be kept from that by its author, as with
// NumPy's own functions, which free the GIL too (numpy::borrow has the reasoning). Where it does write, values are old or
// new: the kernels take lengths from nowhere but the arrays' sizes, and each table that a byte indexes has a row for it.

/// Decodes MXFP4 blocks and scales to `dtype`. Returns the values' bytes.
#[pyfunction]
#[pyo3(signature = (blocks, scales, dtype, *, workers, memory))]
fn mxfp4_decode<'py>(
    py: Python<'py>,
    blocks: PyReadonlyArray1<'py, u8>,
    scales: PyReadonlyArray1<'py, u8>,
    dtype: &str,
    workers: Option<usize>,
    memory: &PyMemory,
) -> PyResult<Array<'py>> {
    let (blocks, scales, target) = (blocks.as_slice()?, scales.as_slice()?, codec::parse_target(dtype)?);
    let decoded = run_job(py, None, |observer| codec::decode(blocks, scales, target, workers, &memory.pool, observer))?;
    array::array(py, Bytes::Memory(decoded))
}

/// Encodes the bytes of elements of `dtype` to MXFP4. Returns blocks and scales.
#[pyfunction]
#[pyo3(signature = (data, dtype, scale_rule, *, workers, memory))]
fn mxfp4_encode<'py>(
    py: Python<'py>,
    data: PyReadonlyArray1<'py, u8>,
    dtype: &str,
    scale_rule: &str,
    workers: Option<usize>,
    memory: &PyMemory,
) -> PyResult<(Array<'py>, Array<'py>)> {
    let (data, from, rule) = (data.as_slice()?, codec::parse_source(dtype)?, ScaleRule::parse(scale_rule)?);
    let encoded = run_job(py, None, |observer| codec::encode(from, rule, data, workers, &memory.pool, observer))?;
    Ok((array::array(py, Bytes::Memory(encoded.blocks))?, array::array(py, Bytes::Memory(encoded.scales))?))
}

/// The widest vector instructions of this processor that the kernels know.
#[pyfunction]
fn simd_level() -> String {
    Level::best().to_string()
}

/// Names of handlers, and capsules of their functions, for `jax.ffi.register_ffi_target`.
#[pyfunction]
fn ffi_targets(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    handlers::targets(py)
}

/// Runs the command line. `local_path` takes a source and returns the path that it names; what it raises is raised.
/// Returns the exit status.
#[pyfunction]
fn run_cli(py: Python<'_>, args: Vec<OsString>, local_path: Py<PyAny>) -> PyResult<u8> {
    let mut host = PythonHost { local_path, raised: None };
    let status = py.detach(|| cli::run(args, &mut host));
    host.raised.map_or(Ok(status), Err)
}

/// The entry point of the Python package.
struct PythonHost {
    local_path: Py<PyAny>,
    /// What `local_path` raised.
    raised: Option<PyErr>,
}

impl cli::Host for PythonHost {
    fn name(&self) -> &'static str {
        "Python package"
    }

    fn interrupted(&mut self) -> ControlFlow<()> {
        // The handler's exception is dropped: the command line says itself that it was interrupted.
        if Python::attach(|py| py.check_signals().is_err()) {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }

    fn local_path(&mut self, source: &Path, may_arrive: bool) -> Result<Option<LocalSource>> {
        let found: PyResult<(PathBuf, Option<Py<PyArrivals>>)> =
            Python::attach(|py| self.local_path.call1(py, (source.as_os_str(), may_arrive))?.extract(py));
        let found = found.map_err(|exception| self.raised = Some(exception)).ok();
        Ok(found.map(|(path, arrivals)| LocalSource { path, arrivals: arrivals.map(shared) }))
    }
}

/// Runs a job without the GIL; signals and the callback get it back now and then. Their exceptions stop the job.
fn run_job<T: Send>(
    py: Python<'_>,
    callback: Option<&Py<PyAny>>,
    job: impl FnOnce(&mut crate::progress::Observer<'_>) -> Result<T> + Send,
) -> PyResult<T> {
    let mut raised = None;
    let result = py.detach(|| {
        job(&mut |event| match Python::attach(|py| deliver(py, callback, event)) {
            Ok(()) => ControlFlow::Continue(()),
            Err(exception) => {
                raised.get_or_insert(exception);
                ControlFlow::Break(())
            }
        })
    });
    match (result, raised) {
        (Err(Error::Cancelled), Some(exception)) => Err(exception),
        (Err(Error::Verification(report)), _) => {
            let json = to_json(&*report);
            let exception = PyErr::from(Error::Verification(report));
            exception.value(py).setattr("report", json)?;
            Err(exception)
        }
        (result, _) => Ok(result?),
    }
}

fn deliver(py: Python<'_>, callback: Option<&Py<PyAny>>, event: &Event<'_>) -> PyResult<()> {
    py.check_signals()?;
    if let Some(callback) = callback {
        callback.call1(
            py,
            (
                event.phase.as_str(),
                event.bytes_done,
                event.bytes_total,
                event.tensors_done,
                event.tensors_total,
                event.tensor,
            ),
        )?;
    }
    Ok(())
}

fn from_json<T: serde::de::DeserializeOwned>(name: &'static str, json: &str) -> Result<T> {
    serde_json::from_str(json).map_err(|fault| Error::Argument {
        name,
        found: fault.to_string(),
        expected: "JSON of the values that the documentation lists".into(),
    })
}

fn to_json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("plain structs with string keys serialize")
}

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("TensorportError", py.get_type::<error::TensorportError>())?;
    module.add("CheckpointError", py.get_type::<error::CheckpointError>())?;
    module.add("MappingError", py.get_type::<error::MappingError>())?;
    module.add("ConversionError", py.get_type::<error::ConversionError>())?;
    let verification_error = py.get_type::<error::VerificationError>();
    verification_error.setattr("report", py.None())?;
    module.add("VerificationError", verification_error)?;
    module.add_class::<PyCheckpoint>()?;
    module.add_class::<PyMemory>()?;
    module.add_class::<PyArrivals>()?;
    module.add_function(wrap_pyfunction!(select, module)?)?;
    module.add_function(wrap_pyfunction!(convert, module)?)?;
    module.add_function(wrap_pyfunction!(verify, module)?)?;
    module.add_function(wrap_pyfunction!(synthesize, module)?)?;
    module.add_function(wrap_pyfunction!(simd_level, module)?)?;
    module.add_function(wrap_pyfunction!(ffi_targets, module)?)?;
    module.add_function(wrap_pyfunction!(mxfp4_decode, module)?)?;
    module.add_function(wrap_pyfunction!(mxfp4_encode, module)?)?;
    module.add_function(wrap_pyfunction!(run_cli, module)?)
}
