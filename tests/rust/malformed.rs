//! The stored corpus of malformed checkpoints: each is refused, quickly, by a message that names the place.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tensorport::{Checkpoint, Error};

/// Far above what any input takes, far below what an allocation from an unchecked size or a deep recursion would.
const MOST_TIME: Duration = Duration::from_secs(2);

fn corpus() -> (PathBuf, BTreeMap<String, Vec<String>>) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/malformed");
    let text = std::fs::read(folder.join("expected.json")).unwrap();
    (folder, serde_json::from_slice(&text).unwrap())
}

/// What is wrong with the outcome of opening one input; None when it is as it should be.
fn fault(path: &Path, words: &[String]) -> Option<String> {
    let started = Instant::now();
    let outcome = std::panic::catch_unwind(|| Checkpoint::open(path).map(drop));
    if started.elapsed() > MOST_TIME {
        return Some(format!("took {:?}", started.elapsed()));
    }
    let error = match outcome {
        Err(_) => return Some("panicked".into()),
        Ok(Ok(())) => return Some("was accepted".into()),
        Ok(Err(error)) => error,
    };
    let is_checkpoint_kind =
        matches!(error, Error::MalformedFile { .. } | Error::MalformedTensor { .. } | Error::NoCheckpoint { .. });
    // Without the folder, whose path could hold the words by chance.
    let message = error.to_string().replace(&format!("{}/", path.parent().unwrap().display()), "");
    let missing: Vec<_> = words.iter().filter(|word| !message.contains(word.as_str())).collect();
    (!is_checkpoint_kind || !missing.is_empty() || message.contains('\n'))
        .then(|| format!("checkpoint error: {is_checkpoint_kind}, missing words: {missing:?}, message: {message}"))
}

#[test]
fn every_malformed_input_is_refused_by_a_message_that_names_the_place() {
    let (folder, expected) = corpus();
    let faults: Vec<_> = expected
        .iter()
        .filter_map(|(name, words)| fault(&folder.join(name), words).map(|fault| format!("{name}: {fault}")))
        .collect();
    assert!(faults.is_empty(), "{} of {}:\n{}", faults.len(), expected.len(), faults.join("\n"));
}

#[test]
fn the_corpus_and_its_expectations_name_the_same_inputs() {
    let (folder, expected) = corpus();
    let stored: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !["expected.json", "make_malformed.py", "__pycache__"].contains(&name.as_str()))
        .collect();
    assert!(stored.len() >= 70, "{}", stored.len());
    assert!(stored.iter().all(|name| expected.contains_key(name)));
    assert_eq!(stored.len(), expected.len());
    assert!(expected.values().all(|words| words.len() >= 2), "a name and a word for what is wrong");
}
