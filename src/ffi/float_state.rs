//! How the processor rounds, and what it does with subnormals.
//!
//! XLA's threads flush subnormals to zero, and take those they read for zero. A value such as 2^-127, which the MXFP4
//! scale byte 0 means, would be zero on them and itself on others; and Rust's compiler counts on the default state.

use std::marker::PhantomData;

/// The default state on this thread: rounds to nearest even, keeps subnormals, traps nothing. Restores the former state
/// when dropped.
///
/// The instructions that switch act as barriers for memory: what is computed from memory, and written there, in between
/// is computed in the default state.
#[derive(Debug)]
#[must_use = "the former state comes back when this is dropped"]
pub struct DefaultFloatState {
    former: Register,
    /// The state is the thread's own: this stays on it.
    _not_send: PhantomData<*const ()>,
}

impl DefaultFloatState {
    /// Switches to the default state.
    pub fn enter() -> Self {
        let former = read();
        write(DEFAULT);
        Self { former, _not_send: PhantomData }
    }
}

impl Drop for DefaultFloatState {
    fn drop(&mut self) {
        write(self.former);
    }
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
#[expect(unsafe_code, reason = "only assembly reads and writes the register")]
mod register {
    use std::arch::asm;

    /// MXCSR.
    pub type Register = u32;

    /// All exceptions masked and none noted, rounding to nearest, neither FTZ (bit 15) nor DAZ (bit 6). Source: Intel's
    /// Software Developer's Manual, volume 1, 10.2.3.
    pub const DEFAULT: Register = 0x1f80;

    /// The state of this thread.
    pub fn read() -> Register {
        let mut state = 0;
        // SAFETY: stmxcsr writes four bytes to `state`, and every x86-64 processor has it.
        unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut state, options(nostack, preserves_flags)) };
        state
    }

    /// Sets the state of this thread.
    pub fn write(state: Register) {
        // SAFETY: ldmxcsr reads four bytes from `state`. They are the default, or what stmxcsr gave: no reserved bit is
        // set. XLA's threads come with a state that Rust does not allow for; only going back to it leaves the default.
        // Not `preserves_flags`: what exceptions are noted is among the flags.
        unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const state, options(nostack)) };
    }
}

#[cfg(all(target_arch = "aarch64", not(miri)))]
#[expect(unsafe_code, reason = "only assembly reads and writes the register")]
mod register {
    use std::arch::asm;

    /// FPCR.
    pub type Register = u64;

    /// No traps, rounding to nearest, neither FZ (bit 24) nor FZ16 (bit 19). Source: Arm's Architecture Reference Manual
    /// for A-profile, FPCR.
    pub const DEFAULT: Register = 0;

    /// The state of this thread.
    pub fn read() -> Register {
        let state;
        // SAFETY: user code may read FPCR, and every AArch64 processor with floats has it.
        unsafe { asm!("mrs {}, fpcr", out(reg) state, options(nostack, preserves_flags)) };
        state
    }

    /// Sets the state of this thread.
    pub fn write(state: Register) {
        // SAFETY: user code may write FPCR; the value is the default, or what the register held. XLA's threads come with
        // a state that Rust does not allow for; only going back to it leaves the default.
        unsafe { asm!("msr fpcr, {}", in(reg) state, options(nostack, preserves_flags)) };
    }
}

/// Elsewhere, and under Miri, which has no assembly, the state is left alone.
#[cfg(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), not(miri))))]
mod register {
    pub type Register = ();
    pub const DEFAULT: Register = ();
    pub fn read() -> Register {}
    pub fn write((): Register) {}
}

use register::{DEFAULT, Register, read, write};

#[cfg(all(test, target_arch = "x86_64", not(miri)))]
pub(super) mod tests {
    use std::hint::black_box;

    use super::*;

    /// Flush to zero, and denormals are zero.
    const FLUSHES: u32 = 1 << 15 | 1 << 6;

    /// Runs `body` on this thread in the state that XLA's threads are in; returns what it gives, and whether
    /// that is the state after.
    pub fn in_state_of_xla<R>(body: impl FnOnce() -> R) -> (R, bool) {
        write(DEFAULT | FLUSHES);
        let result = body();
        let flushes = read() & FLUSHES == FLUSHES;
        write(DEFAULT);
        (result, flushes)
    }

    /// Half the smallest normal number, computed now.
    pub fn half_of_smallest() -> f32 {
        black_box(f32::MIN_POSITIVE) * black_box(0.5)
    }

    #[test]
    fn subnormals_are_kept_until_the_former_state_comes_back() {
        let (halves, is_restored) = in_state_of_xla(|| {
            let before = half_of_smallest();
            let _state = DefaultFloatState::enter();
            (before, half_of_smallest())
        });
        assert_eq!(halves, (0.0, f32::from_bits(0x0040_0000)));
        assert!(is_restored);
    }

    #[test]
    fn a_panic_brings_the_former_state_back() {
        let (result, is_restored) = in_state_of_xla(|| {
            std::panic::catch_unwind(|| {
                let _state = DefaultFloatState::enter();
                panic!("within");
            })
        });
        assert!(result.is_err() && is_restored);
    }
}
