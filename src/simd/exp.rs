//! The exponential function of vectors.

use std::f32::consts::LOG2_E;

use super::Vectors;

/// Above it e^x is infinite, and at it.
const LARGEST: f32 = 89.0;

/// Below it e^x is zero, and at it: less than half of the smallest float.
const SMALLEST: f32 = -104.0;

/// Added to a number below 2^22 and taken away again, it leaves the nearest whole one.
const ROUND: f32 = 12_582_912.0; // 1.5 · 2^23

/// ln 2 in two parts. The first has nine bits: its product with a whole number is exact.
const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];

/// (e^r − 1 − r) / r² for |r| up to ln 2 / 2, the highest power first.
///
/// Source: Cephes, `single/expf.c`.
const POLYNOMIAL: [f32; 6] = [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5];

/// e^x, off by less than 1.25 units in the last place, subnormal numbers among them; NaN of NaN.
#[inline(always)]
pub(crate) fn exp<V: Vectors>(vectors: V, x: V::Floats) -> V::Floats {
    // The second of two is what comes out for NaN.
    let x = vectors.min(vectors.splat(LARGEST), vectors.max(vectors.splat(SMALLEST), x));
    // e^x = 2^n · e^r
    let n = vectors.mul_add(x, vectors.splat(LOG2_E), vectors.splat(ROUND));
    let n = vectors.add(n, vectors.splat(-ROUND));
    let r = vectors.mul_add(n, vectors.splat(-LN_2[0]), x);
    let r = vectors.mul_add(n, vectors.splat(-LN_2[1]), r);
    let mut sum = vectors.splat(POLYNOMIAL[0]);
    for coefficient in &POLYNOMIAL[1..] {
        sum = vectors.mul_add(sum, r, vectors.splat(*coefficient));
    }
    let sum = vectors.mul_add(sum, vectors.mul(r, r), r);
    vectors.scale(vectors.add(sum, vectors.splat(1.0)), n)
}

#[cfg(test)]
mod tests {
    use super::super::{Level, VectorKernel};
    use super::*;

    struct Exp([f32; 16]);

    impl VectorKernel for Exp {
        type Output = [f32; 16];

        #[inline(always)]
        fn run<V: Vectors>(self, vectors: V) -> [f32; 16] {
            vectors.store_f32(exp(vectors, vectors.load_f32(&self.0)))
        }
    }

    /// How far a float is from a number, in units of the last place that the number has as a float.
    fn distance(found: f32, exact: f64) -> f64 {
        let exponent = exact.log2().floor().max(-126.0);
        (f64::from(found) - exact).abs() / (exponent - 23.0).exp2()
    }

    #[test]
    #[expect(clippy::cast_precision_loss, reason = "seven digits")]
    fn values_are_those_of_float64() {
        // Bits in steps of a prime are floats of all sizes; then come those whose results are neither 0 nor infinite.
        let of_all_sizes = (0..=u32::MAX).step_by(4999).map(f32::from_bits);
        let between = (-1_050_000..=900_000_i32).map(|step| step as f32 / 1e4);
        let floats: Vec<f32> = of_all_sizes.chain(between).collect();
        for level in Level::all() {
            let mut worst = 0.0_f64;
            for x in floats.as_chunks::<16>().0 {
                for (x, found) in x.iter().zip(level.run_vectors(Exp(*x))) {
                    // The largest float is e^88.722839.
                    if x.is_nan() {
                        assert!(found.is_nan(), "{level}: e^{x} = {found}");
                    } else if *x > 88.722_84 {
                        assert_eq!(found, f32::INFINITY, "{level}: e^{x}");
                    } else {
                        worst = worst.max(distance(found, f64::from(*x).exp()));
                    }
                }
            }
            assert!(worst < 1.25, "{level}: off by {worst}");
        }
    }

    #[test]
    fn ends_are_exact() {
        let x = [f32::NEG_INFINITY, f32::MIN, -104.0, -0.0, 0.0, f32::MIN_POSITIVE, 89.0, f32::MAX, f32::INFINITY];
        for level in Level::all() {
            let mut lanes = [0.0; 16];
            lanes[..x.len()].copy_from_slice(&x);
            let found = level.run_vectors(Exp(lanes));
            let inf = f32::INFINITY;
            assert_eq!(found[..x.len()], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, inf, inf, inf], "{level}");
        }
    }
}
