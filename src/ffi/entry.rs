//! From XLA's call to a handler's function and back.
#![expect(unsafe_code, reason = "is called by XLA with pointers, and calls it")]

use std::ffi::CString;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process;
use std::ptr;

use super::abi;
use super::call::Call;
use super::error::{FfiError, Result};
use super::float_state::DefaultFloatState;

/// A function that XLA calls by name.
pub trait Handler {
    /// Package, version of what arguments mean, and operation: `tensorport.v1.probe`. XLA takes one function a name in
    /// a process, and keeps names in compiled programs: whatever changes what a call means changes the version.
    const NAME: &'static str;

    /// Whether the first result is the first argument with changes, in its memory. Then that argument cannot be read.
    /// The call must have been made so: with `input_output_aliases={0: 0}`.
    const IS_IN_PLACE: bool = false;

    /// Computes the results of a call. An error, or a panic, becomes an error of XLA.
    ///
    /// It may run on any thread, many calls at once, and must not touch Python.
    fn run(call: &mut Call<'_>) -> Result<()>;
}

/// What is registered with XLA: `XLA_FFI_Handler`.
pub type Entry = unsafe extern "C" fn(*mut abi::CallFrame) -> *mut abi::Error;

/// The entry of a handler.
///
/// # Safety
/// Only XLA may call it, with a frame as its header describes.
pub unsafe extern "C" fn entry<H: Handler>(frame: *mut abi::CallFrame) -> *mut abi::Error {
    // SAFETY: by this function's condition.
    unsafe { answer(frame, H::NAME, H::IS_IN_PLACE, H::run) }
}

/// # Safety
/// As [`entry`].
unsafe fn answer(
    frame: *const abi::CallFrame,
    name: &'static str,
    is_in_place: bool,
    run: fn(&mut Call<'_>) -> Result<()>,
) -> *mut abi::Error {
    // SAFETY: XLA's frame begins with these fields, and its API with its size and version.
    let (extension, api) = unsafe { ((*frame).extension_start, (*frame).api) };
    // SAFETY: as above: the list is that of XLA's frame.
    if let Some(metadata) = unsafe { find_metadata(extension) } {
        // SAFETY: XLA asks for the metadata with a struct to be written.
        unsafe { write_metadata(metadata, api) };
        return ptr::null_mut();
    }
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: by this function's condition; the checked sizes cover the structs.
        let frame = unsafe {
            expect_size("call frames", (*frame).struct_size, size_of::<abi::CallFrame>())?;
            expect_size("APIs", (*api).struct_size, size_of::<abi::Api>())?;
            &*frame
        };
        if frame.stage != abi::STAGE_EXECUTE {
            return Err(FfiError::invalid_argument("stage", frame.stage, format!("execute ({})", abi::STAGE_EXECUTE)));
        }
        let _state = DefaultFloatState::enter();
        // SAFETY: by this function's condition: XLA called, and waits until this returns.
        run(&mut unsafe { Call::new(frame, is_in_place) })
    }));
    match outcome.unwrap_or_else(|panic| Err(FfiError::from_panic(&*panic))) {
        Ok(()) => ptr::null_mut(),
        // SAFETY: `api` is XLA's.
        Err(error) => unsafe { create_error(api, name, &error) },
    }
}

/// The struct for the answer, if the call asks for metadata.
///
/// # Safety
/// `extension` is null or the first of a list of XLA's.
unsafe fn find_metadata(mut extension: *const abi::Extension) -> Option<*mut abi::Metadata> {
    // SAFETY: every item is valid, and of the type it says.
    while let Some(item) = unsafe { extension.as_ref() } {
        if item.kind == abi::EXTENSION_METADATA {
            // SAFETY: as above.
            return Some(unsafe { (*extension.cast::<abi::MetadataExtension>()).metadata });
        }
        extension = item.next;
    }
    None
}

/// Says for which version of the API the handler was made. XLA refuses those newer than its own.
///
/// # Safety
/// `metadata` may be written; `api` is null or XLA's.
unsafe fn write_metadata(metadata: *mut abi::Metadata, api: *const abi::Api) {
    let theirs = if api.is_null() {
        abi::API_VERSION
    } else {
        // SAFETY: XLA's API begins with its size and version.
        unsafe { ((*api).version.major_version, (*api).version.minor_version) }
    };
    let (major_version, minor_version) = theirs.min(abi::API_VERSION);
    let api_version = abi::ApiVersion {
        struct_size: size_of::<abi::ApiVersion>(),
        extension_start: ptr::null_mut(),
        major_version,
        minor_version,
    };
    // SAFETY: by this function's condition.
    unsafe {
        (&raw mut (*metadata).api_version).write(api_version);
        (&raw mut (*metadata).traits).write(0);
    }
}

fn expect_size(what: &str, found: usize, expected: usize) -> Result<()> {
    if found >= expected {
        return Ok(());
    }
    Err(FfiError::internal(format!("{what} of XLA: found {found} bytes, expected at least {expected}")))
}

