//! How chunks of a format become what activations are multiplied by.

use super::packed::{Bf16Line, F32Line, Operand};
use crate::simd::{Plain, Vectors};

/// How a format's chunks are multiplied by N of what activations are packed into.
pub(super) trait Products<V: Vectors, X, const N: usize> {
    /// The same where all scales are normal numbers of float32.
    type Normal: Products<V, X, N>;
    /// How far ahead of the chunk in work lines are asked for, when a matrix is read once. What measured fastest, by a
    /// little (AVX-512, 2026-11).
    const PREFETCH_BYTES: usize;
    /// Whether chunks have scales. Their products are summed before they are scaled and added to `sums`, so that one sum to
    /// a row is enough where registers are few.
    const HAS_SCALES: bool;

    /// The products of a row's chunk with each of M rows, scaled, added to sums.
    fn add_products<const M: usize>(
        vectors: V,
        chunk: V::Words,
        scales: u32,
        x: [&[X; N]; M],
        sums: &mut [V::Floats; M],
    );
}

/// How a format's chunks become N vectors each.
pub(super) trait Expand<V: Vectors, X: Operand<V>, const N: usize>: Products<V, X, N> {
    /// The values of a chunk of sixteen rows, scaled: of `rows`, which are transposed, vector i makes the vectors
    /// i, 16 + i .. of `out`, N of them.
    fn expand(vectors: V, rows: [V::Words; 16], scales: [u32; 16], out: &mut [[X; 16]; N]);
}

/// MXFP4; `NORMAL` where all scale bytes are 1 .. 254.
pub(super) struct Mxfp4<const NORMAL: bool>;

impl<const NORMAL: bool> Mxfp4<NORMAL> {
    /// Sums of unscaled products, scaled and added to `sums`.
    #[inline(always)]
    fn add_scaled<V: Vectors, const M: usize>(
        vectors: V,
        products: [V::Floats; M],
        scales: u32,
        sums: &mut [V::Floats; M],
    ) {
        let factors = if NORMAL { vectors.e8m0_normal(scales) } else { rare_factors(vectors, scales) };
        for m in 0..M {
            sums[m] = vectors.mul_add(products[m], factors, sums[m]);
        }
    }
}

/// Factors of four scale bytes, each on four lanes.
#[inline(always)]
pub(super) fn rare_factors<V: Vectors>(vectors: V, scales: u32) -> V::Floats {
    let lanes: [u32; 16] = std::array::from_fn(|lane| scales >> (lane / 4 * 8));
    vectors.e8m0(vectors.load_words(&lanes), 0)
}

impl<V: Vectors, const NORMAL: bool> Products<V, F32Line, 8> for Mxfp4<NORMAL> {
    type Normal = Mxfp4<true>;
    const PREFETCH_BYTES: usize = 2048;
    const HAS_SCALES: bool = true;

    #[inline(always)]
    fn add_products<const M: usize>(
        vectors: V,
        codes: V::Words,
        scales: u32,
        x: [&[F32Line; 8]; M],
        sums: &mut [V::Floats; M],
    ) {
        let x: [&[[f32; 16]; 8]; M] = x.map(|x| zerocopy::transmute_ref!(x));
        Self::add_scaled(vectors, vectors.e2m1_dot(codes, x), scales, sums);
    }
}

impl<V: Vectors, const NORMAL: bool> Expand<V, F32Line, 8> for Mxfp4<NORMAL> {
    #[inline(always)]
    fn expand(vectors: V, codes: [V::Words; 16], scales: [u32; 16], out: &mut [[F32Line; 16]; 8]) {
        let scales = vectors.load_words(&scales);
        for block in 0..4 {
            let factors = vectors.e8m0(scales, 8 * block);
            for i in 4 * block as usize..4 * (block as usize + 1) {
                for (j, number) in (0..4).zip(0u32..) {
                    let [low, high] = vectors.e2m1_pair(codes[i], number);
                    out[j][i] = F32Line(vectors.store_f32(vectors.mul(low, factors)));
                    out[j + 4][i] = F32Line(vectors.store_f32(vectors.mul(high, factors)));
                }
            }
        }
    }
}

impl<V: Vectors, const NORMAL: bool> Products<V, Bf16Line, 4> for Mxfp4<NORMAL> {
    type Normal = Mxfp4<true>;
    const PREFETCH_BYTES: usize = 2048;
    const HAS_SCALES: bool = true;

