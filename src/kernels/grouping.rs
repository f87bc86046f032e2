//! Rows of activations grouped by the expert that they go to.

/// Rows that go to one expert.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) expert: usize,
    /// Which of the given ids these are.
    pub(super) rows: Vec<usize>,
}

/// Rows by expert, in groups of at most `most` rows; rows with an id that no expert has are in none.
pub(super) fn group_by_expert(ids: &[i32], experts: usize, most: usize) -> Vec<Group> {
    let mut rows: Vec<(usize, usize)> = ids
        .iter()
        .enumerate()
        .filter_map(|(row, &id)| {
            usize::try_from(id).ok().filter(|&expert| expert < experts).map(|expert| (expert, row))
        })
        .collect();
    rows.sort_unstable();
    rows.chunk_by(|a, b| a.0 == b.0)
        .flat_map(|rows| rows.chunks(most))
        .map(|rows| Group { expert: rows[0].0, rows: rows.iter().map(|&(_, row)| row).collect() })
        .collect()
}

/// Consecutive groups that together have at least `enough` rows, but for the last.
pub(super) fn waves(groups: &[Group], enough: usize) -> impl Iterator<Item = &[Group]> {
    let mut rest = groups;
    std::iter::from_fn(move || {
        let mut rows = 0;
        let is_last = |group: &Group| {
            rows += group.rows.len();
            rows >= enough
        };
        let length = rest.iter().position(is_last).map_or(rest.len(), |last| last + 1);
        let (wave, others) = rest.split_at(length);
        rest = others;
        (!wave.is_empty()).then_some(wave)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_grouped_by_expert_in_order() {
        let groups = group_by_expert(&[3, 0, -1, 3, 5, 3, i32::MIN, 0, 3], 4, 3);
        let found: Vec<_> = groups.iter().map(|group| (group.expert, group.rows.as_slice())).collect();
        assert_eq!(found, [(0, &[1, 7][..]), (3, &[0, 3, 5]), (3, &[8])]);
        assert!(group_by_expert(&[], 4, 3).is_empty() && group_by_expert(&[0], 0, 3).is_empty());
    }

    #[test]
    fn waves_have_enough_rows_but_for_the_last() {
        let groups = group_by_expert(&[0, 0, 1, 2, 2, 2, 3], 4, 9);
        let sizes: Vec<Vec<usize>> =
            waves(&groups, 3).map(|wave| wave.iter().map(|group| group.rows.len()).collect()).collect();
        assert_eq!(sizes, [vec![2, 1], vec![3], vec![1]]);
        assert_eq!(waves(&[], 3).count(), 0);
    }
}
