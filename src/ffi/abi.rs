//! The C structs through which XLA calls a handler, and the functions of XLA that a handler calls.
//!
//! Source: `xla/ffi/api/c_api.h` as jaxlib 0.10.2 (API 0.3) and 0.12.0 (API 0.5) ship it. What stands here is the same
//! in both. Fields behind the last one that is read here are left out: older versions may not have them.
//!
//! C's enums are plain integers here, because a newer XLA may pass values that nobody here knows.

use std::ffi::{c_char, c_int, c_void};
use std::mem::{offset_of, size_of};

/// The newest version of the API whose structs are those below.
pub const API_VERSION: (c_int, c_int) = (0, 5);

/// An item of a linked list that may hang on a struct: `XLA_FFI_Extension_Base`, `XLA_FFI_InternalExtension` since 0.4.
#[repr(C)]
#[derive(Debug)]
pub struct Extension {
    /// Bytes of the struct that begins with this one.
    pub struct_size: usize,
    /// Which struct that is: [`EXTENSION_METADATA`].
    pub kind: c_int,
    /// The next item, or null.
    pub next: *mut Extension,
}

/// The extension is a [`MetadataExtension`].
pub const EXTENSION_METADATA: c_int = 1;

/// `XLA_FFI_Api_Version`.
#[repr(C)]
#[derive(Debug)]
pub struct ApiVersion {
    /// Bytes.
    pub struct_size: usize,
    /// Extensions, or null.
    pub extension_start: *mut Extension,
    /// Changes where older code breaks.
    pub major_version: c_int,
    /// Changes otherwise.
    pub minor_version: c_int,
}

/// `XLA_FFI_Metadata`: what a handler says of itself.
#[repr(C)]
#[derive(Debug)]
pub struct Metadata {
    /// Bytes.
    pub struct_size: usize,
    /// The version that the handler was made for; written by the handler.
    pub api_version: ApiVersion,
    /// Bits of `XLA_FFI_Handler_TraitsBits`; written by the handler.
    pub traits: u32,
    // `state_type_id` follows, which XLA sets to "unknown": handlers here have no state.
}

/// `XLA_FFI_Metadata_Extension`: hangs on the frame of a call that asks for the handler's metadata.
#[repr(C)]
#[derive(Debug)]
pub struct MetadataExtension {
    /// What every extension begins with.
    pub base: Extension,
    /// Where the answer is written.
    pub metadata: *mut Metadata,
}

/// `XLA_FFI_Buffer`: a dense array, the last axis innermost.
#[repr(C)]
#[derive(Debug)]
pub struct Buffer {
    /// Bytes.
    pub struct_size: usize,
    /// Extensions, or null.
    pub extension_start: *mut Extension,
    /// `XLA_FFI_DataType`.
    pub dtype: c_int,
    /// The elements.
    pub data: *mut c_void,
    /// Number of axes.
    pub rank: i64,
    /// Size of each axis.
    pub dims: *mut i64,
}

/// `XLA_FFI_Args` and `XLA_FFI_Rets`, which are alike: arguments or results of a call.
#[repr(C)]
#[derive(Debug)]
pub struct Values {
    /// Bytes.
    pub struct_size: usize,
    /// Extensions, or null.
    pub extension_start: *mut Extension,
    /// How many.
    pub size: i64,
    /// What each one is: [`VALUE_BUFFER`].
    pub types: *mut c_int,
    /// Each one's struct.
    pub items: *mut *mut c_void,
}

/// The argument or the result is a [`Buffer`].
pub const VALUE_BUFFER: c_int = 1;

/// `XLA_FFI_ByteSpan`: a string without a NUL.
#[repr(C)]
#[derive(Debug)]
pub struct ByteSpan {
    /// First byte.
    pub ptr: *const c_char,
    /// Bytes.
    pub len: usize,
}

