//! An XLA for tests: frames, errors, and a pool whose threads begin when a test wants them to.
#![expect(unsafe_code, reason = "plays XLA's part")]

use std::ffi::{CStr, c_int, c_void};
use std::mem;
use std::ptr;
use std::sync::Mutex;
use std::thread::{self, JoinHandle};

use super::abi;
use super::call::Call;
use super::entry::Entry;
use super::pool::XlaThreads;

/// When the pool runs what it is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// At once, on threads of their own.
    AtOnce,
    /// At once, on the thread that gives it.
    Inline,
    /// When the pool is dropped: after the call.
    Late,
    /// Never: it refuses.
    Never,
}

struct Task(unsafe extern "C" fn(*mut c_void), *mut c_void);
// SAFETY: a task may run on any thread.
unsafe impl Send for Task {}

impl Task {
    fn run(self) {
        // SAFETY: this consumes the task.
        unsafe { self.0(self.1) }
    }
}

/// A pool of threads.
pub struct FakePool {
    count: i64,
    start: Start,
    late: Mutex<Vec<Task>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl FakePool {
    /// A pool that says it has `count` threads.
    pub fn new(count: i64, start: Start) -> Self {
        Self { count, start, late: Mutex::default(), threads: Mutex::default() }
    }

    fn context(&self) -> *mut abi::Context {
        ptr::from_ref(self).cast_mut().cast()
    }

    /// Its threads, as `body` uses them.
    pub fn with<R>(&self, body: impl FnOnce(&XlaThreads<'_>) -> R) -> R {
        let api = api();
        // SAFETY: the functions below know this context.
        body(&unsafe { XlaThreads::new(&api, self.context()) })
    }
}

impl Drop for FakePool {
    fn drop(&mut self) {
        mem::take(self.late.get_mut().unwrap()).into_iter().for_each(Task::run);
        for thread in mem::take(self.threads.get_mut().unwrap()) {
            thread.join().unwrap();
        }
    }
}

/// XLA's functions.
pub fn api() -> abi::Api {
    abi::Api {
        struct_size: size_of::<abi::Api>() + 40,
        extension_start: ptr::null_mut(),
        version: abi::ApiVersion {
            struct_size: size_of::<abi::ApiVersion>(),
            extension_start: ptr::null_mut(),
            major_version: 0,
            minor_version: 3,
        },
        internal: ptr::null(),
        error_create: Some(error_create),
        error_get: None,
        error_destroy: Some(error_destroy),
        unused: [None; 8],
        thread_pool_schedule: Some(schedule),
        thread_pool_num_threads: Some(num_threads),
    }
}

type Error = (c_int, String);

fn error(code: c_int, message: &str) -> *mut abi::Error {
    Box::into_raw(Box::new((code, message.to_owned()))).cast()
}

/// # Safety
/// `error` came from [`error`], and is used no more.
unsafe fn take_error(error: *mut abi::Error) -> Error {
    // SAFETY: by this function's condition.
    *unsafe { Box::from_raw(error.cast::<Error>()) }
}

unsafe extern "C" fn error_create(args: *mut abi::ErrorCreateArgs) -> *mut abi::Error {
    // SAFETY: tests pass what the header says.
    let (size, code, message) = unsafe { ((*args).struct_size, (*args).code, CStr::from_ptr((*args).message)) };
    assert_eq!(size, 28);
    error(code, message.to_str().unwrap())
}

unsafe extern "C" fn error_destroy(args: *mut abi::ErrorDestroyArgs) {
    // SAFETY: as above.
    drop(unsafe { take_error((*args).error) });
}

unsafe extern "C" fn num_threads(args: *mut abi::NumThreadsArgs) -> *mut abi::Error {
    // SAFETY: as above; the context is a pool.
    unsafe {
        let pool = &*(*args).context.cast::<FakePool>();
        if pool.start == Start::Never {
            return error(12, "no pool");
        }
        *(*args).num_threads = pool.count;
    }
    ptr::null_mut()
}

unsafe extern "C" fn schedule(args: *mut abi::ScheduleArgs) -> *mut abi::Error {
    // SAFETY: as above.
    let (pool, task) = unsafe { (&*(*args).context.cast::<FakePool>(), Task((*args).task, (*args).data)) };
    match pool.start {
        Start::AtOnce => pool.threads.lock().unwrap().push(thread::spawn(move || task.run())),
        Start::Inline => task.run(),
        Start::Late => pool.late.lock().unwrap().push(task),
        Start::Never => return error(12, "no pool"),
    }
    ptr::null_mut()
}

/// An argument or a result, and what its struct says of it.
pub struct FakeBuffer {
    pub dtype: c_int,
    pub dims: Vec<i64>,
    pub rank: i64,
    pub data: *mut c_void,
}

impl FakeBuffer {
    pub fn new<T>(dtype: c_int, dims: &[i64], data: &mut [T]) -> Self {
        let rank = dims.len().try_into().unwrap();
        Self { dtype, dims: dims.to_vec(), rank, data: data.as_mut_ptr().cast() }
    }

    /// Begins so many bytes later.
    pub fn shifted(mut self, nbytes: usize) -> Self {
        self.data = self.data.wrapping_byte_add(nbytes);
        self
    }

    fn as_abi(&mut self) -> abi::Buffer {
        abi::Buffer {
            struct_size: size_of::<abi::Buffer>(),
            extension_start: ptr::null_mut(),
            dtype: self.dtype,
            data: self.data,
            rank: self.rank,
            dims: if self.dims.is_empty() { ptr::null_mut() } else { self.dims.as_mut_ptr() },
        }
    }
}

/// A call by XLA.
pub struct FakeCall {
    pub args: Vec<FakeBuffer>,
    pub results: Vec<FakeBuffer>,
    /// Name, type, dtype, value.
    pub attributes: Vec<(&'static str, c_int, c_int, u64)>,
    pub stage: c_int,
    pub frame_size: usize,
    pub pool: FakePool,
    /// Of the handler that [`FakeCall::with`] plays.
    pub is_in_place: bool,
}

impl FakeCall {
    pub fn new(args: Vec<FakeBuffer>, results: Vec<FakeBuffer>) -> Self {
        let pool = FakePool::new(2, Start::AtOnce);
        let frame_size = size_of::<abi::CallFrame>();
        Self { args, results, attributes: Vec::new(), stage: abi::STAGE_EXECUTE, frame_size, pool, is_in_place: false }
    }

    /// Calls a handler; returns the code and the text of its error.
    pub fn call(&mut self, entry: Entry) -> Result<(), Error> {
        // SAFETY: the frame is as the header describes.
        let error = self.with_frame(|frame| unsafe { entry(frame) });
        // SAFETY: an error came from `error`.
        if error.is_null() { Ok(()) } else { Err(unsafe { take_error(error) }) }
    }

    /// What `body` makes of the call.
    pub fn with<R>(&mut self, body: impl FnOnce(&mut Call<'_>) -> R) -> R {
        let is_in_place = self.is_in_place;
        // SAFETY: the frame is as the header describes.
        self.with_frame(|frame| body(&mut unsafe { Call::new(&*frame, is_in_place) }))
    }

    /// What `body` makes of the frame.
    pub fn with_frame<R>(&mut self, body: impl FnOnce(*mut abi::CallFrame) -> R) -> R {
        let api = api();
        let mut args: Vec<_> = self.args.iter_mut().map(FakeBuffer::as_abi).collect();
        let mut results: Vec<_> = self.results.iter_mut().map(FakeBuffer::as_abi).collect();
        let mut scalars: Vec<_> = self
            .attributes
            .iter_mut()
            .map(|(_, _, dtype, value)| abi::Scalar { dtype: *dtype, value: ptr::from_mut(value).cast() })
            .collect();
        let mut spans: Vec<_> = self
            .attributes
            .iter()
            .map(|(name, ..)| abi::ByteSpan { ptr: name.as_ptr().cast(), len: name.len() })
            .collect();
        let mut kinds: Vec<_> = self.attributes.iter().map(|&(_, kind, ..)| kind).collect();
        let mut names: Vec<_> = spans.iter_mut().map(ptr::from_mut).collect();
        let mut values = pointers(&mut scalars);
        let (mut arg_items, mut result_items) = (pointers(&mut args), pointers(&mut results));
        let mut arg_types = vec![abi::VALUE_BUFFER; args.len()];
        let mut result_types = vec![abi::VALUE_BUFFER; results.len()];
        let mut frame = abi::CallFrame {
            struct_size: self.frame_size,
            extension_start: ptr::null_mut(),
            api: &raw const api,
            context: self.pool.context(),
            stage: self.stage,
            args: to_values(&mut arg_types, &mut arg_items),
            results: to_values(&mut result_types, &mut result_items),
            attributes: abi::Attributes {
                struct_size: size_of::<abi::Attributes>(),
                extension_start: ptr::null_mut(),
                size: values.len().try_into().unwrap(),
                types: kinds.as_mut_ptr(),
                names: names.as_mut_ptr(),
                values: values.as_mut_ptr(),
            },
        };
        body(&raw mut frame)
    }
}

fn pointers<T>(items: &mut [T]) -> Vec<*mut c_void> {
    items.iter_mut().map(|item| ptr::from_mut(item).cast()).collect()
}

fn to_values(types: &mut [c_int], items: &mut [*mut c_void]) -> abi::Values {
    abi::Values {
        struct_size: size_of::<abi::Values>(),
        extension_start: ptr::null_mut(),
        size: items.len().try_into().unwrap(),
        types: types.as_mut_ptr(),
        items: items.as_mut_ptr(),
    }
}
