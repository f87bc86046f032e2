//! Loops compiled again for the vector instructions that the processor turns out to have.
//!
//! A kernel is written once, plainly, in a way that compilers vectorise; that plain code is also its oracle. Tests compare
//! every level that the machine has with it.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod exp;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod neon;
mod plain;
mod vectors;

use std::fmt;

pub(crate) use exp::exp;
pub(crate) use plain::{E2M1_BIAS, Plain};
pub(crate) use vectors::{VectorKernel, Vectors};

/// A loop to run with the widest vectors at hand.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;
    /// The loop; `#[inline(always)]`, so that it is compiled within each level's function.
    fn run(self) -> Self::Output;
}

/// Vector instructions that this processor has: proof that code compiled for them may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level(Instructions);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Instructions {
    /// What every processor of the target has.
    Plain,
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    Neon,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

impl Level {
    /// No instructions but those of every processor of the target.
    pub const PLAIN: Self = Self(Instructions::Plain);

    /// The widest vectors of this processor.
    #[must_use]
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            let has_avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            // All processors that multiply bfloat16 multiply bytes as well.
            let has_dots = is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vnni");
            return Self(match (has_avx512, has_dots) {
                (true, true) => Instructions::Avx512Bf16,
                (true, false) => Instructions::Avx512,
                (false, _) => Instructions::Avx2,
            });
        }
        #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
        return Self(Instructions::Neon);
        #[cfg(not(all(target_arch = "aarch64", target_endian = "little")))]
        Self::PLAIN
    }

    /// All levels up to the best, for tests and benches.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let levels = [
            Instructions::Plain,
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Instructions::Neon,
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2,
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512,
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512Bf16,
        ];
        levels.into_iter().map(Self).filter(|level| *level <= Self::best()).collect()
    }

    /// Whether AVX2 is among these instructions.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn has_avx2(self) -> bool {
        self.0 >= Instructions::Avx2
    }

    /// Whether products of bfloat16 are one instruction.
    pub(crate) fn has_bf16_dot(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512Bf16 => true,
            _ => false,
        }
    }

    /// Runs a kernel with these instructions.
    #[cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "calls functions compiled for other processors"))]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Instructions::Plain => kernel.run(),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Instructions::Neon => kernel.run(),
            // SAFETY: only `best` and `all` make this level, after detecting AVX2 and FMA.
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => unsafe { run_avx2(kernel) },
            // SAFETY: only `best` and `all` make this level, after detecting these four, AVX2 and FMA.
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => unsafe { run_avx512(kernel) },
            // SAFETY: only `best` and `all` make this level, after detecting these six, AVX2 and FMA.
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512Bf16 => unsafe { run_avx512_bf16(kernel) },
        }
    }

    /// Runs a kernel that is written in vectors with those of this level.
    #[cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "calls functions compiled for other processors"))]
    pub(crate) fn run_vectors<K: VectorKernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Instructions::Plain => kernel.run(Plain),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Instructions::Neon => kernel.run(neon::Neon),
            // SAFETY: only `best` and `all` make this level, after detecting all that these functions enable and that
            // the vectors ask for.
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => unsafe { run_avx2(WithVectors(kernel, avx2::Avx2::new())) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => unsafe { run_avx512(WithVectors(kernel, avx512::Avx512::<false>::new())) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512Bf16 => unsafe { run_avx512_bf16(WithVectors(kernel, avx512::Avx512::<true>::new())) },
        }
    }
}

/// A kernel and its vectors, as one kernel.
#[cfg(target_arch = "x86_64")]
struct WithVectors<K, V>(K, V);

#[cfg(target_arch = "x86_64")]
impl<K: VectorKernel, V: Vectors> Kernel for WithVectors<K, V> {
    type Output = K::Output;

    #[inline(always)]
    fn run(self) -> K::Output {
        self.0.run(self.1)
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Instructions::Plain => "plain",
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Instructions::Neon => "NEON",
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => "AVX-512",
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512Bf16 => "AVX-512 BF16",
        })
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")]
fn run_avx512_bf16<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}