/// `XLA_FFI_Scalar`: an attribute's value.
#[repr(C)]
#[derive(Debug)]
pub struct Scalar {
    /// `XLA_FFI_DataType`.
    pub dtype: c_int,
    /// The one element.
    pub value: *mut c_void,
}

/// `XLA_FFI_Attrs`: attributes of a call, sorted by name.
#[repr(C)]
#[derive(Debug)]
pub struct Attributes {
    /// Bytes.
    pub struct_size: usize,
    /// Extensions, or null.
    pub extension_start: *mut Extension,
    /// How many.
    pub size: i64,
    /// What each one is: [`ATTRIBUTE_SCALAR`].
    pub types: *mut c_int,
    /// Each one's name.
    pub names: *mut *mut ByteSpan,
    /// Each one's struct.
    pub values: *mut *mut c_void,
}

/// The attribute is a [`Scalar`].
pub const ATTRIBUTE_SCALAR: c_int = 3;

/// `XLA_FFI_CallFrame` up to the attributes, which is what its `struct_size` counts; `future` follows in C.
#[repr(C)]
#[derive(Debug)]
pub struct CallFrame {
    /// Bytes.
    pub struct_size: usize,
    /// Extensions, or null.
    pub extension_start: *mut Extension,
    /// Functions of XLA.
    pub api: *const Api,
    /// What those functions need to know of the call.
    pub context: *mut Context,
    /// `XLA_FFI_ExecutionStage`: [`STAGE_EXECUTE`].
    pub stage: c_int,
    /// Arguments.
    pub args: Values,
    /// Results.
    pub results: Values,
    /// Attributes.
    pub attributes: Attributes,
}

/// The call is to compute the results.
pub const STAGE_EXECUTE: c_int = 3;

/// `XLA_FFI_ExecutionContext`, `XLA_FFI_InvokeContext` since 0.4: XLA's own.
#[repr(C)]
#[derive(Debug)]
pub struct Context {
    _private: [u8; 0],
}

/// `XLA_FFI_Error`: XLA's own.
#[repr(C)]
#[derive(Debug)]
pub struct Error {
    _private: [u8; 0],
}

/// A function of the API that the handler does not call.
type Unused = Option<unsafe extern "C" fn()>;

/// `XLA_FFI_Api` up to the last function called here.
#[repr(C)]
#[derive(Debug)]
pub struct Api {
    /// Bytes.
    pub struct_size: usize,
    /// Extensions, or null.
    pub extension_start: *mut Extension,
    /// The version that XLA speaks.
    pub version: ApiVersion,
    /// XLA's own.
    pub internal: *const c_void,
    /// Makes an error; copies the message.
    pub error_create: Option<unsafe extern "C" fn(*mut ErrorCreateArgs) -> *mut Error>,
    /// `Error_GetMessage`, another function since 0.4.
    pub error_get: Unused,
    /// Frees an error.
    pub error_destroy: Option<unsafe extern "C" fn(*mut ErrorDestroyArgs)>,
    /// `Handler_Register`, `Stream_Get`, `Type_Register`, `ExecutionContext_Get`, `State_Set`, `State_Get`,
    /// `DeviceMemory_Allocate`, `DeviceMemory_Free`.
    pub unused: [Unused; 8],
    /// Has a thread of the pool run a task, or the calling thread itself.
    pub thread_pool_schedule: Option<unsafe extern "C" fn(*mut ScheduleArgs) -> *mut Error>,
    /// How many threads the pool has.
    pub thread_pool_num_threads: Option<unsafe extern "C" fn(*mut NumThreadsArgs) -> *mut Error>,
}

/// `XLA_FFI_Error_Create_Args`.
#[repr(C)]
#[derive(Debug)]
pub struct ErrorCreateArgs {
    /// Bytes: [`Self::SIZE`].
    pub struct_size: usize,
    /// Extensions, or null.
    pub extension_start: *mut Extension,
    /// Ends with a NUL.
    pub message: *const c_char,
    /// `XLA_FFI_Error_Code`.
    pub code: c_int,
}

