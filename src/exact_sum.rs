//! Sums of floats that do not depend on the order of the additions: integers in bins by binary exponent.

/// Bits of exponent that share a bin. 53 bits of a float and 15 of shift leave room for 2^60 additions to a bin.
const BIN_EXPONENTS: i32 = 16;

/// Exponent of the last bit of the smallest float.
const MIN_EXPONENT: i32 = -1074;

/// Exponent of the last bit of the largest floats.
const MAX_EXPONENT: i32 = 971;

/// Largest magnitude of the exponents that [`ExactSum::add`] takes: more than twice the exponent of any normal float.
const MAX_SCALE: i32 = 2048;

/// Exponent of the last bit of the lowest bin.
const ORIGIN: i32 = MIN_EXPONENT - MAX_SCALE;

const BINS: usize = ((MAX_EXPONENT + MAX_SCALE - ORIGIN) / BIN_EXPONENTS + 1) as usize;

/// An exact sum of floats that are not negative.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ExactSum {
    /// Multiples of 2^ORIGIN, 2^(ORIGIN + 16), ...; none before the first addition: most sums stay empty.
    bins: Vec<u128>,
}

impl ExactSum {
    /// Adds `value * 2^exponent`.
    ///
    /// # Panics
    /// When `value` is negative, infinite or NaN, or `exponent` beyond ±2048.
    #[inline]
    pub fn add(&mut self, value: f64, exponent: i32) {
        assert!(value >= 0.0 && value.is_finite() && exponent.abs() <= MAX_SCALE, "{value} 2^{exponent}");
        if value == 0.0 {
            return;
        }
        let field = i32::try_from(value.to_bits() >> 52 & 0x7ff).expect("eleven bits");
        let hidden = u64::from(field > 0) << 52;
        let mantissa = u128::from(value.to_bits() & ((1 << 52) - 1) | hidden);
        // Of subnormals the field is 0, and the exponent that of field 1.
        let place = field.max(1) - 1 + MIN_EXPONENT + exponent - ORIGIN;
        let bin = usize::try_from(place / BIN_EXPONENTS).expect("ORIGIN is the lowest");
        if self.bins.is_empty() {
            self.bins = vec![0; BINS];
        }
        self.bins[bin] += mantissa << (place % BIN_EXPONENTS);
    }

    /// Adds another sum.
    pub fn merge(&mut self, other: &Self) {
        if self.bins.is_empty() {
            self.bins.clone_from(&other.bins);
            return;
        }
        for (bin, other) in self.bins.iter_mut().zip(&other.bins) {
            *bin += other;
        }
    }

    /// The sum as `(value, exponent)`, which stand for `value * 2^exponent`; within some units in the last place, and
    /// the same whatever the order of the additions. The sum itself may be beyond the range of floats.
    pub fn total(&self) -> (f64, i32) {
        let Some(top) = self.bins.iter().rposition(|&bin| bin > 0) else { return (0.0, 0) };
        #[expect(clippy::cast_precision_loss, reason = "the one rounding of a sum")]
        let value = self.bins[..=top].iter().fold(0.0, |sum, &bin| sum / f64::from(1 << BIN_EXPONENTS) + bin as f64);
        (value, ORIGIN + BIN_EXPONENTS * i32::try_from(top).expect("one of the bins"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sum(terms: &[(f64, i32)]) -> ExactSum {
        let mut sum = ExactSum::default();
        for &(value, exponent) in terms {
            sum.add(value, exponent);
        }
        sum
    }

    /// The value of a sum that floats can hold.
    fn value(sum: &ExactSum) -> f64 {
        let (value, exponent) = sum.total();
        // In two steps: no power of two has the exponents of the smallest sums.
        value * 2f64.powi(exponent / 2) * 2f64.powi(exponent - exponent / 2)
    }

    #[test]
    fn nothing_sums_to_zero() {
        assert_eq!(ExactSum::default().total(), (0.0, 0));
        assert_eq!(sum(&[(0.0, 0), (-0.0, 2048)]).total(), (0.0, 0));
    }

    #[test]
    fn one_value_comes_back_as_it_was() {
        for one in [1.0, 0.1, f64::MAX, f64::MIN_POSITIVE, f64::MIN_POSITIVE / 3.0, f64::from_bits(1)] {
            assert_eq!(value(&sum(&[(one, 0)])), one);
        }
        assert_eq!(value(&sum(&[(3.0, -4)])), 0.1875);
    }

    #[test]
    fn small_values_are_not_lost_beside_large_ones() {
        // In floats, each of the additions of 2^-60 to 1 would leave 1.
        let mut terms = vec![(1.0, 0)];
        terms.extend(std::iter::repeat_n((1.0, -60), 1 << 20));
        assert_eq!(value(&sum(&terms)), 1.0 + 2f64.powi(-40));
    }

    #[test]
    fn the_ends_of_the_range_have_bins() {
        let (largest, exponent) = sum(&[(f64::MAX, 2048)]).total();
        assert_eq!(largest * 2f64.powi(exponent - 971 - 2048), 2f64.powi(53) - 1.0);
        let (smallest, exponent) = sum(&[(f64::from_bits(1), -2048)]).total();
        assert_eq!((smallest, exponent), (1.0, -1074 - 2048));
    }

    #[test]
    #[should_panic(expected = "inf")]
    fn infinities_are_refused() {
        ExactSum::default().add(f64::INFINITY, 0);
    }

    fn terms() -> impl Strategy<Value = Vec<(f64, i32)>> {
        let bits = (0..0x7ff0_0000_0000_0000u64).prop_map(f64::from_bits);
        prop::collection::vec((bits, -2048..=2048), 1..60)
    }

    proptest! {
        #[test]
        fn order_and_grouping_do_not_matter(
            (terms, shuffled) in terms().prop_flat_map(|terms| (Just(terms.clone()), Just(terms).prop_shuffle())),
            cut in any::<prop::sample::Index>(),
        ) {
            let whole = sum(&terms);
            let (front, back) = shuffled.split_at(cut.index(shuffled.len()));
            let mut merged = sum(front);
            merged.merge(&sum(back));
            prop_assert_eq!(&merged, &whole);
            prop_assert_eq!(merged.total(), whole.total());
        }

        #[test]
        fn sums_of_integers_are_theirs(values in prop::collection::vec(0..1u64 << 46, 0..64)) {
            #[expect(clippy::cast_precision_loss, reason = "below 2^53, sums too")]
            let terms: Vec<_> = values.iter().map(|&value| (value as f64, 0)).collect();
            #[expect(clippy::cast_precision_loss, reason = "as above")]
            let expected = values.iter().sum::<u64>() as f64;
            prop_assert_eq!(value(&sum(&terms)), expected);
        }
    }
}
