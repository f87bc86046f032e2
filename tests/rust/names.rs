//! File stems: safe, distinct without case, bounded, independent of order.

use std::collections::{BTreeSet, HashMap, HashSet};

use proptest::collection::{btree_set, vec};
use proptest::prelude::*;
use tensorport::names::file_stems;

/// With a part number, extension and temporary suffix behind it, a stem has to fit the 255 bytes of a file name.
const MOST_STEM_BYTES: usize = 255 - ".part99999.npy.tmp".len();

/// Names that meet each other, reserved ones, long ones, and any text at all.
fn any_names() -> impl Strategy<Value = BTreeSet<String>> {
    let name = prop_oneof![
        4 => "[abAB._]{0,3}",
        2 => "[a-z]{1,4}(\\.[0-9]{1,2})?\\.[a-z]{1,5}",
        1 => prop::sample::select(vec!["con", "CON", "Nul", "com1", "LPT9", "aux", "prn.", "..", "/", "a/b", "a%2Fb"])
            .prop_map(str::to_owned),
        1 => vec("[xX.]", 190..230).prop_map(|parts| parts.concat()),
        1 => any::<String>(),
    ];
    btree_set(name, 0..40)
}

fn is_reserved(stem: &str) -> bool {
    let stem = stem.to_ascii_lowercase();
    let numbered =
        |device| stem.strip_prefix(device).is_some_and(|n: &str| n.len() == 1 && n.as_bytes()[0].is_ascii_digit());
    ["con", "prn", "aux", "nul"].contains(&stem.as_str()) || numbered("com") || numbered("lpt")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn stems_are_safe_bounded_and_distinct_without_case(names in any_names()) {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let stems = file_stems(&names);
        prop_assert_eq!(stems.len(), names.len());
        let folded: HashSet<_> = stems.iter().map(|stem| stem.to_lowercase()).collect();
        prop_assert_eq!(folded.len(), names.len());
        for stem in &stems {
            prop_assert!(!stem.is_empty() && stem.len() <= MOST_STEM_BYTES, "{}", stem);
            prop_assert!(stem.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-%".contains(&b)), "{}", stem);
            prop_assert!(!is_reserved(stem), "{}", stem);
        }
    }

    #[test]
    fn stems_do_not_depend_on_the_order(names in any_names(), seed in any::<prop::sample::Selector>()) {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let expected: HashMap<_, _> = names.iter().zip(file_stems(&names)).collect();
        // Rotated and reversed: every name gets other neighbours before it.
        let first = if names.is_empty() { 0 } else { seed.select(0..names.len()) };
        let rotated: Vec<&str> = names[first..].iter().chain(&names[..first]).rev().copied().collect();
        for (name, stem) in rotated.iter().zip(file_stems(&rotated)) {
            prop_assert_eq!(&expected[name], &stem);
        }
    }

    #[test]
    fn a_name_that_meets_no_other_keeps_its_stem(names in btree_set("[a-z]{5,9}", 1..9), other in "[A-Z]{4}") {
        let mut names: Vec<&str> = names.iter().map(String::as_str).collect();
        let alone = file_stems(&names);
        names.push(&other);
        prop_assert_eq!(&alone[..], &file_stems(&names)[..alone.len()]);
        prop_assert_eq!(&alone[..], &names[..alone.len()]);
    }
}

#[test]
fn a_name_that_imitates_a_suffixed_one_stays_distinct() {
    // The third name is the stem that the first one gets beside the second.
    let stems = file_stems(&["a.b", "a_b"]);
    let imitation = stems[0].to_uppercase();
    let all = file_stems(&["a.b", "a_b", &imitation]);
    let folded: HashSet<_> = all.iter().map(|stem| stem.to_lowercase()).collect();
    assert_eq!(folded.len(), 3, "{all:?}");
}

#[test]
fn sixteen_thousand_meeting_names_are_told_apart() {
    // Names of dots and underscores only: all of one length meet.
    let names: Vec<String> = (0..1 << 14)
        .map(|number: u32| (0..14).map(|bit| if number >> bit & 1 == 0 { '.' } else { '_' }).collect())
        .collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let stems: HashSet<String> = file_stems(&names).into_iter().map(|stem| stem.to_lowercase()).collect();
    assert_eq!(stems.len(), names.len());
}