impl ErrorCreateArgs {
    /// The struct's size as C's macro counts it: up to the end of the last field, without padding.
    pub const SIZE: usize = offset_of!(Self, code) + size_of::<c_int>();
}

/// `XLA_FFI_Error_Destroy_Args`.
#[repr(C)]
#[derive(Debug)]
pub struct ErrorDestroyArgs {
    /// Bytes.
    pub struct_size: usize,
    /// Extensions, or null.
    pub extension_start: *mut Extension,
    /// What to free.
    pub error: *mut Error,
}

/// `XLA_FFI_ThreadPool_Schedule_Args`.
#[repr(C)]
#[derive(Debug)]
pub struct ScheduleArgs {
    /// Bytes.
    pub struct_size: usize,
    /// Extensions, or null.
    pub extension_start: *mut Extension,
    /// The call's.
    pub context: *mut Context,
    /// What to call.
    pub task: unsafe extern "C" fn(*mut c_void),
    /// With what.
    pub data: *mut c_void,
}

/// `XLA_FFI_ThreadPool_NumThreads_Args`.
#[repr(C)]
#[derive(Debug)]
pub struct NumThreadsArgs {
    /// Bytes.
    pub struct_size: usize,
    /// Extensions, or null.
    pub extension_start: *mut Extension,
    /// The call's.
    pub context: *mut Context,
    /// Where the answer is written.
    pub num_threads: *mut i64,
}

// What a C compiler gives for the header on 64-bit targets, the only ones that XLA has.
#[cfg(target_pointer_width = "64")]
const _: () = {
    assert!(size_of::<Extension>() == 24 && offset_of!(Extension, next) == 16);
    assert!(size_of::<ApiVersion>() == 24 && offset_of!(ApiVersion, major_version) == 16);
    assert!(offset_of!(Metadata, api_version) == 8 && offset_of!(Metadata, traits) == 32);
    assert!(size_of::<MetadataExtension>() == 32 && offset_of!(MetadataExtension, metadata) == 24);
    assert!(size_of::<Buffer>() == 48 && offset_of!(Buffer, dtype) == 16 && offset_of!(Buffer, data) == 24);
    assert!(offset_of!(Buffer, rank) == 32 && offset_of!(Buffer, dims) == 40);
    assert!(size_of::<Values>() == 40 && offset_of!(Values, size) == 16 && offset_of!(Values, items) == 32);
    assert!(size_of::<ByteSpan>() == 16 && offset_of!(ByteSpan, len) == 8);
    assert!(size_of::<Scalar>() == 16 && offset_of!(Scalar, value) == 8);
    assert!(size_of::<Attributes>() == 48 && offset_of!(Attributes, size) == 16);
    assert!(offset_of!(Attributes, names) == 32 && offset_of!(Attributes, values) == 40);
    assert!(size_of::<CallFrame>() == 168 && offset_of!(CallFrame, api) == 16 && offset_of!(CallFrame, stage) == 32);
    assert!(offset_of!(CallFrame, args) == 40 && offset_of!(CallFrame, results) == 80);
    assert!(offset_of!(CallFrame, attributes) == 120);
    assert!(size_of::<Api>() == 152 && offset_of!(Api, version) == 16 && offset_of!(Api, error_create) == 48);
    assert!(offset_of!(Api, error_destroy) == 64 && offset_of!(Api, thread_pool_schedule) == 136);
    assert!(offset_of!(Api, thread_pool_num_threads) == 144);
    assert!(ErrorCreateArgs::SIZE == 28 && offset_of!(ErrorCreateArgs, message) == 16);
    assert!(size_of::<ErrorDestroyArgs>() == 24 && offset_of!(ErrorDestroyArgs, error) == 16);
    assert!(size_of::<ScheduleArgs>() == 40 && offset_of!(ScheduleArgs, task) == 24);
    assert!(size_of::<NumThreadsArgs>() == 32 && offset_of!(NumThreadsArgs, num_threads) == 24);
};
