//! Rectangular regions of tensors, and the runs of consecutive elements that they are made of. Pure.
//!
//! Elements are counted in row-major order. A region within a larger one consists of equally long runs: all axes after the
//! last one that it does not fill come whole.

use std::ops::Range;

/// A box of a tensor: a range of indices for each axis; none for a scalar.
pub type Region = Vec<Range<u64>>;

/// Number of elements of a region.
#[must_use]
pub fn elements(region: &[Range<u64>]) -> u64 {
    region.iter().map(length).product()
}

/// The whole of a tensor.
#[must_use]
pub fn whole(shape: &[u64]) -> Region {
    shape.iter().map(|&dim| 0..dim).collect()
}

fn length(range: &Range<u64>) -> u64 {
    range.end - range.start
}

/// The region to read for `region` of a tensor of this `shape`: itself, or more where its runs lie so close together that
/// what is between them is read along, and always whole units of `unit_elems` elements.
///
/// `is_short` says so of the elements of a run and of the gap behind it.
#[must_use]
pub fn cover(shape: &[u64], region: &[Range<u64>], unit_elems: u64, is_short: impl Fn(u64, u64) -> bool) -> Region {
    let mut cover = region.to_vec();
    let Some(last) = cover.last_mut() else { return cover };
    if !shape.last().expect("as long as the region").is_multiple_of(unit_elems) {
        // Units cross the ends of rows.
        return whole(shape);
    }
    *last = last.start / unit_elems * unit_elems..last.end.div_ceil(unit_elems) * unit_elems;
    let mut stride = 1;
    for axis in (1..shape.len()).rev() {
        let runs: u64 = cover[..axis].iter().map(length).product();
        let run = length(&cover[axis]) * stride;
        let gap = shape[axis] * stride - run;
        if gap > 0 && !is_short(run, gap) || runs <= 1 {
            break;
        }
        cover[axis] = 0..shape[axis];
        stride *= shape[axis];
    }
    cover
}

/// The runs of an inner region within an outer one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runs {
    /// Elements of each run.
    pub run_elems: u64,
    /// Number of runs.
    pub count: u64,
    axes: Vec<Axis>,
}

/// One axis of an inner region within an outer one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Axis {
    /// Where the inner region begins, from the beginning of the outer one.
    start: u64,
    /// Extent of the inner region.
    length: u64,
    /// Elements of the outer region from one index to the next.
    stride: u64,
    /// Elements of the inner region under one index.
    inner: u64,
    /// This axis chooses among runs rather than within one.
    is_outside: bool,
}

impl Runs {
    /// The runs of `inner`, which lies within `outer`.
    #[must_use]
    pub fn new(outer: &[Range<u64>], inner: &[Range<u64>]) -> Self {
        let (mut stride, mut inside) = (1, 1);
        let mut axes: Vec<_> = std::iter::zip(outer, inner)
            .rev()
            .map(|(outer, inner)| {
                let length = length(inner);
                let axis = Axis { start: inner.start - outer.start, length, stride, inner: inside, is_outside: false };
                stride *= outer.end - outer.start;
                inside *= length;
                axis
            })
            .collect();
        axes.reverse();
        let is_partial = |axis: &usize| length(&outer[*axis]) != length(&inner[*axis]);
        let split = (0..axes.len()).rev().find(is_partial).unwrap_or(0);
        axes[..split].iter_mut().for_each(|axis| axis.is_outside = true);
        let count = axes[..split].iter().map(|axis| axis.length).product();
        let run_elems = axes[split..].iter().map(|axis| axis.length).product();
        Self { run_elems, count, axes }
    }

    /// Where a run begins, in elements of the outer region.
    #[must_use]
    pub fn start(&self, run: u64) -> u64 {
        let mut rest = run * self.run_elems;
        let index = |axis: &Axis| {
            if !axis.is_outside {
                return axis.start * axis.stride;
            }
            let index = rest / axis.inner;
            rest %= axis.inner;
            (axis.start + index) * axis.stride
        };
        self.axes.iter().map(index).sum()
    }

    /// How many elements of the inner region come before `position`, which counts elements of the outer one.
    #[must_use]
    pub fn before(&self, position: u64) -> u64 {
        let (mut rest, mut count) = (position, 0);
        if self.run_elems * self.count == 0 {
            return 0;
        }
        for axis in &self.axes {
            let index = rest / axis.stride;
            rest %= axis.stride;
            if index < axis.start {
                return count;
            }
            if index >= axis.start + axis.length {
                return count + axis.length * axis.inner;
            }
            count += (index - axis.start) * axis.inner;
        }
        // A scalar's one element lies before every position but the first.
        if self.axes.is_empty() { position.min(1) } else { count }
    }

