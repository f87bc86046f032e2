//! Which tensors a job takes: include and exclude globs on the full dotted name.

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

use crate::error::{Error, Result};

/// Compiled include and exclude patterns.
#[derive(Debug)]
pub struct Selection {
    include: Option<GlobSet>,
    exclude: GlobSet,
}

impl Selection {
    /// Compiles the patterns. No `include` means everything.
    pub fn new(include: Option<&[String]>, exclude: Option<&[String]>) -> Result<Self> {
        Ok(Self {
            include: include.map(|patterns| compile("include", patterns)).transpose()?,
            exclude: compile("exclude", exclude.unwrap_or_default())?,
        })
    }

    /// Whether the tensor of this name is taken.
    #[must_use]
    pub fn takes(&self, name: &str) -> bool {
        self.include.as_ref().is_none_or(|include| include.is_match(name)) && !self.exclude.is_match(name)
    }
}

/// Compiles globs on tensor names; `argument` is where they come from, for messages.
pub fn compile(argument: &'static str, patterns: &[String]) -> Result<GlobSet> {
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        // Dots are ordinary characters, and so are slashes: `*` crosses both.
        let glob = GlobBuilder::new(pattern).literal_separator(false).backslash_escape(true).build();
        set.add(glob.map_err(|fault| Error::Argument {
            name: argument,
            found: format!("{pattern:?} ({})", fault.kind()),
            expected: "a glob on tensor names, such as \"model.layers.0.*\"".into(),
        })?);
    }
    set.build().map_err(|fault| Error::Argument {
        name: argument,
        found: fault.to_string(),
        expected: "globs on tensor names".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selection(include: Option<&[&str]>, exclude: &[&str]) -> Selection {
        let owned = |patterns: &[&str]| patterns.iter().map(|&p| p.to_owned()).collect::<Vec<_>>();
        Selection::new(include.map(owned).as_deref(), Some(&owned(exclude))).unwrap()
    }

    #[test]
    fn stars_cross_dots() {
        let taken = selection(Some(&["model.*.weight", "lm_head*"]), &["*.norm.*"]);
        assert!(taken.takes("model.layers.0.q.weight"));
        assert!(taken.takes("lm_head.weight"));
        assert!(!taken.takes("model.norm.weight"));
        assert!(!taken.takes("model.layers.0.q.bias"));
    }

    #[test]
    fn a_malformed_glob_names_itself() {
        let fault = Selection::new(Some(&["a[".into()]), None).unwrap_err().to_string();
        assert!(fault.contains("include") && fault.contains("a["), "{fault}");
    }

    #[test]
    fn an_empty_include_takes_nothing() {
        assert!(!selection(Some(&[]), &[]).takes("a"));
    }
}
