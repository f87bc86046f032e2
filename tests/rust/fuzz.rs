//! The fuzz targets on a stable toolchain: arbitrary bytes, and mutations of the corpora that fuzzers start from.

use std::path::Path;

use proptest::prelude::*;

use crate::targets;

type Target = fn(&[u8]);

const TARGETS: [(&str, Target); 8] = [
    ("safetensors_file", targets::safetensors_file),
    ("header", targets::header),
    ("index", targets::index),
    ("manifest", targets::manifest),
    ("journal", targets::journal),
    ("npy_header", targets::npy_header),
    ("msgpack_file", targets::msgpack_file),
    ("pickle_file", targets::pickle_file),
];

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| std::fs::read(file).unwrap()).collect()
}

#[test]
fn corpora_pass_their_targets() {
    for (name, target) in TARGETS {
        let corpus = corpus(name);
        assert!(!corpus.is_empty(), "{name}");
        for data in &corpus {
            target(data);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes_pass_every_target(data in prop::collection::vec(any::<u8>(), 0..300)) {
        for (_, target) in TARGETS {
            target(&data);
        }
    }

    #[test]
    fn mutated_corpora_pass_their_targets(
        pick in any::<prop::sample::Index>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3u8), 1..6),
    ) {
        for (name, target) in TARGETS {
            let seeds = corpus(name);
            let mut data = seeds[pick.index(seeds.len())].clone();
            for (place, byte, edit) in &edits {
                let place = place.index(data.len().max(1));
                match edit {
                    0 if !data.is_empty() => data[place] = *byte,
                    1 => data.insert(place.min(data.len()), *byte),
                    _ => data.truncate(place),
                }
            }
            target(&data);
        }
    }
}