    #[inline(always)]
    fn add_products<const M: usize>(
        vectors: V,
        codes: V::Words,
        scales: u32,
        x: [&[Bf16Line; 4]; M],
        sums: &mut [V::Floats; M],
    ) {
        let mut products = [vectors.zero(); M];
        for (j, number) in (0..4).zip(0u32..) {
            let values = vectors.e2m1_bf16(codes, 4 * number);
            for m in 0..M {
                products[m] = vectors.bf16_dot(values, x[m][j].load(vectors), products[m]);
            }
        }
        Self::add_scaled(vectors, products, scales, sums);
    }
}

impl<V: Vectors, const NORMAL: bool> Expand<V, Bf16Line, 4> for Mxfp4<NORMAL> {
    #[inline(always)]
    fn expand(vectors: V, codes: [V::Words; 16], scales: [u32; 16], out: &mut [[Bf16Line; 16]; 4]) {
        // Exponents that stay within bfloat16's can be added to.
        let bytes: &[u8; 64] = zerocopy::transmute_ref!(&scales);
        if bytes.iter().fold(0, |most, scale| scale.wrapping_sub(2).max(most)) > 250 {
            return expand_rare(&codes.map(|codes| vectors.store_bf16(codes)), scales, out);
        }
        let scales = vectors.load_words(&scales);
        for block in 0..4 {
            let exponents = vectors.exponents(scales, 8 * block);
            for i in 4 * block as usize..4 * (block as usize + 1) {
                for (out, number) in out.iter_mut().zip(0u32..) {
                    let values = vectors.e2m1_bf16(codes[i], 4 * number);
                    out[i] =
                        Bf16Line(vectors.store_bf16(vectors.add_exponents(values, codes[i], 4 * number, exponents)));
                }
            }
        }
    }
}

/// As `expand`, for scales so small or large that a value may be subnormal, infinite or NaN.
#[cold]
#[inline(never)]
fn expand_rare(codes: &[[u16; 32]; 16], scales: [u32; 16], out: &mut [[Bf16Line; 16]; 4]) {
    let scales = Plain.load_words(&scales);
    for (i, (codes, block)) in codes.iter().zip((0u32..4).flat_map(|block| [block; 4])).enumerate() {
        let codes = Plain.load(zerocopy::transmute_ref!(codes));
        let exponents = Plain.exponents(scales, 8 * block);
        for (out, number) in out.iter_mut().zip(0u32..) {
            let values = Plain.e2m1_bf16(codes, 4 * number);
            out[i] = Bf16Line(Plain.store_bf16(Plain.add_exponents(values, codes, 4 * number, exponents)));
        }
    }
}

/// bfloat16.
pub(super) struct Bf16;

impl<V: Vectors> Products<V, F32Line, 2> for Bf16 {
    type Normal = Self;
    const PREFETCH_BYTES: usize = 128;
    const HAS_SCALES: bool = false;

    #[inline(always)]
    fn add_products<const M: usize>(
        vectors: V,
        words: V::Words,
        _: u32,
        x: [&[F32Line; 2]; M],
        sums: &mut [V::Floats; M],
    ) {
        let (even, odd) = (vectors.bf16_even(words), vectors.bf16_odd(words));
        for m in 0..M {
            sums[m] = vectors.mul_add(even, vectors.load_f32(&x[m][0].0), sums[m]);
            sums[m] = vectors.mul_add(odd, vectors.load_f32(&x[m][1].0), sums[m]);
        }
    }
}

impl<V: Vectors> Expand<V, F32Line, 2> for Bf16 {
    #[inline(always)]
    fn expand(vectors: V, words: [V::Words; 16], _: [u32; 16], out: &mut [[F32Line; 16]; 2]) {
        for i in 0..16 {
            out[0][i] = F32Line(vectors.store_f32(vectors.bf16_even(words[i])));
            out[1][i] = F32Line(vectors.store_f32(vectors.bf16_odd(words[i])));
        }
    }
}

impl<V: Vectors> Products<V, Bf16Line, 1> for Bf16 {
    type Normal = Self;
    const PREFETCH_BYTES: usize = 128;
    const HAS_SCALES: bool = false;

    #[inline(always)]
    fn add_products<const M: usize>(
        vectors: V,
        words: V::Words,
        _: u32,
        x: [&[Bf16Line; 1]; M],
        sums: &mut [V::Floats; M],
    ) {
        for m in 0..M {
            sums[m] = vectors.bf16_dot(words, x[m][0].load(vectors), sums[m]);
        }
    }
}

impl<V: Vectors> Expand<V, Bf16Line, 1> for Bf16 {
    #[inline(always)]
    fn expand(vectors: V, words: [V::Words; 16], _: [u32; 16], out: &mut [[Bf16Line; 16]; 1]) {
        for i in 0..16 {
            out[0][i] = Bf16Line(vectors.store_bf16(words[i]));
        }
    }
}
