//! What stands between the layers of gpt-oss's experts.

use std::iter::zip;

use crate::simd::{Level, VectorKernel, Vectors, exp};

/// gate · sigmoid(alpha · gate) · (up + 1), both clamped; NaN stays NaN.
#[derive(Debug, Clone, Copy)]
pub(super) struct Swiglu {
    /// gate is at most this, and up between its negative and it.
    pub(super) limit: f32,
    /// Steepness of the sigmoid.
    pub(super) alpha: f32,
}

impl Swiglu {
    /// Of pairs of gate and up, and of what is added to them first, as many as there are results.
    pub(super) fn run(self, level: Level, pairs: &[[f32; 2]], biases: &[[f32; 2]], out: &mut [f32]) {
        level.run_vectors(Run { swiglu: self, pairs, biases, out });
    }
}

struct Run<'a> {
    swiglu: Swiglu,
    pairs: &'a [[f32; 2]],
    biases: &'a [[f32; 2]],
    out: &'a mut [f32],
}

impl VectorKernel for Run<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vectors>(self, vectors: V) {
        let Swiglu { limit, alpha } = self.swiglu;
        let inputs = zip(self.pairs.chunks(16), self.biases.chunks(16));
        for (out, (pairs, biases)) in zip(self.out.chunks_mut(16), inputs) {
            let (mut gates, mut ups) = ([0.0; 16], [0.0; 16]);
            for (lane, ([gate, up], [gate_bias, up_bias])) in zip(pairs, biases).enumerate() {
                let gate = gate + gate_bias;
                gates[lane] = if gate > limit { limit } else { gate };
                ups[lane] = (up + up_bias).clamp(-limit, limit);
            }
            let exponents = vectors.mul(vectors.load_f32(&gates), vectors.splat(-alpha));
            let powers = vectors.store_f32(exp(vectors, exponents));
            for (lane, out) in out.iter_mut().enumerate() {
                *out = gates[lane] / (1.0 + powers[lane]) * (ups[lane] + 1.0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_float64_and_nan_stays() {
        let swiglu = Swiglu { limit: 7.0, alpha: 1.702 };
        let values = [-1e30, -60.0, -7.5, -1.0, -1e-30, 0.0, 1e-3, 0.5, 6.9, 7.1, 1e30, f32::INFINITY, f32::NAN];
        let pairs: Vec<[f32; 2]> = values.iter().flat_map(|gate| values.map(|up| [*gate, up])).collect();
        let biases = vec![[0.25, -0.5]; pairs.len()];
        for level in Level::all() {
            let mut out = vec![0.0; pairs.len()];
            swiglu.run(level, &pairs, &biases, &mut out);
            for (out, [gate, up]) in zip(out, &pairs) {
                let (gate, up) = (f64::from(gate + 0.25), f64::from(up - 0.5));
                let clamped = if gate > 7.0 { 7.0 } else { gate };
                let exact = clamped / (1.0 + (-f64::from(1.702_f32) * clamped).exp()) * (up.clamp(-7.0, 7.0) + 1.0);
                let is_near = (f64::from(out) - exact).abs() <= 2e-5 * exact.abs() + 1e-37;
                assert!(is_near || out.is_nan() && exact.is_nan(), "{level}: {gate}, {up}: {out}, {exact}");
            }
        }
    }
}