    /// The pieces of runs that hold the inner region's elements `range`: for each its beginning, in elements of the
    /// outer region, and its length.
    pub fn pieces(&self, range: Range<u64>) -> impl Iterator<Item = (u64, u64)> {
        let mut next = range.start;
        std::iter::from_fn(move || {
            if next >= range.end {
                return None;
            }
            let (run, skipped) = (next / self.run_elems, next % self.run_elems);
            let length = (self.run_elems - skipped).min(range.end - next);
            next += length;
            Some((self.start(run) + skipped, length))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    /// Positions of the inner region's elements in the outer one, one by one.
    fn positions(outer: &[Range<u64>], inner: &[Range<u64>]) -> Vec<u64> {
        let mut positions = vec![0];
        for (outer, inner) in outer.iter().zip(inner) {
            let step = |&base: &u64| inner.clone().map(move |i| base * length(outer) + i - outer.start);
            positions = positions.iter().flat_map(step).collect();
        }
        positions
    }

    fn nested() -> impl Strategy<Value = (Region, Region)> {
        let axis = (0u64..4, 0u64..4, 0u64..4, 0u64..4).prop_map(|(a, b, c, d)| (a..a + b + c + d, a + b..a + b + c));
        prop::collection::vec(axis, 0..5).prop_map(|axes| axes.into_iter().unzip())
    }

    proptest! {
        #[test]
        fn runs_are_the_elements_one_by_one((outer, inner) in nested(), cut in 0u64..200) {
            let runs = Runs::new(&outer, &inner);
            let expected = positions(&outer, &inner);
            prop_assert_eq!(runs.run_elems * runs.count, expected.len() as u64);
            let count = expected.len() as u64;
            let start = cut.min(count);
            let found: Vec<_> = runs.pieces(start..count).flat_map(|(start, length)| start..start + length).collect();
            prop_assert_eq!(&found, &expected[usize::try_from(start).unwrap()..]);
            for position in 0..=elements(&outer) {
                let before = expected.iter().filter(|&&element| element < position).count() as u64;
                prop_assert_eq!(runs.before(position), before);
            }
        }

        #[test]
        fn covers_hold_their_region_in_whole_units(
            (outer, inner) in nested(), unit in prop::sample::select(vec![1u64, 2, 3, 32]), gap in 0u64..30,
        ) {
            let shape: Vec<_> = outer.iter().map(|range| range.end * 3).collect();
            let cover = cover(&shape, &inner, unit, |_, between| between <= gap);
            for ((cover, inner), dim) in cover.iter().zip(&inner).zip(&shape) {
                prop_assert!(cover.start <= inner.start && inner.end <= cover.end && cover.end <= *dim);
            }
            let runs = Runs::new(&whole(&shape), &cover);
            if elements(&shape.iter().map(|&dim| 0..dim).collect::<Vec<_>>()).is_multiple_of(unit) {
                prop_assert!(runs.run_elems.is_multiple_of(unit) || elements(&cover) == 0 || shape.is_empty());
            }
        }
    }

    #[test]
    fn short_gaps_are_read_along_and_long_ones_are_not() {
        let columns = [0..6, 2..4];
        let cover =
            |shape: &[u64], region: &[Range<u64>], longest| super::cover(shape, region, 1, |_, gap| gap <= longest);
        assert_eq!(cover(&[6, 10], &columns, 7), columns);
        assert_eq!(cover(&[6, 10], &columns, 8), [0..6, 0..10]);
        // One run has nothing between its pieces.
        assert_eq!(cover(&[6, 10], &[3..4, 2..4], 100), [3..4, 2..4]);
        // Gaps between the runs of an outer axis are as long as what they leave out.
        assert_eq!(cover(&[5, 6, 10], &[0..5, 1..3, 0..10], 39), [0..5, 1..3, 0..10]);
        assert_eq!(cover(&[5, 6, 10], &[0..5, 1..3, 0..10], 40), [0..5, 0..6, 0..10]);
        // What is asked: a run, and the gap behind it.
        let _ = super::cover(&[6, 10], &columns, 1, |run, gap| {
            assert_eq!((run, gap), (2, 8));
            false
        });
    }

    #[test]
    fn units_that_cross_rows_are_read_whole() {
        let never = |_, _| false;
        assert_eq!(cover(&[4, 5], &[1..2, 0..5], 2, never), [0..4, 0..5]);
        assert_eq!(cover(&[4, 6], &[1..2, 1..5], 2, never), [1..2, 0..6]);
    }
}
