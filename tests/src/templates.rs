//! The templates that the tests' guests start from: one store for all of them, so that each kind of guest boots once.
//!
//! It is kept from one run of the tests to the next, as a person's store would be: a new `vmm` or kernel makes new templates. Building
//! one takes a lock of `vmm`'s, so tests may do it at once.

use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use crate::artefacts;

/// The store. `VMM_TEMPLATES` in the environment chooses another.
pub fn store() -> PathBuf {
    let path = match std::env::var_os("VMM_TEMPLATES") {
        Some(path) => PathBuf::from(path),
        None => artefacts::target().join("tests/templates"),
    };
    // Nobody else may write to it: vmm looks.
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path).expect("a directory for templates");
    path
}