/// Makes an error of XLA, which takes it.
///
/// # Safety
/// `api` is XLA's.
unsafe fn create_error(api: *const abi::Api, name: &str, error: &FfiError) -> *mut abi::Error {
    let message = format!("{name}: {error}").replace('\0', "\\0");
    let message = CString::new(message).expect("it has no NUL any more");
    let mut args = abi::ErrorCreateArgs {
        struct_size: abi::ErrorCreateArgs::SIZE,
        extension_start: ptr::null_mut(),
        message: message.as_ptr(),
        code: error.code(),
    };
    // SAFETY: `error_create` is the API's first function since its first version.
    let Some(create) = (unsafe { (*api).error_create }) else {
        // Null would mean success, and XLA would go on with results that are none.
        eprintln!("tensorport: XLA takes no errors: {error}");
        process::abort()
    };
    // SAFETY: `args` and the message outlive the call, which copies the message.
    unsafe { create(&raw mut args) }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{FakeBuffer, FakeCall, api};
    use super::*;

    /// Negates float32; with attribute `fault`, fails in that way.
    struct Negate;

    impl Handler for Negate {
        const NAME: &'static str = "tensorport.v1.negate";

        fn run(call: &mut Call<'_>) -> Result<()> {
            let fault: i32 = call.attribute("fault")?;
            let ([from], [into]) = (call.args()?, call.results()?);
            match fault {
                1 => return Err(FfiError::unavailable("a text\0with a NUL")),
                2 => panic!("fault {fault}"),
                3 => std::panic::panic_any(fault),
                _ => {}
            }
            for (into, from) in into.slice::<f32>()?.iter_mut().zip(from.slice::<f32>()?) {
                *into = -from;
            }
            Ok(())
        }
    }

    fn call(fault: i32, change: impl FnOnce(&mut FakeCall)) -> (Result<(), (i32, String)>, [f32; 3]) {
        let (mut from, mut into) = ([1.0_f32, -2.0, 3.0], [0.0_f32; 3]);
        let mut call =
            FakeCall::new(vec![FakeBuffer::new(11, &[3], &mut from)], vec![FakeBuffer::new(11, &[3], &mut into)]);
        call.attributes.push(("fault", abi::ATTRIBUTE_SCALAR, 4, u64::from(fault.cast_unsigned())));
        change(&mut call);
        let outcome = call.call(entry::<Negate>);
        (outcome, into)
    }

    fn failure(fault: i32, change: impl FnOnce(&mut FakeCall)) -> (i32, String) {
        call(fault, change).0.unwrap_err()
    }

    #[test]
    fn a_call_computes() {
        assert_eq!(call(0, |_| {}), (Ok(()), [-1.0, 2.0, -3.0]));
    }

    #[test]
    fn an_error_arrives_with_its_code_and_the_handlers_name() {
        assert_eq!(failure(1, |_| {}), (14, "tensorport.v1.negate: a text\\0with a NUL".to_owned()));
    }

    #[test]
    fn panics_arrive_as_internal_errors() {
        assert_eq!(failure(2, |_| {}), (13, "tensorport.v1.negate: panic: fault 2".to_owned()));
        assert_eq!(failure(3, |_| {}), (13, "tensorport.v1.negate: panic: without a text".to_owned()));
    }

    #[test]
    fn another_stage_is_refused() {
        let expected = "tensorport.v1.negate: stage: found 1, expected execute (3)";
        assert_eq!(failure(0, |call| call.stage = 1), (3, expected.to_owned()));
    }

    #[test]
    fn a_shorter_frame_is_refused() {
        let expected = "tensorport.v1.negate: call frames of XLA: found 160 bytes, expected at least 168";
        assert_eq!(failure(0, |call| call.frame_size = 160), (13, expected.to_owned()));
    }

    /// What the handler answers an XLA of this version, or one without an API.
    fn metadata(version: Option<(i32, i32)>) -> (i32, i32, u32) {
        let api = version.map(|(major, minor)| {
            let mut api = api();
            (api.version.major_version, api.version.minor_version) = (major, minor);
            api
        });
        let version =
            abi::ApiVersion { struct_size: 0, extension_start: ptr::null_mut(), major_version: -1, minor_version: -1 };
        let mut metadata = abi::Metadata { struct_size: 36, api_version: version, traits: 7 };
        let base = abi::Extension { struct_size: 32, kind: abi::EXTENSION_METADATA, next: ptr::null_mut() };
        let mut second = abi::MetadataExtension { base, metadata: &raw mut metadata };
        let mut first = abi::Extension { struct_size: 24, kind: 99, next: (&raw mut second).cast() };
        let mut call = FakeCall::new(Vec::new(), Vec::new());
        call.with_frame(|frame| {
            // SAFETY: the frame is the test's own.
            unsafe {
                (*frame).extension_start = &raw mut first;
                (*frame).api = api.as_ref().map_or(ptr::null(), ptr::from_ref);
                assert!(entry::<Negate>(frame).is_null());
            }
        });
        (metadata.api_version.major_version, metadata.api_version.minor_version, metadata.traits)
    }

    #[test]
    fn metadata_answers_the_older_of_both_versions() {
        assert_eq!(metadata(Some((0, 3))), (0, 3, 0));
        assert_eq!(metadata(Some((0, 5))), (0, 5, 0));
        assert_eq!(metadata(Some((0, 9))), (0, 5, 0));
        assert_eq!(metadata(Some((1, 0))), (0, 5, 0));
        assert_eq!(metadata(None), (0, 5, 0));
    }
}
