//! The kernel's command line, put together word by word and checked before a VM exists.
//!
//! The planner calls it on the controller thread: it pushes what the machine itself needs (console, `virtio_mmio.device=`,
//! measures for hosts that emulate kernel mode) and then what the user gave. Two things of Linux are minded here so that
//! nobody else has to: of several `clearcpuid=` only the last counts, so they are merged into one; and what follows a
//! lone `--` belongs to init, so words pushed later still go in front of it.

use thiserror::Error;

use crate::layout::COMMAND_LINE_MAX;

/// Why a text cannot be part of a command line.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CmdlineError {
    /// A byte that is no printable ASCII character or blank: NUL ends the line early, a newline has no meaning in it.
    #[error("kernel command line: byte {byte:#04x} at position {position} is not printable ASCII: remove it")]
    NotPrintable {
        /// The byte.
        byte: u8,
        /// Its place in the text that was given.
        position: usize,
    },
    /// Longer than the kernel reads.
    #[error(
        "kernel command line: {length} characters are too many: shorten --cmdline, the kernel takes {max}"
    )]
    TooLong {
        /// Characters of the whole line.
        length: usize,
        /// The most that the kernel takes.
        max: usize,
    },
}

const CLEARCPUID: &str = "clearcpuid=";

/// A command line under construction: always printable ASCII, never longer than the kernel reads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cmdline {
    words: Vec<String>,
    cleared_features: Vec<String>,
    init_args: Vec<String>,
}

impl Cmdline {
    /// Most characters, without the NUL at the end.
    pub const MAX: usize = COMMAND_LINE_MAX - 1;

    /// An empty line.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends the words of `text` (blanks inside double quotes do not separate, as in Linux's `next_arg`). Each
    /// `clearcpuid=` is merged with those before; what follows a lone `--` goes to init.
    ///
    /// # Errors
    /// A byte is not printable ASCII, or the line grows longer than [`Self::MAX`]. The line is then unchanged.
    pub fn push(&mut self, text: &str) -> Result<(), CmdlineError> {
        if let Some((position, byte)) =
            text.bytes().enumerate().find(|(_, byte)| !matches!(byte, b' ' | b'\t' | b'!'..=b'~'))
        {
            return Err(CmdlineError::NotPrintable { byte, position });
        }
        let mut grown = self.clone();
        let mut to_init = false;
        for word in words(text) {
            if to_init {
                grown.init_args.push(word.to_owned());
            } else if word == "--" {
                to_init = true;
            } else if let Some(features) = word.strip_prefix(CLEARCPUID) {
                grown.merge_features(features.split(','));
            } else {
                grown.words.push(word.to_owned());
            }
        }
        grown.check()?;
        *self = grown;
        Ok(())
    }

    /// Adds CPU features, by name or number, to the one `clearcpuid=` of the line.
    ///
    /// # Errors
    /// The line grows longer than [`Self::MAX`]; it is then unchanged.
    pub fn clear_features<'a>(
        &mut self,
        features: impl IntoIterator<Item = &'a str>,
    ) -> Result<(), CmdlineError> {
        let mut grown = self.clone();
        grown.merge_features(features);
        grown.check()?;
        *self = grown;
        Ok(())
    }

    /// Whether the kernel's part has this very word, or this `key=` when the text ends with `=`.
    pub fn contains(&self, word: &str) -> bool {
        self.words.iter().any(|have| have == word || (word.ends_with('=') && have.starts_with(word)))
    }

    /// The whole line, without a NUL.
    pub fn text(&self) -> String {
        let mut parts: Vec<&str> = self.words.iter().map(String::as_str).collect();
        let features = format!("{CLEARCPUID}{}", self.cleared_features.join(","));
        if !self.cleared_features.is_empty() {
            parts.push(&features);
        }
        if !self.init_args.is_empty() {
            parts.push("--");
            parts.extend(self.init_args.iter().map(String::as_str));
        }
        parts.join(" ")
    }

    fn merge_features<'a>(&mut self, features: impl IntoIterator<Item = &'a str>) {
        for feature in features.into_iter().filter(|feature| !feature.is_empty()) {
            if !self.cleared_features.iter().any(|have| have == feature) {
                self.cleared_features.push(feature.to_owned());
            }
        }
    }

    fn check(&self) -> Result<(), CmdlineError> {
        let length = self.text().len();
        if length > Self::MAX {
            return Err(CmdlineError::TooLong { length, max: Self::MAX });
        }
        Ok(())
    }
}

/// Splits at blanks outside double quotes.
fn words(text: &str) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    text.split(move |c: char| {
        quoted ^= c == '"';
        !quoted && matches!(c, ' ' | '\t')
    })
    .filter(|word| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn words_keep_their_order_and_quotes() {
        let mut line = Cmdline::new();
        line.push("console=ttyS0  quiet").unwrap();
        line.push("dyndbg=\"file a b +p\"\tpanic=1").unwrap();
        assert_eq!(line.text(), "console=ttyS0 quiet dyndbg=\"file a b +p\" panic=1");
        assert!(line.contains("quiet") && line.contains("console=") && !line.contains("qui"));
    }

    #[test]
    fn only_one_clearcpuid_is_left() {
        let mut line = Cmdline::new();
        line.clear_features(["smap", "erms"]).unwrap();
        line.push("ro clearcpuid=erms,395 clearcpuid=umip,").unwrap();
        assert_eq!(line.text(), "ro clearcpuid=smap,erms,395,umip");
    }

    #[test]
    fn arguments_of_init_stay_last() {
        let mut line = Cmdline::new();
        line.push("quiet -- single clearcpuid=x").unwrap();
        line.push("noxsave").unwrap();
        assert_eq!(line.text(), "quiet noxsave -- single clearcpuid=x");
    }

    #[test]
    fn bad_bytes_and_lengths_are_refused_and_leave_the_line() {
        let mut line = Cmdline::new();
        line.push("quiet").unwrap();
        for (text, byte, position) in [("a\0b", 0, 1), ("ab\n", b'\n', 2), ("\u{e9}", 0xc3, 0)] {
            assert_eq!(line.push(text), Err(CmdlineError::NotPrintable { byte, position }));
        }
        assert_eq!(line.push(&"x".repeat(2042)), Err(CmdlineError::TooLong { length: 2048, max: 2047 }));
        assert_eq!(line.text(), "quiet");
        line.push(&"x".repeat(2041)).unwrap();
        assert_eq!(line.text().len(), Cmdline::MAX);
    }

    proptest! {
        #[test]
        fn any_text_keeps_the_line_printable_and_bounded(texts in prop::collection::vec(".{0,700}", 0..6)) {
            let mut line = Cmdline::new();
            for text in &texts {
                let _ = line.push(text);
            }
            let text = line.text();
            prop_assert!(text.len() <= Cmdline::MAX);
            prop_assert!(text.bytes().all(|byte| matches!(byte, b'\t' | b' '..=b'~')));
        }
    }
}
