//! Measures 2 and 3: instructions that the host's emulator lacks, and what we do in their place.

/// What to do about an instruction that could not be emulated.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Raise #BP behind it.
    Breakpoint,
    /// Go on behind it: it has no effect that anybody could see. The number is its length.
    Skip(u64),
    /// Raise #UD at it: it is user mode's, and only its process may suffer.
    Undefined,
    /// Not ours: the kernel needs something that we cannot give.
    Unknown,
}

/// Decides by the instruction's bytes and the privilege level it ran at.
pub fn decide(bytes: &[u8], cpl: u8) -> Action {
    if cpl == 3 {
        return Action::Undefined;
    }
    match bytes {
        // int3: Linux tests it once at boot, and uses it when it patches its own code with several vCPUs.
        [0xcc, ..] => Action::Breakpoint,
        // fwait: waits for x87 exceptions, which a kernel keeps masked.
        [0x9b, ..] => Action::Skip(1),
        _ => Action::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_what_linux_needs_and_nothing_more() {
        assert_eq!(decide(&[0xcc, 0x90], 0), Action::Breakpoint);
        assert_eq!(decide(&[0x9b, 0xdb, 0xe3], 0), Action::Skip(1));
        assert_eq!(decide(&[0x0f, 0xae, 0x2f], 0), Action::Unknown);
        assert_eq!(decide(&[], 0), Action::Unknown);
    }

    #[test]
    fn user_mode_gets_an_exception_whatever_it_was() {
        for bytes in [&[0xcc][..], &[0x9b], &[0x0f, 0x0b], &[]] {
            assert_eq!(decide(bytes, 3), Action::Undefined);
        }
    }
}
